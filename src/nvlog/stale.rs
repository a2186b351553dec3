//! Whether a ring's header lags behind its records.
//!
//! Called by `recover` before the scan. Space is reused only under a durable header (R11), so a
//! record that ends at position e proves that everything before `e - capacity` was released,
//! whatever the header says. A header lags if the newer slot rotted, or if the device lost a
//! write; then its release point may lie a lap behind, where newer records are now, and a scan
//! from there would call them damage and miss what lies beyond its lap. Reads only.

use super::error::RingError;
use super::format::{Header, device_offset};
use super::handle::read_log;
use crate::device::Device;
use crate::device::buffer::AlignedBuffer;
use crate::limits::{RECORD_ALIGN_BYTES, RECORD_BYTES_MAX};
use crate::record::envelope::{ENVELOPE_BYTES, Envelope};
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::{ByteCount, LogPosition};

/// Bytes read at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// The least release point under which all records in the area can have been written; at most
/// the header's own if that is right. Reads the whole area only where there is doubt: if the other
/// slot is bad, or if what lies at the release point is no record and was reused.
pub(super) fn release_floor(
    device: &dyn Device,
    header: &Header,
    slot_damaged: bool,
) -> Result<LogPosition, RingError> {
    let Header { capacity, released, .. } = *header;
    let lap_end = released.after(capacity);
    if !slot_damaged {
        if begins_with_a_record(device, header)? {
            return Ok(released);
        }
        // A record that reuses this place begins at most one record before it.
        let reach = RECORD_BYTES_MAX.min(capacity.0);
        let from = LogPosition(lap_end.0 - reach);
        let count = ByteCount(reach + RECORD_ALIGN_BYTES);
        if newest_end(device, header, from, count)? <= lap_end.0 {
            return Ok(released);
        }
    }
    let newest = newest_end(device, header, released, capacity)?;
    let floor = LogPosition(newest.saturating_sub(capacity.0));
    if floor <= released {
        return Ok(floor);
    }
    first_record(device, header, floor)
}

/// The first record that begins at `from` or within one record behind it; `from` without one.
///
/// A floor may fall inside an older record, of which the newest one has taken the head: what is
/// left of it was released, and is no damage. That a rotten record at the floor itself is passed
/// over as well is seen by the chain of its source (R3).
fn first_record(
    device: &dyn Device,
    header: &Header,
    from: LogPosition,
) -> Result<LogPosition, RingError> {
    let Header { capacity, ring, .. } = *header;
    let reach = RECORD_BYTES_MAX.min(capacity.0);
    let mut chunk = AlignedBuffer::new(to_usize(reach));
    read_log(device, capacity, from, &mut chunk)?;
    let mut at = from;
    for sector in chunk.chunks_exact(to_usize(RECORD_ALIGN_BYTES)) {
        if Envelope::decode_at(&head(sector), ring, at).is_ok() {
            return Ok(at);
        }
        at = at.after(ByteCount(RECORD_ALIGN_BYTES));
    }
    Ok(from)
}

fn begins_with_a_record(device: &dyn Device, header: &Header) -> Result<bool, RingError> {
    let mut sector = AlignedBuffer::new(to_usize(RECORD_ALIGN_BYTES));
    read_log(device, header.capacity, header.released, &mut sector)?;
    Ok(Envelope::decode_at(&head(&sector), header.ring, header.released).is_ok())
}

/// Where the newest record of this ring ends that begins in the space of `from..from + count`, in
/// whatever lap. Its envelope is enough: that the write began is what matters.
fn newest_end(
    device: &dyn Device,
    header: &Header,
    from: LogPosition,
    count: ByteCount,
) -> Result<u64, RingError> {
    let Header { capacity, ring, .. } = *header;
    let end = from.after(count);
    let mut newest = 0;
    let mut chunk = AlignedBuffer::new(to_usize(CHUNK_BYTES.min(capacity.0)));
    let mut at = from.0;
    while at < end.0 {
        let bytes = to_usize(end.0 - at).min(chunk.len());
        read_log(device, capacity, LogPosition(at), &mut chunk[..bytes])?;
        for sector in chunk[..bytes].chunks_exact(to_usize(RECORD_ALIGN_BYTES)) {
            if let Ok(envelope) = Envelope::decode(&head(sector))
                && envelope.ring == ring
                && device_offset(capacity, envelope.position)
                    == device_offset(capacity, LogPosition(at))
            {
                let record = u64::from(envelope.record_bytes);
                newest = newest.max(envelope.position.0.saturating_add(record));
            }
            at += to_u64(sector.len());
        }
    }
    Ok(newest)
}

fn head(sector: &[u8]) -> [u8; ENVELOPE_BYTES] {
    let mut head = [0; ENVELOPE_BYTES];
    head.copy_from_slice(&sector[..ENVELOPE_BYTES]);
    head
}
