//! Whose writes the hub is busy with: each source's share of what became durable lately.
//!
//! Asked by whoever collects the metrics, as often as he likes: the share is that of the time since the
//! newest look that is at least [`WINDOW`] old, or since the start where there is none.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::units::convert::to_f64;

/// The shortest time that a share is told of.
const WINDOW: Duration = Duration::from_secs(10);
/// Looks that come closer are one.
const SPACING: Duration = Duration::from_secs(1);

/// Bytes of each source since the start.
type Totals = BTreeMap<String, u64>;

/// What was seen at the looks before.
#[derive(Debug, Default)]
pub(super) struct Shares {
    looks: VecDeque<(Instant, Totals)>,
}

impl Shares {
    /// The share of each source, 0 to 1; 0 for all where nothing was written.
    pub(super) fn of(&mut self, now: Instant, totals: Totals) -> BTreeMap<String, f64> {
        let is_old = |look: &(Instant, Totals)| now.saturating_duration_since(look.0) >= WINDOW;
        while self.looks.get(1).is_some_and(is_old) {
            self.looks.pop_front();
        }
        let base = self.looks.front().filter(|look| is_old(look)).map(|(_, totals)| totals);
        let since = |name: &String, total: u64| {
            // One that came again counts anew.
            total.saturating_sub(base.and_then(|base| base.get(name).copied()).unwrap_or(0))
        };
        let written: Vec<_> =
            totals.iter().map(|(name, total)| (name.clone(), since(name, *total))).collect();
        let all = to_f64(written.iter().map(|(_, bytes)| bytes).sum::<u64>().max(1));
        if self.looks.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= SPACING) {
            self.looks.push_back((now, totals));
        }
        written.into_iter().map(|(name, bytes)| (name, to_f64(bytes) / all)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a share is that of the window, not of all time and not of the last moment.
    #[test]
    fn shares_are_of_the_last_looks() {
        let (mut shares, start) = (Shares::default(), Instant::now());
        let mut look = |second: u64, a: u64, b: u64| {
            let totals = [("a", a), ("b", b)].map(|(name, bytes)| (name.to_owned(), bytes));
            let told = shares.of(start + Duration::from_secs(second), totals.into());
            (told["a"], told["b"])
        };
        let near = |met: (f64, f64), wanted: (f64, f64)| {
            assert!((met.0 - wanted.0).abs() + (met.1 - wanted.1).abs() < 1e-9, "{met:?}");
        };
        near(look(0, 0, 0), (0.0, 0.0));
        near(look(5, 300, 100), (0.75, 0.25));
        near(look(10, 300, 300), (0.5, 0.5));
        // Since second 5: the first was quiet.
        near(look(15, 300, 500), (0.0, 1.0));
        near(look(40, 300, 500), (0.0, 0.0));
        // A counter that began anew is no share below nothing.
        near(look(60, 0, 600), (0.0, 1.0));
        for milli in 0..5000 {
            shares.of(start + Duration::from_millis(60_000 + milli), Totals::new());
        }
        assert!(shares.looks.len() < 15, "bounded, however often it is asked");
    }
}
