//! A TCP socket that can change from one runtime to another while TLS is on it.
//!
//! A socket of tokio wakes its readers from the thread of the runtime that it is registered with. The hub shakes
//! hands on one thread and serves a source on another: a socket that stayed behind would have every frame go
//! through both, and wait for whatever the first is at, strangers who knock included. Used by `link::socket`.

use std::io::{self, IoSlice};
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The socket, wherever it is.
#[derive(Debug)]
pub enum Movable {
    /// Registered with a runtime.
    In(TcpStream),
    /// On its way to another.
    Between(std::net::TcpStream),
    /// Lost on its way: closed.
    Lost,
}

impl Movable {
    /// Lets go of this thread's runtime. Until it is attached, nothing can be read or written.
    pub fn detach(&mut self) -> io::Result<()> {
        *self = match mem::replace(self, Self::Lost) {
            Self::In(stream) => Self::Between(stream.into_std()?),
            other @ (Self::Between(_) | Self::Lost) => other,
        };
        Ok(())
    }

    /// Joins this thread's runtime.
    pub fn attach(&mut self) -> io::Result<()> {
        *self = match mem::replace(self, Self::Lost) {
            Self::Between(stream) => Self::In(TcpStream::from_std(stream)?),
            other @ (Self::In(_) | Self::Lost) => other,
        };
        Ok(())
    }

    /// The socket, while it is registered.
    pub const fn get(&self) -> Option<&TcpStream> {
        match self {
            Self::In(stream) => Some(stream),
            Self::Between(_) | Self::Lost => None,
        }
    }

    fn there(self: Pin<&mut Self>) -> io::Result<Pin<&mut TcpStream>> {
        match self.get_mut() {
            Self::In(stream) => Ok(Pin::new(stream)),
            Self::Between(_) | Self::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl AsyncRead for Movable {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.there()?.poll_read(context, buffer)
    }
}

impl AsyncWrite for Movable {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.there()?.poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.there()?.poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.there()?.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.there()?.poll_shutdown(context)
    }
}
