//! Transfers behind a pass: what the hub takes of a source's log while its image is brought up (R4).
//!
//! Called by [`super::Mirror::step`]. They join the CP that the pass is to publish, so they are kept aside:
//! nothing of them is acknowledged, said in Welcome, or replayed. Published, they are the source's log. Given up by
//! either end, they are gone: what the other end still had on its way is passed over until it has said so
//! too, or has begun another pass.

use super::{Action, Apply, Arrived, Mirror};
use crate::limits::{BEHIND_CPS_MAX, BEHIND_TOLD_BYTES, UNPUBLISHED_CPS_MAX};
use crate::record::marks::Place;
use crate::units::numbers::{CpNumber, TransferId};
use crate::wire::message::{BEHIND_VERSION, Behind, BehindState, Message};

/// What came behind the pass under way.
#[derive(Debug, Clone)]
pub(super) struct Aside {
    /// Where it begins.
    base: Place,
    /// The last transfer that came, and that was written.
    received: Place,
    written: Place,
    /// Bytes that came since the source was last told.
    untold: u64,
    labels: Vec<(CpNumber, Place)>,
    own_durable: TransferId,
    /// One end has given it up.
    over: bool,
}

impl Aside {
    #[cfg(test)]
    pub(super) fn fingerprint<H: std::hash::Hasher>(&self, to: &mut H) {
        use std::hash::Hash;
        (self.received.hash, self.written.hash, self.untold, self.over).hash(to);
        self.labels.iter().for_each(|(cp, last)| (cp, last.hash).hash(to));
    }

    /// CPs, and where each of them ends, of what is held up to `upto`.
    fn labels(&self, upto: Place) -> Vec<(CpNumber, Place)> {
        if upto == self.base {
            return Vec::new();
        }
        let whole = self.labels.partition_point(|(_, end)| end.sequence <= upto.sequence);
        let mut labels = self.labels[..whole].to_vec();
        let begun = labels.last().is_none_or(|(_, end)| end.sequence < upto.sequence);
        let cut = self.labels.get(whole).filter(|_| begun);
        labels.extend(cut.map(|(cp, _)| (*cp, upto)));
        labels
    }
}

impl Mirror {
    /// What a source may send behind a pass that ends at `last`; none if it keeps its log, forwards none, or speaks
    /// an older version.
    pub(super) fn aside(&self, last: Place, sets_log: bool) -> Option<Aside> {
        let (labels, own_durable) = (Vec::new(), TransferId::NONE);
        let forwards = self.known.policy.unwrap_or_default().forwards();
        (sets_log && forwards && self.version >= BEHIND_VERSION).then_some(Aside {
            base: last,
            received: last,
            written: last,
            untold: 0,
            labels,
            own_durable,
            over: false,
        })
    }

    /// A transfer came while a pass is under way.
    pub(super) fn transfer_behind(&mut self, arrived: &Arrived, actions: &mut Vec<Action>) {
        let Arrived { header, place } = arrived;
        let Some(received) = self.aside_under_way().map(|(_, behind)| behind.received) else {
            self.close("a transfer while a pass is under way", actions);
            return;
        };
        match self.is_next(arrived, received) {
            Ok(true) => {}
            Ok(false) => return,
            Err(reason) => {
                self.close(reason, actions);
                return;
            }
        }
        let Some((_, behind)) = self.aside_under_way() else { return };
        match behind.labels.last_mut() {
            Some((newest, end)) if *newest == header.cp => *end = *place,
            Some((newest, _)) if *newest > header.cp => {
                let reason = format!(
                    "transfer {}: of CP {} behind one of CP {newest}",
                    header.id, header.cp
                );
                self.close(reason, actions);
                return;
            }
            Some(_) | None => behind.labels.push((header.cp, *place)),
        }
        let many = behind.labels.len() > BEHIND_CPS_MAX + UNPUBLISHED_CPS_MAX;
        behind.received = *place;
        behind.own_durable = behind.own_durable.max(header.own_durable);
        self.known.cp_max = self.known.cp_max.max(CpNumber(header.cp.0 - 1));
        if many {
            self.behind_over(actions);
        } else {
            actions.push(Action::StageBehind);
        }
    }

    /// So much of it was written, so many bytes since this was last said: the source may send more.
    pub(super) fn behind_written(&mut self, upto: Place, bytes: u64, actions: &mut Vec<Action>) {
        let joined = self.is_streaming();
        let Some((cp, behind)) = self.aside_under_way() else { return };
        if behind.over || upto.sequence <= behind.written.sequence {
            return;
        }
        behind.written = upto;
        behind.untold += bytes;
        if !joined {
            return;
        }
        if behind.untold >= BEHIND_TOLD_BYTES || upto == behind.received {
            behind.untold = 0;
            actions.push(word(cp, BehindState::Taken(upto.transfer)));
        }
    }

    /// This end cannot hold it.
    pub(super) fn behind_over(&mut self, actions: &mut Vec<Action>) {
        let joined = self.is_streaming();
        let Some((cp, behind)) = self.aside_under_way() else { return };
        if std::mem::replace(&mut behind.over, true) {
            return;
        }
        actions.push(Action::DropBehind);
        if joined {
            actions.push(word(cp, BehindState::Over));
            self.passes_over = true;
        }
    }

    /// The source sends nothing more behind its pass, or has heard that it need not.
    pub(super) fn source_behind(&mut self, said: Behind, actions: &mut Vec<Action>) {
        if said.state != BehindState::Over {
            self.close("a word about the log behind a pass that is the hub's to say", actions);
            return;
        }
        self.passes_over = false;
        if let Some((cp, behind)) = self.aside_under_way()
            && cp == said.cp
            && !std::mem::replace(&mut behind.over, true)
        {
            actions.push(Action::DropBehind);
        }
    }

    /// A pass has ended without being published: what was behind it goes with it.
    pub(super) fn forget_behind(&mut self, apply: &Apply) {
        self.passes_over |= apply.behind.is_some() && self.is_streaming();
    }

    /// The pass is published, and the shell has set the log: to its end, or to that of what was behind. What
    /// came later of that is with the shell, and is staged next. `Err` if it has lost some.
    ///
    /// The shell decides whether it is adopted, and it may have been while it was given up here: then it is the log all
    /// the same, and what the source sends again is a repeat.
    pub(super) fn set_line(
        &mut self,
        apply: &Apply,
        joined: bool,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let (durable, held) = apply.log.unwrap_or((apply.last, apply.last));
        (self.received, self.durable) = (durable, durable);
        (self.drained, self.filed) = (durable, durable);
        self.labels.clear();
        let Some(behind) = &apply.behind else { return Ok(()) };
        self.own_durable = self.own_durable.max(behind.own_durable);
        self.lifted = true;
        self.labels = behind.labels(durable);
        if behind.over || !joined {
            return Ok(());
        }
        if held != behind.received {
            return Err(format!("some of what came behind the pass to CP {} is lost", apply.cp));
        }
        (self.received, self.labels) = (held, behind.labels(held));
        if durable != apply.last {
            // The last word may not have been said yet.
            actions.push(word(apply.cp, BehindState::Taken(durable.transfer)));
        }
        actions.push(word(apply.cp, BehindState::Joins));
        Ok(())
    }

    /// The connection is gone: nothing more comes of it.
    pub(super) fn end_aside(apply: &mut Apply) {
        if let Some(behind) = &mut apply.behind {
            behind.over = true;
        }
    }

    /// Whether something is taken behind a pass.
    pub fn is_behind(&self) -> bool {
        let aside = self.apply.as_ref().and_then(|apply| apply.behind.as_ref());
        aside.is_some_and(|aside| !aside.over)
    }

    /// The CP of the pass under way, and what came behind it.
    fn aside_under_way(&mut self) -> Option<(CpNumber, &mut Aside)> {
        let apply = self.apply.as_mut()?;
        Some((apply.cp, apply.behind.as_mut()?))
    }
}

/// What is said to the source of the log behind its pass to CP `cp`.
fn word(cp: CpNumber, state: BehindState) -> Action {
    Action::Send(Message::Behind(Behind { cp, state }))
}
