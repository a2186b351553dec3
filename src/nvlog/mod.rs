//! The NVRAM ring: what must survive a power cut enters here first.
//!
//! Floor 3. One ring on a source holds its own writes, one on the hub those of all sources. One
//! committing thread lays whatever its [`Feed`] has gathered into one durable write and then says
//! so; while it writes, the next batch gathers. Everything that is acknowledged stands on
//! a [`DurableToken`], and only that thread makes one.
//!
//! * [`format`](mod@format): the header's bytes, and where a position lies
//! * [`cursors`]: `released <= durable <= written <= released + capacity`
//! * `recover`: reads a ring after any end, and cuts what was never acknowledged; `stale`: whether
//!   its header lags behind the records
//! * `commit`: the committing thread
//! * `handle`: what other threads may ask and tell it
//!
//! On an I/O error the ring latches: nothing later is committed, the feed is told once, reads go on
//! (invariant 7). A panic of the committing thread ends the process: what is durable would no
//! longer be known.

mod commit;
pub mod cursors;
mod error;
mod figures;
pub mod format;
mod handle;
mod recover;
mod stale;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub use commit::DurableToken;
pub use error::RingError;
pub use handle::{Handle, RingStatus};
pub use recover::{Recovered, Recovery};

use crate::device::{Device, DeviceError};
use crate::limits::{COMMIT_BYTES_MAX, RECORD_BYTES_MAX, RING_AHEAD_BYTES_MAX, RING_BYTES_MIN};
use crate::record::envelope::RecordKind;
use crate::record::scan::Damage;
use crate::units::ids::SourceId;
use crate::units::numbers::{ByteCount, Epoch, LogPosition};

/// How an open ring behaves.
#[derive(Debug, Clone)]
pub struct RingOptions {
    /// After so long without a commit, changed cursors go to the header (R3).
    pub idle_header_after: Duration,
    /// Name of the committing thread.
    pub thread_name: String,
    /// Room that only [`Feed::take_first`] may use: what must be written so that other room comes
    /// back (R10). At least the largest record, or 0.
    pub spare_bytes: u64,
    /// The committing thread goes before every thread of an ordinary class, if it may.
    pub realtime: bool,
    /// A header is written before a record would end so many bytes behind what the last one calls
    /// durable: so far an opening looks for records behind a bad one. At least two largest commits.
    pub ahead_max: ByteCount,
}

impl RingOptions {
    /// The defaults, for a committing thread of that name and class.
    pub fn of(thread_name: &str, realtime: bool) -> Self {
        Self { thread_name: thread_name.to_owned(), realtime, ..Self::default() }
    }
}

impl Default for RingOptions {
    fn default() -> Self {
        Self {
            idle_header_after: Duration::from_secs(1),
            thread_name: "nvlog".into(),
            spare_bytes: 0,
            realtime: false,
            ahead_max: ByteCount(RING_AHEAD_BYTES_MAX),
        }
    }
}

/// What is fixed when a ring is made; kept in its header. The defaults are for every real ring.
#[derive(Debug, Clone, Copy)]
pub struct RingShape {
    /// Smallest data area that is accepted, in bytes.
    pub area_bytes_min: u64,
    /// Bytes of the largest group commit, and so of the largest record.
    pub commit_bytes_max: u64,
}

impl Default for RingShape {
    fn default() -> Self {
        Self { area_bytes_min: RING_BYTES_MIN, commit_bytes_max: COMMIT_BYTES_MAX }
    }
}

/// A record on its way into the ring.
#[derive(Debug, Clone)]
pub struct Pending {
    /// What the body is.
    pub kind: RecordKind,
    /// Whose it is.
    pub source: SourceId,
    /// The epoch it was taken in.
    pub epoch: Epoch,
    /// Not empty; with its envelope at most the ring's largest commit and `RECORD_BYTES_MAX`.
    pub body: Bytes,
    /// The caller's own name for it, handed back.
    pub ticket: u64,
}

/// A record that is durable in the ring.
#[derive(Debug, Clone)]
pub struct Committed {
    /// As it was given.
    pub ticket: u64,
    /// Where the record begins.
    pub position: LogPosition,
    /// Where it ends: release up to here when it is not needed any more.
    pub end: LogPosition,
    /// As it was given.
    pub body: Bytes,
}

/// What the committing thread works for. All calls come from that thread; none may block, and
/// none may call [`Handle::stop`].
pub trait Feed: Send + 'static {
    /// Called when the thread is free: records in order, at most `bytes_max` of record bytes
    /// (envelope and padding counted), but at least one record if there is any. What was taken is
    /// committed in this order, behind what [`Feed::take_first`] gave meanwhile; when the ring is
    /// full it waits there for room, and nothing more is taken by this call meanwhile.
    fn take(&mut self, bytes_max: u64) -> Vec<Pending>;
    /// Called in each round, also while records wait for room: records that overtake those and may
    /// use the ring's spare room. Bounded by the caller, in number and bytes.
    fn take_first(&mut self) -> Vec<Pending> {
        Vec::new()
    }
    /// Called after the one durable write of a batch, which may be a part of what was taken.
    fn committed(&mut self, batch: Vec<Committed>, token: &DurableToken);
    /// The device failed: nothing that was not reported committed is. Called once; the ring is
    /// latched.
    fn failed(&mut self, error: &DeviceError);
}

/// An open ring that has no feed yet.
#[derive(Debug)]
pub struct Ring {
    handle: Handle,
    started: bool,
}

impl Ring {
    /// Makes a new, empty ring of a whole device for `owner` (id of the hub or source). The device
    /// must begin with 1 MiB of zeros; a ring or anything else there is refused.
    pub fn create(
        device: Arc<dyn Device>,
        owner: [u8; 16],
        shape: RingShape,
    ) -> Result<(), RingError> {
        recover::create(&*device, owner, shape)
    }

    /// Makes the device blank again, durably: whatever ring was there is given up, and nothing of it
    /// can be taken for the next one's. Nobody may have it open. A cut leaves the ring as it was,
    /// one header slot of it, or nothing.
    pub fn erase(device: &dyn Device) -> Result<(), RingError> {
        Ok(recover::erase_headers(device)?)
    }

    /// Opens the ring of `owner` after a clean stop or any crash. `visit` is called for each record
    /// between the durable release point and the end, in order; what it was told counts only if
    /// `open` returns `Ok`. What was torn is cut, what is rotten is listed in [`Recovery`] (R3).
    pub fn open(
        device: Arc<dyn Device>,
        owner: [u8; 16],
        options: RingOptions,
        visit: &mut dyn FnMut(Recovered),
    ) -> Result<(Self, Recovery), RingError> {
        Self::open_telling(device, owner, options, visit, &mut |_| Ok(()))
    }

    /// The same; `told` hears of damage before anything is written: the next open may not find it
    /// again. If it fails the ring is as it was, and is not opened.
    pub fn open_telling(
        device: Arc<dyn Device>,
        owner: [u8; 16],
        options: RingOptions,
        visit: &mut dyn FnMut(Recovered),
        told: &mut dyn FnMut(&[Damage]) -> Result<(), String>,
    ) -> Result<(Self, Recovery), RingError> {
        let how = (recover::ALL_STEPS, options.ahead_max);
        let (state, recovery) = recover::recover(&*device, owner, how, visit, told)?;
        let largest = RECORD_BYTES_MAX.min(state.header.commit_bytes_max.0);
        assert!(options.spare_bytes == 0 || options.spare_bytes >= largest, "a spare of no use");
        let handle = commit::spawn(device, state, options)?;
        Ok((Self { handle, started: false }, recovery))
    }

    /// What other threads may use; valid before the start as well.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Gives the ring its feed and sets it going. It goes until [`Handle::stop`], also when every
    /// handle is dropped.
    pub fn start(mut self, feed: Box<dyn Feed>) -> Handle {
        self.started = true;
        self.handle.give(feed);
        self.handle.clone()
    }
}

impl Drop for Ring {
    /// A ring that never got a feed ends here.
    fn drop(&mut self) {
        if !self.started {
            self.handle.stop();
        }
    }
}

#[cfg(test)]
mod tests;
