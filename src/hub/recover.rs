//! What a hub does at start, before it serves anybody.
//!
//! 1. Identity: the hub's id; the first start makes it, the ring and the pool ([`super::identity`]).
//! 2. Pool: the last published CPs, from its catalog.
//! 3. Source logs: of each known source, what lies behind its published CP; the unsynced tail of a
//!    log is cut at the first record that does not check.
//! 4. Ring: every record from the release point on; what is not in its source log yet is put
//!    there (the log of a source is the union by transfer id, R11). A gap faults that source only;
//!    where its logs are damaged and the ring has all that they had behind the damage, it is cut off
//!    and written again out of the ring. Where the ring lacks some of it, the source is marked
//!    ([`super::refill`]), and its log is cut where it is sound: it has all of that, and sends it again.
//!    Of one that is failed over nobody has: its damage stays, and the failover says what is done of it.
//!    Nothing behind a fence counts (R2). A fence that the catalog does not know of stands for a
//!    failover that had just begun: its epoch is raised here, and the failover goes on.
//! 5. All logs are synced; the drainer takes over the ring's records and releases those that are
//!    safe. Records of a source whose log failed stay, and are copied forward (R10).
//!
//! A cut at any of these steps leaves the ring as it was, so the next start does the same again.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use actix::ArbiterHandle;

use super::applier::{Applier, JobQueue};
use super::doubts::Doubts;
use super::drainer::{DrainQueue, Drainer, InRing};
use super::extension::{self, Extension, State};
use super::failback::Failbacks;
use super::failover::Failovers;
use super::hooks::Hooks;
use super::identity::{identity, own_logs, state};
use super::lane::{Cursors, Fenced, Lane};
use super::promoted::{Limits, Promoted};
use super::refill::{Mark, Refills};
use super::registry::Registry;
use super::retention::Keeping;
use super::seed::book::Book;
use super::shared::{Arbiters, Counters, Lanes, Settings, Shared, space_limit};
use super::shares::Shares;
use super::stager::{COPY_ROOM_BYTES, Stager, StagerFeed};
use super::{HubError, HubOptions};
use crate::device::Device;
use crate::device::file::{Access, FileDevice};
use crate::device::latch::Latch;
use crate::limits::{LOG_MEND_BYTES_MAX, PASSES_MAX};
use crate::nvlog::{Recovered, Ring, RingError, RingOptions};
use crate::pool::rows::SourceRow;
use crate::pool::{Pool, PoolOptions};
use crate::raid::files::PoolFiles;
use crate::record::envelope::{Envelope, RecordKind};
use crate::record::marks::{Fence, Place};
use crate::record::scan::Damage;
use crate::record::transfer::Transfer;
use crate::sourcelog::{LogError, LogOptions, LogStore};
use crate::units::convert::to_u64;
use crate::units::ids::{HubId, SourceId};
use crate::units::machine;
use crate::units::numbers::{ByteCount, CpNumber, Epoch, LogPosition, SequenceNumber, TransferId};
use crate::units::policy::Ack;
use crate::wire::message::{Scanned, VolumeScan};

/// A hub keeps a short history of CPs; the long one is the source's (R5).
const HISTORY_ROWS: u64 = 64;

/// The way on where the ring is gone.
const WITHOUT: &str = "or, if it is lost, `mirrorhub import` takes the hub up without it, and each source \
     sends again what it holds";

/// Bytes of log a source may fill on this hub.
const LOG_LIMIT_BYTES: u64 = 16 << 30;

/// What both ends read for `verify`; of a promoted source there is no other end.
#[derive(Debug, Clone)]
pub struct Verified {
    /// The CP that was read.
    pub cp: CpNumber,
    /// What was read here.
    pub here: Vec<VolumeScan>,
    /// What could not be read here.
    pub problems: Vec<String>,
    /// The source's answer.
    pub there: Scanned,
}

/// A recovered hub, its threads running.
#[derive(Debug)]
pub struct Started {
    /// The parts.
    pub shared: Arc<Shared>,
    /// Drainer and appliers.
    pub threads: Vec<JoinHandle<()>>,
}

/// Runs the five steps and starts the threads.
pub fn recover(options: &HubOptions, arbiters: Vec<ArbiterHandle>) -> Result<Started, HubError> {
    let hub = identity(options)?;
    let pool = open_pool_device(&options.pool)?;
    own_logs(&options.log_dir, hub)?;
    let log_options = LogOptions::with_limit(LOG_LIMIT_BYTES);
    let logs = LogStore::open(&options.log_dir, hub, log_options).map_err(state("source logs"))?;
    let path = &options.nvram.0;
    if !path.try_exists().map_err(state(path.display().to_string()))? {
        let reason = format!("it does not exist: bring the NVRAM of hub {hub} back, {WITHOUT}");
        return Err(HubError::State { what: path.display().to_string(), reason });
    }
    let nvram = open_device(&options.nvram, Access::Direct)?;
    let refills = Refills::of(&options.data_dir);
    recover_on(options, Stores { hub, pool, logs, nvram, refills }, Arbiters::Threads(arbiters))
}

/// Where a hub keeps what it has.
#[derive(Debug)]
pub(crate) struct Stores {
    /// Whose they are.
    pub(crate) hub: HubId,
    /// Of images and catalog.
    pub(crate) pool: Arc<dyn Device>,
    /// Source logs.
    pub(crate) logs: LogStore,
    /// Of the ring.
    pub(crate) nvram: Arc<dyn Device>,
    /// Which sources have to send again.
    pub(crate) refills: Refills,
}

/// The same on stores that are open.
pub(crate) fn recover_on(
    options: &HubOptions,
    stores: Stores,
    arbiters: Arbiters,
) -> Result<Started, HubError> {
    let Stores { hub, pool: device, logs: store, nvram, refills } = stores;
    let pool_options =
        PoolOptions { owner: Some(hub.0), history_rows: HISTORY_ROWS, ..PoolOptions::default() };
    let pool = Pool::open(device, pool_options).map_err(state("pool"))?;
    let store = Arc::new(store);
    let rows = pool.catalog().sources().map_err(state("catalog"))?;
    let mut logs = Logs::recover(&store, &rows)?;
    let ring_options = RingOptions {
        spare_bytes: COPY_ROOM_BYTES,
        ..RingOptions::of("hub-commit", options.realtime)
    };
    let ids: Vec<SourceId> = rows.iter().map(|row| row.id).collect();
    let visit = &mut |record| logs.replay(record);
    let told = &mut |damage: &[Damage]| note_rot(&pool, &ids, damage);
    let (ring, _) = Ring::open_telling(nvram, hub.0, ring_options, visit, told).map_err(no_ring)?;
    let rows = logs.raise(&pool)?;
    let failovers = Failovers::recovered(&rows).map_err(state("catalog"))?;
    let (lanes, in_ring) = logs.finish(&rows, &refills);
    let refills = tell_lost(&lanes, &rows, refills)?;
    tell_rot(&lanes, &rows)?;
    let stager = Stager::new();
    let drain = DrainQueue::new();
    let handle = ring.start(Box::new(StagerFeed::new(stager.clone(), drain.clone())));
    stager.start(handle);
    let (jobs, passes) = (JobQueue::new(), JobQueue::new());
    let settings = settings_of(options);
    let seeds = Book::of(&pool.catalog().seeds().map_err(state("catalog"))?).into();
    let promoted = promoted(options, (hub, &pool), &settings);
    let shared = Arc::new(Shared {
        hub,
        pool,
        store,
        stager,
        drain,
        jobs,
        passes,
        registry: Registry::new(),
        lanes,
        promoted,
        arbiters,
        image_pin: options.image_pin,
        settings,
        failovers,
        hooks: Arc::new(Hooks::new(options.hooks.clone())),
        keeping: Keeping::default(),
        shares: Shares::default(),
        tls: options.tls.clone(),
        invited: std::sync::Mutex::default(),
        overlays: Arc::default(),
        failbacks: Failbacks::default(),
        refills,
        mender: Default::default(),
        counters: Counters::default(),
        recording: Default::default(),
        seeds,
    });
    shared.stager.belongs_to(&shared);
    let threads = start_threads(&shared, in_ring, options.appliers)?;
    Ok(Started { shared, threads })
}

fn settings_of(options: &HubOptions) -> Settings {
    let settings = options.sources.iter().map(|s| (s.name.clone(), s.clone()));
    Arc::new(arc_swap::ArcSwap::from_pointee(settings.collect()))
}

/// Each may have of the pool what the settings of that moment say.
fn promoted(
    options: &HubOptions,
    (hub, pool): (HubId, &Arc<Pool>),
    settings: &Settings,
) -> Promoted {
    let settings = Arc::clone(settings);
    let limits = Limits::new(move |name| space_limit(&settings.load(), name));
    Promoted::new(&options.data_dir, options.promoted, hub, (Arc::clone(pool), limits))
}

fn no_ring(error: RingError) -> HubError {
    let reason = match matches!(error, RingError::Blank { .. }) {
        true => format!("{error}: bring the hub's NVRAM back, {WITHOUT}"),
        false => error.to_string(),
    };
    HubError::State { what: "NVRAM".to_owned(), reason }
}

/// What was lost is missing until its source has sent it again. Of one that was promoted or handed over
/// nothing is: a cut has left the mark behind the commit that made the image the truth.
fn tell_lost(lanes: &Lanes, rows: &[SourceRow], refills: Refills) -> Result<Refills, HubError> {
    let marked = refills.marked(rows.iter().map(|row| row.id));
    let marked = marked.map_err(state(refills.directory().display().to_string()))?;
    for row in rows.iter().filter(|_| !machine::breaks(22)) {
        let Some(mark) = marked.get(&row.id) else { continue };
        match Extension::of(row).map_err(state("catalog"))?.state {
            State::Mirror | State::FailingOver => {
                let Some(lane) = lanes.get(&row.name) else { continue };
                tracing::warn!(source = %row.name, what = mark.what(), "waits for what was lost here");
                lane.lost_log(mark.clone(), row.generation);
            }
            State::Promoted | State::HandedOver => refills.forget(row.id),
        }
    }
    Ok(refills)
}

/// Rot in the ring may be anybody's acknowledged history. A broken chain shows whose; the last
/// record of a source breaks none, so each that may be concerned is told until it was here (R3):
/// durably, before the ring is written to, since no later start finds what was cut off by this one.
fn note_rot(pool: &Pool, sources: &[SourceId], damage: &[Damage]) -> Result<(), String> {
    for damage in damage {
        tracing::error!(?damage, "rot in the NVRAM");
    }
    for &source in sources {
        let concerns = |damage: &&Damage| damage.source.is_none_or(|whose| whose == source);
        let bytes: u64 = damage.iter().filter(concerns).map(|d| d.to.0 - d.from.0).sum();
        if bytes == 0 {
            continue;
        }
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let change = move |row: &mut SourceRow| {
            if let Ok(known) = Extension::of(row) {
                // Other rot than an earlier start found; or the same, if a cut came before the ring
                // was written to: then it is said twice, and "at most" is still right.
                let missing_bytes = known.missing_bytes.saturating_add(bytes);
                row.extension = Extension { missing_bytes, ..known }.encode();
            }
        };
        pool.catalog().update_source(source, change).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// What this start or an earlier one has noted, and no session since has taken away.
fn tell_rot(lanes: &Lanes, rows: &[SourceRow]) -> Result<(), HubError> {
    for row in rows.iter().filter(|_| !machine::breaks(22)) {
        let known = Extension::of(row).map_err(state("catalog"))?;
        let Some(lane) = lanes.get(&row.name) else { continue };
        let since = known.doubted.unwrap_or(row.generation);
        lane.may_miss(known.missing_bytes, since, row.generation);
        let received = known.policy.is_some_and(|policy| policy.ack == Ack::Received);
        if received && matches!(known.state, State::Mirror | State::FailingOver) {
            lane.forgot(since, row.generation);
        }
    }
    Ok(())
}

fn start_threads(
    shared: &Arc<Shared>,
    in_ring: VecDeque<InRing>,
    appliers: usize,
) -> Result<Vec<JoinHandle<()>>, HubError> {
    let (queue, store) = (shared.drain.clone(), shared.store.clone());
    let drainer = Drainer::new(queue, store, shared.stager.clone(), in_ring);
    let mut threads = vec![spawn("hub-drain", move || drainer.run())?];
    let applier = |queue: &Arc<JobQueue>| Applier::new(queue.clone(), shared.clone());
    for _ in 0..appliers.max(1) {
        let applier = applier(&shared.jobs);
        threads.push(spawn("hub-apply", move || applier.run())?);
    }
    for _ in 0..PASSES_MAX {
        let applier = applier(&shared.passes);
        threads.push(spawn("hub-pass", move || applier.run())?);
    }
    Ok(threads)
}

/// A thread whose panic ends the process: nobody would know what it left half done.
pub(super) fn spawn(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, HubError> {
    let body = move || {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err()
            && !machine::is_killed()
        {
            tracing::error!("a thread of the data path panicked, the hub ends here");
            std::process::abort();
        }
    };
    machine::spawn(name, body).map_err(state("threads"))
}

/// A device as it was made: one that has not the size that is asked for is refused, since neither
/// a ring nor a pool changes its size. Of a block device a part may be used.
fn open_pool_device(files: &PoolFiles) -> Result<Arc<dyn Device>, HubError> {
    match files.as_plain() {
        Some(plain) => open_device(plain, Access::Cached),
        None => Ok(files.open().map_err(state("pool"))?.array),
    }
}

fn open_device(
    (path, size): &(PathBuf, ByteCount),
    access: Access,
) -> Result<Arc<dyn Device>, HubError> {
    let device = FileDevice::open(path, access).map_err(state(path.display().to_string()))?;
    let met = device.size().0;
    if met < size.0 || met != size.0 && path.is_file() {
        let reason = format!(
            "it has {met} bytes and cannot change its size, the configuration asks for {size}: \
             give back the size it was made with"
        );
        return Err(HubError::State { what: path.display().to_string(), reason });
    }
    Ok(Arc::new(Latch::new(device)))
}

/// The logs of all known sources while the ring is replayed into them.
struct Logs {
    store: Arc<LogStore>,
    sources: BTreeMap<SourceId, Recovering>,
    kept: Vec<Kept>,
    unknown: u64,
}

/// A record found in the ring.
struct Kept {
    source: SourceId,
    epoch: Epoch,
    start: LogPosition,
    bytes: u64,
    cp: CpNumber,
    id: TransferId,
    sequence: SequenceNumber,
}

/// Where the older epochs of a source end: at the fence of its failover, else at its image.
fn fence_of(row: &SourceRow) -> Result<Option<Fence>, String> {
    let extension = Extension::of(row)?;
    let place = match extension.state {
        State::FailingOver => extension.fence,
        State::Mirror | State::Promoted | State::HandedOver => extension::place(row)?,
    };
    Ok((row.epoch.number > 1).then_some(Fence { epoch: row.epoch, place }))
}

struct Recovering {
    applied: CpNumber,
    place: Place,
    epoch: Epoch,
    /// What counts of older epochs ends here.
    fence: Option<Fence>,
    last: Place,
    fault: Option<String>,
    /// The fault is missing or damaged history.
    damaged: bool,
    /// Damage that the ring does not mend, of a source that has it all.
    lost: Option<String>,
    /// The source writes elsewhere: what is lost here can be sent again.
    is_mirror: bool,
    /// What is wrong with the logs behind `last`, and how far they are known to have reached: the
    /// ring may have all of that.
    mend: Option<(String, SequenceNumber)>,
    /// Bytes of the ring that are held for that.
    mend_bytes: u64,
    /// Transfers met before the one they follow: the records of a source that was faulted are
    /// copied forward (R10), so the older may lie behind the newer. Bounded by the ring.
    early: BTreeMap<SequenceNumber, (Epoch, Transfer)>,
}

impl Logs {
    fn recover(store: &Arc<LogStore>, rows: &[SourceRow]) -> Result<Self, HubError> {
        let mut sources = BTreeMap::new();
        for row in rows {
            let place = extension::place(row).map_err(state("catalog"))?;
            let logs = store.recover(row.id, row.applied);
            // What was handed over goes on behind its CP: what a cut left in the logs is of a line that
            // has ended.
            let handed_over =
                Extension::of(row).map_err(state("catalog"))?.state == State::HandedOver;
            let mut recovering = match logs {
                Ok(_) if handed_over => {
                    store.reset(row.id, Some(place)).map_err(state("source logs"))?;
                    Recovering::at(row.applied, place, place, None)
                }
                Ok(logs) => {
                    if logs.last.is_none() && logs.damage().is_none() {
                        // Nothing lies in the logs: the chain goes on behind the published CP.
                        store.reset(row.id, Some(place)).map_err(state("source logs"))?;
                    }
                    let last = logs.last.filter(|last| last.sequence > place.sequence);
                    let first = logs.logs.first().map(|log| log.start);
                    let gap = first.filter(|first| first.sequence > place.sequence).map(|first| {
                        let (begins, applied) = (first.transfer, place.transfer);
                        format!("the log begins behind {begins}, the image ends at {applied}")
                    });
                    // What lies behind a gap does not go on from the image: all of it is to come.
                    let last = last.filter(|_| gap.is_none()).unwrap_or(place);
                    let damage = logs.damage().map(ToString::to_string).or(gap);
                    let ends = logs.logs.iter().flat_map(|log| [log.start, log.last, log.synced]);
                    let upto = ends.map(|place| place.sequence).max().unwrap_or_default();
                    let mend = damage.map(|damage| (damage, upto));
                    Recovering { mend, ..Recovering::at(row.applied, place, last, None) }
                }
                Err(error) => {
                    let fault = Some(error.to_string());
                    Recovering::at(row.applied, place, place, fault)
                }
            };
            recovering.is_mirror =
                Extension::of(row).map_err(state("catalog"))?.state == State::Mirror;
            recovering.epoch = row.epoch;
            recovering.fence = fence_of(row).map_err(state("catalog"))?;
            sources.insert(row.id, recovering);
        }
        Ok(Self { store: store.clone(), sources, kept: Vec::new(), unknown: 0 })
    }

    /// One record of the ring, in ring order.
    fn replay(&mut self, record: Recovered) {
        let fence = match record.envelope.kind {
            RecordKind::Transfer => None,
            RecordKind::Fence => Some(Fence::decode(&record.body)),
            RecordKind::Freeze | RecordKind::Cut => return,
        };
        let Some(source) = self.sources.get_mut(&record.envelope.source) else {
            // Recorded in the catalog before Welcome, so this source was forgotten since.
            self.unknown += 1;
            return;
        };
        match fence {
            None => {}
            Some(Ok(fence)) => return source.fenced(fence),
            Some(Err(error)) => {
                source.fault.get_or_insert(format!("fence in the NVRAM: {error}"));
                return;
            }
        }
        let transfer = match Transfer::parse(record.body) {
            Ok(transfer) => transfer,
            Err(error) => {
                source.fault.get_or_insert(format!("record in the NVRAM: {error}"));
                source.damaged = true;
                return;
            }
        };
        let envelope = record.envelope;
        if transfer.header().cp <= source.applied || source.is_behind(&envelope, &transfer) {
            return;
        }
        source.take(&self.store, &envelope, &transfer);
        self.kept.push(Kept {
            source: envelope.source,
            epoch: envelope.epoch,
            start: envelope.position,
            bytes: u64::from(envelope.record_bytes),
            cp: transfer.header().cp,
            id: transfer.id(),
            sequence: transfer.last_sequence(),
        });
    }

    /// Ends a failover's beginning: the ring has the fence, the catalog not yet its epoch (R13).
    fn raise(&self, pool: &Pool) -> Result<Vec<SourceRow>, HubError> {
        for (&source, recovering) in &self.sources {
            let raised = recovering.fence.filter(|f| f.epoch.number > recovering.epoch.number);
            let Some(fence) = raised else { continue };
            let change = move |row: &mut SourceRow| Extension::fail_over(row, fence);
            pool.catalog().update_source(source, change).map_err(state("catalog"))?;
        }
        pool.catalog().sources().map_err(state("catalog"))
    }

    /// Damaged logs that the ring does not mend are cut where they are sound, behind a durable mark: the
    /// sources send the rest again. Without the mark nothing is cut, and the source is faulted.
    fn give_up_lost(&mut self, rows: &[SourceRow], refills: &Refills) {
        for row in rows {
            let Some(source) = self.sources.get_mut(&row.id) else { continue };
            let Some(damage) = source.lost.take() else { continue };
            // The ring may have said more of it than the catalog did: nobody sends to what is fenced.
            if !Extension::of(row).is_ok_and(|extension| extension.state == State::Mirror) {
                (source.fault, source.damaged) = (Some(damage), true);
                continue;
            }
            let what = format!(
                "what this hub held of its log is damaged: {damage}; writes that were acknowledged behind \
                 transfer {} may be missing here; the source sends them again when it connects",
                source.last.transfer
            );
            let mark = Mark { generation: row.generation, what: Some(what) };
            let marked = refills.mark(std::iter::once((row.id, mark)));
            let cut = marked.map_err(|error| format!("it cannot be marked: {error}"));
            let cut = cut.and_then(|()| {
                let cut = source.cut(&self.store, row.id);
                cut.map_err(|error| format!("it cannot be cut off: {error}"))
            });
            match cut {
                Ok(()) => {
                    let last = source.last.sequence;
                    self.kept.retain(|kept| kept.source != row.id || kept.sequence <= last);
                    tracing::error!(source = %row.name, damage, "damaged log cut where it is sound");
                }
                Err(error) => {
                    source.fault = Some(format!("{damage}; {error}"));
                    source.damaged = true;
                }
            }
        }
    }

    /// A failover waits for the log up to its fence; what ends before it here, and can come from
    /// nowhere, is a gap, which can be accepted.
    fn judge_fences(&mut self, rows: &[SourceRow]) {
        for row in rows {
            let Some(source) = self.sources.get_mut(&row.id) else { continue };
            let Ok(extension) = Extension::of(row) else { continue };
            let (last, fence) = (source.last.sequence, extension.fence.sequence);
            if extension.state != State::FailingOver || last >= fence || source.fault.is_some() {
                continue;
            }
            let what =
                format!("the log ends at entry {last}, and the failover is to reach entry {fence}");
            (source.fault, source.damaged) = (Some(what), true);
        }
    }

    /// Syncs all logs; makes the lanes and the drainer's list.
    fn finish(mut self, rows: &[SourceRow], refills: &Refills) -> (Lanes, VecDeque<InRing>) {
        for (&id, source) in &mut self.sources {
            source.mend(&self.store, id);
            source.close();
        }
        self.give_up_lost(rows, refills);
        self.judge_fences(rows);
        let dirty: Vec<SourceId> = self.sources.keys().copied().collect();
        for (source, result) in self.store.sync(&dirty) {
            if let (Err(error), Some(source)) = (result, self.sources.get_mut(&source)) {
                source.fault.get_or_insert(error.to_string());
            }
        }
        if self.unknown > 0 {
            tracing::warn!(records = self.unknown, "NVRAM holds records of forgotten sources");
        }
        let lanes = Lanes::default();
        let (mut by_id, mut ring_bytes) = (BTreeMap::new(), BTreeMap::<SourceId, u64>::new());
        for kept in &self.kept {
            *ring_bytes.entry(kept.source).or_default() += kept.bytes;
        }
        for row in rows {
            let Some(source) = self.sources.get(&row.id) else { continue };
            let last = source.last;
            let faulted = source.fault.is_some();
            let cursors = Cursors {
                staged: last,
                durable: last,
                drained: last,
                synced: if faulted { source.place } else { last },
                applied_cp: row.applied,
                applied: source.place,
                ring_bytes: ring_bytes.get(&row.id).copied().unwrap_or(0),
                undrained_bytes: 0,
                under_way_bytes: 0,
                fault: source.fault.as_deref().map(Into::into),
                damaged: source.damaged,
                doubts: Doubts::default(),
                fence: source.standing_fence(row),
                fenced: Fenced::InCatalog,
                invisible: BTreeMap::new(),
            };
            let make = || Lane::new(row.name.clone(), row.id, cursors);
            by_id.insert(row.id, lanes.get_or_make(&row.name, make));
        }
        let sources = &self.sources;
        let in_ring = |kept: Kept| {
            let lane = by_id.get(&kept.source)?.clone();
            let Kept { epoch, start, bytes, cp, id, sequence, .. } = kept;
            let last = sources.get(&kept.source)?.last;
            let drained = sequence <= last.sequence;
            Some(InRing::found(lane, epoch, start, bytes, cp, (id, sequence), drained))
        };
        (lanes, self.kept.into_iter().filter_map(in_ring).collect())
    }
}

impl Recovering {
    fn at(applied: CpNumber, place: Place, last: Place, fault: Option<String>) -> Self {
        let (epoch, fence, early) = Default::default();
        let (damaged, mend, mend_bytes, lost, is_mirror) = Default::default();
        Self {
            applied,
            place,
            epoch,
            fence,
            last,
            fault,
            damaged,
            lost,
            is_mirror,
            mend,
            mend_bytes,
            early,
        }
    }

    /// A fence of the ring; the newest counts.
    fn fenced(&mut self, fence: Fence) {
        if self.fence.is_none_or(|known| fence.epoch.number >= known.epoch.number)
            && fence.epoch.number > self.epoch.number
        {
            self.fence = Some(fence);
        }
    }

    /// Whether a transfer of an older epoch lies behind the fence: it was never acknowledged.
    fn is_behind(&self, envelope: &Envelope, transfer: &Transfer) -> bool {
        let sequence = transfer.last_sequence();
        self.fence.is_some_and(|fence| {
            envelope.epoch.number < fence.epoch.number && sequence > fence.place.sequence
        })
    }

    /// The fence that nothing may pass now.
    fn standing_fence(&self, row: &SourceRow) -> Option<Fence> {
        let state = Extension::of(row).map(|extension| extension.state);
        self.fence.filter(|_| matches!(state, Ok(State::FailingOver | State::Promoted)))
    }

    /// Puts a transfer of the ring into its log, if it is not there, and those that follow it.
    fn take(&mut self, store: &LogStore, envelope: &Envelope, transfer: &Transfer) {
        if self.lost.is_some() {
            return;
        }
        let held = (envelope.epoch, transfer.clone());
        self.early.insert(transfer.header().first_sequence, held);
        if let Some((damage, _)) = &self.mend {
            // Nothing is cut off before it is known that all of it is here.
            self.mend_bytes += to_u64(transfer.bytes().len());
            if self.mend_bytes > LOG_MEND_BYTES_MAX {
                let more =
                    format!("{damage}; more than {LOG_MEND_BYTES_MAX} bytes would be mended");
                self.mend = None;
                self.lose(more);
                self.early.clear();
            }
            return;
        }
        while self.fault.is_none() {
            let Some(next) = self.early.first_entry() else { return };
            if *next.key() > self.last.sequence.next() {
                return;
            }
            let (epoch, transfer) = next.remove();
            if transfer.last_sequence() > self.last.sequence {
                self.append(store, envelope.source, epoch, &transfer);
            }
        }
        self.early.clear();
    }

    fn append(&mut self, store: &LogStore, source: SourceId, epoch: Epoch, transfer: &Transfer) {
        let header = transfer.header();
        if header.previous != self.last.transfer || header.hash_before != self.last.hash {
            self.gap(transfer);
            return;
        }
        match store.append(source, epoch, transfer) {
            Ok(_) => {
                self.last = transfer.place();
            }
            Err(error) => self.fault = Some(error.to_string()),
        }
    }

    /// No more records come: damaged logs are cut where they are sound and go on out of the ring, if
    /// it has all that they had behind that (R11). A cut before the first record is appended leaves
    /// sound logs that end earlier, and the ring as it was.
    fn mend(&mut self, store: &LogStore, source: SourceId) {
        let Some((damage, upto)) = self.mend.take() else { return };
        let behind = self.last.sequence;
        let rest: Vec<(Epoch, Transfer)> = std::mem::take(&mut self.early)
            .into_values()
            .filter(|(_, transfer)| transfer.last_sequence() > behind)
            .collect();
        let mut end = self.last;
        for (_, transfer) in &rest {
            let header = transfer.header();
            if (header.previous, header.hash_before) != (end.transfer, end.hash) {
                break;
            }
            end = transfer.place();
        }
        let whole = rest.last().is_some_and(|(_, last)| last.place() == end);
        if !whole || end.sequence < upto {
            self.lose(damage);
            return;
        }
        if let Err(error) = self.cut(store, source) {
            self.fault = Some(format!("{damage}; it cannot be cut off: {error}"));
            self.damaged = true;
            return;
        }
        tracing::warn!(%source, damage, transfers = rest.len(), "log written again out of the NVRAM");
        for (epoch, transfer) in rest {
            if self.fault.is_none() {
                self.append(store, source, epoch, &transfer);
            }
        }
    }

    /// Drops what lies behind `last`, damage and all.
    fn cut(&self, store: &LogStore, source: SourceId) -> Result<(), LogError> {
        if self.last == self.place {
            store.reset(source, Some(self.place))
        } else {
            store.cut(source, self.last)
        }
    }

    /// History is missing here. The first that is met is told.
    fn lose(&mut self, damage: String) {
        if self.fault.is_some() || self.lost.is_some() {
        } else if self.is_mirror {
            self.lost = Some(damage);
        } else {
            (self.fault, self.damaged) = (Some(damage), true);
        }
    }

    /// No more records come: what still waits for the one before it shows a gap.
    fn close(&mut self) {
        if let Some((_, (_, transfer))) = self.early.pop_first() {
            self.gap(&transfer);
        }
        self.early.clear();
    }

    fn gap(&mut self, transfer: &Transfer) {
        let header = transfer.header();
        let text = format!(
            "the log has a gap: transfer {} follows {}, the last one here is {}",
            header.id, header.previous, self.last.transfer
        );
        self.lose(text);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::record::entry::{Entry, EntryKind};
    use crate::record::transfer::{Builder, TransferHeader};
    use crate::units::hash::{StreamHash, crc32c};
    use crate::units::ids::RingId;
    use crate::units::numbers::VolumeNumber;

    fn transfer(sequence: u64) -> Transfer {
        let data = Bytes::from_static(b"data");
        let (kind, volume) = (EntryKind::Write, VolumeNumber(0));
        let mut builder = Builder::default();
        builder.push(Entry { kind, volume, offset: 0, length: 4, crc: crc32c(&data) }, data);
        builder.finish(TransferHeader {
            id: TransferId { generation: 1, counter: sequence },
            cp: CpNumber(1),
            partition: 0,
            first_sequence: SequenceNumber(sequence),
            previous: TransferId::NONE,
            hash_before: StreamHash::ZERO,
            own_durable: TransferId::NONE,
        })
    }

    fn envelope(number: u32) -> Envelope {
        Envelope {
            kind: RecordKind::Transfer,
            ring: RingId([0; 16]),
            position: LogPosition(0),
            durable: LogPosition(0),
            source: SourceId([0; 16]),
            epoch: Epoch { number, id: 1 },
            body_bytes: 1,
            record_bytes: 512,
            body_crc: 0,
        }
    }

    /// Records of an older epoch end at the fence; those before it, copied behind it in the ring,
    /// and those of the epoch it raised, count.
    #[test]
    fn what_lies_behind_a_fence_is_told_by_its_epoch() {
        let place = transfer(5).place();
        let mut source = Recovering::at(CpNumber(0), Place::default(), Place::default(), None);
        source.epoch = Epoch { number: 1, id: 1 };
        assert!(!source.is_behind(&envelope(1), &transfer(6)), "there is no fence");
        let fence = Fence { epoch: Epoch { number: 2, id: 9 }, place };
        source.fenced(fence);
        assert!(source.is_behind(&envelope(1), &transfer(6)));
        assert!(!source.is_behind(&envelope(1), &transfer(5)));
        assert!(!source.is_behind(&envelope(2), &transfer(6)));
        // An old one, whose epoch the catalog has passed, moves nothing.
        source.epoch = Epoch { number: 3, id: 1 };
        let last = transfer(7).place();
        source.fenced(Fence { place: last, ..fence });
        assert_eq!(source.fence, Some(fence));
    }
}
