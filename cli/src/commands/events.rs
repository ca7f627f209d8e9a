//! `events`.

use std::io::{self, Write as _};

use clap::Args;
use flocker_node::api::events::{Event, EventId, EventResource};

use super::Session;
use crate::{
    output::{Format, human_bytes, printable},
    report::{Exit, Stop},
};

#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Begin behind this event, which was told earlier, instead of now
    #[arg(long, value_name = "ID")]
    after: Option<EventId>,
}

impl Session<'_> {
    /// Ends with the daemon, or with whoever reads.
    pub(super) async fn events(&self, args: EventsArgs) -> anyhow::Result<()> {
        let format = self.output.format;
        let mut last = args.after;
        let listened = self.client.events(args.after, |told| {
            last = Some(told.id);
            let line = match format {
                Format::Table => printable(&line(&told)),
                Format::Json | Format::Jsonl => serde_json::to_string(&told)?,
            };
            let mut out = io::stdout().lock();
            writeln!(out, "{line}").and_then(|()| out.flush())
        });
        listened.await??;
        let again = last.map(|id| format!("`flocker events --after {id}` goes on here")).unwrap_or_default();
        Err(Stop::new(Exit::Unreachable, "the daemon has stopped".to_owned()).hint(again).into())
    }
}

/// An event in one line for people.
fn line(told: &EventResource) -> String {
    let time = told.time.round(jiff::Unit::Second).unwrap_or(told.time);
    let what = match &told.event {
        Event::VolumeAdded { volume } => volume.to_string(),
        Event::VolumeRenamed { volume, from } => format!("{from} is {volume} now"),
        Event::VolumeChanged { volume, role, epoch } => format!("{volume}: {role}, epoch {epoch}"),
        Event::VolumeRemoved { volume } => volume.to_string(),
        Event::SnapshotAdded { volume, snapshot, host } => format!("{volume}@{snapshot}, taken on {host}"),
        Event::SnapshotRemoved { volume, snapshot } => format!("{volume}@{snapshot}"),
        Event::Mounted { volume, path, read_only } => {
            format!("{volume} at {path}{}", if *read_only { ", read-only" } else { "" })
        }
        Event::Unmounted { volume } => volume.to_string(),
        Event::Transfer { transfer, direction, volume, peer, state, progress, problem } => {
            let (word, way) = (format!("{direction:?}").to_lowercase(), format!("{state:?}").to_lowercase());
            let moved = human_bytes(progress.delta_bytes);
            let why = problem.as_ref().map(|code| format!(" ({code})")).unwrap_or_default();
            format!("{word} of {volume}, {peer}: {way}{why}, {moved}, {transfer}")
        }
        Event::PeerJoined { peer } => peer.to_string(),
        Event::Lost => "what happened before this is not known any more; look anew".to_owned(),
    };
    format!("{time}  {:<16}  {what}", told.event.kind())
}
