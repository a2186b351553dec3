//! Goal: what is sent behind a pass is nobody's history until the pass is published; then it is the
//! source's log, and after a cut at any call a prefix of it.

use super::super::behind::path_of;
use super::super::sim::Op;
use super::*;

const WRITEBACK: u64 = 4096;

/// A source with a log of an old line, of CPs up to 7, and what came behind a pass to CP 5: `count`
/// transfers of CPs 6 and 7, places of all.
fn two_lines(files: &SimFiles, store: &LogStore, count: u32) -> (Place, Vec<Place>) {
    let a = source(1);
    let mut old = Line::new(1);
    for cp in [6, 7] {
        append(store, a, &old.small(cp));
    }
    sync(store, a).unwrap();
    let mut line = Line::new(2);
    line.small(5);
    let base = line.place;
    let before = (store.bytes(a), store.room(a));
    store.begin_behind(a, base, CpNumber(5)).unwrap();
    let mut places = vec![base];
    for number in 0..count {
        let transfer = line.write(6 + number * 2 / count, 0, 5000);
        let done = store.append_behind(a, EPOCH, &transfer, WRITEBACK).unwrap();
        assert!(matches!(done, Appended::Written { .. }));
        places.push(line.place);
    }
    assert_eq!(store.bytes(a), before.0, "it is none of the log");
    assert_eq!(store.room(a), before.1 - store.behind_bytes(a), "and takes its room");
    assert_eq!(store.last(a), Some(old.place));
    assert!(files.content(&path_of(Path::new(ROOT), a, CpNumber(6))).is_some());
    (base, places)
}

/// Places where the logs found by a start begin and end, and whether all is sound.
fn found(files: &SimFiles, applied: u32) -> (Option<Place>, Option<Place>) {
    let found = reopen(files).recover(source(1), CpNumber(applied)).unwrap();
    assert!(found.damage().is_none(), "{:?}", found.damage());
    (found.logs.first().map(|log| log.start), found.last)
}

#[test]
fn what_is_behind_becomes_the_log() {
    let (files, a) = (SimFiles::default(), source(1));
    let store = store_of(&files, &[a]);
    let (base, places) = two_lines(&files, &store, 6);
    let last = *places.last().unwrap();
    assert_eq!(store.adopt_behind(a, base).unwrap(), last);
    assert_eq!((store.last(a), store.synced(a)), (Some(last), last));
    assert_eq!(store.ends(a), [(CpNumber(6), places[3]), (CpNumber(7), last)]);
    assert_eq!(ids(&store.reader(a, CpNumber(7)).unwrap()).unwrap().len(), 3);
    assert_eq!(store.behind_bytes(a), 0);
    // It goes on, in the file that was renamed, and a cut keeps what was synced.
    let mut line = Line { place: last, generation: 1, chance: Chance::new(3) };
    append(&store, a, &line.small(7));
    sync(&store, a).unwrap();
    for seed in 0..20 {
        let after = files.power_cut(&mut Chance::new(seed), true);
        assert_eq!(found(&after, 5), (Some(base), Some(line.place)));
    }
}

/// Nobody has been told that anything of it is here.
#[test]
fn a_start_knows_nothing_of_what_is_behind() {
    let (files, a) = (SimFiles::default(), source(1));
    let store = store_of(&files, &[a]);
    let (_, _) = two_lines(&files, &store, 4);
    let old = store.last(a);
    let after = files.copy();
    assert_eq!(found(&after, 5).1, old);
    let behind = |path: &PathBuf| path.to_string_lossy().contains("/behind/");
    assert!(files.paths().iter().any(behind) && !after.paths().iter().any(behind));
}

/// What was dropped, or belongs to another pass, is not taken for the log.
#[test]
fn what_was_dropped_is_not_adopted() {
    let a = source(1);
    for dropped in [true, false] {
        let files = SimFiles::default();
        let store = store_of(&files, &[a]);
        let (base, places) = two_lines(&files, &store, 4);
        let other = places[1];
        if dropped {
            store.drop_behind(a);
            let transfer = Line { place: base, generation: 1, chance: Chance::new(1) }.small(6);
            assert!(store.append_behind(a, EPOCH, &transfer, WRITEBACK).is_err());
        }
        let base = if dropped { base } else { other };
        assert_eq!(store.adopt_behind(a, base).unwrap(), base);
        assert_eq!((store.last(a), store.bytes(a)), (Some(base), 0));
        assert_eq!(store.fault(a), None);
    }
}

/// It has no more room than the log leaves it, and its failure is not the log's.
#[test]
fn what_fails_behind_is_no_fault_of_the_log() {
    let a = source(1);
    let files = SimFiles::default();
    let store = store_of(&files, &[a]);
    let (base, places) = two_lines(&files, &store, 2);
    let mut line = Line { place: places[2], generation: 1, chance: Chance::new(1) };
    files.fail(Op::Write, "/behind/", 28);
    let refused = store.append_behind(a, EPOCH, &line.small(7), WRITEBACK).unwrap_err();
    assert!(matches!(refused, LogError::Io { .. }), "{refused}");
    files.heal();
    assert_eq!(store.fault(a), None);
    assert_eq!(store.adopt_behind(a, base).unwrap(), base, "what failed once is not believed");

    let files = SimFiles::default();
    let small = LogOptions { limit_bytes_per_source: 16 << 10, ..options() };
    let store = store_with(&files, small);
    store.recover(a, CpNumber(0)).unwrap();
    let (base, places) = two_lines(&files, &store, 2);
    let mut line = Line { place: places[2], generation: 1, chance: Chance::new(1) };
    let refused = store.append_behind(a, EPOCH, &line.write(7, 0, 5000), WRITEBACK).unwrap_err();
    assert!(matches!(refused, LogError::Full { .. }), "{refused}");
    assert_eq!(store.adopt_behind(a, base).unwrap(), places[2], "what it had room for is whole");
}

/// Cut or failed at each call of the adoption: a start finds the old line as it was, or a prefix of the new
/// one, whole up to where that ends; what was said to be the log is all there.
#[test]
fn adopted_whole_in_part_or_not() {
    let a = source(1);
    let mut met = std::collections::BTreeSet::new();
    for (call, power) in (0..).flat_map(|call| [(call, false), (call, true)]) {
        let files = SimFiles::default();
        let store = store_of(&files, &[a]);
        let (base, places) = two_lines(&files, &store, 6);
        let old = store.last(a).unwrap();
        files.die_at(files.calls() + call + 1);
        let adopted = store.adopt_behind(a, base);
        if files.will_fail() {
            assert_eq!(adopted.unwrap(), *places.last().unwrap());
            break;
        }
        met.insert(format!("{:?}", files.struck().unwrap()));
        for seed in 0..16 {
            let after = match power {
                true => files.power_cut(&mut Chance::new(seed), true),
                false => files.copy(),
            };
            let (start, last) = found(&after, 5);
            let is_old = last == Some(old) || start.is_some_and(|start| start == Place::default());
            let is_new = start == Some(base) && last.is_some_and(|last| places.contains(&last));
            assert!(is_old || is_new || last.is_none(), "call {call}: {start:?} {last:?}");
            if let Ok(adopted) = adopted {
                assert!(last.is_none_or(|last| last == adopted || adopted == base), "{last:?}");
            }
        }
    }
    for kind in ["Sync", "Write", "SyncDir", "Remove", "Rename"] {
        assert!(met.contains(kind), "{kind} never came: {met:?}");
    }
}

/// Names that are not made durable one by one leave logs with a gap, which no start may go on from.
#[test]
fn control_unsynced_names_leave_a_gap() {
    let a = source(1);
    let gap = (0..200).any(|seed| {
        let files = SimFiles::default();
        let store = store_of(&files, &[a]);
        let (base, places) = two_lines(&files, &store, 6);
        files.without_sync();
        let adopted = store.adopt_behind(a, base).unwrap();
        assert_eq!(adopted, *places.last().unwrap());
        let after = files.power_cut(&mut Chance::new(seed), false);
        let found = reopen(&after).recover(a, CpNumber(5)).unwrap();
        found.last != Some(adopted)
    });
    assert!(gap, "what was never synced is always there");
}
