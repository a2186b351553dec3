//! A TCP listener whose connections are handed on once their TLS handshake is done.
//!
//! Handshakes go on beside each other, at most `HANDSHAKES_MAX` of them; one that is not done in time
//! is dropped. So nobody waits for a client that says nothing.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::limits::{HANDSHAKE_SECONDS_MAX, HANDSHAKES_MAX};
use crate::link::tls::{ServedStream, ServedTls};

/// What came of a handshake.
type Done = (SocketAddr, Option<ServedStream>);

/// The listener.
pub(super) struct Encrypted {
    inner: TcpListener,
    tls: Arc<ServedTls>,
    handshakes: FuturesUnordered<BoxFuture<'static, Done>>,
}

impl Encrypted {
    /// A listener whose connections are encrypted.
    pub(super) fn new(inner: TcpListener, tls: Arc<ServedTls>) -> Self {
        Self { inner, tls, handshakes: FuturesUnordered::new() }
    }

    fn begin(&self, stream: TcpStream, peer: SocketAddr) {
        let tls = Arc::clone(&self.tls);
        self.handshakes.push(Box::pin(async move {
            let deadline = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
            match timeout(deadline, tls.accept(stream)).await {
                Ok(Ok(stream)) => (peer, Some(stream)),
                Ok(Err(error)) => {
                    tracing::warn!(%peer, %error, "an HTTP client is refused");
                    (peer, None)
                }
                Err(_) => (peer, None),
            }
        }));
    }
}

impl Listener for Encrypted {
    type Io = ServedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let free = self.handshakes.len() < HANDSHAKES_MAX;
            tokio::select! {
                Some((peer, stream)) = self.handshakes.next() => {
                    if let Some(stream) = stream {
                        return (stream, peer);
                    }
                }
                // As for plain connections: what fails is tried again, after a pause where it has to be.
                (stream, peer) = Listener::accept(&mut self.inner), if free => {
                    self.begin(stream, peer);
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}
