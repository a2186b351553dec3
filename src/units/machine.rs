//! What a part asks of the machine it runs on: the time, threads, a place to wait, chance.
//!
//! Everything that decides or waits asks here, so that a test can stand in for the machine: under
//! `simulated` one thread runs at a time, chosen by a seed, and the clock is virtual. Outside a
//! simulation each function is the one of the standard library or of tokio that it names.

#[cfg(test)]
pub(crate) mod simulated;

use std::future::Future;
use std::io;
use std::sync::{Condvar, LockResult, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Work on another thread came to no end: it panicked, or its runtime is gone.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Gone(pub String);

/// The monotonic clock.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Time since `then`; nothing if that is yet to come.
pub fn elapsed(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}

/// The time of day in seconds since 1970, as far as the machine knows it; no order follows from it.
pub fn unix_seconds() -> i64 {
    #[cfg(test)]
    if simulated::is_here() {
        return simulated::UNIX_SECONDS;
    }
    #[expect(clippy::disallowed_methods, reason = "hours and days are those of the calendar")]
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// A condition variable.
#[derive(Debug, Default)]
pub struct Bell(Condvar);

impl Bell {
    /// Nobody waits for it yet.
    pub const fn new() -> Self {
        Self(Condvar::new())
    }

    /// Waits until it rings, or for nothing. `guard` is of `mutex`.
    #[cfg_attr(not(test), expect(unused_variables, reason = "a simulation locks it again"))]
    pub fn wait<'a, T>(
        &self,
        mutex: &'a Mutex<T>,
        guard: MutexGuard<'a, T>,
    ) -> LockResult<MutexGuard<'a, T>> {
        #[cfg(test)]
        if simulated::is_here() {
            drop(guard);
            simulated::turn(Some(self.number()), None);
            return mutex.lock();
        }
        self.0.wait(guard)
    }

    /// The same for so long at most; how it ended, the clock tells.
    #[cfg_attr(not(test), expect(unused_variables, reason = "a simulation locks it again"))]
    pub fn wait_timeout<'a, T>(
        &self,
        mutex: &'a Mutex<T>,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
    ) -> LockResult<MutexGuard<'a, T>> {
        #[cfg(test)]
        if simulated::is_here() {
            drop(guard);
            simulated::turn(Some(self.number()), Some(now() + timeout));
            return mutex.lock();
        }
        match self.0.wait_timeout(guard, timeout) {
            Ok((guard, _)) => Ok(guard),
            Err(poisoned) => Err(PoisonError::new(poisoned.into_inner().0)),
        }
    }

    /// Wakes all who wait.
    pub fn notify_all(&self) {
        #[cfg(test)]
        simulated::ring(self.number());
        self.0.notify_all();
    }

    /// Wakes one who waits.
    pub fn notify_one(&self) {
        #[cfg(test)]
        simulated::ring(self.number());
        self.0.notify_one();
    }

    /// Tells it from others.
    #[cfg(test)]
    fn number(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// A named thread.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    #[cfg(test)]
    if simulated::is_here() {
        return simulated::spawn(name, body);
    }
    #[cfg(test)]
    let body = simulated::inheriting(body);
    std::thread::Builder::new().name(name.to_owned()).spawn(body)
}

/// Waits for the end of a thread of [`spawn`].
pub fn join(thread: JoinHandle<()>) -> std::thread::Result<()> {
    #[cfg(test)]
    simulated::until_ended(thread.thread().id());
    thread.join()
}

/// Whether this thread ends because its simulated process was killed: nothing is wrong with it.
pub fn is_killed() -> bool {
    #[cfg(test)]
    return simulated::is_killed();
    #[cfg(not(test))]
    false
}

/// Whether a test has switched rule R`rule` off, to show that it is needed.
#[inline]
pub fn breaks(rule: u8) -> bool {
    #[cfg(test)]
    return simulated::breaks(rule);
    #[cfg(not(test))]
    {
        let _: u8 = rule;
        false
    }
}

/// Runs what blocks on a thread for that, and waits for it.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Gone> {
    #[cfg(test)]
    if simulated::is_here() {
        return simulated::blocking(work).await;
    }
    #[cfg(test)]
    let work = simulated::inheriting(work);
    tokio::task::spawn_blocking(work).await.map_err(|error| Gone(error.to_string()))
}

/// Runs what blocks on a thread for that; nobody waits for it.
pub fn aside(work: impl FnOnce() + Send + 'static) {
    #[cfg(test)]
    if simulated::is_here() {
        drop(simulated::spawn("aside", work));
        return;
    }
    drop(tokio::task::spawn_blocking(work));
}

/// Waits on a thread that may block for what happens on `runtime`.
pub fn block_on<F: Future>(runtime: &Handle, future: F) -> F::Output {
    #[cfg(test)]
    if simulated::is_here() {
        return simulated::block_on(future);
    }
    runtime.block_on(future)
}

/// Sends on a thread that may block; says whether somebody receives.
pub fn send<T>(sender: &mpsc::Sender<T>, value: T) -> bool {
    #[cfg(test)]
    if simulated::is_here() {
        return simulated::block_on(sender.send(value)).is_ok();
    }
    sender.blocking_send(value).is_ok()
}

/// Receives on a thread that may block.
pub fn receive<T>(receiver: &mut mpsc::Receiver<T>) -> Option<T> {
    #[cfg(test)]
    if simulated::is_here() {
        return simulated::block_on(receiver.recv());
    }
    receiver.blocking_recv()
}

/// A task of its own.
pub fn task<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    #[cfg(test)]
    if simulated::is_here() {
        // It ends with its simulated process.
        return tokio::task::spawn_local(future);
    }
    tokio::spawn(future)
}
