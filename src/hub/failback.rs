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
//! then 1 is refused until the administrator names the side that stays (R5, R12).

mod follower;
mod taker;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

pub(super) use self::follower::answered;
use self::follower::{Connected, Order, Pins};
pub use self::follower::{Failbacks, follow};
use super::actor::HandedOver;
use super::extension::{self, Extension, State};
use super::failover::{Refusal, View};
use super::promoted::Engine;
use super::shared::Shared;
use crate::filer::Filer;
use crate::pool::Pin;
use crate::pool::rows::SourceRow;
use crate::record::marks::Place;
use crate::session::CP_NUMBER_MAX;
use crate::units::ids::random_u64;
use crate::units::machine;
use crate::units::names::{KeptName, SourceName};
use crate::units::numbers::{CpNumber, Epoch, SequenceNumber};
use crate::units::policy::Mode;
use crate::wire::message::{Follow, PullTarget, PullVolume, TakeOver};

/// A round that was shorter is followed by the last one.
const SHORT: Duration = Duration::from_secs(1);
/// Rounds before the last one, however long they were.
const ROUNDS_MAX: u32 = 8;
/// Writers are held for so long at most; then the source stays promoted.
const HOLD_MAX: Duration = Duration::from_secs(20);
/// How long the command waits for the filer's Hello in the new epoch.
const SERVE_MAX: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 20 });
/// Pause before an actor that is being replaced is told again.
const ACTOR_PAUSE: Duration = Duration::from_millis(50);

const SEE_LOG: &str = "see the log of the hub";
const AGAIN: &str = "the hub goes on serving; run `mirrorhub failback` again";

/// Whose writes stay, where both sides have written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The hub's; what the filer wrote by itself is kept there as a CP by name.
    Hub,
    /// The filer's: not in this version.
    Source,
}

/// What the administrator asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ask {
    /// Which side stays, if both have written.
    pub keep: Option<Side>,
    /// The filer that is to have the volumes, if not the one that had them last.
    pub to: Option<SourceName>,
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
    /// The new epoch is recorded here.
    HandedOver,
    /// The filer was told.
    Told,
}

/// Told each step; false ends the failback there, as a cut would.
pub type Told = Box<dyn Fn(Step) -> bool + Send + Sync>;

/// What a failback came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The epoch in which the filer is primary.
    pub epoch: Epoch,
    /// The CP that both ends have.
    pub cp: CpNumber,
    /// Rounds, the last one among them.
    pub rounds: u32,
    /// From the holding of writers to the filer's Hello, or until now.
    pub pause: Duration,
    /// The filer has said Hello in the new epoch.
    pub serves: bool,
    /// The CP that keeps what the filer wrote by itself.
    pub kept: Option<KeptName>,
}

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
        engine.hold(true);
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
    refuse_later(&ask)?;
    let _turn = shared.failovers.turn(name)?;
    let row = row_of(shared, name)?;
    let extension = Extension::of(&row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
    match extension.state {
        State::Promoted => {}
        State::Mirror => {
            let reason = format!("{name} is not failed over: its filer is primary");
            return Err(Refusal::new(reason, "nothing is to be given back"));
        }
        State::FailingOver => {
            let reason = format!("{name} is being failed over");
            return Err(Refusal::new(reason, "wait for its end; `mirrorhub status` shows it"));
        }
        State::HandedOver => {
            let reason = format!("{name} was handed over in epoch {}", row.epoch.number);
            let next = format!(
                "start the filer: it takes over by itself; if it is lost for good, `mirrorhub \
                 failover {name}` takes the volumes back"
            );
            return Err(Refusal::new(reason, next));
        }
    }
    let engine = match shared.promoted.engine(name) {
        Some(Engine::Running(engine)) => engine,
        Some(Engine::Failed(reason)) => {
            return Err(Refusal::new(format!("{name} is not served here: {reason}"), SEE_LOG));
        }
        None => return Err(Refusal::new(format!("{name} is not served here yet"), AGAIN)),
    };
    let follower = taker::find(shared, &row, &extension, ask.to.as_ref()).await?;
    if !told(Step::Found) {
        return Err(Refusal::new("the hub stops", "start it again, then give the command again"));
    }
    let kept = judge(shared, &row, extension, &follower.follow, ask.keep)?;
    Failback { shared, name, engine, follower, kept, told }.go().await
}

/// What this version does not do is refused by name, before anything else.
fn refuse_later(ask: &Ask) -> Result<(), Refusal> {
    if ask.keep == Some(Side::Source) {
        let reason = "failback --keep source is not available in this version";
        return Err(Refusal::new(
            reason,
            "--keep hub keeps the filer's own writes as a CP by name",
        ));
    }
    Ok(())
}

fn row_of(shared: &Shared, name: &SourceName) -> Result<SourceRow, Refusal> {
    let rows = shared.pool.catalog().sources();
    let rows = rows.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
    rows.into_iter().find(|row| row.name == *name).ok_or_else(|| {
        let reason = format!("{name} was never here: there is nothing to give back");
        Refusal::new(reason, "`mirrorhub status` lists the sources")
    })
}

/// Whether the filer has acknowledged writes that this hub never had (R12); the name under which
/// they are kept, if the administrator has said that the hub's side stays.
fn judge(
    shared: &Shared,
    row: &SourceRow,
    extension: Extension,
    follow: &Follow,
    keep: Option<Side>,
) -> Result<Option<KeptName>, Refusal> {
    let own = Place::from(follow.own);
    let history = shared.pool.catalog().history(row.id, follow.own_cp);
    let history = history.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
    // Everything it has is in a CP of ours: it follows already, or wrote nothing since.
    if history.is_some_and(|known| known.is_at(own)) && follow.last == own.sequence {
        return Ok(None);
    }
    if follow.own_cp == CpNumber(0) && follow.last == SequenceNumber(0) {
        // It has nothing.
        return Ok(None);
    }
    let fence = extension.fence;
    // The fence is of the line that this filer wrote only if it was the last one to write it.
    let fenced_last = follow.epoch.number.checked_add(1) == Some(row.epoch.number);
    let what = match follow.alone {
        Some((_, from)) => format!("from entry {from} on it may have acknowledged them alone"),
        None if fenced_last && follow.last <= fence.sequence => return Ok(None),
        // What sync mode has not sent here was never acknowledged: kept all the same, unasked.
        None if follow.policy.mode == Mode::Sync => {
            return named(&format!("unacknowledged-{}", follow.fenced.number)).map(Some);
        }
        None => format!("its last entry is {}, here it was {}", follow.last, fence.sequence),
    };
    let split = format!("split-{}", follow.fenced.number);
    match keep {
        Some(Side::Hub) => named(&split).map(Some),
        Some(Side::Source) | None => {
            let reason = format!(
                "split brain: the filer of {} has writes that this hub never had ({what}), and the \
                 hub has served since",
                row.name
            );
            let next = format!(
                "name the side that stays: `mirrorhub failback {} --keep hub` keeps what the filer \
                 wrote by itself as its CP {split}, readable there",
                row.name
            );
            Err(Refusal::new(reason, next))
        }
    }
}

fn named(name: &str) -> Result<KeptName, Refusal> {
    name.parse().map_err(|error| Refusal::new(format!("{name}: {error}"), SEE_LOG))
}

/// One failback under way.
struct Failback<'a> {
    shared: &'a Arc<Shared>,
    name: &'a SourceName,
    engine: Arc<Filer>,
    follower: Connected,
    kept: Option<KeptName>,
    told: Told,
}

impl Failback<'_> {
    fn step(&self, step: Step) -> Result<(), Refusal> {
        if (self.told)(step) && !self.shared.failovers.is_stopping() {
            return Ok(());
        }
        Err(Refusal::new("the hub stops", "start it again, then run `mirrorhub failback` again"))
    }

    async fn go(self) -> Result<Report, Refusal> {
        let mut rounds = 1;
        loop {
            let begun = machine::now();
            self.round(false, if rounds == 1 { self.kept.clone() } else { None }).await?;
            self.step(Step::Round(rounds))?;
            tracing::info!(source = %self.name, round = rounds, took = ?machine::elapsed(begun), "caught up");
            if machine::elapsed(begun) < SHORT || rounds == ROUNDS_MAX {
                break;
            }
            rounds += 1;
        }
        let held = machine::now();
        let mut hold = Hold::new(self.engine.clone());
        self.step(Step::Held)?;
        let last = tokio::time::timeout(HOLD_MAX, self.round(true, None)).await;
        let (cp, place) = last.unwrap_or_else(|_| {
            let reason = format!("the filer did not reach the last CP in {} s", HOLD_MAX.as_secs());
            Err(Refusal::new(reason, AGAIN))
        })?;
        self.step(Step::Reached)?;
        let clearing = self.shared.failbacks.clearing.lock().await;
        let epoch = self.hand_over(cp, place, &mut hold).await?;
        self.shared.failovers.set(self.name, View::of(State::HandedOver, epoch));
        tracing::warn!(source = %self.name, epoch = epoch.number, %cp, "handed over");
        self.step(Step::HandedOver)?;
        self.retire(cp, place).await;
        drop(clearing);
        let mut taken = self.shared.failbacks.taken.subscribe();
        self.take_over().await?;
        self.step(Step::Told)?;
        let is_mirror = || {
            let row = row_of(self.shared, self.name).ok();
            let state = row.and_then(|row| Extension::of(&row).ok()).map(|known| known.state);
            state == Some(State::Mirror)
        };
        let served = tokio::time::timeout(SERVE_MAX, taken.wait_for(|_| is_mirror()));
        let serves = matches!(served.await, Ok(Ok(_)));
        let (pause, rounds) = (machine::elapsed(held), rounds + 1);
        tracing::warn!(source = %self.name, ?pause, serves, "given back");
        Ok(Report { epoch, cp, rounds, pause, serves, kept: self.kept })
    }

    /// The follower comes to a CP made now.
    async fn round(
        &self,
        last: bool,
        keep: Option<KeptName>,
    ) -> Result<(CpNumber, Place), Refusal> {
        let failed = |error: crate::filer::CheckpointError| Refusal::new(error.to_string(), AGAIN);
        // One number is left for what the filer keeps.
        let floor = CpNumber(self.follower.follow.cp_max.0.saturating_add(2));
        if floor >= CP_NUMBER_MAX {
            let reason = format!("CP {floor} would be beyond the last number");
            return Err(Refusal::new(reason, SEE_LOG));
        }
        self.engine.checkpoint().await.map_err(failed)?;
        if row_of(self.shared, self.name)?.applied <= floor && !self.is_followed()? {
            self.engine.checkpoint_above(floor).await.map_err(failed)?;
        }
        let (mut target, pins) = pinned(self.shared, self.name)?;
        (target.last, target.keep) = (last, keep);
        let (cp, place) = (target.cp, Place::from(target.place));
        pull(&self.follower, target, pins).await?;
        Ok((cp, place))
    }

    /// Whether the follower came with a CP of this hub, under its number.
    fn is_followed(&self) -> Result<bool, Refusal> {
        let row = row_of(self.shared, self.name)?;
        let known = self.shared.pool.catalog().history(row.id, self.follower.follow.own_cp);
        let known = known.map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
        let own = Place::from(self.follower.follow.own);
        Ok(row.applied == self.follower.follow.own_cp
            && known.is_some_and(|known| known.is_at(own)))
    }

    /// One commit: who served until now never does again.
    async fn hand_over(
        &self,
        cp: CpNumber,
        place: Place,
        hold: &mut Hold,
    ) -> Result<Epoch, Refusal> {
        let row = row_of(self.shared, self.name)?;
        let id = random_u64().map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
        let (before, epoch) = (row.epoch, Epoch { number: row.epoch.number + 1, id });
        // Nobody else takes over from here on, and what may be lost with it goes by its promise.
        let home = Some(self.follower.filer()).filter(|home| *home != row.id);
        let policy = Some(self.follower.follow.policy);
        let (shared, name, source) = (self.shared.clone(), self.name.clone(), row.id);
        let change = move |row: &mut SourceRow| {
            let Ok(known) = Extension::of(row) else { return };
            let stands = row.applied == cp && extension::place(row).is_ok_and(|met| met == place);
            if known.state == State::Promoted && row.epoch == before && stands {
                row.epoch = epoch;
                let (state, nvram_made) = (State::HandedOver, false);
                let now = Extension { state, nvram_made, home, policy, alone: None, ..known };
                row.extension = now.encode();
            }
        };
        let commit = move || {
            let lane = shared.lanes.get(&name);
            let _row = lane.as_ref().map(|lane| lane.row());
            shared.pool.catalog().update_source(source, change)
        };
        // A commit that fails may be durable all the same: writers stay held then, until a restart.
        hold.given_up = true;
        let unknown = |reason: String| {
            let reason = format!("it cannot be known whether the hand-over is recorded: {reason}");
            Refusal::new(reason, "restart the hub: it goes on from what its pool says")
        };
        let done = machine::blocking(commit).await;
        let done = done.map_err(|error| unknown(error.to_string()))?;
        done.map_err(|error| unknown(error.to_string()))?;
        if row_of(self.shared, self.name)?.epoch != epoch {
            hold.given_up = false;
            return Err(Refusal::new("the image has changed meanwhile", AGAIN));
        }
        Ok(epoch)
    }

    /// The engine ends, its NVRAM goes; log and lane go on behind the last CP.
    async fn retire(&self, cp: CpNumber, place: Place) {
        if let Err(error) = self.shared.promoted.stop(self.name).await {
            // What counts is in the last CP, which the filer has.
            tracing::info!(source = %self.name, %error, "the engine has ended");
        }
        let (shared, name) = (self.shared.clone(), self.name.clone());
        let clear = move || {
            let Some(lane) = shared.lanes.get(&name) else { return };
            if let Err(error) = shared.promoted.retire(lane.source()) {
                tracing::warn!(source = %name, %error, "the next start removes its NVRAM");
            }
            if let Err(error) = shared.store.reset(lane.source(), Some(place)) {
                lane.fault(&format!("the log cannot begin anew: {error}"));
            }
        };
        if let Err(error) = machine::blocking(clear).await {
            tracing::error!(source = %self.name, %error, "restart the hub");
        }
        while let Some(entry) = self.shared.registry.get(self.name) {
            if entry.actor.send(HandedOver(cp, place)).await.is_ok()
                || self.shared.failovers.is_stopping()
            {
                return;
            }
            // It died in a panic and is being replaced.
            tokio::time::sleep(ACTOR_PAUSE).await;
        }
    }

    async fn take_over(&self) -> Result<(), Refusal> {
        let row = row_of(self.shared, self.name)?;
        // The newest connection; one that comes later is told by itself.
        let follower = self.shared.failbacks.get(self.name, self.follower.filer());
        if let Some(follower) = follower {
            drop(follower.orders.send(Order::TakeOver(take_over_of(&row)?)).await);
        }
        Ok(())
    }
}

fn take_over_of(row: &SourceRow) -> Result<TakeOver, Refusal> {
    let place = extension::place(row).map_err(|reason| Refusal::new(reason, SEE_LOG))?;
    let (cp, generation) = (row.applied, row.generation.number);
    Ok(TakeOver { epoch: row.epoch, cp, place: place.into(), generation })
}

/// What was handed over is handed over again: the filer did not say that it has it.
async fn repeat(
    shared: &Arc<Shared>,
    name: &SourceName,
    follower: &Connected,
) -> Result<(), Refusal> {
    let (mut target, pins) = pinned(shared, name)?;
    target.last = true;
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
        let target = PullTarget { cp, place, volumes, last: false, keep: None };
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
