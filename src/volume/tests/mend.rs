//! Mending: what a device lost is got from another pool with the same content, or is said to be
//! lost; what a peer says is never believed.

use std::sync::Arc;

use crate::device::sim::SimDevice;
use crate::pool::Pool;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::{POINTER_BYTES, TreeRoot};
use crate::pool::write_set::Budget;
use crate::units::BLOCK_BYTES;
use crate::units::hash::ContentHash;
use crate::units::numbers::{CpNumber, Vbn};
use crate::volume::check::{Depth as CheckDepth, check};
use crate::volume::error::TreePlace;
use crate::volume::mend::{Depth, Fetched, Mender, Mending, OtherEnd, mend};
use crate::volume::reader::read_into;
use crate::volume::serve;
use crate::volume::testing::{KEY, cp, data, data_block, options, pool_with, publish_of, tree};
use crate::wire::message::WantPlace;
use crate::wire::pull::{AnswerDecoder, Item};

const BLOCKS: u64 = 300;

/// The same content in a pool of its own, by another way, so that everything lies elsewhere.
fn other_pool() -> Arc<Pool> {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &[data(250, 9)]).unwrap();
    let puts: Vec<_> = (0..BLOCKS).map(block).collect();
    cp(&pool, 2, &puts).unwrap();
    pool
}

fn block(vbn: u64) -> crate::volume::testing::Put {
    data(vbn, vbn.to_le_bytes()[0] % 250 + 1)
}

fn pool() -> (Arc<SimDevice>, Arc<Pool>) {
    let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    for number in 1..=3_u32 {
        let mine = |vbn: &u64| vbn % 3 + 1 == u64::from(number);
        let puts: Vec<_> = (0..BLOCKS).filter(mine).map(block).collect();
        cp(&pool, number, &puts).unwrap();
    }
    (device, pool)
}

/// The other end, honest.
struct Honest(Arc<Pool>);

impl OtherEnd for Honest {
    fn fetch(&self, place: TreePlace, hash: ContentHash) -> Result<Fetched, String> {
        let TreePlace { volume, level, index } = place;
        let want = WantPlace { token: 1, volume, level, index, hash };
        let payload = serve::place(&self.0, &tree(&self.0), &want).ok_or("it has another")?;
        let mut answer = AnswerDecoder::new(&payload);
        Ok(match level {
            0 => match answer.block().unwrap() {
                Item::Content(block) => Fetched::Block(Box::new(*block)),
                Item::Unreadable | Item::Gone => return Err("unreadable".into()),
            },
            _ => match answer.node().unwrap() {
                Item::Content(node) => Fetched::Node(Box::new(node)),
                Item::Unreadable | Item::Gone => return Err("unreadable".into()),
            },
        })
    }
}

/// Says something, whatever it was asked.
struct Liar(Fetched);

impl OtherEnd for Liar {
    fn fetch(&self, _: TreePlace, _: ContentHash) -> Result<Fetched, String> {
        Ok(self.0.clone())
    }
}

struct Away;

impl OtherEnd for Away {
    fn fetch(&self, _: TreePlace, _: ContentHash) -> Result<Fetched, String> {
        Err("away".into())
    }
}

fn all(pool: &Pool, other: &dyn OtherEnd) -> Mending {
    let whole = (Vbn(0), BLOCKS);
    mend(pool, (KEY.volume, &tree(pool)), whole, Depth::Data, other).unwrap()
}

fn content(pool: &Pool, tree: &TreeRoot) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(BLOCKS).unwrap() * BLOCK_BYTES];
    read_into(pool, tree, 0, &mut bytes).ok().map(|()| bytes)
}

/// Opened anew, so that no cache hides what the device holds.
fn again(device: &Arc<SimDevice>, pool: Arc<Pool>) -> Arc<Pool> {
    drop(pool);
    Pool::open(device.clone(), options()).unwrap()
}

/// Writes what was mended to new places.
fn rewrite(pool: &Arc<Pool>, number: u32, mending: &Mending) {
    let mender = Mender::default();
    mender.note(KEY, mending);
    let before = tree(pool);
    let mut set = pool.begin(Budget::Ordinary);
    let after = mender.write(pool, &mut set, KEY, before, CpNumber(number)).unwrap();
    assert_eq!(after.root(), before.root(), "the content stays");
    assert_ne!(after.top.pbn, before.top.pbn, "it is written");
    pool.publish(publish_of(set, number, after)).unwrap();
    mender.written(KEY);
    let figures = mender.figures(|_| true);
    assert_eq!((figures.repaired, figures.waiting), (figures.found, 0));
}

/// Goal: whatever single byte of a node flips, it is restored to the very node that was written.
/// Method: bytes of all fields, of several children, in nodes of both levels.
#[test]
fn any_byte_of_a_node_is_put_right() {
    let other = Honest(other_pool());
    let (device, pool) = pool();
    let wanted = content(&pool, &tree(&pool)).unwrap();
    let mut pool = pool;
    for (number, at) in (4_u32..).zip([0, 3, 7, 8, 9, 11, 12, 15, 16, 31, 33, 40, 74, 4000, 4095]) {
        let top = tree(&pool).top;
        let mut node = [0; BLOCK_BYTES];
        pool.read_unverified(top.pbn, &mut node).unwrap();
        let mut first = [0; POINTER_BYTES];
        first.copy_from_slice(&node[..POINTER_BYTES]);
        let below = crate::pool::pointer::Pointer::decode(&first).unwrap().pbn;
        let pbn = if number.is_multiple_of(2) { top.pbn } else { below };
        let offset = pbn.0 * 4096 + at;
        device.rot(offset, &[0x5a]);
        pool = again(&device, pool);
        assert!(content(&pool, &tree(&pool)).is_none(), "byte {at} is noticed");
        let mending = all(&pool, &other);
        assert_eq!((mending.mended.len(), mending.lost.len()), (1, 0), "byte {at}: {mending:?}");
        assert!(content(&pool, &tree(&pool)) == Some(wanted.clone()));
        rewrite(&pool, number, &mending);
        pool = again(&device, pool);
        assert!(content(&pool, &tree(&pool)) == Some(wanted.clone()), "byte {at}");
        let report = check(&pool, CheckDepth::Data).unwrap();
        assert!(report.is_clean(), "byte {at}: {:?}", report.findings);
    }
}

/// Blocks are mended, and written to new places by the next CP.
#[test]
fn rotten_blocks_are_mended() {
    let other = Honest(other_pool());
    let (device, pool) = pool();
    let wanted = content(&pool, &tree(&pool)).unwrap();
    let rotten = [0_u64, 127, 128, 299];
    for vbn in rotten {
        device.rot(data_block(&pool, vbn) * 4096 + 5, &[1]);
    }
    assert!(content(&pool, &tree(&pool)).is_none());
    let mending = all(&pool, &Away);
    assert_eq!((mending.mended.len(), mending.lost.len()), (0, rotten.len()), "the control");
    let mending = all(&pool, &other);
    assert_eq!((mending.mended.len(), mending.lost.len()), (rotten.len(), 0), "{mending:?}");
    assert!(content(&pool, &tree(&pool)) == Some(wanted.clone()));
    rewrite(&pool, 4, &mending);
    let pool = again(&device, pool);
    assert!(content(&pool, &tree(&pool)) == Some(wanted));
    assert!(check(&pool, CheckDepth::Data).unwrap().is_clean());
}

/// Nothing that a peer says is taken for the content of a place unless it is; of a node that is
/// lost whole nothing can be restored.
#[test]
fn no_peer_mends_with_what_is_wrong() {
    let (device, pool) = pool();
    let top = tree(&pool).top;
    device.rot(top.pbn.0 * 4096, &[0xee; BLOCK_BYTES]);
    let pool = again(&device, pool);
    let lies = [
        Fetched::Block(Box::new([7; BLOCK_BYTES])),
        Fetched::Node(Box::new([ContentHash([7; 16]); 128])),
        Fetched::Node(Box::new([ContentHash::ZERO; 128])),
    ];
    for lie in lies {
        let mending = all(&pool, &Liar(lie));
        assert_eq!((mending.mended.len(), mending.lost.len()), (0, 1), "{mending:?}");
    }
    let mending = all(&pool, &Honest(other_pool()));
    assert!(mending.lost[0].1.contains("too much of it is lost"), "{mending:?}");
    assert!(content(&pool, &tree(&pool)).is_none(), "never wrong data");
}
