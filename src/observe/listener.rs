//! A listener that bounds its connections: at most so many at once, none idle for long.
//!
//! HTTP clients that open connections and say nothing, say it in drops, or read nothing, would
//! otherwise hold descriptors for ever. So only what the server says starts the clock anew: a
//! request has one deadline from the accept or the answer before it, whatever trickles in. When all
//! places are taken, the connection that was told something longest ago makes room: who only holds
//! places cannot keep Prometheus or a health check out. While half of the places are held by those that
//! were never told anything, it is the oldest of these: silent newcomers do not push out who is served.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// A listener around another.
#[derive(Debug)]
pub struct Bounded<L> {
    inner: L,
    places: Arc<Places>,
    connections_max: usize,
    idle_max: Duration,
}

/// The open connections, by number.
#[derive(Debug, Default)]
struct Places {
    open: Mutex<BTreeMap<u64, Place>>,
    /// Counts accepts and answers: who has the lower mark was told something longer ago.
    clock: AtomicU64,
}

#[derive(Debug)]
struct Place {
    mark: Arc<AtomicU64>,
    cut: CancellationToken,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Place>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// A place for one more; where there is none, one is cut.
    fn take(&self, connections_max: usize) -> (u64, Arc<AtomicU64>, CancellationToken) {
        let number = self.tick();
        let mut open = self.lock();
        while open.len() >= connections_max {
            let is_silent =
                |(number, place): &(&u64, &Place)| place.mark.load(Ordering::Relaxed) == **number;
            let silent_only = open.iter().filter(is_silent).count() * 2 >= connections_max;
            let oldest = open
                .iter()
                .filter(|place| !silent_only || is_silent(place))
                .min_by_key(|(_, place)| place.mark.load(Ordering::Relaxed))
                .map(|place| *place.0);
            let Some(cut) = oldest.and_then(|oldest| open.remove(&oldest)) else { break };
            cut.cut.cancel();
        }
        let (mark, cut) = (Arc::new(AtomicU64::new(number)), CancellationToken::new());
        open.insert(number, Place { mark: Arc::clone(&mark), cut: cut.clone() });
        (number, mark, cut)
    }
}

impl<L> Bounded<L> {
    /// At most `connections_max` at once; one that has not sent its request, or taken nothing of its
    /// answer, within `idle_max` is closed.
    pub fn new(inner: L, connections_max: usize, idle_max: Duration) -> Self {
        Self { inner, places: Arc::default(), connections_max, idle_max }
    }
}

impl<L: Listener> Listener for Bounded<L> {
    type Io = BoundedIo<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (inner, address) = self.inner.accept().await;
        let (number, mark, cut) = self.places.take(self.connections_max);
        let bounded = BoundedIo {
            inner,
            idle: Box::pin(sleep(self.idle_max)),
            idle_max: self.idle_max,
            cut: Box::pin(cut.cancelled_owned()),
            mark,
            number,
            places: Arc::clone(&self.places),
        };
        (bounded, address)
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
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    mark: Arc<AtomicU64>,
    number: u64,
    places: Arc<Places>,
}

impl<I> Drop for BoundedIo<I> {
    fn drop(&mut self) {
        self.places.lock().remove(&self.number);
    }
}

impl<I> BoundedIo<I> {
    /// Lets what the inner connection said pass, and ends a wait that has lasted too long: also one
    /// that goes from byte to byte.
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.cut.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
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
            let now = self.places.tick();
            self.mark.store(now, Ordering::Relaxed);
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
