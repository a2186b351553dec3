//! What all parts of a hub share, and the blocking questions that actors hand to other threads.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::{Actor, Addr, ArbiterHandle};

use super::actor::SourceActor;
use super::applier::JobQueue;
use super::certificates::Came;
use super::drainer::DrainQueue;
use super::extension::{self, Extension, State};
use super::failback::Failbacks;
use super::failover::{Failovers, View};
use super::hooks::{Hooks, Moved};
use super::lane::{Cursors, Lane, lock};
use super::mending;
use super::overlay::Room;
use super::promoted::Promoted;
use super::refill::Refills;
use super::registry::Registry;
use super::retention::Keeping;
use super::seed::{self, book::Book};
use super::shares::Shares;
use super::stager::Stager;
use crate::limits::{
    CP_CREDIT_BYTES, CP_FRAME_BYTES_MAX, HUB_CREDIT_BYTES_TOTAL, LOG_CREDIT_BYTES_MIN,
    LOG_GRANT_BYTES_MIN,
};
use crate::link::refusals::Refusals;
use crate::link::shown::Fingerprint;
use crate::link::tls::HubTls;
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::session::mirror::{Known, LeftOut};
use crate::sourcelog::{LogError, LogStore};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_u64;
use crate::units::ids::{HubId, SourceId};
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{BlockCount, ByteCount, CpNumber, Epoch, Generation, Vbn};
use crate::units::policy::{AloneMark, Policy};
use crate::units::retention::Retention;
use crate::volume;
use crate::volume::mend::{Depth, Mender};
use crate::wire::message::{RefusedCode, VolumeOffer, VolumeRefusal, VolumeRoot, VolumeScan};

/// What the hub's files say of one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceSetting {
    /// Its name.
    pub name: SourceName,
    /// Guaranteed part of the ring, if the file names one.
    pub nvram_share: Option<ByteCount>,
    /// Bytes of log the source may fill, if the file names one.
    pub log_limit: Option<ByteCount>,
    /// Bytes of the pool that its image may have with its CPs that are kept, if the file names it.
    pub space_limit: Option<ByteCount>,
    /// Bytes a second that are read from it, if the file names it.
    pub bandwidth_limit: Option<ByteCount>,
    /// Until when, in seconds since 1970, it may come for the first time, if the file says so.
    pub join_by: Option<i64>,
    /// Certificates that it may come with, oldest first; with none any of its name.
    pub certificates: Vec<Fingerprint>,
    /// Volumes the file pins; empty pins none.
    pub volumes: Vec<(VolumeName, ByteCount)>,
    /// CPs that are kept by themselves, if the file says so.
    pub keep: Option<Retention>,
}

/// What a Hello brought that is kept.
#[derive(Debug, Clone)]
pub struct Told {
    /// Who it is.
    pub source: SourceId,
    /// Its boot.
    pub generation: Generation,
    /// Epoch in force.
    pub epoch: Epoch,
    /// Its volumes, without those that are refused.
    pub volumes: Vec<VolumeOffer>,
    /// What it promises, and since when it may have been alone.
    pub promise: (Policy, Option<AloneMark>),
    /// Volumes whose entries in its log do not count.
    pub left_out: Vec<LeftOut>,
}

/// What was refused when the source was last here; why is said when it comes again.
fn refused_before(known: &Known) -> Vec<VolumeRefusal> {
    let of = |left: &LeftOut| {
        let offer = known.volumes.iter().find(|offer| offer.number == left.volume)?;
        let (volume, name) = (offer.number, offer.name.clone());
        let reason = format!("volume {name} was refused when the source was last here");
        let next_step = "make source.toml and the source's file on the hub agree".to_owned();
        Some(VolumeRefusal { volume, name, reason, next_step })
    };
    known.left_out.iter().filter(|left| left.refused).filter_map(of).collect()
}

/// Counters of the whole hub.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections that reached a source.
    pub connections: AtomicU64,
    /// Connections that did not.
    pub handshakes_failed: AtomicU64,
    /// Who of them was told of in the log.
    pub said: Arc<Refusals>,
    /// Which certificates sources came with.
    pub came: Came,
    restarts: Mutex<BTreeMap<SourceName, u64>>,
    refused: Mutex<BTreeMap<&'static str, u64>>,
}

impl Counters {
    /// A connection was refused.
    pub fn refused(&self, code: RefusedCode) {
        *lock(&self.refused).entry(code.word()).or_default() += 1;
    }

    /// An actor was replaced after a panic.
    pub fn restarted(&self, name: &SourceName) {
        *lock(&self.restarts).entry(name.clone()).or_default() += 1;
    }

    /// How often that source's actor was replaced.
    pub fn restarts_of(&self, name: &SourceName) -> u64 {
        lock(&self.restarts).get(name).copied().unwrap_or(0)
    }

    /// How often any was.
    pub fn restarts(&self) -> u64 {
        lock(&self.restarts).values().sum()
    }

    /// Refusals by reason.
    pub fn refusals(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.refused).clone()
    }
}

/// The lanes by name. Lanes are few and change rarely: a plain map behind a lock.
#[derive(Debug, Default)]
pub struct Lanes(Mutex<BTreeMap<SourceName, Arc<Lane>>>);

impl Lanes {
    /// The lane of that source, once it was here.
    pub fn get(&self, name: &SourceName) -> Option<Arc<Lane>> {
        lock(&self.0).get(name).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Lane>> {
        lock(&self.0).values().cloned().collect()
    }

    /// Takes the lane of a forgotten source out.
    pub fn remove(&self, name: &SourceName) {
        lock(&self.0).remove(name);
    }

    /// Faults all of them.
    pub fn fault(&self, reason: &str) {
        for lane in self.all() {
            lane.fault(reason);
        }
    }

    /// The lane of that source, made now if need be.
    pub fn get_or_make(&self, name: &SourceName, make: impl FnOnce() -> Arc<Lane>) -> Arc<Lane> {
        lock(&self.0).entry(name.clone()).or_insert_with(make).clone()
    }
}

/// One arbiter a core.
#[derive(Debug)]
pub enum Arbiters {
    /// Each on its thread.
    Threads(Vec<ArbiterHandle>),
    /// A simulated process has one thread.
    #[cfg(test)]
    Here,
}

impl Arbiters {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Threads(all) => all.len(),
            #[cfg(test)]
            Self::Here => 1,
        }
    }

    /// Runs a task on an arbiter; false if that has ended.
    pub fn spawn(&self, at: usize, task: impl Future<Output = ()> + Send + 'static) -> bool {
        match self {
            Self::Threads(all) => all.get(at).is_some_and(|arbiter| arbiter.spawn(task)),
            #[cfg(test)]
            Self::Here => {
                drop(tokio::task::spawn_local(task));
                true
            }
        }
    }

    /// Starts an actor on an arbiter; `None` if there is no such arbiter.
    pub fn start(
        &self,
        at: usize,
        make: impl FnOnce() -> SourceActor + Send + 'static,
    ) -> Option<Addr<SourceActor>> {
        match self {
            Self::Threads(all) => {
                all.get(at).map(|arbiter| SourceActor::start_in_arbiter(arbiter, move |_| make()))
            }
            #[cfg(test)]
            Self::Here => Some(make().start()),
        }
    }
}

/// Why a source was not sent its log.
#[derive(Debug, thiserror::Error)]
pub enum RefillError {
    /// It does not take it any more.
    #[error("the source went away")]
    Gone,
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// The parts of a hub.
#[derive(Debug)]
pub struct Shared {
    /// The hub's id.
    pub hub: HubId,
    /// Images and catalog.
    pub pool: Arc<Pool>,
    /// Source logs.
    pub store: Arc<LogStore>,
    /// Into the ring.
    pub stager: Arc<Stager>,
    /// Out of the ring.
    pub drain: Arc<DrainQueue>,
    /// To the applier.
    pub jobs: Arc<JobQueue>,
    /// Passes that wait for a slot of theirs.
    pub passes: Arc<JobQueue>,
    /// Sources by name.
    pub registry: Arc<Registry>,
    /// Lanes by name.
    pub lanes: Lanes,
    /// Sources that are served here.
    pub promoted: Promoted,
    /// Threads of actors and connections.
    pub arbiters: Arbiters,
    /// How long a reader may pin an image.
    pub image_pin: Duration,
    /// What the files say.
    pub settings: Settings,
    /// Sources that were failed over.
    pub failovers: Failovers,
    /// What is run when volumes have moved.
    pub hooks: Arc<Hooks>,
    /// CPs that are kept by themselves.
    pub keeping: Keeping,
    /// Who may have how much of the ring.
    pub shares: Shares,
    /// How sources are spoken to.
    pub tls: Option<Arc<HubTls>>,
    /// Sources, and the filers that were asked to become their home since the start.
    pub invited: Mutex<BTreeMap<SourceName, SourceName>>,
    /// Memory for logs that are served before they are applied.
    pub overlays: Arc<Room>,
    /// Fenced sources that follow.
    pub failbacks: Failbacks,
    /// Who has to send again what was lost before an import.
    pub refills: Refills,
    /// What rotted here.
    pub mender: Mender,
    /// Counters.
    pub counters: Counters,
    /// Held while a source is recorded; which one, its id says.
    pub recording: [Mutex<()>; 16],
    /// What is shown of seeds, and who fills them.
    pub seeds: Arc<Book>,
}

impl Shared {
    /// What is durably known of a source.
    pub fn known(&self, name: &SourceName) -> Result<Known, String> {
        let settings = self.settings.load();
        let pinned = settings.get(name).map(|setting| setting.volumes.clone()).unwrap_or_default();
        let pinned = pinned.into_iter().map(|(name, size)| (name.to_string(), size.0)).collect();
        let mut known = Known {
            hub: self.hub,
            source: None,
            generation: Generation::default(),
            epoch: Epoch::default(),
            volumes: Vec::new(),
            refused: Vec::new(),
            left_out: Vec::new(),
            pinned,
            applied_cp: CpNumber(0),
            applied: Place::default(),
            roots: Vec::new(),
            failed_over: false,
            cp_max: CpNumber(0),
            policy: None,
            alone: None,
            work: false,
        };
        let catalog = self.pool.catalog();
        let row = catalog.source_named(name).map_err(|error| error.to_string())?;
        if let Some(row) = row {
            let volumes = catalog.volumes(row.id).map_err(|error| error.to_string())?;
            known.source = Some(row.id);
            known.generation = row.generation;
            known.epoch = row.epoch;
            known.applied_cp = row.applied;
            known.work = self.has_work(row.id);
            known.applied = extension::place(&row)?;
            let told = Extension::of(&row)?;
            (known.policy, known.alone) = (told.policy, told.alone);
            known.left_out = told.left_out;
            // A label of n in the log says that the source has cut every CP below n (R6).
            let newest = self.store.newest_cp(row.id).map_or(0, |cp| cp.0.saturating_sub(1));
            known.cp_max = row.highest_cp.max(CpNumber(newest));
            known.failed_over = match told.state {
                State::FailingOver | State::Promoted => true,
                State::Mirror | State::HandedOver => false,
            };
            for volume in volumes {
                let root = VolumeRoot { volume: volume.key.volume, root: volume.tree.root() };
                known.roots.push(root);
                known.volumes.push(VolumeOffer {
                    number: volume.key.volume,
                    id: volume.id,
                    size: volume.size(),
                    name: volume.name,
                });
            }
            known.refused = refused_before(&known);
        }
        Ok(known)
    }

    /// Whether what came of a pass that was cut is kept.
    pub fn has_work(&self, source: SourceId) -> bool {
        // A pool that does not answer says so elsewhere.
        self.pool.catalog().work(source).is_ok_and(|work| work.is_some())
    }

    /// The name under which a source of that id was here, if it is not `name` (invariant 12).
    pub fn other_name(
        &self,
        source: SourceId,
        name: &SourceName,
    ) -> Result<Option<SourceName>, String> {
        let row = self.pool.catalog().source(source).map_err(|error| error.to_string())?;
        Ok(row.map(|row| row.name).filter(|known| known != name))
    }

    /// What a source may have under way at most: bytes of transfers and of CP data.
    pub fn grant(&self) -> (u64, u64) {
        let part = HUB_CREDIT_BYTES_TOTAL / to_u64(self.settings.load().len()).max(1);
        let cp = (part / 3).clamp(CP_FRAME_BYTES_MAX, CP_CREDIT_BYTES);
        let log = part.saturating_sub(cp).clamp(LOG_GRANT_BYTES_MIN, LOG_CREDIT_BYTES_MIN);
        (log, cp)
    }

    /// Makes what a Hello brought durable: generation, epoch, the highest CP number that is used
    /// (R6: also after a restart), policy, new volumes; makes the lane. One call at a time for a
    /// source: what an earlier one began is whole before the next looks.
    pub fn record(
        &self,
        name: &SourceName,
        cp_max: CpNumber,
        told: &Told,
    ) -> Result<Arc<Lane>, String> {
        let source = told.source;
        let catalog = self.pool.catalog();
        let turn = usize::from(source.0[0]) % self.recording.len();
        let _turn = lock(&self.recording[turn]);
        let lane = self.lanes.get(name);
        let _row = lane.as_ref().map(|lane| lane.row());
        let text = |error: PoolError| error.to_string();
        let seeds = seed::waiting(self, name, told)?;
        let row = self.record_row(name, cp_max, told)?;
        let present = catalog.volumes(source).map_err(text)?;
        for offer in &told.volumes {
            if let Some(old) = present.iter().find(|old| old.key.volume == offer.number) {
                // Before Welcome: what lies behind the old end is not acknowledged sooner.
                if offer.size > old.size() {
                    catalog.grow_volume(old.key, offer.size).map_err(text)?;
                    tracing::info!(source = %name, volume = %old.name, from = %old.size(),
                        to = %offer.size, "the volume grows");
                }
                continue;
            }
            catalog
                .put_volume(VolumeRow {
                    key: VolumeKey { source, volume: offer.number },
                    id: offer.id,
                    name: offer.name.clone(),
                    tree: TreeRoot::empty(offer.size),
                    grows_to: None,
                })
                .map_err(text)?;
        }
        seed::adopt(self, &row, seeds)?;
        if lane.is_none() {
            self.begin_log(&row)?;
        }
        let lane =
            self.lanes.get_or_make(name, || Lane::new(name.clone(), source, Cursors::default()));
        if let Some(reason) = self.stager.failure() {
            lane.fault(&reason);
        }
        Ok(lane)
    }

    /// The source was here, and sends again what rot in the NVRAM may have taken.
    pub fn nothing_is_missing(&self, lane: &Lane) {
        let _row = lane.row();
        let change = |row: &mut SourceRow| {
            if let Ok(known) = Extension::of(row) {
                row.extension = known.without_doubts().encode();
            }
        };
        let catalog = self.pool.catalog();
        let row = catalog.source(lane.source());
        if let Ok(Some(row)) = &row
            && Extension::of(row).is_ok_and(|known| known == known.clone().without_doubts())
        {
            return;
        }
        if let Err(error) = row.and_then(|_| catalog.update_source(lane.source(), change)) {
            tracing::warn!(source = %lane.name(), %error, "the next start says it once more");
        }
    }

    /// The row as it was before. What was overtaken while it waited for its turn changes nothing.
    fn record_row(
        &self,
        name: &SourceName,
        cp_max: CpNumber,
        told: &Told,
    ) -> Result<SourceRow, String> {
        let Told { source, generation, epoch, promise, .. } = *told;
        let catalog = self.pool.catalog();
        let text = |error: PoolError| error.to_string();
        let before = catalog.source(source).map_err(text)?;
        if let Some(other) = before.as_ref().map(|row| &row.name).filter(|other| *other != name) {
            return Err(format!("source {source} is known here as {other}"));
        }
        let base = before.clone().unwrap_or_else(|| SourceRow::new(source, name.clone()));
        if generation.number < base.generation.number {
            return Err(format!(
                "boot {} of the source was here meanwhile",
                base.generation.number
            ));
        }
        if epoch.number < base.epoch.number {
            return Err(format!("epoch {} is in force by now", base.epoch.number));
        }
        let was = Extension::of(&base)?;
        let state = match was.state {
            // The filer of the new epoch says that it serves: the hand-over is over (R14).
            State::HandedOver => State::Mirror,
            other @ (State::Mirror | State::FailingOver | State::Promoted) => other,
        };
        let before_state = was.state;
        let (policy, alone, left_out) = (Some(promise.0), promise.1, told.left_out.clone());
        let doubted = was.doubted.or_else(|| self.doubted(name, &base, generation));
        let now = Extension { policy, alone, left_out, state, doubted, ..was.clone() };
        let known = base.generation == generation && base.epoch == epoch;
        if before.is_none() || !known || was != now || base.highest_cp < cp_max {
            let change = move |row: &mut SourceRow| {
                row.generation = generation;
                row.epoch = epoch;
                row.highest_cp = row.highest_cp.max(cp_max);
                row.extension = now.encode();
            };
            if before.is_none() {
                let mut row = base.clone();
                change(&mut row);
                catalog.put_source(row).map_err(text)?;
            } else {
                // As it is at the commit: a CP may be published at this moment.
                catalog.update_source(source, change).map_err(text)?;
            }
        }
        if before_state != state {
            self.failovers.set(name, View::of(state, epoch));
            self.failbacks.taken();
            self.moved(Moved::FailedBack, name, epoch, base.applied);
        }
        Ok(base)
    }

    /// The boot of before, if this one may not hold what that was acknowledged and is missing here: known
    /// from the commit on that would have it forgotten.
    fn doubted(
        &self,
        name: &SourceName,
        base: &SourceRow,
        comes: Generation,
    ) -> Option<Generation> {
        let since = self.lanes.get(name)?.cursors().doubts.since?;
        (since != comes && base.generation != comes).then_some(since)
    }

    /// Begins the log of a source that has no lane. A start makes the lane of each that has been
    /// here, so this one is new; what lies in a log was acknowledged, and is not thrown away.
    fn begin_log(&self, row: &SourceRow) -> Result<(), String> {
        let text = |error: LogError| error.to_string();
        let place = extension::place(row)?;
        let logs = self.store.recover(row.id, row.applied).map_err(text)?;
        let other = logs.last.is_some_and(|last| last != place);
        if other || logs.damage().is_some() || row.applied > CpNumber(0) {
            return Err("the source has logs that no start took up: restart the hub".into());
        }
        self.store.reset(row.id, Some(place)).map_err(text)
    }

    /// Hands a source its own log behind `from` up to `upto`; `None` if `from` is not on the line.
    /// `send` says whether the source still takes it.
    pub fn refill(
        &self,
        source: SourceId,
        applied: Place,
        from: Place,
        upto: Place,
        mut send: impl FnMut(&Transfer) -> bool,
    ) -> Result<Option<Place>, RefillError> {
        let mut joined = from == applied;
        let mut last = from;
        for cp in self.store.cps(source) {
            let reader = match self.store.reader(source, cp) {
                // Dropped since it was listed: its CP is published, nothing of it is asked for.
                Err(LogError::NoLog { .. }) => continue,
                other => other?,
            };
            // The offset table says where to begin: what lies before is not read.
            let behind = if joined { None } else { Some(from.transfer) };
            for transfer in reader.transfers_from(behind) {
                let transfer = match transfer {
                    Err(LogError::NoLog { .. }) => break,
                    other => other?,
                };
                let place = transfer.place();
                if place.sequence > upto.sequence {
                    break;
                }
                if joined && place.sequence > from.sequence {
                    if !send(&transfer) {
                        return Err(RefillError::Gone);
                    }
                    last = place;
                }
                joined |= place == from;
            }
        }
        Ok(joined.then_some(last))
    }

    /// Reads every block of the image of `cp` and recomputes its roots. `progress` is told volume,
    /// blocks passed and blocks in all.
    pub fn scan(
        &self,
        name: &SourceName,
        cp: CpNumber,
        mut progress: impl FnMut(&VolumeName, u64, u64),
    ) -> Result<(Vec<VolumeScan>, Vec<String>), String> {
        let lane = self.lanes.get(name).ok_or("the source was never here")?;
        let rows = self.pool.catalog().volumes(lane.source()).map_err(|error| error.to_string())?;
        let mut volumes = Vec::new();
        let mut problems = Vec::new();
        let pins = self.pool.pin_source(lane.source()).map_err(|error| error.to_string())?;
        for (row, pin) in rows.iter().zip(&pins) {
            if pin.cp() != cp || pin.key() != row.key {
                return Err(format!("CP {cp} is not the published one any more"));
            }
            let all = pin.tree().size.blocks().0;
            let report = |passed| progress(&row.name, passed, all);
            let mut report = report;
            let mut read = || {
                volume::scan::scan(&self.pool, &pin.tree(), &mut report)
                    .and_then(|scanned| Ok(pin.check().map(|()| scanned)?))
            };
            let scanned = match read() {
                Ok(found) if found.bad_blocks > 0 => {
                    let whole = (Vbn(0), all);
                    let volume = (row.key, &pin.tree());
                    let mending = mending::mend(self, &lane, volume, whole, Depth::Data);
                    let mended = mending.is_ok_and(|mending| !mending.mended.is_empty());
                    if mended { read() } else { Ok(found) }
                }
                Ok(sound) => {
                    self.mender.read_whole(row.key);
                    Ok(sound)
                }
                failed => failed,
            };
            match scanned {
                Ok(scanned) => {
                    let named = |problem| format!("volume {}: {problem}", row.name);
                    volumes.push(VolumeScan {
                        volume: row.key.volume,
                        root: scanned.root,
                        blocks_read: scanned.blocks_read,
                        bad_blocks: scanned.bad_blocks,
                    });
                    problems.extend(scanned.problems.into_iter().map(named));
                }
                Err(error) => problems.push(format!("volume {}: {error}", row.name)),
            }
        }
        Ok((volumes, problems))
    }

    /// Reads all images and mends what cannot be read. Blocks.
    pub fn mend_all(&self) {
        for lane in self.lanes.all() {
            mending::mend_all(self, &lane, Depth::Data);
        }
    }

    /// The filer that may come as that source though it is another's: its home, or the one that was
    /// asked to become it.
    pub fn home_of(&self, name: &SourceName) -> Option<SourceName> {
        if let Some(invited) = lock(&self.invited).get(name) {
            return Some(invited.clone());
        }
        let row = self.pool.catalog().source(self.lanes.get(name)?.source()).ok()??;
        let home = Extension::of(&row).ok()?.home?;
        self.lanes.all().iter().find(|lane| lane.source() == home).map(|lane| lane.name().clone())
    }

    /// What a source that has `used` bytes in the ring may have there beyond that.
    pub fn ring_room(&self, name: &SourceName, used: u64) -> u64 {
        let Some(ring) = self.stager.ring() else { return 0 };
        self.shares.room(&self.settings.load_full(), name, ring.status().capacity.0, used)
    }

    /// Blocks of the pool that a source may have.
    pub fn space_limit(&self, name: &SourceName) -> Option<BlockCount> {
        space_limit(&self.settings.load(), name)
    }

    /// Bytes a second that may come from a source.
    pub fn bandwidth_limit(&self, name: &SourceName) -> Option<u64> {
        Some(self.settings.load().get(name)?.bandwidth_limit?.0)
    }

    /// Bytes that still fit into a source's log: what its file allows, and what the store does.
    pub fn log_room(&self, name: &SourceName, source: SourceId) -> u64 {
        let limit = self.settings.load().get(name).and_then(|setting| setting.log_limit);
        let used = self.store.bytes(source).saturating_add(self.store.behind_bytes(source));
        let room = limit.map(|limit| limit.0.saturating_sub(used));
        self.store.room(source).min(room.unwrap_or(u64::MAX))
    }
}

/// What the files say of each source now.
pub type Settings = Arc<arc_swap::ArcSwap<BTreeMap<SourceName, SourceSetting>>>;

/// Blocks of the pool that a source may have by these settings.
pub(super) fn space_limit(
    settings: &BTreeMap<SourceName, SourceSetting>,
    name: &SourceName,
) -> Option<BlockCount> {
    let limit = settings.get(name)?.space_limit?;
    Some(BlockCount(limit.0 / BLOCK_BYTES_U64))
}
