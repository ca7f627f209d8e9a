//! A pipe over TLS 1.3 and TCP, by `socat`, with a certificate made for it.

use std::{net::SocketAddr, path::PathBuf, process::Command, thread};

use flocker_tests::{Scratch, scratch::run};

/// Key and certificate.
pub(crate) struct Tls {
    certificate: PathBuf,
}

impl Tls {
    pub(crate) fn new(scratch: &Scratch) -> Self {
        let folder = scratch.folder("tls");
        let (key, certificate) = (folder.join("key"), folder.join("certificate"));
        run(Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                "/CN=localhost",
            ])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate));
        let both = [key, certificate.clone()].map(|path| std::fs::read(path).unwrap()).concat();
        std::fs::write(&certificate, both).unwrap();
        Self { certificate }
    }

    /// Has one shell pipe write into another, and waits for both: at an address of the sender, each side's program started by some words.
    pub(crate) fn carry(&self, address: SocketAddr, by: [&str; 2], from: &str, into: &str) {
        let (port, certificate) = (address.port(), self.certificate.display());
        let bash = |script: String| run(Command::new("bash").args(["-o", "pipefail", "-c", &script]));
        // The sender listens: what a server says behind the handshake (RFC 8446, 4.6.1) would be unread at a client that only
        // writes, and a socket that is closed with unread data resets what it has sent.
        let listen = format!("OPENSSL-LISTEN:{port},bind={},reuseaddr,cert={certificate},verify=0", address.ip());
        let call = format!("OPENSSL:{address},verify=0,retry=100,interval=0.02");
        // Pieces as large as those that tar writes to a pipe of the kernel's default size.
        thread::scope(|scope| {
            scope.spawn(|| bash(format!("{from} | {} socat -u -b 65536 - {listen}", by[0])));
            bash(format!("{} socat -u -b 65536 {call} - | {into}", by[1]));
        });
    }
}
