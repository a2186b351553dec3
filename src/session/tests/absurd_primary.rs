//! A source whose hub is absurd: each message in each state, and what a wrong one gets.

use super::super::CP_NUMBER_MAX;
use super::super::mirror::Arrived;
use super::super::primary::{Action, Answering, Event, Held, Identity, Own, Past, Primary};
use super::world::{generation, hub_id, offers, root_of, source_id, transfer};
use crate::record::marks::Place;
use crate::units::hash::StreamHash;
use crate::units::ids::HubId;
use crate::units::numbers::{CpNumber, Epoch, SequenceNumber, TransferId, VolumeNumber};
use crate::units::policy::{OnHubLoss, Policy};
use crate::wire::message::{
    Ack, CheckpointAt, CpDone, CpEnd, CpRejected, Fenced, Going, Message, PartitionFull, Ping,
    Pong, RefillEnd, Refused, RefusedCode, Scan, Scanned, Updates, WantCheckpoint, WantLog,
    Welcome,
};

const EPOCH: Epoch = Epoch { number: 1, id: 8 };
const CREDIT: u64 = 1000;
const BYTES: u64 = 100;

/// `count` transfers of generation 1, all of CP 1, behind the empty beginning.
pub(super) fn line(count: u64) -> Vec<Arrived> {
    let mut last = Place::default();
    let mut line = Vec::new();
    for counter in 1..=count {
        let id = TransferId { generation: 1, counter };
        let arrived = transfer(last, id, CpNumber(1), counter);
        last = arrived.place;
        line.push(arrived);
    }
    line
}

pub(super) fn held(arrived: &Arrived) -> Held {
    Held { place: arrived.place, bytes: BYTES }
}

fn refilled(arrived: &Arrived) -> Event {
    Event::Refilled {
        held: held(arrived),
        previous: arrived.header.previous,
        hash_before: arrived.header.hash_before,
    }
}

/// A source of generation 2 that holds the first `count` of `line` and knows its hub.
fn source(line: &[Arrived], count: usize) -> Primary {
    source_that(line, count, OnHubLoss::Stop)
}

fn source_that(line: &[Arrived], count: usize, on_hub_loss: OnHubLoss) -> Primary {
    let held = line[..count].iter().map(held);
    Primary::new(identity(on_hub_loss), Place::default(), held, Own::default())
}

/// A source of generation 2 that knows its hub.
pub(super) fn identity(on_hub_loss: OnHubLoss) -> Identity {
    Identity {
        name: "filer-a".parse().unwrap(),
        source: source_id(),
        hub: Some(hub_id()),
        generation: generation(2),
        epoch: EPOCH,
        volumes: offers(),
        policy: Policy { on_hub_loss, ..Policy::default() },
        alone: None,
        unasked: None,
    }
}

pub(super) fn welcome(last: Place) -> Welcome {
    Welcome {
        version: 1,
        hub: hub_id(),
        epoch: EPOCH,
        applied_cp: CpNumber(0),
        roots: Vec::new(),
        applied: Place::default().into(),
        last: last.into(),
        cp_max: CpNumber(0),
        log_credit: CREDIT,
        cp_credit: CREDIT,
        work: false,
        own_durable: TransferId::NONE,
        refused: Vec::new(),
    }
}

fn receive(machine: &mut Primary, message: Message) -> Vec<Action> {
    machine.step(received(message))
}

/// The shell says of a Welcome whether its image is the source's past: here it is not.
pub(super) fn received(message: Message) -> Event {
    match message {
        Message::Welcome(welcome) => Event::Welcomed { welcome, past: Past::No },
        other => Event::Received(other),
    }
}

fn greeting(line: &[Arrived], count: usize) -> Primary {
    let mut machine = source(line, count);
    machine.step(Event::Connected);
    machine
}

/// In session with a hub that holds nothing: all of `line` is sent.
fn streaming(line: &[Arrived]) -> Primary {
    let mut machine = greeting(line, line.len());
    let actions = receive(&mut machine, Message::Welcome(welcome(Place::default())));
    assert!(actions.contains(&Action::Serve), "{actions:?}");
    machine
}

/// CP 1 is announced, sent and committed, its transfers are not acknowledged.
fn announced(line: &[Arrived]) -> Primary {
    let mut machine = streaming(line);
    let (cp, place) = (CpNumber(1), line.last().unwrap().place);
    machine.step(Event::Frozen { cp, place });
    machine.step(Event::DataSent { cp, bytes: 0 });
    let roots = vec![(VolumeNumber(0), root_of(place))];
    machine.step(Event::Committed { cp, roots });
    machine
}

/// How a machine answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reaction {
    Close,
    Halt,
    Ignore,
    Act,
}
use Reaction::{Act, Close, Halt, Ignore};

fn reaction(actions: &[Action]) -> Reaction {
    if actions.iter().any(|action| matches!(action, Action::Halt(_))) {
        Halt
    } else if actions.iter().any(|action| matches!(action, Action::Close { .. })) {
        assert_eq!(actions.len(), 1, "something is done beside Close: {actions:?}");
        Close
    } else if actions.is_empty() {
        Ignore
    } else {
        Act
    }
}

fn refusal(code: RefusedCode) -> Message {
    Message::Refused(Refused { code, reason: "no".into(), next_step: "none".into() })
}

fn ack(id: TransferId) -> Message {
    Message::Ack(Ack { id, log_credit: CREDIT, cp_taken: 0 })
}

fn rejected(cp: u32, no_space: bool) -> Message {
    let reason = "differs".to_owned();
    Message::CpRejected(CpRejected { cp: CpNumber(cp), differs: None, reason, no_space })
}

fn done(cp: u32) -> Message {
    Message::CpDone(CpDone { cp: CpNumber(cp) })
}

/// The messages, and what each gets in greeting, refilling, streaming, and with a CP announced.
fn table(line: &[Arrived]) -> Vec<(Message, [Reaction; 4])> {
    let last = line[1].place;
    let nowhere = Place::default().into();
    let cp = CpNumber(1);
    vec![
        (Message::Welcome(welcome(line[0].place)), [Act, Close, Close, Close]),
        (refusal(RefusedCode::Busy), [Close; 4]),
        (refusal(RefusedCode::Faulted), [Close; 4]),
        (refusal(RefusedCode::UnknownSource), [Close; 4]),
        (refusal(RefusedCode::Protocol), [Close; 4]),
        (refusal(RefusedCode::Version), [Halt; 4]),
        (refusal(RefusedCode::OtherSource), [Halt; 4]),
        (refusal(RefusedCode::OtherHub), [Halt; 4]),
        (refusal(RefusedCode::Generation), [Halt; 4]),
        (refusal(RefusedCode::Diverged), [Halt; 4]),
        (refusal(RefusedCode::Gap), [Halt; 4]),
        (refusal(RefusedCode::Volume), [Halt; 4]),
        (ack(last.transfer), [Close, Ignore, Act, Act]),
        (Message::WantCheckpoint(WantCheckpoint { token: 1 }), [Close, Act, Act, Act]),
        (done(1), [Close; 4]),
        (rejected(1, false), [Close, Close, Close, Act]),
        (rejected(1, true), [Close, Close, Close, Act]),
        (Message::Refill, [Close; 4]),
        (Message::RefillEnd(RefillEnd { last: last.into() }), [Close; 4]),
        (Message::Fenced(Fenced { epoch: Epoch { number: 9, id: 9 }, hub: None }), [Halt; 4]),
        (Message::Ping(Ping { sequence: SequenceNumber(0), token: 1 }), [Act; 4]),
        (Message::Pong(Pong { token: 1 }), [Ignore; 4]),
        (Message::Going(Going { reason: "stops".into() }), [Close; 4]),
        (Message::Scan(Scan { cp, token: 1 }), [Close, Act, Act, Act]),
        (
            Message::Scanned(Scanned { cp, token: 1, volumes: vec![], problems: vec![] }),
            [Close, Act, Act, Act],
        ),
        // What only a source says.
        (Message::Transfer, [Close; 4]),
        (
            Message::PartitionFull(PartitionFull {
                cp,
                last: nowhere,
                base: None,
                replay: false,
                keeps_log: false,
            }),
            [Close; 4],
        ),
        (Message::Updates(Updates { cp, volume: VolumeNumber(0) }), [Close; 4]),
        (Message::CpEnd(CpEnd { cp, place: nowhere, roots: vec![], update_bytes: 0 }), [Close; 4]),
        (Message::WantLog(WantLog { from: nowhere }), [Close; 4]),
        (Message::CheckpointAt(CheckpointAt { token: 1, cp }), [Close; 4]),
    ]
}

/// Every message of the protocol in every state. A hub that speaks out of turn loses the
/// connection; nothing is believed without one, behind Close, or behind Halt.
#[test]
fn every_message_in_every_state() {
    let line = line(2);
    let last = line[1].place;
    let table = table(&line);
    let mut refilling = greeting(&line, 1);
    receive(&mut refilling, Message::Welcome(welcome(last)));
    let states = [greeting(&line, 2), refilling, streaming(&line), announced(&line)];
    for (message, wanted) in &table {
        for (state, wanted) in states.iter().zip(wanted) {
            let mut machine = state.clone();
            let actions = receive(&mut machine, message.clone());
            let met = reaction(&actions);
            assert_eq!(met, *wanted, "{message:?} in {state:?} gives {actions:?}");
            if met == Close || met == Halt {
                // What ended takes nothing more, not even the next right message.
                for (message, _) in &table {
                    assert_eq!(receive(&mut machine, message.clone()), [], "{message:?}");
                }
                assert_eq!(machine.step(refilled(&line[1])), []);
                let again = machine.step(Event::Disconnected);
                assert_eq!(again, []);
                let hello = machine.step(Event::Connected);
                assert_eq!(hello.is_empty(), met == Halt, "{hello:?}");
            }
        }
        assert_eq!(receive(&mut source(&line, 2), message.clone()), [], "without a connection");
    }
}

#[test]
fn hello_is_refused_for_a_hello() {
    let mut machine = greeting(&line(0), 0);
    let hello = source(&line(0), 0).step(Event::Connected).remove(0);
    let Action::Send(hello) = hello else { panic!("{hello:?}") };
    assert_eq!(reaction(&receive(&mut machine, hello)), Close);
}

#[test]
fn acks_repeat_and_come_late_but_never_name_what_was_not_sent() {
    let line = line(3);
    let durable = |actions: &[Action]| {
        actions.iter().find_map(|action| match action {
            Action::HubDurable(place) => Some(*place),
            _ => None,
        })
    };
    let mut machine = streaming(&line);
    assert_eq!(durable(&receive(&mut machine, ack(line[1].header.id))), Some(line[1].place));
    assert_eq!(durable(&receive(&mut machine, ack(line[1].header.id))), None, "repeated");
    assert_eq!(durable(&receive(&mut machine, ack(line[0].header.id))), None, "late");
    assert_eq!(durable(&receive(&mut machine, ack(TransferId::NONE))), None, "empty");
    assert_eq!(machine.hub_sequence(), SequenceNumber(2));
    let foreign = [
        TransferId { generation: 1, counter: 4 },
        TransferId { generation: 1, counter: u64::MAX },
        TransferId { generation: 2, counter: 0 },
        TransferId { generation: 99, counter: 99 },
    ];
    for id in foreign {
        let mut machine = machine.clone();
        assert_eq!(reaction(&receive(&mut machine, ack(id))), Close, "{id}");
        assert_eq!(machine.hub_sequence(), SequenceNumber(2));
    }
    // Held, but the credit did not let it go.
    let mut machine = greeting(&line, 3);
    let little = Welcome { log_credit: BYTES, ..welcome(Place::default()) };
    receive(&mut machine, Message::Welcome(little));
    assert_eq!(reaction(&receive(&mut machine, ack(line[1].header.id))), Close);
}

#[test]
fn cp_data_taken_never_falls() {
    let line = line(1);
    let mut machine = streaming(&line);
    let taken = |cp_taken| Message::Ack(Ack { id: TransferId::NONE, log_credit: CREDIT, cp_taken });
    let window = Action::DataWindow { taken: 50, limit: CREDIT };
    assert_eq!(receive(&mut machine, taken(50)), [window]);
    assert_eq!(reaction(&receive(&mut machine, taken(49))), Close);
    // A new connection begins at zero.
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let actions = receive(&mut machine, Message::Welcome(welcome(line[0].place)));
    assert!(actions.contains(&Action::DataWindow { taken: 0, limit: CREDIT }), "{actions:?}");
    assert_eq!(reaction(&receive(&mut machine, taken(0))), Act);
}

#[test]
fn credit_holds_transfers_back_and_a_reconnect_begins_anew() {
    let line = line(3);
    let sent = |actions: &[Action]| {
        actions.iter().filter(|action| matches!(action, Action::SendTransfer(_))).count()
    };
    let mut machine = greeting(&line, 3);
    let none = Welcome { log_credit: 0, ..welcome(Place::default()) };
    assert_eq!(sent(&receive(&mut machine, Message::Welcome(none))), 0, "no credit");
    let credit = |log_credit| Message::Ack(Ack { id: TransferId::NONE, log_credit, cp_taken: 0 });
    assert_eq!(sent(&receive(&mut machine, credit(2 * BYTES))), 2);
    assert_eq!(sent(&receive(&mut machine, credit(2 * BYTES))), 0, "two are under way");
    assert_eq!(sent(&receive(&mut machine, ack(line[0].header.id))), 1);
    // The hub has the first durably, the others were lost with the connection.
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let actions = receive(&mut machine, Message::Welcome(welcome(line[0].place)));
    assert_eq!(sent(&actions), 2, "{actions:?}");
    // A credit smaller than a transfer still lets one go at a time: else nothing ever would.
    let mut machine = greeting(&line, 3);
    let tiny = Welcome { log_credit: 1, ..welcome(Place::default()) };
    assert_eq!(sent(&receive(&mut machine, Message::Welcome(tiny))), 1);
}

#[test]
fn cp_done_releases_once_and_only_what_is_safe_on_both_ends() {
    let line = line(2);
    let last = line[1].place;
    // Not acknowledged.
    assert_eq!(reaction(&receive(&mut announced(&line), done(1))), Close);
    // Another CP.
    let mut machine = announced(&line);
    receive(&mut machine, ack(last.transfer));
    assert_eq!(reaction(&receive(&mut machine.clone(), done(2))), Close);
    // Right, then twice.
    assert_eq!(receive(&mut machine, done(1)), [Action::Done { cp: CpNumber(1), alone: false }]);
    assert_eq!(reaction(&receive(&mut machine, done(1))), Close);
    // Not committed here.
    let mut machine = streaming(&line);
    receive(&mut machine, ack(last.transfer));
    machine.step(Event::Frozen { cp: CpNumber(1), place: last });
    assert_eq!(reaction(&receive(&mut machine, done(1))), Close);
    // Kept through all of that: it is announced again.
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let actions = receive(&mut machine, Message::Welcome(welcome(last)));
    let data = Action::SendData { cp: CpNumber(1), inline: false };
    assert!(actions.contains(&data), "{actions:?}");
}

/// R19: once more by reference, once all inline, then compared with a newer CP; refused as well, it
/// waits for one that is newer still, and says why.
#[test]
fn refusals_are_counted_to_three() {
    let line = line(1);
    let mut machine = announced(&line);
    for inline in [false, true] {
        let actions = receive(&mut machine, rejected(1, false));
        assert!(actions.contains(&Action::SendData { cp: CpNumber(1), inline }), "{actions:?}");
        machine.step(Event::DataSent { cp: CpNumber(1), bytes: 7 });
    }
    let actions = receive(&mut machine, rejected(1, false));
    assert!(actions.iter().any(|action| matches!(action, Action::MarkApart(_))), "{actions:?}");
    let actions = machine.step(Event::Apart);
    assert!(actions.contains(&Action::Freeze), "a newer CP is wanted: {actions:?}");
    let offered = |actions: &[Action]| {
        let compare = |action: &Action| match action {
            Action::Send(Message::Compare(compare)) => Some(compare.cp),
            _ => None,
        };
        actions.iter().find_map(compare)
    };
    let place = line[0].place;
    for cp in [2, 3] {
        machine.step(Event::Frozen { cp: CpNumber(cp), place });
        let actions = machine.step(Event::Committed { cp: CpNumber(cp), roots: Vec::new() });
        assert_eq!(offered(&actions), Some(CpNumber(cp)), "{actions:?}");
        let actions = receive(&mut machine, rejected(cp, false));
        let said = |action: &Action| match action {
            Action::Faulted { reason, .. } => reason.contains("also by comparison: differs"),
            _ => false,
        };
        assert!(actions.iter().any(said), "{actions:?}");
        assert!(!actions.contains(&Action::Freeze) && offered(&actions).is_none(), "{actions:?}");
        assert_eq!(offered(&machine.step(Event::Retry)), None, "nothing is tried by itself");
    }
}

#[test]
fn no_space_waits_for_a_retry_or_a_new_connection() {
    let line = line(1);
    let mut machine = announced(&line);
    let data = Action::SendData { cp: CpNumber(1), inline: false };
    let actions = receive(&mut machine, rejected(1, true));
    assert!(matches!(actions[..], [Action::Rejected { no_space: true, .. }]), "{actions:?}");
    assert_eq!(reaction(&receive(&mut machine.clone(), rejected(1, true))), Close, "unasked");
    for _ in 0..10 {
        assert!(machine.step(Event::Retry).contains(&data));
        assert_eq!(reaction(&receive(&mut machine, rejected(1, true))), Act);
    }
    machine.step(Event::Disconnected);
    assert_eq!(machine.step(Event::Retry), []);
    machine.step(Event::Connected);
    let actions = receive(&mut machine, Message::Welcome(welcome(Place::default())));
    assert!(actions.contains(&data), "{actions:?}");
    assert_eq!(machine.step(Event::Retry), [], "nothing is parked");
}

/// A foreign, rolled-back or impossible hub: each Welcome with its own refusal.
#[test]
fn a_welcome_from_elsewhere_halts_with_its_reason() {
    let line = line(3);
    let last = line[2].place;
    let good = welcome(line[1].place);
    let off = |place: Place| Place { hash: StreamHash([9; 16]), ..place };
    let far = Place { sequence: SequenceNumber(9), ..off(last) };
    let cases: Vec<(Welcome, RefusedCode)> = vec![
        (Welcome { version: 0, ..good.clone() }, RefusedCode::Version),
        (Welcome { version: 99, ..good.clone() }, RefusedCode::Version),
        (Welcome { hub: HubId([7; 16]), ..good.clone() }, RefusedCode::OtherHub),
        (Welcome { epoch: Epoch { number: 2, id: 9 }, ..good.clone() }, RefusedCode::Diverged),
        (Welcome { epoch: Epoch { number: 1, id: 9 }, ..good.clone() }, RefusedCode::Diverged),
        (Welcome { epoch: Epoch { number: 0, id: 0 }, ..good.clone() }, RefusedCode::Diverged),
        (Welcome { cp_max: CpNumber(u32::MAX), ..good.clone() }, RefusedCode::Protocol),
        (Welcome { cp_max: CP_NUMBER_MAX.next(), ..good.clone() }, RefusedCode::Protocol),
        // Ahead of the source's own commit.
        (Welcome { applied_cp: CpNumber(1), ..good.clone() }, RefusedCode::Diverged),
        // A log off this line.
        (Welcome { last: off(line[1].place).into(), ..good.clone() }, RefusedCode::Diverged),
        // An image off this line.
        (Welcome { applied: off(line[0].place).into(), ..good.clone() }, RefusedCode::Diverged),
        (Welcome { applied: far.into(), ..good.clone() }, RefusedCode::Diverged),
    ];
    for (bad, code) in cases {
        let actions = receive(&mut greeting(&line, 3), Message::Welcome(bad.clone()));
        let [Action::Halt(refused)] = &actions[..] else { panic!("{bad:?} gives {actions:?}") };
        assert_eq!(refused.code, code, "{bad:?}: {}", refused.reason);
        assert!(!refused.next_step.is_empty());
    }
    // A running source never sent what this hub says it has.
    let mut machine = streaming(&line);
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let actions = receive(&mut machine, Message::Welcome(welcome(far)));
    assert_eq!(reaction(&actions), Halt, "{actions:?}");
}

#[test]
fn a_hub_rolled_back_behind_what_was_released_is_a_gap() {
    let line = line(3);
    let mut machine = announced(&line[..2]);
    receive(&mut machine, ack(line[1].header.id));
    assert_eq!(receive(&mut machine, done(1)), [Action::Done { cp: CpNumber(1), alone: false }]);
    machine.step(Event::Formed(held(&line[2])));
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let code = |welcome: Welcome| {
        let actions = receive(&mut machine.clone(), Message::Welcome(welcome));
        let [Action::Halt(refused)] = &actions[..] else { panic!("{actions:?}") };
        refused.code
    };
    assert_eq!(code(welcome(line[0].place)), RefusedCode::Gap, "the log is too short");
    assert_eq!(code(welcome(line[1].place)), RefusedCode::Gap, "the image is too old");
    let applied = line[1].place.into();
    let restored = Welcome { applied_cp: CpNumber(1), applied, ..welcome(line[1].place) };
    let actions = receive(&mut machine, Message::Welcome(restored));
    assert_eq!(reaction(&actions), Act, "{actions:?}");
}

#[test]
fn the_first_hub_is_believed_and_no_other_afterwards() {
    let (generation, epoch) = (generation(1), Epoch::default());
    let identity = Identity { hub: None, generation, epoch, ..identity(OnHubLoss::Stop) };
    let mut machine = Primary::new(identity, Place::default(), [], Own::default());
    machine.step(Event::Connected);
    let actions = receive(&mut machine, Message::Welcome(welcome(Place::default())));
    assert_eq!(actions[0], Action::Joined { hub: hub_id(), epoch: EPOCH });
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let other = Welcome { hub: HubId([7; 16]), ..welcome(Place::default()) };
    assert_eq!(reaction(&receive(&mut machine, Message::Welcome(other))), Halt);
}

#[test]
fn a_refill_that_does_not_join_is_not_taken() {
    let line = line(3);
    let begin = || {
        let mut machine = greeting(&line, 1);
        let actions = receive(&mut machine, Message::Welcome(welcome(line[2].place)));
        let want = WantLog { from: line[0].place.into() };
        assert!(actions.contains(&Action::Send(Message::WantLog(want))), "{actions:?}");
        assert!(!actions.contains(&Action::Serve));
        machine
    };
    let mut machine = begin();
    assert_eq!(reaction(&machine.step(refilled(&line[2]))), Close, "a gap");
    let mut machine = begin();
    assert_eq!(machine.step(refilled(&line[1])), [Action::Adopt]);
    assert_eq!(reaction(&machine.step(refilled(&line[1]))), Close, "a repeat");
    let forged = |change: fn(&mut Arrived)| {
        let mut arrived = line[1];
        change(&mut arrived);
        reaction(&begin().step(refilled(&arrived)))
    };
    assert_eq!(forged(|_| {}), Act);
    assert_eq!(forged(|arrived| arrived.header.hash_before = StreamHash([9; 16])), Close);
    assert_eq!(forged(|arrived| arrived.header.previous = TransferId::NONE), Close);
    assert_eq!(forged(|arrived| arrived.place.transfer = TransferId::NONE), Close, "falling id");
    assert_eq!(forged(|arrived| arrived.place.sequence = SequenceNumber(1)), Close);
    assert_eq!(forged(|arrived| arrived.place.sequence = SequenceNumber(99)), Close, "too far");
}

/// Else the source would serve without its acknowledged tail (R1).
#[test]
fn a_refill_ends_where_welcome_said_or_not_at_all() {
    let line = line(3);
    let end = |machine: &mut Primary, at: &Arrived| {
        receive(machine, Message::RefillEnd(RefillEnd { last: at.place.into() }))
    };
    let begin = |delivered: usize| {
        let mut machine = greeting(&line, 1);
        receive(&mut machine, Message::Welcome(welcome(line[2].place)));
        for arrived in &line[1..1 + delivered] {
            machine.step(refilled(arrived));
        }
        machine
    };
    assert_eq!(reaction(&end(&mut begin(0), &line[0])), Close);
    assert_eq!(reaction(&end(&mut begin(1), &line[1])), Close);
    assert_eq!(reaction(&end(&mut begin(1), &line[2])), Close);
    assert_eq!(reaction(&end(&mut begin(2), &line[1])), Close);
    let actions = end(&mut begin(2), &line[2]);
    assert!(actions.contains(&Action::HubDurable(line[2].place)), "{actions:?}");
    assert!(actions.contains(&Action::Serve), "{actions:?}");
    // Broken in the middle: what was adopted stays, the rest is asked for from there.
    let mut machine = begin(1);
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let actions = receive(&mut machine, Message::Welcome(welcome(line[2].place)));
    let want = WantLog { from: line[1].place.into() };
    assert!(actions.contains(&Action::Send(Message::WantLog(want))), "{actions:?}");
}

/// The source lost its tail after the hub had published its frozen CP: it is done before the
/// refill, not sent again.
#[test]
fn a_refill_settles_a_cp_that_is_published() {
    let line = line(3);
    let (cp, place) = (CpNumber(1), line[1].place);
    let mut machine = source(&line, 2);
    machine.step(Event::Frozen { cp, place });
    machine.step(Event::Committed { cp, roots: vec![] });
    machine.step(Event::Connected);
    let there = Welcome { applied_cp: cp, applied: place.into(), ..welcome(line[2].place) };
    let actions = receive(&mut machine, Message::Welcome(there));
    let done = actions.iter().position(|action| *action == Action::Done { cp, alone: false });
    let want = Action::Send(Message::WantLog(WantLog { from: place.into() }));
    let want = actions.iter().position(|action| *action == want);
    assert!(done.is_some() && done < want, "{actions:?}");
    assert_eq!(machine.step(refilled(&line[2])), [Action::Adopt]);
    let actions =
        receive(&mut machine, Message::RefillEnd(RefillEnd { last: line[2].place.into() }));
    assert!(actions.contains(&Action::Serve), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, Action::SendData { .. })));
}

/// The hub published while the connection was down: Welcome says so, nothing is sent again.
#[test]
fn welcome_settles_a_cp_that_is_published() {
    let line = line(2);
    let mut machine = announced(&line);
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let (cp, place) = (CpNumber(1), line[1].place);
    let there = Welcome { applied_cp: cp, applied: place.into(), ..welcome(place) };
    let actions = receive(&mut machine, Message::Welcome(there));
    assert!(actions.contains(&Action::Done { cp, alone: false }), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, Action::SendData { .. })));
}

/// The NVRAM is gone, the pool has CP 1: the hub's log still holds its entries, its image does not.
#[test]
fn a_source_without_nvram_sends_its_own_cp() {
    let line = line(3);
    let (cp, place) = (CpNumber(1), line[1].place);
    let own = Own { cp, ..Own::default() };
    let mut machine = Primary::new(identity(OnHubLoss::Stop), place, [], own);
    machine.step(Event::Frozen { cp, place });
    machine.step(Event::Committed { cp, roots: vec![] });
    machine.step(Event::Connected);
    receive(&mut machine, Message::Welcome(welcome(line[2].place)));
    assert_eq!(machine.step(refilled(&line[2])), [Action::Adopt]);
    let end = Message::RefillEnd(RefillEnd { last: line[2].place.into() });
    let actions = receive(&mut machine, end);
    assert!(actions.contains(&Action::SendData { cp, inline: false }), "{actions:?}");
    assert!(actions.contains(&Action::Serve), "{actions:?}");
}

/// R7: a hub that was rolled back but still joins is filled again, and the shell sees the step.
#[test]
fn a_hub_that_forgot_what_it_acknowledged_is_sent_it_again() {
    let line = line(3);
    let mut machine = streaming(&line);
    let actions = receive(&mut machine, ack(line[2].header.id));
    assert!(actions.contains(&Action::HubDurable(line[2].place)), "{actions:?}");
    machine.step(Event::Disconnected);
    machine.step(Event::Connected);
    let actions = receive(&mut machine, Message::Welcome(welcome(line[0].place)));
    assert!(actions.contains(&Action::HubDurable(line[0].place)), "{actions:?}");
    for arrived in &line[1..] {
        assert!(actions.contains(&Action::SendTransfer(arrived.header.id)), "{actions:?}");
    }
}

#[test]
fn an_image_of_the_same_cp_elsewhere_is_not_taken_for_done() {
    let line = line(3);
    let (cp, place) = (CpNumber(1), line[1].place);
    let mut machine = source(&line, 3);
    machine.step(Event::Frozen { cp, place });
    machine.step(Event::Committed { cp, roots: vec![] });
    machine.step(Event::Connected);
    let applied = line[0].place.into();
    let other = Welcome { applied_cp: cp, applied, ..welcome(line[2].place) };
    assert_eq!(reaction(&receive(&mut machine, Message::Welcome(other))), Halt);
}

/// R6: also a source that may not talk to its hub never uses a CP number twice.
#[test]
fn a_halted_source_goes_on_counting() {
    let line = line(2);
    let mut machine = streaming(&line[..1]);
    receive(&mut machine, refusal(RefusedCode::Generation));
    machine.step(Event::Formed(held(&line[1])));
    machine.step(Event::Frozen { cp: CpNumber(1), place: line[1].place });
    machine.step(Event::Committed { cp: CpNumber(1), roots: vec![] });
    assert_eq!(machine.cp_max(), CpNumber(1));
    assert_eq!(machine.last(), line[1].place);
}

#[test]
fn hello_never_claims_more_than_is_durable_here() {
    let line = line(3);
    let mut machine = source(&line, 1);
    let own_durable = |machine: &mut Primary| {
        let actions = machine.step(Event::Connected);
        machine.step(Event::Disconnected);
        match &actions[..] {
            [Action::Send(Message::Hello(hello))] => (hello.own_durable, hello.last.0),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(own_durable(&mut machine), (line[0].header.id, line[0].header.id));
    machine.step(Event::Formed(held(&line[1])));
    machine.step(Event::Formed(held(&line[2])));
    assert_eq!(own_durable(&mut machine), (line[0].header.id, line[2].header.id));
    machine.step(Event::OwnDurable(line[1].header.id));
    assert_eq!(own_durable(&mut machine), (line[1].header.id, line[2].header.id));
}

#[test]
fn cp_end_leaves_behind_data_commit_and_transfers() {
    let line = line(2);
    let (cp, place) = (CpNumber(1), line[1].place);
    let ends = |actions: &[Action]| {
        actions.iter().any(|action| matches!(action, Action::Send(Message::CpEnd(_))))
    };
    let full = Action::Send(Message::PartitionFull(PartitionFull {
        cp,
        last: place.into(),
        base: None,
        replay: false,
        keeps_log: false,
    }));
    // The second transfer waits for credit, and PartitionFull with it.
    let mut machine = greeting(&line, 2);
    machine.step(Event::Frozen { cp, place });
    let little = Welcome { log_credit: BYTES, ..welcome(Place::default()) };
    let actions = receive(&mut machine, Message::Welcome(little));
    assert!(!actions.contains(&full), "{actions:?}");
    let actions = receive(&mut machine, ack(line[0].header.id));
    let sent = actions.iter().position(|action| matches!(action, Action::SendTransfer(_)));
    let announced = actions.iter().position(|action| *action == full);
    assert!(sent.is_some() && sent < announced, "{actions:?}");
    // Data before commit, and commit before data.
    let mut other = machine.clone();
    assert!(!ends(&machine.step(Event::DataSent { cp, bytes: 5 })));
    assert!(ends(&machine.step(Event::Committed { cp, roots: vec![] })));
    assert!(!ends(&other.step(Event::Committed { cp, roots: vec![] })));
    assert!(!ends(&other.step(Event::DataSent { cp: CpNumber(2), bytes: 5 })), "another CP");
    assert!(ends(&other.step(Event::DataSent { cp, bytes: 5 })));
    assert!(!ends(&other.step(Event::DataSent { cp, bytes: 5 })), "twice");
}

/// R12: fenced, or told that another is this source, it never begins to serve alone; halted for
/// another reason it goes on only if it did serve.
#[test]
fn a_source_that_may_be_replaced_does_not_go_on_alone() {
    let line = line(2);
    let alone = |code: RefusedCode, serving: bool| {
        let mut machine = source_that(&line, 2, OnHubLoss::Continue);
        machine.step(Event::Connected);
        if serving {
            receive(&mut machine, Message::Welcome(welcome(line[1].place)));
        }
        let said = Refused { code, reason: String::new(), next_step: String::new() };
        let actions = receive(&mut machine, Message::Refused(said));
        assert_eq!(reaction(&actions), Halt, "{code:?}");
        machine.step(Event::Disconnected);
        let mut actions = machine.step(Event::HubLost);
        actions.extend(machine.step(Event::Apart));
        (actions.contains(&Action::Answer(Answering::Alone)), actions.contains(&Action::Serve))
    };
    for code in [RefusedCode::Fenced, RefusedCode::Generation, RefusedCode::OtherSource] {
        assert_eq!(alone(code, true), (false, false), "{code:?}");
        assert_eq!(alone(code, false), (false, false), "{code:?}");
    }
    assert_eq!(alone(RefusedCode::Diverged, false), (false, false));
    assert_eq!(alone(RefusedCode::Diverged, true), (true, false), "it serves already");
}

/// R12, invariant 12: a fence is the word of this source's hub. Another's halts the session and
/// leaves no fence; one that does not say who it is, of an older version, counts as before.
#[test]
fn a_foreign_hub_fences_nobody() {
    let line = line(2);
    let fence = |hub| {
        let mut machine = streaming(&line);
        let epoch = Epoch { number: 9, id: 9 };
        let actions = receive(&mut machine, Message::Fenced(Fenced { epoch, hub }));
        assert_eq!(reaction(&actions), Halt, "{hub:?}");
        actions.contains(&Action::Fence(epoch))
    };
    assert!(!fence(Some(HubId([7; 16]))));
    assert!(fence(Some(hub_id())));
    assert!(fence(None));
}
