//! Where the contenders meet: what the nodes' pools are, or what lies between the nodes.

use anyhow::ensure;
use clap::ValueEnum;
use flocker_tests::{Cluster, Options, Scratch, needs::require};

use crate::{
    Arguments,
    case::{Case, Kind},
    contender::{Contender, Flocker},
    copy::Copy,
    course::{self, Outcome},
    line,
    programs::{ByHand, Syncoid},
    rsync::Rsync,
    ssh::Ssh,
    tar::Tar,
    tls::Tls,
};

/// A ground.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ground {
    /// Directory pools, beside tar, rsync and TLS over TCP.
    Directory,
    /// btrfs pools, beside `btrfs send`. Needs root.
    Btrfs,
    /// ZFS pools, beside `zfs send` and syncoid. Needs root.
    Zfs,
    /// Directory pools at the ends of a long, lossy or narrow line. Needs root and TUN.
    Line,
}

impl Ground {
    /// Checks that this machine has what it takes.
    pub(crate) fn check(self) -> anyhow::Result<()> {
        let is_there = match self {
            Self::Directory => true,
            Self::Btrfs => require("btrfs"),
            Self::Zfs => flocker_tests::zfs::has_openzfs() || require("zfs-fuse"),
            Self::Line => require("tun"),
        };
        ensure!(is_there, "--grounds: {self:?} cannot be had here; leave it out");
        Ok(())
    }

    /// Returns its name in the document.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Btrfs => "btrfs",
            Self::Zfs => "zfs",
            Self::Line => "line",
        }
    }

    /// Lets all contenders run a case, with new nodes.
    pub(crate) fn compare(self, kind: Kind, arguments: &Arguments) -> Vec<Outcome> {
        let case = Case { kind, scale: arguments.scale, deltas: arguments.deltas };
        match self {
            Self::Directory => vec![in_directories(&case, arguments)],
            Self::Btrfs | Self::Zfs => vec![between_file_systems(self, &case, arguments)],
            Self::Line => line::compare(&case, arguments),
        }
    }
}

fn in_directories(case: &Case, arguments: &Arguments) -> Outcome {
    let scratch = Scratch::below(&arguments.dir);
    let (ssh, tls) = (Ssh::start(&scratch), Tls::new(&scratch));
    let mut cluster = Cluster::with(scratch, vec![Options::default(); 2]);
    let place = cluster.scratch.folder("others");
    let (a, b) = cluster.pair();
    let source = a.create_mounted("data");
    let mut contenders: Vec<Box<dyn Contender + '_>> = vec![
        Box::new(Flocker::new(a, b)),
        Box::new(Tar::over_ssh(&ssh, &source, &place)),
        Box::new(Rsync::new(&ssh, &source, &place)),
    ];
    if !case.has_base() {
        contenders.push(Box::new(Tar::over_tls(&tls, &source, &place)));
        contenders.push(Box::new(Copy::new(&source, &place)));
    }
    course::run(case, arguments.runs, std::slice::from_ref(&source), &mut contenders)
}

fn between_file_systems(ground: Ground, case: &Case, arguments: &Arguments) -> Outcome {
    let scratch = Scratch::below(&arguments.dir);
    let (by_hand, options) = ByHand::prepare(ground, &scratch);
    let ssh = by_hand.start_ssh(&scratch);
    let mut cluster = Cluster::with(scratch, options);
    let (a, b) = cluster.pair();
    let heads = [a.create_mounted("data"), by_hand.head()];
    let mut contenders: Vec<Box<dyn Contender + '_>> = vec![
        Box::new(Flocker::on(a, b, by_hand.systems())),
        Box::new(by_hand.over_ssh(&ssh)),
        Box::new(by_hand.bare()),
    ];
    contenders.extend(Syncoid::find(&by_hand, &ssh).map(|syncoid| Box::new(syncoid) as Box<dyn Contender>));
    course::run(case, arguments.runs, &heads, &mut contenders)
}
