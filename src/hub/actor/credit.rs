//! How much a source may have under way (section 8; R10).

use std::sync::Arc;

use actix::Context;

use super::SourceActor;
use crate::hub::lane::Lane;
use crate::limits::{LOG_BYTES_PER_TRANSFER_BYTE, RECORD_BYTES_MAX, TRANSFER_BYTES_MAX};
use crate::session::mirror::{Event, Mirror};
use crate::units::policy;

impl SourceActor {
    /// What the source may have under way: what it may have of the ring, and of its log, whichever is
    /// less (section 8).
    pub(super) fn credit(&self, lane: &Arc<Lane>) -> u64 {
        let (mut ring, mut log) = self.room(lane);
        if ring.min(log) < RECORD_BYTES_MAX {
            self.shared.drain.wants_room(lane.clone());
            // What came back meanwhile was told to nobody.
            (ring, log) = self.room(lane);
            // Of a source that is faulted nothing leaves the ring, whoever asks.
            if ring < RECORD_BYTES_MAX && lane.cursors().fault.is_none() {
                self.shared.drain.make_room();
            }
        }
        let most = self.shared.grant().0;
        // Transfers that stand before a heartbeat are read within half a second.
        let paced = self.shared.bandwidth_limit(&self.name).map(|limit| limit / 2);
        let most = paced.map_or(most, |paced| most.min(paced.max(2 * TRANSFER_BYTES_MAX)));
        let credit = ring.min(log).min(most);
        if credit < RECORD_BYTES_MAX {
            // What is less than a transfer would end in a full log.
            return 0;
        }
        let unsynced = self.unsynced_bytes(lane);
        let credit = credit.min(most.saturating_sub(unsynced));
        if credit < TRANSFER_BYTES_MAX {
            return 0;
        }
        // Steps of a transfer, so that small changes make no traffic.
        let credit = credit - credit % (TRANSFER_BYTES_MAX / 4);
        lane.give_credit(unsynced + credit);
        credit
    }

    /// Bytes of transfers that the ring and the source's log have room for.
    pub(super) fn room(&self, lane: &Arc<Lane>) -> (u64, u64) {
        // What comes behind a pass takes no room of the ring.
        let ring = match self.machine.as_ref().is_some_and(Mirror::is_behind) {
            true => u64::MAX,
            false => self.shared.ring_room(&self.name, lane.cursors().ring_bytes),
        };
        let log = self.shared.log_room(&self.name, lane.source());
        let log = log.saturating_sub(lane.cursors().undrained_bytes);
        let log = log.saturating_sub(lane.aside().bytes() * LOG_BYTES_PER_TRANSFER_BYTE);
        // Many small transfers fill a log faster than their bytes say.
        (ring, log / LOG_BYTES_PER_TRANSFER_BYTE)
    }

    /// What is acknowledged as received still waits for the ring: it counts as under way, so that
    /// memory stays bounded by what was given out. No less than a transfer is given out then.
    pub(super) fn unsynced_bytes(&self, lane: &Lane) -> u64 {
        if self.ack() != Some(policy::Ack::Received) {
            return 0;
        }
        lane.cursors().under_way_bytes
    }

    /// What the source asks for before a transfer is acknowledged.
    pub(super) fn ack(&self) -> Option<policy::Ack> {
        let known = self.machine.as_ref()?.known();
        known.policy.map(|policy| policy.ack)
    }

    /// Before a transfer is acknowledged as received, the credit that goes with it counts it in.
    pub(super) fn credit_before(&mut self, transfer_bytes: u64, context: &mut Context<Self>) {
        if self.ack() != Some(policy::Ack::Received) {
            return;
        }
        if let Some(lane) = self.lane.clone() {
            let left = self.credit(&lane).saturating_sub(transfer_bytes);
            let credit = if left < TRANSFER_BYTES_MAX { 0 } else { left };
            self.step(Event::Credit(credit), context);
        }
    }
}
