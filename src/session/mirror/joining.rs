//! How a hub judges who says Hello, and what it answers.
//!
//! Called by [`super::Mirror::step`], and by the shell before it ends an older connection. Ids,
//! epochs and generations decide, never names (invariant 12); a refused Hello changes nothing.

use super::super::{CP_NUMBER_MAX, NEXT_OF_A_FORGOTTEN, NEXT_OF_AN_OLD_COPY, NEXT_OF_OTHER_EPOCH};
use super::{Action, Mirror, State, refuse};
use crate::units::numbers::Epoch;
use crate::wire::message::{
    Hello, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Refused, RefusedCode, Standing, Welcome,
};

impl Mirror {
    pub(super) fn hello(&mut self, hello: &Hello, actions: &mut Vec<Action>) {
        let judged = self.accepts(hello).and_then(|()| self.judge(&hello.volumes));
        let left_out = match judged {
            Ok(left_out) => left_out,
            Err(refused) => {
                actions.push(Action::Refuse(refused));
                return;
            }
        };
        // A newer accepted Hello ends the older session (R7): its apply and its frames with it.
        self.disconnected(actions);
        if self.known.epoch.number == 0 {
            // Hub and source have never met: the first epoch is the generation's own random id.
            self.known.epoch = Epoch { number: 1, id: hello.generation.id };
        }
        self.connection = hello.connection;
        self.known.source = Some(hello.source);
        self.known.generation = hello.generation;
        self.known.cp_max = self.known.cp_max.max(hello.cp_max);
        self.agree(&hello.volumes, left_out);
        self.offered.clone_from(&hello.volumes);
        let never = hello.hub.is_none();
        self.unshown = never.then_some(hello.policy);
        self.known.policy = Some(if never { hello.policy.usable_at_once() } else { hello.policy });
        self.known.alone = hello.alone;
        self.version = hello.version.min(PROTOCOL_VERSION);
        self.state = State::Joining { recorded: false };
        actions.extend(self.record());
    }

    /// The source's mark has changed: kept as what Hello brought is.
    pub(super) fn stands(&mut self, standing: Standing, actions: &mut Vec<Action>) {
        self.known.alone = standing.alone;
        self.shows_welcome();
        actions.extend(self.record());
    }

    /// The source sends what it sends behind its first Welcome only, which it keeps durably before:
    /// from here on it holds to its policy. Whether that is news.
    pub(super) fn shows_welcome(&mut self) -> bool {
        let shown = self.unshown.take();
        self.known.policy = shown.or(self.known.policy);
        shown.is_some()
    }

    /// What is known of the source that was here is to be kept.
    pub(super) fn record(&self) -> Option<Action> {
        let known = &self.known;
        Some(Action::Record {
            source: known.source?,
            generation: known.generation,
            epoch: known.epoch,
            volumes: self.agreed().cloned().collect(),
            policy: known.policy.unwrap_or_default(),
            alone: known.alone,
        })
    }

    /// Who is who is decided by ids, epochs and generations, never by names (invariant 12). A shell
    /// asks before it ends an older connection for this one: a clone must not cut the original.
    pub fn accepts(&self, hello: &Hello) -> Result<(), Refused> {
        let known = &self.known;
        speaks(hello)?;
        if let Some(source) = known.source.filter(|&source| source != hello.source) {
            let reason = format!(
                "the name {} belongs to source {source}, this is source {}",
                hello.name, hello.source
            );
            let next = "give the new source another name, or forget the old one on the hub";
            return Err(refuse(RefusedCode::OtherSource, reason, next));
        }
        if let Some(hub) = hello.hub.filter(|&hub| hub != known.hub) {
            let reason = format!("the source belongs to hub {hub}, this is hub {}", known.hub);
            return Err(refuse(RefusedCode::OtherHub, reason, "check `hub` in source.toml"));
        }
        self.in_epoch(hello)?;
        let used = hello.cp_max.max(hello.own_cp);
        if used > CP_NUMBER_MAX {
            let reason = format!("the source says that CP {used} was used");
            return Err(refuse(RefusedCode::Protocol, reason, "both ends must run mirrorhub"));
        }
        let (old, new) = (known.generation, hello.generation);
        if new.number < old.number || (new.number == old.number && new.id != old.id) {
            let reason = format!(
                "the source says boot {} ({:016x}), the hub has seen boot {} ({:016x}): its state \
                 is a clone or an old copy",
                new.number, new.id, old.number, old.id
            );
            return Err(refuse(RefusedCode::Generation, reason, NEXT_OF_AN_OLD_COPY));
        }
        self.is_newest(hello)?;
        // Whatever boot it says: one that is refused here leaves the original in session, and its
        // boot unrecorded. What is published was committed there before (R6).
        if hello.own_cp < known.applied_cp {
            let reason = format!(
                "the hub has published CP {}, the source has committed only CP {}: its state is a \
                 clone or an old copy",
                known.applied_cp, hello.own_cp
            );
            return Err(refuse(RefusedCode::Diverged, reason, NEXT_OF_AN_OLD_COPY));
        }
        if let Some(fault) = &self.faulted {
            let reason = format!("the hub's log of this source failed: {fault}");
            return Err(refuse(RefusedCode::Faulted, reason, "see `mirrorhub status` on the hub"));
        }
        self.judge(&hello.volumes).map(drop)
    }

    /// Nobody else has become primary since, at either end.
    fn in_epoch(&self, hello: &Hello) -> Result<(), Refused> {
        let known = &self.known;
        // A source whose first Welcome was lost names no epoch; nobody else has been primary then.
        let unmet = hello.epoch.number == 0 && known.epoch.number <= 1;
        let older = !unmet && hello.epoch.number < known.epoch.number;
        if older || known.failed_over {
            let reason = format!(
                "the source was failed over: epoch {} ({:016x}) is in force, the source is in \
                 epoch {} ({:016x})",
                known.epoch.number, known.epoch.id, hello.epoch.number, hello.epoch.id
            );
            let next = "see `mirrorhub status` on the hub; `failback` gives the volumes back";
            return Err(refuse(RefusedCode::Fenced, reason, next));
        }
        if known.epoch.number == 0 && hello.epoch.number > 0 {
            // Which of its copies is the newest, and who else was primary, is forgotten as well (R1, R12).
            let reason = format!(
                "the source is in epoch {} ({:016x}) of a hub that knows nothing of it: it was forgotten \
                 there, or the hub was rolled back",
                hello.epoch.number, hello.epoch.id
            );
            return Err(refuse(RefusedCode::Diverged, reason, NEXT_OF_A_FORGOTTEN));
        }
        if hello.epoch.number > 0 && hello.epoch != known.epoch {
            let reason = format!(
                "the source is in epoch {} ({:016x}), the hub in epoch {} ({:016x})",
                hello.epoch.number, hello.epoch.id, known.epoch.number, known.epoch.id
            );
            return Err(refuse(RefusedCode::Diverged, reason, NEXT_OF_OTHER_EPOCH));
        }
        Ok(())
    }

    /// A Hello that lay in an older connection of this boot says what is not so any more.
    fn is_newest(&self, hello: &Hello) -> Result<(), Refused> {
        if hello.generation != self.known.generation || hello.connection >= self.connection {
            return Ok(());
        }
        let (late, newest) = (hello.connection, self.connection);
        let reason = format!("connection {late} of the source comes behind connection {newest}");
        Err(refuse(RefusedCode::Busy, reason, "wait, the source tries again"))
    }

    pub(super) fn welcome(&self) -> Welcome {
        Welcome {
            version: self.version,
            hub: self.known.hub,
            epoch: self.known.epoch,
            applied_cp: self.known.applied_cp,
            roots: self.known.roots.clone(),
            applied: self.known.applied.into(),
            last: self.durable.into(),
            cp_max: self.known.cp_max,
            log_credit: self.log_credit,
            cp_credit: self.cp_credit,
            work: self.known.work,
            refused: self.known.refused.clone(),
            // What was cut off here is none of what is held.
            own_durable: self.own_durable.min(self.durable.transfer),
        }
    }
}

/// Whether both ends know a common version.
fn speaks(hello: &Hello) -> Result<(), Refused> {
    if hello.version >= PROTOCOL_VERSION_MIN && hello.version_min <= PROTOCOL_VERSION {
        return Ok(());
    }
    let reason = format!(
        "the source speaks protocol versions {} to {}, the hub {PROTOCOL_VERSION_MIN} to \
         {PROTOCOL_VERSION}",
        hello.version_min, hello.version
    );
    Err(refuse(RefusedCode::Version, reason, "upgrade the hub first"))
}
