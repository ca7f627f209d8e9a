//! What only the btrfs driver promises: the traps of send and receive closed, nested subvolumes refused, pools in files.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
};

use bytes::Bytes;
use flocker_storage::{
    delta::{Compare, DeltaFormat, DeltaRequest, ReceiveRequest},
    driver::{Access, Driver, SnapshotRequest, Target},
    drivers,
    error::{Error, ErrorKind},
    model::{HeldSnapshot, Host, HostId, Role, Snapshot, SnapshotId, VolumeId, VolumeRecord},
    tree::listing,
};
use support::LoopMount;

fn mount() -> Option<LoopMount> {
    LoopMount::try_new("btrfs", 2 << 30, &["-q"])
}

fn record(name: &str) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::mint(),
        name: name.parse().unwrap(),
        metadata: [("key".to_owned(), "value".to_owned())].into(),
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        origin: None,
        role: Role::Primary,
        epoch: 1,
        quota_bytes: None,
    }
}

async fn try_take(driver: &dyn Driver, volume: VolumeId) -> Result<HeldSnapshot, Error> {
    let parents = driver.lineage(volume).await.unwrap().tip().map(|tip| tip.snapshot.id).into_iter().collect();
    let snapshot = Snapshot {
        id: SnapshotId::mint(),
        name: "s".parse().unwrap(),
        parents,
        host: Host { id: HostId([1; 32]), name: "host".parse().unwrap() },
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        metadata: [("why".to_owned(), "test".to_owned())].into(),
    };
    let request = SnapshotRequest { volume, snapshot, compare: Compare::Metadata };
    Ok(driver.snapshot(&[request]).await?.remove(0).held)
}

async fn head(driver: &dyn Driver, volume: VolumeId) -> PathBuf {
    driver.attach(Target::Head(volume), Access::ReadWrite).await.unwrap()
}

fn tree(pool: &Path, held: &HeldSnapshot) -> PathBuf {
    pool.join(format!("volumes/{}/snapshots/{}/tree", held.volume, held.snapshot.id))
}

async fn read(
    driver: &dyn Driver,
    base: Option<&HeldSnapshot>,
    target: &HeldSnapshot,
    format: &DeltaFormat,
) -> Result<Vec<Bytes>, Error> {
    let (base, target) = (base.map(HeldSnapshot::key), target.key());
    let request = DeltaRequest { base, target, format: format.clone(), compare: Compare::Metadata, resume: None };
    let mut reader = driver.read_delta(request).await?;
    let mut chunks = Vec::new();
    while let Some(chunk) = reader.next().await? {
        chunks.push(chunk);
    }
    Ok(chunks)
}

async fn take_in(
    driver: &dyn Driver,
    volume: &VolumeRecord,
    base: Option<&HeldSnapshot>,
    target: &HeldSnapshot,
    format: &DeltaFormat,
    chunks: &[Bytes],
) -> Result<HeldSnapshot, Error> {
    let volume = VolumeRecord { role: Role::Replica, ..volume.clone() };
    let (snapshot, base) = (target.snapshot.clone(), base.map(HeldSnapshot::key));
    let request = ReceiveRequest { volume, snapshot, base, format: format.clone(), resume: None };
    let mut receiving = driver.receive(request).await?;
    for chunk in chunks {
        receiving.write(chunk.clone()).await?;
    }
    receiving.commit().await
}

/// Sends one step and returns how many bytes it took.
async fn push(
    from: &dyn Driver,
    to: &dyn Driver,
    volume: &VolumeRecord,
    base: Option<&HeldSnapshot>,
    target: &HeldSnapshot,
    format: &DeltaFormat,
) -> usize {
    let chunks = read(from, base, target, format).await.unwrap();
    let held = take_in(to, volume, base, target, format, &chunks).await.unwrap();
    assert_eq!(held.snapshot, target.snapshot);
    assert_eq!((held.unchanged, held.logical_bytes), (target.unchanged, target.logical_bytes));
    chunks.iter().map(Bytes::len).sum()
}

/// The formats of the kernel's stream that a pool knows.
fn native(driver: &dyn Driver) -> Vec<DeltaFormat> {
    let formats = &driver.capabilities().formats;
    assert_eq!(formats.last(), Some(&DeltaFormat::tree()));
    formats[..formats.len() - 1].to_vec()
}

fn btrfs(arguments: &[&str], paths: &[&Path]) -> Output {
    let output = Command::new("btrfs").args(arguments).args(paths).output().unwrap();
    assert!(output.status.success(), "btrfs {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// What nobody should do to a snapshot: make it writable, put a file of the next one into it, make it read-only again.
fn tamper(snapshot: &Path, next: &Path) {
    btrfs(&["property", "set", "-f", "-ts"], &[snapshot, Path::new("ro"), Path::new("false")]);
    fs::remove_file(snapshot.join("data")).unwrap();
    let copied = Command::new("cp").arg("--reflink=always").arg(next.join("data")).arg(snapshot).status().unwrap();
    assert!(copied.success());
    btrfs(&["property", "set", "-ts"], &[snapshot, Path::new("ro"), Path::new("true")]);
}

#[test]
fn send_and_receive_alone_damage_a_file_silently_when_the_parent_was_changed() {
    let Some(mount) = mount() else { return };
    let at = |name: &str| mount.path().join(name);
    btrfs(&["subvolume", "create"], &[&at("head")]);
    fs::write(at("head/data"), vec![1; 300_000]).unwrap();
    btrfs(&["subvolume", "snapshot", "-r"], &[&at("head"), &at("one")]);
    fs::create_dir(at("there")).unwrap();
    let send = |arguments: &[&Path]| {
        let mut sender =
            Command::new("btrfs").args(["send", "-q"]).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let received = Command::new("btrfs")
            .args(["receive", "-q"])
            .arg(at("there"))
            .stdin(sender.stdout.take().unwrap())
            .status();
        assert!(sender.wait().unwrap().success() && received.unwrap().success());
    };
    send(&[&at("one")]);
    fs::write(at("head/data"), vec![2; 300_000]).unwrap();
    btrfs(&["subvolume", "snapshot", "-r"], &[&at("head"), &at("two")]);
    tamper(&at("one"), &at("two"));
    send(&[Path::new("-p"), &at("one"), &at("two")]);
    assert_ne!(fs::read(at("two/data")).unwrap(), fs::read(at("there/two/data")).unwrap(), "the trap is gone");
}

/// Two pools with a volume, two snapshots on the first, the older one on the second too.
async fn pair(mount: &LoopMount) -> (Arc<dyn Driver>, Arc<dyn Driver>, VolumeRecord, HeldSnapshot, HeldSnapshot) {
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let b = support::open_with("btrfs", &mount.path().join("b")).await.unwrap();
    let volume = record("db");
    a.create(&volume).await.unwrap();
    let head = head(&*a, volume.id).await;
    fs::write(head.join("data"), vec![1; 300_000]).unwrap();
    let one = try_take(&*a, volume.id).await.unwrap();
    fs::write(head.join("data"), vec![2; 300_000]).unwrap();
    let two = try_take(&*a, volume.id).await.unwrap();
    push(&*a, &*b, &volume, None, &one, &native(&*a)[0]).await;
    (a, b, volume, one, two)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_parent_is_not_used_and_the_copy_is_right() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, two) = pair(&mount).await;
    let (pool, other) = (mount.path().join("a"), mount.path().join("b"));
    tamper(&tree(&pool, &one), &tree(&pool, &two));
    assert!(!a.verify(one.key(), Compare::Metadata).await.unwrap().is_empty(), "it is noticed");
    let by_tree = read(&*a, Some(&one), &two, &DeltaFormat::tree()).await.unwrap_err();
    assert!(matches!(by_tree.kind, ErrorKind::Tampered { .. }), "{by_tree:?}");
    for format in native(&*a) {
        let bytes = push(&*a, &*b, &volume, Some(&one), &two, &format).await;
        assert_eq!(listing::differences(&tree(&pool, &two), &tree(&other, &two)).unwrap(), [""; 0]);
        assert!(format.0.ends_with("/2") || bytes > 300_000, "sent in full");
        b.forget(two.key()).await.unwrap();
    }
    let target = read(&*a, None, &one, &native(&*a)[0]).await.unwrap_err();
    assert!(matches!(target.kind, ErrorKind::Tampered { .. }), "a changed snapshot is not sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_whose_base_was_changed_refuses() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, two) = pair(&mount).await;
    let format = &native(&*a)[0];
    let chunks = read(&*a, Some(&one), &two, format).await.unwrap();
    tamper(&tree(&mount.path().join("b"), &one), &tree(&mount.path().join("a"), &two));
    let error = take_in(&*b, &volume, Some(&one), &two, format, &chunks).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Tampered { .. }), "{error:?}");
    assert_eq!(b.lineage(volume.id).await.unwrap().snapshots.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_over_three_pools_and_back_stays_incremental() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, two) = pair(&mount).await;
    let c = support::open_with("btrfs", &mount.path().join("c")).await.unwrap();
    let format = &native(&*a)[0];
    push(&*b, &*c, &volume, None, &one, &DeltaFormat::tree()).await;
    push(&*a, &*b, &volume, Some(&one), &two, format).await;
    // The base of this step came by the portable format: it is found by our id all the same.
    push(&*b, &*c, &volume, Some(&one), &two, format).await;
    c.set_record(&volume).await.unwrap();
    fs::write(head(&*c, volume.id).await.join("small"), "small").unwrap();
    let three = try_take(&*c, volume.id).await.unwrap();
    a.set_record(&VolumeRecord { role: Role::Replica, ..volume.clone() }).await.unwrap();
    a.detach(Target::Head(volume.id)).await.unwrap();
    let bytes = push(&*c, &*a, &volume, Some(&two), &three, format).await;
    assert!(bytes < 5_000, "{bytes} bytes for a small file");
    let at = |pool: &str| tree(&mount.path().join(pool), &three);
    assert_eq!(listing::differences(&at("c"), &at("a")).unwrap(), [""; 0]);
    assert_eq!(a.lineage(volume.id).await.unwrap().snapshots.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn subvolumes_inside_a_volume_are_refused_by_their_paths() {
    let Some(mount) = mount() else { return };
    let driver = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let volume = record("db");
    driver.create(&volume).await.unwrap();
    let head = head(&*driver, volume.id).await;
    try_take(&*driver, volume.id).await.unwrap();
    fs::create_dir(head.join("dir")).unwrap();
    btrfs(&["subvolume", "create"], &[&head.join("dir/inner")]);
    fs::write(head.join("dir/inner/precious"), "x").unwrap();
    let error = try_take(&*driver, volume.id).await.unwrap_err();
    assert!(matches!(&error.kind, ErrorKind::Unsupported(why) if why.contains("dir/inner")), "{error:?}");
    assert!(head.join("dir/inner/precious").exists());
    assert_eq!(driver.lineage(volume.id).await.unwrap().snapshots.len(), 1);
    driver.detach(Target::Head(volume.id)).await.unwrap();
    driver.destroy(volume.id).await.unwrap();
    assert_eq!(fs::read_dir(mount.path().join("a/trash")).unwrap().count(), 0, "the inner one goes with the volume");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_receive_left_is_gone_after_the_next_open() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, two) = pair(&mount).await;
    drop(b);
    let staging = mount.path().join("b/staging/receive-garbled/incoming");
    fs::create_dir_all(&staging).unwrap();
    btrfs(&["subvolume", "create"], &[&staging.join("tree")]);
    fs::write(staging.join("tree/half"), "x").unwrap();
    let b = support::open_with("btrfs", &mount.path().join("b")).await.unwrap();
    assert_eq!(fs::read_dir(mount.path().join("b/staging")).unwrap().count(), 0);
    assert!(b.scan().await.unwrap().orphans.is_empty());
    push(&*a, &*b, &volume, Some(&one), &two, &native(&*a)[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_travels_between_directory_and_btrfs_both_ways() {
    let Some(mount) = mount() else { return };
    for (from, to) in [("directory", "btrfs"), ("btrfs", "directory")] {
        let (here, there) = (mount.path().join(format!("{from}-a")), mount.path().join(format!("{to}-b")));
        let a = support::open_with(from, &here).await.unwrap();
        let b = support::open_with(to, &there).await.unwrap();
        let volume = record("db");
        a.create(&volume).await.unwrap();
        let head = head(&*a, volume.id).await;
        fs::write(head.join("data"), vec![1; 300_000]).unwrap();
        fs::hard_link(head.join("data"), head.join("twin")).unwrap();
        std::os::unix::fs::symlink("data", head.join("link")).unwrap();
        let one = try_take(&*a, volume.id).await.unwrap();
        fs::write(head.join("more"), "more").unwrap();
        let two = try_take(&*a, volume.id).await.unwrap();
        let same = try_take(&*a, volume.id).await.unwrap();
        let format = DeltaFormat::tree();
        push(&*a, &*b, &volume, None, &one, &format).await;
        push(&*a, &*b, &volume, Some(&one), &two, &format).await;
        push(&*a, &*b, &volume, Some(&two), &same, &format).await;
        for held in [&one, &two, &same] {
            assert_eq!(listing::differences(&tree(&here, held), &tree(&there, held)).unwrap(), [""; 0]);
        }
        assert_eq!(a.lineage(volume.id).await.unwrap(), b.lineage(volume.id).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_in_words_and_leaves_the_pool_as_it_was() {
    let Some(mount) = mount() else { return };
    let folder = tempfile::tempdir().unwrap();
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let small = format!("btrfs:{}/pool.btrfs,size=256M", folder.path().display()).parse().unwrap();
    let b = drivers::open(&small).await.unwrap();
    let volume = record("db");
    a.create(&volume).await.unwrap();
    let head = head(&*a, volume.id).await;
    fs::write(head.join("small"), "small").unwrap();
    let one = try_take(&*a, volume.id).await.unwrap();
    let mut seed = 1_u64;
    let noise: Vec<u8> = (0..28_000_000)
        .flat_map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed.to_le_bytes()
        })
        .collect();
    fs::write(head.join("large"), noise).unwrap();
    let two = try_take(&*a, volume.id).await.unwrap();
    for format in [native(&*a), vec![DeltaFormat::tree()]].concat() {
        let target = VolumeRecord { id: VolumeId::mint(), ..volume.clone() };
        push(&*a, &*b, &target, None, &one, &format).await;
        let before = b.usage().await.unwrap().available_bytes;
        let base = HeldSnapshot { volume: target.id, ..one.clone() };
        let chunks = read(&*a, Some(&one), &two, &format).await.unwrap();
        let error = take_in(&*b, &target, Some(&base), &two, &format, &chunks).await.unwrap_err();
        assert!(matches!(error.kind, ErrorKind::NoSpace), "{format}: {error:?}");
        assert_eq!(b.lineage(target.id).await.unwrap().snapshots, [base]);
        // The thread that clears staging away may still be at it.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while b.usage().await.unwrap().available_bytes + (16 << 20) < before {
            assert!(std::time::Instant::now() < deadline, "{format}: the space comes back");
        }
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
    let driver = open(",size=256M,wipe").await.unwrap();
    assert_eq!(driver.scan().await.unwrap().volumes, [(volume, Vec::new())]);
    drop(driver);
    assert_eq!(open("").await.unwrap().scan().await.unwrap().volumes.len(), 1);
}
