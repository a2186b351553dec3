//! What a filer that follows has written by itself, and what becomes of it (R12). Pure but for the
//! history of the own CPs.
//!
//! Nothing that was acknowledged is thrown away unasked: where both sides have written, the
//! administrator names the side that stays, and the other side's state is kept as a CP by name.

use super::{Ask, SEE_LOG, Side};
use crate::hub::extension::Extension;
use crate::hub::failover::Refusal;
use crate::hub::shared::Shared;
use crate::pool::rows::SourceRow;
use crate::record::marks::Place;
use crate::units::names::{KeptName, SourceName};
use crate::units::numbers::{CpNumber, SequenceNumber};
use crate::units::policy::Mode;
use crate::wire::message::Follow;

/// What a filer has that this hub never had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Own {
    /// Nothing.
    Nothing,
    /// Entries that were never acknowledged: in mode sync, and not alone.
    Unacknowledged,
    /// Entries that may have been acknowledged, in words.
    Acknowledged(String),
}

/// Reads it out of what the filer says of itself and of what is known here.
pub(super) fn own(
    shared: &Shared,
    row: &SourceRow,
    extension: &Extension,
    follow: &Follow,
) -> Result<Own, Refusal> {
    let place = Place::from(follow.own);
    let history = shared.pool.catalog().history(row.id, follow.own_cp);
    let history = history.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
    // A mark behind its last entry says that nothing was written under it. One that is not stands
    // also where place and number are this hub's, and the content is the filer's (`TakeOver`).
    let alone = follow.alone.filter(|(_, from)| *from <= follow.last);
    // Everything it has is in a CP of ours: it follows already, or wrote nothing since.
    let followed = history.is_some_and(|known| known.is_at(place)) && follow.last == place.sequence;
    let empty = follow.own_cp == CpNumber(0) && follow.last == SequenceNumber(0);
    if empty || followed && alone.is_none() {
        return Ok(Own::Nothing);
    }
    let fence = extension.fence;
    // The fence is of the line that this filer wrote only if it was the last one to write it.
    let fenced_last = follow.epoch.number.checked_add(1) == Some(row.epoch.number);
    Ok(match follow.alone {
        Some((_, from)) => {
            Own::Acknowledged(format!("from entry {from} on it may have acknowledged them alone"))
        }
        None if fenced_last && follow.last <= fence.sequence => Own::Nothing,
        None if follow.policy.mode == Mode::Sync => Own::Unacknowledged,
        None => {
            let (last, here) = (follow.last, fence.sequence);
            Own::Acknowledged(format!("its last entry is {last}, here it was {here}"))
        }
    })
}

/// The name under which the filer keeps what the hub's side overwrites; refused while nobody has
/// said which side stays.
pub(super) fn judge(
    own: &Own,
    name: &SourceName,
    follow: &Follow,
    ask: &Ask,
) -> Result<Option<KeptName>, Refusal> {
    let epoch = follow.fenced.number;
    let split = format!("split-{epoch}");
    match (own, ask.keep) {
        (Own::Nothing, _) => Ok(None),
        // Never acknowledged: kept all the same, unasked.
        (Own::Unacknowledged, _) => named(&format!("unacknowledged-{epoch}")).map(Some),
        (Own::Acknowledged(_), Some(Side::Hub)) => named(&split).map(Some),
        (Own::Acknowledged(what), Some(Side::Source) | None) => {
            let reason = format!(
                "split brain: the filer of {name} has writes that this hub never had ({what}), and \
                 the hub has served since"
            );
            let next = format!(
                "name the side that stays: `mirrorhub failback {name} --keep hub` keeps what the \
                 filer wrote by itself as its CP {split}, readable there; `--keep source` keeps \
                 what this hub has as its CP {split}, readable here; with `--dry-run` either says \
                 what it would do"
            );
            Err(Refusal::new(reason, next))
        }
    }
}

/// A name of the program's own making.
pub(super) fn named(name: &str) -> Result<KeptName, Refusal> {
    name.parse().map_err(|error| Refusal::new(format!("{name}: {error}"), SEE_LOG))
}
