//! A listener that bounds its connections: at most so many at once, none idle for long.
//!
//! HTTP clients that open connections and say nothing, say it in drops, or read nothing, would
//! otherwise hold descriptors for ever. So only what the server says starts the clock anew: a
//! request has one deadline from the accept or the answer before it, whatever trickles in.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

/// A listener around another.
#[derive(Debug)]
pub struct Bounded<L> {
    inner: L,
    places: Arc<Semaphore>,
    idle_max: Duration,
}

impl<L> Bounded<L> {
    /// At most `connections_max` at once; one that has not sent its request, or taken nothing of its
    /// answer, within `idle_max` is closed. Further connections wait in the kernel's backlog.
    pub fn new(inner: L, connections_max: usize, idle_max: Duration) -> Self {
        Self { inner, places: Arc::new(Semaphore::new(connections_max)), idle_max }
    }
}

impl<L: Listener> Listener for Bounded<L> {
    type Io = BoundedIo<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        // The semaphore is never closed; if it were, taking no place would only lift the bound.
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (inner, address) = self.inner.accept().await;
        let idle = Box::pin(sleep(self.idle_max));
        (BoundedIo { inner, idle, idle_max: self.idle_max, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}

/// One connection of a [`Bounded`] listener.
#[derive(Debug)]
pub struct BoundedIo<I> {
    inner: I,
    idle: Pin<Box<Sleep>>,
    idle_max: Duration,
    _place: Option<OwnedSemaphorePermit>,
}

impl<I> BoundedIo<I> {
    /// Lets what the inner connection said pass, and ends a wait that has lasted too long: also one
    /// that goes from byte to byte.
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            return polled;
        }
        match self.idle.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for BoundedIo<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(context, buffer);
        self.watch(context, polled)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for BoundedIo<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(context, bytes);
        if matches!(polled, Poll::Ready(Ok(1..))) {
            let due = Instant::now() + self.idle_max;
            self.idle.as_mut().reset(due);
        }
        self.watch(context, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(context);
        self.watch(context, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(context);
        self.watch(context, polled)
    }
}
