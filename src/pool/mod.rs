//! The pool: blocks of one device, given out and taken back under published roots.
//!
//! Floor 4. A pool belongs to one source or one hub. It keeps the catalog (sources, volumes,
//! roots, history), the free map, and pins for readers. The volume tree above it builds new trees
//! out of blocks from a [`write_set::WriteSet`] and publishes them ([`publish::Publish`]).
//!
//! * [`label`]: what says that a device is a pool, and its layout
//! * [`pointer`]: the format of tree pointers and roots
//! * [`space`], [`bitmap`], [`blockset`], [`pins`]: which blocks are free, in memory
//! * [`free_log`]: how the free map is stored
//! * [`store`], [`region`], [`rows`], [`mirror`]: the catalog
//! * [`write_set`], [`publish`]: how a CP is written and becomes durable and visible
//! * [`read`], [`cache`]: verified reads
//! * [`snapshot`]: one moment of the accounts, for `check`
//!
//! Invariants: a block that a published or pinned root reaches is never written (2); rows are
//! visible only when durable, after everything they reach (R9); the first failed write or flush
//! latches the pool (7); what is read is verified (11). Calls block; none is made from an actor.

pub mod bitmap;
pub mod blockset;
pub mod cache;
pub mod catalog;
pub mod error;
mod free_log;
pub mod label;
mod mirror;
mod pins;
pub mod pointer;
pub mod publish;
mod read;
mod region;
pub mod rows;
pub mod snapshot;
pub mod space;
mod store;
#[cfg(test)]
pub(crate) mod testing;
pub mod write_set;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::device::Device;
use crate::limits::{HISTORY_ROWS_MAX, MIB, POOL_CATALOG_ROW_BYTES_MAX, POOL_CATALOG_SPARE};
use crate::units::ids::{PoolId, SourceId};
use crate::units::numbers::{BlockCount, CpNumber, Pbn, VolumeNumber};

use self::bitmap::Bitmap;
use self::cache::BlockCache;
use self::error::PoolError;
use self::free_log::FreeLog;
use self::label::{Label, Layout};
use self::mirror::Mirror;
use self::pins::PinName;
use self::pointer::{TreeRoot, VolumeKey};
use self::publish::Committer;
use self::space::{Draw, Space, SpaceMap};
use self::store::Store;
use self::write_set::{Budget, Reservation, WriteSet};

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
}

/// An open pool.
#[derive(Debug)]
pub struct Pool {
    device: Arc<dyn Device>,
    label: Label,
    options: PoolOptions,
    state: Mutex<State>,
    cache: BlockCache,
    store: Store,
    committer: Committer,
    transactions: AtomicU64,
    first_error: OnceLock<Arc<PoolError>>,
}

impl Pool {
    /// Makes a new pool on a device that carries none; durable when this returns. A crash before
    /// leaves a device without a label: no pool.
    pub fn create(
        device: Arc<dyn Device>,
        owner: [u8; 16],
        options: PoolOptions,
    ) -> Result<Arc<Self>, PoolError> {
        label::refuse_existing(&*device)?;
        let layout = Layout::for_device(&*device)?;
        let pool =
            PoolId::random().map_err(|error| PoolError::Random { what: error.to_string() })?;
        let label = Label { pool, owner, layout };
        let store = Store::create(Arc::clone(&device), &label, options.catalog_cache_bytes)?;
        label::write_all(&*device, &label)?;
        let free = Bitmap::new(layout.data_blocks());
        let free_log = FreeLog::new(&layout);
        Ok(Self::start(device, label, options, store, Mirror::default(), (free, free_log)))
    }

    /// Opens an existing pool: label, catalog and free map are verified, nothing is pinned.
    pub fn open(device: Arc<dyn Device>, options: PoolOptions) -> Result<Arc<Self>, PoolError> {
        let (label, _) = label::read(&*device)?;
        if let Some(wanted) = options.owner
            && wanted != label.owner
        {
            let hex = |id: [u8; 16]| SourceId(id).to_string();
            let (wanted, met) = (hex(wanted), hex(label.owner));
            let device = device.name();
            return Err(PoolError::WrongOwner { device, pool: label.pool, wanted, met });
        }
        let cache_bytes = options.catalog_cache_bytes;
        let (store, mirror, free_map) = Store::open(Arc::clone(&device), &label, cache_bytes)?;
        Ok(Self::start(device, label, options, store, mirror, free_map))
    }

    fn start(
        device: Arc<dyn Device>,
        label: Label,
        options: PoolOptions,
        store: Store,
        mirror: Mirror,
        (published, free_log): (Bitmap, FreeLog),
    ) -> Arc<Self> {
        let space = SpaceMap::new(&label.layout, published);
        Arc::new(Self {
            cache: BlockCache::new(options.node_cache_bytes),
            device,
            label,
            options,
            state: Mutex::new(State { space, free_log, mirror }),
            store,
            committer: Committer::default(),
            transactions: AtomicU64::new(0),
            first_error: OnceLock::new(),
        })
    }

    /// Its id.
    pub fn id(&self) -> PoolId {
        self.label.pool
    }

    /// The id of the source or hub it belongs to.
    pub fn owner(&self) -> [u8; 16] {
        self.label.owner
    }

    /// How full it is.
    pub fn space(&self) -> Result<Space, PoolError> {
        Ok(self.lock()?.space.report())
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

    /// Begins a CP. Nothing of it is visible before `publish`; dropping it gives all back.
    pub fn begin(self: &Arc<Self>, budget: Budget) -> WriteSet {
        WriteSet::new(Arc::clone(self), budget)
    }

    /// Promises free blocks, so that what is ordered now can be written later (R18). Gives up
    /// the oldest pins if that makes room.
    pub fn reserve(self: &Arc<Self>, blocks: BlockCount) -> Result<Reservation, PoolError> {
        let mut state = self.lock()?;
        loop {
            match state.space.hold(blocks.0) {
                Ok(()) => return Ok(Reservation::new(Arc::clone(self), blocks.0)),
                Err(error) => {
                    let Space { free, pinned, .. } = state.space.report();
                    if blocks.0 > free.0 + pinned.0 || !self.end_oldest_pin(&mut state) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Takes up to so many blocks side by side. Before the reserve is touched the oldest pins are
    /// given up, until there is room beside it or no pin holds anything (R18).
    fn take(&self, wanted: u64, draw: Draw<'_>) -> Result<(Pbn, u64), PoolError> {
        let mut state = self.lock()?;
        while state.space.is_at_reserve() && self.end_oldest_pin(&mut state) {}
        match state.space.take(wanted, draw) {
            Some(run) => Ok(run),
            None => Err(state.space.full(wanted)),
        }
    }

    /// Gives up the pin that was made first, if pins hold any blocks at all.
    fn end_oldest_pin(&self, state: &mut State) -> bool {
        if state.space.pins.dead_blocks() == 0 {
            return false;
        }
        let Some(free) = state.space.pins.end_oldest() else { return false };
        state.space.release_all(&self.cache, &free);
        true
    }

    /// Pins a volume as last published. The pool gives the pin up only when it needs the space.
    pub fn pin(self: &Arc<Self>, source: SourceId, volume: VolumeNumber) -> Result<Pin, PoolError> {
        let mut state = self.lock()?;
        self.pin_locked(&mut state, VolumeKey { source, volume })
    }

    /// Pins all volumes of a source at one CP.
    pub fn pin_source(self: &Arc<Self>, source: SourceId) -> Result<Vec<Pin>, PoolError> {
        let mut made = Vec::new();
        let mut state = self.lock()?;
        if state.mirror.source(source).is_none() {
            return Err(PoolError::UnknownSource { source_id: source });
        }
        let keys: Vec<_> = state.mirror.volumes(source).map(|row| row.key).collect();
        for key in keys {
            match self.pin_locked(&mut state, key) {
                Ok(pin) => made.push(pin),
                Err(error) => {
                    // Pins are dropped without the lock.
                    drop(state);
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    fn pin_locked(self: &Arc<Self>, state: &mut State, key: VolumeKey) -> Result<Pin, PoolError> {
        let tree = state.mirror.volume(key).ok_or(PoolError::UnknownVolume { key })?.tree;
        let source = state.mirror.source(key.source);
        let cp = source.ok_or(PoolError::UnknownSource { source_id: key.source })?.applied;
        state.space.pins.refuse_more()?;
        Ok(self.pin_tree(state, key, cp, tree))
    }

    fn pin_tree(
        self: &Arc<Self>,
        state: &mut State,
        key: VolumeKey,
        cp: CpNumber,
        tree: TreeRoot,
    ) -> Pin {
        let name = state.space.pins.add(key, cp, tree);
        Pin { pool: Arc::clone(self), name, tree }
    }

    /// Readers that pin something, and pins given up since the pool was opened.
    pub fn pin_counts(&self) -> Result<(u64, u64), PoolError> {
        Ok(self.lock()?.space.pins.counts())
    }

    /// Gives up the pin that was made first, whatever it holds.
    pub fn end_first_pin(&self) -> Result<bool, PoolError> {
        let mut state = self.lock()?;
        let Some(free) = state.space.pins.end_oldest() else { return Ok(false) };
        state.space.release_all(&self.cache, &free);
        Ok(true)
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>, PoolError> {
        self.state.lock().map_err(|_| PoolError::Poisoned)
    }

    fn unhold(&self, blocks: u64) {
        if let Ok(mut state) = self.lock() {
            state.space.unhold(blocks);
        }
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
        &*self.device
    }

    fn label(&self) -> &Label {
        &self.label
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

/// A volume at a published CP, kept for a reader. Dropping it gives its blocks back.
#[derive(Debug)]
pub struct Pin {
    pool: Arc<Pool>,
    name: PinName,
    tree: TreeRoot,
}

impl Pin {
    /// The tree it keeps.
    pub fn tree(&self) -> TreeRoot {
        self.tree
    }

    /// The volume.
    pub fn key(&self) -> VolumeKey {
        self.name.key
    }

    /// The CP.
    pub fn cp(&self) -> CpNumber {
        self.name.cp
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Whether the pool has given it up: its blocks may be others' by now.
    pub fn has_ended(&self) -> bool {
        self.name.has_ended()
    }

    /// To be asked after each read by [`Pin::tree`]: what was read is the volume's only if the
    /// pin still held.
    pub fn check(&self) -> Result<(), PoolError> {
        if self.has_ended() { Err(PoolError::PinEnded { cp: self.name.cp }) } else { Ok(()) }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Ok(mut state) = self.pool.lock() {
            let free = state.space.pins.release(&self.name);
            state.space.release_all(&self.pool.cache, &free);
        }
    }
}

/// What breaks a pool on purpose, for negative controls.
#[cfg(test)]
impl Pool {
    /// From now on freed blocks are given out at once.
    pub(crate) fn break_allocator(&self) {
        self.lock().unwrap().space.broken = true;
    }

    /// Blocks in the cache.
    pub(crate) fn cached_blocks(&self) -> usize {
        self.cache.len()
    }

    /// Makes the state unusable, as a panic in the middle of a change would.
    pub(crate) fn poison(self: &Arc<Self>) {
        let pool = Arc::clone(self);
        let panicked = std::thread::spawn(move || {
            let _state = pool.lock().unwrap();
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
    }

    /// Marks a free block used and that one free in the stored map. Returns both.
    pub(crate) fn break_accounts(&self, used: Pbn) -> (Pbn, Pbn) {
        let mut state = self.lock().unwrap();
        (state.space.break_map(used), used)
    }

    /// Gives a second volume the tree of the first.
    pub(crate) fn break_twin(&self, key: VolumeKey, twin: VolumeKey) {
        let mut state = self.lock().unwrap();
        let mut row = state.mirror.volume(key).unwrap().clone();
        row.key = twin;
        state.mirror.load_volume(row);
    }

    /// Makes a source's applied CP another one.
    pub(crate) fn break_cp(&self, source: SourceId, cp: CpNumber) {
        let mut state = self.lock().unwrap();
        let mut row = state.mirror.source(source).unwrap().clone();
        row.applied = cp;
        state.mirror.load_source(row);
    }
}
