//! Volumes that grow: the tree, what is kept of before, and what is under way.

use std::sync::Arc;

use crate::pool::Pool;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::TreeRoot;
use crate::pool::write_set::{Budget, WriteSet};
use crate::units::numbers::{ByteCount, CpNumber, Epoch};
use crate::volume::error::VolumeError;
use crate::volume::kept::drop_kept;
use crate::volume::testing::{
    KEY, Put, SOURCE, assert_clean, build, content, cp, data, pool_with, publish_of, slow_root,
    tree,
};
use crate::volume::work::{give_up, resume};
use crate::volume::writer::grow;

fn size(blocks: u64) -> ByteCount {
    ByteCount(blocks * 4096)
}

fn grown(pool: &Arc<Pool>, set: &mut WriteSet, cp: u32, blocks: u64) -> TreeRoot {
    pool.catalog().grow_volume(KEY, size(blocks)).unwrap();
    grow(pool, set, KEY, (tree(pool), size(blocks)), CpNumber(cp)).unwrap()
}

/// A CP in which the volume has grown, and these blocks were put.
fn grow_cp(pool: &Arc<Pool>, number: u32, blocks: u64, puts: &[Put]) {
    let mut set = pool.begin(Budget::Ordinary);
    let base = grown(pool, &mut set, number, blocks);
    let built = build(&mut set, base, number, puts).unwrap();
    pool.publish(publish_of(set, number, built)).unwrap();
}

/// Within a node, by one level and by two; with data, without, and with data behind the old end.
#[test]
fn a_grown_tree_is_that_of_the_longer_image() {
    let all = |from: u64| vec![vec![], vec![data(0, 1)], vec![data(0, 1), data(from - 1, 2)]];
    for (from, to) in [(1, 2), (100, 101), (100, 300), (128, 129), (3, 16_400)] {
        // The last is the one whose image is large.
        for puts in all(from).split_off(if to > 16_384 { 2 } else { 0 }) {
            let puts: Vec<Put> = puts.into_iter().take(usize::try_from(from).unwrap()).collect();
            let (_, pool) = pool_with(2 * POOL_BYTES_MIN, from);
            cp(&pool, 1, &puts).unwrap();
            let mut image = content(&pool, &tree(&pool));
            image.resize(usize::try_from(to * 4096).unwrap(), 0);
            grow_cp(&pool, 2, to, &[]);
            assert_eq!(tree(&pool).size, size(to));
            assert_eq!(tree(&pool).root(), slow_root(&image), "{from} to {to}");
            assert!(content(&pool, &tree(&pool)) == image);
            assert_clean(&pool);
            cp(&pool, 3, &[Put::Holes(0, 1), data(to - 1, 3)]).unwrap();
            image[..4096].fill(0);
            let end = image.len() - 4096;
            image[end..].fill(3);
            assert_eq!(tree(&pool).root(), slow_root(&image), "{from} to {to}, written");
            assert_clean(&pool);
            cp(&pool, 4, &[Put::Holes(0, to)]).unwrap();
            assert!(tree(&pool).top.is_hole());
            assert_eq!(assert_clean(&pool).reachable, 0);
        }
    }
}

/// Only what was announced is published, and no volume becomes smaller.
#[test]
fn a_size_that_was_not_announced_is_refused() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 100);
    cp(&pool, 1, &[data(1, 1)]).unwrap();
    let before = tree(&pool);
    let mut set = pool.begin(Budget::Ordinary);
    let other = grow(&pool, &mut set, KEY, (before, size(200)), CpNumber(2)).unwrap();
    let met = pool.publish(publish_of(set, 2, other)).unwrap_err();
    assert!(met.to_string().contains("its new tree 819200"), "{met}");
    assert_eq!(tree(&pool), before);
    let catalog = pool.catalog();
    assert!(catalog.grow_volume(KEY, ByteCount(4097 * 100)).is_err(), "no whole blocks");
    catalog.grow_volume(KEY, size(50)).unwrap();
    catalog.grow_volume(KEY, size(300)).unwrap();
    catalog.grow_volume(KEY, size(200)).unwrap();
    let row = catalog.volume(KEY).unwrap().unwrap();
    assert_eq!((row.size(), row.tree), (size(300), before), "the largest, and no tree of it yet");
    let mut set = pool.begin(Budget::Ordinary);
    let met = grow(&pool, &mut set, KEY, (before, size(50)), CpNumber(2)).unwrap_err();
    assert!(matches!(met, VolumeError::SizesDiffer { .. }), "{met}");
    drop(set);
    // A CP of before may still be published; then the one that grows.
    cp(&pool, 2, &[data(2, 2)]).unwrap();
    assert_eq!(catalog.volume(KEY).unwrap().unwrap().grows_to, Some(size(300)));
    grow_cp(&pool, 3, 300, &[]);
    assert_eq!(catalog.volume(KEY).unwrap().unwrap().grows_to, None);
    assert_clean(&pool);
}

/// What is kept of before the growth can be read, and what it alone held comes back.
#[test]
fn a_cp_that_was_kept_before_can_be_dropped() {
    for to in [110, 300, 16_400] {
        let (_, pool) = pool_with(2 * POOL_BYTES_MIN, 100);
        let free = pool.space().unwrap().free;
        cp(&pool, 1, &[data(1, 1), data(50, 1)]).unwrap();
        let kept = "k".parse().unwrap();
        pool.keep(SOURCE, kept).unwrap();
        let old = content(&pool, &tree(&pool));
        grow_cp(&pool, 2, to, &[data(1, 2), data(to - 1, 2)]);
        cp(&pool, 3, &[Put::Holes(0, to)]).unwrap();
        assert_clean(&pool);
        let name = "k".parse().unwrap();
        let pin = pool.pin_kept(SOURCE, &name, KEY.volume).unwrap();
        assert!(content(&pool, &pin.tree()) == old, "to {to}");
        drop(pin);
        drop_kept(&pool, SOURCE, &name).unwrap();
        assert_clean(&pool);
        assert_eq!(pool.space().unwrap().free, free, "to {to}");
    }
}

/// A pass that is cut in a volume that has grown since the image: gone on with, or given up.
#[test]
fn a_work_tree_of_a_grown_volume_is_gone_on_with_or_given_up() {
    for gives_up in [true, false] {
        let (_, pool) = pool_with(2 * POOL_BYTES_MIN, 100);
        cp(&pool, 1, &[data(1, 1), data(50, 1)]).unwrap();
        let free = pool.space().unwrap().free;
        let mut set = pool.begin(Budget::Ordinary);
        let base = grown(&pool, &mut set, 2, 20_000);
        let work = build(&mut set, base, 2, &[data(1, 2), data(19_999, 2)]).unwrap();
        let trees = vec![(KEY.volume, work)];
        assert!(set.keep_work((SOURCE, Epoch::default()), CpNumber(2), trees).unwrap());
        drop(set);
        assert_clean(&pool);
        if gives_up {
            give_up(&pool, SOURCE).unwrap();
            assert_clean(&pool);
            assert_eq!(pool.space().unwrap().free, free);
            continue;
        }
        let resumed = resume(&pool, SOURCE, Budget::Ordinary).unwrap().unwrap();
        let (mut set, base) = (resumed.set, resumed.trees[&KEY.volume]);
        let built = build(&mut set, base, 2, &[data(300, 3)]).unwrap();
        pool.publish(publish_of(set, 2, built)).unwrap();
        let image = content(&pool, &tree(&pool));
        assert_eq!([image[4096], image[300 * 4096], image[19_999 * 4096]], [2, 3, 2]);
        assert_eq!(tree(&pool).root(), slow_root(&image));
        assert_clean(&pool);
    }
}
