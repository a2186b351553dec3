//! Holds a scrub or a rebuild to so many bytes a second, and ends it when it is told to.

use crate::units::numbers::ByteCount;
use crate::units::rate::Rate;

use super::Shared;

/// The pace of one piece of work.
#[derive(Debug)]
pub(super) struct Pace<'a> {
    shared: &'a Shared,
    rate: Rate,
}

impl<'a> Pace<'a> {
    /// None is no limit.
    pub(super) fn new(shared: &'a Shared, limit: Option<ByteCount>) -> Self {
        Self { shared, rate: Rate::new(limit) }
    }

    /// So many bytes were read: waits until more may be; `false` if the work is to end.
    pub(super) fn take(&mut self, bytes: u64, ends: impl Fn(&Shared) -> bool) -> bool {
        if ends(self.shared) {
            return false;
        }
        self.rate.take(bytes);
        loop {
            let left = self.rate.left();
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
