//! Runs a source: orders what clients write, keeps it in the NVRAM, forwards it, checkpoints it.
//!
//! Floor 7.

pub mod buffers;
pub mod plan;
pub mod ranges;
