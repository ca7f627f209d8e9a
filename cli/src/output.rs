//! What goes to standard output: the API's resources as JSON, or tables for people.
//!
//! Owns formats, columns, human sizes and times. Refuses to know where the resources come from. Talk and progress go
//! to standard error ([`Output::talk`], [`crate::progress`]).

use std::io::{self, IsTerminal as _, Write as _};

use clap::ValueEnum;
use comfy_table::{ColumnConstraint, ContentArrangement, Table, presets};
use flocker_node::api::{
    client::{HeadState, Metadata},
    types::{
        Direction, MountKind, NodeResource, PeerResource, PoolResource, SnapshotResource, TransferResource,
        TransferState, VolumeResource,
    },
};
use jiff::{Timestamp, Unit};
use serde::Serialize;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// One JSON document: the API's resource.
    Json,
    /// One line of JSON for each item.
    Jsonl,
}

/// Whether talk and progress are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Talk {
    /// Yes.
    Wanted,
    /// Only errors.
    Quiet,
}

/// Where results and talk go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// How results are written.
    pub(crate) format: Format,
    /// Whether anything but results and errors is said.
    pub(crate) talk: Talk,
}

impl Output {
    /// Writes one resource; `human` is its text for people, which may be empty.
    pub(crate) fn item(&self, item: &impl Serialize, human: impl FnOnce() -> String) -> anyhow::Result<()> {
        let text = match self.format {
            Format::Table => printable(&human()),
            Format::Json => serde_json::to_string_pretty(item)? + "\n",
            Format::Jsonl => serde_json::to_string(item)? + "\n",
        };
        write_out(&text)
    }

    /// Writes a list of resources.
    pub(crate) fn list<T: Serialize>(&self, items: &[T], human: impl FnOnce(&[T]) -> String) -> anyhow::Result<()> {
        match self.format {
            Format::Jsonl => {
                let lines: Result<Vec<_>, _> = items.iter().map(serde_json::to_string).collect();
                write_out(&lines?.iter().map(|line| format!("{line}\n")).collect::<String>())
            }
            Format::Table | Format::Json => self.item(&items, || human(items)),
        }
    }

    /// Says something to the user, on standard error.
    pub(crate) fn talk(&self, text: &str) {
        if self.talk == Talk::Wanted {
            // Nobody to talk to is no reason to fail.
            let _ = writeln!(io::stderr().lock(), "{}", printable(text));
        }
    }

    /// Tells whether a progress bar may be drawn.
    pub(crate) fn draws(&self) -> bool {
        self.talk == Talk::Wanted && io::stderr().is_terminal()
    }
}

/// Takes out what would steer a terminal: metadata, paths and problems may come from another host.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Writes text to standard output.
pub(crate) fn write_out(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Returns a size as people read it: `3.2 MiB`.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // The unit is chosen so that rounding never gives "1024.0".
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value >= 99.95 { format!("{value:.0} {}", UNITS[unit]) } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Returns a number of milliseconds as people read it: `0.8 s`, `2 min 5 s`.
pub(crate) fn human_millis(millis: u64) -> String {
    match millis {
        0..60_000 => format!("{:.1} s", millis as f64 / 1000.0),
        60_000..3_600_000 => format!("{} min {} s", millis / 60_000, millis / 1000 % 60),
        _ => format!("{} h {} min", millis / 3_600_000, millis / 60_000 % 60),
    }
}

/// Returns a time as people say it: `3 minutes ago`, `in 59 minutes`.
pub(crate) fn relative(time: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(time).as_secs();
    let (count, unit) = match seconds.unsigned_abs() {
        0..10 => return "just now".to_owned(),
        s @ 10..60 => (s, "second"),
        s @ 60..3600 => (s / 60, "minute"),
        s @ 3600..86_400 => (s / 3600, "hour"),
        s @ 86_400..2_592_000 => (s / 86_400, "day"),
        s @ 2_592_000..31_536_000 => (s / 2_592_000, "month"),
        s => (s / 31_536_000, "year"),
    };
    let plural = if count == 1 { "" } else { "s" };
    if seconds < 0 { format!("in {count} {unit}{plural}") } else { format!("{count} {unit}{plural} ago") }
}

fn exact(time: Timestamp, now: Timestamp) -> String {
    let rounded = time.round(Unit::Second).unwrap_or(time);
    format!("{rounded} ({})", relative(time, now))
}

/// Lays rows out under headings, without borders.
fn table<const N: usize>(headings: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .force_no_tty()
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(headings);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2)).set_constraint(ColumnConstraint::ContentWidth);
    }
    let text: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    text.join("\n") + "\n"
}

/// Lays facts out as aligned `key: value` lines; facts without a value are left out.
fn facts(pairs: &[(&str, Option<String>)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    let mut text = String::new();
    for (name, value) in pairs {
        if let Some(value) = value {
            text.push_str(&format!("{:width$} {value}\n", format!("{name}:")));
        }
    }
    text
}

fn words(metadata: &Metadata) -> String {
    metadata.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

fn dash(text: Option<String>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned())
}

fn some_words(metadata: &Metadata) -> Option<String> {
    (!metadata.is_empty()).then(|| words(metadata))
}

/// The table of `flocker list`.
pub(crate) fn volumes(volumes: &[VolumeResource], now: Timestamp) -> String {
    let row = |volume: &VolumeResource| {
        let tip = volume.tip.as_ref();
        [
            volume.name.to_string(),
            volume.role.to_string(),
            volume.snapshots.to_string(),
            dash(tip.map(|tip| format!("{}, {}", tip.name, relative(tip.created, now)))),
            dash(tip.map(|tip| human_bytes(tip.logical_bytes))),
            dash(volume.mount.as_ref().map(|mount| mount.path.clone())),
            dash(some_words(&volume.metadata)),
        ]
    };
    table(["NAME", "ROLE", "SNAPSHOTS", "NEWEST", "SIZE", "MOUNTED AT", "METADATA"], volumes.iter().map(row))
}

/// The text of `flocker inspect db`.
pub(crate) fn volume(volume: &VolumeResource, now: Timestamp) -> String {
    let head = volume.head.map(|head| match head {
        HeadState::Clean => "clean: no changes since the newest snapshot".to_owned(),
        HeadState::Dirty => "dirty: has changes that no snapshot holds".to_owned(),
    });
    let origin = volume.origin.as_ref();
    let mount = volume.mount.as_ref().map(|mount| {
        let kind = match mount.kind {
            MountKind::Bind => "bind mount",
            MountKind::Symlink => "symlink",
        };
        format!("{} ({kind}, {})", mount.path, if mount.read_only { "read-only" } else { "read-write" })
    });
    let tip = volume.tip.as_ref().map(|tip| {
        format!("{}@{}, {}, {}", tip.volume, tip.name, relative(tip.created, now), human_bytes(tip.logical_bytes))
    });
    facts(&[
        ("name", Some(volume.name.to_string())),
        ("id", Some(volume.id.to_string())),
        ("role", Some(format!("{} (epoch {})", volume.role, volume.epoch))),
        ("created", Some(exact(volume.created, now))),
        ("origin", origin.map(|o| o.name.clone().unwrap_or_else(|| format!("{} {}", o.volume_id, o.snapshot_id)))),
        ("snapshots", Some(volume.snapshots.to_string())),
        ("newest", tip),
        ("head", head),
        ("mounted at", mount),
        ("quota", volume.quota_bytes.map(human_bytes)),
        ("metadata", some_words(&volume.metadata)),
    ])
}

/// The table of `flocker snapshots db`.
pub(crate) fn snapshots(snapshots: &[SnapshotResource], now: Timestamp) -> String {
    let row = |snapshot: &SnapshotResource| {
        [
            format!("{}@{}", snapshot.volume, snapshot.name),
            snapshot.id.short(),
            relative(snapshot.created, now),
            snapshot.host.name.to_string(),
            human_bytes(snapshot.logical_bytes),
            dash(some_words(&snapshot.metadata)),
        ]
    };
    table(["SNAPSHOT", "ID", "TAKEN", "ON", "SIZE", "METADATA"], snapshots.iter().map(row))
}

/// The text of `flocker inspect db@snap`.
pub(crate) fn snapshot(snapshot: &SnapshotResource, now: Timestamp) -> String {
    let parents = snapshot.parents.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    facts(&[
        ("name", Some(format!("{}@{}", snapshot.volume, snapshot.name))),
        ("id", Some(snapshot.id.to_string())),
        ("taken", Some(exact(snapshot.created, now))),
        ("on", Some(format!("{} ({})", snapshot.host.name, snapshot.host.id))),
        ("parents", (!parents.is_empty()).then_some(parents)),
        ("size", Some(format!("{} ({} bytes)", human_bytes(snapshot.logical_bytes), snapshot.logical_bytes))),
        ("changes", snapshot.unchanged.then(|| "none against its parent".to_owned())),
        ("metadata", some_words(&snapshot.metadata)),
    ])
}

/// The table of `flocker peers`.
pub(crate) fn peers(peers: &[PeerResource], now: Timestamp) -> String {
    let row = |peer: &PeerResource| {
        [
            peer.name.to_string(),
            peer.id.chars().take(12).collect(),
            dash(Some(peer.addresses.join(" "))),
            dash(peer.last_seen.map(|seen| relative(seen, now))),
        ]
    };
    table(["NAME", "ID", "ADDRESSES", "LAST SEEN"], peers.iter().map(row))
}

/// The text of `flocker node status`.
pub(crate) fn node(node: &NodeResource, now: Timestamp) -> String {
    let memory = format!("{} (at most {})", human_bytes(node.resident_bytes), human_bytes(node.peak_resident_bytes));
    facts(&[
        ("name", Some(node.name.to_string())),
        ("id", Some(node.id.clone())),
        ("cluster", Some(node.cluster.clone())),
        ("authority", Some(if node.authority { "yes: join tokens are made here" } else { "no" }.to_owned())),
        ("version", Some(node.version.clone())),
        ("listens on", Some(node.listen.clone())),
        ("addresses", Some(node.addresses.join(" ")).filter(|addresses| !addresses.is_empty())),
        ("certificate", Some(format!("ends {}", exact(node.certificate_expires, now)))),
        ("process", Some(node.pid.to_string())),
        ("started", Some(exact(node.started, now))),
        ("memory", Some(memory)),
    ])
}

/// The text of `flocker pool status`.
pub(crate) fn pool(pool: &PoolResource) -> String {
    let capabilities = &pool.capabilities;
    let formats = capabilities.formats.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let (free, all) = (human_bytes(pool.usage.available_bytes), human_bytes(pool.usage.total_bytes));
    let mut text = facts(&[
        ("pool", Some(capabilities.pool.clone())),
        ("driver", Some(capabilities.driver.clone())),
        ("space", Some(format!("{free} available of {all}"))),
        ("volumes", Some(pool.volumes.to_string())),
        ("formats", Some(formats)),
        ("group snapshots", Some(yes(capabilities.group_atomic))),
        ("quotas", Some(yes(capabilities.quota))),
    ]);
    for (name, value) in &capabilities.facts {
        text.push_str(&format!("{:16} {value}\n", format!("{name}:")));
    }
    if !pool.orphans.is_empty() {
        let rows = pool.orphans.iter().map(|orphan| [orphan.place.clone(), orphan.reason.clone()]);
        text.push_str(&format!("\n{}", table(["ORPHANED (LEFT ALONE)", "WHY"], rows)));
    }
    text
}

/// Returns the state's word.
pub(crate) fn state_word(state: TransferState) -> &'static str {
    match state {
        TransferState::Running => "running",
        TransferState::Interrupted => "interrupted",
        TransferState::Paused => "paused",
        TransferState::Done => "done",
        TransferState::Refused => "refused",
        TransferState::Failed => "failed",
        TransferState::Cancelled => "cancelled",
    }
}

/// Returns what goes where: `db@two → host-b`.
pub(crate) fn route(transfer: &TransferResource) -> String {
    let snapshot = transfer.snapshot.as_ref().map(|name| format!("@{name}")).unwrap_or_default();
    let arrow = match transfer.direction {
        Direction::Push => "→",
        Direction::Pull => "←",
    };
    let renamed = transfer.as_name.as_ref().filter(|name| **name != transfer.volume);
    let renamed = renamed.map(|name| format!(" as {name}")).unwrap_or_default();
    format!("{}{snapshot} {arrow} {}{renamed}", transfer.volume, transfer.peer)
}

/// The table of `flocker transfers`.
pub(crate) fn transfers(transfers: &[TransferResource], now: Timestamp) -> String {
    let row = |transfer: &TransferResource| {
        let progress = &transfer.progress;
        [
            transfer.id.clone(),
            format!("{}{}", state_word(transfer.state), if transfer.dry_run { " (dry run)" } else { "" }),
            route(transfer),
            format!("{}/{}", progress.steps_done, progress.steps_total),
            human_bytes(progress.delta_bytes),
            human_bytes(progress.wire_bytes),
            relative(transfer.started, now),
        ]
    };
    table(["ID", "STATE", "WHAT", "STEPS", "DELTA", "WIRE", "STARTED"], transfers.iter().map(row))
}

/// The text of `flocker transfers show ID`.
pub(crate) fn transfer(transfer: &TransferResource, now: Timestamp) -> String {
    let progress = &transfer.progress;
    let expected = progress.expected_bytes.map(|bytes| format!(" of {} at most", human_bytes(bytes)));
    let mut text = facts(&[
        ("id", Some(transfer.id.clone())),
        ("what", Some(route(transfer))),
        ("state", Some(state_word(transfer.state).to_owned())),
        ("dry run", transfer.dry_run.then(|| "yes".to_owned())),
        ("steps", Some(format!("{} of {}", progress.steps_done, progress.steps_total))),
        ("volume", Some(human_bytes(progress.volume_bytes))),
        ("delta", Some(human_bytes(progress.delta_bytes) + &expected.unwrap_or_default())),
        ("on the wire", Some(human_bytes(progress.wire_bytes))),
        ("worked for", Some(human_millis(progress.elapsed_ms))),
        ("resumed", (progress.resumed > 0).then(|| format!("{} times", progress.resumed))),
        ("problem", transfer.problem.as_ref().map(|problem| problem.detail.clone())),
        ("started", Some(exact(transfer.started, now))),
        ("finished", transfer.finished.map(|finished| exact(finished, now))),
    ]);
    for warning in &transfer.warnings {
        text.push_str(&format!("{:12} {}: {}\n", "warning:", warning.path, warning.what));
    }
    if let Some(refusal) = &transfer.refusal {
        text.push_str(&format!("\n{}\n", refusal.trim_end()));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn now() -> Timestamp {
        "2026-03-01T12:00:00Z".parse().unwrap()
    }

    fn a_snapshot() -> serde_json::Value {
        json!({"id": "018f0000-0000-7000-8000-00000000abcd", "volume": "db", "name": "two", "parents": [],
            "host": {"id": "ab".repeat(32), "name": "host-a"}, "created": "2026-03-01T11:57:00Z",
            "metadata": {"why": "upgrade"}, "logical_bytes": 3_355_443, "unchanged": false})
    }

    fn a_volume() -> VolumeResource {
        let value = json!({"id": "018f0000-0000-7000-8000-000000000001", "name": "db", "metadata": {},
            "created": "2026-02-27T12:00:00Z", "origin": null, "role": "primary", "epoch": 1, "quota_bytes": null,
            "snapshots": 2, "tip": a_snapshot(), "head": "dirty",
            "mount": {"volume": "db", "path": "/m/db", "read_only": false, "kind": "bind"}});
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn sizes_read_well() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (3_355_443, "3.2 MiB"),
            (1_048_575, "1.0 MiB"),
            (432 << 20, "432 MiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human_bytes(bytes), text);
        }
    }

    #[test]
    fn times_read_well() {
        let at = |text: &str| relative(text.parse().unwrap(), now());
        assert_eq!(at("2026-03-01T11:59:59Z"), "just now");
        assert_eq!(at("2026-03-01T11:59:00Z"), "1 minute ago");
        assert_eq!(at("2026-03-01T13:30:00Z"), "in 1 hour");
        assert_eq!(at("2026-02-26T12:00:00Z"), "3 days ago");
        assert_eq!((human_millis(800), human_millis(125_000)), ("0.8 s".to_owned(), "2 min 5 s".to_owned()));
    }

    #[test]
    fn the_list_of_volumes_has_no_borders_and_no_trailing_blanks() {
        let text = volumes(&[a_volume()], now());
        assert_eq!(
            text,
            "NAME  ROLE     SNAPSHOTS  NEWEST              SIZE     MOUNTED AT  METADATA\n\
             db    primary  2          two, 3 minutes ago  3.2 MiB  /m/db       -\n"
        );
    }

    #[test]
    fn a_volume_is_told_as_facts() {
        assert_eq!(
            volume(&a_volume(), now()),
            "name:       db\n\
             id:         018f0000-0000-7000-8000-000000000001\n\
             role:       primary (epoch 1)\n\
             created:    2026-02-27T12:00:00Z (2 days ago)\n\
             snapshots:  2\n\
             newest:     db@two, 3 minutes ago, 3.2 MiB\n\
             head:       dirty: has changes that no snapshot holds\n\
             mounted at: /m/db (bind mount, read-write)\n"
        );
    }

    #[test]
    fn the_list_of_snapshots_shows_host_and_time() {
        let text = snapshots(&[serde_json::from_value(a_snapshot()).unwrap()], now());
        assert_eq!(
            text,
            "SNAPSHOT  ID        TAKEN          ON      SIZE     METADATA\n\
             db@two    0000abcd  3 minutes ago  host-a  3.2 MiB  why=upgrade\n"
        );
    }

    #[test]
    fn text_from_elsewhere_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a\u{fffd}[2Jb\nc");
    }

    #[test]
    fn an_empty_list_still_has_its_headings() {
        assert_eq!(peers(&[], now()), "NAME  ID  ADDRESSES  LAST SEEN\n");
    }
}
