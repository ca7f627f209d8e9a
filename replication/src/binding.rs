//! Which of the receiver's volumes an offer is for.
//!
//! Owns the rule that ties an offered volume id and a wanted name to a volume here. Refuses to know snapshots.
//! Neighbours: [`crate::message::Answer`] carries the result, [`crate::divergence`] compares with it.
//!
//! | name wanted | held here | bound to |
//! |---|---|---|
//! | the volume's own | the offered id, under whatever name | that volume |
//! | any | this name with the offered id or its sibling id | that volume |
//! | any | this name with another id | taken: an unrelated volume |
//! | another (`--as`) | the sibling id under another name | that volume |
//! | another (`--as`) | the offered id under another name, or it is arriving under one | a new volume with the sibling id |
//! | any | neither | a new volume with the offered id |
//!
//! The sibling id is made of the offered id and the name ([`sibling`]), so that each push `--as NAME` beside an
//! existing copy finds the volume that the first one made.

use flocker_storage::model::{VolumeId, VolumeName, VolumeRecord};

/// What an offer is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding<'a> {
    /// This volume. [`Answer`](crate::message::Answer): `volume` is it, `lands_in` its id.
    Existing(&'a VolumeRecord),
    /// A volume still to be made with this id. `Answer`: no `volume`, `lands_in` is the id.
    New(VolumeId),
    /// None: the name belongs to this unrelated volume. `Answer`: `volume` is it, `lands_in` the offered id.
    Taken(&'a VolumeRecord, VolumeId),
}

impl<'a> Binding<'a> {
    /// Returns what goes into [`Answer::volume`](crate::message::Answer).
    pub fn volume(&self) -> Option<&'a VolumeRecord> {
        match self {
            Self::Existing(record) | Self::Taken(record, _) => Some(record),
            Self::New(_) => None,
        }
    }
    /// Returns what goes into [`Answer::lands_in`](crate::message::Answer).
    pub fn lands_in(&self) -> VolumeId {
        match self {
            Self::Existing(record) => record.id,
            Self::New(id) | Self::Taken(_, id) => *id,
        }
    }
}

/// Binds an offered volume and the name wanted for it to one of the volumes held here. `arriving` is the name under which the offered id
/// is being received, where no volume has it yet.
pub fn bind<'a>(
    offered: &VolumeRecord,
    name: &VolumeName,
    held: &'a [VolumeRecord],
    arriving: Option<&VolumeName>,
) -> Binding<'a> {
    let by_id = |id: VolumeId| held.iter().find(|record| record.id == id);
    let same = by_id(offered.id);
    if *name == offered.name
        && let Some(record) = same
    {
        return Binding::Existing(record);
    }
    let sibling = sibling(offered.id, name);
    match held.iter().find(|record| record.name == *name) {
        Some(record) if record.id == offered.id || record.id == sibling => Binding::Existing(record),
        Some(record) => Binding::Taken(record, offered.id),
        None => match by_id(sibling) {
            Some(record) => Binding::Existing(record),
            None if same.is_some() => Binding::New(sibling),
            None if *name != offered.name && arriving.is_some_and(|arriving| arriving != name) => Binding::New(sibling),
            None => Binding::New(offered.id),
        },
    }
}

/// Returns the id of the volume `name` that stands beside `volume` on one node: the same wherever it is computed.
pub fn sibling(volume: VolumeId, name: &VolumeName) -> VolumeId {
    let mut hasher = blake3::Hasher::new_derive_key("flocker 2026 sibling volume id");
    hasher.update(volume.0.as_bytes()).update(name.as_str().as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    VolumeId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}
