//! The drivers, and the registry that opens a pool with one.
//!
//! Owns the list of drivers and the parsing of `DRIVER:PLACE`. A new driver is one folder here and one line in [`open`].

use std::{fmt, str::FromStr, sync::Arc};

use crate::{
    driver::Driver,
    error::{Error, ErrorKind, Result},
};

#[cfg(any(feature = "btrfs", feature = "zfs"))]
mod blank;
#[cfg(feature = "btrfs")]
pub mod btrfs;
#[cfg(feature = "directory")]
pub mod directory;
#[cfg(any(feature = "btrfs", feature = "directory"))]
mod estimate;
#[cfg(any(feature = "btrfs", feature = "directory"))]
mod folder;
#[cfg(any(feature = "btrfs", feature = "directory", feature = "zfs"))]
mod intake;
#[cfg(any(feature = "btrfs", feature = "directory", feature = "zfs"))]
mod lock;
#[cfg(feature = "memory")]
pub mod memory;
#[cfg(any(feature = "btrfs", feature = "directory"))]
mod partial;
mod pieces;
#[cfg(any(feature = "btrfs", feature = "directory"))]
mod published;
#[cfg(feature = "zfs")]
pub mod zfs;

/// The names of the drivers compiled in.
pub const DRIVERS: &[&str] = &[
    #[cfg(feature = "directory")]
    directory::NAME,
    #[cfg(feature = "btrfs")]
    btrfs::NAME,
    #[cfg(feature = "memory")]
    memory::NAME,
    #[cfg(feature = "zfs")]
    zfs::NAME,
];

/// A pool as the user writes it: `DRIVER:PLACE`, for example `directory:/var/lib/flocker/pool`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolSpec {
    driver: String,
    place: String,
}

/// A pool that is not written as `DRIVER:PLACE`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a pool: {rule}")]
pub struct PoolSpecError {
    text: String,
    rule: String,
}

/// The longest place of a pool, in bytes: what one path of the operating system may have.
const PLACE_LIMIT: usize = 4096;

/// The option of a place that has its file or device formatted.
const WIPE: &str = "wipe";

impl PoolSpec {
    /// Returns the driver's name, the part before the colon.
    pub fn driver(&self) -> &str {
        &self.driver
    }
    /// Returns the place, the part behind the colon, in the driver's own terms.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Tells whether opening it formats its file or device, whatever that holds (but a pool of flocker).
    pub fn wipes(&self) -> bool {
        self.driver != "directory" && self.place.split(',').skip(1).any(|option| option == WIPE)
    }

    /// Returns the pool as one that [wipes](PoolSpec::wipes). A directory is never wiped.
    pub fn wiping(self) -> std::result::Result<Self, PoolSpecError> {
        if self.driver == "directory" {
            let rule = "a directory is not wiped; only files and devices are".to_owned();
            return Err(PoolSpecError { text: self.to_string(), rule });
        }
        Ok(Self { place: format!("{},{WIPE}", self.place), ..self })
    }
}

impl FromStr for PoolSpec {
    type Err = PoolSpecError;

    fn from_str(text: &str) -> std::result::Result<Self, PoolSpecError> {
        let wrong = |rule: String| PoolSpecError { text: text.chars().take(160).collect(), rule };
        let Some((driver, place)) = text.split_once(':') else {
            return Err(wrong("write it as DRIVER:PLACE, for example directory:/var/lib/flocker/pool".to_owned()));
        };
        if !DRIVERS.contains(&driver) {
            return Err(wrong(format!("the drivers of this build are {}", DRIVERS.join(", "))));
        }
        if place.is_empty() || place.len() > PLACE_LIMIT || place.contains('\0') {
            return Err(wrong(format!("the part behind the colon must have 1 to {PLACE_LIMIT} bytes and no NUL")));
        }
        if driver == "directory" && !place.starts_with('/') {
            return Err(wrong("the path must be absolute".to_owned()));
        }
        Ok(Self { driver: driver.to_owned(), place: place.to_owned() })
    }
}

impl fmt::Display for PoolSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.driver, self.place)
    }
}

/// Opens a pool with its driver, and sets it up where the place is free and empty.
///
/// What an interrupted operation left is finished or cleared away first. The pool stays locked against a second opener
/// until the value, its readers and its receives are dropped.
pub async fn open(spec: &PoolSpec) -> Result<Arc<dyn Driver>> {
    match spec.driver() {
        #[cfg(feature = "directory")]
        directory::NAME => Ok(Arc::new(directory::DirectoryDriver::open(spec).await?)),
        #[cfg(feature = "btrfs")]
        btrfs::NAME => Ok(Arc::new(btrfs::BtrfsDriver::open(spec).await?)),
        #[cfg(feature = "zfs")]
        zfs::NAME => Ok(Arc::new(zfs::ZfsDriver::open(spec).await?)),
        #[cfg(feature = "memory")]
        memory::NAME => Ok(Arc::new(memory::MemoryDriver::open(spec).await?)),
        other => Err(Error::new("open pool", spec, ErrorKind::Unsupported(format!("there is no driver {other:?}")))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[cfg(feature = "directory")]
    #[test]
    fn a_pool_is_a_driver_and_a_place() {
        let spec: PoolSpec = "directory:/a/b:c".parse().unwrap();
        assert_eq!((spec.driver(), spec.place()), ("directory", "/a/b:c"));
        assert_eq!(spec.to_string(), "directory:/a/b:c");
        assert!(spec.wiping().is_err(), "never a directory");
    }

    #[cfg(feature = "btrfs")]
    #[test]
    fn a_file_or_device_is_wiped_when_that_is_asked_for() {
        let spec: PoolSpec = "btrfs:/a,wipe-b/pool,size=1G".parse().unwrap();
        assert!(!spec.wipes());
        let spec = spec.wiping().unwrap();
        assert!(spec.wipes());
        assert_eq!(spec.place(), "/a,wipe-b/pool,size=1G,wipe");
    }

    #[test]
    fn what_is_no_pool_is_refused_in_words() {
        for (text, words) in [
            ("/var/lib", "DRIVER:PLACE"),
            ("floppy:/a", "drivers of this build"),
            ("directory:", "1 to 4096"),
            ("directory:a/b", "absolute"),
            ("directory:/a\0b", "NUL"),
        ] {
            let error = text.parse::<PoolSpec>().unwrap_err().to_string();
            assert!(error.contains(words), "{text:?}: {error}");
        }
    }
}
