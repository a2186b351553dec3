//! A set of numbers kept as ranges: holes of a volume, known bytes of a block.
//!
//! Pure. Invariant: ranges are not empty, do not touch each other, and stand in rising order, so
//! equal sets are equal values.

use std::collections::BTreeMap;

/// Half-open ranges of `u64`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Start to end.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Adds `start..end`; joins what touches it.
    pub fn insert(&mut self, mut start: u64, mut end: u64) {
        if start >= end {
            return;
        }
        if let Some((&before, &before_end)) = self.ranges.range(..=start).next_back()
            && before_end >= start
        {
            start = before;
            end = end.max(before_end);
        }
        while let Some((&inside, &inside_end)) = self.ranges.range(start..=end).next() {
            self.ranges.remove(&inside);
            end = end.max(inside_end);
        }
        self.ranges.insert(start, end);
    }

    /// Whether `at` is in it.
    pub fn contains(&self, at: u64) -> bool {
        self.ranges.range(..=at).next_back().is_some_and(|(_, &end)| end > at)
    }

    /// Whether all of `start..end` is in it.
    pub fn covers(&self, start: u64, end: u64) -> bool {
        let before = self.ranges.range(..=start).next_back();
        start >= end || before.is_some_and(|(_, &known)| known >= end)
    }

    /// The ranges, rising.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.ranges.iter().map(|(&start, &end)| (start, end))
    }

    /// What of `start..end` is in it, rising.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let before = self.ranges.range(..start).next_back();
        before
            .into_iter()
            .chain(self.ranges.range(start..end.max(start)))
            .map(move |(&from, &to)| (from.max(start), to.min(end)))
            .filter(|(from, to)| from < to)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain set of numbers.
        #[test]
        fn agrees_with_a_set(
            inserts in prop::collection::vec((0..40_u64, 0..12_u64), 0..12),
            (from, span) in (0..50_u64, 0..20_u64),
        ) {
            let mut ranges = RangeSet::default();
            let mut oracle = BTreeSet::new();
            for (start, length) in inserts {
                ranges.insert(start, start + length);
                oracle.extend(start..start + length);
            }
            let all: BTreeSet<u64> = ranges.iter().flat_map(|(a, b)| a..b).collect();
            prop_assert_eq!(&all, &oracle);
            let pairs: Vec<_> = ranges.iter().collect();
            prop_assert!(pairs.windows(2).all(|pair| pair[0].1 < pair[1].0), "ranges touch");
            let part: Vec<u64> = ranges.within(from, from + span).flat_map(|(a, b)| a..b).collect();
            let wanted: Vec<u64> = oracle.range(from..from + span).copied().collect();
            prop_assert_eq!(&part, &wanted);
            for at in 0..60 {
                prop_assert_eq!(ranges.contains(at), oracle.contains(&at));
            }
            let covered = (from..from + span).all(|at| oracle.contains(&at));
            prop_assert_eq!(ranges.covers(from, from + span), covered);
        }
    }
}
