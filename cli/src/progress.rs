//! Follows a transfer to its end: a bar on a terminal, a line for each finished step elsewhere.
//!
//! Owns how a transfer looks while it runs and what Ctrl-C does to it. Refuses to know who started it.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use flocker_node::api::{
    client::{Client, Kept, Place, Verdict},
    types::{Direction, Stage, TransferProgress, TransferResource, TransferState},
};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::output::{Output, human_bytes, human_millis, route};

/// How often what is shown is renewed; the daemon tells a transfer's end at once.
const POLL: Duration = Duration::from_millis(200);

/// How long an interrupted transfer is waited for before the user is left to come back to it.
const INTERRUPTED_LIMIT: Duration = Duration::from_secs(60);

/// How long a cancelled transfer may take to end.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// The user's Ctrl-C, listened to from the moment this is made.
pub(crate) struct Interrupt(Signal);

impl Interrupt {
    /// Takes over Ctrl-C.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        Ok(Self(signal(SignalKind::interrupt())?))
    }

    /// Waits for it.
    pub(crate) async fn pressed(&mut self) {
        // `None` would mean that the runtime's signal driver is gone; then it cannot be pressed any more.
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// How following a transfer ended.
#[derive(Debug)]
pub(crate) enum Followed {
    /// It is final.
    Final(Box<TransferResource>),
    /// The user pressed Ctrl-C; this is its last known state.
    Stopped(Box<TransferResource>),
    /// It stays interrupted; it goes on by itself when the peer is back.
    StillInterrupted(Box<TransferResource>),
}

/// Follows a transfer until it is final, the user stops it, or it stays interrupted for [`INTERRUPTED_LIMIT`].
pub(crate) async fn follow(
    client: &Client,
    output: Output,
    mut transfer: TransferResource,
    interrupt: &mut Interrupt,
) -> anyhow::Result<Followed> {
    let mut display = Display::new(output);
    let mut interrupted_since = None;
    while !transfer.state.is_final() {
        display.show(&transfer);
        if transfer.state == TransferState::Interrupted {
            let since = *interrupted_since.get_or_insert_with(Instant::now);
            if since.elapsed() > INTERRUPTED_LIMIT {
                return Ok(Followed::StillInterrupted(Box::new(transfer)));
            }
        } else {
            interrupted_since = None;
        }
        transfer = tokio::select! {
            biased;
            () = interrupt.pressed() => return Ok(Followed::Stopped(Box::new(transfer))),
            now = client.transfer(&transfer.id, POLL) => now?,
        };
    }
    display.show(&transfer);
    Ok(Followed::Final(Box::new(transfer)))
}

/// Cancels a transfer and waits for its end; a second Ctrl-C does not wait.
pub(crate) async fn cancel(client: &Client, id: &str, interrupt: &mut Interrupt) -> anyhow::Result<TransferResource> {
    let mut transfer = client.cancel_transfer(id).await?;
    let mut limit = pin!(tokio::time::sleep(CANCEL_LIMIT));
    while !transfer.state.is_final() {
        transfer = tokio::select! {
            biased;
            () = interrupt.pressed() => break,
            () = &mut limit => break,
            now = client.transfer(id, POLL) => now?,
        };
    }
    Ok(transfer)
}

/// What a transfer looks like while it runs.
struct Display {
    output: Output,
    bar: Option<ProgressBar>,
    steps_told: u32,
    interruption_told: bool,
    pause_told: bool,
}

impl Display {
    fn new(output: Output) -> Self {
        Self { output, bar: None, steps_told: 0, interruption_told: false, pause_told: false }
    }

    fn show(&mut self, transfer: &TransferResource) {
        if self.output.draws() {
            self.draw(transfer);
        } else {
            self.tell(transfer);
        }
    }

    fn draw(&mut self, transfer: &TransferResource) {
        let bar = self.bar.get_or_insert_with(ProgressBar::no_length);
        let progress = &transfer.progress;
        let template = match progress.expected_bytes {
            Some(expected) => {
                bar.set_length(expected.max(progress.delta_bytes).max(1));
                "{prefix}  [{bar:24}] {msg}"
            }
            None => "{prefix}  {spinner} {msg}",
        };
        // The templates are constants; one that is wrong leaves the default style.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(route(transfer));
        bar.set_position(progress.delta_bytes);
        bar.set_message(running_line(transfer));
        bar.tick();
    }

    fn tell(&mut self, transfer: &TransferResource) {
        let progress = &transfer.progress;
        // The last step's arrival is told by the end line.
        if progress.steps_done > self.steps_told && progress.steps_done < progress.steps_total {
            self.steps_told = progress.steps_done;
            let (done, total) = (progress.steps_done, progress.steps_total);
            self.output.talk(&format!("{}: {done} of {total} snapshots have arrived", route(transfer)));
        }
        if transfer.state == TransferState::Interrupted && !self.interruption_told {
            self.interruption_told = true;
            let why = transfer.problem.as_ref().map(|problem| format!(": {problem}")).unwrap_or_default();
            self.output.talk(&format!("{}: interrupted{why}; waiting for it to go on", route(transfer)));
        }
        if transfer.state == TransferState::Paused && !self.pause_told {
            self.output.talk(&format!("{}: paused; waiting until somebody resumes it", route(transfer)));
        }
        self.pause_told = transfer.state == TransferState::Paused;
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Returns what stands behind the bar.
fn running_line(transfer: &TransferResource) -> String {
    let progress = &transfer.progress;
    if transfer.state == TransferState::Interrupted {
        return "interrupted, waiting for the peer".to_owned();
    }
    if transfer.state == TransferState::Paused {
        return "paused, waiting until somebody resumes it".to_owned();
    }
    let mut line = human_bytes(progress.delta_bytes);
    if let Some(expected) = progress.expected_bytes {
        line.push_str(&format!(" of {}", human_bytes(expected)));
    }
    line.push_str(&format!(", {}/s", human_bytes(progress.rate_bytes_per_second)));
    if let Some(seconds) = remaining_seconds(progress) {
        line.push_str(&format!(", {} left", human_millis(seconds * 1000)));
    }
    if let Some(stage) = progress.limited_by {
        line.push_str(&format!(", held up by {}", held_up_by(stage)));
    }
    if progress.steps_total > 1 {
        line.push_str(&format!(", snapshot {} of {}", progress.steps_done + 1, progress.steps_total));
    }
    line
}

fn held_up_by(stage: Stage) -> &'static str {
    match stage {
        Stage::Source => "reading",
        Stage::Compression => "compression",
        Stage::Limit => "its limit",
        Stage::Line => "the line",
        Stage::Receiver => "writing",
        Stage::Arrival => "the sender or the line",
    }
}

fn remaining_seconds(progress: &TransferProgress) -> Option<u64> {
    let left = progress.expected_bytes?.checked_sub(progress.delta_bytes)?;
    left.checked_div(progress.rate_bytes_per_second)
}

/// Returns what a finished transfer ends with: what it cost, and what a policy has done.
pub(crate) fn end_line(transfer: &TransferResource) -> String {
    let Some(resolution) = &transfer.resolution else { return cost_line(transfer) };
    let mut lines = Vec::new();
    if !transfer.dry_run {
        lines.push(cost_line(transfer));
    }
    let (is, keeps) = if transfer.dry_run { ("would be", "would keep") } else { ("is", "keeps") };
    let Place { host, volume } = &resolution.landed;
    lines.push(format!("the histories had gone apart; what was brought {is} volume {volume} on {host}"));
    if let Some(Kept { place, tip }) = &resolution.kept {
        let tip = tip.as_ref().map(|tip| format!(", up to {}", tip.name)).unwrap_or_default();
        lines.push(format!("{} {keeps} its own as volume {}{tip}", place.host, place.volume));
    }
    lines.join("\n")
}

fn cost_line(transfer: &TransferResource) -> String {
    let progress = &transfer.progress;
    let what = route(transfer);
    match transfer.outcome.as_ref().map(|outcome| &outcome.verdict) {
        Some(Verdict::UpToDate) => format!("{what}: nothing to do, it is there already"),
        Some(Verdict::FastForward { base, missing }) if transfer.dry_run => {
            let plural = if missing.total == 1 { "" } else { "s" };
            let names: Vec<_> = missing.listed.iter().map(|point| point.name.as_str()).collect();
            let how = match base {
                Some(base) => format!("the difference to {} (taken on {})", base.name, base.host),
                None => "a full copy".to_owned(),
            };
            let size = progress.expected_bytes.map(|bytes| format!(", {} of delta at most", human_bytes(bytes)));
            format!(
                "{what}: would send {} snapshot{plural} ({}), beginning with {how}{}",
                missing.total,
                names.join(", "),
                size.unwrap_or_default()
            )
        }
        _ => {
            let resumed = match progress.resumed {
                0 => String::new(),
                1 => ", resumed once".to_owned(),
                times => format!(", resumed {times} times"),
            };
            format!(
                "{what}: {} of delta ({} volume), {} on the wire, {}{resumed}",
                human_bytes(progress.delta_bytes),
                human_bytes(progress.volume_bytes),
                human_bytes(progress.wire_bytes),
                human_millis(progress.elapsed_ms)
            )
        }
    }
}

/// Returns the verb of a transfer with its preposition: `push db@two to host-b`.
pub(crate) fn deed(transfer: &TransferResource) -> String {
    let snapshot = transfer.snapshot.as_ref().map(|name| format!("@{name}")).unwrap_or_default();
    match transfer.direction {
        Direction::Push => format!("push {}{snapshot} to {}", transfer.volume, transfer.peer),
        Direction::Pull => format!("pull {}{snapshot} from {}", transfer.volume, transfer.peer),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::{Value, json};

    use super::*;

    /// A transfer with some fields changed.
    pub(crate) fn transfer(changes: Value) -> TransferResource {
        let mut value = json!({"id": "018f0000-0000-7000-8000-00000000abcd", "direction": "push", "volume": "db",
            "snapshot": "two", "peer": "host-b", "as_name": null, "dry_run": false, "state": "running",
            "outcome": null, "refusal": null, "problem": null, "started": "2026-03-01T11:57:00Z", "finished": null,
            "progress": {"steps_done": 0, "steps_total": 1, "volume_bytes": 432_013_312, "delta_bytes": 3_355_443,
                "expected_bytes": null, "wire_bytes": 1_153_434, "rate_bytes_per_second": 1_048_576, "resumed": 0,
                "elapsed_ms": 800}});
        for (name, change) in changes.as_object().unwrap() {
            match (&mut value[name], change) {
                (Value::Object(inner), Value::Object(change)) => inner.extend(change.clone()),
                (place, change) => *place = change.clone(),
            }
        }
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_end_line_says_what_it_cost() {
        let done = transfer(json!({"state": "done"}));
        assert_eq!(end_line(&done), "db@two → host-b: 3.2 MiB of delta (412 MiB volume), 1.1 MiB on the wire, 0.8 s");
        let pulled = transfer(json!({"direction": "pull", "as_name": "copy", "progress": {"resumed": 2}}));
        assert!(end_line(&pulled).starts_with("db@two ← host-b as copy: "));
        assert!(end_line(&pulled).ends_with("0.8 s, resumed 2 times"));
    }

    #[test]
    fn the_time_left_is_shown_where_the_end_is_known() {
        let known = transfer(json!({"progress": {"expected_bytes": 13_841_203, "steps_total": 3, "steps_done": 1}}));
        assert_eq!(running_line(&known), "3.2 MiB of 13.2 MiB, 1.0 MiB/s, 10.0 s left, snapshot 2 of 3");
        assert_eq!(running_line(&transfer(json!({}))), "3.2 MiB, 1.0 MiB/s");
        let held_up = transfer(json!({"progress": {"limited_by": "receiver"}}));
        assert_eq!(running_line(&held_up), "3.2 MiB, 1.0 MiB/s, held up by writing");
        let stalled = transfer(json!({"progress": {"expected_bytes": 13_841_203, "rate_bytes_per_second": 0}}));
        assert_eq!(running_line(&stalled), "3.2 MiB of 13.2 MiB, 0 B/s");
    }
}
