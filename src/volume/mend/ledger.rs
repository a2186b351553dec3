//! What was found bad, what was mended and is to be written to a new place, what is lost.
//!
//! One a process. Whoever mends notes it here; whoever writes the next CP of a source takes what
//! is to be written for it; status and metrics read the figures.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Mending, first_of};
use crate::limits::MEND_FAILURES_MAX;
use crate::pool::Pool;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::write_set::WriteSet;
use crate::units::convert::to_u64;
use crate::units::numbers::{CpNumber, Vbn};
use crate::volume::error::{TreePlace, VolumeError};
use crate::volume::reader::read_into;
use crate::volume::writer::{Content, TreeWriter};

/// A place, in the order in which it is written: from the top, and from the left.
type Order = (u64, std::cmp::Reverse<u8>);

#[derive(Debug, Default)]
struct State {
    waiting: BTreeMap<VolumeKey, BTreeSet<Order>>,
    lost: BTreeMap<(VolumeKey, Order), String>,
    found: u64,
    repaired: u64,
}

/// The ledger.
#[derive(Debug, Default)]
pub struct Mender {
    state: Mutex<State>,
}

/// What the ledger says of one source, or of all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MendFigures {
    /// Places that failed their check, since the start.
    pub found: u64,
    /// Of these, written to a new place.
    pub repaired: u64,
    /// Mended, and not yet written.
    pub waiting: u64,
    /// Neither readable nor to be had from the other end, in words.
    pub lost: Vec<String>,
}

fn order(place: &TreePlace) -> Order {
    (first_of(place).0, std::cmp::Reverse(place.level))
}

fn place_of(key: VolumeKey, (first, std::cmp::Reverse(level)): Order) -> TreePlace {
    let index = first / crate::volume::geometry::Geometry::span(level);
    TreePlace { volume: key.volume, level, index }
}

impl Mender {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a mending of that volume gave.
    pub fn note(&self, key: VolumeKey, mending: &Mending) {
        let mut state = self.lock();
        for place in &mending.mended {
            tracing::warn!(%place, source = %key.source, "rot found; mended from the other end");
            let known = state.lost.remove(&(key, order(place))).is_some();
            let new = state.waiting.entry(key).or_default().insert(order(place));
            state.found += u64::from(new && !known);
        }
        for (place, reason) in &mending.lost {
            tracing::error!(%place, source = %key.source, reason, "rot found; not repairable now");
            let known = state.lost.insert((key, order(place)), reason.clone());
            state.found += u64::from(known.is_none());
            if state.lost.len() > MEND_FAILURES_MAX {
                state.lost.pop_first();
            }
        }
    }

    /// Whether something of that volume is to be written to a new place.
    pub fn has_waiting(&self, key: VolumeKey) -> bool {
        self.lock().waiting.contains_key(&key)
    }

    /// Writes what waits for that volume to new places, on top of `tree`, as a part of CP `cp`. The
    /// content, and so the root, stays. Call [`Mender::written`] when that is published.
    pub fn write(
        &self,
        pool: &std::sync::Arc<Pool>,
        set: &mut WriteSet,
        key: VolumeKey,
        tree: TreeRoot,
        cp: CpNumber,
    ) -> Result<TreeRoot, VolumeError> {
        let waiting = self.lock().waiting.get(&key).cloned().unwrap_or_default();
        let mut writer = TreeWriter::new(pool, set, key, tree, cp)?;
        for (first, std::cmp::Reverse(level)) in waiting {
            let vbn = Vbn(first);
            if level > 0 {
                writer.rewrite_node(vbn, level)?;
                continue;
            }
            let mut block = [0; crate::units::BLOCK_BYTES];
            read_into(pool, &tree, vbn.byte_offset(), &mut block)?;
            writer.put(vbn, Content::Data(&block))?;
        }
        writer.finish()
    }

    /// A CP that was written with [`Mender::write`] is published.
    pub fn written(&self, key: VolumeKey) {
        let mut state = self.lock();
        let Some(places) = state.waiting.remove(&key) else { return };
        state.repaired += to_u64(places.len());
        tracing::info!(source = %key.source, volume = %key.volume, places = places.len(),
            "what was mended is written to a new place");
    }

    /// What waits for that volume cannot be written: it is found again when it is read again.
    pub fn forget(&self, key: VolumeKey) {
        self.lock().waiting.remove(&key);
    }

    /// A place that was lost and is read again, or is not there any more, is lost no more.
    pub fn read_whole(&self, key: VolumeKey) {
        self.lock().lost.retain(|(known, _), _| *known != key);
    }

    /// Figures of the volumes that `of` names.
    pub fn figures(&self, of: impl Fn(&VolumeKey) -> bool) -> MendFigures {
        let state = self.lock();
        let waiting = state.waiting.iter().filter(|(key, _)| of(key));
        let lost = state.lost.iter().filter(|((key, _), _)| of(key));
        MendFigures {
            found: state.found,
            repaired: state.repaired,
            waiting: waiting.map(|(_, places)| to_u64(places.len())).sum(),
            lost: lost.map(|((key, at), why)| format!("{}: {why}", place_of(*key, *at))).collect(),
        }
    }
}
