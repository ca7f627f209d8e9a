//! Remarks about paths, bounded: a tree with a million odd entries does not fill the memory.

use super::path::TreePath;
use crate::driver::Finding;

/// How many remarks are kept; what comes after is counted.
const FINDINGS_LIMIT: usize = 1000;

/// Collects remarks.
#[derive(Debug, Default)]
pub(super) struct Findings {
    kept: Vec<Finding>,
    more: u64,
}

impl Findings {
    pub(super) fn add(&mut self, path: &TreePath, what: impl Into<String>) {
        if self.kept.len() < FINDINGS_LIMIT {
            self.kept.push(Finding { path: path.to_string(), what: what.into() });
        } else {
            self.more += 1;
        }
    }

    /// Returns the remarks, the last one saying how many more there were.
    pub(super) fn take(&mut self) -> Vec<Finding> {
        let mut findings = std::mem::take(&mut self.kept);
        if self.more > 0 {
            findings.push(Finding { path: ".".to_owned(), what: format!("{} more remarks", self.more) });
            self.more = 0;
        }
        findings
    }
}
