//! An ssh server of the benchmark's own, with keys made for it.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use flocker_tests::{SHORT, Scratch, needs::program, node::free_address, scratch::run, wait_until};

/// A running server. Killed when dropped.
pub(crate) struct Ssh {
    server: Child,
    options: String,
}

impl Ssh {
    /// Starts it on loopback.
    #[allow(dead_code, reason = "the benchmark of lines has it elsewhere")]
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
        let options = format!(
            "ssh -q -p {} -i {}/key -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
             -o HostName={}",
            address.port(),
            folder.display(),
            address.ip()
        );
        wait_until("sshd listens", SHORT, || fs::read_to_string(&log).unwrap().contains("listening").then_some(()));
        Self { server, options }
    }

    /// Returns the server's process.
    #[allow(dead_code, reason = "the other benchmark does not ask")]
    pub(crate) fn pid(&self) -> u32 {
        self.server.id()
    }

    /// Returns the words that start the client.
    pub(crate) fn command_line(&self, host: &str) -> String {
        format!("{} {host}", self.options).trim_end().to_owned()
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
