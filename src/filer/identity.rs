//! What a source keeps about itself in its pool's catalog, beside the row's own fields.
//!
//! Pure. Written with the row: at the first start, when the hub is known, and with every CP (the
//! name of its last transfer must be there when the NVRAM is not). Layout of the extension,
//! little-endian, 48 bytes; the row around it carries the checksum:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `MHSX` |
//! | 4 | 2 | format version: 1 |
//! | 6 | 1 | 1 once the NVRAM was made |
//! | 7 | 1 | reserved, zero |
//! | 8 | 16 | id of the hub it belongs to; zero before the first Welcome |
//! | 24 | 12 | last transfer of the published CP: generation (4), counter (8) |
//! | 36 | 12 | reserved, zero |

use crate::units::ids::HubId;
use crate::units::numbers::TransferId;

/// Bytes of the extension.
pub const EXTENSION_BYTES: usize = 48;
/// Format version written and read.
pub const EXTENSION_VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"MHSX";

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
    #[error("a source's extension has version {0}, this program reads version 1")]
    Version(u16),
    /// A field out of its bounds.
    #[error("a source's extension: field {field} is {value}")]
    Field { field: &'static str, value: u8 },
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
}

impl Extension {
    /// The bytes.
    pub fn encode(&self) -> [u8; EXTENSION_BYTES] {
        let mut out = [0; EXTENSION_BYTES];
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&EXTENSION_VERSION.to_le_bytes());
        out[6] = u8::from(self.nvram_made);
        out[8..24].copy_from_slice(&self.hub.unwrap_or_default().0);
        out[24..28].copy_from_slice(&self.transfer.generation.to_le_bytes());
        out[28..36].copy_from_slice(&self.transfer.counter.to_le_bytes());
        out
    }

    /// Reads and checks the bytes; none at all is a source that was just made.
    pub fn decode(bytes: &[u8]) -> Result<Self, ExtensionError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let Ok(bytes) = <&[u8; EXTENSION_BYTES]>::try_from(bytes) else {
            return Err(ExtensionError::Length(bytes.len()));
        };
        let [a, b, c, d, low, high, made, reserved, ..] = *bytes;
        if [a, b, c, d] != MAGIC {
            return Err(ExtensionError::Magic([a, b, c, d]));
        }
        let version = u16::from_le_bytes([low, high]);
        if version != EXTENSION_VERSION {
            return Err(ExtensionError::Version(version));
        }
        if made > 1 {
            return Err(ExtensionError::Field { field: "nvram made", value: made });
        }
        let rest = bytes[36..].iter().copied().chain([reserved]).find(|byte| *byte != 0);
        if let Some(value) = rest {
            return Err(ExtensionError::Field { field: "reserved", value });
        }
        let mut hub = [0; 16];
        hub.copy_from_slice(&bytes[8..24]);
        let mut counter = [0; 8];
        counter.copy_from_slice(&bytes[28..36]);
        let [g0, g1, g2, g3] = [bytes[24], bytes[25], bytes[26], bytes[27]];
        Ok(Self {
            nvram_made: made == 1,
            hub: Some(HubId(hub)).filter(|hub| !hub.is_zero()),
            transfer: TransferId {
                generation: u32::from_le_bytes([g0, g1, g2, g3]),
                counter: u64::from_le_bytes(counter),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Extension {
        Extension {
            nvram_made: true,
            hub: Some(HubId([7; 16])),
            transfer: TransferId { generation: 2, counter: 0x0103 },
        }
    }

    #[test]
    fn golden_bytes_and_back() {
        let bytes = sample().encode();
        assert_eq!(&bytes[..9], b"MHSX\x01\0\x01\0\x07");
        assert_eq!(&bytes[24..36], &[2, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Extension::decode(&bytes), Ok(sample()));
        assert_eq!(Extension::decode(&[]), Ok(Extension::default()));
    }

    #[test]
    fn each_bad_field_is_named() {
        let bad = |at: usize, value| {
            let mut bytes = sample().encode();
            bytes[at] = value;
            Extension::decode(&bytes).unwrap_err()
        };
        assert_eq!(bad(0, b'X'), ExtensionError::Magic(*b"XHSX"));
        assert_eq!(bad(4, 2), ExtensionError::Version(2));
        assert_eq!(bad(6, 2), ExtensionError::Field { field: "nvram made", value: 2 });
        assert_eq!(bad(7, 1), ExtensionError::Field { field: "reserved", value: 1 });
        assert_eq!(bad(47, 9), ExtensionError::Field { field: "reserved", value: 9 });
        assert_eq!(Extension::decode(&[0; 47]), Err(ExtensionError::Length(47)));
    }
}
