//! `flocker demo`: the main job, told step by step on two real nodes.
//!
//! Owns the story. Everything is done by the same commands a user types, run as child processes of this program;
//! [`stage`] holds folder, nodes and cleaning up, [`data`] the files, [`compare`] the proof that both trees are equal.

mod compare;
mod data;
mod stage;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use flocker_node::api::types::{MountResource, TokenResource, TransferResource};
use tokio::signal::unix::{SignalKind, signal};

use self::stage::{Host, Stage};
use super::Size;
use crate::{
    output::{Output, human_bytes, human_millis, write_out},
    report::Exit,
};

/// How much is written when nothing else is said: enough to see a difference between whole and delta, little enough
/// for a small machine.
const DEFAULT_SIZE: u64 = 300 << 20;

/// The least a demonstration makes sense with.
const SMALLEST_SIZE: u64 = 1 << 20;

/// How often the data may come to lie on the disk: head and snapshots on two hosts, without reflinks, and some room.
const COPIES: u64 = 7;

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Leave the nodes running and say how to talk to them
    #[arg(long)]
    keep: bool,
    /// Where: a folder that does not exist, or an empty one; a temporary one when left out
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// How much to write into the volume: 300M
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,
}

/// Runs the demonstration and cleans up, whatever happened.
pub(super) async fn run(args: DemoArgs, _output: Output) -> anyhow::Result<Exit> {
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut stage = Stage::set(args.dir.as_deref())?;

    let told = {
        let story = Story { stage: &mut stage, stop: stop.clone(), sums: Vec::new() }.tell(args.size);
        tokio::select! {
            biased;
            _ = interrupted.recv() => None,
            _ = terminated.recv() => None,
            _ = hung_up.recv() => None,
            told = story => Some(told),
        }
    };
    // Whatever still copies or compares on a thread of its own ends before its files are taken away.
    stop.store(true, Ordering::Relaxed);

    match told {
        Some(Ok(())) if args.keep => {
            stage.keep();
            Ok(Exit::Done)
        }
        Some(Ok(())) => {
            say("\nCleaning up: stopping both nodes, removing the folder.");
            stage.strike().await?;
            Ok(Exit::Done)
        }
        Some(Err(error)) => {
            stage.tell_logs();
            say("\nThe demonstration failed; stopping the nodes and removing the folder.");
            if let Err(left) = stage.strike().await {
                say(&format!("{left:#}"));
            }
            Err(error)
        }
        None => {
            say("\nInterrupted; stopping the nodes and removing the folder.");
            stage.strike().await?;
            Ok(Exit::Interrupted)
        }
    }
}

/// Tells one line of the story. Nobody listening is no reason to leave nodes and files behind.
fn say(text: &str) {
    let _ = write_out(&format!("{text}\n"));
}

/// What one push cost.
struct Sum {
    what: &'static str,
    transfer: TransferResource,
}

struct Story<'a> {
    stage: &'a mut Stage,
    stop: Arc<AtomicBool>,
    sums: Vec<Sum>,
}

impl Story<'_> {
    async fn tell(mut self, size: Option<Size>) -> anyhow::Result<()> {
        let began = Instant::now();
        let size = self.affordable(size)?;
        say(&format!(
            "Two Flocker nodes on this machine, host-a and host-b, in {}.\n\
             The lines behind a $ are what you would type on that host; here each command also carries --state {}.",
            self.stage.folder().display(),
            self.stage.folder().join("HOST").display()
        ));
        self.found_cluster().await?;
        let source = self.fill_volume(size).await?;
        self.push_both(&source).await?;
        self.prove_equal(&source).await?;
        self.diverge(&source).await?;
        say(&format!("\nThat was all, in {}.", human_millis(began.elapsed().as_millis() as u64)));
        Ok(())
    }

    fn affordable(&self, size: Option<Size>) -> anyhow::Result<u64> {
        let free = self.stage.available_bytes()?;
        let most = free / COPIES;
        let folder = self.stage.folder().display();
        match size {
            Some(Size(wanted)) if wanted > most => bail!(
                "{folder} has {} free, and {} need up to {COPIES} times as much; choose another place with --dir",
                human_bytes(free),
                human_bytes(wanted)
            ),
            Some(Size(wanted)) => Ok(wanted.max(SMALLEST_SIZE)),
            None if most < SMALLEST_SIZE => {
                bail!("{folder} has only {} free; choose another place with --dir", human_bytes(free))
            }
            None => Ok(most.min(DEFAULT_SIZE)),
        }
    }

    async fn found_cluster(&mut self) -> anyhow::Result<()> {
        say("\n1. A cluster of two nodes\n");
        let listen = self.stage.listen(Host::A);
        self.stage.run(Host::A, &["init", "--name", "host-a", "--listen", &listen]).await?;
        self.stage.start(Host::A).await?;
        let token: TokenResource = self.stage.ask(Host::A, &["token", "create"]).await?;
        let listen = self.stage.listen(Host::B);
        let join = ["join", &token.token, "--name", "host-b", "--listen", &listen];
        self.stage.run(Host::B, &join).await?;
        self.stage.start(Host::B).await
    }

    async fn fill_volume(&mut self, size: u64) -> anyhow::Result<PathBuf> {
        say("\n2. A volume with files in it\n");
        self.stage.run(Host::A, &["create", "db", "-m", "purpose=demo"]).await?;
        let mount: MountResource = self.stage.ask(Host::A, &["mount", "db"]).await?;
        let source = PathBuf::from(mount.path);
        let (place, stop) = (source.clone(), self.stop.clone());
        let written = on_a_thread(move || data::fill(&place, size, &stop)).await.context("cannot fill the volume")?;
        say(&format!(
            "(copied {} files, {}, from {} into {})",
            written.files,
            human_bytes(written.bytes),
            written.from.join(" and "),
            source.display()
        ));
        self.stage.run(Host::A, &["snapshot", "db@one"]).await?;
        Ok(source)
    }

    async fn push_both(&mut self, source: &Path) -> anyhow::Result<()> {
        say("\n3. The first push: everything\n");
        self.push("db@one").await?;

        say("\n4. A little changes; the second push carries only that\n");
        let (place, stop) = (source.to_owned(), self.stop.clone());
        let changes = on_a_thread(move || data::change(&place, &stop)).await.context("cannot change files")?;
        for change in changes {
            say(&format!("({change})"));
        }
        self.stage.run(Host::A, &["snapshot", "db@two"]).await?;
        self.push("db@two").await?;

        say("\n          volume      delta       on the wire  time");
        for Sum { what, transfer } in &self.sums {
            let progress = &transfer.progress;
            say(&format!(
                "{what:<8}  {:<10}  {:<10}  {:<11}  {}",
                human_bytes(progress.volume_bytes),
                human_bytes(progress.delta_bytes),
                human_bytes(progress.wire_bytes),
                human_millis(progress.elapsed_ms)
            ));
        }
        Ok(())
    }

    async fn push(&mut self, what: &'static str) -> anyhow::Result<()> {
        let transfer = self.stage.ask(Host::A, &["push", what, "host-b"]).await?;
        self.sums.push(Sum { what, transfer });
        Ok(())
    }

    async fn prove_equal(&mut self, source: &Path) -> anyhow::Result<()> {
        say("\n5. Are both the same?\n");
        let mount: MountResource = self.stage.ask(Host::B, &["mount", "db"]).await?;
        ensure!(mount.read_only, "host-b mounted its replica writable");
        let (left, right, stop) = (source.to_owned(), PathBuf::from(mount.path), self.stop.clone());
        let differences = on_a_thread(move || compare::trees(&left, &right, &stop)).await?;
        match differences {
            compare::Verdict::Same { entries, bytes } => say(&format!(
                "(compared {entries} entries: names, kinds, modes, sizes, times, link targets, and {} of contents: all equal)",
                human_bytes(bytes)
            )),
            compare::Verdict::Different(list) => bail!("the trees differ:\n  {}", list.join("\n  ")),
        }
        self.stage.run(Host::B, &["unmount", "db"]).await
    }

    async fn diverge(&mut self, source: &Path) -> anyhow::Result<()> {
        say("\n6. Both sides write: the next push would lose one side's work, so it is refused\n");
        self.stage.run(Host::B, &["promote", "db", "--force"]).await?;
        let mount: MountResource = self.stage.ask(Host::B, &["mount", "db"]).await?;
        write(Host::B, &Path::new(&mount.path).join("orders-of-host-b.txt"))?;
        self.stage.run(Host::B, &["snapshot", "db@three-on-b"]).await?;
        write(Host::A, &source.join("orders-of-host-a.txt"))?;
        self.stage.run(Host::A, &["snapshot", "db@three"]).await?;

        let code = self.stage.try_run(Host::A, &["push", "db@three", "host-b"]).await?;
        ensure!(code == Exit::Conflict as i32, "the push ended with {code}, and a refusal ends with 4");
        say(&format!("\n(it ended with exit code {code}; nothing was changed on either side:)"));
        self.stage.show(Host::B, &["snapshots", "db"]).await?;
        self.stage.run(Host::B, &["unmount", "db"]).await?;
        self.stage.run(Host::A, &["unmount", "db"]).await
    }
}

fn write(host: Host, path: &Path) -> anyhow::Result<()> {
    let name = path.file_name().unwrap_or_default().display();
    say(&format!("{host}$ echo 'an order taken on {host}' > {name}"));
    std::fs::write(path, format!("an order taken on {host}\n"))
        .with_context(|| format!("cannot write {}", path.display()))
}

async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    Ok(tokio::task::spawn_blocking(work).await.context("the work on files ended badly")??)
}
