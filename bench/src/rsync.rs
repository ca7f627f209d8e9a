//! `rsync -a` over ssh: what changes in place, file by file, by what both sides have.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use flocker_tests::scratch::run;

use crate::{
    account::Counted,
    contender::{Contender, Role},
    ssh::Ssh,
};

/// Sends a folder to another.
pub(crate) struct Rsync<'a> {
    ssh: &'a Ssh,
    source: &'a Path,
    /// What the folder had when the base was taken.
    base: PathBuf,
    destination: PathBuf,
}

impl<'a> Rsync<'a> {
    /// From a folder into one that is made in a place of its own.
    pub(crate) fn new(ssh: &'a Ssh, source: &'a Path, place: &Path) -> Self {
        Self { ssh, source, base: place.join("rsync-base"), destination: place.join("rsync") }
    }
}

impl Contender for Rsync<'_> {
    fn title(&self) -> String {
        "rsync -a, ssh".to_owned()
    }

    fn counted(&self) -> Counted {
        Counted { server: Some(self.ssh.pid()), ..Counted::default() }
    }

    fn take(&mut self, _snapshot: &str, role: Role) {
        if role == Role::Base {
            run(Command::new("cp").arg("-a").arg(self.source).arg(&self.base));
        }
    }

    fn prepare(&mut self, base: Option<&str>) {
        match base {
            Some(_) => drop(run(Command::new("cp").arg("-a").arg(&self.base).arg(&self.destination))),
            None => fs::create_dir(&self.destination).unwrap(),
        }
    }

    fn send(&mut self, _base: Option<&str>, _snapshots: &[String]) -> Option<u64> {
        let said = run(Command::new("rsync")
            .env("LC_ALL", "C")
            // Or it takes for unchanged what was changed within the same second.
            .args(["-a", "--modify-window=-1", "--stats", "-e", &self.ssh.command_line("")])
            .arg(format!("{}/", self.source.display()))
            .arg(format!("localhost:{}/", self.destination.display())));
        run(Command::new("sync").arg("-f").arg(&self.destination));
        let number = |line: &str| line.chars().filter(char::is_ascii_digit).collect::<String>().parse::<u64>().unwrap();
        Some(said.lines().filter(|line| line.starts_with("Total bytes ")).map(number).sum())
    }

    fn arrived(&mut self) -> Option<PathBuf> {
        Some(self.destination.clone())
    }

    fn clean(&mut self) {
        fs::remove_dir_all(&self.destination).unwrap();
    }
}
