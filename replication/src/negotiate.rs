//! Which format a step's bytes travel in.
//!
//! Owns the choice. Refuses to know what the formats mean. Neighbour: [`crate::plan`].

use std::fmt;

use flocker_storage::delta::{DeltaFormat, TREE_FORMAT};

/// The two sides share no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no delta format in common: the sender writes {}, the receiver reads {}", Listed(.sender), Listed(.receiver))]
pub struct NoCommonFormat {
    /// What the sender writes.
    pub sender: Vec<DeltaFormat>,
    /// What the receiver reads.
    pub receiver: Vec<DeltaFormat>,
}

/// Returns the first of the sender's formats that the receiver reads. The portable one comes last wherever it stands
/// in the lists: it always works, and whatever else both know is better.
pub fn negotiate(sender: &[DeltaFormat], receiver: &[DeltaFormat]) -> Result<DeltaFormat, NoCommonFormat> {
    let shared = || sender.iter().filter(|format| receiver.contains(format));
    let best = shared().find(|format| format.0 != TREE_FORMAT).or_else(|| shared().next());
    best.cloned().ok_or_else(|| NoCommonFormat { sender: sender.to_vec(), receiver: receiver.to_vec() })
}

struct Listed<'a>(&'a [DeltaFormat]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        let names: Vec<&str> = self.0.iter().map(|format| format.0.as_str()).collect();
        f.write_str(&names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn formats(names: &[&str]) -> Vec<DeltaFormat> {
        names.iter().map(|name| DeltaFormat((*name).to_owned())).collect()
    }

    #[test]
    fn the_senders_order_decides_and_the_portable_format_is_last() {
        let table: [(&[&str], &[&str], Option<&str>); 6] = [
            (&["zfs-send/1", TREE_FORMAT], &["zfs-send/1", TREE_FORMAT], Some("zfs-send/1")),
            (&[TREE_FORMAT, "zfs-send/1"], &[TREE_FORMAT, "zfs-send/1"], Some("zfs-send/1")),
            (&["btrfs-send/2", "btrfs-send/1", TREE_FORMAT], &["btrfs-send/1", "btrfs-send/2"], Some("btrfs-send/2")),
            (&["zfs-send/1", TREE_FORMAT], &["btrfs-send/2", TREE_FORMAT], Some(TREE_FORMAT)),
            (&["zfs-send/1"], &["btrfs-send/2"], None),
            (&[], &[TREE_FORMAT], None),
        ];
        for (sender, receiver, best) in table {
            let chosen = negotiate(&formats(sender), &formats(receiver)).ok();
            assert_eq!(chosen.map(|format| format.0).as_deref(), best, "{sender:?} to {receiver:?}");
        }
    }

    #[test]
    fn the_error_names_what_both_sides_know() {
        let error = negotiate(&formats(&["zfs-send/1"]), &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no delta format in common: the sender writes zfs-send/1, the receiver reads none"
        );
    }
}
