//! The `hub` and `source` commands, and what they share: sockets, signals, a clean end.
//!
//! A process binds its admin socket first, so that a second one on the same data directory fails
//! at once; then recovers; then serves. TERM and INT stop it cleanly: what is under way is finished
//! within bounds, state is written.

mod added;
mod advice;
mod devices;
mod drills;
mod hub;
mod kept;
mod local;
mod noisy;
mod noted;
mod reload;
mod remembered;
mod seed;
mod sizes;
mod source;
mod upkeep;
mod watch;

use std::collections::BTreeSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::reload::of_tls;
use super::bundle::{self, Joined};
use super::failure::{Failure, print};
use super::locate::ConfigArgument;
use super::logging::{self, LogFormat};
use super::place::Package;
use super::{Done, sockets};
use crate::config::around::load_around;
use crate::config::schema::{Door, HubConfig, Listen, TlsConfig};
use crate::control::journal::Journal;
use crate::control::message::{AdminError, Progress, ProgressUnit, answer, code};
use crate::device::{MemberReport, MemberState};
use crate::hub::{HubError, HubOptions};
use crate::limits::ADMIN_PROGRESS_MS;
use crate::link::plain::PlainDoor;
use crate::link::refusals::Crowded;
use crate::link::tls::ServedTls;
use crate::metric::catalogue as names;
use crate::nbd;
use crate::nbd::protocol::request::Operation;
use crate::observe::server::{Events, HttpListener, Observed};
use crate::pool::Pool;
use crate::status::SCHEMA;
use crate::status::answers::{PoolCheckAnswer, VerifyOfEnd};
use crate::status::config::ConfigProblem;
use crate::status::document::{
    Policy, PoolDeviceStatus, PoolStatus, RotStatus, SourceEntry, State, WaitsStatus,
};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_f64, to_u64};
use crate::units::names::{SourceName, VolumeName};
use crate::units::networks::Networks;
use crate::upkeep::Upkeep;
use crate::volume::check::{Depth, Finding, check};
use crate::volume::mend::MendFigures;
use crate::wire::message::VolumeScan;

/// Run a hub, in the foreground
#[derive(Debug, Args)]
pub struct HubArguments {
    #[command(flatten)]
    config: ConfigArgument,
    /// Start although missing devices of the pool may be newer than those that are there
    #[arg(long)]
    accept_missing_devices: bool,
}

/// Run a source, in the foreground
#[derive(Debug, Args)]
pub struct SourceArguments {
    #[command(flatten)]
    config: ConfigArgument,
    /// Start although the NVRAM is gone or damaged: what the hub holds is fetched, the rest is lost
    #[arg(long)]
    accept_lost_nvram: bool,
    /// Start although missing devices of the pool may be newer than those that are there
    #[arg(long)]
    accept_missing_devices: bool,
    /// Write the configuration and the certificates of that join bundle beside --config first
    #[arg(long, value_name = "BUNDLE")]
    join: Option<PathBuf>,
    /// Write them and end: for a unit that starts the source as its own user
    #[arg(long, requires = "join")]
    no_start: bool,
    /// Start with the file's policy at once, though the hub may know of a stronger one: a failover
    /// there may then call complete what is not
    #[arg(long)]
    accept_untold_policy: bool,
}

/// Runs a hub until it is told to stop.
pub fn run_hub(arguments: &HubArguments) -> Result<Done, Failure> {
    // A mistake in the file of one source keeps that source away, not the hub from starting.
    let file = arguments.config.file()?;
    let around = load_around(&file, None, &BTreeSet::new()).map_err(Failure::Problems)?;
    let config = around.config;
    start_logging()?;
    ended(hub::run(config, arguments.accept_missing_devices), &file)
}

/// How the hub of that file would be started, for a command that looks at what it would find.
pub(super) fn hub_options(file: &Path, accept_missing: bool) -> Result<HubOptions, Failure> {
    let around = load_around(file, None, &BTreeSet::new()).map_err(Failure::Problems)?;
    let mut config = around.config;
    let applied = devices::apply(&config.data_dir, &mut config.pool, false);
    let adding = applied.map_err(|error| advice::failure(&error, file))?;
    let mut options = hub::options(&config, accept_missing);
    options.pool.adding = adding;
    Ok(options)
}

/// The devices that a start of that hub would open its pool from, for a command that asks how large it is.
pub(super) fn pool_in_use(config: &mut HubConfig) -> Result<(), Failure> {
    let applied = devices::apply(&config.data_dir, &mut config.pool, false);
    applied.map(drop).map_err(|error| advice::failure(&error, &config.file))
}

/// Why such a command failed, as the start would say it.
pub(super) fn hub_failure(error: HubError, file: &Path) -> Failure {
    advice::failure(&error.into(), file)
}

/// Runs a source until it is told to stop.
pub fn run_source(arguments: &SourceArguments) -> Result<Done, Failure> {
    let file = match &arguments.join {
        Some(bundle) => match joined(bundle, arguments)? {
            Some(file) => file,
            None => return Ok(Done::WELL),
        },
        None => arguments.config.file()?,
    };
    let config = source::load(&file).map_err(Failure::Problems)?;
    start_logging()?;
    let accept = source::Accept {
        lost_nvram: arguments.accept_lost_nvram,
        untold_policy: arguments.accept_untold_policy,
        missing_devices: arguments.accept_missing_devices,
    };
    ended(source::run(config, accept), &file)
}

/// Writes what a bundle says; the file to start with, unless the process ends here and has said why.
fn joined(bundle: &Path, arguments: &SourceArguments) -> Result<Option<PathBuf>, Failure> {
    let (package, starts) = (Package::here(), !arguments.no_start);
    let named = arguments.config.config.as_deref();
    match bundle::join(bundle, named, &package, starts)? {
        Joined::New(file) if starts => return Ok(Some(file)),
        Joined::New(file) => {
            let config = source::load(&file).map_err(Failure::Problems)?;
            let told = package.told(&file, &config.data_dir);
            print(&told.map_err(|error| Failure::failed(error.to_string(), ""))?)?;
        }
        Joined::Renewed(file) => print(&format!(
            "{}: its certificates were replaced, it has joined before\n\
             send HUP to the running source (`systemctl reload mirrorhub-source`), or start it without \
             --join; the bundle can be deleted\n",
            file.display()
        ))?,
    }
    Ok(None)
}

fn start_logging() -> Result<(), Failure> {
    let format = LogFormat::of_process();
    let installed = format.and_then(logging::install);
    installed.map_err(|error| Failure::failed(format!("no log: {error}"), ""))
}

fn ended(result: Result<()>, file: &Path) -> Result<Done, Failure> {
    match result {
        Ok(()) => Ok(Done::WELL),
        Err(error) => {
            tracing::error!(reason = format!("{error:#}"), "ended");
            Err(advice::failure(&error, file))
        }
    }
}

/// How the log says that somebody is refused at a door in the clear.
const NBD_REFUSED: &str = "an nbd client is refused";
const HTTP_REFUSED: &str = "an HTTP client is refused";

/// What the doors for clients are behind; nothing where they are on this machine.
#[derive(Debug, Default)]
struct Locks {
    nbd: Option<Arc<ServedTls>>,
    http: Option<Arc<ServedTls>>,
    /// In the clear, for `plain_networks`.
    plain_nbd: Option<Arc<PlainDoor>>,
    /// The same.
    plain_http: Option<Arc<PlainDoor>>,
}

impl Locks {
    /// Reads the files. Who is behind TLS is not asked for its network.
    fn load(tls: Option<&TlsConfig>, networks: &Networks) -> Result<Self> {
        let locks = Self::encrypted(tls)?;
        let plain = |encrypted: bool, what| {
            let wanted = !encrypted && !networks.is_empty();
            wanted.then(|| Arc::new(PlainDoor::new(what, networks.clone())))
        };
        let plain_nbd = plain(locks.nbd.is_some(), NBD_REFUSED);
        let plain_http = plain(locks.http.is_some(), HTTP_REFUSED);
        if plain_nbd.is_some() || plain_http.is_some() {
            let (nbd, http) = (plain_nbd.is_some(), plain_http.is_some());
            tracing::info!(%networks, nbd, http, "clients of plain_networks are served in the clear");
        }
        Ok(Self { plain_nbd, plain_http, ..locks })
    }

    fn encrypted(tls: Option<&TlsConfig>) -> Result<Self> {
        let Some(tls) = tls else { return Ok(Self::default()) };
        // The authority of the sources under another name is still theirs.
        let theirs = |own: &PathBuf| {
            let (own, theirs) = (std::fs::read(own), std::fs::read(&tls.ca));
            matches!((own, theirs), (Ok(own), Ok(theirs)) if own == theirs)
        };
        let shared = tls.client_ca.as_ref().is_none_or(theirs);
        let lock = |door: Door| {
            let mutual = match door {
                Door::Off => return Ok(None),
                Door::Server => false,
                Door::Mutual => true,
            };
            let lock = ServedTls::load(tls.served(), mutual, shared)?;
            anyhow::Ok(Some(Arc::new(lock)))
        };
        Ok(Self { nbd: lock(tls.nbd)?, http: lock(tls.http)?, ..Self::default() })
    }

    /// Reads them again; what cannot be read leaves what was read before.
    fn reload(&self) -> Vec<ConfigProblem> {
        let locks = [&self.nbd, &self.http].into_iter().flatten();
        let failed = locks.filter_map(|lock| lock.files().reload().err());
        let mut problems: Vec<_> = failed.map(|error| of_tls(&error)).collect();
        // Both are of the same files.
        problems.dedup();
        problems
    }

    /// For the NBD server.
    fn nbd_options(&self) -> nbd::serve::Options {
        let tls = self.nbd.clone().map(|tls| {
            let tls: Arc<dyn nbd::tls::Upgrade> = tls;
            tls
        });
        let guard = self.plain_nbd.clone().map(|door| {
            let door: Arc<dyn nbd::serve::Guard> = door;
            door
        });
        let told: Option<Arc<dyn nbd::serve::Told>> = Some(Arc::new(Crowded::new(NBD_REFUSED)));
        nbd::serve::Options { tls, guard, told, ..nbd::serve::Options::default() }
    }

    /// Why nobody takes the certificate that they show.
    fn expired(&self) -> Option<String> {
        self.nbd.as_ref().or(self.http.as_ref())?.files().expired()
    }

    /// The doors' series.
    fn collect(&self) {
        let encrypted = self.http.as_ref().map_or(0, |http| http.refused());
        let refused = encrypted + self.plain_http.as_ref().map_or(0, |http| http.refused());
        metrics::counter!(names::HTTP_CLIENTS_REFUSED.name).absolute(refused);
    }

    /// When the certificate that they show ends, if there is one.
    fn ends(&self) -> Option<i64> {
        let lock = self.nbd.as_ref().or(self.http.as_ref())?;
        Some(lock.files().ends())
    }
}

/// The listeners of a process, bound before it says that it is up.
#[derive(Debug)]
struct Doors {
    nbd: nbd::listen::Listener,
    http: HttpListener,
}

impl Doors {
    /// Binds both.
    async fn bind(nbd_listen: &Listen, http_listen: &Listen, locks: &Locks) -> Result<Self> {
        let listen = match nbd_listen {
            Listen::Tcp(address) => nbd::listen::Listen::Tcp(*address),
            Listen::Unix(path) => nbd::listen::Listen::Unix(path.clone()),
        };
        let nbd = nbd::listen::Listener::bind(&listen).await.context("nbd_listen")?;
        let http = match http_listen {
            Listen::Tcp(address) => HttpListener::tcp(*address)?,
            Listen::Unix(path) => {
                sockets::remove_stale(path)
                    .with_context(|| format!("http_listen: {}", path.display()))?;
                HttpListener::unix(path)?
            }
        };
        Ok(Self { nbd, http: http.behind(locks.http.clone(), locks.plain_http.clone()) })
    }

    /// Serves until `stop`.
    fn open(
        self,
        server: &nbd::serve::Server,
        exports: Arc<dyn nbd::export::Exports>,
        observed: Arc<dyn Observed>,
        metrics: PrometheusHandle,
        journal: Arc<Journal>,
        stop: &CancellationToken,
    ) -> Vec<JoinHandle<()>> {
        let (server, nbd_stop, http_stop) = (server.clone(), stop.clone(), stop.clone());
        let http = self.http;
        tracing::info!(http = http.describe(), "metrics and status");
        let noted = noted::watch(observed.clone(), journal.clone(), stop.clone());
        let events: Events = Arc::new(move |since, most| journal.newest(since, most));
        vec![
            tokio::spawn(noted),
            tokio::spawn(async move { server.run(self.nbd, exports, nbd_stop).await }),
            tokio::spawn(async move {
                let served =
                    crate::observe::server::serve(http, (observed, events), metrics, http_stop);
                if let Err(error) = served.await {
                    tracing::error!(%error, "HTTP is not served any more");
                }
            }),
        ]
    }
}

/// Waits for tasks to end; a panic in one is reported, the others go on.
async fn join(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        if let Err(error) = task.await {
            tracing::error!(%error, "a task ended badly");
        }
    }
}

fn failed(message: impl Into<String>) -> AdminError {
    AdminError::new(code::FAILED, message, "see the log of this process")
}

/// The socket tells them, before it asks here.
fn events_elsewhere() -> AdminError {
    failed("events are told by the socket")
}

/// Walks a pool from its roots: `reachable + free = all`, every block against its hash.
/// What it finds damaged is mended by `mend`, as far as the other end has it, and checked again.
async fn pool_check(
    pool: Arc<Pool>,
    mend: impl FnOnce() + Send + 'static,
) -> Result<Value, AdminError> {
    let report = tokio::task::spawn_blocking(move || {
        let report = check(&pool, Depth::Data)?;
        let damaged = |finding: &Finding| matches!(finding, Finding::Damaged { .. });
        if !report.findings.iter().any(damaged) {
            return Ok(report);
        }
        mend();
        check(&pool, Depth::Data)
    });
    let report = report.await.map_err(|error| failed(error.to_string()))?;
    let report = report.map_err(|error| failed(error.to_string()))?;
    let count =
        |wanted: fn(&Finding) -> bool| to_u64(report.findings.iter().filter(|f| wanted(f)).count());
    answer(&PoolCheckAnswer {
        schema: SCHEMA,
        sound: report.is_clean(),
        all_blocks: report.total,
        reachable_blocks: report.reachable
            + report.only_kept
            + report.only_pinned
            + report.in_flight,
        free_blocks: report.free,
        leaked_blocks: count(|finding| matches!(finding, Finding::Lost { .. })),
        contested_blocks: count(|finding| matches!(finding, Finding::ReachableButFree { .. })),
        bad_blocks: count(|finding| matches!(finding, Finding::Damaged { .. })),
        faults: report.findings.iter().map(ToString::to_string).collect(),
    })
}

fn unknown_volume(source: &SourceName, volume: &VolumeName) -> AdminError {
    let next = "`mirrorhub status --json` lists the volumes of each source";
    AdminError::new(code::UNKNOWN_VOLUME, format!("source {source} has no volume {volume}"), next)
}

/// Waits for `work` and calls `show` again and again meanwhile.
async fn showing<T>(work: impl Future<Output = T>, mut show: impl FnMut()) -> T {
    let mut work = std::pin::pin!(work);
    let mut tick = tokio::time::interval(Duration::from_millis(ADMIN_PROGRESS_MS));
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = tick.tick() => show(),
        }
    }
}

/// How far the CP of a source is: blocks that the hub was sent, of those that wait.
fn publishing(source: &SourceName, done: u64, total_bytes: u64) -> Progress {
    Progress {
        what: "checkpoint of".to_owned(),
        object: source.to_string(),
        done,
        // A CP may send more than clients wrote last: then it is as good as done.
        total: Some((total_bytes / BLOCK_BYTES_U64).max(done)),
        unit: ProgressUnit::Blocks,
    }
}

/// How far the reading of a volume is.
fn reading(source: &SourceName, volume: &VolumeName, done: u64, total: u64) -> Progress {
    Progress {
        what: "reading".to_owned(),
        object: format!("{source}/{volume}"),
        done,
        total: Some(total),
        unit: ProgressUnit::Blocks,
    }
}

/// What one end read of a volume; nothing if it did not say.
fn end_of(scan: Option<VolumeScan>) -> VerifyOfEnd {
    VerifyOfEnd {
        root: scan.and_then(|scan| scan.root),
        blocks_read: scan.map_or(0, |scan| scan.blocks_read),
        bad_blocks: scan.map_or(0, |scan| scan.bad_blocks),
    }
}

/// The pool in the status document; none if its state is lost.
fn pool_status(pool: &Pool, rot: MendFigures, upkeep: &Upkeep) -> Option<PoolStatus> {
    let space = pool.space().ok()?;
    let (repaired_blocks, damaged_blocks) = pool.repairs();
    Some(PoolStatus {
        total_bytes: source::bytes_of(space.total),
        free_bytes: source::bytes_of(space.free),
        used_bytes: source::bytes_of(space.used),
        kept_bytes: source::bytes_of(space.kept),
        pinned_bytes: source::bytes_of(space.pinned),
        reserve_bytes: source::bytes_of(space.reserve),
        volumes_bytes: None,
        rot: (rot.found > 0).then_some(RotStatus {
            found: rot.found,
            repaired: rot.repaired,
            waiting: rot.waiting,
            lost: rot.lost,
        }),
        repaired_blocks,
        damaged_blocks,
        devices: pool.devices().iter().zip(0..).map(device_status).collect(),
        pending_devices: upkeep.pending(),
        scrub: Some(upkeep.scrub()).filter(|scrub| scrub.state != "never"),
        rebuild: upkeep.rebuild(),
    })
}

fn state_word(state: MemberState) -> &'static str {
    match state {
        MemberState::In => "in",
        MemberState::Failed => "failed",
        MemberState::Rebuilding => "rebuilding",
    }
}

pub(super) fn device_status((report, place): (&MemberReport, u64)) -> PoolDeviceStatus {
    PoolDeviceStatus {
        name: report.name.to_string(),
        state: state_word(report.state).to_owned(),
        reason: report.reason.as_ref().map(ToString::to_string),
        read_errors: report.read_errors,
        repaired_blocks: report.repaired_blocks,
        place,
        size_bytes: report.size.0,
        written_bytes: report.written_bytes,
        slow_answers: report.slow_answers,
    }
}

/// The pool's series.
fn collect_pool(pool: &Pool, rot: MendFigures, upkeep: &Upkeep) {
    upkeep::collect(upkeep);
    metrics::counter!(names::ROT_FOUND.name).absolute(rot.found);
    metrics::counter!(names::ROT_REPAIRED.name).absolute(rot.repaired);
    metrics::gauge!(names::ROT_LOST.name).set(to_f64(to_u64(rot.lost.len())));
    metrics::counter!(names::CATALOG_COMMITS.name).absolute(pool.transactions());
    if let Some(status) = pool_status(pool, rot, upkeep) {
        metrics::gauge!(names::POOL_CAPACITY_BYTES.name).set(to_f64(status.total_bytes));
        metrics::gauge!(names::POOL_FREE_BYTES.name).set(to_f64(status.free_bytes));
        metrics::gauge!(names::POOL_USED_BYTES.name).set(to_f64(status.used_bytes));
        metrics::gauge!(names::POOL_PINNED_BYTES.name).set(to_f64(status.pinned_bytes));
        let pending = to_f64(to_u64(status.pending_devices.len()));
        metrics::gauge!(names::POOL_PENDING_DEVICES.name).set(pending);
    }
    let devices = pool.devices();
    for state in [MemberState::In, MemberState::Failed, MemberState::Rebuilding] {
        // A plain device is in, or its process does not run.
        let plain = u64::from(devices.is_empty() && state == MemberState::In);
        let count = devices.iter().filter(|device| device.state == state).count();
        metrics::gauge!(names::POOL_DEVICES.name, "state" => state_word(state))
            .set(to_f64(plain + to_u64(count)));
    }
    let (repaired, damaged) = pool.repairs();
    metrics::counter!(names::POOL_REPAIRED_BLOCKS.name).absolute(repaired);
    metrics::counter!(names::POOL_DAMAGED_READS.name).absolute(damaged);
    let (pins, _) = pool.pin_counts();
    metrics::gauge!(names::IMAGE_PINS.name).set(to_f64(pins));
    metrics::counter!(names::DEVICE_SYNCS.name, "device" => "pool").absolute(pool.syncs());
    metrics::counter!(names::DEVICE_ERRORS.name, "device" => "pool")
        .absolute(u64::from(pool.first_error().is_some()));
}

/// When the own certificate that ends first does so; not a number without TLS.
fn collect_tls(ends: impl IntoIterator<Item = i64>) {
    let ends = ends.into_iter().min();
    let seconds = ends.and_then(|ends| u64::try_from(ends).ok()).map_or(f64::NAN, to_f64);
    metrics::gauge!(names::TLS_CERTIFICATE_ENDS.name).set(seconds);
}

/// What CPs carried of one kind.
fn collect_carried(kind: &'static str, blocks: u64, bytes: u64) {
    metrics::counter!(names::CHECKPOINT_BLOCKS.name, "kind" => kind).absolute(blocks);
    metrics::counter!(names::CHECKPOINT_BYTES.name, "kind" => kind).absolute(bytes);
}

/// The NBD server's series.
fn collect_nbd(server: &nbd::serve::Server) {
    let counters = server.counters();
    metrics::gauge!(names::NBD_CONNECTIONS.name).set(to_f64(counters.connections_open()));
    let refused = counters.protocol_errors()
        + counters.connections_turned_away()
        + counters.connections_refused();
    metrics::counter!(names::NBD_CLIENTS_REFUSED.name).absolute(refused);
    for operation in Operation::ALL.into_iter().filter(|operation| *operation != Operation::Unknown)
    {
        let (command, totals) = (operation.name(), counters.operation(operation));
        metrics::counter!(names::NBD_REQUESTS.name, "command" => command).absolute(totals.requests);
        metrics::counter!(names::NBD_REQUEST_ERRORS.name, "command" => command)
            .absolute(totals.errors);
    }
}

/// The longest wait for each step of the ladder, of all sources.
#[derive(Debug, Default)]
struct StepAges([Option<f64>; 4]);

impl StepAges {
    /// Another source.
    fn add(&mut self, waits: &WaitsStatus) {
        for (most, own) in self.0.iter_mut().zip(waits.by_step()) {
            *most = [*most, own].into_iter().flatten().reduce(f64::max);
        }
    }

    /// What no source knows is not shown.
    fn collect(&self) {
        for (&step, age) in names::STEPS.iter().zip(self.0) {
            if let Some(age) = age {
                metrics::gauge!(names::STEP_AGE_SECONDS.name, "step" => step).set(age);
            }
        }
    }
}

/// The policy in force; the one before it is set no more, and so not shown any more.
fn collect_policy(source: &str, policy: &Policy) {
    metrics::gauge!(
        names::SOURCE_POLICY.name,
        "source" => source.to_owned(),
        "mode" => policy.mode.clone(),
        "ack" => policy.ack.clone(),
        "apply" => policy.apply.clone(),
        "on_hub_loss" => policy.on_hub_loss.clone()
    )
    .set(1.0);
}

/// The series of one source, the same on both ends.
fn collect_source(entry: &SourceEntry, published_at: u64, is_filer: bool) {
    let source = entry.name.to_string();
    // One that was retired has no series; only a filer is ever fenced.
    let shown = State::ALL.into_iter().filter(|state| *state != State::Retired);
    for state in shown.filter(|state| is_filer || *state != State::Fenced) {
        let value = if state == entry.state { 1.0 } else { 0.0 };
        metrics::gauge!(
            names::SOURCE_STATE.name, "source" => source.clone(), "state" => state.as_str()
        )
        .set(value);
    }
    if let Some(policy) = &entry.policy {
        collect_policy(&source, policy);
    }
    let count = |name: &'static str, value: u64| {
        metrics::counter!(name, "source" => source.clone()).absolute(value);
    };
    count(names::SOURCE_ACKNOWLEDGED_BYTES.name, entry.acknowledged_bytes);
    count(names::SOURCE_STAGED_BYTES.name, entry.staged_bytes);
    for (name, known) in [
        (names::SOURCE_DRAINED_BYTES.name, entry.drained_bytes),
        (names::SOURCE_APPLIED_BYTES.name, entry.applied_bytes),
    ] {
        if let Some(bytes) = known {
            count(name, bytes);
        }
    }
    count(names::SOURCE_VISIBLE_BYTES.name, entry.visible_bytes);
    let gauge = |name: &'static str, value: f64| {
        metrics::gauge!(name, "source" => source.clone()).set(value);
    };
    // A series cannot be taken back: what is not known any more is NaN, which no rule takes for a
    // small number. One that was never known is not there.
    let known = |name: &'static str, value: Option<f64>| {
        gauge(name, value.unwrap_or(f64::NAN));
    };
    let published_at = (published_at > 0).then(|| to_f64(published_at));
    known(names::SOURCE_CHECKPOINT_TIME.name, published_at);
    known(names::SOURCE_LAG_BYTES.name, entry.lag_bytes.map(to_f64));
    known(names::SOURCE_LAG_SECONDS.name, entry.lag_seconds);
    known(names::SOURCE_IMAGE_AGE_SECONDS.name, entry.image_age_seconds);
    let refused = entry.volumes.iter().filter(|volume| volume.trouble.is_some()).count();
    gauge(names::SOURCE_REFUSED_VOLUMES.name, to_f64(to_u64(refused)));
    for volume in &entry.volumes {
        let refused = if volume.trouble.is_some() { 1.0 } else { 0.0 };
        for (name, value) in [
            (names::VOLUME_SIZE_BYTES.name, to_f64(volume.size_bytes)),
            (names::VOLUME_REFUSED.name, refused),
        ] {
            let labels = [("source", source.clone()), ("volume", volume.name.to_string())];
            metrics::gauge!(name, &labels).set(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::limits::MIB;
    use crate::pool::PoolOptions;
    use crate::pool::testing::new_device;
    use crate::upkeep::Options;

    /// Goal: an NBD client for whom there is no room is in the series of those refused, as one that makes room and
    /// as one that comes too late. Control: the series is 0 before.
    #[tokio::test]
    async fn clients_without_room_are_counted() {
        let options = nbd::serve::Options { connections_max: 1, ..Default::default() };
        let options = nbd::serve::Options { linger: Duration::from_millis(50), ..options };
        let server = nbd::serve::Server::new(options);
        let shows = |count: u64| {
            let recorder = crate::observe::recorder::builder().unwrap().build_recorder();
            metrics::with_local_recorder(&recorder, || collect_nbd(&server));
            let page = recorder.handle().render();
            page.contains(&format!("{} {count}\n", names::NBD_CLIENTS_REFUSED.name))
        };
        let listen = nbd::listen::Listen::Tcp("127.0.0.1:0".parse().unwrap());
        let listener = nbd::listen::Listener::bind(&listen).await.unwrap();
        let &nbd::listen::Listen::Tcp(address) = listener.listens_on() else { unreachable!() };
        let (running, stop) = (server.clone(), CancellationToken::new());
        let exports = Arc::new(nbd::memory::MemoryExports::new([]));
        let token = stop.clone();
        let task = tokio::spawn(async move { running.run(listener, exports, token).await });
        assert!(shows(0));
        let first = tokio::net::TcpStream::connect(address).await.unwrap();
        let second = tokio::net::TcpStream::connect(address).await.unwrap();
        tokio::time::timeout(Duration::from_secs(20), async {
            while !shows(1) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await
        .expect("it is counted");
        drop((first, second));
        stop.cancel();
        task.await.unwrap();
    }

    /// Goal: who asks how a pool is gets his answer while a call is stuck under the pool's lock.
    #[test]
    fn a_stuck_pool_is_shown() {
        let options = PoolOptions::default();
        let pool = Pool::create(new_device(64 * MIB), [1; 16], options).unwrap();
        let upkeep = Upkeep::start(pool.clone(), Options::default(), Box::new(|| ())).unwrap();
        let (sender, told) = mpsc::channel();
        let (asked, kept_up) = (pool.clone(), upkeep.clone());
        let asking = pool.with_state_held(|| {
            let ask = move || {
                let recorder = crate::observe::recorder::builder().unwrap().build_recorder();
                metrics::with_local_recorder(&recorder, || {
                    collect_pool(&asked, MendFigures::default(), &kept_up);
                });
                let page = recorder.handle().render();
                (pool_status(&asked, MendFigures::default(), &kept_up), page)
            };
            let asking = std::thread::spawn(move || sender.send(ask()).unwrap());
            let (status, page) = told.recv_timeout(Duration::from_secs(60)).unwrap();
            let status = status.unwrap();
            assert!(status.free_bytes > 0 && status.reserve_bytes > 0);
            assert!(page.contains(&format!("{} 0\n", names::IMAGE_PINS.name)), "{page}");
            // Negative control: a call of the data path does wait.
            assert!(!pool.is_state_free());
            asking
        });
        asking.join().unwrap();
        upkeep.stop();
    }
}
