//! The write hole: the power goes in the middle of a partial stripe, and devices are missing when
//! it comes back.

use super::{Rig, SHAPES, block, read_block, subsets, version_of};
use crate::device::Device;
use crate::raid::layout::Level;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_usize;

/// Stripes of the array.
const STRIPES: u64 = 3;

/// Writes blocks one by one in partial stripes.
const CHANGED: [u64; 4] = [1, 2, 5, 6];

fn all_blocks(version: u64, blocks: u64) -> Vec<u8> {
    (0..blocks).flat_map(|number| block(number, version)).collect()
}

/// Cuts at the `nth` change of the second flush; `None` when it was not reached. Otherwise
/// blocks that were lost, over all sets of missing devices.
fn lost_at((level, members): (Level, usize), nth: u64, journal: bool, seed: u64) -> Option<usize> {
    let rig = Rig::blank(members, STRIPES);
    let array = rig.create(level);
    let blocks = array.size().0 / BLOCK_BYTES_U64;
    array.write_at(0, &all_blocks(1, blocks)).unwrap();
    array.flush().unwrap();
    array.without_journal.store(!journal, std::sync::atomic::Ordering::Relaxed);
    rig.supply.cut_at(nth);
    let written = CHANGED
        .iter()
        .try_for_each(|number| array.write_at(number * BLOCK_BYTES_U64, &block(*number, 2)))
        .and_then(|()| array.flush());
    if !rig.supply.is_off() {
        written.unwrap();
        return None;
    }
    let spare = level.spare(members);
    let mut lost = 0;
    let left = rig.cut(seed);
    let images: Vec<_> = (0..blocks).map(|number| [block(number, 1), block(number, 2)]).collect();
    let missing = subsets(members, spare).into_iter();
    for missing in missing.filter(|missing| missing.is_empty() || missing.len() == spare) {
        let array = left.copy().open(&missing);
        for number in 0..blocks {
            let [old, new] = &images[to_usize(number)];
            let met = read_block(&array, number).unwrap();
            let changed = CHANGED.contains(&number);
            let good = if changed {
                met == *new || (written.is_err() && met == *old)
            } else {
                met == *old
            };
            lost += usize::from(!good);
        }
    }
    Some(lost)
}

/// Goal: what was flushed survives a cut at each change of a partial write with any devices missing
/// at the restart, and what was not is old or new. Control: without the journal it does not.
#[test]
fn a_partial_stripe_is_old_or_new_whoever_is_missing() {
    for (level, members) in SHAPES {
        let lost = |journal| {
            let all = |seed| {
                (0..).map_while(move |nth| lost_at((level, members), nth, journal, seed + 3 * nth))
            };
            let cuts = (0..if journal { 2 } else { 1 }).flat_map(all);
            cuts.fold((0, 0), |(cuts, lost), more| (cuts + 1, lost + more))
        };
        let (cuts, with) = lost(true);
        assert!(cuts > 5 && with == 0, "{level:?} of {members}: {with} blocks lost, {cuts} cuts");
        let (_, without) = lost(false);
        assert!(without > 0, "{level:?} of {members}: the control finds nothing");
    }
}

/// Goal: an open that is cut, again and again, still ends with everything. Method: the power goes
/// in a partial write, then at each change of the open that follows.
#[test]
fn an_open_that_is_cut_is_done_again() {
    for (level, members) in [(Level::Parity1, 3), (Level::Parity2, 4), (Level::Mirror, 2)] {
        for nth in 0..40 {
            let rig = Rig::blank(members, STRIPES);
            let array = rig.create(level);
            let blocks = array.size().0 / BLOCK_BYTES_U64;
            array.write_at(0, &all_blocks(1, blocks)).unwrap();
            array.flush().unwrap();
            rig.supply.cut_at(crate::units::convert::to_u64(members) + 3);
            drop(array.write_at(BLOCK_BYTES_U64, &block(1, 2)).and_then(|()| array.flush()));
            let left = rig.cut(nth);
            left.supply.cut_at(nth);
            drop(left.try_open(&[0]));
            let left = left.cut(nth + 1);
            let array = left.open(&[0]);
            for number in 0..blocks {
                let version = version_of(number, &read_block(&array, number).unwrap());
                let good = version == Some(1) || (number == 1 && version == Some(2));
                assert!(good, "{level:?}, cut {nth}: block {number} is {version:?}");
            }
            assert!(to_usize(blocks) > 2);
        }
    }
}
