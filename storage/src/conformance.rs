//! One suite that every driver passes.
//!
//! A driver's test gives a [`Fixture`] that opens pools and calls [`run`]. The cases speak to [`Driver`] only, write into
//! heads through `attach`, and compare trees as a user would see them. Each starts with fresh pools; a failing one panics
//! with its name.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    delta::{CHUNK_LIMIT, Compare, DeltaFormat, DeltaRequest, ReceiveRequest, Receiving},
    driver::{Access, Driver, SnapshotRequest, Target},
    error::{ErrorKind, Result},
    model::{HeadState, HeldSnapshot, Host, HostId, Role, Snapshot, SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
};

mod cases;
mod transfers;

/// Gives the suite its pools. Each value of it is one place with room for several pools.
#[async_trait]
pub trait Fixture: Send + Sync {
    /// Opens the pool of this name; makes it when it is opened for the first time. The pool is not open already.
    async fn open(&self, pool: &str) -> Result<Arc<dyn Driver>>;
    /// Puts something that no driver made beside the volumes of a pool that is not open, and returns whether `scan` must
    /// list it. `false`: this driver has no place where a stranger's things could lie.
    fn plant_stranger(&self, pool: &str) -> bool;
}

/// The name of a case and the case.
pub type Case = (&'static str, for<'a> fn(&'a Bench) -> CaseFuture<'a>);

/// A running case.
pub type CaseFuture<'a> = std::pin::Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Lists all cases.
pub fn cases() -> Vec<Case> {
    [cases::CASES, transfers::CASES].concat()
}

/// Runs all cases, each on a new fixture.
pub async fn run<F: Fixture + 'static>(make: impl Fn() -> F) {
    run_share(make, 0, 1).await;
}

/// Runs every case whose number leaves `share` when it is divided by `of`, so that slow pools take several tests.
pub async fn run_share<F: Fixture + 'static>(make: impl Fn() -> F, share: usize, of: usize) {
    for (name, case) in cases().into_iter().skip(share).step_by(of) {
        eprintln!("conformance: {name}");
        let bench = Bench { fixture: Box::new(make()) };
        case(&bench).await;
    }
}

/// What the cases work with.
pub struct Bench {
    fixture: Box<dyn Fixture>,
}

/// A tree as a user sees it: path to kind, mode, size, time and contents.
pub(crate) type Picture = BTreeMap<Vec<u8>, Look>;

/// How one path looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Look {
    kind: &'static str,
    mode: u32,
    mtime: (i64, i64),
    contents: Vec<u8>,
    /// The first path of the same inode, for files with several names in the tree.
    twin_of: Option<Vec<u8>>,
}

impl Bench {
    async fn open(&self, pool: &str) -> Arc<dyn Driver> {
        self.fixture.open(pool).await.expect("the pool opens")
    }
}

/// Makes a record for a new primary volume.
pub(crate) fn volume(name: &str) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::mint(),
        name: name.parse().expect("a name"),
        metadata: [("purpose".to_owned(), "τεστ \"quoted\"\n".to_owned())].into(),
        created: "2026-01-02T03:04:05.000000006Z".parse().expect("a time"),
        origin: None,
        role: Role::Primary,
        epoch: 3,
        primary: Some(host()),
        quota_bytes: None,
    }
}

fn host() -> Host {
    Host { id: HostId([7; 32]), name: "host-a".parse().expect("a name") }
}

/// Makes a snapshot record.
pub(crate) fn snapshot(name: &str, parents: &[SnapshotId]) -> Snapshot {
    Snapshot {
        id: SnapshotId::mint(),
        name: name.parse().expect("a name"),
        parents: parents.to_vec(),
        host: host(),
        created: "2026-01-02T03:04:05.5Z".parse().expect("a time"),
        metadata: [("why".to_owned(), "test".to_owned())].into(),
    }
}

/// Attaches the head for writing, lets `write` change it, detaches it.
pub(crate) async fn write(driver: &dyn Driver, volume: VolumeId, write: impl FnOnce(&Path)) {
    let target = Target::Head(volume);
    let path = driver.attach(target, Access::ReadWrite).await.expect("the head is attached");
    write(&path);
    driver.detach(target).await.expect("the head is detached");
}

/// Takes a snapshot whose parent is the newest one.
pub(crate) async fn take(driver: &dyn Driver, volume: VolumeId, name: &str) -> HeldSnapshot {
    let parents: Vec<_> =
        driver.lineage(volume).await.expect("a lineage").tip().map(|t| t.snapshot.id).into_iter().collect();
    let request = SnapshotRequest { volume, snapshot: snapshot(name, &parents), compare: Compare::Metadata };
    let mut reports = driver.snapshot(&[request]).await.expect("the snapshot is taken");
    reports.remove(0).held
}

/// Looks at a snapshot.
pub(crate) async fn look_at(driver: &dyn Driver, key: SnapshotKey) -> Picture {
    let target = Target::Snapshot(key.volume, key.snapshot);
    let path = driver.attach(target, Access::ReadOnly).await.expect("the snapshot is attached");
    let picture = look(&path);
    driver.detach(target).await.expect("the snapshot is detached");
    picture
}

/// Looks at the head.
pub(crate) async fn look_at_head(driver: &dyn Driver, volume: VolumeId, access: Access) -> Picture {
    let target = Target::Head(volume);
    let path = driver.attach(target, access).await.expect("the head is attached");
    let picture = look(&path);
    driver.detach(target).await.expect("the head is detached");
    picture
}

/// Looks at a tree.
pub(crate) fn look(root: &Path) -> Picture {
    let mut picture = Picture::new();
    let mut inodes = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    let mut all: Vec<PathBuf> = Vec::new();
    while let Some(path) = waiting.pop() {
        if fs::symlink_metadata(&path).expect("stat").is_dir() {
            waiting.extend(fs::read_dir(&path).expect("list").map(|entry| entry.expect("entry").path()));
        }
        all.push(path);
    }
    all.sort();
    for path in all {
        let stat = fs::symlink_metadata(&path).expect("stat");
        let (kind, contents) = match stat.file_type() {
            it if it.is_dir() => ("directory", Vec::new()),
            it if it.is_symlink() => ("link", fs::read_link(&path).expect("link").as_os_str().as_bytes().to_vec()),
            it if it.is_file() => ("file", fs::read(&path).expect("read")),
            _ => ("other", Vec::new()),
        };
        let relative = path.strip_prefix(root).expect("beneath").as_os_str().as_bytes().to_vec();
        let twin_of = (kind == "file").then(|| inodes.get(&stat.ino()).cloned()).flatten();
        inodes.entry(stat.ino()).or_insert_with(|| relative.clone());
        let (mode, mtime) = (stat.permissions().mode(), (stat.mtime(), stat.mtime_nsec()));
        picture.insert(relative, Look { kind, mode, mtime, contents, twin_of });
    }
    picture
}

/// Writes a small tree with a bit of everything that needs no root.
pub(crate) fn furnish(head: &Path) {
    let made: io::Result<()> = (|| {
        fs::create_dir_all(head.join("sub/deep/er"))?;
        fs::write(head.join("sub/small"), "small")?;
        fs::write(head.join("sub/deep/er/large"), vec![0xa5; 700_000])?;
        fs::write(head.join("empty"), "")?;
        fs::hard_link(head.join("sub/small"), head.join("sub/deep/twin"))?;
        std::os::unix::fs::symlink("../nowhere", head.join("sub/link"))?;
        fs::write(head.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8\n")), "x")?;
        fs::write(head.join("n".repeat(255)), "long name")?;
        fs::create_dir(head.join("closed"))?;
        fs::write(head.join("closed/inside"), "inside")?;
        fs::set_permissions(head.join("closed"), fs::Permissions::from_mode(0o500))?;
        fs::set_permissions(head.join("sub/small"), fs::Permissions::from_mode(0o4710))?;
        let sparse = fs::File::create(head.join("sparse"))?;
        sparse.set_len(3_000_000)?;
        std::os::unix::fs::FileExt::write_at(&sparse, b"data", 1_500_000)?;
        let old = std::time::UNIX_EPOCH - std::time::Duration::new(5, 250_000_000);
        sparse.set_modified(old)
    })();
    made.expect("the tree is written");
}

/// Changes what [`furnish`] wrote.
pub(crate) fn refurbish(head: &Path) {
    let changed: io::Result<()> = (|| {
        let large = fs::File::options().write(true).open(head.join("sub/deep/er/large"))?;
        std::os::unix::fs::FileExt::write_at(&large, b"changed", 400_000)?;
        fs::remove_file(head.join("sub/deep/twin"))?;
        fs::write(head.join("sub/new"), "new")?;
        fs::rename(head.join("empty"), head.join("moved"))?;
        fs::remove_file(head.join("sub/link"))?;
        fs::create_dir(head.join("sub/link"))?;
        fs::set_permissions(head.join("sparse"), fs::Permissions::from_mode(0o600))
    })();
    changed.expect("the tree is changed");
}

/// Reads a delta to its end.
pub(crate) async fn read_all(driver: &dyn Driver, request: DeltaRequest) -> Result<Vec<Bytes>> {
    let mut reader = driver.read_delta(request).await?;
    let mut chunks = Vec::new();
    while let Some(chunk) = reader.next().await? {
        assert!(!chunk.is_empty() && chunk.len() <= CHUNK_LIMIT, "a chunk of {} bytes", chunk.len());
        chunks.push(chunk);
    }
    Ok(chunks)
}

/// Asks for the delta between two held snapshots.
pub(crate) fn delta(base: Option<&HeldSnapshot>, target: &HeldSnapshot, format: &DeltaFormat) -> DeltaRequest {
    DeltaRequest {
        base: base.map(HeldSnapshot::key),
        target: target.key(),
        format: format.clone(),
        compare: Compare::Metadata,
        resume: None,
    }
}

/// Asks to take in such a delta as a replica.
pub(crate) fn incoming(
    volume: &VolumeRecord,
    base: Option<&HeldSnapshot>,
    target: &HeldSnapshot,
    format: &DeltaFormat,
) -> ReceiveRequest {
    let volume = VolumeRecord { role: Role::Replica, ..volume.clone() };
    let (snapshot, base) = (target.snapshot.clone(), base.map(HeldSnapshot::key));
    ReceiveRequest { volume, snapshot, base, format: format.clone(), resume: None }
}

/// Feeds all chunks and commits.
pub(crate) async fn take_in(driver: &dyn Driver, request: ReceiveRequest, chunks: &[Bytes]) -> Result<HeldSnapshot> {
    let mut receiving: Box<dyn Receiving> = driver.receive(request).await?;
    for chunk in chunks {
        receiving.write(chunk.clone()).await?;
    }
    receiving.commit().await
}

/// Lists the formats that both know, best first by the sender.
pub(crate) fn common_formats(sender: &dyn Driver, receiver: &dyn Driver) -> Vec<DeltaFormat> {
    let theirs = &receiver.capabilities().reads;
    sender.capabilities().formats.iter().filter(|format| theirs.contains(format)).cloned().collect()
}

/// Tells whether an operation was refused for a reason.
pub(crate) fn refused<T>(result: Result<T>, what: &str, fits: impl Fn(&ErrorKind) -> bool) {
    match result {
        Ok(_) => panic!("{what}: it was done"),
        Err(error) if fits(&error.kind) => {}
        Err(error) => panic!("{what}: another error came: {error}: {}", error.kind),
    }
}

/// Reads whether a head is clean.
pub(crate) async fn state(driver: &dyn Driver, volume: VolumeId) -> HeadState {
    driver.head_state(volume).await.expect("a head state")
}
