//! The wall clock, and the ids that carry it.
//!
//! Owns the one place that both are read from, so that a simulation can give every node a clock of its own. What is read here
//! is shown to people and never compared.

use jiff::Timestamp;
use uuid::Uuid;

/// Returns the time by this node's clock.
pub fn now() -> Timestamp {
    #[cfg(feature = "simulation")]
    if let Some(hooks) = crate::simulation::hooks() {
        return hooks.now();
    }
    Timestamp::now()
}

/// Makes a UUIDv7: the time in its upper bits, randomness below.
pub fn mint() -> Uuid {
    #[cfg(feature = "simulation")]
    if let Some(hooks) = crate::simulation::hooks() {
        return hooks.mint();
    }
    Uuid::now_v7()
}
