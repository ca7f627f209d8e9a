//! Transfers: pushes and pulls as durable, resumable, cancellable work with progress.
//!
//! Owns when an attempt is made again and what becomes of a transfer; [`crate::push`] and [`crate::pull`] make the
//! attempts. Refuses to know what travels.
//!
//! | event | state | what follows |
//! |---|---|---|
//! | asked for | running | attempts, one after the other |
//! | an attempt meets the peer and loses it | interrupted | another attempt after a pause that grows to [`PAUSE_LIMIT`] |
//! | the peer was never met | failed | nothing |
//! | no progress for [`PATIENCE`] | failed | nothing |
//! | the daemon stops or dies | interrupted | goes on at the next start |
//! | a user pauses it | paused | nothing, over restarts too, until it is resumed |
//! | the same is asked for again while it is interrupted or paused, or it is resumed, or the peer is heard from | running | an attempt at once |
//! | a format of the drivers' own does not fit | running | an attempt at once, in the portable format |
//! | a final error | failed | nothing |
//! | histories that do not fit | refused | nothing |

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use flocker_replication::{
    message::DivergencePolicy,
    plan::{Outcome, Verdict},
    resolution::{self, Way},
};
use flocker_storage::{clock, driver::Finding, model::VolumeName};
use jiff::Timestamp;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    api::{
        events::Event,
        types::{
            ApiProblem, Direction, SLOWEST_LIMIT, StartTransfer, TransferProgress, TransferResource, TransferState,
        },
    },
    daemon::Node,
    events::Events,
    problem::{FORMAT_UNFIT, PEER_BUSY, Result, STALE_LINE, chain, problem},
    resolve::Concluded,
    state::State,
};

/// The longest pause between two attempts.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
/// The first pause; it doubles with each attempt that brings nothing.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// How long attempts go on that bring nothing.
const PATIENCE: Duration = Duration::from_secs(6 * 3600);
/// How many finished transfers are remembered.
const FINISHED_KEPT: usize = 200;
/// How many warnings one transfer keeps.
const WARNINGS_LIMIT: usize = 100;
/// How often listeners hear of a transfer that moves.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// The stretch of time that the rate is taken over.
const RATE_WINDOW: Duration = Duration::from_secs(3);

/// An attempt that came to nothing: whether trying again may help, and what the user is told.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Whether trying again may help.
    pub(crate) transient: bool,
    /// What the user is told.
    pub(crate) problem: ApiProblem,
}

impl From<ApiProblem> for Failure {
    fn from(problem: ApiProblem) -> Self {
        Self { transient: false, problem }
    }
}

/// One transfer at work or remembered.
pub(crate) struct Job {
    /// Its id, the same for each attempt; the peer sees it too.
    pub(crate) id: Uuid,
    /// What was asked for.
    pub(crate) request: StartTransfer,
    /// The volume's name at the sender.
    pub(crate) volume: VolumeName,
    /// Push or pull.
    pub(crate) direction: Direction,
    /// Cancelled by a user.
    pub(crate) cancel: CancellationToken,
    /// Paused by a user; a new one each time it is resumed.
    pub(crate) pause: Mutex<CancellationToken>,
    /// Held while attempts are made.
    pub(crate) work: tokio::sync::Mutex<()>,
    /// A format of the drivers' own did not fit: what is left goes in the portable one.
    portable: AtomicBool,
    /// A connection was closed because the peer has another address.
    pub(crate) peer_moved: AtomicBool,
    /// Cancelled once the transfer has ended.
    pub(crate) over: CancellationToken,
    events: Arc<Events>,
    /// Asked for again, or the peer is there again: no more pause.
    pub(crate) poke: Notify,
    status: Mutex<Status>,
}

struct Status {
    resource: TransferResource,
    /// Delta and wire bytes of the steps and attempts before this one.
    earlier: (u64, u64),
    samples: VecDeque<(Instant, u64)>,
    /// When listeners heard of it last.
    told: Instant,
    began: Instant,
    worked_before: Duration,
    met_peer: bool,
    progressed: Instant,
}

impl Job {
    fn new(request: StartTransfer, resource: TransferResource, events: Arc<Events>) -> Option<Self> {
        let now = Instant::now();
        let earlier = (resource.progress.delta_bytes, resource.progress.wire_bytes);
        let worked_before = Duration::from_millis(resource.progress.elapsed_ms);
        let over = CancellationToken::new();
        if resource.state.is_final() {
            over.cancel();
        }
        Some(Self {
            id: resource.id.parse().ok()?,
            volume: resource.volume.clone(),
            direction: resource.direction,
            request,
            cancel: CancellationToken::new(),
            pause: Mutex::default(),
            work: tokio::sync::Mutex::default(),
            portable: AtomicBool::new(false),
            peer_moved: AtomicBool::new(false),
            over,
            events,
            poke: Notify::new(),
            status: Mutex::new(Status {
                // A transfer found in the database had met its peer, or could not have been interrupted.
                met_peer: matches!(resource.state, TransferState::Interrupted | TransferState::Paused),
                resource,
                earlier,
                samples: VecDeque::new(),
                told: now,
                began: now,
                worked_before,
                progressed: now,
            }),
        })
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is cancelled when a user pauses it.
    pub(crate) fn pause(&self) -> CancellationToken {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a paused transfer ready for further attempts. The time it rested does not count.
    pub(crate) fn unpause(&self) {
        *self.pause.lock().unwrap_or_else(PoisonError::into_inner) = CancellationToken::new();
        let mut status = self.status();
        let now = Instant::now();
        status.worked_before = Duration::from_millis(status.resource.progress.elapsed_ms);
        (status.began, status.progressed) = (now, now);
        status.resource.state = TransferState::Running;
        self.tell(&mut status);
    }

    /// Tells listeners where it stands.
    fn tell(&self, status: &mut Status) {
        status.told = Instant::now();
        let resource = &status.resource;
        self.events.tell(Event::Transfer {
            transfer: resource.id.clone(),
            direction: resource.direction,
            volume: resource.volume.clone(),
            peer: resource.peer.clone(),
            state: resource.state,
            progress: resource.progress.clone(),
            problem: resource.problem.as_ref().map(|problem| problem.code.clone()),
        });
    }

    /// Tells whether the portable format alone is to be used.
    pub(crate) fn is_portable(&self) -> bool {
        self.portable.load(Ordering::Relaxed)
    }

    /// Shows the transfer as the API does.
    pub(crate) fn resource(&self) -> TransferResource {
        self.status().resource.clone()
    }

    /// Notes that the peer answered.
    pub(crate) fn met_peer(&self) {
        let mut status = self.status();
        status.met_peer = true;
        status.resource.state = TransferState::Running;
        status.resource.problem = None;
    }

    /// Notes what is to be done.
    pub(crate) fn planned(&self, outcome: &Outcome, full_copy: bool) {
        let mut status = self.status();
        let resource = &mut status.resource;
        resource.snapshot = Some(outcome.want.name.clone());
        resource.progress.volume_bytes = outcome.want.logical_bytes;
        if let Verdict::FastForward { missing, .. } = &outcome.verdict {
            resource.progress.steps_total = resource.progress.steps_done + missing.total as u32;
            if full_copy && missing.total == 1 {
                resource.progress.expected_bytes = Some(outcome.want.logical_bytes);
            }
        }
        resource.outcome = Some(outcome.clone());
    }

    /// Tells whether nobody knows yet how much there is to send.
    pub(crate) fn is_unestimated(&self) -> bool {
        self.status().resource.progress.expected_bytes.is_none()
    }

    /// Notes how many connections carry it.
    pub(crate) fn carried_by(&self, lanes: u32) {
        let mut status = self.status();
        let progress = &mut status.resource.progress;
        progress.lanes = progress.lanes.max(lanes);
    }

    /// Notes how many bytes all deltas together have.
    pub(crate) fn expects(&self, bytes: u64) {
        let mut status = self.status();
        status.resource.progress.expected_bytes = Some(bytes);
        self.tell(&mut status);
    }

    /// Notes a step of a pull, whose plan only the sender knows.
    pub(crate) fn step_begun(&self, number: u32, logical_bytes: u64) {
        let mut status = self.status();
        let progress = &mut status.resource.progress;
        progress.volume_bytes = logical_bytes;
        progress.steps_total = progress.steps_total.max(progress.steps_done + 1).max(number + 1);
    }

    /// Notes a step that goes on where an earlier attempt stopped.
    pub(crate) fn resumed(&self) {
        self.status().resource.progress.resumed += 1;
    }

    /// Notes how many bytes of this step the receiver has consumed since this stream began.
    pub(crate) fn moved(&self, now_moved: &flocker_transport::Progress) {
        let flocker_transport::Progress { raw_bytes: delta_bytes, wire_bytes, slowest, expected_bytes } = *now_moved;
        let mut status = self.status();
        let now = Instant::now();
        let (earlier_delta, earlier_wire) = status.earlier;
        let total = earlier_delta + delta_bytes;
        if total > status.resource.progress.delta_bytes {
            status.progressed = now;
        }
        status.samples.push_back((now, total));
        while status.samples.front().is_some_and(|(at, _)| now.duration_since(*at) > RATE_WINDOW) {
            status.samples.pop_front();
        }
        let rate = status.samples.front().map_or(0, |(at, bytes)| {
            let span = now.duration_since(*at).as_millis().max(1) as u64;
            total.saturating_sub(*bytes) * 1000 / span
        });
        status.resource.progress.delta_bytes = total;
        status.resource.progress.wire_bytes = earlier_wire + wire_bytes;
        status.resource.progress.rate_bytes_per_second = rate;
        status.resource.progress.limited_by = slowest;
        if let Some(expected) = expected_bytes {
            status.resource.progress.expected_bytes = Some(earlier_delta.saturating_add(expected));
        }
        status.note_time();
        if now.duration_since(status.told) >= TELL_INTERVAL {
            self.tell(&mut status);
        }
    }

    /// Notes that what moved so far belongs to a stream that will not go on; the next one counts on top.
    pub(crate) fn stream_over(&self) {
        let mut status = self.status();
        status.earlier = (status.resource.progress.delta_bytes, status.resource.progress.wire_bytes);
    }

    /// Notes what the user should know. The same is noted once, however many snapshots it is true of.
    pub(crate) fn warn(&self, findings: Vec<Finding>) {
        let mut status = self.status();
        let warnings = &mut status.resource.warnings;
        for finding in findings {
            if warnings.len() < WARNINGS_LIMIT && !warnings.contains(&finding) {
                tracing::warn!(transfer = %self.id, volume = %self.volume, path = finding.path, "{}", finding.what);
                warnings.push(finding);
            }
        }
    }

    /// Notes a step that arrived.
    pub(crate) fn step_done(&self) {
        self.stream_over();
        let mut status = self.status();
        status.resource.progress.steps_done += 1;
        status.progressed = Instant::now();
    }

    fn ended(&self, state: TransferState, problem: Option<ApiProblem>) {
        let mut status = self.status();
        status.note_time();
        status.resource.state = state;
        status.resource.problem = problem;
        status.resource.progress.rate_bytes_per_second = 0;
        status.resource.progress.limited_by = None;
        self.tell(&mut status);
        if state.is_final() {
            status.resource.finished = Some(clock::now());
            drop(status);
            self.over.cancel();
        }
    }
}

/// Stretches a pause by up to a half, differently for each transfer, so that many that lost one peer do not come back at
/// one moment.
fn jittered(pause: Duration, transfer: Uuid) -> Duration {
    pause + pause.mul_f64(f64::from(transfer.as_bytes()[15]) / 512.0)
}

impl Status {
    fn note_time(&mut self) {
        self.resource.progress.elapsed_ms = (self.worked_before + self.began.elapsed()).as_millis() as u64;
    }
}

/// All transfers of this node.
#[derive(Default)]
pub(crate) struct Transfers {
    jobs: Mutex<BTreeMap<Uuid, Arc<Job>>>,
}

impl Transfers {
    /// Reads the transfers from the state database.
    pub(crate) async fn load(state: &State, events: &Arc<Events>) -> Result<Self> {
        state.interrupt_running().await?;
        let jobs = state.transfers().await?.into_iter();
        let jobs = jobs.filter_map(|(request, resource)| Job::new(request, resource, events.clone()));
        Ok(Self { jobs: Mutex::new(jobs.map(|job| (job.id, Arc::new(job))).collect()) })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uuid, Arc<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists all, newest first.
    pub(crate) fn list(&self) -> Vec<TransferResource> {
        let mut all: Vec<TransferResource> = self.lock().values().map(|job| job.resource()).collect();
        all.sort_by_key(|transfer| std::cmp::Reverse(transfer.started));
        all
    }

    /// Finds one by its id.
    pub(crate) fn find(&self, id: &str) -> Result<Arc<Job>> {
        let known = id.parse().ok().and_then(|id: Uuid| self.lock().get(&id).cloned());
        known.ok_or_else(|| {
            problem(404, "transfer_not_found", format!("there is no transfer {id}"))
                .hint("`flocker transfers` lists them")
        })
    }

    fn same(&self, direction: Direction, volume: &VolumeName, request: &StartTransfer) -> Option<Arc<Job>> {
        let jobs = self.lock();
        let open = jobs.values().filter(|job| !job.status().resource.state.is_final());
        let mut same = open.filter(|job| {
            job.direction == direction
                && job.volume == *volume
                && job.request.peer == request.peer
                && job.request.as_name == request.as_name
                && !job.request.dry_run
        });
        same.next().cloned()
    }

    /// Ends the pauses of those that lost this peer.
    pub(crate) fn peer_is_there(&self, name: &str) {
        let jobs = self.lock();
        let lost = |job: &&Arc<Job>| job.resource().state == TransferState::Interrupted;
        for job in jobs.values().filter(|job| job.request.peer.as_str() == name).filter(lost) {
            job.poke.notify_one();
        }
    }

    fn insert(&self, job: Arc<Job>) {
        let mut jobs = self.lock();
        jobs.insert(job.id, job);
        let mut finished: Vec<(Timestamp, Uuid)> = jobs
            .values()
            .map(|job| job.resource())
            .filter(|transfer| transfer.state.is_final())
            .filter_map(|transfer| Some((transfer.started, transfer.id.parse().ok()?)))
            .collect();
        finished.sort();
        let surplus = finished.len().saturating_sub(FINISHED_KEPT);
        for (_, id) in finished.into_iter().take(surplus) {
            jobs.remove(&id);
        }
    }
}

impl Node {
    /// Starts a push or a pull. What is under way already is returned, not started twice.
    pub(crate) async fn start_transfer(
        self: &Arc<Self>,
        direction: Direction,
        volume: VolumeName,
        request: StartTransfer,
    ) -> Result<TransferResource> {
        if request.on_divergence == DivergencePolicy::Ours && request.as_name.is_some() {
            let detail = "--on-divergence ours does not go together with --as: it works between volumes of one name";
            return Err(problem(422, "unsupported", detail)
                .hint("leave --as away; or --on-divergence fork keeps both histories"));
        }
        if request.limit_bytes_per_second.is_some_and(|limit| limit.get() < SLOWEST_LIMIT) {
            return Err(problem(
                400,
                "bad_request",
                format!("a limit must be at least {SLOWEST_LIMIT} bytes per second"),
            ));
        }
        self.find_peer(&request.peer).await?;
        if direction == Direction::Push {
            let known = self.catalog.find(&volume)?;
            let Some(snapshot) = &request.snapshot else {
                return Err(problem(400, "bad_request", format!("which snapshot of {volume} shall be pushed?"))
                    .hint(format!("name it as {volume}@SNAPSHOT; `flocker snapshots {volume}` lists them")));
            };
            self.sendable(&known, snapshot).await?;
        }
        if let Some(job) = self.transfers.same(direction, &volume, &request).filter(|_| !request.dry_run) {
            return self.join_transfer(&job, &request).await;
        }
        let resource = TransferResource {
            id: clock::mint().to_string(),
            direction,
            volume: volume.clone(),
            snapshot: request.snapshot.clone(),
            peer: request.peer.clone(),
            as_name: request.as_name.clone(),
            dry_run: request.dry_run,
            limit_bytes_per_second: request.limit_bytes_per_second,
            state: TransferState::Running,
            outcome: None,
            resolution: None,
            refusal: None,
            progress: TransferProgress::default(),
            problem: None,
            warnings: Vec::new(),
            started: clock::now(),
            finished: None,
        };
        self.state.put_transfer(&request, &resource).await?;
        let job = Job::new(request, resource, self.events.clone());
        let job = job.ok_or_else(|| problem(500, "internal", "a new transfer has a bad id"))?;
        let job = Arc::new(job);
        self.transfers.insert(job.clone());
        job.tell(&mut job.status());
        self.tasks.spawn(self.clone().run_transfer(job.clone()));
        Ok(job.resource())
    }

    async fn join_transfer(self: &Arc<Self>, job: &Arc<Job>, request: &StartTransfer) -> Result<TransferResource> {
        let is_same = job.request.snapshot == request.snapshot
            && job.request.on_divergence == request.on_divergence
            && job.request.limit_bytes_per_second == request.limit_bytes_per_second;
        if is_same {
            return self.resume_transfer(job).await;
        }
        let detail = format!("another transfer of {} with {} is under way", job.volume, request.peer);
        Err(problem(409, "busy", detail)
            .hint(format!(
                "wait for it (`flocker transfers wait {0}`) or end it (`flocker transfers cancel {0}`)",
                job.id
            ))
            .with("transfer", job.id))
    }

    /// Goes on with what a stop or a crash of the daemon interrupted.
    pub(crate) fn resume_transfers(self: &Arc<Self>) {
        let jobs: Vec<Arc<Job>> = self.transfers.lock().values().cloned().collect();
        for job in jobs.into_iter().filter(|job| job.resource().state == TransferState::Interrupted) {
            tracing::info!(transfer = %job.id, volume = %job.volume, peer = %job.request.peer, "going on with a transfer");
            self.tasks.spawn(self.clone().run_transfer(job));
        }
    }

    /// Makes attempts until the transfer comes to an end.
    pub(crate) async fn run_transfer(self: Arc<Self>, job: Arc<Job>) {
        let _work = job.work.lock().await;
        let (paused, mut pause) = (job.pause(), FIRST_PAUSE);
        loop {
            let before = job.status().resource.progress.delta_bytes;
            let attempt = match job.direction {
                Direction::Push => crate::push::attempt(&self, &job).await,
                Direction::Pull => crate::pull::attempt(&self, &job).await,
            };
            let failure = match attempt {
                Ok(concluded) => return self.conclude(&job, concluded).await,
                Err(failure) => failure,
            };
            if job.cancel.is_cancelled() {
                return self.end_transfer(&job, TransferState::Cancelled, None).await;
            }
            if paused.is_cancelled() {
                return self.end_transfer(&job, TransferState::Paused, None).await;
            }
            if self.cancel.is_cancelled() {
                return self.end_transfer(&job, TransferState::Interrupted, Some(failure.problem)).await;
            }
            if failure.problem.code == STALE_LINE || job.peer_moved.swap(false, Ordering::Relaxed) {
                tracing::debug!(transfer = %job.id, "connecting anew: {}", failure.problem);
                self.kept.forget(&job.request.peer);
                continue;
            }
            if failure.problem.code.ends_with(FORMAT_UNFIT) && !job.portable.swap(true, Ordering::Relaxed) {
                let what = format!("what is left is sent in the portable format: {}", failure.problem);
                job.warn(vec![Finding { path: ".".to_owned(), what }]);
                continue;
            }
            let (met_peer, idle) = {
                let status = job.status();
                // A peer that is busy answers, though it says no more than that.
                (status.met_peer || failure.problem.code == PEER_BUSY, status.progressed.elapsed())
            };
            if !failure.transient || !met_peer || idle > PATIENCE {
                tracing::warn!(transfer = %job.id, volume = %job.volume, peer = %job.request.peer, "transfer failed: {}", failure.problem);
                return self.end_transfer(&job, TransferState::Failed, Some(failure.problem)).await;
            }
            tracing::info!(transfer = %job.id, volume = %job.volume, peer = %job.request.peer, "transfer interrupted: {}", failure.problem);
            self.end_transfer(&job, TransferState::Interrupted, Some(failure.problem)).await;
            let moved = job.status().resource.progress.delta_bytes > before;
            pause = if moved { FIRST_PAUSE } else { PAUSE_LIMIT.min(pause * 2) };
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                () = job.cancel.cancelled() => return self.end_transfer(&job, TransferState::Cancelled, None).await,
                () = paused.cancelled() => return self.end_transfer(&job, TransferState::Paused, None).await,
                () = job.poke.notified() => pause = FIRST_PAUSE,
                () = tokio::time::sleep(jittered(pause, job.id)) => {}
            }
        }
    }

    async fn conclude(&self, job: &Job, concluded: Concluded) {
        let Concluded { outcome, resolution } = concluded;
        let policy = job.request.on_divergence;
        let refused = match resolution::way(policy, (&outcome.verdict).into()) {
            Way::Straight | Way::Contained => false,
            Way::Refuse => true,
            Way::Beside | Way::Succeed | Way::Rename | Way::Reverse => !job.request.dry_run,
        };
        let resolution = resolution.or_else(|| resolution::planned(policy, &outcome)).filter(|_| !refused);
        let refusal = refused.then(|| flocker_replication::plan::Refusal(outcome.clone()).render());
        {
            let mut status = job.status();
            status.resource.snapshot = Some(outcome.want.name.clone());
            status.resource.progress.volume_bytes = outcome.want.logical_bytes;
            status.resource.outcome = Some(outcome);
            status.resource.resolution = resolution;
            status.resource.refusal = refusal;
        }
        let state = if refused { TransferState::Refused } else { TransferState::Done };
        tracing::info!(transfer = %job.id, volume = %job.volume, peer = %job.request.peer, ?state, "transfer ended");
        self.end_transfer(job, state, None).await;
    }

    pub(crate) async fn end_transfer(&self, job: &Job, state: TransferState, problem: Option<ApiProblem>) {
        job.ended(state, problem);
        let resource = job.resource();
        if state.is_final() {
            self.metrics.ended(&resource);
        }
        if let Err(error) = self.state.put_transfer(&job.request, &resource).await {
            tracing::error!("{}", chain(&error));
        }
    }
}
