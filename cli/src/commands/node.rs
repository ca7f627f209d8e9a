//! `init`, `join`, `node`, `token`, `pool`, `peers`.

use std::{io::IsTerminal as _, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;
use flocker_node::{
    api::{client::NodeName, types::CreateToken},
    daemon::{self, DaemonRequest},
    setup::{self, JoinRequest, NodeRequest},
};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use super::Session;
use crate::{
    output,
    report::{self, Exit, Stop},
};

/// What a new node is told.
#[derive(Debug, Args)]
pub(super) struct SetupArgs {
    /// The node's name; the host's name when left out
    #[arg(long)]
    name: Option<NodeName>,
    /// Where volumes live, DRIVER:PLACE (directory:/srv/flocker); a directory in the state folder when left out
    #[arg(long, value_name = "POOL")]
    pool: Option<String>,
    /// Where to listen for peers
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Where peers find this node, HOST:PORT; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Vec<String>,
}

impl From<SetupArgs> for NodeRequest {
    fn from(SetupArgs { name, pool, listen, advertise }: SetupArgs) -> Self {
        Self { name, pool, listen, advertise }
    }
}

#[derive(Debug, Args)]
pub(super) struct JoinArgs {
    /// What `flocker token create` printed on a node of the cluster
    token: String,
    #[command(flatten)]
    setup: SetupArgs,
}

#[derive(Debug, Args)]
pub(super) struct StartArgs {
    /// The configuration file; config.toml in the state folder when left out
    #[arg(long, value_name = "FILE", env = "FLOCKER_CONFIG")]
    config: Option<PathBuf>,
    /// Where to listen for peers
    #[arg(long, value_name = "ADDRESS:PORT", env = "FLOCKER_LISTEN")]
    listen: Option<SocketAddr>,
    /// Format the pool's file or device, whatever it holds (but a pool of flocker)
    #[arg(long)]
    wipe: bool,
    /// Stay in the foreground (it always does)
    #[arg(long)]
    foreground: bool,
}

impl Session<'_> {
    pub(super) fn init(&self, args: SetupArgs) -> anyhow::Result<()> {
        let made = setup::init(self.paths, &args.into())
            .with_context(|| format!("cannot make a node in {}", self.paths.state.display()))?;
        self.output.item(&made, String::new)?;
        self.output.talk(&format!("made node {} of a new cluster, its pool is {}", made.name, made.pool));
        self.output.talk(&format!("start it with: {} node start", report::command_for(self.paths)));
        Ok(())
    }

    pub(super) async fn join(&self, args: JoinArgs) -> anyhow::Result<()> {
        let request = JoinRequest { token: args.token, node: args.setup.into() };
        let joined = setup::join(self.paths, &request).await.context("cannot join the cluster")?;
        self.output.item(&joined, String::new)?;
        let members = joined.members.join(", ");
        self.output.talk(&format!(
            "{} is a node of the cluster now, with {members}; its pool is {}",
            joined.name, joined.pool
        ));
        self.output.talk(&format!("start it with: {} node start", report::command_for(self.paths)));
        Ok(())
    }

    pub(super) async fn node_start(&self, args: StartArgs) -> anyhow::Result<()> {
        let StartArgs { config, listen, wipe, foreground: _ } = args;
        if config.is_none() && !self.paths.config.exists() {
            let missing = format!("there is no node in {}", self.paths.state.display());
            let command = report::command_for(self.paths);
            let hint = format!("make one with: {command} init (or: {command} join TOKEN)");
            return Err(Stop::new(Exit::Failure, missing).hint(hint).into());
        }
        log_to_stderr();
        // SIGINT and SIGTERM stop the daemon by themselves; this call has no other reason to.
        let stop = CancellationToken::new();
        let request = DaemonRequest {
            paths: self.paths.clone(),
            config_file: config,
            listen,
            wipe,
            ready: Box::new(|_| ()),
            stop,
        };
        daemon::run(request).await.context("the daemon has failed")
    }

    pub(super) async fn node_status(&self) -> anyhow::Result<()> {
        let node = self.client.node().await?;
        self.output.item(&node, || output::node(&node, Timestamp::now()))
    }

    pub(super) async fn token_create(&self, ttl: Option<Duration>) -> anyhow::Result<()> {
        let token = self.client.create_token(&CreateToken { ttl_seconds: ttl.map(|ttl| ttl.as_secs()) }).await?;
        self.output.item(&token, || format!("{}\n", token.token))?;
        let ends = output::relative(token.expires, Timestamp::now());
        self.output
            .talk(&format!("it is a secret, good for one node, and ends {ends}; there, type: flocker join TOKEN"));
        Ok(())
    }

    pub(super) async fn pool_status(&self) -> anyhow::Result<()> {
        let pool = self.client.pool().await?;
        self.output.item(&pool, || output::pool(&pool))
    }

    pub(super) async fn peers(&self) -> anyhow::Result<()> {
        let peers = self.client.peers().await?;
        self.output.list(&peers, |peers| output::peers(peers, Timestamp::now()))
    }
}

/// Sends the daemon's log to standard error: `FLOCKER_LOG` (else `RUST_LOG`) says how much, `FLOCKER_LOG_FORMAT=json`
/// says how.
fn log_to_stderr() {
    let wanted = std::env::var("FLOCKER_LOG").or_else(|_| std::env::var("RUST_LOG"));
    let filter = wanted.ok().and_then(|text| EnvFilter::try_new(text).ok()).unwrap_or_else(|| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    // A second call in one process would fail; this program makes one.
    let _ = match std::env::var("FLOCKER_LOG_FORMAT").as_deref() {
        Ok("json") => log.json().try_init(),
        _ => log.try_init(),
    };
}
