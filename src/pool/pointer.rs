//! The format of a tree pointer and of the root of a volume's tree.
//!
//! Pure: structs and bytes. Nodes are made of pointers, the catalog keeps one [`TreeRoot`] a
//! volume. It stands with the pool, not with the volume tree, because the pool publishes, pins
//! and accounts by it; what a tree *means* is the volume module's affair.
//!
//! Pointer, little-endian, 32 bytes:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | PBN; 0 for a hole |
//! | 8 | 4 | birth: the CP in which this pointer was written; holes carry one too |
//! | 12 | 4 | CRC-32C of the 4096 bytes pointed to; 0 for a hole |
//! | 16 | 16 | content hash; zero for a hole |
//!
//! Tree root, 40 bytes: size of the volume in bytes (8), then the pointer to the top.
//!
//! Invariant: PBN, CRC and hash are all of a hole or all of a block; bytes that say otherwise are
//! no pointer.

use crate::units::hash::{ContentHash, Root};
use crate::units::ids::SourceId;
use crate::units::numbers::{ByteCount, CpNumber, Pbn, VolumeNumber};

/// Bytes of a pointer.
pub const POINTER_BYTES: usize = 32;
/// Bytes of a tree root.
pub const TREE_ROOT_BYTES: usize = 8 + POINTER_BYTES;
/// What is hashed before size and top, so that a root is never the hash of something else.
pub const ROOT_PREFIX: &[u8] = b"mirrorhub root v1";

const _: () = {
    assert!(POINTER_BYTES * crate::limits::NODE_CHILDREN == crate::units::BLOCK_BYTES);
    assert!(POINTER_BYTES == 8 + 4 + 4 + 16);
};

/// Why 32 bytes are no pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("pointer to {pbn} is half a hole: checksum {crc:08x}, content hash {hash}")]
pub struct PointerError {
    pbn: Pbn,
    crc: u32,
    hash: ContentHash,
}

/// Where a block or node is, when that was written, and what it must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pointer {
    /// Where; 0 for a hole.
    pub pbn: Pbn,
    /// The CP in which this pointer was written.
    pub birth: CpNumber,
    /// CRC-32C of the 4096 bytes there; 0 for a hole.
    pub crc: u32,
    /// Content hash; zero for a hole.
    pub hash: ContentHash,
}

impl Pointer {
    /// Past the end of a volume, and the top of a volume that was never written.
    pub const ZERO: Self = Self::hole(CpNumber(0));

    /// All zero since `birth`.
    pub const fn hole(birth: CpNumber) -> Self {
        Self { pbn: Pbn(0), birth, crc: 0, hash: ContentHash::ZERO }
    }

    /// Whether all that it names is zero.
    pub const fn is_hole(&self) -> bool {
        self.pbn.0 == 0
    }

    /// The 32 bytes of a node.
    pub fn encode(&self) -> [u8; POINTER_BYTES] {
        let mut bytes = [0; POINTER_BYTES];
        bytes[0..8].copy_from_slice(&self.pbn.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.birth.0.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.crc.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.hash.0);
        bytes
    }

    /// Reads the 32 bytes of a node.
    pub fn decode(bytes: &[u8; POINTER_BYTES]) -> Result<Self, PointerError> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut hash = [0; 16];
        hash.copy_from_slice(&bytes[16..32]);
        let pointer = Self {
            pbn: Pbn(u64::from(word(0)) | u64::from(word(4)) << 32),
            birth: CpNumber(word(8)),
            crc: word(12),
            hash: ContentHash(hash),
        };
        let Self { pbn, crc, hash, .. } = pointer;
        let fits = if pointer.is_hole() { crc == 0 && hash.is_zero() } else { !hash.is_zero() };
        if fits { Ok(pointer) } else { Err(PointerError { pbn, crc, hash }) }
    }
}

/// A volume at one CP: its size and the pointer to the top of its tree.
///
/// It is safe to read by it while the CP is pinned, or by whoever alone publishes the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TreeRoot {
    /// Size of the volume in bytes, a multiple of 4096.
    pub size: ByteCount,
    /// The top node; its level is the height of the volume's geometry.
    pub top: Pointer,
}

impl TreeRoot {
    /// A volume of that size that was never written.
    pub const fn empty(size: ByteCount) -> Self {
        Self { size, top: Pointer::ZERO }
    }

    /// The 32-byte hash that names the whole content: size and top, nothing of where or when.
    pub fn root(&self) -> Root {
        root_of(self.size, self.top.hash)
    }

    /// The fixed encoding of the catalog.
    pub fn encode(&self) -> [u8; TREE_ROOT_BYTES] {
        let mut bytes = [0; TREE_ROOT_BYTES];
        bytes[0..8].copy_from_slice(&self.size.0.to_le_bytes());
        bytes[8..].copy_from_slice(&self.top.encode());
        bytes
    }

    /// Reads the fixed encoding of the catalog.
    pub fn decode(bytes: &[u8; TREE_ROOT_BYTES]) -> Result<Self, PointerError> {
        let mut size = [0; 8];
        size.copy_from_slice(&bytes[0..8]);
        let mut top = [0; POINTER_BYTES];
        top.copy_from_slice(&bytes[8..]);
        let top = Pointer::decode(&top)?;
        Ok(Self { size: ByteCount(u64::from_le_bytes(size)), top })
    }
}

/// BLAKE3(prefix || size, u64 little endian || hash of the top node), all 32 bytes.
pub fn root_of(size: ByteCount, top: ContentHash) -> Root {
    let mut hasher = blake3::Hasher::new();
    hasher.update(ROOT_PREFIX);
    hasher.update(&size.0.to_le_bytes());
    hasher.update(&top.0);
    Root(*hasher.finalize().as_bytes())
}

/// Which volume of which source: what frees and pins are counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeKey {
    /// The source.
    pub source: SourceId,
    /// Its volume.
    pub volume: VolumeNumber,
}

impl VolumeKey {
    /// Bytes of a key in the catalog: source id, then the number big-endian so that keys sort.
    pub const BYTES: usize = 20;

    /// The catalog's key.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        keyed(&self.source.0, self.volume.0)
    }
}

/// A source id and a number, in the order that sorts by id, then by number.
pub fn keyed(id: &[u8; 16], number: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..16].copy_from_slice(id);
    bytes[16..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// The other way round.
pub fn unkeyed(key: &[u8; 20]) -> ([u8; 16], u32) {
    let mut id = [0; 16];
    id.copy_from_slice(&key[..16]);
    let number = u32::from_be_bytes([key[16], key[17], key[18], key[19]]);
    (id, number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointer() -> Pointer {
        Pointer {
            pbn: Pbn(0x0102_0304_0506),
            birth: CpNumber(7),
            crc: 0xaabb_ccdd,
            hash: ContentHash([9; 16]),
        }
    }

    #[test]
    fn golden_bytes() {
        let mut expected = vec![6, 5, 4, 3, 2, 1, 0, 0, 7, 0, 0, 0, 0xdd, 0xcc, 0xbb, 0xaa];
        expected.extend([9; 16]);
        assert_eq!(pointer().encode().to_vec(), expected);
        assert_eq!(Pointer::decode(&pointer().encode()), Ok(pointer()));

        let tree = TreeRoot { size: ByteCount(0x3000), top: pointer() };
        let mut bytes = vec![0, 0x30, 0, 0, 0, 0, 0, 0];
        bytes.extend(expected);
        assert_eq!(tree.encode().to_vec(), bytes);
        assert_eq!(TreeRoot::decode(&tree.encode()), Ok(tree));
    }

    #[test]
    fn a_hole_keeps_its_birth_and_half_a_hole_is_refused() {
        let hole = Pointer::hole(CpNumber(5));
        assert!(hole.is_hole());
        assert_eq!(Pointer::decode(&hole.encode()), Ok(hole));
        for at in [12, 16] {
            let mut bytes = hole.encode();
            bytes[at] = 1;
            assert!(Pointer::decode(&bytes).is_err(), "byte {at}");
        }
        let mut bytes = pointer().encode();
        bytes[16..].fill(0);
        assert!(Pointer::decode(&bytes).is_err());
    }

    /// The size is part of the name: two empty volumes of different size have different roots.
    #[test]
    fn the_root_depends_on_size_and_content_only() {
        let empty = TreeRoot::empty(ByteCount(4096));
        assert_ne!(empty.root(), TreeRoot::empty(ByteCount(8192)).root());
        let aged = TreeRoot { size: ByteCount(4096), top: Pointer::hole(CpNumber(9)) };
        assert_eq!(aged.root(), empty.root());
        let moved = Pointer { pbn: Pbn(1), birth: CpNumber(1), crc: 1, ..pointer() };
        let (a, b) = (TreeRoot { top: pointer(), ..empty }, TreeRoot { top: moved, ..empty });
        assert_eq!(a.root(), b.root());
        assert_ne!(a.root(), empty.root());
    }
}
