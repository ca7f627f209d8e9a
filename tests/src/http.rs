//! Plain HTTP/1.1 over a unix socket: what any client of the API does, without the program's own client.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::Value;

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// What was asked, for messages.
    pub call: String,
    /// The status code.
    pub status: u16,
    /// The content type, without parameters.
    pub content_type: String,
    /// The body, chunks put together.
    pub body: Vec<u8>,
}

impl Answer {
    /// Asserts the status.
    #[track_caller]
    pub fn is(self, status: u16) -> Self {
        let body = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "status of {}: {body}", self.call);
        self
    }

    /// Parses the body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("{} gave no JSON ({error}): {}", self.call, String::from_utf8_lossy(&self.body))
        })
    }

    /// Asserts that it is a problem document with this stable code and status.
    #[track_caller]
    pub fn is_problem(self, status: u16, code: &str) -> Value {
        let answer = self.is(status);
        assert_eq!(answer.content_type, "application/problem+json", "content type of {}", answer.call);
        let problem = answer.json();
        assert_eq!(problem["code"], code, "{}: {problem}", answer.call);
        assert_eq!(problem["status"], status, "{}: {problem}", answer.call);
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{}: {problem}", answer.call);
        problem
    }
}

/// Asks once; `None` when nobody answers at the socket.
pub fn try_request(socket: &Path, method: &str, path: &str, body: Option<&[u8]>) -> Option<Answer> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(120))).ok()?;
    let body = body.unwrap_or_default();
    let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: flocker\r\nConnection: close\r\n{kind}Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body).ok()?;
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).ok()?;
    parse(format!("{method} {path}"), &raw)
}

/// Asks once.
///
/// # Panics
/// When nobody answers.
#[track_caller]
pub fn request(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Answer {
    let bytes = body.map(|value| value.to_string().into_bytes());
    try_request(socket, method, path, bytes.as_deref())
        .unwrap_or_else(|| panic!("{method} {path}: nobody answers at {}", socket.display()))
}

fn parse(call: String, raw: &[u8]) -> Option<Answer> {
    let split = raw.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&raw[..split]).into_owned();
    let mut body = raw[split + 4..].to_vec();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let header = |name: &str| {
        let mut lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
    };
    if header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        body = unchunk(&body)?;
    }
    let content_type = header("content-type").unwrap_or_default();
    let content_type = content_type.split(';').next().unwrap_or_default().trim().to_owned();
    Some(Answer { call, status, content_type, body })
}

fn unchunk(mut raw: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = raw.windows(2).position(|two| two == b"\r\n")?;
        let size = std::str::from_utf8(&raw[..end]).ok()?.split(';').next()?.trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(raw.get(end + 2..end + 2 + size)?);
        raw = raw.get(end + 2 + size + 2..)?;
    }
}
