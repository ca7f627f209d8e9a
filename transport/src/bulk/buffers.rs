//! Buffers for what has arrived and what was unpacked, kept for reuse: new ones would be given back to the kernel and cleared by
//! it again and again.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

/// How many buffers are kept, of all receives together, and how large: enough for two receives.
const SPARE_BUFFERS: usize = 16;
const SPARE_LENGTH: usize = 768 * 1024;

/// What is shorter has a buffer of its own length.
const SHORT: usize = 16 * 1024;

static SPARE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A buffer that is kept when it is dropped.
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    /// Takes an empty one with room for `length` bytes at least.
    pub(super) fn with_room(length: usize) -> Self {
        let spare = (length >= SHORT).then(|| SPARE.lock().unwrap_or_else(PoisonError::into_inner).pop()).flatten();
        let mut buffer = spare.unwrap_or_default();
        buffer.clear();
        buffer.reserve_exact(length);
        Self(buffer)
    }

    /// Returns its bytes, to add to.
    pub(super) fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }

    /// Makes it shared bytes; it is kept when the last of them are dropped.
    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !(SHORT..=SPARE_LENGTH).contains(&self.0.capacity()) {
            return;
        }
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_BUFFERS {
            spare.push(std::mem::take(&mut self.0));
        }
    }
}
