//! The results of a case as rows of a Markdown table.

use std::fmt::Write as _;

use crate::course::Outcome;

/// One run of one contender.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// Until the data was durable at the receiver.
    pub(crate) seconds: f64,
    /// Processor time of both sides, and the highest memory at the sender and at the receiver, in bytes.
    pub(crate) cost: Option<(f64, [u64; 2])>,
    /// What went over the line, where that is known.
    pub(crate) wire_bytes: Option<u64>,
}

/// All runs of one contender in one case.
#[derive(Debug)]
pub(crate) struct Runs {
    pub(crate) contender: String,
    pub(crate) runs: Vec<Run>,
    /// What went over the line, found out later.
    pub(crate) weighed: Option<u64>,
}

/// The names of the columns.
pub(crate) const HEAD: &str = "| case | contender | s | ratio | processor s | memory, MiB | on the wire, MiB |\n\
                               |---|---|---:|---:|---:|---:|---:|\n";

impl Runs {
    pub(crate) fn of(contender: String) -> Self {
        Self { contender, runs: Vec::new(), weighed: None }
    }

    /// Adds what belongs to the same run to it.
    pub(crate) fn add(&mut self, part: Run) {
        let Some(sum) = self.runs.last_mut() else {
            self.runs.push(part);
            return;
        };
        sum.seconds += part.seconds;
        sum.wire_bytes = sum.wire_bytes.zip(part.wire_bytes).map(|(sum, part)| sum + part);
        sum.cost = sum
            .cost
            .zip(part.cost)
            .map(|((seconds, peak), (more, other))| (seconds + more, [0, 1].map(|side| peak[side].max(other[side]))));
    }

    /// Returns the most that went over the line in a run, if anybody knows.
    pub(crate) fn wire_bytes(&self) -> Option<u64> {
        self.runs.iter().filter_map(|run| run.wire_bytes).max().or(self.weighed)
    }

    fn seconds(&self) -> f64 {
        median(self.runs.iter().map(|run| run.seconds)).unwrap_or(f64::NAN)
    }

    fn seconds_and_spread(&self) -> String {
        let seconds = || self.runs.iter().map(|run| run.seconds);
        let (low, high) = (seconds().fold(f64::INFINITY, f64::min), seconds().fold(0.0, f64::max));
        match self.runs.len() {
            1 => format!("{:.2}", self.seconds()),
            _ => format!("{:.2} ({low:.2}–{high:.2})", self.seconds()),
        }
    }

    fn cpu_seconds(&self) -> String {
        let median = median(self.runs.iter().filter_map(|run| run.cost).map(|(seconds, _)| seconds));
        median.map(|seconds| format!("{seconds:.2}")).unwrap_or_default()
    }

    /// What a pipe without a second host has at one side only is one number.
    fn peak(&self) -> String {
        let peaks = self.runs.iter().filter_map(|run| run.cost).map(|(_, peak)| peak);
        let peak = peaks.reduce(|one, other| [0, 1].map(|side| one[side].max(other[side])));
        match peak.map(|peak| peak.map(|bytes| bytes >> 20)) {
            None | Some([0, 0]) => String::new(),
            Some([all, 0]) => all.to_string(),
            Some([sender, receiver]) => format!("{sender} + {receiver}"),
        }
    }
}

/// Returns the rows of a case, each with its line break; the first contender is the one that the others are compared with.
pub(crate) fn rows(outcome: &Outcome) -> String {
    let first = outcome.contenders.first().map_or(f64::NAN, Runs::seconds);
    let mut rows = String::new();
    for (number, runs) in outcome.contenders.iter().enumerate() {
        let (title, ratio) = match number {
            0 => (outcome.title.as_str(), String::new()),
            _ => ("", format!("{:.2}", runs.seconds() / first)),
        };
        let _ = writeln!(
            rows,
            "| {title} | {} | {} | {ratio} | {} | {} | {} |",
            runs.contender,
            runs.seconds_and_spread(),
            runs.cpu_seconds(),
            runs.peak(),
            wire(runs.wire_bytes(), outcome.changed_bytes),
        );
    }
    rows
}

fn wire(bytes: Option<u64>, changed: Option<u64>) -> String {
    let Some(bytes) = bytes else { return String::new() };
    let mebibytes = format!("{:.1}", bytes as f64 / 1_048_576.0);
    match changed {
        None => mebibytes,
        Some(changed) => format!("{mebibytes} ({:.2} × the changed blocks)", bytes as f64 / changed.max(1) as f64),
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<_> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        count if count % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(contender: &str, seconds: &[f64]) -> Runs {
        let mut runs = Runs::of(contender.to_owned());
        runs.runs = seconds
            .iter()
            .map(|seconds| Run { seconds: *seconds, cost: Some((2.0 * seconds, [3 << 20, 4 << 20])), wire_bytes: None })
            .collect();
        runs
    }

    #[test]
    fn a_ratio_is_that_of_the_medians_to_the_first_contenders() {
        let mut slow = runs("slow", &[9.0, 3.0, 4.0]);
        slow.weighed = Some(3 << 20);
        let outcome = Outcome {
            title: "data".to_owned(),
            changed_bytes: Some(2 << 20),
            contenders: vec![runs("fast", &[1.0, 3.0, 2.0]), slow],
        };
        assert_eq!(
            rows(&outcome),
            "| data | fast | 2.00 (1.00–3.00) |  | 4.00 | 3 + 4 |  |\n\
             |  | slow | 4.00 (3.00–9.00) | 2.00 | 8.00 | 3 + 4 | 3.0 (1.50 × the changed blocks) |\n"
        );
    }

    #[test]
    fn the_parts_of_a_run_are_added_and_their_peaks_are_not() {
        let mut all = Runs::of("one".to_owned());
        all.add(Run { seconds: 1.0, cost: Some((0.5, [10 << 20, 1 << 20])), wire_bytes: Some(1 << 20) });
        all.add(Run { seconds: 0.5, cost: Some((0.25, [2 << 20, 5 << 20])), wire_bytes: Some(1 << 20) });
        let outcome = Outcome { title: "two".to_owned(), changed_bytes: None, contenders: vec![all] };
        assert_eq!(rows(&outcome), "| two | one | 1.50 |  | 0.75 | 10 + 5 | 2.0 |\n");
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }
}
