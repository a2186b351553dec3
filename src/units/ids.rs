//! Random ids. Names are for people, ids decide (invariant 12).

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::hash::{decode_hex, deserialize_fixed, hash_type, serialize_fixed};

hash_type!(
    /// Names a source for ever; made when its state directory is made.
    SourceId, 16);
hash_type!(
    /// Names a volume for ever.
    VolumeId, 16);
hash_type!(
    /// Names a hub for ever.
    HubId, 16);
hash_type!(
    /// Names a pool: the devices that belong together.
    PoolId, 16);
hash_type!(
    /// Names a RAID array: the devices that belong together.
    ArrayId, 16);
hash_type!(
    /// Names one device of a RAID array.
    MemberId, 16);
hash_type!(
    /// Names a ring or a source log file: records of another one are not ours.
    RingId, 16);

/// The kernel gave no random bytes.
#[derive(Debug, thiserror::Error)]
#[error("no random bytes from the kernel: {0}")]
pub struct RandomError(String);

/// Fills `bytes` from the kernel's random source.
pub fn random_bytes(bytes: &mut [u8]) -> Result<(), RandomError> {
    #[cfg(test)]
    if super::machine::simulated::fill(bytes) {
        return Ok(());
    }
    getrandom::fill(bytes).map_err(|error| RandomError(error.to_string()))
}

/// A random 64-bit number, never zero.
pub fn random_u64() -> Result<u64, RandomError> {
    let mut bytes = [0; 8];
    random_bytes(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes).max(1))
}

macro_rules! random {
    ($($name:ident)*) => { $(
        impl $name {
            /// A new one, from the kernel's random source.
            pub fn random() -> Result<Self, RandomError> {
                let mut bytes = [0; 16];
                random_bytes(&mut bytes)?;
                Ok(Self(bytes))
            }
        }
    )* };
}
random!(SourceId VolumeId HubId PoolId ArrayId MemberId RingId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ids_differ_and_read_back_from_text() {
        let (a, b) = (SourceId::random().unwrap(), SourceId::random().unwrap());
        assert_ne!(a, b);
        assert_eq!(SourceId::from_hex(&a.to_string()), Some(a));
    }
}
