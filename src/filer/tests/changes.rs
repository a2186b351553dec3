//! A policy changes while the source runs (R20): behind a freeze, when the hub has noted it.

use std::collections::BTreeMap;

use super::*;
use crate::filer::completion::Gate;
use crate::units::numbers::VolumeNumber;
use crate::units::policy::Mode;

fn of_mode(mode: Mode) -> Policy {
    Policy { mode, ..promise(Apply::Reference) }
}

/// `async` goes with `continue` only.
fn loose() -> Policy {
    Policy { on_hub_loss: OnHubLoss::Continue, ..of_mode(Mode::Async) }
}

async fn start_with(stores: &Stores, hub: &Hub, policy: Policy) -> Filer {
    let mut behaviour = behaviour(hub, Apply::Reference);
    behaviour.wanted.policy = policy;
    let filer = try_start(stores, behaviour).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), filer.served()).await.unwrap();
    filer
}

const HOUR: Duration = Duration::from_secs(3600);

/// Goal: from sync to async a write waits for the hub until the hub has noted the change, and not
/// after. Method: the hub holds its acknowledgements before, and again behind the change.
#[test]
fn from_sync_to_async_behind_the_freeze() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start_with(&stores, &hub, of_mode(Mode::Sync)).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        hub.control(|control| control.hold_acks = true);
        let task = {
            let export = Arc::clone(&export);
            tokio::spawn(async move { write(&export, 4096, &[2; 4096]).await })
        };
        until("the write is on its way", || filer.status().order.sequence.0 == 2).await;
        filer.reload(loose(), HOUR);
        assert_eq!(filer.status().policy_next, Some(loose()), "it shows");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!task.is_finished(), "what the hub lacks is not answered before it knows");
        assert_eq!(filer.shared().completion.figures().gate, Gate::Both);
        hub.control(|control| control.hold_acks = false);
        task.await.unwrap().unwrap();
        until("the policy is in force", || filer.status().policy == loose()).await;
        assert_eq!(filer.status().policy_next, None);
        assert_eq!(hub.policy(), Some(loose()), "the hub goes by the same");
        hub.control(|control| control.hold_acks = true);
        write(&export, 8192, &[3; 4096]).await.unwrap();
        assert!(filer.shared().completion.answered_alone().0 >= 3);
        hub.control(|control| control.hold_acks = false);
        let (cp, _) = filer.checkpoint().await.unwrap();
        assert_eq!(hub.applied(), cp);
        filer.stop().await.unwrap();
    });
}

/// From async to sync: answered as before until the freeze, then by both ends; the hub hears of the
/// stronger promise when it lacks nothing of before.
#[test]
fn from_async_to_sync_once_the_lag_is_gone() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start_with(&stores, &hub, loose()).await;
        let export = open(&filer, "vol0").await;
        hub.control(|control| control.hold_acks = true);
        write(&export, 0, &[1; 4096]).await.unwrap();
        filer.reload(of_mode(Mode::Sync), HOUR);
        until("both promises are kept", || filer.shared().completion.figures().gate == Gate::Both)
            .await;
        let task = {
            let export = Arc::clone(&export);
            tokio::spawn(async move { write(&export, 4096, &[2; 4096]).await })
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!task.is_finished(), "behind the freeze the hub is needed");
        assert_eq!(hub.policy(), Some(loose()), "the hub must not promise what it lacks");
        hub.control(|control| control.hold_acks = false);
        task.await.unwrap().unwrap();
        until("sync is in force", || filer.status().policy == of_mode(Mode::Sync)).await;
        assert_eq!(hub.policy(), Some(of_mode(Mode::Sync)));
        filer.stop().await.unwrap();
    });
}

/// Goal: a power cut at any moment of a change leaves one of two policies, and both ends come to
/// the one of the file. Method: cut after the reload while the hub holds back, and start with the
/// old file, the new one, and a third.
#[test]
fn a_restart_in_the_middle_ends_with_the_policy_of_the_file() {
    runtime().block_on(async {
        for (round, file) in
            [of_mode(Mode::Sync), loose(), of_mode(Mode::SemiSync)].iter().enumerate()
        {
            let hub = Hub::start(4 << 20).await;
            let stores = Stores::new();
            let filer = start_with(&stores, &hub, of_mode(Mode::Sync)).await;
            let export = open(&filer, "vol0").await;
            write(&export, 0, &[1; 4096]).await.unwrap();
            hub.control(|control| control.hold_cps = true);
            filer.reload(loose(), HOUR);
            // The freeze is written: the change is under way.
            until("the freeze", || filer.shared().pledge.terms().next.is_some()).await;
            if round == 1 {
                until("it is planned", || filer.status().own_cp.0 > 0).await;
            }
            let after = stores.cut(u64::try_from(round).unwrap());
            drop((export, filer));
            hub.control(|control| control.hold_cps = false);
            let filer = start_with(&after, &hub, *file).await;
            // The file may ask for what is in force: the other policy comes in between all the same.
            until("the file's policy is in force and none follows", || {
                let status = filer.status();
                (status.policy, status.policy_next) == (*file, None)
            })
            .await;
            assert_eq!(hub.policy(), Some(*file), "the hub knows");
            assert_eq!(read(&open(&filer, "vol0").await, 0, 4096).await, [1; 4096]);
            filer.stop().await.unwrap();
        }
    });
}

/// A weaker policy in the file of a source whose hub is away does nothing until the hub knows,
/// unless the administrator accepts that: the negative control.
#[test]
fn without_its_hub_a_weaker_file_changes_nothing() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let mut strict = behaviour(&hub, Apply::Reference);
        strict.wanted.policy.hub_timeout = Duration::from_millis(300);
        let filer = try_start(&stores, strict.clone()).await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), filer.served()).await.unwrap();
        filer.stop().await.unwrap();
        drop(filer);
        hub.control(|control| control.away = true);
        let mut weak = strict.clone();
        weak.wanted.policy.on_hub_loss = OnHubLoss::Continue;
        let filer = try_start(&stores, weak.clone()).await.unwrap();
        until("clients are held", || filer.shared().completion.figures().gate == Gate::Held).await;
        assert!(!filer.shared().is_serving());
        assert_eq!(filer.status().policy.on_hub_loss, OnHubLoss::Stop);
        drop(filer);
        weak.wanted.accept_untold_policy = true;
        let again = stores.cut(9);
        let filer = try_start(&again, weak).await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), filer.served()).await.unwrap();
        assert_eq!(filer.status().policy.on_hub_loss, OnHubLoss::Continue);
    });
}

/// cp-only and back: before the change the log went, afterwards only CPs go, and back.
#[test]
fn to_cp_only_and_back_every_write_is_there() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let sync = of_mode(Mode::Sync);
        let only = Policy { mode: Mode::CpOnly, apply: Apply::Inline, ..loose() };
        let filer = start_with(&stores, &hub, sync).await;
        let export = open(&filer, "vol0").await;
        let mut expected = vec![0; VOLUME_BYTES];
        for (round, policy) in [only, sync, only, loose(), sync].into_iter().enumerate() {
            for block in 0..3 {
                let (at, byte) = ((round * 3 + block) * 4096, u8::try_from(round + 1).unwrap());
                write(&export, at, &[byte; 4096]).await.unwrap();
                expected[at..at + 4096].fill(byte);
            }
            filer.reload(policy, HOUR);
            write(&export, 0, &[9; 4096]).await.unwrap();
            expected[..4096].fill(9);
            until("in force", || filer.status().policy == policy).await;
            assert_eq!(hub.policy(), Some(policy));
        }
        let (cp, _) = filer.checkpoint().await.unwrap();
        assert_eq!(hub.applied(), cp);
        assert_eq!(read_all(&export).await, expected);
        filer.stop().await.unwrap();
    });
}

/// What leaves between two CPs of a source that is written to meanwhile, and with the second of them;
/// frames by the name of their message.
async fn frames_of(policy: Policy) -> [BTreeMap<&'static str, u64>; 2] {
    let hub = Hub::start(4 << 20).await;
    let stores = Stores::sized(16 << 20);
    let filer = start_with(&stores, &hub, policy).await;
    let export = open(&filer, "vol0").await;
    write(&export, 0, &[1; 4096]).await.unwrap();
    filer.checkpoint().await.unwrap();
    hub.is_heard().await;
    hub.lock().frames.clear();
    let mut expected = vec![0; VOLUME_BYTES];
    expected[..4096].fill(1);
    for count in 0..400 {
        let (at, byte) = (count * 7 % 256 * 4096, u8::try_from(count % 250 + 2).unwrap());
        write(&export, at, &[byte; 4096]).await.unwrap();
        expected[at..at + 4096].fill(byte);
    }
    until("a ping", || hub.lock().frames.get("Ping").is_some_and(|&pings| pings > 0)).await;
    hub.is_heard().await;
    let between = std::mem::take(&mut hub.lock().frames);
    let (cp, _) = filer.checkpoint().await.unwrap();
    assert_eq!((hub.applied(), cp.0), (cp, 2), "no CP was made in between");
    let with_cp = hub.lock().frames.clone();
    assert_eq!(hub.lock().images[&VolumeNumber(0)], expected);
    filer.stop().await.unwrap();
    [between, with_cp]
}

/// cp-only: between two CPs nothing leaves but heartbeats, however much is written.
#[test]
fn cp_only_sends_pings_and_nothing_else_between_cps() {
    runtime().block_on(async {
        let hub_timeout = Duration::from_secs(2);
        let only = Policy { mode: Mode::CpOnly, apply: Apply::Inline, hub_timeout, ..loose() };
        let [between, with_cp] = frames_of(only).await;
        println!("between {between:?}, with the CP {with_cp:?}");
        let quiet = |name: &&str| ["Ping", "Pong"].contains(name);
        assert!(between.keys().all(quiet), "{between:?} between two CPs");
        assert!(
            with_cp.contains_key("Updates") && !with_cp.contains_key("Transfer"),
            "{with_cp:?}"
        );
        // The control: under another mode the same count sees what goes.
        let [between, _] = frames_of(Policy { hub_timeout, ..loose() }).await;
        let sent = between.get("Transfer").copied().unwrap_or_default();
        assert!(sent > 0 && !between.keys().all(quiet), "{between:?} under async");
    });
}

/// Nothing was written since the last CP: none is made for the change.
#[test]
fn an_idle_source_changes_without_a_cp() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start_with(&stores, &hub, of_mode(Mode::Sync)).await;
        let sessions = hub.seen().connections;
        filer.reload(loose(), HOUR);
        until("in force", || filer.status().policy == loose()).await;
        assert_eq!((hub.policy(), hub.applied().0), (Some(loose()), 0));
        assert_eq!(hub.seen().connections, sessions + 1, "one Hello tells it");
        filer.reload(of_mode(Mode::Sync), HOUR);
        until("back", || filer.status().policy == of_mode(Mode::Sync)).await;
        filer.stop().await.unwrap();
        drop(filer);
        let filer = start(&stores, &hub).await;
        assert_eq!(filer.status().policy, of_mode(Mode::Sync), "nothing is left over");
        filer.stop().await.unwrap();
    });
}

/// The interval is taken at once.
#[test]
fn a_shorter_interval_is_taken_at_once() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        filer.reload(promise(Apply::Reference), Duration::from_millis(50));
        until("a CP is made", || hub.applied().0 > 0).await;
        filer.stop().await.unwrap();
    });
}
