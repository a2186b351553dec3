//! Rot at a source: what its device lost is asked of the hub, and what the hub lost is told to it.
//!
//! Called by exports, the checkpoint thread and checks when a read of the own tree fails its check
//! ([`mend()`]; blocks, a bounded time), and by the forwarder with what the hub asks ([`serve()`]).
//! What was mended is written to a new place by the next own CP, which is made for it.

use super::shared::Shared;
use crate::pool::Pin;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::units::hash::ContentHash;
use crate::units::numbers::{Vbn, VolumeNumber};
use crate::volume::error::{TreePlace, VolumeError};
use crate::volume::mend::{self, Depth, Fetched, Mending, OtherEnd};
use crate::volume::serve;
use crate::wire::message::{Frame, WantPlace};

/// The hub, as far as it has the same content.
struct Hub<'a>(&'a Shared);

impl OtherEnd for Hub<'_> {
    fn fetch(&self, place: TreePlace, hash: ContentHash) -> Result<Fetched, String> {
        let Self(shared) = self;
        if shared.sole {
            return Err("there is no other end".to_owned());
        }
        if !shared.is_connected() {
            return Err("the hub is not connected".to_owned());
        }
        shared.questions.ask(place, hash, |want| {
            shared.session.want_place(want);
            Ok(())
        })
    }
}

/// Mends a part of a tree; whether anything can be read again that could not.
pub fn mend(
    shared: &Shared,
    (volume, tree): (VolumeNumber, &TreeRoot),
    range: (Vbn, u64),
    depth: Depth,
) -> Result<Mending, VolumeError> {
    let mending = mend::mend(&shared.pool, (volume, tree), range, depth, &Hub(shared))?;
    let key = VolumeKey { source: shared.source, volume };
    shared.mender.note(key, &mending);
    if !mending.mended.is_empty() {
        shared.checkpoint.force();
    }
    Ok(mending)
}

/// The same for a pinned volume as a whole.
pub fn mend_pin(shared: &Shared, pin: &Pin, depth: Depth) -> Result<Mending, VolumeError> {
    let tree = pin.tree();
    let key = pin.key();
    let mending = mend(shared, (key.volume, &tree), (Vbn(0), tree.size.blocks().0), depth)?;
    if mending.lost.is_empty() && depth == Depth::Data {
        shared.mender.read_whole(key);
    }
    Ok(mending)
}

/// Runs `read`, and once more for each time that what it met could be mended.
pub fn reading<T>(
    shared: &Shared,
    pin: &Pin,
    range: (Vbn, u64),
    mut read: impl FnMut() -> Result<T, VolumeError>,
) -> Result<T, VolumeError> {
    loop {
        let error = match read() {
            Err(error) if mend::is_rot(&error) => error,
            other => return other,
        };
        let volume = pin.key().volume;
        let mending = mend(shared, (volume, &pin.tree()), range, Depth::Data)?;
        if mending.mended.is_empty() {
            return Err(error);
        }
    }
}

/// Answers what the hub asks, from whatever tree here has it. Blocks.
pub fn serve(shared: &Shared, want: &WantPlace) -> Frame {
    let newest = shared.pins().get(&want.volume).cloned();
    let common = shared.common.borrow().clone();
    let common = common.and_then(|common| common.pins.get(&want.volume).cloned());
    serve::answer(newest.into_iter().chain(common), want)
}
