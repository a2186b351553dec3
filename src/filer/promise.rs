//! Room of a pool that others write to as well: promised before an entry is ordered (R18).
//!
//! In a pool of its own a source compares free blocks with what it has ordered. Where several
//! sources share one, free blocks that one of them counts on may be the next one's a moment
//! later: there each entry's worst case is reserved. A CP draws on what was promised for it; what
//! it did not need goes back when it is published.
//!
//! Where a source may have only so much of the pool ([`SpaceLimit`]), no more is promised than
//! keeps it there, whatever room there is. What is overwritten comes free with the CP only, and who
//! has all that it may must still be able to overwrite: so up to [`OVER_LIMIT_BLOCKS`] are promised
//! beyond.
//!
//! Called by `order` (under its lock) and by `checkpoint`. Invariant: what is held and what is
//! lent to the CP under way is never less than what [`Promise::takes`] has said yes to, but for
//! entries recovered from the ring, which were promised room before the restart.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pool::Pool;
use crate::pool::write_set::{Budget, Reservation};
use crate::units::ids::SourceId;
use crate::units::numbers::BlockCount;

/// Asked for at once, so that not every entry takes the pool's lock.
const STEP_BLOCKS: u64 = 256;

/// Promised beyond the limit, for what is overwritten in place: two of the longest entries, and the nodes
/// above them. Unit tests shrink it.
const OVER_LIMIT_BLOCKS: u64 = if cfg!(test) { 32 } else { 512 };

/// Blocks of the pool that a source may have at that moment; none if it may have what there is.
#[derive(Clone)]
pub struct SpaceLimit(Arc<dyn Fn() -> Option<BlockCount> + Send + Sync>);

impl SpaceLimit {
    /// Asked before each entry.
    pub fn new(ask: impl Fn() -> Option<BlockCount> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }

    /// None, ever.
    pub fn none() -> Self {
        Self::new(|| None)
    }
}

impl fmt::Debug for SpaceLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SpaceLimit").field(&(self.0)()).finish()
    }
}

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
    limit: SpaceLimit,
    source: SourceId,
    /// What the source had at the start: it may go on to have that.
    had: u64,
    limited: AtomicBool,
    state: Mutex<Held>,
}

impl Promise {
    /// Nothing is promised yet.
    pub fn new(pool: Arc<Pool>, source: SourceId, limit: SpaceLimit) -> Self {
        let (limited, state) = (AtomicBool::new(false), Mutex::default());
        let mut promise = Self { pool, limit, source, had: 0, limited, state };
        promise.had = promise.has().unwrap_or(0);
        promise
    }

    /// Blocks that its published and kept CPs have, as far as they are counted.
    fn has(&self) -> Option<u64> {
        // A pool that does not answer has latched, and refuses the CP.
        Some(self.pool.catalog().used(self.source).ok()??.0)
    }

    /// Whether so many beside what it has would be too many.
    fn is_over_limit(&self, blocks: u64) -> bool {
        let Some(limit) = (self.limit.0)() else { return false };
        let most = limit.0.max(self.had);
        self.has().is_some_and(|has| has > most || has + blocks > most + OVER_LIMIT_BLOCKS)
    }

    /// Whether it was the limit that spoke against the last entry.
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Whether `blocks` are promised, the CP under way counted; asks the pool for what is missing.
    pub fn takes(&self, blocks: u64) -> bool {
        let mut state = self.lock();
        let missing = blocks.saturating_sub(state.lent + state.held());
        let room = missing == 0
            || self.more(&mut state, missing.max(STEP_BLOCKS))
            || self.more(&mut state, missing);
        drop(state);
        let limited = room && self.is_over_limit(blocks);
        self.limited.store(limited, Ordering::Relaxed);
        room && !limited
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
