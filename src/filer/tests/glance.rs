//! Status is told while the data path stands still, and is exact once it is at rest.

use std::sync::mpsc;

use super::*;
use crate::filer::status::{SourceState, status};
use crate::units::numbers::{CpNumber, SequenceNumber};

const PATIENCE: Duration = Duration::from_secs(60);

/// Goal: who asks gets his answer while somebody holds every lock that the data path takes, and it says what
/// was done before. Controls: the locks are held, and who asks with the order's lock waits for it.
#[test]
fn status_is_told_while_every_lock_is_held() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = start(&Stores::new(), &hub).await;
        let export = open(&filer, "filer-a/vol0").await;
        write(&export, 0, &[7; 8192]).await.unwrap();
        filer.checkpoint().await.unwrap();
        until("all is released", || filer.status().order.dirty_blocks == 0).await;
        write(&export, 4096, &[8; 4096]).await.unwrap();
        until("the hub has it all", || filer.status().unstaged == Duration::ZERO).await;
        let shared = filer.shared();
        until("nobody holds a lock", || shared.free_locks() == [true; 4]).await;
        let ((sender, told), (waits, waited)) = (mpsc::channel(), mpsc::channel());
        let threads = shared.with_locks_held(|| {
            let (asked, locked) = (Arc::clone(&shared), Arc::clone(&shared));
            let asking = std::thread::spawn(move || sender.send(status(&asked)).unwrap());
            let waiting = std::thread::spawn(move || waits.send(locked.order.figures()).unwrap());
            let met = told.recv_timeout(PATIENCE).expect("an answer while the locks are held");
            assert_eq!((met.state, met.serving), (SourceState::InSync, true));
            let two = SequenceNumber(2);
            assert_eq!((met.own_durable, met.hub_durable, met.order.sequence), (two, two, two));
            assert_eq!((met.own_cp, met.common_cp), (CpNumber(1), Some(CpNumber(1))));
            assert_eq!((met.order.open_cp, met.order.dirty_blocks), (CpNumber(2), 1));
            let ladder = met.ladder;
            assert!(ladder.visible_bytes > 8192 && ladder.visible_bytes < ladder.formed_bytes);
            assert_eq!(
                (ladder.durable_bytes, ladder.hub_bytes),
                (ladder.formed_bytes, ladder.formed_bytes)
            );
            assert_eq!(ladder.acknowledged_bytes, ladder.formed_bytes);
            assert_eq!((met.held.0, met.unacknowledged), (1, 0));
            assert!(met.held.1 > 4096 && met.lag > Duration::ZERO);
            assert_eq!(met.volumes.len(), 2);
            assert_eq!(shared.free_locks(), [false; 4]);
            assert!(waited.try_recv().is_err(), "the order was asked while it was locked");
            [asking, waiting]
        });
        let figures = waited.recv_timeout(PATIENCE).expect("the lock is free again");
        assert_eq!(figures, shared.order.glance());
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        filer.stop().await.unwrap();
    });
}

/// Goal: what is told is what holds, behind every write, CP and restart, and never goes back while both go on.
/// Method: one thread asks all the while; the figures under the lock are the control where nothing moves.
#[test]
fn what_is_told_is_what_holds() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "filer-a/vol0").await;
        let (shared, (stop, stopped)) = (filer.shared(), mpsc::channel::<()>());
        let asking = std::thread::spawn(move || {
            let (mut before, mut asked) = (status(&shared), 0_u64);
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                let now = status(&shared);
                let (was, is) = (before.ladder, now.ladder);
                for (was, is) in [
                    (was.formed_bytes, is.formed_bytes),
                    (was.durable_bytes, is.durable_bytes),
                    (was.hub_bytes, is.hub_bytes),
                    (was.acknowledged_bytes, is.acknowledged_bytes),
                    (was.visible_bytes, is.visible_bytes),
                    (before.order.sequence.0, now.order.sequence.0),
                    (before.own_durable.0, now.own_durable.0),
                ] {
                    assert!(was <= is, "{before:?}, then {now:?}");
                }
                assert!(is.durable_bytes <= is.formed_bytes && is.hub_bytes <= is.formed_bytes);
                assert!(is.acknowledged_bytes <= is.formed_bytes, "{is:?}");
                assert!(now.order.sequence.0 >= now.own_durable.0, "{now:?}");
                (before, asked) = (now, asked + 1);
            }
            asked
        });
        for round in 0..20_u8 {
            for at in 0..8 {
                write(&export, at * 8192, &[round; 4096]).await.unwrap();
            }
            let told = filer.status();
            assert_eq!(told.own_durable, told.order.sequence, "all of it was answered");
            filer.checkpoint().await.unwrap();
        }
        drop(stop);
        let asked = tokio::task::spawn_blocking(|| asking.join().unwrap()).await.unwrap();
        assert!(asked > 100, "{asked} answers only");
        until("all is released", || filer.status().held == (0, 0)).await;
        let shared = filer.shared();
        assert_eq!(shared.order.glance(), shared.order.figures());
        assert_eq!(filer.status().ladder.visible_bytes, filer.status().ladder.formed_bytes);
        let sequence = filer.status().order.sequence;
        filer.stop().await.unwrap();
        let filer = start(&stores, &hub).await;
        let shared = filer.shared();
        assert_eq!(shared.order.glance(), shared.order.figures());
        assert_eq!(filer.status().order.sequence, sequence, "as it was before the restart");
        filer.stop().await.unwrap();
    });
}
