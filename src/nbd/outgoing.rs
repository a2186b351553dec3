//! Replies on their way out: a queue of pieces, sent many at a time in one vectored write.
//!
//! Used by `transmission` alone. Its length is bounded by the requests under way: the reader
//! takes no more than `NBD_REQUESTS_IN_FLIGHT_MAX`, and each piece of a reply is paid for by the
//! [`Held`] that leaves with the reply's last piece.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use super::budget::Held;
use super::protocol::reply::{Pieces, total};
use crate::units::convert::to_u64;

/// Pieces in one vectored write. The kernel takes 1024; beyond this, more gains nothing.
const SLICES: usize = 64;

#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    /// With the last piece of a reply.
    held: Option<Held>,
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    pieces: VecDeque<Piece>,
    replies: usize,
    bytes: u64,
}

impl Outgoing {
    /// Replies not yet sent whole.
    pub(super) fn replies(&self) -> usize {
        self.replies
    }

    /// Bytes not yet sent.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Appends a reply.
    pub(super) fn push(&mut self, reply: Pieces, held: Held) {
        self.bytes += total(&reply);
        self.pieces.extend(reply.into_iter().map(|bytes| Piece { bytes, held: None }));
        if let Some(last) = self.pieces.back_mut() {
            last.held = Some(held);
            self.replies += 1;
        }
    }

    /// Forgets everything: the client is gone.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Writes once. Ready when something was written, or on an error.
    pub(super) fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        writer: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(&piece.bytes);
            count += 1;
        }
        let written = ready!(Pin::new(writer).poll_write_vectored(cx, &slices[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.advance(written);
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= to_u64(written);
        while let Some(first) = self.pieces.front_mut() {
            if written < first.bytes.len() {
                first.bytes.advance(written);
                return;
            }
            written -= first.bytes.len();
            if first.held.is_some() {
                self.replies -= 1;
            }
            self.pieces.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::budget::{Budget, Pot};
    use tokio::io::AsyncReadExt;

    /// A pipe of three bytes takes pieces of all sizes, in order, and each reply gives back its
    /// bytes when its last one has gone.
    #[tokio::test]
    async fn pieces_leave_in_order_and_give_back_what_they_held() {
        let pot = Pot::new(400);
        let budget = Budget::new(&pot);
        let (mut near, mut far) = tokio::io::duplex(3);
        let mut outgoing = Outgoing::default();
        let piece = |text: &'static str| Bytes::from_static(text.as_bytes());
        outgoing.push(vec![piece("ab"), piece("cdefg")], budget.take(10).await);
        outgoing.push(vec![piece("h")], budget.take(20).await);
        assert_eq!((outgoing.replies(), outgoing.bytes(), pot.taken()), (2, 8, 30));
        let mut got = Vec::new();
        while !outgoing.is_empty() {
            std::future::poll_fn(|cx| outgoing.poll_write(&mut near, cx)).await.unwrap();
            let mut bytes = [0; 3];
            let count = far.read(&mut bytes).await.unwrap();
            got.extend_from_slice(&bytes[..count]);
            let whole = [7, 8].iter().filter(|end| got.len() >= **end).count();
            assert_eq!(outgoing.replies(), 2 - whole);
            assert_eq!(pot.taken(), [30, 20, 0][whole]);
        }
        assert_eq!(got, b"abcdefgh");
        assert_eq!(outgoing.bytes(), 0);
    }
}
