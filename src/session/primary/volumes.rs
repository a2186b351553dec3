//! Volumes that the hub leaves out, at a source (R20).
//!
//! Called by [`super::Primary::step`]. Which they are is said by each Welcome and holds for the
//! session. CPs and passes tell the hub of the others only. Under `continue` a volume that is left
//! out is served like one whose hub is away: the durable mark stands as long as there is one, so
//! that no failover and no failback takes what it holds for nothing. Under `stop` the shell does
//! not serve it.

use super::{Action, Primary, State};
use crate::units::machine;
use crate::units::numbers::VolumeNumber;
use crate::wire::message::{RefusedCode, VolumeOffer, VolumeRefusal, VolumeRoot};

/// What a session leaves out, and what it has to bring up.
#[derive(Debug, Clone, Default)]
pub(super) struct Volumes {
    /// Refused by the hub.
    refused: Vec<VolumeRefusal>,
    /// The image of a volume is of an older CP than the hub's: only a pass brings it up.
    behind: bool,
}

impl Volumes {
    /// Whether the image of a volume is to be brought up.
    pub(super) fn is_behind(&self) -> bool {
        self.behind
    }

    #[cfg(test)]
    pub(super) fn fingerprint<H: std::hash::Hasher>(&self, to: &mut H) {
        use std::hash::Hash;
        (self.refused.len(), self.behind).hash(to);
    }
}

impl Primary {
    /// Said by the shell before Welcome is judged.
    pub(super) fn volumes_behind(&mut self, behind: bool) {
        self.volumes.behind = behind;
    }

    /// Volumes have grown. In one session all CPs are of one size, the one that its Hello says: what
    /// is under way is of no use, and the hub hears of the size before it gets an entry or a CP of it.
    pub(super) fn grown(&mut self, volumes: Vec<VolumeOffer>, actions: &mut Vec<Action>) {
        assert!(self.pending.is_none(), "no CP is under way that is of the size before");
        self.identity.volumes = volumes;
        self.apart.outgrown(self.own_cp);
        if self.in_session() && !machine::breaks(21) {
            self.state = State::Closing;
            actions.push(Action::Renew);
        }
    }

    /// A hub that took none of the volumes is asked again.
    pub(super) fn try_again(&mut self) {
        if self.state == State::Halted && self.halted == Some(RefusedCode::Volume) {
            self.state = State::Away;
        }
    }

    /// What a Welcome leaves out, of what there is here.
    pub(super) fn leave_out(&mut self, refused: &[VolumeRefusal], actions: &mut Vec<Action>) {
        let ours = |no: &&VolumeRefusal| {
            self.identity.volumes.iter().any(|volume| volume.number == no.volume)
        };
        self.volumes.refused = refused.iter().filter(ours).cloned().collect();
        actions.push(Action::LeaveOut(self.volumes.refused.clone()));
        if self.leaves_out_served() {
            // Before the hub acknowledges anything in this session.
            self.mark(actions);
        }
    }

    /// Whether a volume is served that the hub leaves out.
    pub(super) fn leaves_out_served(&self) -> bool {
        !self.volumes.refused.is_empty() && self.goes_on_alone()
    }

    /// The roots of the volumes that both ends agree on.
    pub(super) fn agreed(&self, roots: &[VolumeRoot]) -> Vec<VolumeRoot> {
        let refused =
            |volume: VolumeNumber| self.volumes.refused.iter().any(|no| no.volume == volume);
        roots.iter().filter(|root| !refused(root.volume)).copied().collect()
    }
}
