//! What this node remembers of snapshots that it does not hold any more, and what a head descends from.
//!
//! Owns when that is written down: before a snapshot is destroyed, and before one arrives whose ancestors are not all here, so that
//! a crash leaves too much rather than too little. Too much does no harm: what is held counts before what is remembered.
//! Refuses to know what follows from it ([`flocker_replication::divergence`]).

use std::collections::BTreeSet;

use flocker_replication::ancestry::{Ancestor, Memory};
use flocker_storage::model::{HeldSnapshot, Lineage, Role, SnapshotId, VolumeId};

use crate::{
    catalog::Volume,
    daemon::Node,
    problem::Result,
    state::{HeadParent, Word},
};

impl Node {
    /// Remembers what snapshots of a volume followed that are about to be destroyed, the newest first.
    pub(crate) async fn remember(&self, volume: VolumeId, destroyed: &[HeldSnapshot]) -> Result<()> {
        let ancestors = destroyed.iter().map(|held| {
            let snapshot = &held.snapshot;
            Ancestor { id: snapshot.id, parents: snapshot.parents.clone() }
        });
        Ok(self.state.remember(volume, ancestors.collect(), Word::Own).await?)
    }

    /// Notes what has to be known of a snapshot that is about to be destroyed: what it followed, and, where it is the newest, that
    /// the head descends from it. A replica's head follows its newest snapshot instead.
    pub(crate) async fn remember_one(&self, volume: &Volume, held: &HeldSnapshot) -> Result<()> {
        self.remember(volume.record.id, std::slice::from_ref(held)).await?;
        let Some((newest, rest)) = volume.snapshots.split_last() else { return Ok(()) };
        if newest.snapshot.id != held.snapshot.id {
            return Ok(());
        }
        let left = rest.last().map(|held| held.snapshot.id).or(volume.record.origin.map(|origin| origin.snapshot));
        let parent = match volume.record.role {
            Role::Replica => None,
            Role::Primary => self.head_parent(volume).await?.map(|parent| HeadParent { parent, tip: left }),
        };
        Ok(self.state.put_head_parent(volume.record.id, parent).await?)
    }

    /// Returns what a head descends from: its volume's newest snapshot, or one that was destroyed since it was.
    pub(crate) async fn head_parent(&self, volume: &Volume) -> Result<Option<SnapshotId>> {
        let tip = volume.snapshots.last().map(|held| held.snapshot.id);
        let tip = tip.or(volume.record.origin.map(|origin| origin.snapshot));
        let noted = self.state.head_parent(volume.record.id).await?.filter(|noted| noted.tip == tip);
        Ok(noted.map(|noted| noted.parent).or(tip))
    }

    /// Returns what is remembered of a volume and of those that its lineage goes through.
    pub(crate) async fn memory_of(&self, volume: VolumeId, lineage: &Lineage) -> Result<Memory> {
        let mut volumes: BTreeSet<VolumeId> = lineage.snapshots.iter().map(|held| held.volume).collect();
        volumes.insert(volume);
        Ok(self.state.memory(volumes).await?)
    }

    /// Lets go of what is remembered of volumes that are no more; called once, before anything else may touch the pool.
    pub(crate) async fn tidy_memory(&self) -> Result<()> {
        for volume in self.state.remembered_volumes().await? {
            if self.catalog.get(volume).is_none() {
                self.state.forget_volume(volume).await?;
            }
        }
        Ok(())
    }
}
