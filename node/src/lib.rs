//! The daemon: catalogue, push and receive, HTTP API.
//!
//! The only crate that sees storage, replication, transport and certificates together. Two files tell the whole story
//! of a push: `push.rs` and `receive.rs`; everything else is a leaf they call.

mod addresses;
mod ancestry;
pub mod api;
mod catalog;
pub mod config;
pub mod daemon;
mod diff;
mod estimate;
mod events;
mod export;
mod handoff;
mod history;
mod import;
mod inbox;
mod kept;
mod lanes;
mod limits;
mod line;
mod merge;
mod metrics;
mod mounts;
mod outbox;
mod ownership;
mod peers;
mod problem;
mod pull;
mod push;
mod receive;
mod resolve;
mod rest;
mod serve;
pub mod setup;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod size;
mod state;
mod transfers;
mod volumes;
