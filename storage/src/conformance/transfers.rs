//! Cases on two pools: deltas out of one and into the other, and what interrupts them.

use bytes::Bytes;

use super::{
    Bench, Case, common_formats, delta, furnish, incoming, look_at, look_at_head, read_all, refurbish, refused, state,
    take, take_in, volume, write,
};
use crate::{
    delta::{Compare, DeltaFormat, DeltaRequest, ReceiveRequest, ResumePoint},
    driver::{Access, Driver, Target},
    error::ErrorKind,
    model::{HeadState, HeldSnapshot, Role, VolumeRecord},
};

pub(super) const CASES: &[Case] = &[
    ("a_full_and_an_incremental_delta_make_the_same_trees", |bench| Box::pin(full_and_incremental(bench))),
    ("a_clone_travels_as_the_difference_from_its_origin", |bench| Box::pin(clone_of_origin(bench))),
    ("a_tree_on_an_older_base_than_the_newest_leaves_that_one", |bench| Box::pin(older_base(bench))),
    ("a_delta_read_with_contents_makes_the_same_tree", |bench| Box::pin(by_contents(bench))),
    ("an_estimate_is_near_the_length_of_the_stream", |bench| Box::pin(estimates(bench))),
    ("nothing_is_visible_before_commit_and_a_drop_leaves_nothing", |bench| Box::pin(drop_leaves_nothing(bench))),
    ("a_garbage_or_truncated_stream_leaves_the_old_lineage", |bench| Box::pin(garbage(bench))),
    ("a_volume_has_one_open_receive", |bench| Box::pin(one_receive(bench))),
    ("a_suspended_receive_goes_on_after_a_reopen", |bench| Box::pin(suspend(bench))),
    ("a_resume_point_that_does_not_fit_is_stale", |bench| Box::pin(stale(bench))),
    ("a_replica_follows_and_becomes_a_primary", |bench| Box::pin(promote(bench))),
    ("a_demoted_volume_takes_a_fast_forward", |bench| Box::pin(demote(bench))),
    ("an_unknown_format_is_refused", |bench| Box::pin(unknown_format(bench))),
];

/// A volume with two snapshots.
async fn two_snapshots(driver: &dyn Driver) -> (VolumeRecord, HeldSnapshot, HeldSnapshot) {
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(driver, record.id, furnish).await;
    let one = take(driver, record.id, "one").await;
    write(driver, record.id, refurbish).await;
    let two = take(driver, record.id, "two").await;
    (record, one, two)
}

async fn full_and_incremental(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    for format in common_formats(&*a, &*b) {
        let (record, one, two) = two_snapshots(&*a).await;
        let three = take(&*a, record.id, "three").await;
        let full = read_all(&*a, delta(None, &one, &format)).await.expect("a full delta");
        let held = take_in(&*b, incoming(&record, None, &one, &format), &full).await.expect("received");
        assert_eq!(held, one);
        let step = read_all(&*a, delta(Some(&one), &two, &format)).await.expect("a delta");
        // Cut anywhere: the receiver sees a stream of bytes.
        let small: Vec<Bytes> = step.iter().flat_map(|chunk| chunk.chunks(97)).map(Bytes::copy_from_slice).collect();
        assert_eq!(take_in(&*b, incoming(&record, Some(&one), &two, &format), &small).await.expect("received"), two);
        let none = read_all(&*a, delta(Some(&two), &three, &format)).await.expect("a delta");
        let held = take_in(&*b, incoming(&record, Some(&two), &three, &format), &none).await.expect("received");
        assert!(held.unchanged, "an empty difference");
        for key in [one.key(), two.key(), three.key()] {
            assert_eq!(look_at(&*b, key).await, look_at(&*a, key).await, "{format}");
            assert_eq!(b.verify(key, Compare::Contents).await.expect("verified"), []);
        }
        let newest = look_at(&*a, three.key()).await;
        assert_eq!(look_at_head(&*b, record.id, Access::ReadOnly).await, newest, "a replica's head");
        assert_eq!(state(&*b, record.id).await, HeadState::Clean);
        assert_eq!(b.lineage(record.id).await.expect("a lineage"), a.lineage(record.id).await.expect("a lineage"));
        let scan = b.scan().await.expect("a scan");
        let (kept, _) = scan.volumes.iter().find(|(it, _)| it.id == record.id).expect("the volume");
        assert_eq!(*kept, VolumeRecord { role: Role::Replica, ..record });
        let bytes = |chunks: &[Bytes]| chunks.iter().map(Bytes::len).sum::<usize>();
        assert!(bytes(&step) < bytes(&full) / 2 && bytes(&none) < bytes(&step), "a delta is smaller than a full copy");
    }
}

/// Data that nothing makes shorter.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

async fn estimates(bench: &Bench) {
    const MEBIBYTE: usize = 1 << 20;
    let driver = bench.open("a").await;
    let record = volume("db");
    driver.create(&record).await.expect("created");
    write(&*driver, record.id, |head| {
        std::fs::write(head.join("stays"), noise(1, 3 * MEBIBYTE)).expect("written");
        std::fs::write(head.join("goes"), noise(2, MEBIBYTE)).expect("written");
    })
    .await;
    let one = take(&*driver, record.id, "one").await;
    write(&*driver, record.id, |head| {
        std::fs::write(head.join("comes"), noise(3, 2 * MEBIBYTE)).expect("written");
        std::fs::remove_file(head.join("goes")).expect("removed");
    })
    .await;
    let two = take(&*driver, record.id, "two").await;
    for format in driver.capabilities().formats.clone() {
        for request in [delta(Some(&one), &two, &format), delta(None, &two, &format)] {
            let estimate = driver.estimate_delta(request.clone()).await.expect("asked").expect("an estimate");
            let length =
                read_all(&*driver, request).await.expect("a delta").iter().map(Bytes::len).sum::<usize>() as u64;
            assert!(estimate + length / 16 >= length, "{format}: {estimate} of {length} bytes");
            assert!(estimate <= length + length / 4, "{format}: {estimate} of {length} bytes");
        }
    }
}

async fn clone_of_origin(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    for format in common_formats(&*a, &*b) {
        let (record, one, _) = two_snapshots(&*a).await;
        let copy = VolumeRecord { origin: Some(one.key()), ..volume("copy") };
        (*a).clone_from(&copy).await.expect("cloned");
        write(&*a, copy.id, |head| std::fs::write(head.join("own"), "own").expect("write")).await;
        let own = take(&*a, copy.id, "own").await;
        let full = read_all(&*a, delta(None, &one, &format)).await.expect("a full delta");
        take_in(&*b, incoming(&record, None, &one, &format), &full).await.expect("received");
        let step = read_all(&*a, delta(Some(&one), &own, &format)).await.expect("a delta");
        let held = take_in(&*b, incoming(&copy, Some(&one), &own, &format), &step).await.expect("received");
        assert_eq!(held, own);
        assert_eq!(look_at(&*b, own.key()).await, look_at(&*a, own.key()).await);
        assert_eq!(b.lineage(copy.id).await.expect("a lineage").snapshots, [one.clone(), own]);
        refused(
            b.forget(one.key()).await,
            "a clone",
            |kind| matches!(kind, ErrorKind::Blocked(blockers) if blockers.clones == [copy.id]),
        );
    }
}

/// The sender has destroyed what came after the base, and the receiver still holds it.
async fn older_base(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    let format = DeltaFormat::tree();
    let (record, one, two) = two_snapshots(&*a).await;
    let full = read_all(&*a, delta(None, &one, &format)).await.expect("a full delta");
    take_in(&*b, incoming(&record, None, &one, &format), &full).await.expect("received");
    let step = read_all(&*a, delta(Some(&one), &two, &format)).await.expect("a delta");
    take_in(&*b, incoming(&record, Some(&one), &two, &format), &step).await.expect("received");
    let before = look_at(&*b, two.key()).await;
    write(&*a, record.id, |head| std::fs::write(head.join("later"), "later").expect("write")).await;
    let three = take(&*a, record.id, "three").await;
    a.forget(two.key()).await.expect("forgotten");

    let step = read_all(&*a, delta(Some(&one), &three, &format)).await.expect("a delta");
    let held = take_in(&*b, incoming(&record, Some(&one), &three, &format), &step).await.expect("received");

    assert_eq!(held.snapshot, three.snapshot);
    assert_eq!(look_at(&*b, three.key()).await, look_at(&*a, three.key()).await);
    assert_eq!(look_at(&*b, two.key()).await, before);
    let names: Vec<_> = b.lineage(record.id).await.expect("a lineage").snapshots;
    assert_eq!(
        names.iter().map(|held| held.snapshot.id).collect::<Vec<_>>(),
        [&one, &two, &three].map(|it| it.snapshot.id)
    );
    assert_eq!(state(&*b, record.id).await, HeadState::Clean);
    for key in [one.key(), two.key(), three.key()] {
        assert_eq!(b.verify(key, Compare::Contents).await.expect("verified"), []);
    }
}

async fn by_contents(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    let format = DeltaFormat::tree();
    let (record, one, two) = two_snapshots(&*a).await;
    let full = read_all(&*a, delta(None, &one, &format)).await.expect("a full delta");
    take_in(&*b, incoming(&record, None, &one, &format), &full).await.expect("received");
    let request = DeltaRequest { compare: Compare::Contents, ..delta(Some(&one), &two, &format) };
    let step = read_all(&*a, request).await.expect("a delta");
    take_in(&*b, incoming(&record, Some(&one), &two, &format), &step).await.expect("received");
    assert_eq!(look_at(&*b, two.key()).await, look_at(&*a, two.key()).await);
}

async fn drop_leaves_nothing(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    for format in common_formats(&*a, &*b) {
        let (record, one, two) = two_snapshots(&*a).await;
        let full = read_all(&*a, delta(None, &one, &format)).await.expect("a full delta");
        let mut receiving = b.receive(incoming(&record, None, &one, &format)).await.expect("a receive");
        for chunk in &full {
            receiving.write(chunk.clone()).await.expect("written");
            assert!(!knows(&*b, &record).await, "visible before commit");
        }
        receiving.settle().await.expect("acted on");
        drop(receiving);
        assert!(!knows(&*b, &record).await);
        take_in(&*b, incoming(&record, None, &one, &format), &full).await.expect("received");
        let before = look_at(&*b, one.key()).await;
        let step = read_all(&*a, delta(Some(&one), &two, &format)).await.expect("a delta");
        let mut receiving = b.receive(incoming(&record, Some(&one), &two, &format)).await.expect("a receive");
        for chunk in &step {
            receiving.write(chunk.clone()).await.expect("written");
        }
        assert_eq!(b.lineage(record.id).await.expect("a lineage").snapshots, std::slice::from_ref(&one));
        receiving.settle().await.expect("acted on");
        drop(receiving);
        assert_eq!(b.partial(record.id).await.expect("no partial"), None);
        assert_eq!(b.lineage(record.id).await.expect("a lineage").snapshots, std::slice::from_ref(&one));
        assert_eq!(look_at(&*b, one.key()).await, before);
        assert_eq!(b.verify(one.key(), Compare::Contents).await.expect("verified"), []);
    }
}

async fn knows(driver: &dyn Driver, record: &VolumeRecord) -> bool {
    driver.scan().await.expect("a scan").volumes.iter().any(|(it, _)| it.id == record.id)
}

async fn garbage(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    for format in common_formats(&*a, &*b) {
        let (record, one, two) = two_snapshots(&*a).await;
        let full = read_all(&*a, delta(None, &one, &format)).await.expect("a full delta");
        take_in(&*b, incoming(&record, None, &one, &format), &full).await.expect("received");
        let before = look_at(&*b, one.key()).await;
        let step = read_all(&*a, delta(Some(&one), &two, &format)).await.expect("a delta").concat();
        let mut streams: Vec<(String, Vec<u8>)> = vec![
            ("noise".to_owned(), (0..100_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
            ("nothing".to_owned(), Vec::new()),
            ("twice".to_owned(), [&step[..], &step[..]].concat()),
        ];
        streams.extend((1..12).map(|part| (format!("cut at {part}/12"), step[..step.len() * part / 12].to_vec())));
        streams.push(("cut by a byte".to_owned(), step[..step.len() - 1].to_vec()));
        for (what, stream) in streams {
            let chunks: Vec<_> = stream.chunks(65_536).map(Bytes::copy_from_slice).collect();
            let result = take_in(&*b, incoming(&record, Some(&one), &two, &format), &chunks).await;
            assert!(result.is_err(), "{what} was taken");
            assert_eq!(b.lineage(record.id).await.expect("a lineage").snapshots, std::slice::from_ref(&one), "{what}");
        }
        assert_eq!(look_at(&*b, one.key()).await, before);
        assert_eq!(b.verify(one.key(), Compare::Contents).await.expect("verified"), []);
        let chunks: Vec<_> = step.chunks(65_536).map(Bytes::copy_from_slice).collect();
        take_in(&*b, incoming(&record, Some(&one), &two, &format), &chunks).await.expect("the right one is taken");
    }
}

async fn one_receive(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    let format = DeltaFormat::tree();
    let (record, one, _) = two_snapshots(&*a).await;
    let first = b.receive(incoming(&record, None, &one, &format)).await.expect("a receive");
    assert!(b.receive(incoming(&record, None, &one, &format)).await.is_err(), "a second one");
    drop(first);
    b.receive(incoming(&record, None, &one, &format)).await.expect("free again");
}

/// Random-looking data in files and more of it than one checkpoint is apart.
async fn bulky(driver: &dyn Driver) -> (VolumeRecord, HeldSnapshot) {
    let record = volume("bulky");
    driver.create(&record).await.expect("created");
    write(driver, record.id, |head| {
        let mut seed = 1_u64;
        for file in 0..6 {
            let data: Vec<u8> = (0..30_000_000 / 8)
                .flat_map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    seed.to_le_bytes()
                })
                .collect();
            std::fs::write(head.join(format!("file{file}")), data).expect("write");
        }
    })
    .await;
    let held = take(driver, record.id, "one").await;
    (record, held)
}

async fn suspend(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    let (record, one) = bulky(&*a).await;
    for format in common_formats(&*a, &*b) {
        let chunks = read_all(&*a, delta(None, &one, &format)).await.expect("a full delta");
        let request = incoming(&record, None, &one, &format);
        let mut receiving = b.receive(request.clone()).await.expect("a receive");
        for chunk in &chunks[..chunks.len() * 2 / 3] {
            receiving.write(chunk.clone()).await.expect("written");
        }
        let Some(_) = receiving.suspend().await.expect("suspended") else {
            assert_eq!(b.partial(record.id).await.expect("no partial"), None);
            continue;
        };
        assert!(!knows(&*b, &record).await);
    }
    drop(b);
    let b = bench.open("b").await;
    let Some(partial) = b.partial(record.id).await.expect("a look") else { return };
    assert_eq!((partial.volume, &partial.snapshot, partial.base), (record.id, &one.snapshot, None));
    assert!(partial.received_bytes > 0);
    let resume = Some(partial.point.clone());
    let rest = DeltaRequest { resume: resume.clone(), ..delta(None, &one, &partial.format) };
    let rest = read_all(&*a, rest).await.expect("the rest");
    let all = read_all(&*a, delta(None, &one, &partial.format)).await.expect("a full delta");
    let bytes = |chunks: &[Bytes]| chunks.iter().map(Bytes::len).sum::<usize>();
    assert!(bytes(&rest) < bytes(&all) * 3 / 4, "the rest is {} of {} bytes", bytes(&rest), bytes(&all));
    let request = ReceiveRequest { resume, ..incoming(&record, None, &one, &partial.format) };
    assert_eq!(take_in(&*b, request, &rest).await.expect("received"), one);
    assert_eq!(look_at(&*b, one.key()).await, look_at(&*a, one.key()).await);
    // What arrived before and after is what was noted of it.
    assert_eq!(b.verify(one.key(), Compare::Contents).await.expect("verified"), []);
    assert_eq!(b.partial(record.id).await.expect("a look"), None);
}

async fn stale(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    let (record, one, _) = two_snapshots(&*a).await;
    let is_stale = |kind: &ErrorKind| matches!(kind, ErrorKind::ResumeStale(_));
    for format in common_formats(&*a, &*b) {
        let resume = Some(ResumePoint(Bytes::from_static(b"made up")));
        let request = ReceiveRequest { resume, ..incoming(&record, None, &one, &format) };
        refused(b.receive(request).await.map(|_| ()), "nothing was kept", is_stale);
    }
    assert!(!knows(&*b, &record).await);
}

async fn promote(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    let format = DeltaFormat::tree();
    let (record, one, two) = two_snapshots(&*a).await;
    let full = read_all(&*a, delta(None, &two, &format)).await.expect("a full delta");
    take_in(&*b, incoming(&record, None, &two, &format), &full).await.expect("received");
    let promoted = VolumeRecord { epoch: record.epoch + 1, ..record.clone() };
    b.set_record(&promoted).await.expect("promoted");
    assert_eq!(look_at_head(&*b, record.id, Access::ReadOnly).await, look_at(&*b, two.key()).await);
    write(&*b, record.id, |head| std::fs::write(head.join("here"), "now").expect("write")).await;
    assert_eq!(state(&*b, record.id).await, HeadState::Dirty);
    assert_eq!(look_at(&*b, two.key()).await, look_at(&*a, two.key()).await, "the snapshot stays");
    let three = take(&*b, record.id, "three").await;
    let back = read_all(&*b, delta(Some(&two), &three, &format)).await.expect("a delta");
    let demoted = VolumeRecord { role: Role::Replica, ..promoted };
    a.set_record(&demoted).await.expect("demoted");
    take_in(&*a, incoming(&record, Some(&two), &three, &format), &back).await.expect("received");
    assert_eq!(a.lineage(record.id).await.expect("a lineage").snapshots, [one, two, three]);
}

async fn demote(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    let format = DeltaFormat::tree();
    let (record, one, two) = two_snapshots(&*a).await;
    let full = read_all(&*a, delta(None, &one, &format)).await.expect("a full delta");
    take_in(&*b, incoming(&record, None, &one, &format), &full).await.expect("received");
    write(&*b, record.id, |_| {}).await;
    let step = read_all(&*a, delta(Some(&one), &two, &format)).await.expect("a delta");
    take_in(&*b, incoming(&record, Some(&one), &two, &format), &step).await.expect("received over a clean head");
    assert_eq!(state(&*b, record.id).await, HeadState::Clean);
    let newest = look_at(&*b, two.key()).await;
    assert_eq!(look_at_head(&*b, record.id, Access::ReadOnly).await, newest);
    assert_eq!(look_at_head(&*b, record.id, Access::ReadWrite).await, newest);
    write(&*b, record.id, |head| std::fs::write(head.join("mine"), "mine").expect("write")).await;
    let three = take(&*a, record.id, "three").await;
    let step = read_all(&*a, delta(Some(&two), &three, &format)).await.expect("a delta");
    let result = take_in(&*b, incoming(&record, Some(&two), &three, &format), &step).await;
    assert!(result.is_err(), "a dirty head was passed over");
    let path = b.attach(Target::Head(record.id), Access::ReadWrite).await.expect("attached");
    assert!(path.join("mine").exists(), "what was written is still there");
}

async fn unknown_format(bench: &Bench) {
    let (a, b) = (bench.open("a").await, bench.open("b").await);
    let (record, one, _) = two_snapshots(&*a).await;
    let format = DeltaFormat("punch-cards/1".to_owned());
    let is_unsupported = |kind: &ErrorKind| matches!(kind, ErrorKind::Unsupported(_));
    refused(a.read_delta(delta(None, &one, &format)).await.map(|_| ()), "read", is_unsupported);
    refused(b.receive(incoming(&record, None, &one, &format)).await.map(|_| ()), "receive", is_unsupported);
}
