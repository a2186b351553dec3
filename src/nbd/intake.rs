//! Reads requests off a connection, each with its payload and the bytes it may hold.
//!
//! Called by `transmission` as a stream, so that a request half read survives whatever happens
//! meanwhile. A refused write is read to its end and thrown away, so that the next header is met
//! where it starts; one too long for that ends the connection. Between requests a client may be
//! silent for ever; inside one it may neither be silent nor trickle.

use std::io;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::Stream;
use futures_util::stream;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use tokio::time::timeout;

use super::budget::{Budget, Held, time_for};
use super::end::End;
use super::protocol::request::{Command, REQUEST_BYTES, Refusal, RequestHeader, Terms};
use crate::limits::{NBD_EXTENTS_MAX, NBD_WRITE_SKIP_BYTES_MAX};
use crate::units::convert::{to_u64, to_usize, u32_to_usize};

/// What an extent takes while an answer is made: as the export tells it and as it is sent.
const EXTENT_BYTES: u64 = 32;
/// Smallest extent that an export is expected to tell.
const EXTENT_UNIT_BYTES: u64 = 512;

/// A request read whole.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) header: RequestHeader,
    /// What is to be done with it.
    pub(super) verdict: Result<Command, Refusal>,
    /// Payload of a write that was not refused.
    pub(super) data: Bytes,
    /// Its share of the budget.
    pub(super) held: Held,
}

/// How many extents a block status request of that length may ask an export for.
pub(super) fn extents_max(length: u32, one: bool) -> usize {
    let most = to_u64(NBD_EXTENTS_MAX);
    if one { 1 } else { to_usize((u64::from(length) / EXTENT_UNIT_BYTES + 2).min(most)) }
}

/// Bytes that a command holds until its reply has gone out.
fn cost(command: &Command) -> u64 {
    match *command {
        Command::Read { length, .. } | Command::Write { length, .. } => u64::from(length),
        Command::BlockStatus { length, one, .. } => EXTENT_BYTES * to_u64(extents_max(length, one)),
        Command::Flush
        | Command::Trim { .. }
        | Command::Cache { .. }
        | Command::WriteZeroes { .. }
        | Command::Nothing => 0,
    }
}

/// The reading half of a connection.
#[derive(Debug)]
pub(super) struct Intake<R> {
    pub(super) reader: R,
    pub(super) terms: Terms,
    pub(super) budget: Budget,
    pub(super) stall: Duration,
}

impl<R: AsyncBufRead + Unpin> Intake<R> {
    /// Requests until the connection ends, then the reason, once. Polled further, it throws away
    /// what still comes until the client closes.
    pub(super) fn requests(self) -> impl Stream<Item = Result<Incoming, End>> {
        stream::unfold((self, false), |(mut intake, ended)| async move {
            if ended {
                discard(&mut intake.reader).await;
                return None;
            }
            match intake.next().await {
                Ok(incoming) => Some((Ok(incoming), (intake, false))),
                Err(end) => Some((Err(end), (intake, true))),
            }
        })
    }

    async fn next(&mut self) -> Result<Incoming, End> {
        let header = self.header().await?;
        let verdict = header.judge(&self.terms);
        let held = match &verdict {
            Ok(command) => self.budget.take(cost(command)).await,
            Err(_) => Held::default(),
        };
        // One deadline for the whole payload, whatever trickles in: the bytes are held meanwhile.
        let deadline = self.stall + time_for(header.payload().into());
        let data = match &verdict {
            Ok(_) => within(deadline, self.payload(u32_to_usize(header.payload()))).await?,
            Err(_) => self.skip(header.payload(), deadline).await?,
        };
        Ok(Incoming { header, verdict, data, held })
    }

    async fn header(&mut self) -> Result<RequestHeader, End> {
        let mut bytes = [0; REQUEST_BYTES];
        let filled = self.reader.read(&mut bytes).await?;
        if filled == 0 {
            return Err(End::Closed);
        }
        if filled < bytes.len() {
            within(self.stall, self.reader.read_exact(&mut bytes[filled..])).await?;
        }
        let header = RequestHeader::decode(&bytes).ok_or(End::RequestMagic)?;
        if header.disconnects() { Err(End::Disconnected) } else { Ok(header) }
    }

    /// Reads straight into the bytes that go to the export. `length` is bounded by the verdict
    /// and paid for.
    async fn payload(&mut self, length: usize) -> io::Result<Bytes> {
        let mut data = BytesMut::with_capacity(length);
        while data.len() < length {
            let missing = length - data.len();
            let mut room = (&mut data).limit(missing);
            if self.reader.read_buf(&mut room).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(data.freeze())
    }

    async fn skip(&mut self, length: u32, deadline: Duration) -> Result<Bytes, End> {
        if u64::from(length) > NBD_WRITE_SKIP_BYTES_MAX {
            return Err(End::WriteTooLong(length));
        }
        let mut left = u32_to_usize(length);
        within(deadline, async {
            while left > 0 {
                let part = self.reader.fill_buf().await?.len().min(left);
                if part == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.reader.consume(part);
                left -= part;
            }
            Ok(Bytes::new())
        })
        .await
    }
}

/// Throws away what comes until the client closes.
pub(super) async fn discard<R: AsyncBufRead + Unpin>(reader: &mut R) {
    while let Ok(there) = reader.fill_buf().await {
        let count = there.len();
        if count == 0 {
            return;
        }
        reader.consume(count);
    }
}

/// Reading inside a request: it must get to its end, and in time.
async fn within<T>(
    deadline: Duration,
    reading: impl Future<Output = io::Result<T>>,
) -> Result<T, End> {
    match timeout(deadline, reading).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(End::Truncated("a request"))
        }
        Ok(Err(error)) => Err(End::Io(error)),
        Err(_) => Err(End::Stalled(deadline, "a request")),
    }
}
