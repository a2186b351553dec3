//! Answers to clients: the one place that builds the acknowledgement of a write (invariant 1).
//!
//! A write, a flush or a FUA waits here for its sequence number; [`Acknowledged`] is made only
//! when both ends hold everything up to it durably: [`OwnDurable`] comes out of a group commit of
//! the own ring, [`HubDurable`] out of an action of the session. Neither can be made otherwise.
//!
//! The first failed log write is final (R17): every waiter, every later write, flush and FUA gets
//! its reason. A stop ends the waiters without an acknowledgement; what they wrote may survive.
//!
//! Invariant: both cursors only rise; waiters are answered in sequence order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

use crate::nvlog::DurableToken;
use crate::record::marks::Place;
use crate::session::primary::Action;
use crate::units::numbers::SequenceNumber;

/// Why a request is not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The own log or pool failed: nothing is acknowledged any more.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The source is being stopped.
    #[error("the source is being stopped")]
    Stopped,
}

/// The ends that the [`Gate`] names hold everything up to a sequence number durably. Made in this
/// file only.
#[derive(Debug)]
#[must_use = "it is the answer to the client"]
pub struct Acknowledged {
    sequence: SequenceNumber,
}

impl Acknowledged {
    /// Up to where.
    pub fn sequence(&self) -> SequenceNumber {
        self.sequence
    }
}

/// Proof that the own ring holds everything up to a sequence number durably.
#[derive(Debug)]
pub struct OwnDurable(SequenceNumber);

impl OwnDurable {
    /// From the token of the group commit that wrote it.
    pub fn new(upto: SequenceNumber, _token: &DurableToken) -> Self {
        Self(upto)
    }
}

/// Proof that the hub holds everything up to a place durably.
#[derive(Debug)]
pub struct HubDurable(Place);

impl HubDurable {
    /// From the session's own action; any other action is no proof.
    pub fn from_action(action: &Action) -> Option<Self> {
        if let Action::HubDurable(place) = action { Some(Self(*place)) } else { None }
    }

    /// Up to where.
    pub fn place(&self) -> Place {
        self.0
    }
}

/// Which ends must hold what is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gate {
    /// Both.
    #[default]
    Both,
    /// The own one: there is no other.
    Own,
}

type Answer = Result<Acknowledged, Refusal>;

#[derive(Debug, Default)]
struct State {
    gate: Gate,
    own: SequenceNumber,
    hub: SequenceNumber,
    waiters: BTreeMap<(SequenceNumber, u64), oneshot::Sender<Answer>>,
    next_waiter: u64,
    refusal: Option<Refusal>,
}

/// The waiters and the two cursors.
#[derive(Debug, Default)]
pub struct Completion {
    state: Mutex<State>,
    own_moved: Notify,
}

impl Completion {
    /// Resumes: the own ring holds everything up to `own`, that was recovered from it.
    pub fn recovered(own: SequenceNumber) -> Self {
        Self { state: Mutex::new(State { own, ..State::default() }), own_moved: Notify::new() }
    }

    /// Sets which ends must hold what is answered from now on.
    pub fn set_gate(&self, gate: Gate) {
        let mut state = self.lock();
        state.gate = gate;
        state.answer();
    }

    /// Waits until everything up to `sequence` is durable at both ends.
    pub async fn wait(&self, sequence: SequenceNumber) -> Answer {
        let receiver = {
            let mut state = self.lock();
            if let Some(refusal) = &state.refusal {
                return Err(refusal.clone());
            }
            if state.done() >= sequence {
                return Ok(Acknowledged { sequence });
            }
            let (sender, receiver) = oneshot::channel();
            let waiter = state.next_waiter;
            state.next_waiter += 1;
            state.waiters.insert((sequence, waiter), sender);
            receiver
        };
        // A sender is dropped only with the whole structure.
        receiver.await.unwrap_or(Err(Refusal::Stopped))
    }

    /// Waits until the own ring holds everything up to `sequence`; returns as well when nothing
    /// is acknowledged any more.
    pub async fn own_reached(&self, sequence: SequenceNumber) {
        loop {
            let mut moved = std::pin::pin!(self.own_moved.notified());
            moved.as_mut().enable();
            {
                let state = self.lock();
                if state.own >= sequence || state.refusal.is_some() {
                    return;
                }
            }
            moved.await;
        }
    }

    /// The own ring holds more.
    pub fn own_durable(&self, proof: &OwnDurable) {
        let mut state = self.lock();
        assert!(proof.0 >= state.own, "the own cursor may not step back");
        state.own = proof.0;
        state.answer();
        drop(state);
        self.own_moved.notify_waiters();
    }

    /// The hub holds more. It may say less after it was restarted: that takes nothing back.
    pub fn hub_durable(&self, proof: &HubDurable) {
        let mut state = self.lock();
        state.hub = state.hub.max(proof.0.sequence);
        state.answer();
    }

    /// Nothing is acknowledged any more; the first reason stays.
    pub fn refuse(&self, refusal: Refusal) {
        let mut state = self.lock();
        let refusal = state.refusal.get_or_insert(refusal).clone();
        for (_, waiter) in std::mem::take(&mut state.waiters) {
            // A client that has gone does not hear it.
            drop(waiter.send(Err(refusal.clone())));
        }
        drop(state);
        self.own_moved.notify_waiters();
    }

    /// Own and hub cursor, for status.
    pub fn cursors(&self) -> (SequenceNumber, SequenceNumber) {
        let state = self.lock();
        (state.own, state.hub)
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiters.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn done(&self) -> SequenceNumber {
        match self.gate {
            Gate::Both => self.own.min(self.hub),
            Gate::Own => self.own,
        }
    }

    fn answer(&mut self) {
        if self.refusal.is_some() {
            return;
        }
        let done = self.done();
        while let Some(first) = self.waiters.first_entry() {
            let sequence = first.key().0;
            if sequence > done {
                break;
            }
            drop(first.remove().send(Ok(Acknowledged { sequence })));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::hash::StreamHash;
    use crate::units::numbers::TransferId;

    fn hub(sequence: u64) -> HubDurable {
        HubDurable(Place {
            transfer: TransferId { generation: 1, counter: sequence },
            sequence: SequenceNumber(sequence),
            hash: StreamHash::ZERO,
        })
    }

    fn own(sequence: u64) -> OwnDurable {
        OwnDurable(SequenceNumber(sequence))
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().unwrap()
    }

    /// Neither end alone is enough, in either order, and nobody is answered too early.
    #[test]
    fn both_ends_are_needed() {
        runtime().block_on(async {
            let completion = Completion::default();
            let wait = |n| completion.wait(SequenceNumber(n));
            let mut first = std::pin::pin!(wait(1));
            let mut second = std::pin::pin!(wait(2));
            let mut waiting = async |own_upto: u64, hub_upto: u64| {
                completion.own_durable(&own(own_upto));
                completion.hub_durable(&hub(hub_upto));
                let mut poll = std::future::poll_fn(|cx| {
                    std::task::Poll::Ready(first.as_mut().poll(cx).is_pending())
                });
                std::pin::pin!(&mut poll).await
            };
            assert!(waiting(0, 0).await);
            assert!(waiting(5, 0).await, "the hub does not hold it");
            assert!(!waiting(5, 1).await);
            completion.hub_durable(&hub(0));
            assert_eq!(completion.cursors(), (SequenceNumber(5), SequenceNumber(1)));
            assert_eq!(completion.waiting(), 0, "the second was not polled yet");
            completion.hub_durable(&hub(2));
            assert_eq!(second.as_mut().await.unwrap().sequence(), SequenceNumber(2));
        });
    }

    #[test]
    fn the_own_end_is_needed_too() {
        runtime().block_on(async {
            let completion = Completion::default();
            completion.hub_durable(&hub(9));
            let waiter = completion.wait(SequenceNumber(3));
            let commit = async {
                assert_eq!(completion.waiting(), 1);
                completion.own_durable(&own(3));
            };
            let (answer, ()) = tokio::join!(waiter, commit);
            assert!(answer.is_ok());
        });
    }

    /// Without another end the own one is enough, and needed.
    #[test]
    fn where_there_is_no_hub_the_own_end_answers() {
        runtime().block_on(async {
            let completion = Completion::recovered(SequenceNumber(2));
            completion.set_gate(Gate::Own);
            assert!(completion.wait(SequenceNumber(2)).await.is_ok());
            completion.hub_durable(&hub(9));
            let waiter = completion.wait(SequenceNumber(3));
            let commit = async {
                assert_eq!(completion.waiting(), 1, "nobody else's word counts");
                completion.own_durable(&own(3));
            };
            let (answer, ()) = tokio::join!(waiter, commit);
            assert!(answer.is_ok());
        });
    }

    #[test]
    fn after_a_failure_nothing_is_acknowledged_and_the_first_reason_stays() {
        runtime().block_on(async {
            let completion = Completion::default();
            completion.own_durable(&own(5));
            let waiter = completion.wait(SequenceNumber(4));
            let fail = async {
                completion.refuse(Refusal::Failed("first".into()));
                completion.refuse(Refusal::Stopped);
                completion.hub_durable(&hub(5));
            };
            let (answer, ()) = tokio::join!(waiter, fail);
            assert_eq!(answer.unwrap_err(), Refusal::Failed("first".into()));
            // Also for what both ends do hold: a flush after a failed log write fails.
            let later = completion.wait(SequenceNumber(1)).await;
            assert_eq!(later.unwrap_err(), Refusal::Failed("first".into()));
        });
    }

    #[test]
    #[should_panic(expected = "step back")]
    fn the_own_cursor_does_not_step_back() {
        let completion = Completion::recovered(SequenceNumber(7));
        completion.own_durable(&own(6));
    }
}
