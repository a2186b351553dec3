//! The actor's end of a connection: what it sends, refuses and lets go.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::SourceActor;
use crate::hub::certificates::{self, Spoken};
use crate::hub::lane::lock;
use crate::session::mirror::{Action, Event};
use crate::wire::message::{Ack, Behind, Fenced, Frame, Message, Refused, RefusedCode};

/// How long a connection may be silent: a source sends a heartbeat each second.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);

/// What the actor holds of its connection.
#[derive(Debug)]
pub struct Peer {
    /// Tells this connection's messages from an older one's.
    pub number: u64,
    /// With whose certificate it came; none without TLS.
    pub spoken: Option<Spoken>,
    /// Frames to send, in order.
    pub frames: mpsc::Sender<Frame>,
    /// The newest acknowledgement; a newer one replaces it.
    pub ack: Arc<Mutex<Option<Ack>>>,
    /// The newest word of how much was taken behind a pass.
    pub taken: Arc<Mutex<Option<Behind>>>,
    /// Rung when `ack` or `taken` was set.
    pub ack_bell: Arc<tokio::sync::Notify>,
    /// Ends the connection's tasks.
    pub cancel: DropGuard,
    /// Closed when everything queued has been sent, or given up.
    pub ended: Option<oneshot::Receiver<()>>,
}

/// The ends of a peer that its connection's tasks keep.
#[derive(Debug)]
pub struct PeerEnds {
    /// Frames the actor sends.
    pub frames: mpsc::Receiver<Frame>,
    /// The newest acknowledgement.
    pub ack: Arc<Mutex<Option<Ack>>>,
    /// The newest word of how much was taken behind a pass.
    pub taken: Arc<Mutex<Option<Behind>>>,
    /// Rung when one of them was set.
    pub bell: Arc<tokio::sync::Notify>,
    /// Cancelled when the actor lets go.
    pub cancel: CancellationToken,
    /// Dropped when the writing task ends.
    pub ended: oneshot::Sender<()>,
}

/// A peer for the actor and the ends for its connection.
pub fn peer(number: u64, frames_max: usize) -> (Peer, PeerEnds) {
    let (sender, frames) = mpsc::channel(frames_max);
    let (ack, taken) = (Arc::<Mutex<_>>::default(), Arc::<Mutex<_>>::default());
    let bell = Arc::new(tokio::sync::Notify::new());
    let cancel = CancellationToken::new();
    let (alive, ended) = oneshot::channel();
    let peer = Peer {
        number,
        spoken: None,
        frames: sender,
        ack: ack.clone(),
        taken: taken.clone(),
        ack_bell: bell.clone(),
        cancel: cancel.clone().drop_guard(),
        ended: Some(ended),
    };
    (peer, PeerEnds { frames, ack, taken, bell, cancel, ended: alive })
}

impl Peer {
    /// Queues a frame; false if there is no room for it.
    #[must_use = "a peer that does not take its answers is let go"]
    pub fn send(&self, message: &Message) -> bool {
        self.frames.try_send(Frame::new(message, Bytes::new())).is_ok()
    }

    /// Replaces the acknowledgement that waits; none leaves before Welcome.
    pub fn acknowledge(&self, ack: Ack) {
        *lock(&self.ack) = Some(ack);
        self.ack_bell.notify_one();
    }

    /// Replaces the word of how much was taken behind a pass.
    pub fn takes_behind(&self, behind: Behind) {
        *lock(&self.taken) = Some(behind);
        self.ack_bell.notify_one();
    }
}

/// The peer broke the protocol.
pub(super) fn broken(reason: String) -> Refused {
    let next_step = "both ends must run a supported mirrorhub".to_owned();
    Refused { code: RefusedCode::Protocol, reason, next_step }
}

/// What passes.
pub(super) fn busy(reason: String) -> Refused {
    Refused { code: RefusedCode::Busy, reason, next_step: "wait, the source tries again".into() }
}

impl SourceActor {
    /// What is acknowledged as received was handed to the stager: what a fence keeps from that is
    /// not acknowledged, though it came (R2).
    pub(super) fn acknowledge(&self, ack: Ack) {
        if self.lane.as_ref().is_some_and(|lane| lane.is_fenced_off(ack.id)) {
            return;
        }
        if let Some(peer) = &self.peer {
            peer.acknowledge(ack);
        }
    }

    pub(super) fn send(&mut self, message: &Message) {
        let Some(peer) = &self.peer else { return };
        if !peer.send(message) {
            tracing::warn!(source = %self.name, "source does not take its answers, closing");
            self.hang_up();
        }
    }

    pub(super) fn refuse(&mut self, refused: Refused) {
        self.shared.counters.refused(refused.code);
        tracing::warn!(
            source = %self.name,
            code = refused.code.word(),
            reason = refused.reason,
            "source refused"
        );
        self.send(&Message::Refused(refused.clone()));
        self.refused = Some(refused);
        // The frame is queued before the tasks are told to end: they flush, then close.
        self.hang_up();
    }

    /// Why the certificate that a connection came with speaks for nobody any more.
    pub(super) fn taken_back(&self, peer: &Peer) -> Option<Refused> {
        let reason = peer.spoken.as_ref()?.taken_back(&self.shared.settings.load())?;
        let next_step = certificates::NEXT_STEP.to_owned();
        Some(Refused { code: RefusedCode::UnknownSource, reason, next_step })
    }

    /// Refuses a new connection; the one in session stays. Its tasks end when `peer` is dropped,
    /// and deliver the reason first.
    pub(super) fn turn_away(&mut self, peer: &Peer, refused: Refused) {
        self.shared.counters.refused(refused.code);
        let (code, reason) = (refused.code.word(), &refused.reason);
        tracing::warn!(source = %self.name, code, reason, "connection refused");
        if refused.code == RefusedCode::Fenced
            && let Some(machine) = &self.machine
        {
            let fenced = Message::Fenced(Fenced {
                epoch: machine.known().epoch,
                hub: Some(self.shared.hub),
            });
            drop(peer.frames.try_send(Frame::new(&fenced, Bytes::new())));
        }
        let frame = Frame::new(&Message::Refused(refused.clone()), Bytes::new());
        if peer.frames.try_send(frame).is_err() {
            tracing::debug!("a refused connection did not take its reason");
        }
        if self.peer.is_none() {
            self.refused = Some(refused);
            self.publish();
        }
    }

    pub(super) fn hang_up(&mut self) {
        if self.peer.take().is_some()
            && let Some(machine) = &mut self.machine
        {
            for action in machine.step(Event::Disconnected) {
                if action == Action::Abort
                    && let Some(job) = self.job.take()
                {
                    job.abort();
                }
            }
        }
        self.early.clear();
        self.refill_from = None;
        if let Some(lane) = &self.lane {
            lane.questions.give_up();
            drop(lane.aside().end());
        }
        let waiting = std::mem::take(&mut self.waiting).into_iter().map(|(_, reply)| reply);
        for reply in std::mem::take(&mut self.asked).into_values().chain(waiting) {
            drop(reply.send(Err("the source went away".to_owned())));
        }
        for (_, reply) in std::mem::take(&mut self.scans) {
            drop(reply.send(Err("the source went away".to_owned())));
        }
        self.adopting.give_up();
    }
}
