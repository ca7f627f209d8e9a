//! Hands each accepted connection to the handler of its protocol.
//!
//! Owns the accept loop, the limit of connections and the tasks that serve them. What a handler does is its own business.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    close::CloseCode,
    connection::Connection,
    endpoint::{Access, Arrival, Endpoint, Protocol},
};

/// How many connections are served at once, unless said otherwise; more are refused as busy. Each may hold up to a transfer's memory.
const MAX_CONNECTIONS: usize = 64;

/// Serves the connections of one protocol.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Serves one connection until it is done. When `cancel` fires, it ends what it does in order, and returns. When it has returned
    /// and dropped the connection, the connection closes.
    async fn handle(&self, connection: Connection, cancel: CancellationToken);
}

/// Which handler serves which protocol.
pub struct Router {
    handlers: BTreeMap<Vec<u8>, (Access, Arc<dyn Handler>)>,
    max_connections: usize,
}

impl Router {
    /// A router that serves nothing yet.
    pub fn new() -> Self {
        Self { handlers: BTreeMap::new(), max_connections: MAX_CONNECTIONS }
    }

    /// Serves a protocol to members.
    #[must_use]
    pub fn members(self, alpn: &[u8], handler: Arc<dyn Handler>) -> Self {
        self.route(alpn, Access::Members, handler)
    }

    /// Serves a protocol to members and to newcomers without a certificate.
    #[must_use]
    pub fn anyone(self, alpn: &[u8], handler: Arc<dyn Handler>) -> Self {
        self.route(alpn, Access::Anyone, handler)
    }

    /// Serves at most so many connections at once.
    #[must_use]
    pub fn max_connections(mut self, max_connections: usize) -> Self {
        self.max_connections = max_connections;
        self
    }

    /// Accepts connections until cancelled (or the endpoint is shut down), then waits until all handlers have returned. The endpoint stays open, so that
    /// handlers can end in order; the caller shuts it down.
    pub async fn serve(self, endpoint: Endpoint, cancel: CancellationToken) {
        let protocols: Vec<_> =
            self.handlers.iter().map(|(alpn, (access, _))| Protocol { alpn: alpn.clone(), access: *access }).collect();
        let handlers = Arc::new(self.handlers);
        let slots = Arc::new(Semaphore::new(self.max_connections));
        let tasks = TaskTracker::new();
        loop {
            let arrival = tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                arrival = endpoint.accept(&protocols) => arrival,
            };
            let Some(arrival) = arrival else { break };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                tracing::warn!(peer = %arrival.remote_addr(), "refused a connection: {} are served", self.max_connections);
                arrival.refuse();
                continue;
            };
            let (handlers, cancel) = (handlers.clone(), cancel.child_token());
            tasks.spawn(async move {
                serve_one(arrival, &handlers, cancel).await;
                drop(slot);
            });
        }
        tasks.close();
        tasks.wait().await;
    }

    fn route(mut self, alpn: &[u8], access: Access, handler: Arc<dyn Handler>) -> Self {
        self.handlers.insert(alpn.to_vec(), (access, handler));
        self
    }
}

impl Default for Router {
    fn default() -> Self {
        Self::new()
    }
}

async fn serve_one(
    arrival: Arrival,
    handlers: &BTreeMap<Vec<u8>, (Access, Arc<dyn Handler>)>,
    cancel: CancellationToken,
) {
    let connection = tokio::select! {
        biased;
        () = cancel.cancelled() => return,
        // A failure is logged where it is found.
        connection = arrival.establish() => match connection { Ok(connection) => connection, Err(_) => return },
    };
    match handlers.get(connection.alpn()) {
        Some((_, handler)) => handler.handle(connection, cancel).await,
        None => connection.close(CloseCode::Protocol, ""),
    }
}
