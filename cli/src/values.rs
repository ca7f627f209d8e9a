//! What a user types, as values: sizes, times, metadata, references. Parsed once, here, with errors that show the rule.

use std::{str::FromStr, time::Duration};

use flocker_node::api::client::{Metadata, ParseError, SnapshotName, SnapshotRef, VolumeName};
use jiff::SignedDuration;

/// A number of bytes: `512MiB`, `10G`, `1.5T`, `1000000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

/// Suffixes of a size and what they stand for. As in zfs and docker a lone letter is a power of 1024.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KIB", 1 << 10),
    ("KB", 1_000),
    ("M", 1 << 20),
    ("MIB", 1 << 20),
    ("MB", 1_000_000),
    ("G", 1 << 30),
    ("GIB", 1 << 30),
    ("GB", 1_000_000_000),
    ("T", 1 << 40),
    ("TIB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("P", 1 << 50),
    ("PIB", 1 << 50),
    ("PB", 1_000_000_000_000_000),
];

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            "it is not a size: write a number and a unit, such as 512MiB, 10G or 1.5T (K, M, G, T, P are powers of 1024)"
                .to_owned()
        };
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = unit.trim().to_ascii_uppercase();
        let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor).ok_or_else(wrong)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.len() > 9 || fraction.contains('.') {
            return Err(wrong());
        }
        let whole: u128 = whole.parse().map_err(|_| wrong())?;
        let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| wrong())? };
        let scale = 10u128.pow(fraction.len() as u32);
        let bytes =
            whole.checked_mul(factor.into()).and_then(|bytes| bytes.checked_add(part * u128::from(factor) / scale));
        match bytes.map(u64::try_from) {
            Some(Ok(0)) => Err("it must be more than nothing".to_owned()),
            Some(Ok(bytes)) => Ok(Self(bytes)),
            _ => Err("it is more than 16 EiB".to_owned()),
        }
    }
}

/// A length of time: `90s`, `1h`, `1h 30m`, `2 days`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "it is not a length of time: write such as 90s, 15m, 1h 30m or 24h".to_owned();
    let parsed: SignedDuration = text.parse().map_err(|_| wrong())?;
    match Duration::try_from(parsed) {
        Ok(duration) if duration.as_secs() >= 1 => Ok(duration),
        _ => Err("it must be one second at least".to_owned()),
    }
}

/// `KEY=VALUE`, the value may be empty and hold further `=`.
pub(crate) fn metadata_item(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some(("", _)) => Err("it has no key; write it as KEY=VALUE".to_owned()),
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err("it has no '='; write it as KEY=VALUE".to_owned()),
    }
}

/// Puts metadata together; a key given twice keeps its last value, as with environment variables of `docker run -e`.
pub(crate) fn metadata(items: &[(String, String)]) -> Metadata {
    items.iter().cloned().collect()
}

/// A change of one metadata key: `KEY=VALUE` sets it, `KEY-` removes it.
pub(crate) fn metadata_change(text: &str) -> Result<(String, Option<String>), String> {
    if text.contains('=') {
        return metadata_item(text).map(|(key, value)| (key, Some(value)));
    }
    match text.strip_suffix('-') {
        Some(key) if !key.is_empty() => Ok((key.to_owned(), None)),
        _ => Err("write KEY=VALUE to set a key, or KEY- to remove it".to_owned()),
    }
}

/// A volume or one of its snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    /// `VOLUME`.
    Volume(VolumeName),
    /// `VOLUME@SNAPSHOT`.
    Snapshot(SnapshotRef),
}

impl FromStr for Object {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.contains('@') { text.parse().map(Self::Snapshot) } else { text.parse().map(Self::Volume) }
    }
}

impl Object {
    /// Returns the volume's name.
    pub(crate) fn volume(&self) -> &VolumeName {
        match self {
            Self::Volume(name) => name,
            Self::Snapshot(snapshot) => &snapshot.volume,
        }
    }

    /// Returns the snapshot's name.
    pub(crate) fn snapshot(&self) -> Option<&SnapshotName> {
        match self {
            Self::Volume(_) => None,
            Self::Snapshot(snapshot) => Some(&snapshot.snapshot),
        }
    }
}

/// `VOLUME@SNAPSHOT`, of a snapshot that exists already.
pub(crate) fn existing_snapshot(text: &str) -> Result<SnapshotRef, String> {
    if !text.contains('@') && text.parse::<VolumeName>().is_ok() {
        return Err(format!(
            "it names a volume, not a snapshot; write {text}@SNAPSHOT (flocker snapshots {text} lists them)"
        ));
    }
    text.parse().map_err(|error: ParseError| error.to_string())
}

/// `VOLUME@SNAPSHOT`, of a snapshot to be taken.
pub(crate) fn new_snapshot(text: &str) -> Result<SnapshotRef, String> {
    if !text.contains('@') && text.parse::<VolumeName>().is_ok() {
        return Err(format!("it has no name for the snapshot; write {text}@NAME"));
    }
    text.parse().map_err(|error: ParseError| error.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_unless_they_say_kb() {
        for (text, bytes) in
            [("1", 1), ("10G", 10 << 30), ("512MiB", 512 << 20), ("1.5k", 1536), ("2 T", 2 << 40), ("3MB", 3_000_000)]
        {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "10X", "-1", "1.2.3G", "0", "99999999999P", "1e3", ".5G"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_friendly() {
        assert_eq!(duration("1h").unwrap(), Duration::from_secs(3600));
        assert_eq!(duration("90s").unwrap(), Duration::from_secs(90));
        assert_eq!(duration("1h 30m").unwrap(), Duration::from_secs(5400));
        for text in ["", "soon", "10", "-1h", "0s", "20ms"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_metadata_change_sets_or_removes() {
        assert_eq!(metadata_change("k=a=b"), Ok(("k".into(), Some("a=b".into()))));
        assert_eq!(metadata_change("k="), Ok(("k".into(), Some(String::new()))));
        assert_eq!(metadata_change("k-"), Ok(("k".into(), None)));
        for text in ["k", "-", "=v"] {
            assert!(metadata_change(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_volume_where_a_snapshot_is_wanted_is_told_what_to_write() {
        assert!(existing_snapshot("db").unwrap_err().contains("write db@SNAPSHOT (flocker snapshots db lists them)"));
        assert!(new_snapshot("db").unwrap_err().contains("write db@NAME"));
        assert!(existing_snapshot("db@a/b").unwrap_err().contains("letter or digit"));
        assert_eq!(existing_snapshot("db@one").unwrap().to_string(), "db@one");
    }
}
