//! Times of the calendar as people read them.

/// A time, given in seconds since 1970.
pub fn time_of_day(seconds: i64) -> String {
    match jiff::Timestamp::from_second(seconds) {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
        Err(_) => "at an unknown time".to_owned(),
    }
}

/// The same as files have it, such as `2026-11-29T12:00:00Z`.
pub fn timestamp(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| String::new(), |time| time.to_string())
}

/// Reads that; a zone may be named as well.
pub fn parse_timestamp(text: &str) -> Option<i64> {
    text.parse::<jiff::Timestamp>().ok().map(|time| time.as_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00Z");
        assert_eq!(parse_timestamp("1970-01-01T01:00:00+01:00"), Some(0));
        assert_eq!(parse_timestamp(&timestamp(1_795_000_000)), Some(1_795_000_000));
        assert_eq!(time_of_day(60), "1970-01-01 00:01:00 UTC");
        for bad in ["", "tomorrow", "2026-11-29", "2026-11-29T12:00:00", "2026-13-29T12:00:00Z"] {
            assert_eq!(parse_timestamp(bad), None, "{bad}");
        }
    }
}
