//! Property: whatever bytes come, nothing panics and nothing outside the destination is touched.

use std::{fs, os::unix::fs::symlink, sync::OnceLock};

use bytes::Bytes;
use flocker_storage::tree::{apply::Sharing, listing::listing};
use proptest::prelude::*;

use super::rig::{Folder, Points, applier, delta};

fn valid_stream() -> &'static [u8] {
    static STREAM: OnceLock<Vec<u8>> = OnceLock::new();
    STREAM.get_or_init(|| {
        let folder = Folder::new();
        let source = folder.make("source");
        fs::create_dir_all(source.join("a/b/c")).unwrap();
        fs::write(source.join("a/file"), vec![1; 5000]).unwrap();
        fs::hard_link(source.join("a/file"), source.join("a/b/name")).unwrap();
        fs::write(source.join("a/b/c/small"), b"small").unwrap();
        symlink("../../outside", source.join("link")).unwrap();
        fs::write(source.join("z"), b"z").unwrap();
        delta(None, &source)
    })
}

fn take_in(bytes: &[u8]) {
    let folder = Folder::new();
    let [dest, outside] = ["dest", "outside"].map(|name| folder.make(name));
    fs::write(outside.join("canary"), b"untouched").unwrap();
    symlink("../outside", dest.join("door")).unwrap();
    symlink(&outside, dest.join("a")).unwrap();
    let before = listing(&outside).unwrap();
    let mut applier = applier(&dest, None, Sharing::Exclusive, None, &Points::default()).unwrap();
    let _ = applier.feed(Bytes::copy_from_slice(bytes)).and_then(|()| applier.finish());
    assert_eq!(listing(&outside).unwrap(), before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

/// Puts the right lengths before damaged bodies, so that damage reaches further than the first digest.
#[derive(Debug, Clone)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index, usize),
    Insert(prop::sample::Index, Vec<u8>),
    Repeat(prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        (any::<prop::sample::Index>(), 1..200usize).prop_map(|(at, count)| Damage::Cut(at, count)),
        (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..20))
            .prop_map(|(at, b)| Damage::Insert(at, b)),
        (any::<prop::sample::Index>(), 1..200usize).prop_map(|(at, count)| Damage::Repeat(at, count)),
    ]
}

fn frames(stream: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut rest = stream;
    while let Some((head, body)) = rest.split_first_chunk::<4>() {
        let (frame, next) = body.split_at(u32::from_le_bytes(*head) as usize);
        frames.push(frame.to_vec());
        rest = next;
    }
    frames
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn random_bytes_harm_nothing(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        take_in(&bytes);
    }

    #[test]
    fn damaged_streams_harm_nothing(damages in prop::collection::vec(damage(), 1..4)) {
        let mut stream = valid_stream().to_vec();
        for damage in damages {
            match damage {
                Damage::Flip(at, bits) => { let at = at.index(stream.len()); stream[at] ^= bits; }
                Damage::Cut(at, count) => {
                    let at = at.index(stream.len());
                    stream.drain(at..(at + count).min(stream.len()));
                    if stream.is_empty() { break; }
                }
                Damage::Insert(at, bytes) => { let at = at.index(stream.len()); stream.splice(at..at, bytes); }
                Damage::Repeat(at, count) => {
                    let at = at.index(stream.len());
                    let piece = stream[at..(at + count).min(stream.len())].to_vec();
                    stream.splice(at..at, piece);
                }
            }
        }
        take_in(&stream);
    }

    #[test]
    fn damaged_records_in_any_order_harm_nothing(
        picks in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..20)
    ) {
        let frames = frames(valid_stream());
        let mut stream = valid_stream()[..4 + frames[0].len()].to_vec();
        for (which, at, bits) in picks {
            let mut frame = frames[which.index(frames.len())].clone();
            // Half of them are left as they are.
            if bits % 2 == 0 {
                let at = at.index(frame.len());
                frame[at] ^= bits;
            }
            stream.extend((frame.len() as u32).to_le_bytes());
            stream.extend(frame);
        }
        take_in(&stream);
    }
}
