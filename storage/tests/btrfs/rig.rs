//! Pools, volumes and deltas for the tests beside it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use bytes::Bytes;
use flocker_storage::{
    delta::{Compare, DeltaFormat, DeltaRequest, ReceiveRequest},
    driver::{Access, Driver, SnapshotRequest, Target},
    error::Error,
    model::{HeldSnapshot, Host, HostId, Role, Snapshot, SnapshotId, VolumeId, VolumeRecord},
};

use crate::support::{self, LoopMount};

pub(crate) fn mount() -> Option<LoopMount> {
    LoopMount::try_new("btrfs", 2 << 30, &["-q"])
}

pub(crate) fn record(name: &str) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::mint(),
        name: name.parse().unwrap(),
        metadata: [("key".to_owned(), "value".to_owned())].into(),
        created: "2026-01-01T00:00:00Z".parse().unwrap(),
        origin: None,
        role: Role::Primary,
        epoch: 1,
        primary: None,
        quota_bytes: None,
    }
}

pub(crate) async fn try_take(driver: &dyn Driver, volume: VolumeId) -> Result<HeldSnapshot, Error> {
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

pub(crate) async fn head(driver: &dyn Driver, volume: VolumeId) -> PathBuf {
    driver.attach(Target::Head(volume), Access::ReadWrite).await.unwrap()
}

pub(crate) fn tree(pool: &Path, held: &HeldSnapshot) -> PathBuf {
    pool.join(format!("volumes/{}/snapshots/{}/tree", held.volume, held.snapshot.id))
}

pub(crate) async fn read(
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

pub(crate) async fn take_in(
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
pub(crate) async fn push(
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
pub(crate) fn native(driver: &dyn Driver) -> Vec<DeltaFormat> {
    let formats = &driver.capabilities().formats;
    assert_eq!(formats.last(), Some(&DeltaFormat::tree()));
    formats[..formats.len() - 1].to_vec()
}

pub(crate) fn btrfs(arguments: &[&str], paths: &[&Path]) -> Output {
    let output = Command::new("btrfs").args(arguments).args(paths).output().unwrap();
    assert!(output.status.success(), "btrfs {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// What nobody should do to a snapshot: make it writable, put a file of the next one into it, make it read-only again.
pub(crate) fn tamper(snapshot: &Path, next: &Path) {
    btrfs(&["property", "set", "-f", "-ts"], &[snapshot, Path::new("ro"), Path::new("false")]);
    fs::remove_file(snapshot.join("data")).unwrap();
    let copied = Command::new("cp").arg("--reflink=always").arg(next.join("data")).arg(snapshot).status().unwrap();
    assert!(copied.success());
    btrfs(&["property", "set", "-ts"], &[snapshot, Path::new("ro"), Path::new("true")]);
}

/// Two pools with a volume, two snapshots on the first, the older one on the second too.
pub(crate) async fn pair(
    mount: &LoopMount,
) -> (Arc<dyn Driver>, Arc<dyn Driver>, VolumeRecord, HeldSnapshot, HeldSnapshot) {
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

/// Data that no compression makes smaller.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut seed = bytes as u64 | 1;
    let words = (0..bytes.div_ceil(8)).flat_map(|_| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed.rotate_left(29).to_le_bytes()
    });
    words.take(bytes).collect()
}

/// Runs a program that must succeed; returns what it printed.
pub(crate) fn must(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
