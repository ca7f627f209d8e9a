//! Trees: walking, copying and listing them, and the portable delta `flocker-tree/1`.
//!
//! # Participants
//! [`root`] and [`path`] name and open things beneath a root; [`walk`] yields [`entry`] values in one order;
//! [`copy`] makes entries elsewhere; [`inventory`] keeps them in a file, [`witness`] holds a tree against it, [`received`] makes one of
//! what [`arrivals`] took down. All calls
//! block: callers use a blocking thread.
//! # Non-goals
//! Volumes, pools and peers: a tree is a directory and what is in it.

pub mod apply;
pub mod arrivals;
mod behind;
mod blocks;
mod builder;
pub mod checkpoints;
pub mod compose;
pub mod copy;
pub(crate) mod data;
pub mod diff;
pub mod digest;
pub mod entry;
mod extents;
mod findings;
mod groups;
#[cfg(test)]
mod hostile_tests;
pub mod inventory;
pub mod listing;
mod output;
pub mod path;
pub mod received;
pub mod root;
mod stream_digest;
mod target;
pub mod walk;
pub mod weave;
mod wire;
pub mod witness;
pub mod write;
mod xattr;
