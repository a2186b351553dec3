//! Why a source log refused, and the latch that keeps the first reason.
//!
//! Used by every file of this module and shown to the administrator: each message names the file
//! or the source, what was wanted and what was met. All errors can be cloned, because one latched
//! reason is told to everybody who asks afterwards.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::units::ids::SourceId;
use crate::units::numbers::{CpNumber, TransferId};

/// Why something could not be done with a source log.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// The kernel refused. For writes and syncs the source is faulted from here on.
    #[error("{file}: {operation}: {error}")]
    Io { file: Arc<str>, operation: &'static str, error: Arc<io::Error> },
    /// The file does not hold what was written to it; `offset` counts from the file's first byte.
    #[error("{file}: damaged at offset {offset}: {what}")]
    Corrupt { file: Arc<str>, offset: u64, what: Arc<str> },
    /// A sound file that is not ours: of another hub, source or CP.
    #[error("{file}: {what}; move the file away or give the hub its own log directory")]
    Foreign { file: Arc<str>, what: Arc<str> },
    /// Written by a later program; nothing of it was touched.
    #[error("{file}: {what}; start the version of mirrorhub that has written it")]
    Version { file: Arc<str>, what: Arc<str> },
    /// A transfer whose predecessor is not the log's last is never appended (R7).
    #[error("source {source_id}: transfer {id} follows {previous}, the log ends with {last}")]
    Gap { source_id: SourceId, id: TransferId, previous: TransferId, last: TransferId },
    /// A transfer that contradicts what the log holds: another history under the same ids.
    #[error("source {source_id}: transfer {id} does not join the log: {what}")]
    Conflict { source_id: SourceId, id: TransferId, what: Arc<str> },
    /// The source's logs have no room; nothing was written and nothing is faulted.
    #[error("source {source_id}: log has room for {room_bytes} bytes, {wanted_bytes} are wanted")]
    Full { source_id: SourceId, wanted_bytes: u64, room_bytes: u64 },
    /// An earlier error latched this source's logs.
    #[error("source {source_id} is faulted: {reason}")]
    Faulted { source_id: SourceId, reason: Arc<str> },
    /// Nobody asked yet what the log directory holds of this source.
    #[error("source {source_id}: logs were not recovered yet")]
    NotRecovered { source_id: SourceId },
    /// There is no log of that CP, or it was dropped.
    #[error("source {source_id}: no log of CP {cp}")]
    NoLog { source_id: SourceId, cp: CpNumber },
    /// A reference to a transfer or block that this log does not hold.
    #[error("{file}: no block {ordinal} of transfer {id}")]
    NoBlock { file: Arc<str>, id: TransferId, ordinal: u64 },
    /// A place to cut at that the logs do not know.
    #[error("source {source_id}: transfer {id} is no place in the log: {what}")]
    NoPlace { source_id: SourceId, id: TransferId, what: Arc<str> },
    /// An option out of its bounds.
    #[error("source log option {option} is {value}, {wanted}")]
    Option { option: &'static str, value: u64, wanted: &'static str },
    /// No random id for a new file.
    #[error("{0}")]
    Random(Arc<str>),
}

/// Wraps an error of the kernel.
pub(super) fn io_error(
    file: &Arc<str>,
    operation: &'static str,
) -> impl FnOnce(io::Error) -> LogError {
    let file = Arc::clone(file);
    move |error| LogError::Io { file, operation, error: Arc::new(error) }
}

/// What latched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// A write or sync failed: what lies behind the synced place cannot be trusted.
    Io,
    /// The synced part of a file is damaged: nothing is appended behind the hole.
    Damage,
}

/// The first reason why a source's logs take no more writes.
#[derive(Debug)]
pub(super) struct FaultLatch {
    source: SourceId,
    first: Mutex<Option<(FaultKind, Arc<str>)>>,
}

impl FaultLatch {
    pub(super) fn new(source: SourceId) -> Self {
        Self { source, first: Mutex::new(None) }
    }

    /// Keeps `reason` unless an earlier one stands.
    pub(super) fn set(&self, kind: FaultKind, reason: &LogError) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            tracing::error!(source = %self.source, %reason, "source log is faulted");
            *first = Some((kind, reason.to_string().into()));
        }
    }

    pub(super) fn get(&self) -> Option<(FaultKind, Arc<str>)> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn clear(&self) {
        *self.first.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn check(&self) -> Result<(), LogError> {
        match self.get() {
            Some((_, reason)) => Err(LogError::Faulted { source_id: self.source, reason }),
            None => Ok(()),
        }
    }

    /// Refuses after a failed write or sync; damage does not count here.
    pub(super) fn check_io(&self) -> Result<(), LogError> {
        match self.get() {
            Some((FaultKind::Io, _)) => self.check(),
            Some((FaultKind::Damage, _)) | None => Ok(()),
        }
    }

    /// Latches the error of a write or sync and passes it on.
    pub(super) fn latching<T>(&self, result: Result<T, LogError>) -> Result<T, LogError> {
        if let Err(error) = &result {
            self.set(FaultKind::Io, error);
        }
        result
    }
}
