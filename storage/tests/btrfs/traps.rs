//! The traps of send and receive, closed: changed parents, foreign bases, what lies inside a volume.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use bytes::Bytes;
use flocker_storage::{
    delta::{Compare, DeltaFormat, DeltaRequest},
    driver::{Driver, Target},
    error::ErrorKind,
    model::{HeldSnapshot, Role, VolumeRecord},
    tree::listing,
};

use crate::{rig::*, support};

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

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_parent_is_not_used_and_the_copy_is_right() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, two) = pair(&mount).await;
    let (pool, other) = (mount.path().join("a"), mount.path().join("b"));
    tamper(&tree(&pool, &one), &tree(&pool, &two));
    assert!(!a.verify(one.key(), Compare::Metadata).await.unwrap().is_empty(), "it is noticed");
    assert_eq!(findings(&*a, &one, &two, &native(&*a)[0]).await.len(), 1, "the user is told");
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

/// Reads a delta to its end and returns what the user is to be told of it.
async fn findings(
    driver: &dyn Driver,
    base: &flocker_storage::model::HeldSnapshot,
    target: &flocker_storage::model::HeldSnapshot,
    format: &DeltaFormat,
) -> Vec<String> {
    let (base, target) = (Some(base.key()), target.key());
    let request = DeltaRequest { base, target, format: format.clone(), compare: Compare::Metadata, resume: None };
    let mut reader = driver.read_delta(request).await.unwrap();
    while reader.next().await.unwrap().is_some() {}
    reader.take_findings().into_iter().map(|finding| format!("{}: {}", finding.path, finding.what)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_native_step_onto_a_base_that_lacks_what_the_portable_format_leaves_out_is_unfit() {
    let Some(mount) = mount() else { return };
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let b = support::open_with("btrfs", &mount.path().join("b")).await.unwrap();
    let volume = record("db");
    a.create(&volume).await.unwrap();
    let head = head(&*a, volume.id).await;
    fs::write(head.join("data"), "1").unwrap();
    std::os::unix::net::UnixListener::bind(head.join("socket")).unwrap();
    let zero = try_take(&*a, volume.id).await.unwrap();
    fs::write(head.join("data"), "2").unwrap();
    let one = try_take(&*a, volume.id).await.unwrap();
    fs::remove_file(head.join("socket")).unwrap();
    let two = try_take(&*a, volume.id).await.unwrap();
    let (tree_format, formats) = (DeltaFormat::tree(), native(&*a));
    push(&*a, &*b, &volume, None, &zero, &tree_format).await;
    let told = findings(&*a, &zero, &one, &tree_format).await;
    assert_eq!(told, ["socket: it is a socket, which is left out"]);
    // What the base lacks does not matter until a step touches it.
    push(&*a, &*b, &volume, Some(&zero), &one, &formats[0]).await;
    b.forget(one.key()).await.unwrap();
    push(&*a, &*b, &volume, Some(&zero), &one, &tree_format).await;
    for format in formats {
        let chunks = read(&*a, Some(&one), &two, &format).await.unwrap();
        let error = take_in(&*b, &volume, Some(&one), &two, &format, &chunks).await.unwrap_err();
        assert!(matches!(error.kind, ErrorKind::FormatUnfit(_)), "{format}: {error:?}");
        assert_eq!(b.lineage(volume.id).await.unwrap().snapshots.len(), 2);
    }
    push(&*a, &*b, &volume, Some(&one), &two, &tree_format).await;
    let at = |pool: &str| tree(&mount.path().join(pool), &two);
    assert_eq!(listing::differences(&at("a"), &at("b")).unwrap(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_was_put_back_keeps_its_chain() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, two) = pair(&mount).await;
    let format = &native(&*a)[0];
    a.detach(Target::Head(volume.id)).await.unwrap();
    a.forget(two.key()).await.unwrap();
    a.rewind(one.key()).await.unwrap();
    fs::write(head(&*a, volume.id).await.join("small"), "small").unwrap();
    let three = try_take(&*a, volume.id).await.unwrap();
    let bytes = push(&*a, &*b, &volume, Some(&one), &three, format).await;
    assert!(bytes < 5_000, "{bytes} bytes for a small file");
    // And at the receiver, after its own promotion.
    b.set_record(&volume).await.unwrap();
    b.rewind(three.key()).await.unwrap();
    fs::write(head(&*b, volume.id).await.join("more"), "more").unwrap();
    let four = try_take(&*b, volume.id).await.unwrap();
    a.set_record(&VolumeRecord { role: Role::Replica, ..volume.clone() }).await.unwrap();
    a.detach(Target::Head(volume.id)).await.unwrap();
    let bytes = push(&*b, &*a, &volume, Some(&three), &four, format).await;
    assert!(bytes < 5_000, "{bytes} bytes for a small file");
    let at = |pool: &str| tree(&mount.path().join(pool), &four);
    assert_eq!(listing::differences(&at("a"), &at("b")).unwrap(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_data_travels_as_it_lies() {
    let Some(mount) = mount() else { return };
    must("mount", &["-o", "remount,compress-force=zstd", mount.path().to_str().unwrap()]);
    let a = support::open_with("btrfs", &mount.path().join("a")).await.unwrap();
    let b = support::open_with("btrfs", &mount.path().join("b")).await.unwrap();
    if native(&*a)[0].0 != "btrfs-send/2" {
        support::have("a kernel and programs of send stream version 2", false);
        return;
    }
    let volume = record("db");
    a.create(&volume).await.unwrap();
    fs::write(head(&*a, volume.id).await.join("data"), vec![7; 16 << 20]).unwrap();
    let one = try_take(&*a, volume.id).await.unwrap();
    let bytes = push(&*a, &*b, &volume, None, &one, &native(&*a)[0]).await;
    assert!(bytes < 2 << 20, "16 MiB took {bytes} bytes");
    let at = |pool: &str| tree(&mount.path().join(pool), &one);
    assert_eq!(listing::differences(&at("a"), &at("b")).unwrap(), [""; 0]);
}

/// Returns the stream with another number of bytes in its preamble: eight bytes of magic, the entries, the bytes.
fn announcing(stream: &[Bytes], logical_bytes: u64) -> Vec<Bytes> {
    let mut all = stream.concat();
    all[16..24].copy_from_slice(&logical_bytes.to_le_bytes());
    vec![all.into()]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_built_on_the_senders_own_base_is_not_counted_and_all_else_is() {
    let Some(mount) = mount() else { return };
    let (a, b, volume, one, two) = pair(&mount).await;
    let format = &native(&*a)[0];
    let whole = announcing(&read(&*a, None, &one, format).await.unwrap(), one.logical_bytes + 1);
    let step = announcing(&read(&*a, Some(&one), &two, format).await.unwrap(), two.logical_bytes + 1);
    let other = record("other");
    let refused = take_in(&*b, &other, None, &one, format, &whole).await.unwrap_err();
    assert!(matches!(&refused.kind, ErrorKind::Corrupt(why) if why.contains("announced")), "{refused:?}");
    // The same base, which came in another format.
    push(&*a, &*b, &other, None, &one, &DeltaFormat::tree()).await;
    let there = HeldSnapshot { volume: other.id, ..one.clone() };
    let refused = take_in(&*b, &other, Some(&there), &two, format, &step).await.unwrap_err();
    assert!(matches!(&refused.kind, ErrorKind::FormatUnfit(why) if why.contains("announced")), "{refused:?}");
    let taken = take_in(&*b, &volume, Some(&one), &two, format, &step).await.unwrap();
    assert_eq!(taken.logical_bytes, two.logical_bytes + 1, "nobody looked at what had not changed");
    let at = |pool: &str| tree(&mount.path().join(pool), &two);
    assert_eq!(listing::differences(&at("a"), &at("b")).unwrap(), [""; 0]);
}
