//! Kept CPs of a hub: keeps, lists and drops them for the admin socket.
//!
//! Everything that may block (commits, the walk of a drop) runs on a thread for blocking work. A
//! source that was never heard has no kept CPs. Errors are the pool's, by name.

use std::sync::Arc;

use super::Hub;
use super::shared::Shared;
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::kept::{Dropped, Kept};
use crate::pool::kept_row::KeptRow;
use crate::units::ids::SourceId;
use crate::units::names::{KeptName, SourceName};
use crate::volume::error::VolumeError;
use crate::volume::kept::drop_kept;

/// Why a kept CP cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The source has not connected yet.
    #[error("source {0} was never heard of here")]
    NeverHeard(SourceName),
    /// The pool refuses, or a tree is damaged.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The thread that did it panicked.
    #[error("the work ended in a fault of the program: {0}")]
    Fault(#[from] tokio::task::JoinError),
}

impl From<PoolError> for KeptError {
    fn from(error: PoolError) -> Self {
        Self::Volume(error.into())
    }
}

fn source_id(shared: &Shared, source: &SourceName) -> Result<SourceId, KeptError> {
    let lane = shared.lanes.get(source);
    lane.map(|lane| lane.source()).ok_or_else(|| KeptError::NeverHeard(source.clone()))
}

impl Hub {
    /// The CPs that a source keeps, oldest first; none of one that was never heard.
    pub fn kept(&self, source: &SourceName) -> Result<Vec<Kept>, KeptError> {
        match source_id(self.shared(), source) {
            Ok(id) => Ok(self.shared().pool.catalog().kept(id)?),
            Err(KeptError::NeverHeard(_)) => Ok(Vec::new()),
            Err(other) => Err(other),
        }
    }

    /// Keeps the CP that is published now.
    pub async fn keep(
        &self,
        source: &SourceName,
        name: KeptName,
    ) -> Result<Arc<KeptRow>, KeptError> {
        let row = self.with_pool(source, move |pool, id| Ok(pool.keep(id, name)?)).await?;
        tracing::info!(%source, name = %row.name, cp = row.cp.0, "CP is kept");
        Ok(row)
    }

    /// Drops a kept CP; its blocks are free when this returns.
    pub async fn drop_kept(
        &self,
        source: &SourceName,
        name: KeptName,
    ) -> Result<Dropped, KeptError> {
        let shown = name.clone();
        let dropped = self.with_pool(source, move |pool, id| drop_kept(pool, id, &name)).await?;
        let (cp, blocks) = (dropped.cp.0, dropped.blocks.0);
        tracing::info!(%source, name = %shown, cp, blocks, "kept CP was dropped");
        Ok(dropped)
    }

    async fn with_pool<T: Send + 'static>(
        &self,
        source: &SourceName,
        work: impl FnOnce(&Arc<Pool>, SourceId) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, KeptError> {
        let id = source_id(self.shared(), source)?;
        let pool = self.shared().pool.clone();
        Ok(tokio::task::spawn_blocking(move || work(&pool, id)).await??)
    }
}
