//! What a pull costs on the wire and in memory, on volumes too large for a test's pool.

use crate::limits::PULL_PARTS_MIN;
use crate::pool::testing::Chance;
use crate::units::convert::{to_f64, to_u64};
use crate::volume::pull::Puller;
use crate::volume::pull::terms::{Put, Window};

use super::pulling::{Fake, Go, NARROW, drive, fake_block};

/// Goal: 1% random blocks of a full 1 GiB cost at most 1.5 bytes on the wire per changed byte,
/// headers and requests of both directions counted.
#[test]
fn random_changes_of_a_full_gibibyte_cost_one_and_a_half_bytes_a_byte() {
    let blocks = 262_144;
    let own = Fake::new(vec![1; blocks]);
    let mut chance = Chance::new(11);
    let changed: std::collections::BTreeSet<u64> =
        (0..blocks / 100).map(|_| chance.below(to_u64(blocks))).collect();
    let target = own.with(changed.iter().map(|&vbn| (vbn, 2)));
    let window = Window::default();
    let mut puller = Puller::new(own, target.target(), window, 1).unwrap();
    let mut expected = changed.iter();
    let wire_bytes = drive(
        &mut puller,
        window,
        |ask| target.serve(ask),
        |put| {
            let Put::Data { vbn, block } = put else { panic!("{put:?}") };
            assert_eq!(Some(&vbn.0), expected.next());
            assert_eq!(**block, fake_block(vbn.0, 2));
            Go::On
        },
    )
    .unwrap();
    assert_eq!(expected.next(), None);
    let cost = to_f64(wire_bytes) / to_f64(to_u64(changed.len()) * 4096);
    println!("{cost:.3} bytes a byte, {:?}", puller.counters());
    assert!(cost <= 1.5, "{cost:.3} bytes on the wire for each changed byte");
    assert!(puller.counters().answer_bytes <= wire_bytes);
}

/// Goal: memory goes by window and height, not by the volume. The driver asserts the bound at
/// each step; here the bound is met, and everything arrives.
#[test]
fn memory_goes_by_the_window() {
    let blocks = 40_000;
    let target = Fake::new(vec![1; blocks]);
    let own = Fake::new(vec![0; blocks]);
    let tight = Window { bytes: 200_000, requests: 64, parts: PULL_PARTS_MIN };
    for window in [NARROW, tight, Window::default()] {
        let mut puller = Puller::new(own.clone(), target.target(), window, 1).unwrap();
        let mut next = 0;
        let put = |put: &Put| {
            let Put::Data { vbn, .. } = put else { panic!("{put:?}") };
            assert_eq!(vbn.0, next);
            next += 1;
            Go::On
        };
        drive(&mut puller, window, |ask| target.serve(ask), put).unwrap();
        assert_eq!(next, to_u64(blocks));
        assert_eq!(puller.counters().nodes, 313 + 3 + 1);
        // Wide windows ask in full requests; the narrowest pays one for each block and node.
        let least = if window == NARROW { to_u64(blocks) + 317 } else { 0 };
        let most = if window == Window::default() { 1350 } else { to_u64(blocks) + 317 };
        assert!((least..=most).contains(&puller.counters().requests), "{:?}", puller.counters());
    }
}

/// Goal: a tree of four levels comes through any window: scattered blocks, scattered holes and
/// whole holes between them, in order and exactly.
#[test]
fn a_high_tree_comes_through_any_window() {
    let blocks = 128 * 128 * 128 + 5000;
    let mut chance = Chance::new(5);
    let mut places = |count: u64, version: u8| -> Vec<(u64, u8)> {
        (0..count).map(|_| (chance.below(to_u64(blocks)), version)).collect()
    };
    let common = Fake::new(vec![0; blocks]).with(places(3000, 1));
    let own = common.with(places(1500, 1));
    let dense = (1_900_000..1_903_000).map(|vbn| (vbn, 3));
    let target = common.with(places(1500, 2)).with((5000..400_000).map(|vbn| (vbn, 0)));
    let target = target.with(dense);
    let tight = Window { bytes: 200_000, requests: 64, parts: PULL_PARTS_MIN };
    for window in [NARROW, tight, Window::default()] {
        let mut puller = Puller::new(own.clone(), target.target(), window, 1).unwrap();
        let mut next = 0;
        let equal = |range: std::ops::Range<u64>| {
            range.into_iter().all(|vbn| own.version(vbn) == target.version(vbn))
        };
        let put = |put: &Put| {
            let (first, end) = match put {
                Put::Data { vbn, block } => {
                    assert_eq!(**block, fake_block(vbn.0, target.version(vbn.0)));
                    (vbn.0, vbn.0 + 1)
                }
                Put::Holes { vbn, count } => {
                    assert!((vbn.0..vbn.0 + count).all(|vbn| target.version(vbn) == 0));
                    (vbn.0, vbn.0 + count)
                }
            };
            assert!(first >= next && equal(next..first), "{put:?} after {next}");
            next = end;
            Go::On
        };
        drive(&mut puller, window, |ask| target.serve(ask), put).unwrap();
        assert!(equal(next..to_u64(blocks)));
    }
}
