//! The real binary with real sockets, from issue to issue: each file is one theme, each test one claim.
#![allow(clippy::unwrap_used)]

mod ancestry;
mod api;
mod backends;
mod bad_input;
mod btrfs;
mod crashes;
mod demo;
mod diff;
mod divergence;
mod enrolment;
mod events;
mod everything;
mod faults;
mod interrupted;
mod lanes;
mod limits;
mod lossy;
mod matrix;
mod memory;
mod merge;
mod mounts;
mod openzfs;
mod ownership;
mod paused;
mod postgres;
mod push;
mod readme;
mod recovery;
mod refusals;
mod resolution;
mod tarball;
mod terminal;
mod verbs;
mod zfs;
