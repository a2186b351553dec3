//! What may be missing at a hub, and how it is said until it is known to be here, or of no interest.

use std::path::Path;
use std::sync::Arc;

use super::failover::{NOW, fail_over, row, state, up_to, with_a_tail};
use super::fake::Fake;
use super::faults::{records_of, rot, shown};
use super::{image_root, in_system, options, start_again, until};
use crate::hub::Hub;
use crate::hub::extension::{Extension, State};
use crate::hub::failover::{Ask, Outcome, Step};
use crate::hub::refill::{LOST, LOST_THERE_TOO, Mark, Refills};
use crate::units::numbers::{CpNumber, Generation, SequenceNumber};
use crate::units::policy::Ack;
use crate::wire::message::Message;

/// What a power cut leaves that takes the source logs, which were never synced.
fn cut(live: &Path, dir: &Path) {
    std::fs::create_dir(dir.join("logs")).unwrap();
    for name in ["nvram", "disk0", "identity.json", "logs/hub-id"] {
        std::fs::copy(live.join(name), dir.join(name)).unwrap();
    }
}

/// Rot has taken the last record before a fence, which breaks no chain: a failover that had begun does
/// not wait for it for ever. It says what is not there, and goes on once that is accepted (R13).
#[test]
fn a_failover_whose_log_ends_before_its_fence_says_so() {
    in_system(async {
        let (live, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hub = start_again(options(live.path(), &["a"])).await;
        let mut a = with_a_tail(&hub).await;
        up_to(&hub, &a, Step::Raised).await.unwrap_err();
        let capacity = hub.shared().stager.ring().unwrap().status().capacity;
        let records = records_of(&hub, &a);
        let (before, last) = (records[records.len() - 3], records[records.len() - 2]);
        let (_, body) = hub.shared().stager.ring().unwrap().read(before).unwrap();
        let whole = crate::record::transfer::Transfer::parse(body).unwrap().place();
        cut(live.path(), dir.path());
        hub.stop().await;
        rot(dir.path(), capacity, last, 200);
        let hub = start_again(options(dir.path(), &["a"])).await;
        assert_eq!((whole.sequence, a.last.sequence), (SequenceNumber(3), SequenceNumber(5)));
        until("it says where the log ends", || {
            let reason = &shown(&hub, "a").reason;
            reason.contains("(entry 3) and no further")
        })
        .await;
        assert_eq!(state(&hub, &a), State::FailingOver);
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        let fault = lane.cursors().fault.unwrap();
        assert!(fault.contains("ends at entry 3") && fault.contains("to reach entry 5"), "{fault}");
        let name = "a".parse().unwrap();
        until("it has given up", || hub.shared().failovers.turn(&name).is_ok()).await;
        let refused = fail_over(&hub, &a, NOW).await.unwrap_err();
        assert!(refused.reason.contains("entry 3"), "{refused}");
        assert!(refused.next_step.contains("--accept-gap"), "{refused}");
        let accepted = Ask { accept_gap: true, ..NOW };
        let report = fail_over(&hub, &a, accepted).await.unwrap();
        assert!(matches!(report.outcome, Outcome::UpToGap(_)), "{report:?}");
        assert_eq!((report.last, report.may_be_lost()), (whole, true));
        assert_eq!(state(&hub, &a), State::Promoted);
        // The image ends with the entries 2 and 3; 4 and 5 had taken some of that away.
        a.image[8192..16_384].fill(3);
        a.image[10..110].fill(1);
        a.cp = CpNumber(row(&hub, &a).applied.0 + 1);
        assert_eq!(image_root(&hub, &a), a.root());
        hub.stop().await;
    });
}

/// Why something may be missing.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Why {
    Rot,
    Received,
    LogLost,
}

/// A hub that lacks the third write of `a`, which was acknowledged.
async fn lacks_the_third(why: Why, dir: &Path) -> Fake {
    let live = tempfile::tempdir().unwrap();
    let hub = start_again(options(live.path(), &["a", "b"])).await;
    let mut a = Fake::new("a");
    a.policy.on_hub_loss = crate::units::policy::OnHubLoss::Stop;
    if why == Why::Received {
        a.policy.ack = Ack::Received;
    }
    a.welcomed(hub.address()).await;
    for block in 0..2 {
        a.put(block, 1).await;
        a.acked().await;
    }
    let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
    until("drained", || lane.cursors().drained == a.last).await;
    let (whole, image) = (a.last, a.image.clone());
    if why != Why::Rot {
        cut(live.path(), dir);
    }
    a.put(2, 1).await;
    a.acked().await;
    if why == Why::Rot {
        until("drained", || lane.cursors().drained == a.last).await;
        let capacity = hub.shared().stager.ring().unwrap().status().capacity;
        let record = records_of(&hub, &a)[2];
        // So that what comes behind it says that it was durable.
        let mut b = Fake::new("b");
        b.welcomed(hub.address()).await;
        b.put(0, 1).await;
        b.acked().await;
        cut(live.path(), dir);
        hub.stop().await;
        rot(dir, capacity, record, 200);
    } else {
        hub.stop().await;
    }
    if why == Why::LogLost {
        let mark = Mark { generation: a.generation, what: None };
        Refills::of(dir).mark(std::iter::once((a.id, mark))).unwrap();
    }
    (a.last, a.image) = (whole, image);
    a
}

/// What a failover now would say.
async fn dry(hub: &Hub) -> String {
    let ask = Ask { dry_run: true, accept_gap: true, ..NOW };
    let report = hub.failover(&"a".parse().unwrap(), ask, |_| {}).await.unwrap();
    let said = report.sentences().join("; ");
    format!("{}: {said}", report.outcome.word())
}

/// What was acknowledged is lost at both ends: the hub by rot, with its memory, or with its log, the
/// source with its NVRAM. The boot that comes ends where the hub ends, so nothing seems to be missing.
/// It was another boot that held it: that is said until a CP shows what the new one has, over any restart.
/// Control: the boot that held it sends it again, and nothing is said.
#[test]
fn another_boot_does_not_count_as_holding_what_is_owed() {
    for why in [Why::Rot, Why::Received, Why::LogLost] {
        for other in [true, false] {
            in_system(async {
                let dir = tempfile::tempdir().unwrap();
                let mut a = lacks_the_third(why, dir.path()).await;
                let mut hub = start_again(options(dir.path(), &["a", "b"])).await;
                if !other {
                    assert_eq!(a.welcomed(hub.address()).await.last, a.last.into());
                    a.put(2, 1).await;
                    a.acked().await;
                    until("it is here", || !shown(&hub, "a").reason.contains("missing")).await;
                    let said = dry(&hub).await;
                    assert!(said.starts_with("complete: "), "{why:?}: {said}");
                    assert!(!said.contains("may be missing"), "{why:?}: {said}");
                    hub.stop().await;
                    return;
                }
                for start in 0..3 {
                    a.generation = Generation { number: 2, id: 5 };
                    assert_eq!(a.welcomed(hub.address()).await.last, a.last.into());
                    let reason = shown(&hub, "a").reason.clone();
                    assert!(reason.contains("may be missing"), "{why:?} {start}: {reason}");
                    assert_eq!(reason.matches(LOST_THERE_TOO).count(), 1, "{reason}");
                    let said = dry(&hub).await;
                    assert_eq!(said.matches(LOST_THERE_TOO).count(), 1, "{said}");
                    assert_eq!(said.starts_with("up-to-gap: "), why == Why::LogLost, "{said}");
                    if why == Why::LogLost {
                        let refused = fail_over(&hub, &a, NOW).await.unwrap_err();
                        assert!(refused.reason.contains(LOST_THERE_TOO), "{refused}");
                    }
                    hub.stop().await;
                    drop(hub);
                    hub = start_again(options(dir.path(), &["a", "b"])).await;
                    // Also before it has come again.
                    assert!(dry(&hub).await.contains(LOST_THERE_TOO), "{why:?} {start}");
                }
                a.welcomed(hub.address()).await;
                assert!(matches!(a.checkpoint_by_replay().await, Message::CpDone(_)));
                until("a CP shows it", || !shown(&hub, "a").reason.contains("missing")).await;
                let noted = || Extension::of(&row(&hub, &a)).unwrap();
                until("no note stands", || noted() == noted().without_doubts()).await;
                assert!(!dry(&hub).await.contains(LOST_THERE_TOO));
                hub.stop().await;
            });
        }
    }
}

/// A cut between the commit of a promotion and the end of the mark: what was promoted without it is the
/// truth, and no start tells of it again.
#[test]
fn a_mark_behind_a_promotion_is_not_told_again() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        let a = with_a_tail(&hub).await;
        let marked = || {
            let mark = Mark { generation: a.generation, what: None };
            Refills::of(dir.path()).mark(std::iter::once((a.id, mark))).unwrap();
        };
        let marks = || std::fs::read_dir(dir.path().join("refill")).unwrap().count();
        hub.stop().await;
        drop(hub);
        marked();
        // Control: of a mirror it is told.
        let hub = start_again(options(dir.path(), &["a"])).await;
        until("it is told", || shown(&hub, "a").reason.contains(LOST)).await;
        let report = fail_over(&hub, &a, Ask { accept_gap: true, ..NOW }).await.unwrap();
        assert_eq!((report.outcome.word(), report.last), ("up-to-gap", a.last), "{report:?}");
        assert_eq!(report.sentences().join("; ").matches(LOST).count(), 1, "{report:?}");
        until("the mark goes", || marks() == 0).await;
        let (shared, pool) = (Arc::downgrade(hub.shared()), Arc::downgrade(&hub.shared().pool));
        hub.stop().await;
        drop(hub);
        // The thread of the failover may have had it last.
        until("nobody has it", || shared.strong_count() + pool.strong_count() == 0).await;
        marked();
        let hub = start_again(options(dir.path(), &["a"])).await;
        assert_eq!((state(&hub, &a), marks()), (State::Promoted, 0));
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        assert!(lane.cursors().doubts.lost_in_words().is_none());
        let shown: Arc<_> = shown(&hub, "a");
        assert!(!shown.reason.contains(LOST), "{}", shown.reason);
        hub.stop().await;
    });
}
