//! What an export says in front of its members: which snapshot the tree is, and its digest.
//!
//! Owns the form: a global header of pax(1) (`g`) with the one record `comment=flocker-export/1 JSON`. Every `tar` skips a
//! comment without a word. Refuses to know whether it is true; that is told by the digest of what was unpacked.

use std::io::{self, Read};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::BLOCK;
use crate::{
    model::{Host, Metadata, Snapshot, VolumeId, VolumeName, check_metadata},
    tree::digest::TreeDigest,
};

/// What the comment begins with; the version stands behind it.
const PREFIX: &str = "flocker-export/";
const VERSION: &str = "1";

/// The longest header, in bytes: two times 64 KiB of metadata, each byte escaped as six at worst, and room for the rest.
const HEADER_LIMIT: usize = 1024 * 1024;

/// The highest epoch that is believed: with one promotion each second those of a century. It must not run over.
const EPOCH_LIMIT: u64 = u32::MAX as u64;

/// Which snapshot a tarball holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its volume.
    pub volume: ExportedVolume,
    /// The snapshot as it is everywhere: id, name, parents, host, time, metadata.
    pub snapshot: Snapshot,
    /// The sum of the sizes of its regular files, in bytes.
    pub logical_bytes: u64,
    /// Of the tree, root included.
    pub digest: TreeDigest,
}

/// What an export says of the volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedVolume {
    /// The same on every node.
    pub id: VolumeId,
    /// Its name on the node that exported it.
    pub name: VolumeName,
    /// The user's own words.
    pub metadata: Metadata,
    /// When it was created.
    pub created: Timestamp,
    /// The epoch then.
    pub epoch: u64,
    /// The primary then, as far as it was known.
    pub primary: Option<Host>,
}

/// What stands in front of a tarball's members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Front {
    /// A manifest.
    Manifest(Box<Manifest>),
    /// One that cannot be used; in words.
    Unreadable(String),
    /// None: the tarball is not one of ours.
    Nothing,
}

impl Manifest {
    /// Returns the blocks that stand in front of the members.
    pub(super) fn blocks(&self) -> io::Result<Vec<u8>> {
        let text = format!("comment={PREFIX}{VERSION} {}\n", serde_json::to_string(self)?);
        let body = record(&text);
        let mut blocks = header(body.len());
        blocks.extend_from_slice(body.as_bytes());
        blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
        Ok(blocks)
    }
}

/// A record of an extended header: its length in digits, which counts itself, a space, the text.
fn record(text: &str) -> String {
    let mut length = text.len() + 2;
    while format!("{length} {text}").len() != length {
        length += 1;
    }
    format!("{length} {text}")
}

/// The ustar header of a global extended header.
fn header(length: usize) -> Vec<u8> {
    let mut header = vec![0; BLOCK];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, b"pax_global_header");
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{length:011o}\0").as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"g");
    put(257, b"ustar\x0000");
    let sum = checksum(&header);
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// The sum of a header's bytes, those of the sum itself taken as spaces.
fn checksum(header: &[u8]) -> u32 {
    header.iter().enumerate().map(|(at, byte)| u32::from(if (148..156).contains(&at) { b' ' } else { *byte })).sum()
}

/// Reads what stands in front of the members; returns the bytes that were read, too.
pub(super) fn read_front(input: &mut dyn Read) -> io::Result<(Front, Vec<u8>)> {
    let mut bytes = Vec::new();
    input.take(BLOCK as u64).read_to_end(&mut bytes)?;
    let Some(length) = global_header(&bytes) else { return Ok((Front::Nothing, bytes)) };
    if length > HEADER_LIMIT {
        return Ok((Front::Nothing, bytes));
    }
    let wanted = length.next_multiple_of(BLOCK) as u64;
    input.take(wanted).read_to_end(&mut bytes)?;
    let body = bytes.get(BLOCK..BLOCK + length).unwrap_or_default();
    let comment = records(body).find_map(|(key, value)| (key == b"comment").then_some(value));
    let front = comment.map_or(Front::Nothing, understand);
    Ok((front, bytes))
}

/// Returns the length of the body, where a block is the header of a global extended header.
fn global_header(block: &[u8]) -> Option<usize> {
    if block.len() < BLOCK || block[156] != b'g' || &block[257..262] != b"ustar" {
        return None;
    }
    let number = |range: std::ops::Range<usize>| {
        let text = std::str::from_utf8(&block[range]).ok()?;
        usize::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok()
    };
    (number(148..156)? == checksum(block) as usize).then(|| number(124..136)).flatten()
}

/// The records of an extended header, as keys and values; ends where it is damaged.
fn records(mut body: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let space = body.iter().position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&body[..space]).ok()?.parse().ok()?;
        let text = body.get(space + 1..length)?.strip_suffix(b"\n")?;
        body = &body[length..];
        let equals = text.iter().position(|byte| *byte == b'=')?;
        Some((&text[..equals], &text[equals + 1..]))
    })
}

fn understand(comment: &[u8]) -> Front {
    let Some(rest) = comment.strip_prefix(PREFIX.as_bytes()) else { return Front::Nothing };
    let mut parts = rest.splitn(2, |byte| *byte == b' ');
    let (version, body) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    if version != VERSION.as_bytes() {
        let version = String::from_utf8_lossy(version).into_owned();
        return Front::Unreadable(format!("its header has version {version:.20}, and this flocker reads {VERSION}"));
    }
    let manifest: Manifest = match serde_json::from_slice(body) {
        Ok(manifest) => manifest,
        Err(error) => return Front::Unreadable(format!("its header is damaged: {error}")),
    };
    let checked = check_metadata(&manifest.volume.metadata).and_then(|()| check_metadata(&manifest.snapshot.metadata));
    match checked {
        Err(error) => Front::Unreadable(format!("its header is damaged: {error}")),
        Ok(()) if manifest.volume.epoch > EPOCH_LIMIT => {
            Front::Unreadable(format!("its header is damaged: epoch {}", manifest.volume.epoch))
        }
        Ok(()) => Front::Manifest(Box::new(manifest)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::model::SnapshotId;

    pub(in super::super) fn sample() -> Manifest {
        let host = Host { id: "ab".repeat(32).parse().unwrap(), name: "host-a".parse().unwrap() };
        let id = "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap();
        Manifest {
            volume: ExportedVolume {
                id: VolumeId(id),
                name: "db".parse().unwrap(),
                metadata: [("team".to_owned(), "storage\n".to_owned())].into(),
                created: Timestamp::UNIX_EPOCH,
                epoch: 3,
                primary: Some(host.clone()),
            },
            snapshot: Snapshot {
                id: SnapshotId(id),
                name: "one".parse().unwrap(),
                parents: vec![SnapshotId(id)],
                host,
                created: Timestamp::UNIX_EPOCH,
                metadata: Metadata::new(),
            },
            logical_bytes: 7,
            digest: "cd".repeat(32).parse().unwrap(),
        }
    }

    #[test]
    fn a_manifest_comes_back_as_written_with_all_bytes_that_were_read() {
        let mut bytes = sample().blocks().unwrap();
        assert_eq!(bytes.len() % BLOCK, 0);
        let length = bytes.len();
        bytes.extend_from_slice(b"the first member");
        let mut input = bytes.as_slice();
        let (front, read) = read_front(&mut input).unwrap();
        assert_eq!(front, Front::Manifest(Box::new(sample())));
        assert_eq!((read.len(), input), (length, &b"the first member"[..]));
    }

    #[test]
    fn the_form_stays_as_it_is() {
        let bytes = sample().blocks().unwrap();
        let body = String::from_utf8(bytes[BLOCK..].to_vec()).unwrap();
        assert_eq!(
            body.trim_end_matches('\0'),
            concat!(
                r#"632 comment=flocker-export/1 {"volume":{"id":"01890a5d-ac96-774b-bcce-b302099a8057","name":"db","#,
                r#""metadata":{"team":"storage\n"},"created":"1970-01-01T00:00:00Z","epoch":3,"primary":{"id":"#,
                r#""abababababababababababababababababababababababababababababababab","name":"host-a"}},"#,
                r#""snapshot":{"id":"01890a5d-ac96-774b-bcce-b302099a8057","name":"one","#,
                r#""parents":["01890a5d-ac96-774b-bcce-b302099a8057"],"host":{"id":"#,
                r#""abababababababababababababababababababababababababababababababab","name":"host-a"},"#,
                r#""created":"1970-01-01T00:00:00Z","metadata":{}},"logical_bytes":7,"#,
                r#""digest":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_length_that_counts_itself_over_a_power_of_ten_is_right() {
        for length in [1, 7, 8, 95, 96, 97, 98, 99, 993, 994, 995, 996, 9993, 9994, 9995, 9996] {
            let made = record(&"x".repeat(length));
            assert_eq!(made.split(' ').next().unwrap().parse::<usize>().unwrap(), made.len());
        }
    }

    #[test]
    fn a_damaged_header_is_told_from_none_and_nothing_else() {
        let good = sample().blocks().unwrap();
        let front = |bytes: &[u8]| read_front(&mut &*bytes).unwrap().0;
        assert_eq!(front(&good[..100]), Front::Nothing);
        assert_eq!(front(&vec![0; 2048]), Front::Nothing);
        let with = |from: &str, to: &str| {
            let text = String::from_utf8(good.clone()).unwrap();
            assert!(text.contains(from));
            front(text.replace(from, to).as_bytes())
        };
        assert!(
            matches!(with("flocker-export/1", "flocker-export/2"), Front::Unreadable(why) if why.contains("version 2"))
        );
        assert!(matches!(with("\"epoch\"", "\"epxch\""), Front::Unreadable(_)));
        assert_eq!(with("comment=flocker", "comment=flicker"), Front::Nothing);
        for at in 0..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 0x11;
            // Whatever it makes of it, it ends.
            let _ = front(&damaged);
        }
    }
}
