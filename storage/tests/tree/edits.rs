//! Property: for any base and any edits, the delta turns the base into the target; broken off anywhere, too.

use std::{
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _, symlink},
    path::Path,
};

use bytes::Bytes;
use flocker_storage::{
    delta::Compare,
    tree::{apply::Sharing, listing::listing, write::DeltaWriter},
};
use proptest::prelude::*;
use rustix::fs::{FallocateFlags, FileType, Mode, XattrFlags};

use super::{
    everything::set_times,
    rig::{Folder, Points, applier, assert_equal, drain, side, stage, stage_copied},
};

#[derive(Debug, Clone)]
pub(crate) enum Edit {
    Write { path: u8, size: u32, seed: u8 },
    Patch { path: u8, at: u32, length: u16, seed: u8 },
    Resize { path: u8, size: u32 },
    Punch { path: u8, at: u32, length: u32 },
    MakeDir { path: u8 },
    Symlink { path: u8, target: u8 },
    Fifo { path: u8 },
    Link { from: u8, to: u8 },
    Rename { from: u8, to: u8 },
    Remove { path: u8 },
    Chmod { path: u8, mode: u16 },
    Xattr { path: u8, key: u8, value: Vec<u8> },
    RemoveXattr { path: u8, key: u8 },
    Touch { path: u8, secs: i32, nanos: u32 },
}

pub(crate) fn edit() -> impl Strategy<Value = Edit> {
    let path = || 0..24u8;
    let place = || 0..300_000u32;
    prop_oneof![
        4 => (path(), prop_oneof![Just(0), 1..100u32, place()], any::<u8>())
            .prop_map(|(path, size, seed)| Edit::Write { path, size, seed }),
        3 => (path(), place(), any::<u16>(), any::<u8>())
            .prop_map(|(path, at, length, seed)| Edit::Patch { path, at, length, seed }),
        2 => (path(), place()).prop_map(|(path, size)| Edit::Resize { path, size }),
        2 => (path(), place(), 1..200_000u32).prop_map(|(path, at, length)| Edit::Punch { path, at, length }),
        3 => path().prop_map(|path| Edit::MakeDir { path }),
        1 => (path(), path()).prop_map(|(path, target)| Edit::Symlink { path, target }),
        1 => path().prop_map(|path| Edit::Fifo { path }),
        4 => (path(), path()).prop_map(|(from, to)| Edit::Link { from, to }),
        2 => (path(), path()).prop_map(|(from, to)| Edit::Rename { from, to }),
        2 => path().prop_map(|path| Edit::Remove { path }),
        1 => (path(), 0..0o1000u16).prop_map(|(path, mode)| Edit::Chmod { path, mode: mode | 0o700 }),
        1 => (path(), 0..3u8, prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(path, key, value)| Edit::Xattr { path, key, value }),
        1 => (path(), 0..3u8).prop_map(|(path, key)| Edit::RemoveXattr { path, key }),
        1 => (path(), any::<i32>(), 0..1_000_000_000u32)
            .prop_map(|(path, secs, nanos)| Edit::Touch { path, secs, nanos }),
    ]
}

/// Twenty-four paths in two levels; a path of the first level may be a directory, or not.
fn name(root: &Path, path: u8) -> std::path::PathBuf {
    let first = root.join(["a", "b", "c", "c-", "d", "e"][usize::from(path % 6)]);
    if path < 6 { first } else { first.join(["a", "b", "c"][usize::from(path / 6) - 1]) }
}

fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Does an edit as far as it can be done.
pub(crate) fn perform(root: &Path, edit: &Edit) {
    let name = |path: &u8| name(root, *path);
    let regular = |path: &u8| {
        let path = name(path);
        fs::symlink_metadata(&path).ok().filter(fs::Metadata::is_file)?;
        fs::File::options().write(true).open(path).ok()
    };
    let _ = match edit {
        Edit::Write { path, size, seed } if fs::symlink_metadata(name(path)).is_err() || regular(path).is_some() => {
            fs::write(name(path), noise(*size as usize, *seed))
        }
        Edit::Patch { path, at, length, seed } => match regular(path) {
            Some(file) => file.write_all_at(&noise(usize::from(*length), *seed), u64::from(*at)),
            None => Ok(()),
        },
        Edit::Resize { path, size } => regular(path).map_or(Ok(()), |file| file.set_len(u64::from(*size))),
        Edit::Punch { path, at, length } => regular(path).map_or(Ok(()), |file| {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(file, flags, u64::from(*at), u64::from(*length))?)
        }),
        Edit::MakeDir { path } => fs::create_dir(name(path)),
        Edit::Symlink { path, target } => symlink(name(target).strip_prefix(root).unwrap(), name(path)),
        Edit::Fifo { path } => {
            let _ = rustix::fs::mknodat(rustix::fs::CWD, name(path), FileType::Fifo, Mode::RUSR, 0);
            Ok(())
        }
        Edit::Link { from, to } => fs::hard_link(name(from), name(to)),
        Edit::Rename { from, to } => fs::rename(name(from), name(to)),
        Edit::Remove { path } => fs::remove_file(name(path)).or_else(|_| fs::remove_dir_all(name(path))),
        Edit::Chmod { path, mode } if !name(path).is_symlink() => {
            fs::set_permissions(name(path), fs::Permissions::from_mode(u32::from(*mode)))
        }
        Edit::Xattr { path, key, value } => {
            let _ = rustix::fs::lsetxattr(name(path), format!("user.{key}"), value, XattrFlags::empty());
            Ok(())
        }
        Edit::RemoveXattr { path, key } => {
            let _ = rustix::fs::lremovexattr(name(path), format!("user.{key}"));
            Ok(())
        }
        Edit::Touch { path, secs, nanos } if fs::symlink_metadata(name(path)).is_ok() => {
            set_times(&name(path), i64::from(*secs), i64::from(*nanos));
            Ok(())
        }
        _ => Ok(()),
    };
}

/// `PROPTEST_CASES` asks for more.
pub(crate) fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(160)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    fn a_delta_turns_any_base_into_any_target(
        first in prop::collection::vec(edit(), 0..50),
        second in prop::collection::vec(edit(), 0..25),
        linked in any::<bool>(),
        contents in any::<bool>(),
        from_head in any::<bool>(),
        broken_at in any::<prop::sample::Index>(),
        beyond in 0..300_000usize,
    ) {
        let sharing = if linked { Sharing::HardLinked } else { Sharing::Exclusive };
        let compare = if contents { Compare::Contents } else { Compare::Metadata };
        let folder = Folder::new();
        let [head, copy, dest] = ["head", "copy", "dest"].map(|name| folder.make(name));
        first.iter().for_each(|edit| perform(&head, edit));
        stage_copied(&head, &copy);
        // Either the edited tree is the original, or the copy.
        let (base, target) = if from_head { (&copy, &head) } else { (&head, &copy) };
        second.iter().for_each(|edit| perform(target, edit));
        let before = listing(base).unwrap();
        let write = |resume: Option<&_>| {
            drain(DeltaWriter::new(Some(side(base)), side(target), compare, resume).unwrap().checkpoint_every(20_000))
        };

        let stream = write(None);
        stage(sharing, base, &dest);
        let points = Points::default();
        let mut whole = applier(&dest, Some(base), sharing, None, &points).unwrap();
        stream.chunks(5000).for_each(|piece| whole.feed(Bytes::copy_from_slice(piece)).unwrap());
        whole.finish().unwrap();
        assert_equal(target, &dest);

        let points = points.lock().unwrap().clone();
        if !points.is_empty() {
            let dest = folder.make("dest-2");
            let point = points[broken_at.index(points.len())].clone();
            stage(sharing, base, &dest);
            let seen = Points::default();
            let mut broken = applier(&dest, Some(base), sharing, None, &seen).unwrap();
            let mut left = None;
            for piece in stream.chunks(500) {
                if left == Some(0) { break; }
                broken.feed(Bytes::copy_from_slice(piece)).unwrap();
                broken.settle().unwrap();
                if seen.lock().unwrap().last() == Some(&point) && left.is_none() {
                    left = Some(beyond / 500 + 1);
                }
                left = left.map(|left| left - 1);
            }
            drop(broken);
            let mut resumed = applier(&dest, Some(base), sharing, Some(point.clone()), &seen).unwrap();
            write(Some(&point)).chunks(5000).for_each(|piece| resumed.feed(Bytes::copy_from_slice(piece)).unwrap());
            resumed.finish().unwrap();
            assert_equal(target, &dest);
        }

        for (before, after) in before.iter().zip(listing(base).unwrap()) {
            prop_assert_eq!(before.digest, after.digest);
            prop_assert!(before.entry.has_metadata_of(&after.entry), "the base was modified at {}", before.entry.path);
        }
    }
}
