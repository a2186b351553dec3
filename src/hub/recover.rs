//! What a hub does at start, before it serves anybody.
//!
//! 1. Identity: the hub's id, made at the first start together with ring and pool.
//! 2. Pool: the last published CPs, from its catalog.
//! 3. Source logs: of each known source, what lies behind its published CP; the unsynced tail of a
//!    log is cut at the first record that does not check.
//! 4. Ring: every record from the release point on; what is not in its source log yet is put
//!    there (the log of a source is the union by transfer id, R11). A gap faults that source only.
//! 5. All logs are synced; the drainer takes over the ring's records and releases those that are
//!    safe. Records of a source whose log failed stay, and are copied forward (R10).
//!
//! A cut at any of these steps leaves the ring as it was, so the next start does the same again.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use actix::ArbiterHandle;
use serde::{Deserialize, Serialize};

use super::applier::{Applier, JobQueue};
use super::drainer::{DrainQueue, Drainer, InRing};
use super::extension;
use super::lane::{Cursors, Lane};
use super::registry::Registry;
use super::shared::{Arbiters, Counters, Lanes, Shared};
use super::stager::{COPY_ROOM_BYTES, Stager, StagerFeed};
use super::{HubError, HubOptions};
use crate::device::Device;
use crate::device::file::{Access, FileDevice};
use crate::device::latch::Latch;
use crate::nvlog::{Recovered, Ring, RingOptions, RingShape};
use crate::pool::rows::SourceRow;
use crate::pool::{Pool, PoolOptions};
use crate::record::envelope::{Envelope, RecordKind};
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::sourcelog::{LogOptions, LogStore};
use crate::units::ids::{HubId, SourceId};
use crate::units::numbers::{ByteCount, CpNumber, Epoch, LogPosition, SequenceNumber, TransferId};
use crate::wire::message::{Scanned, VolumeScan};

/// A hub keeps a short history of CPs; the long one is the source's (R5).
const HISTORY_ROWS: u64 = 64;

/// Bytes of log a source may fill on this hub.
const LOG_LIMIT_BYTES: u64 = 16 << 30;

/// What both ends read for `verify`.
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

/// The identity file of a hub.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    schema: u32,
    hub: HubId,
}

fn state<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> HubError {
    let what = what.into();
    move |error| HubError::State { what, reason: error.to_string() }
}

/// Runs the five steps and starts the threads.
pub fn recover(options: &HubOptions, arbiters: Vec<ArbiterHandle>) -> Result<Started, HubError> {
    fs::create_dir_all(&options.data_dir)
        .map_err(state(format!("data_dir {}", options.data_dir.display())))?;
    let hub = identity(options)?;
    let device = open_device(&options.pool.0, Access::Cached)?;
    let pool_options =
        PoolOptions { owner: Some(hub.0), history_rows: HISTORY_ROWS, ..PoolOptions::default() };
    let pool = Pool::open(device, pool_options).map_err(state("pool"))?;
    own_logs(&options.log_dir, hub)?;
    let log_options = LogOptions::with_limit(LOG_LIMIT_BYTES);
    let store = LogStore::open(&options.log_dir, hub, log_options).map_err(state("source logs"))?;
    let store = Arc::new(store);
    let rows = pool.catalog().sources().map_err(state("catalog"))?;
    let mut logs = Logs::recover(&store, &rows)?;
    let ring_device = open_device(&options.nvram.0, Access::Direct)?;
    let ring_options = RingOptions {
        thread_name: "hub-commit".into(),
        spare_bytes: COPY_ROOM_BYTES,
        ..RingOptions::default()
    };
    let (ring, recovery) =
        Ring::open(ring_device, hub.0, ring_options, &mut |record| logs.replay(record))
            .map_err(state("NVRAM"))?;
    for damage in &recovery.damage {
        tracing::error!(?damage, "rot in the NVRAM");
    }
    let (lanes, in_ring) = logs.finish(&rows);
    let stager = Stager::new();
    let drain = DrainQueue::new();
    let handle = ring.start(Box::new(StagerFeed::new(stager.clone(), drain.clone())));
    stager.start(handle);
    let jobs = JobQueue::new();
    let settings = options.sources.iter().map(|s| (s.name.clone(), s.clone())).collect();
    let shared = Arc::new(Shared {
        hub,
        pool,
        store,
        stager,
        drain,
        jobs,
        registry: Registry::new(),
        lanes,
        arbiters: Arbiters(arbiters),
        image_pin: options.image_pin,
        settings: arc_swap::ArcSwap::from_pointee(settings),
        counters: Counters::default(),
        recording: Default::default(),
    });
    shared.stager.belongs_to(&shared);
    let threads = start_threads(&shared, in_ring, options.appliers)?;
    Ok(Started { shared, threads })
}

fn start_threads(
    shared: &Arc<Shared>,
    in_ring: VecDeque<InRing>,
    appliers: usize,
) -> Result<Vec<JoinHandle<()>>, HubError> {
    let (queue, store) = (shared.drain.clone(), shared.store.clone());
    let drainer = Drainer::new(queue, store, shared.stager.clone(), in_ring);
    let mut threads = vec![spawn("hub-drain", move || drainer.run())?];
    for _ in 0..appliers.max(1) {
        let applier = Applier::new(shared.jobs.clone(), shared.pool.clone(), shared.store.clone());
        threads.push(spawn("hub-apply", move || applier.run())?);
    }
    Ok(threads)
}

/// A thread whose panic ends the process: nobody would know what it left half done.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, HubError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err() {
                tracing::error!("a thread of the data path panicked, the hub ends here");
                std::process::abort();
            }
        })
        .map_err(state("threads"))
}

/// The file that names the owner of a log directory.
const OWNER_FILE: &str = "hub-id";

/// The log directory is the one that this hub has written to: one that is empty or another's would
/// pass for sources that have nothing to lose (R20).
fn own_logs(dir: &Path, hub: HubId) -> Result<(), HubError> {
    let path = dir.join(OWNER_FILE);
    let what = || format!("source logs in {}", dir.display());
    let refuse = |met: String| {
        let reason = format!(
            "{met}; bring the hub's log directory back, or, if it is lost, write {hub} into {} \
             to go on without: sources that still hold what was in it send it again",
            path.display()
        );
        Err(HubError::State { what: what(), reason })
    };
    match fs::read_to_string(&path) {
        Ok(text) if text.trim() == hub.to_string() => Ok(()),
        Ok(text) => refuse(format!("it belongs to hub {}", text.trim())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            refuse(format!("there is no file {OWNER_FILE} in it"))
        }
        Err(error) => Err(state(path.display().to_string())(error)),
    }
}

/// The hub's id; at the first start makes it, the ring and the pool.
fn identity(options: &HubOptions) -> Result<HubId, HubError> {
    let path = options.data_dir.join("identity.json");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let identity: Identity =
                serde_json::from_str(&text).map_err(state(path.display().to_string()))?;
            if identity.schema != 1 {
                let reason = format!("schema {} is not known here", identity.schema);
                return Err(HubError::State { what: path.display().to_string(), reason });
            }
            Ok(identity.hub)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let hub = HubId::random().map_err(state("hub id"))?;
            let ring = create_device(&options.nvram.0, options.nvram.1, Access::Direct)?;
            Ring::create(ring, hub.0, RingShape::default()).map_err(state("NVRAM"))?;
            let device = create_device(&options.pool.0, options.pool.1, Access::Cached)?;
            drop(Pool::create(device, hub.0, PoolOptions::default()).map_err(state("pool"))?);
            fs::create_dir_all(&options.log_dir).map_err(state("source logs"))?;
            write_synced(&options.log_dir.join(OWNER_FILE), hub.to_string().as_bytes())
                .map_err(state("source logs"))?;
            write_identity(&path, &Identity { schema: 1, hub })
                .map_err(state(path.display().to_string()))?;
            tracing::info!(%hub, "first start: hub created");
            Ok(hub)
        }
        Err(error) => Err(state(path.display().to_string())(error)),
    }
}

fn write_identity(path: &Path, identity: &Identity) -> std::io::Result<()> {
    write_synced(path, serde_json::to_string_pretty(identity)?.as_bytes())
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file = fs::File::create(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    match path.parent() {
        Some(directory) => fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

fn create_device(
    path: &Path,
    size: ByteCount,
    access: Access,
) -> Result<Arc<dyn Device>, HubError> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(state(directory.display().to_string()))?;
    }
    let made = match access {
        Access::Direct => FileDevice::create(path, size, access),
        Access::Cached => FileDevice::create_unwritten(path, size, access),
    };
    Ok(Arc::new(made.map_err(state(path.display().to_string()))?))
}

fn open_device(path: &Path, access: Access) -> Result<Arc<dyn Device>, HubError> {
    let device = FileDevice::open(path, access).map_err(state(path.display().to_string()))?;
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

struct Recovering {
    applied: CpNumber,
    place: Place,
    last: Place,
    fault: Option<String>,
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
            let recovering = match logs {
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
                    let fault = logs.damage().map(ToString::to_string).or(gap);
                    Recovering::at(row.applied, place, last.unwrap_or(place), fault)
                }
                Err(error) => {
                    let fault = Some(error.to_string());
                    Recovering::at(row.applied, place, place, fault)
                }
            };
            sources.insert(row.id, recovering);
        }
        Ok(Self { store: store.clone(), sources, kept: Vec::new(), unknown: 0 })
    }

    /// One record of the ring, in ring order.
    fn replay(&mut self, record: Recovered) {
        if record.envelope.kind != RecordKind::Transfer {
            return;
        }
        let Some(source) = self.sources.get_mut(&record.envelope.source) else {
            // Recorded in the catalog before Welcome, so this source was forgotten since.
            self.unknown += 1;
            return;
        };
        let transfer = match Transfer::parse(record.body) {
            Ok(transfer) => transfer,
            Err(error) => {
                source.fault.get_or_insert(format!("record in the NVRAM: {error}"));
                return;
            }
        };
        let envelope = record.envelope;
        if transfer.header().cp <= source.applied {
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

    /// Syncs all logs; makes the lanes and the drainer's list.
    fn finish(mut self, rows: &[SourceRow]) -> (Lanes, VecDeque<InRing>) {
        self.sources.values_mut().for_each(Recovering::close);
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
        let mut by_id = BTreeMap::new();
        for row in rows {
            let Some(source) = self.sources.get(&row.id) else { continue };
            let last = source.last;
            let of_source = self.kept.iter().filter(|kept| kept.source == row.id);
            let faulted = source.fault.is_some();
            let cursors = Cursors {
                staged: last,
                durable: last,
                drained: last,
                synced: if faulted { source.place } else { last },
                applied_cp: row.applied,
                applied: source.place,
                ring_bytes: of_source.map(|kept| kept.bytes).sum(),
                undrained_bytes: 0,
                under_way_bytes: 0,
                fault: source.fault.as_deref().map(Into::into),
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
        Self { applied, place, last, fault, early: BTreeMap::new() }
    }

    /// Puts a transfer of the ring into its log, if it is not there, and those that follow it.
    fn take(&mut self, store: &LogStore, envelope: &Envelope, transfer: &Transfer) {
        let held = (envelope.epoch, transfer.clone());
        self.early.insert(transfer.header().first_sequence, held);
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
        self.fault.get_or_insert(text);
    }
}
