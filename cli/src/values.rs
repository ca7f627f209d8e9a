//! What a user types, as values: sizes, times, metadata, references. Parsed once, here, with errors that show the rule.

use std::{str::FromStr, time::Duration};

use flocker_node::api::client::{Metadata, ParseError, SnapshotName, SnapshotRef, VolumeName};
pub(crate) use flocker_node::size::Size;
use jiff::SignedDuration;

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
