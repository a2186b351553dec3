//! `mirrorhub source`: puts a source together from its configuration and runs it in the foreground.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::added;
use super::devices::{self, Devices};
use super::local;
use super::reload::{self, Files, files_of, of_expired};
use super::upkeep;
use super::{
    Doors, Locks, StepAges, answer, end_of, events_elsewhere, join, pool_check, unknown_volume,
};
use crate::cli::exchange;
use crate::cli::service;
use crate::cli::signals::{Signal, Signals};
use crate::config::problem::Problems;
use crate::config::reload::{reloaded_source, source_changes};
use crate::config::schema::{PoolConfig, SourceConfig, TlsConfig};
use crate::config::shrink;
use crate::control::feed::Feed;
use crate::control::message::{AdminError, ProgressSender, Request, Target, code};
use crate::control::server::{Admin, AdminServer};
use crate::device::directory::create_durably;
use crate::filer::counters::CounterValues;
use crate::filer::homes::{Home, HomeExports, Homes};
use crate::filer::status::{SourceState, Status, VolumeStatus as OwnVolume};
use crate::filer::{CheckpointError, DeviceOptions, Filer, FilerOptions};
use crate::link::tls::SourceTls;
use crate::metric::catalogue as names;
use crate::nbd::serve::Server;
use crate::nvlog::RingStatus;
use crate::observe::server::Observed;
use crate::status::SCHEMA;
use crate::status::answers::{
    CheckpointAnswer, CheckpointOfSource, Unproven, Verdict, VerifyAnswer, VerifyOfVolume,
    VolumeRoot,
};
use crate::status::config::{ConfigDiffAnswer, ConfigProblem};
use crate::status::document::{
    AloneSince, NvramStatus, Policy, ResyncStatus, SourceEntry, State, StatusDocument,
    VolumeStatus, VolumeTrouble, WaitsStatus,
};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_f64;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{BlockCount, ByteCount};
use crate::upkeep::Upkeep;

/// A clean stop waits this long for the last CP to be published.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// What an administrator has accepted for this start.
#[derive(Debug, Clone, Copy)]
pub struct Accept {
    /// What only its NVRAM held may be gone, the hub is asked for it.
    pub lost_nvram: bool,
    /// The file's policy is in force at once, though the hub may know of a stronger one.
    pub untold_policy: bool,
    /// Devices of its pool may be missing, and newer than those that are there.
    pub missing_devices: bool,
}

/// What is done about certificates that were read in another place than the file's.
const RESTART: &str =
    "restart this source when that suits: the certificates read at its start go on until then";

/// For `systemctl status`. Volumes are served once the hub was met, or need not be.
const LISTENS: &str = "listening; `mirrorhub status` shows how each volume stands";

fn two_workers() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().context("cannot start the async runtime")
}

/// Runs a source until it is told to stop.
pub fn run(mut config: SourceConfig, accept: Accept) -> Result<()> {
    local::prepare(&config)?;
    let metrics = crate::observe::recorder::install("source")?;
    create_durably(&config.data_dir)
        .with_context(|| format!("cannot make data_dir {}", config.data_dir.display()))?;
    let in_file = config.clone();
    let adding = devices::apply(&config.data_dir, &mut config.pool, true)?;
    two_workers()?.block_on(async {
        let mut signals = Signals::install().context("cannot catch signals")?;
        let admin = AdminServer::bind(&config.data_dir).await?;
        let (cut, lock) = certificates(&config).context("certificates of a bundle not in place")?;
        let locks = Locks::load(lock.as_ref(), &config.plain_networks)?;
        let doors = Doors::bind(&config.nbd_listen, &config.http_listen, &locks).await?;
        let mut options = options(&config, accept);
        options.pool.adding = adding;
        let tls = lock.as_ref().map(|tls| SourceTls::load(files_of(tls), &tls.hub_name));
        options.tls = tls.transpose()?.map(Arc::new);
        let tls = options.tls.clone();
        let filer = Arc::new(Filer::start(options.clone()).await?);
        let directory = config.data_dir.join("homes");
        let wanted = (config.home_policies(), config.home_sizes());
        let homes = Homes::start(filer.clone(), options, directory, wanted).await?;
        let (server, stop) = (Server::new(locks.nbd_options()), CancellationToken::new());
        let kept_up = config.pool.upkeep();
        let files = Files::new(config);
        let (own, guests) = (filer.clone(), homes.clone());
        let mended = homes.clone();
        let mend = move || (mended.mend_all())();
        let upkeep = Upkeep::start(filer.pool(), kept_up, Box::new(mend))
            .context("cannot start the upkeep of the pool")?;
        let (keeper, server_too) = (upkeep.clone(), server.clone());
        let view =
            View { filer: own, homes: guests, server: server_too, files, upkeep, tls, locks, cut };
        let view = Arc::new(view);
        view.differs(&in_file);
        reload::log_expired(view.expired());
        let exports = HomeExports::new(homes.clone());
        let mut tasks = doors.open(&server, exports, view.clone(), metrics, admin.journal(), &stop);
        let data_dir = &view.files.running().data_dir;
        tasks.push(added::go_on(data_dir, filer.pool(), keeper.clone()));
        let admin_stop = CancellationToken::new();
        let admin_task = tokio::spawn(admin.run(view.clone(), admin_stop.clone()));
        service::ready(LISTENS);
        while signals.next().await == Signal::Reload {
            service::reloading();
            view.reload();
            service::ready(LISTENS);
        }
        service::stopping();
        tracing::info!("stopping");
        // The volumes are told first, so that what is ordered is in the last CP; status and
        // metrics answer until it is published.
        upkeep::stop(keeper).await;
        homes.stop().await;
        if let Err(error) = filer.stop().await {
            tracing::warn!(%error, "stopped without a last CP");
        }
        stop.cancel();
        admin_stop.cancel();
        tasks.push(admin_task);
        join(tasks).await;
        anyhow::Ok(())
    })
}

/// An exchange that was cut and may not be finished here, and where the certificates are read.
fn certificates(config: &SourceConfig) -> io::Result<(Option<ConfigProblem>, Option<TlsConfig>)> {
    Ok((exchanged(config)?, config.tls.as_ref().map(counting).transpose()?))
}

/// Finishes a `--join` that was cut while it replaced the certificates; or why this process may not.
fn exchanged(config: &SourceConfig) -> io::Result<Option<ConfigProblem>> {
    let tls = config.tls.as_ref().and_then(|tls| tls.cert.parent());
    let cut = tls.map_or(Ok(None), exchange::finish_if_allowed)?;
    Ok(cut.map(|(met, fix)| ConfigProblem { fix, ..reload::of_tls(&met) }))
}

/// The files that count, where an exchange was cut that this process may not finish.
fn counting(tls: &TlsConfig) -> io::Result<TlsConfig> {
    let mut tls = tls.clone();
    let TlsConfig { ca, cert, key, served, client_ca, .. } = &mut tls;
    for file in [ca, cert, key, &mut served.0, &mut served.1].into_iter().chain(client_ca) {
        *file = exchange::counting(file)?;
    }
    Ok(tls)
}

/// Reads the file of what runs again, and refuses what cannot become of it.
fn reread(running: &SourceConfig) -> Result<SourceConfig, Problems> {
    let config = load(&running.file)?;
    shrink::refuse(running, &config)?;
    Ok(config)
}

/// The volumes, as large as the file has them.
fn sizes(config: &SourceConfig) -> Vec<(VolumeName, ByteCount)> {
    config.volumes.iter().map(|volume| (volume.name.clone(), volume.size)).collect()
}

fn options(config: &SourceConfig, accept: Accept) -> FilerOptions {
    FilerOptions {
        name: config.name.clone(),
        hub: config.hub,
        tls: None,
        hub_timeout: config.replication.hub_timeout,
        volumes: sizes(config),
        nvram: DeviceOptions { path: config.nvram.path.clone(), size: config.nvram.size },
        realtime: config.nvram.realtime,
        pool: config.pool.files(accept.missing_devices),
        checkpoint_interval: config.checkpoint_interval,
        policy: config.policy(),
        resync_limit: config.replication.resync_limit,
        accept_lost_nvram: accept.lost_nvram,
        accept_untold_policy: accept.untold_policy,
        on_full: config.on_full,
        stop_timeout: STOP_TIMEOUT,
    }
}

/// What the outside sees of a running source.
#[derive(Debug)]
struct View {
    filer: Arc<Filer>,
    homes: Arc<Homes>,
    server: Server,
    files: Files<SourceConfig>,
    tls: Option<Arc<SourceTls>>,
    locks: Locks,
    upkeep: Arc<Upkeep>,
    /// An exchange of certificates that the start met and might not finish.
    cut: Option<ConfigProblem>,
}

impl View {
    /// Own certificates that nobody takes any more.
    fn expired(&self) -> impl Iterator<Item = String> {
        let own = self.tls.as_ref().and_then(|tls| tls.files().expired());
        own.into_iter().chain(self.locks.expired())
    }

    /// Reads source.toml again: what needs no restart is taken over, the policy behind the next CP.
    fn reload(&self) {
        let running = self.files.running();
        let file = running.file.clone();
        match reread(&running) {
            Ok(config) => {
                let changes = source_changes(&running, &config);
                let now = reloaded_source(&running, config);
                self.filer.reload(now.policy(), now.checkpoint_interval);
                self.filer.grow(sizes(&now));
                self.homes.grow(now.home_sizes());
                let homes = self.homes.reload(now.checkpoint_interval, &now.home_policies());
                let certificates = self.certificates(&running);
                let homes = homes.problem().map(reload::of_homes);
                let problems = certificates.into_iter().chain(homes).collect();
                let count = changes.len();
                self.files.taken(now, &changes, problems);
                tracing::info!(file = %file.display(), changes = count, "reloaded");
            }
            Err(problems) => self.files.refused(&file, &problems),
        }
    }

    /// Reads the certificates again; what is wrong with that.
    fn certificates(&self, running: &SourceConfig) -> Vec<ConfigProblem> {
        let put = exchanged(running).unwrap_or_else(|error| Some(reload::of_tls(&error)));
        let failed = self.tls.as_ref().and_then(|tls| tls.files().reload().err());
        let failed = failed.iter().map(reload::of_tls).chain(self.locks.reload());
        let mut problems: Vec<_> = put.into_iter().chain(failed).collect();
        if let (Some(cut), true) = (&self.cut, !problems.is_empty()) {
            // They were read where they were staged. That the place is gone now is no other problem.
            problems.truncate(1);
            for problem in &mut problems {
                if problem.fix != cut.fix {
                    problem.fix = RESTART.to_owned();
                }
            }
        }
        problems
    }

    /// Shows what the file says otherwise than what runs.
    fn differs(&self, file: &SourceConfig) {
        let running = self.files.running();
        let changes = source_changes(&running, file);
        self.files.taken(running, &changes, self.cut.iter().cloned().collect());
    }

    /// Sizes that volumes of those that live here cannot have.
    fn unfit(&self, config: &SourceConfig) -> Vec<ConfigProblem> {
        let sizes = config.home_sizes();
        if sizes.is_empty() {
            return Vec::new();
        }
        self.homes.unfit(&sizes).iter().map(super::sizes::of_home).collect()
    }

    /// What a reload would do.
    fn difference(&self) -> ConfigDiffAnswer {
        let running = self.files.running();
        match reread(&running) {
            Ok(config) => {
                reload::difference(&source_changes(&running, &config), self.unfit(&config))
            }
            Err(problems) => reload::difference(&[], reload::listed(&problems)),
        }
    }

    /// The source a request names: the filer's own, also without a name, or one that lives on it.
    fn target(&self, only: Option<&SourceName>) -> Result<(SourceName, Arc<Filer>), AdminError> {
        let own = self.filer.status().name;
        let Some(name) = only.filter(|name| **name != own) else {
            return Ok((own, self.filer.clone()));
        };
        match self.homes.get(name) {
            Some(Home::Running(filer)) => Ok((name.clone(), filer)),
            Some(Home::Failed(reason)) => Err(super::failed(format!("source {name}: {reason}"))),
            None => Err(AdminError::new(
                code::UNKNOWN_SOURCE,
                format!("this is source {own}, not {name}"),
                "ask the hub, or leave the name out",
            )),
        }
    }

    async fn checkpoint(
        &self,
        only: Option<&SourceName>,
        progress: &ProgressSender,
    ) -> Result<Value, AdminError> {
        let (name, filer) = self.target(only)?;
        let lost = |error: CheckpointError| {
            let message = format!("checkpoint of {name}: {error}");
            let now = filer.status();
            let behind = now.state == SourceState::Behind;
            let next = if behind { now.next_step } else { "see `mirrorhub status`".to_owned() };
            AdminError::new(code::HUB_LOST, message, next)
        };
        let before = filer.status();
        let total = before.ladder.acknowledged_bytes.saturating_sub(before.ladder.visible_bytes);
        let show = || {
            let done = carried(&filer.status().counters);
            let done = done.saturating_sub(carried(&before.counters));
            progress.send(super::publishing(&name, done, total));
        };
        let published = super::showing(filer.checkpoint(), show).await;
        let (cp, roots) = published.map_err(lost)?;
        let volumes = filer.status().volumes;
        let named = |number, root| {
            let volume = volumes.iter().find(|volume| volume.number == number)?;
            Some(VolumeRoot { name: volume.name.clone(), root })
        };
        let volumes = roots.iter().filter_map(|&(number, root)| named(number, root)).collect();
        let sources = vec![CheckpointOfSource { name: name.clone(), cp: cp.0, volumes }];
        answer(&CheckpointAnswer { schema: SCHEMA, sources, failed: Vec::new() })
    }

    async fn verify(
        &self,
        target: Option<&Target>,
        progress: &ProgressSender,
    ) -> Result<Value, AdminError> {
        let (name, filer) = self.target(target.map(|target| &target.source))?;
        let only = target.and_then(|target| target.volume.as_ref());
        let known = filer.status().volumes;
        if let Some(only) = only.filter(|only| !known.iter().any(|known| known.name == **only)) {
            return Err(unknown_volume(&name, only));
        }
        let (show, source) = (progress.clone(), name.clone());
        let names: Vec<_> = known.iter().map(|known| (known.number, known.name.clone())).collect();
        let report = move |number, done, total| {
            if let Some((_, volume)) = names.iter().find(|(known, _)| *known == number) {
                show.send(super::reading(&source, volume, done, total));
            }
        };
        let read = match filer.verify(report).await {
            Ok(read) => read,
            Err(error) => {
                let unproven = Unproven { source: name, reason: error.to_string() };
                return answer(&VerifyAnswer::of(Vec::new(), vec![unproven]));
            }
        };
        for problem in &read.problems {
            tracing::error!(source = %name, problem, "verify");
        }
        let mut volumes = Vec::new();
        for volume in &read.volumes {
            let known = known.iter().find(|known| known.number == volume.volume);
            let Some(known) = known.filter(|known| only.is_none_or(|o| *o == known.name)) else {
                continue;
            };
            let (source_end, hub_end) = (end_of(volume.here), end_of(volume.hub));
            let verdict = match Verdict::of(&source_end, &hub_end) {
                // Both ends read the same, and not what was announced with the CP.
                Verdict::Equal if !volume.is_equal() => Verdict::Differ,
                verdict @ (Verdict::Equal | Verdict::Differ | Verdict::Unproven) => verdict,
            };
            volumes.push(VerifyOfVolume {
                source: name.clone(),
                volume: known.name.clone(),
                cp: read.cp.0,
                verdict,
                equal: verdict == Verdict::Equal,
                source_end,
                hub_end,
            });
        }
        let unread = read.problems.first().cloned();
        let unproven = unread.map(|reason| Unproven { source: name, reason });
        answer(&VerifyAnswer::of(volumes, unproven.into_iter().collect()))
    }
}

/// Blocks that CPs have carried.
fn carried(counters: &CounterValues) -> u64 {
    counters.references + counters.inline_blocks + counters.holes
}

/// What a hub does, and a source does not.
fn hub_only(does: &str) -> AdminError {
    AdminError::new(
        code::HUB_ONLY,
        format!("this is a source, and a hub {does}"),
        "name the configuration of the hub with --config",
    )
}

impl Admin for View {
    fn handle(
        &self,
        request: Request,
        _feed: Feed,
        progress: ProgressSender,
    ) -> BoxFuture<'_, Result<Value, AdminError>> {
        Box::pin(async move {
            let runs = |pool: &PoolConfig| {
                self.files.changed(|running| running.pool.devices.clone_from(&pool.devices));
            };
            match request {
                Request::Status { source } => {
                    self.target(source.as_ref())?;
                    answer(&self.status())
                }
                Request::Checkpoint { source, keep: None } => {
                    self.checkpoint(source.as_ref(), &progress).await
                }
                Request::Checkpoint { keep: Some(_), .. }
                | Request::Kept { .. }
                | Request::Drop { .. } => Err(AdminError::new(
                    code::HUB_ONLY,
                    "CPs are kept, listed and dropped on the hub, not on a source",
                    "give the same command to the hub, with its --config",
                )),
                Request::Verify { target } => self.verify(target.as_ref(), &progress).await,
                Request::Failover { .. } => Err(hub_only("fails over")),
                Request::Failback { .. } => Err(hub_only("gives the volumes back")),
                Request::Forget { .. } => Err(hub_only("forgets")),
                Request::Seed { .. } | Request::SeedDiscard { .. } | Request::Seeds {} => {
                    Err(hub_only("is seeded"))
                }
                Request::ConfigDiff {} => answer(&self.difference()),
                Request::DeviceList {} => self.devices().listed().await,
                Request::DeviceFail { device } => self.devices().failed(device).await,
                Request::DeviceAdd { devices } => self.devices().added(devices, runs).await,
                Request::DeviceReplace { old, new, wait } => {
                    self.devices().replaced((old, new, wait), &progress, runs).await
                }
                Request::Scrub { wait, stop } => {
                    upkeep::scrub(&self.upkeep, wait, stop, &progress).await
                }
                Request::Events { .. } => Err(events_elsewhere()),
                Request::PoolCheck {} => pool_check(self.filer.pool(), self.homes.mend_all()).await,
            }
        })
    }
}

impl View {
    /// The sources that live here beside the filer's own.
    fn homes_shown(&self) -> Vec<SourceEntry> {
        let shown = |(name, home)| match home {
            Home::Running(filer) => entry(&Filer::status(&filer)),
            Home::Failed(reason) => broken(name, &reason),
        };
        self.homes.all().into_iter().map(shown).collect()
    }
}

impl View {
    /// For a command about the devices of the pool.
    fn devices(&self) -> Devices {
        let (upkeep, pool, running) =
            (self.upkeep.clone(), self.filer.pool(), self.files.running());
        let (config, data_dir, file) = (running.pool, running.data_dir, running.file);
        Devices { upkeep, pool, config, data_dir, file }
    }
}

impl Observed for View {
    fn collect(&self) {
        let own = self.tls.as_ref().map(|tls| tls.files().ends());
        super::collect_tls(own.into_iter().chain(self.locks.ends()));
        self.locks.collect();
        let status = self.filer.status();
        let homes = self.homes.statuses();
        let (mut carried, mut ages) = ([(0, 0); 3], StepAges::default());
        for status in std::iter::once(&status).chain(&homes) {
            collect(status, &mut carried, &mut ages);
        }
        ages.collect();
        for (kind, (blocks, bytes)) in ["reference", "inline", "hole"].into_iter().zip(carried) {
            super::collect_carried(kind, blocks, bytes);
        }
        if let Some(ring) = &status.ring {
            collect_ring(ring);
        }
        super::collect_pool(&self.filer.pool(), self.homes.rot(), &self.upkeep);
        super::collect_nbd(&self.server);
    }

    fn status(&self) -> StatusDocument {
        let status = self.filer.status();
        let nvram = status.ring.as_ref().map(nvram_status);
        let pool = super::pool_status(&self.filer.pool(), self.homes.rot(), &self.upkeep);
        let shown = StatusDocument::filer(entry(&status), self.homes_shown(), nvram, pool);
        let mut files = self.files.status();
        files.problems.extend(self.unfit(&self.files.running()));
        shown.with_config(files).with_reasons(of_expired(self.expired()))
    }
}

/// The series of one source that runs here, and what its CPs carried, added up.
fn collect(status: &Status, carried: &mut [(u64, u64); 3], ages: &mut StepAges) {
    let entry = entry(status);
    super::collect_source(&entry, status.counters.checkpoint_at, true);
    ages.add(&entry.waits);
    let (counters, source) = (&status.counters, status.name.to_string());
    let these = [
        (counters.references, counters.reference_bytes),
        (counters.inline_blocks, counters.inline_bytes),
        (counters.holes, counters.hole_bytes),
    ];
    for (sum, (blocks, bytes)) in carried.iter_mut().zip(these) {
        *sum = (sum.0 + blocks, sum.1 + bytes);
    }
    metrics::counter!(names::SOURCE_CHECKPOINTS.name, "source" => source.clone())
        .absolute(counters.checkpoints_done);
    metrics::counter!(names::SOURCE_CHECKPOINTS_REJECTED.name, "source" => source)
        .absolute(counters.checkpoints_rejected);
}

/// One that lives here and did not start.
fn broken(name: SourceName, reason: &str) -> SourceEntry {
    SourceEntry {
        name,
        id: None,
        state: State::Faulted,
        reason: reason.to_owned(),
        next_step: "mend the cause, then restart this filer".to_owned(),
        policy: None,
        policy_next: None,
        resync: None,
        alone_since: None,
        epoch: 0,
        generation: 0,
        applied_cp: None,
        image_age_seconds: None,
        lag_bytes: None,
        lag_seconds: None,
        acknowledged_bytes: 0,
        staged_bytes: 0,
        drained_bytes: None,
        applied_bytes: None,
        visible_bytes: 0,
        pool_used_bytes: None,
        pool_limit_bytes: None,
        seeds: Vec::new(),
        volumes: Vec::new(),
        waits: WaitsStatus::default(),
    }
}

/// The ring in the status document.
pub(super) fn nvram_status(ring: &RingStatus) -> NvramStatus {
    NvramStatus {
        used_bytes: ring.written.0.saturating_sub(ring.release_wanted.0),
        capacity_bytes: ring.capacity.0,
        durability: ring.durability.to_string(),
    }
}

/// The ring's series.
pub(super) fn collect_ring(ring: &RingStatus) {
    let status = nvram_status(ring);
    metrics::gauge!(names::NVRAM_CAPACITY_BYTES.name).set(to_f64(status.capacity_bytes));
    metrics::gauge!(names::NVRAM_USED_BYTES.name).set(to_f64(status.used_bytes));
    for (cursor, position) in
        [("released", ring.released), ("durable", ring.durable), ("written", ring.written)]
    {
        metrics::gauge!(names::NVRAM_CURSOR_BYTES.name, "cursor" => cursor).set(to_f64(position.0));
    }
    metrics::counter!(names::NVRAM_COMMITS.name).absolute(ring.commits);
    metrics::counter!(names::DEVICE_SYNCS.name, "device" => "nvram").absolute(ring.syncs);
    metrics::counter!(names::DEVICE_ERRORS.name, "device" => "nvram")
        .absolute(u64::from(ring.latched.is_some()));
}

fn entry(status: &Status) -> SourceEntry {
    let state = match status.state {
        SourceState::Waiting => State::Waiting,
        SourceState::Syncing => State::Syncing,
        SourceState::InSync => State::InSync,
        SourceState::Behind => State::Behind,
        SourceState::Offline => State::Offline,
        SourceState::FailedOver => State::FailedOver,
        SourceState::Fenced => State::Fenced,
        SourceState::Faulted => State::Faulted,
    };
    let ladder = &status.ladder;
    let visible = ladder.visible_bytes.min(ladder.hub_bytes);
    let lag = status.lag.as_secs_f64();
    let lag_bytes = ladder.acknowledged_bytes.saturating_sub(visible);
    // What the hub does not hear of may have changed: its image is only known to equal the past.
    let silence = status.hub_silence.map_or(0.0, |silence| silence.as_secs_f64());
    SourceEntry {
        name: status.name.clone(),
        id: Some(status.id),
        state,
        reason: status.reason.clone(),
        next_step: status.next_step.clone(),
        policy: Some(Policy::from(&status.policy)),
        policy_next: status.policy_next.as_ref().map(Policy::from),
        alone_since: status.alone.map(AloneSince::from),
        resync: status.pass.map(|pass| ResyncStatus {
            from_cp: pass.base.0,
            to_cp: pass.cp.0,
            percent: pass.percent,
            sent_bytes: pass.bytes,
            seconds_left: pass.left.map(|left| left.as_secs_f64()),
        }),
        epoch: status.epoch.number,
        generation: status.generation.number,
        applied_cp: status.common_cp.map(|cp| cp.0),
        image_age_seconds: status.hub.map(|_| lag.max(silence)),
        lag_bytes: (!status.lag_unknown).then_some(lag_bytes),
        lag_seconds: Some(lag),
        acknowledged_bytes: ladder.acknowledged_bytes,
        staged_bytes: ladder.hub_bytes,
        drained_bytes: None,
        applied_bytes: None,
        visible_bytes: visible,
        pool_used_bytes: None,
        pool_limit_bytes: None,
        seeds: Vec::new(),
        volumes: status.volumes.iter().map(of_volume).collect(),
        waits: WaitsStatus {
            staged_seconds: Some(status.unstaged.as_secs_f64()),
            drained_seconds: None,
            applied_seconds: None,
            visible_seconds: Some(lag.max(status.unstaged.as_secs_f64())),
        },
    }
}

fn of_volume(volume: &OwnVolume) -> VolumeStatus {
    VolumeStatus {
        name: volume.name.clone(),
        size_bytes: volume.size.0,
        root: volume.root,
        trouble: volume.refused.as_ref().map(|refusal| VolumeTrouble {
            state: "refused".to_owned(),
            reason: refusal.reason.clone(),
            next_step: refusal.next_step.clone(),
            image_cp: None,
        }),
    }
}

/// Bytes of so many blocks.
pub(super) fn bytes_of(blocks: BlockCount) -> u64 {
    blocks.bytes().unwrap_or(ByteCount(u64::MAX / BLOCK_BYTES_U64 * BLOCK_BYTES_U64)).0
}

/// The configuration of a source, or why there is none.
pub fn load(file: &Path) -> Result<SourceConfig, Problems> {
    crate::config::load::load_source(file)
}
