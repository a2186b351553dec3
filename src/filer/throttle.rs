//! Holds what brings an image up to so many bytes a second (`resync_limit`).
//!
//! Used by the threads of `pass` and `served`.

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::units::machine;
use crate::units::numbers::ByteCount;
use crate::units::rate::Rate;

/// The throttle of one pass.
#[derive(Debug)]
pub struct Throttle {
    rate: Rate,
    runtime: Handle,
}

impl Throttle {
    /// None is no limit. Called from within the runtime.
    pub fn new(limit: Option<ByteCount>) -> Self {
        Self { rate: Rate::new(limit), runtime: Handle::current() }
    }

    /// Waits until so many bytes may go; false if nobody listens any more. Blocks.
    pub fn wait<T>(&mut self, bytes: u64, listener: &mpsc::Sender<T>) -> bool {
        let left = self.rate.left();
        self.rate.take(bytes);
        if left.is_zero() {
            return true;
        }
        // Sooner only if nobody listens any more.
        let closed = async { tokio::time::timeout(left, listener.closed()).await };
        machine::block_on(&self.runtime, closed).is_err()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// 64 KiB at 256 KiB a second are a quarter of a second each.
    #[test]
    fn no_second_has_more_bytes_than_the_limit() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_time().build().unwrap();
        let _inside = runtime.enter();
        let (sender, receiver) = mpsc::channel::<()>(1);
        let mut throttle = Throttle::new(Some(ByteCount(256 << 10)));
        assert!(throttle.wait(0, &sender));
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
