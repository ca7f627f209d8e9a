//! Where a pool can be: in a file, on a block device; and what of it is never formatted.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use flocker_storage::{
    driver::Driver,
    drivers,
    error::{Error, ErrorKind, Result},
};

use crate::{rig::*, support};

/// A loop device, which stands for a disk.
struct Device {
    name: String,
    image: PathBuf,
    _folder: tempfile::TempDir,
}

impl Device {
    fn new(mebibytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk");
        fs::File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
        let name = must("losetup", &["--find", "--show", image.to_str().unwrap()]).trim().to_owned();
        Self { name, image, _folder: folder }
    }

    async fn open(&self, options: &str) -> Result<std::sync::Arc<dyn Driver>> {
        drivers::open(&format!("btrfs:{}{options}", self.name).parse().unwrap()).await
    }

    async fn refusal(&self, options: &str) -> String {
        why_unusable(self.open(options).await)
    }

    fn contents(&self) -> Vec<u8> {
        must("sync", &[&self.name]);
        fs::read(&self.image).unwrap()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.name]).status();
    }
}

fn why_unusable<T>(result: Result<T>) -> String {
    match result {
        Err(Error { kind: ErrorKind::PoolUnusable(why), .. }) => why,
        Err(other) => panic!("another error came: {other:?}"),
        Ok(_) => panic!("the pool was opened"),
    }
}

/// Puts something on a device.
type Fill = fn(&Device);

/// The kernel lets a loop device go with its last user, which may be a moment after the mount.
fn wait_detached(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !must("losetup", &["--associated", path.to_str().unwrap()]).is_empty() {
        assert!(Instant::now() < deadline, "no loop device has the file, as after a reboot");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_in_a_file_is_made_mounted_again_and_never_made_over_data() {
    if mount().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pool.btrfs");
    let open = |options: &str| {
        let spec = format!("btrfs:{}{options}", path.display()).parse().unwrap();
        async move { drivers::open(&spec).await }
    };
    fs::write(&path, "precious").unwrap();
    let error = open(",size=256M").await.err().unwrap();
    assert!(matches!(&error.kind, ErrorKind::PoolUnusable(why) if why.contains("wipe")), "{error:?}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    drop(open(",size=256M,wipe").await.unwrap());
    fs::remove_file(&path).unwrap();
    assert!(open("").await.is_err(), "there is nothing, and no size");
    let driver = open(",size=256M").await.unwrap();
    let volume = record("db");
    driver.create(&volume).await.unwrap();
    assert!(matches!(open(",size=256M").await.err().unwrap().kind, ErrorKind::PoolBusy { .. }));
    drop(driver);
    assert_eq!(fs::read_dir(folder.path().join("pool.btrfs.mounted")).unwrap().count(), 0, "unmounted");
    wait_detached(&path);
    let driver = open(",size=256M,wipe").await.unwrap();
    assert_eq!(driver.scan().await.unwrap().volumes, [(volume, Vec::new())]);
    drop(driver);
    assert_eq!(open("").await.unwrap().scan().await.unwrap().volumes.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_in_a_file_whose_making_was_interrupted_is_made_anew() {
    if mount().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(".pool.btrfs.being-made"), noise(5 << 20)).unwrap();
    let spec = format!("btrfs:{}/pool.btrfs,size=256M", folder.path().display()).parse().unwrap();
    let driver = drivers::open(&spec).await.unwrap();
    assert!(driver.usage().await.unwrap().total_bytes == 256 << 20);
    drop(driver);
    let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["pool.btrfs", "pool.btrfs.mounted"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_that_do_not_fit_are_refused_in_words_and_leave_nothing() {
    let Some(mount) = mount() else { return };
    let folder = tempfile::tempdir_in(mount.path()).unwrap();
    let open = |place: &str| {
        let spec = format!("btrfs:{}", folder.path().join(place).display()).parse().unwrap();
        async move { why_unusable(drivers::open(&spec).await) }
    };
    for (place, words) in [
        ("pool,size=100M", "too few"),
        ("pool,size=0", "too few"),
        ("pool,size=3G", "no room"),
        ("pool,size=many", "is no size"),
        ("pool,size=", "is no size"),
        ("nowhere/pool,size=1G", "No such file"),
        (",size=1G", "it is a directory"),
        (",wipe", "it is a directory"),
    ] {
        let why = open(place).await;
        assert!(why.contains(words), "{place}: {why}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{place}");
    }
    fs::write(folder.path().join("pool"), "").unwrap();
    assert!(open("pool").await.contains("add ,size=20G"), "an empty file without a size");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_device_is_taken_when_it_is_empty_and_never_formatted_again() {
    if mount().is_none() {
        return;
    }
    let device = Device::new(300);
    assert!(device.refusal(",size=1G").await.contains("size of its own"));
    let driver = device.open("").await.unwrap();
    let volume = record("db");
    driver.create(&volume).await.unwrap();
    assert!(matches!(device.open("").await.err().unwrap().kind, ErrorKind::PoolBusy { .. }));
    drop(driver);
    for options in ["", ",wipe"] {
        let driver = device.open(options).await.unwrap();
        assert_eq!(driver.scan().await.unwrap().volumes, [(volume.clone(), Vec::new())], "{options}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_device_that_holds_something_is_refused_by_name_and_wiped_only_on_demand() {
    if mount().is_none() {
        return;
    }
    let partition_table = |device: &Device| {
        // One partition of a kind of its own, and the signature at the end of the first sector.
        let mut sector = vec![0; 512];
        sector[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        fs::write(&device.name, sector).unwrap();
    };
    let ext4 = |device: &Device| drop(must("mkfs.ext4", &["-q", "-F", "-L", "my data", &device.name]));
    let foreign_btrfs = |device: &Device| {
        must("mkfs.btrfs", &["-q", "-f", &device.name]);
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().to_str().unwrap();
        must("mount", &[&device.name, place]);
        fs::write(folder.path().join("photographs"), "precious").unwrap();
        must("umount", &[place]);
    };
    let nothing_known = |device: &Device| fs::write(&device.name, noise(5000)).unwrap();
    let cases: [(Fill, &str); 4] = [
        (ext4, "ext4 (label \"my data\")"),
        (partition_table, "a partition table (dos)"),
        (foreign_btrfs, "photographs"),
        (nothing_known, "no known kind"),
    ];
    for (fill, words) in cases {
        let device = Device::new(150);
        fill(&device);
        let before = device.contents();
        let why = device.refusal("").await;
        assert!(why.contains(words), "{words}: {why}");
        // To look into a btrfs it must be mounted, which writes.
        assert!(words == "photographs" || device.contents() == before, "{words}: it was written to");
        let driver = device.open(",wipe").await.unwrap();
        assert!(driver.scan().await.unwrap().volumes.is_empty(), "{words}");
        drop(driver);
        device.open("").await.unwrap();
    }
}

const WITHOUT: &str = "FLOCKER_TEST_WITHOUT_MKFS";

/// The process that misses a program. It is a test only so that the test binary can start itself.
#[tokio::test(flavor = "multi_thread")]
async fn child_without_mkfs() {
    let Ok(place) = std::env::var(WITHOUT) else { return };
    let spec = format!("btrfs:{place}/pool,size=256M").parse().unwrap();
    let why = why_unusable(drivers::open(&spec).await);
    assert!(why.contains("`mkfs.btrfs") && why.contains("install btrfs-progs"), "{why}");
    assert_eq!(fs::read_dir(place).unwrap().count(), 0);
}

#[test]
fn without_the_program_that_formats_a_pool_in_a_file_is_refused_in_words() {
    if mount().is_none() || !support::have("unshare", support::has_program("unshare")) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("place");
    let bin = folder.path().join("bin");
    fs::create_dir(&place).unwrap();
    fs::create_dir(&bin).unwrap();
    // In a mount namespace of its own: the same programs, but one.
    let script = "mount --bind /usr/sbin \"$1\" && mount -t tmpfs none /usr/sbin && ln -s \"$1\"/* /usr/sbin/ && \
        rm -f /usr/sbin/mkfs.btrfs && exec \"$2\" --exact pools::child_without_mkfs";
    let status = Command::new("unshare")
        // What other tests unmount meanwhile must not stay mounted here.
        .args(["--mount", "--propagation", "slave", "sh", "-c", script, "sh"])
        .arg(&bin)
        .arg(std::env::current_exe().unwrap())
        .env(WITHOUT, &place)
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}
