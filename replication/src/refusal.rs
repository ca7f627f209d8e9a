//! How a refusal reads: who wrote what and when, and the commands that go on.
//!
//! Owns the words and the drawing, as a pure function of an [`Outcome`]. Refuses to know terminals: it is plain ASCII,
//! less than 100 columns for names of usual length. Neighbour: [`crate::plan`].

use std::fmt::Write as _;

use flocker_storage::model::{HeadState, NAME_LIMIT, NodeName, SnapshotId, VolumeName};

use crate::{
    message::DivergencePolicy,
    plan::{Direction, Outcome, Point, Points, Refusal, UnrelatedReason, Verdict},
    resolution::{self, Way, incoming_name},
};

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

/// A purpose, and the commands that serve it.
type Step = (String, Vec<String>);

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

    fn ways_on(&self) -> Vec<Step> {
        let Outcome { volume, name, receiver, want, verdict, .. } = self.0;
        let mut steps = Vec::new();
        if let Verdict::Behind { newer } = verdict {
            let renamed = if name == volume { String::new() } else { format!(" --as {volume}") };
            match (self.0.direction, newer.tip()) {
                (Direction::Push, _) => {
                    let command = format!("flocker pull {name} {}{renamed}", self.peer());
                    steps.push(step(format!("take the newer snapshots to {}:", self.here()), [command]));
                }
                (Direction::Pull, Some(tip)) => {
                    let command = format!("flocker push {name}@{} {}{renamed}", tip.name, self.peer());
                    steps.push(step(format!("send the newer snapshots to {}:", self.peer()), [command]));
                }
                (Direction::Pull, None) => {}
            }
            if let Some(tip) = newer.tip() {
                let fork = fork_name(name, &tip.host, tip.id);
                let command = format!("flocker rollback {name}@{} --fork-newer {fork}", want.name);
                steps.push(step(
                    format!("go back to {} on {}, keeping the newer snapshots as a volume:", want.name, receiver.name),
                    [command + &self.on(&receiver.name)],
                ));
            }
            return steps;
        }
        steps.extend(self.by_policy(DivergencePolicy::Fork));
        if let Verdict::Diverged { .. } = verdict {
            let fork = incoming_name(volume, want);
            let merge = format!("flocker merge {name} {fork}{}", self.on(&receiver.name));
            steps.push(step(
                "join both into one snapshot:".to_owned(),
                [self.with_policy(DivergencePolicy::Fork), merge],
            ));
        }
        // Without any snapshot there is nothing to go back to.
        if !matches!(verdict, Verdict::Dirty { tip: None }) {
            steps.extend(self.by_policy(DivergencePolicy::Theirs));
            steps.extend(self.by_policy(DivergencePolicy::Ours));
        }
        steps
    }

    /// The way that a policy is, with what becomes of the side that gives way.
    fn by_policy(&self, policy: DivergencePolicy) -> Option<Step> {
        let Outcome { volume, name, sender, receiver, want, verdict, direction } = self.0;
        let (sender, receiver) = (&sender.name, &receiver.name);
        let purpose = match resolution::way(policy, verdict.into()) {
            Way::Straight | Way::Refuse | Way::Contained => return None,
            Way::Beside => {
                let fork = incoming_name(volume, want);
                format!("keep both: let the history of {sender} land on {receiver} as volume {fork}:")
            }
            Way::Succeed | Way::Rename => {
                let right = match direction {
                    Direction::Push => format!(" (takes the right `force` on {receiver})"),
                    Direction::Pull => String::new(),
                };
                let kept = match self.losing_tip() {
                    Some(tip) => format!("volume {}", fork_name(name, &tip.host, tip.id)),
                    None => "a volume".to_owned(),
                };
                format!("let {sender} win; {receiver} keeps its own as {kept}{right}:")
            }
            Way::Reverse => {
                // It works between volumes of one name only.
                if volume != name {
                    return None;
                }
                let right = match direction {
                    Direction::Push => String::new(),
                    Direction::Pull => format!(" (takes the right `force` on {sender})"),
                };
                format!("let {receiver} win; {sender} keeps its own as a volume{right}:")
            }
        };
        Some(step(purpose, [self.with_policy(policy)]))
    }

    /// The newest snapshot that gives way under `theirs`, where it is there already: a head with changes gets one first.
    fn losing_tip(&self) -> Option<&Point> {
        match &self.0.verdict {
            Verdict::Diverged { only_receiver, head: HeadState::Clean, .. } => only_receiver.tip(),
            Verdict::Unrelated { receiver_tip, .. } => receiver_tip.as_ref(),
            _ => None,
        }
    }

    /// The same command once more with a policy, and with the name on the receiver where that differs.
    fn with_policy(&self, policy: DivergencePolicy) -> String {
        let Outcome { direction, volume, name, want, .. } = self.0;
        let verb = match direction {
            Direction::Push => "push",
            Direction::Pull => "pull",
        };
        let renamed = if volume == name { String::new() } else { format!(" --as {name}") };
        format!("flocker {verb} {volume}@{} {}{renamed} --on-divergence {policy}", want.name, self.peer())
    }

    /// Says where a command is to be typed, when that is not here.
    fn on(&self, host: &NodeName) -> String {
        if host == self.here() { String::new() } else { format!("    # on {host}") }
    }
}

fn step(purpose: String, commands: impl Into<Vec<String>>) -> Step {
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
