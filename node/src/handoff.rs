//! A primary hands a volume over to a peer, in two phases: what can be sent while the volume is in use is sent first; then writes
//! stop, the rest follows, and the peer is asked to be the primary.
//!
//! Owns the order and what is done when a step fails or the node dies. Refuses to know what the peer checks
//! ([`Node::take_over`]) and how snapshots travel ([`crate::push`]).
//!
//! | step | it fails, or its time is up | the daemon dies after it |
//! |---|---|---|
//! | all there is goes to the peer | nothing has changed | nothing has changed |
//! | the intent is written, the volume unmounted | mounted again | mounted again at the next start |
//! | the rest goes to the peer | mounted again | mounted again at the next start |
//! | this node stops being the primary, and writes down that it asks | the primary again, mounted again | the peer is asked again until it answers |
//! | the peer answers that it is the primary | (it says no: the primary again, mounted again) | ″ |
//!
//! Where the peer was asked and does not answer, it may be the primary or not: nobody writes until it answers, or until an
//! operator promotes by force (docs/adr/0006).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use flocker_replication::message::{Message, PROTOCOL, TakeOver, TakenOver};
use flocker_storage::{
    driver::Access,
    fault,
    model::{HeadState, Host, NodeName, Role, SnapshotId, SnapshotName, VolumeId, VolumeName, VolumeRecord},
};
use flocker_transport::NO_PROGRESS;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::{
    api::ownership::{HandOffReport, HandOffVolume},
    api::types::{ApiProblem, Direction, MountVolume, StartTransfer, TransferResource, TransferState},
    catalog::Volume,
    daemon::Node,
    line::Line,
    problem::{Result, STALE_LINE, internal, problem},
    state::{MountRow, Operation},
    transfers::Failure,
};

/// How long to wait for the users of a mount, unless the request says otherwise.
const WAIT: Duration = Duration::from_secs(30);
/// How often an unmount is tried meanwhile.
const UNMOUNT_PAUSE: Duration = Duration::from_millis(20);
/// How long the rest may take to arrive, and the peer to answer, while writes are stopped.
const PATIENCE: Duration = Duration::from_secs(60);
/// The first pause before the peer is asked again; it doubles up to [`ASK_PAUSE_LIMIT`].
const ASK_PAUSE: Duration = Duration::from_millis(20);
/// See [`ASK_PAUSE`].
const ASK_PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// The code of a hand-over whose peer was asked and has not answered.
const IN_DOUBT: &str = "handoff_in_doubt";

/// A hand-over as the journal has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandOff {
    volume: VolumeId,
    peer: NodeName,
    /// The epoch that begins.
    epoch: u64,
    /// Where the volume was mounted.
    mount: Option<MountRow>,
    /// The newest snapshot; known once the peer has it.
    tip: Option<SnapshotId>,
    /// Whether the peer may have been asked.
    pub(crate) asked: bool,
}

impl HandOff {
    fn operation(volume: VolumeId) -> String {
        format!("handoff-{volume}")
    }
}

/// The hand-overs under way.
#[derive(Default)]
pub(crate) struct HandOffs {
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    running: BTreeSet<VolumeId>,
    asked: BTreeMap<VolumeId, HandOff>,
}

/// The only hand-over of a volume, until it is dropped.
struct Only<'a> {
    handoffs: &'a HandOffs,
    volume: VolumeId,
}

impl Drop for Only<'_> {
    fn drop(&mut self) {
        self.handoffs.lock().running.remove(&self.volume);
    }
}

impl HandOffs {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a peer was asked.
    pub(crate) fn insert(&self, handoff: HandOff) {
        self.lock().asked.insert(handoff.volume, handoff);
    }

    /// Returns the peer that was asked and has not answered.
    pub(crate) fn peer_of(&self, volume: VolumeId) -> Option<NodeName> {
        self.lock().asked.get(&volume).map(|handoff| handoff.peer.clone())
    }

    /// Returns the epoch that a peer was asked to begin, where it has not answered.
    pub(crate) fn epoch_of(&self, volume: VolumeId) -> Option<u64> {
        self.lock().asked.get(&volume).map(|handoff| handoff.epoch)
    }

    /// Whether the peer was asked and has not answered, and nobody has taken the volume back since: each hand-over begins a newer epoch.
    fn is_open(&self, handoff: &HandOff) -> bool {
        self.epoch_of(handoff.volume) == Some(handoff.epoch)
    }

    /// Refuses while a volume is being handed over.
    pub(crate) fn check_settled(&self, volume: &Volume) -> Result<()> {
        let contents = self.lock();
        let (id, name) = (volume.record.id, &volume.record.name);
        if let Some(handoff) = contents.asked.get(&id) {
            return Err(in_doubt(name, &handoff.peer, "it has not answered yet"));
        }
        if contents.running.contains(&id) {
            return Err(problem(409, "busy", format!("{name} is being handed over")).hint("wait until that is over"));
        }
        Ok(())
    }

    fn start(&self, volume: &Volume) -> Result<Only<'_>> {
        self.check_settled(volume)?;
        self.lock().running.insert(volume.record.id);
        Ok(Only { handoffs: self, volume: volume.record.id })
    }
}

fn in_doubt(name: &VolumeName, peer: &NodeName, why: &str) -> ApiProblem {
    problem(409, IN_DOUBT, format!("{peer} was asked to be the primary of {name}, and whether it is cannot be told: {why}"))
        .hint(format!(
            "this node goes on asking, and nobody writes meanwhile; `flocker inspect {name}` on {peer} tells; `flocker promote {name} --force` takes it back"
        ))
        .with("peer", peer)
}

/// What was brought to the peer.
struct Delivered {
    id: SnapshotId,
    name: SnapshotName,
    bytes: u64,
}

impl Node {
    /// Hands a volume over. It goes on when the caller goes away.
    pub(crate) async fn hand_off(self: &Arc<Self>, name: VolumeName, request: HandOffVolume) -> Result<HandOffReport> {
        let node = self.clone();
        let task = self.tasks.spawn(async move { node.run_hand_off(&name, &request).await });
        task.await.unwrap_or_else(|error| Err(internal(error)))
    }

    async fn run_hand_off(self: &Arc<Self>, name: &VolumeName, request: &HandOffVolume) -> Result<HandOffReport> {
        let volume = self.catalog.find(name)?;
        let peer = &request.peer;
        let row = self.find_peer(peer).await?;
        let host = Host { id: row.node_id.parse()?, name: row.name };
        if let Some(asked) = self.handoffs.peer_of(volume.record.id).filter(|asked| asked == peer) {
            return Err(in_doubt(name, &asked, "it has not answered yet"));
        }
        check_primary(&volume)?;
        let _only = self.handoffs.start(&volume)?;
        let live = self.deliver(name, peer, None).await?;

        let mut handoff = HandOff {
            volume: volume.record.id,
            peer: peer.clone(),
            epoch: volume.record.epoch + 1,
            mount: self.mounts.of(volume.record.id),
            tip: None,
            asked: false,
        };
        let wait = request.wait_ms.map_or(WAIT, Duration::from_millis);
        let operation = HandOff::operation(handoff.volume);
        self.state.begin(operation, &Operation::HandOff(Box::new(handoff.clone()))).await?;
        fault::point("handoff.journalled");
        let stopped = match self.stop_writes(name, &handoff, wait).await {
            Ok(stopped) => stopped,
            Err(problem) => return Err(self.give_up(&handoff, problem).await),
        };
        let rest = match self.deliver_the_rest(name, &mut handoff).await {
            Ok(rest) => rest,
            Err(problem) => return Err(self.give_up(&handoff, problem).await),
        };
        let settled = self.settle(&handoff, &host, Some(Instant::now() + PATIENCE)).await;
        let taken = match settled {
            Ok(taken) => taken,
            Err(problem) => {
                if problem.code == IN_DOUBT {
                    self.tasks.spawn(self.clone().settle_later(handoff));
                }
                return Err(problem);
            }
        };
        let report = HandOffReport {
            volume: name.clone(),
            primary: peer.clone(),
            epoch: taken.epoch,
            snapshot: rest.name,
            unmounted: handoff.mount.map(|row| row.path),
            writes_stopped_ms: stopped.elapsed().as_millis() as u64,
            delta_bytes: [live.bytes, rest.bytes],
        };
        tracing::info!(volume = %name, epoch = taken.epoch, stopped_ms = report.writes_stopped_ms, "handed over to {peer}");
        Ok(report)
    }

    /// Brings all that the volume holds to the peer; what no snapshot holds goes into one first.
    async fn deliver(
        self: &Arc<Self>,
        name: &VolumeName,
        peer: &NodeName,
        until: Option<Instant>,
    ) -> Result<Delivered> {
        let (mut volume, guard) = self.catalog.claim(name).await?;
        let unsaved = self.driver.head_state(volume.record.id).await? == HeadState::Dirty;
        if unsaved || volume.snapshots.is_empty() {
            self.keep_head(&mut volume, "handoff").await?;
        }
        drop(guard);
        let Some(tip) = volume.snapshots.pop() else { return Err(internal("a snapshot that was taken is not there")) };
        let (id, snapshot) = (tip.snapshot.id, tip.snapshot.name.clone());
        let request = StartTransfer { snapshot: Some(snapshot.clone()), ..StartTransfer::to(peer.clone()) };
        let started = self.start_transfer(Direction::Push, name.clone(), request).await?;
        let job = self.transfers.find(&started.id)?;
        if let Some(until) = until
            && timeout_at(until, self.wait_for_the_end(&job)).await.is_err()
        {
            job.cancel.cancel();
        }
        self.wait_for_the_end(&job).await?;
        let transfer = job.resource();
        let bytes = transfer.progress.delta_bytes;
        not_delivered(name, peer, transfer)?;
        Ok(Delivered { id, name: snapshot, bytes })
    }

    /// Unmounts the volume, as soon as nobody uses it; returns since when nothing can be written.
    async fn stop_writes(&self, name: &VolumeName, handoff: &HandOff, wait: Duration) -> Result<Instant> {
        let until = Instant::now() + wait;
        loop {
            let tried = Instant::now();
            match self.unmount(name).await {
                Err(problem) if problem.code == "mount_busy" && tried < until => {}
                Err(problem) if problem.code == "not_mounted" => return Ok(tried),
                Err(problem) => {
                    let hint = format!("stop what writes to {name}, or give it longer (--wait); it stays mounted here");
                    return Err(problem.hint(hint).with("peer", &handoff.peer));
                }
                Ok(_) => {
                    fault::point("handoff.unmounted");
                    return Ok(tried);
                }
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(problem(503, "shutting_down", "the node is stopping")),
                () = tokio::time::sleep(UNMOUNT_PAUSE) => {}
            }
        }
    }

    /// Brings over what was written since, stops being the primary, and writes down that the peer is asked.
    async fn deliver_the_rest(self: &Arc<Self>, name: &VolumeName, handoff: &mut HandOff) -> Result<Delivered> {
        let rest = self.deliver(name, &handoff.peer, Some(Instant::now() + PATIENCE)).await?;
        fault::point("handoff.delivered");
        let (mut volume, _guard) = self.catalog.claim(name).await?;
        let is_tip = volume.snapshots.last().is_some_and(|held| held.snapshot.id == rest.id);
        if !is_tip || self.driver.head_state(handoff.volume).await? == HeadState::Dirty {
            let detail = format!("{name} has changed while it was handed over");
            return Err(problem(409, "busy", detail).hint("do the same again when nobody works on it"));
        }
        check_primary(&volume)?;
        volume.record.role = Role::Replica;
        self.set_record(volume).await?;
        fault::point("handoff.stepped-down");
        let asked = HandOff { tip: Some(rest.id), asked: true, ..handoff.clone() };
        self.state.begin(HandOff::operation(asked.volume), &Operation::HandOff(Box::new(asked.clone()))).await?;
        self.handoffs.insert(asked.clone());
        *handoff = asked;
        fault::point("handoff.asking");
        Ok(rest)
    }

    /// Goes back to how it was, where the peer has not been asked or has said no.
    async fn give_up(&self, handoff: &HandOff, why: ApiProblem) -> ApiProblem {
        match self.take_back(handoff).await {
            Ok(()) => why,
            Err(error) => {
                tracing::error!(volume = %handoff.volume, "cannot take back what was not handed over: {error}");
                why.with("not_taken_back", error.to_string())
            }
        }
    }

    async fn take_back(&self, handoff: &HandOff) -> Result<()> {
        let guard = self.catalog.work_on(handoff.volume).await;
        if handoff.asked {
            self.check_open(handoff)?;
        }
        let Some(mut known) = self.catalog.get(handoff.volume) else {
            return self.forget_hand_off(handoff.volume).await;
        };
        let name = known.record.name.clone();
        if known.record.role == Role::Replica && known.record.epoch < handoff.epoch {
            known.record.role = Role::Primary;
            self.set_record(known).await?;
            fault::point("handoff.taken-back");
        }
        drop(guard);
        if let Some(row) = &handoff.mount
            && self.mounts.of(handoff.volume).is_none()
        {
            let access = if row.read_only { Access::ReadOnly } else { Access::ReadWrite };
            self.mount_again(&name, MountVolume { path: Some(row.path.clone()), access: Some(access) }).await?;
        }
        fault::point("handoff.mounted-again");
        self.forget_hand_off(handoff.volume).await
    }

    /// Goes on at start-up, before mounts are restored, with what a crash interrupted; tells whether the peer has yet to be
    /// asked again. Otherwise the volume is this node's as before: nobody was asked, or it had been taken back.
    pub(crate) async fn recover_hand_off(&self, handoff: &HandOff) -> Result<bool> {
        let scan = self.driver.scan().await?;
        let found = scan.volumes.into_iter().map(|(record, _)| record).find(|record| record.id == handoff.volume);
        let Some(record) = found.filter(|record| record.epoch < handoff.epoch) else { return Ok(false) };
        if handoff.asked && record.role == Role::Replica {
            self.handoffs.insert(handoff.clone());
            return Ok(true);
        }
        if record.role == Role::Replica {
            self.driver.set_record(&VolumeRecord { role: Role::Primary, ..record }).await?;
        }
        if let Some(row) = &handoff.mount {
            self.state.put_mount(row).await?;
        }
        Ok(false)
    }

    /// Ends a hand-over in the journal.
    pub(crate) async fn forget_hand_off(&self, volume: VolumeId) -> Result<()> {
        self.handoffs.lock().asked.remove(&volume);
        Ok(self.state.end(HandOff::operation(volume)).await?)
    }

    /// Goes on asking the peers that were asked when the node died.
    pub(crate) fn settle_handoffs(self: &Arc<Self>) {
        let asked: Vec<HandOff> = self.handoffs.lock().asked.values().cloned().collect();
        for handoff in asked {
            self.tasks.spawn(self.clone().settle_later(handoff));
        }
    }

    async fn settle_later(self: Arc<Self>, handoff: HandOff) {
        let host = match self.find_peer(&handoff.peer).await {
            Ok(row) => row.node_id.parse().map(|id| Host { id, name: row.name }).map_err(ApiProblem::from),
            Err(problem) => Err(problem),
        };
        let settled = match host {
            Ok(host) => self.settle(&handoff, &host, None).await,
            Err(problem) => Err(problem),
        };
        if let Err(problem) = settled {
            tracing::error!(volume = %handoff.volume, peer = %handoff.peer, "a hand-over was not done: {problem}");
        }
    }

    /// Asks the peer until it answers, or until the time is up: then it is in doubt ([`IN_DOUBT`]).
    async fn settle(self: &Arc<Self>, handoff: &HandOff, host: &Host, until: Option<Instant>) -> Result<TakenOver> {
        let mut pause = ASK_PAUSE;
        loop {
            let failure = match self.ask_to_take_over(handoff).await {
                Ok(taken) => {
                    fault::point("handoff.answered");
                    self.handed_off(handoff, host).await?;
                    return Ok(taken);
                }
                Err(failure) if failure.problem.code == STALE_LINE => {
                    self.kept.forget(&handoff.peer);
                    continue;
                }
                Err(failure) => failure,
            };
            self.check_open(handoff)?;
            let says_no = failure.problem.code.starts_with("peer_") && failure.problem.code != "peer_unreachable";
            let late = until.is_some_and(|until| Instant::now() >= until);
            // Where it says no, no earlier question of this node can still make it the primary: it answers them in turn.
            if says_no && (!failure.transient || late) {
                return Err(self.give_up(handoff, failure.problem).await);
            }
            if late {
                let known = self.catalog.get(handoff.volume);
                let name = known.map_or_else(|| handoff.volume.to_string(), |known| known.record.name.to_string());
                let name: VolumeName = name.parse()?;
                return Err(in_doubt(&name, &handoff.peer, &failure.problem.detail));
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(failure.problem),
                () = tokio::time::sleep(pause) => pause = ASK_PAUSE_LIMIT.min(pause * 2),
            }
        }
    }

    /// Refuses once the volume was promoted here by force, even where it is being handed over anew.
    fn check_open(&self, handoff: &HandOff) -> Result<()> {
        if self.handoffs.is_open(handoff) {
            return Ok(());
        }
        Err(problem(409, "taken_back", "the volume was promoted here by force meanwhile"))
    }

    async fn ask_to_take_over(&self, handoff: &HandOff) -> std::result::Result<TakenOver, Failure> {
        let known = self.catalog.get(handoff.volume);
        let (Some(known), Some(tip)) = (known, handoff.tip) else {
            return Err(internal("what is handed over is not here any more").into());
        };
        let row = self.find_peer(&handoff.peer).await?;
        let lent = self.lend(&row).await?;
        let mut line = Line::open(row.name, &lent).await?;
        // To connect takes as long as the peer is away; who was waited for in vain is not asked any more.
        self.check_open(handoff)?;
        let request =
            TakeOver { protocol: PROTOCOL, name: known.record.name, volume: handoff.volume, tip, epoch: handoff.epoch };
        line.send(&Message::TakeOver(Box::new(request))).await?;
        let taken = match line.recv(NO_PROGRESS).await? {
            Message::TakenOver(taken) => taken,
            other => return Err(line.broke(format!("{} instead of taking over", other.kind())).into()),
        };
        drop(line);
        self.give_back(lent);
        Ok(taken)
    }

    /// The peer is the primary.
    async fn handed_off(&self, handoff: &HandOff, host: &Host) -> Result<()> {
        let _guard = self.catalog.work_on(handoff.volume).await;
        self.check_open(handoff)?;
        let gives_way = |known: &Volume| known.record.role == Role::Replica && known.record.epoch < handoff.epoch;
        if let Some(mut known) = self.catalog.get(handoff.volume).filter(gives_way) {
            known.record.role = Role::Replica;
            known.record.epoch = handoff.epoch;
            known.record.primary = Some(host.clone());
            self.set_record(known).await?;
            fault::point("handoff.recorded");
        }
        self.forget_hand_off(handoff.volume).await
    }
}

fn check_primary(volume: &Volume) -> Result<()> {
    if volume.record.role == Role::Primary {
        return Ok(());
    }
    let name = &volume.record.name;
    let primary = volume.record.primary.as_ref().map_or("another node", |host| host.name.as_str());
    Err(problem(409, "not_primary", format!("cannot hand {name} over: it is a replica here, its primary is {primary}"))
        .hint(format!("`flocker handoff {name} PEER` is asked of {primary}")))
}

fn not_delivered(name: &VolumeName, peer: &NodeName, transfer: TransferResource) -> Result<()> {
    if transfer.state == TransferState::Done {
        return Ok(());
    }
    let detail = format!("cannot hand {name} over: its snapshots did not reach {peer}");
    let why = match (transfer.problem, transfer.refusal) {
        (Some(problem), _) => problem,
        (None, Some(refusal)) => problem(409, "refused", refusal),
        (None, None) => problem(504, "timed_out", format!("they did not arrive within {} s", PATIENCE.as_secs())),
    };
    Err(ApiProblem { detail: format!("{detail}: {}", why.detail), ..why }.with("transfer", transfer.id))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_question_about_a_hand_over_that_was_taken_back_does_not_pass_for_the_next_one() {
        let handoffs = HandOffs::default();
        let first = HandOff {
            volume: VolumeId::mint(),
            peer: "host-b".parse().unwrap(),
            epoch: 2,
            mount: None,
            tip: None,
            asked: true,
        };
        assert!(!handoffs.is_open(&first));
        handoffs.insert(first.clone());
        assert!(handoffs.is_open(&first));
        // Taken back by force, which begins epoch 3, and handed over to the same peer once more.
        let second = HandOff { epoch: 4, ..first.clone() };
        handoffs.insert(second.clone());
        assert_eq!((handoffs.is_open(&first), handoffs.is_open(&second)), (false, true));
    }
}
