//! Forgets a retired source: its images, kept CPs and logs, for good.
//!
//! Steps, each durable before the next, and each found done or undone by whoever asks again:
//!
//! 1. the source is retired, nobody serves it, nothing of it is under way, nobody fills a seed of it
//! 2. its seeds are given up; nobody begins another until the end
//! 3. its kept CPs are dropped
//! 4. a CP without content is published: the blocks come back
//! 5. volumes and row leave the catalog
//! 6. its log files are deleted; the lane and the actor go
//!
//! A cut leaves less of the source than before and the rest as it was: it is still retired, and is
//! forgotten by asking again. One that has nothing but seeds is a source as well: a start shows it as
//! retired as long as there is one. Behind 5 a restart finds records in the ring that nobody knows, and
//! passes over them.

use std::sync::Arc;

use super::Hub;
use super::extension::{Extension, State};
use super::failover::Refusal;
use super::lane::Lane;
use super::seed;
use super::shared::Shared;
use crate::pool::publish::Publish;
use crate::pool::write_set::Budget;
use crate::units::names::SourceName;
use crate::units::numbers::{BlockCount, CpNumber};
use crate::volume;
use crate::volume::writer::TreeWriter;

/// What was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forgotten {
    /// Volumes that are gone.
    pub volumes: usize,
    /// Kept CPs that are gone.
    pub kept: usize,
    /// Blocks that are free again.
    pub freed: BlockCount,
}

impl Hub {
    /// Forgets a retired source. Goes on to its end though the caller may have gone.
    pub async fn forget(&self, name: &SourceName) -> Result<Forgotten, Refusal> {
        if self.shared.settings.load().contains_key(name) {
            let reason = format!("source {name} is not retired: its file is there");
            let next = format!("remove {name}.toml from the sources directory first");
            return Err(Refusal::new(reason, &next));
        }
        let Some(entry) = self.shared.registry.get(name) else {
            return Err(Refusal::new(
                format!("there is no source {name}"),
                "see `mirrorhub status`",
            ));
        };
        let leaving = seed::leave(&self.shared, name)?;
        let (shared, source) = (self.shared.clone(), name.clone());
        // Tasks of their own: a caller that goes takes none of it along.
        let ended = tokio::spawn(async move {
            let (parts, of) = (shared.clone(), source.clone());
            let forgotten = gone(tokio::task::spawn_blocking(move || forget(&parts, &of)).await)?;
            shared.registry.remove(&source);
            leaving.has_left();
            if let Err(error) = entry.actor.send(super::actor::Forgotten).await {
                tracing::debug!(%source, %error, "its actor had ended");
            }
            Ok(forgotten)
        });
        gone(ended.await)
    }
}

/// What a task says, or that it has failed.
fn gone<T>(ended: Result<Result<T, Refusal>, tokio::task::JoinError>) -> Result<T, Refusal> {
    ended.unwrap_or_else(|error| Err(Refusal::new(error.to_string(), "see the log of the hub")))
}

fn forget(shared: &Arc<Shared>, name: &SourceName) -> Result<Forgotten, Refusal> {
    let free = |shared: &Shared| shared.pool.space().map_or(0, |space| space.free.0);
    let before = free(shared);
    let freed = |shared| BlockCount(free(shared).saturating_sub(before));
    let Some(lane) = shared.lanes.get(name) else {
        seed::forget(shared, name)?;
        return Ok(Forgotten { volumes: 0, kept: 0, freed: freed(shared) });
    };
    at_rest(shared, &lane)?;
    seed::forget(shared, name)?;
    let failed = |error: String| Refusal::new(error, "see the log of the hub, then ask again");
    let (pool, source) = (&shared.pool, lane.source());
    let _row = lane.row();
    let catalog = pool.catalog();
    let all = catalog.kept(source).map_err(|error| failed(error.to_string()))?;
    for kept in &all {
        volume::kept::drop_kept(pool, source, &kept.row.name)
            .map_err(|error| failed(error.to_string()))?;
    }
    let volumes = empty(shared, &lane).map_err(failed)?;
    shared.store.reset(source, None).map_err(|error| failed(error.to_string()))?;
    // What was filed and not synced, or belongs to a CP that never came, would never be safe otherwise, and
    // the ring ends at the oldest record that is not (R10).
    lane.give_up();
    shared.lanes.remove(name);
    shared.refills.forget(source);
    shared.shares.forget(name);
    tracing::warn!(source = %name, volumes, kept = all.len(), "source forgotten");
    Ok(Forgotten { volumes, kept: all.len(), freed: freed(shared) })
}

/// Nobody serves it, and nothing of it is on its way to its log or image.
fn at_rest(shared: &Shared, lane: &Lane) -> Result<(), Refusal> {
    let name = lane.name();
    let row = shared.pool.catalog().source(lane.source());
    let row = row.map_err(|error| Refusal::new(error.to_string(), "see the log of the hub"))?;
    let state = row.as_ref().map(Extension::of);
    if let Some(Ok(Extension { state: State::FailingOver | State::Promoted, .. })) = state {
        let reason = format!("source {name} is served here");
        return Err(Refusal::new(reason, "`mirrorhub failback` gives it to a filer first"));
    }
    let cursors = lane.cursors();
    let moving = cursors.fault.is_none()
        && (cursors.durable != cursors.staged || cursors.drained != cursors.durable);
    if moving || lane.job().is_some() {
        let reason = format!("something of source {name} is still being stored");
        return Err(Refusal::new(reason, "ask again in a moment"));
    }
    Ok(())
}

/// Publishes a CP without content and takes the rows away; returns the number of volumes.
fn empty(shared: &Shared, lane: &Lane) -> Result<usize, String> {
    let (pool, source) = (&shared.pool, lane.source());
    let catalog = pool.catalog();
    let Some(row) = catalog.source(source).map_err(|error| error.to_string())? else {
        return Ok(0);
    };
    let volumes = catalog.volumes(source).map_err(|error| error.to_string())?;
    // What came of a first pass that never ended.
    volume::work::give_up(pool, source).map_err(|error| error.to_string())?;
    if volumes.iter().any(|volume| !volume.tree.top.is_hole()) {
        let cp = CpNumber(row.highest_cp.max(row.applied).0 + 1);
        let mut write_set = pool.begin(Budget::Reserve);
        let mut roots = Vec::new();
        for volume in &volumes {
            let writer = TreeWriter::new(pool, &mut write_set, volume.key, volume.tree, cp);
            let mut writer = writer.map_err(|error| error.to_string())?;
            let blocks = volume.tree.size.blocks().0;
            let root = writer
                .put_hole_range(crate::units::numbers::Vbn(0), blocks)
                .and_then(|()| writer.finish());
            roots.push((volume.key.volume, root.map_err(|error| error.to_string())?));
        }
        let published = pool.publish(Publish {
            write_set,
            source,
            cp,
            sequence: row.sequence,
            stream_hash: row.stream_hash,
            epoch: row.epoch,
            generation: None,
            extension: None,
            volumes: roots,
        });
        published.map_err(|error| error.to_string())?;
    }
    for volume in &volumes {
        catalog.remove_volume(volume.key).map_err(|error| error.to_string())?;
    }
    catalog.remove_source(source).map_err(|error| error.to_string())?;
    Ok(volumes.len())
}
