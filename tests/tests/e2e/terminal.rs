//! What a user sees on a terminal while a transfer runs.

use flocker_tests::{
    LONG,
    command::flocker,
    data::write_random,
    invariants::array,
    terminal::{OnTerminal, screen},
    wait_until,
};

use crate::interrupted::behind_a_line;

const MEBIBYTE: u64 = 1 << 20;

#[test]
fn a_push_draws_a_bar_with_bytes_rate_and_time_left_and_clears_it_at_the_end() {
    let (mut cluster, proxy) = behind_a_line(flocker_tests::Scratch::new());
    let (a, _) = cluster.pair();
    let mount = a.create_mounted("db");
    write_random(&mount.join("data"), 71, 40 * MEBIBYTE);
    a.cli(&["snapshot", "db@one"]).ok();
    proxy.limit(10 * MEBIBYTE);

    let running = OnTerminal::start(&mut flocker(&a.state, &["push", "db@one", "host-b"]));
    let api = wait_until("the transfer's resource shows progress", LONG, || {
        let transfer = array(&a.cli(&["transfers"]).ok().json()).into_iter().next()?;
        (transfer["progress"]["delta_bytes"].as_u64()? > 5 * MEBIBYTE).then_some(transfer)
    });
    let (code, sent) = running.finish(LONG);

    assert_eq!(code, 0, "{sent}");
    assert_eq!(api["progress"]["expected_bytes"].as_u64().unwrap() / MEBIBYTE, 40, "{api}");
    // Each drawing is one state of the bar; the middle ones have all there is to know.
    let full = |drawing: &&str| {
        ["db@one → host-b", "[=", ">", "] ", " MiB of 40.0 MiB, ", "MiB/s, ", " s left"]
            .iter()
            .all(|part| drawing.contains(part))
    };
    let drawings: Vec<_> = sent.split('\r').filter(full).collect();
    assert!(drawings.len() >= 5, "{} full drawings in {sent:?}", drawings.len());
    let lengths: Vec<_> = drawings.iter().map(|drawing| drawing.matches('=').count()).collect();
    assert!(lengths.is_sorted() && lengths.first() < lengths.last(), "the bar grows: {lengths:?}");
    let left = screen(&sent);
    assert_eq!(left.len(), 1, "the bar is gone, the end line stays: {left:?}");
    assert!(left[0].starts_with("db@one → host-b: ") && left[0].contains("on the wire"), "{left:?}");
}

#[test]
fn quiet_draws_nothing_on_a_terminal() {
    let mut cluster = flocker_tests::Cluster::start(2);
    let (a, _) = cluster.pair();
    a.create_mounted("db");
    a.cli(&["snapshot", "db@one"]).ok();

    let (code, sent) = OnTerminal::start(&mut flocker(&a.state, &["--quiet", "push", "db@one", "host-b"])).finish(LONG);

    assert_eq!((code, screen(&sent)), (0, Vec::new()), "{sent:?}");
}
