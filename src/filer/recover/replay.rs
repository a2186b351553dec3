//! Reads a source's own ring record by record, into the order and the transfer table.
//!
//! Called by `recover` while the ring is opened. Every record must follow the one before it: id,
//! sequence number and stream hash; a freeze must stand at the last transfer. The first that does
//! not ends the replay with its position and what was wanted.

use super::RecoverError;
use crate::filer::feed::DurableFreeze;
use crate::filer::order::{AdoptError, Order};
use crate::filer::outbox::Outbox;
use crate::nvlog::Recovered;
use crate::record::envelope::RecordKind;
use crate::record::marks::{Freeze, Place};
use crate::record::transfer::Transfer;
use crate::units::machine;
use crate::units::numbers::{CpNumber, LogPosition, SequenceNumber};

/// Takes the ring's records one by one; the first that does not fit ends it.
#[derive(Debug)]
pub(super) struct Replay<'a> {
    order: &'a Order,
    outbox: &'a Outbox,
    /// Place of the published CP.
    own: Place,
    /// Before the first transfer held; `None` before the first record.
    held_after: Option<Place>,
    last: Place,
    freeze: Option<DurableFreeze>,
    /// Up to here everything is done at both ends.
    done: Option<LogPosition>,
    error: Option<RecoverError>,
}

/// What the ring held.
#[derive(Debug)]
pub(super) struct Replayed {
    /// Before the first transfer held.
    pub(super) held_after: Place,
    /// The last transfer.
    pub(super) last: Place,
    /// The interval that is under way.
    pub(super) freeze: Option<DurableFreeze>,
    /// Up to here the ring is done with.
    pub(super) done: Option<LogPosition>,
}

impl<'a> Replay<'a> {
    /// Nothing replayed yet; `own` is the place of the published CP.
    pub(super) fn new(order: &'a Order, outbox: &'a Outbox, own: Place) -> Self {
        let (held_after, freeze, done, error) = (None, None, None, None);
        Self { order, outbox, own, held_after, last: own, freeze, done, error }
    }

    /// Takes the next record.
    pub(super) fn visit(&mut self, record: &Recovered) {
        if self.error.is_some() {
            return;
        }
        let position = record.envelope.position;
        let end = LogPosition(position.0 + u64::from(record.envelope.record_bytes));
        let taken = match record.envelope.kind {
            RecordKind::Transfer => self.transfer(record, position),
            RecordKind::Freeze => self.freeze(record, position, end),
            kind @ (RecordKind::Cut | RecordKind::Fence) => {
                Err(RecoverError::Kind { position, kind })
            }
        };
        self.error = taken.err();
    }

    fn transfer(&mut self, record: &Recovered, position: LogPosition) -> Result<(), RecoverError> {
        let transfer = Transfer::parse(record.body.clone())
            .map_err(|error| RecoverError::Transfer { position, error })?;
        let header = *transfer.header();
        let before = Place {
            transfer: header.previous,
            sequence: SequenceNumber(header.first_sequence.0 - 1),
            hash: header.hash_before,
        };
        if self.held_after.is_none() {
            self.begin(before);
        }
        let last = self.last;
        if before != last {
            let what = format!("it follows {before:?}");
            return Err(RecoverError::Chain { position, last, what });
        }
        self.order.take_over(&transfer, false).map_err(|error| chain(position, last, &error))?;
        self.outbox.recovered(&transfer, position);
        self.last = transfer.place();
        Ok(())
    }

    fn freeze(
        &mut self,
        record: &Recovered,
        position: LogPosition,
        end: LogPosition,
    ) -> Result<(), RecoverError> {
        let Freeze { cp, place, policy } = Freeze::decode(&record.body)
            .map_err(|error| RecoverError::Freeze { position, error })?;
        if self.held_after.is_none() {
            // A CP of nothing: everything before it is published and released.
            self.begin(place);
        }
        let last = self.last;
        if place != last {
            let what = format!("CP {cp} was frozen at {place:?}");
            return Err(RecoverError::Chain { position, last, what });
        }
        if machine::breaks(6) {
            return Ok(());
        }
        self.order.replay_freeze(cp).map_err(|error| chain(position, last, &error))?;
        // No two are under way at once: the one before was done, and only its release was not
        // written down yet.
        if let Some(before) = self.freeze.replace(DurableFreeze { cp, place, policy, end }) {
            self.outbox.drop_upto(before.cp, false);
            self.held_after = Some(before.place);
            self.done = Some(before.end);
        }
        Ok(())
    }

    fn begin(&mut self, held_after: Place) {
        self.held_after = Some(held_after);
        self.last = held_after;
        self.order.resume(held_after.sequence, CpNumber(0));
    }

    /// What was found, if ring and pool are of one history. `own_done`: the own CP is known to be
    /// done, whatever the release mark says.
    pub(super) fn finish(
        mut self,
        own_cp: CpNumber,
        own_done: bool,
    ) -> Result<Replayed, RecoverError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        if self.held_after.is_none() {
            self.begin(self.own);
        }
        let held_after = self.held_after.unwrap_or(self.own);
        let committed = self.freeze.filter(|freeze| freeze.cp <= own_cp);
        // The published CP is the frozen one, or the one before everything held.
        let wanted = committed.map_or(held_after, |freeze| freeze.place);
        if wanted != self.own {
            return Err(RecoverError::Mismatch { cp: own_cp, own: self.own, held_after });
        }
        if let Some(freeze) = committed.filter(|_| own_done) {
            self.order.thaw(freeze.cp);
            self.outbox.drop_upto(freeze.cp, false);
            let (held_after, last, done) = (freeze.place, self.last, Some(freeze.end));
            return Ok(Replayed { held_after, last, freeze: None, done });
        }
        let Self { last, freeze, done, .. } = self;
        Ok(Replayed { held_after, last, freeze, done })
    }
}

fn chain(position: LogPosition, last: Place, error: &AdoptError) -> RecoverError {
    RecoverError::Chain { position, last, what: error.to_string() }
}
