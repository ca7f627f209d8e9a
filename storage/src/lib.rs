//! Volumes, snapshots and deltas on a pool, behind one driver contract.
//!
//! # Goals
//! One contract ([`driver::Driver`]) that every driver passes one suite of, and one portable delta format ([`tree`]).
//! # Non-goals
//! Peers, transfers and policies: this crate knows one pool on one machine.

pub mod clock;
pub mod command;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod delta;
pub mod driver;
pub mod drivers;
pub mod error;
pub mod fault;
pub mod model;
pub mod records;
#[cfg(feature = "simulation")]
pub mod simulation;
#[cfg(feature = "tarball")]
pub mod tarball;
pub mod tree;
