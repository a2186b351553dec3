//! A promoted source whose NVRAM on this hub is lost: what is published is served, if the
//! administrator gives up what only that NVRAM held (`--accept-lost-nvram`).
//!
//! The way on where the file cannot be put back and the filer, whose state could count instead
//! (`failback --keep source`), never returns. The steps, and what a cut behind each leaves:
//!
//! 1. an NVRAM that cannot be used is given another name beside. A cut: it is gone, the source is
//!    not served, the command is given again.
//! 2. the row says that none was made. A cut: the next start makes one and serves.
//! 3. a new one is made, and clients are served from the published CP on.
//!
//! What follows has a new generation, so no transfer of it can be taken for one that was lost.

use super::report::{Outcome, Refusal, Report};
use super::state::View;
use super::{Run, SEE_LOG, pool};
use crate::hub::extension::{Extension, State};
use crate::hub::promoted::Engine;
use crate::hub::replay::Extent;
use crate::pool::rows::SourceRow;
use crate::units::names::SourceName;

/// What an administrator can do about a promoted source that is not served for want of its NVRAM.
pub(in crate::hub) fn ways_on(name: &SourceName) -> String {
    format!(
        "put its NVRAM back and restart the hub; or `mirrorhub failback {name} --keep source`, if \
         what its filer has shall count; or `mirrorhub failover {name} --accept-lost-nvram` serves \
         what is published here and gives up what only that NVRAM held"
    )
}

/// Serves what is published, or says why not; the engine is started by whoever has called.
pub(super) fn run(run: &Run<'_>, row: &SourceRow) -> Result<Report, Refusal> {
    let name = run.name;
    if !run.shared.promoted.lacks_nvram(run.source, name) {
        let number = row.epoch.number;
        let mut reason = format!("{name} was failed over already, in epoch {number}");
        let mut next = "`mirrorhub failback` gives it back";
        if let Some(Engine::Failed(why)) = run.shared.promoted.engine(name) {
            reason = format!("{reason}, and is not served: {why}");
            next = "mend the cause, then restart the hub";
        }
        return Err(Refusal::new(reason, next));
    }
    if !run.ask.accept_lost_nvram {
        let reason = format!(
            "{name} was failed over already, in epoch {}, and the NVRAM that it was served with is \
             lost: what was acknowledged here behind CP {} was only there",
            row.epoch.number, row.applied
        );
        return Err(Refusal::new(reason, ways_on(name)));
    }
    let aside = if run.ask.dry_run { None } else { give_up(run)? };
    let lost = Outcome::NvramGivenUp(aside);
    let applied = run.applied(row)?;
    let report = run.report(row.epoch, row.applied, applied, Extent::default(), None);
    let report = Report { outcome: lost, stale_reads: false, ..report };
    if !run.ask.dry_run {
        let view = View::of(State::Promoted, row.epoch);
        let reason = format!("{}: {}", view.reason, report.sentences().join("; "));
        run.shared.failovers.set(name, View { reason, ..view });
        tracing::warn!(source = %name, report = report.sentences().join("; "), "served again");
    }
    Ok(report)
}

/// Steps 1 and 2.
fn give_up(run: &Run<'_>) -> Result<Option<String>, Refusal> {
    let aside = run.shared.promoted.set_nvram_aside(run.source);
    let aside = aside.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
    let _row = run.lane.row();
    let change = |row: &mut SourceRow| {
        if let Ok(known) = Extension::of(row)
            && known.state == State::Promoted
        {
            row.extension = Extension { nvram_made: false, own: false, ..known }.encode();
        }
    };
    let catalog = run.shared.pool.catalog();
    catalog.update_source(run.source, change).map_err(|error| pool(&error))?;
    Ok(aside.map(|path| path.display().to_string()))
}
