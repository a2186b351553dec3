//! What a source may have of the hub's pool and ring: more is refused as by a full pool, or waits for
//! credit, for that source only; a reload changes what it may have.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::fake::Fake;
use super::faults::{break_log, into_the_fault, one_drained};
use super::promoted::{open, promoted_by};
use super::{in_system, options, start_again, until};
use crate::hub::Hub;
use crate::hub::status::SourceState;
use crate::limits::RECORD_BYTES_MAX;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_u64;
use crate::units::names::KeptName;
use crate::units::numbers::ByteCount;
use crate::volume::check::{Depth, check};
use crate::wire::message::Message;

async fn writes(source: &mut Fake, vbn: u64, fill: u8, blocks: usize) -> Message {
    let transfer = source.write(vbn, fill, blocks);
    source.send_transfer(&transfer).await;
    source.acked().await;
    source.checkpoint_by_replay().await
}

fn used(hub: &Hub, source: &Fake) -> u64 {
    hub.shared().pool.catalog().used(source.id).unwrap().expect("it is counted").0
}

/// What all sources have is what the pool says is in use.
fn all_is_counted(hub: &Hub, sources: &[&Fake]) {
    let space = hub.shared().pool.space().unwrap();
    let sum: u64 = sources.iter().map(|source| used(hub, source)).sum();
    assert_eq!(sum, space.used.0 + space.kept.0, "{space:?}");
}

/// Goal: a CP over the limit is refused with that reason and the way on, another source notices nothing;
/// what does not grow is published; more room by a reload, or by a kept CP that goes, is room at once.
#[test]
fn a_source_over_its_space_is_refused_alone() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a", "b"]);
        settings.sources[0].space_limit = Some(ByteCount(40 * BLOCK_BYTES_U64));
        let hub = start_again(settings.clone()).await;
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        assert!(matches!(writes(&mut a, 0, 1, 32).await, Message::CpDone(_)));
        assert!((32..40).contains(&used(&hub, &a)), "{}", used(&hub, &a));
        // In place: no more than before.
        assert!(matches!(writes(&mut a, 0, 2, 32).await, Message::CpDone(_)));
        let Message::CpRejected(no) = writes(&mut a, 64, 3, 32).await else {
            panic!("it is taken")
        };
        assert!(no.no_space && no.reason.contains("space_limit"), "{no:?}");
        until("a is behind", || hub.snapshots()[0].state == SourceState::Behind).await;
        let shown = hub.snapshots()[0].clone();
        assert!(shown.reason.contains("space_limit"), "{}", shown.reason);
        assert!(shown.next_step.contains("raise space_limit"), "{}", shown.next_step);
        assert!(matches!(writes(&mut b, 0, 1, 60).await, Message::CpDone(_)));
        all_is_counted(&hub, &[&a, &b]);
        settings.sources[0].space_limit = Some(ByteCount(80 * BLOCK_BYTES_U64));
        hub.settle(settings.sources.clone()).await;
        assert!(matches!(a.checkpoint_by_replay().await, Message::CpDone(_)), "there is room");
        until("a is in sync", || hub.snapshots()[0].state == SourceState::InSync).await;

        // With a kept CP the same blocks count twice, until it is dropped; also behind a restart.
        let (pool, name) = (hub.shared().pool.clone(), "monday".parse::<KeptName>().unwrap());
        pool.keep(a.id, KeptName::clone(&name)).unwrap();
        let Message::CpRejected(no) = writes(&mut a, 0, 4, 32).await else { panic!("it is taken") };
        assert!(no.no_space, "{no:?}");
        all_is_counted(&hub, &[&a, &b]);
        let before = used(&hub, &a);
        drop(pool);
        hub.stop().await;
        drop(hub);
        let hub = start_again(settings).await;
        assert_eq!(used(&hub, &a), before);
        a.generation.number += 1;
        a.welcomed(hub.address()).await;
        crate::volume::kept::drop_kept(&hub.shared().pool, a.id, &name).unwrap();
        assert!(matches!(a.checkpoint_by_replay().await, Message::CpDone(_)));
        all_is_counted(&hub, &[&a, &b]);
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        hub.stop().await;
    });
}

/// Goal: a source that the hub serves has no more than its file says either: what would make it more waits,
/// and status says for what; more by a reload is room at once; what is overwritten in place never waits
/// for ever, with nothing left.
#[test]
fn a_served_source_has_no_more_than_its_space() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a", "b"]);
        let mut limit = |blocks: u64| {
            settings.sources[0].space_limit = Some(ByteCount(blocks * BLOCK_BYTES_U64));
            settings.clone()
        };
        let (hub, a, _b) = promoted_by(limit(64)).await;
        let export = open(&hub, "a/vol0").await.unwrap();
        let fill = |blocks: u64, byte: u8| {
            let export = Arc::clone(&export);
            tokio::task::spawn_local(async move {
                for vbn in 0..blocks {
                    let block = Bytes::from(vec![byte; 4096]);
                    export.write(vbn * BLOCK_BYTES_U64, block, false).await.unwrap();
                }
            })
        };
        let filling = fill(200, 7);
        let name = a.name.parse().unwrap();
        let reason = || {
            let all = hub.snapshots();
            all.iter().find(|s| s.name == name).unwrap().reason.clone()
        };
        until("its writes wait", || reason().contains("space_limit")).await;
        until("its CPs are published", || used(&hub, &a) > 64).await;
        assert!(!filling.is_finished() && used(&hub, &a) <= 64 + 32, "{}", used(&hub, &a));
        hub.settle(limit(300).sources).await;
        filling.await.unwrap();
        hub.checkpoint(&name).await.unwrap();
        let has = used(&hub, &a);
        assert!(has > 200 && !reason().contains("space_limit"), "{has}: {}", reason());
        hub.settle(limit(has).sources).await;
        for round in 8..10 {
            fill(100, round).await.unwrap();
        }
        hub.checkpoint(&name).await.unwrap();
        assert_eq!(used(&hub, &a), has);
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        drop(export);
        hub.stop().await;
    });
}

/// Sends so many bytes, never more than it has credit for.
async fn sends(source: &mut Fake, mut credit: u64, bytes: u64) {
    let mut sent = 0;
    while sent < bytes {
        let transfer = source.write(0, 1, 64);
        let length = to_u64(transfer.bytes().len());
        while credit < length {
            let Some(Message::Ack(ack)) = source.receive().await else { panic!("no credit") };
            credit = ack.log_credit;
        }
        source.send_transfer(&transfer).await;
        sent += length;
        credit = source.acked().await.log_credit;
    }
}

/// Goal: what the ring can hold until its CP is not synced; of a source for which it had to be, a start
/// finds little unsynced, however much room there is.
#[test]
fn a_loud_source_is_synced_before_a_start_has_much_to_read() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a", "b"]);
        settings.nvram.1 = ByteCount(64 << 20);
        for (setting, mib) in settings.sources.iter_mut().zip([48, 8]) {
            setting.nvram_share = Some(ByteCount(mib << 20));
        }
        let hub = start_again(settings).await;
        let mut a = Fake::new("a");
        let mut credit = a.welcomed(hub.address()).await.log_credit;
        let lane = hub.shared().lanes.get(&a.name.parse().unwrap()).unwrap();
        let syncs = || hub.shared().store.syncs();
        let mut seen = Vec::new();
        // Less than half of the ring, more than half, little again.
        for mib in [16, 32, 12] {
            let before = syncs();
            sends(&mut a, credit, mib << 20).await;
            credit = 4 << 20;
            until("drained", || lane.cursors().drained == a.last).await;
            seen.push(syncs() > before);
        }
        assert_eq!(seen, [false, true, true]);
        let (drained, synced) = (lane.cursors().drained, lane.cursors().synced);
        let unsynced = (drained.sequence.0 - synced.sequence.0) * 64 * BLOCK_BYTES_U64;
        assert!(unsynced <= 5 << 20, "{unsynced} bytes are not synced");
        hub.stop().await;
    });
}

/// R10: a source that has used its share of the ring goes on, though others write nothing and half of
/// the ring is free; also behind the record of a source whose log takes nothing.
#[test]
fn a_source_goes_on_behind_its_share_of_the_ring() {
    for faulted in [false, true] {
        in_system(async {
            let dir = tempfile::tempdir().unwrap();
            let mut settings = options(dir.path(), &["a", "b", "c"]);
            let shares = [4, 4, 8].map(|mib| Some(ByteCount(mib << 20)));
            for (setting, share) in settings.sources.iter_mut().zip(shares) {
                setting.nvram_share = share;
            }
            let share = 4 << 20;
            let hub = start_again(settings).await;
            let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
            b.welcomed(hub.address()).await;
            b.put(0, 1).await;
            b.acked().await;
            if faulted {
                hub.shared().lanes.get(&b.name.parse().unwrap()).unwrap().fault("a bad place");
            }
            let credit = a.welcomed(hub.address()).await.log_credit;
            sends(&mut a, credit, 4 * share).await;
            hub.stop().await;
        });
    }
}

/// R10: what the ring has of a source that was forgotten holds up nobody, though its CP never came, or its log
/// took nothing. Method: another source writes for several laps of the ring.
#[test]
fn a_forgotten_source_leaves_nothing_in_the_ring() {
    for faulted in [false, true] {
        in_system(async {
            let dir = tempfile::tempdir().unwrap();
            let mut settings = options(dir.path(), &["a", "b"]);
            let hub = start_again(settings.clone()).await;
            let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
            b.welcomed(hub.address()).await;
            let lane = one_drained(&hub, &mut b).await;
            if faulted {
                lane.fault("a bad place");
            }
            let name = b.name.parse().unwrap();
            drop(b);
            settings.sources.retain(|setting| setting.name != name);
            hub.settle(settings.sources).await;
            until("it is away", || {
                !hub.snapshots().iter().any(|one| one.name == name && one.connected)
            })
            .await;
            hub.forget(&name).await.unwrap();
            let credit = a.welcomed(hub.address()).await.log_credit;
            let ring = || hub.shared().stager.ring().unwrap().status();
            sends(&mut a, credit, 3 * ring().capacity.0).await;
            assert!(ring().released.0 > ring().capacity.0, "{:?}", ring());
            hub.stop().await;
        });
    }
}

/// R10: a source whose log takes nothing, with less left of its share than a transfer, asks in vain for
/// room: nothing of it is copied round and round, and another source goes on.
#[test]
fn a_faulted_source_without_room_keeps_the_ring_at_rest() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a", "b", "c"]);
        // Two records of any length, and there is no room for a third that may be as long as can be.
        let own = RECORD_BYTES_MAX + (8 << 10);
        let shares = [own, (8 << 20) - own, 8 << 20];
        for (setting, bytes) in settings.sources.iter_mut().zip(shares) {
            setting.nvram_share = Some(ByteCount(bytes));
        }
        let hub = start_again(settings).await;
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        let lane = one_drained(&hub, &mut a).await;
        break_log(dir.path(), &a);
        into_the_fault(&mut a, 100).await;
        until("a is faulted", || lane.cursors().fault.is_some()).await;
        assert!(lane.cursors().ring_bytes > 8 << 10, "{}", lane.cursors().ring_bytes);
        let credit = b.welcomed(hub.address()).await.log_credit;
        sends(&mut b, credit, 28 << 20).await;
        let written = || hub.shared().stager.ring().unwrap().status().written;
        let mut before = written();
        let begin = Instant::now();
        // What is on its way comes to its end; what goes round never does.
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = written();
            if now == before {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(5), "still written, up to {now:?}");
            before = now;
        }
        hub.stop().await;
    });
}
