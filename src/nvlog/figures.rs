//! What a ring is doing, for whoever only looks: read without the ring's lock, so that no status ever waits
//! for the data path, nor the data path for a status.
//!
//! The lock's holder tells the figures before it lets go of it ([`super::handle::Shared::change`], the one
//! way to change them): so there is one writer at a time, and outside of the lock they are exact. A reader
//! takes them all of one moment ([`Moment`]), the reason of a latched ring among them.

use std::sync::{Arc, OnceLock};

use super::handle::RingStatus;
use crate::device::Durability;
use crate::units::moment::Moment;
use crate::units::numbers::{ByteCount, LogPosition};

const FIGURES: usize = 8;

/// What is shown of a ring.
#[derive(Debug)]
pub(super) struct Figures {
    capacity: ByteCount,
    durability: Durability,
    moment: Moment<FIGURES>,
    /// Set once, with the figures of that moment: the first reason is the one that is shown.
    latched: OnceLock<Arc<str>>,
}

impl Figures {
    pub(super) fn new(status: &RingStatus) -> Self {
        let this = Self {
            capacity: status.capacity,
            durability: status.durability,
            moment: Moment::default(),
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
        self.moment.tell_with(now, || {
            if let Some(reason) = &status.latched {
                // Later ones are not shown.
                drop(self.latched.set(Arc::clone(reason)));
            }
        });
    }

    /// All of one moment.
    pub(super) fn status(&self) -> RingStatus {
        let (met, latched) = self.moment.read_with(|| self.latched.get().cloned());
        let [released, release_wanted, durable, written, held_records, commits, syncs, bytes] = met;
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
            latched,
            durability: self.durability,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what is read is of one moment. Method: a writer tells statuses all of whose figures are equal,
    /// as fast as it can; a reader never meets two that differ, nor a reason before its time or behind it.
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
                assert_eq!(met.latched.is_some(), met.commits > 5000, "{met:?}");
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
