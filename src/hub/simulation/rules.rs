//! Each rule that the simulation reaches is switched off, and then some seed goes wrong.
//!
//! The switches are `machine::breaks` in the product: false in every build but this one's.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::run::run_without;
use super::setup::Setup;
use crate::units::machine::simulated::words;

/// Seeds that may be needed.
const SEEDS_MAX: u64 = 300;

/// Rules that are not switched off here, why, and where each has its control.
const ELSEWHERE: &[(u8, &str, &str)] = &[
    (
        1,
        "what only the hub holds was never answered: no record rots here",
        "session::tests::search",
    ),
    (2, "it has no switch yet", "hub::tests::failover"),
    (
        3,
        "no record rots here, so all that is bad is torn",
        "record::scan::tests, nvlog::tests::crash",
    ),
    (5, "no state is restored from an old copy", "session::tests::search, hub::tests::restart"),
    (8, "births change what a pass sends, not what it ends with", "volume::tests::births"),
    (9, "it has no switch yet", "raid::tests, pool::tests"),
    (10, "a faulted source is restarted before the ring is full", "hub::tests::faults"),
    (14, "it has no switch yet", "hub::tests::failback"),
    (17, "every write here is answered as FUA is", "filer::tests::loss"),
    (18, "it has no switch yet", "volume::tests::space"),
    (19, "no CP of an honest source is refused", "session::tests::search"),
    (20, "it is many small ones", "hub::tests, filer::tests"),
];

/// Rules that are switched off here, and a seed that noticed last.
const HERE: &[(u8, u64)] = &[(4, 0), (6, 0), (7, 0), (11, 27), (12, 3), (13, 3), (15, 0), (16, 0)];

/// The first seed from `first` on that goes wrong with a rule off, and how.
fn broken(rule: u8, first: u64) -> Option<(u64, String)> {
    (first..first + SEEDS_MAX).find_map(|seed| {
        let run = || run_without(&Setup::of(seed), Some(rule)).problem;
        let ended = catch_unwind(AssertUnwindSafe(run));
        let problem = ended.unwrap_or_else(|panic| Some(words(&*panic)));
        problem.map(|problem| (seed, problem))
    })
}

#[track_caller]
fn control(rule: u8) {
    let first = HERE.iter().find(|here| here.0 == rule).map_or(0, |here| here.1);
    let found = broken(rule, first);
    println!("R{rule}: {found:?}");
    assert!(found.is_some(), "R{rule} is off, and {SEEDS_MAX} seeds do not notice");
}

#[test]
fn control_r4_the_mark_of_being_alone() {
    control(4);
}

#[test]
fn control_r6_a_freeze_is_repeated() {
    control(6);
}

#[test]
fn control_r7_acknowledged_is_durable() {
    control(7);
}

#[test]
fn control_r11_released_when_synced() {
    control(11);
}

#[test]
fn control_r12_fenced_serves_nobody() {
    control(12);
}

#[test]
fn control_r13_a_failover_is_resumed() {
    control(13);
}

#[test]
fn control_r15_which_transfer_an_ordinal_names() {
    control(15);
}

#[test]
fn control_r16_a_trim_leaves_its_edges() {
    control(16);
}

#[test]
fn every_rule_is_accounted_for() {
    let here = HERE.iter().map(|rule| rule.0);
    let mut all: Vec<u8> = here.chain(ELSEWHERE.iter().map(|rule| rule.0)).collect();
    all.sort_unstable();
    assert_eq!(all, (1..=20).collect::<Vec<u8>>());
    assert!(ELSEWHERE.iter().all(|(_, why, place)| !why.is_empty() && !place.is_empty()));
}
