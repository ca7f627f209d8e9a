//! One node: a state folder, a daemon that can be started, stopped and killed, and its command line.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    os::unix::fs::{OpenOptionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use serde_json::Value;

use crate::{
    command::{self, Output, Running, clean, flocker_binary},
    http::{self, Answer},
    line::End,
    needs,
    scratch::Scratch,
    wait::{LONG, SHORT, wait_until},
    zfs::ZfsHost,
};

/// How a node is made.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Its pool; the default one when left out.
    pub pool: Option<String>,
    /// What it tells its peers; where it listens when left out.
    pub advertise: Option<SocketAddr>,
    /// Where it listens; a free port of 127.0.0.1 when left out.
    pub listen: Option<SocketAddr>,
    /// The user it runs as; the test's own when left out. Needs root and setpriv.
    pub user: Option<&'static str>,
    /// The host with ZFS that it runs on; the machine itself when left out.
    pub host: Option<Arc<ZfsHost>>,
    /// The end of a line that it runs at; the machine's own network when left out.
    pub end: Option<Arc<End>>,
}

/// One node. Its daemon is killed when it is dropped.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its state folder.
    pub state: PathBuf,
    /// What its daemon prints, over all starts.
    pub log: PathBuf,
    /// Where it listens for peers, over all starts.
    pub listen: SocketAddr,
    /// The fault point that its next starts have, or several, between commas.
    pub fault: Option<String>,
    /// How much its next start logs, as in `FLOCKER_LOG`; the usual when left out.
    pub log_filter: Option<String>,
    /// Further arguments of its next starts.
    pub start_arguments: Vec<String>,
    options: Options,
    binary: PathBuf,
    daemon: Option<Child>,
}

impl Node {
    /// Makes the first node of a cluster, not started.
    #[track_caller]
    pub fn init(scratch: &Scratch, name: &str, options: Options) -> Self {
        let node = Self::new(scratch, name, options);
        node.cli(&node.setup_arguments(&["init"])).ok();
        node
    }

    /// Makes a node that joins another's cluster, not started.
    #[track_caller]
    pub fn join(scratch: &Scratch, name: &str, options: Options, member: &Node) -> Self {
        let node = Self::new(scratch, name, options);
        node.cli(&node.setup_arguments(&["join", &member.token()])).ok();
        node
    }

    /// Makes a node with neither `init` nor `join`.
    pub fn new(scratch: &Scratch, name: &str, options: Options) -> Self {
        let state = scratch.folder(name);
        let mut binary = flocker_binary();
        if let Some(user) = options.user {
            let (uid, gid) = needs::user(user).expect("the user is there");
            chown(&state, Some(uid), Some(gid)).expect("give the state folder away");
            // The build's folder may be closed to other users.
            let copy = scratch.path().join("flocker");
            if !copy.exists() {
                fs::copy(&binary, &copy).expect("copy the binary");
            }
            binary = copy;
        }
        let listen = options.listen.unwrap_or_else(free_address);
        let log = scratch.path().join(format!("{name}.log"));
        Self {
            name: name.to_owned(),
            state,
            log,
            listen,
            fault: None,
            log_filter: None,
            start_arguments: Vec::new(),
            options,
            binary,
            daemon: None,
        }
    }

    /// Returns the arguments of `init` or `join` for this node.
    pub fn setup_arguments(&self, verb: &[&str]) -> Vec<String> {
        let mut arguments: Vec<String> = verb.iter().map(|word| (*word).to_owned()).collect();
        arguments.extend(["--name".to_owned(), self.name.clone(), "--listen".to_owned(), self.listen.to_string()]);
        if let Some(pool) = &self.options.pool {
            arguments.extend(["--pool".to_owned(), pool.clone()]);
        }
        if let Some(address) = self.options.advertise {
            arguments.extend(["--advertise".to_owned(), address.to_string()]);
        }
        arguments
    }

    /// Creates a join token.
    #[track_caller]
    pub fn token(&self) -> String {
        self.cli(&["token", "create"]).ok().json()["token"].as_str().expect("a token is a text").to_owned()
    }

    /// Waits until it knows where a peer is.
    #[track_caller]
    pub fn wait_knows(&self, peer: &str) {
        wait_until(&format!("{} knows where {peer} is", self.name), SHORT, || {
            let peers = self.http("GET", "/v1/peers", None).is(200).json();
            let found = peers.as_array()?.iter().find(|known| known["name"] == peer)?.clone();
            found["addresses"].as_array().filter(|addresses| !addresses.is_empty()).map(|_| ())
        });
    }

    /// Starts the daemon and waits until it is ready.
    #[track_caller]
    pub fn start(&mut self) {
        if let Some(status) = self.start_or_die() {
            panic!("the daemon of {} ended with {status} instead of getting ready:\n{}", self.name, self.log_tail());
        }
    }

    /// The same, unless the daemon ends before: then how it did.
    #[track_caller]
    pub fn start_or_die(&mut self) -> Option<ExitStatus> {
        self.spawn();
        let mut ended = None;
        wait_until(&format!("{} is ready", self.name), SHORT, || {
            let daemon = self.daemon.as_mut().expect("just started");
            if let Ok(Some(status)) = daemon.try_wait() {
                ended = Some(status);
                return Some(());
            }
            let socket = self.socket();
            http::try_request(&socket, "GET", "/readyz", None).filter(|answer| answer.status == 200).map(|_| ())
        });
        if ended.is_some() {
            self.daemon = None;
        }
        ended
    }

    /// Starts the daemon and returns at once.
    #[track_caller]
    pub fn spawn(&mut self) {
        assert!(self.daemon.is_none(), "{} runs already", self.name);
        let log = fs::File::options().create(true).append(true).mode(0o666).open(&self.log).expect("open the log");
        let mut command = self.command();
        command.args(["node", "start", "--listen", &self.listen.to_string()]).args(&self.start_arguments);
        if let Some(fault) = &self.fault {
            command.env("FLOCKER_FAULT", fault);
        }
        if let Some(filter) = &self.log_filter {
            command.env("FLOCKER_LOG", filter);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("share the log")).stderr(log);
        self.daemon = Some(command.spawn().expect("start the daemon"));
    }

    /// Waits until the daemon has ended by itself and returns its exit code (128 + signal).
    #[track_caller]
    pub fn wait_end(&mut self) -> i32 {
        let mut daemon = self.daemon.take().expect("a started daemon");
        let name = &self.name;
        let status = wait_until(&format!("{name} ends"), SHORT, || daemon.try_wait().expect("wait for the daemon"));
        command::code_of(status)
    }

    /// Tells whether the daemon has ended by itself.
    pub fn is_dead(&mut self) -> bool {
        self.daemon.as_mut().is_none_or(|daemon| matches!(daemon.try_wait(), Ok(Some(_))))
    }

    /// Kills the daemon as a power cut of the process would: SIGKILL.
    pub fn kill9(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Asks the daemon to end and waits for it.
    #[track_caller]
    pub fn stop(&mut self) {
        let daemon = self.daemon.as_ref().expect("a started daemon");
        let pid = rustix::process::Pid::from_child(daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signal the daemon");
        let code = self.wait_end();
        assert_eq!(code, 0, "the daemon of {} ends cleanly on SIGTERM:\n{}", self.name, self.log_tail());
    }

    /// Lets the daemon do nothing at all while something else is looked at; what it sends and is sent waits.
    #[track_caller]
    pub fn frozen<T>(&self, meanwhile: impl FnOnce() -> T) -> T {
        let pid = rustix::process::Pid::from_child(self.daemon.as_ref().expect("a started daemon"));
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("freeze the daemon");
        let seen = meanwhile();
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).expect("thaw the daemon");
        seen
    }

    /// Kills the daemon and starts it again.
    #[track_caller]
    pub fn restart_after_kill(&mut self) {
        self.kill9();
        self.start();
    }

    /// Returns the daemon's process id.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("a started daemon").id()
    }

    /// Returns the API's socket.
    pub fn socket(&self) -> PathBuf {
        self.state.join("api.sock")
    }

    /// Returns the folder of the pool, where it is one.
    pub fn pool(&self) -> PathBuf {
        let folder = |pool: &str| {
            ["directory:", "btrfs:"].iter().find_map(|driver| pool.strip_prefix(driver).map(PathBuf::from))
        };
        let given = self.options.pool.as_deref().and_then(folder);
        given.unwrap_or_else(|| self.state.join("pool"))
    }

    /// Runs a command for this node and returns what it left. Resources are printed as JSON.
    #[track_caller]
    pub fn cli<S: AsRef<str>>(&self, args: &[S]) -> Output {
        self.start_cli(args).finish(LONG)
    }

    /// Starts a command for this node.
    #[track_caller]
    pub fn start_cli<S: AsRef<str>>(&self, args: &[S]) -> Running {
        let mut command = self.command();
        command.args(["--output", "json"]).args(args.iter().map(AsRef::as_ref));
        Running::start(&mut command)
    }

    /// Runs a command for this node that prints for people.
    #[track_caller]
    pub fn cli_for_people(&self, args: &[&str]) -> Output {
        let mut command = self.command();
        command.args(args);
        Running::start(&mut command).finish(LONG)
    }

    /// Asks the API.
    #[track_caller]
    pub fn http(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        http::request(&self.socket(), method, path, body)
    }

    /// Creates a volume, mounts it and returns where.
    #[track_caller]
    pub fn create_mounted(&self, volume: &str) -> PathBuf {
        self.cli(&["create", volume]).ok();
        self.mount(volume)
    }

    /// Mounts a volume at its own place and returns where.
    #[track_caller]
    pub fn mount(&self, volume: &str) -> PathBuf {
        let mounted = self.cli(&["mount", volume]).ok().json();
        self.seen(mounted["path"].as_str().expect("a mount has a path"))
    }

    /// Mounts a volume read-only at its own place and returns where.
    #[track_caller]
    pub fn mount_to_read(&self, volume: &str) -> PathBuf {
        let mounted = self.cli(&["mount", volume, "--read-only"]).ok().json();
        self.seen(mounted["path"].as_str().expect("a mount has a path"))
    }

    /// Returns where a path that the node speaks of is found by the test.
    pub fn seen(&self, path: &str) -> PathBuf {
        self.options.host.as_ref().map_or_else(|| PathBuf::from(path), |host| host.seen(Path::new(path)))
    }

    /// Pushes and returns the finished transfer.
    #[track_caller]
    pub fn push(&self, snapshot: &str, peer: &str) -> Value {
        let transfer = self.cli(&["push", snapshot, peer]).ok().json();
        assert_eq!(transfer["state"], "done", "{transfer}");
        transfer
    }

    /// Returns a transfer as it is now.
    #[track_caller]
    pub fn transfer(&self, id: &str) -> Value {
        self.http("GET", &format!("/v1/transfers/{id}"), None).is(200).json()
    }

    /// Waits until a transfer is done.
    #[track_caller]
    pub fn wait_done(&self, id: &str, within: Duration) -> Value {
        wait_until(&format!("transfer {id} is done on {}", self.name), within, || {
            let transfer = self.transfer(id);
            let state = transfer["state"].as_str().expect("a transfer has a state").to_owned();
            let over = ["failed", "refused", "cancelled"].contains(&state.as_str());
            assert!(!over, "the transfer ended otherwise: {transfer}\n{}", self.log_tail());
            (state == "done").then_some(transfer)
        })
    }

    /// Returns the highest resident memory of the daemon so far, in bytes, by the kernel's account.
    pub fn peak_resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("read the daemon's status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a process has a peak");
        let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number");
        kibibytes * 1024
    }

    /// Returns how many pages of memory the kernel has given the daemon, those that were given back again included (the minor faults
    /// of proc_pid_stat(5)).
    pub fn pages_got(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("read the daemon's account");
        let behind_name = stat.rsplit_once(')').expect("a name in parentheses").1;
        behind_name.split_whitespace().nth(7).and_then(|faults| faults.parse().ok()).expect("a number of faults")
    }

    /// Returns all the daemon has printed.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until the daemon's log holds a text, in any case.
    #[track_caller]
    pub fn wait_logged(&self, wanted: &str) {
        let what = format!("the log of {} holds {wanted:?}", self.name);
        wait_until(&what, SHORT, || self.log_text().to_lowercase().contains(&wanted.to_lowercase()).then_some(()));
    }

    fn log_tail(&self) -> String {
        let log = self.log_text();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    fn command(&self) -> Command {
        let call = |program: &Path| match (&self.options.host, &self.options.end) {
            (Some(host), _) => host.command(program),
            (None, Some(end)) => end.command(program),
            (None, None) => Command::new(program),
        };
        let mut command = match needs::program("setpriv") {
            Some(setpriv) => {
                let mut command = call(&setpriv);
                command.args(["--pdeathsig", "KILL"]);
                if let Some(user) = self.options.user {
                    let (uid, gid) = needs::user(user).expect("the user is there");
                    command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".to_owned()]);
                }
                command.arg(&self.binary);
                command
            }
            None => call(&self.binary),
        };
        clean(&mut command);
        command.arg("--state").arg(&self.state);
        command
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!("--- the end of {} ---\n{}", self.log.display(), self.log_tail());
        }
    }
}

/// Several nodes of one cluster, all started. The first holds the authority.
#[derive(Debug)]
pub struct Cluster {
    /// The nodes `host-a`, `host-b`, …
    pub nodes: Vec<Node>,
    /// Where they live. Dropped after the nodes.
    pub scratch: Scratch,
}

impl Cluster {
    /// Makes and starts `count` nodes.
    #[track_caller]
    pub fn start(count: usize) -> Self {
        Self::with(Scratch::new(), vec![Options::default(); count])
    }

    /// Makes and starts one node for each of the options.
    #[track_caller]
    pub fn with(scratch: Scratch, options: Vec<Options>) -> Self {
        let mut nodes: Vec<Node> = Vec::new();
        for (options, letter) in options.into_iter().zip('a'..='z') {
            let name = format!("host-{letter}");
            let mut node = match nodes.first() {
                None => Node::init(&scratch, &name, options),
                Some(first) => Node::join(&scratch, &name, options, first),
            };
            node.start();
            if let Some(first) = nodes.first() {
                first.wait_knows(&name);
            }
            nodes.push(node);
        }
        Self { nodes, scratch }
    }

    /// Returns the first two nodes.
    pub fn pair(&mut self) -> (&mut Node, &mut Node) {
        let [a, b, ..] = self.nodes.as_mut_slice() else { panic!("a cluster of one node") };
        (a, b)
    }
}

/// Returns an address of 127.0.0.1 that nobody listens at, below the range the kernel hands out by itself, so that it
/// stays free while a node is down.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() as u16).wrapping_mul(61);
    loop {
        let offset = start.wrapping_add(NEXT.fetch_add(1, Ordering::SeqCst)) % 12_000;
        let address = SocketAddr::from(([127, 0, 0, 1], 20_000 + offset));
        if UdpSocket::bind(address).is_ok() && std::net::TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// Returns whether a folder is a mount point of its own.
pub fn is_mount_point(path: &Path) -> bool {
    crate::scratch::mounts_below(path).iter().any(|place| place == path)
}
