//! What a source asks the hub for, and what the hub keeps of its promise.

use super::*;
use crate::hub::failover;
use crate::record::marks::Place;
use crate::units::numbers::{Epoch, SequenceNumber};
use crate::units::policy::{Ack, Mode, OnHubLoss, Policy};

/// `filed`: an Ack says that the source log is synced; `durable`, the negative control, does not.
#[test]
fn filed_is_acknowledged_when_the_log_is_synced() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a", "b"])).await.unwrap();
        let (mut filed, mut durable) = (Fake::new("a"), Fake::new("b"));
        filed.policy.ack = Ack::Filed;
        filed.welcomed(hub.address()).await;
        durable.welcomed(hub.address()).await;
        let lane = |name: &str| hub.shared().lanes.get(&name.parse().unwrap()).unwrap();
        for fill in 1..=5 {
            filed.put(0, fill).await;
            filed.acked().await;
            assert_eq!(lane("a").cursors().synced, filed.last, "acknowledged, so synced");
            durable.put(0, fill).await;
            durable.acked().await;
        }
        until("b is drained", || lane("b").cursors().drained == durable.last).await;
        assert_eq!(lane("b").cursors().synced, Place::default(), "the negative control");
        // Who asks for it later gets it for what lies there already, before Welcome names it.
        durable.policy.ack = Ack::Filed;
        let welcome = durable.welcomed(hub.address()).await;
        assert_eq!(Place::from(welcome.last), durable.last);
        assert_eq!(lane("b").cursors().synced, durable.last);
        hub.stop().await;
    });
}

/// `received`: acknowledged out of memory, and what waits for the ring is never more than was
/// given out as credit.
#[test]
fn received_is_acknowledged_within_the_credit() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut source = Fake::new("a");
        source.policy.ack = Ack::Received;
        source.welcomed(hub.address()).await;
        for fill in 1..=36 {
            let transfer = source.write(0, fill, 64);
            source.send_transfer(&transfer).await;
            let mut credit = source.acked().await.log_credit;
            while credit < crate::limits::TRANSFER_BYTES_MAX {
                assert_eq!(credit, 0, "less than a transfer is not given out");
                let Some(Message::Ack(ack)) = source.receive().await else { panic!("no Ack") };
                credit = ack.log_credit;
            }
        }
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("all is durable", || lane.cursors().durable == source.last).await;
        // Then no credit is on its way any more.
        until("all is drained", || lane.cursors().drained == source.last).await;
        let welcome = source.welcomed(hub.address()).await;
        assert_eq!(Place::from(welcome.last), source.last);
        let name = "a".parse().unwrap();
        let dry = failover::Ask { dry_run: true, now: true, ..failover::Ask::default() };
        let complete = hub.failover(&name, dry, |_| {}).await.unwrap();
        assert!(!complete.unsynced, "{:?}", complete.sentences());
        hub.stop().await;
        drop((hub, lane));
        // What was in memory is gone, and only the source knows what that was.
        let hub = start_again(options(dir.path(), &["a"])).await;
        let lost = hub.failover(&name, dry, |_| {}).await.unwrap();
        assert!(lost.may_be_lost() && lost.sentences().join("; ").contains("memory"), "{lost:?}");
        source.welcomed(hub.address()).await;
        let lane = hub.shared().lanes.get(&name).unwrap();
        until("it has it all", || !lane.cursors().doubts.unsynced).await;
        let complete = hub.failover(&name, dry, |_| {}).await.unwrap();
        assert!(!complete.unsynced, "{:?}", complete.sentences());
        hub.stop().await;
    });
}

/// The promise and the mark survive CPs and a restart of the hub while the source is away: a
/// failover has to know them. A newer Hello replaces them.
#[test]
fn the_promise_of_a_source_is_known_when_it_is_dead() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let name = "a".parse().unwrap();
        let mut source = Fake::new("a");
        source.policy =
            Policy { mode: Mode::SemiSync, on_hub_loss: OnHubLoss::Stop, ..Policy::default() };
        let mark = (Epoch { number: 1, id: 2 }, SequenceNumber(3));
        {
            let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
            assert_eq!(hub.shared().known(&name).unwrap().policy, None, "never here");
            let hello = crate::wire::message::Hello { alone: Some(mark), ..source.hello() };
            let answer = source.connect_with(hub.address(), hello).await;
            assert!(matches!(answer, Message::Welcome(_)), "{answer:?}");
            let id = source.put(0, 1).await;
            source.acked().await;
            assert!(matches!(source.checkpoint(&[(0, id)]).await, Message::CpDone(_)));
            hub.stop().await;
        }
        let hub = start_again(options(dir.path(), &["a"])).await;
        let known = hub.shared().known(&name).unwrap();
        assert_eq!((known.policy, known.alone), (Some(source.policy), Some(mark)));
        assert_eq!(known.applied_cp, CpNumber(1), "a CP keeps the promise");
        source.policy = Policy { mode: Mode::Async, ..Policy::default() };
        source.generation.number += 1;
        source.welcomed(hub.address()).await;
        let known = hub.shared().known(&name).unwrap();
        assert_eq!((known.policy, known.alone), (Some(source.policy), None));
        let shown = hub.snapshots().iter().find(|shown| shown.name == name).unwrap().policy;
        assert_eq!(shown, Some(source.policy));
        hub.stop().await;
    });
}
