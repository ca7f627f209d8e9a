//! The layout of frames and acknowledgements. All numbers are little-endian.
//!
//! A frame, sender to receiver: kind u8 · sequence u64 · raw length u32 · payload length u32 · payload. An acknowledgement,
//! receiver to sender: kind u8 · value u64. Pure: bytes in, values out; whatever is not exactly this is refused.

use super::{BoxError, StopReason};

/// The sender cuts the delta into frames of at most this many raw bytes: a chunk of the portable format, which ends with a record,
/// stays in one piece, and two that hold a piece of a large file each go together.
pub(super) const FRAME_RAW: usize = 656 * 1024;
/// A receiver takes frames up to this, for senders that choose otherwise.
pub(super) const FRAME_RAW_LIMIT: usize = 1024 * 1024;
pub(super) const HEADER_LEN: usize = 17;
pub(super) const END_LEN: usize = 40;
pub(super) const ACK_LEN: usize = 9;

const STORED: u8 = 0;
const ZSTD: u8 = 1;
const END: u8 = 2;
const ALIVE: u8 = 3;
const CONSUMED: u8 = 0;
const STOP: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The payload is the raw bytes.
    Stored,
    /// The payload is zstd frames, one or more, of the raw bytes.
    Zstd,
    /// The payload is an [`End`].
    End,
    /// No payload, and in place of a sequence how long the sender expects the delta to be, 0 where it does not know: the sender
    /// lives.
    Alive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) seq: u64,
    pub(super) raw: u32,
    pub(super) payload: u32,
}

impl Header {
    pub(super) fn alive(expected_bytes: u64) -> Self {
        Self { kind: Kind::Alive, seq: expected_bytes, raw: 0, payload: 0 }
    }

    pub(super) fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = match self.kind {
            Kind::Stored => STORED,
            Kind::Zstd => ZSTD,
            Kind::End => END,
            Kind::Alive => ALIVE,
        };
        bytes[1..9].copy_from_slice(&self.seq.to_le_bytes());
        bytes[9..13].copy_from_slice(&self.raw.to_le_bytes());
        bytes[13..].copy_from_slice(&self.payload.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, BoxError> {
        let kind = match bytes[0] {
            STORED => Kind::Stored,
            ZSTD => Kind::Zstd,
            END => Kind::End,
            ALIVE => Kind::Alive,
            other => return Err(format!("a frame of unknown kind {other}").into()),
        };
        let seq = u64::from_le_bytes(bytes[1..9].try_into()?);
        let raw = u32::from_le_bytes(bytes[9..13].try_into()?);
        let payload = u32::from_le_bytes(bytes[13..].try_into()?);
        let (raw_len, payload_len) = (raw as usize, payload as usize);
        let fits = match kind {
            Kind::Stored => (1..=FRAME_RAW_LIMIT).contains(&raw_len) && payload_len == raw_len,
            Kind::Zstd => (1..=FRAME_RAW_LIMIT).contains(&raw_len) && (1..raw_len).contains(&payload_len),
            Kind::End => raw_len == 0 && payload_len == END_LEN,
            Kind::Alive => (raw, payload) == (0, 0),
        };
        if !fits {
            return Err(format!("a {kind:?} frame with raw length {raw} and payload length {payload}").into());
        }
        Ok(Self { kind, seq, raw, payload })
    }
}

/// What ends a delta: its length and its BLAKE3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub(super) raw_bytes: u64,
    pub(super) digest: [u8; 32],
}

impl End {
    pub(super) fn encode(self) -> [u8; END_LEN] {
        let mut bytes = [0; END_LEN];
        bytes[..8].copy_from_slice(&self.raw_bytes.to_le_bytes());
        bytes[8..].copy_from_slice(&self.digest);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BoxError> {
        let bytes: &[u8; END_LEN] = bytes.try_into()?;
        Ok(Self { raw_bytes: u64::from_le_bytes(bytes[..8].try_into()?), digest: bytes[8..].try_into()? })
    }
}

/// What the receiver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ack {
    /// All frames below this sequence are consumed.
    Consumed(u64),
    /// It gives up.
    Stop(StopReason),
}

impl Ack {
    pub(super) fn encode(self) -> [u8; ACK_LEN] {
        let (kind, value) = match self {
            Self::Consumed(next) => (CONSUMED, next),
            Self::Stop(reason) => (STOP, reason.number()),
        };
        let mut bytes = [kind; ACK_LEN];
        bytes[1..].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BoxError> {
        let bytes: &[u8; ACK_LEN] = bytes.try_into()?;
        let value = u64::from_le_bytes(bytes[1..].try_into()?);
        match bytes[0] {
            CONSUMED => Ok(Self::Consumed(value)),
            STOP => Ok(Self::Stop(StopReason::from_number(value))),
            other => Err(format!("an acknowledgement of unknown kind {other}").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_bytes_on_the_wire_never_change() {
        let stored = Header { kind: Kind::Stored, seq: 0x0102, raw: 5, payload: 5 };
        assert_eq!(stored.encode(), [0, 2, 1, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 5, 0, 0, 0]);
        let zstd = Header { kind: Kind::Zstd, seq: 1, raw: 0x40000, payload: 0x1234 };
        assert_eq!(zstd.encode(), [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0x34, 0x12, 0, 0]);
        let end = Header { kind: Kind::End, seq: u64::MAX, raw: 0, payload: 40 };
        assert_eq!(end.encode(), [2, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 40, 0, 0, 0]);
        assert_eq!(Header::alive(0).encode(), [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Header::alive(258).encode(), [3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for header in [stored, zstd, end, Header::alive(0), Header::alive(u64::MAX)] {
            assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }
        let end = End { raw_bytes: 258, digest: [9; 32] };
        assert_eq!(end.encode()[..9], [2, 1, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(End::decode(&end.encode()).unwrap(), end);
        assert_eq!(Ack::Consumed(258).encode(), [0, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Ack::Stop(StopReason::Sink).encode(), [1, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Ack::Stop(StopReason::Corrupt).encode(), [1, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Ack::decode(&[1, 2, 0, 0, 0, 0, 0, 0, 0]).unwrap(), Ack::Stop(StopReason::Corrupt));
    }

    #[test]
    fn absurd_frames_are_refused() {
        let absurd = [
            Header { kind: Kind::Stored, seq: 0, raw: 5, payload: 4 },
            Header { kind: Kind::Stored, seq: 0, raw: 0, payload: 0 },
            Header { kind: Kind::Stored, seq: 0, raw: 2 << 20, payload: 2 << 20 },
            Header { kind: Kind::Zstd, seq: 0, raw: u32::MAX, payload: 9 },
            Header { kind: Kind::Zstd, seq: 0, raw: 9, payload: 9 },
            Header { kind: Kind::End, seq: 0, raw: 0, payload: 41 },
            Header { kind: Kind::Alive, seq: 0, raw: 0, payload: 1 },
        ];
        for header in absurd {
            assert!(Header::decode(&header.encode()).is_err(), "{header:?}");
        }
        assert!(Header::decode(&[4; HEADER_LEN]).is_err());
        assert!(Ack::decode(&[2; ACK_LEN]).is_err());
    }
}
