//! The bytes of every message and code, frozen: a change here is a change of the protocol. And hostile bytes.
#![allow(clippy::unwrap_used)]

mod support;

use std::num::NonZeroU64;

use bytes::Bytes;
use flocker_replication::{
    ancestry::{Ancestor, FORGOTTEN_LIMIT, Forgotten},
    message::*,
    outline::{Block, Piece},
    plan::{Direction, Outcome, Point, Points, UnrelatedReason, Verdict},
    resolution::{Kept, Place, Resolution},
};
use flocker_storage::{
    delta::{DeltaFormat, Partial, RESUME_POINT_LIMIT, ResumePoint},
    driver::Finding,
    model::*,
};
use proptest::prelude::*;
use support::*;
use uuid::Uuid;

fn point(number: u128) -> Point {
    Point::from(&held(number, &[]))
}

fn points(numbers: &[u128]) -> Points {
    Points::new(&chain(numbers))
}

fn outcome(verdict: Verdict) -> Outcome {
    Outcome {
        direction: Direction::Push,
        volume: "db".parse().unwrap(),
        name: "db".parse().unwrap(),
        sender: host("host-a"),
        receiver: host("host-b"),
        want: point(2),
        verdict,
    }
}

fn verdicts() -> [Verdict; 6] {
    [
        Verdict::UpToDate,
        Verdict::FastForward { base: Some(point(1)), missing: points(&[2]) },
        Verdict::Behind { newer: points(&[3]) },
        Verdict::Diverged {
            common: point(1),
            only_sender: points(&[2]),
            only_receiver: points(&[3]),
            receiver_name: "s1".parse().unwrap(),
            head: HeadState::Dirty,
        },
        Verdict::Unrelated {
            reason: UnrelatedReason::NoCommonSnapshot,
            receiver_volume: volume(DB),
            receiver_tip: Some(point(3)),
        },
        Verdict::Dirty { tip: None },
    ]
}

fn forgotten(ancestors: &[(u128, &[u128])]) -> Forgotten {
    let one =
        |(number, of): &(u128, &[u128])| Ancestor { id: id(*number), parents: of.iter().map(|&of| id(of)).collect() };
    ancestors.iter().map(one).collect()
}

fn messages() -> Vec<Message> {
    let transfer = Uuid::from_u128(7);
    let db: VolumeName = "db".parse().unwrap();
    let resume = ResumePoint(Bytes::from_static(b"point"));
    let mut snapshot = held(2, &[1]).snapshot;
    snapshot.metadata.insert("why".to_owned(), "test".to_owned());
    let base = Some(SnapshotKey { volume: volume(DB), snapshot: id(1) });
    let partial = Partial {
        volume: volume(DB),
        snapshot: snapshot.clone(),
        base,
        format: DeltaFormat::tree(),
        point: resume.clone(),
        received_bytes: 9,
    };
    let mut full_answer = answer(Some(&chain(&[1])));
    full_answer.mounted = Some("/mnt/db".to_owned());
    full_answer.elsewhere = vec![SnapshotKey { volume: volume(77), snapshot: id(1) }];
    full_answer.partial = Some(partial);
    full_answer.forgotten = forgotten(&[(8, &[7])]);
    // The lineage travels as pieces.
    full_answer.pieces = vec![Piece::Offered { first: 0, count: 300 }, Piece::Own(chain(&[1]))];
    full_answer.lineage = Lineage::default();
    let problem = Problem::new(ProblemCode::Busy).with("volume", "db");
    let mut all = vec![
        Message::Offer(Box::new(offer(&chain(&[1, 2]), 2))),
        Message::PullRequest(Box::new(PullRequest {
            protocol: PROTOCOL,
            transfer,
            volume: db.clone(),
            snapshot: Some("s2".parse().unwrap()),
            name: "copy".parse().unwrap(),
            policy: DivergencePolicy::Theirs,
            mode: Mode::DryRun,
            receiver: host("host-b"),
            limit_bytes_per_second: NonZeroU64::new(300),
        })),
        Message::Describe(Describe { protocol: PROTOCOL, volume: db }),
        Message::Description(Box::new(Description {
            volume: record(DB, "db"),
            lineage: Lineage::default(),
            pieces: vec![Piece::Offered { first: 1, count: 2 }, Piece::Own(chain(&[1]))],
            head: HeadState::Dirty,
            mounted: None,
            formats: vec![DeltaFormat::tree()],
            host: host("host-b"),
        })),
        Message::Answer(Box::new(full_answer)),
        Message::BeginStep(Box::new(BeginStep {
            step: 1,
            snapshot,
            unchanged: false,
            logical_bytes: 2000,
            base,
            format: DeltaFormat::tree(),
            stream: StepStream { id: transfer, oldest_frame: 3 },
            resume: Some(resume.clone()),
            after: After::Nothing,
        })),
        Message::StepReady(StepReady { step: 1, start: StepStart::Beginning }),
        Message::StepReady(StepReady { step: 1, start: StepStart::Frame(300) }),
        Message::StepReady(StepReady { step: 1, start: StepStart::Point(resume) }),
        Message::StepDone(Box::new(StepDone { step: 1, held: held(2, &[1]) })),
    ];
    all.extend(verdicts().map(|verdict| Message::Conclude(Box::new(outcome(verdict)))));
    all.extend([Message::Finish, Message::Finished, Message::Problem(problem)]);
    all.push(Message::Remarks(vec![Finding { path: "run/s".to_owned(), what: "a socket".to_owned() }]));
    let place = |host: &str, volume: &str| Place { host: host.parse().unwrap(), volume: volume.parse().unwrap() };
    let [_, _, _, diverged, _, _] = verdicts();
    all.push(Message::Resolve(Box::new(outcome(diverged.clone()))));
    all.push(Message::Resolved(Box::new(Resolution {
        policy: DivergencePolicy::Theirs,
        found: diverged,
        landed: place("host-b", "db"),
        kept: Some(Kept { place: place("host-b", "db.host-a.00000003"), tip: Some(point(3)) }),
    })));
    all.push(Message::TakeOver(Box::new(TakeOver {
        protocol: PROTOCOL,
        name: "db".parse().unwrap(),
        volume: volume(DB),
        tip: id(2),
        epoch: 2,
    })));
    all.push(Message::TakenOver(TakenOver { epoch: 2 }));
    all.push(Message::Lane(Lane { protocol: PROTOCOL, stream: Uuid::from_u128(7) }));
    all.push(Message::LaneReady);
    all.push(Message::Expected(300));
    all.push(Message::AskClaims(AskClaims { protocol: PROTOCOL, volumes: vec![volume(DB)] }));
    all.push(Message::Claims(vec![VolumeClaim {
        volume: volume(DB),
        name: "db".parse().unwrap(),
        role: Role::Primary,
        epoch: 2,
        primary: Some(host("host-b")),
    }]));
    // Three that follow one another, then a merge.
    let forgotten = forgotten(&[(9, &[8]), (8, &[7]), (7, &[1]), (6, &[5, 4])]);
    all.push(Message::Rest(Rest { forgotten, older: vec![Block { digest: [7; 16], count: 300 }] }));
    all.push(Message::Want(vec![0, 300]));
    all.push(Message::Snapshots(chain(&[1])));
    all
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_message_keeps_its_bytes() {
    let lines: Vec<String> = messages()
        .iter()
        .map(|message| {
            let bytes = postcard::to_allocvec(message).unwrap();
            assert_eq!(&postcard::from_bytes::<Message>(&bytes).unwrap(), message);
            format!("{} {}", message.kind().replace(' ', "-"), hex(&bytes))
        })
        .collect();
    let golden: Vec<&str> = include_str!("../testdata/messages.hex").lines().collect();
    assert_eq!(lines, golden);
}

/// What opens an exchange is read whatever revision its sender speaks, so that it can be refused in words.
#[test]
fn what_opens_an_exchange_keeps_its_bytes_through_all_revisions() {
    let bytes = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    for line in include_str!("../testdata/openings-1.hex").lines() {
        let (kind, text) = line.split_once(' ').unwrap();
        let (message, rest) = postcard::take_from_bytes::<Message>(&bytes(text)).map(|(m, r)| (m, r.len())).unwrap();
        let protocol = match &message {
            Message::Offer(offer) => offer.protocol,
            Message::PullRequest(request) => request.protocol,
            Message::Describe(request) => request.protocol,
            Message::TakeOver(request) => request.protocol,
            Message::AskClaims(request) => request.protocol,
            other => panic!("{} opens nothing", other.kind()),
        };
        assert_eq!((message.kind(), protocol, rest), (kind, 1, 0));
    }
}

#[test]
fn every_problem_code_keeps_its_number() {
    let codes = [
        (ProblemCode::NotPermitted, "not-permitted"),
        (ProblemCode::UnknownVolume, "unknown-volume"),
        (ProblemCode::UnknownSnapshot, "unknown-snapshot"),
        (ProblemCode::NameTaken, "name-taken"),
        (ProblemCode::Busy, "busy"),
        (ProblemCode::InUse, "in-use"),
        (ProblemCode::NoSpace, "no-space"),
        (ProblemCode::StepMismatch, "step-mismatch"),
        (ProblemCode::DigestMismatch, "digest-mismatch"),
        (ProblemCode::UnknownFormat, "unknown-format"),
        (ProblemCode::Tampered, "tampered"),
        (ProblemCode::ResumeStale, "resume-stale"),
        (ProblemCode::VersionMismatch, "version-mismatch"),
        (ProblemCode::PermissionDenied, "permission-denied"),
        (ProblemCode::ShuttingDown, "shutting-down"),
        (ProblemCode::Internal, "internal"),
        (ProblemCode::ProtocolViolation, "protocol-violation"),
        (ProblemCode::Malformed, "malformed"),
        (ProblemCode::PolicyUnsupported, "policy-unsupported"),
        (ProblemCode::LimitExceeded, "limit-exceeded"),
        (ProblemCode::Cancelled, "cancelled"),
        (ProblemCode::TimedOut, "timed-out"),
        (ProblemCode::FormatUnfit, "format-unfit"),
        (ProblemCode::HandOffRefused, "hand-off-refused"),
        (ProblemCode::Reserved24, "reserved24"),
        (ProblemCode::Reserved25, "reserved25"),
    ];
    for (number, (code, _)) in (0_u8..).zip(codes) {
        assert_eq!(postcard::to_allocvec(&code).unwrap(), [number], "{code:?}");
        let sentence = Problem::new(code).describe();
        assert!(!sentence.is_empty() && !sentence.contains("  ") && !sentence.ends_with('.'), "{sentence}");
    }
    let said = Problem::new(ProblemCode::InUse).with("volume", "db").with("path", "/mnt/db\u{1b}[2J");
    assert_eq!(said.describe(), "volume db is mounted at /mnt/db\\u{1b}[2J");
    assert!(Problem::new(ProblemCode::Busy).is_transient() && !Problem::new(ProblemCode::NoSpace).is_transient());
}

#[test]
fn what_breaks_a_limit_is_refused() {
    let rule = |message: Message| message.validate().unwrap_err().rule;
    let offered = |change: &dyn Fn(&mut Offer)| {
        let mut offer = offer(&chain(&[1, 2]), 2);
        change(&mut offer);
        rule(Message::Offer(Box::new(offer)))
    };
    assert!(offered(&|offer| offer.want = id(9)).contains("lacks the wanted snapshot"));
    assert!(offered(&|offer| offer.lineage.snapshots.push(held(1, &[]))).contains("twice"));
    assert!(offered(&|offer| offer.lineage.snapshots[0] = held(1, &[5, 6, 7])).contains("3 parents"));
    assert!(offered(&|offer| offer.lineage.snapshots[0] = held(1, &[1])).contains("its own parent"));
    assert!(offered(&|offer| offer.lineage.snapshots[0] = held(1, &[5, 5])).contains("a parent twice"));
    assert!(offered(&|offer| offer.formats = vec![DeltaFormat(String::new())]).contains("format's name"));
    assert!(offered(&|offer| offer.formats = vec![DeltaFormat::tree(); FORMATS_LIMIT + 1]).contains("formats"));
    let metadata = |offer: &mut Offer| {
        offer.lineage.snapshots[0].snapshot.metadata.insert("a".to_owned(), "b".to_owned());
    };
    assert!(offered(&metadata).contains("metadata"));
    let many: Vec<_> = (0..=LINEAGE_LIMIT as u128).map(|number| held(number, &[])).collect();
    assert!(offered(&|offer| offer.lineage.snapshots = many.clone()).contains("20000 at most"));
    let long = ResumePoint(vec![0; RESUME_POINT_LIMIT + 1].into());
    assert!(rule(Message::StepReady(StepReady { step: 0, start: StepStart::Point(long) })).contains("resume point"));
    let counts_wrongly = Verdict::Behind { newer: Points { total: 0, listed: points(&[3]).listed } };
    assert!(rule(Message::Resolve(Box::new(outcome(counts_wrongly.clone())))).contains("counts wrongly"));
    for message in messages() {
        if let Message::Resolved(resolution) = message {
            let resolution = Resolution { found: counts_wrongly.clone(), ..*resolution };
            assert!(rule(Message::Resolved(Box::new(resolution))).contains("counts wrongly"));
        }
    }
    let remembered = |ancestors: &[(u128, &[u128])]| {
        rule(Message::Rest(Rest { forgotten: forgotten(ancestors), older: Vec::new() }))
    };
    assert!(remembered(&[(9, &[8, 7, 6])]).contains("3 parents"));
    assert!(remembered(&[(9, &[9])]).contains("its own parent"));
    assert!(remembered(&[(9, &[8, 8])]).contains("a parent twice"));
    assert!(remembered(&[(9, &[8]), (8, &[9]), (9, &[])]).contains("twice"));
    let many: Forgotten =
        (0..=FORGOTTEN_LIMIT as u128).map(|number| Ancestor { id: id(number), parents: Vec::new() }).collect();
    assert!(rule(Message::Rest(Rest { forgotten: many.clone(), older: Vec::new() })).contains("4096 are allowed"));
    let flooded = Answer { forgotten: many, ..answer(None) };
    assert!(rule(Message::Answer(Box::new(flooded))).contains("4096 are allowed"));
    // One run of no ids.
    let empty_run = postcard::from_bytes::<Message>(&[19, 1, 0, 0, 0]).unwrap();
    assert!(rule(empty_run).contains("run of no ancestors"));
    let finding = Finding { path: "ä".repeat(REMARK_LIMIT), what: String::new() };
    assert!(rule(Message::Remarks(vec![finding.clone()])).contains("8192 bytes"));
    let cut = Message::remarks(vec![finding; REMARKS_LIMIT + 1]);
    assert!(cut.validate().is_ok() && matches!(&cut, Message::Remarks(remarks) if remarks.len() == REMARKS_LIMIT));
    assert!(messages().into_iter().all(|message| message.validate().is_ok()));
}

#[test]
fn the_longest_lineage_fits_the_message_limit() {
    let mut one = named(1, &[2, 3], &"n".repeat(NAME_LIMIT));
    one.snapshot.host.name = "h".repeat(NAME_LIMIT).parse().unwrap();
    one.snapshot.created = jiff::Timestamp::MAX;
    one.logical_bytes = u64::MAX;
    let bytes = postcard::to_allocvec(&one).unwrap().len() * LINEAGE_LIMIT;
    assert!(bytes + 33 * ELSEWHERE_LIMIT + 51 * FORGOTTEN_LIMIT + 256 * 1024 < MESSAGE_LIMIT, "{bytes}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_an_error_or_a_message_that_can_be_judged(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), flip in 1_u8..,
    ) {
        let mut flipped = postcard::to_allocvec(which.get(&messages())).unwrap();
        let at = at.index(flipped.len());
        flipped[at] ^= flip;
        for bytes in [&bytes[..], &flipped[..], &flipped[..at]] {
            if let Ok(message) = postcard::from_bytes::<Message>(bytes) {
                let _ = message.validate();
                if let Message::Problem(problem) = message {
                    problem.describe();
                }
            }
        }
    }
}
