//! `kill -9` at every fault point of each driver: after a reopen the old or the new state, nothing half, no
//! space lost, and the verb can be done again.
//!
//! The test binary starts itself as the child that dies (see [`child`]). Ids are fixed, so that two pools built the same
//! way are in the same state, inode numbers and times apart.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use flocker_storage::{
    delta::{Compare, DeltaFormat, DeltaRequest, ReceiveRequest},
    driver::{Access, Driver, SnapshotRequest, Target},
    drivers::{btrfs, directory, zfs},
    model::{HeadState, HeldSnapshot, Host, HostId, Role, Snapshot, SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
};
use support::zfs_fuse::ZfsHost;
use uuid::Uuid;

/// How the folder of a place on btrfs is called, for the child to know the driver by.
const BTRFS_PLACE: &str = "btrfs-place-";

/// Opens a pool with the driver of its place.
async fn open(path: &Path) -> flocker_storage::error::Result<Arc<dyn Driver>> {
    if is_dataset(path) {
        return support::open_with(zfs::NAME, path).await;
    }
    let on_btrfs = path.components().any(|part| part.as_os_str().to_string_lossy().starts_with(BTRFS_PLACE));
    support::open_with(if on_btrfs { btrfs::NAME } else { directory::NAME }, path).await
}

/// The fault points that the scenario passes by the driver's own format; the others by the portable one.
const NATIVE_POINTS: [&str; 3] = ["zfs.receive.opened", "zfs.receive.landed", "zfs.receive.published"];

/// A place on ZFS is named by its dataset.
fn is_dataset(path: &Path) -> bool {
    path.is_relative()
}

/// Stands behind a fault point that is to be passed with more data than lies between two checkpoints.
const IN_BULK: &str = "+bulk";

fn takes_bulk(point: &str) -> bool {
    point.ends_with(".checkpoint") || point.ends_with(IN_BULK)
}

const SCENARIO: &str = "FLOCKER_TEST_SCENARIO";

fn volume_id(number: u128) -> VolumeId {
    VolumeId(Uuid::from_u128(0x0189_0000_0000_7000_8000_0000_0000_0000 + number))
}

fn snapshot_id(number: u128) -> SnapshotId {
    SnapshotId(Uuid::from_u128(0x0189_0000_0000_7000_8000_0001_0000_0000 + number))
}

fn key(volume: u128, snapshot: u128) -> SnapshotKey {
    SnapshotKey { volume: volume_id(volume), snapshot: snapshot_id(snapshot) }
}

fn record(number: u128, origin: Option<SnapshotKey>, role: Role) -> VolumeRecord {
    VolumeRecord {
        id: volume_id(number),
        name: format!("volume{number}").parse().unwrap(),
        metadata: BTreeMap::new(),
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        origin,
        role,
        epoch: 1,
        primary: None,
        quota_bytes: None,
    }
}

fn snapshot_record(number: u128, parents: &[u128]) -> Snapshot {
    Snapshot {
        id: snapshot_id(number),
        name: format!("snapshot{number}").parse().unwrap(),
        parents: parents.iter().map(|parent| snapshot_id(*parent)).collect(),
        host: Host { id: HostId([1; 32]), name: "host".parse().unwrap() },
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        metadata: BTreeMap::new(),
    }
}

async fn write(driver: &dyn Driver, volume: u128, files: &[(&str, &str)]) {
    let target = Target::Head(volume_id(volume));
    let head = driver.attach(target, Access::ReadWrite).await.unwrap();
    for (name, contents) in files {
        fs::create_dir_all(head.join(name).parent().unwrap()).unwrap();
        fs::write(head.join(name), contents).unwrap();
    }
    driver.detach(target).await.unwrap();
}

async fn take(driver: &dyn Driver, volume: u128, snapshot: u128, parents: &[u128]) -> HeldSnapshot {
    let snapshot = snapshot_record(snapshot, parents);
    let request = SnapshotRequest { volume: volume_id(volume), snapshot, compare: Compare::Metadata };
    driver.snapshot(&[request]).await.unwrap().remove(0).held
}

async fn send(from: &dyn Driver, to: &dyn Driver, base: Option<SnapshotKey>, target: &HeldSnapshot, volume: u128) {
    send_in(DeltaFormat::tree(), from, to, base, target, volume).await;
}

async fn send_in(
    format: DeltaFormat,
    from: &dyn Driver,
    to: &dyn Driver,
    base: Option<SnapshotKey>,
    target: &HeldSnapshot,
    volume: u128,
) {
    let compare = Compare::Metadata;
    let request = DeltaRequest { base, target: target.key(), format: format.clone(), compare, resume: None };
    let mut reader = from.read_delta(request).await.unwrap();
    let (volume, snapshot) = (record(volume, None, Role::Replica), target.snapshot.clone());
    let mut receiving = to.receive(ReceiveRequest { volume, snapshot, base, format, resume: None }).await.unwrap();
    while let Some(chunk) = reader.next().await.unwrap() {
        receiving.write(chunk).await.unwrap();
    }
    receiving.commit().await.unwrap();
}

/// Volume 1: snapshots 1 and 2 and a dirty head; volume 2: a clone of snapshot 2; volume 3: a clean head at snapshot 3;
/// volume 4: a replica of the sender's volume 4 at snapshot 41, with a clean head; volume 5: a replica without a head.
/// The sender: volume 4 with snapshots 41 and 42, and for one point volume 6 with more data than lies between two
/// checkpoints.
async fn build(place: &Path, point: &str) {
    let sender = open(&place.join("sender")).await.unwrap();
    sender.create(&record(4, None, Role::Primary)).await.unwrap();
    write(&*sender, 4, &[("a", "1"), ("b/c", "2")]).await;
    let first = take(&*sender, 4, 41, &[]).await;
    write(&*sender, 4, &[("a", "changed"), ("b/d", "new")]).await;
    take(&*sender, 4, 42, &[41]).await;
    if takes_bulk(point) {
        sender.create(&record(6, None, Role::Primary)).await.unwrap();
        let bulk: String = (0..9_000_000_u32).map(|n| format!("{n:08x}")).collect();
        write(&*sender, 6, &[("bulk", &bulk), ("after", "x")]).await;
        take(&*sender, 6, 61, &[]).await;
    }

    let pool = open(&place.join("pool")).await.unwrap();
    pool.create(&record(1, None, Role::Primary)).await.unwrap();
    write(&*pool, 1, &[("a", "1"), ("b/c", "2"), ("b/d/e", "3")]).await;
    take(&*pool, 1, 1, &[]).await;
    write(&*pool, 1, &[("a", "changed")]).await;
    take(&*pool, 1, 2, &[1]).await;
    write(&*pool, 1, &[("unsaved", "yes"), ("b/c", "dirty")]).await;
    (*pool).clone_from(&record(2, Some(key(1, 2)), Role::Primary)).await.unwrap();
    pool.create(&record(3, None, Role::Primary)).await.unwrap();
    write(&*pool, 3, &[("x/y", "z")]).await;
    take(&*pool, 3, 3, &[]).await;
    // On ZFS an increment can travel natively only where the first one did.
    let format = if is_dataset(place) { sender.capabilities().formats[0].clone() } else { DeltaFormat::tree() };
    send_in(format, &*sender, &*pool, None, &first, 4).await;
    write(&*pool, 4, &[]).await;
    let other = HeldSnapshot { snapshot: snapshot_record(41, &[]), ..first };
    send(&*sender, &*pool, None, &other, 5).await;
}

/// Does the verb that passes a fault point, whose second word names it.
async fn act(place: &Path, point: &str) {
    let pool = open(&place.join("pool")).await.unwrap();
    match point.split('.').nth(1).unwrap() {
        "create" => pool.create(&record(9, None, Role::Primary)).await.unwrap(),
        "set-record" => {
            pool.set_record(&VolumeRecord { epoch: 2, ..record(1, None, Role::Primary) }).await.unwrap();
        }
        "destroy" | "trash" => pool.destroy(volume_id(3)).await.unwrap(),
        "snapshot" => drop(take(&*pool, 1, 9, &[2]).await),
        "forget" => pool.forget(key(1, 1)).await.unwrap(),
        "materialise" => drop(pool.attach(Target::Head(volume_id(5)), Access::ReadWrite).await.unwrap()),
        "rewind" => pool.rewind(key(1, 2)).await.unwrap(),
        "clone" => (*pool).clone_from(&record(9, Some(key(1, 1)), Role::Primary)).await.unwrap(),
        "split" => pool.split(key(1, 1), &record(9, Some(key(1, 1)), Role::Primary)).await.unwrap(),
        "receive" if takes_bulk(point) => receive(place, &*pool, None, 61, 6).await,
        "receive" if NATIVE_POINTS.contains(&point) => {
            let sender = open(&place.join("sender")).await.unwrap();
            let lineage = sender.lineage(volume_id(4)).await.unwrap();
            let (target, base) = (lineage.find(snapshot_id(42)).unwrap(), Some(key(4, 41)));
            send_in(sender.capabilities().formats[0].clone(), &*sender, &*pool, base, target, 4).await;
        }
        "receive" => receive(place, &*pool, Some(key(4, 41)), 42, 4).await,
        other => panic!("no scenario passes {other}"),
    }
}

async fn receive(place: &Path, pool: &dyn Driver, base: Option<SnapshotKey>, snapshot: u128, volume: u128) {
    let sender = open(&place.join("sender")).await.unwrap();
    let lineage = sender.lineage(volume_id(volume)).await.unwrap();
    send(&*sender, pool, base, lineage.find(snapshot_id(snapshot)).unwrap(), volume).await;
}

/// What can be seen of a pool, times apart.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    volumes: Vec<(VolumeRecord, Vec<HeldSnapshot>)>,
    heads: BTreeMap<VolumeId, (HeadState, Tree)>,
    snapshots: BTreeMap<SnapshotKey, Tree>,
}

type Tree = BTreeMap<PathBuf, Option<Vec<u8>>>;

async fn see(place: &Path) -> Seen {
    let pool = open(&place.join("pool")).await.unwrap();
    let scan = pool.scan().await.unwrap();
    assert_eq!(scan.orphans, []);
    let (mut heads, mut snapshots) = (BTreeMap::new(), BTreeMap::new());
    for (record, held) in &scan.volumes {
        let state = pool.head_state(record.id).await.unwrap();
        let target = Target::Head(record.id);
        heads.insert(record.id, (state, read_tree(&pool.attach(target, Access::ReadOnly).await.unwrap())));
        for held in held {
            assert_eq!(pool.verify(held.key(), Compare::Contents).await.unwrap(), [], "{:?}", held.key());
            let target = Target::Snapshot(held.volume, held.snapshot.id);
            snapshots.insert(held.key(), read_tree(&pool.attach(target, Access::ReadOnly).await.unwrap()));
        }
    }
    Seen { volumes: scan.volumes, heads, snapshots }
}

fn read_tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let is_dir = path.is_dir();
        if is_dir {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let contents = (!is_dir).then(|| fs::read(&path).unwrap());
        tree.insert(path.strip_prefix(root).unwrap().to_owned(), contents);
    }
    tree
}

/// Lists what a pool takes in the file system, once every head is there. A receive that can go on is kept on purpose.
async fn space(place: &Path) -> Vec<PathBuf> {
    let path = place.join("pool");
    let pool = open(&path).await.unwrap();
    for (record, _) in pool.scan().await.unwrap().volumes {
        pool.attach(Target::Head(record.id), Access::ReadWrite).await.unwrap();
        pool.discard_partial(record.id).await.unwrap();
    }
    drop(pool);
    drop(open(&path).await.unwrap());
    if is_dataset(&path) {
        return datasets(&path);
    }
    let mut names: Vec<_> = read_tree(&path).into_keys().collect();
    for name in names.iter_mut().filter(|name| name.components().any(|part| part.as_os_str() == "baselines")) {
        // The name of a baseline holds an inode number and a time.
        name.set_extension("").then_some(()).unwrap();
        name.set_extension("");
        let stem = name.to_string_lossy().split('.').next().unwrap().to_owned();
        *name = stem.into();
    }
    names.sort();
    names
}

/// Lists the datasets and snapshots of a pool, and the properties that were set on them.
fn datasets(pool: &Path) -> Vec<PathBuf> {
    let run = |words: &[&str]| {
        let output = Command::new("zfs").args(words).arg(pool).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        // Cases differ in the name of the pool, and in when what was asked for was no longer wanted.
        text.lines().map(|line| PathBuf::from(line.replace(pool.to_str().unwrap(), "POOL"))).collect::<Vec<_>>()
    };
    let names = run(&["list", "-H", "-r", "-t", "all", "-o", "name"]);
    let properties = run(&["get", "-H", "-r", "-s", "local", "-o", "name,property", "all"]);
    let properties = properties.into_iter().filter(|line| !line.to_string_lossy().ends_with("org.flocker:pending"));
    names.into_iter().chain(properties).collect()
}

/// The process that dies. It is a test only so that the test binary can start itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    if let Ok(point) = std::env::var(SCENARIO) {
        act(Path::new(&std::env::var("FLOCKER_TEST_PLACE").unwrap()), &point).await;
    }
}

fn kill_at(place: &Path, point: &str, pass: u32) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).stdout(Stdio::null()).stderr(Stdio::piped());
    let fault = format!("{}:{pass}", point.trim_end_matches(IN_BULK));
    command.env(SCENARIO, point).env("FLOCKER_TEST_PLACE", place).env("FLOCKER_FAULT", fault);
    // To the end of the child, not of its standard error: a program that it started may live on with that.
    let mut child = command.spawn().unwrap();
    let mut said = child.stderr.take().unwrap();
    let said = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = said.read_to_end(&mut text);
        text
    });
    let status = child.wait().unwrap();
    match status.signal() {
        Some(9) => true,
        None if status.success() => false,
        _ => {
            let said = said.join().unwrap();
            panic!("{point}:{pass}: the child ended with {status}: {}", String::from_utf8_lossy(&said))
        }
    }
}

/// Where places are made.
#[derive(Clone, Copy)]
enum Ground<'a> {
    Temporary,
    Btrfs(&'a Path),
    Zfs(&'a Arc<ZfsHost>),
}

/// A place; what it holds goes with the value.
enum Place {
    Folder(tempfile::TempDir),
    Dataset(Arc<ZfsHost>, PathBuf),
    /// In a pool that is put back before it is used again.
    Kept(PathBuf),
}

impl Place {
    fn path(&self) -> &Path {
        match self {
            Self::Folder(folder) => folder.path(),
            Self::Dataset(_, dataset) | Self::Kept(dataset) => dataset,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Self::Dataset(host, dataset) = self
            && !std::thread::panicking()
        {
            host.destroy(dataset.to_str().unwrap());
        }
    }
}

/// Builds a place once; copies of it would have other inodes, which counts as tampering.
async fn built(point: &str, ground: Ground<'_>) -> Place {
    let place = match ground {
        Ground::Temporary => Place::Folder(tempfile::tempdir().unwrap()),
        Ground::Btrfs(mount) => Place::Folder(tempfile::Builder::new().prefix(BTRFS_PLACE).tempdir_in(mount).unwrap()),
        Ground::Zfs(host) => {
            let dataset = host.dataset(&format!("x{}", Uuid::now_v7().simple()));
            Place::Dataset(Arc::clone(host), dataset.into())
        }
    };
    build(place.path(), point).await;
    place
}

/// The same, and what is seen of it. A pool of zfs-fuse, of which each step is a program, is built once and then put back: that keeps
/// the numbers of inodes, too.
async fn seen_and_built(point: &str, ground: Ground<'_>, kept: &mut Option<(PathBuf, Seen)>) -> (Place, Seen) {
    match (ground, &*kept) {
        (Ground::Zfs(host), Some((dataset, seen))) => {
            host.put_back();
            (Place::Kept(dataset.clone()), seen.clone())
        }
        (Ground::Zfs(host), None) if host.is_fuse() => {
            assert!(!takes_bulk(point), "one state for all points");
            let place = built(point, ground).await;
            let seen = see(place.path()).await;
            host.keep();
            *kept = Some((place.path().to_owned(), seen.clone()));
            (place, seen)
        }
        _ => {
            let place = built(point, ground).await;
            let seen = see(place.path()).await;
            (place, seen)
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_at_any_fault_point_the_pool_is_in_the_old_or_the_new_state() {
    die_at_each(directory::FAULT_POINTS, Ground::Temporary).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_at_any_fault_point_a_btrfs_pool_is_in_the_old_or_the_new_state() {
    let Some(mount) = support::LoopMount::try_new("btrfs", 4 << 30, &["-q"]) else { return };
    die_at_each(btrfs::FAULT_POINTS, Ground::Btrfs(mount.path())).await;
}

/// Opening a pool of ZFS takes long: the points are shared out among tests that run side by side.
const ZFS_SHARES: usize = 3;

async fn die_at_each_of_zfs(test: &str, share: usize) {
    let Some(host) = ZfsHost::enter(test) else { return };
    let all: &'static [&'static str] = zfs::FAULT_POINTS;
    // In the emulated machine every command takes ten times as long: there, the verbs of several steps only.
    let is_long = |point: &&&str| point.starts_with("zfs.split.") || point.starts_with("zfs.receive.");
    let wanted = std::env::var("POINT").unwrap_or_default();
    let points = all.iter().filter(|point| host.is_fuse() || is_long(point)).filter(|point| point.contains(&wanted));
    let points = points.skip(share).step_by(ZFS_SHARES).copied().collect::<Vec<_>>().leak();
    die_at_each(points, Ground::Zfs(&host)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_at_any_fault_point_a_zfs_pool_is_in_the_old_or_the_new_state_1_of_3() {
    die_at_each_of_zfs("after_a_kill_at_any_fault_point_a_zfs_pool_is_in_the_old_or_the_new_state_1_of_3", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_at_any_fault_point_a_zfs_pool_is_in_the_old_or_the_new_state_2_of_3() {
    die_at_each_of_zfs("after_a_kill_at_any_fault_point_a_zfs_pool_is_in_the_old_or_the_new_state_2_of_3", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_at_any_fault_point_a_zfs_pool_is_in_the_old_or_the_new_state_3_of_3() {
    die_at_each_of_zfs("after_a_kill_at_any_fault_point_a_zfs_pool_is_in_the_old_or_the_new_state_3_of_3", 2).await;
}

async fn die_at_each(points: &'static [&'static str], ground: Ground<'_>) {
    let mut news: BTreeMap<&str, (Seen, Vec<PathBuf>)> = BTreeMap::new();
    let mut kept = None;
    for point in points {
        let verb = if point.ends_with(".checkpoint") { point } else { point.split('.').nth(1).unwrap() };
        if !news.contains_key(verb) {
            let (place, _) = seen_and_built(point, ground, &mut kept).await;
            act(place.path(), point).await;
            let seen = see(place.path()).await;
            news.insert(verb, (seen, space(place.path()).await));
        }
        let (new, new_space) = &news[verb];
        let mut passes = 0;
        for pass in 1.. {
            let (place, old) = seen_and_built(point, ground, &mut kept).await;
            if !kill_at(place.path(), point, pass) {
                break;
            }
            passes += 1;
            let seen = see(place.path()).await;
            assert!(seen == old || seen == *new, "{point}:{pass}: half a state\n{seen:#?}\nold {old:#?}\nnew {new:#?}");
            if seen == old && seen != *new {
                act(place.path(), point).await;
                assert_eq!(see(place.path()).await, *new, "{point}:{pass}: done again");
            }
            assert_eq!(space(place.path()).await, *new_space, "{point}:{pass}: space is lost");
        }
        assert!(passes > 0, "nothing passes the fault point {point}");
        eprintln!("{point}: {passes} passes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receive_that_was_killed_goes_on_from_its_last_checkpoint() {
    for point in ["directory.receive.checkpoint", "directory.receive.before-publish+bulk"] {
        goes_on_from_its_last_checkpoint(point, Ground::Temporary).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portable_receive_on_btrfs_that_was_killed_goes_on_from_its_last_checkpoint() {
    let Some(mount) = support::LoopMount::try_new("btrfs", 2 << 30, &["-q"]) else { return };
    for point in ["btrfs.receive.checkpoint", "btrfs.receive.before-publish+bulk"] {
        goes_on_from_its_last_checkpoint(point, Ground::Btrfs(mount.path())).await;
    }
}

async fn goes_on_from_its_last_checkpoint(point: &str, ground: Ground<'_>) {
    let place = built(point, ground).await;
    assert!(kill_at(place.path(), point, 1));
    let pool = open(&place.path().join("pool")).await.unwrap();
    let sender = open(&place.path().join("sender")).await.unwrap();
    let partial = pool.partial(volume_id(6)).await.unwrap().expect("a checkpoint was kept");
    assert!(pool.lineage(volume_id(6)).await.is_err(), "nothing is visible");
    let held = sender.lineage(volume_id(6)).await.unwrap().snapshots.remove(0);
    assert_eq!((&partial.snapshot, partial.base), (&held.snapshot, None));
    let (format, resume) = (partial.format, Some(partial.point));
    let request = DeltaRequest {
        base: None,
        target: held.key(),
        format: format.clone(),
        compare: Compare::Metadata,
        resume: resume.clone(),
    };
    let (volume, snapshot) = (record(6, None, Role::Replica), held.snapshot.clone());
    let mut receiving = pool.receive(ReceiveRequest { volume, snapshot, base: None, format, resume }).await.unwrap();
    let (mut reader, mut bytes) = (sender.read_delta(request).await.unwrap(), 0);
    while let Some(chunk) = reader.next().await.unwrap() {
        bytes += chunk.len() as u64;
        receiving.write(chunk).await.unwrap();
    }
    assert_eq!(receiving.commit().await.unwrap(), held);
    // 72,000,000 bytes have a checkpoint at 32 and one at 64 MiB; the first of them is the fault point.
    let most = if point.ends_with(".checkpoint") { 40_000_000 } else { 6_000_000 };
    assert!(bytes < most, "{bytes} bytes came again");
    let target = Target::Snapshot(held.volume, held.snapshot.id);
    let here = read_tree(&pool.attach(target, Access::ReadOnly).await.unwrap());
    assert!(here == read_tree(&sender.attach(target, Access::ReadOnly).await.unwrap()), "the trees differ");
    assert_eq!(pool.partial(held.volume).await.unwrap(), None);
}
