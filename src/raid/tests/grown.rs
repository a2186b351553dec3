//! Devices that are added behind an array: the power goes at each change, and whatever is left opens as
//! the array that was, or as the larger one.

use std::path::PathBuf;

use super::*;
use crate::raid::span::{self, Adding, Span, Wanted};
use crate::units::ids::ArrayId;

const ID: ArrayId = ArrayId([7; 16]);

fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("disk{n}")).collect()
}

fn adding(members: usize) -> Vec<Adding> {
    let paths = (members..2 * members).map(|n| PathBuf::from(format!("disk{n}"))).collect();
    vec![Adding { array: ID, paths, done: false }]
}

/// Opens those of the first so many devices that are not missing.
fn open(
    rig: &Rig,
    (level, count): (Level, usize),
    adding: &[Adding],
    missing: &[usize],
) -> Result<(Arc<dyn Device>, usize), AssembleError> {
    let there = (0..count).filter(|place| !missing.contains(place));
    let there: Vec<_> = there.map(|place| rig.device(place)).collect();
    let names = names(count);
    let wanted = Wanted { shape: (level, count), names: &names, adding, plain: |_| None };
    let options = OpenOptions { accept_missing: true };
    span::open(&there, wanted, options).map(|(device, out)| (device, out.len()))
}

fn write(device: &dyn Device, from: u64, to: u64, version: u64) -> Result<(), DeviceError> {
    for number in from..to {
        device.write_at(number * BLOCK_BYTES_U64, &block(number, version))?;
    }
    device.flush()
}

fn check(device: &dyn Device, from: u64, to: u64, version: u64) {
    for number in from..to {
        let mut bytes = [0; BLOCK_BYTES];
        device.read_at(number * BLOCK_BYTES_U64, &mut bytes).unwrap();
        assert_eq!(version_of(number, &bytes), Some(version), "block {number}");
    }
}

fn blocks(device: &dyn Device) -> u64 {
    device.size().0 / BLOCK_BYTES_U64
}

/// Twice as many devices as the array has, of which the first half is one that holds something.
fn rig(level: Level, members: usize) -> Rig {
    let rig = Rig::blank(2 * members, 6);
    let first: Vec<_> = (0..members).map(|place| rig.device(place)).collect();
    let array = assemble::create(level, &first).unwrap();
    write(&*array, 0, blocks(&*array), 1).unwrap();
    rig
}

fn add(rig: &Rig, level: Level, members: usize) -> Result<(), AssembleError> {
    let home: Vec<_> = (0..members).map(|place| rig.device(place)).collect();
    let home = assemble::open_as(&home, Some((level, members)), OpenOptions::default())?.array;
    let new: Vec<_> = (members..2 * members).map(|place| rig.device(place)).collect();
    span::add(&home, ID, &new).map(drop)
}

/// Goal: each level is twice as large afterwards, keeps what it held, bears what it bore on either part,
/// and is found in any order.
#[test]
fn every_level_grows() {
    for (level, members) in
        [(Level::None, 2), (Level::Mirror, 2), (Level::Parity1, 3), (Level::Parity2, 4)]
    {
        let rig = rig(level, members);
        add(&rig, level, members).unwrap();
        add(&rig, level, members).unwrap();
        let all = (level, 2 * members);
        let (device, _) = open(&rig, all, &[], &[]).unwrap();
        let half = blocks(&*device) / 2;
        check(&*device, 0, half, 1);
        write(&*device, half - 3, 2 * half, 2).unwrap();
        assert_eq!(device.members().len(), 2 * members);
        drop(device);
        let spare = level.spare(members);
        let missing: Vec<usize> = (0..spare).flat_map(|n| [n, members + n]).collect();
        let (device, _) = open(&rig, all, &[], &missing).unwrap();
        check(&*device, 0, half - 3, 1);
        check(&*device, half - 3, 2 * half, 2);
        drop(device);
        // One more of the part that was added.
        let more: Vec<usize> = (0..=spare).map(|n| members + n).collect();
        let error = open(&rig, all, &[], &more).unwrap_err().to_string();
        assert!(error.contains("are needed") || error.contains("is there"), "{level:?}: {error}");
    }
}

/// Goal: cut at any change of the addition, the devices open as they did before, without the new ones and
/// without knowing of them; with what the process remembers the addition is gone on with.
#[test]
fn the_power_goes_at_each_step() {
    for (level, members) in [(Level::Mirror, 2), (Level::Parity1, 3)] {
        let mut ended = false;
        for nth in 0.. {
            let rig = rig(level, members);
            rig.supply.cut_at(nth);
            ended = add(&rig, level, members).is_ok() && !rig.supply.is_off();
            let left = rig.cut(nth);
            let named = add_is_named(&left, members);
            // The file names the old devices, and nobody remembers: the old array, if it may be.
            let alone = open(&left.copy(), (level, members), &[], &[]);
            match alone {
                Ok((device, _)) => check(&*device, 0, blocks(&*device), 1),
                Err(error) => assert!(named && error.to_string().contains("was added"), "{error}"),
            }
            // With what is remembered: the larger one, twice over.
            for _ in 0..2 {
                let (device, out) =
                    open(&left, (level, 2 * members), &adding(members), &[]).unwrap();
                assert_eq!(out, 0, "cut at {nth}");
                let half = blocks(&*device) / 2;
                check(&*device, 0, half, 1);
                write(&*device, half, 2 * half, 3).unwrap();
                check(&*device, half, 2 * half, 3);
            }
            if ended {
                assert!(nth > 10, "{nth}");
                break;
            }
        }
        assert!(ended);
    }
}

fn add_is_named(rig: &Rig, members: usize) -> bool {
    let label = |place| crate::raid::label::read(&*rig.device(place));
    (0..members).any(|place| label(place).is_ok_and(|label| !label.added.is_empty()))
}

/// Goal: nothing is taken that is not blank and not what was remembered; those that are there are served.
#[test]
fn foreign_devices_are_not_added() {
    let (level, members) = (Level::Mirror, 2);
    let rig = rig(level, members);
    // A finished array of somebody else at the remembered paths.
    let theirs: Vec<_> = (members..2 * members).map(|place| rig.device(place)).collect();
    let array = assemble::create(level, &theirs).unwrap();
    write(&*array, 0, 8, 9).unwrap();
    drop(array);
    let before: Vec<_> = (members..2 * members).map(|place| rig.sims[place].image()).collect();
    let (device, out) = open(&rig, (level, 2 * members), &adding(members), &[]).unwrap();
    assert_eq!(out, 2);
    check(&*device, 0, blocks(&*device), 1);
    let after: Vec<_> = (members..2 * members).map(|place| rig.sims[place].image()).collect();
    assert!(before == after, "a foreign device was written to");
    let error = add(&rig, level, members).unwrap_err().to_string();
    assert!(error.contains("holds something already"), "{error}");
    // Not as many as the array has.
    let home = rig.open(&[2, 3]);
    let error = span::add(&home, ID, &theirs[..1]).unwrap_err().to_string();
    assert!(error.contains("mirror of 1"), "{error}");
    assert_eq!(Span::new(vec![home]).stripes(), 6);
}
