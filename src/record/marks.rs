//! Marks: records that are no transfers.
//!
//! All three name a place in a source's history: its last transfer, last sequence number and
//! stream hash there. Layout, little-endian, 64 bytes:
//!
//! | at | bytes | freeze | cut | fence |
//! | --- | --- | --- | --- | --- |
//! | 0 | 4 | magic `MHF1` | `MHC1` | `MHE1` |
//! | 4 | 4 | CP that was cut here | 0 | number of the new epoch |
//! | 8 | 12 | last transfer before it | last transfer kept | last transfer before it |
//! | 20 | 8 | its last sequence number | | |
//! | 28 | 16 | stream hash there | | |
//! | 44 | 8 | 0 | 0 | id of the new epoch |
//! | 52 | 8 | reserved, zero | | |
//! | 60 | 4 | CRC-32C of bytes 0..60 | | |
//!
//! A freeze behind which another policy comes into force has 96 bytes: magic `MHF2`, the bytes up
//! to 60 as above, then the policy as `units::policy` encodes it (24), 8 of zero, and CRC-32C of
//! bytes 0..92.

use crate::units::bytes::{long, word};
use crate::units::hash::{StreamHash, crc32c};
use crate::units::numbers::{CpNumber, Epoch, SequenceNumber, TransferId};
use crate::units::policy::{POLICY_BYTES, Policy, PolicyError};

/// Bytes of a mark.
pub const MARK_BYTES: usize = 64;
/// Most bytes of a freeze.
pub const FREEZE_BYTES_MAX: usize = 96;
const CRC_AT: usize = 60;
const POLICY_END: usize = CRC_AT + POLICY_BYTES;
const LONG_CRC_AT: usize = 92;

/// Why bytes are not the mark they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MarkError {
    /// Wrong length.
    #[error("a mark has 64 bytes, or 96 with a policy, not {0}")]
    Length(usize),
    /// A policy that nobody knows.
    #[error("policy of a freeze: {0}")]
    Policy(#[from] PolicyError),
    /// Another mark, or none.
    #[error("mark begins with {met:02x?}, not with {wanted:02x?}")]
    Magic { wanted: [u8; 4], met: [u8; 4] },
    /// Damaged.
    #[error("checksum of the mark is {met:08x}, stored is {stored:08x}")]
    Checksum { stored: u32, met: u32 },
    /// Unused bytes are set.
    #[error("reserved bytes of a mark are not zero")]
    Reserved,
}

/// A place in the history of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Last transfer up to here.
    pub transfer: TransferId,
    /// Sequence number of its last entry; 0 before the first.
    pub sequence: SequenceNumber,
    /// Stream hash there.
    pub hash: StreamHash,
}

/// The source cut a CP: everything up to `place` belongs to `cp`, nothing behind it does (R6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freeze {
    /// The CP.
    pub cp: CpNumber,
    /// Its last transfer.
    pub place: Place,
    /// The policy that comes into force behind it, if that is another one (R20).
    pub policy: Option<Policy>,
}

/// The hub dropped everything of a source behind `place` (R1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// What was kept.
    pub place: Place,
}

/// The epoch of a source was raised behind `place` (R2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    /// The new epoch.
    pub epoch: Epoch,
    /// Everything up to here is replayed.
    pub place: Place,
}

const FREEZE: [u8; 4] = *b"MHF1";
const FREEZE_POLICY: [u8; 4] = *b"MHF2";
const CUT: [u8; 4] = *b"MHC1";
const FENCE: [u8; 4] = *b"MHE1";

impl Freeze {
    /// The 64 or 96 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let Some(policy) = &self.policy else {
            return encode(FREEZE, self.cp.0, &self.place, 0).to_vec();
        };
        let mut out = encode(FREEZE_POLICY, self.cp.0, &self.place, 0)[..CRC_AT].to_vec();
        out.extend_from_slice(&policy.encode());
        out.resize(LONG_CRC_AT, 0);
        let crc = crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and checks them.
    pub fn decode(bytes: &[u8]) -> Result<Self, MarkError> {
        let (cp, place, id, policy) = match <&[u8; FREEZE_BYTES_MAX]>::try_from(bytes) {
            Ok(long) => {
                let (cp, place, id) = decode_with(FREEZE_POLICY, long, LONG_CRC_AT)?;
                if long[POLICY_END..LONG_CRC_AT] != [0; LONG_CRC_AT - POLICY_END] {
                    return Err(MarkError::Reserved);
                }
                let mut policy = [0; POLICY_BYTES];
                policy.copy_from_slice(&long[CRC_AT..POLICY_END]);
                (cp, place, id, Some(Policy::decode(&policy)?))
            }
            Err(_) => {
                let (cp, place, id) = decode(FREEZE, bytes)?;
                (cp, place, id, None)
            }
        };
        if id != 0 {
            return Err(MarkError::Reserved);
        }
        Ok(Self { cp: CpNumber(cp), place, policy })
    }
}

impl Cut {
    /// The 64 bytes.
    pub fn encode(&self) -> [u8; MARK_BYTES] {
        encode(CUT, 0, &self.place, 0)
    }

    /// Reads and checks 64 bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, MarkError> {
        let (number, place, id) = decode(CUT, bytes)?;
        if number != 0 || id != 0 {
            return Err(MarkError::Reserved);
        }
        Ok(Self { place })
    }
}

impl Fence {
    /// The 64 bytes.
    pub fn encode(&self) -> [u8; MARK_BYTES] {
        encode(FENCE, self.epoch.number, &self.place, self.epoch.id)
    }

    /// Reads and checks 64 bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, MarkError> {
        let (number, place, id) = decode(FENCE, bytes)?;
        Ok(Self { epoch: Epoch { number, id }, place })
    }
}

fn encode(magic: [u8; 4], number: u32, place: &Place, id: u64) -> [u8; MARK_BYTES] {
    let mut out = [0; MARK_BYTES];
    out[0..4].copy_from_slice(&magic);
    out[4..8].copy_from_slice(&number.to_le_bytes());
    out[8..12].copy_from_slice(&place.transfer.generation.to_le_bytes());
    out[12..20].copy_from_slice(&place.transfer.counter.to_le_bytes());
    out[20..28].copy_from_slice(&place.sequence.0.to_le_bytes());
    out[28..44].copy_from_slice(&place.hash.0);
    out[44..52].copy_from_slice(&id.to_le_bytes());
    let crc = crc32c(&out[..CRC_AT]);
    out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    out
}

fn decode(wanted: [u8; 4], bytes: &[u8]) -> Result<(u32, Place, u64), MarkError> {
    let bytes: &[u8; MARK_BYTES] = bytes.try_into().map_err(|_| MarkError::Length(bytes.len()))?;
    decode_with(wanted, bytes, CRC_AT)
}

/// The part that all marks have, of bytes whose checksum stands at `crc_at`.
fn decode_with(
    wanted: [u8; 4],
    bytes: &[u8],
    crc_at: usize,
) -> Result<(u32, Place, u64), MarkError> {
    let met = [bytes[0], bytes[1], bytes[2], bytes[3]];
    if met != wanted {
        return Err(MarkError::Magic { wanted, met });
    }
    let (stored, met) = (word(bytes, crc_at), crc32c(&bytes[..crc_at]));
    if stored != met {
        return Err(MarkError::Checksum { stored, met });
    }
    if bytes[52..CRC_AT] != [0; 8] {
        return Err(MarkError::Reserved);
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&bytes[28..44]);
    let place = Place {
        transfer: TransferId { generation: word(bytes, 8), counter: long(bytes, 12) },
        sequence: SequenceNumber(long(bytes, 20)),
        hash: StreamHash(hash),
    };
    Ok((word(bytes, 4), place, long(bytes, 44)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            transfer: TransferId { generation: 1, counter: 2 },
            sequence: SequenceNumber(3),
            hash: StreamHash([4; 16]),
        }
    }

    #[test]
    fn golden_bytes_and_back() {
        let freeze = Freeze { cp: CpNumber(9), place: place(), policy: None };
        let bytes = freeze.encode();
        assert_eq!(bytes.len(), MARK_BYTES);
        assert_eq!(&bytes[..21], b"MHF1\x09\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0\x03");
        assert_eq!(Freeze::decode(&bytes), Ok(freeze));
        let cut = Cut { place: place() };
        assert_eq!(Cut::decode(&cut.encode()), Ok(cut));
        let fence = Fence { epoch: Epoch { number: 2, id: 77 }, place: place() };
        assert_eq!(Fence::decode(&fence.encode()), Ok(fence));
    }

    #[test]
    fn a_freeze_carries_the_policy_behind_it() {
        let policy = Policy { mode: crate::units::policy::Mode::Async, ..Policy::default() };
        let freeze = Freeze { cp: CpNumber(9), place: place(), policy: Some(policy) };
        let bytes = freeze.encode();
        assert_eq!((&bytes[..8], bytes.len()), (&b"MHF2\x09\0\0\0"[..], FREEZE_BYTES_MAX));
        assert_eq!(bytes[60..84], policy.encode());
        assert_eq!(Freeze::decode(&bytes), Ok(freeze));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(Freeze::decode(&bad).is_err(), "byte {at}");
        }
        let sealed = |at: usize, value: u8| {
            let mut bad = bytes.clone();
            bad[at] = value;
            let crc = crc32c(&bad[..92]).to_le_bytes();
            bad[92..].copy_from_slice(&crc);
            Freeze::decode(&bad).unwrap_err()
        };
        assert!(matches!(sealed(60, 9), MarkError::Policy(_)));
        assert_eq!(sealed(84, 1), MarkError::Reserved);
        assert_eq!(sealed(44, 1), MarkError::Reserved);
        assert_eq!(Freeze::decode(&bytes[..95]), Err(MarkError::Length(95)));
        assert!(matches!(Cut::decode(&bytes), Err(MarkError::Length(96))));
    }

    #[test]
    fn marks_are_not_taken_for_each_other_and_flips_are_found() {
        let bytes = Cut { place: place() }.encode();
        assert!(matches!(Freeze::decode(&bytes), Err(MarkError::Magic { .. })));
        assert_eq!(Cut::decode(&bytes[..63]), Err(MarkError::Length(63)));
        for at in 0..MARK_BYTES {
            let mut bad = bytes;
            bad[at] ^= 1;
            assert!(Cut::decode(&bad).is_err(), "byte {at}");
        }
    }
}
