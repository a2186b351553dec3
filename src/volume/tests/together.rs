//! Many at once: sources that publish, readers that pin, a check that runs beside them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::pool::Pool;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::rows::SourceRow;
use crate::pool::testing::Chance;
use crate::pool::write_set::Budget;
use crate::units::ids::SourceId;
use crate::units::numbers::{ByteCount, CpNumber, Vbn, VolumeNumber};
use crate::volume::reader::Image;
use crate::volume::testing::{add_volume, assert_clean, options, pool_with, publish_of, slow_root};
use crate::volume::writer::{Content, TreeWriter};

const BLOCKS: u64 = 300;
const CPS: u32 = 40;

fn key(source: u8) -> VolumeKey {
    VolumeKey { source: SourceId([source; 16]), volume: VolumeNumber(1) }
}

/// One source: CP after CP, some dropped before they are published.
fn source(pool: &Arc<Pool>, key: VolumeKey, seed: u64) {
    let mut chance = Chance::new(seed);
    let mut tree = TreeRoot::empty(ByteCount(BLOCKS * 4096));
    for cp in 1..=CPS {
        let mut set = pool.begin(Budget::Ordinary);
        let mut writer = TreeWriter::new(pool, &mut set, key, tree, CpNumber(cp)).unwrap();
        let mut vbn = chance.below(10);
        while vbn < BLOCKS {
            let [byte, ..] = chance.next_u64().to_le_bytes();
            writer.put(Vbn(vbn), Content::Data(&[byte % 8; 4096])).unwrap();
            vbn += 1 + chance.below(20);
        }
        let built = writer.finish().unwrap();
        if chance.below(5) == 0 {
            continue;
        }
        let mut publish = publish_of(set, cp, built);
        publish.source = key.source;
        let published = pool.publish(publish).unwrap();
        assert_eq!(published.roots, [(key.volume, built.root())]);
        tree = built;
    }
}

/// One reader: pins what is published, reads all of it twice, and it is what the root says.
fn reader(pool: &Arc<Pool>, key: VolumeKey, stop: &AtomicBool) -> u64 {
    let mut images = 0;
    while !stop.load(Ordering::Acquire) {
        let image = Image::new(pool.pin(key.source, key.volume).unwrap());
        let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
        for _ in 0..2 {
            image.read_into(0, &mut bytes).unwrap();
            assert_eq!(slow_root(&bytes), image.pin().tree().root());
        }
        images += 1;
    }
    images
}

#[test]
fn sources_readers_and_a_check_work_side_by_side() {
    let (device, pool) = pool_with(4 * POOL_BYTES_MIN, 100);
    for source in 1..=3 {
        let name = format!("filer-{source}").parse().unwrap();
        pool.catalog().put_source(SourceRow::new(key(source).source, name)).unwrap();
        add_volume(&pool, key(source), BLOCKS);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (1..=3)
        .map(|n| {
            let (pool, stop) = (Arc::clone(&pool), Arc::clone(&stop));
            thread::spawn(move || reader(&pool, key(n), &stop))
        })
        .collect();
    let sources: Vec<_> = (1..=3)
        .map(|n| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || source(&pool, key(n), u64::from(n)))
        })
        .collect();
    while sources.iter().any(|source| !source.is_finished()) {
        assert_clean(&pool);
    }
    sources.into_iter().for_each(|source| source.join().unwrap());
    stop.store(true, Ordering::Release);
    for reader in readers {
        assert!(reader.join().unwrap() > 0);
    }
    let report = assert_clean(&pool);
    assert_eq!((report.only_pinned, report.in_flight), (0, 0));
    drop(pool);
    assert_clean(&Pool::open(device, options()).unwrap());
}
