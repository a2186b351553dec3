//! The end of being alone (R4): the mark stands until the hub has every write that was answered without
//! it, also one of a transfer that the machine has not heard of yet.

use super::super::primary::{Action, Answering, Event, Held, Past, Primary};
use super::absurd_primary::line;
use super::volumes::{source, welcome};
use crate::units::numbers::{SequenceNumber, TransferId};
use crate::units::policy::OnHubLoss;
use crate::wire::message::{Ack, Message};

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
    let welcome = crate::wire::message::Welcome { last: last.into(), ..welcome(Vec::new()) };
    let actions = machine.step(Event::Welcomed { welcome, past: Past::Known });
    assert!(actions.contains(&Action::AskAlone), "{actions:?}");
    let actions = machine.step(Event::AnsweredAlone(SequenceNumber(2)));
    assert!(actions.contains(&Action::ClearApart), "{actions:?}");
}
