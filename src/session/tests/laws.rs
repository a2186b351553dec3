//! What must hold in every simulated world, after every step and for every action.
//!
//! The numbers in the messages are the invariants of design.md, section 5, and the rules R1 to R20.

use std::hash::{Hash, Hasher};

use super::super::primary::Answering;
use super::super::{mirror, primary};
use super::world::{Frame, Record, UPDATE_BYTES, World};
use crate::record::marks::Place;
use crate::units::convert::to_u64;
use crate::units::numbers::CpNumber;
use crate::units::policy::Mode;
use crate::wire::message::{BehindState, Message};

impl World {
    /// The state of both stores, after every step.
    pub(super) fn judge(&mut self) {
        let problem = self.judge_promises().or_else(|| self.judge_hub_log());
        if let Some(problem) = problem {
            self.fail(problem);
        }
    }

    fn judge_promises(&self) -> Option<String> {
        let (source, hub) = (&self.source, &self.hub);
        let own = source.last_of(source.durable);
        if !self.damaged && !self.on_line(self.acked, own) {
            let acked = self.acknowledged();
            return Some(format!("invariant 1: write {acked} is not at the source, {own:?}"));
        }
        let alone = source.up.as_ref().is_some_and(|up| up.answering == Answering::Alone);
        if alone && !source.apart {
            return Some("R4: answers alone without the durable mark".to_owned());
        }
        // What the hub would say after the source's loss must be true, whatever the source knows.
        let strict = hub.told.is_some_and(|(policy, alone)| policy.never_alone() && !alone);
        let in_sync = hub.told.is_none_or(|(policy, _)| policy.mode == Mode::Sync);
        let (policies, last) = ([source.wanted, source.policy], hub.last());
        let changes = source.next.is_some() || policies.contains(&source.alternate);
        let rule = if changes { "R20" } else { "invariant 1" };
        if (strict || !source.apart && in_sync) && !self.on_line(self.acked, last) {
            let acked = self.acknowledged();
            return Some(format!("{rule}: write {acked} is not on the hub, {last:?}"));
        }
        if !source.apart && !self.on_line(self.acked_both, last) {
            let acked = self.acked_both.sequence;
            return Some(format!("R20: write {acked}, answered under sync, is not on the hub"));
        }
        // Also alone: what both ends have acknowledged is never less safe than it was.
        if !self.damaged && !self.on_line(self.acked_both, last) {
            let acked = self.acked_both.sequence;
            return Some(format!(
                "invariant 4: write {acked}, acknowledged by both, is not on the hub"
            ));
        }
        let (cp, place) = hub.image;
        if hub.content != place {
            return Some(format!("invariant 3: CP {cp} holds {:?}, not {place:?}", hub.content));
        }
        let before = self.restored.as_ref().is_some_and(|had| had.get(&cp) == Some(&place));
        if cp.0 > 0 && self.committed.get(&cp) != Some(&place) && !before {
            return Some(format!("R6: CP {cp} is published, the source never committed it so"));
        }
        if cp > source.own.0 && !before {
            return Some(format!("R6: the hub's CP {cp} is ahead of the source"));
        }
        None
    }

    /// The hub's log continues its image without a gap, and each label says on which side of a
    /// published CP a transfer lies (invariants 4 and 6).
    fn judge_hub_log(&self) -> Option<String> {
        let (cp, image) = self.hub.image;
        let mut last = image;
        for arrived in &self.hub.log {
            let (header, place) = (&arrived.header, arrived.place);
            let applied = place.sequence <= image.sequence;
            if applied != (header.cp <= cp) {
                let id = header.id;
                return Some(format!("R6: transfer {id} of CP {} beside CP {cp}", header.cp));
            }
            if applied {
                continue;
            }
            let joins = header.previous == last.transfer && header.hash_before == last.hash;
            if !joins || header.first_sequence != last.sequence.next() {
                return Some(format!("R7: transfer {} does not follow {last:?}", header.id));
            }
            last = place;
        }
        None
    }

    pub(super) fn judge_source_action(&mut self, action: &primary::Action) {
        use primary::Action;
        let problem = match action {
            Action::Send(Message::PartitionFull(full)) if full.base.is_some() => {
                let cp = full.cp;
                (self.committed.get(&cp) != Some(&full.last.into()) || !self.source.apart)
                    .then(|| format!("R4: a pass to CP {cp} that is not committed, or unmarked"))
            }
            Action::Send(Message::Compare(compare)) => {
                let cp = compare.cp;
                (self.committed.get(&cp) != Some(&compare.place.into()) || !self.source.apart)
                    .then(|| format!("R4: CP {cp} is offered, not committed, or unmarked"))
            }
            Action::Send(Message::PartitionFull(full)) => {
                let cp = full.cp;
                let written = |record: &Record| match record {
                    Record::Freeze { cp: frozen, .. } => *frozen == cp,
                    Record::Transfer(_) => false,
                };
                let durable = self.source.ring[..self.source.durable].iter().any(written);
                (!durable && self.source.own.0 < cp)
                    .then(|| format!("R6: PartitionFull of CP {cp} before its freeze is durable"))
                    .or_else(|| self.judge_labels(cp, full.last.into()))
            }
            Action::Send(Message::CpEnd(end)) if end.cp > self.source.own.0 => {
                Some(format!("R6: CpEnd of CP {} before the own commit", end.cp))
            }
            Action::Done { cp, alone: true } if *cp > self.source.own.0 || !self.source.apart => {
                Some(format!("invariant 4: partition of CP {cp} released alone too early"))
            }
            Action::Done { cp, alone: false }
                if *cp > self.source.own.0 || *cp > self.hub.image.0 =>
            {
                Some(format!("invariant 4: partition of CP {cp} released too early"))
            }
            Action::Serve => {
                let last = self.source.up.as_ref().unwrap().last;
                (!self.on_line(self.acked, last))
                    .then(|| "R1: served without an acknowledged write".to_owned())
            }
            Action::HubDurable(place) => (!self.on_line(*place, self.hub.last()))
                .then(|| format!("invariant 1: {place:?} is taken for durable on the hub")),
            Action::DataWindow { taken, .. } => {
                let sent = self.source.up.as_ref().unwrap().data.0;
                (*taken > sent).then(|| format!("{taken} bytes of CP data taken, {sent} sent"))
            }
            _ => None,
        };
        if let Some(problem) = problem.filter(|_| !self.faults.actions_unjudged) {
            self.fail(problem);
        }
    }

    /// Everything up to the end of a CP carries its number or a lower one, nothing behind it does.
    fn judge_labels(&self, cp: CpNumber, last: Place) -> Option<String> {
        let ring = self.source.ring.iter().filter_map(|record| match record {
            Record::Transfer(arrived) => Some(arrived),
            Record::Freeze { .. } => None,
        });
        let wrong = ring
            .chain(&self.hub.log)
            .find(|t| (t.place.sequence <= last.sequence) != (t.header.cp <= cp))?;
        let (id, label) = (wrong.header.id, wrong.header.cp);
        Some(format!("R6: transfer {id} says CP {label}, CP {cp} ends at {last:?}"))
    }

    pub(super) fn judge_hub_action(&mut self, action: &mirror::Action) {
        use mirror::Action;
        let hub = &self.hub;
        let up = hub.up.as_ref().unwrap();
        let problem = match action {
            Action::Send(Message::Ack(ack)) if ack.id > hub.last().transfer => {
                Some(format!("invariant 1: Ack of {} before it is durable", ack.id))
            }
            Action::Send(Message::Welcome(welcome)) => {
                let whole = Place::from(welcome.last) == hub.last() && hub.durable == hub.log.len();
                (!whole || up.record.is_some() || up.job.is_some())
                    .then(|| "R7: Welcome before all that is queued came to rest".to_owned())
            }
            Action::Send(Message::CpDone(done)) if done.cp > hub.image.0 => {
                Some(format!("invariant 4: CpDone of CP {} before its commit", done.cp))
            }
            Action::DropLogs(cp) if *cp > hub.image.0 => {
                Some(format!("invariant 4: logs of CP {cp} dropped before its commit"))
            }
            Action::Feed => {
                let job = up.job.as_ref().map_or(0, |job| job.fed.len() - job.taken);
                let bytes = to_u64(job + up.early.len() + 1) * UPDATE_BYTES;
                (bytes > self.shape.1).then(|| format!("invariant 8: {bytes} bytes of CP data"))
            }
            _ => None,
        };
        if let Some(problem) = problem.filter(|_| !self.faults.actions_unjudged) {
            self.fail(problem);
        }
    }

    /// Equal for worlds that behave alike: connection numbers count only in so far as the ends
    /// agree on them.
    #[expect(clippy::too_many_lines, reason = "a list of all fields")]
    pub(super) fn fingerprint<H: Hasher>(&self, to: &mut H) {
        let place = |place: Place, to: &mut H| (place.transfer, place.hash).hash(to);
        self.budget.hash(to);
        (self.damaged, self.link_lied, self.source.generation, self.entries).hash(to);
        if let Some(had) = &self.restored {
            had.iter().for_each(|(cp, place)| (cp, place.hash).hash(to));
        }
        place(self.acked, to);
        place(self.acked_both, to);
        let source = &self.source;
        (source.durable, source.hub.is_some(), source.own.0, source.apart).hash(to);
        place(source.own.1, to);
        (source.wanted, source.policy, source.next, self.hub.told).hash(to);
        place(source.base, to);
        place(source.released, to);
        for record in &source.ring {
            match record {
                Record::Transfer(arrived) => (0, arrived.place.hash, arrived.header.cp).hash(to),
                Record::Freeze { cp, policy, .. } => (1, cp, policy).hash(to),
            }
        }
        let mut connections = (None, None);
        if let Some(up) = &source.up {
            connections.0 = up.connection;
            (up.serving, up.halted, up.counter, up.label, up.sending).hash(to);
            (up.data, up.parked, up.marking, up.answering, up.wants_freeze).hash(to);
            up.pass.map(|pass| (pass.cp, pass.base.hash, pass.sent)).hash(to);
            up.offered.map(|(cp, place)| (cp, place.hash)).hash(to);
            up.frozen
                .map(|frozen| (frozen.cp, frozen.told, frozen.committed, frozen.policy))
                .hash(to);
            up.next.hash(to);
            place(up.released, to);
            place(up.hub_durable, to);
            up.machine.fingerprint(to);
        }
        let hub = &self.hub;
        (hub.generation, hub.source.is_some(), hub.image.0, hub.durable, hub.log.len()).hash(to);
        place(hub.image.1, to);
        hub.work.map(|of| of.hash).hash(to);
        hub.log.iter().for_each(|arrived| (arrived.place.hash, arrived.header.cp).hash(to));
        if let Some(up) = &hub.up {
            connections.1 = up.connection;
            (up.drained, up.early.len(), up.log_credit).hash(to);
            up.record
                .map(|(number, _, _, _, policy, alone)| {
                    (Some(number) == up.connection, policy, alone)
                })
                .hash(to);
            up.refill.map(|from| from.hash).hash(to);
            up.behind.iter().for_each(|arrived| arrived.place.hash.hash(to));
            up.behind_written.hash(to);
            if let Some(job) = &up.job {
                (job.cp, job.fed.len(), job.taken, job.end.is_some(), job.abort).hash(to);
                (job.build, job.keeps_log, job.asked).hash(to);
                job.parts.iter().for_each(|part| part.hash.hash(to));
            }
            up.machine.fingerprint(to);
        }
        (connections.0 == connections.1, connections.0.is_some(), connections.1.is_some()).hash(to);
        // Which Hello is older than which, and not how many there were.
        let newest = hub.up.as_ref().map_or(0, |up| up.machine.connection());
        let base = source.up.as_ref().map_or(newest, |up| up.machine.connections());
        base.wrapping_sub(newest).hash(to);
        for (direction, queue) in [(0, &self.to_hub), (1, &self.to_source)] {
            for (number, frame) in queue {
                (direction, Some(*number) == connections.0, Some(*number) == connections.1)
                    .hash(to);
                if let Frame::Message(Message::Hello(hello)) = frame {
                    base.wrapping_sub(hello.connection).hash(to);
                }
                hash_frame(frame, to);
            }
        }
    }
}

fn hash_frame<H: Hasher>(frame: &Frame, to: &mut H) {
    match frame {
        Frame::Transfer(arrived) => (1, arrived.place.hash).hash(to),
        Frame::Refill(arrived) => (2, arrived.place.hash).hash(to),
        Frame::Updates(updates) => (3, updates.cp, updates.base.hash, updates.inline).hash(to),
        Frame::Pulled(pulled) => (4, pulled.cp, pulled.of.hash).hash(to),
        Frame::Message(message) => {
            message.name().hash(to);
            match message {
                Message::Hello(hello) => {
                    (hello.generation, hello.last.1, hello.held_after.1, hello.own_cp).hash(to);
                    (hello.cp_max, hello.serving, hello.hub.is_some(), hello.policy).hash(to);
                }
                Message::Welcome(welcome) => {
                    (welcome.last.2, welcome.applied_cp, welcome.log_credit).hash(to);
                    welcome.work.hash(to);
                }
                Message::PartitionFull(full) => {
                    (full.cp, full.last.2, full.base, full.keeps_log).hash(to);
                }
                Message::Compare(compare) => {
                    (compare.cp, compare.base, compare.place.2, compare.keeps_log).hash(to);
                }
                Message::WantNodes(want) => (want.cp, want.number).hash(to),
                Message::CpEnd(end) => (end.cp, end.place.2, end.update_bytes).hash(to),
                Message::Ack(ack) => (ack.id, ack.log_credit, ack.cp_taken).hash(to),
                Message::CpDone(done) => done.cp.hash(to),
                Message::CpRejected(no) => (no.cp, no.no_space).hash(to),
                Message::Behind(behind) => match behind.state {
                    BehindState::Taken(id) => (behind.cp, 0, id).hash(to),
                    BehindState::Joins => (behind.cp, 1).hash(to),
                    BehindState::Over => (behind.cp, 2).hash(to),
                },
                Message::WantLog(want) => want.from.2.hash(to),
                Message::RefillEnd(end) => end.last.2.hash(to),
                _ => {}
            }
        }
    }
}
