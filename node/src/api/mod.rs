//! The HTTP API: what travels ([`types`]) and how it is asked for ([`client`]).

pub mod client;
pub mod types;
