//! Bytes of requests and replies held in memory: bounded for a connection and for the process.
//!
//! A request takes its bytes before they are read or allocated and gives them back when its
//! reply has gone out. Who finds none waits and reads no further, which the client feels as a
//! full socket. Nobody waits while holding what others wait for, except for its client to take
//! replies, and that ends with the stall deadline.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::NBD_BYTES_IN_FLIGHT_MAX;
use crate::units::convert::{to_u64, to_usize};

/// A number of bytes that can be taken and given back.
#[derive(Debug, Clone)]
pub struct Pot {
    free: Arc<Semaphore>,
    size: u64,
}

impl Pot {
    /// A pot of `size` bytes.
    pub fn new(size: u64) -> Self {
        let size = size.min(to_u64(Semaphore::MAX_PERMITS)).max(1);
        Self { free: Arc::new(Semaphore::new(to_usize(size))), size }
    }

    /// Bytes taken at the moment.
    pub fn taken(&self) -> u64 {
        self.size.saturating_sub(to_u64(self.free.available_permits()))
    }

    /// Waits for its turn. A request over the whole size takes all there is.
    async fn take(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes.min(self.size)).unwrap_or(u32::MAX);
        // Only a closed semaphore refuses, and nobody closes this one.
        Arc::clone(&self.free).acquire_many_owned(bytes).await.ok()
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
        Self { connection: Pot::new(NBD_BYTES_IN_FLIGHT_MAX), process: process.clone() }
    }

    /// Waits until `bytes` are free in both.
    pub async fn take(&self, bytes: u64) -> Held {
        if bytes == 0 {
            return Held::default();
        }
        let connection = self.connection.take(bytes).await;
        Held { _connection: connection, _process: self.process.take(bytes).await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn what_is_taken_is_missing_until_it_is_dropped() {
        let process = Pot::new(100);
        let (one, two) = (Budget::new(&process), Budget::new(&process));
        let held = one.take(80).await;
        assert_eq!(process.taken(), 80);
        assert!(timeout(Duration::from_millis(20), two.take(30)).await.is_err());
        drop(held);
        let all = two.take(5000).await;
        assert_eq!(process.taken(), 100, "more than there is takes all there is");
        drop(all);
        assert_eq!(process.taken(), 0);
    }
}
