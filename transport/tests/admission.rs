//! Who is let in, and what both sides are told when somebody is not.
#![allow(clippy::unwrap_used)]

mod common;

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use async_trait::async_trait;
use common::*;
use flocker_certs::{Fingerprint, NodeId};
use flocker_transport::{
    ALPN, Access, CloseCode, Connection, ENROL_ALPN, Endpoint, Error, ErrorKind, Handler, Limits, PeerFault, Protocol,
    Router, connect_newcomer,
};
use jiff::Timestamp;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

fn rejected(result: Result<Connection, Error>) -> PeerFault {
    match result.unwrap_err().kind {
        ErrorKind::PeerRejected { fault, .. } => fault,
        other => panic!("expected a rejected peer: {other:?}"),
    }
}

fn rejected_by_peer(result: Result<Connection, Error>) -> PeerFault {
    match result.unwrap_err().kind {
        ErrorKind::RejectedByPeer(fault) => fault,
        other => panic!("expected a rejection by the peer: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_connect_and_know_each_other() {
    let authority = authority();
    let (a, b) = (member(&authority, "host-a"), member(&authority, "host-b"));
    let (client, server) = attempt(&endpoint(&a), &endpoint(&b)).await;
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(client.peer().unwrap().node_id, b.node_id);
    assert_eq!(server.peer().unwrap().node_id, a.node_id);
    assert_eq!(server.peer().unwrap().name, "host-a");
    assert_eq!(client.alpn(), ALPN);
    client.close(CloseCode::Done, "bye");
    let ErrorKind::ClosedByPeer { code, reason } = server.closed().await.kind else { panic!("not closed by the peer") };
    assert_eq!((code, reason.as_str()), (CloseCode::Done, "bye"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_a_foreign_authority_is_refused_on_both_sides() {
    let ours = authority();
    let foreign = flocker_certs::Authority::create(ours.cluster(), Timestamp::now()).unwrap();
    let (client, server) = attempt(&endpoint(&member(&ours, "host-a")), &endpoint(&member(&foreign, "host-b"))).await;
    assert_eq!(rejected(client), PeerFault::ForeignAuthority);
    assert_eq!(rejected_by_peer(server), PeerFault::ForeignAuthority);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_another_cluster_is_refused_on_both_sides() {
    let (client, server) =
        attempt(&endpoint(&member(&authority(), "host-a")), &endpoint(&member(&authority(), "host-b"))).await;
    assert_eq!(rejected(client), PeerFault::OtherCluster);
    assert_eq!(rejected_by_peer(server), PeerFault::OtherCluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_the_expected_node_is_refused_on_both_sides() {
    let authority = authority();
    let (client, server) = (endpoint(&member(&authority, "host-a")), endpoint(&member(&authority, "host-b")));
    let accept = async { server.accept(&members_only()).await.unwrap().establish().await };
    let expected = Some(NodeId([7; 32]));
    let (client, server) = tokio::join!(client.connect(addr(&server), expected, ALPN), accept);
    let claimed = match client.unwrap_err().kind {
        ErrorKind::PeerRejected { fault: PeerFault::WrongNode, claimed } => claimed.unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(claimed.name, "host-b");
    assert_eq!(rejected_by_peer(server), PeerFault::WrongNode);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_server_is_refused_on_both_sides() {
    let authority = authority();
    let expired = member_at(&authority, "host-b", Timestamp::now() - 3 * DAY);
    let (client, server) = attempt(&endpoint(&member(&authority, "host-a")), &endpoint(&expired)).await;
    assert_eq!(rejected(client), PeerFault::Expired);
    assert_eq!(rejected_by_peer(server), PeerFault::Expired);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_client_is_refused_on_both_sides() {
    let authority = authority();
    let expired = member_at(&authority, "host-a", Timestamp::now() - 3 * DAY);
    let (client, server) = attempt(&endpoint(&expired), &endpoint(&member(&authority, "host-b"))).await;
    assert_eq!(rejected_by_peer(client), PeerFault::Expired);
    assert_eq!(rejected(server), PeerFault::Expired);
}

/// The client trusts the server, and the server does not trust the client: a pinned client with a certificate does not
/// exist, so the server's identity is swapped for one that the client accepts while the check objects.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_the_node_objects_to_is_refused_on_both_sides() {
    for fault in [PeerFault::WrongNode, PeerFault::Revoked, PeerFault::OtherCluster, PeerFault::ForeignAuthority] {
        let authority = authority();
        let (client, server) = (endpoint(&member(&authority, "host-a")), endpoint(&member(&authority, "host-b")));
        server.set_peer_check(Arc::new(move |peer| if peer.name == "host-a" { Err(fault) } else { Ok(()) }));
        let (client, server) = attempt(&client, &server).await;
        assert_eq!(rejected_by_peer(client), fault);
        assert_eq!(rejected(server), fault);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_the_node_objects_to_is_refused_on_both_sides() {
    for fault in [PeerFault::WrongNode, PeerFault::Revoked] {
        let authority = authority();
        let (client, server) = (endpoint(&member(&authority, "host-a")), endpoint(&member(&authority, "host-b")));
        client.set_peer_check(Arc::new(move |_| Err(fault)));
        let (client, server) = attempt(&client, &server).await;
        assert_eq!(rejected(client), fault);
        assert_eq!(rejected_by_peer(server), fault);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_used_for_the_next_connection() {
    let authority = authority();
    let old = member_at(&authority, "host-a", Timestamp::now() - 3 * DAY);
    let (client, server) = (endpoint(&old), endpoint(&member(&authority, "host-b")));
    assert_eq!(rejected_by_peer(attempt(&client, &server).await.0), PeerFault::Expired);
    let issued = authority.issue(&old.csr_der().unwrap(), "host-a", Timestamp::now(), DAY).unwrap();
    client.set_identity(Arc::new(old.renewed(issued.certificate).unwrap())).unwrap();
    let (connected, accepted) = attempt(&client, &server).await;
    assert_eq!(accepted.unwrap().peer().unwrap().node_id, old.node_id);
    connected.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protocol_that_is_not_served_is_refused_on_both_sides() {
    let authority = authority();
    let (client, server) = (endpoint(&member(&authority, "host-a")), endpoint(&member(&authority, "host-b")));
    let accept = async { server.accept(&members_only()).await.unwrap().establish().await };
    let (client, server) = tokio::join!(client.connect(addr(&server), None, b"flocker/9"), accept);
    assert!(matches!(client.unwrap_err().kind, ErrorKind::NoCommonProtocol));
    assert!(matches!(server.unwrap_err().kind, ErrorKind::NoCommonProtocol));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_pins_the_authority() {
    let authority = authority();
    let server = endpoint(&member(&authority, "host-b"));
    let protocols = [Protocol { alpn: ENROL_ALPN.to_vec(), access: Access::Anyone }];
    let accept = async { server.accept(&protocols).await.unwrap().establish().await };
    let limits = Limits::default();
    let knock = connect_newcomer(addr(&server), authority.fingerprint(), ENROL_ALPN, &limits);
    let (client, accepted) = tokio::join!(knock, accept);
    let (client, accepted) = (client.unwrap(), accepted.unwrap());
    assert_eq!(client.peer().unwrap().name, "host-b");
    assert!(accepted.peer().is_none());
    let mut exchange = client.open_exchange().await.unwrap();
    exchange.send("hello").await.unwrap();
    let mut served = accepted.accept_exchange().await.unwrap();
    assert_eq!(served.recv::<String>().await.unwrap(), "hello");

    let accept = async { server.accept(&protocols).await.unwrap().establish().await };
    let wrong = connect_newcomer(addr(&server), Fingerprint([1; 32]), ENROL_ALPN, &limits);
    let (client, server) = tokio::join!(wrong, accept);
    assert_eq!(rejected(client), PeerFault::ForeignAuthority);
    assert_eq!(rejected_by_peer(server), PeerFault::ForeignAuthority);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anonymous_client_is_sent_away_from_a_protocol_of_members() {
    let authority = authority();
    let server = endpoint(&member(&authority, "host-b"));
    let accept = async { server.accept(&members_only()).await.unwrap().establish().await };
    let limits = Limits::default();
    let knock = connect_newcomer(addr(&server), authority.fingerprint(), ALPN, &limits);
    let (client, server) = tokio::join!(knock, accept);
    assert!(matches!(client.unwrap_err().kind, ErrorKind::ClosedByPeer { code: CloseCode::AnonymousNotAllowed, .. }));
    assert!(matches!(server.unwrap_err().kind, ErrorKind::Protocol(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_in_use_is_named() {
    let identity = member(&authority(), "host-a");
    let first = endpoint(&identity);
    let error = Endpoint::bind(addr(&first), identity, Limits::default()).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::AddressInUse));
    assert_eq!(error.to_string(), format!("cannot listen on {}", addr(&first)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_where_nobody_answers_is_unreachable() {
    let silent = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let limits = Limits { connect: Duration::from_millis(200), ..Limits::default() };
    let client = endpoint_with(&member(&authority(), "host-a"), limits);
    let error = client.connect(silent.local_addr().unwrap(), None, ALPN).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Unreachable) && error.kind.is_transient());
}

/// Answers each message with itself until the connection ends.
struct Echo;

#[async_trait]
impl Handler for Echo {
    async fn handle(&self, connection: Connection, cancel: CancellationToken) {
        let serve = async {
            while let Ok(mut exchange) = connection.accept_exchange().await {
                while let Ok(text) = exchange.recv::<String>().await {
                    if exchange.send(&text).await.is_err() {
                        break;
                    }
                }
            }
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => connection.close(CloseCode::ShuttingDown, ""),
            () = serve => {}
        }
    }
}

struct Served {
    client: Endpoint,
    server: Endpoint,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

fn serve(max_connections: usize) -> Served {
    let authority = authority();
    let (client, server) = (endpoint(&member(&authority, "host-a")), endpoint(&member(&authority, "host-b")));
    let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
    let router = Router::new().members(ALPN, Arc::new(Echo)).max_connections(max_connections);
    tasks.spawn(router.serve(server.clone(), cancel.clone()));
    tasks.close();
    Served { client, server, cancel, tasks }
}

async fn echo(connection: &Connection, text: &str) -> Result<String, Error> {
    let mut exchange = connection.open_exchange().await?;
    exchange.send(text).await?;
    exchange.recv().await
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_closes_the_connection_with_a_code_and_the_node_lives_on() {
    let served = serve(8);
    let violated = |error: Error| {
        assert!(
            matches!(error.kind, ErrorKind::ClosedByPeer { code: CloseCode::Protocol, .. }),
            "{error:?} {}",
            error.kind
        );
    };
    let connection = served.client.connect(addr(&served.server), None, ALPN).await.unwrap();
    let mut exchange = connection.open_exchange().await.unwrap();
    // The length of a string that is longer than its message.
    exchange.send(&200_u8).await.unwrap();
    violated(exchange.recv::<String>().await.unwrap_err());

    let connection = served.client.connect(addr(&served.server), None, ALPN).await.unwrap();
    let _bulk = connection.open_bulk(3).await.unwrap();
    violated(connection.closed().await);

    let connection = served.client.connect(addr(&served.server), None, ALPN).await.unwrap();
    assert_eq!(echo(&connection, "still there").await.unwrap(), "still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_told_that_the_node_is_busy() {
    let served = serve(1);
    let first = served.client.connect(addr(&served.server), None, ALPN).await.unwrap();
    let error = served.client.connect(addr(&served.server), None, ALPN).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::ClosedByPeer { code: CloseCode::Busy, .. }) && error.kind.is_transient());
    assert_eq!(echo(&first, "mine").await.unwrap(), "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_is_cancelled_lets_its_handlers_end() {
    let served = serve(8);
    let connection = served.client.connect(addr(&served.server), None, ALPN).await.unwrap();
    assert_eq!(echo(&connection, "x").await.unwrap(), "x");
    served.cancel.cancel();
    tokio::time::timeout(DEADLINE, served.tasks.wait()).await.unwrap();
    assert!(matches!(connection.closed().await.kind, ErrorKind::ClosedByPeer { code: CloseCode::ShuttingDown, .. }));
    served.server.shutdown(CloseCode::ShuttingDown).await;
    assert!(served.server.accept(&members_only()).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_shuts_down_tells_its_peers() {
    let pair = Pair::new();
    let (client, _server) = pair.connect().await;
    pair.server.shutdown(CloseCode::ShuttingDown).await;
    assert!(matches!(client.closed().await.kind, ErrorKind::ClosedByPeer { code: CloseCode::ShuttingDown, .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_arrive_and_the_end_is_told_from_a_reset() {
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let mut sender = client.open_exchange().await.unwrap();
    let long = "x".repeat(3_000_000);
    let work = async {
        sender.send(&(1_u32, &long)).await.unwrap();
        sender.finish();
    };
    let receive = async {
        let mut receiver = server.accept_exchange().await.unwrap();
        assert_eq!(receiver.recv::<(u32, String)>().await.unwrap().1.len(), long.len());
        assert!(matches!(receiver.recv::<u8>().await.unwrap_err().kind, ErrorKind::StreamEnded));
    };
    tokio::join!(work, receive);

    let mut sender = client.open_exchange().await.unwrap();
    let mut receiver = server.accept_exchange().await.unwrap();
    sender.reset(CloseCode::Cancelled);
    assert!(matches!(receiver.recv::<u8>().await.unwrap_err().kind, ErrorKind::StreamReset(CloseCode::Cancelled)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_times_out_and_the_stream_is_reset() {
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let mut waiting = client.open_exchange().await.unwrap();
    let mut other = server.accept_exchange().await.unwrap();
    let error = waiting.recv_within::<u8>(Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::TimedOut(_)) && error.kind.is_transient());
    assert!(matches!(other.recv::<u8>().await.unwrap_err().kind, ErrorKind::StreamReset(CloseCode::TimedOut)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_over_the_limit_is_not_sent_and_the_stream_lives_on() {
    let pair = Pair::new();
    let (client, server) = pair.connect().await;
    let mut sender = client.open_exchange().await.unwrap();
    let error = sender.send(&vec![0_u8; flocker_transport::MESSAGE_LIMIT + 1]).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::MessageTooLong { .. }));
    sender.send(&7_u8).await.unwrap();
    assert_eq!(server.accept_exchange().await.unwrap().recv::<u8>().await.unwrap(), 7);
}
