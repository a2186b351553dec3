//! What can go wrong with a pool.
//!
//! Used by every file of the pool and by the volume tree above it. Refusals (full, stale, wrong
//! epoch) concern one caller; [`PoolError::latches`] says which errors make the whole pool refuse
//! writes from then on.

use std::sync::Arc;

use crate::device::DeviceError;
use crate::raid::assemble::AssembleError;
use crate::units::hash::ContentHash;
use crate::units::ids::{PoolId, SourceId};
use crate::units::names::KeptName;
use crate::units::numbers::{CpNumber, Epoch, Pbn, VolumeNumber};

use super::pointer::VolumeKey;

/// What can go wrong with a pool. Cloneable, so that a latch can repeat it to everybody.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PoolError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An earlier error latched the pool: it takes no writes until it is opened again.
    #[error("pool refuses writes since its first error: {first}")]
    Latched { first: Arc<PoolError> },
    /// A thread panicked while it held the pool's state.
    #[error("pool state is unknown: a thread panicked while it changed it")]
    Poisoned,
    /// The kernel gave no random bytes.
    #[error("no id for a new pool: {what}")]
    Random { what: String },

    /// Nothing there that looks like a pool.
    #[error("{device}: no pool label: wanted magic {wanted:02x?}, met {met:02x?}")]
    NotAPool { device: Arc<str>, wanted: [u8; 8], met: [u8; 8] },
    /// A new pool would overwrite another one.
    #[error("{device}: already carries a pool label")]
    AlreadyAPool { device: Arc<str> },
    /// A new pool would overwrite something else.
    #[error(
        "{device}: holds something already, and a new pool takes only what begins with 1 MiB of \
         zeros; name another one, or wipe it"
    )]
    NotBlank { device: Arc<str> },
    /// Written by another version of this program.
    #[error("{device}: pool label has format version {met}, this program knows {known}")]
    LabelVersion { device: Arc<str>, met: u32, known: u32 },
    /// Both copies of the label are damaged, or they contradict each other.
    #[error("{device}: pool label is damaged: {what}")]
    LabelCorrupt { device: Arc<str>, what: String },
    /// The pool belongs to another source or hub.
    #[error("{device}: pool {pool} belongs to {met}, wanted {wanted}")]
    WrongOwner { device: Arc<str>, pool: PoolId, wanted: String, met: String },
    /// Smaller than a pool can be.
    #[error("{device}: {met} bytes are too few for a pool, at least {wanted} are needed")]
    TooSmall { device: Arc<str>, wanted: u64, met: u64 },
    /// The arrays that were added behind a plain device, or some of them, are not there.
    #[error(
        "{device}: the pool has {wanted} bytes and {met} are there: devices were added behind this one; \
         name all of them in pool.devices"
    )]
    AddedMissing { device: Arc<str>, wanted: u64, met: u64 },
    /// Devices cannot be added.
    #[error(transparent)]
    Added(#[from] AssembleError),
    /// The device lost bytes since the pool was made.
    #[error("{device}: pool was made for {wanted} bytes, the device has {met}")]
    Shrunk { device: Arc<str>, wanted: u64, met: u64 },

    /// A block does not hold what its pointer says: checksum.
    #[error("block {pbn} is corrupt: wanted checksum {wanted:08x}, met {met:08x}")]
    Corrupt { pbn: Pbn, wanted: u32, met: u32 },
    /// A block does not hold what its pointer says: content hash.
    #[error("block {pbn} is corrupt: wanted content {wanted}, met {met}")]
    CorruptContent { pbn: Pbn, wanted: ContentHash, met: ContentHash },
    /// A pointer leads outside the pool's data.
    #[error("block {pbn} lies outside the pool's data")]
    OutOfPool { pbn: Pbn },

    /// The catalog's database failed.
    #[error("catalog: {operation}: {what}")]
    Catalog { operation: &'static str, what: String },
    /// A row of the catalog does not hold what was written.
    #[error("catalog: {table} row {key} is corrupt: {what}")]
    CatalogCorrupt { table: &'static str, key: String, what: String },
    /// Written by another version of this program.
    #[error("catalog: {what} has format version {met}, this program knows {known}")]
    CatalogVersion { what: String, met: u32, known: u32 },
    /// No room for more rows.
    #[error(
        "catalog is full: {rows_bytes} bytes of rows and {wanted_bytes} more, at most {max_bytes}"
    )]
    CatalogFull { rows_bytes: u64, wanted_bytes: u64, max_bytes: u64 },
    /// A field of a row is over its bound.
    #[error("{what}: {met}, at most {max}")]
    Limit { what: &'static str, met: u64, max: u64 },

    /// No room for more blocks. Room comes with the next CP that frees some.
    #[error("pool is full: {wanted} blocks wanted, {free} free, {reserve} of them kept in reserve")]
    Full { wanted: u64, free: u64, reserve: u64 },
    /// The source would have more blocks of the pool than it may.
    #[error(
        "the source may have {limit_bytes} bytes of the pool, and would have {wanted_bytes} with its CPs that are kept"
    )]
    OverLimit { wanted_bytes: u64, limit_bytes: u64 },
    /// No such source.
    #[error("source {source_id} is not in the catalog")]
    UnknownSource { source_id: SourceId },
    /// No such volume.
    #[error("volume {} of source {} is not in the catalog", key.volume, key.source)]
    UnknownVolume { key: VolumeKey },
    /// The commit names another epoch than the catalog (R2).
    #[error("commit names epoch {}/{:016x}, the catalog has {}/{:016x}",
        named.number, named.id, recorded.number, recorded.id)]
    Epoch { named: Epoch, recorded: Epoch },
    /// A CP is published once, and in order.
    #[error("CP {cp} is not above the applied CP {applied}")]
    CpNotNewer { cp: CpNumber, applied: CpNumber },
    /// The tree was built on something that is no longer the published one.
    #[error("volume {volume} changed since this CP was begun")]
    BaseMoved { volume: VolumeNumber },
    /// A row cannot be replaced by that.
    #[error("catalog refuses the row of {what}: {why}")]
    RowRefused { what: String, why: &'static str },
    /// The pin was ended because the pool needed its blocks.
    #[error("the pinned CP {cp} was given up: the pool needed its space")]
    PinEnded { cp: CpNumber },
    /// No such kept CP.
    #[error("source {source_id} keeps no CP named {name}")]
    UnknownKept { source_id: SourceId, name: KeptName },
    /// It cannot be dropped, or read, now.
    #[error("kept CP {name} is busy: {why}")]
    KeptBusy { name: KeptName, why: String },
    /// A pass that was begun must be published or given up first, and by whoever goes on with it.
    #[error("an unfinished work tree of source {source_id} is in the way")]
    WorkKept { source_id: SourceId },
    /// The caller broke an invariant; its CP is refused and nothing else happens.
    #[error("inconsistent: {what}")]
    Inconsistent { what: String },
}

impl PoolError {
    /// Whether this makes the pool refuse writes until it is opened again: a device or catalog
    /// that failed to write may have lost anything since its last flush.
    pub fn latches(&self) -> bool {
        match self {
            Self::Device(_) | Self::Catalog { .. } | Self::Poisoned => true,
            Self::Latched { .. }
            | Self::Random { .. }
            | Self::NotAPool { .. }
            | Self::AlreadyAPool { .. }
            | Self::NotBlank { .. }
            | Self::LabelVersion { .. }
            | Self::LabelCorrupt { .. }
            | Self::WrongOwner { .. }
            | Self::TooSmall { .. }
            | Self::AddedMissing { .. }
            | Self::Added(_)
            | Self::Shrunk { .. }
            | Self::Corrupt { .. }
            | Self::CorruptContent { .. }
            | Self::OutOfPool { .. }
            | Self::CatalogCorrupt { .. }
            | Self::CatalogVersion { .. }
            | Self::CatalogFull { .. }
            | Self::Limit { .. }
            | Self::Full { .. }
            | Self::OverLimit { .. }
            | Self::UnknownSource { .. }
            | Self::UnknownVolume { .. }
            | Self::Epoch { .. }
            | Self::CpNotNewer { .. }
            | Self::BaseMoved { .. }
            | Self::RowRefused { .. }
            | Self::PinEnded { .. }
            | Self::UnknownKept { .. }
            | Self::KeptBusy { .. }
            | Self::WorkKept { .. }
            | Self::Inconsistent { .. } => false,
        }
    }
}
