//! The frames of a delta between its source and its receiver, and the account of it.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{
    Progress,
    compression::Pacer,
    frame::{END_LEN, End, FRAME_RAW, HEADER_LEN, Header, Kind},
    pieces::Pieces,
    stage::Waits,
};

/// Frames that are not acknowledged, oldest first, and the account of the delta.
#[derive(Debug)]
pub(super) struct Queue {
    /// The sequence of the first.
    pub(super) first: u64,
    /// The sequence of the first that no lane has taken.
    pub(super) next_unwritten: u64,
    pub(super) frames: VecDeque<Slot>,
    /// What they hold in memory.
    pub(super) held: usize,
    /// The End frame is among them, or acknowledged.
    pub(super) ended: bool,
    pub(super) end: End,
    pub(super) acknowledged: Progress,
    pub(super) wire_bytes: u64,
    pub(super) pacer: Pacer,
    pub(super) waits: Waits,
}

#[derive(Debug)]
pub(super) enum Slot {
    Encoding { raw: usize },
    Ready(Frame),
}

#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) header: Header,
    pub(super) payload: Pieces,
}

impl Queue {
    pub(super) fn new(pacer: Pacer) -> Self {
        Self {
            first: 0,
            next_unwritten: 0,
            frames: VecDeque::new(),
            held: 0,
            ended: false,
            end: End { raw_bytes: 0, digest: [0; 32] },
            acknowledged: Progress::default(),
            wire_bytes: 0,
            pacer,
            waits: Waits::default(),
        }
    }

    pub(super) fn next(&self) -> u64 {
        self.first + self.frames.len() as u64
    }

    pub(super) fn slot(&mut self, seq: u64) -> Option<&mut Slot> {
        let index = usize::try_from(seq.checked_sub(self.first)?).ok()?;
        self.frames.get_mut(index)
    }

    /// Takes the next frame that is to be written, if it is ready.
    pub(super) fn take(&mut self) -> Option<Frame> {
        let frame = match self.slot(self.next_unwritten)? {
            Slot::Ready(frame) => frame.clone(),
            Slot::Encoding { .. } => return None,
        };
        self.next_unwritten += 1;
        Some(frame)
    }

    pub(super) fn check_resume(&self, seq: u64) -> Result<(), String> {
        if (self.first..=self.next()).contains(&seq) {
            return Ok(());
        }
        Err(format!("the receiver asks for frame {seq}, and {} to {} are kept", self.first, self.next()))
    }

    pub(super) fn push_end(&mut self) {
        let header = Header { kind: Kind::End, seq: self.next(), raw: 0, payload: END_LEN as u32 };
        let payload = Pieces::from(Bytes::copy_from_slice(&self.end.encode()));
        self.held += payload.len();
        self.frames.push_back(Slot::Ready(Frame { header, payload }));
        self.ended = true;
    }

    /// Puts the finished frame into its slot.
    pub(super) fn fill(&mut self, frame: Frame) {
        let payload = frame.payload.len();
        let Some(slot) = self.slot(frame.header.seq) else { return };
        let Slot::Encoding { raw } = *slot else { return };
        *slot = Slot::Ready(frame);
        self.held = self.held - raw + payload;
    }

    /// Lets go of the frames below `next`. Fails when the receiver cannot have had them.
    pub(super) fn acknowledge(&mut self, next: u64) -> Result<(), String> {
        if next > self.next() {
            return Err(format!("the receiver acknowledges frame {next}, and {} is next", self.next()));
        }
        while self.first < next {
            let Some(Slot::Ready(frame)) = self.frames.pop_front() else {
                return Err("the receiver acknowledges a frame that was not sent".to_owned());
            };
            self.first += 1;
            self.held -= frame.payload.len();
            self.acknowledged.raw_bytes += u64::from(frame.header.raw);
            self.acknowledged.wire_bytes += (HEADER_LEN + frame.payload.len()) as u64;
        }
        Ok(())
    }

    pub(super) fn has_room(&self, window: usize) -> bool {
        self.frames.is_empty() || self.held + FRAME_RAW <= window
    }

    pub(super) fn is_done(&self) -> bool {
        self.ended && self.frames.is_empty()
    }
}
