//! Each rule that the simulation reaches is switched off, and then some seed goes wrong.
//!
//! The switches are `machine::breaks` in the product: false in every build but this one's.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::run::run_without;
use super::setup::Setup;
use crate::units::machine::simulated::words;

/// Seeds that may be needed.
const SEEDS_MAX: u64 = 300;

/// Rules that are not switched off here, why, and where each has its control.
const ELSEWHERE: &[(u8, &str, Control)] = &[
    (
        5,
        OTHERS_STAND_BEHIND,
        ("control_an_image_that_is_no_past_is_found", "src/session/tests/search.rs"),
    ),
    (
        10,
        "a hub with a faulted source is restarted before its ring is full",
        ("control_r10_nobody_blocks_the_ring", "src/hub/tests/faults.rs"),
    ),
];

/// A test and its file.
type Control = (&'static str, &'static str);

/// Why no seed needs R5: old copies are started here.
const OTHERS_STAND_BEHIND: &str = "an old copy is refused by its generation, brought up from the hub's \
     log, or held back by the number of its CP";

/// Rules that are switched off here, and a seed that noticed last.
const HERE: &[(u8, u64)] = &[
    (1, 28),
    (2, 112),
    (3, 160),
    (4, 8),
    (6, 2),
    (7, 5),
    (8, 6),
    (9, 33),
    (11, 27),
    (12, 3),
    (13, 3),
    (14, 6),
    (15, 0),
    (16, 0),
    (17, 3),
    (18, 61),
    (19, 34),
    (20, 2),
];

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
fn control_r1_the_hub_is_asked_first() {
    control(1);
}

#[test]
fn control_r2_nothing_is_taken_behind_a_fence() {
    control(2);
}

#[test]
fn control_r3_an_older_lap_does_not_count() {
    control(3);
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
fn control_r8_a_new_hole_is_born() {
    control(8);
}

#[test]
fn control_r9_a_leg_that_failed_stays_out() {
    control(9);
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
fn control_r14_the_giver_holds_writes() {
    control(14);
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
fn control_r17_a_flush_waits() {
    control(17);
}

#[test]
fn control_r18_no_room_is_no_refusal() {
    control(18);
}

#[test]
fn control_r19_a_refused_cp_is_sent_again() {
    control(19);
}

#[test]
fn control_r20_a_cp_that_changes_nothing_is_one() {
    control(20);
}

#[test]
fn every_rule_is_accounted_for() {
    let here = HERE.iter().map(|rule| rule.0);
    let mut all: Vec<u8> = here.chain(ELSEWHERE.iter().map(|rule| rule.0)).collect();
    all.sort_unstable();
    assert_eq!(all, (1..=20).collect::<Vec<u8>>());
    assert!(ELSEWHERE.iter().all(|(_, why, _)| !why.is_empty()));
    for (rule, _, control) in ELSEWHERE {
        assert!(is_there(control), "R{rule}: no test {} in {}", control.0, control.1);
    }
    let own = include_str!("rules.rs");
    for (rule, _) in HERE {
        let runs = format!("    control({rule});");
        assert!(own.contains(&format!("fn control_r{rule}_")) && own.contains(&runs), "R{rule}");
    }
    assert!(!is_there(&("control_that_nobody_wrote", ELSEWHERE[0].2.1)));
}

/// Whether the file has that test.
fn is_there((name, file): &Control) -> bool {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file));
    text.unwrap_or_default().contains(&format!("#[test]\nfn {name}()"))
}
