//! The engine without a hub, in a pool that others write to as well: what is acknowledged stays,
//! the others' images stay, and the pool's accounts are right, wherever the power is cut.

use super::*;
use crate::device::sim::{Chance, Effect};
use crate::filer::EngineOptions;
use crate::filer::keeper::{FilerKeeper, Keeper, Kept};
use crate::filer::promise::{Promise, SpaceLimit};
use crate::filer::recover::Settings;
use crate::filer::status::SourceState;
use crate::filer::tests::life::change;
use crate::filer::verify::VerifyError;
use crate::pool::Pool;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::publish::Publish;
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::write_set::Budget;
use crate::units::hash::StreamHash;
use crate::units::ids::{SourceId, VolumeId};
use crate::units::numbers::{
    CpNumber, Epoch, Generation, SequenceNumber, TransferId, Vbn, VolumeNumber,
};
use crate::volume::check::{Depth, check};
use crate::volume::reader::read_into;
use crate::volume::writer::{Content, TreeWriter};

const A: SourceId = SourceId([0xa0; 16]);
const B: SourceId = SourceId([0xb0; 16]);
const OWNER: [u8; 16] = [0x40; 16];
const EPOCH: Epoch = Epoch { number: 3, id: 33 };

/// Whoever else uses the pool: publishes a CP of a few blocks, as a hub's applier does.
struct Other {
    pool: Arc<Pool>,
    cp: CpNumber,
}

impl Other {
    fn new(pool: &Arc<Pool>) -> Self {
        let cp = pool.catalog().source(B).unwrap().unwrap().applied;
        Self { pool: Arc::clone(pool), cp }
    }

    fn page(cp: CpNumber) -> [u8; 4096] {
        let [low, ..] = cp.0.to_le_bytes();
        [low; 4096]
    }

    /// Whether it was published.
    fn publish(&mut self) -> bool {
        let cp = self.cp.next();
        let key = VolumeKey { source: B, volume: VolumeNumber(0) };
        let base = self.pool.catalog().volume(key).unwrap().unwrap().tree;
        let mut set = self.pool.begin(Budget::Ordinary);
        let written =
            TreeWriter::new(&self.pool, &mut set, key, base, cp).and_then(|mut writer| {
                let page = Self::page(cp);
                writer.put(Vbn(0), Content::Data(&page))?;
                writer.put(Vbn(u64::from(cp.0)), Content::Data(&page))?;
                writer.finish()
            });
        let Ok(root) = written else { return false };
        let done = self.pool.publish(Publish {
            write_set: set,
            source: B,
            cp,
            sequence: SequenceNumber(cp.0.into()),
            stream_hash: StreamHash::ZERO,
            epoch: Epoch::default(),
            generation: None,
            extension: None,
            volumes: vec![(VolumeNumber(0), root)],
        });
        if done.is_ok() {
            self.cp = cp;
        }
        done.is_ok()
    }

    /// Its image is that of its CP, and that is the last one it was told of, or the next.
    fn assert_at(pool: &Arc<Pool>, told: CpNumber) {
        let pin = pool.pin(B, VolumeNumber(0)).unwrap();
        let cp = pin.cp();
        assert!(cp == told || cp == told.next(), "CP {cp}, told of {told}");
        let mut page = [0; 4096];
        for vbn in (1..=cp.0).filter(|_| cp.0 > 0) {
            read_into(pool, &pin.tree(), u64::from(vbn) * 4096, &mut page).unwrap();
            assert_eq!(page, Self::page(CpNumber(vbn)), "block {vbn} at CP {cp}");
        }
    }
}

fn put_source(pool: &Pool, row: SourceRow, bytes: u64) {
    let key = VolumeKey { source: row.id, volume: VolumeNumber(0) };
    pool.catalog().put_source(row).unwrap();
    let (id, name) = (VolumeId(key.source.0), "vol0".parse().unwrap());
    let tree = TreeRoot::empty(ByteCount(bytes));
    pool.catalog().put_volume(VolumeRow { key, id, name, tree, grows_to: None }).unwrap();
}

/// A row as a failover leaves it, in the middle of a history.
fn promoted(source: SourceId, name: &str) -> SourceRow {
    let mut row = SourceRow::new(source, name.parse().unwrap());
    row.epoch = EPOCH;
    row.generation = Generation { number: 4, id: 44 };
    row.applied = CpNumber(7);
    row.highest_cp = CpNumber(9);
    row.sequence = SequenceNumber(100);
    row.stream_hash = StreamHash([5; 16]);
    let transfer = TransferId { generation: 4, counter: 55 };
    let kept = Kept { transfer, ..Kept::default() };
    row.extension = FilerKeeper.write(&row, &kept).unwrap();
    row
}

/// A pool of somebody with two sources: one to be run, one that is only mirrored.
fn shared_stores(volume: u64) -> Stores {
    let stores = Stores::new();
    let device: Arc<SimDevice> = Arc::clone(&stores.pool);
    let pool = Pool::create(device, OWNER, PoolOptions::default()).unwrap();
    put_source(&pool, promoted(A, "filer-a"), volume);
    put_source(&pool, SourceRow::new(B, "filer-b".parse().unwrap()), 1 << 20);
    stores
}

fn open_pool(stores: &Stores) -> Result<Arc<Pool>, crate::pool::error::PoolError> {
    let device: Arc<SimDevice> = Arc::clone(&stores.pool);
    Pool::open(device, PoolOptions { owner: Some(OWNER), ..PoolOptions::default() })
}

fn engine_options(source: SourceId) -> EngineOptions {
    EngineOptions {
        source,
        keeper: Arc::new(FilerKeeper),
        forward: None,
        ground: None,
        settings: Settings {
            policy: Policy::default(),
            checkpoint_interval: Duration::from_secs(3600),
            accept_lost_nvram: false,
            accept_untold_policy: false,
            on_full: OnFull::Wait,
            ring: RingOptions::default(),
            ring_shape: RingShape { area_bytes_min: 1 << 20, commit_bytes_max: 512 << 10 },
        },
        stop_timeout: Duration::from_secs(10),
        space_limit: SpaceLimit::none(),
    }
}

async fn run_in(pool: &Arc<Pool>, nvram: &Arc<SimDevice>) -> Result<Filer, StartError> {
    Filer::start_in(Arc::clone(pool), store(nvram, false), engine_options(A)).await
}

fn assert_clean(pool: &Arc<Pool>) {
    let report = check(pool, Depth::Data).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

/// The thin thread: answered by the own NVRAM, complete with the own CP, numbers go on where the
/// row left them, everything is released, a restart has it.
#[test]
fn a_write_is_answered_and_published_without_a_hub() {
    runtime().block_on(async {
        let stores = shared_stores(1 << 20);
        let pool = open_pool(&stores).unwrap();
        let filer = run_in(&pool, &stores.nvram).await.unwrap();
        let export = open(&filer, "filer-a/vol0").await;
        assert!(export.info().multi_conn && !export.info().read_only);
        write(&export, 100, &[7; 10_000]).await.unwrap();
        export.flush().await.unwrap();
        let status = filer.status();
        assert_eq!((status.state, status.own_cp), (SourceState::FailedOver, CpNumber(7)));
        assert_eq!((status.own_durable.0, status.hub_durable.0), (101, 0));
        let (cp, roots) = filer.checkpoint().await.unwrap();
        assert_eq!(cp, CpNumber(10), "above every number that was ever used (R6)");
        let mut wanted = vec![0; VOLUME_BYTES];
        wanted[100..10_100].fill(7);
        assert_eq!(roots, [(VolumeNumber(0), hub::root(&wanted))]);
        assert_eq!(read_all(&export).await, wanted);
        // The CP is told a moment before its buffers go.
        until("the buffers go", || filer.status().order.dirty_blocks == 0).await;
        let status = filer.status();
        let ring = status.ring.unwrap();
        assert_eq!(ring.release_wanted, ring.written, "all of the ring is released");
        assert_eq!((status.held, status.order.dirty_blocks), ((0, 0), 0));
        assert_eq!(filer.checkpoint().await.unwrap().0, cp, "nothing to say, no CP");
        assert_eq!(filer.verify(|_, _, _| {}).await.unwrap_err(), VerifyError::Sole);
        let row = pool.catalog().source(A).unwrap().unwrap();
        assert_eq!((row.applied, row.sequence), (cp, SequenceNumber(101)));
        assert_eq!((row.epoch, row.generation.number), (EPOCH, 5));
        let kept = FilerKeeper.read(&row).unwrap();
        assert!(kept.nvram_made && kept.transfer == TransferId { generation: 5, counter: 1 });
        // The interval that is open at a clean stop is published too.
        write(&export, 0, &[8; 100]).await.unwrap();
        wanted[..100].fill(8);
        filer.stop().await.unwrap();
        assert!(write(&export, 0, &[9; 100]).await.is_err());
        assert_eq!(pool.catalog().source(A).unwrap().unwrap().applied, CpNumber(11));
        drop((filer, export));
        let filer = run_in(&pool, &stores.nvram).await.unwrap();
        assert_eq!(read_all(&open(&filer, "vol0").await).await, wanted);
        filer.stop().await.unwrap();
        assert_clean(&pool);
    });
}

/// A pool that others press for room gives up pins, the engine's too: neither its reads nor its
/// CPs need them to be held.
#[test]
fn pins_that_the_pool_gives_up_are_not_missed() {
    runtime().block_on(async {
        let stores = shared_stores(1 << 20);
        let pool = open_pool(&stores).unwrap();
        let filer = run_in(&pool, &stores.nvram).await.unwrap();
        let export = open(&filer, "vol0").await;
        let mut wanted = vec![0; VOLUME_BYTES];
        for n in 1..=3_u8 {
            let at = 1000 * usize::from(n);
            write(&export, at, &[n; 6000]).await.unwrap();
            wanted[at..at + 6000].fill(n);
            while pool.end_first_pin().unwrap() {}
            let (_, roots) = filer.checkpoint().await.unwrap();
            assert_eq!(roots[0].1, hub::root(&wanted), "parts of blocks are filled from below");
            while pool.end_first_pin().unwrap() {}
            assert_eq!(read_all(&export).await, wanted);
        }
        filer.stop().await.unwrap();
        assert_clean(&pool);
    });
}

/// Interval and full partition make CPs by themselves, without a word from anybody.
#[test]
fn the_interval_and_a_full_partition_make_cps() {
    runtime().block_on(async {
        let stores = shared_stores(1 << 20);
        let pool = open_pool(&stores).unwrap();
        let mut options = engine_options(A);
        options.settings.checkpoint_interval = Duration::from_millis(50);
        let nvram = store(&stores.nvram, false);
        let filer = Filer::start_in(Arc::clone(&pool), nvram, options).await.unwrap();
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        until("the interval's CP", || filer.status().own_cp == CpNumber(10)).await;
        assert!(filer.status().counters.checkpoints_interval >= 1);
        filer.stop().await.unwrap();
        drop((filer, export));
        let filer = run_in(&pool, &stores.nvram).await.unwrap();
        let export = open(&filer, "vol0").await;
        for n in 0..32_usize {
            write(&export, n % 4 * 200_000, &[2; 200_000]).await.unwrap();
        }
        assert!(filer.status().counters.checkpoints_full >= 1);
        filer.stop().await.unwrap();
        assert_clean(&pool);
    });
}

const OPERATIONS: u8 = 7;
const SPAN: usize = 30_000;

/// Writes that lie apart, CPs between them, and another source's CPs among them. Returns which
/// writes were acknowledged, and the other's last CP.
async fn scenario(stores: &Stores) -> (Vec<bool>, CpNumber) {
    let mut acknowledged = vec![false; usize::from(OPERATIONS)];
    let Ok(pool) = open_pool(stores) else { return (acknowledged, CpNumber(0)) };
    let mut other = Other::new(&pool);
    other.publish();
    let Ok(filer) = run_in(&pool, &stores.nvram).await else { return (acknowledged, other.cp) };
    let Ok(export) = filer.exports().open("vol0").await else { return (acknowledged, other.cp) };
    for n in 0..OPERATIONS {
        let at = usize::from(n) * SPAN + 100;
        acknowledged[usize::from(n)] = write(&export, at, &[n + 1; 20_000]).await.is_ok();
        if n % 3 == 2 {
            let asked = tokio::spawn(filer.checkpoint());
            other.publish();
            // May fail with the device; what it says is not the point here.
            drop(asked.await);
        }
    }
    (acknowledged, other.cp)
}

/// What is there after a cut: which write that was acknowledged is not.
async fn lost(filer: &Filer, acknowledged: &[bool]) -> Option<u8> {
    let image = read_all(&open(filer, "vol0").await).await;
    (0..OPERATIONS).zip(acknowledged).find_map(|(n, acknowledged)| {
        let at = usize::from(n) * SPAN + 100;
        let part = &image[at..at + 20_000];
        let whole = part.iter().all(|byte| *byte == n + 1);
        let none = part.iter().all(|byte| *byte == 0);
        let right = whole || !acknowledged && none;
        (!right).then_some(n)
    })
}

/// Power is cut at the n-th write or flush of the NVRAM or of the pool, for all n of a life:
/// nothing acknowledged is lost, the other source has the CP it was told of, the accounts are
/// right, and life goes on.
#[test]
fn a_power_cut_at_any_write_loses_nothing_acknowledged() {
    for which in ["nvram", "pool"] {
        for nth in 0.. {
            let happened = runtime().block_on(cut_at(which, nth, nth * 7 + 1));
            if !happened {
                assert!(nth > 5, "the life of {which} has more than {nth} writes");
                break;
            }
        }
    }
}

async fn cut_at(which: &str, nth: u64, seed: u64) -> bool {
    let stores = shared_stores(1 << 20);
    let device = if which == "nvram" { &stores.nvram } else { &stores.pool };
    device.fail_change(nth, Effect::PowerCut);
    let (acknowledged, told) = Box::pin(scenario(&stores)).await;
    let happened = device.forget_faults() == 0;
    let stores = stores.cut(seed);
    let pool = open_pool(&stores).unwrap();
    Other::assert_at(&pool, told);
    let filer = run_in(&pool, &stores.nvram).await.unwrap();
    assert_eq!(lost(&filer, &acknowledged).await, None, "{which} {nth} seed {seed}");
    let mut other = Other::new(&pool);
    write(&open(&filer, "vol0").await, 0, &[99; 50]).await.unwrap();
    assert!(other.publish());
    filer.checkpoint().await.unwrap();
    Other::assert_at(&pool, other.cp);
    filer.stop().await.unwrap();
    assert_clean(&pool);
    happened
}

/// Control: an NVRAM that says yes and keeps nothing is found out by the same look.
#[test]
fn a_lying_nvram_is_found_out() {
    let mut found = 0;
    for nth in 0..12 {
        runtime().block_on(async {
            let stores = shared_stores(1 << 20);
            stores.nvram.fail_change(nth, Effect::Lost);
            let (acknowledged, _) = Box::pin(scenario(&stores)).await;
            let stores = stores.cut(nth);
            let pool = open_pool(&stores).unwrap();
            let missing = match run_in(&pool, &stores.nvram).await {
                Ok(filer) => lost(&filer, &acknowledged).await.is_some(),
                Err(_) => true,
            };
            found += u32::from(missing);
        });
    }
    assert!(found > 0, "the look does not see a lost write");
}

/// Two engines and a mirrored source in one pool, for lives with restarts: nobody disturbs
/// anybody.
#[test]
fn two_engines_share_a_pool() {
    runtime().block_on(async {
        let stores = shared_stores(1 << 20);
        let second = SourceId([0xc0; 16]);
        let pool = open_pool(&stores).unwrap();
        put_source(&pool, promoted(second, "filer-c"), 1 << 20);
        let nvrams = [Arc::clone(&stores.nvram), Stores::new().nvram];
        let mut images = [vec![0; VOLUME_BYTES], vec![0; VOLUME_BYTES]];
        let mut other = Other::new(&pool);
        let mut chance = Chance::new(3);
        for _ in 0..3 {
            let mut filers = Vec::new();
            for (source, nvram) in [A, second].into_iter().zip(&nvrams) {
                let (pool, nvram) = (Arc::clone(&pool), store(nvram, false));
                filers.push(Filer::start_in(pool, nvram, engine_options(source)).await.unwrap());
            }
            let exports = [open(&filers[0], "vol0").await, open(&filers[1], "vol0").await];
            for _ in 0..60 {
                let which = usize::try_from(chance.below(2)).unwrap();
                change(&mut chance, &exports[which], &mut images[which]).await;
                if chance.below(12) == 0 {
                    let asked = tokio::spawn(filers[which].checkpoint());
                    assert!(other.publish());
                    let (_, roots) = asked.await.unwrap().unwrap();
                    assert_eq!(roots[0].1, hub::root(&images[which]));
                }
            }
            for (filer, (export, image)) in filers.iter().zip(exports.iter().zip(&images)) {
                assert_eq!(read_all(export).await, *image);
                filer.stop().await.unwrap();
            }
            Other::assert_at(&pool, other.cp);
        }
        assert_clean(&pool);
        // The NVRAM of one source is not the other's.
        let nvram = store(&nvrams[1], false);
        assert!(Filer::start_in(pool, nvram, engine_options(A)).await.is_err());
    });
}

/// An NVRAM that was made and is gone is refused, whether it is missing or blank; so is a source
/// that is not there.
#[test]
fn a_lost_nvram_is_never_made_anew() {
    runtime().block_on(async {
        let stores = shared_stores(1 << 20);
        let pool = open_pool(&stores).unwrap();
        let filer = run_in(&pool, &stores.nvram).await.unwrap();
        write(&open(&filer, "vol0").await, 0, &[1; 4096]).await.unwrap();
        filer.stop().await.unwrap();
        for new in [true, false] {
            let nvram = store(&Stores::new().nvram, new);
            let refused = Filer::start_in(Arc::clone(&pool), nvram, engine_options(A)).await;
            let refused = refused.unwrap_err().to_string();
            assert!(refused.contains("nvram") && refused.contains("Put the file"), "{refused}");
        }
        let nvram = store(&Stores::new().nvram, true);
        let unknown = Filer::start_in(Arc::clone(&pool), nvram, engine_options(SourceId([1; 16])));
        assert!(unknown.await.unwrap_err().to_string().contains("no source"));
        let filer = run_in(&pool, &stores.nvram).await.unwrap();
        assert_eq!(read(&open(&filer, "vol0").await, 0, 3).await, [1; 3]);
        filer.stop().await.unwrap();
    });
}

/// R18 where two share: what one was promised the other does not get, every CP has its room, and
/// what one gives back the other takes.
#[test]
fn two_engines_fill_a_pool_and_no_cp_lacks_room() {
    runtime().block_on(async {
        let stores = shared_stores(16 << 20);
        let second = SourceId([0xc0; 16]);
        let pool = open_pool(&stores).unwrap();
        put_source(&pool, promoted(second, "filer-c"), 16 << 20);
        let mut filers = Vec::new();
        for (source, nvram) in [(A, Arc::clone(&stores.nvram)), (second, Stores::new().nvram)] {
            let (pool, nvram) = (Arc::clone(&pool), store(&nvram, false));
            filers.push(Filer::start_in(pool, nvram, engine_options(source)).await.unwrap());
        }
        let mut tasks = Vec::new();
        for filer in &filers {
            let export = open(filer, "vol0").await;
            tasks.push(tokio::spawn(async move {
                for n in 0..20_usize {
                    write(&export, n << 18, &[7; 256 << 10]).await.unwrap();
                }
            }));
        }
        let mut before = Vec::new();
        loop {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            let all: Vec<_> = filers.iter().map(Filer::status).collect();
            let now: Vec<_> = all.iter().map(|s| (s.order.sequence, s.own_cp)).collect();
            assert!(all.iter().all(|s| s.state == SourceState::FailedOver), "{all:?}");
            if now == before && all.iter().any(|s| s.order.waiting > 0) {
                break;
            }
            before = now;
        }
        let space = pool.space().unwrap();
        assert!(space.free.0 >= space.reserve.0 + space.held.0, "{space:?}");
        let trimmed = open(&filers[0], "vol0").await;
        // Whoever goes on first, there is room for the other in the end.
        let room = async {
            while !tasks.iter().all(tokio::task::JoinHandle::is_finished) {
                trimmed.trim(0, 16 << 20, false).await.unwrap();
                filers[0].checkpoint().await.unwrap();
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), room).await.unwrap();
        for task in tasks {
            task.await.unwrap();
        }
        for filer in &filers {
            assert_eq!(filer.status().state, SourceState::FailedOver);
            filer.stop().await.unwrap();
        }
        assert_clean(&pool);
    });
}

/// What is promised is held; what is lent counts until it is settled; nothing stays behind.
#[test]
fn a_promise_is_kept_and_given_back() {
    let stores = shared_stores(1 << 20);
    let pool = open_pool(&stores).unwrap();
    let room = || {
        let space = pool.space().unwrap();
        space.free.0 - space.reserve.0 - space.held.0
    };
    let all = room();
    let [one, two] = [A, B].map(|source| Promise::new(pool.clone(), source, SpaceLimit::none()));
    assert!(one.takes(all - 10));
    assert!(!two.takes(11) && two.takes(10), "what one has the other does not get");
    assert_eq!(room(), 0);
    assert!(one.takes(all - 10) && !one.takes(all - 9));
    let budget = one.lend(100);
    assert!(matches!(&budget, Budget::Held(held) if held.blocks().0 == 100));
    assert!(one.takes(all - 10), "what is lent counts");
    drop(budget);
    // Tried again: it is asked for anew, and is not taken from what the next CP needs.
    let budget = one.lend(100);
    assert!(matches!(&budget, Budget::Held(held) if held.blocks().0 == 100));
    one.settled();
    assert!(one.takes(all - 110) && !one.takes(all - 109));
    drop(budget);
    assert!(one.takes(all - 10));
    drop((one, two));
    assert_eq!(room(), all);
    assert_eq!(pool.space().unwrap().held.0, 0);
}
