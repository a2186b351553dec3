//! Transfers behind a pass on their way into a log of their own (R4).
//!
//! The source's actor puts them here, the slot that runs the pass writes them ([`Inputs`] takes them between two
//! frames of data) and adopts the log when the pass is published. What came between that and the word of it
//! the actor takes back, and stages. They take no room of the ring: nobody is answered for them.
//!
//! [`Inputs`]: super::applier

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::numbers::CpNumber;

/// Bytes of a log behind a pass that are handed to the medium at once.
pub(super) const WRITEBACK_BYTES: u64 = if cfg!(test) { 64 << 10 } else { 8 << 20 };

/// What waits to be written behind the pass of one source, and how far that is.
#[derive(Debug, Default)]
pub(super) struct Aside {
    waiting: VecDeque<Transfer>,
    /// Bytes of what waits, and of what was taken and is not written.
    bytes: u64,
    written: Option<Place>,
    written_bytes: u64,
    /// Client bytes written, and when their first came, by CP.
    data: BTreeMap<CpNumber, (u64, Instant)>,
    failed: bool,
}

impl Aside {
    pub(super) fn put(&mut self, transfer: Transfer) {
        self.bytes += to_u64(transfer.bytes().len());
        self.waiting.push_back(transfer);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Bytes that are under way.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn take(&mut self) -> Option<Transfer> {
        self.waiting.pop_front()
    }

    /// It is not written.
    pub(super) fn pass(&mut self, transfer: &Transfer) {
        self.bytes = self.bytes.saturating_sub(to_u64(transfer.bytes().len()));
    }

    pub(super) fn wrote(&mut self, transfer: &Transfer) {
        let bytes = to_u64(transfer.bytes().len());
        self.bytes = self.bytes.saturating_sub(bytes);
        self.written = Some(transfer.place());
        self.written_bytes += bytes;
        let data = self.data.entry(transfer.header().cp).or_insert_with(|| (0, machine::now()));
        data.0 += transfer.data_bytes();
    }

    /// Client bytes that are in the log now, by CP, and when their first came.
    pub(super) fn joined(&mut self) -> BTreeMap<CpNumber, (u64, Instant)> {
        std::mem::take(&mut self.data)
    }

    /// How far it is written, and how many bytes more, since this was last asked; and whether it could not be.
    pub(super) fn news(&mut self) -> (Option<(Place, u64)>, bool) {
        let place = self.written.take();
        (place.map(|place| (place, std::mem::take(&mut self.written_bytes))), self.failed)
    }

    /// It could not be written.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// The pass has ended, or what is behind it is given up; what was not written.
    pub(super) fn end(&mut self) -> VecDeque<Transfer> {
        std::mem::take(self).waiting
    }
}
