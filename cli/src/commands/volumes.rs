//! `create`, `list`, `inspect`, `destroy`, `set`, `mount`, `unmount`, `promote`, `handoff`.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Context as _;
use clap::Args;
use flocker_node::api::{
    client::{Access, NodeName, VolumeName},
    ownership::{HandOffVolume, PromoteVolume},
    types::{CreateVolume, MountKind, MountVolume, PatchVolume},
};
use jiff::Timestamp;

use super::{MetadataArgs, Session, Size};
use crate::{
    output,
    report::{Exit, Stop},
    values::{self, Object},
};

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// The volume's name
    // Without this a name like "-x" would be taken for an unknown option, and the rule for names not be told.
    #[arg(allow_hyphen_values = true)]
    volume: VolumeName,
    #[command(flatten)]
    pub(super) metadata: MetadataArgs,
    /// The most it may hold: 10G, 512MiB
    #[arg(long, value_name = "SIZE")]
    pub(super) quota: Option<Size>,
}

#[derive(Debug, Args)]
pub(super) struct SetArgs {
    /// The volume
    volume: VolumeName,
    /// KEY=VALUE sets a key, KEY- removes it
    #[arg(value_name = "KEY=VALUE|KEY-", value_parser = values::metadata_change, required_unless_present = "unset")]
    pub(super) changes: Vec<(String, Option<String>)>,
    /// Remove a key; may be given several times
    #[arg(long, value_name = "KEY")]
    pub(super) unset: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// The volume
    volume: VolumeName,
    /// Where: a path that does not exist, or an empty directory; a stable place in the state folder when left out
    path: Option<PathBuf>,
    /// Only for reading (a replica always is)
    #[arg(long)]
    read_only: bool,
}

#[derive(Debug, Args)]
pub(super) struct HandOffArgs {
    /// The volume
    volume: VolumeName,
    /// The node that becomes its primary
    #[arg(value_name = "HOST")]
    peer: NodeName,
    /// How long to wait until nobody uses the mount any more: 30s, 5m
    #[arg(long, value_parser = values::duration, value_name = "TIME")]
    wait: Option<std::time::Duration>,
}

impl Session<'_> {
    pub(super) async fn create(&self, args: CreateArgs) -> anyhow::Result<()> {
        let metadata = values::metadata(&args.metadata.metadata);
        let quota_bytes = args.quota.map(|Size(bytes)| bytes);
        let made = self.client.create_volume(&CreateVolume { name: args.volume, metadata, quota_bytes }).await?;
        self.output.item(&made, String::new)?;
        self.output.talk(&format!("created volume {}", made.name));
        Ok(())
    }

    pub(super) async fn list(&self) -> anyhow::Result<()> {
        let volumes = self.client.volumes().await?;
        self.output.list(&volumes, |volumes| output::volumes(volumes, Timestamp::now()))
    }

    pub(super) async fn inspect(&self, object: &Object) -> anyhow::Result<()> {
        match object {
            Object::Volume(name) => {
                let volume = self.client.volume(name).await?;
                self.output.item(&volume, || output::volume(&volume, Timestamp::now()))
            }
            Object::Snapshot(name) => {
                let snapshot = self.client.snapshot(name).await?;
                self.output.item(&snapshot, || output::snapshot(&snapshot, Timestamp::now()))
            }
        }
    }

    pub(super) async fn destroy(&self, object: &Object) -> anyhow::Result<()> {
        match object {
            Object::Volume(name) => {
                self.client.destroy_volume(name).await?;
                self.output.talk(&format!("destroyed volume {name} with its snapshots"));
            }
            Object::Snapshot(name) => {
                self.client.destroy_snapshot(name).await?;
                self.output.talk(&format!("destroyed snapshot {name}"));
            }
        }
        Ok(())
    }

    pub(super) async fn set(&self, args: SetArgs) -> anyhow::Result<()> {
        let removed = args.unset.into_iter().map(|key| (key, None));
        let metadata: BTreeMap<_, _> = args.changes.into_iter().chain(removed).collect();
        let volume = self.client.patch_volume(&args.volume, &PatchVolume { metadata }).await?;
        self.output.item(&volume, String::new)?;
        self.output.talk(&format!("volume {} now has {} metadata keys", volume.name, volume.metadata.len()));
        Ok(())
    }

    pub(super) async fn mount(&self, args: MountArgs) -> anyhow::Result<()> {
        let path = args.path.map(absolute).transpose()?;
        let access = args.read_only.then_some(Access::ReadOnly);
        let mount = self.client.mount(&args.volume, &MountVolume { path, access }).await?;
        self.output.item(&mount, || format!("{}\n", mount.path))?;
        let access = if mount.read_only { "read-only" } else { "for reading and writing" };
        let mut said = format!("mounted volume {} {access}", mount.volume);
        if mount.kind == MountKind::Symlink {
            said.push_str(" as a symlink: the daemon does not run as root, so it cannot make a real mount");
            if mount.read_only {
                said.push_str(", and that nobody writes there is a promise, not a lock");
            }
        }
        self.output.talk(&said);
        Ok(())
    }

    pub(super) async fn unmount(&self, volume: &VolumeName) -> anyhow::Result<()> {
        self.client.unmount(volume).await?;
        self.output.talk(&format!("unmounted volume {volume}"));
        Ok(())
    }

    pub(super) async fn promote(&self, volume: &VolumeName, force: bool) -> anyhow::Result<()> {
        let promoted = self.client.promote(volume, &PromoteVolume { force }).await?;
        self.output.item(&promoted, String::new)?;
        for warning in &promoted.warnings {
            self.output.talk(&format!("warning: {warning}"));
        }
        self.output.talk(&format!("volume {} is writable here now (epoch {})", promoted.name, promoted.epoch));
        Ok(())
    }
}

impl Session<'_> {
    pub(super) async fn hand_off(&self, args: HandOffArgs) -> anyhow::Result<()> {
        let wait_ms = args.wait.map(|wait| wait.as_millis() as u64);
        let done = self.client.hand_off(&args.volume, &HandOffVolume { peer: args.peer, wait_ms }).await?;
        self.output.item(&done, String::new)?;
        self.output.talk(&format!(
            "{} is the primary of {} now (epoch {}, at {}@{}); nobody could write for {} ms",
            done.primary, done.volume, done.epoch, done.volume, done.snapshot, done.writes_stopped_ms
        ));
        if let Some(path) = &done.unmounted {
            self.output.talk(&format!(
                "it is not mounted at {path} here any more; `flocker mount {}` on {} mounts it there",
                done.volume, done.primary
            ));
        }
        Ok(())
    }
}

/// The daemon has another working directory than this call.
fn absolute(path: PathBuf) -> anyhow::Result<String> {
    let path = std::path::absolute(&path).with_context(|| format!("cannot find {}", path.display()))?;
    path.into_os_string().into_string().map_err(|path| {
        Stop::new(Exit::Usage, format!("the path {path:?} is not UTF-8, and the API's JSON cannot carry it")).into()
    })
}
