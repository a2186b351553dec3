//! What a source was asked to promise decides when a write is answered (section 9).

use super::*;
use crate::device::sim::{Effect, On};
use crate::filer::completion::Gate;
use crate::nbd::export::ErrorCode;
use crate::units::policy::{Cache, LagLimit, Mode};

async fn start_with(stores: &Stores, hub: &Hub, policy: Policy) -> Filer {
    let mut behaviour = behaviour(hub, Apply::Reference);
    behaviour.wanted.policy = policy;
    let filer = try_start(stores, behaviour).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), filer.served()).await.unwrap();
    filer
}

fn promise_of(mode: Mode, cache: Cache) -> Policy {
    let lag_limit = LagLimit { bytes: ByteCount(10_000), time: Duration::from_secs(3600) };
    Policy { mode, cache, lag_limit, ..promise(Apply::Reference) }
}

fn spawn_write(
    export: &Arc<dyn Export>,
    byte: u8,
    fua: bool,
) -> tokio::task::JoinHandle<Result<(), ExportError>> {
    let export = Arc::clone(export);
    tokio::spawn(async move { export.write(0, Bytes::from(vec![byte; 4096]), fua).await })
}

async fn waits<T>(task: &tokio::task::JoinHandle<T>) -> bool {
    tokio::time::sleep(Duration::from_millis(60)).await;
    !task.is_finished()
}

/// Writeback answers what is buffered; flush and FUA wait as a write does under writethrough,
/// which is the negative control.
#[test]
fn under_writeback_only_flush_and_fua_wait() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start_with(&stores, &hub, promise_of(Mode::Sync, Cache::Writeback)).await;
        let export = open(&filer, "vol0").await;
        let other = open(&filer, "vol0").await;
        hub.control(|control| control.hold_acks = true);
        write(&export, 0, &[1; 4096]).await.unwrap();
        export.trim(8192, 4096, false).await.unwrap();
        export.write_zeroes(8192, 4096, false, false).await.unwrap();
        assert_eq!(read(&other, 0, 4096).await, [1; 4096], "it is read at once");
        // A flush on any connection covers it (R17).
        let flush = tokio::spawn(async move { other.flush().await });
        assert!(waits(&flush).await, "the hub does not hold it");
        let fua = spawn_write(&export, 2, true);
        assert!(waits(&fua).await);
        hub.control(|control| control.hold_acks = false);
        flush.await.unwrap().unwrap();
        fua.await.unwrap().unwrap();
        filer.stop().await.unwrap();

        let through = promise_of(Mode::Sync, Cache::Writethrough);
        let filer = start_with(&stores, &hub, through).await;
        let export = open(&filer, "vol0").await;
        hub.control(|control| control.hold_acks = true);
        let plain = spawn_write(&export, 3, false);
        assert!(waits(&plain).await, "the negative control");
        hub.control(|control| control.hold_acks = false);
        plain.await.unwrap().unwrap();
        filer.stop().await.unwrap();
    });
}

/// R17: a buffered write that was answered and is lost shows in every later flush.
#[test]
fn under_writeback_a_failed_log_write_fails_every_later_flush() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start_with(&stores, &hub, promise_of(Mode::Async, Cache::Writeback)).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        export.flush().await.unwrap();
        stores.nvram.fail(On::WriteDurable, 0, Effect::Errno(5));
        // Answered when buffered; the ring may have failed even before that was said.
        if let Err(error) = write(&export, 0, &[2; 4096]).await {
            assert_eq!(error.code, ErrorCode::Io);
        }
        for _ in 0..3 {
            let error = export.flush().await.unwrap_err();
            assert_eq!(error.code, ErrorCode::Io);
            assert!(error.message.contains("NVRAM failed"), "{error}");
        }
        let later = write(&export, 0, &[3; 4096]).await;
        assert_eq!(later.unwrap_err().code, ErrorCode::Io, "nothing more is buffered");
    });
}

/// `async` needs the own ring and nothing else.
#[test]
fn async_waits_for_the_own_ring_only() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start_with(&stores, &hub, promise_of(Mode::Async, Cache::Writethrough)).await;
        let export = open(&filer, "vol0").await;
        hub.control(|control| control.hold_acks = true);
        write(&export, 0, &[1; 4096]).await.unwrap();
        assert_eq!(filer.status().hub_durable.0, 0);
        assert_eq!(filer.shared().completion.answered_alone().0, 1);
        stores.nvram.hold();
        let own = spawn_write(&export, 2, false);
        assert!(waits(&own).await, "the own ring does not hold it");
        stores.nvram.let_go();
        own.await.unwrap().unwrap();
        hub.control(|control| control.hold_acks = false);
        // All of it reaches the hub, and both ends agree on the CP.
        let (cp, _) = filer.checkpoint().await.unwrap();
        assert_eq!(hub.applied(), cp);
        filer.stop().await.unwrap();
    });
}

/// `semi-sync` runs ahead of the hub by its limit, then waits until the hub has caught up.
#[test]
fn semi_sync_runs_ahead_by_its_limit() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let semi = promise_of(Mode::SemiSync, Cache::Writethrough);
        let filer = start_with(&stores, &hub, semi).await;
        assert_eq!(filer.shared().completion.figures().gate, Gate::Lag(semi.lag_limit));
        let export = open(&filer, "vol0").await;
        hub.control(|control| control.hold_acks = true);
        // Two transfers of somewhat more than 4 KiB are within 10,000 bytes, three are not.
        write(&export, 0, &[1; 4096]).await.unwrap();
        write(&export, 0, &[2; 4096]).await.unwrap();
        let third = spawn_write(&export, 3, false);
        assert!(waits(&third).await, "the hub lacks more than the limit");
        hub.control(|control| control.hold_acks = false);
        third.await.unwrap().unwrap();
        assert_eq!(filer.shared().completion.answered_alone().0, 0, "never alone");
        filer.stop().await.unwrap();
    });
}

/// A held gate answers neither writes nor reads; it opens without an error for either.
#[test]
fn while_held_neither_writes_nor_reads_are_answered() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start_with(&stores, &hub, promise_of(Mode::Sync, Cache::Writeback)).await;
        let export = open(&filer, "vol0").await;
        filer.shared().completion.set_gate(Gate::Held);
        let held = spawn_write(&export, 1, false);
        let own = Arc::clone(&export);
        let read = tokio::spawn(async move { own.read(0, 4096).await.map(|_| ()) });
        assert!(waits(&held).await && waits(&read).await);
        filer.shared().completion.set_gate(Gate::Both);
        held.await.unwrap().unwrap();
        read.await.unwrap().unwrap();
        filer.stop().await.unwrap();
    });
}

/// What the source keeps about itself survives a CP and a restart, and goes with Hello.
#[test]
fn the_mark_of_being_alone_survives_a_cp_and_a_restart() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let mark = (filer.status().epoch, crate::units::numbers::SequenceNumber(7));
        let shared = filer.shared();
        let noted =
            tokio::task::spawn_blocking(move || shared.note(|kept| kept.alone = Some(mark)));
        noted.await.unwrap().unwrap();
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        filer.checkpoint().await.unwrap();
        assert_eq!(filer.status().alone, Some(mark));
        filer.stop().await.unwrap();
        drop((export, filer));
        // Without its hub nothing can take the mark away.
        hub.control(|control| control.away = true);
        let filer = try_start(&stores, behaviour(&hub, Apply::Reference)).await.unwrap();
        assert_eq!(filer.status().alone, Some(mark));
    });
}
