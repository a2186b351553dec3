//! One log file: made, appended to, marked as synced, cut.
//!
//! Called by the source's state under its lock, so one thread at a time changes a log. Positions
//! count from the first record; the file offset is 4096 more.
//!
//! Invariant: `slot.synced <= end`, both at record borders, and the medium holds every byte up to
//! `slot.synced`; except in a damaged log, where `end` is the end of what is sound.
//!
//! `end` moves only when a write has returned, so a failed or short write leaves garbage behind
//! `end` that no reader looks at and that recovery cuts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::{LogError, io_error};
use super::files::Files;
use super::format::{HEADER_BYTES_U64, SECTOR_BYTES, Slot, header_with, new_header};
use super::open::{Handle, LogName, OpenFiles};
use super::scan::Head;
use super::source::Shared;
use crate::limits::{RECORD_ALIGN_BYTES, SOURCE_LOG_STEP_BYTES_MIN};
use crate::record::envelope::{ENVELOPE_BYTES, Envelope, RecordKind, record_bytes};
use crate::record::marks::Place;
use crate::record::transfer::{Transfer, TransferHead};
use crate::units::convert::{low_u32, to_u64, u32_to_usize};
use crate::units::hash::crc32c;
use crate::units::numbers::{ByteCount, Epoch, LogPosition, TransferId};

/// Bytes of records in one file: the offset table counts sectors in 32 bits.
pub(super) const LOG_BYTES_MAX: u64 = (1 << 32) * RECORD_ALIGN_BYTES - HEADER_BYTES_U64;

/// Ends the name of a file that has no header yet; recovery deletes it.
pub(super) const NEW_SUFFIX: &str = ".new";

/// How files grow ahead of need.
#[derive(Debug)]
pub(super) struct Growth {
    pub(super) step_bytes: u64,
    /// The file system cannot set space aside; a full disk then shows at the write.
    pub(super) unsupported: AtomicBool,
}

/// One log file.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) name: Arc<LogName>,
    /// Behind the last record.
    pub(super) end: LogPosition,
    /// Place there.
    pub(super) last: Place,
    /// The last transfer that one in here names as durable at its source (R1). Never less: what a
    /// transfer says of its source stays true, also when it is cut off.
    pub(super) own_durable: TransferId,
    /// How far it is durable, and durably says so.
    pub(super) slot: Slot,
    /// Number of the last slot write, durable or not.
    slot_number: u64,
    /// File offset up to which space is set aside.
    allocated: u64,
    /// The kernel was asked to write everything up to here.
    begun: LogPosition,
    /// Bytes behind the header that readers may look at: `end`, more in a damaged log.
    pub(super) extent: u64,
    /// What recovery found wrong with the synced part.
    pub(super) damage: Option<LogError>,
}

/// Name of a log file that has no header yet.
pub(super) fn new_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(NEW_SUFFIX);
    name.into()
}

/// The place behind a transfer of which only the head was read.
pub(super) fn place_after_head(head: &TransferHead) -> Place {
    Place { transfer: head.header().id, sequence: head.last_sequence(), hash: head.hash_after() }
}

/// Bytes that a transfer takes in a log.
pub(super) fn wanted_bytes(transfer: &Transfer) -> u64 {
    record_bytes(to_u64(transfer.bytes().len()))
}

impl Log {
    /// Makes the file. It gets its name only with its header in it, so that a process that dies
    /// on the way leaves no half of one. The caller makes the name durable before it says that
    /// anything is synced.
    pub(super) fn create(open: &OpenFiles, name: Arc<LogName>) -> Result<Self, LogError> {
        let new = new_path(&name.path);
        if let Err(error) = Self::create_file(open, &name, &new) {
            open.discard(name.identity.log);
            if let Err(error) = open.files().remove(&new) {
                tracing::warn!(file = %new.display(), %error, "unfinished source log stays behind");
            }
            return Err(error);
        }
        let slot = Slot::unsynced(2, &name.identity);
        Ok(Self::recovered(name, slot, LogPosition(0), slot.place))
    }

    fn create_file(open: &OpenFiles, name: &Arc<LogName>, new: &Path) -> Result<(), LogError> {
        let make = |files: &dyn Files| files.create(new).map_err(io_error(&name.text, "create"));
        let handle = open.adopt(name, make)?;
        handle
            .write_at(0, &[&new_header(&name.identity)])
            .map_err(io_error(&name.text, "write of header"))?;
        open.files().rename(new, &name.path).map_err(io_error(&name.text, "rename"))
    }

    /// Takes over a file that recovery has read up to `end`.
    pub(super) fn recovered(name: Arc<LogName>, slot: Slot, end: LogPosition, last: Place) -> Self {
        let allocated = HEADER_BYTES_U64 + end.0;
        let (slot_number, own_durable) = (slot.number, slot.own_durable);
        let (begun, extent, damage) = (end, end.0, None);
        Self { name, end, last, own_durable, slot, slot_number, allocated, begun, extent, damage }
    }

    /// Whether everything appended is durable, and durably known to be.
    pub(super) fn is_synced(&self) -> bool {
        self.slot.synced >= self.end
    }

    /// Appends a transfer that joins `last`.
    pub(super) fn append(
        &mut self,
        open: &OpenFiles,
        growth: &Growth,
        epoch: Epoch,
        transfer: &Transfer,
    ) -> Result<(), LogError> {
        assert!(self.damage.is_none(), "a damaged log is not appended to");
        assert!(transfer.header().previous == self.last.transfer, "the caller checked the chain");
        let body = transfer.bytes();
        let total = wanted_bytes(transfer);
        let handle = open.writing(&self.name)?;
        self.grow(&handle, growth, total)?;
        let envelope = Envelope {
            kind: RecordKind::Transfer,
            ring: self.name.identity.log,
            position: self.end,
            durable: self.slot.synced,
            source: self.name.identity.source,
            epoch,
            body_bytes: low_u32(to_u64(body.len())),
            record_bytes: low_u32(total),
            body_crc: crc32c(body),
        };
        self.write_record(&handle, &envelope, body)?;
        self.end = self.end.after(ByteCount(total));
        self.extent = self.end.0;
        self.last = transfer.place();
        self.own_durable = self.own_durable.max(transfer.header().own_durable);
        Ok(())
    }

    fn write_record(
        &self,
        file: &Handle<'_>,
        envelope: &Envelope,
        body: &[u8],
    ) -> Result<(), LogError> {
        let padding = [0; SECTOR_BYTES];
        let padding = &padding[..u32_to_usize(envelope.record_bytes) - ENVELOPE_BYTES - body.len()];
        let offset = HEADER_BYTES_U64 + envelope.position.0;
        file.write_at(offset, &[&envelope.encode(), body, padding])
            .map_err(io_error(&self.name.text, "write"))
    }

    /// Takes a record in that recovery has read at the end, and writes it again as it was: see
    /// [`super::recover`].
    pub(super) fn take_again(
        &mut self,
        shared: &Shared,
        head: &Head,
        transfer: &Transfer,
    ) -> Result<(), LogError> {
        assert!(head.at == self.end, "records are taken in order");
        if self.damage.is_none() && shared.rewrite {
            let open = &shared.open;
            self.write_record(&open.writing(&self.name)?, &head.envelope, transfer.bytes())?;
        }
        self.end = head.end();
        self.last = head.place();
        self.own_durable = self.own_durable.max(head.transfer.header().own_durable);
        Ok(())
    }

    /// Writes the header again as it was read, both slots with what the newest one said.
    pub(super) fn write_header_again(&mut self, shared: &Shared) -> Result<(), LogError> {
        let handle = shared.open.writing(&self.name)?;
        if !shared.rewrite {
            return Ok(());
        }
        let slots = [1, 2].map(|more| Slot { number: self.slot_number + more, ..self.slot });
        self.slot_number += 2;
        handle
            .write_at(0, &[&header_with(&self.name.identity, slots)])
            .map_err(io_error(&self.name.text, "write of header"))
    }

    fn grow(&mut self, file: &Handle<'_>, growth: &Growth, more: u64) -> Result<(), LogError> {
        let wanted = HEADER_BYTES_U64 + self.end.0 + more;
        if wanted <= self.allocated || growth.unsupported.load(Ordering::Relaxed) {
            return Ok(());
        }
        let ahead = self.allocated.max(SOURCE_LOG_STEP_BYTES_MIN).min(growth.step_bytes);
        let step = ahead.max(wanted - self.allocated);
        match file.allocate(self.allocated, step) {
            Ok(()) => self.allocated += step,
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                growth.unsupported.store(true, Ordering::Relaxed);
                tracing::warn!(file = %self.name.text, "file system cannot set space aside");
            }
            Err(error) => return Err(io_error(&self.name.text, "fallocate")(error)),
        }
        Ok(())
    }

    /// Has the kernel begin to write what was appended since the last time, once that is at least
    /// `least` bytes: a sync then finds little left to wait for, and the disk was never flooded.
    pub(super) fn begin_writeback(&mut self, open: &OpenFiles, least: u64) -> Result<(), LogError> {
        if self.damage.is_some() {
            return Ok(());
        }
        // What is synced is clean, and would be dropped.
        let from = self.begun.max(self.slot.synced);
        let bytes = self.end.0 - from.0;
        if bytes < least {
            return Ok(());
        }
        if let Some(handle) = open.open_now(self.name.identity.log) {
            handle
                .begin_writeback(HEADER_BYTES_U64 + from.0, bytes)
                .map_err(io_error(&self.name.text, "begin of writeback"))?;
        }
        self.begun = self.end;
        Ok(())
    }

    /// Writes, without syncing it, that everything up to `synced` is on the medium. The caller
    /// has made that true, syncs this, and then calls [`Log::slot_is_durable`].
    pub(super) fn write_slot(
        &mut self,
        open: &OpenFiles,
        synced: LogPosition,
        place: Place,
    ) -> Result<Slot, LogError> {
        assert!(synced <= self.end, "nothing behind the end can be synced");
        self.slot_number += 1;
        let own_durable = self.own_durable;
        let slot = Slot { number: self.slot_number, synced, place, own_durable };
        open.writing(&self.name)?
            .write_at(slot.offset(), &[&slot.encode(self.name.identity.log)])
            .map_err(io_error(&self.name.text, "write of synced slot"))?;
        Ok(slot)
    }

    /// A slot from [`Log::write_slot`] is on the medium.
    pub(super) fn slot_is_durable(&mut self, slot: Slot) {
        assert!(slot.number > self.slot.number, "slots become durable in order");
        self.slot = slot;
    }

    /// Drops everything behind `end`, durably. First both slots say so, then the file is cut: a
    /// power cut in between leaves a sound log with a tail that recovery reads as it is.
    pub(super) fn cut(
        &mut self,
        open: &OpenFiles,
        end: LogPosition,
        last: Place,
    ) -> Result<(), LogError> {
        assert!(end <= self.end, "a cut does not add");
        let (synced, place) =
            if self.slot.synced <= end { (self.slot.synced, self.slot.place) } else { (end, last) };
        // Both, even if less was synced: an earlier slot whose sync failed may be on the medium.
        self.write_slot(open, synced, place)?;
        let slot = self.write_slot(open, synced, place)?;
        open.sync_one(&self.name)?;
        open.writing(&self.name)?
            .truncate(HEADER_BYTES_U64 + end.0)
            .map_err(io_error(&self.name.text, "truncate"))?;
        open.sync_one(&self.name)?;
        self.slot = slot;
        self.end = end;
        self.begun = self.begun.min(end);
        self.extent = end.0;
        self.last = last;
        self.allocated = HEADER_BYTES_U64 + end.0;
        self.damage = None;
        Ok(())
    }
}

const _: () = {
    assert!(RECORD_ALIGN_BYTES == 512 && SECTOR_BYTES == 512, "no record has more padding");
    assert!(LOG_BYTES_MAX.is_multiple_of(RECORD_ALIGN_BYTES));
};
