//! Where a node keeps its things, and what its configuration file says.
//!
//! Owns the order flag > environment > file > default and the file's grammar. Refuses to know what the values are used
//! for; [`crate::daemon`] and [`crate::setup`] read them.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use flocker_storage::model::NodeName;
use flocker_transport::LANES_LIMIT;
use serde::{Deserialize, Serialize};

pub use crate::limits::Limit;

/// The port a node listens on when nothing else is said.
pub const DEFAULT_PORT: u16 = 7801;

/// The longest path of a unix socket, in bytes, without its terminating NUL (`sun_path`, unix(7)).
pub const SOCKET_PATH_LIMIT: usize = 107;

/// A state folder or configuration that cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no place for the state.
    #[error("no place for the node's state: neither --state, FLOCKER_STATE, XDG_STATE_HOME nor HOME is set")]
    NoState,
    /// The file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file does not say what it should.
    #[error("{}:{line}:{column}: {message}", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Counted from 1, in characters.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// The socket's path does not fit into a socket address.
    #[error("the socket path {} is {} bytes long; {SOCKET_PATH_LIMIT} is the most a unix socket takes; choose a shorter --state or --socket", .0.display(), .0.as_os_str().len())]
    SocketPathTooLong(PathBuf),
}

/// Where a node keeps its things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The state folder.
    pub state: PathBuf,
    /// The API's unix socket.
    pub socket: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
}

impl Paths {
    /// Finds the folders: what is given, else root's places, else the user's (XDG base directories).
    pub fn resolve(state: Option<PathBuf>, socket: Option<PathBuf>) -> Result<Self, ConfigError> {
        let own_place = state.is_some();
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = rustix::process::geteuid().is_root();
        let state = match state {
            Some(state) => std::path::absolute(&state).unwrap_or(state),
            None if root => PathBuf::from("/var/lib/flocker"),
            None => match (variable("XDG_STATE_HOME"), variable("HOME")) {
                (Some(base), _) => base.join("flocker"),
                (None, Some(home)) => home.join(".local/state/flocker"),
                (None, None) => return Err(ConfigError::NoState),
            },
        };
        let socket = match socket {
            Some(socket) => socket,
            None if own_place => state.join("api.sock"),
            None if root => PathBuf::from("/run/flocker/api.sock"),
            None => match variable("XDG_RUNTIME_DIR") {
                Some(base) => base.join("flocker/api.sock"),
                None => state.join("api.sock"),
            },
        };
        if socket.as_os_str().len() > SOCKET_PATH_LIMIT {
            return Err(ConfigError::SocketPathTooLong(socket));
        }
        let config = state.join("config.toml");
        Ok(Self { state, socket, config })
    }

    /// The node's certificate and key.
    pub fn identity(&self) -> PathBuf {
        self.state.join("identity")
    }
    /// The cluster's authority, on the node that holds it.
    pub fn authority(&self) -> PathBuf {
        self.state.join("authority")
    }
    /// The state database.
    pub fn database(&self) -> PathBuf {
        self.state.join("state.db")
    }
    /// Where volumes are mounted by name.
    pub fn mounts(&self) -> PathBuf {
        self.state.join("mounts")
    }
    /// The pool of a node that was not given one.
    pub fn default_pool(&self) -> String {
        format!("directory:{}", self.state.join("pool").display())
    }
}

/// Why a configuration may not have its pool wiped.
pub(crate) const WIPE_IS_NOT_KEPT: &str = "wipe is not kept in the configuration, where it would hold for whatever the \
    file or device is the next time; start the node once with `flocker node start --wipe`";

/// What a peer may do with a volume here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// Look at histories and pull.
    Read,
    /// Push fast-forwards and new volumes, forks too.
    Push,
    /// Let another history take a volume's place; what was there is kept as a fork. Never granted by default.
    Force,
}

impl Verb {
    /// Returns the word of the configuration file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Push => "push",
            Self::Force => "force",
        }
    }
}

/// Grants verbs on volumes to a peer. Where a configuration has any, what none of them grants is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Right {
    /// A peer's name; `*` at the end stands for anything.
    pub peer: String,
    /// A volume's name; `*` at the end stands for anything.
    pub volumes: String,
    /// What is granted.
    pub verbs: Vec<Verb>,
}

/// Tells whether a name is the pattern, or begins with it where it ends with `*`.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    }
}

/// The configuration file. Every key may be left out but the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The node's name.
    pub name: NodeName,
    /// The pool, `DRIVER:PLACE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Where to listen for peers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Where peers are told to find this node, `HOST:PORT` each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub advertise: Vec<String>,
    /// What peers may do. Without any, members of the cluster may read, and push fast-forwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rights: Vec<Right>,
    /// How fast is sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<Limit>,
    /// How many connections carry one push, 1 to 8; one for each four processors and four at most where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes: Option<Lanes>,
}

/// A number of connections, 1 to 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "usize", into = "usize")]
pub struct Lanes(usize);

impl TryFrom<usize> for Lanes {
    type Error = String;
    fn try_from(count: usize) -> Result<Self, String> {
        match count {
            1..=LANES_LIMIT => Ok(Self(count)),
            _ => Err(format!("lanes = {count}: a push is carried by 1 to {LANES_LIMIT} connections")),
        }
    }
}

impl From<Lanes> for usize {
    fn from(Lanes(count): Lanes) -> Self {
        count
    }
}

impl Config {
    /// Reads a file; what is wrong is named with line and column.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start).min(text.len());
            let before = &text.as_bytes()[..at];
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
            let column = 1 + String::from_utf8_lossy(&before[line_start..]).chars().count();
            ConfigError::Syntax { path: path.to_owned(), line, column, message: error.message().to_owned() }
        })
    }

    /// Writes the file, readable by its owner only.
    pub fn save(&self, path: &Path) -> Result<(), ConfigError> {
        let failed = |source: io::Error| ConfigError::Write { path: path.to_owned(), source };
        let text = toml::to_string(self).map_err(|error| failed(io::Error::other(error)))?;
        fs::write(path, text).map_err(failed)
    }

    /// Tells whether a peer may do something with a volume.
    pub fn permits(&self, peer: &str, volume: &str, verb: Verb) -> bool {
        (self.rights.is_empty() && verb != Verb::Force)
            || self.rights.iter().any(|right| {
                matches(&right.peer, peer) && matches(&right.volumes, volume) && right.verbs.contains(&verb)
            })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn an_unknown_key_is_an_error_with_line_and_column() {
        let error = parse("name = \"host-a\"\n\n  polo = \"x\"\n").unwrap_err();
        let ConfigError::Syntax { line, column, message, .. } = error else { panic!("{error}") };
        assert_eq!((line, column), (3, 3));
        assert!(message.contains("polo"), "{message}");
    }

    #[test]
    fn a_bad_name_is_an_error_with_the_rule() {
        let error = parse("name = \"../evil\"\n").unwrap_err().to_string();
        assert!(error.contains(":1:8") && error.contains("letter or digit"), "{error}");
    }

    #[test]
    fn without_rights_members_may_read_and_push_and_with_rights_only_what_they_grant() {
        let open = parse("name = \"a\"").unwrap();
        assert!(open.permits("b", "db", Verb::Push));
        assert!(!open.permits("b", "db", Verb::Force));
        let closed = parse("name = \"a\"\n[[rights]]\npeer = \"b\"\nvolumes = \"web-*\"\nverbs = [\"read\"]").unwrap();
        assert!(closed.permits("b", "web-1", Verb::Read));
        assert!(!closed.permits("b", "web-1", Verb::Push));
        assert!(!closed.permits("b", "db", Verb::Read));
        assert!(!closed.permits("c", "web-1", Verb::Read));
    }

    #[test]
    fn a_socket_path_that_is_too_long_is_refused() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(110)));
        assert!(matches!(Paths::resolve(Some(long), None), Err(ConfigError::SocketPathTooLong(_))));
    }
}
