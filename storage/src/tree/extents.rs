//! Which stretches of two files lie at the same place of one file system, and so are equal without being read.
//!
//! Owns the question to the kernel (FIEMAP, Documentation/filesystems/fiemap.rst). Refuses to know what is done with the
//! answer. Where the file system does not answer, nothing is shared. Memory is a few extents, however many a file has.

use std::os::fd::OwnedFd;

use fiemap::{Fiemap, FiemapExtent, FiemapExtentFlags};

/// An extent whose place says nothing about its bytes: not written yet, compressed (many extents have the place of one), or
/// not block by block.
const OPAQUE: FiemapExtentFlags = FiemapExtentFlags::UNKNOWN
    .union(FiemapExtentFlags::DELALLOC)
    .union(FiemapExtentFlags::ENCODED)
    .union(FiemapExtentFlags::DATA_ENCRYPTED)
    .union(FiemapExtentFlags::NOT_ALIGNED)
    .union(FiemapExtentFlags::DATA_INLINE)
    .union(FiemapExtentFlags::DATA_TAIL)
    .union(FiemapExtentFlags::UNWRITTEN);

/// Walks the shared stretches of two files, forwards only.
#[derive(Debug)]
pub(super) struct Shared<I> {
    one: I,
    other: I,
    heads: (Option<Extent>, Option<Extent>),
    /// The stretch at or behind the last place asked for.
    found: Option<(u64, u64)>,
}

/// A stretch of a file: its offset, its place, its length, in bytes; no place where it says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    logical: u64,
    physical: Option<u64>,
    length: u64,
}

impl From<FiemapExtent> for Extent {
    fn from(extent: FiemapExtent) -> Self {
        let physical = (!extent.fe_flags.intersects(OPAQUE)).then_some(extent.fe_physical);
        Self { logical: extent.fe_logical, physical, length: extent.fe_length }
    }
}

impl Extent {
    fn end(&self) -> u64 {
        self.logical.saturating_add(self.length)
    }
}

/// The extents of a file as the kernel tells them; none from the first error on.
#[derive(Debug)]
pub(super) struct Extents(Fiemap<OwnedFd>);

impl Iterator for Extents {
    type Item = Extent;
    fn next(&mut self) -> Option<Extent> {
        self.0.next()?.ok().map(Extent::from)
    }
}

impl Shared<Extents> {
    /// Asks about two files. `None`: they are on two file systems, or the question cannot be asked.
    pub(super) fn of(one: &OwnedFd, other: &OwnedFd) -> Option<Self> {
        let device = |file: &OwnedFd| rustix::fs::fstat(file).map(|stat| stat.st_dev).ok();
        (device(one)? == device(other)?).then_some(())?;
        let extents = |file: &OwnedFd| Some(Extents(Fiemap::new(file.try_clone().ok()?)));
        Some(Self::new(extents(one)?, extents(other)?))
    }
}

impl<I: Iterator<Item = Extent>> Shared<I> {
    fn new(mut one: I, mut other: I) -> Self {
        let heads = (one.next(), other.next());
        Self { one, other, heads, found: None }
    }

    /// Returns where the shared stretch that holds `offset` ends; `None` when `offset` is not shared. Offsets must not
    /// go back.
    pub(super) fn end_at(&mut self, offset: u64) -> Option<u64> {
        while self.found.is_none_or(|(_, end)| end <= offset) {
            let (Some(one), Some(other)) = self.heads else { return None };
            let (start, end) = (one.logical.max(other.logical), one.end().min(other.end()));
            let place = |extent: &Extent| extent.physical.map(|physical| physical.wrapping_sub(extent.logical));
            if start < end && place(&one).is_some() && place(&one) == place(&other) {
                self.found = Some((start, end));
            }
            if one.end() <= other.end() {
                self.heads.0 = self.one.next();
            } else {
                self.heads.1 = self.other.next();
            }
        }
        self.found.filter(|(start, _)| *start <= offset).map(|(_, end)| end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(logical: u64, physical: u64, length: u64) -> Extent {
        Extent { logical, physical: Some(physical), length }
    }

    fn shared(one: &[Extent], other: &[Extent], at: &[u64]) -> Vec<Option<u64>> {
        let mut shared = Shared::new(one.iter().copied(), other.iter().copied());
        at.iter().map(|offset| shared.end_at(*offset)).collect()
    }

    #[test]
    fn a_rewritten_stretch_in_the_middle_is_not_shared() {
        let one = [extent(0, 1000, 300)];
        let other = [extent(0, 1000, 100), extent(100, 9000, 50), extent(150, 1150, 150)];
        assert_eq!(
            shared(&one, &other, &[0, 99, 100, 149, 150, 299, 300]),
            [Some(100), Some(100), None, None, Some(300), Some(300), None]
        );
    }

    #[test]
    fn the_same_place_at_another_offset_is_not_the_same_stretch() {
        assert_eq!(shared(&[extent(0, 1000, 100)], &[extent(100, 1000, 100)], &[0, 100]), [None, None]);
        assert_eq!(shared(&[extent(0, 1000, 200)], &[extent(100, 1000, 100)], &[0, 100, 150]), [None, None, None]);
    }

    #[test]
    fn an_extent_whose_place_says_nothing_is_read() {
        let opaque = Extent { physical: None, ..extent(0, 0, 100) };
        assert_eq!(shared(&[opaque], &[opaque], &[0]), [None]);
    }

    #[test]
    fn holes_are_not_shared_and_do_not_hide_what_follows() {
        let one = [extent(0, 1000, 10), extent(100, 2000, 10)];
        let other = [extent(100, 2000, 10)];
        assert_eq!(shared(&one, &other, &[0, 50, 100, 109]), [None, None, Some(110), Some(110)]);
    }
}
