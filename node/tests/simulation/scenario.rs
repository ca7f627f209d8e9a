//! What happens to a world: verbs, faults and the passing of time, all chosen by the seed; then healing, and what must hold after it.

use std::{collections::BTreeSet, fmt::Write as _};

use axum::http::Method;
use flocker_storage::{
    drivers::memory::VolumeSight,
    model::{Role, SnapshotId, VolumeId},
};
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use serde_json::{Value, json};

use crate::{
    invariants::Watch,
    world::{Ticket, World, name_of},
};

/// How many things happen before all heals.
const EVENTS: u32 = 120;
/// The most steps between two of them (5 ms each).
const MOST_STEPS: u32 = 200;
/// How often the invariants are looked at between events, in steps.
const LOOK_EVERY: u32 = 20;
/// How long everything may take to come to rest after healing, in steps: ten minutes.
const REST: u32 = 120_000;

const VOLUMES: &[&str] = &["db", "web", "log"];
const POLICIES: &[&str] = &["refuse", "refuse", "fork", "theirs", "ours"];

/// What a node may answer with that is nobody's fault but the network's, or a stop's.
const EXPECTED: &[&str] = &["peer_unreachable", "peer_busy", "peer_shutting_down", "shutting_down", "timed_out"];

/// What a run found out.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Everything that happened, one thing a line.
    pub(crate) story: String,
    /// Transfers that were done.
    pub(crate) transfers_done: u32,
    /// How many nodes died, at fault points and otherwise.
    pub(crate) deaths: u32,
    /// Snapshots ever seen.
    pub(crate) snapshots: usize,
    /// The fault points at which nodes died.
    pub(crate) points: BTreeSet<String>,
}

/// A volume of a node: id, name, role, ids and names of its snapshots.
type Chosen = (VolumeId, String, Role, Vec<(SnapshotId, String)>);

/// A request whose answer is waited for.
struct Waiting {
    node: usize,
    ticket: Ticket,
    what: String,
    then: Then,
}

/// What its answer means.
enum Then {
    Nothing,
    /// The snapshot in the answer, of this volume, is promised.
    Promise(String),
    /// It names a transfer.
    Transfer,
    /// Nothing more of this volume goes.
    Spare(VolumeId, String),
}

pub(crate) struct Scenario {
    world: World,
    watch: Watch,
    rng: SmallRng,
    nodes: usize,
    report: Report,
    waiting: Vec<Waiting>,
    /// Every transfer that was started: where, and its id.
    transfers: Vec<(usize, String)>,
    serial: u32,
    steps: u64,
}

/// Runs one seed to its end.
pub(crate) fn run(seed: u64, put_back: Option<&'static str>) -> (Report, Result<(), String>) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let nodes = rng.random_range(3..=5);
    let world = World::new(seed, nodes, put_back);
    let watch = Watch::new(nodes);
    let report = Report::default();
    let mut scenario =
        Scenario { world, watch, rng, nodes, report, waiting: Vec::new(), transfers: Vec::new(), serial: 0, steps: 0 };
    let outcome = scenario.play();
    scenario.report.snapshots = scenario.watch.snapshots;
    (scenario.report, outcome)
}

impl Scenario {
    fn play(&mut self) -> Result<(), String> {
        self.until("all nodes are up", |it| (0..it.nodes).all(|node| it.world.is_ready(node)))?;
        let _ = self.create(0);
        self.pass(LOOK_EVERY)?;
        for _ in 0..EVENTS {
            while self.event().is_none() {}
            let steps = self.rng.random_range(1..=MOST_STEPS);
            self.pass(steps)?;
        }
        self.heal()?;
        self.converge()
    }

    fn tell(&mut self, what: &str) {
        let _ = writeln!(self.report.story, "{:>8.3}s {what}", self.steps as f64 * 0.005);
    }

    fn pass(&mut self, steps: u32) -> Result<(), String> {
        for step in 0..steps {
            let were_up: Vec<bool> = self.world.hosts.iter().map(|host| host.up).collect();
            self.world.step();
            self.steps += 1;
            for (node, was_up) in were_up.into_iter().enumerate() {
                if !was_up || self.world.hosts[node].up {
                    continue;
                }
                match self.world.hosts[node].died_at.take() {
                    Some(point) => {
                        self.tell(&format!("{} died at {point}", name_of(node)));
                        self.report.points.insert(point);
                        self.dead(node);
                    }
                    None => {
                        self.tell(&format!("{} has stopped", name_of(node)));
                        self.waiting.retain(|waiting| waiting.node != node);
                    }
                }
            }
            self.answers()?;
            if step % LOOK_EVERY == 0 {
                self.watch.check(&self.world)?;
            }
        }
        self.watch.check(&self.world)
    }

    fn dead(&mut self, node: usize) {
        self.report.deaths += 1;
        self.watch.died(node);
        self.waiting.retain(|waiting| waiting.node != node);
    }

    fn answers(&mut self) -> Result<(), String> {
        let mut still = Vec::new();
        for waiting in std::mem::take(&mut self.waiting) {
            let Some((status, body)) = self.world.answer(waiting.node, waiting.ticket) else {
                still.push(waiting);
                continue;
            };
            let code = body["code"].as_str().unwrap_or_default().to_owned();
            self.tell(&format!("    {} -> {status} {code}", waiting.what));
            if status >= 500 && !EXPECTED.contains(&code.as_str()) {
                return Err(format!("{} was answered with {status}: {body}", waiting.what));
            }
            let id = body["id"].as_str().and_then(|id| id.parse::<SnapshotId>().ok());
            match (waiting.then, id) {
                (Then::Promise(volume), Some(id)) if status < 300 => self.watch.promise(waiting.node, id, &volume),
                (Then::Transfer, _) if status < 300 => {
                    let id = body["id"].as_str().unwrap_or_default().to_owned();
                    self.transfers.push((waiting.node, id));
                }
                (Then::Spare(volume, name), _) => {
                    // What it came to is looked at before it is spared.
                    self.watch.check(&self.world)?;
                    self.watch.spare_volume(&self.world, waiting.node, volume, &name);
                }
                _ => {}
            }
        }
        self.waiting = still;
        Ok(())
    }

    fn ask(&mut self, node: usize, method: Method, path: &str, body: Value, then: Then) -> Option<()> {
        let shown = if body.is_null() { String::new() } else { format!(" {body}") };
        let what = format!("{} {method} {path}{shown}", name_of(node));
        self.tell(&what);
        let ticket = self.world.ask(node, method, path, body);
        self.waiting.push(Waiting { node, ticket, what, then });
        Some(())
    }

    fn until(&mut self, what: &str, holds: impl Fn(&mut Self) -> bool) -> Result<(), String> {
        for _ in 0..REST / LOOK_EVERY {
            if holds(self) {
                return Ok(());
            }
            self.pass(LOOK_EVERY)?;
            if let Some((node, why)) = (0..self.nodes).find_map(|node| Some((node, self.world.failure(node)?))) {
                return Err(format!("{} does not start: {why}", name_of(node)));
            }
        }
        Err(format!("it does not come to this, within {REST} steps: {what}"))
    }

    /// Chooses one thing to happen; `None` when there is nothing that it could happen to.
    fn event(&mut self) -> Option<()> {
        let node = self.rng.random_range(0..self.nodes);
        if self.world.is_stopping(node) {
            return None;
        }
        if !self.world.hosts[node].up {
            self.tell(&format!("{} starts", name_of(node)));
            self.world.start(node);
            return Some(());
        }
        match self.rng.random_range(0..100) {
            0..8 => self.create(node),
            8..26 => self.write(node),
            26..42 => self.snapshot(node),
            42..66 => self.transfer(node),
            66..70 => self.clone(node),
            70..74 => self.rollback(node),
            74..77 => self.forget(node),
            77..79 => self.destroy(node),
            79..81 => self.promote(node),
            81..83 => self.hand_off(node),
            83..84 => self.mount(node),
            84..85 => self.cancel(node),
            85..87 => {
                self.tell(&format!("{} dies", name_of(node)));
                self.world.crash(node);
                self.dead(node);
                Some(())
            }
            87..88 => {
                self.tell(&format!("{} is stopped", name_of(node)));
                self.world.stop(node);
                Some(())
            }
            88..93 => {
                let passes = self.rng.random_range(0..12);
                self.tell(&format!("{} dies at a fault point, after {passes} others", name_of(node)));
                self.world.fates.doom(node, passes);
                Some(())
            }
            _ => self.weather(node),
        }
    }

    fn other(&mut self, node: usize) -> usize {
        (node + self.rng.random_range(1..self.nodes)) % self.nodes
    }

    /// Chooses a volume of a node: id, name, role, names of its snapshots.
    fn volume(&mut self, node: usize) -> Option<Chosen> {
        let volumes = self.world.look(node);
        let volume = volumes.choose(&mut self.rng)?;
        let snapshots = volume.snapshots.iter().map(|sight| &sight.held.snapshot);
        let snapshots = snapshots.map(|snapshot| (snapshot.id, snapshot.name.to_string())).collect();
        Some((volume.record.id, volume.record.name.to_string(), volume.record.role, snapshots))
    }

    fn create(&mut self, node: usize) -> Option<()> {
        let name = *VOLUMES.choose(&mut self.rng).unwrap();
        self.ask(node, Method::POST, "/v1/volumes", json!({ "name": name }), Then::Nothing)
    }

    fn write(&mut self, node: usize) -> Option<()> {
        let Some((id, name, Role::Primary, _)) = self.volume(node) else { return None };
        let file = format!("file-{}", self.rng.random_range(0..6));
        let length = self.rng.random_range(0..60_000);
        let contents: Vec<u8> = (0..length).map(|_| self.rng.random()).collect();
        let contents = (length > 2_000).then_some(&contents[..]);
        self.tell(&format!("{} writes {length} bytes into {name}/{file}", name_of(node)));
        self.watch.head_written(node, id);
        self.world.hosts[node].pool.write(id, &file, contents).then_some(())
    }

    fn snapshot(&mut self, node: usize) -> Option<()> {
        let (_, name, _, _) = self.volume(node)?;
        self.serial += 1;
        let path = format!("/v1/volumes/{name}/snapshots");
        let body = json!({ "name": format!("s{}", self.serial) });
        self.ask(node, Method::POST, &path, body, Then::Promise(name))
    }

    fn transfer(&mut self, node: usize) -> Option<()> {
        let peer = self.other(node);
        let policy = *POLICIES.choose(&mut self.rng).unwrap();
        let mut body = json!({ "peer": name_of(peer), "on_divergence": policy });
        if self.rng.random_bool(0.7) {
            let (_, name, _, snapshots) = self.volume(node)?;
            let (_, snapshot) = snapshots.last()?;
            body["snapshot"] = json!(snapshot);
            self.ask(node, Method::POST, &format!("/v1/volumes/{name}/push"), body, Then::Transfer)
        } else {
            let (_, name, _, _) = self.volume(peer)?;
            self.ask(node, Method::POST, &format!("/v1/volumes/{name}/pull"), body, Then::Transfer)
        }
    }

    fn clone(&mut self, node: usize) -> Option<()> {
        let (_, name, _, snapshots) = self.volume(node)?;
        let (_, snapshot) = snapshots.choose(&mut self.rng).cloned()?;
        self.serial += 1;
        let path = format!("/v1/volumes/{name}/snapshots/{snapshot}/clone");
        let body = json!({ "name": format!("clone-{}", self.serial) });
        self.ask(node, Method::POST, &path, body, Then::Nothing)
    }

    fn rollback(&mut self, node: usize) -> Option<()> {
        let (id, name, _, snapshots) = self.volume(node)?;
        let at = (!snapshots.is_empty()).then(|| self.rng.random_range(0..snapshots.len()))?;
        let mut body = json!({ "snapshot": snapshots[at].1 });
        let mut then = Then::Nothing;
        match self.rng.random_range(0..3) {
            0 => {}
            1 => {
                self.serial += 1;
                body["newer"] = json!({ "fork": format!("fork-{}", self.serial) });
            }
            _ => {
                // What arrives until it is done may go, too.
                self.watch.condemn_volume(&self.world, node, id);
                then = Then::Spare(id, name.clone());
                body["newer"] = json!("discard");
            }
        }
        self.ask(node, Method::POST, &format!("/v1/volumes/{name}/rollback"), body, then)
    }

    fn forget(&mut self, node: usize) -> Option<()> {
        let (_, name, _, snapshots) = self.volume(node)?;
        let (id, snapshot) = snapshots.choose(&mut self.rng).cloned()?;
        self.watch.condemn_snapshot(node, id);
        let path = format!("/v1/volumes/{name}/snapshots/{snapshot}");
        self.ask(node, Method::DELETE, &path, Value::Null, Then::Nothing)
    }

    fn destroy(&mut self, node: usize) -> Option<()> {
        let (id, name, _, _) = self.volume(node)?;
        self.watch.condemn_volume(&self.world, node, id);
        let path = format!("/v1/volumes/{name}");
        self.ask(node, Method::DELETE, &path, Value::Null, Then::Spare(id, name))
    }

    fn promote(&mut self, node: usize) -> Option<()> {
        let Some((_, name, Role::Replica, _)) = self.volume(node) else { return None };
        let body = json!({ "force": self.rng.random_bool(0.6) });
        self.ask(node, Method::POST, &format!("/v1/volumes/{name}/promote"), body, Then::Nothing)
    }

    fn hand_off(&mut self, node: usize) -> Option<()> {
        let peer = self.other(node);
        let Some((_, name, Role::Primary, _)) = self.volume(node) else { return None };
        let body = json!({ "peer": name_of(peer), "wait_ms": 500 });
        self.ask(node, Method::POST, &format!("/v1/volumes/{name}/handoff"), body, Then::Nothing)
    }

    fn mount(&mut self, node: usize) -> Option<()> {
        let volumes = self.world.look(node);
        let volume = volumes.choose(&mut self.rng)?;
        let verb = if volume.in_use { "unmount" } else { "mount" };
        let path = format!("/v1/volumes/{}/{verb}", volume.record.name);
        self.ask(node, Method::POST, &path, Value::Null, Then::Nothing)
    }

    fn cancel(&mut self, node: usize) -> Option<()> {
        let id = self.transfers.iter().rev().find(|(at, _)| *at == node)?.1.clone();
        self.ask(node, Method::POST, &format!("/v1/transfers/{id}/cancel"), Value::Null, Then::Nothing)
    }

    /// Something happens to the network, or to a pool's speed.
    fn weather(&mut self, node: usize) -> Option<()> {
        let other = self.other(node);
        let (a, b) = (self.world.ip(node), self.world.ip(other));
        let (from, to) = (name_of(node), name_of(other));
        match self.rng.random_range(0..8) {
            0 | 1 => {
                self.tell(&format!("the line between {from} and {to} is cut"));
                self.world.sim.partition(a, b);
            }
            2 => {
                self.tell(&format!("nothing comes from {from} to {to} any more"));
                self.world.sim.partition_oneway(a, b);
            }
            3 | 4 => {
                self.tell(&format!("the line between {from} and {to} is mended"));
                self.world.sim.repair(a, b);
            }
            5 => {
                let latency = self.rng.random_range(1..400);
                self.tell(&format!("the line between {from} and {to} takes up to {latency} ms"));
                let latency = std::time::Duration::from_millis(latency);
                self.world.sim.set_link_max_message_latency(a, b, latency);
            }
            6 => {
                let (lost_of, doubled_of) = (self.rng.random_range(0..20), self.rng.random_range(0..20));
                self.tell(&format!("one datagram of {lost_of} is lost, one of {doubled_of} comes twice"));
                let mut weather = self.world.weather.lock().unwrap();
                (weather.lost_of, weather.doubled_of) = (lost_of, doubled_of);
            }
            _ => {
                let slow = self.rng.random_bool(0.5);
                self.tell(&format!("the pool of {from} is {}", if slow { "slow" } else { "quick" }));
                self.world.fates.set_slow(node, slow);
            }
        }
        Some(())
    }

    /// The line is whole again, every node is up, and whatever was under way comes to its end.
    fn heal(&mut self) -> Result<(), String> {
        self.tell("everything heals");
        self.world.fates.relent();
        {
            let mut weather = self.world.weather.lock().unwrap();
            (weather.lost_of, weather.doubled_of) = (0, 0);
        }
        for a in 0..self.nodes {
            for b in 0..self.nodes {
                if a != b {
                    let (a, b) = (self.world.ip(a), self.world.ip(b));
                    self.world.sim.repair(a, b);
                    self.world.sim.set_link_max_message_latency(a, b, std::time::Duration::from_millis(30));
                }
            }
        }
        self.until("who is stopping has stopped", |it| (0..it.nodes).all(|node| !it.world.is_stopping(node)))?;
        for node in 0..self.nodes {
            if !self.world.hosts[node].up {
                self.world.start(node);
            }
        }
        self.until("all nodes are up", |it| (0..it.nodes).all(|node| it.world.is_ready(node)))?;
        self.until("every request is answered", |it| it.waiting.is_empty())?;
        for node in 0..self.nodes {
            self.all_final(node)?;
        }
        Ok(())
    }

    fn all_final(&mut self, node: usize) -> Result<(), String> {
        let mut open = Vec::new();
        for _ in 0..REST / 200 {
            let transfers = self.answer_of(node, Method::GET, "/v1/transfers", Value::Null)?;
            let is_open = |transfer: &&Value| matches!(transfer["state"].as_str(), Some("running" | "interrupted"));
            let all = transfers.as_array().cloned().unwrap_or_default();
            open = all.iter().filter(is_open).cloned().collect();
            if open.is_empty() {
                let done = all.iter().filter(|transfer| transfer["state"] == "done").count();
                self.report.transfers_done += done as u32;
                return Ok(());
            }
            self.pass(200)?;
        }
        Err(format!("{} has transfers that come to no end: {open:?}", name_of(node)))
    }

    /// Asks and waits for the answer.
    fn answer_of(&mut self, node: usize, method: Method, path: &str, body: Value) -> Result<Value, String> {
        let ticket = self.world.ask(node, method.clone(), path, body);
        for _ in 0..REST {
            if let Some((status, body)) = self.world.answer(node, ticket) {
                if status >= 400 {
                    return Err(format!("{} {method} {path} was answered with {status}: {body}", name_of(node)));
                }
                return Ok(body);
            }
            self.pass(1)?;
        }
        Err(format!("{} does not answer {method} {path}", name_of(node)))
    }

    /// Pushes and returns the transfer as it has ended.
    fn push_to_its_end(&mut self, node: usize, volume: &str, body: Value) -> Result<Value, String> {
        let started = self.answer_of(node, Method::POST, &format!("/v1/volumes/{volume}/push"), body)?;
        let id = started["id"].as_str().unwrap_or_default().to_owned();
        self.all_final(node)?;
        self.answer_of(node, Method::GET, &format!("/v1/transfers/{id}"), Value::Null)
    }

    /// Every volume can be brought to every other node, keeping whatever is there.
    fn converge(&mut self) -> Result<(), String> {
        for node in 0..self.nodes {
            for seen in self.world.look(node) {
                // A node that follows a newer primary takes away what had landed beside its volume, and its volume has another
                // tip then; what was its own is in another.
                let now = self.world.look(node).into_iter().find(|volume| volume.record.id == seen.record.id);
                let Some(volume) = now else { continue };
                let Some(tip) = volume.snapshots.last() else { continue };
                let peer = self.other(node);
                let name = volume.record.name.as_str();
                let body =
                    json!({ "peer": name_of(peer), "snapshot": tip.held.snapshot.name, "on_divergence": "fork" });
                self.tell(&format!("{} must be able to push {name}: {body}", name_of(node)));
                let mut ended = self.push_to_its_end(node, name, body.clone())?;
                if ended["problem"]["code"] == "peer_in_use" {
                    // Nothing is replaced underneath a user; once nobody uses it, it must go.
                    let mounted = ended["outcome"]["name"].as_str().unwrap_or(name).to_owned();
                    self.answer_of(peer, Method::POST, &format!("/v1/volumes/{mounted}/unmount"), Value::Null)?;
                    ended = self.push_to_its_end(node, name, body)?;
                }
                if ended["state"] != "done" {
                    return Err(format!("{} cannot push {name} to {}: {ended}", name_of(node), name_of(peer)));
                }
                // Who has had a snapshot and destroyed it has all that it led to.
                if ended["outcome"]["verdict"]["behind"].is_object() {
                    continue;
                }
                let wanted = tip.held.snapshot.id;
                let there = self.world.look(peer);
                let mut all = there.iter().flat_map(|volume| &volume.snapshots);
                if !all.any(|sight| sight.held.snapshot.id == wanted) {
                    return Err(format!(
                        "{} says it has pushed {wanted} to {}, where it is not: {ended}",
                        name_of(node),
                        name_of(peer)
                    ));
                }
            }
        }
        self.watch.check(&self.world)?;
        self.agree()
    }

    /// Of several primaries of a volume that share a snapshot, all but one step down once they have met.
    fn agree(&mut self) -> Result<(), String> {
        self.tell("all nodes start again, and nothing is mounted");
        for node in 0..self.nodes {
            for volume in self.world.look(node).into_iter().filter(|volume| volume.in_use) {
                let path = format!("/v1/volumes/{}/unmount", volume.record.name);
                self.answer_of(node, Method::POST, &path, Value::Null)?;
            }
        }
        for node in 0..self.nodes {
            self.world.crash(node);
            self.dead(node);
            self.world.start(node);
        }
        self.until("all nodes are up", |it| (0..it.nodes).all(|node| it.world.is_ready(node)))?;
        self.until("there is one primary of each history", |it| rivals(&it.world, it.nodes).is_none())
            .map_err(|why| format!("{why}: {}", rivals(&self.world, self.nodes).unwrap_or_default()))?;
        for node in 0..self.nodes {
            self.all_final(node)?;
        }
        self.watch.check(&self.world)
    }
}

/// Finds two primaries of a volume that have a snapshot of it in common.
fn rivals(world: &World, nodes: usize) -> Option<String> {
    let mut seen: Vec<(usize, VolumeSight)> = Vec::new();
    for node in 0..nodes {
        for volume in world.look(node).into_iter().filter(|volume| volume.record.role == Role::Primary) {
            let holds =
                |other: &VolumeSight, id: SnapshotId| other.snapshots.iter().any(|it| it.held.snapshot.id == id);
            let shares = |other: &VolumeSight| volume.snapshots.iter().any(|it| holds(other, it.held.snapshot.id));
            let rival = seen.iter().find(|(_, other)| other.record.id == volume.record.id && shares(other));
            if let Some((other, _)) = rival {
                return Some(format!("{} and {} both write {}", name_of(*other), name_of(node), volume.record.name));
            }
            seen.push((node, volume));
        }
    }
    None
}
