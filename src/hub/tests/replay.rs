//! Replay against two others that know better: the way a source itself makes a CP of its entries,
//! and an array of bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use crate::filer::buffers::Buffers;
use crate::filer::plan::{Plan, Step};
use crate::hub::replay::{Chain, Gap, Replay, ReplayError};
use crate::pool::Pool;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::TreeRoot;
use crate::pool::write_set::Budget;
use crate::record::entry::{Entry, EntryKind};
use crate::record::marks::Place;
use crate::record::transfer::{Builder, Transfer, TransferHeader};
use crate::sourcelog::{LogOptions, LogStore};
use crate::units::BLOCK_BYTES;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::{Root, crc32c};
use crate::units::ids::HubId;
use crate::units::numbers::{CpNumber, Epoch, SequenceNumber, TransferId, Vbn, VolumeNumber};
use crate::volume::reader::read_into;
use crate::volume::testing::{KEY, SOURCE, content, pool_with, publish_of, slow_root, tree};
use crate::volume::writer::{Content, TreeWriter};

type Change = (EntryKind, u64, Vec<u8>);

fn entry_of((kind, offset, data): &Change) -> (Entry, Bytes) {
    let length = u32::try_from(data.len()).unwrap();
    let (crc, data) = match kind {
        EntryKind::Write => (crc32c(data), Bytes::copy_from_slice(data)),
        EntryKind::Trim | EntryKind::Zeroes => (0, Bytes::new()),
    };
    (Entry { kind: *kind, volume: KEY.volume, offset: *offset, length, crc }, data)
}

/// A log, a pool, and the image as it should be.
struct Bench {
    _dir: tempfile::TempDir,
    store: LogStore,
    pool: Arc<Pool>,
    image: Vec<u8>,
    applied: Place,
    last: Place,
    cp: u32,
}

impl Bench {
    fn new(blocks: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store =
            LogStore::open(dir.path(), HubId([1; 16]), LogOptions::with_limit(1 << 30)).unwrap();
        store.recover(SOURCE, CpNumber(0)).unwrap();
        store.reset(SOURCE, Some(Place::default())).unwrap();
        let (_, pool) = pool_with(2 * POOL_BYTES_MIN, blocks);
        let image = vec![0; to_usize(blocks) * BLOCK_BYTES];
        let (applied, last) = Default::default();
        Self { _dir: dir, store, pool, image, applied, last, cp: 1 }
    }

    /// Appends one transfer, and does the same to the image.
    fn append(&mut self, changes: &[Change]) -> Transfer {
        let mut builder = Builder::default();
        for change in changes {
            let (entry, data) = entry_of(change);
            let range = to_usize(entry.offset)..to_usize(entry.end());
            self.image[range].copy_from_slice(&change.2);
            builder.push(entry, data);
        }
        let transfer = builder.finish(TransferHeader {
            id: TransferId { generation: 1, counter: self.last.transfer.counter + 1 },
            cp: CpNumber(self.cp),
            partition: 0,
            first_sequence: SequenceNumber(self.last.sequence.0 + 1),
            previous: self.last.transfer,
            hash_before: self.last.hash,
            own_durable: TransferId::NONE,
        });
        self.store.append(SOURCE, Epoch::default(), &transfer).unwrap();
        self.last = transfer.place();
        transfer
    }

    fn chain(&self) -> Chain<'_> {
        Chain { store: &self.store, source: SOURCE, from: self.applied }
    }

    fn bases(&self) -> BTreeMap<VolumeNumber, TreeRoot> {
        BTreeMap::from([(KEY.volume, tree(&self.pool))])
    }

    /// Replays up to the last transfer and publishes; the root.
    fn replay(&mut self) -> Root {
        let mut set = self.pool.begin(Budget::Ordinary);
        let replay = Replay::new(&mut set, SOURCE, CpNumber(self.cp), self.bases());
        let built = replay.run(&self.chain(), self.last, |_| true).unwrap();
        let built = built.get(&KEY.volume).copied().unwrap_or_else(|| tree(&self.pool));
        // A tree without a base is refused, so an idle replay publishes what is there.
        self.pool.publish(publish_of(set, self.cp, built)).unwrap();
        self.applied = self.last;
        self.store.drop_through(SOURCE, CpNumber(self.cp)).unwrap();
        self.cp += 1;
        built.root()
    }

    fn error(&self, upto: Place) -> ReplayError {
        let mut set = self.pool.begin(Budget::Ordinary);
        let replay = Replay::new(&mut set, SOURCE, CpNumber(self.cp), self.bases());
        replay.run(&self.chain(), upto, |_| true).unwrap_err()
    }

    /// The root as a source makes it of the same entries in one go.
    fn as_the_source(&self, changes: &[Change]) -> Root {
        let mut buffers = Buffers::default();
        for change in changes {
            let (entry, data) = entry_of(change);
            buffers.apply(&entry, &data);
        }
        let base = tree(&self.pool);
        let plan = Plan::build(&buffers, |_, vbn, page| {
            read_into(&self.pool, &base, vbn * to_u64(BLOCK_BYTES), page)
        });
        let mut set = self.pool.begin(Budget::Ordinary);
        let mut writer =
            TreeWriter::new(&self.pool, &mut set, KEY, base, CpNumber(self.cp)).unwrap();
        for step in plan.unwrap().volumes.iter().flat_map(|volume| &volume.steps) {
            match step {
                Step::Block { vbn, data, .. } => writer.put(Vbn(*vbn), Content::Data(data)),
                Step::Hole { vbn, count } => writer.put_hole_range(Vbn(*vbn), *count),
            }
            .unwrap();
        }
        writer.finish().unwrap().root()
    }

    fn assert_equal(&mut self, changes: &[Change], what: &str) {
        let wanted = self.as_the_source(changes);
        let met = self.replay();
        assert_eq!(met, wanted, "{what}: as the source builds it");
        assert_eq!(met, slow_root(&self.image), "{what}: as the bytes are");
    }
}

/// The kinds of rules.md, test 9, on block 1 of three.
fn operations() -> Vec<Change> {
    let write = |offset: u64, length, fill| (EntryKind::Write, offset, vec![fill; length]);
    let none = |kind, offset: u64, length| (kind, offset, vec![0; length]);
    vec![
        write(4096, 4096, 0x11),
        write(4096 + 100, 1000, 0x22),
        write(4096, 1000, 0x44),
        none(EntryKind::Zeroes, 4096, 4096),
        none(EntryKind::Zeroes, 4000, 4300),
        none(EntryKind::Trim, 4096, 4096),
    ]
}

/// Goal: what is replayed is what the source made of the same entries, whatever came in which
/// order on one block. Method: every order of length 4, in one to four transfers, each on top of
/// what the ones before have left.
#[test]
fn every_order_of_four_gives_the_root_of_the_source() {
    let operations = operations();
    let count = operations.len();
    let mut bench = Bench::new(3);
    for history in 0..count.pow(4) {
        let steps = [0, 1, 2, 3].map(|n| operations[history / count.pow(n) % count].clone());
        for part in steps.chunks(1 + history % 4) {
            bench.append(part);
        }
        bench.assert_equal(&steps, &format!("history {history}"));
    }
    crate::volume::testing::assert_clean(&bench.pool);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random entries at any alignment over 40 blocks, more than one pass holds, in several CPs.
    #[test]
    fn random_entries_give_the_root_of_the_source(
        rounds in prop::collection::vec(
            prop::collection::vec(
                prop::collection::vec((0..4_u8, 0..163_000_u64, 1..30_000_u64, any::<u8>()), 1..6),
                1..8,
            ),
            1..4,
        ),
    ) {
        const SIZE: u64 = 40 * 4096;
        let mut bench = Bench::new(40);
        for (round, transfers) in rounds.into_iter().enumerate() {
            let mut all = Vec::new();
            for entries in transfers {
                let changes: Vec<Change> = entries
                    .into_iter()
                    .map(|(kind, offset, length, fill)| {
                        let length = length.min(SIZE - offset);
                        match kind {
                            0 => (EntryKind::Zeroes, offset, vec![0; to_usize(length)]),
                            1 => {
                                let count = (length / 4096).max(1);
                                let first = (offset / 4096).min(40 - count);
                                (EntryKind::Trim, first * 4096, vec![0; to_usize(count * 4096)])
                            }
                            _ => (EntryKind::Write, offset, vec![fill; to_usize(length)]),
                        }
                    })
                    .collect();
                bench.append(&changes);
                all.extend(changes);
            }
            bench.assert_equal(&all, &format!("round {round}"));
        }
        prop_assert_eq!(content(&bench.pool, &tree(&bench.pool)), bench.image);
    }
}

fn gap(error: &ReplayError) -> &Gap {
    match error {
        ReplayError::Gap(gap) => gap,
        other => panic!("{other} is no gap"),
    }
}

/// Entries that are not there, damaged, or of nowhere: nothing is built of them, and the error says
/// how far the log reaches.
#[test]
fn a_gap_or_damage_says_how_far_the_log_reaches() {
    let mut bench = Bench::new(3);
    let write = |fill| (EntryKind::Write, 0, vec![fill; 4096]);
    bench.append(&[write(1)]);
    let first = bench.last;
    bench.append(&[write(2)]);
    let second = bench.last;
    let beyond = Place { transfer: TransferId { generation: 1, counter: 9 }, ..second };
    let missing = bench.error(beyond);
    assert_eq!(gap(&missing).reaches, second);
    assert!(gap(&missing).reason.contains("1.9"), "{missing}");
    // The same transfer with another history.
    let other = Place { hash: first.hash, ..second };
    assert_eq!(gap(&bench.error(other)).reaches, second);
    // An image of another line: nothing joins it.
    let place = bench.applied;
    bench.applied = Place { hash: second.hash, ..place };
    assert_eq!(gap(&bench.error(second)).reaches, bench.applied);
    bench.applied = place;
    // One bit of the second transfer's data.
    let path = std::fs::read_dir(bench._dir.path().join(SOURCE.to_string())).unwrap();
    let path = path.map(|entry| entry.unwrap().path()).next().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.iter().rposition(|&byte| byte == 2).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let damaged = bench.error(second);
    assert_eq!(gap(&damaged).reaches, first, "{damaged}");
    let text = damaged.to_string();
    assert!(text.contains("checksum") && text.contains("transfer 1.1"), "{text}");
    assert!(bench.chain().walk(first, |_, _| Ok(())).is_ok(), "the prefix is good");
}

#[test]
fn an_entry_past_the_end_or_of_no_volume_is_refused() {
    let mut bench = Bench::new(3);
    bench.append(&[(EntryKind::Write, 0, vec![1; 4096])]);
    let first = bench.last;
    bench.image.resize(8 * 4096, 0);
    bench.append(&[(EntryKind::Write, 3 * 4096 - 1, vec![1; 2])]);
    let error = bench.error(bench.last);
    assert_eq!(gap(&error).reaches, first);
    assert!(error.to_string().contains("passes the end"), "{error}");
    let mut set = bench.pool.begin(Budget::Ordinary);
    let replay = Replay::new(&mut set, SOURCE, CpNumber(1), BTreeMap::new());
    let error = replay.run(&bench.chain(), first, |_| true).unwrap_err();
    assert!(error.to_string().contains("not known here"), "{error}");
}

#[test]
fn it_stops_when_it_is_told() {
    let mut bench = Bench::new(3);
    bench.append(&[(EntryKind::Write, 0, vec![1; 4096])]);
    let mut set = bench.pool.begin(Budget::Ordinary);
    let replay = Replay::new(&mut set, SOURCE, CpNumber(1), bench.bases());
    let error = replay.run(&bench.chain(), bench.last, |_| false).unwrap_err();
    assert!(matches!(error, ReplayError::Stopped));
}
