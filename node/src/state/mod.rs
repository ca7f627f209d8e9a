//! The node's own memory: transfers, peers, tokens, mounts, operations, common snapshots and forgotten ancestors, in SQLite.
//!
//! Owns the schema. Refuses to hold anything about a volume that its records beside the data hold: when this database
//! is deleted, volumes and snapshots are all there again, and peers are learnt anew from the next join or contact. What is
//! lost then of ancestors makes divergences of what is none: the safe side.
//!
//! WAL with `synchronous=FULL`: what a call has returned from survives a power cut.

mod ancestors;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use flocker_storage::model::{NodeName, SnapshotId, VolumeId};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

pub(crate) use self::ancestors::{HeadParent, Word};
use crate::{
    api::types::{MountKind, StartTransfer, TransferResource, TransferState},
    handoff::HandOff,
    resolve::{Adoption, Renaming},
};

/// How many finished transfers are remembered.
const FINISHED_TRANSFERS_KEPT: u32 = 200;

/// What makes the tables of each version from those of the one before.
const SCHEMA: [&str; 3] = [TABLES, ANCESTRY, SETTLED];
const TABLES: &str = "
CREATE TABLE transfers (id TEXT PRIMARY KEY, started TEXT NOT NULL, state TEXT NOT NULL, request TEXT NOT NULL, resource TEXT NOT NULL) STRICT;
CREATE TABLE peers (node_id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, addresses TEXT NOT NULL, last_seen TEXT) STRICT;
CREATE TABLE tokens (id TEXT PRIMARY KEY, expires TEXT NOT NULL, used_by TEXT) STRICT;
CREATE TABLE mounts (volume TEXT PRIMARY KEY, path TEXT NOT NULL UNIQUE, read_only INTEGER NOT NULL, kind TEXT NOT NULL) STRICT;
CREATE TABLE operations (id TEXT PRIMARY KEY, operation TEXT NOT NULL) STRICT;
CREATE TABLE commons (volume TEXT NOT NULL, peer TEXT NOT NULL, snapshot TEXT NOT NULL, PRIMARY KEY (volume, peer)) STRICT;
";
// Ancestors in the order they were noted; `told` by a peer, or known by this node itself. A head descends from `parent` as long as
// the volume's newest snapshot is `tip`.
const ANCESTRY: &str = "
CREATE TABLE ancestors (number INTEGER PRIMARY KEY, volume TEXT NOT NULL, id TEXT NOT NULL, parents TEXT NOT NULL, told INTEGER NOT NULL, UNIQUE (volume, id)) STRICT;
CREATE TABLE heads (volume TEXT PRIMARY KEY, parent TEXT NOT NULL, tip TEXT) STRICT;
";
// What a new database has to be told once. `mounts`: those that an earlier database knew were looked for.
const SETTLED: &str = "
CREATE TABLE settled (what TEXT PRIMARY KEY) STRICT;
";

/// The state database failed. The transaction it was in was rolled back.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} in the state database {}", .path.display())]
pub(crate) struct StateError {
    /// What was tried.
    pub(crate) operation: &'static str,
    /// The database.
    pub(crate) path: PathBuf,
    /// Why it failed.
    #[source]
    pub(crate) source: Box<dyn std::error::Error + Send + Sync>,
}

type Result<T> = std::result::Result<T, StateError>;

/// A peer as remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PeerRow {
    /// Its identity, 64 hexadecimal digits.
    pub(crate) node_id: String,
    /// Its name.
    pub(crate) name: NodeName,
    /// Where it listens.
    pub(crate) addresses: Vec<String>,
    /// When it was last heard of.
    pub(crate) last_seen: Option<Timestamp>,
}

/// A mount as remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountRow {
    /// The volume.
    pub(crate) volume: VolumeId,
    /// Where it is mounted.
    pub(crate) path: String,
    /// Whether it may only be read.
    pub(crate) read_only: bool,
    /// A bind mount or a symlink.
    pub(crate) kind: MountKind,
}

/// A join token as remembered: never the token itself, only a hash of its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenRow {
    /// When it ends.
    pub(crate) expires: Timestamp,
    /// The node it let in.
    pub(crate) used_by: Option<String>,
}

/// A step of the node's own that a crash must not leave half done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Operation {
    /// A rollback moved newer snapshots into the volume `fork`, which is to be destroyed.
    DiscardFork {
        /// The volume to destroy.
        fork: VolumeId,
    },
    /// A volume goes on with a history that has landed beside it.
    Adopt(Box<Adoption>),
    /// One volume gives its name to another.
    Rename(Renaming),
    /// A merge makes this snapshot, and puts the head to it.
    Merge {
        /// The volume.
        volume: VolumeId,
        /// The snapshot that it makes.
        snapshot: SnapshotId,
    },
    /// A tarball is unpacked into this volume, which is to be destroyed.
    Import {
        /// The volume to destroy.
        staging: VolumeId,
        /// What it becomes, once the driver takes it in: what of that has not arrived in full is thrown away.
        #[serde(default)]
        into: Option<VolumeId>,
    },
    /// The volume is handed over to a peer.
    HandOff(Box<HandOff>),
}

/// The state database. Cheap to clone; calls are short and run on the blocking pool.
#[derive(Clone)]
pub(crate) struct State {
    path: PathBuf,
    connection: Arc<Mutex<Connection>>,
}

fn encode<T: Serialize>(value: &T) -> String {
    // Plain structs with text keys: serialising them to JSON cannot fail.
    serde_json::to_string(value).unwrap_or_default()
}

impl State {
    /// Opens the database, creating it where there is none.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = |operation| {
            move |source: rusqlite::Error| StateError { operation, path: path.to_owned(), source: source.into() }
        };
        let mut connection = Connection::open(path).map_err(failed("open"))?;
        connection
            .execute_batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA busy_timeout=5000;")
            .map_err(failed("set up"))?;
        let version: i64 =
            connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed("read the version"))?;
        let Some(missing) = usize::try_from(version).ok().and_then(|version| SCHEMA.get(version..)) else {
            let source = format!(
                "its version is {version}, this program knows {}; use a newer flocker, or move the file away: volumes are kept beside the data",
                SCHEMA.len()
            );
            return Err(StateError { operation: "read tables", path: path.to_owned(), source: source.into() });
        };
        if !missing.is_empty() {
            let transaction = connection.transaction().map_err(failed("create tables"))?;
            for tables in missing {
                transaction.execute_batch(tables).map_err(failed("create tables"))?;
            }
            transaction.pragma_update(None, "user_version", SCHEMA.len() as i64).map_err(failed("create tables"))?;
            transaction.commit().map_err(failed("create tables"))?;
        }
        Ok(Self { path: path.to_owned(), connection: Arc::new(Mutex::new(connection)) })
    }

    async fn call<T, F>(&self, operation: &'static str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let connection = self.connection.clone();
        let path = self.path.clone();
        // Another thread would make an order of events that no seed repeats.
        #[cfg(feature = "simulation")]
        if flocker_storage::simulation::is_running() {
            let done = work(&mut connection.lock().unwrap_or_else(PoisonError::into_inner));
            return done.map_err(|source| StateError { operation, path, source: source.into() });
        }
        let joined =
            tokio::task::spawn_blocking(move || work(&mut connection.lock().unwrap_or_else(PoisonError::into_inner)))
                .await;
        match joined {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(source)) => Err(StateError { operation, path, source: source.into() }),
            Err(source) => Err(StateError { operation, path, source: source.into() }),
        }
    }

    /// Writes a transfer, new or known.
    pub(crate) async fn put_transfer(&self, request: &StartTransfer, resource: &TransferResource) -> Result<()> {
        let row = (
            resource.id.clone(),
            resource.started.to_string(),
            encode(&resource.state),
            encode(request),
            encode(resource),
        );
        self.call("write a transfer", move |db| {
            db.execute(
                "INSERT INTO transfers VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (id) DO UPDATE SET state = ?3, resource = ?5",
                row,
            )?;
            db.execute(
                "DELETE FROM transfers WHERE state NOT IN ('\"running\"', '\"interrupted\"', '\"paused\"') AND id NOT IN
                 (SELECT id FROM transfers ORDER BY started DESC LIMIT ?1)",
                [FINISHED_TRANSFERS_KEPT],
            )
            .map(|_| ())
        })
        .await
    }

    /// Lists all transfers, oldest first. What does not parse any more is left out.
    pub(crate) async fn transfers(&self) -> Result<Vec<(StartTransfer, TransferResource)>> {
        self.call("list transfers", |db| {
            let mut query = db.prepare("SELECT request, resource FROM transfers ORDER BY started")?;
            let rows = query.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
            let mut transfers = Vec::new();
            for row in rows {
                let (request, resource) = row?;
                if let (Ok(request), Ok(resource)) = (serde_json::from_str(&request), serde_json::from_str(&resource)) {
                    transfers.push((request, resource));
                }
            }
            Ok(transfers)
        })
        .await
    }

    /// Marks what was running as interrupted; called once, at start-up.
    pub(crate) async fn interrupt_running(&self) -> Result<()> {
        for (request, mut resource) in self.transfers().await? {
            if resource.state == TransferState::Running {
                resource.state = TransferState::Interrupted;
                self.put_transfer(&request, &resource).await?;
            }
        }
        Ok(())
    }

    /// Writes a peer. Names and identities are both unique: an entry of the same name and another identity is an error
    /// of the caller, who must have checked it.
    pub(crate) async fn put_peer(&self, peer: &PeerRow) -> Result<()> {
        let row = (
            peer.node_id.clone(),
            peer.name.to_string(),
            encode(&peer.addresses),
            peer.last_seen.map(|time| time.to_string()),
        );
        self.call("write a peer", move |db| {
            db.execute(
                "INSERT INTO peers VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (node_id) DO UPDATE SET name = ?2, addresses = ?3, last_seen = ?4",
                row,
            )
            .map(|_| ())
        })
        .await
    }

    /// Lists all peers by name.
    pub(crate) async fn peers(&self) -> Result<Vec<PeerRow>> {
        self.call("list peers", |db| {
            let mut query = db.prepare("SELECT node_id, name, addresses, last_seen FROM peers ORDER BY name")?;
            let rows = query.query_map([], |row| {
                let name: String = row.get(1)?;
                let addresses: String = row.get(2)?;
                let last_seen: Option<String> = row.get(3)?;
                Ok((row.get::<_, String>(0)?, name, addresses, last_seen))
            })?;
            let mut peers = Vec::new();
            for row in rows {
                let (node_id, name, addresses, last_seen) = row?;
                if let (Ok(name), Ok(addresses)) = (name.parse(), serde_json::from_str(&addresses)) {
                    let last_seen = last_seen.and_then(|time| time.parse().ok());
                    peers.push(PeerRow { node_id, name, addresses, last_seen });
                }
            }
            Ok(peers)
        })
        .await
    }

    /// Writes a new token.
    pub(crate) async fn put_token(&self, id: String, expires: Timestamp) -> Result<()> {
        self.call("write a token", move |db| {
            db.execute("INSERT INTO tokens VALUES (?1, ?2, NULL)", params![id, expires.to_string()]).map(|_| ())
        })
        .await
    }

    /// Finds a token.
    pub(crate) async fn token(&self, id: String) -> Result<Option<TokenRow>> {
        self.call("read a token", move |db| {
            db.query_row("SELECT expires, used_by FROM tokens WHERE id = ?1", [id], |row| {
                let expires: String = row.get(0)?;
                let used_by: Option<String> = row.get(1)?;
                Ok(TokenRow { expires: expires.parse().unwrap_or(Timestamp::MIN), used_by })
            })
            .optional()
        })
        .await
    }

    /// Uses a token up; false when another node was faster.
    pub(crate) async fn use_token(&self, id: String, node: String) -> Result<bool> {
        self.call("use a token", move |db| {
            db.execute("UPDATE tokens SET used_by = ?2 WHERE id = ?1 AND used_by IS NULL", [id, node])
                .map(|rows| rows == 1)
        })
        .await
    }

    /// Writes a mount.
    pub(crate) async fn put_mount(&self, mount: &MountRow) -> Result<()> {
        let row = (mount.volume.to_string(), mount.path.clone(), mount.read_only, encode(&mount.kind));
        self.call("write a mount", move |db| {
            db.execute("INSERT OR REPLACE INTO mounts VALUES (?1, ?2, ?3, ?4)", row).map(|_| ())
        })
        .await
    }

    /// Forgets a mount.
    pub(crate) async fn remove_mount(&self, volume: VolumeId) -> Result<()> {
        self.call("remove a mount", move |db| {
            db.execute("DELETE FROM mounts WHERE volume = ?1", [volume.to_string()]).map(|_| ())
        })
        .await
    }

    /// Lists all mounts.
    pub(crate) async fn mounts(&self) -> Result<Vec<MountRow>> {
        self.call("list mounts", |db| {
            let mut query = db.prepare("SELECT volume, path, read_only, kind FROM mounts")?;
            let rows = query.query_map([], |row| {
                Ok((row.get::<_, String>(0)?, row.get(1)?, row.get(2)?, row.get::<_, String>(3)?))
            })?;
            let mut mounts = Vec::new();
            for row in rows {
                let (volume, path, read_only, kind) = row?;
                if let (Ok(volume), Ok(kind)) = (volume.parse(), serde_json::from_str(&kind)) {
                    mounts.push(MountRow { volume, path, read_only, kind });
                }
            }
            Ok(mounts)
        })
        .await
    }

    /// Tells whether it was looked for mounts that an earlier database knew.
    pub(crate) async fn knows_mounts(&self) -> Result<bool> {
        self.call("ask for mounts", |db| db.prepare("SELECT 1 FROM settled WHERE what = 'mounts'")?.exists([])).await
    }

    /// Notes that it was.
    pub(crate) async fn settle_mounts(&self) -> Result<()> {
        self.call("note mounts", |db| db.execute("INSERT OR IGNORE INTO settled VALUES ('mounts')", []).map(|_| ()))
            .await
    }

    /// Writes the intent of an operation before its first step.
    pub(crate) async fn begin(&self, id: String, operation: &Operation) -> Result<()> {
        let text = encode(operation);
        self.call("begin an operation", move |db| {
            db.execute("INSERT OR REPLACE INTO operations VALUES (?1, ?2)", [id, text]).map(|_| ())
        })
        .await
    }

    /// Forgets an operation after its last step.
    pub(crate) async fn end(&self, id: String) -> Result<()> {
        self.call("end an operation", move |db| db.execute("DELETE FROM operations WHERE id = ?1", [id]).map(|_| ()))
            .await
    }

    /// Lists the operations that a crash interrupted.
    pub(crate) async fn operations(&self) -> Result<Vec<(String, Operation)>> {
        self.call("list operations", |db| {
            let mut query = db.prepare("SELECT id, operation FROM operations")?;
            let rows = query.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
            let mut operations = Vec::new();
            for row in rows {
                let (id, text) = row?;
                if let Ok(operation) = serde_json::from_str(&text) {
                    operations.push((id, operation));
                }
            }
            Ok(operations)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use flocker_replication::ancestry::Memory;

    use super::*;

    pub(super) fn open() -> (tempfile::TempDir, State) {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state.db")).unwrap();
        (folder, state)
    }

    #[tokio::test]
    async fn what_was_written_survives_a_power_cut() {
        let (_folder, state) = open();
        let (journal, synchronous) = state
            .call("read pragmas", |db| {
                let journal: String = db.query_row("PRAGMA journal_mode", [], |row| row.get(0))?;
                let synchronous: i64 = db.query_row("PRAGMA synchronous", [], |row| row.get(0))?;
                Ok((journal, synchronous))
            })
            .await
            .unwrap();
        // 2 is FULL (sqlite.org/pragma.html#pragma_synchronous).
        assert_eq!((journal.as_str(), synchronous), ("wal", 2));
    }

    #[tokio::test]
    async fn a_token_is_used_once() {
        let (_folder, state) = open();
        state.put_token("t".to_owned(), Timestamp::MAX).await.unwrap();
        assert!(state.use_token("t".to_owned(), "node-1".to_owned()).await.unwrap());
        assert!(!state.use_token("t".to_owned(), "node-2".to_owned()).await.unwrap());
        let row = state.token("t".to_owned()).await.unwrap().unwrap();
        assert_eq!(row, TokenRow { expires: Timestamp::MAX, used_by: Some("node-1".to_owned()) });
        assert_eq!(state.token("other".to_owned()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn everything_is_there_after_a_reopen() {
        let (folder, state) = open();
        let peer = PeerRow {
            node_id: "ab".repeat(32),
            name: "host-b".parse().unwrap(),
            addresses: vec!["127.0.0.1:1".to_owned()],
            last_seen: Some(Timestamp::UNIX_EPOCH),
        };
        let volume = VolumeId::mint();
        let mount = MountRow { volume, path: "/mnt/db".to_owned(), read_only: true, kind: MountKind::Bind };
        let operation = Operation::DiscardFork { fork: volume };
        state.put_peer(&peer).await.unwrap();
        state.put_mount(&mount).await.unwrap();
        state.begin("o".to_owned(), &operation).await.unwrap();
        drop(state);
        let state = State::open(&folder.path().join("state.db")).unwrap();
        assert_eq!(state.peers().await.unwrap(), [peer]);
        assert_eq!(state.mounts().await.unwrap(), [mount]);
        assert_eq!(state.operations().await.unwrap(), [("o".to_owned(), operation)]);
        state.end("o".to_owned()).await.unwrap();
        state.remove_mount(volume).await.unwrap();
        assert!(state.operations().await.unwrap().is_empty() && state.mounts().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_database_of_the_first_version_is_taken_further() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(TABLES).unwrap();
        old.execute("INSERT INTO tokens VALUES ('t', '2030-01-01T00:00:00Z', NULL)", []).unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        drop(old);
        let state = State::open(&path).unwrap();
        assert!(state.token("t".to_owned()).await.unwrap().is_some());
        assert_eq!(state.memory(BTreeSet::from([VolumeId::mint()])).await.unwrap(), Memory::new());
    }

    #[test]
    fn a_database_of_a_newer_version_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let Err(error) = State::open(&path) else { panic!("it was opened") };
        assert!(crate::problem::chain(&error).contains("its version is 99"), "{error}");
    }
}
