//! Who may write a volume: promotion, what a replica follows, and what a node does that was the primary and is not any more.
//!
//! Owns the rules. A volume's primary is told by its record ([`VolumeRecord::claim`]); of all nodes' records the greatest claim
//! counts. A peer that does not answer is never read as one that has nothing. Refuses to know how a volume is handed over in
//! order ([`crate::handoff`]) and how a history that gives way is kept ([`crate::resolve`]).
//!
//! | a node was the primary, and | what it does |
//! |---|---|
//! | starts, and a peer has become the primary since | takes that one's history by `theirs`: it is a replica then, and what it had besides is a fork |
//! | the same, and the volume is mounted | leaves it alone, says so, and does it when the volume is unmounted |
//! | its host was booted, and the peers answer at once | does not mount the volume again |

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use flocker_replication::{
    message::{
        AskClaims, CLAIMS_LIMIT, Description, DivergencePolicy, Message, Offer, PROTOCOL, TakeOver, TakenOver,
        VolumeClaim,
    },
    plan::Verdict,
};
use flocker_storage::{
    fault,
    model::{Claim, HeadState, Host, NodeName, Role, VolumeId, VolumeName, VolumeRecord},
};
use flocker_transport::NO_PROGRESS;
use serde::{Deserialize, Serialize};

use crate::{
    api::ownership::PromoteVolume,
    api::types::{ApiProblem, Direction, StartTransfer, TransferResource, TransferState, VolumeResource},
    catalog::Volume,
    config::Verb,
    daemon::Node,
    line::Line,
    problem::{Result, STALE_LINE, problem},
    state::PeerRow,
    transfers::{Failure, Job},
};

/// How long a starting node waits for its peers before it mounts again what was mounted.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);
/// The first pause before peers that did not answer are asked again; it doubles up to [`LOOK_PAUSE_LIMIT`].
const LOOK_PAUSE: Duration = Duration::from_secs(1);
/// See [`LOOK_PAUSE`].
const LOOK_PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// How often a node tries to follow a newer primary that it cannot follow, until its next start.
const FOLLOW_TRIES: u32 = 60;

/// Whom a replica follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Follows {
    epoch: u64,
    /// The primary, as far as it is known.
    pub(crate) primary: Option<Host>,
}

impl Follows {
    /// Reads it from what a sender offers: the primary is known to it, or is the sender itself.
    pub(crate) fn of(offer: &Offer) -> Self {
        let primary = offer.volume.primary.clone().unwrap_or_else(|| offer.sender.clone());
        Self { epoch: offer.volume.epoch, primary: Some(primary) }
    }

    fn claim(&self) -> Claim {
        Claim { epoch: self.epoch, primary: self.primary.as_ref().map(|host| host.id) }
    }

    /// Tells whether a record knows less.
    pub(crate) fn is_news_to(&self, record: &VolumeRecord) -> bool {
        self.claim() > record.claim()
    }

    /// Makes a replica's record of a volume's.
    pub(crate) fn replica(&self, record: &VolumeRecord) -> VolumeRecord {
        let epoch = record.epoch.max(self.epoch);
        VolumeRecord { role: Role::Replica, epoch, primary: self.primary.clone(), ..record.clone() }
    }
}

/// A peer that has become the primary of a volume in this node's place.
#[derive(Debug, Clone)]
struct Successor {
    peer: NodeName,
    /// The volume's name there.
    name: VolumeName,
    follows: Follows,
}

/// The volumes whose primary is another node now, while they are mounted here.
#[derive(Default)]
pub(crate) struct Superseded {
    successors: Mutex<BTreeMap<VolumeId, Successor>>,
}

impl Superseded {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<VolumeId, Successor>> {
        self.successors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells that a volume's primary is another node.
    pub(crate) fn holds(&self, volume: VolumeId) -> bool {
        self.lock().contains_key(&volume)
    }

    /// Says so to who looks at the volume.
    pub(crate) fn warning(&self, volume: VolumeId) -> Option<String> {
        let successor = self.lock().get(&volume).cloned()?;
        Some(format!(
            "{} is the primary since epoch {}: what is written here meanwhile becomes a fork when the volume is unmounted",
            successor.peer, successor.follows.epoch
        ))
    }
}

/// What the peers say of a volume.
struct Standing {
    own: VolumeRecord,
    answers: Vec<(NodeName, Description)>,
    nothing: Vec<NodeName>,
    silent: Vec<(NodeName, ApiProblem)>,
}

impl Standing {
    async fn ask(node: &Arc<Node>, volume: &Volume) -> Self {
        let own = volume.record.clone();
        let mut standing = Self { answers: Vec::new(), nothing: Vec::new(), silent: Vec::new(), own };
        // Where it cannot be read the peers say all that they have.
        let lineage = node.driver.lineage(volume.record.id).await.unwrap_or_default();
        for (peer, described) in node.describe_at_peers(&volume.record.name, &lineage).await {
            match described {
                Ok(Some(description)) if description.volume.id == volume.record.id => {
                    standing.answers.push((peer, description));
                }
                Ok(_) => standing.nothing.push(peer),
                Err(problem) => standing.silent.push((peer, problem)),
            }
        }
        standing
    }

    /// Returns the record with the greatest claim.
    fn newest(&self) -> &VolumeRecord {
        let records = self.answers.iter().map(|(_, description)| &description.volume).chain([&self.own]);
        records.max_by_key(|record| record.claim()).unwrap_or(&self.own)
    }

    /// Finds a peer that is the primary and answers.
    fn rival(&self) -> Option<&(NodeName, Description)> {
        let is_rival = |(_, description): &&(NodeName, Description)| {
            description.volume.role == Role::Primary && description.volume.claim() >= self.own.claim()
        };
        self.answers.iter().filter(is_rival).max_by_key(|(_, description)| description.volume.claim())
    }

    /// Refuses where another node is the primary, or may be.
    fn check(&self, node: &Node, volume: &Volume) -> Result<()> {
        let name = &volume.record.name;
        if let Some((host, description)) = self.rival() {
            let epoch = description.volume.epoch;
            let detail = format!("cannot promote {name}: {host} is its primary (epoch {epoch}), and answers");
            return Err(problem(409, "primary_elsewhere", detail)
                .hint(format!(
                    "`flocker handoff {name} {}` on {host} moves it without losing anything; --force makes this node a primary beside it",
                    node.name
                ))
                .with("primary", host));
        }
        let Some(primary) = &self.newest().primary else {
            return match self.silent.first() {
                None => Ok(()),
                Some((host, why)) => Err(self.may_be_elsewhere(volume, host, &why.detail)),
            };
        };
        let answered = self.answers.iter().map(|(host, _)| host).chain(&self.nothing).any(|host| *host == primary.name);
        if primary.id == node.host_id() || answered {
            return Ok(());
        }
        let silent = self.silent.iter().find(|(host, _)| *host == primary.name);
        let why = silent.map_or("it is no peer of this node any more", |(_, why)| &why.detail);
        Err(self.may_be_elsewhere(volume, &primary.name, why))
    }

    fn may_be_elsewhere(&self, volume: &Volume, host: &NodeName, why: &str) -> ApiProblem {
        let name = &volume.record.name;
        problem(
            409,
            "primary_unreachable",
            format!("cannot promote {name}: {host} may be its primary, and cannot be asked: {why}"),
        )
        .hint(format!(
            "bring {host} back and hand the volume over there; or --force: {}",
            what_may_be_lost(volume, host)
        ))
        .with("primary", host)
        .with("newest_here", volume.snapshots.last().map(|held| &held.snapshot.name))
    }

    /// Says what the volume lacks here, where it was promoted all the same.
    fn losses(&self, volume: &Volume) -> Vec<String> {
        let mut losses = Vec::new();
        if let Some((host, description)) = self.rival() {
            let tip = description.lineage.tip().map(|held| held.snapshot.name.to_string()).unwrap_or_default();
            let dirty = if description.head == HeadState::Dirty { " and changes that no snapshot holds" } else { "" };
            losses.push(format!(
                "{host} answers, has {}@{tip}{dirty}, and goes on writing until it is started again: its history and the one here go apart",
                description.volume.name
            ));
        }
        let answered =
            |host: &NodeName| self.answers.iter().any(|(name, _)| name == host) || self.nothing.contains(host);
        match &self.newest().primary {
            Some(primary) if !answered(&primary.name) => losses.push(what_may_be_lost(volume, &primary.name)),
            None => losses.extend(self.silent.iter().map(|(host, _)| what_may_be_lost(volume, host))),
            Some(_) => {}
        }
        losses
    }
}

fn what_may_be_lost(volume: &Volume, host: &NodeName) -> String {
    let name = &volume.record.name;
    let since = volume.snapshots.last().map_or_else(
        || "any snapshot".to_owned(),
        |held| format!("{name}@{} ({:.0})", held.snapshot.name, held.snapshot.created),
    );
    format!(
        "what {host} wrote after {since} is not here; once it is back, {host} becomes a replica and keeps that as a fork"
    )
}

impl Node {
    /// Makes a replica writable here, in a new epoch.
    pub(crate) async fn promote(
        self: &Arc<Self>,
        name: &VolumeName,
        request: &PromoteVolume,
    ) -> Result<VolumeResource> {
        let known = self.catalog.find(name)?;
        if known.record.role == Role::Primary {
            return Ok(self.volume_resource(&known));
        }
        self.check_unmounted(&known, "promote")?;
        let standing = Standing::ask(self, &known).await;
        if !request.force {
            self.handoffs.check_settled(&known)?;
            standing.check(self, &known)?;
        }
        let (mut volume, _guard) = self.catalog.claim(name).await?;
        if volume.record.id != known.record.id {
            return Err(problem(409, "busy", format!("{name} has become another volume meanwhile")));
        }
        if volume.record.role == Role::Primary {
            return Ok(self.volume_resource(&volume));
        }
        self.check_unmounted(&volume, "promote")?;
        self.inbox.check_quiet(&volume, "promote")?;
        let losses = if request.force { standing.losses(&volume) } else { Vec::new() };
        volume.record.role = Role::Primary;
        // Above the epoch that a peer may begin which was asked to and has not answered: its answer may be on its way.
        let asked = self.handoffs.epoch_of(known.record.id).unwrap_or_default();
        volume.record.epoch = standing.newest().epoch.max(volume.record.epoch).max(asked) + 1;
        volume.record.primary = Some(self.host());
        // First, so that after a crash no peer is asked any more to be the primary of an epoch that is over.
        self.forget_hand_off(known.record.id).await?;
        self.set_record(volume.clone()).await?;
        for loss in &losses {
            tracing::warn!(volume = %name, epoch = volume.record.epoch, "promoted by force: {loss}");
        }
        if !losses.is_empty() {
            self.tasks.spawn(self.clone().follow_newer_primaries());
        }
        let promoted = self.volume_resource(&volume);
        Ok(VolumeResource { warnings: losses, ..promoted })
    }

    /// Becomes the primary in a peer's place. Asked again for what was done, says so again.
    pub(crate) async fn take_over(&self, request: &TakeOver, from: &NodeName) -> Result<TakenOver> {
        let (mut volume, _guard) = self.catalog.claim(&self.name_here(request)).await?;
        let name = &volume.record.name.clone();
        let refuse = |why: String| Err(problem(409, "handoff_refused", why).with("volume", name));
        let record = &volume.record;
        let taken = TakenOver { epoch: request.epoch };
        if record.id != request.volume {
            return refuse(format!("another volume has the name {name} here"));
        }
        let is_mine = record.primary.as_ref().is_some_and(|host| host.id == self.host_id());
        if record.role == Role::Primary && record.epoch == request.epoch && is_mine {
            return Ok(taken);
        }
        if record.role == Role::Primary {
            return refuse(format!("{name} is writable here already (epoch {})", record.epoch));
        }
        if request.epoch <= record.epoch {
            return refuse(format!("epoch {} of {name} is over, {} has begun", request.epoch, record.epoch));
        }
        self.check_unmounted(&volume, "promote")?;
        self.inbox.check_quiet(&volume, "promote")?;
        let tip = volume.snapshots.last().map(|held| held.snapshot.id);
        if tip != Some(request.tip) {
            return refuse(format!("the newest snapshot of {name} here is not the one that {from} hands over"));
        }
        volume.record.role = Role::Primary;
        volume.record.epoch = request.epoch;
        volume.record.primary = Some(self.host());
        fault::point("takeover.before-record");
        self.set_record(volume).await?;
        fault::point("takeover.recorded");
        tracing::info!(volume = %name, epoch = request.epoch, "is the primary now, in place of {from}");
        Ok(taken)
    }

    /// Returns the name here of the volume that is handed over.
    pub(crate) fn name_here(&self, request: &TakeOver) -> VolumeName {
        self.catalog.get(request.volume).map_or_else(|| request.name.clone(), |known| known.record.name)
    }

    /// Tells a peer who may write, as far as it may know.
    pub(crate) fn claims_of(&self, wanted: &[VolumeId], peer: &flocker_certs::PeerIdentity) -> Vec<VolumeClaim> {
        let volumes = wanted.iter().filter_map(|id| self.catalog.get(*id)).map(|volume| volume.record);
        let may_know = |record: &VolumeRecord| self.config.permits(&peer.name, record.name.as_str(), Verb::Read);
        let told = volumes.filter(may_know).map(|record| VolumeClaim {
            volume: record.id,
            name: record.name,
            role: record.role,
            epoch: record.epoch,
            primary: record.primary,
        });
        told.collect()
    }

    /// Looks, once the node serves, was promoted by force, or unmounted a volume whose primary is another node, whether peers have
    /// become primaries meanwhile, and follows them; until each peer has answered once.
    pub(crate) async fn follow_newer_primaries(self: Arc<Self>) {
        let mut answered: BTreeSet<NodeName> = BTreeSet::new();
        let (mut pause, mut tries) = (LOOK_PAUSE, 0);
        loop {
            let peers: Vec<NodeName> = self.peer_resources().into_iter().map(|peer| peer.name).collect();
            for peer in peers.iter().filter(|peer| !answered.contains(*peer)).cloned().collect::<Vec<_>>() {
                if self.look_for_successors(&peer).await.is_ok() {
                    answered.insert(peer);
                }
            }
            let successors: Vec<VolumeId> = self.superseded.lock().keys().copied().collect();
            let mut again = false;
            for id in successors {
                again |= self.step_down(id).await;
            }
            if again && tries < FOLLOW_TRIES {
                tries += 1;
                answered.clear();
            } else if peers.iter().all(|peer| answered.contains(peer)) {
                return;
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                () = tokio::time::sleep(pause) => pause = LOOK_PAUSE_LIMIT.min(pause * 2),
            }
        }
    }

    /// Looks for a moment whether volumes that are to be mounted again for writing have another primary now.
    pub(crate) async fn look_before_mounting(self: &Arc<Self>) {
        let peers = self.peer_resources().into_iter().map(|peer| peer.name);
        let asked: tokio::task::JoinSet<()> = peers
            .map(|peer| {
                let node = self.clone();
                async move { drop(node.look_for_successors(&peer).await) }
            })
            .collect();
        let _ = tokio::time::timeout(LOOK_TIMEOUT, asked.join_all()).await;
    }

    /// Asks a peer about all volumes that this node is the primary of, and notes of which the peer is it now.
    async fn look_for_successors(&self, peer: &NodeName) -> std::result::Result<(), Failure> {
        let own = self.catalog.volumes().into_iter().map(|volume| volume.record);
        let own: BTreeMap<VolumeId, Claim> =
            own.filter(|record| record.role == Role::Primary).map(|record| (record.id, record.claim())).collect();
        if own.is_empty() {
            return Ok(());
        }
        let row = self.find_peer(peer).await?;
        let ids: Vec<VolumeId> = own.keys().copied().collect();
        for some in ids.chunks(CLAIMS_LIMIT) {
            let told = match self.ask_claims(&row, some).await {
                Err(failure) if failure.problem.code == STALE_LINE => {
                    self.kept.forget(peer);
                    self.ask_claims(&row, some).await?
                }
                told => told?,
            };
            for told in told {
                let follows = Follows { epoch: told.epoch, primary: told.primary };
                let is_newer = own.get(&told.volume).is_some_and(|claim| follows.claim() > *claim);
                if told.role == Role::Primary && is_newer {
                    let successor = Successor { peer: peer.clone(), name: told.name, follows };
                    self.superseded.lock().insert(told.volume, successor);
                }
            }
        }
        Ok(())
    }

    async fn ask_claims(&self, row: &PeerRow, volumes: &[VolumeId]) -> std::result::Result<Vec<VolumeClaim>, Failure> {
        let lent = self.lend(row).await?;
        let mut line = Line::open(row.name.clone(), &lent).await?;
        line.send(&Message::AskClaims(AskClaims { protocol: PROTOCOL, volumes: volumes.to_vec() })).await?;
        let claims = match line.recv(NO_PROGRESS).await? {
            Message::Claims(claims) => claims,
            other => return Err(line.broke(format!("{} instead of claims", other.kind())).into()),
        };
        drop(line);
        self.give_back(lent);
        Ok(claims)
    }

    /// Goes on as a replica of a volume whose primary is another node now; tells whether it is to be tried again. What is
    /// mounted waits.
    async fn step_down(self: &Arc<Self>, id: VolumeId) -> bool {
        let Some(successor) = self.superseded.lock().get(&id).cloned() else { return false };
        let Successor { peer, follows, .. } = &successor;
        let Some(known) = self.catalog.get(id).filter(|known| known.record.role == Role::Primary) else {
            self.superseded.lock().remove(&id);
            return false;
        };
        let own = &known.record.name;
        if let Some(row) = self.mounts.of(id) {
            tracing::error!(
                volume = %own, path = row.path,
                "{peer} is the primary since epoch {}, and the volume is mounted here: it becomes a replica when it is unmounted",
                follows.epoch
            );
            return false;
        }
        tracing::warn!(volume = %own, "{peer} is the primary since epoch {}: this node follows it", follows.epoch);
        let failed = match self.follow_successor(id, own, &successor).await {
            Ok(()) => {
                self.superseded.lock().remove(&id);
                return false;
            }
            Err(problem) => problem,
        };
        tracing::error!(volume = %own, "cannot follow {peer}: {failed}");
        // Somebody may have been using the volume, or the peer has itself become another one's replica: it is asked anew.
        let again = failed.code != "refused" && failed.code != "peer_not_permitted";
        if again {
            self.superseded.lock().remove(&id);
        }
        again
    }

    async fn follow_successor(self: &Arc<Self>, id: VolumeId, own: &VolumeName, successor: &Successor) -> Result<()> {
        let Successor { peer, name, follows } = successor;
        self.keep_what_is_unsaved(id).await?;
        let request = StartTransfer {
            as_name: (name != own).then(|| own.clone()),
            on_divergence: DivergencePolicy::Theirs,
            ..StartTransfer::to(peer.clone())
        };
        let transfer = self.transfer_to_its_end(Direction::Pull, name, request).await?;
        match (transfer.state, transfer.problem) {
            (TransferState::Done, _) => {
                let has_all = transfer.outcome.is_some_and(|outcome| outcome.verdict == Verdict::UpToDate);
                self.step_down_clean(id, follows, has_all).await
            }
            (_, Some(problem)) => Err(problem),
            (_, None) => Err(problem(409, "refused", transfer.refusal.unwrap_or_default())),
        }
    }

    /// Takes a snapshot of a head with changes: what a peer does not know of is in no comparison with it.
    async fn keep_what_is_unsaved(&self, id: VolumeId) -> Result<()> {
        let _guard = self.catalog.work_on(id).await;
        let Some(mut known) = self.catalog.get(id) else { return Ok(()) };
        self.check_unmounted(&known, "make a replica of")?;
        if self.driver.head_state(id).await? == HeadState::Dirty {
            self.keep_head(&mut known, "before").await?;
        }
        Ok(())
    }

    /// Where nothing had to be brought over, only the role changes.
    async fn step_down_clean(&self, id: VolumeId, follows: &Follows, has_all: bool) -> Result<()> {
        let _guard = self.catalog.work_on(id).await;
        let Some(known) = self.catalog.get(id).filter(|known| known.record.role == Role::Primary) else {
            return Ok(());
        };
        self.check_unmounted(&known, "make a replica of")?;
        if !has_all || self.driver.head_state(id).await? == HeadState::Dirty {
            let detail = format!("{} has been written to meanwhile", known.record.name);
            return Err(problem(409, "dirty", detail));
        }
        let record = follows.replica(&known.record);
        self.set_record(Volume { record, ..known }).await.map(drop)
    }

    /// Starts a transfer and waits until it is over.
    pub(crate) async fn transfer_to_its_end(
        self: &Arc<Self>,
        direction: Direction,
        volume: &VolumeName,
        request: StartTransfer,
    ) -> Result<TransferResource> {
        let started = self.start_transfer(direction, volume.clone(), request).await?;
        let job = self.transfers.find(&started.id)?;
        self.wait_for_the_end(&job).await?;
        Ok(job.resource())
    }

    /// Waits until a transfer is over, or the node stops.
    pub(crate) async fn wait_for_the_end(&self, job: &Job) -> Result<()> {
        tokio::select! {
            biased;
            () = job.over.cancelled() => Ok(()),
            () = self.cancel.cancelled() => Err(problem(503, "shutting_down", "the node is stopping")),
        }
    }
}
