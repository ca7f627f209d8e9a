//! What a receiver does where two histories have gone apart and the sender's policy is `fork` or `theirs`.
//!
//! Owns the order of things after [`Message::Resolve`](flocker_replication::message::Message): where the incoming history
//! lands, and how a volume goes on with it. Refuses to know which policy does what
//! ([`flocker_replication::resolution::way`]) and how snapshots arrive ([`crate::receive`]).
//!
//! The incoming history always lands in a volume of its own first. Until all of it is there the receiver's volume is as
//! it was; then what follows is written into the state database ([`Adoption`], [`Renaming`]) before its first step, and
//! each step looks first whether it is done, so that a crash is followed by the rest at the next start.
//!
//! | step of an adoption | a crash before it | a crash after it |
//! |---|---|---|
//! | the intent is written | the old history, the incoming one beside it | the rest is done at the next start |
//! | the newer part is split off into the fork | ″ | ″ |
//! | the incoming snapshots are replayed onto the volume | ″ | ″ |
//! | the copy that had landed beside is destroyed | ″ | ″ |
//! | the intent is forgotten | ″ | the new history |

use std::sync::Arc;

use flocker_certs::PeerIdentity;
use flocker_replication::{
    ancestry, binding,
    divergence::{self, Receiver, Relation, Sender},
    message::{Answer, DivergencePolicy, Mode, Offer},
    plan::{Direction, Outcome, Parties, Plan, Point, Verdict, plan},
    refusal::fork_name,
    resolution::{Found, Kept, Place, Resolution, Way, incoming_name, way},
};
use flocker_storage::{
    delta::{Compare, DeltaFormat, DeltaRequest, ReceiveRequest},
    driver::Driver,
    error::{ErrorKind, Result as StorageResult},
    fault,
    model::{HeadState, HeldSnapshot, Lineage, Role, SnapshotId, SnapshotKey, VolumeId, VolumeName, VolumeRecord},
};
use serde::{Deserialize, Serialize};

use crate::{
    api::types::ApiProblem,
    catalog::Volume,
    config::Verb,
    daemon::Node,
    ownership::Follows,
    problem::{self, Result, problem},
    state::Operation,
    transfers::Failure,
};

/// How many names are tried for a fork whose own name is taken by something else.
const NAMES_TRIED: u32 = 100;

/// What an attempt of a transfer came to.
pub(crate) struct Concluded {
    /// How the histories compare, of the volume that the snapshots landed in.
    pub(crate) outcome: Outcome,
    /// What the policy has done.
    pub(crate) resolution: Option<Resolution>,
}

impl From<Outcome> for Concluded {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, resolution: None }
    }
}

impl Concluded {
    /// The outcome of the volume that the history landed in, under the name that it has now.
    pub(crate) fn resolved(outcome: Outcome, resolution: Resolution) -> Self {
        let verdict = match outcome.verdict {
            arrived @ Verdict::FastForward { .. } => arrived,
            _ => Verdict::UpToDate,
        };
        let name = resolution.landed.volume.clone();
        Self { outcome: Outcome { name, verdict, ..outcome }, resolution: Some(resolution) }
    }

    /// A history that went the other way than the transfer was asked for.
    pub(crate) fn reversed(self, found: Outcome) -> Self {
        let Self { outcome, resolution } = self;
        let landed = Place { host: outcome.receiver.name.clone(), volume: outcome.name.clone() };
        let kept = resolution.and_then(|resolution| resolution.kept);
        let policy = DivergencePolicy::Ours;
        Self { outcome, resolution: Some(Resolution { policy, found: found.verdict, landed, kept }) }
    }
}

/// A resolution under way at the receiver.
pub(crate) struct Resolving {
    policy: DivergencePolicy,
    way: Way,
    /// What the comparison gave; its `name` is the receiver's volume.
    pub(crate) found: Outcome,
    /// The receiver's volume as it was answered.
    volume: VolumeRecord,
    /// The name that the incoming history lands under.
    pub(crate) beside: VolumeName,
    /// Whether nothing has to arrive: the volume holds the wanted snapshot.
    pub(crate) at_once: bool,
}

impl Resolving {
    /// Looks whether what the sender asks for follows from the comparison, may be done, and can be done.
    ///
    /// Nothing is changed. `peer` is who pushes; a pull of this node's own has none.
    pub(crate) fn begin(
        node: &Node,
        offer: &Offer,
        answer: &Answer,
        peer: Option<&PeerIdentity>,
    ) -> std::result::Result<Self, Failure> {
        let direction = if peer.is_some() { Direction::Push } else { Direction::Pull };
        let (relation, found) = compare(offer, answer, direction)?;
        let way = way(offer.policy, Found::from(&relation));
        let acts = matches!(way, Way::Beside | Way::Succeed | Way::Rename) && offer.mode == Mode::Run;
        let (Some(volume), true) = (answer.volume.clone(), acts) else {
            return Err(problem(502, "protocol", "the peer asks for a resolution where none is due").into());
        };
        let beside = incoming_name(&offer.volume.name, &found.want);
        let own_want = answer.lineage.find(offer.want).is_some_and(|held| held.volume == volume.id);
        let at_once = way == Way::Succeed && own_want;
        let can_go_back = match &relation {
            Relation::Diverged { common, .. } => common.volume == volume.id,
            Relation::Behind { common, .. } => common.as_ref().is_some_and(|common| common.volume == volume.id),
            _ => true,
        };
        let resolving = Self { policy: offer.policy, way, found, volume, beside, at_once };
        if way != Way::Beside {
            if let Some(peer) = peer {
                node.check_right(peer, &resolving.volume.name, Verb::Force)?;
            }
            let known = node.catalog.get(resolving.volume.id);
            let known = known.ok_or_else(|| problem::volume_not_found(&resolving.volume.name))?;
            node.check_unmounted(&known, "replace the history of")?;
        }
        if way == Way::Succeed && !can_go_back {
            return Err(nothing_to_go_back_to(&resolving.volume.name).into());
        }
        Ok(resolving)
    }

    /// Leaves out of an answer what the incoming history must not build on: where it takes the volume's place later, it
    /// shares the volume's own snapshots and nobody else's.
    pub(crate) fn narrow(&self, bound: &Lineage, answer: &mut Answer) {
        if self.way == Way::Succeed {
            answer.elsewhere.retain(|key| bound.snapshots.iter().any(|held| held.key() == *key));
        }
    }

    /// Ends the resolution once all has arrived.
    pub(crate) async fn finish(
        &self,
        node: &Arc<Node>,
        offer: &Offer,
        landed: VolumeId,
    ) -> std::result::Result<Resolution, Failure> {
        let (volume, kept) = match self.way {
            Way::Succeed => (self.volume.name.clone(), node.succeed(self, offer, landed).await?),
            Way::Rename => (self.volume.name.clone(), Some(node.rename_for(self, offer, landed).await?)),
            _ => (node.catalog.get(landed).map_or_else(|| self.beside.clone(), |known| known.record.name), None),
        };
        let landed = Place { host: node.name.clone(), volume };
        Ok(Resolution { policy: self.policy, found: self.found.verdict.clone(), landed, kept })
    }
}

/// Makes the same comparison as the sender.
fn compare(offer: &Offer, answer: &Answer, direction: Direction) -> std::result::Result<(Relation, Outcome), Failure> {
    let relation = divergence::compare(&Sender::from(offer), &Receiver::from(answer), offer.want)
        .map_err(|error| problem::internal(problem::chain(&error)))?;
    let parties = Parties {
        direction,
        volume: offer.volume.name.clone(),
        name: offer.name.clone(),
        sender: offer.sender.clone(),
        receiver: answer.receiver.clone(),
    };
    match plan(&offer.lineage, offer.want, relation.clone(), &parties, &offer.formats, answer) {
        Ok(Plan::UpToDate(outcome) | Plan::FastForward(outcome, _)) => Ok((relation, outcome)),
        Ok(Plan::Refuse(refusal)) => Ok((relation, refusal.0)),
        Err(error) => Err(problem(409, "no_common_format", problem::chain(&error)).into()),
    }
}

/// Returns the names that are tried where a fork's own name is taken by something else.
pub(crate) fn further_names(name: &VolumeName) -> impl Iterator<Item = VolumeName> + use<> {
    let name = name.clone();
    (2..NAMES_TRIED).filter_map(move |number| format!("{:.120}.{number}", name.as_str()).parse().ok())
}

fn nothing_to_go_back_to(name: &VolumeName) -> ApiProblem {
    problem(
        409,
        problem::POLICY_UNSUPPORTED,
        format!("{name} has no snapshot of its own that both histories have: none to go back to"),
    )
    .hint("--on-divergence fork keeps both")
}

/// A volume goes on with a history that has landed beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Adoption {
    volume: VolumeId,
    /// The newest snapshot that stays.
    keep: SnapshotId,
    /// What keeps the rest.
    fork: VolumeRecord,
    /// Where the incoming history lies; `None` where the volume holds it already.
    incoming: Option<VolumeId>,
    /// Whom the volume follows from then on.
    follows: Follows,
}

/// Two volumes get new names, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Renaming {
    /// Gives its name away.
    first: (VolumeId, VolumeName),
    /// Takes it.
    second: (VolumeId, VolumeName),
}

impl Node {
    /// Lets a volume go on with the history in `landed`; returns what keeps its own, where it had any.
    async fn succeed(
        self: &Arc<Self>,
        resolving: &Resolving,
        offer: &Offer,
        landed: VolumeId,
    ) -> std::result::Result<Option<Kept>, Failure> {
        let id = resolving.volume.id;
        let guard = self.catalog.work_on(id).await;
        let mut known = self.catalog.get(id).ok_or_else(|| problem::volume_not_found(&resolving.volume.name))?;
        self.check_replacing(&known)?;
        if self.driver.head_state(id).await.map_err(ApiProblem::from)? == HeadState::Dirty {
            self.keep_head(&mut known, "before").await?;
        }
        let lineage = self.driver.lineage(id).await.map_err(ApiProblem::from)?;
        let forgotten = ancestry::answered(&lineage, &self.memory_of(id, &lineage).await?, offer);
        let receiver = Receiver {
            volume: Some(&known.record),
            lands_in: id,
            lineage: &lineage,
            head: HeadState::Clean,
            elsewhere: &[],
            forgotten: &forgotten,
        };
        let relation = divergence::compare(&Sender::from(offer), &receiver, offer.want)
            .map_err(|error| problem::internal(problem::chain(&error)))?;
        let keep = match relation {
            Relation::UpToDate => return Ok(None),
            Relation::Diverged { ref common, .. } | Relation::Behind { common: Some(ref common), .. }
                if common.volume == id =>
            {
                common.key()
            }
            // Somebody has resolved it meanwhile; the next attempt is an ordinary one.
            Relation::FastForward { .. } | Relation::Dirty { .. } => {
                let problem = problem(409, "busy", format!("{} has changed meanwhile", known.record.name));
                return Err(Failure { transient: true, problem });
            }
            _ => return Err(nothing_to_go_back_to(&known.record.name).into()),
        };
        if resolving.at_once && keep.snapshot != offer.want {
            let problem = problem(409, "busy", format!("{} has changed meanwhile", known.record.name));
            return Err(Failure { transient: true, problem });
        }
        let Some(tip) = lineage.tip() else { return Err(nothing_to_go_back_to(&known.record.name).into()) };
        let tip = Point::from(tip);
        let incoming = (!resolving.at_once).then_some(landed);
        if let Some(landed) = incoming {
            let arrived = self.driver.lineage(landed).await.map_err(ApiProblem::from)?;
            if arrived.find(keep.snapshot).is_none() {
                let detail = format!("{} does not build on {}", resolving.beside, known.record.name);
                return Err(problem(409, "blocked", detail)
                    .hint(format!("destroy {} and do the same again", resolving.beside))
                    .into());
            }
        }
        let name = self.free_fork_name(&known.record, &tip)?;
        let _reserved = self.catalog.reserve(&name)?;
        let fork = VolumeRecord {
            id: binding::sibling(id, &name),
            name: name.clone(),
            metadata: known.record.metadata.clone(),
            created: tip.created,
            origin: Some(keep),
            role: known.record.role,
            epoch: known.record.epoch,
            primary: known.record.primary.clone(),
            quota_bytes: known.record.quota_bytes,
        };
        let adoption = Adoption { volume: id, keep: keep.snapshot, fork, incoming, follows: Follows::of(offer) };
        self.adopt(adoption).await?;
        drop(guard);
        tracing::info!(volume = %known.record.name, kept = %name, "goes on with the history of {}", offer.sender.name);
        Ok(Some(Kept { place: Place { host: self.name.clone(), volume: name }, tip: Some(tip) }))
    }

    /// Gives the wanted name to the volume that landed, and another to the one that has it.
    async fn rename_for(
        self: &Arc<Self>,
        resolving: &Resolving,
        offer: &Offer,
        landed: VolumeId,
    ) -> std::result::Result<Kept, Failure> {
        let id = resolving.volume.id;
        let _guard = self.catalog.work_on(id).await;
        let known = self.catalog.get(id).ok_or_else(|| problem::volume_not_found(&resolving.volume.name))?;
        let incoming = self.catalog.get(landed).ok_or_else(|| problem::volume_not_found(&resolving.beside))?;
        self.check_replacing(&known)?;
        self.check_unmounted(&incoming, "rename")?;
        if landed != offer.volume.id || known.record.name != resolving.volume.name {
            let name = &incoming.record.name;
            let detail = format!("the history is here as {name}, and another copy of its volume beside it");
            return Err(problem(409, problem::POLICY_UNSUPPORTED, detail)
                .hint("--on-divergence fork leaves it there")
                .into());
        }
        let tip = known.snapshots.last().map(|held| Point::from(&**held));
        let named_after = tip.clone().unwrap_or_else(|| {
            // A volume without a snapshot is known by its own id.
            let mut point = resolving.found.want.clone();
            point.id = SnapshotId(id.0);
            point.host = self.name.clone();
            point
        });
        let name = self.free_fork_name(&known.record, &named_after)?;
        let _reserved = self.catalog.reserve(&name)?;
        let renaming = Renaming { first: (id, name.clone()), second: (landed, known.record.name.clone()) };
        let operation = format!("rename-{id}");
        self.state.begin(operation.clone(), &Operation::Rename(renaming.clone())).await.map_err(ApiProblem::from)?;
        fault::point("adopt.rename-journalled");
        self.carry_out_renaming(&renaming).await?;
        self.state.end(operation).await.map_err(ApiProblem::from)?;
        Ok(Kept { place: Place { host: self.name.clone(), volume: name }, tip })
    }

    /// Refuses while somebody uses the volume whose history is to give way.
    fn check_replacing(&self, known: &Volume) -> Result<()> {
        const WHAT: &str = "replace the history of";
        self.check_unmounted(known, WHAT)?;
        self.check_unpinned(known, WHAT)?;
        self.inbox.check_quiet(known, WHAT)
    }

    /// Finds the name of the fork that keeps a history. A volume that has the name already, or the id that goes with
    /// it, keeps an equal history from an earlier time and is left alone.
    fn free_fork_name(&self, record: &VolumeRecord, tip: &Point) -> Result<VolumeName> {
        let name = fork_name(&record.name, &tip.host, tip.id);
        let is_free = |name: &VolumeName| {
            self.catalog.find(name).is_err() && self.catalog.get(binding::sibling(record.id, name)).is_none()
        };
        let mut names = std::iter::once(name.clone()).chain(further_names(&name));
        names.find(|name| is_free(name)).ok_or_else(|| problem::volume_exists(&name))
    }

    /// Writes an adoption down and does it.
    async fn adopt(&self, adoption: Adoption) -> Result<()> {
        let operation = format!("adopt-{}", adoption.volume);
        fault::point("adopt.before-journal");
        self.state.begin(operation.clone(), &Operation::Adopt(Box::new(adoption.clone()))).await?;
        fault::point("adopt.journalled");
        if let Err(error) = self.carry_out(&adoption).await {
            if self.catalog.get(adoption.fork.id).is_none() {
                // Nothing has been done.
                self.state.end(operation).await?;
            }
            return Err(error);
        }
        Ok(self.state.end(operation).await?)
    }

    /// Does what an adoption says, as far as it is not done.
    pub(crate) async fn carry_out(&self, adoption: &Adoption) -> Result<()> {
        let scan = self.driver.scan().await?;
        let held = |id: VolumeId| scan.volumes.iter().find(|(record, _)| record.id == id);
        let Some((record, _)) = held(adoption.volume) else { return Ok(()) };
        let keep = SnapshotKey { volume: adoption.volume, snapshot: adoption.keep };
        if held(adoption.fork.id).is_none() {
            self.state.move_head_parent(adoption.volume, adoption.fork.id).await?;
            self.driver.split(keep, &adoption.fork).await?;
            self.catalog.split(keep, Some(adoption.fork.clone()));
        }
        fault::point("adopt.split");
        let record = adoption.follows.replica(record);
        self.driver.set_record(&record).await?;
        fault::point("adopt.follows");
        if let Some(incoming) = adoption.incoming.filter(|incoming| held(*incoming).is_some()) {
            self.state.inherit(incoming, adoption.volume).await?;
            let complete = replay(&*self.driver, incoming, &record).await?;
            fault::point("adopt.replayed");
            if complete {
                self.clear_landed(incoming).await?;
            }
        }
        let scan = self.driver.scan().await?;
        if let Some((record, snapshots)) = scan.volumes.into_iter().find(|(record, _)| record.id == adoption.volume) {
            self.catalog.put(Volume::new(record, snapshots));
        }
        fault::point("adopt.before-end");
        Ok(())
    }

    /// Destroys the volume that an adopted history had landed in: all of it is in the adopting volume now. What somebody
    /// has begun to use stays.
    async fn clear_landed(&self, landed: VolumeId) -> Result<()> {
        if let Some(known) = self.catalog.get(landed)
            && (self.check_unmounted(&known, "destroy").is_err() || known.record.role == Role::Primary)
        {
            return Ok(());
        }
        match self.driver.destroy(landed).await {
            Ok(()) => {
                self.catalog.remove(landed);
                self.state.forget_volume(landed).await?;
            }
            Err(error) if matches!(error.kind, ErrorKind::Blocked(_)) => {
                tracing::info!(volume = %landed, "a copy of an adopted history is in use and stays: {}", problem::chain(&error));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Does what a renaming says, as far as it is not done.
    pub(crate) async fn carry_out_renaming(&self, renaming: &Renaming) -> Result<()> {
        for (id, name) in [&renaming.first, &renaming.second] {
            let scan = self.driver.scan().await?;
            let Some((record, snapshots)) = scan.volumes.into_iter().find(|(record, _)| record.id == *id) else {
                continue;
            };
            let record = VolumeRecord { name: name.clone(), ..record };
            self.driver.set_record(&record).await?;
            self.catalog.put(Volume::new(record, snapshots));
            fault::point("adopt.renamed");
        }
        Ok(())
    }
}

/// Brings the snapshots of one volume onto another one of the same pool, oldest first; each is there in full or not at
/// all. Tells whether all of them are: a volume that has gone another way meanwhile is left alone.
async fn replay(driver: &dyn Driver, from: VolumeId, onto: &VolumeRecord) -> StorageResult<bool> {
    let arrived = driver.lineage(from).await?;
    loop {
        let here = driver.lineage(onto.id).await?;
        let place = |tip: &HeldSnapshot| arrived.snapshots.iter().position(|held| held.snapshot.id == tip.snapshot.id);
        let Some((tip, at)) = here.tip().and_then(|tip| Some((tip, place(tip)?))) else { return Ok(false) };
        let Some(next) = arrived.snapshots.get(at + 1) else { return Ok(true) };
        // The portable format: it is read and written by every driver, and within one pool nothing travels.
        let request = DeltaRequest {
            base: Some(arrived.snapshots[at].key()),
            target: next.key(),
            format: DeltaFormat::tree(),
            compare: Compare::Metadata,
            resume: None,
        };
        let mut reader = driver.read_delta(request).await?;
        let request = ReceiveRequest {
            volume: onto.clone(),
            snapshot: next.snapshot.clone(),
            base: Some(tip.key()),
            format: DeltaFormat::tree(),
            resume: None,
        };
        let mut receiving = driver.receive(request).await?;
        while let Some(chunk) = reader.next().await? {
            receiving.write(chunk).await?;
        }
        receiving.commit().await?;
        fault::point("adopt.snapshot-replayed");
    }
}
