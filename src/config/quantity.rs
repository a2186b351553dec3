//! Sizes and durations as people write them: `64MiB`, `10s`. Pure.
//!
//! A number without a unit is refused, so that nobody has to know whether a key counts bytes or
//! MiB. Sizes are powers of two and say so: `MB` is refused with its neighbour `MiB`.

use std::time::Duration;

use crate::units::numbers::ByteCount;

/// Why a text is no size or no duration, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// What was met, as a sentence.
    pub met: String,
    /// What to do, as a sentence.
    pub fix: String,
}

impl Unfit {
    fn new(met: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { met: met.into(), fix: fix.into() }
    }
}

/// Units of a size, largest first.
const SIZE_UNITS: &[(&str, u64)] =
    &[("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
/// Units of a duration in milliseconds, largest first.
const TIME_UNITS: &[(&str, u64)] =
    &[("h", 60 * 60 * 1000), ("m", 60 * 1000), ("s", 1000), ("ms", 1)];

/// What a size looks like, for messages.
pub const SIZE_WANTED: &str = "a size: a whole number and KiB, MiB, GiB or TiB";
/// What a duration looks like, for messages.
pub const DURATION_WANTED: &str = "a duration: a whole number and ms, s, m or h";

/// Reads a size.
pub fn parse_size(text: &str) -> Result<ByteCount, Unfit> {
    let (number, unit) = split(text);
    let what = "size";
    let Some(factor) = factor(SIZE_UNITS, unit) else { return Err(size_unit(text, number, unit)) };
    whole(text, what, number, factor, SIZE_UNITS).map(ByteCount)
}

/// Reads a duration.
pub fn parse_duration(text: &str) -> Result<Duration, Unfit> {
    let (number, unit) = split(text);
    let what = "duration";
    let Some(factor) = factor(TIME_UNITS, unit) else { return Err(time_unit(text, number, unit)) };
    whole(text, what, number, factor, TIME_UNITS).map(Duration::from_millis)
}

/// The size in the largest unit that divides it; bytes if none does.
pub fn format_size(size: ByteCount) -> String {
    in_largest(size.0, SIZE_UNITS).unwrap_or_else(|| format!("{} bytes", size.0))
}

/// The duration in the largest unit that divides it.
pub fn format_duration(duration: Duration) -> String {
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    in_largest(ms, TIME_UNITS).unwrap_or_else(|| format!("{ms}ms"))
}

fn in_largest(value: u64, units: &[(&str, u64)]) -> Option<String> {
    if value == 0 {
        return units.last().map(|(unit, _)| format!("0{unit}"));
    }
    let fit = units.iter().find(|(_, factor)| value.is_multiple_of(*factor));
    fit.map(|(unit, factor)| format!("{}{unit}", value / factor))
}

fn factor(units: &[(&str, u64)], wanted: &str) -> Option<u64> {
    units.iter().find(|(unit, _)| *unit == wanted).map(|(_, factor)| *factor)
}

/// The number in front and the unit behind it, spaces around both dropped.
fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'));
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    (number.trim(), unit.trim())
}

/// A number times its unit's factor; only whole numbers that fit.
fn whole(
    text: &str,
    what: &str,
    number: &str,
    factor: u64,
    units: &[(&str, u64)],
) -> Result<u64, Unfit> {
    if text.chars().any(char::is_whitespace) {
        let close: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        return Err(Unfit::new(
            format!("{text:?} has a space in it"),
            format!("write \"{close}\""),
        ));
    }
    if number.bytes().all(|b| b.is_ascii_digit()) && !number.is_empty() {
        let value = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        let fix = "write a smaller number";
        return value.ok_or_else(|| Unfit::new(format!("{text} is past every {what}"), fix));
    }
    let fix = match exact(number, factor).and_then(|value| in_largest(value, units)) {
        Some(instead) => format!("write \"{instead}\""),
        None => format!("write a whole number, such as \"{}\"", example(what)),
    };
    Err(Unfit::new(format!("{text:?} is no {what}: the number is not whole"), fix))
}

/// `1.5` times 1024 is 1536: the decimal times the factor where that is a whole number.
fn exact(number: &str, factor: u64) -> Option<u64> {
    let (integer, fraction) = number.split_once('.')?;
    if fraction.is_empty() || fraction.len() > 6 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let scale = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let parts = integer.parse::<u64>().ok()?.checked_mul(scale)?;
    let value = parts.checked_add(fraction.parse().ok()?)?.checked_mul(factor)?;
    value.is_multiple_of(scale).then_some(value / scale)
}

fn example(what: &str) -> &'static str {
    if what == "size" { "512MiB" } else { "10s" }
}

fn size_unit(text: &str, number: &str, unit: &str) -> Unfit {
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    if !digits {
        return Unfit::new(format!("{text:?} is no size"), "write a number and a unit: \"512MiB\"");
    }
    if unit.is_empty() {
        let instead = number.parse().ok().and_then(|value| in_largest(value, SIZE_UNITS));
        let fix = match instead {
            Some(instead) if number != "0" => {
                format!("if it counts bytes, write \"{instead}\"; else give its unit")
            }
            _ => format!("write its unit: \"{number}MiB\""),
        };
        return Unfit::new(format!("{number} is no size: it has no unit"), fix);
    }
    let letter = unit.chars().next().map(|c| c.to_ascii_uppercase());
    let binary = SIZE_UNITS.iter().find(|(name, _)| name.chars().next() == letter);
    match (binary, unit.to_ascii_lowercase().as_str()) {
        (Some((name, _)), "kb" | "mb" | "gb" | "tb") => Unfit::new(
            format!("{text:?} is no size: {unit} is a power of ten, {name} a power of two"),
            format!("write \"{number}{name}\""),
        ),
        (Some((name, _)), "k" | "m" | "g" | "t" | "kib" | "mib" | "gib" | "tib") => Unfit::new(
            format!("{text:?} is no size: the unit is written {name}"),
            format!("write \"{number}{name}\""),
        ),
        _ => Unfit::new(
            format!("{text:?} is no size: {unit:?} is no unit of it"),
            format!("write \"{number}MiB\", or with KiB, GiB or TiB"),
        ),
    }
}

fn time_unit(text: &str, number: &str, unit: &str) -> Unfit {
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    if !digits {
        return Unfit::new(
            format!("{text:?} is no duration"),
            "write a number and a unit: \"10s\"",
        );
    }
    let fix = match unit.to_ascii_lowercase().as_str() {
        "" => {
            return Unfit::new(
                format!("{number} is no duration: it has no unit"),
                format!("write \"{number}s\""),
            );
        }
        "sec" | "secs" | "second" | "seconds" => format!("write \"{number}s\""),
        "min" | "mins" | "minute" | "minutes" => format!("write \"{number}m\""),
        "hr" | "hour" | "hours" => format!("write \"{number}h\""),
        "msec" | "millis" | "milliseconds" => format!("write \"{number}ms\""),
        "d" | "day" | "days" => match number.parse::<u64>().ok().and_then(|d| d.checked_mul(24)) {
            Some(hours) => format!("write \"{hours}h\""),
            None => "write a smaller number".into(),
        },
        _ => match sum_of_parts(text) {
            Some(instead) => format!("one number and one unit: write \"{instead}\""),
            None => format!("write \"{number}s\", or with ms, m or h"),
        },
    };
    Unfit::new(format!("{text:?} is no duration: {unit:?} is no unit of it"), fix)
}

/// `1h30m` in one unit, if that is what the text is.
fn sum_of_parts(text: &str) -> Option<String> {
    let (mut rest, mut sum) = (text.trim(), 0_u64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, behind) = rest.split_at(digits);
        let letters = behind.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(behind.len());
        let (unit, tail) = behind.split_at(letters);
        let part = number.parse::<u64>().ok()?.checked_mul(factor(TIME_UNITS, unit)?)?;
        sum = sum.checked_add(part)?;
        rest = tail.trim_start();
    }
    in_largest(sum, TIME_UNITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_read_back_what_is_printed() {
        for (text, bytes) in [
            ("1KiB", 1 << 10),
            ("1536KiB", 1536 << 10),
            ("512MiB", 512 << 20),
            ("3GiB", 3 << 30),
            ("16TiB", 16 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(ByteCount(bytes)));
            assert_eq!(format_size(ByteCount(bytes)), text);
        }
        for (text, ms) in [("1ms", 1), ("1500ms", 1500), ("10s", 10_000), ("5m", 300_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)));
            assert_eq!(format_duration(Duration::from_millis(ms)), text);
        }
        assert_eq!(format_duration(Duration::from_secs(24 * 3600)), "24h");
        assert_eq!(format_size(ByteCount(0)), "0KiB");
        assert_eq!(format_size(ByteCount(1025)), "1025 bytes");
    }

    #[test]
    fn a_wrong_size_is_met_with_what_to_write() {
        for (text, part, fix) in [
            ("1024", "it has no unit", "\"1KiB\""),
            ("512", "it has no unit", "\"512MiB\""),
            ("64MB", "MB is a power of ten, MiB a power of two", "\"64MiB\""),
            ("64kb", "power of ten", "\"64KiB\""),
            ("64mib", "the unit is written MiB", "\"64MiB\""),
            ("1G", "the unit is written GiB", "\"1GiB\""),
            ("1.5GiB", "not whole", "\"1536MiB\""),
            ("1.3KiB", "not whole", "\"512MiB\""),
            ("64 MiB", "a space in it", "\"64MiB\""),
            ("big", "is no size", "\"512MiB\""),
            ("", "is no size", "\"512MiB\""),
            ("-1MiB", "is no size", "\"512MiB\""),
            ("7parsec", "is no unit of it", "\"7MiB\""),
            ("99999999999GiB", "past every size", "smaller"),
            ("99999999999999999999MiB", "past every size", "smaller"),
        ] {
            let unfit = parse_size(text).unwrap_err();
            assert!(unfit.met.contains(part), "{text}: {unfit:?}");
            assert!(unfit.fix.contains(fix), "{text}: {unfit:?}");
        }
    }

    #[test]
    fn a_wrong_duration_is_met_with_what_to_write() {
        for (text, part, fix) in [
            ("60", "60 is no duration", "\"60s\""),
            ("1d", "is no unit of it", "\"24h\""),
            ("10sec", "is no unit of it", "\"10s\""),
            ("1h30m", "is no unit of it", "\"90m\""),
            ("1.5s", "not whole", "\"1500ms\""),
            ("5 s", "a space in it", "\"5s\""),
            ("soon", "is no duration", "\"10s\""),
            ("5x", "is no unit of it", "\"5s\""),
            ("99999999999999999h", "past every duration", "smaller"),
        ] {
            let unfit = parse_duration(text).unwrap_err();
            assert!(unfit.met.contains(part), "{text}: {unfit:?}");
            assert!(unfit.fix.contains(fix), "{text}: {unfit:?}");
        }
    }
}
