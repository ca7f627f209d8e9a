//! How one message lies on a stream: u32 little-endian length, then postcard.
//!
//! Pure: bytes in, messages out. [`crate::exchange`] moves the bytes.

use bytes::{Buf, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

use crate::error::ErrorKind;

/// The longest message. Lineages and listings of big clusters fit; data travels in bulk streams.
pub const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;

const LENGTH_LEN: usize = 4;

/// Writes a message with its length in front.
pub(crate) fn encode<M: Serialize + ?Sized>(message: &M) -> Result<Vec<u8>, ErrorKind> {
    let mut frame = postcard::to_extend(message, vec![0; LENGTH_LEN])
        .map_err(|error| ErrorKind::Protocol(format!("the message cannot be encoded: {error}")))?;
    let length = frame.len() - LENGTH_LEN;
    match u32::try_from(length) {
        Ok(prefix) if length <= MESSAGE_LIMIT => frame[..LENGTH_LEN].copy_from_slice(&prefix.to_le_bytes()),
        _ => return Err(ErrorKind::MessageTooLong { length, limit: MESSAGE_LIMIT }),
    }
    Ok(frame)
}

/// Takes one message's bytes off the front of what has arrived, or nothing while it is incomplete. The limit is checked as
/// soon as the length is there, so that a peer cannot make this side hold more.
pub(crate) fn split(arrived: &mut BytesMut) -> Result<Option<Bytes>, ErrorKind> {
    let Some(prefix) = arrived.first_chunk::<LENGTH_LEN>() else { return Ok(None) };
    let length = u32::from_le_bytes(*prefix) as usize;
    if length > MESSAGE_LIMIT {
        return Err(ErrorKind::Protocol(format!("a message of {length} bytes is over the limit of {MESSAGE_LIMIT}")));
    }
    if arrived.len() < LENGTH_LEN + length {
        return Ok(None);
    }
    arrived.advance(LENGTH_LEN);
    Ok(Some(arrived.split_to(length).freeze()))
}

/// Reads a message; bytes that are left over are an error.
pub(crate) fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, ErrorKind> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(ErrorKind::Protocol(format!("{} bytes follow a message", rest.len()))),
        Err(error) => Err(ErrorKind::Protocol(format!("a message cannot be decoded: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_is_its_length_and_its_postcard() {
        assert_eq!(encode(&("ab", 300_u32)).unwrap(), [5, 0, 0, 0, 2, b'a', b'b', 0xac, 0x02]);
    }

    #[test]
    fn an_oversize_length_is_refused_before_its_bytes_arrive() {
        let mut arrived = BytesMut::from(&u32::MAX.to_le_bytes()[..]);
        assert!(matches!(split(&mut arrived), Err(ErrorKind::Protocol(_))));
        assert!(matches!(encode(&vec![1_u8; MESSAGE_LIMIT]), Err(ErrorKind::MessageTooLong { .. })));
    }

    #[test]
    fn bytes_after_a_message_are_refused() {
        assert!(matches!(decode::<u8>(&[1, 2]), Err(ErrorKind::Protocol(_))));
    }

    proptest! {
        #[test]
        fn messages_survive_any_fragmentation(messages: Vec<(String, u64)>, size in 1_usize..40) {
            let wire: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
            let (mut arrived, mut read) = (BytesMut::new(), Vec::new());
            for piece in wire.chunks(size) {
                arrived.extend_from_slice(piece);
                while let Some(bytes) = split(&mut arrived).unwrap() {
                    read.push(decode::<(String, u64)>(&bytes).unwrap());
                }
            }
            prop_assert!(arrived.is_empty());
            prop_assert_eq!(read, messages);
        }

        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            let mut arrived = BytesMut::from(&bytes[..]);
            while let Ok(Some(bytes)) = split(&mut arrived) {
                let _ = decode::<(String, Vec<u64>)>(&bytes);
            }
        }
    }
}
