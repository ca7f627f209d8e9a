//! How fast a connection sends: Cubic, which takes no notice of what a line loses by itself.
//!
//! Cubic takes each loss for a queue that is full. A line that loses one packet in a hundred for reasons of its own brings it down to
//! next to nothing. Here a loss slows the sender only where there are signs of a queue: the round trip has grown, or more is lost
//! than a usable line loses. docs/adr/0007 has the figures. Refuses to know what is sent. Neighbour: [`crate::endpoint`].

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, Cubic, CubicConfig};
use quinn_proto::RttEstimator;

/// A loss counts where round trips take longer than the shortest one by more than this part of it.
const GROWTH: u32 = 4;
/// A loss counts where more than one in so many bytes is lost.
const TOLERATED: u64 = 32;
/// Shares are those of about the last so many datagrams: with fewer of them, chance alone would go beyond [`TOLERATED`].
const SAMPLE: u64 = 256;

/// Makes the controller of each connection.
pub(crate) struct PatientConfig {
    cubic: Arc<CubicConfig>,
}

impl PatientConfig {
    /// Begins with this many bytes on the way.
    pub(crate) fn new(initial_window: u64) -> Self {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(initial_window);
        Self { cubic: Arc::new(cubic) }
    }
}

impl ControllerFactory for PatientConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = Cubic::new(self.cubic.clone(), now, current_mtu);
        Box::new(Patient { cubic, losses: Losses::new(current_mtu) })
    }
}

/// Cubic behind [`Losses`].
#[derive(Clone)]
struct Patient {
    cubic: Cubic,
    losses: Losses,
}

impl Controller for Patient {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.losses.acknowledged(bytes, rtt.get());
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        // Without lost bytes it is a router's word for congestion (ECN), which leaves nothing to guess.
        let is_told = is_persistent_congestion || lost_bytes == 0;
        if self.losses.lost(lost_bytes) == Cause::Queue || is_told {
            self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.losses.datagram = new_mtu.into();
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// What a loss is put down to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The line; sending less would not help.
    Line,
    /// A queue that is full.
    Queue,
}

/// The account by which a loss is judged.
#[derive(Debug, Clone)]
struct Losses {
    /// Bytes of a datagram.
    datagram: u64,
    /// Bytes that arrived and that were lost of late.
    acknowledged: u64,
    lost: u64,
    round_trip: Duration,
    shortest: Duration,
}

impl Losses {
    fn new(datagram: u16) -> Self {
        Self {
            datagram: datagram.into(),
            acknowledged: 0,
            lost: 0,
            round_trip: Duration::ZERO,
            shortest: Duration::MAX,
        }
    }

    fn acknowledged(&mut self, bytes: u64, round_trip: Duration) {
        self.acknowledged += bytes;
        self.round_trip = round_trip;
        // quinn's own minimum begins with its first guess, and stays there on a line that is longer.
        self.shortest = self.shortest.min(round_trip);
        if self.acknowledged > SAMPLE * self.datagram {
            self.acknowledged /= 2;
            self.lost /= 2;
        }
    }

    fn lost(&mut self, bytes: u64) -> Cause {
        self.lost += bytes;
        let has_grown = self.round_trip.saturating_sub(self.shortest) > self.shortest / GROWTH;
        let of_late = (self.acknowledged + self.lost).max(SAMPLE * self.datagram);
        let is_much = self.lost > of_late / TOLERATED;
        if has_grown || is_much { Cause::Queue } else { Cause::Line }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATAGRAM: u64 = 1_000;
    const SHORTEST: Duration = Duration::from_millis(100);

    fn arrive(losses: &mut Losses, datagrams: u64) {
        (0..datagrams).for_each(|_| losses.acknowledged(DATAGRAM, SHORTEST));
    }

    fn all_arrived(datagrams: u64) -> Losses {
        let mut losses = Losses::new(DATAGRAM as u16);
        arrive(&mut losses, datagrams);
        losses
    }

    #[test]
    fn one_in_a_hundred_is_the_lines_doing() {
        let mut losses = all_arrived(0);
        for _ in 0..50 {
            arrive(&mut losses, 99);
            assert_eq!(losses.lost(DATAGRAM), Cause::Line);
        }
    }

    #[test]
    fn one_in_ten_is_a_queues_doing() {
        let mut losses = all_arrived(1000);
        let mut last = Cause::Line;
        for _ in 0..50 {
            arrive(&mut losses, 9);
            last = losses.lost(DATAGRAM);
        }
        assert_eq!(last, Cause::Queue);
    }

    #[test]
    fn a_burst_that_is_lost_at_once_is_a_queues_doing() {
        assert_eq!(all_arrived(1000).lost(20 * DATAGRAM), Cause::Queue);
    }

    #[test]
    fn any_loss_is_a_queues_doing_where_round_trips_have_grown() {
        let mut losses = all_arrived(1000);
        losses.acknowledged(DATAGRAM, SHORTEST * 3 / 2);
        assert_eq!(losses.lost(DATAGRAM), Cause::Queue);
    }

    #[test]
    fn a_few_losses_at_the_beginning_are_not_taken_for_many() {
        assert_eq!(all_arrived(10).lost(3 * DATAGRAM), Cause::Line);
    }

    #[test]
    fn a_loss_of_the_line_leaves_the_window_and_one_of_a_queue_does_not() {
        let now = Instant::now();
        let mut patient = Arc::new(PatientConfig::new(100 * DATAGRAM)).build(now, DATAGRAM as u16);
        patient.on_congestion_event(now, now, false, DATAGRAM);
        assert_eq!(patient.window(), 100 * DATAGRAM);

        patient.on_congestion_event(now, now, false, 50 * DATAGRAM);
        assert_eq!(patient.window(), 70 * DATAGRAM);
    }

    #[test]
    fn congestion_that_a_router_tells_of_counts_whatever_was_lost() {
        let now = Instant::now();
        let mut patient = Arc::new(PatientConfig::new(100 * DATAGRAM)).build(now, DATAGRAM as u16);
        patient.on_congestion_event(now, now, false, 0);
        assert_eq!(patient.window(), 70 * DATAGRAM);
    }
}
