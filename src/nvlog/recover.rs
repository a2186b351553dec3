//! Makes a ring, and reads one after any end.
//!
//! Called by [`super::Ring::create`] and [`super::Ring::open`], before the committing thread has
//! anything to do. Opening, step by step:
//!
//! 1. Flush. A process that was killed may have left records that can be read and are not yet on
//!    the medium; what is found below counts as durable, so it must be.
//! 2. Take the better of the two header slots. A slot that a power cut tore is ordinary, and then
//!    the other one is right: nothing was reused under a header that was not yet durable. A slot
//!    that rotted leaves one that lags behind, and so does a header write that the device lost.
//!    Records tell: one that ends at position e was written only after `e - capacity` was released.
//! 3. Scan from the release point (R3): good records, rot, and where history ends.
//! 4. Erase one largest commit behind that end. *No position is used twice with two valid records
//!    to show for it*: a torn commit may have left its third record whole and its second not;
//!    history was cut at the second, new records go there, and if they ended just before the old
//!    third one it would join history. A commit reaches at most `commit_bytes_max` behind the end
//!    (kept in the header), one is under way at a time, so after this erasure nothing valid lies
//!    at any position from the end on. If the power goes during the erasure, the next opening
//!    finds the same end, or (a zero sector was all that a record lacked) one more whole record of
//!    that commit, and erases behind that. Nobody was told of the first verdict.
//! 5. Write a header that counts what was found as durable.
//!
//! Any error leaves the ring closed. Only steps 4 and 5 write, and both can be repeated.

use bytes::Bytes;

use super::RingShape;
use super::cursors::Cursors;
use super::error::RingError;
use super::format::{
    AREA_UNIT_BYTES, HEADER_BYTES, Header, HeaderError, SLOT_BYTES, device_offset,
};
use super::handle::{read_log, write_log};
use crate::device::Device;
use crate::device::buffer::AlignedBuffer;
use crate::limits::{RECORD_ALIGN_BYTES, RING_BYTES_MAX};
use crate::record::envelope::{ENVELOPE_BYTES, Envelope, record_bytes};
use crate::record::scan::{self, Damage, Fault, Range, Scan, ScanError};
use crate::units::convert::{to_u64, to_usize};
use crate::units::ids::RingId;
use crate::units::numbers::{ByteCount, LogPosition};

/// Bytes of the data area read at a time when the header is doubted.
const CHUNK_BYTES: u64 = 1 << 20;

/// A record found at the opening.
#[derive(Debug, Clone)]
pub struct Recovered {
    /// Its envelope: position, source, epoch.
    pub envelope: Envelope,
    /// Its body, checked.
    pub body: Bytes,
}

/// What the opening found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// Where the scan began: the durable release point.
    pub released: LogPosition,
    /// Where history ends; the next record begins here.
    pub end: LogPosition,
    /// Good records between.
    pub records: u64,
    /// Acknowledged history that is damaged.
    pub damage: Vec<Damage>,
    /// What was met at `end`; `None` if the ring was full. On a ring that stopped cleanly this is
    /// the trace of the lap before, or nothing.
    pub tail: Option<Fault>,
    /// Whether records of a torn commit were cut off.
    pub cut: bool,
    /// Whether one of the two header slots was bad.
    pub slot_damaged: bool,
    /// Whether records proved that the header lagged behind them.
    pub header_stale: bool,
}

/// What the committing thread starts with.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) header: Header,
    pub(super) cursors: Cursors,
}

/// Steps that a test leaves out to show that they are needed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Steps {
    pub(super) flush: bool,
    pub(super) erase: bool,
}

pub(super) const ALL_STEPS: Steps = Steps { flush: true, erase: true };

pub(super) fn create(
    device: &dyn Device,
    owner: [u8; 16],
    shape: RingShape,
) -> Result<(), RingError> {
    let size = device.size().0;
    let area = size.saturating_sub(HEADER_BYTES).min(RING_BYTES_MAX) / AREA_UNIT_BYTES;
    let capacity = ByteCount(area * AREA_UNIT_BYTES);
    if capacity.0 == 0 || capacity.0 < shape.area_bytes_min {
        let wanted = shape.area_bytes_min.max(AREA_UNIT_BYTES) + HEADER_BYTES;
        return Err(RingError::TooSmall { device: device.name(), size, wanted });
    }
    let commit = shape.commit_bytes_max;
    let fits = commit >= record_bytes(1) && commit.is_multiple_of(RECORD_ALIGN_BYTES);
    if !fits || commit > capacity.0 || commit > crate::limits::COMMIT_BYTES_MAX {
        let (device, area_bytes, commit_bytes) = (device.name(), capacity.0, commit);
        return Err(RingError::Shape { device, area_bytes, commit_bytes });
    }
    match read_slots(device)? {
        [Err(HeaderError::Blank), Err(HeaderError::Blank)] => {}
        slots if slots.iter().all(not_a_header) => {
            return Err(RingError::NotEmpty { device: device.name() });
        }
        _ => return Err(RingError::AlreadyRing { device: device.name() }),
    }
    let mut header = Header {
        ring: RingId::random()?,
        owner,
        capacity,
        commit_bytes_max: ByteCount(commit),
        released: LogPosition(0),
        durable: LogPosition(0),
        generation: 1,
    };
    for generation in [1, 2] {
        header.generation = generation;
        write_header(device, &header)?;
    }
    Ok(())
}

/// Nothing in a slot says that it was ever a ring's.
fn not_a_header(slot: &Result<Header, HeaderError>) -> bool {
    matches!(slot, Err(HeaderError::Blank | HeaderError::Magic(_)))
}

pub(super) fn recover(
    device: &dyn Device,
    owner: [u8; 16],
    steps: Steps,
    visit: &mut dyn FnMut(Recovered),
) -> Result<(Opened, Recovery), RingError> {
    if steps.flush {
        device.flush()?;
    }
    let (mut header, slot_damaged) = read_header(device, owner)?;
    let mut header_stale = false;
    if slot_damaged || !begins_with_a_record(device, &header)? {
        let floor = release_floor(device, &header)?;
        if floor > header.released {
            header_stale = true;
            header.released = floor;
            header.durable = header.durable.max(floor);
        }
    }
    let found = walk(device, &header, visit)?;
    if steps.erase {
        erase(device, &header, &found)?;
    }
    header.durable = found.end;
    header.generation += 1;
    write_header(device, &header)?;
    let recovery = Recovery {
        released: header.released,
        end: found.end,
        records: found.records,
        damage: found.damage,
        tail: found.tail,
        cut: found.remains_end > found.end,
        slot_damaged,
        header_stale,
    };
    let cursors = Cursors::recovered(header.capacity, header.released, header.durable);
    Ok((Opened { header, cursors }, recovery))
}

/// Makes a header durable in its slot.
pub(super) fn write_header(device: &dyn Device, header: &Header) -> Result<(), RingError> {
    let mut slot = AlignedBuffer::new(SLOT_BYTES);
    header.encode_into(&mut slot);
    device.write_durable_at(header.slot_offset(), &slot)?;
    Ok(())
}

fn read_slots(device: &dyn Device) -> Result<[Result<Header, HeaderError>; 2], RingError> {
    let wanted = HEADER_BYTES + AREA_UNIT_BYTES;
    if device.size().0 < wanted {
        let (device, size) = (device.name(), device.size().0);
        return Err(RingError::TooSmall { device, size, wanted });
    }
    let mut bytes = AlignedBuffer::new(SLOT_BYTES);
    let mut slots = [Err(HeaderError::Blank), Err(HeaderError::Blank)];
    for (offset, slot) in [0, to_u64(SLOT_BYTES)].into_iter().zip(&mut slots) {
        device.read_at(offset, &mut bytes)?;
        let mut copy = [0; SLOT_BYTES];
        copy.copy_from_slice(&bytes);
        *slot = Header::decode(&copy).and_then(|header| {
            let value = header.generation;
            let here = header.slot_offset() == offset;
            if here { Ok(header) } else { Err(HeaderError::Field { field: "generation", value }) }
        });
    }
    Ok(slots)
}

/// The header that counts, and whether the other slot was bad.
fn read_header(device: &dyn Device, owner: [u8; 16]) -> Result<(Header, bool), RingError> {
    let name = || device.name();
    let (header, damaged) = match read_slots(device)? {
        [Err(HeaderError::Version(version)), _] | [_, Err(HeaderError::Version(version))] => {
            return Err(RingError::Version { device: name(), version });
        }
        [Err(HeaderError::Blank), Err(HeaderError::Blank)] => {
            return Err(RingError::Blank { device: name() });
        }
        [Err(first), Err(second)] => {
            return Err(RingError::Headers { device: name(), first, second });
        }
        [Ok(header), Err(_)] | [Err(_), Ok(header)] => (header, true),
        [Ok(a), Ok(b)] => {
            if (a.ring, a.owner, a.capacity, a.commit_bytes_max)
                != (b.ring, b.owner, b.capacity, b.commit_bytes_max)
            {
                return Err(RingError::Mixed { device: name() });
            }
            (if a.generation > b.generation { a } else { b }, false)
        }
    };
    if header.owner != owner {
        let hex = |id: [u8; 16]| id.iter().map(|byte| format!("{byte:02x}")).collect();
        let (wanted, met) = (hex(owner), hex(header.owner));
        return Err(RingError::Owner { device: name(), wanted, met });
    }
    let (size, wanted) = (device.size().0, HEADER_BYTES + header.capacity.0);
    if size < wanted {
        return Err(RingError::TooSmall { device: name(), size, wanted });
    }
    Ok((header, damaged))
}

/// Whether the header's release point is where it should be. A ring that is empty looks the same
/// as one whose header lags a lap behind, and is then read once more.
fn begins_with_a_record(device: &dyn Device, header: &Header) -> Result<bool, RingError> {
    let mut sector = AlignedBuffer::new(to_usize(RECORD_ALIGN_BYTES));
    read_log(device, header.capacity, header.released, &mut sector)?;
    let mut head = [0; ENVELOPE_BYTES];
    head.copy_from_slice(&sector[..ENVELOPE_BYTES]);
    Ok(Envelope::decode_at(&head, header.ring, header.released).is_ok())
}

/// The least release point under which all records in the area can have been written.
fn release_floor(device: &dyn Device, header: &Header) -> Result<LogPosition, RingError> {
    let capacity = header.capacity;
    let mut floor = 0;
    let mut chunk = AlignedBuffer::new(to_usize(CHUNK_BYTES.min(capacity.0)));
    let mut at = 0;
    while at < capacity.0 {
        let count = to_usize(CHUNK_BYTES.min(capacity.0 - at));
        device.read_at(HEADER_BYTES + at, &mut chunk[..count])?;
        let sectors = chunk[..count].chunks_exact(to_usize(RECORD_ALIGN_BYTES));
        for (offset, sector) in (at..).step_by(to_usize(RECORD_ALIGN_BYTES)).zip(sectors) {
            let mut head = [0; ENVELOPE_BYTES];
            head.copy_from_slice(&sector[..ENVELOPE_BYTES]);
            // An envelope is enough: that the write began is what matters.
            if let Ok(envelope) = Envelope::decode(&head)
                && envelope.ring == header.ring
                && device_offset(capacity, envelope.position) == HEADER_BYTES + offset
            {
                let end = envelope.position.0.saturating_add(u64::from(envelope.record_bytes));
                floor = floor.max(end.saturating_sub(capacity.0));
            }
        }
        at += to_u64(count);
    }
    Ok(LogPosition(floor))
}

fn walk(
    device: &dyn Device,
    header: &Header,
    visit: &mut dyn FnMut(Recovered),
) -> Result<Scan, RingError> {
    let range = Range {
        ring: header.ring,
        from: header.released,
        limit: header.released.after(header.capacity),
        durable: header.durable,
    };
    let read = |position, bytes: &mut [u8]| read_log(device, header.capacity, position, bytes);
    let mut found = |envelope, body| visit(Recovered { envelope, body });
    scan::scan(range, read, &mut found).map_err(|error| match error {
        ScanError::Read { error, .. } => RingError::Device(error),
        ScanError::Version { position, version } => {
            RingError::RecordVersion { device: device.name(), position, version }
        }
    })
}

/// Leaves no record behind the end; see the head of this file.
fn erase(device: &dyn Device, header: &Header, found: &Scan) -> Result<(), RingError> {
    let limit = header.released.after(header.capacity);
    let reach = found.end.after(header.commit_bytes_max).max(found.remains_end).min(limit);
    let zeros = AlignedBuffer::new(to_usize(header.commit_bytes_max.0));
    let mut at = found.end;
    while at < reach {
        let count = to_usize(reach.0 - at.0).min(zeros.len());
        write_log(device, header.capacity, at, &zeros[..count])?;
        at = LogPosition(at.0 + to_u64(count));
    }
    Ok(())
}
