//! `checkpoint`: waits until the hub has published everything that was ordered before.
//!
//! Called by [`super::Filer`] for the command, for a failback and for the last CP of a stop. What it
//! returns is what the hub shows: a CP that is committed here only is no answer, however long the
//! source goes on alone. A hub that is lost, or has no room, is told as the reason (R20, R18).

use std::sync::Arc;
use std::time::Duration;

use super::shared::{LinkState, Shared};
use super::signals::Roots;
use super::{CheckpointError, TICK};
use crate::units::numbers::CpNumber;

/// Has a CP made of everything ordered before this call, unless there is nothing to say. Number and
/// roots of the newest CP of both ends once that holds it all; an error once the hub was lost for
/// `patience`.
pub(super) async fn newest(
    shared: &Arc<Shared>,
    patience: Duration,
) -> Result<(CpNumber, Roots), CheckpointError> {
    super::settled(shared).await?;
    let mut common = shared.common.subscribe();
    // In this order: what is committed between the two looks is in the own CP.
    let refused = shared.faulted();
    // What was refused for good is not tried again: a newer CP is made, be it of nothing (R19).
    let forced = refused.as_ref().map(|_| shared.own().0.next());
    let target = shared.order.target().or(forced);
    let wanted = target.unwrap_or_else(|| shared.own().0);
    let refusals = shared.counters.values().checkpoints_rejected;
    match forced {
        Some(_) => shared.checkpoint.force(),
        None => shared.checkpoint.want(),
    }
    let mut lost = Duration::ZERO;
    loop {
        let newest = common.borrow_and_update().clone();
        if let Some(newest) = newest.filter(|newest| newest.cp >= wanted) {
            return Ok((newest.cp, newest.roots));
        }
        if shared.sole && target.is_none() {
            // There is no other end.
            let (cp, roots) = shared.own();
            return Ok((cp, shared.agreed(&roots)));
        }
        if let Some((_, reason)) = shared.faulted().filter(|now| refused.as_ref() != Some(now)) {
            return Err(CheckpointError::HubLost(reason));
        }
        match keeps_from(shared, refusals)? {
            Some(reason) if lost >= patience => return Err(CheckpointError::HubLost(reason)),
            Some(_) => {}
            None => lost = Duration::ZERO,
        }
        if tokio::time::timeout(TICK, common.changed()).await.is_err() {
            lost += TICK;
        }
    }
}

/// Why the CP does not come now, though it may after a while; nothing if it is under way.
fn keeps_from(shared: &Shared, refusals: u64) -> Result<Option<String>, CheckpointError> {
    if let Some(failed) = shared.failed() {
        return Err(CheckpointError::Failed(failed));
    }
    if shared.session.stopping() {
        return Err(CheckpointError::Stopped);
    }
    match shared.link() {
        LinkState::Halted(refused) => Err(CheckpointError::HubLost(refused.reason)),
        LinkState::Waiting { reason } | LinkState::Offline { reason, .. } => Ok(Some(reason)),
        LinkState::Connected { .. } if shared.lacks_hub_room() => {
            // Room that was made meanwhile is met by the next try.
            let tried = shared.counters.values().checkpoints_rejected > refusals;
            let reason = shared.rejected().unwrap_or_default();
            if tried { Err(CheckpointError::HubLost(reason)) } else { Ok(None) }
        }
        // It may be done some time; nobody waits for that for ever.
        LinkState::Connected { .. } if shared.pass().is_none() && shared.slow().is_some() => {
            Ok(shared.slow())
        }
        LinkState::Connected { .. } if !shared.is_coming_back() && shared.order.is_at_rest() => {
            Ok(Some("the newest CP here is not the one that the hub shows".to_owned()))
        }
        LinkState::Connected { .. } | LinkState::Unlinked => Ok(None),
    }
}
