//! One run: chooses which thread goes on, lets time pass, lets things go wrong, judges.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::task::LocalSet;

use super::hub_end::{Asked, HubEnd};
use super::laws;
use super::probes::{Probe, Probes};
use super::setup::{Fault, Planned, Setup, address};
use super::world::{Primary, SourceEnd};
use crate::device::sim::Chance;
use crate::hub::extension::State;
use crate::hub::failover::View;
use crate::link::simulated::Network;
use crate::units::convert::{to_u64, to_usize};
use crate::units::machine::simulated::{Process, Threads, Waiting};
use crate::volume::scan::scan;

/// After the faults everything is in step within this.
const CONVERGENCE_MS: u64 = 60_000;

/// How a run ended.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) problem: Option<String>,
    /// Of everything that happened.
    pub(super) trace: [u8; 32],
    pub(super) probes: Probes,
    pub(super) acknowledged: u64,
    pub(super) virtual_ms: u64,
    pub(super) events: Vec<String>,
    /// What kind of call was swept, if it came.
    pub(super) swept: Option<String>,
}

/// Runs a setup to its end.
pub(super) fn run(setup: &Setup) -> Outcome {
    run_without(setup, None)
}

/// The same with a rule of the product switched off.
pub(super) fn run_without(setup: &Setup, rule: Option<u8>) -> Outcome {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().unwrap();
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let mut simulation = Simulation::new(setup);
        simulation.threads.break_rule(rule);
        let judged = simulation.whole().await;
        simulation.end(judged).await
    })
}

/// A reader's pin of an image.
pub(super) struct Reader {
    pins: Vec<crate::pool::Pin>,
    until_ms: u64,
}

pub(super) struct Simulation {
    pub(super) setup: Setup,
    pub(super) threads: Threads,
    pub(super) network: Network,
    pub(super) chance: Chance,
    pub(super) hub: HubEnd,
    pub(super) sources: Vec<SourceEnd>,
    begun: tokio::time::Instant,
    processes: u64,
    next_fault: usize,
    /// Ends that stand still, until when: sources by their place, the hub last.
    pub(super) paused: BTreeMap<usize, u64>,
    pub(super) held: BTreeMap<usize, u64>,
    /// Whose older connections stand still, until when.
    pub(super) stranded: BTreeMap<usize, u64>,
    pub(super) slow: BTreeMap<&'static str, u64>,
    /// Pools that are to be full, until when.
    pub(super) filling: BTreeMap<usize, u64>,
    /// A ring that is to rot as soon as it can: its end, whether the power goes, the seed.
    pub(super) rotting: Option<(usize, bool, u64)>,
    pub(super) reader: Option<Reader>,
    trace: blake3::Hasher,
    events: Vec<String>,
    pub(super) probes: Probes,
    /// A sweep is planned, and what kind of call it fell on.
    pub(super) swept: Option<Option<String>>,
}

fn sources_of(setup: &Setup) -> Vec<SourceEnd> {
    let sources = setup.sources.iter().zip(&setup.mirrored);
    let mut ends: Vec<_> =
        sources.map(|(source, mirrored)| SourceEnd::new(source, *mirrored)).collect();
    for planned in &setup.faults {
        if let Fault::OldCopy { source, .. } = planned.fault {
            ends[source].is_copied = true;
        }
    }
    ends
}

impl Simulation {
    fn new(setup: &Setup) -> Self {
        let threads = Threads::begin(setup.seed);
        let network = Network::begin(setup.seed ^ 0xabcd, setup.delay_ms);
        Self {
            setup: setup.clone(),
            threads,
            network,
            chance: Chance::new(setup.seed),
            hub: HubEnd::new(setup),
            sources: sources_of(setup),
            begun: tokio::time::Instant::now(),
            processes: 0,
            next_fault: 0,
            paused: BTreeMap::new(),
            held: BTreeMap::new(),
            stranded: BTreeMap::new(),
            slow: BTreeMap::new(),
            filling: BTreeMap::new(),
            rotting: None,
            reader: None,
            trace: blake3::Hasher::new(),
            events: Vec::new(),
            probes: Probes::default(),
            swept: None,
        }
    }

    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Something happened that is worth telling.
    pub(super) fn tell(&mut self, what: &str) {
        let line = format!("{:6} {what}", self.now_ms());
        self.trace.update(line.as_bytes());
        tracing::info!("== {line}");
        self.events.push(line);
    }

    async fn whole(&mut self) -> Result<(), String> {
        while self.now_ms() < self.setup.work_ms {
            self.step().await?;
        }
        self.heal().await;
        let limit = self.now_ms() + CONVERGENCE_MS;
        while !self.is_at_rest() {
            if self.now_ms() > limit {
                let unrest: Vec<String> = self.sources.iter().map(laws::unrest).collect();
                return Err(format!("not in step: {unrest:?}"));
            }
            self.give_back();
            self.step().await?;
        }
        self.tell("at rest");
        self.mend().await?;
        self.last_checkpoint().await?;
        for source in &self.sources {
            let name = source.state.borrow().setup.name.clone();
            laws::in_the_end(&self.hub, source).map_err(|problem| format!("{name}: {problem}"))?;
        }
        Ok(())
    }

    /// Everything is in step. Who has not met yet that its connection stands still is not.
    fn is_at_rest(&self) -> bool {
        self.stranded.is_empty()
            && self.hub.is_at_rest()
            && self.sources.iter().all(laws::is_at_rest)
    }

    /// Nothing goes wrong any more, and clients are quiet.
    async fn heal(&mut self) {
        self.tell("healed");
        self.next_fault = usize::MAX;
        self.rotting = None;
        self.look_at_sweep(false);
        self.look_at_sweep(true);
        // First: what is planned for the devices that were put aside does not come either.
        for at in 0..self.sources.len() {
            self.put_back(at).await;
        }
        let mut forgotten = self.hub.nvram.forget_faults() + self.hub.pool.forget_faults();
        self.hub.files.heal();
        self.hub.full = None;
        for at in 0..self.sources.len() {
            let source = &mut self.sources[at];
            forgotten += source.nvram.forget_faults() + source.pool.forget_faults();
            source.full = None;
            if !self.stranded.contains_key(&at) {
                self.network.hold(address(at), [false, false]);
            }
            self.sources[at].state.borrow_mut().resting = true;
        }
        self.tell(&format!("{forgotten} faults did not come"));
        self.held.clear();
        self.slow.clear();
        self.filling.clear();
        self.paused.values_mut().for_each(|until| *until = 0);
    }

    /// What was failed over is given back: asked for now and then, until it is so.
    fn give_back(&mut self) {
        if self.chance.below(200) > 0 {
            return;
        }
        for at in 0..self.sources.len() {
            if self.is_to_be_asked_again(at) {
                self.ask(Asked::Failover(at));
            } else if self.sources[at].state.borrow().primary == Primary::Hub {
                self.ask(Asked::Failback(at));
            } else if self.waits_for_rot(at) {
                // It waits for what has rotted: the source has it, or it is given up.
                if self.sources[at].state.borrow().setup.keeps {
                    self.ask(Asked::Failback(at));
                }
                self.ask(Asked::Accept(at));
            }
        }
    }

    /// Whether a failover has ended at what it cannot read. One that has not is gone on with by the hub
    /// itself (R13): nobody asks for it again.
    fn waits_for_rot(&self, at: usize) -> bool {
        self.fails_over(at).is_some_and(|view| view.reason.contains("and no further"))
    }

    /// Whether a failover has ended with the word that it is to be asked for once more: the hub had
    /// no room for its CP, say.
    fn is_to_be_asked_again(&self, at: usize) -> bool {
        let again = "run `mirrorhub failover` again";
        self.fails_over(at).is_some_and(|view| view.next_step.contains(again))
    }

    /// What status says of a failover that has not come to its end.
    fn fails_over(&self, at: usize) -> Option<View> {
        let name = self.sources[at].state.borrow().setup.name.clone();
        let view = self.hub.shared()?.failovers.view(&name)?;
        (view.state == State::FailingOver).then_some(view)
    }

    /// A CP of everything at both ends.
    async fn last_checkpoint(&mut self) -> Result<(), String> {
        let asked: Vec<_> = self
            .sources
            .iter()
            .filter_map(|source| source.state.borrow().filer.clone())
            .map(|filer| tokio::task::spawn_local(filer.checkpoint()))
            .collect();
        let limit = self.now_ms() + CONVERGENCE_MS;
        while !asked.iter().all(tokio::task::JoinHandle::is_finished) {
            if self.now_ms() > limit {
                let unrest: Vec<String> = self.sources.iter().map(laws::unrest).collect();
                return Err(format!("no last CP: {unrest:?}"));
            }
            self.step().await?;
        }
        for answer in asked {
            let answer = answer.await.map_err(|error| error.to_string())?;
            answer.map_err(|error| format!("the last CP: {error}"))?;
        }
        // Word of it may still be on its way at the hub.
        for _ in 0..50 {
            self.step().await?;
        }
        Ok(())
    }

    /// One step: what is due, one thread's turn or a little time, and the laws.
    pub(super) async fn step(&mut self) -> Result<(), String> {
        self.due().await?;
        match self.pick() {
            Some(thread) => {
                let line = format!("{} {} {}", self.now_ms(), thread.process.0, thread.name);
                self.trace.update(line.as_bytes());
                self.threads.resume(thread.number);
                if self.chance.below(4) == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                } else {
                    tokio::task::yield_now().await;
                }
            }
            None => {
                tokio::select! {
                    biased;
                    () = self.threads.stirred() => {}
                    () = tokio::time::sleep(Duration::from_millis(10)) => {}
                }
            }
        }
        self.trace.update(&self.network.delivered().to_le_bytes());
        self.trace.update(&self.network.connections().to_le_bytes());
        self.judge()
    }

    fn pick(&mut self) -> Option<Waiting> {
        let mut ready = self.threads.ready();
        let stands = |process: Process| {
            let ends = self.sources.iter().filter_map(|source| source.running.as_ref());
            let mut ends = ends.chain(&self.hub.running);
            ends.any(|running| running.process == process && running.is_paused())
        };
        ready.retain(|thread| !stands(thread.process));
        let now = self.now_ms();
        self.slow.retain(|_, until| *until > now);
        if ready.is_empty() {
            return None;
        }
        let thread = ready.swap_remove(to_usize(self.chance.below(to_u64(ready.len()))));
        let slow = self.slow.contains_key(&thread.name[..]) && self.chance.below(12) > 0;
        if slow {
            self.probes.hit(Probe::Slow);
        }
        (!slow).then_some(thread)
    }

    fn judge(&mut self) -> Result<(), String> {
        if let Some(panic) = self.threads.panics().first() {
            return Err(format!("a thread panicked: {panic}"));
        }
        if !self.hub.is_excused()
            && let Some(refused) = &self.hub.parts.borrow().refused
        {
            return Err(format!("the hub does not start: {refused}"));
        }
        for source in &self.sources {
            laws::source(source)?;
        }
        laws::hub(&self.hub, &self.sources)?;
        self.read_again()
    }

    /// A reader that has an image pinned reads the same in the end (invariant 2).
    fn read_again(&mut self) -> Result<(), String> {
        let now = self.now_ms();
        let Some(shared) = self.hub.shared() else { return Ok(()) };
        let due = self.reader.as_ref().is_some_and(|reader| reader.until_ms <= now);
        if due && let Some(reader) = self.reader.take() {
            for pin in &reader.pins {
                let scanned = scan(&shared.pool, &pin.tree(), |_| {});
                // What was read counts only if the pin still held, as for every reader (R18).
                if pin.has_ended() {
                    self.may_end_pins()?;
                    continue;
                }
                let scanned = scanned.map_err(|error| format!("invariant 2: {error}"))?;
                if self.hub.rotten && scanned.root.is_none() {
                    continue;
                }
                if scanned.root != Some(pin.tree().root()) {
                    return Err("invariant 2: a pinned image has changed".to_owned());
                }
            }
            self.probes.hit(Probe::PinnedRead);
        }
        if self.reader.is_none() && self.chance.below(400) == 0 {
            let at = to_usize(self.chance.below(to_u64(self.sources.len())));
            let name = self.sources[at].state.borrow().setup.name.clone();
            if let Some(lane) = shared.lanes.get(&name)
                && let Ok(pins) = shared.pool.pin_source(lane.source())
            {
                let until_ms = now + 100 + self.chance.below(2000);
                self.reader = Some(Reader { pins, until_ms });
            }
        }
        Ok(())
    }

    /// A pool gives up what readers hold only for want of space.
    fn may_end_pins(&self) -> Result<(), String> {
        let hub = self.sources.len();
        let fills =
            |planned: &Planned| matches!(planned.fault, Fault::Full { end, .. } if end == hub);
        if self.setup.faults.iter().any(fills) {
            return Ok(());
        }
        Err("R18: a pin was given up, and nothing had filled the hub's pool".to_owned())
    }

    /// What is due: starts, faults, ends of pauses; ends that have lost their power or failed.
    async fn due(&mut self) -> Result<(), String> {
        let now = self.now_ms();
        while let Some(planned) = self.setup.faults.get(self.next_fault).copied()
            && planned.at_ms <= now
        {
            self.next_fault += 1;
            self.tell(&format!("{:?}", planned.fault));
            self.fault(planned.fault).await;
        }
        let over: Vec<usize> =
            self.held.extract_if(.., |_, until| *until <= now).map(|h| h.0).collect();
        for at in over {
            self.tell("the link goes on");
            self.network.hold(address(at), [false, false]);
        }
        let over: Vec<usize> =
            self.stranded.extract_if(.., |_, until| *until <= now).map(|h| h.0).collect();
        for at in over {
            self.tell("older connections come alive again");
            if self.network.is_late(address(at)) {
                self.probes.hit(Probe::OldConnection);
            }
            self.network.hold(address(at), [false, false]);
        }
        self.make_room(now);
        let over: Vec<usize> =
            self.paused.extract_if(.., |_, until| *until <= now).map(|p| p.0).collect();
        for at in over {
            let running = self.sources.get(at).map_or(&self.hub.running, |source| &source.running);
            if let Some(running) = running {
                running.pause(false);
            }
        }
        self.look_for_rot().await;
        self.look_for_ends().await?;
        self.look_at_copies().await;
        self.starts(now);
        Ok(())
    }

    async fn look_for_ends(&mut self) -> Result<(), String> {
        if self.hub.running.is_some() {
            if self.hub.is_off() {
                self.probes.hit(Probe::HubCutInside);
                self.tell("the hub's power went inside a call");
                self.end_hub(self.loses_power(true)).await;
            } else if let Some(reason) = self.hub_failed() {
                self.probes.hit(Probe::IoError);
                self.tell(&format!("the hub has failed: {reason}"));
                self.names_its_device(&reason, true)?;
                self.end_hub(false).await;
            }
        }
        for at in 0..self.sources.len() {
            let source = &self.sources[at];
            if source.running.is_none() {
                continue;
            }
            if source.nvram.is_off() || source.pool.is_off() {
                self.probes.hit(Probe::SourceCutInside);
                self.tell("a source's power went inside a call");
                self.end_source(at, self.loses_power(false)).await;
            } else if self.replace_nvram(at).await? {
            } else if let Some(reason) = self.failed(at) {
                if !self.sources[at].erring && self.sources[at].copy.is_none() {
                    return Err(format!("source {at} failed: {reason}"));
                }
                self.probes.hit(Probe::IoError);
                self.tell(&format!("a source has failed: {reason}"));
                self.names_its_device(&reason, false)?;
                self.end_source(at, false).await;
            }
        }
        Ok(())
    }

    fn failed(&self, at: usize) -> Option<String> {
        let state = self.sources[at].state.borrow();
        if state.refused.is_some() {
            return state.refused.clone();
        }
        let filer = state.filer.as_ref()?;
        filer.shared().failed().map(|reason| reason.to_string())
    }

    /// Why an operator has to start it again: an I/O error has stopped it.
    fn hub_failed(&self) -> Option<String> {
        if !self.hub.erring {
            return None;
        }
        let refused = self.hub.parts.borrow().refused.clone();
        refused.or_else(|| {
            let shared = self.hub.shared()?;
            let latched = shared.pool.first_error().map(|error| error.to_string());
            let faults = shared.lanes.all().into_iter();
            latched.or_else(|| {
                faults.filter_map(|lane| lane.cursors().fault).map(|fault| fault.to_string()).next()
            })
        })
    }

    fn starts(&mut self, now: u64) {
        if self.hub.running.is_none() && self.hub.start_at.is_some_and(|at| at <= now) {
            self.hub.start_at = None;
            self.plan_sweep(None);
            self.processes += 1;
            let sources = self.sources.iter().map(|source| source.state.clone()).collect();
            let seed = self.chance.next_u64();
            self.hub.start(Process(self.processes), sources, seed);
            self.network.listen(Some(self.hub.inbox.clone()));
            self.tell("the hub starts");
        }
        for at in 0..self.sources.len() {
            let due = self.sources[at].running.is_none();
            if due && self.sources[at].start_at.is_some_and(|at| at <= now) {
                self.plan_sweep(Some(at));
            }
            let source = &mut self.sources[at];
            if source.running.is_none() && source.start_at.is_some_and(|at| at <= now) {
                source.start_at = None;
                self.processes += 1;
                source.start(at, Process(self.processes), &mut self.chance);
                self.tell(&format!("source {at} starts"));
            }
        }
    }

    async fn end(mut self, judged: Result<(), String>) -> Outcome {
        let virtual_ms = self.now_ms();
        self.reader = None;
        let mut probes = std::mem::take(&mut self.probes);
        let mut acknowledged = 0;
        for at in 0..self.sources.len() {
            self.end_source(at, true).await;
            let state = self.sources[at].state.borrow();
            probes.add(&state.probes);
            acknowledged += state.acknowledged;
            self.trace.update(&state.acknowledged.to_le_bytes());
        }
        self.end_hub(true).await;
        Network::end();
        Outcome {
            problem: judged.err(),
            trace: *self.trace.finalize().as_bytes(),
            probes,
            acknowledged,
            virtual_ms,
            events: std::mem::take(&mut self.events),
            swept: self.swept.flatten(),
        }
    }
}
