//! Failback where the filer's state counts: both sides have written, and the administrator has
//! named the filer's (`--keep source`).
//!
//! Nothing is pulled. What this hub has is kept here by name, readable; the filer takes over with what
//! it has, and the session brings the image up to it.
//!
//! 1. the filer makes an own CP of all that it has. A cut: it follows as before.
//! 2. writers are held; a last CP here, with a number above all that the filer has used
//! 3. the filer says that this CP can become one of its own
//! 4. the CP is kept as `split-EPOCH`. A cut: the source is promoted as ever, with one kept CP more.
//! 5. the hand-over, as in every failback ([`super::handover`]): the row says that the filer keeps its
//!    own state, so a restart repeats the same `TakeOver`
//! 6. the filer publishes its state once more, under the number and at the place of that CP, marked as
//!    written alone; then epoch and end of the fence. Its Hello makes this hub a mirror, whose image is
//!    at the place of an own CP of the source with another content: it is compared and brought up (R5).
//!
//! If the NVRAM that the hub served with is gone or damaged, nobody serves, and what only that held
//! is lost: what was published here is this side. Then it is recorded first that this NVRAM is not
//! looked for any more, so that nothing is served with it again behind the CP of 2, which has the
//! content of the one before it and another number. A cut: the command is given again.
//!
//! Where the log of the source cannot be applied (R13) nobody has written here, and the published CP
//! is the filer's own past: 2 and 4 have nothing to do, and the log goes, which the filer has itself.

use std::sync::Arc;

use super::follower::Connected;
use super::handover::Handover;
use super::judge::{self, Own};
use super::report::Report;
use super::{
    AGAIN, Ask, HOLD_MAX, Hold, SEE_LOG, Side, Step, Told, above, pinned, pull, row_of, stopped,
};
use crate::filer::Filer;
use crate::hub::extension::{Extension, State};
use crate::hub::failover::Refusal;
use crate::hub::promoted::Engine;
use crate::hub::shared::Shared;
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::publish::Publish;
use crate::pool::rows::SourceRow;
use crate::pool::write_set::Budget;
use crate::record::marks::Place;
use crate::units::machine;
use crate::units::names::{KeptName, SourceName};
use crate::units::numbers::{CpNumber, SequenceNumber};

/// Who serves until the hand-over.
enum Giver {
    /// This engine.
    Engine(Arc<Filer>),
    /// Nobody: the log cannot be applied, and no client was served over it.
    Nobody,
    /// Nobody any more: the NVRAM is gone, or cannot be used.
    Lost,
}

/// Gives a source back with what its filer has.
pub(super) async fn run(
    shared: &Arc<Shared>,
    name: &SourceName,
    ask: &Ask,
    told: Told,
) -> Result<Report, Refusal> {
    let row = row_of(shared, name)?;
    let extension = Extension::of(&row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
    let giver = giver(shared, &row, &extension)?;
    let follower = find(shared, &row, &extension, ask.to.as_ref())?;
    if !told(Step::Found) {
        return Err(stopped());
    }
    let follow = &follower.follow;
    // What a log lacks that cannot be applied is enough, or an NVRAM that is gone.
    let engine = matches!(giver, Giver::Engine(_));
    let served = engine || matches!(giver, Giver::Lost);
    if engine && judge::own(shared, &row, &extension, follow)? == Own::Nothing {
        return Err(nothing_own(name));
    }
    let (before, last) = (extension.fence.sequence, follow.last);
    let mut report = Report::before(&row, Side::Source, ask.dry_run);
    (report.last, report.here) = (last, (before, written(&giver, &row, before)));
    report.nvram_lost = matches!(giver, Giver::Lost);
    if served {
        report.kept_here = Some(free_name(shared, &row, row.applied)?);
    } else if last < before {
        return Err(shorter(name, last, before));
    }
    if ask.dry_run {
        return Ok(report);
    }
    let over = Handover { shared, name, follower, told, own: true };
    KeepSource { over, giver, report }.go().await
}

fn nothing_own(name: &SourceName) -> Refusal {
    let reason = format!(
        "the filer of {name} has nothing that this hub never had: there is no other side that \
         could stay"
    );
    let next = format!(
        "`mirrorhub failback {name}` gives the volumes back; what a filer once wrote by itself \
         is in its kept CPs, the image before the failover in those of this hub: `mirrorhub \
         kept {name}`"
    );
    Refusal::new(reason, next)
}

/// The last entry that was written here.
fn written(giver: &Giver, row: &SourceRow, before: SequenceNumber) -> SequenceNumber {
    match giver {
        Giver::Engine(engine) => engine.last().max(before),
        Giver::Nobody => before,
        Giver::Lost => row.sequence.max(before),
    }
}

fn shorter(name: &SourceName, last: SequenceNumber, here: SequenceNumber) -> Refusal {
    let reason = format!(
        "the log of {name} here goes to entry {here}, the filer ends at {last}: its state lacks \
         what it was acknowledged for"
    );
    let next = format!(
        "`mirrorhub failover {name} --accept-gap` serves what can be read of the log; then either \
         side can be kept"
    );
    Refusal::new(reason, next)
}

fn giver(shared: &Shared, row: &SourceRow, extension: &Extension) -> Result<Giver, Refusal> {
    let name = &row.name;
    match (extension.state, shared.promoted.engine(name)) {
        (State::Promoted, Some(Engine::Running(engine))) => Ok(Giver::Engine(engine)),
        (State::Promoted, Some(Engine::Failed(_)))
            if extension.own || shared.promoted.lacks_nvram(row.id, name) =>
        {
            Ok(Giver::Lost)
        }
        (State::Promoted, Some(Engine::Failed(reason))) => {
            let reason = format!(
                "{name} is not served here: {reason}; what clients wrote here cannot be kept"
            );
            Err(Refusal::new(reason, "mend that and restart the hub, then give the command again"))
        }
        (State::FailingOver, None) if !extension.nvram_made => Ok(Giver::Nobody),
        (State::FailingOver, _) => {
            let reason = format!(
                "clients of {name} have been served here over a log that is not applied: what they \
                 wrote is in no CP that could be kept"
            );
            let next = format!(
                "wait until it is applied; if the log is damaged, `mirrorhub failover {name} \
                 --accept-gap`, then this command again"
            );
            Err(Refusal::new(reason, next))
        }
        (State::Promoted | State::Mirror | State::HandedOver, _) => {
            Err(Refusal::new(format!("{name} is not served here yet"), AGAIN))
        }
    }
}

/// The filer whose state shall count: one that follows already; a new one has none.
fn find(
    shared: &Shared,
    row: &SourceRow,
    extension: &Extension,
    to: Option<&SourceName>,
) -> Result<Connected, Refusal> {
    let name = &row.name;
    let filers = match to {
        Some(to) if to != name => {
            let there = row_of(shared, to)?;
            let of_it = Extension::of(&there).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
            vec![of_it.home_of(there.id)]
        }
        Some(_) => vec![row.id],
        None => vec![extension.home_of(row.id), row.id],
    };
    let known = filers.iter().find_map(|filer| shared.failbacks.get(name, *filer));
    known.filter(|follower| !follower.is_newcomer(row.id)).ok_or_else(|| {
        let reason = format!(
            "the filer that wrote to {name} by itself is not connected; only what it brings along \
             could be kept"
        );
        let next = format!(
            "start `mirrorhub source` on it, with the state it had: it follows by itself; if it \
             never comes back, `mirrorhub failback {name}` gives what is here to a new one"
        );
        Refusal::new(reason, next)
    })
}

/// `split-EPOCH`, or with the CP's number if that is taken by another CP: an attempt that was cut, or
/// an administrator, has it.
fn free_name(shared: &Shared, row: &SourceRow, cp: CpNumber) -> Result<KeptName, Refusal> {
    let failed = |error: PoolError| Refusal::new(error.to_string(), SEE_LOG);
    let wanted = judge::named(&format!("split-{}", row.epoch.number))?;
    let kept = shared.pool.catalog().kept(row.id).map_err(failed)?;
    if kept.iter().any(|kept| kept.row.name == wanted && kept.row.cp != cp) {
        return judge::named(&format!("{wanted}-{cp}"));
    }
    Ok(wanted)
}

/// The published CP once more, with a number that nobody has used.
fn publish_above(pool: &Arc<Pool>, row: &SourceRow, floor: CpNumber) -> Result<(), PoolError> {
    if row.applied > floor {
        return Ok(());
    }
    let published = pool.publish(Publish {
        write_set: pool.begin(Budget::Reserve),
        source: row.id,
        cp: floor.next(),
        sequence: row.sequence,
        stream_hash: row.stream_hash,
        epoch: row.epoch,
        generation: None,
        extension: None,
        volumes: Vec::new(),
    });
    published.map(drop)
}

/// One under way.
struct KeepSource<'a> {
    over: Handover<'a>,
    giver: Giver,
    report: Report,
}

impl KeepSource<'_> {
    async fn go(mut self) -> Result<Report, Refusal> {
        // As long as clients write: the filer's NVRAM becomes a CP.
        self.ask_filer(false).await?;
        self.over.step(Step::Round(1))?;
        let held = machine::now();
        let mut hold = match &self.giver {
            Giver::Engine(engine) => Some(Hold::new(engine.clone())),
            Giver::Nobody | Giver::Lost => None,
        };
        self.over.step(Step::Held)?;
        let last = tokio::time::timeout(HOLD_MAX, self.last_cp()).await;
        let (cp, place) = last.unwrap_or_else(|_| {
            let reason = format!("there is no last CP after {} s", HOLD_MAX.as_secs());
            Err(Refusal::new(reason, AGAIN))
        })?;
        self.over.step(Step::Reached)?;
        self.keep(cp).await?;
        self.over.step(Step::Kept)?;
        let (epoch, serves) = self.over.give(cp, place, hold.as_mut()).await?;
        let pause = machine::elapsed(held);
        tracing::warn!(source = %self.over.name, ?pause, serves, "given back with the filer's state");
        Ok(Report { epoch, cp, rounds: 1, pause, serves, ..self.report })
    }

    /// The last CP here, which the filer can take for its own.
    async fn last_cp(&mut self) -> Result<(CpNumber, Place), Refusal> {
        if let Giver::Engine(engine) = &self.giver {
            let floor = above(&self.over.follower.follow)?;
            let made = engine.checkpoint_above(floor).await;
            made.map_err(|error| Refusal::new(error.to_string(), AGAIN))?;
            self.report.here.1 = engine.last().max(self.report.here.0);
        }
        if matches!(self.giver, Giver::Lost) {
            let floor = above(&self.over.follower.follow)?;
            // Not before the filer has shown that it can: the file may be found until then.
            self.give_nvram_up().await?;
            self.set_nvram_aside().await?;
            self.change(move |shared, row| publish_above(&shared.pool, row, floor)).await?;
        }
        self.ask_filer(true).await
    }

    /// Nothing is served with that NVRAM again, also if it is found.
    async fn give_nvram_up(&self) -> Result<(), Refusal> {
        self.change(|shared, row| {
            let change = |row: &mut SourceRow| {
                if let Ok(known) = Extension::of(row)
                    && known.state == State::Promoted
                {
                    row.extension = Extension { own: true, ..known }.encode();
                }
            };
            shared.pool.catalog().update_source(row.id, change)
        })
        .await
    }

    /// One that cannot be used stays, under another name, for whoever can still read it.
    async fn set_nvram_aside(&self) -> Result<(), Refusal> {
        let (shared, row) = (self.over.shared.clone(), row_of(self.over.shared, self.over.name)?);
        let aside = machine::blocking(move || shared.promoted.set_nvram_aside(row.id)).await;
        let aside = aside.map_err(|error| Refusal::new(error.to_string(), AGAIN))?;
        let aside = aside.map_err(|error| Refusal::new(error.to_string(), AGAIN))?;
        if let Some(path) = aside {
            let (source, path) = (self.over.name, path.display());
            tracing::warn!(%source, %path, "what is left of the lost NVRAM stays");
        }
        Ok(())
    }

    /// Changes something of the row as it is now.
    async fn change(
        &self,
        change: impl FnOnce(&Shared, &SourceRow) -> Result<(), PoolError> + Send + 'static,
    ) -> Result<(), Refusal> {
        let (shared, row) = (self.over.shared.clone(), row_of(self.over.shared, self.over.name)?);
        let failed = |error: String| Refusal::new(error, AGAIN);
        let changed = machine::blocking(move || change(&shared, &row)).await;
        changed
            .map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(error.to_string()))
    }

    /// The filer makes a CP of what it has, and says whether the CP here can follow it.
    async fn ask_filer(&self, last: bool) -> Result<(CpNumber, Place), Refusal> {
        let (mut target, pins) = pinned(self.over.shared, self.over.name)?;
        (target.last, target.own) = (last, true);
        let (cp, place) = (target.cp, Place::from(target.place));
        pull(&self.over.follower, target, pins).await?;
        Ok((cp, place))
    }

    async fn keep(&mut self, cp: CpNumber) -> Result<(), Refusal> {
        if self.report.kept_here.is_none() {
            return Ok(());
        }
        let row = row_of(self.over.shared, self.over.name)?;
        let name = free_name(self.over.shared, &row, cp)?;
        let (shared, kept) = (self.over.shared.clone(), name.clone());
        let keep = machine::blocking(move || shared.pool.keep(row.id, kept)).await;
        let failed = |error: String| {
            let reason = format!("what is here cannot be kept as {name}: {error}");
            Refusal::new(reason, AGAIN)
        };
        let row = keep.map_err(|error| failed(error.to_string()))?;
        let row = row.map_err(|error| failed(error.to_string()))?;
        tracing::warn!(source = %self.over.name, name = %row.name, %cp, "what was served is kept");
        self.report.kept_here = Some(name);
        Ok(())
    }
}
