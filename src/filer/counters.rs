//! Counters of a source, for metrics and status: plain numbers that only rise.

use std::sync::atomic::{AtomicU64, Ordering};

use super::plan::Counts;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What was counted since the start.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: Counter,)* }

        /// The counters at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct CounterValues { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Reads all.
            pub fn values(&self) -> CounterValues {
                CounterValues { $($name: self.$name.get(),)* }
            }
        }
    };
}

/// A number that rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// It is at least this from now on.
    pub fn rise_to(&self, value: u64) {
        self.0.fetch_max(value, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    /// Read requests.
    reads,
    /// Bytes read.
    read_bytes,
    /// Write requests.
    writes,
    /// Bytes written.
    written_bytes,
    /// Trim requests.
    trims,
    /// Write-zeroes requests.
    zeroes,
    /// Flush requests.
    flushes,
    /// Requests answered with an error.
    errors,
    /// Transfers formed.
    transfers,
    /// Bytes of transfers formed.
    transfer_bytes,
    /// Transfers sent, repeats among them.
    transfers_sent,
    /// Bytes of transfers sent, repeats among them.
    transfer_bytes_sent,
    /// Transfers the hub gave back at a start (R1).
    transfers_adopted,
    /// Connections to the hub that were welcomed.
    connections,
    /// Connections that ended or were refused.
    disconnections,
    /// CPs frozen because a partition was full, or the pool.
    checkpoints_full,
    /// CPs frozen by the interval.
    checkpoints_interval,
    /// CPs frozen on command, here or at the hub.
    checkpoints_command,
    /// CPs published on the hub.
    checkpoints_done,
    /// When the last of them was published, in seconds since 1970.
    checkpoint_at,
    /// CPs the hub refused.
    checkpoints_rejected,
    /// CPs done alone during a pass that the hub has built from its log since.
    checkpoints_built_there,
    /// Blocks sent by reference.
    references,
    /// Blocks sent as data.
    inline_blocks,
    /// Blocks sent as holes.
    holes,
    /// Bytes of Updates payload that say references.
    reference_bytes,
    /// Bytes of Updates payload that carry data.
    inline_bytes,
    /// Bytes of Updates payload that say holes.
    hole_bytes,
    /// Milliseconds spent on own trees.
    tree_ms,
    /// Blocks of data written to own trees.
    tree_blocks,
}

impl Counters {
    /// Adds what sending a CP took.
    pub fn sent(&self, counts: Counts) {
        self.references.add(counts.references);
        self.inline_blocks.add(counts.inline);
        self.holes.add(counts.holes);
        self.reference_bytes.add(counts.reference_bytes);
        self.inline_bytes.add(counts.inline_bytes);
        self.hole_bytes.add(counts.hole_bytes);
    }
}
