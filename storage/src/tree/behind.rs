//! Work that is done behind who has it done, in order, on a thread of its own once it is worth one.
//!
//! Owns that thread, and what the work is done with. An error shows at a later call, at the latest when all is done. All calls
//! block. Neighbours: [`super::apply`] and [`super::inventory`] hand work over.
//!
//! | state | `here` | `hand_over` | `rest` |
//! |---|---|---|---|
//! | idle | done at once; → failed where that fails | → working | idle |
//! | working | as `hand_over` | waits for its turn; → failed where earlier work failed | → idle, or → failed |
//! | failed | an error | an error | failed |

use std::{
    fmt, mem,
    sync::mpsc::{SyncSender, sync_channel},
    thread::{self, JoinHandle},
};

use crate::error::{Error, ErrorKind, Result};

/// Does one piece.
type Take<W, P> = fn(&mut W, P) -> Result<()>;

/// What pieces of work are handed to. Dropping it waits for what was handed over.
pub(super) struct Behind<W, P> {
    name: &'static str,
    take: Take<W, P>,
    state: State<W, P>,
}

enum State<W, P> {
    Idle(Box<W>),
    Working { pieces: SyncSender<P>, thread: JoinHandle<Result<Box<W>>> },
    Failed(Option<Error>),
}

impl<W: Send + 'static, P: Send + 'static> Behind<W, P> {
    /// `name` is the thread's, for whoever lists threads.
    pub(super) fn new(name: &'static str, work: W, take: Take<W, P>) -> Self {
        Self { name, take, state: State::Idle(Box::new(work)) }
    }

    /// Does a piece at once, unless earlier ones are at work.
    pub(super) fn here(&mut self, piece: P) -> Result<()> {
        let State::Idle(work) = &mut self.state else { return self.hand_over(piece) };
        if let Err(error) = (self.take)(work, piece) {
            self.state = State::Failed(Some(error));
            return self.failed();
        }
        Ok(())
    }

    /// Has a piece done; waits while another one waits. Why that failed, [`take_failure`](Self::take_failure) tells.
    pub(super) fn hand_over(&mut self, piece: P) -> Result<()> {
        self.begin()?;
        if let State::Working { pieces, .. } = &self.state
            && pieces.send(piece).is_ok()
        {
            return Ok(());
        }
        self.failed()
    }

    /// Waits until all is done that was handed over, and lends what it was done with; the first time after a failure the error
    /// of that.
    pub(super) fn rest(&mut self) -> Result<&mut W> {
        self.wait();
        match &mut self.state {
            State::Idle(work) => Ok(work),
            State::Failed(error) => Err(error.take().unwrap_or_else(|| failed_before(self.name))),
            State::Working { .. } => Err(failed_before(self.name)),
        }
    }

    /// Rests, and lends what the work was done with; `None` after a failure, which is told by another call.
    pub(super) fn work(&mut self) -> Option<&mut W> {
        self.wait();
        match &mut self.state {
            State::Idle(work) => Some(work),
            State::Working { .. } | State::Failed(_) => None,
        }
    }

    /// Rests, and gives back what the work was done with.
    pub(super) fn into_work(mut self) -> Result<W> {
        self.rest()?;
        match mem::replace(&mut self.state, State::Failed(None)) {
            State::Idle(work) => Ok(*work),
            _ => Err(failed_before(self.name)),
        }
    }

    /// Rests, and takes out why a piece failed.
    pub(super) fn take_failure(&mut self) -> Option<Error> {
        self.wait();
        match &mut self.state {
            State::Failed(error) => error.take(),
            _ => None,
        }
    }

    /// The thread has ended early, or nothing is taken any more.
    fn failed(&mut self) -> Result<()> {
        self.wait();
        Err(failed_before(self.name))
    }

    fn begin(&mut self) -> Result<()> {
        self.state = match mem::replace(&mut self.state, State::Failed(None)) {
            State::Idle(mut work) => {
                let (pieces, arriving) = sync_channel(1);
                let take = self.take;
                let run = move || arriving.iter().try_for_each(|piece| take(&mut work, piece)).map(|()| work);
                let thread = thread::Builder::new().name(self.name.to_owned()).spawn(run);
                let thread = thread.map_err(|error| Error::io("start a thread for", self.name, error))?;
                State::Working { pieces, thread }
            }
            other => other,
        };
        Ok(())
    }

    fn wait(&mut self) {
        self.state = match mem::replace(&mut self.state, State::Failed(None)) {
            State::Working { pieces, thread } => {
                drop(pieces);
                match thread.join() {
                    Ok(Ok(work)) => State::Idle(work),
                    Ok(Err(error)) => State::Failed(Some(error)),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            other => other,
        };
    }
}

impl<W, P> Drop for Behind<W, P> {
    fn drop(&mut self) {
        if let State::Working { pieces, thread } = mem::replace(&mut self.state, State::Failed(None)) {
            drop(pieces);
            let _ = thread.join();
        }
    }
}

impl<W, P> fmt::Debug for Behind<W, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Behind").field("name", &self.name).finish_non_exhaustive()
    }
}

fn failed_before(name: &'static str) -> Error {
    Error::new("go on with", name, ErrorKind::Io(std::io::Error::other("it has failed before")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::{Arc, Mutex};

    use super::*;

    type Done = Arc<Mutex<Vec<u32>>>;

    /// Pieces are numbers; odd hundreds are refused.
    fn behind() -> (Behind<Done, u32>, Done) {
        let done = Done::default();
        let behind = Behind::new("test", Arc::clone(&done), |done, piece| {
            if piece % 200 == 100 {
                return Err(Error::new("do", piece, ErrorKind::NotFound));
            }
            done.lock().unwrap().push(piece);
            Ok(())
        });
        (behind, done)
    }

    #[test]
    fn pieces_are_done_in_order_at_once_and_behind() {
        let (mut behind, done) = behind();
        behind.here(1).unwrap();
        assert_eq!(*done.lock().unwrap(), [1], "done when the call returns");
        (2..50).for_each(|piece| behind.hand_over(piece).unwrap());
        behind.here(50).unwrap();
        assert_eq!(behind.rest().unwrap().lock().unwrap().len(), 50);
        behind.hand_over(51).unwrap();
        assert_eq!(*behind.into_work().unwrap().lock().unwrap(), (1..52).collect::<Vec<_>>());
    }

    #[test]
    fn an_error_is_told_once_and_nothing_is_done_after_it() {
        for at_once in [true, false] {
            let (mut behind, done) = behind();
            let mut hand = |piece| if at_once { behind.here(piece) } else { behind.hand_over(piece) };
            hand(1).unwrap();
            let _ = hand(100);
            while hand(2).is_ok() {}
            let failure = behind.take_failure().unwrap();
            assert!(matches!(failure.kind, ErrorKind::NotFound), "{failure:?}");
            assert!(behind.hand_over(3).is_err());
            assert!(behind.take_failure().is_none());
            assert!(behind.rest().is_err());
            assert_eq!(*done.lock().unwrap(), [1]);
        }
    }

    #[test]
    fn a_drop_waits_for_what_was_handed_over() {
        let (mut behind, done) = behind();
        (1..4).for_each(|piece| behind.hand_over(piece).unwrap());
        drop(behind);
        assert_eq!(*done.lock().unwrap(), [1, 2, 3]);
        assert_eq!(Arc::strong_count(&done), 1);
    }
}
