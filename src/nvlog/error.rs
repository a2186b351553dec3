//! Why a ring was not made, not opened, or a record not read.

use std::sync::Arc;

use super::format::HeaderError;
use crate::device::DeviceError;
use crate::record::envelope::EnvelopeError;
use crate::units::ids::RandomError;
use crate::units::numbers::LogPosition;

/// A refusal or a failure of a ring. Each names the device.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Whoever was told of damage could not keep it.
    #[error("{device}: damage was found and cannot be noted: {reason}")]
    Untold { device: Arc<str>, reason: String },
    /// No id for a new ring.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// No thread for the ring.
    #[error("{device}: cannot start the committing thread: {error}")]
    Thread { device: Arc<str>, error: std::io::Error },
    /// Below the bound for a new ring, or smaller than the ring on it says.
    #[error("{device}: has {size} bytes, the ring needs {wanted}")]
    TooSmall { device: Arc<str>, size: u64, wanted: u64 },
    /// A shape that cannot work.
    #[error("{device}: a ring of {area_bytes} bytes cannot take commits of {commit_bytes}")]
    Shape { device: Arc<str>, area_bytes: u64, commit_bytes: u64 },
    /// `create` found a ring.
    #[error("{device}: is a ring already")]
    AlreadyRing { device: Arc<str> },
    /// `create` found something else.
    #[error("{device}: is not empty: its first MiB must be zero to become a ring")]
    NotEmpty { device: Arc<str> },
    /// `open` found zeros: `create` never ran, or was cut short before its first write.
    #[error("{device}: was never made a ring")]
    Blank { device: Arc<str> },
    /// `open` found no good header.
    #[error("{device}: no good header: first slot: {first}, second slot: {second}")]
    Headers { device: Arc<str>, first: HeaderError, second: HeaderError },
    /// The slots are of two rings: a copy was laid over another.
    #[error("{device}: its two headers are of different rings")]
    Mixed { device: Arc<str> },
    /// Written by a later program.
    #[error("{device}: ring format version {version}, this program reads versions 1 and 2")]
    Version { device: Arc<str>, version: u16 },
    /// A record of a later program.
    #[error("{device}: record at {position} has version {version}, this program reads version 1")]
    RecordVersion { device: Arc<str>, position: LogPosition, version: u16 },
    /// A file of another hub or source.
    #[error("{device}: belongs to {met}, not to {wanted}")]
    Owner { device: Arc<str>, wanted: String, met: String },
    /// Not between released and durable.
    #[error("{device}: position {position} is not between {released} and {durable}")]
    OutOfRange {
        device: Arc<str>,
        position: LogPosition,
        released: LogPosition,
        durable: LogPosition,
    },
    /// Damaged, or no record begins there.
    #[error("{device}: record at {position}: {error}")]
    Record { device: Arc<str>, position: LogPosition, error: EnvelopeError },
}
