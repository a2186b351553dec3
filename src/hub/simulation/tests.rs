//! The seeds.

use super::probes::Probes;
use super::run::{Outcome, run};
use super::setup::Setup;
use crate::units::convert::to_u64;
use crate::units::machine;

/// Seeds of a short run.
const SEEDS: u64 = 50;

fn full() -> bool {
    std::env::var_os("MIRRORHUB_FULL").is_some_and(|value| value == "1")
}

/// Runs a seed; a problem is told with all that happened.
fn seed(number: u64) -> Outcome {
    let setup = Setup::of(number);
    let outcome = run(&setup);
    if let Some(problem) = &outcome.problem {
        for event in &outcome.events {
            println!("{event}");
        }
        println!("{setup:#?}");
        panic!("MIRRORHUB_SEED={number}: {problem}");
    }
    outcome
}

/// 50 seeds, 10,000 in the long form, one with `MIRRORHUB_SEED`, some with `MIRRORHUB_SEEDS=a-b`. None finds a broken law, each is in
/// step after its faults, and together they meet every rare branch.
#[test]
fn no_seed_goes_wrong() {
    if let Ok(one) = std::env::var("MIRRORHUB_SEED") {
        let told = tracing_subscriber::fmt().without_time().with_ansi(false);
        let told = told.with_max_level(tracing::Level::DEBUG).try_init();
        assert!(told.is_ok(), "one seed is told with its log");
        let outcome = seed(one.parse().unwrap());
        println!("{:?}", outcome.probes);
        return;
    }
    let (mut seeds, begun) = (if full() { 0..10_000 } else { 0..SEEDS }, machine::now());
    let part = std::env::var("MIRRORHUB_SEEDS").ok();
    if let Some((from, to)) = part.as_ref().and_then(|part| part.split_once('-')) {
        seeds = from.parse().unwrap()..to.parse().unwrap();
    }
    let (mut probes, mut acknowledged, mut virtual_ms) = (Probes::default(), 0, 0);
    let mut bad = Vec::new();
    for number in seeds.clone() {
        let outcome = run(&Setup::of(number));
        probes.add(&outcome.probes);
        acknowledged += outcome.acknowledged;
        virtual_ms += outcome.virtual_ms;
        if let Some(problem) = outcome.problem {
            println!("MIRRORHUB_SEED={number}: {problem}");
            bad.push(number);
        }
    }
    let took = machine::elapsed(begun);
    println!("{seeds:?} seeds, {acknowledged} answers, {} s virtual, {took:?}", virtual_ms / 1000);
    println!("{probes:?}");
    assert!(bad.is_empty(), "{} seeds went wrong: {bad:?}", bad.len());
    assert!(part.is_some() || probes.never().is_empty(), "never met: {:?}", probes.never());
}

/// Failover and failback as well.
#[test]
#[ignore = "what some of its seeds find is not judged yet"]
fn no_seed_with_a_failover_goes_wrong() {
    let seeds = (0..SEEDS).map(|number| (number, run(&Setup::with_failover(number)).problem));
    let bad: Vec<_> = seeds.filter(|(_, problem)| problem.is_some()).collect();
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn the_same_seed_is_the_same_run() {
    for number in [1, 2, 3, 4, 5] {
        let (one, two) = (run(&Setup::of(number)), run(&Setup::of(number)));
        assert_eq!(one.events, two.events, "seed {number}");
        assert_eq!(one.trace, two.trace, "seed {number}");
        assert!(to_u64(one.events.len()) > 0);
    }
    assert_ne!(run(&Setup::of(1)).trace, run(&Setup::of(2)).trace);
}
