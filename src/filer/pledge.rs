//! What a source promises, now and next (R20), and what else a reload changes while it runs.
//!
//! Read by every part on its own way, without a lock; changed by a reload, by the committing thread
//! when it forms a freeze, and by the forwarder when the hub has noted the next policy.
//!
//! Three policies: the one the file asks for (**wanted**), the one that was written into a freeze
//! (**next**), the one that the hub has noted (**in force**). The source behaves by what keeps both
//! the one in force and the next one; a wanted one does nothing before its freeze. A start with
//! another file is a freeze of its own: nothing was ordered before it.

use std::time::Duration;

use arc_swap::ArcSwap;

use crate::units::policy::Policy;

/// What holds at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The hub has noted it, or was never met.
    pub in_force: Policy,
    /// Written into a freeze: the hub is told of it when it has everything up to there.
    pub next: Option<Policy>,
    /// What the file asks for.
    pub wanted: Policy,
    /// Time between two CPs.
    pub interval: Duration,
    /// How the source behaves.
    kept: Policy,
}

impl Terms {
    fn settled(self) -> Self {
        let next = self.next.unwrap_or(self.in_force);
        Self { kept: self.in_force.strictest(&next), ..self }
    }

    /// Whether the next freeze has something to say.
    fn is_due(&self) -> bool {
        self.next.is_none() && self.wanted != self.in_force
    }
}

/// The terms of a source.
#[derive(Debug)]
pub struct Pledge(ArcSwap<Terms>);

impl Pledge {
    /// As a start finds them.
    pub fn new(in_force: Policy, next: Option<Policy>, wanted: Policy, interval: Duration) -> Self {
        let terms = Terms { in_force, next, wanted, interval, kept: in_force };
        Self(ArcSwap::from_pointee(terms.settled()))
    }

    /// All of them.
    pub fn terms(&self) -> Terms {
        **self.0.load()
    }

    /// What is kept whatever the hub knows: how clients are answered.
    pub fn kept(&self) -> Policy {
        self.0.load().kept
    }

    /// What the hub has noted: how CPs travel.
    pub fn in_force(&self) -> Policy {
        self.0.load().in_force
    }

    /// When the hub counts as lost.
    pub fn patience(&self) -> Duration {
        self.0.load().kept.hub_timeout
    }

    /// Time between two CPs.
    pub fn interval(&self) -> Duration {
        self.0.load().interval
    }

    /// Whether a freeze would change the policy.
    pub fn is_due(&self) -> bool {
        self.0.load().is_due()
    }

    /// Whether it would begin to stop without the hub.
    pub fn would_stop(&self) -> bool {
        let terms = self.0.load();
        terms.is_due() && terms.in_force.would_stop(&terms.wanted)
    }

    /// The file asks for something else.
    pub fn want(&self, wanted: Policy, interval: Duration) {
        self.0.rcu(|terms| Terms { wanted, interval, ..**terms });
    }

    /// The policy that a freeze has to say, which is kept beside the one in force from now on.
    pub fn freeze(&self) -> Option<Policy> {
        // Only the committing thread freezes; a reload may come between, and then it is its
        // wanted one that is taken.
        let before = self.0.rcu(|terms| {
            if terms.is_due() {
                Terms { next: Some(terms.wanted), ..**terms }.settled()
            } else {
                **terms
            }
        });
        before.is_due().then_some(before.wanted)
    }

    /// The hub has noted it.
    pub fn noted(&self, policy: Policy) {
        self.0.rcu(|terms| Terms { in_force: policy, next: None, ..**terms }.settled());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::policy::{Mode, OnHubLoss};

    #[test]
    fn between_two_policies_both_are_kept() {
        let second = Duration::from_secs(1);
        let sync = Policy { on_hub_loss: OnHubLoss::Stop, ..Policy::default() };
        let weak = Policy { mode: Mode::Async, hub_timeout: second, ..Policy::default() };
        let pledge = Pledge::new(sync, None, sync, second);
        assert_eq!((pledge.freeze(), pledge.is_due()), (None, false));
        pledge.want(weak, second * 2);
        assert_eq!((pledge.kept(), pledge.is_due()), (sync, true), "nothing before the freeze");
        assert_eq!(pledge.interval(), second * 2, "the interval promises nothing");
        assert_eq!(pledge.freeze(), Some(weak));
        assert_eq!(pledge.freeze(), None, "it is written once");
        let both = Policy { hub_timeout: second, ..sync };
        assert_eq!((pledge.kept(), pledge.in_force()), (both, sync));
        // Asked for while another is on its way: it follows.
        pledge.want(sync, second);
        assert_eq!((pledge.is_due(), pledge.freeze()), (false, None));
        pledge.noted(weak);
        assert_eq!((pledge.kept(), pledge.is_due()), (weak, true));
        assert_eq!(pledge.freeze(), Some(sync));
        assert_eq!(pledge.kept(), both);
        pledge.noted(sync);
        assert_eq!((pledge.kept(), pledge.is_due()), (sync, false));
    }
}
