//! One fault more than a level bears: an error that names the blocks, never wrong data.

use std::sync::Arc;

use super::{Rig, SHAPES, block, read_block, version_of};
use crate::device::sim::{Effect, On};
use crate::device::{Device, DeviceError};
use crate::limits::RAID_CHUNK_BYTES;
use crate::raid::array::Array;
use crate::raid::layout::{Level, data_start};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

const STRIPES: u64 = 6;

fn filled(level: Level, members: usize) -> (Rig, Arc<Array>, u64) {
    let rig = Rig::blank(members, STRIPES);
    let array = rig.create(level);
    let blocks = array.size().0 / BLOCK_BYTES_U64;
    let bytes: Vec<u8> = (0..blocks).flat_map(|number| block(number, 1)).collect();
    array.write_durable_at(0, &bytes).unwrap();
    (rig, array, blocks)
}

/// Too many devices fail while it runs: writes and flushes are refused from then on, and a read
/// is right or an error that names the block.
#[test]
fn too_many_failed_devices_are_an_error() {
    for (level, members) in SHAPES.into_iter().chain([(Level::None, 2), (Level::None, 3)]) {
        let (rig, array, blocks) = filled(level, members);
        for sim in &rig.sims[..=level.spare(members)] {
            (0..1000).for_each(|_| sim.fail(On::Write, 0, Effect::Errno(5)));
            sim.fail(On::Flush, 0, Effect::Errno(5));
            sim.fail(On::WriteDurable, 0, Effect::Errno(5));
        }
        let all: Vec<u8> = (0..blocks).flat_map(|number| block(number, 2)).collect();
        let met = array.write_durable_at(0, &all).unwrap_err();
        assert!(matches!(met, DeviceError::Lost { .. }), "{level:?} {met}");
        assert!(met.to_string().contains("disk0"), "{met}");
        for refused in [array.write_at(0, &[1; 4096]), array.flush()] {
            assert!(matches!(refused, Err(DeviceError::Latched { .. })), "{level:?}");
        }
        let mut errors = 0;
        for number in 0..blocks {
            match read_block(&array, number) {
                Ok(bytes) => assert!(matches!(version_of(number, &bytes), Some(1 | 2))),
                Err(error) => {
                    errors += 1;
                    let at = format!("at {}", number * BLOCK_BYTES_U64);
                    assert!(error.to_string().contains(&at), "{error}");
                }
            }
        }
        match level {
            // What lies above knows what of it is right.
            Level::None => assert_eq!(errors, 0),
            Level::Mirror | Level::Parity1 | Level::Parity2 => assert!(errors > 0, "{level:?}"),
        }
    }
}

/// A plain device of a pool that grew refuses writes after its first failed one, and is read on.
#[test]
fn a_plain_device_that_failed_a_write_is_read_on() {
    let rig = Rig::blank(1, STRIPES);
    let array = Array::bare(rig.sims[0].clone());
    array.write_at(0, &block(0, 1)).unwrap();
    array.flush().unwrap();
    rig.sims[0].fail(On::Write, 0, Effect::Errno(5));
    array.write_at(BLOCK_BYTES_U64, &block(1, 1)).unwrap_err();
    let refused = array.write_at(BLOCK_BYTES_U64, &block(1, 1));
    assert!(matches!(refused, Err(DeviceError::Latched { .. })), "{refused:?}");
    assert_eq!(version_of(0, &read_block(&array, 0).unwrap()), Some(1));
}

/// One device missing too many: there is no array, and it says who is there and what is needed.
#[test]
fn too_many_missing_devices_are_refused() {
    for (level, members) in SHAPES {
        let (rig, array, _) = filled(level, members);
        drop(array);
        let missing: Vec<usize> = (0..=level.spare(members)).collect();
        if missing.len() == members {
            continue;
        }
        let met = rig.try_open(&missing).unwrap_err().to_string();
        assert!(met.contains("are needed"), "{met}");
        rig.open(&missing[1..]);
    }
}

/// One rotten block more in a row than it bears: no other copy is right, and none is taken for it.
#[test]
fn too_much_rot_in_a_row_is_found_and_not_mended() {
    for (level, members) in SHAPES {
        let (rig, array, blocks) = filled(level, members);
        let spare = level.spare(members);
        for rotten in [spare, spare + 1] {
            let rot = || {
                for (sim, way) in rig.sims[..rotten].iter().zip(1_u64..) {
                    let front = data_start(RAID_CHUNK_BYTES);
                    for at in (front..sim.size().0).step_by(BLOCK_BYTES) {
                        sim.rot(at, &block(at, way)[8..72]);
                    }
                }
            };
            rot();
            let mut lost = 0;
            for number in 0..blocks {
                let right = |bytes: &[u8; 4096]| version_of(number, bytes) == Some(1);
                let own = right(&read_block(&array, number).unwrap());
                let other = (0..array.alternatives()).any(|nth| {
                    let mut bytes = [0; 4096];
                    let met = array.read_alternative(nth, number * BLOCK_BYTES_U64, &mut bytes);
                    met.is_ok() && right(&bytes)
                });
                lost += u64::from(!own && !other);
            }
            assert_eq!(lost > 0, rotten > spare, "{level:?} of {members}: {lost}");
            // Back again.
            rot();
        }
    }
}
