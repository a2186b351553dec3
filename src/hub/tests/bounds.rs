//! What one source may cost the hub, and who is who.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::fake::Fake;
use super::{in_system, options, start_again, until};
use crate::device::DeviceError;
use crate::hub::Hub;
use crate::hub::shared::Told;
use crate::hub::status::SourceState;
use crate::limits::{
    CP_CREDIT_BYTES, CP_FRAME_BYTES_MAX, HUB_CREDIT_BYTES_TOTAL, LOG_CREDIT_BYTES_MIN,
    LOG_GRANT_BYTES_MIN,
};
use crate::nvlog::Feed;
use crate::units::convert::to_u64;
use crate::units::ids::SourceId;
use crate::units::numbers::{CpNumber, Epoch, Generation};
use crate::units::policy::Policy;
use crate::wire::message::{CheckpointAt, Message, RefusedCode};

fn code(message: &Message) -> RefusedCode {
    match message {
        Message::Refused(refused) => refused.code,
        other => panic!("{other:?} instead of Refused"),
    }
}

/// A source that comes under another name is not a new one: its log stays (invariant 12).
#[test]
fn a_known_id_under_another_name_is_refused_and_its_log_stays() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a", "b"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let id = a.put(0, 1).await;
        a.acked().await;
        for again in [false, true] {
            let mut renamed = Fake::new("a");
            renamed.name = "b".to_owned();
            renamed.generation.number = 9;
            let answer = renamed.connect(hub.address()).await;
            assert_eq!(code(&answer), RefusedCode::OtherSource, "{again}");
        }
        // Nor behind the door: what a Hello asks to be recorded is looked at once more.
        let (name, generation) = ("b".parse().unwrap(), Generation { number: 9, id: 1 });
        let epoch = hub.snapshots()[0].epoch;
        let recorded = hub.shared().record(&name, CpNumber(0), &told(a.id, generation, epoch));
        assert!(recorded.unwrap_err().contains("known here as a"));
        let drained = || hub.shared().store.last(a.id) == Some(a.last);
        until("its log has it", drained).await;
        assert!(matches!(a.checkpoint(&[(0, id)]).await, Message::CpDone(_)));
        a.put(1, 1).await;
        a.acked().await;
        hub.stop().await;
        drop(hub);
        let hub = start_again(options(dir.path(), &["a", "b"])).await;
        a.generation.number = 2;
        assert_eq!(a.welcomed(hub.address()).await.last, a.last.into());
        hub.stop().await;
    });
}

fn told(source: SourceId, generation: Generation, epoch: Epoch) -> Told {
    let promise = (Policy::default(), None);
    let (volumes, left_out) = Default::default();
    Told { source, generation, epoch, volumes, promise, left_out }
}

/// Two Hellos of a new source at once: neither throws away what the other has begun.
#[test]
fn a_source_recorded_twice_at_once_keeps_its_log() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        let (shared, name) = (hub.shared().clone(), a.name.parse().unwrap());
        let epoch = Epoch { number: 1, id: 11 };
        let record = move |name: &_, id, generation, transfer: Option<_>| {
            let lane = shared.record(name, CpNumber(0), &told(id, generation, epoch))?;
            if let Some(transfer) = transfer {
                shared.store.append(id, epoch, &transfer).map_err(|error| error.to_string())?;
            }
            Ok::<_, String>(lane)
        };
        let transfer = a.write(0, 1, 1);
        let lanes: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|n| {
                    let transfer = (n % 2 == 0).then(|| transfer.clone());
                    let (record, name) = (&record, &name);
                    let (id, generation) = (a.id, a.generation);
                    scope.spawn(move || record(name, id, generation, transfer).unwrap())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(lanes.iter().all(|lane| Arc::ptr_eq(lane, &lanes[0])), "one lane");
        assert_eq!(hub.shared().store.last(a.id), Some(a.last), "no log was begun anew");
        let old = Generation { number: 0, id: 3 };
        let late = hub.shared().record(&name, CpNumber(0), &told(a.id, old, epoch));
        assert!(late.is_err(), "an older boot that is recorded late does not come back");
        // Nor an older epoch: that of a failover stands.
        let raised = Epoch { number: 2, id: 5 };
        let catalog = hub.shared().pool.catalog();
        catalog.update_source(a.id, move |row| row.epoch = raised).unwrap();
        let late = hub.shared().record(&name, CpNumber(0), &told(a.id, a.generation, epoch));
        assert!(late.unwrap_err().contains("epoch"));
        assert_eq!(catalog.source(a.id).unwrap().unwrap().epoch, raised);
        hub.stop().await;
    });
}

/// The labels of transfers rise, and two CPs at most are open: else the source is cut off, and not
/// its log broken.
#[test]
fn labels_that_fall_or_pile_up_end_the_connection_only() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let first = a.put(0, 1).await;
        let (end_of_first, first_image) = (a.last, a.image.clone());
        a.cp = CpNumber(2);
        a.put(1, 2).await;
        a.acked().await;
        let (held, image) = (a.last, a.image.clone());
        // A hub that starts again knows the labels from its logs.
        for restart in [false, true] {
            if restart {
                hub.stop().await;
                drop(hub);
                hub = start_again(options(dir.path(), &["a"])).await;
            }
            for label in [1, 3] {
                (a.last, a.counter) = (held, 0);
                a.generation.number += 1;
                assert_eq!(a.welcomed(hub.address()).await.last, held.into());
                a.cp = CpNumber(label);
                a.put(2, 3).await;
                let refused = a.other().await.unwrap();
                assert_eq!(code(&refused), RefusedCode::Protocol, "label {label} {restart}");
                assert!(hub.snapshots()[0].state != SourceState::Faulted);
            }
        }
        // Once a CP is published, there is room for the next label.
        a.generation.number += 1;
        a.welcomed(hub.address()).await;
        (a.last, a.counter, a.cp, a.image) = (end_of_first, 0, CpNumber(1), first_image);
        let done = a.checkpoint(&[(0, first)]).await;
        assert!(matches!(done, Message::CpDone(_)), "{done:?}");
        (a.last, a.cp, a.image) = (held, CpNumber(3), image);
        a.put(2, 3).await;
        a.acked().await;
        hub.stop().await;
    });
}

/// All sources together never have more under way than the hub has set aside.
#[test]
fn credits_come_from_one_budget() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let setting = options(dir.path(), &["a"]).sources[0].clone();
        let grant = |count: usize| {
            // One of them is the source that comes in the end.
            let name = |n: usize| if n == 0 { "a".to_owned() } else { format!("s{n}") };
            let settings: BTreeMap<_, _> =
                (0..count).map(|n| (name(n).parse().unwrap(), setting.clone())).collect();
            hub.shared().settings.store(Arc::new(settings));
            hub.shared().grant()
        };
        assert_eq!(grant(1), (LOG_CREDIT_BYTES_MIN, CP_CREDIT_BYTES));
        for count in [10, 170, 300, 500] {
            let (log, cp) = grant(count);
            assert!((log + cp) * to_u64(count) <= HUB_CREDIT_BYTES_TOTAL, "{count}: {log} {cp}");
        }
        assert_eq!(grant(5000), (LOG_GRANT_BYTES_MIN, CP_FRAME_BYTES_MAX));
        // And Welcome says what was granted.
        let mut a = Fake::new("a");
        let welcome = a.welcomed(hub.address()).await;
        assert_eq!(welcome.cp_credit, CP_FRAME_BYTES_MAX);
        assert!(welcome.log_credit > 0 && welcome.log_credit <= LOG_GRANT_BYTES_MIN);
        hub.stop().await;
    });
}

/// Whoever waits for a checkpoint is told when its source goes.
#[test]
fn a_checkpoint_that_will_not_come_is_answered() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Arc::new(Hub::start(options(dir.path(), &["a"])).await.unwrap());
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let asking = hub.clone();
        let asked = actix::spawn(async move { asking.checkpoint(&"a".parse().unwrap()).await });
        let Some(Message::WantCheckpoint(want)) = a.other().await else { panic!("not asked") };
        let at = CheckpointAt { token: want.token, cp: CpNumber(7) };
        a.send(&Message::CheckpointAt(at), Bytes::new()).await;
        a.half_close().await;
        let answer = tokio::time::timeout(std::time::Duration::from_secs(20), asked);
        let answer = answer.await.expect("an answer").unwrap();
        assert!(answer.unwrap_err().contains("went away"));
        hub.stop().await;
    });
}

/// A ring that fails is everybody's, also of those that have nothing under way.
#[test]
fn a_failed_ring_faults_every_source() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a", "b"])).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        let shared = hub.shared();
        let mut feed =
            crate::hub::stager::StagerFeed::new(shared.stager.clone(), shared.drain.clone());
        let device = "ring".into();
        feed.failed(&DeviceError::OutOfRange { device, offset: 0, length: 1, size: 0 });
        let refused = a.other().await.unwrap();
        assert_eq!(code(&refused), RefusedCode::Faulted);
        until("a is faulted", || hub.snapshots()[0].state == SourceState::Faulted).await;
        // One that comes later as well.
        let mut answer = b.connect(hub.address()).await;
        while matches!(answer, Message::Welcome(_) | Message::Ack(_)) {
            answer = b.other().await.unwrap();
        }
        assert_eq!(code(&answer), RefusedCode::Faulted);
        hub.stop().await;
    });
}

/// A planned stop is told to the sources.
#[test]
fn a_stop_says_good_bye() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        hub.stop().await;
        let Some(Message::Going(going)) = a.other().await else { panic!("no good-bye") };
        assert!(going.reason.contains("stopped"), "{}", going.reason);
        assert!(a.other().await.is_none());
    });
}

/// Goal: what status shows of a hub is read while a call of the data path holds the ring's lock.
#[test]
fn status_of_a_hub_does_not_wait_for_its_ring() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, _b) = super::hub_of_two(dir.path()).await;
        a.put(0, 1).await;
        a.acked().await;
        let ring = hub.shared().stager.ring().unwrap();
        let (sender, answers) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let held = ring.hold();
            scope.spawn(|| sender.send((hub.snapshots().len(), ring.status().bytes)));
            let met = answers.recv_timeout(std::time::Duration::from_secs(20));
            drop(held);
            let (sources, bytes) = met.expect("status waits for the lock");
            assert!(sources == 2 && bytes > 0, "{bytes}");
        });
        hub.stop().await;
    });
}
