//! The node's HTTP API: resources, the server on a unix socket, and a client.

pub mod client;
pub mod diff;
pub mod events;
mod lines;
pub mod merge;
mod nodes;
pub mod ownership;
pub(crate) mod server;
mod snapshots;
pub mod tarball;
mod transfers;
pub mod types;
mod volumes;
