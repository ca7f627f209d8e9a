//! Which stage of a delta's way the others wait for.
//!
//! Owns the account of waits and the verdict. Refuses to know how the stages work; [`super::outgoing`] and
//! [`super::incoming`] tell how long they waited for each.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a delta passes through, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Reading the delta at the sender.
    Source,
    /// Compressing it.
    Compression,
    /// A rate that the sender keeps.
    Limit,
    /// The network.
    Line,
    /// Writing it at the receiver.
    Receiver,
    /// All that comes before writing, as a receiver sees it.
    Arrival,
}

/// How much waiting a verdict is made of. Shorter ones would follow each pause of a disk.
const EPOCH: Duration = Duration::from_millis(500);

/// How long the other stages waited for each.
#[derive(Debug, Default)]
pub(super) struct Waits {
    spent: Vec<(Stage, Duration)>,
    slowest: Option<Stage>,
}

impl Waits {
    /// Counts a wait for a stage.
    pub(super) fn waited_for(&mut self, stage: Stage, time: Duration) {
        match self.spent.iter_mut().find(|(known, _)| *known == stage) {
            Some((_, spent)) => *spent += time,
            None => self.spent.push((stage, time)),
        }
        if self.spent.iter().map(|(_, spent)| *spent).sum::<Duration>() >= EPOCH {
            self.slowest = self.spent.iter().max_by_key(|(_, spent)| *spent).map(|(stage, _)| *stage);
            self.spent.clear();
        }
    }

    /// Returns the stage that was waited for most in the last full epoch; nothing before the first.
    pub(super) fn slowest(&self) -> Option<Stage> {
        self.slowest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stage_that_is_waited_for_most_is_told_and_changes() {
        let mut waits = Waits::default();
        waits.waited_for(Stage::Line, EPOCH / 4);
        waits.waited_for(Stage::Source, EPOCH / 2);
        assert_eq!(waits.slowest(), None);
        waits.waited_for(Stage::Line, EPOCH / 4);
        assert_eq!(waits.slowest(), Some(Stage::Source));
        waits.waited_for(Stage::Line, EPOCH);
        assert_eq!(waits.slowest(), Some(Stage::Line));
    }
}
