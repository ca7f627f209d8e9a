//! `push`, `pull`, `transfers`.

use std::{io::Write as _, num::NonZeroU64, time::Duration};

use anyhow::Context as _;
use clap::Args;
use flocker_node::api::{
    client::{ClientError, DivergencePolicy, NodeName, SnapshotRef, VolumeName},
    types::{StartTransfer, TransferResource, TransferState},
};
use jiff::Timestamp;

use super::{CompareArgs, Session, TransfersCommand, policy};
use crate::{
    output,
    progress::{self, Followed, Interrupt},
    report::{self, Exit, Stop},
    values::{self, Object, Size},
};

#[derive(Debug, Args)]
pub(super) struct PushArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@SNAPSHOT", value_parser = values::existing_snapshot)]
    snapshot: SnapshotRef,
    /// The peer's name
    #[arg(value_name = "HOST")]
    peer: NodeName,
    #[command(flatten)]
    pub(super) options: TransferArgs,
}

#[derive(Debug, Args)]
pub(super) struct PullArgs {
    /// The volume's name at the peer, and the snapshot; its newest one when left out
    #[arg(value_name = "VOLUME[@SNAPSHOT]")]
    pub(super) object: Object,
    /// The peer's name
    #[arg(value_name = "HOST")]
    peer: NodeName,
    #[command(flatten)]
    options: TransferArgs,
}

#[derive(Debug, Args)]
pub(super) struct TransferArgs {
    /// The volume's name at the receiver, where it shall be another one
    #[arg(long = "as", value_name = "NAME")]
    as_name: Option<VolumeName>,
    /// What to do when the histories have gone apart
    #[arg(long, value_name = "POLICY", value_parser = policy(), default_value = "refuse")]
    pub(super) on_divergence: DivergencePolicy,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Start it, print its id, and leave it to the daemon
    #[arg(long, short)]
    detach: bool,
    /// Send at most so many bytes per second, such as 20M
    #[arg(long, value_name = "RATE")]
    limit: Option<Size>,
    #[command(flatten)]
    compare: CompareArgs,
}

impl TransferArgs {
    fn request(&self, peer: NodeName, object: &Object) -> StartTransfer {
        StartTransfer {
            peer,
            snapshot: object.snapshot().cloned(),
            as_name: self.as_name.clone(),
            on_divergence: self.on_divergence,
            dry_run: self.dry_run,
            compare: self.compare.into(),
            limit_bytes_per_second: self.limit.and_then(|Size(bytes)| NonZeroU64::new(bytes)),
        }
    }
}

impl Session<'_> {
    pub(super) async fn push(&self, args: PushArgs) -> anyhow::Result<Exit> {
        let mut interrupt = Interrupt::listen()?;
        let object = Object::Snapshot(args.snapshot);
        let request = args.options.request(args.peer, &object);
        let started = self.client.push(object.volume(), &request).await?;
        self.accompany(started, args.options.detach, &mut interrupt).await
    }

    pub(super) async fn pull(&self, args: PullArgs) -> anyhow::Result<Exit> {
        let mut interrupt = Interrupt::listen()?;
        let request = args.options.request(args.peer, &args.object);
        let started = self.client.pull(args.object.volume(), &request).await?;
        self.accompany(started, args.options.detach, &mut interrupt).await
    }

    async fn accompany(
        &self,
        started: TransferResource,
        detach: bool,
        interrupt: &mut Interrupt,
    ) -> anyhow::Result<Exit> {
        if detach {
            self.output.item(&started, || format!("{}\n", started.id))?;
            let command = report::command_for(self.paths);
            self.output
                .talk(&format!("it goes on in the daemon; follow it with: {command} transfers wait {}", started.id));
            return Ok(Exit::Done);
        }
        match progress::follow(&self.client, self.output, started, interrupt).await? {
            Followed::Final(transfer) => self.conclude(&transfer),
            Followed::StillInterrupted(transfer) => self.leave_interrupted(&transfer),
            Followed::Stopped(transfer) => {
                let ended = progress::cancel(&self.client, &transfer.id, interrupt).await?;
                if ended.state == TransferState::Done {
                    return self.conclude(&ended);
                }
                self.output.item(&ended, String::new)?;
                let done = format!("stopped by Ctrl-C: the transfer is {}", output::state_word(ended.state));
                Err(Stop::new(Exit::Interrupted, done)
                    .hint("what has arrived in part is not visible on the receiver; with --detach a transfer goes on alone")
                    .into())
            }
        }
    }

    /// Tells how a transfer ended, and turns it into an exit code.
    fn conclude(&self, transfer: &TransferResource) -> anyhow::Result<Exit> {
        self.output.item(transfer, String::new)?;
        self.tell_warnings(&transfer.warnings);
        match transfer.state {
            TransferState::Done => {
                self.output.talk(&progress::end_line(transfer));
                Ok(Exit::Done)
            }
            TransferState::Refused => {
                let refusal =
                    transfer.refusal.clone().unwrap_or_else(|| format!("refused: {}", progress::deed(transfer)));
                // A refusal is the error message of this call: it is told with --quiet too.
                let text = output::printable(refusal.trim_end()) + "\n";
                std::io::stderr().lock().write_all(text.as_bytes())?;
                Ok(Exit::Conflict)
            }
            _ => Err(failure(transfer)),
        }
    }

    fn leave_interrupted(&self, transfer: &TransferResource) -> anyhow::Result<Exit> {
        self.output.item(transfer, String::new)?;
        let command = report::command_for(self.paths);
        let why = transfer.problem.as_ref().map(|problem| format!(": {problem}")).unwrap_or_default();
        let stop = Stop::new(Exit::Unreachable, format!("cannot {} now{why}", progress::deed(transfer)));
        Err(stop
            .hint(format!(
                "nothing is lost, and it goes on by itself; come back to it with: {command} transfers wait {}",
                transfer.id
            ))
            .into())
    }

    pub(super) async fn transfers(&self, command: TransfersCommand) -> anyhow::Result<Exit> {
        match command {
            TransfersCommand::List => {
                let transfers = self.client.transfers().await?;
                self.output.list(&transfers, |transfers| output::transfers(transfers, Timestamp::now()))?;
            }
            TransfersCommand::Show { id } => {
                let transfer = self.find(&id).await?;
                self.output.item(&transfer, || output::transfer(&transfer, Timestamp::now()))?;
            }
            TransfersCommand::Cancel { id } => {
                let id = self.find(&id).await?.id;
                let transfer = self.client.cancel_transfer(&id).await?;
                self.output.item(&transfer, String::new)?;
                self.output.talk(&format!("transfer {id} is being cancelled"));
            }
            TransfersCommand::Pause { id } => {
                let id = self.find(&id).await?.id;
                let transfer = self.client.pause_transfer(&id).await?;
                self.output.item(&transfer, String::new)?;
                let command = report::command_for(self.paths);
                let is = if transfer.state == TransferState::Paused { "is paused" } else { "is coming to rest" };
                self.output.talk(&format!("transfer {id} {is}; go on with it by: {command} transfers resume {id}"));
            }
            TransfersCommand::Resume { id } => {
                let id = self.find(&id).await?.id;
                let transfer = self.client.resume_transfer(&id).await?;
                self.output.item(&transfer, String::new)?;
                self.output.talk(&format!("transfer {id} goes on"));
            }
            TransfersCommand::Wait { id } => {
                let mut interrupt = Interrupt::listen()?;
                let found = self.find(&id).await?;
                // Ctrl-C ends the waiting here, not the transfer: this call did not start it.
                return match progress::follow(&self.client, self.output, found, &mut interrupt).await? {
                    Followed::Final(transfer) => self.conclude(&transfer),
                    Followed::StillInterrupted(transfer) => self.leave_interrupted(&transfer),
                    Followed::Stopped(_) => Ok(Exit::Interrupted),
                };
            }
        }
        Ok(Exit::Done)
    }

    /// Finds a transfer by its id, or by a beginning or end that no other id has.
    async fn find(&self, id: &str) -> anyhow::Result<TransferResource> {
        match self.client.transfer(id, Duration::ZERO).await {
            Err(ClientError::Problem(problem)) if matches!(problem.status, 400 | 404 | 422) => {
                let found = choose(self.client.transfers().await?, id)?;
                found.ok_or(ClientError::Problem(problem)).with_context(|| format!("cannot find transfer {id}"))
            }
            answer => Ok(answer?),
        }
    }
}

fn choose(transfers: Vec<TransferResource>, part: &str) -> anyhow::Result<Option<TransferResource>> {
    let fits = |transfer: &TransferResource| transfer.id.starts_with(part) || transfer.id.ends_with(part);
    let mut fitting: Vec<_> = transfers.into_iter().filter(fits).collect();
    if fitting.len() > 1 {
        let ids: Vec<_> = fitting.iter().map(|transfer| transfer.id.as_str()).collect();
        let stop = Stop::new(Exit::Usage, format!("{part} fits {} transfers: {}", ids.len(), ids.join(", ")));
        return Err(stop.hint("write more of the id; the end of it differs soonest").into());
    }
    Ok(fitting.pop())
}

fn failure(transfer: &TransferResource) -> anyhow::Error {
    let what = format!("cannot {}", progress::deed(transfer));
    match (&transfer.problem, transfer.state) {
        (_, TransferState::Cancelled) => Stop::new(Exit::Failure, format!("{what}: it was cancelled")).into(),
        (Some(problem), _) => anyhow::Error::new(problem.clone()).context(what),
        (None, state) => Stop::new(Exit::Failure, format!("{what}: it is {}", output::state_word(state))).into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;
    use crate::progress::tests::transfer;

    #[test]
    fn an_id_may_be_abbreviated_at_either_end_as_long_as_it_is_unique() {
        let all = || vec![transfer(json!({"id": "0190-aaaa"})), transfer(json!({"id": "0190-bbbb"}))];
        assert_eq!(choose(all(), "bbb").unwrap().unwrap().id, "0190-bbbb");
        assert_eq!(choose(all(), "0190-a").unwrap().unwrap().id, "0190-aaaa");
        assert!(choose(all(), "ccc").unwrap().is_none());
        let unclear = choose(all(), "0190").unwrap_err();
        assert_eq!(report::exit_of(&unclear), Exit::Usage);
        assert!(unclear.to_string().contains("0190-aaaa, 0190-bbbb"), "{unclear}");
    }

    #[test]
    fn a_failed_transfer_ends_as_its_problem_says() {
        let problem = |status| json!({"status": status, "code": "x", "detail": "host-b does not answer"});
        let down = failure(&transfer(json!({"state": "failed", "problem": problem(502)})));
        assert_eq!(report::exit_of(&down), Exit::Unreachable);
        assert_eq!(
            report::tell(&down, None),
            "error: cannot push db@two to host-b\n  because: host-b does not answer\n"
        );
        let cancelled = failure(&transfer(json!({"state": "cancelled"})));
        assert_eq!(report::exit_of(&cancelled), Exit::Failure);
    }
}
