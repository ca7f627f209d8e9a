//! `snapshot`, `snapshots`, `rollback`, `clone`, `verify`.

use clap::Args;
use flocker_node::api::{
    client::{Finding, SnapshotRef, VolumeName},
    types::{CloneSnapshot, CreateSnapshot, Newer, Rollback},
};
use jiff::Timestamp;

use super::{CompareArgs, MetadataArgs, Session};
use crate::{
    output::{self, human_bytes},
    report::{Exit, Stop},
    values::{self, Object},
};

/// How many findings are told one by one.
const FINDINGS_TOLD: usize = 20;

#[derive(Debug, Args)]
pub(super) struct SnapshotArgs {
    /// The volume, and the new snapshot's name
    #[arg(value_name = "VOLUME@NAME", value_parser = values::new_snapshot)]
    snapshot: SnapshotRef,
    #[command(flatten)]
    metadata: MetadataArgs,
    #[command(flatten)]
    compare: CompareArgs,
}

#[derive(Debug, Args)]
pub(super) struct RollbackArgs {
    /// The snapshot to go back to
    #[arg(value_name = "VOLUME@SNAPSHOT", value_parser = values::existing_snapshot)]
    snapshot: SnapshotRef,
    /// Keep newer snapshots and changes as a new volume of this name
    #[arg(long, value_name = "NAME")]
    fork_newer: Option<VolumeName>,
    /// Destroy newer snapshots and changes
    #[arg(long, conflicts_with = "fork_newer")]
    discard_newer: bool,
}

#[derive(Debug, Args)]
pub(super) struct CloneArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@SNAPSHOT", value_parser = values::existing_snapshot)]
    snapshot: SnapshotRef,
    /// The new volume's name
    volume: VolumeName,
    #[command(flatten)]
    metadata: MetadataArgs,
}

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The snapshot; a volume's newest one when only the volume is named
    #[arg(value_name = "VOLUME[@SNAPSHOT]")]
    object: Object,
    #[command(flatten)]
    compare: CompareArgs,
}

impl Session<'_> {
    pub(super) async fn snapshot(&self, args: SnapshotArgs) -> anyhow::Result<()> {
        let SnapshotRef { volume, snapshot: name } = args.snapshot;
        let metadata = values::metadata(&args.metadata.metadata);
        let request = CreateSnapshot { name, metadata, compare: args.compare.into() };
        let taken = self.client.create_snapshot(&volume, &request).await?;
        self.output.item(&taken, String::new)?;
        let unchanged = if taken.unchanged { ", unchanged since the one before" } else { "" };
        let size = human_bytes(taken.logical_bytes);
        self.output.talk(&format!("took snapshot {volume}@{} ({size}{unchanged})", taken.name));
        self.tell_warnings(&taken.warnings);
        Ok(())
    }

    /// Tells what the user should know of something that was done.
    pub(super) fn tell_warnings(&self, warnings: &[Finding]) {
        for finding in warnings.iter().take(FINDINGS_TOLD) {
            self.output.talk(&format!("warning: {}: {}", finding.path, finding.what));
        }
        if let Some(more) = warnings.len().checked_sub(FINDINGS_TOLD).filter(|more| *more > 0) {
            self.output.talk(&format!("warning: and {more} more; --output json lists them"));
        }
    }

    pub(super) async fn snapshots(&self, volume: &VolumeName) -> anyhow::Result<()> {
        let snapshots = self.client.snapshots(volume).await?;
        self.output.list(&snapshots, |snapshots| output::snapshots(snapshots, Timestamp::now()))
    }

    pub(super) async fn rollback(&self, args: RollbackArgs) -> anyhow::Result<()> {
        let SnapshotRef { volume, snapshot } = args.snapshot.clone();
        let newer = match (args.fork_newer, args.discard_newer) {
            (Some(fork), _) => Some(Newer::Fork(fork)),
            (None, true) => Some(Newer::Discard),
            (None, false) => None,
        };
        let kept = match &newer {
            Some(Newer::Fork(fork)) => format!("; what was newer is volume {fork}"),
            Some(Newer::Discard) => "; what was newer is gone".to_owned(),
            None => String::new(),
        };
        let back = self.client.rollback(&volume, &Rollback { snapshot, newer }).await?;
        self.output.item(&back, String::new)?;
        self.output.talk(&format!("volume {volume} is back at {}{kept}", args.snapshot));
        Ok(())
    }

    pub(super) async fn clone_snapshot(&self, args: CloneArgs) -> anyhow::Result<()> {
        let metadata = values::metadata(&args.metadata.metadata);
        let request = CloneSnapshot { name: args.volume, metadata };
        let made = self.client.clone_snapshot(&args.snapshot, &request).await?;
        self.output.item(&made, String::new)?;
        self.output.talk(&format!("created volume {} as a clone of {}", made.name, args.snapshot));
        Ok(())
    }

    pub(super) async fn verify(&self, args: VerifyArgs) -> anyhow::Result<Exit> {
        let snapshot = match args.object {
            Object::Snapshot(snapshot) => snapshot,
            Object::Volume(volume) => self.newest(volume).await?,
        };
        let verification = self.client.verify(&snapshot, args.compare.into()).await?;
        self.output.item(&verification, || {
            let told = verification.findings.iter().map(|finding| format!("{}: {}\n", finding.path, finding.what));
            told.collect()
        })?;
        let read = if args.compare.checksum { "contents and metadata" } else { "metadata" };
        match verification.findings.len() {
            0 => {
                self.output.talk(&format!("{snapshot} is as it was taken ({read} compared)"));
                Ok(Exit::Done)
            }
            count => {
                let message = format!("{snapshot} is not as it was taken: {count} differences ({read} compared)");
                let hint = "somebody changed the pool behind the node's back; another host's copy can be pulled under another name";
                Err(Stop::new(Exit::Failure, message).hint(hint).into())
            }
        }
    }

    pub(super) async fn newest(&self, volume: VolumeName) -> anyhow::Result<SnapshotRef> {
        match self.client.volume(&volume).await?.tip {
            Some(tip) => Ok(SnapshotRef { volume: tip.volume, snapshot: tip.name }),
            None => {
                let stop = Stop::new(Exit::NotFound, format!("volume {volume} has no snapshot"));
                Err(stop.hint(format!("take one with: flocker snapshot {volume}@NAME")).into())
            }
        }
    }
}
