//! The bytes of a frame in one piece or two, so that none is copied for them to be together.

use bytes::Bytes;

/// One piece, or two of which the second follows the first.
#[derive(Debug, Clone, Default)]
pub(super) struct Pieces([Bytes; 2]);

impl Pieces {
    pub(super) fn of(first: Bytes, second: Bytes) -> Self {
        Self([first, second])
    }

    pub(super) fn len(&self) -> usize {
        self.iter().map(Bytes::len).sum()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.0.iter().filter(|piece| !piece.is_empty())
    }
}

impl From<Bytes> for Pieces {
    fn from(piece: Bytes) -> Self {
        Self::of(piece, Bytes::new())
    }
}

impl IntoIterator for Pieces {
    type Item = Bytes;
    type IntoIter = std::array::IntoIter<Bytes, 2>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
