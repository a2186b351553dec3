//! Failback: a promoted source goes back to its filer, which follows (R14).
//!
//! A fenced source connects with `Follow` ([`follow`]: one task a connection, it serves what the
//! follower pulls). The administrator's command ([`run`]) goes in rounds:
//!
//! 0. the filer that is to have the volumes follows: the one they came from, or another that was
//!    asked to become their home and has room for it ([`taker`])
//! 1. the engine makes a CP; it is pinned, the follower pulls it, publishes it, and says `Reached`
//! 2. again, until a round is short
//! 3. writers are held; a last CP; the follower reaches it
//! 4. one commit: epoch + 1 with a new id, state `handed-over`. A cut before: the source is promoted
//!    as ever, writers go on, the command is given again. From here this hub never serves again.
//! 5. the engine stops (held writes get an error: they were not ordered), its NVRAM is retired, log
//!    and lane go on behind the last CP
//! 6. `TakeOver`, repeated whenever the follower comes with `Follow` (also after a restart of the hub)
//! 7. its Hello in the new epoch makes the row a mirror's again
//!
//! Between 4 and 7 nobody serves writes. What a filer wrote by itself is never thrown away unasked:
//! then 1 is refused until the administrator names the side that stays (R5, R12; [`judge`]). If that is
//! the filer's, [`keep_source`] takes the place of 1 to 3.

mod follower;
mod handover;
mod judge;
mod keep_source;
mod report;
mod taker;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

pub(super) use self::follower::answered;
use self::follower::{Connected, Order, Pins};
pub use self::follower::{Failbacks, follow};
use self::handover::Handover;
pub use self::report::Report;
use super::extension::{self, Extension, State};
use super::failover::{Refusal, ways_on};
use super::promoted::Engine;
use super::shared::Shared;
use crate::filer::Filer;
use crate::pool::Pin;
use crate::pool::rows::SourceRow;
use crate::record::marks::Place;
use crate::session::CP_NUMBER_MAX;
use crate::units::machine;
use crate::units::names::{KeptName, SourceName};
use crate::units::numbers::CpNumber;
#[cfg(test)]
use crate::units::numbers::Epoch;
use crate::wire::message::{Follow, PullTarget, PullVolume, TakeOver};

/// A round that was shorter is followed by the last one.
const SHORT: Duration = Duration::from_secs(1);
/// Rounds before the last one, however long they were.
const ROUNDS_MAX: u32 = 8;
/// Writers are held for so long at most; then the source stays promoted.
const HOLD_MAX: Duration = Duration::from_secs(20);

const SEE_LOG: &str = "see the log of the hub";
const AGAIN: &str = "the hub goes on serving; run `mirrorhub failback` again";

/// Whose writes stay, where both sides have written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The hub's; what the filer wrote by itself is kept there as a CP by name.
    Hub,
    /// The filer's; what the hub has is kept here as a CP by name.
    Source,
}

/// What the administrator asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ask {
    /// Which side stays, if both have written.
    pub keep: Option<Side>,
    /// The filer that is to have the volumes, if not the one that had them last.
    pub to: Option<SourceName>,
    /// Do nothing, say what would be.
    pub dry_run: bool,
}

/// Steps of a failback, as they are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The filer that is to have the volumes follows.
    Found,
    /// The follower has reached a CP; so many rounds were needed.
    Round(u32),
    /// Writers are held.
    Held,
    /// The follower has reached the last CP.
    Reached,
    /// What the hub has is kept by name: the filer's side is to stay.
    Kept,
    /// The new epoch is recorded here.
    HandedOver,
    /// The filer was told.
    Told,
}

/// Told each step; false ends the failback there, as a cut would.
pub type Told = Box<dyn Fn(Step) -> bool + Send + Sync>;

/// At the start of a hub: what a cut left of hand-overs.
pub fn resume_all(shared: &Shared) {
    let rows = shared.pool.catalog().sources().unwrap_or_default();
    for row in rows {
        let state = Extension::of(&row).map(|extension| extension.state);
        if matches!(state, Ok(State::Mirror | State::HandedOver))
            && let Err(error) = shared.promoted.retire(row.id)
        {
            tracing::error!(source = %row.name, %error, "an old NVRAM stays in the way");
        }
    }
}

/// Lets writers go on if the failback does not come to its end.
struct Hold {
    engine: Arc<Filer>,
    given_up: bool,
}

impl Hold {
    fn new(engine: Arc<Filer>) -> Self {
        engine.hold(!machine::breaks(14));
        Self { engine, given_up: false }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.given_up {
            self.engine.hold(false);
        }
    }
}

/// Gives a source back to its filer. Goes on to its end, whoever waits for it.
pub async fn run(
    shared: &Arc<Shared>,
    name: &SourceName,
    ask: Ask,
    told: Told,
) -> Result<Report, Refusal> {
    let _turn = shared.failovers.turn(name)?;
    let row = row_of(shared, name)?;
    let extension = Extension::of(&row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
    may_be_given(&row, extension.state, ask.keep)?;
    if ask.keep == Some(Side::Source) {
        return keep_source::run(shared, name, &ask, told).await;
    }
    let engine = match shared.promoted.engine(name) {
        Some(Engine::Running(engine)) => engine,
        Some(Engine::Failed(reason)) => {
            let next = if shared.promoted.lacks_nvram(row.id, name) {
                ways_on(name)
            } else {
                "mend that and restart the hub".to_owned()
            };
            return Err(Refusal::new(format!("{name} is not served here: {reason}"), next));
        }
        None => return Err(Refusal::new(format!("{name} is not served here yet"), AGAIN)),
    };
    let follower = if ask.dry_run {
        taker::known(shared, &row, &extension, ask.to.as_ref())?
    } else {
        Some(taker::find(shared, &row, &extension, ask.to.as_ref()).await?)
    };
    if !told(Step::Found) {
        return Err(stopped());
    }
    let mut report = Report::before(&row, Side::Hub, ask.dry_run);
    if let Some(Connected { follow, .. }) = &follower {
        let own = judge::own(shared, &row, &extension, follow)?;
        report.kept = judge::judge(&own, name, follow, &ask)?;
        report.last = follow.last;
    }
    let before = extension.fence.sequence;
    report.here = (before, engine.last().max(before));
    let Some(follower) = follower.filter(|_| !ask.dry_run) else { return Ok(report) };
    let (kept, over) = (report.kept.clone(), Handover { shared, name, follower, told, own: false });
    Failback { over, engine, kept, report }.go().await
}

/// Whether there is anything to give back, as things stand.
fn may_be_given(row: &SourceRow, state: State, keep: Option<Side>) -> Result<(), Refusal> {
    let name = &row.name;
    match state {
        State::Promoted => Ok(()),
        State::FailingOver if keep == Some(Side::Source) => Ok(()),
        State::Mirror => {
            let reason = format!("{name} is not failed over: its filer is primary");
            Err(Refusal::new(reason, "nothing is to be given back"))
        }
        State::FailingOver => {
            let reason = format!("{name} is being failed over");
            Err(Refusal::new(reason, "wait for its end; `mirrorhub status` shows it"))
        }
        State::HandedOver => {
            let reason = format!("{name} was handed over in epoch {}", row.epoch.number);
            let next = format!(
                "start the filer: it takes over by itself; if it is lost for good, `mirrorhub \
                 failover {name}` takes the volumes back"
            );
            Err(Refusal::new(reason, next))
        }
    }
}

fn stopped() -> Refusal {
    Refusal::new("the hub stops", "start it again, then give the command again")
}

fn row_of(shared: &Shared, name: &SourceName) -> Result<SourceRow, Refusal> {
    let rows = shared.pool.catalog().sources();
    let rows = rows.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
    rows.into_iter().find(|row| row.name == *name).ok_or_else(|| {
        let reason = format!("{name} was never here: there is nothing to give back");
        Refusal::new(reason, "`mirrorhub status` lists the sources")
    })
}

/// CPs that both ends shall have are above this number: one more is left for what the filer keeps.
fn above(follow: &Follow) -> Result<CpNumber, Refusal> {
    let floor = CpNumber(follow.cp_max.0.saturating_add(2));
    if floor >= CP_NUMBER_MAX {
        let reason = format!("CP {floor} would be beyond the last number");
        return Err(Refusal::new(reason, SEE_LOG));
    }
    Ok(floor)
}

/// One failback under way.
struct Failback<'a> {
    over: Handover<'a>,
    engine: Arc<Filer>,
    kept: Option<KeptName>,
    report: Report,
}

impl Failback<'_> {
    async fn go(self) -> Result<Report, Refusal> {
        let (over, mut rounds) = (&self.over, 1);
        loop {
            let begun = machine::now();
            self.round(false, if rounds == 1 { self.kept.clone() } else { None }).await?;
            over.step(Step::Round(rounds))?;
            tracing::info!(source = %over.name, round = rounds, took = ?machine::elapsed(begun), "caught up");
            if machine::elapsed(begun) < SHORT || rounds == ROUNDS_MAX {
                break;
            }
            rounds += 1;
        }
        let held = machine::now();
        let mut hold = Hold::new(self.engine.clone());
        over.step(Step::Held)?;
        let last = tokio::time::timeout(HOLD_MAX, self.round(true, None)).await;
        let (cp, place) = last.unwrap_or_else(|_| {
            let reason = format!("the filer did not reach the last CP in {} s", HOLD_MAX.as_secs());
            Err(Refusal::new(reason, AGAIN))
        })?;
        over.step(Step::Reached)?;
        let (epoch, serves) = over.give(cp, place, Some(&mut hold)).await?;
        let (pause, rounds) = (machine::elapsed(held), rounds + 1);
        tracing::warn!(source = %over.name, ?pause, serves, "given back");
        Ok(Report { epoch, cp, rounds, pause, serves, ..self.report })
    }

    /// The follower comes to a CP made now.
    async fn round(
        &self,
        last: bool,
        keep: Option<KeptName>,
    ) -> Result<(CpNumber, Place), Refusal> {
        let failed = |error: crate::filer::CheckpointError| Refusal::new(error.to_string(), AGAIN);
        let (shared, name, follower) = (self.over.shared, self.over.name, &self.over.follower);
        let floor = above(&follower.follow)?;
        self.engine.checkpoint().await.map_err(failed)?;
        // Who keeps what it has may have it under a number of ours.
        let follows = self.kept.is_none() && self.is_followed()?;
        if row_of(shared, name)?.applied <= floor && !follows {
            self.engine.checkpoint_above(floor).await.map_err(failed)?;
        }
        let (mut target, pins) = pinned(shared, name)?;
        (target.last, target.keep) = (last, keep);
        let (cp, place) = (target.cp, Place::from(target.place));
        pull(follower, target, pins).await?;
        Ok((cp, place))
    }

    /// Whether the follower came with a CP of this hub, under its number.
    fn is_followed(&self) -> Result<bool, Refusal> {
        let follow = &self.over.follower.follow;
        let row = row_of(self.over.shared, self.over.name)?;
        let known = self.over.shared.pool.catalog().history(row.id, follow.own_cp);
        let known = known.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
        let own = Place::from(follow.own);
        Ok(row.applied == follow.own_cp && known.is_some_and(|known| known.is_at(own)))
    }
}

fn take_over_of(row: &SourceRow) -> Result<TakeOver, Refusal> {
    let place = extension::place(row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
    let own = is_own(row)?;
    let (cp, generation) = (row.applied, row.generation.number);
    Ok(TakeOver { epoch: row.epoch, cp, place: place.into(), generation, own })
}

/// Whether it was handed over to a filer that keeps its own state.
fn is_own(row: &SourceRow) -> Result<bool, Refusal> {
    let extension = Extension::of(row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
    Ok(extension.own)
}

/// What was handed over is handed over again: the filer did not say that it has it.
async fn repeat(
    shared: &Arc<Shared>,
    name: &SourceName,
    follower: &Connected,
) -> Result<(), Refusal> {
    let (mut target, pins) = pinned(shared, name)?;
    (target.last, target.own) = (true, is_own(&row_of(shared, name)?)?);
    pull(follower, target, pins).await?;
    let take = take_over_of(&row_of(shared, name)?)?;
    let gone = |_| Refusal::new("the filer went away", "it connects again");
    follower.orders.send(Order::TakeOver(take)).await.map_err(gone)
}

/// The published CP, readable as long as the pins live.
fn pinned(shared: &Shared, name: &SourceName) -> Result<(PullTarget, Pins), Refusal> {
    let failed = |error: crate::pool::error::PoolError| Refusal::new(error.to_string(), AGAIN);
    loop {
        let row = row_of(shared, name)?;
        let pins = shared.pool.pin_source(row.id).map_err(failed)?;
        if pins.iter().any(|pin| pin.cp() != row.applied) {
            // Another CP was published in between.
            continue;
        }
        let place = extension::place(&row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
        let volume = |pin: &Pin| PullVolume {
            volume: pin.key().volume,
            size: pin.tree().size,
            root: pin.tree().root(),
        };
        let volumes = pins.iter().map(volume).collect();
        let (cp, place) = (row.applied, place.into());
        let target = PullTarget { cp, place, volumes, last: false, keep: None, own: false };
        return Ok((target, Arc::new(pins)));
    }
}

/// Has the follower pull and publish a CP.
async fn pull(follower: &Connected, target: PullTarget, pins: Pins) -> Result<(), Refusal> {
    let (reached, answer) = oneshot::channel();
    let order = Order::Pull { target, pins, reached };
    let gone = |reason: String| Refusal::new(format!("the filer went away: {reason}"), AGAIN);
    let sent = follower.orders.send(order).await;
    sent.map_err(|_| gone("its connection has ended".to_owned()))?;
    let answer = answer.await.unwrap_or_else(|_| Err("its connection has ended".to_owned()));
    answer.map_err(gone)
}

/// Says `TakeOver` to whoever follows, in an epoch and at a CP that are made up: as no hub of ours does.
#[cfg(test)]
pub(super) async fn lie(shared: &Arc<Shared>, name: &SourceName, epoch: Epoch) {
    let follower = shared.failbacks.of(name).pop().unwrap();
    let honest = take_over_of(&row_of(shared, name).unwrap()).unwrap();
    let take = TakeOver { epoch, cp: CpNumber(honest.cp.0 + 100), own: true, ..honest };
    follower.orders.send(Order::TakeOver(take)).await.unwrap();
}

/// A filer takes over with what it has, and is cut before it records that it is primary; the hand-over
/// is recorded nowhere. The CP that it has published under a number of this hub.
#[cfg(test)]
pub(super) async fn half_taken_over(shared: &Arc<Shared>, name: &SourceName) -> CpNumber {
    let Some(Engine::Running(engine)) = shared.promoted.engine(name) else { panic!("not served") };
    let follower = shared.failbacks.of(name).pop().unwrap();
    engine.checkpoint_above(above(&follower.follow).unwrap()).await.unwrap();
    let (mut target, pins) = pinned(shared, name).unwrap();
    (target.last, target.own) = (true, true);
    let cp = target.cp;
    pull(&follower, target, pins).await.unwrap();
    let take = take_over_of(&row_of(shared, name).unwrap()).unwrap();
    let epoch = Epoch { number: take.epoch.number + 1, id: crate::filer::CUT_TAKING_OVER };
    let take = TakeOver { epoch, own: true, ..take };
    follower.orders.send(Order::TakeOver(take)).await.unwrap();
    cp
}
