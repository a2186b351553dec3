//! A device that is a file or a block device.
//!
//! Made by [`FileDevice::create`] or [`FileDevice::open`] at start, then held by the ring or the
//! pool. How a durable write is made durable is chosen once, at start, and shown in status:
//!
//! * [`Access::Direct`] (NVRAM): descriptors with O_DIRECT, and O_DIRECT with O_DSYNC for durable
//!   writes, if a real read shows that the file system takes them; else as `Cached`.
//! * [`Access::Cached`] (pool): the page cache, with fdatasync on flush. Aligned writes from
//!   [`LARGE_BYTES_MIN`] on, which are a CP's new blocks, go past it where the file system takes
//!   that: copied there, they would cost more than the disk does, and drive out what is read. So
//!   do aligned durable writes: an fdatasync would wait for all else that was written before.
//!
//! Invariants: one process at a time (flock, and for a block device the kernel's exclusive claim);
//! a call is answered with `Ok` only when every byte was moved. Short transfers are continued,
//! EINTR is retried, everything else is the caller's error with place and reason. This type does
//! not remember errors: put it into a [`super::latch::Latch`].
//!
//! With O_DIRECT an unaligned call goes through a bounce buffer. A write so made reads the blocks
//! at its edges first, and holds off other writes meanwhile, so that neighbours are not undone.

mod prepare;

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::io::Errno;

use super::buffer::AlignedBuffer;
use super::directory::create_durably;
use super::{Device, DeviceError, Durability, check_range};
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::ByteCount;

/// Bytes of a bounce buffer.
const BOUNCE_BYTES_MAX: usize = 1 << 20;
/// Writes of so much are not copied into the page cache.
const LARGE_BYTES_MIN: usize = 64 << 10;
/// Pieces that the kernel takes with one call.
const PIECES_MAX: usize = 1024;
/// A file device is made of whole blocks of this.
pub const FILE_SIZE_UNIT_BYTES: u64 = 4096;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Past the page cache, where the file system allows it.
    Direct,
    /// Through the page cache.
    Cached,
}

/// Why a file did not become a device.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// `create` never overwrites.
    #[error("{}: exists already, and a device is never created over something", .0.display())]
    Exists(PathBuf),
    /// Nothing there.
    #[error("{}: does not exist", .0.display())]
    Missing(PathBuf),
    /// Locked.
    #[error("{}: is in use by another process", .0.display())]
    Busy(PathBuf),
    /// A directory, a pipe.
    #[error("{}: is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Empty, or not whole blocks.
    #[error("{}: {size} bytes are no multiple of 4096 above 0", .path.display())]
    Size { path: PathBuf, size: u64 },
    /// The kernel refused.
    #[error("{}: {operation}: {error}", .path.display())]
    Io { path: PathBuf, operation: &'static str, error: io::Error },
}

/// An open file or block device, locked for this process.
#[derive(Debug)]
pub struct FileDevice {
    name: Arc<str>,
    size: u64,
    /// Holds the lock; the way of [`Access::Cached`].
    plain: File,
    direct: Option<Direct>,
    /// For large and for durable writes of [`Access::Cached`].
    past: Option<Direct>,
    /// Shared by writes of whole blocks, exclusive for one that reads its edges first.
    edges: RwLock<()>,
}

#[derive(Debug)]
struct Direct {
    /// O_DIRECT.
    io: File,
    /// O_DIRECT and O_DSYNC.
    dsync: File,
    /// What offsets, lengths and addresses must be multiples of.
    align: usize,
}

/// Makes the directory in which a device's file is to be, durably.
pub fn create_parent(path: &Path) -> Result<(), FileError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    let failed = |error| FileError::Io { path: parent.to_owned(), operation: "create_dir", error };
    create_durably(parent).map_err(failed)
}

impl FileDevice {
    /// Makes a file of `size` bytes, allocates and writes all of it once, and makes file and name
    /// durable, so that a later durable write changes data only. Under its name the file is
    /// complete or not there at all. Never for a block device: that is opened.
    pub fn create(path: &Path, size: ByteCount, access: Access) -> Result<Self, FileError> {
        prepare::create(path, size.0, prepare::Fill::Written, access)
    }

    /// Like [`FileDevice::create`], but the space is only allocated: quick for a large pool,
    /// whose flushes are few.
    pub fn create_unwritten(
        path: &Path,
        size: ByteCount,
        access: Access,
    ) -> Result<Self, FileError> {
        prepare::create(path, size.0, prepare::Fill::Allocated, access)
    }

    /// Opens a file or block device with the size it has.
    pub fn open(path: &Path, access: Access) -> Result<Self, FileError> {
        prepare::open(path, access)
    }

    /// Opens one to be read only, also while another process has it.
    pub fn look(path: &Path) -> Result<Self, FileError> {
        prepare::look(path)
    }

    fn io_error(
        &self,
        operation: &'static str,
        (offset, length): (u64, usize),
        error: io::Error,
    ) -> DeviceError {
        let (device, length) = (self.name(), to_u64(length));
        DeviceError::Io { device, operation, offset, length, error: Arc::new(error) }
    }

    fn write(
        &self,
        operation: &'static str,
        offset: u64,
        bytes: &[u8],
        choose: impl Fn(&Direct) -> &File,
    ) -> Result<(), DeviceError> {
        check_range(self, offset, bytes.len())?;
        let past = self.past.as_ref().filter(|_| bytes.len() >= LARGE_BYTES_MIN);
        let result = match &self.direct {
            None => match past.filter(|past| past.takes(offset, bytes)) {
                Some(past) => write_fully(&past.io, offset, bytes, past.align),
                None => write_fully(&self.plain, offset, bytes, 1),
            },
            Some(direct) if direct.takes(offset, bytes) => {
                let _shared = self.edges.read().unwrap_or_else(PoisonError::into_inner);
                write_fully(choose(direct), offset, bytes, direct.align)
            }
            Some(direct) => {
                let _alone = self.edges.write().unwrap_or_else(PoisonError::into_inner);
                direct.write_bounced(choose(direct), offset, bytes)
            }
        };
        result.map_err(|error| self.io_error(operation, (offset, bytes.len()), error))
    }

    fn sync(&self, place: (u64, usize)) -> Result<(), DeviceError> {
        let file = self.direct.as_ref().map_or(&self.plain, |direct| &direct.io);
        file.sync_data().map_err(|error| self.io_error("fdatasync", place, error))
    }
}

impl Device for FileDevice {
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    fn size(&self) -> ByteCount {
        ByteCount(self.size)
    }

    fn alignment(&self) -> ByteCount {
        ByteCount(to_u64(self.direct.as_ref().map_or(1, |direct| direct.align)))
    }

    fn durability(&self) -> Durability {
        match self.direct {
            Some(_) => Durability::DirectDsync,
            None => Durability::Fdatasync,
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self, offset, buffer.len())?;
        let place = (offset, buffer.len());
        let result = match &self.direct {
            None => read_fully(&self.plain, offset, buffer, 1),
            Some(direct) if direct.takes(offset, buffer) => {
                read_fully(&direct.io, offset, buffer, direct.align)
            }
            Some(direct) => direct.read_bounced(offset, buffer),
        };
        result.map_err(|error| self.io_error("read", place, error))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.write("write", offset, bytes, |direct| &direct.io)
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), DeviceError> {
        let length = pieces.iter().map(|piece| piece.len()).sum();
        check_range(self, offset, length)?;
        match (pieces, &self.direct) {
            ([bytes], _) => return self.write_at(offset, bytes),
            (_, Some(_)) => return self.write_at(offset, &AlignedBuffer::gathered(pieces)),
            (_, None) => {}
        }
        let past = self.past.as_ref().filter(|past| {
            length >= LARGE_BYTES_MIN && pieces.iter().all(|piece| past.takes(offset, piece))
        });
        let (file, align) = past.map_or((&self.plain, 1), |past| (&past.io, past.align));
        let written = write_pieces(file, offset, pieces, align);
        written.map_err(|error| self.io_error("write", (offset, length), error))
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        const OPERATION: &str = "durable write";
        if let Some(past) = self.past.as_ref().filter(|past| past.has_whole(offset, bytes)) {
            check_range(self, offset, bytes.len())?;
            let written = if past.takes(offset, bytes) {
                write_fully(&past.dsync, offset, bytes, past.align)
            } else {
                past.write_bounced(&past.dsync, offset, bytes)
            };
            return written.map_err(|error| self.io_error(OPERATION, (offset, bytes.len()), error));
        }
        self.write(OPERATION, offset, bytes, |direct| &direct.dsync)?;
        if self.direct.is_none() && !bytes.is_empty() {
            self.sync((offset, bytes.len()))?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.sync((0, 0))
    }
}

impl Direct {
    /// Whole blocks in memory that the kernel takes as it is.
    fn takes(&self, offset: u64, bytes: &[u8]) -> bool {
        self.has_whole(offset, bytes) && AlignedBuffer::is_aligned(bytes, self.align)
    }

    /// Whole blocks: nothing at their edges has to be read before.
    fn has_whole(&self, offset: u64, bytes: &[u8]) -> bool {
        offset.is_multiple_of(to_u64(self.align)) && bytes.len().is_multiple_of(self.align)
    }

    /// Calls `step` with pieces of `offset..offset + length`: the whole blocks around the piece
    /// in the file, and the piece in the caller's buffer.
    fn pieces(
        &self,
        offset: u64,
        length: usize,
        mut step: impl FnMut(Piece) -> io::Result<()>,
    ) -> io::Result<()> {
        let align = to_u64(self.align);
        let mut done = 0;
        while done < length {
            let at = offset + to_u64(done);
            let first = at - at % align;
            let end = (offset + to_u64(length)).min(first + to_u64(BOUNCE_BYTES_MAX));
            let count = to_usize(end - at);
            let blocks = to_usize(end.next_multiple_of(align) - first);
            step(Piece { first, blocks, skip: to_usize(at - first), start: done, count })?;
            done += count;
        }
        Ok(())
    }

    fn read_bounced(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut bounce = self.bounce(offset, buffer.len());
        self.pieces(offset, buffer.len(), |piece| {
            let blocks = &mut bounce[..piece.blocks];
            read_fully(&self.io, piece.first, blocks, self.align)?;
            buffer[piece.start..piece.start + piece.count]
                .copy_from_slice(&blocks[piece.skip..piece.skip + piece.count]);
            Ok(())
        })
    }

    fn write_bounced(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut bounce = self.bounce(offset, bytes.len());
        self.pieces(offset, bytes.len(), |piece| {
            let blocks = &mut bounce[..piece.blocks];
            let last = piece.blocks - self.align;
            if piece.skip > 0 {
                read_fully(&self.io, piece.first, &mut blocks[..self.align], self.align)?;
            }
            let read_already = last == 0 && piece.skip > 0;
            if piece.skip + piece.count < piece.blocks && !read_already {
                let at = piece.first + to_u64(last);
                read_fully(&self.io, at, &mut blocks[last..], self.align)?;
            }
            blocks[piece.skip..piece.skip + piece.count]
                .copy_from_slice(&bytes[piece.start..piece.start + piece.count]);
            write_fully(file, piece.first, blocks, self.align)
        })
    }

    fn bounce(&self, offset: u64, length: usize) -> AlignedBuffer {
        let skip = to_usize(offset % to_u64(self.align));
        let whole = (skip + length).next_multiple_of(self.align);
        AlignedBuffer::new(whole.min(BOUNCE_BYTES_MAX))
    }
}

struct Piece {
    /// First byte in the file, at a block border.
    first: u64,
    /// Bytes of the whole blocks.
    blocks: usize,
    /// Bytes of the first block that are not asked for.
    skip: usize,
    /// Where the piece begins in the caller's buffer.
    start: usize,
    /// Its bytes.
    count: usize,
}

fn read_fully(file: &File, offset: u64, buffer: &mut [u8], align: usize) -> io::Result<()> {
    let length = buffer.len();
    transfer(length, align, io::ErrorKind::UnexpectedEof, |done| {
        file.read_at(&mut buffer[done..], offset + to_u64(done))
    })
}

fn write_fully(file: &File, offset: u64, bytes: &[u8], align: usize) -> io::Result<()> {
    transfer(bytes.len(), align, io::ErrorKind::WriteZero, |done| {
        file.write_at(&bytes[done..], offset + to_u64(done))
    })
}

/// With as few calls as the kernel allows; what a short one left goes out piece by piece.
fn write_pieces(file: &File, offset: u64, pieces: &[&[u8]], align: usize) -> io::Result<()> {
    let mut at = offset;
    for some in pieces.chunks(PIECES_MAX) {
        let slices: Vec<IoSlice<'_>> = some.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut done = match rustix::io::pwritev(file, &slices, at) {
            Ok(moved) => moved - moved % align,
            Err(Errno::INTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        for piece in some {
            let skip = done.min(piece.len());
            write_fully(file, at + to_u64(skip), &piece[skip..], align)?;
            done -= skip;
            at += to_u64(piece.len());
        }
    }
    Ok(())
}

/// Repeats `step(done)` until `length` bytes were moved. What a short call moved of its last
/// block is moved again; a call that brings no whole block further is an error of kind `stuck`.
fn transfer(
    length: usize,
    align: usize,
    stuck: io::ErrorKind,
    mut step: impl FnMut(usize) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        match step(done) {
            Ok(moved) if moved >= length - done => done = length,
            Ok(moved) if moved >= align => done += moved - moved % align,
            Ok(moved) => {
                let text = format!("stopped after {} of {length} bytes", done + moved);
                return Err(io::Error::new(stuck, text));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
