//! What only the btrfs driver promises: the traps of send and receive closed, pools in files and on devices, space.
#![allow(clippy::unwrap_used)]

mod support;

#[path = "btrfs/hostile.rs"]
mod hostile;
#[path = "btrfs/pools.rs"]
mod pools;
#[path = "btrfs/rig.rs"]
mod rig;
#[path = "btrfs/space.rs"]
mod space;
#[path = "btrfs/traps.rs"]
mod traps;
