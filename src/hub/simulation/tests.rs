//! The seeds.

use super::probes::Probes;
use super::run::{Outcome, run};
use super::setup::Setup;
use crate::units::convert::to_u64;
use crate::units::machine;

/// Seeds of a short run, all tests together.
const SEEDS: u64 = 300;
const SEEDS_FULL: u64 = 10_000;
/// Tests among which they are shared out.
const SHARES: u64 = 5;

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

/// Runs seeds and tells those that went wrong.
fn seeds(seeds: std::ops::Range<u64>) -> Probes {
    let begun = machine::now();
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
    probes
}

/// A share of 300 seeds, or of 10,000 in the long form. None finds a broken law, and each is in step
/// after its faults. In the long form the seeds of a share together meet every rare branch.
fn share(number: u64) {
    let each = if full() { SEEDS_FULL } else { SEEDS } / SHARES;
    let never = seeds(number * each..(number + 1) * each).never();
    assert!(!full() || never.is_empty(), "never met: {never:?}");
}

#[test]
fn no_seed_goes_wrong_1() {
    share(0);
}

#[test]
fn no_seed_goes_wrong_2() {
    share(1);
}

#[test]
fn no_seed_goes_wrong_3() {
    share(2);
}

#[test]
fn no_seed_goes_wrong_4() {
    share(3);
}

#[test]
fn no_seed_goes_wrong_5() {
    share(4);
}

/// For a person: one with `MIRRORHUB_SEED`, told with its log, or some with `MIRRORHUB_SEEDS=a-b`.
#[test]
fn the_seeds_that_are_asked_for() {
    if let Ok(one) = std::env::var("MIRRORHUB_SEED") {
        let told = tracing_subscriber::fmt().without_time().with_ansi(false);
        let told = told.with_max_level(tracing::Level::DEBUG).try_init();
        assert!(told.is_ok(), "one seed is told with its log");
        let outcome = seed(one.parse().unwrap());
        println!("{:?}", outcome.probes);
    }
    let some = std::env::var("MIRRORHUB_SEEDS").ok();
    if let Some((from, to)) = some.as_ref().and_then(|some| some.split_once('-')) {
        seeds(from.parse().unwrap()..to.parse().unwrap());
    }
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
