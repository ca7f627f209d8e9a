//! The programs of the file systems themselves, in a pipe to another host and in one that leads to no other host; and syncoid.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use flocker_tests::{
    Options, SHORT, Scratch, ZfsHost,
    needs::program,
    node::free_address,
    scratch::{FileSystem, run},
    wait_until,
};

use crate::{
    account::Counted,
    contender::{Contender, Role},
    ground::Ground,
    ssh::Ssh,
    tar::bash,
};

/// How large the file systems in files are, in MiB.
const DISK_MEBIBYTES: u64 = 12 * 1024;

/// The `zfs` that syncoid finds: zfs-fuse knows no `get -t`, and what syncoid does then (2.1.0) fails where the other side is remote.
const SHIM: &str = r#"#!/bin/sh
if [ "$1 $2 $3 $4 $5" = "get -Hpd 1 -t snapshot" ]; then
    REAL get -Hpd 1 "$6" "$7" | grep @
else
    exec REAL "$@"
fi
"#;

/// A volume kept by hand on the sender's pool, beside the node's own.
pub(crate) enum ByHand {
    /// A subvolume `head` on one disk, with its snapshots beside it; the other disk.
    Btrfs { sender: PathBuf, receiver: PathBuf },
    /// A dataset on one of two hosts, where its head is mounted, and the folder with the `zfs` for syncoid.
    Zfs { sender: Arc<ZfsHost>, receiver: Arc<ZfsHost>, head: PathBuf, shim: PathBuf },
}

impl ByHand {
    /// Makes two pools; returns what is kept by hand on them and the options of a node on each.
    pub(crate) fn prepare(ground: Ground, scratch: &Scratch) -> (Self, Vec<Options>) {
        if ground == Ground::Btrfs {
            let disk = |name: &str| scratch.mount(FileSystem::Btrfs, name, DISK_MEBIBYTES);
            let (sender, receiver) = (disk("left"), disk("right"));
            let pool = |place: &Path| {
                let node = place.join("node");
                run(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(&node));
                Options { pool: Some(format!("btrfs:{}", node.display())), ..Options::default() }
            };
            let options = vec![pool(&sender), pool(&receiver)];
            run(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(sender.join("head")));
            return (Self::Btrfs { sender, receiver }, options);
        }
        let [sender, receiver] = ZfsHost::pair(scratch).expect("ZFS is here");
        let options = vec![sender.options(), receiver.options()];
        let place = scratch.path().join("head");
        let mountpoint = format!("mountpoint={}", place.display());
        sender.zfs(&["create", "-o", "atime=off", "-o", &mountpoint, &kept(&sender)]);
        let head = sender.seen(&place);
        let shim = scratch.folder("shim");
        let real = program("zfs").expect("zfs is here");
        fs::write(shim.join("zfs"), SHIM.replace("REAL", &real.display().to_string())).expect("write a script");
        run(Command::new("chmod").arg("755").arg(shim.join("zfs")));
        (Self::Zfs { sender, receiver, head, shim }, options)
    }

    /// Returns where its head is.
    pub(crate) fn head(&self) -> PathBuf {
        match self {
            Self::Btrfs { sender, .. } => sender.join("head"),
            Self::Zfs { head, .. } => head.clone(),
        }
    }

    /// Returns the processes that are file systems.
    pub(crate) fn systems(&self) -> Vec<u32> {
        match self {
            Self::Zfs { sender, receiver, .. } if sender.is_fuse() => {
                [sender, receiver].map(|host| host.pid()).to_vec()
            }
            _ => Vec::new(),
        }
    }

    /// `… send | zstd -1 | ssh | … receive`. Takes the snapshots for all that send by hand.
    pub(crate) fn over_ssh<'a>(&'a self, ssh: &'a Ssh) -> Sending<'a> {
        Sending::new(self, "hand", Some(ssh))
    }

    /// `… send | … receive` and nothing else: what the programs take of the time.
    pub(crate) fn bare(&self) -> Sending<'_> {
        Sending::new(self, "bare", None)
    }

    /// Starts an ssh server that finds the receiver's programs.
    pub(crate) fn start_ssh(&self, scratch: &Scratch) -> Ssh {
        match self {
            Self::Zfs { receiver, shim, .. } if receiver.is_fuse() => {
                let path = format!("SetEnv=PATH={}", path_with(shim));
                Ssh::start_at(scratch, free_address(), |program| {
                    let mut server = receiver.command(program);
                    server.args(["-o", &path]);
                    server
                })
            }
            _ => Ssh::start(scratch),
        }
    }

    fn take(&self, snapshot: &str) {
        match self {
            Self::Btrfs { sender, .. } => {
                run(Command::new("btrfs")
                    .args(["-q", "subvolume", "snapshot", "-r"])
                    .arg(sender.join("head"))
                    .arg(sender.join(snapshot)));
                run(Command::new("sync").arg("-f").arg(sender));
            }
            Self::Zfs { sender, .. } => drop(sender.zfs(&["snapshot", &format!("{}@{snapshot}", kept(sender))])),
        }
    }

    /// The programs that send what leads from one snapshot to others, one after the other: one stream on ZFS, one for each on btrfs.
    fn senders(&self, base: Option<&str>, snapshots: &[String]) -> Vec<String> {
        match self {
            Self::Btrfs { sender, .. } => {
                let from = sender.display();
                let bases = std::iter::once(base).chain(snapshots.iter().map(|name| Some(name.as_str())));
                let send = |(snapshot, base): (&String, Option<&str>)| {
                    let flags = base.map(|base| format!("-p {from}/{base} ")).unwrap_or_default();
                    format!("btrfs -q send {flags}{from}/{snapshot}")
                };
                snapshots.iter().zip(bases).map(send).collect()
            }
            Self::Zfs { sender, .. } => {
                let flags = match (base, snapshots.len()) {
                    (None, _) => String::new(),
                    (Some(base), 1) => format!("-i @{base} "),
                    (Some(base), _) => format!("-I @{base} "),
                };
                let last = snapshots.last().map_or("", String::as_str);
                vec![format!("{} send {flags}{}@{last}", words(&sender.command(Path::new("zfs"))), kept(sender))]
            }
        }
    }

    /// The program that receives into a place.
    fn receiving(&self, place: &str) -> String {
        match self {
            Self::Btrfs { receiver, .. } => {
                let to = receiver.display();
                format!("btrfs -q receive {to}/{place} && sync -f {to}")
            }
            Self::Zfs { receiver, .. } => {
                format!("{} receive -u {}", words(&receiver.command(Path::new("zfs"))), at(receiver, place))
            }
        }
    }

    /// Makes a place where something can be received.
    fn make(&self, place: &str) {
        if let Self::Btrfs { receiver, .. } = self {
            fs::create_dir(receiver.join(place)).expect("make a folder");
        }
    }

    /// Takes a place away, with all that was received into it.
    fn destroy(&self, place: &str) {
        match self {
            Self::Btrfs { receiver, .. } => {
                let place = receiver.join(place);
                for received in fs::read_dir(&place).expect("list what was received").flatten() {
                    run(Command::new("btrfs").args(["-q", "subvolume", "delete"]).arg(received.path()));
                }
                fs::remove_dir(place).expect("remove a folder");
                // Pokes the kernel's thread that frees what was deleted; by itself it wakes every 30 s.
                run(Command::new("btrfs").args(["-q", "filesystem", "sync"]).arg(receiver));
                run(Command::new("btrfs").args(["-q", "subvolume", "sync"]).arg(receiver));
            }
            Self::Zfs { receiver, .. } => {
                // zfs-fuse is busy with it for a moment after the receive.
                wait_until("what was sent is destroyed", SHORT, || {
                    let mut destroy = receiver.command(Path::new("zfs"));
                    destroy.args(["destroy", "-r", &at(receiver, place)]).output().ok()?.status.success().then_some(())
                });
            }
        }
    }

    fn arrived(&self, place: &str, snapshot: &str) -> Option<PathBuf> {
        match self {
            Self::Btrfs { receiver, .. } => Some(receiver.join(place).join(snapshot)),
            Self::Zfs { receiver, .. } => {
                // What has no mountpoint is mounted once it gets one (zfs-set(8)).
                let name = at(receiver, place);
                let seen = Path::new("/run/flocker").join(place);
                receiver.zfs(&["set", "readonly=on", &name]);
                receiver.zfs(&["set", &format!("mountpoint={}", seen.display()), &name]);
                Some(receiver.seen(&seen))
            }
        }
    }
}

/// One pipe of programs.
pub(crate) struct Sending<'a> {
    hand: &'a ByHand,
    place: &'static str,
    /// `None`: from one pool of this machine to the other, as it is.
    ssh: Option<&'a Ssh>,
    last: String,
}

impl<'a> Sending<'a> {
    fn new(hand: &'a ByHand, place: &'static str, ssh: Option<&'a Ssh>) -> Self {
        Self { hand, place, ssh, last: String::new() }
    }

    fn through(&self, sender: &str) -> String {
        let receiving = self.hand.receiving(self.place);
        match self.ssh.map(|ssh| ssh.command_line("localhost")) {
            Some(client) => format!("{sender} | zstd -q -1 | {client} 'set -o pipefail; zstd -q -d | {receiving}'"),
            None => format!("{sender} | {{ {receiving}; }}"),
        }
    }
}

impl Contender for Sending<'_> {
    fn title(&self) -> String {
        let program = match self.hand {
            ByHand::Btrfs { .. } => "btrfs",
            ByHand::Zfs { .. } => "zfs",
        };
        match self.ssh {
            Some(_) => format!("{program} send, zstd -1, ssh, {program} receive"),
            None => format!("{program} send, {program} receive: no other host"),
        }
    }

    fn counted(&self) -> Counted {
        Counted { daemons: None, server: self.ssh.map(Ssh::pid), systems: self.hand.systems() }
    }

    fn take(&mut self, snapshot: &str, _role: Role) {
        if self.ssh.is_some() {
            self.hand.take(snapshot);
        }
    }

    fn prepare(&mut self, base: Option<&str>) {
        self.hand.make(self.place);
        if let Some(base) = base {
            self.send(None, &[base.to_owned()]);
        }
    }

    fn send(&mut self, base: Option<&str>, snapshots: &[String]) -> Option<u64> {
        for sender in self.hand.senders(base, snapshots) {
            bash(&self.through(&sender));
        }
        snapshots.last()?.clone_into(&mut self.last);
        None
    }

    fn weigh(&mut self, base: Option<&str>, snapshots: &[String]) -> Option<u64> {
        let zstd = if self.ssh.is_some() { " | zstd -q -1" } else { return None };
        let senders = self.hand.senders(base, snapshots);
        Some(
            senders
                .iter()
                .filter_map(|sender| bash(&format!("{sender}{zstd} | wc -c")).trim().parse::<u64>().ok())
                .sum(),
        )
    }

    fn arrived(&mut self) -> Option<PathBuf> {
        self.hand.arrived(self.place, &self.last)
    }

    fn clean(&mut self) {
        self.hand.destroy(self.place);
    }
}

/// syncoid as it comes, which compresses by lzop. It sends what the pipe over ssh has taken the snapshots of.
pub(crate) struct Syncoid<'a> {
    hand: &'a ByHand,
    sender: &'a ZfsHost,
    receiver: &'a ZfsHost,
    shim: &'a Path,
    ssh: &'a Ssh,
    program: PathBuf,
}

const SYNCOID: &str = "syncoid";

impl<'a> Syncoid<'a> {
    /// Returns it where it is installed and there is ZFS.
    pub(crate) fn find(hand: &'a ByHand, ssh: &'a Ssh) -> Option<Self> {
        let ByHand::Zfs { sender, receiver, shim, .. } = hand else { return None };
        let program = program(SYNCOID)?;
        Some(Self { hand, sender, receiver, shim, ssh, program })
    }
}

impl Contender for Syncoid<'_> {
    fn title(&self) -> String {
        SYNCOID.to_owned()
    }

    fn counted(&self) -> Counted {
        Counted { daemons: None, server: Some(self.ssh.pid()), systems: self.hand.systems() }
    }

    fn prepare(&mut self, base: Option<&str>) {
        if let Some(base) = base {
            Sending::new(self.hand, SYNCOID, None).send(None, &[base.to_owned()]);
        }
    }

    fn send(&mut self, _base: Option<&str>, snapshots: &[String]) -> Option<u64> {
        let (options, host) = self.ssh.syncoid_options();
        run(self
            .sender
            .command(Path::new("env"))
            .arg(format!("PATH={}", path_with(self.shim)))
            .arg(&self.program)
            .args(["--no-sync-snap", "--no-resume", "--quiet"])
            .args(options)
            .arg(kept(self.sender))
            .arg(format!("{host}:{}", at(self.receiver, SYNCOID))));
        let wanted = format!("{}@{}", at(self.receiver, SYNCOID), snapshots.last()?);
        // It ends well where it has sent nothing, too.
        self.receiver.zfs(&["list", "-t", "snapshot", &wanted]);
        None
    }

    fn arrived(&mut self) -> Option<PathBuf> {
        self.hand.arrived(SYNCOID, "")
    }

    fn clean(&mut self) {
        self.hand.destroy(SYNCOID);
    }
}

/// Returns the search path with a folder before all others.
fn path_with(first: &Path) -> String {
    format!("{}:{}", first.display(), std::env::var("PATH").expect("a search path"))
}

/// The dataset that is kept by hand, beside the node's own.
fn kept(host: &ZfsHost) -> String {
    at(host, "kept")
}

fn at(host: &ZfsHost, place: &str) -> String {
    format!("{}-{place}", host.root())
}

fn words(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
