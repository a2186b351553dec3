//! Conversions between integer widths, in one place.
//!
//! The crate bans `as`. What the target machine makes lossless is converted here, once; whatever
//! can lose something is `try_from` at its place.

const _: () = assert!(usize::BITS == 64, "mirrorhub is written for 64-bit machines");

/// A length or index in memory as a 64-bit number.
#[expect(clippy::as_conversions, reason = "usize has 64 bits, asserted above")]
pub const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// A 64-bit number as a length or index in memory.
#[expect(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits, asserted above"
)]
pub const fn to_usize(value: u64) -> usize {
    value as usize
}

/// A 32-bit number as a length or index in memory.
#[expect(clippy::as_conversions, reason = "usize has 64 bits, asserted above")]
pub const fn u32_to_usize(value: u32) -> usize {
    value as usize
}

/// The low 32 bits.
#[expect(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "low bits are asked for"
)]
pub const fn low_u32(value: u64) -> u32 {
    value as u32
}

/// The low 8 bits.
#[expect(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "low bits are asked for"
)]
pub const fn low_u8(value: u64) -> u8 {
    value as u8
}

/// A count as a number for a gauge or a ratio; exact below 2^53.
#[expect(
    clippy::as_conversions,
    clippy::cast_precision_loss,
    reason = "gauges are floats; counts above 2^53 may round"
)]
pub const fn to_f64(value: u64) -> f64 {
    value as f64
}

/// `value` rounded up to a multiple of `unit`, or `None` past the end of the range.
pub const fn round_up(value: u64, unit: u64) -> Option<u64> {
    value.checked_next_multiple_of(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_bits_are_cut_and_rounding_stops_at_the_end() {
        assert_eq!(low_u32(0x1_0000_0002), 2);
        assert_eq!(low_u8(0x1ff), 0xff);
        assert_eq!(round_up(1, 512), Some(512));
        assert_eq!(round_up(512, 512), Some(512));
        assert_eq!(round_up(u64::MAX, 512), None);
    }
}
