//! The end of being alone (R4): the mark stands until the hub has every write that was answered without
//! it, also one of a transfer that the machine has not heard of yet.

use super::super::primary::{Action, Answering, Event, Held, Identity, Own, Past, Primary};
use super::absurd_primary::{identity, line};
use super::volumes::{source, welcome};
use super::world::hub_id;
use crate::record::marks::Place;
use crate::units::ids::HubId;
use crate::units::numbers::{CpNumber, SequenceNumber, TransferId};
use crate::units::policy::{OnHubLoss, Policy, never_in_step};
use crate::wire::message::{Ack, Message, Welcome};

fn ack(id: TransferId) -> Event {
    Event::Received(Message::Ack(Ack { id, log_credit: 1000, cp_taken: 0 }))
}

/// Alone with two transfers, met by the hub, which has both by now.
fn caught_up() -> Primary {
    let mut machine = source(OnHubLoss::Continue, true);
    let alone = machine.step(Event::HubLost);
    assert!(alone.contains(&Action::Answer(Answering::Alone)), "{alone:?}");
    machine.step(Event::Connected);
    machine.step(Event::Welcomed { welcome: welcome(Vec::new()), past: Past::Known });
    let actions = machine.step(ack(line(2)[1].header.id));
    let policy = actions.iter().position(|a| *a == Action::Answer(Answering::Policy));
    let asked = actions.iter().position(|a| *a == Action::AskAlone);
    assert!(policy.is_some() && policy < asked, "asked once nothing more is: {actions:?}");
    assert!(!actions.contains(&Action::ClearApart), "{actions:?}");
    machine
}

/// The own ring is durable, and the client answered, on another thread than this machine's.
#[test]
fn the_mark_waits_for_what_was_answered_and_not_yet_told_of() {
    let (mut machine, third) = (caught_up(), line(3)[2]);
    let actions = machine.step(Event::AnsweredAlone(third.place.sequence));
    assert!(!actions.contains(&Action::ClearApart), "the hub lacks it: {actions:?}");
    let actions = machine.step(Event::Formed(Held { place: third.place, bytes: 100 }));
    assert!(actions.contains(&Action::SendTransfer(third.header.id)), "{actions:?}");
    assert!(!actions.contains(&Action::ClearApart), "{actions:?}");
    let actions = machine.step(ack(third.header.id));
    assert!(actions.contains(&Action::ClearApart), "{actions:?}");
}

/// The control: where the hub has all of it, nothing is waited for; what an earlier run answered alone
/// is held since the start.
#[test]
fn the_mark_goes_at_once_when_the_hub_has_all_that_was_answered() {
    for upto in [0, 2] {
        let actions = caught_up().step(Event::AnsweredAlone(SequenceNumber(upto)));
        assert!(actions.contains(&Action::ClearApart), "{actions:?}");
    }
}

/// A connection that breaks in between asks again: more may have been answered alone since.
#[test]
fn another_connection_asks_again() {
    let mut machine = caught_up();
    machine.step(Event::Disconnected);
    assert!(!machine.step(Event::AnsweredAlone(SequenceNumber(2))).contains(&Action::ClearApart));
    machine.step(Event::Connected);
    let last = line(2)[1].place;
    let welcome = Welcome { last: last.into(), ..welcome(Vec::new()) };
    let actions = machine.step(Event::Welcomed { welcome, past: Past::Known });
    assert!(actions.contains(&Action::AskAlone), "{actions:?}");
    let actions = machine.step(Event::AnsweredAlone(SequenceNumber(2)));
    assert!(actions.contains(&Action::ClearApart), "{actions:?}");
}

fn stops() -> Policy {
    Policy { on_hub_loss: OnHubLoss::Stop, ..Policy::default() }
}

/// A source that stops without its hub; its CP 1 ends behind the first of two transfers.
fn with_work(hub: Option<HubId>) -> Primary {
    let (first, second) = (line(2)[0].place, line(2)[1].place);
    let own = Own { cp: CpNumber(1), ..Own::default() };
    let identity = Identity { hub, ..identity(OnHubLoss::Stop) };
    Primary::new(identity, first, [Held { place: second, bytes: 100 }], own)
}

fn told(actions: &[Action]) -> OnHubLoss {
    let hello = actions.iter().find_map(|action| match action {
        Action::Send(Message::Hello(hello)) => Some(hello.policy.on_hub_loss),
        _ => None,
    });
    hello.unwrap()
}

/// R4: what it brings along is brought over by a pass, and nobody waits for that; the hub knows it before the
/// first Welcome. It stops from the moment that all of it is there: before the mark goes.
#[test]
fn a_new_source_that_stops_holds_nothing_before_it_was_in_step() {
    let mut machine = with_work(None);
    let lost = machine.step(Event::HubLost);
    let from = lost.iter().find_map(|action| match action {
        Action::MarkApart(mark) => Some(*mark),
        _ => None,
    });
    assert!(from.is_some_and(never_in_step), "{lost:?}");
    let actions = machine.step(Event::Apart);
    assert!(actions.contains(&Action::Answer(Answering::Alone)), "usable at once: {actions:?}");
    assert_eq!(told(&machine.step(Event::Connected)), OnHubLoss::Continue);
    let first = Event::Welcomed { welcome: welcome(Vec::new()), past: Past::Known };
    let actions = machine.step(first);
    assert!(machine.pass().is_some(), "the logs do not join: {actions:?}");
    let noted = actions.iter().position(|a| *a == Action::InForce(stops().usable_at_once()));
    let joined = actions.iter().position(|a| matches!(a, Action::Joined { .. }));
    assert!(noted.is_some() && noted < joined, "{actions:?}");
    assert!(!actions.contains(&Action::Answer(Answering::Policy)), "{actions:?}");
    assert!(!actions.contains(&Action::Answer(Answering::Held)), "{actions:?}");
    machine.step(Event::Disconnected);
    let lost = machine.step(Event::HubLost);
    assert!(!lost.contains(&Action::Answer(Answering::Held)), "in the middle of it: {lost:?}");
    // Another session, in which the logs join and the hub has all of it.
    machine.step(Event::Connected);
    let last = line(2)[1].place;
    let (applied_cp, applied) = (CpNumber(1), line(2)[0].place.into());
    let welcome = Welcome { last: last.into(), applied_cp, applied, ..welcome(Vec::new()) };
    let actions = machine.step(Event::Welcomed { welcome, past: Past::Known });
    assert!(actions.contains(&Action::AskAlone), "{actions:?}");
    machine.step(Event::Promised { next: stops(), behind: last.sequence });
    machine.step(Event::AnsweredAlone(last.sequence));
    machine.step(Event::Disconnected);
    let lost = machine.step(Event::HubLost);
    assert!(lost.contains(&Action::Answer(Answering::Held)), "it stops from here on: {lost:?}");
}

/// The control: one that has met its hub before, and one that brings nothing, tell what they promise.
#[test]
fn one_that_was_met_before_or_brings_nothing_promises_at_once() {
    let mut met = with_work(Some(hub_id()));
    let lost = met.step(Event::HubLost);
    assert!(lost.contains(&Action::Answer(Answering::Held)), "{lost:?}");
    assert_eq!(told(&met.step(Event::Connected)), OnHubLoss::Stop);
    let mut empty = Primary::new(
        Identity { hub: None, ..identity(OnHubLoss::Stop) },
        Place::default(),
        [],
        Own::default(),
    );
    assert_eq!(told(&empty.step(Event::Connected)), OnHubLoss::Stop);
    let actions = empty.step(Event::Welcomed { welcome: welcome(Vec::new()), past: Past::Known });
    assert!(!actions.iter().any(|action| matches!(action, Action::InForce(_))), "{actions:?}");
}
