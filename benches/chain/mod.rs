//! The floor of any synchronous mirror with a log at both ends: client -> relay -> sink over
//! loopback TCP, 4 KiB a write. The relay forwards first and writes its own file while the sink
//! writes its own; it answers when both are done. Both files are preallocated, once written, and
//! written with O_DIRECT and O_DSYNC where the file system has them.
//!
//! Used by the benches `floor` and `latency`. An error ends the thread that met it, and the next
//! write of the client fails.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use mirrorhub::device::Device;
use mirrorhub::device::buffer::AlignedBuffer;
use mirrorhub::device::file::{Access, FileDevice};
use mirrorhub::units::numbers::ByteCount;

const WRITE_BYTES: usize = 4096;
const ANSWER_BYTES: usize = 32;
const FILE_BYTES: u64 = 64 << 20;

/// The client's end of the chain.
#[derive(Debug)]
pub struct Chain {
    stream: TcpStream,
    /// How the files are written.
    pub durability: String,
}

/// A file that is written in a circle.
struct Log {
    device: FileDevice,
    at: u64,
}

impl Log {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let device = FileDevice::create(path, ByteCount(FILE_BYTES), Access::Direct)?;
        Ok(Self { device, at: 0 })
    }

    fn append(&mut self, block: &AlignedBuffer) -> io::Result<()> {
        self.device.write_durable_at(self.at, block).map_err(io::Error::other)?;
        self.at = (self.at + 4096) % FILE_BYTES;
        Ok(())
    }
}

impl Chain {
    /// Starts relay and sink with their files in `dir`. They end when this is dropped.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        let (relay, sink) = (Log::create(&dir.join("relay"))?, Log::create(&dir.join("sink"))?);
        let durability = relay.device.durability().to_string();
        let relay_door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("relay")?;
        let sink_door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("sink")?;
        let (relay_at, sink_at) = (relay_door.local_addr()?, sink_door.local_addr()?);
        std::thread::spawn(move || accept(&sink_door).and_then(|peer| run_sink(peer, sink)));
        std::thread::spawn(move || {
            let next = TcpStream::connect(sink_at)?;
            next.set_nodelay(true)?;
            accept(&relay_door).and_then(|peer| run_relay(peer, next, relay))
        });
        let stream = TcpStream::connect(relay_at).context("relay")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, durability })
    }

    /// One write after another for `length`; the time of each.
    pub fn write_for(&mut self, length: Duration) -> anyhow::Result<Vec<Duration>> {
        let (data, mut answer) = ([7; WRITE_BYTES], [0; ANSWER_BYTES]);
        let (begin, mut times) = (Instant::now(), Vec::new());
        while begin.elapsed() < length {
            let start = Instant::now();
            self.stream.write_all(&data).context("the chain broke")?;
            self.stream.read_exact(&mut answer).context("the chain broke")?;
            times.push(start.elapsed());
        }
        Ok(times)
    }
}

fn accept(door: &TcpListener) -> io::Result<TcpStream> {
    let (peer, _) = door.accept()?;
    peer.set_nodelay(true)?;
    Ok(peer)
}

fn run_sink(mut peer: TcpStream, mut log: Log) -> io::Result<()> {
    let mut block = AlignedBuffer::new(WRITE_BYTES);
    loop {
        peer.read_exact(&mut block)?;
        log.append(&block)?;
        peer.write_all(&[1; ANSWER_BYTES])?;
    }
}

fn run_relay(mut peer: TcpStream, mut next: TcpStream, mut log: Log) -> io::Result<()> {
    let mut block = AlignedBuffer::new(WRITE_BYTES);
    let mut answer = [0; ANSWER_BYTES];
    loop {
        peer.read_exact(&mut block)?;
        next.write_all(&block)?;
        log.append(&block)?;
        next.read_exact(&mut answer)?;
        peer.write_all(&answer)?;
    }
}

/// The `per_mille`-th of a thousand parts, sorted.
pub fn quantile(times: &mut [Duration], per_mille: usize) -> Duration {
    times.sort_unstable();
    times.get(times.len() * per_mille / 1000).copied().unwrap_or_default()
}
