//! A source that the hub serves itself, beside one that is mirrored.

use super::failover::{NOW, fail_over};
use super::*;
use crate::filer::keeper::{Keeper, Kept};
use crate::hub::extension::{Extension, State};
use crate::hub::failover::Ask;
use crate::hub::images::Images;
use crate::hub::promoted::{Engine, HubKeeper, PromotedError};
use crate::nbd::export::{Export, Exports, OpenError, Segment};
use crate::units::ids::HubId;
use crate::units::names::SourceName;
use crate::units::numbers::TransferId;

/// Writes the state into the row, as a failover does: under a new epoch.
fn set_state(hub: &Hub, source: &Fake, state: State) {
    let catalog = hub.shared().pool.catalog();
    let row = catalog.source(source.id).unwrap().unwrap();
    let extension = Extension { state, ..Extension::of(&row).unwrap() };
    catalog
        .update_source(source.id, move |row| {
            row.epoch.number += 1;
            row.extension = extension.encode();
        })
        .unwrap();
}

fn name(source: &Fake) -> SourceName {
    source.name.parse().unwrap()
}

pub(super) async fn open(hub: &Hub, volume: &str) -> Result<Arc<dyn Export>, OpenError> {
    Images::new(hub.shared().clone()).open(volume).await
}

async fn refused(hub: &Hub, volume: &str) -> String {
    open(hub, volume).await.err().expect("it is refused").to_string()
}

pub(super) async fn read_all(export: &Arc<dyn Export>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in export.read(0, u32::try_from(fake::VOLUME_BYTES).unwrap()).await.unwrap() {
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(&data),
            Segment::Hole(count) => bytes.resize(bytes.len() + usize::try_from(count).unwrap(), 0),
        }
    }
    bytes
}

/// What kill -9 leaves of an end that is at rest.
pub(super) fn copy_of(dir: &Path) -> tempfile::TempDir {
    let killed = tempfile::tempdir().unwrap();
    copy(dir, killed.path());
    killed
}

pub(super) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A hub with `a` promoted after one CP and `b` in session.
async fn promoted_hub(dir: &Path) -> (Hub, Fake, Fake) {
    promoted_by(options(dir, &["a", "b"])).await
}

/// The same by these options.
pub(super) async fn promoted_by(options: HubOptions) -> (Hub, Fake, Fake) {
    let hub = Hub::start(options).await.unwrap();
    let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
    a.welcomed(hub.address()).await;
    b.welcomed(hub.address()).await;
    let first = a.put(0, 1).await;
    a.acked().await;
    assert!(matches!(a.checkpoint(&[(0, first)]).await, Message::CpDone(_)));
    a.half_close().await;
    set_state(&hub, &a, State::Promoted);
    hub.shared().promoted.start(a.id).await.unwrap();
    (hub, a, b)
}

/// A failover ends while the hub stops: nothing is started that nobody stops any more.
#[test]
fn nothing_starts_behind_a_stop() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, a, _b) = promoted_hub(dir.path()).await;
        let promoted = &hub.shared().promoted;
        promoted.start(a.id).await.unwrap();
        promoted.stop_all().await;
        let late = promoted.start(a.id).await.unwrap_err();
        assert!(matches!(late, PromotedError::Stopping), "{late}");
        assert!(promoted.engine(&name(&a)).is_none());
        hub.stop().await;
    });
}

/// Read-write through the engine, with CPs, status, LIST and verify; the reader of before stays on
/// his pin, and the other source's session goes on.
#[test]
fn a_promoted_source_is_served_read_write() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, mut b) = hub_of_two(dir.path()).await;
        let first = a.put(0, 1).await;
        a.acked().await;
        assert!(matches!(a.checkpoint(&[(0, first)]).await, Message::CpDone(_)));
        let before = open(&hub, "a/vol0").await.unwrap();
        assert!(before.info().read_only && !before.info().multi_conn);
        a.half_close().await;

        // Not before its row says so, and not while it fails over.
        let early = hub.shared().promoted.start(a.id).await.unwrap_err();
        assert!(matches!(early, PromotedError::NotPromoted { state: "mirror", .. }), "{early}");
        set_state(&hub, &a, State::FailingOver);
        let why = refused(&hub, "a/vol0").await;
        assert!(why.contains("fails over"), "{why}");
        set_state(&hub, &a, State::Promoted);
        hub.shared().promoted.start(a.id).await.unwrap();

        let export = open(&hub, "a/vol0").await.unwrap();
        assert!(!export.info().read_only && export.info().multi_conn);
        export.write(4000, Bytes::from(vec![9; 10_000]), false).await.unwrap();
        let old = std::mem::take(&mut a.image);
        a.image.clone_from(&old);
        a.image[4000..14_000].fill(9);
        assert_eq!(read_all(&export).await, a.image);
        assert_eq!(read_all(&before).await, old, "a pinned reader sees his CP");
        let second = hub.shared().promoted.start(a.id).await.unwrap();
        assert_eq!(second.status().own_durable, second.status().order.sequence, "the same engine");

        let (cp, roots) = hub.checkpoint(&name(&a)).await.unwrap();
        assert!(cp > CpNumber(1) && roots[0].root == a.root());
        let row = hub.shared().pool.catalog().source(a.id).unwrap().unwrap();
        let extension = Extension::of(&row).unwrap();
        assert_eq!((row.applied, extension.state), (cp, State::Promoted));
        assert!(extension.nvram_made && extension.transfer.generation == row.generation.number);
        let snapshot = hub.snapshots().into_iter().find(|s| s.name == name(&a)).unwrap();
        assert_eq!((snapshot.state, snapshot.applied_cp), (SourceState::FailedOver, cp));
        assert_eq!(snapshot.roots[0].root, a.root());
        let listed = Images::new(hub.shared().clone()).list();
        let described: Vec<_> = listed.iter().map(|l| (&*l.name, &*l.description)).collect();
        assert_eq!(described[0].0, "a/vol0");
        assert!(!described[0].1.contains("read-only") && described[1].1.contains("read-only"));
        let verified = hub.verify(&name(&a), |_, _, _| {}).await.unwrap();
        assert_eq!((verified.cp, verified.here[0].root), (cp, Some(a.root())));
        assert!(verified.problems.is_empty() && verified.there.volumes.is_empty());
        assert!(verified.there.problems[0].contains("no other end"));

        // The other one is in the session it was in.
        let id = b.put(1, 4).await;
        b.acked().await;
        assert!(matches!(b.checkpoint(&[(1, id)]).await, Message::CpDone(_)));
        assert_eq!(image_root(&hub, &b), b.root());
        assert!(open(&hub, "b/vol0").await.unwrap().info().read_only);
        assert_eq!(hub.shared().counters.connections.load(std::sync::atomic::Ordering::Relaxed), 2);
        drop(before);
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        hub.stop().await;
        assert!(export.write(0, Bytes::from_static(b"late"), false).await.is_err());
    });
}

/// What was acknowledged and is in no CP is served again by a hub that was killed; without the
/// NVRAM the source is refused by name, the hub and the other source go on.
#[test]
fn a_killed_hub_serves_the_acknowledged_writes_again() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, _b) = promoted_hub(dir.path()).await;
        let export = open(&hub, "a/vol0").await.unwrap();
        export.write(8192, Bytes::from(vec![7; 5000]), true).await.unwrap();
        a.image[8192..13_192].fill(7);
        let applied = hub.shared().pool.catalog().source(a.id).unwrap().unwrap().applied;
        assert_eq!(applied, CpNumber(1), "it is in the NVRAM only");
        let (killed, robbed) = (copy_of(dir.path()), copy_of(dir.path()));
        let nvram = hub.shared().promoted.nvram_path(a.id);
        let nvram = nvram.strip_prefix(dir.path()).unwrap().to_owned();
        drop(export);
        hub.stop().await;

        let hub = Hub::start(options(killed.path(), &["a", "b"])).await.unwrap();
        let export = open(&hub, "a/vol0").await.unwrap();
        assert_eq!(read_all(&export).await, a.image);
        let (_, roots) = hub.checkpoint(&name(&a)).await.unwrap();
        assert_eq!(roots[0].root, a.root());
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        hub.stop().await;

        std::fs::remove_file(robbed.path().join(&nvram)).unwrap();
        let hub = Hub::start(options(robbed.path(), &["a", "b"])).await.unwrap();
        let why = refused(&hub, "a/vol0").await;
        assert!(why.contains("source a") && why.contains(nvram.to_str().unwrap()), "{why}");
        assert!(!robbed.path().join(&nvram).try_exists().unwrap(), "it is not made anew");
        assert!(matches!(hub.shared().promoted.engine(&name(&a)), Some(Engine::Failed(_))));
        assert_eq!(hub.snapshots()[0].state, SourceState::Faulted);
        assert!(hub.checkpoint(&name(&a)).await.unwrap_err().contains("is gone"));
        assert!(hub.snapshots()[0].next_step.contains("--accept-lost-nvram"));
        let mut b = Fake::new("b");
        b.generation.number = 2;
        b.welcomed(hub.address()).await;
        b.put(0, 1).await;
        b.acked().await;
        hub.stop().await;
    });
}

/// The NVRAM of a promoted source is gone or damaged, and its filer never comes: what is published is
/// served again by who accepts that, and only by him; what was in a damaged one stays beside.
#[test]
fn a_lost_nvram_can_be_given_up() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, a, _b) = promoted_hub(dir.path()).await;
        let export = open(&hub, "a/vol0").await.unwrap();
        let copies = [copy_of(dir.path()), copy_of(dir.path())];
        export.write(8192, Bytes::from(vec![7; 5000]), true).await.unwrap();
        let nvram = hub.shared().promoted.nvram_path(a.id);
        let nvram = nvram.strip_prefix(dir.path()).unwrap().to_owned();
        drop(export);
        hub.stop().await;
        let accept = Ask { accept_lost_nvram: true, ..NOW };
        for (damaged, copy) in copies.iter().enumerate() {
            let (path, damaged) = (copy.path().join(&nvram), damaged == 1);
            if damaged {
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[..8192].fill(0xa5);
                std::fs::write(&path, bytes).unwrap();
            } else {
                std::fs::remove_file(&path).unwrap();
            }
            let hub = Hub::start(options(copy.path(), &["a", "b"])).await.unwrap();
            refused(&hub, "a/vol0").await;
            for ask in [NOW, Ask { dry_run: true, ..NOW }] {
                let no = fail_over(&hub, &a, ask).await.unwrap_err();
                assert!(no.next_step.contains("--accept-lost-nvram"), "{no:?}");
                assert!(no.reason.contains("behind CP 1"), "{no:?}");
            }
            let dry = fail_over(&hub, &a, Ask { dry_run: true, ..accept }).await.unwrap();
            assert!(dry.may_be_lost(), "{dry:?}");
            refused(&hub, "a/vol0").await;
            let report = fail_over(&hub, &a, accept).await.unwrap();
            assert_eq!((report.outcome.word(), report.cp), ("nvram-given-up", CpNumber(1)));
            let shown = hub.snapshots()[0].clone();
            assert!(shown.reason.contains("are given up"), "{}", shown.reason);
            let aside = copy.path().join(format!("{}.lost-1", nvram.display()));
            assert_eq!(aside.try_exists().unwrap(), damaged);
            let export = open(&hub, "a/vol0").await.unwrap();
            assert_eq!(read_all(&export).await, a.image, "the published image");
            export.write(0, Bytes::from(vec![9; 5000]), true).await.unwrap();
            drop(export);
            let again = fail_over(&hub, &a, accept).await.unwrap_err();
            assert!(again.reason.contains("failed over already"), "{again:?}");
            hub.stop().await;
            drop(hub);
            let hub = start_again(options(copy.path(), &["a", "b"])).await;
            let mut image = a.image.clone();
            image[..5000].fill(9);
            assert_eq!(read_all(&open(&hub, "a/vol0").await.unwrap()).await, image);
            let report = check(&hub.shared().pool, Depth::Data).unwrap();
            assert!(report.is_clean(), "{:?}", report.findings);
            let b = fail_over(&hub, &Fake::new("b"), accept).await.unwrap_err();
            assert!(b.next_step.contains("leave"), "{b:?}");
            hub.stop().await;
        }
    });
}

/// A source that is not the hub's any more is not written by an engine that still runs.
#[test]
fn an_engine_publishes_only_while_the_row_says_promoted() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, a, _b) = promoted_hub(dir.path()).await;
        let export = open(&hub, "a/vol0").await.unwrap();
        export.write(0, Bytes::from(vec![7; 5000]), false).await.unwrap();
        set_state(&hub, &a, State::HandedOver);
        let failed = hub.checkpoint(&name(&a)).await.unwrap_err();
        assert!(failed.contains("handed-over"), "{failed}");
        let row = hub.shared().pool.catalog().source(a.id).unwrap().unwrap();
        assert_eq!(row.applied, CpNumber(1));
        assert!(hub.shared().promoted.stop(&name(&a)).await.is_err());
        assert!(open(&hub, "a/vol0").await.unwrap().info().read_only);
        hub.stop().await;
    });
}

/// A first start that a crash cut short behind the ring is taken up; an NVRAM that is left over
/// from an earlier promotion is refused, and goes with `retire`, which does not touch one in use.
#[test]
fn a_half_made_nvram_is_used_and_a_stale_one_is_not() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, a, _b) = promoted_hub(dir.path()).await;
        let promoted = &hub.shared().promoted;
        let set_made = |made| {
            let catalog = hub.shared().pool.catalog();
            let row = catalog.source(a.id).unwrap().unwrap();
            let extension = Extension { nvram_made: made, ..Extension::of(&row).unwrap() };
            catalog.update_source(a.id, move |row| row.extension = extension.encode()).unwrap();
        };
        promoted.stop(&name(&a)).await.unwrap();
        set_made(false);
        promoted.start(a.id).await.unwrap();
        assert!(promoted.retire(a.id).unwrap_err().to_string().contains("promoted"));

        let export = open(&hub, "a/vol0").await.unwrap();
        export.write(0, Bytes::from(vec![7; 5000]), false).await.unwrap();
        let nvram = promoted.nvram_path(a.id);
        let old = std::fs::read(&nvram).unwrap();
        drop(export);
        promoted.stop(&name(&a)).await.unwrap();
        // As it was before the last CP: of a line that the image has left behind.
        std::fs::write(&nvram, &old).unwrap();
        set_made(false);
        let stale = promoted.start(a.id).await.unwrap_err().to_string();
        assert!(stale.contains("do not belong together"), "{stale}");

        set_state(&hub, &a, State::Mirror);
        set_made(false);
        assert!(promoted.retire(a.id).is_err(), "it is still listed as one that failed");
        assert!(promoted.stop(&name(&a)).await.is_err());
        promoted.retire(a.id).unwrap();
        assert!(!nvram.try_exists().unwrap());
        promoted.retire(a.id).unwrap();
        set_state(&hub, &a, State::Promoted);
        promoted.start(a.id).await.unwrap();
        assert!(nvram.try_exists().unwrap());
        hub.stop().await;
    });
}

/// Stopped and started again in one process, as when a failback is given up.
#[test]
fn an_engine_stops_with_a_cp_and_starts_again() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, _b) = promoted_hub(dir.path()).await;
        let export = open(&hub, "a/vol0").await.unwrap();
        export.write(0, Bytes::from(vec![7; 5000]), false).await.unwrap();
        a.image[..5000].fill(7);
        hub.shared().promoted.stop(&name(&a)).await.unwrap();
        assert!(export.ended().unwrap().is_cancelled());
        let row = hub.shared().pool.catalog().source(a.id).unwrap().unwrap();
        assert_eq!(row.applied, CpNumber(2));
        let why = refused(&hub, "a/vol0").await;
        assert!(why.contains("being started"), "{why}");
        drop(export);
        hub.shared().promoted.start(a.id).await.unwrap();
        assert_eq!(read_all(&open(&hub, "a/vol0").await.unwrap()).await, a.image);
        hub.stop().await;
    });
}

#[test]
fn the_hubs_keeper_changes_the_place_and_nothing_else() {
    let keeper = HubKeeper::new(HubId([4; 16]));
    let mut row = crate::pool::rows::SourceRow::new(Fake::new("a").id, "a".parse().unwrap());
    let fence = crate::record::marks::Place {
        transfer: TransferId { generation: 3, counter: 9 },
        sequence: crate::units::numbers::SequenceNumber(7),
        hash: crate::units::hash::StreamHash([2; 16]),
    };
    let before = Extension { state: State::Promoted, fence, ..Extension::default() };
    row.extension = before.encode();
    assert_eq!(keeper.read(&row).unwrap().hub, Some(HubId([4; 16])));
    let transfer = TransferId { generation: 4, counter: 5 };
    let kept = Kept { nvram_made: true, transfer, ..Kept::default() };
    row.extension = keeper.write(&row, &kept).unwrap();
    let after = Extension::of(&row).unwrap();
    assert_eq!(after, Extension { transfer, nvram_made: true, ..before });
    for state in [State::Mirror, State::FailingOver, State::HandedOver] {
        row.extension = Extension { state, ..after.clone() }.encode();
        assert!(keeper.write(&row, &kept).unwrap_err().0.contains(state.word()));
    }
}
