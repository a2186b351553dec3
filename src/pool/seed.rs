//! Seeds: work trees that are filled before their source has published anything (R19).
//!
//! Called by the hub, which fills one from a file that came by another way than the link
//! (`hub::seed`). It is kept as every work tree is, under a random id instead of a source's, and its row
//! says for which volume it is. When the source comes, its seeds become its work tree in one commit
//! ([`Catalog::adopt_seeds`]); nothing is copied. From then on it is what a pass that was cut has left:
//! the pass compares it with the source's CP, so nothing in it is believed, and a CP is published only
//! with equal roots.
//!
//! Table `seeds`: the key is the seed's id (16 bytes). The row, sealed as all rows of the catalog are:
//! whether it was filled to its end (1), the number of blocks that only it has (8), its root as in a
//! volume's row, the name of the source, the name of the volume, when it was kept last in seconds since
//! 1970 (8); a row of before lacks that. A pool that is opened by a version that does not know the table
//! has lost these blocks until a newer one opens it again, and nothing else.

use std::sync::Arc;

use crate::units::ids::SourceId;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{CpNumber, Epoch, VolumeNumber};

use super::State;
use super::catalog::Catalog;
use super::error::PoolError;
use super::mirror::{Mirror, Staged};
use super::pointer::{TREE_ROOT_BYTES, TreeRoot, VolumeKey};
use super::publish::Change;
use super::rows::{put_text, read, seal};
use super::work::WorkRow;
use super::write_set::WriteSet;

/// The CP that everything in a seed is born in: none that a source has can be older.
pub const SEED_CP: CpNumber = CpNumber(1);
/// The number of the only volume of a seed; its source will say which it has there.
const VOLUME: VolumeNumber = VolumeNumber(0);

/// Which volume a seed is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// Its source.
    pub source: SourceName,
    /// Its name there.
    pub volume: VolumeName,
    /// All of the file is in it.
    pub finished: bool,
    /// When something came to it last, in seconds since 1970; none if nobody has noted that.
    pub taken_at: Option<i64>,
}

/// Under which key the tree of a seed is built.
pub fn seed_key(id: SourceId) -> VolumeKey {
    VolumeKey { source: id, volume: VOLUME }
}

impl WorkRow {
    /// Table of seeds in the catalog.
    pub(super) const SEEDS: &'static str = "seeds";

    /// The table it stands in.
    pub(super) fn is_seed(&self) -> bool {
        self.seed.is_some()
    }

    pub(super) fn encode_seed(&self, seed: &Seed) -> Vec<u8> {
        let mut bytes = vec![u8::from(seed.finished)];
        bytes.extend(self.blocks.to_le_bytes());
        assert!(self.trees.len() == 1, "a seed has one tree");
        self.trees.iter().for_each(|(_, tree)| bytes.extend(tree.encode()));
        put_text(&mut bytes, seed.source.as_str());
        put_text(&mut bytes, seed.volume.as_str());
        bytes.extend(seed.taken_at.into_iter().flat_map(i64::to_le_bytes));
        seal(Self::SEEDS, &self.source.0, &bytes)
    }

    pub(super) fn decode_seed(key: &[u8; 16], bytes: &[u8]) -> Result<Self, PoolError> {
        read(Self::SEEDS, key, bytes, |mut fields| {
            let finished = match fields.array::<1>()? {
                [0] => false,
                [1] => true,
                [other] => return Err(format!("{other} says neither yes nor no").into()),
            };
            let blocks = fields.u64()?;
            let tree = TreeRoot::decode(&fields.array::<TREE_ROOT_BYTES>()?)?;
            let (source, volume) = (fields.text()?.parse()?, fields.text()?.parse()?);
            let taken_at = fields.more().then(|| fields.array().map(i64::from_le_bytes));
            let taken_at = taken_at.transpose()?;
            fields.end(Self {
                source: SourceId(*key),
                base: CpNumber(0),
                cp: SEED_CP,
                blocks,
                trees: vec![(VOLUME, tree)],
                seed: Some(Seed { source, volume, finished, taken_at }),
            })
        })
    }
}

/// Seeds that become the work tree of their source.
#[derive(Debug)]
pub(super) struct AdoptOrder {
    pub(super) source: SourceId,
    /// Each with the number that the source has for its volume.
    pub(super) seeds: Vec<(SourceId, VolumeNumber)>,
}

impl Catalog<'_> {
    /// All seeds.
    pub fn seeds(&self) -> Result<Vec<Arc<WorkRow>>, PoolError> {
        let state = self.pool().lock()?;
        Ok(state.mirror.all_works().filter(|row| row.is_seed()).cloned().collect())
    }

    /// Seeds become the work tree of their source, which has published nothing and has none. Refused
    /// while somebody fills one of them, or if a volume is not as its seed is.
    pub fn adopt_seeds(
        &self,
        source: SourceId,
        seeds: Vec<(SourceId, VolumeNumber)>,
    ) -> Result<(), PoolError> {
        self.change(Change::AdoptSeeds(AdoptOrder { source, seeds }))
    }
}

impl WriteSet {
    /// Keeps the tree of a seed as it is; durable when this returns. Refused if it has more than it may.
    pub fn keep_seed(&mut self, id: SourceId, seed: Seed, tree: TreeRoot) -> Result<(), PoolError> {
        self.flush_buffer()?;
        assert!(self.is_finished(), "half a tree is not kept");
        if let Some(bound) = self.bound_of() {
            bound.refuse(self.blocks().0)?;
        }
        let (base, trees) = (CpNumber(0), vec![(VOLUME, tree)]);
        let row = WorkRow { source: id, base, cp: SEED_CP, blocks: 0, trees, seed: Some(seed) };
        self.keep_row(row, Epoch::default())
    }
}

impl AdoptOrder {
    /// Enters it into the batch.
    pub(super) fn stage(
        self,
        state: &State,
        staged: &mut Staged,
        max_bytes: u64,
    ) -> Result<(), PoolError> {
        let mirror = &state.mirror;
        if staged.work(mirror, self.source).is_some() {
            return Err(PoolError::WorkKept { source_id: self.source });
        }
        let base = staged.source(mirror, self.source)?.applied;
        if base != CpNumber(0) {
            return Err(PoolError::CpNotNewer { cp: SEED_CP, applied: base });
        }
        let mut row = WorkRow {
            source: self.source,
            base,
            cp: SEED_CP,
            blocks: 0,
            trees: vec![],
            seed: None,
        };
        for &(id, volume) in &self.seeds {
            if state.works_open.contains(&id) {
                return Err(PoolError::WorkKept { source_id: id });
            }
            let tree = self.tree_of(mirror, staged, id, volume)?;
            row.trees.push((volume, tree.1));
            row.blocks += tree.0;
        }
        row.trees.sort_by_key(|(volume, _)| *volume);
        row.trees.dedup_by_key(|(volume, _)| *volume);
        if row.trees.len() != self.seeds.len() {
            let what = "two seeds of one volume".to_owned();
            return Err(PoolError::Inconsistent { what });
        }
        staged.keep_work(mirror, row, max_bytes)?;
        staged.works.extend(self.seeds.into_iter().map(|(id, _)| (id, None)));
        Ok(())
    }

    /// A seed's blocks and tree, which is one that the volume can have.
    fn tree_of(
        &self,
        mirror: &Mirror,
        staged: &Staged,
        id: SourceId,
        volume: VolumeNumber,
    ) -> Result<(u64, TreeRoot), PoolError> {
        let seed = staged.work(mirror, id).filter(|row| row.is_seed());
        let seed = seed.ok_or(PoolError::UnknownSource { source_id: id })?;
        let row = staged.volume(mirror, VolumeKey { source: self.source, volume })?;
        let tree = seed.trees.first().map(|(_, tree)| *tree);
        match tree.filter(|tree| tree.size == row.tree.size && row.tree.top.is_hole()) {
            Some(tree) => Ok((seed.blocks, tree)),
            None => {
                let what = format!("seed of volume {} of {}", row.name, self.source);
                Err(PoolError::RowRefused { what, why: "the volume is not as its seed is" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::pointer::Pointer;
    use crate::units::hash::ContentHash;
    use crate::units::numbers::{ByteCount, Pbn};

    #[test]
    fn golden_bytes_and_no_flipped_bit_passes() {
        let top = Pointer { pbn: Pbn(1), birth: SEED_CP, crc: 3, hash: ContentHash([4; 16]) };
        let tree = TreeRoot { size: ByteCount(4096), top };
        let seed = Seed {
            source: "filer-a".parse().unwrap(),
            volume: "vol0".parse().unwrap(),
            finished: true,
            taken_at: Some(0x0102),
        };
        let (source, trees) = (SourceId([1; 16]), vec![(VOLUME, tree)]);
        let row =
            WorkRow { source, base: CpNumber(0), cp: SEED_CP, blocks: 7, trees, seed: Some(seed) };
        let mut expected = vec![1, 7, 0, 0, 0, 0, 0, 0, 0];
        expected.extend(tree.encode());
        expected.extend(b"\x07filer-a\x04vol0");
        // As it was written before there was a time in it.
        let older = seal(WorkRow::SEEDS, &source.0, &expected);
        let met = WorkRow::decode_seed(&source.0, &older).unwrap().seed.unwrap();
        assert_eq!((met.finished, met.taken_at), (true, None));
        expected.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        let bytes = row.encode();
        assert_eq!(bytes[8..], expected);
        assert_eq!(WorkRow::decode_seed(&source.0, &bytes).unwrap(), row);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(WorkRow::decode_seed(&source.0, &bytes).is_err(), "bit {bit}");
        }
        assert!(WorkRow::decode_seed(&[2; 16], &bytes).is_err(), "another id");
        assert!(WorkRow::decode(&source.0, &bytes).is_err(), "as another table's");
    }
}
