//! So many bytes a second.
//!
//! Strict: time that was not used is not made up for. Who waits, and for what else, is the caller's.

use std::time::{Duration, Instant};

use super::machine;
use super::numbers::ByteCount;

/// A limit, and what went under it.
#[derive(Debug)]
pub struct Rate {
    limit: Option<ByteCount>,
    /// When the next bytes may go.
    free: Instant,
}

impl Rate {
    /// None, and 0, is no limit.
    pub fn new(limit: Option<ByteCount>) -> Self {
        Self { limit: limit.filter(|limit| limit.0 > 0), free: machine::now() }
    }

    /// Counts bytes that go now.
    pub fn take(&mut self, bytes: u64) {
        let Some(limit) = self.limit else { return };
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit.0);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.free = self.free.max(machine::now()) + cost;
    }

    /// How long until the next may go; nothing without a limit.
    pub fn left(&self) -> Duration {
        self.free.saturating_duration_since(machine::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_costs_its_time_and_a_pause_is_no_credit() {
        let mut rate = Rate::new(Some(ByteCount(1 << 20)));
        assert_eq!(rate.left(), Duration::ZERO);
        rate.free = machine::now().checked_sub(Duration::from_secs(9)).unwrap();
        rate.take(1 << 20);
        rate.take(1 << 20);
        let left = rate.left();
        let wanted = Duration::from_millis(1500)..=Duration::from_secs(2);
        assert!(wanted.contains(&left), "{left:?}");
        for none in [None, Some(ByteCount(0))] {
            let mut free = Rate::new(none);
            free.take(u64::MAX);
            assert_eq!(free.left(), Duration::ZERO);
        }
    }
}
