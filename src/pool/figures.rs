//! How full a pool is, for whoever only looks: read without the state's lock, so that a call of the
//! data path that is stuck under it keeps no status from its answer.
//!
//! Whoever has changed the state tells the figures before it lets go of it ([`Locked`]): so there is
//! one writer at a time, and outside of the lock they are exact. A reader takes them all of one
//! moment ([`Moment`]). What each source has is told by each commit, which alone changes it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};

use arc_swap::ArcSwap;

use crate::units::ids::SourceId;
use crate::units::moment::Moment;
use crate::units::numbers::BlockCount;

use super::State;
use super::mirror::Mirror;
use super::space::Space;

/// Blocks by source.
pub(super) type UsedBySource = BTreeMap<SourceId, BlockCount>;

/// What is shown of a pool.
#[derive(Debug, Default)]
pub(super) struct Figures {
    space: Moment<{ Space::FIGURES }>,
    /// Readers that pin something, and pins given up: each for itself.
    pins: [AtomicU64; 2],
    used: ArcSwap<BTreeMap<SourceId, AtomicU64>>,
}

impl Figures {
    /// One writer at a time.
    pub(super) fn tell(&self, space: Space) {
        self.space.tell(space.figures());
    }

    /// All of one moment.
    pub(super) fn space(&self) -> Space {
        Space::of(self.space.read())
    }

    /// Readers that pin something, and pins given up so far.
    pub(super) fn tell_pins(&self, (readers, ended): (u64, u64)) {
        for (shown, count) in self.pins.iter().zip([readers, ended]) {
            shown.store(count, Ordering::Relaxed);
        }
    }

    /// What was told of them last.
    pub(super) fn pins(&self) -> (u64, u64) {
        let [readers, ended] = &self.pins;
        (readers.load(Ordering::Relaxed), ended.load(Ordering::Relaxed))
    }

    /// What the rows of all sources say.
    pub(super) fn tell_all_used(&self, mirror: &Mirror) {
        let used = mirror.all_used().map(|(source, blocks)| (source, AtomicU64::new(blocks)));
        self.used.store(Arc::new(used.collect()));
    }

    /// What they say by now, where only those of these sources have changed.
    pub(super) fn tell_used(&self, mirror: &Mirror, changed: &BTreeSet<SourceId>) {
        let used = self.used.load();
        let is_told = |source: &SourceId| match (used.get(source), mirror.counted(*source)) {
            (Some(shown), Some(blocks)) => {
                shown.store(blocks, Ordering::Relaxed);
                true
            }
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if !changed.iter().all(is_told) {
            self.tell_all_used(mirror);
        }
    }

    /// Blocks of each source of which it is known.
    pub(super) fn used(&self) -> UsedBySource {
        let blocks = |shown: &AtomicU64| BlockCount(shown.load(Ordering::Relaxed));
        self.used.load().iter().map(|(source, shown)| (*source, blocks(shown))).collect()
    }
}

/// The state, locked.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    figures: &'a Figures,
    changed: bool,
    /// A panic was under way before it was locked.
    unwinding: bool,
}

impl<'a> Locked<'a> {
    pub(super) fn new(state: MutexGuard<'a, State>, figures: &'a Figures) -> Self {
        Self { state, figures, changed: false, unwinding: std::thread::panicking() }
    }
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        self.changed = true;
        &mut self.state
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Half a change is shown to nobody: the pool is poisoned.
        if self.changed && std::thread::panicking() == self.unwinding {
            self.figures.tell(self.state.space.report());
            self.figures.tell_pins(self.state.space.pins.counts());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::TryLockError;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::limits::MIB;
    use crate::pool::error::PoolError;
    use crate::pool::testing::new_device;
    use crate::pool::{Pool, PoolOptions};

    fn pool() -> Arc<Pool> {
        Pool::create(new_device(64 * MIB), [1; 16], PoolOptions::default()).unwrap()
    }

    /// The control: whoever needs the state waits for it.
    #[test]
    fn figures_are_told_while_the_state_is_held() {
        let pool = pool();
        let (free, rows) = (mpsc::channel(), mpsc::channel());
        let (asks, waits) = (Arc::clone(&pool), Arc::clone(&pool));
        pool.with_state_held(|| {
            assert!(matches!(pool.state.try_lock(), Err(TryLockError::WouldBlock)));
            let ask = move || free.0.send((asks.space(), asks.used_by_all())).unwrap();
            let asking = std::thread::spawn(ask);
            let (space, used) = free.1.recv_timeout(Duration::from_secs(60)).unwrap();
            assert!(space.unwrap().free.0 > 0 && used.unwrap().is_empty());
            asking.join().unwrap();
            std::thread::spawn(move || rows.0.send(waits.catalog().sources()));
            assert!(rows.1.recv_timeout(Duration::from_millis(50)).is_err());
        });
        assert!(rows.1.recv_timeout(Duration::from_secs(60)).unwrap().unwrap().is_empty());
    }

    #[test]
    fn figures_are_those_of_the_state() {
        let pool = pool();
        let is_told = || {
            let told = pool.space().unwrap();
            assert_eq!(told, pool.lock().unwrap().space.report());
        };
        is_told();
        let before = pool.space().unwrap();
        let held = pool.reserve(BlockCount(5)).unwrap();
        is_told();
        assert_eq!(pool.space().unwrap(), Space { held: BlockCount(5), ..before });
        drop(held);
        assert_eq!(pool.space().unwrap(), before);
        pool.poison();
        assert!(matches!(pool.space(), Err(PoolError::Poisoned)));
        assert!(matches!(pool.used_by_all(), Err(PoolError::Poisoned)));
    }

    /// All figures of a moment are the same number: a reader that met two moments would see it.
    #[test]
    fn figures_are_of_one_moment() {
        let (figures, stop) = (Figures::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1_u64.. {
                    figures.tell(Space::of([n; Space::FIGURES]));
                    std::thread::yield_now();
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            let (mut last, mut moments) = (0, 0);
            while moments < 200 {
                std::thread::yield_now();
                let met = figures.space().figures();
                assert!(met.iter().all(|figure| *figure == met[0]), "{met:?}");
                assert!(met[0] >= last, "time went back");
                moments += u64::from(met[0] > last);
                last = met[0];
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
