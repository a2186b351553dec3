//! Starts a source from its stores: pool, ring, and what they say together.
//!
//! Called once by [`super::Filer::start`]; blocks. The order of things:
//!
//! 1. the pool says who the source is; its row says which CP was published here and where
//! 2. a new generation is durable before anything else (R7)
//! 3. the ring is read: transfers go through the same order and buffers as live entries; a
//!    freeze cuts the interval again exactly where it was (R6)
//! 4. both must be of one history: the published CP's place is the beginning of what the ring
//!    holds, or the place of its freeze
//!
//! Nothing is served after this: the hub is asked first (R1). Stores that do not fit each other
//! or the configuration are refused, with what was wanted and what was met.

mod replay;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use tokio::sync::watch;

use self::replay::{Replay, Replayed};
use super::completion::Completion;
use super::counters::Counters;
use super::feed::SourceFeed;
use super::identity::{Extension, ExtensionError};
use super::order::{Order, VolumeShape};
use super::outbox::Outbox;
use super::shared::{Affiliation, Apply, LinkState, Pins, Shared, SharedState};
use super::signals::{CheckpointSignals, Roots, SessionSignals};
use crate::device::Device;
use crate::nvlog::{Recovered, Ring, RingError, RingOptions, RingShape};
use crate::pool::error::PoolError;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::{Pool, PoolOptions};
use crate::record::envelope::RecordKind;
use crate::record::marks::{MarkError, Place};
use crate::record::transfer::TransferError;
use crate::session::primary::{Event, Identity, Primary};
use crate::units::ids::{RandomError, SourceId, VolumeId, random_u64};
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{ByteCount, CpNumber, Generation, LogPosition, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::geometry::Geometry;
use crate::wire::message::VolumeOffer;

/// Why a source does not start.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// No random numbers.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// A volume's size.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// What the source keeps about itself.
    #[error(transparent)]
    Extension(#[from] ExtensionError),
    /// The state is another source's.
    #[error("the pool belongs to source {met}, source.toml names {wanted}")]
    Name { wanted: SourceName, met: SourceName },
    /// The pool has no row of its owner, or several.
    #[error("the pool is no source's: its catalog has {0} sources")]
    Sources(usize),
    /// A volume of the state is not in the configuration.
    #[error("volume {0} is here and not in source.toml: it cannot be left out")]
    VolumeGone(VolumeName),
    /// Or has another size there.
    #[error("volume {name} has {met} bytes here, source.toml says {wanted}")]
    VolumeSize { name: VolumeName, wanted: ByteCount, met: ByteCount },
    /// The NVRAM is gone.
    #[error(
        "{device}: the NVRAM of this source is gone or was made anew; entries that only it held \
         are lost. In sync mode the hub has every acknowledged one: start once with \
         --accept-lost-nvram"
    )]
    NvramLost { device: Arc<str> },
    /// Acknowledged history is damaged.
    #[error(
        "{device}: acknowledged records from {from} to {to} are damaged: {what}. In sync mode the \
         hub has them: replace the NVRAM and start once with --accept-lost-nvram"
    )]
    NvramDamaged { device: Arc<str>, from: LogPosition, to: LogPosition, what: String },
    /// A record that is none of a source's.
    #[error("NVRAM record at {position}: {kind:?} is no record of a source")]
    Kind { position: LogPosition, kind: RecordKind },
    /// A transfer is bad although its record is whole.
    #[error("NVRAM record at {position}: {error}")]
    Transfer { position: LogPosition, error: TransferError },
    /// A freeze is bad although its record is whole.
    #[error("NVRAM record at {position}: {error}")]
    Freeze { position: LogPosition, error: MarkError },
    /// A record does not follow the one before it.
    #[error("NVRAM record at {position} does not follow {last:?}: {what}")]
    Chain { position: LogPosition, last: Place, what: String },
    /// Pool and NVRAM are not of one history.
    #[error(
        "pool and NVRAM do not belong together: the pool has CP {cp} at sequence {} ({}), the \
         NVRAM begins behind sequence {} ({}): one of them is an older copy",
        own.sequence, own.hash, held_after.sequence, held_after.hash
    )]
    Mismatch { cp: CpNumber, own: Place, held_after: Place },
}

/// What the source should be.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its name.
    pub name: SourceName,
    /// Its volumes.
    pub volumes: Vec<(VolumeName, ByteCount)>,
    /// How CP data travels.
    pub apply: Apply,
    /// The NVRAM may be gone: what the hub holds is fetched.
    pub accept_lost_nvram: bool,
    /// How the ring behaves and what it is made like.
    pub ring: RingOptions,
    /// The shape of a new ring.
    pub ring_shape: RingShape,
    /// How the pool behaves.
    pub pool: PoolOptions,
}

/// A device, and whether it was made just now.
#[derive(Debug, Clone)]
pub struct Store {
    /// The device.
    pub device: Arc<dyn Device>,
    /// It was made by this start and holds nothing.
    pub new: bool,
}

/// A recovered source, about to run.
#[derive(Debug)]
pub struct Started {
    /// Its parts.
    pub shared: Arc<Shared>,
    /// Its session's machine, which knows of the CP that was under way.
    pub primary: Primary,
}

/// Opens the stores and recovers. The committing thread runs when this returns.
pub fn recover(wanted: &Wanted, nvram: &Store, pool: &Store) -> Result<Started, RecoverError> {
    let pool = open_pool(wanted, pool)?;
    let mut row = own_row(wanted, &pool)?;
    let volumes = own_volumes(wanted, &pool, row.id)?;
    let extension = Extension::decode(&row.extension)?;
    let generation = Generation { number: row.generation.number + 1, id: random_u64()? };
    pool.catalog().update_source(row.id, move |row| row.generation = generation)?;
    row.generation = generation;
    let own = Place { transfer: extension.transfer, sequence: row.sequence, hash: row.stream_hash };
    make_ring(wanted, nvram, &pool, &row, extension)?;
    let ring_cell = Arc::new(OnceLock::new());
    let order = make_order(&pool, &volumes, Arc::clone(&ring_cell))?;
    let outbox = Outbox::default();
    let mut replay = Replay::new(&order, &outbox, own);
    let owner = row.id.0;
    let device = Arc::clone(&nvram.device);
    let visit = &mut |record: Recovered| replay.visit(&record);
    let opened = Ring::open(device, owner, wanted.ring.clone(), visit);
    if let Err(RingError::Blank { .. }) = opened {
        return Err(nvram_lost(nvram));
    }
    let (ring, recovery) = opened?;
    if let Some(damage) = recovery.damage.first() {
        return Err(RecoverError::NvramDamaged {
            device: nvram.device.name(),
            from: damage.from,
            to: damage.to,
            what: damage.fault.to_string(),
        });
    }
    let replayed = replay.finish(row.applied)?;
    let handle = ring.handle();
    order.set_capacity(handle.status().capacity.0);
    order.raise_cp(row.applied.next());
    ring_cell.get_or_init(|| handle);
    let completion = Completion::recovered(replayed.last.sequence);
    let parts = Parts { pool, order, outbox, completion, ring: ring_cell };
    let shared = share(wanted, &row, &extension, volumes, parts)?;
    let started = ring.start(Box::new(SourceFeed::new(Arc::clone(&shared), replayed.last)));
    if let Some(upto) = replayed.done {
        started.release(upto);
    }
    if let Some(freeze) = replayed.freeze {
        shared.checkpoint.frozen(freeze);
    }
    let primary = make_primary(&shared, &replayed);
    Ok(Started { shared, primary })
}

fn open_pool(wanted: &Wanted, store: &Store) -> Result<Arc<Pool>, RecoverError> {
    let device = Arc::clone(&store.device);
    match Pool::open(Arc::clone(&device), wanted.pool.clone()) {
        Ok(pool) => Ok(pool),
        // An earlier start may have ended before the label stood.
        Err(PoolError::NotAPool { met, .. }) if store.new || met == [0; 8] => {
            let source = SourceId::random()?;
            Ok(Pool::create(device, source.0, wanted.pool.clone())?)
        }
        Err(error) => Err(error.into()),
    }
}

/// The row of the pool's owner; made if this is the first start.
fn own_row(wanted: &Wanted, pool: &Arc<Pool>) -> Result<SourceRow, RecoverError> {
    let id = SourceId(pool.owner());
    let sources = pool.catalog().sources()?;
    match &sources[..] {
        [] => {
            let row = SourceRow::new(id, wanted.name.clone());
            pool.catalog().put_source(row.clone())?;
            Ok(row)
        }
        [row] if row.id == id && row.name == wanted.name => Ok(row.clone()),
        [row] if row.id == id => {
            Err(RecoverError::Name { wanted: wanted.name.clone(), met: row.name.clone() })
        }
        many => Err(RecoverError::Sources(many.len())),
    }
}

/// The volumes, those that are new in the configuration among them.
fn own_volumes(
    wanted: &Wanted,
    pool: &Arc<Pool>,
    source: SourceId,
) -> Result<Vec<VolumeRow>, RecoverError> {
    let catalog = pool.catalog();
    let mut rows = catalog.volumes(source)?;
    for row in &rows {
        let met = row.tree.size;
        match wanted.volumes.iter().find(|(name, _)| *name == row.name) {
            None => return Err(RecoverError::VolumeGone(row.name.clone())),
            Some((name, wanted)) if *wanted != met => {
                return Err(RecoverError::VolumeSize { name: name.clone(), wanted: *wanted, met });
            }
            Some(_) => {}
        }
    }
    let mut next = rows.iter().map(|row| row.key.volume.0 + 1).max().unwrap_or(0);
    for (name, size) in &wanted.volumes {
        if rows.iter().any(|row| row.name == *name) {
            continue;
        }
        Geometry::of(*size)?;
        let row = VolumeRow {
            key: VolumeKey { source, volume: VolumeNumber(next) },
            id: VolumeId::random()?,
            name: name.clone(),
            tree: TreeRoot::empty(*size),
        };
        catalog.put_volume(row.clone())?;
        rows.push(row);
        next += 1;
    }
    Ok(rows)
}

/// Makes the ring at the first start, or where its loss is accepted.
fn make_ring(
    wanted: &Wanted,
    nvram: &Store,
    pool: &Arc<Pool>,
    row: &SourceRow,
    extension: Extension,
) -> Result<(), RecoverError> {
    if extension.nvram_made && !wanted.accept_lost_nvram {
        // What is missing or blank now is a loss; opening finds the latter.
        return if nvram.new { Err(nvram_lost(nvram)) } else { Ok(()) };
    }
    let device = Arc::clone(&nvram.device);
    match Ring::create(device, row.id.0, wanted.ring_shape) {
        // It is there after all, or an earlier first start was cut short behind this.
        Ok(()) | Err(RingError::AlreadyRing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    if !extension.nvram_made {
        let extension = Extension { nvram_made: true, ..extension }.encode().to_vec();
        pool.catalog().update_source(row.id, move |row| row.extension = extension)?;
    }
    Ok(())
}

fn nvram_lost(nvram: &Store) -> RecoverError {
    RecoverError::NvramLost { device: nvram.device.name() }
}

fn make_order(
    pool: &Arc<Pool>,
    volumes: &[VolumeRow],
    ring: Arc<OnceLock<crate::nvlog::Handle>>,
) -> Result<Order, RecoverError> {
    let mut shapes = BTreeMap::new();
    for row in volumes {
        let Geometry { blocks, height } = Geometry::of(row.tree.size)?;
        shapes.insert(row.key.volume, VolumeShape { blocks, height });
    }
    let wake = move || {
        if let Some(ring) = ring.get() {
            ring.wake();
        }
    };
    Ok(Order::new(shapes, pool_takes(Arc::clone(pool)), Box::new(wake)))
}

/// Whether the pool can take so many blocks beyond what is published: the reserve is kept for CPs
/// and trims (R18). Blocks of the CP under way count as free: they are promised already.
fn pool_takes(pool: Arc<Pool>) -> super::order::PoolTakes {
    let known_transaction = AtomicU64::new(u64::MAX);
    let known_room = AtomicU64::new(0);
    Box::new(move |blocks| {
        // What is published changes with a transaction only; pins that go make more room.
        let transaction = pool.transactions();
        if known_transaction.load(Ordering::Acquire) == transaction
            && blocks <= known_room.load(Ordering::Acquire)
        {
            return true;
        }
        // A pool that cannot say takes nothing: the checkpoint thread finds out why.
        let Ok(space) = pool.space() else { return false };
        let kept = space.reserve.0 + space.held.0;
        let room = (space.free.0 + space.in_flight.0).saturating_sub(kept);
        known_room.store(room, Ordering::Release);
        known_transaction.store(transaction, Ordering::Release);
        blocks <= room
    })
}

struct Parts {
    pool: Arc<Pool>,
    order: Order,
    outbox: Outbox,
    completion: Completion,
    ring: Arc<OnceLock<crate::nvlog::Handle>>,
}

fn share(
    wanted: &Wanted,
    row: &SourceRow,
    extension: &Extension,
    volumes: Vec<VolumeRow>,
    parts: Parts,
) -> Result<Arc<Shared>, RecoverError> {
    let Parts { pool, order, outbox, completion, ring } = parts;
    let pins = pool.pin_source(row.id)?;
    let pins: Pins =
        Arc::new(pins.into_iter().map(|pin| (pin.key().volume, Arc::new(pin))).collect());
    let own_roots: Roots = volumes.iter().map(|row| (row.key.volume, row.tree.root())).collect();
    let offers = volumes.into_iter().map(|row| VolumeOffer {
        number: row.key.volume,
        id: row.id,
        name: row.name,
        size: row.tree.size,
    });
    let state = SharedState {
        affiliation: Affiliation { hub: extension.hub, epoch: row.epoch },
        link: LinkState::Waiting { reason: "not connected yet".to_owned() },
        failed: None,
        own_cp: row.applied,
        own_roots,
        pins,
        rejected: None,
    };
    Ok(Arc::new(Shared {
        name: row.name.clone(),
        source: row.id,
        generation: row.generation,
        volumes: offers.collect(),
        apply: wanted.apply,
        pool,
        order,
        completion,
        outbox,
        checkpoint: CheckpointSignals::default(),
        session: SessionSignals::default(),
        counters: Counters::default(),
        ring,
        common: watch::Sender::new(None),
        serving: watch::Sender::new(false),
        scans: watch::Sender::new(None),
        scanning: AtomicBool::new(false),
        answering: AtomicBool::new(false),
        started: Instant::now(),
        state: Mutex::new(state),
    }))
}

/// A machine that knows what is held, and the CP that was under way.
fn make_primary(shared: &Shared, replayed: &Replayed) -> Primary {
    let affiliation = shared.affiliation();
    let identity = Identity {
        name: shared.name.clone(),
        source: shared.source,
        hub: affiliation.hub,
        generation: shared.generation,
        epoch: affiliation.epoch,
        volumes: shared.volumes.clone(),
    };
    let (own_cp, roots) = shared.own();
    let mut primary = Primary::new(identity, replayed.held_after, shared.outbox.all(), own_cp);
    if shared.apply == Apply::Replay {
        primary.replay();
    }
    if let Some(freeze) = replayed.freeze {
        // Without a connection there is nothing to do.
        drop(primary.step(Event::Frozen { cp: freeze.cp, place: freeze.place }));
        if own_cp >= freeze.cp {
            drop(primary.step(Event::Committed { cp: freeze.cp, roots }));
        }
    }
    primary
}
