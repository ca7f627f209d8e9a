//! The receiver's whole story of a push or a pull: answer an offer, take in one delta after the other, publish each.
//!
//! Owns the order of things on the receiver. Refuses to know what fits a history ([`flocker_replication::inbound`]), how
//! a delta is applied (the driver), and what becomes of a receive whose line is cut ([`crate::inbox`]). Neighbour:
//! [`crate::push`] is the other side.

use std::{collections::BTreeSet, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use flocker_certs::PeerIdentity;
use flocker_replication::{
    ancestry::{self, Memory},
    binding::{self, Binding},
    divergence::{self, Receiver, Relation, Sender},
    inbound::{Inbound, Next},
    message::{
        After, Answer, BeginStep, Message, Mode, Offer, Problem, ProblemCode, StepDone, StepReady, StepStart, strip,
    },
    plan::Outcome,
};
use flocker_storage::{
    delta::{DeltaFormat, Partial, ReceiveRequest, Receiving, ResumePoint},
    error::{Error as StorageError, ErrorKind},
    fault,
    model::{HeadState, HeldSnapshot, Lineage, Role, SnapshotId, SnapshotKey, VolumeId, VolumeRecord},
};
use flocker_transport::{
    BoxError, BulkError, ChunkSink, CloseCode, ErrorKind as LinkErrorKind, Incoming, IncomingLimits, NO_PROGRESS,
};

use crate::{
    api::types::ApiProblem,
    catalog::Volume,
    daemon::Node,
    inbox::{Claim, Open, Parked},
    line::{Line, integrity},
    metrics,
    ownership::Follows,
    problem::{self, problem},
    push::COMMIT_TIMEOUT,
    resolve::{Concluded, Resolving, further_names},
    state::Word,
    transfers::{Failure, Job},
};

/// What is known of an incoming history before the first step.
pub(crate) struct Receipt {
    /// What is offered.
    pub(crate) offer: Offer,
    /// The pull that asked for it; a push by the peer has none here.
    pub(crate) job: Option<Arc<Job>>,
    /// Who pushes; a pull has nobody.
    pub(crate) pusher: Option<PeerIdentity>,
}

/// Receives what belongs to an offer and travels behind it.
pub(crate) async fn rest_of_offer(node: &Node, line: &mut Line<'_>, offer: &mut Offer) -> Result<(), Failure> {
    let older = line.recv_rest(offer).await?;
    if older.is_empty() {
        return Ok(());
    }
    let own = match bind_offer(node, offer, &records(node)).volume() {
        Some(record) => node.driver.lineage(record.id).await.map_err(ApiProblem::from)?,
        None => Lineage::default(),
    };
    line.complete(offer, older, &own).await
}

fn bind_offer<'a>(node: &Node, offer: &Offer, held: &'a [VolumeRecord]) -> Binding<'a> {
    binding::bind(&offer.volume, &offer.name, held, node.inbox.arriving(offer.volume.id).as_ref())
}

/// Tells whether what is offered still belongs into the volume that was found for it.
pub(crate) fn still_lands_in(node: &Node, offer: &Offer, volume: VolumeId) -> bool {
    bind_offer(node, offer, &records(node)).lands_in() == volume
}

fn records(node: &Node) -> Vec<VolumeRecord> {
    node.catalog.volumes().into_iter().map(|volume| volume.record).collect()
}

/// The receiver's story on a stream where an offer has come.
pub(crate) async fn receive(node: &Arc<Node>, line: &mut Line<'_>, mut receipt: Receipt) -> Result<Concluded, Failure> {
    let Bound { answer: mut bound, mut taken, mut here } = bind(node, &receipt).await?;
    let mut inbound = Inbound::new(&receipt.offer, &bound);
    line.send(&Message::Answer(Box::new(bound.clone()))).await?;
    let mut claim: Option<Claim> = None;
    let mut resolving: Option<Resolving> = None;
    let mut last = None;
    loop {
        let lands_in = bound.lands_in;
        match line.recv_behind_remarks(receipt.job.as_ref(), COMMIT_TIMEOUT).await? {
            Message::BeginStep(begin) => {
                let ends_too_early = begin.after == After::Nothing && resolving.is_some();
                if taken || receipt.offer.mode == Mode::DryRun || ends_too_early {
                    return Err(line.broke("it sends what it must not").into());
                }
                let claim = match &mut claim {
                    Some(claim) => claim,
                    none => {
                        let claim = none.insert(Claim::make(node, line, &receipt, lands_in).await?);
                        node.check_replaceable(lands_in)?;
                        node.state.remember(lands_in, inbound.learnt(), Word::Peer).await.map_err(ApiProblem::from)?;
                        claim
                    }
                };
                let held = receive_step(node, line, &receipt, claim, &mut inbound, &mut here, &begin).await?;
                if begin.after == After::Nothing {
                    return Ok(inbound.outcome(&held).into());
                }
                last = Some(held);
            }
            Message::Resolve(_) if claim.is_none() && resolving.is_none() => {
                let mut begun = Resolving::begin(node, &receipt.offer, &bound, receipt.pusher.as_ref())?;
                if begun.at_once {
                    return resolved(node, line, &receipt, begun, lands_in, None).await;
                }
                let beside = place_beside(node, &mut receipt, &mut begun, &bound.lineage).await?;
                Bound { answer: bound, taken, here } = beside;
                inbound = Inbound::new(&receipt.offer, &bound);
                line.send(&Message::Answer(Box::new(bound.clone()))).await?;
                resolving = Some(begun);
            }
            Message::Expected(bytes) if receipt.offer.mode == Mode::DryRun => {
                if let Some(job) = &receipt.job {
                    job.expects(bytes);
                }
            }
            Message::Conclude(outcome) => {
                line.send(&Message::Finished).await?;
                return Ok((*outcome).into());
            }
            Message::Finish => {
                if !inbound.is_complete() {
                    return Err(line.broke("it ended before its last step").into());
                }
                let arrived = last.map(|held| inbound.outcome(&held));
                if let Some(resolving) = resolving {
                    return resolved(node, line, &receipt, resolving, lands_in, arrived).await;
                }
                line.send(&Message::Finished).await?;
                return match arrived {
                    Some(outcome) => Ok(outcome.into()),
                    None => Err(line.broke("it ended without a step").into()),
                };
            }
            other => return Err(line.broke(format!("{} where a step begins", other.kind())).into()),
        }
    }
}

/// Finds where an incoming history lands beside the receiver's: under its own name, or, where the volume of that name has gone
/// another way since, under a further one.
async fn place_beside(
    node: &Node,
    receipt: &mut Receipt,
    resolving: &mut Resolving,
    bound: &Lineage,
) -> Result<Bound, Failure> {
    let mut names = further_names(&resolving.beside);
    loop {
        receipt.offer.name = resolving.beside.clone();
        let mut beside = bind(node, receipt).await?;
        resolving.narrow(bound, &mut beside.answer);
        let receiver = Receiver::from(&beside.answer);
        let relation = divergence::compare(&Sender::from(&receipt.offer), &receiver, receipt.offer.want);
        let fits = matches!(relation, Ok(Relation::UpToDate | Relation::FastForward { .. } | Relation::Behind { .. }));
        match names.next() {
            Some(next) if !fits => resolving.beside = next,
            _ => return Ok(beside),
        }
    }
}

/// Ends a resolution when all of the history is here.
async fn resolved(
    node: &Arc<Node>,
    line: &mut Line<'_>,
    receipt: &Receipt,
    resolving: Resolving,
    landed: VolumeId,
    arrived: Option<Outcome>,
) -> Result<Concluded, Failure> {
    let resolution = resolving.finish(node, &receipt.offer, landed).await?;
    line.send(&Message::Resolved(Box::new(resolution.clone()))).await?;
    Ok(Concluded::resolved(arrived.unwrap_or(resolving.found), resolution))
}

/// Where here what is offered belongs.
struct Bound {
    /// What this node says that it holds of it.
    answer: Answer,
    /// The name belongs to an unrelated volume.
    taken: bool,
    here: Here,
}

/// Finds where what is offered belongs, and what this node holds of it.
async fn bind(node: &Node, receipt: &Receipt) -> Result<Bound, Failure> {
    let offer = &receipt.offer;
    let held = records(node);
    let binding = bind_offer(node, offer, &held);
    let lands_in = binding.lands_in();
    let volume = binding.volume().cloned();
    let mut here = Here::default();
    let head = match &volume {
        Some(record) => {
            here.read(node, record.id).await?;
            match node.look_at_head(record.id).await? {
                HeadState::Dirty => {
                    // Or a snapshot is being published, of which the head has the contents before anybody knows of it.
                    let _guard = node.catalog.work_on(record.id).await;
                    here.read(node, record.id).await?;
                    node.driver.head_state(record.id).await.map_err(ApiProblem::from)?
                }
                clean => clean,
            }
        }
        None => HeadState::Clean,
    };
    let lineage = &here.lineage;
    let offered: BTreeSet<SnapshotId> = offer.lineage.snapshots.iter().map(|held| held.snapshot.id).collect();
    let memory = match &volume {
        Some(record) => node.memory_of(record.id, lineage).await?,
        None => Memory::new(),
    };
    let mut answer = Answer {
        pieces: Vec::new(),
        forgotten: ancestry::answered(lineage, &memory, offer),
        mounted: volume.as_ref().and_then(|record| node.mounts.of(record.id)).map(|row| row.path),
        lineage: strip(lineage),
        head,
        elsewhere: node.catalog.elsewhere(&offered, lands_in),
        formats: match &receipt.job {
            Some(job) if job.is_portable() => vec![DeltaFormat::tree()],
            _ => node.driver.capabilities().reads.clone(),
        },
        partial: if node.inbox.is_parked(lands_in) {
            None
        } else {
            node.driver.partial(lands_in).await.map_err(ApiProblem::from)?
        },
        receiver: node.host(),
        lands_in,
        volume,
    };
    answer.pack(&offer.lineage);
    Ok(Bound { answer, taken: matches!(binding, Binding::Taken(..)), here })
}

/// The lineage of the volume that is received into, read once and then kept up with what lands.
#[derive(Default)]
struct Here {
    lineage: Lineage,
    /// What the volume had of its own when that was its lineage; `None` before it is read.
    extent: Option<(usize, Option<SnapshotId>)>,
}

impl Here {
    /// Returns the lineage as it is now, reading it only where something else than what landed has changed it.
    async fn lineage(&mut self, node: &Node, volume: VolumeId) -> Result<&Lineage, Failure> {
        if self.extent.is_none() || node.catalog.extent(volume) != self.extent {
            self.read(node, volume).await?;
        }
        Ok(&self.lineage)
    }

    async fn read(&mut self, node: &Node, volume: VolumeId) -> Result<(), Failure> {
        self.extent = node.catalog.extent(volume);
        self.lineage = node.lineage_or_none(volume).await?;
        Ok(())
    }

    /// Takes in what landed. In a volume that it made, the lineage is read anew: it goes on into the origin.
    fn landed(&mut self, held: &HeldSnapshot) {
        self.extent = self.extent.map(|(count, _)| (count + 1, Some(held.snapshot.id)));
        self.lineage.snapshots.push(held.clone());
    }
}

/// Takes in one snapshot.
#[allow(clippy::too_many_arguments)]
async fn receive_step(
    node: &Arc<Node>,
    line: &mut Line<'_>,
    receipt: &Receipt,
    claim: &Claim,
    inbound: &mut Inbound,
    here: &mut Here,
    begin: &BeginStep,
) -> Result<HeldSnapshot, Failure> {
    let volume = claim.volume;
    let next = match inbound.begin(begin, here.lineage(node, volume).await?) {
        Ok(next) => next,
        Err(said) => return Err(refuse(line, said).await),
    };
    if begin.after == After::Nothing && !inbound.is_complete() {
        return Err(line.broke("it ends before its last step").into());
    }
    if let Next::Skip(held) = next {
        line.send(&Message::StepDone(Box::new(StepDone { step: begin.step, held: held.clone() }))).await?;
        return Ok(held);
    }
    let _pin = begin.base.map(|base| node.pins.pin([base]));
    let mut open = match reopen(node, claim, begin).await? {
        Some(open) => open,
        None => open_receive(node, receipt, volume, begin).await?,
    };
    let mut lanes = node.lanes.expect(begin.stream.id, line.peer.clone());
    let ready = Message::StepReady(StepReady { step: begin.step, start: open.start.clone() });
    if let Err(failure) = line.send(&ready).await {
        node.inbox.park(volume, receipt.offer.transfer, begin, open);
        return Err(failure);
    }
    let link = tokio::select! {
        biased;
        link = line.connection.accept_bulk(u64::from(begin.step)) => link,
        // What keeps the sender from opening the stream.
        said = line.exchange.recv_within::<Message>(COMMIT_TIMEOUT) => match said {
            Err(error) => Err(error),
            Ok(said) => return Err(instead_of_bytes(line, said)),
        },
    };
    let link = match link {
        Ok(link) => link,
        Err(error) => {
            let failure = line.failed(error);
            node.inbox.park(volume, receipt.offer.transfer, begin, open);
            return Err(failure);
        }
    };
    if let Some(job) = &receipt.job {
        job.step_begun(begin.step, begin.logical_bytes);
        if open.start != StepStart::Beginning {
            job.resumed();
        }
        if !matches!(open.start, StepStart::Frame(_)) {
            job.stream_over();
        }
    }
    let meter = node.metrics.meter(metrics::Way::Received, &line.peer, &open.incoming.progress());
    let report = |progress: flocker_transport::Progress| {
        meter.moved(&progress);
        if let Some(job) = &receipt.job {
            job.moved(&progress);
        }
    };
    let mut sink = Sink(open.receiving);
    let received = open.incoming.run_in_lanes(link, &mut lanes.joining, &mut sink, &report).await;
    drop(lanes);
    open.receiving = sink.0;
    fault::point("node.receive.before-commit");
    if let Err(error) = received {
        return Err(receive_failed(node, line, receipt, volume, begin, open, error).await);
    }
    let findings = open.receiving.take_findings();
    let held = publish(node, receipt, volume, begin.base, open.receiving).await?;
    here.landed(&held);
    node.note_common(volume, &receipt.offer.sender, held.snapshot.id).await?;
    line.remark(receipt.job.as_ref(), findings).await?;
    if let Some(job) = &receipt.job {
        job.step_done();
    }
    fault::point("node.receive.before-step-done");
    line.send(&Message::StepDone(Box::new(StepDone { step: begin.step, held: held.clone() }))).await?;
    Ok(held)
}

/// What a sender said that did not send.
fn instead_of_bytes(line: &Line<'_>, said: Message) -> Failure {
    match line.understand(said) {
        Ok(other) => line.broke(format!("{} instead of a delta", other.kind())).into(),
        Err(failure) => failure,
    }
}

async fn refuse(line: &mut Line<'_>, said: Problem) -> Failure {
    let detail = said.describe();
    line.report(&said).await;
    problem(409, "peer_step_refused", format!("refused a step of {}: {detail}", line.peer)).into()
}

/// Publishes what arrived, unless somebody has mounted the volume for writing meanwhile.
async fn publish(
    node: &Node,
    receipt: &Receipt,
    volume: VolumeId,
    base: Option<SnapshotKey>,
    receiving: Box<dyn Receiving>,
) -> Result<HeldSnapshot, Failure> {
    let _guard = node.catalog.work_on(volume).await;
    let known = node.catalog.record(volume);
    if let Some(known) = &known {
        node.follow(known, &Follows::of(&receipt.offer)).await?;
    }
    let name = &receipt.offer.name;
    let _reserved = match &known {
        Some(_) => None,
        None => Some(node.catalog.reserve(name)?),
    };
    let held = receiving.commit().await.map_err(|error| node.receive_problem(volume, error))?;
    fault::point("node.receive.after-commit");
    match known {
        Some(_) => node.catalog.add_snapshot(held.clone()),
        None => {
            let record = new_record(node, receipt, volume, base);
            node.catalog.put(Volume::new(record, vec![held.clone()]));
        }
    }
    Ok(held)
}

/// Goes on with a receive whose line was cut, if it is of this very stream; one of another is suspended.
async fn reopen(node: &Node, claim: &Claim, begin: &BeginStep) -> Result<Option<Open>, Failure> {
    let Some(parked) = node.inbox.take_parked(claim.volume) else { return Ok(None) };
    let frame = parked.incoming.next_sequence();
    if parked.stream == begin.stream.id && parked.snapshot == begin.snapshot.id && frame >= begin.stream.oldest_frame {
        let Parked { incoming, receiving, .. } = parked;
        return Ok(Some(Open { start: StepStart::Frame(frame), incoming, receiving }));
    }
    parked.receiving.suspend().await.map_err(ApiProblem::from)?;
    Ok(None)
}

/// Opens a receive: where an earlier one of the same snapshot stopped, else at the beginning.
async fn open_receive(node: &Node, receipt: &Receipt, volume: VolumeId, begin: &BeginStep) -> Result<Open, Failure> {
    let partial = node.driver.partial(volume).await.map_err(ApiProblem::from)?;
    let fits = |partial: &Partial| {
        partial.snapshot.id == begin.snapshot.id && partial.base == begin.base && partial.format == begin.format
    };
    let point = match partial {
        Some(partial) if fits(&partial) => Some(partial.point),
        Some(_) => {
            node.driver.discard_partial(volume).await.map_err(ApiProblem::from)?;
            None
        }
        None => None,
    };
    let request = |resume: Option<ResumePoint>| ReceiveRequest {
        volume: new_record(node, receipt, volume, begin.base),
        snapshot: begin.snapshot.clone(),
        base: begin.base,
        format: begin.format.clone(),
        resume,
    };
    let limits = IncomingLimits { integrity: integrity(&begin.format), ..IncomingLimits::default() };
    let incoming = Incoming::with_limits(limits);
    if let Some(point) = point {
        match node.driver.receive(request(Some(point.clone()))).await {
            Ok(receiving) => return Ok(Open { start: StepStart::Point(point), incoming, receiving }),
            Err(error) if matches!(error.kind, ErrorKind::ResumeStale(_)) => {
                tracing::info!(%volume, "a resume point does not fit any more: {}", problem::chain(&error));
                node.driver.discard_partial(volume).await.map_err(ApiProblem::from)?;
            }
            Err(error) => return Err(node.receive_problem(volume, error).into()),
        }
    }
    let receiving = node.driver.receive(request(None)).await.map_err(|error| node.receive_problem(volume, error))?;
    Ok(Open { start: StepStart::Beginning, incoming, receiving })
}

/// The record of the volume that a first snapshot makes.
fn new_record(node: &Node, receipt: &Receipt, volume: VolumeId, base: Option<SnapshotKey>) -> VolumeRecord {
    let offered = &receipt.offer.volume;
    VolumeRecord {
        id: volume,
        name: receipt.offer.name.clone(),
        metadata: offered.metadata.clone(),
        created: offered.created,
        origin: base.filter(|base| base.volume != volume),
        role: Role::Replica,
        epoch: offered.epoch,
        primary: Follows::of(&receipt.offer).primary,
        quota_bytes: offered.quota_bytes.filter(|_| node.driver.capabilities().quota),
    }
}

/// Sorts a failed receive: parks it where the line was lost, discards it otherwise and tells the sender why.
async fn receive_failed(
    node: &Node,
    line: &mut Line<'_>,
    receipt: &Receipt,
    volume: VolumeId,
    begin: &BeginStep,
    mut open: Open,
    error: BulkError,
) -> Failure {
    let snapshot = begin.snapshot.id;
    // Where it is let go of, its place is free for the next attempt then.
    let error = match (open.receiving.settle().await, error) {
        (Err(failed), BulkError::Interrupted(_)) => BulkError::Sink(failed.into()),
        (_, error) => error,
    };
    match error {
        BulkError::Interrupted(error) => {
            let cancelled = receipt.job.as_ref().is_some_and(|job| job.cancel.is_cancelled())
                || matches!(error.kind, LinkErrorKind::ClosedByPeer { code: CloseCode::Cancelled, .. });
            if matches!(error.kind, LinkErrorKind::StreamReset(CloseCode::Failed)) {
                // The sender gave up, and says why.
                drop(open);
                return match line.recv(NO_PROGRESS).await {
                    Err(failure) => failure,
                    Ok(other) => instead_of_bytes(line, other),
                };
            }
            let failure = line.failed(error);
            if !cancelled {
                node.inbox.park(volume, receipt.offer.transfer, begin, open);
            }
            failure
        }
        BulkError::Sink(error) => {
            drop(open);
            let problem: ApiProblem = match error.downcast::<flocker_storage::error::Error>() {
                Ok(error) => match error.kind {
                    ErrorKind::Corrupt(_) => {
                        let said = Problem::new(ProblemCode::Malformed).with("snapshot", snapshot);
                        let failure = refuse(line, said.with("what", problem::chain(&*error))).await;
                        return failure;
                    }
                    _ => node.receive_problem(volume, *error),
                },
                Err(error) => problem::internal(error),
            };
            line.report(&problem::to_peer(&problem)).await;
            // The peer has been told; the handler must not tell it again.
            ApiProblem { code: format!("peer_{}", problem.code), ..problem }.into()
        }
        BulkError::Corrupt(what) => {
            drop(open);
            tracing::error!(peer = %line.peer, %snapshot, "what arrived is not what was sent: {what}");
            refuse(line, Problem::new(ProblemCode::DigestMismatch).with("snapshot", snapshot)).await
        }
        other => problem::internal(problem::chain(&other)).into(),
    }
}

struct Sink(Box<dyn Receiving>);

#[async_trait]
impl ChunkSink for Sink {
    async fn write(&mut self, chunk: Bytes) -> Result<(), BoxError> {
        self.0.write(chunk).await.map_err(Into::into)
    }

    async fn flush(&mut self) -> Result<(), BoxError> {
        self.0.settle().await.map_err(Into::into)
    }
}

impl Node {
    async fn lineage_or_none(&self, volume: VolumeId) -> Result<Lineage, Failure> {
        match self.catalog.get(volume) {
            Some(_) => Ok(self.driver.lineage(volume).await.map_err(ApiProblem::from)?),
            None => Ok(Lineage::default()),
        }
    }

    /// Names the mount where a driver cannot take something in underneath it.
    fn receive_problem(&self, volume: VolumeId, error: StorageError) -> ApiProblem {
        let attached = matches!(&error.kind, ErrorKind::Blocked(blockers) if blockers.attached);
        let known = self.catalog.get(volume).filter(|_| attached);
        let mounted = known.and_then(|known| self.check_unmounted(&known, "take in a snapshot of").err());
        mounted.unwrap_or_else(|| error.into())
    }

    /// Refuses before any byte flows what [`Node::follow`] would refuse after the last one.
    fn check_replaceable(&self, volume: VolumeId) -> Result<(), Failure> {
        let Some(known) = self.catalog.get(volume) else { return Ok(()) };
        // A replica's mount shows a snapshot, and goes on showing it; where there is none it shows the head itself.
        let shows_head = known.snapshots.is_empty() && known.record.origin.is_none();
        if known.record.role == Role::Primary || shows_head {
            self.check_unmounted(&known, "replace the contents of")?;
        }
        Ok(())
    }

    /// Prepares an existing volume for the next snapshot of a history that comes from elsewhere: nobody may be using
    /// its head, and the head must hold nothing of its own. Then the volume follows its sender.
    async fn follow(&self, record: &VolumeRecord, sender: &Follows) -> Result<(), Failure> {
        let id = record.id;
        if record.role == Role::Replica && !sender.is_news_to(record) {
            return Ok(());
        }
        let known = self.catalog.get(id).ok_or_else(|| problem::volume_not_found(&record.name))?;
        let known = &known;
        if known.record.role == Role::Replica {
            return Ok(self.set_record_of(known, sender.replica(&known.record)).await?);
        }
        self.check_unmounted(known, "replace the contents of")?;
        if self.driver.head_state(id).await.map_err(ApiProblem::from)? == HeadState::Dirty {
            let detail = format!("the head of {} has changes of its own", known.record.name);
            return Err(problem(409, "dirty", detail).into());
        }
        Ok(self.set_record_of(known, sender.replica(&known.record)).await?)
    }

    async fn set_record_of(&self, known: &Volume, record: VolumeRecord) -> Result<(), ApiProblem> {
        self.set_record(Volume { record, snapshots: known.snapshots.clone() }).await.map(drop)
    }
}
