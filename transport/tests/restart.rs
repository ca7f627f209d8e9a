//! A node that dies without a word and comes back at the same address: its peers learn of it long before the line's idle time.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use common::*;
use flocker_certs::Identity;
use flocker_transport::{ALPN, Connection, Endpoint, Error, ErrorKind, Limits};
use tokio::runtime::Runtime;

/// Nobody may take so long to learn of a restart: it shows that the idle time was waited for.
const IDLE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

fn limits() -> Limits {
    Limits { idle: IDLE, keep_alive: Duration::from_millis(500), ..Limits::default() }
}

/// A node in a runtime of its own, so that it can end without a packet.
struct Mortal {
    runtime: Runtime,
    endpoint: Endpoint,
}

impl Mortal {
    fn born(identity: &Arc<Identity>, addr: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let inside = runtime.enter();
        // The socket of a process that has just died may take a moment to go.
        let began = Instant::now();
        let endpoint = loop {
            match Endpoint::bind(addr, identity.clone(), limits()) {
                Ok(endpoint) => break endpoint,
                Err(Error { kind: ErrorKind::AddressInUse, .. }) if began.elapsed() < DEADLINE => {
                    std::thread::yield_now()
                }
                Err(error) => panic!("{error:?}"),
            }
        };
        drop(inside);
        Self { runtime, endpoint }
    }

    fn addr(&self) -> SocketAddr {
        addr(&self.endpoint)
    }

    fn accept(&self) -> Connection {
        let accepted = async { self.endpoint.accept(&members_only()).await.unwrap().establish().await.unwrap() };
        self.runtime.block_on(accepted)
    }

    /// Like `kill -9`: what drives the socket stops before anybody can say goodbye.
    fn killed(self, connection: Connection) {
        drop(self.runtime);
        drop((connection, self.endpoint));
    }
}

struct Survivor {
    runtime: Runtime,
    endpoint: Endpoint,
    connection: Connection,
}

/// A peer with a connection to a node that has died, and the node as it is born again.
fn survivor_and_reborn(who: Dialler) -> (Survivor, Mortal) {
    let authority = authority();
    let (mortal, survivor) = (member(&authority, "host-a"), member(&authority, "host-b"));
    let first = Mortal::born(&mortal, "127.0.0.1:0".parse().unwrap());
    let at = first.addr();
    let Mortal { runtime, endpoint } = Mortal::born(&survivor, "127.0.0.1:0".parse().unwrap());
    let theirs = match who {
        Dialler::Survivor => {
            let dialled = runtime.spawn({
                let endpoint = endpoint.clone();
                async move { endpoint.connect(at, None, ALPN).await.unwrap() }
            });
            (first.accept(), runtime.block_on(dialled).unwrap())
        }
        Dialler::Mortal => {
            let accepted = runtime.spawn({
                let endpoint = endpoint.clone();
                async move { endpoint.accept(&members_only()).await.unwrap().establish().await.unwrap() }
            });
            let to = addr(&endpoint);
            let dialled = first.runtime.block_on(first.endpoint.connect(to, None, ALPN)).unwrap();
            (dialled, runtime.block_on(accepted).unwrap())
        }
    };
    let (dead, connection) = theirs;
    first.killed(dead);
    (Survivor { runtime, endpoint, connection }, Mortal::born(&mortal, at))
}

#[derive(Clone, Copy)]
enum Dialler {
    Survivor,
    Mortal,
}

fn assert_a_lost_line(kind: &ErrorKind) {
    assert!(matches!(kind, ErrorKind::ConnectionLost), "{kind:?}");
    assert!(kind.is_transient());
}

#[test]
fn a_silent_peer_learns_of_a_restart_whoever_had_connected() {
    for who in [Dialler::Survivor, Dialler::Mortal] {
        let (survivor, _reborn) = survivor_and_reborn(who);
        let closed = async { tokio::time::timeout(SOON, survivor.connection.closed()).await };
        let error = survivor.runtime.block_on(closed).expect("the end of the connection is noticed");
        assert_a_lost_line(&error.kind);
    }
}

#[test]
fn a_peer_that_sends_learns_of_a_restart_and_can_connect_anew() {
    let (survivor, reborn) = survivor_and_reborn(Dialler::Survivor);
    let Survivor { runtime, endpoint, connection } = survivor;
    let asked = async {
        let mut exchange = connection.open_exchange().await?;
        exchange.send(&7_u32).await?;
        exchange.recv::<u32>().await
    };
    let asked = runtime.block_on(async { tokio::time::timeout(SOON, asked).await });
    assert_a_lost_line(&asked.expect("the end of the connection is noticed").unwrap_err().kind);
    let to = reborn.addr();
    let again = runtime.spawn(async move { endpoint.connect(to, None, ALPN).await });
    let _there = reborn.accept();
    runtime.block_on(again).unwrap().unwrap();
}

#[test]
fn a_connection_survives_what_another_node_at_the_same_address_says() {
    let authority = authority();
    let (mortal, survivor) = (member(&authority, "host-a"), member(&authority, "host-b"));
    let first = Mortal::born(&mortal, "127.0.0.1:0".parse().unwrap());
    let at = first.addr();
    let Mortal { runtime, endpoint } = Mortal::born(&survivor, "127.0.0.1:0".parse().unwrap());
    let dialled = runtime.spawn(async move { endpoint.connect(at, None, ALPN).await.unwrap() });
    let dead = first.accept();
    let connection = runtime.block_on(dialled).unwrap();
    first.killed(dead);
    let _stranger = Mortal::born(&member(&authority, "host-c"), at);
    // Some signs of life go out and are answered with tokens of another key.
    let closed = async { tokio::time::timeout(Duration::from_secs(3), connection.closed()).await };
    assert!(runtime.block_on(closed).is_err(), "{:?}", connection.close_reason());
}
