//! Bytes of requests and replies held in memory: bounded for a connection and for the process.
//!
//! A request takes its bytes before they are read or allocated and gives them back when its
//! reply has gone out. Who finds none waits and reads no further, which the client feels as a
//! full socket. Nobody waits while holding what others wait for, except for its client to send a
//! payload or to take replies, and that ends with the stall deadline, which trickling does not
//! renew.
//!
//! Small and large requests have a part of their own, and one connection has a fraction of each:
//! a few clients that hold large payloads back cannot keep others from their small requests.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::{
    NBD_BYTES_IN_FLIGHT_MAX, NBD_RATE_BYTES_MIN, NBD_SMALL_BYTES_IN_FLIGHT_MAX,
    NBD_SMALL_REQUEST_BYTES_MAX, NBD_SMALL_SHARE,
};
use crate::units::convert::{to_u64, to_usize};

/// Time within which a client that is not too slow has moved so many bytes.
pub(super) fn time_for(bytes: u64) -> Duration {
    Duration::from_millis(bytes.saturating_mul(1000) / NBD_RATE_BYTES_MIN)
}

/// A number of bytes that can be taken and given back.
#[derive(Debug, Clone)]
struct Part {
    free: Arc<Semaphore>,
    size: u64,
}

impl Part {
    fn new(size: u64) -> Self {
        let size = size.min(to_u64(Semaphore::MAX_PERMITS)).max(1);
        Self { free: Arc::new(Semaphore::new(to_usize(size))), size }
    }

    fn taken(&self) -> u64 {
        self.size.saturating_sub(to_u64(self.free.available_permits()))
    }

    /// Waits for its turn. A request over the whole size takes all there is.
    async fn take(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes.min(self.size)).unwrap_or(u32::MAX);
        // Only a closed semaphore refuses, and nobody closes this one.
        Arc::clone(&self.free).acquire_many_owned(bytes).await.ok()
    }
}

/// Bytes for small requests, and for large ones.
#[derive(Debug, Clone)]
pub struct Pot {
    small: Part,
    large: Part,
}

impl Pot {
    /// A pot of `size` bytes, a part of them for small requests only.
    pub fn new(size: u64) -> Self {
        let small = size / NBD_SMALL_SHARE;
        Self { small: Part::new(small), large: Part::new(size - small) }
    }

    /// Bytes taken at the moment.
    pub fn taken(&self) -> u64 {
        self.small.taken() + self.large.taken()
    }

    fn part(&self, bytes: u64) -> &Part {
        if bytes <= NBD_SMALL_REQUEST_BYTES_MAX { &self.small } else { &self.large }
    }
}

/// What one connection draws from.
#[derive(Debug)]
pub struct Budget {
    connection: Pot,
    process: Pot,
}

/// Bytes in use; given back when dropped.
#[derive(Debug, Default)]
pub struct Held {
    _connection: Option<OwnedSemaphorePermit>,
    _process: Option<OwnedSemaphorePermit>,
}

impl Budget {
    /// A connection's budget, beside the one of the process.
    pub fn new(process: &Pot) -> Self {
        let small = Part::new(NBD_SMALL_BYTES_IN_FLIGHT_MAX);
        let large = Part::new(NBD_BYTES_IN_FLIGHT_MAX);
        Self { connection: Pot { small, large }, process: process.clone() }
    }

    /// Waits until `bytes` are free in both.
    pub async fn take(&self, bytes: u64) -> Held {
        if bytes == 0 {
            return Held::default();
        }
        let connection = self.connection.part(bytes).take(bytes).await;
        Held { _connection: connection, _process: self.process.part(bytes).take(bytes).await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    const MIB: u64 = 1 << 20;

    #[tokio::test]
    async fn what_is_taken_is_missing_until_it_is_dropped() {
        let process = Pot::new(40 * MIB);
        let (one, two) = (Budget::new(&process), Budget::new(&process));
        let held = one.take(20 * MIB).await;
        assert_eq!(process.taken(), 20 * MIB);
        assert!(timeout(Duration::from_millis(20), two.take(11 * MIB)).await.is_err());
        drop(held);
        let all = two.take(5000 * MIB).await;
        assert_eq!(process.taken(), 30 * MIB, "more than there is takes all there is");
        drop(all);
        assert_eq!(process.taken(), 0);
    }

    /// Whatever large requests hold, small ones have their part, and the other way round.
    #[tokio::test]
    async fn small_and_large_requests_do_not_take_from_each_other() {
        let process = Pot::new(8 * MIB);
        let (one, two) = (Budget::new(&process), Budget::new(&process));
        let _large = one.take(6 * MIB).await;
        let mut small = Vec::new();
        for _ in 0..8 {
            let taken = timeout(Duration::from_secs(20), two.take(NBD_SMALL_REQUEST_BYTES_MAX));
            small.push(taken.await.expect("the part of the small ones is free"));
        }
        assert_eq!(process.taken(), 8 * MIB);
        assert!(timeout(Duration::from_millis(20), one.take(4096)).await.is_err(), "all is taken");
    }
}
