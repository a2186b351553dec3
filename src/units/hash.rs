//! Hashes: of content, of a whole volume, of a source's history, and the CRC of bytes at rest.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// CRC-32C (Castagnoli) of `bytes`, as iSCSI and ext4 use it (RFC 3720, appendix B.4).
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_parts(&[bytes])
}

/// CRC-32C of several pieces as if they were one.
pub fn crc32c_parts(parts: &[&[u8]]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    for part in parts {
        digest.update(part);
    }
    super::convert::low_u32(digest.finalize())
}

macro_rules! hash_type {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; $bytes]);

        impl Default for $name {
            fn default() -> Self {
                Self::ZERO
            }
        }

        impl $name {
            /// All bytes zero.
            pub const ZERO: Self = Self([0; $bytes]);

            /// Whether all bytes are zero.
            pub fn is_zero(&self) -> bool {
                *self == Self::ZERO
            }

            /// Reads lower-case or upper-case hexadecimal digits.
            pub fn from_hex(text: &str) -> Option<Self> {
                let mut bytes = [0; $bytes];
                decode_hex(text, &mut bytes).then_some(Self(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serialize_fixed(&self.0, self, serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserialize_fixed(deserializer).map(Self)
            }
        }
    };
}
pub(super) use hash_type;

hash_type!(
    /// Content hash of a block or a node: first 16 bytes of BLAKE3, zero for a hole.
    ContentHash, 16);
hash_type!(
    /// The 32-byte hash that names the whole content of a volume.
    Root, 32);
hash_type!(
    /// h(n): names a source's history up to and with entry n.
    StreamHash, 16);

pub(super) fn decode_hex(text: &str, out: &mut [u8]) -> bool {
    let digits = text.as_bytes();
    if digits.len() != out.len() * 2 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return false;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let Some(value) =
            std::str::from_utf8(pair).ok().and_then(|p| u8::from_str_radix(p, 16).ok())
        else {
            return false;
        };
        *byte = value;
    }
    true
}

/// Hexadecimal text in JSON and TOML, bytes in MessagePack.
pub(super) fn serialize_fixed<S: Serializer>(
    bytes: &[u8],
    text: &dyn fmt::Display,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if serializer.is_human_readable() {
        serializer.collect_str(text)
    } else {
        serializer.serialize_bytes(bytes)
    }
}

pub(super) fn deserialize_fixed<'de, D: Deserializer<'de>, const N: usize>(
    deserializer: D,
) -> Result<[u8; N], D::Error> {
    struct Fixed<const N: usize>;
    impl<'de, const N: usize> de::Visitor<'de> for Fixed<N> {
        type Value = [u8; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{N} bytes or {} hexadecimal digits", N * 2)
        }

        fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<[u8; N], E> {
            bytes.try_into().map_err(|_| E::invalid_length(bytes.len(), &self))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<[u8; N], E> {
            let mut bytes = [0; N];
            if decode_hex(text, &mut bytes) {
                Ok(bytes)
            } else {
                Err(E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
    }
    if deserializer.is_human_readable() {
        deserializer.deserialize_str(Fixed::<N>)
    } else {
        deserializer.deserialize_bytes(Fixed::<N>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of CRC-32C for "123456789" (RFC 3720), and an independent library for all
    /// short lengths and alignments.
    #[test]
    fn crc_agrees_with_the_standard_and_with_another_library() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let bytes: Vec<u8> = (0u16..600).map(|n| n.to_le_bytes()[0].wrapping_mul(31)).collect();
        for start in 0..16 {
            for length in 0..512 {
                let part = &bytes[start..start + length];
                assert_eq!(crc32c(part), ::crc32c::crc32c(part), "start {start} length {length}");
            }
        }
    }

    #[test]
    fn a_hash_survives_json_and_messagepack_and_refuses_other_lengths() {
        let hash = ContentHash([7; 16]);
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(json, format!("\"{}\"", "07".repeat(16)));
        assert_eq!(serde_json::from_str::<ContentHash>(&json).unwrap(), hash);
        let packed = rmp_serde::to_vec(&hash).unwrap();
        assert_eq!(packed.len(), 18);
        assert_eq!(rmp_serde::from_slice::<ContentHash>(&packed).unwrap(), hash);
        assert!(serde_json::from_str::<ContentHash>("\"0707\"").is_err());
        assert!(rmp_serde::from_slice::<Root>(&packed).is_err());
        assert_eq!(ContentHash::from_hex("+7070707070707070707070707070707"), None);
    }
}
