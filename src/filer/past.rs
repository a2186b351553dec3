//! Whether a hub's image is this source's past (R5), and of which CP each volume's image is (R8).
//!
//! Called by the forwarder with each Welcome; reads the history of the own CPs, so it blocks. The
//! image as a whole is named by CP and place. A volume that was left out for a while (R20) has an
//! image of an older CP, which is found by its root: equal content is all that a base has to be.

use std::collections::BTreeMap;

use super::shared::Shared;
use crate::pool::error::PoolError;
use crate::pool::pointer::TreeRoot;
use crate::pool::rows::HistoryRow;
use crate::record::marks::Place;
use crate::session::primary::Past;
use crate::units::hash::Root;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::wire::message::{VolumeOffer, VolumeRoot, Welcome};

/// Volumes whose image is of an older CP than the hub's.
pub type Older = BTreeMap<VolumeNumber, CpNumber>;

/// What the image is to this source: the place of one of its own CPs proves its past, whatever it
/// holds; an image without a CP is everybody's. What births tell of it is known if every volume has
/// the root of that CP, or of an older one; else the trees are to be compared.
pub fn look(shared: &Shared, welcome: &Welcome) -> Result<(Past, Older), PoolError> {
    let (cp, place) = (welcome.applied_cp, Place::from(welcome.applied));
    let (volumes, mut older) = (shared.volumes(), Older::new());
    if cp == CpNumber(0) {
        let is_empty = |root: &VolumeRoot| {
            let own = volumes.iter().find(|own| own.number == root.volume);
            own.is_none_or(|own| empty(own) == root.root)
        };
        let past = match (place == Place::default(), welcome.roots.iter().all(is_empty)) {
            (true, true) => Past::Known,
            (true, false) => Past::Unknown,
            (false, _) => Past::No,
        };
        return Ok((past, older));
    }
    let row = shared.pool.catalog().history(shared.source, cp)?;
    let Some(row) = row.filter(|row| row.is_at(place)) else { return Ok((Past::No, older)) };
    let refused = |volume| welcome.refused.iter().any(|no| no.volume == volume);
    for volume in volumes.iter().filter(|volume| !refused(volume.number)) {
        let there = welcome.roots.iter().find(|root| root.volume == volume.number);
        let there = there.map_or_else(|| empty(volume), |root| root.root);
        // A volume that is new here was empty then.
        if root_at(&row, volume.number).is_none_or(|here| here == there) {
            continue;
        }
        match base_of(shared, volume, there, cp)? {
            Some(base) => drop(older.insert(volume.number, base)),
            None => return Ok((Past::Unknown, Older::new())),
        }
    }
    Ok((Past::Known, older))
}

/// The newest own CP before `cp` at which the volume was what `root` names.
fn base_of(
    shared: &Shared,
    volume: &VolumeOffer,
    root: Root,
    cp: CpNumber,
) -> Result<Option<CpNumber>, PoolError> {
    if root == empty(volume) {
        return Ok(Some(CpNumber(0)));
    }
    for number in (1..cp.0).rev() {
        let row = shared.pool.catalog().history(shared.source, CpNumber(number))?;
        // Numbers are passed over, and the oldest rows go: what is gone cannot be found.
        if row.is_some_and(|row| root_at(&row, volume.number) == Some(root)) {
            return Ok(Some(CpNumber(number)));
        }
    }
    Ok(None)
}

fn root_at(row: &HistoryRow, volume: VolumeNumber) -> Option<Root> {
    row.roots.iter().find(|(met, _)| *met == volume).map(|(_, root)| *root)
}

fn empty(volume: &VolumeOffer) -> Root {
    TreeRoot::empty(volume.size).root()
}
