//! Which source logs are written as they come, before a sync asks for them.
//!
//! A sync that finds a hundred megabytes in the page cache floods the disk, and everybody waits for
//! the ring meanwhile. So what a loud source has in its log is written as it comes. Loud is who had much to
//! sync when the ring wanted room: its next will be synced as well. Where the ring holds a source's log until its
//! CP is published, that is dropped without ever being written, and stays so.
//!
//! What loud sources have unsynced is bounded as well, however large the ring is: a start reads it, from
//! ring and logs, before anybody is served. They alone are synced for that, and it keeps none of them loud. Pure.

use std::collections::btree_map::{BTreeMap, Entry};

use crate::limits::MIB;
use crate::units::ids::SourceId;

/// So much of a log is written at a time; with less unsynced, nobody is loud.
pub(super) const WRITEBACK_BYTES_MIN: u64 = if cfg!(test) { MIB / 16 } else { MIB };
/// With so much unsynced of loud sources everything is synced.
const UNSYNCED_BYTES_MAX: u64 = if cfg!(test) { 4 * MIB } else { 512 * MIB };
/// Logs that went one behind the other while the ring wanted no room: whose they are is not loud any more.
const DROPS_MAX: u32 = 16;

/// A loud one.
#[derive(Debug, Default)]
struct Source {
    /// Logs of it that were dropped since the ring last wanted room.
    drops: u32,
    /// Bytes appended since the last sync, or since a log was dropped.
    unsynced: u64,
}

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Loud {
    /// Bytes in the logs of each source that nobody has asked the kernel to write.
    dirty: BTreeMap<SourceId, u64>,
    loud: BTreeMap<SourceId, Source>,
    /// Sum of what they have unsynced.
    unsynced: u64,
    /// Loud ones whose log has come to be worth a call.
    ready: Vec<SourceId>,
}

impl Loud {
    /// So many bytes were appended to a log.
    pub(super) fn appended(&mut self, source: SourceId, bytes: u64) {
        let dirty = self.dirty.entry(source).or_default();
        let before = *dirty;
        *dirty += bytes;
        let Some(loud) = self.loud.get_mut(&source) else { return };
        loud.unsynced += bytes;
        self.unsynced += bytes;
        if before < WRITEBACK_BYTES_MIN && *dirty >= WRITEBACK_BYTES_MIN {
            self.ready.push(source);
        }
    }

    /// The ring wants room, so everything of the source will be synced.
    pub(super) fn room_wanted(&mut self, source: SourceId) {
        if self.dirty.get(&source) >= Some(&WRITEBACK_BYTES_MIN) {
            self.loud.entry(source).or_default();
        }
        if let Some(loud) = self.loud.get_mut(&source) {
            loud.drops = 0;
        }
    }

    /// Everything of the source was given to the kernel to sync.
    pub(super) fn synced(&mut self, source: SourceId) {
        self.dirty.remove(&source);
        if let Some(loud) = self.loud.get_mut(&source) {
            self.unsynced -= std::mem::take(&mut loud.unsynced);
        }
    }

    /// Everything that lies in the ring was synced: of one whose records left it otherwise nothing is
    /// unsynced either.
    pub(super) fn all_synced(&mut self) {
        self.loud.values_mut().for_each(|loud| loud.unsynced = 0);
        self.unsynced = 0;
    }

    /// Who is loud.
    pub(super) fn is_loud(&self, source: SourceId) -> bool {
        self.loud.contains_key(&source)
    }

    /// Logs of the source are gone. What its next one has by then is not counted any more.
    pub(super) fn dropped(&mut self, source: SourceId) {
        self.synced(source);
        if let Entry::Occupied(mut loud) = self.loud.entry(source) {
            loud.get_mut().drops += 1;
            if loud.get().drops > DROPS_MAX {
                loud.remove();
            }
        }
    }

    /// Loud sources have more unsynced than a start should find.
    pub(super) fn is_much(&self) -> bool {
        self.unsynced >= UNSYNCED_BYTES_MAX
    }

    /// The loud ones with much to write, taken for begun.
    pub(super) fn due(&mut self) -> Vec<SourceId> {
        let mut due = std::mem::take(&mut self.ready);
        // Some of them were synced or dropped meanwhile.
        due.retain(|source| self.dirty.remove(source) >= Some(WRITEBACK_BYTES_MIN));
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
        for drops in 1..=DROPS_MAX + 1 {
            loud.dropped(ONE);
            loud.appended(ONE, WRITEBACK_BYTES_MIN);
            // Synced because it was much, not because the ring wanted room.
            loud.all_synced();
            assert_eq!(loud.due() == [ONE], drops <= DROPS_MAX);
            assert_eq!(loud.is_loud(ONE), drops <= DROPS_MAX);
        }
        // Loud again, and what was dropped is not written.
        loud.synced(ONE);
        loud.appended(ONE, WRITEBACK_BYTES_MIN);
        loud.room_wanted(ONE);
        loud.dropped(ONE);
        assert_eq!(loud.due(), []);
    }

    /// Goal: what loud ones have unsynced is known, and gone with a sync, a drop and their loudness.
    #[test]
    fn what_a_start_would_find_is_bounded() {
        let mut loud = Loud::default();
        loud.appended(ONE, 4 * UNSYNCED_BYTES_MAX);
        assert!(!loud.is_much(), "the ring may hold all of it until its CP");
        loud.room_wanted(ONE);
        loud.synced(ONE);
        for gone in [Loud::synced, Loud::dropped] {
            loud.appended(OTHER, UNSYNCED_BYTES_MAX);
            loud.appended(ONE, UNSYNCED_BYTES_MAX - 1);
            assert!(!loud.is_much());
            loud.appended(ONE, 1);
            assert!(loud.is_much());
            gone(&mut loud, ONE);
            assert!(!loud.is_much() && loud.unsynced == 0);
        }
        // A source that was forgotten is not synced: it does not have all others synced for ever.
        loud.room_wanted(ONE);
        loud.appended(ONE, UNSYNCED_BYTES_MAX);
        loud.all_synced();
        assert!(!loud.is_much());
        loud.appended(ONE, UNSYNCED_BYTES_MAX);
        loud.synced(ONE);
        assert_eq!(loud.unsynced, 0);
    }
}
