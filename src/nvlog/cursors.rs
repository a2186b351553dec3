//! The three cursors of the ring.
//!
//! A record lives in the ring from the moment it is received until its source log holds it.
//! This file is arithmetic only: no bytes, no device, no clock. `commit` moves bytes to the places
//! these cursors name; a durable header releases them.
//!
//! The order below holds after every public call:
//!
//! ```text
//! released <= durable <= written <= released + capacity
//! ```
//!
//! `released` is what a durable header says (R11): what was only asked for is no cursor here. A
//! full ring is ordinary and is answered with an error. A cursor that would break the order is our
//! own fault and panics: acknowledging a lost write is worse than stopping.

use crate::units::numbers::{ByteCount, LogPosition};

/// Why a record got no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// Room will come with the next durable release.
    #[error("ring is full: {wanted_bytes} bytes wanted, {free_bytes} free")]
    Full { wanted_bytes: u64, free_bytes: u64 },
    /// No release can ever make room.
    #[error("record of {wanted_bytes} bytes cannot fit a ring of {capacity_bytes}")]
    TooLarge { wanted_bytes: u64, capacity_bytes: u64 },
}

/// Who is where in the ring.
#[derive(Debug, Clone)]
pub struct Cursors {
    capacity: ByteCount,
    released: LogPosition,
    durable: LogPosition,
    written: LogPosition,
}

impl Cursors {
    /// Resumes after recovery. What a crash may have lost is not counted, so nothing lies between
    /// `durable` and `written`.
    pub fn recovered(capacity: ByteCount, released: LogPosition, durable: LogPosition) -> Self {
        let cursors = Self { capacity, released, durable, written: durable };
        cursors.check();
        cursors
    }

    /// Takes room for one record and says where it starts.
    pub fn reserve(&mut self, wanted: ByteCount) -> Result<LogPosition, ReserveError> {
        let free = self.free();
        if wanted > self.capacity {
            return Err(ReserveError::TooLarge {
                wanted_bytes: wanted.0,
                capacity_bytes: self.capacity.0,
            });
        }
        if wanted > free {
            return Err(ReserveError::Full { wanted_bytes: wanted.0, free_bytes: free.0 });
        }
        let start = self.written;
        self.written = start.after(wanted);
        self.check();
        Ok(start)
    }

    /// A write that ended at `upto` is on the medium.
    pub fn make_durable(&mut self, upto: LogPosition) {
        assert!(self.durable <= upto, "durable may not step back");
        self.durable = upto;
        self.check();
    }

    /// A durable header says that everything before `upto` may be overwritten.
    pub fn release(&mut self, upto: LogPosition) {
        assert!(self.released <= upto, "released may not step back");
        self.released = upto;
        self.check();
    }

    /// Bytes that can be reserved now.
    pub fn free(&self) -> ByteCount {
        ByteCount(self.capacity.0 - (self.written.0 - self.released.0))
    }

    /// Bytes of the data area.
    pub fn capacity(&self) -> ByteCount {
        self.capacity
    }

    /// Space before this may be reused.
    pub fn released(&self) -> LogPosition {
        self.released
    }

    /// Everything before this is on the medium.
    pub fn durable(&self) -> LogPosition {
        self.durable
    }

    /// The next record begins here.
    pub fn written(&self) -> LogPosition {
        self.written
    }

    fn check(&self) {
        assert!(self.released <= self.durable, "{self:?}");
        assert!(self.durable <= self.written, "{self:?}");
        assert!(self.written <= self.released.after(self.capacity), "{self:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(capacity: u64) -> Cursors {
        Cursors::recovered(ByteCount(capacity), LogPosition(0), LogPosition(0))
    }

    #[test]
    fn a_full_ring_refuses_until_a_release() {
        let mut cursors = ring(4);
        assert_eq!(cursors.reserve(ByteCount(3)), Ok(LogPosition(0)));
        let full = ReserveError::Full { wanted_bytes: 2, free_bytes: 1 };
        assert_eq!(cursors.reserve(ByteCount(2)), Err(full));
        let large = ReserveError::TooLarge { wanted_bytes: 5, capacity_bytes: 4 };
        assert_eq!(cursors.reserve(ByteCount(5)), Err(large));
        cursors.make_durable(LogPosition(3));
        cursors.release(LogPosition(3));
        assert_eq!(cursors.reserve(ByteCount(4)), Ok(LogPosition(3)));
        assert_eq!(cursors.free(), ByteCount(0));
    }

    #[test]
    fn recovery_resumes_with_nothing_in_flight() {
        let cursors = Cursors::recovered(ByteCount(10), LogPosition(95), LogPosition(100));
        assert_eq!(cursors.written(), LogPosition(100));
        assert_eq!(cursors.free(), ByteCount(5));
    }

    #[test]
    fn a_cursor_that_would_break_the_order_panics() {
        let breaks = |act: fn(&mut Cursors)| {
            std::panic::catch_unwind(|| {
                let mut cursors = ring(10);
                cursors.reserve(ByteCount(6)).unwrap();
                cursors.make_durable(LogPosition(4));
                cursors.release(LogPosition(2));
                act(&mut cursors);
            })
            .is_err()
        };
        assert!(!breaks(|_| {}));
        assert!(breaks(|c| c.make_durable(LogPosition(3))));
        assert!(breaks(|c| c.make_durable(LogPosition(7))));
        assert!(breaks(|c| c.release(LogPosition(1))));
        assert!(breaks(|c| c.release(LogPosition(5))));
        assert!(
            std::panic::catch_unwind(|| {
                Cursors::recovered(ByteCount(10), LogPosition(0), LogPosition(11))
            })
            .is_err()
        );
    }

    /// Goal: no short history breaks the order or gives the same room twice.
    /// Method: all 3^8 histories of reserve, sync and release against a plain counter of which
    /// byte of the area is taken by whom.
    #[test]
    fn every_short_history_agrees_with_the_model() {
        const CAPACITY: usize = 5;
        for history in 0..3u32.pow(8) {
            let mut cursors = ring(5);
            let mut taken = [false; CAPACITY];
            let (mut written, mut durable, mut released) = (0usize, 0usize, 0usize);
            let mut rest = history;
            for step in 0..8usize {
                match rest % 3 {
                    0 => {
                        let wanted = step % 3 + 1;
                        let room = written - released + wanted <= CAPACITY;
                        let got = cursors.reserve(ByteCount(u64::try_from(wanted).unwrap()));
                        assert_eq!(got.is_ok(), room, "history {history} step {step}");
                        if let Ok(start) = got {
                            assert_eq!(start.0, u64::try_from(written).unwrap());
                            for at in written..written + wanted {
                                assert!(!taken[at % CAPACITY], "room given twice");
                                taken[at % CAPACITY] = true;
                            }
                            written += wanted;
                        }
                    }
                    1 => {
                        durable = written;
                        cursors.make_durable(LogPosition(u64::try_from(durable).unwrap()));
                    }
                    _ => {
                        let upto = (released + step % 2 + 1).min(durable);
                        (released..upto).for_each(|at| taken[at % CAPACITY] = false);
                        released = upto;
                        cursors.release(LogPosition(u64::try_from(released).unwrap()));
                    }
                }
                rest /= 3;
                let used = taken.iter().filter(|taken| **taken).count();
                assert_eq!(cursors.free().0, u64::try_from(CAPACITY - used).unwrap());
            }
        }
    }
}
