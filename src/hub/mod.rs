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
//! * [`recover`]: what a start does before anything else
//!
//! A fault of one source (its log, its actor, its connection) stays with that source (invariant
//! 10). A fault of the ring or the pool latches and is everybody's: nothing is acknowledged then.

pub mod actor;
pub mod applier;
pub mod connection;
pub mod drainer;
mod extension;
pub mod images;
pub mod lane;
pub mod recover;
pub mod registry;
pub mod shared;
pub mod stager;
pub mod status;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use actix::{Actor, Arbiter};
use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::actor::{Goodbye, SourceActor, WantCheckpoint, WantScan};
use self::lane::lock;
use self::registry::Entry;
use self::shared::{Shared, SourceSetting};
use self::status::Snapshot;
use crate::limits::SOURCES_MAX;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{ByteCount, CpNumber};
use crate::wire::message::VolumeRoot;

/// A panicked actor is replaced after this.
const RESTART_AFTER: Duration = Duration::from_millis(100);
/// How long a stop waits for sources to take its good-bye.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// What a hub is made of.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// Identity and, by default, ring, logs and pool.
    pub data_dir: PathBuf,
    /// Where sources connect.
    pub listen: SocketAddr,
    /// The ring's file or device, and its size.
    pub nvram: (PathBuf, ByteCount),
    /// Where source logs lie.
    pub log_dir: PathBuf,
    /// The pool's file or device, and its size.
    pub pool: (PathBuf, ByteCount),
    /// Sources of the sources directory.
    pub sources: Vec<SourceSetting>,
    /// How long a reader may pin an image.
    pub image_pin: Duration,
    /// Applier slots.
    pub appliers: usize,
    /// Arbiters; one a core.
    pub arbiters: usize,
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
    arbiters: Vec<Arbiter>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Hub {
    /// Recovers what is on disk and starts every part. Called inside an actix System; blocks
    /// while it recovers, before anything is served.
    pub async fn start(options: HubOptions) -> Result<Self, HubError> {
        let listener = TcpListener::bind(options.listen)
            .await
            .map_err(|error| HubError::Listen { address: options.listen, error })?;
        let address = listener
            .local_addr()
            .map_err(|error| HubError::Listen { address: options.listen, error })?;
        let arbiters: Vec<Arbiter> = (0..options.arbiters.max(1)).map(|_| Arbiter::new()).collect();
        let handles = arbiters.iter().map(Arbiter::handle).collect();
        let recovered = recover::recover(&options, handles)?;
        let shared = recovered.shared;
        let stop = CancellationToken::new();
        let (died, deaths) = mpsc::channel(SOURCES_MAX);
        for (at, setting) in options.sources.iter().enumerate() {
            let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::waiting(setting.name.clone())));
            start_actor(&shared, &setting.name, snapshot, at % arbiters.len(), &died);
        }
        actix::spawn(supervise(shared.clone(), deaths, died, stop.clone()));
        actix::spawn(connection::accept(listener, shared.clone(), stop.clone()));
        tracing::info!(%address, sources = options.sources.len(), hub = %shared.hub, "hub is up");
        let threads = Mutex::new(recovered.threads);
        Ok(Self { shared, address, stop, arbiters, threads })
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
        self.shared
            .registry
            .all()
            .into_iter()
            .map(|(_, entry)| entry.snapshot.load_full())
            .collect()
    }

    /// Asks the source for a checkpoint; returns when it is published here.
    pub async fn checkpoint(
        &self,
        name: &SourceName,
    ) -> Result<(CpNumber, Vec<VolumeRoot>), String> {
        let entry = self.shared.registry.get(name).ok_or("no such source")?;
        let answer = entry.actor.send(WantCheckpoint).await.map_err(|error| error.to_string())?;
        answer.await.unwrap_or_else(|_| Err("the source's actor was replaced".to_owned()))
    }

    /// Reads every block of the published CP at both ends. `progress` is told volume, blocks
    /// passed and blocks in all of this end's reading.
    pub async fn verify(
        &self,
        name: &SourceName,
        progress: impl FnMut(&VolumeName, u64, u64) + Send + 'static,
    ) -> Result<recover::Verified, String> {
        let entry = self.shared.registry.get(name).ok_or("no such source")?;
        let cp = entry.snapshot.load().applied_cp;
        let answer = entry.actor.send(WantScan(cp)).await.map_err(|error| error.to_string())?;
        let (shared, name) = (self.shared.clone(), name.clone());
        let here = tokio::task::spawn_blocking(move || shared.scan(&name, cp, progress));
        let there =
            answer.await.unwrap_or_else(|_| Err("the source's actor was replaced".to_owned()))?;
        let (roots, problems) = here.await.map_err(|error| error.to_string())??;
        Ok(recover::Verified { cp, here: roots, problems, there })
    }

    /// Tells every source that the hub goes, and waits a moment until they were told.
    async fn say_goodbye(&self) {
        let mut ending = Vec::new();
        for (name, entry) in self.shared.registry.all() {
            match entry.actor.send(Goodbye).await {
                Ok(ended) => ending.extend(ended),
                Err(error) => tracing::debug!(source = %name, %error, "no good-bye"),
            }
        }
        let all = async {
            for ended in ending {
                // Closed, not sent: the connection's writing task is gone.
                drop(ended.await);
            }
        };
        if tokio::time::timeout(GOODBYE_MAX, all).await.is_err() {
            tracing::info!("some sources did not take the good-bye");
        }
    }

    /// Stops cleanly: sources are told, no new connection, everything durable is drained and synced, the ring's
    /// header is written.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.say_goodbye().await;
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
        self.shared.jobs.stop();
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
        tracing::info!("hub stopped");
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
    snapshot: Arc<ArcSwap<Snapshot>>,
    arbiter: usize,
    died: &mpsc::Sender<SourceName>,
) {
    let Some(handle) = shared.arbiters.0.get(arbiter) else { return };
    let (for_actor, actor_name, view) = (shared.clone(), name.clone(), snapshot.clone());
    let died = died.clone();
    let actor = SourceActor::start_in_arbiter(handle, move |_| {
        SourceActor::resume(for_actor, actor_name, view, died)
    });
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
