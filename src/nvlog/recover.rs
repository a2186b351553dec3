//! Makes a ring, and reads one after any end.
//!
//! Called by [`super::Ring::create`] and [`super::Ring::open`], before the committing thread has
//! anything to do. Opening, step by step:
//!
//! 1. Take the better of the two header slots. A slot that a power cut tore is ordinary, and then
//!    the other one is right: nothing was reused under a header that was not yet durable. A slot
//!    that rotted leaves one that lags behind, and so does a header write that the device lost.
//!    Records tell ([`super::stale`]).
//! 2. Scan from the release point (R3): good records, rot, and where history ends. Behind a bad record
//!    later ones are looked for as far as the header says that any can be; in all of the area if
//!    one of the slots is bad, or if the header lags.
//! 3. Make durable what was read. It may have come from a cache: the writer may have been killed
//!    in its last write, or that write may have failed, and then the kernel shows its bytes and
//!    forgets that they are not on the medium (so a flush would not help). One write is under way
//!    at a time and an error is the last one, so it is the header or the last commit, and every
//!    record says where its commit began. Both are written again, the same bytes to the same place.
//! 4. Erase one largest commit behind the end. *No position ever has two valid records to show
//!    for it*: a torn commit may have left its third record whole and its second not; history was
//!    cut at the second, new records go there, and if they ended just before the old third one it
//!    would join history. A commit reaches at most `commit_bytes_max` behind the end (kept in the
//!    header), so after this erasure nothing valid lies at any position from the end on. If the
//!    power goes during the erasure, the next opening finds the same end, or (a zero sector was
//!    all that a record lacked) more whole records of that commit, and erases behind those. Nobody
//!    was told of the first verdict.
//! 5. Write a header, in the other slot, that counts what was found as durable.
//!
//! Any error leaves the ring closed. Steps 3 to 5 write, and each can be repeated.

use bytes::Bytes;

use super::RingShape;
use super::cursors::Cursors;
use super::error::RingError;
use super::format::{AREA_UNIT_BYTES, HEADER_BYTES, Header, HeaderError, SLOT_BYTES};
use super::handle::{read_log, write_log};
use super::stale;
use crate::device::buffer::AlignedBuffer;
use crate::device::{BLANK_BYTES, Device, DeviceError, is_blank};
use crate::limits::{RECORD_ALIGN_BYTES, RING_BYTES_MAX};
use crate::record::envelope::{Envelope, record_bytes};
use crate::record::scan::{self, Damage, Fault, Range, Scan, ScanError};
use crate::units::convert::{to_u64, to_usize};
use crate::units::ids::RingId;
use crate::units::numbers::{ByteCount, LogPosition};

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
    pub(super) rewrite: bool,
    pub(super) erase: bool,
}

pub(super) const ALL_STEPS: Steps = Steps { rewrite: true, erase: true };

/// What header slots hold while a ring is erased: the device is nobody's, whatever lies behind.
const GIVEN_UP_MAGIC: [u8; 4] = *b"GONE";

/// The device becomes blank: first both header slots say that it is given up, then what a new ring
/// asks to be zero is, then the slots are.
pub(super) fn erase_headers(device: &dyn Device) -> Result<(), DeviceError> {
    let mut slots = AlignedBuffer::new(to_usize(HEADER_BYTES));
    for slot in slots.chunks_exact_mut(SLOT_BYTES) {
        slot[..GIVEN_UP_MAGIC.len()].copy_from_slice(&GIVEN_UP_MAGIC);
    }
    device.write_durable_at(0, &slots)?;
    let end = BLANK_BYTES.min(device.size().0);
    if end > HEADER_BYTES {
        let zero = AlignedBuffer::new(to_usize(end - HEADER_BYTES));
        device.write_durable_at(HEADER_BYTES, &zero)?;
    }
    device.write_durable_at(0, &AlignedBuffer::new(to_usize(HEADER_BYTES)))
}

/// A slot of no ring; one that is being erased says so.
fn is_given_up(slot: &Result<Header, HeaderError>) -> bool {
    matches!(slot, Err(HeaderError::Magic(magic)) if *magic == GIVEN_UP_MAGIC)
}

fn is_none(slot: &Result<Header, HeaderError>) -> bool {
    is_given_up(slot) || matches!(slot, Err(HeaderError::Blank))
}

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
        slots if slots.iter().any(is_given_up) && slots.iter().all(is_none) => {
            erase_headers(device)?;
        }
        // Some file systems and volume managers leave the first 8 KiB alone.
        slots if slots.iter().all(is_none) => {
            if !is_blank(device)? {
                return Err(RingError::NotEmpty { device: device.name() });
            }
        }
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
        ahead_max: ByteCount(0),
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
    (steps, ahead_max): (Steps, ByteCount),
    visit: &mut dyn FnMut(Recovered),
    told: &mut dyn FnMut(&[Damage]) -> Result<(), String>,
) -> Result<(Opened, Recovery), RingError> {
    let (mut header, slot_damaged) = read_header(device, owner)?;
    let floor = stale::release_floor(device, &header, slot_damaged)?;
    let header_stale = floor > header.released;
    if header_stale {
        header.released = floor;
        header.durable = header.durable.max(floor);
        header.generation += 1;
    }
    let mut last_commit = None;
    // Twice: one header that the device has lost is no reason to find less.
    let reach = (!slot_damaged && !header_stale && header.ahead_max.0 > 0)
        .then_some(ByteCount(2 * header.ahead_max.0));
    let found = walk(device, &header, reach, &mut |record| {
        last_commit = Some(record.envelope.durable.max(header.released));
        visit(record);
    })?;
    if !found.damage.is_empty() {
        // What comes next makes a sound end of what there is: nobody finds rot behind it again.
        let untold = |reason| RingError::Untold { device: device.name(), reason };
        told(&found.damage).map_err(untold)?;
    }
    if steps.rewrite {
        write_header(device, &header)?;
        rewrite(device, &header, last_commit.unwrap_or(found.end), found.end)?;
    }
    if steps.erase {
        erase(device, &header, &found)?;
    }
    header.durable = found.end;
    header.generation += 1;
    header.ahead_max = ahead_max.max(ByteCount(2 * header.commit_bytes_max.0));
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
        slots if slots.iter().all(is_none) => {
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

fn walk(
    device: &dyn Device,
    header: &Header,
    reach: Option<ByteCount>,
    visit: &mut dyn FnMut(Recovered),
) -> Result<Scan, RingError> {
    let range = Range {
        ring: header.ring,
        from: header.released,
        limit: header.released.after(header.capacity),
        durable: header.durable,
        reach,
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

/// Writes a part of the log again as it was read.
fn rewrite(
    device: &dyn Device,
    header: &Header,
    from: LogPosition,
    end: LogPosition,
) -> Result<(), RingError> {
    let mut bytes = AlignedBuffer::new(to_usize(header.commit_bytes_max.0));
    let mut at = from;
    while at < end {
        let count = to_usize(end.0 - at.0).min(bytes.len());
        read_log(device, header.capacity, at, &mut bytes[..count])?;
        write_log(device, header.capacity, at, &bytes[..count])?;
        at = LogPosition(at.0 + to_u64(count));
    }
    Ok(())
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
