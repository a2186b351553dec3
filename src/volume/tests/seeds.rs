//! Seeds: kept under an id of their own, gone on with, taken over by their source, given up.

use std::sync::Arc;

use crate::device::sim::{Effect, SimDevice};
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::TreeRoot;
use crate::pool::seed::{SEED_CP, Seed, seed_key};
use crate::pool::testing::crashed;
use crate::pool::write_set::{Budget, WriteSet};
use crate::units::ids::SourceId;
use crate::units::numbers::{ByteCount, Vbn};
use crate::volume::testing::{KEY, SOURCE, assert_clean, build, content, cp, data, options};
use crate::volume::testing::{pool_with, publish_of, tree};
use crate::volume::work::{give_up, resume};
use crate::volume::writer::{Content, TreeWriter};

const BLOCKS: u64 = 1000;
const ID: SourceId = SourceId([9; 16]);

fn seed(finished: bool) -> Seed {
    Seed {
        source: "filer-a".parse().unwrap(),
        volume: "vol1".parse().unwrap(),
        finished,
        taken_at: None,
    }
}

/// Fills those blocks with that byte.
fn fill(set: &mut WriteSet, base: TreeRoot, vbns: &[u64], byte: u8) -> TreeRoot {
    let pool = Arc::clone(set.pool());
    let mut writer = TreeWriter::new(&pool, set, seed_key(ID), base, SEED_CP).unwrap();
    vbns.iter().for_each(|vbn| writer.put(Vbn(*vbn), Content::Data(&[byte; 4096])).unwrap());
    writer.finish().unwrap()
}

fn seeded(pool: &Arc<Pool>, finished: bool) -> TreeRoot {
    let mut set = pool.begin(Budget::Ordinary);
    let tree = fill(&mut set, TreeRoot::empty(ByteCount(BLOCKS * 4096)), &[1, 300, 900], 5);
    set.keep_seed(ID, seed(finished), tree).unwrap();
    tree
}

fn again(device: &Arc<SimDevice>, pool: Arc<Pool>, chance: u64) -> (Arc<SimDevice>, Arc<Pool>) {
    drop(pool);
    let device = crashed(device, chance);
    let pool = Pool::open(device.clone(), options()).unwrap();
    (device, pool)
}

fn adopt(pool: &Pool) -> Result<(), PoolError> {
    pool.catalog().adopt_seeds(SOURCE, vec![(ID, KEY.volume)])
}

/// Goal: a seed outlives power cuts, is gone on with, becomes its source's work tree, and that is
/// published; no block is lost or shared on the way, and nobody saw it before.
#[test]
fn a_seed_becomes_the_first_image() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    let before = pool.space().unwrap();
    let first = seeded(&pool, false);
    assert_clean(&pool);
    let (device, pool) = again(&device, pool, 1);
    assert_clean(&pool);
    let resumed = resume(&pool, ID, Budget::Ordinary).unwrap().unwrap();
    let mut set = resumed.set;
    assert_eq!(resumed.trees.values().collect::<Vec<_>>(), [&first]);
    assert!(matches!(adopt(&pool), Err(PoolError::WorkKept { .. })), "while it is being filled");
    let second = fill(&mut set, first, &[300, 301], 6);
    set.keep_seed(ID, seed(true), second).unwrap();
    drop(set);
    assert!(tree(&pool).top.is_hole(), "a seed is no image");
    let (device, pool) = again(&device, pool, 2);
    let row = pool.catalog().seeds().unwrap().remove(0);
    assert_eq!((row.seed.clone(), row.trees[0].1), (Some(seed(true)), second));
    adopt(&pool).unwrap();
    assert_clean(&pool);
    assert!(pool.catalog().seeds().unwrap().is_empty());
    let (_, pool) = again(&device, pool, 3);
    assert_clean(&pool);
    let resumed = resume(&pool, SOURCE, Budget::Ordinary).unwrap().unwrap();
    let (mut set, work) = (resumed.set, resumed.trees[&KEY.volume]);
    assert_eq!(work, second);
    let target = build(&mut set, work, 7, &[data(2, 7), data(900, 7)]).unwrap();
    pool.publish(publish_of(set, 7, target)).unwrap();
    assert_clean(&pool);
    let image = content(&pool, &tree(&pool));
    let met = [1_usize, 2, 300, 301, 900].map(|vbn| image[vbn * 4096]);
    assert_eq!(met, [5, 7, 6, 6, 7]);
    // The next CPs free what came with the seed as they free all else.
    cp(&pool, 8, &[crate::volume::testing::Put::Holes(0, BLOCKS)]).unwrap();
    assert_clean(&pool);
    assert_eq!(pool.space().unwrap().free, before.free);
}

/// Given up, all of it is free again.
#[test]
fn a_seed_that_is_given_up_leaves_nothing() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    let before = pool.space().unwrap();
    seeded(&pool, true);
    let (_, pool) = again(&device, pool, 4);
    give_up(&pool, ID).unwrap();
    assert_clean(&pool);
    assert_eq!(pool.space().unwrap(), before);
    assert!(pool.catalog().seeds().unwrap().is_empty());
    assert!(matches!(adopt(&pool), Err(PoolError::UnknownSource { .. })));
}

/// Of another size, beside a work tree, behind an image: refused, and the seed stays.
#[test]
fn what_does_not_fit_is_not_taken_over() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    let mut set = pool.begin(Budget::Ordinary);
    let small = fill(&mut set, TreeRoot::empty(ByteCount(4096 * 8)), &[1], 5);
    set.keep_seed(ID, seed(true), small).unwrap();
    drop(set);
    assert!(matches!(adopt(&pool), Err(PoolError::RowRefused { .. })));
    give_up(&pool, ID).unwrap();
    seeded(&pool, true);
    assert!(matches!(
        pool.catalog().adopt_seeds(SOURCE, vec![(ID, KEY.volume), (ID, KEY.volume)]),
        Err(PoolError::Inconsistent { .. })
    ));
    cp(&pool, 1, &[data(1, 1)]).unwrap();
    assert!(matches!(adopt(&pool), Err(PoolError::CpNotNewer { .. })));
    assert_clean(&pool);
    assert_eq!(pool.catalog().seeds().unwrap().len(), 1);
}

/// The n-th write or flush of a take-over fails, then the power goes: the seed is there or the work
/// tree, one of the two, and the accounts are right.
#[test]
fn a_take_over_that_is_cut_anywhere_is_whole_or_was_not() {
    let (mut old, mut new) = (0, 0);
    for n in 0..12 {
        let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
        seeded(&pool, true);
        device.fail_change(n, Effect::Errno(5));
        let adopted = adopt(&pool).is_ok();
        let (_, pool) = again(&device, pool, n);
        assert_clean(&pool);
        let seeds = pool.catalog().seeds().unwrap().len();
        let taken = pool.catalog().work(SOURCE).unwrap().is_some();
        assert!((seeds == 1) != taken, "call {n}: {seeds} seeds, taken: {taken}");
        assert!(!adopted || taken, "call {n}: taken over, and gone");
        (old, new) = (old + u32::from(!taken), new + u32::from(taken));
    }
    assert!(old > 0 && new > 0, "{old} old, {new} new");
}
