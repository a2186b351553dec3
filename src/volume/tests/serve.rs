//! The answering side of a pull.

use crate::pool::Pool;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::testing::copied;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::volume::error::TreePlace;
use crate::volume::serve::{ServeError, blocks, nodes};
use crate::volume::testing::{KEY, Put, cp, data, options, pool_with, tree};
use crate::volume::walk::Walk;
use crate::wire::pull::{AnswerDecoder, Item, Spans, WantBlocks, WantNodes};

use super::pulling::pin;

const DEVICE: u64 = 2 * POOL_BYTES_MIN;

fn want_nodes(level: u8, places: &[u64]) -> WantNodes {
    let mut nodes = Spans::new();
    places.iter().for_each(|&place| nodes.push(place));
    WantNodes { cp: CpNumber(1), volume: KEY.volume, number: 7, level, nodes }
}

fn want_blocks(places: &[u64]) -> WantBlocks {
    let mut blocks = Spans::new();
    places.iter().for_each(|&place| blocks.push(place));
    WantBlocks { cp: CpNumber(1), volume: KEY.volume, number: 7, blocks }
}

/// A volume of 20,000 blocks, height 3, with data at its front and at its end.
fn puts() -> Vec<Put> {
    (0..20).map(|vbn| data(vbn, 1)).chain([data(19_999, 2)]).collect()
}

#[test]
fn what_cannot_be_there_is_refused_before_anything_is_read() {
    let (_, pool) = pool_with(DEVICE, 20_000);
    cp(&pool, 1, &puts()).unwrap();
    let pin = pin(&pool);
    for (level, index) in [(0, 0), (4, 0), (255, 0), (3, 1), (2, 2), (1, 157), (1, u64::MAX - 1)] {
        let met = nodes(&pin, &want_nodes(level, &[index])).unwrap_err();
        let ServeError::OutOfRange { place, .. } = met else { panic!("{met}") };
        assert_eq!(place, TreePlace { volume: KEY.volume, level, index });
    }
    assert!(nodes(&pin, &want_nodes(1, &[0, 156])).is_ok());
    assert!(nodes(&pin, &want_nodes(2, &[0, 1])).is_ok());
    assert!(nodes(&pin, &want_nodes(3, &[0])).is_ok());
    assert!(blocks(&pin, &want_blocks(&[0, 19_999])).is_ok());
    assert!(matches!(
        blocks(&pin, &want_blocks(&[0, 20_000])),
        Err(ServeError::OutOfRange { place: TreePlace { level: 0, index: 20_000, .. }, .. })
    ));
    let other = [(CpNumber(2), KEY.volume), (CpNumber(1), VolumeNumber(2))];
    for (cp, volume) in other {
        let want = WantNodes { cp, volume, ..want_nodes(3, &[0]) };
        assert!(matches!(nodes(&pin, &want), Err(ServeError::OtherTarget { .. })));
        let want = WantBlocks { cp, volume, ..want_blocks(&[0]) };
        assert!(matches!(blocks(&pin, &want), Err(ServeError::OtherTarget { .. })));
    }
}

/// A hole is told, though nobody who compares asks for one.
#[test]
fn holes_are_answered_as_holes() {
    let (_, pool) = pool_with(DEVICE, 20_000);
    cp(&pool, 1, &puts()).unwrap();
    let pin = pin(&pool);
    let served = nodes(&pin, &want_nodes(1, &[0, 5])).unwrap();
    let mut answer = AnswerDecoder::new(&served.frame.payload);
    let Ok(Item::Content(children)) = answer.node() else { panic!() };
    assert_eq!(children.iter().filter(|child| !child.is_zero()).count(), 20);
    let Ok(Item::Content(children)) = answer.node() else { panic!() };
    assert!(children.iter().all(|child| child.is_zero()));
    let served = blocks(&pin, &want_blocks(&[19, 20])).unwrap();
    let mut answer = AnswerDecoder::new(&served.frame.payload);
    assert_eq!(answer.block(), Ok(Item::Content(&[1; 4096])));
    assert_eq!(answer.block(), Ok(Item::Content(&[0; 4096])));
    assert_eq!(answer.finish(), Ok(()));
}

/// A block that rotted is named and not sent; its neighbours, read in one piece with it, are.
#[test]
fn a_bad_block_is_unreadable_and_its_neighbours_are_not() {
    let (device, pool) = pool_with(DEVICE, 20_000);
    cp(&pool, 1, &puts()).unwrap();
    let bad = Walk::new(&pool, &tree(&pool)).unwrap().map(Result::unwrap).nth(7).unwrap();
    assert_eq!((bad.vbn.0, bad.level), (7, 0));
    device.rot(bad.pointer.pbn.0 * 4096 + 100, &[4]);
    let served = blocks(&pin(&pool), &want_blocks(&[5, 6, 7, 8, 19_999])).unwrap();
    let [problem] = &served.problems[..] else { panic!("{:?}", served.problems) };
    assert_eq!(problem.place, TreePlace { volume: KEY.volume, level: 0, index: 7 });
    let mut answer = AnswerDecoder::new(&served.frame.payload);
    for wanted in [Some(1), Some(1), None, Some(1), Some(2)] {
        match (answer.block().unwrap(), wanted) {
            (Item::Content(block), Some(byte)) => assert_eq!(*block, [byte; 4096]),
            (Item::Unreadable, None) => {}
            (met, wanted) => panic!("{met:?}, wanted {wanted:?}"),
        }
    }
}

/// A node that rotted makes itself and all below it unreadable, and nothing else.
#[test]
fn a_bad_node_is_unreadable_with_all_below_it() {
    let (device, pool) = pool_with(DEVICE, 20_000);
    cp(&pool, 1, &puts()).unwrap();
    let items = Walk::new(&pool, &tree(&pool)).unwrap().with_nodes().map(Result::unwrap);
    let bad = items.filter(|item| item.level == 2 && !item.pointer.is_hole()).nth(1).unwrap();
    device.rot(bad.pointer.pbn.0 * 4096 + 20, &[1]);
    // Opened anew: the cache of the old one still knows the node.
    let pool = Pool::open(copied(&device), options()).unwrap();
    let pin = pin(&pool);
    let served = nodes(&pin, &want_nodes(2, &[0, 1])).unwrap();
    let mut answer = AnswerDecoder::new(&served.frame.payload);
    assert!(matches!(answer.node(), Ok(Item::Content(_))));
    assert_eq!(answer.node(), Ok(Item::Unreadable));
    assert_eq!(served.problems[0].place, TreePlace { volume: KEY.volume, level: 2, index: 1 });
    let served = blocks(&pin, &want_blocks(&[0, 19_999])).unwrap();
    let mut answer = AnswerDecoder::new(&served.frame.payload);
    assert_eq!(answer.block(), Ok(Item::Content(&[1; 4096])));
    assert_eq!(answer.block(), Ok(Item::Unreadable));
}

/// When the pool has given the pin up, nothing that was read counts.
#[test]
fn a_pin_that_ended_is_gone() {
    let (_, pool) = pool_with(DEVICE, 20_000);
    cp(&pool, 1, &puts()).unwrap();
    let pin = pin(&pool);
    assert!(pool.end_first_pin().unwrap());
    let served = nodes(&pin, &want_nodes(3, &[0])).unwrap();
    assert_eq!(&served.frame.payload[..], [3]);
    let served = blocks(&pin, &want_blocks(&[0, 1])).unwrap();
    assert_eq!(&served.frame.payload[..], [3]);
}
