//! The server: takes connections, bounds them, runs each in a task, stops in order.
//!
//! Used by `filer` (volumes) and `hub` (images). One [`Server`] may run several listeners; caps
//! and counters are common to them. A connection that fails, or whose export panics, ends alone.
//! Each end is one line in the log, at debug level.
//!
//! A connection has a place from the first moment. When all are held, one that has not opened an export makes
//! room for the next: who says nothing keeps nobody out, and who reads and writes stays.
//!
//! A stop takes no new connections, answers what still arrives with ESHUTDOWN, lets requests
//! under way finish, and closes; what is not done by then within the drain deadline is cut.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::net::TcpStream;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::budget::Pot;
use super::counters::Counters;
use super::end::End;
use super::export::Exports;
use super::handshake::{haggle, negotiate};
use super::intake::discard;
use super::listen::{Accepted, Listener};
use super::protocol::option::ClientFlags;
use super::tls::{Upgrade, upgrade};
use super::transmission::{self, Surroundings, hang_up};
use crate::limits::{
    HANDSHAKE_SECONDS_MAX, HANDSHAKES_MAX, NBD_BYTES_IN_FLIGHT_TOTAL, NBD_CONNECTIONS_MAX,
    NBD_DRAIN_SECONDS_MAX, NBD_LINGER_SECONDS_MAX, NBD_STALL_SECONDS_MAX, NBD_UPGRADE_GRACE_MS,
};
use crate::units::entrance::{self, Entrance};
use crate::units::numbers::ByteCount;

/// Read ahead of the requests of one connection. Longer payloads are read past it, straight into
/// their place.
const READ_AHEAD_BYTES: usize = 16 * 1024;
/// Pause after the kernel had no socket for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Whose connections over TCP are taken in the clear.
pub trait Guard: std::fmt::Debug + Send + Sync {
    /// Whether a client from there is; one that is not was told of, and is hung up on. Called within a
    /// tokio runtime.
    fn admits(&self, peer: SocketAddr) -> bool;
}

/// Who is told that there is no room for a client.
pub trait Told: std::fmt::Debug + Send + Sync {
    /// A client from there was closed for that. Called within a tokio runtime.
    fn refused(&self, peer: &str, reason: &str);
}

/// Bounds of a server.
#[derive(Debug, Clone)]
pub struct Options {
    /// From connecting to the first request.
    pub handshake_deadline: Duration,
    /// For a request or the replies that wait, besides the time of their bytes.
    pub stall_deadline: Duration,
    /// From a stop to the end of requests under way.
    pub drain_deadline: Duration,
    /// What a client is given to take the last replies when we hang up.
    pub linger: Duration,
    /// Connections at once. For a further one another that has opened no export yet is closed; if there is
    /// none, itself.
    pub connections_max: usize,
    /// Bytes of requests and replies in memory, all connections together.
    pub bytes_in_flight: ByteCount,
    /// TLS handshakes at once; for a further one another that goes on for long makes room.
    pub upgrades_max: usize,
    /// What is not yet long for that.
    pub upgrade_grace: Duration,
    /// How connections over TCP are encrypted; those of unix sockets are not.
    pub tls: Option<Arc<dyn Upgrade>>,
    /// Whose connections over TCP are taken; all without one.
    pub guard: Option<Arc<dyn Guard>>,
    /// Who is told of those for whom there is no room.
    pub told: Option<Arc<dyn Told>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            handshake_deadline: Duration::from_secs(HANDSHAKE_SECONDS_MAX),
            stall_deadline: Duration::from_secs(NBD_STALL_SECONDS_MAX),
            drain_deadline: Duration::from_secs(NBD_DRAIN_SECONDS_MAX),
            linger: Duration::from_secs(NBD_LINGER_SECONDS_MAX),
            connections_max: NBD_CONNECTIONS_MAX,
            bytes_in_flight: ByteCount(NBD_BYTES_IN_FLIGHT_TOTAL),
            upgrades_max: HANDSHAKES_MAX,
            upgrade_grace: Duration::from_millis(NBD_UPGRADE_GRACE_MS),
            tls: None,
            guard: None,
            told: None,
        }
    }
}

/// An NBD server. Clones are the same server.
#[derive(Debug, Clone)]
pub struct Server {
    options: Arc<Options>,
    counters: Arc<Counters>,
    places: Arc<Entrance>,
    upgrades: Arc<Entrance>,
    memory: Pot,
}

impl Server {
    /// A server that listens nowhere yet.
    pub fn new(options: Options) -> Self {
        Self {
            counters: Arc::new(Counters::default()),
            places: Arc::new(Entrance::new(options.connections_max, 0)),
            upgrades: Arc::new(Entrance::new(options.upgrades_max, 0)),
            memory: Pot::new(options.bytes_in_flight.0),
            options: Arc::new(options),
        }
    }

    /// What it counts.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Bytes of requests and replies in memory at the moment.
    pub fn bytes_in_flight(&self) -> ByteCount {
        ByteCount(self.memory.taken())
    }

    /// Serves until `stopping` is cancelled and all is done that was begun.
    pub async fn run(
        &self,
        listener: Listener,
        exports: Arc<dyn Exports>,
        stopping: CancellationToken,
    ) {
        tracing::info!("serving nbd on {}", listener.listens_on());
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stopping.cancelled() => break,
                Some(result) = connections.join_next(), if !connections.is_empty() => {
                    self.joined(result);
                }
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => self.admit(accepted, &exports, &stopping, &mut connections),
                    Err(error) => self.no_socket(&error, &mut connections).await,
                },
            }
        }
        drop(listener);
        self.drain(connections).await;
    }

    /// Out of descriptors or memory, most likely: the pause keeps us from asking in a circle, and
    /// a connection that ends shortens it.
    async fn no_socket(&self, error: &io::Error, connections: &mut JoinSet<()>) {
        tracing::warn!("cannot take an nbd connection: {error}");
        tokio::select! {
            Some(result) = connections.join_next(), if !connections.is_empty() => {
                self.joined(result);
            }
            () = sleep(ACCEPT_PAUSE) => (),
        }
    }

    fn admit(
        &self,
        accepted: Accepted,
        exports: &Arc<dyn Exports>,
        stopping: &CancellationToken,
        connections: &mut JoinSet<()>,
    ) {
        if let (Accepted::Tcp(_, peer), Some(guard)) = (&accepted, &self.options.guard)
            && !guard.admits(*peer)
        {
            self.counters.turned_away();
            return;
        }
        let (address, peer) = match &accepted {
            Accepted::Tcp(_, peer) => (Some(peer.ip()), peer.to_string()),
            Accepted::Unix(_) => (None, "unix socket".to_owned()),
        };
        let Some(place) = Place::take(self, address) else {
            self.no_room(&peer, "all places are held by clients that have opened an export");
            return;
        };
        let (server, exports, stopping) =
            (self.clone(), Arc::clone(exports), stopping.child_token());
        let caller = Caller { peer, exports, stopping, place };
        match accepted {
            Accepted::Tcp(stream, peer) => connections.spawn(async move {
                match server.options.tls.clone() {
                    Some(tls) => server.encrypted(stream, peer.ip(), tls.as_ref(), caller).await,
                    None => {
                        let (reader, writer) = stream.into_split();
                        server.connection(reader, writer, caller, None).await;
                    }
                }
            }),
            Accepted::Unix(stream) => connections.spawn(async move {
                let (reader, writer) = stream.into_split();
                server.connection(reader, writer, caller, None).await;
            }),
        };
    }

    /// Counts and tells of a client for whom there is no room, or not any more.
    fn no_room(&self, peer: &str, reason: &str) {
        self.counters.refused();
        if let Some(told) = &self.options.told {
            told.refused(peer, reason);
        }
    }

    /// One connection that says nothing of worth before it is encrypted.
    async fn encrypted(
        &self,
        stream: TcpStream,
        address: IpAddr,
        tls: &dyn Upgrade,
        caller: Caller,
    ) {
        let begun = Instant::now();
        let deadline = self.options.handshake_deadline;
        let turns = (&self.upgrades, self.options.upgrade_grace);
        let upgrade = upgrade(stream, address, tls, turns);
        let end = tokio::select! {
            upgraded = timeout(deadline, upgrade) => match upgraded {
                Ok(Ok((stream, flags))) => {
                    let (reader, writer) = tokio::io::split(stream);
                    let left = deadline.saturating_sub(begun.elapsed());
                    return self.connection(reader, writer, caller, Some((flags, left))).await;
                }
                Ok(Err(end)) => end,
                Err(_) => End::HandshakeDeadline(deadline),
            },
            () = caller.place.lost() => End::MadeRoom,
            () = caller.stopping.cancelled() => End::Stopped,
        };
        if end.is_protocol_error() {
            tls.refused(&caller.peer, &end.to_string());
        }
        self.ended(&caller.peer, None, &end);
    }

    /// One connection, from the greeting to its end; from behind it, with the client's flags and what
    /// is left of the time, if it was upgraded.
    async fn connection<R, W>(
        &self,
        reader: R,
        mut writer: W,
        caller: Caller,
        upgraded: Option<(ClientFlags, Duration)>,
    ) where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let Caller { peer, exports, stopping, mut place } = caller;
        let mut reader = BufReader::with_capacity(READ_AHEAD_BYTES, reader);
        let mut deadline = self.options.handshake_deadline;
        if let Some((_, left)) = upgraded {
            deadline = left;
        }
        let handshake = async {
            match upgraded {
                None => negotiate(&mut reader, &mut writer, exports.as_ref(), &stopping).await,
                Some((flags, _)) => {
                    let both = (&mut reader, &mut writer);
                    haggle(both, (flags, true), exports.as_ref(), &stopping).await
                }
            }
        };
        let opened = tokio::select! {
            negotiated = timeout(deadline, handshake) => negotiated
                .unwrap_or(Err(End::HandshakeDeadline(self.options.handshake_deadline))),
            () = place.lost() => Err(End::MadeRoom),
        };
        let (name, end) = match opened {
            Ok(_) if !place.enter() => (None, End::MadeRoom),
            Err(end @ (End::HandshakeDeadline(_) | End::MadeRoom)) => (None, end),
            Err(end) => {
                let rest = discard(&mut reader);
                tokio::select! {
                    () = hang_up(&mut writer, rest, &end, self.options.linger) => (),
                    () = place.lost() => (),
                }
                (None, end)
            }
            Ok(opened) => {
                let name = opened.export.info().name.clone();
                let surroundings = Surroundings {
                    memory: &self.memory,
                    counters: &self.counters,
                    stall: self.options.stall_deadline,
                    linger: self.options.linger,
                    stopping: &stopping,
                };
                let end = transmission::serve(reader, &mut writer, opened, surroundings).await;
                (Some(name), end)
            }
        };
        self.ended(&peer, name.as_deref(), &end);
    }

    fn ended(&self, peer: &str, export: Option<&str>, end: &End) {
        if end.is_protocol_error() {
            self.counters.protocol_error();
        }
        if matches!(end, End::MadeRoom) {
            self.no_room(peer, &end.to_string());
        }
        let export = export.unwrap_or("-");
        tracing::debug!(%peer, export, "nbd connection ended: {end}");
    }

    fn joined(&self, result: Result<(), JoinError>) {
        if let Err(error) = result {
            // An abort is ours, at the end of a stop, and is logged there.
            if error.is_panic() {
                self.counters.panicked();
                tracing::error!("an nbd connection panicked: {error}");
            }
        }
    }

    async fn drain(&self, mut connections: JoinSet<()>) {
        let all = async {
            while let Some(result) = connections.join_next().await {
                self.joined(result);
            }
        };
        if timeout(self.options.drain_deadline, all).await.is_err() {
            let left = connections.len();
            tracing::warn!(
                "cutting {left} nbd connections: requests not done within {:?} of the stop",
                self.options.drain_deadline
            );
            connections.shutdown().await;
        }
    }
}

/// What belongs to one connection.
struct Caller {
    peer: String,
    exports: Arc<dyn Exports>,
    stopping: CancellationToken,
    place: Place,
}

/// A connection's place among those allowed; counted as long as it lives, also if its task
/// panics.
struct Place {
    counters: Arc<Counters>,
    place: entrance::Place,
}

impl Place {
    fn take(server: &Server, address: Option<IpAddr>) -> Option<Self> {
        let place = server.places.admit(address)?;
        server.counters.opened();
        Some(Self { counters: Arc::clone(&server.counters), place })
    }

    async fn lost(&self) {
        self.place.lost().await;
    }

    fn enter(&mut self) -> bool {
        self.place.enter()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.counters.closed();
    }
}
