//! Scrubs of real pools on simulated devices: what rots, is misdirected or lost is mended; what
//! cannot be is named; a restart goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::note::{Next, Note};
use super::{Options, Upkeep};
use crate::device::Device;
use crate::device::sim::{Chance, SimDevice};
use crate::limits::RAID_CHUNK_BYTES;
use crate::pool::Pool;
use crate::pool::rows::SourceRow;
use crate::pool::testing::random_block;
use crate::raid::assemble::{self, OpenOptions};
use crate::raid::layout::{Level, data_start};
use crate::status::upkeep::ScrubStatus;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::ByteCount;
use crate::volume::testing::{KEY, Put, SOURCE, add_volume, assert_clean, cp, data_block, options};

const SHAPES: [(Level, usize); 3] = [(Level::Mirror, 2), (Level::Parity1, 4), (Level::Parity2, 5)];
const BLOCKS: u64 = 400;

/// A pool, and the devices that it lies on.
struct Rig {
    sims: Vec<Arc<SimDevice>>,
    pool: Arc<Pool>,
    level: Level,
}

fn devices(sims: &[Arc<SimDevice>]) -> Vec<Arc<dyn Device>> {
    sims.iter().map(|sim| -> Arc<dyn Device> { Arc::<SimDevice>::clone(sim) }).collect()
}

impl Rig {
    /// A pool with a volume, a kept CP of it and a newer one that shares half.
    fn new(level: Level, members: usize) -> Self {
        let size = ByteCount(24 << 20);
        let sim = |n: usize| Arc::new(SimDevice::new(&format!("disk{n}"), size));
        let sims: Vec<_> = (0..members).map(sim).collect();
        let device: Arc<dyn Device> = match level {
            Level::None => Arc::<SimDevice>::clone(&sims[0]),
            Level::Mirror | Level::Parity1 | Level::Parity2 => {
                assemble::create(level, &devices(&sims)).unwrap()
            }
        };
        let pool = Pool::create(device, SOURCE.0, options()).unwrap();
        pool.catalog().put_source(SourceRow::new(SOURCE, "filer-a".parse().unwrap())).unwrap();
        add_volume(&pool, KEY, 20_000);
        let mut chance = Chance::new(11);
        let mut puts = |range: std::ops::Range<u64>| -> Vec<Put> {
            range.map(|vbn| Put::Data(vbn * 3, Box::new(random_block(&mut chance)))).collect()
        };
        cp(&pool, 1, &puts(0..BLOCKS)).unwrap();
        pool.keep(SOURCE, "old".parse().unwrap()).unwrap();
        cp(&pool, 2, &puts(BLOCKS / 2..BLOCKS)).unwrap();
        Self { sims, pool, level }
    }

    /// Closed and opened again.
    fn reopened(self) -> Self {
        let Self { sims, pool, level } = self;
        drop(pool);
        let device = assemble::open(&devices(&sims), OpenOptions::default()).unwrap().array;
        Self { pool: Pool::open(device, options()).unwrap(), sims, level }
    }

    fn upkeep(&self) -> Arc<Upkeep> {
        Upkeep::start(self.pool.clone(), Options::default(), Box::new(|| {})).unwrap()
    }

    /// One scrub from its begin to its end.
    fn scrub(&self) -> ScrubStatus {
        let upkeep = self.upkeep();
        assert!(upkeep.begin_scrub());
        let scrub = ended(&upkeep, 1);
        upkeep.stop();
        scrub
    }

    /// First byte behind the catalog, and of the end of what was written, on each device.
    fn data_range(&self) -> std::ops::Range<u64> {
        let columns = to_u64(self.sims.len() - self.level.spare(self.sims.len()));
        let first = self.pool.blocks_in_use().unwrap().first_data() * BLOCK_BYTES_U64;
        let stripe = first / (columns * RAID_CHUNK_BYTES) + 1;
        let from = data_start(RAID_CHUNK_BYTES) + stripe * RAID_CHUNK_BYTES;
        from..from + (BLOCKS * 2 / columns) * BLOCK_BYTES_U64
    }

    fn all_fit(&self) -> bool {
        let array = self.pool.array().unwrap();
        let blocks = array.stripe_bytes() / BLOCK_BYTES_U64;
        let in_use = self.pool.blocks_in_use().unwrap();
        let stripes = (0..array.stripes()).filter(|s| in_use.any(s * blocks, blocks));
        stripes.into_iter().all(|stripe| array.check_stripe(stripe).unfit.is_empty())
    }
}

fn ended(upkeep: &Upkeep, scrubs: u64) -> ScrubStatus {
    while upkeep.scrubs_ended() < scrubs {
        std::thread::yield_now();
    }
    upkeep.scrub()
}

/// Goal: a scrub of what is right reads all of it, and says so.
#[test]
fn what_is_right_is_clean() {
    for (level, members) in [(Level::None, 1), SHAPES[0], SHAPES[1], SHAPES[2]] {
        let rig = Rig::new(level, members);
        let scrub = rig.scrub();
        assert_eq!((scrub.state.as_str(), scrub.lost_blocks), ("clean", 0), "{level:?} {scrub:?}");
        let least = (BLOCKS + BLOCKS / 2) * BLOCK_BYTES_U64;
        assert!(scrub.done_bytes > least, "{level:?}: {} read", scrub.done_bytes);
        assert!(scrub.age_seconds.is_some(), "{scrub:?}");
    }
}

/// Goal: whatever one device holds of data, copies and parity may be rotten, misdirected or stale: a
/// scrub mends all of it, so that every other device may fail afterwards; and each device is told
/// apart. Control: before it there is something to mend.
#[test]
fn one_lying_device_is_mended_whole() {
    for (level, members) in SHAPES {
        for (n, kind) in ["rot", "misdirected", "lost"].into_iter().enumerate() {
            let rig = Rig::new(level, members);
            let liar = n % members;
            let range = rig.data_range();
            let image = rig.sims[liar].image();
            let block = |at: u64| &image[to_usize(at)..to_usize(at + BLOCK_BYTES_U64)];
            let mut chance = Chance::new(to_u64(n));
            for at in range.clone().step_by(to_usize(BLOCK_BYTES_U64)) {
                match kind {
                    "rot" => rig.sims[liar].rot(at + chance.below(4000), &[0x40]),
                    "lost" => rig.sims[liar].plant(at, &[0; 4096]),
                    _ => {
                        let other = range.start + (range.end - BLOCK_BYTES_U64 - at);
                        rig.sims[liar].plant(at, block(other.max(range.start)));
                    }
                }
            }
            assert!(!rig.all_fit(), "{level:?} {kind}: nothing was broken");
            let scrub = rig.scrub();
            assert_eq!(scrub.state, "repaired", "{level:?} {kind}: {scrub:?}");
            assert!(scrub.repaired_blocks + scrub.repaired_copies > 50, "{level:?} {scrub:?}");
            // Parity beside a free block that rotted is another device's.
            let most = scrub.devices.iter().max_by_key(|device| device.repaired_blocks).unwrap();
            assert_eq!(most.name, format!("disk{liar}"), "{level:?} {kind} {scrub:?}");
            assert!(rig.all_fit(), "{level:?} {kind}: copies differ still");
            assert_clean(&rig.pool);
        }
    }
}

/// Goal: beyond what the level bears each block is named, and nothing wrong is taken for right.
#[test]
fn what_has_no_right_copy_is_named() {
    for (level, members) in [(Level::None, 1), SHAPES[0], SHAPES[1], SHAPES[2]] {
        let rig = Rig::new(level, members);
        let (vbn, block) = (7 * 3, data_block(&rig.pool, 7 * 3));
        // The block itself, and as many others of its row as make it unknowable.
        if level == Level::None {
            rig.sims[0].rot(block * BLOCK_BYTES_U64 + 9, &[1]);
        } else {
            let columns = to_u64(members - level.spare(members));
            let row = block * BLOCK_BYTES_U64 / (columns * RAID_CHUNK_BYTES);
            let within = block * BLOCK_BYTES_U64 % RAID_CHUNK_BYTES;
            let at = data_start(RAID_CHUNK_BYTES) + row * RAID_CHUNK_BYTES + within;
            rig.sims.iter().for_each(|sim| sim.rot(at + 9, &[1]));
            rig.sims.iter().zip(1..).for_each(|(sim, n)| sim.rot(at + 99, &[n]));
        }
        let scrub = rig.scrub();
        assert_eq!(scrub.state, "damaged", "{level:?} {scrub:?}");
        let named = format!("filer-a/vol1: block {vbn} at CP");
        assert!(scrub.lost.iter().any(|lost| lost.starts_with(&named)), "{level:?} {scrub:?}");
        // A block that is lost is so every time: nobody has made its copies agree.
        assert_eq!(rig.scrub().lost_blocks, scrub.lost_blocks, "{level:?}");
    }
}

/// Goal: a scrub that a restart ends goes on from where it was, in the trees and in the stripes, and
/// finds in all what one finds. Method: ended at every noted place.
#[test]
fn a_restart_goes_on() {
    let mut places = 0;
    for cut in 0..5 {
        let mut rig = Rig::new(Level::Parity1, 4);
        let range = rig.data_range();
        rig.sims[1].rot(range.end - 3 * BLOCK_BYTES_U64, &[7; 64]);
        rig.sims[2].rot(range.start + 5 * BLOCK_BYTES_U64, &[7; 64]);
        let upkeep = rig.upkeep();
        upkeep.begin_scrub();
        // The thread stops at the first pause behind so many blocks.
        while upkeep.scrub().done_bytes <= cut * 1000 * BLOCK_BYTES_U64
            && upkeep.scrubs_ended() == 0
        {
            std::thread::yield_now();
        }
        upkeep.stop();
        let under_way = upkeep.scrubs_ended() == 0;
        let before = upkeep.scrub();
        // On a busy machine it may have come by both places before it was stopped.
        let both = before.repaired_blocks + before.repaired_copies >= 2;
        rig = rig.reopened();
        let note = Note::load(&rig.pool);
        assert_eq!(note.next.is_some(), under_way);
        places += u64::from(matches!(note.next, Some(Next::Tree(_, at)) if at > 0));
        if under_way {
            let upkeep = rig.upkeep();
            assert!(!upkeep.begin_scrub(), "it goes on by itself");
            let scrub = ended(&upkeep, 1);
            let as_wanted = scrub.state == "repaired" || both && scrub.state == "clean";
            assert!(as_wanted, "{cut}: {scrub:?}, before {before:?}");
            upkeep.stop();
        }
        assert!(rig.all_fit());
        if !under_way {
            break;
        }
    }
    assert!(places > 0, "no scrub was ended in the middle of the trees");
}

/// Goal: a scrub that is told to end ends, and what the other end gives back is not lost.
#[test]
fn it_ends_when_told_and_asks_the_other_end() {
    let rig = Rig::new(Level::None, 1);
    let at = data_block(&rig.pool, 21);
    let mut block = [0; 4096];
    rig.sims[0].read_at(at * BLOCK_BYTES_U64, &mut block).unwrap();
    rig.sims[0].rot(at * BLOCK_BYTES_U64 + 9, &[1]);
    let asked = Arc::new(AtomicBool::new(false));
    let (pool, told) = (rig.pool.clone(), asked.clone());
    let crc = crate::units::hash::crc32c(&block);
    let mend = move || {
        told.store(true, Ordering::Release);
        pool.mend(crate::units::numbers::Pbn(at), crc, block).unwrap();
    };
    let upkeep = Upkeep::start(rig.pool.clone(), Options::default(), Box::new(mend)).unwrap();
    assert!(!upkeep.halt_scrub(), "there is none");
    upkeep.begin_scrub();
    let scrub = ended(&upkeep, 1);
    assert!(asked.load(Ordering::Acquire));
    assert_eq!((scrub.lost_blocks, scrub.from_other_end_blocks), (0, 1), "{scrub:?}");
    assert_eq!(scrub.state, "repaired");
    upkeep.stop();
    // So slow that it does not come to its end.
    let slow = Options { scrub_limit: Some(ByteCount(64 << 10)), ..Options::default() };
    let upkeep = Upkeep::start(rig.pool.clone(), slow, Box::new(|| {})).unwrap();
    upkeep.begin_scrub();
    while upkeep.scrub().done_bytes == 0 {
        std::thread::yield_now();
    }
    assert!(upkeep.halt_scrub());
    assert_eq!(ended(&upkeep, 1).state, "stopped");
    upkeep.stop();
    assert_eq!(Note::load(&rig.pool).next, None, "it does not go on by itself");
}

/// Goal: what rots of the catalog on one device is mended by a scrub, and by an open, which would
/// otherwise write it again as it is read and so make it final. Control: on more devices than the
/// level bears it is an error that says so.
#[test]
fn the_catalog_is_mended_by_scrub_and_open() {
    for (level, members) in SHAPES {
        let columns = to_u64(members - level.spare(members));
        let rot = |sims: &[Arc<SimDevice>], n: usize| {
            // The first pages of the database, on that device.
            let from = data_start(RAID_CHUNK_BYTES);
            let bytes = (256 << 10) / columns;
            for at in (from + 3 * 4096..from + bytes).step_by(4096) {
                sims[n].rot(at + 40, &[0x11; 400]);
            }
        };
        let open = |sims: &[Arc<SimDevice>]| {
            let array = assemble::open(&devices(sims), OpenOptions::default()).unwrap().array;
            Pool::open(array, options())
        };
        let rig = Rig::new(level, members);
        rot(&rig.sims, 0);
        let scrub = rig.scrub();
        assert_eq!(scrub.state, "repaired", "{level:?} {scrub:?}");
        assert!(rig.all_fit(), "{level:?}");
        let Rig { sims, pool, level } = rig;
        drop(pool);
        rot(&sims, 1);
        let rig = Rig { pool: open(&sims).unwrap(), sims, level };
        assert_clean(&rig.pool);
        assert_ne!(rig.scrub().state, "damaged", "{level:?}");
        let Rig { sims, pool, .. } = rig;
        drop(pool);
        (0..members).for_each(|n| rot(&sims, n));
        open(&sims).unwrap_err();
    }
}
