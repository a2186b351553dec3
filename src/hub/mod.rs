//! The hub: receives the logs of many sources, keeps their images, serves them.
//!
//! Floor 8. The way of a transfer through it, in the order of the files:
//!
//! ```text
//! connection -> actor -> stager -> (ring) -> drainer -> (source log) -> applier -> (image)
//! ```
//!
//! * [`connection`]: sockets; * [`actor`]: one a source, the shell of `session::mirror`
//! * [`stager`]: into the ring; * [`drainer`]: out of it; * [`applier`]: CPs
//! * [`lane`]: one source's cursors; * [`shared`]: what all parts share
//! * [`registry`], [`status`], [`images`]: sources by name, what is shown, what is served
//! * [`kept`]: CPs kept by name
//! * [`failover`], [`replay`]: a source is fenced, its log becomes the image; [`overlay`]: what
//!   clients read until it is
//! * [`failback`]: a filer follows, and is given its volumes back
//! * [`promoted`]: sources that the hub serves itself
//! * [`hooks`]: commands that are run when volumes have moved
//! * [`seed`]: images that are filled from a disk before their source comes
//! * [`import`]: a hub whose state directory is gone; [`refill`]: who has to send again then
//! * [`recover`]: what a start does before anything else
//!
//! A fault of one source (its log, its actor, its connection) stays with that source (invariant
//! 10). A fault of the ring or the pool latches and is everybody's: nothing is acknowledged then.

pub mod actor;
pub mod applier;
mod aside;
pub mod certificates;
mod compare;
pub mod connection;
pub mod doubts;
pub mod drainer;
pub mod extension;
pub mod failback;
pub mod failover;
pub mod forget;
pub mod hooks;
mod identity;
pub mod images;
pub mod import;
pub mod join_by;
pub mod kept;
pub mod lane;
mod line;
pub mod mending;
pub mod overlay;
mod pass;
pub mod promoted;
pub mod recover;
pub mod refill;
pub mod registry;
pub mod replay;
pub mod retention;
pub mod seed;
pub mod settle;
pub mod shared;
pub mod shares;
#[cfg(test)]
mod simulation;
pub mod stager;
pub mod status;
#[cfg(test)]
mod tests;
pub mod waits;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use actix::Arbiter;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::actor::{Goodbye, SourceActor, WantCheckpoint, WantScan};
use self::hooks::HookOptions;
use self::lane::lock;
use self::promoted::{Engine, PromotedOptions};
use self::registry::Entry;
use self::shared::{Shared, SourceSetting};
use self::status::Snapshot;
use crate::filer::Filer;
use crate::limits::SOURCES_MAX;
use crate::link::tls::HubTls;
use crate::raid::files::PoolFiles;
use crate::units::entrance;
use crate::units::latest::Latest;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{ByteCount, CpNumber};
use crate::wire::message::{Scanned, VolumeRoot};

/// A panicked actor is replaced after this.
const RESTART_AFTER: Duration = Duration::from_millis(100);
/// How long a stop waits for sources to take its good-bye.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// Times a source is asked to read for `verify`: it may be reading for another question, or have
/// gone on to another CP than the one asked for.
const VERIFY_TRIES: u32 = 10;
/// Time between two of them.
const VERIFY_AGAIN_AFTER: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 500 });
/// A source that cannot read says so within this.
const REFUSAL_MAX: Duration = Duration::from_millis(250);

/// Why an end was not read.
#[derive(Debug)]
enum Unread {
    /// It may be, when asked again.
    Later(String),
    /// It cannot be now.
    Now(String),
}

/// The answer of a source that has read. One without volumes has read nothing: it is busy, or has
/// another CP by now.
fn whole(answer: Result<Scanned, String>) -> Result<Scanned, Unread> {
    let scanned = answer.map_err(Unread::Now)?;
    if !scanned.volumes.is_empty() {
        return Ok(scanned);
    }
    let said = match scanned.problems.first() {
        Some(problem) => problem.clone(),
        None => format!("the source does not have CP {} any more", scanned.cp),
    };
    Err(Unread::Later(said))
}
/// A stop waits so long for a reading of an image that is under way.
const LET_GO_MAX: Duration = Duration::from_secs(5);

/// What a hub is made of.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// Identity and, by default, ring, logs and pool.
    pub data_dir: PathBuf,
    /// Where sources connect.
    pub listen: SocketAddr,
    /// How they are spoken to; none only on this machine.
    pub tls: Option<Arc<HubTls>>,
    /// The ring's file or device, and its size.
    pub nvram: (PathBuf, ByteCount),
    /// Commits go before every thread of an ordinary class, if they may.
    pub realtime: bool,
    /// Where source logs lie.
    pub log_dir: PathBuf,
    /// The pool's devices.
    pub pool: PoolFiles,
    /// Sources of the sources directory.
    pub sources: Vec<SourceSetting>,
    /// How long a reader may pin an image.
    pub image_pin: Duration,
    /// Applier slots.
    pub appliers: usize,
    /// Arbiters; one a core.
    pub arbiters: usize,
    /// How promoted sources run.
    pub promoted: PromotedOptions,
    /// What is run when volumes have moved.
    pub hooks: HookOptions,
}

/// Why a hub does not start.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Something on disk is not as it must be.
    #[error("{what}: {reason}")]
    State { what: String, reason: String },
    /// A socket could not be opened.
    #[error("cannot listen on {address}: {error}")]
    Listen { address: SocketAddr, error: std::io::Error },
}

/// A running hub.
#[derive(Debug)]
pub struct Hub {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: CancellationToken,
    /// Where an actor's end is told of.
    died: mpsc::Sender<SourceName>,
    arbiters: Mutex<Vec<Arbiter>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// A hub that is dropped without a stop hears nobody any more.
    _door: DropGuard,
}

impl Hub {
    /// Recovers what is on disk and starts every part. Called inside an actix System; blocks
    /// while it recovers, before anything is served.
    pub async fn start(options: HubOptions) -> Result<Self, HubError> {
        let listener = entrance::listen(options.listen)
            .map_err(|error| HubError::Listen { address: options.listen, error })?;
        let address = listener
            .local_addr()
            .map_err(|error| HubError::Listen { address: options.listen, error })?;
        let arbiters: Vec<Arbiter> = (0..options.arbiters.max(1)).map(|_| Arbiter::new()).collect();
        let handles = arbiters.iter().map(Arbiter::handle).collect();
        let recover::Started { shared, mut threads } = recover::recover(&options, handles)?;
        let stop = CancellationToken::new();
        let died = bring_up(&shared, &options.sources, arbiters.len(), &stop).await?;
        let door = stop.child_token();
        let body = connection::door(listener, shared.clone(), door.clone())
            .map_err(|error| HubError::Listen { address: options.listen, error })?;
        threads.push(recover::spawn("hub-door", body)?);
        tracing::info!(%address, sources = options.sources.len(), hub = %shared.hub, "hub is up");
        let (arbiters, threads) = (Mutex::new(arbiters), Mutex::new(threads));
        let _door = door.drop_guard();
        let hub = Self { shared, address, stop, died, arbiters, threads, _door };
        // Images and seeds without a file: retired.
        for lane in hub.shared.lanes.all() {
            hub.begin(lane.name());
        }
        for source in hub.shared.seeds.sources() {
            hub.begin(&source);
        }
        Ok(hub)
    }

    /// Where sources connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The parts, for images, metrics and tests.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Every source as it is now.
    pub fn snapshots(&self) -> Vec<Arc<Snapshot>> {
        let all = self.shared.registry.all().into_iter();
        all.map(|(name, entry)| self.snapshot(&name, entry.snapshot.load())).collect()
    }

    fn snapshot(&self, name: &SourceName, snapshot: Arc<Snapshot>) -> Arc<Snapshot> {
        let engine = self.shared.promoted.engine(name);
        let troubles = [self.shared.hooks.failure(name), self.shared.keeping.failure(name)];
        let troubles: Vec<String> = troubles.into_iter().flatten().collect();
        let retired = engine.is_none() && !self.shared.settings.load().contains_key(name);
        if engine.is_none() && troubles.is_empty() && !retired {
            return snapshot;
        }
        let mut shown = match engine {
            None if retired => snapshot.retired(),
            None => Snapshot::clone(&snapshot),
            Some(engine) => {
                let view = self.shared.failovers.view(name);
                let found = view.as_ref().map(|view| view.reason.as_str());
                snapshot.promoted(&engine, found, self.mends(name))
            }
        };
        if self.shared.failbacks.follows(name) {
            shown.reason.push_str("; its filer is connected and follows");
        }
        for trouble in &troubles {
            shown.reason.push_str("; ");
            shown.reason.push_str(trouble);
        }
        Arc::new(shown)
    }

    /// What to do about a promoted source that is not served.
    fn mends(&self, name: &SourceName) -> String {
        let lane = self.shared.lanes.get(name);
        let lacks = |lane: Arc<lane::Lane>| self.shared.promoted.lacks_nvram(lane.source(), name);
        if lane.is_some_and(lacks) {
            failover::ways_on(name)
        } else {
            "mend the cause, then restart the hub".to_owned()
        }
    }

    /// The engine of a source that is served here.
    fn engine(&self, name: &SourceName) -> Result<Option<Arc<Filer>>, String> {
        match self.shared.promoted.engine(name) {
            Some(Engine::Running(engine)) => Ok(Some(engine)),
            Some(Engine::Failed(reason)) => Err(reason.to_string()),
            None => Ok(None),
        }
    }

    /// Asks the source for a checkpoint; returns when it is published here.
    pub async fn checkpoint(
        &self,
        name: &SourceName,
    ) -> Result<(CpNumber, Vec<VolumeRoot>), String> {
        if let Some(engine) = self.engine(name)? {
            let (cp, roots) = engine.checkpoint().await.map_err(|error| error.to_string())?;
            let root = |(volume, root)| VolumeRoot { volume, root };
            return Ok((cp, roots.into_iter().map(root).collect()));
        }
        let entry = self.shared.registry.get(name).ok_or("no such source")?;
        let answer = entry.actor.send(WantCheckpoint).await.map_err(|error| error.to_string())?;
        answer.await.unwrap_or_else(|_| Err("the source's actor was replaced".to_owned()))
    }

    /// Reads every block of the published CP at both ends. `progress` is told volume, blocks
    /// passed and blocks in all of this end's reading. An error says why an end was not read; it
    /// says nothing about the data.
    pub async fn verify(
        &self,
        name: &SourceName,
        progress: impl FnMut(&VolumeName, u64, u64) + Send + Clone + 'static,
    ) -> Result<recover::Verified, String> {
        let mut tries = 1;
        if let Some(engine) = self.engine(name)? {
            return self.verify_here(name, &engine, progress).await;
        }
        loop {
            match self.read_both_ends(name, progress.clone()).await {
                Ok(verified) => return Ok(verified),
                Err(Unread::Later(_)) if tries < VERIFY_TRIES => tries += 1,
                Err(Unread::Later(reason) | Unread::Now(reason)) => return Err(reason),
            }
            tokio::time::sleep(VERIFY_AGAIN_AFTER).await;
        }
    }

    async fn read_both_ends(
        &self,
        name: &SourceName,
        progress: impl FnMut(&VolumeName, u64, u64) + Send + 'static,
    ) -> Result<recover::Verified, Unread> {
        let entry = self.shared.registry.get(name);
        let entry = entry.ok_or_else(|| Unread::Now("no such source".to_owned()))?;
        let snapshot = entry.snapshot.load();
        let cp = snapshot.applied_cp;
        if snapshot.source.is_none() {
            return Err(Unread::Now("it has never connected".to_owned()));
        }
        let later = |error: &dyn std::fmt::Display| Unread::Later(error.to_string());
        let mut answer = entry.actor.send(WantScan(cp)).await.map_err(|error| later(&error))?;
        let replaced = |_| Unread::Later("the source's actor was replaced".to_owned());
        // A source that cannot read says so at once; then this end need not read for nothing.
        let early = match tokio::time::timeout(REFUSAL_MAX, &mut answer).await {
            Ok(early) => Some(whole(early.map_err(replaced)?)?),
            Err(_) => None,
        };
        let (shared, name) = (self.shared.clone(), name.clone());
        let here = tokio::task::spawn_blocking(move || shared.scan(&name, cp, progress));
        let there = match early {
            Some(early) => early,
            None => whole(answer.await.map_err(replaced)?)?,
        };
        let read = here.await.map_err(|error| Unread::Now(error.to_string()))?;
        let (roots, problems) = read.map_err(Unread::Later)?;
        Ok(recover::Verified { cp, here: roots, problems, there })
    }

    /// Fails a source over, or says what that would do. Returns as soon as clients are served: the
    /// log may still be being applied then ([`failover::Report::behind`]). Goes on to its end though
    /// the caller may have gone. `reached` is told each step.
    pub async fn failover(
        &self,
        name: &SourceName,
        ask: failover::Ask,
        reached: impl Fn(&failover::Step) + Send + 'static,
    ) -> Result<failover::Report, failover::Refusal> {
        let (shared, name) = (self.shared.clone(), name.clone());
        let (tell, told) = tokio::sync::oneshot::channel();
        let tell = Arc::new(Mutex::new(Some(tell)));
        let answer = move |report: Result<failover::Report, failover::Refusal>| {
            // Nobody is there to hear the second answer, or has gone before the first.
            if let Some(tell) = lock(&tell).take() {
                drop(tell.send(report));
            }
        };
        let early = answer.clone();
        let run = move || {
            let told = |step: &failover::Step| {
                reached(step);
                true
            };
            let served = |report: &failover::Report| early(Ok(report.clone()));
            let ran = failover::run(&shared, &name, ask, &told, &served);
            (shared, name, ran)
        };
        // The task goes on to its end though the caller may have gone, and serves then.
        tokio::spawn(async move {
            let Ok((shared, name, ran)) = tokio::task::spawn_blocking(run).await else { return };
            match &ran {
                Ok(report) if !report.dry_run => failover::serve(&shared, &name).await,
                Ok(_) => {}
                Err(refusal) => {
                    let failover::Refusal { reason, next_step } = refusal;
                    tracing::error!(source = %name, reason, next_step, "failover has not ended");
                }
            }
            answer(ran);
        });
        told.await.unwrap_or_else(|_| {
            Err(failover::Refusal::new("the failover panicked", "see the log of the hub"))
        })
    }

    /// Gives a source back to its filer. Goes on to its end though the caller may have gone.
    pub async fn failback(
        &self,
        name: &SourceName,
        ask: failback::Ask,
        told: failback::Told,
    ) -> Result<failback::Report, failover::Refusal> {
        let (shared, name) = (self.shared.clone(), name.clone());
        let run = async move { failback::run(&shared, &name, ask, told).await };
        tokio::spawn(run).await.unwrap_or_else(|error| {
            Err(failover::Refusal::new(error.to_string(), "see the log of the hub"))
        })
    }

    /// Reads every block of a source that is served here, and compares with what is published:
    /// there is no other end.
    async fn verify_here(
        &self,
        name: &SourceName,
        engine: &Filer,
        progress: impl FnMut(&VolumeName, u64, u64) + Send + 'static,
    ) -> Result<recover::Verified, String> {
        let status = engine.status();
        let cp = status.own_cp;
        let (shared, source) = (self.shared.clone(), name.clone());
        let read = tokio::task::spawn_blocking(move || shared.scan(&source, cp, progress));
        let (here, mut problems) = read.await.map_err(|error| error.to_string())??;
        for volume in &status.volumes {
            let met = here.iter().find(|scan| scan.volume == volume.number);
            if met.and_then(|scan| scan.root) != volume.root {
                let name = &volume.name;
                problems.push(format!("volume {name}: what was read is not what is published"));
            }
        }
        let nobody = format!("source {name} is served here: there is no other end to compare with");
        let there = Scanned { cp, token: 0, volumes: Vec::new(), problems: vec![nobody] };
        Ok(recover::Verified { cp, here, problems, there })
    }

    /// Tells every source that the hub goes, and waits a moment until they were told.
    async fn say_goodbye(&self) {
        let all = async {
            let mut ending = Vec::new();
            for (name, entry) in self.shared.registry.all() {
                match entry.actor.send(Goodbye).await {
                    Ok(ended) => ending.extend(ended),
                    Err(error) => tracing::debug!(source = %name, %error, "no good-bye"),
                }
            }
            for ended in ending {
                // Closed, not sent: the connection's writing task is gone.
                drop(ended.await);
            }
        };
        if tokio::time::timeout(GOODBYE_MAX, all).await.is_err() {
            tracing::info!("some sources did not take the good-bye");
        }
    }

    /// Stops cleanly: no new connection, sources are told, everything durable is drained and synced,
    /// the ring's header is written.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.say_goodbye().await;
        self.shared.failovers.stop(&self.shared.lanes);
        self.shared.promoted.stop_all().await;
        let arbiters = std::mem::take(&mut *lock(&self.arbiters));
        for arbiter in &arbiters {
            arbiter.stop();
        }
        self.shared.jobs.stop();
        self.shared.passes.stop();
        for job in self.shared.lanes.all().iter().filter_map(|lane| lane.job()) {
            // It waits for updates that will not come; one that has them all is finished.
            job.abort();
        }
        let shared = self.shared.clone();
        let threads = std::mem::take(&mut *lock(&self.threads));
        let ended = tokio::task::spawn_blocking(move || {
            // What the ring commits after the drainer has ended stays in it for the next start.
            shared.drain.stop();
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a thread of the hub had panicked");
                }
            }
            if let Some(ring) = shared.stager.ring() {
                ring.stop();
            }
        });
        if let Err(error) = ended.await {
            tracing::error!(%error, "the hub did not stop cleanly");
        }
        let_go(arbiters).await;
        tracing::info!("hub stopped");
    }
}

/// Serves what is promoted, starts the actors, goes on with failovers.
async fn bring_up(
    shared: &Arc<Shared>,
    sources: &[SourceSetting],
    arbiters: usize,
    stop: &CancellationToken,
) -> Result<mpsc::Sender<SourceName>, HubError> {
    failback::resume_all(shared);
    shared.promoted.start_all().await.map_err(|error| HubError::State {
        what: "promoted sources".to_owned(),
        reason: error.to_string(),
    })?;
    let (died, deaths) = mpsc::channel(SOURCES_MAX);
    for (at, setting) in sources.iter().enumerate() {
        let snapshot = Arc::new(Latest::new(Snapshot::waiting(setting.name.clone())));
        start_actor(shared, &setting.name, snapshot, at % arbiters, &died);
    }
    failover::resume_all(shared);
    actix::spawn(supervise(shared.clone(), deaths, died.clone(), stop.clone()));
    actix::spawn(retention::run(shared.clone(), stop.clone()));
    Ok(died)
}

/// Waits until the arbiters have dropped their actors and connections, and with them what keeps
/// the ring and the pool locked. What they had read for somebody may take longer than anybody
/// waits: it only reads, and ends with the process.
async fn let_go(arbiters: Vec<Arbiter>) {
    let (ended, all) = tokio::sync::oneshot::channel();
    let wait = move || {
        let panicked = arbiters.into_iter().filter_map(|arbiter| arbiter.join().err()).count();
        if ended.send(panicked).is_err() {
            tracing::debug!(panicked, "the hub's arbiters have ended, late");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("hub-end".to_owned()).spawn(wait) {
        tracing::warn!(%error, "cannot wait for the end of the hub's arbiters");
        return;
    }
    match tokio::time::timeout(LET_GO_MAX, all).await {
        Ok(Ok(0)) => {}
        Ok(Ok(panicked)) => tracing::error!(panicked, "arbiters of the hub had panicked"),
        Ok(Err(_)) | Err(_) => tracing::warn!("the hub's arbiters are still busy, leaving them"),
    }
}

/// Starts again an actor that died; what others of them do meanwhile is not held up.
async fn start_again(shared: Arc<Shared>, name: SourceName, died: mpsc::Sender<SourceName>) {
    let Some(entry) = shared.registry.get(&name) else { return };
    shared.counters.restarted(&name);
    tracing::error!(source = %name, "actor died, starting it again");
    tokio::time::sleep(RESTART_AFTER).await;
    start_actor(&shared, &name, entry.snapshot, entry.arbiter, &died);
}

fn start_actor(
    shared: &Arc<Shared>,
    name: &SourceName,
    snapshot: Arc<Latest<Snapshot>>,
    arbiter: usize,
    died: &mpsc::Sender<SourceName>,
) {
    let (for_actor, actor_name, view) = (shared.clone(), name.clone(), snapshot.clone());
    let died = died.clone();
    let make = move || SourceActor::resume(for_actor, actor_name, view, died);
    let Some(actor) = shared.arbiters.start(arbiter, make) else { return };
    shared.registry.put(name.clone(), Entry { actor, snapshot, arbiter });
}

/// Replaces actors that died in a panic. One source's fault stays its own (invariant 10).
async fn supervise(
    shared: Arc<Shared>,
    mut deaths: mpsc::Receiver<SourceName>,
    died: mpsc::Sender<SourceName>,
    stop: CancellationToken,
) {
    loop {
        let name = tokio::select! {
            // In that order: actors that end with the hub are not dead.
            biased;
            () = stop.cancelled() => return,
            name = deaths.recv() => name,
        };
        let Some(name) = name else { return };
        let again = start_again(shared.clone(), name, died.clone());
        let stop = stop.clone();
        actix::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = again => {}
            }
        });
    }
}
