//! The data of a pass: everything born since a CP, read from the pinned own tree (R4).
//!
//! A thread walks the trees and fills a short channel with payloads of Updates, all inline or
//! holes; the forwarder sends them as the hub's window allows. Memory goes by the channel, not by
//! what changed. A throttle bounds the bytes a second (`resync_limit`).
//!
//! A block that cannot be read ends the pass with its reason: nothing is left out silently.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use super::plan::Counts;
use super::shared::Pins;
use super::throttle::Throttle;
use crate::limits::CP_FRAME_BYTES_MAX;
use crate::pool::Pin;
use crate::pool::pointer::Pointer;
use crate::units::BLOCK_BYTES;
use crate::units::convert::{to_u64, to_usize};
use crate::units::machine;
use crate::units::numbers::{ByteCount, CpNumber, Vbn, VolumeNumber};
use crate::volume::diff::born_since;
use crate::wire::updates::Encoder;

/// Payloads that wait for the socket.
const AHEAD_FRAMES: usize = 4;

/// How far a pass has come, for status.
#[derive(Debug, Default)]
pub struct Progress {
    /// Blocks of the volumes, and those the walk has passed, changed or not.
    pub all_blocks: AtomicU64,
    /// See `all_blocks`.
    pub passed_blocks: AtomicU64,
    /// Bytes of payload made.
    pub bytes: AtomicU64,
    /// Blocks with data, and blocks that became holes.
    pub inline_blocks: AtomicU64,
    /// See `inline_blocks`.
    pub hole_blocks: AtomicU64,
    /// Of `bytes`, those that say holes.
    pub hole_bytes: AtomicU64,
}

/// The CPs that the images to be brought up are of.
#[derive(Debug, Clone, Default)]
pub struct Bases {
    /// The hub's.
    pub base: CpNumber,
    /// Older ones, of volumes that were left out for a while (R20).
    pub older: BTreeMap<VolumeNumber, CpNumber>,
}

impl Bases {
    fn of(&self, volume: VolumeNumber) -> CpNumber {
        self.older.get(&volume).copied().unwrap_or(self.base)
    }
}

/// One payload and its volume, or why there is no more.
pub type Payload = Result<(VolumeNumber, Vec<u8>), String>;

/// The far end of the walking thread.
#[derive(Debug)]
pub struct PassData {
    /// Its CP.
    pub cp: CpNumber,
    payloads: mpsc::Receiver<Payload>,
    next: Option<(VolumeNumber, Vec<u8>)>,
    ended: bool,
    bytes: u64,
    progress: Arc<Progress>,
}

impl PassData {
    /// Begins to read what was born since `bases` in `pins`. The thread ends with its receiver.
    pub fn start(
        cp: CpNumber,
        pins: Pins,
        bases: Bases,
        limit: Option<ByteCount>,
        progress: Arc<Progress>,
    ) -> Self {
        let (sender, payloads) = mpsc::channel(AHEAD_FRAMES);
        let told = Arc::clone(&progress);
        let throttle = Throttle::new(limit);
        machine::aside(move || {
            let mut walker = Walker { sender, throttle, progress };
            if let Err(Some(reason)) = walker.walk(&pins, &bases) {
                // Nobody listens any more if the connection has gone.
                machine::send(&walker.sender, Err(reason));
            }
        });
        Self { cp, payloads, next: None, ended: false, bytes: 0, progress: told }
    }

    /// What was made, by kind.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let hole_bytes = read(&self.progress.hole_bytes);
        Counts {
            inline: read(&self.progress.inline_blocks),
            holes: read(&self.progress.hole_blocks),
            inline_bytes: read(&self.progress.bytes).saturating_sub(hole_bytes),
            hole_bytes,
            ..Counts::default()
        }
    }

    /// Whether all was sent; its bytes.
    pub fn ended(&self) -> Option<u64> {
        (self.ended && self.next.is_none()).then_some(self.bytes)
    }

    /// Waits until a payload is there or the end is known; pending if neither is to be waited
    /// for. An error is why the walk ended early.
    pub async fn wait(&mut self) -> Result<(), String> {
        if self.ended || self.next.is_some() {
            return std::future::pending().await;
        }
        match self.payloads.recv().await {
            Some(Ok(payload)) => self.next = Some(payload),
            Some(Err(reason)) => return Err(reason),
            None => self.ended = true,
        }
        Ok(())
    }

    /// The payload that is ready.
    pub fn take(&mut self) -> Option<(VolumeNumber, Vec<u8>)> {
        let taken = self.next.take()?;
        self.bytes += to_u64(taken.1.len());
        Some(taken)
    }
}

/// `None` if nobody listens any more.
type Ended = Option<String>;

struct Walker {
    sender: mpsc::Sender<Payload>,
    throttle: Throttle,
    progress: Arc<Progress>,
}

impl Walker {
    fn walk(&mut self, pins: &Pins, bases: &Bases) -> Result<(), Ended> {
        let all = pins.values().map(|pin| pin.tree().size.blocks().0).sum();
        self.progress.all_blocks.store(all, Ordering::Relaxed);
        let mut before = 0;
        for (&volume, pin) in pins.iter() {
            self.volume(volume, pin, bases.of(volume), before)?;
            before += pin.tree().size.blocks().0;
            self.progress.passed_blocks.store(before, Ordering::Relaxed);
        }
        Ok(())
    }

    fn volume(
        &mut self,
        volume: VolumeNumber,
        pin: &Pin,
        base: CpNumber,
        before: u64,
    ) -> Result<(), Ended> {
        let named = |error: &dyn std::fmt::Display| Some(format!("volume {volume}: {error}"));
        let walk = born_since(pin.pool(), &pin.tree(), base).map_err(|error| named(&error))?;
        let mut out = Out { volume, encoder: Encoder::new(CP_FRAME_BYTES_MAX), run: Vec::new() };
        for item in walk {
            let item = item.map_err(|error| named(&error))?;
            self.progress.passed_blocks.store(before + item.vbn.0, Ordering::Relaxed);
            let follows = out.run.last().is_some_and(|(vbn, _)| vbn.0 + 1 == item.vbn.0);
            let full = to_u64(out.run.len()) >= out.encoder.inline_room();
            if item.pointer.is_hole() || !follows || full {
                self.put_run(&mut out, pin)?;
            }
            if item.pointer.is_hole() {
                if !out.encoder.has_room() {
                    self.send(&mut out)?;
                }
                let before = out.encoder.bytes_len();
                out.encoder.hole(item.vbn, item.count);
                let said = out.encoder.bytes_len() - before;
                self.progress.hole_bytes.fetch_add(said, Ordering::Relaxed);
                self.progress.hole_blocks.fetch_add(item.count, Ordering::Relaxed);
            } else {
                out.run.push((item.vbn, item.pointer));
            }
        }
        self.put_run(&mut out, pin)?;
        self.send(&mut out)
    }

    /// Reads the blocks of the run and puts them into the payload.
    fn put_run(&mut self, out: &mut Out, pin: &Pin) -> Result<(), Ended> {
        let mut run = std::mem::take(&mut out.run);
        while !run.is_empty() {
            let room = to_usize(out.encoder.inline_room()).min(run.len());
            if room == 0 {
                self.send(out)?;
                continue;
            }
            let rest = run.split_off(room);
            let bytes = read(pin, &run).map_err(Some)?;
            let blocks = bytes.as_chunks::<BLOCK_BYTES>().0;
            if let Some((first, _)) = run.first() {
                out.encoder.inline(*first, blocks.iter());
                self.progress.inline_blocks.fetch_add(to_u64(room), Ordering::Relaxed);
            }
            run = rest;
        }
        Ok(())
    }

    fn send(&mut self, out: &mut Out) -> Result<(), Ended> {
        if out.encoder.is_empty() {
            return Ok(());
        }
        let encoder = std::mem::replace(&mut out.encoder, Encoder::new(CP_FRAME_BYTES_MAX));
        let payload = encoder.finish();
        let made = to_u64(payload.len());
        self.progress.bytes.fetch_add(made, Ordering::Relaxed);
        if !self.throttle.wait(made, &self.sender) {
            return Err(None);
        }
        let sent = machine::send(&self.sender, Ok((out.volume, payload)));
        if sent { Ok(()) } else { Err(None) }
    }
}

/// A payload being made, and blocks side by side in the volume that are to be put into it.
struct Out {
    volume: VolumeNumber,
    encoder: Encoder,
    run: Vec<(Vbn, Pointer)>,
}

/// Reads blocks, those side by side in the pool at once, each verified.
fn read(pin: &Pin, run: &[(Vbn, Pointer)]) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; run.len() * BLOCK_BYTES];
    let mut at = 0;
    while at < run.len() {
        let beside = run[at..].windows(2).take_while(|pair| pair[0].1.pbn.0 + 1 == pair[1].1.pbn.0);
        let count = beside.count() + 1;
        let part = &run[at..at + count];
        let crcs: Vec<u32> = part.iter().map(|(_, pointer)| pointer.crc).collect();
        let target = &mut bytes[at * BLOCK_BYTES..(at + count) * BLOCK_BYTES];
        let result = pin.pool().read_run(part[0].1.pbn, &crcs, target);
        // A pin that the pool gave up is the reason, whatever was met in its blocks.
        pin.check().map_err(|error| error.to_string())?;
        result.map_err(|error| format!("block {}: {error}", part[0].0))?;
        at += count;
    }
    Ok(bytes)
}
