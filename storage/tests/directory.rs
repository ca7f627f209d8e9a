//! What only the directory driver promises: hard links to the previous snapshot, tampering noticed, full disks, pools
//! that cannot be one.
#![allow(clippy::unwrap_used)]

mod support;
#[path = "directory/tampering.rs"]
mod tampering;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        fs::{FileExt, MetadataExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use flocker_storage::{
    delta::{Compare, DeltaFormat, DeltaRequest, ReceiveRequest, Receiving},
    driver::{Access, Driver, SnapshotReport, SnapshotRequest, Target},
    error::{Error, ErrorKind},
    model::{HeadState, HeldSnapshot, Host, HostId, Role, Snapshot, SnapshotId, VolumeId, VolumeRecord},
};
use support::LoopMount;
use tampering::{rot, set_attribute};

fn record(name: &str) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::mint(),
        name: name.parse().unwrap(),
        metadata: BTreeMap::new(),
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        origin: None,
        role: Role::Primary,
        epoch: 1,
        primary: None,
        quota_bytes: None,
    }
}

async fn try_take(driver: &dyn Driver, volume: VolumeId) -> Result<SnapshotReport, Error> {
    let parents = driver.lineage(volume).await.unwrap().tip().map(|tip| tip.snapshot.id).into_iter().collect();
    let snapshot = Snapshot {
        id: SnapshotId::mint(),
        name: "s".parse().unwrap(),
        parents,
        host: Host { id: HostId([1; 32]), name: "host".parse().unwrap() },
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        metadata: BTreeMap::new(),
    };
    let request = SnapshotRequest { volume, snapshot, compare: Compare::Metadata };
    Ok(driver.snapshot(&[request]).await?.remove(0))
}

async fn take(driver: &dyn Driver, volume: VolumeId) -> HeldSnapshot {
    try_take(driver, volume).await.unwrap().held
}

fn tree(pool: &Path, held: &HeldSnapshot) -> PathBuf {
    pool.join(format!("volumes/{}/snapshots/{}/tree", held.volume, held.snapshot.id))
}

/// Opens a pool with one volume and hands out its head.
async fn volume_in(pool: &Path) -> (Arc<dyn Driver>, VolumeRecord, PathBuf) {
    let driver = support::open(pool).await.unwrap();
    let record = record("db");
    driver.create(&record).await.unwrap();
    let head = driver.attach(Target::Head(record.id), Access::ReadWrite).await.unwrap();
    (driver, record, head)
}

/// Reads a whole delta and returns its length.
async fn delta_bytes(
    driver: &dyn Driver,
    base: impl Into<Option<&HeldSnapshot>>,
    target: &HeldSnapshot,
) -> Result<usize, Error> {
    let request = DeltaRequest {
        base: base.into().map(HeldSnapshot::key),
        target: target.key(),
        format: DeltaFormat::tree(),
        compare: Compare::Metadata,
        resume: None,
    };
    let mut reader = driver.read_delta(request).await?;
    let mut bytes = 0;
    while let Some(chunk) = reader.next().await? {
        bytes += chunk.len();
    }
    Ok(bytes)
}

/// Sends a delta from one pool to another, all but the commit.
async fn arriving(
    sender: &dyn Driver,
    receiver: &dyn Driver,
    volume: &VolumeRecord,
    base: Option<&HeldSnapshot>,
    target: &HeldSnapshot,
) -> Box<dyn Receiving> {
    let (base, format, compare) = (base.map(HeldSnapshot::key), DeltaFormat::tree(), Compare::Metadata);
    let (volume, snapshot) = (VolumeRecord { role: Role::Replica, ..volume.clone() }, target.snapshot.clone());
    let request = ReceiveRequest { volume, snapshot, base, format: format.clone(), resume: None };
    let mut receiving = receiver.receive(request).await.unwrap();
    let request = DeltaRequest { base, target: target.key(), format, compare, resume: None };
    let mut delta = sender.read_delta(request).await.unwrap();
    while let Some(chunk) = delta.next().await.unwrap() {
        receiving.write(chunk).await.unwrap();
    }
    receiving
}

fn inodes(tree: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![tree.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let (path, stat) = entry.map(|entry| (entry.path(), entry.metadata().unwrap())).unwrap();
            match stat.is_dir() {
                true => waiting.push(path),
                false => drop(found.insert(path.strip_prefix(tree).unwrap().to_owned(), stat.ino())),
            }
        }
    }
    found
}

#[tokio::test]
async fn a_snapshot_of_100_000_files_copies_the_ten_that_changed() {
    // In memory where there is such a place: a disk that discards each freed block needs minutes to delete the files.
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let (driver, volume, head) = volume_in(place.path()).await;
    for dir in 0..100 {
        fs::create_dir(head.join(format!("{dir}"))).unwrap();
        for file in 0..1000 {
            fs::write(head.join(format!("{dir}/{file}")), format!("{dir} {file}")).unwrap();
        }
    }
    let one = take(&*driver, volume.id).await;
    for file in 0..10 {
        fs::write(head.join(format!("{}/{}", file * 7, file * 99)), "changed").unwrap();
    }
    let two = take(&*driver, volume.id).await;
    let (first, second) = (inodes(&tree(place.path(), &one)), inodes(&tree(place.path(), &two)));
    assert_eq!((first.len(), second.len()), (100_000, 100_000));
    let copied = first.iter().filter(|(path, inode)| second[*path] != **inode).count();
    assert_eq!(copied, 10);
    let bytes = delta_bytes(&*driver, &one, &two).await.unwrap();
    assert!(bytes < 10_000, "the delta has {bytes} bytes");
}

#[tokio::test]
async fn a_hard_link_group_is_told_apart_from_sharing_with_the_previous_snapshot() {
    let place = tempfile::tempdir().unwrap();
    let (driver, volume, head) = volume_in(place.path()).await;
    fs::write(head.join("a"), "same").unwrap();
    fs::hard_link(head.join("a"), head.join("b")).unwrap();
    fs::write(head.join("c"), "same").unwrap();
    let one = take(&*driver, volume.id).await;
    // The group is broken up, with equal contents: the new snapshot must not join the two again.
    let stamp = fs::metadata(head.join("b")).unwrap().modified().unwrap();
    fs::remove_file(head.join("b")).unwrap();
    fs::write(head.join("b"), "same").unwrap();
    fs::File::options().write(true).open(head.join("b")).unwrap().set_modified(stamp).unwrap();
    let two = take(&*driver, volume.id).await;
    let (first, second) = (inodes(&tree(place.path(), &one)), inodes(&tree(place.path(), &two)));
    let at = |tree: &BTreeMap<PathBuf, u64>, name: &str| tree[Path::new(name)];
    assert_eq!(at(&first, "a"), at(&first, "b"));
    assert_ne!(at(&first, "a"), at(&first, "c"));
    assert_ne!(at(&second, "a"), at(&second, "b"));
    assert_eq!(at(&second, "c"), at(&first, "c"), "unchanged");
    assert_eq!(driver.verify(two.key(), Compare::Contents).await.unwrap(), []);
}

#[tokio::test]
async fn a_head_shares_no_inode_with_a_snapshot() {
    let place = tempfile::tempdir().unwrap();
    let (driver, volume, head) = volume_in(place.path()).await;
    fs::write(head.join("a"), "1").unwrap();
    let held = take(&*driver, volume.id).await;
    driver.detach(Target::Head(volume.id)).await.unwrap();
    driver.rewind(held.key()).await.unwrap();
    let clone = VolumeRecord { origin: Some(held.key()), ..record("clone") };
    (*driver).clone_from(&clone).await.unwrap();
    let kept = inodes(&tree(place.path(), &held))[Path::new("a")];
    for volume in [volume.id, clone.id] {
        let head = driver.attach(Target::Head(volume), Access::ReadWrite).await.unwrap();
        assert_ne!(fs::metadata(head.join("a")).unwrap().ino(), kept);
        assert_eq!(fs::metadata(head.join("a")).unwrap().nlink(), 1);
    }
}

#[tokio::test]
async fn what_arrived_is_not_read_again_for_its_inventory() {
    let (place, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (sender, volume, head) = volume_in(place.path()).await;
    fs::write(head.join("large"), vec![7; 20 << 20]).unwrap();
    fs::write(head.join("no-bytes"), "").unwrap();
    let one = take(&*sender, volume.id).await;
    fs::write(head.join("large"), vec![8; 20 << 20]).unwrap();
    fs::write(head.join("new"), vec![9; 20 << 20]).unwrap();
    let two = take(&*sender, volume.id).await;
    let receiver = support::open(other.path()).await.unwrap();
    let mut base = None;
    for target in [&one, &two] {
        let receiving = arriving(&*sender, &*receiver, &volume, base, target).await;
        let before = read_so_far();
        assert_eq!(receiving.commit().await.unwrap(), *target);
        let read = read_so_far() - before;
        assert!(read < 1 << 20, "{read} bytes were read to commit");
        assert_eq!(receiver.verify(target.key(), Compare::Contents).await.unwrap(), []);
        base = Some(target);
    }
    rot(&tree(other.path(), &two).join("new"));
    assert_eq!(receiver.verify(two.key(), Compare::Contents).await.unwrap().len(), 1, "its digest was kept");
}

#[tokio::test]
async fn groups_that_form_and_part_among_unchanged_files_arrive_and_can_be_passed_on() {
    let places = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let (sender, volume, head) = volume_in(places[0].path()).await;
    for name in ["alone", "first", "joined", "z-parted"] {
        fs::write(head.join(name), name).unwrap();
    }
    fs::hard_link(head.join("first"), head.join("second")).unwrap();
    fs::hard_link(head.join("first"), head.join("third")).unwrap();
    fs::hard_link(head.join("z-parted"), head.join("a-parted")).unwrap();
    let one = take(&*sender, volume.id).await;
    fs::hard_link(head.join("joined"), head.join("a-joined")).unwrap();
    fs::hard_link(head.join("alone"), head.join("z-alone")).unwrap();
    fs::remove_file(head.join("first")).unwrap();
    fs::remove_file(head.join("a-parted")).unwrap();
    let two = take(&*sender, volume.id).await;
    let three = take(&*sender, volume.id).await;

    let receiver = support::open(places[1].path()).await.unwrap();
    for (base, target) in [(None, &one), (Some(&one), &two), (Some(&two), &three)] {
        let receiving = arriving(&*sender, &*receiver, &volume, base, target).await;
        assert_eq!(receiving.commit().await.unwrap(), *target);
        assert_eq!(receiver.verify(target.key(), Compare::Contents).await.unwrap(), []);
    }
    let last = support::open(places[2].path()).await.unwrap();
    arriving(&*receiver, &*last, &volume, None, &three).await.commit().await.unwrap();

    let wanted = [("a-joined", "joined"), ("alone", "z-alone"), ("second", "third"), ("z-parted", "z-parted")];
    let found = inodes(&tree(places[2].path(), &three));
    let names: Vec<_> = found.keys().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(names, ["a-joined", "alone", "joined", "second", "third", "z-alone", "z-parted"]);
    for (one, other) in wanted {
        assert_eq!(found[Path::new(one)], found[Path::new(other)], "{one} and {other}");
    }
    assert_eq!(found.values().collect::<std::collections::BTreeSet<_>>().len(), 4, "{found:?}");
}

#[tokio::test]
async fn a_base_that_was_changed_is_refused_and_leaves_the_receiver_as_it_was() {
    let (place, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (sender, volume, head) = volume_in(place.path()).await;
    fs::write(head.join("a"), "1").unwrap();
    fs::write(head.join("z"), "1").unwrap();
    let one = take(&*sender, volume.id).await;
    fs::write(head.join("b"), "2").unwrap();
    let two = take(&*sender, volume.id).await;
    let receiver = support::open(other.path()).await.unwrap();
    arriving(&*sender, &*receiver, &volume, None, &one).await.commit().await.unwrap();
    set_attribute(&tree(other.path(), &one).join("z")).unwrap();
    let (snapshot, base, format) = (two.snapshot.clone(), Some(one.key()), DeltaFormat::tree());
    let request = ReceiveRequest { volume: volume.clone(), snapshot, base, format, resume: None };
    let refused = receiver.receive(request).await.err().unwrap();
    assert!(matches!(refused.kind, ErrorKind::Tampered { ref path, .. } if path == Path::new("z")), "{refused:?}");
    assert_eq!(receiver.lineage(volume.id).await.unwrap().snapshots.len(), 1);
    drop(receiver);
    assert_eq!(fs::read_dir(other.path().join("staging")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_damaged_record_makes_an_orphan_and_the_rest_goes_on() {
    let place = tempfile::tempdir().unwrap();
    let (driver, volume, head) = volume_in(place.path()).await;
    fs::write(head.join("a"), "1").unwrap();
    let one = take(&*driver, volume.id).await;
    let two = take(&*driver, volume.id).await;
    let other = record("other");
    driver.create(&other).await.unwrap();
    drop(driver);
    let snapshot = tree(place.path(), &two).with_file_name("snapshot.json");
    fs::write(&snapshot, &fs::read(&snapshot).unwrap()[..100]).unwrap();
    fs::remove_file(place.path().join(format!("volumes/{}/volume.json", other.id))).unwrap();
    fs::write(place.path().join("notes.txt"), "mine").unwrap();
    let driver = support::open(place.path()).await.unwrap();
    let scan = driver.scan().await.unwrap();
    assert_eq!(scan.volumes, [(volume.clone(), vec![one])]);
    assert_eq!(scan.orphans.len(), 3, "{:?}", scan.orphans);
    drop(driver);
    assert!(tree(place.path(), &two).exists() && place.path().join("notes.txt").exists());
    assert_eq!(support::open(place.path()).await.unwrap().scan().await.unwrap().orphans, scan.orphans);
}

#[tokio::test]
async fn sockets_are_left_out_with_a_warning() {
    let place = tempfile::tempdir().unwrap();
    let (driver, volume, head) = volume_in(place.path()).await;
    let _socket = UnixListener::bind(head.join("socket")).unwrap();
    let report = try_take(&*driver, volume.id).await.unwrap();
    assert_eq!(report.warnings.len(), 1);
    assert!(report.warnings[0].path == "socket" && report.warnings[0].what.contains("socket"));
    assert_eq!(driver.head_state(volume.id).await.unwrap(), HeadState::Clean);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_written_to_all_the_time_is_right_once_it_holds_still() {
    let place = tempfile::tempdir().unwrap();
    let (driver, volume, head) = volume_in(place.path()).await;
    fs::write(head.join("busy"), vec![0; 4_000_000]).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (stop, file) = (Arc::clone(&stop), fs::File::options().write(true).open(head.join("busy")).unwrap());
        move || {
            for round in 0_u64.. {
                file.write_all_at(&round.to_le_bytes(), round * 8 % 4_000_000).unwrap();
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        }
    });
    for _ in 0..3 {
        take(&*driver, volume.id).await;
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    let last = take(&*driver, volume.id).await;
    assert_eq!(fs::read(tree(place.path(), &last).join("busy")).unwrap(), fs::read(head.join("busy")).unwrap());
    assert_eq!(driver.verify(last.key(), Compare::Contents).await.unwrap(), []);
}

#[tokio::test]
async fn a_place_that_cannot_be_a_pool_is_refused_and_left_as_it_is() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("file");
    fs::write(&file, "x").unwrap();
    let full = place.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("thesis.tex"), "x").unwrap();
    let newer = place.path().join("newer");
    drop(support::open(&newer).await.unwrap());
    let text = fs::read_to_string(newer.join("flocker-pool.json")).unwrap();
    fs::write(newer.join("flocker-pool.json"), text.replacen("\"format\":1", "\"format\":2", 1)).unwrap();
    let damaged = place.path().join("damaged");
    drop(support::open(&damaged).await.unwrap());
    fs::write(damaged.join("flocker-pool.json"), "").unwrap();
    for (path, words) in [
        (file.clone(), "not a directory"),
        (file.join("below"), "not a directory"),
        (full.clone(), "thesis.tex"),
        (newer, "newer flocker"),
        (damaged, "damaged"),
    ] {
        let error = support::open(&path).await.err().unwrap();
        let text = error.kind.to_string();
        assert!(matches!(error.kind, ErrorKind::PoolUnusable(_)) && text.contains(words), "{path:?}: {text}");
    }
    assert_eq!(fs::read_dir(&full).unwrap().count(), 1, "nothing was made");
    // A place where setting up was interrupted, and a fresh file system, are as good as empty.
    let fresh = place.path().join("fresh");
    fs::create_dir_all(fresh.join("lost+found")).unwrap();
    fs::create_dir(fresh.join("volumes")).unwrap();
    fs::write(fresh.join("lock"), "").unwrap();
    support::open(&fresh).await.unwrap();
    support::open(&place.path().join("not/there/yet")).await.unwrap();
}

#[tokio::test]
async fn a_pool_is_closed_to_others() {
    let place = tempfile::tempdir().unwrap();
    let pool = place.path().join("pool");
    let (driver, volume, _) = volume_in(&pool).await;
    take(&*driver, volume.id).await;
    for path in [pool.clone(), pool.join("volumes"), pool.join("staging"), pool.join("trash")] {
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700, "{path:?}");
    }
}

#[tokio::test]
async fn a_pool_where_the_user_may_not_write_is_refused_in_words() {
    let is_able = support::is_root() && support::has_program("setpriv");
    if let Ok(pool) = std::env::var("FLOCKER_TEST_FORBIDDEN") {
        let error = support::open(Path::new(&pool)).await.err().unwrap();
        assert!(error.kind.to_string().contains("may not write"), "{}", error.kind);
        return;
    }
    if !support::have("root", is_able) {
        return;
    }
    let folder = support::open_folder();
    let binary = folder.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
    let (empty, used) = (folder.path().join("empty"), folder.path().join("used"));
    fs::create_dir(&empty).unwrap();
    drop(support::open(&used).await.unwrap());
    for pool in [empty, used, folder.path().join("empty/below")] {
        let name = "a_pool_where_the_user_may_not_write_is_refused_in_words";
        let mut child = support::as_nobody(&binary);
        let output = child.args(["--exact", name]).env("FLOCKER_TEST_FORBIDDEN", &pool).output().unwrap();
        assert!(output.status.success(), "{pool:?}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[tokio::test]
async fn a_full_disk_changes_nothing_and_gives_the_space_back() {
    let Some(mount) = LoopMount::try_new("ext4", 96 << 20, &["-q", "-m", "0"]) else { return };
    let pool = mount.path().join("pool");
    let (driver, volume, head) = volume_in(&pool).await;
    fs::write(head.join("small"), "1").unwrap();
    let one = take(&*driver, volume.id).await;
    fs::write(head.join("large"), vec![0x5a; 50 << 20]).unwrap();
    let is_full = |what: &str, error: Error| {
        assert!(matches!(error.kind, ErrorKind::NoSpace), "{what}: {error}: {:?}", error.kind);
    };
    let before = driver.usage().await.unwrap().available_bytes;
    is_full("snapshot", try_take(&*driver, volume.id).await.unwrap_err());
    assert_eq!(driver.lineage(volume.id).await.unwrap().snapshots, std::slice::from_ref(&one));

    // Another pool with more room sends what does not fit.
    let elsewhere = tempfile::tempdir().unwrap();
    let (sender, source, far_head) = volume_in(elsewhere.path()).await;
    fs::write(far_head.join("large"), vec![0xa5; 80 << 20]).unwrap();
    let big = take(&*sender, source.id).await;
    let format = DeltaFormat::tree();
    let (target, compare) = (big.key(), Compare::Metadata);
    let request = DeltaRequest { base: None, target, format: format.clone(), compare, resume: None };
    let mut reader = sender.read_delta(request).await.unwrap();
    let incoming =
        ReceiveRequest { volume: source.clone(), snapshot: big.snapshot.clone(), base: None, format, resume: None };
    let mut receiving = driver.receive(incoming).await.unwrap();
    let failed = loop {
        match reader.next().await.unwrap() {
            None => break receiving.commit().await.err(),
            Some(chunk) => {
                if let Err(error) = receiving.write(chunk).await {
                    drop(receiving);
                    break Some(error);
                }
            }
        }
    };
    is_full("receive", failed.expect("80 MiB do not fit"));
    drop(driver);

    let driver = support::open(&pool).await.unwrap();
    assert_eq!(driver.scan().await.unwrap().volumes, [(volume.clone(), vec![one.clone()])]);
    let after = driver.usage().await.unwrap().available_bytes;
    assert!(after + (1 << 20) >= before, "{before} bytes were free, now {after}");
    assert!(head.join("large").exists(), "the head is untouched");

    // Clone and rewind need room for a head: they fail before anything changes.
    fs::remove_file(head.join("large")).unwrap();
    fs::write(head.join("third"), vec![0x11; 35 << 20]).unwrap();
    let two = take(&*driver, volume.id).await;
    let clone = VolumeRecord { origin: Some(two.key()), ..record("clone") };
    is_full("clone", (*driver).clone_from(&clone).await.unwrap_err());
    fs::write(head.join("small"), "dirty").unwrap();
    is_full("rewind", driver.rewind(two.key()).await.unwrap_err());
    assert_eq!(fs::read_to_string(head.join("small")).unwrap(), "dirty");
    assert_eq!(driver.scan().await.unwrap().volumes, [(volume, vec![one, two])]);
}

/// Bytes that this process has read by system calls (proc_pid_io(5)).
fn read_so_far() -> u64 {
    let table = fs::read_to_string("/proc/self/io").unwrap();
    table.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[tokio::test]
async fn extents_that_both_snapshots_share_are_not_read_for_the_delta() {
    for kind in ["xfs", "btrfs"] {
        let Some(mount) = LoopMount::try_new(kind, 1 << 30, &["-q"]) else { continue };
        let (driver, volume, head) = volume_in(&mount.path().join("pool")).await;
        // Bytes that no file system compresses: a place must say which bytes lie there.
        let mut bytes = vec![0; 100 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        fs::write(head.join("large"), &bytes).unwrap();
        let one = take(&*driver, volume.id).await;
        let file = fs::File::options().write(true).open(head.join("large")).unwrap();
        for place in [0, 50 << 20, (100 << 20) - 4096] {
            file.write_all_at(&[7; 4096], place).unwrap();
        }
        drop(file);
        let two = take(&*driver, volume.id).await;
        let before = read_so_far();
        let delta = delta_bytes(&*driver, &one, &two).await.unwrap();
        let read = read_so_far() - before;
        assert!((3 * 4096..20_000).contains(&delta), "{kind}: the delta has {delta} bytes");
        assert!(read < 20 << 20, "{kind}: {read} bytes were read of two versions of 100 MiB");
    }
}
