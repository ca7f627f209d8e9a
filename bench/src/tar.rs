//! `tar` through a pipe to another host. It knows no difference to what is there: everything is sent always.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use flocker_tests::{
    line::{End, Line},
    node::free_address,
    scratch::run,
};

use crate::{account::Counted, contender::Contender, ssh::Ssh, tls::Tls};

/// Where the pipe over TLS listens at the end of a line.
const TLS_PORT: u16 = 4433;

/// Sends a folder.
pub(crate) struct Tar<'a> {
    through: Through<'a>,
    compresses: bool,
    /// A line, and how TCP reacts to loss on it.
    line: Option<(&'a Line, String)>,
    source: &'a Path,
    destination: PathBuf,
}

/// What the pipe goes through.
#[derive(Clone, Copy)]
enum Through<'a> {
    Ssh(&'a Ssh),
    Tls(&'a Tls),
}

impl<'a> Tar<'a> {
    /// `tar | zstd -1 | ssh`, from a folder into one that is made in a place of its own.
    pub(crate) fn over_ssh(ssh: &'a Ssh, source: &'a Path, place: &Path) -> Self {
        Self { through: Through::Ssh(ssh), compresses: true, line: None, source, destination: place.join("tar-ssh") }
    }

    /// `tar` as it is over TLS.
    pub(crate) fn over_tls(tls: &'a Tls, source: &'a Path, place: &Path) -> Self {
        Self { through: Through::Tls(tls), compresses: false, line: None, source, destination: place.join("tar-tls") }
    }

    /// The same over a line, compressed, with this congestion control of TCP.
    pub(crate) fn at(mut self, line: &'a Line, tcp: &str) -> Self {
        self.compresses = true;
        self.line = Some((line, tcp.to_owned()));
        self.destination.add_extension(tcp);
        self
    }

    fn packing(&self) -> String {
        let behind = if self.compresses { " | zstd -q -1" } else { "" };
        format!("tar -C '{}' --numeric-owner --xattrs --acls -cf - .{behind}", self.source.display())
    }

    fn unpacking(&self) -> String {
        let before = if self.compresses { "zstd -q -d | " } else { "" };
        let destination = self.destination.display();
        format!("{before}tar -C '{destination}' --numeric-owner --xattrs --acls -xf - && sync -f '{destination}'")
    }
}

impl Contender for Tar<'_> {
    fn title(&self) -> String {
        let zstd = if self.compresses { ", zstd -1" } else { "" };
        let through = match self.through {
            Through::Ssh(_) => "ssh",
            Through::Tls(_) => "TLS over TCP",
        };
        let tcp = self.line.as_ref().map(|(_, tcp)| format!(" (TCP {tcp})")).unwrap_or_default();
        format!("tar{zstd}, {through}{tcp}")
    }

    fn counted(&self) -> Counted {
        match self.through {
            Through::Ssh(ssh) => Counted { server: Some(ssh.pid()), ..Counted::default() },
            Through::Tls(_) => Counted::default(),
        }
    }

    fn prepare(&mut self, _base: Option<&str>) {
        fs::create_dir(&self.destination).unwrap();
    }

    fn get_set(&mut self) {
        if let Some((line, tcp)) = &self.line {
            line.ends.iter().for_each(|end| use_tcp(end, tcp));
        }
    }

    fn send(&mut self, _base: Option<&str>, _snapshots: &[String]) -> Option<u64> {
        let ends = self.line.as_ref().map(|(line, _)| line.ends.each_ref());
        let by = ends.map(|ends| ends.map(|end| end.words())).unwrap_or_default();
        match self.through {
            Through::Ssh(ssh) => {
                let client = format!("{} {}", by[0], ssh.command_line("localhost"));
                bash(&format!("{} | {client} \"{}\"", self.packing(), self.unpacking()));
            }
            Through::Tls(tls) => {
                let address = ends.map_or_else(free_address, |ends| SocketAddr::from((ends[0].address(), TLS_PORT)));
                tls.carry(address, by.each_ref().map(String::as_str), &self.packing(), &self.unpacking());
            }
        }
        None
    }

    fn weigh(&mut self, _base: Option<&str>, _snapshots: &[String]) -> Option<u64> {
        bash(&format!("{} | wc -c", self.packing())).trim().parse().ok()
    }

    fn arrived(&mut self) -> Option<PathBuf> {
        Some(self.destination.clone())
    }

    fn clean(&mut self) {
        fs::remove_dir_all(&self.destination).unwrap();
    }
}

/// Runs a shell line whose every part must succeed.
pub(crate) fn bash(script: &str) -> String {
    run(Command::new("bash").args(["-o", "pipefail", "-ec", script]))
}

/// Sets how TCP at an end reacts to loss: by what the kernel allows everybody (net.ipv4.tcp_allowed_congestion_control).
fn use_tcp(end: &End, control: &str) {
    run(end.command(Path::new("sysctl")).args(["-qw", &format!("net.ipv4.tcp_congestion_control={control}")]));
}
