//! A hub whose source is absurd: each message in each state, clones, and CPs that end badly.

use super::super::CP_NUMBER_MAX;
use super::super::mirror::{Action, Arrived, Build, Event, Known, LeftOut, Mirror, Outcome};
use super::absurd_primary::line;
use super::world::{generation, hub_id, offers, root_of, source_id, transfer};
use crate::limits::{VOLUME_BYTES_MAX, VOLUMES_PER_SOURCE_MAX};
use crate::record::marks::Place;
use crate::units::hash::{Root, StreamHash};
use crate::units::ids::{HubId, SourceId, VolumeId};
use crate::units::numbers::{
    ByteCount, CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::units::policy::{self, OnHubLoss, Policy};
use crate::wire::message::{
    Ack, CheckpointAt, CpDone, CpEnd, CpRejected, Fenced, Going, Hello, Message, PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN, PartitionFull, Ping, Pong, RefillEnd, Refused, RefusedCode, Scan,
    Scanned, Standing, Updates, VolumeOffer, VolumeRoot, WantCheckpoint, WantLog, Welcome,
};

const CREDIT: u64 = 1000;
const CP_CREDIT: u64 = 100;

fn known() -> Known {
    Known {
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
    }
}

fn hub() -> Mirror {
    Mirror::new(known(), Place::default(), CREDIT, CP_CREDIT)
}

pub(super) fn hello(number: u32) -> Hello {
    Hello {
        version: 1,
        version_min: 1,
        name: "filer-a".parse().unwrap(),
        source: source_id(),
        hub: Some(hub_id()),
        generation: generation(number),
        epoch: Epoch::default(),
        volumes: offers(),
        held_after: Place::default().into(),
        last: Place::default().into(),
        own_durable: TransferId::NONE,
        own_cp: CpNumber(0),
        cp_max: CpNumber(0),
        serving: false,
        policy: Policy::default(),
        connection: 0,
        alone: None,
    }
}

pub(super) fn receive(machine: &mut Mirror, message: Message) -> Vec<Action> {
    machine.step(Event::Received(message))
}

fn welcomes(actions: &[Action]) -> Option<Welcome> {
    actions.iter().find_map(|action| match action {
        Action::Send(Message::Welcome(welcome)) => Some(welcome.clone()),
        _ => None,
    })
}

pub(super) fn join(machine: &mut Mirror, number: u32) -> Welcome {
    let actions = machine.step(Event::Hello(hello(number)));
    assert!(matches!(actions.last(), Some(Action::Record { .. })), "{actions:?}");
    welcomes(&machine.step(Event::Recorded)).unwrap()
}

/// In session with a source that speaks that version.
pub(super) fn joined_by(version: u16) -> Mirror {
    let mut machine = hub();
    machine.step(Event::Hello(Hello { version, ..hello(1) }));
    assert!(welcomes(&machine.step(Event::Recorded)).is_some());
    machine
}

pub(super) fn joined() -> Mirror {
    let mut machine = hub();
    join(&mut machine, 1);
    machine
}

pub(super) fn stage(machine: &mut Mirror, line: &[Arrived]) {
    for arrived in line {
        assert_eq!(machine.step(Event::Transfer(*arrived)), [Action::Stage]);
    }
}

pub(super) fn settle(machine: &mut Mirror, place: Place) -> Vec<Action> {
    let mut actions = machine.step(Event::Durable(place));
    actions.extend(machine.step(Event::Drained(place)));
    actions
}

fn full(cp: u32, last: Place) -> Message {
    Message::PartitionFull(PartitionFull {
        cp: CpNumber(cp),
        last: last.into(),
        base: None,
        replay: false,
        keeps_log: false,
    })
}

pub(super) fn end(cp: u32, place: Place, update_bytes: u64) -> Message {
    let roots = vec![VolumeRoot { volume: VolumeNumber(0), root: root_of(place) }];
    Message::CpEnd(CpEnd { cp: CpNumber(cp), place: place.into(), roots, update_bytes })
}

pub(super) fn updates(machine: &mut Mirror, cp: u32, bytes: u64) -> Vec<Action> {
    machine.step(Event::Updates { cp: CpNumber(cp), bytes })
}

pub(super) fn applied(machine: &mut Mirror, cp: u32, outcome: Outcome) -> Vec<Action> {
    machine.step(Event::Applied { cp: CpNumber(cp), outcome })
}

pub(super) fn published(place: Place) -> Outcome {
    Outcome::Published(vec![(VolumeNumber(0), root_of(place))])
}

fn rejected() -> Outcome {
    Outcome::Rejected { differs: None, reason: "differs".into() }
}

/// CP 1 of two transfers runs; one frame of 10 bytes was fed.
fn applying(line: &[Arrived]) -> Mirror {
    let mut machine = joined();
    stage(&mut machine, line);
    let last = line.last().unwrap().place;
    settle(&mut machine, last);
    let actions = receive(&mut machine, full(1, last));
    assert_eq!(actions, [Action::Apply { cp: CpNumber(1), last, build: Build::Updates }]);
    assert_eq!(updates(&mut machine, 1, 10), [Action::Feed]);
    machine
}

/// A CP by replay begins as any other, takes no updates, and ends with CpEnd.
#[test]
fn a_cp_by_replay_takes_no_updates() {
    let line = line(2);
    let begin = || {
        let mut machine = joined();
        stage(&mut machine, &line);
        let last = line[1].place;
        settle(&mut machine, last);
        let full = PartitionFull {
            cp: CpNumber(1),
            last: last.into(),
            base: None,
            replay: true,
            keeps_log: false,
        };
        let actions = receive(&mut machine, Message::PartitionFull(full));
        assert_eq!(actions, [Action::Apply { cp: CpNumber(1), last, build: Build::Replay }]);
        machine
    };
    let mut machine = begin();
    assert!(matches!(&updates(&mut machine, 1, 10)[..], [Action::Close { .. }]));
    let mut machine = begin();
    let last = line[1].place;
    assert!(matches!(&receive(&mut machine, end(1, last, 10))[..], [Action::Close { .. }]));
    let mut machine = begin();
    assert!(matches!(&receive(&mut machine, end(1, last, 0))[..], [Action::Finish(_)]));
    let done = applied(&mut machine, 1, published(last));
    assert!(done.contains(&Action::Send(Message::CpDone(CpDone { cp: CpNumber(1) }))));
}

/// A source that was failed over is told so before its epoch or generation is looked at.
#[test]
fn a_source_that_was_failed_over_is_fenced() {
    let (in_force, older) = (Epoch { number: 2, id: 9 }, Epoch { number: 1, id: 5 });
    let none = Epoch::default();
    for (failed_over, epoch) in [(true, older), (true, none), (false, older), (false, none)] {
        let known = Known { failed_over, epoch: in_force, ..known() };
        let machine = Mirror::new(known, Place::default(), CREDIT, CP_CREDIT);
        let refused = machine.accepts(&Hello { epoch, ..hello(1) }).unwrap_err();
        assert_eq!(refused.code, RefusedCode::Fenced);
    }
    // One whose first Welcome was lost names no epoch, and nobody else has been primary yet.
    let known = Known { epoch: older, ..known() };
    let machine = Mirror::new(known, Place::default(), CREDIT, CP_CREDIT);
    assert_eq!(machine.accepts(&hello(1)), Ok(()));
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reaction {
    Close,
    Refuse,
    Ignore,
    Act,
}
use Reaction::{Act, Close, Ignore, Refuse};

fn reaction(actions: &[Action]) -> Reaction {
    if actions.iter().any(|action| matches!(action, Action::Refuse(_))) {
        Refuse
    } else if actions.iter().any(|action| matches!(action, Action::Close { .. })) {
        assert_eq!(actions.len(), 1, "something is done beside Close: {actions:?}");
        Close
    } else if actions.is_empty() {
        Ignore
    } else {
        Act
    }
}

/// The messages, and what each gets while joining, joined, refilling, and applying.
fn table(last: Place) -> Vec<(Message, [Reaction; 4])> {
    let cp = CpNumber(1);
    let scanned = || Scanned { cp, token: 1, volumes: vec![], problems: vec![] };
    let refused = Refused { code: RefusedCode::Gap, reason: "no".into(), next_step: "no".into() };
    let rejected = CpRejected { cp, differs: None, reason: "differs".into(), no_space: false };
    vec![
        (Message::Hello(Box::new(hello(1))), [Close; 4]),
        (Message::Transfer, [Close; 4]),
        (Message::Updates(Updates { cp, volume: VolumeNumber(0) }), [Close; 4]),
        (full(1, last), [Close, Act, Close, Close]),
        (full(2, last), [Close, Act, Close, Close]),
        (end(1, last, 10), [Close, Close, Close, Act]),
        (Message::WantLog(WantLog { from: Place::default().into() }), [Close, Act, Close, Close]),
        (Message::CheckpointAt(CheckpointAt { token: 1, cp }), [Close, Act, Act, Act]),
        (Message::Scan(Scan { cp, token: 1 }), [Close, Act, Act, Act]),
        (Message::Scanned(scanned()), [Close, Act, Act, Act]),
        (Message::Ping(Ping { sequence: SequenceNumber(0), token: 1 }), [Act; 4]),
        (Message::Pong(Pong { token: 1 }), [Ignore; 4]),
        (Message::Going(Going { reason: "stops".into() }), [Close; 4]),
        // What only a hub says.
        (Message::Welcome(join(&mut hub(), 1)), [Close; 4]),
        (Message::Refused(refused), [Close; 4]),
        (Message::Ack(Ack { id: TransferId::NONE, log_credit: 0, cp_taken: 0 }), [Close; 4]),
        (Message::WantCheckpoint(WantCheckpoint { token: 1 }), [Close; 4]),
        (Message::CpDone(CpDone { cp }), [Close; 4]),
        (Message::CpRejected(rejected), [Close; 4]),
        (Message::Refill, [Close; 4]),
        (Message::RefillEnd(RefillEnd { last: last.into() }), [Close; 4]),
        (Message::Fenced(Fenced { epoch: Epoch { number: 9, id: 9 }, hub: None }), [Close; 4]),
    ]
}

/// Every message in every state. A source that speaks out of turn loses the connection; nothing is
/// taken without one or behind Close.
#[test]
fn every_message_in_every_state() {
    let line = line(2);
    let last = line[1].place;
    let table = table(last);
    let mut joining = hub();
    joining.step(Event::Hello(hello(1)));
    let mut staged = joined();
    stage(&mut staged, &line);
    settle(&mut staged, last);
    let mut refilling = staged.clone();
    receive(&mut refilling, Message::WantLog(WantLog { from: Place::default().into() }));
    let states = [joining, staged, refilling, applying(&line)];
    for (message, wanted) in &table {
        for (state, wanted) in states.iter().zip(wanted) {
            let mut machine = state.clone();
            let actions = receive(&mut machine, message.clone());
            let met = reaction(&actions);
            assert_eq!(met, *wanted, "{message:?} in {state:?} gives {actions:?}");
            if met == Close {
                for (message, _) in &table {
                    assert_eq!(receive(&mut machine, message.clone()), [], "{message:?}");
                }
                assert_eq!(machine.step(Event::Transfer(line[0])), []);
                assert_eq!(updates(&mut machine, 1, 1), []);
                assert!(!machine.is_joined());
            }
        }
        assert_eq!(receive(&mut hub(), message.clone()), [], "without a connection");
    }
    let mut machine = states[0].clone();
    assert_eq!(reaction(&machine.step(Event::Transfer(line[0]))), Close, "before Welcome");
    assert_eq!(reaction(&updates(&mut states[0].clone(), 1, 1)), Close, "before Welcome");
}

/// R7: what does not follow is neither stored nor acknowledged; a repeat is acknowledged only as
/// far as it is durable.
#[test]
fn a_transfer_follows_or_is_not_taken() {
    let line = line(3);
    let mut machine = joined();
    stage(&mut machine, &line[..2]);
    machine.step(Event::Durable(line[0].place));
    let ack = |actions: &[Action]| match actions {
        [Action::Send(Message::Ack(ack))] => ack.id,
        other => panic!("{other:?}"),
    };
    assert_eq!(ack(&machine.step(Event::Transfer(line[0]))), line[0].header.id, "repeated");
    assert_eq!(ack(&machine.step(Event::Transfer(line[1]))), line[0].header.id, "not durable");
    let forged = |change: fn(&mut Arrived)| {
        let mut arrived = line[2];
        change(&mut arrived);
        reaction(&machine.clone().step(Event::Transfer(arrived)))
    };
    assert_eq!(forged(|_| {}), Act);
    assert_eq!(forged(|t| t.header.previous = TransferId { generation: 1, counter: 1 }), Close);
    assert_eq!(forged(|t| t.header.hash_before = StreamHash([9; 16])), Close);
    assert_eq!(forged(|t| t.header.first_sequence = SequenceNumber(2)), Close);
    assert_eq!(forged(|t| t.header.first_sequence = SequenceNumber(4)), Close);
    assert_eq!(forged(|t| t.header.cp = CpNumber(0)), Close, "CP 0 is no CP");
    assert_eq!(forged(|t| t.header.cp = CpNumber(u32::MAX)), Close);
    let later = TransferId { generation: 2, counter: 1 };
    let mut arrived = line[2];
    (arrived.header.id, arrived.place.transfer) = (later, later);
    let actions = machine.clone().step(Event::Transfer(arrived));
    assert_eq!(reaction(&actions), Close, "a boot that was not announced");
    let mut other = line[1];
    other.place.hash = StreamHash([9; 16]);
    assert_eq!(reaction(&machine.step(Event::Transfer(other))), Close, "two contents");
    assert_eq!(machine.ladder()[0], line[1].place);
    let mut machine = joined();
    assert_eq!(reaction(&machine.step(Event::Transfer(line[1]))), Close, "a gap");
}

/// A label of an ended CP would have the transfer dropped with that CP's log.
#[test]
fn a_transfer_of_an_ended_cp_is_not_taken() {
    let first = line(2);
    let last = first[1].place;
    let next = |cp| transfer(last, TransferId { generation: 1, counter: 3 }, CpNumber(cp), 3);
    let mut machine = applying(&first);
    assert_eq!(reaction(&machine.clone().step(Event::Transfer(next(1)))), Close);
    assert_eq!(machine.clone().step(Event::Transfer(next(2))), [Action::Stage]);
    receive(&mut machine, end(1, last, 10));
    applied(&mut machine, 1, published(last));
    assert_eq!(reaction(&machine.clone().step(Event::Transfer(next(1)))), Close);
    assert_eq!(machine.step(Event::Transfer(next(2))), [Action::Stage]);
    // A repeat of what is applied is acknowledged and not kept (R15).
    let actions = machine.step(Event::Transfer(first[0]));
    assert!(matches!(actions[..], [Action::Send(Message::Ack(_))]), "{actions:?}");
}

#[test]
fn partition_full_is_held_to_what_came() {
    let line = line(2);
    let mut machine = joined();
    stage(&mut machine, &line);
    let beyond = Place { sequence: SequenceNumber(3), ..line[1].place };
    assert_eq!(reaction(&receive(&mut machine.clone(), full(1, beyond))), Close);
    assert_eq!(reaction(&receive(&mut machine.clone(), full(1, Place::default()))), Close);
    let too_high = CP_NUMBER_MAX.next().0;
    assert_eq!(reaction(&receive(&mut machine.clone(), full(too_high, line[1].place))), Close);
    // Not drained: nothing is applied yet, and a second CP does not stand in line.
    assert_eq!(receive(&mut machine, full(1, line[0].place)), []);
    assert_eq!(reaction(&receive(&mut machine.clone(), full(2, line[1].place))), Close);
    assert_eq!(machine.applying(), Some(CpNumber(1)));
    let actions = settle(&mut machine, line[0].place);
    let begin = Action::Apply { cp: CpNumber(1), last: line[0].place, build: Build::Updates };
    assert_eq!(actions.last(), Some(&begin), "{actions:?}");
}

/// A CP of nothing is made to write what was mended: it ends where the image does.
#[test]
fn a_cp_of_nothing_ends_where_the_image_does() {
    let line = line(2);
    let last = line[1].place;
    let mut machine = applying(&line);
    receive(&mut machine, end(1, last, 10));
    applied(&mut machine, 1, published(last));
    let begin = Action::Apply { cp: CpNumber(2), last, build: Build::Updates };
    assert_eq!(receive(&mut machine.clone(), full(2, last)), [begin]);
    let other = Place { hash: StreamHash([9; 16]), ..last };
    assert_eq!(reaction(&receive(&mut machine.clone(), full(2, other))), Close);
    assert_eq!(reaction(&receive(&mut machine, full(2, line[0].place))), Close);
}

#[test]
fn a_published_cp_told_again_is_done_again() {
    let line = line(2);
    let last = line[1].place;
    let mut machine = applying(&line);
    receive(&mut machine, end(1, last, 10));
    let done = Action::Send(Message::CpDone(CpDone { cp: CpNumber(1) }));
    let actions = applied(&mut machine, 1, published(last));
    assert!(actions.contains(&Action::DropLogs(CpNumber(1))), "{actions:?}");
    assert!(actions.contains(&done), "{actions:?}");
    for _ in 0..2 {
        assert_eq!(receive(&mut machine, full(1, last)), std::slice::from_ref(&done));
        // Its data and its end are passed over, and counted.
        let actions = updates(&mut machine, 1, 10);
        assert!(matches!(actions[..], [Action::Send(Message::Ack(_))]), "{actions:?}");
        assert_eq!(receive(&mut machine, end(1, last, 10)), []);
    }
}

#[test]
fn cp_end_is_held_to_its_data() {
    let line = line(2);
    let last = line[1].place;
    let machine = applying(&line);
    for bad in [end(1, last, 9), end(1, last, 11), end(1, line[0].place, 10), end(2, last, 10)] {
        assert_eq!(reaction(&receive(&mut machine.clone(), bad)), Close);
    }
    let mut machine = machine.clone();
    let actions = receive(&mut machine, end(1, last, 10));
    assert!(matches!(actions[..], [Action::Finish(_)]), "{actions:?}");
    assert_eq!(reaction(&receive(&mut machine, end(1, last, 10))), Close, "twice");
}

/// Data that comes before the log is drained waits with the shell, bounded by the credit.
#[test]
fn updates_before_the_apply_are_fed_in_order_and_bounded() {
    let line = line(2);
    let last = line[1].place;
    let mut machine = joined();
    stage(&mut machine, &line);
    assert_eq!(receive(&mut machine, full(1, last)), []);
    for _ in 0..10 {
        assert_eq!(updates(&mut machine, 1, 10), [Action::Feed]);
    }
    assert_eq!(reaction(&updates(&mut machine.clone(), 1, 1)), Close, "over the credit");
    assert_eq!(receive(&mut machine, end(1, last, 100)), []);
    let actions = settle(&mut machine, last);
    let [Action::Send(_), Action::Apply { .. }, Action::Finish(_)] = &actions[..] else {
        panic!("{actions:?}")
    };
    let actions = machine.step(Event::UpdatesTaken(10));
    assert!(matches!(actions[..], [Action::Send(Message::Ack(Ack { cp_taken: 10, .. }))]));
}

#[test]
fn updates_before_partition_full_are_dropped_and_counted() {
    let mut machine = joined();
    for n in 1..=50 {
        let actions = updates(&mut machine, 7, CP_CREDIT);
        let [Action::Send(Message::Ack(ack))] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!(ack.cp_taken, n * CP_CREDIT);
    }
    assert_eq!(reaction(&receive(&mut machine, end(7, Place::default(), 10))), Close);
}

/// What crosses a refusal on the wire does no harm, and the window is whole again afterwards.
#[test]
fn what_is_left_of_a_refused_cp_is_passed_over() {
    let line = line(2);
    let last = line[1].place;
    let over = || Outcome::OverLimit { reason: "it may have no more".to_owned() };
    for outcome in [rejected(), Outcome::NoSpace, over()] {
        let mut machine = applying(&line);
        updates(&mut machine, 1, 30);
        let actions = applied(&mut machine, 1, outcome.clone());
        let [Action::Send(Message::Ack(ack)), Action::Send(Message::CpRejected(no))] = &actions[..]
        else {
            panic!("{actions:?}")
        };
        let for_room = matches!(outcome, Outcome::NoSpace | Outcome::OverLimit { .. });
        assert_eq!((ack.cp_taken, no.no_space), (40, for_room));
        let actions = updates(&mut machine, 1, 20);
        assert!(matches!(actions[..], [Action::Send(Message::Ack(Ack { cp_taken: 60, .. }))]));
        // The applier says late what it took: it was counted.
        let actions = machine.step(Event::UpdatesTaken(40));
        assert!(matches!(actions[..], [Action::Send(Message::Ack(Ack { cp_taken: 60, .. }))]));
        assert_eq!(receive(&mut machine, end(1, last, 60)), []);
        // The second try counts its own bytes.
        let actions = receive(&mut machine, full(1, last));
        assert_eq!(actions, [Action::Apply { cp: CpNumber(1), last, build: Build::Updates }]);
        assert_eq!(updates(&mut machine, 1, 5), [Action::Feed]);
        let actions = receive(&mut machine, end(1, last, 5));
        assert!(matches!(actions[..], [Action::Finish(_)]), "{actions:?}");
    }
}

fn code(machine: &mut Mirror, hello: Hello) -> Option<RefusedCode> {
    let judged = machine.accepts(&hello).err();
    let before = machine.is_joined();
    let actions = machine.step(Event::Hello(hello));
    let [Action::Refuse(refused)] = &actions[..] else {
        assert_eq!(judged, None);
        return None;
    };
    assert_eq!(judged.as_ref(), Some(refused), "the question and the step agree");
    assert!(!refused.next_step.is_empty());
    assert_eq!(machine.is_joined(), before, "a refused Hello ends no session");
    Some(refused.code)
}

#[test]
fn versions_overlap_or_are_refused() {
    let version = |version, version_min| Hello { version, version_min, ..hello(1) };
    assert_eq!(code(&mut hub(), version(0, 0)), Some(RefusedCode::Version));
    assert_eq!(code(&mut hub(), version(9, 8)), Some(RefusedCode::Version));
    for older in PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION {
        let mut machine = hub();
        assert_eq!(code(&mut machine, version(older, older)), None);
        let actions = machine.step(Event::Recorded);
        assert_eq!(welcomes(&actions).map(|welcome| welcome.version), Some(older));
    }
    let mut machine = hub();
    assert_eq!(code(&mut machine, version(9, 1)), None, "a newer source that still speaks ours");
    let welcome = welcomes(&machine.step(Event::Recorded)).map(|welcome| welcome.version);
    assert_eq!(welcome, Some(PROTOCOL_VERSION));
}

/// Invariant 12: ids decide. None of these ends the session of the original.
#[test]
fn who_is_somebody_else_is_refused() {
    let mut machine = hub();
    join(&mut machine, 5);
    let epoch = machine.known().epoch;
    let other = |change: &dyn Fn(&mut Hello)| {
        let mut hello = hello(6);
        change(&mut hello);
        hello
    };
    let cases: Vec<(Hello, RefusedCode)> = vec![
        (other(&|h| h.source = SourceId([9; 16])), RefusedCode::OtherSource),
        (other(&|h| h.hub = Some(HubId([9; 16]))), RefusedCode::OtherHub),
        (other(&|h| h.epoch = Epoch { number: 2, id: 1 }), RefusedCode::Diverged),
        (other(&|h| h.epoch = Epoch { number: 1, id: epoch.id + 1 }), RefusedCode::Diverged),
        (other(&|h| h.generation = generation(4)), RefusedCode::Generation),
        (other(&|h| h.generation = Generation { number: 5, id: 1 }), RefusedCode::Generation),
        (other(&|h| h.cp_max = CpNumber(u32::MAX)), RefusedCode::Protocol),
        (other(&|h| h.own_cp = CpNumber(u32::MAX)), RefusedCode::Protocol),
    ];
    for (hello, wanted) in cases {
        assert_eq!(code(&mut machine, hello.clone()), Some(wanted), "{hello:?}");
    }
    assert_eq!(machine.known().generation, generation(5));
    assert_eq!(code(&mut machine, other(&|h| h.epoch = epoch)), None);
}

/// Of a source that this hub has forgotten nobody knows which copy is the newest, nor who was primary.
#[test]
fn a_source_that_was_forgotten_is_told_so() {
    let mut machine = hub();
    let own = Hello { epoch: Epoch { number: 1, id: 77 }, ..hello(5) };
    assert_eq!(code(&mut machine, own), Some(RefusedCode::Diverged));
    assert_eq!(machine.known().epoch, Epoch::default(), "it is not met by that");
    // Control: without an epoch it is new.
    assert_eq!(code(&mut machine, hello(5)), None);
}

/// A copy of the state directory boots beside the original: whoever has the newer boot counter
/// goes on, the other one is refused, in both orders of connecting.
#[test]
fn one_of_two_clones_is_refused_in_either_order() {
    // The copy was made while boot 3 ran and boots as 4 with an id of its own.
    let copy = Hello { generation: Generation { number: 4, id: 77 }, ..hello(4) };
    // First the copy, then the running original.
    let mut machine = hub();
    join(&mut machine, 3);
    assert_eq!(code(&mut machine, copy.clone()), None);
    machine.step(Event::Recorded);
    assert_eq!(code(&mut machine, hello(3)), Some(RefusedCode::Generation));
    // The original boots as 4 too, with another id.
    assert_eq!(code(&mut machine, hello(4)), Some(RefusedCode::Generation));
    // First the original's boot 4, then the copy.
    let mut machine = hub();
    join(&mut machine, 4);
    assert_eq!(code(&mut machine, copy.clone()), Some(RefusedCode::Generation));
    assert!(machine.is_joined());
    // A hub that restarts knows it still.
    let known = machine.known().clone();
    let mut machine = Mirror::new(known, Place::default(), CREDIT, CP_CREDIT);
    assert_eq!(code(&mut machine, copy), Some(RefusedCode::Generation));
    assert_eq!(code(&mut machine, hello(4)), None, "the same boot connects again");
}

/// A copy whose boot counter is above the original's, because it was started more often: it has not what
/// the hub has published, so it is refused, the original stays in session, and its boot the newest.
#[test]
fn a_copy_that_lacks_a_published_cp_is_refused_whatever_its_boot() {
    let published = Known { applied_cp: CpNumber(3), ..known() };
    let has = |cp, number| Hello { own_cp: CpNumber(cp), ..hello(number) };
    let mut machine = Mirror::new(published, Place::default(), CREDIT, CP_CREDIT);
    assert_eq!(code(&mut machine, has(3, 4)), None);
    machine.step(Event::Recorded);
    assert_eq!(machine.accepts(&has(2, 5)).unwrap_err().code, RefusedCode::Diverged);
    assert_eq!(code(&mut machine, has(2, 5)), Some(RefusedCode::Diverged));
    assert!(machine.is_joined(), "the original stays in session");
    assert_eq!(machine.known().generation, generation(4));
    assert_eq!(code(&mut machine, has(3, 5)), None, "the same boot with that CP comes in");
}

#[test]
fn volumes_are_held_to_what_is_known() {
    let offer = |number: u32, id: u8, name: &str, size: u64| VolumeOffer {
        number: VolumeNumber(number),
        id: VolumeId([id; 16]),
        name: name.parse().unwrap(),
        size: ByteCount(size),
    };
    let with = |volumes: Vec<VolumeOffer>| Hello { volumes, ..hello(1) };
    let first = || offers().remove(0);
    let second = || offer(1, 4, "vol1", 4096);
    let mut machine = joined();
    let refused: Vec<Vec<VolumeOffer>> = vec![
        vec![],
        vec![VolumeOffer { size: ByteCount(4096), ..first() }],
        vec![VolumeOffer { id: VolumeId([9; 16]), ..first() }],
        vec![VolumeOffer { number: VolumeNumber(9), ..first() }],
        vec![VolumeOffer { name: "other".parse().unwrap(), ..first() }],
        vec![first(), offer(1, 4, "vol1", 4097)],
        vec![first(), offer(1, 4, "vol1", VOLUME_BYTES_MAX + 4096)],
        vec![first(), offer(0, 4, "vol1", 4096)],
        vec![first(), offer(1, 3, "vol1", 4096)],
        vec![first(), offer(1, 4, "vol0", 4096)],
        vec![first(), second(), second()],
        vec![first(); VOLUMES_PER_SOURCE_MAX + 1],
    ];
    for volumes in refused {
        let count = volumes.len();
        let text = format!("{:?}", volumes.last());
        assert_eq!(code(&mut machine, with(volumes)), Some(RefusedCode::Volume), "{count} {text}");
    }
    assert_eq!(machine.known().volumes, offers());
    assert_eq!(code(&mut machine, with(vec![first(), second()])), None, "a new one");
    assert_eq!(code(&mut machine, with(vec![second(), first()])), None, "in any order");
}

/// A volume becomes larger with a Hello, never smaller, and never beyond what the hub's file pins; a
/// file that comes to fit is a reason to ask the source again.
#[test]
fn a_volume_grows_with_a_hello() {
    let sized = |size: u64| VolumeOffer { size: ByteCount(size), ..offers().remove(0) };
    let other = VolumeOffer {
        number: VolumeNumber(1),
        id: VolumeId([8; 16]),
        name: "other".parse().unwrap(),
        size: ByteCount(4096),
    };
    let with = |size| Hello { volumes: vec![sized(size), other.clone()], ..hello(1) };
    let pin = |size: u64| vec![("vol0".to_owned(), size), ("other".to_owned(), 4096)];
    let (small, large) = (1 << 20, 1 << 21);
    let mut machine = joined();
    let sizes = |machine: &Mirror| machine.agreed().map(|offer| offer.size.0).collect::<Vec<_>>();
    machine.pin(pin(small));
    assert_eq!(code(&mut machine, with(small)), None);
    machine.step(Event::Recorded);
    // Source first: it is refused until the file fits.
    assert_eq!(code(&mut machine, with(large)), None);
    let actions = machine.step(Event::Recorded);
    assert_eq!(welcomes(&actions).expect("welcome").refused.len(), 1);
    assert_eq!((sizes(&machine), machine.is_outdated()), (vec![4096], false));
    machine.pin(pin(large));
    assert!(machine.is_outdated(), "it is to come again");
    assert_eq!(code(&mut machine, with(large)), None);
    machine.step(Event::Recorded);
    assert_eq!((sizes(&machine), machine.is_outdated()), (vec![large, 4096], false));
    assert_eq!(machine.known().volumes[0].size, ByteCount(large), "entries behind the old end");
    // Hub first: what has not grown yet is as it was.
    machine.pin(pin(large * 2));
    assert_eq!(code(&mut machine, with(large)), None);
    let actions = machine.step(Event::Recorded);
    assert_eq!(welcomes(&actions).expect("welcome").refused.len(), 0);
    // Never smaller.
    assert_eq!(code(&mut machine, with(small)), None);
    let actions = machine.step(Event::Recorded);
    let refused = &welcomes(&actions).expect("welcome").refused;
    assert!(refused[0].reason.contains("does not become smaller"), "{refused:?}");
}

/// R20: a volume that is not what the hub knows or pins is refused alone, and what is left out is
/// remembered until its image is brought up.
#[test]
fn a_volume_is_refused_alone() {
    let offer = |number: u32, name: &str, size: u64| VolumeOffer {
        number: VolumeNumber(number),
        id: VolumeId([number.to_le_bytes()[0] + 3; 16]),
        name: name.parse().unwrap(),
        size: ByteCount(size),
    };
    let all = || vec![offer(0, "vol0", 1 << 20), offer(1, "vol1", 4096), offer(2, "vol2", 8192)];
    let hello = |generation, volumes| Hello { volumes, own_cp: CpNumber(9), ..hello(generation) };
    let numbers = |machine: &Mirror| {
        let refused = machine.known().refused.iter().map(|no| no.volume.0).collect::<Vec<_>>();
        (machine.agreed().map(|offer| offer.number.0).collect::<Vec<_>>(), refused)
    };
    let left =
        |number, cp, refused| LeftOut { volume: VolumeNumber(number), cp: CpNumber(cp), refused };
    let pins = |size: u64| {
        let pin = |offer: &VolumeOffer| (offer.name.to_string(), offer.size.0);
        let mut pinned: Vec<(String, u64)> = all().iter().map(pin).collect();
        pinned[2].1 = size;
        pinned
    };
    let machine = |known: Known| Mirror::new(known, Place::default(), CREDIT, CP_CREDIT);
    let come = |machine: &mut Mirror, generation, volumes| {
        let actions = machine.step(Event::Hello(hello(generation, volumes)));
        let Some(Action::Record { volumes, .. }) = actions.last() else { panic!("{actions:?}") };
        let recorded = volumes.len();
        let actions = machine.step(Event::Recorded);
        (recorded, welcomes(&actions).expect("welcome").refused.len())
    };
    // Pinned with another size: the other two go on.
    let mut one = machine(Known { pinned: pins(4096), ..known() });
    assert_eq!(come(&mut one, 1, all()), (2, 1));
    assert_eq!(numbers(&one), (vec![0, 1], vec![2]));
    assert_eq!(one.known().left_out, [left(2, 0, true)]);
    let reason = &one.known().refused[0].reason;
    assert!(reason.contains("vol2") && reason.contains("8192") && reason.contains("4096"));
    // Not in the file at all, or no longer announced.
    let mut none = machine(Known { pinned: pins(8192)[..2].to_vec(), ..known() });
    assert_eq!(come(&mut none, 1, all()), (2, 1));
    let mut gone = machine(known());
    assert_eq!(come(&mut gone, 1, all()), (3, 0));
    assert_eq!(come(&mut gone, 1, all()[..2].to_vec()), (2, 1));
    assert_eq!(numbers(&gone), (vec![0, 1], vec![2]));
    // A CP of the two moves them only; agreed on again, the third is behind until a CP has it.
    let line = line(2);
    let root = |byte| Root([byte; 32]);
    stage(&mut one, &line[..1]);
    settle(&mut one, line[0].place);
    receive(&mut one, full(1, line[0].place));
    let roots = vec![(VolumeNumber(0), root(1)), (VolumeNumber(1), root(2))];
    let outcome = Outcome::Published(roots);
    one.step(Event::Applied { cp: CpNumber(1), outcome });
    assert_eq!(one.known().left_out, [left(2, 0, true)]);
    let mut fixed = machine(Known { pinned: pins(8192), ..one.known().clone() });
    assert_eq!(come(&mut fixed, 2, all()), (3, 0));
    assert_eq!(fixed.known().left_out, [left(2, 0, false)], "its log entries do not count yet");
    let mut list = fixed.known().left_out.clone();
    LeftOut::published(&mut list, CpNumber(2), |volume| volume.0 < 2);
    assert_eq!(list, [left(2, 0, false)], "the control: a CP without it changes nothing");
    LeftOut::published(&mut list, CpNumber(2), |_| true);
    assert_eq!(list, []);
    // Refused again while an older session's CP, which has it, is under way: the image moves.
    let mut list = vec![left(2, 1, true)];
    LeftOut::published(&mut list, CpNumber(2), |_| true);
    assert_eq!(list, [left(2, 2, true)]);
}

/// A newer accepted Hello ends the older session; Welcome waits for what is queued.
#[test]
fn welcome_waits_for_the_older_session_to_come_to_rest() {
    let line = line(2);
    let mut machine = joined();
    stage(&mut machine, &line);
    machine.step(Event::Hello(hello(2)));
    assert!(!machine.is_joined());
    assert_eq!(machine.step(Event::Recorded), []);
    assert_eq!(machine.step(Event::Durable(line[0].place)), []);
    let actions = machine.step(Event::Durable(line[1].place));
    assert_eq!(welcomes(&actions).map(|welcome| welcome.last), Some(line[1].place.into()));
    // In the other order.
    let mut machine = joined();
    stage(&mut machine, &line);
    machine.step(Event::Hello(hello(2)));
    assert_eq!(machine.step(Event::Durable(line[1].place)), []);
    assert!(welcomes(&machine.step(Event::Recorded)).is_some());
}

#[test]
fn a_lost_connection_gives_up_what_is_not_whole() {
    let line = line(2);
    let last = line[1].place;
    // Waiting for the drainer: forgotten without a word.
    let mut machine = joined();
    stage(&mut machine, &line);
    receive(&mut machine, full(1, last));
    updates(&mut machine, 1, 10);
    assert_eq!(machine.step(Event::Disconnected), []);
    assert_eq!(machine.applying(), None);
    settle(&mut machine, last);
    join(&mut machine, 2);
    let actions = receive(&mut machine, full(1, last));
    assert_eq!(
        actions,
        [Action::Apply { cp: CpNumber(1), last, build: Build::Updates }],
        "it begins anew"
    );
    // Running: aborted, and Welcome waits for the end of that.
    for outcome in [Outcome::Aborted, rejected(), Outcome::NoSpace] {
        let mut machine = applying(&line);
        assert_eq!(machine.step(Event::Disconnected), [Action::Abort]);
        machine.step(Event::Hello(hello(2)));
        assert_eq!(machine.step(Event::Recorded), []);
        assert_eq!(machine.step(Event::UpdatesTaken(10)), [], "of the older connection");
        let actions = applied(&mut machine, 1, outcome);
        assert_eq!(welcomes(&actions).map(|welcome| welcome.applied_cp), Some(CpNumber(0)));
        // Late news of the older connection do not open the new one's window.
        let actions = machine.step(Event::UpdatesTaken(10));
        assert!(matches!(actions[..], [Action::Send(Message::Ack(Ack { cp_taken: 0, .. }))]));
        receive(&mut machine, full(1, last));
        assert_eq!(updates(&mut machine, 1, CP_CREDIT), [Action::Feed]);
        assert_eq!(reaction(&updates(&mut machine, 1, 1)), Close);
    }
}

/// All of the CP is here: it is published without its source, and Welcome says so.
#[test]
fn a_whole_cp_is_published_without_its_source() {
    let line = line(2);
    let last = line[1].place;
    let mut machine = applying(&line);
    receive(&mut machine, end(1, last, 10));
    assert_eq!(machine.step(Event::Disconnected), []);
    machine.step(Event::Hello(hello(1)));
    assert_eq!(machine.step(Event::Recorded), [], "Welcome waits for the apply");
    let actions = applied(&mut machine, 1, published(last));
    assert_eq!(actions[0], Action::DropLogs(CpNumber(1)));
    let welcome = welcomes(&actions).unwrap();
    assert_eq!((welcome.applied_cp, welcome.applied), (CpNumber(1), last.into()));
    assert_eq!(welcome.roots, [VolumeRoot { volume: VolumeNumber(0), root: root_of(last) }]);
    assert!(!actions.iter().any(|action| matches!(action, Action::Send(Message::CpDone(_)))));
}

#[test]
fn a_refill_is_ended_only_when_it_is_whole() {
    let line = line(3);
    let begin = || {
        let mut machine = joined();
        stage(&mut machine, &line);
        settle(&mut machine, line[2].place);
        let from = line[0].place;
        let actions = receive(&mut machine, Message::WantLog(WantLog { from: from.into() }));
        assert_eq!(actions, [Action::SendLog { from }]);
        machine
    };
    let mut machine = begin();
    assert_eq!(machine.step(Event::Credit(5)), [], "the source does not listen yet");
    let actions = machine.step(Event::LogSent(Some(line[2].place)));
    let ended = Action::Send(Message::RefillEnd(RefillEnd { last: line[2].place.into() }));
    let [first, Action::Send(Message::Ack(ack))] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((first, ack.log_credit), (&ended, 5), "the credit is told behind the refill");
    assert_eq!(reaction(&begin().step(Event::LogSent(Some(line[1].place)))), Close, "short");
    assert_eq!(reaction(&begin().step(Event::LogSent(None))), Refuse);
    let mut machine = begin();
    machine.step(Event::Disconnected);
    assert_eq!(machine.step(Event::LogSent(Some(line[2].place))), [], "nobody is there");
}

#[test]
fn a_faulted_log_refuses_its_source_and_nobody_else_is_asked() {
    let line = line(2);
    let mut machine = applying(&line);
    let actions = machine.step(Event::Faulted("EIO".into()));
    let [Action::Refuse(refused), Action::Abort] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(refused.code, RefusedCode::Faulted);
    assert_eq!(machine.step(Event::Faulted("ENOSPC".into())), [], "the first reason stays");
    assert_eq!(applied(&mut machine, 1, Outcome::Aborted), []);
    let refused = machine.accepts(&hello(1)).unwrap_err();
    assert_eq!(refused.code, RefusedCode::Faulted);
    assert!(refused.reason.contains("EIO"), "{}", refused.reason);
}

/// R6: a number in the log or in an announced CP was used, whatever its source remembers.
#[test]
fn numbers_seen_here_count_as_used() {
    let first = line(1);
    let mut machine = joined();
    stage(&mut machine, &first);
    let id = TransferId { generation: 1, counter: 2 };
    let next = transfer(first[0].place, id, CpNumber(4), 2);
    stage(&mut machine, &[next]);
    assert_eq!(machine.known().cp_max, CpNumber(3), "the CP before the open one");
    receive(&mut machine, full(5, next.place));
    assert_eq!(machine.known().cp_max, CpNumber(5));
    settle(&mut machine, next.place);
    machine.step(Event::Disconnected);
    applied(&mut machine, 5, Outcome::Aborted);
    assert_eq!(join(&mut machine, 2).cp_max, CpNumber(5));
}

/// An apply ends once; what says otherwise is a fault of the shell and must not be acknowledged.
#[test]
#[should_panic(expected = "ended that was not under way")]
fn an_apply_that_was_not_begun_cannot_end() {
    applied(&mut joined(), 1, Outcome::Published(vec![(VolumeNumber(0), Root([0; 32]))]));
}

#[test]
#[should_panic(expected = "durable before received")]
fn nothing_is_durable_before_it_came() {
    joined().step(Event::Durable(line(1)[0].place));
}

/// A hub in session with a source that asks for `ack`.
fn joined_for(ack: policy::Ack) -> Mirror {
    let mut machine = hub();
    let promise = Policy { ack, ..Policy::default() };
    machine.step(Event::Hello(Hello { policy: promise, ..hello(1) }));
    assert!(welcomes(&machine.step(Event::Recorded)).is_some());
    assert_eq!(machine.known().policy, Some(promise));
    machine
}

fn acknowledged(actions: &[Action]) -> Option<TransferId> {
    actions.iter().rev().find_map(|action| match action {
        Action::Send(Message::Ack(ack)) => Some(ack.id),
        _ => None,
    })
}

/// What a source asks for is what an Ack waits for: each promise is the others' negative control.
#[test]
fn an_ack_waits_for_what_the_source_asks_for() {
    let line = line(2);
    let (id, place) = (line[0].place.transfer, line[0].place);
    for (ack, wanted) in [
        (policy::Ack::Received, [true, true, true, true]),
        (policy::Ack::Durable, [false, true, true, true]),
        (policy::Ack::Filed, [false, false, false, true]),
    ] {
        let mut machine = joined_for(ack);
        let mut last = TransferId::NONE;
        let events = [
            Event::Transfer(line[0]),
            Event::Durable(place),
            Event::Drained(place),
            Event::Filed(place),
        ];
        for (event, wanted) in events.into_iter().zip(wanted) {
            last = acknowledged(&machine.step(event)).unwrap_or(last);
            assert_eq!(last == id, wanted, "{ack} after {:?}", machine.ladder());
        }
    }
}

/// What Welcome names counts as acknowledged: it waits for what the source asks for, and what was
/// acknowledged as received only is named no more after the hub has lost it (R7).
#[test]
fn welcome_says_what_is_held_whatever_was_acknowledged() {
    let line = line(1);
    let place = line[0].place;
    let mut machine = joined_for(policy::Ack::Received);
    assert_eq!(acknowledged(&machine.step(Event::Transfer(line[0]))), Some(place.transfer));
    // The power goes before the ring has it.
    let mut after = Mirror::new(machine.known().clone(), Place::default(), CREDIT, CP_CREDIT);
    let welcome = join(&mut after, 2);
    assert_eq!(Place::from(welcome.last), Place::default());

    let mut machine = joined_for(policy::Ack::Filed);
    stage(&mut machine, &line);
    settle(&mut machine, place);
    let filed = Policy { ack: policy::Ack::Filed, ..Policy::default() };
    machine.step(Event::Hello(Hello { policy: filed, ..hello(2) }));
    assert_eq!(welcomes(&machine.step(Event::Recorded)), None, "durable, and not filed");
    let welcome = welcomes(&machine.step(Event::Filed(place))).unwrap();
    assert_eq!(Place::from(welcome.last), place);
}

/// A CP that is published needs no log: with it everything up to its end is acknowledged, before
/// CpDone says so.
#[test]
fn a_published_cp_acknowledges_what_was_never_filed() {
    let line = line(1);
    let place = line[0].place;
    let mut machine = joined_for(policy::Ack::Filed);
    stage(&mut machine, &line);
    settle(&mut machine, place);
    receive(&mut machine, full(1, place));
    receive(&mut machine, end(1, place, 0));
    let actions = applied(&mut machine, 1, published(place));
    let at = |wanted: fn(&Message) -> bool| {
        actions.iter().position(|action| matches!(action, Action::Send(said) if wanted(said)))
    };
    let (ack, done) =
        (at(|m| matches!(m, Message::Ack(_))), at(|m| matches!(m, Message::CpDone(_))));
    assert!(ack.is_some() && ack < done, "{actions:?}");
    assert_eq!(acknowledged(&actions), Some(place.transfer));
}

/// A Hello that lay in an older connection changes nothing: what it says is not so any more.
#[test]
fn a_hello_that_comes_late_is_turned_away() {
    let mut machine = Mirror::new(known(), Place::default(), 1000, 1000);
    machine.step(Event::Hello(Hello { connection: 2, ..hello(1) }));
    let late = Hello { connection: 1, ..hello(1) };
    assert_eq!(machine.accepts(&late).unwrap_err().code, RefusedCode::Busy);
    assert!(machine.accepts(&Hello { connection: 2, ..hello(1) }).is_ok());
    assert!(machine.accepts(&Hello { connection: 1, ..hello(2) }).is_ok(), "of the next boot");
}

/// R4: a source that may not have heard a Welcome answers alone, so `stop` counts once it showed
/// that it has; the control is one that was welcomed before.
#[test]
fn stop_counts_from_the_first_welcome_that_was_heard() {
    let policies = |actions: &[Action]| {
        let recorded = |action: &Action| match action {
            Action::Record { policy, .. } => Some(policy.on_hub_loss),
            _ => None,
        };
        actions.iter().filter_map(recorded).collect::<Vec<_>>()
    };
    let stops = Policy { on_hub_loss: OnHubLoss::Stop, ..Policy::default() };
    let first = Hello { hub: None, policy: stops, ..hello(1) };
    let mut machine = Mirror::new(known(), Place::default(), 1000, 1000);
    let told = machine.step(Event::Hello(first.clone()));
    assert_eq!(policies(&told), [OnHubLoss::Continue]);
    machine.step(Event::Recorded);
    let standing = Message::Standing(Standing { alone: None });
    let shown = machine.step(Event::Received(standing));
    assert_eq!(policies(&shown), [OnHubLoss::Stop]);
    let hub = Some(machine.known().hub);
    let mut machine = Mirror::new(known(), Place::default(), 1000, 1000);
    let told = machine.step(Event::Hello(Hello { hub, ..first }));
    assert_eq!(policies(&told), [OnHubLoss::Stop]);
}
