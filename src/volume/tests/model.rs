//! A volume against a plain map, through puts, trims, CPs, pins, restarts and power cuts.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use crate::device::sim::SimDevice;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::TreeRoot;
use crate::pool::testing::crashed;
use crate::pool::write_set::Budget;
use crate::pool::{Pin, Pool};
use crate::units::hash::Root;
use crate::units::numbers::ByteCount;
use crate::volume::diff::born_since;
use crate::volume::reader::{extents, read_into};
use crate::volume::testing::{
    KEY, Put, SOURCE, assert_clean, build, data, options, pool_with, publish_of, short,
    slow_root_of, tree,
};

const BLOCKS: u64 = 16_384 + 300;

#[derive(Debug, Clone)]
enum Step {
    Data { vbn: u64, byte: u8 },
    Holes { vbn: u64, count: u64 },
    Cp { publish: bool },
    Pin,
    Unpin { which: usize },
    Reopen,
    Crash { seed: u64, in_cp: bool },
}

fn vbn() -> impl Strategy<Value = u64> {
    // Crowded places, edges of nodes, and anywhere.
    prop_oneof![0..20u64, 120..140u64, 16_380..BLOCKS, 0..BLOCKS]
}

fn step() -> impl Strategy<Value = Step> {
    let count = prop_oneof![1..5u64, Just(128), Just(16_384), 1..BLOCKS];
    prop_oneof![
        12 => (vbn(), 0..4u8).prop_map(|(vbn, byte)| Step::Data { vbn, byte }),
        4 => (vbn(), count).prop_map(|(vbn, count)| Step::Holes { vbn, count }),
        5 => any::<bool>().prop_map(|often| Step::Cp { publish: often }),
        3 => any::<bool>().prop_map(|_| Step::Cp { publish: true }),
        2 => Just(Step::Pin),
        2 => any::<usize>().prop_map(|which| Step::Unpin { which }),
        1 => Just(Step::Reopen),
        2 => (any::<u64>(), any::<bool>()).prop_map(|(seed, in_cp)| Step::Crash { seed, in_cp }),
    ]
}

/// What a volume holds: blocks that are not zero, by VBN.
type Blocks = BTreeMap<u64, u8>;

fn root_of(blocks: &Blocks) -> Root {
    let kinds: Vec<_> = (0..4).map(|byte| short(&[byte; 4096])).collect();
    let kind = |vbn| usize::from(blocks.get(&vbn).copied().unwrap_or(0));
    slow_root_of((0..BLOCKS).map(|vbn| kinds[kind(vbn)].clone()).collect())
}

fn byte_at(blocks: &Blocks, offset: u64) -> u8 {
    blocks.get(&(offset / 4096)).copied().unwrap_or(0)
}

struct Model {
    device: Arc<SimDevice>,
    pool: Arc<Pool>,
    published: Blocks,
    now: Blocks,
    cp: u32,
    /// What each CP held, to judge diffs.
    past: BTreeMap<u32, Blocks>,
    pins: Vec<(Pin, Blocks)>,
}

impl Model {
    fn new() -> Self {
        let (device, pool) = pool_with(2 * POOL_BYTES_MIN, BLOCKS);
        let past = BTreeMap::from([(0, Blocks::new())]);
        let (published, now) = (Blocks::new(), Blocks::new());
        Self { device, pool, published, now, cp: 0, past, pins: Vec::new() }
    }

    /// The changes from published to now, as a CP would bring them.
    fn puts(&self) -> Vec<Put> {
        let mut puts: BTreeMap<u64, Put> = BTreeMap::new();
        let mut gone: Option<(u64, u64)> = None;
        for vbn in self.published.keys().filter(|vbn| !self.now.contains_key(vbn)) {
            match &mut gone {
                Some((first, count)) if *first + *count == *vbn => *count += 1,
                _ => {
                    puts.extend(gone.map(|(first, count)| (first, Put::Holes(first, count))));
                    gone = Some((*vbn, 1));
                }
            }
        }
        puts.extend(gone.map(|(first, count)| (first, Put::Holes(first, count))));
        puts.extend(self.now.iter().map(|(&vbn, &byte)| (vbn, data(vbn, byte))));
        puts.into_values().collect()
    }

    fn cp(&mut self, publish: bool, puts: &[Put]) {
        let number = self.cp + 1;
        let mut set = self.pool.begin(Budget::Ordinary);
        let built = build(&mut set, tree(&self.pool), number, puts).unwrap();
        if !publish {
            return;
        }
        let published = self.pool.publish(publish_of(set, number, built)).unwrap();
        self.cp = number;
        self.published = self.now.clone();
        self.past.insert(number, self.now.clone());
        assert_eq!(published.roots[0].1, root_of(&self.now));
    }

    fn restart(&mut self, device: Arc<SimDevice>) {
        self.pins.clear();
        self.now = self.published.clone();
        self.device = device;
        self.pool = Pool::open(self.device.clone(), options()).unwrap();
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Data { vbn, byte: 0 } => {
                self.now.remove(&vbn);
            }
            Step::Data { vbn, byte } => {
                self.now.insert(vbn, byte);
            }
            Step::Holes { vbn, count } => {
                let end = (vbn + count).min(BLOCKS);
                self.now.retain(|at, _| !(vbn..end).contains(at));
                // Holes as one range, not block by block, in a CP of its own.
                let puts = [Put::Holes(vbn, end - vbn)];
                let rest = std::mem::replace(&mut self.now, self.published.clone());
                self.now.retain(|at, _| !(vbn..end).contains(at));
                self.cp(true, &puts);
                self.now = rest;
            }
            Step::Cp { publish } => self.cp(publish, &self.puts()),
            Step::Pin => {
                let pin = self.pool.pin(SOURCE, KEY.volume).unwrap();
                self.pins.push((pin, self.published.clone()));
            }
            Step::Unpin { which } => {
                if !self.pins.is_empty() {
                    let which = which % self.pins.len();
                    drop(self.pins.swap_remove(which));
                }
            }
            Step::Reopen => {
                self.pins.clear();
                let device = self.device.clone();
                // The old pool must be gone before the new one opens the device.
                self.pool = Model::new().pool;
                self.restart(device);
            }
            Step::Crash { seed, in_cp } => {
                let mut set = self.pool.begin(Budget::Ordinary);
                if in_cp {
                    let number = self.cp + 1;
                    build(&mut set, tree(&self.pool), number, &self.puts()).unwrap();
                }
                let device = crashed(&self.device, seed);
                drop(set);
                self.restart(device);
            }
        }
    }

    fn check(&self) {
        assert_clean(&self.pool);
        let published = tree(&self.pool);
        assert_eq!(published.root(), root_of(&self.published));
        let mut buffer = vec![0; 40 * 4096];
        for (tree, blocks) in self
            .pins
            .iter()
            .map(|(pin, blocks)| (pin.tree(), blocks))
            .chain([(published, &self.published)])
        {
            self.check_tree(&tree, blocks, &mut buffer);
        }
        for (&cp, past) in &self.past {
            self.check_diff(&published, cp, past);
        }
    }

    /// Samples of a tree's bytes and extents are the model's.
    fn check_tree(&self, tree: &TreeRoot, blocks: &Blocks, buffer: &mut [u8]) {
        assert_eq!(tree.size, ByteCount(BLOCKS * 4096));
        for first in [0, 110, 16_370] {
            let offset = first * 4096 + 17;
            let length = buffer.len() - 17 - 5;
            let part = &mut buffer[..length];
            read_into(&self.pool, tree, offset, part).unwrap();
            let wanted = (offset..).map(|at| byte_at(blocks, at));
            assert!(part.iter().copied().eq(wanted.take(length)), "block {first}");
        }
        let mut at = 0;
        for extent in extents(&self.pool, tree, 0, tree.size.0, usize::MAX).unwrap() {
            let (first, end) = (at / 4096, (at + extent.length) / 4096);
            let filled = blocks.range(first..end).count();
            let wanted = if extent.hole { 0 } else { usize::try_from(end - first).unwrap() };
            assert_eq!(filled, wanted, "extent at {first} to {end}");
            at += extent.length;
        }
        assert_eq!(at, tree.size.0);
    }

    /// A diff names everything that differs from what the CP held.
    fn check_diff(&self, tree: &TreeRoot, cp: u32, past: &Blocks) {
        let mut named = BTreeMap::new();
        for item in born_since(&self.pool, tree, crate::units::numbers::CpNumber(cp)).unwrap() {
            let item = item.unwrap();
            named.insert(item.vbn.0, item.count);
        }
        let is_named = |vbn: u64| {
            named.range(..=vbn).next_back().is_some_and(|(first, count)| vbn < first + count)
        };
        for vbn in past.keys().chain(self.published.keys()) {
            if past.get(vbn) != self.published.get(vbn) {
                assert!(is_named(*vbn), "block {vbn} changed since CP {cp}");
            }
        }
    }
}

/// Few cases unless more are asked for.
fn config() -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if asked { config } else { ProptestConfig { cases: 24, ..config } }
}

proptest! {
    #![proptest_config(config())]

    /// Goal: no history of puts, trims, CPs, pins, restarts and power cuts shows anything but the
    /// last published CP, or loses or leaks a block.
    #[test]
    fn a_volume_agrees_with_a_plain_map(steps in prop::collection::vec(step(), 1..40)) {
        let mut model = Model::new();
        for step in &steps {
            model.step(step);
            if !matches!(step, Step::Data { .. }) {
                model.check();
            }
        }
        model.check();
    }
}
