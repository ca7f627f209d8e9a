//! Holding senders back to a rate: token buckets that are paid before each piece is written.
//!
//! Owns when the next piece may go. Counts what frames take on the wire, without QUIC's own headers. Neighbour:
//! [`super::outgoing`], which writes the pieces.

use std::{
    num::NonZeroU64,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// What a wait that was too long, or a source that was late, may be made up for: less than anybody would call a burst.
const SLACK: Duration = Duration::from_millis(50);
/// A piece takes about this part of a second, within bounds that keep both the waits and the writes sensible.
const PIECES_PER_SECOND: u64 = 50;
const SMALLEST_PIECE: u64 = 1024;
const LARGEST_PIECE: u64 = 64 * 1024;
/// A slower sender would look like a dead one to its receiver.
const SLOWEST: u64 = 1024;

/// A rate that all deltas that go through it keep together.
///
/// Each of them waits for its piece's turn before it asks for the next, so that they share the rate evenly.
pub struct Gate {
    rate: Box<dyn Fn() -> Option<NonZeroU64> + Send + Sync>,
    /// When all that was admitted has been paid for.
    paid_at: Mutex<Instant>,
}

impl Gate {
    /// A rate, in bytes per second, that is asked for before each piece; none while everything may pass. Must not block.
    pub fn new(rate: impl Fn() -> Option<NonZeroU64> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { rate: Box::new(rate), paid_at: Mutex::new(Instant::now()) })
    }

    /// A rate that stays as it is.
    pub fn fixed(bytes_per_second: NonZeroU64) -> Arc<Self> {
        Self::new(move || Some(bytes_per_second))
    }

    fn bytes_per_second(&self) -> Option<u64> {
        (self.rate)().map(|rate| rate.get().max(SLOWEST))
    }

    /// Counts so many bytes, and returns when they are paid for.
    fn charge(&self, bytes: usize, now: Instant) -> Option<Instant> {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second()? as f64);
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        *paid_at = (*paid_at).max(now.checked_sub(SLACK).unwrap_or(now)) + cost;
        Some(*paid_at)
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("bytes_per_second", &self.bytes_per_second()).finish_non_exhaustive()
    }
}

/// Returns how much is best admitted at once; nothing while no gate holds anything back. At a gate that several share, each has one
/// piece in each round: so a slower gate of one's own makes the pieces smaller only where one would take longer than a second.
pub(super) fn piece(gates: &[Arc<Gate>]) -> Option<usize> {
    let rates = || gates.iter().filter_map(|gate| gate.bytes_per_second());
    let (slowest, fastest) = (rates().min()?, rates().max()?);
    Some((fastest / PIECES_PER_SECOND).min(slowest).clamp(SMALLEST_PIECE, LARGEST_PIECE) as usize)
}

/// Waits until so many bytes may pass all gates. Cancel-safe: they count as written from the beginning of the wait.
pub(super) async fn admit(gates: &[Arc<Gate>], bytes: usize) {
    let now = Instant::now();
    let paid_at = gates.iter().filter_map(|gate| gate.charge(bytes, now)).max();
    if let Some(paid_at) = paid_at.filter(|paid_at| *paid_at > now) {
        tokio::time::sleep_until(paid_at).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn fixed(rate: u64) -> Arc<Gate> {
        Gate::fixed(NonZeroU64::new(rate).unwrap())
    }

    async fn seconds_for(gates: &[Arc<Gate>], bytes: usize) -> f64 {
        let began = Instant::now();
        let mut left = bytes;
        while left > 0 {
            let Some(most) = piece(gates) else { break };
            let piece = left.min(most);
            admit(gates, piece).await;
            left -= piece;
        }
        began.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_kept_to_one_percent_in_the_clocks_own_time() {
        for rate in [2_000, 100_000, 20 << 20, 1 << 30] {
            let took = seconds_for(&[fixed(rate)], 10 * rate as usize).await;
            assert!((9.9..10.1).contains(&took), "{rate}: {took} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_not_followed_by_a_burst() {
        let gates = [fixed(1 << 20)];
        seconds_for(&gates, 1 << 20).await;
        tokio::time::advance(Duration::from_secs(3600)).await;
        let took = seconds_for(&gates, 1 << 20).await;
        assert!(took > 0.9, "{took} s");
    }

    #[tokio::test(start_paused = true)]
    async fn the_slowest_of_several_gates_counts() {
        let took = seconds_for(&[fixed(4 << 20), fixed(1 << 20)], 10 << 20).await;
        assert!((9.9..10.1).contains(&took), "{took} s");
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_share_a_gate_share_its_rate_evenly() {
        let shared = fixed(3 << 20);
        // The third has a slower gate of its own; what it leaves is for the others.
        let gates = [vec![shared.clone()], vec![shared.clone()], vec![shared.clone(), fixed(512 << 10)]];
        let moved: Vec<AtomicU64> = gates.iter().map(|_| AtomicU64::new(0)).collect();
        let one = |index: usize| {
            let (gates, moved) = (&gates[index], &moved[index]);
            async move {
                loop {
                    let bytes = piece(gates).unwrap();
                    admit(gates, bytes).await;
                    moved.fetch_add(bytes as u64, Ordering::Relaxed);
                }
            }
        };
        let all = async { tokio::join!(one(0), one(1), one(2)) };
        assert!(tokio::time::timeout(Duration::from_secs(10), all).await.is_err());
        let shares: Vec<f64> =
            moved.iter().map(|moved| moved.load(Ordering::Relaxed) as f64 / f64::from(10 << 20)).collect();
        assert!((0.475..0.525).contains(&shares[2]), "{shares:?}");
        assert!((1.18..1.32).contains(&shares[0]) && (1.18..1.32).contains(&shares[1]), "{shares:?}");
        assert!((2.95..3.05).contains(&shares.iter().sum::<f64>()), "{shares:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_may_change_and_end_on_the_way() {
        let rate = Arc::new(AtomicU64::new(1 << 20));
        let asked = rate.clone();
        let gates = [Gate::new(move || NonZeroU64::new(asked.load(Ordering::Relaxed)))];
        let slow = seconds_for(&gates, 2 << 20).await;
        rate.store(4 << 20, Ordering::Relaxed);
        let fast = seconds_for(&gates, 8 << 20).await;
        rate.store(0, Ordering::Relaxed);
        let began = Instant::now();
        admit(&gates, 100 << 20).await;
        assert!((1.9..2.1).contains(&slow) && (1.9..2.1).contains(&fast), "{slow} s, {fast} s");
        assert_eq!((piece(&gates), began.elapsed()), (None, Duration::ZERO));
    }
}
