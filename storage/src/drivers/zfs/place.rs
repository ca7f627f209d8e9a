//! Places: a dataset of a pool that is there, or a file or block device that holds a pool of its own.
//!
//! `DATASET`, or `PATH[,size=20G][,wipe]`: a file that does not exist is made with this size; a file or device that holds
//! something is made a pool only with `wipe`, and a pool of flocker never. The pools made here are imported and exported
//! here, somebody else's never. Refuses to know what lies in the dataset.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{
    listing,
    program::{Class, Programs, Trouble},
};
use crate::{
    command,
    drivers::{PoolSpec, blank::is_blank},
    error::{Error, ErrorKind, Result},
};

const OPERATION: &str = "open pool";

/// What the names of the pools begin with that are made here. Only such pools are imported and exported.
const PREFIX: &str = "flocker-";

/// The smallest file that zpool(8) takes as a device.
const SIZE_MIN: u64 = 64 * 1024 * 1024;

/// The longest name of the dataset: what we append must fit into the 255 bytes of a name, with a snapshot behind it.
const DATASET_LIMIT: usize = 120;

/// What the user wrote behind the driver's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// A dataset of a pool that is imported already.
    Dataset(String),
    /// A file or a device.
    Container(Container),
}

/// A file or a device that holds a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Container {
    path: PathBuf,
    size_bytes: Option<u64>,
    wipe: bool,
}

/// The dataset that all lies in, and the pool that is exported at the end.
pub(super) struct Place {
    pub(super) dataset: String,
    export: Option<String>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(pool) = &self.export else { return };
        if let Err(error) = command::run("zpool", &["export", pool]) {
            // A container may still use a mount in it. The next open finds it imported.
            tracing::info!(%error, "the pool stays imported");
        }
    }
}

impl Wanted {
    pub(super) fn parse(text: &str) -> std::result::Result<Self, String> {
        if !text.starts_with('/') {
            return if is_dataset(text) {
                Ok(Self::Dataset(text.to_owned()))
            } else {
                let rule = format!("{text:?} is neither an absolute path nor the name of a dataset");
                Err(format!("{rule} of {DATASET_LIMIT} bytes at most"))
            };
        }
        let mut container = Container { path: PathBuf::new(), size_bytes: None, wipe: false };
        let mut rest = text;
        while let Some((before, option)) = rest.rsplit_once(',') {
            if option == "wipe" {
                container.wipe = true;
            } else if let Some(size) = option.strip_prefix("size=") {
                let parsed = parse_size(size).ok_or_else(|| format!("{size:?} is no size; write 20G or 512M"))?;
                container.size_bytes = Some(parsed);
            } else {
                break;
            }
            rest = before;
        }
        container.path = PathBuf::from(rest);
        Ok(Self::Container(container))
    }

    /// Names what is locked: two who mean the same pool get the same name.
    pub(super) fn lock_name(&self, spec: &PoolSpec) -> Result<String> {
        match self {
            Self::Dataset(dataset) => {
                let pool = dataset.split('/').next().unwrap_or_default();
                let guid = pool_guid(pool).map_err(|why| unusable(spec, why))?;
                Ok(format!("{guid}.{}", dataset.replace('/', "+")))
            }
            Self::Container(container) => {
                let path = container.path.canonicalize().unwrap_or_else(|_| container.path.clone());
                let hash = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
                Ok(format!("file.{}", &hash[..24]))
            }
        }
    }

    /// Makes the place ready. The dataset may still be missing.
    pub(super) fn open(&self, spec: &PoolSpec, programs: &Programs) -> Result<Place> {
        match self {
            Self::Dataset(dataset) => Ok(Place { dataset: dataset.clone(), export: None }),
            Self::Container(container) => container.open(spec, programs),
        }
    }
}

fn unusable(spec: &PoolSpec, why: String) -> Error {
    Error::new(OPERATION, spec, ErrorKind::PoolUnusable(why))
}

/// Returns the guid of an imported pool, or says in words why not.
fn pool_guid(pool: &str) -> std::result::Result<u64, String> {
    let output = command::run("zpool", &["get", "guid", pool]).map_err(|error| match error.is_missing() {
        true => "the programs zfs and zpool are not installed".to_owned(),
        false => error.to_string(),
    })?;
    let guid = listing::table_value(&output).and_then(|guid| guid.parse().ok());
    guid.ok_or_else(|| format!("zpool says nothing of {pool}"))
}

impl Container {
    fn open(&self, spec: &PoolSpec, programs: &Programs) -> Result<Place> {
        let place = |name: String| Place { dataset: name.clone(), export: Some(name) };
        let Some((path, name, guid)) = self.labels(programs).into_iter().next() else {
            return self.create(spec, programs).map(place);
        };
        let is_imported = self.is_imported(programs, &name, guid);
        if !name.starts_with(PREFIX) {
            // It is not even imported to be looked at: that would mount what lies in it.
            return match (is_imported, self.wipe) {
                (true, _) => Err(unusable(
                    spec,
                    format!(
                        "it is in use by the pool {name}; name a dataset of that instead, as in zfs:{name}/flocker"
                    ),
                )),
                (false, false) => Err(unusable(
                    spec,
                    format!(
                        "it holds the pool {name}; import that and name a dataset of it, or add ,wipe to overwrite all of it"
                    ),
                )),
                (false, true) => self.create(spec, programs).map(place),
            };
        }
        if !is_imported {
            let dir = path.parent().unwrap_or(Path::new("/"));
            let guid = guid.to_string();
            let words = ["import", "-o", "cachefile=none", "-d"].map(AsRef::as_ref);
            let arguments: Vec<_> = words.into_iter().chain([dir.as_os_str(), guid.as_ref()]).collect();
            let imported = programs.run("zpool", &arguments);
            imported.map_err(|trouble: Trouble| unusable(spec, trouble.error.to_string()))?;
        }
        Ok(place(name))
    }

    /// Looks for the label of a pool: on the device, or on the partition that zpool(8) makes of a whole disk.
    fn labels(&self, programs: &Programs) -> Vec<(PathBuf, String, u64)> {
        let path = self.path.display().to_string();
        let candidates = [path.clone(), format!("{path}1"), format!("{path}p1"), format!("{path}-part1")];
        let is_file = fs::metadata(&self.path).is_ok_and(|stat| stat.is_file());
        let candidates = candidates.into_iter().take(if is_file { 1 } else { 4 });
        let label = |path: String| {
            let output = match programs.run("zdb", &["-l", &path]) {
                Ok(output) => output,
                Err(trouble) => trouble.error.stdout().to_vec(),
            };
            listing::label(&output).map(|(name, guid)| (PathBuf::from(path), name, guid))
        };
        candidates.filter(|path| Path::new(path).exists()).filter_map(label).collect()
    }

    fn is_imported(&self, programs: &Programs, name: &str, guid: u64) -> bool {
        let output = programs.run("zpool", &["get", "guid", name]);
        output.ok().and_then(|output| listing::table_value(&output)).is_some_and(|found| found == guid.to_string())
    }

    /// Makes a pool, where nothing is in the way of it. Returns its name.
    fn create(&self, spec: &PoolSpec, programs: &Programs) -> Result<String> {
        let unusable = |why: String| unusable(spec, why);
        let failed = |error: io::Error| Error::io(OPERATION, spec, error);
        let kind = match fs::metadata(&self.path) {
            Ok(stat) => Some(stat.file_type()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(unusable(error.to_string())),
        };
        match kind {
            Some(kind) if kind.is_file() || kind.is_block_device() => {}
            Some(_) => return Err(unusable("it is neither a file nor a block device".to_owned())),
            None if self.size_bytes.is_none() => {
                return Err(unusable("there is nothing; to make a pool in a file, write PATH,size=20G".to_owned()));
            }
            None => {}
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(kind.is_none())
            .truncate(false)
            .mode(0o600)
            .open(&self.path)
            .map_err(failed)?;
        if !self.wipe && !is_blank(&mut file).map_err(failed)? {
            let what = what_is_on(programs, &self.path);
            return Err(unusable(format!("it holds {what}; add ,wipe to overwrite all of it")));
        }
        let stat = file.metadata().map_err(failed)?;
        if stat.is_file() {
            let size = match (self.size_bytes, stat.len()) {
                (Some(size), _) => size,
                (None, 0) => return Err(unusable("the file is empty; add ,size=20G".to_owned())),
                (None, length) => length,
            };
            if size < SIZE_MIN {
                return Err(unusable(format!("{size} bytes are too few; zpool wants {SIZE_MIN} at least")));
            }
            file.set_len(size).map_err(failed)?;
        }
        drop(file);
        let name = format!("{PREFIX}{}", &Uuid::new_v4().simple().to_string()[..12]);
        let mut arguments = vec!["create"];
        if self.wipe {
            arguments.push("-f");
        }
        arguments.extend(["-m", "none", "-o", "cachefile=none"]);
        arguments.extend(["-O", "canmount=off", "-O", "atime=off", "-O", "compression=on"]);
        let path = self.path.display().to_string();
        arguments.extend([name.as_str(), path.as_str()]);
        programs.run("zpool", &arguments).map_err(|trouble| unusable(trouble.error.to_string()))?;
        Ok(name)
    }
}

/// Tells whether a dataset is there.
pub(super) fn exists(programs: &Programs, dataset: &str) -> std::result::Result<bool, Trouble> {
    match programs.zfs(&["list", "-H", "-o", "name", dataset]) {
        Ok(_) => Ok(true),
        Err(trouble) if trouble.class == Class::NotFound => Ok(false),
        Err(trouble) => Err(trouble),
    }
}

/// Says in words what a device holds.
fn what_is_on(programs: &Programs, path: &Path) -> String {
    let words = ["-p", "-o", "value", "-s", "TYPE", "-s", "PTTYPE"].map(AsRef::as_ref);
    let arguments: Vec<_> = words.into_iter().chain([path.as_os_str()]).collect();
    let kind = programs.run("blkid", &arguments).ok();
    let kind = kind.map(|kind| String::from_utf8_lossy(&kind).split_whitespace().collect::<Vec<_>>().join(", "));
    kind.filter(|kind| !kind.is_empty()).unwrap_or_else(|| "data".to_owned())
}

/// Tells whether a text is the name of a dataset, and no option of a program.
fn is_dataset(text: &str) -> bool {
    let part = |part: &str| {
        part.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.:-".contains(&byte))
    };
    text.len() <= DATASET_LIMIT && text.split('/').all(part)
}

fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_place_is_a_dataset_or_a_path_with_options() {
        assert_eq!(Wanted::parse("tank/flocker"), Ok(Wanted::Dataset("tank/flocker".to_owned())));
        let container =
            |path: &str, size_bytes, wipe| Ok(Wanted::Container(Container { path: path.into(), size_bytes, wipe }));
        assert_eq!(Wanted::parse("/dev/sdx,wipe"), container("/dev/sdx", None, true));
        assert_eq!(Wanted::parse("/a,b/pool.img,size=20G"), container("/a,b/pool.img", Some(20 << 30), false));
        assert_eq!(Wanted::parse("/p,size=512M,wipe"), container("/p", Some(512 << 20), true));
        for wrong in ["-n", "tank/", "tank//x", "tank@snap", "tank/-x", "tank/x#y", "tank/%recv", "", "tank x"] {
            assert!(Wanted::parse(wrong).is_err(), "{wrong:?}");
        }
        assert!(Wanted::parse(&"t".repeat(DATASET_LIMIT + 1)).is_err());
        assert!(Wanted::parse("/p,size=big").is_err() && Wanted::parse("/p,size=99999999999T").is_err());
    }
}
