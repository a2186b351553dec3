//! The catalog's rows in memory, and what one commit changes of them.
//!
//! Readers are answered from the [`Mirror`], which holds exactly what is durable: a commit's
//! [`Staged`] rows are merged when the transaction is. So a pool whose device fails goes on
//! answering, and nobody sees a root that a crash could take back (R9).
//!
//! Pure memory. Refusals name the row; nothing is staged by a refused change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::limits::{NOTE_BYTES_MAX, SOURCES_MAX, VOLUMES_PER_SOURCE_MAX};
use crate::units::convert::to_u64;
use crate::units::ids::SourceId;
use crate::units::names::{KeptName, SourceName};
use crate::units::numbers::{ByteCount, CpNumber, VolumeNumber};

use super::error::PoolError;
use super::kept_row::KeptRow;
use super::pointer::VolumeKey;
use super::rows::{HistoryRow, SourceRow, VolumeRow, check_extension, stored};
use super::work::WorkRow;

/// The durable rows.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    sources: BTreeMap<SourceId, SourceRow>,
    /// Ids of `sources` by name.
    names: BTreeMap<SourceName, SourceId>,
    volumes: BTreeMap<VolumeKey, VolumeRow>,
    history: BTreeMap<SourceId, u64>,
    kept: BTreeMap<SourceId, BTreeMap<KeptName, Arc<KeptRow>>>,
    kept_blocks: BTreeMap<(SourceId, CpNumber), u64>,
    works: BTreeMap<SourceId, Arc<WorkRow>>,
    notes: BTreeMap<String, Vec<u8>>,
    used: BTreeMap<SourceId, u64>,
    row_bytes: u64,
}

fn keys_of(source: SourceId) -> std::ops::RangeInclusive<VolumeKey> {
    let key = |volume| VolumeKey { source, volume: VolumeNumber(volume) };
    key(0)..=key(u32::MAX)
}

impl Mirror {
    pub(super) fn load_source(&mut self, row: SourceRow) {
        self.row_bytes += stored(&row.encode());
        self.names.insert(row.name.clone(), row.id);
        self.sources.insert(row.id, row);
    }

    pub(super) fn load_volume(&mut self, row: VolumeRow) {
        self.row_bytes += stored(&row.encode());
        self.volumes.insert(row.key, row);
    }

    pub(super) fn load_history(&mut self, source: SourceId) {
        *self.history.entry(source).or_default() += 1;
    }

    pub(super) fn load_kept(&mut self, row: KeptRow) {
        self.row_bytes += row.stored_bytes();
        self.kept.entry(row.source).or_default().insert(row.name.clone(), Arc::new(row));
    }

    pub(super) fn load_kept_blocks(&mut self, source: SourceId, cp: CpNumber, blocks: u64) {
        self.kept_blocks.insert((source, cp), blocks);
    }

    pub(super) fn load_work(&mut self, row: WorkRow) {
        self.row_bytes += stored(&row.encode());
        self.works.insert(row.source, Arc::new(row));
    }

    pub(super) fn load_note(&mut self, name: String, bytes: Vec<u8>) {
        self.notes.insert(name, bytes);
    }

    pub(super) fn load_used(&mut self, source: SourceId, blocks: u64) {
        self.used.insert(source, blocks);
    }

    /// Blocks that the roots of a source reach, published and kept; none if nobody has counted them: an
    /// older version has published it.
    pub(super) fn used(&self, source: SourceId) -> Option<u64> {
        let never = || self.source(source).is_none_or(|row| row.applied == CpNumber(0));
        self.used.get(&source).copied().or_else(|| never().then_some(0))
    }

    /// The same, and none of what is neither a source nor counted.
    pub(super) fn counted(&self, source: SourceId) -> Option<u64> {
        let is_known = self.sources.contains_key(&source) || self.used.contains_key(&source);
        self.used(source).filter(|_| is_known)
    }

    /// The same of each source of which it is known, those that are counted and are no source's
    /// among them.
    pub(super) fn all_used(&self) -> impl Iterator<Item = (SourceId, u64)> {
        let known = self.sources.keys().filter(|source| !self.used.contains_key(source));
        let never = known.filter_map(|source| Some((*source, self.used(*source)?)));
        never.chain(self.used.iter().map(|(source, blocks)| (*source, *blocks)))
    }

    /// What a part above remembers under that name.
    pub(super) fn note(&self, name: &str) -> Option<&Vec<u8>> {
        self.notes.get(name)
    }

    /// The work tree of a source.
    pub(super) fn work(&self, source: SourceId) -> Option<&Arc<WorkRow>> {
        self.works.get(&source)
    }

    /// All work trees.
    pub(super) fn all_works(&self) -> impl Iterator<Item = &Arc<WorkRow>> {
        self.works.values()
    }

    /// The blocks that only work trees have; `None` if that is no number.
    pub(super) fn all_work_blocks(&self) -> Option<u64> {
        self.works.values().try_fold(0u64, |sum, work| sum.checked_add(work.blocks))
    }

    /// The kept CPs of a source, by name.
    pub(super) fn kept(&self, source: SourceId) -> impl Iterator<Item = &Arc<KeptRow>> {
        self.kept.get(&source).into_iter().flat_map(BTreeMap::values)
    }

    /// All kept CPs.
    pub(super) fn all_kept(&self) -> impl Iterator<Item = &Arc<KeptRow>> {
        self.kept.values().flat_map(BTreeMap::values)
    }

    /// The length of a kept CP's deadlist.
    pub(super) fn kept_blocks(&self, source: SourceId, cp: CpNumber) -> u64 {
        self.kept_blocks.get(&(source, cp)).copied().unwrap_or(0)
    }

    /// The lengths of all deadlists together; `None` if that is no number.
    pub(super) fn all_kept_blocks(&self) -> Option<u64> {
        self.kept_blocks.values().try_fold(0u64, |sum, blocks| sum.checked_add(*blocks))
    }

    pub(super) fn source(&self, id: SourceId) -> Option<&SourceRow> {
        self.sources.get(&id)
    }

    pub(super) fn sources(&self) -> impl Iterator<Item = &SourceRow> {
        self.sources.values()
    }

    /// The source of that name.
    pub(super) fn source_named(&self, name: &SourceName) -> Option<&SourceRow> {
        self.sources.get(self.names.get(name)?)
    }

    pub(super) fn volume(&self, key: VolumeKey) -> Option<&VolumeRow> {
        self.volumes.get(&key)
    }

    pub(super) fn volumes(&self, source: SourceId) -> impl Iterator<Item = &VolumeRow> {
        self.volumes.range(keys_of(source)).map(|(_, row)| row)
    }

    pub(super) fn all_volumes(&self) -> impl Iterator<Item = &VolumeRow> {
        self.volumes.values()
    }

    /// The commit of `staged` is durable.
    pub(super) fn merge(&mut self, staged: Staged) {
        for id in &staged.history_dropped {
            self.history.remove(id);
        }
        self.merge_sources(staged.sources);
        for (key, row) in staged.volumes {
            let old = match row {
                Some(row) => {
                    self.row_bytes += stored(&row.encode());
                    self.volumes.insert(key, row)
                }
                None => self.volumes.remove(&key),
            };
            self.row_bytes -= old.map_or(0, |old| stored(&old.encode()));
        }
        for ((source, name), row) in staged.kept {
            let rows = self.kept.entry(source).or_default();
            let old = match row {
                Some(row) => {
                    self.row_bytes += row.stored_bytes();
                    rows.insert(name, row)
                }
                None => rows.remove(&name),
            };
            self.row_bytes -= old.map_or(0, |old| old.stored_bytes());
            if rows.is_empty() {
                self.kept.remove(&source);
            }
        }
        self.merge_works(staged.works);
        for (source, blocks) in staged.used {
            match blocks {
                Some(blocks) => self.used.insert(source, blocks),
                None => self.used.remove(&source),
            };
        }
        self.notes.extend(staged.notes);
        for (key, blocks) in staged.kept_blocks {
            match blocks {
                0 => self.kept_blocks.remove(&key),
                _ => self.kept_blocks.insert(key, blocks),
            };
        }
        for (source, _) in staged.history {
            *self.history.entry(source).or_default() += 1;
        }
        for (source, cut) in staged.history_cut {
            let count = self.history.entry(source).or_default();
            *count = count.saturating_sub(cut);
        }
    }

    fn merge_sources(&mut self, sources: BTreeMap<SourceId, Option<SourceRow>>) {
        for (id, row) in sources {
            let name = row.as_ref().map(|row| row.name.clone());
            let old = match row {
                Some(row) => {
                    self.row_bytes += stored(&row.encode());
                    self.sources.insert(id, row)
                }
                None => self.sources.remove(&id),
            };
            self.row_bytes -= old.as_ref().map_or(0, |old| stored(&old.encode()));
            // Another source may have taken the name over in this commit.
            let left = old.filter(|old| Some(&old.name) != name.as_ref());
            if let Some(left) = left.filter(|left| self.names.get(&left.name) == Some(&id)) {
                self.names.remove(&left.name);
            }
            self.names.extend(name.map(|name| (name, id)));
        }
    }

    fn merge_works(&mut self, works: BTreeMap<SourceId, Option<Arc<WorkRow>>>) {
        for (source, row) in works {
            let old = match row {
                Some(row) => {
                    self.row_bytes += stored(&row.encode());
                    self.works.insert(source, row)
                }
                None => self.works.remove(&source),
            };
            self.row_bytes -= old.map_or(0, |old| stored(&old.encode()));
        }
    }
}

/// The rows that one commit changes; `None` removes one.
#[derive(Debug, Default)]
pub(super) struct Staged {
    pub(super) sources: BTreeMap<SourceId, Option<SourceRow>>,
    pub(super) volumes: BTreeMap<VolumeKey, Option<VolumeRow>>,
    pub(super) history: Vec<(SourceId, HistoryRow)>,
    pub(super) history_cut: BTreeMap<SourceId, u64>,
    /// Sources that were removed: what is durable of their history goes first, also if a source of
    /// that id is put again by the same commit.
    pub(super) history_dropped: BTreeSet<SourceId>,
    pub(super) kept: BTreeMap<(SourceId, KeptName), Option<Arc<KeptRow>>>,
    /// Lengths of deadlists; 0 has no row.
    pub(super) kept_blocks: BTreeMap<(SourceId, CpNumber), u64>,
    pub(super) works: BTreeMap<SourceId, Option<Arc<WorkRow>>>,
    pub(super) notes: BTreeMap<String, Vec<u8>>,
    /// Blocks that sources have; comes with other changes only.
    pub(super) used: BTreeMap<SourceId, Option<u64>>,
    /// What the new rows add, about; rows that shrink or go count at the merge.
    added_bytes: u64,
}

impl Staged {
    /// Whether nothing was changed.
    pub(super) fn is_empty(&self) -> bool {
        let Self { sources, volumes, history, kept, kept_blocks, works, notes, .. } = self;
        sources.is_empty()
            && volumes.is_empty()
            && history.is_empty()
            && kept.is_empty()
            && kept_blocks.is_empty()
            && works.is_empty()
            && notes.is_empty()
    }

    /// As [`Mirror::used`], as it will be.
    pub(super) fn used(&self, mirror: &Mirror, source: SourceId) -> Option<u64> {
        self.used.get(&source).copied().unwrap_or_else(|| mirror.used(source))
    }

    /// A source has so many blocks then; what is not known stays so.
    pub(super) fn set_used(&mut self, source: SourceId, blocks: Option<u64>) {
        if blocks.is_some() {
            self.used.insert(source, blocks);
        }
    }

    /// A source as it will be.
    pub(super) fn source<'a>(
        &'a self,
        mirror: &'a Mirror,
        source_id: SourceId,
    ) -> Result<&'a SourceRow, PoolError> {
        let row = match self.sources.get(&source_id) {
            Some(row) => row.as_ref(),
            None => mirror.source(source_id),
        };
        row.ok_or(PoolError::UnknownSource { source_id })
    }

    /// How many sources there will be.
    fn count_sources(&self, mirror: &Mirror) -> usize {
        let there = |id: &SourceId| mirror.sources.contains_key(id);
        let added = self.sources.iter().filter(|(id, row)| row.is_some() && !there(id)).count();
        let gone = self.sources.iter().filter(|(id, row)| row.is_none() && there(id)).count();
        mirror.sources.len() + added - gone
    }

    /// Whether a source other than that one will have the name.
    fn is_taken(&self, mirror: &Mirror, name: &SourceName, id: SourceId) -> bool {
        let staged = self.sources.values().flatten();
        let durable = mirror.names.get(name).filter(|owner| !self.sources.contains_key(owner));
        durable.is_some_and(|owner| *owner != id)
            || staged.into_iter().any(|row| row.name == *name && row.id != id)
    }

    /// A volume as it will be.
    pub(super) fn volume<'a>(
        &'a self,
        mirror: &'a Mirror,
        key: VolumeKey,
    ) -> Result<&'a VolumeRow, PoolError> {
        let row = match self.volumes.get(&key) {
            Some(row) => row.as_ref(),
            None => mirror.volume(key),
        };
        row.ok_or(PoolError::UnknownVolume { key })
    }

    /// The volumes of a source as they will be, by number.
    pub(super) fn volumes(
        &self,
        mirror: &Mirror,
        source: SourceId,
    ) -> BTreeMap<VolumeKey, VolumeRow> {
        let mut rows: BTreeMap<_, _> =
            mirror.volumes(source).map(|row| (row.key, row.clone())).collect();
        for (key, row) in self.volumes.range(keys_of(source)) {
            match row {
                Some(row) => rows.insert(*key, row.clone()),
                None => rows.remove(key),
            };
        }
        rows
    }

    /// Refuses a row that is longer than the one it replaces if all rows would be too long.
    fn refuse_growth(
        &mut self,
        mirror: &Mirror,
        old_bytes: u64,
        new_bytes: u64,
        max_bytes: u64,
    ) -> Result<(), PoolError> {
        let wanted_bytes = new_bytes.saturating_sub(old_bytes);
        if wanted_bytes == 0 {
            return Ok(());
        }
        let rows_bytes = mirror.row_bytes + self.added_bytes;
        if rows_bytes + wanted_bytes > max_bytes {
            return Err(PoolError::CatalogFull { rows_bytes, wanted_bytes, max_bytes });
        }
        self.added_bytes += wanted_bytes;
        Ok(())
    }

    /// Adds a source or replaces its row. What `publish` writes must be as it is: a row read
    /// before a CP was published would take the CP back.
    pub(super) fn put_source(
        &mut self,
        mirror: &Mirror,
        row: SourceRow,
        max_bytes: u64,
    ) -> Result<(), PoolError> {
        check_extension(&row)?;
        let refused = |why| {
            Err(PoolError::RowRefused { what: format!("source {} ({})", row.id, row.name), why })
        };
        let (mut old_bytes, mut named) = (0, false);
        match self.source(mirror, row.id) {
            Ok(old) => {
                old_bytes = stored(&old.encode());
                named = old.name == row.name;
                let owned = |row: &SourceRow| (row.applied, row.sequence, row.stream_hash);
                if owned(old) != owned(&row) {
                    return refused("only publish moves its CP, sequence and stream hash");
                }
                if row.epoch.number < old.epoch.number {
                    return refused("an epoch is only raised");
                }
                if row.highest_cp < old.highest_cp {
                    return refused("the highest CP number is only raised");
                }
                if row.generation.number < old.generation.number {
                    return refused("a generation is only raised");
                }
            }
            // A source may begin beyond CP 0: its history is known from the other end.
            Err(_) => {
                let (met, max) = (to_u64(self.count_sources(mirror)) + 1, to_u64(SOURCES_MAX));
                if met > max {
                    return Err(PoolError::Limit { what: "sources", met, max });
                }
            }
        }
        if !named && self.is_taken(mirror, &row.name, row.id) {
            return refused("another source has that name");
        }
        self.refuse_growth(mirror, old_bytes, stored(&row.encode()), max_bytes)?;
        self.sources.insert(row.id, Some(row));
        Ok(())
    }

    /// Adds a volume, empty, or renames one.
    pub(super) fn put_volume(
        &mut self,
        mirror: &Mirror,
        row: VolumeRow,
        max_bytes: u64,
    ) -> Result<(), PoolError> {
        self.source(mirror, row.key.source)?;
        let what = || format!("volume {} ({}) of {}", row.key.volume, row.name, row.key.source);
        let refused = |why| Err(PoolError::RowRefused { what: what(), why });
        let size = row.tree.size;
        let max = crate::limits::VOLUME_BYTES_MAX;
        if size.0 == 0 || !size.is_whole_blocks() || size.0 > max {
            return refused("its size is no multiple of 4096, zero, or too large");
        }
        let old_bytes = self.volume(mirror, row.key).map_or(0, |old| stored(&old.encode()));
        match self.volume(mirror, row.key) {
            Ok(old) if old.id != row.id => return refused("the number is another volume's"),
            Ok(old) if old.tree != row.tree => return refused("only publish moves its tree"),
            Ok(_) => {}
            Err(_) if !row.tree.top.is_hole() => return refused("a new volume is empty"),
            Err(_) => {
                let met = to_u64(self.volumes(mirror, row.key.source).len()) + 1;
                let max = to_u64(VOLUMES_PER_SOURCE_MAX);
                if met > max {
                    return Err(PoolError::Limit { what: "volumes of a source", met, max });
                }
            }
        }
        let others = self.volumes(mirror, row.key.source);
        if others.values().any(|other| other.name == row.name && other.key != row.key) {
            return refused("another volume of the source has that name");
        }
        // What grows is told by `grow_volume` only.
        let grows_to = self.volume(mirror, row.key).ok().and_then(|old| old.grows_to);
        let row = VolumeRow { grows_to, ..row };
        self.refuse_growth(mirror, old_bytes, stored(&row.encode()), max_bytes)?;
        self.volumes.insert(row.key, Some(row));
        Ok(())
    }

    /// Notes the size that the next trees of a volume may have.
    pub(super) fn grow_volume(
        &mut self,
        mirror: &Mirror,
        (key, size): (VolumeKey, ByteCount),
        max_bytes: u64,
    ) -> Result<(), PoolError> {
        let old = self.volume(mirror, key)?.clone();
        if size <= old.size() {
            return Ok(());
        }
        if !old.may_grow_to(size) {
            let what = format!("volume {} ({}) of {}", key.volume, old.name, key.source);
            let why = "its new size is no multiple of 4096, or too large";
            return Err(PoolError::RowRefused { what, why });
        }
        let old_bytes = stored(&old.encode());
        let row = VolumeRow { grows_to: Some(size), ..old };
        self.refuse_growth(mirror, old_bytes, stored(&row.encode()), max_bytes)?;
        self.volumes.insert(key, Some(row));
        Ok(())
    }

    /// Removes a volume that holds nothing.
    pub(super) fn remove_volume(
        &mut self,
        mirror: &Mirror,
        key: VolumeKey,
    ) -> Result<(), PoolError> {
        if !self.volume(mirror, key)?.tree.top.is_hole() {
            let what = format!("volume {} of {}", key.volume, key.source);
            return Err(PoolError::RowRefused { what, why: "it still holds blocks" });
        }
        if self.work(mirror, key.source).is_some() {
            return Err(PoolError::WorkKept { source_id: key.source });
        }
        self.volumes.insert(key, None);
        Ok(())
    }

    /// Removes a source that has no volumes, and its history.
    pub(super) fn remove_source(
        &mut self,
        mirror: &Mirror,
        source: SourceId,
    ) -> Result<(), PoolError> {
        self.source(mirror, source)?;
        if !self.volumes(mirror, source).is_empty() {
            let what = format!("source {source}");
            return Err(PoolError::RowRefused { what, why: "it still has volumes" });
        }
        if !self.kept(mirror, source).is_empty() {
            let what = format!("source {source}");
            return Err(PoolError::RowRefused { what, why: "it still has kept CPs" });
        }
        self.sources.insert(source, None);
        self.used.insert(source, None);
        self.history.retain(|(id, _)| *id != source);
        self.history_cut.remove(&source);
        self.history_dropped.insert(source);
        Ok(())
    }

    /// The work tree of a source as it will be.
    pub(super) fn work<'a>(
        &'a self,
        mirror: &'a Mirror,
        source: SourceId,
    ) -> Option<&'a Arc<WorkRow>> {
        match self.works.get(&source) {
            Some(row) => row.as_ref(),
            None => mirror.work(source),
        }
    }

    /// Keeps a work tree in the place of the one before.
    pub(super) fn keep_work(
        &mut self,
        mirror: &Mirror,
        row: WorkRow,
        max_bytes: u64,
    ) -> Result<(), PoolError> {
        if !row.is_seed() {
            let owner = self.source(mirror, row.source)?;
            if owner.applied != row.base || row.cp <= row.base {
                let (cp, applied) = (row.cp, owner.applied);
                return Err(PoolError::CpNotNewer { cp, applied });
            }
        }
        let old_bytes = self.work(mirror, row.source).map_or(0, |old| stored(&old.encode()));
        self.refuse_growth(mirror, old_bytes, stored(&row.encode()), max_bytes)?;
        self.works.insert(row.source, Some(Arc::new(row)));
        Ok(())
    }

    /// Remembers something under a name, in the place of what was there.
    pub(super) fn put_note(&mut self, name: String, bytes: Vec<u8>) -> Result<(), PoolError> {
        let (met, max) = (to_u64(bytes.len()), to_u64(NOTE_BYTES_MAX));
        if met > max {
            return Err(PoolError::Limit { what: "bytes of a note", met, max });
        }
        self.notes.insert(name, bytes);
        Ok(())
    }

    /// The kept CPs of a source as they will be, by name.
    pub(super) fn kept(
        &self,
        mirror: &Mirror,
        source: SourceId,
    ) -> BTreeMap<KeptName, Arc<KeptRow>> {
        let mut rows: BTreeMap<_, _> =
            mirror.kept(source).map(|row| (row.name.clone(), Arc::clone(row))).collect();
        for ((owner, name), row) in &self.kept {
            if *owner == source {
                match row {
                    Some(row) => rows.insert(name.clone(), Arc::clone(row)),
                    None => rows.remove(name),
                };
            }
        }
        rows
    }

    /// The newest kept CP of a source, as it will be: it has every block born up to it.
    pub(super) fn kept_upto(&self, mirror: &Mirror, source: SourceId) -> Option<CpNumber> {
        self.kept(mirror, source).values().map(|row| row.cp).max()
    }

    /// The length of a kept CP's deadlist as it will be.
    pub(super) fn kept_blocks(&self, mirror: &Mirror, source: SourceId, cp: CpNumber) -> u64 {
        let staged = self.kept_blocks.get(&(source, cp)).copied();
        staged.unwrap_or_else(|| mirror.kept_blocks(source, cp))
    }

    /// Checks that a CP can be kept under its name. False if that name keeps it already.
    pub(super) fn may_keep(
        &mut self,
        mirror: &Mirror,
        row: &KeptRow,
        max_bytes: u64,
    ) -> Result<bool, PoolError> {
        let what = || format!("kept CP {} of {}", row.name, row.source);
        if row.cp == CpNumber(0) {
            let why = "nothing was published yet";
            return Err(PoolError::RowRefused { what: what(), why });
        }
        let rows = self.kept(mirror, row.source);
        match rows.get(&row.name) {
            Some(old) if old.cp == row.cp => return Ok(false),
            Some(_) => {
                let why = "the name keeps another CP";
                return Err(PoolError::RowRefused { what: what(), why });
            }
            None => KeptRow::refuse_more(rows.len())?,
        }
        self.refuse_growth(mirror, 0, row.stored_bytes(), max_bytes)?;
        Ok(true)
    }

    /// Keeps a CP.
    pub(super) fn keep(&mut self, row: KeptRow) {
        self.kept.insert((row.source, row.name.clone()), Some(Arc::new(row)));
    }

    /// Adds a CP to the history, which keeps the `rows_max` newest.
    pub(super) fn add_history(
        &mut self,
        mirror: &Mirror,
        source: SourceId,
        row: HistoryRow,
        rows_max: u64,
    ) {
        /// More are cut by the next commits, so that one commit stays small.
        const CUT_MAX: u64 = 64;
        self.history.push((source, row));
        let added = self.history.iter().filter(|(id, _)| *id == source).count();
        let dropped = self.history_dropped.contains(&source);
        let durable = mirror.history.get(&source).copied().filter(|_| !dropped);
        let count = durable.unwrap_or(0) + to_u64(added);
        let cut = count.saturating_sub(rows_max).min(CUT_MAX);
        if cut > 0 {
            self.history_cut.insert(source, cut);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(number: usize, name: &str) -> SourceRow {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&to_u64(number).to_le_bytes());
        SourceRow::new(SourceId(id), name.parse().unwrap())
    }

    /// Changes of one batch see each other: of two sources with one name the second is refused,
    /// and a name is free again when its source is renamed or removed before.
    #[test]
    fn a_name_is_given_once_in_a_batch() {
        let (mirror, mut staged) = (Mirror::default(), Staged::default());
        staged.put_source(&mirror, row(1, "a"), u64::MAX).unwrap();
        let met = staged.put_source(&mirror, row(2, "a"), u64::MAX).unwrap_err();
        assert!(matches!(met, PoolError::RowRefused { .. }), "{met}");
        staged.put_source(&mirror, row(1, "b"), u64::MAX).unwrap();
        staged.put_source(&mirror, row(2, "a"), u64::MAX).unwrap();
        let mut mirror = mirror;
        mirror.merge(staged);
        let mut staged = Staged::default();
        staged.put_source(&mirror, row(3, "a"), u64::MAX).unwrap_err();
        staged.remove_source(&mirror, row(2, "a").id).unwrap();
        staged.put_source(&mirror, row(3, "a"), u64::MAX).unwrap();
        mirror.merge(staged);
        let named = |name: &str| mirror.source_named(&name.parse().unwrap()).map(|row| row.id);
        let ids = [row(3, "a").id, row(1, "b").id];
        assert_eq!([named("a"), named("b"), named("c")], [Some(ids[0]), Some(ids[1]), None]);
    }

    /// A source that a batch changes counts once.
    #[test]
    fn updated_sources_do_not_count_twice() {
        let mut mirror = Mirror::default();
        for number in 1..SOURCES_MAX {
            mirror.load_source(row(number, &format!("s{number}")));
        }
        let mut staged = Staged::default();
        for number in 1..10 {
            staged.put_source(&mirror, row(number, &format!("t{number}")), u64::MAX).unwrap();
        }
        staged.put_source(&mirror, row(SOURCES_MAX, "last"), u64::MAX).unwrap();
        let met = staged.put_source(&mirror, row(SOURCES_MAX + 1, "over"), u64::MAX).unwrap_err();
        assert!(matches!(met, PoolError::Limit { what: "sources", .. }), "{met}");
    }
}
