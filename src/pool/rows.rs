//! The rows of the catalog, as structs and as bytes.
//!
//! A stored row is a header of 8 bytes (format version 1, three zero bytes, CRC-32C) and the
//! payload, little-endian, fields in the order of the structs; a name or extension is a length
//! and its bytes. The checksum covers table, key, the first four header bytes and payload, so
//! that neither a flipped bit nor a row under a wrong key is ever believed (`redb` checks its
//! own pages only when it repairs). A volume that grows has one field more, its new size.
//!
//! Pure. Bytes that do not decode whole are [`PoolError::CatalogCorrupt`].

use std::fmt;

use crate::limits::{SOURCE_EXTENSION_BYTES_MAX, VOLUME_BYTES_MAX, VOLUMES_PER_SOURCE_MAX};
use crate::record::marks::Place;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::{Root, StreamHash, crc32c_parts};
use crate::units::ids::{SourceId, VolumeId};
use crate::units::names::{NAME_BYTES_MAX, SourceName, VolumeName};
use crate::units::numbers::{ByteCount, CpNumber, Epoch, Generation, SequenceNumber, VolumeNumber};

use super::error::PoolError;
use super::pointer::{TREE_ROOT_BYTES, TreeRoot, VolumeKey, keyed, unkeyed};

const ROW_VERSION: u8 = 1;
const HEADER_BYTES: usize = 8;

const _: () = {
    assert!(NAME_BYTES_MAX <= 255, "a name's length is one byte");
    assert!(SOURCE_EXTENSION_BYTES_MAX <= 65_535, "an extension's length is two bytes");
    assert!(VOLUMES_PER_SOURCE_MAX <= 65_535, "a count of volumes is two bytes");
};

/// A source as this pool knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRow {
    /// Its id: the key.
    pub id: SourceId,
    /// Its name, for people.
    pub name: SourceName,
    /// Who is primary: commits of another epoch are refused (R2).
    pub epoch: Epoch,
    /// The last boot known.
    pub generation: Generation,
    /// The published CP; 0 before the first. Written by `publish` only.
    pub applied: CpNumber,
    /// The last entry that `applied` holds. Written by `publish` only.
    pub sequence: SequenceNumber,
    /// Stream hash at `sequence`. Written by `publish` only.
    pub stream_hash: StreamHash,
    /// The highest CP number or birth that either end ever used (R6).
    pub highest_cp: CpNumber,
    /// What the modules above keep here, opaque; at most `SOURCE_EXTENSION_BYTES_MAX`.
    pub extension: Vec<u8>,
}

impl SourceRow {
    /// A source that has published nothing.
    pub fn new(id: SourceId, name: SourceName) -> Self {
        Self {
            id,
            name,
            epoch: Epoch::default(),
            generation: Generation::default(),
            applied: CpNumber(0),
            sequence: SequenceNumber(0),
            stream_hash: StreamHash::ZERO,
            highest_cp: CpNumber(0),
            extension: Vec::new(),
        }
    }
}

/// A volume as this pool knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRow {
    /// Source and number: the key.
    pub key: VolumeKey,
    /// Its id.
    pub id: VolumeId,
    /// Its name within the source.
    pub name: VolumeName,
    /// Size and published tree. The tree is written by `publish` only.
    pub tree: TreeRoot,
    /// The size that its next tree may have, if that is a larger one.
    pub grows_to: Option<ByteCount>,
}

/// One published CP, for R5.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryRow {
    /// Its number: the key, with the source.
    pub cp: CpNumber,
    /// The last entry it holds.
    pub sequence: SequenceNumber,
    /// Stream hash there.
    pub stream_hash: StreamHash,
    /// The roots of all volumes of the source at that CP, by number.
    pub roots: Vec<(VolumeNumber, Root)>,
}

/// Puts header and checksum before a payload.
pub(super) fn seal(table: &str, key: &[u8], payload: &[u8]) -> Vec<u8> {
    let front = [ROW_VERSION, 0, 0, 0];
    let crc = crc32c_parts(&[table.as_bytes(), key, &front, payload]);
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend(front);
    bytes.extend(crc.to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Checks and takes off what [`seal`] put there.
pub(super) fn unseal<'a>(
    table: &'static str,
    key: &[u8],
    bytes: &'a [u8],
) -> Result<&'a [u8], PoolError> {
    let corrupt = |what| corrupt(table, key, what);
    let Some((front, rest)) = bytes.split_first_chunk::<4>() else {
        return Err(corrupt("row is shorter than its header".to_string()));
    };
    let Some((stored, payload)) = rest.split_first_chunk::<4>() else {
        return Err(corrupt("row is shorter than its header".to_string()));
    };
    let (wanted, met) =
        (u32::from_le_bytes(*stored), crc32c_parts(&[table.as_bytes(), key, front, payload]));
    if wanted != met {
        return Err(corrupt(format!("wanted checksum {wanted:08x}, met {met:08x}")));
    }
    if front[0] != ROW_VERSION {
        let what = format!("{table} row {}", shown(key));
        let (met, known) = (front[0].into(), ROW_VERSION.into());
        return Err(PoolError::CatalogVersion { what, met, known });
    }
    if front[1..] != [0; 3] {
        return Err(corrupt("reserved bytes are not zero".to_string()));
    }
    Ok(payload)
}

/// An error about a row.
pub(super) fn corrupt(table: &'static str, key: &[u8], what: String) -> PoolError {
    PoolError::CatalogCorrupt { table, key: shown(key), what }
}

fn shown(key: &[u8]) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Why a payload did not decode.
pub(super) struct Bad(String);

impl<E: fmt::Display> From<E> for Bad {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// Takes fields off the front of a payload.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Bad> {
        let (part, rest) = self.0.split_at_checked(count).ok_or("row is too short")?;
        self.0 = rest;
        Ok(part)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Bad> {
        let (part, rest) = self.0.split_first_chunk::<N>().ok_or("row is too short")?;
        self.0 = rest;
        Ok(*part)
    }

    fn byte(&mut self) -> Result<u8, Bad> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Bad> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Bad> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Bad> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, Bad> {
        let length = usize::from(self.byte()?);
        Ok(std::str::from_utf8(self.bytes(length)?)?)
    }

    /// Whether anything is left.
    pub(super) fn more(&self) -> bool {
        !self.0.is_empty()
    }

    pub(super) fn end<T>(self, row: T) -> Result<T, Bad> {
        if self.0.is_empty() {
            Ok(row)
        } else {
            Err(Bad(format!("{} bytes too many", self.0.len())))
        }
    }
}

pub(super) fn put_text(bytes: &mut Vec<u8>, text: &str) {
    // A name has at most 63 bytes, so its length is the first of the eight.
    let [length, ..] = to_u64(text.len()).to_le_bytes();
    bytes.push(length);
    bytes.extend(text.as_bytes());
}

pub(super) fn put_count(bytes: &mut Vec<u8>, count: usize) {
    let [low, high, ..] = to_u64(count).to_le_bytes();
    bytes.extend([low, high]);
}

pub(super) fn read<T>(
    table: &'static str,
    key: &[u8],
    bytes: &[u8],
    fields: impl FnOnce(Fields<'_>) -> Result<T, Bad>,
) -> Result<T, PoolError> {
    let payload = unseal(table, key, bytes)?;
    fields(Fields(payload)).map_err(|Bad(what)| corrupt(table, key, what))
}

impl SourceRow {
    /// Table of the catalog.
    pub(super) const TABLE: &'static str = "sources";

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_text(&mut bytes, self.name.as_str());
        bytes.extend(self.epoch.number.to_le_bytes());
        bytes.extend(self.epoch.id.to_le_bytes());
        bytes.extend(self.generation.number.to_le_bytes());
        bytes.extend(self.generation.id.to_le_bytes());
        bytes.extend(self.applied.0.to_le_bytes());
        bytes.extend(self.sequence.0.to_le_bytes());
        bytes.extend(self.stream_hash.0);
        bytes.extend(self.highest_cp.0.to_le_bytes());
        put_count(&mut bytes, self.extension.len());
        bytes.extend(&self.extension);
        seal(Self::TABLE, &self.id.0, &bytes)
    }

    pub(super) fn decode(key: &[u8; 16], bytes: &[u8]) -> Result<Self, PoolError> {
        read(Self::TABLE, key, bytes, |mut fields| {
            let row = Self {
                id: SourceId(*key),
                name: fields.text()?.parse()?,
                epoch: Epoch { number: fields.u32()?, id: fields.u64()? },
                generation: Generation { number: fields.u32()?, id: fields.u64()? },
                applied: CpNumber(fields.u32()?),
                sequence: SequenceNumber(fields.u64()?),
                stream_hash: StreamHash(fields.array()?),
                highest_cp: CpNumber(fields.u32()?),
                extension: {
                    let length = usize::from(fields.u16()?);
                    fields.bytes(length)?.to_vec()
                },
            };
            fields.end(row)
        })
    }
}

impl VolumeRow {
    /// Table of the catalog.
    pub(super) const TABLE: &'static str = "volumes";

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.id.0.to_vec();
        put_text(&mut bytes, self.name.as_str());
        bytes.extend(self.tree.encode());
        // Behind everything else, and only as long as it grows.
        if let Some(size) = self.grows_to {
            bytes.extend(size.0.to_le_bytes());
        }
        seal(Self::TABLE, &self.key.encode(), &bytes)
    }

    pub(super) fn decode(key: &[u8; 20], bytes: &[u8]) -> Result<Self, PoolError> {
        read(Self::TABLE, key, bytes, |mut fields| {
            let (source, volume) = unkeyed(key);
            let row = Self {
                key: VolumeKey { source: SourceId(source), volume: VolumeNumber(volume) },
                id: VolumeId(fields.array()?),
                name: fields.text()?.parse()?,
                tree: TreeRoot::decode(&fields.array::<TREE_ROOT_BYTES>()?)?,
                grows_to: fields.more().then(|| fields.u64().map(ByteCount)).transpose()?,
            };
            if row.grows_to.is_some_and(|size| !row.may_grow_to(size)) {
                return Err(Bad("it grows to what is not larger".to_owned()));
            }
            fields.end(row)
        })
    }

    /// Its size: the one that was announced, also before a tree has it.
    pub fn size(&self) -> ByteCount {
        self.grows_to.unwrap_or(self.tree.size)
    }

    /// Whether a volume can have that size, and it is a larger one than its tree has.
    pub(super) fn may_grow_to(&self, size: ByteCount) -> bool {
        size > self.tree.size && size.is_whole_blocks() && size.0 <= VOLUME_BYTES_MAX
    }
}

impl HistoryRow {
    /// Whether the CP is at that place: the same sequence number with the same past.
    pub fn is_at(&self, place: Place) -> bool {
        (self.sequence, self.stream_hash) == (place.sequence, place.hash)
    }

    /// Table of the catalog.
    pub(super) const TABLE: &'static str = "history";

    pub(super) fn key(source: SourceId, cp: CpNumber) -> [u8; 20] {
        keyed(&source.0, cp.0)
    }

    pub(super) fn encode(&self, source: SourceId) -> Vec<u8> {
        let mut bytes = self.sequence.0.to_le_bytes().to_vec();
        bytes.extend(self.stream_hash.0);
        put_count(&mut bytes, self.roots.len());
        for (volume, root) in &self.roots {
            bytes.extend(volume.0.to_le_bytes());
            bytes.extend(root.0);
        }
        seal(Self::TABLE, &Self::key(source, self.cp), &bytes)
    }

    pub(super) fn decode(key: &[u8; 20], bytes: &[u8]) -> Result<Self, PoolError> {
        read(Self::TABLE, key, bytes, |mut fields| {
            let (_, cp) = unkeyed(key);
            let sequence = SequenceNumber(fields.u64()?);
            let stream_hash = StreamHash(fields.array()?);
            let count = fields.u16()?;
            let mut roots = Vec::new();
            for _ in 0..count {
                roots.push((VolumeNumber(fields.u32()?), Root(fields.array()?)));
            }
            fields.end(Self { cp: CpNumber(cp), sequence, stream_hash, roots })
        })
    }

    /// Bytes of a stored row with that many volumes, key and all.
    pub(super) fn stored_bytes(volumes: usize) -> u64 {
        to_u64(20 + HEADER_BYTES + 8 + 16 + 2) + 36 * to_u64(volumes)
    }
}

/// Checks the parts of a row that have bounds of their own.
pub(super) fn check_extension(row: &SourceRow) -> Result<(), PoolError> {
    let (met, max) = (to_u64(row.extension.len()), to_u64(SOURCE_EXTENSION_BYTES_MAX));
    if met > max {
        return Err(PoolError::Limit { what: "bytes of a source's extension", met, max });
    }
    Ok(())
}

/// Bytes of a row in the catalog, for its budget.
pub(super) fn stored(bytes: &[u8]) -> u64 {
    to_u64(bytes.len()) + 20
}

/// How many history rows of that size a budget holds.
pub(super) fn history_rows(budget_bytes: u64, volumes: usize, wanted: u64) -> usize {
    to_usize((budget_bytes / HistoryRow::stored_bytes(volumes)).clamp(1, wanted.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::pointer::Pointer;
    use crate::units::hash::ContentHash;
    use crate::units::numbers::Pbn;

    fn source() -> SourceRow {
        SourceRow {
            id: SourceId([1; 16]),
            name: "filer-a".parse().unwrap(),
            epoch: Epoch { number: 2, id: 3 },
            generation: Generation { number: 4, id: 5 },
            applied: CpNumber(6),
            sequence: SequenceNumber(7),
            stream_hash: StreamHash([8; 16]),
            highest_cp: CpNumber(9),
            extension: vec![10, 11],
        }
    }

    /// Control: the same byte without its checksum is damage.
    #[test]
    fn a_row_of_another_version_is_named() {
        let mut row = seal("notes", b"k", b"text");
        row[0] = 2;
        let damaged = unseal("notes", b"k", &row).unwrap_err();
        assert!(matches!(damaged, PoolError::CatalogCorrupt { .. }), "{damaged}");
        let crc = crc32c_parts(&[b"notes", b"k", &[2, 0, 0, 0], b"text"]);
        row[4..8].copy_from_slice(&crc.to_le_bytes());
        let met = unseal("notes", b"k", &row).unwrap_err().to_string();
        assert_eq!(met, "catalog: notes row 6b has format version 2, this program knows 1");
    }

    fn volume() -> VolumeRow {
        let top = Pointer { pbn: Pbn(1), birth: CpNumber(2), crc: 3, hash: ContentHash([4; 16]) };
        VolumeRow {
            key: VolumeKey { source: SourceId([1; 16]), volume: VolumeNumber(0x0102) },
            id: VolumeId([5; 16]),
            name: "vol0".parse().unwrap(),
            tree: TreeRoot { size: ByteCount(4096), top },
            grows_to: None,
        }
    }

    fn history() -> HistoryRow {
        HistoryRow {
            cp: CpNumber(3),
            sequence: SequenceNumber(4),
            stream_hash: StreamHash([5; 16]),
            roots: vec![(VolumeNumber(1), Root([6; 32])), (VolumeNumber(2), Root([7; 32]))],
        }
    }

    #[test]
    fn golden_bytes() {
        let mut expected = vec![7];
        expected.extend(b"filer-a");
        expected.extend([2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([6, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([8; 16]);
        expected.extend([9, 0, 0, 0, 2, 0, 10, 11]);
        let bytes = source().encode();
        assert_eq!(bytes[..4], [1, 0, 0, 0]);
        assert_eq!(bytes[8..], expected);

        let mut expected = vec![5; 16];
        expected.push(4);
        expected.extend(b"vol0");
        expected.extend(volume().tree.encode());
        assert_eq!(volume().encode()[8..], expected);
        expected.extend([0, 0x20, 0, 0, 0, 0, 0, 0]);
        let grows = VolumeRow { grows_to: Some(ByteCount(8192)), ..volume() };
        assert_eq!(grows.encode()[8..], expected);
        assert_eq!(VolumeRow::decode(&grows.key.encode(), &grows.encode()).unwrap(), grows);
        let shrinks = VolumeRow { grows_to: Some(ByteCount(4096)), ..volume() };
        assert!(VolumeRow::decode(&shrinks.key.encode(), &shrinks.encode()).is_err());

        let bytes = history().encode(SourceId([1; 16]));
        assert_eq!(bytes[8..16], [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[32..38], [2, 0, 1, 0, 0, 0]);
        assert_eq!(to_u64(bytes.len()) + 20, HistoryRow::stored_bytes(2));
    }

    #[test]
    fn rows_survive_and_any_flipped_bit_or_wrong_key_is_met() {
        let (source, volume, history) = (source(), volume(), history());
        let id = source.id;
        assert_eq!(SourceRow::decode(&id.0, &source.encode()).unwrap(), source);
        let key = volume.key.encode();
        assert_eq!(VolumeRow::decode(&key, &volume.encode()).unwrap(), volume);
        let past = HistoryRow::key(id, history.cp);
        assert_eq!(HistoryRow::decode(&past, &history.encode(id)).unwrap(), history);

        let bytes = source.encode();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(SourceRow::decode(&id.0, &bytes).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(SourceRow::decode(&id.0, &bytes[..length]).is_err(), "length {length}");
        }
        assert!(SourceRow::decode(&[2; 16], &bytes).is_err());
        assert!(HistoryRow::decode(&key, &volume.encode()).is_err());
    }

    /// A row that is sealed well but too long or of a later version is refused, not half read.
    #[test]
    fn a_row_of_another_shape_is_refused() {
        let id = source().id;
        let mut payload = source().encode()[8..].to_vec();
        payload.push(0);
        let met = SourceRow::decode(&id.0, &seal(SourceRow::TABLE, &id.0, &payload)).unwrap_err();
        assert!(met.to_string().contains("1 bytes too many"), "{met}");
        let front = [2, 0, 0, 0];
        let crc = crc32c_parts(&[SourceRow::TABLE.as_bytes(), &id.0, &front, &payload]);
        let bytes = [&front[..], &crc.to_le_bytes(), &payload].concat();
        let met = SourceRow::decode(&id.0, &bytes).unwrap_err();
        assert!(met.to_string().contains("version 2"), "{met}");
    }
}
