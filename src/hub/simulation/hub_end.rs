//! The hub: its media, its process, and what is asked of it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use super::disk::Disk;
use super::laws;
use super::probes::Probe;
use super::process::Running;
use super::setup::{HUB_POOL_BYTES, HUB_RING_BYTES, Setup, VOLUMES, hub_options};
use super::world::{LOOK_AGAIN, Nvrams, Primary, SourceState, begin_clients};
use crate::device::Device;
use crate::device::sim::{Chance, Effect, SimDevice};
use crate::filer::Filer;
use crate::hub::connection::{Known, greet};
use crate::hub::extension::State;
use crate::hub::promoted::Engine;
use crate::hub::recover::{Stores, recover_on};
use crate::hub::refill::Refills;
use crate::hub::shared::{Arbiters, Shared};
use crate::hub::{HubOptions, bring_up, failback, failover};
use crate::link::simulated::Inbox;
use crate::nbd::export::{Exports as _, Segment};
use crate::nvlog::format::HEADER_BYTES;
use crate::nvlog::{Ring, RingShape};
use crate::pool::write_set::Reservation;
use crate::sourcelog::sim::SimFiles;
use crate::sourcelog::{LogOptions, LogStore};
use crate::units::convert::{low_u32, to_usize};
use crate::units::ids::HubId;
use crate::units::machine;
use crate::units::machine::simulated::Process;
use crate::units::names::SourceName;
use crate::units::numbers::ByteCount;

const HUB: HubId = HubId([9; 16]);

/// What is known of all sources, in order.
pub(super) type Sources = Vec<Rc<RefCell<SourceState>>>;

/// Does what is asked of the hub, and begins the clients of what it serves itself.
async fn administer(
    shared: Arc<Shared>,
    parts: Rc<RefCell<HubParts>>,
    sources: Sources,
    mut chance: Chance,
) {
    let mut served: BTreeMap<usize, Arc<Filer>> = BTreeMap::new();
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        let asked = parts.borrow_mut().asked.pop_front();
        if let Some(asked) = asked {
            if let Asked::Accept(at) = asked {
                parts.borrow_mut().resuming.remove(&sources[at].borrow().setup.name);
            }
            let (shared, sources, parts) = (Arc::clone(&shared), sources.clone(), parts.clone());
            parts.borrow_mut().obeying += 1;
            drop(tokio::task::spawn_local(async move {
                obey(asked, shared, sources).await;
                parts.borrow_mut().obeying -= 1;
            }));
        }
        for (at, state) in sources.iter().enumerate() {
            let name = state.borrow().setup.name.clone();
            let Some(Engine::Running(engine)) = shared.promoted.engine(&name) else { continue };
            if served.get(&at).is_some_and(|known| Arc::ptr_eq(known, &engine)) {
                continue;
            }
            served.insert(at, Arc::clone(&engine));
            if parts.borrow_mut().resuming.remove(&name) {
                state.borrow_mut().probes.hit(Probe::FailoverResumed);
            }
            let sequence = engine.shared().order.figures().sequence.0;
            promoted(&shared, &name, state, sequence);
            if state.borrow().twin.is_some()
                && let Some(served) = content_of(&engine).await
            {
                state.borrow_mut().go_on_with(sequence, &served);
            }
            begin_clients(Primary::Hub, &engine, state, &mut chance);
        }
    }
}

/// What clients would read, all of it; nothing if it cannot be read.
async fn content_of(engine: &Filer) -> Option<Vec<Vec<u8>>> {
    let mut contents = Vec::new();
    for number in 0..VOLUMES {
        let export = engine.exports().open(&format!("vol{number}")).await.ok()?;
        let size = export.info().size.0;
        let mut bytes = Vec::new();
        for segment in export.read(0, low_u32(size)).await.ok()? {
            match segment {
                Segment::Data(data) => bytes.extend_from_slice(&data),
                Segment::Hole(count) => bytes.resize(bytes.len() + to_usize(count), 0),
            }
        }
        contents.push(bytes);
    }
    Some(contents)
}

/// The hub serves from now on.
fn promoted(shared: &Shared, name: &SourceName, state: &Rc<RefCell<SourceState>>, sequence: u64) {
    let state = &mut *state.borrow_mut();
    let Some(lane) = shared.lanes.get(name) else { return };
    if state.primary == Primary::Source {
        state.own_line = Some(state.line.clone());
        // Over its log the roots do not tell yet whose line it is.
        state.twin = state.line.other().filter(|_| state.may_differ());
    }
    match laws::published_in(&shared.pool, lane.source()) {
        // Nothing is ordered behind the CP of a failover when its engine begins.
        Ok((_, at, roots)) if at == sequence => {
            let twin = state.twin.take();
            if !matches!(state.line.has(sequence, &roots, false), Ok(true))
                && let Some(twin) = twin
            {
                state.line = twin;
            }
        }
        Ok(_) => {}
        Err(problem) => state.judge::<()>(Err(problem)),
    }
    if let Ok(Some(row)) = shared.pool.catalog().source(lane.source()) {
        state.epoch = row.epoch.number;
    }
    if state.primary == Primary::Source {
        state.probes.hit(Probe::Promoted);
    }
    state.change(Primary::Hub, sequence);
}

async fn obey(asked: Asked, shared: Arc<Shared>, sources: Sources) {
    match asked {
        Asked::Failover(at) | Asked::Accept(at) => {
            let accept_gap = matches!(asked, Asked::Accept(_));
            let name = sources[at].borrow().setup.name.clone();
            let (parts, of) = (Arc::clone(&shared), name.clone());
            let ask = failover::Ask { accept_gap, ..failover::Ask::default() };
            let run = move || failover::run(&parts, &of, ask, &|_| true, &|_| ());
            if let Ok(Ok(_)) = machine::blocking(run).await {
                if accept_gap {
                    sources[at].borrow_mut().probes.hit(Probe::WayOn);
                }
                failover::serve(&shared, &name).await;
            }
        }
        Asked::Failback(at) => {
            let name = sources[at].borrow().setup.name.clone();
            let keeps = sources[at].borrow().setup.keeps;
            let sides = [failback::Side::Source, failback::Side::Hub];
            for side in sides.into_iter().skip(usize::from(!keeps)) {
                let ask = failback::Ask { keep: Some(side), ..failback::Ask::default() };
                let given = failback::run(&shared, &name, ask, Box::new(|_| true)).await;
                // Refused, it is asked again; where only one side has written there is nothing to choose.
                if !given.is_err_and(|refused| refused.reason.contains("never had")) {
                    break;
                }
            }
        }
    }
}

/// The hub.
#[derive(Debug)]
pub(super) struct HubEnd {
    options: HubOptions,
    pub(super) nvram: Arc<SimDevice>,
    pub(super) pool: Disk,
    pub(super) files: SimFiles,
    pub(super) nvrams: Nvrams,
    refills: Refills,
    pub(super) running: Option<Running>,
    pub(super) inbox: Inbox,
    pub(super) parts: Rc<RefCell<HubParts>>,
    pub(super) start_at: Option<u64>,
    pub(super) erring: bool,
    /// As those of a source.
    pub(super) rotten: bool,
    pub(super) full: Option<(Reservation, u64)>,
    pub(super) lives: u32,
}

/// What the hub's process has told.
#[derive(Debug, Default)]
pub(super) struct HubParts {
    pub(super) shared: Option<Arc<Shared>>,
    pub(super) refused: Option<String>,
    /// What an administrator asks for.
    pub(super) asked: VecDeque<Asked>,
    /// Whose failover it found when it was started, and is to go on with by itself.
    resuming: BTreeSet<SourceName>,
    /// Commands that have not come to their end.
    pub(super) obeying: usize,
}

/// A command.
#[derive(Debug, Clone, Copy)]
pub(super) enum Asked {
    Failover(usize),
    /// What cannot be read any more is given up.
    Accept(usize),
    Failback(usize),
}

impl HubEnd {
    pub(super) fn new(setup: &Setup) -> Self {
        let nvram = Arc::new(SimDevice::new("hub-nvram", ByteCount(HUB_RING_BYTES + HEADER_BYTES)));
        let mirrored = setup.mirrored.last().copied().unwrap_or_default();
        let pool = Disk::new("hub-pool", HUB_POOL_BYTES, mirrored).with_pool(HUB.0);
        let shape = RingShape { area_bytes_min: 1 << 20, commit_bytes_max: 2 << 20 };
        Ring::create(nvram.clone(), HUB.0, shape).unwrap();
        Self {
            options: hub_options(setup),
            nvram,
            pool,
            files: SimFiles::default(),
            nvrams: Nvrams::default(),
            refills: Refills::simulated(),
            running: None,
            inbox: Inbox::default(),
            parts: Rc::default(),
            start_at: Some(0),
            erring: false,
            rotten: false,
            full: None,
            lives: 0,
        }
    }

    pub(super) fn start(&mut self, process: Process, sources: Sources, seed: u64) {
        self.inbox = Inbox::default();
        let (inbox, parts, options) =
            (self.inbox.clone(), Rc::clone(&self.parts), self.options.clone());
        let (nvram, pool, files) = (self.nvram.clone(), self.pool.open(), self.files.clone());
        let (nvrams, refills) = (self.nvrams.clone(), self.refills.clone());
        *self.parts.borrow_mut() = HubParts::default();
        let body = async move {
            let for_stores = options.clone();
            let recovered = machine::blocking(move || {
                let log_options = LogOptions {
                    files_open_max: 8,
                    step_bytes: 64 << 10,
                    limit_bytes_per_source: 32 << 20,
                };
                let logs =
                    LogStore::open_with(Arc::new(files), Path::new("/logs"), HUB, log_options)
                        .map_err(|error| error.to_string())?;
                let nvram: Arc<dyn Device> = nvram;
                let stores = Stores { hub: HUB, pool: pool?, logs, nvram, refills };
                recover_on(&for_stores, stores, Arbiters::Here).map_err(|error| error.to_string())
            });
            let shared = match recovered.await.map_err(|error| error.to_string()) {
                Ok(Ok(started)) => started.shared,
                Ok(Err(reason)) | Err(reason) => {
                    parts.borrow_mut().refused = Some(reason);
                    return;
                }
            };
            shared.promoted.simulated.get_or_init(|| nvrams);
            let resuming = shared.failovers.in_state(State::FailingOver);
            parts.borrow_mut().resuming = resuming.into_iter().collect();
            let stop = tokio_util::sync::CancellationToken::new();
            if let Err(error) = bring_up(&shared, &options.sources, 1, &stop).await {
                parts.borrow_mut().refused = Some(error.to_string());
                return;
            }
            parts.borrow_mut().shared = Some(Arc::clone(&shared));
            let chance = Chance::new(seed);
            drop(tokio::task::spawn_local(administer(shared.clone(), parts, sources, chance)));
            loop {
                let socket = inbox.accept().await;
                let shared = Arc::clone(&shared);
                drop(tokio::task::spawn_local(async move {
                    // A connection that is refused is told so, and counted.
                    drop(greet(socket, Known::Local, "simulated", &shared).await);
                }));
            }
        };
        self.running = Some(Running::begin(process, body));
    }

    /// Whether a start may fail now.
    pub(super) fn is_excused(&self) -> bool {
        self.erring || self.is_off()
    }

    /// The n-th change of its ring or pool does that.
    pub(super) fn fail(&self, ring: bool, nth: u64, effect: Effect) {
        if ring { self.nvram.fail_change(nth, effect) } else { self.pool.fail_change(nth, effect) }
    }

    /// Whether it runs, no command is under way, nor a failover that it goes on with by itself.
    pub(super) fn is_at_rest(&self) -> bool {
        let parts = self.parts.borrow();
        let Some(shared) = &parts.shared else { return false };
        let none = |state| shared.failovers.in_state(state).is_empty();
        parts.asked.is_empty()
            && parts.obeying == 0
            && none(State::FailingOver)
            && none(State::Promoted)
    }

    /// Whether its power has gone in a call.
    pub(super) fn is_off(&self) -> bool {
        self.nvram.is_off() || self.pool.is_off() || self.files.is_dead()
    }

    pub(super) fn shared(&self) -> Option<Arc<Shared>> {
        self.parts.borrow().shared.clone()
    }
}
