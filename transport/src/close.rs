//! Why a connection or a stream was ended: one enum, the same numbers for both.
//!
//! Owns the application's close codes. TLS alerts are the business of [`crate::tls`].

use quinn::VarInt;

/// Why one side ended a connection or a stream. The numbers are the wire format: append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum CloseCode {
    /// All is done, nothing went wrong.
    #[error("done")]
    Done,
    /// The peer sent what the protocol does not allow.
    #[error("the protocol was violated")]
    Protocol,
    /// The peer may not do what it asked for.
    #[error("refused")]
    Refused,
    /// The limit of connections, or of work of this kind, is reached. Come back later.
    #[error("too busy")]
    Busy,
    /// The node is stopping. Come back later.
    #[error("shutting down")]
    ShuttingDown,
    /// This protocol is for members, and the connection has no certificate.
    #[error("a member's certificate is needed")]
    AnonymousNotAllowed,
    /// The peer was silent for too long.
    #[error("timed out")]
    TimedOut,
    /// The user or the node gave up the work.
    #[error("cancelled")]
    Cancelled,
    /// The side that closed failed; its log says why.
    #[error("the other side failed")]
    Failed,
    /// The user lets the work rest, to go on with it later.
    #[error("paused")]
    Paused,
    /// A number that this version does not know.
    #[error("close code {0}")]
    Other(u64),
}

impl CloseCode {
    /// The number on the wire.
    pub fn number(self) -> u64 {
        match self {
            Self::Done => 0,
            Self::Protocol => 1,
            Self::Refused => 2,
            Self::Busy => 3,
            Self::ShuttingDown => 4,
            Self::AnonymousNotAllowed => 5,
            Self::TimedOut => 6,
            Self::Cancelled => 7,
            Self::Failed => 8,
            Self::Paused => 9,
            Self::Other(number) => number,
        }
    }

    /// The code with this number.
    pub fn from_number(number: u64) -> Self {
        match number {
            0 => Self::Done,
            1 => Self::Protocol,
            2 => Self::Refused,
            3 => Self::Busy,
            4 => Self::ShuttingDown,
            5 => Self::AnonymousNotAllowed,
            6 => Self::TimedOut,
            7 => Self::Cancelled,
            8 => Self::Failed,
            9 => Self::Paused,
            other => Self::Other(other),
        }
    }

    /// Whether the same request may succeed a little later.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Busy | Self::ShuttingDown | Self::TimedOut | Self::Paused)
    }

    pub(crate) fn varint(self) -> VarInt {
        VarInt::from_u64(self.number()).unwrap_or(VarInt::MAX)
    }
}

impl From<VarInt> for CloseCode {
    fn from(number: VarInt) -> Self {
        Self::from_number(number.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_on_the_wire_never_change() {
        let codes = [
            (CloseCode::Done, 0),
            (CloseCode::Protocol, 1),
            (CloseCode::Refused, 2),
            (CloseCode::Busy, 3),
            (CloseCode::ShuttingDown, 4),
            (CloseCode::AnonymousNotAllowed, 5),
            (CloseCode::TimedOut, 6),
            (CloseCode::Cancelled, 7),
            (CloseCode::Failed, 8),
            (CloseCode::Paused, 9),
            (CloseCode::Other(77), 77),
        ];
        for (code, number) in codes {
            assert_eq!(code.number(), number);
            assert_eq!(CloseCode::from_number(number), code);
        }
    }
}
