//! The hand-over itself: this hub gives up, durably, then the filer is told (R14).
//!
//! The last steps of every failback, whichever side's state counts. Before the commit the hub serves
//! as ever, behind it never again.

use std::sync::Arc;
use std::time::Duration;

use super::follower::{Connected, Order};
use super::{AGAIN, Hold, SEE_LOG, Step, Told, row_of, take_over_of};
use crate::hub::actor::HandedOver;
use crate::hub::extension::{self, Extension, State};
use crate::hub::failover::{Refusal, View};
use crate::hub::shared::Shared;
use crate::pool::rows::SourceRow;
use crate::record::marks::Place;
use crate::units::ids::random_u64;
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::numbers::{CpNumber, Epoch};

/// How long the command waits for the filer's Hello in the new epoch.
const SERVE_MAX: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 20 });
/// Pause before an actor that is being replaced is told again.
const ACTOR_PAUSE: Duration = Duration::from_millis(50);

/// A source on its way to a filer.
pub(super) struct Handover<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) name: &'a SourceName,
    pub(super) follower: Connected,
    pub(super) told: Told,
    /// The filer keeps its own state.
    pub(super) own: bool,
}

impl Handover<'_> {
    /// A step is reached.
    pub(super) fn step(&self, step: Step) -> Result<(), Refusal> {
        if (self.told)(step) && !self.shared.failovers.is_stopping() {
            return Ok(());
        }
        Err(Refusal::new("the hub stops", "start it again, then run `mirrorhub failback` again"))
    }

    /// Gives the source away at that CP, which is the published one. The new epoch, and whether the
    /// filer has said that it serves.
    pub(super) async fn give(
        &self,
        cp: CpNumber,
        place: Place,
        hold: Option<&mut Hold>,
    ) -> Result<(Epoch, bool), Refusal> {
        let clearing = self.shared.failbacks.clearing.lock().await;
        let epoch = self.record(cp, place, hold).await?;
        self.shared.failovers.set(self.name, View::of(State::HandedOver, epoch));
        tracing::warn!(source = %self.name, epoch = epoch.number, %cp, own = self.own, "handed over");
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
        Ok((epoch, matches!(served.await, Ok(Ok(_)))))
    }

    /// One commit: who served until now never does again.
    async fn record(
        &self,
        cp: CpNumber,
        place: Place,
        hold: Option<&mut Hold>,
    ) -> Result<Epoch, Refusal> {
        let row = row_of(self.shared, self.name)?;
        let was = Extension::of(&row).map_err(|reason| Refusal::new(reason, SEE_LOG))?.state;
        let id = random_u64().map_err(|error| Refusal::new(error.to_string(), SEE_LOG))?;
        let (before, epoch) = (row.epoch, Epoch { number: row.epoch.number + 1, id });
        // Nobody else takes over from here on, and what may be lost with it goes by its promise.
        let home = Some(self.follower.filer()).filter(|home| *home != row.id);
        let (policy, own) = (Some(self.follower.follow.policy), self.own);
        let (shared, name, source) = (self.shared.clone(), self.name.clone(), row.id);
        let change = move |row: &mut SourceRow| {
            let Ok(known) = Extension::of(row) else { return };
            let stands = row.applied == cp && extension::place(row).is_ok_and(|met| met == place);
            if known.state == was && row.epoch == before && stands {
                row.epoch = epoch;
                let (state, nvram_made, serving) = (State::HandedOver, false, None);
                let given = Extension { state, nvram_made, serving, own, home, ..known };
                // What was missing is of a log that has ended.
                let gone = given.without_doubts();
                row.extension = Extension { policy, alone: None, ..gone }.encode();
            }
        };
        let commit = move || {
            let lane = shared.lanes.get(&name);
            let _row = lane.as_ref().map(|lane| lane.row());
            shared.pool.catalog().update_source(source, change)
        };
        // A commit that fails may be durable all the same: writers stay held then, until a restart.
        let mut given_up = false;
        let given_up = hold.map_or(&mut given_up, |hold| &mut hold.given_up);
        *given_up = true;
        let unknown = |reason: String| {
            let reason = format!("it cannot be known whether the hand-over is recorded: {reason}");
            Refusal::new(reason, "restart the hub: it goes on from what its pool says")
        };
        let done = machine::blocking(commit).await;
        let done = done.map_err(|error| unknown(error.to_string()))?;
        done.map_err(|error| unknown(error.to_string()))?;
        if row_of(self.shared, self.name)?.epoch != epoch {
            *given_up = false;
            return Err(Refusal::new("the image has changed meanwhile", AGAIN));
        }
        Ok(epoch)
    }

    /// The engine ends, its NVRAM goes; log and lane go on behind the last CP.
    async fn retire(&self, cp: CpNumber, place: Place) {
        if let Err(error) = self.shared.promoted.stop(self.name).await {
            // What counts is in the last CP.
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
