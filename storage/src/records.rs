//! Records: small JSON files beside the data, written by one atomic step and checked when read.
//!
//! Owns the form of a record file: a first line `{"format":1,"kind":…,"checksum":…}`, then the body as JSON. The checksum
//! is the BLAKE3 hash of the body's bytes, so that damage is noticed. Refuses to know what the bodies mean.
//! Neighbours: the drivers that keep records in files.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::{Error, ErrorKind};

/// The format this version writes; it reads this one and older ones.
pub const RECORD_FORMAT: u32 = 1;

/// The longest record file, in bytes: 64 KiB of metadata, each byte escaped as six at worst, and room for the rest.
pub const RECORD_LIMIT: u64 = 1024 * 1024;

/// The longest first line, in bytes.
const HEADER_LIMIT: usize = 512;

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// There is none.
    #[error("there is no record")]
    Missing,
    /// It was written by a newer version.
    #[error("it has format {0}, written by a newer flocker; this one reads up to format {RECORD_FORMAT}")]
    Newer(u32),
    /// It is cut short, altered, or of another kind.
    #[error("the record is damaged: {0}")]
    Damaged(String),
    /// The operating system refused.
    #[error("cannot read the record: {0}")]
    Io(io::Error),
}

impl RecordError {
    /// Turns it into an error of the pool: a missing record is not found, a damaged one is corrupt.
    pub fn into_error(self, operation: &'static str, object: impl std::fmt::Display) -> Error {
        match self {
            Self::Missing => Error::new(operation, object, ErrorKind::NotFound),
            Self::Io(error) => Error::io(operation, object, error),
            Self::Newer(_) | Self::Damaged(_) => Error::new(operation, object, ErrorKind::Corrupt(self.to_string())),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    kind: String,
    checksum: String,
}

/// Returns the bytes of a record file.
pub fn encode<T: Serialize>(kind: &str, body: &T) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_string_pretty(body)?;
    text.push('\n');
    let checksum = blake3::hash(text.as_bytes()).to_hex().to_string();
    let header = Header { format: RECORD_FORMAT, kind: kind.to_owned(), checksum };
    let mut bytes = serde_json::to_vec(&header)?;
    bytes.push(b'\n');
    bytes.extend_from_slice(text.as_bytes());
    Ok(bytes)
}

/// Reads a record back from the bytes of its file.
pub fn decode<T: DeserializeOwned>(kind: &str, bytes: &[u8]) -> Result<T, RecordError> {
    let damaged = |what: &str| RecordError::Damaged(what.to_owned());
    let end = bytes.iter().take(HEADER_LIMIT).position(|b| *b == b'\n').ok_or_else(|| damaged("no first line"))?;
    let header: Header =
        serde_json::from_slice(&bytes[..end]).map_err(|_| damaged("its first line is not a header"))?;
    if header.format > RECORD_FORMAT {
        return Err(RecordError::Newer(header.format));
    }
    if header.format == 0 {
        return Err(damaged("there is no format 0"));
    }
    if header.kind != kind {
        return Err(RecordError::Damaged(format!("it is a record of a {:.40}, not of a {kind}", header.kind)));
    }
    let body = &bytes[end + 1..];
    if blake3::hash(body).to_hex().as_str() != header.checksum {
        return Err(damaged("its checksum does not match"));
    }
    serde_json::from_slice(body).map_err(|error| RecordError::Damaged(error.to_string()))
}

/// Reads a record file.
pub fn read<T: DeserializeOwned>(kind: &str, path: &Path) -> Result<T, RecordError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(RecordError::Missing),
        Err(error) => return Err(RecordError::Io(error)),
    };
    let mut bytes = Vec::new();
    file.take(RECORD_LIMIT + 1).read_to_end(&mut bytes).map_err(RecordError::Io)?;
    if bytes.len() as u64 > RECORD_LIMIT {
        return Err(RecordError::Damaged(format!("it is longer than {RECORD_LIMIT} bytes")));
    }
    decode(kind, &bytes)
}

/// Writes a record file so that after a crash the old or the new one is there, whole and durable.
pub fn write<T: Serialize>(kind: &str, dir: &Path, name: &str, body: &T) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let bytes = encode(kind, body)?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    drop(file);
    let renamed = written.and_then(|()| fs::rename(&temporary, dir.join(name)));
    if let Err(error) = renamed {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_dir(dir)
}

/// Writes a record file where nobody looks yet. It is durable only once the caller has synced the file system.
pub fn stage<T: Serialize>(kind: &str, dir: &Path, name: &str, body: &T) -> io::Result<()> {
    let bytes = encode(kind, body)?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(dir.join(name))?;
    file.write_all(&bytes)
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;

    fn sample() -> BTreeMap<String, String> {
        BTreeMap::from([("key".to_owned(), "value".to_owned())])
    }

    #[test]
    fn the_bytes_of_a_record_file_stay_as_they_are() {
        let bytes = encode("sample", &sample()).unwrap();
        let golden = concat!(
            r#"{"format":1,"kind":"sample","checksum":"a18a2fff7cca94601e8f852cf977d8181c4e5368b71ae31d2e72afa5c6a1bb8e"}"#,
            "\n{\n  \"key\": \"value\"\n}\n"
        );
        assert_eq!(String::from_utf8(bytes).unwrap(), golden);
    }

    #[test]
    fn a_record_is_read_back_as_written_and_any_damage_is_noticed() {
        let bytes = encode("sample", &sample()).unwrap();
        assert_eq!(decode::<BTreeMap<String, String>>("sample", &bytes).unwrap(), sample());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x01;
            assert!(decode::<BTreeMap<String, String>>("sample", &damaged).is_err(), "byte {at}");
            assert!(decode::<BTreeMap<String, String>>("sample", &bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_record_of_a_newer_format_or_another_kind_is_told_apart_from_damage() {
        let newer = br#"{"format":2,"kind":"sample","checksum":"new"}
{}"#;
        assert!(matches!(decode::<BTreeMap<String, String>>("sample", newer), Err(RecordError::Newer(2))));
        let other = encode("other", &sample()).unwrap();
        assert!(matches!(decode::<BTreeMap<String, String>>("sample", &other), Err(RecordError::Damaged(_))));
    }

    #[test]
    fn a_write_replaces_the_file_and_leaves_no_other() {
        let dir = tempfile::tempdir().unwrap();
        write("sample", dir.path(), "r.json", &1).unwrap();
        write("sample", dir.path(), "r.json", &2).unwrap();
        assert_eq!(read::<u32>("sample", &dir.path().join("r.json")).unwrap(), 2);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(matches!(read::<u32>("sample", &dir.path().join("none")), Err(RecordError::Missing)));
    }
}
