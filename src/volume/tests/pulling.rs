//! What the tests of the pull share: a driver that asserts its bounds at every step, a serving
//! end that is a pinned pool, and one that is nothing but hashes.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::limits::{CP_FRAME_BYTES_MAX, NODE_CHILDREN, PULL_PARTS_MIN};
use crate::pool::pointer::{Pointer, TreeRoot, root_of};
use crate::pool::write_set::WriteSet;
use crate::pool::{Pin, Pool};
use crate::units::convert::{low_u8, to_u64, to_usize};
use crate::units::hash::{ContentHash, Root};
use crate::units::numbers::{ByteCount, CpNumber, Pbn, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::geometry::Geometry;
use crate::volume::node::Children;
use crate::volume::pull::Puller;
use crate::volume::pull::error::PullError;
use crate::volume::pull::own::{OwnTree, PoolTree};
use crate::volume::pull::terms::{PullCounters, Put, Target, Window};
use crate::volume::root::{leaf_hash, node_hash};
use crate::volume::serve;
use crate::volume::testing::{KEY, SOURCE};
use crate::volume::writer::TreeWriter;
use crate::wire::message::{Frame, Message};
use crate::wire::pull::{AnswerEncoder, Pulled, WantBlocks, WantNodes};

/// The narrowest window: every bound is met all the time.
pub(super) const NARROW: Window = Window { bytes: 4097, requests: 1, parts: PULL_PARTS_MIN };
/// A few requests, none of them full.
pub(super) const SMALL: Window = Window { bytes: 30_000, requests: 3, parts: PULL_PARTS_MIN };

pub(super) fn pin(pool: &Arc<Pool>) -> Pin {
    pool.pin(SOURCE, KEY.volume).unwrap()
}

pub(super) fn target_of(pin: &Pin) -> Target {
    let TreeRoot { size, .. } = pin.tree();
    Target { cp: pin.cp(), volume: pin.key().volume, size, root: pin.tree().root() }
}

/// The honest answer of a pool.
pub(super) fn served(pin: &Pin, ask: &Message) -> Frame {
    let served = if let Message::WantNodes(want) = ask {
        serve::nodes(pin, want).unwrap()
    } else if let Message::WantBlocks(want) = ask {
        serve::blocks(pin, want).unwrap()
    } else {
        panic!("a pull says {}", ask.name())
    };
    assert!(served.problems.is_empty(), "{:?}", served.problems);
    served.frame
}

/// Hands an answer over as a shell would: the header read from its bytes.
pub(super) fn hand<O: OwnTree>(puller: &mut Puller<O>, frame: &Frame) -> Result<(), PullError> {
    let payload = &frame.payload;
    let message = Message::decode(&frame.head[8..], to_u64(payload.len())).unwrap();
    if let Message::Nodes(answer) = &message {
        puller.nodes(answer, payload)
    } else if let Message::Blocks(answer) = &message {
        puller.blocks(answer, payload)
    } else {
        panic!("a pull is answered with {}", message.name())
    }
}

/// Whether a pull goes on after a put.
pub(super) enum Go {
    On,
    Stop,
}

/// Runs a pull to its end, or until `put` stops it. Returns the bytes on the wire, both ways.
pub(super) fn drive<O: OwnTree>(
    puller: &mut Puller<O>,
    window: Window,
    mut serve: impl FnMut(&Message) -> Frame,
    mut put: impl FnMut(&Put) -> Go,
) -> Result<u64, PullError> {
    let height = u64::from(Geometry::of(puller.target().size).unwrap().height);
    let parts_max = window.parts + height * (window.parts / 16).max(PULL_PARTS_MIN);
    let mut sent = VecDeque::new();
    let mut wire_bytes = 0;
    loop {
        while let Some(next) = puller.next_put() {
            if let Go::Stop = put(&next) {
                return Ok(wire_bytes);
            }
        }
        for ask in puller.asks() {
            wire_bytes += Frame::new(&ask, Bytes::new()).bytes();
            sent.push_back(ask);
        }
        let held = puller.held();
        assert!(held.parts <= parts_max && held.bytes <= window.bytes, "{held:?} of {window:?}");
        assert!(held.requests <= window.requests && held.requests == sent.len(), "{held:?}");
        let Some(ask) = sent.pop_front() else {
            assert!(puller.is_finished(), "nothing is asked, nothing yielded, {held:?} left");
            return Ok(wire_bytes);
        };
        assert!(!puller.is_finished());
        let frame = serve(&ask);
        assert!(frame.bytes() <= CP_FRAME_BYTES_MAX);
        wire_bytes += frame.bytes();
        hand(puller, &frame)?;
    }
}

/// What a pull into a pool came to.
pub(super) struct Came {
    pub(super) tree: TreeRoot,
    pub(super) counters: PullCounters,
    pub(super) puts: usize,
    pub(super) error: Option<PullError>,
}

/// Pulls what `serve` says of `target` on top of `base`, at most so many puts of it.
pub(super) fn pull_into(
    set: &mut WriteSet,
    (base, cp): (TreeRoot, u32),
    (target, window): (Target, Window),
    puts_max: usize,
    serve: impl FnMut(&Message) -> Frame,
) -> Came {
    let pool = Arc::clone(set.pool());
    let own = PoolTree::new(&pool, base).unwrap();
    let mut puller = Puller::new(own, target, window, 1).unwrap();
    let mut writer = TreeWriter::new(&pool, set, KEY, base, CpNumber(cp)).unwrap();
    let mut puts = 0;
    let driven = drive(&mut puller, window, serve, |put| {
        if puts == puts_max {
            return Go::Stop;
        }
        put.write(&mut writer).unwrap();
        puts += 1;
        Go::On
    });
    let (tree, counters) = (writer.finish().unwrap(), puller.counters());
    Came { tree, counters, puts, error: driven.err() }
}

/// A volume that is nothing but the hashes of its blocks: what a large one costs, without one.
#[derive(Debug, Clone)]
pub(super) struct Fake {
    size: ByteCount,
    geometry: Geometry,
    /// Which content each block has; 0 is a hole.
    versions: Vec<u8>,
    /// From level 0 to the top.
    hashes: Vec<Vec<ContentHash>>,
}

/// A block of that version; no two blocks of a volume are the same.
pub(super) fn fake_block(vbn: u64, version: u8) -> [u8; 4096] {
    let mut block = [version; 4096];
    if version > 0 {
        block[..8].copy_from_slice(&vbn.to_le_bytes());
    }
    block
}

impl Fake {
    pub(super) fn new(versions: Vec<u8>) -> Self {
        let blocks = to_u64(versions.len());
        let leaves = (0..).zip(&versions).map(|(vbn, &version)| fake_leaf(vbn, version)).collect();
        let size = ByteCount(blocks * 4096);
        let geometry = Geometry::of(size).unwrap();
        let mut fake = Self { size, geometry, versions, hashes: vec![leaves] };
        fake.rehash();
        fake
    }

    /// The same with other versions of some blocks.
    pub(super) fn with(&self, changes: impl IntoIterator<Item = (u64, u8)>) -> Self {
        let mut fake = self.clone();
        for (vbn, version) in changes {
            fake.versions[to_usize(vbn)] = version;
            fake.hashes[0][to_usize(vbn)] = fake_leaf(vbn, version);
        }
        fake.rehash();
        fake
    }

    fn rehash(&mut self) {
        self.hashes.truncate(1);
        for below in 0..usize::from(self.geometry.height) {
            let mut nodes: Vec<_> =
                self.hashes[below].chunks(NODE_CHILDREN).map(node_hash).collect();
            if nodes.is_empty() {
                nodes.push(ContentHash::ZERO);
            }
            self.hashes.push(nodes);
        }
    }

    /// Claims a child that is not there, with all hashes above made to fit.
    pub(super) fn claim(&mut self, level: u8, index: usize) {
        let below = usize::from(level);
        self.hashes[below].resize(index + 1, ContentHash::ZERO);
        self.hashes[below][index] = ContentHash([9; 16]);
        for below in below..usize::from(self.geometry.height) {
            self.hashes[below + 1] =
                self.hashes[below].chunks(NODE_CHILDREN).map(node_hash).collect();
        }
    }

    pub(super) fn root(&self) -> Root {
        root_of(self.size, self.hashes[usize::from(self.geometry.height)][0])
    }

    pub(super) fn target(&self) -> Target {
        let Self { size, .. } = *self;
        Target { cp: CpNumber(3), volume: VolumeNumber(1), size, root: self.root() }
    }

    pub(super) fn version(&self, vbn: u64) -> u8 {
        self.versions[to_usize(vbn)]
    }

    fn children_of(&self, level: u8, index: u64) -> [ContentHash; NODE_CHILDREN] {
        let mut children = [ContentHash::ZERO; NODE_CHILDREN];
        let below = &self.hashes[usize::from(level) - 1];
        let first = to_usize(index) * NODE_CHILDREN;
        for (child, hash) in children.iter_mut().zip(below.iter().skip(first)) {
            *child = *hash;
        }
        children
    }

    /// The honest answer.
    pub(super) fn serve(&self, ask: &Message) -> Frame {
        let mut answer = AnswerEncoder::default();
        let message = if let Message::WantNodes(want) = ask {
            for index in want.nodes.places() {
                answer.node(&self.children_of(want.level, index));
            }
            Message::Nodes(answers(ask))
        } else if let Message::WantBlocks(want) = ask {
            for vbn in want.blocks.places() {
                answer.block(&fake_block(vbn, self.version(vbn)));
            }
            Message::Blocks(answers(ask))
        } else {
            panic!("a pull says {}", ask.name())
        };
        Frame::new(&message, answer.finish().into())
    }
}

/// The header that answers a request.
pub(super) fn answers(ask: &Message) -> Pulled {
    if let Message::WantNodes(WantNodes { cp, volume, number, .. }) = *ask {
        Pulled { cp, volume, number }
    } else if let Message::WantBlocks(WantBlocks { cp, volume, number, .. }) = *ask {
        Pulled { cp, volume, number }
    } else {
        panic!("a pull says {}", ask.name())
    }
}

fn fake_leaf(vbn: u64, version: u8) -> ContentHash {
    if version == 0 {
        return ContentHash::ZERO;
    }
    leaf_hash(&fake_block(vbn, version))
}

fn fake_pointer(hash: ContentHash) -> Pointer {
    let pbn = Pbn(u64::from(low_u8(u64::from(!hash.is_zero()))));
    Pointer { pbn, birth: CpNumber(1), crc: 0, hash }
}

impl OwnTree for Fake {
    fn tree(&self) -> TreeRoot {
        let top = self.hashes[usize::from(self.geometry.height)][0];
        TreeRoot { size: self.size, top: fake_pointer(top) }
    }

    fn children(&self, pointer: &Pointer, level: u8, first: u64) -> Result<Children, VolumeError> {
        let index = first / Geometry::span(level);
        assert_eq!(pointer.hash, self.hashes[usize::from(level)][to_usize(index)]);
        Ok(Children(self.children_of(level, index).map(fake_pointer).into()))
    }
}
