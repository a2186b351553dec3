//! Forms transfers out of ordered entries, for the own ring and for the hub (R6).
//!
//! The committing thread of the ring calls it. A transfer is formed once; it is in the outbox
//! before the ring writes it, so that the way to the hub and the own commit overlap. A freeze
//! becomes a record behind the last transfer of its CP.
//!
//! Invariants: ids rise and are never used twice (the generation is durable before the first);
//! each transfer names the one before it and the stream hash there; entries of two CPs never
//! share one.

use std::collections::VecDeque;
use std::sync::Arc;

use super::completion::OwnDurable;
use super::order::{Former, Queued};
use super::shared::Shared;
use crate::device::DeviceError;
use crate::nvlog::{Committed, DurableToken, Feed, Pending};
use crate::record::entry::Entry;
use crate::record::envelope::RecordKind;
use crate::record::marks::{Freeze, Place};
use crate::record::transfer::{Builder, Transfer, TransferHeader};
use crate::units::convert::to_u64;
use crate::units::numbers::{CpNumber, LogPosition, SequenceNumber, TransferId};
use crate::units::policy::Policy;

/// What a record on its way into the ring was.
#[derive(Debug)]
enum Formed {
    Transfer { id: TransferId, last: SequenceNumber },
    Freeze(Freeze),
}

/// Entries that will be one transfer.
#[derive(Debug, Default)]
struct Gathered {
    former: Former,
    cp: CpNumber,
    entries: Vec<(Entry, bytes::Bytes)>,
}

/// A freeze that is durable in the own ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DurableFreeze {
    /// The CP.
    pub cp: CpNumber,
    /// Its last transfer.
    pub place: Place,
    /// The policy that follows, if it is another one.
    pub policy: Option<Policy>,
    /// End of the freeze's record: the ring is released up to here when the CP is done.
    pub end: LogPosition,
}

/// The source's feed of its ring.
#[derive(Debug)]
pub struct SourceFeed {
    shared: Arc<Shared>,
    generation: u32,
    counter: u64,
    /// The last transfer that was formed or adopted.
    last: Place,
    /// The last one that is durable here.
    own_durable: TransferId,
    under_way: VecDeque<Formed>,
}

impl SourceFeed {
    /// A feed that goes on behind `last`, all of which is durable in the ring.
    pub fn new(shared: Arc<Shared>, last: Place) -> Self {
        let generation = shared.generation.number;
        Self {
            shared,
            generation,
            counter: 0,
            last,
            own_durable: last.transfer,
            under_way: VecDeque::new(),
        }
    }

    /// Forms a transfer of what was gathered, if anything was.
    fn form(&mut self, gathered: &mut Gathered) -> Option<Pending> {
        let Gathered { cp, entries, .. } = std::mem::take(gathered);
        if entries.is_empty() {
            return None;
        }
        let mut builder = Builder::default();
        for (entry, data) in entries {
            builder.push(entry, data);
        }
        self.counter += 1;
        let transfer = builder.finish(TransferHeader {
            id: TransferId { generation: self.generation, counter: self.counter },
            cp,
            partition: u8::from(cp.0 % 2 == 1),
            first_sequence: self.last.sequence.next(),
            previous: self.last.transfer,
            hash_before: self.last.hash,
            own_durable: self.own_durable,
        });
        self.shared.counters.transfers.add(1);
        self.shared.counters.transfer_bytes.add(to_u64(transfer.bytes().len()));
        self.shared.outbox.push(&transfer);
        Some(self.keep(&transfer))
    }

    /// On its way to the ring; it is in the outbox already.
    fn keep(&mut self, transfer: &Transfer) -> Pending {
        let last = transfer.last_sequence();
        self.last = Place { transfer: transfer.id(), sequence: last, hash: transfer.hash_after() };
        self.shared.completion.formed(last, to_u64(transfer.bytes().len()));
        self.under_way.push_back(Formed::Transfer { id: transfer.id(), last });
        self.pending(RecordKind::Transfer, transfer.bytes().clone())
    }

    fn freeze(&mut self, cp: CpNumber) -> Pending {
        let freeze = Freeze { cp, place: self.last, policy: self.shared.promise_at_freeze() };
        self.under_way.push_back(Formed::Freeze(freeze));
        let body = bytes::Bytes::from(freeze.encode());
        self.pending(RecordKind::Freeze, body)
    }

    fn pending(&self, kind: RecordKind, body: bytes::Bytes) -> Pending {
        let (source, epoch) = (self.shared.source, self.shared.epoch());
        Pending { kind, source, epoch, body, ticket: 0 }
    }
}

impl Feed for SourceFeed {
    fn take(&mut self, bytes_max: u64) -> Vec<Pending> {
        let mut out = Vec::new();
        let mut gathered = Gathered::default();
        for queued in self.shared.order.take(bytes_max) {
            match queued {
                Queued::Entry { cp, entry, data } => {
                    if !gathered.former.takes(cp, &entry) {
                        out.extend(self.form(&mut gathered));
                    }
                    gathered.former.push(cp, &entry);
                    gathered.cp = cp;
                    gathered.entries.push((entry, data));
                }
                Queued::Adopted(transfer) => {
                    out.extend(self.form(&mut gathered));
                    self.shared.outbox.adopted(&transfer);
                    out.push(self.keep(&transfer));
                }
                Queued::Freeze(cp) => {
                    out.extend(self.form(&mut gathered));
                    out.push(self.freeze(cp));
                }
            }
        }
        out.extend(self.form(&mut gathered));
        out
    }

    fn committed(&mut self, batch: Vec<Committed>, token: &DurableToken) {
        let mut upto = None;
        for record in batch {
            match self.under_way.pop_front() {
                Some(Formed::Transfer { id, last }) => {
                    self.own_durable = id;
                    self.shared.outbox.durable(id, record.position);
                    upto = Some(last);
                }
                Some(Formed::Freeze(Freeze { cp, place, policy })) => {
                    let end = record.end;
                    self.shared.checkpoint.frozen(DurableFreeze { cp, place, policy, end });
                }
                None => unreachable!("the ring commits what it was given, in order"),
            }
        }
        if let Some(upto) = upto {
            self.shared.completion.own_durable(&OwnDurable::new(upto, token));
        }
    }

    fn failed(&mut self, error: &DeviceError) {
        self.shared.fail(&format!("the NVRAM failed: {error}"));
    }
}
