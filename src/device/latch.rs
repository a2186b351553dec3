//! A device whose first error is final (invariant 7).
//!
//! Whoever owns a device that must not lie puts it into a [`Latch`]: ring, pool, source log. The
//! first failed write or flush is kept and repeated to every later writer, so that a failed
//! fdatasync can never be retried and taken for success (the kernel reports such an error once
//! and then forgets it). Reads go on: what was durable before still is. A call that lies outside
//! the device never reached it and latches nothing. Only a restart opens the latch again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::{Device, DeviceError, Durability, MemberReport};
use crate::units::numbers::ByteCount;

/// A device that refuses writes after its first failed one.
#[derive(Debug)]
pub struct Latch<D> {
    inner: D,
    first: OnceLock<Arc<DeviceError>>,
    syncs: AtomicU64,
}

impl<D: Device> Latch<D> {
    /// Guards `inner`.
    pub fn new(inner: D) -> Self {
        Self { inner, first: OnceLock::new(), syncs: AtomicU64::new(0) }
    }

    /// The error that latched it, for status.
    pub fn latched(&self) -> Option<Arc<DeviceError>> {
        self.first.get().cloned()
    }

    /// The device inside.
    pub fn inner(&self) -> &D {
        &self.inner
    }

    fn guard(&self, call: impl FnOnce(&D) -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        if let Some(first) = self.first.get() {
            return Err(DeviceError::Latched { first: Arc::clone(first) });
        }
        let result = call(&self.inner);
        match &result {
            Ok(()) | Err(DeviceError::OutOfRange { .. }) => {}
            Err(DeviceError::Latched { first }) => self.keep(Arc::clone(first)),
            Err(error @ (DeviceError::Io { .. } | DeviceError::Lost { .. })) => {
                self.keep(Arc::new(error.clone()))
            }
        }
        result
    }

    /// The first one wins: a later error is its consequence more often than news.
    fn keep(&self, error: Arc<DeviceError>) {
        if self.first.set(error).is_ok() {
            tracing::error!(device = %self.inner.name(), error = ?self.first.get(), "latched");
        }
    }
}

impl<D: Device> Device for Latch<D> {
    fn name(&self) -> Arc<str> {
        self.inner.name()
    }

    fn size(&self) -> ByteCount {
        self.inner.size()
    }

    fn alignment(&self) -> ByteCount {
        self.inner.alignment()
    }

    fn durability(&self) -> Durability {
        self.inner.durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.guard(|inner| inner.write_at(offset, bytes))
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), DeviceError> {
        self.guard(|inner| inner.write_pieces_at(offset, pieces))
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.guard(|inner| inner.write_durable_at(offset, bytes))?;
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.guard(D::flush)?;
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    fn stripe(&self) -> ByteCount {
        self.inner.stripe()
    }

    fn alternatives(&self) -> u32 {
        self.inner.alternatives()
    }

    fn read_alternative(
        &self,
        nth: u32,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), DeviceError> {
        self.inner.read_alternative(nth, offset, buffer)
    }

    fn repair_at(&self, offset: u64, seen: &[u8], good: &[u8]) -> Result<bool, DeviceError> {
        self.inner.repair_at(offset, seen, good)
    }

    fn members(&self) -> Vec<MemberReport> {
        self.inner.members()
    }
}

/// A shared device is a device, so that a latch and its user may hold the same one.
impl<D: Device + ?Sized> Device for Arc<D> {
    fn name(&self) -> Arc<str> {
        (**self).name()
    }

    fn size(&self) -> ByteCount {
        (**self).size()
    }

    fn alignment(&self) -> ByteCount {
        (**self).alignment()
    }

    fn durability(&self) -> Durability {
        (**self).durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        (**self).read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        (**self).write_at(offset, bytes)
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), DeviceError> {
        (**self).write_pieces_at(offset, pieces)
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        (**self).write_durable_at(offset, bytes)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        (**self).flush()
    }

    fn syncs(&self) -> u64 {
        (**self).syncs()
    }

    fn stripe(&self) -> ByteCount {
        (**self).stripe()
    }

    fn alternatives(&self) -> u32 {
        (**self).alternatives()
    }

    fn read_alternative(
        &self,
        nth: u32,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), DeviceError> {
        (**self).read_alternative(nth, offset, buffer)
    }

    fn repair_at(&self, offset: u64, seen: &[u8], good: &[u8]) -> Result<bool, DeviceError> {
        (**self).repair_at(offset, seen, good)
    }

    fn note_unused(&self, in_use: &dyn Fn(u64, u64) -> bool) {
        (**self).note_unused(in_use);
    }

    fn members(&self) -> Vec<MemberReport> {
        (**self).members()
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::super::sim::{Effect, On, SimDevice};
    use super::*;

    const SIZE: ByteCount = ByteCount(1 << 20);

    fn latched_by(on: On, effect: Effect) -> (Latch<Arc<SimDevice>>, Arc<SimDevice>) {
        let sim = Arc::new(SimDevice::new("sim", SIZE));
        sim.fail(on, 0, effect);
        (Latch::new(Arc::clone(&sim)), sim)
    }

    #[test]
    fn passes_the_suite() {
        conformance::suite(|| Box::new(Latch::new(SimDevice::new("sim", SIZE))));
    }

    /// Goal: any kind of write, durable write or flush that fails once refuses all of them for
    /// ever, with the first reason, and reads go on.
    #[test]
    fn the_first_error_is_final_and_repeated() {
        for on in [On::Write, On::WriteDurable, On::Flush] {
            let (device, sim) = latched_by(on, Effect::Errno(5));
            let attempt = |on| match on {
                On::Write => device.write_at(0, &[1; 512]),
                On::WriteDurable => device.write_durable_at(0, &[1; 512]),
                On::Flush => device.flush(),
                On::Read => device.read_at(0, &mut [0; 512]),
            };
            assert!(matches!(attempt(on), Err(DeviceError::Io { .. })));
            let first = device.latched().unwrap().to_string();
            let calls = sim.calls();
            for again in [On::Write, On::WriteDurable, On::Flush] {
                let error = attempt(again).unwrap_err();
                assert!(
                    matches!(&error, DeviceError::Latched { first: f } if f.to_string() == first)
                );
            }
            assert_eq!(sim.calls(), calls, "a latched device is not called for a write");
            assert!(attempt(On::Read).is_ok());
        }
    }

    #[test]
    fn durable_writes_and_flushes_are_counted_and_failed_ones_are_not() {
        let (device, _sim) = latched_by(On::Flush, Effect::Errno(5));
        device.write_at(0, &[1; 512]).unwrap();
        assert_eq!(device.syncs(), 0);
        device.write_durable_at(0, &[1; 512]).unwrap();
        assert!(device.flush().is_err());
        assert_eq!(Arc::new(device).syncs(), 1);
    }

    /// Control: without the latch a flush that failed once succeeds the second time.
    #[test]
    fn without_the_latch_the_error_is_forgotten() {
        let sim = SimDevice::new("sim", SIZE);
        sim.fail(On::Flush, 0, Effect::Errno(5));
        assert!(sim.flush().is_err());
        assert!(sim.flush().is_ok());
    }

    #[test]
    fn a_failed_read_and_a_call_outside_the_device_latch_nothing() {
        let (device, _sim) = latched_by(On::Read, Effect::Errno(5));
        assert!(device.read_at(0, &mut [0; 512]).is_err());
        assert!(matches!(device.write_at(SIZE.0, &[1; 512]), Err(DeviceError::OutOfRange { .. })));
        assert!(device.latched().is_none());
        assert!(device.write_durable_at(0, &[1; 512]).is_ok());
    }
}
