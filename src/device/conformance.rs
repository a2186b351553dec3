//! One suite of checks that every implementation of [`Device`] passes.
//!
//! Called from the tests of each implementation (file, latch, sim, RAID) with a closure that makes
//! a fresh device of at least 256 KiB. A broken promise is a panic with the name of the check.

use super::buffer::AlignedBuffer;
use super::{Device, DeviceError};
use crate::units::convert::{to_u64, to_usize};

/// Runs all checks, each on a device of its own.
pub fn suite(make: impl Fn() -> Box<dyn Device>) {
    says_the_same_about_itself(&*make());
    reads_what_was_written(&*make());
    leaves_the_neighbours_alone(&*make());
    refuses_what_lies_outside(&*make());
    takes_the_edges(&*make());
    agrees_with_plain_memory(&*make());
    keeps_neighbours_of_many_threads(&*make());
    writes_pieces_as_one(&*make());
}

/// Pieces of odd and of even sizes, aligned in memory and not, few and more than a call takes.
fn writes_pieces_as_one(device: &dyn Device) {
    let bytes = AlignedBuffer::gathered(&[&pattern(21, 3 * 65_536)]);
    let cuts: [&[usize]; 5] = [
        &[],
        &[65_536, 65_536, 65_536],
        &[4096, 61_440, 131_072],
        &[1, 0, 4095, 70_000, 122_512],
        &[64; 1100],
    ];
    for (offset, cuts) in [(4096, 0), (4096, 1), (0, 2), (8192, 3), (777, 1), (4096, 4)]
        .map(|(offset, at)| (offset, cuts[at]))
    {
        write(device, 0, &[3; 256 << 10], false);
        let mut rest: &[u8] = &bytes;
        let mut pieces = Vec::new();
        for length in cuts {
            let (piece, others) = rest.split_at(*length);
            pieces.push(piece);
            rest = others;
        }
        good(device.write_pieces_at(offset, &pieces), "write of pieces");
        let mut wanted = vec![3; 256 << 10];
        let whole = pieces.concat();
        wanted[to_usize(offset)..][..whole.len()].copy_from_slice(&whole);
        assert!(read(device, 0, 256 << 10) == wanted, "{} pieces at {offset}", pieces.len());
    }
    let outside = device.write_pieces_at(device.size().0 - 4096, &[&bytes[..4096], &bytes[..1]]);
    assert!(matches!(outside, Err(DeviceError::OutOfRange { .. })), "pieces beyond the end");
}

fn says_the_same_about_itself(device: &dyn Device) {
    let size = device.size().0;
    assert!(size >= 256 << 10, "the suite wants 256 KiB, not {size}");
    let align = device.alignment().0;
    assert!(align.is_power_of_two() && align <= 4096, "alignment {align}");
    assert!(size.is_multiple_of(align), "size {size} is no multiple of {align}");
    write(device, 0, &[1; 4096], true);
    assert_eq!(device.size().0, size, "size changed by a write");
    assert!(!device.name().is_empty());
}

fn reads_what_was_written(device: &dyn Device) {
    for (n, (offset, length)) in PLACES.into_iter().enumerate() {
        let bytes = pattern(to_u64(n) + 1, length);
        write(device, offset, &bytes, n % 2 == 0);
        assert!(read(device, offset, length) == bytes, "{length} bytes at {offset}");
        good(device.flush(), "flush");
        assert!(read(device, offset, length) == bytes, "{length} at {offset} after a flush");
    }
}

/// Offsets and lengths around the borders of sectors, blocks and bounce buffers.
const PLACES: [(u64, usize); 12] = [
    (0, 1),
    (0, 512),
    (1, 511),
    (511, 2),
    (512, 512),
    (4095, 2),
    (4096, 4096),
    (4608, 4096),
    (5000, 10_000),
    (65_535, 65_537),
    (131_072, 65_536),
    (100, 200_001),
];

fn leaves_the_neighbours_alone(device: &dyn Device) {
    let size = 16_384;
    for (offset, length) in [(1, 1), (511, 2), (513, 4000), (4096, 512), (5000, 5000)] {
        let mut wanted = pattern(7, size);
        write(device, 0, &wanted, false);
        let bytes = pattern(8, length);
        write(device, to_u64(offset), &bytes, true);
        wanted[offset..offset + length].copy_from_slice(&bytes);
        assert!(read(device, 0, size) == wanted, "neighbours of {length} bytes at {offset}");
    }
}

fn refuses_what_lies_outside(device: &dyn Device) {
    let size = device.size().0;
    write(device, size - 4096, &[9; 4096], true);
    for (offset, length) in [(size, 1), (size - 1, 2), (size + 1, 0), (u64::MAX, 2), (0, 0)] {
        let mut buffer = vec![0; to_usize(length)];
        if length == 0 && offset == 0 {
            buffer = vec![0; to_usize(size) + 1];
        }
        let outside = |result: Result<(), DeviceError>| {
            assert!(matches!(result, Err(DeviceError::OutOfRange { .. })), "{length} at {offset}");
        };
        outside(device.write_at(offset, &buffer));
        outside(device.write_durable_at(offset, &buffer));
        outside(device.read_at(offset, &mut buffer));
    }
    assert!(read(device, size - 4096, 4096) == [9; 4096], "a refused write changed something");
}

fn takes_the_edges(device: &dyn Device) {
    let size = device.size().0;
    write(device, 0, &[], true);
    write(device, size, &[], false);
    assert!(read(device, size, 0).is_empty());
    write(device, size - 1, &[5], true);
    write(device, 0, &[6], true);
    assert_eq!(read(device, size - 1, 1), [5]);
    assert_eq!(read(device, 0, 1), [6]);
    good(device.flush(), "flush");
    good(device.flush(), "a flush with nothing to do");
}

/// 300 writes and reads of any place and length against a vector.
fn agrees_with_plain_memory(device: &dyn Device) {
    let span = 256 << 10;
    let mut model = pattern(1, span);
    write(device, 0, &model, false);
    let mut seed = 42;
    for step in 0..300 {
        let offset = to_usize(next(&mut seed)) % span;
        let length = (to_usize(next(&mut seed)) % 20_000).min(span - offset);
        match next(&mut seed) % 4 {
            0 => good(device.flush(), "flush"),
            1 => assert!(
                read(device, to_u64(offset), length) == model[offset..offset + length],
                "step {step}: {length} bytes at {offset}"
            ),
            kind => {
                let bytes = pattern(next(&mut seed), length);
                write(device, to_u64(offset), &bytes, kind == 2);
                model[offset..offset + length].copy_from_slice(&bytes);
            }
        }
    }
    assert!(read(device, 0, span) == model, "at the end");
}

/// Unaligned neighbours written at once by three threads, and whole sectors between them by a
/// fourth: nobody's bytes may be taken back by another's bounce buffer.
fn keeps_neighbours_of_many_threads(device: &dyn Device) {
    const ROUNDS: u64 = 40;
    let sector = |round: u64| round * 1024 + 512;
    let piece = |round: u64, thread: u64| round * 1024 + 100 * thread;
    std::thread::scope(|scope| {
        for thread in 0..3 {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let at = piece(round, thread);
                    write(device, at, &pattern(at, 100), round % 2 == 0);
                }
            });
        }
        scope.spawn(move || {
            for round in 0..ROUNDS {
                write(device, sector(round), &pattern(round, 512), true);
            }
        });
    });
    for round in 0..ROUNDS {
        for thread in 0..3 {
            let at = piece(round, thread);
            assert!(read(device, at, 100) == pattern(at, 100), "bytes at {at} were lost");
        }
        let at = sector(round);
        assert!(read(device, at, 512) == pattern(round, 512), "sector at {at} was lost");
    }
}

fn write(device: &dyn Device, offset: u64, bytes: &[u8], durable: bool) {
    let result = if durable {
        device.write_durable_at(offset, bytes)
    } else {
        device.write_at(offset, bytes)
    };
    good(result, "write");
}

fn read(device: &dyn Device, offset: u64, length: usize) -> Vec<u8> {
    // What the device does not fill stays visible.
    let mut buffer = vec![0xa5; length];
    good(device.read_at(offset, &mut buffer), "read");
    buffer
}

fn good(result: Result<(), DeviceError>, what: &str) {
    assert!(result.is_ok(), "{what}: {result:?}");
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    (0..length).map(|_| next(&mut state).to_le_bytes()[1]).collect()
}

/// splitmix64 (Steele, Lea, Flood 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
