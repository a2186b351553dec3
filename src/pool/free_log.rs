//! How the published free map is stored: pages for what is taken, a log for what is freed.
//!
//! A CP takes blocks in long runs, so its new blocks touch few pages of the map. What it frees
//! may be scattered over all of them: a CP of 64 MiB written at random would rewrite the whole
//! map of a large pool. So a commit writes the pages in which blocks were taken, **folds** a
//! bounded number of others, and logs the rest of its frees as runs, in one row. At open the log
//! is applied to the pages.
//!
//! Every page carries the number of the commit that wrote it, and every log row that of its own:
//! a logged free counts only for a page that is older. So a block that was freed, taken and
//! published again is not freed by the old row, and rows need not be deleted at once.
//!
//! Folding sweeps over the pages that have logged frees. When a sweep ends, every row from before
//! its beginning is in the pages, and is deleted.
//!
//! A row: pairs of LEB128 numbers, rising: blocks between the end of the last run and this one,
//! and blocks of the run. The first pair counts from the first block of the data area. Pure memory
//! and bytes; what does not decode is refused.

use std::collections::{BTreeMap, BTreeSet};

use crate::limits::POOL_CATALOG_SPARE;
use crate::units::convert::{low_u8, to_u64};
use crate::units::numbers::Pbn;

use super::bitmap::{Bitmap, Extent};
use super::blockset::BlockSet;
use super::label::Layout;

/// Pages with nothing but frees that one commit writes.
const FOLDED_PAGES_MAX: usize = if cfg!(test) { 2 } else { 64 };
/// Bytes that the frees of one page may take in the log; if they take more, the page is written.
const PAGE_LOG_BYTES_MAX: usize = 512;
/// Bytes of one row; what does not fit is written as pages.
const ROW_BYTES_MAX: usize = if cfg!(test) { 64 } else { 128 * 1024 };

/// What one commit stores of the free map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FreePlan {
    /// Number of the commit.
    pub(super) commit: u64,
    /// Pages to be written as they are now.
    pub(super) pages: Vec<u64>,
    /// The row of the log; empty if everything freed is in those pages.
    pub(super) row: Vec<u8>,
    /// Rows below this one are no longer needed.
    pub(super) obsolete_below: u64,
}

/// Which pages are behind the log.
#[derive(Debug)]
pub(super) struct FreeLog {
    /// Number of the next commit.
    next: u64,
    /// Pages with logged frees.
    stale: BTreeSet<u64>,
    /// The sweep goes on here.
    cursor: u64,
    /// Number of the commit before which the sweep began.
    sweep_began: u64,
    /// Bytes of the rows, by number.
    rows: BTreeMap<u64, u64>,
    bytes: u64,
    bytes_max: u64,
}

fn put_number(row: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        row.push(low_u8(value) | 0x80);
        value >>= 7;
    }
    row.push(low_u8(value));
}

fn take_number(row: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..63).step_by(7) {
        let (&byte, rest) = row.split_first()?;
        *row = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// Writes runs as a row.
#[derive(Debug, Default)]
struct RowWriter {
    bytes: Vec<u8>,
    end: u64,
}

impl RowWriter {
    fn put(&mut self, runs: &[Extent]) {
        for run in runs {
            put_number(&mut self.bytes, run.start - self.end);
            put_number(&mut self.bytes, run.count);
            self.end = run.start + run.count;
        }
    }
}

/// The runs of a row, or `None` if it is none of a map of so many blocks.
pub(super) fn decode_row(mut row: &[u8], blocks: u64) -> Option<Vec<Extent>> {
    let (mut runs, mut end) = (Vec::new(), 0u64);
    while !row.is_empty() {
        let start = end.checked_add(take_number(&mut row)?)?;
        let count = take_number(&mut row)?;
        end = start.checked_add(count).filter(|&end| count > 0 && end <= blocks)?;
        runs.push(Extent { start, count });
    }
    Some(runs)
}

impl FreeLog {
    /// The log of a new pool.
    pub(super) fn new(layout: &Layout) -> Self {
        Self::stored(BTreeMap::new(), BTreeSet::new(), 0, Self::bytes_max(layout))
    }

    /// Bytes that the log may take of a catalog: a quarter of what the free map may.
    pub(super) fn bytes_max(layout: &Layout) -> u64 {
        layout.catalog_bytes() / POOL_CATALOG_SPARE / 4
    }

    /// The log as it was stored: its rows with their sizes, the pages that lag behind them, and
    /// the highest number that any commit had.
    pub(super) fn stored(
        rows: BTreeMap<u64, u64>,
        stale: BTreeSet<u64>,
        last_commit: u64,
        bytes_max: u64,
    ) -> Self {
        let (next, bytes) = (last_commit + 1, rows.values().sum());
        Self { next, stale, cursor: 0, sweep_began: next, rows, bytes, bytes_max }
    }

    /// Decides what the next commit stores: in the pages `taken` blocks were taken, and `freed`
    /// were freed. `first` is the PBN of the block with index 0.
    pub(super) fn plan(&mut self, taken: &BTreeSet<u64>, freed: &BlockSet, first: u64) -> FreePlan {
        let commit = self.next;
        self.next += 1;
        let mut pages = taken.clone();
        self.fold(&mut pages);
        let row = self.log(&mut pages, freed, first);
        for page in &pages {
            self.stale.remove(page);
        }
        let obsolete_below = self.end_sweep();
        if !row.is_empty() {
            self.rows.insert(commit, to_u64(row.len()));
            self.bytes += to_u64(row.len());
        }
        FreePlan { commit, pages: pages.into_iter().collect(), row, obsolete_below }
    }

    /// Adds the next pages of the sweep.
    fn fold(&mut self, pages: &mut BTreeSet<u64>) {
        let next: Vec<u64> =
            self.stale.range(self.cursor..).take(FOLDED_PAGES_MAX).copied().collect();
        self.cursor = next.last().map_or(u64::MAX, |last| last + 1);
        pages.extend(next);
    }

    /// Logs the frees of pages that are not written, or adds the pages if that is shorter.
    fn log(&mut self, pages: &mut BTreeSet<u64>, freed: &BlockSet, first: u64) -> Vec<u8> {
        let room = usize::try_from(self.bytes_max.saturating_sub(self.bytes)).unwrap_or(0);
        let row_max = ROW_BYTES_MAX.min(room);
        let (mut row, mut direct) = (RowWriter::default(), 0);
        for (page, runs) in runs_by_page(freed, first) {
            if pages.contains(&page) {
                continue;
            }
            // Few pages are not worth a row that must be folded later.
            if direct < FOLDED_PAGES_MAX {
                direct += 1;
                pages.insert(page);
                continue;
            }
            let (length, end) = (row.bytes.len(), row.end);
            row.put(&runs);
            if row.bytes.len() > row_max || row.bytes.len() - length > PAGE_LOG_BYTES_MAX {
                row.bytes.truncate(length);
                row.end = end;
                pages.insert(page);
            } else {
                self.stale.insert(page);
            }
        }
        row.bytes
    }

    /// If the sweep is over, forgets the rows from before its beginning and begins the next.
    fn end_sweep(&mut self) -> u64 {
        if self.cursor != u64::MAX {
            return 0;
        }
        let below = self.sweep_began;
        let kept = self.rows.split_off(&below);
        self.bytes -= self.rows.values().sum::<u64>();
        self.rows = kept;
        (self.cursor, self.sweep_began) = (0, self.next);
        below
    }

    /// Bytes of the rows, for tests.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The freed blocks as runs, page by page, by index.
fn runs_by_page(freed: &BlockSet, first: u64) -> BTreeMap<u64, Vec<Extent>> {
    let mut pages: BTreeMap<u64, Vec<Extent>> = BTreeMap::new();
    freed.for_each(|Pbn(pbn)| {
        let start = pbn - first;
        let runs = pages.entry(Bitmap::page_of(start)).or_default();
        match runs.last_mut() {
            Some(last) if last.start + last.count == start => last.count += 1,
            _ => runs.push(Extent { start, count: 1 }),
        }
    });
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::bitmap::PAGE_BLOCKS;
    use crate::pool::testing::Chance;

    #[test]
    fn golden_bytes() {
        let mut row = RowWriter::default();
        row.put(&[Extent { start: 5, count: 1 }, Extent { start: 300, count: 200 }]);
        assert_eq!(row.bytes, [5, 1, 0xa6, 2, 0xc8, 1]);
        let runs = decode_row(&row.bytes, 500).unwrap();
        assert_eq!(runs, [Extent { start: 5, count: 1 }, Extent { start: 300, count: 200 }]);
        assert!(decode_row(&row.bytes, 499).is_none(), "past the end");
        assert!(decode_row(&row.bytes[..3], 500).is_none(), "cut");
        assert!(decode_row(&[5, 0], 500).is_none(), "empty run");
        assert!(decode_row(&[0xff; 12], u64::MAX).is_none(), "no number");
    }

    /// What is stored: pages with the commit that wrote them, and the rows of the log.
    struct Stored {
        pages: Vec<(u64, Vec<bool>)>,
        rows: BTreeMap<u64, Vec<u8>>,
    }

    impl Stored {
        fn store(&mut self, plan: &FreePlan, map: &[bool]) {
            let page_blocks = usize::try_from(PAGE_BLOCKS).unwrap();
            for &page in &plan.pages {
                let page = usize::try_from(page).unwrap();
                let bits = map.chunks(page_blocks).nth(page).unwrap().to_vec();
                self.pages[page] = (plan.commit, bits);
            }
            self.rows = self.rows.split_off(&plan.obsolete_below);
            if !plan.row.is_empty() {
                self.rows.insert(plan.commit, plan.row.clone());
            }
        }

        fn load(&self) -> Vec<bool> {
            let mut map: Vec<bool> =
                self.pages.iter().flat_map(|(_, bits)| bits.iter().copied()).collect();
            for (commit, row) in &self.rows {
                for run in decode_row(row, to_u64(map.len())).unwrap() {
                    for index in run.start..run.start + run.count {
                        let page = usize::try_from(Bitmap::page_of(index)).unwrap();
                        let index = usize::try_from(index).unwrap();
                        if self.pages[page].0 < *commit {
                            assert!(map[index], "freed once only");
                            map[index] = false;
                        }
                    }
                }
            }
            map
        }
    }

    /// Goal: whatever is taken and freed, pages and log together are the map, a commit writes a
    /// bounded number of pages beside those in which blocks were taken, and the log stays small.
    /// Method: random takes in runs and scattered frees against a plain map, loaded after each.
    #[test]
    fn pages_and_log_are_the_map() {
        const PAGES: u64 = 40;
        let mut chance = Chance::new(11);
        let blocks = usize::try_from(PAGES * PAGE_BLOCKS).unwrap();
        let mut map = vec![false; blocks];
        let page_blocks = usize::try_from(PAGE_BLOCKS).unwrap();
        let pages = map.chunks(page_blocks).map(|bits| (0, bits.to_vec())).collect();
        let mut stored = Stored { pages, rows: BTreeMap::new() };
        let mut log = FreeLog::stored(BTreeMap::new(), BTreeSet::new(), 0, 1000);
        let (mut logged, mut dropped, mut bounded) = (0, 0, 0);
        for round in 0..600 {
            let (mut taken, mut freed) = (BTreeSet::new(), BlockSet::default());
            let start = chance.below(PAGES * PAGE_BLOCKS - 100);
            for index in start..start + chance.below(100) {
                let at = usize::try_from(index).unwrap();
                if !map[at] {
                    map[at] = true;
                    taken.insert(Bitmap::page_of(index));
                }
            }
            for _ in 0..chance.below(60) {
                let index = chance.below(PAGES * PAGE_BLOCKS);
                let at = usize::try_from(index).unwrap();
                if map[at] {
                    map[at] = false;
                    freed.insert(Pbn(7 + index));
                }
            }
            let rows = stored.rows.len();
            let room = ROW_BYTES_MAX.min(1000 - usize::try_from(log.bytes()).unwrap());
            let plan = log.plan(&taken, &freed, 7);
            let beside = plan.pages.iter().filter(|page| !taken.contains(page)).count();
            // Room for another page's frees would have been used.
            let full = plan.row.len() + 16 > room;
            assert!(beside <= 2 * FOLDED_PAGES_MAX || full, "{beside} pages");
            bounded += usize::from(!full);
            stored.store(&plan, &map);
            assert!(stored.load() == map, "round {round}");
            assert!(log.bytes() <= 1000);
            logged += usize::from(!plan.row.is_empty());
            dropped += usize::from(stored.rows.len() < rows);
            if round % 50 == 49 {
                // A restart knows only what is stored.
                let sizes = stored.rows.iter().map(|(n, row)| (*n, to_u64(row.len()))).collect();
                let last = stored.pages.iter().map(|(commit, _)| *commit);
                let last = last.chain(stored.rows.keys().copied()).max().unwrap();
                log = FreeLog::stored(sizes, log.stale.clone(), last, 1000);
            }
        }
        assert!(logged > 50 && dropped > 10, "{logged} rows, {dropped} sweeps");
        assert!(bounded > 100, "{bounded} commits had room for a row");
    }
}
