//! Starts a source from its stores: pool, ring, and what they say together.
//!
//! Called once by [`super::Filer::start`] and [`super::Filer::start_in`]; blocks. The order of
//! things:
//!
//! 1. the pool says who the source is (or who starts it in a pool of others does); its row says
//!    which CP was published here and where
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
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{Notify, Semaphore, watch};

use self::replay::{Replay, Replayed};
use super::adopt;
use super::beneath::Ground;
use super::completion::{Completion, Gate};
use super::counters::Counters;
use super::feed::SourceFeed;
use super::growth;
use super::keeper::{FilerKeeper, Keeper, KeeperError, Kept};
use super::known::{self, Known, Standing};
use super::order::{Order, PoolTakes, VolumeShape};
use super::outbox::Outbox;
use super::pledge::Pledge;
use super::promise::{Promise, SpaceLimit};
use super::shared::{Affiliation, LinkState, Pins, Shared};
use super::signals::{CheckpointSignals, Roots, SessionSignals};
use crate::device::Device;
use crate::limits::PLACES_ASKED_MAX;
use crate::nvlog::{Recovered, Ring, RingError, RingOptions, RingShape};
use crate::pool::error::PoolError;
use crate::pool::label::DRAFT_MAGIC;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::{Pool, PoolOptions};
use crate::record::envelope::RecordKind;
use crate::record::marks::{MarkError, Place};
use crate::record::scan::Damage;
use crate::record::transfer::TransferError;
use crate::session::primary::{Answering, Event, Identity, Own, Primary};
use crate::units::ids::{RandomError, SourceId, VolumeId, random_u64};
use crate::units::machine;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{
    ByteCount, CpNumber, Generation, LogPosition, TransferId, VolumeNumber,
};
use crate::units::policy::{self, OnFull, Policy};
use crate::volume::error::VolumeError;
use crate::volume::geometry::Geometry;
use crate::volume::mend::{Mender, Questions};
use crate::wire::homes::Adopt;
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
    Keeper(#[from] KeeperError),
    /// Another source was to live here.
    #[error(transparent)]
    Adopt(#[from] adopt::AdoptError),
    /// The state is another source's.
    #[error("the pool belongs to source {met}, source.toml names {wanted}")]
    Name { wanted: SourceName, met: SourceName },
    /// The pool has rows, and none of its owner.
    #[error("the pool is no source's: its catalog has {0} others")]
    Sources(usize),
    /// The pool has no such source.
    #[error("the pool has no source {0}")]
    Unknown(SourceId),
    /// A volume of the state is not in the configuration.
    #[error("volume {0} is here and not in source.toml: it cannot be left out")]
    VolumeGone(VolumeName),
    /// Or is smaller there.
    #[error("volume {name} has {met} bytes here, source.toml says {wanted}: it cannot shrink")]
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
    /// The NVRAM of a source that has no other end is gone.
    #[error(
        "{device}: the NVRAM that this source had here is gone or was made anew; acknowledged \
         writes that only it held are lost with it. Put the file or device back"
    )]
    SoleLost { device: Arc<str> },
    /// Acknowledged history is damaged, and nobody else has it.
    #[error(
        "{device}: acknowledged records from {from} to {to} are damaged: {what}. No other end has \
         them: restore the device"
    )]
    SoleDamaged { device: Arc<str>, from: LogPosition, to: LogPosition, what: String },
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

impl RecoverError {
    /// Whether it is the NVRAM that is gone, or of no use.
    pub fn is_of_nvram(&self) -> bool {
        match self {
            Self::Ring(_)
            | Self::NvramLost { .. }
            | Self::NvramDamaged { .. }
            | Self::SoleLost { .. }
            | Self::SoleDamaged { .. }
            | Self::Kind { .. }
            | Self::Transfer { .. }
            | Self::Freeze { .. }
            | Self::Chain { .. }
            | Self::Mismatch { .. } => true,
            Self::Pool(_)
            | Self::Random(_)
            | Self::Volume(_)
            | Self::Keeper(_)
            | Self::Adopt(_)
            | Self::Name { .. }
            | Self::Sources(_)
            | Self::Unknown(_)
            | Self::VolumeGone(_)
            | Self::VolumeSize { .. } => false,
        }
    }
}

/// What the source should be.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its name.
    pub name: SourceName,
    /// Its volumes.
    pub volumes: Vec<(VolumeName, ByteCount)>,
    /// What it promises.
    pub policy: Policy,
    /// Time between two CPs.
    pub checkpoint_interval: Duration,
    /// The NVRAM may be gone: what the hub holds is fetched.
    pub accept_lost_nvram: bool,
    /// The policy is in force at once, also where the hub knows of a stronger one.
    pub accept_untold_policy: bool,
    /// What a write gets that has no room in the pool.
    pub on_full: OnFull,
    /// How the ring behaves and what it is made like.
    pub ring: RingOptions,
    /// The shape of a new ring.
    pub ring_shape: RingShape,
    /// How the pool behaves.
    pub pool: PoolOptions,
}

/// How an engine runs, in whatever pool.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What the source promises.
    pub policy: Policy,
    /// Time between two CPs.
    pub checkpoint_interval: Duration,
    /// The NVRAM may be gone: what the hub holds is fetched.
    pub accept_lost_nvram: bool,
    /// The policy is in force at once, also where the hub knows of a stronger one.
    pub accept_untold_policy: bool,
    /// What a write gets that has no room in the pool.
    pub on_full: OnFull,
    /// How the ring behaves and what it is made like.
    pub ring: RingOptions,
    /// The shape of a new ring.
    pub ring_shape: RingShape,
}

/// A source in a pool that is open.
#[derive(Debug)]
struct Inside {
    pool: Arc<Pool>,
    row: SourceRow,
    volumes: Vec<VolumeRow>,
    keeper: Arc<dyn Keeper>,
    /// It has no hub.
    sole: bool,
    /// What lies between the published CP and its first entry.
    ground: Option<Ground>,
    /// Who looks after other sources that shall live here.
    offers: Offers,
    /// What it may have of the pool.
    space_limit: SpaceLimit,
}

type Offers = Arc<watch::Sender<Option<Adopt>>>;

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
    let row = own_row(wanted, &pool)?;
    let volumes = own_volumes(wanted, &pool, row.id)?;
    let settings = settings_of(wanted);
    let (keeper, offers) = (Arc::new(FilerKeeper), Offers::default());
    // Other sources may come to live in this pool at any time: each reserves its room.
    let (sole, ground) = (false, None);
    let space_limit = SpaceLimit::none();
    let inside = Inside { pool, row, volumes, keeper, sole, ground, offers, space_limit };
    let started = resume(&settings, nvram, inside)?;
    // What is larger in the file grows behind the first CP.
    started.shared.want_sizes(wanted.volumes.clone());
    Ok(started)
}

/// How the engine of that source runs.
pub fn settings_of(wanted: &Wanted) -> Settings {
    Settings {
        policy: wanted.policy,
        checkpoint_interval: wanted.checkpoint_interval,
        accept_lost_nvram: wanted.accept_lost_nvram,
        accept_untold_policy: wanted.accept_untold_policy,
        on_full: wanted.on_full,
        ring: wanted.ring.clone(),
        ring_shape: wanted.ring_shape,
    }
}

/// A source in a pool that is open already and has others in it.
#[derive(Debug)]
pub struct Guest {
    /// The pool.
    pub pool: Arc<Pool>,
    /// Which source.
    pub source: SourceId,
    /// How its bytes in its row are read and written.
    pub keeper: Arc<dyn Keeper>,
    /// It has no hub.
    pub sole: bool,
    /// What lies between the published CP and its first entry.
    pub ground: Option<Ground>,
    /// What it may have of the pool.
    pub space_limit: SpaceLimit,
}

/// Recovers a guest. The committing thread runs when this returns.
pub fn recover_in(
    guest: Guest,
    settings: &Settings,
    nvram: &Store,
) -> Result<Started, RecoverError> {
    let Guest { pool, source, keeper, sole, ground, space_limit } = guest;
    let row = pool.catalog().source(source)?.ok_or(RecoverError::Unknown(source))?;
    let volumes = pool.catalog().volumes(source)?;
    let offers = Offers::default();
    let inside = Inside { pool, row, volumes, keeper, sole, ground, offers, space_limit };
    resume(settings, nvram, inside)
}

/// Recovers a source whose engine has come to rest in this process, in the pool it had, on the same
/// NVRAM: what is durable there is all that counts. `source` is another one than before where a new
/// filer has become it. The committing thread runs when this returns.
pub fn again(
    before: &Shared,
    source: SourceId,
    settings: &Settings,
    nvram: &Store,
) -> Result<Started, RecoverError> {
    let (pool, keeper) = (Arc::clone(&before.pool), Arc::clone(&before.keeper));
    let row = pool.catalog().source(source)?.ok_or(RecoverError::Unknown(source))?;
    let volumes = pool.catalog().volumes(source)?;
    let nvram = Store { new: false, ..nvram.clone() };
    let (sole, ground, offers) = (false, None, Arc::clone(&before.offers));
    let space_limit = SpaceLimit::none();
    let inside = Inside { pool, row, volumes, keeper, sole, ground, offers, space_limit };
    let started = resume(settings, &nvram, inside)?;
    started.shared.want_sizes(before.wanted_sizes());
    Ok(started)
}

fn resume(settings: &Settings, nvram: &Store, mut inside: Inside) -> Result<Started, RecoverError> {
    let kept = inside.keeper.read(&inside.row)?;
    let row = &mut inside.row;
    let generation = Generation { number: row.generation.number + 1, id: random_u64()? };
    inside.pool.catalog().update_source(row.id, move |row| row.generation = generation)?;
    row.generation = generation;
    let row = inside.row.clone();
    let published =
        Place { transfer: kept.transfer, sequence: row.sequence, hash: row.stream_hash };
    // What lies beneath will be a CP before any of this engine is.
    let own = inside.ground.as_ref().map_or(published, |ground| ground.place);
    let beneath = inside.ground.as_ref().map_or(CpNumber(0), |ground| ground.cp);
    make_ring(settings, nvram, &inside, &kept)?;
    let ring_cell = Arc::new(OnceLock::new());
    let limit = inside.space_limit.clone();
    let promise = Arc::new(Promise::new(Arc::clone(&inside.pool), row.id, limit));
    let order = make_order(&inside, &promise, Arc::clone(&ring_cell))?.on_full(settings.on_full);
    let outbox = Outbox::default();
    let mut replay = Replay::new(&order, &outbox, own);
    let device = Arc::clone(&nvram.device);
    let visit = &mut |record: Recovered| replay.visit(&record);
    let opened = Ring::open(device, row.id.0, settings.ring.clone(), visit);
    if let Err(RingError::Blank { .. }) = opened {
        return Err(nvram_lost(nvram, inside.sole));
    }
    let (ring, recovery) = opened?;
    if let Some(damage) = recovery.damage.first() {
        return Err(nvram_damaged(nvram, inside.sole, damage));
    }
    // A volume begins to grow when no CP is under way.
    let grows = inside.volumes.iter().any(|volume| volume.grows_to.is_some());
    let replayed = replay.finish(row.applied, grows)?;
    let handle = ring.handle();
    order.set_capacity(handle.status().capacity.0);
    order.raise_cp(row.applied.max(row.highest_cp).max(beneath).next());
    if !order.promise_recovered() {
        tracing::warn!(source = %row.name, "what the NVRAM holds has no room in the pool yet");
    }
    ring_cell.get_or_init(|| handle);
    let completion = Completion::recovered(replayed.last.sequence);
    let pledge = promised(settings, &inside, kept, &replayed)?;
    let gate = if inside.sole { Gate::Own } else { Gate::of(&pledge.kept()) };
    completion.set_gate(gate);
    for held in outbox.all() {
        completion.formed(held.place.sequence, held.bytes);
    }
    let parts = Parts { order, outbox, completion, promise, pledge, ring: ring_cell };
    let shared = share(inside, &kept, parts)?;
    let started = ring.start(Box::new(SourceFeed::new(Arc::clone(&shared), replayed.last)));
    if let Some(upto) = replayed.done {
        started.release(upto);
    }
    if let Some(freeze) = replayed.freeze {
        shared.checkpoint.frozen(freeze);
    }
    let primary = make_primary(&shared, &replayed, kept.unasked);
    if growth::outgrown(&shared, &shared.pins()).next().is_some() {
        // A start came between the announcement and its CP.
        shared.checkpoint.force();
    }
    Ok(Started { shared, primary })
}

fn open_pool(wanted: &Wanted, store: &Store) -> Result<Arc<Pool>, RecoverError> {
    let device = Arc::clone(&store.device);
    match Pool::open(Arc::clone(&device), wanted.pool.clone()) {
        Ok(pool) => Ok(pool),
        // An earlier start may have ended before the label stood. What holds anything else is
        // refused by the creation.
        Err(PoolError::NotAPool { met, .. })
            if store.new || met == [0; 8] || met == DRAFT_MAGIC =>
        {
            let source = SourceId::random()?;
            Ok(Pool::create(device, source.0, wanted.pool.clone())?)
        }
        Err(error) => Err(error.into()),
    }
}

/// The row of the filer itself, others' beside it; made if this is the first start.
fn own_row(wanted: &Wanted, pool: &Arc<Pool>) -> Result<SourceRow, RecoverError> {
    let id = SourceId(pool.owner());
    adopt::undo_unfinished(pool)?;
    let sources = pool.catalog().sources()?;
    match sources.iter().find(|row| row.id == id) {
        Some(row) if row.name == wanted.name => Ok(row.clone()),
        Some(row) => Err(RecoverError::Name { wanted: wanted.name.clone(), met: row.name.clone() }),
        None if sources.is_empty() => {
            let row = SourceRow::new(id, wanted.name.clone());
            pool.catalog().put_source(row.clone())?;
            Ok(row)
        }
        None => {
            // It was new, and has become the source of that name.
            let became = |row: &&SourceRow| row.name == wanted.name && adopt::lives_here(row);
            let row = sources.iter().find(became).cloned();
            row.ok_or(RecoverError::Sources(sources.len()))
        }
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
        let met = row.size();
        match wanted.volumes.iter().find(|(name, _)| *name == row.name) {
            None => return Err(RecoverError::VolumeGone(row.name.clone())),
            Some((name, wanted)) if *wanted < met => {
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
            grows_to: None,
        };
        catalog.put_volume(row.clone())?;
        rows.push(row);
        next += 1;
    }
    Ok(rows)
}

/// Makes the ring at the first start, or where its loss is accepted.
fn make_ring(
    settings: &Settings,
    nvram: &Store,
    inside: &Inside,
    kept: &Kept,
) -> Result<(), RecoverError> {
    if kept.nvram_made && !settings.accept_lost_nvram {
        // What is missing or blank now is a loss; opening finds the latter.
        return if nvram.new { Err(nvram_lost(nvram, inside.sole)) } else { Ok(()) };
    }
    let Inside { pool, row, keeper, .. } = inside;
    let device = Arc::clone(&nvram.device);
    match Ring::create(device, row.id.0, settings.ring_shape) {
        // It is there after all, or an earlier first start was cut short behind this.
        Ok(()) | Err(RingError::AlreadyRing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    if !kept.nvram_made {
        let kept = Kept { nvram_made: true, ..*kept };
        let extension = keeper.write(row, &kept)?;
        pool.catalog().update_source(row.id, move |row| row.extension = extension)?;
    }
    Ok(())
}

fn nvram_lost(nvram: &Store, sole: bool) -> RecoverError {
    let device = nvram.device.name();
    if sole { RecoverError::SoleLost { device } } else { RecoverError::NvramLost { device } }
}

fn nvram_damaged(nvram: &Store, sole: bool, damage: &Damage) -> RecoverError {
    let (device, what) = (nvram.device.name(), damage.fault.to_string());
    let Damage { from, to, .. } = *damage;
    if sole {
        RecoverError::SoleDamaged { device, from, to, what }
    } else {
        RecoverError::NvramDamaged { device, from, to, what }
    }
}

fn make_order(
    inside: &Inside,
    promise: &Arc<Promise>,
    ring: Arc<OnceLock<crate::nvlog::Handle>>,
) -> Result<Order, RecoverError> {
    let mut shapes = BTreeMap::new();
    for row in &inside.volumes {
        let Geometry { blocks, height } = Geometry::of(row.size())?;
        shapes.insert(row.key.volume, VolumeShape { blocks, height });
    }
    let wake = move || {
        if let Some(ring) = ring.get() {
            ring.wake();
        }
    };
    let promise = Arc::clone(promise);
    let takes: PoolTakes = Box::new(move |blocks| promise.takes(blocks));
    Ok(Order::new(shapes, takes, Box::new(wake)))
}

fn offer(row: VolumeRow) -> VolumeOffer {
    let size = row.size();
    let VolumeRow { key, id, name, .. } = row;
    VolumeOffer { number: key.volume, id, name, size }
}

struct Parts {
    order: Order,
    outbox: Outbox,
    completion: Completion,
    promise: Arc<Promise>,
    pledge: Pledge,
    ring: Arc<OnceLock<crate::nvlog::Handle>>,
}

/// What is known before anybody was met.
fn state_of(
    (row, kept): (&SourceRow, &Kept),
    (link, ground): (LinkState, Option<Ground>),
    (own_roots, pins): (Roots, Pins),
) -> Standing {
    let known = Known {
        affiliation: Affiliation { hub: kept.hub, epoch: row.epoch },
        link,
        failed: None,
        panicked: false,
        own_cp: row.applied,
        own_roots,
        faulted: None,
        rejected: None,
        refused: Vec::new(),
        lacks_hub_room: false,
        slow: None,
        set_back: None,
        answering: Answering::Policy,
        mark: kept.alone,
        marked_at: machine::now(),
        mark_was_found: kept.alone.is_some(),
        fenced: kept.fenced,
        pass: None,
        own_sizes: known::sizes(&pins),
    };
    Standing { known, pins, ground }
}

/// What is promised from this start on. What was written into a freeze, or kept as the next policy,
/// comes first; else the file's comes next, as if this start were a freeze: it is kept durably
/// before anything is ordered or told.
fn promised(
    settings: &Settings,
    inside: &Inside,
    kept: Kept,
    replayed: &Replayed,
) -> Result<Pledge, RecoverError> {
    let (wanted, interval) = (settings.policy, settings.checkpoint_interval);
    let Some(in_force) = kept.policy.filter(|_| !inside.sole) else {
        // No hub has heard of any.
        return Ok(Pledge::new(wanted, None, wanted, interval));
    };
    let written = replayed.freeze.filter(|freeze| freeze.cp > inside.row.applied);
    let earlier = written.and_then(|freeze| freeze.policy).or(kept.next);
    let now = if settings.accept_untold_policy {
        Kept { policy: Some(wanted), next: None, ..kept }
    } else {
        // Not before both ends were in step, if it stops (R4).
        let new = in_force.would_stop(&wanted) && kept.alone.is_some_and(policy::never_in_step);
        let asked = Some(wanted).filter(|wanted| *wanted != in_force && !new);
        Kept { next: earlier.or(asked), ..kept }
    };
    if now != kept {
        let (catalog, id) = (inside.pool.catalog(), inside.row.id);
        let row = catalog.source(id)?.ok_or(RecoverError::Unknown(id))?;
        let extension = inside.keeper.write(&row, &now)?;
        catalog.update_source(id, move |row| row.extension = extension)?;
    }
    Ok(Pledge::new(now.policy.unwrap_or(wanted), now.next, wanted, interval))
}

fn share(inside: Inside, kept: &Kept, parts: Parts) -> Result<Arc<Shared>, RecoverError> {
    let Inside { pool, row, volumes, keeper, sole, ground, offers, .. } = inside;
    let Parts { order, outbox, completion, promise, pledge, ring } = parts;
    let pins = pool.pin_source(row.id)?;
    let pins: Pins =
        Arc::new(pins.into_iter().map(|pin| (pin.key().volume, Arc::new(pin))).collect());
    let own_roots: Roots = volumes.iter().map(|row| (row.key.volume, row.tree.root())).collect();
    let state = state_of((&row, kept), (first_link(sole), ground), (own_roots, pins));
    Ok(Arc::new(Shared {
        name: row.name.clone(),
        source: row.id,
        generation: row.generation,
        volumes: ArcSwap::from_pointee(volumes.into_iter().map(offer).collect()),
        told: ArcSwap::default(),
        wanted: Mutex::default(),
        pledge,
        pool,
        keeper,
        promise,
        sole,
        order,
        completion,
        outbox,
        checkpoint: CheckpointSignals::default(),
        session: SessionSignals::default(),
        counters: Counters::default(),
        backlog: AtomicUsize::new(0),
        brings_up: AtomicBool::new(false),
        ring,
        common: watch::Sender::new(None),
        serving: watch::Sender::new(false),
        mender: Mender::default(),
        questions: Questions::default(),
        serving_places: Arc::new(Semaphore::new(PLACES_ASKED_MAX)),
        scans: watch::Sender::new(None),
        scanning: AtomicBool::new(false),
        answering: AtomicBool::new(false),
        started: machine::now(),
        lease: watch::Sender::new(None),
        offers,
        keeping: Mutex::new(()),
        gating: Mutex::new(()),
        grounded: Notify::new(),
        state: known::watched(state),
        common_cp: AtomicU64::new(0),
        is_serving: AtomicBool::new(false),
    }))
}

/// Before the first try.
fn first_link(sole: bool) -> LinkState {
    if sole {
        LinkState::Unlinked
    } else {
        LinkState::Waiting { reason: "not connected yet".to_owned() }
    }
}

/// A machine that knows what is held, and the CP that was under way.
fn make_primary(shared: &Shared, replayed: &Replayed, unasked: Option<TransferId>) -> Primary {
    let affiliation = shared.affiliation();
    let identity = Identity {
        name: shared.name.clone(),
        source: shared.source,
        hub: affiliation.hub,
        generation: shared.generation,
        epoch: affiliation.epoch,
        volumes: shared.volumes().to_vec(),
        policy: shared.pledge.in_force(),
        alone: shared.mark(),
        unasked,
    };
    let (own_cp, roots) = shared.own();
    let outgrown = growth::outgrown(shared, &shared.pins()).next().is_some();
    let own = Own { cp: own_cp, roots: roots.clone(), outgrown };
    let mut primary = Primary::new(identity, replayed.held_after, shared.outbox.all(), own);
    if let Some(next) = shared.pledge.terms().next {
        // Whatever was recovered may have been answered under the one before alone.
        let behind = replayed.last.sequence;
        drop(primary.step(Event::Promised { next, behind }));
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
