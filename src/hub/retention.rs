//! Keeps CPs by themselves as the sources' files say, and drops those that are too many.
//!
//! One task of the hub looks once a second at each source whose file has `keep`; what is to be done
//! follows from the names that are kept ([`Retention::plan`]), so that a restart goes on where it
//! was. First it keeps, then it drops: a cut between leaves one too many. A CP that a reader has
//! open, or that cannot be dropped while another is, is dropped at a later look. What fails is shown
//! in the source's status, and tried again.
//!
//! A kept CP is not given up for space, unless the file says `drop_when_full`: then each CP that the
//! pool had no room for costs that source the oldest of those that were kept by themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::lane::{Lane, lock};
use super::shared::Shared;
use crate::pool::error::PoolError;
use crate::units::ids::SourceId;
use crate::units::machine;
use crate::units::names::{KeptName, SourceName};
use crate::units::numbers::CpNumber;
use crate::units::retention::{Retention, Slot};
use crate::volume::error::VolumeError;
use crate::volume::kept::drop_kept;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Bounds of the hours that a look without a new CP is good for.
const HOUR_SECONDS: i64 = 3600;

/// What was done, and what is wrong.
#[derive(Debug, Default)]
pub struct Keeping {
    failed: Mutex<BTreeMap<SourceName, String>>,
    full: Mutex<BTreeSet<SourceName>>,
    /// CPs that were kept, and dropped.
    pub counters: Counters,
}

/// Since the hub's start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Kept by themselves.
    pub kept: AtomicU64,
    /// Dropped by themselves.
    pub dropped: AtomicU64,
}

impl Keeping {
    /// Why CPs of a source are not kept or dropped as its file says.
    pub fn failure(&self, source: &SourceName) -> Option<String> {
        lock(&self.failed).get(source).cloned()
    }

    /// The pool had no room for a CP of that source.
    pub fn no_room(&self, source: &SourceName) {
        lock(&self.full).insert(source.clone());
    }
}

/// A source that is to be looked at.
#[derive(Debug)]
struct Due {
    lane: Arc<Lane>,
    retention: Retention,
    give_way: bool,
}

/// What a look found at rest: nothing is to be done before one of them changes.
type Rest = (Retention, CpNumber, i64);

/// Looks until `stop`.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut resting: BTreeMap<SourceName, Rest> = BTreeMap::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let due = due(&shared, &resting);
        if due.is_empty() {
            continue;
        }
        let (for_work, stop) = (Arc::clone(&shared), stop.clone());
        let work = move || {
            let going = due.into_iter().take_while(|_| !stop.is_cancelled());
            going.map(|due| (due.lane.name().clone(), look(&for_work, &due))).collect::<Vec<_>>()
        };
        let looked = match machine::blocking(work).await {
            Ok(looked) => looked,
            Err(error) => {
                tracing::error!(%error, "keeping CPs failed");
                continue;
            }
        };
        for (name, result) in looked {
            note(&shared, &mut resting, name, result);
        }
    }
}

fn due(shared: &Shared, resting: &BTreeMap<SourceName, Rest>) -> Vec<Due> {
    let full = std::mem::take(&mut *lock(&shared.keeping.full));
    let settings = shared.settings.load_full();
    let now = machine::unix_seconds();
    let mut due = Vec::new();
    for setting in settings.values() {
        let (Some(retention), Some(lane)) = (setting.keep, shared.lanes.get(&setting.name)) else {
            continue;
        };
        let give_way = retention.drop_when_full && full.contains(&setting.name);
        // A source that is served here makes its CPs without its lane.
        let served = shared.promoted.engine(&setting.name).is_some();
        let rest = (retention, lane.cursors().applied_cp, now.div_euclid(HOUR_SECONDS));
        if give_way || served || resting.get(&setting.name) != Some(&rest) {
            due.push(Due { lane, retention, give_way });
        }
    }
    due
}

fn note(
    shared: &Shared,
    resting: &mut BTreeMap<SourceName, Rest>,
    name: SourceName,
    result: Result<Option<Rest>, VolumeError>,
) {
    let mut failed = lock(&shared.keeping.failed);
    match result {
        Ok(rest) => {
            failed.remove(&name);
            match rest {
                Some(rest) => resting.insert(name, rest),
                None => resting.remove(&name),
            };
        }
        Err(error) => {
            let said = format!("CPs are not kept as its file says: {error}");
            if failed.get(&name) != Some(&said) {
                tracing::error!(source = %name, %error, "CPs are not kept as the file says");
                failed.insert(name.clone(), said);
            }
            resting.remove(&name);
        }
    }
}

/// Does what is to be done for one source; what it rests on then, if nothing is left to do.
fn look(shared: &Shared, due: &Due) -> Result<Option<Rest>, VolumeError> {
    let Due { lane, retention, give_way } = due;
    let (pool, source) = (&shared.pool, lane.source());
    // Before the row is read: a CP that comes between is met by the next look.
    let cursor = lane.cursors().applied_cp;
    let now = machine::unix_seconds();
    let Some(row) = pool.catalog().source(source)? else { return Ok(None) };
    let kept = || -> Result<Vec<(KeptName, CpNumber)>, PoolError> {
        let all = pool.catalog().kept(source)?;
        Ok(all.iter().map(|kept| (kept.row.name.clone(), kept.row.cp)).collect())
    };
    let (name, mut clean) = (lane.name(), true);
    if *give_way {
        let oldest = kept()?.into_iter().find(|(name, _)| Slot::of(name).is_some());
        if let Some((kept, _)) = oldest {
            tracing::warn!(source = %name, %kept, "the pool is full: given up, as the file says");
            clean = give_up(shared, source, &kept)?;
        }
    }
    let plan = retention.plan(now, row.applied, &kept()?);
    for keep in plan.keep {
        let met = pool.keep(source, keep.clone())?;
        shared.keeping.counters.kept.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(source = %name, name = %keep, cp = %met.cp, "CP is kept");
        // Another one was published meanwhile: it is looked at again.
        clean &= met.cp == row.applied;
    }
    for kept in plan.drop {
        clean &= give_up(shared, source, &kept)?;
    }
    let rest = (*retention, cursor, now.div_euclid(HOUR_SECONDS));
    Ok(clean.then_some(rest))
}

/// Drops one; whether it is gone. One that is read, or beside which another is dropped, stays for
/// now.
fn give_up(shared: &Shared, source: SourceId, name: &KeptName) -> Result<bool, VolumeError> {
    match drop_kept(&shared.pool, source, name) {
        Ok(dropped) => {
            shared.keeping.counters.dropped.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%name, cp = %dropped.cp, blocks = %dropped.blocks, "CP is dropped");
            Ok(true)
        }
        Err(VolumeError::Pool(PoolError::UnknownKept { .. })) => Ok(true),
        Err(VolumeError::Pool(PoolError::KeptBusy { .. })) => Ok(false),
        Err(error) => Err(error),
    }
}
