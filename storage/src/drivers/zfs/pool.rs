//! An open pool of the ZFS driver: where things lie, who may have it open, what programs and pool can do.
//!
//! ```text
//! ROOT                                           bears the record of the pool; its own files are not touched
//! ROOT/volumes/<volume-id>                       the head of a volume; bears the volume's record
//! ROOT/volumes/<volume-id>@<snapshot-id>         a snapshot; bears its record, and is none before it has one
//! ROOT/incoming/<volume-id>.<snapshot-id>        what is being received, and the new half of a split
//! ROOT/trash/<uuid>                              what is being destroyed
//! ROOT/views/<volume-id>.<snapshot-id>           a clone by which a snapshot is read where it cannot be mounted itself
//! ROOT/journal                                   bears the records of verbs that take more than one step
//! /run/flocker/zfs/<pool>/lock                   flock: one node at a time; holds its process id
//! /run/flocker/zfs/<pool>/mnt/volumes/…          where heads are mounted while they are attached
//! ```
//! The folder in /run is of mode 0700, so that the modes inside the trees open nothing to anybody.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    FORMAT_1, FORMAT_2,
    journal::Written,
    listing::{self, Found},
    place::{self, Place, Wanted},
    program::{Class, Programs, Trouble, unless},
    property,
    view::Views,
    volume::Known,
};
use crate::{
    delta::DeltaFormat,
    driver::{Capabilities, Target, Usage},
    drivers::{PoolSpec, lock},
    error::{Error, ErrorKind, Result},
    model::{SnapshotId, SnapshotKey, VolumeId},
};

const OPERATION: &str = "open pool";

/// The layout this version writes.
const POOL_FORMAT: u32 = 1;

/// Where locks and mounts lie.
const RUNTIME: &str = "/run/flocker/zfs";

/// The datasets beneath the root.
pub(super) const FOLDERS: [&str; 5] = ["volumes", "incoming", "trash", "views", "journal"];

/// How long the children of a daemon that was killed are waited for: one may be in the middle of a destroy.
const CHILDREN: Duration = Duration::from_secs(60);

#[derive(Serialize, Deserialize)]
struct PoolRecord {
    format: u32,
    id: Uuid,
    driver: String,
}

/// What programs and pool can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Abilities {
    /// OpenZFS: several at once in one command, snapshots that can be mounted, `written`.
    pub(super) modern: bool,
    /// A receive that was cut can go on.
    pub(super) resume: bool,
    /// Streams with large blocks, compressed and embedded data.
    pub(super) rich_streams: bool,
}

/// An attached target.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attachment {
    /// The snapshot that was handed out, where it was not the head itself.
    pub(super) serves: Option<SnapshotKey>,
}

/// An open pool. The lock goes with the value.
pub(super) struct Pool {
    // First, so that a pool is exported before its lock is free.
    _place: Place,
    pub(super) programs: Programs,
    pub(super) abilities: Abilities,
    pub(super) views: Arc<Views>,
    pub(super) known: Known,
    root: String,
    runtime: PathBuf,
    capabilities: Capabilities,
    attached: Mutex<HashMap<Target, Attachment>>,
    receiving: Mutex<HashSet<VolumeId>>,
    publishing: Mutex<()>,
    /// The generation and the chunks of each record in the journal.
    pub(super) notes: Mutex<HashMap<String, Written>>,
    /// Snapshots of heads that could not be destroyed while something was received.
    pub(super) outlived: Mutex<Vec<String>>,
    /// The snapshots that are held, with the number of those who read.
    pub(super) pins: Mutex<HashMap<String, usize>>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close_views();
        self.unmount_all();
    }
}

impl Pool {
    /// Opens a pool, sets it up where the place is free, finishes or clears away what was interrupted.
    pub(super) fn open(spec: &PoolSpec) -> Result<Arc<Self>> {
        let unusable = |why: String| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(why));
        if !rustix::process::geteuid().is_root() {
            return Err(unusable("mounting a dataset needs root".to_owned()));
        }
        let wanted = Wanted::parse(spec.place()).map_err(unusable)?;
        let runtime = Path::new(RUNTIME).join(wanted.lock_name(spec)?);
        let made = DirBuilder::new().mode(0o700).recursive(true).create(runtime.join("mnt"));
        made.map_err(|error| Error::io(OPERATION, runtime.display(), error))?;
        let lock = lock::take(&runtime.join("lock"), CHILDREN)
            .map_err(|error| Error::new(OPERATION, spec, error.into_kind(ErrorKind::Io)))?;
        let programs = Programs::new(lock);
        let place = wanted.open(spec, &programs)?;
        let root = place.dataset.clone();
        set_up(spec, &programs, &root)?;
        let (abilities, capabilities) = probe(spec, &programs, &root)?;
        lay_out(spec, &programs, &root, &runtime, abilities)?;
        let pool = Arc::new(Self {
            programs,
            abilities,
            views: Arc::default(),
            known: Known::default(),
            root,
            runtime,
            capabilities,
            attached: Mutex::default(),
            receiving: Mutex::default(),
            publishing: Mutex::default(),
            notes: Mutex::default(),
            outlived: Mutex::default(),
            pins: Mutex::default(),
            _place: place,
        });
        pool.recover()?;
        Ok(pool)
    }

    pub(super) fn root(&self) -> &str {
        &self.root
    }
    pub(super) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }
    /// Names one of [`FOLDERS`].
    pub(super) fn folder(&self, name: &str) -> String {
        format!("{}/{name}", self.root)
    }
    pub(super) fn volume_dataset(&self, volume: VolumeId) -> String {
        format!("{}/volumes/{volume}", self.root)
    }
    pub(super) fn snapshot_name(&self, key: SnapshotKey) -> String {
        format!("{}/volumes/{}@{}", self.root, key.volume, key.snapshot)
    }
    pub(super) fn incoming_dataset(&self, volume: VolumeId, snapshot: SnapshotId) -> String {
        format!("{}/incoming/{volume}.{snapshot}", self.root)
    }
    /// Where a dataset beneath the root is mounted.
    pub(super) fn mount_point(&self, dataset: &str) -> PathBuf {
        let relative = dataset.strip_prefix(&self.root).unwrap_or(dataset).trim_start_matches('/');
        self.runtime.join("mnt").join(relative)
    }
    pub(super) fn mounts(&self) -> PathBuf {
        self.runtime.join("mnt")
    }
    pub(super) fn attached(&self) -> MutexGuard<'_, HashMap<Target, Attachment>> {
        locked(&self.attached)
    }
    pub(super) fn receiving(&self) -> MutexGuard<'_, HashSet<VolumeId>> {
        locked(&self.receiving)
    }
    /// Held for the few commands that publish one verb, so that nobody lists the pool between two of them.
    pub(super) fn publishing(&self) -> MutexGuard<'_, ()> {
        locked(&self.publishing)
    }

    /// Lists a dataset and all beneath it with these properties: one command, whatever there is. Bookmarks (`…#…`), which
    /// only an operator makes, are passed over: `zfs get -r` of OpenZFS lists them, too.
    pub(super) fn list(&self, dataset: &str, properties: &str) -> std::result::Result<Vec<Found>, Trouble> {
        let words = ["get", "-Hp", "-r", "-s", "local,none", "-o", listing::FIELDS, properties, dataset];
        let mut found = listing::parse(&self.programs.zfs(&words)?);
        found.retain(|it| !it.name.contains('#'));
        Ok(found)
    }

    /// Reads properties of one dataset or snapshot.
    pub(super) fn look(&self, name: &str, properties: &str) -> std::result::Result<Found, Trouble> {
        let words = ["get", "-Hp", "-s", "local,none", "-o", listing::FIELDS, properties, name];
        let found = listing::parse(&self.programs.zfs(&words)?).into_iter().next();
        Ok(found.unwrap_or_else(|| Found { name: name.to_owned(), ..Found::default() }))
    }

    pub(super) fn usage(&self) -> Result<Usage> {
        const OPERATION: &str = "measure pool";
        let found = self.look(&self.root, "used,available").map_err(|it| it.into_error(OPERATION, &self.root))?;
        let number = |name: &str| found.property(name).and_then(|value| value.parse::<u64>().ok()).unwrap_or_default();
        let available_bytes = number("available");
        Ok(Usage { total_bytes: number("used").saturating_add(available_bytes), available_bytes })
    }
}

/// Locks a mutex whose holders leave no state half done.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at the root, makes it where only it is missing, and marks it as a pool where it is free.
fn set_up(spec: &PoolSpec, programs: &Programs, root: &str) -> Result<()> {
    let unusable = |why: String| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(why));
    let failed = |trouble: Trouble| unusable(trouble.error.to_string());
    if !place::exists(programs, root).map_err(failed)? {
        programs.zfs(&["create", "-o", "canmount=off", "-o", "mountpoint=none", root]).map_err(failed)?;
    }
    let name = property::name("pool");
    let words = ["get", "-Hp", "-s", "local", "-o", listing::FIELDS, &name, root];
    let found = listing::parse(&programs.zfs(&words).map_err(failed)?);
    if let Some(value) = found.first().and_then(|it| it.property(&name)) {
        let record: PoolRecord = property::decode("pool", "pool", value, |_| None)
            .map_err(|error| unusable(format!("the record of the pool: {error}")))?;
        if record.format > POOL_FORMAT {
            let format = record.format;
            return Err(unusable(format!(
                "it has format {format}, written by a newer flocker; this one knows formats up to {POOL_FORMAT}"
            )));
        }
        return if record.driver == super::NAME {
            Ok(())
        } else {
            Err(unusable(format!("it belongs to the driver {:?}", record.driver)))
        };
    }
    let listed = programs.zfs(&["list", "-H", "-r", "-t", "filesystem,volume,snapshot", "-o", "name", root]);
    let listed = String::from_utf8_lossy(&listed.map_err(failed)?).into_owned();
    if let Some(other) = listed.lines().find(|line| *line != root) {
        return Err(unusable(format!("it is no pool and not empty: it holds {other}; name a dataset of its own")));
    }
    let record = PoolRecord { format: POOL_FORMAT, id: Uuid::now_v7(), driver: super::NAME.to_owned() };
    let encoded = property::encode("pool", "pool", 1, &record).map_err(|error| Error::io(OPERATION, spec, error))?;
    let (name, value) = encoded.header;
    programs.zfs(&["set", &format!("{name}={value}"), root]).map_err(failed)?;
    Ok(())
}

/// Makes the datasets beneath the root that are missing, and has them mount where they should.
fn lay_out(spec: &PoolSpec, programs: &Programs, root: &str, runtime: &Path, abilities: Abilities) -> Result<()> {
    let failed = |trouble: Trouble| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(trouble.error.to_string()));
    let words = ["get", "-Hp", "-r", "-s", "local", "-o", listing::FIELDS, "mountpoint", root];
    let found = listing::parse(&programs.zfs(&words).map_err(failed)?);
    for folder in FOLDERS {
        let dataset = format!("{root}/{folder}");
        let mount_point = format!("mountpoint={}", runtime.join("mnt").join(folder).display());
        match found.iter().find(|it| it.name == dataset).and_then(|it| it.property("mountpoint")) {
            Some(value) if mount_point.ends_with(&format!("={value}")) => {}
            Some(_) => drop(programs.zfs(&["set", &mount_point, &dataset]).map_err(failed)?),
            None => {
                let mut words = vec!["create", "-o", &mount_point, "-o", "canmount=off", "-o", "atime=off"];
                if abilities.modern {
                    // So that access control lists and attributes of a tree can be kept.
                    words.extend(["-o", "acltype=posixacl", "-o", "xattr=sa"]);
                }
                words.push(&dataset);
                unless(Class::Exists, programs.zfs(&words)).map_err(failed)?;
            }
        }
    }
    Ok(())
}

/// Finds out what programs and pool can do.
fn probe(spec: &PoolSpec, programs: &Programs, root: &str) -> Result<(Abilities, Capabilities)> {
    let failed = |trouble: Trouble| Error::new(OPERATION, spec, ErrorKind::PoolUnusable(trouble.error.to_string()));
    let pool = root.split('/').next().unwrap_or_default();
    let mut facts = BTreeMap::new();
    let health = programs.run("zpool", &["list", "-H", "-o", "health", pool]).map_err(failed)?;
    facts.insert("health".to_owned(), String::from_utf8_lossy(&health).trim().to_lowercase());
    let version = match programs.zfs(&["version"]) {
        Ok(output) => Some(String::from_utf8_lossy(&output).split_whitespace().collect::<Vec<_>>().join(", ")),
        Err(_) => None,
    };
    let modern = version.is_some();
    facts.insert("programs".to_owned(), version.unwrap_or_else(|| "zfs-fuse, or older than OpenZFS 0.8".to_owned()));
    let properties = programs.run("zpool", &["get", "all", pool]).map_err(failed)?;
    let properties = String::from_utf8_lossy(&properties).into_owned();
    let value = |name: &str| {
        let mut lines = properties.lines().map(str::split_whitespace);
        lines.find_map(|mut words| (words.nth(1) == Some(name)).then(|| words.next().unwrap_or("-").to_owned()))
    };
    let has = |feature: &str| {
        modern && value(&format!("feature@{feature}")).is_some_and(|it| it == "enabled" || it == "active")
    };
    if let Some(version) = value("version").filter(|version| version != "-") {
        facts.insert("pool version".to_owned(), version);
    }
    let rich = ["large_blocks", "embedded_data", "lz4_compress", "extensible_dataset"];
    let abilities =
        Abilities { modern, resume: has("extensible_dataset"), rich_streams: rich.iter().all(|feature| has(feature)) };
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    facts.insert("resumes a receive after a restart".to_owned(), yes(abilities.resume));
    facts.insert("sends compressed and large blocks".to_owned(), yes(abilities.rich_streams));
    facts.insert("encryption".to_owned(), yes(has("encryption")));
    let native = |format: &str| DeltaFormat(format.to_owned());
    let (formats, reads) = match (modern, abilities.rich_streams) {
        (false, _) => (vec![native(FORMAT_1)], vec![native(FORMAT_1)]),
        (true, true) => (vec![native(FORMAT_2)], vec![native(FORMAT_2), native(FORMAT_1)]),
        // An old pool under new programs: what it writes a zfs-fuse would take, and not be able to read.
        (true, false) => (Vec::new(), vec![native(FORMAT_1)]),
    };
    let and_tree = |formats: Vec<DeltaFormat>| formats.into_iter().chain([DeltaFormat::tree()]).collect();
    let capabilities = Capabilities {
        driver: super::NAME.to_owned(),
        pool: spec.place().to_owned(),
        formats: and_tree(formats),
        reads: and_tree(reads),
        group_atomic: modern,
        quota: true,
        facts,
    };
    Ok((abilities, capabilities))
}

/// Makes a directory of mode 0700 with those above it; one that is there is fine.
pub(super) fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(path).and_then(|()| fs::metadata(path).map(drop))
}
