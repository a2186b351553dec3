//! The connection of a follower: a fenced source that the hub brings up, and the list of them.
//!
//! One task a connection ([`follow`]), on the arbiter of its source. It is judged once, when it
//! comes; then it pulls what it was told to, and is told when the hub has given up. What it says
//! out of place ends its connection and touches nobody else.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot, watch};

use super::repeat;
use crate::hub::extension::{Extension, State};
use crate::hub::failover::Refusal;
use crate::hub::lane::lock;
use crate::hub::shared::Shared;
use crate::link::socket::{ReadHalf, Socket, WriteHalf};
use crate::link::{FrameReader, Outgoing};
use crate::pool::Pin;
use crate::pool::rows::SourceRow;
use crate::units::ids::SourceId;
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::numbers::{CpNumber, SequenceNumber};
use crate::volume::serve;
use crate::wire::homes::{Adopt, Adopted};
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
/// Filers that may follow for one source.
const FOLLOWERS_MAX: usize = 8;
/// Orders that may wait for a follower.
const ORDERS_MAX: usize = 4;

/// What a connected follower is told.
#[derive(Debug)]
pub(super) enum Order {
    Pull {
        target: PullTarget,
        pins: Pins,
        reached: oneshot::Sender<Result<(), String>>,
    },
    TakeOver(TakeOver),
    /// The filer is new and has nothing of its own: it becomes the source's.
    Adopt {
        adopt: Adopt,
        adopted: oneshot::Sender<Result<(), Refusal>>,
    },
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

impl Connected {
    /// Whose pool it follows with.
    pub(super) fn filer(&self) -> SourceId {
        self.follow.filer.unwrap_or(self.follow.source)
    }

    /// It is a new filer under the source's name: it has an identity and nothing else.
    pub(super) fn is_newcomer(&self, source: SourceId) -> bool {
        self.follow.source != source
    }
}

/// The followers of a hub: of each source by the filer that they follow with.
#[derive(Debug)]
pub struct Failbacks {
    followers: Mutex<BTreeMap<SourceName, BTreeMap<SourceId, Connected>>>,
    next: AtomicU64,
    /// Held while a source is handed over: whoever comes meanwhile finds it before or behind that.
    pub(super) clearing: tokio::sync::Mutex<()>,
    /// Sources that have said Hello after a hand-over, counted: whoever waits looks again.
    pub(super) taken: watch::Sender<u64>,
    /// Followers that have come, counted.
    pub(super) came: watch::Sender<u64>,
}

impl Default for Failbacks {
    fn default() -> Self {
        let (followers, next) = (Mutex::default(), AtomicU64::new(0));
        let clearing = tokio::sync::Mutex::default();
        let (taken, came) = (watch::Sender::new(0), watch::Sender::new(0));
        Self { followers, next, clearing, taken, came }
    }
}

impl Failbacks {
    /// Whether a filer for that source is connected and follows.
    pub fn follows(&self, name: &SourceName) -> bool {
        lock(&self.followers).contains_key(name)
    }

    /// A source that was handed over is a mirror's again.
    pub fn taken(&self) {
        self.taken.send_modify(|count| *count += 1);
    }

    /// The follower of that source with that filer's pool.
    pub(super) fn get(&self, name: &SourceName, filer: SourceId) -> Option<Connected> {
        lock(&self.followers).get(name)?.get(&filer).cloned()
    }

    /// All followers of that source.
    pub(super) fn of(&self, name: &SourceName) -> Vec<Connected> {
        lock(&self.followers).get(name).into_iter().flat_map(|all| all.values().cloned()).collect()
    }

    /// The newest connection of a filer counts. False if too many filers follow for that source and
    /// this is none of those that had it.
    fn put(&self, name: &SourceName, connected: Connected, had_it: bool) -> bool {
        let mut followers = lock(&self.followers);
        let all = followers.entry(name.clone()).or_default();
        let known = had_it || all.contains_key(&connected.filer());
        let fits = all.len() < FOLLOWERS_MAX || known;
        if fits {
            all.insert(connected.filer(), connected);
            self.came.send_modify(|count| *count += 1);
        }
        fits
    }

    fn remove(&self, name: &SourceName, filer: SourceId, number: u64) {
        let mut followers = lock(&self.followers);
        let Some(all) = followers.get_mut(name) else { return };
        if all.get(&filer).is_some_and(|known| known.number == number) {
            all.remove(&filer);
        }
        if all.is_empty() {
            followers.remove(name);
        }
    }
}

/// The life of a follower's connection.
pub async fn follow(stream: Socket, rest: BytesMut, follow: Follow, shared: Arc<Shared>) {
    let (name, follow) = (follow.name.clone(), Arc::new(follow));
    let (read, write) = stream.into_split();
    let reader = FrameReader::with_buffer(read, rest);
    let (pins, reached, adopted) = (None, None, None);
    let session = Session { shared: shared.clone(), reader, write, pins, reached, adopted };
    let clearing = shared.failbacks.clearing.lock().await;
    let row = match accepts(&shared, &follow) {
        Ok(row) => row,
        Err(refused) => return session.refuse(refused).await,
    };
    let number = shared.failbacks.next.fetch_add(1, Ordering::Relaxed) + 1;
    let (orders, taken) = mpsc::channel(ORDERS_MAX);
    let connected = Connected { number, follow: follow.clone(), orders };
    let filer = connected.filer();
    tracing::info!(source = %name, %filer, own_cp = %follow.own_cp, "a filer follows");
    let extension = Extension::of(&row).unwrap_or_default();
    let had_it = filer == row.id || filer == extension.home_of(row.id);
    if !shared.failbacks.put(&name, connected.clone(), had_it) {
        drop(clearing);
        let reason = format!("{FOLLOWERS_MAX} filers follow for {name} already");
        let next_step = "stop those that shall not have it".to_owned();
        return session.refuse(Refused { code: RefusedCode::Busy, reason, next_step }).await;
    }
    drop(clearing);
    if extension.state == State::HandedOver {
        // The hand-over is repeated, to whoever comes with what it was made with.
        let (shared, name) = (shared.clone(), name.clone());
        drop(machine::task(async move {
            if let Err(Refusal { reason, .. }) = repeat(&shared, &name, &connected).await {
                tracing::warn!(source = %name, reason, "the hand-over could not be repeated");
            }
        }));
    } else {
        drop(connected);
    }
    let reason = session.run(taken).await;
    shared.failbacks.remove(&name, filer, number);
    tracing::info!(source = %name, reason, "the follower goes");
}

fn busy(reason: String) -> Refused {
    let next_step = "wait, the source tries again".to_owned();
    Refused { code: RefusedCode::Busy, reason, next_step }
}

fn refuse(code: RefusedCode, reason: String, next_step: impl Into<String>) -> Refused {
    Refused { code, reason, next_step: next_step.into() }
}

/// Whether it is the source that was fenced here, or a new filer under its name.
fn accepts(shared: &Shared, follow: &Follow) -> Result<SourceRow, Refused> {
    if follow.version < PROTOCOL_VERSION_MIN || follow.version_min > PROTOCOL_VERSION {
        let reason = "no common protocol version".to_owned();
        return Err(refuse(RefusedCode::Version, reason, "upgrade the hub first"));
    }
    let rows = shared.pool.catalog().sources().map_err(|error| busy(error.to_string()))?;
    let Some(row) = rows.iter().find(|row| row.name == follow.name) else {
        let reason = format!("source {} was never here", follow.name);
        return Err(refuse(RefusedCode::UnknownSource, reason, "check `hub` in source.toml"));
    };
    let extension = Extension::of(row).map_err(busy)?;
    let home = extension.home_of(row.id);
    let new = row.id != follow.source;
    if follow.hub != Some(shared.hub) && !(new && follow.hub.is_none()) {
        let reason = "the source belongs to another hub".to_owned();
        return Err(refuse(RefusedCode::OtherHub, reason, "check `hub` in source.toml"));
    }
    let filer = follow.filer.unwrap_or(follow.source);
    judge_state(&rows, row, &extension, (filer, new))?;
    if new {
        accepts_newcomer(row, follow)?;
    }
    let (met, known) = (follow.epoch.number, row.epoch.number);
    if met >= known || follow.fenced.number > known {
        let reason = format!("the source is in epoch {met}, the hub in epoch {known}");
        return Err(refuse(RefusedCode::Diverged, reason, "see `mirrorhub status` on the hub"));
    }
    if extension.state == State::HandedOver && filer != home {
        let reason = format!(
            "{} was handed over to {} in epoch {known}, this is another filer",
            row.name,
            named(&rows, home)
        );
        let next = format!(
            "start that one; if it is lost for good, `mirrorhub failover {}` takes it back",
            row.name
        );
        return Err(refuse(RefusedCode::Diverged, reason, next));
    }
    let volumes = shared.pool.catalog().volumes(row.id).map_err(|error| busy(error.to_string()))?;
    let agrees = volumes.len() == follow.volumes.len()
        && volumes.iter().all(|own| {
            follow.volumes.iter().any(|there| {
                let same = (there.number, there.id) == (own.key.volume, own.id);
                // One that has grown may be larger here: its last CP came from the log.
                let fits = there.size <= own.tree.size && (!new || there.size == own.tree.size);
                (new || same) && fits && there.name == own.name
            })
        });
    if !agrees {
        let reason = "its volumes are not those that were failed over".to_owned();
        return Err(refuse(RefusedCode::Volume, reason, "give source.toml the volumes it had"));
    }
    Ok(row.clone())
}

/// A filer by its name, if it is a source here as well.
fn named(rows: &[SourceRow], filer: SourceId) -> String {
    let known = rows.iter().find(|row| row.id == filer);
    known.map_or_else(|| format!("filer {filer}"), |row| format!("filer {}", row.name))
}

/// Whether somebody may follow at all, as things stand.
fn judge_state(
    rows: &[SourceRow],
    row: &SourceRow,
    extension: &Extension,
    (filer, new): (SourceId, bool),
) -> Result<(), Refused> {
    let (name, home) = (&row.name, extension.home_of(row.id));
    match extension.state {
        // Whose log cannot be applied is waited for: it may have what that log lacks (R13).
        State::Promoted | State::HandedOver | State::FailingOver => Ok(()),
        State::Mirror if new => {
            let reason = format!(
                "the name {name} belongs to source {}, whose image is here; this filer is new and \
                 empty",
                row.id
            );
            let next = format!(
                "if the old filer is lost: `mirrorhub failover {name}`, then `mirrorhub failback \
                 {name}` on the hub brings this one up; it serves nothing before"
            );
            Err(refuse(RefusedCode::OtherSource, reason, next))
        }
        State::Mirror if filer != home => {
            let epoch = row.epoch.number;
            let reason = format!(
                "the volumes of {name} live on {} since epoch {epoch}; what this filer wrote by \
                 itself stays on it and is served to nobody",
                named(rows, home)
            );
            let here = rows.iter().find(|row| row.id == filer).map_or(name, |row| &row.name);
            let next = format!(
                "to bring them back here: `mirrorhub failover {name}`, then `mirrorhub failback \
                 {name} --to {here}` on the hub"
            );
            Err(refuse(RefusedCode::Diverged, reason, next))
        }
        State::Mirror => {
            let reason = "this hub has not failed it over, or gave it back already".to_owned();
            Err(refuse(RefusedCode::Diverged, reason, "see `mirrorhub status` on the hub"))
        }
    }
}

/// A filer under the source's name and with another id has nothing that could be lost, or it is
/// somebody else's.
fn accepts_newcomer(row: &SourceRow, follow: &Follow) -> Result<(), Refused> {
    let filer = follow.filer.is_none_or(|filer| filer == follow.source);
    let empty = follow.own_cp == CpNumber(0) && follow.last == SequenceNumber(0);
    if filer && empty && follow.hub.is_none() && follow.alone.is_none() {
        return Ok(());
    }
    let reason = format!(
        "the name {} belongs to source {}, this is source {}, which has writes of its own",
        row.name, row.id, follow.source
    );
    let next = "give the filer another name, or an empty data_dir to take the volumes over";
    Err(refuse(RefusedCode::OtherSource, reason, next))
}

/// What a filer has answered to `Adopt`.
pub(in crate::hub) fn answered(refused: Option<(String, String)>) -> Result<(), Refusal> {
    match refused {
        None => Ok(()),
        Some((reason, next_step)) => Err(Refusal::new(reason, next_step)),
    }
}

/// What a follower asks for.
enum Want {
    Nodes(WantNodes),
    Blocks(WantBlocks),
}

/// A follower's connection.
struct Session {
    shared: Arc<Shared>,
    reader: FrameReader<ReadHalf>,
    write: WriteHalf,
    /// What it may ask for.
    pins: Option<(CpNumber, Pins)>,
    reached: Option<oneshot::Sender<Result<(), String>>>,
    /// It was asked to become the source's filer: by that question.
    adopted: Option<(u64, oneshot::Sender<Result<(), Refusal>>)>,
}

impl Session {
    /// Runs to its end, and says why it ended.
    async fn run(mut self, mut orders: mpsc::Receiver<Order>) -> String {
        let mut ticks = tokio::time::interval(HEARTBEAT);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut heard, mut token) = (machine::now(), 0);
        let reason = loop {
            let done = tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(order) => self.order(order).await,
                    // A newer connection has taken its place.
                    None => Err("it has connected again".to_owned()),
                },
                frame = self.reader.next() => match frame {
                    Ok((message, _)) => {
                        heard = machine::now();
                        self.frame(message).await
                    }
                    Err(error) => Err(error.to_string()),
                },
                _ = ticks.tick() => {
                    token += 1;
                    let ping = Ping { sequence: Default::default(), token };
                    if machine::elapsed(heard) > SILENCE_MAX {
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
            Order::Adopt { adopt, adopted } => {
                self.adopted = Some((adopt.token, adopted));
                self.send(Frame::new(&Message::Adopt(Box::new(adopt)), Bytes::new())).await
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
        } else if let Message::Adopted(Adopted { token, refused }) = message {
            let asked = self.adopted.take_if(|(asked, _)| *asked == token);
            let Some((_, reply)) = asked else {
                return Err("it answers what was not asked".to_owned());
            };
            drop(reply.send(answered(refused)));
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
        machine::blocking(read).await.unwrap_or_else(|error| Err(error.to_string()))
    }

    async fn send(&mut self, frame: Frame) -> Result<(), String> {
        let mut outgoing = Outgoing::default();
        outgoing.push(frame);
        match tokio::time::timeout(SILENCE_MAX, outgoing.write_all(&mut self.write)).await {
            Ok(sent) => sent.map_err(|error| error.to_string()),
            Err(_) => Err("it takes nothing".to_owned()),
        }
    }

    /// Says why it may not follow, and ends.
    async fn refuse(mut self, refused: Refused) {
        self.shared.counters.refused(refused.code);
        tracing::info!(reason = refused.reason, "follower refused");
        self.end(&Message::Refused(refused)).await;
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
