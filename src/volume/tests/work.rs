//! Work trees: kept, gone on with, given up, published; with power cuts at every call.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::device::sim::Chance;
use crate::device::sim::{Effect, SimDevice};
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::TreeRoot;
use crate::pool::testing::crashed;
use crate::pool::write_set::{Budget, WriteSet};
use crate::units::numbers::{CpNumber, Epoch};
use crate::volume::error::VolumeError;
use crate::volume::testing::{
    KEY, Put, SOURCE, assert_clean, build, content, cp, data, options, pool_with, publish_of, tree,
};
use crate::volume::work::{Resumed, give_up, resume};

const BLOCKS: u64 = 1000;

fn keep(set: &mut WriteSet, cp: u32, tree: TreeRoot) -> Result<bool, PoolError> {
    set.keep_work((SOURCE, Epoch::default()), CpNumber(cp), vec![(KEY.volume, tree)])
}

fn gone_on(pool: &Arc<Pool>) -> (WriteSet, TreeRoot) {
    let Resumed { set, trees } = resume(pool, SOURCE, Budget::Ordinary).unwrap().unwrap();
    (set, trees[&KEY.volume])
}

fn again(device: &Arc<SimDevice>, pool: Arc<Pool>, seed: u64) -> (Arc<SimDevice>, Arc<Pool>) {
    drop(pool);
    let device = crashed(device, seed);
    let pool = Pool::open(device.clone(), options()).unwrap();
    (device, pool)
}

fn block(pool: &Pool, tree: &TreeRoot, vbn: usize) -> u8 {
    content(pool, tree)[vbn * 4096]
}

/// Kept, cut, gone on with, kept again, cut, published: nothing lost, nothing shared, and the image
/// is the old one until then.
#[test]
fn a_work_tree_outlives_a_power_cut_and_is_gone_on_with() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &[data(1, 1), data(300, 1), data(301, 1)]).unwrap();
    let free = pool.space().unwrap().free;
    let image = tree(&pool);
    let mut set = pool.begin(Budget::Ordinary);
    let first = build(&mut set, image, 5, &[data(1, 2), Put::Holes(301, 1), data(700, 2)]).unwrap();
    assert!(keep(&mut set, 5, first).unwrap());
    assert_clean(&pool);
    // A second one from the same set: a node of the first is dropped, and still read by others.
    let second = build(&mut set, first, 5, &[data(701, 3)]).unwrap();
    assert!(keep(&mut set, 5, second).unwrap());
    assert_clean(&pool);
    assert_eq!(block(&pool, &first, 700), 2, "what a pass began with can be read until it ends");
    assert!(
        matches!(
            resume(&pool, SOURCE, Budget::Ordinary),
            Err(VolumeError::Pool(PoolError::WorkKept { .. }))
        ),
        "one goes on with it"
    );
    drop(set);
    assert_clean(&pool);
    assert_eq!(tree(&pool), image, "the image is at its CP");
    let (device, pool) = again(&device, pool, 1);
    assert_clean(&pool);
    let (mut set, work) = gone_on(&pool);
    assert_eq!(work, second);
    let third = build(&mut set, work, 7, &[data(2, 4), data(700, 4)]).unwrap();
    assert!(keep(&mut set, 7, third).unwrap());
    drop(set);
    let (_, pool) = again(&device, pool, 2);
    let (mut set, work) = gone_on(&pool);
    let last = build(&mut set, work, 9, &[data(701, 5)]).unwrap();
    pool.publish(publish_of(set, 9, last)).unwrap();
    assert_clean(&pool);
    let read = |vbn| block(&pool, &tree(&pool), vbn);
    assert_eq!([1, 2, 300, 301, 700, 701].map(read), [2, 4, 1, 0, 4, 5]);
    assert!(pool.catalog().work(SOURCE).unwrap().is_none());
    let space = pool.space().unwrap();
    assert_eq!((space.work.0, space.in_flight.0), (0, 0));
    assert_eq!(free.0 - space.free.0, 3, "three blocks more than before, nodes one for one");
}

/// Given up all comes back, and until then no other CP is published.
#[test]
fn a_work_tree_is_in_the_way_of_other_cps_until_it_is_given_up() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &[data(1, 1), data(300, 1)]).unwrap();
    let before = pool.space().unwrap();
    let mut set = pool.begin(Budget::Ordinary);
    let work = build(&mut set, tree(&pool), 2, &[data(1, 2), data(900, 2)]).unwrap();
    keep(&mut set, 2, work).unwrap();
    drop(set);
    let other = cp(&pool, 3, &[data(5, 5)]).unwrap_err();
    assert!(matches!(other, VolumeError::Pool(PoolError::WorkKept { .. })), "{other}");
    assert!(matches!(pool.catalog().remove_volume(KEY), Err(PoolError::RowRefused { .. })));
    let (_, pool) = again(&device, pool, 3);
    give_up(&pool, SOURCE).unwrap();
    assert_clean(&pool);
    assert_eq!(pool.space().unwrap(), before);
    give_up(&pool, SOURCE).unwrap();
    cp(&pool, 3, &[data(5, 5)]).unwrap();
    assert_clean(&pool);
}

/// Negative control: a work tree that was forgotten leaves blocks that nobody has, and `check` says so.
#[test]
fn control_a_forgotten_work_tree_is_found_by_check() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    let mut set = pool.begin(Budget::Ordinary);
    let work = build(&mut set, tree(&pool), 2, &[data(1, 2)]).unwrap();
    keep(&mut set, 2, work).unwrap();
    drop(set);
    pool.forget_work(SOURCE).unwrap();
    let report = crate::volume::check::check(&pool, crate::volume::check::Depth::Nodes).unwrap();
    assert!(report.findings_count >= 3, "{:?}", report.findings);
    cp(&pool, 3, &[data(5, 5)]).unwrap();
}

/// Of an old epoch, or of a CP that is published: refused, and nothing is kept.
#[test]
fn what_may_not_be_published_is_not_kept() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 4, &[data(1, 1)]).unwrap();
    let mut set = pool.begin(Budget::Ordinary);
    let work = build(&mut set, tree(&pool), 4, &[data(1, 2)]).unwrap();
    assert!(matches!(keep(&mut set, 4, work), Err(PoolError::CpNotNewer { .. })));
    let old = (SOURCE, Epoch { number: 9, id: 9 });
    let met = set.keep_work(old, CpNumber(5), vec![(KEY.volume, work)]);
    assert!(matches!(met, Err(PoolError::Epoch { .. })));
    drop(set);
    assert_clean(&pool);
    assert!(pool.catalog().work(SOURCE).unwrap().is_none());
}

/// Goal: no order of keeps, cuts, resumptions and publishing loses or shares a block.
/// Method: random ones against a model, the accounts checked after each.
#[test]
fn every_order_of_keeps_and_cuts_keeps_the_accounts() {
    for seed in 1..12 {
        let mut chance = Chance::new(seed);
        let (mut device, mut pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
        let (mut image, mut work) = (BTreeMap::new(), None);
        let mut number = 1;
        for round in 0..25 {
            number += 1;
            let mut set = match resume(&pool, SOURCE, Budget::Ordinary).unwrap() {
                Some(Resumed { set, trees }) => (set, trees[&KEY.volume]),
                None => (pool.begin(Budget::Ordinary), tree(&pool)),
            };
            let mut now = work.clone().unwrap_or_else(|| image.clone());
            for _ in 0..chance.below(3) + 1 {
                let (puts, next) = changes(&mut chance, &now);
                set.1 = build(&mut set.0, set.1, number, &puts).unwrap();
                now = next;
                if chance.below(2) == 0 {
                    keep(&mut set.0, number, set.1).unwrap();
                    work = Some(now.clone());
                    assert_clean(&pool);
                }
            }
            match chance.below(4) {
                0 => {
                    pool.publish(publish_of(set.0, number, set.1)).unwrap();
                    (image, work) = (now, None);
                }
                1 => {
                    drop(set);
                    give_up(&pool, SOURCE).unwrap();
                    work = None;
                }
                _ => drop(set),
            }
            assert_clean(&pool);
            if chance.below(2) == 0 {
                (device, pool) = again(&device, pool, seed * 100 + round);
                assert_clean(&pool);
            }
            assert_is(&pool, &tree(&pool), &image);
            let kept = pool.catalog().work(SOURCE).unwrap();
            assert_eq!(kept.is_some(), work.is_some(), "seed {seed} round {round}");
            if let (Some(kept), Some(work)) = (kept, &work) {
                assert_is(&pool, &kept.trees[0].1, work);
            }
        }
    }
}

type Model = BTreeMap<u64, u8>;

fn changes(chance: &mut Chance, now: &Model) -> (Vec<Put>, Model) {
    let (mut puts, mut next, mut at) = (Vec::new(), now.clone(), 0);
    while at < BLOCKS {
        at += chance.below(BLOCKS / 3) + 1;
        if at >= BLOCKS {
            break;
        }
        let count = (chance.below(200) + 1).min(BLOCKS - at);
        if chance.below(3) == 0 {
            puts.push(Put::Holes(at, count));
            (at..at + count).for_each(|vbn| {
                next.remove(&vbn);
            });
            at += count;
        } else {
            let [byte, ..] = (chance.below(200) + 1).to_le_bytes();
            puts.push(data(at, byte));
            next.insert(at, byte);
        }
    }
    (puts, next)
}

#[track_caller]
fn assert_is(pool: &Pool, tree: &TreeRoot, model: &Model) {
    for (vbn, block) in (0..).zip(content(pool, tree).as_chunks::<4096>().0) {
        let wanted = model.get(&vbn).copied().unwrap_or(0);
        assert!(block.iter().all(|byte| *byte == wanted), "block {vbn}");
    }
}

/// The n-th write or flush fails, then the power goes: the row is the old one or the new one, whole,
/// and the accounts are right.
#[test]
fn a_keep_that_is_cut_anywhere_leaves_the_old_or_the_new_one() {
    let (mut old, mut new) = (0, 0);
    for n in 0..40 {
        let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
        cp(&pool, 1, &[data(1, 1), data(300, 1)]).unwrap();
        let mut set = pool.begin(Budget::Ordinary);
        let first = build(&mut set, tree(&pool), 2, &[data(1, 2), data(900, 2)]).unwrap();
        keep(&mut set, 2, first).unwrap();
        device.fail_change(n, Effect::Errno(5));
        let second = build(&mut set, first, 2, &[data(1, 3), Put::Holes(300, 1)]);
        let kept = second.is_ok_and(|second| keep(&mut set, 2, second).is_ok());
        drop(set);
        let (_, pool) = again(&device, pool, n);
        assert_clean(&pool);
        let (set, work) = gone_on(&pool);
        let met = (block(&pool, &work, 1), block(&pool, &work, 300));
        assert!(met == (2, 1) || met == (3, 0), "call {n}: {met:?}");
        assert!(!kept || met == (3, 0), "call {n}: kept, and gone");
        (old, new) = (old + u32::from(met.0 == 2), new + u32::from(met.0 == 3));
        drop(set);
        give_up(&pool, SOURCE).unwrap();
        assert_clean(&pool);
    }
    assert!(old > 0 && new > 0, "{old} old, {new} new");
}
