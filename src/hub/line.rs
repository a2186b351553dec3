//! The line in front of the ring: who is committed next when many wait.
//!
//! Records of up to [`SMALL_BYTES_MAX`] go before larger ones, so that a source that writes little
//! does not wait for what another has put in front of it. Of the larger ones not many more are in a
//! batch than make [`BATCH_BYTES`], so that whoever comes while it is written does not wait long, but
//! for a source that is alone or a device that takes long; one at least in every second batch. What a
//! source put in stays in its order. Pure.

use std::collections::VecDeque;
use std::collections::hash_map::{Entry, HashMap};
use std::time::Duration;

use crate::limits::KIB;
use crate::units::ids::SourceId;

/// Records up to here are small: one block or some; in tests both kinds are met.
const SMALL_BYTES_MAX: u64 = if cfg!(test) { 6 * KIB } else { 36 * KIB };
/// A batch with so much of what is large takes no more of it, unless nobody else has come for long or
/// batches take long.
const BATCH_BYTES: u64 = 256 * KIB;
/// Batches that take longer may have more of what is large: the device is slow to begin.
const LONG: Duration = Duration::from_millis(1);
/// So many batches of one source in a row, and nobody else is waited for.
const ALONE_BATCHES: u32 = 64;

/// What waits: whose it is, and bytes of its record.
pub(super) trait Waits {
    /// Whose it is.
    fn source(&self) -> SourceId;
    /// Bytes of its record.
    fn record_bytes(&self) -> u64;
}

/// How many of a source wait in either queue.
#[derive(Debug, Default)]
struct Count {
    small: usize,
    large: usize,
}

/// Who waits for the ring.
#[derive(Debug)]
pub(super) struct Line<T> {
    small: VecDeque<T>,
    /// What is large, and what its source put in behind that.
    large: VecDeque<T>,
    of: HashMap<SourceId, Count>,
    /// The last batch was full of small ones: a large one comes first in the next.
    passed_over: bool,
    /// Whose alone the last batches were, and how many.
    alone: (Option<SourceId>, u32),
    /// At least [`BATCH_BYTES`].
    batch_bytes: u64,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self {
            small: VecDeque::new(),
            large: VecDeque::new(),
            of: HashMap::new(),
            passed_over: false,
            alone: (None, 0),
            batch_bytes: BATCH_BYTES,
        }
    }
}

impl<T: Waits> Line<T> {
    /// Joins the line.
    pub(super) fn push(&mut self, item: T) {
        let count = self.of.entry(item.source()).or_default();
        if count.large > 0 || item.record_bytes() > SMALL_BYTES_MAX {
            count.large += 1;
            self.large.push_back(item);
        } else {
            count.small += 1;
            self.small.push_back(item);
        }
    }

    /// The next batch, of at most `bytes_max` bytes of records, but at least one if any waits.
    pub(super) fn take(&mut self, bytes_max: u64) -> Vec<T> {
        let (mut batch, mut bytes, mut larger) = (Vec::new(), 0, 0);
        let is_alone = self.alone.1 >= ALONE_BATCHES && self.of.len() == 1;
        if std::mem::take(&mut self.passed_over)
            && let Some(item) = self.pop_large()
        {
            (bytes, larger) = (item.record_bytes(), item.record_bytes());
            batch.push(item);
        }
        while let Some(next) = self.small.front().map(Waits::record_bytes) {
            if bytes + next > bytes_max && !batch.is_empty() {
                break;
            }
            bytes += next;
            batch.extend(self.pop_small());
        }
        while let Some(next) = self.first_large().map(Waits::record_bytes) {
            let enough = larger >= self.batch_bytes && !is_alone;
            if enough || bytes + next > bytes_max && !batch.is_empty() {
                break;
            }
            (bytes, larger) = (bytes + next, larger + next);
            batch.extend(self.pop_large());
        }
        self.passed_over = larger == 0 && self.first_large().is_some();
        self.note(&batch);
        batch
    }

    /// The last batch took so long until it was durable: that of a slow device is worth more bytes, up
    /// to `bytes_max`.
    pub(super) fn took(&mut self, length: Duration, bytes_max: u64) {
        let next = if length > LONG { self.batch_bytes * 2 } else { self.batch_bytes / 2 };
        self.batch_bytes = next.min(bytes_max).max(BATCH_BYTES);
    }

    /// Whose the batch is, if it is one source's.
    fn note(&mut self, batch: &[T]) {
        let Some(source) = batch.first().map(Waits::source) else { return };
        let is_his = batch.iter().all(|item| item.source() == source);
        let before = if self.alone.0 == Some(source) { self.alone.1 } else { 0 };
        self.alone = if is_his { (Some(source), before.saturating_add(1)) } else { (None, 0) };
    }

    /// The large one that may go: its source has nothing before it.
    fn first_large(&self) -> Option<&T> {
        let is_first = |item: &&T| self.of.get(&item.source()).is_none_or(|count| count.small == 0);
        self.large.front().filter(is_first)
    }

    fn pop_small(&mut self) -> Option<T> {
        let item = self.small.pop_front()?;
        self.left(item.source(), |count| &mut count.small);
        Some(item)
    }

    fn pop_large(&mut self) -> Option<T> {
        let item = self.large.pop_front()?;
        self.left(item.source(), |count| &mut count.large);
        Some(item)
    }

    fn left(&mut self, source: SourceId, place: impl FnOnce(&mut Count) -> &mut usize) {
        let Entry::Occupied(mut entry) = self.of.entry(source) else { return };
        *place(entry.get_mut()) -= 1;
        if entry.get().small + entry.get().large == 0 {
            entry.remove();
        }
    }

    /// Everybody who waits; the line is empty.
    pub(super) fn drain(&mut self) -> Vec<T> {
        self.of.clear();
        self.small.drain(..).chain(self.large.drain(..)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::RECORD_BYTES_MAX;

    /// Source, number within it, bytes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Item(u8, u32, u64);

    impl Waits for Item {
        fn source(&self) -> SourceId {
            SourceId([self.0; 16])
        }

        fn record_bytes(&self) -> u64 {
            self.2
        }
    }

    const MAX: u64 = 2 * RECORD_BYTES_MAX;

    /// Goal: one block does not wait for the megabytes that another source put in before it; they
    /// do not wait for ever.
    #[test]
    fn little_goes_before_much() {
        let mut line = Line::default();
        (0..8).for_each(|number| line.push(Item(1, number, 256 * KIB)));
        line.push(Item(2, 0, 5 * KIB));
        let batch = line.take(MAX);
        assert_eq!(batch, [Item(2, 0, 5 * KIB), Item(1, 0, 256 * KIB)]);
        // More of what is small than fits: a large one is in every second batch all the same.
        let many = u32::try_from(MAX / (4 * KIB) * 4).unwrap();
        (0..many).for_each(|number| line.push(Item(3, number, 4 * KIB)));
        let large = |batch: Vec<Item>| batch.iter().filter(|item| item.0 == 1).count();
        let met: Vec<usize> = (0..4).map(|_| large(line.take(MAX))).collect();
        assert_eq!(met, [0, 1, 0, 1]);
    }

    /// Goal: several large ones share a batch up to its size, whoever's they are.
    #[test]
    fn what_is_large_shares_a_batch_up_to_its_size() {
        let mut line = Line::default();
        (0..16).for_each(|number| line.push(Item(1, number, 64 * KIB)));
        assert_eq!(line.take(MAX).len(), 4);
        // Nobody else came for long: all that waits goes at once, until somebody comes.
        let mut alone = Line::default();
        (0..80).for_each(|number| {
            alone.push(Item(1, number, 64 * KIB));
            assert_eq!(alone.take(MAX).len(), 1);
        });
        (80..88).for_each(|number| alone.push(Item(1, number, 64 * KIB)));
        assert_eq!(alone.take(MAX).len(), 8);
        alone.push(Item(2, 0, 64 * KIB));
        (88..96).for_each(|number| alone.push(Item(1, number, 64 * KIB)));
        assert_eq!((alone.take(MAX).len(), alone.take(MAX).len()), (4, 4));
        // A device that takes long has more at once, one that does not less again.
        let mut line = Line::default();
        let took = |line: &mut Line<Item>, millis: u64| {
            line.took(Duration::from_millis(millis), MAX);
            (0..64).for_each(|number| line.push(Item(1, number, 64 * KIB)));
            let taken = line.take(MAX).len();
            line.drain();
            taken
        };
        let met: Vec<usize> =
            [5, 5, 5, 5, 5, 1, 0, 0, 0].map(|millis| took(&mut line, millis)).into();
        assert_eq!(met, [8, 16, 32, 32, 32, 17, 9, 5, 4]);
        // The control: one that is larger than that goes alone.
        let mut line = Line::default();
        (0..2).for_each(|number| line.push(Item(1, number, RECORD_BYTES_MAX)));
        assert_eq!((line.take(MAX).len(), line.take(MAX).len(), line.take(MAX).len()), (1, 1, 0));
    }

    proptest! {
        /// Goal: everything leaves once, each source's in its order, no batch is too large, and a
        /// batch is empty only if nobody waits.
        #[test]
        fn all_leave_in_their_order(
            steps in prop::collection::vec((0_u8..4, prop_oneof![1..SMALL_BYTES_MAX, SMALL_BYTES_MAX..=RECORD_BYTES_MAX], any::<bool>()), 1..200),
        ) {
            let (mut line, mut put, mut got) = (Line::default(), Vec::new(), Vec::new());
            let take = |line: &mut Line<Item>, got: &mut Vec<Item>| {
                let batch = line.take(MAX);
                assert!(batch.iter().map(|item| item.2).sum::<u64>() <= MAX, "{batch:?}");
                got.extend(&batch);
                batch.len()
            };
            for (at, (source, bytes, takes)) in (0..).zip(steps) {
                let item = Item(source, at, bytes);
                line.push(item);
                put.push(item);
                if takes {
                    prop_assert!(take(&mut line, &mut got) > 0);
                }
            }
            while take(&mut line, &mut got) > 0 {}
            prop_assert!(line.small.is_empty() && line.large.is_empty() && line.of.is_empty());
            for source in 0..4 {
                let of = |all: &[Item]| -> Vec<Item> { all.iter().filter(|item| item.0 == source).copied().collect() };
                prop_assert_eq!(of(&got), of(&put));
            }
        }
    }
}
