//! What the hub says, as far as the machine does not judge it alone.

use std::sync::Arc;

use bytes::Bytes;

use super::{End, Forwarder};
use crate::filer::order::AdoptError;
use crate::filer::sending::SendSide;
use crate::filer::shared::Common;
use crate::filer::{mending, past};
use crate::record::transfer::Transfer;
use crate::session::primary::{Action, Event, Held, Past};
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::numbers::VolumeNumber;
use crate::wire::homes::{Adopt, Adopted};
use crate::wire::message::{Message, Refused, RefusedCode, Welcome};

impl Forwarder {
    pub(super) async fn frame(
        &mut self,
        message: Message,
        payload: Bytes,
        side: &mut SendSide,
    ) -> Result<(), End> {
        if message == Message::Refill {
            return self.refill(payload, side).await;
        }
        if self.primary.is_streaming() && self.place(&message, &payload) {
            return Ok(());
        }
        if let Message::Welcome(welcome) = message {
            side.window(0, welcome.cp_credit);
            let (past, older) = self.past(&welcome).await?;
            self.older = older;
            self.common(&welcome, past);
            self.follow.push_back(Event::VolumesBehind(!self.older.is_empty()));
            return self.step(Event::Welcomed { welcome, past }, side).await;
        }
        if let Message::Pong(pong) = &message
            && self.primary.is_streaming()
            && let Some(left) = self.pulse.pong(pong)
        {
            self.shared.lease.send_replace(Some(left));
        }
        if let Message::Adopt(adopt) = message {
            self.asked_to_adopt(*adopt);
            return Ok(());
        }
        if let Message::Scanned(scanned) = &message {
            self.shared.scans.send_replace(Some(scanned.clone()));
        }
        self.step(Event::Received(message), side).await
    }

    /// Another source is to live here: whoever looks after those hears of it.
    pub(super) fn asked_to_adopt(&self, adopt: Adopt) {
        let token = adopt.token;
        if self.primary.is_streaming() && self.shared.offers.receiver_count() > 0 {
            self.shared.offers.send_replace(Some(adopt));
            return;
        }
        let refused = ("this filer takes no other sources", "name another filer");
        let refused = Some((refused.0.to_owned(), refused.1.to_owned()));
        self.shared.session.adopted(Adopted { token, refused });
    }

    /// What the hub's image is to this source, and the volumes whose image is of an older CP (R5).
    pub(super) async fn past(&self, welcome: &Welcome) -> Result<(Past, past::Older), End> {
        let (shared, welcome) = (Arc::clone(&self.shared), welcome.clone());
        let past = machine::blocking(move || past::look(&shared, &welcome));
        let past = past.await.map_err(|error| End::Broken(format!("own catalog: {error}")))?;
        past.map_err(|error| {
            let reason = format!("the own pool failed: {error}");
            self.shared.fail(&reason);
            End::Broken(reason)
        })
    }

    /// Rot: questions and answers of both ends, which concern the machine not at all.
    pub(super) fn place(&self, message: &Message, payload: &Bytes) -> bool {
        let shared = &self.shared;
        if let Message::PlaceContent(content) = message {
            shared.questions.answer(content.token, payload.clone());
            return true;
        }
        if *message == Message::WantRewrite {
            shared.checkpoint.force();
            return true;
        }
        let Message::WantPlace(want) = *message else { return false };
        // No hub of ours asks for more at once: it waits for the answer that does not come.
        let Ok(turn) = Arc::clone(&shared.serving_places).try_acquire_owned() else { return true };
        let shared = Arc::clone(shared);
        // Its answer goes through the session's slot; nobody waits for the task itself.
        machine::aside(move || {
            let frame = mending::serve(&shared, &want);
            drop(turn);
            shared.session.place(frame);
        });
        true
    }

    /// A CP that both ends had published before this connection.
    pub(super) fn common(&self, welcome: &Welcome, past: Past) {
        let (cp, roots) = self.shared.own();
        let known = self.shared.common.borrow().as_ref().is_some_and(|known| known.cp >= cp);
        let is_past = past == Past::Known;
        if is_past {
            self.shared.outbox.published(welcome.applied_cp);
        }
        if is_past && self.older.is_empty() && cp == welcome.applied_cp && !known {
            let pins = self.shared.pins();
            let left_out = |v: &VolumeNumber| welcome.refused.iter().any(|no| no.volume == *v);
            let roots = roots.into_iter().filter(|(volume, _)| !left_out(volume)).collect();
            self.shared.set_common(Common { cp, roots, pins });
        }
    }

    /// A transfer that the hub holds and this end lost (R1): checked like any other.
    pub(super) async fn refill(&mut self, payload: Bytes, side: &mut SendSide) -> Result<(), End> {
        let transfer = Transfer::parse(payload)
            .map_err(|error| End::Broken(format!("a refilled transfer is bad: {error}")))?;
        let header = *transfer.header();
        let place = transfer.place();
        let event = Event::Refilled {
            held: Held { place, bytes: to_u64(transfer.bytes().len()) },
            previous: header.previous,
            hash_before: header.hash_before,
        };
        for action in self.primary.step(event) {
            if action == Action::Adopt {
                self.adopt(&transfer).await?;
            } else {
                self.act(action, side).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn adopt(&self, transfer: &Transfer) -> Result<(), End> {
        self.shared.counters.transfers_adopted.add(1);
        let mut adopted = self.shared.order.take_over(transfer, true);
        if self.in_the_way(&adopted) {
            // The hub has told that the frozen CP is done; its partition is about to be released.
            let thawed = self.shared.order.thawed();
            if tokio::time::timeout(self.patience(), thawed).await.is_ok() {
                adopted = self.shared.order.take_over(transfer, true);
            }
        }
        adopted.map_err(|error| {
            End::Halted(Refused {
                code: RefusedCode::Diverged,
                reason: format!("the hub's log cannot be taken over: {error}"),
                next_step: "give the source the volumes and the NVRAM size it had".to_owned(),
            })
        })
    }

    /// Whether only a CP that is still frozen keeps a transfer from being taken over.
    pub(super) fn in_the_way(&self, adopted: &Result<(), AdoptError>) -> bool {
        let waits = match adopted {
            Err(AdoptError::Cp { open, met, .. }) => met > open,
            Err(AdoptError::Room { .. }) => true,
            Ok(()) | Err(AdoptError::Range { .. } | AdoptError::Sequence { .. }) => false,
        };
        waits && self.shared.order.frozen().is_some()
    }
}
