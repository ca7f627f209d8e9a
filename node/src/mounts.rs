//! Where volumes are mounted: bind mounts as root, symlinks otherwise, at paths that hold no owner and no epoch.
//!
//! Owns the mount table and the two system calls behind it. Refuses to know how a driver makes a path
//! ([`flocker_storage::driver::Driver::attach`]). A restart of the daemon leaves mounts alone; a reboot loses them and
//! `Node::restore_mounts` puts them back.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flocker_storage::{
    driver::{Access, Target},
    model::{Role, VolumeId, VolumeName},
};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::{
    api::{
        events::Event,
        types::{ApiProblem, MountKind, MountResource, MountVolume},
    },
    catalog::Volume,
    daemon::Node,
    problem::{Result, problem},
    state::MountRow,
};

/// The mount table in memory; the state database holds the same.
#[derive(Default)]
pub(crate) struct Mounts {
    rows: Mutex<BTreeMap<VolumeId, MountRow>>,
}

impl Mounts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, MountRow>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a volume's mount.
    pub(crate) fn of(&self, volume: VolumeId) -> Option<MountRow> {
        self.lock().get(&volume).cloned()
    }
}

/// Shows a mount as the API does.
pub(crate) fn resource(volume: &VolumeName, row: &MountRow) -> MountResource {
    MountResource { volume: volume.clone(), path: row.path.clone(), read_only: row.read_only, kind: row.kind }
}

/// A volume is mounted and what was asked for must not happen underneath its user.
pub(crate) fn mounted(volume: &VolumeName, row: &MountRow, what: &str) -> ApiProblem {
    problem(409, "mounted", format!("cannot {what} {volume}: it is mounted at {}", row.path))
        .hint(format!("stop what uses it, then `flocker unmount {volume}`"))
        .with("path", &row.path)
}

impl Node {
    /// Refuses when a volume is mounted.
    pub(crate) fn check_unmounted(&self, volume: &Volume, what: &str) -> Result<()> {
        match self.mounts.of(volume.record.id) {
            Some(row) => Err(mounted(&volume.record.name, &row, what)),
            None => Ok(()),
        }
    }

    /// Mounts a volume, unless it is being handed over. Asking again for what is there already is done at once.
    pub(crate) async fn mount(&self, name: &VolumeName, request: MountVolume) -> Result<MountResource> {
        self.handoffs.check_settled(&self.catalog.find(name)?)?;
        self.mount_again(name, request).await
    }

    /// Mounts a volume whatever becomes of it.
    pub(crate) async fn mount_again(&self, name: &VolumeName, request: MountVolume) -> Result<MountResource> {
        let (volume, _guard) = self.catalog.claim(name).await?;
        let access = self.allowed_access(&volume, request.access)?;
        let own_place = self.paths.mounts().join(name.as_str());
        let path = request.path.map_or(own_place, PathBuf::from);
        if !path.is_absolute() {
            return Err(problem(400, "bad_request", format!("the mount path {} is not absolute", path.display())));
        }
        let read_only = access == Access::ReadOnly;
        let kind = if self.mounts_really { MountKind::Bind } else { MountKind::Symlink };
        let row = MountRow { volume: volume.record.id, path: path.display().to_string(), read_only, kind };
        if let Some(known) = self.mounts.of(volume.record.id) {
            return if known == row { Ok(resource(name, &row)) } else { Err(mounted(name, &known, "mount")) };
        }
        if path.to_str().is_none() {
            return Err(problem(400, "bad_request", format!("the mount path {} is not UTF-8", path.display())));
        }
        self.check_mount_point(&path)?;
        let source = self.driver.attach(Target::Head(volume.record.id), access).await?;
        // The intent is written first: a crash in between is mended by `restore`, which mounts what should be.
        self.state.put_mount(&row).await?;
        flocker_storage::fault::point("node.mount.before-mount");
        let shown = path.clone();
        let done = blocking(move || appear(&source, &path, kind, access)).await;
        if let Err(error) = done {
            self.state.remove_mount(row.volume).await?;
            self.driver.detach(Target::Head(row.volume)).await?;
            return Err(mount_failed(&shown, &error));
        }
        self.mounts.lock().insert(row.volume, row.clone());
        self.events.tell(Event::Mounted { volume: name.clone(), path: row.path.clone(), read_only });
        Ok(resource(name, &row))
    }

    fn allowed_access(&self, volume: &Volume, wanted: Option<Access>) -> Result<Access> {
        match (volume.record.role, wanted) {
            (Role::Primary, None) => Ok(Access::ReadWrite),
            (Role::Replica, None) => Ok(Access::ReadOnly),
            (Role::Replica, Some(Access::ReadWrite)) => Err(read_only_replica(volume, "mount for writing")),
            (_, Some(access)) => Ok(access),
        }
    }

    fn check_mount_point(&self, path: &Path) -> Result<()> {
        let refuse = |why: &str| {
            Err(problem(409, "mount_point", format!("cannot mount at {}: {why}", path.display()))
                .hint("name a path that does not exist, or an empty directory"))
        };
        if self.mounts.lock().values().any(|row| Path::new(&row.path) == path) {
            return refuse("another volume is mounted there");
        }
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match path.parent() {
                Some(parent) if parent == self.paths.mounts() || parent.is_dir() => Ok(()),
                _ => refuse("its parent directory does not exist"),
            },
            Err(error) => refuse(&error.to_string()),
            Ok(found) if !found.is_dir() => refuse("something other than a directory is there"),
            Ok(_) => match fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
                Ok(true) => Ok(()),
                Ok(false) => refuse("the directory is not empty"),
                Err(error) => refuse(&error.to_string()),
            },
        }
    }

    /// Unmounts a volume.
    pub(crate) async fn unmount(&self, name: &VolumeName) -> Result<VolumeId> {
        let (volume, _guard) = self.catalog.claim(name).await?;
        let Some(row) = self.mounts.of(volume.record.id) else {
            return Err(problem(409, "not_mounted", format!("volume {name} is not mounted")));
        };
        let (path, kind, own) = (PathBuf::from(&row.path), row.kind, self.paths.mounts());
        blocking(move || disappear(&path, kind, &own)).await.map_err(|error| {
            let busy = error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error());
            let code = if busy { "mount_busy" } else { "unmount_failed" };
            problem(409, code, format!("cannot unmount {name} from {}: {error}", row.path))
                .hint(format!("`fuser -vm {}` shows the processes that use it", row.path))
        })?;
        self.state.remove_mount(row.volume).await?;
        self.mounts.lock().remove(&row.volume);
        self.events.tell(Event::Unmounted { volume: name.clone() });
        self.driver.detach(Target::Head(row.volume)).await?;
        Ok(row.volume)
    }

    /// Takes over what is mounted already and mounts again what should be (after a reboot, or a crash in `mount`).
    pub(crate) async fn restore_mounts(self: &Arc<Self>) -> Result<()> {
        let rows = self.state.mounts().await?;
        if rows.iter().any(|row| !row.read_only && !is_present(row)) {
            self.look_before_mounting().await;
        }
        for row in rows {
            let Some(volume) = self.catalog.get(row.volume) else {
                tracing::warn!(volume = %row.volume, path = row.path, "a mounted volume is not in the pool any more");
                self.state.remove_mount(row.volume).await?;
                continue;
            };
            if !row.read_only && !is_present(&row) && self.superseded.holds(row.volume) {
                tracing::warn!(volume = %volume.record.name, path = row.path, "not mounted again: another node is the primary now");
                self.state.remove_mount(row.volume).await?;
                continue;
            }
            if let Err(error) = self.restore_mount(&row).await {
                tracing::error!(volume = %volume.record.name, path = row.path, "cannot mount again: {error}");
            }
            self.mounts.lock().insert(row.volume, row);
        }
        // Looking at each volume takes programs of the driver's.
        if !self.state.knows_mounts().await? {
            self.adopt_mounts().await?;
            self.state.settle_mounts().await?;
        }
        Ok(())
    }

    async fn restore_mount(&self, row: &MountRow) -> Result<()> {
        let access = if row.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let path = PathBuf::from(&row.path);
        let source = self.driver.attach(Target::Head(row.volume), access).await?;
        let kind = row.kind;
        if !is_present(row) {
            let shown = path.clone();
            blocking(move || appear(&source, &path, kind, access)).await.map_err(|e| mount_failed(&shown, &e))?;
        }
        Ok(())
    }

    /// Finds mounts that a lost state database does not know: mount points and symlinks that show a volume's files.
    async fn adopt_mounts(&self) -> Result<()> {
        let mut candidates = mount_points();
        let own = fs::read_dir(self.paths.mounts()).into_iter().flatten().flatten();
        candidates.extend(own.map(|entry| entry.path()).filter(|path| path.is_symlink()));
        let known: Vec<PathBuf> = self.mounts.lock().values().map(|row| PathBuf::from(&row.path)).collect();
        candidates.retain(|path| !known.contains(path) && path.to_str().is_some());
        if candidates.is_empty() {
            return Ok(());
        }
        for volume in self.catalog.volumes() {
            let id = volume.record.id;
            if self.mounts.of(id).is_some() {
                continue;
            }
            let Ok(source) = self.driver.attach(Target::Head(id), Access::ReadOnly).await else { continue };
            let Ok(wanted) = fs::metadata(&source) else { continue };
            let found = candidates.iter().find(|path| {
                fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
                    && **path != source
            });
            let Some(path) = found else {
                self.driver.detach(Target::Head(id)).await?;
                continue;
            };
            let kind = if path.is_symlink() { MountKind::Symlink } else { MountKind::Bind };
            let read_only = volume.record.role == Role::Replica || is_read_only(path);
            let row = MountRow { volume: id, path: path.display().to_string(), read_only, kind };
            tracing::info!(volume = %volume.record.name, path = row.path, "found a mount that was not remembered");
            self.state.put_mount(&row).await?;
            self.mounts.lock().insert(id, row);
        }
        Ok(())
    }
}

/// The volume's head may not be written here.
pub(crate) fn read_only_replica(volume: &Volume, what: &str) -> ApiProblem {
    let name = &volume.record.name;
    let primary = volume.record.primary.as_ref().map_or("another node", |host| host.name.as_str());
    problem(409, "read_only_replica", format!("cannot {what} {name}: it is a replica, its primary is {primary}")).hint(
        format!(
            "`flocker promote {name}` makes it writable here; `flocker clone {name}@SNAPSHOT NEW` makes a writable copy"
        ),
    )
}

fn mount_failed(path: &Path, error: &io::Error) -> ApiProblem {
    problem(500, "mount_failed", format!("cannot mount at {}: {error}", path.display()))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    // Another thread would take real time, in which a simulation goes on.
    #[cfg(feature = "simulation")]
    if flocker_storage::simulation::is_running() {
        return work();
    }
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Makes `source` appear at `path`.
fn appear(source: &Path, path: &Path, kind: MountKind, access: Access) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if kind == MountKind::Symlink {
        match fs::remove_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        return std::os::unix::fs::symlink(source, path);
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    rustix::mount::mount_bind(source, path)?;
    if access == Access::ReadOnly {
        let read_only = rustix::mount::mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, "");
        if let Err(error) = read_only {
            rustix::mount::unmount(path, UnmountFlags::empty())?;
            return Err(error.into());
        }
    }
    // What is mounted below the volume later must not spread into the pool's own tree.
    let _ = rustix::mount::mount_change(path, MountPropagationFlags::PRIVATE);
    Ok(())
}

/// Takes `path` away again. Directories of the node's own are removed, others left.
fn disappear(path: &Path, kind: MountKind, own: &Path) -> io::Result<()> {
    if kind == MountKind::Symlink {
        return match fs::symlink_metadata(path) {
            Ok(found) if found.is_symlink() => fs::remove_file(path),
            _ => Ok(()),
        };
    }
    match rustix::mount::unmount(path, UnmountFlags::empty()) {
        // EINVAL: it is no mount point any more, somebody else unmounted it (umount(2)).
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) | Ok(()) => {}
        Err(error) => return Err(error.into()),
    }
    if path.starts_with(own) {
        let _ = fs::remove_dir(path);
    }
    Ok(())
}

/// Tells whether a mount that is remembered is there.
fn is_present(row: &MountRow) -> bool {
    let path = Path::new(&row.path);
    match row.kind {
        MountKind::Bind => mount_points().iter().any(|point| point == path),
        MountKind::Symlink => fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()),
    }
}

/// Lists the mount points this process sees (proc_pid_mountinfo(5): the fifth field, blanks as octal escapes).
fn mount_points() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.map(|point| PathBuf::from(unescape(point))).collect()
}

fn unescape(text: &str) -> String {
    let named = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    named.iter().fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

fn is_read_only(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|found| found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Says why a symlink is used, for the log and `flocker pool status`.
pub(crate) fn symlink_note() -> &'static str {
    "this node does not run as root, so `mount` makes symlinks: read-only is a promise then, not a lock"
}
