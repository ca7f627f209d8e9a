//! The demonstration's folder, its two nodes, and how both go away again.
//!
//! Owns child processes and the folder. Refuses to know the story.

use std::{
    ffi::OsStr,
    fmt, fs, io,
    net::UdpSocket,
    os::{
        fd::AsFd as _,
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::{DirBuilderExt as _, PermissionsExt as _},
        },
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use flocker_node::api::client::{Client, SOCKET_PATH_LIMIT, VolumeName};
use rustix::{
    mount::UnmountFlags,
    process::{Pid, Signal},
};
use serde::de::DeserializeOwned;
use tokio::process::{Child, Command};

use super::say;
use crate::report::{Exit, Stop};

/// How long a node may take to answer after its start.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a node may take to stop; longer than the daemon's own grace.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// How long the cleaning up waits for one unmount.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(5);

/// How many folder names are tried.
const NAMES_TRIED: u32 = 100;

/// How much of a node's log is told when the demonstration fails.
const LOG_LINES: usize = 15;

/// One of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Host {
    /// `host-a`, which makes the cluster and pushes.
    A,
    /// `host-b`, which joins and receives.
    B,
}

impl Host {
    const BOTH: [Self; 2] = [Self::A, Self::B];

    fn name(self) -> &'static str {
        match self {
            Self::A => "host-a",
            Self::B => "host-b",
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The folder and the nodes in it. [`Stage::strike`] takes all of it away; a value that is dropped otherwise leaves it.
#[derive(Debug)]
pub(super) struct Stage {
    program: PathBuf,
    folder: PathBuf,
    made_folder: bool,
    ports: [u16; 2],
    nodes: [Option<Child>; 2],
}

impl Stage {
    /// Makes the folder and chooses ports.
    pub(super) fn set(wanted: Option<&Path>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let (folder, made_folder) = match wanted {
            Some(wanted) => take_folder(wanted)?,
            None => (make_folder()?, true),
        };
        let ports = free_ports().context("cannot find free ports on 127.0.0.1")?;
        Ok(Self { program, folder, made_folder, ports, nodes: [None, None] })
    }

    /// Returns the folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns what may still be written there.
    pub(super) fn available_bytes(&self) -> anyhow::Result<u64> {
        let stat = rustix::fs::statvfs(&self.folder).context("cannot ask for the free space")?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Returns where a node listens.
    pub(super) fn listen(&self, host: Host) -> String {
        format!("127.0.0.1:{}", self.ports[host as usize])
    }

    fn state(&self, host: Host) -> PathBuf {
        self.folder.join(host.name())
    }

    fn client(&self, host: Host) -> Client {
        Client::new(socket_in(&self.folder, host))
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "this program itself, as a user starts it; the command line knows no storage"
    )]
    fn command(&self, host: Host) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--state").arg(self.state(host)).stdin(Stdio::null()).kill_on_drop(true);
        // Settings of the user's own node are not for these.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"FLOCKER_")) {
            command.env_remove(name);
        }
        command
    }

    /// Starts a node and waits until it answers.
    pub(super) async fn start(&mut self, host: Host) -> anyhow::Result<()> {
        say(&format!("{host}$ flocker node start &"));
        let log = fs::File::options().create(true).append(true).open(self.log(host))?;
        let mut command = self.command(host);
        // A process group of its own: Ctrl-C is for the demonstration, which then stops its nodes in order.
        command.args(["node", "start"]).process_group(0).kill_on_drop(false);
        command.stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn().with_context(|| format!("cannot start {host}"))?;
        let client = self.client(host);
        let deadline = Instant::now() + START_LIMIT;
        let ready = loop {
            if client.ready().await.is_ok() {
                break Ok(());
            }
            if let Some(status) = child.try_wait()? {
                break Err(format!("{host} ended at its start ({status})"));
            }
            if Instant::now() > deadline {
                break Err(format!("{host} did not answer within {} s", START_LIMIT.as_secs()));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        self.nodes[host as usize] = Some(child);
        ready.map_err(anyhow::Error::msg)
    }

    fn log(&self, host: Host) -> PathBuf {
        self.folder.join(format!("{host}.log"))
    }

    /// Runs a command that must succeed and prints a resource.
    pub(super) async fn ask<T: DeserializeOwned>(&self, host: Host, arguments: &[&str]) -> anyhow::Result<T> {
        let (status, printed) = self.call(host, arguments, Stdio::piped()).await?;
        ensure!(status.success(), "flocker {} failed ({status})", typed(arguments));
        serde_json::from_slice(&printed).with_context(|| format!("flocker {} printed something else", typed(arguments)))
    }

    /// Runs a command that must succeed.
    pub(super) async fn run(&self, host: Host, arguments: &[&str]) -> anyhow::Result<()> {
        let (status, _) = self.call(host, arguments, Stdio::null()).await?;
        ensure!(status.success(), "flocker {} failed ({status})", typed(arguments));
        Ok(())
    }

    /// Runs a command and returns its exit code.
    pub(super) async fn try_run(&self, host: Host, arguments: &[&str]) -> anyhow::Result<i32> {
        let (status, _) = self.call(host, arguments, Stdio::null()).await?;
        status.code().with_context(|| format!("flocker {} was killed ({status})", typed(arguments)))
    }

    /// Runs a command that must succeed and lets its table be seen.
    pub(super) async fn show(&self, host: Host, arguments: &[&str]) -> anyhow::Result<()> {
        let (status, _) = self.call(host, &[arguments, &["--output", "table"]].concat(), Stdio::inherit()).await?;
        ensure!(status.success(), "flocker {} failed ({status})", typed(arguments));
        Ok(())
    }

    /// Runs a command; its talk, progress and errors go where the story goes.
    async fn call(&self, host: Host, arguments: &[&str], stdout: Stdio) -> anyhow::Result<(ExitStatus, Vec<u8>)> {
        say(&format!("{host}$ flocker {}", typed(arguments)));
        let mut command = self.command(host);
        if !arguments.contains(&"--output") {
            command.args(["--output", "json"]);
        }
        let stderr = io::stdout().as_fd().try_clone_to_owned()?;
        let child = command.args(arguments).stdout(stdout).stderr(stderr).spawn();
        let done = child.context("cannot run this program again")?.wait_with_output().await?;
        Ok((done.status, done.stdout))
    }

    /// Tells the ends of the nodes' logs.
    pub(super) fn tell_logs(&self) {
        for host in Host::BOTH {
            let log = fs::read(self.log(host)).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<_> = log.lines().collect();
            if !lines.is_empty() {
                say(&format!("\nThe end of the log of {host}:"));
                lines[lines.len().saturating_sub(LOG_LINES)..].iter().for_each(|line| say(&format!("  {line}")));
            }
        }
    }

    /// Leaves the nodes running and says how to talk to them.
    pub(super) fn keep(&self) {
        let program = self.program.display();
        say("\nBoth nodes are still running. Talk to them with:\n");
        for host in Host::BOTH {
            say(&format!("  {program} --state {} list", self.state(host).display()));
        }
        let pids: Vec<_> = self.nodes.iter().flatten().filter_map(Child::id).map(|pid| pid.to_string()).collect();
        say(&format!(
            "\nTheir logs are {} and {}.\nUnmount what you have mounted, then stop them and remove everything with:\n\n  \
             kill {}\n  rm -r {}",
            self.log(Host::A).display(),
            self.log(Host::B).display(),
            pids.join(" "),
            self.folder.display()
        ));
    }

    /// Unmounts, stops both nodes and removes the folder.
    pub(super) async fn strike(&mut self) -> anyhow::Result<()> {
        if let Ok(volume) = "db".parse::<VolumeName>() {
            for host in Host::BOTH.into_iter().filter(|host| self.nodes[*host as usize].is_some()) {
                // What is not mounted, or whose node is gone, needs no unmount here; what is left is found below.
                let _ = tokio::time::timeout(UNMOUNT_LIMIT, self.client(host).unmount(&volume)).await;
            }
        }
        for child in self.nodes.iter().flatten() {
            terminate(child);
        }
        for host in Host::BOTH {
            if let Some(mut child) = self.nodes[host as usize].take()
                && tokio::time::timeout(STOP_LIMIT, child.wait()).await.is_err()
            {
                say(&format!("({host} did not stop within {} s and was killed)", STOP_LIMIT.as_secs()));
                child.kill().await.with_context(|| format!("cannot end {host}"))?;
            }
        }
        detach_mounts_below(&self.folder);
        let (folder, itself) = (self.folder.clone(), self.made_folder);
        tokio::task::spawn_blocking(move || remove(&folder, itself))
            .await?
            .with_context(|| format!("cannot remove {}; remove it by hand", self.folder.display()))
    }
}

fn typed(arguments: &[&str]) -> String {
    // A token is long, and a secret.
    let short = |word: &&str| {
        if word.len() > 60 { format!("{}…", word.chars().take(16).collect::<String>()) } else { (*word).to_owned() }
    };
    let shown = arguments.iter().filter(|word| !matches!(**word, "--output" | "table"));
    shown.map(short).collect::<Vec<_>>().join(" ")
}

fn socket_in(folder: &Path, host: Host) -> PathBuf {
    folder.join(host.name()).join("api.sock")
}

fn fits(folder: &Path) -> bool {
    socket_in(folder, Host::A).as_os_str().len() <= SOCKET_PATH_LIMIT
}

/// Takes the folder the user named: a new or an empty one.
fn take_folder(wanted: &Path) -> anyhow::Result<(PathBuf, bool)> {
    let folder = std::path::absolute(wanted)?;
    if !fits(&folder) {
        let length = socket_in(&folder, Host::A).as_os_str().len();
        let message = format!("{} is too long a path: the nodes' sockets would have {length} bytes", folder.display());
        return Err(Stop::new(Exit::Usage, message)
            .hint(format!("a unix socket's path may have {SOCKET_PATH_LIMIT} bytes; choose a shorter --dir"))
            .into());
    }
    match fs::read_dir(&folder) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                let message =
                    format!("{} is not empty, and the demonstration removes what it leaves", folder.display());
                return Err(Stop::new(Exit::Usage, message).hint("name a folder that does not exist yet").into());
            }
            Ok((folder, false))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            Ok((folder, true))
        }
        Err(error) => Err(error).with_context(|| format!("cannot use {}", folder.display())),
    }
}

/// Makes a temporary folder with a path short enough for sockets.
fn make_folder() -> anyhow::Result<PathBuf> {
    let pid = std::process::id();
    let wanted = std::env::temp_dir();
    let parent = if fits(&wanted.join(format!("flocker-demo-{pid}-{NAMES_TRIED}"))) { wanted } else { "/tmp".into() };
    for number in 0..NAMES_TRIED {
        let folder = parent.join(format!("flocker-demo-{pid}-{number}"));
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", folder.display())),
        }
    }
    bail!("cannot make a folder in {}: {NAMES_TRIED} names are taken", parent.display())
}

fn free_ports() -> io::Result<[u16; 2]> {
    // Both are held until both are known, so that they differ.
    let sockets = [UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?];
    Ok([sockets[0].local_addr()?.port(), sockets[1].local_addr()?.port()])
}

fn terminate(child: &Child) {
    // No id: it has ended and was waited for.
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
}

/// Takes away mounts that a node could not: as root a volume's mount would keep the folder from going.
fn detach_mounts_below(folder: &Path) {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mut places = mounts_below(&table, folder);
    // The innermost first.
    places.sort_by_key(|place| std::cmp::Reverse(place.as_os_str().len()));
    for place in places {
        let _ = rustix::mount::unmount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }
}

/// Finds the mount points below a folder in the text of mountinfo (proc_pid_mountinfo(5): the fifth field, with octal
/// escapes).
fn mounts_below(table: &[u8], folder: &Path) -> Vec<PathBuf> {
    let points = table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let paths = points.map(|point| PathBuf::from(std::ffi::OsString::from_vec(unescape(point))));
    paths.filter(|path| path.starts_with(folder) && path != folder).collect()
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\').then(|| after.get(..3)).flatten();
        let byte = octal.and_then(|digits| u8::from_str_radix(OsStr::from_bytes(digits).to_str()?, 8).ok());
        plain.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    plain
}

/// Removes a folder's contents, and the folder itself where the demonstration made it. Snapshots may hold directories
/// that their owner cannot write to.
fn remove(folder: &Path, itself: bool) -> io::Result<()> {
    open_up(folder)?;
    if itself {
        return fs::remove_dir_all(folder);
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes every directory below writable for its owner, without following symlinks.
fn open_up(folder: &Path) -> io::Result<()> {
    let mut waiting = vec![folder.to_owned()];
    while let Some(folder) = waiting.pop() {
        let mode = fs::symlink_metadata(&folder)?.permissions().mode();
        if mode & 0o700 != 0o700 {
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode | 0o700))?;
        }
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_mounts_below_the_folder_are_found() {
        let table = b"36 35 98:0 / /tmp/demo rw - ext4 /dev/x rw\n\
            37 35 98:0 /a /tmp/demo/host-a/mounts/d\\040b rw - ext4 /dev/x rw\n\
            38 35 98:0 / /tmp/demonstration/x rw - ext4 /dev/x rw\n";
        assert_eq!(mounts_below(table, Path::new("/tmp/demo")), [Path::new("/tmp/demo/host-a/mounts/d b")]);
    }

    #[test]
    fn directories_that_cannot_be_written_are_removed_too() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("demo");
        fs::create_dir_all(folder.join("a/closed/inner")).unwrap();
        fs::write(folder.join("a/closed/inner/file"), "x").unwrap();
        fs::set_permissions(folder.join("a/closed/inner"), fs::Permissions::from_mode(0o500)).unwrap();
        fs::set_permissions(folder.join("a/closed"), fs::Permissions::from_mode(0o000)).unwrap();
        remove(&folder, true).unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn a_folder_with_something_in_it_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(take_folder(folder.path()).unwrap(), (folder.path().to_owned(), false));
        fs::write(folder.path().join("precious"), "x").unwrap();
        assert!(take_folder(folder.path()).unwrap_err().to_string().contains("not empty"));
        let long = folder.path().join("x".repeat(100));
        assert!(take_folder(&long).unwrap_err().to_string().contains("too long"));
        assert!(!long.exists());
    }

    #[test]
    fn a_token_is_not_told_in_full() {
        let token = "t".repeat(200);
        assert_eq!(typed(&["join", &token, "--name", "b"]), format!("join {}… --name b", "t".repeat(16)));
    }
}
