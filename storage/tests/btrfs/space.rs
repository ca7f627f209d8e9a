//! Full disks, quotas, and the space of what was deleted.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use flocker_storage::{
    delta::{DeltaFormat, ReceiveRequest},
    driver::{Driver, Target},
    drivers,
    error::ErrorKind,
    model::{HeldSnapshot, Role, VolumeId, VolumeRecord},
};

use crate::{
    rig::*,
    support::{self, LoopMount},
};

/// Waits until a pool has as much space as before, but for a little; threads may still be at it.
async fn wait_for_space(driver: &dyn Driver, before: u64, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while driver.usage().await.unwrap().available_bytes + (16 << 20) < before {
        assert!(Instant::now() < deadline, "{what}: the space comes back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_during_a_receive_is_said_in_words_and_leaves_the_pool_as_it_was() {
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
    fs::write(head.join("large"), noise(224_000_000)).unwrap();
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
        wait_for_space(&*b, before, &format.0).await;
    }
}

/// Writes files of less and less until not one byte fits; returns what was written.
fn fill(folder: &Path) -> usize {
    fs::create_dir(folder).unwrap();
    let mut number = 0;
    for size in [8 << 20, 64 << 10, 3000, 1] {
        loop {
            number += 1;
            match fs::write(folder.join(number.to_string()), noise(size)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    number
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_every_verb_says_so_and_changes_nothing() {
    // Data and metadata in the same blocks: when they are full nothing is left for either.
    let Some(mount) = LoopMount::try_new("btrfs", 160 << 20, &["-q", "--mixed"]) else { return };
    let Some(other) = self::mount() else { return };
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let sender = support::open_with("btrfs", &other.path().join("sender")).await.unwrap();
    let (volume, sent) = (record("db"), record("sent"));
    a.create(&volume).await.unwrap();
    fs::write(head(&*a, volume.id).await.join("data"), noise(1 << 20)).unwrap();
    let one = try_take(&*a, volume.id).await.unwrap();
    sender.create(&sent).await.unwrap();
    fs::write(head(&*sender, sent.id).await.join("data"), noise(1 << 20)).unwrap();
    let arriving = try_take(&*sender, sent.id).await.unwrap();
    fs::write(head(&*a, volume.id).await.join("data"), noise(2 << 20)).unwrap();
    a.detach(Target::Head(volume.id)).await.unwrap();
    let before = a.scan().await.unwrap();
    let filler = mount.path().join("filler");
    assert!(fill(&filler) > 10);

    let clone = VolumeRecord { origin: Some(one.key()), ..record("clone") };
    let refused = |what: &str, result: Result<(), flocker_storage::error::Error>| {
        let error = result.expect_err(what);
        assert!(matches!(error.kind, ErrorKind::NoSpace), "{what}: {error:?}");
    };
    refused("create", a.create(&record("new")).await);
    refused("snapshot", try_take(&*a, volume.id).await.map(|_| ()));
    refused("clone", (*a).clone_from(&clone).await);
    refused("rewind", a.rewind(one.key()).await);
    for format in [native(&*a), vec![DeltaFormat::tree()]].concat() {
        let chunks = read(&*sender, None, &arriving, &format).await.unwrap();
        refused(&format.0, take_in(&*a, &sent, None, &arriving, &format, &chunks).await.map(|_| ()));
    }
    let after = a.scan().await.unwrap();
    assert_eq!((after.volumes, after.orphans), (before.volumes, before.orphans));
    assert_eq!(a.verify(one.key(), flocker_storage::delta::Compare::Contents).await.unwrap(), []);

    fs::remove_dir_all(&filler).unwrap();
    let two = try_take(&*a, volume.id).await.unwrap();
    assert_eq!(two.logical_bytes, 2 << 20, "the head is as it was written");
    (*a).clone_from(&clone).await.unwrap();
    push(&*sender, &*a, &sent, None, &arriving, &native(&*a)[0]).await;
    drop(a);
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    for folder in ["staging", "trash"] {
        assert_eq!(fs::read_dir(mount.path().join("a").join(folder)).unwrap().count(), 0, "{folder}");
    }
    assert_eq!(a.scan().await.unwrap().volumes.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_space_of_a_destroyed_volume_is_there_when_it_is_asked_for() {
    let Some(mount) = mount() else { return };
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let volume = record("db");
    a.create(&volume).await.unwrap();
    fs::write(head(&*a, volume.id).await.join("data"), noise(200 << 20)).unwrap();
    try_take(&*a, volume.id).await.unwrap();
    a.detach(Target::Head(volume.id)).await.unwrap();
    let before = a.usage().await.unwrap();
    a.destroy(volume.id).await.unwrap();
    let after = a.usage().await.unwrap();
    assert!(after.available_bytes >= before.available_bytes + (190 << 20), "{before:?} {after:?}");
    assert_eq!(after.total_bytes, before.total_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_stops_at_its_quota_and_the_others_do_not() {
    let Some(mount) = LoopMount::try_new("btrfs", 512 << 20, &["-q"]) else { return };
    btrfs(&["quota", "enable"], &[mount.path()]);
    let place = mount.path().join("a");
    let open = || support::open_with("btrfs", &place);
    let a = open().await.unwrap();
    assert!(a.capabilities().quota && a.capabilities().facts["quotas"].starts_with("on"));
    let small = VolumeRecord { quota_bytes: Some(20 << 20), ..record("small") };
    let free = record("free");
    a.create(&small).await.unwrap();
    a.create(&free).await.unwrap();
    // As a database would write: whether there is space shows at the write or when it is made durable.
    let write = |folder: &Path, name: &str, mebibytes: usize| -> io::Result<()> {
        let file = fs::File::create(folder.join(name))?;
        for _ in 0..mebibytes {
            io::Write::write_all(&mut &file, &noise(1 << 20))?;
            file.sync_data()?;
        }
        Ok(())
    };
    let is_full = |result: io::Result<()>| {
        let error = result.expect_err("the quota holds");
        assert!(matches!(ErrorKind::from_io(error), ErrorKind::NoSpace));
    };
    let here = head(&*a, small.id).await;
    write(&here, "fits", 8).unwrap();
    is_full(write(&here, "does-not", 30));
    write(&head(&*a, free.id).await, "data", 40).unwrap();
    fs::remove_file(here.join("does-not")).unwrap();
    must("btrfs", &["filesystem", "sync", mount.path().to_str().unwrap()]);
    let one = try_take(&*a, small.id).await.unwrap();

    // The head that a rollback puts in place is held, too, and so are a clone's and one that is made late.
    a.detach(Target::Head(small.id)).await.unwrap();
    a.rewind(one.key()).await.unwrap();
    is_full(write(&head(&*a, small.id).await, "does-not", 30));
    let clone = VolumeRecord { origin: Some(one.key()), quota_bytes: small.quota_bytes, ..record("clone") };
    (*a).clone_from(&clone).await.unwrap();
    is_full(write(&head(&*a, clone.id).await, "does-not", 30));

    // A new quota holds at once, and none at all, too; after a reopen as well.
    let here = head(&*a, small.id).await;
    fs::remove_file(here.join("does-not")).unwrap();
    a.set_record(&VolumeRecord { quota_bytes: Some(60 << 20), ..small.clone() }).await.unwrap();
    write(&here, "more", 30).unwrap();
    drop(a);
    let a = open().await.unwrap();
    is_full(write(&head(&*a, small.id).await, "still-more", 40));
    a.set_record(&VolumeRecord { quota_bytes: None, ..small.clone() }).await.unwrap();
    write(&head(&*a, small.id).await, "still-more", 40).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_quotas_are_off_a_quota_is_refused_in_words() {
    let Some(mount) = mount() else { return };
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let volume = VolumeRecord { quota_bytes: Some(1 << 30), ..record("db") };
    let error = a.create(&volume).await.unwrap_err();
    assert!(matches!(&error.kind, ErrorKind::Unsupported(why) if why.contains("quota enable")), "{error:?}");
    assert!(a.scan().await.unwrap().volumes.is_empty());
    assert!(a.capabilities().facts["quotas"].starts_with("off"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_says_what_the_file_system_says_of_itself() {
    let Some(mount) = LoopMount::try_new("btrfs", 512 << 20, &["-q", "-m", "single"]) else { return };
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let facts = &a.capabilities().facts;
    assert_eq!((&*facts["profile of data"], &*facts["profile of metadata"]), ("single", "single"));
    assert!(facts["programs"].starts_with("btrfs-progs v"), "{facts:?}");
    assert!(["1", "2"].contains(&&*facts["send stream version"]), "{facts:?}");
    let usage = a.usage().await.unwrap();
    let said = must("btrfs", &["filesystem", "usage", "-b", mount.path().to_str().unwrap()]);
    let number = |key: &str| -> u64 {
        let line = said.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert_eq!(usage.total_bytes, number("Device size:"));
    let difference = usage.available_bytes.abs_diff(number("Free (estimated):"));
    assert!(difference < 8 << 20, "{usage:?}\n{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_arriving_goes_with_its_volume() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, _) = pair(&mount).await;
    fs::write(head(&*a, volume.id).await.join("large"), noise(80 << 20)).unwrap();
    let three = try_take(&*a, volume.id).await.unwrap();
    let format = DeltaFormat::tree();
    let chunks = read(&*a, Some(&one), &three, &format).await.unwrap();
    let replica = VolumeRecord { role: Role::Replica, ..volume.clone() };
    let (snapshot, base) = (three.snapshot.clone(), Some(one.key()));
    let request = ReceiveRequest { volume: replica, snapshot, base, format, resume: None };
    let mut receiving = b.receive(request).await.unwrap();
    for chunk in &chunks[..chunks.len() - 1] {
        receiving.write(chunk.clone()).await.unwrap();
    }
    assert!(receiving.suspend().await.unwrap().is_some());
    let partial = b.partial(volume.id).await.unwrap().unwrap();
    assert_eq!((partial.snapshot, partial.base), (three.snapshot, Some(one.key())));
    b.destroy(volume.id).await.unwrap();
    assert_eq!(b.partial(volume.id).await.unwrap(), None);
    assert_eq!(fs::read_dir(mount.path().join("b/staging")).unwrap().count(), 0);
}
