//! A hub that comes back with less than it has acknowledged as durable (R7).
//!
//! Called by [`super::Primary::step`]. What the hub holds is what Welcome says: the rest is sent
//! again, or a pass brings the image up, and nothing is lost as long as this source lives. But a
//! durable acknowledgement that does not hold is the mark of a hub restored from an old copy, or of
//! a device that lies about its syncs: the administrator is told.

use super::{Action, Identity, Primary};
use crate::record::marks::Place;
use crate::units::policy::Ack;
use crate::wire::message::Welcome;

/// What an earlier run knew for sure that the hub has: what was let go of here was published there,
/// unless it may have been let go of alone.
pub(super) fn had_before(identity: &Identity, held_after: Place) -> Place {
    match (identity.hub, identity.alone) {
        (Some(_), None) => held_after,
        (None, _) | (_, Some(_)) => Place::default(),
    }
}

impl Primary {
    /// The hub has acknowledged, or said in Welcome, what it has by now.
    pub(super) fn acknowledged(&mut self) {
        let place = self.acked_place();
        if place.sequence > self.had.sequence {
            self.had = place;
        }
    }

    /// Holds a Welcome to what was acknowledged before.
    pub(super) fn hold_to(&mut self, welcome: &Welcome, actions: &mut Vec<Action>) {
        let has = Place::from(welcome.last);
        // What is acknowledged as received may go with the hub's power, by policy.
        let durable = self.identity.policy.ack != Ack::Received;
        let had = std::mem::replace(&mut self.had, has);
        if durable && has.sequence < had.sequence {
            actions.push(Action::SetBack { had, has });
        }
    }
}
