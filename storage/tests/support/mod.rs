//! Places to put pools: temporary folders, and file systems made in loop files where root allows it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod zfs_fuse;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
    sync::atomic::{AtomicU32, Ordering},
};

use async_trait::async_trait;
use flocker_storage::{conformance::Fixture, driver::Driver, drivers, error::Result};

/// Pools in folders of one place.
pub struct Folders {
    driver: &'static str,
    place: PathBuf,
    _keep: Option<tempfile::TempDir>,
}

impl Folders {
    /// In a temporary folder.
    pub fn temporary() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { driver: "directory", place: folder.path().to_owned(), _keep: Some(folder) }
    }

    /// In a new folder of a mounted file system.
    pub fn on(mount: &Path) -> Self {
        Self::of("directory", mount)
    }

    /// Pools of another driver in a new folder of a mounted file system.
    pub fn of(driver: &'static str, mount: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let place = mount.join(format!("case{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&place).unwrap();
        Self { driver, place, _keep: None }
    }
}

#[async_trait]
impl Fixture for Folders {
    async fn open(&self, pool: &str) -> Result<Arc<dyn Driver>> {
        open_with(self.driver, &self.place.join(pool)).await
    }

    fn plant_stranger(&self, pool: &str) -> bool {
        let strange = self.place.join(pool).join("volumes").join("somebody's");
        std::fs::create_dir(&strange).and_then(|()| std::fs::write(strange.join("data"), "precious")).unwrap();
        true
    }
}

/// Opens a directory pool.
pub async fn open(path: &Path) -> Result<Arc<dyn Driver>> {
    open_with("directory", path).await
}

/// Opens a pool with a driver.
pub async fn open_with(driver: &str, path: &Path) -> Result<Arc<dyn Driver>> {
    drivers::open(&format!("{driver}:{}", path.display()).parse().unwrap()).await
}

/// Tells whether a test that needs `what` runs here. Says so loudly when not, and fails where CI demands it.
pub fn have(what: &str, is_there: bool) -> bool {
    if !is_there {
        let demanded = std::env::var("FLOCKER_REQUIRE").unwrap_or_default();
        assert!(!demanded.split(',').any(|it| it == what), "FLOCKER_REQUIRE names {what}, which is not here");
        eprintln!("SKIPPED: this test needs {what}, which is not here");
    }
    is_there
}

/// Tells whether this is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Tells whether a program can be started.
pub fn has_program(name: &str) -> bool {
    Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Who [`as_nobody`] is.
pub const NOBODY: u32 = 65534;

/// Makes a command that runs a program as another user without any right.
pub fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".to_owned()]).arg(program);
    command
}

/// Makes a temporary folder that belongs to that user.
pub fn open_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    folder
}

/// A file system in a sparse file, unmounted when dropped.
pub struct LoopMount {
    mount: PathBuf,
    folder: Option<tempfile::TempDir>,
}

impl LoopMount {
    /// Makes and mounts one with `mkfs.KIND`.
    pub fn new(kind: &str, size_bytes: u64, options: &[&str]) -> Self {
        // In memory where there is room: these tests sync all the time, and a disk would be what they measure.
        let memory = Path::new("/dev/shm");
        let room = rustix::fs::statvfs(memory).is_ok_and(|found| found.f_bavail * found.f_frsize > 2 * size_bytes);
        let folder = if room { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        std::fs::File::create(&image).unwrap().set_len(size_bytes).unwrap();
        std::fs::create_dir(&mount).unwrap();
        must(Command::new(format!("mkfs.{kind}")).args(options).arg(&image));
        // The kernel lets the loop device go with the mount.
        must(Command::new("mount").args(["-o", "loop", "-t", kind]).arg(&image).arg(&mount));
        Self { mount, folder: Some(folder) }
    }

    /// Makes one, or says why not.
    pub fn try_new(kind: &str, size_bytes: u64, options: &[&str]) -> Option<Self> {
        let there = have("root", is_root()) && have(kind, has_program(&format!("mkfs.{kind}")));
        there.then(|| Self::new(kind, size_bytes, options))
    }

    pub fn path(&self) -> &Path {
        &self.mount
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.mount).status().is_ok_and(|status| status.success());
        if !unmounted {
            // A thread of a failed test may still hold a file: let the kernel finish it, and keep the folder.
            let _ = Command::new("umount").arg("-l").arg(&self.mount).status();
            eprintln!("{} was busy; unmounted lazily", self.mount.display());
        }
        drop(self.folder.take());
    }
}

fn must(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}
