//! Which source logs are written as they come, before a sync asks for them.
//!
//! A sync that finds a hundred megabytes in the page cache floods the disk, and everybody waits for
//! the ring meanwhile. So what a loud source has in its log is written as it comes. Loud is who had much to
//! sync when the ring wanted room: its next will be synced as well. Where the ring holds a source's log until its
//! CP is published, that is dropped without ever being written, and stays so. Pure.

use std::collections::btree_map::{BTreeMap, Entry};

use crate::limits::MIB;
use crate::units::ids::SourceId;

/// So much of a log is written at a time; with less unsynced, nobody is loud.
pub(super) const WRITEBACK_BYTES_MIN: u64 = MIB;
/// Logs that went one behind the other without a sync: whose they are is not loud any more.
const DROPS_MAX: u32 = 2;

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Loud {
    /// Bytes in the logs of each source that nobody has asked the kernel to write.
    dirty: BTreeMap<SourceId, u64>,
    /// Who is loud, and how often logs of his were dropped since the last sync.
    drops: BTreeMap<SourceId, u32>,
}

impl Loud {
    /// So many bytes were appended to a log.
    pub(super) fn appended(&mut self, source: SourceId, bytes: u64) {
        *self.dirty.entry(source).or_default() += bytes;
    }

    /// The ring wants room, so everything of the source will be synced.
    pub(super) fn room_wanted(&mut self, source: SourceId) {
        let much = self.dirty.get(&source) >= Some(&WRITEBACK_BYTES_MIN);
        if much || self.drops.contains_key(&source) {
            self.drops.insert(source, 0);
        }
    }

    /// Everything of the source was given to the kernel to sync.
    pub(super) fn synced(&mut self, source: SourceId) {
        self.dirty.remove(&source);
    }

    /// Logs of the source are gone.
    pub(super) fn dropped(&mut self, source: SourceId) {
        self.dirty.remove(&source);
        if let Entry::Occupied(mut drops) = self.drops.entry(source) {
            *drops.get_mut() += 1;
            if *drops.get() > DROPS_MAX {
                drops.remove();
            }
        }
    }

    /// The loud ones with much to write, taken for begun.
    pub(super) fn due(&mut self) -> Vec<SourceId> {
        let Self { dirty, drops } = self;
        let due: Vec<SourceId> = drops
            .keys()
            .filter(|source| dirty.get(source) >= Some(&WRITEBACK_BYTES_MIN))
            .copied()
            .collect();
        dirty.retain(|source, _| !due.contains(source));
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: SourceId = SourceId([1; 16]);
    const OTHER: SourceId = SourceId([2; 16]);

    /// Goal: what goes with its CP is never written early; what had to be synced is, until its logs
    /// go without that again.
    #[test]
    fn loud_is_who_had_much_to_sync() {
        let mut loud = Loud::default();
        loud.appended(ONE, WRITEBACK_BYTES_MIN);
        loud.appended(OTHER, WRITEBACK_BYTES_MIN - 1);
        assert_eq!(loud.due(), [], "nobody had to be synced yet");
        for source in [ONE, OTHER] {
            loud.room_wanted(source);
            loud.synced(source);
            loud.appended(source, WRITEBACK_BYTES_MIN);
        }
        assert_eq!(loud.due(), [ONE], "the other had little");
        assert_eq!(loud.due(), [], "once");
        loud.appended(ONE, WRITEBACK_BYTES_MIN - 1);
        assert_eq!(loud.due(), [], "less than is worth a call");
        loud.appended(ONE, 1);
        assert_eq!(loud.due(), [ONE]);
        // A sync of what is on its way keeps it loud, with however little left.
        loud.room_wanted(ONE);
        loud.synced(ONE);
        for still in [true, true, false] {
            loud.dropped(ONE);
            loud.appended(ONE, WRITEBACK_BYTES_MIN);
            assert_eq!(loud.due() == [ONE], still);
        }
        // Loud again, and what was dropped is not written.
        loud.synced(ONE);
        loud.appended(ONE, WRITEBACK_BYTES_MIN);
        loud.room_wanted(ONE);
        loud.dropped(ONE);
        assert_eq!(loud.due(), []);
    }
}
