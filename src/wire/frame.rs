//! Frames: `u32 header length, u32 payload length` (little-endian), header, payload.
//!
//! Both lengths are checked before anything is allocated (invariant 8). The payload is never
//! copied through serde. The shells read the 8 bytes, ask [`Lengths::decode`], read the rest, and
//! hand both parts to [`super::message::Message::decode`].

use crate::limits::{FRAME_HEADER_BYTES_MAX, FRAME_PAYLOAD_BYTES_MAX};
use crate::units::convert::{low_u32, to_u64, u32_to_usize};

/// Bytes before the header.
pub const FRAME_PREFIX_BYTES: usize = 8;

/// Why a frame is refused; the connection it came on is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A header of no bytes says nothing.
    #[error("frame without a header")]
    NoHeader,
    /// Over the bound.
    #[error("frame header of {met} bytes, at most {wanted} are taken")]
    HeaderTooLong { met: u64, wanted: u64 },
    /// Over the bound.
    #[error("frame payload of {met} bytes, at most {wanted} are taken")]
    PayloadTooLong { met: u64, wanted: u64 },
    /// A message kind this version does not know.
    #[error("message kind {0} is unknown")]
    Kind(u8),
    /// The header is not what its kind asks for.
    #[error("message {kind} is malformed: {what}")]
    Malformed { kind: &'static str, what: String },
    /// Bytes behind the header's content.
    #[error("message {kind} has {bytes} bytes too many")]
    Trailing { kind: &'static str, bytes: u64 },
    /// A payload where none belongs, or none where one does.
    #[error("message {kind} with a payload of {bytes} bytes")]
    Payload { kind: &'static str, bytes: u64 },
}

/// The two lengths of a frame, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Bytes of the MessagePack header, 1 to [`FRAME_HEADER_BYTES_MAX`].
    pub header: usize,
    /// Bytes of the payload, 0 to [`FRAME_PAYLOAD_BYTES_MAX`].
    pub payload: usize,
}

impl Lengths {
    /// Reads and checks the prefix.
    pub fn decode(prefix: [u8; FRAME_PREFIX_BYTES]) -> Result<Self, FrameError> {
        let [h0, h1, h2, h3, p0, p1, p2, p3] = prefix;
        let header = u32::from_le_bytes([h0, h1, h2, h3]);
        let payload = u32::from_le_bytes([p0, p1, p2, p3]);
        let (met, wanted) = (u64::from(header), FRAME_HEADER_BYTES_MAX);
        if met == 0 {
            return Err(FrameError::NoHeader);
        }
        if met > wanted {
            return Err(FrameError::HeaderTooLong { met, wanted });
        }
        let (met, wanted) = (u64::from(payload), FRAME_PAYLOAD_BYTES_MAX);
        if met > wanted {
            return Err(FrameError::PayloadTooLong { met, wanted });
        }
        Ok(Self { header: u32_to_usize(header), payload: u32_to_usize(payload) })
    }

    /// The prefix for a frame of our own; its parts are within the bounds or we are at fault.
    pub fn encode(header: usize, payload: usize) -> [u8; FRAME_PREFIX_BYTES] {
        let (header, payload) = (to_u64(header), to_u64(payload));
        assert!(header > 0 && header <= FRAME_HEADER_BYTES_MAX, "header of {header} bytes formed");
        assert!(payload <= FRAME_PAYLOAD_BYTES_MAX, "payload of {payload} bytes formed");
        let mut prefix = [0; FRAME_PREFIX_BYTES];
        prefix[..4].copy_from_slice(&low_u32(header).to_le_bytes());
        prefix[4..].copy_from_slice(&low_u32(payload).to_le_bytes());
        prefix
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_bounded_before_anything_else() {
        let at = |header: u32, payload: u32| {
            let mut prefix = [0; 8];
            prefix[..4].copy_from_slice(&header.to_le_bytes());
            prefix[4..].copy_from_slice(&payload.to_le_bytes());
            Lengths::decode(prefix)
        };
        assert_eq!(at(1, 0), Ok(Lengths { header: 1, payload: 0 }));
        assert_eq!(at(0, 0), Err(FrameError::NoHeader));
        assert!(matches!(at(u32::MAX, 0), Err(FrameError::HeaderTooLong { .. })));
        assert!(matches!(at(262_145, 0), Err(FrameError::HeaderTooLong { .. })));
        assert!(matches!(at(1, u32::MAX), Err(FrameError::PayloadTooLong { .. })));
        assert!(at(262_144, 1_048_576).is_ok());
    }

    #[test]
    fn golden_prefix() {
        assert_eq!(Lengths::encode(1, 0x0102), [1, 0, 0, 0, 2, 1, 0, 0]);
    }
}
