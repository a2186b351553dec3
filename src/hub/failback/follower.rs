//! The connection of a follower: a fenced source that the hub brings up, and the list of them.
//!
//! One task a connection ([`follow`]), on the arbiter of its source. It is judged once, when it
//! comes; then it pulls what it was told to, and is told when the hub has given up. What it says
//! out of place ends its connection and touches nobody else.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use super::repeat;
use crate::hub::extension::{Extension, State};
use crate::hub::failover::Refusal;
use crate::hub::lane::lock;
use crate::hub::shared::Shared;
use crate::link::{FrameReader, Outgoing};
use crate::pool::Pin;
use crate::pool::rows::SourceRow;
use crate::units::names::SourceName;
use crate::units::numbers::CpNumber;
use crate::volume::serve;
use crate::wire::message::{
    Follow, Frame, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Ping, PullTarget, Refused,
    RefusedCode, TakeOver,
};
use crate::wire::pull::{WantBlocks, WantNodes};

/// Pause between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long a follower may be silent: it publishes in between.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long an ending connection may take to deliver what was queued for it.
const FLUSH_MAX: Duration = Duration::from_secs(5);
/// Orders that may wait for a follower.
const ORDERS_MAX: usize = 4;

/// What a connected follower is told.
#[derive(Debug)]
pub(super) enum Order {
    Pull { target: PullTarget, pins: Pins, reached: oneshot::Sender<Result<(), String>> },
    TakeOver(TakeOver),
}

/// The CP that a follower pulls, readable as long as they live.
pub(super) type Pins = Arc<Vec<Pin>>;

/// A follower that is connected.
#[derive(Debug, Clone)]
pub(super) struct Connected {
    number: u64,
    pub(super) follow: Arc<Follow>,
    pub(super) orders: mpsc::Sender<Order>,
}

/// The followers of a hub.
#[derive(Debug)]
pub struct Failbacks {
    followers: Mutex<BTreeMap<SourceName, Connected>>,
    next: AtomicU64,
    /// Held while a source is handed over: whoever comes meanwhile finds it before or behind that.
    pub(super) clearing: tokio::sync::Mutex<()>,
    /// Sources that have said Hello after a hand-over, counted: whoever waits looks again.
    pub(super) taken: watch::Sender<u64>,
}

impl Default for Failbacks {
    fn default() -> Self {
        let (followers, next) = (Mutex::default(), AtomicU64::new(0));
        let clearing = tokio::sync::Mutex::default();
        Self { followers, next, clearing, taken: watch::Sender::new(0) }
    }
}

impl Failbacks {
    /// Whether the filer of that source is connected and follows.
    pub fn follows(&self, name: &SourceName) -> bool {
        lock(&self.followers).contains_key(name)
    }

    /// A source that was handed over is a mirror's again.
    pub fn taken(&self) {
        self.taken.send_modify(|count| *count += 1);
    }

    pub(super) fn get(&self, name: &SourceName) -> Option<Connected> {
        lock(&self.followers).get(name).cloned()
    }

    /// The newest connection counts.
    fn put(&self, name: &SourceName, connected: Connected) {
        lock(&self.followers).insert(name.clone(), connected);
    }

    fn remove(&self, name: &SourceName, number: u64) {
        let mut followers = lock(&self.followers);
        if followers.get(name).is_some_and(|known| known.number == number) {
            followers.remove(name);
        }
    }
}

/// The life of a follower's connection.
pub async fn follow(stream: TcpStream, rest: BytesMut, follow: Follow, shared: Arc<Shared>) {
    let (name, follow) = (follow.name.clone(), Arc::new(follow));
    let (read, write) = stream.into_split();
    let reader = FrameReader::with_buffer(read, rest);
    let mut session = Session { shared: shared.clone(), reader, write, pins: None, reached: None };
    let clearing = shared.failbacks.clearing.lock().await;
    let row = match accepts(&shared, &follow) {
        Ok(row) => row,
        Err((code, reason, next_step)) => {
            shared.counters.refused(code);
            tracing::info!(source = %name, reason, "follower refused");
            let next_step = next_step.to_owned();
            session.end(&Message::Refused(Refused { code, reason, next_step })).await;
            return;
        }
    };
    let number = shared.failbacks.next.fetch_add(1, Ordering::Relaxed) + 1;
    let (orders, taken) = mpsc::channel(ORDERS_MAX);
    let connected = Connected { number, follow: follow.clone(), orders };
    tracing::info!(source = %name, own_cp = %follow.own_cp, "the fenced source follows");
    shared.failbacks.put(&name, connected.clone());
    drop(clearing);
    let handed_over =
        Extension::of(&row).is_ok_and(|extension| extension.state == State::HandedOver);
    if handed_over {
        // The hand-over is repeated, to whoever comes with what it was made with.
        let (shared, name) = (shared.clone(), name.clone());
        tokio::spawn(async move {
            if let Err(Refusal { reason, .. }) = repeat(&shared, &name, &connected).await {
                tracing::warn!(source = %name, reason, "the hand-over could not be repeated");
            }
        });
    } else {
        drop(connected);
    }
    let reason = session.run(taken).await;
    shared.failbacks.remove(&name, number);
    tracing::info!(source = %name, reason, "the follower goes");
}

type NotAccepted = (RefusedCode, String, &'static str);

/// Whether it is the source that was fenced here.
fn accepts(shared: &Shared, follow: &Follow) -> Result<SourceRow, NotAccepted> {
    let busy = |reason: String| (RefusedCode::Busy, reason, "wait, the source tries again");
    if follow.version < PROTOCOL_VERSION_MIN || follow.version_min > PROTOCOL_VERSION {
        let reason = "no common protocol version".to_owned();
        return Err((RefusedCode::Version, reason, "upgrade the hub first"));
    }
    let rows = shared.pool.catalog().sources().map_err(|error| busy(error.to_string()))?;
    let Some(row) = rows.into_iter().find(|row| row.name == follow.name) else {
        let reason = format!("source {} was never here", follow.name);
        return Err((RefusedCode::UnknownSource, reason, "check `hub` in source.toml"));
    };
    if row.id != follow.source {
        let reason = format!(
            "the name {} belongs to source {}, this is source {}: giving the volumes to another \
             filer is not available in this version",
            row.name, row.id, follow.source
        );
        return Err((RefusedCode::OtherSource, reason, "start the filer with its old state"));
    }
    if follow.hub != Some(shared.hub) {
        let reason = "the source belongs to another hub".to_owned();
        return Err((RefusedCode::OtherHub, reason, "check `hub` in source.toml"));
    }
    let state = Extension::of(&row).map_err(busy)?.state;
    match state {
        State::FailingOver => return Err(busy("its log is being replayed here".to_owned())),
        State::Mirror => {
            let reason = "this hub has not failed it over, or gave it back already".to_owned();
            return Err((RefusedCode::Diverged, reason, "see `mirrorhub status` on the hub"));
        }
        State::Promoted | State::HandedOver => {}
    }
    let (met, known) = (follow.epoch.number, row.epoch.number);
    if met >= known || follow.fenced.number > known {
        let reason = format!("the source is in epoch {met}, the hub in epoch {known}");
        return Err((RefusedCode::Diverged, reason, "see `mirrorhub status` on the hub"));
    }
    let volumes = shared.pool.catalog().volumes(row.id).map_err(|error| busy(error.to_string()))?;
    let agrees = volumes.len() == follow.volumes.len()
        && volumes.iter().all(|own| {
            follow.volumes.iter().any(|there| {
                (there.number, there.id, there.size) == (own.key.volume, own.id, own.tree.size)
                    && there.name == own.name
            })
        });
    if !agrees {
        let reason = "its volumes are not those that were failed over".to_owned();
        return Err((RefusedCode::Volume, reason, "give source.toml the volumes it had"));
    }
    Ok(row)
}

/// What a follower asks for.
enum Want {
    Nodes(WantNodes),
    Blocks(WantBlocks),
}

/// A follower's connection.
struct Session {
    shared: Arc<Shared>,
    reader: FrameReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
    /// What it may ask for.
    pins: Option<(CpNumber, Pins)>,
    reached: Option<oneshot::Sender<Result<(), String>>>,
}

impl Session {
    /// Runs to its end, and says why it ended.
    async fn run(mut self, mut orders: mpsc::Receiver<Order>) -> String {
        let mut ticks = tokio::time::interval(HEARTBEAT);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut heard, mut token) = (Instant::now(), 0);
        let reason = loop {
            let done = tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.order(order).await,
                    // A newer connection has taken its place.
                    None => Err("it has connected again".to_owned()),
                },
                frame = self.reader.next() => match frame {
                    Ok((message, _)) => {
                        heard = Instant::now();
                        self.frame(message).await
                    }
                    Err(error) => Err(error.to_string()),
                },
                _ = ticks.tick() => {
                    token += 1;
                    let ping = Ping { sequence: Default::default(), token };
                    if heard.elapsed() > SILENCE_MAX {
                        Err("silent for too long".to_owned())
                    } else {
                        self.send(Frame::new(&Message::Ping(ping), Bytes::new())).await
                    }
                }
            };
            if let Err(reason) = done {
                break reason;
            }
        };
        if let Some(reached) = self.reached.take() {
            drop(reached.send(Err(reason.clone())));
        }
        reason
    }

    async fn order(&mut self, order: Order) -> Result<(), String> {
        match order {
            Order::Pull { target, pins, reached } => {
                self.pins = Some((target.cp, pins));
                self.reached = Some(reached);
                self.send(Frame::new(&Message::PullTarget(target), Bytes::new())).await
            }
            Order::TakeOver(take) => {
                self.send(Frame::new(&Message::TakeOver(take), Bytes::new())).await
            }
        }
    }

    async fn frame(&mut self, message: Message) -> Result<(), String> {
        if let Message::Reached(reached) = message {
            let pulled = self.pins.take_if(|(cp, _)| *cp == reached.cp);
            let Some(reply) = self.reached.take().filter(|_| pulled.is_some()) else {
                return Err(format!("CP {} was not asked for", reached.cp));
            };
            drop(reply.send(Ok(())));
            Ok(())
        } else if let Message::WantNodes(want) = message {
            let frame = self.serve(Want::Nodes(want)).await?;
            self.send(frame).await
        } else if let Message::WantBlocks(want) = message {
            let frame = self.serve(Want::Blocks(want)).await?;
            self.send(frame).await
        } else if let Message::Pong(_) = message {
            Ok(())
        } else if let Message::Going(going) = message {
            Err(going.reason)
        } else {
            Err(format!("{} is out of place", message.name()))
        }
    }

    /// Answers a pull.
    async fn serve(&self, want: Want) -> Result<Frame, String> {
        let (_, pins) = self.pins.as_ref().ok_or("nothing was announced that could be pulled")?;
        let (pins, source) = (pins.clone(), self.shared.clone());
        let read = move || {
            let volume = match &want {
                Want::Nodes(want) => want.volume,
                Want::Blocks(want) => want.volume,
            };
            let pin = pins.iter().find(|pin| pin.key().volume == volume);
            let pin = pin.ok_or_else(|| format!("there is no volume {volume}"))?;
            let served = match &want {
                Want::Nodes(want) => serve::nodes(pin, want),
                Want::Blocks(want) => serve::blocks(pin, want),
            };
            let served = served.map_err(|error| error.to_string())?;
            for problem in &served.problems {
                tracing::error!(place = %problem.place, error = %problem.error, hub = %source.hub,
                    "the image cannot be read for a failback");
            }
            Ok(served.frame)
        };
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(error.to_string()))
    }

    async fn send(&mut self, frame: Frame) -> Result<(), String> {
        let mut outgoing = Outgoing::default();
        outgoing.push(frame);
        match tokio::time::timeout(SILENCE_MAX, outgoing.write_all(&mut self.write)).await {
            Ok(sent) => sent.map_err(|error| error.to_string()),
            Err(_) => Err("it takes nothing".to_owned()),
        }
    }

    /// A last message.
    async fn end(&mut self, message: &Message) {
        let last = async {
            self.send(Frame::new(message, Bytes::new())).await?;
            self.write.shutdown().await.map_err(|error| error.to_string())
        };
        if !matches!(tokio::time::timeout(FLUSH_MAX, last).await, Ok(Ok(()))) {
            tracing::debug!("a follower did not take its reason");
        }
    }
}
