//! The units of the program: names, ids, numbers and hashes as types of their own.
//!
//! Floor 0: imports nothing of the crate. Everything that crosses a module border wears one of
//! these types, so that a volume block cannot be taken for a pool block, nor a name for an id.

pub mod bytes;
pub mod convert;
pub mod entrance;
pub mod hash;
pub mod ids;
pub mod latest;
pub mod machine;
pub mod moment;
pub mod names;
pub mod networks;
pub mod numbers;
pub mod policy;
pub mod rate;
pub mod retention;
pub mod times;
pub mod turn;
pub mod words;

/// Whether the long forms of the tests were asked for: `MIRRORHUB_FULL=1`.
#[cfg(test)]
pub(crate) fn is_full() -> bool {
    std::env::var_os("MIRRORHUB_FULL").is_some_and(|value| value == "1")
}

/// Bytes in one block of a volume and in one node of its tree.
pub const BLOCK_BYTES: usize = 4096;
/// The same, as the type that offsets have.
pub const BLOCK_BYTES_U64: u64 = 4096;
