//! A hub that gives no credit: what waits for it was never sent, and no acknowledgement is owed.
//!
//! The shell hangs up on a hub that is waited for and gets on with nothing; these are the words by
//! which it knows. The search `no_change_of_credit_goes_wrong` goes through every order of it.

use super::super::primary::{Action, Answering, Event, Held, Past, Primary};
use super::absurd_primary::line;
use super::refusals::{does, drive};
use super::volumes::{source, welcome};
use super::world::{Budget, Faults, Step, World};
use crate::units::numbers::TransferId;
use crate::units::policy::OnHubLoss;
use crate::wire::message::{Ack, Message, Welcome};

fn met(machine: &mut Primary, log_credit: u64, past: Past) -> Vec<Action> {
    machine.step(Event::Connected);
    let welcome = Welcome { log_credit, ..welcome(Vec::new()) };
    machine.step(Event::Welcomed { welcome, past })
}

fn ack(id: TransferId, log_credit: u64) -> Event {
    Event::Received(Message::Ack(Ack { id, log_credit, cp_taken: 0 }))
}

#[test]
fn what_was_never_sent_is_waited_for_as_well() {
    let line = line(3);
    let mut machine = source(OnHubLoss::Stop, false);
    let actions = met(&mut machine, 0, Past::Known);
    let sent = |actions: &[Action]| {
        actions.iter().filter(|action| matches!(action, Action::SendTransfer(_))).count()
    };
    assert_eq!(sent(&actions), 0);
    assert!(!machine.is_sending() && machine.waits_for_hub());
    let actions = machine.step(ack(TransferId::NONE, 100));
    assert_eq!(sent(&actions), 1);
    assert!(machine.is_sending() && machine.waits_for_hub());
    // All of it is there, and nobody waits for credit that nothing needs.
    machine.step(ack(line[0].header.id, 1000));
    machine.step(ack(line[1].header.id, 0));
    assert!(!machine.is_sending() && !machine.waits_for_hub());
    machine.step(Event::Formed(Held { place: line[2].place, bytes: 100 }));
    assert!(!machine.is_sending() && machine.waits_for_hub());
    machine.step(Event::Disconnected);
    assert!(!machine.waits_for_hub(), "who is away is waited for by the clock");
}

/// Whose clients are answered alone hangs up on nobody for want of credit: it would again and again.
#[test]
fn a_source_that_is_answered_alone_waits_for_nobody() {
    let mut machine = source(OnHubLoss::Continue, true);
    let alone = machine.step(Event::HubLost);
    assert!(alone.contains(&Action::Answer(Answering::Alone)), "{alone:?}");
    met(&mut machine, 0, Past::Known);
    assert!(machine.is_streaming() && !machine.waits_for_hub());
    // The negative control: marked all the same, under `stop` its clients wait.
    let mut machine = source(OnHubLoss::Stop, true);
    met(&mut machine, 0, Past::Known);
    assert!(machine.is_streaming() && machine.waits_for_hub());
    // While the image is brought up the log does not go at all.
    let mut machine = source(OnHubLoss::Stop, true);
    met(&mut machine, 1000, Past::Unknown);
    assert!(machine.is_streaming() && machine.pass().is_none() && !machine.waits_for_hub());
}

/// The whole way: no credit, hung up, alone, met again, credit.
#[test]
fn a_source_goes_on_alone_without_credit_and_comes_back() {
    let budget = Budget { writes: 3, losses: 1, cuts: 1, credits: 4, ..Budget::default() };
    let mut world = World::new(Faults::default(), budget, (1, 10));
    drive(&mut world, &[Step::Write], World::has_converged);
    let zero = |world: &World| world.hub.up.as_ref().is_some_and(|up| up.log_credit == 0);
    while !zero(&world) {
        does(&mut world, Step::Credit);
    }
    drive(&mut world, &[Step::Write], |world| !world.enabled().contains(&Step::ToSource));
    does(&mut world, Step::Write);
    drive(&mut world, &[Step::Write], |world| !world.enabled().contains(&Step::SourceSync));
    assert!(world.lacks_credit());
    assert_eq!(world.acknowledged().0, 0, "the hub does not have it");
    does(&mut world, Step::CutAtSource);
    does(&mut world, Step::HubLost);
    drive(&mut world, &[Step::Write, Step::Connect], |world| world.acknowledged().0 == 1);
    drive(&mut world, &[Step::Write], |world| world.lacks_credit());
    does(&mut world, Step::Write);
    drive(&mut world, &[Step::Write], |world| world.acknowledged().0 == 2);
    does(&mut world, Step::Credit);
    drive(&mut world, &[Step::Write], World::has_converged);
}
