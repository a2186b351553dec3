//! Walks the records of one log file, checking as it goes.
//!
//! Called by recovery (whole records, in the tail), by the offset table (heads only) and by a cut
//! (heads, to find a place). What is not a sound record is told with its reason and is never
//! passed over silently: the caller decides whether it is a torn tail or damage. Memory is one
//! window and, for whole records, one record.

use std::sync::Arc;

use bytes::BytesMut;

use super::error::{LogError, io_error};
use super::format::HEADER_BYTES_U64;
use super::log::place_after_head;
use super::open::{LogName, OpenFiles};
use crate::limits::{RECORD_ALIGN_BYTES, TRANSFER_ENTRIES_MAX};
use crate::record::entry::ENTRY_BYTES;
use crate::record::envelope::{ENVELOPE_BYTES, Envelope, EnvelopeError, RecordKind};
use crate::record::marks::Place;
use crate::record::scan::names;
use crate::record::transfer::{TRANSFER_HEADER_BYTES, Transfer, TransferError, TransferHead};
use crate::units::convert::{to_u64, to_usize, u32_to_usize};
use crate::units::ids::SourceId;
use crate::units::numbers::{ByteCount, CpNumber, LogPosition, TransferId};

/// Bytes read ahead: holds the largest head, and many small records.
const WINDOW_BYTES: u64 = 256 * 1024;
/// Behind a record of so many bytes only the next head is read: what lies behind that is mostly a body,
/// which is passed over, or read to its place.
const LARGE_BYTES_MIN: u32 = 32 * 1024;
/// Bytes of the largest head: envelope, transfer header and table.
pub(super) const HEAD_BYTES_MAX: u64 = 128 + 80 + TRANSFER_ENTRIES_MAX * 24;
/// Bytes of a head looked at first: enough for 162 entries.
pub(super) const HEAD_BYTES_FIRST: u64 = 4096;

const _: () = {
    assert!(ENVELOPE_BYTES == 128 && TRANSFER_HEADER_BYTES == 80 && ENTRY_BYTES == 24);
    assert!(HEAD_BYTES_MAX <= WINDOW_BYTES);
};

/// Why the bytes at a position are no sound record of this log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum RecordError {
    #[error("{0}")]
    Envelope(#[from] EnvelopeError),
    #[error("{0}")]
    Transfer(#[from] TransferError),
    #[error("the file ends within a record, {have} of {wanted} bytes are there")]
    Short { wanted: u64, have: u64 },
    #[error("a source log holds transfers only, this is a {0:?}")]
    Kind(RecordKind),
    #[error("the record is of source {0}")]
    Source(SourceId),
    #[error("the record is of CP {0}")]
    Cp(CpNumber),
    #[error("transfer {id} follows {previous}, the one before it is {last}")]
    Chain { id: TransferId, previous: TransferId, last: TransferId },
    #[error("transfer {id} follows another history of transfer {last}")]
    History { id: TransferId, last: TransferId },
    #[error("transfer {id} is not above transfer {last}")]
    Order { id: TransferId, last: TransferId },
}

/// A record whose envelope, header and entry table are sound.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) at: LogPosition,
    pub(super) envelope: Envelope,
    pub(super) transfer: TransferHead,
}

impl Head {
    /// Behind the record.
    pub(super) fn end(&self) -> LogPosition {
        self.at.after(ByteCount(u64::from(self.envelope.record_bytes)))
    }

    /// Place behind the record.
    pub(super) fn place(&self) -> Place {
        place_after_head(&self.transfer)
    }
}

/// What lies at a position.
#[derive(Debug)]
pub(super) enum Found<T> {
    /// A sound record.
    Record(T),
    /// Nothing more.
    End,
    /// Something else.
    Bad(RecordError),
}

/// Checks that a transfer with this head continues the history at `place`.
pub(super) fn check_joins(place: &Place, transfer: &TransferHead) -> Result<(), RecordError> {
    let header = transfer.header();
    let (id, last) = (header.id, place.transfer);
    if header.previous != last {
        return Err(RecordError::Chain { id, previous: header.previous, last });
    }
    if id <= last {
        return Err(RecordError::Order { id, last });
    }
    let next = place.sequence.0.checked_add(1);
    if next != Some(header.first_sequence.0) || header.hash_before != place.hash {
        return Err(RecordError::History { id, last });
    }
    Ok(())
}

/// Reads one log file from any position on.
#[derive(Debug)]
pub(super) struct Scanner<'a> {
    open: &'a OpenFiles,
    name: &'a Arc<LogName>,
    /// Bytes of records to look at.
    extent: u64,
    window: Vec<u8>,
    window_at: u64,
    /// Bytes to read with the next head.
    ahead: u64,
    /// Where the last whole record was read into: its memory serves the next one if that is gone by then.
    spare: BytesMut,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(open: &'a OpenFiles, name: &'a Arc<LogName>, extent: u64) -> Self {
        let (window, spare) = Default::default();
        Self { open, name, extent, window, window_at: 0, ahead: HEAD_BYTES_FIRST, spare }
    }

    /// Reads and checks the head of the record at `at`.
    pub(super) fn head(&mut self, at: LogPosition) -> Result<Found<Head>, LogError> {
        if at.0 >= self.extent {
            return Ok(Found::End);
        }
        let found = self.read_head(at)?;
        let large = found.as_ref().is_ok_and(|head| head.envelope.record_bytes >= LARGE_BYTES_MIN);
        self.ahead = if large { HEAD_BYTES_FIRST } else { WINDOW_BYTES };
        Ok(found.map_or_else(Found::Bad, Found::Record))
    }

    /// Reads and checks the whole record at `at`, data included.
    pub(super) fn record(&mut self, at: LogPosition) -> Result<Found<(Head, Transfer)>, LogError> {
        let head = match self.head(at)? {
            Found::Record(head) => head,
            Found::End => return Ok(Found::End),
            Found::Bad(bad) => return Ok(Found::Bad(bad)),
        };
        let mut body = std::mem::take(&mut self.spare);
        body.resize(u32_to_usize(head.envelope.body_bytes), 0);
        let start = at.0 + to_u64(ENVELOPE_BYTES);
        let held = self.copy_from_window(start, &mut body);
        if held < body.len() {
            let have = held + self.read(start + to_u64(held), &mut body[held..])?;
            if have < body.len() {
                let (wanted, have) = (to_u64(body.len()), to_u64(have));
                return Ok(Found::Bad(RecordError::Short { wanted, have }));
            }
        }
        if let Err(bad) = head.envelope.check_body(&body) {
            return Ok(Found::Bad(bad.into()));
        }
        let whole = body.split().freeze();
        self.spare = body;
        match Transfer::parse(whole) {
            Ok(transfer) => Ok(Found::Record((head, transfer))),
            Err(bad) => Ok(Found::Bad(bad.into())),
        }
    }

    /// The first sound head behind a bad record at `bad`. Records lie at sector borders and carry
    /// the log's id and their own position, so nothing else passes for one.
    pub(super) fn next_sound(&mut self, bad: LogPosition) -> Result<Option<Head>, LogError> {
        let mut at = bad;
        loop {
            at = at.after(ByteCount(RECORD_ALIGN_BYTES));
            match self.head(at)? {
                Found::Record(head) => return Ok(Some(head)),
                Found::End => return Ok(None),
                Found::Bad(_) => {}
            }
        }
    }

    /// Whether a record behind `bad` says that everything up to and with `bad` was durable: then
    /// this is rot and not a torn tail (R3).
    pub(super) fn was_durable(&mut self, bad: LogPosition) -> Result<bool, LogError> {
        let mut from = bad;
        while let Some(head) = self.next_sound(from)? {
            if head.envelope.durable > bad {
                return Ok(true);
            }
            from = LogPosition(head.end().0 - RECORD_ALIGN_BYTES);
        }
        Ok(false)
    }

    fn read_head(&mut self, at: LogPosition) -> Result<Result<Head, RecordError>, LogError> {
        let log = self.name.identity.log;
        let available = self.extent - at.0;
        let mut wanted = HEAD_BYTES_FIRST;
        loop {
            let bytes = self.fill(at.0, wanted.min(available))?;
            let Some((envelope, rest)) = bytes.split_first_chunk::<ENVELOPE_BYTES>() else {
                let wanted = to_u64(ENVELOPE_BYTES);
                return Ok(Err(RecordError::Short { wanted, have: to_u64(bytes.len()) }));
            };
            let envelope = match Envelope::decode_at(envelope, log, at) {
                Ok(envelope) => envelope,
                // Cutting it would destroy what another program acknowledged.
                Err(bad @ EnvelopeError::Version(_)) if names(envelope, log, at) => {
                    let (file, what) = (Arc::clone(&self.name.text), format!("at {at}: {bad}"));
                    return Err(LogError::Version { file, what: what.into() });
                }
                Err(bad) => return Ok(Err(bad.into())),
            };
            let body = rest.get(..u32_to_usize(envelope.body_bytes)).unwrap_or(rest);
            let parsed = TransferHead::parse(body);
            if matches!(parsed, Err(TransferError::Length { .. })) && wanted < HEAD_BYTES_MAX {
                // A long table: once more with all that a head can have.
                wanted = HEAD_BYTES_MAX;
                continue;
            }
            let checked = self.check_head(&envelope, available, parsed);
            return Ok(checked.map(|transfer| Head { at, envelope, transfer }));
        }
    }

    fn check_head(
        &self,
        envelope: &Envelope,
        available: u64,
        parsed: Result<TransferHead, TransferError>,
    ) -> Result<TransferHead, RecordError> {
        let wanted = u64::from(envelope.record_bytes);
        if envelope.kind != RecordKind::Transfer {
            return Err(RecordError::Kind(envelope.kind));
        }
        if envelope.source != self.name.identity.source {
            return Err(RecordError::Source(envelope.source));
        }
        if wanted > available {
            return Err(RecordError::Short { wanted, have: available });
        }
        let transfer = parsed?;
        let met = u64::from(envelope.body_bytes);
        if transfer.total_bytes() != met {
            return Err(TransferError::Length { wanted: transfer.total_bytes(), met }.into());
        }
        if transfer.header().cp != self.name.identity.cp {
            return Err(RecordError::Cp(transfer.header().cp));
        }
        Ok(transfer)
    }

    /// The bytes at `at`: `wanted` of them, fewer only where the file ends. `wanted` fits the
    /// window and the extent.
    fn fill(&mut self, at: u64, wanted: u64) -> Result<&[u8], LogError> {
        assert!(wanted <= WINDOW_BYTES && at + wanted <= self.extent, "head fits the window");
        let window_end = self.window_at + to_u64(self.window.len());
        if at < self.window_at || at + wanted > window_end {
            let bytes = wanted.max(self.ahead).min(self.extent - at);
            let mut window = std::mem::take(&mut self.window);
            window.resize(to_usize(bytes), 0);
            let read = self.read(at, &mut window)?;
            window.truncate(read);
            self.window = window;
            self.window_at = at;
        }
        let rest = &self.window[to_usize(at - self.window_at)..];
        Ok(rest.get(..to_usize(wanted)).unwrap_or(rest))
    }

    /// Copies what the window holds of the bytes at `at`; returns how many it held.
    fn copy_from_window(&self, at: u64, out: &mut [u8]) -> usize {
        let Some(skip) = at.checked_sub(self.window_at) else { return 0 };
        let Some(found) = self.window.get(to_usize(skip)..) else { return 0 };
        let held = found.len().min(out.len());
        out[..held].copy_from_slice(&found[..held]);
        held
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<usize, LogError> {
        let handle = self.open.reading(self.name)?;
        handle.read_at(HEADER_BYTES_U64 + at, out).map_err(io_error(&self.name.text, "read"))
    }
}
