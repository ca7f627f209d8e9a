//! The words of the field as types: ids, names, volumes, snapshots, lineages.
//!
//! Owns the parsing of every name and id, once, at the edge. Refuses to know pools, peers and drivers.
//! Neighbours: every other module of this crate, and `flocker-replication`, which compares lineages.

use std::{collections::BTreeMap, fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

/// The longest name of a volume, snapshot or node, in bytes.
pub const NAME_LIMIT: usize = 128;

/// A piece of text that is not what it should be: a name, an id, a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {wanted}: {rule}")]
pub struct ParseError {
    /// What was wanted, in words ("volume name").
    pub wanted: &'static str,
    /// The text as given, cut to a printable length.
    pub text: String,
    /// The rule it breaks.
    pub rule: &'static str,
}

impl ParseError {
    fn new(wanted: &'static str, text: &str, rule: &'static str) -> Self {
        let text = text.chars().take(160).collect();
        Self { wanted, text, rule }
    }
}

const NAME_RULE: &str =
    "it must start with a letter or digit and hold only letters, digits, '_', '.' and '-', 128 bytes at most";

fn check_name(wanted: &'static str, text: &str) -> Result<(), ParseError> {
    let bytes = text.as_bytes();
    let starts_well = bytes.first().is_some_and(u8::is_ascii_alphanumeric);
    let goes_on_well = bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if starts_well && goes_on_well && bytes.len() <= NAME_LIMIT {
        Ok(())
    } else {
        Err(ParseError::new(wanted, text, NAME_RULE))
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $wanted:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                check_name($wanted, text)?;
                Ok(Self(text.to_owned()))
            }
        }
        impl TryFrom<String> for $name {
            type Error = ParseError;
            fn try_from(text: String) -> Result<Self, ParseError> {
                check_name($wanted, &text)?;
                Ok(Self(text))
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name_type!(
    /// A volume's name: unique on one node, `[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}`.
    VolumeName, "volume name"
);
name_type!(
    /// A snapshot's name: unique within one volume, `[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}`.
    SnapshotName, "snapshot name"
);
name_type!(
    /// A node's human name: `[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}`.
    NodeName, "node name"
);

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $wanted:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// Mints a new id (UUIDv7: the time in its upper bits, randomness below).
            pub fn mint() -> Self {
                Self(crate::clock::mint())
            }
            /// Returns the last eight hexadecimal digits: the random part, short enough to read aloud.
            pub fn short(&self) -> String {
                let text = self.0.simple().to_string();
                text[24..].to_owned()
            }
        }
        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                Uuid::parse_str(text).map(Self).map_err(|_| ParseError::new($wanted, text, "it must be a UUID"))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0.hyphenated())
            }
        }
    };
}

id_type!(
    /// A volume's identity: minted once, the same on every node.
    VolumeId, "volume id"
);
id_type!(
    /// A snapshot's identity: minted once, the same on every node.
    SnapshotId, "snapshot id"
);

/// A node's identity as this crate sees it: 32 opaque bytes, shown as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub [u8; 32]);

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostId({self})")
    }
}

impl FromStr for HostId {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || ParseError::new("host id", text, "it must be 64 hexadecimal digits");
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut id = [0; 32];
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self(id))
    }
}

impl Serialize for HostId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for HostId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

/// The host a snapshot was taken on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The node's identity.
    pub id: HostId,
    /// The node's name when the snapshot was taken.
    pub name: NodeName,
}

/// Arbitrary user metadata: text keys to text values.
pub type Metadata = BTreeMap<String, String>;

/// The most metadata one volume or snapshot may carry: the sum of its keys and values, in bytes.
pub const METADATA_LIMIT: usize = 64 * 1024;

/// Checks user metadata against [`METADATA_LIMIT`]; keys must not be empty and must hold no control character.
pub fn check_metadata(metadata: &Metadata) -> Result<(), ParseError> {
    let total: usize = metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    if total > METADATA_LIMIT {
        return Err(ParseError::new("metadata", &format!("{total} bytes"), "64 KiB at most, keys and values together"));
    }
    match metadata.keys().find(|key| key.is_empty() || key.chars().any(char::is_control)) {
        Some(key) => Err(ParseError::new("metadata key", key, "it must not be empty or hold control characters")),
        None => Ok(()),
    }
}

/// Whether a volume's head may be written on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The head is writable here.
    Primary,
    /// The head is read-only until it is promoted.
    Replica,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Primary => "primary",
            Self::Replica => "replica",
        })
    }
}

/// One snapshot of one volume, on whatever node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotKey {
    /// The volume that holds the snapshot.
    pub volume: VolumeId,
    /// The snapshot.
    pub snapshot: SnapshotId,
}

/// What is known of a volume besides its contents. The driver keeps it beside the data and returns it as given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The same on every node.
    pub id: VolumeId,
    /// Unique on one node.
    pub name: VolumeName,
    /// The user's own words.
    pub metadata: Metadata,
    /// When the volume was created, on whatever node that was.
    pub created: Timestamp,
    /// The snapshot it was cloned or forked from, held by another volume.
    pub origin: Option<SnapshotKey>,
    /// Whether the head may be written here.
    pub role: Role,
    /// Grows with each change of the primary.
    pub epoch: u64,
    /// Who became the primary when the epoch began; `None` where an older version wrote the record.
    #[serde(default)]
    pub primary: Option<Host>,
    /// The most bytes the volume may hold, where the driver can limit it.
    pub quota_bytes: Option<u64>,
}

impl VolumeRecord {
    /// Returns who is the primary by this record, for comparing it with another node's record of the volume.
    pub fn claim(&self) -> Claim {
        Claim { epoch: self.epoch, primary: self.primary.as_ref().map(|host| host.id) }
    }
}

/// Who is a volume's primary, and since when. The greatest one of all nodes counts: the newer epoch, and of two nodes
/// that were promoted apart from each other in the same epoch always the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim {
    /// The epoch.
    pub epoch: u64,
    /// The node that became the primary when it began.
    pub primary: Option<HostId>,
}

/// A static pointer to a volume's contents at a time. The same on every node that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Minted once, the same everywhere.
    pub id: SnapshotId,
    /// Unique within its volume.
    pub name: SnapshotName,
    /// The snapshots it follows: none for a first one, one, or two after a merge.
    pub parents: Vec<SnapshotId>,
    /// Where it was taken.
    pub host: Host,
    /// When it was taken, by that host's clock. Shown to people; never compared.
    pub created: Timestamp,
    /// The user's own words.
    pub metadata: Metadata,
}

/// A snapshot as one node holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldSnapshot {
    /// The snapshot itself.
    pub snapshot: Snapshot,
    /// The volume on this node that holds it (another one than asked for, along an origin).
    pub volume: VolumeId,
    /// Whether its contents are the same as those of its first parent.
    pub unchanged: bool,
    /// The sum of the sizes of its regular files, in bytes.
    pub logical_bytes: u64,
}

impl HeldSnapshot {
    /// Returns the key by which the driver finds it.
    pub fn key(&self) -> SnapshotKey {
        SnapshotKey { volume: self.volume, snapshot: self.snapshot.id }
    }
}

/// A volume's snapshots oldest first: those of the volume it was cloned from, up to its origin, then its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Lineage {
    /// Oldest first.
    pub snapshots: Vec<HeldSnapshot>,
}

impl Lineage {
    /// Returns the newest snapshot.
    pub fn tip(&self) -> Option<&HeldSnapshot> {
        self.snapshots.last()
    }
    /// Finds a snapshot by id.
    pub fn find(&self, id: SnapshotId) -> Option<&HeldSnapshot> {
        self.snapshots.iter().find(|held| held.snapshot.id == id)
    }
}

/// Whether a head differs from its volume's newest snapshot (or from nothing, where there is none).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadState {
    /// The head equals the newest snapshot, or there is neither.
    Clean,
    /// The head has changes since the newest snapshot.
    Dirty,
}

/// `volume` or `volume@snapshot`, as a user types it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRef {
    /// The part before the `@`.
    pub volume: VolumeName,
    /// The part behind the `@`.
    pub snapshot: SnapshotName,
}

impl FromStr for SnapshotRef {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let Some((volume, snapshot)) = text.split_once('@') else {
            return Err(ParseError::new("snapshot", text, "write it as VOLUME@SNAPSHOT"));
        };
        Ok(Self { volume: volume.parse()?, snapshot: snapshot.parse()? })
    }
}

impl fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}
