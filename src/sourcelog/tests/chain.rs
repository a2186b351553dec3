//! Goal: what joins is appended once, what does not is refused by name and changes nothing; the
//! logs of sources and CPs do not touch each other; room and descriptors keep their bounds.

use super::*;

#[test]
fn a_repeat_is_ignored_and_says_so() {
    let files = SimFiles::default();
    let (a, store) = (source(1), store_of(&files, &[source(1)]));
    let mut line = Line::new(1);
    let transfers: Vec<Transfer> = (0..3).map(|_| line.small(5)).collect();
    for transfer in &transfers {
        append(&store, a, transfer);
    }
    let before = files.content(&log_path(a, 5)).unwrap();
    for transfer in &transfers {
        assert_eq!(store.append(a, EPOCH, transfer).unwrap(), Appended::Repeated);
    }
    assert_eq!(files.content(&log_path(a, 5)).unwrap(), before);
    assert_eq!(store.last(a), Some(line.place));
    let bytes = store.bytes(a);
    assert_eq!(bytes, file_offset(&transfers) - 4096);
    assert_eq!(store.room(a), options().limit_bytes_per_source - bytes);
}

#[test]
fn what_does_not_join_is_refused_and_changes_nothing() {
    let files = SimFiles::default();
    let (a, store) = (source(1), store_of(&files, &[source(1)]));
    let mut line = Line::new(1);
    append(&store, a, &line.small(5));
    let mut fork = line.clone();
    fork.chance = Chance::new(77);
    let lost = line.small(5);
    let behind_the_gap = line.small(5);
    let before = files.content(&log_path(a, 5)).unwrap();

    let gap = store.append(a, EPOCH, &behind_the_gap).unwrap_err();
    let LogError::Gap { previous, last, .. } = gap else { panic!("{gap}") };
    assert_eq!((previous, last.counter), (lost.id(), 1));
    // The same id with other content, first unknown to the log, then known.
    append(&store, a, &lost);
    let conflict = store.append(a, EPOCH, &fork.small(5)).unwrap_err();
    assert!(matches!(conflict, LogError::Conflict { .. }), "{conflict}");
    // A fork that names the right predecessor but another history of it.
    let other = store.append(a, EPOCH, &fork.small(5)).unwrap_err();
    assert!(matches!(other, LogError::Conflict { .. }), "{other}");
    let older = line.clone().small(4);
    assert!(matches!(store.append(a, EPOCH, &older), Err(LogError::Gap { .. })));
    append(&store, a, &behind_the_gap);
    let older_cp = line.small(4);
    let error = store.append(a, EPOCH, &older_cp).unwrap_err();
    assert!(error.to_string().contains("CP is older"), "{error}");

    assert_eq!(store.fault(a), None, "a refusal is no fault");
    let now = files.content(&log_path(a, 5)).unwrap();
    assert_eq!(now[4096..before.len()], before[4096..]);
    assert_eq!(files.paths(), [log_path(a, 5)]);
}

#[test]
fn nothing_is_done_for_a_source_that_was_not_recovered() {
    let files = SimFiles::default();
    let store = reopen(&files);
    let transfer = Line::new(1).small(1);
    let error = store.append(source(1), EPOCH, &transfer).unwrap_err();
    assert!(matches!(error, LogError::NotRecovered { .. }));
    assert!(matches!(sync(&store, source(1)), Err(LogError::NotRecovered { .. })));
    assert_eq!((store.room(source(1)), store.last(source(1))), (0, None));
}

/// The ladder: A's CP 1 is dropped while CP 2 and the other source go on untouched.
#[test]
fn sources_and_cps_do_not_touch_each_other() {
    let files = SimFiles::default();
    let (a, b) = (source(1), source(2));
    let store = store_of(&files, &[a, b]);
    let (mut line_a, mut line_b) = (Line::new(1), Line::new(2));
    for cp in [1, 1, 2, 2] {
        append(&store, a, &line_a.small(cp));
        append(&store, b, &line_b.small(cp + 10));
    }
    assert!(matches!(store.reader(a, CpNumber(1)).unwrap().len(), 2));
    assert_eq!(sync(&store, a).unwrap(), line_a.place);
    let kept: Vec<PathBuf> = vec![log_path(a, 2), log_path(b, 11), log_path(b, 12)];
    let before: Vec<_> = kept.iter().map(|path| files.content(path).unwrap()).collect();
    let syncs = files.syncs();

    store.drop_through(a, CpNumber(1)).unwrap();
    assert_eq!(files.syncs(), syncs, "a drop syncs nothing");
    assert_eq!(files.paths(), kept);
    let after: Vec<_> = kept.iter().map(|path| files.content(path).unwrap()).collect();
    assert_eq!(after, before);
    assert_eq!((store.last(a), store.synced(a)), (Some(line_a.place), line_a.place));
    assert_eq!(store.synced(b), Place::default());
    assert_eq!(store.cps(b), [CpNumber(11), CpNumber(12)]);
    let gone = store.reader(a, CpNumber(1)).unwrap_err();
    assert!(matches!(gone, LogError::NoLog { .. }), "{gone}");
    append(&store, a, &line_a.small(2));
}

/// A log whose CP is done before its room was wanted is never synced.
#[test]
fn a_dropped_log_is_never_synced_and_counts_as_synced() {
    let files = SimFiles::default();
    let a = source(1);
    let store = store_of(&files, &[a]);
    let mut line = Line::new(1);
    append(&store, a, &line.small(1));
    assert_eq!(store.synced(a), Place::default());
    store.drop_through(a, CpNumber(1)).unwrap();
    assert_eq!(store.synced(a), line.place);
    assert_eq!(sync(&store, a).unwrap(), line.place);
    assert_eq!(files.syncs(), (0, 0));
    assert_eq!(files.open_now_and_peak().0, 0);
    assert_eq!(store.bytes(a), 0);
}

/// Late transfers of an applied CP are acknowledged and not kept, and the chain goes on (R15).
#[test]
fn late_transfers_of_an_applied_cp_are_not_kept() {
    let files = SimFiles::default();
    let a = source(1);
    let store = store_of(&files, &[a]);
    let mut line = Line::new(1);
    let early = line.small(1);
    append(&store, a, &early);
    store.drop_through(a, CpNumber(1)).unwrap();
    let late = line.small(1);
    assert_eq!(store.append(a, EPOCH, &early).unwrap(), Appended::Repeated);
    assert_eq!(store.append(a, EPOCH, &late).unwrap(), Appended::Repeated);
    assert!(files.paths().is_empty());
    append(&store, a, &line.small(2));
    assert_eq!(files.paths(), [log_path(a, 2)]);

    // The same after a restart that found nothing.
    drop(store);
    let empty = SimFiles::default();
    let store = store_with(&empty, options());
    store.recover(a, CpNumber(1)).unwrap();
    assert_eq!(store.append(a, EPOCH, &late).unwrap(), Appended::Repeated);
    assert!(empty.paths().is_empty());
    let gap = line.small(2);
    assert!(matches!(store.append(a, EPOCH, &gap), Err(LogError::Gap { .. })));
}

#[test]
fn a_full_log_refuses_without_fault_and_room_comes_back() {
    let files = SimFiles::default();
    let a = source(1);
    let store = store_with(&files, LogOptions { limit_bytes_per_source: 1024, ..options() });
    store.recover(a, CpNumber(0)).unwrap();
    let mut line = Line::new(1);
    append(&store, a, &line.small(1));
    append(&store, a, &line.small(2));
    let third = line.small(2);
    let error = store.append(a, EPOCH, &third).unwrap_err();
    assert!(matches!(error, LogError::Full { wanted_bytes: 512, room_bytes: 0, .. }), "{error}");
    assert_eq!((store.fault(a), store.room(a)), (None, 0));
    store.drop_through(a, CpNumber(1)).unwrap();
    assert_eq!(store.room(a), 512);
    append(&store, a, &third);
}

/// More sources than descriptors, all dirty: the bound holds, and a file is closed only after its
/// fdatasync.
#[test]
fn descriptors_keep_their_bound_and_no_dirty_file_is_closed_unsynced() {
    let files = SimFiles::default();
    let sources: Vec<SourceId> = (1..=9).map(source).collect();
    let store = store_of(&files, &sources);
    let mut lines: Vec<Line> = (1..=9).map(Line::new).collect();
    for _ in 0..3 {
        for (source, line) in sources.iter().zip(&mut lines) {
            append(&store, *source, &line.small(1));
        }
    }
    let (now, peak) = files.open_now_and_peak();
    assert_eq!((now, peak), (4, 4));
    // What was closed is on the medium: a power cut that takes all unsynced data leaves it there.
    let cut = files.power_cut(&mut Chance::new(0), false);
    let closed = files.syncs().0;
    assert_eq!(closed, 9 * 3 - 4, "each round closes each file once");
    drop(cut);
    for (_, result) in store.sync(&sources) {
        result.unwrap();
    }
    assert!(files.open_now_and_peak().1 <= 4);
    let store = store_with(&files.power_cut(&mut Chance::new(1), false), options());
    for (source, line) in sources.iter().zip(&lines) {
        let found = store.recover(*source, CpNumber(0)).unwrap();
        assert_eq!(found.last, Some(line.place));
    }
}

#[test]
fn options_out_of_bounds_are_named() {
    let bad = |options| {
        let files = Arc::new(SimFiles::default());
        LogStore::open_with(files, Path::new(ROOT), HUB, options).unwrap_err().to_string()
    };
    assert!(bad(LogOptions { files_open_max: 0, ..options() }).contains("files_open_max"));
    assert!(bad(LogOptions { step_bytes: 0, ..options() }).contains("step_bytes"));
}

/// R1: a cut drops everything behind its place, durably, over several files.
#[test]
fn a_cut_is_durable_and_a_new_line_follows() {
    let a = source(1);
    let mut line = Line::new(1);
    let transfers: Vec<Transfer> = [1, 1, 1, 2, 2, 3].iter().map(|cp| line.small(*cp)).collect();
    for synced in [false, true] {
        for keep in 1..transfers.len() {
            let files = SimFiles::default();
            let store = store_of(&files, &[a]);
            transfers.iter().for_each(|transfer| append(&store, a, transfer));
            if synced {
                sync(&store, a).unwrap();
            }
            let at = place(&transfers[keep - 1]);
            store.cut(a, at).unwrap();
            assert_eq!(store.last(a), Some(at));
            let seen = files.power_cut(&mut Chance::new(to_u64(keep)), true);
            let again = reopen(&seen);
            let found = again.recover(a, CpNumber(0)).unwrap();
            assert!(found.damage().is_none(), "{:?}", found.damage());
            let last = found.last.unwrap_or_default();
            assert!(last.transfer <= at.transfer, "cut to {keep} came back as {last:?}");
            assert!(!synced || last == at, "synced {keep} came back as {last:?}");

            let mut other = Line { place: at, generation: 2, chance: Chance::new(5) };
            append(&store, a, &other.small(3));
            assert_eq!(sync(&store, a).unwrap(), other.place);
        }
    }
}

#[test]
fn a_cut_at_an_unknown_place_changes_nothing() {
    let files = SimFiles::default();
    let a = source(1);
    let store = store_of(&files, &[a]);
    let mut line = Line::new(1);
    append(&store, a, &line.small(1));
    let good = line.place;
    append(&store, a, &line.small(1));
    let before = files.content(&log_path(a, 1)).unwrap();
    let mut wrong = good;
    wrong.hash.0[0] ^= 1;
    let error = store.cut(a, wrong).unwrap_err();
    assert!(matches!(error, LogError::NoPlace { .. }), "{error}");
    let beyond = {
        line.small(1);
        line.place
    };
    assert!(matches!(store.cut(a, beyond), Err(LogError::NoPlace { .. })));
    assert_eq!(files.content(&log_path(a, 1)).unwrap(), before);
    assert_eq!(store.fault(a), None);
}

/// R4: the staged log is dropped whole and begins again at a newer place.
#[test]
fn a_reset_begins_a_new_chain() {
    let files = SimFiles::default();
    let a = source(1);
    let store = store_of(&files, &[a]);
    let mut line = Line::new(1);
    append(&store, a, &line.small(1));
    append(&store, a, &line.small(2));
    line.small(2);
    let base = line.place;
    store.reset(a, Some(base)).unwrap();
    assert!(files.paths().is_empty());
    assert_eq!(store.last(a), Some(base));
    let next = line.small(3);
    append(&store, a, &next);
    assert_eq!(store.reader(a, CpNumber(3)).unwrap().start(), base);
}

/// More logs are written in turn than may be open: who closes one syncs many, and all is read again.
#[test]
fn many_logs_are_closed_behind_one_sync() {
    let files = SimFiles::default();
    let store = store_with(&files, LogOptions { files_open_max: 32, ..options() });
    let mut lines: Vec<Line> = (1..=96).map(Line::new).collect();
    for n in 1..=96 {
        store.recover(source(n), CpNumber(0)).unwrap();
    }
    for _ in 0..3 {
        for (n, line) in (1..).zip(&mut lines) {
            append(&store, source(n), &line.small(1));
        }
    }
    assert!(store.syncs() < 32, "{} syncs for 288 writes", store.syncs());
    for (n, line) in (1..).zip(&lines) {
        let reader = store.reader(source(n), CpNumber(1)).unwrap();
        assert_eq!(ids(&reader).unwrap().last(), Some(&line.place.transfer));
    }
}
