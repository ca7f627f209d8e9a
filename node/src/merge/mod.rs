//! `flocker merge db FORK`: one new snapshot with two parents, and the head as it.
//!
//! Owns the order of things. Refuses to know what is in conflict ([`flocker_replication::merge`]), how three trees become
//! rows ([`weaving`]) and how a delta becomes a snapshot: the result is written as a delta on ours and taken in by the
//! driver like one from a peer, so nothing of it is visible before its commit, on every driver.
//!
//! | step | a crash before it | a crash after it |
//! |---|---|---|
//! | the intent is written | nothing has happened | the same, the intent is forgotten at the next start |
//! | the driver commits the snapshot | ″ | the next start puts the head to it |
//! | the head is put to it | ″ | the merge is done |
//! | the intent is forgotten | the merge is done | the merge is done |

mod weaving;

use std::{collections::BTreeSet, sync::Arc};

use flocker_replication::{
    merge::{Conflict, Label, Labels, Plan, Resolve, common_ancestor, with_merged},
    plan::Point,
};
use flocker_storage::{
    clock,
    delta::{DeltaFormat, ReceiveRequest, Receiving},
    driver::Target,
    error::{ErrorKind, Result as StorageResult},
    fault,
    model::{HeadState, HeldSnapshot, Lineage, Role, Snapshot, SnapshotId, SnapshotKey, VolumeId, VolumeName},
    tree::write::DeltaWriter,
};
use tokio_util::sync::CancellationToken;

use self::weaving::Trees;
use crate::{
    api::merge::{ConflictResource, MergeReport, MergeState, MergeVolume},
    catalog::Volume,
    daemon::Node,
    mounts::read_only_replica,
    problem::{self, Result, problem},
    state::Operation,
    volumes::snapshot_resource,
};

/// The three snapshots of a merge.
struct Three {
    base: HeldSnapshot,
    ours: HeldSnapshot,
    theirs: HeldSnapshot,
    /// Common ancestors as new as the base.
    further: usize,
}

impl Three {
    fn labels(&self) -> Labels {
        let label = |held: &HeldSnapshot| Label { host: held.snapshot.host.name.clone(), tip: held.snapshot.id };
        Labels { ours: label(&self.ours), theirs: label(&self.theirs) }
    }
}

impl Node {
    /// Merges another volume's history into a volume.
    pub(crate) async fn merge(self: &Arc<Self>, name: &VolumeName, request: MergeVolume) -> Result<MergeReport> {
        if request.from == *name {
            return Err(problem(400, "bad_request", format!("{name} cannot be merged with itself")));
        }
        let mut kept = Vec::new();
        let mut unsaved = Vec::new();
        let theirs = self.tip_to_merge(&request, &mut kept, &mut unsaved).await?;
        let _pinned_theirs = self.pins.pin(theirs.snapshots.iter().map(HeldSnapshot::key));

        let (mut volume, _guard) = self.catalog.claim(name).await?;
        self.check_mergeable(&volume)?;
        if self.driver.head_state(volume.record.id).await? == HeadState::Dirty {
            if request.dry_run {
                unsaved.push(name.clone());
            } else {
                let held = self.keep_head(&mut volume, "before").await?;
                kept.push(format!("{name}@{}", held.snapshot.name));
            }
        }
        let ours = self.driver.lineage(volume.record.id).await?;
        let _pinned_ours = self.pins.pin(ours.snapshots.iter().map(HeldSnapshot::key));
        let three = self.three(name, &ours, &request.from, &theirs)?;
        let mut report = self.report(name, &request, &three, kept, unsaved);
        if three.base.snapshot.id == three.theirs.snapshot.id {
            report.state = MergeState::UpToDate;
            return Ok(report);
        }
        let plan = self.survey(&three, request.conflicts).await?;
        report.counts = plan.counts();
        report.conflicts = plan.conflicts().iter().map(resource).collect();
        if request.conflicts == Resolve::Stop && !report.conflicts.is_empty() {
            report.state = MergeState::Conflicts;
        } else if !request.dry_run {
            let held = self.carry_out_merge(&volume, &request, &three, &only_theirs(&ours, &theirs), plan).await?;
            report.state = MergeState::Merged;
            report.snapshot = Some(snapshot_resource(name, &held));
        }
        Ok(report)
    }

    /// Returns the history to merge in; what its head has besides goes into a snapshot first.
    async fn tip_to_merge(
        &self,
        request: &MergeVolume,
        kept: &mut Vec<String>,
        unsaved: &mut Vec<VolumeName>,
    ) -> Result<Lineage> {
        let name = &request.from;
        // Never held together with the other volume's: two merges the other way round must not wait for each other.
        let (mut volume, _guard) = self.catalog.claim(name).await?;
        let id = volume.record.id;
        if volume.record.role == Role::Primary && self.driver.head_state(id).await? == HeadState::Dirty {
            if request.dry_run {
                unsaved.push(name.clone());
            } else {
                let held = self.keep_head(&mut volume, "before").await?;
                kept.push(format!("{name}@{}", held.snapshot.name));
            }
        }
        Ok(self.driver.lineage(id).await?)
    }

    fn check_mergeable(&self, volume: &Volume) -> Result<()> {
        const WHAT: &str = "merge into";
        if volume.record.role == Role::Replica {
            return Err(read_only_replica(volume, WHAT));
        }
        self.check_unmounted(volume, WHAT)?;
        self.inbox.check_quiet(volume, WHAT)?;
        if self.inbox.is_parked(volume.record.id) {
            let detail = format!("cannot {WHAT} {}: a snapshot of it is arriving, its line is cut", volume.record.name);
            return Err(problem(409, "busy", detail).hint("wait until it is there, or some minutes"));
        }
        Ok(())
    }

    fn three(&self, name: &VolumeName, ours: &Lineage, from: &VolumeName, theirs: &Lineage) -> Result<Three> {
        let tip = |name: &VolumeName, lineage: &Lineage| {
            let none = || problem(409, "no_snapshot", format!("cannot merge: {name} has no snapshot"));
            lineage.tip().cloned().ok_or_else(|| none().hint(format!("take one: flocker snapshot {name}@NAME")))
        };
        let (our_tip, their_tip) = (tip(name, ours)?, tip(from, theirs)?);
        let with_merged = |lineage: &Lineage| with_merged(lineage.clone(), || self.held_snapshots());
        let found = common_ancestor(&with_merged(ours), &with_merged(theirs));
        let Some(found) = found else {
            let detail = format!("cannot merge {from} into {name}: no snapshot is an ancestor of both");
            return Err(problem(409, "unrelated", detail)
                .hint(format!("`flocker diff {name} {from}` shows what differs"))
                .with("ours", Point::from(&our_tip))
                .with("theirs", Point::from(&their_tip)));
        };
        Ok(Three { base: found.snapshot, ours: our_tip, theirs: their_tip, further: found.further.len() })
    }

    /// Lists what all volumes hold.
    pub(crate) fn held_snapshots(&self) -> Vec<HeldSnapshot> {
        self.catalog.volumes().into_iter().flat_map(|volume| volume.snapshots).map(Arc::unwrap_or_clone).collect()
    }

    fn report(
        &self,
        name: &VolumeName,
        request: &MergeVolume,
        three: &Three,
        kept: Vec<String>,
        unsaved: Vec<VolumeName>,
    ) -> MergeReport {
        MergeReport {
            volume: name.clone(),
            from: request.from.clone(),
            state: MergeState::DryRun,
            base: Point::from(&three.base),
            ours: Point::from(&three.ours),
            theirs: Point::from(&three.theirs),
            resolve: request.conflicts,
            counts: Default::default(),
            conflicts: Vec::new(),
            snapshot: None,
            kept,
            unsaved,
            further_ancestors: three.further as u64,
        }
    }

    async fn trees(&self, three: &Three) -> Result<Trees> {
        let view = async |held: &HeldSnapshot| self.driver.view(Target::Snapshot(held.volume, held.snapshot.id)).await;
        Ok(Trees { base: view(&three.base).await?, ours: view(&three.ours).await?, theirs: view(&three.theirs).await? })
    }

    async fn survey(&self, three: &Three, resolve: Resolve) -> Result<Arc<Plan>> {
        let (trees, labels) = (self.trees(three).await?, three.labels());
        Ok(Arc::new(blocking(move || weaving::survey(trees, resolve, &labels)).await?))
    }

    /// Makes the snapshot and puts the head to it.
    async fn carry_out_merge(
        &self,
        volume: &Volume,
        request: &MergeVolume,
        three: &Three,
        merged_in: &[HeldSnapshot],
        plan: Arc<Plan>,
    ) -> Result<HeldSnapshot> {
        let name = match &request.snapshot {
            Some(name) => name.clone(),
            None => format!("merge-{}", three.theirs.snapshot.id.short()).parse()?,
        };
        if volume.snapshots.iter().any(|held| held.snapshot.name == name) {
            let detail = format!("volume {} has a snapshot {name} already", volume.record.name);
            return Err(problem(409, "snapshot_exists", detail).hint("choose another name with --snapshot NAME"));
        }
        let snapshot = Snapshot {
            id: SnapshotId::mint(),
            name,
            parents: vec![three.ours.snapshot.id, three.theirs.snapshot.id],
            host: self.host(),
            created: clock::now(),
            metadata: Default::default(),
        };
        let key = SnapshotKey { volume: volume.record.id, snapshot: snapshot.id };
        // What is merged in may be destroyed later, with the volume that holds it.
        self.remember(key.volume, merged_in).await?;
        for from in merged_in.iter().map(|held| held.volume).filter(|from| *from != key.volume).collect::<BTreeSet<_>>()
        {
            self.state.inherit(from, key.volume).await?;
        }
        let operation = format!("merge-{}", snapshot.id);
        let intent = Operation::Merge { volume: key.volume, snapshot: key.snapshot };
        self.state.begin(operation.clone(), &intent).await?;
        fault::point("node.merge.journalled");
        let held = match self.take_in(volume, snapshot, three, plan).await {
            Ok(held) => held,
            Err(error) => {
                self.state.end(operation).await?;
                return Err(error);
            }
        };
        self.catalog.add_snapshot(held.clone());
        fault::point("node.merge.committed");
        let rewound = self.driver.rewind(key).await;
        fault::point("node.merge.head-put");
        // Whatever came of it: from here on the head may be written to, and a later start must not touch it.
        self.state.end(operation).await?;
        if let Err(error) = rewound {
            let shown = format!("{}@{}", volume.record.name, held.snapshot.name);
            let detail = format!("{shown} is made, but the head could not be put to it: {}", problem::chain(&error));
            return Err(problem(500, "internal", detail).hint(format!("flocker rollback {shown} --discard-newer")));
        }
        Ok(held)
    }

    /// Writes the result as a delta on ours, and has the driver take it in.
    async fn take_in(
        &self,
        volume: &Volume,
        snapshot: Snapshot,
        three: &Three,
        plan: Arc<Plan>,
    ) -> Result<HeldSnapshot> {
        let ours_again = self.driver.view(Target::Snapshot(three.ours.volume, three.ours.snapshot.id)).await?;
        let trees = self.trees(three).await?;
        let writer = blocking(move || weaving::write(trees, ours_again, plan)).await?;
        let request = ReceiveRequest {
            volume: volume.record.clone(),
            snapshot,
            base: Some(three.ours.key()),
            format: DeltaFormat::tree(),
            resume: None,
        };
        let mut receiving = self.driver.receive(request).await?;
        feed(writer, &mut *receiving, &CancellationToken::new()).await?;
        fault::point("node.merge.before-commit");
        Ok(receiving.commit().await?)
    }

    /// Ends a merge that a crash interrupted: where its snapshot is there, the head is put to it.
    pub(crate) async fn finish_merge(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<()> {
        let lineage = match self.driver.lineage(volume).await {
            Err(error) if matches!(error.kind, ErrorKind::NotFound) => return Ok(()),
            lineage => lineage?,
        };
        if lineage.tip().is_some_and(|tip| tip.snapshot.id == snapshot && tip.volume == volume) {
            // Not tried again at a later start: by then the head may have been written to.
            if let Err(error) = self.driver.rewind(SnapshotKey { volume, snapshot }).await {
                tracing::error!(%volume, %snapshot, "a merge is made, but the head could not be put to it; roll back to \
                    the snapshot with --discard-newer: {}", problem::chain(&error));
            }
        }
        Ok(())
    }
}

/// What a merge brings into a history, newest first.
fn only_theirs(ours: &Lineage, theirs: &Lineage) -> Vec<HeldSnapshot> {
    let own: BTreeSet<SnapshotId> = ours.snapshots.iter().map(|held| held.snapshot.id).collect();
    theirs.snapshots.iter().rev().filter(|held| !own.contains(&held.snapshot.id)).cloned().collect()
}

fn resource(conflict: &Conflict) -> ConflictResource {
    ConflictResource::from(conflict)
}

/// Has a driver take in what a delta is written as; tells whether that came to its end before `stop`. In any case the trees that
/// it is written from are closed then: a commit may have to rearrange them.
pub(crate) async fn feed(writer: DeltaWriter, receiving: &mut dyn Receiving, stop: &CancellationToken) -> Result<bool> {
    let fed = hand_over(writer, receiving, stop).await;
    // In any case: where it is let go of, its place is free then.
    let settled = receiving.settle().await;
    let fed = fed?;
    settled?;
    Ok(fed)
}

async fn hand_over(mut writer: DeltaWriter, receiving: &mut dyn Receiving, stop: &CancellationToken) -> Result<bool> {
    loop {
        let stopped = stop.is_cancelled();
        let next = blocking(move || {
            if stopped {
                return Ok(None);
            }
            Ok(writer.next_chunk()?.map(|chunk| (writer, chunk)))
        });
        let Some((back, chunk)) = next.await? else { return Ok(!stopped) };
        writer = back;
        receiving.write(chunk).await?;
    }
}

/// Does work that blocks on a thread for it.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> StorageResult<T> + Send + 'static) -> Result<T> {
    #[cfg(feature = "simulation")]
    if flocker_storage::simulation::is_running() {
        return Ok(work()?);
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(error) => Err(problem::internal(error)),
    }
}
