//! What a receive takes down of the files that it writes, beside what lies there.

use std::{
    fs::{self, File},
    io::Read as _,
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt as _, chown},
    },
    path::Path,
};

use bytes::Bytes;
use flocker_storage::tree::{
    apply::{Applied, Sharing},
    arrivals::{Arrivals, Sight},
    entry::EntryKind,
    inventory::{InventoryEntry, InventoryReader, InventoryWriter},
    received::{Met, ReceivedWalk},
    root::Root,
    walk::{Attributes, Links, Motion, Walk},
};

use rustix::fs::OFlags;

use super::{
    everything::fill,
    rig::{Folder, Points, applier, assert_equal, delta, is_root},
};

/// More than is taken in without a second thread, and than is handed over at once.
const FILES: usize = 3000;

fn many(root: &Path) {
    let folder = root.join("many");
    fs::create_dir(&folder).unwrap();
    for number in 0..FILES {
        let path = folder.join(format!("{number:04}"));
        fs::write(&path, format!("contents of file {number}\n").repeat(1 + number % 90)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + number as u32 % 64)).unwrap();
        if number % 3 == 0 && is_root() {
            chown(&path, Some(1000), Some(number as u32)).unwrap();
        }
        if number % 100 == 7 {
            fs::hard_link(&path, root.join(format!("z{number}"))).unwrap();
        }
    }
}

fn take(stream: &[u8], dest: &Path, folder: &Path) -> flocker_storage::error::Result<Applied> {
    let arrivals = Arrivals::begin(folder, Sight::Whole).unwrap();
    let mut applier = applier(dest, None, Sharing::Exclusive, None, &Points::default()).unwrap().noting(arrivals);
    for piece in stream.chunks(200_000) {
        applier.feed(Bytes::copy_from_slice(piece))?;
    }
    applier.finish()
}

/// Makes a tree's inventory of what was taken down and what lies there, as the commit of a receive does, and reads it.
fn known(dest: &Path, applied: Applied, folder: &Path) -> Vec<InventoryEntry> {
    let walk = Walk::with(Root::open(dest).unwrap(), Links::ByInode, Motion::Still, Attributes::OnDemand);
    let mut received = ReceivedWalk::new(walk, applied.arrivals.unwrap().into_known().unwrap());
    let inventory = folder.join("inventory");
    let mut writer = InventoryWriter::create(&inventory).unwrap();
    let mut as_arrived = 0;
    while let Some(met) = received.meet().unwrap() {
        let (mut entry, facts) = match met {
            Met::AsItArrived { .. } => {
                received.note(&mut writer).unwrap();
                as_arrived += 1;
                continue;
            }
            Met::Entry(entry, facts) => (entry, facts),
        };
        let digest = facts.as_ref().and_then(|facts| facts.digest);
        match facts.and_then(|facts| facts.xattrs) {
            Some(xattrs) => entry.xattrs = xattrs,
            None => received.walk.load_attributes(&mut entry).unwrap(),
        }
        writer.add(InventoryEntry { entry, origin: None, digest }).unwrap();
    }
    writer.finish().unwrap();
    assert!(as_arrived >= FILES * 9 / 10, "{as_arrived} were not looked at");
    InventoryReader::open(&inventory).unwrap().map(Result::unwrap).collect()
}

fn read(file: OwnedFd) -> Vec<u8> {
    let mut contents = Vec::new();
    File::from(file).read_to_end(&mut contents).unwrap();
    contents
}

#[test]
fn what_was_taken_down_is_what_lies_there() {
    let folder = Folder::new();
    let (source, dest) = (folder.make("source"), folder.make("dest"));
    fill(&source);
    many(&source);
    let applied = take(&delta(None, &source), &dest, folder.path()).unwrap();
    assert_equal(&source, &dest);

    let walk = Walk::new(Root::open(&dest).unwrap(), Links::ByInode);
    let seen: Vec<_> = walk.map(Result::unwrap).collect();
    let known = known(&dest, applied, folder.path());
    assert_eq!(known.len(), seen.len());
    let (root, mut digests) = (Root::open(&dest).unwrap(), 0);
    for (InventoryEntry { entry: known, digest, .. }, seen) in known.iter().zip(&seen) {
        assert_eq!(known, seen);
        if let Some(digest) = digest {
            let EntryKind::File { .. } = seen.kind else { panic!("{}: a digest", seen.path) };
            let file = root.open_beneath(&seen.path, OFlags::RDONLY).unwrap();
            let contents = read(file);
            assert_eq!(*blake3::hash(&contents).as_bytes(), *digest);
            digests += 1;
        }
    }
    assert!(digests >= FILES, "{digests} digests");
}

#[test]
fn damage_behind_many_files_is_noticed() {
    let folder = Folder::new();
    let source = folder.make("source");
    many(&source);
    let stream = delta(None, &source);
    for (number, share) in [1, 5, 9].into_iter().enumerate() {
        let mut damaged = stream.clone();
        // A letter of some file's contents.
        let at = stream.len() * share / 10;
        let at = at + damaged[at..].windows(8).position(|bytes| bytes == b"contents").unwrap();
        damaged[at] = b'C';
        let error = take(&damaged, &folder.make(&format!("dest{number}")), folder.path()).unwrap_err();
        assert!(error.kind.to_string().contains("digest differs"), "{error:?}");
    }
}
