//! Rot of what lies in no pool: a ring of either end, and the hub's source logs (R3, R11).
//!
//! It comes while its end is down, and takes one record, of which a later one says that it was durable:
//! nobody may take it for the torn end of a log. In one run one end loses something so, and its source
//! or its hub has it still. What has to hold ([`super::laws`]): a hub that lacks what was answered says
//! so of that source, until it has it again or another end is primary; a source does not start with an
//! NVRAM that has rotted, and with a new one it has all that was answered.

use std::path::PathBuf;
use std::sync::Arc;

use super::probes::Probe;
use super::run::Simulation;
use super::world::Primary;
use crate::device::sim::{Chance, SimDevice};
use crate::hub::lane::Cursors;
use crate::nvlog::Handle;
use crate::nvlog::format::{HEADER_BYTES, device_offset};
use crate::sourcelog::format::HEADER_BYTES as LOG_HEADER_BYTES;
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::{ByteCount, LogPosition};

/// Bytes into a record: in its envelope, in its body.
const PLACES: [u64; 2] = [40, 200];

/// Where a record begins that was durable, as a later one says, and how far it goes.
fn told_durable(ring: &Handle) -> Vec<(LogPosition, u64)> {
    let status = ring.status();
    let (mut at, mut records, mut told) = (status.released, Vec::new(), LogPosition(0));
    while at < status.durable {
        let Ok((envelope, _)) = ring.read(at) else { break };
        told = told.max(envelope.durable);
        records.push((at, u64::from(envelope.record_bytes)));
        at = at.after(ByteCount(u64::from(envelope.record_bytes)));
    }
    records.retain(|(at, _)| *at < told);
    records
}

/// Whether something is said to be missing, or to be wrong.
pub(super) fn is_told(cursors: &Cursors) -> bool {
    cursors.doubts.missing.is_some() || cursors.fault.is_some()
}

impl Simulation {
    fn ring_of(&self, end: usize) -> Option<Handle> {
        match self.sources.get(end) {
            Some(source) => {
                let filer = source.state.borrow().filer.clone()?;
                filer.shared().ring.get().cloned()
            }
            None => self.hub.shared()?.stager.ring().cloned(),
        }
    }

    /// Whether the hub has everything that a source was ever answered for, and is asked first by it.
    fn is_held_by_the_hub(&self, at: usize) -> bool {
        let state = self.sources[at].state.borrow();
        let here = state.primary == Primary::Source && state.serving && !state.was_alone;
        let all = state.line.acknowledged() <= state.hub_durable && !state.mark;
        state.setup.asks_first() && here && all && self.sources[at].copy.is_none()
    }

    /// A record of a ring rots, while its end is down.
    pub(super) async fn rot_ring(&mut self, end: usize, power: bool, seed: u64) {
        let mut chance = Chance::new(seed);
        let of_hub = end == self.sources.len();
        let running =
            if of_hub { self.hub.running.is_some() } else { self.sources[end].running.is_some() };
        let fit = running && (of_hub || self.is_held_by_the_hub(end));
        let ring = self.ring_of(end).filter(|_| fit);
        let found = ring.map(|ring| (told_durable(&ring), ring.status().capacity));
        let Some((records, capacity)) = found.filter(|(records, _)| !records.is_empty()) else {
            // Soon.
            self.rotting = Some((end, power, seed));
            return;
        };
        let (position, bytes) = records[to_usize(chance.below(to_u64(records.len())))];
        let place = PLACES[to_usize(chance.below(2))].min(bytes - 512 + 40);
        let at = device_offset(capacity, position) + place;
        self.tell(&format!("the record at {position} of {bytes} bytes rots"));
        if of_hub {
            self.end_hub(power).await;
            self.hub.nvram.rot(at, &[0x11]);
            self.hub_lost();
            self.probes.hit(Probe::RotOfHubRing);
        } else {
            self.end_source(end, power).await;
            self.sources[end].nvram.rot(at, &[0x11]);
            self.sources[end].nvram_rotten = true;
        }
    }

    /// What could not rot yet, and is looked for again.
    pub(super) async fn look_for_rot(&mut self) {
        if let Some((end, power, seed)) = self.rotting.take() {
            self.rot_ring(end, power, seed).await;
        }
    }

    /// A byte of a source log rots, while the hub is down.
    pub(super) async fn rot_log(&mut self, power: bool, seed: u64) {
        if self.hub.running.is_none() {
            return;
        }
        self.end_hub(power).await;
        let mut chance = Chance::new(seed);
        let content =
            |path: &PathBuf| self.hub.files.content(path).map_or(0, |content| content.len());
        let logs: Vec<_> = self
            .hub
            .files
            .paths()
            .into_iter()
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .filter(|path| content(path) > LOG_HEADER_BYTES)
            .collect();
        if logs.is_empty() {
            return;
        }
        let path = &logs[to_usize(chance.below(to_u64(logs.len())))];
        let header = to_u64(LOG_HEADER_BYTES);
        let at = header + chance.below(to_u64(content(path)) - header);
        self.hub.files.rot(path, to_usize(at));
        self.tell(&format!("{} rots at {at}", path.display()));
        self.hub_lost();
        self.sources.iter().for_each(|source| source.state.borrow_mut().log_rotten = true);
        self.probes.hit(Probe::RotOfLog);
    }

    /// The hub may lack what it held, of whatever source.
    fn hub_lost(&self) {
        for source in &self.sources {
            let mut state = source.state.borrow_mut();
            (state.rotten_at_hub, state.rot_told) = (true, false);
        }
    }

    /// A source whose NVRAM has rotted is refused by name; then it gets a new one, and is started as it is
    /// told. Whether that was done.
    pub(super) async fn replace_nvram(&mut self, at: usize) -> Result<bool, String> {
        let (refused, started) = {
            let state = self.sources[at].state.borrow();
            (state.refused.clone(), state.filer.is_some())
        };
        if started {
            self.sources[at].accept_lost_nvram = false;
        }
        if !self.sources[at].nvram_rotten {
            return Ok(false);
        }
        if started {
            return Err(format!("R3: source {at} passes over rot in its NVRAM"));
        }
        let Some(refused) = refused.filter(|refused| refused.contains("are damaged")) else {
            return Ok(false);
        };
        self.tell(&format!("source {at} gets another NVRAM: {refused}"));
        self.end_source(at, false).await;
        let source = &mut self.sources[at];
        let size = ByteCount(source.state.borrow().setup.ring_bytes + HEADER_BYTES);
        source.nvram = Arc::new(SimDevice::new("nvram", size));
        (source.nvram_rotten, source.accept_lost_nvram) = (false, true);
        self.probes.hit(Probe::RotOfSourceRing);
        Ok(true)
    }
}
