//! What a user types (clap) and which function does it.
//!
//! Owns the grammar of the command line. Each submodule does the commands of one noun through the API's client.

mod demo;
mod events;
mod history;
mod merge;
mod node;
mod snapshots;
mod tarball;
mod transfers;
mod volumes;

use std::{io, path::PathBuf};

use anyhow::Context as _;
use clap::{
    Args, CommandFactory as _, Parser, Subcommand, builder::PossibleValuesParser, builder::TypedValueParser as _,
};
use clap_complete::Shell;
use flocker_node::{
    api::client::{Client, Compare, DivergencePolicy, VolumeName},
    config::{ConfigError, Paths},
};

use crate::{
    output::{Format, Output, Talk},
    report::Exit,
    values::{self, Object, Size},
};

/// Volumes for stateful containers: snapshots, clones, and pushes between hosts.
#[derive(Debug, Parser)]
#[command(name = "flocker", version, max_term_width = 120, propagate_version = true)]
pub(crate) struct Call {
    /// What holds for every command.
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What holds for every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// How results are written
    #[arg(long, global = true, value_enum, default_value_t, env = "FLOCKER_OUTPUT")]
    output: Format,
    /// Say nothing but results and errors
    #[arg(long, short, global = true)]
    quiet: bool,
    /// The node's state folder; several nodes on one machine have one each
    #[arg(long, global = true, value_name = "DIR", env = "FLOCKER_STATE")]
    state: Option<PathBuf>,
    /// The daemon's unix socket
    #[arg(long, global = true, value_name = "PATH", env = "FLOCKER_SOCKET")]
    socket: Option<PathBuf>,
}

impl Global {
    /// Finds the node this call is for.
    pub(crate) fn paths(&self) -> Result<Paths, ConfigError> {
        Paths::resolve(self.state.clone(), self.socket.clone())
    }

    fn output(&self) -> Output {
        Output { format: self.output, talk: if self.quiet { Talk::Quiet } else { Talk::Wanted } }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show two nodes on this machine, a push, and a push that is refused; step by step
    Demo(demo::DemoArgs),
    /// Make a new cluster with this machine as its first node
    Init(node::SetupArgs),
    /// The daemon
    #[command(subcommand)]
    Node(NodeCommand),
    /// Tokens by which further nodes join the cluster
    #[command(subcommand)]
    Token(TokenCommand),
    /// Make this machine a node of the cluster a token is from
    Join(node::JoinArgs),
    /// The pool the volumes live in
    #[command(subcommand)]
    Pool(PoolCommand),
    /// List the other nodes of the cluster
    Peers,
    /// Create a volume
    Create(volumes::CreateArgs),
    /// List the volumes
    List,
    /// Describe a volume or a snapshot
    Inspect {
        /// The volume or snapshot
        #[arg(value_name = "VOLUME[@SNAPSHOT]")]
        object: Object,
    },
    /// Destroy a volume with its snapshots, or one snapshot
    Destroy {
        /// The volume or snapshot
        #[arg(value_name = "VOLUME[@SNAPSHOT]")]
        object: Object,
    },
    /// Set or remove metadata of a volume
    Set(volumes::SetArgs),
    /// Mount a volume; prints where
    Mount(volumes::MountArgs),
    /// Unmount a volume
    Unmount {
        /// The volume
        volume: VolumeName,
    },
    /// Take a snapshot
    Snapshot(snapshots::SnapshotArgs),
    /// List a volume's snapshots, oldest first
    Snapshots {
        /// The volume
        volume: VolumeName,
    },
    /// Show a volume's history, with its forks, branches and merges
    Log(history::LogArgs),
    /// Put a volume back to one of its snapshots
    Rollback(snapshots::RollbackArgs),
    /// Make a new volume out of a snapshot
    Clone(snapshots::CloneArgs),
    /// Write a snapshot as a tarball
    Export(tarball::ExportArgs),
    /// Make a volume out of a tarball
    Import(tarball::ImportArgs),
    /// Show what differs between two snapshots or volumes
    Diff(merge::DiffArgs),
    /// Merge another volume's history into a volume: one snapshot with two parents
    Merge(merge::MergeArgs),
    /// Make this node's replica of a volume writable
    Promote {
        /// The volume
        volume: VolumeName,
        /// Also where another node is its primary, or may be: what that one wrote since is not here
        #[arg(long)]
        force: bool,
    },
    /// Make a peer the primary of a volume in this node's place, without losing anything
    Handoff(volumes::HandOffArgs),
    /// Bring a snapshot, and what leads to it, to a peer
    Push(transfers::PushArgs),
    /// Fetch a snapshot, and what leads to it, from a peer
    Pull(transfers::PullArgs),
    /// List, show, pause, resume, cancel and wait for pushes and pulls
    Transfers {
        #[command(subcommand)]
        command: Option<TransfersCommand>,
    },
    /// Compare a snapshot with what was recorded when it was taken
    Verify(snapshots::VerifyArgs),
    /// Tell what happens on this node, as it happens, until Ctrl-C
    Events(events::EventsArgs),
    /// Print the completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Run the daemon in the foreground
    Start(node::StartArgs),
    /// Describe the running daemon
    Status,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token: good for one node
    Create {
        /// How long it may be used: 1h, 90s, 1h 30m
        #[arg(long, value_parser = values::duration, value_name = "TIME")]
        ttl: Option<std::time::Duration>,
    },
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Describe the pool: driver, space, what the driver can do, orphans
    Status,
}

#[derive(Debug, Subcommand)]
enum TransfersCommand {
    /// List them, newest first
    List,
    /// Describe one
    Show {
        /// Its id, or a beginning or end of it that no other has
        id: String,
    },
    /// Stop one; what has not arrived in full is not visible on the receiver
    Cancel {
        /// Its id, or a beginning or end of it that no other has
        id: String,
    },
    /// Let one rest; it keeps what it has, over restarts of the daemons too
    Pause {
        /// Its id, or a beginning or end of it that no other has
        id: String,
    },
    /// Go on with one where it was paused
    Resume {
        /// Its id, or a beginning or end of it that no other has
        id: String,
    },
    /// Wait until one is over, as push without --detach does
    Wait {
        /// Its id, or a beginning or end of it that no other has
        id: String,
    },
}

/// `-m KEY=VALUE …`
#[derive(Debug, Args)]
struct MetadataArgs {
    /// Metadata; may be given several times
    #[arg(short, long = "metadata", value_name = "KEY=VALUE", value_parser = values::metadata_item)]
    metadata: Vec<(String, String)>,
}

/// `--checksum`
#[derive(Debug, Clone, Copy, Args)]
struct CompareArgs {
    /// Read every file instead of trusting sizes, times and inodes
    #[arg(long)]
    checksum: bool,
}

impl From<CompareArgs> for Compare {
    fn from(args: CompareArgs) -> Self {
        if args.checksum { Self::Contents } else { Self::Metadata }
    }
}

fn policy() -> impl clap::builder::TypedValueParser<Value = DivergencePolicy> {
    PossibleValuesParser::new(["refuse", "fork", "ours", "theirs"]).map(|word| match word.as_str() {
        "fork" => DivergencePolicy::Fork,
        "ours" => DivergencePolicy::Ours,
        "theirs" => DivergencePolicy::Theirs,
        _ => DivergencePolicy::Refuse,
    })
}

/// One call's node and where its results go.
struct Session<'a> {
    client: Client,
    paths: &'a Paths,
    output: Output,
}

/// Does what was typed.
pub(crate) fn run(call: Call, paths: &Paths) -> anyhow::Result<Exit> {
    let output = call.global.output();
    if let Command::Completions { shell } = call.command {
        return completions(shell);
    }
    let mut runtime = match call.command {
        Command::Node(NodeCommand::Start(_)) => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime.enable_all().build().context("cannot start the async runtime")?;
    let session = Session { client: Client::new(paths.socket.clone()), paths, output };
    runtime.block_on(session.run(call.command))
}

fn completions(shell: Shell) -> anyhow::Result<Exit> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Call::command(), "flocker", &mut text);
    crate::output::write_out(&String::from_utf8(text).map_err(io::Error::other)?)?;
    Ok(Exit::Done)
}

impl Session<'_> {
    async fn run(&self, command: Command) -> anyhow::Result<Exit> {
        match command {
            Command::Demo(args) => return demo::run(args, self.output).await,
            Command::Init(args) => self.init(args)?,
            Command::Join(args) => self.join(args).await?,
            Command::Node(NodeCommand::Start(args)) => self.node_start(args).await?,
            Command::Node(NodeCommand::Status) => self.node_status().await?,
            Command::Token(TokenCommand::Create { ttl }) => self.token_create(ttl).await?,
            Command::Pool(PoolCommand::Status) => self.pool_status().await?,
            Command::Peers => self.peers().await?,
            Command::Create(args) => self.create(args).await?,
            Command::List => self.list().await?,
            Command::Inspect { object } => self.inspect(&object).await?,
            Command::Destroy { object } => self.destroy(&object).await?,
            Command::Set(args) => self.set(args).await?,
            Command::Mount(args) => self.mount(args).await?,
            Command::Unmount { volume } => self.unmount(&volume).await?,
            Command::Snapshot(args) => self.snapshot(args).await?,
            Command::Snapshots { volume } => self.snapshots(&volume).await?,
            Command::Log(args) => self.log(args).await?,
            Command::Rollback(args) => self.rollback(args).await?,
            Command::Clone(args) => self.clone_snapshot(args).await?,
            Command::Export(args) => self.export(args).await?,
            Command::Import(args) => self.import(args).await?,
            Command::Diff(args) => self.diff(args).await?,
            Command::Merge(args) => return self.merge(args).await,
            Command::Promote { volume, force } => self.promote(&volume, force).await?,
            Command::Handoff(args) => self.hand_off(args).await?,
            Command::Push(args) => return self.push(args).await,
            Command::Pull(args) => return self.pull(args).await,
            Command::Transfers { command } => return self.transfers(command.unwrap_or(TransfersCommand::List)).await,
            Command::Verify(args) => return self.verify(args).await,
            Command::Events(args) => self.events(args).await?,
            Command::Completions { shell } => return completions(shell),
        }
        Ok(Exit::Done)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::error::ErrorKind;

    use super::*;

    fn refused(arguments: &[&str]) -> String {
        let error = Call::try_parse_from([&["flocker"], arguments].concat()).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn the_grammar_is_sound() {
        Call::command().debug_assert();
    }

    #[test]
    fn bad_input_is_told_what_would_be_right() {
        let cases: &[(&[&str], &[&str])] = &[
            (&["create", "a/b"], &["\"a/b\" is not a volume name", "must start with a letter or digit"]),
            (&["create", "-dash"], &["\"-dash\" is not a volume name"]),
            (&["create", ""], &["volume name"]),
            (&["create", "db", "--quota", "lots"], &["10G"]),
            (&["create", "db", "-m", "novalue"], &["KEY=VALUE"]),
            (&["snapshot", "db"], &["db@NAME"]),
            (&["push", "db", "host-b"], &["write db@SNAPSHOT", "flocker snapshots db lists them"]),
            (&["push", "db@one"], &["HOST", "Usage"]),
            (&["push", "db@one", "b", "--on-divergence", "merge"], &["refuse", "fork", "ours", "theirs"]),
            (&["list", "--output", "yaml"], &["table", "json", "jsonl"]),
            (&["rollback", "db@one", "--fork-newer", "x", "--discard-newer"], &["cannot be used with"]),
            (&["set", "db"], &["KEY=VALUE|KEY-"]),
            (&["token", "create", "--ttl", "soon"], &["1h 30m"]),
            (&["merge", "db", "fork", "--conflicts", "maybe"], &["stop", "keep-both", "ours", "theirs"]),
            (&["diff", "db@", "db"], &["snapshot name"]),
            (&["export", "db@one", "--compress", "xz"], &["none", "zstd", "gzip"]),
            (&["import", "a/b", "file"], &["\"a/b\" is not a volume name"]),
        ];
        for (arguments, words) in cases {
            let said = refused(arguments);
            for word in *words {
                assert!(said.contains(word), "{arguments:?} should say {word:?}:\n{said}");
            }
        }
    }

    #[test]
    fn what_is_typed_comes_out_as_values() {
        let parse = |text: &str| Call::try_parse_from(text.split_whitespace()).unwrap().command;
        let Command::Create(create) = parse("flocker create db -m a=1 -m b=2 --quota 10G") else { panic!() };
        assert_eq!((create.metadata.metadata.len(), create.quota), (2, Some(Size(10 << 30))));
        let Command::Set(set) = parse("flocker set db a=1 b- --unset c") else { panic!() };
        assert_eq!((set.changes.len(), set.unset), (2, vec!["c".to_owned()]));
        let Command::Push(push) = parse("flocker push db@one host-b --as copy --on-divergence fork --detach") else {
            panic!()
        };
        assert_eq!(push.options.on_divergence, DivergencePolicy::Fork);
        let Command::Pull(pull) = parse("flocker pull db host-a") else { panic!() };
        assert_eq!(pull.object.snapshot(), None);
        let Command::Transfers { command: None } = parse("flocker transfers") else { panic!() };
    }

    #[test]
    fn global_options_may_stand_behind_the_command() {
        let call = Call::try_parse_from(["flocker", "list", "--output", "jsonl", "--quiet"]).unwrap();
        assert_eq!((call.global.output().format, call.global.output().talk), (Format::Jsonl, Talk::Quiet));
    }

    #[test]
    fn help_is_no_failure() {
        let error = Call::try_parse_from(["flocker", "--help"]).unwrap_err();
        assert_eq!((error.kind(), error.exit_code()), (ErrorKind::DisplayHelp, 0));
    }

    /// Lists every command as it is typed, aliases of none.
    fn command_lines(command: &clap::Command, before: &str, lines: &mut Vec<String>) {
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
            let line = format!("{before} {}", inner.get_name());
            if inner.has_subcommands() {
                command_lines(inner, &line, lines);
            } else {
                lines.push(line);
            }
        }
    }

    #[test]
    fn the_documentation_lists_exactly_these_commands() {
        let text = include_str!("../../../docs/CLI.md");
        let mut documented: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `flocker "))
            .map(|rest| {
                let words = rest.split('`').next().unwrap_or_default().split(' ');
                let plain = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase());
                format!("flocker {}", words.take_while(plain).collect::<Vec<_>>().join(" "))
            })
            .collect();
        let mut wanted = Vec::new();
        command_lines(&Call::command(), "flocker", &mut wanted);
        documented.sort();
        wanted.sort();
        assert_eq!(documented, wanted);
    }
}
