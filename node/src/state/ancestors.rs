//! What the database remembers of snapshots that are not held any more, and of what peers hold.

use std::collections::BTreeSet;

use flocker_replication::ancestry::{Ancestor, FORGOTTEN_LIMIT, Memory};
use flocker_storage::model::{SnapshotId, VolumeId};
use rusqlite::{OptionalExtension, params};

use super::{Result, State, encode};

/// Whose word an ancestor's parents are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// This node held the snapshot.
    Own,
    /// A peer sent it along with a snapshot.
    Peer,
}

/// What a head descends from that is not held any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadParent {
    /// The snapshot.
    pub(crate) parent: SnapshotId,
    /// The volume's newest snapshot while this holds; none is left where this is `None`.
    pub(crate) tip: Option<SnapshotId>,
}

impl State {
    /// Remembers what some snapshots of a volume followed, [`FORGOTTEN_LIMIT`] by each word; those noted first go first. What is
    /// known by this node itself stays, whatever a peer says.
    pub(crate) async fn remember(&self, volume: VolumeId, ancestors: Vec<Ancestor>, word: Word) -> Result<()> {
        if ancestors.is_empty() {
            return Ok(());
        }
        self.call("remember ancestors", move |db| {
            let (volume, told) = (volume.to_string(), word == Word::Peer);
            let transaction = db.transaction()?;
            {
                // Oldest first, so that the newest are kept longest.
                let mut put = transaction.prepare(
                    "INSERT INTO ancestors (volume, id, parents, told) VALUES (?1, ?2, ?3, ?4)
                     ON CONFLICT (volume, id) DO UPDATE SET parents = ?3, told = ?4 WHERE told > ?4",
                )?;
                for ancestor in ancestors.iter().rev() {
                    put.execute(params![volume, ancestor.id.to_string(), encode(&ancestor.parents), told])?;
                }
            }
            transaction.execute(
                "DELETE FROM ancestors WHERE volume = ?1 AND told = ?2 AND number NOT IN
                 (SELECT number FROM ancestors WHERE volume = ?1 AND told = ?2 ORDER BY number DESC LIMIT ?3)",
                params![volume, told, FORGOTTEN_LIMIT as i64],
            )?;
            transaction.commit()
        })
        .await
    }

    /// Returns what is remembered of some volumes.
    pub(crate) async fn memory(&self, volumes: BTreeSet<VolumeId>) -> Result<Memory> {
        self.call("recall ancestors", move |db| {
            let mut memory = Memory::new();
            // This node's own word comes last, and stays.
            let mut query = db.prepare("SELECT id, parents FROM ancestors WHERE volume = ?1 AND told = ?2")?;
            for told in [true, false] {
                for volume in &volumes {
                    let rows = query.query_map(params![volume.to_string(), told], |row| {
                        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
                    })?;
                    for row in rows {
                        let (id, parents) = row?;
                        if let (Ok(id), Ok(parents)) = (id.parse(), serde_json::from_str(&parents)) {
                            memory.insert(id, parents);
                        }
                    }
                }
            }
            Ok(memory)
        })
        .await
    }

    /// Gives a volume what is remembered of another one, whose snapshots it has taken in.
    pub(crate) async fn inherit(&self, from: VolumeId, onto: VolumeId) -> Result<()> {
        self.call("hand ancestors on", move |db| {
            db.execute(
                "INSERT OR IGNORE INTO ancestors (volume, id, parents, told)
                 SELECT ?2, id, parents, told FROM ancestors WHERE volume = ?1 ORDER BY number",
                [from.to_string(), onto.to_string()],
            )
            .map(|_| ())
        })
        .await
    }

    /// Forgets what is remembered of a volume that is no more.
    pub(crate) async fn forget_volume(&self, volume: VolumeId) -> Result<()> {
        self.call("forget a volume", move |db| {
            let transaction = db.transaction()?;
            for table in ["ancestors", "heads"] {
                transaction.execute(&format!("DELETE FROM {table} WHERE volume = ?1"), [volume.to_string()])?;
            }
            transaction.commit()
        })
        .await
    }

    /// Lists the volumes of which something is remembered.
    pub(crate) async fn remembered_volumes(&self) -> Result<Vec<VolumeId>> {
        self.call("list remembered volumes", |db| {
            let mut query = db.prepare("SELECT volume FROM ancestors UNION SELECT volume FROM heads")?;
            let rows = query.query_map([], |row| row.get::<_, String>(0))?;
            let volumes = rows.collect::<rusqlite::Result<Vec<String>>>()?;
            Ok(volumes.iter().filter_map(|volume| volume.parse().ok()).collect())
        })
        .await
    }

    /// Notes what a head descends from; `None`: its volume's newest snapshot.
    pub(crate) async fn put_head_parent(&self, volume: VolumeId, parent: Option<HeadParent>) -> Result<()> {
        self.call("note what a head descends from", move |db| {
            let volume = volume.to_string();
            let Some(HeadParent { parent, tip }) = parent else {
                return db.execute("DELETE FROM heads WHERE volume = ?1", [volume]).map(|_| ());
            };
            db.execute(
                "INSERT OR REPLACE INTO heads VALUES (?1, ?2, ?3)",
                params![volume, parent.to_string(), tip.map(|tip| tip.to_string())],
            )
            .map(|_| ())
        })
        .await
    }

    /// Takes the note of what a head descends from to another volume, which the head is moved to.
    pub(crate) async fn move_head_parent(&self, from: VolumeId, to: VolumeId) -> Result<()> {
        self.call("note what a head descends from", move |db| {
            db.execute("UPDATE OR REPLACE heads SET volume = ?2 WHERE volume = ?1", [from.to_string(), to.to_string()])
                .map(|_| ())
        })
        .await
    }

    /// Returns what a head was noted to descend from.
    pub(crate) async fn head_parent(&self, volume: VolumeId) -> Result<Option<HeadParent>> {
        self.call("read what a head descends from", move |db| {
            let row = db
                .query_row("SELECT parent, tip FROM heads WHERE volume = ?1", [volume.to_string()], |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?))
                })
                .optional()?;
            Ok(row.and_then(|(parent, tip)| {
                let tip = tip.map(|tip| tip.parse()).transpose().ok()?;
                Some(HeadParent { parent: parent.parse().ok()?, tip })
            }))
        })
        .await
    }

    /// Lists what [`State::put_common`] recorded of a volume: peers, and the snapshots they hold.
    pub(crate) async fn commons(&self, volume: VolumeId) -> Result<Vec<(String, SnapshotId)>> {
        self.call("list common snapshots", move |db| {
            let mut query = db.prepare("SELECT peer, snapshot FROM commons WHERE volume = ?1 ORDER BY peer")?;
            let rows = query
                .query_map([volume.to_string()], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
            let mut commons = Vec::new();
            for row in rows {
                let (peer, snapshot) = row?;
                if let Ok(snapshot) = snapshot.parse() {
                    commons.push((peer, snapshot));
                }
            }
            Ok(commons)
        })
        .await
    }

    /// Records the newest snapshot of a volume that a peer is known to hold too.
    pub(crate) async fn put_common(&self, volume: VolumeId, peer: String, snapshot: SnapshotId) -> Result<()> {
        self.call("write a common snapshot", move |db| {
            db.execute(
                "INSERT OR REPLACE INTO commons VALUES (?1, ?2, ?3)",
                [volume.to_string(), peer, snapshot.to_string()],
            )
            .map(|_| ())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{super::tests::open, *};

    fn id(number: u128) -> SnapshotId {
        SnapshotId(uuid::Uuid::from_u128(number))
    }

    fn ancestor(number: u128, parents: &[u128]) -> Ancestor {
        Ancestor { id: id(number), parents: parents.iter().map(|&parent| id(parent)).collect() }
    }

    #[tokio::test]
    async fn ancestors_are_remembered_by_the_best_word_and_within_a_limit() {
        let (folder, state) = open();
        let (volume, other) = (VolumeId::mint(), VolumeId::mint());
        state.remember(volume, vec![ancestor(2, &[1])], Word::Own).await.unwrap();
        state.remember(volume, vec![ancestor(3, &[2, 9]), ancestor(2, &[9])], Word::Peer).await.unwrap();
        state.remember(volume, vec![ancestor(3, &[2])], Word::Own).await.unwrap();
        state.put_head_parent(volume, Some(HeadParent { parent: id(3), tip: None })).await.unwrap();
        drop(state);
        let state = State::open(&folder.path().join("state.db")).unwrap();
        let own = Memory::from([(id(2), vec![id(1)]), (id(3), vec![id(2)])]);
        assert_eq!(state.memory(BTreeSet::from([volume, other])).await.unwrap(), own);
        assert_eq!(state.head_parent(volume).await.unwrap(), Some(HeadParent { parent: id(3), tip: None }));

        // A peer's flood drives out what peers said before, and nothing else.
        let flood = (0..=FORGOTTEN_LIMIT as u128).map(|number| ancestor(100 + number, &[])).collect();
        state.remember(volume, flood, Word::Peer).await.unwrap();
        let memory = state.memory(BTreeSet::from([volume])).await.unwrap();
        assert_eq!(memory.len(), 2 + FORGOTTEN_LIMIT);
        assert!(own.keys().chain(&[id(100)]).all(|id| memory.contains_key(id)), "the newest come first");

        state.inherit(volume, other).await.unwrap();
        state.forget_volume(volume).await.unwrap();
        assert_eq!(state.memory(BTreeSet::from([other])).await.unwrap(), memory);
        assert_eq!(state.memory(BTreeSet::from([volume])).await.unwrap(), Memory::new());
        assert_eq!(state.head_parent(volume).await.unwrap(), None);
        assert_eq!(state.remembered_volumes().await.unwrap(), [other]);
    }
}
