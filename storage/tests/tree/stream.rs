//! What the stream is: deterministic, small, cut anywhere, resumable.

use std::{
    fs,
    io::{Seek as _, SeekFrom, Write as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use bytes::Bytes;
use flocker_storage::{
    delta::{Compare, ResumePoint},
    error::ErrorKind,
    tree::{
        apply::Sharing,
        inventory::{InventoryEntry, InventoryReader, InventoryWriter},
        root::Root,
        walk::{Links, Walk},
        write::{DeltaWriter, Side},
    },
};

use rustix::fs::{AtFlags, Timespec, Timestamps};

use super::{
    everything::fill,
    rig::{
        Folder, Points, applier, apply, assert_equal, delta, drain, side, stage, stage_copied, stage_linked, writer,
    },
};

pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn the_same_trees_give_the_same_bytes() {
    let folder = Folder::new();
    let [source, copy] = ["source", "copy"].map(|name| folder.make(name));
    fill(&source);
    let stream = delta(None, &source);
    assert_eq!(stream, delta(None, &source));
    // Another file system's inode numbers and directory order do not show.
    stage_copied(&source, &copy);
    assert_eq!(stream, delta(None, &copy));
}

#[test]
fn equal_trees_give_an_empty_delta() {
    let folder = Folder::new();
    let [source, copy] = ["source", "copy"].map(|name| folder.make(name));
    fill(&source);
    stage_copied(&source, &copy);
    for compare in [Compare::Metadata, Compare::Contents] {
        for base in [&source, &copy] {
            let stream = drain(DeltaWriter::new(Some(side(base)), side(&source), compare, None).unwrap());
            assert!(stream.len() < 100, "{} bytes", stream.len());
        }
    }
}

#[test]
fn only_changed_blocks_travel() {
    let folder = Folder::new();
    let [base, target, dest] = ["base", "target", "dest"].map(|name| folder.make(name));
    fs::write(base.join("db"), noise(16 << 20, 1)).unwrap();
    fs::write(base.join("untouched"), noise(1 << 20, 2)).unwrap();
    stage_copied(&base, &target);
    let mut file = fs::File::options().write(true).open(target.join("db")).unwrap();
    for at in [0, 5_000_000, 9_999_999] {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(b"changed").unwrap();
    }
    drop(file);
    let stream = delta(Some(&base), &target);
    assert!(stream.len() < 20_000, "{} bytes", stream.len());
    stage_linked(&base, &dest);
    apply(&stream, &dest, Some(&base), Sharing::HardLinked).unwrap();
    assert_equal(&target, &dest);
    assert_eq!(fs::read(base.join("db")).unwrap(), noise(16 << 20, 1));
}

#[test]
fn comparing_contents_sees_what_metadata_hides() {
    let folder = Folder::new();
    let base = folder.make("base");
    let target = folder.make("target");
    fs::write(base.join("f"), b"before").unwrap();
    // The inventories claim that nothing changed.
    stage_copied(&base, &target);
    let inventory = |tree: &Path, name: &str| {
        let path = folder.path().join(name);
        let mut writer = InventoryWriter::create(&path).unwrap();
        for entry in Walk::new(Root::open(tree).unwrap(), Links::ByInode) {
            let entry = entry.unwrap();
            writer.add(InventoryEntry { entry, origin: Some(Default::default()), digest: None }).unwrap();
        }
        writer.finish().unwrap();
        path
    };
    let paths = [inventory(&base, "i1"), inventory(&target, "i2")];
    let mtime = fs::metadata(base.join("f")).unwrap().modified().unwrap();
    fs::write(target.join("f"), b"after!").unwrap();
    fs::File::options().write(true).open(target.join("f")).unwrap().set_modified(mtime).unwrap();
    let length = |compare| {
        let [base, target] = [(&base, &paths[0]), (&target, &paths[1])].map(|(tree, path)| Side {
            root: Root::open(tree).unwrap(),
            links: Links::Inventory(Box::new(InventoryReader::open(path).unwrap())),
        });
        drain(DeltaWriter::new(Some(base), target, compare, None).unwrap()).len()
    };
    assert!(length(Compare::Metadata) < 100);
    assert!(length(Compare::Contents) > 100);
}

#[test]
fn link_groups_come_from_the_inventory_where_trees_share_inodes() {
    let folder = Folder::new();
    let [head, one, two, dest] = ["head", "one", "two", "dest"].map(|name| folder.make(name));
    fs::write(head.join("a"), b"1").unwrap();
    fs::hard_link(head.join("a"), head.join("b")).unwrap();
    fs::write(head.join("c"), b"2").unwrap();
    stage_copied(&head, &one);
    stage_linked(&one, &two);
    let path = folder.path().join("inventory");
    let mut writer = InventoryWriter::create(&path).unwrap();
    for entry in Walk::new(Root::open(&head).unwrap(), Links::ByInode) {
        writer.add(InventoryEntry { entry: entry.unwrap(), origin: None, digest: None }).unwrap();
    }
    writer.finish().unwrap();
    let links = Links::Inventory(Box::new(InventoryReader::open(&path).unwrap()));
    let target = Side { root: Root::open(&two).unwrap(), links };
    let stream = drain(DeltaWriter::new(None, target, Compare::Metadata, None).unwrap());
    apply(&stream, &dest, None, Sharing::Exclusive).unwrap();
    assert_equal(&head, &dest);
}

struct Trees {
    folder: Folder,
    base: std::path::PathBuf,
    target: std::path::PathBuf,
}

/// A base with everything, and a target with changes before, in and behind a large file, whose names are a group.
fn trees() -> Trees {
    let folder = Folder::new();
    let [base, target] = ["base", "target"].map(|name| folder.make(name));
    fill(&base);
    stage_copied(&base, &target);
    for (at, name) in ["a/new-early", "m-new", "zz-new"].iter().enumerate() {
        fs::write(target.join(name), noise(300_000, at as u64)).unwrap();
    }
    fs::write(target.join("large"), noise(2_500_000, 9)).unwrap();
    fs::hard_link(target.join("large"), target.join("a/large-too")).unwrap();
    fs::hard_link(target.join("large"), target.join("zz-large-too")).unwrap();
    fs::write(target.join("z-third"), b"changed by its last name").unwrap();
    fs::remove_file(target.join("sparse")).unwrap();
    fs::create_dir(target.join("m-empty-dir")).unwrap();
    Trees { folder, base, target }
}

fn writer_with_checkpoints(trees: &Trees, base: bool, resume: Option<&ResumePoint>) -> DeltaWriter {
    writer(base.then_some(&trees.base), &trees.target, resume).unwrap().checkpoint_every(100_000)
}

/// Breaks the stream behind each checkpoint, and goes on from the point in the tree as the break left it.
#[test]
fn a_stream_goes_on_from_every_checkpoint() {
    for (sharing, with_base) in [(Sharing::HardLinked, true), (Sharing::Exclusive, true), (Sharing::Exclusive, false)] {
        let trees = trees();
        let stream = drain(writer_with_checkpoints(&trees, with_base, None));
        let base = with_base.then_some(trees.base.as_path());
        let all = Points::default();
        let scratch = trees.folder.make("scratch");
        if with_base {
            stage(sharing, &trees.base, &scratch);
        }
        let mut first = applier(&scratch, base, sharing, None, &all).unwrap();
        first.feed(stream.clone().into()).unwrap();
        first.finish().unwrap();
        assert_equal(&trees.target, &scratch);
        let count = all.lock().unwrap().len();
        assert!(count > 10, "{count} checkpoints");
        for wanted in (0..count).step_by(3) {
            let dest = trees.folder.make(&format!("dest-{wanted}"));
            if with_base {
                stage(sharing, &trees.base, &dest);
            }
            // Past the point by some 330 KB more: what was made behind it must not disturb.
            let points = Points::default();
            let mut broken = applier(&dest, base, sharing, None, &points).unwrap();
            let mut point = None;
            let mut more = 330;
            for piece in stream.chunks(1000) {
                broken.feed(Bytes::copy_from_slice(piece)).unwrap();
                broken.settle().unwrap();
                point = point.or_else(|| points.lock().unwrap().get(wanted).cloned());
                more -= i32::from(point.is_some());
                if more == 0 {
                    break;
                }
            }
            drop(broken);
            let point = point.unwrap();
            let rest = drain(writer_with_checkpoints(&trees, with_base, Some(&point)));
            let mut resumed = applier(&dest, base, sharing, Some(point), &points).unwrap();
            rest.chunks(7777).for_each(|piece| resumed.feed(Bytes::copy_from_slice(piece)).unwrap());
            resumed.finish().unwrap();
            assert_equal(&trees.target, &dest);
        }
    }
}

#[test]
fn what_was_taken_in_is_not_sent_again() {
    let trees = trees();
    let stream = drain(writer_with_checkpoints(&trees, true, None));
    let dest = trees.folder.make("dest");
    stage_linked(&trees.base, &dest);
    let points = Points::default();
    let mut taken = applier(&dest, Some(&trees.base), Sharing::HardLinked, None, &points).unwrap();
    taken.feed(stream.clone().into()).unwrap();
    taken.settle().unwrap();
    let last = points.lock().unwrap().last().cloned().unwrap();
    let rest = drain(writer_with_checkpoints(&trees, true, Some(&last)));
    assert!(rest.len() < stream.len() / 5, "{} of {} bytes again", rest.len(), stream.len());
}

#[test]
fn a_stream_that_starts_elsewhere_is_refused() {
    let trees = trees();
    let stream = drain(writer_with_checkpoints(&trees, false, None));
    let dest = trees.folder.make("dest");
    let points = Points::default();
    let mut taken = applier(&dest, None, Sharing::Exclusive, None, &points).unwrap();
    taken.feed(stream.clone().into()).unwrap();
    taken.settle().unwrap();
    let point = points.lock().unwrap()[3].clone();
    let mut other = applier(&dest, None, Sharing::Exclusive, Some(point), &points).unwrap();
    assert!(matches!(other.feed(stream.clone().into()).unwrap_err().kind, ErrorKind::Corrupt(_)));
}

#[test]
fn a_resume_point_into_a_file_that_is_not_there_is_stale() {
    let trees = trees();
    let stream = drain(writer_with_checkpoints(&trees, false, None));
    let dest = trees.folder.make("dest");
    let points = Points::default();
    applier(&dest, None, Sharing::Exclusive, None, &points).unwrap().feed(stream.clone().into()).unwrap();
    let mut stale = 0;
    let empty = trees.folder.make("empty");
    for point in points.lock().unwrap().iter() {
        let mut writer = writer(None, &empty, Some(point)).unwrap();
        stale +=
            usize::from(matches!(writer.next_chunk(), Err(error) if matches!(error.kind, ErrorKind::ResumeStale(_))));
    }
    assert!(stale > 0);
}

#[test]
fn many_small_files_share_chunks() {
    let folder = Folder::new();
    let source = folder.make("source");
    for number in 0..2000 {
        fs::write(source.join(format!("{number}")), b"x").unwrap();
    }
    let mut writer = writer(None, &source, None).unwrap();
    let mut chunks = 0;
    while writer.next_chunk().unwrap().is_some() {
        chunks += 1;
    }
    assert_eq!(chunks, 1);
}

#[test]
fn a_chunk_ends_with_a_record() {
    let folder = Folder::new();
    let source = folder.make("source");
    for number in 0..300 {
        fs::write(source.join(format!("{number}")), noise(3000, number)).unwrap();
    }
    fs::write(source.join("large"), noise(1 << 20, 1)).unwrap();
    let mut writer = writer(None, &source, None).unwrap();
    let mut chunks = 0;
    while let Some(chunk) = writer.next_chunk().unwrap() {
        let mut rest = &chunk[..];
        while let Some((length, behind)) = rest.split_first_chunk::<4>() {
            rest = behind.get(u32::from_le_bytes(*length) as usize..).expect("a whole record");
        }
        assert!(rest.is_empty(), "{} bytes behind the last record", rest.len());
        chunks += 1;
    }
    assert!((6..=9).contains(&chunks), "{chunks} chunks of 1.9 MB");
}

#[test]
fn a_stopped_writer_ends_with_an_error() {
    let folder = Folder::new();
    let source = folder.make("source");
    let mut writer = writer(None, &source, None).unwrap();
    writer.stopper().store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(writer.next_chunk().is_err());
}

/// Or every file of a tree would be written to because it was read.
#[test]
fn reading_a_tree_leaves_its_access_times() {
    let folder = Folder::new();
    let source = folder.make("source");
    let old = Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
    let [sent, control] = ["sent", "control"].map(|name| {
        let path = source.join(name);
        fs::write(&path, "contents").unwrap();
        let times = Timestamps { last_access: old, last_modification: old };
        rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::empty()).unwrap();
        path
    });
    let accessed = |path: &Path| fs::metadata(path).unwrap().atime();
    delta(None, &source);
    assert_eq!((accessed(&sent), accessed(&control)), (old.tv_sec, old.tv_sec));
    fs::read(&control).unwrap();
    if accessed(&control) == old.tv_sec {
        eprintln!("SKIPPED in part: the folder for tests lies on a file system that keeps no access times");
    }
}
