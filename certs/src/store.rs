//! Keys and certificates as PEM files: written atomically, keys readable by their owner only.
//!
//! Owns how a file gets on disk (temporary file, mode before content, fsync, rename, fsync of the folder). Does not know
//! what the bytes mean.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use data_encoding::BASE64;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject};

use crate::error::{Error, ErrorKind, Result};

/// Larger files are not keys or certificates of ours.
const FILE_LIMIT: u64 = 64 * 1024;

#[derive(Clone, Copy)]
pub(crate) enum Content {
    Certificate,
    PrivateKey,
}

impl Content {
    fn label(self) -> &'static str {
        match self {
            Self::Certificate => "CERTIFICATE",
            Self::PrivateKey => "PRIVATE KEY",
        }
    }

    fn mode(self) -> u32 {
        match self {
            Self::Certificate => 0o644,
            Self::PrivateKey => 0o600,
        }
    }
}

/// Makes the folder, with mode 0700, where it is missing.
pub(crate) fn ensure_dir(dir: &Path) -> Result<()> {
    let failed = |error| Error::new("create the folder", dir.display(), ErrorKind::from_io(error));
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(failed)
}

/// Writes `der` as PEM under `dir/name`: after a crash there is the old file or the new one, whole.
pub(crate) fn write(dir: &Path, name: &str, content: Content, der: &[u8]) -> Result<()> {
    let path = dir.join(name);
    let temporary = dir.join(format!(".{name}.{}.tmp", std::process::id()));
    let written = replace(dir, &path, &temporary, content, der);
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(|error| Error::new("write", path.display(), ErrorKind::from_io(error)))
}

fn replace(dir: &Path, path: &Path, temporary: &Path, content: Content, der: &[u8]) -> io::Result<()> {
    if let Err(error) = fs::remove_file(temporary)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(content.mode()).open(temporary)?;
    file.write_all(pem(content, der).as_bytes())?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    File::open(dir)?.sync_all()
}

/// Reads a PEM file back as DER.
pub(crate) fn read(dir: &Path, name: &str, content: Content) -> Result<Vec<u8>> {
    let path = dir.join(name);
    let failed = |error| Error::new("read", path.display(), ErrorKind::from_io(error));
    let size = fs::metadata(&path).map_err(failed)?.len();
    let malformed = |what: String| Error::new("read", path.display(), ErrorKind::Malformed(what));
    if size > FILE_LIMIT {
        return Err(malformed(format!("{size} bytes are too many")));
    }
    let text = fs::read(&path).map_err(failed)?;
    match content {
        Content::Certificate => CertificateDer::from_pem_slice(&text).map(|der| der.to_vec()),
        Content::PrivateKey => PrivatePkcs8KeyDer::from_pem_slice(&text).map(|der| der.secret_pkcs8_der().to_vec()),
    }
    .map_err(|_| malformed(format!("a PEM file with one {} is expected", content.label())))
}

fn pem(content: Content, der: &[u8]) -> String {
    let label = content.label();
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in BASE64.encode(der).as_bytes().chunks(64) {
        text.extend(line.iter().map(|&byte| char::from(byte)));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}
