//! The way to the hub: connects, runs the session's machine, sends, and hears.
//!
//! One task a source. It feeds [`Primary`] with what comes from the socket, from the feed and
//! from the checkpoint thread, and does what the machine says. A connection that breaks, or on
//! which the hub is silent or makes no progress for `hub_timeout`, is made anew after a pause; when
//! that takes `hub_timeout` the hub is lost, and the machine says what that means for clients. Under
//! `stop` only a transfer that is not answered ends a connection so: what else takes long is waited out.
//! A history that does not join halts the way to the hub: state and next step are shown, and
//! nothing is tried again before a restart, but for volumes that the hub does not take; a source
//! that serves alone goes on doing so.

mod durable;
mod heard;
mod jitter;
mod passes;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;

use self::jitter::Jitter;
use super::completion::HubDurable;
use super::feed::DurableFreeze;
use super::order::Lacking;
use super::past;
use super::pulse::Pulse;
use super::sending::{MoveError, SendSide};
use super::shared::{Backoff, LinkState, Pins, Shared};
use super::signals::{Committed, CpData, CpOver};
use super::verify;
use crate::limits::HANDSHAKE_SECONDS_MAX;
use crate::link::FrameReader;
use crate::link::socket::{ReadHalf, Socket, WriteHalf};
use crate::link::tls::SourceTls;
use crate::session::primary::{Action, Event, Primary};
use crate::units::machine;
use crate::units::numbers::{ByteCount, CpNumber};
use crate::units::policy::OnHubLoss;
use crate::wire::message::{Going, Message, Refused, RefusedCode, Scan};

/// Pause before a CP is tried again that the hub had no room for.
const RETRY: Duration = Duration::from_secs(5);
/// The longest, where it is refused again and again: a pass sends all of its data each time.
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How long a good-bye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// What the forwarder is told at the start.
#[derive(Debug, Clone)]
pub struct ForwardOptions {
    /// Where the hub listens.
    pub hub: SocketAddr,
    /// How it is spoken to there.
    pub tls: Option<Arc<SourceTls>>,
    /// Pauses between tries.
    pub backoff: Backoff,
    /// Seed of the pauses' jitter.
    pub seed: u64,
    /// Bytes a second that a pass may send.
    pub resync_limit: Option<ByteCount>,
}

/// Why a connection ended.
#[derive(Debug)]
enum End {
    /// To be made anew.
    Broken(String),
    /// To be made anew; the hub counts as lost.
    Stalled(String),
    /// To be made anew at once: the hub is told of another policy.
    Renewed,
    /// Not to be made anew.
    Halted(Refused),
    /// The source stops.
    Stopped,
}

/// The forwarder of one source.
#[derive(Debug)]
pub struct Forwarder {
    shared: Arc<Shared>,
    options: ForwardOptions,
    primary: Primary,
    data: Option<CpData>,
    /// The newest CP the machine was told of, and the newest that is done.
    told: CpNumber,
    done: CpNumber,
    /// The newest own CP the machine was told of, readable.
    own: (CpNumber, Pins),
    /// Volumes whose image is of an older CP than the hub's others, and of which.
    older: past::Older,
    /// Said by the shell while it did what the machine said.
    follow: VecDeque<Event>,
    /// Since when there is no session; `None` in one.
    lost: Option<Instant>,
    jitter: Jitter,
    retry_at: Option<Instant>,
    /// The pause before it.
    retry_pause: Duration,
    /// When the newest connection was begun.
    began: Instant,
    pulse: Pulse,
    /// The same clock for what waits for the hub's credit on this connection.
    credit: Pulse,
    /// The same for transfers that were sent.
    sent: Pulse,
}

impl Forwarder {
    /// A forwarder with a machine that knows what was recovered.
    pub fn new(shared: Arc<Shared>, options: ForwardOptions, primary: Primary) -> Self {
        let (jitter, done) = (Jitter::new(options.seed), CpNumber(0));
        // A CP that was under way before the restart is known to the machine already.
        let told = shared.order.frozen().map_or(done, |frozen| frozen.cp);
        let (data, retry_at) = (None, None);
        let own = (shared.own().0, shared.pins());
        let follow = VecDeque::new();
        let now = machine::now();
        let (lost, pulse) = (Some(now), Pulse::default());
        Self {
            shared,
            options,
            primary,
            data,
            told,
            done,
            own,
            older: past::Older::new(),
            follow,
            lost,
            jitter,
            retry_at,
            retry_pause: RETRY,
            began: now,
            pulse,
            credit: Pulse::default(),
            sent: Pulse::default(),
        }
    }

    /// Runs until the source stops.
    pub async fn run(mut self) {
        let _guard = self.shared.fail_on_panic("the forwarder panicked");
        let mut pause = self.options.backoff.least;
        let mut halted = self.start().await;
        if machine::breaks(1) {
            self.serve().await;
        }
        while !self.shared.session.stopping() {
            let started = machine::now();
            let end = match halted.take() {
                Some(refused) => End::Halted(refused),
                None => self.connection().await,
            };
            self.lost.get_or_insert_with(machine::now);
            match end {
                End::Stopped => return,
                End::Renewed => continue,
                End::Halted(refused) => {
                    let again = refused.code == RefusedCode::Volume;
                    self.note_halt(refused);
                    if again && self.shared.fenced().is_none() {
                        // The hub's file of this source may change; nothing here has to.
                        self.away(Some(RETRY)).await;
                        drop(self.primary.step(Event::TryAgain));
                        continue;
                    }
                    if self.shared.fenced().is_none() && !self.shared.is_newcomer() {
                        self.away(None).await;
                    }
                    // A fenced source goes on as a follower, and so does a new one.
                    return;
                }
                End::Stalled(reason) => {
                    // A slow hub is a lost hub, however quickly it is back.
                    self.note_loss(reason);
                    let since = machine::now().checked_sub(self.patience());
                    self.lost = since.or(self.lost);
                }
                End::Broken(reason) => {
                    self.note_loss(reason);
                    if machine::elapsed(started) > self.patience() {
                        pause = self.options.backoff.least;
                    }
                }
            }
            let jittered = self.jitter.on(pause);
            self.away(Some(jittered)).await;
            pause = (pause * 2).min(self.options.backoff.most);
        }
    }

    /// A source that was fenced stays so; the reason if it is.
    async fn start(&mut self) -> Option<Refused> {
        let fenced = self.shared.fenced()?;
        let mut side = SendSide::new(Arc::clone(&self.shared));
        match self.step(Event::Fenced(fenced), &mut side).await {
            Err(End::Halted(refused)) => Some(refused),
            Ok(()) | Err(End::Broken(_) | End::Stalled(_) | End::Renewed | End::Stopped) => None,
        }
    }

    /// Goes on without a session for a while, or until the source stops.
    async fn away(&mut self, pause: Option<Duration>) {
        let mut side = SendSide::new(Arc::clone(&self.shared));
        let until = pause.map(|pause| tokio::time::Instant::now() + pause);
        while !self.shared.session.stopping() {
            self.live(&mut side).await;
            let shared = Arc::clone(&self.shared);
            tokio::select! {
                biased;
                () = sleep_until(until) => return,
                () = sleep_until(self.lost_at()) => {}
                () = shared.session.changed() => {}
                () = shared.outbox.formed() => {}
            }
        }
    }

    /// What goes on without a session: CPs, and the loss of the hub when its time is up.
    async fn live(&mut self, side: &mut SendSide) {
        let absorbed = self.absorb(side).await;
        if self.lost_at().is_some_and(|at| at <= tokio::time::Instant::now()) {
            // Said once; a session that comes and goes begins anew.
            self.lost = None;
            if let Err(end) = self.step(Event::HubLost, side).await {
                tracing::warn!(source = %self.shared.name, ?end, "without a hub");
            }
        }
        if let Err(end) = absorbed {
            tracing::warn!(source = %self.shared.name, ?end, "without a hub");
        }
    }

    fn lost_at(&self) -> Option<tokio::time::Instant> {
        self.lost.map(|since| tokio::time::Instant::from_std(since + self.patience()))
    }

    fn note_halt(&self, refused: Refused) {
        let known = matches!(self.shared.link(), LinkState::Halted(before) if before == refused);
        if !known {
            tracing::error!(source = %self.shared.name, code = refused.code.word(),
                reason = %refused.reason, next_step = %refused.next_step, "halted");
            self.shared.set_link(LinkState::Halted(refused));
        }
    }

    fn note_loss(&mut self, reason: String) {
        self.shared.counters.disconnections.add(1);
        let before = self.shared.link();
        let link = match before {
            LinkState::Waiting { .. } => LinkState::Waiting { reason },
            LinkState::Connected { .. } => {
                tracing::warn!(source = %self.shared.name, %reason, "hub lost");
                LinkState::Offline { since: machine::now(), reason }
            }
            LinkState::Offline { since, .. } => LinkState::Offline { since, reason },
            other @ (LinkState::Halted(_) | LinkState::Unlinked) => other,
        };
        self.shared.set_link(link);
    }

    async fn connection(&mut self) -> End {
        let stream = match self.connect().await {
            Ok(stream) => stream,
            Err(end) => return end,
        };
        if let Err(error) = stream.tune() {
            return End::Broken(format!("socket options: {error}"));
        }
        let end = self.session(stream).await;
        self.shared.end_pass();
        self.shared.questions.give_up();
        // What it says to the hub reaches nobody. What it says to this end counts: a CP that was
        // committed meanwhile may be complete alone.
        let mut nowhere = SendSide::new(Arc::clone(&self.shared));
        match self.step(Event::Disconnected, &mut nowhere).await {
            Ok(()) => end,
            Err(worse) => worse,
        }
    }

    /// Connects while everything else goes on.
    async fn connect(&mut self) -> Result<Socket, End> {
        let (hub, tls) = (self.options.hub, self.options.tls.clone());
        let connect = Socket::connect(hub, tls.as_deref());
        let connect = tokio::time::timeout(self.patience(), connect);
        let mut connect = std::pin::pin!(connect);
        let mut side = SendSide::new(Arc::clone(&self.shared));
        loop {
            self.live(&mut side).await;
            if self.shared.session.stopping() {
                return Err(End::Stopped);
            }
            let shared = Arc::clone(&self.shared);
            tokio::select! {
                biased;
                connected = &mut connect => return match connected {
                    Ok(Ok(stream)) => Ok(stream),
                    Ok(Err(error)) => {
                        Err(End::Broken(format!("cannot reach hub {hub}: {error}")))
                    }
                    Err(_) => Err(End::Broken(format!("hub {hub} does not answer"))),
                },
                () = sleep_until(self.lost_at()) => {}
                () = shared.session.changed() => {}
                () = shared.outbox.formed() => {}
            }
        }
    }

    async fn session(&mut self, stream: Socket) -> End {
        self.began = machine::now();
        let (read, mut write) = stream.into_split();
        let mut reader = FrameReader::new(read);
        let mut side = SendSide::new(Arc::clone(&self.shared));
        let mut ticks = tokio::time::interval(Pulse::heartbeat(self.patience()));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        if let Err(end) = self.absorb(&mut side).await {
            return end;
        }
        let own_durable = Event::OwnDurable(self.shared.outbox.own_durable());
        for event in [own_durable, Event::Connected] {
            if let Err(end) = self.step(event, &mut side).await {
                return end;
            }
        }
        loop {
            if let Err(end) = self.turn(&mut reader, &mut write, &mut side, &mut ticks).await {
                if matches!(end, End::Stopped) {
                    self.say_goodbye(&mut side, &mut write).await;
                }
                return end;
            }
        }
    }

    /// One round: form what the socket should have, then wait for the first thing that happens.
    async fn turn(
        &mut self,
        reader: &mut FrameReader<ReadHalf>,
        write: &mut WriteHalf,
        side: &mut SendSide,
        ticks: &mut tokio::time::Interval,
    ) -> Result<(), End> {
        self.absorb(side).await?;
        if self.shared.session.stopping() {
            return Err(End::Stopped);
        }
        if side.is_flooded() {
            return Err(End::Broken("the hub asks more than it reads".to_owned()));
        }
        let formed = side.fill(self.data.as_ref()).await;
        let formed = formed.map_err(|error| {
            let reason = format!("own NVRAM cannot be read: {error}");
            self.shared.fail(&reason);
            End::Broken(reason)
        })?;
        if let Some((cp, bytes)) = formed {
            return self.step(Event::DataSent { cp, bytes }, side).await;
        }
        if !self.primary.is_streaming() {
            self.live(side).await;
        }
        let shared = Arc::clone(&self.shared);
        let lost_at = self.lost_at();
        tokio::select! {
            // What is sent is bounded by the hub's credits and window: it keeps nothing from being
            // heard for long.
            biased;
            _ = ticks.tick() => self.tick(side).await,
            () = sleep_until(lost_at) => Ok(()),
            frame = reader.next() => {
                let (message, payload) = frame.map_err(|error| End::Broken(error.to_string()))?;
                side.heard = machine::now();
                self.frame(message, payload, side).await
            }
            moved = side.moved(write) => match moved {
                Ok(()) => Ok(()),
                Err(MoveError::Socket(error)) => {
                    Err(End::Broken(format!("connection failed: {error}")))
                }
                Err(MoveError::Pass(reason)) => {
                    Err(End::Broken(format!("the own image cannot be read: {reason}")))
                }
            },
            () = shared.outbox.formed() => Ok(()),
            () = shared.session.changed() => Ok(()),
        }
    }

    async fn say_goodbye(&self, side: &mut SendSide, write: &mut WriteHalf) {
        let reason = "the source is being stopped".to_owned();
        side.message(Message::Going(Going { reason }));
        let goodbye = async {
            drop(side.fill(None).await);
            side.outgoing.write_all(write).await?;
            write.shutdown().await
        };
        // The hub learns of the end in any case.
        drop(tokio::time::timeout(GOODBYE, goodbye).await);
    }

    /// Takes over what feed, checkpoint thread and commands have left: all of it, whatever becomes
    /// of the connection meanwhile. It is told once.
    async fn absorb(&mut self, side: &mut SendSide) -> Result<(), End> {
        let mut ended = self.formed(side).await;
        let streams = self.primary.is_streaming();
        let word = self.shared.session.take(streams);
        if let Some(volumes) = word.grown {
            let volumes = volumes.to_vec();
            ended = first_of(ended, self.step(Event::Grown(volumes), side).await);
        }
        if let Some((next, behind)) = word.promised {
            ended = first_of(ended, self.step(Event::Promised { next, behind }, side).await);
        }
        if let Some(data) = word.frozen {
            ended = first_of(ended, self.frozen(data, side).await);
        }
        if let Some(Committed { cp, roots, pins }) = word.committed {
            self.own = (cp, pins);
            ended = first_of(ended, self.step(Event::Committed { cp, roots }, side).await);
        }
        if let Some(cp) = word.pressed {
            ended = first_of(ended, self.step(Event::Pressed(cp), side).await);
        }
        if let Some((cp, token)) = word.scan {
            side.message(Message::Scan(Scan { cp, token }));
        }
        if let Some(adopted) = word.adopted {
            side.message(Message::Adopted(adopted));
        }
        for scanned in word.scanned {
            side.message(Message::Scanned(scanned));
        }
        if streams {
            word.wants.into_iter().for_each(|want| side.message(Message::WantPlace(want)));
            word.places.into_iter().for_each(|frame| side.frame(frame));
        }
        ended
    }

    async fn formed(&mut self, side: &mut SendSide) -> Result<(), End> {
        let mut ended = Ok(());
        for held in self.shared.outbox.take_formed() {
            ended = first_of(ended, self.step(Event::Formed(held), side).await);
        }
        ended
    }

    /// A CP is planned; unless it is one of before the restart, the session hears of it now.
    async fn frozen(&mut self, data: CpData, side: &mut SendSide) -> Result<(), End> {
        let DurableFreeze { cp, place, policy, .. } = data.freeze;
        if cp > self.done {
            self.data = Some(data);
        }
        if cp <= self.told {
            return Ok(());
        }
        self.told = cp;
        // Its last transfers may have been formed since the look before.
        let mut ended = self.formed(side).await;
        ended = first_of(ended, self.step(Event::Frozen { cp, place }, side).await);
        // Behind it: the next policy is not told before this CP is done.
        if let Some(next) = policy {
            let promised = Event::Promised { next, behind: place.sequence };
            ended = first_of(ended, self.step(promised, side).await);
        }
        ended
    }

    /// How long the hub may be silent.
    fn patience(&self) -> Duration {
        self.shared.pledge.patience()
    }

    async fn tick(&mut self, side: &mut SendSide) -> Result<(), End> {
        let patience = if self.primary.is_streaming() {
            self.patience()
        } else {
            self.patience().max(Duration::from_secs(HANDSHAKE_SECONDS_MAX))
        };
        let silent = machine::elapsed(side.heard);
        if silent > patience {
            return Err(End::Broken(format!("the hub was silent for {} s", silent.as_secs())));
        }
        // One that has stopped answering is about to be silent, which says more.
        if silent <= Pulse::heartbeat(self.patience()) * 2 {
            self.look_for_progress()?;
        }
        if self.retry_at.take_if(|at| *at <= machine::now()).is_some() {
            self.step(Event::Retry, side).await?;
        }
        // In every state behind Hello: the hub lets go of who is silent, also in a long refill.
        let sequence = self.shared.order.figures().sequence;
        side.message(Message::Ping(self.pulse.ping(sequence)));
        Ok(())
    }

    /// A transfer, or a CP whose room writers wait for, that gets on with nothing for
    /// `hub_timeout`, is a lost hub (section 9); so is one without credit for what waits to be sent.
    /// Under `stop`, where nobody is served by losing it, that is told and waited out, unless a
    /// transfer was sent that is not answered.
    fn look_for_progress(&mut self) -> Result<(), End> {
        self.shared.hub_reached(self.primary.hub_sequence(), self.done);
        let stops = self.shared.pledge.kept().on_hub_loss == OnHubLoss::Stop;
        // A hub without room says so: under `stop` writers wait for room, not for another connection.
        let waits = stops && self.shared.lacks_hub_room();
        let full = self.shared.order.figures().lacking == Some(Lacking::Nvram) && !waits;
        let (sending, unsent) = (self.primary.is_sending(), self.primary.waits_for_hub() && !waits);
        // A hub that takes connections and does nothing else does not begin anew with each of them.
        let streaming = self.primary.is_streaming();
        // CPs that it builds from its log are no data that it takes.
        let built = self.shared.counters.checkpoints_built_there.get();
        let taken = self.primary.cp_taken().saturating_add(built);
        let now = (self.primary.hub_sequence(), self.done, taken);
        let patience = self.patience();
        let credit = self.credit.stalled(now, streaming && unsent, patience);
        let owed = self.pulse.stalled(now, streaming && (sending || full), patience);
        let unanswered = self.sent.stalled(now, streaming && sending, patience);
        let Some(stalled) = owed.or(credit) else { return Ok(()) };
        let what = match (full, sending) {
            (true, _) => "both partitions of the NVRAM are full and ",
            (false, false) => "writes wait for room in its log and ",
            (false, true) => "",
        };
        let seconds = stalled.as_secs();
        let reason = format!("{what}the hub got on with nothing for {seconds} s");
        let is_new = self.shared.slow().is_none();
        self.shared.set_slow(reason.clone(), self.primary.hub_sequence(), self.done);
        if !stops || unanswered.is_some() {
            return Err(End::Stalled(reason));
        }
        // Credit, or a CP: they come on this connection sooner than on another.
        if is_new {
            tracing::warn!(reason, "waits for the hub, on the connection that is there");
        }
        Ok(())
    }

    /// Does all that the machine says, also behind the end of a connection: that a CP is done alone,
    /// say, is told once. Only a catalog that cannot be written ends it in the middle.
    async fn step(&mut self, event: Event, side: &mut SendSide) -> Result<(), End> {
        self.follow.push_back(event);
        let mut ended = Ok(());
        while let Some(event) = self.follow.pop_front() {
            let actions = self.primary.step(event);
            // Before the link counts as connected.
            self.shared.brings_up.store(self.primary.brings_up(), Ordering::Relaxed);
            for action in actions {
                let is_kept = keeps(&action);
                let done = self.act(action, side).await;
                if is_kept {
                    done?;
                } else {
                    ended = first_of(ended, done);
                }
            }
        }
        self.shared.backlog.store(self.primary.backlog(), Ordering::Relaxed);
        ended
    }

    /// The ends have joined.
    fn begins(&mut self) {
        self.lost = None;
        self.shared.told.store(Arc::new(self.primary.volumes().to_vec()));
        // What the last connection waited for is none of this one's.
        self.credit.begin();
        self.shared.lease.send_replace(Some(self.began));
    }

    async fn act(&mut self, action: Action, side: &mut SendSide) -> Result<(), End> {
        if let Some(proof) = HubDurable::from_action(&action) {
            self.shared.outbox.acknowledged(proof.place().transfer);
            self.shared.completion.hub_durable(&proof);
            return Ok(());
        }
        match action {
            // The waiter of a scan was told when the frame came.
            Action::HubDurable(_) | Action::Scanned(_) => {}
            Action::Adopt => unreachable!("only a refilled transfer is adopted"),
            Action::Send(message) => side.message(message),
            Action::SendTransfer(id) => side.transfer(id),
            Action::Unsend => side.unsend(),
            Action::SendData { cp, inline } => side.data(cp, inline),
            Action::DataWindow { taken, limit } => side.window(taken, limit),
            Action::Joined { hub, epoch } => {
                self.begins();
                self.joined(hub, epoch).await?;
            }
            Action::Serve => self.serve().await,
            Action::Done { cp, alone } => {
                // Its pages are not held any longer than they are needed.
                self.data = None;
                self.done = cp;
                if !alone {
                    self.retry_pause = RETRY;
                }
                self.shared.checkpoint.done(CpOver { cp, alone });
            }
            Action::Answer(answering) => self.shared.answer(answering),
            Action::MarkApart(mark) => self.mark(Some(mark), Event::Apart).await?,
            Action::AskAlone => self.answered_alone().await?,
            Action::ClearApart => self.mark(None, Event::Together).await?,
            Action::Unasked(began) => self.note(move |kept| kept.unasked = began).await?,
            Action::Fence(epoch) => {
                // First of all nobody is served any more; then it is made to last.
                if !machine::breaks(12) {
                    self.shared.fence(epoch);
                }
                self.note(move |kept| kept.fenced = Some(epoch)).await?;
            }
            Action::LeaveOut(refused) => self.leave_out(refused),
            Action::SetBack { had, has } => self.set_back(had, has),
            Action::SendPass { cp, base } => self.send_pass(cp, base, side)?,
            Action::SendCompare { cp, base } => self.send_compare(cp, base, side)?,
            Action::ServePull(want) if side.asked(want.clone()) => {}
            Action::ServePull(_) => {
                return Err(End::Broken("the hub asks for more at once than it may".to_owned()));
            }
            Action::Faulted { cp, reason } => self.faulted(cp, reason, side),
            Action::PassEnded { cp } => self.pass_ended(cp),
            Action::Shown { cp } => self.shown(cp),
            Action::Freeze => self.shared.checkpoint.force(),
            Action::Checkpoint { token } => self.checkpoint_wanted(token, side),
            Action::Scan { cp, token } => verify::answer(&self.shared, cp, token),
            Action::Rejected { cp, reason, no_space } => self.rejected(cp, reason, no_space),
            Action::InForce(policy) => self.put_in_force(policy).await?,
            Action::Renew => return Err(End::Renewed),
            Action::Close { reason } => return Err(End::Broken(reason)),
            Action::Halt(refused) => return Err(End::Halted(refused)),
        }
        Ok(())
    }
}

/// Whether an action writes the own catalog.
fn keeps(action: &Action) -> bool {
    matches!(
        action,
        Action::Joined { .. }
            | Action::MarkApart(_)
            | Action::Unasked(_)
            | Action::AskAlone
            | Action::ClearApart
            | Action::Fence(_)
            | Action::InForce(_)
    )
}

/// The first end of a connection counts, but for one that is for good.
fn first_of(before: Result<(), End>, now: Result<(), End>) -> Result<(), End> {
    match (&before, &now) {
        (Ok(()), _) | (_, Err(End::Halted(_))) => now,
        (Err(_), _) => before,
    }
}

/// Pending without a time.
async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
