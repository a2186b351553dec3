//! Random peers: whatever a peer says, a machine does not panic and keeps its own invariants.
//!
//! Values come from small pools, so that many messages fit by chance and lead deep. The shell's own
//! events are right: they follow from the actions, as a real shell's do.

use std::cell::Cell;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::BoxedStrategy;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use super::super::mirror::{self, Arrived, Known, Mirror, Outcome};
use super::super::primary::{self, Held, Identity, Own, Primary};
use super::absurd_primary::{line, received};
use super::world::{generation, hub_id, offers, root_of, source_id, transfer};
use crate::record::marks::Place;
use crate::units::hash::StreamHash;
use crate::units::ids::{HubId, SourceId};
use crate::units::is_full;
use crate::units::numbers::{
    CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::units::policy::{OnHubLoss, Policy};
use crate::wire::message::{
    Ack, Behind, BehindState, CheckpointAt, CpDone, CpEnd, CpRejected, Fenced, Going, Hello,
    Message, PartitionFull, Ping, Pong, RefillEnd, Refused, RefusedCode, Scan, Scanned, Updates,
    WantCheckpoint, WantLog, Welcome,
};

fn cp() -> BoxedStrategy<CpNumber> {
    prop_oneof![
        12 => (0u32..4).prop_map(CpNumber),
        1 => any::<u32>().prop_map(CpNumber),
        1 => Just(CpNumber(u32::MAX)),
    ]
    .boxed()
}

fn id() -> BoxedStrategy<TransferId> {
    prop_oneof![8 => (0u32..3, 0u64..6), 1 => any::<(u32, u64)>(), 1 => Just((u32::MAX, u64::MAX))]
        .prop_map(|(generation, counter)| TransferId { generation, counter })
        .boxed()
}

/// Mostly a place of the line, else nonsense.
fn place() -> BoxedStrategy<Place> {
    let on_line = (0usize..6)
        .prop_map(|at| at.checked_sub(1).map_or(Place::default(), |at| line(5)[at].place));
    let nonsense = (id(), prop_oneof![0u64..7, any::<u64>()], 0u8..3).prop_map(
        |(transfer, sequence, hash)| Place {
            transfer,
            sequence: SequenceNumber(sequence),
            hash: StreamHash([hash; 16]),
        },
    );
    prop_oneof![8 => on_line, 1 => nonsense].boxed()
}

fn bytes() -> BoxedStrategy<u64> {
    prop_oneof![6 => 0u64..300, 1 => any::<u64>(), 1 => Just(u64::MAX)].boxed()
}

fn epoch() -> BoxedStrategy<Epoch> {
    (0u32..3, 8u64..10).prop_map(|(number, id)| Epoch { number, id }).boxed()
}

fn refused() -> BoxedStrategy<Message> {
    (0..RefusedCode::ALL.len())
        .prop_map(|at| {
            let code = RefusedCode::ALL[at];
            Message::Refused(Refused { code, reason: "no".into(), next_step: "none".into() })
        })
        .boxed()
}

fn welcome() -> BoxedStrategy<Message> {
    let version = prop_oneof![20 => 1u16..3, 1 => any::<u16>()];
    let applied_cp = prop_oneof![6 => Just(CpNumber(0)), 1 => cp()];
    let applied = prop_oneof![4 => Just(Place::default()), 1 => place()];
    let hub = prop_oneof![20 => Just(hub_id()), 1 => Just(HubId([9; 16]))];
    let epoch = prop_oneof![20 => Just(Epoch { number: 1, id: 8 }), 1 => epoch()];
    ((version, applied_cp, cp(), bytes(), bytes()), applied, place(), hub, epoch)
        .prop_map(|(numbers, applied, last, hub, epoch)| {
            let (version, applied_cp, cp_max, log_credit, cp_credit) = numbers;
            Message::Welcome(Welcome {
                version,
                hub,
                epoch,
                applied_cp,
                roots: vec![],
                applied: applied.into(),
                last: last.into(),
                cp_max,
                log_credit,
                cp_credit,
                work: false,
                own_durable: TransferId::NONE,
                refused: Vec::new(),
            })
        })
        .boxed()
}

fn hello() -> BoxedStrategy<Hello> {
    let source = prop_oneof![20 => Just(source_id()), 1 => Just(SourceId([9; 16]))];
    let hub = prop_oneof![
        9 => Just(Some(hub_id())),
        9 => Just(None),
        1 => Just(Some(HubId([9; 16]))),
    ];
    let boot = (0u32..4, prop_oneof![9 => Just(0u64), 1 => 1u64..3])
        .prop_map(|(number, other)| Generation { number, id: generation(number).id + other });
    let version =
        prop_oneof![10 => Just((1u16, 1u16)), 10 => Just((2, 1)), 1 => any::<(u16, u16)>()];
    let epoch = prop_oneof![9 => Just(Epoch::default()), 1 => epoch()];
    let count = prop_oneof![20 => Just(1usize), 1 => 0usize..4];
    let places = (place(), place(), id());
    ((source, hub, boot), (version, epoch, count), places, (cp(), cp(), any::<bool>()))
        .prop_map(|((source, hub, generation), (version, epoch, count), places, numbers)| Hello {
            version: version.0,
            version_min: version.1,
            name: "filer-a".parse().unwrap(),
            source,
            hub,
            generation,
            epoch,
            volumes: offers().into_iter().cycle().take(count).collect(),
            held_after: places.0.into(),
            last: places.1.into(),
            own_durable: places.2,
            own_cp: numbers.0,
            cp_max: numbers.1,
            serving: numbers.2,
            policy: Policy::default(),
            connection: 0,
            alone: None,
        })
        .boxed()
}

/// What a hub says, and what both say.
fn from_hub() -> BoxedStrategy<Message> {
    let token = any::<u64>();
    prop_oneof![
        4 => welcome(),
        1 => refused(),
        12 => (id(), bytes(), 0u64..50)
            .prop_map(|(id, log_credit, cp_taken)| Message::Ack(Ack { id, log_credit, cp_taken })),
        4 => cp().prop_map(|cp| Message::CpDone(CpDone { cp })),
        4 => (cp(), any::<bool>()).prop_map(|(cp, no_space)| {
            let reason = "because".to_owned();
            Message::CpRejected(CpRejected { cp, differs: None, reason, no_space })
        }),
        1 => token.prop_map(|token| Message::WantCheckpoint(WantCheckpoint { token })),
        3 => place().prop_map(|last| Message::RefillEnd(RefillEnd { last: last.into() })),
        1 => epoch().prop_map(|epoch| Message::Fenced(Fenced { epoch, hub: None })),
        1 => Just(Message::Refill),
        1 => (token, bytes()).prop_map(|(token, n)| {
            Message::Ping(Ping { sequence: SequenceNumber(n), token })
        }),
        1 => token.prop_map(|token| Message::Pong(Pong { token })),
        1 => Just(Message::Going(Going { reason: "stops".into() })),
        1 => behind(),
        1 => (cp(), token).prop_map(|(cp, token)| Message::Scan(Scan { cp, token })),
        1 => (cp(), token).prop_map(|(cp, token)| {
            Message::Scanned(Scanned { cp, token, volumes: vec![], problems: vec![] })
        }),
    ]
    .boxed()
}

fn behind() -> BoxedStrategy<Message> {
    let state = prop_oneof![
        id().prop_map(BehindState::Taken),
        Just(BehindState::Joins),
        Just(BehindState::Over)
    ];
    (cp(), state).prop_map(|(cp, state)| Message::Behind(Behind { cp, state })).boxed()
}

fn from_source() -> BoxedStrategy<Message> {
    prop_oneof![
        1 => hello().prop_map(|hello| Message::Hello(Box::new(hello))),
        1 => Just(Message::Transfer),
        1 => behind(),
        8 => (cp(), place(), any::<bool>()).prop_map(|(cp, last, replay)| {
            Message::PartitionFull(PartitionFull { cp, last: last.into(), base: None, replay, keeps_log: false })
        }),
        1 => cp().prop_map(|cp| Message::Updates(Updates { cp, volume: VolumeNumber(0) })),
        8 => (cp(), place(), prop_oneof![4 => Just(0u64), 1 => bytes()]).prop_map(
            |(cp, place, update_bytes)| {
                let place = place.into();
                Message::CpEnd(CpEnd { cp, place, roots: vec![], update_bytes })
            }
        ),
        2 => place().prop_map(|from| Message::WantLog(WantLog { from: from.into() })),
        1 => (any::<u64>(), cp())
            .prop_map(|(token, cp)| Message::CheckpointAt(CheckpointAt { token, cp })),
    ]
    .boxed()
}

/// A transfer of the line, or one with a field changed.
fn arrived() -> BoxedStrategy<Arrived> {
    let changed = (0usize..5, 0u8..6, id(), cp(), 0u64..9).prop_map(|(at, field, id, cp, n)| {
        let mut arrived = line(5)[at];
        match field {
            0 => arrived.header.id = id,
            1 => arrived.place.transfer = id,
            2 => arrived.header.previous = id,
            3 => arrived.header.cp = cp,
            4 => arrived.header.first_sequence = SequenceNumber(n),
            _ => arrived.header.hash_before = StreamHash([9; 16]),
        }
        arrived
    });
    prop_oneof![8 => (0usize..5).prop_map(|at| line(5)[at]), 1 => changed].boxed()
}

/// What happens to a source: its peer's doing, or its own life.
#[derive(Debug, Clone)]
enum ToPrimary {
    Message(Message),
    Refilled(Arrived),
    /// What a right hub would say: to Hello, of the log, of the frozen CP.
    WelcomeNext,
    RefillNext,
    AckNext(usize),
    DoneNext,
    Connect,
    Lose,
    Form,
    Freeze,
    Commit,
    DataSent,
    Retry,
}

fn to_primary() -> BoxedStrategy<ToPrimary> {
    prop_oneof![
        8 => from_hub().prop_map(ToPrimary::Message),
        1 => from_source().prop_map(ToPrimary::Message),
        1 => welcome().prop_map(ToPrimary::Message),
        2 => arrived().prop_map(ToPrimary::Refilled),
        20 => Just(ToPrimary::WelcomeNext),
        10 => Just(ToPrimary::RefillNext),
        20 => (0usize..3).prop_map(ToPrimary::AckNext),
        10 => Just(ToPrimary::DoneNext),
        // Connects, and now and then loses the connection.
        20 => Just(ToPrimary::Connect),
        1 => Just(ToPrimary::Lose),
        10 => Just(ToPrimary::Form),
        6 => Just(ToPrimary::Freeze),
        6 => Just(ToPrimary::Commit),
        6 => Just(ToPrimary::DataSent),
        2 => Just(ToPrimary::Retry),
    ]
    .boxed()
}

/// A shell that does what the machine says and no more.
struct PrimaryShell {
    machine: Primary,
    connected: bool,
    serving: bool,
    halted: bool,
    joined: bool,
    counter: u64,
    frozen: Option<(CpNumber, Place)>,
    committed: bool,
    last_frozen: Place,
    last_done: CpNumber,
    hub_durable: Place,
    sending: Option<CpNumber>,
    sent: Vec<TransferId>,
    released: u32,
}

impl PrimaryShell {
    fn new(held: usize) -> Self {
        let identity = Identity {
            name: "filer-a".parse().unwrap(),
            source: source_id(),
            hub: None,
            generation: generation(2),
            epoch: Epoch::default(),
            volumes: offers(),
            policy: Policy { on_hub_loss: OnHubLoss::Stop, ..Policy::default() },
            alone: None,
            unasked: None,
        };
        let line = line(5);
        let held = line[..held].iter().map(|t| Held { place: t.place, bytes: 100 });
        Self {
            machine: Primary::new(identity, Place::default(), held, Own::default()),
            connected: false,
            serving: false,
            halted: false,
            joined: false,
            counter: 0,
            frozen: None,
            committed: false,
            last_frozen: Place::default(),
            last_done: CpNumber(0),
            hub_durable: Place::default(),
            sending: None,
            sent: Vec::new(),
            released: 0,
        }
    }

    /// A hub that agrees with everything: it holds what it has acknowledged.
    fn welcome(&self, last: Place) -> Welcome {
        Welcome {
            version: 1,
            hub: hub_id(),
            epoch: Epoch { number: 1, id: 8 },
            applied_cp: self.last_done,
            roots: vec![],
            applied: self.last_frozen.into(),
            last: last.into(),
            cp_max: CpNumber(0),
            log_credit: 1000,
            cp_credit: 1000,
            work: false,
            own_durable: TransferId::NONE,
            refused: Vec::new(),
        }
    }

    fn event(&mut self, step: ToPrimary) -> Option<primary::Event> {
        use primary::Event;
        let refill = |arrived: Arrived| Event::Refilled {
            held: Held { place: arrived.place, bytes: 100 },
            previous: arrived.header.previous,
            hash_before: arrived.header.hash_before,
        };
        match step {
            ToPrimary::Message(message) => Some(received(message)),
            ToPrimary::Refilled(arrived) => Some(refill(arrived)),
            ToPrimary::RefillNext => {
                let last = self.machine.last();
                line(5).into_iter().find(|t| t.header.hash_before == last.hash).map(refill)
            }
            ToPrimary::WelcomeNext => {
                let place = self.hub_durable;
                Some(received(Message::Welcome(self.welcome(place))))
            }
            ToPrimary::AckNext(back) => {
                let id = self.sent.iter().rev().nth(back).copied()?;
                let (log_credit, cp_taken) = (1000, 0);
                Some(Event::Received(Message::Ack(Ack { id, log_credit, cp_taken })))
            }
            ToPrimary::DoneNext => {
                let (cp, _) = self.frozen?;
                Some(Event::Received(Message::CpDone(CpDone { cp })))
            }
            ToPrimary::Connect => (!self.connected && !self.halted).then(|| {
                (self.connected, self.sending) = (true, None);
                self.sent.clear();
                Event::Connected
            }),
            ToPrimary::Lose => {
                (self.connected, self.sending) = (false, None);
                Some(Event::Disconnected)
            }
            ToPrimary::Form => self.serving.then(|| {
                self.counter += 1;
                let id = TransferId { generation: u32::MAX, counter: self.counter };
                let arrived = transfer(self.machine.last(), id, CpNumber(1), 99);
                Event::Formed(Held { place: arrived.place, bytes: 100 })
            }),
            ToPrimary::Freeze => {
                let place = self.machine.last();
                let possible = self.serving && self.frozen.is_none() && place != self.last_frozen;
                possible.then(|| {
                    let cp = self.machine.cp_max().next();
                    (self.frozen, self.committed) = (Some((cp, place)), false);
                    Event::Frozen { cp, place }
                })
            }
            ToPrimary::Commit => {
                let (cp, place) = self.frozen?;
                self.committed = true;
                Some(Event::Committed { cp, roots: vec![(VolumeNumber(0), root_of(place))] })
            }
            ToPrimary::DataSent => Some(Event::DataSent { cp: self.sending.take()?, bytes: 10 }),
            ToPrimary::Retry => Some(Event::Retry),
        }
    }

    #[expect(clippy::too_many_lines, reason = "one list of what can happen")]
    fn step(&mut self, step: ToPrimary) {
        use primary::Action;
        let Some(event) = self.event(step) else { return };
        let connected = self.connected;
        for action in self.machine.step(event) {
            match action {
                Action::Serve => {
                    assert!(!self.serving, "served twice");
                    self.serving = true;
                }
                Action::SendData { cp, .. } => self.sending = Some(cp),
                Action::Done { cp, alone: false } => {
                    let (frozen, place) = self.frozen.take().unwrap();
                    assert_eq!(frozen, cp);
                    assert!(self.committed, "released before the own commit");
                    assert!(place.sequence <= self.machine.hub_sequence(), "before it was there");
                    (self.last_frozen, self.last_done, self.sending) = (place, cp, None);
                    self.released += 1;
                }
                Action::Send(Message::CpEnd(_)) => assert!(self.committed && connected),
                Action::SendTransfer(id) => {
                    assert!(connected, "nothing is sent without a connection");
                    self.sent.push(id);
                }
                Action::Send(_) => assert!(connected, "nothing is sent without a connection"),
                Action::Close { .. } => {
                    assert!(connected, "there is nothing to close");
                    (self.connected, self.sending) = (false, None);
                    assert_eq!(self.machine.step(primary::Event::Disconnected), []);
                }
                // A CP that is refused too often is repaired by a pass: see `search`.
                Action::Halt(_) | Action::MarkApart(_) => {
                    (self.halted, self.connected) = (true, false);
                }
                Action::HubDurable(place) => self.hub_durable = place,
                // What it brings along is brought over while it goes on.
                Action::InForce(policy) => {
                    assert_eq!((self.joined, policy.on_hub_loss), (false, OnHubLoss::Continue));
                }
                Action::Joined { .. } => self.joined = true,
                Action::Unasked(_)
                | Action::DataWindow { .. }
                | Action::Adopt
                | Action::LeaveOut(_)
                | Action::SetBack { .. }
                | Action::Checkpoint { .. }
                | Action::Scan { .. }
                | Action::Scanned(_)
                | Action::Fence(_)
                | Action::Rejected { .. } => {}
                other @ (Action::Done { alone: true, .. }
                | Action::Answer(_)
                | Action::AskAlone
                | Action::ClearApart
                | Action::SendPass { .. }
                | Action::SendCompare { .. }
                | Action::ServePull(_)
                | Action::Faulted { .. }
                | Action::PassEnded { .. }
                | Action::Shown { .. }
                | Action::Unsend
                | Action::Freeze
                | Action::Renew) => panic!("no peer makes a source under `stop` do {other:?}"),
            }
        }
    }
}

/// What happens to a hub: its peer's doing, or its own life.
#[derive(Debug, Clone)]
enum ToMirror {
    Hello(Hello),
    HelloAgain(Hello),
    Message(Message),
    Transfer(Arrived),
    /// The next of the line, as a right source would send it.
    TransferNext,
    Updates(CpNumber, u64),
    UpdatesNext(u64),
    /// PartitionFull or CpEnd that fits.
    FullNext,
    EndNext,
    Gone,
    Recorded,
    Durable,
    Drained,
    Taken(u64),
    Applied(u8),
    LogSent(bool),
    Credit(u64),
    Fault,
    Want,
}

fn to_mirror() -> BoxedStrategy<ToMirror> {
    prop_oneof![
        // Hello when nobody is there, and now and then a newer one.
        80 => hello().prop_map(ToMirror::HelloAgain),
        2 => hello().prop_map(ToMirror::Hello),
        8 => from_source().prop_map(ToMirror::Message),
        2 => from_hub().prop_map(ToMirror::Message),
        8 => arrived().prop_map(ToMirror::Transfer),
        100 => Just(ToMirror::TransferNext),
        10 => (cp(), bytes()).prop_map(|(cp, bytes)| ToMirror::Updates(cp, bytes)),
        20 => (0u64..20).prop_map(ToMirror::UpdatesNext),
        60 => Just(ToMirror::FullNext),
        60 => Just(ToMirror::EndNext),
        4 => Just(ToMirror::Gone),
        100 => Just(ToMirror::Recorded),
        100 => Just(ToMirror::Durable),
        100 => Just(ToMirror::Drained),
        20 => bytes().prop_map(ToMirror::Taken),
        60 => (0u8..6).prop_map(ToMirror::Applied),
        40 => any::<bool>().prop_map(ToMirror::LogSent),
        10 => bytes().prop_map(ToMirror::Credit),
        1 => Just(ToMirror::Fault),
        10 => Just(ToMirror::Want),
    ]
    .boxed()
}

/// A shell that does what the machine says and no more.
struct MirrorShell {
    machine: Mirror,
    job: Option<(CpNumber, bool, bool)>,
    full: Option<(CpNumber, Place, u64)>,
    connected: bool,
    published: u32,
}

impl MirrorShell {
    fn new() -> Self {
        let known = Known {
            hub: hub_id(),
            source: None,
            generation: Generation::default(),
            epoch: Epoch::default(),
            volumes: Vec::new(),
            pinned: Vec::new(),
            refused: Vec::new(),
            left_out: Vec::new(),
            applied_cp: CpNumber(0),
            applied: Place::default(),
            roots: Vec::new(),
            failed_over: false,
            cp_max: CpNumber(0),
            policy: None,
            alone: None,
            work: false,
        };
        let machine = Mirror::new(known, Place::default(), 1000, 100);
        Self { machine, job: None, full: None, connected: false, published: 0 }
    }

    /// What the peer does.
    fn event(&mut self, step: ToMirror) -> Option<mirror::Event> {
        use mirror::Event;
        let received = self.machine.ladder()[0];
        Some(match step {
            ToMirror::Hello(hello) => Event::Hello(hello),
            ToMirror::HelloAgain(hello) => {
                if self.connected {
                    return None;
                }
                Event::Hello(hello)
            }
            ToMirror::UpdatesNext(bytes) => {
                let (cp, _, came) = self.full.as_mut()?;
                *came = came.checked_add(bytes)?;
                Event::Updates { cp: *cp, bytes }
            }
            ToMirror::Message(message) => Event::Received(message),
            ToMirror::Transfer(arrived) => Event::Transfer(arrived),
            ToMirror::TransferNext => {
                let next = self.machine.known().applied_cp.0 + 1;
                let next = self.full.map_or(next, |(cp, ..)| next.max(cp.0 + 1));
                let next = self.machine.labels().last().map_or(next, |label| next.max(label.0));
                let id = TransferId { generation: 0, counter: received.sequence.0 + 1 };
                Event::Transfer(transfer(received, id, CpNumber(next), 7))
            }
            ToMirror::Updates(cp, bytes) => {
                if let Some((full, _, came)) = &mut self.full
                    && *full == cp
                {
                    *came = came.wrapping_add(bytes);
                }
                Event::Updates { cp, bytes }
            }
            ToMirror::FullNext => {
                if self.full.is_some() || received == self.machine.known().applied {
                    return None;
                }
                // The oldest CP first, and the same one again until it is published (R6).
                let open = self.machine.labels().first().copied();
                let cp = open.unwrap_or_else(|| self.machine.known().cp_max.next());
                self.full = Some((cp, received, 0));
                let full = PartitionFull {
                    cp,
                    last: received.into(),
                    base: None,
                    replay: false,
                    keeps_log: false,
                };
                Event::Received(Message::PartitionFull(full))
            }
            ToMirror::EndNext => {
                let (cp, place, update_bytes) = self.full?;
                self.full = Some((cp, place, u64::MAX));
                if update_bytes == u64::MAX {
                    return None;
                }
                let place = place.into();
                Event::Received(Message::CpEnd(CpEnd { cp, place, roots: vec![], update_bytes }))
            }
            other => return self.own_event(other),
        })
    }

    /// What the hub does.
    fn own_event(&mut self, step: ToMirror) -> Option<mirror::Event> {
        use mirror::Event;
        let [received, durable, _] = self.machine.ladder();
        Some(match step {
            ToMirror::Gone => {
                self.ended();
                Event::Disconnected
            }
            ToMirror::Recorded => Event::Recorded,
            ToMirror::Durable => Event::Durable(received),
            ToMirror::Drained => Event::Drained(durable),
            ToMirror::Taken(bytes) => Event::UpdatesTaken(bytes),
            ToMirror::Applied(kind) => {
                let (cp, finish, abort) = self.job?;
                let outcome = match kind {
                    0 => Outcome::NoSpace,
                    1 => Outcome::Rejected { differs: None, reason: "differs".into() },
                    _ if finish => Outcome::Published(vec![]),
                    _ if abort => Outcome::Aborted,
                    _ => return None,
                };
                (self.job, self.full) = (None, None);
                Event::Applied { cp, outcome }
            }
            ToMirror::LogSent(whole) => Event::LogSent(whole.then_some(durable)),
            ToMirror::Credit(bytes) => Event::Credit(bytes),
            ToMirror::Fault => Event::Faulted("EIO".into()),
            _ => Event::WantCheckpoint(1),
        })
    }

    fn ended(&mut self) {
        (self.connected, self.full) = (false, None);
    }

    fn step(&mut self, step: ToMirror) {
        use mirror::Action;
        let Some(event) = self.event(step) else { return };
        let before = self.machine.ladder()[1];
        let published =
            matches!(event, mirror::Event::Applied { outcome: Outcome::Published(_), .. });
        for action in self.machine.step(event) {
            let durable = self.machine.ladder()[1];
            assert!(before.sequence <= durable.sequence);
            match action {
                Action::Apply { cp, last, .. } => {
                    assert!(self.job.replace((cp, false, false)).is_none(), "two at once");
                    assert!(last.sequence <= self.machine.ladder()[2].sequence, "not drained");
                }
                Action::Finish(end) => {
                    let job = self.job.as_mut().unwrap();
                    assert!(job.0 == end.cp && !job.1 && !job.2);
                    job.1 = true;
                }
                Action::Abort => {
                    let job = self.job.as_mut().unwrap();
                    assert!(!job.1 && !job.2, "aborted twice or behind Finish");
                    job.2 = true;
                }
                Action::Send(Message::Ack(ack)) => assert_eq!(ack.id, durable.transfer),
                Action::Send(Message::Welcome(welcome)) => {
                    assert!(self.job.is_none() && durable == self.machine.ladder()[0]);
                    assert_eq!(Place::from(welcome.last), durable);
                }
                Action::DropLogs(cp) => {
                    assert!(published && cp == self.machine.known().applied_cp);
                    self.published += 1;
                }
                Action::Record { .. } => {
                    self.ended();
                    self.connected = true;
                }
                Action::Close { .. } => {
                    self.ended();
                    let actions = self.machine.step(mirror::Event::Disconnected);
                    if let Some(job) = &mut self.job {
                        job.2 |= actions == [Action::Abort];
                    }
                }
                Action::Send(_)
                | Action::Stage
                | Action::Feed
                | Action::SendLog { .. }
                | Action::Joined
                | Action::Scan { .. }
                | Action::CheckpointAt { .. }
                | Action::Scanned(_)
                | Action::Refuse(_) => {}
                other @ (Action::StageBehind | Action::DropBehind) => {
                    panic!("no pass is begun here, and yet {other:?}")
                }
            }
        }
    }
}

fn cases() -> u32 {
    if is_full() { 50_000 } else { 4000 }
}

/// The same histories in every short run: how deep they lead is held to a bound, and with new ones
/// each time a run in sixteen of 800 missed it. The long form draws new ones.
fn config() -> Config {
    let rng_seed = if is_full() { RngSeed::Random } else { RngSeed::Fixed(1) };
    Config { cases: cases(), failure_persistence: None, rng_seed, ..Config::default() }
}

#[test]
fn no_hub_makes_a_source_panic() {
    let deep = Cell::new(0);
    TestRunner::new(config())
        .run(&(0usize..4, vec(to_primary(), 1..120)), |(held, steps)| {
            let mut shell = PrimaryShell::new(held);
            steps.into_iter().for_each(|step| shell.step(step));
            deep.set(deep.get() + shell.released);
            Ok(())
        })
        .unwrap();
    assert!(deep.get() > cases() / 50, "only {} CPs were ever released", deep.get());
}

#[test]
fn no_source_makes_a_hub_panic() {
    let deep = Cell::new(0);
    TestRunner::new(config())
        .run(&vec(to_mirror(), 1..200), |steps| {
            let mut shell = MirrorShell::new();
            steps.into_iter().for_each(|step| shell.step(step));
            deep.set(deep.get() + shell.published);
            Ok(())
        })
        .unwrap();
    assert!(deep.get() > cases() / 10, "only {} CPs were ever published", deep.get());
}
