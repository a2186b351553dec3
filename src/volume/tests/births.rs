//! Births (R8): what a diff from a CP finds, also through holes that were split or swallowed.

use std::collections::BTreeSet;

use crate::pool::Pool;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::testing::changes;
use crate::units::numbers::CpNumber;
use crate::volume::diff::{born_since, compare};
use crate::volume::testing::{Put, assert_clean, cp, data, pool_with, tree};

/// The blocks that a diff from `since` names.
fn named(pool: &Pool, since: u32) -> BTreeSet<u64> {
    let walk = born_since(pool, &tree(pool), CpNumber(since)).unwrap();
    let items = walk.map(|item| item.unwrap());
    items.flat_map(|item| item.vbn.0..item.vbn.0 + item.count).collect()
}

fn set(blocks: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    blocks.into_iter().collect()
}

/// Trim a subtree, CP, write one block in it, CP: a diff from before the trim finds exactly what
/// was trimmed, a diff from after it exactly what was written. `span` is that of the subtree.
fn trim_then_write(span: u64) {
    let blocks = 3 * span;
    let (_, pool) = pool_with(4 * POOL_BYTES_MIN, blocks);
    // Data everywhere in the subtree where the trim will be, and on both sides of it.
    let filled: Vec<u64> = (0..blocks).step_by(usize::try_from(span / 64).unwrap()).collect();
    let puts: Vec<Put> = filled.iter().map(|&vbn| data(vbn, 1)).collect();
    cp(&pool, 1, &puts).unwrap();
    cp(&pool, 2, &[Put::Holes(span, span)]).unwrap();
    assert_eq!(named(&pool, 1), set(span..2 * span));
    cp(&pool, 3, &[data(span + 7, 3)]).unwrap();
    assert_eq!(named(&pool, 1), set(span..2 * span), "the written one lies in the trimmed part");
    assert_eq!(named(&pool, 2), set([span + 7]), "the split hole kept its birth");
    assert_eq!(named(&pool, 3), set([]));
    // Turned into a hole again, by data that is zero.
    cp(&pool, 4, &[data(span + 7, 0)]).unwrap();
    assert!(named(&pool, 3).contains(&(span + 7)));
    assert!(named(&pool, 3).is_subset(&set(span..2 * span)));
    assert_clean(&pool);
}

#[test]
fn a_trimmed_node_keeps_its_birth_when_one_block_is_written() {
    trim_then_write(128);
}

#[test]
fn a_trimmed_subtree_of_two_levels_keeps_its_birth_when_one_block_is_written() {
    trim_then_write(128 * 128);
}

/// A block put with the content it has, and a hole over a hole, are no change at all.
#[test]
fn equal_content_changes_nothing() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(5, 1), data(700, 2)]).unwrap();
    let before = tree(&pool);
    device.clear_trace();
    let set = pool.begin(crate::pool::write_set::Budget::Ordinary);
    let mut set = set;
    let puts = [data(5, 1), Put::Holes(6, 1), data(7, 0), Put::Holes(8, 600), data(700, 2)];
    let built = crate::volume::testing::build(&mut set, before, 2, &puts).unwrap();
    assert_eq!(built, before);
    assert!(changes(&device).is_empty());
    assert_eq!((set.blocks().0, set.freed_blocks().0), (0, 0));
}

/// Content A, B, A: the root is the old one, and the diff still names the block.
#[test]
fn content_a_b_a_has_the_old_root_and_a_new_birth() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    let first = cp(&pool, 1, &[data(5, 1), data(6, 1)]).unwrap();
    cp(&pool, 2, &[data(5, 2)]).unwrap();
    let third = cp(&pool, 3, &[data(5, 1)]).unwrap();
    assert_eq!(first.roots, third.roots);
    assert_eq!(named(&pool, 1), set([5]));
    assert_clean(&pool);
}

#[test]
fn compare_names_exactly_what_differs() {
    let (_, left) = pool_with(2 * POOL_BYTES_MIN, 40_000);
    let (_, right) = pool_with(2 * POOL_BYTES_MIN, 40_000);
    // Different ways to nearly the same content.
    let puts: Vec<Put> = (0..300).map(|n| data(n * 100, 1)).collect();
    cp(&left, 1, &puts).unwrap();
    cp(&right, 1, &[Put::Holes(0, 5), data(100, 9), data(39_999, 3)]).unwrap();
    cp(&right, 2, &puts).unwrap();
    cp(&right, 3, &[Put::Holes(200, 1), data(300, 4), data(301, 5)]).unwrap();
    let differs = |left, right: &Pool| {
        let (a, b) = (tree(left), tree(right));
        let all = compare(left, &a, right, &b).unwrap().map(|d| d.unwrap());
        all.map(|d| (d.vbn.0, d.left.is_hole(), d.right.is_hole())).collect::<Vec<_>>()
    };
    let wanted =
        [(200, false, true), (300, false, false), (301, true, false), (39_999, true, false)];
    assert_eq!(differs(&left, &right), wanted);
    cp(&left, 2, &[Put::Holes(200, 1), data(300, 4), data(301, 5), data(39_999, 3)]).unwrap();
    assert_eq!(differs(&left, &right), []);
    assert_eq!(tree(&left).root(), tree(&right).root());
    let (_, other) = pool_with(POOL_BYTES_MIN, 10);
    assert!(compare(&left, &tree(&left), &other, &tree(&other)).is_err());
}
