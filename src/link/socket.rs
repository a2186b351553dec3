//! A connection as both ends hold it: a TCP socket, TLS on one, or in a simulation two pipes.
//!
//! Everything above reads and writes [`ReadHalf`] and [`WriteHalf`] and knows no more.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_rustls::TlsStream;

use super::movable::Movable;
#[cfg(test)]
use super::simulated;
use super::tls::SourceTls;
use crate::limits::CP_BYTES_BEFORE_TRANSFER_MAX;
use crate::units::convert::low_u32;

/// A connection.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// TLS on TCP.
    Tls(Box<TlsStream<Movable>>),
    /// Two pipes of a simulated network.
    #[cfg(test)]
    Simulated(simulated::Receiver, simulated::Sender),
}

/// A connection on its way to another thread.
#[derive(Debug)]
pub enum Detached {
    /// TCP.
    Tcp(std::net::TcpStream),
    /// TLS on TCP.
    Tls(Box<TlsStream<Movable>>),
    /// Two pipes of a simulated network.
    #[cfg(test)]
    Simulated(simulated::Receiver, simulated::Sender),
}

/// What is read.
#[derive(Debug)]
pub enum ReadHalf {
    /// TCP.
    Tcp(OwnedReadHalf),
    /// TLS on TCP.
    Tls(tokio::io::ReadHalf<Box<TlsStream<Movable>>>),
    /// A pipe of a simulated network.
    #[cfg(test)]
    Simulated(simulated::Receiver),
}

/// What is written.
#[derive(Debug)]
pub enum WriteHalf {
    /// TCP.
    Tcp(OwnedWriteHalf),
    /// TLS on TCP.
    Tls(tokio::io::WriteHalf<Box<TlsStream<Movable>>>),
    /// A pipe of a simulated network.
    #[cfg(test)]
    Simulated(simulated::Sender),
}

impl Socket {
    /// Connects, with TLS if there is some.
    pub async fn connect(address: SocketAddr, tls: Option<&SourceTls>) -> io::Result<Self> {
        #[cfg(test)]
        if let Some(network) = simulated::Network::here() {
            return network.connect(address).await;
        }
        tls.map_or(Ok(()), SourceTls::usable)?;
        let stream = TcpStream::connect(address).await?;
        match tls {
            None => Ok(Self::Tcp(stream)),
            Some(tls) => Ok(Self::Tls(Box::new(tls.connect(stream).await?))),
        }
    }

    /// The socket beneath.
    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(stream) => Some(stream),
            Self::Tls(stream) => stream.get_ref().0.get(),
            #[cfg(test)]
            Self::Simulated(..) => None,
        }
    }

    /// Small frames leave at once.
    pub fn without_delay(&self) -> io::Result<()> {
        self.tcp().map_or(Ok(()), |stream| stream.set_nodelay(true))
    }

    /// Small frames leave at once, and little CP data stands unsent before a transfer.
    pub fn tune(&self) -> io::Result<()> {
        self.without_delay()?;
        let Some(stream) = self.tcp() else { return Ok(()) };
        let socket = socket2::SockRef::from(stream);
        socket.set_tcp_notsent_lowat(low_u32(CP_BYTES_BEFORE_TRANSFER_MAX))
    }

    /// Both directions.
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Self::Tcp(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
            }
            Self::Tls(stream) => {
                let (read, write) = tokio::io::split(stream);
                (ReadHalf::Tls(read), WriteHalf::Tls(write))
            }
            #[cfg(test)]
            Self::Simulated(read, write) => {
                (ReadHalf::Simulated(read), WriteHalf::Simulated(write))
            }
        }
    }

    /// Lets go of this thread's runtime.
    pub fn detach(self) -> io::Result<Detached> {
        match self {
            Self::Tcp(stream) => Ok(Detached::Tcp(stream.into_std()?)),
            Self::Tls(mut stream) => {
                stream.get_mut().0.detach()?;
                Ok(Detached::Tls(stream))
            }
            #[cfg(test)]
            Self::Simulated(read, write) => Ok(Detached::Simulated(read, write)),
        }
    }
}

impl Detached {
    /// Joins this thread's runtime.
    pub fn attach(self) -> io::Result<Socket> {
        match self {
            Self::Tcp(stream) => Ok(Socket::Tcp(TcpStream::from_std(stream)?)),
            Self::Tls(mut stream) => {
                stream.get_mut().0.attach()?;
                Ok(Socket::Tls(stream))
            }
            #[cfg(test)]
            Self::Simulated(read, write) => Ok(Socket::Simulated(read, write)),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
            #[cfg(test)]
            Self::Simulated(read, _) => Pin::new(read).poll_read(context, buffer),
        }
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_read(context, buffer),
            Self::Tls(half) => Pin::new(half).poll_read(context, buffer),
            #[cfg(test)]
            Self::Simulated(half) => Pin::new(half).poll_read(context, buffer),
        }
    }
}

macro_rules! writes {
    ($type:ident, $tcp:pat => $to:expr, $tls:pat => $over:expr, $simulated:pat => $pipe:expr) => {
        impl AsyncWrite for $type {
            fn poll_write(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $tcp => Pin::new($to).poll_write(context, bytes),
                    $tls => Pin::new($over).poll_write(context, bytes),
                    #[cfg(test)]
                    $simulated => Pin::new($pipe).poll_write(context, bytes),
                }
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                slices: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $tcp => Pin::new($to).poll_write_vectored(context, slices),
                    $tls => Pin::new($over).poll_write_vectored(context, slices),
                    #[cfg(test)]
                    $simulated => Pin::new($pipe).poll_write_vectored(context, slices),
                }
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $tcp => Pin::new($to).poll_flush(context),
                    $tls => Pin::new($over).poll_flush(context),
                    #[cfg(test)]
                    $simulated => Pin::new($pipe).poll_flush(context),
                }
            }

            fn poll_shutdown(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
            ) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $tcp => Pin::new($to).poll_shutdown(context),
                    $tls => Pin::new($over).poll_shutdown(context),
                    #[cfg(test)]
                    $simulated => Pin::new($pipe).poll_shutdown(context),
                }
            }
        }
    };
}

writes!(Socket, Self::Tcp(stream) => stream, Self::Tls(stream) => stream, Self::Simulated(_, write) => write);
writes!(WriteHalf, Self::Tcp(half) => half, Self::Tls(half) => half, Self::Simulated(half) => half);
