//! The digest of a stream: BLAKE3 of its frames, in which the data of each file counts by the digest of that data; not at all
//! where the contents' digest is stated in a record before it.
//!
//! So the contents of a file are hashed once by whoever makes the stream, and once by whoever takes it in, who needs the digest of
//! a whole file besides. Both sides call the same in the same order; docs/PROTOCOL.md has the rule.

use blake3::Hasher;

/// The digest as the stream goes by.
#[derive(Debug, Default)]
pub(super) struct StreamDigest {
    frames: Hasher,
    /// The data of the file announced last, from where the stream begins with it.
    contents: Hasher,
    has_contents: bool,
    /// What the digest of that data is, where it is known without hashing.
    known: Option<[u8; 32]>,
    is_stated: bool,
}

impl StreamDigest {
    /// Takes in frames, or the part of a frame that is before its data.
    pub(super) fn frames(&mut self, bytes: &[u8]) {
        self.frames.update(bytes);
    }

    /// Takes in data of the file announced last.
    pub(super) fn data(&mut self, bytes: &[u8]) {
        self.contents.update(bytes);
        self.has_contents = true;
    }

    /// Takes in all data of the file announced last, whose digest is known.
    pub(super) fn known_data(&mut self, digest: [u8; 32]) {
        self.known = Some(digest);
        self.has_contents = true;
    }

    /// Leaves the data of the file announced last out: its digest is stated in a frame. Who receives it goes on calling
    /// [`data`](Self::data), and compares what [`end_data`](Self::end_data) returns.
    pub(super) fn state(&mut self) {
        self.is_stated = true;
    }

    /// Tells whether data of the file announced last is to be taken in by who sends it.
    pub(super) fn counts_data(&self) -> bool {
        !self.is_stated
    }

    /// Tells whether a file was not ended: the frames before its end must be taken in first.
    pub(super) fn has_data(&self) -> bool {
        self.has_contents || self.is_stated
    }

    /// Ends the data of a file, before the frame of another entry, and returns its digest.
    pub(super) fn end_data(&mut self) -> [u8; 32] {
        let digest = self.contents();
        if self.has_contents {
            if !self.is_stated {
                self.frames.update(&digest);
            }
            self.contents.reset();
            self.has_contents = false;
        }
        self.known = None;
        self.is_stated = false;
        digest
    }

    fn contents(&self) -> [u8; 32] {
        self.known.unwrap_or_else(|| *self.contents.finalize().as_bytes())
    }

    /// Returns the digest since the start or the last call. The data of a file goes on being taken in as one.
    pub(super) fn take(&mut self) -> [u8; 32] {
        if self.has_contents && !self.is_stated {
            self.frames.update(&self.contents());
        }
        let digest = *self.frames.finalize().as_bytes();
        self.frames.reset();
        digest
    }

    /// Returns the digest that stands at the end, with the totals there.
    pub(super) fn end(&mut self, entries: u64, logical_bytes: u64) -> [u8; 32] {
        self.end_data();
        self.frames.update(&entries.to_le_bytes()).update(&logical_bytes.to_le_bytes());
        self.take()
    }
}
