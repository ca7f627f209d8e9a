//! The sender's whole story of a push: offer, compare, plan, and one delta after the other.
//!
//! Owns the order of things on the sender. Refuses to know bytes on the wire ([`flocker_transport`]), which snapshots
//! to send ([`flocker_replication::plan`]) and how a delta is made (the driver). Neighbours: [`crate::receive`] is the
//! other side; [`crate::pull`] makes the peer run [`send`].
//!
//! A stream of a delta outlives its connection: when the line is cut while both daemons live it waits in the outbox
//! ([`crate::outbox`]), and the next attempt goes on at the frame the receiver wants.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use flocker_replication::{
    ancestry::{self, Forgotten},
    divergence::{self, Receiver, Sender},
    merge::with_merged,
    message::{
        After, Answer, BeginStep, DivergencePolicy, LINEAGE_LIMIT, Message, Mode, Offer, PROTOCOL, Rest, StepStart,
        StepStream, strip,
    },
    outline,
    plan::{self, Direction, Outcome, Plan, Step, Verdict},
    resolution::{self, Resolution, Way},
};
use flocker_storage::{
    delta::{Compare, DeltaFormat, DeltaReader, DeltaRequest, Partial, ResumePoint},
    model::{HeadState, HeldSnapshot, Lineage, SnapshotId, SnapshotName, VolumeName},
};
use flocker_transport::{BulkError, ErrorKind as LinkErrorKind, Gate, NO_PROGRESS};
use uuid::Uuid;

use crate::{
    catalog::{Pin, Volume},
    daemon::Node,
    estimate::{self, Expectations},
    lanes,
    line::{Line, noted},
    metrics,
    outbox::Stream,
    problem::{self, problem},
    pull,
    resolve::Concluded,
    transfers::{Failure, Job},
};

/// How long the sender waits for a receiver to make a step durable: a big volume is flushed to a slow disk.
pub(crate) const COMMIT_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// What a sender is asked to do.
pub(crate) struct Sending {
    /// The same for each attempt.
    pub(crate) transfer: Uuid,
    /// Push or pull, for the words of a refusal.
    pub(crate) direction: Direction,
    /// The volume as it is here.
    pub(crate) volume: Volume,
    /// The snapshot the receiver shall have.
    pub(crate) want: SnapshotId,
    /// The name at the receiver.
    pub(crate) name: VolumeName,
    /// What shall happen when the histories have gone apart.
    pub(crate) policy: DivergencePolicy,
    /// Whether to act.
    pub(crate) mode: Mode,
    /// How changed files are found.
    pub(crate) compare: Compare,
    /// What holds it back on the wire.
    pub(crate) gates: Vec<Arc<Gate>>,
}

/// One attempt of a push started here.
pub(crate) async fn attempt(node: &Arc<Node>, job: &Arc<Job>) -> Result<Concluded, Failure> {
    let Some(snapshot) = &job.request.snapshot else {
        return Err(problem::internal("a push names no snapshot").into());
    };
    let volume = node.catalog.find(&job.volume)?;
    let want = node.sendable(&volume, snapshot).await?;
    let row = node.find_peer(&job.request.peer).await?;
    let lent = node.lend(&row).await?;
    let watch = node.close_lent_on_stop(&lent, Some(job));
    let mut line = Line::open(row.name, &lent).await?;
    let sending = Sending {
        transfer: job.id,
        direction: Direction::Push,
        name: job.request.as_name.clone().unwrap_or_else(|| volume.record.name.clone()),
        volume,
        want,
        policy: job.request.on_divergence,
        mode: if job.request.dry_run { Mode::DryRun } else { Mode::Run },
        compare: job.request.compare,
        gates: node.limits.gates(&line.peer, job.request.limit_bytes_per_second),
    };
    let concluded = send(node, &mut line, &sending, Some(job)).await?;
    drop((line, watch));
    node.give_back(lent);
    if resolution::way(sending.policy, (&concluded.outcome.verdict).into()) == Way::Reverse && sending.mode == Mode::Run
    {
        return reverse(node, job, concluded.outcome).await;
    }
    Ok(concluded)
}

/// The receiver wins: its history is brought here, and this node's own becomes a fork.
async fn reverse(node: &Arc<Node>, job: &Arc<Job>, found: Outcome) -> Result<Concluded, Failure> {
    let wanted = pull::Wanted {
        volume: found.name.clone(),
        snapshot: None,
        name: found.volume.clone(),
        policy: DivergencePolicy::Theirs,
        mode: Mode::Run,
    };
    let concluded = pull::fetch(node, job, wanted).await?;
    Ok(concluded.reversed(found))
}

/// The other half of a pull by the policy `ours`: this node's history, with what its head holds, takes the place of the
/// peer's.
pub(crate) async fn impose(node: &Arc<Node>, job: &Arc<Job>, found: Outcome) -> Result<Concluded, Failure> {
    let mut volume = node.catalog.find(&found.name)?;
    {
        let _guard = node.catalog.work_on(volume.record.id).await;
        if node.driver.head_state(volume.record.id).await.map_err(problem_of)? == HeadState::Dirty {
            node.keep_head(&mut volume, "before").await?;
        }
    }
    let lineage = node.driver.lineage(volume.record.id).await.map_err(problem_of)?;
    let Some(tip) = lineage.tip() else {
        return Err(problem(404, "snapshot_not_found", format!("{} has no snapshot here", found.name)).into());
    };
    let row = node.find_peer(&job.request.peer).await?;
    let lent = node.lend(&row).await?;
    let watch = node.close_lent_on_stop(&lent, Some(job));
    let mut line = Line::open(row.name, &lent).await?;
    let sending = Sending {
        transfer: job.id,
        direction: Direction::Push,
        want: tip.snapshot.id,
        volume,
        name: found.volume.clone(),
        policy: DivergencePolicy::Theirs,
        mode: Mode::Run,
        compare: job.request.compare,
        gates: node.limits.gates(&line.peer, job.request.limit_bytes_per_second),
    };
    let concluded = send(node, &mut line, &sending, Some(job)).await?;
    drop((line, watch));
    node.give_back(lent);
    Ok(concluded.reversed(found))
}

/// The sender's story on a stream where the receiver waits for an offer.
pub(crate) async fn send(
    node: &Arc<Node>,
    line: &mut Line<'_>,
    sending: &Sending,
    job: Option<&Arc<Job>>,
) -> Result<Concluded, Failure> {
    let lineage = node.driver.lineage(sending.volume.record.id).await.map_err(problem_of)?;
    // With what merges took in, so that a receiver which has that gets the merge on top of it.
    let lineage = with_merged(lineage, || node.held_snapshots());
    if lineage.snapshots.len() > LINEAGE_LIMIT {
        return Err(problem(
            409,
            "limit",
            format!("{} has more than {LINEAGE_LIMIT} snapshots", sending.volume.record.name),
        )
        .into());
    }
    // What a transfer reads or builds on is not destroyed underneath it.
    let _pin: Pin = node.pins.pin(lineage.snapshots.iter().map(HeldSnapshot::key));
    let formats = match job {
        Some(job) if job.is_portable() => vec![DeltaFormat::tree()],
        _ => node.driver.capabilities().formats.clone(),
    };
    let forgotten = ancestry::offered(&lineage, &node.memory_of(sending.volume.record.id, &lineage).await?);
    let offered = strip(&lineage);
    let (older, newest) = outline::cut(offered.clone(), sending.want);
    let offer = Offer {
        protocol: PROTOCOL,
        transfer: sending.transfer,
        volume: sending.volume.record.clone(),
        name: sending.name.clone(),
        lineage: newest,
        want: sending.want,
        formats: formats.clone(),
        policy: sending.policy,
        mode: sending.mode,
        sender: node.host(),
        forgotten: Forgotten::default(),
    };
    line.send(&Message::Offer(Box::new(offer))).await?;
    line.send(&Message::Rest(Rest { forgotten: forgotten.clone(), older })).await?;
    let mut answer = line.recv_answer(&offered).await?;
    if let Some(job) = job {
        job.met_peer();
    }
    let sender = Sender { lineage: &lineage, forgotten: &forgotten };
    let (mut outcome, mut steps) = compare(node, sending, &sending.name, &sender, &formats, &answer)?;
    let resolving = is_resolved_there(sending, &outcome);
    if resolving {
        answer = match ask_to_resolve(line, &outcome).await? {
            Asked::LandsIn(answer) => line.unpacked(*answer, &offered)?,
            Asked::Done(resolution) => return Ok(Concluded::resolved(outcome, *resolution)),
        };
        let beside = resolution::incoming_name(&outcome.volume, &outcome.want);
        (outcome, steps) = compare(node, sending, &beside, &sender, &formats, &answer)?;
    }
    let arrived_before = resolving && outcome.verdict == Verdict::UpToDate;
    if outcome.verdict == Verdict::UpToDate {
        node.note_common(sending.volume.record.id, &answer.receiver, sending.want).await?;
    }
    if (steps.is_empty() && !arrived_before) || sending.mode == Mode::DryRun {
        let expected = tokio::select! {
            biased;
            error = line.connection.closed() => return Err(line.failed(error)),
            expected = estimate::beforehand(node, sending.compare, &steps) => expected,
        };
        match (expected, job) {
            (Some(bytes), Some(job)) => job.expects(bytes),
            (Some(bytes), None) => line.send(&Message::Expected(bytes)).await?,
            (None, _) => {}
        }
        line.send(&Message::Conclude(Box::new(outcome.clone()))).await?;
    } else {
        if let Some(job) = job {
            job.planned(&outcome, steps.first().is_some_and(|step| step.base.is_none()));
        }
        // Where this node tells the user itself, and the receiver has nothing to resolve, the last step's end is the exchange's.
        let ends_with_a_step = job.is_some() && !resolving;
        let expectations = Expectations::default();
        let sending_all = async {
            let mut ahead = None;
            for (number, step) in (0_u32..).zip(&steps) {
                let next = steps.get(number as usize + 1);
                let after = if ends_with_a_step && next.is_none() { After::Nothing } else { After::More };
                let of_step = OfStep { number, step, after, ahead: ahead.take(), next, expectations: &expectations };
                ahead = send_step(node, line, sending, job, of_step, &lineage, &answer).await?;
                node.note_common(sending.volume.record.id, &answer.receiver, step.snapshot.snapshot.id).await?;
            }
            Ok::<_, Failure>(())
        };
        beside(sending_all, estimate::estimate(node, job, sending.compare, &steps, &expectations)).await?;
        if ends_with_a_step {
            return Ok(outcome.into());
        }
        line.send(&Message::Finish).await?;
    }
    match line.recv(if resolving { COMMIT_TIMEOUT } else { NO_PROGRESS }).await? {
        Message::Finished => Ok(outcome.into()),
        Message::Resolved(resolution) if resolving => Ok(Concluded::resolved(outcome, *resolution)),
        other => Err(line.broke(format!("{} instead of the end", other.kind())).into()),
    }
}

/// Tells whether the policy has the receiver resolve what the comparison gave.
fn is_resolved_there(sending: &Sending, outcome: &Outcome) -> bool {
    let way = resolution::way(sending.policy, (&outcome.verdict).into());
    matches!(way, Way::Beside | Way::Succeed | Way::Rename) && sending.mode == Mode::Run
}

/// What a receiver says to a request to resolve.
enum Asked {
    /// The history shall land here first.
    LandsIn(Box<Answer>),
    /// It is done.
    Done(Box<Resolution>),
}

async fn ask_to_resolve(line: &mut Line<'_>, found: &Outcome) -> Result<Asked, Failure> {
    line.send(&Message::Resolve(Box::new(found.clone()))).await?;
    match line.recv(COMMIT_TIMEOUT).await? {
        Message::Answer(answer) => Ok(Asked::LandsIn(answer)),
        Message::Resolved(resolution) => Ok(Asked::Done(resolution)),
        other => Err(line.broke(format!("{} instead of a place to land in", other.kind())).into()),
    }
}

fn problem_of(error: flocker_storage::error::Error) -> crate::api::types::ApiProblem {
    error.into()
}

/// Compares both histories. No steps: up to date, or refused.
fn compare(
    node: &Node,
    sending: &Sending,
    name: &VolumeName,
    sender: &Sender<'_>,
    formats: &[DeltaFormat],
    answer: &Answer,
) -> Result<(Outcome, Vec<Step>), Failure> {
    let relation = divergence::compare(sender, &Receiver::from(answer), sending.want)
        .map_err(|error| problem::internal(problem::chain(&error)))?;
    let parties = plan::Parties {
        direction: sending.direction,
        volume: sending.volume.record.name.clone(),
        name: name.clone(),
        sender: node.host(),
        receiver: answer.receiver.clone(),
    };
    let planned = plan::plan(sender.lineage, sending.want, relation, &parties, formats, answer)
        .map_err(|error| problem(409, "no_common_format", problem::chain(&error)))?;
    Ok(match planned {
        Plan::UpToDate(outcome) => (outcome, Vec::new()),
        Plan::FastForward(outcome, steps) => (outcome, steps),
        Plan::Refuse(refusal) => (refusal.0, Vec::new()),
    })
}

/// Does some work, and something beside it that ends with it at the latest.
async fn beside<T>(work: impl Future<Output = T>, beside: impl Future<Output = ()>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        done = &mut work => done,
        () = beside => work.await,
    }
}

/// A delta that is read already, or why it cannot be.
type Reading = Result<Box<dyn DeltaReader>, Failure>;

/// One step of a push, and what surrounds it.
struct OfStep<'a> {
    number: u32,
    step: &'a Step,
    after: After,
    /// Its delta, where it was opened while the step before was made durable.
    ahead: Option<Reading>,
    next: Option<&'a Step>,
    expectations: &'a Expectations,
}

/// Sends one snapshot and waits until the receiver holds it. Opens the next step's delta meanwhile.
async fn send_step(
    node: &Arc<Node>,
    line: &mut Line<'_>,
    sending: &Sending,
    job: Option<&Arc<Job>>,
    OfStep { number, step, after, ahead, next, expectations }: OfStep<'_>,
    lineage: &Lineage,
    answer: &Answer,
) -> Result<Option<Reading>, Failure> {
    let target = step.snapshot.snapshot.id;
    let parked = node.outbox.take(&line.peer, sending.transfer).filter(|stream| stream.fits(step));
    let mut stream = match parked {
        Some(stream) => stream,
        None => Stream::new(step, sending.gates.clone()),
    };
    let begin = begin_step(number, step, after, lineage, answer, &stream)?;
    // While the receiver gets ready, which may take it as long as reading takes here.
    let is_early = stream.source.is_none() && begin.resume.is_none();
    line.send(&Message::BeginStep(Box::new(begin))).await?;
    let whole = request(step, sending, None);
    let early = async {
        match ahead {
            None if is_early => Some(read(node, whole).await),
            ahead => ahead,
        }
    };
    let (said, early) = tokio::join!(biased; line.recv(COMMIT_TIMEOUT), early);
    let start = match said? {
        Message::StepDone(done) if done.step == number => {
            note_done(job);
            return Ok(None);
        }
        Message::StepReady(ready) if ready.step == number => ready.start,
        other => return Err(line.broke(format!("{} instead of being ready for step {number}", other.kind())).into()),
    };
    if let Some(job) = job {
        if start != StepStart::Beginning {
            job.resumed();
        }
        if !matches!(start, StepStart::Frame(_)) {
            job.stream_over();
        }
    }
    let first_frame = match start {
        StepStart::Frame(frame) => frame,
        StepStart::Beginning => match early {
            Some(reader) => stream.open(reader?),
            None => stream.open(read(node, request(step, sending, None)).await?),
        },
        StepStart::Point(point) => stream.open(read(node, request(step, sending, Some(point))).await?),
    };
    noted("delta");
    expectations.begin(number as usize, &stream.expected);
    let link = line.connection.open_bulk(u64::from(number)).await.map_err(|error| line.failed(error))?;
    let meter = node.metrics.meter(metrics::Way::Sent, &line.peer, &stream.outgoing.progress());
    let report = |progress: flocker_transport::Progress| {
        meter.moved(&progress);
        if let Some(job) = job {
            job.moved(&progress);
        }
    };
    let Some(source) = &mut stream.source else {
        return Err(line.broke("it goes on with a stream that this node has not opened").into());
    };
    let (mut joining, lanes) = lanes::open(node, &line.peer, job, stream.id, step);
    let sent = stream.outgoing.run_in_lanes(link, &mut joining, first_frame, source, &report).await;
    drop(lanes);
    if let Err(error) = sent {
        return Err(step_failed(node, line, sending, job, stream, error).await);
    }
    let findings = source.0.take_findings();
    // What came in part before is read from where that ends, once the receiver has said so.
    let next = next.filter(|next| partial_of(next, answer).is_none());
    let ahead = async {
        match next {
            Some(next) => {
                noted("ahead");
                Some(read(node, request(next, sending, None)).await)
            }
            None => None,
        }
    };
    let (said, ahead) = tokio::join!(biased; line.recv_behind_remarks(job, COMMIT_TIMEOUT), ahead);
    match said? {
        Message::StepDone(done) if done.step == number && done.held.snapshot.id == target => {
            note_done(job);
            line.remark(job, findings).await?;
            Ok(ahead)
        }
        other => Err(line.broke(format!("{} instead of the end of step {number}", other.kind())).into()),
    }
}

fn note_done(job: Option<&Arc<Job>>) {
    if let Some(job) = job {
        job.step_done();
    }
}

fn begin_step(
    number: u32,
    step: &Step,
    after: After,
    lineage: &Lineage,
    answer: &Answer,
    stream: &Stream,
) -> Result<BeginStep, Failure> {
    let held = lineage.find(step.snapshot.snapshot.id);
    let held = held.ok_or_else(|| problem::internal("a planned snapshot is not in the lineage"))?;
    Ok(BeginStep {
        step: number,
        snapshot: held.snapshot.clone(),
        unchanged: held.unchanged,
        logical_bytes: held.logical_bytes,
        base: step.base.map(|base| base.on_receiver),
        format: step.format.clone(),
        stream: StepStream { id: stream.id, oldest_frame: stream.oldest_frame() },
        resume: partial_of(step, answer).map(|partial| partial.point.clone()),
        after,
    })
}

/// Returns what the receiver kept of a step.
fn partial_of<'a>(step: &Step, answer: &'a Answer) -> Option<&'a Partial> {
    answer.partial.as_ref().filter(|partial| {
        partial.snapshot.id == step.snapshot.snapshot.id
            && partial.base == step.base.map(|base| base.on_receiver)
            && partial.format == step.format
    })
}

/// Sorts a failed stream: parks it where the line was lost, asks the peer for its reason, or tells it ours.
async fn step_failed(
    node: &Arc<Node>,
    line: &mut Line<'_>,
    sending: &Sending,
    job: Option<&Arc<Job>>,
    stream: Stream,
    error: BulkError,
) -> Failure {
    match error {
        BulkError::Interrupted(error) => {
            // This side closes where the user pauses, where the peer is elsewhere, and where it serves a newer attempt.
            let goes_on = match (&error.kind, job) {
                (LinkErrorKind::ClosedHere, Some(job)) => {
                    job.pause().is_cancelled() || job.peer_moved.load(Ordering::Relaxed)
                }
                (LinkErrorKind::ClosedHere, None) => true,
                (kind, _) => kind.is_transient(),
            };
            if goes_on && !job.is_some_and(|job| job.cancel.is_cancelled()) {
                node.outbox.park(&line.peer, sending.transfer, stream);
            }
            line.failed(error)
        }
        BulkError::Source(error) => {
            let problem = match error.downcast::<flocker_storage::error::Error>() {
                Ok(error) => problem_of(*error),
                Err(error) => problem::internal(error),
            };
            line.report(&problem::to_peer(&problem)).await;
            problem.into()
        }
        BulkError::Stopped(_) => match line.recv(NO_PROGRESS).await {
            Err(failure) => failure,
            Ok(other) => line.broke(format!("{} instead of its reason to stop", other.kind())).into(),
        },
        other => problem(502, "transfer_failed", format!("{}: {}", line.peer, problem::chain(&other))).into(),
    }
}

/// Returns what to ask the driver for: all of a step's delta, or what comes behind a point.
fn request(step: &Step, sending: &Sending, resume: Option<ResumePoint>) -> DeltaRequest {
    DeltaRequest {
        base: step.base.map(|base| base.on_sender),
        target: step.snapshot.key(),
        format: step.format.clone(),
        compare: sending.compare,
        resume,
    }
}

/// Starts to read a delta.
async fn read(node: &Node, request: DeltaRequest) -> Result<Box<dyn DeltaReader>, Failure> {
    Ok(node.driver.read_delta(request).await.map_err(problem_of)?)
}

impl Node {
    /// Finds a snapshot to send in a volume's lineage by name: one of its own, else one along its origin.
    pub(crate) async fn sendable(
        &self,
        volume: &Volume,
        name: &SnapshotName,
    ) -> Result<SnapshotId, crate::api::types::ApiProblem> {
        if let Ok(held) = volume.snapshot(name) {
            return Ok(held.snapshot.id);
        }
        Err(problem::snapshot_not_found(&volume.record.name, name))
    }
}
