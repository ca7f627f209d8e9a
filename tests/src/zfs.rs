//! Hosts with ZFS: several on one machine, each with a pool of its own and what the daemon of a node sees of it.
//!
//! On an ordinary machine a host is a zfs-fuse daemon in a mount namespace of its own, where the daemon's fixed state
//! folders are empty. Nodes with [`Options::host`] run in that namespace; what is mounted there is seen from outside below
//! `/proc/PID/root` ([`ZfsHost::seen`]). The kernel kills zfs-fuse with the test and takes the mounts away with it.
//!
//! In the test machine (tests/vm), which has OpenZFS in its kernel, a host is a network namespace and a part of a pool;
//! all hosts share the mounts. `FLOCKER_TEST_OPENZFS=POOL,POOL` names the pools.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    needs::{program, require},
    node::Options,
    scratch::{Scratch, run},
    wait::{SHORT, wait_until},
};

/// Where zfs-fuse keeps its socket, its lock, its settings and the list of its pools (compiled in), and where a node mounts.
const STATE_FOLDERS: &str = "/run/zfs /run/lock/zfs /etc/zfs /var/lib/zfs /run/flocker";

/// How large the sparse file of a pool is, in MiB.
const POOL_MEBIBYTES: u64 = 8192;

/// The pools of a machine with OpenZFS in its kernel, one for each host.
const OPENZFS: &str = "FLOCKER_TEST_OPENZFS";

/// Where nodes of the test machine listen, in their own network namespaces.
const PORT: u16 = 7801;

/// A host with ZFS. Its processes and mounts are gone when it is dropped.
#[derive(Debug)]
pub struct ZfsHost {
    root: String,
    /// Holds the namespaces: zfs-fuse itself, or a process that waits.
    holder: Child,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fuse,
    /// With the address in its network namespace.
    OpenZfs(SocketAddr),
}

/// Tells whether this machine has OpenZFS in its kernel and pools for tests.
pub fn has_openzfs() -> bool {
    std::env::var_os(OPENZFS).is_some()
}

impl ZfsHost {
    /// Makes two hosts that reach each other, of whichever kind this machine has.
    #[track_caller]
    pub fn pair(scratch: &Scratch) -> Option<[Arc<Self>; 2]> {
        if let Ok(pools) = std::env::var(OPENZFS) {
            let (left, right) = pools.split_once(',').expect("two pools");
            return Some(openzfs_pair(left, right).map(Arc::new));
        }
        require("zfs-fuse").then(|| ["left", "right"].map(|name| Arc::new(Self::fuse(scratch, name))))
    }

    /// Starts zfs-fuse in a mount namespace of its own and makes the pool `tank` in a file.
    #[track_caller]
    fn fuse(scratch: &Scratch, name: &str) -> Self {
        let log = fs::File::create(scratch.path().join(format!("{name}.zfs-fuse.log"))).expect("make a log");
        let script = format!(
            "set -e; for folder in {STATE_FOLDERS}; do mkdir -p $folder; mount -t tmpfs none $folder; done
            exec zfs-fuse --no-daemon --no-kstat-mount --max-arc-size 64"
        );
        let holder = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "slave", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log)
            .spawn()
            .expect("start zfs-fuse");
        let host = Self { root: "tank/flocker".to_owned(), holder, kind: Kind::Fuse };
        wait_until("zfs-fuse answers", SHORT, || {
            let output = host.command(Path::new("zpool")).arg("list").output().expect("run zpool");
            (output.status.success() && String::from_utf8_lossy(&output.stdout).contains("no pools")).then_some(())
        });
        let image = scratch.image(&format!("{name}.zfs"), POOL_MEBIBYTES);
        run(host.command(Path::new("zpool")).args(["create", "-m", "none", "tank"]).arg(&image));
        host.zfs(&["create", &host.root]);
        host
    }

    /// Tells whether it is zfs-fuse, which has no resumable receives, bookmarks, encryption and much else.
    pub fn is_fuse(&self) -> bool {
        self.kind == Kind::Fuse
    }

    /// Returns the process that is its file system, where it is zfs-fuse.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// Returns the dataset that its node's pool is.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Returns the options of a node on it.
    pub fn options(self: &Arc<Self>) -> Options {
        let listen = match self.kind {
            Kind::Fuse => None,
            Kind::OpenZfs(address) => Some(address),
        };
        Options { pool: Some(format!("zfs:{}", self.root)), host: Some(Arc::clone(self)), listen, ..Options::default() }
    }

    /// Runs `zfs` on it, which must succeed, and returns what it prints.
    #[track_caller]
    pub fn zfs(&self, arguments: &[&str]) -> String {
        run(self.command(Path::new("zfs")).args(arguments))
    }

    /// Makes a call of a program that runs on it.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        let namespaces = Path::new("/proc").join(self.holder.id().to_string()).join("ns");
        match self.kind {
            Kind::Fuse => command.arg(format!("--mount={}", namespaces.join("mnt").display())),
            Kind::OpenZfs(_) => command.arg(format!("--net={}", namespaces.join("net").display())),
        };
        command.arg("--").arg(program);
        command
    }

    /// Returns where a path of the host is found by everybody.
    pub fn seen(&self, path: &Path) -> PathBuf {
        match self.kind {
            Kind::Fuse => {
                let root = Path::new("/proc").join(self.holder.id().to_string()).join("root");
                root.join(path.strip_prefix("/").expect("an absolute path"))
            }
            Kind::OpenZfs(_) => path.to_owned(),
        }
    }

    /// Limits what its node sends, in Mbit/s. Only in the test machine, where lines are the kernel's.
    #[track_caller]
    pub fn limit_line(&self, megabits: u32) {
        let rate = format!("{megabits}mbit");
        run(self
            .command(&ip_program("tc"))
            .args(["qdisc", "replace", "dev", "line", "root", "netem"])
            .args(["delay", "2ms", "rate", &rate, "limit", "2000"]));
    }

    /// Takes the limit away.
    #[track_caller]
    pub fn free_line(&self) {
        run(self.command(&ip_program("tc")).args(["qdisc", "del", "dev", "line", "root"]));
    }
}

impl Drop for ZfsHost {
    fn drop(&mut self) {
        // Its tidy end takes four seconds; nobody needs the pool any more.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Makes two network namespaces with a line between them, and a dataset in each of two pools.
fn openzfs_pair(left: &str, right: &str) -> [ZfsHost; 2] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("test{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst));
    let hosts = [(left, 1), (right, 2)].map(|(pool, number)| {
        let waiting = ["--pdeathsig", "KILL", "unshare", "--net", "sleep", "100000"];
        let holder = Command::new("setpriv").args(waiting).stdin(Stdio::null()).spawn().expect("make a namespace");
        let own = fs::read_link("/proc/self/ns/net").expect("a network namespace");
        wait_until("the namespace is there", SHORT, || {
            let its = fs::read_link(format!("/proc/{}/ns/net", holder.id())).ok()?;
            (its != own).then_some(())
        });
        let address = SocketAddr::from(([10, 8, 0, number], PORT));
        let host = ZfsHost { root: format!("{pool}/{name}"), holder, kind: Kind::OpenZfs(address) };
        host.zfs(&["create", "-o", "mountpoint=none", &host.root]);
        host
    });
    let [a, b] = hosts.each_ref().map(|host| host.holder.id().to_string());
    let ip = ip_program("ip");
    run(Command::new(&ip)
        .args(["link", "add", "line", "netns", &a, "type", "veth", "peer", "name", "line", "netns", &b]));
    for host in &hosts {
        let Kind::OpenZfs(address) = host.kind else { unreachable!("made above") };
        run(host.command(&ip).args(["address", "add", &format!("{}/24", address.ip()), "dev", "line"]));
        run(host.command(&ip).args(["link", "set", "line", "up"]));
        run(host.command(&ip).args(["link", "set", "lo", "up"]));
    }
    hosts
}

fn ip_program(name: &str) -> PathBuf {
    program(name).unwrap_or_else(|| panic!("the program {name} is not there"))
}
