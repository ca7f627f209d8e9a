//! The client's side of an answer that comes as JSON lines, or as mere bytes, each piece taken when it has arrived.
//!
//! Owns framing and its limit. Refuses to know what a line says.

use std::{future::Future, pin::Pin};

use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Method, Request, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;

use super::client::{Client, Result, Unreachable, decode, describe, judge, protocol};

type Connection = Pin<Box<dyn Future<Output = ()> + Send>>;

/// An answer under way.
pub(super) struct Lines<'a> {
    client: &'a Client,
    request: String,
    /// Does the reading that the body waits for; `None` once it has ended.
    connection: Option<Connection>,
    body: Incoming,
    buffer: BytesMut,
    limit: usize,
}

impl Client {
    /// Asks for an answer in lines of at most `limit` bytes.
    pub(super) async fn lines(&self, path: String, limit: usize) -> Result<Lines<'_>> {
        let described = describe(&Method::GET, &path);
        let request = Request::builder().method(Method::GET).uri(path).header(header::HOST, "flocker");
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| protocol(&described, &error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(self.connect().await?))
            .await
            .map_err(|error| self.unreachable(Unreachable::Lost(error.to_string())))?;
        let mut connection: Connection = Box::pin(async move {
            // Its failure is the body's, which says more.
            let _ = connection.await;
        });
        let asked = sender.send_request(request);
        tokio::pin!(asked);
        let response = tokio::select! {
            biased;
            response = &mut asked => response,
            () = &mut connection => asked.await,
        };
        let (parts, body) = response.map_err(|error| self.broken(&described, &error))?.into_parts();
        let mut lines = Lines {
            client: self,
            request: described,
            connection: Some(connection),
            body,
            buffer: BytesMut::new(),
            limit,
        };
        if !parts.status.is_success() {
            while lines.more().await? {}
            let body = lines.buffer.split().freeze();
            judge(&lines.request, parts.status, &parts.headers, body)?;
        }
        Ok(lines)
    }
}

impl Lines<'_> {
    /// Returns the next line, `None` at the end.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end);
                self.buffer.advance(1);
                return decode(&self.request, &line).map(Some);
            }
            if !self.more().await? {
                return Ok(None);
            }
        }
    }

    /// Returns what the next event of a stream of server-sent events carries, `None` at the end. One line of data each is
    /// what this API sends.
    pub(super) async fn next_data<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end);
                self.buffer.advance(1);
                if let Some(data) = line.strip_prefix(b"data:") {
                    return decode(&self.request, data).map(Some);
                }
            } else if !self.more().await? {
                return Ok(None);
            }
        }
    }

    /// Returns the next bytes, `None` at the end.
    pub(super) async fn bytes(&mut self) -> Result<Option<Bytes>> {
        while self.buffer.is_empty() {
            if !self.more().await? {
                return Ok(None);
            }
        }
        Ok(Some(self.buffer.split().freeze()))
    }

    /// Takes in the next piece of the body; `false` at its end.
    async fn more(&mut self) -> Result<bool> {
        if self.buffer.len() > self.limit {
            return Err(protocol(&self.request, &format_args!("a line is longer than {} bytes", self.limit)));
        }
        let frame = loop {
            match &mut self.connection {
                None => break self.body.frame().await,
                Some(connection) => {
                    tokio::select! {
                        biased;
                        frame = self.body.frame() => break frame,
                        () = connection => self.connection = None,
                    }
                }
            }
        };
        match frame {
            None => Ok(false),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    self.buffer.extend_from_slice(&data);
                }
                Ok(true)
            }
            Some(Err(error)) => Err(self.client.unreachable(Unreachable::Lost(error.to_string()))),
        }
    }
}
