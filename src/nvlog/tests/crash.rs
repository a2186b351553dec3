//! Power cuts, kills, failures and lies of the device, each at every possible call.

use std::collections::BTreeSet;

use super::*;
use crate::device::sim::{Effect, On};
use crate::device::{DeviceError, Durability};
use crate::units::convert::to_u64;

/// Power goes in the `nth` write of a batch of records of these sectors; of its sectors that write
/// was about to make durable, the ones survive that `kept` has a bit for. Says how many records,
/// counted from the first, are whole on the medium.
fn torn_commit(
    sim: &SimDevice,
    driven: &mut Driven,
    first: u64,
    sectors: &[usize],
    torn: Torn,
) -> usize {
    let Torn { nth, kept } = torn;
    let capacity = driven.handle.status().capacity.0;
    let start = driven.handle.status().written.0;
    let physical = |position: u64| 16 + position % capacity / 512;
    let records = (first..).zip(sectors);
    records.for_each(|(ticket, sectors)| driven.feed.push(ticket, *sectors));
    sim.fail_change(nth, Effect::PowerCut);
    assert!(driven.committer.turn().is_err());
    assert_eq!(sim.forget_faults(), 0);

    let mut survived: BTreeSet<u64> = BTreeSet::new();
    if nth == 1 {
        // The part before the end of the area was durable already.
        survived.extend(16 + start % capacity / 512..16 + capacity / 512);
    }
    let mut asked = 0;
    sim.power_cut_choosing(&mut |sector, versions| {
        let keep = kept >> asked & 1 == 1;
        asked += 1;
        if keep {
            survived.insert(sector);
        }
        if keep { versions } else { 0 }
    });
    sim.power_on();
    let mut position = start;
    let whole = |sectors: &&usize| {
        let end = position + to_u64(**sectors) * 512;
        let all = (position..end).step_by(512).all(|at| survived.contains(&physical(at)));
        position = end;
        all
    };
    sectors.iter().take_while(whole).count()
}

#[derive(Debug, Clone, Copy)]
struct Torn {
    nth: u64,
    kept: u32,
}

/// All the ways in which a batch of so many sectors at `start` can be torn.
fn all_torn(start: u64, capacity: u64, sectors: u64) -> Vec<Torn> {
    let head = sectors.min((capacity - start % capacity) / 512);
    let subsets = |nth, sectors| (0..1u32 << sectors).map(move |kept| Torn { nth, kept });
    let mut all = Vec::from_iter(subsets(0, head));
    if head < sectors {
        all.extend(subsets(1, sectors - head));
    }
    all
}

/// A ring of 16 sectors, `before` sectors in, with a durable and released past and one durable
/// record of two sectors that is not released; its ticket is 1.
fn ring_after(before: usize) -> (Arc<SimDevice>, Driven) {
    let sim = small_ring(2);
    let mut driven = drive(sim.clone()).unwrap();
    for ticket in 0..before {
        driven.commit(1000 + to_u64(ticket), &[1]);
        driven.release_all();
    }
    driven.committer.finish().unwrap();
    driven.commit(1, &[2]);
    (sim, driven)
}

/// Goal: however a group commit of three records of two sources is torn, and however the first
/// commit after the recovery is torn again or not, history is the acknowledged record, then a
/// prefix of the first batch, then a prefix of the second; a record once cut never comes back.
/// Method: all subsets of the sectors of both, at places in the area where neither, the first or
/// the second wraps, with second batches that end where each record of the first one began.
#[test]
fn what_was_cut_never_comes_back() {
    let outcome = exhaust(ALL_STEPS);
    assert_eq!(outcome.violations, 0);
    assert!(outcome.histories > 3000, "{outcome:?}");
    // Control: without the erasure some of these histories bring a cut record back.
    let control = exhaust(Steps { erase: false, ..ALL_STEPS });
    assert!(control.violations > 0, "{control:?}");
}

#[derive(Debug, Default)]
struct Outcome {
    histories: u64,
    violations: u64,
}

fn exhaust(steps: Steps) -> Outcome {
    let mut outcome = Outcome::default();
    for before in 0..16 {
        let start = (to_u64(before) + 2) * 512;
        for first_torn in all_torn(start, 8192, 4) {
            // An image of the device after the first recovery: the second batch starts from it.
            let (sim, mut driven) = ring_after(before);
            let whole = torn_commit(&sim, &mut driven, 10, &[1, 2, 1], first_torn);
            drop(driven);
            let driven = drive_with(sim.clone(), steps).unwrap();
            let mut wanted = vec![1, 10, 11, 12];
            wanted.truncate(1 + whole);
            assert_eq!(driven.tickets_found(), wanted, "{before} {first_torn:?}");
            assert_eq!(driven.recovery.damage, vec![]);
            let (image, end) = (sim.image(), driven.recovery.end.0);
            assert!(sim.volatile_sectors().is_empty(), "what was recovered is durable");
            for second in [&[1][..], &[2], &[3], &[1, 1]] {
                let sectors = to_u64(second.iter().sum::<usize>());
                for second_torn in all_torn(end, 8192, sectors) {
                    let sim = Arc::new(SimDevice::from_image("ring", image.clone()));
                    let mut driven = drive_with(sim.clone(), steps).unwrap();
                    let whole = torn_commit(&sim, &mut driven, 20, second, second_torn);
                    drop(driven);
                    let found = drive_with(sim, steps).unwrap().tickets_found();
                    let new = Vec::from_iter((20..).take(whole));
                    outcome.histories += 1;
                    outcome.violations += u64::from(found != [&wanted[..], &new].concat());
                }
            }
        }
    }
    outcome
}

/// A device that calls a cached write durable.
#[derive(Debug)]
struct Liar(Arc<SimDevice>);

impl Device for Liar {
    fn name(&self) -> Arc<str> {
        self.0.name()
    }

    fn size(&self) -> ByteCount {
        self.0.size()
    }

    fn alignment(&self) -> ByteCount {
        self.0.alignment()
    }

    fn durability(&self) -> Durability {
        self.0.durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.0.write_at(offset, bytes)
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.0.write_at(offset, bytes)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.0.flush()
    }
}

/// Goal: acknowledged means on the medium. Method: commit, cut the power keeping nothing that is
/// volatile. Control: the same over a plain cached write loses what was acknowledged.
#[test]
fn acknowledged_records_survive_and_without_the_durable_write_they_do_not() {
    for lie in [false, true] {
        let sim = small_ring(4);
        let device: Arc<dyn Device> = if lie { Arc::new(Liar(sim.clone())) } else { sim.clone() };
        let mut driven = drive(device).unwrap();
        driven.commit(0, &[1, 3, 2]);
        driven.commit(3, &[1]);
        assert_eq!(driven.feed.tickets(), [0, 1, 2, 3], "all were acknowledged");
        drop(driven);
        sim.power_cut_choosing(&mut |_, _| 0);
        sim.power_on();
        let found = drive(sim).unwrap().tickets_found();
        assert_eq!(found, if lie { vec![] } else { vec![0, 1, 2, 3] });
    }
}

/// Goal: what a killed process left in the cache and a reopening found counts as durable, so it
/// must be; also when the write failed and the kernel forgot that. Control: without
/// writing it again at the opening a later power cut takes it back.
#[test]
fn what_a_reopening_finds_is_durable_before_it_counts() {
    for (rewrite, effect) in [
        (true, Effect::PowerCut),
        (true, Effect::Errno(5)),
        (false, Effect::PowerCut),
        (false, Effect::Errno(5)),
    ] {
        let sim = small_ring(4);
        let mut driven = drive(sim.clone()).unwrap();
        driven.commit(0, &[1]);
        driven.feed.push(1, 2);
        sim.fail_change(0, effect);
        assert!(driven.committer.turn().is_err());
        // Killed, not cut: the cache lives on.
        sim.power_on();
        let driven = drive_with(sim.clone(), Steps { rewrite, ..ALL_STEPS }).unwrap();
        assert_eq!(driven.tickets_found(), [0, 1], "found, and so acknowledged by Welcome");
        drop(driven);
        sim.power_cut_choosing(&mut |_, _| 0);
        sim.power_on();
        let again = drive(sim).unwrap();
        assert_eq!(again.tickets_found(), if rewrite { vec![0, 1] } else { vec![0] });
        assert_eq!(again.recovery.damage.is_empty(), rewrite);
    }
}

/// One life of a ring: laps, wraps, releases, a clean end. Stops at the first error as the thread
/// does; says what was acknowledged and not yet given up, and what was asked for after that.
fn life(sim: &Arc<SimDevice>) -> (Vec<u64>, Vec<u64>, bool) {
    let mut given = 0;
    let Ok(mut driven) = drive(sim.clone()) else { return (vec![], vec![], false) };
    let mut wanted_release = LogPosition(0);
    let mut whole = true;
    for round in 0..14usize {
        let sizes = [&[1, 2][..], &[3], &[2, 2, 1], &[4]][round % 4];
        for sectors in sizes {
            driven.feed.push(given, *sectors);
            given += 1;
        }
        while whole {
            match driven.committer.turn() {
                Ok(Turn::Committed) => {}
                Ok(Turn::Empty) => break,
                Ok(Turn::NoRoom) => {
                    let queue = driven.feed.queue();
                    let oldest =
                        queue.committed.iter().find(|committed| committed.end > wanted_release);
                    wanted_release = oldest.unwrap().end;
                    drop(queue);
                    driven.handle.release(wanted_release);
                }
                Err(_) => whole = false,
            }
        }
    }
    whole = whole && driven.committer.finish().is_ok();
    // After an error nothing more may be acknowledged, whatever the device says now.
    let queue = driven.feed.queue();
    let kept = queue.committed.iter().filter(|committed| committed.end > wanted_release);
    let kept = Vec::from_iter(kept.map(|committed| committed.ticket));
    let acknowledged = to_u64(queue.committed.len());
    (kept, Vec::from_iter(acknowledged..given), whole)
}

fn check(sim: &Arc<SimDevice>, kept: &[u64], rest: &[u64], what: &str) {
    let driven = drive(sim.clone()).unwrap();
    assert_eq!(driven.recovery.damage, vec![], "{what}");
    let found = driven.tickets_found();
    // Released ones may still be there; then all that was acknowledged; then a prefix of the rest.
    let known = kept.first().or(rest.first()).copied().unwrap_or(u64::MAX);
    let older = found.iter().take_while(|ticket| **ticket < known).count();
    let (older, newer) = found.split_at(older);
    assert!(older.is_sorted(), "{what}: {found:?}");
    let all = [kept, rest].concat();
    assert!(newer.len() >= kept.len() && all.starts_with(newer), "{what}: {found:?} {kept:?}");
}

/// Rule 17: the n-th write or flush fails, for all n, in every way; and the process is then killed
/// or the power is cut. Nothing acknowledged is lost, nothing never written is found.
#[test]
fn the_nth_change_fails_for_all_n() {
    let effects = [Effect::Errno(5), Effect::Errno(28), Effect::Short(512), Effect::PowerCut];
    for effect in effects {
        for seed in 0..6 {
            for nth in 0.. {
                let sim = small_ring(2);
                sim.fail_change(nth, effect);
                let (kept, rest, whole) = life(&sim);
                let what = format!("{effect:?} at change {nth}, seed {seed}");
                if sim.forget_faults() == 1 {
                    assert!(whole && nth > 20, "{what}: a life has more changes than that");
                    break;
                }
                assert!(!whole, "{what}");
                if seed > 0 {
                    sim.power_cut(seed * 1000 + nth);
                }
                sim.power_on();
                // A failing or dying recovery leaves what the next one needs.
                sim.fail_change(nth % 7, Effect::PowerCut);
                if drive(sim.clone()).is_err() {
                    sim.power_cut(seed + nth * 1000);
                    sim.power_on();
                }
                sim.forget_faults();
                check(&sim, &kept, &rest, &what);
                check(&sim, &kept, &rest, &what);
            }
        }
    }
}

/// Rule 3 test 6: a release that was asked for and not written down is forgotten by a crash, and
/// more is found, never less; after 1, 2, 3 laps and with records that end where the area does.
#[test]
fn a_crash_forgets_releases_that_were_not_durable() {
    for laps in 1..4u64 {
        let sim = small_ring(1);
        let mut driven = drive(sim.clone()).unwrap();
        for ticket in 0..laps * 2 {
            // Two of four sectors each fill the area to its last byte.
            driven.commit(ticket, &[4]);
            driven.release_all();
        }
        let durable_release = driven.handle.status().released;
        assert!(durable_release < driven.handle.status().release_wanted);
        drop(driven);
        sim.power_cut(7);
        sim.power_on();
        let driven = drive(sim).unwrap();
        assert_eq!(driven.recovery.released, durable_release);
        assert_eq!(driven.recovery.end.0, laps * 4096);
        let first = durable_release.0 / 2048;
        assert_eq!(driven.tickets_found(), Vec::from_iter(first..laps * 2));
        assert!(!driven.recovery.header_stale && driven.recovery.damage.is_empty());
    }
}

/// Rot in acknowledged history is named, stays named at the next opening, and is gone when its
/// space is released; what comes before and after is found.
#[test]
fn rot_is_named_until_it_is_released() {
    let sim = small_ring(4);
    let mut driven = drive(sim.clone()).unwrap();
    driven.commit(0, &[1, 2]);
    driven.commit(2, &[3]);
    driven.commit(3, &[1]);
    drop(driven);
    sim.rot(8192 + 512 + 600, &[0x80]);
    for _ in 0..2 {
        let driven = drive(sim.clone()).unwrap();
        assert_eq!(borders(&driven.recovery.damage), [(512, 1536)]);
        assert_eq!(driven.recovery.damage[0].source, Some(SourceId([2; 16])));
        assert_eq!(driven.tickets_found(), [0, 2, 3]);
    }
    let mut driven = drive(sim.clone()).unwrap();
    driven.commit(4, &[2]);
    driven.handle.release(LogPosition(1536));
    driven.committer.finish().unwrap();
    drop(driven);
    let driven = drive(sim).unwrap();
    assert_eq!(borders(&driven.recovery.damage), []);
    assert_eq!(driven.tickets_found(), [2, 3, 4]);
}

/// The last record rots: the header that counts it tells, and without one it looks torn (the
/// residue of rules.md).
#[test]
fn rot_of_the_last_record_is_told_by_the_header() {
    for header in [true, false] {
        let sim = small_ring(4);
        let mut driven = drive(sim.clone()).unwrap();
        driven.commit(0, &[1]);
        driven.commit(1, &[2]);
        if header {
            driven.committer.finish().unwrap();
        }
        drop(driven);
        sim.rot(8192 + 512 + 40, &[1]);
        let driven = drive(sim).unwrap();
        assert_eq!(driven.tickets_found(), [0]);
        let wanted = if header { vec![(512, 1536)] } else { vec![] };
        assert_eq!(borders(&driven.recovery.damage), wanted);
        assert_eq!(driven.recovery.end.0, if header { 1536 } else { 512 });
    }
}

/// A device that lies once: the write is lost or goes elsewhere. Later records tell.
#[test]
fn a_lost_or_misdirected_commit_is_damage() {
    for (effect, damaged) in [
        (Effect::Lost, vec![(1024, 2048)]),
        (Effect::Misdirected(8192), vec![(0, 2048)]),
        (Effect::Misdirected(8192 + 6 * 512), vec![(1024, 2048)]),
    ] {
        let sim = small_ring(4);
        let mut driven = drive(sim.clone()).unwrap();
        driven.commit(0, &[2]);
        sim.fail(On::WriteDurable, 0, effect);
        driven.commit(1, &[2]);
        driven.commit(2, &[1]);
        drop(driven);
        let driven = drive(sim.clone()).unwrap();
        assert_eq!(borders(&driven.recovery.damage), damaged, "{effect:?}");
        assert_eq!(driven.tickets_found().last(), Some(&2));
        assert_eq!(driven.recovery.end.0, 2560);
        // Nobody is fooled the second time either.
        let again = drive(sim).unwrap();
        assert_eq!(again.recovery.damage, driven.recovery.damage);
    }
}

/// A short record behind a long one in the same buffer carries nothing of it, and bodies of any
/// length come back as they were.
#[test]
fn padding_is_zero_and_any_length_is_kept() {
    let sim = small_ring(4);
    let mut driven = drive(sim.clone()).unwrap();
    let lengths = [900, 1, 384, 385, 511, 7];
    for round in 0..2 {
        for (ticket, length) in (0..).zip(lengths) {
            let body = Bytes::from(vec![0xff; length]);
            driven.feed.queue().pending.push_back(Pending { body, ..pending(ticket, 1) });
        }
        assert_eq!(driven.committer.turn().unwrap(), Turn::Committed);
        let queue = driven.feed.queue();
        for committed in &queue.committed[round * lengths.len()..] {
            let (envelope, body) = driven.handle.read(committed.position).unwrap();
            assert_eq!(body, committed.body);
            assert_eq!(envelope.position, committed.position);
            let image = sim.image();
            let record = 8192 + usize::try_from(committed.position.0).unwrap();
            let end = 8192 + usize::try_from(committed.end.0).unwrap();
            assert!(image[record + ENVELOPE_BYTES + body.len()..end].iter().all(|b| *b == 0));
        }
    }
}
