//! How far an opening looks for records, and that none can be beyond that.

use super::*;
use crate::device::sim::{Effect, On};
use crate::units::convert::to_u64;

/// The least that a ring of [`SMALL`] can promise.
const AHEAD: ByteCount = ByteCount(8192);
/// Blocks of an area that is large against it.
const BLOCKS: u64 = 256;

fn within(sim: &Arc<SimDevice>) -> Driven {
    drive_within(sim.clone(), (ALL_STEPS, AHEAD)).unwrap()
}

/// A ring of so many blocks, of which so many records of two sectors were committed one by one, none released.
fn filled(blocks: u64, records: u64) -> (Arc<SimDevice>, Driven) {
    let sim = small_ring(blocks);
    let mut driven = within(&sim);
    for ticket in 0..records {
        driven.commit(ticket, &[2]);
    }
    (sim, driven)
}

fn bytes_read(sim: &SimDevice) -> u64 {
    sim.trace().iter().filter(|call| call.on == On::Read).map(|call| call.length).sum()
}

/// Goal: an opening reads the records and a bounded rest, however large the ring is. Control: a header
/// that says nothing has all of the area read.
#[test]
fn an_opening_reads_no_farther_than_the_header_says() {
    // The scan reads 2 MiB at a time.
    let (blocks, window) = (2048, 2 << 20);
    let records = 40;
    let (sim, driven) = filled(blocks, records);
    drop(driven);
    sim.clear_trace();
    let driven = within(&sim);
    assert_eq!(driven.recovery.records, records);
    let read = bytes_read(&sim);
    assert!(read < 2 * window, "{read} bytes read");
    drop(driven);
    // As version 1 and a ring that was never opened have it.
    let mut header = [0; 4096];
    for slot in [0, 4096] {
        header.copy_from_slice(&sim.image()[slot..slot + 4096]);
        let silent =
            format::Header { ahead_max: ByteCount(0), ..format::Header::decode(&header).unwrap() };
        silent.encode_into(&mut header);
        sim.plant(to_u64(slot), &header);
    }
    sim.clear_trace();
    assert_eq!(within(&sim).recovery.records, records);
    assert!(bytes_read(&sim) > blocks * 4096 - window, "not all was read");
}

/// Goal: whatever rots, and of however many records in a row, what was acknowledged behind it is found, and
/// the damage is told; also if the device has lost the newest header. Method: every run of records up
/// to the whole past of one, at each record.
#[test]
fn rot_is_told_from_a_torn_tail_within_reach() {
    let records = 40_u64;
    let (sim, driven) = filled(BLOCKS, records);
    drop(driven);
    let image = sim.image();
    for first in 0..records - 1 {
        for run in 1..records - first {
            let sim = Arc::new(SimDevice::from_image("ring", image.clone()));
            for record in first..first + run {
                sim.rot(8192 + record * 1024, &[0xff]);
            }
            let driven = within(&sim);
            let wanted = (0..first).chain(first + run..records);
            assert_eq!(driven.tickets_found(), Vec::from_iter(wanted), "{run} at {first}");
            let lost = [(first * 1024, (first + run) * 1024)];
            assert_eq!(borders(&driven.recovery.damage), lost);
        }
    }
}

/// Commits a hundred records; the change of that number is lost. The numbers of the changes that were headers.
///
/// After each commit what the newest header on the medium says holds; twice that if one was lost.
fn kept_up(lost: Option<u64>) -> Vec<u64> {
    let sim = small_ring(BLOCKS);
    let mut driven = within(&sim);
    sim.clear_trace();
    if let Some(nth) = lost {
        sim.fail_change(nth, Effect::Lost);
    }
    let times = if lost.is_some() { 2 } else { 1 };
    for ticket in 0..100 {
        driven.commit(ticket, &[3]);
        let medium = sim.medium();
        let slot = |at| format::Header::decode(medium[at..at + 4096].try_into().unwrap()).unwrap();
        let newest = [slot(0), slot(4096)].into_iter().max_by_key(|header| header.generation);
        let newest = newest.unwrap();
        let reach = newest.durable.0 + times * newest.ahead_max.0;
        assert!(driven.handle.status().durable.0 <= reach, "{lost:?}, record {ticket}");
    }
    let changes = sim.trace().into_iter().filter(|call| call.on != On::Read);
    let headers = (0..).zip(changes).filter(|(_, call)| call.offset < 8192 && call.length > 0);
    headers.map(|(nth, _)| nth).collect()
}

/// Goal: no record ends farther behind what the newest header calls durable than it says, and headers are
/// not written more often than that asks for. A header that the device loses is covered by twice that.
#[test]
fn headers_keep_up_with_what_is_written() {
    let headers = kept_up(None);
    let written = 100 * 1536;
    // The largest commit has to fit behind what is written.
    let each = AHEAD.0 - 4096 - 1536;
    assert!((10..=written / each + 1).contains(&to_u64(headers.len())), "{headers:?}");
    for lost in headers {
        kept_up(Some(lost));
    }
}
