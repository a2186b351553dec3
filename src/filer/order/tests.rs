//! Order, back-pressure and freeze without ring or pool: the test takes what is queued itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use super::pieces::RANGE_BYTES_MAX;
use super::*;
use crate::record::transfer::{Builder, TransferHeader};
use crate::units::hash::StreamHash;
use crate::units::hash::crc32c;

const VOLUME: VolumeNumber = VolumeNumber(0);
const RING: u64 = 8 << 20;

struct Bench {
    order: Order,
    headroom: Arc<AtomicU64>,
}

fn bench() -> Bench {
    let headroom = Arc::new(AtomicU64::new(u64::MAX / 2));
    let free = Arc::clone(&headroom);
    let shapes = BTreeMap::from([(VOLUME, VolumeShape { blocks: 1 << 18, height: 3 })]);
    let takes = move |blocks| blocks <= free.load(Ordering::Relaxed);
    let order = Order::new(shapes, Box::new(takes), Box::new(|| {}));
    order.set_capacity(RING);
    Bench { order, headroom }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

fn data(length: usize) -> Change {
    Change::Write(Bytes::from(vec![1; length]))
}

async fn is_pending<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
    let mut future = future;
    std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

#[test]
fn a_long_request_is_cut_at_block_boundaries() {
    let pieces = cut(VOLUME, 1000, &data(600 << 10));
    let spans: Vec<_> = pieces.iter().map(|(entry, _)| (entry.offset, entry.end())).collect();
    assert_eq!(spans, [(1000, 262_144), (262_144, 524_288), (524_288, 1000 + 614_400)]);
    for (entry, data) in &pieces {
        entry.check().unwrap();
        assert_eq!(entry.crc, crc32c(data));
    }
}

#[test]
fn trim_covers_whole_blocks_and_zeroes_every_byte() {
    assert!(cut(VOLUME, 100, &Change::Trim(4095)).is_empty());
    let spans = |change| -> Vec<_> {
        let pieces = cut(VOLUME, 100, &change);
        pieces.iter().map(|(entry, _)| (entry.offset, entry.end(), entry.kind)).collect()
    };
    assert_eq!(spans(Change::Trim(9000)), [(4096, 8192, EntryKind::Trim)]);
    assert_eq!(spans(Change::Zeroes(9000)), [(100, 9100, EntryKind::Zeroes)]);
    let long = spans(Change::Zeroes(u64::from(u32::MAX)));
    assert_eq!(long.first().unwrap().1, RANGE_BYTES_MAX);
    assert_eq!(long.last().unwrap().1, 100 + u64::from(u32::MAX));
    assert!(long.windows(2).all(|pair| pair[0].1 == pair[1].0));
}

/// The charge covers the record an entry can cause; a partition takes the largest.
#[test]
fn the_charge_is_never_too_small() {
    for (offset, length) in [(0, 1), (4095, 2), (1, 262_143), (100, 4096), (0, 262_144)] {
        let (entry, _) = cut(VOLUME, offset, &data(length)).remove(0);
        let blocks = entry.end().div_ceil(4096) - entry.offset / 4096;
        assert!(charge(&entry) >= record_bytes(80 + 24 + u64::from(entry.length)));
        assert!(charge(&entry).max(blocks * DIRTY_BLOCK_BYTES) <= partition_bytes_min());
    }
    let trim = cut(VOLUME, 0, &Change::Trim(1 << 30)).remove(0).0;
    assert_eq!(charge(&trim), 512);
}

/// Small writes fill the memory of a partition before its records do; writes of the same block
/// do not fill it again.
#[test]
fn memory_is_bounded_as_well() {
    runtime().block_on(async {
        let Bench { order, .. } = bench();
        let small = data(16);
        for _ in 0..1000 {
            order.change(VOLUME, 0, &small).await.unwrap();
        }
        assert_eq!(order.figures().frozen_cp, None, "one block, half a MiB of records");
        let mut ordered = 0;
        while order.figures().frozen_cp.is_none() {
            ordered += 1;
            order.change(VOLUME, ordered * 4096, &small).await.unwrap();
        }
        let blocks = order.frozen().unwrap().buffers.blocks();
        let partition = order.figures().partition_bytes;
        assert!(blocks * DIRTY_BLOCK_BYTES <= partition);
        assert!((blocks + 2) * DIRTY_BLOCK_BYTES > partition, "and used");
    });
}

#[test]
fn a_full_partition_freezes_then_waits_and_loses_nothing() {
    runtime().block_on(async {
        let Bench { order, .. } = bench();
        let mut ordered = 0_u64;
        let chunk = data(256 << 10);
        let nothing = Change::Trim(0);
        let mut next = Box::pin(order.change(VOLUME, 0, &nothing));
        let offset = |n: u64| n % 1024 * (256 << 10);
        while !is_pending(next.as_mut()).await {
            ordered += 1;
            next = Box::pin(order.change(VOLUME, offset(ordered), &chunk));
        }
        let figures = order.figures();
        assert_eq!(figures.frozen_cp, Some(CpNumber(1)), "the first half was frozen");
        assert_eq!(figures.open_cp, CpNumber(2), "and the second filled");
        assert!(figures.open_bytes <= figures.partition_bytes);
        assert_eq!(figures.waiting, 1);
        let mut behind = Box::pin(order.change(VOLUME, 0, &chunk));
        assert!(is_pending(behind.as_mut()).await, "nobody overtakes");
        let trim = Change::Trim(4096);
        let mut trim = Box::pin(order.change(VOLUME, 0, &trim));
        assert!(!is_pending(trim.as_mut()).await, "a trim needs almost nothing");
        drop(trim);
        order.thaw(CpNumber(1));
        assert_eq!(next.await.unwrap(), Some(SequenceNumber(figures.sequence.0 + 2)));
        assert_eq!(behind.await.unwrap(), Some(SequenceNumber(figures.sequence.0 + 3)));
        assert_eq!(order.figures().waiting, 0);
        assert_eq!(order.figures().frozen_cp, Some(CpNumber(2)));
    });
}

#[test]
fn a_waiter_that_goes_away_makes_way() {
    runtime().block_on(async {
        let Bench { order, headroom } = bench();
        headroom.store(0, Ordering::Relaxed);
        let change = data(4096);
        let mut first = Box::pin(order.change(VOLUME, 0, &change));
        assert!(is_pending(first.as_mut()).await);
        assert_eq!(order.figures().waiting, 1);
        drop(first);
        assert_eq!(order.figures().waiting, 0);
        headroom.store(100, Ordering::Relaxed);
        assert_eq!(order.change(VOLUME, 0, &change).await.unwrap(), Some(SequenceNumber(1)));
    });
}

/// R18: what is ordered fits the pool at worst; a full pool freezes once (overwritten blocks come
/// free with the CP) and then waits; trims pass.
#[test]
fn a_full_pool_makes_writes_wait_and_lets_trims_pass() {
    runtime().block_on(async {
        let Bench { order, headroom } = bench();
        headroom.store(worst(1, 3), Ordering::Relaxed);
        let change = data(4096);
        assert!(order.change(VOLUME, 0, &change).await.unwrap().is_some());
        let mut second = Box::pin(order.change(VOLUME, 1 << 29, &change));
        assert!(is_pending(second.as_mut()).await);
        assert_eq!(order.frozen().unwrap().cp, CpNumber(1));
        assert_eq!(order.frozen().unwrap().space_blocks, 4);
        assert!(order.change(VOLUME, 0, &Change::Trim(8192)).await.unwrap().is_some());
        assert!(is_pending(second.as_mut()).await);
        order.thaw(CpNumber(1));
        assert!(is_pending(second.as_mut()).await, "the trim's nodes are counted");
        order.settled(CpNumber(2));
        headroom.store(100, Ordering::Relaxed);
        order.thaw(CpNumber(2));
        assert!(second.await.unwrap().is_some());
    });
}

/// `on_full = "enospc"`: who finds no room waits for the CPs that may make some, and fails when they
/// did not; the next one is judged by itself, and the NVRAM is waited for as ever.
#[test]
fn a_full_pool_fails_writes_where_nobody_waits_for_it() {
    runtime().block_on(async {
        let Bench { order, headroom } = bench();
        let order = order.on_full(OnFull::Enospc);
        headroom.store(worst(1, 3), Ordering::Relaxed);
        let change = data(4096);
        assert!(order.change(VOLUME, 0, &change).await.unwrap().is_some());
        let mut second = Box::pin(order.change(VOLUME, 1 << 29, &change));
        assert!(is_pending(second.as_mut()).await, "a CP may make room");
        assert_eq!(order.frozen().unwrap().cp, CpNumber(1));
        headroom.store(0, Ordering::Relaxed);
        order.settled(CpNumber(1));
        order.thaw(CpNumber(1));
        assert_eq!(second.await.unwrap_err(), Refusal::NoSpace);
        assert_eq!(order.change(VOLUME, 0, &change).await.unwrap_err(), Refusal::NoSpace);
        assert_eq!((order.freeze(), order.figures().waiting), (None, 0), "no CP of nothing");
        // What makes room passes, and so does a write behind it.
        assert!(order.change(VOLUME, 0, &Change::Trim(8192)).await.unwrap().is_some());
        let mut behind = Box::pin(order.change(VOLUME, 0, &change));
        assert!(is_pending(behind.as_mut()).await, "behind the trim's CP");
        headroom.store(100, Ordering::Relaxed);
        order.thaw(CpNumber(2));
        assert!(behind.await.unwrap().is_some());
    });
}

#[test]
fn a_refusal_reaches_those_who_wait_and_those_who_come() {
    runtime().block_on(async {
        let Bench { order, headroom } = bench();
        headroom.store(0, Ordering::Relaxed);
        let change = data(1);
        let mut waits = Box::pin(order.change(VOLUME, 0, &change));
        assert!(is_pending(waits.as_mut()).await);
        order.refuse(Refusal::Failed("broken".into()));
        order.refuse(Refusal::Stopped);
        assert_eq!(waits.await.unwrap_err(), Refusal::Failed("broken".into()));
        let later = order.change(VOLUME, 0, &Change::Trim(4096)).await;
        assert_eq!(later.unwrap_err(), Refusal::Failed("broken".into()));
    });
}

#[test]
fn an_empty_interval_is_never_frozen() {
    runtime().block_on(async {
        let Bench { order, .. } = bench();
        assert_eq!(order.freeze(), None);
        order.change(VOLUME, 0, &data(1)).await.unwrap();
        assert_eq!(order.freeze(), Some(CpNumber(1)));
        assert_eq!(order.freeze(), Some(CpNumber(1)), "the one under way");
        assert_eq!(order.target(), Some(CpNumber(1)));
        assert_eq!(order.take(u64::MAX).len(), 2);
    });
}

/// What is taken for one commit never exceeds it as records, and a freeze ends the batch.
#[test]
fn a_batch_fits_its_commit_and_ends_behind_a_freeze() {
    runtime().block_on(async {
        let Bench { order, .. } = bench();
        for n in 0..6_u64 {
            order.change(VOLUME, n << 18, &data(256 << 10)).await.unwrap();
        }
        order.freeze();
        order.change(VOLUME, 0, &data(512)).await.unwrap();
        let limit = 1 << 20;
        let first = order.take(limit);
        assert_eq!(first.len(), 3, "a fourth would need a second record");
        let second = order.take(limit);
        assert!(matches!(second[..], [_, _, _, Queued::Freeze(CpNumber(1))]));
        assert!(matches!(order.take(limit)[..], [Queued::Entry { cp: CpNumber(2), .. }]));
        assert!(order.take(limit).is_empty());
    });
}

fn transfer(counter: u64, cp: u32, offset: u64) -> Transfer {
    let bytes = Bytes::from(vec![9; 4096]);
    let (entry, bytes) = cut(VOLUME, offset, &Change::Write(bytes)).remove(0);
    let mut builder = Builder::default();
    builder.push(entry, bytes);
    builder.finish(TransferHeader {
        id: TransferId { generation: 1, counter },
        cp: CpNumber(cp),
        partition: 0,
        first_sequence: SequenceNumber(counter),
        previous: TransferId { generation: 1, counter: counter - 1 },
        hash_before: StreamHash::ZERO,
        own_durable: TransferId::NONE,
    })
}

#[test]
fn recovery_replays_into_the_same_place() {
    let Bench { order, .. } = bench();
    order.resume(SequenceNumber(4), CpNumber(0));
    order.take_over(&transfer(5, 7, 0), false).unwrap();
    order.take_over(&transfer(6, 7, 4096), false).unwrap();
    order.replay_freeze(CpNumber(7)).unwrap();
    order.take_over(&transfer(7, 8, 0), false).unwrap();
    let figures = order.figures();
    assert_eq!((figures.sequence, figures.open_cp), (SequenceNumber(7), CpNumber(8)));
    assert_eq!(order.frozen().unwrap().buffers.ordinals(), 2);
    assert_eq!(order.last_of(VOLUME), SequenceNumber(7));
    assert!(order.take(u64::MAX).is_empty(), "what the ring has is not queued again");
    order.raise_cp(CpNumber(99));
    assert_eq!(order.figures().open_cp, CpNumber(8), "an open CP keeps its number");

    // Broken histories are refused.
    assert!(matches!(order.take_over(&transfer(9, 8, 0), false), Err(AdoptError::Sequence { .. })));
    assert!(matches!(order.take_over(&transfer(8, 7, 0), false), Err(AdoptError::Cp { .. })));
    assert!(matches!(order.take_over(&transfer(8, 9, 0), false), Err(AdoptError::Cp { .. })));
    let outside = transfer(8, 8, 1 << 30);
    assert!(matches!(order.take_over(&outside, false), Err(AdoptError::Range { .. })));
    assert!(order.replay_freeze(CpNumber(7)).is_err());
}

/// R1: adopted transfers are queued for the ring; a later CP says where the freeze was.
#[test]
fn a_refill_is_queued_and_follows_its_cps() {
    let Bench { order, .. } = bench();
    order.take_over(&transfer(1, 3, 0), true).unwrap();
    order.take_over(&transfer(2, 4, 0), true).unwrap();
    let queued = order.take(u64::MAX);
    assert!(matches!(queued[..], [Queued::Adopted(_), Queued::Freeze(CpNumber(3))]));
    assert!(matches!(order.take(u64::MAX)[..], [Queued::Adopted(_)]));
    // A third CP cannot be: the second was never frozen while the first was under way.
    assert!(matches!(order.take_over(&transfer(3, 5, 0), true), Err(AdoptError::Cp { .. })));
}
