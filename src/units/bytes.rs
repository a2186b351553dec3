//! Little-endian fields of headers and records.
//!
//! Pure. Used by every `format.rs` and record layout. Each reader wants its field inside the
//! bytes: the caller has a fixed-size array, and the places are constants.

/// The `u32` at `at`.
pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The `u64` at `at`.
pub fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

/// The 16 bytes at `at`: an id or a stream hash.
pub fn sixteen(bytes: &[u8], at: usize) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&bytes[at..at + 16]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_little_endian_and_stand_where_they_are_asked_for() {
        let bytes: [u8; 20] = std::array::from_fn(|at| u8::try_from(at).unwrap());
        assert_eq!(word(&bytes, 1), 0x0403_0201);
        assert_eq!(long(&bytes, 2), 0x0908_0706_0504_0302);
        assert_eq!(sixteen(&bytes, 4)[..], bytes[4..]);
    }
}
