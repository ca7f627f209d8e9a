//! The real binary against a daemon of cardboard: exit codes, what goes to which stream, Ctrl-C.
#![allow(clippy::unwrap_used)]

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Answers a request (`"GET /v1/node"`, body) with a status and a body.
type Script = dyn Fn(&str, &Value) -> (u16, Value) + Send + Sync;

/// A daemon that follows a script and remembers what it was asked. Its thread ends with the test's process.
struct Fake {
    folder: TempDir,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    fn new(script: impl Fn(&str, &Value) -> (u16, Value) + Send + Sync + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("api.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, script): (_, Box<Script>) = (asked.clone(), Box::new(script));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away is no concern of the daemon.
                let _ = serve(stream, &seen, &script);
            }
        });
        Self { folder, asked }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PathBuf::from(env!("CARGO_BIN_EXE_flocker")));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FLOCKER_")) {
            command.env_remove(name);
        }
        command.arg("--state").arg(self.folder.path()).args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn was_asked(&self, request: &str) -> bool {
        self.asked.lock().unwrap().iter().any(|asked| asked == request)
    }
}

fn serve(mut stream: UnixStream, seen: &Mutex<Vec<String>>, script: &Script) -> Option<()> {
    let mut raw = Vec::new();
    let mut part = [0; 4096];
    let (head, body) = loop {
        let count = stream.read(&mut part).ok().filter(|count| *count > 0)?;
        raw.extend_from_slice(&part[..count]);
        let text = String::from_utf8_lossy(&raw).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().filter_map(|line| line.split_once(": "));
        let length = length.filter(|(name, _)| name.eq_ignore_ascii_case("content-length")).map(|(_, value)| value);
        let length: usize = length.filter_map(|value| value.parse().ok()).max().unwrap_or(0);
        if body.len() >= length {
            break (head.to_owned(), body.to_owned());
        }
    };
    let request = head.lines().next()?.trim_end_matches(" HTTP/1.1").to_owned();
    seen.lock().unwrap().push(request.clone());
    let (status, answer) = script(&request, &serde_json::from_str(&body).unwrap_or(Value::Null));
    let kind = if status < 400 { "application/json" } else { "application/problem+json" };
    let answer = if answer.is_null() { String::new() } else { answer.to_string() };
    let length = answer.len();
    write!(stream, "HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{answer}").ok()
}

fn transfer(state: &str, more: Value) -> Value {
    let mut value = json!({"id": "0190-abcd", "direction": "push", "volume": "db", "snapshot": "two",
        "peer": "host-b", "as_name": null, "dry_run": false, "state": state, "outcome": null, "refusal": null,
        "problem": null, "started": "2026-03-01T11:57:00Z", "finished": null,
        "progress": {"steps_done": 1, "steps_total": 1, "volume_bytes": 1 << 20, "delta_bytes": 2048,
            "expected_bytes": null, "wire_bytes": 1024, "rate_bytes_per_second": 0, "resumed": 0, "elapsed_ms": 800}});
    value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    value
}

fn push_that_ends(state: &'static str, more: Value) -> Fake {
    Fake::new(move |request, _| match request {
        "POST /v1/volumes/db/push" => (202, transfer("running", json!({}))),
        "GET /v1/transfers/0190-abcd?wait_ms=200" => (200, transfer(state, more.clone())),
        _ => (500, json!({"status": 500, "code": "internal", "detail": "not in the script"})),
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_push_that_is_done_prints_its_cost_on_standard_error_and_the_transfer_on_standard_output() {
    let fake = push_that_ends("done", json!({}));
    let for_people = fake.run(&["push", "db@two", "host-b"]);
    let for_programs = fake.run(&["--output", "json", "--quiet", "push", "db@two", "host-b"]);
    assert_eq!((for_people.status.code(), text(&for_people.stdout)), (Some(0), String::new()));
    assert_eq!(
        text(&for_people.stderr),
        "db@two → host-b: 2.0 KiB of delta (1.0 MiB volume), 1.0 KiB on the wire, 0.8 s\n"
    );
    assert_eq!(serde_json::from_slice::<Value>(&for_programs.stdout).unwrap(), transfer("done", json!({})));
    assert_eq!(text(&for_programs.stderr), "");
}

#[test]
fn a_refused_push_tells_the_refusal_in_full_and_ends_with_4() {
    let refusal = "the histories have gone apart\n  host-a: one - two\n  host-b: one - other";
    let fake = push_that_ends("refused", json!({"refusal": refusal}));
    let refused = fake.run(&["--quiet", "--output", "json", "push", "db@two", "host-b"]);
    assert_eq!(refused.status.code(), Some(4));
    assert_eq!(text(&refused.stderr), format!("{refusal}\n"));
    assert_eq!(serde_json::from_slice::<Value>(&refused.stdout).unwrap()["state"], "refused");
}

#[test]
fn a_push_that_fails_ends_as_its_problem_says() {
    let problem = json!({"status": 502, "code": "peer_unreachable", "detail": "host-b does not answer at 10.0.0.2:7801",
        "hint": "is its daemon running?"});
    let failed = push_that_ends("failed", json!({"problem": problem})).run(&["push", "db@two", "host-b"]);
    assert_eq!(failed.status.code(), Some(5));
    assert_eq!(
        text(&failed.stderr),
        "error: cannot push db@two to host-b\n  because: host-b does not answer at 10.0.0.2:7801\nhint: is its daemon running?\n"
    );
}

#[test]
fn a_detached_push_prints_its_id_and_leaves() {
    let fake = push_that_ends("running", json!({}));
    let left = fake.run(&["push", "db@two", "host-b", "--detach"]);
    assert_eq!((left.status.code(), text(&left.stdout)), (Some(0), "0190-abcd\n".to_owned()));
    assert!(!fake.was_asked("GET /v1/transfers/0190-abcd?wait_ms=200"));
}

#[test]
fn what_is_not_there_ends_with_3_and_what_is_in_the_way_with_4() {
    let fake = Fake::new(|request, _| match request {
        "POST /v1/volumes" => (409, json!({"status": 409, "code": "volume_exists", "detail": "db exists already"})),
        _ => (404, json!({"status": 404, "code": "volume_not_found", "detail": "there is no volume nope"})),
    });
    let missing = fake.run(&["inspect", "nope"]);
    let exists = fake.run(&["create", "db"]);
    assert_eq!(
        (missing.status.code(), text(&missing.stderr)),
        (Some(3), "error: there is no volume nope\n".to_owned())
    );
    assert_eq!((exists.status.code(), text(&exists.stderr)), (Some(4), "error: db exists already\n".to_owned()));
}

#[test]
fn no_daemon_ends_with_5_and_says_how_to_start_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_flocker"));
    let down = command.arg("--state").arg(folder.path()).arg("list").output().unwrap();
    assert_eq!(down.status.code(), Some(5));
    assert!(text(&down.stderr).contains("node start"), "{}", text(&down.stderr));
    assert_eq!(text(&down.stdout), "");
}

#[test]
fn a_mount_is_made_absolute_and_its_path_printed() {
    let fake =
        Fake::new(|_, body| (200, json!({"volume": "db", "path": body["path"], "read_only": true, "kind": "symlink"})));
    let mut command = fake.command(&["mount", "db", "here", "--read-only"]);
    let mounted = command.current_dir(fake.folder.path()).output().unwrap();
    assert_eq!(text(&mounted.stdout), format!("{}\n", fake.folder.path().join("here").display()));
    assert!(text(&mounted.stderr).contains("symlink"), "{}", text(&mounted.stderr));
}

#[test]
fn a_list_is_an_array_as_json_and_a_line_each_as_jsonl() {
    let fake = Fake::new(|_, _| (200, json!([transfer("done", json!({})), transfer("failed", json!({}))])));
    let array: Value = serde_json::from_slice(&fake.run(&["transfers", "--output", "json"]).stdout).unwrap();
    assert_eq!(array.as_array().unwrap().len(), 2);
    let lines = text(&fake.run(&["transfers", "list", "--output", "jsonl"]).stdout);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
}

#[test]
fn ctrl_c_cancels_the_push_and_ends_with_130() {
    let cancelled = Arc::new(Mutex::new(false));
    let state = cancelled.clone();
    let fake = Fake::new(move |request, _| match request {
        "POST /v1/volumes/db/push" => (202, transfer("running", json!({}))),
        "POST /v1/transfers/0190-abcd/cancel" => {
            *state.lock().unwrap() = true;
            (200, transfer("running", json!({})))
        }
        _ if *state.lock().unwrap() => (200, transfer("cancelled", json!({}))),
        _ => (200, transfer("running", json!({}))),
    });
    let mut command = fake.command(&["push", "db@two", "host-b", "--output", "json"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !fake.was_asked("GET /v1/transfers/0190-abcd?wait_ms=200") {
        assert!(Instant::now() < deadline, "the push is never asked for");
        std::thread::yield_now();
    }
    interrupt(&child);
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", text(&ended.stderr));
    assert!(fake.was_asked("POST /v1/transfers/0190-abcd/cancel"));
    assert_eq!(serde_json::from_slice::<Value>(&ended.stdout).unwrap()["state"], "cancelled");
}

fn interrupt(child: &Child) {
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}
