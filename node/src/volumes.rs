//! The verbs of the minimal API on this node's pool: list, create, destroy, set, rollback; snapshots; clones.
//!
//! Owns what must hold before a driver is called (names free, nothing mounted, nobody sending) and the catalogue's
//! refresh after. Refuses to know peers. Neighbours: [`crate::mounts`], [`crate::catalog`], and
//! [`crate::ownership`] for who may write.

use std::sync::Arc;

use flocker_storage::{
    clock,
    delta::Compare,
    driver::{Driver, SnapshotReport, SnapshotRequest},
    error::{Blockers, Error as StorageError, ErrorKind},
    fault,
    model::{
        HeadState, HeldSnapshot, Host, Metadata, Role, Snapshot, SnapshotId, SnapshotKey, SnapshotName, SnapshotRef,
        VolumeId, VolumeName, VolumeRecord, check_metadata,
    },
};

use crate::{
    api::types::{
        ApiProblem, CloneSnapshot, CreateSnapshot, CreateVolume, Newer, OriginResource, PatchVolume, Rollback,
        SnapshotResource, Verification, VolumeResource,
    },
    catalog::Volume,
    daemon::Node,
    mounts::{self, read_only_replica},
    problem::{Result, internal, problem},
    state::Operation,
};

impl Node {
    /// Shows a volume as the API does, without looking at its head.
    pub(crate) fn volume_resource(&self, volume: &Volume) -> VolumeResource {
        let record = volume.record.clone();
        let origin = record.origin.map(|key| OriginResource {
            volume_id: key.volume,
            snapshot_id: key.snapshot,
            name: self.catalog.display(key),
        });
        let tip = volume.snapshots.last().map(|held| snapshot_resource(&record.name, held));
        let tip = tip.or_else(|| self.origin_of(volume).map(|(name, held)| snapshot_resource(&name, &held)));
        VolumeResource {
            id: record.id,
            mount: self.mounts.of(record.id).map(|row| mounts::resource(&record.name, &row)),
            name: record.name,
            metadata: record.metadata,
            created: record.created,
            origin,
            role: record.role,
            epoch: record.epoch,
            primary: record.primary.map(|host| host.name),
            handing_over_to: self.handoffs.peer_of(record.id),
            quota_bytes: record.quota_bytes,
            snapshots: volume.snapshots.len() as u64,
            tip,
            head: None,
            peers: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn origin_of(&self, volume: &Volume) -> Option<(VolumeName, HeldSnapshot)> {
        let key = volume.record.origin?;
        let origin = self.catalog.get(key.volume)?;
        let held = origin.snapshots.into_iter().find(|held| held.snapshot.id == key.snapshot)?;
        Some((origin.record.name, Arc::unwrap_or_clone(held)))
    }

    /// Shows a volume with the state of its head.
    pub(crate) async fn inspect(&self, name: &VolumeName) -> Result<VolumeResource> {
        let volume = self.catalog.find(name)?;
        let head = self.look_at_head(volume.record.id).await?;
        let peers = self.known_positions(&volume).await?;
        let warnings = self.superseded.warning(volume.record.id).into_iter().collect();
        Ok(VolumeResource { head: Some(head), peers, warnings, ..self.volume_resource(&volume) })
    }

    /// Tells whether a head has changes, without waiting for who works on the volume; only where that is in the way, it waits.
    pub(crate) async fn look_at_head(&self, id: VolumeId) -> Result<HeadState> {
        if let Ok(state) = self.driver.head_state(id).await {
            return Ok(state);
        }
        let _guard = self.catalog.work_on(id).await;
        Ok(self.driver.head_state(id).await?)
    }

    /// Creates an empty volume.
    pub(crate) async fn create_volume(&self, request: CreateVolume) -> Result<VolumeResource> {
        check_metadata(&request.metadata)?;
        let _reserved = self.catalog.reserve(&request.name)?;
        let record = VolumeRecord {
            id: VolumeId::mint(),
            name: request.name.clone(),
            metadata: request.metadata,
            created: clock::now(),
            origin: None,
            role: Role::Primary,
            epoch: 0,
            primary: Some(self.host()),
            quota_bytes: request.quota_bytes,
        };
        self.driver.create(&record).await?;
        let volume = Volume::new(record, Vec::new());
        self.catalog.put(volume.clone());
        Ok(self.volume_resource(&volume))
    }

    /// Changes a volume's metadata.
    pub(crate) async fn patch_volume(&self, name: &VolumeName, request: PatchVolume) -> Result<VolumeResource> {
        let (mut volume, _guard) = self.catalog.claim(name).await?;
        for (key, value) in request.metadata {
            match value {
                Some(value) => volume.record.metadata.insert(key, value),
                None => volume.record.metadata.remove(&key),
            };
        }
        check_metadata(&volume.record.metadata)?;
        self.set_record(volume).await
    }

    /// Writes a volume's record.
    pub(crate) async fn set_record(&self, volume: Volume) -> Result<VolumeResource> {
        self.driver.set_record(&volume.record).await?;
        self.catalog.put(volume.clone());
        Ok(self.volume_resource(&volume))
    }

    /// Destroys a volume with its snapshots.
    pub(crate) async fn destroy_volume(&self, name: &VolumeName) -> Result<()> {
        let (volume, _guard) = self.catalog.claim(name).await?;
        self.handoffs.check_settled(&volume)?;
        self.check_unmounted(&volume, "destroy")?;
        self.check_unpinned(&volume, "destroy")?;
        self.inbox.check_quiet(&volume, "destroy")?;
        let id = volume.record.id;
        // The driver refuses it, too; but what is arriving is to be left alone then.
        let clones: Vec<VolumeId> = self.catalog.clones_of(id);
        if !clones.is_empty() {
            let blockers = Blockers { clones, ..Blockers::default() };
            let error = StorageError::new("destroy volume", name, ErrorKind::Blocked(blockers));
            return Err(self.blocked(error, &format!("destroy {name}")));
        }
        self.inbox.suspend_one(id).await;
        self.driver.destroy(id).await.map_err(|error| self.blocked(error, &format!("destroy {name}")))?;
        self.driver.discard_partial(id).await?;
        self.catalog.remove(id);
        Ok(self.state.forget_volume(id).await?)
    }

    /// Takes a snapshot.
    pub(crate) async fn create_snapshot(&self, name: &VolumeName, request: CreateSnapshot) -> Result<SnapshotResource> {
        check_metadata(&request.metadata)?;
        let (volume, _guard) = self.catalog.claim(name).await?;
        if volume.record.role == Role::Replica {
            return Err(read_only_replica(&volume, "take a snapshot of"));
        }
        if volume.snapshots.iter().any(|held| held.snapshot.name == request.name) {
            let detail = format!("volume {name} has a snapshot {} already", request.name);
            return Err(problem(409, "snapshot_exists", detail).hint("choose another name"));
        }
        let report = self.take(&volume, SnapshotId::mint(), request.name, request.metadata, request.compare).await?;
        Ok(SnapshotResource { warnings: report.warnings, ..snapshot_resource(name, &report.held) })
    }

    /// Takes a snapshot of a head whose changes no snapshot holds, before something else takes its place. Its name
    /// begins with `before`.
    pub(crate) async fn keep_head(&self, known: &mut Volume, before: &str) -> Result<HeldSnapshot> {
        let id = SnapshotId::mint();
        let name = format!("{before}-{}", id.short()).parse()?;
        let report = self.take(known, id, name, Metadata::default(), Compare::Metadata).await?;
        known.snapshots.push(Arc::new(report.held.clone()));
        fault::point("node.head-kept");
        Ok(report.held)
    }

    /// Takes a snapshot whose parent is what the head descends from: the newest one, also where that was destroyed since.
    async fn take(
        &self,
        volume: &Volume,
        id: SnapshotId,
        name: SnapshotName,
        metadata: Metadata,
        compare: Compare,
    ) -> Result<SnapshotReport> {
        let parent = self.head_parent(volume).await?;
        let snapshot = Snapshot {
            id,
            name,
            parents: parent.into_iter().collect(),
            host: self.host(),
            created: clock::now(),
            metadata,
        };
        let request = SnapshotRequest { volume: volume.record.id, snapshot, compare };
        let Some(report) = self.driver.snapshot(&[request]).await?.pop() else {
            return Err(internal("the driver took no snapshot and gave no reason"));
        };
        self.catalog.add_snapshot(report.held.clone());
        Ok(report)
    }

    /// Destroys a snapshot.
    pub(crate) async fn destroy_snapshot(&self, wanted: &SnapshotRef) -> Result<()> {
        let (volume, _guard) = self.catalog.claim(&wanted.volume).await?;
        let held = volume.snapshot(&wanted.snapshot)?;
        let key = held.key();
        self.check_unpinned(&volume, "destroy a snapshot of")?;
        self.inbox.check_quiet(&volume, "destroy a snapshot of")?;
        // What a replica's mount shows is one of its snapshots.
        if volume.record.role == Role::Replica {
            self.check_unmounted(&volume, "destroy a snapshot of")?;
        }
        self.remember_one(&volume, held).await?;
        fault::point("node.snapshot.remembered");
        self.driver.forget(key).await.map_err(|error| self.blocked(error, &format!("destroy {wanted}")))?;
        self.catalog.remove_snapshot(key);
        Ok(())
    }

    /// Clones a snapshot into a new volume.
    pub(crate) async fn clone_snapshot(&self, from: &SnapshotRef, request: CloneSnapshot) -> Result<VolumeResource> {
        check_metadata(&request.metadata)?;
        let _reserved = self.catalog.reserve(&request.name)?;
        let (volume, _guard) = self.catalog.claim(&from.volume).await?;
        let record = VolumeRecord {
            id: VolumeId::mint(),
            name: request.name.clone(),
            metadata: request.metadata,
            created: clock::now(),
            origin: Some(volume.snapshot(&from.snapshot)?.key()),
            role: Role::Primary,
            epoch: 0,
            primary: Some(self.host()),
            quota_bytes: None,
        };
        Driver::clone_from(&*self.driver, &record).await?;
        let clone = Volume::new(record, Vec::new());
        self.catalog.put(clone.clone());
        Ok(self.volume_resource(&clone))
    }

    /// Compares a snapshot with its inventory.
    pub(crate) async fn verify(
        &self,
        wanted: &SnapshotRef,
        compare: flocker_storage::delta::Compare,
    ) -> Result<Verification> {
        let key = self.catalog.find(&wanted.volume)?.snapshot(&wanted.snapshot)?.key();
        let findings = self.driver.verify(key, compare).await?;
        Ok(Verification { snapshot: wanted.to_string(), compare, findings })
    }

    /// Puts a volume back to one of its own snapshots. Newer snapshots, and changes in the head that no snapshot holds,
    /// are only touched when the request says how.
    pub(crate) async fn rollback(&self, name: &VolumeName, request: Rollback) -> Result<VolumeResource> {
        let fork_name = match &request.newer {
            Some(Newer::Fork(fork)) => Some(self.catalog.reserve(fork)?),
            _ => None,
        };
        let (volume, _guard) = self.catalog.claim(name).await?;
        if volume.record.role == Role::Replica {
            return Err(read_only_replica(&volume, "roll back"));
        }
        let keep = volume.snapshot(&request.snapshot)?.key();
        self.check_unmounted(&volume, "roll back")?;
        self.check_unpinned(&volume, "roll back")?;
        self.inbox.check_quiet(&volume, "roll back")?;
        let newer = volume.snapshots.iter().rev().take_while(|held| held.key() != keep);
        let newer: Vec<HeldSnapshot> = newer.map(|held| HeldSnapshot::clone(held)).collect();
        match request.newer {
            Some(Newer::Fork(fork)) => self.split(&volume, keep, fork).await?,
            Some(Newer::Discard) if !newer.is_empty() => self.discard_newer(&volume, keep, &newer).await?,
            None if !newer.is_empty() => return Err(newer_exist(name, &request.snapshot, &newer)),
            None if !fault::is_put_back("a-rollback-drops-a-dirty-head")
                && self.driver.head_state(volume.record.id).await? == HeadState::Dirty =>
            {
                return Err(head_is_dirty(name, &request.snapshot));
            }
            _ => {
                // The head descends from the snapshot it goes back to.
                self.state.put_head_parent(volume.record.id, None).await?;
                self.driver.rewind(keep).await.map_err(|error| self.blocked(error, &format!("roll back {name}")))?;
            }
        }
        drop(fork_name);
        Ok(self.volume_resource(&self.catalog.find(name)?))
    }

    async fn split(&self, volume: &Volume, keep: SnapshotKey, name: VolumeName) -> Result<()> {
        let fork = VolumeRecord {
            id: VolumeId::mint(),
            name,
            metadata: volume.record.metadata.clone(),
            created: clock::now(),
            origin: Some(keep),
            role: Role::Primary,
            epoch: 0,
            primary: Some(self.host()),
            quota_bytes: volume.record.quota_bytes,
        };
        self.state.move_head_parent(volume.record.id, fork.id).await?;
        self.driver.split(keep, &fork).await?;
        self.catalog.split(keep, Some(fork));
        Ok(())
    }

    /// Destroys newer snapshots and goes back, as one step in the eyes of a crash: they are split off into a volume of
    /// their own by the driver's atomic verb, and that volume is destroyed now or at the next start.
    async fn discard_newer(&self, volume: &Volume, keep: SnapshotKey, newer: &[HeldSnapshot]) -> Result<()> {
        let clones: Vec<String> = self.clones_of(newer);
        if !clones.is_empty() {
            let detail =
                format!("cannot discard newer snapshots of {}: volumes were cloned from them", volume.record.name);
            let hint = format!("destroy {} first, or keep the snapshots with --fork-newer NAME", clones.join(", "));
            return Err(problem(409, "blocked", detail).hint(hint).with("clones", clones));
        }
        let fork = VolumeRecord {
            id: VolumeId::mint(),
            name: format!("discarded.{}", keep.snapshot.short()).parse()?,
            metadata: Default::default(),
            created: clock::now(),
            origin: Some(keep),
            role: Role::Primary,
            epoch: 0,
            primary: Some(self.host()),
            quota_bytes: None,
        };
        let operation = fork.id.to_string();
        self.remember(volume.record.id, newer).await?;
        self.state.put_head_parent(volume.record.id, None).await?;
        self.state.begin(operation.clone(), &Operation::DiscardFork { fork: fork.id }).await?;
        fault::point("node.rollback.before-split");
        if let Err(error) = self.driver.split(keep, &fork).await {
            self.state.end(operation).await?;
            return Err(error.into());
        }
        self.catalog.split(keep, None);
        fault::point("node.rollback.before-destroy");
        self.driver.destroy(fork.id).await?;
        fault::point("node.rollback.before-end");
        Ok(self.state.end(operation).await?)
    }

    /// Ends what a crash interrupted; called once, before anything else may touch the pool.
    pub(crate) async fn finish_operations(&self) -> Result<()> {
        for (id, operation) in self.state.operations().await? {
            let done = match &operation {
                Operation::DiscardFork { fork } => match self.driver.destroy(*fork).await {
                    Err(error) if !matches!(error.kind, ErrorKind::NotFound) => return Err(error.into()),
                    _ => Ok(()),
                },
                Operation::Import { staging, into } => self.clear_import(*staging, *into).await,
                Operation::Adopt(adoption) => self.carry_out(adoption).await,
                Operation::Rename(renaming) => self.carry_out_renaming(renaming).await,
                Operation::Merge { volume, snapshot } => self.finish_merge(*volume, *snapshot).await,
                Operation::HandOff(handoff) => match self.recover_hand_off(handoff).await {
                    // What was asked of a peer is settled with it, once the node serves.
                    Ok(true) => continue,
                    Ok(false) => Ok(()),
                    Err(error) => Err(error),
                },
            };
            match done {
                Ok(()) => self.state.end(id).await?,
                // Both histories are there, in two volumes: no reason to keep the node from starting.
                Err(error) => tracing::error!(
                    operation = id,
                    "cannot end what a crash interrupted, the next start tries again: {error}"
                ),
            }
        }
        Ok(())
    }

    pub(crate) fn check_unpinned(&self, volume: &Volume, what: &str) -> Result<()> {
        if !self.pins.holds(volume.record.id) {
            return Ok(());
        }
        let detail = format!("cannot {what} {}: a transfer is using it", volume.record.name);
        Err(problem(409, "busy", detail).hint("`flocker transfers` shows it; wait for it, or cancel it"))
    }

    fn clones_of(&self, snapshots: &[HeldSnapshot]) -> Vec<String> {
        let is_origin = |key: SnapshotKey| snapshots.iter().any(|held| held.key() == key);
        let volumes = self.catalog.volumes().into_iter();
        volumes.filter(|v| v.record.origin.is_some_and(is_origin)).map(|v| v.record.name.to_string()).collect()
    }

    /// Names what blocks a verb instead of numbering it.
    fn blocked(&self, error: StorageError, what: &str) -> ApiProblem {
        let ErrorKind::Blocked(blockers) = &error.kind else { return error.into() };
        let name_of = |id: &VolumeId| self.catalog.get(*id).map_or(id.to_string(), |v| v.record.name.to_string());
        let clones: Vec<String> = blockers.clones.iter().map(name_of).collect();
        let hint = if clones.is_empty() {
            "see the evidence for what stands in the way".to_owned()
        } else {
            format!("cloned from it: {}; destroy them first", clones.join(", "))
        };
        problem(409, "blocked", format!("cannot {what}: {blockers}"))
            .hint(hint)
            .with("clones", clones)
            .with("newer", &blockers.newer)
    }

    /// This node as the host of a snapshot.
    pub(crate) fn host(&self) -> Host {
        Host { id: self.host_id(), name: self.name.clone() }
    }
}

fn head_is_dirty(volume: &VolumeName, snapshot: &SnapshotName) -> ApiProblem {
    let detail = format!("cannot roll back {volume} to {snapshot}: its head has changes that no snapshot holds");
    problem(409, "dirty", detail).hint("--fork-newer NAME keeps them as a volume, --discard-newer throws them away")
}

fn newer_exist(volume: &VolumeName, snapshot: &SnapshotName, newer: &[HeldSnapshot]) -> ApiProblem {
    let names: Vec<String> = newer.iter().rev().map(|held| format!("{volume}@{}", held.snapshot.name)).collect();
    let detail = format!("cannot roll back {volume} to {snapshot}: newer snapshots exist: {}", names.join(", "));
    problem(409, "blocked", detail)
        .hint("--fork-newer NAME keeps them (and the head) as a volume, --discard-newer destroys them")
        .with("newer", names)
}

/// Shows a snapshot as the API does.
pub(crate) fn snapshot_resource(volume: &VolumeName, held: &HeldSnapshot) -> SnapshotResource {
    let snapshot = held.snapshot.clone();
    SnapshotResource {
        id: snapshot.id,
        volume: volume.clone(),
        name: snapshot.name,
        parents: snapshot.parents,
        host: snapshot.host,
        created: snapshot.created,
        metadata: snapshot.metadata,
        logical_bytes: held.logical_bytes,
        unchanged: held.unchanged,
        warnings: Vec::new(),
    }
}
