//! The catalog on the device: a `redb` database in the pool's catalog region.
//!
//! | table | key | payload of a row |
//! | --- | --- | --- |
//! | `meta` | `pool` | whose catalog: pool id (16), owner (16), blocks of the pool (8) |
//! | `sources` | source id (16) | see catalog rows |
//! | `volumes` | source id (16), volume number (4, big-endian) | see catalog rows |
//! | `history` | source id (16), CP (4, big-endian) | see catalog rows |
//! | `free_map` | page (8, little-endian), from 0 without a gap | commit that wrote it (8), bits (4024) |
//! | `free_log` | commit (8, little-endian) | see the free log |
//! | `work` | see work trees; an older pool has no such table | |
//! | `seeds` | see seeds; an older pool has no such table | |
//! | `kept`, `kept_blocks` | see kept CPs; an older pool has no such tables | |
//! | `used` | source id (16) | blocks that its published and kept roots reach (8); an older pool has no such table, and no row of a source it has published |
//! | `notes` | name of the note (text) | what a part above remembers, opaque; an older pool has no such table. JSON: `scrub` (`src/upkeep/note.rs`), on a hub `drills` (seconds since 1970 by source) |
//!
//! Every row is sealed as catalog rows are. A page of the free map is 32,192 blocks of the data area
//! in order: bit `n % 8` of byte `n / 8` says that block `n` is in use; bits past the end are zero.
//! The commit in a page and in the key of a log row is a count from 1 that never falls; 0 is a page
//! of a new pool. Everything is read once, at open; from
//! then on `redb` only stores what one commit changes, in one durable transaction, and answers
//! questions about history. The caller has flushed all blocks that the new rows reach.
//!
//! A failed commit may have stored anything between nothing and all: the pool latches.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use redb::{
    Database, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable,
    ReadableTableMetadata, TableDefinition, TableError, WriteTransaction,
};

use crate::device::Device;
use crate::units::convert::{to_u64, to_usize};
use crate::units::ids::SourceId;
use crate::units::numbers::CpNumber;

use super::bitmap::{Bitmap, Extent, PAGE_BITS_BYTES};
use super::error::PoolError;
use super::free_log::{FreeLog, FreePlan, decode_row};
use super::kept_row::{KeptBlocks, KeptRow};
use super::label::{Label, Layout};
use super::mirror::{Mirror, Staged};
use super::pointer::{TreeRoot, VolumeKey, keyed, unkeyed};
use super::region::CatalogRegion;
use super::rows::{HistoryRow, SourceRow, VolumeRow, corrupt, seal, unseal};
use super::work::WorkRow;

const FREE_MAP_NAME: &str = "free_map";
const FREE_LOG_NAME: &str = "free_log";
/// Cache of the database while it is only verified.
const VERIFY_CACHE_BYTES: u64 = crate::limits::MIB;
const NOTES_NAME: &str = "notes";
const USED_NAME: &str = "used";
const META_NAME: &str = "meta";
const OWNER_KEY: &str = "pool";
/// Bytes of a stored page: header of a row, commit and bits. With its key it fills one page of
/// `redb`.
pub(super) const FREE_PAGE_BYTES: usize = 8 + 8 + PAGE_BITS_BYTES;

const _: () = assert!(FREE_PAGE_BYTES + 8 + 16 <= 4096);

const META: TableDefinition<&str, &[u8]> = TableDefinition::new(META_NAME);
const SOURCES: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new(SourceRow::TABLE);
const VOLUMES: TableDefinition<[u8; 20], &[u8]> = TableDefinition::new(VolumeRow::TABLE);
const HISTORY: TableDefinition<[u8; 20], &[u8]> = TableDefinition::new(HistoryRow::TABLE);
const KEPT: TableDefinition<&[u8], &[u8]> = TableDefinition::new(KeptRow::TABLE);
const KEPT_BLOCKS: TableDefinition<[u8; 20], &[u8]> = TableDefinition::new(KeptBlocks::TABLE);
const WORK: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new(WorkRow::TABLE);
const SEEDS: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new(WorkRow::SEEDS);
const NOTES: TableDefinition<&str, &[u8]> = TableDefinition::new(NOTES_NAME);
const USED: TableDefinition<[u8; 16], &[u8]> = TableDefinition::new(USED_NAME);
const FREE_LOG: TableDefinition<u64, &[u8]> = TableDefinition::new(FREE_LOG_NAME);
const FREE_MAP: TableDefinition<u64, &[u8; FREE_PAGE_BYTES]> = TableDefinition::new(FREE_MAP_NAME);

/// What one commit stores of the published bitmap.
#[derive(Debug)]
pub(super) struct FreeMapUpdate {
    /// Which pages, and the row of the log.
    pub(super) plan: FreePlan,
    /// The bits of those pages.
    pub(super) pages: Vec<(u64, [u8; PAGE_BITS_BYTES])>,
}

/// The database.
pub(super) struct Store {
    /// There until it is dropped.
    database: Option<Database>,
}

impl Drop for Store {
    /// `redb` commits once more when it closes, and may meet damage then.
    fn drop(&mut self) {
        let database = self.database.take();
        let close = || {
            drop(database);
            Ok(())
        };
        if let Err(error) = guarded(close, stopped("close")) {
            tracing::warn!(%error, "the catalog was not closed");
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

const STOPPED: &str = "the database stopped over damage in its pages";

/// `redb` panics over some kinds of damage: that is an error like any other.
fn guarded<T>(
    work: impl FnOnce() -> Result<T, PoolError>,
    damage: impl FnOnce() -> PoolError,
) -> Result<T, PoolError> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(damage()))
}

/// The database met damage while it was in use: nothing it says counts any more.
fn stopped(operation: &'static str) -> impl FnOnce() -> PoolError {
    move || PoolError::Catalog { operation, what: STOPPED.to_string() }
}

fn closed() -> PoolError {
    PoolError::Catalog { operation: "begin", what: "the database is closed".to_string() }
}

/// An error of `redb` while it did `operation`.
fn failed<E: fmt::Display>(operation: &'static str) -> impl FnOnce(E) -> PoolError {
    move |error| PoolError::Catalog { operation, what: error.to_string() }
}

/// A table that a pool of an older version lacks.
fn optional<K: redb::Key + 'static, V: redb::Value + 'static>(
    reader: &ReadTransaction,
    definition: TableDefinition<K, V>,
    operation: &'static str,
) -> Result<Option<ReadOnlyTable<K, V>>, PoolError> {
    match reader.open_table(definition) {
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        table => table.map(Some).map_err(failed(operation)),
    }
}

fn owner_bytes(label: &Label) -> Vec<u8> {
    let mut bytes = label.pool.0.to_vec();
    bytes.extend(label.owner);
    bytes.extend(label.layout.total.to_le_bytes());
    seal(META_NAME, OWNER_KEY.as_bytes(), &bytes)
}

/// How the pool is divided by the row of its owner, if that is the label's. A cut while the pool grew
/// leaves a label that says less: see `grow`.
fn owned(met: &[u8], label: &Label) -> Option<Layout> {
    let payload = unseal(META_NAME, OWNER_KEY.as_bytes(), met).ok()?;
    let (_, total) = payload.split_last_chunk::<8>()?;
    let layout = Layout { total: u64::from_le_bytes(*total), ..label.layout };
    let ours = met == owner_bytes(&Label { layout, ..*label });
    (ours && layout.total >= label.layout.total).then_some(layout)
}

fn free_page(page: u64, commit: u64, bits: &[u8; PAGE_BITS_BYTES]) -> [u8; FREE_PAGE_BYTES] {
    let payload = [&commit.to_le_bytes()[..], bits].concat();
    let sealed = seal(FREE_MAP_NAME, &page.to_le_bytes(), &payload);
    let mut bytes = [0; FREE_PAGE_BYTES];
    bytes.copy_from_slice(&sealed);
    bytes
}

/// Clears what a row of the log freed in pages that are older than the row. Returns those pages.
fn apply_log(
    bitmap: &mut Bitmap,
    written: &[u64],
    commit: u64,
    row: &[u8],
) -> Result<BTreeSet<u64>, String> {
    let runs = decode_row(row, bitmap.blocks()).ok_or("it is no list of runs")?;
    let mut older = BTreeSet::new();
    for Extent { start, count } in runs {
        for index in start..start + count {
            let page = Bitmap::page_of(index);
            if written.get(to_usize(page)).is_some_and(|written| *written < commit) {
                older.insert(page);
                if !bitmap.remove(index) {
                    return Err(format!("block {index} was freed twice"));
                }
            }
        }
    }
    Ok(older)
}

/// First and last key of one source.
fn of_source(source: SourceId) -> [[u8; 20]; 2] {
    [keyed(&source.0, 0), keyed(&source.0, u32::MAX)]
}

impl Store {
    /// An empty catalog of a new pool; durable when this returns.
    pub(super) fn create(
        device: Arc<dyn Device>,
        label: &Label,
        cache_bytes: u64,
    ) -> Result<Self, PoolError> {
        let region = CatalogRegion::create(device, &label.layout)?;
        let store = Self::start(region, cache_bytes)?;
        let transaction = store.begin()?;
        {
            let mut meta = transaction.open_table(META).map_err(failed("create meta"))?;
            meta.insert(OWNER_KEY, &*owner_bytes(label)).map_err(failed("write meta"))?;
            transaction.open_table(SOURCES).map_err(failed("create sources"))?;
            transaction.open_table(VOLUMES).map_err(failed("create volumes"))?;
            transaction.open_table(HISTORY).map_err(failed("create history"))?;
            transaction.open_table(FREE_LOG).map_err(failed("create free log"))?;
            let mut pages = transaction.open_table(FREE_MAP).map_err(failed("create free map"))?;
            for page in 0..Bitmap::new(label.layout.data_blocks()).pages() {
                let bytes = free_page(page, 0, &[0; PAGE_BITS_BYTES]);
                pages.insert(page, &bytes).map_err(failed("write free map"))?;
            }
        }
        transaction.commit().map_err(failed("commit"))?;
        Ok(store)
    }

    /// The catalog of an existing pool with its rows and free map, every page of it verified.
    ///
    /// Damage over which `redb` stops is no reason to latch here: nothing has been built on the
    /// catalog yet.
    pub(super) fn open(
        device: Arc<dyn Device>,
        label: &Label,
        cache_bytes: u64,
    ) -> Result<(Self, Mirror, (Bitmap, FreeLog)), PoolError> {
        let open = || {
            let (store, layout) = Self::open_verified(device, label, cache_bytes)?;
            let mirror = store.load_rows()?;
            let free_map = store.load_free_map(&layout)?;
            Ok((store, mirror, free_map))
        };
        guarded(open, || corrupt("catalog", &[], STOPPED.to_string()))
    }

    /// Reads an existing catalog whole, as an open does. `device` must bear what that writes.
    pub(super) fn verify(device: Arc<dyn Device>, label: &Label) -> Result<(), PoolError> {
        Self::open(device, label, VERIFY_CACHE_BYTES).map(drop)
    }

    fn open_verified(
        device: Arc<dyn Device>,
        label: &Label,
        cache_bytes: u64,
    ) -> Result<(Self, Layout), PoolError> {
        let region = CatalogRegion::open(device, &label.layout)?;
        let mut store = Self::start(region, cache_bytes)?;
        // After a crash redb repairs when it opens; after a clean stop it believes its pages
        // unread. Verify them here, or a rotten one would be met in the middle of a commit.
        let database = store.database.as_mut().ok_or_else(closed)?;
        database.check_integrity().map_err(failed("verify"))?;
        let layout = store.check_owner(label)?;
        Ok((store, layout))
    }

    fn start(region: CatalogRegion, cache_bytes: u64) -> Result<Self, PoolError> {
        let mut builder = Database::builder();
        builder.set_cache_size(to_usize(cache_bytes));
        let database = builder.create_with_backend(region).map_err(failed("open"))?;
        Ok(Self { database: Some(database) })
    }

    /// Gives the free map pages for the blocks that `grown` has beyond `label`, and the catalog its
    /// number, in one transaction. What an earlier call has done stays.
    pub(super) fn grow(
        device: Arc<dyn Device>,
        label: &Label,
        grown: &Label,
        cache_bytes: u64,
    ) -> Result<(), PoolError> {
        let open = || Self::open_verified(device, label, cache_bytes);
        let (store, _) = guarded(open, stopped("grow"))?;
        store.grow_to(grown)
    }

    /// The same of a catalog that is open. No commit goes on meanwhile.
    pub(super) fn grow_to(&self, grown: &Label) -> Result<(), PoolError> {
        let grow = || {
            let transaction = self.begin()?;
            {
                let mut meta = transaction.open_table(META).map_err(failed("open meta"))?;
                meta.insert(OWNER_KEY, &*owner_bytes(grown)).map_err(failed("write meta"))?;
                let mut pages =
                    transaction.open_table(FREE_MAP).map_err(failed("open free map"))?;
                let there = pages.len().map_err(failed("read free map"))?;
                for page in there..Bitmap::new(grown.layout.data_blocks()).pages() {
                    let bytes = free_page(page, 0, &[0; PAGE_BITS_BYTES]);
                    pages.insert(page, &bytes).map_err(failed("write free map"))?;
                }
            }
            transaction.commit().map_err(failed("commit"))
        };
        guarded(grow, stopped("grow"))
    }

    /// How the pool is divided; refused if the catalog is another pool's.
    fn check_owner(&self, label: &Label) -> Result<Layout, PoolError> {
        let reader = self.begin_read()?;
        let meta = reader.open_table(META).map_err(failed("open meta"))?;
        let met = meta.get(OWNER_KEY).map_err(failed("read meta"))?;
        met.and_then(|met| owned(met.value(), label)).ok_or_else(|| {
            let what = "it belongs to another pool than the label".to_string();
            corrupt(META_NAME, OWNER_KEY.as_bytes(), what)
        })
    }

    fn begin(&self) -> Result<WriteTransaction, PoolError> {
        let database = self.database.as_ref().ok_or_else(closed)?;
        database.begin_write().map_err(failed("begin"))
    }

    fn begin_read(&self) -> Result<ReadTransaction, PoolError> {
        let database = self.database.as_ref().ok_or_else(closed)?;
        database.begin_read().map_err(failed("read"))
    }

    /// All rows of sources and volumes, and how long each history is.
    fn load_rows(&self) -> Result<Mirror, PoolError> {
        let reader = self.begin_read()?;
        let mut mirror = Mirror::default();
        let sources = reader.open_table(SOURCES).map_err(failed("open sources"))?;
        for row in sources.iter().map_err(failed("read sources"))? {
            let (key, value) = row.map_err(failed("read sources"))?;
            mirror.load_source(SourceRow::decode(&key.value(), value.value())?);
        }
        let volumes = reader.open_table(VOLUMES).map_err(failed("open volumes"))?;
        for row in volumes.iter().map_err(failed("read volumes"))? {
            let (key, value) = row.map_err(failed("read volumes"))?;
            let row = VolumeRow::decode(&key.value(), value.value())?;
            if mirror.source(row.key.source).is_none() {
                return Err(corrupt(
                    VolumeRow::TABLE,
                    &key.value(),
                    "its source is missing".into(),
                ));
            }
            mirror.load_volume(row);
        }
        let history = reader.open_table(HISTORY).map_err(failed("open history"))?;
        for row in history.iter().map_err(failed("read history"))? {
            let (key, _) = row.map_err(failed("read history"))?;
            mirror.load_history(SourceId(unkeyed(&key.value()).0));
        }
        Self::load_kept(&reader, &mut mirror)?;
        Self::load_works(&reader, &mut mirror)?;
        Self::load_seeds(&reader, &mut mirror)?;
        Self::load_notes(&reader, &mut mirror)?;
        Self::load_used(&reader, &mut mirror)?;
        Ok(mirror)
    }

    fn load_used(reader: &ReadTransaction, mirror: &mut Mirror) -> Result<(), PoolError> {
        let Some(used) = optional(reader, USED, "open used")? else { return Ok(()) };
        for row in used.iter().map_err(failed("read used"))? {
            let (key, value) = row.map_err(failed("read used"))?;
            let source = SourceId(key.value());
            let payload = unseal(USED_NAME, &source.0, value.value())?;
            let blocks =
                <&[u8; 8]>::try_from(payload).ok().filter(|_| mirror.source(source).is_some());
            let Some(blocks) = blocks else {
                let what = "its source is missing, or it is no number".to_string();
                return Err(corrupt(USED_NAME, &source.0, what));
            };
            mirror.load_used(source, u64::from_le_bytes(*blocks));
        }
        Ok(())
    }

    fn load_notes(reader: &ReadTransaction, mirror: &mut Mirror) -> Result<(), PoolError> {
        let Some(notes) = optional(reader, NOTES, "open notes")? else { return Ok(()) };
        for row in notes.iter().map_err(failed("read notes"))? {
            let (key, value) = row.map_err(failed("read notes"))?;
            let bytes = unseal(NOTES_NAME, key.value().as_bytes(), value.value())?;
            mirror.load_note(key.value().to_owned(), bytes.to_vec());
        }
        Ok(())
    }

    /// The work trees, each built on what its source has published.
    fn load_works(reader: &ReadTransaction, mirror: &mut Mirror) -> Result<(), PoolError> {
        let Some(works) = optional(reader, WORK, "open work")? else { return Ok(()) };
        for row in works.iter().map_err(failed("read work"))? {
            let (key, value) = row.map_err(failed("read work"))?;
            let row = WorkRow::decode(&key.value(), value.value())?;
            let applied = mirror.source(row.source).map(|source| source.applied);
            let known = |(key, _): (VolumeKey, TreeRoot)| mirror.volume(key).is_some();
            if applied != Some(row.base) || !row.keyed().all(known) {
                let what = "its source has not published the CP that it is built on".to_string();
                return Err(corrupt(WorkRow::TABLE, &key.value(), what));
            }
            mirror.load_work(row);
        }
        Ok(())
    }

    /// The seeds, of sources that have not come yet.
    fn load_seeds(reader: &ReadTransaction, mirror: &mut Mirror) -> Result<(), PoolError> {
        let Some(seeds) = optional(reader, SEEDS, "open seeds")? else { return Ok(()) };
        for row in seeds.iter().map_err(failed("read seeds"))? {
            let (key, value) = row.map_err(failed("read seeds"))?;
            let row = WorkRow::decode_seed(&key.value(), value.value())?;
            if mirror.source(row.source).is_some() || mirror.work(row.source).is_some() {
                let what = "its id is that of a source".to_string();
                return Err(corrupt(WorkRow::SEEDS, &key.value(), what));
            }
            mirror.load_work(row);
        }
        Ok(())
    }

    /// The kept CPs and the lengths of their deadlists, each of a source or kept CP that is there.
    fn load_kept(reader: &ReadTransaction, mirror: &mut Mirror) -> Result<(), PoolError> {
        let Some(kept) = optional(reader, KEPT, "open kept")? else { return Ok(()) };
        for row in kept.iter().map_err(failed("read kept"))? {
            let (key, value) = row.map_err(failed("read kept"))?;
            let row = KeptRow::decode(key.value(), value.value())?;
            let applied = mirror.source(row.source).map(|source| source.applied);
            if applied.is_none_or(|applied| applied < row.cp) {
                let what = "its source is missing or has not published that CP".to_string();
                return Err(corrupt(KeptRow::TABLE, key.value(), what));
            }
            mirror.load_kept(row);
        }
        let blocks = reader.open_table(KEPT_BLOCKS).map_err(failed("open kept blocks"))?;
        for row in blocks.iter().map_err(failed("read kept blocks"))? {
            let (key, value) = row.map_err(failed("read kept blocks"))?;
            let (source, cp) = unkeyed(&key.value());
            let (source, cp) = (SourceId(source), CpNumber(cp));
            if !mirror.kept(source).any(|row| row.cp == cp) {
                let what = "no such CP is kept".to_string();
                return Err(corrupt(KeptBlocks::TABLE, &key.value(), what));
            }
            let blocks = KeptBlocks::decode(&key.value(), value.value())?;
            mirror.load_kept_blocks(source, cp, blocks);
        }
        Ok(())
    }

    /// The published bitmap: every page must be there, and the log is applied to them.
    fn load_free_map(&self, layout: &Layout) -> Result<(Bitmap, FreeLog), PoolError> {
        let blocks = layout.data_blocks();
        let reader = self.begin_read()?;
        let pages = reader.open_table(FREE_MAP).map_err(failed("open free map"))?;
        let mut bitmap = Bitmap::new(blocks);
        let wanted = bitmap.pages();
        let met = pages.len().map_err(failed("read free map"))?;
        let wrong = |page: u64, what| corrupt(FREE_MAP_NAME, &page.to_be_bytes(), what);
        if met != wanted {
            return Err(wrong(met, format!("{met} pages, wanted {wanted}")));
        }
        let mut written = Vec::new();
        for row in pages.iter().map_err(failed("read free map"))? {
            let (key, value) = row.map_err(failed("read free map"))?;
            let page = key.value();
            let payload = unseal(FREE_MAP_NAME, &page.to_le_bytes(), value.value())?;
            let Some((commit, bits)) = payload.split_first_chunk() else {
                return Err(wrong(page, "it is too short".into()));
            };
            written.push(u64::from_le_bytes(*commit));
            let loaded = bits.first_chunk().is_some_and(|bits| bitmap.load_page(page, bits));
            if !loaded {
                return Err(wrong(page, "it marks blocks past the end".into()));
            }
        }
        let log = reader.open_table(FREE_LOG).map_err(failed("open free log"))?;
        let (mut rows, mut stale) = (BTreeMap::new(), BTreeSet::new());
        for row in log.iter().map_err(failed("read free log"))? {
            let (key, value) = row.map_err(failed("read free log"))?;
            let (commit, key) = (key.value(), key.value().to_le_bytes());
            let payload = unseal(FREE_LOG_NAME, &key, value.value())?;
            let pages = apply_log(&mut bitmap, &written, commit, payload)
                .map_err(|what| corrupt(FREE_LOG_NAME, &commit.to_be_bytes(), what))?;
            stale.extend(pages);
            rows.insert(commit, to_u64(payload.len()));
        }
        let last = written.iter().chain(rows.keys()).max().copied().unwrap_or(0);
        let free_log = FreeLog::stored(rows, stale, last, FreeLog::bytes_max(layout));
        Ok((bitmap, free_log))
    }

    /// Stores all that one commit changes, in one durable transaction.
    pub(super) fn commit(
        &self,
        staged: &Staged,
        free_map: &FreeMapUpdate,
    ) -> Result<(), PoolError> {
        guarded(|| self.commit_all(staged, free_map), stopped("commit"))
    }

    fn commit_all(&self, staged: &Staged, free_map: &FreeMapUpdate) -> Result<(), PoolError> {
        let transaction = self.begin()?;
        {
            let mut table = transaction.open_table(SOURCES).map_err(failed("open sources"))?;
            for (id, row) in &staged.sources {
                match row {
                    Some(row) => table.insert(&id.0, &*row.encode()),
                    None => table.remove(&id.0),
                }
                .map_err(failed("write sources"))?;
            }
        }
        {
            let mut table = transaction.open_table(VOLUMES).map_err(failed("open volumes"))?;
            for (key, row) in &staged.volumes {
                match row {
                    Some(row) => table.insert(&key.encode(), &*row.encode()),
                    None => table.remove(&key.encode()),
                }
                .map_err(failed("write volumes"))?;
            }
        }
        Self::commit_free_map(&transaction, free_map)?;
        Self::commit_history(&transaction, staged)?;
        Self::commit_kept(&transaction, staged)?;
        Self::commit_works(&transaction, staged)?;
        Self::commit_notes(&transaction, staged)?;
        Self::commit_used(&transaction, staged)?;
        transaction.commit().map_err(failed("commit"))
    }

    fn commit_free_map(
        transaction: &WriteTransaction,
        update: &FreeMapUpdate,
    ) -> Result<(), PoolError> {
        let FreePlan { commit, row, obsolete_below, .. } = &update.plan;
        let mut table = transaction.open_table(FREE_MAP).map_err(failed("open free map"))?;
        for (page, bits) in &update.pages {
            let bytes = free_page(*page, *commit, bits);
            table.insert(page, &bytes).map_err(failed("write free map"))?;
        }
        let mut table = transaction.open_table(FREE_LOG).map_err(failed("open free log"))?;
        let cut = table.retain_in(..*obsolete_below, |_, _| false);
        cut.map_err(failed("cut free log"))?;
        if !row.is_empty() {
            let sealed = seal(FREE_LOG_NAME, &commit.to_le_bytes(), row);
            table.insert(commit, &*sealed).map_err(failed("write free log"))?;
        }
        Ok(())
    }

    fn commit_notes(transaction: &WriteTransaction, staged: &Staged) -> Result<(), PoolError> {
        if staged.notes.is_empty() {
            return Ok(());
        }
        let mut table = transaction.open_table(NOTES).map_err(failed("open notes"))?;
        for (name, bytes) in &staged.notes {
            let sealed = seal(NOTES_NAME, name.as_bytes(), bytes);
            table.insert(&**name, &*sealed).map_err(failed("write notes"))?;
        }
        Ok(())
    }

    fn commit_used(transaction: &WriteTransaction, staged: &Staged) -> Result<(), PoolError> {
        if staged.used.is_empty() {
            return Ok(());
        }
        let mut table = transaction.open_table(USED).map_err(failed("open used"))?;
        for (source, blocks) in &staged.used {
            match blocks {
                Some(blocks) => {
                    table.insert(&source.0, &*seal(USED_NAME, &source.0, &blocks.to_le_bytes()))
                }
                None => table.remove(&source.0),
            }
            .map_err(failed("write used"))?;
        }
        Ok(())
    }

    fn commit_works(transaction: &WriteTransaction, staged: &Staged) -> Result<(), PoolError> {
        if staged.works.is_empty() {
            return Ok(());
        }
        // A row that goes is in one of the two.
        for (definition, seeds) in [(WORK, false), (SEEDS, true)] {
            let mut table = transaction.open_table(definition).map_err(failed("open work"))?;
            for (source, row) in &staged.works {
                match row {
                    Some(row) if row.is_seed() != seeds => continue,
                    Some(row) => table.insert(&source.0, &*row.encode()),
                    None => table.remove(&source.0),
                }
                .map_err(failed("write work"))?;
            }
        }
        Ok(())
    }

    fn commit_kept(transaction: &WriteTransaction, staged: &Staged) -> Result<(), PoolError> {
        if staged.kept.is_empty() && staged.kept_blocks.is_empty() {
            return Ok(());
        }
        let mut table = transaction.open_table(KEPT).map_err(failed("open kept"))?;
        for ((source, name), row) in &staged.kept {
            let key = KeptRow::key_of(*source, name);
            match row {
                Some(row) => table.insert(&*key, &*row.encode()),
                None => table.remove(&*key),
            }
            .map_err(failed("write kept"))?;
        }
        let mut table = transaction.open_table(KEPT_BLOCKS).map_err(failed("open kept blocks"))?;
        for ((source, cp), blocks) in &staged.kept_blocks {
            let key = KeptBlocks::key(*source, *cp);
            match blocks {
                0 => table.remove(&key),
                _ => table.insert(&key, &*KeptBlocks::encode(*source, *cp, *blocks)),
            }
            .map_err(failed("write kept blocks"))?;
        }
        Ok(())
    }

    fn commit_history(transaction: &WriteTransaction, staged: &Staged) -> Result<(), PoolError> {
        let mut table = transaction.open_table(HISTORY).map_err(failed("open history"))?;
        for source in &staged.history_dropped {
            let [first, last] = of_source(*source);
            let gone = table.retain_in(first..=last, |_, _| false);
            gone.map_err(failed("drop history"))?;
        }
        for (source, row) in &staged.history {
            let key = HistoryRow::key(*source, row.cp);
            table.insert(&key, &*row.encode(*source)).map_err(failed("write history"))?;
        }
        for (source, count) in &staged.history_cut {
            let mut oldest = Vec::new();
            let [first, last] = of_source(*source);
            let rows = table.range(first..=last).map_err(failed("read history"))?;
            for row in rows.take(to_usize(*count)) {
                oldest.push(row.map_err(failed("read history"))?.0.value());
            }
            for key in &oldest {
                table.remove(key).map_err(failed("cut history"))?;
            }
        }
        Ok(())
    }

    /// One published CP of a source, if it is still kept.
    pub(super) fn history(
        &self,
        source: SourceId,
        cp: CpNumber,
    ) -> Result<Option<HistoryRow>, PoolError> {
        let read = || {
            let reader = self.begin_read()?;
            let table = reader.open_table(HISTORY).map_err(failed("open history"))?;
            let key = HistoryRow::key(source, cp);
            let row = table.get(&key).map_err(failed("read history"))?;
            row.map(|row| HistoryRow::decode(&key, row.value())).transpose()
        };
        guarded(read, stopped("read history"))
    }

    /// The newest published CPs of a source, newest first, at most so many.
    pub(super) fn newest_history(
        &self,
        source: SourceId,
        at_most: usize,
    ) -> Result<Vec<HistoryRow>, PoolError> {
        guarded(|| self.read_newest(source, at_most), stopped("read history"))
    }

    fn read_newest(&self, source: SourceId, at_most: usize) -> Result<Vec<HistoryRow>, PoolError> {
        let reader = self.begin_read()?;
        let table = reader.open_table(HISTORY).map_err(failed("open history"))?;
        let [first, last] = of_source(source);
        let rows = table.range(first..=last).map_err(failed("read history"))?;
        let mut newest = Vec::new();
        for row in rows.rev().take(at_most) {
            let (key, value) = row.map_err(failed("read history"))?;
            newest.push(HistoryRow::decode(&key.value(), value.value())?);
        }
        Ok(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::hash::crc32c_parts;
    use crate::units::ids::PoolId;

    fn header(table: &str, key: &[u8], payload: &[u8]) -> Vec<u8> {
        let front = [1, 0, 0, 0];
        let crc = crc32c_parts(&[table.as_bytes(), key, &front, payload]);
        [&front[..], &crc.to_le_bytes()].concat()
    }

    #[test]
    fn golden_bytes() {
        let layout = Layout { total: 0x1234, catalog_start: 2, catalog_blocks: 8, data_start: 10 };
        let label = Label {
            pool: PoolId([1; 16]),
            owner: [2; 16],
            layout,
            added: super::super::label::NONE_ADDED,
        };
        let payload = [&[1; 16][..], &[2; 16], &[0x34, 0x12, 0, 0, 0, 0, 0, 0]].concat();
        let wanted = [header("meta", b"pool", &payload), payload].concat();
        assert_eq!(owner_bytes(&label), wanted);
        let mut bits = [0; PAGE_BITS_BYTES];
        bits[2] = 0x81;
        let payload = [&[9, 0, 0, 0, 0, 0, 0, 0][..], &bits].concat();
        let wanted = [header("free_map", &[3, 0, 0, 0, 0, 0, 0, 0], &payload), payload].concat();
        assert_eq!(free_page(3, 9, &bits).to_vec(), wanted);
        let mut bitmap = Bitmap::new(to_u64(PAGE_BITS_BYTES) * 8);
        assert!(bitmap.load_page(0, &bits) && bitmap.get(16) && bitmap.get(23));
        assert_eq!(bitmap.count(), 2);
    }
}
