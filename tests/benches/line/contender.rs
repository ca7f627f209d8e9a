//! How each contender moves a volume's contents over the line.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use flocker_tests::{
    Node, Scratch,
    line::{End, Line},
    scratch::run,
};

use crate::{ssh::Ssh, tls::Tls};

const SSH_PORT: u16 = 2222;
const TLS_PORT: u16 = 4433;

/// Measures.
pub(crate) fn seconds(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64()
}

/// What the contenders need at both ends.
pub(crate) struct Field<'a> {
    ssh: Ssh,
    tls: Tls,
    line: &'a Line,
    place: PathBuf,
}

impl<'a> Field<'a> {
    pub(crate) fn start(scratch: &Scratch, line: &'a Line) -> Self {
        let receiver = &line.ends[1];
        let address = SocketAddr::from((receiver.address(), SSH_PORT));
        let ssh = Ssh::start_at(scratch, address, |program| receiver.command(program));
        let place = scratch.folder("by-hand");
        Self { ssh, tls: Tls::new(scratch), line, place }
    }

    fn destination(&self, volume: &str, number: usize) -> PathBuf {
        self.place.join(format!("{volume}-{number}"))
    }
}

/// Who moves the data.
#[derive(Debug, Clone)]
pub(crate) enum Contender {
    Flocker,
    /// With this congestion control of TCP.
    Ssh(String),
    /// The same, by TLS over TCP.
    Tls(String),
}

impl Contender {
    pub(crate) fn named(name: &str) -> Self {
        match name.split_once('-') {
            Some(("ssh", tcp)) => Self::Ssh(tcp.to_owned()),
            Some(("tls", tcp)) => Self::Tls(tcp.to_owned()),
            None if name == "flocker" => Self::Flocker,
            _ => panic!("there is no contender {name}"),
        }
    }

    pub(crate) fn title(&self) -> String {
        match self {
            Self::Flocker => "flocker".to_owned(),
            Self::Ssh(tcp) => format!("tar \\| zstd -1 \\| ssh (TCP {tcp})"),
            Self::Tls(tcp) => format!("tar \\| zstd -1 \\| TLS (TCP {tcp})"),
        }
    }

    /// Moves the volume's snapshot `new`, or what it was taken of, and returns how long it took.
    pub(crate) fn run(&self, field: &Field<'_>, a: &Node, volume: &str, source: &Path, number: usize) -> f64 {
        let [sender, receiver] = &field.line.ends;
        let destination = field.destination(volume, number);
        match self {
            Self::Flocker => seconds(|| {
                let to = format!("{volume}-{number}");
                a.cli(&["push", &format!("{volume}@new"), "host-b", "--as", &to]).ok();
            }),
            Self::Tls(tcp) => {
                prepare(field, tcp, &destination);
                let address = SocketAddr::from((sender.address(), TLS_PORT));
                let by = [sender, receiver].map(|end| end.words());
                let (from, into) = (packing(source), unpacking(&destination));
                seconds(|| field.tls.carry_at(address, by.each_ref().map(String::as_str), &from, &into))
            }
            Self::Ssh(tcp) => {
                prepare(field, tcp, &destination);
                let line = format!("{} {}", sender.words(), field.ssh.command_line("localhost"));
                let script = format!("{} | {line} \"{}\"", packing(source), unpacking(&destination));
                seconds(|| bash(&script))
            }
        }
    }

    /// Takes away what was received.
    pub(crate) fn clean(&self, field: &Field<'_>, b: &Node, volume: &str, number: usize) {
        match self {
            Self::Flocker => drop(b.cli(&["destroy", &format!("{volume}-{number}")]).ok()),
            Self::Ssh(_) | Self::Tls(_) => fs::remove_dir_all(field.destination(volume, number)).unwrap(),
        }
    }
}

fn packing(source: &Path) -> String {
    format!("tar -C '{}' --numeric-owner --xattrs --acls -cf - . | zstd -q -1", source.display())
}

fn unpacking(destination: &Path) -> String {
    let destination = destination.display();
    format!("zstd -q -d | tar -C '{destination}' --numeric-owner --xattrs --acls -xf - && sync -f '{destination}'")
}

fn bash(script: &str) {
    run(Command::new("bash").args(["-o", "pipefail", "-c", script]));
}

/// Sets how TCP at an end reacts to loss: by what the kernel allows everybody (net.ipv4.tcp_allowed_congestion_control).
fn use_tcp(end: &End, control: &str) {
    run(end.command(Path::new("sysctl")).args(["-qw", &format!("net.ipv4.tcp_congestion_control={control}")]));
}

/// Makes the folder and sets TCP at both ends.
fn prepare(field: &Field<'_>, tcp: &str, destination: &Path) {
    for end in &field.line.ends {
        use_tcp(end, tcp);
    }
    fs::create_dir_all(destination).unwrap();
}
