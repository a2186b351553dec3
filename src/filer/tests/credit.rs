//! A hub that answers heartbeats and gives no credit: what waits for it was never sent (section 9).

use super::*;
use crate::filer::status::SourceState;
use crate::units::numbers::CpNumber;

/// A loaded machine is silent for some of it.
const PATIENCE: Duration = Duration::from_secs(1);

async fn impatient(hub: &Hub, on_hub_loss: OnHubLoss) -> Filer {
    let mut behaviour = behaviour(hub, Apply::Reference);
    behaviour.wanted.policy.hub_timeout = PATIENCE;
    behaviour.wanted.policy.on_hub_loss = on_hub_loss;
    let filer = try_start(&Stores::new(), behaviour).await.unwrap();
    filer.served().await;
    until("in sync", || filer.status().state == SourceState::InSync).await;
    filer
}

async fn passes(filer: &Filer, times: u32) {
    let since = filer.status().uptime;
    until("time passes", || filer.status().uptime > since + PATIENCE * times).await;
}

/// Under `continue` the hub counts as lost: the write is answered alone, and the connection that is
/// made anew stays, since nobody waits for it any more.
#[test]
fn a_hub_without_credit_is_a_lost_hub() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = impatient(&hub, OnHubLoss::Continue).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        let before = hub.seen().connections;
        hub.credit(0);
        hub.is_heard().await;
        let answered = tokio::time::timeout(PATIENCE * 50, write(&export, 4096, &[2; 4096])).await;
        answered.unwrap().unwrap();
        assert!(filer.status().alone.is_some(), "the mark stands before the answer");
        until("met again", || filer.shared().is_connected()).await;
        passes(&filer, 2).await;
        assert_eq!(hub.seen().connections, before + 1, "it is not hung up on again and again");
        let status = filer.status();
        assert_eq!(status.state, SourceState::Behind, "{}", status.reason);
        assert!(status.reason.contains("room in its log"), "{}", status.reason);
        assert!(status.next_step.contains("alone"), "{}", status.next_step);
        write(&export, 8192, &[3; 4096]).await.unwrap();
        hub.credit(4 << 20);
        until("in sync", || filer.status().state == SourceState::InSync).await;
        until("the mark is gone", || filer.status().alone.is_none()).await;
        assert!(filer.checkpoint().await.unwrap().0 > CpNumber(0));
        filer.stop().await.unwrap();
    });
}

/// Under `stop` the write waits, is said to, and is answered when there is credit again; reads go on, and
/// nobody hangs up.
#[test]
fn under_stop_a_hub_without_credit_is_named() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = impatient(&hub, OnHubLoss::Stop).await;
        let export = open(&filer, "vol0").await;
        let before = hub.seen().connections;
        hub.credit(0);
        hub.is_heard().await;
        let own = Arc::clone(&export);
        let task = tokio::spawn(async move { write(&own, 0, &[1; 4096]).await });
        until("it is named", || {
            let status = filer.status();
            status.state == SourceState::Behind && status.reason.contains("room in its log")
        })
        .await;
        passes(&filer, 3).await;
        assert_eq!(hub.seen().connections, before, "the connection stays");
        assert_eq!(filer.status().state, SourceState::Behind);
        assert_eq!(read(&export, 4096, 4096).await, [0; 4096]);
        assert!(!task.is_finished());
        assert_eq!(filer.status().alone, None);
        let refused = tokio::time::timeout(PATIENCE * 50, filer.checkpoint()).await.unwrap();
        let reason = refused.unwrap_err().to_string();
        assert!(reason.contains("room in its log"), "nobody waits for a CP for ever: {reason}");
        // It is on its way again, and not answered yet when the next look comes.
        hub.control(|control| control.hold_acks = true);
        let sent = std::time::Instant::now();
        hub.credit(4 << 20);
        until("hung up", || hub.seen().connections > before).await;
        assert!(sent.elapsed() > PATIENCE / 2, "an answer has its own time: {:?}", sent.elapsed());
        hub.control(|control| control.hold_acks = false);
        task.await.unwrap().unwrap();
        until("in sync", || filer.status().state == SourceState::InSync).await;
        filer.stop().await.unwrap();
    });
}

/// R18: a pool without room is told, and is no reason to hang up: nothing waits for a connection.
#[test]
fn a_hub_whose_pool_is_full_is_not_hung_up_on() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = impatient(&hub, OnHubLoss::Stop).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        hub.control(|control| control.no_space = true);
        let refused = filer.checkpoint().await.unwrap_err().to_string();
        assert!(refused.contains("full"), "{refused}");
        hub.credit(0);
        hub.is_heard().await;
        let (before, own) = (hub.seen().connections, Arc::clone(&export));
        let task = tokio::spawn(async move { write(&own, 4096, &[2; 4096]).await });
        passes(&filer, 2).await;
        assert!(!task.is_finished());
        assert_eq!(hub.seen().connections, before);
        let status = filer.status();
        assert_eq!(status.state, SourceState::Behind);
        assert!(status.reason.contains("full"), "{}", status.reason);
        hub.control(|control| control.no_space = false);
        hub.credit(4 << 20);
        task.await.unwrap().unwrap();
        // Who asks at the hub has it tried at once.
        hub.want_checkpoint();
        until("published", || hub.applied() >= CpNumber(1)).await;
        filer.stop().await.unwrap();
    });
}

/// A CP that takes longer than `hub_timeout` while both partitions are full: under `stop` it is waited
/// out where it is, not begun again on another connection each time; under `continue` the hub is lost.
#[test]
fn a_slow_checkpoint_is_waited_out_under_stop() {
    runtime().block_on(async {
        for on_hub_loss in [OnHubLoss::Stop, OnHubLoss::Continue] {
            let hub = Hub::start(64 << 20).await;
            let filer = impatient(&hub, on_hub_loss).await;
            let export = open(&filer, "vol0").await;
            hub.control(|control| control.hold_cps = true);
            let before = hub.seen().connections;
            let own = Arc::clone(&export);
            let task = tokio::spawn(async move {
                // Twice the NVRAM.
                for n in 0..64 {
                    write(&own, 0, &[n; 64 << 10]).await.unwrap();
                }
            });
            if on_hub_loss == OnHubLoss::Continue {
                until("alone", || filer.status().alone.is_some()).await;
                assert!(hub.seen().connections > before || !filer.shared().is_connected());
            } else {
                let said =
                    || filer.status().reason.contains("both partitions of the NVRAM are full");
                until("it is named", || filer.status().state == SourceState::Behind && said())
                    .await;
                passes(&filer, 3).await;
                assert_eq!(hub.seen().connections, before, "the CP is not begun again");
                assert!(!task.is_finished() && filer.status().alone.is_none());
            }
            hub.control(|control| control.hold_cps = false);
            task.await.unwrap();
            until("in sync", || filer.status().state == SourceState::InSync).await;
            filer.stop().await.unwrap();
        }
    });
}
