//! Walks the records of a ring or a source log and tells a torn tail from rot (R3).
//!
//! Called once when a ring or a log is opened. Pure: bytes come from a closure, found records go
//! to another. Each record carries its own position, so neither an older lap nor another ring can
//! pass, and the durable cursor of the moment it was written. The verdict on a bad record at p:
//!
//! * **rot**, if any valid later record, or the header, says that the ring was durable beyond p:
//!   acknowledged history is damaged. It is reported as [`Damage`], and the walk goes on behind it.
//! * else **torn**: everything from p on was never acknowledged. That valid records follow proves
//!   nothing, since a power cut may keep the third and fourth record of one write and not the
//!   second.
//!
//! Later records are looked for at every multiple of [`RECORD_ALIGN_BYTES`] up to the limit, or as
//! far as who knows the writer says that one can be ([`Range::reach`]). A record of this ring, at its
//! own position, of a version that this program does not know ends the walk with an error: it is
//! history that another program can read. So does a failed read: a passing fault of a device must
//! not cut an acknowledged tail. Positions, ring id, magic and checksum keep their places in every
//! version of the envelope.

use bytes::Bytes;

use super::envelope::{ENVELOPE_BYTES, Envelope, EnvelopeError};
use crate::limits::{RECORD_ALIGN_BYTES, RECORD_BYTES_MAX};
use crate::units::convert::{to_u64, to_usize, u32_to_usize};
use crate::units::ids::{RingId, SourceId};
use crate::units::numbers::{ByteCount, LogPosition};

/// Bytes read at a time.
const WINDOW_BYTES: u64 = 2 << 20;
/// Damaged places that are told apart; what comes behind widens the last one.
pub const DAMAGE_MAX: usize = 4096;

const _: () = assert!(RECORD_BYTES_MAX <= WINDOW_BYTES);
const _: () = assert!(WINDOW_BYTES.is_multiple_of(RECORD_ALIGN_BYTES));

/// What to walk. All positions are multiples of [`RECORD_ALIGN_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Whose records.
    pub ring: RingId,
    /// Where the first record begins.
    pub from: LogPosition,
    /// Where no record can be any more: a lap behind `from` in a ring, the end of a file.
    pub limit: LogPosition,
    /// How far the header says it was durable; `from` if nothing says so.
    pub durable: LogPosition,
    /// So far behind a fault, and behind `durable`, later records are looked for; up to the limit if
    /// nothing says how far they can be.
    pub reach: Option<ByteCount>,
}

/// Why there is no good record at a position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Envelope or body is bad.
    #[error(transparent)]
    Record(#[from] EnvelopeError),
    /// A record that would run over the limit.
    #[error("record ends at {end}, behind the limit")]
    PastLimit { end: LogPosition },
}

/// Acknowledged history that is lost here: fetch it from the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// First byte.
    pub from: LogPosition,
    /// First byte behind it.
    pub to: LogPosition,
    /// What was met at `from`.
    pub fault: Fault,
    /// Whose record it was, where the envelope is whole and only its body is not.
    pub source: Option<SourceId>,
}

/// The verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// Good records found.
    pub records: u64,
    /// Rot, in order.
    pub damage: Vec<Damage>,
    /// Where history ends. What lies behind was never acknowledged, or never written.
    pub end: LogPosition,
    /// What was met at `end`; `None` if records fill everything up to the limit.
    pub tail: Option<Fault>,
    /// End of the last valid record behind `end`: a torn batch reached at least that far. `end` if
    /// there is none.
    pub remains_end: LogPosition,
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum ScanError<E> {
    /// The device could not be read.
    #[error("reading at position {position}: {error}")]
    Read { position: LogPosition, error: E },
    /// Written by a later program: open it with that.
    #[error("record at position {position} has format version {version}, this program reads 1")]
    Version { position: LogPosition, version: u16 },
}

/// Walks `range`. `read(position, bytes)` fills bytes from a position inside the range; `found` is
/// called for each good record in order, before the verdict on what follows is known.
pub fn scan<E>(
    range: Range,
    read: impl FnMut(LogPosition, &mut [u8]) -> Result<(), E>,
    found: &mut dyn FnMut(Envelope, Bytes),
) -> Result<Scan, ScanError<E>> {
    let aligned = |position: LogPosition| position.0.is_multiple_of(RECORD_ALIGN_BYTES);
    assert!(aligned(range.from) && aligned(range.limit) && aligned(range.durable));
    assert!(range.from <= range.durable && range.durable <= range.limit);
    let mut walk = Walk { range, read, window: Vec::new(), window_at: range.from.0 };
    let mut verdict = Scan {
        records: 0,
        damage: Vec::new(),
        end: range.from,
        tail: None,
        remains_end: range.from,
    };
    let mut known = Horizon { durable: range.durable, last_end: range.from, looked: range.from };
    while verdict.end < range.limit {
        let at = verdict.end;
        let fault = match walk.judge(at)? {
            Judged::Good(envelope, body) => {
                verdict.records += 1;
                verdict.end = LogPosition(at.0 + u64::from(envelope.record_bytes));
                found(envelope, body);
                continue;
            }
            Judged::Bad(fault, source) => (fault, source),
        };
        // What was looked at serves all later faults: a record before such a fault cannot say that
        // the ring was durable beyond it, since a durable cursor is never ahead of its own record.
        walk.look_behind(at, &mut known)?;
        if at >= known.durable {
            verdict.tail = Some(fault.0);
            verdict.remains_end = known.last_end.max(at);
            return Ok(verdict);
        }
        let to = walk.next_good(at, known.durable)?;
        note(&mut verdict.damage, Damage { from: at, to, fault: fault.0, source: fault.1 });
        verdict.end = to;
    }
    verdict.remains_end = verdict.end;
    Ok(verdict)
}

fn note(damage: &mut Vec<Damage>, new: Damage) {
    if damage.len() < DAMAGE_MAX {
        damage.push(new);
    } else if let Some(last) = damage.last_mut() {
        last.to = new.to;
    }
}

enum Judged {
    Good(Envelope, Bytes),
    Bad(Fault, Option<SourceId>),
}

/// What all valid records behind a fault say together.
struct Horizon {
    durable: LogPosition,
    last_end: LogPosition,
    /// Before this nothing is looked at again.
    looked: LogPosition,
}

struct Walk<R> {
    range: Range,
    read: R,
    window: Vec<u8>,
    window_at: u64,
}

impl<R, E> Walk<R>
where
    R: FnMut(LogPosition, &mut [u8]) -> Result<(), E>,
{
    fn judge(&mut self, at: LogPosition) -> Result<Judged, ScanError<E>> {
        let Range { ring, limit, .. } = self.range;
        let mut head = [0; ENVELOPE_BYTES];
        head.copy_from_slice(self.bytes(at, ENVELOPE_BYTES)?);
        let envelope = match Envelope::decode_at(&head, ring, at) {
            Ok(envelope) => envelope,
            Err(EnvelopeError::Version(version)) if names(&head, ring, at) => {
                return Err(ScanError::Version { position: at, version });
            }
            Err(error) => return Ok(Judged::Bad(error.into(), None)),
        };
        let end = LogPosition(at.0 + u64::from(envelope.record_bytes));
        if end > limit {
            return Ok(Judged::Bad(Fault::PastLimit { end }, None));
        }
        let record = self.bytes(at, u32_to_usize(envelope.record_bytes))?;
        let body = &record[ENVELOPE_BYTES..ENVELOPE_BYTES + u32_to_usize(envelope.body_bytes)];
        match envelope.check_body(body) {
            Ok(()) => Ok(Judged::Good(envelope, Bytes::copy_from_slice(body))),
            Err(error) => Ok(Judged::Bad(error.into(), Some(envelope.source))),
        }
    }

    fn look_behind(
        &mut self,
        fault_at: LogPosition,
        known: &mut Horizon,
    ) -> Result<(), ScanError<E>> {
        let Range { limit, durable, reach, .. } = self.range;
        let last = reach.map_or(limit, |reach| fault_at.max(durable).after(reach).min(limit));
        let mut at = known.looked.0.max(fault_at.0 + RECORD_ALIGN_BYTES);
        while at < last.0 {
            if let Judged::Good(envelope, _) = self.judge(LogPosition(at))? {
                known.durable = known.durable.max(envelope.durable);
                known.last_end = LogPosition(at + u64::from(envelope.record_bytes));
            }
            at += RECORD_ALIGN_BYTES;
        }
        known.looked = LogPosition(at);
        Ok(())
    }

    /// The first good record behind `fault_at`, at most `durable`: what is acknowledged ends there.
    fn next_good(
        &mut self,
        fault_at: LogPosition,
        durable: LogPosition,
    ) -> Result<LogPosition, ScanError<E>> {
        let mut at = fault_at.0 + RECORD_ALIGN_BYTES;
        while at < durable.0 {
            if let Judged::Good(..) = self.judge(LogPosition(at))? {
                break;
            }
            at += RECORD_ALIGN_BYTES;
        }
        Ok(LogPosition(at.min(durable.0)))
    }

    /// Bytes from the window, which is moved if they are not in it. The range is inside the limit
    /// and no longer than a record: both were checked by the caller.
    fn bytes(&mut self, at: LogPosition, length: usize) -> Result<&[u8], ScanError<E>> {
        let inside = |window_at: u64, held: usize| {
            window_at <= at.0 && at.0 + to_u64(length) <= window_at + to_u64(held)
        };
        if !inside(self.window_at, self.window.len()) {
            let count = to_usize((self.range.limit.0 - at.0).min(WINDOW_BYTES));
            // Invalid until it was read.
            self.window.clear();
            let mut window = std::mem::take(&mut self.window);
            window.resize(count, 0);
            (self.read)(at, &mut window)
                .map_err(|error| ScanError::Read { position: at, error })?;
            self.window = window;
            self.window_at = at.0;
        }
        let start = to_usize(at.0 - self.window_at);
        Ok(&self.window[start..start + length])
    }
}

/// Whether a record of any version says that it is of `ring` and lies at `at`.
pub fn names(head: &[u8; ENVELOPE_BYTES], ring: RingId, at: LogPosition) -> bool {
    head[8..24] == ring.0 && head[24..32] == at.0.to_le_bytes()
}

#[cfg(test)]
mod tests;
