//! The session between a source and its hub, as two pure state machines.
//!
//! Floor 6. `step(event)` is synchronous, without lock, clock, socket or disk; it answers with
//! actions for its shell and checks its own invariants at the end. The shells are the forwarder in
//! `filer` and the source actor in `hub`; both run the same machines in every test of order.
//!
//! * [`primary`]: the end that serves writes and sends
//! * [`mirror`]: the end that follows
//!
//! The way of a session:
//!
//! ```text
//! primary                                   mirror
//! Hello ------------------------------------> wait until all queued is durable, record generation
//!       <------------------------------------ Welcome (what is held) or Refused
//! WantLog if the mirror holds more ---------> Refill.. RefillEnd         (R1: before serving)
//! Transfer.. -------------------------------> stage; <---- Ack as they become durable
//! PartitionFull, Updates.., CpEnd ----------> apply when all up to `last` is drained
//!       <------------------------------------ CpDone or CpRejected
//! ```

pub mod mirror;
pub mod primary;

use crate::units::numbers::CpNumber;

/// No end takes a higher CP number from the other: what is left is room for 68 years of one CP a
/// second, so that a peer's nonsense cannot use the numbers up.
pub const CP_NUMBER_MAX: CpNumber = CpNumber(1 << 31);

/// What an old copy of a source's state is answered.
const NEXT_OF_AN_OLD_COPY: &str = "start the original, or put its newest state directory back; if that \
     is lost, `mirrorhub failover` on the hub serves what it has, and `failback` brings this filer up to it";
/// What a source is answered whose hub has forgotten it.
const NEXT_OF_A_FORGOTTEN: &str = "put the newest state directory of the hub back; if the source was forgotten \
     there, onboard one with another name and copy the volumes into it: docs/operations.md, \"Sources come and go\"";
/// Whoever is in the lower epoch was set back to before a failover.
const NEXT_OF_OTHER_EPOCH: &str = "the end with the lower epoch is an old copy: put the newest state \
     directory of that end back; `mirrorhub status` on the hub says who serves";

#[cfg(test)]
mod tests;
