//! What happens is told, in order, to those who listen; and to those who come back where they were.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
};

use flocker_tests::{Cluster, LONG, Node, data::write_ordinary_tree};
use serde_json::Value;

/// Before all events of any run.
const BEFORE_ALL: &str = "00000000000000000000000000000000.0";

/// A client of the stream that has begun: the daemon has answered.
struct Listener {
    lines: std::io::Lines<BufReader<UnixStream>>,
}

impl Listener {
    fn start(node: &Node, header: &str) -> Self {
        let mut stream = UnixStream::connect(node.socket()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        write!(stream, "GET /v1/events HTTP/1.1\r\nHost: flocker\r\n{header}\r\n").unwrap();
        let mut lines = BufReader::new(stream).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "HTTP/1.1 200 OK");
        let head: Vec<String> = lines.by_ref().map(Result::unwrap).take_while(|line| !line.is_empty()).collect();
        assert!(head.iter().any(|line| line.to_lowercase() == "content-type: text/event-stream"), "{head:?}");
        Self { lines }
    }

    /// Waits for an event; its frame must say what its data says.
    fn next(&mut self) -> Value {
        let (mut id, mut kind) = (String::new(), String::new());
        loop {
            let line = self.lines.next().expect("the stream goes on").unwrap();
            if let Some(text) = line.strip_prefix("id: ") {
                id = text.to_owned();
            } else if let Some(text) = line.strip_prefix("event: ") {
                kind = text.to_owned();
            } else if let Some(text) = line.strip_prefix("data: ") {
                let event: Value = serde_json::from_str(text).unwrap();
                assert_eq!((event["id"].as_str(), event["event"].as_str()), (Some(&*id), Some(&*kind)));
                return event;
            }
        }
    }
}

/// Listens by the command until the daemon, which is stopped now, ends it.
fn all_events(node: &mut Node, after: &str) -> Vec<Value> {
    let listeners = |node: &Node| node.log_text().matches("listens to events").count();
    let before = listeners(node);
    let listening = node.start_cli(&["events", "--after", after]);
    // What is over already is told before the stream ends, however late the listener came: it is ended by the daemon alone.
    let mut witness = Listener::start(node, &format!("Last-Event-ID: {BEFORE_ALL}\r\n"));
    assert_eq!(witness.next()["event"], "lost");
    flocker_tests::wait_until("the command listens", LONG, || (listeners(node) >= before + 2).then_some(()));
    node.stop();
    let ended = listening.finish(LONG).ends_with(5).says(&["the daemon has stopped", "flocker events --after"]);
    ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn told(events: &[Value]) -> Vec<String> {
    let text = |event: &Value, field: &str| event[field].as_str().map(|text| format!(" {text}")).unwrap_or_default();
    let one = |event: &Value| {
        let fields = ["volume", "from", "snapshot", "host", "role", "state"].map(|field| text(event, field));
        format!("{}{}", event["event"].as_str().unwrap(), fields.concat())
    };
    events.iter().map(one).collect()
}

#[test]
fn all_that_happens_is_told_in_order_on_both_nodes() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mut listener = Listener::start(a, "");
    let mount = a.create_mounted("db");
    assert_eq!(listener.next()["event"], "volume-added", "told at once, to whoever listens");
    write_ordinary_tree(&mount, 300, 64);
    a.cli(&["snapshot", "db@one"]).ok();
    a.push("db@one", "host-b");
    std::fs::write(mount.join("more"), "more").unwrap();
    a.cli(&["snapshot", "db@two"]).ok();
    a.cli(&["unmount", "db"]).ok();
    a.cli(&["rollback", "db@one", "--fork-newer", "later"]).ok();
    a.cli(&["set", "db", "key=value"]).ok();
    a.cli(&["clone", "db@one", "copy"]).ok();
    a.cli(&["destroy", "later@two"]).ok();
    a.cli(&["destroy", "copy"]).ok();

    let heard = all_events(a, BEFORE_ALL);
    let transfer = |line: &&String| !line.starts_with("transfer db running");
    let lines = told(&heard);
    let expected = [
        "lost",
        "peer-joined",
        "volume-added db",
        "mounted db",
        "snapshot-added db one host-a",
        "transfer db done",
        "snapshot-added db two host-a",
        "unmounted db",
        "snapshot-removed db two",
        "volume-added later",
        "snapshot-added later two host-a",
        "volume-changed db primary",
        "volume-added copy",
        "snapshot-removed later two",
        "volume-removed copy",
    ];
    assert_eq!(lines.iter().filter(transfer).collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
    assert!(lines.contains(&"transfer db running".to_owned()), "its beginning is told, too: {lines:?}");
    let done = heard.iter().find(|event| event["state"] == "done").unwrap();
    assert!(done["progress"]["wire_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{done}");
    let numbers: Vec<u64> = heard.iter().map(number).collect();
    assert_eq!(numbers, (0..heard.len() as u64).collect::<Vec<_>>(), "none is left out");

    assert_eq!(told(&all_events(b, BEFORE_ALL)), ["lost", "volume-added db", "snapshot-added db one host-a"]);
}

fn number(event: &Value) -> u64 {
    event["id"].as_str().unwrap().split_once('.').unwrap().1.parse().unwrap()
}

#[test]
fn who_comes_back_hears_what_was_missed_or_that_it_is_lost() {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    let mut listener = Listener::start(node, "");
    node.cli(&["create", "one"]).ok();
    let first = listener.next();
    drop(listener);
    node.cli(&["create", "two"]).ok();
    let id = first["id"].as_str().unwrap().to_owned();
    let missed = Listener::start(node, &format!("Last-Event-ID: {id}\r\n")).next();
    assert_eq!((&missed["event"], &missed["volume"]), (&"volume-added".into(), &"two".into()));
    let heard = all_events(node, &id);
    assert_eq!(told(&heard), ["volume-added two"]);

    node.start();
    let mut later = Listener::start(node, &format!("Last-Event-ID: {id}\r\n"));
    assert_eq!(later.next()["event"], "lost", "the daemon is another one now");
    node.cli(&["create", "three"]).ok();
    assert_eq!(later.next()["volume"], "three");

    node.http("GET", "/v1/events?after=nonsense", None).is_problem(400, "bad_request");
    node.cli(&["events", "--after", "nonsense"]).ends_with(2).says(&["RUN.NUMBER"]);
}
