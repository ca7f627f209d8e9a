//! `export`, `import`.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, IsTerminal as _, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context as _;
use clap::{Args, builder::PossibleValuesParser, builder::TypedValueParser as _};
use flocker_node::api::{
    client::{SnapshotRef, VolumeName},
    tarball::{Compression, Identity, ImportKind, ImportReport},
};
use serde::Serialize;
use tokio::sync::mpsc;

use super::Session;
use crate::{
    output::human_bytes,
    progress::Interrupt,
    report::{Exit, Stop},
    values::Object,
};

/// How much of a tarball is read at once, in bytes.
const PIECE: usize = 256 * 1024;

/// How many pieces wait to be sent.
const PIECES_AHEAD: usize = 4;

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// The snapshot; a volume's newest one when only the volume is named
    #[arg(value_name = "VOLUME[@SNAPSHOT]")]
    object: Object,
    /// Write to this file instead of standard output; it appears when it is complete
    #[arg(long, short, value_name = "FILE")]
    output_file: Option<PathBuf>,
    /// How to compress; told by the end of the file's name when left out (.tar.zst, .tar.gz)
    #[arg(long, value_name = "HOW", value_parser = compression())]
    compress: Option<Compression>,
}

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// The new volume's name
    // Without this a name like "-x" would be taken for an unknown option, and the rule for names not be told.
    #[arg(allow_hyphen_values = true)]
    volume: VolumeName,
    /// The tarball: plain, gzip or zstd; standard input when left out
    file: Option<PathBuf>,
    /// Make a new volume with a new snapshot, whatever the tarball says it is
    #[arg(long)]
    as_new: bool,
}

fn compression() -> impl clap::builder::TypedValueParser<Value = Compression> {
    PossibleValuesParser::new(["none", "zstd", "gzip"]).map(|word| match word.as_str() {
        "zstd" => Compression::Zstd,
        "gzip" => Compression::Gzip,
        _ => Compression::None,
    })
}

/// What `export -o FILE` prints as JSON.
#[derive(Serialize)]
struct Exported<'a> {
    snapshot: String,
    file: &'a Path,
    compress: Compression,
    bytes: u64,
}

impl Session<'_> {
    pub(super) async fn export(&self, args: ExportArgs) -> anyhow::Result<()> {
        let ExportArgs { object, output_file, compress } = args;
        let file = output_file.filter(|path| path.as_os_str() != "-");
        if file.is_none() && io::stdout().is_terminal() {
            let stop = Stop::new(Exit::Usage, "a tarball is nothing for a terminal");
            return Err(stop.hint("name a file with -o FILE, or send it on with | or >").into());
        }
        let snapshot = match object {
            Object::Snapshot(snapshot) => snapshot,
            Object::Volume(volume) => self.newest(volume).await?,
        };
        let Some(path) = file else {
            return self.export_to(&snapshot, compress.unwrap_or_default(), &mut io::stdout().lock()).await.map(drop);
        };
        let compress = compress.unwrap_or_else(|| Compression::of_file_name(&path.to_string_lossy()));
        let mut interrupt = Interrupt::listen()?;
        let mut file = WholeFile::create(path)?;
        let bytes = tokio::select! {
            biased;
            () = interrupt.pressed() => {
                return Err(Stop::new(Exit::Interrupted, format!("stopped; {} was not written", file.path.display())).into());
            }
            bytes = self.export_to(&snapshot, compress, &mut file.out) => bytes?,
        };
        let path = file.finish()?;
        self.output.item(&Exported { snapshot: snapshot.to_string(), file: &path, compress, bytes }, String::new)?;
        self.output.talk(&format!("exported {snapshot} to {} ({})", path.display(), human_bytes(bytes)));
        Ok(())
    }

    async fn export_to(&self, snapshot: &SnapshotRef, how: Compression, out: &mut impl Write) -> anyhow::Result<u64> {
        let mut bytes = 0;
        let written = self.client.export(snapshot, how, |piece| {
            bytes += piece.len() as u64;
            out.write_all(piece)
        });
        let written = written.await.with_context(|| format!("cannot export {snapshot}"))?.and_then(|()| out.flush());
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                let said = format!("cannot export {snapshot}: nobody reads it any more; what was written is not whole");
                Err(Stop::new(Exit::Failure, said).into())
            }
            written => written.map(|()| bytes).with_context(|| format!("cannot write the export of {snapshot}")),
        }
    }

    pub(super) async fn import(&self, args: ImportArgs) -> anyhow::Result<()> {
        let ImportArgs { volume, file, as_new } = args;
        let (input, shown): (Box<dyn Read + Send>, String) = match file.filter(|path| path.as_os_str() != "-") {
            Some(path) => (Box::new(open(&path)?), path.display().to_string()),
            None if io::stdin().is_terminal() => {
                let stop = Stop::new(Exit::Usage, "a terminal gives no tarball");
                return Err(stop.hint(format!("name the file: flocker import {volume} FILE")).into());
            }
            None => (Box::new(io::stdin()), "standard input".to_owned()),
        };
        let identity = if as_new { Identity::New } else { Identity::Kept };
        let (pieces, failure) = read_ahead(input)?;
        let imported = self.client.import(&volume, identity, pieces).await;
        if let Some(error) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error).with_context(|| format!("cannot read {shown}"));
        }
        let report = imported?;
        self.output.item(&report, String::new)?;
        self.tell_import(&report);
        Ok(())
    }

    fn tell_import(&self, report: &ImportReport) {
        let ImportReport { volume, snapshot, kind, why, warnings } = report;
        let shown = format!("{}@{}", volume.name, snapshot.name);
        let size = human_bytes(snapshot.logical_bytes);
        let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        self.output.talk(&match kind {
            ImportKind::Same => format!("imported {shown} ({size}), the snapshot that was exported"),
            ImportKind::Fork => format!("imported {shown} ({size}), the snapshot that was exported, as a fork{why}"),
            ImportKind::New => format!("imported {shown} ({size}), a new volume and a new snapshot{why}"),
        });
        if *kind != ImportKind::New {
            let primary = volume.primary.as_ref().map(|primary| format!(" of {primary}")).unwrap_or_default();
            let name = &volume.name;
            self.output.talk(&format!("{name} is a replica{primary}; `flocker promote {name}` makes it writable here"));
        }
        self.tell_warnings(warnings);
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).map_err(|error| {
        let exit = if error.kind() == io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failure };
        Stop::new(exit, format!("cannot open {}: {error}", path.display())).into()
    })
}

/// Why an input could not be read.
type Failure = Arc<Mutex<Option<io::Error>>>;

/// Reads in a thread of its own, which nobody waits for: an input that gives nothing more must not keep the program.
fn read_ahead(mut input: Box<dyn Read + Send>) -> anyhow::Result<(mpsc::Receiver<io::Result<bytes::Bytes>>, Failure)> {
    let (pieces, receiver) = mpsc::channel(PIECES_AHEAD);
    let failure = Failure::default();
    let told = failure.clone();
    let read = move || {
        let mut buffer = vec![0; PIECE];
        loop {
            let piece = match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => Ok(bytes::Bytes::copy_from_slice(&buffer[..count])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    Err(io::Error::other("the input failed"))
                }
            };
            let is_last = piece.is_err();
            if pieces.blocking_send(piece).is_err() || is_last {
                return;
            }
        }
    };
    std::thread::Builder::new().name("flocker-input".to_owned()).spawn(read).context("cannot start a thread")?;
    Ok((receiver, failure))
}

/// A file that is there once it is whole. Something that is no file, such as a pipe, is written to as it is.
struct WholeFile {
    out: File,
    path: PathBuf,
    part: Option<PathBuf>,
}

impl WholeFile {
    fn create(path: PathBuf) -> anyhow::Result<Self> {
        let is_special = fs::metadata(&path).is_ok_and(|found| !found.is_file());
        let mut part = OsString::from(&path);
        part.push(".part");
        let part = (!is_special).then(|| PathBuf::from(part));
        let at = part.as_ref().unwrap_or(&path);
        let out = File::options().write(true).create(!is_special).truncate(!is_special).open(at);
        let out = out.with_context(|| format!("cannot write {}", at.display()))?;
        Ok(Self { out, path, part })
    }

    fn finish(mut self) -> anyhow::Result<PathBuf> {
        if let Some(part) = self.part.take() {
            let whole = self.out.sync_all().and_then(|()| fs::rename(&part, &self.path));
            if whole.is_err() {
                self.part = Some(part);
            }
            whole.with_context(|| format!("cannot write {}", self.path.display()))?;
        }
        Ok(std::mem::take(&mut self.path))
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            let _ = fs::remove_file(part);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_that_was_not_finished_is_not_there_and_an_older_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.tar");
        fs::write(&path, "older").unwrap();
        let mut file = WholeFile::create(path.clone()).unwrap();
        file.out.write_all(b"new").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"older");
        let mut file = WholeFile::create(path.clone()).unwrap();
        file.out.write_all(b"new").unwrap();
        file.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
