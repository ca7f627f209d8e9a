//! The data of each case, and how each contender moves it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use flocker_tests::{
    Node,
    data::{scribble, write_half_random, write_random, write_small_files},
    scratch::run,
};

use crate::{
    account::{Counted, Memory, Spent, wait_idle},
    ssh::Ssh,
    table::Run,
    tls::Tls,
};

/// The cases there are, in the order of the table.
pub(crate) const CASES: &str = "big,half,small,delta,noop,tiny,real";

/// The contenders, in the order in which they take turns; the last one sends everything always, and does not compete where that
/// makes no sense.
const CONTENDERS: [&str; 4] =
    ["flocker", "tar \\| zstd -1 \\| ssh", "rsync -a over ssh", "tar \\| TLS over TCP (socat)"];

const FLOCKER: usize = 0;
const TAR: usize = 1;
const RSYNC: usize = 2;

const GIBIBYTE: f64 = 1_073_741_824.0;

/// What the table calls a case.
pub(crate) struct Title {
    pub(crate) text: String,
    /// How many bytes the blocks of 4 KiB have that changed, where that is what the case is about.
    pub(crate) changed_bytes: Option<u64>,
}

/// One kind of data, in a volume of the first node.
pub(crate) struct Case {
    pub(crate) title: Title,
    /// How many changes follow on each other in one run; one push each.
    rounds: u32,
    /// The snapshot that the receivers have already.
    base: Option<String>,
    /// The contents that `tar` and `rsync` send: those of `base`, and the new ones.
    source: PathBuf,
    base_source: PathBuf,
    place: PathBuf,
    /// What the pipe of tar carries, with and without zstd; its own programs do not say.
    tar_bytes: Option<(u64, u64)>,
}

impl Case {
    /// Makes the data and takes the snapshots.
    pub(crate) fn prepare(name: &str, scale: f64, a: &Node, place: &Path) -> Self {
        let source = a.create_mounted("data");
        let scaled = |full: f64| (full * scale).max(1.0) as u64;
        let small_files = |count: u64| write_small_files(&source, 1, count as u32, 2000);
        let (mut rounds, mut has_base, mut changed_bytes) = (1, false, None);
        let text = match name {
            "big" => {
                write_random(&source.join("big"), 2, scaled(4.0 * GIBIBYTE));
                format!("one file of {}, incompressible", size(scaled(4.0 * GIBIBYTE)))
            }
            "half" => {
                write_half_random(&source.join("half"), 3, scaled(4.0 * GIBIBYTE));
                format!("one file of {}, half of it compressible", size(scaled(4.0 * GIBIBYTE)))
            }
            "small" => {
                small_files(scaled(200_000.0));
                format!("{} small files", scaled(200_000.0))
            }
            "delta" => {
                let table_bytes = scaled(2.5e8);
                let real_bytes = copy_real_files(&source, scaled(1e9));
                for number in 0..4 {
                    write_random(&source.join(format!("table-{number}")), number, table_bytes);
                }
                has_base = true;
                format!("1 % of the blocks of 4 files of {}, beside {}", size(table_bytes), size(real_bytes))
            }
            "noop" => {
                small_files(scaled(200_000.0));
                has_base = true;
                format!("{} small files, nothing changed", scaled(200_000.0))
            }
            "tiny" => {
                small_files(1000);
                (rounds, has_base) = (scaled(500.0) as u32, true);
                format!("{rounds} times one of 1,000 small files changed")
            }
            "real" => format!("{} of real files", size(copy_real_files(&source, scaled(1e9)))),
            other => panic!("FLOCKER_BENCH_CASES has {CASES}; not {other}"),
        };
        let base_source = place.join("base");
        if has_base {
            a.cli(&["snapshot", "data@base"]).ok();
            run(Command::new("cp").args(["-a"]).arg(&source).arg(&base_source));
        }
        if name == "delta" {
            let blocks = (scaled(2.5e8) / 100 / 4096).max(1) as u32;
            let change = |number: u64| scribble(&source.join(format!("table-{number}")), 100 + number, blocks);
            changed_bytes = Some((0..4).map(change).sum::<u64>() * 4096);
        }
        if rounds == 1 {
            a.cli(&["snapshot", "data@new"]).ok();
        }
        Self {
            title: Title { text: format!("{name}: {text}"), changed_bytes },
            rounds,
            base: has_base.then(|| "base".to_owned()),
            source,
            base_source,
            place: place.to_owned(),
            tar_bytes: None,
        }
    }

    /// Returns who competes.
    pub(crate) fn contenders(&self) -> &'static [&'static str] {
        if self.base.is_some() { &CONTENDERS[..=RSYNC] } else { &CONTENDERS }
    }

    /// Lets each contender move the data once, and returns what it took.
    pub(crate) fn run(&mut self, a: &Node, b: &Node, servers: &(Ssh, Tls), number: usize) -> Vec<Run> {
        let (ssh, tls) = servers;
        let at_receiver = format!("data-{number}");
        if let Some(base) = &self.base {
            a.cli(&["push", &format!("data@{base}"), "host-b", "--as", &at_receiver]).ok();
        }
        let nothing = Run { seconds: 0.0, cpu_seconds: 0.0, peak_bytes: [0; 2], wire_bytes: None };
        let mut sums = vec![nothing; self.contenders().len()];
        for round in 0..self.rounds {
            let snapshot = self.next_snapshot(a, number, round);
            for (contender, sum) in sums.iter_mut().enumerate() {
                if round == 0 && contender != FLOCKER {
                    self.prepare_destination(contender);
                }
                run(&mut Command::new("sync"));
                let daemons = (a.pid(), b.pid());
                let counted = match contender {
                    FLOCKER => Counted::Daemons(daemons.0, daemons.1),
                    _ => Counted::Pipe { daemons, server: ssh.pid() },
                };
                let (memory, before) = (Memory::start(counted), Spent::so_far(counted));
                let started = Instant::now();
                let wire_bytes = match contender {
                    FLOCKER => Some(by_flocker(a, &snapshot, &at_receiver)),
                    TAR => self.by_tar(ssh),
                    RSYNC => Some(self.by_rsync(ssh)),
                    _ => self.by_tls(tls),
                };
                sum.seconds += started.elapsed().as_secs_f64();
                if contender != FLOCKER {
                    wait_idle(ssh.pid());
                }
                sum.cpu_seconds += Spent::so_far(counted).since(before);
                let peak = memory.stop();
                sum.peak_bytes = [0, 1].map(|side| sum.peak_bytes[side].max(peak[side]));
                sum.wire_bytes = wire_bytes.map(|bytes| bytes + sum.wire_bytes.unwrap_or(0));
            }
        }
        let source = &self.source;
        let of_tar = self
            .tar_bytes
            .get_or_insert_with(|| (bytes_of(&packing(source, COMPRESSED)), bytes_of(&packing(source, ""))));
        sums[TAR].wire_bytes = Some(of_tar.0 * u64::from(self.rounds));
        if let Some(tls) = sums.get_mut(RSYNC + 1) {
            tls.wire_bytes = Some(of_tar.1);
        }
        b.cli(&["destroy", &at_receiver]).ok();
        for contender in 1..self.contenders().len() {
            fs::remove_dir_all(self.destination(contender)).unwrap();
        }
        sums
    }

    /// Makes the next change where there are several, and names the snapshot to be pushed.
    fn next_snapshot(&mut self, a: &Node, number: usize, round: u32) -> String {
        if self.rounds == 1 {
            return "new".to_owned();
        }
        let file = (number as u32 * self.rounds + round) * 7 % 1000;
        let path = self.source.join(format!("d{:04}/f{file:06}", file / 100));
        write_random(&path, u64::from(round), 1500);
        let name = format!("r{number}-{round}");
        a.cli(&["snapshot", &format!("data@{name}")]).ok();
        self.base = Some(name.clone());
        name
    }

    /// Sends everything by tar, compressed. It knows no difference to what is there.
    fn by_tar(&self, ssh: &Ssh) -> Option<u64> {
        let destination = self.destination(TAR);
        let destination = destination.display();
        let script = format!(
            "{} | {} \"zstd -q -d | tar -C '{destination}' --numeric-owner --xattrs --acls -xf - && sync -f '{destination}'\"",
            packing(&self.source, COMPRESSED),
            ssh.command_line("localhost")
        );
        run(Command::new("bash").args(["-o", "pipefail", "-c", &script]));
        None
    }

    /// Sends everything by tar as it is, over TLS.
    fn by_tls(&self, tls: &Tls) -> Option<u64> {
        let destination = self.destination(RSYNC + 1);
        let destination = destination.display();
        let unpack = format!("tar -C '{destination}' --numeric-owner --xattrs --acls -xf - && sync -f '{destination}'");
        tls.carry(&packing(&self.source, ""), &unpack);
        None
    }

    /// Sends by rsync, onto what is there already. Returns what it says it has sent and received.
    fn by_rsync(&self, ssh: &Ssh) -> u64 {
        let destination = self.destination(RSYNC);
        let to = format!("localhost:{}/", destination.display());
        let said = run(Command::new("rsync")
            .env("LC_ALL", "C")
            .args(["-a", "--stats", "-e", &ssh.command_line("")])
            .arg(format!("{}/", self.source.display()))
            .arg(to));
        run(Command::new("sync").arg("-f").arg(&destination));
        let number = |line: &str| line.chars().filter(char::is_ascii_digit).collect::<String>().parse::<u64>().unwrap();
        said.lines().filter(|line| line.starts_with("Total bytes ")).map(number).sum()
    }

    fn destination(&self, contender: usize) -> PathBuf {
        self.place.join(format!("received-{contender}"))
    }

    /// Gives a contender what it starts from: rsync the base, tar nothing.
    fn prepare_destination(&self, contender: usize) {
        let destination = self.destination(contender);
        if contender == RSYNC && self.base.is_some() {
            run(Command::new("cp").arg("-a").arg(&self.base_source).arg(&destination));
        } else {
            fs::create_dir(&destination).unwrap();
        }
    }
}

/// Pushes by flocker. Returns what went over the line.
fn by_flocker(a: &Node, snapshot: &str, at_receiver: &str) -> u64 {
    let done = a.cli(&["push", &format!("data@{snapshot}"), "host-b", "--as", at_receiver]).ok();
    done.json()["progress"]["wire_bytes"].as_u64().unwrap()
}

/// What makes the pipe of tar shorter.
const COMPRESSED: &str = " | zstd -q -1";

fn packing(source: &Path, behind: &str) -> String {
    format!("tar -C '{}' --numeric-owner --xattrs --acls -cf - .{behind}", source.display())
}

fn bytes_of(pipe: &str) -> u64 {
    let script = format!("{pipe} | wc -c");
    run(Command::new("bash").args(["-o", "pipefail", "-c", &script])).trim().parse().unwrap()
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
