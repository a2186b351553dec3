//! Random histories against a model: devices fail, lie, go missing, and the power goes.
//!
//! The test is what the pool is to an array: it knows of each block what it should be, tries the
//! other copies when it is not, and has the bad place rewritten.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Rig, SHAPES, block, read_block, version_of};
use crate::device::Device;
use crate::device::sim::{Chance, Effect, On, SimDevice};
use crate::raid::array::Array;
use crate::raid::layout::{Level, data_start};
use crate::raid::rebuild::Step;
use crate::units::convert::{to_u64, to_usize};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

const STRIPES: u64 = 12;
const STEPS: u64 = 60;

/// What a block may be.
#[derive(Debug, Clone, Default)]
struct Known {
    /// Flushed.
    durable: u64,
    /// Written since, oldest first.
    since: Vec<u64>,
    /// A whole stripe with it was written since.
    whole: bool,
    /// A cut may have left anything.
    unknown: bool,
}

struct History {
    rig: Rig,
    array: Arc<Array>,
    level: Level,
    chance: Chance,
    known: Vec<Known>,
    version: u64,
    /// Devices that failed or are missing.
    out: BTreeSet<usize>,
    /// Lies told since the last scrub.
    lies: usize,
    /// Of all kinds, for the sum of the test.
    met: Met,
}

#[derive(Debug, Default)]
struct Met {
    cuts: u64,
    lies: u64,
    failed: u64,
    repaired: u64,
    replaced: u64,
}

impl History {
    fn new(level: Level, members: usize, seed: u64) -> Self {
        let rig = Rig::blank(members, STRIPES);
        let array = rig.create(level);
        let blocks = to_usize(array.size().0 / BLOCK_BYTES_U64);
        Self {
            rig,
            array,
            level,
            chance: Chance::new(seed),
            known: vec![Known::default(); blocks],
            version: 0,
            out: BTreeSet::new(),
            lies: 0,
            met: Met::default(),
        }
    }

    fn blocks(&self) -> u64 {
        to_u64(self.known.len())
    }

    /// Devices that it can do without now. While one of two parities is used for that, a lie is
    /// still found, but a write beside it may not be mended: see `docs/crash.md`.
    fn losses(&self) -> usize {
        let lies = if self.level == Level::Mirror { self.lies } else { 2 * self.lies };
        self.level.spare(self.rig.sims.len()).saturating_sub(self.out.len() + lies)
    }

    /// Lies that it bears now.
    fn bears_a_lie(&self) -> bool {
        let spare = self.level.spare(self.rig.sims.len());
        let whole = self.level == Level::Mirror || self.out.is_empty();
        whole && self.out.len() + self.lies < spare
    }

    fn step(&mut self) {
        match self.chance.below(21) {
            0..8 => self.write(),
            8..11 => self.flush(),
            11..14 => self.check_some(),
            14 => self.fail_one(),
            15 | 16 => self.lie(),
            17 => self.scrub(),
            20 => self.replace(),
            _ => self.cut(),
        }
    }

    fn write(&mut self) {
        let stripe = self.array.stripe().0 / BLOCK_BYTES_U64;
        let first = self.chance.below(self.blocks());
        let (first, count) = match self.chance.below(3) {
            0 => (first / stripe * stripe, stripe * (1 + self.chance.below(2))),
            1 => (first, 1 + self.chance.below(2 * stripe)),
            _ => (first, 1 + self.chance.below(3)),
        };
        let count = count.min(self.blocks() - first);
        self.version += 1;
        let version = self.version;
        let bytes: Vec<u8> = (first..first + count).flat_map(|n| block(n, version)).collect();
        // Before it is known whether it was done: a cut may leave it either way.
        for number in first..first + count {
            let start = number / stripe * stripe;
            let whole = first <= start && start + stripe <= first + count;
            let known = &mut self.known[to_usize(number)];
            known.since.push(version);
            known.whole |= whole;
        }
        let offset = first * BLOCK_BYTES_U64;
        let durable = self.chance.below(5) == 0;
        let done = if durable {
            self.array.write_durable_at(offset, &bytes)
        } else {
            self.array.write_at(offset, &bytes)
        };
        match done {
            Ok(()) if durable => self.flushed(),
            Ok(()) => {}
            Err(error) => self.must_be_off(&error),
        }
    }

    fn flush(&mut self) {
        match self.array.flush() {
            Ok(()) => self.flushed(),
            Err(error) => self.must_be_off(&error),
        }
    }

    fn must_be_off(&self, error: &crate::device::DeviceError) {
        assert!(self.rig.supply.is_off(), "{error}");
    }

    fn flushed(&mut self) {
        for known in &mut self.known {
            if let Some(last) = known.since.last() {
                *known = Known { durable: *last, ..Known::default() };
            }
        }
    }

    /// The power goes, at once or in the middle of what comes next, and comes back.
    fn cut(&mut self) {
        self.rig.supply.cut_at(self.chance.below(30));
        for _ in 0..6 {
            if self.chance.below(2) == 0 {
                self.write()
            } else {
                self.flush()
            }
            if self.rig.supply.is_off() {
                break;
            }
        }
        self.rig = self.rig.cut(self.chance.next_u64());
        self.met.cuts += 1;
        for known in &mut self.known {
            known.unknown |= known.whole;
        }
        if self.losses() > 0 && self.chance.below(2) == 0 {
            let place = to_usize(self.chance.below(to_u64(self.rig.sims.len())));
            self.out.insert(place);
        }
        // Some that are stale are there again.
        let chance = &mut self.chance;
        let missing: Vec<usize> = self.out.iter().copied().collect();
        let missing = match chance.below(2) {
            // Only those of which the others know.
            0 if self.met.failed > 0 => {
                drop(self.rig.open(&missing));
                Vec::new()
            }
            _ => missing,
        };
        self.array = self.rig.open(&missing);
        self.settle_model();
    }

    /// What was not flushed is what it is now.
    fn settle_model(&mut self) {
        for number in 0..self.blocks() {
            let known = self.known[to_usize(number)].clone();
            if known.since.is_empty() && !known.unknown {
                continue;
            }
            let met = self.read_right(number, |version| {
                version == known.durable || known.since.contains(&version)
            });
            let known = &mut self.known[to_usize(number)];
            match met {
                Some(version) => *known = Known { durable: version, ..Known::default() },
                None => {
                    assert!(known.unknown, "block {number} is lost, it was {known:?}");
                    *known = Known { unknown: true, ..Known::default() };
                }
            }
        }
    }

    /// Reads a block, tries the other copies if it is not right, and repairs it.
    fn read_right(&mut self, number: u64, right: impl Fn(u64) -> bool) -> Option<u64> {
        let seen = read_block(&self.array, number).unwrap();
        if let Some(version) = version_of(number, &seen).filter(|version| right(*version)) {
            return Some(version);
        }
        let offset = number * BLOCK_BYTES_U64;
        for nth in 0..self.array.alternatives() {
            let mut bytes = [0; BLOCK_BYTES];
            if self.array.read_alternative(nth, offset, &mut bytes).is_ok()
                && let Some(version) = version_of(number, &bytes).filter(|version| right(*version))
            {
                self.array.repair_at(offset, &seen, &bytes).unwrap();
                self.met.repaired += 1;
                return Some(version);
            }
        }
        None
    }

    fn check(&mut self, number: u64) {
        let known = self.known[to_usize(number)].clone();
        if known.unknown && known.since.is_empty() {
            return;
        }
        let wanted = known.since.last().copied().unwrap_or(known.durable);
        let met = self.read_right(number, |version| version == wanted);
        assert_eq!(met, Some(wanted), "block {number}, it is {known:?}");
    }

    fn check_some(&mut self) {
        for _ in 0..6 {
            let number = self.chance.below(self.blocks());
            self.check(number);
        }
    }

    /// Everything is read and repaired, and the parity made to fit.
    fn scrub(&mut self) {
        // No write lies between the proof of a row and the parity that is made to fit it.
        self.rig.sims.iter().for_each(|sim| _ = sim.forget_faults());
        (0..self.blocks()).for_each(|number| self.check(number));
        if let Err(error) = self.array.flush() {
            self.must_be_off(&error);
            return;
        }
        self.flushed();
        for stripe in 0..self.array.stripes() {
            self.array.fit_parity(stripe).unwrap();
        }
        self.array.flush().unwrap();
        self.lies = 0;
    }

    /// A device fails for good.
    fn fail_one(&mut self) {
        let place = to_usize(self.chance.below(to_u64(self.rig.sims.len())));
        if self.losses() == 0 || self.out.contains(&place) {
            return;
        }
        let on = [On::Write, On::Flush, On::WriteDurable][to_usize(self.chance.below(3))];
        self.rig.sims[place].fail(on, 0, Effect::Errno(5));
        self.out.insert(place);
        self.met.failed += 1;
        self.version += 1;
        // Until it has been met.
        let (number, version) = (self.chance.below(self.blocks()), self.version);
        let all: Vec<u8> = (0..self.blocks()).flat_map(|n| block(n, version)).collect();
        self.array.write_durable_at(0, &all).unwrap();
        for known in &mut self.known {
            *known = Known { durable: version, ..Known::default() };
        }
        self.check(number);
    }

    /// Another device takes the place of one that is out, and is filled.
    fn replace(&mut self) {
        let Some(place) = self.out.first().copied().filter(|_| self.lies == 0) else { return };
        let size = self.rig.sims[place].size();
        self.rig.sims[place] = Arc::new(SimDevice::new(&format!("disk{place}"), size));
        self.array.replace(place, self.rig.device(place)).unwrap();
        self.array.plan_rebuild(&|_, _| true);
        loop {
            match self.array.rebuild_step().unwrap() {
                Step::Idle => break,
                Step::Filled(_) if self.chance.below(3) == 0 => self.write(),
                Step::Filled(_) | Step::LeftOut | Step::Done => {}
            }
        }
        assert_eq!(self.array.filling().lost_rows, 0);
        self.out.remove(&place);
        self.met.replaced += 1;
    }

    /// A device loses, misdirects or forgets one write, or something on it rots.
    fn lie(&mut self) {
        let place = to_usize(self.chance.below(to_u64(self.rig.sims.len())));
        if !self.bears_a_lie() || self.out.contains(&place) {
            return;
        }
        self.lies += 1;
        self.met.lies += 1;
        let size = self.rig.sims[place].size().0;
        let front = data_start(crate::limits::RAID_CHUNK_BYTES);
        let anywhere = |from: u64, to: u64, chance: &mut Chance| {
            from + chance.below((to - from) / BLOCK_BYTES_U64) * BLOCK_BYTES_U64
        };
        let sim = &self.rig.sims[place];
        let room = 4 * crate::limits::RAID_CHUNK_BYTES;
        match self.chance.below(9) {
            0 => sim.rot(anywhere(0, front, &mut self.chance), &[0x40; 3000]),
            1 | 5 | 6 => sim.rot(anywhere(front, size, &mut self.chance), &[1; 3000]),
            2 => sim.fail(On::Write, self.chance.below(4), Effect::Lost),
            3 => sim.fail(On::WriteDurable, self.chance.below(3), Effect::Lost),
            4 => sim.fail(On::Read, self.chance.below(4), Effect::Stale),
            _ => {
                let to = anywhere(front, size - room, &mut self.chance);
                sim.fail(On::Write, self.chance.below(4), Effect::Misdirected(to));
            }
        }
    }
}

/// Goal: up to as many faults as the level bears nothing is lost, whatever comes in which order.
/// Method: seeded histories of writes, flushes, cuts, failures, lies and scrubs; after each
/// everything that is known is read.
#[test]
fn nothing_is_lost_up_to_the_promised_number_of_faults() {
    let seeds = std::env::var("RAID_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let first = std::env::var("RAID_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut sum = Met::default();
    for (level, members) in SHAPES {
        for seed in first..first + seeds {
            let run = || {
                let mut history = History::new(level, members, seed);
                (0..STEPS).for_each(|_| history.step());
                (0..history.blocks()).for_each(|number| history.check(number));
                history.met
            };
            let met = std::panic::catch_unwind(run)
                .unwrap_or_else(|_| panic!("{level:?} of {members}, RAID_SEED={seed}"));
            sum.cuts += met.cuts;
            sum.lies += met.lies;
            sum.failed += met.failed;
            sum.repaired += met.repaired;
            sum.replaced += met.replaced;
        }
    }
    let all = sum.cuts > 200 && sum.lies > 50 && sum.failed > 15 && sum.repaired > 5;
    let all = all && sum.replaced > 5;
    assert!(all || seeds < 8, "too little was met: {sum:?}");
}
