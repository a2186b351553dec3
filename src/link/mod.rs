//! Frames over a byte stream: the part of a connection that both ends share.
//!
//! Floor 3. Works on any `AsyncRead`/`AsyncWrite`, so that TLS can stand between. A frame that is
//! too long, malformed or cut ends the connection with its reason; nothing is allocated before
//! its length was checked.

mod movable;
pub mod plain;
pub mod refusals;
pub mod shown;
#[cfg(test)]
pub(crate) mod simulated;
pub mod socket;
pub mod tls;

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::limits::{CP_BYTES_BEFORE_TRANSFER_MAX, FRAME_HEADER_BYTES_MAX};
use crate::units::convert::to_u64;
use crate::wire::frame::{FRAME_PREFIX_BYTES, FrameError, Lengths};
use crate::wire::message::{Frame, Message};

/// Slices handed to one vectored write.
const SLICES_MAX: usize = 64;
/// Bytes read ahead from the socket at once.
const READ_AHEAD_BYTES: usize = 64 << 10;

const _: () = assert!(to_u64(READ_AHEAD_BYTES) <= FRAME_HEADER_BYTES_MAX);

/// Why no further frame comes.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer closed between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed inside a frame.
    #[error("the peer closed the connection inside a frame")]
    Cut,
    /// The socket failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer sent something else than a frame.
    #[error("{0}")]
    Frame(#[from] FrameError),
}

/// Reads frames one after the other.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
    frame_bytes: u64,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames from `stream`.
    pub fn new(stream: R) -> Self {
        Self::with_buffer(stream, BytesMut::new())
    }

    /// Reads frames from `stream`, whose first bytes were read already.
    pub fn with_buffer(stream: R, buffer: BytesMut) -> Self {
        Self { stream, buffer, frame_bytes: 0 }
    }

    /// Bytes of the frame that was read last, its headers included; 0 if none was.
    pub fn frame_bytes(&self) -> u64 {
        self.frame_bytes
    }

    /// The stream, and what was read of it but not asked for.
    pub fn into_parts(self) -> (R, BytesMut) {
        (self.stream, self.buffer)
    }

    /// The next frame: its message and payload. Cancel-safe: what was read of a frame stays in the
    /// buffer, and the next call goes on there.
    pub async fn next(&mut self) -> Result<(Message, Bytes), LinkError> {
        self.frame_bytes = 0;
        self.fill(FRAME_PREFIX_BYTES, true).await?;
        let Some(prefix) = self.buffer.first_chunk::<FRAME_PREFIX_BYTES>() else {
            return Err(LinkError::Cut);
        };
        let lengths = Lengths::decode(*prefix)?;
        let total = FRAME_PREFIX_BYTES + lengths.header + lengths.payload;
        self.fill(total, false).await?;
        let mut frame = self.buffer.split_to(total);
        frame.advance(FRAME_PREFIX_BYTES);
        let header = frame.split_to(lengths.header);
        let message = Message::decode(&header, to_u64(lengths.payload))?;
        self.frame_bytes = to_u64(total);
        Ok((message, frame.freeze()))
    }

    async fn fill(&mut self, wanted: usize, at_start: bool) -> Result<(), LinkError> {
        while self.buffer.len() < wanted {
            let missing = wanted - self.buffer.len();
            self.buffer.reserve(missing.max(READ_AHEAD_BYTES));
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                let clean = at_start && self.buffer.is_empty();
                return Err(if clean { LinkError::Closed } else { LinkError::Cut });
            }
        }
        Ok(())
    }
}

/// Frames that wait for the socket.
#[derive(Debug, Default)]
pub struct Outgoing {
    parts: VecDeque<Bytes>,
    bytes: u64,
    /// The stream may hold back what it was given: TLS does.
    unflushed: bool,
}

impl Outgoing {
    /// Queues a frame. Its bound is the peer's credit and what the caller asks of
    /// [`Outgoing::is_shallow`] first.
    pub fn push(&mut self, frame: Frame) {
        self.bytes += frame.bytes();
        self.parts.push_back(frame.head);
        if !frame.payload.is_empty() {
            self.parts.push_back(frame.payload);
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty() && !self.unflushed
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether CP data may be queued without standing before transfers for long (section 8).
    pub fn is_shallow(&self) -> bool {
        self.bytes < CP_BYTES_BEFORE_TRANSFER_MAX
    }

    /// Writes once, as much as the socket takes. Cancel-safe: what was written is taken off only
    /// when the write has returned.
    pub async fn write_some<W: AsyncWrite + Unpin>(&mut self, stream: &mut W) -> io::Result<()> {
        if self.parts.is_empty() {
            return self.flush(stream).await;
        }
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut used = 0;
        for (slice, part) in slices.iter_mut().zip(&self.parts) {
            *slice = IoSlice::new(part);
            used += 1;
        }
        let mut written = stream.write_vectored(&slices[..used]).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes -= to_u64(written);
        self.unflushed = true;
        while let Some(part) = self.parts.front_mut() {
            if written < part.len() {
                part.advance(written);
                break;
            }
            written -= part.len();
            self.parts.pop_front();
        }
        if self.parts.is_empty() { self.flush(stream).await } else { Ok(()) }
    }

    async fn flush<W: AsyncWrite + Unpin>(&mut self, stream: &mut W) -> io::Result<()> {
        stream.flush().await?;
        self.unflushed = false;
        Ok(())
    }

    /// Writes everything that waits. The caller says how long that may take.
    pub async fn write_all<W: AsyncWrite + Unpin>(&mut self, stream: &mut W) -> io::Result<()> {
        while !self.is_empty() {
            self.write_some(stream).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::numbers::TransferId;
    use crate::wire::message::{Ack, Pong};

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().unwrap()
    }

    #[test]
    fn frames_pass_a_narrow_stream_whole_and_in_order() {
        runtime().block_on(async {
            let (mut left, right) = tokio::io::duplex(7);
            let id = TransferId { generation: 1, counter: 5 };
            let ack = Message::Ack(Ack { id, log_credit: 9, cp_taken: 1 });
            let payload = Bytes::from(vec![8; 100_000]);
            let mut outgoing = Outgoing::default();
            outgoing.push(Frame::new(&ack, Bytes::new()));
            outgoing.push(Frame::new(&Message::Transfer, payload.clone()));
            outgoing.push(Frame::new(&Message::Pong(Pong { token: 3 }), Bytes::new()));
            assert!(outgoing.is_shallow());
            let write = async {
                while !outgoing.is_empty() {
                    outgoing.write_some(&mut left).await.unwrap();
                }
                assert_eq!(outgoing.bytes(), 0);
                drop(left);
            };
            let read = async {
                let mut reader = FrameReader::new(right);
                assert_eq!(reader.next().await.unwrap(), (ack, Bytes::new()));
                assert_eq!(reader.next().await.unwrap(), (Message::Transfer, payload));
                assert!(matches!(reader.next().await.unwrap().0, Message::Pong(_)));
                assert!(matches!(reader.next().await, Err(LinkError::Closed)));
            };
            tokio::join!(write, read);
        });
    }

    #[test]
    fn cuts_and_bad_frames_are_told_apart() {
        runtime().block_on(async {
            let cut: &[u8] = &[1, 0, 0, 0, 0, 0];
            assert!(matches!(FrameReader::new(cut).next().await, Err(LinkError::Cut)));
            let huge: &[u8] = &[0xff; 8];
            assert!(matches!(FrameReader::new(huge).next().await, Err(LinkError::Frame(_))));
            let unknown: &[u8] = &[1, 0, 0, 0, 0, 0, 0, 0, 250];
            assert!(matches!(
                FrameReader::new(unknown).next().await,
                Err(LinkError::Frame(FrameError::Kind(250)))
            ));
        });
    }
}
