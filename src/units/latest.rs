//! A value that one thread replaces all the time, and others look at now and then.
//!
//! [`Latest`] has a few slots. Who replaces the value takes one that nobody looks into, and only then says that it
//! is the current one; who looks holds the current slot for as long as it takes to count one reference more. So who
//! replaces it waits for nobody, unless all other slots are held by threads that were interrupted in that moment; who
//! looks may wait for another who looks. Both cost the same however many threads there are. `arc-swap`, which serves what is seldom replaced, has each
//! `store` go through a place of every thread there ever was: with the 1,000 threads that a hub of 1,000 sources
//! needs once, at its start, that was two thirds of all it did. Called by `hub` and `filer`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// So many, less one, may be interrupted in the middle of their look at the same moment before the one who
/// replaces the value finds no slot at once.
const SLOTS: usize = 4;

/// The newest value.
#[derive(Debug)]
pub struct Latest<T> {
    slots: [Mutex<Arc<T>>; SLOTS],
    current: AtomicUsize,
}

impl<T> Latest<T> {
    /// With that value.
    pub fn new(value: T) -> Self {
        let value = Arc::new(value);
        Self {
            slots: std::array::from_fn(|_| Mutex::new(value.clone())),
            current: AtomicUsize::new(0),
        }
    }

    /// The newest value, or one that was so while this call lasted.
    pub fn load(&self) -> Arc<T> {
        loop {
            let current = self.current.load(Ordering::Acquire);
            // Held by another who looks; or the values have gone round meanwhile: then this may be one that is not
            // said to be the current one yet, and the next look would see an older one.
            if let Some(slot) = self.free(current)
                && self.current.load(Ordering::Acquire) == current
            {
                return slot.clone();
            }
            std::thread::yield_now();
        }
    }

    /// Replaces the value. One caller at a time, or which of two values stays is not known.
    pub fn store(&self, value: T) {
        let mut value = Arc::new(value);
        let current = self.current.load(Ordering::Acquire);
        loop {
            for at in (1..SLOTS).map(|step| (current + step) % SLOTS) {
                if let Some(mut slot) = self.free(at) {
                    std::mem::swap(&mut *slot, &mut value);
                    drop(slot);
                    self.current.store(at, Ordering::Release);
                    return;
                }
            }
            std::thread::yield_now();
        }
    }

    /// A slot, if nobody looks into it.
    fn free(&self, at: usize) -> Option<MutexGuard<'_, Arc<T>>> {
        match self.slots[at].try_lock() {
            Ok(slot) => Some(slot),
            Err(TryLockError::Poisoned(poisoned)) => Some(PoisonError::into_inner(poisoned)),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// Threads that look, beside one that replaces: each sees whole values, never an older one than before, and the
    /// last one in the end.
    #[test]
    fn who_looks_sees_whole_values_in_their_order() {
        const LAST: u64 = 200_000;
        let (latest, between) = (Latest::new([0_u64; 8]), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut before = 0;
                    while before < LAST {
                        let now = *latest.load();
                        assert_eq!(now, [now[0]; 8]);
                        assert!(now[0] >= before, "{} behind {before}", now[0]);
                        if (1..LAST).contains(&now[0]) && before == 0 {
                            between.fetch_add(1, Ordering::Relaxed);
                        }
                        before = now[0];
                    }
                });
            }
            // Each has met a value on its way before the last one comes.
            let mut number = 0;
            while number < LAST - 1 || between.load(Ordering::Relaxed) < 3 {
                number = (number + 1).min(LAST - 1);
                latest.store([number; 8]);
            }
            latest.store([LAST; 8]);
        });
    }

    /// Whoever is stopped in the middle of his look stops nobody who replaces the value, and others see the new one.
    /// Control: one that holds the slot of the newest value is waited for by those who look.
    #[test]
    fn who_is_interrupted_while_he_looks_stops_nobody() {
        let latest = Latest::new(0);
        let interrupted = latest.free(0).unwrap();
        let again = latest.free(1).unwrap();
        for number in 1..=10 {
            latest.store(number);
            assert_eq!(*latest.load(), number);
        }
        drop((interrupted, again));
        let (newest, ended) = (latest.current.load(Ordering::Relaxed), AtomicBool::new(false));
        let held = latest.free(newest).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(*latest.load(), 10);
                ended.store(true, Ordering::Release);
            });
            for _ in 0..100 {
                std::thread::yield_now();
            }
            assert!(!ended.load(Ordering::Acquire));
            drop(held);
        });
        assert!(ended.into_inner());
    }
}
