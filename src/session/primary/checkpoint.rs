//! The CP under way at a source: announced, sent, ended, then done or refused.
//!
//! Called by [`super::Primary::step`]. PartitionFull leaves only behind the CP's last transfer,
//! CpEnd only behind all data and the own commit (R6); the partition is released only behind
//! CpDone and the own commit (invariant 4), whatever the hub says.

use super::{Action, Data, PendingCp, Primary};
use crate::record::marks::Place;
use crate::units::hash::Root;
use crate::units::machine;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::units::policy;
use crate::wire::message::{CpEnd, CpRejected, Message, PartitionFull, VolumeRoot};

/// Refusals of one CP before the image is repaired by comparison.
pub(super) const REFUSALS_MAX: u32 = 2;

impl Primary {
    /// Whether PartitionFull of `cp` was sent on this connection and is not answered.
    pub(super) fn is_announced(&self, cp: CpNumber) -> bool {
        self.pending.as_ref().is_some_and(|pending| pending.cp == cp && pending.data.is_announced())
    }

    /// Invariant 4: released behind CpDone and the own commit, whatever the hub says.
    pub(super) fn done(&mut self, cp: CpNumber, actions: &mut Vec<Action>) {
        let Some(pending) = self.pending.take_if(|pending| pending.cp == cp) else {
            self.close("CpDone of a CP that is not under way", actions);
            return;
        };
        if !self.identity.policy.forwards() {
            // Its log never went: the image itself has everything up to there.
            self.acked = self.acked.max(self.find(pending.place).unwrap_or_default());
            self.sent = self.sent.max(self.acked);
        }
        let released = self.find(pending.place).filter(|&released| released <= self.acked);
        let Some(released) = released.filter(|_| cp <= self.own_cp) else {
            self.close("CpDone of a CP that is not committed or not acknowledged", actions);
            self.pending = Some(pending);
            return;
        };
        self.held.drain(..released);
        self.sent -= released;
        self.acked -= released;
        self.held_after = pending.place;
        self.hub_cp = self.hub_cp.max(cp);
        self.apart.repaired();
        if !self.identity.policy.forwards() && self.is_streaming() {
            actions.push(Action::HubDurable(self.acked_place()));
        }
        actions.push(Action::Done { cp, alone: false });
    }

    /// R19: refused once it is sent again, refused twice it is sent all inline, then the image is
    /// repaired by comparison with a newer CP.
    pub(super) fn rejected(&mut self, no: &CpRejected, actions: &mut Vec<Action>) {
        let Some(pending) = self.pending.as_mut().filter(|pending| pending.cp == no.cp) else {
            self.close("CpRejected of a CP that is not under way", actions);
            return;
        };
        let (cp, reason, no_space) = (no.cp, no.reason.clone(), no.no_space);
        if no_space {
            pending.data = Data::Parked;
            actions.push(Action::Rejected { cp, reason, no_space });
            return;
        }
        pending.refusals += 1;
        pending.inline = pending.refusals >= 2;
        pending.data = if machine::breaks(19) { Data::Parked } else { Data::Waiting };
        let repaired = pending.refusals > REFUSALS_MAX;
        actions.push(Action::Rejected { cp, reason, no_space });
        if repaired {
            self.repair(cp, actions);
        }
    }

    pub(super) fn frozen(&mut self, cp: CpNumber, place: Place) {
        assert!(self.pending.is_none(), "one CP is under way at a time");
        assert!(self.find(place).is_some(), "a CP ends at a transfer that is held");
        self.cp_max = self.cp_max.max(cp);
        self.pending = Some(PendingCp {
            cp,
            place,
            roots: None,
            data: Data::Waiting,
            inline: false,
            refusals: 0,
        });
    }

    pub(super) fn committed(&mut self, cp: CpNumber, roots: Vec<(VolumeNumber, Root)>) {
        // A CP that the hub had published before a restart may be done before it is told here.
        if cp >= self.own_cp {
            self.own_cp = cp;
            self.own_roots = super::apart::volume_roots(roots.clone());
        }
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.cp == cp) {
            pending.roots = Some(super::apart::volume_roots(roots.clone()));
        }
    }

    pub(super) fn data_sent(&mut self, cp: CpNumber, bytes: u64) {
        if self.apart.data_sent(cp, bytes) {
            return;
        }
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.cp == cp)
            && pending.data == Data::Sending
        {
            pending.data = Data::Sent(bytes);
        }
    }

    pub(super) fn pump_cp(&mut self, actions: &mut Vec<Action>) {
        if self.pump_backlog(actions) {
            return;
        }
        let sent = match self.sent.checked_sub(1) {
            Some(last) => self.held[last].place.sequence,
            None => self.held_after.sequence,
        };
        let (acked, held_after) = (self.hub_sequence(), self.held_after.sequence);
        let Some(pending) = &mut self.pending else { return };
        // What went before the source began to send CPs only is used once more: the hub may hold
        // acknowledged writes behind this CP as well.
        let whole = acked >= pending.place.sequence && pending.place.sequence > held_after;
        let forwards = self.identity.policy.forwards() || whole;
        if pending.data == Data::Waiting && (sent >= pending.place.sequence || !forwards) {
            // Refused twice it is sent all inline, whatever was asked for (R19).
            let replay = self.identity.policy.apply == policy::Apply::Replay && !pending.inline;
            // Without a log the data makes the CP out of the image, as in a pass.
            let base = (!forwards).then_some(self.hub_cp);
            let (cp, last) = (pending.cp, pending.place.into());
            let full = PartitionFull { cp, last, base, replay, keeps_log: false };
            actions.push(Action::Send(Message::PartitionFull(full)));
            if replay {
                pending.data = Data::Sent(0);
            } else {
                pending.data = Data::Sending;
                actions.push(Action::SendData { cp: pending.cp, inline: pending.inline });
            }
        }
        if let (Data::Sent(update_bytes), Some(roots)) = (pending.data, &pending.roots) {
            pending.data = Data::Ended;
            let (cp, place, roots) = (pending.cp, pending.place, roots.clone());
            actions.push(end_of(cp, place, self.agreed(&roots), update_bytes));
        }
    }
}

/// All of a CP's data was sent.
pub(super) fn end_of(
    cp: CpNumber,
    place: Place,
    roots: Vec<VolumeRoot>,
    update_bytes: u64,
) -> Action {
    Action::Send(Message::CpEnd(CpEnd { cp, place: place.into(), roots, update_bytes }))
}
