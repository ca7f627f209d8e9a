//! The data of each case, and how each contender moves it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use flocker_tests::{
    Node,
    data::{scribble, write_random, write_small_files},
    scratch::run,
};

use crate::ssh::Ssh;

/// One kind of data, in a volume of the first node.
pub(crate) struct Case {
    /// What the table calls it.
    pub(crate) title: String,
    /// What flocker's last push carried.
    pub(crate) delta_bytes: u64,
    /// What of it travelled.
    pub(crate) wire_bytes: u64,
    /// The snapshot that the receivers have already.
    base: Option<&'static str>,
    /// The contents that `tar` and `rsync` send: those of `base`, and the new ones.
    source: PathBuf,
    base_source: PathBuf,
    destination: PathBuf,
}

impl Case {
    /// Makes the data and takes the snapshots.
    pub(crate) fn prepare(name: &str, scale: f64, a: &Node, place: &Path) -> Self {
        let mount = a.create_mounted("data");
        let scaled = |full: f64| (full * scale).max(1.0) as u64;
        let source = mount.clone();
        let base_source = place.join("base");
        let mut base = None;
        let what = match name {
            "real" => format!("first push, {} of real files", size(copy_real_files(&mount, scaled(1e9)))),
            "delta" => {
                let bytes = copy_real_files(&mount, scaled(1e9));
                for number in 0..4 {
                    write_random(&mount.join(format!("table-{number}")), number, scaled(2.5e8));
                }
                a.cli(&["snapshot", "data@base"]).ok();
                run(Command::new("cp").args(["-a"]).arg(&mount).arg(&base_source));
                let blocks = scaled(1e9) / 100 / 4096 / 4;
                for number in 0..4 {
                    scribble(&mount.join(format!("table-{number}")), 100 + number, blocks as u32);
                }
                base = Some("base");
                format!("1 % changed of {}", size(bytes + 4 * scaled(2.5e8)))
            }
            "small" => {
                write_small_files(&mount, 1, scaled(200_000.0) as u32, 2000);
                format!("{} small files", scaled(200_000.0))
            }
            "big" => {
                write_random(&mount.join("big"), 2, scaled(4.0 * 1_073_741_824.0));
                format!("one file of {}", size(scaled(4.0 * 1_073_741_824.0)))
            }
            other => panic!("FLOCKER_BENCH_CASES has real, delta, small, big; not {other}"),
        };
        a.cli(&["snapshot", "data@new"]).ok();
        Self {
            title: what,
            delta_bytes: 0,
            wire_bytes: 0,
            base,
            source,
            base_source,
            destination: place.join("received"),
        }
    }

    /// Brings the receivers to where they start from.
    pub(crate) fn prepare_receivers(&self, a: &Node, _b: &Node, _ssh: &Ssh, run_number: usize) {
        if let Some(base) = self.base {
            a.cli(&["push", &format!("data@{base}"), "host-b", "--as", &name_at_receiver(run_number)]).ok();
        }
    }

    /// Pushes by flocker.
    pub(crate) fn by_flocker(&mut self, a: &Node, run_number: usize) -> Duration {
        let started = Instant::now();
        let done = a.cli(&["push", "data@new", "host-b", "--as", &name_at_receiver(run_number)]).ok();
        let took = started.elapsed();
        let transfer = done.json();
        self.delta_bytes = transfer["progress"]["delta_bytes"].as_u64().unwrap();
        self.wire_bytes = transfer["progress"]["wire_bytes"].as_u64().unwrap();
        took
    }

    /// Sends everything by tar, compressed. It knows no difference to what is there.
    pub(crate) fn by_tar(&self, ssh: &Ssh) -> Duration {
        self.clear_destination(None);
        let (source, destination) = (self.source.display(), self.destination.display());
        let script = format!(
            "set -e; tar -C '{source}' --numeric-owner --xattrs --acls -cf - . | zstd -q -1 | \
             {} \"zstd -q -d | tar -C '{destination}' --numeric-owner --xattrs --acls -xf - && sync -f '{destination}'\"",
            ssh.command_line("localhost")
        );
        timed(Command::new("bash").args(["-o", "pipefail", "-c", &script]))
    }

    /// Sends by rsync, onto what is there already.
    pub(crate) fn by_rsync(&self, ssh: &Ssh) -> Duration {
        self.clear_destination(self.base.map(|_| self.base_source.as_path()));
        let started = Instant::now();
        let to = format!("localhost:{}/", self.destination.display());
        run(Command::new("rsync")
            .args(["-a", "-e", &ssh.command_line("")])
            .arg(format!("{}/", self.source.display()))
            .arg(to));
        run(Command::new("sync").arg("-f").arg(&self.destination));
        started.elapsed()
    }

    /// Takes away what a run brought.
    pub(crate) fn forget_receivers(&self, b: &Node, run_number: usize) {
        b.cli(&["destroy", &name_at_receiver(run_number)]).ok();
        fs::remove_dir_all(&self.destination).unwrap();
    }

    fn clear_destination(&self, start_with: Option<&Path>) {
        if self.destination.exists() {
            fs::remove_dir_all(&self.destination).unwrap();
        }
        match start_with {
            Some(base) => drop(run(Command::new("cp").arg("-a").arg(base).arg(&self.destination))),
            None => fs::create_dir(&self.destination).unwrap(),
        }
        run(&mut Command::new("sync"));
    }
}

fn name_at_receiver(run_number: usize) -> String {
    format!("data-{run_number}")
}

fn timed(command: &mut Command) -> Duration {
    let started = Instant::now();
    run(command);
    started.elapsed()
}

/// Copies what the machine has: programs, libraries, documentation, until there is enough. Returns how much it is.
fn copy_real_files(to: &Path, wanted: u64) -> u64 {
    let toolchain = Command::new("rustc").args(["--print", "sysroot"]).output().ok();
    let toolchain = toolchain.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let mut copied = 0;
    for root in [Some(PathBuf::from("/usr/share")), Some(PathBuf::from("/usr/lib")), toolchain].into_iter().flatten() {
        copy_some(&root, &to.join(root.file_name().unwrap()), wanted, &mut copied);
    }
    copied
}

fn copy_some(from: &Path, to: &Path, wanted: u64, copied: &mut u64) {
    let Ok(entries) = fs::read_dir(from) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    fs::create_dir_all(to).unwrap();
    for entry in entries {
        if *copied >= wanted {
            return;
        }
        let Ok(kind) = entry.file_type() else { continue };
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy_some(&entry.path(), &target, wanted, copied);
        } else if kind.is_file() {
            *copied += fs::copy(entry.path(), target).unwrap_or(0);
        }
    }
}

fn size(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
