//! What the seed decides for each node: its clock, its ids, how long its pool takes, and where it dies.

use std::{
    cell::RefCell,
    collections::HashMap,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use flocker_storage::{drivers::memory::MemoryPool, simulation::Hooks};
use jiff::{SignedDuration, Timestamp};
use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};
use tokio::runtime::{Handle, Id};
use uuid::Uuid;

/// What a node that died at a fault point unwinds with. No panic hook sees it.
pub(crate) struct Died;

/// All nodes' fates; the hooks of this thread.
pub(crate) struct Fates {
    inner: RefCell<Inner>,
    /// The bug that is put back.
    put_back: Option<&'static str>,
}

struct Inner {
    rng: SmallRng,
    nodes: Vec<Fate>,
    /// Which node a runtime is of.
    runtimes: HashMap<Id, usize>,
    /// What the nodes have done that is counted, since it was last taken.
    noted: Vec<(usize, &'static str)>,
}

struct Fate {
    pool: Arc<MemoryPool>,
    /// How far its clock is off.
    skew: SignedDuration,
    dead: Arc<AtomicBool>,
    /// It dies when it has passed so many fault points more.
    doomed_in: Option<u32>,
    died_at: Option<String>,
    slow: bool,
}

impl Fates {
    pub(crate) fn new(seed: u64, pools: Vec<Arc<MemoryPool>>, put_back: Option<&'static str>) -> Rc<Self> {
        let mut rng = SmallRng::seed_from_u64(seed ^ 0xfa7e);
        let nodes = pools
            .into_iter()
            .map(|pool| Fate {
                pool,
                skew: SignedDuration::from_millis(rng.random_range(-3_600_000..3_600_000)),
                dead: Arc::default(),
                doomed_in: None,
                died_at: None,
                slow: false,
            })
            .collect();
        let inner = Inner { rng, nodes, runtimes: HashMap::new(), noted: Vec::new() };
        Rc::new(Self { inner: RefCell::new(inner), put_back })
    }

    /// Notes that this runtime is now a node's; returns the flag that says it is dead.
    pub(crate) fn born(&self, node: usize) -> Arc<AtomicBool> {
        let mut inner = self.inner.borrow_mut();
        inner.runtimes.insert(Handle::current().id(), node);
        inner.nodes[node].dead = Arc::default();
        inner.nodes[node].dead.clone()
    }

    /// Lets a node die at one of the next fault points that it passes.
    pub(crate) fn doom(&self, node: usize, passes: u32) {
        self.inner.borrow_mut().nodes[node].doomed_in = Some(passes);
    }

    /// Kills a node's pool and line now. The process itself is ended by the caller.
    pub(crate) fn kill(&self, node: usize) {
        let mut inner = self.inner.borrow_mut();
        inner.nodes[node].doomed_in = None;
        inner.nodes[node].died_at = None;
        inner.nodes[node].die();
    }

    /// Returns where a node has died by itself since the last call.
    pub(crate) fn take_death(&self, node: usize) -> Option<String> {
        self.inner.borrow_mut().nodes[node].died_at.take()
    }

    /// Nobody dies at a fault point from now on, and pools are quick.
    pub(crate) fn relent(&self) {
        for fate in &mut self.inner.borrow_mut().nodes {
            (fate.doomed_in, fate.slow) = (None, false);
        }
    }

    /// Makes a node's pool slow, or quick again.
    pub(crate) fn set_slow(&self, node: usize, slow: bool) {
        self.inner.borrow_mut().nodes[node].slow = slow;
    }

    /// Returns what nodes have done that is counted since the last call: who, and what.
    pub(crate) fn take_noted(&self) -> Vec<(usize, &'static str)> {
        std::mem::take(&mut self.inner.borrow_mut().noted)
    }

    /// Returns bytes that follow from the seed.
    pub(crate) fn random(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        self.inner.borrow_mut().rng.fill_bytes(&mut bytes);
        bytes
    }
}

impl Fate {
    fn die(&self) {
        self.dead.store(true, Ordering::SeqCst);
        self.pool.crash();
    }
}

impl Inner {
    fn here(&self) -> Option<usize> {
        self.runtimes.get(&Handle::try_current().ok()?.id()).copied()
    }
}

impl Hooks for Fates {
    fn now(&self) -> Timestamp {
        let inner = self.inner.borrow();
        let skew = inner.here().map_or(SignedDuration::ZERO, |node| inner.nodes[node].skew);
        let elapsed = turmoil::sim_elapsed().unwrap_or_default();
        let start = Timestamp::from_second(1_780_000_000).unwrap();
        start + skew + SignedDuration::try_from(elapsed).unwrap()
    }

    fn mint(&self) -> Uuid {
        let millis = self.now().as_millisecond() as u64;
        let mut random = [0; 10];
        self.inner.borrow_mut().rng.fill_bytes(&mut random);
        uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid()
    }

    fn passed(&self, fault_point: &str) {
        let mut inner = self.inner.borrow_mut();
        let Some(node) = inner.here() else { return };
        let fate = &mut inner.nodes[node];
        if !fate.dead.load(Ordering::SeqCst) {
            match fate.doomed_in {
                Some(0) => {
                    (fate.doomed_in, fate.died_at) = (None, Some(fault_point.to_owned()));
                    fate.die();
                }
                Some(passes) => {
                    fate.doomed_in = Some(passes - 1);
                    return;
                }
                None => return,
            }
        }
        drop(inner);
        std::panic::resume_unwind(Box::new(Died));
    }

    fn pause(&self) -> Duration {
        let mut inner = self.inner.borrow_mut();
        let slow = inner.here().is_some_and(|node| inner.nodes[node].slow);
        let most = if slow { 120 } else { 4 };
        Duration::from_millis(inner.rng.random_range(0..=most))
    }

    fn noted(&self, what: &'static str) {
        let mut inner = self.inner.borrow_mut();
        if let Some(node) = inner.here() {
            inner.noted.push((node, what));
        }
    }

    fn is_put_back(&self, bug: &str) -> bool {
        self.put_back == Some(bug)
    }
}
