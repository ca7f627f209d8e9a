//! The other contender: the programs of the file system itself, in a pipe.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use flocker_tests::{
    Options, SHORT, Scratch, ZfsHost,
    needs::program,
    node::free_address,
    scratch::{FileSystem, run},
    wait_until,
};

use crate::{ssh::Ssh, timed};

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

/// A volume kept by hand on the sender's pool, and the place it is sent to on the receiver's.
pub(crate) enum ByHand {
    /// A subvolume `head`, snapshots beside it; `received` on the other disk.
    Btrfs { sender: PathBuf, receiver: PathBuf },
    /// A dataset beside the node's, on each host.
    Zfs { sender: Arc<ZfsHost>, receiver: Arc<ZfsHost>, head: PathBuf, shim: PathBuf },
}

impl ByHand {
    /// Makes two pools; returns what is kept by hand on them and the options of a node on each.
    pub(crate) fn prepare(case: &str, scratch: &Scratch) -> (Self, Vec<Options>) {
        if case == "btrfs" {
            let disk = |name: &str| scratch.mount(FileSystem::Btrfs, name, DISK_MEBIBYTES);
            let (sender, receiver) = (disk("left"), disk("right"));
            let pool = |place: &Path| {
                let node = place.join("node");
                run(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(&node));
                Options { pool: Some(format!("btrfs:{}", node.display())), ..Options::default() }
            };
            let options = vec![pool(&sender), pool(&receiver)];
            run(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(sender.join("head")));
            std::fs::create_dir(receiver.join("received")).expect("make a folder");
            return (Self::Btrfs { sender, receiver }, options);
        }
        let [sender, receiver] = ZfsHost::pair(scratch).expect("ZFS is here");
        let options = vec![sender.options(), receiver.options()];
        let place = Path::new("/tmp").join(format!("flocker-bench-{}", std::process::id()));
        let mountpoint = format!("mountpoint={}", place.display());
        sender.zfs(&["create", "-o", "atime=off", "-o", &mountpoint, &dataset(&sender)]);
        let head = sender.seen(&place);
        let shim = scratch.folder("shim");
        let real = program("zfs").expect("zfs is here");
        std::fs::write(shim.join("zfs"), SHIM.replace("REAL", &real.display().to_string())).expect("write a script");
        run(Command::new("chmod").arg("755").arg(shim.join("zfs")));
        (Self::Zfs { sender, receiver, head, shim }, options)
    }

    /// What the table calls it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Btrfs { .. } => "btrfs send | zstd -1 | ssh | btrfs receive",
            Self::Zfs { sender, .. } if sender.is_fuse() => "zfs send | zstd -1 | ssh | zfs receive, by zfs-fuse",
            Self::Zfs { .. } => "zfs send | zstd -1 | ssh | zfs receive, by OpenZFS",
        }
    }

    /// Where its head is.
    pub(crate) fn head(&self) -> PathBuf {
        match self {
            Self::Btrfs { sender, .. } => sender.join("head"),
            Self::Zfs { head, .. } => head.clone(),
        }
    }

    /// Makes its head equal to another's.
    pub(crate) fn copy_head(&self, from: &Path) {
        run(Command::new("cp").arg("-a").arg(from.join(".")).arg(self.head()));
        run(&mut Command::new("sync"));
    }

    /// Takes a snapshot of its head.
    pub(crate) fn snapshot(&self, name: &str) {
        match self {
            Self::Btrfs { sender, .. } => {
                run(Command::new("btrfs")
                    .args(["-q", "subvolume", "snapshot", "-r"])
                    .arg(sender.join("head"))
                    .arg(sender.join(name)));
                run(Command::new("sync").arg("-f").arg(sender));
            }
            Self::Zfs { sender, .. } => drop(sender.zfs(&["snapshot", &format!("{}@{name}", dataset(sender))])),
        }
    }

    /// Sends a snapshot, whole or as the difference to another that is there.
    pub(crate) fn send(&self, ssh: &Ssh, base: Option<&str>, name: &str) -> Duration {
        let flags = match (self, base) {
            (_, None) => String::new(),
            (Self::Btrfs { sender, .. }, Some(base)) => format!("-p {}/{base} ", sender.display()),
            (Self::Zfs { .. }, Some(base)) => format!("-i @{base} "),
        };
        self.pipe(ssh, &flags, name)
    }

    /// Sends all snapshots, of which the first is there: by one stream on ZFS, by one for each on btrfs.
    pub(crate) fn send_all(&self, ssh: &Ssh, names: &[String]) -> Duration {
        match (self, names) {
            (Self::Zfs { .. }, [first, .., last]) => self.pipe(ssh, &format!("-I @{first} "), last),
            (_, names) => names.windows(2).map(|pair| self.send(ssh, Some(&pair[0]), &pair[1])).sum(),
        }
    }

    fn pipe(&self, ssh: &Ssh, flags: &str, name: &str) -> Duration {
        let remote = ssh.command_line("localhost");
        match self {
            Self::Btrfs { sender, receiver } => {
                let (from, to) = (sender.display(), receiver.display());
                timed(&format!(
                    "btrfs -q send {flags}{from}/{name} | zstd -q -1 | \
                     {remote} 'set -o pipefail; zstd -q -d | btrfs -q receive {to}/received && sync -f {to}'"
                ))
            }
            Self::Zfs { sender, receiver, .. } => {
                let (from, to) = (dataset(sender), dataset(receiver));
                let [send, receive] = [sender, receiver].map(|host| words(&host.command(Path::new("zfs"))));
                timed(&format!(
                    "{send} send {flags}{from}@{name} | zstd -q -1 | \
                     {remote} 'set -o pipefail; zstd -q -d | {receive} receive -u {to}'"
                ))
            }
        }
    }

    /// Tells whether syncoid is one of the contenders: it is there, and so is Perl.
    pub(crate) fn has_syncoid(&self) -> bool {
        matches!(self, Self::Zfs { sender, .. } if sender.is_fuse()) && program("syncoid").is_some()
    }

    /// Has syncoid bring the other side to the newest snapshot, as it comes (it compresses by lzop). `None` where it cannot.
    pub(crate) fn syncoid(&self, ssh: &Ssh) -> Option<Duration> {
        let Self::Zfs { sender, receiver, shim, .. } = self else { return None };
        let program = program("syncoid").filter(|_| self.has_syncoid())?;
        let (options, host) = ssh.syncoid_options();
        let started = Instant::now();
        run(sender
            .command(Path::new("env"))
            .arg(format!("PATH={}", path_with(shim)))
            .arg(&program)
            .args(["--no-sync-snap", "--no-resume", "--quiet"])
            .args(options)
            .arg(dataset(sender))
            .arg(format!("{host}:{}", dataset(receiver))));
        let took = started.elapsed();
        let listed = receiver.zfs(&["list", "-H", "-o", "name", "-t", "snapshot", "-r", &dataset(receiver)]);
        let newest =
            |listed: &str| listed.lines().last().and_then(|line| line.split_once('@')).map(|it| it.1.to_owned());
        let wanted = sender.zfs(&["list", "-H", "-o", "name", "-t", "snapshot", "-r", &dataset(sender)]);
        assert_eq!(newest(&listed), newest(&wanted), "syncoid ended well and sent nothing");
        Some(took)
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

    /// Takes away what was sent: these snapshots, in this order.
    pub(crate) fn forget<N: AsRef<str>>(&self, names: &[N]) {
        match self {
            Self::Btrfs { receiver, .. } => {
                let received = receiver.join("received");
                for name in names {
                    run(Command::new("btrfs").args(["-q", "subvolume", "delete"]).arg(received.join(name.as_ref())));
                }
                run(Command::new("btrfs").args(["-q", "subvolume", "sync"]).arg(receiver));
            }
            Self::Zfs { receiver, .. } => {
                let received = dataset(receiver);
                for name in names.iter().map(|name| format!("{received}@{}", name.as_ref())).chain([received.clone()]) {
                    // zfs-fuse is busy with it for a moment after the receive.
                    wait_until("what was sent is destroyed", SHORT, || {
                        let output = receiver.command(Path::new("zfs")).args(["destroy", &name]).output().ok()?;
                        output.status.success().then_some(())
                    });
                }
            }
        }
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        if let Self::Zfs { sender, head, .. } = self {
            // Outside a namespace of its own the mount would stay.
            let _ = sender.command(Path::new("zfs")).args(["destroy", "-r", &dataset(sender)]).status();
            let _ = std::fs::remove_dir(head);
        }
    }
}

/// Returns the search path with a folder before all others.
fn path_with(first: &Path) -> String {
    format!("{}:{}", first.display(), std::env::var("PATH").expect("a search path"))
}

/// The dataset beside the node's own.
fn dataset(host: &ZfsHost) -> String {
    format!("{}-by-hand", host.root())
}

fn words(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
