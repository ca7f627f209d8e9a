//! Every situation two nodes can be in, under every policy, by push and by pull, on every kind of pool: what both sides
//! hold afterwards.

use flocker_tests::{
    invariants::{assert_sound, histories, wait_tidy},
    situations::{
        Pools,
        Situation::{self, *},
        arrange, holdings, told,
    },
};

type Held = &'static [(&'static str, &'static str)];

/// What each side holds afterwards, and the exit code. `*` is the volume.
fn expected(situation: Situation, policy: &str, pull: bool) -> (i32, Held, Held) {
    match (situation, policy) {
        (UpToDate, _) => (0, &[("*", "one = one")], &[("*", "one = one")]),
        (FastForward, _) => (0, &[("*", "one two = two")], &[("*", "one two = two")]),
        (Idle, _) => (0, &[("*", "one two = two")], &[("*", "one idle two = two")]),

        (Behind, "refuse") => (4, &[("*", "one = one")], &[("*", "one newer = newer")]),
        (Behind, "fork") => (0, &[("*", "one = one")], &[("*", "one newer = newer")]),
        (Behind, "theirs") => (0, &[("*", "one = one")], &[("*", "one = one"), ("*.host-b", "newer = newer")]),
        (Behind, _) => (0, &[("*", "one newer = newer")], &[("*", "one newer = newer")]),

        (Diverged, "refuse") => (4, &[("*", "one left = left")], &[("*", "one right = right")]),
        (Diverged, "fork") => {
            (0, &[("*", "one left = left")], &[("*", "one right = right"), ("*.host-a", "left = left")])
        }
        (Diverged, "theirs") => {
            (0, &[("*", "one left = left")], &[("*", "one left = left"), ("*.host-b", "right = right")])
        }
        (Diverged, _) => (0, &[("*", "one right = right"), ("*.host-a", "left = left")], &[("*", "one right = right")]),

        (Dirty, "refuse") => (4, &[("*", "one two = two")], &[("*", "one = precious")]),
        (Dirty, "fork") => (0, &[("*", "one two = two")], &[("*", "one = precious"), ("*.host-a", "two = two")]),
        (Dirty, "theirs") => {
            (0, &[("*", "one two = two")], &[("*", "one two = two"), ("*.host-b", "before = precious")])
        }
        // The peer's head is not this node's to snapshot: its newest snapshot is what wins. The own head's changes are.
        (Dirty, _) if pull => {
            (0, &[("*", "one before = precious"), ("*.host-a", "two = two")], &[("*", "one before = precious")])
        }
        (Dirty, _) => (0, &[("*", "one = one"), ("*.host-a", "two = two")], &[("*", "one = precious")]),

        (OtherVolume, "refuse") => (4, &[("*", "one = one")], &[("*", "other = other")]),
        (OtherVolume, "fork") => (0, &[("*", "one = one")], &[("*", "other = other"), ("*.host-a", "one = one")]),
        (OtherVolume, "theirs") => (0, &[("*", "one = one")], &[("*", "one = one"), ("*.host-b", "other = other")]),
        (OtherVolume, _) => (0, &[("*", "other = other"), ("*.host-a", "one = one")], &[("*", "other = other")]),

        // What a side has destroyed is not missed there: the older one that both have is what the rest builds on.
        (PrunedHere, _) => (0, &[("*", "one three = three")], &[("*", "one two three = three")]),
        (PrunedThere, _) => (0, &[("*", "one two three = three")], &[("*", "one two three = three")]),

        (PrunedApart, "refuse") => (4, &[("*", "one left = left")], &[("*", "one two right = right")]),
        (PrunedApart, "fork") => {
            (0, &[("*", "one left = left")], &[("*", "one two right = right"), ("*.host-a", "left = left")])
        }
        (PrunedApart, "theirs") => {
            (0, &[("*", "one left = left")], &[("*", "one left = left"), ("*.host-b", "two right = right")])
        }
        (PrunedApart, _) => {
            (0, &[("*", "one two right = right"), ("*.host-a", "left = left")], &[("*", "one two right = right")])
        }

        (PrunedBehind, "refuse") => (4, &[("*", "one two = two")], &[("*", "one newer = newer")]),
        (PrunedBehind, "fork") => (0, &[("*", "one two = two")], &[("*", "one newer = newer")]),
        (PrunedBehind, "theirs") => {
            (0, &[("*", "one two = two")], &[("*", "one two = two"), ("*.host-b", "newer = newer")])
        }
        (PrunedBehind, _) => (0, &[("*", "one two newer = newer")], &[("*", "one newer = newer")]),

        (NothingInCommon, "fork") => (0, &[("*", "two = two")], &[("*", "one = one"), ("*.host-a", "two = two")]),
        (NothingInCommon, _) => (4, &[("*", "two = two")], &[("*", "one = one")]),
    }
}

fn run(pools: Pools, policy: &str) {
    let Some(mut cluster) = pools.cluster() else { return };
    let (a, b) = cluster.pair();
    for (number, (situation, pull)) in Situation::ALL.iter().flat_map(|s| [(*s, false), (*s, true)]).enumerate() {
        let volume = format!("v{number}");
        let what = format!("{situation:?} under {policy} by {}", if pull { "pull" } else { "push" });
        let want = arrange(a, b, &volume, situation);
        let snapshot = format!("{volume}@{want}");
        let call = || match pull {
            false => a.cli(&["push", &snapshot, "host-b", "--on-divergence", policy]),
            true => b.cli(&["pull", &snapshot, "host-a", "--on-divergence", policy]),
        };
        let (code, on_a, on_b) = expected(situation, policy, pull);
        let output = call();
        assert_eq!(output.code, code, "{what}\n{}\n{}", output.stdout, output.stderr);
        assert_eq!(holdings(a, &volume), told(on_a, &volume), "host-a after {what}");
        assert_eq!(holdings(b, &volume), told(on_b, &volume), "host-b after {what}");

        // The same again finds it done. What `ours` has moved away has no name there any more.
        if policy != "ours" {
            let before = histories(b);
            let again = call();
            assert_eq!(again.code, code, "{what}, again\n{}\n{}", again.stdout, again.stderr);
            assert_eq!(histories(b), before, "host-b after {what}, again");
        }
    }
    for node in &cluster.nodes {
        assert_sound(node);
        wait_tidy(node);
    }
}

/// One test for each policy, so that they run side by side.
macro_rules! on {
    ($module:ident, $pools:expr) => {
        mod $module {
            use super::*;

            #[test]
            fn refusing_changes_nothing() {
                run($pools, "refuse");
            }

            #[test]
            fn a_fork_keeps_both_and_leaves_the_receivers_volume_alone() {
                run($pools, "fork");
            }

            #[test]
            fn theirs_takes_the_name_and_keeps_what_gave_way() {
                run($pools, "theirs");
            }

            #[test]
            fn ours_comes_back_and_keeps_what_gave_way() {
                run($pools, "ours");
            }
        }
    };
}

on!(directory, Pools::Directory);
on!(btrfs, Pools::Btrfs);
on!(zfs, Pools::Zfs);
on!(btrfs_and_zfs, Pools::BtrfsAndZfs);
