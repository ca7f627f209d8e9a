//! The situations that two nodes with copies of one volume can be in, on each kind of pool, and what each holds.

use std::{collections::BTreeMap, fs, io::Write as _};

use crate::{Cluster, Node, Options, Scratch, ZfsHost, invariants::histories, needs::require, scratch::FileSystem};

/// How large the file system of a btrfs pool is, in MiB.
const BTRFS_MEBIBYTES: u64 = 512;

/// What two nodes keep their volumes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pools {
    /// Folders, both.
    Directory,
    /// btrfs, both, each a file system of its own.
    Btrfs,
    /// ZFS, both, each on a host of its own.
    Zfs,
    /// btrfs, and ZFS: both have a native format, and only the portable one goes between them.
    BtrfsAndZfs,
}

impl Pools {
    /// Starts two nodes that grant each other everything; `None` where the machine lacks what they need.
    #[track_caller]
    pub fn cluster(self) -> Option<Cluster> {
        let scratch = Scratch::new();
        let btrfs = |name: &str| {
            let pool = scratch.mount(FileSystem::Btrfs, name, BTRFS_MEBIBYTES).join("pool");
            Options { pool: Some(format!("btrfs:{}", pool.display())), ..Options::default() }
        };
        let options = match self {
            Self::Directory => vec![Options::default(); 2],
            Self::Btrfs => require("btrfs").then(|| vec![btrfs("left"), btrfs("right")])?,
            Self::Zfs => ZfsHost::pair(&scratch)?.map(|host| host.options()).to_vec(),
            // The kernel of the test machine with OpenZFS has no btrfs.
            Self::BtrfsAndZfs if !require("btrfs") || !require("zfs-fuse") => return None,
            Self::BtrfsAndZfs => {
                let [host, _] = ZfsHost::pair(&scratch)?;
                vec![btrfs("left"), host.options()]
            }
        };
        let mut cluster = Cluster::with(scratch, options);
        for node in &mut cluster.nodes {
            node.stop();
            let mut config = fs::File::options().append(true).open(node.state.join("config.toml")).unwrap();
            let right = "\n[[rights]]\npeer = \"*\"\nvolumes = \"*\"\nverbs = [\"read\", \"push\", \"force\"]\n";
            config.write_all(right.as_bytes()).unwrap();
            node.start();
        }
        Some(cluster)
    }
}

/// How two nodes stand to each other. The first one sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Situation {
    /// Both hold the same.
    UpToDate,
    /// The sender has one more.
    FastForward,
    /// The sender has one more; the receiver took a snapshot, but changed nothing.
    Idle,
    /// The receiver has one more.
    Behind,
    /// Each has one of its own.
    Diverged,
    /// The sender has one more; the receiver's head was written to.
    Dirty,
    /// The receiver's volume of that name is another one.
    OtherVolume,
    /// The sender has one more, and has destroyed all that the receiver has.
    NothingInCommon,
    /// The sender has one more, and has destroyed the newest that the receiver has; an older one is common.
    PrunedHere,
    /// The sender has one more; the receiver has destroyed its newest; an older one is common.
    PrunedThere,
    /// Each has one of its own, and the sender has destroyed the newest that was common; an older one is common.
    PrunedApart,
    /// The receiver has one more, and has destroyed what the sender sends; an older one is common.
    PrunedBehind,
}
use Situation::*;

impl Situation {
    /// All of them.
    pub const ALL: [Self; 12] = [
        UpToDate,
        FastForward,
        Idle,
        Behind,
        Diverged,
        Dirty,
        OtherVolume,
        NothingInCommon,
        PrunedHere,
        PrunedThere,
        PrunedApart,
        PrunedBehind,
    ];
}

/// Writes into a volume's head.
#[track_caller]
pub fn write(node: &Node, volume: &str, contents: &str) {
    let mount = node.mount(volume);
    fs::write(mount.join("file"), contents).unwrap();
    node.cli(&["unmount", volume]).ok();
}

/// Takes a snapshot.
#[track_caller]
pub fn take(node: &Node, volume: &str, snapshot: &str) {
    node.cli(&["snapshot", &format!("{volume}@{snapshot}")]).ok();
}

/// Writes the name of a snapshot into a volume's head and takes it.
#[track_caller]
pub fn write_and_take(node: &Node, volume: &str, snapshot: &str) {
    write(node, volume, snapshot);
    take(node, volume, snapshot);
}

#[track_caller]
fn destroy(node: &Node, volume: &str, snapshot: &str) {
    node.cli(&["destroy", &format!("{volume}@{snapshot}")]).ok();
}

/// Makes the situation of a new volume; returns the snapshot that `a` sends.
#[track_caller]
pub fn arrange(a: &Node, b: &Node, volume: &str, situation: Situation) -> &'static str {
    let mount = a.create_mounted(volume);
    // Mounted once for all of them: a mount takes its time on some pools.
    let next = |snapshot: &str| {
        fs::write(mount.join("file"), snapshot).unwrap();
        take(a, volume, snapshot);
    };
    next("one");
    let want = match situation {
        OtherVolume => {
            b.cli(&["create", volume]).ok();
            write_and_take(b, volume, "other");
            "one"
        }
        _ => arrange_copies(a, b, volume, situation, &next),
    };
    a.cli(&["unmount", volume]).ok();
    want
}

/// The same where both have the volume: `next` writes on `a` and takes a snapshot.
fn arrange_copies(a: &Node, b: &Node, volume: &str, situation: Situation, next: &dyn Fn(&str)) -> &'static str {
    let is_pruned = matches!(situation, PrunedHere | PrunedThere | PrunedApart | PrunedBehind);
    if is_pruned {
        next("two");
    }
    a.push(&format!("{volume}@{}", if is_pruned { "two" } else { "one" }), "host-b");
    if matches!(situation, Idle | Behind | Diverged | Dirty | PrunedApart | PrunedBehind) {
        b.cli(&["promote", volume, "--force"]).ok();
    }
    match situation {
        UpToDate => "one",
        Behind => {
            write_and_take(b, volume, "newer");
            "one"
        }
        PrunedBehind => {
            write_and_take(b, volume, "newer");
            destroy(b, volume, "two");
            "two"
        }
        Diverged => {
            next("left");
            write_and_take(b, volume, "right");
            "left"
        }
        PrunedApart => {
            next("left");
            write_and_take(b, volume, "right");
            destroy(a, volume, "two");
            "left"
        }
        PrunedHere => {
            next("three");
            destroy(a, volume, "two");
            "three"
        }
        PrunedThere => {
            next("three");
            destroy(b, volume, "two");
            "three"
        }
        Idle => {
            take(b, volume, "idle");
            next("two");
            "two"
        }
        Dirty => {
            write(b, volume, "precious");
            next("two");
            "two"
        }
        NothingInCommon => {
            next("two");
            destroy(a, volume, "one");
            "two"
        }
        FastForward => {
            next("two");
            "two"
        }
        OtherVolume => unreachable!("arranged by the caller"),
    }
}

/// Returns what a node holds of a volume and its forks: each one's own snapshots and, behind `=`, what its head's file
/// says. Ids in the names of forks and of snapshots that the node took by itself are left out.
#[track_caller]
pub fn holdings(node: &Node, of: &str) -> BTreeMap<String, String> {
    let mut held = BTreeMap::new();
    for (volume, snapshots) in histories(node) {
        let name = volume.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
        if name.split('.').next() != Some(of) {
            continue;
        }
        let names: Vec<&str> =
            snapshots.iter().map(|name| if name.starts_with("before-") { "before" } else { name }).collect();
        let head = fs::read_to_string(node.mount_to_read(&volume).join("file")).unwrap();
        node.cli(&["unmount", &volume]).ok();
        let known = held.insert(name.clone(), format!("{} = {head}", names.join(" ")));
        assert!(known.is_none(), "{name} twice on {}", node.name);
    }
    held
}

/// Returns expected [`holdings`] of a volume, for which `*` stands.
pub fn told(expected: &[(&str, &str)], of: &str) -> BTreeMap<String, String> {
    let name = |name: &&str| name.replace('*', of);
    expected.iter().map(|(volume, held)| (name(volume), (*held).to_owned())).collect()
}
