//! Kept CPs: what they hold stays, through everything; what they alone held comes back.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::device::sim::{Call, Effect, On, SimDevice};
use crate::pool::error::PoolError;
use crate::pool::kept::{Dropped, Keep, KeptDrop};
use crate::pool::label::{Layout, POOL_BYTES_MIN};
use crate::pool::testing::{Chance, changes, crashed, random_block};
use crate::pool::write_set::Budget;
use crate::pool::{Pin, Pool};
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::Root;
use crate::units::names::KeptName;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::volume::check::{Depth, Finding, check};
use crate::volume::error::VolumeError;
use crate::volume::kept::{compare, drop_kept};
use crate::volume::reader::Image;
use crate::volume::testing::{
    KEY, Put, SOURCE, add_volume, assert_clean, build, content, cp, cp_with, data, options,
    pool_with, publish_of, slow_root, tree,
};

const BLOCKS: u64 = 1000;

fn name(text: &str) -> KeptName {
    text.parse().unwrap()
}

fn keep(pool: &Pool, text: &str) {
    pool.keep(SOURCE, name(text)).unwrap();
}

fn drop_one(pool: &Arc<Pool>, text: &str) -> Dropped {
    drop_kept(pool, SOURCE, &name(text)).unwrap()
}

fn held(pool: &Arc<Pool>, text: &str) -> Pin {
    pool.pin_kept(SOURCE, &name(text), KEY.volume).unwrap()
}

/// Names and roots of what is kept.
fn kept(pool: &Pool) -> BTreeMap<KeptName, Root> {
    let all = pool.catalog().kept(SOURCE).unwrap();
    let root = |number| {
        move |row: &crate::pool::kept_row::KeptRow| row.volume(number).unwrap().tree.root()
    };
    all.iter().map(|kept| (kept.row.name.clone(), root(KEY.volume)(&kept.row))).collect()
}

fn cp_keeping(pool: &Arc<Pool>, number: u32, puts: &[Put], keep: Keep) -> Result<(), VolumeError> {
    let mut set = pool.begin(Budget::Ordinary);
    let built = build(&mut set, tree(pool), number, puts)?;
    pool.publish_and_keep(publish_of(set, number, built), keep)?;
    Ok(())
}

fn some(byte: u8) -> Vec<Put> {
    (0..300).map(|vbn| data(vbn, byte)).collect()
}

#[test]
fn a_kept_cp_stays_through_cps_and_restarts_and_gives_its_blocks_back() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &some(1)).unwrap();
    let empty = pool.space().unwrap();
    keep(&pool, "monday");
    keep(&pool, "monday");
    let old = tree(&pool);
    cp(&pool, 2, &some(2)).unwrap();
    cp(&pool, 3, &some(3)).unwrap();
    let space = pool.space().unwrap();
    // 300 blocks, 3 nodes and the top; CP 2's own came back with CP 3.
    assert_eq!((space.kept.0, space.pinned.0, space.used), (304, 0, empty.used));
    let report = assert_clean(&pool);
    assert_eq!((report.kept, report.only_kept, report.only_pinned), (1, 304, 0));

    drop(pool);
    let pool = Pool::open(crashed(&device, 1), options()).unwrap();
    assert_eq!(pool.space().unwrap().kept.0, 304);
    assert_eq!(pool.catalog().kept(SOURCE).unwrap()[0].blocks.0, 304);
    cp(&pool, 4, &some(4)).unwrap();
    assert_clean(&pool);
    let image = held(&pool, "monday");
    assert_eq!((image.cp(), image.tree()), (CpNumber(1), old));
    assert!(content(&pool, &image.tree())[..300 * 4096].iter().all(|byte| *byte == 1));
    let met = drop_kept(&pool, SOURCE, &name("monday")).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::KeptBusy { .. })), "{met}");
    drop(image);
    assert_eq!(drop_one(&pool, "monday").blocks.0, 304);
    assert_clean(&pool);
    assert_eq!(pool.space().unwrap(), empty);
    let met = drop_kept(&pool, SOURCE, &name("monday")).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::UnknownKept { .. })), "{met}");
}

#[test]
fn a_publish_keeps_the_old_or_the_new_cp_in_its_own_commit() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    let met = cp_keeping(&pool, 1, &some(1), Keep::Replaced(name("none"))).unwrap_err();
    assert!(met.to_string().contains("nothing was published yet"), "{met}");
    assert_eq!(tree(&pool).top.birth, CpNumber(0), "neither happens");
    assert_clean(&pool);
    cp_keeping(&pool, 1, &some(1), Keep::New(name("new"))).unwrap();
    let first = tree(&pool).root();
    let commits = pool.transactions();
    cp_keeping(&pool, 2, &some(2), Keep::Replaced(name("old"))).unwrap();
    assert_eq!(pool.transactions(), commits + 1);
    assert_eq!(kept(&pool), BTreeMap::from([(name("new"), first), (name("old"), first)]));
    let met = cp_keeping(&pool, 3, &some(3), Keep::New(name("old"))).unwrap_err();
    assert!(met.to_string().contains("the name keeps another CP"), "{met}");
    assert_clean(&pool);
    // Two names, one CP: the blocks come back with the last.
    assert_eq!(drop_one(&pool, "new").blocks.0, 0);
    assert_clean(&pool);
    assert_eq!(drop_one(&pool, "old").blocks.0, 304);
    assert_eq!(assert_clean(&pool).only_kept, 0);
}

/// A pin of a published CP and a kept CP hold the same blocks; either may go first.
#[test]
fn pins_and_kept_cps_hold_blocks_together() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &some(1)).unwrap();
    let free = pool.space().unwrap().free;
    for pin_first in [true, false] {
        let number = tree(&pool).top.birth.0;
        keep(&pool, "k");
        let pin = pool.pin(SOURCE, KEY.volume).unwrap();
        cp(&pool, number + 1, &some(2)).unwrap();
        let between = pool.pin(SOURCE, KEY.volume).unwrap();
        cp(&pool, number + 2, &some(3)).unwrap();
        let space = pool.space().unwrap();
        assert_eq!((space.kept.0, space.pinned.0), (304, 304), "the latter CP {}", number + 1);
        assert_clean(&pool);
        if pin_first {
            drop(pin);
            assert_eq!(pool.space().unwrap().kept.0, 304);
            assert_clean(&pool);
            drop_one(&pool, "k");
        } else {
            drop_one(&pool, "k");
            let space = pool.space().unwrap();
            assert_eq!((space.kept.0, space.pinned.0), (0, 608), "the reader keeps them");
            assert_clean(&pool);
            assert!(content(&pool, &pin.tree())[..4096].iter().all(|byte| *byte == 3));
            drop(pin);
        }
        assert_clean(&pool);
        drop(between);
        assert_clean(&pool);
        assert_eq!(pool.space().unwrap().free, free);
    }
}

/// A kept CP outlives the volume, and a new volume of the same number is another one.
#[test]
fn a_kept_cp_outlives_its_volume() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &some(1)).unwrap();
    keep(&pool, "k");
    let old = tree(&pool).root();
    cp(&pool, 2, &[Put::Holes(0, BLOCKS)]).unwrap();
    pool.catalog().remove_volume(KEY).unwrap();
    let met = pool.catalog().remove_source(SOURCE).unwrap_err();
    assert!(met.to_string().contains("still has kept CPs"), "{met}");
    assert_clean(&pool);
    let mut row = pool.catalog().kept(SOURCE).unwrap()[0].row.volumes[0].clone();
    row.id.0[0] ^= 1;
    let tree_of = crate::pool::pointer::TreeRoot::empty(row.tree.size);
    let new = crate::pool::rows::VolumeRow {
        key: KEY,
        id: row.id,
        name: row.name,
        tree: tree_of,
        grows_to: None,
    };
    pool.catalog().put_volume(new).unwrap();
    cp(&pool, 3, &some(3)).unwrap();
    cp(&pool, 4, &some(4)).unwrap();
    keep(&pool, "l");
    cp(&pool, 5, &some(5)).unwrap();
    assert_clean(&pool);
    assert_eq!(slow_root(&content(&pool, &held(&pool, "k").tree())), old);
    assert_eq!(drop_one(&pool, "k").blocks.0, 304);
    assert_clean(&pool);
    assert_eq!(drop_one(&pool, "l").blocks.0, 304);
    assert_eq!(assert_clean(&pool).only_kept, 0);
}

#[test]
fn a_full_pool_keeps_what_is_kept_and_drops_it_when_told() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 10_000);
    let mut chance = Chance::new(3);
    let mut puts = |count: u64| -> Vec<Put> {
        (0..count).map(|vbn| Put::Data(vbn, Box::new(random_block(&mut chance)))).collect()
    };
    let half = pool.space().unwrap().free.0 * 2 / 5;
    cp(&pool, 1, &puts(half)).unwrap();
    keep(&pool, "k");
    let old = tree(&pool).root();
    cp(&pool, 2, &puts(half)).unwrap();
    let full = (3..).find(|&number| cp(&pool, number, &puts(200)).is_err()).unwrap();
    let met = cp(&pool, full, &puts(200)).unwrap_err();
    assert!(matches!(met, VolumeError::Pool(PoolError::Full { .. })), "{met}");
    assert_eq!(kept(&pool)[&name("k")], old, "it is not given up");
    // Not even the reserve is left.
    let mut set = pool.begin(Budget::Reserve);
    let block = random_block(&mut Chance::new(4));
    while set.append(&block).is_ok() {}
    assert_eq!(pool.space().unwrap().free.0, 0);
    assert!(drop_one(&pool, "k").blocks.0 >= half);
    drop(set);
    assert_clean(&pool);
    cp(&pool, full, &puts(200)).unwrap();
}

/// The law of the work of a drop: reads are bounded by the nodes that come back.
#[test]
fn a_drop_reads_only_what_it_gives_back_and_its_neighbour() {
    let blocks = 200_000;
    let (device, pool) = pool_with(8 * POOL_BYTES_MIN, blocks);
    let all: Vec<Put> = (0..blocks / 50).map(|at| data(at * 50, 1)).collect();
    cp(&pool, 1, &all).unwrap();
    keep(&pool, "a");
    cp(&pool, 2, &[data(0, 2), data(16_400, 2), data(150_000, 2)]).unwrap();
    keep(&pool, "b");
    cp(&pool, 3, &[data(0, 3)]).unwrap();
    drop(pool);
    let pool = Pool::open(device.clone(), options()).unwrap();
    device.clear_trace();
    // Three blocks on paths of three nodes; the top is shared.
    let dropped = drop_one(&pool, "a");
    assert_eq!(dropped.blocks.0, 3 + 3 + 3 + 1);
    // Those of the catalog are the commit's.
    let data = Layout::for_device(&*device).unwrap().data_start * 4096;
    let tree_read = |call: &&Call| call.on == On::Read && call.offset >= data;
    let reads = device.trace().iter().filter(tree_read).count();
    assert!(reads <= 2 * 7, "{reads} reads");
    assert_clean(&pool);
}

/// The negative controls: a pool that frees what is kept, and a drop that forgets blocks.
#[test]
fn forgotten_deadlists_are_caught() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &some(1)).unwrap();
    keep(&pool, "k");
    pool.break_keeping();
    cp(&pool, 2, &some(2)).unwrap();
    let report = check(&pool, Depth::Nodes).unwrap();
    let free = |finding: &Finding| matches!(finding, Finding::ReachableButFree { .. });
    assert!(report.findings.iter().any(free), "{:?}", report.findings);

    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &some(1)).unwrap();
    keep(&pool, "a");
    cp(&pool, 2, &some(2)).unwrap();
    keep(&pool, "b");
    cp(&pool, 3, &some(3)).unwrap();
    let forgetful = pool.begin_drop(SOURCE, &name("b")).unwrap();
    forgetful.commit().unwrap();
    let report = check(&pool, Depth::Nodes).unwrap();
    let lost = |finding: &Finding| matches!(finding, Finding::Lost { .. });
    assert!(report.findings.iter().any(lost), "{:?}", report.findings);
    let met = pool.begin_drop(SOURCE, &name("a")).unwrap().commit().unwrap_err();
    assert!(met.to_string().contains("its deadlist 608"), "the last one is refused: {met}");
}

#[test]
fn a_damaged_tree_is_not_dropped_and_stays() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    cp(&pool, 1, &some(1)).unwrap();
    keep(&pool, "k");
    let top = tree(&pool).top.pbn.0;
    cp(&pool, 2, &some(2)).unwrap();
    drop(pool);
    device.rot(top * 4096 + 17, &[8]);
    let pool = Pool::open(device, options()).unwrap();
    let met = drop_kept(&pool, SOURCE, &name("k")).unwrap_err();
    assert!(met.to_string().contains(&format!("block {top} is corrupt")), "{met}");
    assert_eq!(kept(&pool).len(), 1);
    // The failed drop is not in the way of the next.
    assert!(pool.begin_drop(SOURCE, &name("k")).is_ok());
}

/// CPs, keeps, drops (also with CPs in the middle of them), pins, readers, restarts, power cuts.
struct World {
    device: Arc<SimDevice>,
    pool: Arc<Pool>,
    chance: Chance,
    cp: u32,
    names: u32,
    kept: BTreeMap<KeptName, Root>,
    pins: Vec<(Pin, Root)>,
    readers: Vec<(Image, Root, KeptName)>,
    drops: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
        let (kept, chance) = (BTreeMap::new(), Chance::new(seed));
        let (pins, readers) = (Vec::new(), Vec::new());
        Self { device, pool, chance, cp: 0, names: 0, kept, pins, readers, drops: 0 }
    }

    fn puts(&mut self) -> Vec<Put> {
        let (mut puts, mut at) = (Vec::new(), self.chance.below(200));
        while at < BLOCKS - 40 {
            let [byte, ..] = self.chance.next_u64().to_le_bytes();
            let length = 1 + self.chance.below(30);
            puts.push(if byte % 5 == 0 { Put::Holes(at, length) } else { data(at, byte % 9) });
            at += length + self.chance.below(90);
        }
        puts
    }

    fn publish(&mut self, keep: Option<Keep>) {
        let (puts, before) = (self.puts(), tree(&self.pool).root());
        self.cp += 1;
        let Some(keep) = keep else {
            cp(&self.pool, self.cp, &puts).unwrap();
            return;
        };
        cp_keeping(&self.pool, self.cp, &puts, keep.clone()).unwrap();
        let _new = match keep {
            Keep::Replaced(name) => self.kept.insert(name, before),
            Keep::New(name) => self.kept.insert(name, tree(&self.pool).root()),
        };
    }

    fn next_name(&mut self) -> KeptName {
        self.names += 1;
        name(&format!("k{}", self.names))
    }

    fn any_kept(&mut self) -> Option<KeptName> {
        let count = to_u64(self.kept.len());
        let at = if count == 0 { return None } else { to_usize(self.chance.below(count)) };
        self.kept.keys().nth(at).cloned()
    }

    fn drop_any(&mut self) {
        let Some(gone) = self.any_kept() else { return };
        let begun = self.pool.begin_drop(SOURCE, &gone);
        let mut dropping: KeptDrop = match begun {
            Ok(dropping) => dropping,
            Err(PoolError::KeptBusy { .. }) => {
                assert!(!self.readers.is_empty(), "only a reader is in the way");
                return;
            }
            Err(other) => panic!("{other}"),
        };
        let (middle, other) = (self.chance.below(3), self.chance.below(2));
        (0..middle).for_each(|_| self.publish(None));
        if other == 0 {
            compare(&self.pool, &mut dropping).unwrap();
        }
        if self.chance.below(3) == 0 {
            let kept = self.next_name();
            self.publish(Some(Keep::Replaced(kept)));
        }
        self.publish(None);
        match self.chance.below(8) {
            // Given up: it stays.
            0 => return,
            _ if other != 0 => compare(&self.pool, &mut dropping).unwrap(),
            _ => {}
        }
        dropping.commit().unwrap();
        self.drops += 1;
        self.kept.remove(&gone);
    }

    fn restart(&mut self, crash: bool) {
        let unpublished = crash.then(|| {
            let (mut set, puts) = (self.pool.begin(Budget::Ordinary), self.puts());
            build(&mut set, tree(&self.pool), self.cp + 1, &puts).unwrap();
            set
        });
        self.device = crashed(&self.device, self.chance.next_u64());
        drop(unpublished);
        self.pins.clear();
        self.readers.clear();
        self.pool = Pool::open(self.device.clone(), options()).unwrap();
    }

    fn step(&mut self) {
        match self.chance.below(20) {
            0..6 => self.publish(None),
            6 => {
                let keep = Keep::New(self.next_name());
                self.publish(Some(keep));
            }
            7 if self.cp > 0 => {
                let keep = Keep::Replaced(self.next_name());
                self.publish(Some(keep));
            }
            8..11 if self.cp > 0 => {
                let name = self.next_name();
                self.pool.keep(SOURCE, name.clone()).unwrap();
                self.kept.insert(name, tree(&self.pool).root());
            }
            11..14 => self.drop_any(),
            14 => {
                let pin = self.pool.pin(SOURCE, KEY.volume).unwrap();
                self.pins.push((pin, tree(&self.pool).root()));
            }
            15 if !self.pins.is_empty() => {
                let which = self.chance.below(to_u64(self.pins.len()));
                drop(self.pins.swap_remove(to_usize(which)));
            }
            16 => {
                if let Some(name) = self.any_kept() {
                    let pin = self.pool.pin_kept(SOURCE, &name, KEY.volume).unwrap();
                    self.readers.push((Image::new(pin), self.kept[&name], name));
                }
            }
            17 if !self.readers.is_empty() => drop(self.readers.remove(0)),
            18 => self.restart(true),
            19 => self.restart(false),
            _ => self.publish(None),
        }
    }

    fn check(&self) {
        assert_clean(&self.pool);
        assert_eq!(kept(&self.pool), self.kept);
        for (pin, root) in &self.pins {
            assert_eq!(slow_root(&content(&self.pool, &pin.tree())), *root);
        }
        for (image, root, name) in &self.readers {
            assert!(self.kept.contains_key(name), "a CP that is read is not dropped");
            assert_eq!(slow_root(&content(&self.pool, &image.pin().tree())), *root);
        }
    }
}

/// Goal: no history of CPs, keeps, drops, pins, readers and power cuts changes what is kept, or
/// loses or leaks a block. Method: random histories; after each step the accounts are proven and
/// all data is read.
#[test]
fn kept_cps_agree_with_the_model() {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok());
    let mut drops = 0;
    for seed in 0..cases.unwrap_or(5) {
        let mut world = World::new(seed);
        for _ in 0..60 {
            world.step();
            world.check();
        }
        drops += world.drops;
        world.pins.clear();
        world.readers.clear();
        while let Some(gone) = world.any_kept() {
            drop_kept(&world.pool, SOURCE, &gone).unwrap();
            world.kept.remove(&gone);
            world.check();
        }
        let space = world.pool.space().unwrap();
        assert_eq!((space.kept.0, space.pinned.0), (0, 0), "seed {seed}");
    }
    assert!(drops > 5, "{drops} drops");
}

/// Goal: a drop that begins in the middle of a commit misses nothing of that commit. Method: one
/// thread publishes, another keeps and drops without pause, with an older CP kept and without.
#[test]
fn drops_and_commits_work_side_by_side() {
    for with_older in [false, true] {
        let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
        cp(&pool, 1, &some(1)).unwrap();
        if with_older {
            keep(&pool, "older");
        }
        std::thread::scope(|scope| {
            let publisher = scope.spawn(|| {
                for (number, byte) in (2..80).zip((1..9).cycle()) {
                    let vbn = u64::from(number) * 3;
                    cp(&pool, number, &[data(vbn, byte), data(vbn + 1, byte)]).unwrap();
                }
            });
            while !publisher.is_finished() {
                keep(&pool, "k");
                drop_one(&pool, "k");
            }
        });
        assert_clean(&pool);
        let report = pool.space().unwrap();
        assert_eq!(report.kept.0 > 0, with_older, "{report:?}");
    }
}

/// The published root, and what is kept.
type Visible = (Root, BTreeMap<KeptName, Root>);

/// What is visible after each step of a scenario of keeps and drops.
fn scenario(pool: &Arc<Pool>) -> (Vec<Visible>, Option<VolumeError>) {
    type Step = fn(&Arc<Pool>) -> Result<(), VolumeError>;
    let steps: [Step; 8] = [
        |pool| cp(pool, 1, &[data(1, 1), data(2, 2), data(700, 3)]).map(|_| ()),
        |pool| pool.keep(SOURCE, name("a")).map(|_| ()).map_err(VolumeError::from),
        |pool| cp_keeping(pool, 2, &[data(1, 4), Put::Holes(2, 1)], Keep::New(name("b"))),
        |pool| cp(pool, 3, &[data(1, 5), data(700, 5)]).map(|_| ()),
        |pool| drop_kept(pool, SOURCE, &name("a")).map(|_| ()),
        |pool| cp_keeping(pool, 4, &[data(1, 6)], Keep::Replaced(name("c"))),
        |pool| drop_kept(pool, SOURCE, &name("c")).map(|_| ()),
        |pool| drop_kept(pool, SOURCE, &name("b")).map(|_| ()),
    ];
    let mut states = vec![(tree(pool).root(), kept(pool))];
    for step in steps {
        if let Err(error) = step(pool) {
            return (states, Some(error));
        }
        states.push((tree(pool).root(), kept(pool)));
    }
    (states, None)
}

/// Goal: whichever write or flush fails, a keep or drop has happened whole or not at all.
/// Method: for all n, the n-th call fails, is cut short, or is the last before the power goes.
#[test]
fn the_nth_write_of_keeps_and_drops_fails_for_all_n() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    device.clear_trace();
    let (states, none) = scenario(&pool);
    assert!(none.is_none(), "{none:?}");
    let calls = to_u64(changes(&device).len());
    for n in 0..calls {
        // The three kinds in turn: every call meets one of them, every third all in a row.
        let effects = [Effect::Errno(5), Effect::Short(100), Effect::PowerCut];
        let first = to_usize(n % 3);
        for effect in if first == 0 { &effects[..] } else { &effects[first..=first] } {
            let effect = *effect;
            let (device, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
            device.fail_change(n, effect);
            let (done, error) = scenario(&pool);
            let place = format!("call {n} {effect:?}");
            assert!(error.is_some(), "{place}");
            assert_eq!(kept(&pool), done[done.len() - 1].1, "{place}: nothing in doubt is seen");
            let met = pool.keep(SOURCE, name("z")).unwrap_err();
            assert!(matches!(met, PoolError::Latched { .. }), "{place}: {met}");
            let pool = Pool::open(crashed(&device, n), options()).unwrap();
            let met = (tree(&pool).root(), kept(&pool));
            assert!(
                states[done.len() - 1..=done.len()].contains(&met),
                "{place}: {met:?} after {} steps",
                done.len() - 1
            );
            assert_clean(&pool);
            // What is left can be dropped, and then nothing is kept.
            for gone in met.1.keys() {
                drop_kept(&pool, SOURCE, gone).unwrap();
            }
            assert_eq!(assert_clean(&pool).only_kept, 0);
            cp_with(&pool, Budget::Ordinary, 9, &[data(5, 5)]).unwrap();
        }
    }
}

/// Keeping is of all volumes of a source, and its bounds are met by name.
#[test]
fn a_source_keeps_all_volumes_and_so_many_cps() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, BLOCKS);
    add_volume(&pool, crate::pool::pointer::VolumeKey { volume: VolumeNumber(2), ..KEY }, 10);
    let met = pool.keep(SOURCE, name("early")).unwrap_err();
    assert!(met.to_string().contains("nothing was published yet"), "{met}");
    cp(&pool, 1, &some(1)).unwrap();
    for number in 0..crate::limits::KEPT_PER_SOURCE_MAX {
        keep(&pool, &format!("k{number}"));
    }
    let met = pool.keep(SOURCE, name("more")).unwrap_err();
    assert!(matches!(met, PoolError::Limit { .. }), "{met}");
    assert_eq!(pool.catalog().kept(SOURCE).unwrap()[0].row.volumes.len(), 2);
    let met = pool.pin_kept(SOURCE, &name("k0"), VolumeNumber(3)).unwrap_err();
    assert!(matches!(met, PoolError::UnknownVolume { .. }), "{met}");
    assert_clean(&pool);
}
