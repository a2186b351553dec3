//! Goal: after any end of the process or the power, recovery finds a prefix with everything that
//! was synced in it; what is not a torn tail is damage by name; files of others are refused.

use super::*;

/// Three transfers in CP 1, of which `synced` are synced, and their file's content.
fn small_log(synced: usize) -> (SimFiles, Vec<Transfer>, Vec<u8>) {
    let files = SimFiles::default();
    let store = store_of(&files, &[source(1)]);
    let mut line = Line::new(1);
    let transfers: Vec<_> = (0..3).map(|_| line.small(1)).collect();
    for (n, transfer) in transfers.iter().enumerate() {
        append(&store, source(1), transfer);
        if n + 1 == synced {
            sync(&store, source(1)).unwrap();
        }
    }
    let content = files.content(&log_path(source(1), 1)).unwrap();
    (files, transfers, content)
}

fn prefix(transfers: &[Transfer], count: usize) -> Place {
    count.checked_sub(1).map_or(Place::default(), |last| place(&transfers[last]))
}

/// Goal: truncation at every byte. What is gone of the synced part is damage, else it is a torn
/// tail; either way a prefix is found, can be read, and can be cut to and appended to.
#[test]
fn truncated_at_every_byte() {
    let path = log_path(source(1), 1);
    for synced in 0..=3 {
        let (files, transfers, content) = small_log(synced);
        let synced_end = file_offset(&transfers[..synced]);
        for length in 0..content.len() {
            let cut = with_content(&files, &path, &content[..length]);
            let store = reopen(&cut);
            let found = store.recover(source(1), CpNumber(0)).unwrap();
            let length = to_u64(length);
            let whole = (0..=3).rev().find(|n| file_offset(&transfers[..*n]) <= length);
            let whole = whole.unwrap_or(0);
            let wanted = prefix(&transfers, whole);
            assert_eq!(found.last.unwrap_or_default(), wanted, "{synced} synced, {length} left");
            let damaged =
                (0 < length && length < 4096) || (synced > 0 && 0 < length && length < synced_end);
            assert_eq!(found.damage().is_some(), damaged, "{synced} synced, {length} left");
            if let Some(LogError::Corrupt { file, offset, .. }) = found.damage() {
                assert_eq!((&**file, *offset), (path.to_str().unwrap(), length));
                assert!(store.fault(source(1)).unwrap().contains("damaged"));
                let refused = store.append(source(1), EPOCH, &transfers[0]).unwrap_err();
                assert!(matches!(refused, LogError::Faulted { .. }));
                assert_eq!(cut.content(&path).unwrap().len(), usize::try_from(length).unwrap());
                if length < 4096 {
                    store.reset(source(1), None).unwrap();
                } else {
                    store.cut(source(1), wanted).unwrap();
                }
            }
            // The ring has the rest, or the source sends it again.
            for transfer in &transfers {
                store.append(source(1), EPOCH, transfer).unwrap();
            }
            sync(&store, source(1)).unwrap();
            let again = reopen(&cut.power_cut(&mut Chance::new(length), true));
            let found = again.recover(source(1), CpNumber(0)).unwrap();
            assert_eq!(found.last, Some(prefix(&transfers, 3)));
            assert_eq!(ids(&again.reader(source(1), CpNumber(1)).unwrap()).unwrap().len(), 3);
        }
    }
}

/// Each byte of the unsynced tail flipped in turn: the tail is cut there, nothing is damage.
#[test]
fn a_flip_in_the_unsynced_tail_is_cut() {
    let path = log_path(source(1), 1);
    let (files, transfers, content) = small_log(1);
    for hit in [1, 2] {
        let start = file_offset(&transfers[..hit]);
        let end = start + 128 + to_u64(transfers[hit].bytes().len());
        for at in start..end {
            let mut bad = content.clone();
            bad[usize::try_from(at).unwrap()] ^= 0x11;
            let files = with_content(&files, &path, &bad);
            let store = reopen(&files);
            let found = store.recover(source(1), CpNumber(0)).unwrap();
            assert_eq!(found.last, Some(prefix(&transfers, hit)), "byte {at}");
            assert!(found.damage().is_none());
            assert_eq!(found.logs[0].cut_bytes, to_u64(content.len()) - start);
            assert_eq!(to_u64(files.content(&path).unwrap().len()), start, "cut in the file too");
        }
    }
}

/// R3: where the newest slot is lost, a later record still tells rot from a torn tail: it says
/// how far the log was durable when it was written.
#[test]
fn rot_is_told_by_a_later_record() {
    let path = log_path(source(1), 1);
    let (files, transfers, mut content) = small_log(2);
    // Slot 3 lies at 2048 and says that two are synced; slot 2 at 1024 says none.
    content[2048] ^= 1;
    let older = reopen(&with_content(&files, &path, &content));
    let found = older.recover(source(1), CpNumber(0)).unwrap();
    assert_eq!((found.last, found.damage().is_none()), (Some(prefix(&transfers, 3)), true));

    let second = usize::try_from(file_offset(&transfers[..1])).unwrap();
    content[second + 200] ^= 1;
    let rotten = with_content(&files, &path, &content);
    let store = reopen(&rotten);
    let found = store.recover(source(1), CpNumber(0)).unwrap();
    let LogError::Corrupt { offset, what, .. } = found.damage().unwrap() else { panic!() };
    assert_eq!(*offset, to_u64(second));
    assert!(what.contains("a later record says"), "{what}");
    assert_eq!(found.last, Some(prefix(&transfers, 1)));
    assert_eq!(rotten.content(&path).unwrap(), content, "damage changes no file");

    // The third record was written when two were durable: its own loss is a torn tail.
    content[second + 200] ^= 1;
    let third = usize::try_from(file_offset(&transfers[..2])).unwrap();
    content[third + 200] ^= 1;
    let torn = reopen(&with_content(&files, &path, &content));
    let found = torn.recover(source(1), CpNumber(0)).unwrap();
    assert_eq!((found.last, found.damage().is_none()), (Some(prefix(&transfers, 2)), true));
}

#[test]
fn damaged_headers_are_named_and_change_nothing() {
    let path = log_path(source(1), 1);
    let (files, transfers, content) = small_log(3);
    for (at, offset, lost) in [(0, 0, true), (60, 0, true), (700, 700, true), (3000, 3000, true)] {
        let mut bad = content.clone();
        bad[at] ^= 0x80;
        let files = with_content(&files, &path, &bad);
        let store = reopen(&files);
        let found = store.recover(source(1), CpNumber(0)).unwrap();
        let error = found.damage().unwrap();
        let LogError::Corrupt { offset: met, .. } = error else { panic!("{error}") };
        assert_eq!((*met, lost), (offset, true));
        assert_eq!(store.last(source(1)), Some(Place::default()));
        assert!(store.reader(source(1), CpNumber(1)).is_err());
        assert_eq!(files.content(&path).unwrap(), bad);
        // The end of its CP takes it away and the latch with it.
        store.drop_through(source(1), CpNumber(1)).unwrap();
        assert!(files.paths().is_empty());
        assert_eq!((store.fault(source(1)), store.last(source(1))), (None, None));
    }
    // Both slots: the records are read from the beginning, but it is damage until somebody cuts.
    let mut bad = content.clone();
    bad[1030] ^= 1;
    bad[2050] ^= 1;
    let files = with_content(&files, &path, &bad);
    let store = reopen(&files);
    let found = store.recover(source(1), CpNumber(0)).unwrap();
    assert!(found.damage().unwrap().to_string().contains("neither slot"));
    assert_eq!(found.last, Some(prefix(&transfers, 3)));
    store.cut(source(1), prefix(&transfers, 3)).unwrap();
    assert_eq!(store.fault(source(1)), None);
    let found = reopen(&files).recover(source(1), CpNumber(0)).unwrap();
    assert_eq!((found.last, found.damage().is_none()), (Some(prefix(&transfers, 3)), true));
}

/// Logs of applied CPs are deleted unread; the rest stays.
#[test]
fn applied_logs_are_deleted_when_found() {
    let files = SimFiles::default();
    let store = store_of(&files, &[source(1)]);
    let mut line = Line::new(1);
    for cp in [3, 4, 5] {
        append(&store, source(1), &line.small(cp));
    }
    sync(&store, source(1)).unwrap();
    files.put(&log_path(source(1), 2), b"anything at all");
    let store = reopen(&files);
    let found = store.recover(source(1), CpNumber(4)).unwrap();
    assert_eq!((found.deleted, found.logs.len(), found.last), (3, 1, Some(line.place)));
    assert_eq!(files.paths(), [log_path(source(1), 5)]);
    // A second recovery of a running store only drops what is applied since.
    let found = store.recover(source(1), CpNumber(5)).unwrap();
    assert!(found.logs.is_empty());
    assert!(files.paths().is_empty());
    assert_eq!(store.last(source(1)), Some(line.place));
}

/// A file of another hub, source or CP: refused by name, and nothing is touched, not
/// even what could be deleted.
#[test]
fn files_of_others_are_refused_by_name() {
    let (files, _, content) = small_log(3);
    let path = log_path(source(1), 1);
    let refused = |files: &SimFiles, hub: HubId, source: SourceId, wanted: &str| {
        let before = files.paths();
        let store =
            LogStore::open_with(Arc::new(files.clone()), Path::new(ROOT), hub, options()).unwrap();
        let error = store.recover(source, CpNumber(9)).unwrap_err();
        assert!(matches!(error, LogError::Foreign { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(wanted) && text.contains("cp-") && text.contains("move"), "{text}");
        assert_eq!(files.paths(), before);
        let transfer = Line::new(5).small(20);
        assert!(matches!(
            store.append(source, EPOCH, &transfer),
            Err(LogError::NotRecovered { .. })
        ));
    };
    refused(&files, HubId([8; 16]), source(1), "written by hub 0707");
    let other = SimFiles::default();
    other.put(&log_path(source(2), 1), &content);
    refused(&other, HUB, source(2), "is of source 0101");
    let renamed = SimFiles::default();
    renamed.put(&log_path(source(1), 2), &content);
    refused(&renamed, HUB, source(1), "is of CP 1");
    let odd = SimFiles::default();
    odd.put(&path.with_file_name("cp-1.log"), &content);
    refused(&odd, HUB, source(1), "ten digits");
    // What is no log's name is nobody's business here.
    let strange = files.copy();
    strange.put(&path.with_file_name("lost+found"), b"");
    assert!(reopen(&strange).recover(source(1), CpNumber(0)).is_ok());
}

/// Goal: what a later program wrote is refused with both versions, and nothing of it is cut: neither a
/// file nor a record in a tail that is not synced. Control: without its checksum such a record is a torn
/// tail.
#[test]
fn what_a_later_version_wrote_is_refused_and_left() {
    let path = log_path(source(1), 1);
    let (files, transfers, content) = small_log(1);
    let record = usize::try_from(file_offset(&transfers[..1])).unwrap();
    for (at, crc_at) in [(0, 508), (record, record + 124)] {
        let mut newer = content.clone();
        newer[at + 4] = 2;
        let bad = with_content(&files, &path, &newer);
        let torn = reopen(&bad).recover(source(1), CpNumber(0));
        assert!(at == 0 || torn.is_ok_and(|found| found.logs[0].cut_bytes > 0), "control at {at}");
        let crc = crc32c(&newer[at..crc_at]);
        newer[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        let files = with_content(&files, &path, &newer);
        let error = reopen(&files).recover(source(1), CpNumber(0)).unwrap_err();
        assert!(matches!(error, LogError::Version { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("version 2, this program reads version 1"), "{text}");
        assert!(text.contains("cp-") && !text.contains("move"), "{text}");
        assert!(files.content(&path).unwrap() == newer, "nothing was touched");
    }
}

/// Three CPs; the middle one's tail, or its whole file, is lost.
#[test]
fn logs_behind_a_gap_are_torn_if_unsynced_and_damage_if_synced() {
    for (synced, whole) in [(false, false), (false, true), (true, false), (true, true)] {
        let files = SimFiles::default();
        let store = store_of(&files, &[source(1)]);
        let mut line = Line::new(1);
        let transfers: Vec<_> = [1, 1, 2, 2, 3].iter().map(|cp| line.small(*cp)).collect();
        transfers.iter().for_each(|transfer| append(&store, source(1), transfer));
        if synced {
            sync(&store, source(1)).unwrap();
        }
        let middle = log_path(source(1), 2);
        let content = files.content(&middle).unwrap();
        let left = if whole { 0 } else { content.len() - 1 };
        let files = with_content(&files, &middle, &content[..left]);
        let before = files.paths();
        let store = reopen(&files);
        let found = store.recover(source(1), CpNumber(0)).unwrap();
        assert_eq!(found.damage().is_some(), synced, "{whole}");
        assert_eq!(found.torn, if synced { 0 } else { 1 });
        let wanted = if whole { 2 } else { 3 };
        assert_eq!(found.last, Some(prefix(&transfers, wanted)), "{synced} {whole}");
        assert_eq!(store.last(source(1)), found.last);
        if synced {
            assert_eq!(files.paths(), before, "damage changes no file");
            assert!(store.synced(source(1)).transfer <= prefix(&transfers, wanted).transfer);
            store.cut(source(1), prefix(&transfers, wanted)).unwrap();
        } else {
            assert_eq!(found.torn, 1);
        }
        transfers[wanted..].iter().for_each(|transfer| append(&store, source(1), transfer));
        assert_eq!(sync(&store, source(1)).unwrap(), line.place);
    }
}

/// A file that is not there at all: damage if anything newer was synced, else the newer ones are
/// torn, and the ring has them all. An applied one is not missed.
#[test]
fn a_missing_file_is_noticed() {
    let (a, mut line) = (source(1), Line::new(1));
    let transfers: Vec<_> = [1, 2, 4].iter().map(|cp| line.small(*cp)).collect();
    for (missing, synced, applied) in
        [(1, false, 0), (2, false, 0), (2, false, 1), (1, true, 0), (2, true, 0), (2, true, 1)]
    {
        let files = SimFiles::default();
        let store = store_of(&files, &[a]);
        transfers.iter().for_each(|transfer| append(&store, a, transfer));
        if synced {
            sync(&store, a).unwrap();
        }
        super::super::files::Files::remove(&files, &log_path(a, missing)).unwrap();
        let store = reopen(&files);
        let found = store.recover(a, CpNumber(applied)).unwrap();
        let text = format!("{missing} {synced} {applied}: {found:?}");
        assert_eq!(found.damage().is_some(), synced, "{text}");
        let left = usize::try_from(missing - 1 - applied).unwrap();
        if synced {
            let error = found.damage().unwrap().to_string();
            assert!(error.contains(&format!("CP {missing}, which is missing")), "{error}");
            assert_eq!(
                found.last,
                Some(if left == 1 { place(&transfers[0]) } else { Place::default() })
            );
            store.reset(a, None).unwrap();
        } else {
            assert_eq!(found.logs.len(), left, "{text}");
            assert_eq!(files.paths().len(), left, "{text}");
        }
        assert_eq!(store.fault(a), None);
        assert!(store.last(a).is_none() || left == 1);
    }
    let files = SimFiles::default();
    let store = store_of(&files, &[a]);
    transfers.iter().for_each(|transfer| append(&store, a, transfer));
    super::super::files::Files::remove(&files, &log_path(a, 1)).unwrap();
    let found = reopen(&files).recover(a, CpNumber(1)).unwrap();
    assert_eq!((found.last, found.logs.len()), (Some(line.place), 2));
}

/// After a mere kill what is found may be in the page cache only: it is synced again before it
/// counts.
#[test]
fn what_recovery_keeps_is_synced_again_before_it_counts() {
    let (files, transfers, _) = small_log(1);
    let killed = files.copy();
    let store = reopen(&killed);
    let found = store.recover(source(1), CpNumber(0)).unwrap();
    assert_eq!(found.last, Some(prefix(&transfers, 3)));
    assert_eq!(store.synced(source(1)), prefix(&transfers, 1));
    assert_eq!(sync(&store, source(1)).unwrap(), prefix(&transfers, 3));
    for seed in 0..10 {
        let store = reopen(&killed.power_cut(&mut Chance::new(seed), true));
        let found = store.recover(source(1), CpNumber(0)).unwrap();
        assert_eq!(found.last, Some(prefix(&transfers, 3)));
    }
}

/// The whole way on a real file system, with more sources than descriptors.
#[test]
fn real_files_from_append_to_drop() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("logs");
    let sources: Vec<SourceId> = (1..=30).map(source).collect();
    let mut lines: Vec<Line> = (1..=30).map(Line::new).collect();
    let options = LogOptions { files_open_max: 8, ..options() };
    let store = LogStore::open(&root, HUB, options).unwrap();
    for (source, line) in sources.iter().zip(&mut lines) {
        assert!(store.recover(*source, CpNumber(0)).unwrap().logs.is_empty());
        for cp in [1, 1, 2] {
            append(&store, *source, &line.write(cp, 4096, 10_000));
        }
    }
    for ((_, result), line) in store.sync(&sources).into_iter().zip(&lines) {
        assert_eq!(result.unwrap(), line.place);
    }
    drop(store);
    let store = LogStore::open(&root, HUB, options).unwrap();
    for (source, line) in sources.iter().zip(&mut lines) {
        let found = store.recover(*source, CpNumber(0)).unwrap();
        assert_eq!((found.last, found.damage().is_none()), (Some(line.place), true));
        assert_eq!(store.synced(*source), line.place);
        append(&store, *source, &line.small(2));
        assert_eq!(ids(&store.reader(*source, CpNumber(1)).unwrap()).unwrap().len(), 2);
        assert_eq!(ids(&store.reader(*source, CpNumber(2)).unwrap()).unwrap().len(), 2);
        store.drop_through(*source, CpNumber(1)).unwrap();
        let names = std::fs::read_dir(root.join(source.to_string())).unwrap();
        let names: Vec<_> = names.map(|name| name.unwrap().file_name()).collect();
        assert_eq!(names, ["cp-0000000002.log"]);
    }
}
