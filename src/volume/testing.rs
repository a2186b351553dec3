//! What the tests of the volume tree share: the root straight from the formula, and a pool with
//! one source and one volume in memory.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::device::sim::SimDevice;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::publish::{Publish, Published};
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::testing::new_device;
use crate::pool::write_set::{Budget, WriteSet};
use crate::pool::{Pin, Pool, PoolOptions};
use crate::units::BLOCK_BYTES;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::{Root, StreamHash};
use crate::units::ids::{SourceId, VolumeId};
use crate::units::numbers::{ByteCount, CpNumber, Epoch, SequenceNumber, Vbn, VolumeNumber};
use crate::volume::check::{CheckReport, Depth, check};
use crate::volume::error::VolumeError;
use crate::volume::reader::read_into;
use crate::volume::walk::Walk;
use crate::volume::writer::{Content, TreeWriter};

pub(crate) const SOURCE: SourceId = SourceId([7; 16]);
pub(crate) const KEY: VolumeKey = VolumeKey { source: SOURCE, volume: VolumeNumber(1) };

/// The root of a raw image, straight from the formula and as slow as that.
pub(crate) fn slow_root(image: &[u8]) -> Root {
    slow_root_of(image.chunks(BLOCK_BYTES).map(short).collect())
}

/// The first 16 bytes of BLAKE3, or zeroes for zeroes.
pub(crate) fn short(bytes: &[u8]) -> Vec<u8> {
    if bytes.iter().all(|&byte| byte == 0) {
        vec![0; 16]
    } else {
        blake3::hash(bytes).as_bytes()[..16].to_vec()
    }
}

/// The same from the hashes of all blocks.
pub(crate) fn slow_root_of(leaves: Vec<Vec<u8>>) -> Root {
    let size = to_u64(leaves.len()) * 4096;
    let mut hashes = leaves;
    loop {
        let rest = hashes.len().div_ceil(128).max(1) * 128;
        hashes.resize(rest, vec![0; 16]);
        hashes = hashes.chunks(128).map(|children| short(&children.concat())).collect();
        if hashes.len() == 1 {
            let bytes = [b"mirrorhub root v1", &size.to_le_bytes()[..], &hashes[0]].concat();
            return Root(*blake3::hash(&bytes).as_bytes());
        }
    }
}

/// A pool on a device in memory with one source and one empty volume of so many blocks.
pub(crate) fn pool_with(device_bytes: u64, blocks: u64) -> (Arc<SimDevice>, Arc<Pool>) {
    let device = new_device(device_bytes);
    let pool = Pool::create(device.clone(), SOURCE.0, options()).unwrap();
    pool.catalog().put_source(SourceRow::new(SOURCE, "filer-a".parse().unwrap())).unwrap();
    add_volume(&pool, KEY, blocks);
    (device, pool)
}

pub(crate) fn options() -> PoolOptions {
    PoolOptions { catalog_cache_bytes: 1 << 20, node_cache_bytes: 1 << 20, ..Default::default() }
}

pub(crate) fn add_volume(pool: &Pool, key: VolumeKey, blocks: u64) {
    let tree = TreeRoot::empty(ByteCount(blocks * 4096));
    let name = format!("vol{}", key.volume).parse().unwrap();
    let [id, ..] = key.volume.0.to_le_bytes();
    pool.catalog()
        .put_volume(VolumeRow { key, id: VolumeId([id; 16]), name, tree, grows_to: None })
        .unwrap();
}

/// The volume as last published.
pub(crate) fn tree(pool: &Pool) -> TreeRoot {
    pool.catalog().volume(KEY).unwrap().unwrap().tree
}

/// A change of a volume.
#[derive(Debug, Clone)]
pub(crate) enum Put {
    Data(u64, Box<[u8; BLOCK_BYTES]>),
    Holes(u64, u64),
}

pub(crate) fn data(vbn: u64, byte: u8) -> Put {
    Put::Data(vbn, Box::new([byte; BLOCK_BYTES]))
}

/// Builds the tree of a CP from changes in rising order.
pub(crate) fn build(
    set: &mut WriteSet,
    base: TreeRoot,
    cp: u32,
    puts: &[Put],
) -> Result<TreeRoot, VolumeError> {
    let pool = Arc::clone(set.pool());
    let mut writer = TreeWriter::new(&pool, set, KEY, base, CpNumber(cp))?;
    for put in puts {
        match put {
            Put::Data(vbn, block) => writer.put(Vbn(*vbn), Content::Data(block))?,
            Put::Holes(vbn, 1) => writer.put(Vbn(*vbn), Content::Hole)?,
            Put::Holes(vbn, count) => writer.put_hole_range(Vbn(*vbn), *count)?,
        }
    }
    writer.finish()
}

pub(crate) fn publish_of(write_set: WriteSet, cp: u32, tree: TreeRoot) -> Publish {
    Publish {
        write_set,
        source: SOURCE,
        cp: CpNumber(cp),
        sequence: SequenceNumber(u64::from(cp) * 10),
        stream_hash: StreamHash::ZERO,
        epoch: Epoch::default(),
        generation: None,
        extension: None,
        volumes: vec![(KEY.volume, tree)],
    }
}

/// Builds and publishes a CP.
pub(crate) fn cp(pool: &Arc<Pool>, number: u32, puts: &[Put]) -> Result<Published, VolumeError> {
    cp_with(pool, Budget::Ordinary, number, puts)
}

pub(crate) fn cp_with(
    pool: &Arc<Pool>,
    budget: Budget,
    number: u32,
    puts: &[Put],
) -> Result<Published, VolumeError> {
    let mut set = pool.begin(budget);
    let built = build(&mut set, tree(pool), number, puts)?;
    Ok(pool.publish(publish_of(set, number, built))?)
}

/// All is well in the pool, and it is as full as that.
pub(crate) fn assert_clean(pool: &Arc<Pool>) -> CheckReport {
    let report = check(pool, Depth::Data).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    report
}

/// The whole volume as last published.
pub(crate) fn content(pool: &Pool, tree: &TreeRoot) -> Vec<u8> {
    let mut image = vec![0; to_usize(tree.size.0)];
    let size = image.len();
    for (index, part) in image.chunks_mut(1 << 20).enumerate() {
        assert!(part.len() <= size);
        read_into(pool, tree, to_u64(index) << 20, part).unwrap();
    }
    image
}

/// Where a data block of the volume is.
pub(crate) fn data_block(pool: &Pool, vbn: u64) -> u64 {
    let tree = tree(pool);
    let mut walk = Walk::new(pool, &tree).unwrap().range(Vbn(vbn), 1);
    walk.next().unwrap().unwrap().pointer.pbn.0
}

/// Blocks that published and pinned trees reach.
pub(crate) fn reachable_blocks(pool: &Arc<Pool>) -> BTreeSet<u64> {
    let snapshot = pool.snapshot().unwrap();
    let trees = snapshot.published_trees.iter().map(|(_, _, tree)| *tree);
    let mut blocks = BTreeSet::new();
    for tree in trees.chain(snapshot.pins.iter().map(Pin::tree)) {
        for item in Walk::new(pool, &tree).unwrap().with_nodes() {
            let item = item.unwrap();
            if !item.pointer.is_hole() {
                blocks.insert(item.pointer.pbn.0);
            }
        }
    }
    blocks
}
