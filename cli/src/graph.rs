//! Draws a history of snapshots with its branches and merges, newest first, in ASCII.
//!
//! Owns the columns. Refuses to know what stands behind a snapshot. Parents that are not in the history (destroyed, or
//! on no host that answered) end their column.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
};

use flocker_node::api::{client::SnapshotId, types::HistoryNode};

/// Orders a history so that every snapshot comes before its parents, newer ones first where that leaves a choice.
pub(crate) fn newest_first(nodes: &[HistoryNode]) -> Vec<&HistoryNode> {
    let by_id: BTreeMap<SnapshotId, &HistoryNode> = nodes.iter().map(|node| (node.id, node)).collect();
    let mut children: BTreeMap<SnapshotId, usize> = BTreeMap::new();
    for parent in nodes.iter().flat_map(|node| &node.parents).filter(|parent| by_id.contains_key(parent)) {
        *children.entry(*parent).or_default() += 1;
    }
    let is_free = |node: &&HistoryNode| !children.contains_key(&node.id);
    let mut free: BTreeSet<_> = nodes.iter().filter(is_free).map(|node| (node.created, node.id)).collect();
    let mut ordered = Vec::new();
    while let Some((_, id)) = free.pop_last() {
        let node = by_id[&id];
        ordered.push(node);
        for parent in &node.parents {
            if let Some(left) = children.get_mut(parent) {
                *left -= 1;
                if *left == 0 {
                    free.insert((by_id[parent].created, *parent));
                }
            }
        }
    }
    ordered
}

/// Draws the graph; `describe` says what stands behind each snapshot.
pub(crate) fn draw(nodes: &[HistoryNode], describe: impl Fn(&HistoryNode) -> String) -> String {
    let known: BTreeSet<SnapshotId> = nodes.iter().map(|node| node.id).collect();
    // The snapshot that each column leads down to.
    let mut columns: Vec<SnapshotId> = Vec::new();
    let mut text = String::new();
    for node in newest_first(nodes) {
        // Columns that lead to this snapshot join the first of them.
        while let Some(last) = columns.iter().rposition(|id| *id == node.id)
            && columns.iter().position(|id| *id == node.id) != Some(last)
        {
            let rails = (0..columns.len()).map(|at| if at < last { "| " } else { "/ " });
            text.push_str(&rails_row(rails.collect()));
            columns.remove(last);
        }
        let at = columns.iter().position(|id| *id == node.id).unwrap_or_else(|| {
            columns.push(node.id);
            columns.len() - 1
        });
        let rails: String = (0..columns.len()).map(|column| if column == at { "* " } else { "| " }).collect();
        text.push_str(&format!("{rails} {}\n", describe(node)));
        let parents: Vec<SnapshotId> = node.parents.iter().copied().filter(|id| known.contains(id)).collect();
        match parents.as_slice() {
            [] => {
                if at + 1 < columns.len() {
                    let rails = (0..columns.len()).map(|column| match column.cmp(&at) {
                        Ordering::Less => "| ",
                        Ordering::Equal => "  ",
                        Ordering::Greater => "/ ",
                    });
                    text.push_str(&rails_row(rails.collect()));
                }
                columns.remove(at);
            }
            [first, rest @ ..] => {
                columns[at] = *first;
                for parent in rest {
                    columns.insert(at + 1, *parent);
                    let rails = (0..columns.len()).map(|column| if column <= at { "| " } else { "\\ " });
                    text.push_str(&rails_row(rails.collect()));
                }
            }
        }
    }
    text
}

/// A row of rails alone: those that lean stand one place to the left of their columns.
fn rails_row(mut rails: String) -> String {
    if let Some(before) = rails.find(['/', '\\']).and_then(|leaning| leaning.checked_sub(1)) {
        rails.remove(before);
    }
    rails.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn node(number: u32, parents: &[u32]) -> HistoryNode {
        let id = |number: &u32| format!("00000000-0000-0000-0000-{number:012}");
        let value = json!({"id": id(&number), "name": format!("s{number}"), "host": "host-a",
            "created": format!("2026-01-01T00:00:{number:02}Z"), "parents": parents.iter().map(id).collect::<Vec<_>>(),
            "logical_bytes": 0, "unchanged": false, "held_by": []});
        serde_json::from_value(value).unwrap()
    }

    fn drawn(nodes: &[HistoryNode]) -> String {
        draw(nodes, |node| node.name.to_string())
    }

    #[test]
    fn a_line_is_drawn_newest_first() {
        assert_eq!(drawn(&[node(1, &[]), node(2, &[1]), node(3, &[2])]), "*  s3\n*  s2\n*  s1\n");
    }

    #[test]
    fn two_branches_meet_where_they_parted() {
        let parted = [node(1, &[]), node(2, &[1]), node(3, &[1])];
        assert_eq!(drawn(&parted), "*  s3\n| *  s2\n|/\n*  s1\n");
    }

    #[test]
    fn a_merge_has_two_ways_down() {
        let merged = [node(1, &[]), node(2, &[1]), node(3, &[1]), node(4, &[3, 2])];
        assert_eq!(drawn(&merged), "*  s4\n|\\\n* |  s3\n| *  s2\n|/\n*  s1\n");
    }

    #[test]
    fn whatever_the_clocks_say_no_parent_comes_before_its_child() {
        let mut child = node(2, &[1]);
        child.created = "2020-01-01T00:00:00Z".parse().unwrap();
        assert_eq!(drawn(&[node(1, &[]), child]), "*  s2\n*  s1\n");
    }
}
