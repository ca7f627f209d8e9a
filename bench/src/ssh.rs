//! An ssh server of the benchmark's own, with keys made for it.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use flocker_tests::{SHORT, Scratch, needs::program, node::free_address, scratch::run, wait_until};

/// So that nobody is asked, and nothing is kept.
const OPTIONS: [&str; 3] = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"];

/// A running server. Killed when dropped.
pub(crate) struct Ssh {
    server: Child,
    address: SocketAddr,
    key: PathBuf,
}

impl Ssh {
    /// Starts it on loopback.
    pub(crate) fn start(scratch: &Scratch) -> Self {
        Self::start_at(scratch, free_address(), |program| Command::new(program))
    }

    /// Starts it at an address, by calls of its program that are made as `call` does.
    pub(crate) fn start_at(scratch: &Scratch, address: SocketAddr, call: impl Fn(&Path) -> Command) -> Self {
        let folder = scratch.folder("ssh");
        for key in ["host-key", "key"] {
            run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(folder.join(key)));
        }
        fs::copy(folder.join("key.pub"), folder.join("authorized")).unwrap();
        let config = format!(
            "ListenAddress {address}\nHostKey {0}/host-key\nAuthorizedKeysFile {0}/authorized\nPidFile none\n\
             StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n",
            folder.display()
        );
        fs::write(folder.join("config"), config).unwrap();
        // Where sshd confines its unprivileged half (sshd(8)).
        let _ = fs::create_dir_all("/run/sshd");
        let log = folder.join("log");
        let server = call(&program("sshd").unwrap())
            .args(["-D", "-e", "-f"])
            .arg(folder.join("config"))
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        wait_until("sshd listens", SHORT, || fs::read_to_string(&log).unwrap().contains("listening").then_some(()));
        Self { server, address, key: folder.join("key") }
    }

    /// Returns the server's process.
    pub(crate) fn pid(&self) -> u32 {
        self.server.id()
    }

    /// Returns the options of syncoid that reach it, and the host's name for it.
    pub(crate) fn syncoid_options(&self) -> (Vec<String>, String) {
        let (port, key) = (self.address.port(), self.key.display());
        let mut options = vec![format!("--sshport={port}"), format!("--sshkey={key}")];
        options.extend(OPTIONS.iter().chain(&["LogLevel=ERROR"]).map(|option| format!("--sshoption={option}")));
        (options, format!("root@{}", self.address.ip()))
    }

    /// Returns the words that start the client.
    pub(crate) fn command_line(&self, host: &str) -> String {
        let (port, address, key) = (self.address.port(), self.address.ip(), self.key.display());
        let options = OPTIONS.map(|option| format!("-o {option}")).join(" ");
        format!("ssh -q -p {port} -i {key} {options} -o HostName={address} {host}").trim_end().to_owned()
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
