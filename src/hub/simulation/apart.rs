//! What is drawn apart from the other draws of a seed, so that these stay what they were: caches, old
//! copies, and faults in an order that chance alone seldom finds.

use super::setup::{Fault, Planned, SourceSetup};
use crate::device::sim::Chance;
use crate::units::convert::{to_u64, to_usize};
use crate::units::policy::Cache;

pub(super) fn draw(seed: u64, sources: &mut [SourceSetup], faults: &mut Vec<Planned>) {
    let mut chance = Chance::new(seed ^ 0x5eed_cace);
    for (at, source) in sources.iter_mut().enumerate() {
        if chance.below(5) == 0 {
            source.policy.cache = Cache::Writeback;
        }
        if source.policy.never_alone() && chance.below(4) == 0 {
            restore(at, faults, &mut chance);
        }
    }
    let mut chance = Chance::new(seed ^ 0xfa11_bacd);
    let (over_and_back, full) = (chance.below(5) == 0, chance.below(8) == 0);
    let source = to_usize(chance.below(to_u64(sources.len())));
    let copied = faults.iter().any(|planned| matches!(planned.fault, Fault::OldCopy { .. }));
    if over_and_back && !copied {
        let at_ms = 300 + chance.below(500);
        faults.push(Planned { at_ms, fault: Fault::Failover { source } });
        let at_ms = at_ms + 700 + chance.below(700);
        faults.push(Planned { at_ms, fault: Fault::Failback { source } });
    }
    if full {
        // From the beginning: what a source was promised once lasts for a whole small volume.
        let ms = 300 + chance.below(900);
        faults.push(Planned { at_ms: 0, fault: Fault::Full { end: source, ms } });
    }
    rot(seed, sources, faults);
    faults.sort_by_key(|planned| planned.at_ms);
}

/// Of every eleven seeds four have rot of a ring or a log, so that the others stay what they were. Where an
/// old copy is started, or data rots as well, nobody might have what was lost.
fn rot(seed: u64, sources: &[SourceSetup], faults: &mut Vec<Planned>) {
    let of = seed % 11;
    let copied = |planned: &Planned| matches!(planned.fault, Fault::OldCopy { .. });
    let rots = |planned: &Planned| matches!(planned.fault, Fault::Rot { .. } | Fault::Lie { .. });
    // What a source has lost is in the hub's log or image, which data rot leaves readable from here.
    if faults.iter().any(|planned| copied(planned) || rots(planned) && of != 9) {
        return;
    }
    let mut chance = Chance::new(seed ^ 0x0707_1211);
    let source = to_usize(chance.below(to_u64(sources.len())));
    // One that asks its hub before it serves, if there is one.
    let waits = sources.iter().position(SourceSetup::asks_first);
    let at_ms = 400 + chance.below(1500);
    let (seed, power) = (chance.next_u64(), chance.below(2) == 0);
    let fault = match of {
        4 => Fault::RotRing { end: sources.len(), power: true, seed },
        7 => Fault::RotLog { power, seed },
        9 => match waits {
            Some(end) => Fault::RotRing { end, power, seed },
            None => return,
        },
        10 => Fault::RotRing { end: sources.len(), power, seed },
        _ => return,
    };
    if of == 10 {
        // In the middle of it.
        let at_ms = at_ms.saturating_sub(20 + chance.below(900));
        faults.push(Planned { at_ms, fault: Fault::Failover { source } });
    }
    faults.push(Planned { at_ms, fault });
}

/// An old copy of the source is started: it is of the moment of a kill. A source that is failed over
/// is another history.
fn restore(source: usize, faults: &mut Vec<Planned>, chance: &mut Chance) {
    faults.retain(|planned| {
        !matches!(planned.fault, Fault::Failover { .. } | Fault::Failback { .. })
    });
    let killed = 300 + chance.below(600);
    let boots = chance.below(5);
    let mut plan = |at_ms, fault| faults.push(Planned { at_ms, fault });
    plan(killed, Fault::SourceKill { source });
    plan(killed + 1600 + chance.below(400), Fault::OldCopy { source, boots });
}
