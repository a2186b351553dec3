//! A source is failed over, comes back, and is given its volumes back; both ends real.

use std::sync::Mutex;

use super::*;
use crate::device::sim::{Effect, On, SimDevice};
use crate::filer::recover::Store;
use crate::filer::status::SourceState as End;
use crate::filer::{DeviceOptions, Filer, FilerOptions};
use crate::hub::extension::{Extension, State};
use crate::hub::failback::{self, Report, Side, Step};
use crate::hub::failover::{self, Refusal};
use crate::hub::images::Images;
use crate::nbd::export::{Export, Exports, Segment};
use crate::raid::files::PoolFiles;
use crate::units::names::SourceName;
use crate::units::policy::{OnFull, OnHubLoss, Policy};
use crate::volume::root::hash_reader;

pub(super) const VOLUME: u64 = 4 << 20;

pub(super) fn name() -> SourceName {
    "a".parse().unwrap()
}

pub(super) fn stop() -> Policy {
    Policy { on_hub_loss: OnHubLoss::Stop, ..Policy::default() }
}

pub(super) fn go_on() -> Policy {
    Policy { on_hub_loss: OnHubLoss::Continue, ..Policy::default() }
}

pub(super) fn filer_options(dir: &Path, hub: std::net::SocketAddr, policy: Policy) -> FilerOptions {
    FilerOptions {
        tls: None,
        name: name(),
        hub,
        hub_timeout: Duration::from_millis(500),
        volumes: vec![("vol0".parse().unwrap(), ByteCount(VOLUME))],
        nvram: DeviceOptions { path: dir.join("nvram"), size: ByteCount(8 << 20) },
        realtime: false,
        pool: PoolFiles::plain(dir.join("disk0"), ByteCount(64 << 20)),
        checkpoint_interval: Duration::from_secs(3600),
        policy,
        resync_limit: None,
        accept_lost_nvram: false,
        accept_untold_policy: false,
        on_full: OnFull::Wait,
        stop_timeout: Duration::from_secs(10),
    }
}

pub(super) async fn served(filer: &Filer) {
    tokio::time::timeout(Duration::from_secs(20), filer.served()).await.expect("it serves");
}

pub(super) async fn at_filer(filer: &Filer) -> Arc<dyn Export> {
    filer.exports().open("vol0").await.unwrap()
}

pub(super) async fn at_hub(hub: &Hub) -> Arc<dyn Export> {
    Images::new(hub.shared().clone()).open("a/vol0").await.unwrap()
}

pub(super) async fn put(export: &Arc<dyn Export>, image: &mut [u8], at: usize, data: &[u8]) {
    let offset = u64::try_from(at).unwrap();
    export.write(offset, Bytes::copy_from_slice(data), false).await.unwrap();
    image[at..at + data.len()].copy_from_slice(data);
}

pub(super) async fn all(export: &Arc<dyn Export>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in export.read(0, u32::try_from(VOLUME).unwrap()).await.unwrap() {
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(&data),
            Segment::Hole(count) => bytes.resize(bytes.len() + usize::try_from(count).unwrap(), 0),
        }
    }
    bytes
}

pub(super) async fn fail_over(hub: &Hub) {
    let ask = failover::Ask { now: true, ..failover::Ask::default() };
    hub.failover(&name(), ask, |_| {}).await.unwrap();
    until("it is served", || hub.shared().promoted.engine(&name()).is_some()).await;
    until("its log is applied", || hub.shared().failovers.turn(&name()).is_ok()).await;
}

pub(super) async fn give_back(hub: &Hub, keep: Option<Side>) -> Result<Report, Refusal> {
    let ask = failback::Ask { keep, ..failback::Ask::default() };
    hub.failback(&name(), ask, Box::new(|_| true)).await
}

pub(super) fn state(hub: &Hub) -> State {
    let rows = hub.shared().pool.catalog().sources().unwrap();
    Extension::of(rows.iter().find(|row| row.name == name()).unwrap()).unwrap().state
}

pub(super) async fn follows(hub: &Hub) {
    until("the filer follows", || hub.shared().failbacks.follows(&name())).await;
}

/// Both ends of the world, and what the volume must hold.
pub(super) struct World {
    pub(super) hub_dir: tempfile::TempDir,
    pub(super) hub: Hub,
    pub(super) filer_dir: tempfile::TempDir,
    pub(super) image: Vec<u8>,
    policy: Policy,
}

impl World {
    pub(super) fn of(
        hub_dir: tempfile::TempDir,
        hub: Hub,
        filer_dir: tempfile::TempDir,
        image: Vec<u8>,
        policy: Policy,
    ) -> Self {
        Self { hub_dir, hub, filer_dir, image, policy }
    }

    /// A source that wrote, published a CP, wrote again and was lost; its hub serves, and a client
    /// has written there.
    pub(super) async fn failed_over(policy: Policy) -> Self {
        let hub_dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(hub_dir.path(), &["a", "b"])).await.unwrap();
        let first = tempfile::tempdir().unwrap();
        let filer = Filer::start(filer_options(first.path(), hub.address(), policy)).await.unwrap();
        served(&filer).await;
        let mut image = vec![0; usize::try_from(VOLUME).unwrap()];
        let export = at_filer(&filer).await;
        put(&export, &mut image, 0, &[1; 300_000]).await;
        filer.checkpoint().await.unwrap();
        put(&export, &mut image, 100_000, &[2; 50_000]).await;
        let filer_dir = promoted::copy_of(first.path());
        drop((export, filer));
        fail_over(&hub).await;
        let export = at_hub(&hub).await;
        assert_eq!(all(&export).await, image, "nothing acknowledged is lost");
        put(&export, &mut image, 140_000, &[3; 80_000]).await;
        put(&export, &mut image, 2_000_000, &[4; 10_000]).await;
        Self { hub_dir, hub, filer_dir, image, policy }
    }

    pub(super) async fn filer(&self) -> Filer {
        let options = filer_options(self.filer_dir.path(), self.hub.address(), self.policy);
        Filer::start(options).await.unwrap()
    }

    /// The filer serves what was written anywhere, and is mirrored.
    pub(super) async fn is_whole(&mut self, filer: &Filer) {
        served(filer).await;
        // By its full name: a filer may serve others as well.
        let export = filer.exports().open("a/vol0").await.unwrap();
        assert_eq!(all(&export).await, self.image);
        put(&export, &mut self.image, 3_000_000, &[5; 20_000]).await;
        let (cp, roots) = filer.checkpoint().await.unwrap();
        until("the hub has it", || {
            let rows = self.hub.shared().pool.catalog().sources().unwrap();
            rows.iter().any(|row| row.name == name() && row.applied == cp)
        })
        .await;
        let (there, problems) = self.hub.shared().scan(&name(), cp, |_, _, _| {}).unwrap();
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(there[0].root, Some(roots[0].1));
        assert_eq!(all(&at_hub(&self.hub).await).await, self.image);
        assert_eq!(all(&export).await, self.image);
        assert_eq!(state(&self.hub), State::Mirror);
        for pool in [self.hub.shared().pool.clone(), filer.pool()] {
            let report = check(&pool, Depth::Data).unwrap();
            assert!(report.is_clean(), "{:?}", report.findings);
        }
        let nvram = self.hub.shared().promoted.nvram_path(filer.status().id);
        assert!(!nvram.try_exists().unwrap(), "its NVRAM at the hub is gone");
    }
}

/// The whole way: written here, failed over, written there, given back, written here again.
#[test]
fn a_source_is_given_back() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let early = give_back(&world.hub, None).await.unwrap_err();
        assert!(early.reason.contains("not connected"), "{early:?}");
        let filer = world.filer().await;
        follows(&world.hub).await;
        until("it says so", || filer.status().state == End::Fenced).await;
        assert!(filer.status().next_step.contains("failback"), "{}", filer.status().next_step);
        assert!(filer.exports().open("vol0").await.is_err(), "a fenced source serves nobody");
        let old = at_hub(&world.hub).await;
        let report = give_back(&world.hub, None).await.unwrap();
        assert!(report.serves && report.rounds >= 2 && report.kept.is_none(), "{report:?}");
        assert!(old.write(0, Bytes::from_static(b"late"), false).await.is_err());
        world.is_whole(&filer).await;
        assert_eq!(filer.status().epoch, report.epoch);
        println!("pause {:?}", report.pause);
        // And the same once more: fenced while it runs, without a restart, and while a client writes.
        fail_over(&world.hub).await;
        let export = at_hub(&world.hub).await;
        put(&export, &mut world.image, 0, &[8; 9000]).await;
        follows(&world.hub).await;
        let writer = actix::spawn(async move {
            let mut answered = Vec::new();
            for n in 0_usize.. {
                let (at, data) =
                    (1_000_000 + n % 100 * 4096, vec![u8::try_from(n % 251).unwrap(); 4096]);
                let wrote =
                    export.write(u64::try_from(at).unwrap(), Bytes::from(data.clone()), false);
                match wrote.await {
                    Ok(()) => answered.push((at, data)),
                    Err(_) => break,
                }
            }
            answered
        });
        assert!(give_back(&world.hub, None).await.unwrap().serves);
        let answered = writer.await.unwrap();
        assert!(!answered.is_empty());
        for (at, data) in answered {
            world.image[at..at + data.len()].copy_from_slice(&data);
        }
        world.is_whole(&filer).await;
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// A failback can never end at a filer whose pool refuses writes: it says so, and not that it waits
/// for one. Started again it follows, and is given its volumes.
#[test]
fn a_follower_whose_pool_has_failed_is_faulted() {
    in_system(async {
        let mut world = World::failed_over(stop()).await;
        let device = |file: &str| {
            SimDevice::from_image(file, std::fs::read(world.filer_dir.path().join(file)).unwrap())
        };
        let options = filer_options(world.filer_dir.path(), world.hub.address(), world.policy);
        let start = async |nvram: &Arc<SimDevice>, pool: &Arc<SimDevice>| {
            let (nvram, pool): (Arc<SimDevice>, Arc<SimDevice>) = (nvram.clone(), pool.clone());
            let store = |device| Store { device, new: false };
            let behaviour = Filer::behaviour(&options).unwrap();
            Filer::start_on(behaviour, store(nvram), store(pool)).await.unwrap()
        };
        let (nvram, pool) = (Arc::new(device("nvram")), Arc::new(device("disk0")));
        let filer = start(&nvram, &pool).await;
        follows(&world.hub).await;
        until("it waits", || filer.status().state == End::Fenced).await;
        pool.fail(On::Flush, 0, Effect::Errno(5));
        assert!(give_back(&world.hub, None).await.is_err());
        until("it says so", || filer.status().state == End::Faulted).await;
        let reason = filer.status().reason;
        assert!(reason.contains("own pool failed") && reason.contains("flush"), "{reason}");
        until("it follows no more", || !world.hub.shared().failbacks.follows(&name())).await;
        assert_eq!(state(&world.hub), State::Promoted, "the hub goes on serving");
        drop(filer);
        let filer = start(&Arc::new(nvram.survivor()), &Arc::new(pool.survivor())).await;
        follows(&world.hub).await;
        assert!(give_back(&world.hub, None).await.unwrap().serves);
        world.is_whole(&filer).await;
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// The filer is lost when that step is reached, with what it has on its devices then.
async fn lost_at(step: Step) {
    let mut world = World::failed_over(stop()).await;
    let filer = world.filer().await;
    follows(&world.hub).await;
    let left = tempfile::tempdir().unwrap();
    let (from, to) = (world.filer_dir.path().to_owned(), left.path().to_owned());
    let doomed = Mutex::new(Some(filer));
    let told = move |reached: Step| {
        if reached == step
            && let Some(filer) = doomed.lock().unwrap().take()
        {
            promoted::copy(&from, &to);
            drop(filer);
        }
        true
    };
    let given = world.hub.failback(&name(), failback::Ask::default(), Box::new(told)).await;
    if matches!(step, Step::Round(_) | Step::Held) {
        // Nothing was handed over: the hub goes on serving.
        assert!(given.unwrap_err().reason.contains("went away"));
        assert_eq!(state(&world.hub), State::Promoted);
        let export = at_hub(&world.hub).await;
        put(&export, &mut world.image, 7000, &[6; 70_000]).await;
    } else {
        assert!(!given.unwrap().serves);
        assert_eq!(state(&world.hub), State::HandedOver);
        let refused = give_back(&world.hub, None).await.unwrap_err();
        assert!(refused.reason.contains("handed over"), "{refused:?}");
    }
    world.filer_dir = left;
    let filer = world.filer().await;
    if state(&world.hub) == State::Promoted {
        follows(&world.hub).await;
        give_back(&world.hub, None).await.unwrap();
    }
    world.is_whole(&filer).await;
    filer.stop().await.unwrap();
    world.hub.stop().await;
}

#[test]
fn a_filer_lost_at_any_step_loses_nothing() {
    for step in [Step::Round(1), Step::Held, Step::Reached, Step::HandedOver] {
        in_system(lost_at(step));
    }
}

/// The hub is lost when that step is reached; the filer goes on, and finds the one that is started
/// on what was left.
async fn hub_lost_at(step: Step) {
    let mut world = World::failed_over(stop()).await;
    let filer = world.filer().await;
    follows(&world.hub).await;
    let told = move |reached: Step| reached != step;
    let given = world.hub.failback(&name(), failback::Ask::default(), Box::new(told)).await;
    assert!(given.is_err());
    let left = promoted::copy_of(world.hub_dir.path());
    let address = world.hub.address();
    world.hub.stop().await;
    let again = HubOptions { listen: address, ..options(left.path(), &["a", "b"]) };
    world.hub = start_again(again).await;
    world.hub_dir = left;
    if matches!(step, Step::Held | Step::Reached) {
        assert_eq!(state(&world.hub), State::Promoted);
        let export = at_hub(&world.hub).await;
        put(&export, &mut world.image, 7000, &[6; 70_000]).await;
        follows(&world.hub).await;
        give_back(&world.hub, None).await.unwrap();
    }
    world.is_whole(&filer).await;
    filer.stop().await.unwrap();
    world.hub.stop().await;
}

#[test]
fn a_hub_lost_at_any_step_loses_nothing() {
    for step in [Step::Held, Step::Reached, Step::HandedOver, Step::Told] {
        in_system(hub_lost_at(step));
    }
}

/// Both sides have written: refused, until the administrator names the side; then what the filer
/// wrote by itself is a CP of its own, by name.
#[test]
fn a_split_brain_is_refused_and_kept() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let address = hub.address();
        let filer_dir = tempfile::tempdir().unwrap();
        let start = filer_options(filer_dir.path(), address, go_on());
        let filer = Filer::start(start).await.unwrap();
        served(&filer).await;
        let mut image = vec![0; usize::try_from(VOLUME).unwrap()];
        let export = at_filer(&filer).await;
        put(&export, &mut image, 0, &[1; 300_000]).await;
        filer.checkpoint().await.unwrap();
        // The hub cannot be reached: the filer goes on alone.
        hub.stop().await;
        drop(hub);
        let mut alone = image.clone();
        put(&export, &mut alone, 50_000, &[7; 60_000]).await;
        // It is failed over where the filer does not find it, and then found again.
        let hub = start_again(options(dir.path(), &["a"])).await;
        fail_over(&hub).await;
        put(&at_hub(&hub).await, &mut image, 60_000, &[9; 90_000]).await;
        hub.stop().await;
        drop(hub);
        let again = HubOptions { listen: address, ..options(dir.path(), &["a"]) };
        let mut world = World {
            hub: start_again(again).await,
            hub_dir: dir,
            filer_dir,
            image,
            policy: go_on(),
        };
        follows(&world.hub).await;
        let late = export.write(0, Bytes::from_static(b"late"), false).await;
        assert!(late.is_err(), "it is fenced");
        let refused = give_back(&world.hub, None).await.unwrap_err();
        assert!(refused.reason.contains("split brain"), "{refused:?}");
        assert!(refused.next_step.contains("--keep hub"), "{refused:?}");
        let ask = failback::Ask { to: Some("b".parse().unwrap()), ..failback::Ask::default() };
        let nobody = world.hub.failback(&name(), ask, Box::new(|_| true)).await.unwrap_err();
        assert!(nobody.reason.contains("no filer b"), "{nobody:?}");
        put(&at_hub(&world.hub).await, &mut world.image, 0, &[2; 100]).await;
        let report = give_back(&world.hub, Some(Side::Hub)).await.unwrap();
        assert_eq!(report.kept, Some("split-2".parse().unwrap()));
        world.is_whole(&filer).await;
        let pool = filer.pool();
        let split = "split-2".parse().unwrap();
        let number = filer.status().volumes[0].number;
        let kept = pool.pin_kept(filer.status().id, &split, number).unwrap();
        let wanted = hash_reader(&alone[..], ByteCount(VOLUME)).unwrap();
        assert_eq!(kept.tree().root(), wanted, "what it wrote by itself is there");
        assert_eq!(filer.status().alone, None);
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}

/// R12: what `sync` has not sent was never acknowledged. It is given up, and kept by name first,
/// without anybody asking for it.
#[test]
fn what_was_never_acknowledged_is_kept_by_name() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let address = hub.address();
        let filer_dir = tempfile::tempdir().unwrap();
        let start = filer_options(filer_dir.path(), address, stop());
        let filer = Filer::start(start).await.unwrap();
        served(&filer).await;
        let mut image = vec![0; usize::try_from(VOLUME).unwrap()];
        let export = at_filer(&filer).await;
        put(&export, &mut image, 0, &[1; 300_000]).await;
        filer.checkpoint().await.unwrap();
        hub.stop().await;
        drop(hub);
        let before = filer.status().own_durable;
        let mut own = image.clone();
        own[50_000..110_000].fill(7);
        let unanswered =
            actix::spawn(
                async move { export.write(50_000, Bytes::from(vec![7; 60_000]), false).await },
            );
        until("it is in the own NVRAM", || filer.status().own_durable > before).await;
        let hub = start_again(options(dir.path(), &["a"])).await;
        fail_over(&hub).await;
        put(&at_hub(&hub).await, &mut image, 60_000, &[9; 90_000]).await;
        hub.stop().await;
        drop(hub);
        let again = HubOptions { listen: address, ..options(dir.path(), &["a"]) };
        let hub = start_again(again).await;
        let mut world = World { hub, hub_dir: dir, filer_dir, image, policy: stop() };
        follows(&world.hub).await;
        assert!(unanswered.await.unwrap().is_err(), "it was never acknowledged");
        let report = give_back(&world.hub, None).await.unwrap();
        assert_eq!(report.kept, Some("unacknowledged-2".parse().unwrap()));
        world.is_whole(&filer).await;
        let number = filer.status().volumes[0].number;
        let name = "unacknowledged-2".parse().unwrap();
        let kept = filer.pool().pin_kept(filer.status().id, &name, number).unwrap();
        let wanted = hash_reader(&own[..], ByteCount(VOLUME)).unwrap();
        assert_eq!(kept.tree().root(), wanted, "what only its NVRAM held is there");
        filer.stop().await.unwrap();
        world.hub.stop().await;
    });
}
