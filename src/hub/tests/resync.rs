//! The image is brought up by comparison: real ends, and sources that lie.

use super::failback::{all, at_filer, at_hub, filer_options, go_on, name, put, served};
use super::*;
use crate::device::file::{Access, FileDevice};
use crate::filer::Filer;
use crate::filer::status::SourceState as End;
use crate::hub::extension::Extension;
use crate::pool::pointer::TreeRoot;
use crate::pool::publish::Publish;
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::write_set::Budget;
use crate::pool::{Pool, PoolOptions};
use crate::units::BLOCK_BYTES;
use crate::units::hash::StreamHash;
use crate::units::numbers::{SequenceNumber, TransferId, VolumeNumber};
use crate::volume::writer::{Content, TreeWriter};
use crate::wire::message::{Compare, PullVolume, VolumeRoot};
use crate::wire::pull::{AnswerEncoder, Pulled};

const BLOCKS: usize = 1024;

/// Every block of its own content.
fn filled(seed: usize) -> Vec<u8> {
    let block = |at: usize| {
        let [low, high, ..] = (at * 31 + seed).to_ne_bytes();
        [low, high, 7, 1].repeat(BLOCK_BYTES / 4)
    };
    (0..BLOCKS).flat_map(block).collect()
}

fn publish(pool: &Arc<Pool>, row: &SourceRow, volume: &VolumeRow, cp: CpNumber, image: &[u8]) {
    let mut write_set = pool.begin(Budget::Ordinary);
    let mut writer = TreeWriter::new(pool, &mut write_set, volume.key, volume.tree, cp).unwrap();
    for (at, block) in (0..).zip(image.as_chunks::<BLOCK_BYTES>().0) {
        writer.put(Vbn(at), Content::Data(block)).unwrap();
    }
    let tree = writer.finish().unwrap();
    let publish = Publish {
        write_set,
        source: row.id,
        cp,
        sequence: row.sequence,
        stream_hash: row.stream_hash,
        epoch: row.epoch,
        generation: None,
        extension: Some(row.extension.clone()),
        volumes: vec![(volume.key.volume, tree)],
    };
    pool.publish(publish).unwrap();
}

/// Gives the image at rest another content, as if births of before told nothing: CP and place are
/// those it had.
fn rewrite(dir: &Path, image: &[u8]) {
    let device = FileDevice::open(&options(dir, &[]).pool.devices[0].0, Access::Cached).unwrap();
    let pool = Pool::open(Arc::new(device), PoolOptions::default()).unwrap();
    let row = pool.catalog().sources().unwrap().remove(0);
    let volume = pool.catalog().volumes(row.id).unwrap().remove(0);
    publish(&pool, &row, &volume, row.applied.next(), &vec![0; image.len()]);
    pool.catalog().remove_volume(volume.key).unwrap();
    pool.catalog().remove_source(row.id).unwrap();
    let (sequence, stream_hash) = (SequenceNumber(0), StreamHash::ZERO);
    let extension = Extension::of(&row).unwrap();
    let empty = Extension { transfer: TransferId::NONE, ..extension }.encode();
    let applied = CpNumber(0);
    let new = SourceRow { applied, sequence, stream_hash, extension: empty, ..row.clone() };
    pool.catalog().put_source(new).unwrap();
    let volume = VolumeRow { tree: TreeRoot::empty(volume.tree.size), ..volume };
    pool.catalog().put_volume(volume.clone()).unwrap();
    publish(&pool, &row, &volume, row.applied, image);
}

fn ladder(hub: &Hub) -> (u64, u64) {
    let lane = hub.shared().lanes.get(&name()).unwrap();
    let read =
        |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    (read(&lane.ladder.pass_bytes), read(&lane.ladder.rejected))
}

/// Whether the ends are in step, and nothing is done alone any more.
pub(super) fn is_in_sync(filer: &Filer) -> bool {
    let status = filer.status();
    status.state == End::InSync && status.alone.is_none()
}

async fn in_sync(filer: &Filer) {
    until("it is in sync", || is_in_sync(filer)).await;
}

/// Births say that nothing was written since, and the content differs all the same: a tenth of the
/// blocks, that many are sent and their nodes' hashes; the image is right afterwards.
#[test]
fn what_births_do_not_tell_is_found_by_comparison() {
    in_system(async {
        let (dir, filer_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let own = |hub: &Hub| filer_options(filer_dir.path(), hub.address(), go_on());
        let filer = Filer::start(own(&hub)).await.unwrap();
        served(&filer).await;
        let mut image = vec![0; BLOCKS * BLOCK_BYTES];
        for (at, part) in filled(1).chunks(256 << 10).enumerate() {
            put(&at_filer(&filer).await, &mut image, at * (256 << 10), part).await;
        }
        filer.checkpoint().await.unwrap();
        filer.stop().await.unwrap();
        hub.stop().await;
        drop((filer, hub));
        let mut other = image.clone();
        for at in (3..BLOCKS).step_by(10) {
            other[at * BLOCK_BYTES..][..BLOCK_BYTES].fill(0xee);
        }
        // Holes on either side as well.
        other[500 * BLOCK_BYTES..501 * BLOCK_BYTES].fill(0);
        rewrite(dir.path(), &other);

        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        assert!(all(&at_hub(&hub).await).await == other, "the image is the other one");
        let filer = Filer::start(own(&hub)).await.unwrap();
        in_sync(&filer).await;
        assert!(all(&at_hub(&hub).await).await == image, "the image was not repaired");
        let (bytes, rejected) = ladder(&hub);
        let differ = 104 * 4096;
        println!("{bytes} bytes for {differ} that differ");
        assert!(bytes >= differ && bytes < differ * 11 / 10, "{bytes} bytes");
        assert_eq!(rejected, 0, "R19: never normal");
        // And goes on as ever.
        put(&at_filer(&filer).await, &mut image, 5000, &[9; 70_000]).await;
        filer.checkpoint().await.unwrap();
        assert!(all(&at_hub(&hub).await).await == image);
        assert_eq!(ladder(&hub).1, 0);
        assert!(check(&hub.shared().pool, Depth::Data).unwrap().is_clean());
        filer.stop().await.unwrap();
        hub.stop().await;
    });
}

/// A hub that goes in the middle of a pass and comes back has what came of it: the rest is sent, never
/// the whole again, and the image is the old one until then.
#[test]
fn a_pass_that_is_cut_goes_on_from_what_is_kept() {
    in_system(async {
        let (dir, filer_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let address = hub.address();
        let mut own = filer_options(filer_dir.path(), address, go_on());
        own.resync_limit = Some(ByteCount(2 << 20));
        let filer = Filer::start(own).await.unwrap();
        served(&filer).await;
        let mut image = vec![0; BLOCKS * BLOCK_BYTES];
        let export = at_filer(&filer).await;
        put(&export, &mut image, 0, &[5; 4096]).await;
        filer.checkpoint().await.unwrap();
        let old = image.clone();
        hub.stop().await;
        drop(hub);
        until("it goes on alone", || filer.status().alone.is_some()).await;
        for (at, part) in filled(2).chunks(256 << 10).enumerate() {
            put(&export, &mut image, at * (256 << 10), part).await;
        }
        // Made alone, so that its log does not join any more.
        let before = filer.status().own_cp;
        drop(filer.checkpoint().await);
        until("an own CP", || filer.status().own_cp > before).await;

        let mut bytes = Vec::new();
        let again = HubOptions { listen: address, ..options(dir.path(), &["a"]) };
        for cut in [1 << 20, 5 << 18, u64::MAX] {
            let hub = start_again(again.clone()).await;
            until("the pass gets on", || ladder(&hub).0 >= cut || is_in_sync(&filer)).await;
            if cut < u64::MAX {
                assert!(all(&at_hub(&hub).await).await == old, "the image is the old one");
                let shown = filer.status().pass.expect("it is shown");
                assert!(shown.bytes > 0 && shown.percent <= 100, "{shown:?}");
            } else {
                assert!(all(&at_hub(&hub).await).await == image);
                assert!(hub.shared().pool.catalog().work(lane_of(&hub)).unwrap().is_none());
                assert!(check(&hub.shared().pool, Depth::Data).unwrap().is_clean());
            }
            bytes.push(ladder(&hub).0);
            assert_eq!(ladder(&hub).1, 0);
            hub.stop().await;
        }
        let sum: u64 = bytes.iter().sum();
        let differ = u64::try_from(image.len()).unwrap();
        println!("{bytes:?} bytes in three connections, {differ} differ");
        assert!(sum < differ * 13 / 10, "{bytes:?}: it was sent again");
        assert!(bytes[2] < differ - (3 << 18), "{bytes:?}: it began anew");
        drop(filer.stop().await);
    });
}

fn lane_of(hub: &Hub) -> crate::units::ids::SourceId {
    hub.shared().lanes.get(&name()).unwrap().source()
}

fn offer(a: &Fake, root: Root) -> Compare {
    let size = ByteCount(u64::try_from(a.image.len()).unwrap());
    let volumes = vec![PullVolume { volume: VolumeNumber(0), size, root }];
    Compare {
        cp: a.cp,
        base: CpNumber(a.cp.0 - 1),
        place: a.last.into(),
        volumes,
        keeps_log: false,
    }
}

/// A source that says what it was not asked, or offers what it was not welcomed with.
#[test]
fn a_comparison_believes_nothing() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let first = a.put(0, 1).await;
        a.acked().await;
        assert!(matches!(a.checkpoint(&[(0, first)]).await, Message::CpDone(_)));
        let root = image_root(&hub, &a);

        // Children that are not those of the root that was announced: refused, nothing is changed.
        let lie = offer(&a, Root([9; 32]));
        a.send(&Message::Compare(lie.clone()), Bytes::new()).await;
        let Some(Message::WantNodes(want)) = a.other().await else { panic!("it does not ask") };
        let pulled = Pulled { cp: want.cp, volume: want.volume, number: want.number };
        let mut answer = AnswerEncoder::default();
        answer.node(&[crate::units::hash::ContentHash([3; 16]); 128]);
        a.send(&Message::Nodes(pulled), answer.finish().into()).await;
        let answer = a.other().await;
        assert!(matches!(&answer, Some(Message::CpRejected(no)) if no.reason.contains("root")));
        assert_eq!(image_root(&hub, &a), root);
        // One that comes late is passed over.
        a.send(&Message::Nodes(pulled), Bytes::from_static(&[3])).await;

        let closed = async |a: &mut Fake, what: &str| {
            let last = a.other().await;
            let said =
                matches!(&last, Some(Message::Refused(no)) if no.code == RefusedCode::Protocol);
            assert!(said, "{what}: {last:?}");
            a.generation.number += 1;
            a.welcomed(hub.address()).await;
        };
        let honest = offer(&a, a.root());
        for (what, bad) in [
            ("another base", Compare { base: CpNumber(7), ..honest.clone() }),
            ("no volume", Compare { volumes: vec![], ..honest.clone() }),
            ("a volume twice", Compare { volumes: honest.volumes.repeat(2), ..honest.clone() }),
            ("a CP number without end", Compare { cp: CpNumber(u32::MAX), ..honest.clone() }),
        ] {
            a.send(&Message::Compare(bad), Bytes::new()).await;
            closed(&mut a, what).await;
        }
        // Two answers to one question, and an answer to none.
        a.send(&Message::Compare(lie.clone()), Bytes::new()).await;
        assert!(matches!(a.other().await, Some(Message::WantNodes(_))));
        let frame = Bytes::from(vec![0; 1 << 20]);
        a.send(&Message::Nodes(pulled), frame).await;
        closed(&mut a, "longer than any answer").await;
        a.send(&Message::Nodes(Pulled { cp: CpNumber(99), ..pulled }), Bytes::from_static(&[3]))
            .await;
        closed(&mut a, "not asked").await;
        assert_eq!(image_root(&hub, &a), root, "the image is as it was");
        let differs = VolumeRoot { volume: VolumeNumber(0), root };
        assert_eq!(hub.shared().known(&a.name.parse().unwrap()).unwrap().roots, [differs]);
        hub.stop().await;
    });
}
