//! The sources and what is known of them: their media, their processes, and what has to hold.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::client::client;
use super::copies::{Copy, Devices};
use super::disk::Disk;
use super::laws::published_in;
use super::line::Line;
use super::probes::{Probe, Probes};
use super::process::Running;
use super::setup::{GROWN_BYTES, SOURCE_POOL_BYTES, SourceSetup, VOLUME_BYTES, VOLUMES};
use crate::device::sim::{Chance, Effect, SimDevice};
use crate::filer::Filer;
use crate::filer::completion::Figures;
use crate::filer::recover::Store;
use crate::filer::shared::Shared as FilerShared;
use crate::nvlog::format::HEADER_BYTES;
use crate::pool::write_set::Reservation;
use crate::session::primary::Answering;
use crate::units::convert::to_usize;
use crate::units::hash::Root;
use crate::units::machine::simulated::Process;
use crate::units::numbers::{ByteCount, CpNumber, VolumeNumber};
use crate::units::policy::{Ack, Mode};

/// How often somebody looks.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The NVRAM files of promoted sources.
#[derive(Debug, Clone, Default)]
pub(in crate::hub) struct Nvrams(Arc<Mutex<BTreeMap<PathBuf, Arc<SimDevice>>>>);

impl Nvrams {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Arc<SimDevice>>> {
        self.0.lock().unwrap()
    }

    /// Opens one, or makes it.
    pub(in crate::hub) fn open(&self, path: PathBuf, size: ByteCount) -> Store {
        let mut all = self.lock();
        let new = !all.contains_key(&path);
        let make = || Arc::new(SimDevice::new("promoted", ByteCount(size.0 + HEADER_BYTES)));
        let device: Arc<SimDevice> = Arc::clone(all.entry(path).or_insert_with(make));
        Store { device, new }
    }

    pub(in crate::hub) fn remove(&self, path: &Path) {
        self.lock().remove(path);
    }

    /// As the hub's next process finds them.
    pub(super) fn survive(&self, power: Option<u64>) {
        for device in self.lock().values_mut() {
            if let Some(seed) = power {
                device.power_cut(seed);
            }
            *device = Arc::new(device.survivor());
        }
    }
}

/// Who serves a source's clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Primary {
    Source,
    Hub,
}

/// What a run knows of a source, whoever of its processes lives.
#[derive(Debug)]
pub(super) struct SourceState {
    pub(super) setup: SourceSetup,
    pub(super) line: Line,
    /// Clients pause.
    pub(super) resting: bool,
    /// It serves, and has been judged.
    pub(super) serving: bool,
    pub(super) filer: Option<Arc<Filer>>,
    /// Why it did not start.
    pub(super) refused: Option<String>,
    /// How far the hub was ever seen to hold its entries durably.
    pub(super) hub_durable: u64,
    /// It serves without what a restart has cut off behind this entry. The hub may hold that, and
    /// gives it up when it hears so.
    pub(super) cut_at: Option<u64>,
    /// Newest CPs that were judged, own and published.
    pub(super) own: CpNumber,
    pub(super) published: CpNumber,
    pub(super) mark: bool,
    /// The newest answer that both ends had to stand for.
    pub(super) by_both: u64,
    /// Whose writes count.
    pub(super) primary: Primary,
    /// The line that its hub may have gone on with when it took over, until it is known: what a restart of
    /// the source had cut off.
    pub(super) twin: Option<Line>,
    /// What the source has itself, while its hub serves.
    pub(super) own_line: Option<Line>,
    /// Roots of what the hub had served when the source's side was kept.
    pub(super) split: Option<Vec<(VolumeNumber, Root)>>,
    /// The epoch in which the source served last.
    pub(super) served_epoch: u32,
    /// In which epoch the hub served; 0 before.
    pub(super) epoch: u32,
    /// Where the source's own line ended at its failover.
    pub(super) fenced_at: u64,
    /// A client may have been answered by the source alone since its last CP at both ends.
    pub(super) was_alone: bool,
    /// Up to where it had answered when its answers were held.
    pub(super) held_at: Option<u64>,
    /// Rot has taken what its hub held; it is said to be missing there, or another end is to be primary.
    pub(super) rotten_at_hub: bool,
    /// A source log of the hub has rotted: a reference into it cannot be used.
    pub(super) log_rotten: bool,
    /// What rot has taken was said.
    pub(super) rot_told: bool,
    /// An old copy of its state was started once.
    pub(super) was_copied: bool,
    /// It has served since.
    pub(super) has_served: bool,
    pub(super) problem: Option<String>,
    pub(super) probes: Probes,
    pub(super) acknowledged: u64,
}

impl SourceState {
    fn new(setup: SourceSetup) -> Self {
        let grown = if setup.grows { GROWN_BYTES } else { VOLUME_BYTES };
        Self {
            setup,
            line: Line::new(VOLUMES, [VOLUME_BYTES, grown].map(to_usize)),
            resting: false,
            serving: false,
            filer: None,
            refused: None,
            hub_durable: 0,
            cut_at: None,
            own: CpNumber(0),
            published: CpNumber(0),
            mark: false,
            by_both: 0,
            primary: Primary::Source,
            twin: None,
            own_line: None,
            split: None,
            served_epoch: 0,
            epoch: 0,
            fenced_at: 0,
            was_alone: false,
            held_at: None,
            rotten_at_hub: false,
            rot_told: false,
            log_rotten: false,
            was_copied: false,
            has_served: false,
            problem: None,
            probes: Probes::default(),
            acknowledged: 0,
        }
    }

    /// The first problem stays.
    pub(super) fn judge<T>(&mut self, judged: Result<T, String>) {
        if let Err(problem) = judged {
            let name = &self.setup.name;
            self.problem.get_or_insert_with(|| format!("{name}: {problem}"));
        }
    }

    /// A client was answered: what was promised must have happened.
    pub(super) fn acknowledged(&mut self, by: Primary, shared: &FilerShared, sequence: u64) {
        if by != self.primary {
            self.late(shared, sequence);
            return;
        }
        self.line.acknowledge(sequence);
        self.acknowledged += 1;
        let Figures { own, hub, .. } = shared.completion.figures();
        let own_problem = format!("invariant 1: {sequence} answered, the own ring holds {own}");
        self.judge(if own.0 >= sequence { Ok(()) } else { Err(own_problem) });
        if shared.sole {
            return;
        }
        match self.answering_of(shared, sequence) {
            Answering::Policy if self.setup.policy.mode == Mode::Sync => {
                if self.setup.policy.ack != Ack::Received {
                    self.by_both = self.by_both.max(sequence);
                }
                if hub.0 < sequence {
                    let problem = format!("invariant 1: {sequence} answered, the hub said {hub}");
                    self.judge::<()>(Err(problem));
                }
            }
            Answering::Alone => {
                self.probes.hit(Probe::AnsweredAlone);
                self.was_alone = true;
                if shared.mark().is_none() {
                    self.judge::<()>(Err(format!("R4: {sequence} answered alone, unmarked")));
                }
            }
            Answering::Held => {
                let held_at = self.held_at.unwrap_or_else(|| shared.completion.answered().0);
                let problem = format!("{sequence} answered while held at {held_at}");
                self.judge(if sequence <= held_at { Ok(()) } else { Err(problem) });
            }
            Answering::Policy => self.was_alone |= self.setup.policy.mode != Mode::Sync,
        }
    }

    /// How a write was answered. A client hears of it some moments after the answer was given: what
    /// was answered alone may be heard when the hub has caught up with all before it, and is answered
    /// for again. Then the mark stands still.
    fn answering_of(&self, shared: &FilerShared, sequence: u64) -> Answering {
        let hub = shared.completion.figures().hub;
        let alone = shared.completion.answered_alone();
        let sync = self.setup.policy.mode == Mode::Sync;
        match shared.answering() {
            Answering::Policy if sync && hub.0 < sequence && sequence <= alone.0 => {
                Answering::Alone
            }
            answering @ (Answering::Policy | Answering::Alone | Answering::Held) => answering,
        }
    }

    /// A source answered a write after another end had begun to serve.
    fn late(&mut self, shared: &FilerShared, sequence: u64) {
        self.probes.hit(Probe::AnsweredLate);
        let alone = self.answering_of(shared, sequence) == Answering::Alone
            || self.setup.policy.mode != Mode::Sync;
        if let Some(own) = self.own_line.as_mut().filter(|_| alone) {
            own.acknowledge(sequence);
        }
        if !alone && sequence > self.fenced_at {
            let fenced = self.fenced_at;
            let problem = format!("R12: {sequence} answered, the promoted image ends at {fenced}");
            self.judge::<()>(Err(problem));
        }
    }

    /// The source was given back with what its own catalog shows: with what the hub had served, or, if its
    /// side is kept, with what it had itself, at the place of the hub's last CP.
    fn given_back(&mut self, filer: &FilerShared) -> Result<(), String> {
        let (_, at, roots) = published_in(&filer.pool, filer.source)?;
        let by_hub = self.primary == Primary::Hub;
        if by_hub && self.line.has(at, &roots, false)? {
            self.own_line = None;
            return Ok(());
        }
        let mut own = self.own_line.take().unwrap_or_else(|| self.line.clone());
        for sequence in (own.acknowledged()..=own.last()).rev() {
            if self.setup.keeps && own.has(sequence, &roots, false)? {
                if by_hub {
                    self.split = Some(self.line.last_roots()?);
                }
                self.line = own.rebased(sequence, at)?;
                self.probes.hit(Probe::KeptSource);
                return Ok(());
            }
        }
        Err(format!("what is given back at {at} is what neither end had"))
    }

    /// Whether the hub may hold what its source has cut off: that one served alone, or had to begin so.
    pub(super) fn may_differ(&self) -> bool {
        self.was_alone || self.cut_at.is_some()
    }

    /// What the hub serves at `sequence` tells which line it has gone on with.
    pub(super) fn go_on_with(&mut self, sequence: u64, served: &[Vec<u8>]) {
        let Some(mut twin) = self.twin.take() else { return };
        let is = |line: &mut Line| {
            let content = line.content(sequence);
            content.is_ok_and(|content| {
                content.iter().zip(served).all(|(wanted, met)| wanted.starts_with(met))
            })
        };
        if !is(&mut self.line) && is(&mut twin) {
            let resumed = twin.resumed(sequence);
            self.judge(resumed);
            self.line = twin;
        }
    }

    /// Another end serves from now on, what ends at `sequence`.
    pub(super) fn change(&mut self, primary: Primary, sequence: u64) {
        if self.was_alone && sequence < self.line.acknowledged() {
            // The losing side of a split brain (section 9): said beforehand.
            self.probes.hit(Probe::SplitBrain);
            self.line.give_up(sequence);
        }
        if self.rot_told && self.rotten_at_hub && sequence < self.line.acknowledged() {
            // Said beforehand as well.
            self.probes.hit(Probe::RotLost);
            self.line.give_up(sequence);
        }
        self.rotten_at_hub = false;
        let resumed = self.line.resumed(sequence);
        self.judge(resumed);
        (self.primary, self.was_alone, self.by_both) = (primary, false, 0);
        self.cut_at = None;
        self.hub_durable = self.hub_durable.min(sequence);
        (self.serving, self.fenced_at) = (true, sequence);
    }
}

/// A source.
#[derive(Debug)]
pub(super) struct SourceEnd {
    pub(super) nvram: Arc<SimDevice>,
    pub(super) pool: Disk,
    pub(super) running: Option<Running>,
    pub(super) state: Rc<RefCell<SourceState>>,
    /// When it is started again, in milliseconds.
    pub(super) start_at: Option<u64>,
    /// A device of it fails, or will.
    pub(super) erring: bool,
    /// Blocks that only the other end has.
    pub(super) rotten: bool,
    /// A record of its NVRAM has rotted; it is to be started without.
    pub(super) nvram_rotten: bool,
    pub(super) accept_lost_nvram: bool,
    /// What keeps its pool full, until when.
    pub(super) full: Option<(Reservation, u64)>,
    /// How often it was started.
    pub(super) lives: u32,
    /// An old copy of it will be started; that copy; what it stands in for.
    pub(super) is_copied: bool,
    pub(super) older: Option<Devices>,
    pub(super) copy: Option<Copy>,
}

impl SourceEnd {
    pub(super) fn new(setup: &SourceSetup, mirrored: bool) -> Self {
        let ring = ByteCount(setup.ring_bytes + HEADER_BYTES);
        Self {
            nvram: Arc::new(SimDevice::new("nvram", ring)),
            pool: Disk::new("pool", SOURCE_POOL_BYTES, mirrored),
            running: None,
            state: Rc::new(RefCell::new(SourceState::new(setup.clone()))),
            start_at: Some(0),
            erring: false,
            rotten: false,
            nvram_rotten: false,
            accept_lost_nvram: false,
            full: None,
            lives: 0,
            is_copied: false,
            older: None,
            copy: None,
        }
    }

    /// Whether a start may fail now.
    pub(super) fn is_excused(&self) -> bool {
        self.erring
            || self.nvram_rotten
            || self.copy.is_some()
            || self.nvram.is_off()
            || self.pool.is_off()
    }

    /// The n-th change of its ring or pool does that.
    pub(super) fn fail(&self, ring: bool, nth: u64, effect: Effect) {
        if ring { self.nvram.fail_change(nth, effect) } else { self.pool.fail_change(nth, effect) }
    }

    pub(super) fn start(&mut self, at: usize, process: Process, chance: &mut Chance) {
        let nvram: Arc<SimDevice> = Arc::clone(&self.nvram);
        let (nvram, pool) = (Store { device: nvram, new: false }, self.pool.open());
        let state = Rc::clone(&self.state);
        let seed = chance.next_u64();
        let (setup, accept) = (state.borrow().setup.clone(), self.accept_lost_nvram);
        let body = async move {
            let started = match pool {
                Ok(device) => {
                    let pool = Store { device, new: false };
                    let started = Filer::start_on(setup.behaviour(at, accept), nvram, pool).await;
                    started.map_err(|error| error.to_string())
                }
                Err(reason) => Err(reason),
            };
            let filer = match started {
                Ok(filer) => Arc::new(filer),
                Err(reason) => {
                    state.borrow_mut().refused = Some(reason);
                    return;
                }
            };
            {
                let mut state = state.borrow_mut();
                (state.filer, state.held_at) = (Some(Arc::clone(&filer)), None);
            }
            let mut chance = Chance::new(seed);
            loop {
                filer.served().await;
                begin_serving(&filer, &state);
                let parts = filer.shared();
                begin_clients(Primary::Source, &filer, &state, &mut chance);
                // Until it is fenced; it may be given its volumes back.
                while *parts.serving.borrow() {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                state.borrow_mut().serving = false;
            }
        };
        let mut state = self.state.borrow_mut();
        (state.serving, state.refused) = (false, None);
        drop(state);
        self.running = Some(Running::begin(process, body));
    }
}

pub(super) fn begin_clients(
    by: Primary,
    filer: &Arc<Filer>,
    state: &Rc<RefCell<SourceState>>,
    chance: &mut Chance,
) {
    let setup = state.borrow().setup.clone();
    for _ in 0..setup.clients {
        let (filer, state) = (Arc::clone(filer), Rc::clone(state));
        let chance = Chance::new(chance.next_u64());
        drop(tokio::task::spawn_local(client(by, filer, state, setup.clone(), chance)));
    }
}

/// The first moment at which clients may be served.
fn begin_serving(filer: &Filer, state: &Rc<RefCell<SourceState>>) {
    let shared = filer.shared();
    let sequence = shared.order.figures().sequence.0;
    let mut state = state.borrow_mut();
    if state.primary == Primary::Hub {
        if shared.epoch().number <= state.epoch {
            // It serves alone, and has not heard of the failover.
            let resumed = state.own_line.as_mut().map_or(Ok(()), |own| own.resumed(sequence));
            state.judge(resumed);
            return;
        }
        state.probes.hit(Probe::GivenBack);
        let judged = state.given_back(&shared);
        state.judge(judged);
        state.served_epoch = shared.epoch().number;
        state.change(Primary::Source, sequence);
        return;
    }
    let epoch = shared.epoch().number;
    if state.has_served && state.setup.keeps && epoch > state.served_epoch.max(1) {
        // Its hub could not apply the log, and the source has it all (R13).
        state.probes.hit(Probe::WayOn);
        let judged = state.given_back(&shared);
        state.judge(judged);
        state.served_epoch = epoch;
        state.change(Primary::Source, sequence);
        return;
    }
    state.served_epoch = epoch;
    if sequence < state.line.last() {
        state.probes.hit(Probe::UnansweredLost);
        // Only who had to begin alone may go on without what the hub holds (R1).
        state.cut_at = Some(sequence).filter(|_| !shared.is_connected());
    }
    if shared.counters.transfers_adopted.get() > 0 {
        state.probes.hit(Probe::Adopted);
    }
    let resumed = state.line.resumed(sequence);
    state.judge(resumed);
    // What only the hub has beyond is of another line from now on.
    state.hub_durable = state.hub_durable.min(sequence);
    (state.serving, state.has_served) = (true, true);
}
