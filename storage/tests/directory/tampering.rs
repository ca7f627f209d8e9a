//! Snapshots that somebody has changed behind the node's back: what is noticed, and that none of it is carried on.

use std::{
    fs, io,
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use flocker_storage::{
    delta::Compare,
    driver::{Access, Target},
    error::{Error, ErrorKind},
    model::VolumeRecord,
};

use super::{arriving, delta_bytes, record, take, tree, volume_in};

/// A way to change a snapshot's tree behind the node's back.
type Tampering = fn(&Path) -> io::Result<()>;

/// How long before a snapshot its files were written: files that were written in the moment before are read by the next
/// one, the others are judged by their stats and linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Age {
    Fresh,
    Settled,
}

/// Waits for the file system's clock to leave a file behind by more than what counts as the same moment (50 ms).
fn settle(file: &Path) {
    let probe = tempfile::NamedTempFile::new_in(file.parent().unwrap()).unwrap();
    let written = fs::metadata(file).unwrap().modified().unwrap();
    let now = || {
        probe.as_file().write_all_at(b"x", 0).unwrap();
        probe.as_file().metadata().unwrap().modified().unwrap()
    };
    while now() <= written + Duration::from_millis(60) {
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn tampering_with_a_snapshot_is_noticed_and_not_carried_on() {
    let ways: [(&str, &str, Tampering); 13] = [
        ("a", "extended attributes", |tree| set_attribute(&tree.join("a"))),
        ("sub", "extended attributes", |tree| set_attribute(&tree.join("sub"))),
        ("a", "size", |tree| fs::write(tree.join("a"), "longer than before")),
        ("a", "modification time", |tree| fs::write(tree.join("a"), "A")),
        ("a", "mode", |tree| fs::set_permissions(tree.join("a"), fs::Permissions::from_mode(0o777))),
        ("a", "missing", |tree| fs::remove_file(tree.join("a"))),
        ("extra", "added", |tree| fs::write(tree.join("extra"), "")),
        ("a", "another inode", |tree| {
            let time = fs::metadata(tree.join("a"))?.modified()?;
            fs::remove_file(tree.join("a"))?;
            // Something takes the freed inode's number first.
            fs::write(tree.parent().unwrap_or(tree).join("other"), "")?;
            fs::write(tree.join("a"), "1")?;
            fs::set_permissions(tree.join("a"), fs::Permissions::from_mode(0o640))?;
            fs::File::options().write(true).open(tree.join("a"))?.set_modified(time)?;
            restore_time(tree)
        }),
        ("a", "changed from", |tree| {
            fs::remove_file(tree.join("a"))?;
            std::os::unix::fs::symlink("../../../volume.json", tree.join("a"))
        }),
        ("a", "changed from", |tree| {
            fs::remove_file(tree.join("a"))?;
            let kind = rustix::fs::FileType::Fifo;
            Ok(rustix::fs::mknodat(rustix::fs::CWD, tree.join("a"), kind, rustix::fs::Mode::RUSR, 0)?)
        }),
        ("a", "changed from", |tree| {
            fs::remove_file(tree.join("a"))?;
            fs::create_dir(tree.join("a"))
        }),
        ("link", "target", |tree| {
            fs::remove_file(tree.join("link"))?;
            std::os::unix::fs::symlink("elsewhere", tree.join("link"))
        }),
        ("sub", "changed from", |tree| {
            fs::remove_dir(tree.join("sub"))?;
            fs::write(tree.join("sub"), "")
        }),
    ];
    for ((path, words, tamper), age) in ways.into_iter().flat_map(|way| [(way, Age::Fresh), (way, Age::Settled)]) {
        let place = tempfile::tempdir().unwrap();
        let (driver, volume, head) = volume_in(place.path()).await;
        fs::write(head.join("a"), "1").unwrap();
        fs::set_permissions(head.join("a"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::create_dir(head.join("sub")).unwrap();
        std::os::unix::fs::symlink("target", head.join("link")).unwrap();
        let one = take(&*driver, volume.id).await;
        fs::write(head.join("new"), "2").unwrap();
        if age == Age::Settled {
            settle(&head.join("new"));
        }
        let two = take(&*driver, volume.id).await;
        tamper(&tree(place.path(), &two)).unwrap();
        let findings = driver.verify(two.key(), Compare::Metadata).await.unwrap();
        let found = findings.iter().any(|finding| finding.path == path && finding.what.contains(words));
        assert!(found, "{path} {words}: {findings:?}");
        let is_noticed = |error: Error| assert!(matches!(error.kind, ErrorKind::Tampered { .. }), "{:?}", error.kind);
        is_noticed(delta_bytes(&*driver, &one, &two).await.unwrap_err());
        is_noticed(delta_bytes(&*driver, None, &two).await.unwrap_err());
        let target = Target::Snapshot(two.volume, two.snapshot.id);
        is_noticed(driver.attach(target, Access::ReadOnly).await.unwrap_err());
        let clone = VolumeRecord { origin: Some(two.key()), ..record("clone") };
        is_noticed((*driver).clone_from(&clone).await.unwrap_err());
        let three = take(&*driver, volume.id).await;
        let three = tree(place.path(), &three);
        let case = format!("{path} {words} {age:?}");
        assert_eq!(fs::read_to_string(three.join("a")).unwrap(), "1", "{case}");
        let mode = |name| fs::symlink_metadata(three.join(name)).unwrap().permissions().mode();
        assert_eq!((mode("a"), mode("sub") & 0o170_000), (0o100_640, 0o040_000), "{case}");
        assert_eq!(fs::read_link(three.join("link")).unwrap(), Path::new("target"), "{case}");
        assert_eq!(rustix::fs::getxattr(three.join(path), "user.x", &mut [0; 8]).ok(), None, "{case}");
        assert!(!three.join("extra").exists(), "{case}");
    }
}

pub(super) fn set_attribute(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::setxattr(path, "user.x", b"y", rustix::fs::XattrFlags::empty())?)
}

/// Puts back the time of a directory, which the test's own changes moved.
fn restore_time(tree: &Path) -> io::Result<()> {
    fs::File::open(tree)?.set_modified(fs::metadata(tree.join("sub"))?.modified()?)
}

/// Changes bytes of a file so that no stat shows it but the ctime, as a failing disk or a patient hand does.
pub(super) fn rot(file: &Path) {
    let modified = fs::metadata(file).unwrap().modified().unwrap();
    let opened = fs::File::options().write(true).open(file).unwrap();
    opened.write_all_at(b"x", 3).unwrap();
    opened.set_modified(modified).unwrap();
}

#[tokio::test]
async fn contents_that_rot_with_all_metadata_intact_are_found_by_reading_at_both_ends() {
    let (place, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (sender, volume, head) = volume_in(place.path()).await;
    fs::write(head.join("page"), vec![7; 300_000]).unwrap();
    let taken = take(&*sender, volume.id).await;
    let (receiver, _, _) = volume_in(other.path()).await;
    let received = arriving(&*sender, &*receiver, &volume, None, &taken).await.commit().await.unwrap();
    for (driver, pool, held) in [(&sender, place.path(), &taken), (&receiver, other.path(), &received)] {
        assert_eq!(driver.verify(held.key(), Compare::Contents).await.unwrap(), []);
        rot(&tree(pool, held).join("page"));
        assert_eq!(driver.verify(held.key(), Compare::Metadata).await.unwrap(), []);
        let found = driver.verify(held.key(), Compare::Contents).await.unwrap();
        assert_eq!((found.len(), found[0].path.as_str()), (1, "page"), "{found:?}");
    }
}
