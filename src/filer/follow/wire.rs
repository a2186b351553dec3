//! The connection of a source that follows: made again and again, read and written by a thread.
//!
//! Used by a fenced source ([`super`]) and by a new filer ([`crate::filer::newcomer`]). A session blocks on
//! its connection; whoever stops the source ends it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::filer::adopt::AdoptError;
use crate::filer::forwarder::ForwardOptions;
use crate::filer::recover::Store;
use crate::filer::shared::Shared;
use crate::link::socket::{ReadHalf, Socket, WriteHalf};
use crate::link::{FrameReader, LinkError, Outgoing};
use crate::nvlog::{RingError, RingShape};
use crate::pool::error::PoolError;
use crate::units::machine;
use crate::volume::error::VolumeError;
use crate::volume::pull::error::PullError;
use crate::wire::message::{Frame, Going, Message, Pong, Refused};

/// How long the hub may be silent: it says something each second.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(15);
/// How long a good-bye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(in crate::filer) enum End {
    /// The source stops.
    #[error("the source is being stopped")]
    Stopped,
    /// To be made anew.
    #[error("{0}")]
    Lost(String),
    /// The hub says why not, and what to do.
    #[error("{}", .0.reason)]
    Refused(Refused),
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
    /// What the hub asks for cannot be.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
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

/// A source that serves nobody, and what it needs to become one that does.
pub(in crate::filer) struct Idle {
    /// Its parts.
    pub(in crate::filer) shared: Arc<Shared>,
    /// Where its hub is.
    pub(in crate::filer) forward: ForwardOptions,
    /// Its NVRAM.
    pub(in crate::filer) nvram: Store,
    /// How that is made anew.
    pub(in crate::filer) ring_shape: RingShape,
    /// Ends the threads of its engine. Blocks.
    pub(in crate::filer) rest: Box<dyn Fn() + Send + Sync>,
    /// Cancelled when the source stops.
    pub(in crate::filer) stopping: CancellationToken,
}

impl std::fmt::Debug for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Idle").field("source", &self.shared.name).finish_non_exhaustive()
    }
}

impl Idle {
    /// Its connections, one after the other; `say` shows what goes on.
    pub(in crate::filer) fn life(&self, say: Say) -> Life {
        let Self { shared, forward, stopping, .. } = self;
        let (shared, forward, stopping) = (Arc::clone(shared), forward.clone(), stopping.clone());
        Life { shared, forward, stopping, say }
    }
}

/// Shows why there is no session, and what to do if the hub has said that.
pub(in crate::filer) type Say = fn(&Shared, &str, Option<&str>);

/// Connections, one after the other.
pub(in crate::filer) struct Life {
    shared: Arc<Shared>,
    forward: ForwardOptions,
    stopping: CancellationToken,
    say: Say,
}

impl Life {
    /// Connects until a session has come to its end; `None` if the source stops before, or has
    /// failed.
    pub(in crate::filer) async fn until_done<S: Send + 'static, T: Send + 'static>(
        self,
        mut state: S,
        session: fn(&mut S, &mut Wire) -> Result<T, End>,
    ) -> Option<T> {
        let Self { shared, forward, stopping, say } = self;
        let _guard = shared.fail_on_panic("the follower panicked");
        let (hub, patience) = (forward.hub, shared.pledge.patience());
        let mut pause = forward.backoff.least;
        loop {
            let connect =
                tokio::time::timeout(patience, Socket::connect(hub, forward.tls.as_deref()));
            let connected = tokio::select! {
                biased;
                () = stopping.cancelled() => return None,
                connected = connect => connected,
            };
            let end = match connected {
                Err(_) => End::Lost(format!("hub {hub} does not answer")),
                Ok(Err(error)) => End::Lost(format!("cannot reach hub {hub}: {error}")),
                Ok(Ok(stream)) => {
                    let (handle, stopping) = (Handle::current(), stopping.clone());
                    let connection = machine::blocking(move || {
                        let end = Wire::new(stream, handle, stopping).and_then(|mut wire| {
                            let ended = session(&mut state, &mut wire);
                            ended.inspect_err(|end| wire.leave(end))
                        });
                        (state, end)
                    });
                    let Ok((back, end)) = connection.await else {
                        shared.fail("the follower panicked");
                        return None;
                    };
                    state = back;
                    match end {
                        Ok(done) => return Some(done),
                        Err(end) => end,
                    }
                }
            };
            if matches!(end, End::Stopped) || has_failed(&shared, &end) {
                return None;
            }
            tracing::info!(source = %shared.name, %end, "follows");
            let next =
                if let End::Refused(refused) = &end { Some(&*refused.next_step) } else { None };
            say(&shared, &end.to_string(), next);
            tokio::select! {
                biased;
                () = stopping.cancelled() => return None,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(forward.backoff.most);
        }
    }
}

/// Whether the source can follow no more before somebody has acted: the first error of a store
/// latches (invariant 7), and with each connection it would only be met again.
fn has_failed(shared: &Shared, end: &End) -> bool {
    if let Some(error) = shared.pool.first_error() {
        shared.fail(&format!("the own pool failed: {error}"));
    } else if let End::Ring(error) = end {
        shared.fail(&format!("the own NVRAM failed: {error}"));
    }
    shared.failed().is_some()
}

/// A connection.
pub(in crate::filer) struct Wire {
    reader: FrameReader<ReadHalf>,
    write: WriteHalf,
    pub(in crate::filer) handle: Handle,
    stopping: CancellationToken,
    /// Requests are numbered on from here.
    pub(in crate::filer) number: u64,
}

impl Wire {
    /// A connection that was just made.
    fn new(stream: Socket, handle: Handle, stopping: CancellationToken) -> Result<Self, End> {
        stream.tune()?;
        let (read, write) = stream.into_split();
        Ok(Self { reader: FrameReader::new(read), write, handle, stopping, number: 1 })
    }

    /// Sends a message without a payload.
    pub(in crate::filer) fn send(&mut self, message: &Message) -> Result<(), End> {
        let mut outgoing = Outgoing::default();
        outgoing.push(Frame::new(message, Bytes::new()));
        let (write, stopping) = (&mut self.write, &self.stopping);
        machine::block_on(&self.handle, async {
            tokio::select! {
                // Who is stopped says nothing more, whatever is ready.
                biased;
                () = stopping.cancelled() => Err(End::Stopped),
                sent = tokio::time::timeout(SILENCE_MAX, outgoing.write_all(write)) => match sent {
                    Ok(sent) => Ok(sent?),
                    Err(_) => Err(End::Lost("the hub takes nothing".to_owned())),
                },
            }
        })
    }

    /// The next frame that is no heartbeat.
    pub(in crate::filer) fn next(&mut self) -> Result<(Message, Bytes), End> {
        loop {
            let (reader, stopping) = (&mut self.reader, &self.stopping);
            let next = machine::block_on(&self.handle, async {
                tokio::select! {
                    biased;
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
                return Err(End::Refused(refused));
            } else if let Message::Going(going) = message {
                return Err(End::Lost(going.reason));
            } else {
                return Ok((message, payload));
            }
        }
    }

    /// Tells the hub why this end goes.
    fn leave(&mut self, end: &End) {
        let going = Going { reason: end.to_string() };
        let mut outgoing = Outgoing::default();
        outgoing.push(Frame::new(&Message::Going(going), Bytes::new()));
        let write = &mut self.write;
        let goodbye = async {
            outgoing.write_all(write).await?;
            write.shutdown().await
        };
        // The hub learns of the end in any case.
        drop(machine::block_on(&self.handle, async {
            tokio::time::timeout(GOODBYE, goodbye).await
        }));
    }
}
