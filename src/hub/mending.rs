//! Rot at a hub: what its pool lost of an image is asked of the source, and what the source lost is
//! told to it.
//!
//! Called by readers of images, by `verify` and checks, and by the applier, from threads that may
//! block; a question waits a bounded time. What was mended is written to a new place with the next
//! CP of the source, which is asked to make one for it.

use std::sync::Arc;

use super::actor::{AskPlace, AskRewrite};
use super::lane::Lane;
use super::shared::Shared;
use crate::pool::Pin;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::units::hash::ContentHash;
use crate::units::numbers::Vbn;
use crate::volume::error::{TreePlace, VolumeError};
use crate::volume::mend::{self, Depth, Fetched, Mending, Mends, OtherEnd};
use crate::volume::serve;
use crate::wire::message::{Frame, WantPlace};

/// The source, as far as it has the same content.
struct Source<'a> {
    shared: &'a Shared,
    lane: &'a Lane,
}

impl OtherEnd for Source<'_> {
    fn fetch(&self, place: TreePlace, hash: ContentHash) -> Result<Fetched, String> {
        let entry = self.shared.registry.get(self.lane.name());
        let entry = entry.filter(|entry| entry.snapshot.load().connected);
        let entry = entry.ok_or_else(|| "the source is not connected".to_owned())?;
        self.lane.questions.ask(place, hash, |want| {
            let asked = entry.actor.try_send(AskPlace(want));
            asked.map_err(|error| format!("the source cannot be asked: {error}"))
        })
    }
}

/// Mends a part of a tree of that source.
pub fn mend(
    shared: &Shared,
    lane: &Lane,
    (key, tree): (VolumeKey, &TreeRoot),
    range: (Vbn, u64),
    depth: Depth,
) -> Result<Mending, VolumeError> {
    let other = Source { shared, lane };
    let mending = mend::mend(&shared.pool, (key.volume, tree), range, depth, &other)?;
    shared.mender.note(key, &mending);
    if !mending.mended.is_empty()
        && let Some(entry) = shared.registry.get(lane.name())
        && entry.actor.try_send(AskRewrite).is_err()
    {
        tracing::debug!(source = %lane.name(), "what was mended is written with a later CP");
    }
    Ok(mending)
}

/// For readers of the images of one source.
pub struct Reading {
    /// The hub.
    pub shared: Arc<Shared>,
    /// The source.
    pub lane: Arc<Lane>,
}

impl std::fmt::Debug for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reading").field("source", self.lane.name()).finish_non_exhaustive()
    }
}

impl Mends for Reading {
    fn mend(&self, pin: &Pin, range: (Vbn, u64)) -> bool {
        let (key, tree) = (pin.key(), pin.tree());
        let mending = mend(&self.shared, &self.lane, (key, &tree), range, Depth::Data);
        mending.is_ok_and(|mending| !mending.mended.is_empty())
    }
}

/// Mends the published images of a source, each as a whole.
pub fn mend_all(shared: &Shared, lane: &Lane, depth: Depth) {
    let Ok(pins) = shared.pool.pin_source(lane.source()) else { return };
    for pin in &pins {
        let (key, tree) = (pin.key(), pin.tree());
        let whole = (Vbn(0), tree.size.blocks().0);
        match mend(shared, lane, (key, &tree), whole, depth) {
            Ok(mending) if mending.lost.is_empty() && depth == Depth::Data => {
                shared.mender.read_whole(key);
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(source = %lane.name(), %error, "not mended"),
        }
    }
}

/// Answers what the source asks, from its image or a kept CP of it. Blocks.
pub fn serve(shared: &Shared, lane: &Lane, want: &WantPlace) -> Frame {
    let (pool, source) = (&shared.pool, lane.source());
    let newest = pool.pin(source, want.volume).ok();
    let kept = pool.catalog().kept(source).unwrap_or_default();
    let kept =
        kept.iter().filter_map(|kept| pool.pin_kept(source, &kept.row.name, want.volume).ok());
    serve::answer(newest.into_iter().chain(kept), want)
}
