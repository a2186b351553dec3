//! Holds a scrub or a rebuild to so many bytes a second, and ends it when it is told to.
//!
//! Strict: time that was not used is not made up for.

use std::time::{Duration, Instant};

use crate::units::machine;
use crate::units::numbers::ByteCount;

use super::Shared;

/// The pace of one piece of work.
#[derive(Debug)]
pub(super) struct Pace<'a> {
    shared: &'a Shared,
    limit: Option<ByteCount>,
    /// When the next bytes may go.
    free: Instant,
}

impl<'a> Pace<'a> {
    /// None is no limit.
    pub(super) fn new(shared: &'a Shared, limit: Option<ByteCount>) -> Self {
        let limit = limit.filter(|limit| limit.0 > 0);
        Self { shared, limit, free: machine::now() }
    }

    /// So many bytes were read: waits until more may be; `false` if the work is to end.
    pub(super) fn take(&mut self, bytes: u64, ends: impl Fn(&Shared) -> bool) -> bool {
        if ends(self.shared) {
            return false;
        }
        let Some(limit) = self.limit else { return true };
        self.free = self.free.max(machine::now()) + cost(bytes, limit);
        loop {
            let left = self.free.saturating_duration_since(machine::now());
            if left.is_zero() {
                return true;
            }
            self.shared.rest(left);
            if ends(self.shared) {
                return false;
            }
        }
    }
}

/// The time that so many bytes take.
fn cost(bytes: u64, limit: ByteCount) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit.0);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
