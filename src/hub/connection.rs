//! Connections of sources: accept, Hello, hand over to the source's arbiter, read, write.
//!
//! Until a peer has said a Hello with a known name it costs one of a bounded number of places and
//! has a deadline; nothing is stored for it. When all places are taken, one of them makes room: who
//! says nothing cannot keep others out. Who comes from where a source came from before goes last, so
//! that it has its time also over a slow line and among strangers who never end. After that its socket
//! lives on the arbiter of its source's actor, with one reading and one writing task. Whatever ends
//! a connection is told to the actor with its reason, and touches nobody else.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::actor::{Connected, Content, FrameIn, PeerEnds, SILENCE_MAX, SourceActor, peer};
use super::certificates::{self, Spoken};
use super::failback;
use super::join_by;
use super::lane::lock;
use super::registry::Entry;
use super::shared::{Shared, SourceSetting};
use crate::limits::{HANDSHAKE_SECONDS_MAX, HANDSHAKES_MAX, REGULARS_MAX, SEND_QUEUE_FRAMES};
use crate::link::shown::Shown;
use crate::link::socket::{Socket, WriteHalf};
use crate::link::{FrameReader, LinkError, Outgoing};
use crate::record::transfer::Transfer;
use crate::units::convert::to_u64;
use crate::units::entrance::{Entrance, Place};
use crate::units::ids::SourceId;
use crate::units::machine;
use crate::units::names::SourceName;
use crate::units::turn;
use crate::wire::message::{Follow, Frame, Hello, Message, Refused, RefusedCode};

/// How long an ending connection may take to deliver what was queued for it.
const FLUSH_MAX: Duration = Duration::from_secs(5);

/// The body of the door's thread: accepts sources until `stop`, and goes behind the threads that serve the
/// sources that are there. However many knock, with whatever certificates, these keep their cores.
///
/// # Errors
/// There is no runtime to be had.
pub fn door(
    listener: TcpListener,
    shared: Arc<Shared>,
    stop: CancellationToken,
) -> io::Result<impl FnOnce() + Send + 'static> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _within = runtime.enter();
        TcpListener::from_std(listener.into_std()?)?
    };
    Ok(move || {
        if let Err(error) = turn::go_behind() {
            tracing::warn!(%error, "strangers at the door have the same turn as sources");
        }
        runtime.block_on(accept(listener, shared, stop));
    })
}

/// Accepts sources until `stop`.
async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let entrance = Arc::new(Entrance::new(HANDSHAKES_MAX, REGULARS_MAX));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => {
                // None is held for longer than a handshake.
                let Some(place) = entrance.admit(Some(address.ip())) else { continue };
                tokio::spawn(stranger(stream, address, place, entrance.clone(), shared.clone()));
                if entrance.waiting() > HANDSHAKES_MAX / 4 {
                    // Those who have said who they are go first: when many come at once, as behind
                    // a restart of this hub, none of them makes room for the next.
                    tokio::task::yield_now().await;
                }
            }
            // Out of descriptors: what is open goes on, the next accept waits for one to close.
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A connection that has not been handed over yet.
async fn stranger(
    stream: TcpStream,
    address: SocketAddr,
    place: Place,
    entrance: Arc<Entrance>,
    shared: Arc<Shared>,
) {
    let peer = address.to_string();
    let greeted = tokio::select! {
        () = place.lost() => {
            shared.counters.refused(RefusedCode::Busy);
            Err("made room for a newer one".to_owned().into())
        }
        greeted = enter(stream, &peer, &shared) => greeted,
    };
    match greeted {
        // It is a source: known by its certificate, or, without TLS, on this machine.
        Ok(()) => entrance.remember(address.ip()),
        Err(Stranger { key, reason }) => {
            shared.counters.handshakes_failed.fetch_add(1, Ordering::Relaxed);
            shared.counters.said.say("connection refused", &peer, &key, &reason);
        }
    }
}

/// Why a connection reaches no source.
pub(super) struct Stranger {
    /// The reason without what is another thing each time: a peer is told of once for each.
    key: String,
    reason: String,
}

impl From<String> for Stranger {
    fn from(reason: String) -> Self {
        Self { key: reason.clone(), reason }
    }
}

/// Who the other end is, as far as that is known before it says so.
#[derive(Debug, Clone)]
pub(super) enum Known {
    /// Somebody on this machine.
    Local,
    /// The holder of a certificate with these names.
    Certified(Shown),
}

impl Known {
    /// Whether it may speak for that source: its own, or one whose home its filer is to be. The source whose
    /// certificate it is, if it has shown one; or why not, and what is done about it.
    fn speaks_for(
        &self,
        name: &SourceName,
        shared: &Shared,
    ) -> Result<Option<(SourceSetting, &Shown)>, Unspoken> {
        let Self::Certified(shown) = self else { return Ok(None) };
        let settings = shared.settings.load();
        let other = RefusedCode::OtherSource;
        let mut why =
            (other, format!("the certificate is not one of source {name}"), next_step(other));
        for holder in std::iter::once(name.clone()).chain(shared.home_of(name)) {
            if !shown.names.iter().any(|held| held == holder.as_str()) {
                continue;
            }
            // Not as what somebody else is: with a new certificate it is itself again, so it tries again.
            let unknown = RefusedCode::UnknownSource;
            // Who has no file any more speaks for nobody.
            let Some(setting) = settings.get(&holder) else {
                why = (unknown, certificates::no_file(&holder), next_step(unknown));
                continue;
            };
            match shared.counters.came.refuses(setting, shown) {
                None => return Ok(Some((setting.clone(), shown))),
                Some(reason) => why = (unknown, reason, certificates::NEXT_STEP),
            }
        }
        Err(why)
    }
}

/// Why a certificate does not speak for a source, and what is done about it.
type Unspoken = (RefusedCode, String, &'static str);

/// The TLS handshake, if there is one; then the first frame.
async fn enter(stream: TcpStream, peer: &str, shared: &Arc<Shared>) -> Result<(), Stranger> {
    let Some(tls) = &shared.tls else {
        return greet(Socket::Tcp(stream), Known::Local, peer, shared).await;
    };
    let deadline = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
    let why = match tokio::time::timeout(deadline, tls.accept(stream)).await {
        Ok(Ok((stream, shown))) => {
            let (stream, known) = (Socket::Tls(Box::new(stream)), Known::Certified(shown));
            return greet(stream, known, peer, shared).await;
        }
        Ok(Err(error)) => format!("TLS: {error}"),
        Err(_) => "TLS: no handshake in time".to_owned(),
    };
    shared.counters.refused(RefusedCode::Protocol);
    Err(why.into())
}

/// Reads Hello and hands the connection to its source's arbiter.
pub(super) async fn greet(
    stream: Socket,
    known: Known,
    peer: &str,
    shared: &Arc<Shared>,
) -> Result<(), Stranger> {
    stream.without_delay().map_err(|error| error.to_string())?;
    let mut reader = FrameReader::new(stream);
    let deadline = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
    let hello = match tokio::time::timeout(deadline, reader.next()).await {
        Err(_) => {
            shared.counters.refused(RefusedCode::Protocol);
            return Err("said nothing in time".to_owned().into());
        }
        Ok(Err(error)) => {
            shared.counters.refused(RefusedCode::Protocol);
            return refuse(reader, RefusedCode::Protocol, error.to_string()).await;
        }
        Ok(Ok((Message::Hello(hello), _))) => *hello,
        Ok(Ok((Message::Follow(follow), _))) => {
            return follows(reader, known, *follow, shared).await;
        }
        Ok(Ok((other, _))) => {
            shared.counters.refused(RefusedCode::Protocol);
            let reason = format!("began with {} instead of Hello", other.name());
            return refuse(reader, RefusedCode::Protocol, reason).await;
        }
    };
    tracing::debug!(peer, source = %hello.name, "hello");
    let name = hello.name.clone();
    let number = shared.counters.connections.fetch_add(1, Ordering::Relaxed) + 1;
    let (own, limits) = (name.clone(), Arc::clone(shared));
    let limit = move || limits.bandwidth_limit(&own);
    hand_over(reader, (known, &name, hello.source), shared, move |stream, rest, entry, spoken| {
        serve(stream, rest, (number, hello, spoken), entry.actor, limit)
    })
    .await
}

/// The source of that name, if it has a file: a retired one only has images.
fn welcome(shared: &Shared, name: &SourceName) -> Option<Entry> {
    let has_file = shared.settings.load().contains_key(name);
    shared.registry.get(name).filter(|_| has_file)
}

/// A fenced source that follows.
async fn follows(
    reader: FrameReader<Socket>,
    known: Known,
    follow: Follow,
    shared: &Arc<Shared>,
) -> Result<(), Stranger> {
    let (name, for_task) = (follow.name.clone(), Arc::clone(shared));
    hand_over(reader, (known, &name, follow.source), shared, move |stream, rest, _, _| {
        failback::follow(stream, rest, follow, for_task)
    })
    .await
}

/// Hands a connection to the arbiter of its source, where `life` runs.
async fn hand_over<F: Future<Output = ()> + Send>(
    reader: FrameReader<Socket>,
    (known, name, id): (Known, &SourceName, SourceId),
    shared: &Arc<Shared>,
    life: impl FnOnce(Socket, BytesMut, Entry, Option<Spoken>) -> F + Send + 'static,
) -> Result<(), Stranger> {
    let Some(entry) = welcome(shared, name) else {
        shared.counters.refused(RefusedCode::UnknownSource);
        return refuse(reader, RefusedCode::UnknownSource, certificates::no_file(name)).await;
    };
    let holder = match known.speaks_for(name, shared) {
        Ok(holder) => holder,
        Err((code, reason, next_step)) => {
            shared.counters.refused(code);
            return refuse_with(reader, code, reason, next_step).await;
        }
    };
    if let Some(reason) = never_here(shared, name, &entry) {
        shared.counters.refused(RefusedCode::UnknownSource);
        let told = refuse_with(reader, RefusedCode::UnknownSource, reason, join_by::NEXT_STEP);
        // It has the time of day in it.
        return told.await.map_err(|told| Stranger { key: format!("join_by of {name}"), ..told });
    }
    let spoken = holder.as_ref().map(|(holder, shown)| Spoken {
        holder: holder.name.clone(),
        certificate: shown.fingerprint,
    });
    if let Some((holder, shown)) = holder.filter(|_| entry.snapshot.load().source == Some(id)) {
        // A copy of a bundle on another machine has another id, and takes nothing from anybody.
        shared.counters.came.with(&holder, shown);
    }
    let (stream, rest) = reader.into_parts();
    let stream = stream.detach().map_err(|error: io::Error| error.to_string())?;
    let arbiter = entry.arbiter;
    let task = async move {
        match stream.attach() {
            Ok(stream) => life(stream, rest, entry, spoken).await,
            Err(error) => tracing::warn!(%error, "connection lost in hand-over"),
        }
    };
    if shared.arbiters.spawn(arbiter, task) {
        Ok(())
    } else {
        Err("the hub is stopping".to_owned().into())
    }
}

/// Why a source that has no id yet does not get one.
fn never_here(shared: &Shared, name: &SourceName, entry: &Entry) -> Option<String> {
    if entry.snapshot.load().source.is_some() {
        return None;
    }
    join_by::too_late(shared.settings.load().get(name)?)
}

async fn refuse(
    reader: FrameReader<Socket>,
    code: RefusedCode,
    reason: String,
) -> Result<(), Stranger> {
    refuse_with(reader, code, reason, next_step(code)).await
}

fn next_step(code: RefusedCode) -> &'static str {
    match code {
        RefusedCode::UnknownSource => "put a file for this source into the hub's sources directory",
        RefusedCode::Busy => "wait, the source tries again",
        RefusedCode::OtherSource => "give it its own certificate: see `mirrorhub onboard`",
        RefusedCode::Version
        | RefusedCode::OtherHub
        | RefusedCode::Generation
        | RefusedCode::Diverged
        | RefusedCode::Gap
        | RefusedCode::Volume
        | RefusedCode::Faulted
        | RefusedCode::Fenced
        | RefusedCode::Protocol => "both ends must run a supported mirrorhub",
    }
}

async fn refuse_with(
    reader: FrameReader<Socket>,
    code: RefusedCode,
    reason: String,
    next_step: &str,
) -> Result<(), Stranger> {
    let refused = Refused { code, reason: reason.clone(), next_step: next_step.to_owned() };
    let mut outgoing = Outgoing::default();
    outgoing.push(Frame::new(&Message::Refused(refused), Bytes::new()));
    let (mut stream, _) = reader.into_parts();
    // The peer may be gone already; its reason is logged by the caller either way.
    let sent = tokio::time::timeout(FLUSH_MAX, async {
        outgoing.write_all(&mut stream).await?;
        stream.shutdown().await
    });
    match sent.await {
        Ok(Ok(())) => Err(reason.into()),
        Ok(Err(error)) => Err(Stranger { reason: format!("{reason} ({error})"), key: reason }),
        Err(_) => Err(Stranger { reason: format!("{reason} (not taken in time)"), key: reason }),
    }
}

/// The life of a connection on its arbiter.
async fn serve(
    stream: Socket,
    rest: BytesMut,
    (number, hello, spoken): (u64, Hello, Option<Spoken>),
    actor: actix::Addr<SourceActor>,
    limit: impl Fn() -> Option<u64>,
) {
    let (mut peer, ends) = peer(number, SEND_QUEUE_FRAMES);
    peer.spoken = spoken;
    let cancel = ends.cancel.clone();
    if actor.send(Connected { hello, peer }).await.is_err() {
        // It died in a panic and is being replaced; the source tries again.
        let reason = "the source's actor is being replaced".to_owned();
        let refused = refuse(FrameReader::new(stream), RefusedCode::Busy, reason).await;
        let reason = refused.err().map(|refused| refused.reason);
        tracing::info!(reason, "connection refused");
        return;
    }
    let (read, write) = stream.into_split();
    let writer = actix::spawn(write_frames(write, ends));
    let mut reader = FrameReader::with_buffer(read, rest);
    let mut pace = Pace::default();
    loop {
        let next = tokio::select! {
            biased;
            () = cancel.cancelled() => break,
            next = tokio::time::timeout(SILENCE_MAX, reader.next()) => next,
        };
        let came =
            next.as_ref().map_or(0, |next| next.as_ref().map_or(0, |(_, bytes)| bytes.len()));
        let wait = limit().map(|limit| pace.after(came, limit, machine::now()));
        let content = match next {
            Err(_) => Content::Gone("silent for too long".to_owned()),
            Ok(next) => content(next),
        };
        let last = matches!(content, Content::Gone(_) | Content::Bad(_));
        let bytes = reader.frame_bytes();
        if actor.send(FrameIn { number, bytes, content }).await.is_err() || last {
            break;
        }
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }
    cancel.cancel();
    if let Err(error) = writer.await {
        tracing::debug!(%error, "writer of a connection ended badly");
    }
}

/// Bytes of a frame beside its payload, about.
const FRAME_BYTES: usize = 64;

/// Holds what is read from a source to so many bytes a second: it is read later, and never dropped. What
/// was not used is not saved up.
#[derive(Debug, Default)]
struct Pace {
    /// What has come is paid for then.
    paid: Option<Instant>,
}

impl Pace {
    /// How long nothing is read after so many bytes have come.
    fn after(&mut self, bytes: usize, limit: u64, now: Instant) -> Duration {
        let nanos =
            u128::from(to_u64(bytes + FRAME_BYTES)) * 1_000_000_000 / u128::from(limit.max(1));
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let paid = self.paid.map_or(now, |paid| paid.max(now)) + cost;
        self.paid = Some(paid);
        paid.saturating_duration_since(now)
    }
}

/// Checks as much of a frame as needs no knowledge of the session.
fn content(next: Result<(Message, Bytes), LinkError>) -> Content {
    match next {
        Ok((Message::Transfer, payload)) => match Transfer::parse(payload) {
            Ok(transfer) => Content::Transfer(transfer),
            Err(error) => Content::Bad(error.to_string()),
        },
        Ok((Message::Updates(updates), payload)) => {
            Content::Updates { cp: updates.cp, volume: updates.volume, payload }
        }
        Ok((Message::Nodes(answer), payload)) => Content::Nodes(answer, payload),
        Ok((Message::Blocks(answer), payload)) => Content::Blocks(answer, payload),
        Ok((Message::PlaceContent(content), payload)) => {
            Content::Place { token: content.token, payload }
        }
        Ok((other, _)) => Content::Other(other),
        Err(LinkError::Frame(error)) => Content::Bad(error.to_string()),
        Err(error) => Content::Gone(error.to_string()),
    }
}

async fn write_frames(mut stream: WriteHalf, ends: PeerEnds) {
    let PeerEnds { mut frames, ack, taken, bell, cancel, ended: _alive } = ends;
    let mut outgoing = Outgoing::default();
    // No Ack leaves before Welcome; the bell that was rung for one keeps until then.
    let mut welcomed = false;
    let take_ack = |outgoing: &mut Outgoing, welcomed: bool| {
        if welcomed && let Some(ack) = lock(&ack).take() {
            outgoing.push(Frame::new(&Message::Ack(ack), Bytes::new()));
        }
        if welcomed && let Some(behind) = lock(&taken).take() {
            outgoing.push(Frame::new(&Message::Behind(behind), Bytes::new()));
        }
    };
    loop {
        tokio::select! {
            // A full socket is not waited for before the rest: both have their turn.
            biased;
            () = cancel.cancelled() => break,
            // A peer that does not read gets nothing more: its frames wait in a bounded queue, and
            // when that is full its connection ends.
            frame = frames.recv(), if outgoing.is_shallow() => {
                // What is acknowledged goes before what builds on it.
                take_ack(&mut outgoing, welcomed);
                let Some(frame) = frame else { break };
                welcomed |= frame.is_welcome;
                outgoing.push(frame);
            }
            () = bell.notified(), if welcomed && outgoing.is_shallow() => {
                take_ack(&mut outgoing, welcomed);
            }
            written = outgoing.write_some(&mut stream), if !outgoing.is_empty() => {
                if written.is_err() {
                    cancel.cancel();
                    return;
                }
            }
        }
        while outgoing.is_shallow() {
            let Ok(frame) = frames.try_recv() else { break };
            take_ack(&mut outgoing, welcomed);
            welcomed |= frame.is_welcome;
            outgoing.push(frame);
        }
    }
    // A reason that was queued is delivered before the connection closes.
    while let Ok(frame) = frames.try_recv() {
        outgoing.push(frame);
    }
    let flush = async {
        outgoing.write_all(&mut stream).await?;
        stream.shutdown().await
    };
    if !matches!(tokio::time::timeout(FLUSH_MAX, flush).await, Ok(Ok(()))) {
        tracing::debug!("connection closed with answers undelivered");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::marks::Place;
    use crate::units::ids::HubId;
    use crate::units::numbers::{CpNumber, Epoch, TransferId};
    use crate::wire::message::{Ack, Pong, Welcome};

    /// Goal: whatever comes in whatever pieces, no more is read in a time than the limit says, and a pause
    /// saves nothing up.
    #[test]
    fn what_is_read_is_held_to_its_rate() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let mut now = start;
        for bytes in [0, 4096, 1 << 20, 100, 1 << 16] {
            now += pace.after(bytes, 1 << 20, now);
        }
        let wanted = f64::from((4096 + (1 << 20) + 100 + (1 << 16)) + 5 * 64) / f64::from(1 << 20);
        let met = (now - start).as_secs_f64();
        assert!((met - wanted).abs() < 0.001, "{met} s, wanted {wanted}");
        let later = now + Duration::from_secs(60);
        let wait = pace.after(1 << 20, 1 << 20, later);
        assert!(wait > Duration::from_millis(990), "a pause was saved up: {wait:?}");
    }

    fn some_ack() -> Ack {
        let id = TransferId { generation: 1, counter: 1 };
        Ack { id, log_credit: 1, cp_taken: 0 }
    }

    fn some_welcome() -> Message {
        Message::Welcome(Welcome {
            version: 1,
            hub: HubId([1; 16]),
            epoch: Epoch::default(),
            applied_cp: CpNumber(0),
            roots: vec![],
            applied: Place::default().into(),
            last: Place::default().into(),
            cp_max: CpNumber(0),
            log_credit: 1,
            cp_credit: 1,
            work: false,
            refused: vec![],
            own_durable: TransferId::NONE,
        })
    }

    /// What an actor says in one turn: heartbeats are answered, which a source that waits for its
    /// Welcome may hear; it welcomes, and its credit changes before anything has left. And one whose
    /// credit changes while the writer has nothing to do.
    #[test]
    fn no_ack_leaves_before_welcome() {
        actix::System::new().block_on(async {
            for (before, waits) in [(0, false), (1, false), (2, false), (0, true), (1, true)] {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let source = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
                let (stream, _) = listener.accept().await.unwrap();
                let (_keep, write) = Socket::Tcp(stream).into_split();
                let (peer, ends) = peer(1, 8);
                let writer = actix::spawn(write_frames(write, ends));
                if waits {
                    peer.acknowledge(some_ack());
                    tokio::task::yield_now().await;
                }
                for token in 0..before {
                    assert!(peer.send(&Message::Pong(Pong { token })));
                }
                assert!(peer.send(&some_welcome()));
                peer.acknowledge(some_ack());
                let (mut reader, mut met) = (FrameReader::new(source), Vec::new());
                for _ in 0..before + 2 {
                    met.push(reader.next().await.unwrap().0.name());
                }
                let mut wanted = vec!["Pong"; usize::try_from(before).unwrap()];
                wanted.extend(["Welcome", "Ack"]);
                assert_eq!(met, wanted);
                drop(peer);
                writer.await.unwrap();
            }
        });
    }

    /// A peer that asks and does not read: what waits for it is bounded, frames and Acks alike.
    #[test]
    fn a_peer_that_does_not_read_is_sent_no_more() {
        actix::System::new().block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let deaf = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let (_keep, write) = Socket::Tcp(stream).into_split();
            let (peer, ends) = peer(1, 4);
            let writer = actix::spawn(write_frames(write, ends));
            let frame = || Frame::new(&Message::Refill, Bytes::from_static(&[7; 65_536]));
            assert!(peer.send(&some_welcome()));
            let mut taken = 1_u32;
            let wait = Duration::from_millis(500);
            while tokio::time::timeout(wait, peer.frames.send(frame())).await.is_ok() {
                taken += 1;
                assert!(taken < 512, "{taken} frames of 64 KiB were taken for a deaf peer");
            }
            peer.acknowledge(some_ack());
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(lock(&peer.ack).is_some(), "an Ack waits where the next one replaces it");
            // It reads at last: everything comes, the Ack first of what was not formed yet.
            let mut reader = FrameReader::new(deaf);
            let mut acked = false;
            let mut read = 0;
            while !acked || read < taken {
                if matches!(reader.next().await.unwrap().0, Message::Ack(_)) {
                    acked = true;
                } else {
                    read += 1;
                }
            }
            drop(peer);
            writer.await.unwrap();
        });
    }
}
