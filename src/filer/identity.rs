//! What a source keeps about itself in its pool's catalog, beside the row's own fields.
//!
//! Pure. Written with the row: at the first start, when the hub is known, and with every CP (the
//! name of its last transfer must be there when the NVRAM is not), when the source goes alone and
//! comes back, when it is fenced, and when its policy changes. Layout of the extension,
//! little-endian, 152 bytes; the row around it carries the checksum:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `MHSX` |
//! | 4 | 2 | format version: 3 |
//! | 6 | 1 | 1 once the NVRAM was made |
//! | 7 | 1 | bit 0: alone, bit 1: fenced, bit 2: a policy is in force, bit 3: another follows, bit 4: it lives here by the hub's wish, bit 5: it has served without having asked its hub |
//! | 8 | 16 | id of the hub it belongs to; zero before the first Welcome |
//! | 24 | 12 | last transfer of the published CP: generation (4), counter (8) |
//! | 36 | 20 | alone: epoch number (4) and id (8), sequence number (8) from which on the hub may lack acknowledged writes (R4); zero if not |
//! | 56 | 12 | fenced: epoch number (4) and id (8) in which another end is primary (R12); zero if not |
//! | 68 | 24 | the policy in force, as `units::policy` encodes it; zero before the first Welcome |
//! | 92 | 24 | the one that the hub is told of next, and may know already (R20); zero if none |
//! | 116 | 12 | last transfer that it held then (R1); zero without bit 5 |
//! | 128 | 24 | what it promises where it lives by the hub's wish, as `units::policy` encodes it; zero without bit 4 |
//!
//! Version 2 has 80 bytes: those up to 68 and 12 of zero, and none of the bits 2 to 5. Version 1 has
//! 48 bytes: those up to 36, 12 of zero, and no bit.

use crate::units::ids::HubId;
use crate::units::numbers::{Epoch, SequenceNumber, TransferId};
use crate::units::policy::{POLICY_BYTES, Policy, PolicyError};

/// Bytes of the extension.
pub const EXTENSION_BYTES: usize = 152;
/// Format version written; versions 1 and 2 are read.
pub const EXTENSION_VERSION: u16 = 3;
const FIRST_BYTES: usize = 48;
const SECOND_BYTES: usize = 80;
const ALONE: u8 = 1;
const FENCED: u8 = 2;
const POLICY: u8 = 4;
const NEXT: u8 = 8;
const GUEST: u8 = 16;
const UNASKED: u8 = 32;
/// Where the guest's promise lies.
const GUEST_AT: usize = 128;
/// Where it began to serve without having asked.
const UNASKED_AT: usize = 116;
const MAGIC: [u8; 4] = *b"MHSX";

const _: () = assert!(EXTENSION_BYTES == GUEST_AT + POLICY_BYTES && UNASKED_AT + 12 == GUEST_AT);
const _: () = assert!(EXTENSION_BYTES <= crate::limits::SOURCE_EXTENSION_BYTES_MAX);

/// Why bytes are no extension.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExtensionError {
    /// Wrong length.
    #[error("a source's extension has {EXTENSION_BYTES} bytes, not {0}")]
    Length(usize),
    /// Something else.
    #[error("a source's extension begins with {0:02x?}, not with MHSX")]
    Magic([u8; 4]),
    /// Written by a later program.
    #[error("a source's extension has version {0}, this program reads versions 1 to 3")]
    Version(u16),
    /// A field out of its bounds.
    #[error("a source's extension: field {field} is {value}")]
    Field { field: &'static str, value: u8 },
    /// A policy that nobody knows.
    #[error("a source's extension: {0}")]
    Policy(#[from] PolicyError),
}

/// What the extension says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extension {
    /// Whether an NVRAM was made: if it is gone then, that is a loss and no first start.
    pub nvram_made: bool,
    /// The hub this source belongs to.
    pub hub: Option<HubId>,
    /// Last transfer of the published CP.
    pub transfer: TransferId,
    /// From which sequence number on, in which epoch, the hub may lack acknowledged writes.
    pub alone: Option<(Epoch, SequenceNumber)>,
    /// The epoch in which somebody else is primary.
    pub fenced: Option<Epoch>,
    /// The policy in force.
    pub policy: Option<Policy>,
    /// The one that follows.
    pub next: Option<Policy>,
    /// What a source promises that lives here because its hub has asked for it: no configuration
    /// of this filer says so.
    pub guest: Option<Policy>,
    /// The last transfer held when it began to serve without having asked its hub.
    pub unasked: Option<TransferId>,
}

impl Extension {
    /// The bytes.
    pub fn encode(&self) -> [u8; EXTENSION_BYTES] {
        let mut out = [0; EXTENSION_BYTES];
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&EXTENSION_VERSION.to_le_bytes());
        out[6] = u8::from(self.nvram_made);
        out[8..24].copy_from_slice(&self.hub.unwrap_or_default().0);
        out[24..36].copy_from_slice(&transfer_bytes(self.transfer));
        if let Some((epoch, from)) = self.alone {
            out[7] |= ALONE;
            out[36..48].copy_from_slice(&epoch_bytes(epoch));
            out[48..56].copy_from_slice(&from.0.to_le_bytes());
        }
        if let Some(epoch) = self.fenced {
            out[7] |= FENCED;
            out[56..68].copy_from_slice(&epoch_bytes(epoch));
        }
        if let Some(began) = self.unasked {
            out[7] |= UNASKED;
            out[UNASKED_AT..GUEST_AT].copy_from_slice(&transfer_bytes(began));
        }
        let policies =
            [(POLICY, 68, self.policy), (NEXT, 92, self.next), (GUEST, GUEST_AT, self.guest)];
        for (flag, at, policy) in policies {
            if let Some(policy) = policy {
                out[7] |= flag;
                out[at..at + POLICY_BYTES].copy_from_slice(&policy.encode());
            }
        }
        out
    }

    /// Reads and checks the bytes; none at all is a source that was just made.
    pub fn decode(bytes: &[u8]) -> Result<Self, ExtensionError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let length = ExtensionError::Length(bytes.len());
        let Some([a, b, c, d, low, high, made, flags]) = bytes.first_chunk().copied() else {
            return Err(length);
        };
        if [a, b, c, d] != MAGIC {
            return Err(ExtensionError::Magic([a, b, c, d]));
        }
        let version = u16::from_le_bytes([low, high]);
        let (wanted, used, flags_max) = match version {
            1 => (FIRST_BYTES, 36, 0),
            2 => (SECOND_BYTES, 68, ALONE | FENCED),
            3 => (EXTENSION_BYTES, GUEST_AT, ALONE | FENCED | POLICY | NEXT | GUEST | UNASKED),
            _ => return Err(ExtensionError::Version(version)),
        };
        if bytes.len() != wanted {
            return Err(length);
        }
        if made > 1 {
            return Err(ExtensionError::Field { field: "nvram made", value: made });
        }
        if flags > flags_max {
            return Err(ExtensionError::Field { field: "flags", value: flags });
        }
        let mut all = [0; EXTENSION_BYTES];
        all[..wanted].copy_from_slice(bytes);
        if let Some(value) = stray(&all, flags, used) {
            return Err(ExtensionError::Field { field: "reserved", value });
        }
        let policy = |flag: u8, at: usize| {
            let mut bytes = [0; POLICY_BYTES];
            bytes.copy_from_slice(&all[at..at + POLICY_BYTES]);
            (flags & flag != 0).then(|| Policy::decode(&bytes)).transpose()
        };
        let mut hub = [0; 16];
        hub.copy_from_slice(&all[8..24]);
        let alone = (epoch_at(&all, 36), SequenceNumber(number_at(&all, 48)));
        Ok(Self {
            nvram_made: made == 1,
            hub: Some(HubId(hub)).filter(|hub| !hub.is_zero()),
            transfer: transfer_at(&all, 24),
            alone: (flags & ALONE != 0).then_some(alone),
            fenced: (flags & FENCED != 0).then_some(epoch_at(&all, 56)),
            policy: policy(POLICY, 68)?,
            next: policy(NEXT, 92)?,
            guest: policy(GUEST, GUEST_AT)?,
            unasked: (flags & UNASKED != 0).then(|| transfer_at(&all, UNASKED_AT)),
        })
    }
}

/// A byte that is not zero where nothing is: in what is reserved, or in a field whose bit is not set.
fn stray(all: &[u8; EXTENSION_BYTES], flags: u8, used: usize) -> Option<u8> {
    let fields = [
        (ALONE, 36, 56),
        (FENCED, 56, 68),
        (POLICY, 68, 92),
        (NEXT, 92, 116),
        (GUEST, GUEST_AT, EXTENSION_BYTES),
        (UNASKED, UNASKED_AT, GUEST_AT),
    ];
    let unset = fields.into_iter().filter(|(flag, ..)| flags & flag == 0);
    let ranges = unset.map(|(_, from, to)| (from, to)).chain([(used, GUEST_AT)]);
    ranges.flat_map(|(from, to)| &all[from..to]).copied().find(|byte| *byte != 0)
}

fn epoch_bytes(epoch: Epoch) -> [u8; 12] {
    let mut out = [0; 12];
    out[..4].copy_from_slice(&epoch.number.to_le_bytes());
    out[4..].copy_from_slice(&epoch.id.to_le_bytes());
    out
}

fn epoch_at(all: &[u8; EXTENSION_BYTES], at: usize) -> Epoch {
    let mut number = [0; 4];
    number.copy_from_slice(&all[at..at + 4]);
    Epoch { number: u32::from_le_bytes(number), id: number_at(all, at + 4) }
}

fn transfer_bytes(transfer: TransferId) -> [u8; 12] {
    epoch_bytes(Epoch { number: transfer.generation, id: transfer.counter })
}

fn transfer_at(all: &[u8; EXTENSION_BYTES], at: usize) -> TransferId {
    let Epoch { number: generation, id: counter } = epoch_at(all, at);
    TransferId { generation, counter }
}

fn number_at(all: &[u8; EXTENSION_BYTES], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&all[at..at + 8]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::policy::Mode;

    fn sample() -> Extension {
        Extension {
            nvram_made: true,
            hub: Some(HubId([7; 16])),
            transfer: TransferId { generation: 2, counter: 0x0103 },
            alone: Some((Epoch { number: 3, id: 4 }, SequenceNumber(0x0506))),
            fenced: Some(Epoch { number: 7, id: 8 }),
            policy: Some(Policy { mode: Mode::SemiSync, ..Policy::default() }),
            next: Some(Policy::default()),
            guest: Some(Policy::default()),
            unasked: Some(TransferId { generation: 9, counter: 0x0a0b }),
        }
    }

    fn bare() -> Extension {
        let (alone, fenced, unasked) = Default::default();
        Extension { alone, fenced, unasked, policy: None, next: None, guest: None, ..sample() }
    }

    #[test]
    fn golden_bytes_and_back() {
        let bytes = sample().encode();
        assert_eq!(&bytes[..9], b"MHSX\x03\0\x01\x3f\x07");
        assert_eq!(&bytes[24..36], &[2, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[36..50], &[3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 6, 5]);
        assert_eq!(&bytes[56..62], &[7, 0, 0, 0, 8, 0]);
        assert_eq!(Extension::decode(&bytes), Ok(sample()));
        assert_eq!((&bytes[68..70], &bytes[92..94]), (&[2, 1][..], &[1, 1][..]));
        assert_eq!(bytes[128..], Policy::default().encode());
        assert_eq!(&bytes[116..128], &[9, 0, 0, 0, 0x0b, 0x0a, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Extension::decode(&bare().encode()), Ok(bare()));
        assert_eq!(Extension::decode(&[]), Ok(Extension::default()));
    }

    #[test]
    fn older_versions_are_read() {
        let (policy, next, unasked) = Default::default();
        let second = Extension { policy, next, unasked, guest: None, ..sample() };
        let mut bytes = second.encode()[..80].to_vec();
        bytes[4] = 2;
        assert_eq!(Extension::decode(&bytes), Ok(second));
        bytes[7] |= 4;
        let flags = ExtensionError::Field { field: "flags", value: 7 };
        assert_eq!(Extension::decode(&bytes), Err(flags));
        let plain = bare();
        let mut bytes = plain.encode()[..48].to_vec();
        bytes[4] = 1;
        assert_eq!(Extension::decode(&bytes), Ok(plain));
        bytes[7] = 1;
        let flags = ExtensionError::Field { field: "flags", value: 1 };
        assert_eq!(Extension::decode(&bytes), Err(flags));
    }

    #[test]
    fn each_bad_field_is_named() {
        let bad = |at: usize, value| {
            let mut bytes = sample().encode();
            bytes[at] = value;
            Extension::decode(&bytes).unwrap_err()
        };
        assert_eq!(bad(0, b'X'), ExtensionError::Magic(*b"XHSX"));
        assert_eq!(bad(4, 4), ExtensionError::Version(4));
        assert_eq!(bad(6, 2), ExtensionError::Field { field: "nvram made", value: 2 });
        assert_eq!(bad(7, 64), ExtensionError::Field { field: "flags", value: 64 });
        assert_eq!(bad(7, 47), ExtensionError::Field { field: "reserved", value: 1 });
        assert_eq!(bad(7, 61), ExtensionError::Field { field: "reserved", value: 7 });
        assert_eq!(bad(7, 59), ExtensionError::Field { field: "reserved", value: 2 });
        assert_eq!(bad(7, 31), ExtensionError::Field { field: "reserved", value: 9 });
        assert!(matches!(bad(68, 9), ExtensionError::Policy(_)));
        assert!(matches!(bad(128, 9), ExtensionError::Policy(_)));
        assert_eq!(Extension::decode(&[0; 7]), Err(ExtensionError::Length(7)));
        assert_eq!(Extension::decode(&sample().encode()[..48]), Err(ExtensionError::Length(48)));
    }
}
