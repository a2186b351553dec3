//! What the machine says is to be durable before it goes on.

use std::sync::Arc;

use super::{End, Forwarder};
use crate::filer::keeper::Kept;
use crate::filer::shared::LinkState;
use crate::pool::error::PoolError;
use crate::session::primary::Event;
use crate::units::ids::HubId;
use crate::units::machine;
use crate::units::numbers::Epoch;
use crate::units::policy::{AloneMark, Policy};

impl Forwarder {
    pub(super) async fn put_in_force(&self, policy: Policy) -> Result<(), End> {
        let shared = Arc::clone(&self.shared);
        self.blocking(move || shared.put_in_force(policy)).await?;
        // The file may ask for another one by now.
        self.shared.checkpoint.look_again();
        Ok(())
    }

    /// The mark is durable when this returns, or gone.
    pub(super) async fn mark(&mut self, mark: Option<AloneMark>, then: Event) -> Result<(), End> {
        if mark.is_none() || !machine::breaks(4) {
            self.note(move |kept| kept.alone = mark).await?;
        }
        self.follow.push_back(then);
        Ok(())
    }

    /// The gate is closed by now: no more is answered without the hub. A source that was to be usable
    /// before it had been in step begins to promise that it stops: before the mark goes.
    pub(super) async fn answered_alone(&mut self) -> Result<(), End> {
        let next = if self.shared.waits_to_stop() { self.shared.promise() } else { None };
        if let Some(next) = next {
            // Looked at behind the change: what comes later is answered by both.
            let behind = self.shared.order.figures().sequence;
            self.note(move |kept| kept.next = Some(next)).await?;
            self.follow.push_back(Event::Promised { next, behind });
        }
        let upto = self.shared.completion.answered_alone();
        self.follow.push_back(Event::AnsweredAlone(upto));
        Ok(())
    }

    /// Changes what the source keeps about itself, durably.
    pub(super) async fn note(
        &self,
        change: impl FnOnce(&mut Kept) + Send + 'static,
    ) -> Result<(), End> {
        let shared = Arc::clone(&self.shared);
        self.blocking(move || shared.note(change)).await
    }

    /// A change of the own catalog; a pool that fails fails the source.
    pub(super) async fn blocking(
        &self,
        work: impl FnOnce() -> Result<(), PoolError> + Send + 'static,
    ) -> Result<(), End> {
        match machine::blocking(work).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                let reason = format!("the own pool failed: {error}");
                self.shared.fail(&reason);
                Err(End::Broken(reason))
            }
            Err(error) => Err(End::Broken(format!("own catalog: {error}"))),
        }
    }

    /// Hub and epoch are durable before anything else happens in the session.
    pub(super) async fn joined(&self, hub: HubId, epoch: Epoch) -> Result<(), End> {
        self.shared.counters.connections.add(1);
        self.shared.set_link(LinkState::Connected { since: machine::now() });
        let known = self.shared.affiliation();
        if known.hub == Some(hub) && known.epoch == epoch {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        self.blocking(move || shared.join(hub, epoch)).await
    }

    /// What was adopted is durable here before the first client is served.
    pub(super) async fn serve(&self) {
        self.shared.completion.own_reached(self.shared.order.figures().sequence).await;
        self.shared.order.raise_cp(self.primary.cp_max().next());
        tracing::info!(source = %self.shared.name, "serving");
        self.shared.serve(true);
        let terms = self.shared.pledge.terms();
        if terms.next.is_some() && !terms.in_force.forwards() {
            // Only a CP brings the hub to where the next policy may be told of.
            self.shared.checkpoint.want();
        }
        // What was asked of it before is done now.
        self.shared.checkpoint.serving();
    }
}
