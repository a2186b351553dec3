//! Every level is a device like any other, whole and with as many devices lost as it bears.

use std::sync::Arc;

use super::{Rig, SHAPES};
use crate::device::sim::{Effect, On};
use crate::device::{Device, MemberState, conformance};
use crate::raid::layout::Level;
use crate::units::BLOCK_BYTES_U64;

const STRIPES: u64 = 20;

#[test]
fn every_level_passes_the_suite() {
    for (level, members) in SHAPES.into_iter().chain([(Level::None, 2), (Level::None, 3)]) {
        conformance::suite(|| Box::new(Rig::blank(members, STRIPES).create(level)));
    }
}

#[test]
fn every_level_passes_the_suite_without_as_many_devices_as_it_bears() {
    for (level, members) in SHAPES {
        for missing in super::subsets(members, level.spare(members)) {
            if missing.len() == level.spare(members) && missing[0] == members % 2 {
                conformance::suite(|| {
                    let rig = Rig::blank(members, STRIPES);
                    drop(rig.create(level));
                    Box::new(rig.open(&missing))
                });
            }
        }
    }
}

/// A healthy block costs one read of one device.
#[test]
fn a_healthy_block_is_read_once() {
    for (level, members) in SHAPES {
        let rig = Rig::blank(members, STRIPES);
        let array = rig.create(level);
        rig.sims.iter().for_each(|sim| sim.clear_trace());
        for block in 0..array.size().0 / BLOCK_BYTES_U64 {
            super::read_block(&array, block).unwrap();
            let calls: Vec<_> = rig.sims.iter().flat_map(|sim| sim.trace()).collect();
            assert_eq!(calls.len(), 1, "{level:?} {calls:?}");
            rig.sims.iter().for_each(|sim| sim.clear_trace());
        }
    }
}

/// A write or flush that fails costs the device, and no one notices above.
#[test]
fn a_device_that_fails_is_out_and_the_others_know() {
    for (level, members) in SHAPES {
        for on in [On::Write, On::Flush, On::WriteDurable] {
            let rig = Rig::blank(members, STRIPES);
            let array = rig.create(level);
            let bytes = vec![7; 300_000.min(crate::units::convert::to_usize(array.size().0))];
            rig.sims[1].fail(on, 0, Effect::Errno(5));
            array.write_at(4096, &bytes).unwrap();
            array.flush().unwrap();
            let reports = array.members();
            assert_eq!(reports[1].state, MemberState::Failed, "{level:?} {on:?}");
            assert!(reports[1].reason.as_ref().unwrap().contains("disk1"));
            drop(array);
            let opened = rig.try_open(&[]).unwrap();
            assert!(opened.left_out[0].reason.contains("stale"), "{:?}", opened.left_out);
            let mut met = vec![0; bytes.len()];
            opened.array.read_at(4096, &mut met).unwrap();
            assert!(met == bytes, "{level:?} {on:?}");
        }
    }
}

/// A read that fails is answered from the others and costs nobody anything.
#[test]
fn a_failed_read_is_answered_from_the_others() {
    for (level, members) in SHAPES {
        let rig = Rig::blank(members, STRIPES);
        let array: Arc<dyn Device> = rig.create(level);
        let bytes = vec![9; 64 << 10];
        array.write_durable_at(0, &bytes).unwrap();
        rig.sims.iter().for_each(|sim| sim.fail(On::Read, 0, Effect::Errno(5)));
        let spare = level.spare(members);
        rig.sims.iter().skip(spare).for_each(|sim| _ = sim.forget_faults());
        let mut met = vec![0; bytes.len()];
        array.read_at(0, &mut met).unwrap();
        assert!(met == bytes);
        assert!(array.members().iter().all(|member| member.state == MemberState::In));
        assert!(array.members().iter().any(|member| member.read_errors > 0));
    }
}
