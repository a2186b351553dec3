//! The rows of kept CPs in the catalog, as structs and as bytes.
//!
//! Sealed as all rows of the catalog are. Table `kept`: the key is the source's id (16 bytes) and
//! the name; the row holds CP, sequence, stream hash, the time it was kept (seconds since 1970)
//! and, for each volume the source had, its number, id, name and tree. Table `kept_blocks`: the key
//! is the source's id and the CP number; the row is the length of that CP's deadlist (8 bytes): the
//! blocks that newer CPs have freed and that no newer kept CP has. A length of 0 has no row. Which
//! blocks they are is stored nowhere but in the trees themselves: see `kept`.
//!
//! Pure. Bytes that do not decode whole are [`PoolError::CatalogCorrupt`].

use crate::limits::{KEPT_PER_SOURCE_MAX, VOLUMES_PER_SOURCE_MAX};
use crate::units::convert::to_u64;
use crate::units::hash::StreamHash;
use crate::units::ids::{SourceId, VolumeId};
use crate::units::machine;
use crate::units::names::{KeptName, VolumeName};
use crate::units::numbers::{CpNumber, SequenceNumber, VolumeNumber};

use super::error::PoolError;
use super::pointer::{TREE_ROOT_BYTES, TreeRoot, VolumeKey, keyed};
use super::rows::{SourceRow, VolumeRow, corrupt, put_count, put_text, read, seal, unseal};

const SOURCE_BYTES: usize = 16;

/// A volume as a kept CP has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptVolume {
    /// Its number.
    pub number: VolumeNumber,
    /// Its id: a later volume may have the same number.
    pub id: VolumeId,
    /// Its name at that time.
    pub name: VolumeName,
    /// Size and tree.
    pub tree: TreeRoot,
}

/// A CP of a source, kept by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptRow {
    /// Whose: part of the key.
    pub source: SourceId,
    /// Its name: part of the key.
    pub name: KeptName,
    /// Its number. Several names may keep one CP.
    pub cp: CpNumber,
    /// The last entry it holds.
    pub sequence: SequenceNumber,
    /// Stream hash there.
    pub stream_hash: StreamHash,
    /// When it was kept, in seconds since 1970.
    pub kept_at: i64,
    /// All volumes of the source at that CP, by number.
    pub volumes: Vec<KeptVolume>,
}

impl KeptRow {
    /// Table of the catalog.
    pub(super) const TABLE: &'static str = "kept";

    /// The published CP of a source, to be kept under a name.
    pub(super) fn of<'a>(
        source: &SourceRow,
        volumes: impl Iterator<Item = &'a VolumeRow>,
        name: KeptName,
    ) -> Self {
        let volume = |row: &VolumeRow| KeptVolume {
            number: row.key.volume,
            id: row.id,
            name: row.name.clone(),
            tree: row.tree,
        };
        Self {
            source: source.id,
            name,
            cp: source.applied,
            sequence: source.sequence,
            stream_hash: source.stream_hash,
            kept_at: machine::unix_seconds(),
            volumes: volumes.map(volume).collect(),
        }
    }

    /// What is kept of one volume.
    pub fn volume(&self, number: VolumeNumber) -> Option<&KeptVolume> {
        self.volumes.iter().find(|volume| volume.number == number)
    }

    /// The trees it keeps.
    pub fn trees(&self) -> impl Iterator<Item = (VolumeKey, CpNumber, TreeRoot)> + '_ {
        let key = |volume| VolumeKey { source: self.source, volume };
        self.volumes.iter().map(move |volume| (key(volume.number), self.cp, volume.tree))
    }

    pub(super) fn key(&self) -> Vec<u8> {
        Self::key_of(self.source, &self.name)
    }

    pub(super) fn key_of(source: SourceId, name: &KeptName) -> Vec<u8> {
        [&source.0, name.as_str().as_bytes()].concat()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.cp.0.to_le_bytes().to_vec();
        bytes.extend(self.sequence.0.to_le_bytes());
        bytes.extend(self.stream_hash.0);
        bytes.extend(self.kept_at.to_le_bytes());
        put_count(&mut bytes, self.volumes.len());
        for volume in &self.volumes {
            bytes.extend(volume.number.0.to_le_bytes());
            bytes.extend(volume.id.0);
            put_text(&mut bytes, volume.name.as_str());
            bytes.extend(volume.tree.encode());
        }
        seal(Self::TABLE, &self.key(), &bytes)
    }

    pub(super) fn decode(key: &[u8], bytes: &[u8]) -> Result<Self, PoolError> {
        read(Self::TABLE, key, bytes, |mut fields| {
            let (source, name) = key.split_first_chunk::<SOURCE_BYTES>().ok_or("no source")?;
            let mut row = Self {
                source: SourceId(*source),
                name: std::str::from_utf8(name)?.parse()?,
                cp: CpNumber(fields.u32()?),
                sequence: SequenceNumber(fields.u64()?),
                stream_hash: StreamHash(fields.array()?),
                kept_at: i64::from_le_bytes(fields.array()?),
                volumes: Vec::new(),
            };
            for _ in 0..fields.u16()? {
                row.volumes.push(KeptVolume {
                    number: VolumeNumber(fields.u32()?),
                    id: VolumeId(fields.array()?),
                    name: fields.text()?.parse()?,
                    tree: TreeRoot::decode(&fields.array::<TREE_ROOT_BYTES>()?)?,
                });
            }
            if row.volumes.len() > VOLUMES_PER_SOURCE_MAX {
                return Err("more volumes than a source has".into());
            }
            fields.end(row)
        })
    }

    /// Bytes of the stored row, key and all.
    pub(super) fn stored_bytes(&self) -> u64 {
        to_u64(self.encode().len() + self.key().len())
    }

    /// Refuses one more name of a source when there are too many.
    pub(super) fn refuse_more(met: usize) -> Result<(), PoolError> {
        let (met, max) = (to_u64(met) + 1, to_u64(KEPT_PER_SOURCE_MAX));
        if met > max {
            return Err(PoolError::Limit { what: "kept CPs of a source", met, max });
        }
        Ok(())
    }
}

/// The length of a kept CP's deadlist.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeptBlocks;

impl KeptBlocks {
    /// Table of the catalog.
    pub(super) const TABLE: &'static str = "kept_blocks";

    pub(super) fn key(source: SourceId, cp: CpNumber) -> [u8; 20] {
        keyed(&source.0, cp.0)
    }

    pub(super) fn encode(source: SourceId, cp: CpNumber, blocks: u64) -> Vec<u8> {
        seal(Self::TABLE, &Self::key(source, cp), &blocks.to_le_bytes())
    }

    pub(super) fn decode(key: &[u8; 20], bytes: &[u8]) -> Result<u64, PoolError> {
        let payload = unseal(Self::TABLE, key, bytes)?;
        let blocks: [u8; 8] = payload
            .try_into()
            .map_err(|_| corrupt(Self::TABLE, key, "it is no count of blocks".into()))?;
        Ok(u64::from_le_bytes(blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::pointer::Pointer;
    use crate::units::hash::ContentHash;
    use crate::units::numbers::{ByteCount, Pbn};

    fn row() -> KeptRow {
        let top = Pointer { pbn: Pbn(1), birth: CpNumber(2), crc: 3, hash: ContentHash([4; 16]) };
        let volume = |number: u8| KeptVolume {
            number: VolumeNumber(u32::from(number)),
            id: VolumeId([number; 16]),
            name: format!("vol{number}").parse().unwrap(),
            tree: TreeRoot { size: ByteCount(4096), top },
        };
        KeptRow {
            source: SourceId([1; 16]),
            name: "monday".parse().unwrap(),
            cp: CpNumber(6),
            sequence: SequenceNumber(7),
            stream_hash: StreamHash([8; 16]),
            kept_at: 9,
            volumes: vec![volume(1), volume(2)],
        }
    }

    #[test]
    fn golden_bytes() {
        let row = row();
        let mut expected = vec![6, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([8; 16]);
        expected.extend([9, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([2, 0, 1, 0, 0, 0]);
        expected.extend([1; 16]);
        expected.extend([4, b'v', b'o', b'l', b'1']);
        expected.extend(row.volumes[0].tree.encode());
        let bytes = row.encode();
        assert_eq!(bytes[..4], [1, 0, 0, 0]);
        assert_eq!(bytes[8..][..expected.len()], expected);
        assert_eq!(row.key(), [&[1; 16][..], b"monday"].concat());
        let blocks = KeptBlocks::encode(row.source, row.cp, 513);
        assert_eq!(blocks[8..], [1, 2, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn rows_survive_and_any_flipped_bit_or_wrong_key_is_met() {
        let row = row();
        let bytes = row.encode();
        assert_eq!(KeptRow::decode(&row.key(), &bytes).unwrap(), row);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(KeptRow::decode(&row.key(), &bytes).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(KeptRow::decode(&row.key(), &bytes[..length]).is_err(), "length {length}");
        }
        let other = KeptRow { name: "tuesday".parse().unwrap(), ..row.clone() };
        assert!(KeptRow::decode(&other.key(), &bytes).is_err());

        let key = KeptBlocks::key(row.source, row.cp);
        let bytes = KeptBlocks::encode(row.source, row.cp, 9);
        assert_eq!(KeptBlocks::decode(&key, &bytes).unwrap(), 9);
        assert!(KeptBlocks::decode(&KeptBlocks::key(row.source, CpNumber(7)), &bytes).is_err());
        assert!(KeptBlocks::decode(&key, &bytes[..15]).is_err());
    }

    /// A well sealed row under a key that names nothing is refused, too.
    #[test]
    fn a_bad_name_in_a_key_is_refused() {
        let payload = row().encode()[8..].to_vec();
        for name in ["", "../x"] {
            let key = [&[1; 16][..], name.as_bytes()].concat();
            let bytes = seal(KeptRow::TABLE, &key, &payload);
            assert!(KeptRow::decode(&key, &bytes).is_err(), "{name:?}");
        }
    }
}
