//! `mirrorhub hub`: puts a hub together from its configuration and runs it in the foreground.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{Doors, answer, collect_source, end_of, failed, join, pool_check};
use crate::cli::signals::{Signal, Signals};
use crate::config::schema::HubConfig;
use crate::control::message::{
    AdminError, Progress, ProgressSender, ProgressUnit, Request, Target, code,
};
use crate::control::server::{Admin, AdminServer};
use crate::hub::images::Images;
use crate::hub::shared::SourceSetting;
use crate::hub::status::{Snapshot, SourceState};
use crate::hub::{Hub, HubOptions};
use crate::metric::catalogue as names;
use crate::nbd::serve::{Options, Server};
use crate::observe::server::Observed;
use crate::status::SCHEMA;
use crate::status::answers::{
    CheckpointAnswer, CheckpointOfSource, VerifyAnswer, VerifyOfVolume, VolumeRoot,
};
use crate::status::document::{SourceEntry, State, StatusDocument, VolumeStatus};
use crate::units::convert::to_f64;
use crate::units::names::{SourceName, VolumeName};
use crate::wire::message as wire;

/// Slots of the applier: as many as cores, at least two, so that one slow CP holds up nobody.
const APPLIERS_MIN: usize = 2;

/// Runs a hub until it is told to stop.
pub fn run(config: &HubConfig) -> Result<()> {
    let metrics = crate::observe::recorder::install("hub")?;
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot make data_dir {}", config.data_dir.display()))?;
    let options = options(config);
    let system = actix::System::new();
    system.block_on(async move {
        let mut signals = Signals::install().context("cannot catch signals")?;
        let admin = AdminServer::bind(&config.data_dir).await?;
        let doors = Doors::bind(&config.nbd_listen, &config.http_listen).await?;
        let hub = Arc::new(Hub::start(options).await?);
        let server = Server::new(Options::default());
        let stop = CancellationToken::new();
        let view = Arc::new(View { hub: hub.clone(), server: server.clone() });
        let images = Images::new(hub.shared().clone());
        let mut tasks = doors.open(&server, images, view.clone(), metrics, &stop);
        tasks.push(tokio::spawn(admin.run(view, stop.clone())));
        while signals.next().await == Signal::Reload {
            tracing::warn!("a reload of hub.toml is not available in this version: restart");
        }
        tracing::info!("stopping");
        stop.cancel();
        join(tasks).await;
        hub.stop().await;
        anyhow::Ok(())
    })
}

fn options(config: &HubConfig) -> HubOptions {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let device = config.pool.devices.first();
    HubOptions {
        data_dir: config.data_dir.clone(),
        listen: config.listen,
        nvram: (config.nvram.path.clone(), config.nvram.size),
        log_dir: config.log_dir.clone(),
        pool: device.map(|device| (device.path.clone(), device.size)).unwrap_or_default(),
        sources: config
            .sources
            .iter()
            .filter(|source| source.file.enabled)
            .map(|source| SourceSetting {
                name: source.file.name.clone(),
                nvram_share: Some(source.nvram_share),
                log_limit: source.file.log_limit,
                volumes: source.file.volumes.iter().map(|v| (v.name.clone(), v.size)).collect(),
            })
            .collect(),
        image_pin: config.image_pin,
        appliers: cores.max(APPLIERS_MIN),
        arbiters: cores,
    }
}

/// What the outside sees of a running hub.
#[derive(Debug)]
struct View {
    hub: Arc<Hub>,
    server: Server,
}

impl View {
    /// The sources a request names, or all.
    fn names(&self, only: Option<&SourceName>) -> Result<Vec<SourceName>, AdminError> {
        let all: Vec<_> = self.hub.snapshots().iter().map(|s| s.name.clone()).collect();
        match only {
            None => Ok(all),
            Some(name) if all.contains(name) => Ok(vec![name.clone()]),
            Some(name) => Err(AdminError::new(
                code::UNKNOWN_SOURCE,
                format!("no source {name} on this hub"),
                "`mirrorhub status` lists the sources",
            )),
        }
    }

    async fn checkpoint(&self, only: Option<&SourceName>) -> Result<Value, AdminError> {
        let mut sources = Vec::new();
        for name in self.names(only)? {
            let offline = |reason: String| {
                let message = format!("checkpoint of {name}: {reason}");
                AdminError::new(code::SOURCE_OFFLINE, message, "start the source or its network")
            };
            let (cp, roots) = self.hub.checkpoint(&name).await.map_err(offline)?;
            let snapshot = self.snapshot(&name)?;
            let volumes = volume_roots(&snapshot, &roots);
            sources.push(CheckpointOfSource { name, cp: cp.0, volumes });
        }
        answer(&CheckpointAnswer { schema: SCHEMA, sources })
    }

    /// The volumes of a source that could not be asked: not proven equal.
    fn unproven(&self, name: &SourceName) -> Result<Vec<VerifyOfVolume>, AdminError> {
        let snapshot = self.snapshot(name)?;
        let volume = |offer: &wire::VolumeOffer| VerifyOfVolume {
            source: name.clone(),
            volume: offer.name.clone(),
            cp: snapshot.applied_cp.0,
            equal: false,
            source_end: end_of(None),
            hub_end: end_of(None),
        };
        Ok(snapshot.volumes.iter().map(volume).collect())
    }

    fn snapshot(&self, name: &SourceName) -> Result<Arc<Snapshot>, AdminError> {
        let found = self.hub.snapshots().into_iter().find(|snapshot| snapshot.name == *name);
        found.ok_or_else(|| failed(format!("source {name} is gone")))
    }

    async fn verify(
        &self,
        target: Option<&Target>,
        progress: &ProgressSender,
    ) -> Result<Value, AdminError> {
        let mut volumes = Vec::new();
        for name in self.names(target.map(|target| &target.source))? {
            let (show, source) = (progress.clone(), name.clone());
            let report = move |volume: &VolumeName, done, total| {
                show.send(Progress {
                    what: "reading".to_owned(),
                    object: format!("{source}/{volume}"),
                    done,
                    total: Some(total),
                    unit: ProgressUnit::Blocks,
                });
            };
            let read = match self.hub.verify(&name, report).await {
                Ok(read) => read,
                Err(error) if target.is_none() => {
                    // One source that cannot be asked does not keep the others from being proven.
                    tracing::warn!(source = %name, error, "not verified");
                    volumes.extend(self.unproven(&name)?);
                    continue;
                }
                Err(error) => {
                    let message = format!("verify of {name}: {error}");
                    let next = "start the source or its network, then try again";
                    return Err(AdminError::new(code::SOURCE_OFFLINE, message, next));
                }
            };
            for problem in read.problems.iter().chain(&read.there.problems) {
                tracing::error!(source = %name, problem, "verify");
            }
            let snapshot = self.snapshot(&name)?;
            for offer in &snapshot.volumes {
                if target.is_some_and(|t| t.volume.as_ref().is_some_and(|v| *v != offer.name)) {
                    continue;
                }
                let find = |scans: &[wire::VolumeScan]| {
                    scans.iter().find(|scan| scan.volume == offer.number).copied()
                };
                let (here, there) = (find(&read.here), find(&read.there.volumes));
                volumes.push(VerifyOfVolume {
                    source: name.clone(),
                    volume: offer.name.clone(),
                    cp: read.cp.0,
                    equal: same(here, there),
                    source_end: end_of(there),
                    hub_end: end_of(here),
                });
            }
        }
        let equal = volumes.iter().all(|volume| volume.equal);
        answer(&VerifyAnswer { schema: SCHEMA, equal, volumes })
    }
}

/// Whether both ends have read the volume whole and computed one root.
fn same(here: Option<wire::VolumeScan>, there: Option<wire::VolumeScan>) -> bool {
    let root = |scan: Option<wire::VolumeScan>| {
        scan.filter(|scan| scan.bad_blocks == 0).and_then(|scan| scan.root)
    };
    root(here).is_some() && root(here) == root(there)
}

fn volume_roots(snapshot: &Snapshot, roots: &[wire::VolumeRoot]) -> Vec<VolumeRoot> {
    let name = |root: &wire::VolumeRoot| {
        let offer = snapshot.volumes.iter().find(|offer| offer.number == root.volume)?;
        Some(VolumeRoot { name: offer.name.clone(), root: root.root })
    };
    roots.iter().filter_map(name).collect()
}

impl Admin for View {
    fn handle(
        &self,
        request: Request,
        progress: ProgressSender,
    ) -> BoxFuture<'_, Result<Value, AdminError>> {
        Box::pin(async move {
            match request {
                Request::Status { source } => {
                    self.names(source.as_ref())?;
                    let mut document = self.status();
                    if let (StatusDocument::Hub(hub), Some(name)) = (&mut document, &source) {
                        let health = hub.health.only(name.as_str(), &hub.sources);
                        hub.sources.retain(|entry| entry.name == *name);
                        hub.health = health;
                    }
                    answer(&document)
                }
                Request::Checkpoint { source } => self.checkpoint(source.as_ref()).await,
                Request::Verify { target } => self.verify(target.as_ref(), &progress).await,
                Request::PoolCheck {} => pool_check(self.hub.shared().pool.clone()).await,
            }
        })
    }
}

impl Observed for View {
    fn collect(&self) {
        collect(&self.hub, &self.server);
    }

    fn status(&self) -> StatusDocument {
        let shared = self.hub.shared();
        let sources = self.hub.snapshots().iter().map(|snapshot| entry(snapshot)).collect();
        let ring = shared.stager.ring().map(|ring| ring.status());
        let nvram = ring.as_ref().map(super::source::nvram_status);
        let pool = super::pool_status(&shared.pool);
        StatusDocument::hub(sources, nvram, pool)
    }
}

fn entry(snapshot: &Snapshot) -> SourceEntry {
    let state = match snapshot.state {
        SourceState::Waiting => State::Waiting,
        SourceState::Syncing => State::Syncing,
        SourceState::InSync => State::InSync,
        SourceState::Behind => State::Behind,
        SourceState::Offline => State::Offline,
        SourceState::Faulted => State::Faulted,
    };
    let totals = &snapshot.totals;
    let lag = snapshot.cursors.oldest_invisible().map(|since| since.elapsed().as_secs_f64());
    let silence =
        snapshot.heard.filter(|_| !snapshot.connected).map(|at| at.elapsed().as_secs_f64());
    let age = lag.unwrap_or(0.0).max(silence.unwrap_or(0.0));
    let root = |number| snapshot.roots.iter().find(|r| r.volume == number).map(|r| r.root);
    SourceEntry {
        name: snapshot.name.clone(),
        id: snapshot.source,
        state,
        reason: snapshot.reason.clone(),
        next_step: snapshot.next_step.clone(),
        policy: None,
        alone_since: None,
        epoch: snapshot.epoch.number,
        generation: snapshot.generation.number,
        applied_cp: snapshot.applied_cp.0,
        image_age_seconds: (snapshot.applied_cp.0 > 0).then_some(age),
        lag_bytes: totals.staged_bytes.saturating_sub(totals.visible_bytes),
        lag_seconds: lag.unwrap_or(0.0),
        acknowledged_bytes: totals.staged_bytes,
        staged_bytes: totals.staged_bytes,
        drained_bytes: totals.drained_bytes,
        applied_bytes: totals.visible_bytes,
        visible_bytes: totals.visible_bytes,
        volumes: snapshot
            .volumes
            .iter()
            .map(|offer| VolumeStatus {
                name: offer.name.clone(),
                size_bytes: offer.size.0,
                root: root(offer.number),
            })
            .collect(),
    }
}

fn collect(hub: &Hub, server: &Server) {
    let shared = hub.shared();
    let mut carried: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
    for snapshot in hub.snapshots() {
        collect_source(&entry(&snapshot));
        let (totals, source) = (&snapshot.totals, snapshot.name.to_string());
        let count = |name: &'static str, value: u64| {
            metrics::counter!(name, "source" => source.clone()).absolute(value);
        };
        count(names::SOURCE_RECEIVED_TRANSFERS.name, totals.transfers);
        count(names::SOURCE_RECEIVED_BYTES.name, totals.received_bytes);
        count(names::SOURCE_CHECKPOINTS.name, totals.checkpoints);
        count(names::SOURCE_CHECKPOINTS_REJECTED.name, totals.rejected);
        let restarts = shared.counters.restarts_of(&snapshot.name);
        count(names::SOURCE_ACTOR_RESTARTS.name, restarts);
        let log = snapshot.source.map_or(0, |id| shared.store.bytes(id));
        metrics::gauge!(names::SOURCE_LOG_BYTES.name, "source" => source.clone()).set(to_f64(log));
        for (kind, blocks, bytes) in [
            ("reference", totals.reference_blocks, totals.reference_bytes),
            ("inline", totals.inline_blocks, totals.inline_bytes),
            ("hole", totals.hole_blocks, totals.hole_bytes),
        ] {
            let sum = carried.entry(kind).or_default();
            *sum = (sum.0 + blocks, sum.1 + bytes);
        }
    }
    for (kind, (blocks, bytes)) in carried {
        super::collect_carried(kind, blocks, bytes);
    }
    for (reason, count) in shared.counters.refusals() {
        metrics::counter!(names::CONNECTIONS_REFUSED.name, "reason" => reason).absolute(count);
    }
    if let Some(ring) = shared.stager.ring() {
        super::source::collect_ring(&ring.status());
    }
    super::collect_pool(&shared.pool);
    super::collect_nbd(server);
}
