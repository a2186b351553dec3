//! A hub that is connected to and does not answer: for its source it is away.

use super::super::primary::{Action, Answering, Event, Past};
use super::absurd_primary::line;
use super::volumes::{source, welcome};
use crate::units::numbers::CpNumber;
use crate::units::policy::OnHubLoss;
use crate::wire::message::{Message, Welcome};

/// A CP that is made meanwhile is done alone; Welcome is judged by what is held when it comes.
#[test]
fn a_cp_is_done_alone_while_the_hub_does_not_answer() {
    let line = line(2);
    let mut machine = source(OnHubLoss::Continue, true);
    let cp = CpNumber(1);
    let alone = machine.step(Event::HubLost);
    assert!(alone.contains(&Action::Answer(Answering::Alone)), "{alone:?}");
    let hello = machine.step(Event::Connected);
    assert!(matches!(hello[..], [Action::Send(Message::Hello(_))]), "{hello:?}");
    assert_eq!(machine.step(Event::Frozen { cp, place: line[1].place }), []);
    let done = machine.step(Event::Committed { cp, roots: vec![] });
    assert_eq!(done, [Action::Done { cp, alone: true }]);
    // It holds only the first of what was released: the logs do not join any more.
    let welcome = Welcome { last: line[0].place.into(), ..welcome(Vec::new()) };
    let actions = machine.step(Event::Welcomed { welcome, past: Past::Known });
    let base = CpNumber(0);
    assert!(actions.contains(&Action::SendPass { cp, base }), "{actions:?}");
    let transfer = |action: &Action| matches!(action, Action::SendTransfer(_));
    assert!(!actions.iter().any(transfer), "{actions:?}");
}

/// The negative control: with a hub that is there and in step, the CP waits for its word.
#[test]
fn a_cp_waits_for_a_hub_that_answers() {
    let line = line(2);
    let mut machine = source(OnHubLoss::Continue, false);
    let cp = CpNumber(1);
    machine.step(Event::Connected);
    machine.step(Event::Frozen { cp, place: line[1].place });
    assert_eq!(machine.step(Event::Committed { cp, roots: vec![] }), []);
}
