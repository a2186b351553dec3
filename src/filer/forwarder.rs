//! The way to the hub: connects, runs the session's machine, sends, and hears.
//!
//! One task a source. It feeds [`Primary`] with what comes from the socket, from the feed and
//! from the checkpoint thread, and does what the machine says. A connection that breaks, or on
//! which the hub is silent for `hub_timeout`, is made anew after a pause; clients wait meanwhile
//! and see no error. A history that does not join halts it: state and next step are shown, and
//! nothing is tried again before a restart.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;

use super::completion::HubDurable;
use super::order::AdoptError;
use super::sending::SendSide;
use super::shared::{Affiliation, Backoff, Common, LinkState, Shared};
use super::signals::CpData;
use super::{identity::Extension, verify};
use crate::limits::{CP_BYTES_BEFORE_TRANSFER_MAX, HANDSHAKE_SECONDS_MAX};
use crate::link::FrameReader;
use crate::record::transfer::Transfer;
use crate::session::primary::{Action, Event, Held, Primary};
use crate::units::convert::{low_u32, to_u64};
use crate::units::ids::HubId;
use crate::units::numbers::{CpNumber, Epoch};
use crate::wire::message::{
    CheckpointAt, Going, Message, Ping, Refused, RefusedCode, Scan, Welcome,
};

/// Pause between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Pause before a CP is tried again that the hub had no room for.
const RETRY: Duration = Duration::from_secs(5);
/// How long a good-bye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// What the forwarder is told at the start.
#[derive(Debug, Clone)]
pub struct ForwardOptions {
    /// Where the hub listens.
    pub hub: SocketAddr,
    /// How long it may be silent.
    pub hub_timeout: Duration,
    /// Pauses between tries.
    pub backoff: Backoff,
    /// Seed of the pauses' jitter.
    pub seed: u64,
}

/// Why a connection ended.
#[derive(Debug)]
enum End {
    /// To be made anew.
    Broken(String),
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
    jitter: u64,
    retry_at: Option<Instant>,
    token: u64,
}

impl Forwarder {
    /// A forwarder with a machine that knows what was recovered.
    pub fn new(shared: Arc<Shared>, options: ForwardOptions, primary: Primary) -> Self {
        let (jitter, done) = (options.seed, CpNumber(0));
        // A CP that was under way before the restart is known to the machine already.
        let told = shared.order.frozen().map_or(done, |frozen| frozen.cp);
        let (data, retry_at, token) = (None, None, 0);
        Self { shared, options, primary, data, told, done, jitter, retry_at, token }
    }

    /// Runs until the source stops.
    pub async fn run(mut self) {
        let _guard = self.shared.fail_on_panic("the forwarder panicked");
        let mut pause = self.options.backoff.least;
        while !self.shared.session.stopping() {
            let started = Instant::now();
            match self.connection().await {
                End::Stopped => return,
                End::Halted(refused) => {
                    tracing::error!(source = %self.shared.name, code = refused.code.word(),
                        reason = %refused.reason, next_step = %refused.next_step, "halted");
                    self.shared.set_link(LinkState::Halted(refused));
                    self.wait_for_stop().await;
                    return;
                }
                End::Broken(reason) => {
                    self.note_loss(reason);
                    if started.elapsed() > self.options.hub_timeout {
                        pause = self.options.backoff.least;
                    }
                }
            }
            self.sleep(pause).await;
            pause = (pause * 2).min(self.options.backoff.most);
        }
    }

    async fn wait_for_stop(&self) {
        while !self.shared.session.stopping() {
            self.shared.session.changed().await;
        }
    }

    /// Sleeps for the pause and up to half of it more, so that sources do not come all at once.
    async fn sleep(&mut self, pause: Duration) {
        self.jitter = self.jitter.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let extra = pause / 2 * low_u32(self.jitter >> 56) / 256;
        let until = tokio::time::Instant::now() + pause + extra;
        while !self.shared.session.stopping() {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                // Other word stays in its slot until the session is back.
                () = self.shared.session.changed() => {}
            }
        }
    }

    fn note_loss(&mut self, reason: String) {
        self.shared.counters.disconnections.add(1);
        let before = self.shared.link();
        let link = match before {
            LinkState::Waiting { .. } => LinkState::Waiting { reason },
            LinkState::Connected { .. } => {
                tracing::warn!(source = %self.shared.name, %reason, "hub lost");
                LinkState::Offline { since: Instant::now(), reason }
            }
            LinkState::Offline { since, .. } => LinkState::Offline { since, reason },
            halted @ LinkState::Halted(_) => halted,
        };
        self.shared.set_link(link);
    }

    async fn connection(&mut self) -> End {
        let connect = TcpStream::connect(self.options.hub);
        let stream = tokio::select! {
            connected = tokio::time::timeout(self.options.hub_timeout, connect) => match connected {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    return End::Broken(format!("cannot reach hub {}: {error}", self.options.hub));
                }
                Err(_) => {
                    return End::Broken(format!("hub {} does not answer", self.options.hub));
                }
            },
            () = self.wait_for_stop() => return End::Stopped,
        };
        if let Err(error) = tune(&stream) {
            return End::Broken(format!("socket options: {error}"));
        }
        let end = self.session(stream).await;
        // The machine says nothing to a lost connection.
        drop(self.primary.step(Event::Disconnected));
        end
    }

    async fn session(&mut self, stream: TcpStream) -> End {
        let (read, mut write) = stream.into_split();
        let mut reader = FrameReader::new(read);
        let mut side = SendSide::new(Arc::clone(&self.shared));
        let mut ticks = tokio::time::interval(HEARTBEAT.min(self.options.hub_timeout / 4));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        if let Err(end) = self.absorb(&mut side).await {
            return end;
        }
        drop(self.primary.step(Event::OwnDurable(self.shared.outbox.own_durable())));
        if let Err(end) = self.step(Event::Connected, &mut side).await {
            return end;
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
        reader: &mut FrameReader<OwnedReadHalf>,
        write: &mut tokio::net::tcp::OwnedWriteHalf,
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
        let shared = Arc::clone(&self.shared);
        let waits = !side.outgoing.is_empty();
        tokio::select! {
            frame = reader.next() => {
                let (message, payload) = frame.map_err(|error| End::Broken(error.to_string()))?;
                side.heard = Instant::now();
                self.frame(message, payload, side).await
            }
            written = side.outgoing.write_some(write), if waits => {
                written.map_err(|error| End::Broken(format!("connection failed: {error}")))
            }
            () = shared.outbox.formed() => Ok(()),
            () = shared.session.changed() => Ok(()),
            _ = ticks.tick() => self.tick(side).await,
        }
    }

    async fn say_goodbye(&self, side: &mut SendSide, write: &mut tokio::net::tcp::OwnedWriteHalf) {
        let reason = "the source is being stopped".to_owned();
        side.message(Message::Going(Going { reason }));
        let goodbye = async {
            drop(side.fill(None).await);
            while !side.outgoing.is_empty() {
                side.outgoing.write_some(write).await?;
            }
            write.shutdown().await
        };
        // The hub learns of the end in any case.
        drop(tokio::time::timeout(GOODBYE, goodbye).await);
    }

    /// Takes over what feed, checkpoint thread and commands have left.
    async fn absorb(&mut self, side: &mut SendSide) -> Result<(), End> {
        for held in self.shared.outbox.take_formed() {
            self.step(Event::Formed(held), side).await?;
        }
        let streams = self.primary.is_streaming();
        let word = self.shared.session.take(streams);
        if let Some(data) = word.frozen {
            self.frozen(data, side).await?;
        }
        if let Some((cp, roots)) = word.committed {
            self.step(Event::Committed { cp, roots }, side).await?;
        }
        if let Some((cp, token)) = word.scan {
            side.message(Message::Scan(Scan { cp, token }));
        }
        for scanned in word.scanned {
            side.message(Message::Scanned(scanned));
        }
        Ok(())
    }

    /// A CP is planned; unless it is one of before the restart, the session hears of it now.
    async fn frozen(&mut self, data: CpData, side: &mut SendSide) -> Result<(), End> {
        let (cp, place) = (data.freeze.cp, data.freeze.place);
        if cp > self.done {
            self.data = Some(data);
        }
        if cp <= self.told {
            return Ok(());
        }
        self.told = cp;
        // Its last transfers may have been formed since the look before.
        for held in self.shared.outbox.take_formed() {
            self.step(Event::Formed(held), side).await?;
        }
        self.step(Event::Frozen { cp, place }, side).await
    }

    async fn tick(&mut self, side: &mut SendSide) -> Result<(), End> {
        let patience = if self.primary.is_streaming() {
            self.options.hub_timeout
        } else {
            self.options.hub_timeout.max(Duration::from_secs(HANDSHAKE_SECONDS_MAX))
        };
        let silent = side.heard.elapsed();
        if silent > patience {
            return Err(End::Broken(format!("the hub was silent for {} s", silent.as_secs())));
        }
        if self.retry_at.take_if(|at| *at <= Instant::now()).is_some() {
            self.step(Event::Retry, side).await?;
        }
        // In every state behind Hello: the hub lets go of who is silent, also in a long refill.
        self.token += 1;
        let sequence = self.shared.order.figures().sequence;
        side.message(Message::Ping(Ping { sequence, token: self.token }));
        Ok(())
    }

    async fn frame(
        &mut self,
        message: Message,
        payload: Bytes,
        side: &mut SendSide,
    ) -> Result<(), End> {
        if message == Message::Refill {
            return self.refill(payload, side).await;
        }
        if let Message::Welcome(welcome) = &message {
            side.window(0, welcome.cp_credit);
            check_epoch(self.shared.affiliation(), welcome.hub, welcome.epoch)?;
            self.common(welcome)?;
        }
        if let Message::Scanned(scanned) = &message {
            self.shared.scans.send_replace(Some(scanned.clone()));
        }
        self.step(Event::Received(message), side).await
    }

    /// A CP that both ends had published before this connection.
    fn common(&self, welcome: &Welcome) -> Result<(), End> {
        let (cp, roots) = self.shared.own();
        if cp != welcome.applied_cp {
            return self.held_for(cp, welcome.applied_cp);
        }
        for root in &welcome.roots {
            let own = roots.iter().find(|(volume, _)| *volume == root.volume);
            if let Some((volume, own)) = own.filter(|(_, own)| *own != root.root) {
                return Err(End::Halted(Refused {
                    code: RefusedCode::Diverged,
                    reason: format!(
                        "volume {volume} at CP {cp} has root {own} here and {} on the hub",
                        root.root
                    ),
                    next_step: "compare both ends with `mirrorhub verify`".to_owned(),
                }));
            }
        }
        if self.shared.common.borrow().as_ref().is_none_or(|known| known.cp < cp) {
            let pins = self.shared.pins();
            self.shared.common.send_replace(Some(Common { cp, roots, pins }));
        }
        Ok(())
    }

    /// A CP that only this end has published can be sent as long as its log is held.
    fn held_for(&self, own: CpNumber, applied: CpNumber) -> Result<(), End> {
        let frozen = self.shared.order.frozen().map(|frozen| frozen.cp);
        if own < applied || frozen == Some(own) {
            return Ok(());
        }
        Err(End::Halted(Refused {
            code: RefusedCode::Gap,
            reason: format!(
                "CP {own} is published here, the hub has CP {applied}, and the NVRAM does not \
                 hold what lies between"
            ),
            next_step: "a resync is needed; see docs/operations.md".to_owned(),
        }))
    }

    /// A transfer that the hub holds and this end lost (R1): checked like any other.
    async fn refill(&mut self, payload: Bytes, side: &mut SendSide) -> Result<(), End> {
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

    async fn adopt(&self, transfer: &Transfer) -> Result<(), End> {
        self.shared.counters.transfers_adopted.add(1);
        let mut adopted = self.shared.order.take_over(transfer, true);
        if self.in_the_way(&adopted) {
            // The hub has told that the frozen CP is done; its partition is about to be released.
            let thawed = self.shared.order.thawed();
            if tokio::time::timeout(self.options.hub_timeout, thawed).await.is_ok() {
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
    fn in_the_way(&self, adopted: &Result<(), AdoptError>) -> bool {
        let waits = match adopted {
            Err(AdoptError::Cp { open, met, .. }) => met > open,
            Err(AdoptError::Room { .. }) => true,
            Ok(()) | Err(AdoptError::Range { .. } | AdoptError::Sequence { .. }) => false,
        };
        waits && self.shared.order.frozen().is_some()
    }

    async fn step(&mut self, event: Event, side: &mut SendSide) -> Result<(), End> {
        for action in self.primary.step(event) {
            self.act(action, side).await?;
        }
        Ok(())
    }

    async fn act(&mut self, action: Action, side: &mut SendSide) -> Result<(), End> {
        if let Some(proof) = HubDurable::from_action(&action) {
            self.shared.outbox.acknowledged(proof.place().transfer);
            self.shared.completion.hub_durable(&proof);
            return Ok(());
        }
        match action {
            Action::HubDurable(_) => {}
            Action::Adopt => unreachable!("only a refilled transfer is adopted"),
            Action::Send(message) => side.message(message),
            Action::SendTransfer(id) => side.transfer(id),
            Action::SendData { cp, inline } => side.data(cp, inline),
            Action::DataWindow { taken, limit } => side.window(taken, limit),
            Action::Joined { hub, epoch } => self.joined(hub, epoch).await?,
            Action::Serve => self.serve().await,
            Action::Done { cp } => {
                // Its pages are not held any longer than they are needed.
                self.data = None;
                self.done = cp;
                self.shared.checkpoint.done(cp);
            }
            Action::Checkpoint { token } => {
                // Nothing to say: the newest common CP holds everything already.
                let newest = self.shared.common.borrow().as_ref().map(|common| common.cp);
                let cp = self.shared.order.target().or(newest).unwrap_or_default();
                self.shared.checkpoint.want();
                side.message(Message::CheckpointAt(CheckpointAt { token, cp }));
            }
            Action::Scan { cp, token } => verify::answer(&self.shared, cp, token),
            // Its waiter was told when the frame came.
            Action::Scanned(_) => {}
            Action::Rejected { cp, reason, no_space } => self.rejected(cp, reason, no_space),
            Action::Close { reason } => return Err(End::Broken(reason)),
            Action::Halt(refused) => return Err(End::Halted(refused)),
        }
        Ok(())
    }

    fn rejected(&mut self, cp: CpNumber, reason: String, no_space: bool) {
        tracing::error!(source = %self.shared.name, %cp, %reason, no_space, "CP refused by the hub");
        self.shared.counters.checkpoints_rejected.add(1);
        self.shared.set_rejected(Some(format!("the hub refused CP {cp}: {reason}")));
        if no_space {
            self.retry_at = Some(Instant::now() + RETRY);
        }
    }

    /// Hub and epoch are durable before anything else happens in the session.
    async fn joined(&self, hub: HubId, epoch: Epoch) -> Result<(), End> {
        self.shared.counters.connections.add(1);
        self.shared.set_link(LinkState::Connected { since: Instant::now() });
        let known = self.shared.affiliation();
        if known.hub == Some(hub) && known.epoch == epoch {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let kept = tokio::task::spawn_blocking(move || {
            shared.pool.catalog().update_source(shared.source, move |row| {
                row.epoch = epoch;
                if let Ok(extension) = Extension::decode(&row.extension) {
                    row.extension = Extension { hub: Some(hub), ..extension }.encode().to_vec();
                }
            })
        });
        match kept.await {
            Ok(Ok(())) => {
                self.shared.lock().affiliation = Affiliation { hub: Some(hub), epoch };
                Ok(())
            }
            Ok(Err(error)) => {
                let reason = format!("the own pool failed: {error}");
                self.shared.fail(&reason);
                Err(End::Broken(reason))
            }
            Err(error) => Err(End::Broken(format!("own catalog: {error}"))),
        }
    }

    /// What was adopted is durable here before the first client is served.
    async fn serve(&self) {
        self.shared.completion.own_reached(self.shared.order.figures().sequence).await;
        self.shared.order.raise_cp(self.primary.cp_max().next());
        tracing::info!(source = %self.shared.name, "serving");
        self.shared.serving.send_replace(true);
        // What was asked of it before is done now.
        self.shared.checkpoint.serving();
    }
}

/// An epoch that is not the one known here is not ours (R12).
fn check_epoch(known: Affiliation, hub: HubId, epoch: Epoch) -> Result<(), End> {
    let halt = |reason: String, next_step: &str| {
        let code = RefusedCode::Diverged;
        Err(End::Halted(Refused { code, reason, next_step: next_step.to_owned() }))
    };
    if let Some(wanted) = known.hub.filter(|wanted| *wanted != hub) {
        let reason = format!("this source belongs to hub {wanted}, hub {hub} answered");
        return halt(reason, "check `hub` in source.toml");
    }
    if known.epoch.number != 0 && known.epoch != epoch {
        let reason = format!(
            "the hub is in epoch {}/{:016x}, this source in {}/{:016x}: it is not the primary",
            epoch.number, epoch.id, known.epoch.number, known.epoch.id
        );
        return halt(reason, "see `mirrorhub status` on the hub: failback brings it back");
    }
    Ok(())
}

/// Small frames leave at once, and little CP data stands unsent before a transfer.
fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_notsent_lowat(low_u32(CP_BYTES_BEFORE_TRANSFER_MAX))
}
