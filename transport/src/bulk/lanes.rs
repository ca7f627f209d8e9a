//! Frames that arrive by several lanes, in the order of the delta.
//!
//! Owns which lane has the frame that is due. On each lane frames rise, so that the one that is due is the next of its lane, and
//! no lane has to be read far ahead. Refuses to know what frames hold.

use std::{
    future::poll_fn,
    task::{Context, Poll},
};

use tokio::sync::mpsc;

/// Something that arrives on a lane.
pub(super) trait Numbered {
    /// Its place in the delta; `None` for what is due at once, wherever it comes.
    fn sequence(&self) -> Option<u64>;
}

/// What the next frame is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<T> {
    /// The one that was due, or one without a number.
    Due(T),
    /// No lane can have it: the lowest there is.
    Gap(u64),
    /// All lanes have ended.
    Nothing,
}

/// The lanes of one run.
pub(super) struct Lanes<T> {
    /// Lanes that begin.
    beginning: mpsc::Receiver<mpsc::Receiver<T>>,
    lanes: Vec<Lane<T>>,
}

struct Lane<T> {
    arrivals: mpsc::Receiver<T>,
    head: Option<T>,
    ended: bool,
}

impl<T: Numbered> Lanes<T> {
    pub(super) fn new(beginning: mpsc::Receiver<mpsc::Receiver<T>>) -> Self {
        Self { beginning, lanes: Vec::new() }
    }

    /// Waits for the frame with this number.
    pub(super) async fn next(&mut self, due: u64) -> Next<T> {
        poll_fn(|cx| self.poll(due, cx)).await
    }

    fn poll(&mut self, due: u64, cx: &mut Context<'_>) -> Poll<Next<T>> {
        let mut more = loop {
            match self.beginning.poll_recv(cx) {
                Poll::Ready(Some(arrivals)) => self.lanes.push(Lane { arrivals, head: None, ended: false }),
                Poll::Ready(None) => break false,
                Poll::Pending => break true,
            }
        };
        let mut lowest = None;
        for lane in &mut self.lanes {
            if lane.head.is_none() && !lane.ended {
                match lane.arrivals.poll_recv(cx) {
                    Poll::Ready(arrived) => (lane.ended, lane.head) = (arrived.is_none(), arrived),
                    Poll::Pending => more = true,
                }
            }
            match lane.head.as_ref().map(Numbered::sequence) {
                Some(Some(sequence)) if sequence != due => {
                    lowest = Some(lowest.map_or(sequence, |lowest: u64| lowest.min(sequence)));
                }
                Some(_) => return lane.head.take().map_or(Poll::Pending, |head| Poll::Ready(Next::Due(head))),
                None => {}
            }
        }
        match lowest {
            _ if more => Poll::Pending,
            Some(sequence) => Poll::Ready(Next::Gap(sequence)),
            None => Poll::Ready(Next::Nothing),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    impl Numbered for u64 {
        fn sequence(&self) -> Option<u64> {
            (*self < 100).then_some(*self)
        }
    }

    /// Lanes with these frames, all of which have ended.
    fn lanes(of: &[&[u64]]) -> Lanes<u64> {
        let (begin, beginning) = mpsc::channel(8);
        for frames in of {
            let (arrive, arrivals) = mpsc::channel(8);
            frames.iter().for_each(|frame| arrive.try_send(*frame).unwrap());
            begin.try_send(arrivals).unwrap();
        }
        Lanes::new(beginning)
    }

    #[tokio::test]
    async fn frames_of_all_lanes_come_in_one_row() {
        let mut lanes = lanes(&[&[0, 3, 4], &[2, 5], &[1]]);
        for due in 0..6 {
            assert_eq!(lanes.next(due).await, Next::Due(due));
        }
        assert_eq!(lanes.next(6).await, Next::Nothing);
    }

    #[tokio::test]
    async fn a_gap_that_no_lane_can_fill_is_seen() {
        let mut lanes = lanes(&[&[0, 4], &[3]]);
        assert_eq!(lanes.next(0).await, Next::Due(0));
        assert_eq!(lanes.next(1).await, Next::Gap(3));
    }

    #[tokio::test]
    async fn what_has_no_number_does_not_wait_for_its_turn() {
        assert_eq!(lanes(&[&[1], &[100]]).next(0).await, Next::Due(100));
    }

    #[tokio::test]
    async fn a_lane_that_begins_late_is_waited_for() {
        let (begin, beginning) = mpsc::channel(8);
        let mut lanes = Lanes::new(beginning);
        let (arrive, arrivals) = mpsc::channel(8);
        begin.try_send(arrivals).unwrap();
        arrive.try_send(1).unwrap();
        let late = async {
            tokio::task::yield_now().await;
            let (arrive, arrivals) = mpsc::channel(8);
            arrive.try_send(0).unwrap();
            begin.try_send(arrivals).unwrap();
        };
        let (next, ()) = tokio::join!(lanes.next(0), late);
        assert_eq!((next, lanes.next(1).await), (Next::Due(0), Next::Due(1)));
    }
}
