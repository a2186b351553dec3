//! RAID: several devices as one.
//!
//! Floor 3. [`array::Array`] is a [`crate::device::Device`], so that nothing above knows of it: the
//! pool's labels, catalog and blocks lie on it and bear the loss of as many devices as its level
//! does. Calls block, as those of every device.
//!
//! * [`layout`]: which byte lies where, and [`parity`]: P and Q; both pure
//! * [`label`]: who belongs to an array, at which place, and who is in (R9)
//! * `journal`: closes the write hole
//! * [`mod@array`], `write`, `read`: the device
//! * [`span`]: several arrays one behind the other, after devices were added
//! * [`rebuild`]: another device in the place of one; [`stripes`]: a set of them
//! * [`scrub`]: whether all copies agree; `watch`: how devices answer
//! * [`assemble`]: makes an array, or finds one from its devices alone, and mends what a cut left;
//!   [`files`]: the same from paths
//!
//! Invariants:
//!
//! 1. Outside of what the journal names, every row fits its parity, unless a device lied.
//! 2. A device that is not in is never read, and nothing is acknowledged before all that are in
//!    know who is not.
//! 3. What was flushed survives the loss of power and of as many devices as the level bears. What
//!    was not flushed may read as anything after a cut, but only in the blocks that were written.
//! 4. A device is not used any more after its first failed write or flush (invariant 7). A failed
//!    read is answered from the others.

pub mod array;
pub mod assemble;
mod crew;
pub mod files;
mod journal;
pub mod label;
pub mod layout;
pub mod parity;
mod read;
pub mod rebuild;
pub mod scrub;
pub mod span;
pub mod stripes;
mod watch;
mod write;

#[cfg(test)]
pub(crate) mod tests;
