//! Joining a cluster, and everybody who must not get in.

use flocker_certs::{Authority, Identity, NewKey};
use flocker_tests::{
    Cluster, Node, Options, Scratch,
    invariants::{array, text},
    wait_until,
};
use jiff::Timestamp;

#[test]
fn a_second_and_a_third_node_join_with_one_command_each_and_know_each_other() {
    let cluster = Cluster::start(3);

    for node in &cluster.nodes {
        let peers = wait_until(&format!("{} knows both others", node.name), flocker_tests::SHORT, || {
            let peers = array(&node.cli(&["peers"]).ok().json());
            (peers.len() == 2).then_some(peers)
        });
        let mut names: Vec<_> = peers.iter().map(|peer| text(&peer["name"])).collect();
        names.sort();
        let others: Vec<_> = cluster.nodes.iter().map(|n| n.name.clone()).filter(|name| *name != node.name).collect();
        assert_eq!(names, others);
    }
    let clusters: Vec<_> =
        cluster.nodes.iter().map(|n| n.cli(&["node", "status"]).ok().json()["cluster"].clone()).collect();
    assert!(clusters.iter().all(|cluster| *cluster == clusters[0]), "{clusters:?}");
}

#[test]
fn nodes_that_joined_later_push_to_each_other() {
    let cluster = Cluster::start(3);
    let [_, b, c] = cluster.nodes.as_slice() else { unreachable!("three nodes") };
    let mount = b.create_mounted("db");
    std::fs::write(mount.join("file"), "from b").unwrap();
    b.cli(&["snapshot", "db@one"]).ok();

    b.wait_knows("host-c");
    b.push("db@one", "host-c");

    assert_eq!(std::fs::read_to_string(c.mount("db").join("file")).unwrap(), "from b");
}

#[test]
fn a_token_is_good_for_one_node_only() {
    let scratch = Scratch::new();
    let mut a = Node::init(&scratch, "host-a", Options::default());
    a.start();
    let token = a.token();
    let b = Node::new(&scratch, "host-b", Options::default());
    b.cli(&b.setup_arguments(&["join", &token])).ok();
    let c = Node::new(&scratch, "host-c", Options::default());

    let refused = c.cli(&c.setup_arguments(&["join", &token]));

    assert_ne!(refused.code, 0);
    refused.says(&["used"]);
    a.wait_logged("used");
    assert!(!c.state.join("identity").join("node.crt").exists());
    assert!(array(&a.cli(&["peers"]).ok().json()).iter().all(|peer| peer["name"] != "host-c"));
}

#[test]
fn an_expired_token_is_refused_on_both_sides() {
    let scratch = Scratch::new();
    let mut a = Node::init(&scratch, "host-a", Options::default());
    a.start();
    let made = a.cli(&["token", "create", "--ttl", "1s"]).ok().json();
    let token = text(&made["token"]);
    let now = || flocker_tests::scratch::run(std::process::Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%S"]));
    wait_until("the token has expired", flocker_tests::SHORT, || {
        let expires = text(&made["expires"]);
        (now().trim() > &expires[..19]).then_some(())
    });
    let b = Node::new(&scratch, "host-b", Options::default());

    let refused = b.cli(&b.setup_arguments(&["join", &token]));

    assert_ne!(refused.code, 0);
    refused.says(&["expired"]);
    a.wait_logged("expired");
}

#[test]
fn a_wrong_token_is_refused_with_its_own_words() {
    let scratch = Scratch::new();
    let mut a = Node::init(&scratch, "host-a", Options::default());
    a.start();
    let token = a.token();
    let b = Node::new(&scratch, "host-b", Options::default());

    for wrong in ["", "hello", &token[..token.len() - 4], &format!("{token}xyz")] {
        let refused = b.cli(&b.setup_arguments(&["join", wrong]));
        assert_ne!(refused.code, 0, "{wrong:?} was taken");
        refused.says(&["token"]);
    }
    // One that is whole but that no member knows: the database was lost meanwhile.
    a.stop();
    std::fs::remove_file(a.state.join("state.db")).unwrap();
    a.start();
    let refused = b.cli(&b.setup_arguments(&["join", &token]));
    refused.ends_with(4).says(&["does not know this join token"]);
    a.wait_logged("does not know this join token");
    let token = a.token();
    b.cli(&b.setup_arguments(&["join", &token])).ok();
}

#[test]
fn a_token_of_a_node_that_has_another_authority_now_is_refused() {
    let scratch = Scratch::new();
    let address = flocker_tests::node::free_address();
    let here = || Options { listen: Some(address), ..Options::default() };
    let mut real = Node::init(&scratch, "host-a", here());
    real.start();
    let token = real.token();
    real.stop();
    let mut impostor = Node::init(&scratch, "impostor", here());
    impostor.start();
    let b = Node::new(&scratch, "host-b", Options::default());

    let refused = b.cli(&b.setup_arguments(&["join", &token]));

    assert_ne!(refused.code, 0);
    refused.says(&["authority"]);
    impostor.wait_logged("authority");
    assert!(!b.state.join("identity").join("node.crt").exists());
    assert!(array(&impostor.cli(&["peers"]).ok().json()).is_empty());
}

#[test]
fn a_node_of_another_cluster_at_a_peers_address_is_refused_on_both_sides() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    a.create_mounted("db");
    a.cli(&["snapshot", "db@one"]).ok();
    let address = b.listen;
    b.stop();
    let mut foreign = Node::init(&cluster.scratch, "foreign", Options { listen: Some(address), ..Options::default() });
    foreign.start();
    let a = &cluster.nodes[0];

    let refused = a.cli(&["push", "db@one", "host-b"]);

    assert_ne!(refused.code, 0);
    refused.says(&["host-b", "cluster"]);
    a.wait_logged("cluster");
    foreign.wait_logged("another cluster");
    assert!(array(&foreign.cli(&["list"]).ok().json()).is_empty());
}

/// Gives a stopped node another identity and starts it again; then pushes to it and to its peer, and returns what both
/// commands say.
fn with_another_identity(cluster: &mut Cluster, make: impl FnOnce(&Authority, &Identity) -> Identity) -> [String; 2] {
    let (a, b) = cluster.pair();
    for node in [&mut *a, &mut *b] {
        node.create_mounted(&format!("of-{}", node.name));
        node.cli(&["snapshot", &format!("of-{}@one", node.name)]).ok();
    }
    b.stop();
    let authority = Authority::load(&a.state.join("authority")).unwrap();
    let folder = b.state.join("identity");
    make(&authority, &Identity::load(&folder).unwrap()).save(&folder).unwrap();
    b.start();
    let to_b = a.cli(&["push", "of-host-a@one", "host-b"]);
    let to_a = b.cli(&["push", "of-host-b@one", "host-a"]);
    [to_b, to_a].map(|refused| {
        assert_ne!(refused.code, 0, "{}", refused.stderr);
        refused.stderr
    })
}

#[test]
fn a_foreign_authority_that_calls_itself_our_cluster_is_refused_on_both_sides() {
    let mut cluster = Cluster::start(2);

    let said = with_another_identity(&mut cluster, |authority, old| {
        let foreign = Authority::create(authority.cluster(), Timestamp::now()).unwrap();
        let key = NewKey::generate().unwrap();
        let request = key.csr_der().unwrap();
        let day = std::time::Duration::from_secs(24 * 3600);
        let issued = foreign.issue(&request, &old.name, Timestamp::now(), day).unwrap();
        Identity::new(key, issued.certificate, foreign.certificate_der().to_vec()).unwrap()
    });

    for words in said {
        assert!(words.contains("not issued by this cluster's authority"), "{words}");
    }
    for node in &cluster.nodes {
        node.wait_logged("not issued by this cluster's authority");
        assert_eq!(array(&node.cli(&["list"]).ok().json()).len(), 1, "nothing arrived at {}", node.name);
    }
}

#[test]
fn an_expired_certificate_is_refused_on_both_sides() {
    let mut cluster = Cluster::start(2);

    let said = with_another_identity(&mut cluster, |authority, old| {
        let day = std::time::Duration::from_secs(24 * 3600);
        let issued = authority.issue(&old.csr_der().unwrap(), &old.name, Timestamp::now() - 3 * day, day).unwrap();
        old.renewed(issued.certificate).unwrap()
    });

    for words in said {
        assert!(words.contains("expired"), "{words}");
    }
    for node in &cluster.nodes {
        node.wait_logged("expired");
        assert_eq!(array(&node.cli(&["list"]).ok().json()).len(), 1, "nothing arrived at {}", node.name);
    }
}

#[test]
fn another_node_at_a_peers_address_is_not_taken_for_it() {
    let mut cluster = Cluster::start(2);
    let (a, b) = cluster.pair();
    a.create_mounted("db");
    a.cli(&["snapshot", "db@one"]).ok();
    let address = b.listen;
    b.stop();
    let options = Options { listen: Some(address), ..Options::default() };
    let mut other = Node::join(&cluster.scratch, "host-c", options, &cluster.nodes[0]);
    other.start();
    let a = &cluster.nodes[0];

    let refused = a.cli(&["push", "db@one", "host-b"]);

    assert_ne!(refused.code, 0);
    refused.says(&["host-b", "node id is not the one"]);
    a.wait_logged("node id is not the one");
    other.wait_logged("node id is not the one");
    assert!(array(&other.cli(&["list"]).ok().json()).is_empty(), "nothing went to the wrong node");
}

#[test]
fn a_name_that_is_taken_is_not_given_to_another_node() {
    let mut cluster = Cluster::start(2);
    let again = cluster.scratch.folder("again");
    let (a, b) = cluster.pair();
    b.stop();
    let token = a.token();

    let mut command =
        flocker_tests::command::flocker(&again, &["--output", "json", "join", &token, "--name", "host-b"]);
    let refused = flocker_tests::Running::start(&mut command).finish(flocker_tests::SHORT);

    assert_ne!(refused.code, 0);
    refused.says(&["has this name"]);
    a.wait_logged("host-b");
}

#[test]
fn only_the_node_with_the_authority_gives_out_tokens() {
    let mut cluster = Cluster::start(2);
    let (_, b) = cluster.pair();

    let refused = b.cli(&["token", "create"]);

    assert_ne!(refused.code, 0);
    refused.says(&["authority"]);
    b.http("POST", "/v1/tokens", Some(&serde_json::json!({}))).is_problem(409, "not_authority");
}

#[test]
fn a_node_is_not_initialised_twice() {
    let scratch = Scratch::new();
    let a = Node::init(&scratch, "host-a", Options::default());
    let before = flocker_tests::tree::Listing::of(&a.state);

    let refused = a.cli(&a.setup_arguments(&["init"]));

    assert_ne!(refused.code, 0);
    flocker_tests::tree::assert_same(&before, &flocker_tests::tree::Listing::of(&a.state));
}
