//! Files that were written and wait, open, for what is done behind: how many there are in this process.
//!
//! Owns the share of the process's open files that they may take. Neighbour: [`super::tail`], which closes them.

use std::{
    os::fd::OwnedFd,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::process::{Resource, getrlimit};

/// All that wait, of all receives. There are many from a quarter of the files on that this process may have open.
static ALL: LazyLock<Gauge> = LazyLock::new(|| {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / 4;
    Gauge::new(usize::try_from(limit).unwrap_or(usize::MAX))
});

/// Tells whether so many files wait that few more should.
pub(super) fn are_many() -> bool {
    ALL.is_high()
}

/// One of them. It is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Waiting {
    file: OwnedFd,
    counted_by: &'static Gauge,
}

impl Waiting {
    pub(super) fn new(file: OwnedFd) -> Self {
        Self::counted(file, &ALL)
    }

    fn counted(file: OwnedFd, counted_by: &'static Gauge) -> Self {
        counted_by.count.fetch_add(1, Ordering::Relaxed);
        Self { file, counted_by }
    }

    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.counted_by.count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Gauge {
    count: AtomicUsize,
    many: usize,
}

impl Gauge {
    fn new(many: usize) -> Self {
        Self { count: AtomicUsize::new(0), many }
    }

    fn is_high(&self) -> bool {
        self.count.load(Ordering::Relaxed) >= self.many
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn as_many_wait_as_are_open() {
        let gauge: &'static Gauge = Box::leak(Box::new(Gauge::new(3)));
        let file = || std::fs::File::open("/dev/null").unwrap().into();
        let mut waiting: Vec<_> = (0..2).map(|_| Waiting::counted(file(), gauge)).collect();
        assert!(!gauge.is_high());
        waiting.push(Waiting::counted(file(), gauge));
        assert!(gauge.is_high());
        waiting.pop();
        assert!(!gauge.is_high());
    }
}
