//! Who is to have a source's volumes, and how a filer that never had them becomes their home.
//!
//! Called by [`super::run`] before the first round. Nothing is decided here: whoever follows has
//! found room and has recorded that it serves nobody; the volumes stay the hub's until the
//! hand-over.
//!
//! * without a name: the filer that had them last, or the one they were made on, or a new filer
//!   under their name that has nothing of its own
//! * with a name: that filer, which must be in session with volumes of its own
//!
//! A filer that does not follow for the source yet is asked (`Adopt`): it looks for room, makes the
//! rows and an NVRAM durably, answers, and follows under the source's identity.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{AGAIN, Connected, Order, SEE_LOG};
use crate::hub::actor::AskAdopt;
use crate::hub::extension::{Extension, State};
use crate::hub::failover::Refusal;
use crate::hub::lane::lock;
use crate::hub::shared::Shared;
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::units::ids::{SourceId, random_u64};
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::numbers::BlockCount;
use crate::volume::walk::Walk;
use crate::wire::homes::Adopt;
use crate::wire::message::VolumeOffer;

/// How long a filer may take to make what it needs: its NVRAM is written from end to end.
const ADOPT_MAX: Duration = Duration::from_secs(120);
/// How long until it follows then.
const COME_MAX: Duration = Duration::from_secs(20);

/// The follower that is to have the volumes of `row`.
pub(super) async fn find(
    shared: &Arc<Shared>,
    row: &SourceRow,
    extension: &Extension,
    to: Option<&SourceName>,
) -> Result<Connected, Refusal> {
    let made_on = [row.id];
    let had_it = [extension.home_of(row.id), row.id];
    let wanted = match to {
        Some(to) if *to != row.name => return other(shared, row, extension, to).await,
        Some(_) => made_on.as_slice(),
        None => had_it.as_slice(),
    };
    let known = wanted.iter().find_map(|filer| shared.failbacks.get(&row.name, *filer));
    if let Some(follower) = known {
        return Ok(follower);
    }
    let rows = shared.pool.catalog().sources();
    let rows = rows.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
    // Another filer's home is taken by its name only.
    let elsewhere = |follower: &Connected| rows.iter().any(|row| row.id == follower.filer());
    let mut all = shared.failbacks.of(&row.name);
    all.retain(|follower| !elsewhere(follower));
    // One that has become the source already, and had not taken over yet, comes first.
    all.sort_by_key(|follower| follower.is_newcomer(row.id));
    match all.into_iter().next() {
        Some(follower) if follower.is_newcomer(row.id) => {
            newcomer(shared, row, extension, follower).await
        }
        Some(follower) => Ok(follower),
        None => Err(away(&row.name)),
    }
}

/// The same, asking nobody: none if it is one that would have to be made the source's home first.
pub(super) fn known(
    shared: &Shared,
    row: &SourceRow,
    extension: &Extension,
    to: Option<&SourceName>,
) -> Result<Option<Connected>, Refusal> {
    let failed = |error: &dyn std::fmt::Display| Refusal::new(error.to_string(), SEE_LOG);
    let rows = shared.pool.catalog().sources().map_err(|error| failed(&error))?;
    let wanted = match to {
        Some(to) if *to != row.name => {
            let there = rows.iter().find(|there| there.name == *to);
            let there = there.ok_or_else(|| {
                let reason = format!("there is no filer {to} here");
                Refusal::new(reason, "`mirrorhub status` lists the sources")
            })?;
            vec![Extension::of(there).map_err(|reason| failed(&reason))?.home_of(there.id)]
        }
        Some(_) => vec![row.id],
        None => vec![extension.home_of(row.id), row.id],
    };
    let known = wanted.iter().find_map(|filer| shared.failbacks.get(&row.name, *filer));
    let other = to.is_some_and(|to| *to != row.name);
    if known.is_none() && !other && shared.failbacks.of(&row.name).is_empty() {
        return Err(away(&row.name));
    }
    Ok(known)
}

fn away(name: &SourceName) -> Refusal {
    let reason = format!("the filer of {name} is not connected, nor a new one under its name");
    let next = format!(
        "start `mirrorhub source` on it, with the state it had or with an empty data_dir: it \
         follows by itself; or name another: `mirrorhub failback {name} --to FILER`"
    );
    Refusal::new(reason, next)
}

/// A new filer becomes the source's.
async fn newcomer(
    shared: &Arc<Shared>,
    row: &SourceRow,
    extension: &Extension,
    follower: Connected,
) -> Result<Connected, Refusal> {
    let filer = follower.filer();
    let adopt = question(shared, row, extension).await?;
    let (adopted, answer) = oneshot::channel();
    let gone = || Refusal::new("the new filer went away", AGAIN);
    let order = Order::Adopt { adopt, adopted };
    follower.orders.send(order).await.map_err(|_| gone())?;
    // Its connection ends when nobody has orders for it.
    drop(follower);
    let answer = tokio::time::timeout(ADOPT_MAX, answer).await.map_err(|_| slow())?;
    answer.map_err(|_| gone())??;
    comes(shared, row, filer).await
}

/// Another filer, which has volumes of its own.
async fn other(
    shared: &Arc<Shared>,
    row: &SourceRow,
    extension: &Extension,
    to: &SourceName,
) -> Result<Connected, Refusal> {
    let rows = shared.pool.catalog().sources();
    let rows = rows.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
    let Some(there) = rows.iter().find(|there| there.name == *to) else {
        let reason = format!("there is no filer {to} here");
        return Err(Refusal::new(reason, "`mirrorhub status` lists the sources"));
    };
    let of_it = Extension::of(there).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
    if of_it.state != State::Mirror {
        let reason = format!("{to} itself is {} here", of_it.state.word());
        return Err(Refusal::new(reason, "name a filer that is in session with its own volumes"));
    }
    let filer = of_it.home_of(there.id);
    if let Some(follower) = shared.failbacks.get(&row.name, filer) {
        return Ok(follower);
    }
    let adopt = question(shared, row, extension).await?;
    let absent = || {
        let reason = format!("filer {to} is not in session: it cannot be asked");
        Refusal::new(reason, "start it, and wait until it is in-sync")
    };
    let entry = shared.registry.get(to).ok_or_else(absent)?;
    lock(&shared.invited).insert(row.name.clone(), to.clone());
    let answer = entry.actor.send(AskAdopt(adopt)).await.map_err(|_| absent())?;
    let answer = tokio::time::timeout(ADOPT_MAX, answer).await.map_err(|_| slow())?;
    answer.map_err(|_| absent())??;
    comes(shared, row, filer).await
}

fn slow() -> Refusal {
    let reason = format!("the filer has not made room in {} s", ADOPT_MAX.as_secs());
    Refusal::new(reason, "see its log; the hub goes on serving")
}

/// Waits until it follows as the source.
async fn comes(shared: &Shared, row: &SourceRow, filer: SourceId) -> Result<Connected, Refusal> {
    let mut came = shared.failbacks.came.subscribe();
    let follows = async {
        loop {
            came.borrow_and_update();
            let follower = shared.failbacks.get(&row.name, filer);
            if let Some(follower) = follower.filter(|follower| !follower.is_newcomer(row.id)) {
                return Some(follower);
            }
            if came.changed().await.is_err() {
                return None;
            }
        }
    };
    let follower = tokio::time::timeout(COME_MAX, follows).await.ok().flatten();
    follower.ok_or_else(|| {
        let reason = format!("the filer has room for {}, and does not follow", row.name);
        Refusal::new(reason, "see its log; the hub goes on serving, run the command again")
    })
}

/// What a filer must know to find room.
async fn question(
    shared: &Arc<Shared>,
    row: &SourceRow,
    extension: &Extension,
) -> Result<Adopt, Refusal> {
    let failed = |error: &dyn std::fmt::Display| Refusal::new(error.to_string(), SEE_LOG);
    let volumes = shared.pool.catalog().volumes(row.id).map_err(|error| failed(&error))?;
    let offer = |row: VolumeRow| VolumeOffer {
        number: row.key.volume,
        id: row.id,
        size: row.size(),
        name: row.name,
    };
    let (counting, source) = (shared.clone(), row.id);
    let used = machine::blocking(move || used(&counting, source)).await;
    let used = used.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
    Ok(Adopt {
        token: random_u64().map_err(|error| failed(&error))?,
        hub: shared.hub,
        source: row.id,
        name: row.name.clone(),
        epoch: row.epoch,
        volumes: volumes.into_iter().map(offer).collect(),
        used,
        policy: extension.policy,
    })
}

/// Blocks of the published image, nodes among them. Reads every node.
fn used(shared: &Shared, source: SourceId) -> Result<BlockCount, String> {
    let mut used = 0_u64;
    for pin in shared.pool.pin_source(source).map_err(|error| error.to_string())? {
        let walk = Walk::new(&shared.pool, &pin.tree()).map_err(|error| error.to_string())?;
        for item in walk.with_nodes() {
            let item = item.map_err(|error| error.to_string())?;
            used += u64::from(!item.pointer.is_hole());
        }
    }
    Ok(BlockCount(used))
}
