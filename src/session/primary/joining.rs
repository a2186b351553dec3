//! How a source comes together with its hub: Hello, the judgement of Welcome, the refill.
//!
//! Called by [`super::Primary::step`]. Nothing of a hub is believed before its Welcome was judged
//! whole (R1, R5, R12); a hub that is not this source's halts the session with a reason.

use super::super::{CP_NUMBER_MAX, NEXT_OF_AN_OLD_COPY, NEXT_OF_OTHER_EPOCH};
use super::apart::{How, HubLog};
use super::{Action, Held, Past, Primary, State, refused};
use crate::record::marks::Place;
use crate::units::hash::StreamHash;
use crate::units::ids::HubId;
use crate::units::numbers::{CpNumber, Epoch, TransferId};
use crate::wire::message::{
    Fenced, Hello, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Refused, RefusedCode, WantLog,
    Welcome,
};

/// How two histories come together.
enum Joining {
    /// The hub's last transfer is held: send what lies behind that many.
    Resend(usize),
    /// The hub holds more (R1).
    Refill,
    /// The logs do not join, or the image is not what births tell: it is this source's past (R4).
    Pass(How),
}

impl Primary {
    pub(super) fn connected(&mut self, actions: &mut Vec<Action>) {
        if self.state == State::Halted {
            return;
        }
        assert!(self.state == State::Away, "one connection at a time");
        self.state = State::Greeting;
        self.connections += 1;
        self.told_alone = self.identity.alone;
        self.told_welcomed = self.identity.hub.is_some();
        self.told_work = self.brings_work();
        actions.push(Action::Send(Message::Hello(Box::new(Hello {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION_MIN,
            name: self.identity.name.clone(),
            source: self.identity.source,
            hub: self.identity.hub,
            generation: self.identity.generation,
            epoch: self.identity.epoch,
            volumes: self.identity.volumes.clone(),
            held_after: self.held_after.into(),
            last: self.last().into(),
            own_durable: self.own_durable,
            own_cp: self.own_cp,
            cp_max: self.cp_max,
            serving: self.serving,
            policy: self.told_policy(),
            alone: self.identity.alone,
            connection: self.connections,
        }))));
    }

    /// Compares the two histories and decides how they join (R1, R5, R7).
    pub(super) fn welcomed(&mut self, welcome: &Welcome, past: Past, actions: &mut Vec<Action>) {
        let joining = match self.accepts(welcome).and_then(|()| self.joins(welcome, past)) {
            Ok(joining) => joining,
            Err(refused) => {
                self.halt(refused, actions);
                return;
            }
        };
        self.halted = None;
        self.cp_max = self.cp_max.max(welcome.cp_max);
        self.hub_cp = welcome.applied_cp;
        self.version = welcome.version;
        self.log_credit = welcome.log_credit;
        self.cp_credit = welcome.cp_credit;
        self.begins_usable(actions);
        self.identity.hub = Some(welcome.hub);
        self.identity.epoch = welcome.epoch;
        actions.push(Action::Joined { hub: welcome.hub, epoch: welcome.epoch });
        self.has_asked(actions);
        self.hold_to(welcome, actions);
        self.leave_out(&welcome.refused, actions);
        self.noted(actions);
        match joining {
            Joining::Resend(position) => {
                self.acked = position;
                self.sent = position;
                self.settle(welcome.applied_cp, actions);
                self.open_window(actions);
                self.join(actions);
            }
            Joining::Refill => {
                let target = Place::from(welcome.last);
                self.settle(welcome.applied_cp, actions);
                self.state = State::Refilling { target };
                actions.push(Action::Send(Message::WantLog(WantLog { from: self.last().into() })));
            }
            Joining::Pass(how) => {
                let log = self.log_of(Place::from(welcome.last));
                self.settle(welcome.applied_cp, actions);
                self.pass_over((welcome.applied_cp, log), how, actions);
            }
        }
    }

    /// In session, but the image is brought up before the log goes on.
    fn pass_over(&mut self, image: (CpNumber, HubLog), how: How, actions: &mut Vec<Action>) {
        self.state = State::Streaming;
        self.open_window(actions);
        self.begin_syncing(image, how, actions);
    }

    /// What the hub's log is that ends at `last`. Ids rise along both lines: of this one it has none that is
    /// newer.
    fn log_of(&self, last: Place) -> HubLog {
        if self.find(last).is_some() {
            return HubLog::Joins(last);
        }
        let older = self.held.partition_point(|held| held.place.transfer <= last.transfer);
        let fork = older.checked_sub(1).map(|at| self.held[at].place);
        fork.map_or(HubLog::Spent, HubLog::Forks)
    }

    /// Nothing of CPs was sent on this connection.
    fn open_window(&mut self, actions: &mut Vec<Action>) {
        self.cp_taken = 0;
        actions.push(Action::DataWindow { taken: 0, limit: self.cp_credit });
    }

    /// Everything that the hub held beyond the own log is here.
    pub(super) fn refill_over(&mut self, actions: &mut Vec<Action>) {
        if self.volumes.is_behind() {
            self.pass_over((self.hub_cp, HubLog::Joins(self.last())), How::Births, actions);
        } else {
            self.open_window(actions);
            self.join(actions);
        }
    }

    /// Whether this hub is ours, and its image and log lie on this source's line (R1, R5, R12).
    fn accepts(&self, welcome: &Welcome) -> Result<(), Refused> {
        let known = &self.identity;
        if !(PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION).contains(&welcome.version) {
            let reason = format!("the hub answers with protocol version {}", welcome.version);
            return Err(refused(RefusedCode::Version, reason, "upgrade the hub first"));
        }
        if let Some(hub) = known.hub.filter(|&hub| hub != welcome.hub) {
            return Err(other_hub(hub, welcome.hub));
        }
        if known.epoch.number > 0 && known.epoch != welcome.epoch {
            let reason = format!(
                "the hub is in epoch {} ({:016x}), this source in epoch {} ({:016x}): somebody \
                 else has become primary, or the hub was rolled back",
                welcome.epoch.number, welcome.epoch.id, known.epoch.number, known.epoch.id
            );
            return Err(refused(RefusedCode::Diverged, reason, NEXT_OF_OTHER_EPOCH));
        }
        if welcome.cp_max > CP_NUMBER_MAX {
            let reason = format!("the hub says that CP {} was used", welcome.cp_max);
            return Err(refused(
                RefusedCode::Protocol,
                reason,
                "see `mirrorhub status` on the hub",
            ));
        }
        if welcome.applied_cp > self.own_cp {
            let reason = format!(
                "the hub has published CP {}, this source has committed only CP {}: its state was \
                 rolled back",
                welcome.applied_cp, self.own_cp
            );
            return Err(refused(RefusedCode::Diverged, reason, NEXT_OF_AN_OLD_COPY));
        }
        Ok(())
    }

    /// Compares the two histories. What the hub holds beyond the own log, on the same line, is
    /// fetched; an own log that begins behind the hub's, or went another way while this end was
    /// alone, needs a pass over the image, which must be this source's past (R4, R5).
    fn joins(&self, welcome: &Welcome, past: Past) -> Result<Joining, Refused> {
        let (hub_last, applied) = (Place::from(welcome.last), Place::from(welcome.applied));
        let elsewhere = |code, reason| {
            match past {
                // What was begun there is gone on with by comparison (R19).
                Past::Known if !welcome.work => return Ok(Joining::Pass(How::Births)),
                Past::Known | Past::Unknown => return Ok(Joining::Pass(How::Compare)),
                Past::No => {}
            }
            let next = "the two histories went different ways: `mirrorhub failback` on the hub, \
                        with --keep, names the side that stays; see docs/operations.md";
            Err(refused(code, reason, next))
        };
        if let Some(lost) = self.has_lost(welcome) {
            return Err(lost);
        }
        let beyond = hub_last.sequence > self.last().sequence;
        if beyond && (self.serving || self.apart.is_marked()) {
            let reason = format!(
                "the hub holds transfer {} that this source, which has served alone, never sent",
                hub_last.transfer
            );
            return elsewhere(RefusedCode::Diverged, reason);
        }
        let found = self.find(hub_last);
        if !beyond && found.is_none() {
            let (code, what) = if hub_last.sequence < self.held_after.sequence {
                (RefusedCode::Gap, "ends before the oldest transfer held here")
            } else {
                (RefusedCode::Diverged, "is not on this source's line")
            };
            let reason = format!(
                "the hub's log of this source, ending with transfer {} (sequence {}), {what}",
                hub_last.transfer, hub_last.sequence
            );
            return elsewhere(code, reason);
        }
        // What was released here was published there. A source that lost its NVRAM holds nothing,
        // but has its own CP still to send.
        let refillable = self.pending.as_ref().is_some_and(|cp| cp.place == self.held_after);
        let behind = applied.sequence < self.held_after.sequence;
        let other = self
            .pending
            .as_ref()
            .is_some_and(|pending| pending.cp == welcome.applied_cp && pending.place != applied);
        if behind && !refillable || !behind && self.find(applied).is_none() || other {
            let code = if behind { RefusedCode::Gap } else { RefusedCode::Diverged };
            let reason = format!(
                "the hub's image, CP {} at sequence {}, is not this source's past: the hub was \
                 rolled back, or the histories went different ways",
                welcome.applied_cp, applied.sequence
            );
            return elsewhere(code, reason);
        }
        Ok(match found {
            None => Joining::Refill,
            // A CP by reference would only be refused there.
            Some(_) if past == Past::Unknown => Joining::Pass(How::Compare),
            // The log alone does not bring up what it was left out of.
            Some(_) if self.volumes.is_behind() && welcome.work => Joining::Pass(How::Compare),
            Some(_) if self.volumes.is_behind() => Joining::Pass(How::Births),
            Some(position) => Joining::Resend(position),
        })
    }

    pub(super) fn refilled(
        &mut self,
        held: Held,
        previous: TransferId,
        hash_before: StreamHash,
        actions: &mut Vec<Action>,
    ) {
        let last = self.last();
        let joins = previous == last.transfer && hash_before == last.hash;
        let rises = held.place.sequence > last.sequence && held.place.transfer > last.transfer;
        let State::Refilling { target } = self.state else {
            self.close("a refilled transfer that was not asked for", actions);
            return;
        };
        if !joins || !rises || held.place.sequence > target.sequence {
            self.close("a refilled transfer does not follow the last one", actions);
            return;
        }
        self.held.push_back(held);
        actions.push(Action::Adopt);
    }

    /// A CP that the hub had published before the connection broke is done: before a refill, so
    /// that what is adopted finds the room and the number it had.
    pub(super) fn settle(&mut self, applied: CpNumber, actions: &mut Vec<Action>) {
        let Some(pending) = self.pending.as_ref().filter(|pending| pending.cp <= applied) else {
            return;
        };
        let (cp, place) = (pending.cp, pending.place);
        // The image lies on this line (`joins`), so the hub has everything up to there.
        self.acked = self.acked.max(self.find(place).unwrap_or_default());
        self.sent = self.sent.max(self.acked);
        self.done(cp, actions);
    }

    pub(super) fn join(&mut self, actions: &mut Vec<Action>) {
        self.state = State::Streaming;
        self.acknowledged();
        actions.push(Action::HubDurable(self.acked_place()));
        self.serve(actions);
        self.catch_up(actions);
    }

    /// Another hub has no say in who is primary here (invariant 12).
    pub(super) fn fenced_by(&mut self, fenced: &Fenced, actions: &mut Vec<Action>) {
        match (self.identity.hub, fenced.hub) {
            (Some(own), Some(other)) if own != other => {
                self.halt(other_hub(own, other), actions);
            }
            (Some(_) | None, Some(_) | None) => self.fenced(fenced.epoch, actions),
        }
    }

    /// An end that sees a higher epoch stops at once (R12).
    pub(super) fn fenced(&mut self, epoch: Epoch, actions: &mut Vec<Action>) {
        if epoch.number <= self.identity.epoch.number {
            self.close("Fenced with an epoch that is not higher", actions);
            return;
        }
        actions.push(Action::Fence(epoch));
        let reason = format!(
            "the hub has taken over in epoch {} ({:016x}): this source serves no more",
            epoch.number, epoch.id
        );
        let next = "`mirrorhub failback` on the hub brings it back";
        self.halt(refused(RefusedCode::Fenced, reason, next), actions);
    }

    pub(super) fn refused(&mut self, refused: Refused, actions: &mut Vec<Action>) {
        match refused.code {
            RefusedCode::Busy
            | RefusedCode::Faulted
            | RefusedCode::UnknownSource
            | RefusedCode::Protocol => {
                self.close(refused.reason, actions);
            }
            RefusedCode::Version
            | RefusedCode::OtherSource
            | RefusedCode::OtherHub
            | RefusedCode::Generation
            | RefusedCode::Diverged
            | RefusedCode::Gap
            | RefusedCode::Volume
            | RefusedCode::Fenced => {
                self.halt(refused, actions);
            }
        }
    }
}

fn other_hub(own: HubId, met: HubId) -> Refused {
    let reason = format!("this source belongs to hub {own}, not to hub {met}");
    refused(RefusedCode::OtherHub, reason, "check `hub` in source.toml")
}
