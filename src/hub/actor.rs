//! The source actor: the shell around the mirror's session machine, one for each source.
//!
//! It lives on one arbiter, and so do its connection's tasks. Its handlers never block: the ring,
//! the source log, the applier and the catalog are reached through queues, and come back through
//! the lane's bell or a message. It owns no state that a restart would lose: what counts is in the
//! lane and the catalog, and [`SourceActor::resume`] starts from there after a panic.

mod adopting;
mod asked;
mod credit;
mod messages;
mod peer;
mod work;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use actix::{Actor, AsyncContext, Context, Handler};
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot};

use self::adopting::Adopting;
pub use self::adopting::AskAdopt;
pub use self::messages::{
    AskPlace, AskRewrite, Changed, Connected, Content, Fence, FileChanged, Forgotten, FrameIn,
    Goodbye, HandedOver, LogSent, Panic, Progress, Recorded, WantCheckpoint, WantScan,
};
pub use self::peer::{Peer, PeerEnds, SILENCE_MAX, peer};
use self::peer::{broken, busy};
use super::applier::Job;
use super::lane::Lane;
use super::shared::{Shared, Told};
use super::status::{Snapshot, roots_of};
use crate::limits::{ACTOR_MAILBOX_MESSAGES, PLACES_ASKED_MAX};
use crate::record::marks::Place;
use crate::session::mirror::{Action, Arrived, Event, Mirror, Outcome};
use crate::units::convert::to_u64;
use crate::units::latest::Latest;
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::numbers::{CpNumber, SequenceNumber, VolumeNumber};
use crate::units::policy;
use crate::wire::message::{
    Behind, BehindState, CpEnd, Hello, Message, Refused, RefusedCode, Scanned, VolumeRefusal,
    VolumeRoot,
};

type CheckpointReply = oneshot::Sender<Result<(CpNumber, Vec<VolumeRoot>), String>>;

/// One source's actor.
#[derive(Debug)]
pub struct SourceActor {
    shared: Arc<Shared>,
    name: SourceName,
    snapshot: Arc<Latest<Snapshot>>,
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
    /// The last write that the source held when it came.
    held: SequenceNumber,
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
        snapshot: Arc<Latest<Snapshot>>,
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
            held: SequenceNumber(0),
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
                drop(lane.aside().end());
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
                machine.holds(&self.shared.store.ends(source));
                machine.names(self.shared.store.own_durable(source));
            }
            if let Some(fault) = fault {
                machine.step(Event::Faulted(fault.to_string()));
            }
            self.machine = Some(machine);
        }
        self.machine.as_mut().ok_or_else(|| "no session machine".to_owned())
    }

    fn step(&mut self, event: Event, context: &mut Context<Self>) {
        self.advance(event, context);
        self.publish();
    }

    /// A step among several: who looks sees what all of them have come to.
    fn advance(&mut self, event: Event, context: &mut Context<Self>) {
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
    }

    fn act(&mut self, action: Action, context: &mut Context<Self>) {
        match action {
            Action::Send(Message::Ack(ack)) => self.acknowledge(ack),
            Action::Send(Message::Behind(behind @ Behind { state: BehindState::Taken(_), .. })) => {
                if let Some(peer) = &self.peer {
                    peer.takes_behind(behind);
                }
            }
            Action::Send(message) => self.send(&message),
            Action::Record { source, generation, epoch, volumes, policy, alone } => {
                let (promise, known) = ((policy, alone), self.machine.as_ref().map(Mirror::known));
                let left_out = known.map(|known| known.left_out.clone()).unwrap_or_default();
                let told = Told { source, generation, epoch, volumes, promise, left_out };
                self.record(told, context);
            }
            Action::Stage => self.stage(),
            Action::StageBehind => self.stage_behind(),
            Action::DropBehind => self.drop_behind(),
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
            let generation = self.machine.as_ref().map(|machine| machine.known().generation);
            lane.welcomed(self.held, generation.unwrap_or_default());
        }
        self.look_what_came();
        tracing::info!(source = %self.name, "source is in session");
        let refused = self.machine.as_ref().map(|machine| &machine.known().refused);
        for VolumeRefusal { name, reason, next_step, .. } in refused.into_iter().flatten() {
            let source = &self.name;
            tracing::error!(%source, volume = %name, reason, next_step, "volume refused");
        }
    }

    /// The marks of what was lost, or may have been, go when the source has sent it again.
    fn look_what_came(&mut self) {
        let Some(lane) = &self.lane else { return };
        let (log_lost, noted) = lane.has_come();
        if log_lost {
            let (refills, source) = (self.shared.refills.clone(), lane.source());
            let name = &self.name;
            tracing::info!(source = %name, "has sent again what was lost here, or its CP shows all it has");
            machine::aside(move || refills.forget(source));
        }
        if noted {
            let (shared, lane) = (self.shared.clone(), lane.clone());
            machine::aside(move || shared.nothing_is_missing(&lane));
        }
        if log_lost || noted {
            // Status says it no more.
            self.publish();
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

    fn is_streaming(&self) -> bool {
        self.machine.as_ref().is_some_and(Mirror::is_streaming)
    }

    fn progressed(&mut self, context: &mut Context<Self>) {
        let Some(lane) = self.lane.clone() else { return };
        if self.machine.is_none() {
            return;
        }
        // First: a Welcome that follows from the rest names what may be under way now.
        self.advance(Event::Credit(self.credit(&lane)), context);
        let taken = lane.updates_taken();
        let (cursors, outcome) = lane.progress();
        if taken > 0 {
            self.advance(Event::UpdatesTaken(taken), context);
        }
        if outcome.is_none() {
            self.look_behind(&lane, context);
        }
        // First: after a pass the cursors stand on the line behind it.
        if let Some((cp, outcome)) = outcome {
            let was_pass = self.job.take().is_some_and(|job| job.is_pass());
            if let Some(machine) = &mut self.machine
                && (was_pass || machine.known().work)
            {
                machine.works(self.shared.has_work(lane.source()));
            }
            let full = match &outcome {
                Outcome::NoSpace => Some("the hub's pool is full".to_owned()),
                Outcome::OverLimit { reason } => Some(reason.clone()),
                Outcome::Published(_) | Outcome::Rejected { .. } | Outcome::Aborted => None,
            };
            let published = matches!(outcome, Outcome::Published(_));
            let was_behind = self.machine.as_ref().is_some_and(Mirror::is_behind);
            let (left, held) = Self::left_behind(&lane, cursors.drained);
            if published {
                self.advance(Event::LogSet(cursors.drained, held), context);
            }
            self.step(Event::Applied { cp, outcome }, context);
            if published {
                self.stage_left(left);
            }
            if was_behind {
                // The ring counts again.
                self.advance(Event::Credit(self.credit(&lane)), context);
            }
            if let Some(full) = full {
                self.shared.keeping.no_room(&self.name);
                self.fail_checkpoints(&full);
            }
        }
        let durable = if machine::breaks(7) { cursors.staged } else { cursors.durable };
        self.advance(Event::Durable(durable), context);
        self.advance(Event::Drained(cursors.drained), context);
        self.advance(Event::Filed(cursors.synced), context);
        if let Some(fault) = &cursors.fault {
            self.advance(Event::Faulted(fault.to_string()), context);
        }
        // Before anybody hears of it who may ask.
        self.publish();
        self.send_log(context);
        self.answer_checkpoints();
        self.look_what_came();
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
    fn fail_checkpoints(&mut self, full: &str) {
        for (cp, reply) in std::mem::take(&mut self.waiting) {
            let reason = format!("CP {cp} is not published, {full}");
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
        self.snapshot.store(snapshot);
    }

    fn is_current(&self, number: u64) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.number == number)
    }
}

const AWAY: &str = "the source is not connected";

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
        // The files may have changed since it showed its certificate.
        let taken_back = self.taken_back(&message.peer);
        if let Some(refused) = taken_back.or(accepted.err()) {
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
        self.held = message.hello.last.1;
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
        if let Some(lane) = &self.lane {
            lane.ladder.received(message.bytes);
        }
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
                if let Some(machine) = &mut self.machine {
                    // A seed may have become its work tree.
                    machine.works(self.shared.has_work(lane.source()));
                }
                self.step(Event::Credit(credit), context);
                self.step(Event::Recorded, context);
                self.progressed(context);
            }
            Err(reason) => {
                self.refuse(busy(reason));
                self.publish();
            }
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
