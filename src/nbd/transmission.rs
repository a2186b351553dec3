//! Requests and replies of one connection, in one task.
//!
//! Called by `serve` when the handshake has opened an export. Each turn of the loop takes one
//! event, in this order: a stop, a request that is done, a reply to send if many bytes wait, a
//! request to read, a reply to send, the end. So what is done together leaves together, and a
//! slow request holds up neither others nor the reading of further ones.
//!
//! Bounds: requests under way and replies unsent together stay within
//! `NBD_REQUESTS_IN_FLIGHT_MAX`, their bytes within the budget. A request that was begun is
//! always polled to its end, also when the client has gone. When the end comes from our side,
//! those under way are finished, and requests that arrive until then are answered with ESHUTDOWN,
//! as are those that have arrived by then.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{Stream, StreamExt};
use tokio::io::{AsyncBufRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::budget::{Budget, Pot, time_for};
use super::counters::Counters;
use super::end::End;
use super::execute::{Finished, execute, refuse_at_the_end};
use super::export::Export;
use super::handshake::Opened;
use super::intake::{Incoming, Intake};
use super::outgoing::Outgoing;
use crate::limits::{NBD_EAGER_WRITE_BYTES, NBD_REQUESTS_IN_FLIGHT_MAX};

/// What a connection shares with the others of its server.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// Bytes that all connections together may hold.
    pub memory: &'a Pot,
    /// What is counted.
    pub counters: &'a Counters,
    /// Time for a message, besides that of its bytes.
    pub stall: Duration,
    /// What a client is given to take its last replies.
    pub linger: Duration,
    /// Cancelled when the server stops; this connection's own child of that token, so that
    /// connections do not meet at its lock.
    pub stopping: &'a CancellationToken,
}

/// Serves requests until the connection ends, and says why it did.
pub async fn serve<R, W>(
    reader: R,
    writer: &mut W,
    opened: Opened,
    surroundings: Surroundings<'_>,
) -> End
where
    R: AsyncBufRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Surroundings { memory, counters, stall, linger, stopping } = surroundings;
    let Opened { export, terms } = opened;
    let intake = Intake { reader, terms, budget: Budget::new(memory), stall };
    let mut requests = pin!(intake.requests());
    let ended = export.ended();
    let mut stop = pin!(stop(stopping, ended.as_ref()));
    let mut connection = Connection {
        export,
        counters,
        structured: terms.structured,
        running: FuturesUnordered::new(),
        outgoing: Outgoing::default(),
        writer,
        stall: Stall { after: stall, timer: Box::pin(sleep(stall)), left: None },
        reading: true,
        refusing_since: None,
        linger,
        unflushed: false,
        dead: false,
        end: None,
    };
    loop {
        let event = poll_fn(|cx| connection.poll_event(requests.as_mut(), stop.as_mut(), cx)).await;
        match event {
            Event::Done(finished) => connection.answer(finished),
            Event::Request(incoming) => connection.begin(incoming),
            Event::LastRequest(end) => {
                connection.reading = false;
                connection.end.get_or_insert(end);
            }
            Event::Sent => (),
            Event::Broken(end) => connection.break_off(end),
            Event::Stop(end) => connection.end = Some(end),
            Event::Idle => break,
        }
    }
    let end = connection.end.take().unwrap_or(End::Stopped);
    if !connection.dead {
        let rest = async { while requests.next().await.is_some() {} };
        hang_up(connection.writer, rest, &end, linger).await;
    }
    end
}

/// Waits for the end that comes from our side.
async fn stop(server: &CancellationToken, export: Option<&CancellationToken>) -> End {
    let export_ended = async {
        match export {
            Some(token) => token.cancelled().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = server.cancelled() => End::Stopped,
        () = export_ended => End::ExportEnded,
    }
}

/// Closes our direction, then takes what the client still sends, for a moment: a socket closed
/// with bytes unread is reset, and the reset can overtake the last replies.
pub(super) async fn hang_up<W: AsyncWrite + Unpin>(
    writer: &mut W,
    rest: impl Future<Output = ()>,
    end: &End,
    linger: Duration,
) {
    let closed = matches!(timeout(linger, writer.shutdown()).await, Ok(Ok(())));
    if closed && end.client_may_be_sending() && timeout(linger, rest).await.is_err() {
        tracing::trace!("an nbd client does not close: {end}");
    }
}

enum Event {
    Done(Finished),
    Request(Incoming),
    /// No further request can come.
    LastRequest(End),
    Sent,
    /// No further reply can leave.
    Broken(End),
    /// The server or the export ends.
    Stop(End),
    /// An end is due, and nothing is left to do.
    Idle,
}

/// The bytes that wait when a write first does not get on must leave within this time and their
/// own; what is queued behind them has its turn afterwards.
struct Stall {
    after: Duration,
    timer: Pin<Box<Sleep>>,
    /// What of those bytes is still to be sent; `None` if the timer is not set.
    left: Option<u64>,
}

impl Stall {
    /// Called while a write of `waiting` bytes is pending: ready when it has been for too long.
    fn poll(&mut self, waiting: u64, cx: &mut Context<'_>) -> Poll<()> {
        if self.left.is_none() {
            self.timer.as_mut().reset(Instant::now() + self.after + time_for(waiting));
            self.left = Some(waiting);
        }
        self.timer.as_mut().poll(cx)
    }

    /// Called when bytes were sent.
    fn sent(&mut self, bytes: u64) {
        let left = self.left.map(|left| left.saturating_sub(bytes));
        self.left = left.filter(|left| *left > 0);
    }
}

type Running = Pin<Box<dyn Future<Output = Finished> + Send>>;

struct Connection<'a, W> {
    export: Arc<dyn Export>,
    counters: &'a Counters,
    structured: bool,
    running: FuturesUnordered<Running>,
    outgoing: Outgoing,
    writer: &'a mut W,
    stall: Stall,
    /// Requests are still being read.
    reading: bool,
    /// When the first request was refused with none under way.
    refusing_since: Option<Instant>,
    linger: Duration,
    /// Bytes may have been taken by the writer that are not with the kernel yet: one that encrypts
    /// keeps what the socket did not take.
    unflushed: bool,
    /// Replies can no longer be sent.
    dead: bool,
    /// Why the connection is about to end.
    end: Option<End>,
}

impl<W: AsyncWrite + Unpin> Connection<'_, W> {
    fn poll_event(
        &mut self,
        requests: Pin<&mut impl Stream<Item = Result<Incoming, End>>>,
        stop: Pin<&mut impl Future<Output = End>>,
        cx: &mut Context<'_>,
    ) -> Poll<Event> {
        if self.end.is_none()
            && let Poll::Ready(end) = stop.poll(cx)
        {
            return Poll::Ready(Event::Stop(end));
        }
        if let Poll::Ready(Some(finished)) = self.running.poll_next_unpin(cx) {
            return Poll::Ready(Event::Done(finished));
        }
        if self.outgoing.bytes() >= NBD_EAGER_WRITE_BYTES
            && let Poll::Ready(event) = self.poll_send(cx)
        {
            return Poll::Ready(event);
        }
        if self.reading
            && self.running.len() + self.outgoing.replies() < NBD_REQUESTS_IN_FLIGHT_MAX
            && let Poll::Ready(request) = requests.poll_next(cx)
        {
            return Poll::Ready(match request {
                Some(Ok(incoming)) => Event::Request(incoming),
                Some(Err(end)) => Event::LastRequest(end),
                None => Event::LastRequest(End::Closed),
            });
        }
        if let Poll::Ready(event) = self.poll_send(cx) {
            return Poll::Ready(event);
        }
        let sent = self.outgoing.is_empty() && !self.unflushed;
        if self.end.is_some() && self.running.is_empty() && sent {
            return Poll::Ready(Event::Idle);
        }
        Poll::Pending
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if self.outgoing.is_empty() {
            return self.poll_flush(cx);
        }
        let before = self.outgoing.bytes();
        match self.outgoing.poll_write(self.writer, cx) {
            Poll::Ready(Ok(())) => {
                self.unflushed = true;
                self.stall.sent(before - self.outgoing.bytes());
                Poll::Ready(Event::Sent)
            }
            Poll::Ready(Err(error)) => Poll::Ready(Event::Broken(End::Io(error))),
            Poll::Pending => {
                let after = self.stall.after;
                self.stall.poll(before, cx).map(|()| Event::Broken(End::Stalled(after, "a reply")))
            }
        }
    }

    /// Ready only if it failed.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if !self.unflushed {
            return Poll::Pending;
        }
        match Pin::new(&mut *self.writer).poll_flush(cx) {
            Poll::Ready(Ok(())) => {
                self.unflushed = false;
                self.stall.sent(u64::MAX);
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Event::Broken(End::Io(error))),
            Poll::Pending => {
                let after = self.stall.after;
                self.stall.poll(1, cx).map(|()| Event::Broken(End::Stalled(after, "a reply")))
            }
        }
    }

    fn begin(&mut self, incoming: Incoming) {
        if self.end.is_some() {
            self.answer(refuse_at_the_end(incoming, self.structured));
            // Nothing is left but a client that goes on asking: it has been told.
            if self.running.is_empty() {
                let since = *self.refusing_since.get_or_insert_with(Instant::now);
                self.reading = since.elapsed() < self.linger;
            }
        } else {
            let export = Arc::clone(&self.export);
            self.running.push(Box::pin(execute(export, incoming, self.structured)));
        }
    }

    fn answer(&mut self, finished: Finished) {
        self.counters.answered(finished.operation, finished.bytes, finished.busy);
        if !self.dead {
            self.outgoing.push(finished.reply, finished.held);
        }
    }

    fn break_off(&mut self, end: End) {
        self.dead = true;
        self.reading = false;
        self.unflushed = false;
        self.outgoing.clear();
        self.end = Some(end);
    }
}
