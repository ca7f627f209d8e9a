//! What only the ZFS driver promises. The shared suite on it is in tests/conformance.rs.
#![allow(clippy::unwrap_used)]

mod support;

use flocker_storage::conformance::{self, Bench};
use support::zfs_fuse::ZfsHost;

/// Cases of the suite, by a part of their names: for the hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs single cases: CASE=part_of_a_name"]
async fn single_cases_of_the_suite() {
    let Some(host) = ZfsHost::enter("single_cases_of_the_suite") else { return };
    let wanted = std::env::var("CASE").unwrap_or_default();
    for (name, case) in conformance::cases().into_iter().filter(|(name, _)| name.contains(&wanted)) {
        eprintln!("conformance: {name}");
        case(&Bench::on(host.place())).await;
    }
}
