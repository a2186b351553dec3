//! What lies beneath the buffers of an engine while its history is not yet in a tree.
//!
//! An engine that takes over from another begins behind a log that nobody has applied (a failover:
//! the log of a fenced source). Whoever starts it hands it a [`Ground`]: where that log ends, the
//! CP that will hold it, and a way to read through it. Reads go through buffers, then through
//! [`Beneath`], then to the published tree. No CP of the engine begins before the ground's own one
//! is published by whoever applies the log; then the ground goes, in one step with the pins
//! (`Shared::settle`).
//!
//! Invariant: the ground over the published tree is what the CP of the ground will show, so it
//! makes no difference to a reader which of the two he is given.

use std::fmt;
use std::sync::Arc;

use super::buffers::Piece;
use crate::record::marks::Place;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::volume::error::VolumeError;

/// Why a part of the ground cannot be read: damage, or it was taken away meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BeneathError(pub Arc<str>);

/// A layer between the buffers and the published tree. Its calls may block.
pub trait Beneath: fmt::Debug + Send + Sync {
    /// What it says about `count` blocks of a volume from `vbn` on, in order, all of them; every
    /// byte has passed its checksum.
    fn pieces(
        &self,
        volume: VolumeNumber,
        vbn: u64,
        count: u64,
    ) -> Result<Vec<Piece>, BeneathError>;

    /// The same, where only the kind of each piece counts: nothing is read.
    fn shape(&self, volume: VolumeNumber, vbn: u64, count: u64) -> Vec<Piece>;
}

/// What an engine begins on, if that is not a published CP.
#[derive(Debug, Clone)]
pub struct Ground {
    /// Where the log beneath ends: the engine's own entries go on from here.
    pub place: Place,
    /// The CP that will hold it: above everything used before.
    pub cp: CpNumber,
    /// The log.
    pub beneath: Arc<dyn Beneath>,
}

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The tree or the pool.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The ground.
    #[error(transparent)]
    Beneath(#[from] BeneathError),
}
