//! One bidirectional stream of typed messages.
//!
//! Owns waiting for and writing whole messages. The layout of a message is [`crate::codec`]'s; what the messages mean, the
//! caller's.

use std::time::Duration;

use bytes::BytesMut;
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::timeout;

use crate::{
    NO_PROGRESS,
    close::CloseCode,
    codec,
    error::{Error, ErrorKind, Result},
};

/// How much is taken from the stream at once.
const READ_CHUNK: usize = 64 * 1024;

/// A stream of typed messages in both directions. Dropping it ends it; the peer sees [`ErrorKind::StreamEnded`].
#[derive(Debug)]
pub struct Exchange {
    connection: quinn::Connection,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    arrived: BytesMut,
    /// A `send` was dropped in the middle: the stream cannot be used on.
    half_sent: bool,
}

impl Exchange {
    pub(crate) fn new(connection: quinn::Connection, send: quinn::SendStream, recv: quinn::RecvStream) -> Self {
        Self { connection, send, recv, arrived: BytesMut::new(), half_sent: false }
    }

    /// Sends a message, waiting at most [`NO_PROGRESS`] for the peer to take each part. See [`Self::send_within`].
    pub async fn send<M: Serialize + ?Sized + Sync>(&mut self, message: &M) -> Result<()> {
        self.send_within(message, NO_PROGRESS).await
    }

    /// Sends a message; `no_progress` bounds the wait for the peer to take each part of it.
    ///
    /// Not cancel-safe: when the future is dropped in the middle, the next `send` resets the stream and fails.
    pub async fn send_within<M: Serialize + ?Sized + Sync>(
        &mut self,
        message: &M,
        no_progress: Duration,
    ) -> Result<()> {
        if self.half_sent {
            self.reset(CloseCode::Cancelled);
            return Err(self.error("send to", ErrorKind::ClosedHere));
        }
        let frame = codec::encode(message).map_err(|kind| self.error("send to", kind))?;
        self.half_sent = true;
        let mut rest = frame.as_slice();
        while !rest.is_empty() {
            let written = match timeout(no_progress, self.send.write(rest)).await {
                Ok(Ok(written)) => written,
                Ok(Err(error)) => return Err(self.error("send to", ErrorKind::from_write(error))),
                Err(_) => return Err(self.timed_out("send to", no_progress)),
            };
            rest = &rest[written..];
        }
        self.half_sent = false;
        Ok(())
    }

    /// Receives a message, waiting at most [`NO_PROGRESS`] for each part. See [`Self::recv_within`].
    pub async fn recv<M: DeserializeOwned>(&mut self) -> Result<M> {
        self.recv_within(NO_PROGRESS).await
    }

    /// Receives a message; `no_progress` bounds the wait for each part of it.
    ///
    /// Cancel-safe: what has arrived is kept. A time-out resets the stream; a malformed or oversize message closes the
    /// connection with [`CloseCode::Protocol`].
    pub async fn recv_within<M: DeserializeOwned>(&mut self, no_progress: Duration) -> Result<M> {
        loop {
            match codec::split(&mut self.arrived) {
                Ok(Some(bytes)) => return codec::decode(&bytes).map_err(|kind| self.violated(kind)),
                Ok(None) => {}
                Err(kind) => return Err(self.violated(kind)),
            }
            match timeout(no_progress, self.recv.read_chunk(READ_CHUNK, true)).await {
                Ok(Ok(Some(chunk))) => self.arrived.extend_from_slice(&chunk.bytes),
                Ok(Ok(None)) if self.arrived.is_empty() => {
                    return Err(self.error("receive from", ErrorKind::StreamEnded));
                }
                Ok(Ok(None)) => {
                    return Err(self.violated(ErrorKind::Protocol("the stream ended within a message".to_owned())));
                }
                Ok(Err(error)) => return Err(self.error("receive from", ErrorKind::from_read(error))),
                Err(_) => return Err(self.timed_out("receive from", no_progress)),
            }
        }
    }

    /// Ends this side's half: the peer reads what was sent, then [`ErrorKind::StreamEnded`].
    pub fn finish(&mut self) {
        let _ = self.send.finish();
    }

    /// Ends this side's half and waits, up to `no_progress`, until the peer has everything that was sent. To be called
    /// before the connection is closed, which would drop what is still on its way.
    pub async fn flush(&mut self, no_progress: Duration) -> Result<()> {
        self.finish();
        match timeout(no_progress, self.send.stopped()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(quinn::StoppedError::ConnectionLost(error))) => {
                Err(self.error("send to", ErrorKind::from_connection(error)))
            }
            Ok(Err(_)) => Err(self.error("send to", ErrorKind::ClosedHere)),
            Err(_) => Err(self.timed_out("send to", no_progress)),
        }
    }

    /// Gives the stream up in both directions; the peer sees [`ErrorKind::StreamReset`] with this code.
    pub fn reset(&mut self, code: CloseCode) {
        let _ = self.send.reset(code.varint());
        let _ = self.recv.stop(code.varint());
    }

    fn violated(&mut self, kind: ErrorKind) -> Error {
        let error = self.error("receive from", kind);
        tracing::warn!(peer = %error.object, reason = %error.kind, "closing a connection for a protocol violation");
        self.connection.close(CloseCode::Protocol.varint(), b"malformed message");
        error
    }

    fn timed_out(&mut self, operation: &'static str, after: Duration) -> Error {
        self.reset(CloseCode::TimedOut);
        self.error(operation, ErrorKind::TimedOut(after))
    }

    fn error(&self, operation: &'static str, kind: ErrorKind) -> Error {
        Error::new(operation, self.connection.remote_address(), kind)
    }
}
