//! Failover of sources made by hand: each outcome, a crash behind each step, a late transfer.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::fake::Fake;
use super::{image_root, in_system, log_files, options, start_again, until};
use crate::hub::Hub;
use crate::hub::extension::{Extension, State};
use crate::hub::failover::{Alone, Ask, Outcome, Refusal, Report, Step, run};
use crate::hub::stager::Staged;
use crate::hub::status::SourceState;
use crate::pool::error::PoolError;
use crate::pool::publish::Publish;
use crate::pool::rows::SourceRow;
use crate::pool::write_set::Budget;
use crate::record::entry::EntryKind;
use crate::record::transfer::Transfer;
use crate::units::names::SourceName;
use crate::units::numbers::{CpNumber, Epoch, Generation};
use crate::units::policy::{OnHubLoss, Policy};
use crate::volume::check::{Depth, check};
use crate::wire::message::{Message, RefusedCode};

pub(super) const NOW: Ask =
    Ask { dry_run: false, now: true, accept_gap: false, accept_lost_nvram: false };

pub(super) fn name(source: &Fake) -> SourceName {
    source.name.parse().unwrap()
}

pub(super) fn row(hub: &Hub, source: &Fake) -> SourceRow {
    hub.shared().pool.catalog().source(source.id).unwrap().unwrap()
}

pub(super) fn state(hub: &Hub, source: &Fake) -> State {
    Extension::of(&row(hub, source)).unwrap().state
}

/// Fails over, and waits until the log is applied.
pub(super) async fn fail_over(hub: &Hub, source: &Fake, ask: Ask) -> Result<Report, Refusal> {
    let report = hub.failover(&name(source), ask, |_| {}).await;
    let over = || hub.shared().failovers.turn(&name(source)).is_ok();
    until("the failover has ended", over).await;
    report
}

/// Fails over as far as `last`, then the hub is as if it had been stopped there.
pub(super) async fn up_to(hub: &Hub, source: &Fake, last: Step) -> Result<Report, Refusal> {
    let (shared, name) = (hub.shared().clone(), name(source));
    tokio::task::spawn_blocking(move || run(&shared, &name, NOW, &|step| *step != last, &|_| ()))
        .await
        .unwrap()
}

/// A source whose image is CP 1, with entries of all kinds behind it that no CP holds.
pub(super) async fn with_a_tail(hub: &Hub) -> Fake {
    with_a_tail_of(hub, stops()).await
}

/// Nothing is acknowledged without the hub.
fn stops() -> Policy {
    Policy { on_hub_loss: OnHubLoss::Stop, ..Policy::default() }
}

async fn with_a_tail_of(hub: &Hub, policy: Policy) -> Fake {
    let mut a = Fake::new("a");
    a.policy = policy;
    a.welcomed(hub.address()).await;
    let id = a.put(0, 1).await;
    a.acked().await;
    assert!(matches!(a.checkpoint(&[(0, id)]).await, Message::CpDone(_)));
    for entries in [
        vec![(EntryKind::Write, 5000, vec![2; 3000]), (EntryKind::Write, 8192, vec![3; 8192])],
        vec![(EntryKind::Trim, 8192, vec![0; 4096]), (EntryKind::Zeroes, 10, vec![0; 100])],
    ] {
        let transfer = a.entries(&entries);
        a.send_transfer(&transfer).await;
    }
    a.acked().await;
    a
}

/// What a failover must have left, whatever was in its way.
async fn assert_promoted(hub: &Hub, a: &mut Fake, dir: &Path) {
    let row = row(hub, a);
    assert_eq!(state(hub, a), State::Promoted);
    assert_eq!((row.epoch.number, row.sequence), (2, a.last.sequence));
    assert_eq!(row.applied, a.cp.next(), "above the label of the open interval");
    let before = a.cp;
    a.cp = CpNumber(row.applied.0 + 1);
    assert_eq!(image_root(hub, a), a.root(), "the image ends with the last write");
    a.cp = before;
    until("the log is gone", || log_files(dir, a).is_empty()).await;
    until("it is shown", || hub.snapshots()[0].state == SourceState::FailedOver).await;
    let shown = &hub.snapshots()[0];
    assert!(shown.reason.contains("epoch 2"), "{}", shown.reason);
    assert!(shown.next_step.contains("failback"));
    let report = check(&hub.shared().pool, Depth::Data).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    // The old source is told whose the volumes are, in its old epoch and without one.
    for epoch in [Epoch { number: 1, id: a.generation.id }, Epoch::default()] {
        let hello = crate::wire::message::Hello { epoch, ..a.hello() };
        let fenced = a.connect_with(hub.address(), hello).await;
        assert!(matches!(fenced, Message::Fenced(f) if f.epoch == row.epoch), "{fenced:?}");
        match a.receive().await {
            Some(Message::Refused(refused)) => assert_eq!(refused.code, RefusedCode::Fenced),
            other => panic!("{other:?} instead of Refused"),
        }
        assert!(a.receive().await.is_none());
    }
}

#[test]
fn a_source_is_failed_over_up_to_its_last_write() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let mut a = with_a_tail(&hub).await;
        let dry = fail_over(&hub, &a, Ask { dry_run: true, ..NOW }).await.unwrap();
        assert_eq!((state(&hub, &a), row(&hub, &a).epoch.number), (State::Mirror, 1));
        a.put(7, 9).await;
        a.acked().await;
        let report = fail_over(&hub, &a, NOW).await.unwrap();
        assert_eq!((dry.replayed.entries, report.replayed.entries), (4, 5));
        assert_eq!((dry.outcome, dry.cp, dry.epoch.number), (Outcome::Complete, report.cp, 2));
        assert_eq!((report.outcome, report.last), (Outcome::Complete, a.last));
        assert!(matches!(report.alone, Alone::Nothing), "{:?}", report.alone);
        assert!(matches!(a.other().await, Some(Message::Fenced(f)) if f.epoch.number == 2));
        assert!(matches!(a.other().await, Some(Message::Refused(_))));
        assert!(a.other().await.is_none(), "its connection is closed");
        assert_promoted(&hub, &mut a, dir.path()).await;
        let again = fail_over(&hub, &a, NOW).await.unwrap_err();
        assert!(again.reason.contains("already"), "{again}");
        hub.stop().await;
        drop(hub);
        let hub = start_again(options(dir.path(), &["a"])).await;
        assert_promoted(&hub, &mut a, dir.path()).await;
        hub.stop().await;
    });
}

/// The hub ends behind each step: before the fence nothing has happened; from the fence on the next
/// start goes on by itself.
#[test]
fn a_crash_behind_any_step_is_gone_on_from() {
    for step in [
        Step::Checked,
        Step::Fenced,
        Step::Raised,
        Step::Told,
        Step::Drained,
        Step::Numbered,
        Step::Serving,
        Step::Replaying(2),
        Step::Replaying(4),
        Step::Replayed,
        Step::Promoted,
    ] {
        in_system(async {
            let dir = tempfile::tempdir().unwrap();
            let hub = start_again(options(dir.path(), &["a"])).await;
            let mut a = with_a_tail(&hub).await;
            let cut = up_to(&hub, &a, step).await.unwrap_err();
            assert!(cut.reason.contains("stops"), "{step:?}: {cut}");
            hub.stop().await;
            drop(hub);
            let hub = start_again(options(dir.path(), &["a"])).await;
            if step == Step::Checked {
                assert_eq!((state(&hub, &a), row(&hub, &a).epoch.number), (State::Mirror, 1));
                a.generation = Generation { number: 2, id: 12 };
                a.welcomed(hub.address()).await;
                fail_over(&hub, &a, NOW).await.unwrap();
            }
            until("the failover has ended", || state(&hub, &a) == State::Promoted).await;
            until("it is shown", || {
                let shown = &hub.snapshots()[0];
                shown.state == SourceState::FailedOver && shown.applied_cp > CpNumber(1)
            })
            .await;
            assert_promoted(&hub, &mut a, dir.path()).await;
            hub.stop().await;
        });
    }
}

/// Stages a transfer as an actor would that has not heard of the fence.
fn stage_late(hub: &Hub, transfer: &Transfer, epoch: Epoch) {
    let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
    hub.shared().stager.stage(Staged {
        lane,
        epoch,
        transfer: transfer.clone(),
        came: Instant::now(),
    });
}

/// Whether a transfer that is queued behind the fence becomes durable.
async fn late_is_stored(fenced: bool) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let hub = start_again(options(dir.path(), &["a"])).await;
    let mut a = with_a_tail(&hub).await;
    let (last, image) = (a.last, a.image.clone());
    up_to(&hub, &a, Step::Raised).await.unwrap_err();
    let lane = hub.shared().lanes.get(&name(&a)).unwrap();
    if !fenced {
        lane.without_fence();
    }
    let late = a.write(9, 9, 1);
    stage_late(&hub, &late, Epoch { number: 1, id: a.generation.id });
    let stored = lane.cursors().staged == a.last;
    if stored {
        until("it is durable", || lane.cursors().durable == a.last).await;
    }
    hub.stop().await;
    drop((hub, lane));
    // Recovery is the second wall: by its epoch the record is seen to be late.
    (a.last, a.image) = (last, image);
    let hub = start_again(options(dir.path(), &["a"])).await;
    until("the failover has ended", || state(&hub, &a) == State::Promoted).await;
    until("it is shown", || hub.snapshots()[0].applied_cp > CpNumber(1)).await;
    assert_promoted(&hub, &mut a, dir.path()).await;
    hub.stop().await;
    stored
}

#[test]
fn nothing_behind_the_fence_is_stored() {
    in_system(async {
        assert!(!late_is_stored(true).await);
        // Negative control: without the fence it is taken, and acknowledged as durable.
        assert!(late_is_stored(false).await);
    });
}

/// R2: a CP of the old epoch that was whole when the epoch was raised is not published late.
#[test]
fn a_cp_of_the_old_epoch_is_not_published() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let mut a = with_a_tail(&hub).await;
        let id = a.put(30, 4).await;
        a.acked().await;
        let bytes = a.updates(&[(30, id)]).await;
        let lane = hub.shared().lanes.get(&name(&a)).unwrap();
        until("the CP is being applied", || lane.job().is_some()).await;
        let old = row(&hub, &a).epoch;
        fail_over(&hub, &a, NOW).await.unwrap();
        assert!(lane.job().is_none(), "given up");
        let _closed = a.try_send(&a.end(bytes, a.root()), bytes::Bytes::new()).await;
        let (source, last) = (a.id, a.last);
        let publish = |epoch| {
            hub.shared().pool.publish(Publish {
                write_set: hub.shared().pool.begin(Budget::Ordinary),
                source,
                cp: CpNumber(99),
                sequence: last.sequence,
                stream_hash: last.hash,
                epoch,
                generation: None,
                extension: None,
                volumes: vec![],
            })
        };
        assert!(matches!(publish(old), Err(PoolError::Epoch { .. })));
        assert_promoted(&hub, &mut a, dir.path()).await;
        // Control: it is the epoch alone that stood in its way.
        assert!(publish(row(&hub, &a).epoch).is_ok());
        hub.stop().await;
    });
}

/// R6: what the source said of its own CPs counts also when the hub was restarted since.
#[test]
fn no_cp_number_is_used_twice() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let mut a = Fake::new("a");
        let hello = crate::wire::message::Hello { cp_max: CpNumber(50), ..a.hello() };
        let welcome = a.connect_with(hub.address(), hello).await;
        assert!(matches!(welcome, Message::Welcome(w) if w.cp_max == CpNumber(50)));
        a.cp = CpNumber(51);
        a.put(0, 1).await;
        a.acked().await;
        hub.stop().await;
        drop(hub);
        let hub = start_again(options(dir.path(), &["a"])).await;
        let report = fail_over(&hub, &a, NOW).await.unwrap();
        assert_eq!(report.cp, CpNumber(52), "above the open interval, and what is used");
        hub.stop().await;
    });
}

#[test]
fn an_image_that_holds_everything_needs_no_replay() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a", "b"])).await;
        let mut a = with_a_tail(&hub).await;
        assert!(matches!(a.checkpoint_by_replay().await, Message::CpDone(_)));
        let report = fail_over(&hub, &a, NOW).await.unwrap();
        assert_eq!((report.outcome.clone(), report.cp), (Outcome::NothingToReplay, CpNumber(2)));
        assert!(!report.may_be_lost(), "{:?}", report.sentences());
        assert_eq!((state(&hub, &a), row(&hub, &a).epoch.number), (State::Promoted, 2));
        assert_eq!(image_root(&hub, &a), a.root());
        let never = hub.failover(&"b".parse().unwrap(), NOW, |_| {}).await.unwrap_err();
        assert!(never.reason.contains("never here"), "{never}");
        hub.stop().await;
    });
}

/// The wait for a source that may still answer reads is from the last frame on.
#[test]
fn reads_of_a_cut_off_source_are_waited_out() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let hub_timeout = std::time::Duration::from_millis(400);
        let a = with_a_tail_of(&hub, Policy { hub_timeout, ..stops() }).await;
        let heard = hub.snapshots()[0].heard.unwrap();
        let ask = Ask { now: false, ..NOW };
        let report = hub.failover(&name(&a), ask, |_| {}).await.unwrap();
        assert!(heard.elapsed() >= hub_timeout && !report.stale_reads);
        hub.stop().await;
    });
}

/// Damages the last transfer in the source's log.
pub(super) fn damage(dir: &Path, a: &Fake, fill: u8) {
    let path = log_files(dir, a).pop().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(64).rposition(|window| window == [fill; 64]).unwrap();
    bytes[at] ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
}

/// A gap is refused before anything is done; accepted, the image ends there, and says so.
#[test]
fn a_gap_is_refused_first_and_can_be_accepted() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let mut a = with_a_tail(&hub).await;
        let (last, image) = (a.last, a.image.clone());
        a.put(20, 0x77).await;
        a.put(21, 0x55).await;
        a.acked().await;
        let lane = hub.shared().lanes.get(&name(&a)).unwrap();
        until("it is drained", || lane.cursors().drained == a.last).await;
        damage(dir.path(), &a, 0x77);
        for ask in [NOW, Ask { dry_run: true, ..NOW }] {
            let refused = fail_over(&hub, &a, ask).await.unwrap_err();
            let reaches = format!("reaches transfer {}", last.transfer);
            assert!(refused.reason.contains(&reaches), "{refused}");
            assert!(refused.next_step.contains("--accept-gap"), "{}", refused.next_step);
            assert_eq!((state(&hub, &a), row(&hub, &a).epoch.number), (State::Mirror, 1));
        }
        a.put(22, 1).await;
        a.acked().await;
        let report = fail_over(&hub, &a, Ask { accept_gap: true, ..NOW }).await.unwrap();
        assert!(matches!(&report.outcome, Outcome::UpToGap(gap) if gap.reaches == last));
        assert!(report.may_be_lost() && report.last == last);
        (a.last, a.image) = (last, image);
        assert_promoted(&hub, &mut a, dir.path()).await;
        hub.stop().await;
        drop((hub, lane));
        let hub = start_again(options(dir.path(), &["a"])).await;
        assert_promoted(&hub, &mut a, dir.path()).await;
        hub.stop().await;
    });
}

/// R13: damage that shows only behind the fence leaves the source fenced; the same command with the
/// flag goes on, also after a restart.
#[test]
fn damage_behind_the_fence_waits_for_the_flag() {
    for restart in [false, true] {
        in_system(async {
            let dir = tempfile::tempdir().unwrap();
            let hub = start_again(options(dir.path(), &["a"])).await;
            let mut a = with_a_tail(&hub).await;
            let (last, image) = (a.last, a.image.clone());
            a.put(20, 0x77).await;
            a.acked().await;
            up_to(&hub, &a, Step::Drained).await.unwrap_err();
            let mut hub = hub;
            if restart {
                // A clean stop has synced the log, so the next start finds the damage in it.
                hub.stop().await;
                drop(hub);
                damage(dir.path(), &a, 0x77);
                damage_ring(dir.path());
                hub = start_again(options(dir.path(), &["a"])).await;
            } else {
                damage(dir.path(), &a, 0x77);
                let refused = fail_over(&hub, &a, NOW).await.unwrap_err();
                assert!(refused.next_step.contains("--accept-gap"), "{refused}");
            }
            until("it is said", || {
                let shown = &hub.snapshots()[0];
                shown.next_step.contains("--accept-gap")
            })
            .await;
            assert_eq!((state(&hub, &a), row(&hub, &a).epoch.number), (State::FailingOver, 2));
            until("it has ended", || hub.shared().failovers.turn(&name(&a)).is_ok()).await;
            let report = fail_over(&hub, &a, Ask { accept_gap: true, ..NOW }).await.unwrap();
            assert!(matches!(&report.outcome, Outcome::UpToGap(gap) if gap.reaches == last));
            (a.last, a.image) = (last, image);
            assert_promoted(&hub, &mut a, dir.path()).await;
            hub.stop().await;
        });
    }
}

/// The ring holds the same transfer, and would mend the log: it is damaged there as well.
pub(super) fn damage_ring(dir: &Path) {
    let path = dir.join("nvram");
    let mut bytes = std::fs::read(&path).unwrap();
    let found = bytes.windows(64).rposition(|window| window == [0x77; 64]);
    bytes[found.unwrap()] ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
}

/// A failover under way is not begun twice, and its caller need not stay.
#[test]
fn one_at_a_time() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let a = with_a_tail(&hub).await;
        static HELD: AtomicBool = AtomicBool::new(true);
        let (shared, source) = (hub.shared().clone(), name(&a));
        let first = tokio::task::spawn_blocking(move || {
            let held = |_: &Step| {
                while HELD.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                true
            };
            run(&shared, &source, NOW, &held, &|_| ())
        });
        let begun = || hub.shared().failovers.turn(&name(&a)).is_err();
        until("the first has begun", begun).await;
        let second = hub.failover(&name(&a), NOW, |_| {}).await.unwrap_err();
        assert!(second.reason.contains("under way"), "{second}");
        HELD.store(false, Ordering::SeqCst);
        assert_eq!(first.await.unwrap().unwrap().outcome, Outcome::Complete);
        hub.stop().await;
    });
}

/// `apply = "replay"`: no updates, the same roots; a wrong root is refused as ever.
#[test]
fn cps_by_replay_have_the_roots_of_the_source() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let mut a = with_a_tail(&hub).await;
        assert!(matches!(a.checkpoint_by_replay().await, Message::CpDone(_)));
        assert_eq!(image_root(&hub, &a), a.root());
        let transfer = a.entries(&[(EntryKind::Zeroes, 6000, vec![0; 9000])]);
        a.send_transfer(&transfer).await;
        a.acked().await;
        let good = a.image.clone();
        a.image[0] ^= 1;
        let refused = a.checkpoint_by_replay().await;
        assert!(matches!(&refused, Message::CpRejected(no) if no.differs.is_some()), "{refused:?}");
        a.image = good;
        assert!(matches!(a.checkpoint_by_replay().await, Message::CpDone(_)));
        assert_eq!(image_root(&hub, &a), a.root());
        let id = a.put(3, 3).await;
        a.acked().await;
        assert!(matches!(a.checkpoint(&[(3, id)]).await, Message::CpDone(_)), "by reference again");
        let lane = hub.shared().lanes.get(&name(&a)).unwrap();
        assert_eq!(lane.ladder.replayed.load(Ordering::Relaxed), 3, "one of them refused");
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        hub.stop().await;
    });
}
