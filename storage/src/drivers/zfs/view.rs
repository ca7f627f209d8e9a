//! Mounts: heads where they are attached, and snapshots where they are read.
//!
//! A snapshot is read through a clone of it in `ROOT/views`, which goes when the last reader has left; what is there at open is cleared
//! away. That takes a while, so a reader can leave it to a thread ([`View::leave`]): what clones stand in the way of waits for that, as
//! does whoever left before its verb ends ([`Pool::settle_views`]), so that an operator finds nothing of a verb that is over. zfs-fuse
//! cannot mount a snapshot itself, and on OpenZFS a mounted snapshot keeps the dataset from being promoted: a reader would stand in the
//! way of the next received snapshot. Refuses to know who reads.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::Builder,
};

use rustix::mount::UnmountFlags;
use uuid::Uuid;

use super::{
    catalog::gone,
    pool::{Pool, locked, make_dir},
    program::{Class, Trouble, patiently, unless},
};
use crate::{
    error::{Error, Result},
    model::{SnapshotKey, VolumeId},
};

/// The snapshots that are mounted, by the names of their views.
#[derive(Debug, Default)]
pub(super) struct Views {
    states: Mutex<HashMap<String, State>>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Opening,
    Open { readers: usize },
    Closing,
}

impl Views {
    /// Waits until something is true of them.
    fn when(&self, wanted: impl Fn(&HashMap<String, State>) -> bool) -> MutexGuard<'_, HashMap<String, State>> {
        self.changed.wait_while(locked(&self.states), |states| !wanted(states)).unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, name: &str, state: Option<State>) {
        let mut states = locked(&self.states);
        match state {
            Some(state) => states.insert(name.to_owned(), state),
            None => states.remove(name),
        };
        self.changed.notify_all();
    }

    /// Has [`Views::settle`] wait for something else, too, until the guard goes.
    pub(super) fn leaving(self: &Arc<Self>) -> Leaving {
        let name = format!("leaving.{}", Uuid::now_v7());
        self.set(&name, Some(State::Closing));
        Leaving { views: Arc::clone(self), name }
    }

    fn settle_one(&self, name: &str) {
        drop(self.when(|states| states.get(name) != Some(&State::Closing)));
    }

    /// Waits until none is being closed.
    pub(super) fn settle(&self) {
        drop(self.when(|states| !states.values().any(|state| *state == State::Closing)));
    }
}

/// What is let go of behind somebody's back.
pub(super) struct Leaving {
    views: Arc<Views>,
    name: String,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.views.set(&self.name, None);
    }
}

/// A snapshot that can be read at a path while this value lives.
pub(super) struct View {
    pool: Arc<Pool>,
    name: String,
    path: PathBuf,
    is_left: bool,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "View({})", self.path.display())
    }
}

impl View {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves without waiting until nothing is left of it.
    pub(super) fn leave(mut self) {
        self.is_left = true;
        self.pool.leave_view(&self.name);
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if !self.is_left {
            self.pool.leave_view(&self.name);
            self.pool.views.settle_one(&self.name);
        }
    }
}

impl Pool {
    /// Makes a snapshot readable.
    pub(super) fn view(self: &Arc<Self>, operation: &'static str, key: SnapshotKey) -> Result<View> {
        self.view_of(operation, &self.snapshot_name(key), view_name(key))
    }

    /// Makes any snapshot readable, under a name of its own.
    pub(super) fn view_of(self: &Arc<Self>, operation: &'static str, snapshot: &str, name: String) -> Result<View> {
        let path = self.enter_view(operation, snapshot, &name)?;
        Ok(View { pool: Arc::clone(self), name, path, is_left: false })
    }

    /// Counts one more reader of a snapshot, who leaves by [`Pool::leave_view`]; the first one has it mounted.
    pub(super) fn enter_view(&self, operation: &'static str, snapshot: &str, name: &str) -> Result<PathBuf> {
        let path = self.mounts().join("views").join(name);
        let mut states = self.views.when(|states| !matches!(states.get(name), Some(State::Opening | State::Closing)));
        if let Some(State::Open { readers }) = states.get_mut(name) {
            *readers += 1;
            return Ok(path);
        }
        states.insert(name.to_owned(), State::Opening);
        drop(states);
        let opened = make_dir(&path).map_err(|error| Error::io(operation, path.display(), error)).and_then(|()| {
            self.open_view(snapshot, name, &path).map_err(|trouble| trouble.into_error(operation, snapshot))
        });
        self.views.set(name, opened.is_ok().then_some(State::Open { readers: 1 }));
        opened.map(|()| path)
    }

    /// Counts one reader less; the last one has it unmounted, on a thread of its own.
    pub(super) fn leave_view(self: &Arc<Self>, name: &str) {
        let mut states = locked(&self.views.states);
        let Some(State::Open { readers }) = states.get_mut(name) else { return };
        *readers -= 1;
        if *readers > 0 {
            return;
        }
        states.insert(name.to_owned(), State::Closing);
        drop(states);
        let (pool, of_thread) = (Arc::clone(self), name.to_owned());
        if Builder::new().name("zfs".to_owned()).spawn(move || pool.close_left(&of_thread)).is_err() {
            Arc::clone(self).close_left(name);
        }
    }

    /// Closes a view that everybody has left. Whoever waits for that finds the pool no longer held here.
    fn close_left(self: Arc<Self>, name: &str) {
        self.close_or_leave(name);
        let views = Arc::clone(&self.views);
        drop(self);
        views.set(name, None);
    }

    fn close_or_leave(&self, name: &str) {
        if let Err(trouble) = self.close_view(name) {
            tracing::info!(view = name, error = %trouble.error, "a view of a snapshot is in use and stays until the pool is opened again");
        }
    }

    /// Waits until what was left is closed: clones of snapshots stand in the way of what destroys, renames or promotes.
    pub(super) fn settle_views(&self) {
        self.views.settle();
    }

    /// Tells whether anybody reads a snapshot of a volume.
    pub(super) fn has_readers(&self, volume: VolumeId) -> bool {
        let prefix = format!("{volume}.");
        locked(&self.views.states).keys().any(|name| name.starts_with(&prefix))
    }

    /// Closes all views at the end, when nobody is left who could be closing one.
    pub(super) fn close_views(&self) {
        let states = std::mem::take(&mut *locked(&self.views.states));
        let open = states.into_iter().filter(|(_, state)| matches!(state, State::Open { .. }));
        let names: Vec<String> = open.map(|(name, _)| name).collect();
        names.iter().for_each(|name| self.close_or_leave(name));
    }

    fn open_view(&self, snapshot: &str, name: &str, path: &Path) -> std::result::Result<(), Trouble> {
        if is_mounted(path) {
            self.close_view(name)?;
        }
        let dataset = format!("{}/{name}", self.folder("views"));
        let words = ["clone", "-o", "readonly=on", "-o", "canmount=noauto", snapshot, &dataset];
        unless(Class::Exists, self.programs.zfs_patiently(&words))?;
        self.mount(&dataset)
    }

    fn close_view(&self, name: &str) -> std::result::Result<(), Trouble> {
        let (path, dataset) = (self.mounts().join("views").join(name), format!("{}/{name}", self.folder("views")));
        patiently(|| {
            self.unmount(&path)?;
            gone(self.programs.zfs(&["destroy", &dataset]))
        })
    }

    /// Mounts a dataset. A clone on zfs-fuse is mounted already, whatever its `canmount` says.
    pub(super) fn mount(&self, dataset: &str) -> std::result::Result<(), Trouble> {
        if is_mounted(&self.mount_point(dataset)) {
            return Ok(());
        }
        unless(Class::Mounted, self.programs.zfs_patiently(&["mount", dataset])).map(drop)
    }

    /// Unmounts what is mounted at a path, if anything is.
    pub(super) fn unmount(&self, path: &Path) -> std::result::Result<(), Trouble> {
        if is_mounted(path) {
            patiently(|| self.unmount_once(path))?;
        }
        let _ = fs::remove_dir(path);
        Ok(())
    }

    /// By the system's call. Where that is refused the program tries, and has words for why not. For zfs-fuse always the program: unmounted
    /// the moment after the last file was closed, it now and then answers nobody any more (4 of some 80 tests; none of 80 with the program).
    fn unmount_once(&self, path: &Path) -> std::result::Result<(), Trouble> {
        if self.abilities.modern && rustix::mount::unmount(path, UnmountFlags::NOFOLLOW).is_ok() {
            return Ok(());
        }
        let words = ["--".as_ref(), path.as_os_str()];
        unless(Class::NotMounted, self.programs.run("umount", &words)).map(drop)
    }

    /// Mounts the head of a volume and returns where.
    pub(super) fn mount_head(&self, operation: &'static str, volume: VolumeId) -> Result<PathBuf> {
        let dataset = self.volume_dataset(volume);
        let path = self.mount_point(&dataset);
        self.set_level(volume, false);
        if !is_mounted(&path) {
            self.mount(&dataset).map_err(|trouble| trouble.into_error(operation, volume))?;
        }
        Ok(path)
    }

    pub(super) fn unmount_head(&self, operation: &'static str, volume: VolumeId) -> Result<()> {
        let path = self.mount_point(&self.volume_dataset(volume));
        self.unmount(&path).map_err(|trouble: Trouble| -> Error { trouble.into_error(operation, volume) })
    }

    /// Unmounts all that is mounted beneath this pool's folder; what somebody uses stays.
    pub(super) fn unmount_all(&self) {
        for folder in super::pool::FOLDERS {
            for entry in fs::read_dir(self.mounts().join(folder)).into_iter().flatten().flatten() {
                let path = entry.path();
                if is_mounted(&path)
                    && let Err(trouble) = self.unmount_once(&path)
                {
                    tracing::info!(error = %trouble.error, "it stays mounted");
                }
                let _ = fs::remove_dir(path);
            }
        }
    }
}

/// Names the view of a snapshot.
pub(super) fn view_name(key: SnapshotKey) -> String {
    format!("{}.{}", key.volume, key.snapshot)
}

/// Tells whether something is mounted at a path: it lies on another device than the directory above. A mount whose
/// daemon is gone counts, too.
pub(super) fn is_mounted(path: &Path) -> bool {
    let here = match fs::metadata(path) {
        Ok(stat) => stat.dev(),
        Err(error) => return error.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error()),
    };
    path.parent().and_then(|parent| fs::metadata(parent).ok()).is_some_and(|above| above.dev() != here)
}
