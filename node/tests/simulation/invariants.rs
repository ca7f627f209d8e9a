//! What must hold at every moment, whatever happens.
//!
//! | invariant | how it is seen |
//! |---|---|
//! | a snapshot's id means the same bytes everywhere, and no partial one is visible | all pools, against the first sight of the id on its host |
//! | nothing acknowledged is lost | the answers of the API against the pools |
//! | no snapshot goes unless somebody asked for it | each pool against its last sight |
//! | no head goes unless somebody asked for it | each head against its last sight: it is there, or a snapshot or another head has its bytes |
//! | at most one primary per epoch | all pools |
//! | a node answers with no internal error and does not panic | the API's answers, the panic hook |

use std::collections::{BTreeMap, BTreeSet};

use flocker_storage::{
    drivers::memory::VolumeSight,
    model::{Role, SnapshotId, VolumeId},
};

use crate::world::World;

type Digest = [u8; 32];

/// What was seen last of one node's pool.
#[derive(Debug, Default)]
struct Sight {
    snapshots: BTreeMap<SnapshotId, VolumeId>,
    heads: BTreeMap<VolumeId, Digest>,
}

/// What somebody asked to be destroyed on one node.
#[derive(Debug, Default)]
struct Condemned {
    snapshots: BTreeSet<SnapshotId>,
    volumes: BTreeSet<VolumeId>,
    heads: BTreeSet<VolumeId>,
}

/// Watches over a world.
#[derive(Debug)]
pub(crate) struct Watch {
    bytes: BTreeMap<SnapshotId, (Digest, String)>,
    seen: Vec<Sight>,
    condemned: Vec<Condemned>,
    /// What each node has acknowledged to hold.
    promised: Vec<BTreeSet<SnapshotId>>,
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
            promised: each().map(|_| BTreeSet::new()).collect(),
            snapshots: 0,
        }
    }

    /// A node has said that it holds a snapshot.
    pub(crate) fn promise(&mut self, node: usize, snapshot: SnapshotId) {
        self.promised[node].insert(snapshot);
    }

    /// Somebody asks a node to destroy a snapshot.
    pub(crate) fn condemn_snapshot(&mut self, node: usize, snapshot: SnapshotId) {
        self.condemned[node].snapshots.insert(snapshot);
    }

    /// Somebody asks a node to destroy a volume with all it has, now or until that is done.
    pub(crate) fn condemn_volume(&mut self, node: usize, volume: VolumeId) {
        self.condemned[node].volumes.insert(volume);
    }

    /// Somebody asks a node to throw the head of a volume away.
    pub(crate) fn condemn_head(&mut self, node: usize, volume: VolumeId) {
        self.condemned[node].heads.insert(volume);
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
        check_primaries(world, &pools)
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

    fn check_kept(&mut self, node: usize, name: &str, volumes: &[VolumeSight]) -> Result<(), String> {
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
            if !held.contains(snapshot) {
                self.promised[node].remove(snapshot);
            }
        }
        if let Some(lost) =
            self.promised[node].iter().find(|id| !held.contains(id) && !condemned.snapshots.contains(id))
            && !self.was_in_condemned_volume(node, *lost)
        {
            return Err(complain(name, &format!("snapshot {lost} was acknowledged and is not there")));
        }
        let bytes: BTreeSet<Digest> = volumes
            .iter()
            .flat_map(|volume| volume.snapshots.iter().map(|sight| sight.digest).chain([volume.head]))
            .collect();
        for (volume, head) in &self.seen[node].heads {
            let asked = condemned.volumes.contains(volume) || condemned.heads.contains(volume);
            if !bytes.contains(head) && !asked {
                return Err(complain(
                    name,
                    &format!("what the head of volume {volume} held is gone, and nobody asked"),
                ));
            }
        }
        Ok(())
    }

    fn was_in_condemned_volume(&self, node: usize, snapshot: SnapshotId) -> bool {
        let volume = self.seen[node].snapshots.get(&snapshot);
        volume.is_none_or(|volume| self.condemned[node].volumes.contains(volume))
            && !self.condemned[node].volumes.is_empty()
    }

    fn note(&mut self, node: usize, volumes: &[VolumeSight]) {
        let sight = &mut self.seen[node];
        sight.snapshots = volumes
            .iter()
            .flat_map(|volume| volume.snapshots.iter().map(|it| (it.held.snapshot.id, volume.record.id)))
            .collect();
        // A replica's head is nobody's but its newest snapshot's.
        let heads = volumes.iter().filter(|volume| volume.record.role == Role::Primary);
        sight.heads = heads.map(|volume| (volume.record.id, volume.head)).collect();
    }
}

fn check_primaries(world: &World, pools: &[Vec<VolumeSight>]) -> Result<(), String> {
    let mut primaries: BTreeMap<(VolumeId, u64), Vec<String>> = BTreeMap::new();
    for (node, volumes) in pools.iter().enumerate() {
        for volume in volumes.iter().filter(|volume| volume.record.role == Role::Primary) {
            let key = (volume.record.id, volume.record.epoch);
            primaries.entry(key).or_default().push(format!("{} ({})", world.hosts[node].name, volume.record.name));
        }
    }
    match primaries.into_iter().find(|(_, nodes)| nodes.len() > 1) {
        None => Ok(()),
        Some(((volume, epoch), nodes)) => {
            Err(format!("volume {volume} has several primaries of epoch {epoch}: {}", nodes.join(", ")))
        }
    }
}
