//! Whether and how hard frames are compressed.
//!
//! [`Pacer`] decides, as a pure function of what was measured: where the line is the bottleneck the level rises, where the
//! processors or the receiver are it falls, and data that does not shrink is stored, with a probe now and then.
//! [`Compressors`] and [`decompress`] do the work, on threads of their callers.

use std::{
    cell::RefCell,
    io::Cursor,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use zstd::bulk::{Compressor, Decompressor};

use super::{BoxError, buffers::Buffer, pieces::Pieces, stage::Stage};

/// The levels there are to choose from. Those below zero look at fewer places of the data: of programs -10 saves 38 % of the
/// bytes where 1 saves 59, in half the time (docs/BENCHMARKS.md). Above 6 zstd needs more than a few MiB a context, and little is
/// gained on 256 KiB frames.
const LEVELS: [i32; 10] = [-10, -5, -3, -1, 1, 2, 3, 4, 5, 6];
/// Where in them it starts: at 2.
const START: usize = 5;
/// For data of which it is not known whether it shrinks at all.
const PROBE_LEVEL: i32 = 1;
/// The level is looked at again after so many frames (4 MiB).
const EPOCH_FRAMES: u32 = 16;
/// So many frames in a row that do not shrink turn compression off.
const MISSES: u32 = 4;
/// After how many stored frames a probe is made: the pause doubles from the first to the second.
const PAUSE_FRAMES: (u32, u32) = (32, 512);

/// What the next frame should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    Store,
    Compress { level: i32 },
}

/// Chooses the level of each frame.
#[derive(Debug)]
pub(super) struct Pacer {
    is_off: bool,
    /// In [`LEVELS`].
    level: usize,
    misses: u32,
    store_left: u32,
    pause: u32,
    epoch_frames: u32,
    line_wait: Duration,
    receiver_wait: Duration,
    encode_wait: Duration,
}

impl Pacer {
    pub(super) fn new() -> Self {
        Self {
            is_off: false,
            level: START,
            misses: 0,
            store_left: 0,
            pause: PAUSE_FRAMES.0,
            epoch_frames: 0,
            line_wait: Duration::ZERO,
            receiver_wait: Duration::ZERO,
            encode_wait: Duration::ZERO,
        }
    }

    /// For data that is known not to shrink.
    pub(super) fn off() -> Self {
        Self { is_off: true, ..Self::new() }
    }

    pub(super) fn choose(&mut self) -> Choice {
        if self.is_off {
            return Choice::Store;
        }
        if self.store_left > 0 {
            self.store_left -= 1;
            return Choice::Store;
        }
        Choice::Compress { level: if self.misses > 0 { PROBE_LEVEL } else { LEVELS[self.level] } }
    }

    /// A frame that was to be compressed did, or did not, shrink.
    pub(super) fn observe(&mut self, shrank: bool) {
        if shrank {
            self.misses = 0;
            self.pause = PAUSE_FRAMES.0;
            return;
        }
        self.misses += 1;
        if self.misses >= MISSES && self.store_left == 0 {
            // One probe is enough from now on.
            self.misses = MISSES;
            self.store_left = self.pause;
            self.pause = (self.pause * 2).min(PAUSE_FRAMES.1);
        }
    }

    /// The source had to wait for room in the window, for one of both stages.
    pub(super) fn waited_for(&mut self, stage: Stage, wait: Duration) {
        match stage {
            Stage::Receiver => self.receiver_wait += wait,
            _ => self.line_wait += wait,
        }
    }

    /// The source had to wait until earlier frames were compressed: the processors are slow.
    pub(super) fn waited_for_encoder(&mut self, wait: Duration) {
        self.encode_wait += wait;
    }

    /// A frame was handed to the network.
    pub(super) fn frame_written(&mut self) {
        self.epoch_frames += 1;
        if self.epoch_frames < EPOCH_FRAMES {
            return;
        }
        // A receiver that is waited for gets nothing from better compression, and may be slow because this side has its processors.
        let other_wait = self.encode_wait + self.receiver_wait;
        if other_wait > self.line_wait {
            self.level = self.level.saturating_sub(1);
        } else if self.line_wait > 4 * other_wait {
            self.level = (self.level + 1).min(LEVELS.len() - 1);
        }
        self.epoch_frames = 0;
        (self.line_wait, self.receiver_wait, self.encode_wait) = Default::default();
    }
}

/// zstd contexts for reuse, each with a buffer for what comes out; as many as have worked at once.
#[derive(Default)]
pub(super) struct Compressors(Mutex<Vec<(Compressor<'static>, Vec<u8>)>>);

impl Compressors {
    /// The compressed bytes, a zstd frame of each piece, or nothing where they save less than a sixteenth. Blocks.
    pub(super) fn compress(&self, raw: &Pieces, level: i32) -> Option<Bytes> {
        let spare = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let (mut compressor, mut compressed) = match spare {
            Some(spare) => spare,
            None => (Compressor::new(level).ok()?, Vec::new()),
        };
        compressor.set_compression_level(level).ok()?;
        compressed.clear();
        compressed.reserve(raw.iter().map(|piece| zstd::zstd_safe::compress_bound(piece.len())).sum());
        for piece in raw.iter() {
            let mut behind = Cursor::new(&mut compressed);
            behind.set_position(behind.get_ref().len() as u64);
            compressor.compress_to_buffer(piece, &mut behind).ok()?;
        }
        let small = (compressed.len() < raw.len() - raw.len() / 16).then(|| Bytes::copy_from_slice(&compressed));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((compressor, compressed));
        small
    }
}

impl std::fmt::Debug for Compressors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressors").finish_non_exhaustive()
    }
}

/// Undoes [`Compressors::compress`]; fails unless exactly `raw_len` bytes come out. Blocks.
pub(super) fn decompress(payload: &[u8], raw_len: usize) -> Result<Bytes, BoxError> {
    thread_local! {
        // Making one costs more than unpacking a small frame.
        static CONTEXT: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    }
    let mut raw = Buffer::with_room(raw_len);
    let length = CONTEXT.with_borrow_mut(|context| match context {
        Some(context) => context.decompress_to_buffer(payload, raw.bytes()),
        None => context.insert(Decompressor::new()?).decompress_to_buffer(payload, raw.bytes()),
    })?;
    if length != raw_len {
        return Err(format!("a frame of {raw_len} bytes unpacks to {length}").into());
    }
    Ok(raw.freeze())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TICK: Duration = Duration::from_millis(1);

    #[test]
    fn a_slow_line_raises_the_level_and_slow_processors_or_a_slow_receiver_lower_it() {
        let lowers: [fn(&mut Pacer); 2] =
            [|pacer| pacer.waited_for_encoder(TICK), |pacer| pacer.waited_for(Stage::Receiver, TICK)];
        for lower in lowers {
            let mut pacer = Pacer::new();
            for _ in 0..20 * EPOCH_FRAMES {
                pacer.waited_for(Stage::Line, TICK);
                pacer.frame_written();
            }
            assert_eq!(pacer.choose(), Choice::Compress { level: 6 });
            for _ in 0..20 * EPOCH_FRAMES {
                lower(&mut pacer);
                pacer.frame_written();
            }
            assert_eq!(pacer.choose(), Choice::Compress { level: -10 });
        }
    }

    #[test]
    fn data_that_does_not_shrink_is_stored_and_probed_now_and_then() {
        let mut pacer = Pacer::new();
        let mut compressed = 0;
        for _ in 0..2_000 {
            if pacer.choose() != Choice::Store {
                compressed += 1;
                pacer.observe(false);
            }
        }
        assert!((4..20).contains(&compressed), "{compressed}");
        while pacer.choose() == Choice::Store {}
        pacer.observe(true);
        assert_ne!(pacer.choose(), Choice::Store);
    }

    #[test]
    fn every_level_packs_and_what_is_unpacked_into_a_used_buffer_is_as_long_as_it_was() {
        let compressors = Compressors::default();
        for (number, level) in LEVELS.into_iter().enumerate() {
            let raw: Bytes = (0..100_000 / (number + 1)).map(|at| (at / 7 % 251) as u8).collect();
            for at in [0, 1, 30_000 / (number + 1), raw.len()] {
                let packed = compressors.compress(&Pieces::of(raw.slice(..at), raw.slice(at..)), level).unwrap();
                assert_eq!(decompress(&packed, raw.len()).unwrap(), raw, "level {level}, cut at {at}");
                assert!(decompress(&packed, raw.len() - 1).is_err());
            }
        }
    }

    #[test]
    fn a_bomb_does_not_unpack_beyond_what_it_says() {
        let bomb = zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap();
        assert!(decompress(&bomb, 1000).is_err());
        assert!(decompress(&bomb, (1 << 20) + 1).is_err());
        assert_eq!(decompress(&bomb, 1 << 20).unwrap().len(), 1 << 20);
        assert!(decompress(b"garbage", 10).is_err());
    }
}
