//! What the machine says about CPs that go to the hub outside of the normal way.

use std::sync::Arc;

use super::{End, Forwarder, RETRY, RETRY_MAX};
use crate::filer::pass::{Bases, PassData};
use crate::filer::sending::SendSide;
use crate::filer::served::Served;
use crate::filer::shared::{Common, Pins};
use crate::record::marks::Place;
use crate::units::machine;
use crate::units::numbers::CpNumber;
use crate::wire::message::{CheckpointAt, Message, VolumeRefusal};

impl Forwarder {
    pub(super) fn send_pass(
        &mut self,
        cp: CpNumber,
        base: CpNumber,
        side: &mut SendSide,
    ) -> Result<(), End> {
        self.is_own(cp)?;
        tracing::info!(source = %self.shared.name, %cp, %base, "the hub's image is brought up");
        let progress = self.shared.begin_pass(cp, base);
        let pins = self.agreed_pins();
        let bases = Bases { base, older: self.older.clone() };
        side.pass(PassData::start(cp, pins, bases, self.options.resync_limit, progress));
        Ok(())
    }

    /// The newest own CP, but for the volumes that the hub leaves out.
    pub(super) fn agreed_pins(&self) -> Pins {
        let left_out = self.shared.left_out();
        let agreed = self.own.1.iter().filter(|(volume, _)| !left_out.contains(volume));
        Arc::new(agreed.map(|(volume, pin)| (*volume, Arc::clone(pin))).collect())
    }

    pub(super) fn set_back(&self, had: Place, has: Place) {
        let what = format!(
            "the hub had acknowledged everything up to sequence {} as durable and came back with {}: \
             it was restored from an older copy, or its device lost what it had synced",
            had.sequence, has.sequence
        );
        tracing::error!(source = %self.shared.name, what, "hub set back; it is sent again");
        self.shared.note_set_back(what);
    }

    pub(super) fn leave_out(&self, refused: Vec<VolumeRefusal>) {
        for VolumeRefusal { name, reason, next_step, .. } in &refused {
            let source = &self.shared.name;
            tracing::error!(%source, volume = %name, reason, next_step, "not mirrored by the hub");
        }
        self.shared.set_refused(refused);
    }

    /// Only the newest own CP can be read; the next session begins with it.
    pub(super) fn is_own(&self, cp: CpNumber) -> Result<(), End> {
        if self.own.0 == cp {
            return Ok(());
        }
        Err(End::Broken(format!("a pass to CP {cp}, the own one is CP {}", self.own.0)))
    }

    pub(super) fn send_compare(
        &mut self,
        cp: CpNumber,
        base: CpNumber,
        side: &mut SendSide,
    ) -> Result<(), End> {
        self.is_own(cp)?;
        tracing::info!(source = %self.shared.name, %cp, %base, "the hub's image is brought up by comparison");
        let progress = self.shared.begin_pass(cp, base);
        let pins = self.agreed_pins();
        side.serve(Served::start(pins, self.options.resync_limit, progress));
        Ok(())
    }

    /// Somebody on the hub asks for a CP.
    pub(super) fn checkpoint_wanted(&mut self, token: u64, side: &mut SendSide) {
        // Nothing to say: the own CP holds everything already, the hub may lack it still.
        let target = self.shared.order.target();
        let cp = target.unwrap_or_else(|| self.shared.own().0);
        self.shared.checkpoint.want();
        // Whoever asks may have made room.
        self.retry_at = self.retry_at.map(|_| machine::now());
        side.message(Message::CheckpointAt(CheckpointAt { token, cp }));
    }

    pub(super) fn pass_ended(&mut self, cp: CpNumber) {
        self.shared.end_pass();
        self.retry_pause = RETRY;
        self.shared.set_faulted(None);
        self.older.clear();
        tracing::info!(source = %self.shared.name, %cp, "the hub's image was brought up");
        self.is_common(cp);
    }

    /// The hub has built a CP that was done alone from its log.
    pub(super) fn shown(&mut self, cp: CpNumber) {
        self.shared.counters.checkpoints_built_there.add(1);
        tracing::info!(source = %self.shared.name, %cp, "the hub has built a CP that was done alone");
        self.is_common(cp);
    }

    /// The hub's image shows the own CP `cp`.
    fn is_common(&self, cp: CpNumber) {
        self.shared.outbox.published(cp);
        self.shared.set_rejected(None);
        if self.own.0 == cp {
            let (shared, pins) = (&self.shared, Arc::clone(&self.own.1));
            let roots = pins.iter().map(|(volume, pin)| (*volume, pin.tree().root())).collect();
            let roots = shared.agreed(&roots);
            shared.set_common(Common { cp, roots, pins });
        }
    }

    pub(super) fn faulted(&self, cp: CpNumber, reason: String, side: &mut SendSide) {
        tracing::error!(source = %self.shared.name, %cp, %reason, "refused for good");
        side.end_pass();
        self.shared.end_pass();
        self.shared.set_faulted(Some((cp, reason)));
    }

    pub(super) fn rejected(&mut self, cp: CpNumber, reason: String, no_space: bool) {
        tracing::error!(source = %self.shared.name, %cp, %reason, no_space, "CP refused by the hub");
        self.shared.counters.checkpoints_rejected.add(1);
        let reason = format!("the hub refused CP {cp}: {reason}");
        if no_space {
            self.shared.set_no_hub_room(reason);
            self.retry_at = Some(machine::now() + self.retry_pause);
            if self.primary.pass().is_some() {
                self.retry_pause = (self.retry_pause * 2).min(RETRY_MAX);
            }
        } else {
            self.shared.set_rejected(Some(reason));
        }
    }
}
