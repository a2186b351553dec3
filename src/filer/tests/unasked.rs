//! A source that lost its NVRAM and began to serve without its hub (R1).

use super::*;
use crate::filer::status::SourceState;

/// With `on_hub_loss = "continue"`, and little patience.
fn lonely(hub: &Hub, accept_lost_nvram: bool) -> Behaviour {
    let mut behaviour = behaviour(hub, Apply::Reference);
    behaviour.wanted.policy.on_hub_loss = OnHubLoss::Continue;
    behaviour.wanted.policy.hub_timeout = Duration::from_millis(400);
    behaviour.wanted.accept_lost_nvram = accept_lost_nvram;
    behaviour
}

/// So many writes that both ends have, then the NVRAM is lost and the source serves alone.
async fn begins_alone(hub: &Hub, writes: u8) -> Filer {
    let stores = Stores::new();
    let filer = try_start(&stores, lonely(hub, false)).await.unwrap();
    filer.served().await;
    let in_sync = || filer.status().state == SourceState::InSync && filer.status().alone.is_none();
    until("in sync", in_sync).await;
    let export = open(&filer, "vol0").await;
    for n in 0..writes {
        write(&export, usize::from(n) * 4096, &[n + 1; 4096]).await.unwrap();
    }
    drop((export, filer));
    hub.control(|control| control.away = true);
    let lost = Stores { nvram: Stores::new().nvram, pool: stores.cut(1).pool };
    let filer = try_start(&lost, lonely(hub, true)).await.unwrap();
    filer.served().await;
    let export = open(&filer, "vol0").await;
    assert_eq!(read(&export, 0, 4096).await, [0; 4096], "it lacks what it was acknowledged for");
    write(&export, 0, &[9; 4096]).await.unwrap();
    hub.control(|control| control.away = false);
    filer
}

/// Its writes do not replace what both ends had acknowledged: the administrator decides.
#[test]
fn what_both_had_acknowledged_is_not_replaced() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = begins_alone(&hub, 4).await;
        until("refused", || filer.status().state == SourceState::Faulted).await;
        let status = filer.status();
        assert!(status.reason.contains("has lost what was acknowledged"), "{}", status.reason);
        assert!(status.next_step.contains("--keep"), "{}", status.next_step);
        assert_eq!(hub.lock().log.len(), 4, "the hub keeps its log");
        let export = open(&filer, "vol0").await;
        assert_eq!(read(&export, 0, 4096).await, [9; 4096], "it goes on alone");
        filer.stop().await.unwrap_err();
    });
}

/// The negative control, and the residue: nothing in the log says that the only transfer was durable
/// at the source.
#[test]
fn what_cannot_be_known_is_brought_up() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = begins_alone(&hub, 1).await;
        until("in sync", || filer.status().state == SourceState::InSync).await;
        let export = open(&filer, "vol0").await;
        filer.checkpoint().await.unwrap();
        assert_eq!(
            read_all(&export).await,
            hub.lock().images[&crate::units::numbers::VolumeNumber(0)]
        );
        filer.stop().await.unwrap();
    });
}
