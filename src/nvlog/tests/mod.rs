//! Tests of the ring as a whole. Most drive the committer call by call over a simulated device,
//! so that every cut and every failure has its number; `threads` runs the real thread.

mod crash;
mod model;
mod reach;
mod refusals;
mod threads;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::commit::{Committer, Turn};
use super::handle::Shared;
use super::recover::{ALL_STEPS, Opened, Steps};
use super::*;
use crate::device::sim::SimDevice;
use crate::record::envelope::ENVELOPE_BYTES;
use crate::record::scan::Damage;
use crate::units::numbers::ByteCount;

pub(super) const OWNER: [u8; 16] = [5; 16];
pub(super) const SECTOR: usize = 512;

/// A ring small enough that everything wraps.
pub(super) const SMALL: RingShape = RingShape { area_bytes_min: 4096, commit_bytes_max: 4096 };

/// A simulated device with an area of so many blocks of 4 KiB, made a ring.
pub(super) fn small_ring(blocks: u64) -> Arc<SimDevice> {
    let sim = Arc::new(SimDevice::new("ring", ByteCount(8192 + blocks * 4096)));
    Ring::create(sim.clone(), OWNER, SMALL).unwrap();
    sim
}

/// What a feed was given and told.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) pending: VecDeque<Pending>,
    pub(super) first: Vec<Pending>,
    pub(super) committed: Vec<Committed>,
    pub(super) takes: usize,
    pub(super) upto: LogPosition,
    pub(super) failed: Vec<String>,
}

/// A feed that the test can look into.
#[derive(Debug, Clone, Default)]
pub(super) struct TestFeed(pub(super) Arc<Mutex<Queue>>);

impl TestFeed {
    pub(super) fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.0.lock().unwrap()
    }

    /// Queues a record of so many sectors; no two tickets have the same body.
    pub(super) fn push(&self, ticket: u64, sectors: usize) {
        self.queue().pending.push_back(pending(ticket, sectors));
    }

    pub(super) fn tickets(&self) -> Vec<u64> {
        self.queue().committed.iter().map(|committed| committed.ticket).collect()
    }
}

pub(super) fn pending(ticket: u64, sectors: usize) -> Pending {
    let mut body = vec![0; sectors * SECTOR - ENVELOPE_BYTES];
    let mut state = ticket;
    for chunk in body.chunks_mut(8) {
        // Every sector differs from that of any other ticket, and none is zero.
        state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(ticket << 8 | 1);
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
    body[..8].copy_from_slice(&ticket.to_le_bytes());
    Pending {
        kind: RecordKind::Transfer,
        source: SourceId([u8::try_from(ticket % 2).unwrap() + 1; 16]),
        epoch: Epoch { number: 1, id: 1 },
        body: body.into(),
        ticket,
    }
}

/// The ticket that a body was made for; panics if not a byte of it is another's.
pub(super) fn ticket_of(body: &Bytes) -> u64 {
    let ticket = u64::from_le_bytes(body[..8].try_into().unwrap());
    let sectors = (body.len() + ENVELOPE_BYTES) / SECTOR;
    assert_eq!(pending(ticket, sectors).body, body, "not what ticket {ticket} wrote");
    ticket
}

impl Feed for TestFeed {
    fn take(&mut self, bytes_max: u64) -> Vec<Pending> {
        let mut queue = self.queue();
        queue.takes += 1;
        let mut left = bytes_max;
        let mut taken = Vec::new();
        while let Some(front) = queue.pending.front() {
            let bytes = crate::record::envelope::record_bytes(front.body.len().try_into().unwrap());
            if bytes > left && !taken.is_empty() {
                break;
            }
            left = left.saturating_sub(bytes);
            taken.extend(queue.pending.pop_front());
        }
        taken
    }

    fn take_first(&mut self) -> Vec<Pending> {
        std::mem::take(&mut self.queue().first)
    }

    fn committed(&mut self, batch: Vec<Committed>, token: &DurableToken) {
        let mut queue = self.queue();
        assert_eq!(batch.last().unwrap().end, token.upto());
        queue.upto = token.upto();
        queue.committed.extend(batch);
    }

    fn failed(&mut self, error: &DeviceError) {
        self.queue().failed.push(error.to_string());
    }
}

/// A ring whose committer the test drives itself.
pub(super) struct Driven {
    pub(super) committer: Committer,
    pub(super) handle: Handle,
    pub(super) feed: TestFeed,
    pub(super) recovery: Recovery,
    /// Position and ticket of each record found.
    pub(super) found: Vec<(u64, u64)>,
}

pub(super) fn drive(device: Arc<dyn Device>) -> Result<Driven, RingError> {
    drive_with(device, ALL_STEPS)
}

pub(super) fn drive_with(device: Arc<dyn Device>, steps: Steps) -> Result<Driven, RingError> {
    drive_within(device, (steps, RingOptions::default().ahead_max))
}

pub(super) fn drive_within(
    device: Arc<dyn Device>,
    how: (Steps, ByteCount),
) -> Result<Driven, RingError> {
    let mut found = Vec::new();
    let visit = &mut |record: Recovered| {
        found.push((record.envelope.position.0, ticket_of(&record.body)));
    };
    let (opened, recovery) = recover::recover(&*device, OWNER, how, visit, &mut |_| Ok(()))?;
    let Opened { header, cursors } = &opened;
    let shared = Arc::new(Shared::new(device, header.ring, cursors, 0));
    let handle = Handle::without_thread(Arc::clone(&shared));
    let feed = TestFeed::default();
    let committer = Committer::new(shared, opened, Box::new(feed.clone()));
    Ok(Driven { committer, handle, feed, recovery, found })
}

impl Driven {
    /// Commits records of these sectors, with rising tickets from `first`, in one batch.
    pub(super) fn commit(&mut self, first: u64, sectors: &[usize]) {
        for (ticket, sectors) in (first..).zip(sectors) {
            self.feed.push(ticket, *sectors);
        }
        assert_eq!(self.committer.turn().unwrap(), Turn::Committed);
        assert_eq!(self.committer.turn().unwrap(), Turn::Empty);
    }

    /// Releases everything committed.
    pub(super) fn release_all(&self) {
        self.handle.release(self.handle.status().durable);
    }

    pub(super) fn tickets_found(&self) -> Vec<u64> {
        self.found.iter().map(|(_, ticket)| *ticket).collect()
    }
}

/// Tells damage by its borders.
pub(super) fn borders(damage: &[Damage]) -> Vec<(u64, u64)> {
    damage.iter().map(|damage| (damage.from.0, damage.to.0)).collect()
}
