//! Holding a sender back to a rate: a token bucket that is paid before each piece is written.
//!
//! Owns when the next piece may go. Counts what frames take on the wire, without QUIC's own headers. Neighbour:
//! [`super::outgoing`], which writes the pieces.

use std::{num::NonZeroU64, time::Duration};

use tokio::time::Instant;

/// What a wait that was too long, or a source that was late, may be made up for: less than anybody would call a burst.
const SLACK: Duration = Duration::from_millis(50);
/// A piece takes about this part of a second, within bounds that keep both the waits and the writes sensible.
const PIECES_PER_SECOND: u64 = 50;
const SMALLEST_PIECE: u64 = 1024;
const LARGEST_PIECE: u64 = 64 * 1024;
/// A slower sender would look like a dead one to its receiver.
const SLOWEST: u64 = 1024;

/// A rate that is kept from one piece to the next.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    /// When all that was admitted has been paid for.
    paid_at: Instant,
}

impl Pace {
    pub(super) fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second: bytes_per_second.get().max(SLOWEST), paid_at: Instant::now() }
    }

    /// How much is best admitted at once.
    pub(super) fn piece(&self) -> usize {
        (self.bytes_per_second / PIECES_PER_SECOND).clamp(SMALLEST_PIECE, LARGEST_PIECE) as usize
    }

    /// Waits until so many bytes may be written. Cancel-safe: they count as written from the beginning of the wait.
    pub(super) async fn admit(&mut self, bytes: usize) {
        let now = Instant::now();
        let earliest = now.checked_sub(SLACK).unwrap_or(now);
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.paid_at = self.paid_at.max(earliest) + cost;
        if self.paid_at > now {
            tokio::time::sleep_until(self.paid_at).await;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    async fn seconds_for(pace: &mut Pace, bytes: usize) -> f64 {
        let began = Instant::now();
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(pace.piece());
            pace.admit(piece).await;
            left -= piece;
        }
        began.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_kept_to_one_percent_in_the_clocks_own_time() {
        for rate in [2_000, 100_000, 20 << 20, 1 << 30] {
            let mut pace = Pace::new(NonZeroU64::new(rate).unwrap());
            let took = seconds_for(&mut pace, 10 * rate as usize).await;
            assert!((9.9..10.1).contains(&took), "{rate}: {took} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_not_followed_by_a_burst() {
        let mut pace = Pace::new(NonZeroU64::new(1 << 20).unwrap());
        seconds_for(&mut pace, 1 << 20).await;
        tokio::time::advance(Duration::from_secs(3600)).await;
        let took = seconds_for(&mut pace, 1 << 20).await;
        assert!(took > 0.9, "{took} s");
    }
}
