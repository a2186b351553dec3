//! Every short history of the two machines: breadth first, so that what is found is shortest.
//!
//! The default form stays under some seconds; `MIRRORHUB_FULL=1` runs the long one. A world
//! without another fault to come that has nothing left to do must be in step: that is convergence,
//! for every history at once.

use std::collections::{HashSet, VecDeque};
use std::hash::Hasher;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::refusals::drive;
use super::world::{Budget, Faults, Step, World};
use crate::units::is_full;

/// How a search ended.
#[derive(Debug)]
pub(super) enum Found {
    /// Every history was seen.
    Nothing { states: usize },
    /// The limit was reached.
    Limit { states: usize },
    /// This went wrong.
    Violation { problem: String, path: Vec<Step>, states: usize },
}

impl Found {
    /// The violation, for a control that must find one.
    #[track_caller]
    pub(super) fn problem(self) -> String {
        match self {
            Self::Violation { problem, path, .. } => format!("{problem} (after {path:?})"),
            other => panic!("the control found no violation: {other:?}"),
        }
    }

    /// Fails unless every history was seen and none was bad.
    #[track_caller]
    pub(super) fn nothing(self) -> usize {
        match self {
            Self::Nothing { states } => states,
            Self::Limit { states } => panic!("{states} states were not enough"),
            Self::Violation { problem, path, states } => {
                let mut steps = String::new();
                for (at, step) in path.iter().enumerate() {
                    steps += &format!("\n  {:3} {step:?}", at + 1);
                }
                panic!("after {states} states: {problem}{steps}");
            }
        }
    }
}

/// Fingerprints of the worlds that were seen: 128 bits, which no two share by accident.
#[derive(Default)]
struct Seen {
    bytes: Bytes,
    worlds: HashSet<[u8; 16]>,
}

/// A hasher that keeps what it is fed.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Hasher for Bytes {
    fn write(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn finish(&self) -> u64 {
        0
    }
}

impl Seen {
    fn insert(&mut self, world: &World) -> bool {
        self.bytes.0.clear();
        world.fingerprint(&mut self.bytes);
        let hash = blake3::hash(&self.bytes.0);
        self.worlds.insert(*hash.as_bytes().first_chunk().unwrap())
    }
}

/// Does `step`; a panic of a machine is a violation like any other.
pub(super) fn advance(world: &mut World, step: Step) {
    let result = catch_unwind(AssertUnwindSafe(|| world.apply(step)));
    if let Err(panic) = result {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        world.problem = Some(format!("panic: {}", text.unwrap_or_default()));
    }
}

/// Walks every history of `budget`, at most `limit` states.
pub(super) fn search(faults: Faults, budget: Budget, shape: (u32, u64), limit: usize) -> Found {
    search_from(World::new(faults, budget, shape), limit)
}

/// The same from a world in which something has happened.
fn search_from(start: World, limit: usize) -> Found {
    let mut seen = Seen::default();
    let mut parents: Vec<(usize, Step)> = vec![(0, Step::Connect)];
    seen.insert(&start);
    let mut queue = VecDeque::from([(0, start)]);
    while let Some((index, world)) = queue.pop_front() {
        let steps = world.enabled();
        if world.is_stuck(&steps) {
            let problem = "nothing more happens and the ends are not in step".to_owned();
            return violation(problem, &parents, index);
        }
        for step in steps {
            let mut next = world.clone();
            advance(&mut next, step);
            if next.problem.is_none() && !seen.insert(&next) {
                continue;
            }
            parents.push((index, step));
            let index = parents.len() - 1;
            if let Some(problem) = next.problem {
                return violation(problem, &parents, index);
            }
            if parents.len() > limit {
                return Found::Limit { states: parents.len() };
            }
            queue.push_back((index, next));
        }
    }
    Found::Nothing { states: parents.len() }
}

fn violation(problem: String, parents: &[(usize, Step)], mut index: usize) -> Found {
    let mut path = Vec::new();
    while index > 0 {
        path.push(parents[index].1);
        index = parents[index].0;
    }
    path.reverse();
    Found::Violation { problem, path, states: parents.len() }
}

/// Searches all of `budget` with every rule on; the long form has more of it.
fn holds(budget: Budget, more: Budget) {
    let budget = if is_full() { more } else { budget };
    let shapes: &[(u32, u64)] =
        if is_full() || budget.rejects > 0 { &[(1, 10), (2, 10)] } else { &[(1, 10)] };
    for &shape in shapes {
        let states = search(Faults::default(), budget, shape, 30_000_000).nothing();
        println!("{states} histories, {shape:?}, {budget:?}");
    }
}

const NONE: Budget = Budget {
    writes: 0,
    cps: 0,
    cuts: 0,
    source_crashes: 0,
    hub_crashes: 0,
    rots: 0,
    rejects: 0,
    no_space: 0,
    drops: 0,
    repeats: 0,
    credits: 0,
    losses: 0,
    reloads: 0,
    restores: 0,
};

#[test]
fn no_history_without_faults_goes_wrong() {
    let budget = Budget { writes: 3, cps: 2, ..NONE };
    holds(budget, Budget { writes: 4, cps: 3, ..NONE });
}

#[test]
fn no_cut_goes_wrong() {
    let budget = Budget { writes: 2, cps: 1, cuts: 1, ..NONE };
    holds(budget, Budget { cps: 2, cuts: 2, ..budget });
}

#[test]
fn no_crash_of_the_source_goes_wrong() {
    let budget = Budget { writes: 2, cps: 2, source_crashes: 1, ..NONE };
    holds(budget, Budget { source_crashes: 2, ..budget });
}

#[test]
fn no_crash_of_the_hub_goes_wrong() {
    let budget = Budget { writes: 3, cps: 2, hub_crashes: 1, ..NONE };
    holds(budget, Budget { writes: 3, cps: 2, hub_crashes: 2, ..NONE });
}

#[test]
fn no_crash_of_both_ends_goes_wrong() {
    let budget = Budget { writes: 2, cps: 1, source_crashes: 1, hub_crashes: 1, ..NONE };
    holds(budget, Budget { writes: 3, cps: 2, ..budget });
}

#[test]
fn no_cut_with_crashes_goes_wrong() {
    let budget = Budget { writes: 1, cps: 1, cuts: 1, source_crashes: 1, hub_crashes: 1, ..NONE };
    holds(budget, Budget { writes: 2, ..budget });
}

/// The last durable record of the source is damaged when its power is cut: a freeze, or a
/// transfer that the hub has.
#[test]
fn no_rot_at_the_source_goes_wrong() {
    let budget = Budget { writes: 2, cps: 2, rots: 1, ..NONE };
    holds(budget, Budget { writes: 3, hub_crashes: 1, ..budget });
}

#[test]
fn no_refusal_goes_wrong() {
    let budget = Budget { writes: 1, cps: 1, rejects: 2, no_space: 1, ..NONE };
    holds(budget, Budget { writes: 2, cuts: 1, ..budget });
}

#[test]
fn no_change_of_credit_goes_wrong() {
    let budget = Budget { writes: 2, cps: 1, credits: 3, ..NONE };
    holds(budget, Budget { source_crashes: 1, ..budget });
    // Lost for want of credit: hung up on, served alone, met again.
    let budget = Budget { writes: 1, cps: 1, credits: 4, losses: 1, cuts: 1, ..NONE };
    holds(Budget { cps: 0, credits: 3, ..budget }, budget);
}

/// `continue`: the hub counts as lost at any moment, the source serves alone, both come back.
#[test]
fn no_time_alone_goes_wrong() {
    let budget = Budget { writes: 2, cps: 1, losses: 1, ..NONE };
    holds(budget, Budget { writes: 3, cps: 2, ..budget });
}

#[test]
fn no_time_alone_with_a_cut_goes_wrong() {
    let budget = Budget { writes: 1, cps: 1, losses: 1, cuts: 1, ..NONE };
    holds(budget, Budget { writes: 2, cps: 1, losses: 1, cuts: 1, ..NONE });
}

#[test]
fn no_time_alone_with_a_crash_goes_wrong() {
    let budget = Budget { writes: 1, cps: 1, losses: 1, source_crashes: 1, ..NONE };
    holds(budget, Budget { writes: 2, ..budget });
    let budget = Budget { writes: 1, cps: 1, losses: 1, hub_crashes: 1, ..NONE };
    holds(budget, Budget { writes: 2, ..budget });
}

#[test]
fn no_refused_pass_goes_wrong() {
    let budget = Budget { writes: 1, cps: 1, losses: 1, cuts: 1, rejects: 1, ..NONE };
    holds(budget, Budget { writes: 2, no_space: 1, ..budget });
}

/// A reload changes what is promised, from `sync` with `stop` to `async` and back: the hub never
/// goes by a promise that is not kept, and ends with the one of the file.
#[test]
fn no_change_of_policy_goes_wrong() {
    let budget = Budget { writes: 2, cps: 1, reloads: 2, ..NONE };
    holds(budget, Budget { writes: 3, ..budget });
}

#[test]
fn no_change_of_policy_with_a_cut_or_crash_goes_wrong() {
    let budget = Budget { writes: 2, reloads: 1, ..NONE };
    for more in [
        Budget { cuts: 1, ..budget },
        Budget { source_crashes: 1, ..budget },
        Budget { hub_crashes: 1, ..budget },
        Budget { writes: 1, reloads: 2, source_crashes: 1, ..budget },
    ] {
        holds(more, Budget { cps: 1, ..more });
    }
}

/// From `stop` to `continue` and back while the hub may be lost at any moment.
#[test]
fn no_change_of_what_the_loss_of_the_hub_means_goes_wrong() {
    let budget = Budget { writes: 1, reloads: 1, losses: 1, ..NONE };
    holds(budget, Budget { writes: 2, reloads: 2, ..budget });
    let budget = Budget { source_crashes: 1, ..budget };
    holds(budget, Budget { writes: 2, ..budget });
}

/// The hub has no room for a pass, or refuses it; the source goes on alone and makes CPs meanwhile.
/// Only in the long form: [`super::refusals`] has its shortest ways.
#[test]
fn no_refused_pass_with_newer_cps_goes_wrong() {
    if !is_full() {
        return;
    }
    let budget = Budget { writes: 2, cps: 2, losses: 1, no_space: 1, ..NONE };
    holds(budget, Budget { writes: 3, no_space: 2, ..budget });
    let budget = Budget { writes: 2, cps: 2, losses: 1, rejects: 1, ..NONE };
    holds(budget, Budget { cuts: 1, ..budget });
}

/// TCP neither loses nor repeats; if something between the ends does, the connection may close,
/// but nothing false is stored, acknowledged or published.
#[test]
fn no_lying_link_goes_wrong() {
    let budget = Budget { writes: 2, cps: 1, drops: 1, repeats: 1, ..NONE };
    holds(budget, Budget { writes: 3, ..budget });
}

/// The shortest history that goes wrong with one rule off.
#[track_caller]
fn control(faults: Faults, budget: Budget, wanted: &str) {
    let problem = search(faults, budget, (1, 10), 3_000_000).problem();
    assert!(problem.starts_with(wanted), "{problem}");
}

const CRASHES: Budget = Budget { writes: 2, cps: 1, source_crashes: 1, hub_crashes: 1, ..NONE };

#[test]
fn control_an_ack_before_durable_is_found() {
    let faults = Faults { ack_before_durable: true, ..Faults::default() };
    control(faults, CRASHES, "invariant 1: Ack of 1.1 before");
    let harm = Faults { actions_unjudged: true, ..faults };
    control(harm, CRASHES, "invariant 1: write 1 is not on the hub");
}

#[test]
fn control_a_cp_end_before_the_own_commit_is_found() {
    let faults = Faults { end_before_commit: true, ..Faults::default() };
    control(faults, CRASHES, "R6: CpEnd of CP 1 before the own commit");
    let harm = Faults { actions_unjudged: true, ..faults };
    control(harm, CRASHES, "R6: CP 1 is published, the source never committed it");
}

#[test]
fn control_a_freeze_that_is_no_record_is_found() {
    let faults = Faults { freeze_not_durable: true, ..Faults::default() };
    control(faults, CRASHES, "R6: PartitionFull of CP 1 before its freeze");
    // The record also orders the own commit behind the CP's transfers: without it the pool has
    // what the log cannot send again, and takes it for acknowledged.
    let harm = Faults { actions_unjudged: true, ..faults };
    control(harm, CRASHES, "invariant 1: write 1 is not on the hub");
}

#[test]
fn control_a_welcome_before_durable_is_found() {
    let faults = Faults { welcome_before_durable: true, ..Faults::default() };
    let budget = Budget { cuts: 1, ..CRASHES };
    control(faults, budget, "R7: Welcome before");
    let harm = Faults { actions_unjudged: true, ..faults };
    control(harm, budget, "invariant 1: write 1 is not on the hub");
}

#[test]
fn control_an_unchecked_predecessor_is_found() {
    let faults = Faults { predecessor_unchecked: true, ..Faults::default() };
    let budget = Budget { writes: 2, drops: 1, ..NONE };
    control(faults, budget, "R7: transfer 1.2 does not follow");
}

#[test]
fn control_a_kept_late_transfer_is_found() {
    let faults = Faults { late_transfer_kept: true, ..Faults::default() };
    let budget = Budget { writes: 1, cps: 1, repeats: 1, ..NONE };
    control(faults, budget, "R7: transfer 1.1 does not follow");
}

/// The machine itself will not form ids that fall: without that the hub would take the new
/// transfer for a repeat of the old one and acknowledge it (see the model).
#[test]
fn control_an_id_without_its_generation_is_found() {
    let faults = Faults { generation_not_in_id: true, ..Faults::default() };
    control(faults, CRASHES, "panic: transfers are formed in order");
}

#[test]
fn control_serving_before_welcome_is_found() {
    let faults = Faults { serve_before_welcome: true, ..Faults::default() };
    control(faults, CRASHES, "the source closes: a refilled transfer does not follow");
}

/// Two rules stand behind each other here: the chain refuses what the session let through.
#[test]
fn control_a_session_that_is_not_flushed_is_found() {
    let faults = Faults { session_not_flushed: true, ..Faults::default() };
    let budget = Budget { cuts: 1, ..CRASHES };
    control(faults, budget, "the hub closes: transfer 1.2");
    let harm = Faults { predecessor_unchecked: true, ..faults };
    control(harm, budget, "R7: transfer 1.2 does not follow");
}

#[test]
fn control_labels_that_do_not_count_are_found() {
    let faults = Faults { labels_not_counted: true, ..Faults::default() };
    control(faults, Budget { cps: 2, ..CRASHES }, "R6: transfer 1.2 says CP 2, CP 1 ends");
}

#[test]
fn control_a_log_dropped_before_its_commit_is_found() {
    let faults = Faults { drop_before_publish: true, ..Faults::default() };
    control(faults, CRASHES, "invariant 1: write 1 is not on the hub");
}

const ALONE: Budget = Budget { writes: 2, cps: 1, losses: 1, cuts: 1, ..NONE };

#[test]
fn control_answers_alone_before_the_mark_are_found() {
    let faults = Faults { alone_before_mark: true, ..Faults::default() };
    control(faults, ALONE, "R4: answers alone without the durable mark");
}

#[test]
fn control_a_mark_that_goes_too_early_is_found() {
    let faults = Faults { mark_cleared_early: true, ..Faults::default() };
    control(faults, ALONE, "R4: answers alone without the durable mark");
    let harm = Faults { actions_unjudged: true, ..faults };
    control(harm, ALONE, "R4: answers alone without the durable mark");
}

const CHANGED: Budget = Budget { writes: 1, reloads: 2, source_crashes: 1, ..NONE };

#[test]
fn control_a_policy_told_before_it_holds_is_found() {
    let faults = Faults { policy_told_early: true, ..Faults::default() };
    control(faults, CHANGED, "R20: write 1");
}

#[test]
fn control_answers_by_a_policy_that_the_hub_does_not_know_are_found() {
    let faults = Faults { policy_kept_early: true, ..Faults::default() };
    control(faults, CHANGED, "R20: write 1");
}

#[test]
fn control_a_forgotten_change_of_policy_is_found() {
    let faults = Faults { next_policy_forgotten: true, ..Faults::default() };
    control(faults, Budget { losses: 1, ..CHANGED }, "R20: write 1");
}

/// R19: refused, refused again, refused with every block inline: repaired by comparison; that
/// refused as well: compared again with the next CP, and with no other.
#[test]
fn no_repair_by_comparison_goes_wrong() {
    let budget = Budget { writes: 1, cps: 1, rejects: 4, ..NONE };
    holds(budget, Budget { cuts: 1, ..budget });
}

/// The same where births tell nothing, cut at any frame and gone on with.
#[test]
fn no_comparison_goes_wrong() {
    let faults = Faults { base_unknown: true, ..Faults::default() };
    let one = Budget { writes: 1, cps: 1, losses: 1, ..NONE };
    let budgets = [
        Budget { writes: 2, ..one },
        Budget { cuts: 1, ..one },
        Budget { hub_crashes: 1, ..one },
        Budget { source_crashes: 1, ..one },
        Budget { rejects: 1, no_space: 1, ..one },
    ];
    for budget in budgets {
        let budget = if is_full() { Budget { writes: 2, cps: 2, ..budget } } else { budget };
        let states = search(faults, budget, (1, 10), 30_000_000).nothing();
        println!("{states} histories, {budget:?}");
    }
}

/// Two CPs alone behind the pass's: they are in the hub's log by then, and are built from it.
const BEHIND: Budget = Budget { writes: 3, cps: 3, losses: 1, ..NONE };

const SHORT: Budget = Budget { writes: 2, cps: 1, losses: 1, ..NONE };

/// The log goes on while the image is brought up, whatever is cut, refused or out of credit meanwhile.
#[test]
fn no_log_behind_a_pass_goes_wrong() {
    let short = [
        Budget { cps: 2, ..BEHIND },
        Budget { hub_crashes: 1, ..SHORT },
        Budget { rejects: 1, ..SHORT },
        Budget { writes: 1, cps: 2, no_space: 1, ..SHORT },
    ];
    let long = [
        BEHIND,
        Budget { cuts: 1, ..SHORT },
        Budget { source_crashes: 1, ..SHORT },
        Budget { no_space: 2, ..SHORT },
        Budget { credits: 1, ..SHORT },
        Budget { cps: 2, hub_crashes: 1, ..SHORT },
        Budget { cps: 2, rejects: 1, no_space: 1, ..SHORT },
        Budget { cps: 2, credits: 1, ..SHORT },
    ];
    let long = if is_full() { &long[..] } else { &[] };
    for &budget in short.iter().chain(long) {
        let states = search(Faults::default(), budget, (1, 10), 30_000_000).nothing();
        println!("{states} histories, {budget:?}");
    }
}

#[test]
fn control_a_log_behind_a_pass_that_counts_early_is_found() {
    let faults = Faults { behind_counts_early: true, ..Faults::default() };
    let problem = search(faults, BEHIND, (1, 10), 3_000_000).problem();
    assert!(problem.contains("R7") || problem.contains("R6"), "{problem}");
}

#[test]
fn control_a_log_behind_a_pass_that_is_not_dropped_is_found() {
    let faults = Faults { behind_not_dropped: true, ..Faults::default() };
    let budget = Budget { rejects: 1, ..SHORT };
    let problem = search(faults, budget, (1, 10), 3_000_000).problem();
    assert!(problem.contains("R7") || problem.contains("R6"), "{problem}");
}

const CUT_PASS: Budget = Budget { writes: 2, cps: 2, losses: 1, cuts: 1, ..NONE };

/// What a cut pass left is of another CP than the newest: only a comparison knows.
#[test]
fn control_a_work_tree_that_is_trusted_is_found() {
    let older_hub = true;
    let faults = Faults { work_trusted: true, base_unknown: true, older_hub, ..Faults::default() };
    control(faults, CUT_PASS, "CP 2 was built from other content");
}

/// A source that answers from what it has by now, not from what it offered.
#[test]
fn control_a_target_that_is_not_pinned_is_found() {
    let faults = Faults { target_unpinned: true, base_unknown: true, ..Faults::default() };
    control(faults, CUT_PASS, "CP 1 was built from other content");
}

/// Both ends have a CP; what may happen from there on, with an old copy of the source among it.
fn from_a_published_cp(faults: Faults) -> Found {
    // That a restored source serves alone without what was acknowledged cannot be helped (R1): what
    // becomes of the hub's image is judged.
    let faults = Faults { actions_unjudged: true, ..faults };
    let budget = Budget { writes: 2, cps: 2, losses: 1, restores: 1, ..NONE };
    let mut world = World::new(faults, budget, (1, 10));
    drive(&mut world, &[], |world| world.hub.image.0.0 == 1 && world.has_converged());
    world.budget = Budget { writes: 1, cps: 1, ..world.budget };
    search_from(world, 3_000_000)
}

/// R5: a source that was restored from an old copy, served alone, and made CPs with the numbers that the
/// hub has published: it is refused, or has no less than the hub.
#[test]
fn no_old_copy_of_the_source_goes_wrong() {
    println!("{} histories", from_a_published_cp(Faults::default()).nothing());
}

/// The next rule stands behind this one: the hub does not let a pass begin that would set it back.
#[test]
fn control_an_image_that_is_no_past_is_found() {
    let faults = Faults { past_unchecked: true, ..Faults::default() };
    let problem = from_a_published_cp(faults).problem();
    assert!(problem.starts_with("the hub closes: a pass from CP 1 to CP 2"), "{problem}");
}
