//! When each source's failover was last proven: tried with `--dry-run`, or done, and not refused.
//!
//! Remembered in the pool's catalog, so that a restart knows it: the newest of them that a note has
//! room for. A note that is not understood is none.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::limits::NOTE_BYTES_MAX;
use crate::pool::Pool;
use crate::units::machine;
use crate::units::names::SourceName;

const NAME: &str = "drills";

/// Seconds since 1970, by source.
type Times = BTreeMap<String, i64>;

/// The drills of a hub.
#[derive(Debug)]
pub(super) struct Drills {
    pool: Arc<Pool>,
    times: Mutex<Times>,
    /// Held from looking to writing: what is written last is what was there last.
    saving: Mutex<()>,
}

impl Drills {
    /// What the pool remembers.
    pub(super) fn load(pool: Arc<Pool>) -> Arc<Self> {
        let note = pool.catalog().note(NAME).ok().flatten();
        let times = note.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Arc::new(Self {
            pool,
            times: Mutex::new(times.unwrap_or_default()),
            saving: Mutex::default(),
        })
    }

    /// The last one of that source.
    pub(super) fn of(&self, source: &str) -> Option<i64> {
        self.lock().get(source).copied()
    }

    /// One has just ended well.
    pub(super) async fn done(self: &Arc<Self>, source: &SourceName) {
        self.lock().insert(source.to_string(), machine::unix_seconds());
        let own = Arc::clone(self);
        // The commit waits for the device.
        let saved = tokio::task::spawn_blocking(move || own.save()).await;
        let saved = saved.map_err(|error| error.to_string()).and_then(|saved| saved);
        if let Err(error) = saved {
            tracing::warn!(%source, error, "the time of the failover drill is not remembered");
        }
    }

    fn save(&self) -> Result<(), String> {
        let _one = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let note = note_of(self.lock().clone())?;
        self.pool.catalog().put_note(NAME, note).map_err(|error| error.to_string())
    }

    fn lock(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The newest that have room.
fn note_of(mut times: Times) -> Result<Vec<u8>, String> {
    loop {
        let note = serde_json::to_vec(&times).map_err(|error| error.to_string())?;
        if note.len() <= NOTE_BYTES_MAX {
            return Ok(note);
        }
        let mut by_age: Vec<i64> = times.values().copied().collect();
        let middle = by_age.len() / 8;
        let (_, oldest, _) = by_age.select_nth_unstable(middle);
        let oldest = *oldest;
        let (before, mut room) = (times.len(), middle + 1);
        times.retain(|_, at| {
            let goes = *at <= oldest && room > 0;
            room -= usize::from(goes);
            !goes
        });
        assert!(times.len() < before, "fewer each time");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MIB;
    use crate::pool::PoolOptions;
    use crate::pool::testing::new_device;

    /// Goal: another start knows the last drill; what was never drilled has none.
    #[tokio::test]
    async fn a_drill_is_remembered() {
        let device = new_device(64 * MIB);
        let pool = Pool::create(device, [1; 16], PoolOptions::default()).unwrap();
        let drills = Drills::load(pool.clone());
        assert_eq!(drills.of("filer-a"), None);
        drills.done(&"filer-a".parse().unwrap()).await;
        let at = drills.of("filer-a");
        assert!(at > Some(0));
        let again = Drills::load(pool.clone());
        assert_eq!((again.of("filer-a"), again.of("filer-b")), (at, None));
        pool.catalog().put_note(NAME, b"[1]".to_vec()).unwrap();
        assert_eq!(Drills::load(pool).of("filer-a"), None, "what is not understood is none");
    }

    #[test]
    fn the_newest_are_kept_where_all_have_no_room() {
        let times: Times = (0..5000).map(|at| (format!("filer-{:05}", 4999 - at), at)).collect();
        let kept: Times = serde_json::from_slice(&note_of(times).unwrap()).unwrap();
        assert!(kept.len() > 400, "{}", kept.len());
        let first = 5000 - i64::try_from(kept.len()).unwrap();
        assert!(kept.values().all(|at| *at >= first), "the oldest went");
        let same: Times = (0..5000).map(|at| (format!("filer-{at:05}"), 7)).collect();
        assert!(note_of(same).unwrap().len() > NOTE_BYTES_MAX / 2, "not all at once");
    }
}
