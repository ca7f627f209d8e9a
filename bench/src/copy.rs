//! `cp -a` within this machine: no other host, no encryption, nothing checked. What the disk or the memory takes of the time.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use flocker_tests::scratch::run;

use crate::{account::Counted, contender::Contender};

/// Copies a folder.
pub(crate) struct Copy<'a> {
    source: &'a Path,
    destination: PathBuf,
}

impl<'a> Copy<'a> {
    /// From a folder into one that is made in a place of its own.
    pub(crate) fn new(source: &'a Path, place: &Path) -> Self {
        Self { source, destination: place.join("copy") }
    }
}

impl Contender for Copy<'_> {
    fn title(&self) -> String {
        "cp -a: no other host".to_owned()
    }

    fn counted(&self) -> Counted {
        Counted::default()
    }

    fn prepare(&mut self, _base: Option<&str>) {
        fs::create_dir(&self.destination).unwrap();
    }

    fn send(&mut self, _base: Option<&str>, _snapshots: &[String]) -> Option<u64> {
        run(Command::new("cp").args(["-a", "--reflink=never"]).arg(self.source.join(".")).arg(&self.destination));
        run(Command::new("sync").arg("-f").arg(&self.destination));
        None
    }

    fn arrived(&mut self) -> Option<PathBuf> {
        Some(self.destination.clone())
    }

    fn clean(&mut self) {
        fs::remove_dir_all(&self.destination).unwrap();
    }
}
