//! A hostile peer on either end of a bulk stream: it writes the bytes itself.
#![allow(clippy::unwrap_used)]

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use flocker_certs::{Authority, ClusterId, Identity, NewKey};
use jiff::Timestamp;

use super::{
    BoxError, BulkError, BulkStream, ChunkSink, ChunkSource, Incoming, Outgoing, OutgoingLimits, StopReason,
    frame::{ACK_LEN, Ack, End, Header, Kind},
};
use crate::{ALPN, Access, CloseCode, Connection, Endpoint, ErrorKind, Limits, Protocol};

struct Pair {
    _endpoints: [Endpoint; 2],
    client: Connection,
    server: Connection,
}

async fn pair() -> Pair {
    let now = Timestamp::now();
    let authority = Authority::create(ClusterId(uuid::Uuid::now_v7()), now).unwrap();
    let endpoint = |name| {
        let key = NewKey::generate().unwrap();
        let issued = authority.issue(&key.csr_der().unwrap(), name, now, Duration::from_secs(600)).unwrap();
        let identity = Identity::new(key, issued.certificate, authority.certificate_der().to_vec()).unwrap();
        Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into(), Arc::new(identity), Limits::default()).unwrap()
    };
    let (client, server) = (endpoint("host-a"), endpoint("host-b"));
    let protocols = [Protocol { alpn: ALPN.to_vec(), access: Access::Members }];
    let accept = async { server.accept(&protocols).await.unwrap().establish().await.unwrap() };
    let connect = async { client.connect(server.local_addr().unwrap(), None, ALPN).await.unwrap() };
    let (connected, accepted) = tokio::join!(connect, accept);
    Pair { client: connected, server: accepted, _endpoints: [client, server] }
}

impl Pair {
    async fn links(&self) -> (BulkStream, BulkStream) {
        (self.client.open_bulk(1).await.unwrap(), self.server.accept_bulk(1).await.unwrap())
    }
}

struct Nothing;

#[async_trait]
impl ChunkSink for Nothing {
    async fn write(&mut self, _: Bytes) -> Result<(), BoxError> {
        Ok(())
    }
}

#[async_trait]
impl ChunkSource for Nothing {
    async fn next(&mut self) -> Result<Option<Bytes>, BoxError> {
        Ok(None)
    }
}

fn stored(seq: u64, raw: &[u8]) -> Vec<u8> {
    let length = u32::try_from(raw.len()).unwrap();
    [&Header { kind: Kind::Stored, seq, raw: length, payload: length }.encode(), raw].concat()
}

fn end(seq: u64, raw_bytes: u64, digest: [u8; 32]) -> Vec<u8> {
    let header = Header { kind: Kind::End, seq, raw: 0, payload: 40 };
    [&header.encode()[..], &End { raw_bytes, digest }.encode()].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_refuses_what_is_not_what_was_sent() {
    let digest = *blake3::hash(b"abc").as_bytes();
    let zstd = Header { kind: Kind::Zstd, seq: 0, raw: 100, payload: 5 };
    let cases = [
        ("garbage", vec![0xff; 64]),
        ("oversize", Header { kind: Kind::Stored, seq: 0, raw: 1 << 30, payload: 1 << 30 }.encode().to_vec()),
        ("a gap", [stored(0, b"abc"), stored(2, b"def")].concat()),
        ("a repetition", [stored(0, b"abc"), stored(0, b"abc")].concat()),
        ("a broken zstd frame", [&zstd.encode()[..], b"wrong"].concat()),
        ("a wrong digest", [stored(0, b"abc"), end(1, 3, [0; 32])].concat()),
        ("a wrong length", [stored(0, b"abc"), end(1, 4, digest)].concat()),
    ];
    let pair = pair().await;
    for (what, bytes) in cases {
        let (mut hostile, link) = pair.links().await;
        hostile.send.write_all(&bytes).await.unwrap();
        let error = Incoming::new().run(link, &mut Nothing, &|_| ()).await.unwrap_err();
        assert!(matches!(error, BulkError::Corrupt(_)), "{what}: {error:?}");
        let mut last = None;
        let mut ack = [0; ACK_LEN];
        while hostile.recv.read_exact(&mut ack).await.is_ok() {
            last = Some(Ack::decode(&ack).unwrap());
        }
        assert_eq!(last, Some(Ack::Stop(StopReason::Corrupt)), "{what}");
    }
    let (mut honest, link) = pair.links().await;
    honest.send.write_all(&[stored(0, b"abc"), end(1, 3, digest)].concat()).await.unwrap();
    assert_eq!(Incoming::new().run(link, &mut Nothing, &|_| ()).await.unwrap().raw_bytes, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_refuses_acknowledgements_of_what_it_did_not_send() {
    for bytes in [Ack::Consumed(9).encode(), [7; ACK_LEN]] {
        let pair = pair().await;
        let (link, mut hostile) = pair.links().await;
        hostile.send.write_all(&bytes).await.unwrap();
        let mut outgoing = Outgoing::new(OutgoingLimits::default());
        let error = outgoing.run(link, 0, &mut Nothing, &|_| ()).await.unwrap_err();
        assert!(matches!(error, BulkError::Corrupt(_)), "{error:?}");
        let closed = pair.server.closed().await.kind;
        assert!(matches!(closed, ErrorKind::ClosedByPeer { code: CloseCode::Protocol, .. }), "{closed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_refuses_to_resume_where_it_keeps_nothing() {
    let pair = pair().await;
    let (link, _held) = pair.links().await;
    let error = Outgoing::new(OutgoingLimits::default()).run(link, 3, &mut Nothing, &|_| ()).await.unwrap_err();
    assert!(matches!(error, BulkError::Corrupt(_)), "{error:?}");
}

/// The node runs both halves on tasks.
#[test]
fn runs_can_be_spawned() {
    fn sendable<T: Send>(_: &T) {}
    fn both(outgoing: &mut Outgoing, incoming: &mut Incoming, one: BulkStream, other: BulkStream) {
        sendable(&outgoing.run(one, 0, &mut Nothing, &|_| ()));
        sendable(&incoming.run(other, &mut Nothing, &|_| ()));
    }
    let _: fn(&mut Outgoing, &mut Incoming, BulkStream, BulkStream) = both;
}
