//! Places: a directory on a mounted btrfs, a file or a block device that holds one; and how it comes to be mounted.
//!
//! `PLACE[,size=20G][,wipe]`: a file that does not exist is made with this size, beside its place, and put there when it is
//! formatted; a file or device that holds something else than btrfs is formatted only with `wipe`, and a pool never. What
//! this module mounted it unmounts again, unless somebody uses it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{self as sys, FlockOperation};

use crate::{
    command,
    drivers::{PoolSpec, blank::is_blank, folder::POOL_RECORD},
    error::{Error, ErrorKind, Result},
    records::sync_dir,
};

const OPERATION: &str = "open pool";

/// The magic number of statfs(2).
const BTRFS: u64 = 0x9123_683e;

/// Where the superblock lies, where in it the magic, and what that is (`btrfs-progs: kernel-shared/uapi/btrfs_tree.h`).
const MAGIC_AT: u64 = 64 * 1024 + 64;
const MAGIC: &[u8; 8] = b"_BHRfS_M";

/// The smallest file system that is of any use (mkfs.btrfs itself wants 109 MiB).
const SIZE_MIN: u64 = 128 * 1024 * 1024;

/// What the user wrote behind the driver's name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    path: PathBuf,
    size_bytes: Option<u64>,
    wipe: bool,
}

/// A pool's place, mounted.
pub(super) struct Place {
    root: PathBuf,
    /// What was mounted here, and is unmounted at the end.
    mounted: bool,
    /// Held so that no other node mounts the same file.
    _lock: Option<File>,
}

impl Place {
    /// Makes the place ready. A directory may still be missing.
    pub(super) fn open(spec: &PoolSpec) -> Result<Self> {
        let unusable = |why: String| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(why));
        let wanted = parse(spec.place()).map_err(unusable)?;
        let kind = match fs::metadata(&wanted.path) {
            Ok(stat) => Some(stat.file_type()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(unusable(error.to_string())),
        };
        let container = match kind {
            Some(kind) if kind.is_dir() => false,
            Some(kind) => kind.is_file() || kind.is_block_device(),
            None => wanted.size_bytes.is_some(),
        };
        if container {
            return Self::mount(spec, &wanted);
        }
        if kind.is_some_and(|kind| !kind.is_dir()) {
            return Err(unusable("it is neither a directory nor a file nor a block device".to_owned()));
        }
        if wanted.size_bytes.is_some() || wanted.wipe {
            return Err(unusable("it is a directory; size and wipe are for files and devices".to_owned()));
        }
        let existing = if kind.is_some() { Some(&*wanted.path) } else { wanted.path.parent() };
        match existing.map(sys::statfs) {
            Some(Ok(stat)) if stat.f_type as u64 & 0xffff_ffff == BTRFS => {}
            Some(Ok(_)) => {
                let hint = if kind.is_none() { "; to make one in a file, write PLACE,size=20G" } else { "" };
                return Err(unusable(format!("it is not on a mounted btrfs{hint}")));
            }
            Some(Err(error)) => return Err(unusable(io::Error::from(error).to_string())),
            None => return Err(unusable("it has no parent directory".to_owned())),
        }
        Ok(Self { root: wanted.path, mounted: false, _lock: None })
    }

    fn mount(spec: &PoolSpec, wanted: &Wanted) -> Result<Self> {
        let unusable = |why: String| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(why));
        let failed = |error: io::Error| Error::io(OPERATION, spec, error);
        let mut file = match OpenOptions::new().read(true).write(true).open(&wanted.path) {
            Ok(file) => {
                lock(spec, &file)?;
                file
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => make_file(spec, wanted)?,
            Err(error) => return Err(failed(error)),
        };
        if wanted.size_bytes.is_some() && !file.metadata().map_err(failed)?.is_file() {
            return Err(unusable("a block device has a size of its own; leave the size away".to_owned()));
        }
        let root = mount_point(&wanted.path);
        if is_mounted(&root) {
            return Ok(Self { root, mounted: true, _lock: Some(file) });
        }
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&root).map_err(failed)?;
        match look(&mut file).map_err(failed)? {
            Content::Btrfs => {
                mount_at(spec, &file, wanted, &root)?;
                // The option may stand in a configuration for good: what is a pool is never formatted.
                if wanted.wipe && !root.join(POOL_RECORD).exists() {
                    unmount(&root).map_err(|error| unusable(error.to_string()))?;
                    format_whole(spec, &file, wanted)?;
                    mount_at(spec, &file, wanted, &root)?;
                }
            }
            Content::Data if !wanted.wipe => {
                let what = name_contents(&wanted.path);
                return Err(unusable(format!(
                    "it holds {what}, which is overwritten only when the node is started with --wipe"
                )));
            }
            Content::Data | Content::Nothing => {
                format_whole(spec, &file, wanted)?;
                mount_at(spec, &file, wanted, &root)?;
            }
        }
        // Not for others, whatever the trees in it allow.
        let place = Self { root, mounted: true, _lock: Some(file) };
        fs::set_permissions(&place.root, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(failed)?;
        Ok(place)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        if let Err(error) = unmount(&self.root) {
            // A container may still use it. The next open finds it mounted.
            tracing::info!(%error, "the pool stays mounted");
        }
    }
}

fn mount_at(spec: &PoolSpec, file: &File, wanted: &Wanted, root: &Path) -> Result<()> {
    let is_file = file.metadata().map_err(|error| Error::io(OPERATION, spec, error))?.is_file();
    let options = if is_file { "loop,noatime" } else { "noatime" };
    let words = ["-t", "btrfs", "-o", options, "--"].map(AsRef::as_ref);
    let arguments: Vec<_> = words.into_iter().chain([wanted.path.as_os_str(), root.as_os_str()]).collect();
    let mounted = command::run("mount", &arguments);
    mounted.map_err(|error| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(error.to_string())))?;
    Ok(())
}

fn unmount(root: &Path) -> std::result::Result<(), command::CommandError> {
    command::run("umount", &["--".as_ref(), root.as_os_str()]).map(drop)
}

enum Content {
    Nothing,
    Btrfs,
    Data,
}

fn look(file: &mut File) -> io::Result<Content> {
    let mut magic = [0; MAGIC.len()];
    file.seek(SeekFrom::Start(MAGIC_AT))?;
    if file.take(magic.len() as u64).read(&mut magic)? == magic.len() && magic == *MAGIC {
        return Ok(Content::Btrfs);
    }
    Ok(if is_blank(file)? { Content::Nothing } else { Content::Data })
}

/// Says in words what a file or device holds, as blkid(8) finds it.
fn name_contents(path: &Path) -> String {
    let words = ["-p", "-o", "export", "--"].map(AsRef::as_ref);
    let arguments: Vec<_> = words.into_iter().chain([path.as_os_str()]).collect();
    let found = command::run("blkid", &arguments).unwrap_or_default();
    parse_contents(&String::from_utf8_lossy(&found)).unwrap_or_else(|| "data of no known kind".to_owned())
}

/// Reads `KEY=VALUE` lines, in which blkid(8) sets a backslash before what a shell would take amiss.
fn parse_contents(text: &str) -> Option<String> {
    let value = |key: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        found.map(|value| value.replace('\\', ""))
    };
    let label = value("LABEL").map(|label| format!(" (label {label:?})")).unwrap_or_default();
    let table = || value("PTTYPE").map(|kind| format!("a partition table ({kind})"));
    value("TYPE").map(|kind| kind + &label).or_else(table)
}

fn lock(spec: &PoolSpec, file: &File) -> Result<()> {
    match sys::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::new(OPERATION, spec, ErrorKind::PoolBusy { pid: None })),
        Err(error) => Err(Error::io(OPERATION, spec, error)),
    }
}

/// Makes a file system in a new file. It gets its name last: one that was not finished is begun anew, and is nobody's data.
fn make_file(spec: &PoolSpec, wanted: &Wanted) -> Result<File> {
    let unusable = |why: String| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(why));
    let failed = |error: io::Error| Error::io(OPERATION, spec, error);
    let (Some(size), Some(parent), Some(name)) = (wanted.size_bytes, wanted.path.parent(), wanted.path.file_name())
    else {
        return Err(unusable("there is nothing".to_owned()));
    };
    check_size(size).map_err(unusable)?;
    let room = sys::statvfs(parent).map_err(|error| unusable(io::Error::from(error).to_string()))?;
    let room = room.f_bavail.saturating_mul(room.f_frsize);
    if room < size {
        return Err(unusable(format!("there is no room for its {size} bytes: {} has {room} left", parent.display())));
    }
    let new = parent.join(format!(".{}.being-made", name.to_string_lossy()));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&new);
    let file = file.map_err(failed)?;
    lock(spec, &file)?;
    let made = (|| {
        file.set_len(0).and_then(|()| file.set_len(size)).map_err(failed)?;
        format(spec, &new, wanted)?;
        file.sync_all().map_err(failed)?;
        sys::renameat_with(sys::CWD, &new, sys::CWD, &wanted.path, sys::RenameFlags::NOREPLACE)
            .map_err(|error| failed(error.into()))?;
        sync_dir(parent).map_err(failed)
    })();
    if made.is_err() {
        let _ = fs::remove_file(&new);
    }
    made.map(|()| file)
}

fn check_size(size: u64) -> std::result::Result<(), String> {
    if size < SIZE_MIN {
        return Err(format!("{size} bytes are too few; btrfs wants {SIZE_MIN} at least"));
    }
    Ok(())
}

/// Formats what exists.
fn format_whole(spec: &PoolSpec, file: &File, wanted: &Wanted) -> Result<()> {
    let unusable = |why: String| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(why));
    let stat = file.metadata().map_err(|error| Error::io(OPERATION, spec, error))?;
    if stat.is_file() {
        let size = match (wanted.size_bytes, stat.len()) {
            (Some(size), _) => size,
            (None, 0) => return Err(unusable("the file is empty; add ,size=20G".to_owned())),
            (None, length) => length,
        };
        check_size(size).map_err(unusable)?;
        file.set_len(size).map_err(|error| Error::io(OPERATION, spec, error))?;
    }
    format(spec, &wanted.path, wanted)
}

fn format(spec: &PoolSpec, path: &Path, wanted: &Wanted) -> Result<()> {
    // Without --force it looks for the signatures of other file systems by itself, too.
    let mut arguments = vec!["--quiet".as_ref()];
    if wanted.wipe {
        arguments.push("--force".as_ref());
    }
    arguments.extend(["--".as_ref(), path.as_os_str()]);
    match command::run("mkfs.btrfs", &arguments) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::new(OPERATION, spec, ErrorKind::PoolUnusable(explain(&error)))),
    }
}

/// Says what to do about a program that is missing, and what any other said.
pub(super) fn explain(error: &command::CommandError) -> String {
    if error.is_missing() { format!("{error}; install btrfs-progs") } else { error.to_string() }
}

/// Where a file or a device is mounted: beside a file, under /run for a device.
fn mount_point(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if path.starts_with("/dev") {
        let name = path.to_string_lossy().trim_start_matches("/dev/").replace('/', "-");
        return Path::new("/run/flocker").join(format!("{name}.mounted"));
    }
    path.with_file_name(format!("{name}.mounted"))
}

fn is_mounted(root: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|stat| stat.dev());
    match (device(root), root.parent().map(device)) {
        (Ok(here), Some(Ok(above))) => here != above,
        _ => false,
    }
}

fn parse(text: &str) -> std::result::Result<Wanted, String> {
    let mut wanted = Wanted { path: PathBuf::new(), size_bytes: None, wipe: false };
    let mut rest = text;
    while let Some((before, option)) = rest.rsplit_once(',') {
        if option == "wipe" {
            wanted.wipe = true;
        } else if let Some(size) = option.strip_prefix("size=") {
            wanted.size_bytes =
                Some(parse_size(size).ok_or_else(|| format!("{size:?} is no size; write 20G or 512M"))?);
        } else {
            break;
        }
        rest = before;
    }
    wanted.path = PathBuf::from(rest);
    if wanted.path.is_absolute() { Ok(wanted) } else { Err("the path must be absolute".to_owned()) }
}

fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.strip_suffix(['K', 'M', 'G', 'T']) {
        Some(digits) => (digits, text.chars().last()?),
        None => (text, 'B'),
    };
    let number: u64 = digits.parse().ok()?;
    let shift = match unit {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => 0,
    };
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_place_is_a_path_and_options() {
        let wanted = |path: &str, size_bytes, wipe| Ok(Wanted { path: path.into(), size_bytes, wipe });
        assert_eq!(parse("/mnt/x"), wanted("/mnt/x", None, false));
        assert_eq!(parse("/a,b/pool.btrfs,size=20G"), wanted("/a,b/pool.btrfs", Some(20 << 30), false));
        assert_eq!(parse("/dev/sdx,wipe"), wanted("/dev/sdx", None, true));
        assert_eq!(parse("/p,size=512M,wipe"), wanted("/p", Some(512 << 20), true));
        assert!(parse("pool,size=1G").unwrap_err().contains("absolute"));
        assert!(parse("/p,size=big").unwrap_err().contains("no size"));
        assert!(parse("/p,size=99999999999T").is_err());
    }

    #[test]
    fn what_a_device_holds_is_said_in_words() {
        let ext4 = "DEVNAME=/dev/loop0\nLABEL=my\\ data\nUUID=27421e7f\nBLOCK_SIZE=1024\nTYPE=ext4\nUSAGE=filesystem\n";
        assert_eq!(parse_contents(ext4).unwrap(), "ext4 (label \"my data\")");
        assert_eq!(parse_contents("PTUUID=1\nPTTYPE=gpt\n").unwrap(), "a partition table (gpt)");
        assert_eq!(parse_contents(""), None);
    }

    #[test]
    fn a_mount_lies_beside_its_file() {
        assert_eq!(mount_point(Path::new("/var/pool.btrfs")), Path::new("/var/pool.btrfs.mounted"));
        assert_eq!(mount_point(Path::new("/dev/mapper/x")), Path::new("/run/flocker/mapper-x.mounted"));
    }
}
