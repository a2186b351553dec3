//! What follows a request that brings data: pieces of a file, on the same connection.
//!
//! A piece is a header of 12 bytes, offset (8) and length (4), both little-endian, and so many bytes.
//! Pieces rise, what none covers is zero. One of length 0 ends the file, and its offset is the file's
//! size. Both ends bound the length before they allocate. The socket is this program's own on one
//! machine: who may open it may do everything, so the bounds are against faults, not against enemies.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::message::{AdminError, code};
use crate::limits::SEED_PIECE_BYTES_MAX;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_u64, to_usize};

const HEADER_BYTES: usize = 12;

/// A piece, or the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Whole blocks.
    Data {
        /// Where they lie.
        offset: u64,
        /// What they hold.
        bytes: Vec<u8>,
    },
    /// The size of the file.
    End(u64),
}

/// The rest of a request.
#[derive(Debug)]
pub struct Feed(BufReader<OwnedReadHalf>);

impl Feed {
    pub(super) fn new(reader: BufReader<OwnedReadHalf>) -> Self {
        Self(reader)
    }

    /// The next piece; none if the caller has gone before the end.
    pub async fn next(&mut self) -> Result<Option<Piece>, AdminError> {
        let mut header = [0; HEADER_BYTES];
        match self.0.read_exact(&mut header).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(unread(&error)),
        }
        let [offset @ .., l0, l1, l2, l3] = header;
        let offset = u64::from_le_bytes(offset);
        let length = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
        if length == 0 {
            return Ok(Some(Piece::End(offset)));
        }
        let whole =
            length.is_multiple_of(BLOCK_BYTES_U64) && offset.is_multiple_of(BLOCK_BYTES_U64);
        if length > SEED_PIECE_BYTES_MAX || !whole {
            let message = format!("a piece of {length} bytes at {offset} is not understood");
            return Err(AdminError::new(code::BAD_REQUEST, message, "are both of one version?"));
        }
        let mut bytes = vec![0; to_usize(length)];
        match self.0.read_exact(&mut bytes).await {
            Ok(_) => Ok(Some(Piece::Data { offset, bytes })),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(unread(&error)),
        }
    }
}

fn unread(error: &io::Error) -> AdminError {
    let message = format!("what is sent cannot be read: {error}");
    AdminError::new(code::FAILED, message, "give the command again")
}

/// Sends a piece.
pub(super) async fn send(write: &mut OwnedWriteHalf, piece: &Piece) -> io::Result<()> {
    let (offset, bytes): (u64, &[u8]) = match piece {
        Piece::Data { offset, bytes } => (*offset, bytes),
        Piece::End(size) => (*size, &[]),
    };
    assert!(to_u64(bytes.len()) <= SEED_PIECE_BYTES_MAX, "a piece is too long");
    let [l0, l1, l2, l3, ..] = to_u64(bytes.len()).to_le_bytes();
    write.write_all(&offset.to_le_bytes()).await?;
    write.write_all(&[l0, l1, l2, l3]).await?;
    write.write_all(bytes).await
}
