//! The sources that live on this filer beside its own, because their hub has asked for it (R14).
//!
//! Each is an engine of its own on the filer's pool, with the source's identity, its own connection
//! to the hub and an NVRAM of its own, `data_dir/homes/SOURCEID.nvram`; its rows are in the filer's
//! catalog, so that a start finds it again. Its clients use the names they used before.
//!
//! How one comes here, and what a cut leaves:
//!
//! 1. `Adopt` came over the filer's own session. Its fields, the room in the pool and whose it is
//!    are looked at; what does not fit is refused with a reason. A cut: nothing.
//! 2. rows are made, fenced: it serves nobody. A cut: rows without an NVRAM and without a CP; the
//!    next start takes them away, and the command is given again.
//! 3. the NVRAM is made, written from end to end, and the row says so. A cut: it lives here, empty
//!    and fenced, and follows.
//! 4. `Adopted`; it follows. From here on it is a fenced source like any other (`follow`): pulled
//!    up, and primary only by `TakeOver`.
//!
//! One that does not start keeps neither the filer's own volumes nor another one from it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::adopt::{self, AdoptError};
use super::export::SourceExports;
use super::forwarder::ForwardOptions;
use super::keeper::{FilerKeeper, Keeper, KeeperError, Kept};
use super::nvram_file::{self, NvramFileError};
use super::promise::SpaceLimit;
use super::recover::Settings;
use super::status::Status;
use super::{BACKOFF, EngineOptions, Filer, FilerOptions, StartError};
use crate::device::file::FileError;
use crate::nbd::export::{Exports, Listed, OpenError, OpenFuture};
use crate::nvlog::{RingOptions, RingShape};
use crate::pool::error::PoolError;
use crate::pool::rows::SourceRow;
use crate::units::ids::{RandomError, SourceId, random_u64};
use crate::units::machine;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::ByteCount;
use crate::units::policy::Policy;
use crate::volume::mend::MendFigures;
use crate::wire::homes::{Adopt, Adopted};

/// Sources that may live on one filer beside its own.
const HOMES_MAX: usize = 64;

/// Why a source does not live here.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Rows or room.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The row of one that lives here.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// Its NVRAM.
    #[error("its NVRAM: {0}")]
    Nvram(#[from] NvramFileError),
    /// Its NVRAM could not be taken away again.
    #[error("its NVRAM: {0}")]
    File(#[from] FileError),
    /// The engine.
    #[error(transparent)]
    Start(#[from] StartError),
    /// No random numbers.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The hub is not the filer's.
    #[error("the hub that asks is not the hub of this filer")]
    OtherHub,
    /// The name is taken.
    #[error("{0} lives here already, as another source")]
    Taken(SourceName),
    /// It is served here.
    #[error("{0} lives here already, and is primary")]
    Primary(SourceName),
    /// It is here and did not start.
    #[error("{name} lives here and cannot be served: {reason}")]
    Broken { name: SourceName, reason: Arc<str> },
    /// Too many.
    #[error("{HOMES_MAX} other sources live here already")]
    TooMany,
    /// A helping thread.
    #[error("cannot start: {0}")]
    Thread(String),
}

impl HomeError {
    fn next_step(&self) -> &'static str {
        match self {
            Self::Adopt(AdoptError::NoRoom { .. }) | Self::TooMany => {
                "name a filer with more room, or drop kept CPs there"
            }
            Self::Nvram(_) | Self::File(_) => "make room in its data_dir, or name another filer",
            Self::Primary(_) => "see `mirrorhub status` on the hub and on that filer",
            Self::Broken { .. } => "mend the cause and restart that filer",
            Self::OtherHub | Self::Taken(_) => "name another filer",
            Self::Pool(_)
            | Self::Adopt(_)
            | Self::Keeper(_)
            | Self::Start(_)
            | Self::Random(_)
            | Self::Thread(_) => "see the log of that filer",
        }
    }
}

/// How large volumes are to be, by their source.
pub type Sizes = BTreeMap<SourceName, Vec<(VolumeName, ByteCount)>>;

/// A volume that is not as the file wants it, and does not come to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// There is none of that name.
    NoVolume { source: SourceName, volume: VolumeName },
    /// It is larger, and does not become smaller.
    Larger { source: SourceName, volume: VolumeName, met: ByteCount, wanted: ByteCount },
}

/// What became of the promises of those that live here when the file was read again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// They keep the new one, behind their next CP.
    pub changed: Vec<SourceName>,
    /// They go on as they promised before, and why.
    pub kept: Vec<(SourceName, String)>,
}

impl Reloaded {
    /// What a later start here goes by: the file, but for those whose older promise stands.
    fn stand(&self, asked: &mut BTreeMap<SourceName, Policy>, file: &BTreeMap<SourceName, Policy>) {
        let mut next = file.clone();
        for (name, _) in &self.kept {
            match asked.get(name) {
                Some(before) => next.insert(name.clone(), *before),
                None => next.remove(name),
            };
        }
        *asked = next;
    }

    /// What an administrator is to know, if not all is as the file says.
    pub fn problem(&self) -> Option<String> {
        if self.kept.is_empty() {
            return None;
        }
        let kept = self.kept.iter().map(|(name, why)| format!("{name} ({why})"));
        let kept = kept.collect::<Vec<_>>().join(", ");
        let changed = self.changed.iter().map(SourceName::as_str).collect::<Vec<_>>().join(", ");
        let changed = if changed.is_empty() { "none".to_owned() } else { changed };
        Some(format!(
            "[[home]]: the older promise stays in force for {kept}; the new one is in force, behind \
             the next CP, for: {changed}"
        ))
    }
}

/// How it stands with a source that lives here.
#[derive(Debug, Clone)]
pub enum Home {
    /// Its engine runs.
    Running(Arc<Filer>),
    /// It did not start: why.
    Failed(Arc<str>),
}

/// The sources that live on a filer beside its own.
#[derive(Debug)]
pub struct Homes {
    own: Arc<Filer>,
    options: FilerOptions,
    directory: PathBuf,
    homes: Mutex<BTreeMap<SourceName, Home>>,
    /// What the filer's file wants of them.
    policies: Mutex<BTreeMap<SourceName, Policy>>,
    /// How large it wants volumes of theirs.
    sizes: Mutex<Sizes>,
    stopping: CancellationToken,
    life: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl Homes {
    /// Starts those whose rows are in the filer's pool, and answers the hub from now on.
    pub async fn start(
        own: Arc<Filer>,
        options: FilerOptions,
        directory: PathBuf,
        (policies, sizes): (BTreeMap<SourceName, Policy>, Sizes),
    ) -> Result<Arc<Self>, HomeError> {
        let (homes, policies, sizes) = (Mutex::default(), Mutex::new(policies), Mutex::new(sizes));
        let (stopping, life) = (CancellationToken::new(), Mutex::default());
        let this =
            Arc::new(Self { own, options, directory, homes, policies, sizes, stopping, life });
        let (pool, own) = (this.own.pool(), this.own.shared());
        for row in pool.catalog().sources()? {
            // A new filer has its own row under another id than the pool's until it has a name.
            if row.id == own.source || row.id == own.filer() {
                continue;
            }
            let name = row.name.clone();
            if let Err(error) = this.start_home(row).await {
                tracing::error!(source = %name, %error, "it lives here and is not served");
                this.lock().insert(name, Home::Failed(error.to_string().into()));
            }
        }
        // Whoever has let go of the homes lets go of this task.
        let (answering, stopping) = (Arc::downgrade(&this), this.stopping.clone());
        let mut offers = own.offers.subscribe();
        let life = tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = stopping.cancelled() => return,
                    changed = offers.changed() => if changed.is_err() { return },
                }
                let asked = offers.borrow_and_update().clone();
                let Some(homes) = answering.upgrade() else { return };
                if let Some(adopt) = asked {
                    homes.answer(adopt).await;
                }
            }
        });
        *this.life.lock().unwrap_or_else(PoisonError::into_inner) = Some(life);
        Ok(this)
    }

    /// Those that live here, by name.
    pub fn all(&self) -> Vec<(SourceName, Home)> {
        self.lock().iter().map(|(name, home)| (name.clone(), home.clone())).collect()
    }

    /// One of them.
    pub fn get(&self, name: &SourceName) -> Option<Home> {
        self.lock().get(name).cloned()
    }

    /// What those that run say about themselves.
    pub fn statuses(&self) -> Vec<Status> {
        self.running().map(|filer| filer.status()).collect()
    }

    fn running(&self) -> impl Iterator<Item = Arc<Filer>> {
        let running = |(_, home)| match home {
            Home::Running(filer) => Some(filer),
            Home::Failed(_) => None,
        };
        self.all().into_iter().filter_map(running)
    }

    /// The filer's file was read again: another time between two CPs, and what those shall promise
    /// that it names (R20: behind the next CP). One that it does not name goes on as it promised, and
    /// so does one whose new promise cannot be kept durably; the others are told all the same.
    pub fn reload(
        &self,
        checkpoint_interval: Duration,
        policies: &BTreeMap<SourceName, Policy>,
    ) -> Reloaded {
        let mut all = Reloaded::default();
        for filer in self.running() {
            let shared = filer.shared();
            let before = shared.pledge.terms().wanted;
            let wanted = policies.get(&shared.name).copied().unwrap_or(before);
            // Also what a start goes by that does not find it in the file any more.
            let noted = match wanted == before {
                true => Ok(()),
                false => shared.note(|kept| kept.guest = Some(wanted)),
            };
            let now = if noted.is_ok() { wanted } else { before };
            filer.reload(now, checkpoint_interval);
            match noted {
                Ok(()) if wanted == before => {}
                Ok(()) => all.changed.push(shared.name.clone()),
                Err(error) => all.kept.push((shared.name.clone(), error.to_string())),
            }
        }
        let mut asked = self.policies.lock().unwrap_or_else(PoisonError::into_inner);
        all.stand(&mut asked, policies);
        all
    }

    /// Sizes that the file asks for from now on: a larger one is taken behind the next CP of that source,
    /// which is made for it. The hub takes it as its own file of that source says.
    pub fn grow(&self, sizes: Sizes) {
        for filer in self.running() {
            let name = filer.shared().name.clone();
            filer.grow(sizes.get(&name).cloned().unwrap_or_default());
        }
        *self.sizes.lock().unwrap_or_else(PoisonError::into_inner) = sizes;
    }

    /// What of such sizes cannot be.
    pub fn unfit(&self, sizes: &Sizes) -> Vec<Unfit> {
        let mut all = Vec::new();
        for filer in self.running() {
            let shared = filer.shared();
            for (volume, wanted) in sizes.get(&shared.name).into_iter().flatten() {
                let (source, volume, wanted) = (shared.name.clone(), volume.clone(), *wanted);
                match shared.volumes().iter().find(|known| known.name == volume) {
                    None => all.push(Unfit::NoVolume { source, volume }),
                    Some(known) if known.size > wanted => {
                        all.push(Unfit::Larger { source, volume, met: known.size, wanted });
                    }
                    Some(_) => {}
                }
            }
        }
        all
    }

    /// What the file wants of a source that lives here.
    fn wanted(&self, name: &SourceName) -> Option<Policy> {
        self.policies.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    /// What rotted in the pool, of the filer's own and of theirs.
    pub fn rot(&self) -> MendFigures {
        let mut all = self.own.rot();
        for filer in self.running() {
            let MendFigures { found, repaired, waiting, lost } = filer.rot();
            all.found += found;
            all.repaired += repaired;
            all.waiting += waiting;
            all.lost.extend(lost);
        }
        all
    }

    /// As [`Filer::mend_all`], of the filer's own and of theirs. Blocks.
    pub fn mend_all(&self) -> impl FnOnce() + Send + 'static {
        let own = self.own.mend_all();
        let homes: Vec<_> = self.running().collect();
        move || {
            own();
            homes.iter().for_each(|filer| filer.mend_all()());
        }
    }

    /// Stops all of them.
    pub async fn stop(&self) {
        self.stopping.cancel();
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(life) = life {
            // A panic there was reported by the runtime.
            drop(life.await);
        }
        for (name, home) in self.all() {
            if let Home::Running(filer) = home
                && let Err(error) = filer.stop().await
            {
                tracing::warn!(source = %name, %error, "stopped without a last CP");
            }
        }
    }

    async fn answer(&self, adopt: Adopt) {
        let (token, name) = (adopt.token, adopt.name.clone());
        let refused = match self.adopt(adopt).await {
            Ok(()) => {
                tracing::warn!(source = %name, "it has room here, and follows");
                None
            }
            Err(error) => {
                tracing::warn!(source = %name, %error, "it cannot live here");
                Some((error.to_string(), error.next_step().to_owned()))
            }
        };
        self.own.shared().session.adopted(Adopted { token, refused });
    }

    /// Steps 1 to 3. Says yes again for one that is here and follows.
    async fn adopt(&self, adopt: Adopt) -> Result<(), HomeError> {
        adopt::check(&adopt)?;
        let own = self.own.shared();
        if own.affiliation().hub != Some(adopt.hub) {
            return Err(HomeError::OtherHub);
        }
        let pool = Arc::clone(&own.pool);
        let there = pool.catalog().source(adopt.source)?;
        if adopt.name == own.name || there.as_ref().is_some_and(|row| row.name != adopt.name) {
            return Err(HomeError::Taken(adopt.name));
        }
        match self.get(&adopt.name) {
            Some(Home::Running(filer)) if filer.shared().source != adopt.source => {
                return Err(HomeError::Taken(adopt.name));
            }
            Some(Home::Running(filer)) if filer.shared().fenced().is_some() => return Ok(()),
            Some(Home::Running(_)) => return Err(HomeError::Primary(adopt.name)),
            Some(Home::Failed(reason)) => {
                return Err(HomeError::Broken { name: adopt.name, reason });
            }
            None => {}
        }
        if self.lock().len() >= HOMES_MAX {
            return Err(HomeError::TooMany);
        }
        adopt::look_for_room(&pool, &adopt)?;
        let source = adopt.source;
        let guest = Some(adopt.policy.unwrap_or(own.pledge.terms().wanted));
        let rows = move || {
            adopt::make_rows(&pool, &adopt, Kept { guest, ..Kept::default() })?;
            Ok(pool.catalog().source(source)?)
        };
        let started = match blocking(rows).await {
            Ok(Some(row)) => self.start_home(row).await,
            Ok(None) => return Err(PoolError::UnknownSource { source_id: source }.into()),
            Err(error) => Err(error),
        };
        if started.is_err() {
            self.undo(source).await;
        }
        started
    }

    /// Nothing was promised: nothing stays. What cannot be taken away now goes at the next start.
    async fn undo(&self, source: SourceId) {
        let (pool, path) = (self.own.pool(), self.nvram_path(source));
        let undo = move || {
            adopt::remove_rows(&pool, source)?;
            nvram_file::remove(&path)?;
            Ok(())
        };
        if let Err(error) = blocking(undo).await {
            tracing::warn!(%source, %error, "the next start takes it away");
        }
    }

    fn nvram_path(&self, source: SourceId) -> PathBuf {
        self.directory.join(format!("{source}.nvram"))
    }

    async fn start_home(&self, mut row: SourceRow) -> Result<(), HomeError> {
        let kept = FilerKeeper.read(&row)?;
        let own = self.own.shared().pledge.terms();
        let policy = self.wanted(&row.name).or(kept.guest).unwrap_or(own.wanted);
        if kept.guest != Some(policy) {
            row = self.promises(row, &Kept { guest: Some(policy), ..kept }).await?;
        }
        let (path, size) = (self.nvram_path(row.id), self.options.nvram.size);
        let made = kept.nvram_made && !self.options.accept_lost_nvram;
        let nvram = blocking(move || Ok(nvram_file::open(&path, size, made)?)).await?;
        let options = EngineOptions {
            source: row.id,
            keeper: Arc::new(FilerKeeper),
            forward: Some(ForwardOptions {
                hub: self.options.hub,
                tls: self.options.tls.clone(),
                backoff: BACKOFF,
                seed: random_u64()?,
                resync_limit: self.options.resync_limit,
            }),
            ground: None,
            settings: Settings {
                policy,
                checkpoint_interval: own.interval,
                accept_lost_nvram: self.options.accept_lost_nvram,
                // What it promises changes while it is in session only.
                accept_untold_policy: false,
                on_full: crate::units::policy::OnFull::Wait,
                ring: RingOptions::of("home", self.options.realtime),
                ring_shape: RingShape::default(),
            },
            stop_timeout: self.options.stop_timeout,
            space_limit: SpaceLimit::none(),
        };
        let filer = Filer::start_in(self.own.pool(), nvram, options).await?;
        let sizes =
            self.sizes.lock().unwrap_or_else(PoisonError::into_inner).get(&row.name).cloned();
        filer.grow(sizes.unwrap_or_default());
        self.lock().insert(row.name, Home::Running(Arc::new(filer)));
        Ok(())
    }

    /// Has the row keep what the source is to promise.
    async fn promises(&self, row: SourceRow, kept: &Kept) -> Result<SourceRow, HomeError> {
        let (pool, extension) = (self.own.pool(), FilerKeeper.write(&row, kept)?);
        let note = move || {
            let written = extension.clone();
            pool.catalog().update_source(row.id, move |row| row.extension = written)?;
            Ok(SourceRow { extension, ..row })
        };
        blocking(note).await
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SourceName, Home>> {
        self.homes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Homes {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HomeError> + Send + 'static,
) -> Result<T, HomeError> {
    let done = machine::blocking(work).await;
    done.map_err(|error| HomeError::Thread(error.to_string()))?
}

/// The filer's own volumes, and beside them those of the sources that live on it.
#[derive(Debug)]
pub struct HomeExports {
    own: Arc<SourceExports>,
    homes: Arc<Homes>,
}

impl HomeExports {
    /// Of this filer.
    pub fn new(homes: Arc<Homes>) -> Arc<Self> {
        Arc::new(Self { own: homes.own.exports(), homes })
    }

    fn home(&self, name: &str) -> Option<Home> {
        let (source, _) = name.split_once('/')?;
        self.homes.get(&source.parse().ok()?)
    }
}

impl Exports for HomeExports {
    fn list(&self) -> Vec<Listed> {
        let mut all = self.own.list();
        for (_, home) in self.homes.all() {
            if let Home::Running(filer) = home {
                all.extend(filer.exports().list());
            }
        }
        all
    }

    fn open<'a>(&'a self, name: &'a str) -> OpenFuture<'a> {
        match self.home(name) {
            None => self.own.open(name),
            Some(Home::Running(filer)) => Box::pin(async move { filer.exports().open(name).await }),
            Some(Home::Failed(reason)) => {
                let refused = OpenError::Refused(reason.to_string().into());
                Box::pin(std::future::ready(Err(refused)))
            }
        }
    }
}
