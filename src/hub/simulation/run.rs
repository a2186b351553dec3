//! One run: chooses which thread goes on, lets time pass, lets things go wrong, judges.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::task::LocalSet;

use super::laws;
use super::probes::{Probe, Probes};
use super::setup::{Fault, Setup, address};
use super::world::{Asked, HubEnd, HubParts, Primary, SourceEnd};
use crate::device::sim::{Chance, Effect};
use crate::link::simulated::Network;
use crate::units::convert::{to_u64, to_usize};
use crate::units::machine::simulated::{Process, Threads, Waiting};
use crate::volume::scan::scan;

/// After the faults everything is in step within this.
const CONVERGENCE_MS: u64 = 60_000;
const EIO: i32 = 5;

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
struct Reader {
    pins: Vec<crate::pool::Pin>,
    until_ms: u64,
}

struct Simulation {
    setup: Setup,
    threads: Threads,
    network: Network,
    chance: Chance,
    hub: HubEnd,
    sources: Vec<SourceEnd>,
    begun: tokio::time::Instant,
    processes: u64,
    next_fault: usize,
    /// Ends that stand still, until when: sources by their place, the hub last.
    paused: BTreeMap<usize, u64>,
    held: BTreeMap<usize, u64>,
    slow: BTreeMap<&'static str, u64>,
    reader: Option<Reader>,
    trace: blake3::Hasher,
    events: Vec<String>,
    probes: Probes,
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
            sources: setup.sources.iter().map(SourceEnd::new).collect(),
            begun: tokio::time::Instant::now(),
            processes: 0,
            next_fault: 0,
            paused: BTreeMap::new(),
            held: BTreeMap::new(),
            slow: BTreeMap::new(),
            reader: None,
            trace: blake3::Hasher::new(),
            events: Vec::new(),
            probes: Probes::default(),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Something happened that is worth telling.
    fn tell(&mut self, what: &str) {
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
        while !self.sources.iter().all(laws::is_at_rest) {
            if self.now_ms() > limit {
                let unrest: Vec<String> = self.sources.iter().map(laws::unrest).collect();
                return Err(format!("not in step: {unrest:?}"));
            }
            self.give_back();
            self.step().await?;
        }
        self.tell("at rest");
        self.last_checkpoint().await?;
        for source in &self.sources {
            let name = source.state.borrow().setup.name.clone();
            laws::in_the_end(&self.hub, source).map_err(|problem| format!("{name}: {problem}"))?;
        }
        Ok(())
    }

    /// Nothing goes wrong any more, and clients are quiet.
    async fn heal(&mut self) {
        self.tell("healed");
        self.next_fault = usize::MAX;
        let mut forgotten = self.hub.nvram.forget_faults() + self.hub.pool.forget_faults();
        for at in 0..self.sources.len() {
            let source = &self.sources[at];
            forgotten += source.nvram.forget_faults() + source.pool.forget_faults();
            self.network.hold(address(at), [false, false]);
            self.sources[at].state.borrow_mut().resting = true;
        }
        self.tell(&format!("{forgotten} faults did not come"));
        self.held.clear();
        self.slow.clear();
        self.paused.values_mut().for_each(|until| *until = 0);
    }

    /// What was failed over is given back: asked for now and then, until it is so.
    fn give_back(&mut self) {
        if self.chance.below(200) > 0 {
            return;
        }
        for at in 0..self.sources.len() {
            if self.sources[at].state.borrow().primary == Primary::Hub {
                self.ask(Asked::Failback(at));
            }
        }
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
    async fn step(&mut self) -> Result<(), String> {
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
                let scanned = scanned.map_err(|error| format!("invariant 2: {error}"))?;
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
            self.paused.extract_if(.., |_, until| *until <= now).map(|p| p.0).collect();
        for at in over {
            let running = self.sources.get(at).map_or(&self.hub.running, |source| &source.running);
            if let Some(running) = running {
                running.pause(false);
            }
        }
        self.look_for_ends().await?;
        self.starts(now);
        Ok(())
    }

    async fn look_for_ends(&mut self) -> Result<(), String> {
        if self.hub.running.is_some() {
            if self.hub.nvram.is_off() || self.hub.pool.is_off() {
                self.probes.hit(Probe::HubCutInside);
                self.tell("the hub's power went inside a call");
                self.end_hub(true).await;
            } else if self.hub_has_failed() {
                self.probes.hit(Probe::IoError);
                self.tell("the hub has failed");
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
                self.end_source(at, true).await;
            } else if let Some(reason) = self.failed(at) {
                if !self.sources[at].erring {
                    return Err(format!("source {at} failed: {reason}"));
                }
                self.probes.hit(Probe::IoError);
                self.tell("a source has failed");
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

    /// An I/O error has stopped it, and an operator starts it again.
    fn hub_has_failed(&self) -> bool {
        let erring = self.hub.erring;
        let faulted = self.hub.shared().is_some_and(|shared| {
            shared.lanes.all().iter().any(|lane| lane.cursors().fault.is_some())
        });
        erring && (faulted || self.hub.parts.borrow().refused.is_some())
    }

    fn starts(&mut self, now: u64) {
        if self.hub.running.is_none() && self.hub.start_at.is_some_and(|at| at <= now) {
            self.hub.start_at = None;
            self.processes += 1;
            let sources = self.sources.iter().map(|source| source.state.clone()).collect();
            let seed = self.chance.next_u64();
            self.hub.start(Process(self.processes), sources, seed);
            self.network.listen(Some(self.hub.inbox.clone()));
            self.tell("the hub starts");
        }
        for at in 0..self.sources.len() {
            let source = &mut self.sources[at];
            if source.running.is_none() && source.start_at.is_some_and(|at| at <= now) {
                source.start_at = None;
                self.processes += 1;
                source.start(at, Process(self.processes), &mut self.chance);
                self.tell(&format!("source {at} starts"));
            }
        }
    }

    async fn fault(&mut self, fault: Fault) {
        let now = self.now_ms();
        match fault {
            Fault::SourceCut { source, nth: None } => self.end_source(source, true).await,
            Fault::SourceCut { source, nth: Some(nth) } => {
                let end = &self.sources[source];
                let device = if nth % 2 == 0 { &end.nvram } else { &end.pool };
                device.fail_change(nth, Effect::PowerCut);
            }
            Fault::SourceKill { source } => {
                self.probes.hit(Probe::SourceKilled);
                self.end_source(source, false).await;
            }
            Fault::HubCut { nth: None } => self.end_hub(true).await,
            Fault::HubCut { nth: Some(nth) } => {
                let device = if nth % 2 == 0 { &self.hub.nvram } else { &self.hub.pool };
                device.fail_change(nth, Effect::PowerCut);
            }
            Fault::HubKill => {
                self.probes.hit(Probe::HubKilled);
                self.end_hub(false).await;
            }
            Fault::LinkCut { source, keep } => {
                self.probes.hit(Probe::LinkCut);
                self.network.cut(address(source), keep);
            }
            Fault::LinkHold { source, held, ms } => {
                self.probes.hit(Probe::LinkHeld);
                self.network.hold(address(source), held);
                self.held.insert(source, now + ms);
            }
            Fault::PauseSource { source, ms } => self.pause(source, now + ms),
            Fault::PauseHub { ms } => self.pause(self.sources.len(), now + ms),
            Fault::SourceError { source, ring, nth } => {
                let end = &self.sources[source];
                let device = if ring { &end.nvram } else { &end.pool };
                device.fail_change(nth, Effect::Errno(EIO));
                self.sources[source].erring = true;
            }
            Fault::HubError { ring, nth } => {
                let device = if ring { &self.hub.nvram } else { &self.hub.pool };
                device.fail_change(nth, Effect::Errno(EIO));
                self.hub.erring = true;
            }
            Fault::Slow { thread, ms } => drop(self.slow.insert(thread, now + ms)),
            Fault::Checkpoint { source } => {
                if let Some(filer) = &self.sources[source].state.borrow().filer {
                    filer.shared().checkpoint.want();
                }
            }
            Fault::Failover { source } => self.ask(Asked::Failover(source)),
            Fault::Failback { source } => self.ask(Asked::Failback(source)),
        }
    }

    /// A hub that does not run is not asked.
    fn ask(&mut self, asked: Asked) {
        self.hub.parts.borrow_mut().asked.push_back(asked);
    }

    fn pause(&mut self, at: usize, until: u64) {
        let running = self.sources.get(at).map_or(&self.hub.running, |source| &source.running);
        if let Some(running) = running {
            self.probes.hit(Probe::Paused);
            running.pause(true);
            self.paused.insert(at, until);
        }
    }

    /// Ends a source: its power goes, or it is killed and the page cache stays.
    async fn end_source(&mut self, at: usize, power: bool) {
        let again = self.now_ms() + self.chance.below(1500);
        let seeds = [self.chance.next_u64(), self.chance.next_u64()];
        let source = &mut self.sources[at];
        let Some(running) = source.running.take() else { return };
        if power {
            self.network.forget(address(at), false);
            source.nvram.power_cut(seeds[0]);
            source.pool.power_cut(seeds[1]);
        }
        source.nvram = source.nvram.survivor().into();
        source.pool = source.pool.survivor().into();
        {
            let mut state = source.state.borrow_mut();
            (state.filer, state.mark) = (None, false);
            state.serving &= state.primary == Primary::Hub;
            state.refused = None;
        }
        running.kill(&self.threads).await;
        source.state.borrow_mut().filer = None;
        source.start_at = Some(again);
        self.paused.remove(&at);
        self.sources[at].erring = false;
    }

    /// Ends the hub likewise.
    async fn end_hub(&mut self, power: bool) {
        let again = self.now_ms() + self.chance.below(2500);
        let seeds = [self.chance.next_u64(), self.chance.next_u64()];
        let Some(running) = self.hub.running.take() else { return };
        self.network.listen(None);
        self.reader = None;
        let before = self.hub.files.clone();
        if power {
            for address in self.network.addresses() {
                self.network.forget(address, true);
            }
            self.hub.nvram.power_cut(seeds[0]);
            self.hub.pool.power_cut(seeds[1]);
            self.hub.files = before.power_cut(&mut self.chance, true);
            self.hub.nvrams.survive(Some(seeds[0]));
        } else {
            self.hub.files = before.copy();
            self.hub.nvrams.survive(None);
        }
        before.die_at(0);
        self.hub.nvram = self.hub.nvram.survivor().into();
        self.hub.pool = self.hub.pool.survivor().into();
        *self.hub.parts.borrow_mut() = HubParts::default();
        running.kill(&self.threads).await;
        *self.hub.parts.borrow_mut() = HubParts::default();
        self.hub.start_at = Some(again);
        self.paused.remove(&self.sources.len());
        self.hub.erring = false;
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
        }
    }
}
