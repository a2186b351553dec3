//! The CP under way at a hub: told, fed, ended, published or given up.
//!
//! Called by [`super::Mirror::step`]. An apply begins when its log is drained and ends once; data
//! over the credit closes the connection, data of an attempt that has ended is passed over.

use super::super::CP_NUMBER_MAX;
use super::{Action, Apply, ApplyState, Build, Mirror, Outcome, State};
use crate::limits::cp_charge;
use crate::record::marks::Place;
use crate::units::numbers::CpNumber;
use crate::wire::message::{
    Compare, CpDone, CpEnd, CpRejected, Message, PartitionFull, PullVolume, VolumeOffer, VolumeRoot,
};

/// The refusal of a CP that finds no room (R18).
const NO_ROOM: &str = "the hub's pool is full";

impl Mirror {
    /// Whether the last CP was refused because it finds no room here.
    pub fn lacks_room(&self) -> bool {
        self.last_refusal.is_some() && self.lacks_room
    }

    pub(super) fn partition_full(&mut self, full: &PartitionFull, actions: &mut Vec<Action>) {
        let last = Place::from(full.last);
        if full.cp <= self.known.applied_cp {
            actions.push(Action::Send(Message::CpDone(CpDone { cp: full.cp })));
        } else if self.apply.is_some() {
            self.close(format!("CP {} while another is under way", full.cp), actions);
        } else if full.base.is_some() {
            self.begin_pass(full, actions);
        } else if last.sequence > self.received.sequence
            || last.sequence < self.known.applied.sequence
            || last.sequence == self.known.applied.sequence && !self.may_hold_nothing(full.cp, last)
            || full.cp > CP_NUMBER_MAX
        {
            let reason = format!("CP {} ends at {}, out of place", full.cp, last.transfer);
            self.close(reason, actions);
        } else {
            let build = if full.replay { Build::Replay } else { Build::Updates };
            self.begin(full.cp, last, build, false);
        }
    }

    /// A CP of nothing ends where the image does, and nothing that came belongs to it: its log would
    /// be dropped with it.
    fn may_hold_nothing(&self, cp: CpNumber, last: Place) -> bool {
        last == self.known.applied && self.labels.iter().all(|&(label, _)| label > cp)
    }

    /// The data brings the image from `base` to the CP, without the log; behind it the log goes on
    /// at `last`, wherever it stood (R4), or stays as it is behind that place. What the log holds is
    /// kept until that is published.
    fn begin_pass(&mut self, full: &PartitionFull, actions: &mut Vec<Action>) {
        let (cp, last, base) = (full.cp, Place::from(full.last), full.base.unwrap_or_default());
        if self.may_pass((cp, last), base, full.keeps_log, actions) {
            self.begin(cp, last, Build::Pass, full.keeps_log);
        }
    }

    /// Whether a pass may begin; the connection is closed if not.
    fn may_pass(
        &mut self,
        (cp, last): (CpNumber, Place),
        base: CpNumber,
        keeps_log: bool,
        actions: &mut Vec<Action>,
    ) -> bool {
        let known = &self.known;
        let behind = last.sequence < known.applied.sequence;
        let may = base == known.applied_cp && cp <= CP_NUMBER_MAX && !behind;
        // The source's word is not enough: what stays must follow the new image (invariant 6).
        if may && keeps_log && self.end_of(cp) != last {
            let (here, there) = (self.end_of(cp).transfer, last.transfer);
            let reason = format!("a pass to CP {cp} at {there}, the log to keep is cut at {here}");
            self.close(reason, actions);
            return false;
        }
        if !may {
            let reason = format!(
                "a pass from CP {base} to CP {cp} at {}, the image is at CP {} ({})",
                last.transfer, known.applied_cp, known.applied.transfer
            );
            self.close(reason, actions);
        }
        may
    }

    /// The image is compared with the CP, and pulls what differs; for the rest it is a pass.
    pub(super) fn compare(&mut self, compare: &Compare, actions: &mut Vec<Action>) {
        let Compare { cp, base, place, ref volumes, keeps_log } = *compare;
        if cp <= self.known.applied_cp {
            actions.push(Action::Send(Message::CpDone(CpDone { cp })));
            return;
        }
        if self.apply.is_some() {
            self.close(format!("CP {cp} while another is under way"), actions);
            return;
        }
        let offered = |known: &VolumeOffer| {
            let same = |new: &PullVolume| (new.volume, new.size) == (known.number, known.size);
            volumes.iter().filter(|new| same(new)).count() == 1
        };
        if volumes.len() != self.agreed().count() || !self.agreed().all(offered) {
            self.close(format!("CP {cp} has other volumes than were agreed on"), actions);
            return;
        }
        if !self.may_pass((cp, place.into()), base, keeps_log, actions) {
            return;
        }
        self.begin(cp, place.into(), Build::Compare, keeps_log);
        let root = |new: &PullVolume| VolumeRoot { volume: new.volume, root: new.root };
        let roots = volumes.iter().map(root).collect();
        if let Some(apply) = &mut self.apply {
            apply.end = Some(CpEnd { cp, place, roots, update_bytes: 0 });
        }
    }

    /// A part of what was asked for.
    pub(super) fn pulled(&mut self, cp: CpNumber, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Joined) {
            self.close("an answer before Welcome", actions);
            return;
        }
        let compares = |apply: &Apply| apply.cp == cp && apply.build == Build::Compare;
        if self.apply.as_ref().is_some_and(compares) {
            actions.push(Action::Feed);
        } else if self.given_up != Some(cp) {
            // What comes late of a comparison that has ended is passed over.
            self.close(format!("an answer about CP {cp}, which was not asked for"), actions);
        }
    }

    fn begin(&mut self, cp: CpNumber, last: Place, build: Build, keeps_log: bool) {
        self.known.cp_max = self.known.cp_max.max(cp);
        // Whatever was sent behind an earlier pass came before this word.
        self.passes_over = false;
        let state = ApplyState::Waiting;
        let behind = self.aside(last, build.is_pass() && !keeps_log);
        let (update_bytes, end, log) = (0, None, None);
        let apply = Apply { cp, last, build, state, update_bytes, end, keeps_log, behind, log };
        self.apply = Some(apply);
    }

    pub(super) fn updates(&mut self, cp: CpNumber, bytes: u64, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Joined) {
            self.close("Updates before Welcome", actions);
            return;
        }
        let under_way = self.cp_came - self.cp_taken;
        let charge = cp_charge(bytes);
        if charge > self.cp_credit.saturating_sub(under_way) {
            let credit = self.cp_credit;
            let reason = format!("{bytes} bytes of CP data over {under_way}, credit is {credit}");
            self.close(reason, actions);
            return;
        }
        self.cp_came += charge;
        match &mut self.apply {
            Some(apply)
                if apply.cp == cp && matches!(apply.build, Build::Replay | Build::Compare) =>
            {
                self.close(format!("Updates of CP {cp}, which is built without"), actions);
            }
            Some(apply) if apply.cp == cp && apply.end.is_none() => {
                apply.update_bytes += bytes;
                actions.push(Action::Feed);
            }
            // Left over from a CP that was refused or was published already: taken and dropped.
            _ => self.updates_taken(charge, actions),
        }
    }

    pub(super) fn updates_taken(&mut self, bytes: u64, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Joined) {
            // What is said late, of an older connection or an ended apply, is counted already.
            self.cp_taken = self.cp_taken.saturating_add(bytes).min(self.cp_came);
            self.acknowledge(actions);
        }
    }

    pub(super) fn cp_end(&mut self, end: CpEnd, actions: &mut Vec<Action>) {
        match &mut self.apply {
            Some(apply) if apply.cp == end.cp && apply.end.is_none() => {
                if apply.update_bytes != end.update_bytes || Place::from(end.place) != apply.last {
                    let reason = format!("CpEnd of CP {} does not fit its data", end.cp);
                    self.close(reason, actions);
                } else {
                    apply.end = Some(end);
                }
            }
            // Left over, like Updates.
            None if end.cp <= self.known.applied_cp || self.given_up == Some(end.cp) => {}
            _ => self.close(format!("CpEnd of CP {}, not under way", end.cp), actions),
        }
    }

    pub(super) fn applied(&mut self, cp: CpNumber, outcome: Outcome, actions: &mut Vec<Action>) {
        let Some(apply) = self.apply.take_if(|apply| apply.cp == cp) else {
            panic!("an apply of CP {cp} ended that was not under way");
        };
        assert!(apply.state != ApplyState::Waiting, "an apply ended that was not begun");
        let joined = matches!(self.state, State::Joined);
        if self.cp_taken < self.cp_came {
            // What the applier left is dropped with the apply.
            self.updates_taken(self.cp_came, actions);
        }
        self.given_up = (!matches!(outcome, Outcome::Published(_))).then_some(cp);
        let reject = |differs, reason: String, no_space| {
            Action::Send(Message::CpRejected(CpRejected { cp, differs, reason, no_space }))
        };
        self.last_refusal = match &outcome {
            Outcome::Published(_) => None,
            Outcome::Rejected { reason, .. } => Some(reason.clone()),
            Outcome::NoSpace => Some(NO_ROOM.to_owned()),
            Outcome::OverLimit { reason } => Some(reason.clone()),
            Outcome::Aborted => self.last_refusal.take(),
        };
        match &outcome {
            Outcome::NoSpace | Outcome::OverLimit { .. } => self.lacks_room = true,
            Outcome::Published(_) | Outcome::Rejected { .. } => self.lacks_room = false,
            Outcome::Aborted => {}
        }
        if !matches!(outcome, Outcome::Published(_)) {
            self.forget_behind(&apply);
        }
        match outcome {
            Outcome::Published(roots) => {
                self.known.applied_cp = cp;
                self.known.applied = apply.last;
                self.labels.retain(|&(label, _)| label > cp);
                self.known.cp_max = self.known.cp_max.max(cp);
                self.publish(cp, roots);
                // What is published needs no log; the source is told before CpDone builds on it.
                self.filed(apply.last, actions);
                if !apply.build.is_pass() || apply.keeps_log {
                    actions.push(Action::DropLogs(cp));
                } else if let Err(lost) = self.set_line(&apply, joined, actions) {
                    self.close(lost, actions);
                    return;
                }
                if joined {
                    actions.push(Action::Send(Message::CpDone(CpDone { cp })));
                }
            }
            Outcome::Rejected { differs, reason } if joined => {
                actions.push(reject(differs, reason, false));
            }
            Outcome::NoSpace if joined => {
                actions.push(reject(None, NO_ROOM.to_owned(), true));
            }
            Outcome::OverLimit { reason } if joined => actions.push(reject(None, reason, true)),
            Outcome::Rejected { .. }
            | Outcome::NoSpace
            | Outcome::OverLimit { .. }
            | Outcome::Aborted => {}
        }
    }
}
