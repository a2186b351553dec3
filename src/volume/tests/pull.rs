//! A pull makes any tree equal to any other of its size, also in several goes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use proptest::prelude::*;

use crate::pool::Pool;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::write_set::Budget;
use crate::units::numbers::{ByteCount, CpNumber, Vbn, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::pull::Puller;
use crate::volume::pull::cp::{CpPuller, Step, VolumeTarget};
use crate::volume::pull::error::PullError;
use crate::volume::pull::own::PoolTree;
use crate::volume::pull::terms::{Put as Pulled, Window};
use crate::volume::testing::{
    KEY, Put, add_volume, assert_clean, cp, data, pool_with, publish_of, tree,
};
use crate::wire::message::Message;
use crate::wire::pull::Pulled as Answer;

use super::pulling::{
    Came, Fake, Go, NARROW, SMALL, answers, drive, fake_block, pin, pull_into, served, target_of,
};

const DEVICE: u64 = 3 * POOL_BYTES_MIN;
const SIZES: [u64; 9] = [1, 2, 127, 128, 129, 300, 16_384, 16_385, 16_384 * 3 + 77];

/// A change of a volume; places are taken modulo its size.
#[derive(Debug, Clone)]
enum Change {
    Fill { at: u64, count: u64, byte: u8 },
    Holes { at: u64, count: u64 },
}

fn change() -> impl Strategy<Value = Change> {
    // Crowded places, edges of nodes, and anywhere.
    let place = || prop_oneof![0..20u64, 120..140u64, 16_380..16_390u64, any::<u64>()];
    let many = prop_oneof![1..5u64, Just(128), Just(16_384), 1..60_000u64];
    prop_oneof![
        3 => (place(), 1..4u64, 1..5u8).prop_map(|(at, count, byte)| Change::Fill { at, count, byte }),
        1 => (place(), 1..140u64, 1..5u8)
            .prop_map(|(at, count, byte)| Change::Fill { at, count, byte }),
        1 => (place(), many).prop_map(|(at, count)| Change::Holes { at, count }),
    ]
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec(change(), 0..12)
}

/// Blocks that are no holes.
type Blocks = BTreeMap<u64, u8>;

fn apply(blocks: &mut Blocks, size: u64, changes: &[Change]) {
    for change in changes {
        let (Change::Fill { at, count, .. } | Change::Holes { at, count }) = change;
        let first = at % size;
        let range = first..first.saturating_add(*count).min(size);
        match change {
            Change::Fill { byte, .. } => blocks.extend(range.map(|vbn| (vbn, *byte))),
            Change::Holes { .. } => blocks.retain(|vbn, _| !range.contains(vbn)),
        }
    }
}

/// What leads from one content to another, block by block.
fn puts(from: &Blocks, to: &Blocks) -> Vec<Put> {
    let mut puts: BTreeMap<u64, Put> = from.keys().map(|&vbn| (vbn, Put::Holes(vbn, 1))).collect();
    puts.extend(to.iter().map(|(&vbn, &byte)| (vbn, data(vbn, byte))));
    puts.into_values().collect()
}

fn window() -> impl Strategy<Value = Window> {
    prop_oneof![Just(Window::default()), Just(NARROW), Just(SMALL)]
}

/// Pulls the published volume of another pool into `pool`, as far as `puts_max`, and publishes.
fn pull(pool: &Arc<Pool>, number: u32, from: &Arc<Pool>, window: Window, puts_max: usize) -> Came {
    let pin = pin(from);
    let mut set = pool.begin(Budget::Ordinary);
    let base = (tree(pool), number);
    let came =
        pull_into(&mut set, base, (target_of(&pin), window), puts_max, |ask| served(&pin, ask));
    assert!(came.error.is_none(), "{:?}", came.error);
    pool.publish(publish_of(set, number, came.tree)).unwrap();
    came
}

/// Few cases unless more are asked for.
fn config() -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if asked { config } else { ProptestConfig { cases: 40, ..config } }
}

proptest! {
    #![proptest_config(config())]

    /// Goal: any tree becomes any other, through any window; equal parts cost nothing.
    /// Method: two pools with histories of their own, one shared beginning.
    #[test]
    fn any_tree_becomes_any_other(
        size in prop::sample::select(&SIZES[..]),
        shared in changes(),
        here in changes(),
        there in changes(),
        window in window(),
    ) {
        let ((_, own), (_, other)) = (pool_with(DEVICE, size), pool_with(DEVICE, size));
        let mut common = Blocks::new();
        apply(&mut common, size, &shared);
        let mut contents = [common.clone(), common.clone()];
        for (pool, (blocks, changes)) in
            [&own, &other].into_iter().zip(contents.iter_mut().zip([&here, &there]))
        {
            cp(pool, 1, &puts(&Blocks::new(), &common)).unwrap();
            apply(blocks, size, changes);
            cp(pool, 2, &puts(&common, blocks)).unwrap();
        }
        let came = pull(&own, 3, &other, window, usize::MAX);
        prop_assert_eq!(came.tree.root(), tree(&other).root());
        assert_clean(&own);
        let [here, there] = contents;
        let differing = there.iter().filter(|&(vbn, byte)| here.get(vbn) != Some(byte)).count();
        prop_assert_eq!(usize::try_from(came.counters.blocks).unwrap(), differing);
        // Again: nothing differs, so nothing is asked.
        let again = pull(&own, 4, &other, window, 0);
        prop_assert_eq!((again.counters.requests, again.puts), (0, 0));
    }

    /// Goal: a pull that is cut anywhere goes on from its work tree, also towards a newer target.
    /// Method: as above, stopped after some puts, in one write set or published in between.
    #[test]
    fn a_cut_pull_goes_on_towards_a_newer_target(
        size in prop::sample::select(&SIZES[..]),
        here in changes(),
        there in changes(),
        newer in changes(),
        stop in 0..400usize,
        publish in any::<bool>(),
        window in window(),
    ) {
        let ((_, own), (_, other)) = (pool_with(DEVICE, size), pool_with(DEVICE, size));
        let (mut left, mut right) = (Blocks::new(), Blocks::new());
        apply(&mut left, size, &here);
        cp(&own, 1, &puts(&Blocks::new(), &left)).unwrap();
        apply(&mut right, size, &there);
        cp(&other, 1, &puts(&Blocks::new(), &right)).unwrap();
        let mut set = own.begin(Budget::Ordinary);
        let mut work = tree(&own);
        if publish {
            drop(set);
            work = pull(&own, 2, &other, window, stop).tree;
            set = own.begin(Budget::Ordinary);
        } else {
            let first = pin(&other);
            let target = (target_of(&first), window);
            work = pull_into(&mut set, (work, 3), target, stop, |ask| served(&first, ask)).tree;
        }
        let before = right.clone();
        apply(&mut right, size, &newer);
        cp(&other, 2, &puts(&before, &right)).unwrap();
        let second = pin(&other);
        let target = (target_of(&second), window);
        let came =
            pull_into(&mut set, (work, 3), target, usize::MAX, |ask| served(&second, ask));
        prop_assert!(came.error.is_none(), "{:?}", came.error);
        prop_assert_eq!(came.tree.root(), tree(&other).root());
        own.publish(publish_of(set, 3, came.tree)).unwrap();
        assert_clean(&own);
    }
}

/// What was written before a cut is not asked for again, at every place of the cut.
#[test]
fn resuming_asks_only_for_what_is_missing() {
    let target = Fake::new((0..700).map(|vbn| u8::from(vbn % 3 > 0)).collect());
    let empty = Fake::new(vec![0; 700]);
    let wanted: Vec<u64> = (0..700).filter(|vbn| vbn % 3 > 0).collect();
    for stop in 0..=wanted.len() {
        let mut done = Vec::new();
        let mut puller = Puller::new(empty.clone(), target.target(), SMALL, 1).unwrap();
        drive(
            &mut puller,
            SMALL,
            |ask| target.serve(ask),
            |put| {
                let Pulled::Data { vbn, .. } = put else { panic!("{put:?}") };
                if done.len() == stop {
                    return Go::Stop;
                }
                done.push(vbn.0);
                Go::On
            },
        )
        .unwrap();
        let work = empty.with(done.iter().map(|&vbn| (vbn, 1)));
        let mut rest = Vec::new();
        let mut puller = Puller::new(work, target.target(), SMALL, 1).unwrap();
        drive(
            &mut puller,
            SMALL,
            |ask| target.serve(ask),
            |put| {
                let Pulled::Data { vbn, block } = put else { panic!("{put:?}") };
                assert_eq!(**block, fake_block(vbn.0, 1));
                rest.push(vbn.0);
                Go::On
            },
        )
        .unwrap();
        assert_eq!([done, rest].concat(), wanted, "cut after {stop}");
    }
}

/// A hole costs by what stands beside it, not by its blocks, at every level.
#[test]
fn differing_holes_are_few_ranges() {
    let size = 128 * 128 * 2 + 500;
    let full = Fake::new(vec![1; size]);
    let hole = |first: u64, count: u64| Pulled::Holes { vbn: Vbn(first), count };
    let cases: [(std::ops::Range<u64>, u64); 6] = [
        (0..33_268, 0),      // all: not even the top is asked for
        (0..16_384, 1),      // a whole subtree
        (16_384..33_268, 1), // to the end, which is no power
        (128..384, 2),       // two nodes
        (16_383..16_385, 5), // two blocks under two parents
        (100..16_500, 5),    // crooked: parts of two nodes, 127 whole ones between
    ];
    for (range, nodes) in cases {
        let target = full.with(range.clone().map(|vbn| (vbn, 0)));
        for window in [NARROW, SMALL, Window::default()] {
            let mut puller = Puller::new(full.clone(), target.target(), window, 1).unwrap();
            let mut met = Vec::new();
            drive(
                &mut puller,
                window,
                |ask| target.serve(ask),
                |put| {
                    met.push(put.clone());
                    Go::On
                },
            )
            .unwrap();
            // What stands before a node may be taken before what comes out of the node.
            let mut joined: Vec<(u64, u64)> = Vec::new();
            for put in &met {
                let Pulled::Holes { vbn, count } = put else { panic!("{put:?}") };
                match joined.last_mut() {
                    Some((first, before)) if *first + *before == vbn.0 => *before += count,
                    _ => joined.push((vbn.0, *count)),
                }
            }
            assert_eq!(joined, [(range.start, range.end - range.start)]);
            assert!(met.len() <= 4, "{range:?}: {} ranges", met.len());
            if nodes == 1 || nodes == 0 {
                assert_eq!(met, [hole(range.start, range.end - range.start)]);
            }
            assert_eq!(
                (puller.counters().nodes, puller.counters().blocks),
                (nodes, 0),
                "{range:?}"
            );
        }
    }
}

/// All volumes of a CP, of several sizes, one of them equal already and one empty.
#[test]
fn a_cp_of_several_volumes_is_pulled_one_after_the_other() {
    let sizes = [1, 300, 0, 17_000];
    let targets: Vec<Fake> = sizes
        .iter()
        .map(|&size| Fake::new((0..size).map(|vbn| u8::from(vbn % 50 == 0)).collect()))
        .collect();
    let owns: Vec<Fake> = sizes.iter().map(|&size| Fake::new(vec![0; size])).collect();
    let volumes = (1..).zip(targets.iter().zip(owns)).map(|(volume, (target, own))| VolumeTarget {
        volume: VolumeNumber(volume),
        size: target.target().size,
        root: target.root(),
        own: if volume == 2 { target.clone() } else { own },
    });
    let mut puller = CpPuller::new(CpNumber(3), volumes.collect(), SMALL, 10).unwrap();
    let (mut done, mut puts, mut numbers) = (Vec::new(), vec![0; sizes.len()], Vec::new());
    let mut sent = VecDeque::new();
    while !puller.is_finished() {
        while let Some(step) = puller.next_step().unwrap() {
            match step {
                Step::Put(volume, _) => puts[usize::try_from(volume.0).unwrap() - 1] += 1,
                Step::Done(volume) => done.push(volume.0),
            }
        }
        sent.extend(puller.asks());
        let Some(ask) = sent.pop_front() else { continue };
        let answer = answers(&ask);
        numbers.push(answer.number);
        let frame = targets[usize::try_from(answer.volume.0).unwrap() - 1].serve(&ask);
        if let Message::WantNodes(_) = ask {
            puller.nodes(&answer, &frame.payload).unwrap();
        } else {
            puller.blocks(&answer, &frame.payload).unwrap();
        }
    }
    assert_eq!(done, [1, 2, 3, 4]);
    assert_eq!(puts, [1, 0, 0, 340]);
    assert!(numbers.iter().copied().eq((10..).take(numbers.len())), "{numbers:?}");
    let counters = puller.counters();
    assert_eq!((counters.blocks, counters.requests), (341, numbers.len().try_into().unwrap()));
    let late = Answer { cp: CpNumber(3), volume: VolumeNumber(4), number: 10 };
    assert!(matches!(puller.blocks(&late, &[0]), Err(PullError::NotAsked { .. })));
}

#[test]
fn volumes_of_two_sizes_are_not_pulled() {
    let (_, pool) = pool_with(DEVICE, 300);
    let (own, mut target) = (tree(&pool), target_of(&pin(&pool)));
    target.size = ByteCount(301 * 4096);
    let made = Puller::new(PoolTree::new(&pool, own).unwrap(), target, SMALL, 1);
    let met = made.err().unwrap();
    let PullError::Own { error: VolumeError::SizesDiffer { .. }, .. } = met else {
        panic!("{met}");
    };
    let odd = TreeRoot::empty(ByteCount(4097));
    assert!(PoolTree::new(&pool, odd).is_err());
}

/// Two volumes of one source do not meet: the tree is pulled under the key it is asked by.
#[test]
fn a_pull_into_one_volume_leaves_the_other() {
    let ((_, own), (_, other)) = (pool_with(DEVICE, 300), pool_with(DEVICE, 300));
    let second = VolumeKey { volume: VolumeNumber(2), ..KEY };
    add_volume(&own, second, 300);
    let before = own.catalog().volume(second).unwrap().unwrap().tree;
    cp(&other, 1, &[data(5, 1), data(299, 2)]).unwrap();
    pull(&own, 1, &other, SMALL, usize::MAX);
    assert_eq!(tree(&own).root(), tree(&other).root());
    assert_eq!(own.catalog().volume(second).unwrap().unwrap().tree, before);
    assert_clean(&own);
}
