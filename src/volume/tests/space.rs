//! Space: no write hits what a root reaches, pins keep and give back, a full pool can free.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::device::sim::SimDevice;
use crate::pool::error::PoolError;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::testing::{Chance, changes, random_block, written_blocks};
use crate::pool::write_set::Budget;
use crate::pool::{Pin, Pool};
use crate::units::numbers::{BlockCount, CpNumber, Pbn};
use crate::volume::error::VolumeError;
use crate::volume::reader::Image;
use crate::volume::testing::{
    KEY, Put, SOURCE, assert_clean, content, cp, cp_with, data, pool_with, reachable_blocks, tree,
};

fn pin(pool: &Arc<Pool>) -> Pin {
    pool.pin(SOURCE, KEY.volume).unwrap()
}

/// Random CPs with pins coming and going. Returns the blocks that were written although a
/// published or pinned root reached them when the CP began.
fn overwritten(device: &SimDevice, pool: &Arc<Pool>, seed: u64) -> BTreeSet<u64> {
    let mut chance = Chance::new(seed);
    let (mut pins, mut hit) = (Vec::new(), BTreeSet::new());
    for number in 1..40 {
        let reachable = reachable_blocks(pool);
        device.clear_trace();
        let mut puts = Vec::new();
        let mut at = 0;
        while at < 900 {
            let [byte, ..] = chance.next_u64().to_le_bytes();
            let length = 1 + chance.below(30);
            puts.push(if byte % 5 == 0 { Put::Holes(at, length) } else { data(at, byte) });
            at += length + chance.below(60);
        }
        cp(pool, number, &puts).unwrap();
        hit.extend(written_blocks(device).intersection(&reachable));
        match chance.below(3) {
            0 => pins.push(pin(pool)),
            1 if !pins.is_empty() => {
                let gone = chance.below(u64::try_from(pins.len()).unwrap());
                drop(pins.swap_remove(usize::try_from(gone).unwrap()));
            }
            _ => {}
        }
    }
    hit
}

#[test]
fn no_write_hits_a_block_that_a_root_reaches() {
    for seed in 0..4 {
        let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
        assert_eq!(overwritten(&device, &pool, seed), BTreeSet::new(), "seed {seed}");
        let report = assert_clean(&pool);
        assert_eq!(report.only_pinned, 0, "all pins are gone");
    }
}

/// The negative control: an allocator that gives out freed blocks at once is caught.
#[test]
fn an_allocator_that_reuses_too_early_is_caught() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    let puts = |byte| (0..400).map(|vbn| data(vbn, byte)).collect::<Vec<_>>();
    cp(&pool, 1, &puts(1)).unwrap();
    let reachable = reachable_blocks(&pool);
    device.clear_trace();
    pool.break_allocator();
    let mut set = pool.begin(Budget::Ordinary);
    let built = crate::volume::testing::build(&mut set, tree(&pool), 2, &puts(2));
    let hit: Vec<_> = written_blocks(&device).intersection(&reachable).copied().collect();
    assert!(!hit.is_empty(), "{built:?}");
    // The accounts are broken on purpose: nothing may be given back by them.
    pool.poison();
    drop(set);
}

#[test]
fn a_pinned_image_does_not_change_and_its_blocks_come_back() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(1, 1), data(700, 1)]).unwrap();
    let old = Image::new(pin(&pool));
    let before = content(&pool, &old.pin().tree());
    cp(&pool, 2, &[data(1, 2), Put::Holes(600, 300)]).unwrap();
    let newer = pin(&pool);
    let again = pin(&pool);
    cp(&pool, 3, &[data(1, 3), data(2, 3)]).unwrap();
    let report = assert_clean(&pool);
    assert_eq!(report.pinned, 2);
    assert!(report.only_pinned > 0);
    assert_eq!(pool.space().unwrap().pinned.0, report.only_pinned);

    let mut now = vec![0; before.len()];
    old.read_into(0, &mut now).unwrap();
    assert_eq!(now, before);
    assert_eq!(old.pin().cp(), CpNumber(1));
    drop(old);
    assert_clean(&pool);
    drop(newer);
    assert!(assert_clean(&pool).only_pinned > 0, "one reader of CP 2 is left");
    drop(again);
    assert_eq!(assert_clean(&pool).only_pinned, 0);
    assert_eq!(pool.pin_counts(), (0, 0));
}

/// Writes until the pool is full; returns the last CP published.
fn fill(pool: &Arc<Pool>, blocks: u64) -> u32 {
    let mut chance = Chance::new(9);
    for (number, first) in (1u32..).zip((0..blocks).step_by(200)) {
        let puts: Vec<Put> = (first..first + 200)
            .map(|vbn| Put::Data(vbn, Box::new(random_block(&mut chance))))
            .collect();
        match cp(pool, number, &puts) {
            Ok(_) => {}
            Err(VolumeError::Pool(PoolError::Full { .. })) => return number - 1,
            Err(other) => panic!("{other}"),
        }
    }
    panic!("the pool is larger than the volume");
}

#[test]
fn a_full_pool_refuses_writes_and_publishes_a_cp_that_frees() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 10_000);
    let last = fill(&pool, 10_000);
    let space = pool.space().unwrap();
    assert!(space.free >= space.reserve, "{space:?}");
    assert!(space.free.0 < space.reserve.0 + 210, "{space:?}");
    assert_clean(&pool);
    // A trim needs new nodes: from the reserve, or not at all.
    let trim: Vec<Put> = (0..5).map(|n| Put::Holes(n * 300 + 7, 101)).collect();
    let count = u64::from(last) * 200;
    while pool.begin(Budget::Ordinary).append(&[1; 4096]).is_ok() {
        // Take what is left in ordinary space for good, so that the reserve must serve.
        let Ok(reservation) = pool.reserve(BlockCount(1)) else { break };
        Box::leak(Box::new(reservation));
    }
    let met = cp(&pool, last + 1, &trim).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::Full { .. })), "{met}");
    // As a hub's CPs are: one that takes more than it gives back does not live on the reserve.
    let met = cp_with(&pool, Budget::FREEING, last + 1, &[data(9_999, 1)]).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::Full { .. })), "{met}");
    assert_eq!(pool.space().unwrap().in_flight.0, 0, "what it drew went back");
    cp_with(&pool, Budget::FREEING, last + 1, &trim).unwrap();
    let after = pool.space().unwrap();
    assert!(after.free.0 > space.free.0 + 400, "{after:?}");
    cp(&pool, last + 2, &[data(9_999, 1)]).unwrap();
    let report = assert_clean(&pool);
    assert!(report.reachable < count + 1000);
    drop(pool);
    let pool = Pool::open(device, crate::volume::testing::options()).unwrap();
    assert_clean(&pool);
}

#[test]
fn the_oldest_pin_is_ended_when_the_pool_needs_its_blocks() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 10_000);
    let last = fill(&pool, 10_000) + 1;
    cp_with(&pool, Budget::Reserve, last, &[Put::Holes(0, 150)]).unwrap();
    let held = Image::new(pin(&pool));
    // Overwriting takes new blocks and cannot give the pinned ones back.
    cp(&pool, last + 1, &[data(200, 1)]).unwrap();
    let young = Image::new(pin(&pool));
    cp(&pool, last + 2, &[Put::Holes(0, 3_000)]).unwrap();
    assert!(pool.space().unwrap().pinned.0 > 1_000);
    assert!(held.read(0, 4096).is_ok());
    let puts: Vec<Put> = (5_000..6_000).map(|vbn| data(vbn, 3)).collect();
    // Pins go before the reserve does, though this CP may use it.
    let reserve = pool.space().unwrap().reserve;
    cp_with(&pool, Budget::Reserve, last + 3, &puts).unwrap();
    assert!(pool.space().unwrap().free >= reserve);
    let met = held.read(0, 4096).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::PinEnded { .. })), "{met}");
    assert!(pool.pin_counts().1 >= 1);
    assert_clean(&pool);
    drop((held, young));
    assert_eq!(assert_clean(&pool).only_pinned, 0);
}

#[test]
fn a_reservation_is_room_that_nobody_else_gets() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 10_000);
    let ordinary = |space: crate::pool::space::Space| space.free.0 - space.held.0 - space.reserve.0;
    let all = ordinary(pool.space().unwrap());
    let mut reservation = pool.reserve(BlockCount(all - 10)).unwrap();
    assert!(matches!(pool.reserve(BlockCount(11)), Err(PoolError::Full { .. })));
    let puts: Vec<Put> = (0..100).map(|vbn| data(vbn, 1)).collect();
    let met = cp(&pool, 1, &puts).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::Full { .. })), "{met}");
    let part = reservation.split(BlockCount(103));
    cp_with(&pool, Budget::Held(part), 1, &puts).unwrap();
    let space = pool.space().unwrap();
    assert_eq!(space.held.0, reservation.blocks().0, "what was not used went back");
    assert_eq!(space.used.0, 102);
    reservation.merge(pool.reserve(BlockCount(5)).unwrap());
    assert_eq!(pool.space().unwrap().held, reservation.blocks());
    drop(reservation);
    assert_eq!(pool.space().unwrap().held.0, 0);
    assert_clean(&pool);
}

/// PBNs are reused; the node cache must not answer with what was there before.
#[test]
fn a_reused_block_is_not_taken_for_the_old_one() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 3_000);
    let mut chance = Chance::new(5);
    for number in 1..150 {
        let puts: Vec<Put> = (0..10)
            .map(|n| Put::Data(n * 290 + chance.below(200), Box::new(random_block(&mut chance))))
            .collect();
        cp(&pool, number, &puts).unwrap();
    }
    let report = assert_clean(&pool);
    assert!(report.nodes < 40);
    let cached = u64::try_from(pool.cached_blocks()).unwrap();
    assert!(cached <= report.nodes, "{cached} nodes are cached, {} are in use", report.nodes);
    assert!(150 * 20 > report.total, "blocks were reused");
}

#[test]
fn runs_are_long_and_bytes_arrive_where_they_are_said_to_be() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 100);
    let mut chance = Chance::new(4);
    let bytes: Vec<u8> = (0..600).flat_map(|_| random_block(&mut chance)).collect();
    let mut set = pool.begin(Budget::Ordinary);
    device.clear_trace();
    let runs = set.write(&bytes).unwrap();
    set.flush_buffer().unwrap();
    assert_eq!(runs.iter().map(|run| run.count).sum::<u64>(), 600);
    assert_eq!(runs.len(), 1, "{runs:?}");
    assert_eq!(changes(&device).len(), 3, "a MiB each");
    let mut read = vec![0; bytes.len()];
    let (blocks, _) = bytes.as_chunks::<4096>();
    let crcs: Vec<u32> = blocks.iter().map(|block| crate::units::hash::crc32c(block)).collect();
    pool.read_run(runs[0].start, &crcs, &mut read).unwrap();
    assert_eq!(read, bytes);
    assert!(set.write(&bytes[1..]).is_err());
    let met = pool.read_run(Pbn(0), &crcs[..1], &mut read[..4096]).unwrap_err();
    assert!(matches!(met, PoolError::OutOfPool { .. }), "{met}");
    drop(set);
    assert_eq!(pool.space().unwrap().in_flight.0, 0);
}

/// Freed blocks that a kept CP has make no room: such a CP does not live on the reserve.
#[test]
fn what_stays_for_a_kept_cp_does_not_count_as_freed() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 10_000);
    let puts: Vec<Put> = (0..300).map(|vbn| data(vbn, 1)).collect();
    cp(&pool, 1, &puts).unwrap();
    let name: crate::units::names::KeptName = "old".parse().unwrap();
    pool.keep(SOURCE, name).unwrap();
    let space = pool.space().unwrap();
    let all = space.free.0 - space.held.0 - space.reserve.0;
    let held = pool.reserve(BlockCount(all)).unwrap();
    let trim = [Put::Holes(7, 101)];
    let met = cp_with(&pool, Budget::FREEING, 2, &trim).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::Full { .. })), "{met}");
    drop(held);
    cp_with(&pool, Budget::FREEING, 2, &trim).unwrap();
    assert_clean(&pool);
}

/// A CP that draws on what it was promised ends no pin; control: one that draws on the reserve
/// does.
#[test]
fn promised_blocks_end_no_pin() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 10_000);
    let puts = |byte| (0..100).map(|vbn| data(vbn, byte)).collect::<Vec<Put>>();
    cp(&pool, 1, &puts(1)).unwrap();
    let old = Image::new(pin(&pool));
    cp(&pool, 2, &puts(2)).unwrap();
    let space = pool.space().unwrap();
    let mut held = pool.reserve(BlockCount(space.free.0 - space.reserve.0)).unwrap();
    let part = held.split(BlockCount(200));
    cp_with(&pool, Budget::Held(part), 3, &puts(3)).unwrap();
    assert!(old.read(0, 4096).is_ok());
    let rest = pool.space().unwrap();
    let _rest = pool.reserve(BlockCount(rest.free.0 - rest.held.0 - rest.reserve.0)).unwrap();
    cp_with(&pool, Budget::Reserve, 4, &[data(0, 4)]).unwrap();
    let met = old.read(0, 4096).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::PinEnded { .. })), "{met}");
    drop(held);
}
