//! A walk over a tree that was received a moment ago: what is known of a file since it arrived is not looked at again.
//!
//! Owns the choice, name by name, between what was taken down and what lies there. Neighbours: [`super::arrivals`] has the one,
//! [`super::walk`] the other; the commit of a receive makes the tree's inventory of both.

use super::{
    arrivals::{Facts, Known, Presence},
    entry::Entry,
    inventory::InventoryWriter,
    walk::Walk,
};
use crate::error::Result;

/// A walk, and what has arrived in its tree. After an error it ends.
#[derive(Debug)]
pub struct ReceivedWalk {
    /// Which stands where this one does.
    pub walk: Walk,
    arrived: Known,
}

/// What is at the next name.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "each is dealt with at once, and none is kept")]
pub enum Met {
    /// A file of which all is known: [`ReceivedWalk::note`] puts it in an inventory.
    AsItArrived {
        /// Bytes, holes included.
        size: u64,
    },
    /// Anything else, as it lies there; what is known of it, if it has arrived.
    Entry(Entry, Option<Facts>),
}

impl ReceivedWalk {
    /// Starts where `walk` starts.
    pub fn new(walk: Walk, arrived: Known) -> Self {
        Self { walk, arrived }
    }

    /// Goes on to the next name in walk order, the root first; `None` at the end.
    pub fn meet(&mut self) -> Result<Option<Met>> {
        let met = self.step();
        self.walk.conclude(met)
    }

    fn step(&mut self) -> Result<Option<Met>> {
        while self.walk.go_on()? {
            let path = self.walk.path_here()?;
            let presence = self.arrived.seek(&path)?;
            if presence == Presence::AsLeft {
                self.walk.pass(&path);
                return Ok(Some(Met::AsItArrived { size: self.arrived.found().size }));
            }
            let Some(entry) = self.walk.look(path)? else { continue };
            let facts = match presence {
                Presence::AsItWas => Facts::holding(self.arrived.entry()?, &entry),
                Presence::Absent | Presence::AsLeft => None,
            };
            return Ok(Some(Met::Entry(entry, facts)));
        }
        Ok(None)
    }

    /// Adds the file that was met last to an inventory as it was taken down.
    pub fn note(&self, writer: &mut InventoryWriter) -> Result<()> {
        let found = self.arrived.found();
        writer.add_frame(&found.path, &found.frame)
    }
}
