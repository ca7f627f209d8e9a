//! Cases on one pool: the verbs, what they refuse, and what is there after a reopen.

use std::{fs, io, path::Path};

use super::{
    Bench, Case, furnish, look, look_at, look_at_head, refurbish, refused, snapshot, state, take, volume, write,
};
use crate::{
    delta::Compare,
    driver::{Access, SnapshotRequest, Target},
    error::{Blockers, ErrorKind},
    model::{HeadState, Role, SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
};

pub(super) const CASES: &[Case] = &[
    ("a_new_volume_is_empty_clean_and_keeps_its_record", |bench| Box::pin(create(bench))),
    ("a_record_is_replaced_whole_and_found_after_a_reopen", |bench| Box::pin(set_record(bench))),
    ("what_is_not_there_is_not_found", |bench| Box::pin(not_found(bench))),
    ("ids_are_taken_once", |bench| Box::pin(taken(bench))),
    ("a_snapshot_holds_the_head_as_it_was", |bench| Box::pin(snapshot_holds(bench))),
    ("a_head_is_dirty_from_the_first_change_on", |bench| Box::pin(head_state(bench))),
    ("a_file_rewritten_right_after_a_snapshot_is_in_the_next_one", |bench| Box::pin(racy(bench))),
    ("an_unchanged_snapshot_says_so", |bench| Box::pin(unchanged(bench))),
    ("snapshots_of_several_volumes_all_fail_or_all_succeed", |bench| Box::pin(group(bench))),
    ("a_snapshot_is_attached_for_reading_only", |bench| Box::pin(attach(bench))),
    ("forgetting_a_snapshot_leaves_the_others_and_the_head", |bench| Box::pin(forget(bench))),
    ("rewind_puts_the_head_back_and_is_blocked_by_newer_snapshots", |bench| Box::pin(rewind(bench))),
    ("a_clone_equals_its_origin_and_goes_its_own_way", |bench| Box::pin(clone(bench))),
    ("clones_and_attachments_block_destruction_and_are_named", |bench| Box::pin(blocked(bench))),
    ("a_lineage_runs_along_clones_of_clones", |bench| Box::pin(lineage(bench))),
    ("a_split_moves_the_newer_part_and_its_clones", |bench| Box::pin(split(bench))),
    ("verify_finds_nothing_in_a_snapshot_left_alone", |bench| Box::pin(verify(bench))),
    ("what_nobody_knows_is_listed_and_left_alone", |bench| Box::pin(orphans(bench))),
    ("a_pool_is_open_once", |bench| Box::pin(locked(bench))),
    ("a_quota_is_kept_or_refused", |bench| Box::pin(quota(bench))),
    ("a_destroyed_volume_gives_its_space_back", |bench| Box::pin(destroy(bench))),
];

async fn create(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    assert_eq!(state(&*driver, record.id).await, HeadState::Clean);
    let picture = look_at_head(&*driver, record.id, Access::ReadWrite).await;
    assert_eq!(picture.len(), 1, "only the root");
    assert_eq!(picture[&Vec::new()].mode & 0o7777, 0o755);
    assert!(driver.lineage(record.id).await.expect("a lineage").snapshots.is_empty());
    drop(driver);
    let scan = bench.open("a").await.scan().await.expect("a scan");
    assert_eq!(scan.volumes, [(record, Vec::new())]);
    assert!(scan.orphans.is_empty(), "{:?}", scan.orphans);
}

async fn set_record(bench: &Bench) {
    let driver = bench.open("a").await;
    let mut record = volume("db");
    driver.create(&record).await.expect("created");
    let held = take(&*driver, record.id, "one").await;
    record.name = "other".parse().expect("a name");
    record.metadata = [("k".repeat(100), "v".repeat(60_000))].into();
    (record.role, record.epoch) = (Role::Replica, u64::MAX);
    driver.set_record(&record).await.expect("set");
    drop(driver);
    let driver = bench.open("a").await;
    assert_eq!(driver.scan().await.expect("a scan").volumes, [(record.clone(), vec![held])]);
    record.metadata = [("k".to_owned(), "v".repeat(70_000))].into();
    assert!(driver.set_record(&record).await.is_err(), "too much metadata");
}

async fn not_found(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    let (strange, id) = (VolumeId::mint(), SnapshotId::mint());
    let is_missing = |kind: &ErrorKind| matches!(kind, ErrorKind::NotFound);
    for volume in [strange, record.id] {
        let key = SnapshotKey { volume, snapshot: id };
        refused(driver.forget(key).await, "forget", is_missing);
        refused(driver.rewind(key).await, "rewind", is_missing);
        refused(driver.verify(key, Compare::Metadata).await, "verify", is_missing);
        refused(driver.attach(Target::Snapshot(volume, id), Access::ReadOnly).await, "attach", is_missing);
        let clone = VolumeRecord { origin: Some(key), ..super::volume("clone") };
        refused((*driver).clone_from(&clone).await, "clone", is_missing);
        refused(driver.split(key, &clone).await, "split", is_missing);
    }
    refused(driver.destroy(strange).await, "destroy", is_missing);
    refused(driver.lineage(strange).await, "lineage", is_missing);
    refused(driver.head_state(strange).await, "head state", is_missing);
    refused(driver.attach(Target::Head(strange), Access::ReadOnly).await, "attach", is_missing);
    refused(driver.set_record(&volume("strange")).await, "set", is_missing);
    let request = SnapshotRequest { volume: strange, snapshot: snapshot("s", &[]), compare: Compare::Metadata };
    refused(driver.snapshot(&[request]).await, "snapshot", is_missing);
    driver.detach(Target::Head(strange)).await.expect("detach is idempotent");
    driver.discard_partial(strange).await.expect("nothing to discard");
    assert_eq!(driver.partial(strange).await.expect("no partial"), None);
}

async fn taken(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    let is_taken = |kind: &ErrorKind| matches!(kind, ErrorKind::AlreadyExists);
    refused(driver.create(&record).await, "create", is_taken);
    let held = take(&*driver, record.id, "one").await;
    let again = SnapshotRequest { volume: record.id, snapshot: held.snapshot.clone(), compare: Compare::Metadata };
    refused(driver.snapshot(&[again]).await, "snapshot", is_taken);
    let clone = VolumeRecord { origin: Some(held.key()), ..record };
    refused((*driver).clone_from(&clone).await, "clone", is_taken);
}

async fn snapshot_holds(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    let first = look_at_head(&*driver, record.id, Access::ReadWrite).await;
    let one = take(&*driver, record.id, "one").await;
    assert_eq!(one.logical_bytes, 5 + 700_000 + 1 + 9 + 6 + 3_000_000);
    write(&*driver, record.id, refurbish).await;
    let second = look_at_head(&*driver, record.id, Access::ReadWrite).await;
    let two = take(&*driver, record.id, "two").await;
    write(&*driver, record.id, |head| fs::write(head.join("third"), "3").expect("write")).await;
    let check = |one: super::Picture, two: super::Picture| {
        assert_eq!(one, first);
        assert_eq!(two, second);
    };
    check(look_at(&*driver, one.key()).await, look_at(&*driver, two.key()).await);
    drop(driver);
    let driver = bench.open("a").await;
    check(look_at(&*driver, one.key()).await, look_at(&*driver, two.key()).await);
    assert_eq!(driver.lineage(record.id).await.expect("a lineage").snapshots, [one, two]);
}

async fn head_state(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    assert_eq!(state(&*driver, record.id).await, HeadState::Dirty, "no snapshot yet");
    take(&*driver, record.id, "one").await;
    assert_eq!(state(&*driver, record.id).await, HeadState::Clean);
    look_at_head(&*driver, record.id, Access::ReadWrite).await;
    assert_eq!(state(&*driver, record.id).await, HeadState::Clean, "reading changes nothing");
    write(&*driver, record.id, |head| fs::write(head.join("sub/small"), "SMALL").expect("write")).await;
    assert_eq!(state(&*driver, record.id).await, HeadState::Dirty, "same size");
    drop(driver);
    let driver = bench.open("a").await;
    assert_eq!(state(&*driver, record.id).await, HeadState::Dirty, "after a reopen");
    take(&*driver, record.id, "two").await;
    drop(driver);
    assert_eq!(state(&*bench.open("a").await, record.id).await, HeadState::Clean, "after a reopen");
}

async fn racy(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    let path = driver.attach(Target::Head(record.id), Access::ReadWrite).await.expect("attached");
    let file = path.join("file");
    for round in 0..30_u8 {
        // The same size and, put back, the same mtime: only the ctime can tell, and its clock moves slowly.
        fs::write(&file, [round; 64]).expect("write");
        let stamp = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        fs::File::options().write(true).open(&file).and_then(|file| file.set_modified(stamp)).expect("set time");
        let held = take(&*driver, record.id, &format!("s{round}")).await;
        assert_eq!(look_at(&*driver, held.key()).await[&b"file".to_vec()].contents, [round; 64]);
    }
}

async fn unchanged(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    assert!(!take(&*driver, record.id, "one").await.unchanged, "it has no parent");
    let two = take(&*driver, record.id, "two").await;
    assert!(two.unchanged);
    let request = SnapshotRequest {
        volume: record.id,
        snapshot: snapshot("three", &[two.snapshot.id]),
        compare: Compare::Contents,
    };
    assert!(driver.snapshot(&[request]).await.expect("taken")[0].held.unchanged, "all read");
    write(&*driver, record.id, |head| fs::remove_file(head.join("sub/link")).expect("remove")).await;
    assert!(!take(&*driver, record.id, "four").await.unchanged);
}

async fn group(bench: &Bench) {
    let driver = bench.open("a").await;
    let (one, two) = (volume("one"), volume("two"));
    driver.create(&one).await.expect("created");
    driver.create(&two).await.expect("created");
    let request = |volume| SnapshotRequest { volume, snapshot: snapshot("s", &[]), compare: Compare::Metadata };
    refused(driver.snapshot(&[request(one.id), request(VolumeId::mint())]).await, "one is missing", |kind| {
        matches!(kind, ErrorKind::NotFound)
    });
    assert!(driver.lineage(one.id).await.expect("a lineage").snapshots.is_empty());
    let reports = driver.snapshot(&[request(one.id), request(two.id)]).await.expect("taken");
    assert_eq!(reports.iter().map(|report| report.held.volume).collect::<Vec<_>>(), [one.id, two.id]);
}

async fn attach(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    let held = take(&*driver, record.id, "one").await;
    let target = Target::Snapshot(record.id, held.snapshot.id);
    assert!(driver.attach(target, Access::ReadWrite).await.is_err(), "a snapshot for writing");
    let path = driver.attach(target, Access::ReadOnly).await.expect("attached");
    assert_eq!(driver.attach(target, Access::ReadOnly).await.expect("attached again"), path);
    refused(driver.forget(held.key()).await, "attached", |kind| {
        matches!(kind, ErrorKind::Blocked(Blockers { attached: true, .. }))
    });
    driver.detach(target).await.expect("detached");
    driver.detach(target).await.expect("detached again");
    driver.forget(held.key()).await.expect("forgotten");
}

async fn forget(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    let one = take(&*driver, record.id, "one").await;
    write(&*driver, record.id, refurbish).await;
    let two = take(&*driver, record.id, "two").await;
    let three = take(&*driver, record.id, "three").await;
    let (first, second) = (look_at(&*driver, one.key()).await, look_at(&*driver, two.key()).await);
    driver.forget(two.key()).await.expect("forgotten");
    assert_eq!(look_at(&*driver, one.key()).await, first);
    assert_eq!(look_at(&*driver, three.key()).await, second);
    driver.forget(three.key()).await.expect("forgotten");
    assert_eq!(look_at_head(&*driver, record.id, Access::ReadWrite).await, second);
    assert_eq!(state(&*driver, record.id).await, HeadState::Dirty, "the head has what no snapshot holds now");
    let four = take(&*driver, record.id, "four").await;
    assert_eq!(look_at(&*driver, four.key()).await, second);
    driver.forget(one.key()).await.expect("forgotten");
    driver.forget(four.key()).await.expect("forgotten");
    assert_eq!(look_at_head(&*driver, record.id, Access::ReadWrite).await, second);
    drop(driver);
    assert_eq!(bench.open("a").await.scan().await.expect("a scan").volumes, [(record, Vec::new())]);
}

async fn rewind(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    let one = take(&*driver, record.id, "one").await;
    let first = look_at(&*driver, one.key()).await;
    write(&*driver, record.id, refurbish).await;
    let two = take(&*driver, record.id, "two").await;
    refused(
        driver.rewind(one.key()).await,
        "newer",
        |kind| matches!(kind, ErrorKind::Blocked(blockers) if blockers.newer == [two.snapshot.id]),
    );
    driver.forget(two.key()).await.expect("forgotten");
    driver.attach(Target::Head(record.id), Access::ReadWrite).await.expect("attached");
    refused(driver.rewind(one.key()).await, "attached", |kind| {
        matches!(kind, ErrorKind::Blocked(Blockers { attached: true, .. }))
    });
    driver.detach(Target::Head(record.id)).await.expect("detached");
    driver.rewind(one.key()).await.expect("rewound");
    assert_eq!(state(&*driver, record.id).await, HeadState::Clean);
    assert_eq!(look_at_head(&*driver, record.id, Access::ReadWrite).await, first);
    write(&*driver, record.id, |head| fs::write(head.join("sub/small"), "other").expect("write")).await;
    assert_eq!(look_at(&*driver, one.key()).await, first, "the snapshot shares nothing writable with the head");
    let three = take(&*driver, record.id, "three").await;
    assert!(!three.unchanged);
}

async fn clone(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    let one = take(&*driver, record.id, "one").await;
    let first = look_at(&*driver, one.key()).await;
    let copy = VolumeRecord { origin: Some(one.key()), ..volume("copy") };
    (*driver).clone_from(&copy).await.expect("cloned");
    assert_eq!(look_at_head(&*driver, copy.id, Access::ReadWrite).await, first);
    assert_eq!(state(&*driver, copy.id).await, HeadState::Clean);
    let same = take(&*driver, copy.id, "same").await;
    assert!(same.unchanged);
    write(&*driver, copy.id, refurbish).await;
    let changed = take(&*driver, copy.id, "changed").await;
    assert_eq!(look_at(&*driver, one.key()).await, first);
    assert_eq!(look_at_head(&*driver, record.id, Access::ReadWrite).await, first);
    assert_ne!(look_at(&*driver, changed.key()).await, first);
    assert_eq!(state(&*driver, record.id).await, HeadState::Clean);
    assert_eq!(driver.lineage(copy.id).await.expect("a lineage").snapshots, [one, same, changed]);
}

async fn blocked(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    let one = take(&*driver, record.id, "one").await;
    let two = take(&*driver, record.id, "two").await;
    let copy = VolumeRecord { origin: Some(one.key()), ..volume("copy") };
    (*driver).clone_from(&copy).await.expect("cloned");
    let by_clone = |kind: &ErrorKind| matches!(kind, ErrorKind::Blocked(blockers) if blockers.clones == [copy.id]);
    refused(driver.destroy(record.id).await, "a clone", by_clone);
    refused(driver.forget(one.key()).await, "a clone", by_clone);
    driver.forget(two.key()).await.expect("no clone of this one");
    driver.attach(Target::Head(copy.id), Access::ReadOnly).await.expect("attached");
    refused(driver.destroy(copy.id).await, "attached", |kind| {
        matches!(kind, ErrorKind::Blocked(Blockers { attached: true, .. }))
    });
    driver.detach(Target::Head(copy.id)).await.expect("detached");
    driver.destroy(copy.id).await.expect("destroyed");
    driver.destroy(record.id).await.expect("destroyed");
    assert!(driver.scan().await.expect("a scan").volumes.is_empty());
}

async fn lineage(bench: &Bench) {
    let driver = bench.open("a").await;
    let a = volume("a");
    driver.create(&a).await.expect("created");
    let a1 = take(&*driver, a.id, "a1").await;
    let a2 = take(&*driver, a.id, "a2").await;
    let b = VolumeRecord { origin: Some(a1.key()), ..volume("b") };
    (*driver).clone_from(&b).await.expect("cloned");
    let b1 = take(&*driver, b.id, "b1").await;
    let c = VolumeRecord { origin: Some(b1.key()), ..volume("c") };
    (*driver).clone_from(&c).await.expect("cloned");
    let c1 = take(&*driver, c.id, "c1").await;
    drop(driver);
    let driver = bench.open("a").await;
    let of = |volume| {
        let driver = &driver;
        async move { driver.lineage(volume).await.expect("a lineage").snapshots }
    };
    assert_eq!(of(a.id).await, [a1.clone(), a2]);
    assert_eq!(of(b.id).await, [a1.clone(), b1.clone()]);
    assert_eq!(of(c.id).await, [a1, b1, c1]);
}

async fn split(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    let one = take(&*driver, record.id, "one").await;
    write(&*driver, record.id, refurbish).await;
    let two = take(&*driver, record.id, "two").await;
    let (first, second) = (look_at(&*driver, one.key()).await, look_at(&*driver, two.key()).await);
    let early = VolumeRecord { origin: Some(one.key()), ..volume("early") };
    let late = VolumeRecord { origin: Some(two.key()), ..volume("late") };
    (*driver).clone_from(&early).await.expect("cloned");
    (*driver).clone_from(&late).await.expect("cloned");
    write(&*driver, record.id, |head| fs::write(head.join("unsaved"), "1").expect("write")).await;
    let head = look_at_head(&*driver, record.id, Access::ReadWrite).await;
    let fork = VolumeRecord { origin: Some(one.key()), ..volume("fork") };
    driver.attach(Target::Head(record.id), Access::ReadWrite).await.expect("attached");
    refused(driver.split(one.key(), &fork).await, "attached", |kind| matches!(kind, ErrorKind::Blocked(_)));
    driver.detach(Target::Head(record.id)).await.expect("detached");
    driver.split(one.key(), &fork).await.expect("split");
    drop(driver);
    let driver = bench.open("a").await;
    let moved = super::HeldSnapshot { volume: fork.id, ..two };
    assert_eq!(driver.lineage(record.id).await.expect("a lineage").snapshots, std::slice::from_ref(&one));
    assert_eq!(driver.lineage(fork.id).await.expect("a lineage").snapshots, [one.clone(), moved.clone()]);
    assert_eq!(driver.lineage(late.id).await.expect("a lineage").snapshots, [one.clone(), moved.clone()]);
    assert_eq!(state(&*driver, record.id).await, HeadState::Clean);
    assert_eq!(state(&*driver, fork.id).await, HeadState::Dirty);
    assert_eq!(look_at_head(&*driver, record.id, Access::ReadWrite).await, first);
    assert_eq!(look_at_head(&*driver, fork.id, Access::ReadWrite).await, head);
    assert_eq!(look_at(&*driver, moved.key()).await, second);
    let scan = driver.scan().await.expect("a scan");
    let origin = |id| scan.volumes.iter().find(|(record, _)| record.id == id).and_then(|(record, _)| record.origin);
    assert_eq!(origin(late.id), Some(moved.key()), "the clone of a moved snapshot follows it");
    assert_eq!(origin(early.id), Some(one.key()));
    assert!(scan.orphans.is_empty());
    assert!(!take(&*driver, fork.id, "three").await.unchanged);
    assert!(take(&*driver, record.id, "three").await.unchanged);
}

async fn verify(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    let one = take(&*driver, record.id, "one").await;
    write(&*driver, record.id, refurbish).await;
    let two = take(&*driver, record.id, "two").await;
    for key in [one.key(), two.key()] {
        assert_eq!(driver.verify(key, Compare::Metadata).await.expect("verified"), []);
        assert_eq!(driver.verify(key, Compare::Contents).await.expect("verified"), []);
    }
}

async fn orphans(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    drop(driver);
    if !bench.fixture.plant_stranger("a") {
        return;
    }
    let driver = bench.open("a").await;
    let scan = driver.scan().await.expect("a scan");
    assert_eq!(scan.volumes.len(), 1);
    assert_eq!(scan.orphans.len(), 1, "{:?}", scan.orphans);
    assert!(!scan.orphans[0].reason.is_empty() && !scan.orphans[0].place.is_empty());
    driver.destroy(record.id).await.expect("destroyed");
    drop(driver);
    assert_eq!(bench.open("a").await.scan().await.expect("a scan").orphans, scan.orphans);
}

async fn locked(bench: &Bench) {
    let driver = bench.open("a").await;
    refused(
        bench.fixture.open("a").await,
        "a second opener",
        |kind| matches!(kind, ErrorKind::PoolBusy { pid } if pid.is_none_or(|pid| pid == std::process::id())),
    );
    drop(driver);
    bench.open("a").await;
}

async fn quota(bench: &Bench) {
    let driver = bench.open("a").await;
    let limited = VolumeRecord { quota_bytes: Some(QUOTA), ..volume("limited") };
    if !driver.capabilities().quota {
        refused(driver.create(&limited).await, "no quota here", |kind| matches!(kind, ErrorKind::Unsupported(_)));
        assert!(driver.scan().await.expect("a scan").volumes.is_empty());
        return;
    }
    let free = volume("free");
    driver.create(&limited).await.expect("created");
    driver.create(&free).await.expect("created");
    write(&*driver, limited.id, |head| {
        let error = fill(head, 4 * QUOTA).expect_err("the quota was passed");
        assert!(matches!(ErrorKind::from_io(error), ErrorKind::NoSpace));
    })
    .await;
    write(&*driver, free.id, |head| fill(head, 2 * QUOTA).expect("only the other volume is limited")).await;
    let held = take(&*driver, limited.id, "full").await;
    assert_eq!(driver.verify(held.key(), Compare::Contents).await.expect("verified"), []);
}

/// The quota of a volume, in bytes.
const QUOTA: u64 = 16 << 20;

/// Writes data that no file system stores in less, durably piece by piece.
fn fill(head: &Path, bytes: u64) -> io::Result<()> {
    let file = fs::File::create(head.join("filler"))?;
    let mut seed = 1_u64;
    for _ in 0..bytes >> 20 {
        let words = (0..1 << 17).flat_map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed.rotate_left(29).to_le_bytes()
        });
        io::Write::write_all(&mut &file, &words.collect::<Vec<_>>())?;
        file.sync_data()?;
    }
    Ok(())
}

async fn destroy(bench: &Bench) {
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, furnish).await;
    take(&*driver, record.id, "one").await;
    driver.destroy(record.id).await.expect("destroyed");
    refused(driver.destroy(record.id).await, "again", |kind| matches!(kind, ErrorKind::NotFound));
    drop(driver);
    let driver = bench.open("a").await;
    assert!(driver.scan().await.expect("a scan").volumes.is_empty());
    driver.create(&record).await.expect("the id is free again");
    let path = driver.attach(Target::Head(record.id), Access::ReadWrite).await.expect("attached");
    assert_eq!(look(&path).len(), 1);
    let usage = driver.usage().await.expect("a usage");
    assert!(usage.available_bytes > 0 && usage.available_bytes <= usage.total_bytes);
}
