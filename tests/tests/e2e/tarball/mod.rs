//! Export and import: snapshots as tarballs, and volumes out of anybody's. Here is what the tests in the files below share.

mod carried;
mod crashes;
mod failures;
mod identity;

use std::{path::Path, process::Command};

use flocker_tests::{
    Cluster, Node, Options, SHORT, Scratch,
    invariants::{assert_sound, wait_tidy},
    scratch::{FileSystem, run},
    wait_until,
};
use serde_json::Value;

#[track_caller]
fn export(node: &Node, snapshot: &str, path: &Path) {
    node.cli(&["export", snapshot, "-o", path.to_str().unwrap()]).ok();
}

#[track_caller]
fn import(node: &Node, volume: &str, path: &Path) -> Value {
    node.cli(&["import", volume, path.to_str().unwrap()]).ok().json()
}

fn snapshot(node: &Node, snapshot: &str) -> Value {
    node.cli(&["inspect", snapshot]).ok().json()
}

fn tar(arguments: &[&str], folder: &Path) {
    run(Command::new("tar").arg("-C").arg(folder).args(arguments));
}

/// How many volumes the pool itself holds, whoever knows of them.
fn volumes_in_pool(node: &Node) -> u64 {
    node.cli(&["pool", "status"]).ok().json()["volumes"].as_u64().unwrap()
}

/// Nothing of an import is left, not even where nobody looks.
#[track_caller]
fn assert_nothing_left(node: &Node, volumes: u64) {
    wait_until("what was unpacked is gone", SHORT, || (volumes_in_pool(node) == volumes).then_some(()));
    wait_tidy(node);
    assert_sound(node);
}

fn with_pools(pools: Vec<Option<String>>, scratch: Scratch) -> Cluster {
    Cluster::with(scratch, pools.into_iter().map(|pool| Options { pool, ..Options::default() }).collect())
}

fn btrfs_pool(scratch: &Scratch, name: &str) -> Option<String> {
    Some(format!("btrfs:{}", scratch.mount(FileSystem::Btrfs, name, 1024).join("pool").display()))
}
