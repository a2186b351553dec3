//! A TCP listener whose connections are handed on once their TLS handshake is done.
//!
//! Handshakes go on beside each other, at most `HANDSHAKES_MAX` of them; one that is not done in time
//! is dropped, and one makes room for a new one: the oldest of the host that has most. So nobody waits for clients that say nothing. Each of
//! them is counted, and said once.

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
use crate::units::entrance::Entrance;

/// What came of a handshake, and with whom.
type Done = (SocketAddr, Result<ServedStream, String>);

/// The listener.
pub(super) struct Encrypted {
    inner: TcpListener,
    tls: Arc<ServedTls>,
    handshakes: FuturesUnordered<BoxFuture<'static, Done>>,
    places: Arc<Entrance>,
}

impl Encrypted {
    /// A listener whose connections are encrypted.
    pub(super) fn new(inner: TcpListener, tls: Arc<ServedTls>) -> Self {
        let places = Arc::new(Entrance::new(HANDSHAKES_MAX, 0));
        Self { inner, tls, handshakes: FuturesUnordered::new(), places }
    }

    fn begin(&mut self, stream: TcpStream, peer: SocketAddr) {
        // None is held for longer than a handshake.
        let Some(place) = self.places.admit(Some(peer.ip())) else { return };
        let tls = Arc::clone(&self.tls);
        let handshake = async move {
            let deadline = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
            let done = tokio::select! {
                done = timeout(deadline, tls.accept(stream)) => match done {
                    Ok(Ok(stream)) => Ok(stream),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(_) => Err("no handshake in time".to_owned()),
                },
                () = place.lost() => Err("made room for a newer one".to_owned()),
            };
            (peer, done)
        };
        self.handshakes.push(Box::pin(handshake));
    }
}

impl Listener for Encrypted {
    type Io = ServedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            tokio::select! {
                Some(done) = self.handshakes.next() => {
                    match done {
                        (peer, Ok(stream)) => return (stream, peer),
                        (peer, Err(why)) => {
                            self.tls.refuse("an HTTP client is refused", &peer.to_string(), &why);
                        }
                    }
                }
                // As for plain connections: what fails is tried again, after a pause where it has to be.
                (stream, peer) = Listener::accept(&mut self.inner) => self.begin(stream, peer),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::link::tls::SourceTls;
    use crate::link::tls::tests::Ca;

    /// Goal: a client is served at once though all places are held by clients that say nothing; the
    /// oldest of them is closed for it, and no other.
    #[tokio::test]
    async fn the_oldest_silent_client_makes_room() {
        let (directory, ca) = (tempfile::tempdir().unwrap(), Ca::new());
        let door = ServedTls::load(ca.files(directory.path(), "hub", 9), true, false).unwrap();
        let client = SourceTls::load(ca.files(directory.path(), "client", 9), "hub").unwrap();
        let inner = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = inner.local_addr().unwrap();
        let mut listener = Encrypted::new(inner, Arc::new(door));
        let mut silent = Vec::new();
        for _ in 0..HANDSHAKES_MAX {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let come = async { client.connect(TcpStream::connect(address).await?).await };
        let long = Duration::from_secs(HANDSHAKE_SECONDS_MAX / 2);
        let both = async { tokio::join!(listener.accept(), come) };
        let (_served, come) = timeout(long, both).await.expect("before any of them is given up");
        come.unwrap();
        let mut byte = [0; 1];
        assert_eq!(silent[0].read(&mut byte).await.unwrap_or(0), 0, "the oldest is closed");
        let kept = silent[1].try_read(&mut byte).unwrap_err();
        assert_eq!(kept.kind(), io::ErrorKind::WouldBlock, "the next stays");
    }
}
