//! Arrays are found from their devices alone; what does not belong is refused by name and reason.

use std::sync::Arc;

use super::{Rig, SHAPES, block, read_block, version_of};
use crate::device::sim::{Effect, On, SimDevice};
use crate::device::{Device, MemberState};
use crate::raid::assemble::{self, AssembleError, OpenOptions};
use crate::raid::layout::Level;
use crate::units::BLOCK_BYTES;

const STRIPES: u64 = 4;
const STRICT: OpenOptions = OpenOptions { accept_missing: false };

fn written(rig: &Rig, level: Level) {
    let array = rig.create(level);
    array.write_durable_at(0, &block(0, 1)).unwrap();
}

#[test]
fn devices_are_found_in_any_order() {
    for (level, members) in SHAPES.into_iter().chain([(Level::None, 3)]) {
        let rig = Rig::blank(members, STRIPES);
        written(&rig, level);
        for turn in 0..members {
            let mut devices = rig.devices();
            devices.rotate_left(turn);
            devices.swap(0, 1);
            let opened = assemble::open(&devices, STRICT).unwrap();
            assert_eq!(opened.left_out, []);
            assert_eq!(version_of(0, &read_block(&opened.array, 0).unwrap()), Some(1));
            assert_eq!(opened.array.level(), level);
        }
    }
}

#[test]
fn strangers_copies_and_stale_devices_are_left_out_by_name() {
    let (level, members) = (Level::Parity2, 5);
    let (rig, other) = (Rig::blank(members, STRIPES), Rig::blank(4, STRIPES));
    written(&rig, level);
    written(&other, Level::Parity1);
    let mut devices = rig.devices();
    devices[4] = Arc::new(SimDevice::from_image("foreign", other.sims[0].image()));
    devices.push(Arc::new(SimDevice::from_image("copy", rig.sims[3].image())));
    devices.push(Arc::new(SimDevice::from_image("blank", vec![0; 4 << 20])));
    let opened = assemble::open(&devices, STRICT).unwrap();
    let reason = |name: &str| {
        let found = opened.left_out.iter().find(|out| &*out.name == name);
        found.map(|out| out.reason.clone()).unwrap_or_default()
    };
    assert!(reason("foreign").contains("belongs to array"), "{:?}", opened.left_out);
    assert!(reason("copy").contains("several copies"));
    assert!(reason("disk3").contains("several copies"));
    assert!(reason("blank").contains("no label"));
    let out = |place: usize| opened.array.members()[place].state == MemberState::Failed;
    assert_eq!([0, 1, 2, 3, 4].map(out), [false, false, false, true, true]);
    assert_eq!(version_of(0, &read_block(&opened.array, 0).unwrap()), Some(1));
    drop(opened);
    // Both are back, and it is known that the array went on without them.
    let met = assemble::open(&rig.devices(), STRICT).unwrap().left_out;
    assert_eq!(met.iter().filter(|out| out.reason.contains("stale")).count(), 2, "{met:?}");
}

/// Goal: a device that was away never brings the past back, whoever else is missing (R9).
#[test]
fn a_stale_device_alone_is_no_array() {
    let rig = Rig::blank(2, STRIPES);
    let array = rig.create(Level::Mirror);
    rig.sims[0].fail(On::Write, 0, Effect::Errno(5));
    array.write_durable_at(0, &block(0, 1)).unwrap();
    array.write_durable_at(0, &block(0, 2)).unwrap();
    drop(array);
    let alone = |place: usize, options| assemble::open(&[rig.device(place)], options);
    let met = alone(0, STRICT).unwrap_err();
    assert!(matches!(met, AssembleError::MayBeOlder { missing: 1, members: 2, .. }), "{met}");
    let array = alone(1, STRICT).unwrap().array;
    assert_eq!(version_of(0, &read_block(&array, 0).unwrap()), Some(2));
    // Control: the flag takes the risk, and shows the past.
    let copy = rig.copy();
    let array = assemble::open(&[copy.device(0)], OpenOptions { accept_missing: true });
    assert_eq!(version_of(0, &read_block(&array.unwrap().array, 0).unwrap()), Some(1));
}

/// A leg that was in all the time comes back as it was one run ago: it reads whole, and is older (R9).
#[test]
fn a_leg_that_was_rolled_back_is_left_out() {
    for (level, members) in SHAPES {
        for place in 0..members {
            let rig = Rig::blank(members, STRIPES);
            written(&rig, level);
            let before = rig.copy();
            let array = assemble::open(&rig.devices(), STRICT).unwrap().array;
            array.write_durable_at(0, &block(0, 2)).unwrap();
            drop(array);
            let mut devices = rig.devices();
            devices[place] = before.device(place);
            let opened = assemble::open(&devices, STRICT).unwrap();
            let [out] = &opened.left_out[..] else { panic!("{:?}", opened.left_out) };
            assert!(out.reason.contains("was rolled back"), "{out:?}");
            assert_eq!(opened.array.members()[place].state, MemberState::Failed);
            assert_eq!(version_of(0, &read_block(&opened.array, 0).unwrap()), Some(2));
            drop(opened);
            // From then on it is known by the labels alone.
            let met = assemble::open(&devices, STRICT).unwrap().left_out;
            assert!(met[0].reason.contains("stale"), "{met:?}");
        }
    }
}

/// Opens that were cut, one behind the other, roll nobody back.
#[test]
fn opens_that_are_cut_again_and_again_leave_nobody_out() {
    for first in 0.. {
        let rig = Rig::blank(3, STRIPES);
        written(&rig, Level::Parity1);
        rig.supply.cut_at(first);
        let whole = assemble::open(&rig.devices(), STRICT).is_ok();
        let mut left = rig.cut(first);
        for again in 0..8 {
            left.supply.cut_at(again);
            drop(assemble::open(&left.devices(), STRICT));
            left = left.cut(again);
        }
        let opened = assemble::open(&left.devices(), STRICT).unwrap();
        assert_eq!(opened.left_out, [], "cut {first}");
        assert_eq!(version_of(0, &read_block(&opened.array, 0).unwrap()), Some(1));
        if whole {
            assert!(first > 8, "nothing was cut");
            return;
        }
    }
}

/// After both sides went on alone there are two histories, and no open guesses.
#[test]
fn two_histories_are_refused() {
    let rig = Rig::blank(2, STRIPES);
    written(&rig, Level::Mirror);
    let risky = OpenOptions { accept_missing: true };
    for place in 0..2 {
        let array = assemble::open(&[rig.device(place)], risky).unwrap().array;
        array.write_durable_at(0, &block(0, 2)).unwrap();
    }
    let met = assemble::open(&rig.devices(), risky).unwrap_err();
    assert!(matches!(met, AssembleError::Several { .. }), "{met}");
    // One of them was opened more often: that does not make it right.
    drop(assemble::open(&[rig.device(0)], risky).unwrap());
    let met = assemble::open(&rig.devices(), risky).unwrap_err();
    assert!(matches!(met, AssembleError::Several { .. }), "{met}");
}

#[test]
fn a_creation_that_was_cut_is_begun_anew_and_others_are_spared() {
    for nth in 0.. {
        let rig = Rig::blank(3, STRIPES);
        rig.supply.cut_at(nth);
        let made = assemble::create(Level::Parity1, &rig.devices());
        let left = rig.cut(nth);
        match assemble::open(&left.devices(), STRICT) {
            Ok(opened) => assert_eq!(opened.array.level(), Level::Parity1),
            Err(AssembleError::None) => {
                left.create(Level::Parity1);
            }
            Err(error) => panic!("cut {nth}: {error}"),
        }
        if made.is_ok() {
            break;
        }
    }
    let rig = Rig::blank(3, STRIPES);
    rig.sims[1].plant(100, &[1]);
    let met = assemble::create(Level::Parity1, &rig.devices()).unwrap_err();
    assert!(matches!(met, AssembleError::NotBlank { .. }), "{met}");
    assert!(rig.sims[0].image().iter().all(|byte| *byte == 0), "nothing was written");
    let met = assemble::create(Level::Parity2, &rig.devices()).unwrap_err();
    assert!(matches!(met, AssembleError::Shape { .. }), "{met}");
}

/// Rot in every place of labels and journals costs at most a device.
#[test]
fn rot_in_labels_and_journals_costs_at_most_a_device() {
    let rig = Rig::blank(3, STRIPES);
    written(&rig, Level::Parity1);
    let data = crate::raid::layout::data_start(crate::limits::RAID_CHUNK_BYTES);
    for at in (0..data).step_by(BLOCK_BYTES / 2) {
        let left = rig.copy();
        left.sims[0].rot(at + 8, &[0xff; 2000]);
        let array = assemble::open(&left.devices(), STRICT).unwrap().array;
        assert_eq!(version_of(0, &read_block(&array, 0).unwrap()), Some(1), "rot at {at}");
    }
}
