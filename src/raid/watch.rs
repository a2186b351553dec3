//! Watches how a device of an array answers.
//!
//! A device may fail without saying so: each answer takes seconds, or every other read is an error
//! that the other devices make good. Both make everybody wait. So answers are timed and errors
//! counted, over a time; who has too many of them gets a verdict, and the array fails it if the
//! others bear that. A call that never returns is not helped by this.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::device::{Device, DeviceError, Durability};
use crate::limits::{RAID_ERRORS_MAX, RAID_SLOW_ANSWERS_MAX, RAID_SLOW_MS, RAID_VERDICT_SECONDS};
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::numbers::ByteCount;

/// A device that is watched.
#[derive(Debug)]
pub(super) struct Watched {
    device: Arc<dyn Device>,
    written: AtomicU64,
    slow_count: AtomicU64,
    /// When there was an error, or a slow answer, the last times.
    errors: Mutex<VecDeque<Instant>>,
    slow: Mutex<VecDeque<Instant>>,
}

impl Watched {
    pub(super) fn new(device: Arc<dyn Device>) -> Self {
        Self {
            device,
            written: AtomicU64::new(0),
            slow_count: AtomicU64::new(0),
            errors: Mutex::default(),
            slow: Mutex::default(),
        }
    }

    /// Bytes written so far.
    pub(super) fn written_bytes(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Answers that took too long so far.
    pub(super) fn slow_answers(&self) -> u64 {
        self.slow_count.load(Ordering::Relaxed)
    }

    /// Why it should not be used any more, if there is a reason.
    pub(super) fn verdict(&self) -> Option<String> {
        let minutes = RAID_VERDICT_SECONDS / 60;
        if recent(&self.errors) >= RAID_ERRORS_MAX {
            return Some(format!(
                "{RAID_ERRORS_MAX} of its answers in {minutes} minutes were errors"
            ));
        }
        let seconds = RAID_SLOW_MS / 1000;
        (recent(&self.slow) >= RAID_SLOW_ANSWERS_MAX).then(|| {
            format!(
                "{RAID_SLOW_ANSWERS_MAX} of its answers in {minutes} minutes took longer than \
                 {seconds} s"
            )
        })
    }

    fn timed(&self, work: impl FnOnce() -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        let began = machine::now();
        let done = work();
        if machine::elapsed(began) >= Duration::from_millis(RAID_SLOW_MS) {
            self.slow_count.fetch_add(1, Ordering::Relaxed);
            note(&self.slow, RAID_SLOW_ANSWERS_MAX);
        }
        if done.is_err() {
            note(&self.errors, RAID_ERRORS_MAX);
        }
        done
    }
}

fn note(times: &Mutex<VecDeque<Instant>>, most: usize) {
    let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
    times.push_back(machine::now());
    while times.len() > most {
        times.pop_front();
    }
}

fn recent(times: &Mutex<VecDeque<Instant>>) -> usize {
    let times = times.lock().unwrap_or_else(PoisonError::into_inner);
    let window = Duration::from_secs(RAID_VERDICT_SECONDS);
    times.iter().filter(|then| machine::elapsed(**then) <= window).count()
}

impl Device for Watched {
    fn name(&self) -> Arc<str> {
        self.device.name()
    }

    fn size(&self) -> ByteCount {
        self.device.size()
    }

    fn alignment(&self) -> ByteCount {
        self.device.alignment()
    }

    fn durability(&self) -> Durability {
        self.device.durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.timed(|| self.device.read_at(offset, buffer))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.written.fetch_add(to_u64(bytes.len()), Ordering::Relaxed);
        self.timed(|| self.device.write_at(offset, bytes))
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), DeviceError> {
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        self.written.fetch_add(to_u64(length), Ordering::Relaxed);
        self.timed(|| self.device.write_pieces_at(offset, pieces))
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.written.fetch_add(to_u64(bytes.len()), Ordering::Relaxed);
        self.timed(|| self.device.write_durable_at(offset, bytes))
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.timed(|| self.device.flush())
    }

    fn syncs(&self) -> u64 {
        self.device.syncs()
    }
}
