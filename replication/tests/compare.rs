//! Comparing two histories: a table of the cases people meet, and random histories against a naive model.
#![allow(clippy::unwrap_used)]

mod support;

#[path = "compare/cases.rs"]
mod cases;
#[path = "compare/random.rs"]
mod random;
#[path = "compare/remembered.rs"]
mod remembered;
