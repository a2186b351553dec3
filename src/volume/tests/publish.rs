//! Publishing: grouped, in order, refused by name, durable with its rows.

use std::sync::Arc;
use std::thread;

use crate::pool::error::PoolError;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::rows::SourceRow;
use crate::pool::testing::{copied, crashed, flushes, new_device};
use crate::pool::write_set::Budget;
use crate::pool::{Pool, PoolOptions};
use crate::units::ids::SourceId;
use crate::units::numbers::{ByteCount, CpNumber, Epoch, Generation, SequenceNumber, VolumeNumber};
use crate::volume::testing::{
    KEY, SOURCE, add_volume, assert_clean, build, cp, data, options, pool_with, publish_of, tree,
};

const OTHER: SourceId = SourceId([8; 16]);

/// Goal: CPs of different sources share one flush and one transaction (design section 6).
/// Method: the first publish is held in its flush; two more gather behind it; then all go.
#[test]
fn publishes_that_gather_share_one_transaction() {
    let (device, pool) = pool_with(2 * POOL_BYTES_MIN, 1000);
    pool.catalog().put_source(SourceRow::new(OTHER, "filer-b".parse().unwrap())).unwrap();
    let third = SourceId([9; 16]);
    pool.catalog().put_source(SourceRow::new(third, "filer-c".parse().unwrap())).unwrap();
    let key = |source| VolumeKey { source, ..KEY };
    add_volume(&pool, key(OTHER), 1000);
    add_volume(&pool, key(third), 1000);
    let before = pool.transactions();
    device.clear_trace();
    device.hold();
    let publish = |source: SourceId| {
        let pool = Arc::clone(&pool);
        thread::spawn(move || {
            let base = TreeRoot::empty(ByteCount(1000 * 4096));
            let mut set = pool.begin(Budget::Ordinary);
            let key = key(source);
            let mut writer =
                crate::volume::writer::TreeWriter::new(&pool, &mut set, key, base, CpNumber(1))
                    .unwrap();
            let block = [source.0[0]; 4096];
            let content = crate::volume::writer::Content::Data(&block);
            writer.put(crate::units::numbers::Vbn(3), content).unwrap();
            let tree = writer.finish().unwrap();
            let mut publish = publish_of(set, 1, tree);
            publish.source = source;
            pool.publish(publish).unwrap()
        })
    };
    let first = publish(SOURCE);
    device.wait_held(1);
    let (second, third) = (publish(OTHER), publish(third));
    while pool.waiting() < 2 {
        thread::yield_now();
    }
    device.let_go();
    let [first, second, third] = [first, second, third].map(|thread| thread.join().unwrap());
    assert_eq!(second.transaction, third.transaction);
    assert_eq!(first.transaction + 1, second.transaction);
    assert_eq!(pool.transactions(), before + 2);
    assert_eq!(flushes(&device), 4, "blocks and catalog, for each of two commits");
    assert_clean(&pool);
}

#[test]
fn a_cp_is_refused_by_name_and_leaves_nothing_behind() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    let catalog = pool.catalog();
    cp(&pool, 3, &[data(1, 1)]).unwrap();
    let space = pool.space().unwrap();
    let attempt = |number: u32, change: &dyn Fn(&mut crate::pool::publish::Publish)| {
        let mut set = pool.begin(Budget::Ordinary);
        let built = build(&mut set, tree(&pool), number.max(3), &[data(1, 9)]).unwrap();
        let mut publish = publish_of(set, number, built);
        change(&mut publish);
        let met = pool.publish(publish).unwrap_err();
        assert_eq!(pool.space().unwrap(), space, "{met}");
        met
    };
    let met = attempt(3, &|_| {});
    assert!(matches!(met, PoolError::CpNotNewer { .. }), "{met}");
    let met = attempt(4, &|publish| publish.epoch = Epoch { number: 0, id: 5 });
    assert!(matches!(met, PoolError::Epoch { .. }), "{met}");
    let met = attempt(4, &|publish| publish.volumes.clear());
    assert!(met.to_string().contains("changed and not published"), "{met}");
    let met = attempt(4, &|publish| publish.source = OTHER);
    assert!(matches!(met, PoolError::UnknownSource { .. }), "{met}");
    let met = attempt(4, &|publish| publish.volumes[0].0 = VolumeNumber(7));
    assert!(matches!(met, PoolError::UnknownVolume { .. }), "{met}");
    let met = attempt(4, &|publish| publish.volumes.push(publish.volumes[0]));
    assert!(met.to_string().contains("published twice"), "{met}");
    let met = attempt(4, &|publish| publish.volumes[0].1.size = ByteCount(4096));
    assert!(met.to_string().contains("its new tree 4096"), "{met}");
    let met = attempt(4, &|publish| {
        publish.extension = Some(vec![0; crate::limits::SOURCE_EXTENSION_BYTES_MAX + 1])
    });
    assert!(matches!(met, PoolError::Limit { .. }), "{met}");
    // An epoch raised between begin and publish: the CP of the old one cannot come late (R2).
    let mut set = pool.begin(Budget::Ordinary);
    let built = build(&mut set, tree(&pool), 4, &[data(1, 9)]).unwrap();
    catalog.update_source(SOURCE, |row| row.epoch = Epoch { number: 1, id: 77 }).unwrap();
    let met = pool.publish(publish_of(set, 4, built)).unwrap_err();
    assert!(matches!(met, PoolError::Epoch { .. }), "{met}");
    assert_eq!(catalog.source(SOURCE).unwrap().unwrap().applied, CpNumber(3));
    assert_clean(&pool);
}

#[test]
fn a_cp_built_on_an_overtaken_tree_is_refused() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(1, 1)]).unwrap();
    let mut set = pool.begin(Budget::Ordinary);
    let built = build(&mut set, tree(&pool), 3, &[data(2, 2)]).unwrap();
    cp(&pool, 2, &[data(1, 5)]).unwrap();
    let met = pool.publish(publish_of(set, 3, built)).unwrap_err();
    assert!(matches!(met, PoolError::BaseMoved { .. }), "{met}");
    assert_clean(&pool);
}

/// Two passes of one CP in one write set: repair after comparison works like that.
#[test]
fn a_second_pass_may_build_on_the_first() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(1, 1), data(900, 1)]).unwrap();
    let mut set = pool.begin(Budget::Ordinary);
    let first = build(&mut set, tree(&pool), 2, &[data(1, 2), data(2, 2)]).unwrap();
    let second = build(&mut set, first, 2, &[data(1, 3), data(3, 3)]).unwrap();
    pool.publish(publish_of(set, 2, second)).unwrap();
    assert_clean(&pool);
    let (_, other) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&other, 1, &[data(1, 3), data(2, 2), data(3, 3), data(900, 1)]).unwrap();
    assert_eq!(tree(&other).root(), tree(&pool).root());
}

/// A panic in the middle of a commit leaves the state unknown: everybody is told, nobody hangs.
#[test]
fn a_panic_in_a_commit_answers_everybody() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(1, 1)]).unwrap();
    let change = |pool: &Arc<Pool>, panics: bool| {
        let pool = Arc::clone(pool);
        thread::spawn(move || {
            pool.catalog().update_source(SOURCE, move |row| {
                assert!(!panics, "on purpose");
                row.epoch.id = 1;
            })
        })
    };
    device.hold();
    let first = change(&pool, false);
    device.wait_held(1);
    let gathered = [change(&pool, true), change(&pool, false), change(&pool, false)];
    while pool.waiting() < 3 {
        thread::yield_now();
    }
    device.let_go();
    first.join().unwrap().unwrap();
    let met: Vec<_> = gathered.into_iter().map(thread::JoinHandle::join).collect();
    assert_eq!(met.iter().filter(|met| met.is_err()).count(), 1, "one thread did the work");
    for met in met.into_iter().flatten() {
        assert!(matches!(met, Err(PoolError::Poisoned)), "{met:?}");
    }
    assert!(matches!(
        pool.publish(publish_of(pool.begin(Budget::Ordinary), 2, tree_of(&device))),
        Err(PoolError::Poisoned)
    ));
    // Nothing of it was committed: another opening finds CP 1 and the first change.
    let pool = Pool::open(crashed(&device, 1), options()).unwrap();
    assert_eq!(pool.catalog().source(SOURCE).unwrap().unwrap().epoch.id, 1);
    assert_clean(&pool);
}

fn tree_of(device: &crate::device::sim::SimDevice) -> TreeRoot {
    tree(&Pool::open(copied(device), options()).unwrap())
}

#[test]
fn half_a_tree_is_not_published() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(1, 1)]).unwrap();
    let before = tree(&pool);
    let mut set = pool.begin(Budget::Ordinary);
    let wrong = [data(5, 5), data(4, 4)];
    let met = build(&mut set, before, 2, &wrong).unwrap_err();
    assert!(met.to_string().contains("comes after"), "{met}");
    let met = pool.publish(publish_of(set, 2, before)).unwrap_err();
    assert!(met.to_string().contains("not finished"), "{met}");
    assert_clean(&pool);
}

#[test]
fn rows_survive_a_restart_and_follow_their_rules() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    let generation = Generation { number: 2, id: 3 };
    let mut set = pool.begin(Budget::Ordinary);
    let built = build(&mut set, tree(&pool), 1, &[data(1, 1)]).unwrap();
    let mut publish = publish_of(set, 1, built);
    publish.generation = Some(generation);
    publish.extension = Some(vec![1, 2, 3]);
    pool.publish(publish).unwrap();
    let catalog = pool.catalog();
    let stale = catalog.source(SOURCE).unwrap().unwrap();
    assert_eq!((stale.generation, &*stale.extension), (generation, &[1, 2, 3][..]));
    cp(&pool, 2, &[data(1, 2)]).unwrap();

    let refused = |row| match catalog.put_source(row) {
        Err(PoolError::RowRefused { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert!(refused(stale).contains("only publish"), "a stale row would take CP 2 back");
    let now = catalog.source(SOURCE).unwrap().unwrap();
    let lower = SourceRow { highest_cp: CpNumber(1), ..now.clone() };
    assert!(refused(lower).contains("highest CP"));
    let older = SourceRow { generation: Generation::default(), ..now.clone() };
    assert!(refused(older).contains("generation"));
    let twin = SourceRow::new(OTHER, now.name.clone());
    assert!(refused(twin).contains("another source has that name"));
    let volume = catalog.volume(KEY).unwrap().unwrap();
    let moved = catalog.put_volume(crate::pool::rows::VolumeRow {
        tree: TreeRoot::empty(volume.tree.size),
        ..volume.clone()
    });
    assert!(moved.unwrap_err().to_string().contains("only publish moves its tree"));
    assert!(catalog.remove_volume(KEY).unwrap_err().to_string().contains("still holds"));
    assert!(catalog.remove_source(SOURCE).unwrap_err().to_string().contains("still has"));

    drop(pool);
    let pool = Pool::open(device, options()).unwrap();
    let catalog = pool.catalog();
    assert_eq!(catalog.sources().unwrap(), [now]);
    assert_eq!(catalog.volumes(SOURCE).unwrap(), [volume]);
    let newest = catalog.newest_history(SOURCE, 10).unwrap();
    assert_eq!(newest.iter().map(|row| row.cp.0).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(newest[0].roots, [(KEY.volume, tree(&pool).root())]);
    assert_eq!(newest[0].sequence, SequenceNumber(20));
    assert_eq!(catalog.history(SOURCE, CpNumber(1)).unwrap().unwrap(), newest[1]);

    cp(&pool, 3, &[crate::volume::testing::Put::Holes(0, 1000)]).unwrap();
    catalog.remove_volume(KEY).unwrap();
    catalog.remove_source(SOURCE).unwrap();
    assert!(catalog.sources().unwrap().is_empty());
    assert!(catalog.newest_history(SOURCE, 10).unwrap().is_empty());
    assert_eq!(assert_clean(&pool).reachable, 0);
}

/// A source that is removed and put again, be it by one commit, has no history of before.
#[test]
fn a_source_that_is_put_again_begins_without_a_history() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 100);
    for number in 1..=3 {
        cp(&pool, number, &[data(1, 1)]).unwrap();
    }
    cp(&pool, 4, &[crate::volume::testing::Put::Holes(0, 100)]).unwrap();
    let catalog = pool.catalog();
    catalog.remove_volume(KEY).unwrap();
    let row = SourceRow::new(SOURCE, "filer-b".parse().unwrap());
    catalog.replace_source(row).unwrap();
    let history = |pool: &Arc<Pool>| pool.catalog().newest_history(SOURCE, 10).unwrap().len();
    assert_eq!(history(&pool), 0);
    add_volume(&pool, KEY, 100);
    cp(&pool, 1, &[data(1, 1)]).unwrap();
    assert_eq!(history(&pool), 1);
    drop(pool);
    let pool = Pool::open(device, options()).unwrap();
    assert_eq!(history(&pool), 1);
    assert_clean(&pool);
}

#[test]
fn the_history_keeps_the_newest_and_its_length_survives_a_restart() {
    let device = new_device(POOL_BYTES_MIN);
    let few = || PoolOptions { history_rows: 5, ..options() };
    let pool = Pool::create(device.clone(), SOURCE.0, few()).unwrap();
    pool.catalog().put_source(SourceRow::new(SOURCE, "filer-a".parse().unwrap())).unwrap();
    add_volume(&pool, KEY, 100);
    let numbers = |pool: &Pool| {
        let rows = pool.catalog().newest_history(SOURCE, 100).unwrap();
        rows.iter().map(|row| row.cp.0).collect::<Vec<_>>()
    };
    (1..=7).for_each(|n| drop(cp(&pool, n, &[data(1, 1)]).unwrap()));
    assert_eq!(numbers(&pool), [7, 6, 5, 4, 3]);
    drop(pool);
    let pool = Pool::open(device, few()).unwrap();
    cp(&pool, 8, &[data(1, 1)]).unwrap();
    assert_eq!(numbers(&pool), [8, 7, 6, 5, 4]);
}

/// A catalog that is full refuses rows and goes on publishing.
#[test]
fn a_full_catalog_refuses_rows_and_goes_on_publishing() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 100);
    let mut met = None;
    for n in 0..20_000u32 {
        let [a, b, c, d] = n.to_le_bytes();
        let mut row = SourceRow::new(
            SourceId([a, b, c, d, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
            format!("filer-{n}").parse().unwrap(),
        );
        row.extension = vec![7; 1024];
        if let Err(error) = pool.catalog().put_source(row) {
            met = Some(error);
            break;
        }
    }
    assert!(matches!(met, Some(PoolError::CatalogFull { .. })), "{met:?}");
    assert!(pool.catalog().sources().unwrap().len() > 500);
    for number in 1..200u32 {
        let [byte, ..] = number.to_le_bytes();
        cp(&pool, number, &[data(1, byte)]).unwrap();
    }
    let epoch = Epoch { number: 9, id: 9 };
    pool.catalog().update_source(SOURCE, move |row| row.epoch = epoch).unwrap();
    drop(pool);
    let pool = Pool::open(device, options()).unwrap();
    assert_clean(&pool);
}
