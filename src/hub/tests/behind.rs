//! The log goes on while the image is brought up (R4): real ends.

use std::sync::atomic::Ordering;

use super::failback::{all, at_filer, at_hub, filer_options, go_on, name, put, served};
use super::resync::is_in_sync;
use super::*;
use crate::filer::Filer;
use crate::filer::status::SourceState as End;

const PART: usize = 64 << 10;
const PARTS: usize = (4 << 20) / PART;
/// Bytes a second of a pass.
const LIMIT: u32 = 1 << 20;
const LONG: Duration = Duration::from_secs(60);

/// What a client writes: part after part of the volume, each time with other content.
struct Writer {
    image: Vec<u8>,
    written: usize,
}

impl Writer {
    fn new() -> Self {
        Self { image: vec![0; PARTS * PART], written: 0 }
    }

    async fn write(&mut self, filer: &Filer) {
        let (at, [low, high, ..]) = (self.written % PARTS * PART, self.written.to_ne_bytes());
        let data = [low, high, 0x5a, 1].repeat(PART / 4);
        put(&at_filer(filer).await, &mut self.image, at, &data).await;
        self.written += 1;
    }

    /// Writes the whole volume, twice.
    async fn write_all_twice(&mut self, filer: &Filer) {
        for _ in 0..2 * PARTS {
            self.write(filer).await;
        }
    }

    /// Writes three times as fast as the image is brought up, until the ends are in sync.
    async fn write_until_in_sync(&mut self, filer: &Filer) {
        let pause = Duration::from_secs(1) * u32::try_from(PART).unwrap() / (3 * LIMIT);
        let begin = Instant::now();
        while !is_in_sync(filer) {
            assert!(begin.elapsed() < LONG, "{:?}", filer.status());
            self.write(filer).await;
            tokio::time::sleep(pause).await;
        }
    }
}

/// A source whose passes are throttled, and that goes on alone.
async fn throttled(dir: &Path, hub: &Hub) -> Filer {
    let mut own = filer_options(dir, hub.address(), go_on());
    own.resync_limit = Some(ByteCount(u64::from(LIMIT)));
    let filer = Filer::start(own).await.unwrap();
    served(&filer).await;
    filer
}

/// Counts of the hub: CPs that it built from its log alone, and bytes that came for passes.
fn counts(hub: &Hub) -> (u64, u64) {
    let lane = hub.shared().lanes.get(&name()).unwrap();
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    (read(&lane.ladder.replayed), read(&lane.ladder.pass_bytes))
}

/// Clients write faster than the throttled pass brings the image up: it ends all the same, and what was
/// written meanwhile is sent once. With all of it sent behind the pass, each pass would be followed by another.
#[test]
fn a_pass_that_clients_outrun_ends_in_sync() {
    in_system(async {
        let (dir, filer_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let again = HubOptions { listen: hub.address(), ..options(dir.path(), &["a"]) };
        let filer = throttled(filer_dir.path(), &hub).await;
        let mut writer = Writer::new();
        writer.write(&filer).await;
        filer.checkpoint().await.unwrap();
        hub.stop().await;
        drop(hub);
        until("it goes on alone", || filer.status().alone.is_some()).await;
        writer.write_all_twice(&filer).await;
        let hub = start_again(again.clone()).await;
        until("a pass", || filer.status().pass.is_some()).await;
        let before = filer.status().own_cp;
        writer.write_until_in_sync(&filer).await;
        let (built, passed) = counts(&hub);
        assert!(filer.status().own_cp > before, "no CP was done alone during the pass");
        assert!(built > 0, "the hub has built none of them from its log");
        // The first pass is of all that the volume holds, and it is the only one.
        let once = u64::try_from(PARTS * PART).unwrap();
        assert!(passed < once + once / 8, "{passed} bytes for passes, the volume has {once}");
        filer.checkpoint().await.unwrap();
        assert!(all(&at_hub(&hub).await).await == writer.image);

        // What stands in the log that was taken over is found by a start.
        writer.write(&filer).await;
        hub.stop().await;
        drop(hub);
        let hub = start_again(again).await;
        writer.write_until_in_sync(&filer).await;
        filer.checkpoint().await.unwrap();
        assert!(all(&at_hub(&hub).await).await == writer.image);
        filer.stop().await.unwrap();
        hub.stop().await;
    });
}

/// The hub's log has room for a part of it only: it is dropped whole, and the ends come together when
/// clients write less.
#[test]
fn a_log_that_finds_no_room_is_dropped_whole() {
    in_system(async {
        let (dir, filer_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut hub_options = options(dir.path(), &["a"]);
        let hub = Hub::start(hub_options.clone()).await.unwrap();
        hub_options.listen = hub.address();
        hub_options.sources[0].log_limit = Some(ByteCount(24 << 20));
        let filer = throttled(filer_dir.path(), &hub).await;
        let mut writer = Writer::new();
        hub.stop().await;
        drop(hub);
        until("it is offline", || filer.status().state == End::Offline).await;
        writer.write_all_twice(&filer).await;
        let hub = start_again(hub_options).await;
        until("a pass", || filer.status().pass.is_some()).await;
        let lane = hub.shared().lanes.get(&name()).unwrap();
        let over = || lane.ladder.behind_dropped.load(Ordering::Relaxed) > 0;
        let begin = Instant::now();
        while !over() {
            assert!(begin.elapsed() < LONG, "there was room for all of it");
            writer.write(&filer).await;
        }
        until_within(LONG, "it is in sync", || is_in_sync(&filer)).await;
        filer.checkpoint().await.unwrap();
        assert!(all(&at_hub(&hub).await).await == writer.image);
        assert_eq!(hub.shared().store.behind_bytes(lane.source()), 0);
        filer.stop().await.unwrap();
        hub.stop().await;
    });
}
