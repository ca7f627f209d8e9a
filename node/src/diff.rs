//! `flocker diff A B`: two trees compared, as a stream.
//!
//! Owns which trees a name means and that they stay while they are read. Refuses to know how trees are compared
//! ([`flocker_storage::tree::diff`]) and how the stream travels ([`crate::api::diff`]).

use flocker_storage::{
    driver::Target,
    model::SnapshotKey,
    tree::{
        diff::{Change, Difference, TreeDiff},
        weave::TreeView,
    },
};
use tokio::sync::mpsc;

use crate::{
    api::diff::{ChangeResource, DiffDetail, DiffLine, DiffTotals, TreeName},
    catalog::Pin,
    daemon::Node,
    problem::{self, Result},
};

/// How many lines wait for the client.
const LINES_AHEAD: usize = 256;

impl Node {
    /// Starts to compare two trees. The lines end with the totals, or with a problem. Dropping them ends the work.
    pub(crate) async fn diff(
        &self,
        from: &TreeName,
        to: &TreeName,
        detail: DiffDetail,
    ) -> Result<mpsc::Receiver<DiffLine>> {
        let (from, first_pin) = self.view(from).await?;
        let (to, second_pin) = self.view(to).await?;
        let (lines, receiver) = mpsc::channel(LINES_AHEAD);
        self.tasks.spawn_blocking(move || {
            compare(TreeDiff::new(from, to), detail, &lines);
            drop((first_pin, second_pin));
        });
        Ok(receiver)
    }

    async fn view(&self, name: &TreeName) -> Result<(TreeView, Pin)> {
        let volume = self.catalog.find(&name.volume)?;
        let id = volume.record.id;
        let target = match &name.snapshot {
            None => Target::Head(id),
            Some(snapshot) => Target::Snapshot(id, volume.snapshot(snapshot)?.snapshot.id),
        };
        // A head may be shown as a snapshot, so all are kept; a clone's as its origin.
        let keys: Vec<SnapshotKey> =
            volume.snapshots.iter().map(|held| held.key()).chain(volume.record.origin).collect();
        let pin = self.pins.pin(keys);
        Ok((self.driver.view(target).await?, pin))
    }
}

fn compare(diff: TreeDiff, detail: DiffDetail, lines: &mpsc::Sender<DiffLine>) {
    let mut totals = DiffTotals::default();
    for change in diff {
        let line = match change {
            Ok(change) => {
                count(&mut totals, &change);
                match detail {
                    DiffDetail::Paths => DiffLine::Change(ChangeResource::from(change)),
                    DiffDetail::Totals if lines.is_closed() => return,
                    DiffDetail::Totals => continue,
                }
            }
            Err(error) => DiffLine::Problem(error.into()),
        };
        let is_last = matches!(line, DiffLine::Problem(_));
        if lines.blocking_send(line).is_err() || is_last {
            return;
        }
    }
    if lines.blocking_send(DiffLine::End(totals)).is_err() {
        tracing::debug!("nobody waits for a comparison any more");
    }
}

fn count(totals: &mut DiffTotals, change: &Change) {
    let (paths, bytes) = match change.difference {
        Difference::Added => (&mut totals.added, &mut totals.added_bytes),
        Difference::Removed => (&mut totals.removed, &mut totals.removed_bytes),
        Difference::Changed => (&mut totals.changed, &mut totals.changed_bytes),
    };
    *paths += 1;
    *bytes += change.bytes;
}

/// A stream that ended without its totals: the daemon went away.
pub(crate) fn cut_short() -> crate::api::types::ApiProblem {
    problem::internal("the comparison was cut short")
}
