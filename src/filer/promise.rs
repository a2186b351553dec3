//! Room of a pool that others write to as well: promised before an entry is ordered (R18).
//!
//! In a pool of its own a source compares free blocks with what it has ordered. Where several
//! sources share one, free blocks that one of them counts on may be the next one's a moment
//! later: there each entry's worst case is reserved. A CP draws on what was promised for it; what
//! it did not need goes back when it is published.
//!
//! Called by `order` (under its lock) and by `checkpoint`. Invariant: what is held and what is
//! lent to the CP under way is never less than what [`Promise::takes`] has said yes to, but for
//! entries recovered from the ring, which were promised room before the restart.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pool::Pool;
use crate::pool::write_set::{Budget, Reservation};
use crate::units::numbers::BlockCount;

/// Asked for at once, so that not every entry takes the pool's lock.
const STEP_BLOCKS: u64 = 256;

#[derive(Debug, Default)]
struct Held {
    held: Option<Reservation>,
    /// Taken out for the CP under way; counted until that is published.
    lent: u64,
}

/// The room that one source was promised.
#[derive(Debug)]
pub struct Promise {
    pool: Arc<Pool>,
    state: Mutex<Held>,
}

impl Promise {
    /// Nothing is promised yet.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self { pool, state: Mutex::default() }
    }

    /// Whether `blocks` are promised, the CP under way counted; asks the pool for what is missing.
    pub fn takes(&self, blocks: u64) -> bool {
        let mut state = self.lock();
        let missing = blocks.saturating_sub(state.lent + state.held());
        missing == 0
            || self.more(&mut state, missing.max(STEP_BLOCKS))
            || self.more(&mut state, missing)
    }

    /// Room for the CP under way that needs at most `blocks`. If it is tried again, what it took
    /// the first time was given back, and is asked for anew; what the pool does not have comes
    /// out of the reserve.
    pub fn lend(&self, blocks: u64) -> Budget {
        let mut state = self.lock();
        let again = std::mem::replace(&mut state.lent, 0) > 0;
        let missing = blocks.saturating_sub(if again { 0 } else { state.held() });
        let lent = if missing == 0 || self.more(&mut state, missing) {
            state.held.as_mut().map(|held| held.split(BlockCount(blocks)))
        } else if again {
            // What is held is for entries of the next CP.
            None
        } else {
            state.held.take()
        };
        state.lent = blocks;
        lent.map_or(Budget::Reserve, Budget::Held)
    }

    /// The CP under way is published.
    pub fn settled(&self) {
        self.lock().lent = 0;
    }

    fn more(&self, state: &mut Held, blocks: u64) -> bool {
        let Ok(more) = self.pool.reserve(BlockCount(blocks)) else { return false };
        match &mut state.held {
            Some(held) => held.merge(more),
            None => state.held = Some(more),
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn held(&self) -> u64 {
        self.held.as_ref().map_or(0, |held| held.blocks().0)
    }
}
