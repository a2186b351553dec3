//! Transfers behind a pass (R4): what either end says of them is held to what it may be, and an end of
//! the version before neither sends nor takes any. The searches have every short history.

use super::super::mirror::{self, Arrived, Mirror, Outcome};
use super::super::primary::{self, Own, Past, Primary};
use super::absurd_mirror::{applied, end, joined_by, published, receive, settle, stage, updates};
use super::absurd_primary::{held, identity, line, welcome};
use super::world::{root_of, transfer};
use crate::limits::BEHIND_CPS_MAX;
use crate::record::marks::Place;
use crate::units::numbers::{CpNumber, TransferId, VolumeNumber};
use crate::units::policy::{Mode, OnHubLoss};
use crate::wire::message::{
    Ack, BEHIND_VERSION, Behind, BehindState, CpDone, CpRejected, Message, PartitionFull, Welcome,
};

fn pass(cp: u32, last: Place) -> Message {
    let (cp, last, base) = (CpNumber(cp), last.into(), Some(CpNumber(0)));
    Message::PartitionFull(PartitionFull { cp, last, base, replay: false, keeps_log: false })
}

fn word(state: BehindState) -> Message {
    Message::Behind(Behind { cp: CpNumber(1), state })
}

/// The `counter`-th transfer, of CP `cp`, behind `last`.
fn behind(last: Place, counter: u64, cp: u32) -> Arrived {
    transfer(last, TransferId { generation: 1, counter }, CpNumber(cp), counter)
}

/// A hub that holds a line of two, in a pass to CP 1 that ends on another line; where that ends.
fn passing(version: u16) -> (Mirror, Place) {
    let mut machine = joined_by(version);
    let old = line(2);
    stage(&mut machine, &old);
    settle(&mut machine, old[1].place);
    let cut = transfer(Place::default(), TransferId { generation: 1, counter: 5 }, CpNumber(1), 9);
    let actions = receive(&mut machine, pass(1, cut.place));
    assert!(matches!(actions[..], [mirror::Action::Apply { .. }]), "{actions:?}");
    (machine, cut.place)
}

fn takes(machine: &mut Mirror, arrived: Arrived) -> Vec<mirror::Action> {
    machine.step(mirror::Event::Transfer(arrived))
}

fn is_closed(actions: &[mirror::Action]) -> bool {
    matches!(actions[..], [mirror::Action::Close { .. }])
}

fn said(actions: &[mirror::Action]) -> Vec<BehindState> {
    let state = |action: &mirror::Action| match action {
        mirror::Action::Send(Message::Behind(behind)) => Some(behind.state),
        _ => None,
    };
    actions.iter().filter_map(state).collect()
}

/// Publishes the pass, with the log set to `log`, and held up to `held`.
fn publish_with(
    machine: &mut Mirror,
    cut: Place,
    (log, held): (Place, Place),
) -> Vec<mirror::Action> {
    updates(machine, 1, 10);
    receive(machine, end(1, cut, 10));
    machine.step(mirror::Event::LogSet(log, held));
    applied(machine, 1, published(cut))
}

fn publish(machine: &mut Mirror, cut: Place, log: Place) -> Vec<mirror::Action> {
    publish_with(machine, cut, (log, log))
}

/// It is put aside, not acknowledged, and no more of it is shown than that more may be sent.
#[test]
fn what_comes_behind_a_pass_is_the_log_when_that_is_published() {
    let (mut machine, cut) = passing(BEHIND_VERSION);
    let before = machine.ladder();
    let first = behind(cut, 6, 2);
    let second = behind(first.place, 7, 3);
    for arrived in [first, second] {
        assert_eq!(takes(&mut machine, arrived), [mirror::Action::StageBehind]);
        assert_eq!(takes(&mut machine, arrived), [], "a repeat");
    }
    assert_eq!(machine.ladder(), before, "it is none of the log");
    let written = mirror::Event::BehindWritten(first.place, 10);
    assert_eq!(said(&machine.step(written)), [], "little, and not all of it");
    let written = mirror::Event::BehindWritten(second.place, 10);
    assert_eq!(said(&machine.step(written)), [BehindState::Taken(second.place.transfer)]);
    let third = behind(second.place, 8, 3);
    assert_eq!(takes(&mut machine, third), [mirror::Action::StageBehind]);
    let actions = publish_with(&mut machine, cut, (second.place, third.place));
    assert_eq!(said(&actions), [BehindState::Taken(second.place.transfer), BehindState::Joins]);
    // What was not in the log by then is staged by the shell, and is durable when it is.
    assert_eq!(machine.ladder(), [third.place, second.place, second.place]);
    assert_eq!(machine.labels(), [CpNumber(2), CpNumber(3)]);
    settle(&mut machine, third.place);
    let next = behind(third.place, 9, 4);
    assert_eq!(takes(&mut machine, next), [mirror::Action::Stage]);
}

#[test]
fn what_does_not_follow_the_pass_is_not_taken() {
    let (good, cut) = passing(BEHIND_VERSION);
    let first = behind(cut, 6, 2);
    let mut other = first;
    other.place.hash = Place::default().hash;
    let bad = [
        ("of the line that has ended", behind(good.ladder()[0], 6, 2)),
        ("with a gap", behind(first.place, 8, 2)),
        ("of the pass's own CP", behind(cut, 6, 1)),
        ("of a CP that cannot be", behind(cut, 6, u32::MAX)),
        (
            "of a boot to come",
            transfer(cut, TransferId { generation: 9, counter: 1 }, CpNumber(2), 6),
        ),
    ];
    for (what, arrived) in bad {
        let mut machine = good.clone();
        assert!(is_closed(&takes(&mut machine, arrived)), "{what}");
    }
    let mut machine = good.clone();
    takes(&mut machine, first);
    assert!(is_closed(&takes(&mut machine, other)), "one id with two contents");
    let mut machine = good;
    takes(&mut machine, behind(cut, 6, 3));
    let older = behind(behind(cut, 6, 3).place, 7, 2);
    assert!(is_closed(&takes(&mut machine, older)), "of an older CP");
}

/// A hub that can hold no more says so once, passes over what was on its way, and goes on when
/// the source has heard.
#[test]
fn what_is_given_up_is_passed_over_until_the_source_has_heard() {
    let (mut machine, cut) = passing(BEHIND_VERSION);
    let first = behind(cut, 6, 2);
    takes(&mut machine, first);
    let actions = machine.step(mirror::Event::BehindOver);
    assert!(actions.contains(&mirror::Action::DropBehind), "{actions:?}");
    assert_eq!(said(&actions), [BehindState::Over]);
    assert_eq!(machine.step(mirror::Event::BehindOver), [], "once");
    let late = behind(first.place, 7, 2);
    assert_eq!(takes(&mut machine, late), []);
    let actions = publish(&mut machine, cut, cut);
    assert_eq!((said(&actions), machine.ladder()), (vec![], [cut; 3]));
    assert_eq!(machine.labels(), [], "nothing of it is held");
    assert_eq!(takes(&mut machine, behind(late.place, 8, 2)), [], "still on its way");
    assert_eq!(receive(&mut machine, word(BehindState::Over)), []);
    assert_eq!(takes(&mut machine, first), [mirror::Action::Stage], "sent again, behind the pass");
    // A refused pass takes with it what was behind it; the next word of one ends that.
    let (mut machine, cut) = passing(BEHIND_VERSION);
    takes(&mut machine, first);
    updates(&mut machine, 1, 10);
    receive(&mut machine, end(1, cut, 10));
    applied(&mut machine, 1, Outcome::Rejected { differs: None, reason: "no".into() });
    assert_eq!(takes(&mut machine, late), []);
    receive(&mut machine, pass(1, cut));
    assert_eq!(takes(&mut machine, first), [mirror::Action::StageBehind]);
    // The source gives it up.
    let actions = receive(&mut machine, word(BehindState::Over));
    assert_eq!(actions, [mirror::Action::DropBehind]);
}

#[test]
fn no_more_cps_are_taken_behind_a_pass_than_there_are_files() {
    let (mut machine, mut last) = passing(BEHIND_VERSION);
    let max = u32::try_from(BEHIND_CPS_MAX).unwrap() + 2;
    for number in 1..=max {
        let next = behind(last, u64::from(number) + 5, number + 1);
        assert_eq!(takes(&mut machine, next), [mirror::Action::StageBehind]);
        last = next.place;
    }
    let actions = takes(&mut machine, behind(last, u64::from(max) + 6, max + 2));
    assert_eq!(said(&actions), [BehindState::Over]);
}

/// Its log would end before what the source sends next, whether it was told that it is there or not.
#[test]
fn what_was_lost_behind_a_pass_ends_the_connection() {
    for told in [true, false] {
        let (mut machine, cut) = passing(BEHIND_VERSION);
        let first = behind(cut, 6, 2);
        takes(&mut machine, first);
        takes(&mut machine, behind(first.place, 7, 2));
        if told {
            machine.step(mirror::Event::BehindWritten(first.place, 10));
        }
        let actions = publish(&mut machine, cut, first.place);
        assert!(matches!(actions.last(), Some(mirror::Action::Close { .. })), "{actions:?}");
        assert_eq!(machine.ladder(), [first.place; 3], "what is there is there");
        assert_eq!(machine.labels(), [CpNumber(2)]);
    }
}

/// The shell had adopted it when an end gave it up, or its connection went: it is the log all the same.
#[test]
fn what_was_adopted_is_the_log_whoever_gave_it_up() {
    let (good, cut) = passing(BEHIND_VERSION);
    let first = behind(cut, 6, 2);
    let gave_up = |how: usize| {
        let mut machine = good.clone();
        takes(&mut machine, first);
        updates(&mut machine, 1, 10);
        if how != 3 {
            receive(&mut machine, end(1, cut, 10));
        }
        match how {
            0 => drop(receive(&mut machine, word(BehindState::Over))),
            1 => drop(machine.step(mirror::Event::BehindOver)),
            // All of it is there: it is finished without its source; or not, and it was finishing all the same.
            _ => drop(machine.step(mirror::Event::Disconnected)),
        }
        machine.step(mirror::Event::LogSet(first.place, first.place));
        let actions = applied(&mut machine, 1, published(cut));
        assert_eq!(said(&actions), [], "{how}");
        assert_eq!((machine.ladder(), machine.labels()), ([first.place; 3], vec![CpNumber(2)]));
        machine
    };
    for how in 0..4 {
        let mut machine = gave_up(how);
        if how == 0 {
            let actions = takes(&mut machine, first);
            assert!(!is_closed(&actions), "a repeat: {actions:?}");
            let next = behind(first.place, 7, 2);
            assert_eq!(takes(&mut machine, next), [mirror::Action::Stage]);
        }
    }
}

/// A source that sends CPs only sends nothing behind any of them.
#[test]
fn a_source_that_forwards_nothing_is_taken_nothing_of() {
    let (mut machine, cut) = passing(BEHIND_VERSION);
    assert!(machine.is_behind());
    let mut only = super::absurd_mirror::hello(2);
    (only.version, only.policy.mode) = (BEHIND_VERSION, Mode::CpOnly);
    machine.step(mirror::Event::Hello(only));
    applied(&mut machine, 1, Outcome::Aborted);
    machine.step(mirror::Event::Recorded);
    receive(&mut machine, pass(1, cut));
    assert!(!machine.is_behind());
}

#[test]
fn a_hub_takes_no_word_that_is_its_own_to_say() {
    for state in [BehindState::Joins, BehindState::Taken(TransferId::NONE)] {
        let (mut machine, _) = passing(BEHIND_VERSION);
        assert!(is_closed(&receive(&mut machine, word(state))), "{state:?}");
    }
}

#[test]
fn an_older_source_sends_nothing_behind_a_pass() {
    let (mut machine, cut) = passing(BEHIND_VERSION - 1);
    assert!(!machine.is_behind());
    assert!(is_closed(&takes(&mut machine, behind(cut, 6, 2))));
    let (mut machine, cut) = passing(BEHIND_VERSION - 1);
    assert_eq!(
        said(&publish(&mut machine, cut, cut)),
        [],
        "it is told nothing that it does not know"
    );
}

/// A source whose first transfer is in its CP 1, and gone; in a pass to that, with a hub of that version.
/// What it sent.
fn brings_up(version: u16) -> (Primary, Vec<Arrived>, Vec<primary::Action>) {
    let line = line(3);
    let place = line[0].place;
    let roots = vec![(VolumeNumber(0), root_of(place))];
    let own = Own { cp: CpNumber(1), roots, outgrown: false };
    let identity = identity(OnHubLoss::Continue);
    let mut machine = Primary::new(identity, place, line[1..].iter().map(held), own);
    machine.step(primary::Event::Connected);
    let welcome = Welcome { version, ..welcome(Place::default()) };
    let mut actions = machine.step(primary::Event::Welcomed { welcome, past: Past::Known });
    actions.extend(machine.step(primary::Event::Apart));
    assert_eq!(machine.pass(), Some((CpNumber(1), CpNumber(0))));
    (machine, line, actions)
}

fn sent(actions: &[primary::Action]) -> Vec<TransferId> {
    let id = |action: &primary::Action| match action {
        primary::Action::SendTransfer(id) => Some(*id),
        _ => None,
    };
    actions.iter().filter_map(id).collect()
}

fn hears(machine: &mut Primary, message: Message) -> Vec<primary::Action> {
    machine.step(primary::Event::Received(message))
}

fn ends(machine: &mut Primary) -> Vec<primary::Action> {
    machine.step(primary::Event::DataSent { cp: CpNumber(1), bytes: 0 });
    hears(machine, Message::CpDone(CpDone { cp: CpNumber(1) }))
}

fn has_closed(actions: &[primary::Action]) -> bool {
    actions.iter().any(|action| matches!(action, primary::Action::Close { .. }))
}

#[test]
fn a_source_sends_its_log_behind_the_pass_and_answers_nobody_for_it() {
    let (mut machine, line, actions) = brings_up(BEHIND_VERSION);
    let ids: Vec<TransferId> = line[1..].iter().map(|arrived| arrived.place.transfer).collect();
    assert_eq!(sent(&actions), ids);
    let (log_credit, cp_taken) = (1000, 0);
    let id = ids[1];
    for message in [
        Message::Ack(Ack { id, log_credit, cp_taken }),
        word(BehindState::Taken(ids[0])),
        word(BehindState::Taken(ids[1])),
    ] {
        let actions = hears(&mut machine, message);
        let durable = |action: &primary::Action| matches!(action, primary::Action::HubDurable(_));
        assert!(!actions.iter().any(durable) && !has_closed(&actions), "{actions:?}");
    }
    hears(&mut machine, word(BehindState::Joins));
    let actions = ends(&mut machine);
    assert!(actions.contains(&primary::Action::HubDurable(line[2].place)), "{actions:?}");
    assert_eq!(sent(&actions), [], "nothing is sent twice");
}

/// The newest Ack may be sent before what was said earlier, and is not said twice.
#[test]
fn an_ack_that_overtakes_the_word_that_the_log_joins_counts() {
    let (mut machine, line, _) = brings_up(BEHIND_VERSION);
    let (id, log_credit, cp_taken) = (line[2].place.transfer, 1000, 0);
    hears(&mut machine, Message::Ack(Ack { id, log_credit, cp_taken }));
    hears(&mut machine, word(BehindState::Joins));
    let actions = ends(&mut machine);
    assert!(actions.contains(&primary::Action::HubDurable(line[2].place)), "{actions:?}");
    assert!(!machine.is_sending(), "nothing is owed");
}

/// What the hub has dropped is sent behind the pass; the hub is told once that it was heard.
#[test]
fn a_log_that_the_hub_has_dropped_is_sent_again() {
    let (mut machine, line, _) = brings_up(BEHIND_VERSION);
    assert!(!machine.is_sending(), "nothing is owed for it");
    let actions = hears(&mut machine, word(BehindState::Over));
    assert_eq!(actions, [primary::Action::Unsend, primary::Action::Send(word(BehindState::Over))]);
    assert_eq!(hears(&mut machine, word(BehindState::Over)), []);
    let taken = word(BehindState::Taken(line[1].place.transfer));
    assert_eq!(hears(&mut machine, taken), [], "said before");
    let actions = ends(&mut machine);
    let ids = line[1..].iter().map(|arrived| arrived.place.transfer);
    assert_eq!(sent(&actions), ids.collect::<Vec<_>>());
    // A refusal drops it as well, and the next attempt sends it anew.
    let (mut machine, line, _) = brings_up(BEHIND_VERSION);
    machine.step(primary::Event::DataSent { cp: CpNumber(1), bytes: 0 });
    let (cp, differs, reason, no_space) = (CpNumber(1), None, "no".to_owned(), false);
    let no = Message::CpRejected(CpRejected { cp, differs, reason, no_space });
    let actions = hears(&mut machine, no);
    let ids = line[1..].iter().map(|arrived| arrived.place.transfer);
    assert_eq!(sent(&actions), ids.collect::<Vec<_>>());
}

/// A pass that waits for room at the hub has nothing behind it: partitions that are full go as if the source were
/// alone, and it is made anew from the newest own CP.
#[test]
fn a_pass_that_waits_for_room_has_no_log_behind_it() {
    let (mut machine, line, _) = brings_up(BEHIND_VERSION);
    hears(&mut machine, word(BehindState::Taken(line[1].place.transfer)));
    machine.step(primary::Event::DataSent { cp: CpNumber(1), bytes: 0 });
    let (cp, differs, reason, no_space) = (CpNumber(1), None, "full".to_owned(), true);
    hears(&mut machine, Message::CpRejected(CpRejected { cp, differs, reason, no_space }));
    let (cp, place) = (CpNumber(2), line[1].place);
    machine.step(primary::Event::Frozen { cp, place });
    let roots = vec![(VolumeNumber(0), root_of(place))];
    machine.step(primary::Event::Committed { cp, roots });
    let actions = machine.step(primary::Event::Pressed(cp));
    assert_eq!(actions, [primary::Action::Done { cp, alone: true }]);
    let actions = machine.step(primary::Event::Retry);
    assert_eq!(machine.pass(), Some((cp, CpNumber(0))));
    assert_eq!(sent(&actions), [line[2].place.transfer]);
}

/// The hub does not know whether anything is sent, and says what becomes of it in any case.
#[test]
fn a_source_that_forwards_nothing_hears_what_it_is_told() {
    let line = line(1);
    let roots = vec![(VolumeNumber(0), root_of(line[0].place))];
    let own = Own { cp: CpNumber(1), roots, outgrown: false };
    let mut only = identity(OnHubLoss::Continue);
    only.policy.mode = Mode::CpOnly;
    let mut machine = Primary::new(only, line[0].place, [], own);
    machine.step(primary::Event::Connected);
    let welcome = Welcome { version: BEHIND_VERSION, ..welcome(Place::default()) };
    machine.step(primary::Event::Welcomed { welcome, past: Past::Known });
    machine.step(primary::Event::Apart);
    let over = [primary::Action::Send(word(BehindState::Over))];
    assert_eq!(hears(&mut machine, word(BehindState::Over)), over);
    assert_eq!(hears(&mut machine, word(BehindState::Joins)), []);
    let actions = ends(&mut machine);
    assert!(actions.contains(&primary::Action::PassEnded { cp: CpNumber(1) }), "{actions:?}");
}

#[test]
fn a_hub_that_says_what_cannot_be_is_left() {
    let never = TransferId { generation: 1, counter: 9 };
    let (mut machine, ..) = brings_up(BEHIND_VERSION);
    assert!(has_closed(&hears(&mut machine, word(BehindState::Taken(never)))), "not sent");
    let (mut machine, ..) = brings_up(BEHIND_VERSION);
    assert!(has_closed(&ends(&mut machine)), "not a word of what became of the log");
    for state in [BehindState::Joins, BehindState::Over] {
        let (mut machine, ..) = brings_up(BEHIND_VERSION - 1);
        assert!(has_closed(&hears(&mut machine, word(state))), "{state:?}: nothing was sent");
    }
}

#[test]
fn an_older_hub_is_sent_nothing_behind_a_pass() {
    let (mut machine, line, actions) = brings_up(BEHIND_VERSION - 1);
    assert_eq!(sent(&actions), []);
    let actions = ends(&mut machine);
    let ids = line[1..].iter().map(|arrived| arrived.place.transfer);
    assert_eq!(sent(&actions), ids.collect::<Vec<_>>());
}

/// CPs that are done alone meanwhile are built from the log, oldest first, and a partition that was not
/// taken there whole ends the log behind the pass.
#[test]
fn a_cp_done_alone_is_built_from_the_log_or_ends_it() {
    let freeze = |machine: &mut Primary, cp: u32, place: Place| {
        let cp = CpNumber(cp);
        machine.step(primary::Event::Frozen { cp, place });
        let roots = vec![(VolumeNumber(0), root_of(place))];
        machine.step(primary::Event::Committed { cp, roots });
        machine.step(primary::Event::Pressed(cp))
    };
    let (mut machine, line, _) = brings_up(BEHIND_VERSION);
    hears(&mut machine, word(BehindState::Taken(line[1].place.transfer)));
    let cp = CpNumber(2);
    let actions = freeze(&mut machine, 2, line[1].place);
    assert_eq!(actions, [primary::Action::Done { cp, alone: true }]);
    hears(&mut machine, word(BehindState::Joins));
    let actions = ends(&mut machine);
    let replays = |action: &primary::Action| match action {
        primary::Action::Send(Message::PartitionFull(full)) => Some((full.cp, full.replay)),
        _ => None,
    };
    assert_eq!(actions.iter().find_map(replays), Some((cp, true)), "{actions:?}");
    let actions = hears(&mut machine, Message::CpDone(CpDone { cp }));
    assert!(actions.contains(&primary::Action::Shown { cp }), "{actions:?}");

    let (mut machine, line, _) = brings_up(BEHIND_VERSION);
    let actions = freeze(&mut machine, 2, line[1].place);
    let over = primary::Action::Send(word(BehindState::Over));
    let unsend = primary::Action::Unsend;
    assert_eq!(actions, [unsend, over, primary::Action::Done { cp, alone: true }], "not taken");
    // Another pass, of that, follows.
    ends(&mut machine);
    assert_eq!(machine.pass(), Some((CpNumber(2), CpNumber(1))));
}
