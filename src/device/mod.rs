//! Devices: where bytes are kept.
//!
//! Floor 2. A device is an array of bytes that can be read, written and flushed; what stands
//! above it (ring, pool, RAID) never sees a path or a descriptor. Implementations: [`mod@file`] for
//! files and block devices, [`latch`] which makes the first error final, [`overlay`] which writes
//! to memory, [`sim`] which loses, tears and fails on demand. All pass one conformance suite.
//!
//! Calls block. They are made from threads that may block: committing thread, drainer, appliers,
//! readers; never from an actor's handler.

pub mod buffer;
pub mod conformance;
pub mod directory;
pub mod file;
pub mod latch;
pub mod overlay;
pub mod sim;

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;

use crate::units::numbers::ByteCount;

/// What went wrong with a device. Cloneable, so that a latch can repeat it to everybody.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DeviceError {
    /// The caller asked for bytes that the device does not have.
    #[error("{device}: {length} bytes at {offset} lie past the end at {size}")]
    OutOfRange { device: Arc<str>, offset: u64, length: u64, size: u64 },
    /// The device or the kernel refused.
    #[error("{device}: {operation} of {length} bytes at {offset}: {error}")]
    Io {
        device: Arc<str>,
        operation: &'static str,
        offset: u64,
        length: u64,
        error: Arc<io::Error>,
    },
    /// More devices of an array failed than its level bears.
    #[error("{device}: {operation} of {length} bytes at {offset}: {what}")]
    Lost { device: Arc<str>, operation: &'static str, offset: u64, length: u64, what: Arc<str> },
    /// An earlier error latched the device: it takes no writes until an operator acts.
    #[error("refused since the first error: {first}")]
    Latched { first: Arc<DeviceError> },
}

impl DeviceError {
    /// Whether a read has failed: what was asked for may be had elsewhere.
    pub fn is_of_read(&self) -> bool {
        match self {
            Self::OutOfRange { .. } | Self::Latched { .. } => false,
            Self::Io { operation, .. } | Self::Lost { operation, .. } => *operation == "read",
        }
    }
}

/// How a device makes a write durable, shown in status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Each durable write carries O_DIRECT and O_DSYNC.
    DirectDsync,
    /// Each durable write is followed by fdatasync.
    Fdatasync,
    /// A simulated device.
    Simulated,
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DirectDsync => "O_DIRECT|O_DSYNC",
            Self::Fdatasync => "fdatasync",
            Self::Simulated => "simulated",
        })
    }
}

/// An array of bytes on some medium.
///
/// Offsets and lengths may have any alignment; an implementation that needs aligned ones uses a
/// bounce buffer. Callers on a hot path keep to [`Device::alignment`] and to buffers of
/// [`buffer::AlignedBuffer`] and get none.
///
/// After an error of `write_at` the content of that range is undefined; after an error of
/// `flush` or `write_durable_at` everything written since the last successful flush is.
pub trait Device: Send + Sync + fmt::Debug {
    /// Name for messages: usually the path.
    fn name(&self) -> Arc<str>;
    /// Size in bytes; constant while open.
    fn size(&self) -> ByteCount;
    /// Offsets, lengths and buffers of this alignment go through without a bounce buffer.
    fn alignment(&self) -> ByteCount;
    /// How a durable write is made durable.
    fn durability(&self) -> Durability;
    /// Fills `buffer` from `offset`.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError>;
    /// Writes `bytes` at `offset`; durable after the next successful [`Device::flush`].
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError>;
    /// Writes all pieces, one behind the other, as one [`Device::write_at`]. Who can hands them to the
    /// kernel as they are; here they are copied together.
    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), DeviceError> {
        match pieces {
            [bytes] => self.write_at(offset, bytes),
            _ => self.write_at(offset, &buffer::AlignedBuffer::gathered(pieces)),
        }
    }
    /// Writes `bytes` at `offset`; durable when it returns `Ok`. Says nothing about earlier
    /// `write_at` calls.
    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError>;
    /// Makes every write that returned before this call durable.
    fn flush(&self) -> Result<(), DeviceError>;
    /// Durable writes and flushes done so far, for metrics; 0 from a device that does not count.
    fn syncs(&self) -> u64 {
        0
    }
    /// Writes of whole multiples of this, at such multiples, cost least.
    fn stripe(&self) -> ByteCount {
        self.alignment()
    }
    /// Ways to read a block that do not use what [`Device::read_at`] reads.
    fn alternatives(&self) -> u32 {
        0
    }
    /// Fills `buffer`, part of one block of 4096 bytes, in the `nth` other way, counted from 0. Who
    /// knows the checksum tries them all: a device cannot tell which of two copies is the right one.
    fn read_alternative(
        &self,
        nth: u32,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), DeviceError> {
        let (length, what) = (crate::units::convert::to_u64(buffer.len()), "no other copy");
        let what = Arc::from(format!("{what} {nth}"));
        Err(DeviceError::Lost { device: self.name(), operation: "read", offset, length, what })
    }
    /// Rewrites a block of which [`Device::read_at`] gave `seen` and which is `good`. Nothing is
    /// written, and `false` is the answer, if it has changed since or there is no other copy.
    fn repair_at(&self, _offset: u64, _seen: &[u8], _good: &[u8]) -> Result<bool, DeviceError> {
        Ok(false)
    }
    /// Told at the open of a store and before its first write: says of so many blocks from one on
    /// whether any of them holds something.
    fn note_unused(&self, _in_use: &dyn Fn(u64, u64) -> bool) {}
    /// Itself, for whoever manages what it is made of; none if it is a plain one.
    fn managed(self: Arc<Self>) -> Option<Arc<dyn Any + Send + Sync>> {
        None
    }
    /// The devices that this one is made of, by place; none if it is a plain one.
    fn members(&self) -> Vec<MemberReport> {
        Vec::new()
    }
}

/// How a device of an array is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberState {
    /// It has all it should have.
    In,
    /// It is not used: it failed, or was not there when the array was opened.
    Failed,
    /// It is being filled.
    Rebuilding,
}

/// One device of an array, for status.
#[derive(Debug, Clone)]
pub struct MemberReport {
    /// Its path, as far as it is known.
    pub name: Arc<str>,
    /// Its id.
    pub id: crate::units::ids::MemberId,
    /// How it is.
    pub state: MemberState,
    /// Why it is not in.
    pub reason: Option<Arc<str>>,
    /// Reads that failed and were answered from the others.
    pub read_errors: u64,
    /// Blocks rewritten because they were not what they should be.
    pub repaired_blocks: u64,
    /// Its size; 0 if it is not there.
    pub size: ByteCount,
    /// Bytes written to it since it was opened.
    pub written_bytes: u64,
    /// Answers that took too long since it was opened.
    pub slow_answers: u64,
}

/// Bytes at the beginning of a device that must be zero before it is taken for a new store: no
/// partition table, file system or volume manager leaves them so.
pub const BLANK_BYTES: u64 = 1 << 20;

/// Whether a device begins with [`BLANK_BYTES`] zeros. What does not may be somebody else's.
pub fn is_blank(device: &dyn Device) -> Result<bool, DeviceError> {
    let mut bytes = vec![0; crate::units::convert::to_usize(BLANK_BYTES.min(device.size().0))];
    device.read_at(0, &mut bytes)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

/// Checks that `offset..offset + length` lies inside a device of `size` bytes.
pub fn check_range(device: &dyn Device, offset: u64, length: usize) -> Result<(), DeviceError> {
    let length = crate::units::convert::to_u64(length);
    let size = device.size().0;
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DeviceError::OutOfRange { device: device.name(), offset, length, size }),
    }
}
