//! Sizes, counts and times in words, for people. Programs take `--json`.

use bytesize::ByteSize;

/// `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// `12 s`, `0.3 s`, `3m 4s`, `3h 4m`, `2d 5h`.
pub fn time(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    if seconds < 0.05 {
        return "0 s".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    // Whole seconds as text, then as a number: the one float to integer way that clippy grants.
    let Ok(whole) = format!("{seconds:.0}").parse::<u64>() else { return "?".into() };
    let (minutes, hours, days) = (whole / 60, whole / 3600, whole / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{whole} s"),
        (0, 0, _) => format!("{minutes}m {}s", whole % 60),
        (0, _, _) => format!("{hours}h {}m", minutes % 60),
        (_, _, _) => format!("{days}d {}h", hours % 24),
    }
}

/// `1 source`, `2 sources`.
pub fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Whole percent; 0 of nothing.
pub fn percent(part: u64, whole: u64) -> u128 {
    u128::from(part) * 100 / u128::from(whole.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(4096), "4.0 KiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        for (seconds, text) in [
            (0.0, "0 s"),
            (0.04, "0 s"),
            (0.25, "0.2 s"),
            (9.94, "9.9 s"),
            (9.96, "10 s"),
            (59.4, "59 s"),
            (59.6, "1m 0s"),
            (184.0, "3m 4s"),
            (11_040.0, "3h 4m"),
            (190_800.0, "2d 5h"),
            (-1.0, "?"),
            (f64::NAN, "?"),
            (f64::INFINITY, "?"),
        ] {
            assert_eq!(time(seconds), text, "{seconds}");
        }
        assert_eq!(count(1, "source"), "1 source");
        assert_eq!(count(0, "source"), "0 sources");
        assert_eq!(percent(1, 0), 100);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
    }
}
