//! The simulation: 3 to 5 real nodes in one process, over a simulated network and pools in memory, with everything that can go wrong
//! chosen by a seed. See docs/SIMULATION.md.
//!
//! `FLOCKER_SIM_SEED=N cargo nextest run -p flocker-node --test simulation` runs one seed and tells its story;
//! `FLOCKER_SIM_SEEDS=A..B` runs others than those of CI.
#![allow(clippy::unwrap_used)]

mod fate;
mod invariants;
mod network;
mod scenario;
mod world;

/// The seeds of CI.
const SEEDS: std::ops::Range<u64> = 0..32;

fn reproduce(seed: u64) -> String {
    format!("FLOCKER_SIM_SEED={seed} cargo nextest run -p flocker-node --test simulation every_seed_keeps")
}

#[test]
fn every_seed_keeps_what_was_acknowledged_and_comes_to_rest() {
    let one = std::env::var("FLOCKER_SIM_SEED").ok().map(|seed| seed.parse().expect("FLOCKER_SIM_SEED is a number"));
    let some = std::env::var("FLOCKER_SIM_SEEDS").ok().map(|text| {
        let (from, to) = text.split_once("..").expect("FLOCKER_SIM_SEEDS is FROM..TO");
        from.parse().expect("a number")..to.parse().expect("a number")
    });
    if one.is_some() || std::env::var_os("FLOCKER_SIM_LOG").is_some() {
        let filter = std::env::var("FLOCKER_SIM_LOG").unwrap_or("warn".to_owned());
        tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().init();
    }
    let seeds = one.map_or(some.unwrap_or(SEEDS), |seed: u64| seed..seed + 1);
    let mut failed = Vec::new();
    for seed in seeds {
        let began = std::time::Instant::now();
        let (report, outcome) = scenario::run(seed, None);
        if one.is_some() {
            println!("{}", report.story);
        }
        println!(
            "seed {seed}: {} snapshots, {} transfers done, {} deaths, {:.1} s: {}",
            report.snapshots,
            report.transfers_done,
            report.deaths,
            began.elapsed().as_secs_f64(),
            outcome.as_ref().err().map_or("holds", String::as_str),
        );
        if let Err(why) = outcome {
            failed.push(format!("seed {seed}: {why}\n    {}", reproduce(seed)));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
