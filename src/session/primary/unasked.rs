//! A source that begins to serve without having asked its hub (R1).
//!
//! Called by [`super::Primary::step`]. What such a source holds when it starts may be less than it had:
//! its NVRAM was lost, or restored from an older copy, or its end has rotted. What it writes then is
//! another line than the one that goes on in the hub's log. When it comes back that log would be
//! given up for the image of a pass; but each transfer names the last one that was durable at the
//! source when it was formed. What the log names so is on both ends: it was acknowledged for sure, and
//! a source that began before it has lost it. That is a rollback, and refused.
//!
//! Where it began is durable before the first client is served, and goes when a hub was asked: from
//! then on what the hub's log names is of the new line, or before it. The oldest of several starts
//! counts, if the later ones held more.
//!
//! What cannot be told is a loss of what no later transfer names: the last one or two of the log.

use super::{Action, Primary, refused};
use crate::units::numbers::TransferId;
use crate::wire::message::{Refused, RefusedCode, Welcome};

impl Primary {
    /// Its hub is away, and it begins to serve all the same.
    pub(super) fn serves_unasked(&mut self, actions: &mut Vec<Action>) {
        if self.serving {
            return;
        }
        let began = self.began();
        if self.identity.unasked != Some(began) {
            self.identity.unasked = Some(began);
            actions.push(Action::Unasked(Some(began)));
        }
    }

    /// The hub was asked, and what it holds was judged.
    pub(super) fn has_asked(&mut self, actions: &mut Vec<Action>) {
        if self.identity.unasked.take().is_some() {
            actions.push(Action::Unasked(None));
        }
    }

    /// The last transfer of the line that this boot began with, or an earlier one that has not asked.
    fn began(&self) -> TransferId {
        let here = self.last().transfer;
        self.identity.unasked.map_or(here, |before| before.min(here))
    }

    /// Why this hub is not gone on with, if its log has what this source had durably and lost. One
    /// that has not served yet, nor alone before, fetches what it lacks.
    pub(super) fn has_lost(&self, welcome: &Welcome) -> Option<Refused> {
        let began = match (self.identity.unasked, self.serving) {
            (Some(before), true) => before,
            (Some(_), false) => self.began(),
            (None, false) if self.apart.is_marked() => self.began(),
            (None, _) => return None,
        };
        if welcome.own_durable <= began {
            return None;
        }
        let reason = format!(
            "the hub holds transfer {}, which this source had durably: it went on alone from \
             transfer {began}, without its NVRAM or on an older copy of it, and has lost what was \
             acknowledged in between",
            welcome.own_durable
        );
        let next = "the two histories went different ways: `mirrorhub failback` on the hub, with \
                    --keep, names the side that stays; see docs/operations.md";
        Some(refused(RefusedCode::Diverged, reason, next))
    }
}
