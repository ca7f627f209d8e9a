//! Noticing that somebody changed a snapshot behind the node's back: its tree against its inventory.

use std::{
    fs::File,
    io::{Read, Seek as _},
};

use rustix::fs::OFlags;

use super::{
    compare::{Joined, Pair},
    pool::Pool,
};
use crate::{
    delta::Compare,
    driver::Finding,
    error::{Error, ErrorKind, Result},
    model::SnapshotKey,
    tree::{
        entry::{Entry, EntryKind},
        inventory::{InventoryEntry, InventoryReader},
        path::TreePath,
        root::Root,
        walk::{Attributes, Links, Motion, Walk},
        witness::{Witness, difference},
    },
};

/// How many findings one verify returns at most, so that a tree that was replaced does not fill the memory.
const FINDINGS_LIMIT: usize = 1000;

impl Pool {
    /// Lists how a snapshot differs from its inventory.
    pub(super) fn verify(&self, key: SnapshotKey, compare: Compare) -> Result<Vec<Finding>> {
        self.stored("verify snapshot", key)?;
        let mut findings = Vec::new();
        self.differences(key, compare, |finding| {
            findings.push(finding);
            findings.len() < FINDINGS_LIMIT
        })?;
        Ok(findings)
    }

    /// Fails on the first difference in metadata.
    pub(super) fn refuse_tampered(&self, operation: &'static str, key: SnapshotKey) -> Result<()> {
        self.witnessed(operation, key)?.try_for_each(|entry| entry.map(drop))
    }

    /// Walks a snapshot's tree. The first difference in metadata ends it with an error, so that whoever walks it to its end
    /// need not have looked before.
    pub(super) fn witnessed(&self, operation: &'static str, key: SnapshotKey) -> Result<Walk> {
        let links = self.witness(operation, key)?;
        Ok(Walk::with(Root::open(self.tree_dir(key))?, links, Motion::Still, Attributes::OnDemand))
    }

    pub(super) fn witness(&self, operation: &'static str, key: SnapshotKey) -> Result<Links> {
        let inventory = InventoryReader::open(&self.inventory_path(key))?;
        Ok(Links::Witnessed(Witness::new(inventory, operation, key.snapshot)))
    }

    fn differences(&self, key: SnapshotKey, compare: Compare, mut report: impl FnMut(Finding) -> bool) -> Result<()> {
        let inventory = self.inventory_path(key);
        let links = Links::Inventory(Box::new(InventoryReader::open(&inventory)?));
        let walk = Walk::new(Root::open(self.tree_dir(key))?, links);
        let mut joined = Joined::new(walk, Some(InventoryReader::open(&inventory)?));
        while let Some(pair) = joined.next()? {
            let (path, what) = match pair {
                Pair::New(entry) => (entry.path, Some("it was added".to_owned())),
                Pair::Gone(record) => (record.entry.path, Some("it is missing".to_owned())),
                Pair::Both(entry, record) => {
                    let what = match difference(&entry, &record.entry) {
                        None if compare == Compare::Contents => reread(&mut joined, &entry, &record)?,
                        what => what,
                    };
                    (entry.path, what)
                }
            };
            if let Some(what) = what
                && !report(Finding { path: path.to_string(), what })
            {
                break;
            }
        }
        let sockets = joined.walk().take_findings();
        for finding in sockets {
            if !report(Finding { what: "it was added".to_owned(), ..finding }) {
                break;
            }
        }
        Ok(())
    }
}

/// Reads a file whose digest is known.
fn reread(joined: &mut Joined, entry: &Entry, record: &InventoryEntry) -> Result<Option<String>> {
    let (EntryKind::File { .. }, Some(known)) = (&entry.kind, record.digest) else { return Ok(None) };
    let file = File::from(joined.walk().open_last(OFlags::RDONLY | OFlags::NONBLOCK)?);
    let digest = digest(file).map_err(|error| Error::io("read", entry.path.to_string(), error))?;
    Ok((digest != known).then(|| "its contents changed".to_owned()))
}

/// Returns the BLAKE3 hash of a file of a tree; `None` where its mode keeps even its owner from reading it.
pub(super) fn digest_beneath(tree: &Root, path: &TreePath) -> Result<Option<[u8; 32]>> {
    let file = match tree.open_beneath(path, OFlags::RDONLY | OFlags::NONBLOCK) {
        Ok(file) => File::from(file),
        Err(error) if matches!(error.kind, ErrorKind::PermissionDenied) => return Ok(None),
        Err(error) => return Err(error),
    };
    digest(file).map(Some).map_err(|error| Error::io("read", tree.show(path), error))
}

/// Returns the BLAKE3 hash of a file, wherever its position is.
pub(super) fn digest(mut file: File) -> std::io::Result<[u8; 32]> {
    file.rewind()?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(*hasher.finalize().as_bytes()),
            length => hasher.update(&buffer[..length]),
        };
    }
}
