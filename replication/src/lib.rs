//! Pure decisions about histories: plans, divergence, negotiation, wire messages.
//!
//! # Goals
//! Everything that two nodes decide about a push or a pull, as functions from values to values: the same inputs give
//! the same answer on both nodes, and tests need no pool and no network.
//! # Non-goals
//! No I/O: no runtime, clock, randomness or disk (`clippy.toml` of this crate forbids them).
//!
//! Neighbours: `flocker-storage` for the model's words; `node` calls this crate and acts on its answers.

pub mod ancestry;
pub mod binding;
mod descent;
pub mod divergence;
pub mod inbound;
pub mod merge;
pub mod message;
pub mod negotiate;
pub mod outline;
pub mod plan;
pub mod problem;
pub mod refusal;
pub mod resolution;
