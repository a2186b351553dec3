//! The server driven by hand-written bytes over loopback TCP.
//!
//! [`client`] speaks the protocol with constants of its own, written down from the protocol text,
//! so that a wrong constant in `protocol` cannot agree with itself. [`exports`] are exports that
//! wait, fail and panic on demand.

mod client;
mod exports;
mod handshake;
mod mutation;
mod stopping;
mod tls;
mod transmission;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::client::Client;
use super::export::{ExportInfo, Exports};
use super::listen::{Listen, Listener};
use super::memory::{Memory, MemoryExports};
use super::serve::{Options, Server};
use crate::units::numbers::ByteCount;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// The usual bounds, but for the linger: most tests stop with clients still connected.
fn options() -> Options {
    Options { linger: Duration::from_millis(50), ..Options::default() }
}

/// A server on loopback.
struct Running {
    server: Server,
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn start(options: Options, exports: Arc<dyn Exports>) -> Self {
        let listen = Listen::Tcp("127.0.0.1:0".parse().unwrap());
        let listener = Listener::bind(&listen).await.unwrap();
        let &Listen::Tcp(address) = listener.listens_on() else { unreachable!() };
        let (server, stop) = (Server::new(options), CancellationToken::new());
        let (running, token) = (server.clone(), stop.clone());
        let task = tokio::spawn(async move { running.run(listener, exports, token).await });
        Self { server, address, stop, task }
    }

    async fn connect(&self) -> Client {
        Client::connect(self.address).await
    }

    /// Waits until that many connections are open.
    async fn connections(&self, count: u64) {
        until(|| self.server.counters().connections_open() == count).await;
    }

    /// Waits until that many connections have ended for a fault of their client.
    async fn protocol_errors(&self, count: u64) {
        until(|| self.server.counters().protocol_errors() == count).await;
    }

    /// Waits until `run` returns.
    async fn stopped(self) {
        timeout(PATIENCE, self.task).await.expect("run returns").unwrap();
    }

    /// Stops and checks that nothing is left.
    async fn finish(self) {
        let server = self.server.clone();
        self.stop.cancel();
        self.stopped().await;
        assert_eq!(server.counters().connections_open(), 0);
        assert_eq!(server.bytes_in_flight(), ByteCount(0));
    }
}

/// Asks until `condition` holds.
async fn until(condition: impl Fn() -> bool) {
    let asking = async {
        let mut tick = tokio::time::interval(Duration::from_millis(2));
        while !condition() {
            tick.tick().await;
        }
    };
    timeout(PATIENCE, asking).await.expect("condition comes true");
}

/// An export of 1 MiB called `vol0`, with data in blocks 1 and 3 and holes elsewhere.
fn volume() -> Arc<Memory> {
    let mut info = ExportInfo::new("vol0", ByteCount(1 << 20));
    info.description = "a test".into();
    info.multi_conn = true;
    let memory = Memory::new(info);
    memory.fill(4096, &[0xab; 4096]);
    memory.fill(3 * 4096, &[0xcd; 4096]);
    Arc::new(memory)
}

async fn serve_volume() -> (Running, Arc<Memory>) {
    let memory = volume();
    let exports = Arc::new(MemoryExports::new([Arc::clone(&memory)]));
    (Running::start(options(), exports).await, memory)
}
