//! Hosts with ZFS for tests in this process: zfs-fuse in namespaces of its own, or the machine's own OpenZFS.
//!
//! A test starts with one line and goes on in a process that has a pool to itself:
//!
//! ```ignore
//! #[tokio::test(flavor = "multi_thread")]
//! async fn a_claim() {
//!     let Some(host) = ZfsHost::enter("a_claim") else { return };
//!     let driver = support::open_with("zfs", Path::new(&host.dataset("a"))).await.unwrap(); // tank/a
//!     host.zfs(&["list", "-r", host.root()]); // the program, to look at what the driver did
//!     conformance::run(|| host.place()).await; // pools for the suite
//! }
//! ```
//!
//! [`ZfsHost::enter`] starts the test binary again with only this test, in new mount and PID namespaces. There the
//! state folders of zfs-fuse are empty, a daemon runs, and a pool lies in a file (in memory where there is room). Everything
//! the inner process starts sees the same: programs in `PATH`, mounts, and children that a test kills. When it ends, the
//! kernel ends the daemon and takes the mounts away with the namespaces; a time-out of the outer process does the same.
//! Tests run side by side and know nothing of each other.
//!
//! With `FLOCKER_TEST_OPENZFS=POOL` (the test machine, see tests/vm) nothing is started: the pool is there, each test gets a
//! dataset of it, and the same tests run on it. [`ZfsHost::is_fuse`] tells them apart.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use flocker_storage::{conformance::Fixture, driver::Driver, error::Result};

use super::{have, is_root, must, open_with};

/// Where zfs-fuse keeps its socket, its lock, its settings and the list of its pools (compiled in), and where the driver
/// mounts.
const STATE_FOLDERS: [&str; 5] = ["/run/zfs", "/run/lock/zfs", "/etc/zfs", "/var/lib/zfs", "/run/flocker"];

/// Names the folder of the inner process's pool; its presence makes it the inner one.
const INSIDE: &str = "FLOCKER_TEST_ZFS_HOST";

/// Names the pool of a machine that has OpenZFS in its kernel.
const OPENZFS: &str = "FLOCKER_TEST_OPENZFS";

/// How large the sparse file of a pool is.
const POOL_BYTES: u64 = 4 << 30;

/// How long a daemon may take to start, and a dataset to be free again.
const PATIENCE: Duration = Duration::from_secs(30);

/// A host with ZFS and one pool, for the rest of a test.
pub struct ZfsHost {
    root: String,
    folder: PathBuf,
    /// Dies with the namespaces at the latest.
    daemon: Option<Mutex<Child>>,
    _keep: Option<tempfile::TempDir>,
}

impl ZfsHost {
    /// Goes on in a process that has a host to itself. `None` where that process was another one, and has passed, or
    /// where this machine lacks something.
    ///
    /// `test` is the test's name with its modules, as `--exact` takes it.
    pub fn enter(test: &str) -> Option<Arc<Self>> {
        if let Ok(pool) = std::env::var(OPENZFS) {
            let keep = tempfile::tempdir().unwrap();
            let root = format!("{pool}/{test}");
            let host = Self { root, folder: keep.path().to_owned(), daemon: None, _keep: Some(keep) };
            // Uncompressed: the suite compares the sizes of streams, and its data is all alike.
            host.zfs(&["create", "-o", "mountpoint=none", "-o", "compression=off", &host.root]);
            return Some(Arc::new(host));
        }
        if let Some(folder) = std::env::var_os(INSIDE) {
            return Some(Arc::new(Self::start(folder.into())));
        }
        // Asked for its version, it would start.
        let is_installed = ["/usr/sbin/zfs-fuse", "/sbin/zfs-fuse"].iter().any(|program| Path::new(program).exists());
        let is_there = is_root() && Path::new("/dev/fuse").exists() && is_installed;
        if have("zfs-fuse", is_there) {
            run_inside(test);
        }
        None
    }

    /// Starts zfs-fuse and makes a pool. This process is alone in its namespaces.
    fn start(folder: PathBuf) -> Self {
        fs::write(folder.join("entered"), "").unwrap();
        for state in STATE_FOLDERS {
            must(Command::new("mount").args(["-t", "tmpfs", "none", state]));
        }
        let daemon = Some(Mutex::new(start_daemon(&folder)));
        let host = Self { root: "tank".to_owned(), folder, daemon, _keep: None };
        host.eventually("zpool", &["list"]);
        let image = host.folder.join("image");
        fs::File::create(&image).unwrap().set_len(POOL_BYTES).unwrap();
        must(Command::new("zpool").args(["create", "-m", "none", "tank"]).arg(&image));
        host
    }

    /// Tells whether it is zfs-fuse, which has no resumable receives, bookmarks, encryption and much else.
    pub fn is_fuse(&self) -> bool {
        self.daemon.is_some()
    }

    /// Returns the dataset that belongs to this test, which is mounted nowhere: a whole pool, or a part of one.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Returns the name of the pool, for `zpool`.
    pub fn pool(&self) -> &str {
        self.root.split('/').next().unwrap()
    }

    /// Returns a folder for files of the test, outside of the pool.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes a dataset without a mount point and returns its whole name.
    pub fn dataset(&self, name: &str) -> String {
        let dataset = format!("{}/{name}", self.root);
        self.zfs(&["create", "-o", "mountpoint=none", &dataset]);
        dataset
    }

    /// Runs `zfs`, which must succeed, and returns what it prints.
    pub fn zfs(&self, arguments: &[&str]) -> String {
        String::from_utf8(must(Command::new("zfs").args(arguments)).stdout).unwrap()
    }

    /// Runs `zpool`, which must succeed, and returns what it prints.
    pub fn zpool(&self, arguments: &[&str]) -> String {
        String::from_utf8(must(Command::new("zpool").args(arguments)).stdout).unwrap()
    }

    /// Runs `zfs` and returns how it ended.
    pub fn try_zfs(&self, arguments: &[&str]) -> Output {
        Command::new("zfs").args(arguments).output().unwrap()
    }

    /// Returns pools for one case of the suite, which go when the value is dropped: datasets below a new one. On zfs-fuse
    /// each lies in a pool of its own, as on two hosts: it finds the origin of a received clone by guid, anywhere in the pool.
    pub fn place(self: &Arc<Self>) -> ZfsPlace {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("case{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let dataset = if self.is_fuse() { name } else { self.dataset(&name) };
        ZfsPlace { dataset, host: Arc::clone(self) }
    }

    /// Keeps the whole pool as it is now, for [`put_back`](Self::put_back). Only on zfs-fuse, where it is this test's alone.
    pub fn keep(&self) {
        assert!(self.is_fuse(), "another's pool");
        self.eventually("zpool", &["export", "-f", self.pool()]);
        must(Command::new("cp").arg("--sparse=always").args([self.folder.join("image"), self.folder.join("kept")]));
        self.import();
    }

    /// Makes the pool what it was when it was kept. By another daemon: zfs-fuse finds what it has cached by the pool's guid, which stays, and
    /// one that had seen the pool go back ended by an assertion in its cache (`arc_buf_remove_ref`).
    pub fn put_back(&self) {
        let mut daemon = self.daemon.as_ref().expect("another's pool").lock().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        for line in fs::read_to_string("/proc/self/mounts").unwrap().lines().rev() {
            let fields: Vec<&str> = line.split(' ').collect();
            if fields[0].starts_with(self.pool()) && fields[2].starts_with("fuse") {
                must(Command::new("umount").args(["-l", fields[1]]));
            }
        }
        // The list of its pools; what it would open by itself is about to change.
        let _ = fs::remove_file("/var/lib/zfs/zpool.cache");
        must(Command::new("cp").arg("--sparse=always").args([self.folder.join("kept"), self.folder.join("image")]));
        *daemon = start_daemon(&self.folder);
        self.eventually("zpool", &["list"]);
        self.import();
    }

    fn import(&self) {
        // Of the folder's files only the image may be found.
        let found = self.folder.join("found");
        if !found.exists() {
            fs::create_dir(&found).unwrap();
            std::os::unix::fs::symlink("../image", found.join("image")).unwrap();
        }
        self.zpool(&["import", "-d", found.to_str().unwrap(), self.pool()]);
    }

    /// Destroys a dataset with all below it.
    pub fn destroy(&self, dataset: &str) {
        // zfs-fuse lets go of a mount a moment after it says so, and stops half-way.
        self.eventually("zfs", &["destroy", "-R", dataset]);
    }

    /// Runs a program until it succeeds.
    fn eventually(&self, program: &str, arguments: &[&str]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = Command::new(program).args(arguments).output().unwrap();
            if output.status.success() {
                return;
            }
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(Instant::now() < deadline, "{program} {arguments:?}: {said}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for ZfsHost {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            let mut daemon = daemon.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            // Its tidy end takes four seconds; nobody needs the pool any more.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Starts zfs-fuse, whose log grows in a folder.
fn start_daemon(folder: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(folder.join("zfs-fuse.log")).unwrap();
    let mut daemon = Command::new("zfs-fuse");
    daemon.args(["--no-daemon", "--no-kstat-mount", "--max-arc-size", "64"]).stdin(Stdio::null());
    daemon.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

/// Runs one test of this binary in namespaces of its own; it must pass.
fn run_inside(test: &str) {
    let memory = Path::new("/dev/shm");
    let room = rustix::fs::statvfs(memory).is_ok_and(|found| found.f_bavail * found.f_frsize > 2 * POOL_BYTES);
    let folder = if room { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    for state in STATE_FOLDERS {
        fs::create_dir_all(state).unwrap();
    }
    // The inner process is the first of its PID namespace: with it, everything in there ends.
    let status = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "slave"])
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, folder.path())
        .status()
        .unwrap();
    if !status.success() {
        let log = fs::read_to_string(folder.path().join("zfs-fuse.log")).unwrap_or_default();
        panic!("{test} failed inside ({status}); zfs-fuse said:\n{log}");
    }
    assert!(folder.path().join("entered").exists(), "there is no test named {test}");
}

/// Pools of a ZFS host for one case of the suite.
pub struct ZfsPlace {
    host: Arc<ZfsHost>,
    dataset: String,
}

impl ZfsPlace {
    /// Returns the name of the dataset that a pool lives in.
    pub fn dataset(&self, pool: &str) -> String {
        if self.host.is_fuse() { format!("{}{pool}/pool", self.dataset) } else { format!("{}/{pool}", self.dataset) }
    }

    /// Makes the pool of a pool where it has one of its own.
    fn make_pool(&self, pool: &str) {
        let name = format!("{}{pool}", self.dataset);
        let image = self.host.folder.join(&name);
        if self.host.is_fuse() && !image.exists() {
            fs::File::create(&image).unwrap().set_len(POOL_BYTES).unwrap();
            must(Command::new("zpool").args(["create", "-m", "none", &name]).arg(&image));
        }
    }
}

#[async_trait]
impl Fixture for ZfsPlace {
    async fn open(&self, pool: &str) -> Result<Arc<dyn Driver>> {
        let dataset = self.dataset(pool);
        self.make_pool(pool);
        if !self.host.try_zfs(&["list", &dataset]).status.success() {
            self.host.zfs(&["create", "-o", "mountpoint=none", &dataset]);
        }
        open_with("zfs", Path::new(&dataset)).await
    }

    fn plant_stranger(&self, pool: &str) -> bool {
        self.host.zfs(&["create", "-o", "mountpoint=none", &format!("{}/strangers", self.dataset(pool))]);
        true
    }
}

impl Drop for ZfsPlace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        if !self.host.is_fuse() {
            return self.host.destroy(&self.dataset);
        }
        for entry in fs::read_dir(&self.host.folder).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_prefix(&self.dataset).is_some_and(|rest| rest.starts_with(char::is_alphabetic)) {
                self.host.eventually("zpool", &["destroy", "-f", &name]);
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}
