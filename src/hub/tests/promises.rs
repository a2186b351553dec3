//! What a source asks the hub for, and what the hub keeps of its promise.

use super::failback::{all, at_filer, at_hub, filer_options, name, put, served};
use super::*;
use crate::filer::Filer;
use crate::filer::status::SourceState as End;
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

/// R4: a new filer that stops without its hub, and has worked before it met it, answers while its work is brought
/// over, also when the hub goes away in the middle; the hub says that writes may be missing. Once both are in step it
/// stops, which is the control.
#[test]
fn a_new_filer_that_stops_works_until_it_was_in_step_once() {
    in_system(async {
        let (dir, filer_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let again = HubOptions { listen: hub.address(), ..options(dir.path(), &["a"]) };
        hub.stop().await;
        drop(hub);
        let stops = Policy { on_hub_loss: OnHubLoss::Stop, ..Policy::default() };
        let mut own = filer_options(filer_dir.path(), again.listen, stops);
        let wanted = Policy { hub_timeout: own.hub_timeout, ..stops };
        own.resync_limit = Some(ByteCount(1 << 20));
        let own_interval = own.checkpoint_interval;
        let filer = Filer::start(own).await.unwrap();
        served(&filer).await;
        let export = at_filer(&filer).await;
        let mut image = vec![0; 4 << 20];
        for at in 0..16u8 {
            let part = [at + 1, 7, at, 3].repeat(64 << 10);
            put(&export, &mut image, usize::from(at) << 18, &part).await;
        }
        // Made alone, so that the logs do not join.
        drop(filer.checkpoint().await);
        until("an own CP", || filer.status().own_cp.0 > 0).await;
        // What a reload asks for before it was told to anybody follows like what it began with.
        let wanted = Policy { hub_timeout: Duration::from_millis(600), ..wanted };
        filer.reload(wanted, own_interval);
        put(&export, &mut image, 4096, &[4; 4096]).await;
        let before = filer.status().own_cp;
        drop(filer.checkpoint().await);
        until("another CP", || filer.status().own_cp > before).await;
        assert_eq!(filer.shared().pledge.terms().next, None, "it has no hub yet");

        for cut in [true, false] {
            let hub = start_again(again.clone()).await;
            until("a pass", || filer.status().pass.is_some()).await;
            assert_eq!(filer.status().policy.on_hub_loss, OnHubLoss::Continue, "until then");
            put(&export, &mut image, 0, &[8; 4096]).await;
            assert!(filer.status().pass.is_some(), "the pass was over: nothing is shown");
            if cut {
                hub.stop().await;
                put(&export, &mut image, 8192, &[9; 4096]).await;
                continue;
            }
            let dry = failover::Ask { dry_run: true, now: true, ..failover::Ask::default() };
            let may = hub.failover(&name(), dry, |_| {}).await;
            assert!(may.is_err() || may.is_ok_and(|report| report.may_be_lost()), "it is said");
            until("it stops from now on", || {
                let status = filer.status();
                let in_step = status.state == End::InSync && status.alone.is_none();
                in_step && (status.policy, status.policy_next) == (wanted, None)
            })
            .await;
            assert_eq!(hub.shared().known(&name()).unwrap().policy, Some(wanted));
            filer.checkpoint().await.unwrap();
            assert!(all(&at_hub(&hub).await).await == image);
            hub.stop().await;
        }
        let write = tokio::spawn(async move { export.write(0, vec![1; 4096].into(), false).await });
        until("the hub is missed", || filer.status().state == End::Offline).await;
        tokio::time::sleep(wanted.hub_timeout * 2).await;
        assert!(!write.is_finished() && filer.status().alone.is_none(), "it stops");
        write.abort();
        drop(filer.stop().await);
    });
}
