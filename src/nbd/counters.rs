//! What the server counts. Read by `observe` through the owner of the server, written here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::protocol::request::Operation;
use crate::metric::catalogue::CLIENT_WRITE_SECONDS;

/// Counters of one kind of request.
#[derive(Debug, Default)]
pub struct OperationCounters {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

/// The same at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OperationTotals {
    /// Requests answered.
    pub requests: u64,
    /// Those of them that were answered with an error.
    pub errors: u64,
    /// Bytes that requests answered without error covered.
    pub bytes: u64,
    /// Time from a request read whole to its reply ready, summed.
    pub busy: Duration,
}

/// All counters of a server; shared by its connections.
#[derive(Debug)]
pub struct Counters {
    connections_open: AtomicU64,
    connections_total: AtomicU64,
    connections_refused: AtomicU64,
    turned_away: AtomicU64,
    protocol_errors: AtomicU64,
    panics: AtomicU64,
    operations: [OperationCounters; Operation::ALL.len()],
    /// A handle, so that recording takes no lock.
    write_seconds: metrics::Histogram,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            connections_open: AtomicU64::default(),
            connections_total: AtomicU64::default(),
            connections_refused: AtomicU64::default(),
            turned_away: AtomicU64::default(),
            protocol_errors: AtomicU64::default(),
            panics: AtomicU64::default(),
            operations: Default::default(),
            write_seconds: metrics::histogram!(CLIENT_WRITE_SECONDS.name),
        }
    }
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Counters {
    /// Connections at the moment, those in the handshake among them.
    pub fn connections_open(&self) -> u64 {
        get(&self.connections_open)
    }

    /// Connections ever taken.
    pub fn connections_total(&self) -> u64 {
        get(&self.connections_total)
    }

    /// Connections closed because there were too many: as they came, or to make room for a newer one.
    pub fn connections_refused(&self) -> u64 {
        get(&self.connections_refused)
    }

    /// Connections closed at once because of where they came from.
    pub fn connections_turned_away(&self) -> u64 {
        get(&self.turned_away)
    }

    /// Connections that ended because the client broke the protocol.
    pub fn protocol_errors(&self) -> u64 {
        get(&self.protocol_errors)
    }

    /// Connections that ended because an export panicked.
    pub fn panics(&self) -> u64 {
        get(&self.panics)
    }

    /// Totals of one kind of request.
    pub fn operation(&self, operation: Operation) -> OperationTotals {
        let counters = self.of(operation);
        OperationTotals {
            requests: get(&counters.requests),
            errors: get(&counters.errors),
            bytes: get(&counters.bytes),
            busy: Duration::from_nanos(get(&counters.nanoseconds)),
        }
    }

    fn of(&self, operation: Operation) -> &OperationCounters {
        let [read, write, flush, trim, cache, write_zeroes, block_status, unknown] =
            &self.operations;
        match operation {
            Operation::Read => read,
            Operation::Write => write,
            Operation::Flush => flush,
            Operation::Trim => trim,
            Operation::Cache => cache,
            Operation::WriteZeroes => write_zeroes,
            Operation::BlockStatus => block_status,
            Operation::Unknown => unknown,
        }
    }

    pub(super) fn refused(&self) {
        add(&self.connections_refused, 1);
    }

    pub(super) fn turned_away(&self) {
        add(&self.turned_away, 1);
    }

    pub(super) fn protocol_error(&self) {
        add(&self.protocol_errors, 1);
    }

    pub(super) fn panicked(&self) {
        add(&self.panics, 1);
    }

    pub(super) fn opened(&self) {
        add(&self.connections_open, 1);
        add(&self.connections_total, 1);
    }

    pub(super) fn closed(&self) {
        self.connections_open.fetch_sub(1, Ordering::Relaxed);
    }

    /// A request was answered, `bytes` with success or `None` with an error.
    pub(super) fn answered(&self, operation: Operation, bytes: Option<u64>, busy: Duration) {
        if operation == Operation::Write && bytes.is_some() {
            self.write_seconds.record(busy);
        }
        let counters = self.of(operation);
        add(&counters.requests, 1);
        match bytes {
            Some(bytes) => add(&counters.bytes, bytes),
            None => add(&counters.errors, 1),
        }
        add(&counters.nanoseconds, u64::try_from(busy.as_nanos()).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_has_counters_of_its_own() {
        let counters = Counters::default();
        for (n, operation) in Operation::ALL.into_iter().enumerate() {
            for _ in 0..=n {
                counters.answered(operation, Some(2), Duration::from_nanos(3));
            }
            counters.answered(operation, None, Duration::ZERO);
        }
        for (n, operation) in (1..).zip(Operation::ALL) {
            let busy = Duration::from_nanos(3 * n);
            let expected = OperationTotals { requests: n + 1, errors: 1, bytes: 2 * n, busy };
            assert_eq!(counters.operation(operation), expected, "{}", operation.name());
        }
    }
}
