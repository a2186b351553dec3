//! A TCP listener in the clear that hands on the connections of known networks only.
//!
//! The others are closed at once, without a byte in either direction; the door counts and tells them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::serve::Listener;
use tokio::net::{TcpListener, TcpStream};

use crate::link::plain::PlainDoor;
use crate::nbd::serve::Guard;

/// The listener.
pub(super) struct Plain {
    inner: TcpListener,
    door: Arc<PlainDoor>,
}

impl Plain {
    /// A listener whose clients `door` admits.
    pub(super) fn new(inner: TcpListener, door: Arc<PlainDoor>) -> Self {
        Self { inner, door }
    }
}

impl Listener for Plain {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, peer) = Listener::accept(&mut self.inner).await;
            if self.door.admits(peer) {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}
