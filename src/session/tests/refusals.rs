//! A pass that is refused while the source goes on alone, step by step: what is sent again is the
//! newest own CP, and both ends come together (R4, R18).
//!
//! The long searches of [`super::search`] go through every order of it; these are the ones that have
//! gone wrong.

use super::search::advance;
use super::world::{Budget, Faults, Step, World};

/// What a test lets happen itself.
const HELD: [Step; 4] = [Step::Write, Step::Freeze, Step::Press, Step::Retry];

/// Takes a step that can be taken; no law may be broken behind it.
pub(super) fn does(world: &mut World, step: Step) {
    assert!(world.enabled().contains(&step), "{step:?} is not to be had: {:?}", world.enabled());
    advance(world, step);
    assert_eq!(world.problem, None, "behind {step:?}");
}

/// Lets happen what happens by itself, but for what is `held`.
pub(super) fn drive(world: &mut World, held: &[Step], until: impl Fn(&World) -> bool) {
    for _ in 0..1000 {
        if until(world) {
            return;
        }
        let steps = world.enabled();
        let next = steps.iter().find(|step| !step.is_fault() && !held.contains(step));
        does(world, *next.unwrap_or_else(|| panic!("nothing goes on: {steps:?}")));
    }
    panic!("it does not come to an end");
}

/// The source makes a CP of its own.
fn own_cp(world: &mut World) {
    for step in [Step::Write, Step::SourceSync, Step::Freeze, Step::SourceSync, Step::OwnCommit] {
        does(world, step);
    }
}

/// A source with a CP made alone, and the hub is applying the pass to it.
fn applying() -> World {
    let budget =
        Budget { writes: 4, cps: 4, losses: 1, no_space: 2, rejects: 2, ..Budget::default() };
    let mut world = World::new(Faults::default(), budget, (1, 10));
    does(&mut world, Step::HubLost);
    let serves = |world: &World| world.source.up.as_ref().is_some_and(|up| up.serving);
    drive(&mut world, &[Step::Connect], serves);
    own_cp(&mut world);
    drive(&mut world, &HELD, |world| world.hub.up.as_ref().is_some_and(|up| up.job.is_some()));
    world
}

fn is_parked(world: &World) -> bool {
    world.source.up.as_ref().is_some_and(|up| up.parked)
}

#[test]
fn a_pass_without_room_is_made_anew_from_the_newest_own_cp() {
    let mut world = applying();
    does(&mut world, Step::NoSpace);
    drive(&mut world, &HELD, is_parked);
    for _ in 0..2 {
        own_cp(&mut world);
        does(&mut world, Step::Press);
    }
    does(&mut world, Step::Retry);
    drive(&mut world, &HELD[..1], World::has_converged);
}

#[test]
fn a_refused_pass_is_made_anew_from_the_newest_own_cp() {
    let mut world = applying();
    own_cp(&mut world);
    does(&mut world, Step::Reject);
    drive(&mut world, &HELD[..1], World::has_converged);
}
