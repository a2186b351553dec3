//! What a ring is doing, for whoever only looks: read without the ring's lock, so that no status ever waits
//! for the data path, nor the data path for a status.
//!
//! The lock's holder tells the figures before it lets go of it ([`super::handle::Shared::change`], the one
//! way to change them): so there is one writer at a time, and outside of the lock they are exact. A reader
//! takes them all of one moment, or reads again.

use std::array::from_fn;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use super::handle::RingStatus;
use crate::device::Durability;
use crate::units::numbers::{ByteCount, LogPosition};

const FIGURES: usize = 8;

/// What is shown of a ring.
#[derive(Debug)]
pub(super) struct Figures {
    capacity: ByteCount,
    durability: Durability,
    /// Odd while they change.
    changes: AtomicU64,
    figures: [AtomicU64; FIGURES],
    /// Set once: the first reason is the one that is shown.
    latched: OnceLock<Arc<str>>,
}

impl Figures {
    pub(super) fn new(status: &RingStatus) -> Self {
        let this = Self {
            capacity: status.capacity,
            durability: status.durability,
            changes: AtomicU64::new(0),
            figures: from_fn(|_| AtomicU64::new(0)),
            latched: OnceLock::new(),
        };
        this.tell(status);
        this
    }

    /// One writer at a time.
    pub(super) fn tell(&self, status: &RingStatus) {
        let RingStatus { released, release_wanted, durable, written, .. } = status;
        let [released, wanted, durable, written] =
            [released, release_wanted, durable, written].map(|position| position.0);
        let RingStatus { held_records, commits, syncs, bytes, .. } = *status;
        let now = [released, wanted, durable, written, held_records, commits, syncs, bytes];
        if let Some(reason) = &status.latched {
            // Later ones are not shown.
            drop(self.latched.set(Arc::clone(reason)));
        }
        let changes = self.changes.load(Ordering::Relaxed);
        self.changes.store(changes + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (shown, figure) in self.figures.iter().zip(now) {
            shown.store(figure, Ordering::Relaxed);
        }
        self.changes.store(changes + 2, Ordering::Release);
    }

    /// All of one moment.
    pub(super) fn status(&self) -> RingStatus {
        let [released, release_wanted, durable, written, held_records, commits, syncs, bytes] =
            self.read();
        RingStatus {
            capacity: self.capacity,
            released: LogPosition(released),
            release_wanted: LogPosition(release_wanted),
            durable: LogPosition(durable),
            written: LogPosition(written),
            held_records,
            commits,
            syncs,
            bytes,
            latched: self.latched.get().cloned(),
            durability: self.durability,
        }
    }

    fn read(&self) -> [u64; FIGURES] {
        loop {
            let before = self.changes.load(Ordering::Acquire);
            let met = from_fn(|at| self.figures[at].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.changes.load(Ordering::Relaxed) == before {
                return met;
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what is read is of one moment. Method: a writer tells statuses all of whose figures are equal,
    /// as fast as it can; a reader never meets two that differ.
    #[test]
    fn a_reader_meets_the_figures_of_one_moment() {
        let status = |n: u64| RingStatus {
            capacity: ByteCount(1 << 20),
            released: LogPosition(n),
            release_wanted: LogPosition(n),
            durable: LogPosition(n),
            written: LogPosition(n),
            held_records: n,
            commits: n,
            syncs: n,
            bytes: n,
            latched: (n > 5000).then(|| format!("at {n}").into()),
            durability: Durability::DirectDsync,
        };
        let figures = Figures::new(&status(0));
        std::thread::scope(|scope| {
            scope.spawn(|| (1..20_000).for_each(|n| figures.tell(&status(n))));
            let mut last = 0;
            while last < 19_999 {
                let met = figures.status();
                assert_eq!((met.released.0, met.bytes), (met.commits, met.commits));
                assert!(last <= met.commits, "{met:?}");
                last = met.commits;
            }
        });
        let end = figures.status();
        assert_eq!(end.latched.as_deref(), Some("at 5001"), "the first one");
        assert_eq!(
            RingStatus { latched: None, ..end },
            RingStatus { latched: None, ..status(19_999) }
        );
    }
}
