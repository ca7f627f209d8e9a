//! Records as user properties of datasets and snapshots.
//!
//! A record is one small property, `org.flocker:KEY`, whose value is a header and, where it fits, the body:
//! `FORMAT KIND GENERATION CHUNKS CHECKSUM BODY`. A longer body lies in properties of its own,
//! `org.flocker:KEY.GENERATION.N`, which are written first, under the number of a new generation: the header then turns
//! to them by one atomic step, and those of the old generation are dropped. So a record is always whole, also where the
//! program sets one property at a time. The body is JSON in ASCII, so that an operator can read it and nothing cuts it.
//! Refuses to know what the bodies mean.

use std::io;

use serde::{Serialize, de::DeserializeOwned};

use crate::records::RecordError;

/// What all our properties begin with.
pub(super) const MODULE: &str = "org.flocker:";

/// The form of a record that this version writes.
const FORMAT: u32 = 1;

/// The longest value that is written: zfs-fuse 0.7 takes 1,023 bytes and OpenZFS 8,191.
const VALUE_LIMIT: usize = 1000;

/// The longest body, in bytes: 64 KiB of metadata, each byte escaped as six at worst, and room for the rest.
const BODY_LIMIT: usize = 1024 * 1024;

/// A property to set.
pub(super) type Property = (String, String);

/// A record as it is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Encoded {
    /// Written last.
    pub(super) header: Property,
    /// Written first.
    pub(super) chunks: Vec<Property>,
}

impl Encoded {
    /// Lists all of it, for a command that sets everything at once.
    pub(super) fn all(&self) -> impl Iterator<Item = &Property> {
        self.chunks.iter().chain([&self.header])
    }
}

/// The first words of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header<'a> {
    kind: &'a str,
    /// Grows with each write.
    pub(super) generation: u64,
    /// How many chunks the body lies in; none: it follows.
    pub(super) chunks: usize,
    checksum: &'a str,
    body: &'a str,
}

/// Names the property of a record.
pub(super) fn name(key: &str) -> String {
    format!("{MODULE}{key}")
}

/// Names the chunks of one generation of a record.
pub(super) fn chunk_names(key: &str, generation: u64, chunks: usize) -> Vec<String> {
    (0..chunks).map(|chunk| format!("{MODULE}{key}.{generation}.{chunk}")).collect()
}

/// Makes the properties of a record.
pub(super) fn encode<T: Serialize>(kind: &str, key: &str, generation: u64, body: &T) -> io::Result<Encoded> {
    let body = ascii(&serde_json::to_string(body)?);
    let checksum = blake3::hash(body.as_bytes()).to_hex();
    let header = |chunks: usize, body: &str| format!("{FORMAT} {kind} {generation} {chunks} {checksum} {body}");
    let inline = header(0, &body);
    if inline.len() <= VALUE_LIMIT {
        return Ok(Encoded { header: (name(key), inline), chunks: Vec::new() });
    }
    let pieces: Vec<String> = body.as_bytes().chunks(VALUE_LIMIT).map(lossless).collect();
    let header = (name(key), header(pieces.len(), "-"));
    Ok(Encoded { header, chunks: chunk_names(key, generation, pieces.len()).into_iter().zip(pieces).collect() })
}

/// Cuts of ASCII text are text.
fn lossless(piece: &[u8]) -> String {
    piece.iter().map(|byte| char::from(*byte)).collect()
}

/// Writes what is not ASCII as escapes, which JSON knows inside strings; elsewhere it holds nothing else.
fn ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for char in json.chars() {
        if char.is_ascii() && char != '\x7f' {
            text.push(char);
        } else {
            for unit in char.encode_utf16(&mut [0; 2]) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    text
}

/// Reads a header.
pub(super) fn header(value: &str) -> Result<Header<'_>, RecordError> {
    let damaged = || RecordError::Damaged("its first words are no header".to_owned());
    let mut words = value.splitn(6, ' ');
    let mut word = || words.next().ok_or_else(damaged);
    let format: u32 = word()?.parse().map_err(|_| damaged())?;
    if format > FORMAT {
        return Err(RecordError::Newer(format));
    }
    let kind = word()?;
    let generation = word()?.parse().map_err(|_| damaged())?;
    let chunks: usize = word()?.parse().map_err(|_| damaged())?;
    if format == 0 || chunks > BODY_LIMIT / VALUE_LIMIT + 1 {
        return Err(damaged());
    }
    Ok(Header { kind, generation, chunks, checksum: word()?, body: word()? })
}

/// Reads a record. `chunk` returns the value of a chunk's property.
pub(super) fn decode<'a, T: DeserializeOwned>(
    kind: &str,
    key: &str,
    value: &str,
    chunk: impl Fn(&str) -> Option<&'a str>,
) -> Result<T, RecordError> {
    let Header { kind: found, generation, chunks, checksum, body } = header(value)?;
    if found != kind {
        return Err(RecordError::Damaged(format!("it is a record of a {found:.40}, not of a {kind}")));
    }
    let joined = if chunks == 0 {
        body.to_owned()
    } else {
        let names = chunk_names(key, generation, chunks);
        let pieces: Option<Vec<&str>> = names.iter().map(|name| chunk(name)).collect();
        pieces.ok_or_else(|| RecordError::Damaged("a part of it is missing".to_owned()))?.concat()
    };
    if blake3::hash(joined.as_bytes()).to_hex().as_str() != checksum {
        return Err(RecordError::Damaged("its checksum does not match".to_owned()));
    }
    serde_json::from_str(&joined).map_err(|error| RecordError::Damaged(error.to_string()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;

    type Body = BTreeMap<String, String>;

    fn small() -> Body {
        BTreeMap::from([("schlüssel\t".to_owned(), "värde 🦀 \u{7f}".to_owned())])
    }

    fn read(encoded: &Encoded) -> Result<Body, RecordError> {
        let chunks: BTreeMap<_, _> = encoded.chunks.iter().cloned().collect();
        decode("sample", "record", &encoded.header.1, |name| chunks.get(name).map(String::as_str))
    }

    #[test]
    fn the_text_of_a_record_stays_as_it_is() {
        let encoded = encode("sample", "record", 3, &small()).unwrap();
        assert_eq!(encoded.header.0, "org.flocker:record");
        assert_eq!(
            encoded.header.1,
            concat!(
                "1 sample 3 0 922ddf09af008e1a299f12e94fe858cba95b7e3794f79552c50a894436578eb3 ",
                r#"{"schl\u00fcssel\t":"v\u00e4rde \ud83e\udd80 \u007f"}"#
            )
        );
        assert_eq!(read(&encoded).unwrap(), small());
    }

    #[test]
    fn a_long_record_lies_in_chunks_that_all_fit_and_must_all_be_there() {
        let long = BTreeMap::from([("key".to_owned(), (0..12_000).map(|n| format!("é{n}\"")).collect::<String>())]);
        let encoded = encode("sample", "record", 7, &long).unwrap();
        assert!(encoded.all().all(|(_, value)| value.len() <= VALUE_LIMIT && value.is_ascii()));
        assert_eq!(read(&encoded).unwrap(), long);
        for gone in [0, encoded.chunks.len() / 2, encoded.chunks.len() - 1] {
            let mut damaged = encoded.clone();
            damaged.chunks.remove(gone);
            assert!(read(&damaged).is_err(), "chunk {gone}");
        }
        let mut damaged = encoded.clone();
        damaged.chunks.swap(1, 2);
        let names: Vec<_> = encoded.chunks.iter().map(|(name, _)| name.clone()).collect();
        damaged.chunks.iter_mut().zip(names).for_each(|(chunk, name)| chunk.0 = name);
        assert!(read(&damaged).is_err(), "two chunks changed places");
    }

    #[test]
    fn any_damage_is_noticed_and_a_newer_form_is_told_apart() {
        let encoded = encode("sample", "record", 1, &small()).unwrap();
        let value = &encoded.header.1;
        for cut in 0..value.len() {
            let damaged = Encoded { header: (String::new(), value[..cut].to_owned()), chunks: Vec::new() };
            assert!(read(&damaged).is_err(), "cut at {cut}");
        }
        let decode = |value: &str| decode::<Body>("sample", "record", value, |_| None);
        assert!(matches!(decode("2 sample 1 0 x y"), Err(RecordError::Newer(2))));
        assert!(matches!(decode(&value.replace("sample", "other")), Err(RecordError::Damaged(_))));
        assert!(decode("1 sample 1 99999999 x -").is_err());
    }
}
