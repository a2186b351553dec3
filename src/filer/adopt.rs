//! The rows of a source that comes to live on this filer: made before it follows, taken away again
//! if it did not come to that.
//!
//! Called by [`super::homes`], by [`super::newcomer`] and by `recover`. A source that lives here by
//! its hub's wish is fenced from its first row on: it serves nobody before `TakeOver`. Its row says
//! that its NVRAM was made when everything is there that it needs; one that does not say so, and
//! has nothing published, is of an adoption that was cut, and goes at the next start.

use std::sync::Arc;

use super::keeper::{FilerKeeper, Keeper, KeeperError, Kept};
use crate::limits::VOLUMES_PER_SOURCE_MAX;
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::units::ids::SourceId;
use crate::units::numbers::CpNumber;
use crate::volume::error::VolumeError;
use crate::volume::geometry::Geometry;
use crate::wire::homes::Adopt;

/// Why a source cannot live here.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A volume's size.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A row.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// What the hub asks for makes no sense.
    #[error("the hub's question cannot be understood: {0}")]
    Malformed(&'static str),
    /// The pool is too small.
    #[error("the pool has room for {free} blocks, the image takes {wanted}")]
    NoRoom { wanted: u64, free: u64 },
}

/// Whether the pool has room for the image, beside its reserve and what is promised already.
pub(super) fn look_for_room(pool: &Pool, adopt: &Adopt) -> Result<(), AdoptError> {
    let space = pool.space()?;
    let kept = space.reserve.0 + space.held.0;
    let (wanted, free) = (adopt.used.0, space.free.0.saturating_sub(kept));
    if wanted > free { Err(AdoptError::NoRoom { wanted, free }) } else { Ok(()) }
}

/// Judges what the hub asks for; its numbers are not believed before.
pub(super) fn check(adopt: &Adopt) -> Result<(), AdoptError> {
    let volumes = &adopt.volumes;
    if volumes.is_empty() || volumes.len() > VOLUMES_PER_SOURCE_MAX {
        return Err(AdoptError::Malformed("it has no volumes, or too many"));
    }
    if adopt.epoch.number == 0 {
        return Err(AdoptError::Malformed("it is of no epoch"));
    }
    for (at, volume) in volumes.iter().enumerate() {
        Geometry::of(volume.size)?;
        let twice = volumes[..at].iter().any(|other| {
            other.number == volume.number || other.id == volume.id || other.name == volume.name
        });
        if twice {
            return Err(AdoptError::Malformed("it names a volume twice"));
        }
    }
    Ok(())
}

/// Makes the rows, each durable: a source that is fenced and has no NVRAM yet.
pub(super) fn make_rows(pool: &Pool, adopt: &Adopt, kept: Kept) -> Result<(), AdoptError> {
    let catalog = pool.catalog();
    let mut row = SourceRow::new(adopt.source, adopt.name.clone());
    let (hub, fenced) = (Some(adopt.hub), Some(adopt.epoch));
    row.extension = FilerKeeper.write(&row, &Kept { hub, fenced, nvram_made: false, ..kept })?;
    catalog.put_source(row)?;
    for volume in &adopt.volumes {
        catalog.put_volume(VolumeRow {
            key: VolumeKey { source: adopt.source, volume: volume.number },
            id: volume.id,
            name: volume.name.clone(),
            tree: TreeRoot::empty(volume.size),
            grows_to: None,
        })?;
    }
    Ok(())
}

/// Its NVRAM was made: from here on it is a source that lives here.
pub(super) fn nvram_is_made(pool: &Pool, source: SourceId) -> Result<(), AdoptError> {
    let catalog = pool.catalog();
    let row = catalog.source(source)?.ok_or(PoolError::UnknownSource { source_id: source })?;
    let kept = Kept { nvram_made: true, ..FilerKeeper.read(&row)? };
    let extension = FilerKeeper.write(&row, &kept)?;
    Ok(catalog.update_source(source, move |row| row.extension = extension)?)
}

/// Whether the row is of a source that lives here by its hub's wish, with all that it needs.
pub(super) fn lives_here(row: &SourceRow) -> bool {
    FilerKeeper.read(row).is_ok_and(|kept| kept.nvram_made && kept.hub.is_some())
}

/// Takes rows away that hold nothing.
pub(super) fn remove_rows(pool: &Pool, source: SourceId) -> Result<(), PoolError> {
    let catalog = pool.catalog();
    for volume in catalog.volumes(source)? {
        catalog.remove_volume(volume.key)?;
    }
    catalog.remove_source(source)
}

/// At a start: adoptions that were cut short had promised nothing.
pub(super) fn undo_unfinished(pool: &Arc<Pool>) -> Result<(), AdoptError> {
    let catalog = pool.catalog();
    for row in catalog.sources()? {
        let kept = FilerKeeper.read(&row)?;
        let guest = row.id != SourceId(pool.owner()) && kept.fenced.is_some();
        let volumes = catalog.volumes(row.id)?;
        let nothing = row.applied == CpNumber(0) && volumes.iter().all(|v| v.tree.top.is_hole());
        if guest && nothing && !kept.nvram_made {
            tracing::warn!(source = %row.name, "it was to live here, and never did");
            remove_rows(pool, row.id)?;
        }
    }
    Ok(())
}
