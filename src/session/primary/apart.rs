//! Away from the hub and back: serving alone, the passes that bring the image up, the way to
//! `in-sync` (R4).
//!
//! Called by [`super::Primary::step`]. **Apart** is a durable mark: the hub may lack writes that
//! were acknowledged. It stands before the first acknowledgement alone and before the first pass,
//! and goes when everything that was acknowledged meanwhile is durable on the hub.
//!
//! ```text
//! hub lost --MarkApart, Apart--> alone: a CP is done with the own commit
//! Welcome, logs join ------------> catching up: transfers are sent, answers still alone
//! Welcome, logs do not join -----> passes: the newest own CP is sent as what was born since the
//!                                  image's, or compared with the image, which pulls what differs;
//!                                  the image moves in one step; again, until they join
//! caught up: answers need the hub again --AskAlone, AnsweredAlone--> how far they did not
//! all of that is durable there --ClearApart, Together-->
//! ```
//!
//! While a pass runs the log is sent on, and the hub keeps it aside ([`super::behind`]). If the own NVRAM fills up, the
//! CP that holds the room is done alone; if the hub lacks what it was made of, another pass, of what was written
//! during this one, follows. A pass that the hub refused is sent again from the
//! newest own CP.
//!
//! A pass may end before what the hub holds: writes that both ends had acknowledged behind the last
//! CP before the hub was lost. What of the hub's log is of this line stays there (invariant 4).
//!
//! Trees are compared where births tell nothing: the image has another content than the own CP of
//! its place, or a pass was cut and the hub keeps what came of it, or CPs were refused (R19). What is
//! refused is first sent again, then repaired by comparison with a newer CP; where that is refused
//! as well the hub counts as lost, and nothing is tried before there is a newer CP still.

use super::checkpoint::{REFUSALS_MAX, end_of};
use super::{Action, Answering, Data, PendingCp, Primary, State};
use crate::record::marks::Place;
use crate::units::hash::Root;
use crate::units::numbers::{CpNumber, SequenceNumber, VolumeNumber};
use crate::wire::message::{
    Compare, CpRejected, Message, PartitionFull, PullVolume, RefusedCode, Standing, VolumeRoot,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Mark {
    Absent,
    /// Being made durable.
    Setting,
    Set,
    /// Being taken away durably.
    Clearing,
}

/// How a pass finds what the image lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum How {
    /// What was born since the image's CP.
    Births,
    /// The hub compares.
    Compare,
}

/// The own CP that is sent whole, as far as the image lacks it.
#[derive(Debug, Clone)]
struct Pass {
    how: How,
    cp: CpNumber,
    place: Place,
    base: CpNumber,
    roots: Vec<VolumeRoot>,
    data: Data,
    refusals: u32,
    /// The hub's log goes on behind `place` on this line, and the hub was told to keep it.
    keeps_log: bool,
    log: PassLog,
}

/// What becomes of the log while a pass runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum PassLog {
    /// It is sent behind the pass.
    Rests,
    /// It is sent now, and the hub keeps it aside.
    Goes,
    /// The hub has published the pass, and it is its log.
    Joins,
    /// One end has given up what was sent.
    Over,
}

/// What the hub's log is to this line while the image is brought up.
#[derive(Debug, Clone, Copy)]
pub(super) enum HubLog {
    /// It has nothing behind the image that this line has.
    Spent,
    /// It ends there, on this line.
    Joins(Place),
    /// It ends on another line, which left this one there at the latest. It goes with the first pass, and
    /// what it has of this line with it, which both ends may have acknowledged: so no pass ends before.
    Forks(Place),
}

impl HubLog {
    fn end(self) -> Option<Place> {
        match self {
            Self::Joins(end) => Some(end),
            Self::Spent | Self::Forks(_) => None,
        }
    }

    /// Whether a pass may end at that place.
    fn lets_end(self, place: Place) -> bool {
        match self {
            Self::Forks(at) => place.sequence >= at.sequence,
            Self::Spent | Self::Joins(_) => true,
        }
    }
}

/// How far a session has come in bringing both ends together.
#[derive(Debug, Clone)]
enum Way {
    /// Nothing to bring together, or no session.
    None,
    /// The logs do not join: passes. `base` is the CP of the image; `asked` for a freeze; `log` is
    /// the hub's.
    Syncing { base: CpNumber, how: How, pass: Option<Pass>, asked: bool, log: HubLog },
    /// The logs join: until the hub has what was formed when this began.
    Catching { target: Place },
    /// Answers need the hub again: until it has what was answered before without it. The shell says
    /// how far that is: the own ring is durable, and its clients are answered, before this machine
    /// hears of the transfer.
    Closing { target: Option<SequenceNumber> },
}

/// The mark, and the way back.
#[derive(Debug, Clone)]
pub(super) struct Apart {
    mark: Mark,
    way: Way,
    /// The newest CP that is of no use to the hub: it was refused so often that only a comparison
    /// with a newer one helps, or a volume has grown since.
    refused: Option<CpNumber>,
    /// A comparison was refused: no newer CP is asked for.
    faulted: bool,
}

pub(super) fn volume_roots(roots: Vec<(VolumeNumber, Root)>) -> Vec<VolumeRoot> {
    roots.into_iter().map(|(volume, root)| VolumeRoot { volume, root }).collect()
}

impl Apart {
    pub(super) fn new(marked: bool) -> Self {
        let mark = if marked { Mark::Set } else { Mark::Absent };
        Self { mark, way: Way::None, refused: None, faulted: false }
    }

    /// A volume has grown since CP `own`: only a newer one has the size that the hub is told.
    pub(super) fn outgrown(&mut self, own: CpNumber) {
        self.refused = self.refused.max(Some(own));
    }

    /// Whether the mark may be found after a crash.
    pub(super) fn is_marked(&self) -> bool {
        self.mark != Mark::Absent
    }

    /// Whether the logs do not join yet.
    pub(super) fn is_syncing(&self) -> bool {
        matches!(self.way, Way::Syncing { .. })
    }

    fn pass(&self) -> Option<&Pass> {
        if let Way::Syncing { pass, .. } = &self.way { pass.as_ref() } else { None }
    }

    fn pass_mut(&mut self) -> Option<&mut Pass> {
        if let Way::Syncing { pass, .. } = &mut self.way { pass.as_mut() } else { None }
    }

    /// What becomes of the log, in a pass.
    pub(super) fn pass_log(&self) -> Option<PassLog> {
        self.pass().map(|pass| pass.log)
    }

    pub(super) fn set_pass_log(&mut self, log: PassLog) {
        if let Some(pass) = self.pass_mut() {
            pass.log = log;
        }
    }

    pub(super) fn pass_data(&mut self) -> Option<&mut Data> {
        self.pass_mut().map(|pass| &mut pass.data)
    }

    /// Whether this CP was announced as a pass on this connection.
    pub(super) fn is_passing(&self, cp: CpNumber) -> bool {
        self.pass().is_some_and(|pass| pass.cp == cp && pass.data.is_announced())
    }

    /// Whether this CP was offered for comparison on this connection.
    pub(super) fn is_compared(&self, cp: CpNumber) -> bool {
        self.is_passing(cp) && self.pass().is_some_and(|pass| pass.how == How::Compare)
    }

    /// A CP was published: whatever was refused before is of no interest any more.
    pub(super) fn repaired(&mut self) {
        (self.refused, self.faulted) = (None, false);
    }

    pub(super) fn data_sent(&mut self, cp: CpNumber, bytes: u64) -> bool {
        let Some(pass) = self.pass_mut().filter(|pass| pass.cp == cp) else { return false };
        if pass.data == Data::Sending {
            pass.data = Data::Sent(bytes);
        }
        true
    }

    pub(super) fn disconnected(&mut self) {
        // Where the image stands is said by the next Welcome.
        self.way = Way::None;
    }

    #[cfg(test)]
    pub(super) fn fingerprint<H: std::hash::Hasher>(&self, to: &mut H) {
        use std::hash::Hash;
        (self.mark, self.refused, self.faulted).hash(to);
        std::mem::discriminant(&self.way).hash(to);
        match &self.way {
            Way::None => {}
            Way::Syncing { base, how, pass, asked, log } => {
                (base, how, asked).hash(to);
                match log {
                    HubLog::Spent => {}
                    HubLog::Joins(at) => (1, at.hash).hash(to),
                    HubLog::Forks(at) => (2, at.hash).hash(to),
                }
                if let Some(pass) = pass {
                    let sent = if let Data::Sent(bytes) = pass.data { Some(bytes) } else { None };
                    let data = std::mem::discriminant(&pass.data);
                    (pass.cp, pass.base, pass.how, data, sent, pass.refusals).hash(to);
                    (pass.keeps_log, pass.log).hash(to);
                }
            }
            Way::Catching { target } => target.hash.hash(to),
            Way::Closing { target } => target.hash(to),
        }
    }
}

impl Primary {
    /// Whether writes are acknowledged without the hub when it is away. A source that never was
    /// welcomed is usable at once.
    pub(super) fn goes_on_alone(&self) -> bool {
        self.promises_to_go_on() || self.identity.hub.is_none()
    }

    /// Whether the hub has said that somebody else is this source, or is primary for it: then
    /// nobody is served alone (R12). What halted before it ever served does not begin to.
    fn may_be_replaced(&self) -> bool {
        match self.halted {
            None => false,
            Some(RefusedCode::Fenced | RefusedCode::Generation | RefusedCode::OtherSource) => true,
            Some(
                RefusedCode::Version
                | RefusedCode::UnknownSource
                | RefusedCode::OtherHub
                | RefusedCode::Diverged
                | RefusedCode::Gap
                | RefusedCode::Volume
                | RefusedCode::Faulted
                | RefusedCode::Busy
                | RefusedCode::Protocol,
            ) => !self.serving,
        }
    }

    /// Whether the logs of both ends join and everything acknowledged is on both.
    #[cfg(test)]
    pub(crate) fn is_in_sync(&self) -> bool {
        self.is_streaming() && self.apart.mark == Mark::Absent && !self.apart.is_syncing()
    }

    /// The pass under way: its CP and that of the image it begins from.
    pub fn pass(&self) -> Option<(CpNumber, CpNumber)> {
        self.apart.pass().map(|pass| (pass.cp, pass.base))
    }

    pub(super) fn cleared(&mut self, actions: &mut Vec<Action>) {
        if self.apart.mark == Mark::Clearing {
            self.apart.mark = Mark::Absent;
            self.identity.alone = None;
            self.pump_standing(actions);
        }
    }

    /// The hub hears of the mark as it stands, also if that changed between Hello and Welcome, and
    /// once that its first Welcome was heard.
    pub(super) fn pump_standing(&mut self, actions: &mut Vec<Action>) {
        let alone = self.identity.alone;
        let stands = matches!(self.apart.mark, Mark::Absent | Mark::Set);
        let news = self.told_alone != alone || !self.told_welcomed;
        if self.is_streaming() && stands && news {
            (self.told_alone, self.told_welcomed) = (alone, true);
            actions.push(Action::Send(Message::Standing(Standing { alone })));
        }
    }

    pub(super) fn serve(&mut self, actions: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.serving, true) {
            actions.push(Action::Serve);
        }
    }

    fn answer(&mut self, answering: Answering, actions: &mut Vec<Action>) {
        if self.answering != answering {
            self.answering = answering;
            actions.push(Action::Answer(answering));
        }
    }

    pub(super) fn mark(&mut self, actions: &mut Vec<Action>) {
        match self.apart.mark {
            Mark::Absent | Mark::Clearing => {
                self.apart.mark = Mark::Setting;
                // What a new source brings along is on no hub, from its first write on.
                let new = self.identity.hub.is_none() || self.told_work;
                let has = if new { SequenceNumber(0) } else { self.acked_place().sequence };
                let from = (self.identity.epoch, has.next());
                actions.push(Action::MarkApart(*self.identity.alone.get_or_insert(from)));
            }
            Mark::Setting | Mark::Set => {}
        }
    }

    pub(super) fn hub_lost(&mut self, actions: &mut Vec<Action>) {
        if self.is_streaming() {
            return;
        }
        if !self.goes_on_alone() || self.may_be_replaced() {
            self.answer(Answering::Held, actions);
            return;
        }
        self.serves_unasked(actions);
        self.mark(actions);
        if self.apart.mark == Mark::Set {
            self.answer(Answering::Alone, actions);
            self.serve(actions);
        }
    }

    pub(super) fn marked(&mut self, actions: &mut Vec<Action>) {
        if self.apart.mark != Mark::Setting {
            return;
        }
        self.apart.mark = Mark::Set;
        if self.may_be_replaced() {
            return;
        }
        self.pump_standing(actions);
        if !self.is_streaming() || self.apart.is_syncing() {
            self.apart_now(actions);
        }
    }

    /// What holds from the moment that the mark is durable.
    fn apart_now(&mut self, actions: &mut Vec<Action>) {
        if self.goes_on_alone() {
            self.answer(Answering::Alone, actions);
        } else if self.is_streaming() {
            self.answer(Answering::Policy, actions);
        }
        self.serve(actions);
    }

    /// The logs do not join; the image is at `base`.
    pub(super) fn begin_syncing(
        &mut self,
        (base, log): (CpNumber, HubLog),
        how: How,
        actions: &mut Vec<Action>,
    ) {
        self.unsend();
        let Apart { refused, faulted, .. } = self.apart;
        let how = if refused.is_some() { How::Compare } else { how };
        self.apart.way = Way::Syncing { base, how, pass: None, asked: faulted, log };
        self.mark(actions);
        if self.apart.mark == Mark::Set {
            self.apart_now(actions);
        }
    }

    /// The logs join: everything behind the hub's last transfer is sent.
    pub(super) fn catch_up(&mut self, actions: &mut Vec<Action>) {
        if self.apart.mark == Mark::Absent {
            self.apart.way = Way::None;
            self.answer(Answering::Policy, actions);
        } else {
            // Marked or about to be: the same way clears it.
            self.apart.way = Way::Catching { target: self.last() };
            if !self.goes_on_alone() {
                self.answer(Answering::Policy, actions);
            }
        }
    }

    pub(super) fn pressed(&mut self, cp: CpNumber, actions: &mut Vec<Action>) {
        let apart = self.apart.mark == Mark::Set && self.goes_on_alone();
        // Told again while they wait: CpDone is on its way.
        let joins = self.apart.pass_log() == Some(PassLog::Joins);
        if apart && !joins && (self.apart.is_syncing() || self.may_grow_backlog()) {
            self.done_alone(|pending| pending.cp == cp, actions);
        }
    }

    /// Releases a CP that is committed here; the hub gets it by a pass.
    fn done_alone(&mut self, which: impl Fn(&PendingCp) -> bool, actions: &mut Vec<Action>) {
        let committed = |pending: &mut PendingCp| pending.roots.is_some() && which(pending);
        let Some(pending) = self.pending.take_if(committed) else { return };
        let Some(released) = self.find(pending.place) else {
            panic!("a CP ends at a transfer that is held");
        };
        let done = (pending.cp, pending.place, pending.roots.unwrap_or_default());
        self.released_alone(done, released, actions);
        self.held.drain(..released);
        self.sent = self.sent.saturating_sub(released);
        self.acked = self.acked.saturating_sub(released);
        self.held_after = pending.place;
        actions.push(Action::Done { cp: pending.cp, alone: true });
    }

    pub(super) fn pump_apart(&mut self, actions: &mut Vec<Action>) {
        if self.apart.mark != Mark::Set && !matches!(self.apart.way, Way::Closing { .. }) {
            return;
        }
        // A hub that is connected to and does not answer is away: Welcome is judged by what is held
        // when it comes.
        let away = !self.in_session() || self.state == State::Greeting;
        if away && self.answering == Answering::Alone {
            self.done_alone(|_| true, actions);
        }
        if self.state != State::Streaming {
            return;
        }
        match self.apart.way {
            Way::Syncing { pass: None, .. } => self.begin_pass(actions),
            Way::Syncing { pass: Some(_), .. } => {
                self.renew_pass(actions);
                self.pump_pass(actions);
            }
            Way::Catching { target }
                if self.acked_place().sequence >= target.sequence && self.backlog.is_empty() =>
            {
                self.answer(Answering::Policy, actions);
                self.apart.way = Way::Closing { target: None };
                actions.push(Action::AskAlone);
            }
            Way::Closing { target: Some(target) }
                if self.apart.mark == Mark::Set
                    && !self.leaves_out_served()
                    && self.acked_place().sequence >= target =>
            {
                self.apart.mark = Mark::Clearing;
                self.apart.way = Way::None;
                actions.push(Action::ClearApart);
            }
            Way::None | Way::Catching { .. } | Way::Closing { .. } => {}
        }
    }

    /// What an earlier run answered alone is held since the start, and so before the end of it.
    pub(super) fn answered_alone(&mut self, upto: SequenceNumber) {
        let last = self.last().sequence;
        if let Way::Closing { target } = &mut self.apart.way {
            *target = Some(upto.max(last));
        }
    }

    fn begin_pass(&mut self, actions: &mut Vec<Action>) {
        // The newest own CP is the target; one that waits for the hub would only be older.
        self.done_alone(|_| true, actions);
        let refused = self.apart.refused.unwrap_or_default();
        let Way::Syncing { base, how, pass, asked, log } = &mut self.apart.way else { return };
        let base = *base;
        if self.own_cp > base.max(refused) && log.lets_end(self.held_after) {
            let (cp, place) = (self.own_cp, self.held_after);
            let (roots, data) = (self.own_roots.clone(), Data::Waiting);
            let (how, refusals, keeps_log, log) = (*how, 0, false, PassLog::Rests);
            *pass = Some(Pass { how, cp, place, base, roots, data, refusals, keeps_log, log });
            *asked = false;
            self.pump_pass(actions);
        } else if self.pending.is_some() {
            // It is being committed.
        } else if !std::mem::replace(asked, true) {
            actions.push(Action::Freeze);
        }
    }

    /// A pass that is to be sent again is made anew from the newest own CP: while it was refused, or
    /// parked because the hub had no room, others may have been made alone.
    fn renew_pass(&mut self, actions: &mut Vec<Action>) {
        if self.apart.pass().is_none_or(|pass| pass.data != Data::Waiting) {
            return;
        }
        self.done_alone(|_| true, actions);
        let (cp, place) = (self.own_cp, self.held_after);
        let Some(pass) = self.apart.pass_mut().filter(|pass| pass.cp < cp) else { return };
        (pass.cp, pass.place) = (cp, place);
        pass.roots.clone_from(&self.own_roots);
    }

    fn pump_pass(&mut self, actions: &mut Vec<Action>) {
        let Some(pass) = self.apart.pass() else { return };
        let roots = self.agreed(&pass.roots);
        let keeps_log = self.log_behind(pass.place).is_some();
        let (place, begins) = (pass.place, pass.data == Data::Waiting);
        if begins {
            let log = self.forward_behind(place, keeps_log);
            self.apart.set_pass_log(log);
        }
        let offers = &self.identity.volumes;
        let Some(pass) = self.apart.pass_mut() else { return };
        let (cp, base) = (pass.cp, pass.base);
        match (pass.data, pass.how) {
            (Data::Waiting, How::Births) => {
                (pass.data, pass.keeps_log) = (Data::Sending, keeps_log);
                let (last, base) = (pass.place.into(), Some(base));
                let full = PartitionFull { cp, last, base, replay: false, keeps_log };
                actions.push(Action::Send(Message::PartitionFull(full)));
                actions.push(Action::SendPass { cp, base: pass.base });
            }
            (Data::Waiting, How::Compare) => {
                (pass.data, pass.keeps_log) = (Data::Ended, keeps_log);
                let volume = |root: &VolumeRoot| {
                    let offer = offers.iter().find(|offer| offer.number == root.volume)?;
                    Some(PullVolume { volume: root.volume, size: offer.size, root: root.root })
                };
                let volumes = roots.iter().filter_map(volume).collect();
                let place = pass.place.into();
                let compare = Compare { cp, base, place, volumes, keeps_log };
                actions.push(Action::SendCompare { cp, base });
                actions.push(Action::Send(Message::Compare(compare)));
            }
            _ => {}
        }
        if let Data::Sent(update_bytes) = pass.data {
            pass.data = Data::Ended;
            actions.push(end_of(cp, pass.place, roots, update_bytes));
        }
    }

    /// The image is at the pass's CP, the hub's log goes on behind its place.
    pub(super) fn pass_done(&mut self, actions: &mut Vec<Action>) {
        let Some(pass) = self.apart.pass() else { return };
        if pass.data != Data::Ended {
            self.close("CpDone of a pass that was not ended", actions);
            return;
        }
        let (cp, place) = (pass.cp, pass.place);
        if pass.log == PassLog::Goes {
            self.close("CpDone of a pass without a word about the log behind it", actions);
            return;
        }
        // Nothing but what is behind it was sent meanwhile: it ends where it did, or was set to the pass's end.
        let log = self.hub_log().end().filter(|_| pass.keeps_log);
        let joined = self.has_joined(place);
        self.volumes_behind(false);
        self.hub_cp = cp;
        self.apart.repaired();
        actions.push(Action::PassEnded { cp });
        match self.find(place) {
            _ if joined => self.join(actions),
            Some(position) => {
                let position = log.and_then(|log| self.find(log)).unwrap_or(position);
                (self.sent, self.acked) = (position, position);
                self.join(actions);
            }
            // Released meanwhile: what was written during the pass follows in the next one.
            None => {
                let (how, log) = (How::Births, log.map_or(HubLog::Spent, HubLog::Joins));
                self.apart.way = Way::Syncing { base: cp, how, pass: None, asked: false, log };
            }
        }
        self.pump_apart(actions);
    }

    pub(super) fn pass_rejected(&mut self, no: &CpRejected, actions: &mut Vec<Action>) {
        self.refused_behind();
        let Some(pass) = self.apart.pass_mut() else { return };
        let (cp, no_space) = (pass.cp, no.no_space);
        actions.push(Action::Rejected { cp, reason: no.reason.clone(), no_space });
        if no_space {
            pass.data = Data::Parked;
            return;
        }
        pass.refusals += 1;
        if pass.how == How::Compare {
            self.compare_rejected(no, actions);
        } else if pass.refusals > REFUSALS_MAX {
            self.repair(cp, actions);
        } else {
            pass.data = Data::Waiting;
        }
    }

    /// CP `cp` was refused too often: the image is compared with a newer one (R19).
    pub(super) fn repair(&mut self, cp: CpNumber, actions: &mut Vec<Action>) {
        self.apart.refused = Some(cp);
        let sent = self.sent.checked_sub(1).map(|last| self.held[last].place);
        let sent = sent.map_or(HubLog::Spent, HubLog::Joins);
        let log = if self.apart.is_syncing() { self.hub_log() } else { sent };
        self.begin_syncing((self.hub_cp, log), How::Compare, actions);
    }

    /// The hub's image is brought up from where it is, of a line that its log is on.
    pub(super) fn bring_up_again(&mut self, actions: &mut Vec<Action>) {
        let sent = self.sent.checked_sub(1).map_or(self.held_after, |last| self.held[last].place);
        self.begin_syncing((self.hub_cp, HubLog::Joins(sent)), How::Births, actions);
    }

    /// What the hub's log is while the image is brought up.
    fn hub_log(&self) -> HubLog {
        if let Way::Syncing { log, .. } = self.apart.way { log } else { HubLog::Spent }
    }

    /// What of the hub's log goes on behind `place`: it was acknowledged there, and stays.
    fn log_behind(&self, place: Place) -> Option<Place> {
        let beyond = |log: &Place| log.sequence > place.sequence && self.find(*log).is_some();
        self.hub_log().end().filter(beyond)
    }

    /// The hub counts as lost, and is not asked again before there is a newer CP.
    fn compare_rejected(&mut self, no: &CpRejected, actions: &mut Vec<Action>) {
        self.apart.faulted = true;
        let here = no.differs.and_then(|there| {
            let own = self.apart.pass()?.roots.iter().find(|own| own.volume == there.volume)?;
            Some(format!("; volume {}: root {} here, {} there", own.volume, own.root, there.root))
        });
        let CpNumber(cp) = no.cp;
        let reason = format!(
            "CP {cp} was refused also by comparison: {}{}",
            no.reason,
            here.unwrap_or_default()
        );
        actions.push(Action::Faulted { cp: no.cp, reason });
        self.repair(no.cp, actions);
        if !self.goes_on_alone() {
            self.answer(Answering::Held, actions);
        }
    }
}
