//! The same verbs by plain HTTP on the unix socket, and the shape of what comes back.

use std::fs;

use flocker_tests::{
    Cluster,
    invariants::{array, text},
    wait_until,
};
use serde_json::json;

#[test]
fn every_verb_of_the_minimal_api_works_over_http() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];

    let create = json!({"name": "db", "metadata": {"a": "1", "b": "2"}});
    let volume = node.http("POST", "/v1/volumes", Some(&create)).is(201).json();
    assert_eq!(volume["metadata"], json!({"a": "1", "b": "2"}));
    let patch = json!({"metadata": {"a": null, "c": "3"}});
    let patched = node.http("PATCH", "/v1/volumes/db", Some(&patch)).is(200).json();
    assert_eq!(patched["metadata"], json!({"b": "2", "c": "3"}));
    assert_eq!(array(&node.http("GET", "/v1/volumes", None).is(200).json()).len(), 1);

    let mounted = node.http("POST", "/v1/volumes/db/mount", Some(&json!({}))).is(200).json();
    assert_eq!(mounted["volume"], "db");
    assert_eq!(mounted["read_only"], false);
    fs::write(format!("{}/file", text(&mounted["path"])), "contents").unwrap();

    let take = json!({"name": "one", "metadata": {"why": "test"}});
    let snapshot = node.http("POST", "/v1/volumes/db/snapshots", Some(&take)).is(201).json();
    assert_eq!(snapshot["metadata"], json!({"why": "test"}));
    assert_eq!(node.http("GET", "/v1/volumes/db/snapshots/one", None).is(200).json()["id"], snapshot["id"]);
    assert_eq!(array(&node.http("GET", "/v1/volumes/db/snapshots", None).is(200).json()).len(), 1);

    let copy = json!({"name": "copy", "metadata": {}});
    let copy = node.http("POST", "/v1/volumes/db/snapshots/one/clone", Some(&copy)).is(201).json();
    assert_eq!(copy["origin"]["snapshot_id"], snapshot["id"]);

    node.http("POST", "/v1/volumes/db/unmount", None).is(204);
    node.http("POST", "/v1/volumes/db/unmount", None).is_problem(409, "not_mounted");
    let back = node.http("POST", "/v1/volumes/db/rollback", Some(&json!({"snapshot": "one"}))).is(200).json();
    assert_eq!(back["name"], "db");
    node.http("DELETE", "/v1/volumes/copy", None).is(204);
    node.http("DELETE", "/v1/volumes/db/snapshots/one", None).is(204);
    node.http("DELETE", "/v1/volumes/db", None).is(204);
    assert_eq!(node.http("GET", "/v1/volumes", None).is(200).json(), json!([]));
}

#[test]
fn a_push_over_http_is_a_transfer_that_is_asked_for_until_it_is_done() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    let mount = a.create_mounted("db");
    flocker_tests::data::write_ordinary_tree(&mount, 3, 512);
    let snapshot = a.cli(&["snapshot", "db@one"]).ok().json();

    let ask = json!({"peer": "host-b", "snapshot": "one"});
    let started = a.http("POST", "/v1/volumes/db/push", Some(&ask)).is(202).json();
    let id = text(&started["id"]);
    // One answer, given when it is over.
    let done = a.http("GET", &format!("/v1/transfers/{id}?wait_ms=10000"), None).is(200).json();

    assert_eq!(done["state"], "done");
    assert_eq!(done["direction"], "push");
    assert_eq!(done["peer"], "host-b");
    assert_eq!(done["progress"]["steps_done"], 1);
    assert_eq!(done["progress"]["steps_total"], 1);
    assert_eq!(done["progress"]["volume_bytes"], snapshot["logical_bytes"]);
    assert!(done["progress"]["delta_bytes"].as_u64() >= snapshot["logical_bytes"].as_u64(), "{done}");
    assert!(done["progress"]["wire_bytes"].as_u64().unwrap() > 0);
    let listed = array(&a.http("GET", "/v1/transfers", None).is(200).json());
    assert_eq!(listed[0]["id"], started["id"]);
    let arrived = b.http("GET", "/v1/volumes/db/snapshots/one", None).is(200).json();
    assert_eq!(arrived["id"], snapshot["id"]);
    assert_eq!(arrived["host"]["name"], "host-a");
    assert_eq!(b.http("GET", "/v1/volumes/db", None).is(200).json()["role"], "replica");
}

#[test]
fn problems_have_stable_codes_and_the_right_status() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    node.cli(&["create", "db"]).ok();
    node.cli(&["snapshot", "db@one"]).ok();

    node.http("GET", "/v1/volumes/nope", None).is_problem(404, "volume_not_found");
    node.http("GET", "/v1/volumes/db/snapshots/nope", None).is_problem(404, "snapshot_not_found");
    node.http("GET", "/v1/transfers/nope?wait_ms=soon", None).is_problem(400, "bad_request");
    node.http("GET", "/v1/transfers/nope", None).is_problem(404, "transfer_not_found");
    node.http("POST", "/v1/volumes", Some(&json!({"name": "db"}))).is_problem(409, "volume_exists");
    node.http("POST", "/v1/volumes/db/snapshots", Some(&json!({"name": "one"}))).is_problem(409, "snapshot_exists");
    let to_nobody = json!({"peer": "nobody", "snapshot": "one"});
    let push = node.http("POST", "/v1/volumes/db/push", Some(&to_nobody));
    if push.status == 202 {
        let id = text(&push.json()["id"]);
        let failed = wait_until("the transfer fails", flocker_tests::SHORT, || {
            Some(node.transfer(&id)).filter(|transfer| transfer["state"] == "failed")
        });
        assert_eq!(failed["problem"]["code"], "peer_not_found", "{failed}");
    } else {
        push.is_problem(404, "peer_not_found");
    }
    for bad in [json!({"name": "../evil"}), json!({"name": ""}), json!({"nome": "x"}), json!([])] {
        let answer = node.http("POST", "/v1/volumes", Some(&bad));
        assert!([400, 422].contains(&answer.status), "{bad} gave {}", answer.status);
        assert_eq!(answer.content_type, "application/problem+json");
    }
    let answer = flocker_tests::http::try_request(&node.socket(), "POST", "/v1/volumes", Some(b"{not json")).unwrap();
    assert!([400, 422].contains(&answer.status));
    assert!([404, 405].contains(&node.http("PUT", "/v1/nothing-here", None).status));
}

#[test]
fn the_socket_is_closed_to_other_users_and_health_is_told() {
    use std::os::unix::fs::PermissionsExt;
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];

    let mode = fs::metadata(node.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0, "mode {mode:o}");
    node.http("GET", "/healthz", None).is(200);
    node.http("GET", "/readyz", None).is(200);
    for secret in ["identity", "authority"] {
        let folder = node.state.join(secret);
        let found = flocker_tests::scratch::run(
            std::process::Command::new("find").arg(&folder).args(["-type", "f", "-perm", "/077", "-name", "*key*"]),
        );
        assert_eq!(found, "", "keys are for their owner only");
    }
}
