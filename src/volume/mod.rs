//! The volume tree: a copy-on-write hash tree over the blocks of a pool.
//!
//! Floor 5. A volume is an array of 4 KiB blocks; its tree has nodes of 128 pointers, each with
//! the content hash of what it points to, so the top names the whole content and equal roots
//! mean equal volumes, whatever device and history they have.
//!
//! * [`root`]: the content hash as pure functions, and the root of a raw image
//! * [`geometry`], [`node`]: shape of a tree, one node of it
//! * [`writer`]: builds the next tree from changed blocks, in one pass
//! * [`walk`]: visits a tree, pruned by range and birth
//! * [`reader`]: serves bytes and extents of a pinned CP
//! * [`diff`]: what changed since a CP; where two trees differ
//! * [`pull`], [`serve`]: make a tree equal to one at the other end, and answer that
//! * [`kept`]: gives back what only a kept CP has
//! * [`scan`]: reads everything and computes the root anew
//! * [`mod@scrub`]: reads what trees reach from the medium, and mends it
//! * [`check`]: proves that everything reachable is whole and that reachable + free = all
//!
//! Invariant: a tree is never changed; a new one shares what did not change. Errors name the
//! block; a damaged node is an error of whoever asked, never a wrong answer.

pub mod check;
pub mod diff;
pub mod error;
pub mod geometry;
pub mod kept;
pub mod mend;
pub mod node;
pub mod pull;
pub mod reader;
pub mod root;
pub mod scan;
pub mod scrub;
pub mod serve;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod walk;
pub mod work;
pub mod writer;
