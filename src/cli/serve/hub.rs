//! `mirrorhub hub`: puts a hub together from its configuration and runs it in the foreground.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use self::reading::{next_reading, read_files};
use super::added;
use super::devices::{self, Devices};
use super::drills::Drills;
use super::noisy::Shares;
use super::reload::{self, Files, files_of, of_expired};
use super::seed;
use super::source::bytes_of;
use super::upkeep;
use super::watch::{Open, Watch};
use super::{
    Doors, Locks, StepAges, answer, collect_source, end_of, events_elsewhere, failed, join, kept,
    pool_check, unknown_volume,
};
use crate::cli::authority::{Authority, AuthorityError};
use crate::cli::service;
use crate::cli::signals::Signals;
use crate::config::schema::{self, HubConfig, HubSource, PoolConfig};
use crate::config::sizing::volumes_of;
use crate::control::feed::Feed;
use crate::control::message as control;
use crate::control::message::{
    AdminError, Progress, ProgressSender, ProgressUnit, Request, Target, code,
};
use crate::control::server::{Admin, AdminServer};
use crate::device::directory::create_durably;
use crate::hub::failback;
use crate::hub::failover::{Ask, Step};
use crate::hub::hooks::HookOptions;
use crate::hub::images::Images;
use crate::hub::promoted::PromotedOptions;
use crate::hub::recover::Verified;
use crate::hub::shared::SourceSetting;
use crate::hub::status::{Snapshot, SourceState, Totals};
use crate::hub::waits::Since;
use crate::hub::{Hub, HubOptions};
use crate::limits::CHECKPOINTS_AT_ONCE;
use crate::link::tls::HubTls;
use crate::metric::catalogue as names;
use crate::nbd::listen::Listen;
use crate::nbd::serve::Server;
use crate::observe::server::{News, Observed};
use crate::status::SCHEMA;
use crate::status::answers::{
    CheckpointAnswer, CheckpointFailed, CheckpointOfSource, FailbackAnswer, FailoverAnswer,
    ForgetAnswer, Unproven, Verdict, VerifyAnswer, VerifyOfVolume, VolumeRoot,
};
use crate::status::document::{
    AloneSince, Policy, PoolStatus, SourceEntry, State, StatusDocument, VolumeStatus,
    VolumeTrouble, WaitsStatus,
};
use crate::units::convert::{to_f64, to_u64};
use crate::units::names::{KeptName, SourceName, VolumeName};
use crate::units::numbers::VolumeNumber;
use crate::upkeep::Upkeep;
use crate::wire::message as wire;

mod reading;

/// Slots of the applier: as many as cores, at least two, so that one slow CP holds up nobody.
const APPLIERS_MIN: usize = 2;
const DAY: Duration = Duration::from_secs(86_400);

/// Runs a hub until it is told to stop. `accept_missing`: devices of its pool that are missing may be
/// newer than those that are there.
pub fn run(mut config: HubConfig, accept_missing: bool) -> Result<()> {
    let metrics = crate::observe::recorder::install("hub")?;
    create_durably(&config.data_dir)
        .with_context(|| format!("cannot make data_dir {}", config.data_dir.display()))?;
    let adding = devices::apply(&config.data_dir, &mut config.pool, true)?;
    let mut options = options(&config, accept_missing);
    options.pool.adding = adding;
    options.tls = hub_tls(&config)?;
    let sources_dir = config.sources_dir.clone();
    let system = actix::System::new();
    system.block_on(async move {
        let mut signals = Signals::install().context("cannot catch signals")?;
        let mut watch = Watch::new(&sources_dir);
        let admin = AdminServer::bind(&config.data_dir).await?;
        let locks = Locks::load(config.tls.as_ref(), &config.plain_networks)?;
        let doors = Doors::bind(&config.nbd_listen, &config.http_listen, &locks).await?;
        options.hooks.export = uri_of(doors.nbd.listens_on());
        let hub = Arc::new(Hub::start(options).await?);
        let server = Server::new(locks.nbd_options());
        let stop = CancellationToken::new();
        let started = Instant::now();
        let kept_up = config.pool.upkeep();
        let files = Files::new(config);
        let shared = hub.shared().clone();
        let mend = move || shared.mend_all();
        let upkeep = Upkeep::start(hub.shared().pool.clone(), kept_up, Box::new(mend))
            .context("cannot start the upkeep of the pool")?;
        let (own, keeper) = (hub.clone(), upkeep.clone());
        let view = View::new((own, server.clone()), started, files, upkeep, locks);
        let images = Images::new(hub.shared().clone());
        let mut tasks = doors.open(&server, images, view.clone(), metrics, admin.journal(), &stop);
        tasks.push(tokio::spawn(admin.run(view.clone(), stop.clone())));
        let data_dir = &view.files.running().data_dir;
        let adding = added::go_on(data_dir, hub.shared().pool.clone(), keeper.clone());
        reload::log_expired(view.expired());
        // First: what changed since the files were read, and what was wrong in them.
        while read_files(&view, &mut signals, watch.open()).await {
            service::ready(&view.in_a_line());
            if !next_reading(&mut signals, &mut watch).await {
                break;
            }
        }
        service::stopping();
        tracing::info!("stopping");
        stop.cancel();
        join(tasks).await;
        upkeep::stop(keeper).await;
        hub.stop().await;
        // It may take long, and nobody else's stop waits for it.
        join(vec![adding]).await;
        anyhow::Ok(())
    })
}

/// Certificates: of the file, or of the hub's own authority.
fn hub_tls(config: &HubConfig) -> Result<Option<Arc<HubTls>>> {
    certificates(config)?;
    let Some(tls) = &config.tls else { return Ok(None) };
    Ok(Some(Arc::new(HubTls::load(files_of(tls))?)))
}

/// Makes what the hub's own authority is to make: itself at the first start, the hub's own certificates
/// then and in the last third of their time.
fn certificates(config: &HubConfig) -> Result<(), AuthorityError> {
    if let Some(tls) = &config.tls
        && let Some(authority) = &tls.authority
    {
        Authority(authority).ensure(&tls.hub_name)?;
    }
    if let Some(tls) = config.tls.as_ref().filter(|tls| tls.is_served())
        && let Some(authority) = &tls.authority
        && tls.served.0.starts_with(authority)
    {
        let at = [&config.nbd_listen, &config.http_listen].map(|listen| match listen {
            schema::Listen::Tcp(address) => Some(address.ip()),
            schema::Listen::Unix(_) => None,
        });
        let at: Vec<_> = at.into_iter().flatten().collect();
        Authority(authority).ensure_served(&tls.hub_name, &at)?;
    }
    Ok(())
}

pub(super) fn options(config: &HubConfig, accept_missing: bool) -> HubOptions {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    HubOptions {
        data_dir: config.data_dir.clone(),
        listen: config.listen,
        tls: None,
        nvram: (config.nvram.path.clone(), config.nvram.size),
        realtime: config.nvram.realtime,
        log_dir: config.log_dir.clone(),
        pool: config.pool.files(accept_missing),
        sources: settings(config),
        image_pin: config.image_pin,
        appliers: cores.max(APPLIERS_MIN),
        arbiters: cores,
        promoted: PromotedOptions { realtime: config.nvram.realtime, ..PromotedOptions::default() },
        hooks: HookOptions {
            promoted: config.hooks.promoted.clone(),
            failed_back: config.hooks.failed_back.clone(),
            timeout: config.hooks.timeout,
            // Known when the door is open: the port may be the kernel's choice.
            export: Default::default(),
        },
    }
}

/// What stands before and behind the name of an export in its URI.
fn uri_of(listens_on: &Listen) -> (String, String) {
    match listens_on {
        Listen::Tcp(address) => (format!("nbd://{address}/"), String::new()),
        Listen::Unix(path) => ("nbd+unix:///".to_owned(), format!("?socket={}", path.display())),
    }
}

/// Bytes of the volumes that the files of sources name.
fn volumes(config: &HubConfig) -> u64 {
    volumes_of(config.sources.iter().map(|source| &source.file))
}

/// The sources that may connect.
fn settings(config: &HubConfig) -> Vec<SourceSetting> {
    let enabled = config.sources.iter().filter(|source| source.file.enabled);
    let setting = |source: &HubSource| SourceSetting {
        name: source.file.name.clone(),
        nvram_share: Some(source.nvram_share),
        log_limit: source.file.log_limit,
        space_limit: source.file.space_limit,
        bandwidth_limit: source.file.bandwidth_limit,
        join_by: source.file.join_by,
        certificates: source.file.certificates.clone(),
        volumes: source.file.volumes.iter().map(|v| (v.name.clone(), v.size)).collect(),
        keep: source.file.keep,
    };
    enabled.map(setting).collect()
}

/// What the outside sees of a running hub.
#[derive(Debug)]
struct View {
    hub: Arc<Hub>,
    server: Server,
    started: Instant,
    files: Files<HubConfig>,
    upkeep: Arc<Upkeep>,
    locks: Locks,
    drills: Arc<Drills>,
    /// Files of sources that somebody was writing when they were read.
    open: Mutex<Open>,
    /// Taken by those who collect the metrics, and nobody else.
    shares: Mutex<Shares>,
}

impl View {
    fn new(
        (hub, server): (Arc<Hub>, Server),
        started: Instant,
        files: Files<HubConfig>,
        upkeep: Arc<Upkeep>,
        locks: Locks,
    ) -> Arc<Self> {
        let (drills, shares) = (Drills::load(hub.shared().pool.clone()), Mutex::default());
        let open = Mutex::default();
        Arc::new(Self { hub, server, started, files, upkeep, locks, drills, open, shares })
    }

    /// Own certificates that nobody takes any more.
    fn expired(&self) -> impl Iterator<Item = String> {
        let own = self.hub.shared().tls.as_ref().and_then(|tls| tls.expired());
        own.into_iter().chain(self.locks.expired())
    }

    /// For `systemctl status`.
    fn in_a_line(&self) -> String {
        match self.hub.shared().settings.load().len() {
            1 => "1 source has a file".to_owned(),
            count => format!("{count} sources have files"),
        }
    }

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

    async fn checkpoint(
        &self,
        only: Option<&SourceName>,
        keep: Option<&KeptName>,
        progress: &ProgressSender,
    ) -> Result<Value, AdminError> {
        let names = self.names(only)?;
        if let Some(keep) = keep {
            // Before anything is done: with several sources it is done for all or for none.
            names.iter().try_for_each(|name| kept::refuse_taken(&self.hub, name, keep))?;
        }
        if let Some(name) = only {
            let sources = vec![self.checkpoint_of(name, keep, progress).await?];
            return answer(&CheckpointAnswer { schema: SCHEMA, sources, failed: Vec::new() });
        }
        // One that is not there, or slow, keeps no other from its CP.
        let asked = names.into_iter().map(|name| async move {
            let done = self.checkpoint_of(&name, keep, progress).await;
            done.map_err(|error| {
                let AdminError { message: reason, next_step, .. } = error;
                CheckpointFailed { name, reason, next_step }
            })
        });
        let asked = stream::iter(asked).buffer_unordered(CHECKPOINTS_AT_ONCE);
        let (mut sources, mut failed) = (Vec::new(), Vec::new());
        for done in asked.collect::<Vec<_>>().await {
            match done {
                Ok(source) => sources.push(source),
                Err(source) => failed.push(source),
            }
        }
        sources.sort_by(|a, b| a.name.cmp(&b.name));
        failed.sort_by(|a, b| a.name.cmp(&b.name));
        answer(&CheckpointAnswer { schema: SCHEMA, sources, failed })
    }

    /// A CP of one source, published here.
    async fn checkpoint_of(
        &self,
        name: &SourceName,
        keep: Option<&KeptName>,
        progress: &ProgressSender,
    ) -> Result<CheckpointOfSource, AdminError> {
        let offline = |reason: String| {
            let message = format!("checkpoint of {name}: {reason}");
            let now = self.snapshot(name).ok();
            let behind = now.filter(|now| now.state == SourceState::Behind);
            let next = behind.map(|now| now.next_step.clone());
            let next = next.unwrap_or_else(|| "start the source or its network".to_owned());
            AdminError::new(code::SOURCE_OFFLINE, message, next)
        };
        let before = self.snapshot(name)?.totals;
        let total = before.staged_bytes.saturating_sub(before.visible_bytes);
        let show = || {
            let blocks = self.snapshot(name).map_or(0, |now| carried(&now.totals));
            let done = blocks.saturating_sub(carried(&before));
            progress.send(super::publishing(name, done, total));
        };
        let published = super::showing(self.hub.checkpoint(name), show).await;
        let (cp, roots) = published.map_err(offline)?;
        let snapshot = self.snapshot(name)?;
        if keep.is_some() && cp.0 == 0 {
            let message = format!("nothing was written to {name} yet: there is no CP to keep");
            return Err(AdminError::new(code::REFUSED, message, "write to it first"));
        }
        match keep {
            Some(keep) => kept::keep(&self.hub, name.clone(), keep).await,
            None => {
                let volumes = volume_roots(&snapshot, &roots);
                Ok(CheckpointOfSource { name: name.clone(), cp: cp.0, volumes })
            }
        }
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
        let only = target.and_then(|target| target.volume.as_ref());
        let (mut volumes, mut unproven) = (Vec::new(), Vec::new());
        for name in self.names(target.map(|target| &target.source))? {
            let known = self.snapshot(&name)?.volumes.clone();
            if let Some(only) = only.filter(|only| !knows(&known, only)) {
                return Err(unknown_volume(&name, only));
            }
            let (show, source) = (progress.clone(), name.clone());
            let report = move |volume: &VolumeName, done, total| {
                show.send(super::reading(&source, volume, done, total));
            };
            match self.hub.verify(&name, report).await {
                Ok(read) => volumes.extend(self.compared(&name, only, &read)?),
                // One source that cannot be asked does not keep the others from being proven.
                Err(reason) => {
                    tracing::warn!(source = %name, reason, "not verified");
                    unproven.push(Unproven { source: name, reason });
                }
            }
        }
        answer(&VerifyAnswer::of(volumes, unproven))
    }

    /// What was read of a source, volume by volume.
    fn compared(
        &self,
        name: &SourceName,
        only: Option<&VolumeName>,
        read: &Verified,
    ) -> Result<Vec<VerifyOfVolume>, AdminError> {
        for problem in read.problems.iter().chain(&read.there.problems) {
            tracing::error!(source = %name, problem, "verify");
        }
        let compare = |offer: &wire::VolumeOffer| {
            let find = |scans: &[wire::VolumeScan]| {
                end_of(scans.iter().find(|scan| scan.volume == offer.number).copied())
            };
            let (hub_end, source_end) = (find(&read.here), find(&read.there.volumes));
            let verdict = Verdict::of(&source_end, &hub_end);
            VerifyOfVolume {
                source: name.clone(),
                volume: offer.name.clone(),
                cp: read.cp.0,
                verdict,
                equal: verdict == Verdict::Equal,
                source_end,
                hub_end,
            }
        };
        let snapshot = self.snapshot(name)?;
        let asked = snapshot.volumes.iter().filter(|offer| only.is_none_or(|v| *v == offer.name));
        // What both ends do not agree on is not of one CP (R20).
        let left_out = |number| snapshot.left_out.iter().any(|left| left.volume == number);
        let asked = asked.filter(|offer| !left_out(offer.number));
        Ok(asked.map(compare).collect())
    }
}

/// Blocks that CPs have carried.
fn carried(totals: &Totals) -> u64 {
    totals.reference_blocks + totals.inline_blocks + totals.hole_blocks
}

impl View {
    async fn failover(
        &self,
        source: SourceName,
        ask: Ask,
        progress: ProgressSender,
    ) -> Result<Value, AdminError> {
        let object = source.to_string();
        let reached = move |step: &Step| {
            let (what, done) = match step {
                Step::Replaying(entries) => ("replaying", *entries),
                Step::Checked => ("log checked", 0),
                Step::Fenced | Step::Raised | Step::Told => ("source fenced", 0),
                Step::Drained
                | Step::Numbered
                | Step::Serving
                | Step::Replayed
                | Step::Promoted => ("log drained", 0),
            };
            let (what, object, unit) = (what.to_owned(), object.clone(), ProgressUnit::Steps);
            progress.send(Progress { what, object, done, total: None, unit });
        };
        let flags = [
            (ask.now, " --now"),
            (ask.accept_gap, " --accept-gap"),
            (ask.accept_lost_nvram, " --accept-lost-nvram"),
        ];
        let flags: String = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| *flag).collect();
        let report =
            self.hub.failover(&source, ask, reached).await.map_err(|refusal| {
                AdminError::new(code::REFUSED, refusal.reason, refusal.next_step)
            })?;
        if report.refused.is_none() {
            self.drills.done(&source).await;
        }
        let next_step = match &report.refused {
            Some(refused) => refused.next_step.clone(),
            None if report.dry_run => format!("`mirrorhub failover {source}{flags}` does it"),
            None => "`mirrorhub failback` gives the volumes back".to_owned(),
        };
        answer(&FailoverAnswer {
            schema: SCHEMA,
            dry_run: report.dry_run,
            outcome: report.outcome.word().to_owned(),
            epoch: report.epoch.number,
            cp: report.cp.0,
            sequence: report.last.sequence.0,
            entries: report.replayed.entries,
            bytes: report.replayed.bytes,
            may_be_lost: report.may_be_lost(),
            applied: !report.behind && !report.dry_run,
            sentences: report.sentences(),
            next_step,
            source,
        })
    }
}

impl View {
    async fn failback(
        &self,
        source: SourceName,
        ask: failback::Ask,
        progress: ProgressSender,
    ) -> Result<Value, AdminError> {
        let object = source.to_string();
        let filer = ask.to.clone().unwrap_or_else(|| source.clone());
        let told = move |step: failback::Step| {
            let (what, done) = match step {
                failback::Step::Found => ("filer follows", 0),
                failback::Step::Round(round) => ("filer brought up, round", u64::from(round)),
                failback::Step::Held => ("clients are held", 0),
                failback::Step::Reached => ("filer has the last CP", 0),
                failback::Step::Kept => ("what is here is kept", 0),
                failback::Step::HandedOver | failback::Step::Told => ("handed over", 0),
            };
            let (what, object, unit) = (what.to_owned(), object.clone(), ProgressUnit::Steps);
            progress.send(Progress { what, object, done, total: None, unit });
            true
        };
        let given =
            self.hub.failback(&source, ask, Box::new(told)).await.map_err(|refusal| {
                AdminError::new(code::REFUSED, refusal.reason, refusal.next_step)
            })?;
        let pause_ms = u64::try_from(given.pause.as_millis()).unwrap_or(u64::MAX);
        answer(&FailbackAnswer {
            schema: SCHEMA,
            dry_run: given.dry_run,
            epoch: given.epoch.number,
            cp: given.cp.0,
            rounds: given.rounds,
            pause_ms,
            serves: given.serves,
            sentences: given.sentences(&source),
            next_step: given.next_step(&source, &filer),
            kept: given.kept,
            kept_on_hub: given.kept_here,
            source,
        })
    }
}

/// Whether a source is known to have that volume, or its volumes are not known.
fn knows(volumes: &[wire::VolumeOffer], name: &VolumeName) -> bool {
    volumes.is_empty() || volumes.iter().any(|offer| offer.name == *name)
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
        feed: Feed,
        progress: ProgressSender,
    ) -> BoxFuture<'_, Result<Value, AdminError>> {
        Box::pin(async move {
            let runs = |pool: &PoolConfig| {
                self.files.changed(|running| running.pool.devices.clone_from(&pool.devices));
            };
            match request {
                Request::Status { source } => self.status_of(source.as_ref()),
                Request::Checkpoint { source, keep } => {
                    self.checkpoint(source.as_ref(), keep.as_ref(), &progress).await
                }
                Request::Kept { source } => kept::list(&self.hub, self.names(source.as_ref())?),
                Request::Drop { target } => {
                    self.names(Some(&target.source))?;
                    kept::drop(&self.hub, target).await
                }
                Request::Verify { target } => self.verify(target.as_ref(), &progress).await,
                Request::Failover { source, dry_run, now, accept_gap, accept_lost_nvram } => {
                    self.names(Some(&source))?;
                    let ask = Ask { dry_run, now, accept_gap, accept_lost_nvram };
                    self.failover(source, ask, progress).await
                }
                Request::Failback { source, keep, to, dry_run } => {
                    self.names(Some(&source))?;
                    let keep = keep.map(|side| match side {
                        control::Side::Hub => failback::Side::Hub,
                        control::Side::Source => failback::Side::Source,
                    });
                    self.failback(source, failback::Ask { keep, to, dry_run }, progress).await
                }
                Request::Forget { source } => {
                    self.names(Some(&source))?;
                    self.forget(source).await
                }
                Request::Seed { target, size_bytes } => {
                    self.seed((target, size_bytes), feed, progress).await
                }
                Request::SeedDiscard { target } => seed::discard(&self.hub, target).await,
                Request::Seeds {} => seed::list(&self.hub),
                Request::ConfigDiff {} => answer(&self.difference().await?),
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
                Request::PoolCheck {} => {
                    let shared = self.hub.shared().clone();
                    pool_check(shared.pool.clone(), move || shared.mend_all()).await
                }
            }
        })
    }
}

impl View {
    /// The document, whole or of one source.
    fn status_of(&self, source: Option<&SourceName>) -> Result<Value, AdminError> {
        self.names(source)?;
        let mut document = self.status();
        if let (StatusDocument::Hub(hub), Some(name)) = (&mut document, source) {
            let health = hub.health.only(name.as_str(), &hub.sources);
            hub.sources.retain(|entry| entry.name == *name);
            hub.health = health;
        }
        answer(&document)
    }

    async fn seed(
        &self,
        (target, size): (Target, Option<u64>),
        feed: Feed,
        progress: ProgressSender,
    ) -> Result<Value, AdminError> {
        // One that is held off by `enabled = false` has a file as well.
        let mut files = self.files.running().sources.clone().into_iter();
        let has_file = files.any(|source| source.file.name == target.source);
        if !has_file {
            self.names(Some(&target.source))?;
        }
        seed::fill(&self.hub, (target, size, has_file), feed, progress).await
    }

    async fn forget(&self, source: SourceName) -> Result<Value, AdminError> {
        let gone =
            self.hub.forget(&source).await.map_err(|refusal| {
                AdminError::new(code::REFUSED, refusal.reason, refusal.next_step)
            })?;
        answer(&ForgetAnswer {
            schema: SCHEMA,
            source,
            volumes: to_u64(gone.volumes),
            kept: to_u64(gone.kept),
            freed_bytes: bytes_of(gone.freed),
        })
    }

    /// For a command about the devices of the pool.
    fn devices(&self) -> Devices {
        let (upkeep, pool, running) =
            (self.upkeep.clone(), self.hub.shared().pool.clone(), self.files.running());
        let (config, data_dir, file) = (running.pool, running.data_dir, running.file);
        Devices { upkeep, pool, config, data_dir, file }
    }
}

impl Observed for View {
    fn collect(&self) {
        collect(self);
    }

    fn news(&self) -> Vec<News> {
        seed::news(self.hub.shared())
    }

    fn status(&self) -> StatusDocument {
        let shared = self.hub.shared();
        // A pool that does not answer has latched, and says so itself.
        let used = shared.pool.used_by_all().unwrap_or_default();
        let of_pool = |snapshot: &Snapshot| SourceEntry {
            pool_used_bytes: snapshot.source.and_then(|id| used.get(&id).copied()).map(bytes_of),
            pool_limit_bytes: shared.space_limit(&snapshot.name).map(bytes_of),
            seeds: seed::shown(shared, snapshot),
            ..entry(snapshot, self.started)
        };
        let sources = self.hub.snapshots().iter().map(|snapshot| of_pool(snapshot)).collect();
        let ring = shared.stager.ring().map(|ring| ring.status());
        let nvram = ring.as_ref().map(super::source::nvram_status);
        let pool = super::pool_status(&shared.pool, shared.mender.figures(|_| true), &self.upkeep);
        let (mut files, running) = (self.files.status(), self.files.running());
        let named = Some(volumes(&running)).filter(|bytes| *bytes > 0);
        let pool = pool.map(|pool| PoolStatus { volumes_bytes: named, ..pool });
        files.problems.extend(self.unfit(&running));
        let shown = StatusDocument::hub(sources, nvram, pool).with_config(files);
        shown.with_reasons(of_expired(self.expired()))
    }
}

fn entry(snapshot: &Snapshot, started: Instant) -> SourceEntry {
    let state = match snapshot.state {
        SourceState::Waiting => State::Waiting,
        SourceState::Syncing => State::Syncing,
        SourceState::InSync => State::InSync,
        SourceState::Behind => State::Behind,
        SourceState::Offline => State::Offline,
        SourceState::FailedOver => State::FailedOver,
        SourceState::Faulted => State::Faulted,
        SourceState::Retired => State::Retired,
    };
    let totals = &snapshot.totals;
    let lag = snapshot.cursors.oldest_invisible().map(|since| since.elapsed().as_secs_f64());
    // One that this process has never heard is silent at least since its start.
    let silence = match snapshot.heard {
        _ if snapshot.connected => 0.0,
        heard => heard.unwrap_or(started).elapsed().as_secs_f64(),
    };
    // While the source is brought together with its image, that is as old as when they were equal.
    let apart = snapshot.alone.is_some() || snapshot.state == SourceState::Syncing;
    let unequal = snapshot.equal_at.unwrap_or(started).elapsed().as_secs_f64();
    let age = lag.unwrap_or(0.0).max(silence).max(if apart { unequal } else { 0.0 });
    let known = !snapshot.may_lack();
    let lag_seconds = known.then_some(lag.unwrap_or(0.0));
    let lag_bytes = totals.staged_bytes.saturating_sub(totals.visible_bytes);
    let root = |number| snapshot.roots.iter().find(|r| r.volume == number).map(|r| r.root);
    SourceEntry {
        name: snapshot.name.clone(),
        id: snapshot.source,
        state,
        reason: snapshot.reason.clone(),
        next_step: snapshot.next_step.clone(),
        policy: snapshot.policy.as_ref().map(Policy::from),
        policy_next: None,
        alone_since: snapshot.alone.map(AloneSince::from),
        resync: None,
        epoch: snapshot.epoch.number,
        generation: snapshot.generation.number,
        applied_cp: Some(snapshot.applied_cp.0),
        image_age_seconds: snapshot.source.map(|_| age),
        lag_bytes: known.then_some(lag_bytes),
        lag_seconds,
        acknowledged_bytes: totals.staged_bytes,
        staged_bytes: totals.staged_bytes,
        drained_bytes: Some(totals.drained_bytes),
        applied_bytes: Some(totals.applied_bytes),
        visible_bytes: totals.visible_bytes,
        pool_used_bytes: None,
        pool_limit_bytes: None,
        seeds: Vec::new(),
        volumes: snapshot
            .volumes
            .iter()
            .map(|offer| VolumeStatus {
                name: offer.name.clone(),
                size_bytes: offer.size.0,
                root: root(offer.number),
                trouble: trouble(snapshot, offer.number),
            })
            .chain(snapshot.refused.iter().filter_map(|refusal| not_here(snapshot, refusal)))
            .collect(),
        waits: waits(&snapshot.since, lag_seconds),
    }
}

/// How long the oldest entry waits for each step. What waits for one waits for all behind it.
fn waits(since: &Since, lag_seconds: Option<f64>) -> WaitsStatus {
    let age = |since: Option<Instant>| since.map_or(0.0, |since| since.elapsed().as_secs_f64());
    let staged = age(since.staged);
    let drained = age(since.drained).max(staged);
    let applied = age(since.applied).max(drained);
    WaitsStatus {
        staged_seconds: Some(staged),
        drained_seconds: Some(drained),
        applied_seconds: Some(applied),
        visible_seconds: lag_seconds.map(|lag| lag.max(applied)),
    }
}

/// What keeps a volume from being mirrored.
fn trouble(snapshot: &Snapshot, volume: VolumeNumber) -> Option<VolumeTrouble> {
    let left = snapshot.left_out.iter().find(|left| left.volume == volume);
    let image_cp = left.map(|left| left.cp.0);
    if let Some(refusal) = snapshot.refused.iter().find(|refusal| refusal.volume == volume) {
        let (reason, next_step) = (refusal.reason.clone(), refusal.next_step.clone());
        return Some(VolumeTrouble { state: "refused".to_owned(), reason, next_step, image_cp });
    }
    let reason = "its image is brought up with the next pass of its source".to_owned();
    let (state, next_step) = ("behind".to_owned(), String::new());
    left.map(|_| VolumeTrouble { state, reason, next_step, image_cp })
}

/// A volume that is refused and has no image here.
fn not_here(snapshot: &Snapshot, refusal: &wire::VolumeRefusal) -> Option<VolumeStatus> {
    let known = snapshot.volumes.iter().any(|offer| offer.number == refusal.volume);
    let trouble = trouble(snapshot, refusal.volume);
    let name = refusal.name.clone();
    (!known).then_some(VolumeStatus { name, size_bytes: 0, root: None, trouble })
}

/// The series of one source; `share` of what all have written lately.
fn collect_one(view: &View, snapshot: &Snapshot, share: f64, ages: &mut StepAges) {
    let shared = view.hub.shared();
    let entry = entry(snapshot, view.started);
    collect_source(&entry, snapshot.totals.published_at, false);
    ages.add(&entry.waits);
    let (totals, source) = (&snapshot.totals, snapshot.name.to_string());
    let count = |name: &'static str, value: u64| {
        metrics::counter!(name, "source" => source.clone()).absolute(value);
    };
    count(names::SOURCE_RECEIVED_BYTES.name, totals.received_bytes);
    count(names::SOURCE_RESYNC_BYTES.name, totals.pass_bytes);
    count(names::SOURCE_CHECKPOINTS.name, totals.checkpoints);
    count(names::SOURCE_CHECKPOINTS_REJECTED.name, totals.rejected);
    let log = snapshot.source.map_or(0, |id| shared.store.bytes(id));
    metrics::gauge!(names::SOURCE_LOG_BYTES.name, "source" => source.clone()).set(to_f64(log));
    let drill = view.drills.of(&source).and_then(|at| u64::try_from(at).ok());
    metrics::gauge!(names::SOURCE_DRILL_TIME.name, "source" => source.clone())
        .set(drill.map_or(f64::NAN, to_f64));
    metrics::gauge!(names::SOURCE_WRITE_SHARE.name, "source" => source).set(share);
}

fn collect(view: &View) {
    let own = view.hub.shared().tls.as_ref().map(|tls| tls.ends());
    super::collect_tls(own.into_iter().chain(view.locks.ends()));
    view.locks.collect();
    let shared = view.hub.shared();
    let mut carried: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
    let mut log_errors = 0;
    let (snapshots, mut ages) = (view.hub.snapshots(), StepAges::default());
    let staged =
        |snapshot: &Arc<Snapshot>| (snapshot.name.to_string(), snapshot.totals.staged_bytes);
    let staged = snapshots.iter().map(staged).collect();
    let shares =
        view.shares.lock().unwrap_or_else(PoisonError::into_inner).of(Instant::now(), staged);
    for snapshot in snapshots {
        let totals = &snapshot.totals;
        let fault = snapshot.source.and_then(|id| shared.store.fault(id));
        log_errors += u64::from(fault.is_some());
        // The series of a source that was retired end with it.
        if snapshot.state != SourceState::Retired {
            let share = shares.get(snapshot.name.as_str()).copied().unwrap_or(0.0);
            collect_one(view, &snapshot, share, &mut ages);
        }
        for (kind, blocks, bytes) in [
            ("reference", totals.reference_blocks, totals.reference_bytes),
            ("inline", totals.inline_blocks, totals.inline_bytes),
            ("hole", totals.hole_blocks, totals.hole_bytes),
        ] {
            let sum = carried.entry(kind).or_default();
            *sum = (sum.0 + blocks, sum.1 + bytes);
        }
    }
    ages.collect();
    metrics::counter!(names::ACTOR_RESTARTS.name).absolute(shared.counters.restarts());
    for (kind, (blocks, bytes)) in carried {
        super::collect_carried(kind, blocks, bytes);
    }
    let refused: BTreeMap<_, _> = shared.counters.refusals().into_iter().collect();
    for &reason in names::REFUSALS {
        let count = refused.get(reason).copied().unwrap_or(0);
        metrics::counter!(names::CONNECTIONS_REFUSED.name, "reason" => reason).absolute(count);
    }
    let hooks = &shared.hooks.counters;
    for (&result, count) in names::HOOK_RESULTS.iter().zip([&hooks.done, &hooks.failed]) {
        let count = count.load(std::sync::atomic::Ordering::Relaxed);
        metrics::counter!(names::HOOK_RUNS.name, "result" => result).absolute(count);
    }
    let kept = &shared.keeping.counters;
    for (&action, count) in names::RETENTION_ACTIONS.iter().zip([&kept.kept, &kept.dropped]) {
        let count = count.load(std::sync::atomic::Ordering::Relaxed);
        metrics::counter!(names::RETENTION.name, "action" => action).absolute(count);
    }
    metrics::counter!(names::DEVICE_SYNCS.name, "device" => "log").absolute(shared.store.syncs());
    metrics::counter!(names::DEVICE_ERRORS.name, "device" => "log").absolute(log_errors);
    if let Some(ring) = shared.stager.ring() {
        super::source::collect_ring(&ring.status());
    }
    super::collect_pool(&shared.pool, shared.mender.figures(|_| true), &view.upkeep);
    super::collect_nbd(&view.server);
}
