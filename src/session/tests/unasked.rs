//! A source that begins to serve without having asked, on less than it had (R1): what its hub's log
//! names as durable there was acknowledged for sure, and is not given up for what it wrote since.

use super::super::primary::{Action, Event, Past, Primary};
use super::absurd_primary::line;
use super::refusals::{does, drive};
use super::search::advance;
use super::volumes::{source, welcome};
use super::world::{Budget, Faults, Step, World};
use crate::units::numbers::TransferId;
use crate::units::policy::OnHubLoss;
use crate::wire::message::{RefusedCode, Welcome};

/// Three writes on both ends; the source loses the last two with its power, serves alone, and comes.
fn rolled_back(faults: Faults) -> World {
    let budget = Budget { writes: 4, rots: 2, losses: 1, ..Budget::default() };
    // That it serves without what was acknowledged is known: what comes of it is judged.
    let faults = Faults { actions_unjudged: true, ..faults };
    let mut world = World::new(faults, budget, (1, 10));
    let serves = |world: &World| world.source.up.as_ref().is_some_and(|up| up.serving);
    drive(&mut world, &[Step::Write], serves);
    for count in 1..=3 {
        does(&mut world, Step::Write);
        drive(&mut world, &[Step::Write], |world| world.acked_both.sequence.0 == count);
    }
    drive(&mut world, &[Step::Write], World::has_converged);
    for _ in 0..2 {
        does(&mut world, Step::SourceCrashAndRot);
        does(&mut world, Step::SourceRestart);
    }
    does(&mut world, Step::HubLost);
    drive(&mut world, &[Step::Connect], serves);
    let began = world.source.unasked.unwrap();
    assert_eq!(began.counter, 1, "durable before the first client is served");
    does(&mut world, Step::Write);
    for _ in 0..200 {
        let steps = world.enabled();
        let next = steps.iter().find(|step| !step.is_fault());
        let Some(next) = next.filter(|_| world.problem.is_none()) else { break };
        advance(&mut world, *next);
    }
    world
}

#[test]
fn a_source_that_has_lost_what_was_acknowledged_does_not_replace_it() {
    let world = rolled_back(Faults::default());
    let problem = world.problem.unwrap_or_default();
    assert!(problem.starts_with("the source halts") && problem.contains("has lost"), "{problem}");
    assert_eq!(world.hub.last().sequence.0, 3, "the hub keeps what both had acknowledged");
}

/// The negative control: a hub that does not say so is brought up to the other line.
#[test]
fn control_a_rollback_that_is_not_judged_loses_writes() {
    let faults = Faults { rollback_unjudged: true, ..Faults::default() };
    let problem = rolled_back(faults).problem.unwrap_or_default();
    assert!(problem.starts_with("invariant 1: write 3 is not"), "{problem}");
}

fn id(counter: u64) -> TransferId {
    TransferId { generation: 1, counter }
}

/// Comes to a hub that holds nothing and names `own_durable`.
fn comes(machine: &mut Primary, own_durable: TransferId) -> Vec<Action> {
    machine.step(Event::Connected);
    let welcome = Welcome { own_durable, ..welcome(Vec::new()) };
    machine.step(Event::Welcomed { welcome, past: Past::Known })
}

fn is_refused(actions: &[Action]) -> bool {
    actions.iter().any(|action| match action {
        Action::Halt(refused) => refused.code == RefusedCode::Diverged,
        _ => false,
    })
}

#[test]
fn where_it_began_is_durable_before_it_serves_and_goes_when_it_has_asked() {
    for alone in [false, true] {
        let mut machine = source(OnHubLoss::Continue, alone);
        let mut actions = machine.step(Event::HubLost);
        actions.extend(machine.step(Event::Apart));
        let at = |wanted: &Action| actions.iter().position(|action| action == wanted);
        let (began, serve) = (at(&Action::Unasked(Some(id(2)))), at(&Action::Serve));
        assert!(began.is_some() && began < serve, "{actions:?}");
        // Lost again in the same run, it began where it began.
        assert!(!machine.step(Event::HubLost).iter().any(|a| matches!(a, Action::Unasked(_))));
        let mut other = machine.clone();
        assert!(is_refused(&comes(&mut other, id(3))));
        let actions = comes(&mut machine, id(2));
        assert!(!is_refused(&actions) && actions.contains(&Action::Unasked(None)), "{actions:?}");
        // It has asked: what the hub names from now on is of its own line.
        machine.step(Event::Disconnected);
        assert!(!is_refused(&comes(&mut machine, id(9))));
    }
}

/// The oldest of several starts counts; one that has asked nobody yet judges by what it holds.
#[test]
fn the_least_that_was_held_counts() {
    assert_eq!(line(2)[1].header.id, id(2));
    let mut machine = source(OnHubLoss::Continue, true);
    assert!(is_refused(&comes(&mut machine, id(3))), "marked, and lost more since");
    let mut machine = source(OnHubLoss::Continue, false);
    assert!(!is_refused(&comes(&mut machine, id(3))), "never alone: what it lacks is fetched");
}
