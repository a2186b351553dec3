//! Goal: a reference finds exactly the block that its entry wrote, whatever the alignment and
//! however many entries and transfers a run crosses; damaged bytes never leave.

use std::collections::BTreeMap;

use super::*;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

const W: EntryKind = EntryKind::Write;

/// What references mean, told from the client's side: the blocks each transfer wrote whole.
fn oracle(transfers: &[Transfer]) -> BTreeMap<TransferId, Vec<Vec<u8>>> {
    let mut found = BTreeMap::new();
    for transfer in transfers {
        let mut blocks = Vec::new();
        for (entry, data) in transfer.iter() {
            let end = entry.offset + to_u64(data.len());
            for vbn in entry.offset / BLOCK_BYTES_U64..=end / BLOCK_BYTES_U64 {
                let (from, to) = (vbn * BLOCK_BYTES_U64, (vbn + 1) * BLOCK_BYTES_U64);
                if entry.offset <= from && to <= end {
                    let start = usize::try_from(from - entry.offset).unwrap();
                    blocks.push(data[start..start + BLOCK_BYTES].to_vec());
                }
            }
        }
        found.insert(transfer.id(), blocks);
    }
    found
}

/// Odd alignments, trims and zeroes between, entries of 256 KiB, transfers without any whole
/// block, tables longer than the first read, and two generations.
fn mixed(line: &mut Line) -> Vec<Transfer> {
    let many: Vec<_> = (0..600).map(|n| (W, n * 5000 + 3, 5)).collect();
    let mut transfers = vec![
        line.transfer(1, &[(W, 0, 4096)]),
        line.transfer(1, &[(W, 100, 8192), (W, 4095, 4098), (W, 4097, 4095)]),
        line.transfer(1, &[(EntryKind::Trim, 4096, 8192), (EntryKind::Zeroes, 5, 9999)]),
        line.transfer(1, &[(W, 1, 262_144), (EntryKind::Trim, 0, 4096), (W, 0, 262_144)]),
        line.transfer(1, &many),
        line.transfer(1, &[(W, 512, 20_480), (EntryKind::Zeroes, 0, 7), (W, 8192, 12_288)]),
    ];
    line.generation = 2;
    transfers.push(line.transfer(1, &[(W, 4096, 65_536), (W, 7, 100), (W, 3584, 4608)]));
    transfers.push(line.transfer(1, &[(W, 4096 * 9, 8192)]));
    transfers
}

fn filled(transfers: &[Transfer]) -> (SimFiles, LogStore) {
    let files = SimFiles::default();
    let store = store_of(&files, &[source(1)]);
    transfers.iter().for_each(|transfer| append(&store, source(1), transfer));
    (files, store)
}

#[test]
fn every_reference_finds_its_block() {
    let mut line = Line::new(1);
    let transfers = mixed(&mut line);
    let expected = oracle(&transfers);
    let (_files, store) = filled(&transfers);
    // Unsynced data is read like any other.
    let reader = store.reader(source(1), CpNumber(1)).unwrap();
    assert!(reader.damage().is_none());
    assert_eq!((reader.len(), reader.last()), (transfers.len(), line.place));
    assert!(expected.values().map(Vec::len).sum::<usize>() > 150);
    let mut out = [0; BLOCK_BYTES];
    for (id, blocks) in &expected {
        assert_eq!(reader.ordinals(*id), Some(to_u64(blocks.len())));
        for (ordinal, block) in blocks.iter().enumerate() {
            reader.block(*id, to_u64(ordinal), &mut out).unwrap();
            assert_eq!(out.as_slice(), block, "transfer {id} ordinal {ordinal}");
        }
        let beyond = reader.block(*id, to_u64(blocks.len()), &mut out).unwrap_err();
        assert!(matches!(beyond, LogError::NoBlock { .. }), "{beyond}");
        assert!(reader.block(*id, u64::MAX, &mut out).is_err());
    }
    let unknown = TransferId { generation: 1, counter: 99 };
    assert_eq!(reader.ordinals(unknown), None);
    assert!(matches!(reader.block(unknown, 0, &mut out), Err(LogError::NoBlock { .. })));
    let read: Vec<_> = reader.transfers().map(|transfer| transfer.unwrap()).collect();
    for (read, written) in read.iter().zip(&transfers) {
        assert!(read.bytes() == written.bytes(), "{}", written.id());
    }
    assert_eq!(read.len(), transfers.len());
}

/// All runs from all references, of all lengths: equal to the blocks laid end to end.
#[test]
fn a_run_crosses_entries_and_transfers() {
    let mut line = Line::new(2);
    let transfers = mixed(&mut line);
    let expected = oracle(&transfers);
    let (_files, store) = filled(&transfers);
    let reader = store.reader(source(1), CpNumber(1)).unwrap();
    let mut places = Vec::new();
    for (id, blocks) in &expected {
        for (ordinal, block) in blocks.iter().enumerate() {
            places.push((*id, to_u64(ordinal), block.clone()));
        }
    }
    let mut runs = 0;
    for from in 0..places.len() {
        let left = places.len() - from;
        for count in [1, 2, 3, 7, 64, 70, left] {
            if count > left {
                continue;
            }
            let (id, ordinal, _) = &places[from];
            let mut met = 0;
            reader
                .run(*id, *ordinal, to_u64(count), |nth, block| {
                    assert_eq!(nth, to_u64(met));
                    assert_eq!(block.as_slice(), places[from + met].2);
                    met += 1;
                })
                .unwrap();
            assert_eq!(met, count);
            runs += 1;
        }
        let (id, ordinal, _) = &places[from];
        let mut met = 0;
        let over = reader.run(*id, *ordinal, to_u64(left) + 1, |_, _| met += 1);
        assert!(matches!(over, Err(LogError::NoBlock { .. })));
        assert_eq!(met, left, "what the log has is visited before the error");
    }
    assert!(runs > 500);
}

/// A reader looks at what was there when it was made, and reads on while the drainer appends and
/// other readers want the one descriptor.
#[test]
fn readers_and_the_drainer_share_one_descriptor() {
    let files = SimFiles::default();
    let options = LogOptions { files_open_max: 1, ..options() };
    let store = store_with(&files, options);
    let sources = [source(1), source(2), source(3)];
    let mut lines = [Line::new(1), Line::new(2), Line::new(3)];
    let mut first = Vec::new();
    for (source, line) in sources.iter().zip(&mut lines) {
        store.recover(*source, CpNumber(0)).unwrap();
        let transfers: Vec<_> = (0..5).map(|n| line.write(1, n * 4096, 8192)).collect();
        transfers.iter().for_each(|transfer| append(&store, *source, transfer));
        first.push(transfers);
    }
    std::thread::scope(|scope| {
        for (source, transfers) in sources.iter().zip(&first) {
            let reader = store.reader(*source, CpNumber(1)).unwrap();
            scope.spawn(move || {
                let mut out = [0; BLOCK_BYTES];
                for _ in 0..50 {
                    assert_eq!(ids(&reader).unwrap().len(), 5);
                    for transfer in transfers {
                        reader.block(transfer.id(), 1, &mut out).unwrap();
                        assert_eq!(Some(&out), transfer.block(1));
                    }
                }
            });
        }
        for _ in 0..50 {
            for (source, line) in sources.iter().zip(&mut lines) {
                append(&store, *source, &line.small(1));
            }
            assert!(store.sync(&sources).iter().all(|(_, result)| result.is_ok()));
        }
    });
    assert_eq!(files.open_now_and_peak().1, 1);
    for (source, line) in sources.iter().zip(&lines) {
        assert_eq!(store.synced(*source), line.place);
    }
}

#[test]
fn the_table_takes_sixteen_bytes_a_transfer() {
    let files = SimFiles::default();
    let store = store_of(&files, &[source(1)]);
    let mut line = Line::new(1);
    for _ in 0..1000 {
        append(&store, source(1), &line.small(1));
    }
    let reader = store.reader(source(1), CpNumber(1)).unwrap();
    assert_eq!((reader.len(), reader.table_bytes()), (1000, 16_000));
}

/// Every byte of a record flipped in turn: the damage is named with its file and an offset in
/// that record, what lies before it is read, what lies behind it can be read by reference, and no
/// run crosses the gap.
#[test]
fn flipped_bytes_are_named_and_the_rest_is_read() {
    let mut line = Line::new(3);
    let transfers: Vec<_> = (0..3).map(|n| line.transfer(1, &[(W, n * 8192, 4500)])).collect();
    let (files, store) = filled(&transfers);
    sync(&store, source(1)).unwrap();
    let path = log_path(source(1), 1);
    let good = files.content(&path).unwrap();
    let (start, end) = (file_offset(&transfers[..1]), file_offset(&transfers[..2]));
    let body_end = start + 128 + to_u64(transfers[1].bytes().len());
    for at in start..body_end {
        let mut bad = good.clone();
        bad[usize::try_from(at).unwrap()] ^= 0x20;
        let files = with_content(&files, &path, &bad);
        let store = reopen(&files);
        let found = store.recover(source(1), CpNumber(0)).unwrap();
        assert_eq!(found.last, Some(line.place), "the synced part is not read at a start");
        let reader = store.reader(source(1), CpNumber(1)).unwrap();
        let (before, error) = ids(&reader).unwrap_err();
        let LogError::Corrupt { file, offset, what } = error else { panic!("{error}") };
        assert!(file.ends_with("cp-0000000001.log"), "{file}");
        assert!((start..end).contains(&offset), "byte {at} named at {offset}: {what}");
        assert_eq!(before, 1, "byte {at}");
        check_around(&reader, &transfers, at);
    }
    // The padding belongs to nobody.
    let mut padded = good;
    padded[usize::try_from(end - 1).unwrap()] ^= 1;
    let files = with_content(&files, &path, &padded);
    let store = reopen(&files);
    store.recover(source(1), CpNumber(0)).unwrap();
    assert_eq!(ids(&store.reader(source(1), CpNumber(1)).unwrap()).unwrap().len(), 3);
}

fn check_around(reader: &LogReader, transfers: &[Transfer], at: u64) {
    let mut out = [0; BLOCK_BYTES];
    for sound in [0, 2] {
        reader.block(transfers[sound].id(), 0, &mut out).unwrap();
        assert_eq!(Some(&out), transfers[sound].block(0));
    }
    let mut met = 0;
    let run = reader.run(transfers[0].id(), 0, 3, |_, _| met += 1);
    // A flip in the envelope's own fields may leave the transfer itself readable by its
    // checksums; then its bytes are right, else they are not given out.
    match reader.block(transfers[1].id(), 0, &mut out) {
        Ok(()) => assert_eq!(Some(&out), transfers[1].block(0), "byte {at}"),
        Err(error) => {
            assert!(matches!(error, LogError::Corrupt { .. }), "byte {at}: {error}");
            assert!(run.is_err() && met == 1, "byte {at}: the run went over the gap");
        }
    }
}

/// A file cut behind the reader's back is damage, not a panic.
#[test]
fn a_file_that_shrinks_under_a_reader_is_damage() {
    let mut line = Line::new(4);
    let transfers: Vec<_> = (0..3).map(|n| line.write(1, n * 8192, 8192)).collect();
    let (files, store) = filled(&transfers);
    sync(&store, source(1)).unwrap();
    let path = log_path(source(1), 1);
    let good = files.content(&path).unwrap();
    let reader = store.reader(source(1), CpNumber(1)).unwrap();
    drop(store);
    let whole = good.len() - 512;
    for length in (4096..whole).step_by(97) {
        let file = super::super::files::Files::open(&files, &path).unwrap();
        file.truncate(to_u64(length)).unwrap();
        let (before, error) = ids(&reader).unwrap_err();
        assert!(matches!(error, LogError::Corrupt { .. }), "{error}");
        let bodies = file_offset(&transfers[..before]) - if before > 0 { 512 } else { 0 };
        assert!(bodies <= to_u64(length), "{before} read of {length} bytes");
        let mut out = [0; BLOCK_BYTES];
        let last = reader.block(transfers[2].id(), 1, &mut out);
        assert!(last.is_err() || before == 2);
        file.write_at(0, &[&good]).unwrap();
    }
}

/// The offset table of large records is made of their heads; who reads them whole reads nothing twice
/// but heads. Small ones come many at a time.
#[test]
fn of_large_records_only_the_heads_are_read_ahead() {
    let mut line = Line::new(5);
    let large: Vec<_> = (0..20).map(|_| line.write(1, 0, 262_144)).collect();
    let small: Vec<_> = (0..200).map(|n| line.write(1, n * 4096, 512)).collect();
    let (files, store) = filled(&[large, small].concat());
    let before = files.read_bytes();
    let reader = store.reader(source(1), CpNumber(1)).unwrap();
    assert_eq!((reader.len(), reader.last()), (220, line.place));
    let heads = files.read_bytes() - before;
    // 20 heads, one window that the first small one fills, and the log's own header.
    assert!(heads < 21 * 4096 + (256 << 10) + 8192, "{heads} bytes for the table");
    let before = files.read_bytes();
    assert_eq!(ids(&reader).expect("all are sound").len(), 220);
    let whole = files.read_bytes() - before;
    let bodies = 20 * 262_144 + 200 * 1024;
    assert!((bodies..bodies + 21 * 8192).contains(&whole), "{whole} bytes for {bodies}");
}
