//! A volume becomes larger while clients are connected.
//!
//! Called by `checkpoint`, which is the only one that changes sizes, and by `recover`. The file asks
//! for a size ([`super::Filer::grow`]); then, between two CPs:
//!
//! 1. the size is durable in the own catalog, as what the next tree may have
//! 2. whatever is frozen from here on gets a tree of that size
//! 3. the session hears of it before it hears of a CP of that size: the hub is told by a new Hello,
//!    and notes it durably before Welcome. In one session all CPs are of the sizes its Hello says
//! 4. the CP is made, be it of nothing; clients that connect from then on see the new size, under
//!    `stop` once the hub has noted it. What is connected keeps the size it was told
//!
//! So no entry lies behind the end of the volume before the size is durable at this end, and none
//! reaches the hub before it is durable there. A cut behind 1 is gone on with by the start: it forces
//! the CP. Between 1 and 4 no CP of the older size is sent: passes wait for that CP.
//!
//! The forwarder takes word of a larger size behind transfers that are formed, and still nothing leaves too
//! early: who may write behind the old end was let in by step 4, so the word lay there before such a transfer
//! was formed; it is taken in the same round, before anything of that round is sent, and ends the session.
//! Of a CP none is under way then: this thread asks for the size between two CPs, and the session has
//! let go of one before it says that it is done. The simulation judges each transfer that comes to its hub.
//!
//! The content hash of a tree covers content only, and what is behind the end counts as zero: growing
//! writes the nodes above the old top and nothing else.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use super::order::VolumeShape;
use super::shared::{Pins, Shared};
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::units::numbers::{ByteCount, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::geometry::Geometry;
use crate::wire::message::VolumeOffer;

/// The volumes with the sizes that are asked for, if any of these is larger than the announced one.
fn due(shared: &Shared) -> Option<Vec<VolumeOffer>> {
    let wanted = shared.wanted.lock().unwrap_or_else(PoisonError::into_inner);
    if wanted.is_empty() {
        return None;
    }
    let mut volumes = shared.volumes().to_vec();
    let mut larger = false;
    for volume in &mut volumes {
        let size = wanted.iter().find(|(name, _)| *name == volume.name).map(|(_, size)| *size);
        if let Some(size) = size.filter(|size| *size > volume.size) {
            (volume.size, larger) = (size, true);
        }
    }
    (larger && !shared.sole).then_some(volumes)
}

/// Whether the file asks for a larger volume.
pub(super) fn is_due(shared: &Shared) -> bool {
    due(shared).is_some()
}

/// Steps 1 to 3.
pub(super) fn grow(shared: &Shared) -> Result<(), VolumeError> {
    let Some(volumes) = due(shared) else { return Ok(()) };
    let mut shapes = BTreeMap::new();
    for volume in &volumes {
        let Geometry { blocks, height } = Geometry::of(volume.size)?;
        shapes.insert(volume.number, VolumeShape { blocks, height });
    }
    for (old, new) in shared.volumes().iter().zip(&volumes) {
        if new.size > old.size {
            let key = VolumeKey { source: shared.source, volume: new.number };
            shared.pool.catalog().grow_volume(key, new.size)?;
            tracing::info!(source = %shared.name, volume = %new.name, from = %old.size,
                to = %new.size, "the volume grows");
        }
    }
    shared.order.grow(shapes);
    let volumes = Arc::new(volumes);
    shared.volumes.store(Arc::clone(&volumes));
    shared.session.grown(volumes);
    Ok(())
}

/// The announced size of a volume.
pub(super) fn size_of(shared: &Shared, volume: VolumeNumber) -> Option<ByteCount> {
    shared.volumes().iter().find(|offer| offer.number == volume).map(|offer| offer.size)
}

/// Volumes whose newest tree is smaller than announced: number, that tree, announced size.
pub(super) fn outgrown<'a>(
    shared: &Shared,
    pins: &'a Pins,
) -> impl Iterator<Item = (VolumeNumber, TreeRoot, ByteCount)> + use<'a> {
    let volumes = shared.volumes();
    pins.iter().filter_map(move |(&number, pin)| {
        let size = volumes.iter().find(|offer| offer.number == number)?.size;
        let tree = pin.tree();
        (tree.size < size).then_some((number, tree, size))
    })
}
