//! Numbers for a monitoring system, in the OpenMetrics text format.
//!
//! Owns their names and what is counted while the node runs; what can be looked up (volumes, the pool's space, transfers under way) is
//! looked up when somebody asks. Refuses to know who asks (`api`). Counters begin at zero with each start of the daemon.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

use flocker_storage::model::NodeName;
use flocker_transport::Progress;
use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

use crate::{
    api::types::{TransferResource, TransferState},
    daemon::Node,
    problem::{Result, internal},
};

type Labels<const N: usize> = [(&'static str, String); N];

/// What is counted.
pub(crate) struct Metrics {
    ended: Family<Labels<2>, Counter>,
    seconds: Family<Labels<1>, Histogram, fn() -> Histogram>,
    resumed: Family<Labels<1>, Counter>,
    delta_bytes: Family<Labels<2>, Counter>,
    wire_bytes: Family<Labels<2>, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            ended: Family::default(),
            // From 10 ms to 11 hours.
            seconds: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.01, 4.0, 12))),
            resumed: Family::default(),
            delta_bytes: Family::default(),
            wire_bytes: Family::default(),
        }
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Way {
    /// To a peer.
    Sent,
    /// From a peer.
    Received,
}

impl Way {
    fn word(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Received => "received",
        }
    }
}

/// Counts what one delta moves over one link.
pub(crate) struct Meter {
    delta: (Counter, AtomicU64),
    wire: (Counter, AtomicU64),
}

impl Meter {
    /// Notes how far it is.
    pub(crate) fn moved(&self, progress: &Progress) {
        for ((counter, before), now) in [(&self.delta, progress.raw_bytes), (&self.wire, progress.wire_bytes)] {
            counter.inc_by(now.saturating_sub(before.swap(now, Ordering::Relaxed)));
        }
    }
}

impl Metrics {
    /// Begins to count what is moved between this node and a peer; `before` was counted on an earlier link.
    pub(crate) fn meter(&self, way: Way, peer: &NodeName, before: &Progress) -> Meter {
        let labels = [("direction", way.word().to_owned()), ("peer", peer.to_string())];
        let counter = |family: &Family<Labels<2>, Counter>| family.get_or_create(&labels).clone();
        Meter {
            delta: (counter(&self.delta_bytes), AtomicU64::new(before.raw_bytes)),
            wire: (counter(&self.wire_bytes), AtomicU64::new(before.wire_bytes)),
        }
    }

    /// Counts a transfer that is over.
    pub(crate) fn ended(&self, transfer: &TransferResource) {
        let direction = word(transfer.direction);
        self.ended.get_or_create(&[("direction", direction.clone()), ("state", word(transfer.state))]).inc();
        if transfer.state == TransferState::Done && !transfer.dry_run {
            let seconds = transfer.progress.elapsed_ms as f64 / 1000.0;
            self.seconds.get_or_create(&[("direction", direction.clone())]).observe(seconds);
        }
        let resumed = u64::from(transfer.progress.resumed);
        self.resumed.get_or_create(&[("direction", direction)]).inc_by(resumed);
    }
}

/// Returns the word that the API has for a value.
fn word(value: impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

impl Node {
    /// Writes all numbers down.
    pub(crate) async fn metrics_text(&self) -> Result<String> {
        let usage = self.driver.usage().await?;
        let mut registry = Registry::with_prefix("flocker");
        registry.register(
            "build",
            "The program",
            Info::new([("version", env!("CARGO_PKG_VERSION").to_owned()), ("node", self.name.to_string())]),
        );
        let counted = &self.metrics;
        registry.register("transfers", "Transfers that are over, by how they ended", counted.ended.clone());
        registry.register_with_unit(
            "transfer_duration",
            "How long transfers that are done took",
            Unit::Seconds,
            counted.seconds.clone(),
        );
        registry.register(
            "transfer_resumptions",
            "How often transfers that are over went on after a lost line or a restart",
            counted.resumed.clone(),
        );
        registry.register_with_unit(
            "delta",
            "Bytes of deltas that the receiver has taken in, before compression",
            Unit::Bytes,
            counted.delta_bytes.clone(),
        );
        registry.register_with_unit(
            "wire",
            "Bytes that these deltas took on the wire, without QUIC's headers",
            Unit::Bytes,
            counted.wire_bytes.clone(),
        );
        let mut open: BTreeMap<String, i64> = BTreeMap::new();
        for state in [TransferState::Running, TransferState::Interrupted, TransferState::Paused] {
            open.insert(word(state), 0);
        }
        let mut rate = 0;
        for transfer in self.transfers.list().iter().filter(|transfer| !transfer.state.is_final()) {
            *open.entry(word(transfer.state)).or_default() += 1;
            rate += transfer.progress.rate_bytes_per_second;
        }
        let gauge = |value: u64| {
            let gauge: Gauge = Gauge::default();
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            gauge
        };
        let by = |label: &'static str, values: &BTreeMap<String, i64>| {
            let family = Family::<Labels<1>, Gauge>::default();
            for (value, count) in values {
                family.get_or_create(&[(label, value.clone())]).set(*count);
            }
            family
        };
        registry.register("open_transfers", "Transfers that are not over", by("state", &open));
        registry.register(
            "open_transfers_rate_bytes_per_second",
            "Delta bytes per second of the transfers under way that were started here",
            gauge(rate),
        );
        let mut volumes: BTreeMap<String, i64> = BTreeMap::new();
        let mut snapshots = 0;
        for volume in self.catalog.volumes() {
            *volumes.entry(word(volume.record.role)).or_default() += 1;
            snapshots += volume.snapshots.len() as u64;
        }
        registry.register("volumes", "Volumes, by this node's role", by("role", &volumes));
        registry.register("snapshots", "Snapshots of all volumes", gauge(snapshots));
        registry.register_with_unit("pool_size", "All the pool holds", Unit::Bytes, gauge(usage.total_bytes));
        registry.register_with_unit(
            "pool_available",
            "What can still be written",
            Unit::Bytes,
            gauge(usage.available_bytes),
        );
        registry.register(
            "peers",
            "Nodes of the cluster that this one knows",
            gauge(self.peer_resources().len() as u64),
        );
        let node = self.resource();
        registry.register_with_unit("resident_memory", "Of the daemon", Unit::Bytes, gauge(node.resident_bytes));
        registry.register(
            "certificate_expiry_timestamp_seconds",
            "When this node's certificate ends",
            gauge(node.certificate_expires.as_second().unsigned_abs()),
        );
        let mut text = String::new();
        encode(&mut text, &registry).map_err(internal)?;
        Ok(text)
    }
}
