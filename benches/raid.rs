//! RAID: what arrays of files cost beside a bare file, whole and with a device missing, and how fast a
//! new device is filled and a scrub reads.
//!
//! Run with `cargo bench --bench raid`. All in one run and on one disk, so only the ratios say
//! something: an array of n files on one disk writes n/k as many bytes to it. `--test` makes it small.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use mirrorhub::device::Device;
use mirrorhub::device::file::{Access, FileDevice};
use mirrorhub::raid::array::Array;
use mirrorhub::raid::assemble;
use mirrorhub::raid::layout::Level;
use mirrorhub::raid::parity;
use mirrorhub::raid::rebuild::Step;
use mirrorhub::units::convert::{low_u8, to_f64, to_u64, to_usize};
use mirrorhub::units::numbers::ByteCount;

const MIB: usize = 1 << 20;

fn rate(bytes: usize, began: Instant) -> f64 {
    let mib = to_f64(to_u64(bytes / MIB));
    mib / began.elapsed().as_secs_f64()
}

fn file(directory: &std::path::Path, name: &str, bytes: u64) -> Result<Arc<dyn Device>> {
    let path = directory.join(name);
    let made = FileDevice::create_unwritten(&path, ByteCount(bytes), Access::Cached);
    Ok(Arc::new(made?))
}

/// Sequential writes of 1 MiB and one flush; then reads of the same.
fn sequential(device: &dyn Device, bytes: usize) -> Result<(f64, f64)> {
    let data: Vec<u8> = (0..MIB).map(|at| low_u8(to_u64(at % 251))).collect();
    let began = Instant::now();
    for at in (0..bytes).step_by(MIB) {
        device.write_at(to_u64(at), &data)?;
    }
    device.flush()?;
    let write = rate(bytes, began);
    Ok((write, read(device, bytes)?))
}

fn read(device: &dyn Device, bytes: usize) -> Result<f64> {
    let mut buffer = vec![0; MIB];
    let began = Instant::now();
    for at in (0..bytes).step_by(MIB) {
        device.read_at(to_u64(at), &mut buffer)?;
    }
    Ok(rate(bytes, began))
}

/// Writes of 4 KiB all over, flushed 64 at a time.
fn random(device: &dyn Device, bytes: usize, writes: u64) -> Result<f64> {
    let blocks = to_u64(bytes / 4096);
    let (block, mut at) = ([0x5a; 4096], 1_u64);
    let began = Instant::now();
    for n in 0..writes {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        device.write_at(at % blocks * 4096, &block)?;
        if n % 64 == 63 {
            device.flush()?;
        }
    }
    Ok(to_f64(writes) / began.elapsed().as_secs_f64())
}

fn encode(data: usize, spare: usize, bytes: usize) -> f64 {
    let columns = vec![vec![0x5a_u8; 64 << 10]; data];
    let mut out = vec![vec![0_u8; 64 << 10]; spare];
    let began = Instant::now();
    let rounds = bytes / (data * (64 << 10));
    for _ in 0..rounds {
        parity::encode(&columns, &mut out);
        std::hint::black_box(&out);
    }
    rate(rounds * data * (64 << 10), began)
}

fn fill(array: &Array, directory: &std::path::Path, bytes: usize) -> Result<f64> {
    let fresh = file(directory, "fresh", array.member_bytes())?;
    array.replace(0, fresh)?;
    let used = to_u64(bytes / 4096);
    array.plan_rebuild(&|first, _| first < used);
    let began = Instant::now();
    let mut stripes = 0;
    loop {
        match array.rebuild_step()? {
            Step::Idle => break,
            Step::Filled(_) => stripes += 1,
            Step::LeftOut | Step::Done => {}
        }
    }
    array.note_filled()?;
    Ok(rate(stripes * (64 << 10), began))
}

fn main() -> Result<()> {
    let small = std::env::args().any(|argument| argument == "--test");
    let (bytes, writes) = if small { (8 * MIB, 128) } else { (512 * MIB, 8192) };
    let directory = tempfile::tempdir()?;
    for (data, spare) in [(2, 1), (4, 1), (4, 2), (8, 2)] {
        let speed = encode(data, spare, bytes * 4);
        println!("encode {data}+{spare}: {speed:.0} MiB/s of data");
    }
    let room = to_u64(bytes) * 2 + (64 << 20);
    let bare = file(directory.path(), "bare", room)?;
    let (write, read_rate) = sequential(&*bare, bytes)?;
    println!("bare: write {write:.0} MiB/s, read {read_rate:.0} MiB/s");
    println!("bare: {:.0} random writes/s", random(&*bare, bytes, writes)?);
    for (level, members) in [
        (Level::None, 2),
        (Level::Mirror, 2),
        (Level::Parity1, 3),
        (Level::Parity1, 5),
        (Level::Parity2, 6),
    ] {
        let place = tempfile::tempdir_in(directory.path())?;
        let name = format!("{} of {members}", level.word());
        let files = (0..members).map(|n| file(place.path(), &format!("disk{n}"), room));
        let devices: Vec<_> = files.collect::<Result<_>>()?;
        let array = assemble::create(level, &devices)?;
        let (wrote, got) = sequential(&*array, bytes)?;
        let (of_write, of_read) = (wrote / write, got / read_rate);
        println!(
            "{name}: write {wrote:.0} MiB/s ({of_write:.2} of bare), read {got:.0} ({of_read:.2})"
        );
        println!("{name}: {:.0} random writes/s", random(&*array, bytes, writes)?);
        let began = Instant::now();
        let used = to_u64(bytes) / array.stripe_bytes();
        let read_blocks: u64 = (0..used).map(|stripe| array.check_stripe(stripe).blocks_read).sum();
        let compared = rate(to_usize(read_blocks) * 4096, began);
        println!("{name}: all copies compared at {compared:.0} MiB/s");
        if array.fail_device(0, "taken away").is_err() {
            continue;
        }
        println!("{name}: degraded read {:.0} MiB/s", read(&*array, bytes)?);
        let (degraded, _) = sequential(&*array, bytes)?;
        println!("{name}: degraded write {degraded:.0} MiB/s");
        println!("{name}: a new device filled at {:.0} MiB/s", fill(&array, place.path(), bytes)?);
    }
    Ok(())
}
