//! The source actor: the shell around the mirror's session machine, one for each source.
//!
//! It lives on one arbiter, and so do its connection's tasks. Its handlers never block: the ring,
//! the source log, the applier and the catalog are reached through queues, and come back through
//! the lane's bell or a message. It owns no state that a restart would lose: what counts is in the
//! lane and the catalog, and [`SourceActor::resume`] starts from there after a panic.

mod adopting;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actix::{Actor, ActorContext, AsyncContext, Context, Handler, Message as ActorMessage};
use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::adopting::Adopting;
pub use self::adopting::AskAdopt;
use super::applier::Job;
use super::lane::Lane;
use super::mending;
use super::shared::{RefillError, Shared, Told};
use super::stager::Staged;
use super::status::{Snapshot, roots_of};
use crate::limits::{
    ACTOR_MAILBOX_MESSAGES, LOG_BYTES_PER_TRANSFER_BYTE, PLACES_ASKED_MAX, RECORD_BYTES_MAX,
    TRANSFER_BYTES_MAX,
};
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::session::mirror::{Action, Arrived, Build, Event, Mirror, Outcome};
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::numbers::{CpNumber, Epoch, VolumeNumber};
use crate::units::policy;
use crate::wire::message::{
    Ack, CpEnd, Fenced, Frame, Going, Hello, Message, Refused, RefusedCode, Scan, Scanned,
    VolumeRefusal, VolumeRoot, WantPlace,
};
use crate::wire::pull::Pulled;

/// What the actor holds of its connection.
#[derive(Debug)]
pub struct Peer {
    /// Tells this connection's messages from an older one's.
    pub number: u64,
    /// Frames to send, in order.
    pub frames: mpsc::Sender<Frame>,
    /// The newest acknowledgement; a newer one replaces it.
    pub ack: Arc<ArcSwap<Option<Ack>>>,
    /// Rung when `ack` was set.
    pub ack_bell: Arc<tokio::sync::Notify>,
    /// Ends the connection's tasks.
    pub cancel: DropGuard,
    /// Closed when everything queued has been sent, or given up.
    pub ended: Option<oneshot::Receiver<()>>,
}

/// A connection that has said Hello.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Connected {
    /// What it said.
    pub hello: Hello,
    /// How to reach it.
    pub peer: Peer,
}

/// A frame of the connection with that number.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct FrameIn {
    /// The connection.
    pub number: u64,
    /// What came.
    pub content: Content,
}

/// What a frame held, checked as far as the connection can.
#[derive(Debug)]
pub enum Content {
    /// A transfer with right checksums.
    Transfer(Transfer),
    /// Updates of a CP.
    Updates { cp: CpNumber, volume: VolumeNumber, payload: Bytes },
    /// An answer to a comparison: children of nodes.
    Nodes(Pulled, Bytes),
    /// The same: blocks.
    Blocks(Pulled, Bytes),
    /// The answer to a question about a place.
    Place { token: u64, payload: Bytes },
    /// Anything else.
    Other(Message),
    /// Something else than a frame: the reason to close.
    Bad(String),
    /// The connection is gone.
    Gone(String),
}

/// The lane's bell rang.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Progress;

/// The catalog has recorded what the session asked for.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Recorded {
    /// For which connection.
    pub number: u64,
    /// The lane, or why it was not recorded.
    pub result: Result<Arc<Lane>, String>,
}

/// A refill was sent, or could not be.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct LogSent {
    /// To which connection.
    pub number: u64,
    /// Up to where.
    pub upto: Option<Place>,
}

/// The administrator asks for a checkpoint: answered when it is published.
#[derive(Debug, ActorMessage)]
#[rtype(result = "oneshot::Receiver<Result<(CpNumber, Vec<VolumeRoot>), String>>")]
pub struct WantCheckpoint;

/// The administrator asks the source to read a CP; `None` asks which CP is published.
#[derive(Debug, ActorMessage)]
#[rtype(result = "oneshot::Receiver<Result<Scanned, String>>")]
pub struct WantScan(pub CpNumber);

/// A place that could not be read is asked of the source.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct AskPlace(pub WantPlace);

/// Something was mended: the source is asked for a CP, with which it is written.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct AskRewrite;

/// The source's epoch was raised: it is told, its connection ends, a CP under way is given up.
/// Answered with the highest CP number that is known to be used.
#[derive(Debug, ActorMessage)]
#[rtype(result = "CpNumber")]
pub struct Fence(pub Epoch);

/// A step of a failover is done: what is known durably has changed.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Changed;

/// The hub stops: the source is told and let go. Says when its connection has ended, if there
/// is one.
#[derive(Debug, ActorMessage)]
#[rtype(result = "Option<oneshot::Receiver<()>>")]
pub struct Goodbye;

/// The source was given back with that CP and place: its lane goes on there, and so does the session
/// (R14). Both at once: nobody looks in between.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct HandedOver(pub CpNumber, pub Place);

/// The source's file has changed, is gone, or is there again.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct FileChanged;

/// The source is forgotten: the actor ends.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Forgotten;

/// A test asks for a panic in this actor's handler.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Panic;

type CheckpointReply = oneshot::Sender<Result<(CpNumber, Vec<VolumeRoot>), String>>;

/// One source's actor.
#[derive(Debug)]
pub struct SourceActor {
    shared: Arc<Shared>,
    name: SourceName,
    snapshot: Arc<ArcSwap<Snapshot>>,
    machine: Option<Mirror>,
    lane: Option<Arc<Lane>>,
    peer: Option<Peer>,
    /// Updates that came before their CP could be started.
    early: VecDeque<(VolumeNumber, Bytes)>,
    job: Option<Arc<Job>>,
    /// Content of the event being handled, for Stage and Feed.
    current: Option<Content>,
    asked: BTreeMap<u64, CheckpointReply>,
    waiting: Vec<(CpNumber, CheckpointReply)>,
    scans: BTreeMap<u64, oneshot::Sender<Result<Scanned, String>>>,
    adopting: Adopting,
    /// One place: this end reads its image for the source.
    scanning: Arc<Semaphore>,
    /// Blocks and nodes that are read for the source.
    serving_places: Arc<Semaphore>,
    next_token: u64,
    last_frame: Option<Instant>,
    /// When the image was last equal to the source.
    equal_at: Option<Instant>,
    refused: Option<Refused>,
    refill_from: Option<Place>,
    _alive: Alive,
}

/// Tells the supervisor when the actor is gone: in a panic nothing else would.
#[derive(Debug)]
struct Alive {
    name: SourceName,
    died: mpsc::Sender<SourceName>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        // Full or closed only when the hub ends: nobody is left to replace it then.
        if self.died.try_send(self.name.clone()).is_err() {
            tracing::debug!(source = %self.name, "actor ended with the hub");
        }
    }
}

impl SourceActor {
    /// An actor for the source of that name; takes up whatever an earlier one left.
    pub fn resume(
        shared: Arc<Shared>,
        name: SourceName,
        snapshot: Arc<ArcSwap<Snapshot>>,
        died: mpsc::Sender<SourceName>,
    ) -> Self {
        let lane = shared.lanes.get(&name);
        let mourned = name.clone();
        Self {
            shared,
            name,
            snapshot,
            machine: None,
            lane,
            peer: None,
            early: VecDeque::new(),
            job: None,
            current: None,
            asked: BTreeMap::new(),
            waiting: Vec::new(),
            scans: BTreeMap::new(),
            adopting: Adopting::default(),
            scanning: Arc::new(Semaphore::new(1)),
            serving_places: Arc::new(Semaphore::new(PLACES_ASKED_MAX)),
            next_token: 1,
            last_frame: None,
            equal_at: None,
            refused: None,
            refill_from: None,
            _alive: Alive { name: mourned, died },
        }
    }

    /// The machine, once everything an earlier actor had under way has come to rest.
    fn machine(&mut self) -> Result<&mut Mirror, String> {
        if self.machine.is_none() {
            let mut last = Place::default();
            let mut fault = None;
            if let Some(lane) = &self.lane {
                if let Some(job) = lane.job() {
                    job.abort();
                    return Err("a CP is being given up".to_owned());
                }
                // An outcome of a job that the earlier actor began is in the catalog already.
                drop(lane.outcome());
                let cursors = lane.cursors();
                let rest = cursors.durable == cursors.staged && cursors.drained == cursors.durable;
                if !rest && cursors.fault.is_none() {
                    return Err("entries are still being stored".to_owned());
                }
                last = cursors.drained;
                fault = cursors.fault;
            }
            let known = self.shared.known(&self.name)?;
            let source = known.source;
            // How much may be under way is computed once the source is recorded.
            let mut machine = Mirror::new(known, last, 0, self.shared.grant().1);
            if let Some(source) = source {
                machine.holds(&self.shared.store.cps(source));
            }
            if let Some(fault) = fault {
                machine.step(Event::Faulted(fault.to_string()));
            }
            self.machine = Some(machine);
        }
        self.machine.as_mut().ok_or_else(|| "no session machine".to_owned())
    }

    fn step(&mut self, event: Event, context: &mut Context<Self>) {
        let actions = match self.machine() {
            Ok(machine) => machine.step(event),
            Err(reason) => {
                self.refuse(busy(reason));
                return;
            }
        };
        for action in actions {
            self.act(action, context);
        }
        self.publish();
    }

    fn act(&mut self, action: Action, context: &mut Context<Self>) {
        match action {
            Action::Send(Message::Ack(ack)) => self.acknowledge(ack),
            Action::Send(message) => self.send(&message),
            Action::Record { source, generation, epoch, volumes, policy, alone } => {
                let (promise, known) = ((policy, alone), self.machine.as_ref().map(Mirror::known));
                let left_out = known.map(|known| known.left_out.clone()).unwrap_or_default();
                let told = Told { source, generation, epoch, volumes, promise, left_out };
                self.record(told, context);
            }
            Action::Stage => self.stage(),
            Action::Apply { cp, last, build } => self.apply(cp, last, build),
            Action::Feed => self.feed(),
            Action::Finish(end) => self.finish(end),
            Action::Abort => {
                self.early.clear();
                if let Some(job) = self.job.take() {
                    job.abort();
                }
            }
            Action::DropLogs(cp) => {
                if let Some(lane) = &self.lane {
                    self.shared.drain.drop_logs(lane.clone(), cp);
                }
            }
            Action::SendLog { from } => {
                self.refill_from = Some(from);
                self.send_log(context);
            }
            Action::Joined => self.joined(),
            Action::Scan { cp, token } => self.scan(cp, token),
            Action::Scanned(scanned) => {
                if let Some(reply) = self.scans.remove(&scanned.token) {
                    drop(reply.send(Ok(scanned)));
                }
            }
            Action::CheckpointAt { token, cp } => {
                if let Some(reply) = self.asked.remove(&token) {
                    self.waiting.push((cp, reply));
                    self.answer_checkpoints();
                }
            }
            Action::Refuse(refused) => self.refuse(refused),
            Action::Close { reason } => self.close(reason),
        }
    }

    fn joined(&mut self) {
        self.refused = None;
        // What an older connection's CP had taken is not this one's.
        if let Some(lane) = &self.lane {
            lane.updates_taken();
            lane.welcomed();
        }
        tracing::info!(source = %self.name, "source is in session");
        let refused = self.machine.as_ref().map(|machine| &machine.known().refused);
        for VolumeRefusal { name, reason, next_step, .. } in refused.into_iter().flatten() {
            let source = &self.name;
            tracing::error!(%source, volume = %name, reason, next_step, "volume refused");
        }
    }

    fn finish(&mut self, end: CpEnd) {
        // What compares is told more.
        let done = self.job.take();
        self.job = done.clone().filter(|job| job.compares());
        if let Some(job) = done {
            job.finish(end);
        }
    }

    fn close(&mut self, reason: String) {
        let planned = matches!(&self.current, Some(Content::Other(Message::Going(_))));
        if planned {
            tracing::info!(source = %self.name, reason, "source goes");
            self.hang_up();
        } else {
            self.refuse(broken(reason));
        }
    }

    /// Has the catalog keep what a Hello brought; the answer comes as [`Recorded`].
    fn record(&self, told: Told, context: &mut Context<Self>) {
        let (shared, name) = (self.shared.clone(), self.name.clone());
        let number = self.peer.as_ref().map_or(0, |peer| peer.number);
        let cp_max = self.machine.as_ref().map_or(CpNumber(0), |machine| machine.known().cp_max);
        let address = context.address();
        actix::spawn(async move {
            let result = machine::blocking(move || shared.record(&name, cp_max, &told))
                .await
                .unwrap_or_else(|error| Err(error.to_string()));
            if address.send(Recorded { number, result }).await.is_err() {
                tracing::debug!("recorded for an actor that is gone");
            }
        });
    }

    fn acknowledge(&self, ack: Ack) {
        if let Some(peer) = &self.peer {
            peer.ack.store(Arc::new(Some(ack)));
            peer.ack_bell.notify_one();
        }
    }

    fn send(&mut self, message: &Message) {
        let Some(peer) = &self.peer else { return };
        if peer.frames.try_send(Frame::new(message, Bytes::new())).is_err() {
            tracing::warn!(source = %self.name, "source does not take its answers, closing");
            self.hang_up();
        }
    }

    fn refuse(&mut self, refused: Refused) {
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

    /// Refuses a new connection; the one in session stays. Its tasks end when `peer` is dropped,
    /// and deliver the reason first.
    fn turn_away(&mut self, peer: &Peer, refused: Refused) {
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

    fn hang_up(&mut self) {
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

    fn stage(&mut self) {
        let Some(Content::Transfer(transfer)) = self.current.take() else {
            panic!("the machine stages a transfer that did not come");
        };
        let (Some(lane), Some(machine)) = (&self.lane, &self.machine) else {
            panic!("a transfer is staged without a lane");
        };
        let bytes = transfer.data_bytes();
        lane.ladder.received_bytes.fetch_add(bytes, Ordering::Relaxed);
        lane.ladder.transfers.fetch_add(1, Ordering::Relaxed);
        let staged = Staged { lane: lane.clone(), epoch: machine.known().epoch, transfer };
        self.shared.stager.stage(staged);
    }

    fn apply(&mut self, cp: CpNumber, last: Place, build: Build) {
        let (Some(lane), Some(machine)) = (&self.lane, &self.machine) else { return };
        let frames = self.peer.as_ref().map(|peer| peer.frames.clone());
        let job = Job::new(lane.clone(), (cp, last), machine, build, frames);
        for (volume, payload) in self.early.drain(..) {
            job.feed(volume, payload);
        }
        let queue = if build.is_pass() { &self.shared.passes } else { &self.shared.jobs };
        queue.push(job.clone());
        self.job = Some(job);
    }

    fn feed(&mut self) {
        let asked = match (self.current.take(), &self.job) {
            (Some(Content::Updates { volume, payload, .. }), Some(job)) => {
                job.feed(volume, payload);
                true
            }
            (Some(Content::Updates { volume, payload, .. }), None) => {
                self.early.push_back((volume, payload));
                true
            }
            (Some(Content::Nodes(answer, payload)), Some(job)) => job.nodes(answer, payload),
            (Some(Content::Blocks(answer, payload)), Some(job)) => job.blocks(answer, payload),
            // Its comparison has not begun: nothing was asked.
            (Some(Content::Nodes(..) | Content::Blocks(..)), None) => false,
            _ => panic!("the machine feeds what did not come"),
        };
        if !asked {
            self.refuse(broken("an answer that was not asked for, or is too long".to_owned()));
        }
    }

    /// Starts the refill once everything durable lies in the log, from which it is read.
    fn send_log(&mut self, context: &mut Context<Self>) {
        let (Some(lane), Some(peer)) = (&self.lane, &self.peer) else { return };
        let cursors = lane.cursors();
        let Some(from) = self.refill_from.take_if(|_| cursors.drained == cursors.durable) else {
            return;
        };
        let (shared, source, number) = (self.shared.clone(), lane.source(), peer.number);
        let (applied, upto) = (cursors.applied, cursors.durable);
        let (frames, address) = (peer.frames.clone(), context.address());
        let lane = lane.clone();
        actix::spawn(async move {
            let runtime = Handle::current();
            let sent = machine::blocking(move || {
                shared.refill(source, applied, from, upto, |transfer| {
                    let frame = Frame::new(&Message::Refill, transfer.bytes().clone());
                    machine::block_on(&runtime, frames.send(frame)).is_ok()
                })
            })
            .await;
            let upto = match sent {
                Ok(Ok(upto)) => upto,
                Ok(Err(RefillError::Gone)) => {
                    tracing::info!(source = %lane.name(), "source went away during its refill");
                    return;
                }
                // To say that the source is on another line would stop it for good.
                Ok(Err(RefillError::Log(error))) => {
                    lane.fault(&format!("the log could not be read for a refill: {error}"));
                    return;
                }
                Err(error) => {
                    lane.fault(&format!("the refill failed: {error}"));
                    return;
                }
            };
            if address.send(LogSent { number, upto }).await.is_err() {
                tracing::debug!("log sent for an actor that is gone");
            }
        });
    }

    /// Reads every block of the image of `cp` and tells the source the roots. One reading of an
    /// image at a time, however many are asked for and on however many connections.
    fn scan(&mut self, cp: CpNumber, token: u64) {
        let Some(peer) = &self.peer else { return };
        let (frames, shared, name) = (peer.frames.clone(), self.shared.clone(), self.name.clone());
        let Ok(place) = self.scanning.clone().try_acquire_owned() else {
            let problems = vec!["this image is being read already".to_owned()];
            self.send(&Message::Scanned(Scanned { cp, token, volumes: vec![], problems }));
            return;
        };
        actix::spawn(async move {
            let scanned = machine::blocking(move || shared.scan(&name, cp, |_, _, _| {})).await;
            let scanned = match scanned {
                Ok(Ok((volumes, problems))) => Scanned { cp, token, volumes, problems },
                Ok(Err(problem)) => Scanned { cp, token, volumes: vec![], problems: vec![problem] },
                Err(error) => {
                    let problems = vec![format!("reading failed: {error}")];
                    Scanned { cp, token, volumes: vec![], problems }
                }
            };
            drop(place);
            let frame = Frame::new(&Message::Scanned(scanned.bounded()), Bytes::new());
            drop(frames.send(frame).await);
        });
    }

    fn is_streaming(&self) -> bool {
        self.machine.as_ref().is_some_and(Mirror::is_streaming)
    }

    /// Tells the source what an image has in a place. A few at a time: no source of ours asks for
    /// more, and one that does waits for an answer that does not come.
    fn serve_place(&self, want: WantPlace) {
        let (Some(peer), Some(lane)) = (&self.peer, &self.lane) else { return };
        let Ok(turn) = self.serving_places.clone().try_acquire_owned() else { return };
        let (frames, shared, lane) = (peer.frames.clone(), self.shared.clone(), lane.clone());
        actix::spawn(async move {
            let read = machine::blocking(move || mending::serve(&shared, &lane, &want)).await;
            drop(turn);
            match read {
                Ok(frame) => drop(frames.send(frame).await),
                Err(error) => tracing::warn!(%error, "a place was not read"),
            }
        });
    }

    fn progressed(&mut self, context: &mut Context<Self>) {
        let Some(lane) = self.lane.clone() else { return };
        if self.machine.is_none() {
            return;
        }
        // First: a Welcome that follows from the rest names what may be under way now.
        self.step(Event::Credit(self.credit(&lane)), context);
        let taken = lane.updates_taken();
        let (cursors, outcome) = lane.progress();
        if taken > 0 {
            self.step(Event::UpdatesTaken(taken), context);
        }
        // First: after a pass the cursors stand on the line behind it.
        if let Some((cp, outcome)) = outcome {
            self.job = None;
            let work = self.shared.has_work(lane.source());
            if let Some(machine) = &mut self.machine {
                machine.works(work);
            }
            let full = outcome == Outcome::NoSpace;
            self.step(Event::Applied { cp, outcome }, context);
            if full {
                self.fail_checkpoints();
            }
        }
        let durable = if machine::breaks(7) { cursors.staged } else { cursors.durable };
        self.step(Event::Durable(durable), context);
        self.step(Event::Drained(cursors.drained), context);
        self.step(Event::Filed(cursors.synced), context);
        if let Some(fault) = &cursors.fault {
            self.step(Event::Faulted(fault.to_string()), context);
        }
        self.send_log(context);
        self.answer_checkpoints();
    }

    /// What the source may have under way: its share of the ring or half of what is free, its
    /// log's room, whichever is less (section 8).
    fn credit(&self, lane: &Arc<Lane>) -> u64 {
        let used = lane.cursors().ring_bytes;
        let free = self.shared.stager.ring().map_or(0, |ring| ring.room());
        let share = self.shared.share_bytes(&self.name).saturating_sub(used);
        let log = self.shared.log_room(&self.name, lane.source());
        let log = log.saturating_sub(lane.cursors().undrained_bytes);
        // Many small transfers fill a log faster than their bytes say.
        let log = log / LOG_BYTES_PER_TRANSFER_BYTE;
        let most = self.shared.grant().0;
        let credit = share.max(free / 2).min(log).min(most);
        if credit < RECORD_BYTES_MAX {
            // What is less than a transfer would end in a full log. Others may have the room.
            self.shared.drain.wants_room(lane.clone());
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

    /// Whether the source may come: also its id must not be known under another name.
    fn accepts(&mut self, hello: &Hello) -> Result<(), Refused> {
        match self.shared.other_name(hello.source, &self.name) {
            Ok(None) => {}
            Ok(Some(other)) => {
                return Err(Refused {
                    code: RefusedCode::OtherSource,
                    reason: format!("source {} is known here as {other}", hello.source),
                    next_step: format!("give the source its name {other} back"),
                });
            }
            Err(reason) => return Err(busy(reason)),
        }
        self.machine().map_err(busy)?.accepts(hello)
    }

    /// What is acknowledged as received still waits for the ring: it counts as under way, so that
    /// memory stays bounded by what was given out. No less than a transfer is given out then.
    fn unsynced_bytes(&self, lane: &Lane) -> u64 {
        if self.ack() != Some(policy::Ack::Received) {
            return 0;
        }
        lane.cursors().under_way_bytes
    }

    /// What the source asks for before a transfer is acknowledged.
    fn ack(&self) -> Option<policy::Ack> {
        let known = self.machine.as_ref()?.known();
        known.policy.map(|policy| policy.ack)
    }

    /// Before a transfer is acknowledged as received, the credit that goes with it counts it in.
    fn credit_before(&mut self, transfer_bytes: u64, context: &mut Context<Self>) {
        if self.ack() != Some(policy::Ack::Received) {
            return;
        }
        if let Some(lane) = self.lane.clone() {
            let left = self.credit(&lane).saturating_sub(transfer_bytes);
            let credit = if left < TRANSFER_BYTES_MAX { 0 } else { left };
            self.step(Event::Credit(credit), context);
        }
    }

    fn answer_checkpoints(&mut self) {
        let Some(machine) = &self.machine else { return };
        let known = machine.known();
        for (cp, reply) in std::mem::take(&mut self.waiting) {
            if cp <= known.applied_cp {
                drop(reply.send(Ok((known.applied_cp, roots_of(known)))));
            } else {
                self.waiting.push((cp, reply));
            }
        }
    }

    /// There is no room for the CP that they wait for (R18, R20).
    fn fail_checkpoints(&mut self) {
        for (cp, reply) in std::mem::take(&mut self.waiting) {
            let reason = format!("CP {cp} is not published, the hub's pool is full");
            drop(reply.send(Err(reason)));
        }
    }

    fn publish(&mut self) {
        let Some(machine) = &self.machine else { return };
        let mut snapshot = Snapshot::of(
            &self.name,
            machine,
            self.lane.as_ref(),
            self.peer.is_some(),
            self.refused.as_ref(),
            self.last_frame,
            self.shared.failovers.view(&self.name).as_ref(),
        );
        self.equal_at = snapshot.equals_at().or(self.equal_at);
        snapshot.equal_at = self.equal_at;
        self.snapshot.store(Arc::new(snapshot));
    }

    fn is_current(&self, number: u64) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.number == number)
    }
}

const AWAY: &str = "the source is not connected";

/// The peer broke the protocol.
fn broken(reason: String) -> Refused {
    let next_step = "both ends must run a supported mirrorhub".to_owned();
    Refused { code: RefusedCode::Protocol, reason, next_step }
}

fn busy(reason: String) -> Refused {
    Refused { code: RefusedCode::Busy, reason, next_step: "wait, the source tries again".into() }
}

impl Actor for SourceActor {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(ACTOR_MAILBOX_MESSAGES);
        if let Some(lane) = self.lane.clone() {
            listen(&lane, context);
        }
        if self.machine().is_ok() {
            self.publish();
        }
    }
}

/// Carries the lane's bell into the mailbox until the actor is gone.
fn listen(lane: &Arc<Lane>, context: &mut Context<SourceActor>) {
    let (lane, address) = (lane.clone(), context.address());
    actix::spawn(async move {
        loop {
            lane.changed.notified().await;
            if address.send(Progress).await.is_err() {
                // The next actor of this source must not miss what this one was told.
                lane.changed.notify_one();
                return;
            }
        }
    });
}

impl Handler<Connected> for SourceActor {
    type Result = ();

    fn handle(&mut self, message: Connected, context: &mut Self::Context) {
        // A stranger or a clone must not cut the connection that is in session.
        let accepted = self.accepts(&message.hello);
        if let Err(refused) = accepted {
            self.turn_away(&message.peer, refused);
            return;
        }
        self.hang_up();
        let (_, cp_credit) = self.shared.grant();
        if let Some(machine) = &mut self.machine {
            machine.grant(cp_credit);
        }
        self.last_frame = Some(machine::now());
        self.peer = Some(message.peer);
        self.step(Event::Hello(message.hello), context);
    }
}

impl Handler<FrameIn> for SourceActor {
    type Result = ();

    fn handle(&mut self, message: FrameIn, context: &mut Self::Context) {
        if !self.is_current(message.number) {
            return;
        }
        self.last_frame = Some(machine::now());
        if let (Content::Transfer(transfer), Some(lane)) = (&message.content, &self.lane)
            && !lane.within_credit(to_u64(transfer.bytes().len()))
        {
            let reason = format!("transfer {} is over the credit", transfer.id());
            self.refuse(broken(reason));
            self.publish();
            return;
        }
        let event = match &message.content {
            Content::Place { token, payload } => {
                if let Some(lane) = &self.lane {
                    lane.questions.answer(*token, payload.clone());
                }
                return;
            }
            Content::Other(Message::WantPlace(want)) if self.is_streaming() => {
                self.serve_place(*want);
                return;
            }
            Content::Transfer(transfer) => {
                Event::Transfer(Arrived { header: *transfer.header(), place: transfer.place() })
            }
            Content::Updates { cp, payload, .. } => {
                Event::Updates { cp: *cp, bytes: to_u64(payload.len()) }
            }
            Content::Nodes(answer, _) | Content::Blocks(answer, _) => {
                Event::Pulled { cp: answer.cp }
            }
            Content::Other(Message::Adopted(adopted)) => {
                self.adopting.answered(adopted.clone());
                return;
            }
            Content::Other(other) => Event::Received(other.clone()),
            Content::Bad(reason) => {
                self.refuse(broken(reason.clone()));
                self.publish();
                return;
            }
            Content::Gone(reason) => {
                tracing::info!(source = %self.name, reason, "source disconnected");
                self.hang_up();
                self.publish();
                return;
            }
        };
        if let Content::Transfer(transfer) = &message.content {
            self.credit_before(to_u64(transfer.bytes().len()), context);
        }
        self.current = Some(message.content);
        self.step(event, context);
        self.current = None;
    }
}

impl Handler<Progress> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: Progress, context: &mut Self::Context) {
        self.progressed(context);
    }
}

impl Handler<Recorded> for SourceActor {
    type Result = ();

    fn handle(&mut self, message: Recorded, context: &mut Self::Context) {
        if !self.is_current(message.number) {
            return;
        }
        match message.result {
            Ok(lane) => {
                let credit = self.credit(&lane);
                if self.lane.is_none() {
                    listen(&lane, context);
                    self.lane = Some(lane.clone());
                }
                let files = self.ack() == Some(policy::Ack::Filed);
                lane.set_files(files);
                if files {
                    // What was drained before nobody waited for it.
                    self.shared.drain.file();
                }
                self.step(Event::Credit(credit), context);
                self.step(Event::Recorded, context);
                self.progressed(context);
            }
            Err(reason) => self.refuse(busy(reason)),
        }
    }
}

impl Handler<LogSent> for SourceActor {
    type Result = ();

    fn handle(&mut self, message: LogSent, context: &mut Self::Context) {
        if self.is_current(message.number) {
            self.step(Event::LogSent(message.upto), context);
        }
    }
}

impl Handler<WantCheckpoint> for SourceActor {
    type Result = actix::MessageResult<WantCheckpoint>;

    fn handle(&mut self, _: WantCheckpoint, context: &mut Self::Context) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        let streams = self.machine.as_ref().is_some_and(Mirror::is_streaming);
        if streams {
            let token = self.next_token;
            self.next_token += 1;
            self.asked.insert(token, reply);
            self.step(Event::WantCheckpoint(token), context);
        } else {
            let joined = self.machine.as_ref().is_some_and(Mirror::is_joined);
            let reason = if joined { "the source is being sent its log" } else { AWAY };
            drop(reply.send(Err(reason.to_owned())));
        }
        actix::MessageResult(answer)
    }
}

impl Handler<WantScan> for SourceActor {
    type Result = actix::MessageResult<WantScan>;

    fn handle(&mut self, message: WantScan, _: &mut Self::Context) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        if self.machine.as_ref().is_some_and(Mirror::is_joined) {
            let token = self.next_token;
            self.next_token += 1;
            self.scans.insert(token, reply);
            self.send(&Message::Scan(Scan { cp: message.0, token }));
        } else {
            drop(reply.send(Err(AWAY.to_owned())));
        }
        actix::MessageResult(answer)
    }
}

impl Handler<Fence> for SourceActor {
    type Result = actix::MessageResult<Fence>;

    fn handle(&mut self, Fence(epoch): Fence, _: &mut Self::Context) -> Self::Result {
        if self.peer.is_some() {
            self.send(&Message::Fenced(Fenced { epoch, hub: Some(self.shared.hub) }));
            let reason = format!("failed over: epoch {} is in force", epoch.number);
            let next = "see `mirrorhub status` on the hub";
            let code = RefusedCode::Fenced;
            self.refuse(Refused { code, reason, next_step: next.to_owned() });
        }
        // What the catalog says by now is read with the next event.
        let machine = self.machine.take();
        actix::MessageResult(machine.map_or(CpNumber(0), |machine| machine.known().cp_max))
    }
}

impl Handler<Changed> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: Changed, _: &mut Self::Context) {
        self.machine = None;
        if let Err(reason) = self.machine() {
            tracing::debug!(source = %self.name, reason, "not at rest yet");
        }
        self.publish();
    }
}

impl Handler<AskPlace> for SourceActor {
    type Result = ();

    fn handle(&mut self, AskPlace(want): AskPlace, _: &mut Self::Context) {
        if self.is_streaming() {
            self.send(&Message::WantPlace(want));
        } else if let Some(lane) = &self.lane {
            lane.questions.give_up();
        }
    }
}

impl Handler<AskRewrite> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: AskRewrite, _: &mut Self::Context) {
        if self.is_streaming() {
            self.send(&Message::WantRewrite);
        }
    }
}

impl Handler<Goodbye> for SourceActor {
    type Result = actix::MessageResult<Goodbye>;

    fn handle(&mut self, _: Goodbye, _: &mut Self::Context) -> Self::Result {
        let reason = "the hub is being stopped".to_owned();
        self.send(&Message::Going(Going { reason }));
        let ended = self.peer.as_mut().and_then(|peer| peer.ended.take());
        self.hang_up();
        self.publish();
        actix::MessageResult(ended)
    }
}

impl Handler<HandedOver> for SourceActor {
    type Result = ();

    fn handle(&mut self, HandedOver(cp, place): HandedOver, _: &mut Self::Context) {
        self.machine = None;
        if let Some(lane) = &self.lane {
            lane.hand_over(cp, place);
        }
        if let Err(reason) = self.machine() {
            tracing::debug!(source = %self.name, reason, "not at rest yet");
        }
        self.publish();
    }
}

impl Handler<FileChanged> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: FileChanged, _: &mut Self::Context) {
        let settings = self.shared.settings.load_full();
        match settings.get(&self.name) {
            None if self.peer.is_some() => {
                let reason =
                    format!("source {} is retired: its file on the hub is gone", self.name);
                let next_step = "put its file back into the hub's sources directory".to_owned();
                self.refuse(Refused { code: RefusedCode::UnknownSource, reason, next_step });
            }
            None => {}
            Some(setting) => {
                self.refused.take_if(|refused| refused.code == RefusedCode::UnknownSource);
                let pins = setting.volumes.iter().map(|(name, size)| (name.to_string(), size.0));
                if let Some(machine) = &mut self.machine {
                    machine.pin(pins.collect());
                }
            }
        }
        self.publish();
    }
}

impl Handler<Forgotten> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: Forgotten, context: &mut Self::Context) {
        self.hang_up();
        context.stop();
    }
}

impl Handler<Panic> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: Panic, _: &mut Self::Context) {
        panic!("asked for by a test");
    }
}

/// How long a connection may be silent: a source sends a heartbeat each second.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);

/// The ends of a peer that its connection's tasks keep.
#[derive(Debug)]
pub struct PeerEnds {
    /// Frames the actor sends.
    pub frames: mpsc::Receiver<Frame>,
    /// The newest acknowledgement.
    pub ack: Arc<ArcSwap<Option<Ack>>>,
    /// Rung when it was set.
    pub bell: Arc<tokio::sync::Notify>,
    /// Cancelled when the actor lets go.
    pub cancel: CancellationToken,
    /// Dropped when the writing task ends.
    pub ended: oneshot::Sender<()>,
}

/// A peer for the actor and the ends for its connection.
pub fn peer(number: u64, frames_max: usize) -> (Peer, PeerEnds) {
    let (sender, frames) = mpsc::channel(frames_max);
    let ack = Arc::new(ArcSwap::from_pointee(None));
    let bell = Arc::new(tokio::sync::Notify::new());
    let cancel = CancellationToken::new();
    let (alive, ended) = oneshot::channel();
    let peer = Peer {
        number,
        frames: sender,
        ack: ack.clone(),
        ack_bell: bell.clone(),
        cancel: cancel.clone().drop_guard(),
        ended: Some(ended),
    };
    (peer, PeerEnds { frames, ack, bell, cancel, ended: alive })
}
