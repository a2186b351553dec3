//! Runs a source: orders what clients write, keeps it in the NVRAM, forwards it, checkpoints it.
//!
//! Floor 7. The way of a write, as a list of names:
//!
//! ```text
//! export -> order -+-> buffers (open interval) ............ read by export, over frozen, over tree
//!                  '-> queue -> feed -+-> outbox -> forwarder -> hub
//!                                     '-> nvlog ring
//! ring durable, hub durable -> completion -> the client's answer
//! order.freeze -> feed (mark) -> checkpoint: plan -> session frozen, own tree -> pool
//!              -> session committed -> hub: CpDone -> checkpoint: release ring, outbox, buffers
//! ```
//!
//! Pure, without lock, clock or device: [`ranges`], [`buffers`], [`plan`], [`space`],
//! [`identity`]. Shells: [`order`], [`outbox`], [`completion`], [`feed`] (called by the ring's
//! committing thread), [`forwarder`] with [`sending`] and [`pulse`] (one task), [`checkpoint`] (one thread),
//! [`export`] (called by the NBD server), [`recover`] (the start), [`verify`], [`status`];
//! [`follow`]: what a fenced source does until its hub gives the volumes back; [`newcomer`]: a new
//! filer that may become a source its hub knows; [`homes`]: sources that live here beside its own;
//! [`image`]: one CP as a read-only export; [`keeper`] and [`promise`]: what is different in a pool
//! that others use as well; [`beneath`]: a log that is not in a tree yet, below everything of this
//! engine.
//!
//! [`growth`]: volumes become larger while clients are connected.
//!
//! [`pledge`]: what the source promises, and how a reload changes it while it runs.

pub mod adopt;
pub mod beneath;
pub mod buffers;
pub mod checkpoint;
pub mod completion;
pub mod counters;
pub mod export;
pub mod feed;
pub mod follow;
pub mod forwarder;
pub mod growth;
pub mod homes;
pub mod identity;
pub mod image;
pub mod keeper;
mod known;
pub mod mending;
pub mod newcomer;
pub mod nvram_file;
pub mod order;
pub mod outbox;
pub mod pass;
pub mod past;
pub mod plan;
pub mod pledge;
pub mod promise;
mod published;
pub mod pulse;
pub mod ranges;
pub mod recover;
pub mod sending;
pub mod served;
pub mod shared;
pub mod signals;
pub mod space;
pub mod status;
pub mod throttle;
pub mod tree;
pub mod verify;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use self::beneath::Ground;
use self::checkpoint::{Checkpointer, pin_all};
use self::completion::Refusal;
use self::export::SourceExports;
use self::follow::wire::Idle;
use self::forwarder::{ForwardOptions, Forwarder};
use self::keeper::Keeper;
use self::promise::SpaceLimit;
use self::recover::{Guest, RecoverError, Settings, Started, Store, Wanted};
use self::shared::{Backoff, Shared};
use self::signals::Roots;
use self::status::Status;
use self::verify::{Verification, VerifyError};
use crate::device::Device;
use crate::device::file::{Access, FileDevice, FileError, create_parent};
use crate::device::latch::Latch;
use crate::link::tls::SourceTls;
use crate::nvlog::format::HEADER_BYTES;
use crate::nvlog::{RingOptions, RingShape};
use crate::pool::error::PoolError;
use crate::pool::{Pool, PoolOptions};
use crate::raid::files::{FilesError, PoolFiles};
use crate::session::primary::Primary;
use crate::units::ids::{RandomError, SourceId, random_u64};
use crate::units::machine;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{ByteCount, CpNumber, SequenceNumber, VolumeNumber};
use crate::units::policy::{OnFull, Policy};
use crate::volume::mend::{Depth, MendFigures};

/// Pause before the first new try to reach the hub, and the longest.
const BACKOFF: Backoff = Backoff { least: Duration::from_millis(50), most: Duration::from_secs(2) };
/// Caches of the pool, of the 64 MiB that a source takes beside its NVRAM's size.
const CATALOG_CACHE_BYTES: u64 = 8 << 20;
const NODE_CACHE_BYTES: u64 = 24 << 20;
/// How often a checkpoint that waits looks whether the hub is still there.
const TICK: Duration = Duration::from_millis(20);
/// Id of an epoch at whose `TakeOver` a test cuts a filer off, behind what it publishes for it.
#[cfg(test)]
pub(crate) const CUT_TAKING_OVER: u64 = 0xc07;

/// A device of a source: where, and how large it is made.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// A file, made if it is missing; or a block device.
    pub path: PathBuf,
    /// Size of a file that is made, and what an existing one must have.
    pub size: ByteCount,
}

/// How a source runs.
#[derive(Debug, Clone)]
pub struct FilerOptions {
    /// Its name.
    pub name: SourceName,
    /// Where the hub listens; without TLS on this machine.
    pub hub: SocketAddr,
    /// How it is spoken to.
    pub tls: Option<Arc<SourceTls>>,
    /// How long the hub may be silent before the connection is made anew.
    pub hub_timeout: Duration,
    /// Its volumes.
    pub volumes: Vec<(VolumeName, ByteCount)>,
    /// The NVRAM: two partitions of half of it each. `size` counts the ring's data area.
    pub nvram: DeviceOptions,
    /// Commits go before every thread of an ordinary class, if they may.
    pub realtime: bool,
    /// The pool's devices.
    pub pool: PoolFiles,
    /// Time between two CPs.
    pub checkpoint_interval: Duration,
    /// What it promises.
    pub policy: Policy,
    /// Bytes a second that bringing the hub's image up may send; `None` for no bound.
    pub resync_limit: Option<ByteCount>,
    /// The NVRAM may be gone: what the hub holds is fetched.
    pub accept_lost_nvram: bool,
    /// The policy is in force at once, also where the hub knows of a stronger one.
    pub accept_untold_policy: bool,
    /// What a write gets that has no room in the pool.
    pub on_full: OnFull,
    /// How long a stop waits for the last CP.
    pub stop_timeout: Duration,
}

/// Why a source does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A device.
    #[error(transparent)]
    File(#[from] FileError),
    /// The pool's array.
    #[error("pool: {0}")]
    Array(#[from] FilesError),
    /// What is on the devices.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// No random numbers.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// A file has another size than configured.
    #[error("{path}: was made with {met} bytes, `{key}` asks for {wanted}", path = .path.display())]
    Size { path: PathBuf, key: &'static str, wanted: u64, met: u64 },
    /// Plain TCP leaves this machine.
    #[error("hub {0} is not on this machine: without TLS a source dials loopback only")]
    NotLoopback(SocketAddr),
    /// Fewer than one volume, or too many.
    #[error("a source has 1 to {max} volumes, not {met}")]
    Volumes { met: usize, max: usize },
    /// No thread, or the starting one panicked.
    #[error("cannot start: {0}")]
    Thread(String),
}

/// Why a checkpoint was not published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// The hub is lost (R20).
    #[error("the hub is lost: {0}")]
    HubLost(String),
    /// The source has failed.
    #[error("{0}")]
    Failed(Arc<str>),
    /// It is being stopped.
    #[error("the source is being stopped")]
    Stopped,
}

/// A running source.
#[derive(Debug)]
pub struct Filer {
    engine: Arc<ArcSwap<Engine>>,
    stop_timeout: Duration,
    stopping: CancellationToken,
    life: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// What runs of a source. One that was given back by its hub goes on with another (R14): those who
/// held on to the one before are refused there.
#[derive(Debug)]
struct Engine {
    shared: Arc<Shared>,
    checkpointer: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    fn start(shared: Arc<Shared>) -> Result<Arc<Self>, StartError> {
        let checkpointer = Checkpointer::new(Arc::clone(&shared));
        let checkpointer = machine::spawn("checkpoint", move || checkpointer.run())
            .map_err(|error| StartError::Thread(error.to_string()))?;
        Ok(Arc::new(Self { shared, checkpointer: Mutex::new(Some(checkpointer)) }))
    }

    /// Ends its threads; what is ordered is durable then, if its ring had room. Blocks.
    fn rest(&self) {
        self.shared.checkpoint.stop();
        let thread = self.checkpointer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic there was printed by its hook.
            drop(machine::join(thread));
        }
        if let Some(ring) = self.shared.ring() {
            ring.stop();
        }
    }
}

/// What a source with a hub needs to run, and to run again.
#[derive(Debug)]
struct Linked {
    forward: ForwardOptions,
    nvram: Store,
    settings: Settings,
}

/// How a source runs in a pool that is open already.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The source: row and volumes are in the pool.
    pub source: SourceId,
    /// How its bytes in the row are read and written.
    pub keeper: Arc<dyn Keeper>,
    /// The way to its hub; without one what is durable here is answered, and an own CP is
    /// complete.
    pub forward: Option<ForwardOptions>,
    /// What lies between the published CP and the first entry of the NVRAM, if anything does:
    /// whoever brings it publishes it and says so ([`Filer::settle`]).
    pub ground: Option<Ground>,
    /// Ring, and what it promises.
    pub settings: Settings,
    /// How long a stop waits for the last CP.
    pub stop_timeout: Duration,
    /// What it may have of the pool.
    pub space_limit: SpaceLimit,
}

/// How a source behaves, apart from its stores.
#[derive(Debug, Clone)]
pub(crate) struct Behaviour {
    pub(crate) wanted: Wanted,
    pub(crate) forward: ForwardOptions,
    pub(crate) stop_timeout: Duration,
}

impl Filer {
    /// Opens or makes the stores, recovers, and sets everything going. Clients are served once
    /// the hub was asked what it holds (R1).
    pub async fn start(options: FilerOptions) -> Result<Self, StartError> {
        if options.tls.is_none() && !options.hub.ip().is_loopback() {
            return Err(StartError::NotLoopback(options.hub));
        }
        let (met, max) = (options.volumes.len(), crate::limits::VOLUMES_PER_SOURCE_MAX);
        if met == 0 || met > max {
            return Err(StartError::Volumes { met, max });
        }
        let behaviour = Self::behaviour(&options)?;
        let (nvram, pool) = (options.nvram, options.pool);
        let opened = machine::blocking(move || {
            let area = ("nvram.size", HEADER_BYTES);
            let nvram = open_store(&nvram, area, Access::Direct, FileDevice::create)?;
            let pool = open_pool_store(&pool)?;
            Ok::<_, StartError>((nvram, pool))
        });
        let (nvram, pool) = joined(opened.await)??;
        Self::start_on(behaviour, nvram, pool).await
    }

    /// What the options say apart from the stores.
    pub(crate) fn behaviour(options: &FilerOptions) -> Result<Behaviour, StartError> {
        Ok(Behaviour {
            wanted: Wanted {
                name: options.name.clone(),
                volumes: options.volumes.clone(),
                policy: Policy { hub_timeout: options.hub_timeout, ..options.policy },
                checkpoint_interval: options.checkpoint_interval,
                accept_lost_nvram: options.accept_lost_nvram,
                accept_untold_policy: options.accept_untold_policy,
                on_full: options.on_full,
                ring: RingOptions::of("nvram", options.realtime),
                ring_shape: RingShape::default(),
                pool: PoolOptions {
                    catalog_cache_bytes: CATALOG_CACHE_BYTES,
                    node_cache_bytes: NODE_CACHE_BYTES,
                    ..PoolOptions::default()
                },
            },
            forward: ForwardOptions {
                hub: options.hub,
                tls: options.tls.clone(),
                backoff: BACKOFF,
                seed: random_u64()?,
                resync_limit: options.resync_limit,
            },
            stop_timeout: options.stop_timeout,
        })
    }

    /// Starts on open devices.
    pub(crate) async fn start_on(
        behaviour: Behaviour,
        nvram: Store,
        pool: Store,
    ) -> Result<Self, StartError> {
        let Behaviour { wanted, forward, stop_timeout } = behaviour;
        let settings = recover::settings_of(&wanted);
        let linked = Linked { forward, nvram: nvram.clone(), settings };
        let recovered = machine::blocking(move || recover::recover(&wanted, &nvram, &pool));
        let started = joined(recovered.await)??;
        Self::run(started, Some(linked), stop_timeout)
    }

    /// Starts in a pool that is open and that others use as well, on an NVRAM of its own. Without
    /// a hub clients are served when this returns.
    pub async fn start_in(
        pool: Arc<Pool>,
        nvram: Store,
        options: EngineOptions,
    ) -> Result<Self, StartError> {
        let EngineOptions { source, keeper, forward, ground, settings, space_limit, .. } = options;
        let sole = forward.is_none();
        let linked = forward.map(|forward| {
            let (nvram, settings) = (nvram.clone(), settings.clone());
            Linked { forward, nvram, settings }
        });
        let recovered = machine::blocking(move || {
            let guest = Guest { pool, source, keeper, sole, ground, space_limit };
            recover::recover_in(guest, &settings, &nvram)
        });
        let started = joined(recovered.await)??;
        if sole {
            // Nobody else holds anything of it.
            started.shared.serve(true);
        }
        Self::run(started, linked, options.stop_timeout)
    }

    /// Sets a recovered source going.
    fn run(
        started: Started,
        linked: Option<Linked>,
        stop_timeout: Duration,
    ) -> Result<Self, StartError> {
        let Started { shared, primary } = started;
        let engine = Engine::start(shared)?;
        let engine = Arc::new(ArcSwap::new(engine));
        let stopping = CancellationToken::new();
        let life = linked.map(|linked| {
            machine::task(live(linked, Arc::clone(&engine), primary, stopping.clone()))
        });
        Ok(Self { engine, stop_timeout, stopping, life: Mutex::new(life) })
    }

    /// What the file asks for from now on. The interval is taken at once; the policy comes into
    /// force behind the next CP, which is made for it (R20).
    pub fn reload(&self, policy: Policy, checkpoint_interval: Duration) {
        let shared = self.shared();
        shared.pledge.want(policy, checkpoint_interval);
        shared.checkpoint.look_again();
    }

    /// Sizes that the file asks for from now on: a larger one is taken behind the next CP, which is
    /// made for it.
    pub fn grow(&self, volumes: Vec<(VolumeName, ByteCount)>) {
        self.shared().want_sizes(volumes);
    }

    /// How long a hub that is away is waited for.
    fn patience(&self) -> Duration {
        let shared = self.shared();
        if shared.sole { Duration::ZERO } else { shared.pledge.patience() }
    }

    /// The parts that run now.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.engine.load().shared)
    }

    /// Its volumes, for the NBD server.
    pub fn exports(&self) -> Arc<SourceExports> {
        let engine = Arc::clone(&self.engine);
        let current = Box::new(move || Arc::clone(&engine.load().shared));
        Arc::new(SourceExports::new(current, self.stopping.clone()))
    }

    /// Waits until clients are served, or the source stops.
    pub async fn served(&self) {
        loop {
            // Another engine may be the one that serves, after a failback.
            let mut serving = self.shared().serving.subscribe();
            tokio::select! {
                biased;
                served = tokio::time::timeout(TICK, serving.wait_for(|serving| *serving)) => {
                    if let Ok(Ok(_)) = served {
                        return;
                    }
                }
                () = self.stopping.cancelled() => return,
            }
        }
    }

    /// Makes a CP of everything that was ordered before this call, unless there is nothing to
    /// say, and returns number and roots when both ends have published it.
    pub fn checkpoint(
        &self,
    ) -> impl Future<Output = Result<(CpNumber, Roots), CheckpointError>> + Send + 'static {
        let (shared, patience) = (self.shared(), self.patience());
        async move { published::newest(&shared, patience).await }
    }

    /// Reads every block of the newest common CP at both ends and compares the roots. `progress` is
    /// told volume, blocks passed and blocks in all of this end's reading.
    pub fn verify(
        &self,
        progress: impl FnMut(VolumeNumber, u64, u64) + Send + Clone + 'static,
    ) -> impl Future<Output = Result<Verification, VerifyError>> + Send + 'static {
        let shared = self.shared();
        async move { verify::verify(&shared, progress).await }
    }

    /// A CP of everything that was ordered before this call, with a number above `floor`, be it of
    /// nothing.
    pub async fn checkpoint_above(
        &self,
        floor: CpNumber,
    ) -> Result<(CpNumber, Roots), CheckpointError> {
        let shared = self.shared();
        let mut common = shared.common.subscribe();
        loop {
            let (cp, roots) = published::newest(&shared, self.patience()).await?;
            if cp > floor {
                return Ok((cp, roots));
            }
            // Counts while nothing is in the open interval; it is tried until that is so.
            shared.order.raise_cp(floor.next());
            shared.checkpoint.force();
            drop(tokio::time::timeout(TICK, common.changed()).await);
        }
    }

    /// What lay beneath is published: readers go to the tree, and CPs begin. Does nothing if
    /// nothing lies there. Blocks.
    pub fn settle(&self) -> Result<(), PoolError> {
        let shared = self.shared();
        let pins = pin_all(&shared)?;
        let roots = pins.iter().map(|(volume, pin)| (*volume, pin.tree().root())).collect();
        shared.settle(roots, pins);
        Ok(())
    }

    /// Writers wait from now on, whatever room there is; what is ordered goes on. Who hands over
    /// lets them go on, or stops the source.
    pub fn hold(&self, held: bool) {
        self.shared().order.hold(held);
    }

    /// The last entry that was ordered.
    pub fn last(&self) -> SequenceNumber {
        self.shared().order.figures().sequence
    }

    /// What rotted in its pool.
    pub fn rot(&self) -> MendFigures {
        self.shared().mender.figures(|_| true)
    }

    /// Reads all of the newest own CP and mends what cannot be read. Blocks.
    pub fn mend_all(&self) -> impl FnOnce() + Send + 'static {
        let shared = self.shared();
        move || {
            for pin in shared.pins().values() {
                if let Err(error) = mending::mend_pin(&shared, pin, Depth::Data) {
                    tracing::warn!(source = %shared.name, %error, "not mended");
                }
            }
        }
    }

    /// Its pool, for checks and metrics.
    pub fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.shared().pool)
    }

    /// What it says about itself.
    pub fn status(&self) -> Status {
        status::status(&self.shared())
    }

    /// Stops cleanly: no new request, what is ordered is made durable, the last CP is published if
    /// the hub is there, the hub hears good-bye, the ring's header knows everything. Returns
    /// whether the last CP was published. Does nothing the second time.
    pub async fn stop(&self) -> Result<(), CheckpointError> {
        self.stopping.cancel();
        let engine = self.engine.load_full();
        let shared = Arc::clone(&engine.shared);
        shared.order.refuse(Refusal::Stopped);
        let published = if shared.fenced().is_some() {
            // Nothing is acknowledged any more, and nobody may be there to write it.
            Ok(())
        } else {
            let last = shared.order.figures().sequence;
            shared.completion.own_reached(last).await;
            let published =
                tokio::time::timeout(self.stop_timeout, self.last_checkpoint(&shared)).await;
            let late = || CheckpointError::HubLost("no CP in time".to_owned());
            published.unwrap_or_else(|_| Err(late()))
        };
        shared.completion.refuse(Refusal::Stopped);
        shared.session.stop();
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(life) = life {
            // A panic there was reported by the runtime.
            drop(life.await);
        }
        drop(machine::blocking(move || engine.rest()).await);
        published
    }

    async fn last_checkpoint(&self, shared: &Arc<Shared>) -> Result<(), CheckpointError> {
        if !shared.is_serving() {
            return Ok(());
        }
        if shared.is_grounded() {
            let reason = "the log beneath is not applied yet: what was written stays in the NVRAM";
            return Err(CheckpointError::Failed(reason.into()));
        }
        let reached = shared.completion.wait(shared.order.figures().sequence);
        if shared.is_connected() {
            // What it says does not matter: the checkpoint below fails if the hub is gone.
            drop(tokio::time::timeout(self.patience(), reached).await);
        }
        if shared.pass().is_some() {
            // It is resumed by the next start, however long it takes.
            let reason = "the hub lacks what was acknowledged without it".to_owned();
            return Err(CheckpointError::HubLost(reason));
        }
        // A hub that is not there now is not waited for.
        published::newest(shared, Duration::ZERO).await.map(|_| ())
    }
}

impl Drop for Filer {
    /// Without a stop nothing is drained; what is durable is recovered at the next start.
    fn drop(&mut self) {
        self.stopping.cancel();
        let shared = self.shared();
        shared.order.refuse(Refusal::Stopped);
        shared.completion.refuse(Refusal::Stopped);
        shared.session.stop();
        shared.checkpoint.stop();
    }
}

/// The life of a source with a hub: primary; once fenced a follower; primary again when the hub has
/// given the volumes back (R14).
async fn live(
    linked: Linked,
    engine: Arc<ArcSwap<Engine>>,
    mut primary: Primary,
    stopping: CancellationToken,
) {
    loop {
        let now = engine.load_full();
        let forwarder = Forwarder::new(Arc::clone(&now.shared), linked.forward.clone(), primary);
        forwarder.run().await;
        if stopping.is_cancelled() {
            return;
        }
        let Some(source) = follow_on(&linked, &now, &stopping).await else { return };
        match start_again(&linked, &now, source).await {
            Ok((next, machine)) => {
                primary = machine;
                engine.store(Arc::clone(&next));
                if stopping.is_cancelled() {
                    // Whoever stops may have looked before.
                    let rest = move || next.rest();
                    drop(machine::blocking(rest).await);
                    return;
                }
            }
            Err(error) => {
                let reason = format!("the volumes were given back, but cannot be served: {error}");
                now.shared.fail(&reason);
                return;
            }
        }
    }
}

/// What a source does whose way to the hub has ended: it follows, if it is fenced or new. The
/// source that it is then; nothing if it stops before.
async fn follow_on(
    linked: &Linked,
    now: &Arc<Engine>,
    stopping: &CancellationToken,
) -> Option<SourceId> {
    let resting = Arc::clone(now);
    let idle = Idle {
        shared: Arc::clone(&now.shared),
        forward: linked.forward.clone(),
        nvram: linked.nvram.clone(),
        ring_shape: linked.settings.ring_shape,
        rest: Box::new(move || resting.rest()),
        stopping: stopping.clone(),
    };
    if now.shared.fenced().is_some() {
        return follow::run(idle).await.then_some(now.shared.source);
    }
    if now.shared.is_newcomer() {
        return newcomer::run(idle).await;
    }
    None
}

/// A new engine on what the one before has left.
async fn start_again(
    linked: &Linked,
    before: &Arc<Engine>,
    source: SourceId,
) -> Result<(Arc<Engine>, Primary), StartError> {
    let shared = Arc::clone(&before.shared);
    let terms = shared.pledge.terms();
    let settings = Settings {
        policy: terms.wanted,
        checkpoint_interval: terms.interval,
        ..linked.settings.clone()
    };
    let nvram = linked.nvram.clone();
    let recover = move || recover::again(&shared, source, &settings, &nvram);
    let recovered = machine::blocking(recover);
    let Started { shared, primary } = joined(recovered.await)??;
    Ok((Engine::start(shared)?, primary))
}

/// Waits until everything beneath is in a tree: no CP is complete before.
async fn settled(shared: &Shared) -> Result<(), CheckpointError> {
    while shared.is_grounded() {
        if let Some(failed) = shared.failed() {
            return Err(CheckpointError::Failed(failed));
        }
        if shared.session.stopping() {
            return Err(CheckpointError::Stopped);
        }
        // Looked at again now and then: it may have gone between the look and the wait.
        drop(tokio::time::timeout(TICK, shared.grounded.notified()).await);
    }
    Ok(())
}

fn joined<T>(result: Result<T, machine::Gone>) -> Result<T, StartError> {
    result.map_err(|error| StartError::Thread(error.to_string()))
}

/// Opens the pool of an array, or of one plain file or block device, or makes it.
fn open_pool_store(files: &PoolFiles) -> Result<Store, StartError> {
    let Some((path, size)) = files.as_plain() else {
        let (opened, new) = files.open_or_create()?;
        return Ok(Store { device: opened.array, new });
    };
    let options = DeviceOptions { path: path.clone(), size: *size };
    open_store(&options, ("pool.devices", 0), Access::Cached, FileDevice::create_unwritten)
}

/// Opens a file or block device, or makes the file: as large as the key says and its headers.
fn open_store(
    options: &DeviceOptions,
    (key, header_bytes): (&'static str, u64),
    access: Access,
    create: fn(&std::path::Path, ByteCount, Access) -> Result<FileDevice, FileError>,
) -> Result<Store, StartError> {
    let path = &options.path;
    let size = ByteCount(options.size.0 + header_bytes);
    let (device, new) = match FileDevice::open(path, access) {
        Ok(device) => (device, false),
        Err(FileError::Missing(_)) => {
            create_parent(path)?;
            (create(path, size, access)?, true)
        }
        Err(error) => return Err(error.into()),
    };
    let met = device.size().0;
    if met < size.0 || !new && met != size.0 && path.is_file() {
        let (wanted, met) = (options.size.0, met.saturating_sub(header_bytes));
        return Err(StartError::Size { path: path.clone(), key, wanted, met });
    }
    Ok(Store { device: Arc::new(Latch::new(device)), new })
}
