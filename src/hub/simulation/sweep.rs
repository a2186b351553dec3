//! Each write, sync and name of a short run fails once: torn, with an error, for want of room, with
//! the process or with the power.
//!
//! The run is [`Setup::scenario`]: writes, CPs, both ends killed once. What has to hold is what holds
//! in every run ([`super::laws`]): what was answered is there after a restart, what was published
//! stays, everything comes into step; and the failure is told with the device that it is of.

use std::collections::BTreeMap;
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

/// Whether the source waits for the sync of its log when that call fails; in the long form both.
fn promises(store: Store, nth: u64) -> &'static [bool] {
    match store {
        Store::SourceRing | Store::SourcePool | Store::HubRing | Store::HubPool => &[false],
        Store::HubFiles if is_full() => &[false, true],
        Store::HubFiles if nth % 3 == 1 => &[true],
        Store::HubFiles => &[false],
    }
}

/// What went wrong, and what kind of call it was, if it came.
fn run(sweep: Sweep, rule: Option<u8>) -> (Option<String>, Option<String>) {
    let run = || run_without(&Setup::scenario(sweep, sweep.nth.is_multiple_of(2)), rule);
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcome) => (outcome.problem, outcome.swept),
        Err(panic) => (Some(words(&*panic)), Some("panic".to_owned())),
    }
}

/// What a sweep reached.
#[derive(Debug, Default)]
struct Reached {
    /// Calls by kind.
    kinds: BTreeMap<String, u64>,
    /// Calls by effect, whether the power goes, and life.
    ways: BTreeMap<(String, bool, u32), u64>,
    bad: Vec<(Sweep, String)>,
}

/// Runs until calls run out, every `stride`-th.
fn sweep(store: Store, stride: u64) -> Reached {
    let mut reached = Reached::default();
    for (at, (effect, power)) in (0..).zip(EFFECTS) {
        for lives in [0, 1] {
            let way = reached.ways.entry((format!("{effect:?}"), power, lives)).or_default();
            // Each takes other calls; together they take every one of them.
            let first = (at * 5 + u64::from(lives)) % stride;
            for nth in (first..CALLS_MAX).step_by(usize::try_from(stride).unwrap()) {
                let before = *way;
                for &filed in promises(store, nth) {
                    let sweep = Sweep { store, lives, nth, effect, power, filed };
                    let (problem, kind) = run(sweep, None);
                    reached.bad.extend(problem.map(|problem| (sweep, problem)));
                    let Some(kind) = kind else { continue };
                    *reached.kinds.entry(kind).or_default() += 1;
                    *way += 1;
                }
                if *way == before {
                    break;
                }
            }
        }
    }
    reached
}

impl Reached {
    /// Each kind of call that a store has came at least so often, counted for all of them, and so did
    /// each way in which they fail; no other kind came.
    fn is_enough(
        &self,
        stride: u64,
        ways_min: u64,
        kinds_min: &[(&str, u64)],
    ) -> Result<(), String> {
        if self.ways.len() != EFFECTS.len() * 2 {
            return Err(format!("{} ways", self.ways.len()));
        }
        for (way, came) in &self.ways {
            if came * stride < ways_min {
                return Err(format!("{way:?}: {came} calls came"));
            }
        }
        for (kind, least) in kinds_min {
            let came = self.kinds.get(*kind).copied().unwrap_or_default();
            if came * stride < *least {
                return Err(format!("{kind}: {came} calls came"));
            }
        }
        let named = |kind: &String| kinds_min.iter().any(|(known, _)| kind == known);
        match self.kinds.keys().find(|kind| !named(kind)) {
            Some(kind) => Err(format!("{kind} is not accounted for")),
            None => Ok(()),
        }
    }
}

#[track_caller]
fn nothing_is_lost(store: Store, ways_min: u64, kinds_min: &[(&str, u64)]) {
    let begun = machine::now();
    let reached = sweep(store, stride());
    println!("{store:?}: {:?}, {:?}", reached.kinds, machine::elapsed(begun));
    println!("{:?}", reached.ways);
    assert!(reached.bad.is_empty(), "{:#?}", reached.bad);
    assert_eq!(reached.is_enough(stride(), ways_min, kinds_min), Ok(()));
}

#[test]
fn no_call_of_a_sources_nvram_loses_anything() {
    nothing_is_lost(Store::SourceRing, 12, &[("WriteDurable", 150)]);
}

#[test]
fn no_call_of_a_sources_pool_loses_anything() {
    let kinds = [("Flush", 100), ("Write", 350), ("WriteDurable", 24)];
    nothing_is_lost(Store::SourcePool, 36, &kinds);
}

#[test]
fn no_call_of_the_hubs_nvram_loses_anything() {
    nothing_is_lost(Store::HubRing, 6, &[("WriteDurable", 120)]);
}

#[test]
fn no_call_of_the_hubs_pool_loses_anything() {
    let kinds = [("Flush", 100), ("Write", 250), ("WriteDurable", 24)];
    nothing_is_lost(Store::HubPool, 18, &kinds);
}

#[test]
fn no_call_of_the_hubs_logs_loses_anything() {
    let kinds = [
        ("Allocate", 6),
        ("Create", 0),
        ("List", 6),
        ("MakeDir", 6),
        ("Open", 6),
        ("Remove", 6),
        ("Rename", 12),
        ("ShortWrite", 90),
        ("Sync", 48),
        ("SyncAll", 0),
        ("SyncDir", 12),
        ("Truncate", 0),
        ("Write", 90),
    ];
    nothing_is_lost(Store::HubFiles, 18, &kinds);
}

/// A sweep that reaches nothing, or less than there is, or not in each way, is not enough; nor is a call
/// that never comes one that came.
#[test]
fn control_a_sweep_that_reaches_little_fails() {
    let (effect, power) = (Effect::Errno(5), false);
    let never =
        Sweep { store: Store::HubRing, lives: 0, nth: CALLS_MAX, effect, power, filed: false };
    assert_eq!(run(never, None), (None, None));
    let mut reached = Reached::default();
    let kinds = [("Write", 12)];
    assert!(reached.is_enough(1, 0, &kinds).is_err(), "nothing was tried");
    for (effect, power) in EFFECTS {
        for lives in [0, 1] {
            reached.ways.insert((format!("{effect:?}"), power, lives), 2);
        }
    }
    assert!(reached.is_enough(6, 0, &kinds).is_err(), "no write came");
    reached.kinds.insert("Write".to_owned(), 2);
    assert_eq!(reached.is_enough(6, 12, &kinds), Ok(()));
    assert!(reached.is_enough(1, 0, &kinds).is_err(), "of all writes two came");
    assert!(reached.is_enough(6, 13, &kinds).is_err(), "each way took two");
    assert!(reached.is_enough(6, 12, &[]).is_err(), "a kind that nobody knows of");
}

/// Its logs took no more writes, it got no credit, and nobody was told why.
#[test]
fn a_log_that_cannot_be_deleted_faults_its_source() {
    let (effect, power) = (Effect::Errno(5), false);
    let sweep = Sweep { store: Store::HubFiles, lives: 1, nth: 24, effect, power, filed: false };
    let (problem, kind) = run(sweep, None);
    assert_eq!((problem, kind.as_deref()), (None, Some("Remove")));
}

/// What is acknowledged before it is durable is lost by some of these.
#[test]
fn control_a_sweep_finds_an_early_answer() {
    let cuts = (0..CALLS_MAX).map(|nth| {
        let effect = Effect::PowerCut;
        let store = Store::HubRing;
        let sweep = Sweep { store, lives: 0, nth, effect, power: true, filed: false };
        run(sweep, Some(7))
    });
    let mut cuts = cuts.take_while(|(_, kind)| kind.is_some());
    assert!(cuts.any(|(problem, _)| problem.is_some()), "no cut of the ring notices");
}
