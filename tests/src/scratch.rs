//! A temporary folder of one test, with a short path, and the file systems mounted in it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::mount::UnmountFlags;

/// A temporary folder. Everything mounted below it and the folder itself are gone when it is dropped.
///
/// Its path is short: a socket's path may have 107 bytes at most (unix(7)).
#[derive(Debug)]
pub struct Scratch {
    folder: Option<tempfile::TempDir>,
    /// Where images of file systems lie, when not in the folder.
    images: Option<tempfile::TempDir>,
}

/// Images lie in memory where it has so much room for them, in MiB: what is waited for on a disk is mostly that a file system in
/// a file makes something durable.
const ROOM_FOR_IMAGES: u64 = 8192;

/// A file system that is made in a file and mounted through a loop device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4: no reflinks.
    Ext4,
    /// XFS: reflinks.
    Xfs,
    /// btrfs: reflinks, inode numbers per subvolume.
    Btrfs,
}

impl FileSystem {
    /// Returns its name, as [`require`](crate::require) knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

impl Scratch {
    /// Makes the folder, mode 0711 so that other users of the tests pass through it.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let room = rustix::fs::statvfs(memory).map_or(0, |found| (found.f_bavail * found.f_frsize) >> 20);
        let mut scratch = Self::below(&std::env::temp_dir());
        scratch.images = (room > ROOM_FOR_IMAGES).then(|| make_folder(memory));
        scratch
    }

    /// Makes the folder below another one than the temporary folder, and images in it, too.
    pub fn below(parent: &Path) -> Self {
        let folder = make_folder(parent);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).expect("open the scratch folder");
        Self { folder: Some(folder), images: None }
    }

    /// Returns the folder.
    pub fn path(&self) -> &Path {
        self.folder.as_ref().expect("the folder lives as long as the value").path()
    }

    /// Makes a folder in it.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(&path).expect("make a folder");
        path
    }

    /// Makes a file of `mebibytes` without contents, for a file system.
    pub fn image(&self, name: &str, mebibytes: u64) -> PathBuf {
        let image = self.images.as_ref().map_or(self.path(), |folder| folder.path()).join(format!("{name}.img"));
        fs::File::create(&image).and_then(|file| file.set_len(mebibytes << 20)).expect("make an image file");
        image
    }

    /// Makes a file system of `mebibytes` in a file and mounts it. Needs root and the file system's mkfs.
    pub fn mount(&self, file_system: FileSystem, name: &str, mebibytes: u64) -> PathBuf {
        let image = self.image(name, mebibytes);
        let mkfs = crate::needs::program(&format!("mkfs.{}", file_system.name())).expect("mkfs is there");
        run(Command::new(mkfs).arg("-q").arg(&image));
        let place = self.folder(name);
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&place));
        place
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for place in mounts_below(self.path()).into_iter().rev() {
            let _ = rustix::mount::unmount(&place, UnmountFlags::DETACH);
        }
        if std::env::var_os("FLOCKER_TEST_KEEP").is_some() {
            for folder in [self.folder.take(), self.images.take()].into_iter().flatten() {
                eprintln!("kept: {}", folder.keep().display());
            }
        }
    }
}

fn make_folder(parent: &Path) -> tempfile::TempDir {
    tempfile::Builder::new().prefix("flk").tempdir_in(parent).expect("make a scratch folder")
}

/// Returns the mount points below a folder, in the order they were mounted.
pub fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = table.lines().filter_map(|line| line.split(' ').nth(4));
    places.map(PathBuf::from).filter(|place| place.starts_with(folder)).collect()
}

/// Runs a program that must succeed.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} ended with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
