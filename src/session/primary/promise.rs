//! A source begins to promise something else (R20): at a freeze, or at a start with another file.
//!
//! Called by [`super::Primary::step`]. The hub must never hold a promise that is not kept, whether
//! it is the older or the newer one: what it holds decides what it says after the source's loss.
//!
//! ```text
//! freeze at S, next policy written into it -> from here on both promises are kept
//! hub has everything up to S, no CP is under way --Renew--> Hello with the next policy
//! hub notes it durably, Welcome --InForce--> the next policy alone
//! ```
//!
//! Up to S the older promise was kept, behind it both were: so the older one holds until the hub
//! notes the newer, and the newer one holds from then on. A source that ends in between begins
//! again with both, and tells the older one first: which of them the hub knows does not matter.
//!
//! One that stops without its hub does not hold writes before both were in step for the first time
//! (R4). What a new source brings along, written before its first session, is brought over while it goes
//! on: it tells its first hub so, and that it stops is another policy, which follows when all of it
//! is there. What it told stands durably on the hub before the first Welcome.

use super::{Action, Primary};
use crate::units::numbers::SequenceNumber;
use crate::units::policy::{OnHubLoss, Policy};

/// A policy on its way to the hub.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    next: Policy,
    /// Up to here the older promise alone may have been kept.
    behind: SequenceNumber,
    /// A Hello with it was sent: the hub may know it.
    told: bool,
}

impl Primary {
    /// Both policies are kept from now on, behind that sequence number.
    pub(super) fn promised(&mut self, next: Policy, behind: SequenceNumber) {
        assert!(self.change.is_none(), "one change of policy at a time");
        self.change = Some(Change { next, behind, told: false });
    }

    /// What Hello says.
    pub(super) fn told_policy(&self) -> Policy {
        match self.change {
            Some(Change { next, told: true, .. }) => next,
            Some(_) | None if self.brings_work() => self.identity.policy.usable_at_once(),
            Some(_) | None => self.identity.policy,
        }
    }

    /// Whether it was never welcomed, and has something that the hub lacks.
    pub(super) fn brings_work(&self) -> bool {
        let has = self.apart.is_marked() || self.own_cp.0 > 0 || !self.held.is_empty();
        self.identity.hub.is_none() && has
    }

    /// The first hub has noted that this source goes on without it, until both were in step.
    pub(super) fn begins_usable(&mut self, actions: &mut Vec<Action>) {
        let policy = self.identity.policy.usable_at_once();
        if self.told_work && policy != self.identity.policy {
            self.identity.policy = policy;
            actions.push(Action::InForce(policy));
        }
    }

    /// Whether every promise that the hub may know lets writes be acknowledged without it.
    pub(super) fn promises_to_go_on(&self) -> bool {
        let next = self.change.map_or(OnHubLoss::Continue, |change| change.next.on_hub_loss);
        [self.identity.policy.on_hub_loss, next] == [OnHubLoss::Continue; 2]
    }

    /// The hub has noted what Hello said.
    pub(super) fn noted(&mut self, actions: &mut Vec<Action>) {
        if let Some(change) = self.change.take_if(|change| change.told) {
            self.identity.policy = change.next;
            actions.push(Action::InForce(change.next));
        }
    }

    /// Connects anew to tell the next policy, as soon as what it says holds.
    pub(super) fn pump_promise(&mut self, actions: &mut Vec<Action>) {
        let reached = self.hub_sequence();
        let quiet = self.pending.is_none() && self.backlog.is_empty();
        let idle = self.is_streaming() && !self.apart.is_syncing() && quiet;
        let ready = |change: &&mut Change| idle && !change.told && reached >= change.behind;
        if let Some(change) = self.change.as_mut().filter(ready) {
            change.told = true;
            self.state = super::State::Closing;
            actions.push(Action::Renew);
        }
    }

    #[cfg(test)]
    pub(super) fn promise_fingerprint<H: std::hash::Hasher>(&self, to: &mut H) {
        use std::hash::Hash;
        self.identity.policy.hash(to);
        self.change.map(|change| (change.next, change.behind, change.told)).hash(to);
    }
}
