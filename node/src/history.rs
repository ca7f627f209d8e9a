//! A volume's history as a graph: what this node holds, and what the peers say they hold.
//!
//! Owns who is asked and what an answer counts as: a peer that cannot answer is said so, never read as one that has
//! nothing. Refuses to know how a graph is drawn (the CLI).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use flocker_replication::{
    ancestry::Memory,
    message::{Describe, Description, Message, PROTOCOL, Rest, strip},
    outline::{Block, outline},
};
use flocker_storage::model::{HeldSnapshot, Host, Lineage, NodeName, SnapshotId, VolumeId, VolumeName};
use flocker_transport::NO_PROGRESS;
use tokio::task::JoinSet;

use crate::{
    api::types::{
        ApiProblem, HistoryEdge, HistoryHost, HistoryNode, HistoryPlace, HistoryResource, HostAnswer, PeerPosition,
    },
    catalog::Volume,
    daemon::Node,
    line::Line,
    problem::{Result, STALE_LINE, problem},
    state::PeerRow,
    transfers::Failure,
};

/// How long a peer may take to tell its history.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// Whom a history is asked of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hosts {
    /// This node.
    Here,
    /// This node and all peers.
    All,
}

/// The graph while it grows.
#[derive(Default)]
struct Graph {
    nodes: BTreeMap<SnapshotId, HistoryNode>,
}

impl Graph {
    fn add(&mut self, host: &NodeName, volume: &VolumeName, held: &HeldSnapshot) {
        let snapshot = &held.snapshot;
        let node = self.nodes.entry(snapshot.id).or_insert_with(|| HistoryNode {
            id: snapshot.id,
            name: snapshot.name.clone(),
            host: snapshot.host.name.clone(),
            created: snapshot.created,
            parents: snapshot.parents.clone(),
            logical_bytes: held.logical_bytes,
            unchanged: held.unchanged,
            held_by: Vec::new(),
        });
        let place = HistoryPlace { host: host.clone(), volume: volume.clone() };
        if !node.held_by.contains(&place) {
            node.held_by.push(place);
        }
    }

    /// Joins each snapshot with the nearest ones that it descends from, past those that are remembered only.
    fn edges(&self, memory: &Memory) -> Vec<HistoryEdge> {
        let mut edges = Vec::new();
        for (child, node) in &self.nodes {
            let mut open: Vec<SnapshotId> = node.parents.iter().rev().copied().collect();
            let mut met = BTreeSet::new();
            while let Some(parent) = open.pop() {
                if !met.insert(parent) {
                    continue;
                }
                if self.nodes.contains_key(&parent) {
                    edges.push(HistoryEdge { child: *child, parent });
                } else {
                    open.extend(memory.get(&parent).into_iter().flatten().rev());
                }
            }
        }
        edges
    }
}

impl Node {
    /// Shows a volume's history with that of its forks and clones here, and of whom it was cloned from.
    pub(crate) async fn history(self: &Arc<Self>, name: &VolumeName, hosts: Hosts) -> Result<HistoryResource> {
        let volume = self.catalog.find(name)?;
        let id = volume.record.id;
        let mut graph = Graph::default();
        for relative in self.relatives(id) {
            for held in &relative.snapshots {
                graph.add(&self.name, &relative.record.name, held);
            }
        }
        let lineage = self.driver.lineage(id).await?;
        let here: Vec<SnapshotId> = lineage.snapshots.iter().map(|held| held.snapshot.id).collect();
        let head = self.look_at_head(id).await?;
        let mut hosts_told = vec![HistoryHost {
            host: self.name.clone(),
            answer: HostAnswer::Holds,
            volume: Some(name.clone()),
            role: Some(volume.record.role),
            epoch: Some(volume.record.epoch),
            head: Some(head),
            tip: here.last().copied(),
            common: here.last().copied(),
            behind: Some(0),
            why: None,
        }];
        if hosts == Hosts::All {
            for (peer, described) in self.describe_at_peers(name, &lineage).await {
                hosts_told.push(told(&mut graph, id, &here, peer, described));
            }
        }
        let relatives = self.relatives(id).into_iter().map(|relative| relative.record.id);
        let memory = self.state.memory(relatives.collect()).await?;
        Ok(HistoryResource {
            volume: name.clone(),
            id,
            edges: graph.edges(&memory),
            nodes: graph.nodes.into_values().collect(),
            hosts: hosts_told,
        })
    }

    /// Remembers that a peer holds a snapshot of a volume, too.
    pub(crate) async fn note_common(&self, volume: VolumeId, peer: &Host, snapshot: SnapshotId) -> Result<()> {
        Ok(self.state.put_common(volume, peer.id.to_string(), snapshot).await?)
    }

    /// Tells how far the peers were with a volume, as far as this node knows without asking.
    pub(crate) async fn known_positions(&self, volume: &Volume) -> Result<Vec<PeerPosition>> {
        let names: BTreeMap<String, NodeName> =
            self.peer_resources().into_iter().map(|peer| (peer.id, peer.name)).collect();
        let snapshots = &volume.snapshots;
        let commons = self.state.commons(volume.record.id).await?.into_iter();
        let positions = commons.filter_map(|(peer, snapshot)| {
            let at = snapshots.iter().position(|held| held.snapshot.id == snapshot);
            Some(PeerPosition {
                host: names.get(&peer)?.clone(),
                common: at.map(|at| snapshots[at].snapshot.name.clone()),
                behind: at.map(|at| (snapshots.len() - at - 1) as u64),
            })
        });
        let mut positions: Vec<PeerPosition> = positions.collect();
        positions.sort_by(|a, b| a.host.cmp(&b.host));
        Ok(positions)
    }

    /// Finds the volumes here that share a part of a volume's history, by their origins.
    fn relatives(&self, id: VolumeId) -> Vec<Volume> {
        let all = self.catalog.volumes();
        let mut related = BTreeSet::from([id]);
        loop {
            let before = related.len();
            for record in all.iter().map(|volume| &volume.record) {
                let Some(origin) = record.origin else { continue };
                if related.contains(&record.id) || related.contains(&origin.volume) {
                    related.extend([record.id, origin.volume]);
                }
            }
            if related.len() == before {
                return all.into_iter().filter(|volume| related.contains(&volume.record.id)).collect();
            }
        }
    }

    /// Asks all peers at once for their volume of a name; `None` where a peer says that it has none. What they have as it is in
    /// this node's lineage does not travel.
    pub(crate) async fn describe_at_peers(
        self: &Arc<Self>,
        name: &VolumeName,
        own: &Lineage,
    ) -> Vec<(NodeName, std::result::Result<Option<Description>, ApiProblem>)> {
        let mut asked = JoinSet::new();
        let own = strip(own);
        let own = Arc::new((outline(&own), own));
        for peer in self.peer_resources() {
            let (node, name, own) = (self.clone(), name.clone(), own.clone());
            asked.spawn(async move {
                let answer = match node.find_peer(&peer.name).await {
                    Ok(row) => tokio::time::timeout(ANSWER_TIMEOUT, node.describe_at(row, &name, &own)).await,
                    Err(problem) => Ok(Err(problem.into())),
                };
                let answer = match answer {
                    Ok(Ok(description)) => Ok(Some(description)),
                    Ok(Err(failure)) if failure.problem.code == "peer_unknown_volume" => Ok(None),
                    Ok(Err(failure)) => Err(failure.problem),
                    Err(_) => Err(problem(504, "peer_unreachable", format!("{} does not answer", peer.name))),
                };
                (peer.name, answer)
            });
        }
        let mut answers = asked.join_all().await;
        answers.sort_by(|(a, _), (b, _)| a.cmp(b));
        answers
    }

    /// Asks one peer for its volume of a name, beside this node's lineage of it and its outline.
    pub(crate) async fn describe_at(
        &self,
        row: PeerRow,
        name: &VolumeName,
        own: &(Vec<Block>, Lineage),
    ) -> std::result::Result<Description, Failure> {
        loop {
            let described = self.ask_to_describe(&row, name, own).await;
            match described {
                Err(failure) if failure.problem.code == STALE_LINE => self.kept.forget(&row.name),
                described => return described,
            }
        }
    }

    async fn ask_to_describe(
        &self,
        row: &PeerRow,
        name: &VolumeName,
        (outline, own): &(Vec<Block>, Lineage),
    ) -> std::result::Result<Description, Failure> {
        let lent = self.lend(row).await?;
        let mut line = Line::open(row.name.clone(), &lent).await?;
        line.send(&Message::Describe(Describe { protocol: PROTOCOL, volume: name.clone() })).await?;
        line.send(&Message::Rest(Rest { older: outline.clone(), ..Rest::default() })).await?;
        let mut description = match line.recv(NO_PROGRESS).await? {
            Message::Description(description) => *description,
            other => return Err(line.broke(format!("{} instead of a description", other.kind())).into()),
        };
        description.unpack(own).map_err(|violation| line.broke(violation))?;
        drop(line);
        self.give_back(lent);
        Ok(description)
    }
}

/// Takes a peer's answer into the graph.
fn told(
    graph: &mut Graph,
    id: VolumeId,
    here: &[SnapshotId],
    host: NodeName,
    described: std::result::Result<Option<Description>, ApiProblem>,
) -> HistoryHost {
    let mut told = HistoryHost {
        host,
        answer: HostAnswer::Nothing,
        volume: None,
        role: None,
        epoch: None,
        head: None,
        tip: None,
        common: None,
        behind: None,
        why: None,
    };
    let description = match described {
        Err(problem) => {
            told.answer = HostAnswer::Unreachable;
            told.why = Some(problem.detail);
            return told;
        }
        Ok(None) => return told,
        Ok(Some(description)) if description.volume.id != id => {
            told.answer = HostAnswer::OtherVolume;
            return told;
        }
        Ok(Some(description)) => description,
    };
    let Description { volume, lineage, head, .. } = description;
    for held in &lineage.snapshots {
        graph.add(&told.host, &volume.name, held);
    }
    let there: BTreeSet<SnapshotId> = lineage.snapshots.iter().map(|held| held.snapshot.id).collect();
    let common = here.iter().rposition(|id| there.contains(id));
    told.answer = HostAnswer::Holds;
    told.tip = lineage.tip().map(|held| held.snapshot.id);
    told.common = common.map(|at| here[at]);
    told.behind = common.map(|at| (here.len() - at - 1) as u64);
    told.volume = Some(volume.name);
    told.role = Some(volume.role);
    told.epoch = Some(volume.epoch);
    told.head = Some(head);
    told
}
