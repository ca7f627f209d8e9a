//! The results as a Markdown table.

use crate::case::Title;

/// One run of one contender.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// Until the data was durable at the receiver.
    pub(crate) seconds: f64,
    /// Processor time of both sides.
    pub(crate) cpu_seconds: f64,
    /// The highest memory at the sender and at the receiver, in bytes.
    pub(crate) peak_bytes: [u64; 2],
    /// What went over the line, where that is known.
    pub(crate) wire_bytes: Option<u64>,
}

/// All runs of one contender in one case.
#[derive(Debug)]
pub(crate) struct Runs {
    pub(crate) contender: &'static str,
    pub(crate) runs: Vec<Run>,
}

impl Runs {
    pub(crate) fn of(contender: &'static str) -> Self {
        Self { contender, runs: Vec::new() }
    }

    fn median(&self, of: impl Fn(&Run) -> f64) -> f64 {
        let mut sorted: Vec<_> = self.runs.iter().map(of).collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
    }

    fn seconds(&self) -> f64 {
        self.median(|run| run.seconds)
    }

    fn spread(&self) -> String {
        let seconds = || self.runs.iter().map(|run| run.seconds);
        format!("{:.2}–{:.2}", seconds().fold(f64::INFINITY, f64::min), seconds().fold(0.0, f64::max))
    }

    fn peak(&self) -> String {
        let peak = |side: usize| self.runs.iter().map(|run| run.peak_bytes[side]).max().unwrap_or(0) >> 20;
        format!("{} + {}", peak(0), peak(1))
    }

    fn wire_bytes(&self) -> Option<u64> {
        self.runs.iter().filter_map(|run| run.wire_bytes).max()
    }
}

/// Says what the numbers are, and begins the table.
pub(crate) fn print_head(scale: f64, runs: usize) {
    println!("Scale {scale}, {runs} runs of each contender in turn, on loopback.\n");
    println!("| case | contender | median s | spread s | ratio | CPU s | peak MiB | wire MiB |");
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
}

/// Prints the lines of one case; the first contender is the one that the others are compared with.
pub(crate) fn print_case(title: &Title, contenders: &[Runs]) {
    let first = contenders.first().map_or(1.0, Runs::seconds);
    for runs in contenders {
        let wire = match (runs.wire_bytes(), title.changed_bytes) {
            (None, _) => "–".to_owned(),
            (Some(wire), None) => mebibytes(wire),
            (Some(wire), Some(changed)) => {
                format!("{} ({:.2} × changed)", mebibytes(wire), wire as f64 / changed.max(1) as f64)
            }
        };
        println!(
            "| {} | {} | {:.2} | {} | {:.2} | {:.2} | {} | {wire} |",
            title.text,
            runs.contender,
            runs.seconds(),
            runs.spread(),
            runs.seconds() / first,
            runs.median(|run| run.cpu_seconds),
            runs.peak(),
        );
    }
}

/// Explains the columns.
pub(crate) fn print_notes() {
    println!(
        "\nRatio: the median beside flocker's; above 1 flocker was faster. Times end when the data is durable at the receiver. \
         CPU: processor time of both sides, with the programs they ran. Peak: highest resident memory at the sender and at \
         the receiver; of a daemon with all it keeps, of a pipe the sum over its programs. Wire: what went over the line, \
         before the encryption by ssh or QUIC; “× changed”: beside the blocks of 4 KiB that had changed."
    );
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1_048_576.0)
}
