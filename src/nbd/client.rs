//! A small NBD client over a blocking stream: for `mirrorhub demo` and for tests that must know
//! exactly which write was answered.
//!
//! Fixed newstyle with NBD_OPT_GO and simple replies (NBD protocol text, "Option haggling" and
//! "Simple reply message"). Requests can be pipelined: [`Client::submit_write`] returns a cookie,
//! [`Client::reply`] tells which one was answered. A stream that breaks makes every later call fail.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::protocol::option::GREETING_BYTES;
use super::protocol::request::REQUEST_BYTES;
use super::protocol::{
    INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC,
};
use crate::limits::{NBD_OPTION_BYTES_MAX, NBD_REQUEST_BYTES_MAX};
use crate::units::convert::{to_u64, u32_to_usize};

const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

/// Why a request or the connection failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection broke.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// The server does not have or give the export.
    #[error("the server refused the export {name:?}: {text}")]
    Refused { name: String, text: String },
    /// The server does not speak fixed newstyle NBD as this client does.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server answered a request with an error.
    #[error("the server answered with error {0}")]
    Answer(u32),
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// One connection.
pub struct Client {
    stream: Box<dyn Stream>,
    size: u64,
    next: u64,
    reads: HashMap<u64, usize>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("size", &self.size).finish_non_exhaustive()
    }
}

/// An answered request.
#[derive(Debug)]
pub struct Reply {
    /// Which request.
    pub cookie: u64,
    /// Its data, empty but for reads; or the NBD error.
    pub result: Result<Vec<u8>, u32>,
}

impl Client {
    /// Connects to a unix socket; every later wait is bounded by `timeout`.
    pub fn unix(path: &Path, export: &str, timeout: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Self::greet(Box::new(stream), export)
    }

    /// Connects to a TCP port; every later wait is bounded by `timeout`.
    pub fn tcp(address: SocketAddr, export: &str, timeout: Duration) -> Result<Self, ClientError> {
        let stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Self::greet(Box::new(stream), export)
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Sends a write; its reply comes through [`Client::reply`].
    pub fn submit_write(&mut self, offset: u64, data: &[u8]) -> Result<u64, ClientError> {
        let cookie = self.submit(WRITE, offset, data.len())?;
        self.stream.write_all(data)?;
        Ok(cookie)
    }

    /// Sends a read; its reply comes through [`Client::reply`].
    pub fn submit_read(&mut self, offset: u64, length: usize) -> Result<u64, ClientError> {
        let cookie = self.submit(READ, offset, length)?;
        self.reads.insert(cookie, length);
        Ok(cookie)
    }

    /// Waits for the next reply, of whatever request.
    pub fn reply(&mut self) -> Result<Reply, ClientError> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = head;
        if u32::from_be_bytes([m0, m1, m2, m3]) != SIMPLE_REPLY_MAGIC {
            return Err(ClientError::Protocol("bad magic of a reply"));
        }
        let cookie = u64::from_be_bytes(cookie);
        let error = u32::from_be_bytes([e0, e1, e2, e3]);
        let length = self.reads.remove(&cookie).unwrap_or(0);
        if error != 0 {
            return Ok(Reply { cookie, result: Err(error) });
        }
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok(Reply { cookie, result: Ok(data) })
    }

    /// Writes and waits for the answer. No other request may be under way.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let cookie = self.submit_write(offset, data)?;
        self.answer(cookie).map(drop)
    }

    /// Reads. No other request may be under way.
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, ClientError> {
        let cookie = self.submit_read(offset, length)?;
        self.answer(cookie)
    }

    /// Flushes. No other request may be under way.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        let cookie = self.submit(FLUSH, 0, 0)?;
        self.answer(cookie).map(drop)
    }

    /// Trims. No other request may be under way.
    pub fn trim(&mut self, offset: u64, length: usize) -> Result<(), ClientError> {
        let cookie = self.submit(TRIM, offset, length)?;
        self.answer(cookie).map(drop)
    }

    /// Writes zeroes. No other request may be under way.
    pub fn write_zeroes(&mut self, offset: u64, length: usize) -> Result<(), ClientError> {
        let cookie = self.submit(WRITE_ZEROES, offset, length)?;
        self.answer(cookie).map(drop)
    }

    /// Says goodbye.
    pub fn disconnect(mut self) -> Result<(), ClientError> {
        self.submit(DISCONNECT, 0, 0).map(drop)
    }

    fn answer(&mut self, cookie: u64) -> Result<Vec<u8>, ClientError> {
        let reply = self.reply()?;
        if reply.cookie != cookie {
            return Err(ClientError::Protocol("an answer to another request"));
        }
        reply.result.map_err(ClientError::Answer)
    }

    fn submit(&mut self, command: u16, offset: u64, length: usize) -> Result<u64, ClientError> {
        let length = u32::try_from(length)
            .map_err(|_| ClientError::Io(io::ErrorKind::InvalidInput.into()))?;
        if command == READ && u64::from(length) > NBD_REQUEST_BYTES_MAX {
            return Err(ClientError::Io(io::ErrorKind::InvalidInput.into()));
        }
        let cookie = self.next;
        self.next += 1;
        let mut head = [0; REQUEST_BYTES];
        head[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head[6..8].copy_from_slice(&command.to_be_bytes());
        head[8..16].copy_from_slice(&cookie.to_be_bytes());
        head[16..24].copy_from_slice(&offset.to_be_bytes());
        head[24..28].copy_from_slice(&length.to_be_bytes());
        self.stream.write_all(&head)?;
        Ok(cookie)
    }

    fn greet(mut stream: Box<dyn Stream>, export: &str) -> Result<Self, ClientError> {
        let mut greeting = [0; GREETING_BYTES];
        stream.read_exact(&mut greeting)?;
        if greeting[0..8] != INIT_MAGIC.to_be_bytes()
            || greeting[8..16] != OPTION_MAGIC.to_be_bytes()
        {
            return Err(ClientError::Protocol("no fixed newstyle greeting"));
        }
        let mut hello = 3_u32.to_be_bytes().to_vec();
        let name = export.as_bytes();
        let name_bytes = u32::try_from(name.len())
            .map_err(|_| ClientError::Io(io::ErrorKind::InvalidInput.into()))?;
        hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        hello.extend_from_slice(&OPTION_GO.to_be_bytes());
        hello.extend_from_slice(&(name_bytes + 6).to_be_bytes());
        hello.extend_from_slice(&name_bytes.to_be_bytes());
        hello.extend_from_slice(name);
        hello.extend_from_slice(&[0, 0]);
        stream.write_all(&hello)?;
        let mut size = None;
        loop {
            let (kind, payload) = option_reply(&mut *stream)?;
            match kind {
                REPLY_ACK => break,
                REPLY_INFO if payload.get(..2) == Some(&INFO_EXPORT.to_be_bytes()[..]) => {
                    let bytes = payload.get(2..10).and_then(|bytes| bytes.first_chunk::<8>());
                    size = bytes.map(|bytes| u64::from_be_bytes(*bytes));
                }
                REPLY_INFO => {}
                kind if kind & REPLY_ERROR != 0 => {
                    let text = String::from_utf8_lossy(&payload).into_owned();
                    return Err(ClientError::Refused { name: export.to_owned(), text });
                }
                _ => return Err(ClientError::Protocol("an option reply that was not asked for")),
            }
        }
        let size = size.ok_or(ClientError::Protocol("no size of the export"))?;
        Ok(Self { stream, size, next: 1, reads: HashMap::new() })
    }
}

fn option_reply(stream: &mut dyn Stream) -> Result<(u32, Vec<u8>), ClientError> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if head[0..8] != OPTION_REPLY_MAGIC.to_be_bytes() || word(8) != OPTION_GO {
        return Err(ClientError::Protocol("bad magic of an option reply"));
    }
    let length = u32_to_usize(word(16));
    if to_u64(length) > NBD_OPTION_BYTES_MAX {
        return Err(ClientError::Protocol("an option reply that is too long"));
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok((word(12), payload))
}
