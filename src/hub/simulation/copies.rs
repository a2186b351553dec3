//! A source's state is restored from an old copy, and later its own state is put back (R1, R5).
//!
//! The copy is what its devices held at an earlier end of it. It is started a few times, so that its
//! generation may rise above the one that the hub knows; whatever its generation, it must not serve
//! without what was acknowledged since. A copy that has all of that is the source from then on.

use std::sync::Arc;

use super::disk::Disk;
use super::probes::Probe;
use super::run::Simulation;
use super::world::{Primary, SourceEnd};
use crate::device::sim::SimDevice;
use crate::filer::shared::LinkState;
use crate::wire::message::RefusedCode;

/// How long the copy runs each time but the last, and then.
const BOOT_MS: u64 = 60;
const LIFE_MS: u64 = 1200;

/// What a source keeps things on.
#[derive(Debug)]
pub(super) struct Devices {
    nvram: Arc<SimDevice>,
    pool: Disk,
    /// One of them fails, or will.
    erring: bool,
}

/// A copy that runs in the place of its source.
#[derive(Debug)]
pub(super) struct Copy {
    /// The source's own.
    aside: Devices,
    boots: u64,
    until_ms: u64,
}

impl SourceEnd {
    /// Now is the moment that a copy will be of: it has ended, and had written.
    pub(super) fn keep_copy(&mut self) {
        let written = self.state.borrow().by_both > 0;
        if self.is_copied && written && self.older.is_none() && self.copy.is_none() {
            let nvram = Arc::new(self.nvram.copy());
            self.older = Some(Devices { nvram, pool: self.pool.copy(), erring: false });
        }
    }

    fn take(&mut self, devices: Devices) -> Devices {
        let nvram = std::mem::replace(&mut self.nvram, devices.nvram);
        let pool = std::mem::replace(&mut self.pool, devices.pool);
        let erring = std::mem::replace(&mut self.erring, devices.erring);
        Devices { nvram, pool, erring }
    }
}

impl Simulation {
    /// The old copy takes the place of the source.
    pub(super) async fn restore(&mut self, at: usize, boots: u64) {
        let is_fit = self.sources[at].state.borrow().primary == Primary::Source;
        if !is_fit || self.sources[at].copy.is_some() {
            return;
        }
        let Some(older) = self.sources[at].older.take() else { return };
        self.end_source(at, false).await;
        self.probes.hit(Probe::OldCopy);
        let now = self.now_ms();
        let source = &mut self.sources[at];
        let aside = source.take(older);
        source.copy = Some(Copy { aside, boots, until_ms: now + BOOT_MS });
        let mut state = source.state.borrow_mut();
        (state.was_copied, state.has_served) = (true, false);
        drop(state);
        source.start_at = Some(now);
    }

    /// Copies whose time is over, and sources that the hub knows a newer generation of.
    pub(super) async fn look_at_copies(&mut self) {
        let now = self.now_ms();
        for at in 0..self.sources.len() {
            let Some(copy) = &self.sources[at].copy else {
                if self.is_outrun(at) {
                    self.tell("a source whose copy was started more often is started again");
                    self.end_source(at, false).await;
                    self.sources[at].start_at = Some(now);
                }
                continue;
            };
            let (boots, due) = (copy.boots, copy.until_ms <= now);
            if due && boots > 0 && !self.sources[at].state.borrow().has_served {
                self.end_source(at, false).await;
                let source = &mut self.sources[at];
                if let Some(copy) = &mut source.copy {
                    copy.boots -= 1;
                    copy.until_ms = now + if copy.boots == 0 { LIFE_MS } else { BOOT_MS };
                }
                source.start_at = Some(now);
            } else if due {
                self.put_back(at).await;
            }
        }
    }

    /// The source's own state is put back, unless the copy had all that was acknowledged: then
    /// clients were served, and it is the source.
    pub(super) async fn put_back(&mut self, at: usize) {
        let now = self.now_ms();
        let Some(copy) = self.sources[at].copy.take() else { return };
        if self.sources[at].state.borrow().has_served {
            self.tell("the copy has all that was acknowledged");
            return;
        }
        self.end_source(at, false).await;
        let source = &mut self.sources[at];
        drop(source.take(copy.aside));
        source.start_at = Some(now);
        self.tell("the source's own state is put back");
    }

    fn is_outrun(&self, at: usize) -> bool {
        let state = self.sources[at].state.borrow();
        let Some(filer) = state.filer.as_ref().filter(|_| state.was_copied) else { return false };
        let link = filer.shared().link();
        matches!(link, LinkState::Halted(refused) if refused.code == RefusedCode::Generation)
    }
}
