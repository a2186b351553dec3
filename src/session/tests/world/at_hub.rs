//! The simulated hub: what its shell and stores do.

use super::super::super::mirror::{self, Arrived, Outcome};
use super::{Frame, Job, UPDATE_BYTES, World, root_of};
use crate::units::convert::to_u64;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::wire::message::Message;
use crate::wire::pull::WantNodes;

impl World {
    /// Where the first frame stands that is not of the first frame's connection.
    pub(super) fn other_connection(&self) -> Option<usize> {
        let first = self.to_hub.front()?.0;
        self.to_hub.iter().position(|(number, _)| *number != first)
    }

    pub(super) fn deliver_to_hub(&mut self, at: usize) {
        let (number, frame) = self.to_hub.remove(at).unwrap();
        let faults = self.faults;
        let up = self.hub_up();
        let current = up.connection == Some(number);
        match frame {
            Frame::Message(Message::Hello(hello)) => {
                if let Err(refused) = up.machine.accepts(&hello) {
                    let heard = self.source.up.as_ref().and_then(|up| up.connection);
                    // An old copy is told so; an honest source is never refused.
                    if heard == Some(number) && self.restored.is_some() {
                        self.to_source
                            .push_back((number, Frame::Message(Message::Refused(refused))));
                    } else if heard == Some(number) {
                        self.fail(format!("the hub refuses: {}", refused.reason));
                    }
                    return;
                }
                let before = self.hub_up().connection.replace(number);
                self.hub_up().early.clear();
                self.hub_up().refill = None;
                self.forget_behind();
                self.step_hub(mirror::Event::Hello(*hello), None);
                self.to_source.retain(|(of, _)| Some(*of) != before);
                if faults.welcome_before_durable {
                    let received = self.hub_up().machine.ladder()[0];
                    self.step_hub(mirror::Event::Durable(received), None);
                }
            }
            Frame::Transfer(_) if faults.session_not_flushed => {
                if up.machine.is_joined() {
                    self.transfer(&frame);
                }
            }
            _ if !current => {}
            Frame::Message(message) => self.step_hub(mirror::Event::Received(message), None),
            Frame::Transfer(_) => self.transfer(&frame),
            Frame::Updates(updates) => {
                let event = mirror::Event::Updates { cp: updates.cp, bytes: UPDATE_BYTES };
                self.step_hub(event, Some(Frame::Updates(updates)));
            }
            Frame::Pulled(pulled) => {
                self.step_hub(mirror::Event::Pulled { cp: pulled.cp }, Some(frame));
            }
            Frame::Refill(_) => self.fail("a frame went the wrong way"),
        }
    }

    pub(super) fn transfer(&mut self, frame: &Frame) {
        let Frame::Transfer(arrived) = frame else { return };
        let mut arrived = *arrived;
        let faults = self.faults;
        let received = self.hub_up().machine.ladder()[0];
        if faults.predecessor_unchecked {
            arrived.header.previous = received.transfer;
            arrived.header.hash_before = received.hash;
            arrived.header.first_sequence = received.sequence.next();
        }
        let before = self.hub.log.len();
        self.step_hub(mirror::Event::Transfer(arrived), Some(frame.clone()));
        if faults.late_transfer_kept && self.hub.log.len() == before {
            self.hub.log.push(arrived);
        }
        if faults.ack_before_durable {
            let received = self.hub_up().machine.ladder()[0];
            self.step_hub(mirror::Event::Durable(received), None);
        }
    }

    pub(super) fn hub_sync(&mut self) {
        self.hub.durable = self.hub.log.len();
        let place = self.hub.last();
        self.step_hub(mirror::Event::Durable(place), None);
    }

    pub(super) fn drain(&mut self) {
        let durable = self.hub.durable;
        self.hub_up().drained = durable;
        let place = self.hub.last();
        self.step_hub(mirror::Event::Drained(place), None);
    }

    pub(super) fn recorded(&mut self) {
        let up = self.hub_up();
        let (number, generation, epoch, source, policy, alone) = up.record.take().unwrap();
        let current = up.connection == Some(number);
        self.hub.told = Some((policy, alone));
        self.hub.generation = generation;
        self.hub.epoch = epoch;
        self.hub.source = Some(source);
        if current {
            self.step_hub(mirror::Event::Recorded, None);
        }
    }

    pub(super) fn end_apply(&mut self) {
        let up = self.hub.up.as_ref().unwrap();
        let job = up.job.as_ref().unwrap();
        if job.abort {
            return self.end_job(Outcome::Aborted);
        }
        let (cp, last, end) = (job.cp, job.last, job.end.clone().unwrap());
        let sets_log = job.build.is_pass() && !job.keeps_log;
        let content = self.hub.build(job);
        let roots: Vec<_> = content.map(root_of).into_iter().collect();
        if end.roots.iter().map(|root| root.root).ne(roots.iter().copied()) {
            self.fail(format!("CP {cp} was built from other content than the source's"));
            let reason = "roots differ".to_owned();
            return self.end_job(Outcome::Rejected { differs: None, reason });
        }
        self.hub.image = (cp, last);
        self.hub.content = content.unwrap();
        let mut left = Vec::new();
        if sets_log {
            let up = self.hub_up();
            left = up.behind.split_off(up.behind_written);
            self.hub.log = std::mem::take(&mut self.hub_up().behind);
            self.hub.durable = self.hub.log.len();
            self.hub_up().drained = self.hub.durable;
            let log = self.hub.log.last().map_or(last, |arrived| arrived.place);
            let held = left.last().map_or(log, |arrived| arrived.place);
            self.step_hub(mirror::Event::LogSet(log, held), None);
        }
        self.end_job(Outcome::Published(vec![(VolumeNumber(0), roots[0])]));
        // What came too late for the log goes the way of the rest.
        let received = self.hub_up().machine.ladder()[0].sequence;
        left.retain(|arrived| arrived.place.sequence <= received);
        self.hub.log.extend(left);
    }

    /// What came behind a pass is on its way to the medium, or lost with the connection.
    fn forget_behind(&mut self) {
        let up = self.hub_up();
        up.behind.truncate(up.behind_written);
    }

    pub(super) fn write_behind(&mut self) {
        let up = self.hub_up();
        up.behind_written = up.behind.len();
        let place = up.behind.last().unwrap().place;
        if self.faults.behind_counts_early {
            let behind = self.hub_up().behind.clone();
            self.hub.log.extend(behind);
            self.hub.durable = self.hub.log.len();
        }
        self.step_hub(mirror::Event::BehindWritten(place, 1), None);
    }

    /// Asks for what is missing of what is compared.
    pub(super) fn ask(&mut self) {
        let job = self.hub_up().job.as_mut().unwrap();
        let (cp, number) = (job.cp, job.asked.max(job.parts.len()));
        job.asked = number + 1;
        let mut nodes = crate::wire::pull::Spans::new();
        nodes.push(0);
        let (volume, number) = (VolumeNumber(0), to_u64(number));
        let want = WantNodes { cp, volume, number, level: 1, nodes };
        if let Some(connection) = self.hub_up().connection {
            self.to_source.push_back((connection, Frame::Message(Message::WantNodes(want))));
        }
    }

    /// What came of a pass stays until it is published, or refused.
    pub(super) fn end_job(&mut self, outcome: Outcome) {
        let cp = self.hub_up().job.take().unwrap().cp;
        if !self.faults.behind_not_dropped {
            self.hub_up().behind.clear();
            self.hub_up().behind_written = 0;
        }
        match outcome {
            Outcome::Published(_) | Outcome::Rejected { .. } => self.hub.work = None,
            Outcome::NoSpace | Outcome::OverLimit { .. } | Outcome::Aborted => {}
        }
        let work = self.hub.work.is_some();
        self.hub_up().machine.works(work);
        self.step_hub(mirror::Event::Applied { cp, outcome }, None);
    }

    pub(super) fn send_log(&mut self) {
        let up = self.hub_up();
        let (from, number) = (up.refill.take().unwrap(), up.connection.unwrap());
        let upto = self.hub.last();
        let behind = |arrived: &&Arrived| arrived.place.sequence > from.sequence;
        let log: Vec<_> = self.hub.log[..self.hub.durable].iter().filter(behind).copied().collect();
        let joins = log.first().is_none_or(|first| first.header.hash_before == from.hash);
        if joins {
            for arrived in log {
                self.to_source.push_back((number, Frame::Refill(arrived)));
            }
        }
        self.step_hub(mirror::Event::LogSent(joins.then_some(upto)), None);
    }

    pub(super) fn lose_hub_side(&mut self) {
        let up = self.hub_up();
        let number = up.connection.take();
        up.early.clear();
        up.refill = None;
        up.behind.truncate(up.behind_written);
        self.to_hub.retain(|(of, _)| Some(*of) != number);
        self.step_hub(mirror::Event::Disconnected, None);
    }

    pub(in super::super) fn step_hub(&mut self, event: mirror::Event, frame: Option<Frame>) {
        let actions = self.hub_up().machine.step(event);
        for action in actions {
            self.act_hub(action, frame.as_ref());
        }
    }

    #[expect(clippy::too_many_lines, reason = "one list of what can happen")]
    pub(super) fn act_hub(&mut self, action: mirror::Action, frame: Option<&Frame>) {
        use mirror::Action;
        self.judge_hub_action(&action);
        let faults = self.faults;
        let up = self.hub.up.as_mut().unwrap();
        match action {
            Action::Send(message) => match up.connection {
                Some(number) => self.to_source.push_back((number, Frame::Message(message))),
                None => self.fail("the hub sends without a connection"),
            },
            Action::Record { source, generation, epoch, policy, alone, .. } => {
                let alone = alone.is_some();
                let number = up.connection.unwrap();
                up.record = Some((number, generation, epoch, source, policy, alone));
            }
            Action::Stage => match frame {
                Some(Frame::Transfer(arrived)) => self.hub.log.push(*arrived),
                _ => self.fail("Stage without a transfer"),
            },
            Action::StageBehind => match frame {
                Some(Frame::Transfer(arrived)) => up.behind.push(*arrived),
                _ => self.fail("StageBehind without a transfer"),
            },
            Action::DropBehind => {
                up.behind.clear();
                up.behind_written = 0;
            }
            Action::Apply { cp, last, build } => {
                if up.job.is_some() {
                    return self.fail("two CPs are applied at once");
                }
                let fed = std::mem::take(&mut up.early);
                let work = self.hub.work.filter(|_| build == mirror::Build::Compare);
                // What is kept is compared like all else.
                let parts = work.filter(|of| *of == last || faults.work_trusted);
                let (end, abort, parts) = (None, false, parts.into_iter().collect());
                let (keeps_log, taken, asked) = (up.machine.keeps_log(), 0, 0);
                let keeps_log = keeps_log && !faults.pass_drops_log;
                let job = Job { cp, last, fed, taken, end, abort, build, keeps_log, parts, asked };
                up.job = Some(job);
                if faults.drop_before_publish {
                    self.drop_logs(cp);
                }
            }
            Action::Feed => self.feed(frame),
            Action::Finish(end) => match &mut up.job {
                Some(job) => job.end = Some(end),
                None => self.fail("Finish without a job"),
            },
            Action::Abort => match &mut up.job {
                Some(job) => job.abort = true,
                None => self.fail("Abort without a job"),
            },
            Action::DropLogs(cp) => self.drop_logs(cp),
            Action::SendLog { from } => up.refill = Some(from),
            Action::Refuse(refused) => {
                self.fail(format!("the hub refuses: {}", refused.reason));
            }
            Action::Close { reason } => {
                if !self.link_lied {
                    self.fail(format!("the hub closes: {reason}"));
                }
                self.lose_hub_side();
            }
            Action::Joined
            | Action::Scan { .. }
            | Action::CheckpointAt { .. }
            | Action::Scanned(_) => {}
        }
    }

    fn feed(&mut self, frame: Option<&Frame>) {
        let up = self.hub.up.as_mut().unwrap();
        match (frame, &mut up.job) {
            (Some(Frame::Pulled(pulled)), Some(job)) => {
                job.parts.push(pulled.of);
                self.hub.work = Some(pulled.of);
            }
            (Some(Frame::Updates(updates)), Some(job)) => {
                job.fed.push(*updates);
                if updates.pass {
                    self.hub.work = Some(updates.to);
                }
            }
            (Some(Frame::Updates(updates)), None) => up.early.push(*updates),
            _ => self.fail("Feed without updates"),
        }
    }

    pub(super) fn drop_logs(&mut self, cp: CpNumber) {
        let gone = |arrived: &Arrived| arrived.header.cp <= cp;
        let hub = &mut self.hub;
        let drained = hub.up.as_ref().map_or(0, |up| up.drained);
        let durable_gone = hub.log[..hub.durable].iter().filter(|t| gone(t)).count();
        let drained_gone = hub.log[..drained].iter().filter(|t| gone(t)).count();
        hub.log.retain(|arrived| !gone(arrived));
        hub.durable -= durable_gone;
        if let Some(up) = &mut hub.up {
            up.drained -= drained_gone;
        }
    }
}
