//! Faults: failing calls, lost sectors, flipped bits, foreign labels.

use std::sync::Arc;

use crate::device::sim::{Effect, SimDevice};
use crate::pool::error::PoolError;
use crate::pool::label::POOL_BYTES_MIN;
use crate::pool::label::{LABEL_VERSION_ADDED, Layout};
use crate::pool::testing::{Chance, block_at, changes, copied, crashed, new_device};
use crate::pool::{Pool, PoolOptions};
use crate::units::convert::to_u64;
use crate::units::hash::Root;
use crate::units::ids::SourceId;
use crate::units::numbers::CpNumber;
use crate::volume::check::{Depth, Finding, check};
use crate::volume::error::VolumeError;
use crate::volume::testing::{
    KEY, Put, SOURCE, assert_clean, content, cp, data, options, pool_with, slow_root, tree,
};

/// A short scenario. Returns the root after each CP that was published.
fn scenario(pool: &Arc<Pool>) -> (Vec<Root>, Option<VolumeError>) {
    let cps = [
        vec![data(1, 1), data(2, 2), data(700, 3)],
        vec![data(1, 4), Put::Holes(2, 1)],
        vec![Put::Holes(600, 300), data(950, 5)],
    ];
    let mut roots = Vec::new();
    for (number, puts) in (1..).zip(&cps) {
        match cp(pool, number, puts) {
            Ok(published) => roots.push(published.roots[0].1),
            Err(error) => return (roots, Some(error)),
        }
    }
    (roots, None)
}

fn last_cp(pool: &Pool) -> u32 {
    pool.catalog().source(SOURCE).unwrap().unwrap().applied.0
}

/// Which of the sectors not flushed survive a power cut.
#[derive(Debug, Clone, Copy)]
enum Survives {
    Chance(u64),
    /// The worst order a drive can choose: the catalog is there, what it names is not.
    CatalogOnly,
    DataOnly,
}

fn cut(device: &SimDevice, survives: Survives) -> Arc<SimDevice> {
    let data = Layout::for_device(device).unwrap().data_start * 8;
    match survives {
        Survives::Chance(seed) => return crashed(device, seed),
        Survives::CatalogOnly => {
            device.power_cut_choosing(&mut |sector, all| if sector < data { all } else { 0 });
        }
        Survives::DataOnly => {
            device.power_cut_choosing(&mut |sector, all| if sector < data { 0 } else { all });
        }
    }
    Arc::new(SimDevice::from_image("disk0", device.medium()))
}

/// Runs the scenario with a fault at the n-th write or flush; judges what is visible then, and
/// after a power cut.
fn scenario_with(n: u64, effect: Effect, survives: Survives, roots: &[Root], empty: Root) {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    device.fail_change(n, effect);
    let (done, error) = scenario(&pool);
    let error = error.expect("a call failed");
    let place = format!("call {n} {effect:?} {survives:?}");
    assert!(matches!(error, VolumeError::Pool(ref met) if met.latches()), "{place}: {error}");
    // Latched, though the device would take more: the first error is repeated to everybody.
    let first = pool.first_error().expect("the pool is latched");
    let met = cp(&pool, 9, &[data(5, 5)]).unwrap_err();
    if let VolumeError::Pool(PoolError::Latched { first: met }) = met {
        assert!(Arc::ptr_eq(&first, &met));
    } else {
        // Reading a node needs power.
        assert!(device.is_off(), "{place}: {met}");
    }
    assert!(matches!(pool.catalog().remove_volume(KEY), Err(PoolError::Latched { .. })));
    let known = done.last().copied().unwrap_or(empty);
    assert_eq!(tree(&pool).root(), known, "{place}: nothing unpublished is visible");
    if !device.is_off() {
        assert_eq!(slow_root(&content(&pool, &tree(&pool))), known, "{place}: reads go on");
    }
    // A restart without a power cut sees the page cache. What it then believes and tells others
    // must outlive a cut right behind it. Killed, not stopped: nothing is closed before the cut.
    let mut believed = (done.len(), None);
    if !device.is_off() {
        device.forget_faults();
        let pool = Pool::open(device.clone(), options()).unwrap();
        believed = (usize::try_from(last_cp(&pool)).unwrap(), Some(pool));
    }
    let pool = Pool::open(cut(&device, survives), options()).unwrap();
    let (believed, _killed) = believed;
    let applied = usize::try_from(last_cp(&pool)).unwrap();
    assert!(applied >= believed, "{place}: CP {believed} was believed, CP {applied} was there");
    // The commit in doubt may have happened; nothing else.
    let possible = done.len()..=done.len() + 1;
    assert!(possible.contains(&applied), "{place}: CP {applied} of {possible:?}");
    let wanted = if applied == 0 { empty } else { roots[applied - 1] };
    assert_eq!(tree(&pool).root(), wanted, "{place}");
    assert_eq!(slow_root(&content(&pool, &tree(&pool))), wanted, "{place}");
    assert_clean(&pool);
    cp(&pool, 9, &[data(5, 5)]).unwrap();
}

/// Goal: whichever write or flush fails, what was published stays, and nothing is published
/// after the failure. Method: for all n, the n-th call fails with EIO, is cut short, or is the
/// last one before the power goes; each then loses another subset of what was not flushed.
#[test]
fn the_nth_write_or_flush_fails_for_all_n() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    let empty = crate::pool::pointer::TreeRoot::empty(tree(&pool).size).root();
    device.clear_trace();
    let (roots, none) = scenario(&pool);
    assert!(none.is_none());
    let calls = to_u64(changes(&device).len());
    assert!(calls > 15, "{calls} calls");
    for n in 0..calls {
        for (effect, survives) in [
            (Effect::Errno(5), Survives::Chance(n)),
            (Effect::Errno(5), Survives::DataOnly),
            (Effect::Short(100), Survives::Chance(n)),
            (Effect::PowerCut, Survives::Chance(n)),
            (Effect::PowerCut, Survives::CatalogOnly),
            (Effect::PowerCut, Survives::DataOnly),
        ] {
            scenario_with(n, effect, survives, &roots, empty);
        }
    }
}

/// A power cut at any write of a new pool leaves no pool or an empty one.
#[test]
fn creation_is_all_or_nothing() {
    let device = new_device(POOL_BYTES_MIN);
    drop(Pool::create(device.clone(), SOURCE.0, options()).unwrap());
    let calls = to_u64(changes(&device).len());
    let (mut none, mut some) = (0, 0);
    for n in 0..calls {
        for seed in 0..2 {
            let device = new_device(POOL_BYTES_MIN);
            device.fail_change(n, Effect::PowerCut);
            let created = Pool::create(device.clone(), SOURCE.0, options());
            match Pool::open(crashed(&device, seed), options()) {
                Ok(pool) => {
                    some += 1;
                    assert_clean(&pool);
                }
                Err(PoolError::NotAPool { .. }) => {
                    assert!(created.is_err(), "call {n}");
                    // The next start makes it.
                    let left = Arc::new(SimDevice::from_image("disk0", device.medium()));
                    assert_clean(&Pool::create(left, SOURCE.0, options()).unwrap());
                    none += 1;
                }
                Err(other) => panic!("call {n}: {other}"),
            }
        }
    }
    assert!(none > 0 && some > 0, "{none} {some}");
}

/// Goal: a new pool that a restart sees is there after a power cut, too. Method: each write of the
/// creation fails, the pool is opened from the page cache, then the power goes.
#[test]
fn a_new_pool_that_was_seen_stays() {
    let device = new_device(POOL_BYTES_MIN);
    drop(Pool::create(device.clone(), SOURCE.0, options()).unwrap());
    let (calls, mut seen) = (to_u64(changes(&device).len()), 0);
    for n in 0..calls {
        let device = new_device(POOL_BYTES_MIN);
        device.fail_change(n, Effect::Errno(5));
        if Pool::create(device.clone(), SOURCE.0, options()).is_ok() {
            continue;
        }
        if let Ok(pool) = Pool::open(device.clone(), options()) {
            seen += 1;
            device.power_cut_choosing(&mut |_, _| 0);
            drop(pool);
            let left = Arc::new(SimDevice::from_image("disk0", device.medium()));
            assert_clean(&Pool::open(left, options()).unwrap());
        }
    }
    assert!(seen > 0, "{seen}");
}

/// Goal: nobody's disk is overwritten. Method: one byte where partition tables, volume managers
/// and file systems keep theirs, and the label blocks zero or damaged before a catalog. Control:
/// zeros are taken.
#[test]
fn somebody_elses_disk_is_refused_and_not_touched() {
    use crate::device::Device;
    let theirs = |at: u64| {
        let device = new_device(POOL_BYTES_MIN);
        device.plant(at, &[0x53]);
        device
    };
    let ours = |from: u64, bytes: &[u8]| {
        let (device, pool) = pool_with(POOL_BYTES_MIN, 100);
        drop(pool);
        let copy = copied(&device);
        copy.write_durable_at(from, bytes).unwrap();
        copy
    };
    // MBR, GPT, LVM, ext4, btrfs, ZFS, XFS allocation groups.
    let mut devices: Vec<_> =
        [446, 512, 536, 1080, 65_600, 131_072, (1 << 20) - 1].map(theirs).into();
    devices.push(ours(0, &[0; 8192]));
    devices.push(ours(0, &[0; 1]));
    devices.push(ours(0, b"MIRRDRF"));
    for (nth, device) in devices.into_iter().enumerate() {
        let before = device.image();
        let met = Pool::create(device.clone(), SOURCE.0, options()).unwrap_err();
        let refused = matches!(met, PoolError::NotBlank { .. } | PoolError::AlreadyAPool { .. });
        assert!(refused, "device {nth}: {met}");
        assert!(device.image() == before, "device {nth} was written to");
    }
    drop(Pool::create(new_device(POOL_BYTES_MIN), SOURCE.0, options()).unwrap());
}

/// A drive that answers Ok and writes nowhere, or elsewhere: what is wrong then is an error when
/// it is read, never an answer. Every data write of the scenario, one at a time.
#[test]
fn lost_and_misdirected_writes_are_met_when_read() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    let layout = Layout::for_device(&*device).unwrap();
    device.clear_trace();
    let (roots, _) = scenario(&pool);
    let data_start = layout.data_start * 4096;
    let data_writes: Vec<u64> = (0..)
        .zip(changes(&device))
        .filter(|(_, call)| call.offset >= data_start)
        .map(|(n, _)| n)
        .collect();
    assert!(data_writes.len() >= 3, "{data_writes:?}");
    let mut met = 0;
    for n in data_writes {
        for effect in [Effect::Lost, Effect::Misdirected(data_start + 4096 * 1000)] {
            let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
            device.fail_change(n, effect);
            // A CP may find the damage itself, when it builds on it.
            let (done, error) = scenario(&pool);
            assert!(error.is_none() || done.len() < 3);
            drop(pool);
            let pool = Pool::open(device, options()).unwrap();
            let tree = tree(&pool);
            let mut image = vec![0; 1000 * 4096];
            let read = crate::volume::reader::read_into(&pool, &tree, 0, &mut image);
            match read {
                Ok(()) => assert_eq!(slow_root(&image), roots[done.len() - 1], "call {n}"),
                Err(VolumeError::Pool(PoolError::Corrupt { .. })) => {
                    met += 1;
                    assert!(!check(&pool, Depth::Data).unwrap().is_clean());
                }
                Err(other) => panic!("call {n}: {other}"),
            }
        }
    }
    assert!(met >= 2, "{met}");
}

#[test]
fn a_foreign_device_is_refused_by_name() {
    let device = new_device(POOL_BYTES_MIN);
    let met = Pool::open(device.clone(), options()).unwrap_err();
    assert!(matches!(met, PoolError::NotAPool { .. }), "{met}");
    let pool = Pool::create(device.clone(), SOURCE.0, options()).unwrap();
    let id = pool.id();
    drop(pool);
    let met = Pool::create(device.clone(), SOURCE.0, options()).unwrap_err();
    assert!(matches!(met, PoolError::AlreadyAPool { .. }), "{met}");
    let other = PoolOptions { owner: Some([1; 16]), ..options() };
    let met = Pool::open(device.clone(), other).unwrap_err();
    assert!(matches!(met, PoolError::WrongOwner { .. }), "{met}");
    assert!(met.to_string().contains(&id.to_string()), "{met}");
    let own = PoolOptions { owner: Some(SOURCE.0), ..options() };
    drop(Pool::open(device.clone(), own).unwrap());
    device.rot(8, &[9]);
    let met = Pool::open(device.clone(), options()).unwrap_err();
    assert!(
        met.to_string().contains(&format!("this program knows {LABEL_VERSION_ADDED}")),
        "{met}"
    );
}

/// The label of one pool before the catalog of another: a device put together wrongly.
#[test]
fn a_catalog_of_another_pool_is_refused() {
    use crate::device::Device;
    let (device, pool) = pool_with(POOL_BYTES_MIN, 100);
    let other = new_device(POOL_BYTES_MIN);
    drop(Pool::create(other.clone(), SOURCE.0, options()).unwrap());
    drop(pool);
    let mut label = vec![0; 8192];
    other.read_at(0, &mut label).unwrap();
    device.write_durable_at(0, &label).unwrap();
    let met = Pool::open(device, options()).unwrap_err();
    assert!(met.to_string().contains("another pool than the label"), "{met}");
}

/// Goal: no flipped bit is served. Method: flips bits in every block that a tree reaches; reading
/// all of it must be an error that names the block, and `check` must find just that.
#[test]
fn flipped_bits_in_data_and_nodes_are_met_with_their_place() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 20_000);
    cp(&pool, 1, &[data(1, 1), data(130, 2), data(19_000, 3)]).unwrap();
    let wanted = tree(&pool);
    let blocks = crate::volume::testing::reachable_blocks(&pool);
    assert_eq!(blocks.len(), 3 + 3 + 2 + 1);
    drop(pool);
    let mut chance = Chance::new(1);
    for &block in &blocks {
        let (at, bit) = (block * 4096 + chance.below(4096), chance.below(8));
        device.rot(at, &[1 << bit]);
        let pool = Pool::open(device.clone(), options()).unwrap();
        let mut met = Vec::new();
        for offset in [4096, 130 * 4096, 19_000 * 4096] {
            let read = crate::volume::reader::read(&pool, &wanted, offset, 4096);
            met.extend(read.err());
        }
        assert!(!met.is_empty(), "block {block}");
        for error in met {
            let VolumeError::Pool(PoolError::Corrupt { pbn, .. }) = error else {
                panic!("{error}")
            };
            assert_eq!(pbn.0, block);
        }
        let report = check(&pool, Depth::Data).unwrap();
        assert_eq!(report.findings_count, 1, "{:?}", report.findings);
        let Finding::Damaged { error: VolumeError::Pool(PoolError::Corrupt { pbn, .. }), .. } =
            &report.findings[0]
        else {
            panic!("{:?}", report.findings)
        };
        assert_eq!(pbn.0, block);
        device.rot(at, &[1 << bit]);
    }
    assert_clean(&Pool::open(device, options()).unwrap());
}

/// Flipped bits anywhere in the catalog: the pool opens as it was or says what is wrong; it never
/// panics and never comes up with other rows.
#[test]
fn flipped_bits_in_the_catalog_are_met_or_harmless() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    let _ = scenario(&pool);
    let rows = (pool.catalog().sources().unwrap(), tree(&pool));
    drop(pool);
    let layout = Layout::for_device(&*device).unwrap();
    let start = layout.catalog_start * 4096;
    let used: Vec<u64> = (start..start + layout.catalog_bytes())
        .step_by(4096)
        .filter(|&at| block_at(&device, at / 4096) != [0; 4096])
        .collect();
    let (mut chance, mut refused) = (Chance::new(2), 0);
    for round in 0..300u64 {
        let block =
            used[usize::try_from(chance.below(u64::try_from(used.len()).unwrap())).unwrap()];
        // Rows stand at the front of their pages: aim there every other time.
        let span = if round % 2 == 0 { 200 } else { 4096 };
        let copy = copied(&device);
        copy.rot(block + chance.below(span), &[1 << chance.below(8)]);
        match Pool::open(copy, options()) {
            Ok(pool) => {
                let met = (pool.catalog().sources().unwrap(), tree(&pool));
                assert_eq!(met, rows, "round {round}");
                assert_clean(&pool);
            }
            Err(PoolError::Catalog { .. } | PoolError::CatalogCorrupt { .. }) => refused += 1,
            Err(other) => panic!("round {round}: {other}"),
        }
    }
    assert!(refused > 20, "{refused}");
}

/// Goal: damage that the catalog meets while it is in use is an error and latches, never a panic,
/// and never other rows. Method: pages are damaged behind an open pool without a cache; history is
/// asked and CPs are published. Those over which the database stops are among them.
#[test]
fn damage_met_in_use_latches() {
    let small = || PoolOptions { catalog_cache_bytes: 0, ..options() };
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    let _ = scenario(&pool);
    let wanted = pool.catalog().newest_history(SOURCE, 9).unwrap();
    drop(pool);
    let layout = Layout::for_device(&*device).unwrap();
    let start = layout.catalog_start;
    let (mut stopped, mut served) = (0, 0);
    for block in start..start + layout.catalog_blocks {
        if block_at(&device, block) == [0; 4096] {
            continue;
        }
        for commits in [false, true] {
            let copy = copied(&device);
            let pool = Pool::open(copy.clone(), small()).unwrap();
            copy.rot(block * 4096, &[0xff; 16]);
            let met = if commits {
                pool.catalog().update_source(SOURCE, |row| row.generation.number += 1)
            } else {
                pool.catalog().newest_history(SOURCE, 9).map(|met| assert_eq!(met, wanted))
            };
            let Err(met) = met else {
                served += 1;
                continue;
            };
            if let PoolError::Catalog { what, .. } = &met {
                stopped += u32::from(what.contains("stopped over damage"));
                assert!(pool.first_error().is_some(), "block {block}: {met}");
                let again = pool.catalog().remove_volume(KEY);
                assert!(matches!(again, Err(PoolError::Latched { .. })), "{again:?}");
            }
        }
    }
    assert!(stopped > 0 && served > 0, "{stopped} {served}");
}

/// Goal: a client that puts back what it could not read mends it. Method: a data block rots, or its
/// medium does not answer; the same bytes are published again. Control: where all is sound the same
/// bytes cost one read each, no write, and not even a birth.
#[test]
fn the_same_bytes_mend_a_rotten_block() {
    use crate::device::sim::On;
    for rots in [true, false] {
        let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
        let puts = [data(1, 1), data(2, 2), data(500, 3)];
        cp(&pool, 1, &puts).unwrap();
        let before = tree(&pool);
        device.clear_trace();
        cp(&pool, 2, &puts).unwrap();
        assert_eq!(tree(&pool), before);
        let is_data = |call: &&crate::device::sim::Call| {
            call.offset >= Layout::for_device(&*device).unwrap().data_start * 4096
        };
        let calls = device.trace();
        let count = |on: On| calls.iter().filter(is_data).filter(|call| call.on == on).count();
        assert_eq!((count(On::Read), count(On::Write)), (3, 0), "nodes are cached");

        if rots {
            let pbn = crate::volume::testing::data_block(&pool, 2);
            device.rot(pbn * 4096 + 17, &[4]);
            let met = crate::volume::reader::read(&pool, &before, 2 * 4096, 4096).unwrap_err();
            assert!(matches!(met, VolumeError::Pool(PoolError::Corrupt { .. })), "{met}");
        } else {
            device.fail(On::Read, 1, Effect::Errno(5));
        }
        cp(&pool, 3, &puts).unwrap();
        let after = tree(&pool);
        assert_eq!((after.root(), after.top.birth), (before.root(), CpNumber(3)));
        let mut met = [0; 4096];
        crate::volume::reader::read_into(&pool, &after, 2 * 4096, &mut met).unwrap();
        assert_eq!(met, [2; 4096]);
        assert_clean(&pool);
    }
}

/// A finding that hides nothing does not keep `check` from comparing the accounts.
#[test]
fn findings_beside_each_other_are_all_found() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 4, &[data(1, 1), data(2, 2)]).unwrap();
    let rotten = crate::volume::testing::data_block(&pool, 2);
    device.rot(rotten * 4096, &[1]);
    pool.break_cp(SOURCE, CpNumber(3));
    let (lost, _) = pool.break_accounts(tree(&pool).top.pbn);
    let findings = check(&pool, Depth::Data).unwrap().findings;
    let is_found = |wanted: fn(&Finding) -> bool| findings.iter().any(wanted);
    assert!(is_found(|finding| matches!(finding, Finding::TooYoung { .. })), "{findings:?}");
    assert!(is_found(|finding| matches!(finding, Finding::Damaged { .. })), "{findings:?}");
    let is_lost = |finding: &Finding| matches!(finding, Finding::Lost { pbn } if *pbn == lost);
    assert!(findings.iter().any(is_lost), "{findings:?}");
}

/// A copy of the label that was damaged is written again, and the log says which it was.
#[test]
fn a_damaged_label_is_told() {
    let (device, pool) = pool_with(POOL_BYTES_MIN, 100);
    drop(pool);
    device.rot(4096 + 20, &[1]);
    let log = tempfile::NamedTempFile::new().unwrap();
    let writer = std::sync::Mutex::new(log.reopen().unwrap());
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish();
    let said = || std::fs::read_to_string(log.path()).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        drop(Pool::open(device.clone(), options()).unwrap());
        assert!(said().contains("copy=1") && said().contains("disk0"), "{}", said());
        let before = said();
        drop(Pool::open(device, options()).unwrap());
        assert_eq!(said(), before, "it is whole again");
    });
}

/// A huge volume with little in it is verified in little time.
#[test]
fn a_sparse_volume_is_scanned_by_what_it_holds() {
    let blocks = crate::limits::VOLUME_BYTES_MAX / 4096;
    let (_, pool) = pool_with(POOL_BYTES_MIN, blocks);
    cp(&pool, 1, &[data(0, 1), data(blocks / 3, 2), data(blocks - 1, 3)]).unwrap();
    let scanned = crate::volume::scan::scan(&pool, &tree(&pool), |_| {}).unwrap();
    assert_eq!((scanned.root, scanned.blocks_read), (Some(tree(&pool).root()), 3));
}

/// `check` finds what it is there for: each broken account by name.
#[test]
fn check_finds_lost_shared_and_freed_blocks() {
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(1, 1), data(2, 2)]).unwrap();
    assert_clean(&pool);
    let report = |pool: &Arc<Pool>| check(pool, Depth::Nodes).unwrap().findings;
    let (lost, used) = pool.break_accounts(tree(&pool).top.pbn);
    let findings = report(&pool);
    assert!(
        findings.iter().any(|f| matches!(f, Finding::Lost { pbn } if *pbn == lost)),
        "{findings:?}"
    );
    assert!(
        findings.iter().any(|f| matches!(f, Finding::ReachableButFree { pbn } if *pbn == used)),
        "{findings:?}"
    );
    // A count of a source that is not what its trees reach: one too many, one too few, of nobody.
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(1, 1), data(2, 2)]).unwrap();
    let right = pool.catalog().used(SOURCE).unwrap().unwrap().0;
    let other = SourceId([0x77; 16]);
    for (source, wrong, reached) in
        [(SOURCE, right + 1, right), (SOURCE, right - 1, right), (other, 1, 0)]
    {
        pool.break_used(SOURCE, right);
        assert_clean(&pool);
        pool.break_used(source, wrong);
        let findings = report(&pool);
        let [Finding::Used { source: met, counted, reached: reaches }] = findings[..] else {
            panic!("{findings:?}")
        };
        assert_eq!((met, counted, reaches), (source, wrong, reached));
    }
    // One tree under two volumes: every block has two owners.
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 1, &[data(1, 1)]).unwrap();
    let twin =
        crate::pool::pointer::VolumeKey { volume: crate::units::numbers::VolumeNumber(2), ..KEY };
    pool.break_twin(KEY, twin);
    let findings = report(&pool);
    assert_eq!(
        findings.iter().filter(|f| matches!(f, Finding::ReachedTwice { .. })).count(),
        3,
        "{findings:?}"
    );
    // A tree older than its births.
    let (_, pool) = pool_with(POOL_BYTES_MIN, 1000);
    cp(&pool, 4, &[data(1, 1)]).unwrap();
    pool.break_cp(SOURCE, CpNumber(3));
    let findings = report(&pool);
    assert!(findings.iter().any(|f| matches!(f, Finding::TooYoung { .. })), "{findings:?}");
}
