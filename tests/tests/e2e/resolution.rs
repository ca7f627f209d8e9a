//! A crash at any step of a resolution leaves the old or the new state, on every kind of pool.

use std::{fs, path::Path};

use flocker_tests::{
    LONG, Node,
    invariants::{array, assert_sound, assert_volume_sound, wait_tidy},
    situations::{
        Pools,
        Situation::{Dirty, OtherVolume},
        arrange, holdings, told, write_and_take,
    },
    wait_until,
};

/// The tests of one kind of pool share the points out among themselves, so that they run side by side.
const SHARES: usize = 3;

/// The fault points of a resolution: the node's steps, the snapshot that keeps a head, and the driver's steps where the
/// newer part of a history is split off. Found in the sources.
fn points(driver: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let split = format!("storage/src/drivers/{driver}/split.rs");
    let text = ["node/src/resolve.rs", &split].map(|path| fs::read_to_string(root.join(path)).unwrap()).concat();
    let calls = text.split("fault::point(\"").skip(1).filter_map(|rest| rest.split('"').next());
    calls.chain(["node.head-kept"]).map(str::to_owned).collect()
}

fn run_share(pools: Pools, driver: &str, share: usize) {
    let Some(mut cluster) = pools.cluster() else { return };
    let points = points(driver);
    assert!(points.len() > 12, "{points:?}");
    for (number, point) in points.into_iter().enumerate().skip(share).step_by(SHARES) {
        let (a, b) = cluster.pair();
        let volume = format!("v{number}");
        let is_renaming = point.contains("rename") && point.starts_with("adopt.");
        let situation = if is_renaming { OtherVolume } else { Dirty };
        let want = arrange(a, b, &volume, situation);
        let want = if is_renaming { want } else { "three" };
        if !is_renaming {
            write_and_take(a, &volume, want);
        }
        // In order, so that the other one knows of it at once.
        b.stop();
        b.fault = Some(point.clone());
        b.start();
        let call = ["push", &format!("{volume}@{want}"), "host-b", "--on-divergence", "theirs"];
        let running = a.start_cli(&call);
        wait_until(&format!("host-b dies at {point}"), LONG, || b.is_dead().then_some(()));
        b.kill9();
        b.fault = None;
        // What the crash left is looked at before the sender goes on.
        a.frozen(|| {
            b.start();
            check_between(b, &volume, &point);
        });
        running.finish(LONG).ok();
        let (kept, now) = match situation {
            Dirty => ("before = precious", "one two three = three"),
            _ => ("other = other", "one = one"),
        };
        assert_eq!(holdings(b, &volume), told(&[("*", now), ("*.host-b", kept)], &volume), "after {point}");
        assert_volume_sound(b, &volume);
        wait_tidy(b);
        let transfers = array(&a.cli(&["transfers"]).ok().json());
        assert!(transfers.iter().all(|transfer| transfer["state"] == "done"), "{transfers:?}");
    }
    assert_sound(&cluster.nodes[1]);
}

/// Looks at what a node holds after a crash: the old history with the incoming one beside it, or the new one with the
/// old one beside it.
fn check_between(node: &Node, volume: &str, point: &str) {
    assert_volume_sound(node, volume);
    let found = holdings(node, volume);
    let is_kept = |held: &String| held.ends_with("= precious") || held.ends_with("= other");
    assert!(found.values().any(is_kept), "{point}: {found:?}");
}

macro_rules! on {
    ($driver:ident, $pools:expr) => {
        mod $driver {
            use super::*;

            #[test]
            fn a_crash_at_any_step_of_a_resolution_is_followed_by_the_rest_of_it_1_of_3() {
                run_share($pools, stringify!($driver), 0);
            }

            #[test]
            fn a_crash_at_any_step_of_a_resolution_is_followed_by_the_rest_of_it_2_of_3() {
                run_share($pools, stringify!($driver), 1);
            }

            #[test]
            fn a_crash_at_any_step_of_a_resolution_is_followed_by_the_rest_of_it_3_of_3() {
                run_share($pools, stringify!($driver), 2);
            }
        }
    };
}

on!(directory, Pools::Directory);
on!(btrfs, Pools::Btrfs);
on!(zfs, Pools::Zfs);
