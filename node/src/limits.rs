//! How fast this node sends, by peer and by time of day: the configuration's `[[limits]]`.
//!
//! Owns which limit holds for which peer and when. Each limit is one rate for all transfers that it matches, which share it evenly; a
//! transfer keeps to all limits that match it, and to its own (`--limit`). Refuses to know how a rate is kept
//! ([`flocker_transport::Gate`]).

use std::{num::NonZeroU64, sync::Arc};

use flocker_storage::{clock, model::NodeName};
use flocker_transport::Gate;
use jiff::{civil::Time, tz::TimeZone};
use serde::{Deserialize, Serialize};

use crate::{api::types::SLOWEST_LIMIT, config::matches, size::Size};

/// Bytes per second that are sent to some peers together, always or at some time of the day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, try_from = "Written", into = "Written")]
pub struct Limit {
    /// A peer's name; `*` at the end stands for anything.
    pub peer: String,
    /// Bytes per second on the wire.
    pub bytes_per_second: NonZeroU64,
    /// From the first time of day until before the second, local time, over midnight where the second is earlier; always where there
    /// is none.
    pub hours: Option<(Time, Time)>,
}

/// A limit as it is written: `peer = "host-b"`, `rate = "20M"`, `from = "08:00"`, `until = "18:00"`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default = "any_peer")]
    peer: String,
    rate: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<String>,
}

fn any_peer() -> String {
    "*".to_owned()
}

impl TryFrom<Written> for Limit {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Size(rate) = written.rate.parse().map_err(|error| format!("rate {:?}: {error}", written.rate))?;
        let rate = NonZeroU64::new(rate).filter(|rate| rate.get() >= SLOWEST_LIMIT);
        let bytes_per_second = rate.ok_or_else(|| format!("rate {:?}: it must be 1K at least", written.rate))?;
        let hours = match (&written.from, &written.until) {
            (None, None) => None,
            (Some(from), Some(until)) => Some((time_of_day(from)?, time_of_day(until)?)),
            _ => return Err("a limit by time of day has both `from` and `until`".to_owned()),
        };
        if hours.is_some_and(|(from, until)| from == until) {
            return Err("`from` and `until` are the same; leave both away for a limit that always holds".to_owned());
        }
        Ok(Self { peer: written.peer, bytes_per_second, hours })
    }
}

impl From<Limit> for Written {
    fn from(limit: Limit) -> Self {
        let written = |time: Time| time.strftime("%H:%M").to_string();
        Self {
            peer: limit.peer,
            rate: limit.bytes_per_second.to_string(),
            from: limit.hours.map(|(from, _)| written(from)),
            until: limit.hours.map(|(_, until)| written(until)),
        }
    }
}

fn time_of_day(text: &str) -> Result<Time, String> {
    Time::strptime("%H:%M", text).map_err(|_| format!("{text:?} is not a time of day such as 08:00 or 23:30"))
}

impl Limit {
    /// Tells whether it holds at a local time of day.
    fn holds_at(&self, now: Time) -> bool {
        match self.hours {
            None => true,
            Some((from, until)) if from <= until => (from..until).contains(&now),
            Some((from, until)) => now >= from || now < until,
        }
    }
}

/// The limits of a running node.
pub(crate) struct SendLimits(Vec<(String, Arc<Gate>)>);

impl SendLimits {
    /// Takes over what is configured. Times of day are those of a time zone.
    pub(crate) fn new(limits: &[Limit], zone: &TimeZone) -> Self {
        let gate = |limit: &Limit| {
            let (limit, zone) = (limit.clone(), zone.clone());
            Gate::new(move || limit.holds_at(zone.to_datetime(clock::now()).time()).then_some(limit.bytes_per_second))
        };
        Self(limits.iter().map(|limit| (limit.peer.clone(), gate(limit))).collect())
    }

    /// Returns what a transfer to a peer passes: the limits that match the peer, and its own.
    pub(crate) fn gates(&self, peer: &NodeName, own: Option<NonZeroU64>) -> Vec<Arc<Gate>> {
        let shared = self.0.iter().filter(|(pattern, _)| matches(pattern, peer.as_str())).map(|(_, gate)| gate.clone());
        shared.chain(own.map(Gate::fixed)).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn read(text: &str) -> Result<Limit, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_limit_holds_within_its_hours_over_midnight_too() {
        let at = |text: &str| time_of_day(text).unwrap();
        let day = read("rate = \"20M\"\nfrom = \"08:00\"\nuntil = \"18:00\"").unwrap();
        assert_eq!(["07:59", "08:00", "17:59", "18:00"].map(|now| day.holds_at(at(now))), [false, true, true, false]);
        let night = read("rate = \"20M\"\nfrom = \"22:00\"\nuntil = \"06:00\"").unwrap();
        assert_eq!(["21:59", "22:00", "00:00", "06:00"].map(|now| night.holds_at(at(now))), [false, true, true, false]);
        assert!(read("rate = \"1K\"").unwrap().holds_at(at("12:00")));
    }

    #[test]
    fn what_is_not_a_limit_is_refused_with_the_reason() {
        for (text, reason) in [
            ("rate = \"fast\"", "it is not a size"),
            ("rate = \"100\"", "1K at least"),
            ("rate = \"1M\"\nfrom = \"08:00\"", "both `from` and `until`"),
            ("rate = \"1M\"\nfrom = \"8 am\"\nuntil = \"18:00\"", "is not a time of day"),
            ("rate = \"1M\"\nfrom = \"08:00\"\nuntil = \"08:00\"", "are the same"),
            ("rate = \"1M\"\npeers = \"b\"", "unknown field"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn a_limit_is_written_as_it_is_read() {
        let limit = read("peer = \"db-*\"\nrate = \"1.5M\"\nfrom = \"08:30\"\nuntil = \"18:00\"").unwrap();
        assert_eq!(read(&toml::to_string(&limit).unwrap()).unwrap(), limit);
    }

    #[test]
    fn a_transfer_passes_the_gates_of_all_limits_that_match_its_peer_and_its_own() {
        let limits = ["peer = \"host-b\"\nrate = \"1M\"", "rate = \"2M\"", "peer = \"rack-*\"\nrate = \"3M\""];
        let limits = SendLimits::new(&limits.map(|text| read(text).unwrap()), &TimeZone::UTC);
        assert_eq!(limits.gates(&"host-b".parse().unwrap(), None).len(), 2);
        assert_eq!(limits.gates(&"rack-7".parse().unwrap(), NonZeroU64::new(4096)).len(), 3);
        assert_eq!(limits.gates(&"host-c".parse().unwrap(), None).len(), 1);
        // One gate for all of them, not one each.
        assert!(Arc::ptr_eq(
            &limits.gates(&"host-c".parse().unwrap(), None)[0],
            &limits.gates(&"rack-7".parse().unwrap(), None)[0]
        ));
    }
}
