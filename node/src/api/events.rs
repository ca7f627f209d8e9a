//! `GET /v1/events`: server-sent events, from now on, or after the one named by `Last-Event-ID` (or `?after=`).
//!
//! Each event's data is an [`EventResource`] as JSON; its id and kind are also the `id` and `event` of the frame. The stream ends
//! when the daemon stops.

use std::{convert::Infallible, fmt, str::FromStr, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::HeaderMap,
    response::sse::{Event as Frame, KeepAlive, Sse},
};
use flocker_storage::model::{NodeName, Role, SnapshotName, VolumeName};
use futures_util::Stream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    client::{self, Client},
    server::Query,
    types::{Direction, TransferProgress, TransferState},
};
use crate::{
    daemon::Node,
    events::Place,
    problem::{Result, problem},
};

/// The longest line of the stream.
const LINE_LIMIT: usize = 64 * 1024;

/// How often a quiet stream says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What happened, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventResource {
    /// Its place among the events of this run of the daemon.
    pub id: EventId,
    /// When.
    pub time: Timestamp,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened. More kinds may come; who does not know one passes over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A volume is there: created, cloned, forked, imported or received.
    VolumeAdded {
        /// Its name.
        volume: VolumeName,
    },
    /// A volume has another name.
    VolumeRenamed {
        /// The new one.
        volume: VolumeName,
        /// The old one.
        from: VolumeName,
    },
    /// A volume's metadata, role, epoch, quota or origin changed.
    VolumeChanged {
        /// Its name.
        volume: VolumeName,
        /// Whether its head may be written here.
        role: Role,
        /// Its epoch.
        epoch: u64,
    },
    /// A volume is gone.
    VolumeRemoved {
        /// Its name.
        volume: VolumeName,
    },
    /// A volume has a further snapshot: taken, received, or moved from another volume.
    SnapshotAdded {
        /// The volume.
        volume: VolumeName,
        /// The snapshot.
        snapshot: SnapshotName,
        /// Where it was taken.
        host: NodeName,
    },
    /// A volume has a snapshot less: destroyed, or moved into another volume.
    SnapshotRemoved {
        /// The volume.
        volume: VolumeName,
        /// The snapshot.
        snapshot: SnapshotName,
    },
    /// A volume is mounted.
    Mounted {
        /// The volume.
        volume: VolumeName,
        /// Where.
        path: String,
        /// Whether it may only be read.
        read_only: bool,
    },
    /// A volume is not mounted any more.
    Unmounted {
        /// The volume.
        volume: VolumeName,
    },
    /// A transfer began, moved (once a second at most), or changed its state.
    Transfer {
        /// Its id.
        transfer: String,
        /// Push or pull.
        direction: Direction,
        /// The volume's name at the sender.
        volume: VolumeName,
        /// The peer.
        peer: NodeName,
        /// Where it stands.
        state: TransferState,
        /// How far it is.
        progress: TransferProgress,
        /// Why it stands still or has failed: the problem's code.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        problem: Option<String>,
    },
    /// A node joined the cluster by this node.
    PeerJoined {
        /// Its name.
        peer: NodeName,
    },
    /// What the listener had last is too old, or of another run of the daemon: it may have missed something and looks anew. What
    /// is kept follows.
    Lost,
}

impl Event {
    /// Its kind, as in the field `event`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::VolumeAdded { .. } => "volume-added",
            Self::VolumeRenamed { .. } => "volume-renamed",
            Self::VolumeChanged { .. } => "volume-changed",
            Self::VolumeRemoved { .. } => "volume-removed",
            Self::SnapshotAdded { .. } => "snapshot-added",
            Self::SnapshotRemoved { .. } => "snapshot-removed",
            Self::Mounted { .. } => "mounted",
            Self::Unmounted { .. } => "unmounted",
            Self::Transfer { .. } => "transfer",
            Self::PeerJoined { .. } => "peer-joined",
            Self::Lost => "lost",
        }
    }
}

/// The place of an event: `RUN.NUMBER`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EventId {
    /// The run of the daemon.
    pub run: Uuid,
    /// Counts from 1.
    pub number: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.run.simple(), self.number)
    }
}

/// The text is no id of an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the id of an event: write it as it was told, RUN.NUMBER")]
pub struct NotAnEventId(String);

impl FromStr for EventId {
    type Err = NotAnEventId;

    fn from_str(text: &str) -> std::result::Result<Self, NotAnEventId> {
        let parsed = || {
            let (run, number) = text.split_once('.')?;
            Some(Self { run: Uuid::try_parse(run).ok()?, number: number.parse().ok().filter(|it| *it < u64::MAX)? })
        };
        parsed().ok_or_else(|| NotAnEventId(text.chars().take(80).collect()))
    }
}

impl TryFrom<String> for EventId {
    type Error = NotAnEventId;
    fn try_from(text: String) -> std::result::Result<Self, NotAnEventId> {
        text.parse()
    }
}

impl From<EventId> for String {
    fn from(id: EventId) -> Self {
        id.to_string()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventsQuery {
    after: Option<String>,
}

pub(crate) async fn events(
    State(node): State<Arc<Node>>,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = std::result::Result<Frame, Infallible>>>> {
    let last = headers.get("last-event-id").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let place = match last.or(query.after) {
        None => node.events.newest_place(),
        Some(text) => {
            Place(text.parse().map_err(|error: NotAnEventId| problem(400, "bad_request", error.to_string()))?)
        }
    };
    tracing::info!(after = %place.0, "somebody listens to events");
    let stream = futures_util::stream::unfold((node, place), |(node, mut place)| async move {
        let told = node.events.next(&mut place).await?;
        let frame = Frame::default().id(told.id.to_string()).event(told.event.kind());
        let frame = frame.data(serde_json::to_string(&told).unwrap_or_default());
        Some((Ok(frame), (node, place)))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

impl Client {
    /// Listens to what happens: from now on, or after an event. Returns at the end of the stream, which comes when the daemon stops;
    /// where `on_event` returns an error, that ends the listening and is returned.
    pub async fn events<E>(
        &self,
        after: Option<EventId>,
        mut on_event: impl FnMut(EventResource) -> std::result::Result<(), E>,
    ) -> client::Result<std::result::Result<(), E>> {
        let query = after.map(|id| format!("?after={id}")).unwrap_or_default();
        let mut lines = self.lines(format!("/v1/events{query}"), LINE_LIMIT).await?;
        while let Some(told) = lines.next_data().await? {
            if let Err(error) = on_event(told) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_event_is_flat_json_with_its_kind_and_comes_back() {
        let id = EventId { run: Uuid::from_u128(7), number: 3 };
        let event = Event::SnapshotAdded {
            volume: "db".parse().unwrap(),
            snapshot: "one".parse().unwrap(),
            host: "host-a".parse().unwrap(),
        };
        let told = EventResource { id, time: "2026-01-02T03:04:05Z".parse().unwrap(), event };
        let json = serde_json::to_value(&told).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "id": "00000000000000000000000000000007.3", "time": "2026-01-02T03:04:05Z",
                "event": "snapshot-added", "volume": "db", "snapshot": "one", "host": "host-a",
            })
        );
        assert_eq!(json["event"], told.event.kind());
        assert_eq!(serde_json::from_value::<EventResource>(json).unwrap(), told);
        for wrong in ["", "7", "x.1", "00000000000000000000000000000007.", "00000000000000000000000000000007.-1"] {
            assert!(wrong.parse::<EventId>().is_err(), "{wrong:?}");
        }
    }
}
