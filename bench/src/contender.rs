//! Who competes: what each of them is asked to do, and flocker itself.

use std::path::PathBuf;

use flocker_tests::Node;

use crate::account::Counted;

/// What a snapshot is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The receiver is to have it before the clock starts.
    Base,
    /// It is to be sent.
    New,
}

/// One way to bring the contents of a volume to another host.
pub(crate) trait Contender: Send {
    /// Returns what the table calls it.
    fn title(&self) -> String;

    /// Returns the processes whose costs are its own, besides those that it starts.
    fn counted(&self) -> Counted;

    /// Keeps the contents of its head under a name, where it can.
    fn take(&mut self, _snapshot: &str, _role: Role) {}

    /// Makes a place at the receiver, with the base in it where there is one.
    fn prepare(&mut self, base: Option<&str>);

    /// Does what has to be done right before, on nobody's clock.
    fn get_set(&mut self) {}

    /// Brings what the place has to the last of the snapshots, durably: a place with the base, or with nothing. Those before it come, too, where
    /// it knows snapshots. Returns how many bytes travelled, where it can say so.
    fn send(&mut self, base: Option<&str>, snapshots: &[String]) -> Option<u64>;

    /// Returns how many bytes a send of that kind lets travel, where it is only found out by another run, on nobody's clock.
    fn weigh(&mut self, _base: Option<&str>, _snapshots: &[String]) -> Option<u64> {
        None
    }

    /// Returns where what has arrived can be read, where it can.
    fn arrived(&mut self) -> Option<PathBuf>;

    /// Takes the place away.
    fn clean(&mut self);
}

/// Flocker: a push by its command line.
pub(crate) struct Flocker<'a> {
    a: &'a Node,
    b: &'a Node,
    /// Processes that do for it what a kernel does elsewhere.
    systems: Vec<u32>,
    /// What its places at the receiver are called.
    name: &'static str,
    pushes: usize,
    mounted: bool,
}

impl<'a> Flocker<'a> {
    /// Between two nodes. Its head is the volume `data` of the first one.
    pub(crate) fn new(a: &'a Node, b: &'a Node) -> Self {
        Self::on(a, b, Vec::new())
    }

    /// The same, on file systems that are processes.
    pub(crate) fn on(a: &'a Node, b: &'a Node, systems: Vec<u32>) -> Self {
        Self { a, b, systems, name: "pushed", pushes: 0, mounted: false }
    }

    /// One that pushes at the same time as another.
    pub(crate) fn beside(a: &'a Node, b: &'a Node) -> Self {
        Self { name: "beside", ..Self::new(a, b) }
    }

    fn place(&self) -> String {
        format!("{}-{}", self.name, self.pushes)
    }

    fn push(&self, snapshot: &str) -> Option<u64> {
        let done = self.a.cli(&["push", &format!("data@{snapshot}"), "host-b", "--as", &self.place()]).ok();
        done.json()["progress"]["wire_bytes"].as_u64()
    }
}

impl Contender for Flocker<'_> {
    fn title(&self) -> String {
        "flocker".to_owned()
    }

    fn counted(&self) -> Counted {
        Counted { daemons: Some([self.a.pid(), self.b.pid()]), server: None, systems: self.systems.clone() }
    }

    fn take(&mut self, snapshot: &str, _role: Role) {
        self.a.cli(&["snapshot", &format!("data@{snapshot}")]).ok();
    }

    fn prepare(&mut self, base: Option<&str>) {
        self.pushes += 1;
        base.map(|base| self.push(base));
    }

    fn send(&mut self, _base: Option<&str>, snapshots: &[String]) -> Option<u64> {
        self.push(snapshots.last()?)
    }

    fn arrived(&mut self) -> Option<PathBuf> {
        self.mounted = true;
        Some(self.b.mount_to_read(&self.place()))
    }

    fn clean(&mut self) {
        if std::mem::take(&mut self.mounted) {
            self.b.cli(&["unmount", &self.place()]).ok();
        }
        self.b.cli(&["destroy", &self.place()]).ok();
    }
}
