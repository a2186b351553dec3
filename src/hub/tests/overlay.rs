//! Clients are served over a log that is not applied yet: reads, writes, each cut, damage.

use std::path::Path;
use std::sync::Mutex;

use tokio::runtime::Handle;

use super::failover::{NOW, damage, damage_ring, fail_over, name, row, state, with_a_tail};
use super::promoted::{copy_of, open, read_all};
use super::*;
use crate::hub::extension::{Extension, State};
use crate::hub::failover::{Ask, Outcome, Refusal, Report, Step, run};
use crate::nbd::export::Export;
use crate::units::convert::to_u64;

/// What a failover was stopped at, and what came of it.
struct Stopped {
    report: Result<Report, Refusal>,
    /// A copy of everything as it was there: what kill -9 leaves.
    killed: Option<tempfile::TempDir>,
}

/// Fails over; at each step `at` is told, and says whether the process is killed there.
async fn stop_at(
    hub: &Hub,
    a: &Fake,
    ask: Ask,
    dir: &Path,
    at: impl Fn(&Step) -> bool + Send + 'static,
) -> Stopped {
    let (shared, name, dir) = (hub.shared().clone(), name(a), dir.to_owned());
    let failing = move || {
        let killed = Mutex::new(None);
        let reached = |step: &Step| {
            let kill = at(step);
            if kill {
                *killed.lock().unwrap() = Some(copy_of(&dir));
            }
            !kill
        };
        let report = run(&shared, &name, ask, &reached, &|_| ());
        Stopped { report, killed: killed.into_inner().unwrap() }
    };
    tokio::task::spawn_blocking(failing).await.unwrap()
}

/// A client of a source that is served: what it writes is in the model as well.
async fn write(export: &Arc<dyn Export>, image: &mut [u8], at: usize, fill: u8, length: usize) {
    export.write(to_u64(at), Bytes::from(vec![fill; length]), false).await.unwrap();
    image[at..at + length].fill(fill);
}

async fn served(hub: &Hub) -> Arc<dyn Export> {
    for _ in 0..10_000 {
        if let Ok(export) = open(hub, "a/vol0").await
            && !export.info().read_only
        {
            return export;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("the volume is not served");
}

/// What the hub shows in the end, whatever was in its way.
async fn assert_ends_with(hub: &Hub, a: &Fake, image: &[u8]) {
    until("the log is applied", || state(hub, a) == State::Promoted).await;
    let export = served(hub).await;
    assert_eq!(read_all(&export).await, image, "behind the replay");
    let (cp, roots) = hub.checkpoint(&name(a)).await.unwrap();
    assert!(cp >= row(hub, a).applied);
    let mut model = Fake::new("model");
    model.image = image.to_vec();
    assert_eq!(roots[0].root, model.root());
    until("the log is gone", || log_files(Path::new(&hub_dir(hub)), a).is_empty()).await;
    let report = check(&hub.shared().pool, Depth::Data).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

fn hub_dir(hub: &Hub) -> PathBuf {
    let nvram = hub.shared().promoted.nvram_path(crate::units::ids::SourceId([0; 16]));
    nvram.parent().unwrap().parent().unwrap().to_owned()
}

/// Reads, extents and writes before anything is applied are those of the log's last write; a reader
/// of before stays on his CP; no CP is made; and nobody notices when the log is in the tree.
#[test]
fn clients_are_served_before_the_log_is_applied() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let mut a = with_a_tail(&hub).await;
        let before = open(&hub, "a/vol0").await.unwrap();
        let old = read_all(&before).await;
        assert_ne!(old, a.image, "the image lacks the tail: else the test shows nothing");
        let model = Arc::new(Mutex::new(a.image.clone()));
        let (seen, handle) = (model.clone(), Handle::current());
        let (copy, wanted) = (before.clone(), old.clone());
        let hub = Arc::new(hub);
        let during = hub.clone();
        let at = move |step: &Step| {
            if *step == Step::Serving {
                handle.block_on(async {
                    let export = served(&during).await;
                    let mut image = seen.lock().unwrap().clone();
                    assert_eq!(read_all(&export).await, image, "before anything is applied");
                    assert_eq!(read_all(&copy).await, wanted, "a pinned reader sees his CP");
                    let extents = export.extents(0, 1 << 20, 100).await.unwrap();
                    for (extent, start) in extents.iter().zip(starts(&extents)) {
                        let part = &image[start..start + usize::try_from(extent.length).unwrap()];
                        assert!(!extent.hole || part.iter().all(|byte| *byte == 0), "{extents:?}");
                    }
                    assert!(extents.iter().any(|extent| extent.hole), "{extents:?}");
                    // Over entries of the log, beside them, and over its holes, in part and whole.
                    write(&export, &mut image, 5500, 0x61, 100).await;
                    write(&export, &mut image, 8000, 0x62, 9000).await;
                    write(&export, &mut image, 40_960, 0x63, 4096).await;
                    export.trim(12_288, 4096, false).await.unwrap();
                    image[12_288..16_384].fill(0);
                    export.flush().await.unwrap();
                    assert_eq!(read_all(&export).await, image);
                    let wanted = during.shared().promoted.engine(&"a".parse().unwrap());
                    let Some(crate::hub::promoted::Engine::Running(engine)) = wanted else {
                        panic!("it runs")
                    };
                    assert_eq!(engine.status().own_cp, CpNumber(1), "no CP stands on the log");
                    *seen.lock().unwrap() = image;
                });
            }
            false
        };
        let stopped = stop_at(&hub, &a, NOW, dir.path(), at).await;
        assert_eq!(stopped.report.unwrap().outcome, Outcome::Complete);
        a.image = model.lock().unwrap().clone();
        assert_eq!(read_all(&before).await, old);
        assert_ends_with(&hub, &a, &a.image).await;
        drop(before);
        hub.stop().await;
    });
}

fn starts(extents: &[crate::nbd::export::Extent]) -> Vec<usize> {
    let mut at = 0;
    let start = |extent: &crate::nbd::export::Extent| {
        let start = at;
        at += usize::try_from(extent.length).unwrap();
        start
    };
    extents.iter().map(start).collect()
}

/// Killed behind each step, with writes of clients: the next start serves everything that was
/// answered before it has applied anything, and ends with it.
#[test]
fn what_was_answered_over_the_log_survives_each_cut() {
    for step in [
        Step::Numbered,
        Step::Serving,
        Step::Replaying(2),
        Step::Replaying(4),
        Step::Replayed,
        Step::Promoted,
    ] {
        in_system(async {
            let dir = tempfile::tempdir().unwrap();
            let hub = Arc::new(start_again(options(dir.path(), &["a"])).await);
            let a = with_a_tail(&hub).await;
            let model = Arc::new(Mutex::new(a.image.clone()));
            let (seen, handle, during) = (model.clone(), Handle::current(), hub.clone());
            let at = move |met: &Step| {
                if *met == Step::Serving {
                    handle.block_on(async {
                        let export = served(&during).await;
                        let mut image = seen.lock().unwrap().clone();
                        write(&export, &mut image, 5500, 0x61, 100).await;
                        write(&export, &mut image, 8000, 0x62, 9000).await;
                        *seen.lock().unwrap() = image;
                    });
                }
                *met == step
            };
            let stopped = stop_at(&hub, &a, NOW, dir.path(), at).await;
            assert!(stopped.report.unwrap_err().reason.contains("stops"), "{step:?}");
            let killed = stopped.killed.expect("the step was reached");
            hub.stop().await;
            drop(hub);
            let image = model.lock().unwrap().clone();
            for at in [killed.path(), dir.path()] {
                let hub = start_again(options(at, &["a"])).await;
                assert_eq!(read_all(&served(&hub).await).await, image, "{step:?}");
                assert_ends_with(&hub, &a, &image).await;
                hub.stop().await;
            }
        });
    }
}

/// Damage that shows when clients are served: the block is an error, everything else is read, the
/// log is not applied; with the flag the image ends at the gap, under what clients wrote since.
#[test]
fn damage_beneath_clients_is_named_and_can_be_given_up() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Arc::new(start_again(options(dir.path(), &["a"])).await);
        let mut a = with_a_tail(&hub).await;
        let (last, image) = (a.last, a.image.clone());
        a.put(20, 0x77).await;
        a.put(21, 0x55).await;
        a.acked().await;
        let lane = hub.shared().lanes.get(&name(&a)).unwrap();
        until("it is drained", || lane.cursors().drained == a.last).await;
        let (handle, during, path) = (Handle::current(), hub.clone(), dir.path().to_owned());
        let source = a.twin();
        let at = move |step: &Step| {
            if *step == Step::Serving {
                damage(&path, &source, 0x77);
                handle.block_on(async {
                    let export = served(&during).await;
                    let refused = export.read(20 * 4096, 4096).await.unwrap_err().to_string();
                    assert!(refused.contains("damaged at offset"), "{refused}");
                    let read = export.read(21 * 4096, 4096).await.unwrap();
                    assert_eq!(read.len(), 1, "what is sound beside it is read");
                    export.write(30 * 4096, Bytes::from(vec![0x66; 4096]), false).await.unwrap();
                });
            }
            false
        };
        let refused = stop_at(&hub, &a, NOW, dir.path(), at).await.report.unwrap_err();
        assert!(refused.next_step.contains("--accept-gap"), "{refused}");
        assert_eq!(state(&hub, &a), State::FailingOver);
        let shown = hub.snapshots()[0].clone();
        assert!(shown.reason.contains("served over the log"), "{}", shown.reason);
        let export = served(&hub).await;
        let read = export.read(30 * 4096, 4096).await.unwrap();
        assert_eq!(read.len(), 1, "clients go on");
        let ended = export.ended().unwrap();
        // As its connection does when it is ended; the NVRAM is its engine's until then.
        let gone = ended.clone();
        drop(actix::spawn(async move {
            gone.cancelled().await;
            drop(export);
        }));

        let accepting = Ask { accept_gap: true, ..NOW };
        let report = fail_over(&hub, &a, accepting).await.unwrap();
        assert!(matches!(&report.outcome, Outcome::UpToGap(gap) if gap.reaches == last));
        assert!(report.may_be_lost() && report.last == last, "{report:?}");
        assert!(ended.is_cancelled(), "who has read behind the gap is cut off");
        let mut image = image;
        image[30 * 4096..31 * 4096].fill(0x66);
        assert_ends_with(&hub, &a, &image).await;
        hub.stop().await;
    });
}

/// A log that would take more memory than there is for it is applied first.
#[test]
fn a_log_of_too_many_entries_is_applied_first() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let a = with_a_tail(&hub).await;
        let room = hub.shared().overlays.clone();
        let all = room.left();
        assert!(room.take(all));
        let report = fail_over(&hub, &a, NOW).await.unwrap();
        assert!(!report.behind, "{report:?}");
        assert_ends_with(&hub, &a, &a.image).await;
        hub.stop().await;
        room.give(all);
        drop(hub);
        // Control: with room it is served before, and gives the room back.
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let a = with_a_tail(&hub).await;
        assert!(fail_over(&hub, &a, NOW).await.unwrap().behind);
        assert_ends_with(&hub, &a, &a.image).await;
        let room = hub.shared().overlays.clone();
        until("the room is free again", || room.left() == all).await;
        hub.stop().await;
    });
}

/// What was asked for counts behind a restart: over a gap that shows only then it goes by itself,
/// if it was told to; if not, it waits to be told.
#[test]
fn a_restart_goes_by_what_was_asked() {
    for accept_gap in [true, false] {
        in_system(async {
            let dir = tempfile::tempdir().unwrap();
            let hub = start_again(options(dir.path(), &["a"])).await;
            let mut a = with_a_tail(&hub).await;
            let image = a.image.clone();
            a.put(20, 0x77).await;
            a.acked().await;
            let ask = Ask { now: accept_gap, accept_gap, ..Ask::default() };
            let reached = |step: &Step| *step == Step::Drained;
            let stopped = stop_at(&hub, &a, ask, dir.path(), reached).await;
            assert!(stopped.report.is_err());
            hub.stop().await;
            drop(hub);
            damage(dir.path(), &a, 0x77);
            damage_ring(dir.path());
            let hub = start_again(options(dir.path(), &["a"])).await;
            let asked = Extension::of(&row(&hub, &a)).unwrap().asked;
            assert_eq!((asked.now, asked.accept_gap), (accept_gap, accept_gap));
            if accept_gap {
                assert_ends_with(&hub, &a, &image).await;
            } else {
                let told = || hub.snapshots()[0].next_step.contains("--accept-gap");
                until("it waits to be told", told).await;
                assert_eq!(state(&hub, &a), State::FailingOver);
            }
            hub.stop().await;
        });
    }
}
