//! What happens on this node, in order, for those who listen.
//!
//! Owns the sequence of events and the last [`KEPT`] of them. A listener has a place in the sequence and no queue of its own,
//! so that a slow one costs nothing: where it has fallen behind what is kept, it is told so and looks anew. Refuses to know how events
//! travel (`api::events`) and to be a journal: they are news, gone with the daemon; what is true lies in the resources.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use flocker_storage::{
    clock,
    model::{Snapshot, SnapshotId},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    api::events::{Event, EventId, EventResource},
    catalog::Volume,
};

/// How many of the last events are kept: an hour of a busy node, and 2 MiB at most.
const KEPT: usize = 4096;

/// The node's events.
pub(crate) struct Events {
    /// Told apart from other runs of the daemon by this.
    run: Uuid,
    kept: Mutex<VecDeque<EventResource>>,
    /// The number of the newest one; 0 before the first.
    newest: watch::Sender<u64>,
    over: CancellationToken,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            run: clock::mint(),
            kept: Mutex::default(),
            newest: watch::Sender::new(0),
            over: CancellationToken::new(),
        }
    }
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, VecDeque<EventResource>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what has happened.
    pub(crate) fn tell(&self, event: Event) {
        let mut kept = self.lock();
        let number = *self.newest.borrow() + 1;
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(EventResource { id: EventId { run: self.run, number }, time: clock::now(), event });
        self.newest.send_replace(number);
    }

    /// Tells how a volume came to be another than it was: added, renamed, changed, removed, and its snapshots.
    pub(crate) fn compare(&self, before: Option<&Volume>, after: Option<&Volume>) {
        let Some(volume) = after.or(before).map(|volume| volume.record.name.clone()) else { return };
        match (before, after) {
            (None, _) => self.tell(Event::VolumeAdded { volume: volume.clone() }),
            (Some(before), Some(after)) => {
                let from = before.record.name.clone();
                let mut renamed = before.record.clone();
                renamed.name.clone_from(&volume);
                if renamed != after.record {
                    let (role, epoch) = (after.record.role, after.record.epoch);
                    self.tell(Event::VolumeChanged { volume: volume.clone(), role, epoch });
                }
                if from != volume {
                    self.tell(Event::VolumeRenamed { volume: volume.clone(), from });
                }
            }
            (Some(_), None) => {}
        }
        let snapshots = |volume: Option<&Volume>| -> BTreeMap<SnapshotId, Snapshot> {
            let held = volume.into_iter().flat_map(|volume| &volume.snapshots);
            held.map(|held| (held.snapshot.id, held.snapshot.clone())).collect()
        };
        let (had, has) = (snapshots(before), snapshots(after));
        for gone in had.values().filter(|snapshot| !has.contains_key(&snapshot.id)) {
            self.tell(Event::SnapshotRemoved { volume: volume.clone(), snapshot: gone.name.clone() });
        }
        for new in has.values().filter(|snapshot| !had.contains_key(&snapshot.id)) {
            let (snapshot, host) = (new.name.clone(), new.host.name.clone());
            self.tell(Event::SnapshotAdded { volume: volume.clone(), snapshot, host });
        }
        if after.is_none() {
            self.tell(Event::VolumeRemoved { volume });
        }
    }

    /// The place of a listener that wants what comes from now on.
    pub(crate) fn newest_place(&self) -> Place {
        Place(EventId { run: self.run, number: *self.newest.borrow() })
    }

    /// Ends all listening: the daemon stops.
    pub(crate) fn end(&self) {
        self.over.cancel();
    }

    /// Waits for the next event after a place, and moves the place there; `None` once the daemon stops. Where events in between
    /// are not kept any more, or the place is of another run of the daemon, [`Event::Lost`] comes first.
    pub(crate) async fn next(&self, place: &mut Place) -> Option<EventResource> {
        let mut news = self.newest.subscribe();
        loop {
            if let Some(found) = self.after(place) {
                return Some(found);
            }
            tokio::select! {
                biased;
                () = self.over.cancelled() => return None,
                changed = news.changed() => changed.ok()?,
            }
        }
    }

    fn after(&self, place: &mut Place) -> Option<EventResource> {
        let kept = self.lock();
        let newest = *self.newest.borrow();
        let first = kept.front().map_or(newest + 1, |event| event.id.number);
        let Place(seen) = *place;
        let is_kept = seen.run == self.run && (first..=newest + 1).contains(&(seen.number + 1));
        let found = if is_kept {
            kept.get(usize::try_from(seen.number + 1 - first).ok()?)?.clone()
        } else {
            let id = EventId { run: self.run, number: first - 1 };
            EventResource { id, time: clock::now(), event: Event::Lost }
        };
        *place = Place(found.id);
        Some(found)
    }
}

/// How far a listener is: it has had all up to this event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place(pub(crate) EventId);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn told(events: &Events, count: usize) {
        for number in 0..count {
            events.tell(Event::VolumeAdded { volume: format!("v{number}").parse().unwrap() });
        }
    }

    #[tokio::test]
    async fn a_listener_hears_all_in_order_from_where_it_was() {
        let events = Events::default();
        told(&events, 1);
        let mut place = events.newest_place();
        assert!(events.after(&mut place).is_none(), "what was before is not told");
        told(&events, 3);
        let numbers = [events.next(&mut place).await, events.next(&mut place).await].map(|event| event.unwrap().id);
        assert_eq!(numbers.map(|id| id.number), [2, 3]);
        let mut other = Place(numbers[0]);
        assert_eq!(events.next(&mut other).await.unwrap().id, numbers[1]);
        let mut waiting = events.newest_place();
        assert!(events.after(&mut waiting).is_none());
        let (heard, ()) = tokio::join!(events.next(&mut waiting), async { told(&events, 1) });
        assert_eq!(heard.unwrap().id.number, 5);
        events.end();
        assert!(events.next(&mut waiting).await.is_none());
    }

    #[tokio::test]
    async fn a_listener_that_fell_behind_or_knew_another_run_is_told_so() {
        let events = Events::default();
        told(&events, 3);
        let mut stranger = Place(EventId { run: Uuid::nil(), number: 2 });
        assert_eq!(events.next(&mut stranger).await.unwrap().event, Event::Lost);
        assert_eq!(events.next(&mut stranger).await.unwrap().id.number, 1, "all of this run follows");
        let mut slow = Place(EventId { run: events.run, number: 1 });
        told(&events, KEPT);
        assert_eq!(events.next(&mut slow).await.unwrap().event, Event::Lost);
        assert_eq!(events.next(&mut slow).await.unwrap().id.number, 4);
        let mut future = Place(EventId { run: events.run, number: u64::MAX - 1 });
        assert_eq!(events.next(&mut future).await.unwrap().event, Event::Lost);
    }
}
