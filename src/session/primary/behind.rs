//! Transfers behind a pass: log forwarding goes on while the image is brought up (R4).
//!
//! Called by [`super::Primary::step`]. From the word that begins a pass to CP S on, what lies behind S is sent
//! as it is in session. The hub keeps it aside: it joins no image yet and protects nothing, nobody is answered for it.
//! With CpDone of S it is the hub's log. Either end may give it up before, and says so; then all is as
//! without it: what is still held is sent behind the pass, or another pass follows.
//!
//! CPs that were done alone meanwhile are the **backlog**: the hub's log has what they are made of, their partitions
//! are free. The hub builds them one after the other from that log, no data is sent. Until the last of them the mark stands,
//! and a partition that writers wait for is still released, into the backlog, but no faster than at half the
//! rate at which the hub builds: so it ends, whatever clients write.
//!
//! A pass that writers outrun, since its data is throttled or the link is narrow, so ends in step: what it
//! takes is that the link carries what is written.

use std::collections::VecDeque;

use super::apart::PassLog;
use super::checkpoint::end_of;
use super::{Action, Data, Primary, State};
use crate::limits::BEHIND_CPS_MAX;
use crate::record::marks::Place;
use crate::units::numbers::CpNumber;
use crate::wire::message::{
    BEHIND_VERSION, Behind, BehindState, CpRejected, Message, PartitionFull, VolumeRoot,
};

/// A CP that was done alone, whose entries the hub's log has.
#[derive(Debug, Clone)]
struct Alone {
    cp: CpNumber,
    place: Place,
    roots: Vec<VolumeRoot>,
    data: Data,
}

/// What the hub is still to build from its log, oldest first.
#[derive(Debug, Clone, Default)]
pub(super) struct Backlog {
    cps: VecDeque<Alone>,
    /// How many were built since one was added.
    built: u32,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.cps.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether a CP may join: twice as many are built.
    pub(super) fn may_grow(&self) -> bool {
        self.built >= 2 && self.cps.len() < BEHIND_CPS_MAX
    }

    /// Whether the hub was told of that CP, and has not answered.
    pub(super) fn is_announced(&self, cp: CpNumber) -> bool {
        self.cps.front().is_some_and(|front| front.cp == cp && front.data.is_announced())
    }

    pub(super) fn data(&mut self) -> Option<&mut Data> {
        self.cps.front_mut().map(|front| &mut front.data)
    }

    #[cfg(test)]
    pub(super) fn fingerprint<H: std::hash::Hasher>(&self, to: &mut H) {
        use std::hash::Hash;
        self.built.min(2).hash(to);
        for Alone { cp, place, data, .. } in &self.cps {
            (cp, place.hash, std::mem::discriminant(data)).hash(to);
        }
    }
}

impl Primary {
    /// A pass to the CP at `place` begins; what lies behind it is sent from now on.
    pub(super) fn forward_behind(&mut self, place: Place, keeps_log: bool) -> PassLog {
        self.unsend();
        let speaks = self.speaks_of_behind() && self.identity.policy.forwards();
        let Some(position) = self.find(place).filter(|_| speaks && !keeps_log) else {
            return PassLog::Rests;
        };
        (self.sent, self.acked) = (position, position);
        PassLog::Goes
    }

    fn speaks_of_behind(&self) -> bool {
        self.version >= BEHIND_VERSION
    }

    /// The hub has refused the pass, and dropped what was sent behind it, up to the word that begins it again.
    pub(super) fn refused_behind(&mut self) {
        self.apart.set_pass_log(PassLog::Rests);
        self.unsend();
    }

    /// Whether transfers are sent behind a pass.
    pub(super) fn forwards_behind(&self) -> bool {
        self.apart.pass_log() == Some(PassLog::Goes)
    }

    /// What the hub says of them.
    pub(super) fn behind(&mut self, behind: Behind, actions: &mut Vec<Action>) {
        let log = self.apart.pass_log().filter(|_| self.apart.is_passing(behind.cp));
        match (log, behind.state) {
            // This end gave it up, and the hub had not heard of it.
            (Some(PassLog::Over), _) => {}
            (Some(PassLog::Goes), BehindState::Taken(id)) => {
                if let Some(upto) = self.sent_upto(id) {
                    self.taken(upto);
                } else {
                    self.close("the hub took a transfer that was not sent", actions);
                }
            }
            (Some(PassLog::Goes), BehindState::Joins) => self.apart.set_pass_log(PassLog::Joins),
            (Some(PassLog::Goes), BehindState::Over) => self.end_behind(actions),
            // The newest word of how much was taken may come late.
            (_, BehindState::Taken(_)) => {}
            // Nothing is sent, which the hub does not know: its log goes on where the pass ends.
            (Some(PassLog::Rests), BehindState::Joins) if self.speaks_of_behind() => {}
            (Some(PassLog::Rests), BehindState::Over) if self.speaks_of_behind() => {
                let over = Behind { state: BehindState::Over, ..behind };
                actions.push(Action::Send(Message::Behind(over)));
            }
            (None | Some(PassLog::Rests | PassLog::Joins), _) => {
                self.close("a word about a log that is not sent", actions);
            }
        }
    }

    /// Nothing more is sent behind the pass, and the hub is told where that stops.
    fn end_behind(&mut self, actions: &mut Vec<Action>) {
        let Some((cp, _)) = self.pass() else { return };
        self.apart.set_pass_log(PassLog::Over);
        self.unsend();
        let state = BehindState::Over;
        // What is released may not be read any more: no transfer goes behind one that is left out.
        actions.push(Action::Unsend);
        actions.push(Action::Send(Message::Behind(Behind { cp, state })));
    }

    /// A CP is released alone, with that many transfers. In a pass the hub must have taken all of them, or its line
    /// would have a gap.
    pub(super) fn released_alone(
        &mut self,
        (cp, place, roots): (CpNumber, Place, Vec<VolumeRoot>),
        released: usize,
        actions: &mut Vec<Action>,
    ) {
        let joined = !self.backlog.is_empty() && !self.apart.is_syncing();
        if !joined && !self.forwards_behind() {
            return;
        }
        if self.acked < released || self.backlog.cps.len() >= BEHIND_CPS_MAX {
            self.end_behind(actions);
            return;
        }
        self.backlog.built = 0;
        self.backlog.cps.push_back(Alone { cp, place, roots, data: Data::Waiting });
    }

    /// The hub's log went on behind the pass at `place` that ended: whether the ends are on one line again.
    pub(super) fn has_joined(&self, place: Place) -> bool {
        let log = self.apart.pass_log() == Some(PassLog::Joins);
        log && (self.find(place).is_some() || !self.backlog.is_empty())
    }

    /// The oldest CP of the backlog is told; nothing of another CP before the last of them. Whether there is one.
    pub(super) fn pump_backlog(&mut self, actions: &mut Vec<Action>) -> bool {
        let Some(front) = self.backlog.cps.front_mut() else { return false };
        if front.data == Data::Waiting {
            front.data = Data::Ended;
            let (cp, place, roots) = (front.cp, front.place, front.roots.clone());
            let (last, base, replay, keeps_log) = (place.into(), None, true, false);
            let full = PartitionFull { cp, last, base, replay, keeps_log };
            actions.push(Action::Send(Message::PartitionFull(full)));
            actions.push(end_of(cp, place, self.agreed(&roots), 0));
        }
        true
    }

    /// The hub has built the oldest CP of the backlog.
    pub(super) fn built(&mut self, cp: CpNumber, actions: &mut Vec<Action>) {
        self.backlog.cps.pop_front();
        self.backlog.built += 1;
        self.hub_cp = cp;
        self.apart.repaired();
        actions.push(Action::Shown { cp });
    }

    /// The hub could not build it: for lack of room it is asked again, else the image is brought up
    /// by another pass.
    pub(super) fn backlog_rejected(&mut self, no: &CpRejected, actions: &mut Vec<Action>) {
        let (cp, reason, no_space) = (no.cp, no.reason.clone(), no.no_space);
        actions.push(Action::Rejected { cp, reason, no_space });
        if no_space {
            if let Some(data) = self.backlog.data() {
                *data = Data::Parked;
            }
            return;
        }
        self.bring_up_again(actions);
    }

    /// Whether the hub's image is being brought up, or is about to be.
    pub fn brings_up(&self) -> bool {
        self.apart.is_syncing()
    }

    /// CPs that were done alone and that the hub builds from its log.
    pub fn backlog(&self) -> usize {
        self.backlog.cps.len()
    }

    /// Whether a partition may go although the hub has not published its CP: its log has it.
    pub(super) fn may_grow_backlog(&self) -> bool {
        let (streams, joined) = (self.state == State::Streaming, !self.apart.is_syncing());
        let Some(pending) = &self.pending else { return false };
        let taken = self.find(pending.place).is_some_and(|released| released <= self.acked);
        streams && joined && taken && !self.backlog.is_empty() && self.backlog.may_grow()
    }
}
