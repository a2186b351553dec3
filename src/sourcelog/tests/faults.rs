//! Goal: an error of a write or sync faults its own source with the first reason, and no other;
//! nothing is taken for durable that is not.

use std::sync::mpsc::channel;
use std::time::Duration;

use super::super::sim::Op;
use super::*;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Each way a write can fail: the source is faulted by name, the other goes on, and after the
/// cause is gone nothing that was synced is missing.
#[test]
fn a_failed_write_faults_its_source_only() {
    let (a, b) = (source(1), source(2));
    for (op, errno) in
        [(Op::Write, EIO), (Op::ShortWrite, ENOSPC), (Op::Allocate, ENOSPC), (Op::Create, ENOSPC)]
    {
        let files = SimFiles::default();
        let store = store_of(&files, &[a, b]);
        let (mut line_a, mut line_b) = (Line::new(1), Line::new(2));
        append(&store, a, &line_a.small(1));
        let safe = sync(&store, a).unwrap();
        let unsynced = line_a.small(1);
        append(&store, a, &unsynced);
        files.fail(op, &a.to_string(), errno);
        // Long enough to want the next step of space, and a file of its own for `Create`.
        let failing = line_a.write(2, 0, 100_000);
        let error = store.append(a, EPOCH, &failing).unwrap_err();
        assert!(matches!(error, LogError::Io { .. }), "{op:?}: {error}");
        let reason = store.fault(a).unwrap();
        assert_eq!(&*reason, error.to_string());
        assert!(
            reason.contains(&a.to_string()) && reason.contains("cp-0000000002.log"),
            "{reason}"
        );
        assert_eq!(store.room(a), 0, "a faulted source gets no credit");

        append(&store, b, &line_b.small(1));
        let results = store.sync(&[a, b]);
        assert!(matches!(results[0].1, Err(LogError::Faulted { .. })));
        assert_eq!(*results[1].1.as_ref().unwrap(), line_b.place);
        assert_eq!((store.fault(b), store.synced(b)), (None, line_b.place));
        files.heal();
        let still = store.append(a, EPOCH, &failing).unwrap_err();
        assert!(
            matches!(still, LogError::Faulted { .. }),
            "latched until the store is opened again"
        );
        assert_eq!(store.synced(a), safe);

        // The ring has what is missing, the failed one among it.
        let files = files.copy();
        let store = reopen(&files);
        assert_eq!(store.recover(a, CpNumber(0)).unwrap().last, Some(place(&unsynced)));
        append(&store, a, &failing);
        assert_eq!(sync(&store, a).unwrap(), line_a.place);
        let store = reopen(&files.power_cut(&mut Chance::new(3), true));
        let found = store.recover(a, CpNumber(0)).unwrap();
        assert_eq!((found.last, found.damage().is_none()), (Some(line_a.place), true), "{op:?}");
    }
}

/// A store whose writeback failed for the last two of three transfers, as a killed process leaves
/// it: the kernel shows their bytes, and neither they nor the second log's header are on the
/// medium, nor on their way to it.
fn after_a_failed_writeback(cps: [u32; 3]) -> (SimFiles, Vec<Transfer>) {
    let files = SimFiles::default();
    let store = store_of(&files, &[source(1)]);
    let mut line = Line::new(1);
    let transfers: Vec<Transfer> = cps.iter().map(|cp| line.write(*cp, 0, 3000)).collect();
    append(&store, source(1), &transfers[0]);
    sync(&store, source(1)).unwrap();
    transfers[1..].iter().for_each(|transfer| append(&store, source(1), transfer));
    files.fail(Op::Writeback, &source(1).to_string(), EIO);
    assert!(matches!(sync(&store, source(1)), Err(LogError::Io { .. })));
    files.heal();
    assert!(matches!(sync(&store, source(1)), Err(LogError::Faulted { .. })));
    (files.copy(), transfers)
}

/// Goal: a writeback that was begun early and failed is told by the next sync, also when the cause is
/// gone by then; the control succeeds. It is begun once for what was appended, and only for much.
#[test]
fn an_early_writeback_that_fails_is_told_by_the_sync() {
    for fails in [true, false] {
        let files = SimFiles::default();
        let store = store_of(&files, &[source(1)]);
        let mut line = Line::new(1);
        let transfers: Vec<Transfer> = (0..3).map(|_| line.write(1, 0, 3000)).collect();
        transfers.iter().for_each(|transfer| append(&store, source(1), transfer));
        let before = files.calls();
        store.begin_writeback(source(1), 1 << 20).unwrap();
        assert_eq!(files.writebacks(), 0, "little is left to the sync");
        if fails {
            files.fail(Op::Writeback, &source(1).to_string(), EIO);
        }
        store.begin_writeback(source(1), 4096).unwrap();
        store.begin_writeback(source(1), 4096).unwrap();
        assert_eq!((files.writebacks(), files.calls()), (1, before), "once, and nothing else");
        files.heal();
        let synced = sync(&store, source(1));
        assert_eq!(matches!(synced, Err(LogError::Io { .. })), fails, "{synced:?}");
        assert_eq!(store.fault(source(1)).is_some(), fails);
        let expected = if fails { Place::default() } else { line.place };
        assert_eq!(store.synced(source(1)), expected);
    }
}

/// Goal: a failed fdatasync is not taken for success by the next process either (invariant 7).
/// Method: writeback fails, kill, recover, sync, power cut: what that sync told of is there.
/// Without writing again what recovery keeps, it must be seen to be lost.
#[test]
fn a_failed_writeback_is_no_success_after_a_restart() {
    for cps in [[1, 1, 1], [1, 1, 2], [1, 2, 2]] {
        let (killed, transfers) = after_a_failed_writeback(cps);
        let last = place(&transfers[2]);
        let lost = |rewrite: bool| {
            let files = killed.copy();
            let mut store = reopen(&files);
            store.shared.rewrite = rewrite;
            assert_eq!(store.recover(source(1), CpNumber(0)).unwrap().last, Some(last));
            assert_eq!(sync(&store, source(1)).unwrap(), last);
            let is_lost = |seed: &u64| {
                let store = reopen(&files.power_cut(&mut Chance::new(*seed), true));
                if store.recover(source(1), CpNumber(0)).is_err() {
                    return true;
                }
                let cps = store.cps(source(1)).into_iter();
                let whole = |cp| ids(&store.reader(source(1), cp).unwrap()).ok();
                let read: Option<Vec<_>> = cps.map(whole).collect();
                read.is_none_or(|read| read.concat().len() != transfers.len())
            };
            (0..40).filter(is_lost).count()
        };
        assert_eq!(lost(true), 0, "{cps:?}");
        assert!(lost(false) > 10, "{cps:?}: the control must lose something");
    }
}

/// The kernel may drop such pages before recovery reads them: then the ring fills the log again.
#[test]
fn a_failed_writeback_whose_pages_are_gone_is_filled_again() {
    for cps in [[1, 1, 1], [1, 1, 2]] {
        let (killed, transfers) = after_a_failed_writeback(cps);
        killed.evict();
        let store = reopen(&killed);
        let found = store.recover(source(1), CpNumber(0)).unwrap();
        assert_eq!((found.last, found.damage().is_none()), (Some(place(&transfers[0])), true));
        transfers[1..].iter().for_each(|transfer| append(&store, source(1), transfer));
        assert_eq!(sync(&store, source(1)).unwrap(), place(&transfers[2]));
        for seed in 0..20 {
            let store = reopen(&killed.power_cut(&mut Chance::new(seed), true));
            let found = store.recover(source(1), CpNumber(0)).unwrap();
            assert_eq!(found.last, Some(place(&transfers[2])));
        }
    }
}

/// An error that the killed process was not told yet is told to the next one: it is faulted with
/// it, and the start after that is clean.
#[test]
fn an_error_nobody_heard_faults_the_next_start() {
    let (killed, transfers) = after_a_failed_writeback([1, 1, 1]);
    killed.forget_told();
    let store = reopen(&killed);
    store.recover(source(1), CpNumber(0)).unwrap();
    assert!(matches!(sync(&store, source(1)), Err(LogError::Io { .. })));
    let store = reopen(&killed.copy());
    store.recover(source(1), CpNumber(0)).unwrap();
    assert_eq!(sync(&store, source(1)).unwrap(), place(&transfers[2]));
}

/// Many sources share one syncfs. When it fails, each file tells its own truth, also those that
/// nobody asked for: the next syncfs would not tell of them again.
#[test]
fn a_failed_syncfs_faults_only_the_sources_it_hit() {
    let files = SimFiles::default();
    let sources: Vec<SourceId> = (1..=40).map(source).collect();
    let store = store_with(&files, LogOptions { files_open_max: 64, ..options() });
    let mut lines: Vec<Line> = (1..=40).map(Line::new).collect();
    for (source, line) in sources.iter().zip(&mut lines) {
        store.recover(*source, CpNumber(0)).unwrap();
        append(&store, *source, &line.small(1));
    }
    let (hit, hit_unasked) = (sources[2], sources[39]);
    files.fail(Op::Writeback, &hit.to_string(), EIO);
    files.fail(Op::Writeback, &hit_unasked.to_string(), EIO);
    let results = store.sync(&sources[..30]);
    files.heal();
    for ((source, result), line) in results.iter().zip(&lines) {
        match result {
            Ok(place) => assert_eq!(*place, line.place),
            Err(error) => assert_eq!(*source, hit, "{error}"),
        }
        assert_eq!(result.is_err(), *source == hit);
        assert_eq!(store.fault(*source).is_some(), *source == hit);
    }
    assert!(store.fault(hit_unasked).is_some(), "its error was told once, by that syncfs");
    assert!(matches!(sync(&store, hit_unasked), Err(LogError::Faulted { .. })));
    assert_eq!(sync(&store, sources[35]).unwrap(), lines[35].place);
}

/// The same of names: a syncfs that only made room for a descriptor reports that a directory was not
/// written. The next one would not tell of it, and the log would be gone at a power cut.
#[test]
fn names_that_a_syncfs_gave_up_fault_their_source() {
    let files = SimFiles::default();
    let sources: Vec<SourceId> = (1..=21).map(source).collect();
    let store = store_with(&files, LogOptions { files_open_max: 20, ..options() });
    let mut lines: Vec<Line> = (1..=21).map(Line::new).collect();
    let hit = sources[2];
    for (source, line) in sources.iter().zip(&mut lines) {
        if *source == sources[20] {
            files.fail(Op::SyncDir, &hit.to_string(), EIO);
        }
        store.recover(*source, CpNumber(0)).unwrap();
        append(&store, *source, &line.small(1));
    }
    assert_eq!(files.syncs().1, 1, "one made room for the last descriptor");
    files.heal();
    assert!(store.fault(hit).unwrap().contains("fsync directory"));
    for ((source, result), line) in store.sync(&sources).iter().zip(&lines) {
        match result {
            Ok(place) => assert_eq!(*place, line.place),
            Err(error) => assert_eq!(*source, hit, "{error}"),
        }
        assert_eq!(
            (result.is_err(), store.fault(*source).is_some()),
            (*source == hit, *source == hit)
        );
    }
    let after = reopen(&files.power_cut(&mut Chance::new(5), true));
    for (source, line) in sources.iter().zip(&lines).filter(|(source, _)| **source != hit) {
        assert_eq!(after.recover(*source, CpNumber(0)).unwrap().last, Some(line.place));
    }
}

#[test]
fn many_sources_take_two_syncfs_and_few_take_none() {
    let files = SimFiles::default();
    let sources: Vec<SourceId> = (1..=40).map(source).collect();
    let store = store_with(&files, LogOptions { files_open_max: 64, ..options() });
    for source in &sources {
        store.recover(*source, CpNumber(0)).unwrap();
        append(&store, *source, &Line::new(1).small(1));
    }
    assert!(store.sync(&sources).iter().all(|(_, result)| result.is_ok()));
    assert_eq!(files.syncs(), (0, 2), "data, then headers");
    let mut line = Line::new(1);
    line.small(1);
    append(&store, sources[0], &line.small(1));
    sync(&store, sources[0]).unwrap();
    assert_eq!(files.syncs(), (2, 2));
    assert!(store.sync(&sources).iter().all(|(_, result)| result.is_ok()));
    assert_eq!(files.syncs(), (2, 2), "nothing is dirty");
}

#[test]
fn a_name_that_cannot_be_made_durable_is_a_fault() {
    let files = SimFiles::default();
    let a = source(1);
    let store = store_of(&files, &[a]);
    append(&store, a, &Line::new(1).small(1));
    files.fail(Op::SyncDir, &a.to_string(), EIO);
    assert!(sync(&store, a).is_err());
    assert!(store.fault(a).unwrap().contains("fsync directory"));
    assert_eq!(store.synced(a), Place::default());
}

/// A file that must be closed while it is dirty is synced first; if that fails, its own source
/// is faulted, not the one that wanted the descriptor.
#[test]
fn a_failed_sync_at_closing_faults_the_owner() {
    let (a, b) = (source(1), source(2));
    let files = SimFiles::default();
    let store = store_with(&files, LogOptions { files_open_max: 1, ..options() });
    for source in [a, b] {
        store.recover(source, CpNumber(0)).unwrap();
    }
    append(&store, a, &Line::new(1).small(1));
    files.fail(Op::Writeback, &a.to_string(), EIO);
    append(&store, b, &Line::new(2).small(1));
    assert!(store.fault(a).unwrap().contains("fdatasync"));
    assert_eq!(store.fault(b), None);
    assert!(sync(&store, b).is_ok());
    assert!(sync(&store, a).is_err());
}

/// What a failed fdatasync gave up is not synced once more, not even to close its file.
#[test]
fn a_failed_fdatasync_is_not_tried_again() {
    let (a, b) = (source(1), source(2));
    let files = SimFiles::default();
    let store = store_with(&files, LogOptions { files_open_max: 1, ..options() });
    for source in [a, b] {
        store.recover(source, CpNumber(0)).unwrap();
    }
    append(&store, a, &Line::new(1).small(1));
    files.fail(Op::Writeback, &a.to_string(), EIO);
    assert!(sync(&store, a).is_err());
    files.heal();
    let syncs = files.syncs();
    append(&store, b, &Line::new(2).small(1));
    assert!(sync(&store, a).is_err());
    assert_eq!(files.syncs(), syncs);
}

/// One source's medium stands still, in a write and then in opening a file: nobody waits for it
/// but its own calls, and its room can be asked.
#[test]
fn a_slow_medium_holds_up_its_own_source_only() {
    let (a, b) = (source(1), source(2));
    let files = SimFiles::default();
    let store = Arc::new(store_with(&files, LogOptions { files_open_max: 2, ..options() }));
    let (mut line_a, mut line_b) = (Line::new(1), Line::new(2));
    for source in [a, b] {
        store.recover(source, CpNumber(0)).unwrap();
    }
    append(&store, a, &line_a.small(1));
    for is_open in [true, false] {
        if !is_open {
            // Two files of the other source push it out.
            append(&store, b, &line_b.small(4));
            append(&store, b, &line_b.small(5));
        }
        files.hold(&a.to_string());
        let (slow, next) = (Arc::clone(&store), line_a.small(1));
        let thread = std::thread::spawn(move || append(&slow, a, &next));
        files.until_held();
        let cp = if is_open { 3 } else { 5 };
        let (others, transfer, done) = (Arc::clone(&store), line_b.small(cp), channel());
        let sender = done.0;
        std::thread::spawn(move || {
            let room = (others.room(a), others.bytes(a));
            append(&others, b, &transfer);
            sender.send(room).unwrap();
        });
        let (room, bytes) = done.1.recv_timeout(Duration::from_secs(20)).expect("nobody waits");
        assert_eq!(room + bytes, options().limit_bytes_per_source);
        files.let_go();
        thread.join().unwrap();
        assert!(store.bytes(a) > bytes);
    }
}

#[test]
fn without_fallocate_files_grow_as_they_are_written() {
    let files = SimFiles::default();
    files.without_allocate();
    let a = source(1);
    let store = store_of(&files, &[a]);
    let mut line = Line::new(1);
    append(&store, a, &line.write(1, 0, 200_000));
    append(&store, a, &line.write(1, 0, 200_000));
    assert_eq!(sync(&store, a).unwrap(), line.place);
}

/// Goal: dead at the n-th call, for all n. Method: a short scenario; all calls from the n-th on
/// fail; then a power cut. Everything that a sync told of is there, and the rest is a prefix.
#[test]
fn dead_at_any_call_what_was_synced_is_there() {
    let (a, b) = (source(1), source(2));
    let mut line = Line::new(1);
    let transfers: Vec<Transfer> = [1, 1, 2, 2, 3].iter().map(|cp| line.small(*cp)).collect();
    let scenario = |files: &SimFiles| -> Result<(Place, u32), (Place, u32)> {
        let store = store_with(files, LogOptions { files_open_max: 2, ..options() });
        let (mut safe, mut applied) = (Place::default(), 0);
        let mut run = || -> Result<(), LogError> {
            store.recover(a, CpNumber(0))?;
            store.recover(b, CpNumber(0))?;
            for (n, transfer) in transfers.iter().enumerate() {
                store.append(a, EPOCH, transfer)?;
                store.append(b, EPOCH, transfer)?;
                if n % 2 == 1 {
                    safe = sync(&store, a)?;
                }
            }
            // The CP's commit is durable before the drop begins.
            applied = 1;
            store.drop_through(a, CpNumber(1))?;
            safe = sync(&store, a)?;
            Ok(())
        };
        let done = run();
        done.map(|()| (safe, applied)).map_err(|_| (safe, applied))
    };
    let clean = SimFiles::default();
    assert!(scenario(&clean).is_ok());
    let calls = clean.calls();
    assert!(calls > 30, "the scenario makes calls");
    for call in 1..=calls {
        let files = SimFiles::default();
        files.die_at(call);
        let (safe, applied) = scenario(&files).unwrap_err();
        for seed in 0..8 {
            let after = files.power_cut(&mut Chance::new(seed * 1000 + call), true);
            let store = reopen(&after);
            let found = store.recover(a, CpNumber(applied)).unwrap();
            assert!(found.damage().is_none(), "call {call} seed {seed}: {:?}", found.damage());
            let last = found.last.unwrap_or(if applied == 1 {
                place(&transfers[1])
            } else {
                Place::default()
            });
            assert!(
                last.transfer >= safe.transfer,
                "call {call} seed {seed}: lost behind {last:?}"
            );
            let count = usize::try_from(last.transfer.counter).unwrap();
            assert_eq!(
                last,
                if count == 0 { Place::default() } else { place(&transfers[count - 1]) }
            );
        }
    }
}

/// The same for what a killed process left in the page cache: its data is made durable before its
/// header says so.
#[test]
fn dead_at_any_call_after_a_kill() {
    let a = source(1);
    let mut line = Line::new(1);
    let transfers: Vec<Transfer> = [1, 1, 2].iter().map(|cp| line.write(*cp, 0, 3000)).collect();
    let killed = SimFiles::default();
    let store = store_of(&killed, &[a]);
    transfers.iter().for_each(|transfer| append(&store, a, transfer));
    let mut calls = 0;
    for call in 1.. {
        let files = killed.copy();
        files.die_at(call);
        let store = reopen(&files);
        if store.recover(a, CpNumber(0)).is_ok() {
            calls += 1;
            if sync(&store, a).is_ok() {
                break;
            }
        }
        for seed in 0..20 {
            let store = reopen(&files.power_cut(&mut Chance::new(seed * 1000 + call), true));
            let found = store.recover(a, CpNumber(0)).unwrap();
            assert!(found.damage().is_none(), "call {call} seed {seed}: {:?}", found.damage());
        }
    }
    assert!(calls > 8, "the sync makes calls");
}

/// The negative control of those above and of the model: without syncs it must be seen.
#[test]
fn without_syncs_a_power_cut_loses_what_was_promised() {
    let a = source(1);
    let lost = (0..20).filter(|seed| {
        let files = SimFiles::default();
        files.without_sync();
        let store = store_of(&files, &[a]);
        let mut line = Line::new(1);
        append(&store, a, &line.small(1));
        let safe = sync(&store, a).unwrap();
        let store = reopen(&files.power_cut(&mut Chance::new(*seed), true));
        match store.recover(a, CpNumber(0)) {
            Ok(found) => found.last != Some(safe) || found.damage().is_some(),
            Err(_) => true,
        }
    });
    assert!(lost.count() > 5);
}
