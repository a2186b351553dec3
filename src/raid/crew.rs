//! The devices of an array at work side by side.
//!
//! Called by the writer of an array for each step in which several devices have something to do: the
//! time of the step is that of the slowest, not of all. Each has a thread for that step; one of them is
//! the caller's own. If no thread can be made, the caller does that device's work as well: nothing is
//! left out, it only takes longer. In unit tests all is done one after the other, so that a seed gives
//! the same history again.

use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, scope};

/// How the work of one went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It came to its end, well or not.
    With(bool),
    /// It panicked.
    Panicked,
}

/// A thread as it is made, but for what it does.
fn ordinary() -> Builder {
    Builder::new().name("raid".to_owned())
}

/// Does `work` for all of `items` and says how each went, in their order.
pub(super) fn each<T: Sync>(items: &[T], work: impl Fn(&T) -> bool + Sync) -> Vec<Ended> {
    // One after the other in unit tests, so that a seed gives the same history again.
    if cfg!(test) || items.len() < 2 {
        return items.iter().map(|item| Ended::With(work(item))).collect();
    }
    side_by_side(items, work, ordinary)
}

fn side_by_side<T: Sync>(
    items: &[T],
    work: impl Fn(&T) -> bool + Sync,
    thread: impl Fn() -> Builder,
) -> Vec<Ended> {
    let work = &work;
    scope(|scope| {
        let (first, others) = items.split_at(items.len().min(1));
        let begin = |item| thread().spawn_scoped(scope, move || work(item));
        let begun: Vec<_> = others.iter().map(|item| (item, begin(item))).collect();
        let mut ended: Vec<_> = first.iter().map(|item| Ended::With(work(item))).collect();
        ended.extend(begun.into_iter().map(|(item, thread)| match thread {
            Ok(thread) => thread.join().map_or(Ended::Panicked, Ended::With),
            Err(error) => {
                tracing::debug!(%error, "no thread for a device: one after the other");
                Ended::With(work(item))
            }
        }));
        ended
    })
}

/// Runs both, `work` on another thread if one can be made, and says what `own` says.
pub(super) fn beside<T>(own: impl FnOnce() -> T, work: impl FnOnce() + Send) -> T {
    if cfg!(test) {
        work();
        return own();
    }
    both(own, work, ordinary)
}

fn both<T>(own: impl FnOnce() -> T, work: impl FnOnce() + Send, thread: impl Fn() -> Builder) -> T {
    let work = Mutex::new(Some(work));
    let run = || {
        let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            work();
        }
    };
    scope(|scope| {
        if let Err(error) = thread().spawn_scoped(scope, run) {
            tracing::debug!(%error, "no thread beside: one after the other");
            run();
        }
        own()
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::thread::{self, ThreadId};

    use super::*;

    /// No machine has memory for the stack.
    fn impossible() -> Builder {
        Builder::new().stack_size(1 << 60)
    }

    fn threads_of(thread: fn() -> Builder) -> (HashSet<ThreadId>, Vec<Ended>) {
        let met: Mutex<Vec<(u32, ThreadId)>> = Mutex::default();
        let note = |n: &u32| {
            met.lock().unwrap().push((*n, thread::current().id()));
            !n.is_multiple_of(2)
        };
        let ended = side_by_side(&[1, 2, 3, 4], note, thread);
        let mut met = met.into_inner().unwrap();
        met.sort_by_key(|(n, _)| *n);
        assert_eq!(met.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 2, 3, 4], "each once");
        (met.into_iter().map(|(_, id)| id).collect(), ended)
    }

    /// All is done, and told in order, whether there are threads or not.
    #[test]
    fn without_threads_the_caller_does_it_all() {
        let wanted = [true, false, true, false].map(Ended::With);
        let (threads, ended) = threads_of(ordinary);
        assert_eq!((threads.len(), ended), (4, wanted.to_vec()));
        let (threads, ended) = threads_of(impossible);
        assert_eq!((threads, ended), (HashSet::from([thread::current().id()]), wanted.to_vec()));
        for make in [ordinary, impossible] {
            let done = Mutex::new(0);
            assert_eq!(both(|| 7, || *done.lock().unwrap() += 1, make), 7);
            assert_eq!(*done.lock().unwrap(), 1);
        }
    }

    #[test]
    fn a_panic_is_that_of_its_own_device() {
        let ended =
            side_by_side(&[1, 2, 3], |n| if *n == 2 { panic!("no") } else { true }, ordinary);
        assert_eq!(ended, [Ended::With(true), Ended::Panicked, Ended::With(true)]);
    }
}
