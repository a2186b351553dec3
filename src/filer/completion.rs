//! Answers to clients: the one place that builds the acknowledgement of a write (invariant 1).
//!
//! A write, a flush or a FUA waits here for its sequence number; [`Acknowledged`] is made only
//! when what the [`Gate`] asks for has happened: [`OwnDurable`] comes out of a group commit of
//! the own ring, [`HubDurable`] out of an action of the session. Neither can be made otherwise.
//! A write under `cache = "writeback"` is told [`Buffered`], which promises nothing.
//!
//! The limit of `semi-sync` needs no timer: time alone only closes that gate, and every answer
//! looks at the clock; what opens it is word of the hub, or another gate.
//!
//! The first failed log write is final (R17): every waiter, every later write, flush and FUA gets
//! its reason. A stop ends the waiters without an acknowledgement; what they wrote may survive.
//!
//! Invariant: both cursors only rise; waiters are answered in sequence order, so what is
//! answered is a prefix of what was written (invariant 6), whatever the gate. Cursors, gate and number of
//! waiters are told before the lock is let go of, for a status that does not take it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::nvlog::DurableToken;
use crate::record::marks::Place;
use crate::session::primary::Action;
use crate::units::convert::{to_u64, to_usize};
use crate::units::machine;
use crate::units::moment::{self, Changing, Moment, Shown};
use crate::units::numbers::{ByteCount, SequenceNumber};
use crate::units::policy::{LagLimit, Mode, Policy};

/// Why a request is not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The own log or pool failed: nothing is acknowledged any more.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The source is being stopped.
    #[error("the source is being stopped")]
    Stopped,
    /// Neither a CP nor anybody else makes room in the pool, and the configuration says that nobody
    /// waits for it.
    #[error("the pool is full")]
    NoSpace,
    /// Somebody else is primary (R12).
    #[error("this source was fenced: another end is primary since epoch {0}")]
    Fenced(u32),
}

/// Up to where writes are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gate {
    /// What both ends hold durably: `sync`, in session.
    #[default]
    Both,
    /// What the own end holds durably: alone, syncing under `continue`, `async`, `cp-only`.
    Own,
    /// What the own end holds durably, while the hub lacks no more than the limit; beyond it,
    /// what both hold: `semi-sync`.
    Lag(LagLimit),
    /// Nothing: the hub is lost under `stop`. The source may have been replaced (R12).
    Held,
}

impl Gate {
    /// What an answer asks for in session.
    pub const fn of(policy: &Policy) -> Self {
        match policy.mode {
            Mode::Sync => Self::Both,
            Mode::SemiSync => Self::Lag(policy.lag_limit),
            Mode::Async | Mode::CpOnly => Self::Own,
        }
    }
}

/// What the gate asks for has happened up to a sequence number. Made in this file only.
#[derive(Debug)]
#[must_use = "it is the answer to the client"]
pub struct Acknowledged {
    sequence: SequenceNumber,
}

/// A write is ordered and will be stored in that order, if nothing fails. No more is promised: a
/// flush is. Made in this file only.
#[derive(Debug)]
#[must_use = "it is the answer to the client"]
pub struct Buffered(());

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

type Answer = Result<Acknowledged, Refusal>;

/// Rows of transfers that the hub lacks.
const LACKING_MAX: usize = if cfg!(test) { 8 } else { 8192 };

/// One transfer or more that the hub lacks.
#[derive(Debug, Clone, Copy)]
struct Lacking {
    last: SequenceNumber,
    /// Bytes of all transfers up to and with this one, since the start.
    upto_bytes: u64,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    gate: Gate,
    own: SequenceNumber,
    hub: SequenceNumber,
    /// What the hub said last: less than `hub` if it has lost what it had acknowledged.
    hub_said: SequenceNumber,
    /// Transfers that the hub lacks, in order; at most [`LACKING_MAX`], since a source that is alone
    /// goes on: then two neighbours are taken for one, as old as the older.
    lacking: VecDeque<Lacking>,
    formed_bytes: u64,
    hub_bytes: u64,
    /// Highest sequence number answered.
    answered: SequenceNumber,
    /// Highest sequence number answered under [`Gate::Own`] (R4).
    answered_alone: SequenceNumber,
    waiters: BTreeMap<(SequenceNumber, u64), oneshot::Sender<Answer>>,
    next_waiter: u64,
    refusal: Option<Refusal>,
}

/// What is shown; all of one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// The own ring holds everything up to here.
    pub own: SequenceNumber,
    /// The hub holds everything up to here.
    pub hub: SequenceNumber,
    /// What an answer asks for.
    pub gate: Gate,
    /// Requests that wait.
    pub waiting: usize,
}

const FIGURES: usize = 6;

impl moment::Figures<FIGURES> for State {
    fn figures(&self) -> [u64; FIGURES] {
        let (gate, limit) = match self.gate {
            Gate::Both => (0, None),
            Gate::Own => (1, None),
            Gate::Held => (2, None),
            Gate::Lag(limit) => (3, Some(limit)),
        };
        let (bytes, time) = limit.map_or((0, Duration::ZERO), |limit| (limit.bytes.0, limit.time));
        // Limits in a file are hours at most.
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        [self.own.0, self.hub.0, to_u64(self.waiters.len()), gate, bytes, time]
    }
}

impl Figures {
    fn of([own, hub, waiting, gate, bytes, time]: [u64; FIGURES]) -> Self {
        let gate = match gate {
            0 => Gate::Both,
            1 => Gate::Own,
            2 => Gate::Held,
            _ => Gate::Lag(LagLimit { bytes: ByteCount(bytes), time: Duration::from_nanos(time) }),
        };
        let (own, hub) = (SequenceNumber(own), SequenceNumber(hub));
        Self { own, hub, gate, waiting: to_usize(waiting) }
    }
}

/// The monotonic clock; a test brings its own.
type Clock = Box<dyn Fn() -> Instant + Send + Sync>;

/// The waiters and the two cursors.
pub struct Completion {
    state: Shown<State, Moment<FIGURES>>,
    own_moved: Notify,
    /// The gate was set, or nothing is acknowledged any more.
    gate_moved: Notify,
    clock: Clock,
}

impl Default for Completion {
    fn default() -> Self {
        Self::recovered(SequenceNumber(0))
    }
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completion").field("figures", &self.figures()).finish_non_exhaustive()
    }
}

impl Completion {
    /// Resumes: the own ring holds everything up to `own`, that was recovered from it. The gate
    /// is [`Gate::Both`] until it is set.
    pub fn recovered(own: SequenceNumber) -> Self {
        Self::with_clock(own, Box::new(machine::now))
    }

    fn with_clock(own: SequenceNumber, clock: Clock) -> Self {
        let state = Shown::new(State { own, ..State::default() }, Moment::default());
        Self { state, own_moved: Notify::new(), gate_moved: Notify::new(), clock }
    }

    /// Sets what an answer asks for from now on. What was answered stays answered: behind
    /// [`Gate::Own`] the hub may lack it, up to [`Completion::answered_alone`].
    pub fn set_gate(&self, gate: Gate) {
        let now = (self.clock)();
        let mut state = self.lock();
        state.gate = gate;
        state.tell();
        state.answer(now);
        drop(state);
        self.gate_moved.notify_waiters();
    }

    /// What is shown; never waits.
    pub fn figures(&self) -> Figures {
        Figures::of(self.state.shown().read())
    }

    /// The highest sequence number ever answered. It stands still while the gate is [`Gate::Held`].
    pub fn answered(&self) -> SequenceNumber {
        self.lock().answered
    }

    /// The highest sequence number ever answered under [`Gate::Own`]: the mark of R4 stands until
    /// the hub is durable beyond it.
    pub fn answered_alone(&self) -> SequenceNumber {
        self.lock().answered_alone
    }

    /// What the hub lacks: bytes of transfers, and since when the oldest of them waits.
    pub fn lag(&self) -> (u64, Option<Instant>) {
        let state = self.lock();
        let since = state.lacking.front().map(|oldest| oldest.since);
        (state.formed_bytes - state.hub_bytes, since)
    }

    /// A transfer of that many bytes was formed; the hub lacks it from now on.
    pub fn formed(&self, last: SequenceNumber, bytes: u64) {
        let since = (self.clock)();
        let mut state = self.lock();
        state.formed_bytes += bytes;
        let upto_bytes = state.formed_bytes;
        if last > state.hub {
            state.lacking.push_back(Lacking { last, upto_bytes, since });
            state.merge_lacking();
        } else {
            state.hub_bytes = upto_bytes;
        }
    }

    /// A write was ordered and is in the buffers, under `cache = "writeback"`. Waits while the
    /// gate is [`Gate::Held`].
    pub async fn buffered(&self) -> Result<Buffered, Refusal> {
        self.not_held().await.map(|()| Buffered(()))
    }

    /// Waits until the gate is not [`Gate::Held`]: a source that may have been replaced answers
    /// neither writes nor reads.
    pub async fn not_held(&self) -> Result<(), Refusal> {
        loop {
            let mut moved = std::pin::pin!(self.gate_moved.notified());
            moved.as_mut().enable();
            {
                let state = self.lock();
                if let Some(refusal) = &state.refusal {
                    return Err(refusal.clone());
                }
                if state.gate != Gate::Held {
                    return Ok(());
                }
            }
            moved.await;
        }
    }

    /// Waits until the gate lets `sequence` be answered.
    pub async fn wait(&self, sequence: SequenceNumber) -> Answer {
        let receiver = {
            let now = (self.clock)();
            let mut state = self.lock();
            if let Some(refusal) = &state.refusal {
                return Err(refusal.clone());
            }
            if state.done(now).is_some_and(|done| done >= sequence) {
                return Ok(state.acknowledge(sequence));
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
        let now = (self.clock)();
        let mut state = self.lock();
        assert!(proof.0 >= state.own, "the own cursor may not step back");
        state.own = proof.0;
        // Who is answered and asks for the figures finds what it was answered for.
        state.tell();
        state.answer(now);
        drop(state);
        self.own_moved.notify_waiters();
    }

    /// The hub holds more. It may say less after it was restarted: that takes nothing back.
    pub fn hub_durable(&self, proof: &HubDurable) {
        let now = (self.clock)();
        let mut state = self.lock();
        state.hub_said = proof.0.sequence;
        state.hub = state.hub.max(proof.0.sequence);
        let hub = state.hub;
        while let Some(held) = state.lacking.pop_front_if(|oldest| oldest.last <= hub) {
            state.hub_bytes = held.upto_bytes;
        }
        state.tell();
        state.answer(now);
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
        self.gate_moved.notify_waiters();
    }

    /// Its lock, for a test.
    #[cfg(test)]
    pub(super) fn own_lock(&self) -> &dyn moment::Lock {
        &self.state
    }

    fn lock(&self) -> Changing<'_, State, Moment<FIGURES>> {
        self.state.lock()
    }
}

impl State {
    /// Up to where the gate lets writes be answered.
    fn done(&self, now: Instant) -> Option<SequenceNumber> {
        match self.gate {
            Gate::Both => Some(self.own.min(self.hub)),
            Gate::Own => Some(self.own),
            Gate::Lag(limit) => Some(self.own.min(self.within(limit, now))),
            Gate::Held => None,
        }
    }

    /// The last entry with which the hub lacks no more than the limit. An entry that is not in a
    /// transfer yet is not durable either, so it need not be counted.
    fn within(&self, limit: LagLimit, now: Instant) -> SequenceNumber {
        let late = |since| now.saturating_duration_since(since) > limit.time;
        // A hub that has lost something lacks more than is counted here, until it is back there.
        let lost = self.hub_said < self.hub;
        if lost || self.lacking.front().is_some_and(|oldest| late(oldest.since)) {
            return self.hub;
        }
        let room = self.hub_bytes.saturating_add(limit.bytes.0);
        let fits = self.lacking.partition_point(|held| held.upto_bytes <= room);
        fits.checked_sub(1).map_or(self.hub, |last| self.lacking[last].last)
    }

    /// Keeps the rows bounded. A row of two goes when the hub has both: nothing is taken for safe
    /// that is not.
    fn merge_lacking(&mut self) {
        if self.lacking.len() <= LACKING_MAX {
            return;
        }
        let mut rows = std::mem::take(&mut self.lacking).into_iter();
        while let Some(older) = rows.next() {
            let newer = rows.next().unwrap_or(older);
            self.lacking.push_back(Lacking { since: older.since, ..newer });
        }
    }

    fn acknowledge(&mut self, sequence: SequenceNumber) -> Acknowledged {
        self.answered = self.answered.max(sequence);
        if self.gate == Gate::Own {
            self.answered_alone = self.answered_alone.max(sequence);
        }
        Acknowledged { sequence }
    }

    fn answer(&mut self, now: Instant) {
        let Some(done) = self.done(now).filter(|_| self.refusal.is_none()) else { return };
        while let Some(first) = self.waiters.first_entry() {
            let sequence = first.key().0;
            if sequence > done {
                break;
            }
            let waiter = first.remove();
            drop(waiter.send(Ok(self.acknowledge(sequence))));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::units::hash::StreamHash;
    use crate::units::numbers::{ByteCount, TransferId};

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

    /// A source that is alone for long keeps no row of each transfer, and forgets neither how much
    /// the hub lacks nor since when.
    #[test]
    fn what_the_hub_lacks_is_kept_in_bounded_memory() {
        let completion = Completion::default();
        completion.set_gate(Gate::Own);
        let begin = Instant::now();
        for sequence in 1..=1000 {
            completion.formed(SequenceNumber(sequence), 10);
            assert!(completion.lock().lacking.len() <= LACKING_MAX);
        }
        let (bytes, since) = completion.lag();
        assert_eq!(bytes, 10_000);
        assert!(since.unwrap().duration_since(begin) < Duration::from_millis(500));
        for sequence in 1..=1000 {
            completion.hub_durable(&hub(sequence));
            assert!(completion.lag().0 >= 10_000 - 10 * sequence, "more is counted than it has");
        }
        assert_eq!(completion.lag(), (0, None));
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
            let met = completion.figures();
            assert_eq!((met.own, met.hub), (SequenceNumber(5), SequenceNumber(1)));
            assert_eq!(completion.figures().waiting, 0, "the second was not polled yet");
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
                assert_eq!(completion.figures().waiting, 1);
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

    /// A completion with a clock of the test's own: seconds since its start.
    fn clocked() -> (Completion, Arc<std::sync::atomic::AtomicU64>) {
        let seconds = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let (start, now) = (Instant::now(), Arc::clone(&seconds));
        let clock =
            move || start + Duration::from_secs(now.load(std::sync::atomic::Ordering::Relaxed));
        (Completion::with_clock(SequenceNumber(0), Box::new(clock)), seconds)
    }

    /// Whether a request for that sequence number would be answered now.
    fn answers(completion: &Completion, sequence: u64) -> bool {
        let now = (completion.clock)();
        completion.lock().done(now).is_some_and(|done| done >= SequenceNumber(sequence))
    }

    /// The highest of `1..=n` that is answered; checks that all below it are, and none above.
    fn prefix(completion: &Completion, n: u64) -> u64 {
        let answered: Vec<u64> = (1..=n).filter(|&one| answers(completion, one)).collect();
        let last = answered.last().copied().unwrap_or(0);
        assert_eq!(answered, (1..=last).collect::<Vec<u64>>(), "a prefix, and nothing else");
        last
    }

    const LIMIT: LagLimit = LagLimit { bytes: ByteCount(300), time: Duration::from_secs(5) };

    /// Five transfers of 100 bytes and two entries each, all durable here.
    fn five(completion: &Completion) {
        for transfer in 1..=5 {
            completion.formed(SequenceNumber(transfer * 2), 100);
        }
        completion.own_durable(&own(10));
    }

    /// Each gate answers exactly what it says, from the same two cursors: the negative control of
    /// every gate are the others.
    #[test]
    fn each_gate_answers_a_prefix_of_its_own() {
        let (completion, _) = clocked();
        five(&completion);
        completion.hub_durable(&hub(2));
        for (gate, wanted) in
            [(Gate::Both, 2), (Gate::Own, 10), (Gate::Lag(LIMIT), 8), (Gate::Held, 0)]
        {
            completion.set_gate(gate);
            assert_eq!(prefix(&completion, 12), wanted, "{gate:?}");
        }
    }

    /// Semi-sync: at most the limit's bytes ahead of the hub, and never ahead of the own ring.
    #[test]
    fn the_hub_lacks_no_more_bytes_than_the_limit() {
        let (completion, _) = clocked();
        completion.set_gate(Gate::Lag(LIMIT));
        assert!(!answers(&completion, 1), "not durable here");
        five(&completion);
        assert_eq!(completion.lag().0, 500);
        assert_eq!(prefix(&completion, 10), 6, "three transfers of 100 bytes");
        completion.hub_durable(&hub(2));
        assert_eq!(prefix(&completion, 10), 8);
        completion.hub_durable(&hub(4));
        assert_eq!(prefix(&completion, 11), 10, "never what is not durable here");
        assert_eq!(completion.lag().0, 300);
        // The hub acknowledges within a transfer: that transfer is not counted as there.
        completion.formed(SequenceNumber(12), 100);
        completion.own_durable(&own(12));
        completion.hub_durable(&hub(5));
        assert_eq!(prefix(&completion, 12), 10);
    }

    #[test]
    fn the_oldest_that_the_hub_lacks_is_no_older_than_the_limit() {
        let (completion, seconds) = clocked();
        let at = |second| seconds.store(second, std::sync::atomic::Ordering::Relaxed);
        completion.set_gate(Gate::Lag(LagLimit { bytes: ByteCount(u64::MAX), ..LIMIT }));
        five(&completion);
        assert_eq!(prefix(&completion, 10), 10);
        at(5);
        assert_eq!(prefix(&completion, 10), 10, "as old as the limit");
        at(6);
        assert_eq!(prefix(&completion, 10), 0);
        completion.hub_durable(&hub(4));
        assert_eq!(prefix(&completion, 10), 4, "the next is as old");
        completion.formed(SequenceNumber(11), 1);
        completion.own_durable(&own(11));
        completion.hub_durable(&hub(10));
        assert_eq!(prefix(&completion, 11), 11, "the one that is left is young");
        at(60);
        assert_eq!(prefix(&completion, 11), 10);
    }

    /// A hub that was set back lacks more than was counted: until it is there again nothing is
    /// answered ahead of it, and nothing that was answered is taken back.
    #[test]
    fn a_hub_that_lost_something_gives_no_room_ahead() {
        let (completion, _) = clocked();
        completion.set_gate(Gate::Lag(LIMIT));
        five(&completion);
        completion.hub_durable(&hub(6));
        assert_eq!(prefix(&completion, 10), 10);
        completion.hub_durable(&hub(2));
        assert_eq!(prefix(&completion, 10), 6);
        completion.hub_durable(&hub(6));
        assert_eq!(prefix(&completion, 10), 10);
    }

    #[test]
    fn what_was_answered_alone_is_remembered() {
        runtime().block_on(async {
            let completion = Completion::default();
            completion.own_durable(&own(9));
            completion.hub_durable(&hub(3));
            assert!(completion.wait(SequenceNumber(3)).await.is_ok());
            assert_eq!(completion.answered_alone(), SequenceNumber(0), "both had it");
            completion.set_gate(Gate::Own);
            assert!(completion.wait(SequenceNumber(7)).await.is_ok());
            assert!(completion.wait(SequenceNumber(4)).await.is_ok());
            completion.set_gate(Gate::Both);
            assert_eq!(completion.answered_alone(), SequenceNumber(7));
            let later = completion.wait(SequenceNumber(5));
            let catch_up = async {
                assert_eq!(completion.figures().waiting, 1, "new answers need both again");
                completion.hub_durable(&hub(8));
            };
            let (answer, ()) = tokio::join!(later, catch_up);
            assert!(answer.is_ok());
            assert_eq!(completion.answered_alone(), SequenceNumber(7));
        });
    }

    /// A waiter is answered by the change of the gate itself.
    #[test]
    fn a_gate_that_opens_answers_who_waits_and_a_held_one_nobody() {
        runtime().block_on(async {
            let completion = Completion::default();
            completion.own_durable(&own(5));
            completion.hub_durable(&hub(5));
            completion.set_gate(Gate::Held);
            let waiter = completion.wait(SequenceNumber(4));
            let (buffered, read) = (completion.buffered(), completion.not_held());
            let open = async {
                assert_eq!(completion.figures().waiting, 1, "although both ends hold it");
                completion.set_gate(Gate::Own);
            };
            let (answer, buffered, read, ()) = tokio::join!(waiter, buffered, read, open);
            assert!(answer.is_ok() && buffered.is_ok() && read.is_ok());
            completion.set_gate(Gate::Held);
            let (buffered, ()) = tokio::join!(completion.buffered(), async {
                completion.refuse(Refusal::Stopped);
            });
            assert_eq!(buffered.unwrap_err(), Refusal::Stopped);
        });
    }

    /// R17: nothing is even buffered after a failed log write, and every flush fails.
    #[test]
    fn a_buffered_write_is_refused_after_a_failure() {
        runtime().block_on(async {
            let completion = Completion::default();
            assert!(completion.buffered().await.is_ok());
            completion.refuse(Refusal::Failed("broken".into()));
            for gate in [Gate::Both, Gate::Own, Gate::Lag(LIMIT), Gate::Held] {
                completion.set_gate(gate);
                assert!(completion.buffered().await.is_err());
                assert!(completion.wait(SequenceNumber(0)).await.is_err(), "{gate:?}");
            }
        });
    }

    #[test]
    #[should_panic(expected = "step back")]
    fn the_own_cursor_does_not_step_back() {
        let completion = Completion::recovered(SequenceNumber(7));
        completion.own_durable(&own(6));
    }
}
