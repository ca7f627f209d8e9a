//! How a refusal reads: who wrote what and when, and the commands that go on.
//!
//! Owns the words and the drawing, as a pure function of an [`Outcome`]. Refuses to know terminals: it is plain ASCII,
//! less than 100 columns for names of usual length. Neighbour: [`crate::plan`].

use std::fmt::Write as _;

use flocker_storage::model::{HeadState, NAME_LIMIT, NodeName, SnapshotId, VolumeName};

use crate::plan::{Direction, Outcome, Point, Points, Refusal, UnrelatedReason, Verdict};

/// The most snapshots drawn for one side.
const DRAWN_LIMIT: usize = 5;

impl Refusal {
    /// Writes the refusal for an operator on the node where the push or pull was asked for. Several lines, the last
    /// one ends with a line break.
    pub fn render(&self) -> String {
        let story = Story(&self.0);
        let mut text = story.headline();
        text.push_str("\n\n");
        text.push_str(&story.evidence());
        text.push_str("\nnothing was changed; to go on:\n");
        for (purpose, commands) in story.ways_on() {
            let _ = writeln!(text, "  {purpose}");
            commands.iter().for_each(|command| {
                let _ = writeln!(text, "      {command}");
            });
        }
        text
    }
}

/// Returns the name of the volume that keeps a history beside another one: `NAME.HOST.SHORTID`, the same wherever it
/// is made from the same tip. Long names are cut so that it stays a name.
pub fn fork_name(volume: &VolumeName, host: &NodeName, tip: SnapshotId) -> VolumeName {
    let short = tip.short();
    let room = NAME_LIMIT - short.len() - 2;
    let host = &host.as_str()[..host.as_str().len().min(room / 2)];
    let volume = &volume.as_str()[..volume.as_str().len().min(room - host.len())];
    format!("{volume}.{host}.{short}").parse().expect("names cut to the limit and joined by dots are a name")
}

struct Story<'a>(&'a Outcome);

type Way = (String, Vec<String>);

impl Story<'_> {
    fn here(&self) -> &NodeName {
        match self.0.direction {
            Direction::Push => &self.0.sender.name,
            Direction::Pull => &self.0.receiver.name,
        }
    }

    fn peer(&self) -> &NodeName {
        match self.0.direction {
            Direction::Push => &self.0.receiver.name,
            Direction::Pull => &self.0.sender.name,
        }
    }

    fn headline(&self) -> String {
        let Outcome { direction, volume, name, sender, receiver, want, verdict } = self.0;
        let what = match direction {
            Direction::Push => format!("cannot push {volume}@{} to {}", want.name, receiver.name),
            Direction::Pull => format!("cannot pull {volume}@{} from {}", want.name, sender.name),
        };
        let receiver = &receiver.name;
        let why = match verdict {
            Verdict::UpToDate => format!("{receiver} has it already"),
            Verdict::FastForward { .. } => "nothing is in the way".to_owned(),
            Verdict::Behind { .. } => format!("{receiver} has newer snapshots of {name}"),
            Verdict::Diverged { .. } => "the two histories have gone apart".to_owned(),
            Verdict::Unrelated { reason: UnrelatedReason::OtherVolumeId, .. } => {
                format!("{name} on {receiver} is another volume")
            }
            Verdict::Unrelated { reason: UnrelatedReason::NoCommonSnapshot, .. } => {
                format!("the two copies of {name} have no snapshot in common any more")
            }
            Verdict::Dirty { .. } => format!("{name} on {receiver} has changes that no snapshot holds"),
        };
        format!("{what}: {why}")
    }

    fn evidence(&self) -> String {
        let Outcome { name, sender, receiver, want, verdict, .. } = self.0;
        let (sender, receiver) = (&sender.name, &receiver.name);
        let mut text = String::new();
        match verdict {
            Verdict::UpToDate | Verdict::FastForward { .. } => {}
            Verdict::Behind { newer } => {
                let _ = writeln!(text, "  o {}   <- asked for\n  |", point_line(want));
                draw_branch(&mut text, "  ", newer, &format!("newest on {receiver}"));
            }
            Verdict::Diverged { common, only_sender, only_receiver, head, .. } => {
                let _ = writeln!(text, "  o {}   <- newest that both have\n  |\\", point_line(common));
                draw_branch(&mut text, "  | ", only_sender, &format!("asked for, from {sender}"));
                let _ = writeln!(text, "  |");
                draw_branch(&mut text, "  ", only_receiver, &format!("newest on {receiver}"));
                if *head == HeadState::Dirty {
                    let _ = writeln!(text, "  |\n  o changes on {receiver} that no snapshot holds");
                }
            }
            Verdict::Unrelated { reason, receiver_volume, receiver_tip } => {
                let _ = writeln!(text, "  o {}   <- asked for, from {sender}", point_line(want));
                match receiver_tip {
                    Some(tip) => {
                        let _ = writeln!(text, "  o {}   <- newest on {receiver}", point_line(tip));
                    }
                    None => {
                        let _ = writeln!(text, "  {name} on {receiver} has no snapshot");
                    }
                }
                if *reason == UnrelatedReason::OtherVolumeId {
                    let _ = writeln!(text, "  {name} on {receiver} has the volume id {receiver_volume}");
                }
            }
            Verdict::Dirty { tip } => {
                match tip {
                    Some(tip) => {
                        let _ = writeln!(text, "  o {}   <- newest on {receiver}\n  |", point_line(tip));
                    }
                    None => {
                        let _ = writeln!(text, "  {name} on {receiver} has no snapshot");
                    }
                }
                let _ = writeln!(text, "  o changes on {receiver} that no snapshot holds");
            }
        }
        text
    }

    fn ways_on(&self) -> Vec<Way> {
        let Outcome { volume, name, sender, receiver, want, verdict, .. } = self.0;
        let (here, peer) = (self.here(), self.peer());
        match verdict {
            Verdict::UpToDate | Verdict::FastForward { .. } => Vec::new(),
            Verdict::Behind { newer } => {
                let mut ways = Vec::new();
                if self.0.direction == Direction::Push {
                    let renamed = if name == volume { String::new() } else { format!(" --as {volume}") };
                    let command = format!("flocker pull {name} {peer}{renamed}");
                    ways.push(way(format!("take the newer snapshots to {here}:"), [command]));
                } else if let Some(tip) = newer.tip() {
                    let renamed = if name == volume { String::new() } else { format!(" --as {volume}") };
                    let command = format!("flocker push {name}@{} {peer}{renamed}", tip.name);
                    ways.push(way(format!("send the newer snapshots to {peer}:"), [command]));
                }
                if let Some(tip) = newer.tip() {
                    ways.push(way(
                        format!(
                            "go back to {} on {}, keeping the newer snapshots as a volume:",
                            want.name, receiver.name
                        ),
                        [format!(
                            "flocker rollback {name}@{} --fork-newer {}{}",
                            want.name,
                            fork_name(name, &receiver.name, tip.id),
                            self.on(&receiver.name)
                        )],
                    ));
                }
                ways
            }
            Verdict::Diverged { only_receiver, receiver_name, head, .. } => {
                let mut ways = vec![self.beside()];
                let tip = only_receiver.tip().map_or(want.id, |tip| tip.id);
                let on = self.on(&receiver.name);
                let mut commands = Vec::new();
                if *head == HeadState::Dirty {
                    commands.push(format!("flocker snapshot {name}@before-{}{on}", tip.short()));
                }
                commands.push(format!(
                    "flocker rollback {name}@{receiver_name} --fork-newer {}{on}",
                    fork_name(name, &receiver.name, tip)
                ));
                commands.push(self.again());
                ways.push(way(
                    format!(
                        "give {name} on {} the history of {}, keeping its own as a volume:",
                        receiver.name, sender.name
                    ),
                    commands,
                ));
                ways
            }
            Verdict::Unrelated { .. } => vec![self.beside()],
            Verdict::Dirty { tip } => {
                let on = self.on(&receiver.name);
                let kept = format!("before-{}", want.id.short());
                let mut ways = vec![self.beside()];
                if let Some(tip) = tip {
                    ways.push(way(
                        format!("keep the changes on {} as a volume, then go on:", receiver.name),
                        [
                            format!("flocker snapshot {name}@{kept}{on}"),
                            format!(
                                "flocker rollback {name}@{} --fork-newer {}{on}",
                                tip.name,
                                fork_name(name, &receiver.name, want.id)
                            ),
                            self.again(),
                        ],
                    ));
                }
                ways
            }
        }
    }

    /// The way that always works: the incoming history lands beside what is there.
    fn beside(&self) -> Way {
        let Outcome { volume, sender, receiver, want, .. } = self.0;
        let fork = fork_name(volume, &sender.name, want.id);
        way(
            format!("keep both: let the history of {} land on {} as another volume:", sender.name, receiver.name),
            [format!("{} --as {fork}", self.verb())],
        )
    }

    /// The same command once more, with the name on the receiver where that differs.
    fn again(&self) -> String {
        let Outcome { volume, name, .. } = self.0;
        if volume == name { self.verb() } else { format!("{} --as {name}", self.verb()) }
    }

    fn verb(&self) -> String {
        let Outcome { direction, volume, want, .. } = self.0;
        let verb = match direction {
            Direction::Push => "push",
            Direction::Pull => "pull",
        };
        format!("flocker {verb} {volume}@{} {}", want.name, self.peer())
    }

    /// Says where a command is to be typed, when that is not here.
    fn on(&self, host: &NodeName) -> String {
        if host == self.here() { String::new() } else { format!("    # on {host}") }
    }
}

fn way(purpose: String, commands: impl Into<Vec<String>>) -> Way {
    (purpose, commands.into())
}

/// Draws a branch downwards, the newest snapshot at the bottom with a label.
fn draw_branch(text: &mut String, rail: &str, points: &Points, label: &str) {
    let drawn = &points.listed[points.listed.len().saturating_sub(DRAWN_LIMIT)..];
    let more = points.total.saturating_sub(drawn.len() as u64);
    if more > 0 {
        let _ = writeln!(text, "{rail}: {more} more");
    }
    for (at, point) in drawn.iter().enumerate() {
        let label = if at + 1 == drawn.len() { format!("   <- {label}") } else { String::new() };
        let _ = writeln!(text, "{rail}o {}{label}", point_line(point));
    }
}

fn point_line(point: &Point) -> String {
    let Point { id, name, host, created, logical_bytes } = point;
    let created = created.strftime("%Y-%m-%d %H:%M:%S UTC");
    format!("{name} ({})  written on {host} at {created}, {}", id.short(), size(*logical_bytes))
}

fn size(bytes: u64) -> String {
    let mut rest = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if rest < 1024.0 {
            break;
        }
        rest /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{rest:.1} {unit}") }
}
