//! Files whose digest the sender's inventory has: it is stated, and what arrives is held against it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use flocker_storage::{
    delta::{Compare, ResumePoint},
    error::{Error, ErrorKind},
    tree::{
        apply::{Applied, Sharing},
        arrivals::{Arrivals, Sight},
        inventory::{InventoryEntry, InventoryReader, InventoryWriter},
        received::{Met, ReceivedWalk},
        root::Root,
        walk::{Links, Walk},
        write::{DeltaWriter, Side},
    },
};

use super::{
    rig::{Folder, Points, applier, assert_equal, drain},
    stream::noise,
};

/// Between two checkpoints: several lie in the large file.
const INTERVAL: u64 = 600_000;

struct Sample {
    folder: Folder,
    source: PathBuf,
}

impl Sample {
    /// A tree, and an inventory that knows the digests of all its files.
    fn new() -> Self {
        let folder = Folder::new();
        let source = folder.make("source");
        fs::write(source.join("early"), noise(300_000, 1)).unwrap();
        fs::write(source.join("large"), noise(2_500_000, 2)).unwrap();
        fs::write(source.join("late"), noise(1000, 3)).unwrap();
        let sparse = File::create(source.join("sparse")).unwrap();
        sparse.set_len(3_000_000).unwrap();
        sparse.write_all_at(b"end", 2_999_000).unwrap();
        let mut writer = InventoryWriter::create(&folder.path().join("inventory")).unwrap();
        for entry in Walk::new(Root::open(&source).unwrap(), Links::ByInode) {
            let entry = entry.unwrap();
            let digest = fs::read(source.join(entry.path.as_path())).ok().map(|bytes| *blake3::hash(&bytes).as_bytes());
            writer.add(InventoryEntry { entry, origin: None, digest }).unwrap();
        }
        writer.finish().unwrap();
        Self { folder, source }
    }

    fn digest(&self, name: &str) -> [u8; 32] {
        *blake3::hash(&fs::read(self.source.join(name)).unwrap()).as_bytes()
    }

    fn stream(&self, resume: Option<&ResumePoint>) -> Vec<u8> {
        let inventory = InventoryReader::open(&self.folder.path().join("inventory")).unwrap();
        let links = Links::Inventory(Box::new(inventory));
        let target = Side { root: Root::open(&self.source).unwrap(), links };
        drain(DeltaWriter::new(None, target, Compare::Metadata, resume).unwrap().checkpoint_every(INTERVAL))
    }

    /// Takes in a stream, and returns what came of it and the points that were kept.
    fn take(&self, stream: &[u8], resume: Option<ResumePoint>) -> (Result<Applied, Error>, Vec<ResumePoint>) {
        let (points, dest) = (Points::default(), self.dest());
        let arrivals = Arrivals::begin(self.folder.path(), Sight::Whole).unwrap();
        let mut applier = applier(&dest, None, Sharing::Exclusive, resume, &points).unwrap().noting(arrivals);
        let fed = stream.chunks(70_000).try_for_each(|piece| applier.feed(Bytes::copy_from_slice(piece)));
        let applied = fed.and_then(|()| applier.finish());
        let points = std::mem::take(&mut *points.lock().unwrap());
        (applied, points)
    }

    /// Takes in a stream until a point in the large file is kept, and returns the point.
    fn take_half(&self, stream: &[u8]) -> ResumePoint {
        let points = Points::default();
        let mut applier = applier(&self.dest(), None, Sharing::Exclusive, None, &points).unwrap();
        for piece in stream.chunks(1000) {
            applier.feed(Bytes::copy_from_slice(piece)).unwrap();
            applier.settle().unwrap();
            if points.lock().unwrap().len() == 3 {
                break;
            }
        }
        let point = points.lock().unwrap()[2].clone();
        assert!(position(&point).contains("large"), "{}", position(&point));
        point
    }

    fn dest(&self) -> PathBuf {
        let dest = self.folder.path().join("dest");
        fs::create_dir_all(&dest).unwrap();
        dest
    }
}

fn position(point: &ResumePoint) -> String {
    String::from_utf8_lossy(&point.0).into_owned()
}

fn has(stream: &[u8], bytes: &[u8]) -> bool {
    stream.windows(bytes.len()).any(|window| window == bytes)
}

/// Changes a byte as a disk would: no time tells of it.
fn rot(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.set_modified(modified).unwrap();
}

#[track_caller]
fn assert_refused(applied: Result<Applied, Error>) {
    let error = applied.unwrap_err();
    assert_eq!(error.to_string(), "cannot apply delta at large");
    assert!(matches!(&error.kind, ErrorKind::Corrupt(why) if why.contains("snapshot was made with")), "{error:?}");
}

#[test]
fn a_file_of_several_records_without_holes_has_its_digest_stated() {
    let sample = Sample::new();
    let stream = sample.stream(None);
    assert!(has(&stream, &sample.digest("large")) && has(&stream, &sample.digest("early")));
    for name in ["late", "sparse"] {
        assert!(!has(&stream, &sample.digest(name)), "{name}");
    }
    let (applied, points) = sample.take(&stream, None);
    assert!(points.len() >= 3, "{} points", points.len());
    assert_equal(&sample.source, &sample.dest());
    assert_knows_digest(&sample, applied.unwrap());
}

#[track_caller]
fn assert_knows_digest(sample: &Sample, applied: Applied) {
    let known = applied.arrivals.unwrap().into_known().unwrap();
    let walk = Walk::new(Root::open(sample.dest()).unwrap(), Links::ByInode);
    let mut received = ReceivedWalk::new(walk, known);
    let inventory = sample.folder.path().join("known");
    let mut writer = InventoryWriter::create(&inventory).unwrap();
    while let Some(met) = received.meet().unwrap() {
        if matches!(met, Met::AsItArrived { .. }) {
            received.note(&mut writer).unwrap();
        }
    }
    writer.finish().unwrap();
    let mut entries = InventoryReader::open(&inventory).unwrap().map(Result::unwrap);
    let large = entries.find(|known| known.entry.path.as_path() == Path::new("large")).unwrap();
    assert_eq!(large.digest, Some(sample.digest("large")));
}

#[test]
fn a_rotten_file_is_refused() {
    let sample = Sample::new();
    rot(&sample.source.join("large"), 40_000);
    assert_refused(sample.take(&sample.stream(None), None).0);
    let sample = Sample::new();
    rot(&sample.source.join("late"), 40);
    let error = sample.take(&sample.stream(None), None).0.unwrap_err();
    assert!(matches!(&error.kind, ErrorKind::Corrupt(why) if why.contains("at the sender")), "{error:?}");
}

#[test]
fn what_came_before_a_break_is_read_again_and_held_against_the_digest() {
    let sample = Sample::new();
    let point = sample.take_half(&sample.stream(None));
    let stream = sample.stream(Some(&point));
    assert!(stream.len() < 2_000_000, "{} bytes", stream.len());
    let (applied, _) = sample.take(&stream, Some(point));
    assert_knows_digest(&sample, applied.unwrap());
    assert_equal(&sample.source, &sample.dest());
}

#[test]
fn what_rots_at_the_receiver_over_a_break_is_noticed() {
    let sample = Sample::new();
    let point = sample.take_half(&sample.stream(None));
    rot(&sample.dest().join("large"), 40_000);
    assert_refused(sample.take(&sample.stream(Some(&point)), Some(point)).0);
}
