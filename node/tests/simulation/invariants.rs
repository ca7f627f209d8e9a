//! What must hold at every moment, whatever happens.
//!
//! | invariant | how it is seen |
//! |---|---|
//! | a snapshot's id means the same bytes everywhere, and no partial one is visible | all pools, against the first sight of the id on its host |
//! | nothing acknowledged is lost | the answers of the API against the pools |
//! | no snapshot goes unless somebody asked for it | each pool against its last sight |
//! | no head goes unless somebody asked for it | each head against its last sight: it is there, or a snapshot or another head has its bytes |
//! | a mounted volume is never replaced underneath its user | each head that is handed out for writing against its last sight |
//! | at most one primary per claim, and it is the node that the claim names | all pools |
//! | a node answers with no internal error and does not panic | the API's answers, the panic hook |

use std::collections::{BTreeMap, BTreeSet};

use flocker_storage::{
    drivers::memory::VolumeSight,
    model::{Claim, Role, SnapshotId, VolumeId},
};

use crate::world::World;

type Digest = [u8; 32];

/// What was seen last of one node's pool.
#[derive(Debug, Default)]
struct Sight {
    snapshots: BTreeMap<SnapshotId, VolumeId>,
    heads: BTreeMap<VolumeId, Digest>,
    /// Heads that programs have mounted for writing.
    in_use: BTreeSet<VolumeId>,
}

/// What somebody asked to be destroyed on one node.
#[derive(Debug, Default)]
struct Condemned {
    snapshots: BTreeSet<SnapshotId>,
    /// With all that is in them until that is done.
    volumes: BTreeSet<VolumeId>,
    /// What heads of such volumes held.
    heads: BTreeSet<Digest>,
}

impl Condemned {
    /// What is condemned may move into another volume before it goes.
    fn note(&mut self, volumes: &[VolumeSight]) {
        for volume in volumes.iter().filter(|volume| self.volumes.contains(&volume.record.id)) {
            self.snapshots.extend(volume.snapshots.iter().map(|sight| sight.held.snapshot.id));
            self.heads.insert(volume.head);
        }
    }
}

/// Watches over a world.
#[derive(Debug)]
pub(crate) struct Watch {
    bytes: BTreeMap<SnapshotId, (Digest, String)>,
    seen: Vec<Sight>,
    condemned: Vec<Condemned>,
    /// What each node has acknowledged to hold, and of which volume.
    promised: Vec<BTreeMap<SnapshotId, String>>,
    /// How many snapshots were ever seen.
    pub(crate) snapshots: usize,
}

fn complain(node: &str, what: &str) -> String {
    format!("{node}: {what}")
}

impl Watch {
    pub(crate) fn new(nodes: usize) -> Self {
        let each = || 0..nodes;
        Self {
            bytes: BTreeMap::new(),
            seen: each().map(|_| Sight::default()).collect(),
            condemned: each().map(|_| Condemned::default()).collect(),
            promised: each().map(|_| BTreeMap::new()).collect(),
            snapshots: 0,
        }
    }

    /// A node has said that it holds a snapshot of the volume that was asked for by a name.
    pub(crate) fn promise(&mut self, node: usize, snapshot: SnapshotId, volume: &str) {
        self.promised[node].insert(snapshot, volume.to_owned());
    }

    /// Somebody asks a node to destroy a snapshot.
    pub(crate) fn condemn_snapshot(&mut self, node: usize, snapshot: SnapshotId) {
        self.condemned[node].snapshots.insert(snapshot);
    }

    /// Somebody asks a node to destroy a volume with all it has, now or until that is done.
    pub(crate) fn condemn_volume(&mut self, world: &World, node: usize, volume: VolumeId) {
        self.condemned[node].volumes.insert(volume);
        self.condemned[node].note(&world.look(node));
    }

    /// That was answered, and looked at: what comes into the volume from now on must stay. What was acknowledged of it a moment
    /// before and went with it, perhaps without ever having been seen, is not waited for.
    pub(crate) fn spare_volume(&mut self, world: &World, node: usize, volume: VolumeId, name: &str) {
        let volumes = world.look(node);
        let held: BTreeSet<SnapshotId> =
            volumes.iter().flat_map(|volume| volume.snapshots.iter().map(|sight| sight.held.snapshot.id)).collect();
        self.promised[node].retain(|id, promised| promised != name || held.contains(id));
        self.condemned[node].volumes.remove(&volume);
    }

    /// A program has written to a head: what was there is gone by its own will.
    pub(crate) fn head_written(&mut self, node: usize, volume: VolumeId) {
        self.seen[node].heads.remove(&volume);
    }

    /// A node has died: what was written and not synced may be gone.
    pub(crate) fn died(&mut self, node: usize) {
        self.seen[node].heads.clear();
    }

    /// Looks at everything; says what does not hold.
    pub(crate) fn check(&mut self, world: &World) -> Result<(), String> {
        let pools: Vec<Vec<VolumeSight>> = (0..world.hosts.len()).map(|node| world.look(node)).collect();
        self.check_bytes(world, &pools)?;
        for (node, volumes) in pools.iter().enumerate() {
            let name = &world.hosts[node].name;
            self.check_kept(node, name, volumes)?;
            self.note(node, volumes);
        }
        self.check_primaries(world, &pools)
    }

    fn check_bytes(&mut self, world: &World, pools: &[Vec<VolumeSight>]) -> Result<(), String> {
        let all = || {
            pools.iter().enumerate().flat_map(|(node, volumes)| {
                volumes.iter().flat_map(move |volume| volume.snapshots.iter().map(move |sight| (node, sight)))
            })
        };
        // First where they were taken: that is what they mean.
        for at_home in [true, false] {
            for (node, sight) in all() {
                let (name, snapshot) = (&world.hosts[node].name, &sight.held.snapshot);
                if (snapshot.host.name.as_str() == name) != at_home {
                    continue;
                }
                let (digest, first) = self.bytes.entry(snapshot.id).or_insert_with(|| (sight.digest, name.clone()));
                if *digest != sight.digest {
                    let what = format!("snapshot {} ({}) is another one than on {first}", snapshot.id, snapshot.name);
                    return Err(complain(name, &what));
                }
            }
        }
        self.snapshots = self.bytes.len();
        Ok(())
    }

    fn check_kept(&self, node: usize, name: &str, volumes: &[VolumeSight]) -> Result<(), String> {
        let condemned = &self.condemned[node];
        let held: BTreeSet<SnapshotId> =
            volumes.iter().flat_map(|volume| volume.snapshots.iter().map(|sight| sight.held.snapshot.id)).collect();
        for (snapshot, volume) in &self.seen[node].snapshots {
            let asked = condemned.snapshots.contains(snapshot) || condemned.volumes.contains(volume);
            if !held.contains(snapshot) && !asked {
                return Err(complain(
                    name,
                    &format!("snapshot {snapshot} of volume {volume} is gone, and nobody asked"),
                ));
            }
        }
        let promised = self.promised[node].keys().filter(|id| !held.contains(id) && !condemned.snapshots.contains(id));
        // One that came into a condemned volume and went with it may never have been seen.
        let mut lost = promised.filter(|id| condemned.volumes.is_empty() || self.bytes.contains_key(id));
        if let Some(lost) = lost.next() {
            return Err(complain(name, &format!("snapshot {lost} was acknowledged and is not there")));
        }
        let bytes: BTreeSet<Digest> = volumes
            .iter()
            .flat_map(|volume| volume.snapshots.iter().map(|sight| sight.digest).chain([volume.head]))
            .collect();
        for volume in volumes.iter().filter(|it| it.in_use && self.seen[node].in_use.contains(&it.record.id)) {
            if self.seen[node].heads.get(&volume.record.id).is_some_and(|head| *head != volume.head) {
                return Err(complain(name, &format!("the mounted volume {} was replaced", volume.record.name)));
            }
        }
        for (volume, head) in &self.seen[node].heads {
            let asked = condemned.volumes.contains(volume) || condemned.heads.contains(head);
            if !bytes.contains(head) && !asked {
                return Err(complain(
                    name,
                    &format!("what the head of volume {volume} held is gone, and nobody asked"),
                ));
            }
        }
        Ok(())
    }

    fn note(&mut self, node: usize, volumes: &[VolumeSight]) {
        self.condemned[node].note(volumes);
        let sight = &mut self.seen[node];
        sight.snapshots = volumes
            .iter()
            .flat_map(|volume| volume.snapshots.iter().map(|it| (it.held.snapshot.id, volume.record.id)))
            .collect();
        // A replica's head is nobody's but its newest snapshot's.
        let heads = volumes.iter().filter(|volume| volume.record.role == Role::Primary);
        sight.in_use = volumes.iter().filter(|volume| volume.in_use).map(|volume| volume.record.id).collect();
        sight.heads = heads.map(|volume| (volume.record.id, volume.head)).collect();
    }

    fn check_primaries(&self, world: &World, pools: &[Vec<VolumeSight>]) -> Result<(), String> {
        let mut primaries: BTreeMap<(VolumeId, Claim), Vec<String>> = BTreeMap::new();
        for (node, volumes) in pools.iter().enumerate() {
            for VolumeSight { record, .. } in volumes {
                if record.role != Role::Primary {
                    continue;
                }
                let host = &world.hosts[node].name;
                let named = record.primary.as_ref().map(|host| host.name.as_str());
                if named != Some(host) {
                    return Err(format!("{host} writes {} as its primary, which is {named:?}", record.name));
                }
                primaries.entry((record.id, record.claim())).or_default().push(format!("{host} ({})", record.name));
            }
        }
        match primaries.into_iter().find(|(_, nodes)| nodes.len() > 1) {
            None => Ok(()),
            Some(((volume, claim), nodes)) => {
                Err(format!("volume {volume} has several primaries of {claim:?}: {}", nodes.join(", ")))
            }
        }
    }
}
