//! Sources that this hub serves itself: promoted images, run by the engine of a filer.
//!
//! Each has an NVRAM of its own, `data_dir/promoted/SOURCEID.nvram`, and shares the hub's pool
//! with everybody. There is no hub behind it: a write is answered when that NVRAM holds it, a CP
//! is complete when it is published in the pool.
//!
//! Called at the hub's start for every source whose row says `promoted`, and by failover and
//! failback. Invariants: an engine runs only while the row says `promoted`; the NVRAM's name is
//! durable, then that it was made, then the first write is answered; one that was made and is gone
//! is never made anew. A source that cannot be started keeps nobody else from it (invariant 10).
//!
//! The row's extension is the hub's ([`extension`](super::extension)): a CP of the engine changes
//! the place in it and nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::extension::{Extension, State};
use super::lane::lock;
use crate::device::file::FileError;
use crate::filer::beneath::Ground;
use crate::filer::keeper::{Keeper, KeeperError, Kept};
use crate::filer::nvram_file::{self, NvramFileError};
use crate::filer::promise::SpaceLimit;
use crate::filer::recover::{Settings, Store};
use crate::filer::{CheckpointError, EngineOptions, Filer, StartError};
use crate::nvlog::{RingOptions, RingShape};
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::rows::SourceRow;
use crate::units::ids::{HubId, SourceId};
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::numbers::{BlockCount, ByteCount};
use crate::units::policy::{OnFull, Policy};

/// How long a start waits for the NVRAM of an engine that was stopped before, and between two looks.
const LET_GO_MAX: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How promoted sources run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromotedOptions {
    /// Bytes of a new NVRAM: two partitions of half of it each.
    pub nvram_size: ByteCount,
    /// Commits go before every thread of an ordinary class, if they may.
    pub realtime: bool,
    /// Time between two CPs.
    pub checkpoint_interval: Duration,
    /// How long a stop waits for the last CP.
    pub stop_timeout: Duration,
}

impl Default for PromotedOptions {
    fn default() -> Self {
        Self {
            nvram_size: ByteCount(64 << 20),
            realtime: false,
            checkpoint_interval: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(30),
        }
    }
}

/// Why a promoted source is not served.
#[derive(Debug, thiserror::Error)]
pub enum PromotedError {
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Its NVRAM's file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The engine.
    #[error(transparent)]
    Start(#[from] StartError),
    /// No such row.
    #[error("the pool has no source {0}")]
    Unknown(SourceId),
    /// Its bytes in the catalog.
    #[error("{0}")]
    Row(String),
    /// Somebody else serves it.
    #[error("source {name} is {state} here, not promoted")]
    NotPromoted { name: SourceName, state: &'static str },
    /// Its NVRAM is needed.
    #[error("source {name} is {state} here: its NVRAM stays")]
    StillServed { name: SourceName, state: &'static str },
    /// The NVRAM was made and is gone.
    #[error(
        "source {name}: {path} is gone; acknowledged writes that only this NVRAM held are lost \
         with it", path = .path.display()
    )]
    NvramGone { name: SourceName, path: PathBuf },
    /// It was gone, and an administrator has named the other side.
    #[error(
        "source {name}: its NVRAM was gone, and what was served here is given up for what its filer \
         has: `mirrorhub failback {name} --keep source` again"
    )]
    GivenUp { name: SourceName },
    /// The hub stops.
    #[error("the hub is stopping: its next start serves it")]
    Stopping,
    /// The panic of a helping thread.
    #[error("cannot start: {0}")]
    Thread(String),
}

impl PromotedError {
    /// Whether it is the NVRAM that is gone, or of no use: what only that held cannot be served.
    fn is_of_nvram(&self) -> bool {
        match self {
            Self::NvramGone { .. } | Self::GivenUp { .. } => true,
            // One that somebody has open is there.
            Self::File(error) => !matches!(error, FileError::Busy(_)),
            Self::Start(StartError::Recover(error)) => error.is_of_nvram(),
            Self::Pool(_)
            | Self::Start(_)
            | Self::Unknown(_)
            | Self::Row(_)
            | Self::NotPromoted { .. }
            | Self::StillServed { .. }
            | Self::Stopping
            | Self::Thread(_) => false,
        }
    }
}

/// The hub's rows, for an engine that runs on one.
#[derive(Debug, Clone, Copy)]
pub struct HubKeeper {
    hub: HubId,
}

impl HubKeeper {
    /// For the rows of that hub.
    pub fn new(hub: HubId) -> Self {
        Self { hub }
    }
}

impl Keeper for HubKeeper {
    fn read(&self, row: &SourceRow) -> Result<Kept, KeeperError> {
        let Extension { transfer, nvram_made, .. } = Extension::of(row).map_err(KeeperError)?;
        Ok(Kept { nvram_made, hub: Some(self.hub), transfer, ..Kept::default() })
    }

    fn write(&self, row: &SourceRow, kept: &Kept) -> Result<Vec<u8>, KeeperError> {
        let before = Extension::of(row).map_err(KeeperError)?;
        // Over a log that is not applied nothing is published, but an NVRAM is made.
        let over_log = before.serving.is_some() && kept.transfer == before.transfer;
        if before.state != State::Promoted && !over_log {
            let state = before.state.word();
            return Err(KeeperError(format!("source {} is {state} here by now", row.name)));
        }
        let Kept { nvram_made, transfer, .. } = *kept;
        Ok(Extension { transfer, nvram_made, ..before }.encode())
    }
}

/// How it stands with a promoted source.
#[derive(Debug, Clone)]
pub enum Engine {
    /// It runs.
    Running(Arc<Filer>),
    /// It did not start: why.
    Failed(Arc<str>),
}

/// What a source may have of the pool, asked by its name at any time.
pub struct Limits(Arc<Ask>);

type Ask = dyn Fn(&SourceName) -> Option<BlockCount> + Send + Sync;

impl Limits {
    /// As `ask` says.
    pub fn new(ask: impl Fn(&SourceName) -> Option<BlockCount> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }

    fn of(&self, name: &SourceName) -> SpaceLimit {
        let (ask, name) = (Arc::clone(&self.0), name.clone());
        SpaceLimit::new(move || ask(&name))
    }
}

impl fmt::Debug for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limits").finish_non_exhaustive()
    }
}

/// All promoted sources of a hub.
#[derive(Debug)]
pub struct Promoted {
    directory: PathBuf,
    options: PromotedOptions,
    hub: HubId,
    pool: Arc<Pool>,
    limits: Limits,
    engines: Mutex<BTreeMap<SourceName, Engine>>,
    /// Those of them that did not start for want of their NVRAM, and whether that was gone.
    nvram_lost: Mutex<BTreeMap<SourceName, bool>>,
    /// Starts and stops come one after the other.
    turn: tokio::sync::Mutex<()>,
    /// All were stopped, with the hub: what a failover ends with behind that starts nothing. Set and
    /// read in a turn.
    stopping: AtomicBool,
    /// NVRAM of a simulation, by path.
    #[cfg(test)]
    pub(super) simulated: std::sync::OnceLock<super::simulation::Nvrams>,
}

impl Promoted {
    /// None runs yet.
    pub fn new(
        data_dir: &Path,
        options: PromotedOptions,
        hub: HubId,
        (pool, limits): (Arc<Pool>, Limits),
    ) -> Self {
        let (engines, nvram_lost) = (Mutex::default(), Mutex::default());
        let turn = tokio::sync::Mutex::default();
        let directory = directory_in(data_dir);
        Self {
            directory,
            options,
            hub,
            pool,
            limits,
            engines,
            nvram_lost,
            turn,
            stopping: AtomicBool::new(false),
            #[cfg(test)]
            simulated: std::sync::OnceLock::new(),
        }
    }

    /// Starts every source whose row says that it is promoted. One that does not start is told
    /// about by [`Promoted::engine`].
    pub async fn start_all(&self) -> Result<(), PromotedError> {
        for row in self.pool.catalog().sources()? {
            if Extension::of(&row).is_ok_and(|extension| extension.state == State::Promoted)
                && let Err(error) = self.start(row.id).await
            {
                tracing::error!(source = %row.name, %error, "a promoted source is not served");
            }
        }
        Ok(())
    }

    /// Serves a source whose row says that it is promoted. Returns the engine that runs already,
    /// if one does.
    pub async fn start(&self, source: SourceId) -> Result<Arc<Filer>, PromotedError> {
        self.start_over(source, None).await
    }

    /// The same over a ground: of a source that fails over, whose row says under which CP its log
    /// will be published.
    pub async fn start_over(
        &self,
        source: SourceId,
        ground: Option<Ground>,
    ) -> Result<Arc<Filer>, PromotedError> {
        let _turn = self.turn.lock().await;
        if self.stopping.load(Ordering::Relaxed) {
            return Err(PromotedError::Stopping);
        }
        let row = self.pool.catalog().source(source)?.ok_or(PromotedError::Unknown(source))?;
        if let Some(Engine::Running(engine)) = self.engine(&row.name) {
            return Ok(engine);
        }
        let name = row.name.clone();
        let started = self.start_engine(row, ground).await.map(Arc::new);
        let engine = match &started {
            Ok(engine) => Engine::Running(Arc::clone(engine)),
            Err(error) => Engine::Failed(error.to_string().into()),
        };
        match &started {
            Err(error) if error.is_of_nvram() => {
                let gone = matches!(error, PromotedError::NvramGone { .. });
                lock(&self.nvram_lost).insert(name.clone(), gone);
            }
            Ok(_) | Err(_) => drop(lock(&self.nvram_lost).remove(&name)),
        }
        lock(&self.engines).insert(name, engine);
        started
    }

    async fn start_engine(
        &self,
        row: SourceRow,
        ground: Option<Ground>,
    ) -> Result<Filer, PromotedError> {
        let extension = Extension::of(&row).map_err(PromotedError::Row)?;
        let wanted = match &ground {
            None => extension.state == State::Promoted,
            Some(ground) => extension.serving == Some(ground.cp),
        };
        if !wanted {
            let state = extension.state.word();
            return Err(PromotedError::NotPromoted { name: row.name, state });
        }
        if extension.own {
            return Err(PromotedError::GivenUp { name: row.name });
        }
        let source = row.id;
        let (path, size) = (self.nvram_path(source), self.options.nvram_size);
        let (begun, made) = (machine::now(), extension.nvram_made);
        let nvram = loop {
            match self.nvram(path.clone(), size, made).await? {
                // Clients of an engine that was stopped just now are still on their way out.
                Err(NvramFileError::File(FileError::Busy(_)))
                    if machine::elapsed(begun) < LET_GO_MAX =>
                {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Err(NvramFileError::File(error)) => return Err(error.into()),
                Err(NvramFileError::Gone(path)) => {
                    return Err(PromotedError::NvramGone { name: row.name, path });
                }
                Ok(opened) => break opened,
            }
        };
        let options = EngineOptions {
            source,
            keeper: Arc::new(HubKeeper::new(self.hub)),
            forward: None,
            ground,
            settings: Settings {
                policy: Policy::default(),
                checkpoint_interval: self.options.checkpoint_interval,
                accept_lost_nvram: false,
                accept_untold_policy: false,
                on_full: OnFull::Wait,
                ring: RingOptions::of("promoted", self.options.realtime),
                ring_shape: RingShape::default(),
            },
            stop_timeout: self.options.stop_timeout,
            space_limit: self.limits.of(&row.name),
        };
        Ok(Filer::start_in(Arc::clone(&self.pool), nvram, options).await?)
    }

    /// Opens the NVRAM of a source, or makes it.
    async fn nvram(
        &self,
        path: PathBuf,
        size: ByteCount,
        made: bool,
    ) -> Result<Result<Store, NvramFileError>, PromotedError> {
        #[cfg(test)]
        if let Some(nvrams) = self.simulated.get() {
            return Ok(Ok(nvrams.open(path, size)));
        }
        let opened = machine::blocking(move || nvram_file::open(&path, size, made));
        opened.await.map_err(|error| PromotedError::Thread(error.to_string()))
    }

    /// Stops serving a source; what is acknowledged is in its NVRAM, and in a CP if this says so.
    pub async fn stop(&self, name: &SourceName) -> Result<(), CheckpointError> {
        let _turn = self.turn.lock().await;
        let engine = lock(&self.engines).remove(name);
        match engine {
            Some(Engine::Running(engine)) => engine.stop().await,
            Some(Engine::Failed(reason)) => Err(CheckpointError::Failed(reason)),
            None => Ok(()),
        }
    }

    /// Removes the NVRAM of a source that is not this hub's any more: what it holds is of a line
    /// that has ended, and would be in the way of the next promotion. Everything acknowledged is
    /// in a CP by then ([`Promoted::stop`] said so). Does nothing if there is none. Blocks.
    pub fn retire(&self, source: SourceId) -> Result<(), PromotedError> {
        let row = self.pool.catalog().source(source)?.ok_or(PromotedError::Unknown(source))?;
        let state = Extension::of(&row).map_err(PromotedError::Row)?.state;
        if matches!(state, State::Promoted | State::FailingOver) || self.engine(&row.name).is_some()
        {
            return Err(PromotedError::StillServed { name: row.name, state: state.word() });
        }
        let path = self.nvram_path(source);
        #[cfg(test)]
        if let Some(nvrams) = self.simulated.get() {
            nvrams.remove(&path);
            return Ok(());
        }
        Ok(nvram_file::remove(&path)?)
    }

    /// Stops all of them, with the hub; none starts any more.
    pub async fn stop_all(&self) {
        let turn = self.turn.lock().await;
        self.stopping.store(true, Ordering::Relaxed);
        drop(turn);
        let names: Vec<SourceName> = lock(&self.engines).keys().cloned().collect();
        for name in names {
            if let Err(error) = self.stop(&name).await {
                tracing::warn!(source = %name, %error, "stopped without a last CP");
            }
        }
    }

    /// Whether the NVRAM that was made for a source is not there: for sure. Blocks.
    fn nvram_is_gone(&self, source: SourceId) -> bool {
        matches!(self.nvram_path(source).try_exists(), Ok(false))
    }

    /// Whether a source is not served for want of its NVRAM: it is gone, and still is, or cannot be
    /// used. Blocks.
    pub fn lacks_nvram(&self, source: SourceId, name: &SourceName) -> bool {
        if !matches!(self.engine(name), Some(Engine::Failed(_))) {
            return false;
        }
        // One that was put back is for a restart of the hub to look at.
        let gone = lock(&self.nvram_lost).get(name).copied();
        gone.is_some_and(|gone| !gone || self.nvram_is_gone(source))
    }

    /// Puts the NVRAM of a source that is not served for want of it out of the way, under another
    /// name, for whoever can still read it. Returns that, if there was a file. Blocks.
    pub fn set_nvram_aside(&self, source: SourceId) -> Result<Option<PathBuf>, PromotedError> {
        let path = self.nvram_path(source);
        #[cfg(test)]
        if let Some(nvrams) = self.simulated.get() {
            nvrams.remove(&path);
            return Ok(None);
        }
        Ok(nvram_file::set_aside(&path)?)
    }

    /// How it stands with that source, if it is one of these.
    pub fn engine(&self, name: &SourceName) -> Option<Engine> {
        lock(&self.engines).get(name).cloned()
    }

    /// Where a source's NVRAM is.
    pub fn nvram_path(&self, source: SourceId) -> PathBuf {
        nvram_in(&self.directory, source)
    }
}

/// Where the NVRAMs of all promoted sources of a hub with that `data_dir` are.
pub(super) fn directory_in(data_dir: &Path) -> PathBuf {
    data_dir.join("promoted")
}

/// That of one, in there.
pub(super) fn nvram_in(directory: &Path, source: SourceId) -> PathBuf {
    directory.join(format!("{source}.nvram"))
}
