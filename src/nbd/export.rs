//! What the server asks of a volume or an image: the traits [`Export`] and [`Exports`].
//!
//! Implemented by `filer` (volumes, read-write) and `hub` (images, read-only), called by
//! `transmission` and `handshake`. The server has made sure of range, read-only, length and
//! flags before it calls; an export sees only requests inside its size, at any byte alignment,
//! of at least one byte and, for reads and writes, of at most
//! [`NBD_REQUEST_BYTES_MAX`](crate::limits::NBD_REQUEST_BYTES_MAX) bytes.
//!
//! A future that the server got is polled to its end, also when the client has gone: only a stop
//! of the process that runs into its drain deadline drops one. An error goes to the client as one
//! of the eight codes of the protocol, with its text where the client takes texts; it ends
//! neither the connection nor other requests.

use std::borrow::Cow;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::units::numbers::ByteCount;

/// The eight errors that NBD knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// Not permitted: a write to a read-only export.
    Perm,
    /// Input or output failed.
    Io,
    /// No memory; avoid.
    NoMem,
    /// The request makes no sense here.
    Inval,
    /// No space left, or a write past the end.
    NoSpc,
    /// Too long to answer in one piece.
    Overflow,
    /// Cannot be done fast; only for fast zeroing.
    NotSup,
    /// The server is being stopped.
    Shutdown,
}

impl ErrorCode {
    /// The number on the wire: `errno` of Linux, by the protocol text.
    pub const fn wire(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }
}

/// A failed request: one code, and a text for the person at the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExportError {
    /// What a program sees.
    pub code: ErrorCode,
    /// What a person sees, where structured replies were negotiated. Cut at 4096 bytes.
    pub message: Cow<'static, str>,
}

impl ExportError {
    /// An error with its text.
    pub fn new(code: ErrorCode, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into() }
    }
}

/// What an export is; constant while it is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Canonical name, as in the list.
    pub name: String,
    /// For people.
    pub description: String,
    /// Bytes of the export.
    pub size: ByteCount,
    /// Writes get EPERM from the server and never reach the export.
    pub read_only: bool,
    /// Flush and FUA on one connection cover all connections (R17).
    pub multi_conn: bool,
    /// Smallest unit, told to clients; a power of two. Smaller requests are served all the same.
    pub minimum_block: u32,
    /// Unit without read-modify-write; a power of two, at least 512.
    pub preferred_block: u32,
}

impl ExportInfo {
    /// Any alignment, 4 KiB preferred, read-write, without multi-conn.
    pub fn new(name: impl Into<String>, size: ByteCount) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            size,
            read_only: false,
            multi_conn: false,
            minimum_block: 1,
            preferred_block: 4096,
        }
    }
}

/// A piece of what was read. The pieces of an answer stand in order and add up to its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// These bytes.
    Data(Bytes),
    /// That many zero bytes.
    Hole(u64),
}

impl Segment {
    /// Bytes it stands for.
    pub fn length(&self) -> u64 {
        match self {
            Self::Data(bytes) => crate::units::convert::to_u64(bytes.len()),
            Self::Hole(length) => *length,
        }
    }
}

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not zero. Multiples of 512 where the request allows.
    pub length: u64,
    /// Nothing is allocated: a write may need space.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// An answer that comes later.
pub type ExportFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, ExportError>> + Send + 'a>>;

/// One open export. Dropping the last reference closes it (an image: unpins it).
///
/// Implementations run [`conformance`](super::conformance) in their tests.
pub trait Export: Send + Sync + 'static {
    /// What it is.
    fn info(&self) -> &ExportInfo;

    /// Reads `length` bytes.
    fn read(&self, offset: u64, length: u32) -> ExportFuture<'_, Vec<Segment>>;

    /// Writes `data`; answered under the policy in force, with `fua` when durable.
    fn write(&self, offset: u64, data: Bytes, fua: bool) -> ExportFuture<'_, ()>;

    /// Makes every write durable that was answered before this call, on any connection.
    fn flush(&self) -> ExportFuture<'_, ()>;

    /// Makes holes, which read as zeroes, of the whole blocks of 4 KiB inside the range; the edges
    /// stay as they are (R16). A range without a whole block does nothing.
    fn trim(&self, offset: u64, length: u32, fua: bool) -> ExportFuture<'_, ()>;

    /// Makes every byte of the range zero; with `no_hole` with space behind it. Must be faster
    /// than a write of as many bytes: the server promises so to every client.
    fn write_zeroes(
        &self,
        offset: u64,
        length: u32,
        no_hole: bool,
        fua: bool,
    ) -> ExportFuture<'_, ()>;

    /// May fetch the range to where reads are quick.
    fn cache(&self, offset: u64, length: u32) -> ExportFuture<'_, ()>;

    /// Runs from `offset` on, at least one, at most `at_most`. They may end before the range
    /// does; what goes past it is cut by the server.
    fn extents(&self, offset: u64, length: u32, at_most: usize) -> ExportFuture<'_, Vec<Extent>>;

    /// Cancelled when this export ends before its clients want it to (a pin that expired, a
    /// fenced volume): the server then ends the connection as for its own stop.
    fn ended(&self) -> Option<CancellationToken> {
        None
    }
}

/// A line of the list of exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Name to open it by.
    pub name: String,
    /// For people.
    pub description: String,
}

/// Why an export was not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is none of that name.
    #[error("no such export")]
    Unknown,
    /// It exists and is not to be had now; the text says why.
    #[error("{0}")]
    Refused(Cow<'static, str>),
    /// This process is being stopped.
    #[error("the server is being stopped")]
    Shutdown,
}

/// An export that is opened later.
pub type OpenFuture<'a> =
    Pin<Box<dyn Future<Output = Result<Arc<dyn Export>, OpenError>> + Send + 'a>>;

/// All exports of a process.
pub trait Exports: Send + Sync + 'static {
    /// Those that are listed; the implementation bounds the number.
    fn list(&self) -> Vec<Listed>;

    /// Opens one, once per connection and once per query about it. The empty name is the default
    /// export if there is exactly one. The future may be dropped (handshake deadline).
    fn open<'a>(&'a self, name: &'a str) -> OpenFuture<'a>;
}
