//! A device is replaced: what is in use is filled, whatever is written meanwhile, wherever it is cut.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Rig, SHAPES, block, read_block, version_of};
use crate::device::Device;
use crate::device::sim::{Chance, Effect, On, SimDevice};
use crate::raid::array::Array;
use crate::raid::assemble::{self, OpenOptions};
use crate::raid::layout::Level;
use crate::raid::rebuild::{ManageError, Step};
use crate::units::convert::{to_u64, to_usize};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

const STRIPES: u64 = 48;

/// An array whose front half is in use, and what is in it.
struct Half {
    rig: Rig,
    array: Arc<Array>,
    /// By block; 0: never written.
    versions: Vec<u64>,
    in_use: BTreeSet<u64>,
}

impl Half {
    fn new(level: Level, members: usize) -> Self {
        let rig = Rig::blank(members, STRIPES);
        let array = rig.create(level);
        let blocks = array.size().0 / BLOCK_BYTES_U64;
        let (versions, in_use) = (vec![0; to_usize(blocks)], BTreeSet::new());
        let mut half = Self { rig, array, versions, in_use };
        (0..blocks / 2).for_each(|number| half.write(number, 1));
        half.array.flush().unwrap();
        half
    }

    fn write(&mut self, number: u64, version: u64) {
        self.in_use.insert(number);
        self.array.write_at(number * BLOCK_BYTES_U64, &block(number, version)).unwrap();
        self.versions[to_usize(number)] = version;
    }

    fn plan(&self) {
        let in_use = &self.in_use;
        let any = |first: u64, count: u64| in_use.range(first..first + count).next().is_some();
        self.array.plan_rebuild(&any);
    }

    /// A blank device in the place of that one.
    fn replace(&mut self, place: usize) {
        let name = format!("new{place}");
        let size = self.rig.sims[place].size();
        // What it held before lies behind its first bytes, and must not be taken for anything.
        let mut image = vec![0x77; to_usize(size.0)];
        image[..1 << 20].fill(0);
        self.rig.sims[place] = Arc::new(SimDevice::from_image(&name, image));
        self.array.replace(place, self.rig.device(place)).unwrap();
    }

    fn fill(&self) -> (u64, u64) {
        let (mut filled, mut left_out) = (0, 0);
        loop {
            match self.array.rebuild_step().unwrap() {
                Step::Idle => return (filled, left_out),
                Step::Done => {}
                Step::LeftOut => left_out += 1,
                Step::Filled(_) => filled += 1,
            }
        }
    }

    fn check(&self, what: &str) {
        for number in &self.in_use {
            let met = version_of(*number, &read_block(&self.array, *number).unwrap());
            assert_eq!(met, Some(self.versions[to_usize(*number)]), "{what}: block {number}");
        }
    }

    /// Every block in use, without each set of devices that the level bears.
    fn check_without_others(&self, level: Level, what: &str) {
        self.array.flush().unwrap();
        let members = self.rig.sims.len();
        for missing in super::subsets(members, level.spare(members)) {
            let copy = self.rig.copy();
            let array = copy.open(&missing);
            for number in &self.in_use {
                let met = version_of(*number, &read_block(&array, *number).unwrap());
                let wanted = Some(self.versions[to_usize(*number)]);
                assert_eq!(met, wanted, "{what}: block {number} without {missing:?}");
            }
        }
    }
}

/// Goal: a replaced device is filled with what is in use and with nothing else, while clients write
/// before, behind and into what was left out; afterwards any others may go. Control: without the
/// parity that a first write into a left-out stripe makes, this fails (see `touch`).
#[test]
fn what_is_in_use_is_filled_while_others_write() {
    for (level, members) in SHAPES {
        let mut half = Half::new(level, members);
        let place = members - 1;
        half.array.fail_device(place, "by hand").unwrap();
        let blocks = to_u64(half.versions.len());
        let mut chance = Chance::new(7);
        half.write(3, 2);
        half.replace(place);
        // Between the labels and the plan: it must not be taken for unused.
        half.write(blocks - 1, 2);
        half.array.flush().unwrap();
        half.plan();
        let to_fill = half.array.stripes_to_fill();
        assert!((STRIPES / 2..=STRIPES / 2 + 2).contains(&to_fill), "{level:?}: {to_fill}");
        for version in 3..15 {
            for _ in 0..3 {
                half.array.rebuild_step().unwrap();
            }
            for _ in 0..4 {
                half.write(chance.below(blocks), version);
            }
            if chance.below(2) == 0 {
                half.array.flush().unwrap();
            }
            half.check("while it is filled");
        }
        half.fill();
        assert!(half.array.members().iter().all(|member| member.reason.is_none()), "{level:?}");
        half.check("filled");
        // Into what was left out, now that it is in.
        for _ in 0..20 {
            half.write(chance.below(blocks), 20);
            half.array.flush().unwrap();
        }
        half.check_without_others(level, "after");
        let array = assemble::open(&half.rig.devices(), OpenOptions::default()).unwrap().array;
        let in_use = &half.in_use;
        array.note_unused(&|first, count| in_use.range(first..first + count).next().is_some());
        half.array = array;
        for _ in 0..20 {
            half.write(chance.below(blocks), 30);
            half.array.flush().unwrap();
        }
        half.check_without_others(level, "after an open");
    }
}

/// Goal: whatever is cut in the middle of a replacement, the array opens, has everything, and goes
/// on with it; the old device is known to be replaced as soon as the new one is of the array.
#[test]
fn a_replacement_is_cut_everywhere() {
    for (level, members) in [(Level::Mirror, 2), (Level::Parity1, 3), (Level::Parity2, 4)] {
        let mut ended = false;
        for nth in 0..400 {
            let mut half = Half::new(level, members);
            let old = Arc::clone(&half.rig.sims[1]);
            half.array.fail_device(1, "by hand").unwrap();
            let size = half.rig.sims[1].size();
            half.rig.sims[1] = Arc::new(SimDevice::new("new", size));
            half.rig.supply.cut_at(nth);
            let mut done = half.array.replace(1, half.rig.device(1)).is_ok();
            half.plan();
            for step in 0.. {
                match half.array.rebuild_step() {
                    Ok(Step::Idle) => break,
                    Ok(_) if step % 4 == 3 => done &= half.array.note_filled().is_ok(),
                    Ok(_) => {}
                    Err(_) => {
                        done = false;
                        break;
                    }
                }
            }
            ended = done && !half.rig.supply.is_off();
            let left = half.rig.cut(nth);
            let opened = assemble::open(&left.devices(), OpenOptions::default()).unwrap();
            let joined = opened.left_out.is_empty();
            let in_use = half.in_use.clone();
            let any = move |first: u64, count| in_use.range(first..first + count).next().is_some();
            opened.array.note_unused(&any);
            (half.array, half.rig) = (opened.array, left);
            half.check(&format!("{level:?} cut {nth}"));
            if joined {
                let mut devices = half.rig.devices();
                devices[1] = old;
                let met = match assemble::open(&devices, OpenOptions::default()) {
                    Ok(opened) => format!("{:?}", opened.left_out),
                    Err(error) => error.to_string(),
                };
                assert!(met.contains("was replaced"), "{met}");
            }
            if ended {
                break;
            }
        }
        assert!(ended, "{level:?}: never came to its end");
    }
}

/// Goal: an array that is opened in the middle of a filling goes on with it to its end.
#[test]
fn a_filling_goes_on_after_an_open() {
    for (level, members) in SHAPES {
        let mut half = Half::new(level, members);
        half.array.fail_device(0, "by hand").unwrap();
        half.replace(0);
        half.plan();
        for _ in 0..6 {
            half.array.rebuild_step().unwrap();
        }
        half.array.note_filled().unwrap();
        half.array.rebuild_step().unwrap();
        half.rig = half.rig.cut(1);
        half.array = assemble::open(&half.rig.devices(), OpenOptions::default()).unwrap().array;
        let in_use = half.in_use.clone();
        half.array.note_unused(&|first, count| in_use.range(first..first + count).next().is_some());
        assert_eq!(half.array.filling().devices, 1, "{level:?}");
        let (left, filling) = (half.array.stripes_to_fill(), half.array.filling());
        assert!(left <= STRIPES / 2 - 6, "{level:?}: it begins again: {left} {filling:?}");
        half.fill();
        half.check_without_others(level, "gone on");
    }
}

/// Goal: with two devices out, what most lack is filled first, both at once; a second one that comes
/// later begins where the first is.
#[test]
fn the_most_endangered_stripes_come_first() {
    for together in [true, false] {
        let mut half = Half::new(Level::Parity2, 5);
        half.array.fail_device(1, "by hand").unwrap();
        half.array.fail_device(3, "by hand").unwrap();
        let met = half.array.fail_device(0, "by hand").unwrap_err();
        assert!(matches!(met, ManageError::NotBorne { out: 2, spare: 2, .. }), "{met}");
        half.replace(1);
        half.plan();
        let steps = if together { 0 } else { 5 };
        (0..steps).for_each(|_| assert!(matches!(half.array.rebuild_step(), Ok(Step::Filled(_)))));
        half.replace(3);
        half.plan();
        assert_eq!(half.array.filling().left_stripes, STRIPES);
        for _ in steps..STRIPES / 2 {
            half.array.rebuild_step().unwrap();
        }
        // All that two lacked is filled: one more may go now.
        half.array.fail_device(3, "by hand").unwrap();
        half.check("the rest is there");
        half.array.flush().unwrap();
        half.replace(3);
        half.plan();
        half.fill();
        assert_eq!(half.array.filling().devices, 0);
        half.check_without_others(Level::Parity2, "filled");
    }
}

/// What cannot be a new device is refused by name, and nothing changes.
#[test]
fn what_is_no_new_device_is_refused() {
    let mut half = Half::new(Level::Parity1, 3);
    let size = half.rig.sims[0].size();
    let fresh = |bytes: u64| -> Arc<dyn Device> {
        Arc::new(SimDevice::new("fresh", crate::units::numbers::ByteCount(bytes)))
    };
    let met = half.array.replace(0, fresh(size.0)).unwrap_err();
    assert!(matches!(met, ManageError::OutAlready { .. }), "{met}");
    half.array.fail_device(0, "by hand").unwrap();
    let met = half.array.fail_device(0, "by hand").unwrap_err().to_string();
    assert!(met.contains("is out already: by hand"), "{met}");
    let met = half.array.replace(0, fresh(size.0 - 512)).unwrap_err();
    assert!(matches!(met, ManageError::TooSmall { .. }), "{met}");
    let member = half.rig.device(0);
    let met = half.array.replace(0, member).unwrap_err();
    assert!(matches!(met, ManageError::NotBlank { .. }), "{met}");
    assert!(half.array.place_of("disk9").is_err());
    assert_eq!(half.array.place_of("disk2").unwrap(), 2);
    assert_eq!(half.array.place_of("2").unwrap(), 2);
    half.replace(0);
    half.plan();
    half.fill();
    half.check_without_others(Level::Parity1, "replaced");
}

/// Goal: a device of which too many answers are errors, or slow, is failed with that reason, and
/// never more of them than the level bears.
#[test]
fn a_device_that_answers_badly_is_failed() {
    let half = Half::new(Level::Parity1, 3);
    for _ in 0..crate::limits::RAID_ERRORS_MAX {
        half.rig.sims[1].fail(On::Read, 0, Effect::Errno(5));
        let mut buffer = vec![0; BLOCK_BYTES * 64];
        half.array.read_at(0, &mut buffer).unwrap();
        half.rig.sims[1].forget_faults();
    }
    half.array.look().unwrap();
    let reason = half.array.members()[1].reason.clone().unwrap();
    assert!(reason.contains("of its answers in 10 minutes were errors"), "{reason}");
    half.check("failed by policy");
    // The other two are needed, however they answer.
    for _ in 0..crate::limits::RAID_ERRORS_MAX {
        half.rig.sims[2].fail(On::Read, 0, Effect::Errno(5));
        let mut buffer = vec![0; BLOCK_BYTES * 64];
        let _lost = half.array.read_at(0, &mut buffer);
        half.rig.sims[2].forget_faults();
    }
    half.array.look().unwrap();
    half.check("still served");
}
