//! A network in memory: pipes with delays by a seed, that are cut, held back or forgotten.
//!
//! A [`Network`] belongs to the thread that simulates. Who listens takes sockets out of an
//! [`Inbox`]; who connects names an address. What was written is delivered in order, some time later,
//! also when the writer has gone: so frames of an old connection come behind those of a newer one.
//! A [`Route`] is the way between one address and its listener; the faults are its.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

use super::socket::Socket;

/// Bytes that may be under way in one direction.
const PIPE_BYTES_MAX: usize = 256 << 10;
/// How often a pipe that is held back looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How a pipe ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Open,
    /// The writer closed it: the end is read behind what it had written.
    Closed,
    /// It was reset: nothing more is read or written.
    Reset,
    /// Nobody tells the other end anything.
    Silent,
}

#[derive(Debug)]
struct Pipe {
    queue: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    ending: Ending,
    held: bool,
    chance: u64,
    /// Longest delay.
    delay_ms: u64,
    last: Instant,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Bytes that were read, in all.
    delivered: u64,
}

type Shared = Arc<Mutex<Pipe>>;

fn lock(pipe: &Shared) -> MutexGuard<'_, Pipe> {
    pipe.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pipe {
    fn new(chance: u64, delay_ms: u64) -> Shared {
        Arc::new(Mutex::new(Self {
            queue: VecDeque::new(),
            bytes: 0,
            ending: Ending::Open,
            held: false,
            chance,
            delay_ms,
            last: Instant::now(),
            reader: None,
            writer: None,
            delivered: 0,
        }))
    }

    fn draw(&mut self) -> u64 {
        self.chance = self.chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.chance >> 33
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    fn end(&mut self, ending: Ending) {
        if self.ending == Ending::Open || ending == Ending::Reset {
            self.ending = ending;
        }
        self.wake();
    }

    fn put(&mut self, bytes: &[u8]) {
        let micros = self.draw() % (self.delay_ms * 1000 + 1);
        let due = (Instant::now() + Duration::from_micros(micros)).max(self.last);
        self.last = due;
        self.bytes += bytes.len();
        self.queue.push_back((due, bytes.to_vec()));
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// The reading end of a pipe.
#[derive(Debug)]
pub struct Receiver {
    pipe: Shared,
    timer: Option<Pin<Box<Sleep>>>,
}

/// The writing end of a pipe.
#[derive(Debug)]
pub struct Sender {
    pipe: Shared,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // A writer learns that nobody reads.
        let mut pipe = lock(&self.pipe);
        if pipe.ending == Ending::Open {
            pipe.end(Ending::Reset);
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        lock(&self.pipe).end(Ending::Closed);
    }
}

enum Read {
    Bytes,
    End,
    Reset,
    At(Instant),
    Wait,
}

impl Receiver {
    fn take(&self, context: &Context<'_>, buffer: &mut ReadBuf<'_>) -> Read {
        let mut pipe = lock(&self.pipe);
        if pipe.ending == Ending::Reset {
            return Read::Reset;
        }
        if pipe.held {
            return Read::At(Instant::now() + LOOK_AGAIN);
        }
        let Some((due, front)) = pipe.queue.front_mut() else {
            if pipe.ending == Ending::Closed {
                return Read::End;
            }
            pipe.reader = Some(context.waker().clone());
            return Read::Wait;
        };
        if *due > Instant::now() {
            return Read::At(*due);
        }
        let count = front.len().min(buffer.remaining());
        buffer.put_slice(&front[..count]);
        front.drain(..count);
        if front.is_empty() {
            pipe.queue.pop_front();
        }
        pipe.bytes -= count;
        pipe.delivered += u64::try_from(count).unwrap_or(0);
        if let Some(writer) = pipe.writer.take() {
            writer.wake();
        }
        Read::Bytes
    }
}

impl AsyncRead for Receiver {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.take(context, buffer) {
                Read::Bytes | Read::End => return Poll::Ready(Ok(())),
                Read::Reset => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                Read::Wait => return Poll::Pending,
                Read::At(at) => {
                    lock(&this.pipe).reader = Some(context.waker().clone());
                    let mut timer = Box::pin(tokio::time::sleep_until(at));
                    let ready = timer.as_mut().poll(context).is_ready();
                    this.timer = Some(timer);
                    if !ready {
                        return Poll::Pending;
                    }
                }
            }
        }
    }
}

impl AsyncWrite for Sender {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut pipe = lock(&self.pipe);
        match pipe.ending {
            Ending::Reset | Ending::Closed => {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            Ending::Open | Ending::Silent => {}
        }
        let room = PIPE_BYTES_MAX.saturating_sub(pipe.bytes).min(bytes.len());
        if room == 0 {
            pipe.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        if pipe.ending == Ending::Open {
            pipe.put(&bytes[..room]);
        }
        Poll::Ready(Ok(room))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        self.poll_write(context, &all)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.pipe).end(Ending::Closed);
        Poll::Ready(Ok(()))
    }
}

/// Sockets for who listens.
#[derive(Debug, Clone, Default)]
pub struct Inbox {
    waiting: Arc<Mutex<VecDeque<Socket>>>,
    bell: Arc<Notify>,
}

impl Inbox {
    /// The next one.
    pub(crate) async fn accept(&self) -> Socket {
        loop {
            if let Some(socket) = self.take() {
                return socket;
            }
            self.bell.notified().await;
        }
    }

    fn take(&self) -> Option<Socket> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn put(&self, socket: Socket) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(socket);
        self.bell.notify_one();
    }
}

/// The way from one address.
#[derive(Debug)]
struct Route {
    address: SocketAddr,
    /// Nothing passes to the listener, or from it.
    held: [bool; 2],
    /// Connections that are made stand still from the start.
    strands: bool,
    /// To the listener, from the listener.
    pipes: Vec<[Shared; 2]>,
}

#[derive(Debug, Default)]
struct State {
    routes: Vec<Route>,
    inbox: Option<Inbox>,
    chance: u64,
    delay_ms: u64,
    connections: u64,
}

/// All routes to one listener.
#[derive(Debug, Clone, Default)]
pub struct Network(Arc<Mutex<State>>);

thread_local! {
    static HERE: RefCell<Option<Network>> = const { RefCell::new(None) };
}

impl Network {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The network of this thread, until [`Network::end`].
    pub(crate) fn begin(seed: u64, delay_ms: u64) -> Self {
        let network = Self::default();
        {
            let mut state = network.state();
            (state.chance, state.delay_ms) = (seed, delay_ms);
        }
        HERE.with_borrow_mut(|here| *here = Some(network.clone()));
        network
    }

    pub(crate) fn end() {
        HERE.with_borrow_mut(|here| *here = None);
    }

    pub(super) fn here() -> Option<Self> {
        HERE.with_borrow(Clone::clone)
    }

    /// Who listens from now on; `None`: nobody.
    pub(crate) fn listen(&self, inbox: Option<Inbox>) {
        self.state().inbox = inbox;
    }

    /// Connections that were made.
    pub(crate) fn connections(&self) -> u64 {
        self.state().connections
    }

    /// Bytes that were read, all pipes together.
    pub(crate) fn delivered(&self) -> u64 {
        let state = self.state();
        let pipes = state.routes.iter().flat_map(|route| route.pipes.iter().flatten());
        pipes.map(|pipe| lock(pipe).delivered).sum()
    }

    pub(super) async fn connect(&self, address: SocketAddr) -> io::Result<Socket> {
        tokio::time::sleep(Duration::from_millis(1)).await;
        while self.held(address) != [false; 2] {
            // Nobody answers, until the caller has waited long enough.
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let mut state = self.state();
        let Some(inbox) = state.inbox.clone() else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        state.connections += 1;
        state.chance = state.chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let delay = state.delay_ms;
        let to = Pipe::new(state.chance, delay);
        let from = Pipe::new(state.chance ^ 0x5555, delay);
        let route = state.route(address);
        (lock(&to).held, lock(&from).held) = (route.strands, route.strands);
        route.pipes.push([Arc::clone(&to), Arc::clone(&from)]);
        drop(state);
        let end = |pipe: &Shared| Receiver { pipe: Arc::clone(pipe), timer: None };
        inbox.put(Socket::Simulated(end(&to), Sender { pipe: Arc::clone(&from) }));
        Ok(Socket::Simulated(end(&from), Sender { pipe: to }))
    }

    fn held(&self, address: SocketAddr) -> [bool; 2] {
        self.state().route(address).held
    }

    /// Holds back what goes to the listener, and what comes from it, or lets it go on. What was
    /// written meanwhile is delivered then, if the connection still stands.
    pub(crate) fn hold(&self, address: SocketAddr, held: [bool; 2]) {
        let mut state = self.state();
        let route = state.route(address);
        (route.held, route.strands) = (held, false);
        for pipes in &route.pipes {
            for (pipe, held) in pipes.iter().zip(held) {
                let mut pipe = lock(pipe);
                pipe.held = held;
                pipe.wake();
            }
        }
    }

    /// The connections that an address has stand still until [`Network::hold`] lets them go on:
    /// later ones do not, unless `coming`.
    pub(crate) fn strand(&self, address: SocketAddr, coming: bool) {
        let mut state = self.state();
        let route = state.route(address);
        route.strands = coming;
        for pipe in route.pipes.iter().flatten() {
            lock(pipe).held = true;
        }
    }

    /// Whether something waits in a connection that is not the newest of its address.
    pub(crate) fn is_late(&self, address: SocketAddr) -> bool {
        let mut state = self.state();
        let [older @ .., _] = &state.route(address).pipes[..] else { return false };
        let waits = |pipe: &Shared| {
            let pipe = lock(pipe);
            pipe.held && !pipe.queue.is_empty() && pipe.ending != Ending::Reset
        };
        older.iter().any(|[to, _]| waits(to))
    }

    /// Resets the connections of an address; `keep` of the bytes under way are still read first.
    pub(crate) fn cut(&self, address: SocketAddr, keep: usize) {
        let mut state = self.state();
        for pipes in &state.route(address).pipes {
            for pipe in pipes {
                let mut pipe = lock(pipe);
                pipe.keep(keep);
            }
        }
    }

    /// The machine of the listener, or of the one who connects, is gone without a word.
    pub(crate) fn forget(&self, address: SocketAddr, listener: bool) {
        let mut state = self.state();
        for [to, from] in &state.route(address).pipes {
            lock(if listener { from } else { to }).end(Ending::Silent);
            // What it is sent reaches nobody, and nobody says so.
            lock(if listener { to } else { from }).end(Ending::Silent);
        }
    }

    /// Addresses that have connected.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.state().routes.iter().map(|route| route.address).collect()
    }
}

impl Pipe {
    /// Ends behind so many bytes more, wherever in a frame that is.
    fn keep(&mut self, mut bytes: usize) {
        for (_, part) in &mut self.queue {
            part.truncate(bytes);
            bytes -= part.len();
        }
        self.queue.retain(|(_, part)| !part.is_empty());
        self.bytes = self.queue.iter().map(|(_, part)| part.len()).sum();
        if self.ending == Ending::Open {
            self.ending = Ending::Closed;
        }
        self.wake();
    }
}

impl State {
    fn route(&mut self, address: SocketAddr) -> &mut Route {
        let at = self.routes.iter().position(|route| route.address == address);
        let at = at.unwrap_or_else(|| {
            self.routes.push(Route {
                address,
                held: [false; 2],
                strands: false,
                pipes: Vec::new(),
            });
            self.routes.len() - 1
        });
        &mut self.routes[at]
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let mut runtime = runtime;
        runtime.enable_time().start_paused(true).build().unwrap().block_on(test);
    }

    async fn pair(network: &Network) -> (Socket, Socket) {
        let inbox = Inbox::default();
        network.listen(Some(inbox.clone()));
        let near = network.connect(address()).await.unwrap();
        (near, inbox.accept().await)
    }

    fn address() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 9))
    }

    #[test]
    fn bytes_come_in_order_and_the_end_behind_them() {
        run(async {
            let network = Network::begin(3, 5);
            let (near, mut far) = pair(&network).await;
            let (_read, mut write) = near.into_split();
            for part in 0..200_u8 {
                write.write_all(&[part; 700]).await.unwrap();
            }
            drop(write);
            let mut got = Vec::new();
            far.read_to_end(&mut got).await.unwrap();
            let wanted: Vec<u8> = (0..200).flat_map(|part| [part; 700]).collect();
            assert_eq!(got, wanted);
            Network::end();
        });
    }

    #[test]
    fn a_cut_falls_inside_and_a_silent_end_says_nothing() {
        run(async {
            let network = Network::begin(3, 0);
            let (mut near, mut far) = pair(&network).await;
            near.write_all(&[1; 100]).await.unwrap();
            network.cut(address(), 7);
            let mut got = Vec::new();
            far.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, [1; 7]);
            assert!(near.write_all(&[1]).await.is_err());
            let (mut near, far) = pair(&network).await;
            network.forget(address(), true);
            drop(far);
            let wait = Duration::from_secs(60);
            assert!(tokio::time::timeout(wait, near.read_u8()).await.is_err());
            assert!(near.write_all(&[1]).await.is_ok());
            let (mut near, _far) = pair(&network).await;
            network.strand(address(), false);
            near.write_all(&[1]).await.unwrap();
            assert!(!network.is_late(address()));
            let (mut newer, mut far) = pair(&network).await;
            assert!(network.is_late(address()));
            newer.write_all(&[2]).await.unwrap();
            assert_eq!(far.read_u8().await.unwrap(), 2);
            network.hold(address(), [true, false]);
            let refused = network.connect(address());
            assert!(tokio::time::timeout(wait, refused).await.is_err());
            Network::end();
        });
    }
}
