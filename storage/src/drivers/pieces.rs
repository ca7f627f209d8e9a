//! What a reader of a stream passes on of the bytes that it was given: as they lie, wherever it changes nothing.

use std::borrow::Cow;

/// Goes through bytes from their beginning to their end, and gathers what is passed on.
#[derive(Debug)]
pub(super) struct Pieces<'a> {
    bytes: &'a [u8],
    /// From here up to `at` all is passed on as it lies.
    run: usize,
    at: usize,
    out: Vec<Cow<'a, [u8]>>,
}

impl<'a> Pieces<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self { bytes, run: 0, at: 0, out: Vec::new() }
    }

    /// Returns what was not gone through.
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    /// Passes on the next bytes as they lie.
    pub(super) fn pass(&mut self, length: usize) {
        self.at += length;
    }

    /// Leaves the next bytes out.
    pub(super) fn skip(&mut self, length: usize) {
        self.end_run();
        self.at += length;
        self.run = self.at;
    }

    /// Passes on something else at this place.
    pub(super) fn put(&mut self, bytes: Vec<u8>) {
        self.end_run();
        self.out.push(Cow::Owned(bytes));
    }

    /// Returns what is passed on, in order.
    pub(super) fn finish(mut self) -> Vec<Cow<'a, [u8]>> {
        self.end_run();
        self.out
    }

    fn end_run(&mut self) {
        if self.run < self.at {
            self.out.push(Cow::Borrowed(&self.bytes[self.run..self.at]));
            self.run = self.at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_passed_on_in_a_row_is_one_piece_of_what_was_given() {
        let mut pieces = Pieces::of(b"abcdefgh");
        pieces.pass(1);
        pieces.pass(2);
        pieces.put(b"X".to_vec());
        assert_eq!(pieces.rest(), b"defgh");
        pieces.skip(1);
        pieces.pass(4);
        let pieces = pieces.finish();
        assert_eq!(pieces, [b"abc".as_slice(), b"X", b"efgh"]);
        assert!(matches!(pieces[..], [Cow::Borrowed(_), Cow::Owned(_), Cow::Borrowed(_)]));
        assert!(Pieces::of(b"").finish().is_empty());
    }
}
