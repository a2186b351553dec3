//! One connection to the hub, as far as it sends: what waits, in order, and the data of a CP.
//!
//! Used by `forwarder`. Transfers go first; CP data is formed a frame at a time, only while little
//! waits before it and the hub's window allows, but at least an eighth of the bytes are its own,
//! so that a CP ends under any load (section 8).
//!
//! Invariant: messages leave in the order the session asked for; what waits here beyond
//! [`AHEAD_BYTES_MAX`] has not been read from the ring yet.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::outbox::Body;
use super::pass::PassData;
use super::plan::Frames;
use super::served::Served;
use super::shared::Shared;
use super::signals::CpData;
use crate::limits::{CP_FRAME_BYTES_MAX, MESSAGES_WAITING_MAX, MIB, cp_charge};
use crate::link::Outgoing;
use crate::link::socket::WriteHalf;
use crate::nvlog::RingError;
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::numbers::{CpNumber, TransferId};
use crate::units::policy::Apply;
use crate::wire::message::{Frame, Message, Updates};
use crate::wire::pull::Want;

/// Bytes of transfers that are formed into frames ahead of the socket.
const AHEAD_BYTES_MAX: u64 = MIB;
/// So many bytes of transfers may pass for each byte of CP data that waits.
const TRANSFER_SHARE: u64 = 7;

/// Why nothing moves on a connection.
#[derive(Debug)]
pub enum MoveError {
    /// The socket.
    Socket(std::io::Error),
    /// The own tree, in words.
    Pass(String),
}

#[derive(Debug)]
enum ToSend {
    Message(Message),
    Frame(Frame),
    Transfer(TransferId),
    Data { cp: CpNumber, inline: bool },
    Pass(PassData),
}

/// Data of a CP on its way.
#[derive(Debug)]
struct DataOut {
    cp: CpNumber,
    frames: Frames,
}

/// What goes out on one connection.
#[derive(Debug)]
pub struct SendSide {
    shared: Arc<Shared>,
    queue: VecDeque<ToSend>,
    /// How many messages it holds.
    messages: usize,
    /// Frames for the socket.
    pub outgoing: Outgoing,
    /// The session asked for the data of this CP; `true` if all inline.
    wanted: Option<(CpNumber, bool)>,
    data: Option<DataOut>,
    pass: Option<PassData>,
    served: Option<Served>,
    /// Bytes of CP data sent on this connection, taken by the hub, and allowed beyond.
    data_sent: u64,
    data_taken: u64,
    data_window: u64,
    /// Bytes of transfers since the last CP frame.
    passed_bytes: u64,
    /// When the hub was last heard.
    pub heard: Instant,
}

impl SendSide {
    /// An empty one.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            queue: VecDeque::new(),
            messages: 0,
            outgoing: Outgoing::default(),
            wanted: None,
            data: None,
            pass: None,
            served: None,
            data_sent: 0,
            data_taken: 0,
            data_window: 0,
            passed_bytes: 0,
            heard: machine::now(),
        }
    }

    /// Queues a message.
    pub fn message(&mut self, message: Message) {
        self.messages += 1;
        self.queue.push_back(ToSend::Message(message));
    }

    /// Queues a frame that is formed already.
    pub fn frame(&mut self, frame: Frame) {
        self.messages += 1;
        self.queue.push_back(ToSend::Frame(frame));
    }

    /// Whether the hub makes us say more than it reads: an honest one never asks so much.
    pub fn is_flooded(&self) -> bool {
        self.messages > MESSAGES_WAITING_MAX
    }

    /// Queues a held transfer. The session keeps their bytes within the hub's credit.
    pub fn transfer(&mut self, id: TransferId) {
        self.queue.push_back(ToSend::Transfer(id));
    }

    /// Transfers that are not formed into frames yet are not sent.
    pub fn unsend(&mut self) {
        self.queue.retain(|next| !matches!(next, ToSend::Transfer(_)));
    }

    /// Queues the start of a CP's data.
    pub fn data(&mut self, cp: CpNumber, inline: bool) {
        self.queue.push_back(ToSend::Data { cp, inline });
    }

    /// Queues the data of a pass; it takes the place of any other data.
    pub fn pass(&mut self, data: PassData) {
        self.queue.push_back(ToSend::Pass(data));
    }

    /// Answers a comparison from now on, in the place of any other data.
    pub fn serve(&mut self, served: Served) {
        self.end_pass();
        self.served = Some(served);
    }

    /// Takes a request of the hub; false if it asks for more than it may.
    #[must_use = "who asks too much is hung up on"]
    pub fn asked(&self, want: Want) -> bool {
        self.served.as_ref().is_some_and(|served| served.ask(want))
    }

    /// No pass is under way any more.
    pub fn end_pass(&mut self) {
        (self.data, self.wanted, self.pass, self.served) = (None, None, None, None);
    }

    /// Waits for the socket while something waits for it, or for data of a pass.
    pub async fn moved(&mut self, write: &mut WriteHalf) -> Result<(), MoveError> {
        let Self { outgoing, pass, served, .. } = self;
        let waits = !outgoing.is_empty();
        let walked = async {
            match (pass, served) {
                (Some(pass), _) => pass.wait().await.map_err(MoveError::Pass),
                (None, Some(served)) => served.wait().await.map_err(MoveError::Pass),
                (None, None) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            written = outgoing.write_some(write), if waits => written.map_err(MoveError::Socket),
            walked = walked => walked,
        }
    }

    /// Bytes of CP data the hub has taken, and may be sent beyond.
    pub fn window(&mut self, taken: u64, limit: u64) {
        self.data_taken = taken;
        self.data_window = limit;
    }

    /// Forms frames as far as the socket should have them. Returns a CP whose data is all formed,
    /// with its bytes, once.
    pub async fn fill(
        &mut self,
        data: Option<&CpData>,
    ) -> Result<Option<(CpNumber, u64)>, RingError> {
        self.start_data(data);
        while self.outgoing.bytes() < AHEAD_BYTES_MAX
            && let Some(next) = self.queue.pop_front()
        {
            match next {
                ToSend::Message(message) => {
                    self.messages -= 1;
                    self.outgoing.push(Frame::new(&message, Bytes::new()));
                }
                ToSend::Frame(frame) => {
                    self.messages -= 1;
                    self.outgoing.push(frame);
                }
                ToSend::Transfer(id) => self.push_transfer(id).await?,
                ToSend::Data { cp, inline } => {
                    // What an earlier attempt still had to send must not slip in before it.
                    self.end_pass();
                    self.wanted = Some((cp, inline));
                }
                ToSend::Pass(data) => {
                    self.end_pass();
                    self.pass = Some(data);
                    self.passed_bytes = 0;
                }
            }
            self.start_data(data);
            if self.owes_data() && self.window_open() {
                self.push_data();
            }
            if self.passed_bytes >= TRANSFER_SHARE * CP_FRAME_BYTES_MAX {
                self.push_answer();
            }
        }
        while self.queue.is_empty() && self.outgoing.is_shallow() && self.push_answer() {}
        while self.queue.is_empty() && self.outgoing.is_shallow() && self.window_open() {
            if !self.push_data() {
                if let Some(pass) = &self.pass {
                    let ended = pass.ended().map(|bytes| (pass.cp, bytes));
                    if ended.is_some() {
                        self.shared.counters.sent(pass.counts());
                        self.pass = None;
                    }
                    return Ok(ended);
                }
                let Some(out) = self.data.take() else { return Ok(None) };
                let counts = out.frames.counts();
                self.shared.counters.sent(counts);
                return Ok(Some((out.cp, counts.payload_bytes())));
            }
        }
        Ok(None)
    }

    async fn push_transfer(&mut self, id: TransferId) -> Result<(), RingError> {
        // A transfer that the hub has applied meanwhile is not held any more.
        let Some(body) = self.shared.outbox.body(id) else { return Ok(()) };
        let body = match body {
            Body::Memory(body) => body,
            Body::Ring(position) => {
                let shared = Arc::clone(&self.shared);
                let read = machine::blocking(move || shared.ring().map(|ring| ring.read(position)));
                match read.await {
                    Ok(Some(record)) => record?.1,
                    Ok(None) | Err(_) => return Ok(()),
                }
            }
        };
        self.shared.counters.transfers_sent.add(1);
        self.shared.counters.transfer_bytes_sent.add(to_u64(body.len()));
        self.passed_bytes += to_u64(body.len());
        self.outgoing.push(Frame::new(&Message::Transfer, body));
        Ok(())
    }

    /// Begins with the data that was asked for, once its plan is there: after a restart the
    /// session may ask before it is made again.
    fn start_data(&mut self, data: Option<&CpData>) {
        let planned = |cp: CpNumber| data.filter(|data| data.freeze.cp == cp);
        let Some((cp, inline)) = self.wanted else { return };
        let Some(data) = planned(cp) else { return };
        self.wanted = None;
        let inline = inline || self.shared.pledge.in_force().apply == Apply::Inline;
        let frames = Frames::new(Arc::clone(&data.plan), Arc::clone(&data.rows), inline);
        let frames = frames.leaving_out(self.shared.left_out());
        self.data = Some(DataOut { cp, frames });
        self.passed_bytes = 0;
    }

    fn has_data(&self) -> bool {
        self.data.is_some() || self.pass.is_some()
    }

    fn owes_data(&self) -> bool {
        self.has_data() && self.passed_bytes >= TRANSFER_SHARE * CP_FRAME_BYTES_MAX
    }

    fn window_open(&self) -> bool {
        // A hub may claim to have taken more than it was sent.
        let under_way = self.data_sent.saturating_sub(self.data_taken);
        self.has_data() && under_way + CP_FRAME_BYTES_MAX <= self.data_window
    }

    /// Answers a comparison, if an answer is ready.
    fn push_answer(&mut self) -> bool {
        let Some(answer) = self.served.as_mut().and_then(Served::take) else { return false };
        self.passed_bytes = 0;
        self.outgoing.push(answer);
        true
    }

    /// Forms one frame of CP data; `false` if there is none now.
    fn push_data(&mut self) -> bool {
        let next = match (&mut self.data, &mut self.pass) {
            (Some(out), _) => out.frames.next_frame().map(|frame| (out.cp, frame)),
            (None, Some(pass)) => pass.take().map(|frame| (pass.cp, frame)),
            (None, None) => None,
        };
        let Some((cp, (volume, payload))) = next else { return false };
        self.data_sent += cp_charge(to_u64(payload.len()));
        self.passed_bytes = 0;
        let message = Message::Updates(Updates { cp, volume });
        self.outgoing.push(Frame::new(&message, payload.into()));
        true
    }
}
