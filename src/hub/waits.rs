//! Since when the oldest entry of a source waits for each step of the ladder.
//!
//! The hub notes when transfers come, as samples: one for all that come within [`SPACING`], at most
//! [`SAMPLES_MAX`]; where there is no place for one more, each two neighbours become one that is as
//! old as the older. So a wait is told too long rather than too short. A transfer in the source log
//! needs its sample no more: what waits there is known by its CP ([`super::lane::Cursors`]).
//!
//! Written where a transfer is staged, under a lock of its own that nobody else wants then; read by
//! the source's actor, which publishes it. Bounded, and nothing is allocated behind the start.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::units::machine;
use crate::units::numbers::{CpNumber, SequenceNumber};

/// Samples of a source.
const SAMPLES_MAX: usize = if cfg!(test) { 8 } else { 128 };
/// Transfers that come so close behind each other are one sample.
const SPACING: Duration = Duration::from_millis(20);

/// When the oldest entry came that waits for a step; nothing where none does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Since {
    /// To be durable in the ring.
    pub staged: Option<Instant>,
    /// To lie in the source log.
    pub drained: Option<Instant>,
    /// To be in a new tree.
    pub applied: Option<Instant>,
}

/// The samples of one source.
#[derive(Debug)]
pub struct Waits {
    /// Up to which sequence number, and when the first of these came; both rise.
    samples: VecDeque<(SequenceNumber, Instant)>,
    /// What came before is as old as this.
    began: Instant,
    /// The last CP whose trees were built.
    built: CpNumber,
}

impl Default for Waits {
    fn default() -> Self {
        let samples = VecDeque::with_capacity(SAMPLES_MAX);
        Self { samples, began: machine::now(), built: CpNumber(0) }
    }
}

impl Waits {
    /// A transfer that ends at `last` came just now; all up to `drained` lies in the log.
    pub fn came(&mut self, last: SequenceNumber, drained: SequenceNumber) {
        self.came_at(machine::now(), last, drained);
    }

    fn came_at(&mut self, now: Instant, last: SequenceNumber, drained: SequenceNumber) {
        while self.samples.front().is_some_and(|(upto, _)| *upto <= drained) {
            self.samples.pop_front();
        }
        // The log may have been cut: what comes then takes the place of what was there.
        while self.samples.back().is_some_and(|(upto, _)| *upto >= last) {
            self.samples.pop_back();
        }
        if let Some((upto, since)) = self.samples.back_mut()
            && now.saturating_duration_since(*since) < SPACING
        {
            *upto = last;
            return;
        }
        if self.samples.len() == SAMPLES_MAX {
            self.halve();
        }
        self.samples.push_back((last, now));
    }

    fn halve(&mut self) {
        for at in 0..SAMPLES_MAX / 2 {
            let ((_, since), (upto, _)) = (self.samples[2 * at], self.samples[2 * at + 1]);
            self.samples[at] = (upto, since);
        }
        self.samples.truncate(SAMPLES_MAX / 2);
    }

    /// The trees of that CP are built.
    pub fn built(&mut self, cp: CpNumber) {
        self.built = self.built.max(cp);
    }

    /// The last CP whose trees were built.
    pub fn last_built(&self) -> CpNumber {
        self.built
    }

    /// When the first came of what lies behind `cursor`.
    pub fn behind(&self, cursor: SequenceNumber) -> Instant {
        let at = self.samples.partition_point(|(upto, _)| *upto <= cursor);
        self.samples.get(at).map_or(self.began, |(_, since)| *since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// Goal: a wait is never told shorter than it is, and while few have come, not longer than by the
    /// spacing, whatever is drained meanwhile.
    #[test]
    fn the_oldest_that_waits_is_told_old_enough() {
        let (mut waits, start) = (Waits::default(), Instant::now());
        let came = |waits: &mut Waits, at: u64, drained| {
            waits.came_at(start + ms(at), SequenceNumber(at), SequenceNumber(drained));
        };
        for at in 1..=100 {
            came(&mut waits, at, 0);
        }
        for cursor in 0..100 {
            let told = waits.behind(SequenceNumber(cursor));
            let first = start + ms(cursor + 1);
            assert!(told <= first && told + SPACING > first, "{cursor}");
        }
        // Held for long: bounded, coarser, and never too short.
        for at in 101..=10_000 {
            came(&mut waits, at, 0);
        }
        assert!(waits.samples.len() <= SAMPLES_MAX && waits.samples.capacity() <= SAMPLES_MAX);
        assert_eq!(waits.behind(SequenceNumber(0)), start + ms(1), "the oldest is exact");
        for cursor in 0..10_000 {
            assert!(waits.behind(SequenceNumber(cursor)) <= start + ms(cursor + 1), "{cursor}");
        }
        // Negative control: with one millisecond less it is too short somewhere.
        let late = |cursor| waits.behind(SequenceNumber(cursor)) + ms(1) > start + ms(cursor + 1);
        assert!((0..10_000).any(late));
        // What was drained is forgotten.
        came(&mut waits, 10_100, 10_000);
        assert_eq!(waits.samples.len(), 1);
        assert_eq!(waits.behind(SequenceNumber(10_000)), start + ms(10_100));
    }

    #[test]
    fn a_log_that_was_cut_begins_anew() {
        let (mut waits, start) = (Waits::default(), Instant::now());
        waits.came_at(start, SequenceNumber(50), SequenceNumber(0));
        waits.came_at(start + ms(500), SequenceNumber(20), SequenceNumber(10));
        assert_eq!(waits.behind(SequenceNumber(10)), start + ms(500));
        assert_eq!(waits.samples.len(), 1);
    }
}
