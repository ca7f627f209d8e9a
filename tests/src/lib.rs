//! The harness of the end-to-end tests: real daemons, the real command line, real file systems.
//!
//! Owns starting and ending `flocker` processes, reading what they print, and an oracle for file trees that shares no
//! code with the program. Refuses to know the program from inside: everything goes through the binary, its HTTP API and
//! the disk. Neighbours: the tests under `tests/tests/`, the comparison with others under `bench/`.
//!
//! Nothing started here outlives its test: daemons are killed when their [`Node`] is dropped (also by a panic), get
//! SIGKILL from the kernel when the test's thread ends, and stay in the test's process group, which nextest kills on a
//! time-out. Mounts below a [`Scratch`] folder are taken away with it.
#![allow(clippy::unwrap_used)]

pub mod command;
pub mod data;
pub mod http;
pub mod invariants;
pub mod line;
pub mod needs;
pub mod node;
pub mod proxy;
pub mod scratch;
pub mod situations;
pub mod terminal;
pub mod tree;
pub mod wait;
pub mod zfs;

pub use command::{Output, Running, flocker_binary};
pub use needs::require;
pub use node::{Cluster, Node, Options};
pub use scratch::Scratch;
pub use wait::{LONG, SHORT, wait_until};
pub use zfs::ZfsHost;
