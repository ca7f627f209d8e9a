//! The portable delta from outside: whole trees through `flocker-tree/1`, whole, cut, resumed and damaged.
#![allow(clippy::unwrap_used)]

#[path = "tree/arrived.rs"]
mod arrived;
#[path = "tree/diff.rs"]
mod diff;
#[path = "tree/edits.rs"]
mod edits;
#[path = "tree/everything.rs"]
mod everything;
#[path = "tree/hostile.rs"]
mod hostile;
#[path = "tree/rig.rs"]
mod rig;
#[path = "tree/stated.rs"]
mod stated;
#[path = "tree/stream.rs"]
mod stream;
