//! A source with its hub there: writes, checkpoints, reads, restarts, a clean stop.

use super::*;
use crate::device::sim::Chance;
use crate::filer::status::SourceState;
use crate::filer::verify::VerifiedVolume;
use crate::filer::{DeviceOptions, FilerOptions};
use crate::raid::files::PoolFiles;
use crate::units::numbers::{CpNumber, VolumeNumber};

const VOL0: VolumeNumber = VolumeNumber(0);

/// The thin thread: write, acknowledge, read back, checkpoint, equal at both ends, ring empty.
#[test]
fn a_write_goes_all_the_way() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = start(&Stores::new(), &hub).await;
        let export = open(&filer, "filer-a/vol0").await;
        write(&export, 4096, &[7; 8192]).await.unwrap();
        write(&export, 100, &[8; 10]).await.unwrap();
        let mut wanted = vec![0; VOLUME_BYTES];
        wanted[4096..12288].fill(7);
        wanted[100..110].fill(8);
        assert_eq!(read_all(&export).await, wanted, "from memory");
        let sum: usize = hub.lock().log.iter().map(|t| t.entries().len()).sum();
        assert_eq!(sum, 2, "both are on the hub when they are acknowledged");
        let (cp, roots) = filer.checkpoint().await.unwrap();
        assert_eq!(cp, CpNumber(1));
        assert_eq!(read_all(&export).await, wanted, "from the tree");
        assert_eq!(hub.lock().images[&VOL0], wanted);
        assert_eq!(roots[0], (VOL0, hub::root(&wanted)));
        let seen = hub.seen();
        assert_eq!((seen.references, seen.inline, seen.holes), (2, 1, 0));
        // The answer to `checkpoint` and the release of what it held go separate ways.
        until("all is released", || filer.status().order.dirty_blocks == 0).await;
        let status = filer.status();
        assert_eq!((status.state, status.common_cp), (SourceState::InSync, Some(cp)));
        let ring = status.ring.unwrap();
        assert_eq!(ring.release_wanted, ring.written, "all of the ring is released");
        assert_eq!(status.held.0, 0);
        assert_eq!(status.counters.checkpoints_command, 1);
        // Nothing to say: no CP is made.
        assert_eq!(filer.checkpoint().await.unwrap().0, cp);
        assert_eq!(hub.applied(), cp);
        filer.stop().await.unwrap();
    });
}

#[test]
fn names_info_and_extents() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = start(&Stores::new(), &hub).await;
        let exports = filer.exports();
        let names: Vec<_> = exports.list().into_iter().map(|listed| listed.name).collect();
        assert_eq!(names, ["filer-a/vol0", "filer-a/vol1"]);
        assert!(exports.open("vol1").await.is_ok());
        for unknown in ["", "vol2", "filer-b/vol0", "filer-a/vol0@x"] {
            assert!(exports.open(unknown).await.is_err(), "{unknown:?}");
        }
        let export = open(&filer, "vol0").await;
        assert!(export.info().multi_conn && !export.info().read_only);
        write(&export, 8192, &[1; 4096]).await.unwrap();
        let told = export.extents(0, 65_536, 9).await.unwrap();
        let told: Vec<_> = told.iter().map(|e| (e.length, e.hole && e.zero)).collect();
        assert_eq!(told, [(8192, true), (4096, false), (53_248, true)]);
        filer.checkpoint().await.unwrap();
        write(&export, 12288, &[1; 100]).await.unwrap();
        export.trim(8192, 4096, false).await.unwrap();
        let told = export.extents(100, 65_436, 9).await.unwrap();
        let told: Vec<_> = told.iter().map(|e| (e.length, e.hole)).collect();
        assert_eq!(told, [(12188, true), (4096, false), (49_152, true)]);
        let one = export.extents(0, 65_536, 1).await.unwrap();
        assert_eq!((one.len(), one[0].length), (1, 12288));
        filer.stop().await.unwrap();
    });
}

/// Random writes, trims and zeroes at any alignment on both volumes, with checkpoints between and
/// restarts: what is read is what was written, and both ends agree on every CP.
#[test]
fn random_life_agrees_with_plain_images() {
    for apply in [Apply::Reference, Apply::Inline, Apply::Replay] {
        runtime().block_on(random_life(apply, 11));
    }
}

async fn random_life(apply: Apply, seed: u64) {
    let hub = Hub::start(4 << 20).await;
    let stores = Stores::new();
    let mut chance = Chance::new(seed);
    let mut images = [vec![0; VOLUME_BYTES], vec![0; VOLUME_BYTES]];
    for _ in 0..6 {
        let filer = try_start(&stores, behaviour(&hub, apply)).await.unwrap();
        filer.served().await;
        let exports = [open(&filer, "vol0").await, open(&filer, "vol1").await];
        for (export, image) in exports.iter().zip(&images) {
            assert_eq!(read_all(export).await, *image, "after the restart");
        }
        for _ in 0..60 {
            let volume = usize::try_from(chance.below(2)).unwrap();
            change(&mut chance, &exports[volume], &mut images[volume]).await;
            if chance.below(20) == 0 {
                let (_, roots) = filer.checkpoint().await.unwrap();
                let met: Vec<_> = roots.iter().map(|(_, root)| *root).collect();
                assert_eq!(met, [hub::root(&images[0]), hub::root(&images[1])]);
            }
        }
        for (export, image) in exports.iter().zip(&images) {
            assert_eq!(read_all(export).await, *image);
        }
        filer.stop().await.unwrap();
        assert_eq!(hub.lock().images[&VOL0], images[0], "a clean stop leaves a CP of all");
    }
    hub.lock().assert_line();
    let seen = hub.seen();
    assert_eq!(seen.rejected, 0);
    assert_eq!(seen.references > 0, apply == Apply::Reference);
    assert_eq!(seen.inline > 0, apply != Apply::Replay);
    assert_eq!(seen.replayed, if apply == Apply::Replay { seen.published } else { 0 });
}

pub(super) async fn change(chance: &mut Chance, export: &Arc<dyn Export>, image: &mut [u8]) {
    let size = u64::try_from(VOLUME_BYTES).unwrap();
    let offset = chance.below(size);
    let magnitude = 1 + chance.below(17);
    let length = (1 + chance.below(1 << magnitude)).min(size - offset);
    let (offset, length) = match chance.below(2) {
        0 => (offset, length),
        _ => (offset / 4096 * 4096, length.div_ceil(4096) * 4096),
    };
    let length = length.min(size - offset);
    let count = u32::try_from(length).unwrap();
    let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
    match chance.below(8) {
        0 => {
            export.trim(offset, count, false).await.unwrap();
            let (first, end) = (offset.div_ceil(4096) * 4096, (offset + length) / 4096 * 4096);
            if first < end {
                image[usize::try_from(first).unwrap()..usize::try_from(end).unwrap()].fill(0);
            }
        }
        1 => {
            export.write_zeroes(offset, count, false, true).await.unwrap();
            image[range].fill(0);
        }
        _ => {
            let [fill, ..] = chance.next_u64().to_le_bytes();
            let data = vec![fill; range.len()];
            export.write(offset, Bytes::from(data.clone()), false).await.unwrap();
            image[range].copy_from_slice(&data);
        }
    }
}

#[test]
fn the_hub_and_the_interval_ask_for_checkpoints() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let mut behaviour = behaviour(&hub, Apply::Reference);
        behaviour.wanted.checkpoint_interval = Duration::from_millis(50);
        let filer = try_start(&stores, behaviour).await.unwrap();
        filer.served().await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        until("the interval's CP", || hub.applied() == CpNumber(1)).await;
        write(&export, 0, &[2; 4096]).await.unwrap();
        hub.want_checkpoint();
        until("the hub's CP", || hub.applied() == CpNumber(2)).await;
        assert_eq!(hub.seen().checkpoint_at, CpNumber(2));
        let counters = filer.status().counters;
        assert!(counters.checkpoints_interval >= 1);
        filer.stop().await.unwrap();
        // An idle source makes no CP.
        assert_eq!(hub.applied(), CpNumber(2));
    });
}

/// Rules, test 8: what lies over each other in flight has one order, in the log and in the image.
#[test]
fn overlapping_writes_on_four_connections_have_one_order() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = Arc::new(start(&Stores::new(), &hub).await);
        let mut tasks = Vec::new();
        for connection in 0..4_u8 {
            let export = open(&filer, "vol0").await;
            tasks.push(tokio::spawn(async move {
                let mut chance = Chance::new(u64::from(connection));
                for n in 0..100_u8 {
                    let offset = usize::try_from(chance.below(5000)).unwrap();
                    let data = vec![connection * 64 + n % 64; 9000];
                    write(&export, offset, &data).await.unwrap();
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        // The image is what the log says, in the log's order.
        let mut replayed = vec![0; VOLUME_BYTES];
        for transfer in &hub.lock().history {
            for (entry, data) in transfer.iter() {
                let at = usize::try_from(entry.offset).unwrap();
                replayed[at..at + data.len()].copy_from_slice(data);
            }
        }
        let export = open(&filer, "vol0").await;
        assert_eq!(read_all(&export).await, replayed);
        filer.checkpoint().await.unwrap();
        assert_eq!(hub.lock().images[&VOL0], replayed);
        hub.lock().assert_line();
        assert_eq!(filer.status().own_durable, filer.status().order.sequence);
        filer.stop().await.unwrap();
    });
}

/// Both ends read every block again and come to the same roots.
#[test]
fn verify_reads_both_ends() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = start(&Stores::new(), &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 5000, &[3; 100_000]).await.unwrap();
        filer.checkpoint().await.unwrap();
        let verified = filer.verify(|_, _, _| {}).await.unwrap();
        assert_eq!(verified.cp, CpNumber(1));
        assert!(verified.volumes.iter().all(VerifiedVolume::is_equal), "{verified:?}");
        let read = |at: usize| verified.volumes[at].here.map(|scan| scan.blocks_read);
        assert_eq!((read(0), read(1)), (Some(25), Some(0)));
        // Control: one flipped byte of the hub's image is found.
        hub.lock().images.get_mut(&VOL0).unwrap()[6000] ^= 1;
        let verified = filer.verify(|_, _, _| {}).await.unwrap();
        assert!(!verified.volumes[0].is_equal() && verified.volumes[1].is_equal());
        filer.stop().await.unwrap();
    });
}

#[test]
fn another_configuration_is_refused_by_name() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        start(&stores, &hub).await.stop().await.unwrap();
        let refused = async |change: &dyn Fn(&mut Behaviour)| {
            let mut changed = behaviour(&hub, Apply::Reference);
            change(&mut changed);
            try_start(&stores, changed).await.unwrap_err().to_string()
        };
        let other = refused(&|b| b.wanted.name = "filer-b".parse().unwrap()).await;
        assert!(other.contains("belongs to source filer-a"), "{other}");
        let gone = refused(&|b| drop(b.wanted.volumes.pop())).await;
        assert!(gone.contains("volume vol1"), "{gone}");
        let size = refused(&|b| b.wanted.volumes[1].1 = ByteCount(8192)).await;
        assert!(size.contains("1048576") && size.contains("8192"), "{size}");
        // One more is added.
        let mut more = behaviour(&hub, Apply::Reference);
        more.wanted.volumes.push(("vol2".parse().unwrap(), ByteCount(1 << 30)));
        let filer = try_start(&stores, more).await.unwrap();
        assert_eq!(filer.status().volumes.len(), 3);
    });
}

fn file_options(directory: &std::path::Path, hub: &Hub) -> FilerOptions {
    let device = |name: &str, size| DeviceOptions {
        path: directory.join("state").join(name),
        size: ByteCount(size),
    };
    FilerOptions {
        tls: None,
        resync_limit: None,
        name: "filer-a".parse().unwrap(),
        hub: hub.address,
        hub_timeout: Duration::from_secs(5),
        volumes: vec![("vol0".parse().unwrap(), ByteCount(1 << 20))],
        nvram: device("nvram", 8 << 20),
        realtime: false,
        pool: PoolFiles::plain(directory.join("state/disk0"), ByteCount(32 << 20)),
        checkpoint_interval: Duration::from_secs(3600),
        policy: promise(Apply::Reference),
        accept_lost_nvram: false,
        accept_untold_policy: false,
        on_full: OnFull::Wait,
        stop_timeout: Duration::from_secs(10),
    }
}

/// The same on real files: made at the first start, found at the next, held to their sizes.
#[test]
fn real_files_are_made_and_found_again() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let directory = tempfile::tempdir().unwrap();
        let options = || file_options(directory.path(), &hub);
        let filer = Filer::start(options()).await.unwrap();
        filer.served().await;
        let export = open(&filer, "vol0").await;
        write(&export, 4000, &[5; 300_000]).await.unwrap();
        let busy = Filer::start(options()).await.unwrap_err().to_string();
        assert!(busy.contains("in use by another process"), "{busy}");
        drop(export);
        filer.stop().await.unwrap();
        drop(filer);

        let mut other = options();
        other.nvram.size = ByteCount(16 << 20);
        let size = Filer::start(other).await.unwrap_err().to_string();
        assert!(size.contains("`nvram.size`") && size.contains("16777216"), "{size}");
        let mut away = options();
        away.hub = "192.0.2.1:7420".parse().unwrap();
        assert!(matches!(Filer::start(away).await, Err(StartError::NotLoopback(_))));
        let mut none = options();
        none.volumes.clear();
        assert!(matches!(Filer::start(none).await, Err(StartError::Volumes { met: 0, .. })));

        let filer = Filer::start(options()).await.unwrap();
        filer.served().await;
        let wanted = hub.lock().images[&VOL0].clone();
        assert_eq!(read_all(&open(&filer, "vol0").await).await, wanted);
        filer.stop().await.unwrap();
        drop(filer);
        std::fs::remove_file(directory.path().join("state/nvram")).unwrap();
        let lost = Filer::start(options()).await.unwrap_err().to_string();
        assert!(lost.contains("accept-lost-nvram"), "{lost}");
    });
}
