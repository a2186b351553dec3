//! Reads a whole volume and computes its root anew, from the data alone: what `verify` compares.
//!
//! Nothing of the tree's stored hashes is believed: each data block is read from the device,
//! checked against its checksum and its content hash, and hashed into a fresh root. Memory goes by
//! the height of the tree and one run of blocks.

use crate::limits::POOL_LEASE_BLOCKS;
use crate::pool::Pool;
use crate::pool::pointer::{Pointer, TreeRoot};
use crate::units::BLOCK_BYTES;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::Root;

use super::error::VolumeError;
use super::root::{RootHasher, leaf_hash};
use super::walk::{Item, Walk};

/// Words kept of what is wrong.
const PROBLEMS_MAX: usize = 100;

/// What reading a volume gave.
#[derive(Debug, Clone, Default)]
pub struct Scanned {
    /// Root of the data that was read; none if any block could not be.
    pub root: Option<Root>,
    /// Data blocks read.
    pub blocks_read: u64,
    /// Blocks that could not be read or failed a check.
    pub bad_blocks: u64,
    /// The first of them in words.
    pub problems: Vec<String>,
}

impl Scanned {
    fn bad(&mut self, blocks: u64, what: &dyn std::fmt::Display) {
        self.bad_blocks += blocks;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(what.to_string());
        }
    }
}

/// Reads every block that `tree` reaches. `progress` is told the blocks passed so far.
///
/// # Errors
/// Only if the tree cannot be walked at all; bad blocks are counted in the result.
pub fn scan(
    pool: &Pool,
    tree: &TreeRoot,
    mut progress: impl FnMut(u64),
) -> Result<Scanned, VolumeError> {
    let mut scanned = Scanned::default();
    let mut hasher = match RootHasher::new(tree.size) {
        Ok(hasher) => hasher,
        Err(error) => {
            scanned.bad(tree.size.blocks().0, &error);
            return Ok(scanned);
        }
    };
    let mut run: Vec<Pointer> = Vec::new();
    for item in Walk::new(pool, tree)? {
        let item = match item {
            Ok(item) => item,
            Err(error) => {
                scanned.bad(1, &error);
                continue;
            }
        };
        let full = to_u64(run.len()) == POOL_LEASE_BLOCKS;
        if full || !follows(&run, &item) {
            read_run(pool, &mut run, &mut hasher, &mut scanned);
        }
        if item.pointer.is_hole() {
            hasher.push_holes(item.count);
        } else {
            run.push(item.pointer);
        }
        progress(item.vbn.0 + item.count);
    }
    read_run(pool, &mut run, &mut hasher, &mut scanned);
    if scanned.bad_blocks == 0 {
        scanned.root = Some(hasher.finish());
    }
    Ok(scanned)
}

fn follows(run: &[Pointer], item: &Item) -> bool {
    let next = |last: &Pointer| last.pbn.0 + 1;
    !item.pointer.is_hole() && run.last().is_none_or(|last| next(last) == item.pointer.pbn.0)
}

fn read_run(pool: &Pool, run: &mut Vec<Pointer>, hasher: &mut RootHasher, scanned: &mut Scanned) {
    let Some(first) = run.first() else { return };
    let crcs: Vec<u32> = run.iter().map(|pointer| pointer.crc).collect();
    let mut bytes = vec![0; to_usize(to_u64(crcs.len())) * BLOCK_BYTES];
    if let Err(error) = pool.read_run(first.pbn, &crcs, &mut bytes) {
        scanned.bad(to_u64(crcs.len()), &error);
        run.clear();
        return;
    }
    for (pointer, block) in run.iter().zip(bytes.as_chunks::<BLOCK_BYTES>().0) {
        let hash = leaf_hash(block);
        if hash != pointer.hash {
            let pbn = pointer.pbn;
            scanned.bad(1, &format!("block {pbn} has content {hash}, wanted {}", pointer.hash));
        }
        scanned.blocks_read += 1;
        hasher.push(hash);
    }
    run.clear();
}
