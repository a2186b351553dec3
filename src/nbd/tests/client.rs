//! A client that says exactly what a test tells it to.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::PATIENCE;

pub(super) const ACK: u32 = 1;
pub(super) const ERR_UNSUP: u32 = 0x8000_0001;
pub(super) const ERR_POLICY: u32 = 0x8000_0002;
pub(super) const ERR_INVALID: u32 = 0x8000_0003;
pub(super) const ERR_TLS_REQD: u32 = 0x8000_0005;
pub(super) const ERR_UNKNOWN: u32 = 0x8000_0006;
pub(super) const ERR_SHUTDOWN: u32 = 0x8000_0007;
pub(super) const ERR_TOO_BIG: u32 = 0x8000_0009;

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISC: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
pub(super) const CACHE: u16 = 5;
pub(super) const WRITE_ZEROES: u16 = 6;
pub(super) const BLOCK_STATUS: u16 = 7;

/// One answer to an option: its type and payload.
pub(super) type OptionReply = (u32, Vec<u8>);

/// A structured chunk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) done: bool,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) payload: Vec<u8>,
}

impl Chunk {
    /// The error number of an error chunk.
    pub(super) fn error(&self) -> u32 {
        assert_eq!(self.kind, 0x8001, "{self:?}");
        let length = u16::from_be_bytes(self.payload[4..6].try_into().unwrap());
        assert_eq!(self.payload.len(), 6 + usize::from(length));
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }

    /// The text of an error chunk.
    pub(super) fn text(&self) -> &str {
        assert_eq!(self.kind, 0x8001, "{self:?}");
        std::str::from_utf8(&self.payload[6..]).unwrap()
    }
}

pub(super) fn option(code: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [b"IHAVEOPT", &code.to_be_bytes()[..], &length.to_be_bytes(), payload].concat()
}

pub(super) fn request(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [
        &[0x25, 0x60, 0x95, 0x13][..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// Payload of INFO and GO.
pub(super) fn info_payload(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut bytes = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(&u16::try_from(requests.len()).unwrap().to_be_bytes());
    bytes.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    bytes
}

/// Payload of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(super) fn context_payload(name: &str, queries: &[&str]) -> Vec<u8> {
    let text = |text: &str| {
        let length = u32::try_from(text.len()).unwrap().to_be_bytes();
        [&length[..], text.as_bytes()].concat()
    };
    let count = u32::try_from(queries.len()).unwrap().to_be_bytes();
    let queries: Vec<u8> = queries.iter().flat_map(|query| text(query)).collect();
    [text(name), count.to_vec(), queries].concat()
}

pub(super) struct Client {
    pub(super) stream: TcpStream,
}

impl Client {
    pub(super) async fn connect(address: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(address).await.unwrap() }
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.stream.write_all(bytes)).await.expect("server reads").unwrap();
    }

    pub(super) async fn read<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).await.try_into().unwrap()
    }

    pub(super) async fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let read = timeout(PATIENCE, self.stream.read_exact(&mut bytes)).await;
        read.expect("server answers").expect("server does not hang up");
        bytes
    }

    /// Everything until the server hangs up.
    pub(super) async fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let read = timeout(PATIENCE, self.stream.read_to_end(&mut bytes)).await;
        // A reset is also an end; what came before it is kept.
        if let Err(error) = read.expect("server hangs up") {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        bytes
    }

    pub(super) async fn expect_closed(&mut self) {
        let rest = self.rest().await;
        assert!(rest.is_empty(), "server said {rest:?} before it hung up");
    }

    /// Greeting and client flags.
    pub(super) async fn greet(&mut self, flags: u32) {
        assert_eq!(&self.read::<18>().await, b"NBDMAGICIHAVEOPT\x00\x03");
        self.send(&flags.to_be_bytes()).await;
    }

    /// Sends an option and reads all answers to it.
    pub(super) async fn option(&mut self, code: u32, payload: &[u8]) -> Vec<OptionReply> {
        self.send(&option(code, payload)).await;
        self.option_replies(code).await
    }

    pub(super) async fn option_replies(&mut self, code: u32) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.read::<8>().await, 0x3_e889_0455_65a9u64.to_be_bytes());
            assert_eq!(u32::from_be_bytes(self.read().await), code);
            let kind = u32::from_be_bytes(self.read().await);
            let length = u32::from_be_bytes(self.read().await);
            let payload = self.bytes(usize::try_from(length).unwrap()).await;
            replies.push((kind, payload));
            if kind == ACK || kind >= 1 << 31 {
                return replies;
            }
        }
    }

    /// Sends an option and checks the type of its last answer.
    pub(super) async fn expect_option(&mut self, code: u32, payload: &[u8], last: u32) {
        let replies = self.option(code, payload).await;
        assert_eq!(replies.last().unwrap().0, last, "option {code}: {replies:?}");
    }

    /// Opens `name`, with structured replies and `base:allocation` if `structured`.
    pub(super) async fn open(&mut self, name: &str, structured: bool) {
        self.greet(3).await;
        if structured {
            self.expect_option(8, b"", ACK).await;
            self.expect_option(10, &context_payload(name, &["base:allocation"]), ACK).await;
        }
        self.expect_option(7, &info_payload(name, &[]), ACK).await;
    }

    pub(super) async fn request(
        &mut self,
        kind: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u32,
    ) {
        self.send(&request(kind, flags, cookie, offset, length)).await;
    }

    /// A write with its payload.
    pub(super) async fn write(&mut self, flags: u16, cookie: u64, offset: u64, data: &[u8]) {
        let header = request(WRITE, flags, cookie, offset, u32::try_from(data.len()).unwrap());
        self.send(&[&header, data].concat()).await;
    }

    /// Error and cookie of a simple reply.
    pub(super) async fn simple(&mut self) -> (u32, u64) {
        assert_eq!(self.read::<4>().await, [0x67, 0x44, 0x66, 0x98]);
        (u32::from_be_bytes(self.read().await), u64::from_be_bytes(self.read().await))
    }

    pub(super) async fn chunk(&mut self) -> Chunk {
        assert_eq!(self.read::<4>().await, [0x66, 0x8e, 0x33, 0xef]);
        let flags = u16::from_be_bytes(self.read().await);
        assert!(flags <= 1);
        let kind = u16::from_be_bytes(self.read().await);
        let cookie = u64::from_be_bytes(self.read().await);
        let length = u32::from_be_bytes(self.read().await);
        let payload = self.bytes(usize::try_from(length).unwrap()).await;
        Chunk { done: flags == 1, kind, cookie, payload }
    }

    /// Asks and takes the one chunk that answers.
    pub(super) async fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> Chunk {
        self.request(kind, flags, 5, offset, length).await;
        self.chunk().await
    }

    /// Asks, not for data, without structured replies: the error number.
    pub(super) async fn ask_simple(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        length: u32,
    ) -> u32 {
        self.request(kind, flags, 5, offset, length).await;
        let (error, cookie) = self.simple().await;
        assert_eq!(cookie, 5);
        error
    }
}
