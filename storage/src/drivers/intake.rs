//! Chunks on their way to the thread that takes them in, so that who brings them need not wait for each.
//!
//! Owns that thread, and what it works with. An error of the work shows at a later call, at the latest when all is settled.
//! Refuses to know what is done with a chunk.
//!
//! | state | `write` | `settle` | dropped |
//! |---|---|---|---|
//! | idle | → working | idle | the work goes, at once |
//! | working | the chunk waits for its turn; → failed where an earlier one failed | → idle, or → failed | the work goes: at once where nothing waits, else when the thread is done with it |
//! | failed | an error | an error | – |

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use bytes::Bytes;
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::{mpsc, oneshot},
};

use crate::error::{Error, ErrorKind, Result};

/// Chunks that may wait for the thread: while it takes one in, the next is there.
const CHUNKS_AHEAD: usize = 2;

/// Takes in one chunk. Blocks.
type Take<W> = fn(&mut W, Bytes) -> Result<()>;

/// What takes chunks in, in order.
pub(super) struct Intake<W> {
    operation: &'static str,
    take: Take<W>,
    state: State<W>,
}

enum State<W> {
    Idle(W),
    Working(Worker<W>),
    Failed,
}

struct Worker<W> {
    chunks: mpsc::Sender<Bytes>,
    sent: u64,
    taken: Arc<AtomicU64>,
    work: oneshot::Receiver<Result<W>>,
    thread: thread::JoinHandle<()>,
}

impl<W: Send + 'static> Intake<W> {
    pub(super) fn new(operation: &'static str, work: W, take: Take<W>) -> Self {
        Self { operation, take, state: State::Idle(work) }
    }

    /// Hands a chunk over, as soon as there is room for it. After an error nothing more is taken in.
    pub(super) async fn write(&mut self, chunk: Bytes) -> Result<()> {
        self.begin()?;
        let State::Working(worker) = &mut self.state else { return Err(self.failed_before()) };
        if worker.chunks.send(chunk).await.is_ok() {
            worker.sent += 1;
            return Ok(());
        }
        // The thread has ended early: it says why.
        self.settle().await.and(Err(self.failed_before()))
    }

    /// Waits until all that was handed over is taken in.
    pub(super) async fn settle(&mut self) -> Result<()> {
        self.state = match std::mem::replace(&mut self.state, State::Failed) {
            State::Working(Worker { chunks, work, .. }) => {
                drop(chunks);
                State::Idle(work.await.map_err(|_| self.error("the thread that takes it in stopped"))??)
            }
            State::Idle(work) => State::Idle(work),
            State::Failed => return Err(self.failed_before()),
        };
        Ok(())
    }

    /// Settles, and gives back what it was taken in by.
    pub(super) async fn into_work(mut self) -> Result<W> {
        self.settle().await?;
        match std::mem::replace(&mut self.state, State::Failed) {
            State::Idle(work) => Ok(work),
            _ => Err(self.failed_before()),
        }
    }

    /// Lends what all was taken in by, once that is settled.
    pub(super) fn work(&mut self) -> Option<&mut W> {
        match &mut self.state {
            State::Idle(work) => Some(work),
            State::Working(_) | State::Failed => None,
        }
    }

    fn begin(&mut self) -> Result<()> {
        self.state = match std::mem::replace(&mut self.state, State::Failed) {
            State::Idle(work) => State::Working(self.start(work)?),
            other => other,
        };
        Ok(())
    }

    fn start(&self, mut work: W) -> Result<Worker<W>> {
        let (chunks, mut arriving) = mpsc::channel::<Bytes>(CHUNKS_AHEAD);
        let (done, given_back) = oneshot::channel();
        let taken = Arc::<AtomicU64>::default();
        let (take, counted) = (self.take, Arc::clone(&taken));
        let run = move || {
            while let Some(chunk) = arriving.blocking_recv() {
                if let Err(error) = take(&mut work, chunk) {
                    // Whoever hears of it finds its place cleared away.
                    drop(work);
                    let _ = done.send(Err(error));
                    return;
                }
                counted.fetch_add(1, Ordering::Release);
            }
            let _ = done.send(Ok(work));
        };
        let thread = thread::Builder::new().name("receive".to_owned()).spawn(run);
        let thread = thread.map_err(|error| Error::io(self.operation, "stream", error))?;
        Ok(Worker { chunks, sent: 0, taken, work: given_back, thread })
    }

    fn failed_before(&self) -> Error {
        self.error("the receive failed before")
    }

    fn error(&self, why: &str) -> Error {
        Error::new(self.operation, "stream", ErrorKind::Io(std::io::Error::other(why)))
    }
}

impl<W> Drop for Intake<W> {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.state, State::Failed) {
            State::Failed => {}
            State::Idle(work) => aside(|| drop(work)),
            State::Working(Worker { chunks, sent, taken, work, thread }) => aside(|| {
                drop(chunks);
                if taken.load(Ordering::Acquire) == sent {
                    let _ = thread.join();
                }
                drop(work);
            }),
        }
    }
}

/// Does what may wait, for a thread or for the disk, where no other task waits for it.
fn aside(work: impl FnOnce()) {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        // There is no runtime, or no other thread that could go on with its tasks.
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::{Mutex, mpsc as blocking};

    use super::*;

    /// Takes in what its test lets it, and refuses what begins with a dot.
    struct Work {
        taken: Arc<Mutex<Vec<Vec<u8>>>>,
        permits: blocking::Receiver<()>,
        _slot: Arc<()>,
    }

    struct Rig {
        intake: Intake<Work>,
        taken: Arc<Mutex<Vec<Vec<u8>>>>,
        permits: blocking::SyncSender<()>,
        slot: Arc<()>,
    }

    impl Rig {
        fn new() -> Self {
            let (permits, waited_for) = blocking::sync_channel(9);
            let (taken, slot) = (Arc::default(), Arc::new(()));
            let work = Work { taken: Arc::clone(&taken), permits: waited_for, _slot: Arc::clone(&slot) };
            let intake = Intake::new("receive", work, |work, chunk| {
                work.permits.recv().unwrap();
                if chunk.starts_with(b".") {
                    return Err(Error::new("take in", "chunk", ErrorKind::NotFound));
                }
                work.taken.lock().unwrap().push(chunk.to_vec());
                Ok(())
            });
            Self { intake, taken, permits, slot }
        }

        fn permit(&self, count: usize) {
            (0..count).for_each(|_| self.permits.send(()).unwrap());
        }

        async fn write(&mut self, chunk: &'static str) -> Result<()> {
            self.intake.write(Bytes::from_static(chunk.as_bytes())).await
        }

        fn is_gone(&self) -> bool {
            Arc::strong_count(&self.slot) == 1
        }
    }

    #[tokio::test]
    async fn chunks_are_taken_in_order_and_more_may_come_when_all_is_settled() {
        let mut rig = Rig::new();
        rig.write("a").await.unwrap();
        rig.write("b").await.unwrap();
        assert!(rig.intake.work().is_none());
        assert!(rig.taken.lock().unwrap().is_empty(), "nobody waited for them");
        rig.permit(3);
        rig.intake.settle().await.unwrap();
        assert_eq!(rig.intake.work().unwrap().taken.lock().unwrap().len(), 2);
        rig.write("c").await.unwrap();
        let work = rig.intake.into_work().await.unwrap();
        assert_eq!(*work.taken.lock().unwrap(), [b"a", b"b", b"c"]);
    }

    #[tokio::test]
    async fn an_error_shows_later_and_then_always() {
        let mut rig = Rig::new();
        rig.permit(9);
        rig.write("a").await.unwrap();
        rig.write(".").await.unwrap();
        let failed = rig.intake.settle().await.unwrap_err();
        assert!(matches!(failed.kind, ErrorKind::NotFound), "{failed:?}");
        assert!(rig.is_gone(), "it is let go of before the error is told");
        assert!(rig.write("b").await.is_err());
        assert!(rig.intake.settle().await.is_err());
        assert_eq!(*rig.taken.lock().unwrap(), [b"a"]);
    }

    #[tokio::test]
    async fn who_goes_on_writing_hears_of_the_error() {
        let mut rig = Rig::new();
        rig.permit(1);
        let mut heard = rig.write(".").await;
        while heard.is_ok() {
            heard = rig.write("a").await;
        }
        assert!(matches!(heard.unwrap_err().kind, ErrorKind::NotFound));
        assert!(rig.taken.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_waits_for_nothing_is_let_go_of_at_once() {
        let mut rig = Rig::new();
        rig.permit(1);
        rig.write("a").await.unwrap();
        while rig.taken.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        rig.intake.settle().await.unwrap();
        rig.intake.begin().unwrap();
        let Rig { intake, slot, .. } = rig;
        drop(intake);
        assert_eq!(Arc::strong_count(&slot), 1);
    }

    #[tokio::test]
    async fn a_drop_does_not_wait_for_work() {
        let mut rig = Rig::new();
        rig.write("a").await.unwrap();
        let Rig { intake, permits, slot, taken } = rig;
        drop(intake);
        assert_eq!(Arc::strong_count(&slot), 2, "its thread is at work");
        permits.send(()).unwrap();
        while Arc::strong_count(&slot) > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(*taken.lock().unwrap(), [b"a"]);
    }

    /// What goes only when a task has let it.
    struct Reluctant(blocking::Receiver<()>, blocking::SyncSender<bool>);

    impl Drop for Reluctant {
        fn drop(&mut self) {
            let let_go = self.0.recv_timeout(std::time::Duration::from_secs(60));
            self.1.send(let_go.is_ok()).unwrap();
        }
    }

    /// Drops an intake in a runtime of one thread, whose other task the work waits for; with a chunk taken in before, or none.
    fn dropped_in_a_task(chunk: Option<&'static str>) -> bool {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (let_go, waited_for) = blocking::sync_channel(1);
        let (tell, told) = blocking::sync_channel(1);
        let mut intake = Intake::new("receive", Reluctant(waited_for, tell), |_, _| Ok(()));
        let dropped = runtime.spawn(async move {
            if let Some(chunk) = chunk {
                intake.write(Bytes::from_static(chunk.as_bytes())).await.unwrap();
                intake.settle().await.unwrap();
            }
            let mut other = tokio::task::JoinSet::new();
            other.spawn(async move { let_go.send(()).unwrap() });
            drop(intake);
            other.join_all().await;
        });
        runtime.block_on(dropped).unwrap();
        told.recv().unwrap()
    }

    #[test]
    fn who_lets_go_of_work_that_waits_holds_up_no_other_task() {
        assert!(dropped_in_a_task(None));
        assert!(dropped_in_a_task(Some("a")));
    }
}
