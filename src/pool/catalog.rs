//! The catalog as callers see it: rows that are durable, and changes that are durable on return.
//!
//! Called by filer and hub. Questions are answered from memory, but for history; changes take
//! part in the pool's group commit.

use crate::units::ids::SourceId;
use crate::units::names::SourceName;
use crate::units::numbers::{BlockCount, ByteCount, CpNumber};

use super::Pool;
use super::error::PoolError;
use super::pointer::VolumeKey;
use super::publish::Change;
use super::rows::{HistoryRow, SourceRow, VolumeRow};

/// The catalog of an open pool.
#[derive(Debug, Clone, Copy)]
pub struct Catalog<'a> {
    pool: &'a Pool,
}

impl Pool {
    /// Its catalog.
    pub fn catalog(&self) -> Catalog<'_> {
        Catalog { pool: self }
    }
}

impl Catalog<'_> {
    pub(super) fn pool(&self) -> &Pool {
        self.pool
    }

    /// All sources, by id.
    pub fn sources(&self) -> Result<Vec<SourceRow>, PoolError> {
        Ok(self.pool.lock()?.mirror.sources().cloned().collect())
    }

    /// One source.
    pub fn source(&self, id: SourceId) -> Result<Option<SourceRow>, PoolError> {
        Ok(self.pool.lock()?.mirror.source(id).cloned())
    }

    /// Blocks that the image of a source has with its CPs that are kept; none if an older version has
    /// published some of them, uncounted.
    pub fn used(&self, source: SourceId) -> Result<Option<BlockCount>, PoolError> {
        Ok(self.pool.lock()?.mirror.used(source).map(BlockCount))
    }

    /// The source of that name.
    pub fn source_named(&self, name: &SourceName) -> Result<Option<SourceRow>, PoolError> {
        Ok(self.pool.lock()?.mirror.source_named(name).cloned())
    }

    /// The volumes of a source, by number.
    pub fn volumes(&self, source: SourceId) -> Result<Vec<VolumeRow>, PoolError> {
        Ok(self.pool.lock()?.mirror.volumes(source).cloned().collect())
    }

    /// One volume.
    pub fn volume(&self, key: VolumeKey) -> Result<Option<VolumeRow>, PoolError> {
        Ok(self.pool.lock()?.mirror.volume(key).cloned())
    }

    /// One published CP of a source, if it is still kept.
    pub fn history(&self, source: SourceId, cp: CpNumber) -> Result<Option<HistoryRow>, PoolError> {
        self.pool.store().history(source, cp).map_err(|error| self.pool.latch(error))
    }

    /// The newest published CPs of a source, newest first, at most so many.
    pub fn newest_history(
        &self,
        source: SourceId,
        at_most: usize,
    ) -> Result<Vec<HistoryRow>, PoolError> {
        let newest = self.pool.store().newest_history(source, at_most);
        newest.map_err(|error| self.pool.latch(error))
    }

    /// Adds a source or replaces its row. Refused if applied CP, sequence or stream hash are not
    /// as they are, or if epoch, generation or highest CP would fall.
    pub fn put_source(&self, row: SourceRow) -> Result<(), PoolError> {
        self.change(Change::PutSource(Box::new(row)))
    }

    /// Changes a source's row as it is at the moment of the commit, under the same rules.
    pub fn update_source(
        &self,
        id: SourceId,
        change: impl FnOnce(&mut SourceRow) + Send + 'static,
    ) -> Result<(), PoolError> {
        self.change(Change::UpdateSource(id, Box::new(change)))
    }

    /// Removes a source without volumes, and its history.
    pub fn remove_source(&self, id: SourceId) -> Result<(), PoolError> {
        self.change(Change::RemoveSource(id))
    }

    /// Removes a source and puts it again, by one commit.
    #[cfg(test)]
    pub(crate) fn replace_source(&self, row: SourceRow) -> Result<(), PoolError> {
        let changes = vec![Change::RemoveSource(row.id), Change::PutSource(Box::new(row))];
        self.pool.commit(changes)?.into_iter().try_for_each(|outcome| outcome.map(|_| ()))
    }

    /// Adds an empty volume, or renames one.
    pub fn put_volume(&self, row: VolumeRow) -> Result<(), PoolError> {
        self.change(Change::PutVolume(Box::new(row)))
    }

    /// The next trees of a volume may have that size. Nothing is done if it has announced as much
    /// already; no volume becomes smaller.
    pub fn grow_volume(&self, key: VolumeKey, size: ByteCount) -> Result<(), PoolError> {
        self.change(Change::GrowVolume(key, size))
    }

    /// Removes a volume whose published tree is empty: a CP that trims it comes first.
    pub fn remove_volume(&self, key: VolumeKey) -> Result<(), PoolError> {
        self.change(Change::RemoveVolume(key))
    }

    /// What a part above the pool remembers under that name.
    pub fn note(&self, name: &str) -> Result<Option<Vec<u8>>, PoolError> {
        Ok(self.pool.lock()?.mirror.note(name).cloned())
    }

    /// Remembers something under a name of the program's own, in the place of what was there; at
    /// most `NOTE_BYTES_MAX`.
    pub fn put_note(&self, name: &'static str, bytes: Vec<u8>) -> Result<(), PoolError> {
        self.change(Change::PutNote(name.to_owned(), bytes))
    }

    pub(super) fn change(&self, change: Change) -> Result<(), PoolError> {
        self.pool.check_latch()?;
        self.pool.committer().submit(self.pool, change).map(|_| ())
    }
}
