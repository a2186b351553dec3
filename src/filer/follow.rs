//! What a fenced source does: it follows the hub, until the hub gives its volumes back (R12, R14).
//!
//! Run by the life of a [`super::Filer`] where its forwarder has ended with a fence. It connects with
//! `Follow`, again and again, serves nobody, and does what the hub says:
//!
//! 1. `PullTarget`: the hub's CP is pulled by comparison with the own trees, its roots are proven, and
//!    it is published here under the hub's number and place; then `Reached`.
//! 2. `TakeOver`: epoch and the end of the fence are recorded in one commit. Then the source starts
//!    anew in this process, behind that CP, and says Hello.
//!
//! Before the first of these the own NVRAM is given up: what it holds is of a line that has ended.
//! The engine is at rest then, and the ring is made anew durably before anything is published, so
//! that a restart never meets a ring and a pool of two lines. The hub asks for that only where
//! everything acknowledged is in its own image, or an administrator has said so: then what this
//! source has written by itself becomes an own CP first, which is kept by name.
//!
//! A cut at any step leaves a fenced source: it follows again. Blocks, on a thread of its own.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::checkpoint::pin_all;
use super::forwarder::{ForwardOptions, tune};
use super::keeper::Kept;
use super::recover::Store;
use super::shared::{LinkState, Shared};
use super::signals::CpOver;
use crate::link::{FrameReader, LinkError, Outgoing};
use crate::nvlog::{Ring, RingError, RingShape};
use crate::pool::error::PoolError;
use crate::pool::publish::Publish;
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::write_set::{Budget, WriteSet};
use crate::record::marks::Place;
use crate::session::CP_NUMBER_MAX;
use crate::units::names::KeptName;
use crate::units::numbers::{CpNumber, Epoch};
use crate::volume::error::VolumeError;
use crate::volume::pull::cp::{CpPuller, Step, VolumeTarget};
use crate::volume::pull::error::PullError;
use crate::volume::pull::own::PoolTree;
use crate::volume::pull::terms::Window;
use crate::volume::writer::TreeWriter;
use crate::wire::message::{
    Follow, Frame, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Pong, PullTarget, Reached,
    Refused, RefusedCode, TakeOver,
};

/// How long the hub may be silent: it says something each second.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// How often it is looked whether an own CP is published.
const TICK: Duration = Duration::from_millis(20);
/// How long a good-bye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    /// The source stops.
    #[error("the source is being stopped")]
    Stopped,
    /// To be made anew.
    #[error("{0}")]
    Lost(String),
    /// The pull.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// The own pool.
    #[error("the own pool: {0}")]
    Pool(#[from] PoolError),
    /// The own trees.
    #[error("the own trees: {0}")]
    Volume(#[from] VolumeError),
    /// The own NVRAM.
    #[error("the own NVRAM: {0}")]
    Ring(#[from] RingError),
}

impl From<LinkError> for End {
    fn from(error: LinkError) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<std::io::Error> for End {
    fn from(error: std::io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

/// A fenced source.
pub(super) struct Follower {
    /// Its parts.
    pub(super) shared: Arc<Shared>,
    /// Where its hub is.
    pub(super) forward: ForwardOptions,
    /// Its NVRAM.
    pub(super) nvram: Store,
    /// How that is made anew.
    pub(super) ring_shape: RingShape,
    /// Ends the threads of its engine. Blocks.
    pub(super) rest: Box<dyn Fn() + Send + Sync>,
    /// Cancelled when the source stops.
    pub(super) stopping: CancellationToken,
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("source", &self.shared.name).finish_non_exhaustive()
    }
}

impl Follower {
    /// Follows until the volumes were given back: true; or until the source stops.
    pub(super) async fn run(self) -> bool {
        let (shared, stopping) = (Arc::clone(&self.shared), self.stopping.clone());
        let _guard = shared.fail_on_panic("the follower panicked");
        let backoff = self.forward.backoff;
        let (hub, patience) = (self.forward.hub, self.shared.pledge.patience());
        let mut pause = backoff.least;
        let mut following = Following { follower: self, given_up: false };
        loop {
            let connect = tokio::time::timeout(patience, TcpStream::connect(hub));
            let connected = tokio::select! {
                () = stopping.cancelled() => return false,
                connected = connect => connected,
            };
            let end = match connected {
                Err(_) => End::Lost(format!("hub {hub} does not answer")),
                Ok(Err(error)) => End::Lost(format!("cannot reach hub {hub}: {error}")),
                Ok(Ok(stream)) => {
                    let handle = Handle::current();
                    let session = tokio::task::spawn_blocking(move || {
                        let end = following.session(stream, handle);
                        (following, end)
                    });
                    let Ok((back, end)) = session.await else {
                        shared.fail("the follower panicked");
                        return false;
                    };
                    following = back;
                    match end {
                        Ok(()) => return true,
                        Err(end) => end,
                    }
                }
            };
            if matches!(end, End::Stopped) {
                return false;
            }
            tracing::info!(source = %shared.name, %end, "follows");
            say(&shared, &end.to_string());
            tokio::select! {
                () = stopping.cancelled() => return false,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(backoff.most);
        }
    }
}

/// Shows what goes on.
fn say(shared: &Shared, what: &str) {
    let epoch = shared.fenced().unwrap_or_default().number;
    let reason = format!("another end is primary since epoch {epoch}; {what}");
    let next_step =
        format!("`mirrorhub failback {}` on the hub gives the volumes back", shared.name);
    shared.set_link(LinkState::Halted(Refused { code: RefusedCode::Fenced, reason, next_step }));
}

/// The follower between two connections.
struct Following {
    follower: Follower,
    /// The own NVRAM was given up, the engine is at rest.
    given_up: bool,
}

/// A connection.
struct Wire<'a> {
    reader: FrameReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
    handle: Handle,
    stopping: &'a CancellationToken,
    /// Requests are numbered on from here.
    number: u64,
}

impl Wire<'_> {
    fn send(&mut self, message: &Message) -> Result<(), End> {
        let mut outgoing = Outgoing::default();
        outgoing.push(Frame::new(message, Bytes::new()));
        let (write, stopping) = (&mut self.write, self.stopping);
        self.handle.block_on(async {
            let all = async {
                while !outgoing.is_empty() {
                    outgoing.write_some(write).await?;
                }
                Ok::<_, std::io::Error>(())
            };
            tokio::select! {
                () = stopping.cancelled() => Err(End::Stopped),
                sent = tokio::time::timeout(SILENCE_MAX, all) => match sent {
                    Ok(sent) => Ok(sent?),
                    Err(_) => Err(End::Lost("the hub takes nothing".to_owned())),
                },
            }
        })
    }

    /// The next frame that is no heartbeat.
    fn next(&mut self) -> Result<(Message, Bytes), End> {
        loop {
            let (reader, stopping) = (&mut self.reader, self.stopping);
            let next = self.handle.block_on(async {
                tokio::select! {
                    () = stopping.cancelled() => Err(End::Stopped),
                    next = tokio::time::timeout(SILENCE_MAX, reader.next()) => match next {
                        Ok(next) => Ok(next?),
                        Err(_) => Err(End::Lost("the hub is silent".to_owned())),
                    },
                }
            });
            let (message, payload) = next?;
            if let Message::Ping(ping) = message {
                self.send(&Message::Pong(Pong { token: ping.token }))?;
            } else if let Message::Refused(refused) = message {
                return Err(End::Lost(refused.reason));
            } else if let Message::Going(going) = message {
                return Err(End::Lost(going.reason));
            } else {
                return Ok((message, payload));
            }
        }
    }

    /// Tells the hub why this end goes.
    fn leave(&mut self, end: &End) {
        let going = crate::wire::message::Going { reason: end.to_string() };
        let mut outgoing = Outgoing::default();
        outgoing.push(Frame::new(&Message::Going(going), Bytes::new()));
        let write = &mut self.write;
        let goodbye = async {
            while !outgoing.is_empty() {
                outgoing.write_some(write).await?;
            }
            write.shutdown().await
        };
        // The hub learns of the end in any case.
        drop(self.handle.block_on(async { tokio::time::timeout(GOODBYE, goodbye).await }));
    }
}

impl Following {
    fn shared(&self) -> &Arc<Shared> {
        &self.follower.shared
    }

    /// One connection; `Ok` once the volumes were given back.
    fn session(&mut self, stream: TcpStream, handle: Handle) -> Result<(), End> {
        tune(&stream)?;
        let (read, write) = stream.into_split();
        let stopping = self.follower.stopping.clone();
        let reader = FrameReader::new(read);
        let mut wire = Wire { reader, write, handle, stopping: &stopping, number: 1 };
        let ended = self.follow(&mut wire);
        if let Err(end) = &ended {
            wire.leave(end);
        }
        ended
    }

    fn follow(&mut self, wire: &mut Wire<'_>) -> Result<(), End> {
        let follow = self.introduce()?;
        wire.send(&Message::Follow(Box::new(follow)))?;
        say(self.shared(), "its hub knows that it is here");
        loop {
            let (message, _) = wire.next()?;
            if let Message::PullTarget(target) = message {
                self.pull(wire, &target)?;
                wire.send(&Message::Reached(Reached { cp: target.cp }))?;
                say(self.shared(), &format!("CP {} of the hub is here", target.cp));
            } else if let Message::TakeOver(take) = message {
                return self.take_over(&take);
            } else {
                return Err(End::Lost(format!("{} is out of place", message.name())));
            }
        }
    }

    fn row(&self) -> Result<(SourceRow, Kept), End> {
        Ok(self.shared().kept()?)
    }

    fn introduce(&self) -> Result<Follow, End> {
        let shared = self.shared();
        let (row, kept) = self.row()?;
        let own = place(&row, &kept);
        let figures = shared.order.figures();
        // What was given up is not here any more.
        let last = if self.given_up { own.sequence } else { figures.sequence };
        let cp_max = row.highest_cp.max(row.applied).max(figures.open_cp);
        Ok(Follow {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION_MIN,
            name: shared.name.clone(),
            source: shared.source,
            hub: kept.hub,
            generation: shared.generation,
            epoch: row.epoch,
            fenced: kept.fenced.unwrap_or_default(),
            volumes: shared.volumes.clone(),
            own_cp: row.applied,
            own: own.into(),
            last,
            cp_max,
            policy: shared.pledge.in_force(),
            alone: kept.alone,
        })
    }

    /// Brings the own trees to the target's and publishes them as that CP.
    fn pull(&mut self, wire: &mut Wire<'_>, target: &PullTarget) -> Result<(), End> {
        let (row, kept) = self.row()?;
        let volumes = self.shared().pool.catalog().volumes(self.shared().source)?;
        let agrees = volumes.len() == target.volumes.len()
            && volumes
                .iter()
                .zip(&target.volumes)
                .all(|(own, there)| (own.key.volume, own.tree.size) == (there.volume, there.size));
        if !agrees {
            return Err(End::Lost("the hub's volumes are not those of this source".to_owned()));
        }
        let is_root = |(own, there): (&VolumeRow, &crate::wire::message::PullVolume)| {
            own.tree.root() == there.root
        };
        let here = volumes.iter().zip(&target.volumes).all(is_root);
        let same = row.applied == target.cp && place(&row, &kept) == Place::from(target.place);
        if same && here {
            return self.give_up();
        }
        if target.cp <= row.applied || target.cp > CP_NUMBER_MAX {
            let own = row.applied;
            return Err(End::Lost(format!("CP {} cannot follow CP {own} here", target.cp)));
        }
        if let Some(name) = &target.keep {
            self.keep_own(wire, name)?;
        }
        self.give_up()?;
        // What was kept may have become a CP just now.
        let own = self.row()?.0.applied;
        if target.cp <= own {
            return Err(End::Lost(format!("CP {} cannot follow CP {own} here", target.cp)));
        }
        let volumes = self.shared().pool.catalog().volumes(self.shared().source)?;
        self.build(wire, target, &volumes)
    }

    fn build(
        &self,
        wire: &mut Wire<'_>,
        target: &PullTarget,
        volumes: &[VolumeRow],
    ) -> Result<(), End> {
        let shared = self.shared();
        let mut set = shared.pool.begin(Budget::Reserve);
        let mut wanted = Vec::with_capacity(volumes.len());
        for (own, there) in volumes.iter().zip(&target.volumes) {
            let tree = PoolTree::new(&shared.pool, own.tree)?;
            let (size, root) = (there.size, there.root);
            wanted.push(VolumeTarget { volume: there.volume, size, root, own: tree });
        }
        let mut puller = CpPuller::new(target.cp, wanted, Window::default(), wire.number)?;
        let mut trees = Vec::new();
        for (own, there) in volumes.iter().zip(&target.volumes) {
            let writer = TreeWriter::new(&shared.pool, &mut set, own.key, own.tree, target.cp)?;
            let tree = pull_volume(wire, &mut puller, writer)?;
            if tree.root() != there.root {
                let reason =
                    format!("volume {} came to root {}, not {}", own.name, tree.root(), there.root);
                return Err(End::Lost(reason));
            }
            if tree != own.tree {
                trees.push((there.volume, tree));
            }
        }
        if !puller.is_finished() {
            return Err(End::Lost("the pull did not end with its volumes".to_owned()));
        }
        wire.number += puller.counters().requests;
        self.publish(target, set, trees)
    }

    fn publish(
        &self,
        target: &PullTarget,
        write_set: WriteSet,
        volumes: Vec<(crate::units::numbers::VolumeNumber, crate::pool::pointer::TreeRoot)>,
    ) -> Result<(), End> {
        let shared = self.shared();
        let place = Place::from(target.place);
        let _one = shared.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let (row, kept) = self.row()?;
        // From this CP on the state is of the hub's line: nothing in it was written alone.
        let kept = Kept { transfer: place.transfer, alone: None, ..kept };
        let extension = shared.keep(&row, &kept)?;
        let published = shared.pool.publish(Publish {
            write_set,
            source: shared.source,
            cp: target.cp,
            sequence: place.sequence,
            stream_hash: place.hash,
            epoch: row.epoch,
            generation: None,
            extension: Some(extension),
            volumes,
        })?;
        let pins = pin_all(shared)?;
        shared.set_own(target.cp, published.roots, pins);
        tracing::info!(source = %shared.name, cp = %target.cp, "CP of the hub published here");
        Ok(())
    }

    /// What only the NVRAM holds becomes an own CP, and the last own CP is kept by name.
    fn keep_own(&self, wire: &Wire<'_>, name: &KeptName) -> Result<(), End> {
        let shared = self.shared();
        let until = Instant::now() + self.follower.shared.pledge.patience().max(SILENCE_MAX);
        let mut forced = None;
        while let Some(target) = shared.order.target() {
            if self.given_up || shared.failed().is_some() || Instant::now() > until {
                let reason = "what this source wrote by itself cannot be made a CP";
                return Err(End::Lost(reason.to_owned()));
            }
            match shared.order.frozen() {
                // Nobody else will say that it is over.
                Some(frozen) if shared.own().0 >= frozen.cp => {
                    shared.checkpoint.done(CpOver { cp: frozen.cp, alone: true });
                }
                Some(_) => {}
                None if forced != Some(target) => {
                    forced = Some(target);
                    shared.checkpoint.force();
                }
                None => {}
            }
            wire.handle.block_on(tokio::time::sleep(TICK));
        }
        if shared.own().0 > CpNumber(0) {
            let kept = shared.pool.keep(shared.source, name.clone())?;
            tracing::warn!(source = %shared.name, %name, cp = %kept.cp, "own writes are kept");
        }
        Ok(())
    }

    /// The engine comes to rest, and its NVRAM is made anew, durably.
    fn give_up(&mut self) -> Result<(), End> {
        if self.given_up {
            return Ok(());
        }
        let Follower { shared, nvram, ring_shape, rest, .. } = &self.follower;
        rest();
        // A cut between finds a source whose NVRAM was never made: it is made, or the ring that is
        // still there is taken, which is of one line with the pool until something is published.
        shared.note(|kept| kept.nvram_made = false)?;
        Ring::erase(&*nvram.device)?;
        Ring::create(Arc::clone(&nvram.device), shared.source.0, *ring_shape)?;
        shared.note(|kept| kept.nvram_made = true)?;
        self.given_up = true;
        Ok(())
    }

    /// Records that this source is primary again (R14: the hub has recorded it before).
    fn take_over(&mut self, take: &TakeOver) -> Result<(), End> {
        self.give_up()?;
        let shared = self.shared();
        let _one = shared.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let (row, kept) = self.row()?;
        let fenced = kept.fenced.unwrap_or_default();
        if row.applied != take.cp || place(&row, &kept) != Place::from(take.place) {
            let own = row.applied;
            let reason = format!("the hub gives back CP {}, here is CP {own}", take.cp);
            return Err(End::Lost(reason));
        }
        let Epoch { number, .. } = take.epoch;
        if number <= row.epoch.number || number < fenced.number {
            let (own, fenced) = (row.epoch.number, fenced.number);
            let reason = format!("epoch {number} is given here, after {own} and {fenced}");
            return Err(End::Lost(reason));
        }
        let extension = shared.keep(&row, &Kept { fenced: None, alone: None, ..kept })?;
        let TakeOver { epoch, generation, .. } = *take;
        shared.pool.catalog().update_source(shared.source, move |row| {
            row.epoch = epoch;
            row.generation.number = row.generation.number.max(generation);
            row.extension = extension;
        })?;
        tracing::warn!(source = %shared.name, epoch = number, cp = %take.cp, "primary again");
        Ok(())
    }
}

/// Writes all that a volume lacks.
fn pull_volume(
    wire: &mut Wire<'_>,
    puller: &mut CpPuller<PoolTree>,
    mut writer: TreeWriter<'_>,
) -> Result<crate::pool::pointer::TreeRoot, End> {
    loop {
        match puller.next_step()? {
            Some(Step::Put(_, put)) => put.write(&mut writer)?,
            Some(Step::Done(_)) => return Ok(writer.finish()?),
            None => {
                for ask in puller.asks() {
                    wire.send(&ask)?;
                }
                let (message, payload) = wire.next()?;
                if let Message::Nodes(answer) = message {
                    puller.nodes(&answer, &payload)?;
                } else if let Message::Blocks(answer) = message {
                    puller.blocks(&answer, &payload)?;
                } else {
                    return Err(End::Lost(format!("{} came in a pull", message.name())));
                }
            }
        }
    }
}

/// The place of the published CP.
fn place(row: &SourceRow, kept: &Kept) -> Place {
    Place { transfer: kept.transfer, sequence: row.sequence, hash: row.stream_hash }
}
