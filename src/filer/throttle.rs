//! Holds what brings an image up to so many bytes a second (`resync_limit`).
//!
//! Used by the threads of `pass` and `served`. Strict: time that was not used is not made up for.

use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::units::machine;
use crate::units::numbers::ByteCount;

/// The throttle of one pass.
#[derive(Debug)]
pub struct Throttle {
    limit: Option<ByteCount>,
    /// When the next bytes may go.
    free: Instant,
    runtime: Handle,
}

impl Throttle {
    /// None is no limit. Called from within the runtime.
    pub fn new(limit: Option<ByteCount>) -> Self {
        let limit = limit.filter(|limit| limit.0 > 0);
        Self { limit, free: machine::now(), runtime: Handle::current() }
    }

    /// Waits until so many bytes may go; false if nobody listens any more. Blocks.
    pub fn wait<T>(&mut self, bytes: u64, listener: &mpsc::Sender<T>) -> bool {
        let Some(limit) = self.limit else { return true };
        let left = self.free.saturating_duration_since(machine::now());
        self.free = self.free.max(machine::now()) + cost(bytes, limit);
        if left.is_zero() {
            return true;
        }
        // Sooner only if nobody listens any more.
        let closed = async { tokio::time::timeout(left, listener.closed()).await };
        machine::block_on(&self.runtime, closed).is_err()
    }
}

/// The time that so many bytes take.
fn cost(bytes: u64, limit: ByteCount) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit.0);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 KiB at 256 KiB a second are a quarter of a second each; a pause before is no credit.
    #[test]
    fn no_second_has_more_bytes_than_the_limit() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_time().build().unwrap();
        let _inside = runtime.enter();
        let (sender, receiver) = mpsc::channel::<()>(1);
        let mut throttle = Throttle::new(Some(ByteCount(256 << 10)));
        assert!(throttle.wait(0, &sender));
        throttle.free = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        let begun = Instant::now();
        for _ in 0..3 {
            assert!(throttle.wait(64 << 10, &sender));
        }
        assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
        drop(receiver);
        assert!(!throttle.wait(1 << 30, &sender), "nobody listens");
        let mut free = Throttle::new(None);
        assert!(free.wait(u64::MAX, &sender), "no limit");
    }
}
