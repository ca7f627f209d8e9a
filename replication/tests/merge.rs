//! Three-way merges: the laws they keep on random trees, each conflict by hand, and their place in histories.
#![allow(clippy::unwrap_used)]

mod support;

#[path = "merge/conflicts.rs"]
mod conflicts;
#[path = "merge/histories.rs"]
mod histories;
#[path = "merge/laws.rs"]
mod laws;
#[path = "merge/random.rs"]
mod random;
#[path = "merge/rig.rs"]
mod rig;
