//! The primary's half of a session: what a source sends, and when.
//!
//! Called by the forwarder with one event at a time. It knows which transfers the source holds
//! (the transfer table: place and size of each behind the last released CP), how many of them were
//! sent on this connection, and how far the hub has them durably.
//!
//! Invariants, checked after every step: `acked <= sent <= held`; a CP's PartitionFull leaves only
//! behind its last transfer, its CpEnd only behind all its data and the own commit (R6).
//!
//! A message that breaks the protocol ends the connection ([`Action::Close`]); a history that does
//! not join ends the session until an administrator acts ([`Action::Halt`]).

use std::collections::VecDeque;

use crate::record::marks::Place;
use crate::units::hash::Root;
use crate::units::ids::{HubId, SourceId};
use crate::units::names::SourceName;
use crate::units::numbers::{
    CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::wire::message::{
    Ack, CpEnd, CpRejected, Hello, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, PartitionFull,
    Pong, Refused, RefusedCode, VolumeOffer, VolumeRoot, WantLog, Welcome,
};

/// Who the source is; constant for one run of it, but for hub and epoch, which Welcome may set.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its name.
    pub name: SourceName,
    /// Its id.
    pub source: SourceId,
    /// The hub it belongs to, once it was welcomed.
    pub hub: Option<HubId>,
    /// Its boot counter, durable before the first Hello (R7).
    pub generation: Generation,
    /// Epoch it believes in; number 0 before the first Welcome.
    pub epoch: Epoch,
    /// Its volumes.
    pub volumes: Vec<VolumeOffer>,
}

/// A transfer the source holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Its id, last sequence number and the stream hash behind it.
    pub place: Place,
    /// Bytes of it on the wire.
    pub bytes: u64,
}

/// What the shell tells the machine.
#[derive(Debug, Clone)]
pub enum Event {
    /// The connection stands.
    Connected,
    /// The connection is gone.
    Disconnected,
    /// A frame came, other than Refill.
    Received(Message),
    /// A refilled transfer came and was checked; it follows the last one held.
    Refilled { held: Held, previous: TransferId, hash_before: crate::units::hash::StreamHash },
    /// The committing thread formed a transfer.
    Formed(Held),
    /// The freeze of a CP is durable in the own NVRAM.
    Frozen { cp: CpNumber, place: Place },
    /// The own commit of the frozen CP is durable.
    Committed { cp: CpNumber, roots: Vec<(VolumeNumber, Root)> },
    /// All Updates of the frozen CP were handed to the socket.
    DataSent { cp: CpNumber, bytes: u64 },
    /// Time to try a CP again that the hub could not take for lack of space.
    Retry,
}

/// What the machine tells the shell, to be done in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this message.
    Send(Message),
    /// Send the transfer with that id.
    SendTransfer(TransferId),
    /// Start to send the data of the frozen CP; `inline` asks for every block as data.
    SendData { cp: CpNumber, inline: bool },
    /// The hub took that many bytes of CP data on this connection; more may follow up to `limit`.
    DataWindow { taken: u64, limit: u64 },
    /// Everything up to this place is durable on the hub.
    HubDurable(Place),
    /// The refilled transfer of this event joins: append it to the NVRAM and the buffers.
    Adopt,
    /// Epoch and hub are known: keep them.
    Joined { hub: HubId, epoch: Epoch },
    /// Clients may be served.
    Serve,
    /// The CP is published on the hub: release its partition.
    Done { cp: CpNumber },
    /// Somebody at the hub asks for a checkpoint; answered with `CheckpointAt`.
    Checkpoint { token: u64 },
    /// The hub asks to read every block of that CP.
    Scan { cp: CpNumber, token: u64 },
    /// The answer to our own Scan.
    Scanned(crate::wire::message::Scanned),
    /// The CP was refused and will be tried again as said.
    Rejected { cp: CpNumber, reason: String, no_space: bool },
    /// Close the connection and connect again later.
    Close { reason: String },
    /// Close and do not connect again by yourself.
    Halt(Refused),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Away,
    Greeting,
    Refilling,
    Streaming,
    Halted,
}

#[derive(Debug, Clone)]
struct PendingCp {
    cp: CpNumber,
    place: Place,
    roots: Option<Vec<VolumeRoot>>,
    data: Data,
    inline: bool,
    refusals: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    Waiting,
    Sending,
    Sent(u64),
    Ended,
    /// Refused for lack of space; waits for [`Event::Retry`].
    Parked,
}

/// The primary's machine.
#[derive(Debug)]
pub struct Primary {
    identity: Identity,
    state: State,
    serving: bool,
    held_after: Place,
    held: VecDeque<Held>,
    sent: usize,
    acked: usize,
    in_flight_bytes: u64,
    log_credit: u64,
    cp_credit: u64,
    own_cp: CpNumber,
    cp_max: CpNumber,
    pending: Option<PendingCp>,
}

impl Primary {
    /// A machine for a source that holds `held` behind `held_after` and whose last own CP is
    /// `own_cp`. A CP that was frozen before the restart follows as [`Event::Frozen`].
    pub fn new(
        identity: Identity,
        held_after: Place,
        held: impl IntoIterator<Item = Held>,
        own_cp: CpNumber,
    ) -> Self {
        Self {
            identity,
            state: State::Away,
            serving: false,
            held_after,
            held: held.into_iter().collect(),
            sent: 0,
            acked: 0,
            in_flight_bytes: 0,
            log_credit: 0,
            cp_credit: 0,
            own_cp,
            cp_max: own_cp,
            pending: None,
        }
    }

    /// The last transfer the source holds or held.
    pub fn last(&self) -> Place {
        self.held.back().map_or(self.held_after, |held| held.place)
    }

    /// Whether the hub takes transfers.
    pub fn is_streaming(&self) -> bool {
        self.state == State::Streaming
    }

    /// Takes one event; returns what is to be done, in order.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.state == State::Halted && !matches!(event, Event::Formed(_)) {
            return actions;
        }
        match event {
            Event::Connected => self.connected(&mut actions),
            Event::Disconnected => self.disconnected(),
            Event::Received(message) => self.received(message, &mut actions),
            Event::Refilled { held, previous, hash_before } => {
                self.refilled(held, previous, hash_before, &mut actions);
            }
            Event::Formed(held) => {
                assert!(
                    held.place.sequence > self.last().sequence,
                    "transfers are formed in order"
                );
                self.held.push_back(held);
            }
            Event::Frozen { cp, place } => self.frozen(cp, place),
            Event::Committed { cp, roots } => self.committed(cp, roots),
            Event::DataSent { cp, bytes } => self.data_sent(cp, bytes),
            Event::Retry => {
                if let Some(pending) = &mut self.pending
                    && pending.data == Data::Parked
                {
                    pending.data = Data::Waiting;
                }
            }
        }
        self.pump(&mut actions);
        self.check();
        actions
    }

    fn connected(&mut self, actions: &mut Vec<Action>) {
        assert!(self.state == State::Away, "one connection at a time");
        self.state = State::Greeting;
        actions.push(Action::Send(Message::Hello(Hello {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION_MIN,
            name: self.identity.name.clone(),
            source: self.identity.source,
            hub: self.identity.hub,
            generation: self.identity.generation,
            epoch: self.identity.epoch,
            volumes: self.identity.volumes.clone(),
            held_after: self.held_after.into(),
            last: self.last().into(),
            own_durable: self.last().transfer,
            own_cp: self.own_cp,
            cp_max: self.cp_max,
            serving: self.serving,
        })));
    }

    fn disconnected(&mut self) {
        self.state = State::Away;
        self.sent = self.acked;
        self.in_flight_bytes = 0;
        if let Some(pending) = &mut self.pending {
            pending.data = Data::Waiting;
        }
    }

    fn received(&mut self, message: Message, actions: &mut Vec<Action>) {
        match (self.state, message) {
            (State::Greeting, Message::Welcome(welcome)) => self.welcomed(&welcome, actions),
            (State::Greeting | State::Refilling | State::Streaming, Message::Refused(refused)) => {
                self.refused(refused, actions);
            }
            (State::Refilling, Message::RefillEnd(end)) => {
                if Place::from(end.last) == self.last() {
                    self.acked = self.held.len();
                    self.sent = self.acked;
                    self.join(actions);
                } else {
                    actions.push(close("refill ended at another place than it delivered"));
                }
            }
            (State::Streaming, Message::Ack(ack)) => self.ack(ack, actions),
            (State::Streaming, Message::CpDone(done)) => self.done(done.cp, actions),
            (State::Streaming, Message::CpRejected(no)) => self.rejected(&no, actions),
            (State::Streaming, Message::WantCheckpoint(want)) => {
                actions.push(Action::Checkpoint { token: want.token });
            }
            (State::Streaming, Message::Scan(scan)) => {
                actions.push(Action::Scan { cp: scan.cp, token: scan.token });
            }
            (State::Streaming, Message::Scanned(scanned)) => {
                actions.push(Action::Scanned(scanned));
            }
            (State::Streaming | State::Refilling, Message::Ping(ping)) => {
                actions.push(Action::Send(Message::Pong(Pong { token: ping.token })));
            }
            (_, Message::Pong(_)) => {}
            (_, Message::Going(going)) => actions.push(Action::Close { reason: going.reason }),
            (state, other) => {
                let reason = format!("{} is out of place in state {state:?}", other.name());
                actions.push(Action::Close { reason });
            }
        }
    }

    /// Compares the two histories and decides how they join (R1, R7).
    fn welcomed(&mut self, welcome: &Welcome, actions: &mut Vec<Action>) {
        let halt = |code, reason: String, next_step: &str| {
            Action::Halt(Refused { code, reason, next_step: next_step.to_owned() })
        };
        if welcome.applied_cp > self.own_cp {
            self.state = State::Halted;
            let reason = format!(
                "the hub has published CP {}, this source has committed only CP {}: its state was \
                 rolled back",
                welcome.applied_cp, self.own_cp
            );
            actions.push(halt(RefusedCode::Diverged, reason, "restore the newer state directory"));
            return;
        }
        self.cp_max = self.cp_max.max(welcome.cp_max);
        self.log_credit = welcome.log_credit;
        self.cp_credit = welcome.cp_credit;
        actions.push(Action::Joined { hub: welcome.hub, epoch: welcome.epoch });
        self.identity.hub = Some(welcome.hub);
        self.identity.epoch = welcome.epoch;
        let hub_last = Place::from(welcome.last);
        if hub_last.sequence > self.last().sequence {
            self.refill(hub_last, actions);
        } else if let Some(position) = self.find(hub_last) {
            self.acked = position;
            self.sent = position;
            self.settle(welcome.applied_cp, actions);
            self.join(actions);
        } else {
            self.state = State::Halted;
            let (code, what) = if hub_last.sequence < self.held_after.sequence {
                (RefusedCode::Gap, "ends before the oldest transfer held here")
            } else {
                (RefusedCode::Diverged, "is not on this source's line")
            };
            let reason = format!(
                "the hub's log of this source, ending with transfer {} (sequence {}), {what}",
                hub_last.transfer, hub_last.sequence
            );
            actions.push(halt(code, reason, "a resync is needed; see docs/operations.md"));
        }
    }

    fn refill(&mut self, hub_last: Place, actions: &mut Vec<Action>) {
        if self.serving {
            self.state = State::Halted;
            actions.push(Action::Halt(Refused {
                code: RefusedCode::Diverged,
                reason: format!(
                    "the hub holds transfer {} that this running source never sent",
                    hub_last.transfer
                ),
                next_step: "look for a second source with this state directory".to_owned(),
            }));
            return;
        }
        self.state = State::Refilling;
        actions.push(Action::Send(Message::WantLog(WantLog { from: self.last().into() })));
    }

    fn refilled(
        &mut self,
        held: Held,
        previous: TransferId,
        hash_before: crate::units::hash::StreamHash,
        actions: &mut Vec<Action>,
    ) {
        let last = self.last();
        let joins = previous == last.transfer && hash_before == last.hash;
        if self.state != State::Refilling || !joins || held.place.sequence <= last.sequence {
            actions.push(close("a refilled transfer does not follow the last one"));
            return;
        }
        self.held.push_back(held);
        actions.push(Action::Adopt);
    }

    /// A CP that the hub had published before the connection broke is done.
    fn settle(&mut self, applied: CpNumber, actions: &mut Vec<Action>) {
        if let Some(pending) = &self.pending
            && pending.cp <= applied
        {
            let cp = pending.cp;
            self.done(cp, actions);
        }
    }

    fn join(&mut self, actions: &mut Vec<Action>) {
        self.state = State::Streaming;
        actions.push(Action::HubDurable(self.acked_place()));
        if !self.serving {
            self.serving = true;
            actions.push(Action::Serve);
        }
    }

    fn refused(&mut self, refused: Refused, actions: &mut Vec<Action>) {
        match refused.code {
            RefusedCode::Busy | RefusedCode::Faulted | RefusedCode::UnknownSource => {
                actions.push(Action::Close { reason: refused.reason });
            }
            RefusedCode::Version
            | RefusedCode::OtherSource
            | RefusedCode::OtherHub
            | RefusedCode::Generation
            | RefusedCode::Diverged
            | RefusedCode::Gap
            | RefusedCode::Volume
            | RefusedCode::Protocol => {
                self.state = State::Halted;
                actions.push(Action::Halt(refused));
            }
        }
    }

    fn ack(&mut self, ack: Ack, actions: &mut Vec<Action>) {
        self.log_credit = ack.log_credit;
        actions.push(Action::DataWindow { taken: ack.cp_taken, limit: self.cp_credit });
        let upto = self.held.partition_point(|held| held.place.transfer <= ack.id);
        if upto > self.sent {
            actions.push(close("an acknowledgement of a transfer that was not sent"));
            return;
        }
        if upto > self.acked {
            let bytes: u64 = self.held.range(self.acked..upto).map(|held| held.bytes).sum();
            self.in_flight_bytes -= bytes;
            self.acked = upto;
            actions.push(Action::HubDurable(self.acked_place()));
        }
    }

    fn done(&mut self, cp: CpNumber, actions: &mut Vec<Action>) {
        let Some(pending) = self.pending.take_if(|pending| pending.cp == cp) else {
            actions.push(close("CpDone of a CP that is not under way"));
            return;
        };
        let released = self.find(pending.place);
        let Some(released) = released.filter(|&released| released <= self.acked) else {
            actions.push(close("CpDone of a CP whose transfers were not acknowledged"));
            self.pending = Some(pending);
            return;
        };
        self.held.drain(..released);
        self.sent -= released;
        self.acked -= released;
        self.held_after = pending.place;
        actions.push(Action::Done { cp });
    }

    /// The first refusal is answered by sending every block, the next one is the end (R19).
    fn rejected(&mut self, no: &CpRejected, actions: &mut Vec<Action>) {
        let Some(pending) = self.pending.as_mut().filter(|pending| pending.cp == no.cp) else {
            actions.push(close("CpRejected of a CP that is not under way"));
            return;
        };
        let (cp, reason, no_space) = (no.cp, no.reason.clone(), no.no_space);
        if no_space {
            pending.data = Data::Parked;
        } else if pending.refusals >= 2 {
            self.state = State::Halted;
            actions.push(Action::Halt(Refused {
                code: RefusedCode::Diverged,
                reason: format!("CP {cp} was refused {} times: {reason}", pending.refusals + 1),
                next_step: "compare both ends with `mirrorhub verify`".to_owned(),
            }));
            return;
        } else {
            pending.refusals += 1;
            pending.inline = true;
            pending.data = Data::Waiting;
        }
        actions.push(Action::Rejected { cp, reason, no_space });
    }

    fn frozen(&mut self, cp: CpNumber, place: Place) {
        assert!(self.pending.is_none(), "one CP is under way at a time");
        assert!(self.find(place).is_some(), "a CP ends at a transfer that is held");
        self.cp_max = self.cp_max.max(cp);
        self.pending = Some(PendingCp {
            cp,
            place,
            roots: None,
            data: Data::Waiting,
            inline: false,
            refusals: 0,
        });
    }

    fn committed(&mut self, cp: CpNumber, roots: Vec<(VolumeNumber, Root)>) {
        // A CP that the hub had published before a restart may be done before it is told here.
        self.own_cp = self.own_cp.max(cp);
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.cp == cp) {
            let roots = roots.into_iter().map(|(volume, root)| VolumeRoot { volume, root });
            pending.roots = Some(roots.collect());
        }
    }

    fn data_sent(&mut self, cp: CpNumber, bytes: u64) {
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.cp == cp)
            && pending.data == Data::Sending
        {
            pending.data = Data::Sent(bytes);
        }
    }

    fn pump(&mut self, actions: &mut Vec<Action>) {
        if self.state != State::Streaming {
            return;
        }
        while let Some(next) = self.held.get(self.sent) {
            let fits = self.in_flight_bytes + next.bytes <= self.log_credit;
            if !fits && self.in_flight_bytes > 0 || self.log_credit == 0 {
                break;
            }
            self.in_flight_bytes += next.bytes;
            self.sent += 1;
            actions.push(Action::SendTransfer(next.place.transfer));
            self.pump_cp(actions);
        }
        self.pump_cp(actions);
    }

    fn pump_cp(&mut self, actions: &mut Vec<Action>) {
        let sent = match self.sent.checked_sub(1) {
            Some(last) => self.held[last].place.sequence,
            None => self.held_after.sequence,
        };
        let Some(pending) = &mut self.pending else { return };
        if pending.data == Data::Waiting && sent >= pending.place.sequence {
            pending.data = Data::Sending;
            let full = PartitionFull { cp: pending.cp, last: pending.place.into() };
            actions.push(Action::Send(Message::PartitionFull(full)));
            actions.push(Action::SendData { cp: pending.cp, inline: pending.inline });
        }
        if let (Data::Sent(update_bytes), Some(roots)) = (pending.data, &pending.roots) {
            pending.data = Data::Ended;
            let end = CpEnd {
                cp: pending.cp,
                place: pending.place.into(),
                roots: roots.clone(),
                update_bytes,
            };
            actions.push(Action::Send(Message::CpEnd(end)));
        }
    }

    /// How many held transfers lie up to and with `place`, if it is on this line.
    fn find(&self, place: Place) -> Option<usize> {
        if place == self.held_after {
            return Some(0);
        }
        let at = self.held.partition_point(|held| held.place.sequence < place.sequence);
        self.held.get(at).filter(|held| held.place == place).map(|_| at + 1)
    }

    fn acked_place(&self) -> Place {
        match self.acked.checked_sub(1) {
            Some(last) => self.held[last].place,
            None => self.held_after,
        }
    }

    fn check(&self) {
        assert!(self.acked <= self.sent, "acknowledged before sent");
        assert!(self.sent <= self.held.len(), "sent before formed");
        let in_flight: u64 = match self.state {
            State::Streaming => self.held.range(self.acked..self.sent).map(|held| held.bytes).sum(),
            State::Away | State::Greeting | State::Refilling | State::Halted => 0,
        };
        debug_assert!(
            self.state != State::Streaming || in_flight == self.in_flight_bytes,
            "bytes under way are counted"
        );
    }

    /// Highest CP number that either end has used; the next freeze takes the one above (R6).
    pub fn cp_max(&self) -> CpNumber {
        self.cp_max
    }

    /// Last sequence number the hub has durably.
    pub fn hub_sequence(&self) -> SequenceNumber {
        self.acked_place().sequence
    }
}

fn close(reason: &str) -> Action {
    Action::Close { reason: reason.to_owned() }
}
