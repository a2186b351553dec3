//! The pool: blocks of one device, given out and taken back under published roots.
//!
//! Floor 4. A pool belongs to one source or one hub. It keeps the catalog (sources, volumes,
//! roots, history), the free map, and pins for readers. The volume tree above it builds new trees
//! out of blocks from a [`write_set::WriteSet`] and publishes them ([`publish::Publish`]).
//!
//! * [`label`]: what says that a device is a pool, and its layout
//! * [`mod@pointer`]: the format of tree pointers and roots
//! * [`space`], [`bitmap`], [`blockset`], `pins`: which blocks are free, in memory
//! * `figures`: how many, for whoever only looks
//! * `room`: promises, blocks for a CP, pins
//! * `free_log`: how the free map is stored
//! * [`kept`], [`kept_row`]: CPs kept by name
//! * [`work`]: what came of a pass that is not published yet
//! * `store`, `region`, [`rows`], `mirror`: the catalog
//! * [`write_set`], `behind`, [`publish`]: how a CP is written and becomes durable and visible
//! * `read`, [`cache`]: verified reads
//! * `grow`: more blocks, after devices were added
//! * `catalog_mend`: the catalog from other copies
//! * [`scrub`]: reads of the medium alone
//! * [`snapshot`]: one moment of the accounts, for `check`
//!
//! Invariants: a block that a published, kept or pinned root reaches is never written (2); rows are
//! visible only when durable, after everything they reach (R9); the first failed write or flush
//! latches the pool (7); what is read is verified (11). Calls block; none is made from an actor.

mod behind;
pub mod bitmap;
pub mod blockset;
pub mod cache;
pub mod catalog;
mod catalog_mend;
pub mod error;
mod figures;
mod free_log;
mod grow;
pub mod kept;
pub mod kept_row;
pub mod label;
mod mended;
mod mirror;
mod pins;
pub mod pointer;
pub mod publish;
mod read;
mod region;
mod room;
pub mod rows;
pub mod scrub;
pub mod seed;
pub mod snapshot;
pub mod space;
mod store;
#[cfg(test)]
pub(crate) mod testing;
pub mod work;
pub mod write_set;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::device::{Device, MemberReport};
use crate::limits::{HISTORY_ROWS_MAX, MIB, POOL_CATALOG_ROW_BYTES_MAX, POOL_CATALOG_SPARE};
use crate::raid::span::Span;
use crate::units::BLOCK_BYTES_U64;
use crate::units::ids::{PoolId, SourceId};
use crate::units::numbers::CpNumber;

use self::bitmap::Bitmap;
use self::cache::BlockCache;
use self::error::PoolError;
use self::figures::{Figures, Locked, UsedBySource};
use self::free_log::FreeLog;
use self::kept::KeptState;
use self::kept_row::KeptBlocks;
use self::label::{Label, Layout};
use self::mended::Mended;
use self::mirror::Mirror;
use self::pins::PinName;
use self::pointer::{TreeRoot, VolumeKey};
use self::publish::Committer;
use self::scrub::InUse;
use self::space::{Space, SpaceMap};
use self::store::Store;
use self::work::WorkRow;
use self::write_set::{Budget, WriteSet};

/// What a pool may use, and whose it must be.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Bytes of the catalog database's own cache.
    pub catalog_cache_bytes: u64,
    /// Bytes of the cache of tree nodes.
    pub node_cache_bytes: u64,
    /// CPs that a source's history keeps, if the catalog has room: a source keeps all of
    /// [`HISTORY_ROWS_MAX`] (R5), a hub a few.
    pub history_rows: u64,
    /// `open` refuses a pool of another owner; `None` takes any.
    pub owner: Option<[u8; 16]>,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            catalog_cache_bytes: 16 * MIB,
            node_cache_bytes: 64 * MIB,
            history_rows: HISTORY_ROWS_MAX,
            owner: None,
        }
    }
}

/// What changes while a pool is open.
#[derive(Debug)]
struct State {
    space: SpaceMap,
    free_log: FreeLog,
    mirror: Mirror,
    kept: KeptState,
    /// Sources whose work tree a write set goes on with.
    works_open: BTreeSet<SourceId>,
}

/// What reads met that was not right.
#[derive(Debug, Default)]
struct Repairs {
    repaired: AtomicU64,
    damaged: AtomicU64,
}

/// An open pool.
#[derive(Debug)]
pub struct Pool {
    device: Arc<dyn Device>,
    /// The device, if it is an array.
    array: Option<Arc<Span>>,
    /// The device with what was added behind it since the open, if it is a plain one.
    behind: OnceLock<Arc<Span>>,
    /// As it was when the pool was opened.
    label: Label,
    /// As it is by now; held while devices are added.
    growing: Mutex<Label>,
    /// Blocks by now.
    total: AtomicU64,
    options: PoolOptions,
    state: Mutex<State>,
    figures: Figures,
    cache: BlockCache,
    mended: Mended,
    store: Store,
    committer: Committer,
    transactions: AtomicU64,
    repairs: Repairs,
    first_error: OnceLock<Arc<PoolError>>,
}

impl Pool {
    /// Makes a new pool on a device that begins with zeros; durable when this returns. A crash
    /// before leaves a device without a label, which is no pool and may become one.
    pub fn create(
        device: Arc<dyn Device>,
        owner: [u8; 16],
        options: PoolOptions,
    ) -> Result<Arc<Self>, PoolError> {
        label::refuse_existing(&*device)?;
        let layout = Layout::for_device(&*device)?;
        let pool =
            PoolId::random().map_err(|error| PoolError::Random { what: error.to_string() })?;
        let label = Label { pool, owner, layout, added: label::NONE_ADDED };
        label::write_draft(&*device)?;
        let store = Store::create(Arc::clone(&device), &label, options.catalog_cache_bytes)?;
        label::write_all(&*device, &label)?;
        let free = Bitmap::new(layout.data_blocks());
        let free_log = FreeLog::new(&layout);
        Ok(Self::start(device, label, options, store, Mirror::default(), (free, free_log)))
    }

    /// Opens an existing pool: label, catalog and free map are verified, nothing is pinned. What
    /// is believed is written again first: a commit of which an error was reported may be seen,
    /// and must then outlive a power cut.
    pub fn open(device: Arc<dyn Device>, options: PoolOptions) -> Result<Arc<Self>, PoolError> {
        let (label, damaged) = label::read(&*device)?;
        if let Some(copy) = damaged {
            let device = device.name();
            tracing::warn!(%device, copy, "one copy of the pool's label was damaged: written again");
        }
        if let Some(wanted) = options.owner
            && wanted != label.owner
        {
            let hex = |id: [u8; 16]| SourceId(id).to_string();
            let (wanted, met) = (hex(wanted), hex(label.owner));
            let device = device.name();
            return Err(PoolError::WrongOwner { device, pool: label.pool, wanted, met });
        }
        let array = Span::of(Arc::clone(&device));
        if let Some(array) = array.as_ref().filter(|array| array.is_redundant()) {
            catalog_mend::mend(&device, array, &label)?;
        }
        // Durable before it is believed, as the catalog is.
        label::write_all(&*device, &label)?;
        let cache_bytes = options.catalog_cache_bytes;
        let label = grow::grown(&device, label, cache_bytes)?;
        let (store, mirror, free_map) = Store::open(Arc::clone(&device), &label, cache_bytes)?;
        let (wanted, met) = (free_map.0.blocks(), label.layout.data_blocks());
        if wanted != met {
            // A cut came between the catalog and the label, and what was added is not here.
            let bytes = |blocks| (label.layout.data_start + blocks) * BLOCK_BYTES_U64;
            let (device, wanted, met) = (device.name(), bytes(wanted), bytes(met));
            return Err(PoolError::AddedMissing { device, wanted, met });
        }
        let (kept, stored) = (mirror.all_kept_blocks(), free_map.0.count());
        if kept.is_none_or(|kept| kept > stored) {
            let what = format!("the deadlists are longer than {stored} blocks in use");
            return Err(rows::corrupt(KeptBlocks::TABLE, &[], what));
        }
        let beside = stored - kept.unwrap_or_default();
        if mirror.all_work_blocks().is_none_or(|work| work > beside) {
            let what = format!("the work trees have more than {stored} blocks in use");
            return Err(rows::corrupt(WorkRow::TABLE, &[], what));
        }
        Ok(Self::start(device, label, options, store, mirror, free_map))
    }

    fn start(
        device: Arc<dyn Device>,
        label: Label,
        options: PoolOptions,
        store: Store,
        mirror: Mirror,
        (stored, free_log): (Bitmap, FreeLog),
    ) -> Arc<Self> {
        let kept = mirror.all_kept_blocks().unwrap_or_default();
        let work = mirror.all_work_blocks().unwrap_or_default();
        let space = SpaceMap::new(&label.layout, stored, kept, work);
        let space = space.striped(device.stripe().0 / BLOCK_BYTES_U64);
        let in_use = InUse::new(label.layout.data_start, space.maps().1.clone());
        device.note_unused(&|first, count| in_use.any(first, count));
        let array = Span::of(Arc::clone(&device));
        let figures = Figures::default();
        figures.tell(space.report());
        figures.tell_all_used(&mirror);
        Arc::new(Self {
            array,
            cache: BlockCache::new(options.node_cache_bytes),
            mended: Mended::default(),
            device,
            behind: OnceLock::new(),
            label,
            growing: Mutex::new(label),
            total: AtomicU64::new(label.layout.total),
            options,
            state: Mutex::new(State {
                space,
                free_log,
                mirror,
                kept: KeptState::default(),
                works_open: BTreeSet::new(),
            }),
            store,
            figures,
            committer: Committer::default(),
            transactions: AtomicU64::new(0),
            repairs: Repairs::default(),
            first_error: OnceLock::new(),
        })
    }

    fn mended(&self) -> &Mended {
        &self.mended
    }

    /// Its id.
    pub fn id(&self) -> PoolId {
        self.label.pool
    }

    /// The id of the source or hub it belongs to.
    pub fn owner(&self) -> [u8; 16] {
        self.label.owner
    }

    /// How full it is; asked without a lock.
    pub fn space(&self) -> Result<Space, PoolError> {
        self.check_state().map(|()| self.figures.space())
    }

    /// Blocks that the image of each source has with its CPs that are kept, where that is known;
    /// asked without a lock.
    pub fn used_by_all(&self) -> Result<UsedBySource, PoolError> {
        self.check_state().map(|()| self.figures.used())
    }

    fn check_state(&self) -> Result<(), PoolError> {
        if self.state.is_poisoned() { Err(PoolError::Poisoned) } else { Ok(()) }
    }

    /// Catalog transactions since it was opened.
    pub fn transactions(&self) -> u64 {
        self.transactions.load(Ordering::Acquire)
    }

    /// Catalog changes that gather for the next commit.
    pub fn waiting(&self) -> usize {
        self.committer.waiting()
    }

    /// Why it refuses writes, if it does.
    pub fn first_error(&self) -> Option<Arc<PoolError>> {
        self.first_error.get().cloned()
    }

    /// Durable writes and flushes of its device so far.
    pub fn syncs(&self) -> u64 {
        self.device().syncs()
    }

    /// The devices of its array; none if it lies on a plain device.
    pub fn devices(&self) -> Vec<MemberReport> {
        self.device().members()
    }

    /// Blocks that were not right and were rewritten from another copy, and reads of blocks of which
    /// no copy was right, since it was opened.
    pub fn repairs(&self) -> (u64, u64) {
        let Repairs { repaired, damaged } = &self.repairs;
        (repaired.load(Ordering::Relaxed), damaged.load(Ordering::Relaxed))
    }

    /// Begins a CP. Nothing of it is visible before `publish`; dropping it gives all back.
    pub fn begin(self: &Arc<Self>, budget: Budget) -> WriteSet {
        WriteSet::new(Arc::clone(self), budget)
    }

    fn lock(&self) -> Result<Locked<'_>, PoolError> {
        let state = self.state.lock().map_err(|_| PoolError::Poisoned)?;
        Ok(Locked::new(state, &self.figures))
    }

    /// Refuses if an earlier error latched the pool.
    fn check_latch(&self) -> Result<(), PoolError> {
        match self.first_error.get() {
            Some(first) => Err(PoolError::Latched { first: Arc::clone(first) }),
            None => Ok(()),
        }
    }

    /// Remembers the first error that latches.
    fn latch(&self, error: PoolError) -> PoolError {
        if error.latches() {
            self.first_error.get_or_init(|| Arc::new(error.clone()));
        }
        error
    }

    fn device(&self) -> &dyn Device {
        match self.array() {
            Some(array) => &**array,
            None => &*self.device,
        }
    }

    /// The label by now, but for what was added behind a plain device since the open.
    fn label(&self) -> Label {
        let total = self.total.load(Ordering::Acquire);
        Label { layout: Layout { total, ..self.label.layout }, ..self.label }
    }

    fn options(&self) -> &PoolOptions {
        &self.options
    }

    fn cache(&self) -> &BlockCache {
        &self.cache
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn committer(&self) -> &Committer {
        &self.committer
    }

    fn count_transaction(&self) -> &AtomicU64 {
        &self.transactions
    }

    /// What one kind of content, rows or history or free map, may take of the catalog.
    fn catalog_part_bytes(&self) -> u64 {
        self.label.layout.catalog_bytes() / POOL_CATALOG_SPARE
    }

    fn row_bytes_max(&self) -> u64 {
        self.catalog_part_bytes().min(POOL_CATALOG_ROW_BYTES_MAX)
    }
}

/// What a pin holds.
#[derive(Debug)]
enum Held {
    /// A CP that was published when it was pinned.
    Pinned(PinName),
    /// A volume of a CP kept by name.
    Kept { key: VolumeKey, cp: CpNumber },
}

/// A volume at a published or kept CP, held for a reader. Dropping it gives its blocks back.
#[derive(Debug)]
pub struct Pin {
    pool: Arc<Pool>,
    held: Held,
    tree: TreeRoot,
}

impl Pin {
    /// The tree it keeps.
    pub fn tree(&self) -> TreeRoot {
        self.tree
    }

    /// The volume.
    pub fn key(&self) -> VolumeKey {
        match &self.held {
            Held::Pinned(name) => name.key,
            Held::Kept { key, .. } => *key,
        }
    }

    /// The CP.
    pub fn cp(&self) -> CpNumber {
        match &self.held {
            Held::Pinned(name) => name.cp,
            Held::Kept { cp, .. } => *cp,
        }
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Whether the pool has given it up: its blocks may be others' by now.
    pub fn has_ended(&self) -> bool {
        match &self.held {
            Held::Pinned(name) => name.has_ended(),
            Held::Kept { .. } => false,
        }
    }

    /// To be asked after each read by [`Pin::tree`]: what was read is the volume's only if the
    /// pin still held.
    pub fn check(&self) -> Result<(), PoolError> {
        if self.has_ended() { Err(PoolError::PinEnded { cp: self.cp() }) } else { Ok(()) }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Ok(mut state) = self.pool.lock() {
            match &self.held {
                Held::Pinned(name) => {
                    let unpinned = state.space.pins.release(name);
                    state.space.unpin(&self.pool.cache, &unpinned);
                }
                Held::Kept { key, cp } => state.kept.release(key.source, *cp),
            }
        }
    }
}
