//! The simulated source: what its shell and stores do.

use super::super::super::mirror::Arrived;
use super::super::super::primary::{self, Answering, Held};
use super::{
    Frame, FrozenCp, PassOut, Pulled, Record, Sending, TRANSFER_BYTES, UPDATE_BYTES, Updates, World,
};
use super::{root_of, transfer};
use crate::record::marks::Place;
use crate::units::numbers::{TransferId, VolumeNumber};
use crate::units::policy::Policy;
use crate::wire::message::Message;

impl World {
    pub(super) fn write(&mut self) {
        self.budget.writes -= 1;
        self.entries += 1;
        let (content, faults, generation) = (self.entries, self.faults, self.source.generation);
        let up = self.source_up();
        up.counter += 1;
        let generation = if faults.generation_not_in_id { 1 } else { generation };
        let id = TransferId { generation, counter: up.counter };
        let mut arrived = transfer(up.last, id, up.label, content);
        arrived.header.own_durable = self.source.last_of(self.source.durable).transfer;
        let up = self.source_up();
        let before = std::mem::replace(&mut up.last, arrived.place);
        self.parents.insert(arrived.place.hash, before);
        self.source.ring.push(Record::Transfer(arrived));
        let held = Held { place: arrived.place, bytes: TRANSFER_BYTES };
        self.step_source(primary::Event::Formed(held), None);
    }

    pub(super) fn source_sync(&mut self) {
        let fresh = self.source.ring[self.source.durable..].to_vec();
        self.source.durable = self.source.ring.len();
        for record in fresh {
            if let Record::Freeze { cp, place, policy } = record {
                self.source_up().frozen.as_mut().unwrap().told = true;
                self.step_source(primary::Event::Frozen { cp, place }, None);
                if let Some(next) = policy {
                    let behind = place.sequence;
                    self.step_source(primary::Event::Promised { next, behind }, None);
                }
                if self.faults.end_before_commit {
                    let roots = vec![(VolumeNumber(0), root_of(place))];
                    self.step_source(primary::Event::Committed { cp, roots }, None);
                }
            }
        }
    }

    pub(super) fn freeze(&mut self) {
        let faults = self.faults;
        let policy = self.policy_at_freeze();
        if !std::mem::take(&mut self.source_up().wants_freeze) && policy.is_none() {
            self.budget.cps -= 1;
        }
        let up = self.source_up();
        let (cp, place) = (up.machine.cp_max().next(), up.last);
        let told = faults.freeze_not_durable;
        up.label = cp.next();
        up.frozen = Some(FrozenCp { cp, place, policy, told, committed: false });
        if faults.freeze_not_durable {
            self.step_source(primary::Event::Frozen { cp, place }, None);
        } else {
            self.source.ring.push(Record::Freeze { cp, place, policy });
        }
    }

    /// From here on the older and the newer policy are kept.
    fn policy_at_freeze(&mut self) -> Option<Policy> {
        if self.source.may_change() { self.policy_that_follows() } else { None }
    }

    fn policy_that_follows(&mut self) -> Option<Policy> {
        let (wanted, in_force) = (self.source.wanted, self.source.policy);
        let up = self.source_up();
        let policy = Some(wanted).filter(|wanted| up.next.is_none() && *wanted != in_force);
        up.next = up.next.or(policy);
        policy
    }

    /// Kept durably before the session hears of it.
    pub(super) fn promise(&mut self) {
        let Some(next) = self.policy_that_follows() else { return };
        self.source.next = Some(next);
        let behind = self.source_up().last.sequence;
        self.step_source(primary::Event::Promised { next, behind }, None);
    }

    pub(super) fn own_commit(&mut self) {
        let up = self.source_up();
        let frozen = up.frozen.as_mut().unwrap();
        frozen.committed = true;
        let (cp, place, policy) = (frozen.cp, frozen.place, frozen.policy);
        self.source.next = policy.or(self.source.next);
        self.source.base = self.source.own.1;
        self.source.own = (cp, place);
        if let Some(other) = self.committed.insert(cp, place)
            && other != place
        {
            self.fail(format!("CP {cp} was committed twice with different content"));
        }
        let roots = vec![(VolumeNumber(0), root_of(place))];
        self.step_source(primary::Event::Committed { cp, roots }, None);
    }

    pub(super) fn send_data(&mut self) {
        let own = self.source.own;
        let base = self.source.base;
        let up = self.source_up();
        let sending = up.sending.as_mut().unwrap();
        let (cp, inline) = (sending.cp, sending.inline);
        if sending.left == 0 {
            let bytes = sending.bytes;
            up.sending = None;
            self.step_source(primary::Event::DataSent { cp, bytes }, None);
            return;
        }
        sending.left -= 1;
        sending.bytes += UPDATE_BYTES;
        up.data.0 += UPDATE_BYTES;
        let to = up.frozen.unwrap().place;
        let base = if own.0 == cp { base } else { own.1 };
        let number = up.connection.unwrap();
        self.to_hub
            .push_back((number, Frame::Updates(Updates { cp, base, to, inline, pass: false })));
    }

    pub(super) fn send_pass(&mut self) {
        let up = self.source_up();
        let pass = up.pass.as_mut().unwrap();
        if std::mem::replace(&mut pass.sent, true) {
            let cp = up.pass.take().unwrap().cp;
            self.step_source(primary::Event::DataSent { cp, bytes: UPDATE_BYTES }, None);
            return;
        }
        let PassOut { cp, base, to, .. } = *pass;
        up.data.0 += UPDATE_BYTES;
        let number = up.connection.unwrap();
        let updates = Updates { cp, base, to, inline: true, pass: true };
        self.to_hub.push_back((number, Frame::Updates(updates)));
    }

    pub(super) fn note_mark(&mut self) {
        let mark = self.source_up().marking.take().unwrap();
        self.source.apart = mark;
        let event = if mark { primary::Event::Apart } else { primary::Event::Together };
        self.step_source(event, None);
    }

    pub(super) fn source_release(&mut self) {
        let released = self.source_up().released;
        self.source.released = released;
        let before = self.source.ring.len();
        let gone = |record: &Record| match record {
            Record::Transfer(arrived) => arrived.place.sequence <= released.sequence,
            // One that cuts nothing stands at the place of the one before.
            Record::Freeze { cp, place, .. } => {
                place.sequence <= released.sequence && *cp <= self.source.own.0
            }
        };
        let durable_gone =
            self.source.ring[..self.source.durable].iter().filter(|r| gone(r)).count();
        self.source.ring.retain(|record| !gone(record));
        assert!(before - self.source.ring.len() == durable_gone, "released before durable");
        self.source.durable -= durable_gone;
    }

    pub(super) fn connect(&mut self) {
        self.connections += 1;
        let number = self.connections;
        let up = self.source_up();
        up.connection = Some(number);
        up.data = (0, 0, 0);
        self.step_source(primary::Event::Connected, None);
    }

    pub(super) fn lose_source_side(&mut self) {
        let up = self.source_up();
        let number = up.connection.take();
        up.sending = None;
        (up.pass, up.offered) = (None, None);
        up.parked = false;
        self.to_source.retain(|(of, _)| Some(*of) != number);
        self.step_source(primary::Event::Disconnected, None);
    }

    pub(super) fn deliver_to_source(&mut self) {
        let (number, frame) = self.to_source.pop_front().unwrap();
        if self.source.up.as_ref().unwrap().connection != Some(number) {
            return;
        }
        match frame {
            Frame::Message(Message::Welcome(mut welcome)) => {
                if self.faults.rollback_unjudged {
                    welcome.own_durable = TransferId::NONE;
                }
                let place = Place::from(welcome.applied);
                let known = self.committed.get(&welcome.applied_cp) == Some(&place);
                let past = match known || welcome.applied_cp.0 == 0 || self.faults.past_unchecked {
                    true if self.faults.base_unknown => primary::Past::Unknown,
                    true => primary::Past::Known,
                    false => primary::Past::No,
                };
                self.step_source(primary::Event::Welcomed { welcome, past }, None);
            }
            Frame::Message(message) => {
                self.step_source(primary::Event::Received(message), None);
            }
            Frame::Refill(arrived) => {
                let event = primary::Event::Refilled {
                    held: Held { place: arrived.place, bytes: TRANSFER_BYTES },
                    previous: arrived.header.previous,
                    hash_before: arrived.header.hash_before,
                };
                self.step_source(event, Some(arrived));
            }
            Frame::Transfer(_) | Frame::Updates(_) | Frame::Pulled(_) => {
                self.fail("a frame went the wrong way");
            }
        }
    }

    pub(in super::super) fn step_source(
        &mut self,
        event: primary::Event,
        refilled: Option<Arrived>,
    ) {
        let lost = matches!(event, primary::Event::HubLost);
        let actions = self.source_up().machine.step(event);
        if lost && self.faults.alone_before_mark && self.source.continues {
            self.source_up().answering = Answering::Alone;
            self.source_up().serving = true;
        }
        let asks = actions.contains(&primary::Action::AskAlone);
        for action in actions {
            self.act_source(action, refilled);
        }
        if asks && self.source.up.is_some() {
            if self.source.waits_to_stop() {
                self.promise();
            }
            let upto = self.acked.sequence;
            self.step_source(primary::Event::AnsweredAlone(upto), None);
        }
    }

    fn adopt(&mut self, arrived: Arrived) {
        let faults = self.faults;
        let up = self.source_up();
        if !faults.labels_not_counted {
            // A label that rises tells where a CP was cut: it is the same cut again (R6).
            if up.is_open() && arrived.header.cp > up.label && up.frozen.is_none() {
                let (cp, place) = (up.label, up.last);
                let policy = self.policy_at_freeze();
                let frozen = FrozenCp { cp, place, policy, told: false, committed: false };
                self.source_up().frozen = Some(frozen);
                self.source.ring.push(Record::Freeze { cp, place, policy });
            }
            self.source_up().label = arrived.header.cp;
        }
        self.source_up().last = arrived.place;
        self.source.ring.push(Record::Transfer(arrived));
    }

    fn send_transfer(&mut self, id: TransferId) {
        let number = self.source_up().connection;
        let found = self.source.ring.iter().find_map(|record| match record {
            Record::Transfer(arrived) if arrived.header.id == id => Some(*arrived),
            Record::Transfer(_) | Record::Freeze { .. } => None,
        });
        match (number, found) {
            (Some(number), Some(arrived)) => {
                self.to_hub.push_back((number, Frame::Transfer(arrived)));
            }
            _ => self.fail(format!("transfer {id} cannot be sent")),
        }
    }

    pub(super) fn act_source(&mut self, action: primary::Action, refilled: Option<Arrived>) {
        use primary::Action;
        self.judge_source_action(&action);
        let (updates, faults) = (self.shape.0, self.faults);
        let up = self.source.up.as_mut().unwrap();
        match action {
            Action::Send(Message::Hello(mut hello)) => {
                if faults.policy_told_early {
                    hello.policy = self.source.wanted;
                }
                if faults.older_hub {
                    hello.version = hello.version_min;
                }
                let number = up.connection.unwrap();
                self.to_hub.push_back((number, Frame::Message(Message::Hello(hello))));
            }
            Action::Send(message) => match up.connection {
                Some(number) => self.to_hub.push_back((number, Frame::Message(message))),
                None => self.fail("the source sends without a connection"),
            },
            Action::SendTransfer(id) => self.send_transfer(id),
            Action::SendData { cp, inline } => {
                up.sending = Some(Sending { cp, inline, left: updates, bytes: 0 });
            }
            Action::DataWindow { taken, limit } => (up.data.1, up.data.2) = (taken, limit),
            Action::HubDurable(place) => up.hub_durable = place,
            Action::Adopt => self.adopt(refilled.unwrap()),
            Action::Joined { hub, epoch } => {
                if self.faults.mark_cleared_early {
                    self.source.apart = false;
                }
                (self.source.hub, self.source.epoch) = (Some(hub), epoch);
            }
            Action::Serve => {
                let open = up.is_open() && !faults.labels_not_counted;
                if !std::mem::replace(&mut up.serving, true) && !open {
                    up.label = up.machine.cp_max().next();
                }
            }
            Action::Done { cp, .. } => {
                let frozen = up.frozen.take().filter(|frozen| frozen.cp == cp).unwrap();
                up.released = frozen.place;
                up.sending = None;
            }
            Action::InForce(policy) => {
                // One catalog commit; before it nothing else of the session happens.
                up.next = None;
                (self.source.policy, self.source.next) = (policy, None);
            }
            Action::Renew => self.lose_source_side(),
            Action::Unasked(began) => self.source.unasked = began,
            Action::Close { reason } => {
                if !self.link_lied {
                    self.fail(format!("the source closes: {reason}"));
                }
                self.lose_source_side();
            }
            Action::Halt(refused) => self.halted(&refused.reason),
            other => self.act_apart(&other),
        }
    }

    fn halted(&mut self, reason: &str) {
        self.source_up().halted = true;
        if self.restored.is_some() {
            self.lose_source_side();
        } else {
            self.fail(format!("the source halts: {reason}"));
        }
    }

    fn act_apart(&mut self, action: &primary::Action) {
        use primary::Action;
        let up = self.source.up.as_mut().unwrap();
        match action {
            Action::Answer(answering) => up.answering = *answering,
            Action::MarkApart(_) => up.marking = Some(true),
            // Said behind the rest.
            Action::AskAlone => {}
            Action::ClearApart => up.marking = Some(false),
            Action::SendPass { cp, base } => {
                let (cp, newest) = (*cp, self.source.own.0);
                if cp != newest {
                    // The shell reads the newest own tree, whatever it is called.
                    return self.fail(format!("a pass sends CP {cp}, the own one is CP {newest}"));
                }
                let base = self.committed.get(base).copied().unwrap_or_default();
                let to = self.committed[&cp];
                up.sending = None;
                up.pass = Some(PassOut { cp, base, to, sent: false });
            }
            Action::SetBack { .. } | Action::Shown { .. } | Action::Unsend => {}
            Action::SendCompare { cp, .. } => {
                (up.sending, up.pass) = (None, None);
                up.offered = Some((*cp, self.committed[cp]));
            }
            Action::ServePull(want) => {
                let newest = self.source.own.1;
                let (number, cp) = (up.connection.unwrap(), want.cp());
                match up.offered.filter(|(offered, _)| *offered == cp) {
                    Some((_, place)) => {
                        let of = if self.faults.target_unpinned { newest } else { place };
                        self.to_hub.push_back((number, Frame::Pulled(Pulled { cp, of })));
                    }
                    None => self.fail("an answer about what is not offered"),
                }
            }
            // A newer CP comes some day.
            Action::Faulted { .. } => {
                (up.offered, up.wants_freeze) = (None, up.frozen.is_none());
            }
            Action::PassEnded { .. } => up.offered = None,
            Action::LeaveOut(refused) => assert!(refused.is_empty(), "no volume is refused here"),
            Action::Rejected { no_space, .. } => up.parked = *no_space,
            Action::Freeze => up.wants_freeze = up.frozen.is_none(),
            Action::Fence(_) => self.fail("the source is fenced"),
            Action::Checkpoint { .. } | Action::Scan { .. } | Action::Scanned(_) => {}
            other => panic!("{other:?} has nothing to do with being apart"),
        }
    }
}
