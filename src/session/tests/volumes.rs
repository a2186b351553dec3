//! A source of which the hub leaves out a volume (R20): what it sends, what it marks, and how the
//! volume comes back.

use super::super::primary::{Action, Event, Held, Identity, Own, Past, Primary};
use super::absurd_primary::{identity, line};
use super::world::hub_id;
use crate::record::marks::Place;
use crate::units::hash::Root;
use crate::units::ids::VolumeId;
use crate::units::numbers::{ByteCount, CpNumber, Epoch, TransferId, VolumeNumber};
use crate::units::policy::OnHubLoss;
use crate::wire::message::{
    Ack, CpDone, CpEnd, Message, Refused, RefusedCode, VolumeOffer, VolumeRefusal, VolumeRoot,
    Welcome,
};

const EPOCH: Epoch = Epoch { number: 1, id: 8 };

fn offers() -> Vec<VolumeOffer> {
    let offer = |number: u8| VolumeOffer {
        number: VolumeNumber(u32::from(number)),
        id: VolumeId([number; 16]),
        name: format!("vol{number}").parse().unwrap(),
        size: ByteCount(1 << 20),
    };
    (0..3).map(offer).collect()
}

fn roots(byte: u8) -> Vec<(VolumeNumber, Root)> {
    offers().iter().map(|offer| (offer.number, Root([byte; 32]))).collect()
}

fn refusal() -> VolumeRefusal {
    VolumeRefusal {
        volume: VolumeNumber(2),
        name: "vol2".parse().unwrap(),
        reason: "another size".to_owned(),
        next_step: "make them agree".to_owned(),
    }
}

/// A source of three volumes that holds two transfers of CP 1.
pub(super) fn source(on_hub_loss: OnHubLoss, alone: bool) -> Primary {
    let alone = alone.then_some((EPOCH, line(1)[0].place.sequence));
    let identity = Identity { volumes: offers(), alone, ..identity(on_hub_loss) };
    let held = line(2).into_iter().map(|arrived| Held { place: arrived.place, bytes: 100 });
    Primary::new(identity, Place::default(), held, Own::default())
}

pub(super) fn welcome(refused: Vec<VolumeRefusal>) -> Welcome {
    Welcome {
        version: 1,
        hub: hub_id(),
        epoch: EPOCH,
        applied_cp: CpNumber(0),
        roots: Vec::new(),
        applied: Place::default().into(),
        last: Place::default().into(),
        cp_max: CpNumber(0),
        log_credit: 1000,
        cp_credit: 1000,
        refused,
        work: false,
        own_durable: TransferId::NONE,
    }
}

fn come(machine: &mut Primary, welcome: Welcome, behind: bool) -> Vec<Action> {
    machine.step(Event::Connected);
    machine.step(Event::VolumesBehind(behind));
    machine.step(Event::Welcomed { welcome, past: Past::Known })
}

fn ack(machine: &mut Primary, id: TransferId) -> Vec<Action> {
    let ack = Ack { id, log_credit: 1000, cp_taken: 0 };
    machine.step(Event::Received(Message::Ack(ack)))
}

fn ends(actions: &[Action]) -> Vec<CpEnd> {
    let end = |action: &Action| match action {
        Action::Send(Message::CpEnd(end)) => Some(end.clone()),
        _ => None,
    };
    actions.iter().filter_map(end).collect()
}

fn at(actions: &[Action], what: impl Fn(&Action) -> bool) -> Option<usize> {
    actions.iter().position(what)
}

fn numbers(roots: &[VolumeRoot]) -> Vec<u32> {
    roots.iter().map(|root| root.volume.0).collect()
}

/// The mark is durable before the hub can acknowledge anything, and stands as long as a volume is
/// left out that is served; CPs are made of the others.
#[test]
fn a_volume_that_is_left_out_is_served_under_the_mark() {
    let mut machine = source(OnHubLoss::Continue, false);
    let actions = come(&mut machine, welcome(vec![refusal()]), false);
    let told = at(&actions, |a| matches!(a, Action::LeaveOut(refused) if refused.len() == 1));
    let mark = at(&actions, |a| matches!(a, Action::MarkApart(_))).expect("a mark");
    let sent = at(&actions, |a| matches!(a, Action::SendTransfer(_))).expect("transfers");
    assert!(told < Some(mark) && mark < sent, "{actions:?}");
    machine.step(Event::Apart);
    let last = line(2)[1].place;
    ack(&mut machine, last.transfer);
    let cp = CpNumber(1);
    machine.step(Event::Frozen { cp, place: last });
    machine.step(Event::DataSent { cp, bytes: 10 });
    let actions = machine.step(Event::Committed { cp, roots: roots(1) });
    assert_eq!(ends(&actions).iter().map(|end| numbers(&end.roots)).collect::<Vec<_>>(), [[0, 1]]);
    let actions = machine.step(Event::Received(Message::CpDone(CpDone { cp })));
    assert!(at(&actions, |a| matches!(a, Action::Done { alone: false, .. })).is_some());
    assert_eq!(at(&actions, |a| *a == Action::ClearApart), None);
    assert!(!machine.is_in_sync());
}

/// The control: with nothing left out there is no mark, and all roots are told.
#[test]
fn without_a_refusal_nothing_is_marked() {
    let mut machine = source(OnHubLoss::Continue, false);
    let actions = come(&mut machine, welcome(Vec::new()), false);
    assert_eq!(at(&actions, |a| matches!(a, Action::MarkApart(_))), None);
    let last = line(2)[1].place;
    ack(&mut machine, last.transfer);
    let cp = CpNumber(1);
    machine.step(Event::Frozen { cp, place: last });
    machine.step(Event::DataSent { cp, bytes: 10 });
    let actions = machine.step(Event::Committed { cp, roots: roots(1) });
    assert_eq!(numbers(&ends(&actions)[0].roots), [0, 1, 2]);
    assert!(machine.is_in_sync());
}

/// Under `stop` the shell serves it not, so nothing of it is acknowledged alone.
#[test]
fn under_stop_nothing_is_marked() {
    let mut machine = source(OnHubLoss::Stop, false);
    let actions = come(&mut machine, welcome(vec![refusal()]), false);
    assert!(
        at(&actions, |a| matches!(a, Action::LeaveOut(refused) if refused.len() == 1)).is_some()
    );
    assert_eq!(at(&actions, |a| matches!(a, Action::MarkApart(_))), None);
}

/// Agreed on again: its image is of an older CP, so a pass goes before the log, although the logs
/// of both ends join; then the mark goes.
#[test]
fn a_volume_comes_back_by_a_pass() {
    for behind in [true, false] {
        let mut machine = source(OnHubLoss::Continue, true);
        let actions = come(&mut machine, welcome(Vec::new()), behind);
        let sent = at(&actions, |a| matches!(a, Action::SendTransfer(_)));
        assert_eq!(sent.is_none(), behind, "{actions:?}");
        if !behind {
            continue;
        }
        assert!(at(&actions, |a| *a == Action::Freeze).is_some(), "{actions:?}");
        let (cp, place) = (CpNumber(1), line(2)[1].place);
        machine.step(Event::Frozen { cp, place });
        let actions = machine.step(Event::Committed { cp, roots: roots(1) });
        assert!(at(&actions, |a| matches!(a, Action::SendPass { .. })).is_some(), "{actions:?}");
        let actions = machine.step(Event::DataSent { cp, bytes: 10 });
        assert_eq!(numbers(&ends(&actions)[0].roots), [0, 1, 2]);
        let actions = machine.step(Event::Received(Message::CpDone(CpDone { cp })));
        assert!(at(&actions, |a| *a == Action::PassEnded { cp }).is_some());
        assert!(at(&actions, |a| *a == Action::AskAlone).is_some(), "{actions:?}");
        let actions = machine.step(Event::AnsweredAlone(place.sequence));
        assert!(at(&actions, |a| *a == Action::ClearApart).is_some(), "{actions:?}");
        machine.step(Event::Together);
        assert!(machine.is_in_sync());
    }
}

/// What the hub says of volumes that are not here is no matter of this source's.
#[test]
fn a_refusal_of_a_volume_that_is_not_here_is_passed_over() {
    let mut machine = source(OnHubLoss::Continue, false);
    let strange = VolumeRefusal { volume: VolumeNumber(9), ..refusal() };
    let actions = come(&mut machine, welcome(vec![strange]), false);
    assert!(actions.contains(&Action::LeaveOut(Vec::new())));
    assert_eq!(at(&actions, |a| matches!(a, Action::MarkApart(_))), None);
}

/// R7: a hub that acknowledged two transfers as durable and comes back with one was set back; the
/// rest is sent again. With `received` that is what was asked for.
#[test]
fn a_hub_that_was_set_back_is_told_once() {
    use crate::units::policy::Ack as Promise;
    for ack_of in [Promise::Durable, Promise::Received] {
        let mut machine = source(OnHubLoss::Stop, false);
        machine.set_ack(ack_of);
        come(&mut machine, welcome(Vec::new()), false);
        let line = line(2);
        ack(&mut machine, line[1].place.transfer);
        machine.step(Event::Disconnected);
        let less = Welcome { last: line[0].place.into(), ..welcome(Vec::new()) };
        let actions = come(&mut machine, less.clone(), false);
        let (had, has) = (line[1].place, line[0].place);
        let told = actions.contains(&Action::SetBack { had, has });
        assert_eq!(told, ack_of == Promise::Durable, "{actions:?}");
        let again = Action::SendTransfer(line[1].place.transfer);
        assert!(actions.contains(&again), "{actions:?}");
        machine.step(Event::Disconnected);
        let actions = come(&mut machine, less, false);
        assert!(!actions.contains(&Action::SetBack { had, has }), "told once");
    }
}

fn grown() -> Vec<VolumeOffer> {
    let mut volumes = offers();
    volumes[1].size = ByteCount(2 << 20);
    volumes
}

fn hello(actions: &[Action]) -> Option<Vec<VolumeOffer>> {
    actions.iter().find_map(|action| match action {
        Action::Send(Message::Hello(hello)) => Some(hello.volumes.clone()),
        _ => None,
    })
}

/// In one session all CPs and entries are of the sizes that its Hello says.
#[test]
fn what_has_grown_is_told_by_a_new_hello() {
    let mut machine = source(OnHubLoss::Stop, false);
    come(&mut machine, welcome(Vec::new()), false);
    let last = line(2)[1].place;
    ack(&mut machine, last.transfer);
    let actions = machine.step(Event::Grown(grown()));
    assert_eq!(actions, [Action::Renew]);
    let cp = CpNumber(1);
    let actions = machine.step(Event::Frozen { cp, place: last });
    assert_eq!(actions, [], "the session is over");
    machine.step(Event::Disconnected);
    assert_eq!(hello(&machine.step(Event::Connected)), Some(grown()));
    let there = Welcome { last: last.into(), ..welcome(Vec::new()) };
    let actions = machine.step(Event::Welcomed { welcome: there, past: Past::Known });
    let full =
        |a: &Action| matches!(a, Action::Send(Message::PartitionFull(full)) if full.cp == cp);
    assert!(at(&actions, full).is_some(), "{actions:?}");
    // Without a session there is nothing to renew.
    machine.step(Event::Disconnected);
    let mut away = source(OnHubLoss::Stop, false);
    assert_eq!(away.step(Event::Grown(grown())), []);
    assert_eq!(hello(&away.step(Event::Connected)), Some(grown()));
}

/// An own CP of before has another size than the hub was told: no pass sends it. The control: it is
/// sent where nothing has grown. A start that finds a volume outgrown is the same.
#[test]
fn no_cp_of_before_is_sent_behind_a_growth() {
    let sends = |a: &Action| matches!(a, Action::SendPass { .. } | Action::SendCompare { .. });
    for grows in [false, true] {
        let mut machine = source(OnHubLoss::Continue, true);
        let (cp, place) = (CpNumber(1), line(2)[1].place);
        machine.step(Event::Frozen { cp, place });
        machine.step(Event::HubLost);
        let actions = machine.step(Event::Committed { cp, roots: roots(1) });
        assert!(at(&actions, |a| *a == Action::Done { cp, alone: true }).is_some(), "{actions:?}");
        if grows {
            machine.step(Event::Grown(grown()));
        }
        let actions = come(&mut machine, welcome(Vec::new()), true);
        assert_eq!(at(&actions, sends).is_none(), grows, "{actions:?}");
        if !grows {
            continue;
        }
        assert!(at(&actions, |a| *a == Action::Freeze).is_some(), "{actions:?}");
        let cp = CpNumber(2);
        machine.step(Event::Frozen { cp, place });
        let actions = machine.step(Event::Committed { cp, roots: roots(2) });
        // Compared: births are of another size (R8).
        let pass = Action::SendCompare { cp, base: CpNumber(0) };
        assert!(actions.contains(&pass), "{actions:?}");
    }
    for outgrown in [false, true] {
        let (cp, place) = (CpNumber(1), line(2)[1].place);
        let alone = Some((EPOCH, place.sequence));
        let identity = Identity { volumes: grown(), alone, ..identity(OnHubLoss::Continue) };
        let own = Own { cp, roots: roots(1), outgrown };
        let mut machine = Primary::new(identity, place, [], own);
        let actions = come(&mut machine, welcome(Vec::new()), true);
        assert_eq!(at(&actions, sends).is_none(), outgrown, "{actions:?}");
    }
}

/// A hub whose file does not fit is asked again, since only that file has to change; whatever else
/// it refuses stays so.
#[test]
fn only_a_refusal_of_the_volumes_is_tried_again() {
    for code in [RefusedCode::Volume, RefusedCode::Diverged] {
        let mut machine = source(OnHubLoss::Stop, false);
        machine.step(Event::Connected);
        let (reason, next_step) = ("pinned".to_owned(), "agree".to_owned());
        let refused = Message::Refused(Refused { code, reason, next_step });
        let actions = machine.step(Event::Received(refused));
        assert!(at(&actions, |a| matches!(a, Action::Halt(_))).is_some(), "{actions:?}");
        machine.step(Event::Disconnected);
        assert_eq!(machine.step(Event::Connected), [], "halted");
        machine.step(Event::TryAgain);
        let said = hello(&machine.step(Event::Connected));
        assert_eq!(said.is_some(), code == RefusedCode::Volume);
    }
}
