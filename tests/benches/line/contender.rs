//! How each contender moves a volume's contents over the line.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use flocker_tests::{
    Node, SHORT, Scratch,
    line::{End, Line},
    scratch::run,
    wait_until,
};

use crate::ssh::Ssh;

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
    line: &'a Line,
    place: PathBuf,
}

impl<'a> Field<'a> {
    pub(crate) fn start(scratch: &Scratch, line: &'a Line) -> Self {
        let receiver = &line.ends[1];
        let address = SocketAddr::from((receiver.address(), SSH_PORT));
        let ssh = Ssh::start_at(scratch, address, |program| receiver.command(program));
        let place = scratch.folder("by-hand");
        let (key, certificate) = (place.join("tls.key"), place.join("tls.crt"));
        run(Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x"])
            .arg("-keyout")
            .arg(key)
            .arg("-out")
            .arg(certificate));
        Self { ssh, line, place }
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
    /// With this congestion control of TCP.
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
            Self::Tls(tcp) => format!("tar \\| zstd -1 \\| openssl (TLS, TCP {tcp})"),
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
            Self::Ssh(tcp) => {
                for end in [sender, receiver] {
                    use_tcp(end, tcp);
                }
                fs::create_dir_all(&destination).unwrap();
                let line = format!("{} {}", sender.words(), field.ssh.command_line("localhost"));
                let script = format!("{} | {line} \"{}\"", packing(source), unpacking(&destination));
                seconds(|| bash(&script))
            }
            Self::Tls(tcp) => {
                for end in [sender, receiver] {
                    use_tcp(end, tcp);
                }
                fs::create_dir_all(&destination).unwrap();
                by_tls(field, source, &destination)
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

/// Sends through `openssl s_client`; the server ends with the one connection. It gives no session tickets: the client does not read
/// them, and a socket that is closed with something unread takes back what it has sent and is still on its way.
fn by_tls(field: &Field<'_>, source: &Path, destination: &Path) -> f64 {
    let [sender, receiver] = &field.line.ends;
    let place = field.place.display();
    let listen = format!(
        "openssl s_server -accept {}:{TLS_PORT} -naccept 1 -quiet -num_tickets 0 -key '{place}/tls.key' -cert '{place}/tls.crt'",
        receiver.address()
    );
    // Its input stays open: it would take the end of it for its own.
    let receiving = format!("{} {listen} | ({})", receiver.words(), unpacking(destination));
    let mut server =
        Command::new("bash").args(["-o", "pipefail", "-c", &receiving]).stdin(Stdio::piped()).spawn().unwrap();
    wait_until("the TLS server listens", SHORT, || {
        let listening = run(receiver.command(Path::new("cat")).arg("/proc/net/tcp"));
        listening.contains(&format!(":{TLS_PORT:04X} 00000000:0000 0A")).then_some(())
    });
    let connect = format!("openssl s_client -connect {}:{TLS_PORT} -quiet -no_ign_eof -nocommands", receiver.address());
    let script = format!("{} | {} {connect} 2>/dev/null", packing(source), sender.words());
    seconds(|| {
        bash(&script);
        assert!(server.wait().unwrap().success());
    })
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
