//! What must hold on a node at any time: nothing half.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;

use crate::{Node, SHORT};

/// The volumes of a node and the names of their snapshots, oldest first.
pub type Histories = BTreeMap<String, Vec<String>>;

/// Lists a node's volumes and snapshots.
#[track_caller]
pub fn histories(node: &Node) -> Histories {
    let mut histories = Histories::new();
    for volume in array(&node.cli(&["list"]).ok().json()) {
        let name = text(&volume["name"]);
        let snapshots = node.http("GET", &format!("/v1/volumes/{name}/snapshots"), None).is(200).json();
        histories.insert(name, array(&snapshots).iter().map(|snapshot| text(&snapshot["name"])).collect());
    }
    histories
}

/// Asserts that every snapshot reads back as it was taken, that nothing lies about in the pool, and that no orphan is
/// in it.
#[track_caller]
pub fn assert_sound(node: &Node) {
    assert_sound_where(node, |_| true);
}

/// The same, reading only one volume and what was forked off it.
#[track_caller]
pub fn assert_volume_sound(node: &Node, volume: &str) {
    assert_sound_where(node, |name| name.split('.').next() == Some(volume));
}

#[track_caller]
fn assert_sound_where(node: &Node, is_read: impl Fn(&str) -> bool) {
    for (volume, snapshots) in histories(node).into_iter().filter(|(volume, _)| is_read(volume)) {
        for snapshot in snapshots {
            let path = format!("/v1/volumes/{volume}/snapshots/{snapshot}/verify?compare=contents");
            let verification = node.http("POST", &path, None).is(200).json();
            assert_eq!(verification["findings"], Value::Array(vec![]), "{volume}@{snapshot}: {verification}");
        }
    }
    let pool = node.cli(&["pool", "status"]).ok().json();
    assert_eq!(pool["orphans"], Value::Array(vec![]), "{pool}");
}

/// Returns what lies in the folders of a directory pool that are empty between operations.
pub fn leftovers(pool: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["staging", "trash"] {
        let Ok(entries) = std::fs::read_dir(pool.join(folder)) else { continue };
        found.extend(entries.flatten().map(|entry| format!("{folder}/{}", entry.file_name().to_string_lossy())));
    }
    found
}

/// Waits until nothing lies about in a pool: what is deleted in the background is gone.
#[track_caller]
pub fn wait_tidy(node: &Node) {
    let mut left = Vec::new();
    let deadline = std::time::Instant::now() + SHORT;
    while std::time::Instant::now() < deadline {
        left = leftovers(&node.pool());
        if left.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("left over in the pool of {}: {left:?}", node.name);
}

/// Returns an array's members.
#[track_caller]
pub fn array(value: &Value) -> Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("not an array: {value}")).clone()
}

/// Returns a text.
#[track_caller]
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}")).to_owned()
}
