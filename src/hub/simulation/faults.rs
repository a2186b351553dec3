//! What goes wrong, and how an end comes down and up again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::hub_end::{Asked, HubParts};
use super::laws;
use super::probes::Probe;
use super::run::Simulation;
use super::setup::{Fault, Store, Sweep, address};
use super::world::Primary;
use crate::device::sim::{Chance, Effect, On};
use crate::hub::mending;
use crate::hub::shared::Shared;
use crate::pool::Pool;
use crate::pool::write_set::Reservation;
use crate::units::machine;
use crate::units::machine::simulated::Inside;
use crate::units::numbers::BlockCount;
use crate::volume::mend::Depth;
use crate::volume::walk::Walk;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// So long a pool that is to be full may not be there yet.
const BEGINNING_MS: u64 = 100;

impl Simulation {
    pub(super) async fn fault(&mut self, fault: Fault) {
        let now = self.now_ms();
        match fault {
            Fault::SourceCut { source, nth: None } => self.end_source(source, true).await,
            Fault::SourceCut { source, nth: Some(nth) } => {
                self.sources[source].fail(nth % 2 == 0, nth, Effect::PowerCut);
            }
            Fault::SourceKill { source } => {
                self.probes.hit(Probe::SourceKilled);
                self.end_source(source, false).await;
            }
            Fault::HubCut { nth: None } => self.end_hub(true).await,
            Fault::HubCut { nth: Some(nth) } => self.hub.fail(nth % 2 == 0, nth, Effect::PowerCut),
            Fault::HubKill => {
                self.probes.hit(Probe::HubKilled);
                self.end_hub(false).await;
            }
            Fault::PauseSource { source, ms } => self.pause(source, now + ms),
            Fault::PauseHub { ms } => self.pause(self.sources.len(), now + ms),
            Fault::Slow { thread, ms } => drop(self.slow.insert(thread, now + ms)),
            Fault::Checkpoint { source } => {
                if let Some(filer) = &self.sources[source].state.borrow().filer {
                    filer.shared().checkpoint.want();
                }
            }
            Fault::Grow { source } => self.grow(source),
            Fault::Failover { source } => self.ask(Asked::Failover(source)),
            Fault::Failback { source } => self.ask(Asked::Failback(source)),
            Fault::OldCopy { source, boots } => self.restore(source, boots).await,
            Fault::RotRing { end, power, seed } => self.rot_ring(end, power, seed).await,
            Fault::RotLog { power, seed } => self.rot_log(power, seed).await,
            fault @ (Fault::LinkCut { .. }
            | Fault::LinkHold { .. }
            | Fault::Strand { .. }
            | Fault::SourceError { .. }
            | Fault::HubError { .. }
            | Fault::HubFiles { .. }
            | Fault::Full { .. }
            | Fault::Rot { .. }
            | Fault::Lie { .. }) => self.fault_below(fault, now),
        }
    }

    /// Faults of link and disks.
    fn fault_below(&mut self, fault: Fault, now: u64) {
        match fault {
            Fault::LinkCut { source, keep } => {
                self.probes.hit(Probe::LinkCut);
                self.network.cut(address(source), keep);
            }
            Fault::LinkHold { source, held, ms } => {
                self.probes.hit(Probe::LinkHeld);
                self.network.hold(address(source), held);
                self.held.insert(source, now + ms);
            }
            Fault::Strand { source, coming, ms } => {
                self.network.strand(address(source), coming);
                self.stranded.insert(source, now + ms);
            }
            Fault::SourceError { source, ring, nth } => {
                self.sources[source].fail(ring, nth, effect(nth));
                self.sources[source].erring = true;
            }
            Fault::HubError { ring, nth } => {
                self.hub.fail(ring, nth, effect(nth));
                self.hub.erring = true;
            }
            Fault::HubFiles { op, errno } => {
                self.hub.files.fail(op, "", errno);
                self.hub.erring = true;
            }
            Fault::Full { end, ms } => drop(self.filling.insert(end, now + ms)),
            Fault::Rot { end, seed } => self.rot(end, seed),
            Fault::Lie { end, nth, astray } => {
                let disk = self.sources.get(end).map_or(&self.hub.pool, |source| &source.pool);
                disk.lie(nth, astray);
            }
            fault @ (Fault::SourceCut { .. }
            | Fault::SourceKill { .. }
            | Fault::HubCut { .. }
            | Fault::HubKill
            | Fault::PauseSource { .. }
            | Fault::PauseHub { .. }
            | Fault::Slow { .. }
            | Fault::Checkpoint { .. }
            | Fault::Grow { .. }
            | Fault::Failover { .. }
            | Fault::Failback { .. }
            | Fault::RotRing { .. }
            | Fault::RotLog { .. }
            | Fault::OldCopy { .. }) => unreachable!("{fault:?} is not of link or disk"),
        }
    }

    /// A source that does not run reads its file when it starts.
    fn grow(&self, at: usize) {
        let mut state = self.sources[at].state.borrow_mut();
        state.setup.grown = true;
        if let Some(filer) = state.filer.as_ref().filter(|_| self.sources[at].running.is_some()) {
            filer.grow(state.setup.volumes());
        }
    }

    /// A hub that does not run is not asked.
    pub(super) fn ask(&mut self, asked: Asked) {
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
    pub(super) async fn end_source(&mut self, at: usize, power: bool) {
        let again = self.now_ms() + self.chance.below(self.setup.down_ms);
        let seeds = [self.chance.next_u64(), self.chance.next_u64()];
        self.look_at_sweep(false);
        let source = &mut self.sources[at];
        let Some(running) = source.running.take() else { return };
        source.full = None;
        if power {
            self.network.forget(address(at), false);
            source.nvram.power_cut(seeds[0]);
            source.pool.power_cut(seeds[1]);
        }
        source.nvram = source.nvram.survivor().into();
        source.pool.survive();
        source.keep_copy();
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
    pub(super) async fn end_hub(&mut self, power: bool) {
        let again = self.now_ms() + self.chance.below(self.setup.down_ms * 2);
        let seeds = [self.chance.next_u64(), self.chance.next_u64()];
        self.look_at_sweep(true);
        let Some(running) = self.hub.running.take() else { return };
        self.hub.full = None;
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
        self.hub.pool.survive();
        *self.hub.parts.borrow_mut() = HubParts::default();
        running.kill(&self.threads).await;
        *self.hub.parts.borrow_mut() = HubParts::default();
        self.hub.start_at = Some(again);
        self.paused.remove(&self.sources.len());
        self.hub.erring = false;
    }

    /// Holds all of a pool's free space; false: it is not there yet.
    fn fill(&mut self, end: usize, until: u64) -> bool {
        let Some(pool) = self.pool_of(end) else { return false };
        let Some(held) = all_of(&pool) else { return true };
        let held = Some((held, until));
        match self.sources.get_mut(end) {
            Some(source) => source.full = held,
            None => self.hub.full = held,
        }
        true
    }

    pub(super) fn make_room(&mut self, now: u64) {
        for (end, until) in std::mem::take(&mut self.filling) {
            // A source that begins is full before its first write.
            if !self.fill(end, until) && now < BEGINNING_MS {
                self.filling.insert(end, until);
            }
        }
        let over = |full: &mut (Reservation, u64)| full.1 <= now;
        drop(self.hub.full.take_if(over));
        for source in &mut self.sources {
            drop(source.full.take_if(over));
        }
    }

    fn pool_of(&self, end: usize) -> Option<Arc<Pool>> {
        match self.sources.get(end) {
            Some(source) => Some(source.state.borrow().filer.as_ref()?.pool()),
            None => Some(self.hub.shared()?.pool.clone()),
        }
    }

    /// Some blocks of the published images rot: of a mirror any, on one leg; else only data that
    /// the other end has as well.
    fn rot(&mut self, end: usize, seed: u64) {
        let mut chance = Chance::new(seed);
        let Some(pool) = self.pool_of(end) else { return };
        let disk = self.sources.get(end).map_or(&self.hub.pool, |source| &source.pool);
        let mut rotten = Vec::new();
        for (at, source) in self.sources.iter().enumerate() {
            let state = source.state.borrow();
            let both = state.primary == Primary::Source && laws::agree(&self.hub, &state);
            if (end < self.sources.len() && at != end) || !(both || disk.is_mirrored()) {
                continue;
            }
            let Some(filer) = &state.filer else { continue };
            for pin in pool.pin_source(filer.shared().source).unwrap_or_default() {
                let tree = pin.tree();
                let Ok(walk) = Walk::new(&pool, &tree) else { continue };
                let items = walk.filter_map(Result::ok).filter(|item| !item.pointer.is_hole());
                rotten.extend(items.map(|item| item.pointer.pbn).filter(|_| chance.below(16) == 0));
            }
        }
        for pbn in &rotten {
            disk.rot(*pbn, chance.next_u64());
        }
        if rotten.is_empty() || disk.is_mirrored() {
            return;
        }
        match self.sources.get_mut(end) {
            Some(source) => source.rotten = true,
            None => self.hub.rotten = true,
        }
    }

    /// What has rotted is asked of the other end, and written to new places.
    pub(super) async fn mend(&mut self) -> Result<(), String> {
        let Some(shared) = self.hub.shared() else { return Ok(()) };
        if !self.hub.rotten && !self.sources.iter().any(|source| source.rotten) {
            return Ok(());
        }
        // An older CP that somebody reads may have lost what neither end needs any more.
        self.reader = None;
        let filers: Vec<_> =
            self.sources.iter().filter_map(|s| s.state.borrow().filer.clone()).collect();
        let limit = self.now_ms() + 30_000;
        let mut done = self.ask_for_rot(&shared);
        loop {
            let ends = filers.iter().map(|filer| filer.rot());
            let figures: Vec<_> = ends.chain([shared.mender.figures(|_| true)]).collect();
            let waiting: u64 = figures.iter().map(|figures| figures.waiting).sum();
            let lost = figures.iter().find_map(|figures| figures.lost.first());
            let asked = done.load(Ordering::Relaxed) == filers.len();
            if asked && waiting == 0 && lost.is_none() {
                // One that began meanwhile may be of such a CP as well.
                self.reader = None;
                if figures.iter().any(|figures| figures.repaired > 0) {
                    self.probes.hit(Probe::Mended);
                }
                return Ok(());
            }
            if self.now_ms() > limit {
                return Err(format!(
                    "the other end has it, {waiting} wait to be written: {lost:?}"
                ));
            }
            if asked && lost.is_some() {
                // The link was away.
                done = self.ask_for_rot(&shared);
            }
            self.step().await?;
        }
    }

    /// Reads both images of each source, and mends what cannot be read; counts who is done.
    fn ask_for_rot(&self, shared: &Arc<Shared>) -> Arc<AtomicUsize> {
        let done = Arc::new(AtomicUsize::new(0));
        for source in &self.sources {
            let filer = source.state.borrow().filer.clone();
            let (Some(filer), Some(running)) = (filer, &source.running) else { continue };
            let Some(lane) = shared.lanes.get(&filer.shared().name) else { continue };
            let (parts, done, work) = (Arc::clone(shared), Arc::clone(&done), filer.mend_all());
            let _inside = Inside::of(running.process);
            machine::aside(move || {
                work();
                mending::mend_all(&parts, &lane, Depth::Data);
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        done
    }

    /// Plans the swept call if this is the life that it is of.
    pub(super) fn plan_sweep(&mut self, source: Option<usize>) {
        let lives = match source {
            Some(at) => &mut self.sources[at].lives,
            None => &mut self.hub.lives,
        };
        let before = *lives;
        *lives += 1;
        let Some(Sweep { store, lives, nth, effect, .. }) = self.setup.sweep else { return };
        if before != lives || store.is_of_hub() != source.is_none() {
            return;
        }
        match store {
            Store::SourceRing => self.sources[0].nvram.fail_change(nth, effect),
            Store::SourcePool => self.sources[0].pool.fail_change(nth, effect),
            Store::HubRing => self.hub.nvram.fail_change(nth, effect),
            Store::HubPool => self.hub.pool.fail_change(nth, effect),
            Store::HubFiles => match effect {
                Effect::PowerCut => self.hub.files.die_at(self.hub.files.calls() + nth + 1),
                Effect::Errno(errno) => self.hub.files.fail_call(nth, errno),
                Effect::Short(_) | Effect::Lost | Effect::Misdirected(_) | Effect::Stale => {
                    self.hub.files.fail_call(nth, EIO);
                }
            },
        }
        self.swept = Some(None);
        if source.is_some() {
            self.sources[0].erring = true;
        } else {
            self.hub.erring = true;
        }
    }

    /// Whether the swept call has come, seen where its end goes down, and in the end.
    pub(super) fn look_at_sweep(&mut self, of_hub: bool) {
        let Some(sweep) = self.setup.sweep.filter(|sweep| sweep.store.is_of_hub() == of_hub) else {
            return;
        };
        if self.swept != Some(None) {
            return;
        }
        let word = |on: Option<On>| on.map(|on| format!("{on:?}"));
        let (left, struck) = match sweep.store {
            Store::SourceRing => {
                let nvram = &self.sources[0].nvram;
                (nvram.forget_faults() > 0, word(nvram.struck()))
            }
            Store::SourcePool => {
                let pool = &self.sources[0].pool;
                (pool.forget_faults() > 0, word(pool.struck()))
            }
            Store::HubRing => (self.hub.nvram.forget_faults() > 0, word(self.hub.nvram.struck())),
            Store::HubPool => (self.hub.pool.forget_faults() > 0, word(self.hub.pool.struck())),
            Store::HubFiles => {
                let files = &self.hub.files;
                (files.will_fail(), files.struck().map(|op| format!("{op:?}")))
            }
        };
        self.swept = if left { None } else { Some(struck) };
    }

    /// Whether an end that stops inside a call loses its power: it does, but where a sweep kills it.
    pub(super) fn loses_power(&self, of_hub: bool) -> bool {
        let sweep = self.setup.sweep.filter(|sweep| sweep.store.is_of_hub() == of_hub);
        sweep.is_none_or(|sweep| sweep.power)
    }

    /// A failure is told with the device that failed.
    pub(super) fn names_its_device(&self, reason: &str, of_hub: bool) -> Result<(), String> {
        let Some(sweep) = self.setup.sweep.filter(|sweep| sweep.store.is_of_hub() == of_hub) else {
            return Ok(());
        };
        let device = match sweep.store {
            Store::SourceRing => "nvram",
            Store::SourcePool => "pool",
            Store::HubRing => "hub-nvram",
            Store::HubPool => "hub-pool",
            Store::HubFiles => "log",
        };
        if reason.contains(device) {
            return Ok(());
        }
        Err(format!("{device} failed, and what is said does not name it: {reason}"))
    }
}

/// How a write fails: by the device, for want of room, or torn.
fn effect(nth: u64) -> Effect {
    match nth % 3 {
        0 => Effect::Errno(EIO),
        1 => Effect::Errno(ENOSPC),
        _ => Effect::Short(512 * nth),
    }
}

/// As much of a pool's space as can be had.
fn all_of(pool: &Arc<Pool>) -> Option<Reservation> {
    let mut blocks = pool.space().ok()?.free.0;
    while blocks > 0 {
        if let Ok(held) = pool.reserve(BlockCount(blocks)) {
            return Some(held);
        }
        blocks -= blocks.div_ceil(32);
    }
    None
}
