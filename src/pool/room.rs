//! Room in a pool: promises of free blocks, blocks for a CP, and pins of what is published.
//!
//! Each call takes the state's lock for a moment. Pins hold room only as long as nobody needs it:
//! before the reserve is touched, the oldest are given up (R18). A full pool is a refusal.

use std::sync::Arc;

use crate::units::ids::SourceId;
use crate::units::numbers::{BlockCount, CpNumber, Pbn, VolumeNumber};

use super::error::PoolError;
use super::pointer::{TreeRoot, VolumeKey};
use super::space::{Draw, Space};
use super::write_set::Reservation;
use super::{Held, Pin, Pool, State};

impl Pool {
    /// Promises free blocks, so that what is ordered now can be written later (R18). Gives up
    /// the oldest pins if that makes room.
    pub fn reserve(self: &Arc<Self>, blocks: BlockCount) -> Result<Reservation, PoolError> {
        let mut state = self.lock()?;
        loop {
            match state.space.hold(blocks.0) {
                Ok(()) => return Ok(Reservation::new(Arc::clone(self), blocks.0)),
                Err(error) => {
                    let Space { free, pinned, .. } = state.space.report();
                    if blocks.0 > free.0 + pinned.0 || !self.end_oldest_pin(&mut state) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Takes up to so many blocks side by side. Before the reserve is touched the oldest pins are
    /// given up, until there is room beside it or no pin holds anything (R18). Promised blocks are
    /// there: for them nothing is given up.
    pub(super) fn take(&self, wanted: u64, draw: Draw<'_>) -> Result<(Pbn, u64), PoolError> {
        let mut state = self.lock()?;
        while state.space.touches_reserve(&draw) && self.end_oldest_pin(&mut state) {}
        match state.space.take(wanted, draw) {
            Some(run) => Ok(run),
            None => Err(state.space.full(wanted)),
        }
    }

    /// Gives up the pin that was made first, if pins hold any blocks at all.
    fn end_oldest_pin(&self, state: &mut State) -> bool {
        if state.space.only_pinned() == 0 {
            return false;
        }
        let Some(unpinned) = state.space.pins.end_oldest() else { return false };
        state.space.unpin(&self.cache, &unpinned);
        true
    }

    /// Pins a volume as last published. The pool gives the pin up only when it needs the space.
    pub fn pin(self: &Arc<Self>, source: SourceId, volume: VolumeNumber) -> Result<Pin, PoolError> {
        let mut state = self.lock()?;
        self.pin_locked(&mut state, VolumeKey { source, volume })
    }

    /// Pins all volumes of a source at one CP.
    pub fn pin_source(self: &Arc<Self>, source: SourceId) -> Result<Vec<Pin>, PoolError> {
        let mut made = Vec::new();
        let mut state = self.lock()?;
        if state.mirror.source(source).is_none() {
            return Err(PoolError::UnknownSource { source_id: source });
        }
        let keys: Vec<_> = state.mirror.volumes(source).map(|row| row.key).collect();
        for key in keys {
            match self.pin_locked(&mut state, key) {
                Ok(pin) => made.push(pin),
                Err(error) => {
                    // Pins are dropped without the lock.
                    drop(state);
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    fn pin_locked(self: &Arc<Self>, state: &mut State, key: VolumeKey) -> Result<Pin, PoolError> {
        let tree = state.mirror.volume(key).ok_or(PoolError::UnknownVolume { key })?.tree;
        let source = state.mirror.source(key.source);
        let cp = source.ok_or(PoolError::UnknownSource { source_id: key.source })?.applied;
        state.space.pins.refuse_more()?;
        Ok(self.pin_tree(state, key, cp, tree))
    }

    pub(super) fn pin_tree(
        self: &Arc<Self>,
        state: &mut State,
        key: VolumeKey,
        cp: CpNumber,
        tree: TreeRoot,
    ) -> Pin {
        let name = state.space.pins.add(key, cp, tree);
        Pin { pool: Arc::clone(self), held: Held::Pinned(name), tree }
    }

    /// Readers that pin something, and pins given up since the pool was opened; asked without a lock.
    pub fn pin_counts(&self) -> (u64, u64) {
        self.figures.pins()
    }

    /// Gives up the pin that was made first, whatever it holds.
    pub fn end_first_pin(&self) -> Result<bool, PoolError> {
        let mut state = self.lock()?;
        let Some(unpinned) = state.space.pins.end_oldest() else { return Ok(false) };
        state.space.unpin(&self.cache, &unpinned);
        Ok(true)
    }

    pub(super) fn unhold(&self, blocks: u64) {
        if let Ok(mut state) = self.lock() {
            state.space.unhold(blocks);
        }
    }
}
