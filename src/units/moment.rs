//! Figures that somebody changes under a lock and others only look at: read without that lock, all of one
//! moment, so that no status ever waits for the data path, nor the data path for a status.
//!
//! [`Moment`] is a sequence lock: the writer makes a count odd, stores the figures, and makes it even again; a
//! reader that met an odd count, or another one behind its reading than before it, reads again. One writer at
//! a time: whoever holds the lock of what the figures are of. [`Shown`] is a state under its lock, and what is
//! shown of it, which is told before the lock is let go of, if it was changed: outside of the lock it is
//! exact. Called by `nvlog`, `pool` and `filer`.

use std::array::from_fn;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `N` figures.
#[derive(Debug)]
pub struct Moment<const N: usize> {
    /// Odd while they change.
    changes: AtomicU64,
    figures: [AtomicU64; N],
}

impl<const N: usize> Default for Moment<N> {
    fn default() -> Self {
        Self { changes: AtomicU64::new(0), figures: from_fn(|_| AtomicU64::new(0)) }
    }
}

impl<const N: usize> Moment<N> {
    /// One writer at a time.
    pub fn tell(&self, figures: [u64; N]) {
        self.tell_with(figures, || ());
    }

    /// The same, with what lies `beside` the figures and is read with them; it must not panic.
    pub fn tell_with(&self, figures: [u64; N], beside: impl FnOnce()) {
        let changes = self.changes.load(Ordering::Relaxed);
        self.changes.store(changes + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        beside();
        for (shown, figure) in self.figures.iter().zip(figures) {
            shown.store(figure, Ordering::Relaxed);
        }
        self.changes.store(changes + 2, Ordering::Release);
    }

    /// All of one moment.
    pub fn read(&self) -> [u64; N] {
        self.read_with(|| ()).0
    }

    /// The same, with what lies `beside` them: asked for again if there was a change meanwhile.
    pub fn read_with<T>(&self, beside: impl Fn() -> T) -> ([u64; N], T) {
        loop {
            let before = self.changes.load(Ordering::Acquire);
            let met = from_fn(|at| self.figures[at].load(Ordering::Relaxed));
            let beside = beside();
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.changes.load(Ordering::Relaxed) == before {
                return (met, beside);
            }
            std::thread::yield_now();
        }
    }
}

/// A state of which `N` figures are shown.
pub trait Figures<const N: usize> {
    /// As they are now; asked for with the lock held, behind each change.
    fn figures(&self) -> [u64; N];
}

/// What is read of a state without its lock.
pub trait Shows<S> {
    /// The state has changed; called with its lock held.
    fn show(&self, state: &S);
}

impl<S: Figures<N>, const N: usize> Shows<S> for Moment<N> {
    fn show(&self, state: &S) {
        self.tell(state.figures());
    }
}

/// A state under its lock, and what is shown of it beside it.
#[derive(Debug)]
pub struct Shown<S, T> {
    state: Mutex<S>,
    shown: T,
}

impl<S, T: Shows<S>> Shown<S, T> {
    /// Nobody holds the lock.
    pub fn new(state: S, shown: T) -> Self {
        shown.show(&state);
        Self { state: Mutex::new(state), shown }
    }

    /// Takes the lock. Waits for whoever holds it.
    pub fn lock(&self) -> Changing<'_, S, T> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Changing { state, shown: &self.shown, changed: false }
    }

    /// As the last holder left it; never waits for one.
    pub fn shown(&self) -> &T {
        &self.shown
    }
}

/// The state, locked.
#[derive(Debug)]
pub struct Changing<'a, S, T: Shows<S>> {
    state: MutexGuard<'a, S>,
    shown: &'a T,
    changed: bool,
}

impl<S, T: Shows<S>> Changing<'_, S, T> {
    /// Shows the state now, for somebody who is to hear of the change before the lock is free.
    pub fn tell(&self) {
        self.shown.show(&self.state);
    }
}

/// A lock that a test looks at, and holds.
#[cfg(test)]
pub(crate) trait Lock {
    /// Whether nobody holds it.
    fn is_free(&self) -> bool;
    /// Held until the answer is dropped.
    fn hold(&self) -> Box<dyn Held + '_>;
}

/// That lock, held.
#[cfg(test)]
pub(crate) trait Held {}

#[cfg(test)]
impl<S, T: Shows<S>> Held for Changing<'_, S, T> {}

#[cfg(test)]
impl<S, T: Shows<S>> Lock for Shown<S, T> {
    fn is_free(&self) -> bool {
        !matches!(self.state.try_lock(), Err(std::sync::TryLockError::WouldBlock))
    }

    fn hold(&self) -> Box<dyn Held + '_> {
        Box::new(self.lock())
    }
}

impl<S, T: Shows<S>> Deref for Changing<'_, S, T> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.state
    }
}

impl<S, T: Shows<S>> DerefMut for Changing<'_, S, T> {
    fn deref_mut(&mut self) -> &mut S {
        self.changed = true;
        &mut self.state
    }
}

impl<S, T: Shows<S>> Drop for Changing<'_, S, T> {
    fn drop(&mut self) {
        if self.changed {
            self.tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Ends the writer, also if the reader panics.
    struct Stop<'a>(&'a AtomicBool);

    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Goal: figures, and what lies beside them, are of one moment. Method: a writer tells the same number
    /// in all of them, and twice it beside them, as fast as it can; a reader never meets two moments, nor
    /// goes back in time. Control: what is told outside of a change is met with the figures of another one.
    #[test]
    fn a_reader_meets_one_moment() {
        for inside in [true, false] {
            let (moment, beside) = (Moment::<8>::default(), AtomicU64::new(0));
            let (stop, mut torn, mut last) = (AtomicBool::new(false), false, 0);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for n in 1_u64.. {
                        let tell = || beside.store(2 * n, Ordering::Relaxed);
                        if inside {
                            moment.tell_with([n; 8], tell);
                        } else {
                            tell();
                            std::thread::yield_now();
                            moment.tell([n; 8]);
                        }
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                    }
                });
                let (_stop, mut moments) = (Stop(&stop), 0);
                while moments < 2000 && !torn {
                    let (met, with) = moment.read_with(|| beside.load(Ordering::Relaxed));
                    assert!(met.iter().all(|figure| *figure == met[0]), "{met:?}");
                    assert!(met[0] >= last, "time went back");
                    torn = with != 2 * met[0];
                    moments += u64::from(met[0] > last);
                    last = met[0];
                    std::thread::yield_now();
                }
            });
            assert_eq!(torn, !inside);
        }
    }

    #[derive(Debug)]
    struct Pair(u64);

    impl Figures<2> for Pair {
        fn figures(&self) -> [u64; 2] {
            [self.0, self.0 + 1]
        }
    }

    /// Goal: figures are read while the lock is held, as its last holder left them, and are the new ones
    /// once it is free. Control: who wants the lock waits for it.
    #[test]
    fn figures_are_read_while_the_lock_is_held() {
        let shown = Shown::new(Pair(1), Moment::<2>::default());
        assert_eq!(shown.shown().read(), [1, 2]);
        let (sender, told) = mpsc::channel();
        std::thread::scope(|scope| {
            let mut held = shown.lock();
            held.0 = 7;
            scope.spawn(|| {
                sender.send(shown.shown().read()).unwrap();
                sender.send([shown.lock().0, 0]).unwrap();
            });
            let patience = Duration::from_secs(60);
            assert_eq!(told.recv_timeout(patience), Ok([1, 2]));
            assert!(!shown.is_free() && told.try_recv().is_err());
            drop(held);
            assert_eq!(told.recv_timeout(patience), Ok([7, 0]));
        });
        assert_eq!(shown.shown().read(), [7, 8]);
    }
}
