//! `diff` and `merge`.

use std::{
    fmt::Write as _,
    io::{self, BufWriter, Write},
};

use clap::{Args, ValueEnum};
use flocker_node::api::{
    client::{SnapshotName, VolumeName},
    diff::{ChangeResource, DiffDetail, DiffTotals, Difference, Property, TreeName},
    merge::{ConflictKind, ConflictResource, MergeReport, MergeState, MergeVolume, Resolution, Resolve},
};

use super::Session;
use crate::{
    output::{Format, human_bytes, printable},
    report::{Exit, Stop},
};

/// How many conflicts are told one by one.
const CONFLICTS_TOLD: usize = 100;

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// A snapshot, or a volume as it is now
    #[arg(value_name = "VOLUME[@SNAPSHOT]")]
    from: TreeName,
    /// Another one, of any volume
    #[arg(value_name = "VOLUME[@SNAPSHOT]")]
    to: TreeName,
    /// Only say how much differs
    #[arg(long)]
    stat: bool,
}

#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// The volume to merge into
    volume: VolumeName,
    /// The volume whose newest snapshot is merged in
    #[arg(value_name = "FORK")]
    from: VolumeName,
    /// What becomes of paths that both have changed
    #[arg(long, value_enum, default_value_t)]
    conflicts: Conflicts,
    /// The new snapshot's name
    #[arg(long, value_name = "NAME")]
    snapshot: Option<SnapshotName>,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// What becomes of conflicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Conflicts {
    /// List them, and make nothing
    #[default]
    Stop,
    /// Keep ours, and theirs beside it as NAME.conflict-HOST-SHORTID
    KeepBoth,
    /// Take what VOLUME has
    Ours,
    /// Take what FORK has
    Theirs,
}

impl From<Conflicts> for Resolve {
    fn from(conflicts: Conflicts) -> Self {
        match conflicts {
            Conflicts::Stop => Self::Stop,
            Conflicts::KeepBoth => Self::KeepBoth,
            Conflicts::Ours => Self::Ours,
            Conflicts::Theirs => Self::Theirs,
        }
    }
}

impl Session<'_> {
    pub(super) async fn diff(&self, args: DiffArgs) -> anyhow::Result<()> {
        let DiffArgs { from, to, stat } = args;
        if stat {
            let totals = self.client.diff(&from, &to, DiffDetail::Totals, |_| Ok::<_, io::Error>(())).await??;
            return self.output.item(&totals, || told(&totals) + "\n");
        }
        let mut out = Changes { out: BufWriter::new(io::stdout().lock()), format: self.output.format, count: 0 };
        let totals = self.client.diff(&from, &to, DiffDetail::Paths, |change| out.write(&change)).await??;
        out.finish()?;
        self.output.talk(&format!("{from} against {to}: {}", told(&totals)));
        Ok(())
    }

    pub(super) async fn merge(&self, args: MergeArgs) -> anyhow::Result<Exit> {
        let MergeArgs { volume, from, conflicts, snapshot, dry_run } = args;
        let request = MergeVolume { from: from.clone(), conflicts: conflicts.into(), dry_run, snapshot };
        let report = self.client.merge(&volume, &request).await?;
        self.output.item(&report, || list(&report.conflicts))?;
        for snapshot in &report.kept {
            self.output.talk(&format!("took snapshot {snapshot} of what no snapshot held"));
        }
        for volume in &report.unsaved {
            self.output
                .talk(&format!("the head of {volume} has changes that no snapshot holds; they are not compared"));
        }
        if report.further_ancestors > 0 {
            self.output.talk("the histories were merged crosswise before: some conflicts may be none");
        }
        let counts = report.counts;
        let taken = format!(
            "{} changed by {volume}, {} by {from}, {} by both alike, {} put together, {} in conflict",
            counts.ours,
            counts.theirs,
            counts.same,
            counts.combined,
            report.conflicts.len()
        );
        match report.state {
            MergeState::UpToDate => self.output.talk(&format!("{volume} has all of {from} already")),
            MergeState::DryRun => self.output.talk(&format!("would merge {from} into {volume}: {taken}")),
            MergeState::Merged => {
                let made = report.snapshot.as_ref().map(|made| format!(" as {volume}@{}", made.name));
                self.output.talk(&format!("merged {from} into {volume}{}: {taken}", made.unwrap_or_default()));
            }
            MergeState::Conflicts => return Err(in_conflict(&volume, &from, &report).into()),
        }
        Ok(Exit::Done)
    }
}

fn in_conflict(volume: &VolumeName, from: &VolumeName, report: &MergeReport) -> Stop {
    let count = report.conflicts.len();
    let message = format!("cannot merge {from} into {volume}: {count} paths are in conflict; nothing was made");
    let again = format!("flocker merge {volume} {from} --conflicts");
    Stop::new(Exit::Conflict, message).hint(format!(
        "{again}=keep-both keeps both versions; =ours or =theirs takes one side; or edit one of the volumes first"
    ))
}

/// Tells totals in one line.
fn told(totals: &DiffTotals) -> String {
    let DiffTotals { added, removed, changed, added_bytes, removed_bytes, changed_bytes } = *totals;
    if added + removed + changed == 0 {
        return "nothing differs".to_owned();
    }
    format!(
        "{added} added ({}), {removed} removed ({}), {changed} changed ({})",
        human_bytes(added_bytes),
        human_bytes(removed_bytes),
        human_bytes(changed_bytes)
    )
}

/// Writes changes as they come.
struct Changes<W: Write> {
    out: W,
    format: Format,
    count: u64,
}

impl<W: Write> Changes<W> {
    fn write(&mut self, change: &ChangeResource) -> io::Result<()> {
        let first = self.count == 0;
        match self.format {
            // That something in a directory changed is told by that itself.
            Format::Table if change.kind == "directory" && change.properties == [Property::Times] => return Ok(()),
            Format::Table => writeln!(self.out, "{}", line(change))?,
            Format::Jsonl => writeln!(self.out, "{}", serde_json::to_string(change)?)?,
            Format::Json => {
                write!(self.out, "{}{}", if first { "[\n" } else { ",\n" }, serde_json::to_string(change)?)?
            }
        }
        self.count += 1;
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        if self.format == Format::Json {
            writeln!(self.out, "{}", if self.count == 0 { "[]" } else { "\n]" })?;
        }
        self.out.flush()
    }
}

fn line(change: &ChangeResource) -> String {
    let path = one_line(&change.path);
    match change.change {
        Difference::Added => format!("+ {path}"),
        Difference::Removed => format!("- {path}"),
        Difference::Changed => {
            let words: Vec<&str> = change.properties.iter().map(|property| word(*property)).collect();
            format!("M {path} ({})", words.join(", "))
        }
    }
}

/// A path in one line: what would end it or steer the terminal is taken out.
fn one_line(path: &str) -> String {
    printable(path).replace('\n', "\u{fffd}")
}

fn word(property: Property) -> &'static str {
    match property {
        Property::Type => "type",
        Property::Content => "content",
        Property::Target => "target",
        Property::Mode => "mode",
        Property::Owner => "owner",
        Property::Xattrs => "xattrs",
        Property::Times => "times",
        Property::Links => "links",
    }
}

/// Lists conflicts for people.
fn list(conflicts: &[ConflictResource]) -> String {
    let mut text = String::new();
    for conflict in conflicts.iter().take(CONFLICTS_TOLD) {
        let kinds: Vec<&str> = conflict.kinds.iter().map(|kind| kind_word(*kind)).collect();
        let done = match &conflict.done {
            Resolution::Ours => "ours".to_owned(),
            Resolution::Theirs => "theirs".to_owned(),
            Resolution::Both(beside) => format!("both, the other one as {}", one_line(&beside.0)),
        };
        let _ = writeln!(text, "C {} ({})", one_line(&conflict.path.0), kinds.join(", "));
        let (ours, theirs) = (one_line(&conflict.ours), one_line(&conflict.theirs));
        let _ = writeln!(text, "    ours: {ours}; theirs: {theirs}; kept: {done}");
        if conflict.beneath > 0 {
            let _ = writeln!(text, "    with {} entries beneath", conflict.beneath);
        }
    }
    if let Some(more) = conflicts.len().checked_sub(CONFLICTS_TOLD).filter(|more| *more > 0) {
        let _ = writeln!(text, "and {more} more; --output json lists them");
    }
    text
}

fn kind_word(kind: ConflictKind) -> &'static str {
    match kind {
        ConflictKind::Content => "content",
        ConflictKind::Mode => "mode",
        ConflictKind::Owner => "owner",
        ConflictKind::Xattrs => "xattrs",
        ConflictKind::Type => "type",
        ConflictKind::DeleteEdit => "deleted and edited",
        ConflictKind::DeletedDirectory => "added to a deleted directory",
        ConflictKind::Links => "links",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn change(path: &str, change: Difference, kind: &str, properties: &[Property]) -> ChangeResource {
        let (path, kind, properties) = (path.to_owned(), kind.to_owned(), properties.to_vec());
        ChangeResource { path, path_hex: None, change, properties, kind, bytes: 1 }
    }

    fn written(format: Format, changes: &[ChangeResource]) -> String {
        let mut bytes = Vec::new();
        let mut out = Changes { out: &mut bytes, format, count: 0 };
        changes.iter().for_each(|change| out.write(change).unwrap());
        out.finish().unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn changes_read_like_a_diff() {
        let changes = [
            change(".", Difference::Changed, "directory", &[Property::Times]),
            change("a", Difference::Added, "file", &[]),
            change("b\nc\u{1b}", Difference::Removed, "file", &[]),
            change("d", Difference::Changed, "file", &[Property::Content, Property::Mode]),
        ];
        assert_eq!(written(Format::Table, &changes), "+ a\n- b\u{fffd}c\u{fffd}\nM d (content, mode)\n");
        assert_eq!(written(Format::Jsonl, &changes).lines().count(), 4);
        let json: serde_json::Value = serde_json::from_str(&written(Format::Json, &changes)).unwrap();
        assert_eq!(json.as_array().map(Vec::len), Some(4));
        assert_eq!(written(Format::Json, &[]), "[]\n");
    }
}
