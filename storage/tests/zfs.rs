//! What only the ZFS driver promises: pools in files, tokens, encrypted volumes, what is not ours left alone. The shared suite
//! on it is in tests/conformance.rs, kills at its fault points in tests/kill.rs.
#![allow(clippy::unwrap_used)]

mod support;

use std::{fs, path::PathBuf, process::Command, sync::Arc};

use bytes::Bytes;
use flocker_storage::{
    conformance::Fixture as _,
    delta::{Compare, DeltaFormat, DeltaRequest, ReceiveRequest, ResumePoint},
    driver::{Access, Driver, SnapshotRequest, Target},
    drivers,
    error::{Error, ErrorKind},
    model::{HeadState, HeldSnapshot, Host, HostId, Role, Snapshot, SnapshotId, VolumeId, VolumeRecord},
};
use support::zfs_fuse::{ZfsHost, ZfsPlace};

fn record(name: &str) -> VolumeRecord {
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

/// Makes a volume with one file, and a snapshot of it.
async fn with_one(driver: &dyn Driver) -> (VolumeRecord, HeldSnapshot) {
    let volume = record("db");
    driver.create(&volume).await.unwrap();
    write(driver, volume.id, "file", b"one").await;
    let one = take(driver, volume.id).await;
    (volume, one)
}

async fn take(driver: &dyn Driver, volume: VolumeId) -> HeldSnapshot {
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
    driver.snapshot(&[request]).await.unwrap().remove(0).held
}

async fn write(driver: &dyn Driver, volume: VolumeId, name: &str, contents: &[u8]) {
    let target = Target::Head(volume);
    let head = driver.attach(target, Access::ReadWrite).await.unwrap();
    fs::write(head.join(name), contents).unwrap();
    driver.detach(target).await.unwrap();
}

async fn read_file(driver: &dyn Driver, held: &HeldSnapshot, name: &str) -> Vec<u8> {
    let target = Target::Snapshot(held.volume, held.snapshot.id);
    let path = driver.attach(target, Access::ReadOnly).await.unwrap();
    let contents = fs::read(path.join(name)).unwrap();
    driver.detach(target).await.unwrap();
    contents
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut seed = 1_u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed.to_le_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

fn request(base: Option<&HeldSnapshot>, target: &HeldSnapshot, format: &DeltaFormat) -> DeltaRequest {
    let (base, target, format) = (base.map(HeldSnapshot::key), target.key(), format.clone());
    DeltaRequest { base, target, format, compare: Compare::Metadata, resume: None }
}

async fn read(driver: &dyn Driver, request: DeltaRequest) -> Result<Vec<Bytes>, Error> {
    let mut reader = driver.read_delta(request).await?;
    let mut chunks = Vec::new();
    while let Some(chunk) = reader.next().await? {
        chunks.push(chunk);
    }
    Ok(chunks)
}

fn incoming(
    volume: &VolumeRecord,
    base: Option<&HeldSnapshot>,
    target: &HeldSnapshot,
    format: &DeltaFormat,
) -> ReceiveRequest {
    let volume = VolumeRecord { role: Role::Replica, ..volume.clone() };
    let (snapshot, base) = (target.snapshot.clone(), base.map(HeldSnapshot::key));
    ReceiveRequest { volume, snapshot, base, format: format.clone(), resume: None }
}

async fn take_in(driver: &dyn Driver, request: ReceiveRequest, chunks: &[Bytes]) -> Result<HeldSnapshot, Error> {
    let mut receiving = driver.receive(request).await?;
    for chunk in chunks {
        receiving.write(chunk.clone()).await?;
    }
    receiving.commit().await
}

async fn push(
    (from, to): (&dyn Driver, &dyn Driver),
    volume: &VolumeRecord,
    base: Option<&HeldSnapshot>,
    target: &HeldSnapshot,
    format: &DeltaFormat,
) -> Result<HeldSnapshot, Error> {
    let chunks = read(from, request(base, target, format)).await?;
    take_in(to, incoming(volume, base, target, format), &chunks).await
}

struct Pair {
    a: Arc<dyn Driver>,
    b: Arc<dyn Driver>,
    native: DeltaFormat,
    place: ZfsPlace,
}

async fn pair(host: &Arc<ZfsHost>) -> Pair {
    let place = host.place();
    let (a, b) = (place.open("a").await.unwrap(), place.open("b").await.unwrap());
    let native = a.capabilities().formats[0].clone();
    Pair { a, b, native, place }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receive_that_was_cut_goes_on_by_its_token_and_only_for_its_own_step() {
    let test = "a_receive_that_was_cut_goes_on_by_its_token_and_only_for_its_own_step";
    let Some(host) = ZfsHost::enter(test) else { return };
    let Pair { a, b, native, place } = pair(&host).await;
    let volume = record("db");
    a.create(&volume).await.unwrap();
    write(&*a, volume.id, "small", b"small").await;
    let one = take(&*a, volume.id).await;
    push((&*a, &*b), &volume, None, &one, &native).await.unwrap();
    write(&*a, volume.id, "large", &noise(24 << 20)).await;
    let two = take(&*a, volume.id).await;
    let step = read(&*a, request(Some(&one), &two, &native)).await.unwrap();
    let mut receiving = b.receive(incoming(&volume, Some(&one), &two, &native)).await.unwrap();
    for chunk in &step[..step.len() * 3 / 4] {
        receiving.write(chunk.clone()).await.unwrap();
    }
    let point = receiving.suspend().await.unwrap();
    if host.is_fuse() {
        assert_eq!(point, None);
        return;
    }
    drop(b);
    let b = place.open("b").await.unwrap();
    let partial = b.partial(volume.id).await.unwrap().expect("it can go on");
    assert_eq!(
        (Some(&partial.point), &partial.snapshot, partial.base),
        (point.as_ref(), &two.snapshot, Some(one.key()))
    );
    assert_eq!(b.lineage(volume.id).await.unwrap().snapshots, std::slice::from_ref(&one));
    for wrong in [request(None, &two, &native), request(None, &one, &native), request(Some(&two), &one, &native)] {
        let error = read(&*a, DeltaRequest { resume: point.clone(), ..wrong }).await.unwrap_err();
        assert!(matches!(error.kind, ErrorKind::ResumeStale(_)), "a token for another step: {error:?}");
    }
    let made_up = Some(ResumePoint(Bytes::from_static(b"1-2-3-4")));
    let error = read(&*a, DeltaRequest { resume: made_up, ..request(Some(&one), &two, &native) }).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::ResumeStale(_)), "a token that means nothing: {error:?}");
    let rest = DeltaRequest { resume: point.clone(), ..request(Some(&one), &two, &native) };
    let rest = read(&*a, rest).await.unwrap();
    assert!(rest.len() < step.len() / 2, "{} of {} chunks", rest.len(), step.len());
    let again = ReceiveRequest { resume: point, ..incoming(&volume, Some(&one), &two, &native) };
    assert_eq!(take_in(&*b, again, &rest).await.unwrap(), two);
    assert_eq!(read_file(&*b, &two, "large").await, noise(24 << 20));
    assert_eq!(b.partial(volume.id).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encrypted_volume_travels_as_it_lies_and_the_replica_needs_no_key() {
    let test = "an_encrypted_volume_travels_as_it_lies_and_the_replica_needs_no_key";
    let Some(host) = ZfsHost::enter(test) else { return };
    if host.is_fuse() {
        return;
    }
    let key = host.folder().join("key");
    fs::write(&key, [7; 32]).unwrap();
    let (secret, location) = (format!("{}/secret", host.root()), format!("keylocation=file://{}", key.display()));
    let words = ["create", "-o", "mountpoint=none", "-o", "encryption=on", "-o", "keyformat=raw", "-o", &location];
    host.zfs(&[&words[..], &[&secret]].concat());
    let open =
        |dataset: String| async move { drivers::open(&format!("zfs:{dataset}").parse().unwrap()).await.unwrap() };
    let (a, b) = (open(format!("{secret}/a")).await, open(host.dataset("b")).await);
    let (volume, native) = (record("db"), a.capabilities().formats[0].clone());
    a.create(&volume).await.unwrap();
    write(&*a, volume.id, "file", b"secret").await;
    let one = take(&*a, volume.id).await;
    write(&*a, volume.id, "file", b"secret too").await;
    let two = take(&*a, volume.id).await;
    assert_eq!(push((&*a, &*b), &volume, None, &one, &native).await.unwrap(), one);
    assert_eq!(push((&*a, &*b), &volume, Some(&one), &two, &native).await.unwrap(), two);
    for (format, is_packed) in [(&native, true), (&DeltaFormat::tree(), false)] {
        let reader = a.read_delta(request(None, &one, format)).await.unwrap();
        assert_eq!(reader.is_packed(), is_packed, "only what lies encrypted is known not to shrink");
    }
    let dataset = format!("{}/b/volumes/{}", host.root(), volume.id);
    assert_eq!(host.zfs(&["get", "-H", "-o", "value", "keystatus", &dataset]), "unavailable\n");
    assert_eq!(b.lineage(volume.id).await.unwrap(), a.lineage(volume.id).await.unwrap());
    assert_eq!(b.head_state(volume.id).await.unwrap(), HeadState::Clean);
    let target = Target::Snapshot(volume.id, two.snapshot.id);
    let error = b.attach(target, Access::ReadOnly).await.unwrap_err();
    assert!(matches!(&error.kind, ErrorKind::Unsupported(why) if why.contains("key")), "{error:?}");
    b.forget(one.key()).await.unwrap();
    b.destroy(volume.id).await.unwrap();
    assert!(b.scan().await.unwrap().volumes.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_of_the_portable_format_takes_no_native_increment() {
    let test = "a_base_of_the_portable_format_takes_no_native_increment";
    let Some(host) = ZfsHost::enter(test) else { return };
    let Pair { a, b, native, place: _place } = pair(&host).await;
    let (volume, tree) = (record("db"), DeltaFormat::tree());
    a.create(&volume).await.unwrap();
    write(&*a, volume.id, "file", b"one").await;
    let one = take(&*a, volume.id).await;
    write(&*a, volume.id, "file", b"two").await;
    let two = take(&*a, volume.id).await;
    push((&*a, &*b), &volume, None, &one, &tree).await.unwrap();
    let error = push((&*a, &*b), &volume, Some(&one), &two, &native).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::FormatUnfit(_)), "{error:?}");
    assert_eq!(b.lineage(volume.id).await.unwrap().snapshots, std::slice::from_ref(&one));
    push((&*a, &*b), &volume, Some(&one), &two, &tree).await.unwrap();
    assert_eq!(read_file(&*b, &two, "file").await, b"two");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_of_a_replica_and_its_own_empty_snapshots_do_not_stand_in_the_way() {
    let test = "a_reader_of_a_replica_and_its_own_empty_snapshots_do_not_stand_in_the_way";
    let Some(host) = ZfsHost::enter(test) else { return };
    let Pair { a, b, native, place: _place } = pair(&host).await;
    for format in [native, DeltaFormat::tree()] {
        let (volume, one) = with_one(&*a).await;
        write(&*a, volume.id, "file", b"two").await;
        let two = take(&*a, volume.id).await;
        push((&*a, &*b), &volume, None, &one, &format).await.unwrap();
        let path = b.attach(Target::Head(volume.id), Access::ReadOnly).await.unwrap();
        assert_eq!(fs::read(path.join("file")).unwrap(), b"one");
        let reader = fs::File::open(path.join("file")).unwrap();
        let own = take(&*b, volume.id).await;
        assert!(own.unchanged);
        let pushed = push((&*a, &*b), &volume, Some(&one), &two, &format).await;
        assert_eq!(fs::read(path.join("file")).unwrap(), b"one", "what was handed out stays");
        drop(reader);
        if host.is_fuse() && format == DeltaFormat::tree() {
            // It unmounts what is read when the volume's dataset is replaced: refused before anything is done.
            assert!(matches!(pushed.unwrap_err().kind, ErrorKind::Blocked(_)));
            b.detach(Target::Head(volume.id)).await.unwrap();
            push((&*a, &*b), &volume, Some(&one), &two, &format).await.unwrap();
        } else {
            pushed.unwrap();
        }
        assert_eq!(b.lineage(volume.id).await.unwrap().snapshots, [one, own, two.clone()], "{format}");
        let path = b.attach(Target::Head(volume.id), Access::ReadOnly).await.unwrap();
        assert_eq!(fs::read(path.join("file")).unwrap(), b"two", "{format}");
        b.detach(Target::Head(volume.id)).await.unwrap();
        assert_eq!(b.head_state(volume.id).await.unwrap(), HeadState::Clean);
    }
}

/// zfs-fuse learns of an unmount after the kernel has told that it is done, and does not go back until then. Without
/// patience the 23rd round failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_was_let_go_this_moment_goes_back() {
    let Some(host) = ZfsHost::enter("a_head_that_was_let_go_this_moment_goes_back") else { return };
    let place = host.place();
    let a = place.open("a").await.unwrap();
    let (volume, one) = with_one(&*a).await;
    let rounds = if host.is_fuse() { 60 } else { 3 };
    for round in 0..rounds {
        write(&*a, volume.id, "file", b"two").await;
        a.rewind(one.key()).await.unwrap_or_else(|error| panic!("round {round}: {error:?}"));
        assert_eq!(a.head_state(volume.id).await.unwrap(), HeadState::Clean);
    }
    let head = a.attach(Target::Head(volume.id), Access::ReadWrite).await.unwrap();
    assert_eq!(fs::read(head.join("file")).unwrap(), b"one");
    a.detach(Target::Head(volume.id)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_ours_is_listed_and_never_destroyed() {
    let Some(host) = ZfsHost::enter("what_is_not_ours_is_listed_and_never_destroyed") else { return };
    let place = host.place();
    let a = place.open("a").await.unwrap();
    let (volume, one) = with_one(&*a).await;
    let strange = format!("{}/volumes/{}@by-hand", place.dataset("a"), volume.id);
    write(&*a, volume.id, "file", b"two").await;
    host.zfs(&["snapshot", &strange]);
    let scan = a.scan().await.unwrap();
    assert_eq!(scan.orphans.iter().map(|orphan| orphan.place.as_str()).collect::<Vec<_>>(), [&strange]);
    assert!(a.rewind(one.key()).await.is_err(), "going back would destroy it");
    drop(a);
    let a = place.open("a").await.unwrap();
    assert_eq!(a.scan().await.unwrap().orphans.len(), 1);
    host.zfs(&["list", &strange]);
    let whole = host.place();
    drop(whole.open("x").await.unwrap());
    let root = format!("{}/other", whole.dataset("x"));
    host.zfs(&["create", "-o", "mountpoint=none", &root]);
    host.zfs(&["create", "-o", "mountpoint=none", &format!("{root}/data")]);
    let error = drivers::open(&format!("zfs:{root}").parse().unwrap()).await.err().unwrap();
    assert!(matches!(&error.kind, ErrorKind::PoolUnusable(why) if why.contains("/data")), "{error:?}");
}

/// Snapshots are remembered, so that not each verb lists them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_destroyed_by_hand_is_missed_though_it_was_remembered() {
    let Some(host) = ZfsHost::enter("what_is_destroyed_by_hand_is_missed_though_it_was_remembered") else { return };
    let place = host.place();
    let a = place.open("a").await.unwrap();
    let (volume, one) = with_one(&*a).await;
    let by_hand = |held: &HeldSnapshot| {
        host.zfs(&["destroy", &format!("{}/volumes/{}@{}", place.dataset("a"), volume.id, held.snapshot.id)]);
    };
    let written = async || {
        write(&*a, volume.id, "file", b"two").await;
        take(&*a, volume.id).await
    };
    // The head holds what the lost one held, which only a comparison with that would tell.
    let lost = written().await;
    by_hand(&lost);
    assert_eq!(a.head_state(volume.id).await.unwrap(), HeadState::Dirty);
    let lost = written().await;
    by_hand(&lost);
    let snapshot = Snapshot { id: SnapshotId::mint(), parents: vec![lost.snapshot.id], ..lost.snapshot.clone() };
    let asked = SnapshotRequest { volume: volume.id, snapshot, compare: Compare::Metadata };
    let next = a.snapshot(&[asked]).await.unwrap().remove(0).held;
    assert!(!next.unchanged, "it follows one that is not there");
    assert_eq!(a.lineage(volume.id).await.unwrap().snapshots, [one, next.clone()]);
    by_hand(&next);
    assert!(matches!(
        read(&*a, request(None, &next, &a.capabilities().formats[0])).await.unwrap_err().kind,
        ErrorKind::NotFound
    ));
}

/// ZFS takes a head that was mounted for one that was changed, and zfs-fuse has no word to ask it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_increment_is_taken_whether_the_head_was_mounted_since_the_last_one_or_not() {
    let test = "an_increment_is_taken_whether_the_head_was_mounted_since_the_last_one_or_not";
    let Some(host) = ZfsHost::enter(test) else { return };
    let Pair { a, b, native, place: _place } = pair(&host).await;
    let (volume, one) = with_one(&*a).await;
    push((&*a, &*b), &volume, None, &one, &native).await.unwrap();
    let mut base = one;
    for (round, is_mounted) in [false, false, true, false].into_iter().enumerate() {
        if is_mounted {
            let target = Target::Head(volume.id);
            let head = b.attach(target, Access::ReadWrite).await.unwrap();
            assert_eq!(fs::read(head.join("file")).unwrap(), b"1", "what came last");
            b.detach(target).await.unwrap();
        }
        write(&*a, volume.id, "file", round.to_string().as_bytes()).await;
        let next = take(&*a, volume.id).await;
        let pushed = push((&*a, &*b), &volume, Some(&base), &next, &native).await;
        assert_eq!(pushed.unwrap_or_else(|error| panic!("round {round}: {error:?}")), next);
        base = next;
    }
    assert_eq!(b.lineage(volume.id).await.unwrap().snapshots, a.lineage(volume.id).await.unwrap().snapshots);
    assert_eq!(read_file(&*b, &base, "file").await, b"3");
}

/// To compare a head a snapshot is taken of it, and a receive that begins in that moment builds on that on zfs-fuse.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_is_compared_while_a_receive_begins_keeps_nothing_of_it() {
    let test = "a_head_that_is_compared_while_a_receive_begins_keeps_nothing_of_it";
    let Some(host) = ZfsHost::enter(test) else { return };
    let Pair { a, b, native, place } = pair(&host).await;
    let (volume, one) = with_one(&*a).await;
    push((&*a, &*b), &volume, None, &one, &native).await.unwrap();
    let dataset = format!("{}/volumes/{}", place.dataset("b"), volume.id);
    let mut held = vec![one];
    for round in 0..8 {
        write(&*a, volume.id, "file", format!("round {round}").as_bytes()).await;
        let next = take(&*a, volume.id).await;
        let chunks = read(&*a, request(held.last(), &next, &native)).await.unwrap();
        let mut receiving = b.receive(incoming(&volume, held.last(), &next, &native)).await.unwrap();
        let arriving = async {
            for chunk in chunks {
                receiving.write(chunk).await.unwrap();
            }
            receiving.settle().await.unwrap();
        };
        let ((), state) = tokio::join!(arriving, b.head_state(volume.id));
        assert_eq!(state.unwrap(), HeadState::Clean, "round {round}");
        assert_eq!(receiving.commit().await.unwrap(), next, "round {round}");
        held.push(next);
        let listed = host.zfs(&["list", "-H", "-t", "snapshot", "-o", "name", "-r", &dataset]);
        let names = held.iter().map(|held| format!("{dataset}@{}", held.snapshot.id));
        assert_eq!(listed.lines().map(str::to_owned).collect::<Vec<_>>(), names.collect::<Vec<_>>(), "round {round}");
    }
    assert_eq!(b.lineage(volume.id).await.unwrap().snapshots, held);
}

/// The journal keeps what was noted for a native increment until the next one, or the next open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_journal_still_says_of_a_receive_that_is_over_is_not_carried_out_again() {
    let test = "what_the_journal_still_says_of_a_receive_that_is_over_is_not_carried_out_again";
    let Some(host) = ZfsHost::enter(test) else { return };
    let Pair { a, b, native, place } = pair(&host).await;
    let (volume, one) = with_one(&*a).await;
    push((&*a, &*b), &volume, None, &one, &native).await.unwrap();
    let root = place.dataset("b");
    let noted = || {
        let said = host.zfs(&["get", "-H", "-s", "local", "-o", "property", "all", &format!("{root}/journal")]);
        said.lines().filter(|name| *name == format!("org.flocker:receive.{}", volume.id)).count()
    };
    let mut held = vec![one];
    for contents in ["two", "three"] {
        write(&*a, volume.id, "file", contents.as_bytes()).await;
        let next = take(&*a, volume.id).await;
        push((&*a, &*b), &volume, held.last(), &next, &native).await.unwrap();
        held.push(next);
        assert_eq!((noted(), b.partial(volume.id).await.unwrap()), (1, None), "{contents}");
    }
    let newest = format!("{root}/volumes/{}@{}", volume.id, held[2].snapshot.id);
    let kept = || host.zfs(&["get", "-H", "-o", "value", "org.flocker:record", &newest]);
    let before = kept();

    drop(b);
    let b = place.open("b").await.unwrap();
    assert_eq!(noted(), 0);
    assert_eq!(kept(), before, "its record is not written a second time");
    assert_eq!(b.lineage(volume.id).await.unwrap().snapshots, held);
    write(&*a, volume.id, "file", b"four").await;
    let four = take(&*a, volume.id).await;
    push((&*a, &*b), &volume, held.last(), &four, &native).await.unwrap();
    b.destroy(volume.id).await.unwrap();
    assert_eq!(noted(), 1);

    drop(b);
    let b = place.open("b").await.unwrap();
    assert_eq!(noted(), 0, "the volume is gone");
    push((&*a, &*b), &volume, None, &four, &native).await.unwrap();
    assert_eq!(read_file(&*b, &four, "file").await, b"four");
}

/// A head that came by a receive is not compared before the next one, as nobody has mounted it since; the operator may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_writes_to_a_head_past_the_driver_is_kept() {
    let Some(host) = ZfsHost::enter("what_an_operator_writes_to_a_head_past_the_driver_is_kept") else { return };
    let Pair { a, b, native, place } = pair(&host).await;
    let (volume, one) = with_one(&*a).await;
    push((&*a, &*b), &volume, None, &one, &native).await.unwrap();
    write(&*a, volume.id, "file", b"two").await;
    let two = take(&*a, volume.id).await;
    push((&*a, &*b), &volume, Some(&one), &two, &native).await.unwrap();
    let dataset = format!("{}/volumes/{}", place.dataset("b"), volume.id);
    let file = PathBuf::from(host.zfs(&["get", "-H", "-o", "value", "mountpoint", &dataset]).trim()).join("file");
    host.zfs(&["set", "readonly=off", &dataset]);
    host.zfs(&["mount", &dataset]);
    fs::write(&file, "by hand").unwrap();
    host.zfs(&["unmount", &dataset]);
    write(&*a, volume.id, "file", b"three").await;
    let three = take(&*a, volume.id).await;

    let refusals = ["has been modified", "the head has changes that no snapshot holds"];
    for words in refusals {
        let error = push((&*a, &*b), &volume, Some(&two), &three, &native).await.unwrap_err();
        assert!(matches!(&error.kind, ErrorKind::Unsupported(why) if why.contains(words)), "{error:?}");
    }
    assert_eq!(b.head_state(volume.id).await.unwrap(), HeadState::Dirty);
    assert_eq!(b.lineage(volume.id).await.unwrap().tip().unwrap().snapshot, two.snapshot);
    let target = Target::Head(volume.id);
    let head = b.attach(target, Access::ReadWrite).await.unwrap();
    assert_eq!(fs::read_to_string(head.join("file")).unwrap(), "by hand");
    b.detach(target).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_in_a_file_is_made_imported_again_and_never_made_over_data() {
    let test = "a_pool_in_a_file_is_made_imported_again_and_never_made_over_data";
    let Some(host) = ZfsHost::enter(test) else { return };
    let folder = tempfile::tempdir_in(host.folder()).unwrap();
    let path: PathBuf = folder.path().join("pool.img");
    let open = |options: &str| {
        let spec = format!("zfs:{}{options}", path.display()).parse().unwrap();
        async move { drivers::open(&spec).await }
    };
    assert!(open("").await.is_err(), "there is nothing, and no size");
    fs::write(&path, "precious").unwrap();
    let error = open(",size=256M").await.err().unwrap();
    assert!(matches!(&error.kind, ErrorKind::PoolUnusable(why) if why.contains("wipe")), "{error:?}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    drop(open(",size=256M,wipe").await.unwrap());
    fs::remove_file(&path).unwrap();
    let driver = open(",size=256M").await.unwrap();
    let volume = record("db");
    driver.create(&volume).await.unwrap();
    assert!(matches!(open(",size=256M").await.err().unwrap().kind, ErrorKind::PoolBusy { .. }));
    let usage = driver.usage().await.unwrap();
    assert!(usage.total_bytes > 100 << 20 && usage.total_bytes < 256 << 20, "{usage:?}");
    drop(driver);
    let driver = open(",wipe").await.unwrap();
    assert_eq!(driver.scan().await.unwrap().volumes, [(volume, Vec::new())], "a pool of flocker is not wiped");
    drop(driver);
    assert_eq!(open("").await.unwrap().scan().await.unwrap().volumes.len(), 1);
}

/// A block device of a test: a loop device, or the disk that the test machine has for it.
struct Disk {
    path: String,
    is_loop: bool,
}

impl Disk {
    fn new(host: &ZfsHost) -> Self {
        if let Ok(path) = std::env::var("FLOCKER_TEST_DISK") {
            return Self { path, is_loop: false };
        }
        let image = host.folder().join("disk");
        fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(image).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { path: String::from_utf8(output.stdout).unwrap().trim().to_owned(), is_loop: true }
    }

    async fn open(&self, options: &str) -> flocker_storage::error::Result<Arc<dyn Driver>> {
        drivers::open(&format!("zfs:{}{options}", self.path).parse().unwrap()).await
    }

    async fn refusal(&self, options: &str) -> String {
        match self.open(options).await.err() {
            Some(Error { kind: ErrorKind::PoolUnusable(why), .. }) => why,
            other => panic!("{options}: {other:?}"),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.is_loop {
            let _ = Command::new("losetup").args(["--detach", &self.path]).status();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_device_is_taken_when_it_is_empty_and_wiped_only_on_demand() {
    let test = "a_block_device_is_taken_when_it_is_empty_and_wiped_only_on_demand";
    let Some(host) = ZfsHost::enter(test) else { return };
    let disk = Disk::new(&host);
    let beginning = || {
        let mut bytes = vec![0; 8192];
        std::io::Read::read_exact(&mut fs::File::open(&disk.path).unwrap(), &mut bytes).unwrap();
        bytes
    };
    let mut file = fs::File::options().write(true).open(&disk.path).unwrap();
    std::io::Write::write_all(&mut file, b"photographs").unwrap();
    file.sync_all().unwrap();
    let before = beginning();
    assert!(disk.refusal("").await.contains("it holds data"));
    assert_eq!(beginning(), before);

    host.zpool(&["create", "-f", "-m", "none", "theirs", &disk.path]);
    host.zfs(&["create", "theirs/data"]);
    for options in ["", ",wipe"] {
        let why = disk.refusal(options).await;
        assert!(why.contains("in use by the pool theirs"), "{options}: {why}");
        assert!(host.zfs(&["list", "-H", "-o", "name", "-r", "theirs"]).contains("theirs/data"), "{options}");
    }
    host.zpool(&["export", "theirs"]);
    assert!(disk.refusal("").await.contains("it holds the pool theirs"));
    assert!(!host.zpool(&["list", "-H", "-o", "name"]).contains("theirs"), "it is not imported to be looked at");

    let driver = disk.open(",wipe").await.unwrap();
    let volume = record("db");
    driver.create(&volume).await.unwrap();
    assert!(matches!(disk.open("").await.err().unwrap().kind, ErrorKind::PoolBusy { .. }));
    drop(driver);
    for options in ["", ",wipe"] {
        let driver = disk.open(options).await.unwrap();
        assert_eq!(driver.scan().await.unwrap().volumes, [(volume.clone(), Vec::new())], "{options}");
    }
}
