//! The log record: what a ring and a source log are made of.
//!
//! Floor 2. A record is an **envelope** (written by each ring or log for itself: whose ring,
//! which position) and a **body**. The body of most records is a **transfer**: entries formed
//! once by the source and the same bytes in both NVRAMs, in the frame, and behind a reference
//! (R6). This module is pure: structs and bytes, no device, no clock.
//!
//! * [`entry`]: one client write, trim or write-zeroes
//! * [`transfer`]: a batch of entries, its builder and its checked reader
//! * [`envelope`]: a ring's own header around a body
//! * [`marks`]: bodies that are no transfers: freeze, cut, fence
//! * [`scan`]: walks records and tells a torn tail from rot (R3)

pub mod entry;
pub mod envelope;
pub mod marks;
pub mod scan;
pub mod transfer;
