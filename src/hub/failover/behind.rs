//! The part of a failover behind the fence: clients are served over the log, the log is applied
//! behind their backs, and published (steps 5 to 8).
//!
//! Two ways lead to the published CP. Mostly the log's headers fit into memory: then clients are
//! served over them as soon as the log has been read once. What has more entries than
//! `limits` allows, or a hub that cannot open the volumes' NVRAM, serves when the CP is published;
//! the failover says so, and nothing else is different.
//!
//! Damage that shows only here ends the failover with its place. With `--accept-gap` the image ends
//! there. If clients were served meanwhile, their connections end first; what they wrote stays, on
//! top of what is left: the CP then has the fence's place, so that their entries follow it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use super::report::{Refusal, Report};
use super::state::View;
use super::{ACCEPT, Run, SEE_LOG, SILENCE, Step, pool, replay, stopped};
use crate::filer::beneath::Ground;
use crate::hub::extension::{Extension, State};
use crate::hub::hooks::Moved;
use crate::hub::overlay::{Builder, Overlay};
use crate::hub::promoted::{Engine, PromotedError};
use crate::hub::replay::{Extent, Gap, Replay, ReplayError};
use crate::pool::error::PoolError;
use crate::pool::kept::Keep;
use crate::pool::pointer::TreeRoot;
use crate::pool::publish::Publish;
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::write_set::{Budget, Reservation, WriteSet};
use crate::record::marks::Place;
use crate::session::CP_NUMBER_MAX;
use crate::units::machine;
use crate::units::names::KeptName;
use crate::units::numbers::{BlockCount, CpNumber, Epoch, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::work;
use crate::volume::writer::grow;

/// Time between two looks of status at how far the log is applied.
const SHOWN_EVERY: Duration = Duration::from_secs(1);

/// Trees by volume.
type Trees = BTreeMap<VolumeNumber, TreeRoot>;

/// Where a failover stands behind its fence.
#[derive(Debug)]
struct Line {
    row: SourceRow,
    /// The image.
    from: Place,
    fence: Place,
    /// The log is applied up to here: to the fence, or to the gap that was accepted.
    upto: Place,
    /// The CP that will hold it.
    cp: CpNumber,
    /// The row says so, and clients were or are served.
    serving: bool,
    /// A volume was announced larger than its image is.
    grows: bool,
}

/// The steps behind the fence.
pub(super) struct Behind<'a, 'b> {
    run: &'b Run<'a>,
    used: CpNumber,
    /// What was accepted.
    gap: Option<Gap>,
    /// Accepted when clients were served over the log already.
    upto: Option<Place>,
    /// The old source answers no read any more.
    silent: bool,
    /// Blocks for the log's own CP, so that what clients write meanwhile cannot take them.
    room: Option<Reservation>,
}

impl<'a, 'b> Behind<'a, 'b> {
    /// Of a failover that is fenced and whose source has used CPs up to `used`.
    pub(super) fn new(run: &'b Run<'a>, used: CpNumber, gap: Option<Gap>) -> Self {
        Self { run, used, gap, upto: None, silent: false, room: None }
    }

    /// Steps 5 to 8, until they need no other fence. `overlay` is what the check has read.
    pub(super) fn run(mut self, mut overlay: Option<Builder>) -> Result<Report, Refusal> {
        loop {
            let line = self.line()?;
            match self.bring_up(&line, overlay.take()) {
                Ok(replayed) => return self.promoted(&line, replayed),
                Err(Stop::Refused(refusal)) => return Err(refusal),
                Err(Stop::Gap(met)) if self.run.ask.accept_gap => self.accept(met)?,
                Err(Stop::Gap(met)) => return Err(Refusal::new(met.to_string(), ACCEPT)),
            }
        }
    }

    /// Waits until the log holds everything up to the fence.
    fn line(&self) -> Result<Line, Refusal> {
        let run = self.run;
        let row = run.row()?;
        let extension = Extension::of(&row).map_err(|why| Refusal::new(why, SEE_LOG))?;
        let (fence, from) = (extension.fence, run.applied(&row)?);
        let drained = |at: Place| at.sequence >= fence.sequence;
        run.lane.wait(None, |c| drained(c.drained) || c.fault.is_some() || run.stopping());
        run.step(Step::Drained)?;
        // A pass that was not published counts as nothing (R13).
        let given_up = work::give_up(&run.shared.pool, run.source);
        given_up.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
        let logged = run.shared.store.cps(run.source).last().copied().unwrap_or_default();
        let next = row.highest_cp.max(self.used).max(logged).next();
        let cp = extension.serving.unwrap_or(next);
        if cp > CP_NUMBER_MAX {
            let reason = format!("CP {cp} would be beyond the last number");
            return Err(Refusal::new(reason, SEE_LOG));
        }
        let upto = self.upto.unwrap_or(fence);
        let volumes = run.shared.pool.catalog().volumes(run.source).map_err(|why| pool(&why))?;
        let grows = volumes.iter().any(|volume| volume.grows_to.is_some());
        Ok(Line { row, from, fence, upto, cp, serving: extension.serving.is_some(), grows })
    }

    fn bring_up(&mut self, line: &Line, overlay: Option<Builder>) -> Result<Extent, Stop> {
        // Once clients were served, the old source was silent.
        self.silent |= line.serving;
        // A tree that is smaller than its volume cannot be served with the log over it.
        if self.upto.is_none() && line.from != line.fence && !line.grows && !self.is_served() {
            self.serve(line, overlay)?;
        }
        self.promote(line)
    }

    fn is_served(&self) -> bool {
        let engine = self.run.shared.promoted.engine(self.run.name);
        matches!(engine, Some(Engine::Running(_)))
    }

    /// Step 6: clients are served over the log.
    fn serve(&mut self, line: &Line, overlay: Option<Builder>) -> Result<(), Stop> {
        let run = self.run;
        let Some((overlay, extent)) = self.overlay(line, overlay)? else { return Ok(()) };
        self.wait_for_silence()?;
        if !line.serving {
            self.number(line.cp)?;
        }
        run.step(Step::Numbered)?;
        let blocks = BlockCount(overlay.blocks() + overlay.blocks() / 32);
        match run.shared.pool.reserve(blocks) {
            Ok(room) => self.room = Some(room),
            Err(error) => {
                tracing::warn!(source = %run.name, %error, "little room to apply the log in");
            }
        }
        let memory_bytes = overlay.memory_bytes();
        let beneath = Arc::new(overlay);
        let ground = Ground { place: line.fence, cp: line.cp, beneath };
        let started = run.shared.promoted.start_over(run.source, Some(ground));
        if let Err(error) = machine::block_on(&Handle::current(), started) {
            // It is tried again when the log is applied, and status says what came of it; of a hub
            // that stops, by its next start.
            if !matches!(error, PromotedError::Stopping) {
                tracing::error!(source = %run.name, %error, "not served before the log is applied");
            }
            return Ok(());
        }
        let report = Report { behind: true, ..self.report(line, extent) };
        tracing::warn!(
            source = %run.name, memory_bytes, report = report.sentences().join("; "),
            "served over the log"
        );
        self.show(line, &Extent::default());
        run.shared.moved(Moved::Promoted, run.name, line.row.epoch, line.cp);
        (run.served)(&report);
        run.step(Step::Serving)?;
        Ok(())
    }

    /// The log as a layer; `None` if it has too many entries for that.
    fn overlay(
        &self,
        line: &Line,
        begun: Option<Builder>,
    ) -> Result<Option<(Overlay, Extent)>, Stop> {
        let run = self.run;
        let chain = run.chain(line.from);
        // A CP may have been published since it was begun.
        let mut builder = match begun.filter(|begun| begun.base() == line.from) {
            Some(begun) => begun,
            None => run.overlay(&line.row)?,
        };
        builder.read(&chain, line.fence, || !run.stopping())?;
        let extent = builder.extent();
        let reader = |cp| chain.store.reader(chain.source, cp);
        let finished = builder.finish(reader).map_err(|error| {
            let reason = error.to_string();
            Stop::Gap(Gap { reaches: chain.from, reason })
        })?;
        match finished {
            Ok(overlay) => Ok(Some((overlay, extent))),
            Err(full) => {
                let name = run.name;
                tracing::warn!(source = %name, %full, "served when the log is applied, not before");
                Ok(None)
            }
        }
    }

    /// The row says under which number the log will be published: entries of clients follow it,
    /// also behind a restart.
    fn number(&self, cp: CpNumber) -> Result<(), Refusal> {
        let run = self.run;
        let _row = run.lane.row();
        let change = move |row: &mut SourceRow| {
            if let Ok(extension) = Extension::of(row)
                && extension.state == State::FailingOver
            {
                row.extension = Extension { serving: Some(cp), ..extension }.encode();
            }
        };
        let catalog = run.shared.pool.catalog();
        catalog.update_source(run.source, change).map_err(|error| pool(&error))
    }

    /// What lies behind a gap is given up.
    fn accept(&mut self, gap: Gap) -> Result<(), Refusal> {
        let run = self.run;
        let extension = Extension::of(&run.row()?).map_err(|why| Refusal::new(why, SEE_LOG))?;
        if extension.serving.is_some() {
            // Nobody goes on with what he has read behind the gap.
            let stopped = run.shared.promoted.stop(run.name);
            let stopped = machine::block_on(&Handle::current(), stopped);
            if let Err(error) = stopped {
                tracing::info!(source = %run.name, %error, "what was written stays in its NVRAM");
            }
            self.upto = Some(gap.reaches);
        } else {
            self.move_fence(gap.reaches)?;
        }
        self.gap = Some(gap);
        Ok(())
    }

    /// What lies behind `place` was given up.
    fn move_fence(&self, place: Place) -> Result<(), Refusal> {
        let run = self.run;
        let change = move |row: &mut SourceRow| {
            if let Ok(extension) = Extension::of(row) {
                row.extension = Extension { fence: place, ..extension }.encode();
            }
        };
        let catalog = run.shared.pool.catalog();
        catalog.update_source(run.source, change).map_err(|error| pool(&error))?;
        run.lane.move_fence(place);
        Ok(())
    }

    /// The trees in the sizes that clients have met, and those of them that have grown.
    fn sized(
        &self,
        set: &mut WriteSet,
        line: &Line,
        volumes: &[VolumeRow],
    ) -> Result<(Trees, Trees), ReplayError> {
        let (mut bases, mut grown) = (Trees::new(), Trees::new());
        for row in volumes {
            let (volume, sizes) = (row.key.volume, (row.tree, row.size()));
            let tree = grow(&self.run.shared.pool, set, row.key, sizes, line.cp)?;
            bases.insert(volume, tree);
            if tree != row.tree {
                grown.insert(volume, tree);
            }
        }
        Ok((bases, grown))
    }

    /// Steps 7 and 8.
    fn promote(&mut self, line: &Line) -> Result<Extent, Stop> {
        let run = self.run;
        let (pool, catalog) = (&run.shared.pool, run.shared.pool.catalog());
        let volumes = catalog.volumes(run.source)?;
        let extension = Extension::of(&line.row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
        let left_out = extension.left_out.iter().map(|left| left.volume).collect();
        // The reserve is there for what cannot be put off (section 11).
        let budget = self.room.take().map_or(Budget::Reserve, Budget::Held);
        let mut write_set = pool.begin(budget);
        let (bases, grown) = self.sized(&mut write_set, line, &volumes)?;
        let (mut replayed, mut shown) = (Extent::default(), machine::now());
        let replay = Replay::new(&mut write_set, run.source, line.cp, bases).leaving_out(left_out);
        let mut built = replay.run(&run.chain(line.from), line.upto, |extent| {
            replayed = *extent;
            if machine::elapsed(shown) >= SHOWN_EVERY {
                shown = machine::now();
                self.show(line, extent);
            }
            (run.reached)(&Step::Replaying(extent.entries)) && !run.stopping()
        })?;
        run.step(Step::Replayed)?;
        self.wait_for_silence()?;
        let _row = run.lane.row();
        let kept = catalog.source(run.source)?.unwrap_or_else(|| line.row.clone());
        let kept = Extension::of(&kept).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
        let (state, fence, transfer) = (State::Promoted, line.fence, line.fence.transfer);
        let (serving, left_out) = (None, Vec::new());
        // The report says what may be missing; nobody sends it again to what is the truth now.
        let kept = kept.without_doubts();
        let extension = Extension { transfer, state, fence, serving, left_out, ..kept }.encode();
        for (volume, tree) in grown {
            built.entry(volume).or_insert(tree);
        }
        if line.from == fence && built.is_empty() {
            let change = move |row: &mut SourceRow| row.extension = extension;
            catalog.update_source(run.source, change)?;
            return Ok(replayed);
        }
        let publish = Publish {
            write_set,
            source: run.source,
            cp: line.cp,
            sequence: fence.sequence,
            stream_hash: fence.hash,
            epoch: line.row.epoch,
            generation: None,
            extension: Some(extension),
            volumes: built.into_iter().collect(),
        };
        if line.row.applied > CpNumber(0) {
            // The older recovery point stays, in the same commit (invariant 9).
            let name = kept_name(line.row.epoch)?;
            pool.publish_and_keep(publish, Keep::Replaced(name))?;
        } else {
            pool.publish(publish)?;
        }
        run.lane.published(line.cp, fence);
        Ok(replayed)
    }

    /// A source with `stop` that is cut off answers reads until its `hub_timeout` is over.
    fn wait_for_silence(&mut self) -> Result<(), Refusal> {
        let run = self.run;
        if !run.ask.now && !self.silent {
            let timeout = run.promise.map_or(SILENCE, |promise| promise.hub_timeout);
            let until = run.heard().unwrap_or(run.begun) + timeout;
            run.lane.wait(Some(until), |_| run.stopping());
        }
        if run.stopping() {
            return Err(stopped());
        }
        self.silent = true;
        Ok(())
    }

    /// The image is published: readers go to it, the log goes, and what was not served is to be.
    fn promoted(&self, line: &Line, replayed: Extent) -> Result<Report, Refusal> {
        let run = self.run;
        self.settle();
        if self.gap.is_some() {
            // The log is damaged, and what it holds behind the gap was given up.
            if let Err(error) = run.shared.store.reset(run.source, Some(line.fence)) {
                // The next start deletes it: it is of CPs that are applied.
                tracing::warn!(source = %run.name, %error, "the damaged log stays for now");
            }
            run.lane.rewind(line.fence);
        }
        run.shared.drain.drop_logs(run.lane.clone(), self.published(line));
        let report = self.report(line, replayed);
        if run.lane.gave_up_missing() {
            run.shared.refills.forget(run.lane.source());
        }
        let view = View::of(State::Promoted, line.row.epoch);
        let reason = format!("{}: {}", view.reason, report.sentences().join("; "));
        run.shared.failovers.set(run.name, View { reason, ..view });
        tracing::warn!(source = %run.name, report = report.sentences().join("; "), "failed over");
        // From this commit on the volumes may be served: `serve` is next, also after a restart.
        run.step(Step::Promoted)?;
        Ok(report)
    }

    /// An engine that served over the log goes on with the tree. One that cannot begins anew.
    fn settle(&self) {
        let run = self.run;
        let Some(Engine::Running(engine)) = run.shared.promoted.engine(run.name) else { return };
        if let Err(error) = engine.settle() {
            tracing::error!(source = %run.name, %error, "the engine is started again");
            let stopped = run.shared.promoted.stop(run.name);
            if let Err(error) = machine::block_on(&Handle::current(), stopped) {
                tracing::info!(source = %run.name, %error, "what was written stays in its NVRAM");
            }
        }
    }

    /// The CP that shows everything.
    fn published(&self, line: &Line) -> CpNumber {
        if line.from == line.fence { line.row.applied } else { line.cp }
    }

    fn report(&self, line: &Line, replayed: Extent) -> Report {
        let (epoch, gap) = (line.row.epoch, self.gap.clone());
        self.run.report(epoch, self.published(line), line.upto, replayed, gap)
    }

    /// What status says while the log is being applied.
    fn show(&self, line: &Line, applied: &Extent) {
        let (number, cp, bytes) = (line.row.epoch.number, line.cp, applied.bytes);
        if !self.is_served() {
            return;
        }
        let reason = format!(
            "failed over in epoch {number}: the volumes are served over the log, which is being \
             applied as CP {cp}; {bytes} bytes are"
        );
        let next_step = "wait; it goes on by itself, also after a restart".to_owned();
        let state = State::FailingOver;
        self.run.shared.failovers.set(self.run.name, View { state, reason, next_step });
    }
}

/// Why a replay did not end in a CP.
enum Stop {
    Gap(Gap),
    Refused(Refusal),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<PoolError> for Stop {
    fn from(error: PoolError) -> Self {
        Self::Refused(pool(&error))
    }
}

impl From<ReplayError> for Stop {
    fn from(error: ReplayError) -> Self {
        match error {
            ReplayError::Gap(gap) => Self::Gap(gap),
            ReplayError::Volume(VolumeError::Pool(error)) => error.into(),
            other @ (ReplayError::Volume(_) | ReplayError::Stopped) => {
                Self::Refused(replay(&other))
            }
        }
    }
}

/// The name of the CP before a failover, which stays readable.
fn kept_name(epoch: Epoch) -> Result<KeptName, Refusal> {
    let name = format!("before-failover-{}", epoch.number);
    name.parse().map_err(|error| Refusal::new(format!("{name}: {error}"), SEE_LOG))
}
