//! Long random histories: what a breadth-first search is too short for.
//!
//! A walk does thousands of steps with faults among them; now and then the faults stop, and both
//! ends must be in step within a bounded number of steps. Its seed is printed; `MIRRORHUB_SEED=n`
//! runs that one alone, `MIRRORHUB_FULL=1` many and longer ones.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};

use super::search::advance;
use super::world::{Budget, Faults, Step, World};
use crate::units::is_full;

/// Steps without a fault after which both ends are in step.
const SETTLE_STEPS_MAX: usize = 4000;
/// Steps shown when a walk fails.
const SHOWN: usize = 80;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).unwrap();
        usize::try_from(self.next() % bound).unwrap()
    }
}

struct Walk {
    seed: u64,
    chance: Chance,
    world: World,
    last: VecDeque<Step>,
    steps: usize,
    faults: usize,
}

impl Walk {
    fn new(seed: u64, faults: Faults, lying: bool) -> Self {
        let mut chance = Chance(seed);
        let frames = u32::try_from(chance.below(3) + 1).unwrap();
        let credit = 10 * u64::try_from(chance.below(4) + 1).unwrap();
        // Every other walk goes on alone when the hub is lost.
        let losses = u32::from(!lying && seed % 2 == 1);
        let world = World::new(faults, Budget { losses, ..Budget::default() }, (frames, credit));
        Self { seed, chance, world, last: VecDeque::new(), steps: 0, faults: 0 }
    }

    /// What went wrong, with the way there.
    fn problem(&self) -> Option<String> {
        let problem = self.world.problem.as_ref()?;
        let (seed, steps, faults) = (self.seed, self.steps, self.faults);
        let way: Vec<String> = self.last.iter().map(|step| format!("{step:?}")).collect();
        let way = way.join(" ");
        Some(format!("{problem}\n  MIRRORHUB_SEED={seed}, step {steps}, {faults} faults: {way}"))
    }

    fn step(&mut self, from: &[Step]) {
        let step = from[self.chance.below(from.len())];
        if self.last.len() == SHOWN {
            self.last.pop_front();
        }
        self.last.push_back(step);
        self.steps += 1;
        self.faults += usize::from(step.is_fault());
        advance(&mut self.world, step);
    }

    /// Some hundred steps with faults, then enough without.
    fn round(&mut self, lying: bool) {
        let continues = self.world.source.continues;
        // The last record of a source that promises less than `sync` may be nowhere else: where it
        // rots nobody can tell (R1). So a walk has either rot or other policies.
        let reloads = self.seed.is_multiple_of(4);
        let few = |chance: &mut Chance, bound| u32::try_from(chance.below(bound)).unwrap();
        self.world.budget = Budget {
            writes: few(&mut self.chance, 60),
            cps: few(&mut self.chance, 12),
            cuts: few(&mut self.chance, 6),
            source_crashes: few(&mut self.chance, 4),
            hub_crashes: few(&mut self.chance, 4),
            // Twice before all is on the hub would need a resync; with the hub away it can lose the
            // last write, which cannot be closed (R1).
            rots: if continues || reloads { 0 } else { few(&mut self.chance, 2) },
            // Three of one CP are the end (R19).
            rejects: few(&mut self.chance, 3),
            no_space: few(&mut self.chance, 4),
            drops: if lying { few(&mut self.chance, 4) } else { 0 },
            repeats: if lying { few(&mut self.chance, 4) } else { 0 },
            credits: few(&mut self.chance, 20),
            losses: if continues { few(&mut self.chance, 4) } else { 0 },
            // A policy without `continue` beside one with it is what the search is for.
            reloads: if continues || !reloads { 0 } else { few(&mut self.chance, 3) },
            restores: 0,
        };
        let noisy = 100 + self.chance.below(600);
        for _ in 0..noisy {
            let steps = self.world.enabled();
            let (faults, others): (Vec<Step>, Vec<Step>) =
                steps.into_iter().partition(|step| step.is_fault());
            let fault = !faults.is_empty() && self.chance.below(40) == 0;
            match (fault || others.is_empty(), faults.is_empty()) {
                (true, false) => self.step(&faults),
                (true, true) => break,
                (false, _) => self.step(&others),
            }
            if self.world.problem.is_some() {
                return;
            }
        }
        self.settle();
    }

    fn settle(&mut self) {
        let left = self.world.budget;
        self.world.budget = Budget { cps: left.cps, ..Budget::default() };
        // A source that was promised nothing may hold on to credit 0: the last word is credit.
        if self.world.hub.up.as_ref().is_some_and(|up| up.log_credit == 0) {
            self.world.budget.credits = 1;
            self.step(&[Step::Credit]);
        }
        for _ in 0..SETTLE_STEPS_MAX {
            let mut steps = self.world.enabled();
            steps.retain(|step| !step.is_fault());
            if self.world.problem.is_some() || steps.is_empty() {
                break;
            }
            self.step(&steps);
        }
        if self.world.problem.is_none() && !self.world.has_converged() {
            self.world.fail(format!("not in step {SETTLE_STEPS_MAX} steps after the last fault"));
        }
        self.world.link_lied = false;
    }
}

fn walk(seed: u64, faults: Faults, lying: bool, rounds: usize) -> Result<Walk, String> {
    let mut walk = Walk::new(seed, faults, lying);
    for _ in 0..rounds {
        walk.round(lying);
        if let Some(problem) = walk.problem() {
            return Err(problem);
        }
    }
    Ok(walk)
}

fn seeds() -> Vec<u64> {
    if let Ok(seed) = std::env::var("MIRRORHUB_SEED") {
        return vec![seed.parse().unwrap()];
    }
    let fresh = RandomState::new().build_hasher().finish();
    (1..if is_full() { 400 } else { 20 }).chain([fresh]).collect()
}

#[test]
fn long_histories_keep_every_promise_and_come_to_rest() {
    for lying in [false, true] {
        for seed in seeds() {
            let rounds = if is_full() { 400 } else { 40 };
            let walk = match walk(seed, Faults::default(), lying, rounds) {
                Ok(walk) => walk,
                Err(problem) => panic!("{problem}"),
            };
            let cps = walk.world.committed.len();
            println!("seed {seed}: {} steps, {} faults, {cps} CPs", walk.steps, walk.faults);
            assert!(walk.faults > rounds && cps > rounds, "the walk went nowhere");
        }
    }
}

/// The walk finds what the search finds.
#[test]
fn control_a_walk_finds_a_broken_rule() {
    let faults = [
        Faults { ack_before_durable: true, ..Faults::default() },
        Faults { end_before_commit: true, ..Faults::default() },
        Faults { welcome_before_durable: true, ..Faults::default() },
        Faults { alone_before_mark: true, ..Faults::default() },
        Faults { mark_cleared_early: true, ..Faults::default() },
        Faults { drop_before_publish: true, ..Faults::default() },
    ];
    for faults in faults {
        let found = (1..20).any(|seed| walk(seed, faults, false, 10).is_err());
        assert!(found, "{faults:?}");
    }
}
