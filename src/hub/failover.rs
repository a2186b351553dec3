//! Failover: a source is fenced, and its log becomes the image that this hub serves (R2, R13).
//!
//! Called by the administrator through [`run`], and by the start of a hub for each source whose
//! failover had begun ([`resume_all`]); blocks, so on a thread of its own. The steps, and what a
//! cut behind each leaves:
//!
//! 1. the log is read and checked from the image to its end; a gap refuses here. A cut: nothing.
//! 2. the fence is durable in the ring. Nothing of the source behind it is stored or acknowledged.
//!    A cut: the next start finds it there and does step 3.
//! 3. epoch raised, state `failing-over`, place of the fence: one commit. From here no CP of the
//!    old epoch can be published, and the source is refused. A cut: the next start goes on.
//! 4. the source is told, its connection ends, a CP under way is given up: what it has not
//!    published counts as nothing, its log is what counts.
//! 5. everything up to the fence lies in the source log.
//! 6. the number of the CP that will hold it is in the row, and clients are served over the log's
//!    headers ([`overlay`](super::overlay)) by an engine with an NVRAM of its own. A cut: the next
//!    start makes the overlay again, finds their writes in that NVRAM, and serves them.
//! 7. the log is replayed on top of the image, in order. Nobody sees it; a cut: it is done again.
//! 8. it is published as that CP, and with it the state `promoted`: one commit. The overlay goes,
//!    the engine's own CPs begin.
//!
//! What was asked for (`--now`, `--accept-gap`) is in the row before step 2, and counts when a
//! restart goes on. Behind a refusal after step 3 the source stays fenced and in `failing-over`;
//! the same command goes on from there. Steps 5 to 8 are in [`behind`].

mod behind;
mod lost_nvram;
mod report;
mod state;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use self::behind::Behind;
pub(super) use self::lost_nvram::ways_on;
pub use self::report::{Alone, Outcome, Refusal, Report};
pub use self::state::{Failovers, View};
use super::actor::{Changed, Fence as FenceSource};
use super::doubts::Doubts;
use super::extension::{self, Asked, Extension, State};
use super::hooks::Moved;
use super::lane::{Fenced, Lane};
use super::overlay::Builder;
use super::promoted::{Engine, PromotedError};
use super::registry::Entry;
use super::replay::{Chain, Extent, Gap, ReplayError};
use super::shared::Shared;
use crate::pool::error::PoolError;
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::record::marks::Place;
use crate::session::mirror::LeftOut;
use crate::units::ids::{SourceId, random_u64};
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::numbers::{CpNumber, Epoch};

/// How long a source may serve reads without having heard from its hub, where its policy is not
/// known: the default of `hub_timeout`.
const SILENCE: Duration =
    if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(5) };

/// What the administrator asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ask {
    /// Only say what would be.
    pub dry_run: bool,
    /// Do not wait until a source that is cut off holds its reads.
    pub now: bool,
    /// Go on up to a gap in the log.
    pub accept_gap: bool,
    /// Of a source that is promoted: serve what is published, without what its lost NVRAM held.
    pub accept_lost_nvram: bool,
}

/// What the source's policy promises, as far as a failover must know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promise {
    /// Mode sync with `stop`: nothing is acknowledged without this hub.
    pub nothing_alone: bool,
    /// After so long without its hub the source holds reads and writes, or goes on alone.
    pub hub_timeout: Duration,
}

/// Steps of a failover, as they are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The log was checked.
    Checked,
    /// The fence is durable in the ring.
    Fenced,
    /// Epoch and state are in the catalog.
    Raised,
    /// The source was told, and no CP of it is under way.
    Told,
    /// Everything up to the fence is in the log.
    Drained,
    /// The row says under which CP the volumes are served over the log.
    Numbered,
    /// Clients are served, and nothing is applied yet.
    Serving,
    /// So many entries are applied.
    Replaying(u64),
    /// All are, and nothing is published.
    Replayed,
    /// Published and promoted.
    Promoted,
}

/// Told each step; false ends the failover there.
pub type Reached<'a> = &'a (dyn Fn(&Step) -> bool + 'a);

/// Told once, as soon as clients are served, be the log applied or not.
pub type Served<'a> = &'a (dyn Fn(&Report) + 'a);

/// Goes on with every failover that had begun, each on its own thread.
pub fn resume_all(shared: &Arc<Shared>) {
    if machine::breaks(13) {
        return;
    }
    for name in shared.failovers.in_state(State::FailingOver) {
        let (shared, runtime) = (Arc::clone(shared), Handle::current());
        machine::aside(move || match run(&shared, &name, Ask::default(), &|_| true, &|_| ()) {
            Ok(report) => {
                tracing::warn!(source = %name, report = report.sentences().join("; "), "resumed");
                machine::block_on(&runtime, serve(&shared, &name));
            }
            Err(Refusal { reason, next_step }) => {
                tracing::error!(source = %name, reason, next_step, "failover has not ended");
            }
        });
    }
}

/// Serves the volumes of a source that is promoted. If its engine does not start, status says why,
/// and the next start of the hub tries again.
pub async fn serve(shared: &Shared, name: &SourceName) {
    let Some(lane) = shared.lanes.get(name) else { return };
    match shared.promoted.start(lane.source()).await {
        Ok(engine) => {
            tracing::warn!(source = %name, "served here from now on");
            let status = engine.status();
            shared.moved(Moved::Promoted, name, status.epoch, status.own_cp);
        }
        Err(error @ PromotedError::Stopping) => {
            tracing::info!(source = %name, %error, "failed over")
        }
        Err(error) => tracing::error!(source = %name, %error, "failed over, and not served"),
    }
}

/// Fails `name` over, or goes on with that, or says what it would do.
pub fn run(
    shared: &Arc<Shared>,
    name: &SourceName,
    ask: Ask,
    reached: Reached<'_>,
    served: Served<'_>,
) -> Result<Report, Refusal> {
    let _turn = shared.failovers.turn(name)?;
    let mut run = Run::of(shared, name, ask, reached, served)?;
    let row = run.row()?;
    let extension = Extension::of(&row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
    if ask.accept_lost_nvram && extension.state != State::Promoted {
        let reason = format!("{name} is not served by this hub: no NVRAM of it can be lost here");
        return Err(Refusal::new(reason, "leave --accept-lost-nvram out"));
    }
    let checked = match extension.state {
        State::Mirror => run.plan(run.lane.cursors().durable)?,
        State::FailingOver if ask.dry_run => {
            // What it was asked for goes on to count.
            run.ask.accept_gap |= extension.asked.accept_gap;
            run.plan(extension.fence)?
        }
        State::FailingOver => {
            run.remember(extension.asked)?;
            Plan::default()
        }
        State::Promoted => return lost_nvram::run(&run, &row),
        // Whoever was to take over is lost: the image is at the CP that was handed over (R14).
        State::HandedOver => {
            run.clear_old_nvram()?;
            run.plan(run.lane.cursors().durable)?
        }
    };
    if ask.dry_run {
        return Ok(run.dry(&row, extension.state, checked));
    }
    let ended = run.go(&row, extension.state, checked);
    if let Err(Refusal { reason, next_step }) = &ended {
        let state = run.row().ok().and_then(|row| Extension::of(&row).ok()).map(|e| e.state);
        if let Some(state @ State::FailingOver) = state {
            let reason = run.still_served(reason);
            shared.failovers.set(name, View { state, reason, next_step: next_step.clone() });
        }
    }
    run.tell_changed();
    ended
}

const SEE_LOG: &str = "see the log of the hub";
const AGAIN: &str = "the source stays fenced; mend the cause, then run `mirrorhub failover` again";
const ACCEPT: &str = "restart the hub, its NVRAM may hold what is missing; or give up what lies \
                      behind with `mirrorhub failover --accept-gap`";

const RESTART: &str = "restart the hub, then try again";

const ACCEPT_LEFT_OUT: &str = "bring the source back; or give up what it wrote to that volume \
                               with `mirrorhub failover --accept-gap`";

const ACCEPT_LOST: &str = "bring the source back, it still has them; or give them up with \
                           `mirrorhub failover --accept-gap`";

/// What the check has found.
#[derive(Debug, Default)]
struct Plan {
    last: Place,
    replayed: Extent,
    gap: Option<Gap>,
    /// What clients will be served over, as far as the log was read.
    overlay: Option<Builder>,
}

/// One failover under way.
struct Run<'a> {
    shared: &'a Arc<Shared>,
    name: &'a SourceName,
    ask: Ask,
    /// The epoch of a hand-over that was not taken up here.
    handed_over: Option<Epoch>,
    promise: Option<Promise>,
    reached: Reached<'a>,
    served: Served<'a>,
    lane: Arc<Lane>,
    source: SourceId,
    /// The volumes that were not mirrored to the end, each a sentence.
    left_out: Vec<String>,
    begun: Instant,
}

impl<'a> Run<'a> {
    fn of(
        shared: &'a Arc<Shared>,
        name: &'a SourceName,
        ask: Ask,
        reached: Reached<'a>,
        served: Served<'a>,
    ) -> Result<Self, Refusal> {
        let Some(lane) = shared.lanes.get(name) else {
            let reason = format!("{name} was never here: there is nothing to fail over");
            return Err(Refusal::new(reason, "`mirrorhub status` lists the sources"));
        };
        let (source, begun) = (lane.source(), machine::now());
        let row = shared.pool.catalog().source(source).map_err(|error| pool(&error))?;
        let told = row.as_ref().map(Extension::of).transpose();
        let told = told.map_err(|reason| Refusal::new(reason, SEE_LOG))?.unwrap_or_default();
        let handed_over = told.state == State::HandedOver;
        let handed_over = row.as_ref().filter(|_| handed_over).map(|row| row.epoch);
        let promise = told.policy.map(|policy| Promise {
            nothing_alone: policy.never_alone() && told.alone.is_none(),
            hub_timeout: policy.hub_timeout,
        });
        let volumes = shared.pool.catalog().volumes(source).map_err(|error| pool(&error))?;
        let left_out = left_out(&told.left_out, &volumes);
        let run = Self {
            shared,
            name,
            ask,
            handed_over,
            promise,
            reached,
            served,
            lane,
            source,
            left_out,
            begun,
        };
        Ok(run)
    }

    /// The NVRAM of before the hand-over, if a cut or an error has left it: it would be taken for
    /// the new one's.
    fn clear_old_nvram(&self) -> Result<(), Refusal> {
        let retired = self.shared.promoted.retire(self.source);
        retired.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))
    }

    fn row(&self) -> Result<SourceRow, Refusal> {
        let row = self.shared.pool.catalog().source(self.source).map_err(|error| pool(&error))?;
        row.ok_or_else(|| Refusal::new(format!("{} has no row in the catalog", self.name), SEE_LOG))
    }

    fn applied(&self, row: &SourceRow) -> Result<Place, Refusal> {
        extension::place(row).map_err(|reason| Refusal::new(reason, SEE_LOG))
    }

    fn chain(&self, from: Place) -> Chain<'_> {
        Chain { store: &self.shared.store, source: self.source, from }
    }

    fn stopping(&self) -> bool {
        self.shared.failovers.is_stopping()
    }

    fn step(&self, step: Step) -> Result<(), Refusal> {
        let goes_on = (self.reached)(&step) && !self.stopping();
        if goes_on { Ok(()) } else { Err(stopped()) }
    }

    /// Step 1: reads the log up to `upto`.
    fn plan(&self, upto: Place) -> Result<Plan, Refusal> {
        let enough = |at: Place| at.sequence >= upto.sequence;
        self.lane.wait(None, |c| enough(c.drained) || c.fault.is_some() || self.stopping());
        loop {
            let row = self.row()?;
            let applied = self.applied(&row)?;
            let last = if enough(applied) { applied } else { upto };
            let mut overlay = self.overlay(&row)?;
            let read = overlay.read(&self.chain(applied), last, || !self.stopping());
            let (last, gap) = match read {
                Err(ReplayError::Gap(gap)) => {
                    // A CP that was published meanwhile has taken its log with it.
                    if self.row()?.applied != row.applied {
                        continue;
                    }
                    (gap.reaches, Some(gap))
                }
                Err(error) => return Err(replay(&error)),
                // What can be read is whole, and the start has found that more was here.
                Ok(()) => (last, self.known_gap(last)),
            };
            if let Some(gap) = gap.as_ref().filter(|_| !self.ask.accept_gap) {
                // What else the same flag would give up is not to come as a surprise.
                let more = self.obstacles().map(|also| format!("; {}", also.reason));
                return Err(Refusal::new(format!("{gap}{}", more.unwrap_or_default()), ACCEPT));
            }
            return Ok(Plan { last, replayed: overlay.extent(), gap, overlay: Some(overlay) });
        }
    }

    /// History that was met behind what is lost: a gap in the chain, not its end (R3).
    fn known_gap(&self, reaches: Place) -> Option<Gap> {
        let cursors = self.lane.cursors();
        let fault = cursors.fault.filter(|_| cursors.damaged)?;
        Some(Gap { reaches, reason: fault.to_string() })
    }

    /// What a failover refuses although the log can be read, all of it: it is asked before the
    /// fence, by a dry run as well.
    fn obstacles(&self) -> Option<Refusal> {
        if let Some(failed) = self.shared.stager.failure() {
            return Some(Refusal::new(format!("the hub's NVRAM failed: {failed}"), RESTART));
        }
        let lost = self.lane.cursors().doubts.lost_in_words();
        let next = if lost.is_some() { ACCEPT_LOST } else { ACCEPT_LEFT_OUT };
        let all: Vec<String> = lost.into_iter().chain(self.left_out.iter().cloned()).collect();
        let refused = !all.is_empty() && !self.ask.accept_gap;
        refused.then(|| Refusal::new(all.join("; "), next))
    }

    fn dry(&self, row: &SourceRow, state: State, plan: Plan) -> Report {
        let Plan { last, replayed, gap, .. } = plan;
        let raised = Epoch { number: row.epoch.number + 1, id: 0 };
        let failing = row.epoch.number > 0 && self.lane.cursors().fence.is_some();
        let epoch = if failing { row.epoch } else { raised };
        let nothing = replayed.entries == 0;
        let cp = if nothing { row.applied } else { row.highest_cp.max(replayed.cp).next() };
        // Behind the fence nothing of it is asked any more.
        let fences = matches!(state, State::Mirror | State::HandedOver);
        let refused = self.obstacles().filter(|_| fences);
        Report { refused, ..self.report(epoch, cp, last, replayed, gap) }
    }

    fn report(
        &self,
        epoch: Epoch,
        cp: CpNumber,
        last: Place,
        replayed: Extent,
        gap: Option<Gap>,
    ) -> Report {
        let behind = false;
        let doubts = self.lane.cursors().doubts;
        let Doubts { missing_bytes, unsynced, there_too, .. } = doubts;
        let log_lost = doubts.lost_in_words();
        // What can be read is whole, and it is known that it was more.
        let cut = log_lost.clone().map(|reason| Gap { reaches: last, reason });
        let (gap, log_lost) = if gap.is_some() { (gap, log_lost) } else { (cut, None) };
        let outcome = match (gap, self.handed_over) {
            (Some(gap), _) => Outcome::UpToGap(gap),
            (None, Some(epoch)) => Outcome::TakenBack(epoch),
            (None, None) if replayed.entries == 0 => Outcome::NothingToReplay,
            (None, None) => Outcome::Complete,
        };
        let silent = self.heard().map(machine::elapsed);
        let alone = match self.promise {
            Some(Promise { nothing_alone: true, .. }) => Alone::Nothing,
            Some(_) => Alone::Possible(silent),
            None => Alone::Unknown(silent),
        };
        let (dry_run, stale_reads) = (self.ask.dry_run, self.ask.now);
        Report {
            dry_run,
            outcome,
            epoch,
            cp,
            last,
            replayed,
            alone,
            nvram_damaged_bytes: u64::from(missing_bytes),
            log_lost,
            unsynced,
            there_too: there_too && (unsynced || missing_bytes > 0),
            stale_reads,
            left_out: self.left_out.clone(),
            behind,
            refused: None,
        }
    }

    fn entry(&self) -> Option<Entry> {
        self.shared.registry.get(self.name)
    }

    fn heard(&self) -> Option<Instant> {
        self.entry().and_then(|entry| entry.snapshot.load().heard)
    }

    /// An overlay of the log behind the image, of which nothing is read yet.
    fn overlay(&self, row: &SourceRow) -> Result<Builder, Refusal> {
        let extension = Extension::of(row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
        let left_out = extension.left_out.iter().map(|left| left.volume).collect();
        Ok(Builder::new(&self.shared.overlays, self.applied(row)?, left_out))
    }

    /// What was asked for before counts as well, and all of it is durable.
    fn remember(&mut self, before: Asked) -> Result<(), Refusal> {
        let Ask { now, accept_gap, .. } = self.ask;
        let asked = Asked { now, accept_gap }.or(before);
        self.ask = Ask { now: asked.now, accept_gap: asked.accept_gap, ..self.ask };
        if asked == before { Ok(()) } else { self.note(asked) }
    }

    fn note(&self, asked: Asked) -> Result<(), Refusal> {
        let _row = self.lane.row();
        let change = move |row: &mut SourceRow| {
            if let Ok(extension) = Extension::of(row) {
                row.extension = Extension { asked, ..extension }.encode();
            }
        };
        let catalog = self.shared.pool.catalog();
        catalog.update_source(self.source, change).map_err(|error| pool(&error))
    }

    /// Clients may be served over a log that cannot be applied: who reads why is told so.
    fn still_served(&self, reason: &str) -> String {
        match self.shared.promoted.engine(self.name) {
            Some(Engine::Running(_)) => format!("{reason}; the volumes are served over the log"),
            Some(Engine::Failed(_)) | None => reason.to_owned(),
        }
    }

    /// Steps 2 to 8.
    fn go(&self, row: &SourceRow, state: State, plan: Plan) -> Result<Report, Refusal> {
        if matches!(state, State::Mirror | State::HandedOver) {
            self.step(Step::Checked)?;
            if let Some(refused) = self.obstacles() {
                return Err(refused);
            }
            self.fence(row, &plan)?;
        }
        let row = self.row()?;
        self.shared.failovers.set(self.name, View::of(State::FailingOver, row.epoch));
        tracing::warn!(source = %self.name, epoch = row.epoch.number, "fenced");
        let used = self.tell(row.epoch);
        self.quiet()?;
        self.step(Step::Told)?;
        let Plan { gap, overlay, .. } = plan;
        Behind::new(self, used, gap).run(overlay)
    }

    /// Steps 2 and 3.
    fn fence(&self, row: &SourceRow, plan: &Plan) -> Result<(), Refusal> {
        let Ask { now, accept_gap, .. } = self.ask;
        self.note(Asked { now, accept_gap })?;
        let id = random_u64().map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
        let epoch = Epoch { number: row.epoch.number + 1, id };
        let stager = &self.shared.stager;
        let at = plan.gap.as_ref().map(|gap| gap.reaches);
        let fence = stager.fence(&self.lane, epoch, at);
        self.lane.wait(None, |cursors| cursors.fenced > Fenced::No || self.stopping());
        if self.lane.cursors().fenced < Fenced::InRing {
            let failed = stager.failure().map(|why| why.to_string());
            let reason = failed.unwrap_or_else(|| "the hub stops".to_owned());
            return Err(Refusal::new(reason, RESTART));
        }
        self.step(Step::Fenced)?;
        let change = move |row: &mut SourceRow| Extension::fail_over(row, fence);
        let catalog = self.shared.pool.catalog();
        catalog.update_source(self.source, change).map_err(|error| pool(&error))?;
        let met = self.row()?.epoch;
        if met != epoch {
            let reason = format!("epoch {} came between", met.number);
            return Err(Refusal::new(reason, AGAIN));
        }
        self.lane.fence_is(Fenced::InCatalog);
        self.step(Step::Raised)
    }

    /// Step 4: the source is told. The highest CP number that it is known to have used.
    fn tell(&self, epoch: Epoch) -> CpNumber {
        let Some(entry) = self.entry() else { return CpNumber(0) };
        let told = machine::block_on(&Handle::current(), entry.actor.send(FenceSource(epoch)));
        told.unwrap_or_else(|error| {
            // The next one begins with what the catalog says.
            tracing::debug!(source = %self.name, %error, "the actor is being replaced");
            CpNumber(0)
        })
    }

    fn tell_changed(&self) {
        let Some(entry) = self.entry() else { return };
        if machine::block_on(&Handle::current(), entry.actor.send(Changed)).is_err() {
            tracing::debug!(source = %self.name, "the actor is being replaced");
        }
    }

    /// No CP of the source is under way any more; one that was whole may have been published
    /// before the epoch was raised.
    fn quiet(&self) -> Result<(), Refusal> {
        if let Some(job) = self.lane.job() {
            job.abort();
        }
        self.lane.wait(None, |_| self.lane.job().is_none() || self.stopping());
        if self.lane.job().is_some() { Err(stopped()) } else { Ok(()) }
    }
}

/// What is to be said of volumes that were not mirrored to the end (R20).
fn left_out(left_out: &[LeftOut], volumes: &[VolumeRow]) -> Vec<String> {
    let say = |left: &LeftOut| match volumes.iter().find(|row| row.key.volume == left.volume) {
        Some(row) if left.cp > CpNumber(0) => format!(
            "volume {} was refused and not mirrored since CP {}: its image is of that CP",
            row.name, left.cp
        ),
        Some(row) => format!("volume {} was never mirrored: its image is empty", row.name),
        None => format!("volume number {} was refused: there is no image of it", left.volume),
    };
    left_out.iter().map(say).collect()
}

fn pool(error: &PoolError) -> Refusal {
    let reason = format!("the hub's pool: {error}");
    if matches!(error, PoolError::Full { .. } | PoolError::CatalogFull { .. }) {
        return Refusal::new(reason, "make room in the pool, then run `mirrorhub failover` again");
    }
    Refusal::new(reason, AGAIN)
}

fn replay(error: &ReplayError) -> Refusal {
    match error {
        ReplayError::Stopped => stopped(),
        ReplayError::Gap(_) => Refusal::new(error.to_string(), ACCEPT),
        ReplayError::Volume(_) => Refusal::new(error.to_string(), AGAIN),
    }
}

fn stopped() -> Refusal {
    Refusal::new("the hub stops", "start it again: a failover that has begun goes on by itself")
}
