//! A pass that ends before what the hub holds: what both ends had acknowledged behind it stays on the
//! hub (invariant 4), if it is of the source's line.
//!
//! The law that says so is judged after every step of every search; this is the way it was found.

use super::super::mirror::{Action, Build, Mirror};
use super::absurd_mirror::{applied, end, joined, published, receive, settle, stage, updates};
use super::absurd_primary::line;
use super::refusals::{does, drive};
use super::search::advance;
use super::world::{Budget, Faults, Step, World, transfer};
use crate::record::marks::Place;
use crate::units::numbers::{CpNumber, TransferId};
use crate::wire::message::{Message, PartitionFull};

/// A write on both ends, a CP cut behind it, another write on both ends; then the hub is lost, the CP
/// is done alone, and a pass to it brings the image up.
fn passed(faults: Faults) -> World {
    let budget = Budget { writes: 3, cps: 1, losses: 1, cuts: 1, ..Budget::default() };
    let mut world = World::new(faults, budget, (1, 10));
    let serves = |world: &World| world.source.up.as_ref().is_some_and(|up| up.serving);
    drive(&mut world, &[Step::Write], serves);
    does(&mut world, Step::Write);
    does(&mut world, Step::Freeze);
    does(&mut world, Step::Write);
    let held = [Step::Write, Step::OwnCommit, Step::SendData];
    drive(&mut world, &held, |world| world.acked_both.sequence.0 == 2);
    does(&mut world, Step::CutAtSource);
    does(&mut world, Step::HubLost);
    drive(&mut world, &[Step::Write, Step::Connect], |world| world.source.released.sequence.0 == 1);
    while world.problem.is_none() && world.hub.image.0 == CpNumber(0) {
        let steps = world.enabled();
        let next = steps.iter().find(|step| !step.is_fault() && **step != Step::Write).unwrap();
        advance(&mut world, *next);
    }
    world
}

/// The hub sets its log to the pass's end, as it did once: the source's loss before it has sent the
/// rest again loses what was acknowledged before it was alone.
#[test]
fn control_a_pass_that_drops_what_was_acknowledged_is_found() {
    let faults = Faults { pass_drops_log: true, actions_unjudged: true, ..Faults::default() };
    let world = passed(faults);
    let problem = world.problem.unwrap_or_default();
    assert!(problem.starts_with("invariant 4: write 2, acknowledged by both"), "{problem}");
}

#[test]
fn what_both_ends_had_acknowledged_is_never_dropped() {
    let mut world = passed(Faults::default());
    assert_eq!(world.problem, None);
    assert_eq!(world.hub.last().sequence.0, 2, "the log behind the pass stays");
    assert_eq!(world.hub.log.len(), 1);
    // Both go on from there, and nothing is sent twice.
    does(&mut world, Step::Write);
    drive(&mut world, &[], World::has_converged);
}

/// The source loses a write that the hub has, and goes on alone on a line of its own: the hub's log goes with the
/// pass. A pass to the CP that is cut before what both ends had acknowledged would take that along.
#[test]
fn what_a_forked_log_has_of_the_line_is_in_the_image_that_ends_it() {
    let budget = Budget { writes: 4, cps: 1, losses: 1, source_crashes: 1, ..Budget::default() };
    let mut world = World::new(Faults::default(), budget, (1, 10));
    let serves = |world: &World| world.source.up.as_ref().is_some_and(|up| up.serving);
    drive(&mut world, &[Step::Write], serves);
    does(&mut world, Step::Write);
    does(&mut world, Step::Freeze);
    does(&mut world, Step::Write);
    let held = [Step::Write, Step::OwnCommit, Step::SendData];
    drive(&mut world, &held, |world| world.acked_both.sequence.0 == 2);
    does(&mut world, Step::Write);
    let held = [Step::Write, Step::OwnCommit, Step::SendData, Step::SourceSync];
    drive(&mut world, &held, |world| world.hub.last().sequence.0 == 3 && world.hub.durable == 3);
    let forked = world.hub.last();
    for step in [Step::SourceCrash, Step::SourceRestart, Step::HubLost] {
        does(&mut world, step);
    }
    let held = [Step::Write, Step::Connect];
    drive(&mut world, &held, |world| world.source.released.sequence.0 == 1);
    does(&mut world, Step::Write);
    drive(&mut world, &held, |world| world.acked.sequence.0 == 3);
    while world.problem.is_none() && world.hub.image.0 == CpNumber(0) {
        let steps = world.enabled();
        let next = steps.iter().find(|step| !step.is_fault() && **step != Step::Write).unwrap();
        advance(&mut world, *next);
    }
    assert_eq!(world.problem, None);
    assert_ne!(world.acked.hash, forked.hash, "it went another way");
    assert_eq!(world.hub.image.1, world.acked, "one pass, to a CP that was cut for it");
}

fn pass(cp: u32, last: Place, keeps_log: bool) -> Message {
    let base = Some(CpNumber(0));
    let (cp, last) = (CpNumber(cp), last.into());
    Message::PartitionFull(PartitionFull { cp, last, base, replay: false, keeps_log })
}

/// Transfers 1 and 2 of CP 1, 3 of CP 2, all at rest.
fn holds() -> (Mirror, [Place; 3]) {
    let mut machine = joined();
    let mut all = line(3);
    let id = TransferId { generation: 1, counter: 3 };
    all[2] = transfer(all[1].place, id, CpNumber(2), 3);
    stage(&mut machine, &all);
    settle(&mut machine, all[2].place);
    (machine, [all[0].place, all[1].place, all[2].place])
}

/// Publishes the pass; where the log ends then.
fn publish(machine: &mut Mirror, last: Place) -> (Vec<Action>, Place) {
    updates(machine, 1, 10);
    receive(machine, end(1, last, 10));
    let actions = applied(machine, 1, published(last));
    (actions, machine.ladder()[1])
}

#[test]
fn the_log_behind_a_pass_stays_if_the_source_says_so() {
    let (mut machine, [_, cut, last]) = holds();
    let actions = receive(&mut machine, pass(1, cut, true));
    assert!(matches!(actions[..], [Action::Apply { build: Build::Pass, .. }]), "{actions:?}");
    assert!(machine.keeps_log());
    let (actions, end) = publish(&mut machine, cut);
    assert_eq!(end, last);
    assert!(actions.contains(&Action::DropLogs(CpNumber(1))), "{actions:?}");
    assert_eq!(machine.labels(), [CpNumber(2)]);
    // Of another line, as the source says: all of it goes.
    let (mut machine, [_, cut, _]) = holds();
    receive(&mut machine, pass(1, cut, false));
    assert!(!machine.keeps_log());
    let (actions, end) = publish(&mut machine, cut);
    assert_eq!(end, cut);
    assert!(!actions.iter().any(|action| matches!(action, Action::DropLogs(_))), "{actions:?}");
}

/// A log that does not go on behind the pass's place would be a gap, or bring entries twice.
#[test]
fn a_pass_that_keeps_what_does_not_follow_it_is_closed() {
    let (_, [first, cut, last]) = holds();
    let other = Place { hash: first.hash, ..cut };
    for place in [Place::default(), first, last, other] {
        let (mut machine, _) = holds();
        let actions = receive(&mut machine, pass(1, place, true));
        assert!(matches!(actions[..], [Action::Close { .. }]), "{place:?}: {actions:?}");
        assert_eq!(machine.ladder()[1], last, "nothing has changed");
    }
}

/// What a hub tells after a restart counts as what came.
#[test]
fn a_restarted_hub_knows_where_its_logs_are_cut() {
    let (before, [first, cut, last]) = holds();
    for (told, closed) in [(cut, false), (first, true)] {
        let mut machine = Mirror::new(before.known().clone(), last, 1000, 100);
        machine.holds(&[(CpNumber(1), told), (CpNumber(2), last)]);
        super::absurd_mirror::join(&mut machine, 1);
        let actions = receive(&mut machine, pass(1, cut, true));
        let met = matches!(actions[..], [Action::Close { .. }]);
        assert_eq!(met, closed, "{actions:?}");
    }
}
