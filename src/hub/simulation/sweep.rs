//! Each write, sync and name of a short run fails once: torn, with an error, for want of room, with
//! the process or with the power.
//!
//! The run is [`Setup::scenario`]: writes, CPs, both ends killed once. What has to hold is what holds
//! in every run ([`super::laws`]): what was answered is there after a restart, what was published
//! stays, everything comes into step; and the failure is told with the device that it is of.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::run::run_without;
use super::setup::{Setup, Store, Sweep};
use crate::device::sim::Effect;
use crate::units::machine::simulated::words;
use crate::units::{is_full, machine};

/// The end of a sweep if calls never ran out.
const CALLS_MAX: u64 = 100_000;

/// What the call does, and whether the power goes with the process.
const EFFECTS: [(Effect, bool); 5] = [
    (Effect::Errno(5), false),
    (Effect::Errno(28), false),
    (Effect::PowerCut, true),
    (Effect::PowerCut, false),
    (Effect::Short(512), false),
];

/// Of how many calls one is swept in the short form.
const STRIDE: u64 = 6;

fn stride() -> u64 {
    if is_full() { 1 } else { STRIDE }
}

/// What went wrong, and whether the call came.
fn run(sweep: Sweep, rule: Option<u8>) -> (Option<String>, bool) {
    let run = || run_without(&Setup::scenario(sweep, sweep.nth.is_multiple_of(2)), rule);
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcome) => (outcome.problem, outcome.swept),
        Err(panic) => (Some(words(&*panic)), true),
    }
}

/// Runs until calls run out, every `stride`-th; says how many came, and which went wrong.
fn sweep(store: Store, stride: u64) -> (u64, Vec<(Sweep, String)>) {
    let (mut came, mut bad) = (0, Vec::new());
    for (at, (effect, power)) in (0..).zip(EFFECTS) {
        for lives in [0, 1] {
            // Each takes other calls.
            let first = (at * 3 + u64::from(lives) * 7) % stride;
            for nth in (first..CALLS_MAX).step_by(usize::try_from(stride).unwrap()) {
                let sweep = Sweep { store, lives, nth, effect, power };
                let (problem, swept) = run(sweep, None);
                bad.extend(problem.map(|problem| (sweep, problem)));
                if !swept {
                    break;
                }
                came += 1;
            }
        }
    }
    (came, bad)
}

#[track_caller]
fn nothing_is_lost(store: Store, calls_min: u64) {
    let begun = machine::now();
    let (came, bad) = sweep(store, stride());
    println!("{store:?}: {came} calls failed, {:?}", machine::elapsed(begun));
    assert!(bad.is_empty(), "{bad:#?}");
    assert!(came * stride() >= calls_min, "{came} calls came");
}

#[test]
fn no_call_of_a_sources_nvram_loses_anything() {
    nothing_is_lost(Store::SourceRing, 60);
}

#[test]
fn no_call_of_a_sources_pool_loses_anything() {
    nothing_is_lost(Store::SourcePool, 60);
}

#[test]
fn no_call_of_the_hubs_nvram_loses_anything() {
    nothing_is_lost(Store::HubRing, 60);
}

#[test]
fn no_call_of_the_hubs_pool_loses_anything() {
    nothing_is_lost(Store::HubPool, 60);
}

#[test]
fn no_call_of_the_hubs_logs_loses_anything() {
    nothing_is_lost(Store::HubFiles, 60);
}

/// Its logs took no more writes, it got no credit, and nobody was told why.
#[test]
fn a_log_that_cannot_be_deleted_faults_its_source() {
    let (effect, power) = (Effect::Errno(5), false);
    let sweep = Sweep { store: Store::HubFiles, lives: 1, nth: 23, effect, power };
    assert_eq!(run(sweep, None), (None, true));
}

/// What is acknowledged before it is durable is lost by some of these.
#[test]
fn control_a_sweep_finds_an_early_answer() {
    let cuts = (0..CALLS_MAX).map(|nth| {
        let effect = Effect::PowerCut;
        let sweep = Sweep { store: Store::HubRing, lives: 0, nth, effect, power: true };
        run(sweep, Some(7))
    });
    let mut cuts = cuts.take_while(|(_, came)| *came);
    assert!(cuts.any(|(problem, _)| problem.is_some()), "no cut of the ring notices");
}
