//! A source that loses its hub, its power, its devices.

use super::*;
use crate::device::sim::{Chance, Effect, On};
use crate::filer::status::SourceState;
use crate::filer::tests::life::change;
use crate::nbd::export::ErrorCode;
use crate::units::numbers::{CpNumber, SequenceNumber, VolumeNumber};

const VOL0: VolumeNumber = VolumeNumber(0);

/// The request has been taken in, and has no answer. That none comes can only be observed: for a
/// moment, from the time on at which it could come.
async fn is_waiting<T>(filer: &Filer, task: &tokio::task::JoinHandle<T>) -> bool {
    until("taken in", || filer.status().unacknowledged > 0 || task.is_finished()).await;
    tokio::time::sleep(Duration::from_millis(60)).await;
    !task.is_finished() && filer.status().unacknowledged > 0
}

/// Neither end alone makes an acknowledgement: held at the hub, or held by the own device.
#[test]
fn a_write_waits_for_both_ends() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "vol0").await;
        hub.control(|control| control.hold_acks = true);
        let own = Arc::clone(&export);
        let task = tokio::spawn(async move { write(&own, 0, &[1; 4096]).await });
        until("own commit", || filer.status().own_durable.0 == 1).await;
        assert!(is_waiting(&filer, &task).await, "the hub does not hold it");
        assert_eq!(filer.status().unacknowledged, 1);
        hub.control(|control| control.hold_acks = false);
        task.await.unwrap().unwrap();

        stores.nvram.hold();
        let own = Arc::clone(&export);
        let task = tokio::spawn(async move { write(&own, 0, &[2; 4096]).await });
        until("the hub's ack", || filer.status().hub_durable.0 == 2).await;
        assert!(is_waiting(&filer, &task).await, "the own ring does not hold it");
        // A flush waits for it as well, reads see it.
        let own = Arc::clone(&export);
        let flush = tokio::spawn(async move { own.flush().await });
        assert!(is_waiting(&filer, &flush).await);
        assert_eq!(read(&export, 0, 10).await, [2; 10]);
        stores.nvram.let_go();
        task.await.unwrap().unwrap();
        flush.await.unwrap().unwrap();
        filer.stop().await.unwrap();
    });
}

/// R17: the first failed log write is final for writes, flush and FUA, with its reason.
#[test]
fn after_a_failed_log_write_nothing_is_acknowledged() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        stores.nvram.fail(On::WriteDurable, 0, Effect::Errno(5));
        let error = write(&export, 0, &[2; 4096]).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Io);
        assert!(error.message.contains("NVRAM failed"), "{error}");
        assert_eq!(export.flush().await.unwrap_err().code, ErrorCode::Io);
        let fua = export.write(0, Bytes::from_static(&[3; 9]), true).await;
        assert_eq!(fua.unwrap_err().code, ErrorCode::Io);
        assert_eq!(export.trim(0, 100, true).await.unwrap_err().code, ErrorCode::Io);
        let status = filer.status();
        assert_eq!(status.state, SourceState::Faulted);
        assert!(status.reason.contains("NVRAM failed"));
        assert!(filer.checkpoint().await.is_err());
        // What was durable can still be read.
        assert_eq!(read(&export, 8192, 10).await, [0; 10]);
    });
}

#[test]
fn a_failed_pool_fails_the_source_with_its_reason() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        stores.pool.fail(On::Flush, 0, Effect::Errno(5));
        let failed = filer.checkpoint().await.unwrap_err().to_string();
        assert!(failed.contains("own pool failed"), "{failed}");
        assert_eq!(write(&export, 0, &[2; 4096]).await.unwrap_err().code, ErrorCode::Io);
        assert_eq!(hub.applied(), CpNumber(0), "the hub is never ahead (R6)");
        // The acknowledged write is there after a restart.
        drop(filer);
        let filer = start(&stores.cut(3), &hub).await;
        assert_eq!(read(&open(&filer, "vol0").await, 0, 10).await, [1; 10]);
    });
}

/// A hub that is away makes clients wait; nobody sees an error.
#[test]
fn a_break_of_the_hub_is_waited_out() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = start(&Stores::new(), &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        hub.control(|control| control.away = true);
        hub.hang_up();
        until("the loss is seen", || filer.status().state == SourceState::Offline).await;
        let own = Arc::clone(&export);
        let task = tokio::spawn(async move { write(&own, 4096, &[2; 4096]).await });
        assert!(is_waiting(&filer, &task).await);
        assert_eq!(read(&export, 4096, 4).await, [2; 4], "reads go on");
        assert!(filer.status().reason.len() > 5);
        hub.control(|control| control.away = false);
        task.await.unwrap().unwrap();
        assert_eq!(filer.status().state, SourceState::InSync);
        filer.stop().await.unwrap();
    });
}

/// The connection breaks when the n-th message of each kind comes; a life goes on over it.
#[test]
fn a_connection_that_breaks_anywhere_changes_nothing() {
    for name in ["Transfer", "PartitionFull", "Updates", "CpEnd"] {
        for nth in 1..=2 {
            runtime().block_on(async {
                let hub = Hub::start(4 << 20).await;
                let filer = start(&Stores::new(), &hub).await;
                let export = open(&filer, "vol0").await;
                let mut image = vec![0; VOLUME_BYTES];
                let mut chance = Chance::new(nth.into());
                hub.control(|control| control.break_at = Some((name, nth)));
                for round in 1..=3_u32 {
                    for _ in 0..8 {
                        change(&mut chance, &export, &mut image).await;
                    }
                    let (cp, _) = filer.checkpoint().await.unwrap();
                    assert_eq!(cp, CpNumber(round), "{name} {nth}");
                    assert_eq!(hub.lock().images[&VOL0], image, "{name} {nth}");
                }
                assert!(hub.seen().connections >= 2, "{name} {nth} did not happen");
                assert_eq!(hub.seen().rejected, 0);
                hub.lock().assert_line();
                filer.stop().await.unwrap();
            });
        }
    }
}

/// A tiny NVRAM and a hub that takes no CP: writes wait, none is lost, all end well afterwards.
#[test]
fn back_pressure_makes_writes_wait_and_loses_none() {
    for stall in ["acks", "cps"] {
        runtime().block_on(async {
            let hub = Hub::start(4 << 20).await;
            let filer = Arc::new(start(&Stores::sized(1 << 20), &hub).await);
            let set = |on: bool| {
                hub.control(|control| match stall {
                    "acks" => control.hold_acks = on,
                    _ => control.hold_cps = on,
                });
            };
            set(true);
            let mut tasks = Vec::new();
            for n in 0..128_u8 {
                let export = open(&filer, "vol0").await;
                tasks.push(tokio::spawn(async move {
                    write(&export, usize::from(n) * 8000, &[n + 1; 16384]).await
                }));
            }
            until("a full NVRAM", || filer.status().order.waiting > 0).await;
            let stuck = filer.status();
            assert!(stuck.order.open_bytes <= stuck.order.partition_bytes);
            assert!(stuck.order.frozen_cp.is_some());
            until("a freeze", || filer.status().counters.checkpoints_full >= 1).await;
            assert!(tasks.iter().any(|task| !task.is_finished()));
            set(false);
            for task in tasks {
                task.await.unwrap().unwrap();
            }
            filer.checkpoint().await.unwrap();
            let export = open(&filer, "vol0").await;
            assert_eq!(read_all(&export).await, hub.lock().images[&VOL0]);
            let sum: usize = hub.lock().history.iter().map(|t| t.entries().len()).sum();
            assert_eq!(sum, 128);
            assert_eq!(hub.seen().rejected, 0);
            filer.stop().await.unwrap();
        });
    }
}

/// R18: more random blocks than the pool has room for: writes wait, trims make room.
#[test]
fn a_full_pool_makes_writes_wait_until_there_is_room() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let mut big = behaviour(&hub, Apply::Reference);
        big.wanted.volumes = vec![("vol0".parse().unwrap(), ByteCount(16 << 20))];
        let filer = try_start(&stores, big).await.unwrap();
        filer.served().await;
        let export = open(&filer, "vol0").await;
        let own = Arc::clone(&export);
        let task = tokio::spawn(async move {
            for n in 0..36_usize {
                write(&own, n << 18, &[7; 256 << 10]).await.unwrap();
            }
        });
        // Nothing moves any more, and something waits.
        let mut before = (0, 0);
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let status = filer.status();
            let now = (status.order.sequence.0, status.common_cp.unwrap_or_default().0);
            if now == before && status.order.waiting == 1 {
                break;
            }
            before = now;
        }
        assert_eq!(filer.status().state, SourceState::InSync);
        let space = filer.status().space.unwrap();
        assert!(space.free.0 >= space.reserve.0, "the reserve is kept: {space:?}");
        // Trims pass, draw on the reserve, and give the room back with the next CP.
        export.trim(0, 5 << 20, false).await.unwrap();
        assert!(!task.is_finished());
        filer.checkpoint().await.unwrap();
        tokio::time::timeout(Duration::from_secs(20), task).await.unwrap().unwrap();
        filer.stop().await.unwrap();
    });
}

/// R19: refused once a CP is sent again, refused twice it is sent all inline, then a newer one is
/// offered for comparison; if that is refused as well nothing is tried before there is a newer CP.
#[test]
fn a_refused_cp_is_sent_inline_and_then_compared() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let filer = start(&Stores::new(), &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 8192]).await.unwrap();
        hub.control(|control| control.reject = 2);
        assert_eq!(filer.checkpoint().await.unwrap().0, CpNumber(1));
        let seen = hub.seen();
        assert_eq!((seen.rejected, seen.references, seen.inline), (2, 4, 2));
        write(&export, 0, &[2; 8192]).await.unwrap();
        hub.control(|control| control.reject = 9);
        let error = filer.checkpoint().await.unwrap_err().to_string();
        assert!(error.contains("refused also by comparison"), "{error}");
        let status = filer.status();
        assert_eq!(status.state, SourceState::Faulted);
        assert!(status.next_step.contains("verify"));
        assert_eq!(status.counters.checkpoints_rejected, 6, "two before, four now");
        assert_eq!(hub.seen().rejected, 6, "each is counted");
        assert_eq!(hub.seen().published, 1);
        // Asked for, there is a newer CP, and one more try.
        let error = filer.checkpoint().await.unwrap_err().to_string();
        assert!(error.contains("CP 4 was refused"), "{error}");
        assert_eq!(hub.seen().rejected, 7);
    });
}

/// R1: what the hub holds beyond the own ring is fetched and replayed before anybody is served.
#[test]
fn a_lost_tail_comes_back_from_the_hub() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        stores.nvram.hold();
        let own = Arc::clone(&export);
        let task = tokio::spawn(async move { write(&own, 4096, &[2; 4096]).await });
        until("the hub has it", || hub.lock().history.len() == 2).await;
        drop(filer);
        // The held call is lost with the power.
        let stores = stores.cut(0);
        assert!(task.await.unwrap().is_err());
        // The hub is away: nobody is served before it was asked.
        hub.control(|control| control.away = true);
        let filer = try_start(&stores, behaviour(&hub, Apply::Reference)).await.unwrap();
        let refused = filer.exports().open("vol0").await.err().unwrap().to_string();
        assert!(refused.contains("waits for its hub"), "{refused}");
        assert_eq!(filer.status().state, SourceState::Waiting);
        hub.control(|control| control.away = false);
        filer.served().await;
        assert_eq!(filer.status().counters.transfers_adopted, 1);
        let export = open(&filer, "vol0").await;
        assert_eq!(read(&export, 4096, 4096).await, [2; 4096]);
        // It is durable here too: the next restart has it without the hub.
        drop(filer);
        let filer = start(&stores.cut(1), &hub).await;
        assert_eq!(filer.status().counters.transfers_adopted, 0);
        filer.checkpoint().await.unwrap();
        let export = open(&filer, "vol0").await;
        assert_eq!(read_all(&export).await, hub.lock().images[&VOL0]);
        hub.lock().assert_line();
    });
}

/// A missing NVRAM is no first start. Accepted, the hub's log is the longer tail (R1).
#[test]
fn a_lost_nvram_is_refused_and_then_refilled() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "vol0").await;
        let mut image = vec![0; VOLUME_BYTES];
        let mut chance = Chance::new(5);
        for _ in 0..10 {
            change(&mut chance, &export, &mut image).await;
        }
        filer.checkpoint().await.unwrap();
        for _ in 0..10 {
            change(&mut chance, &export, &mut image).await;
        }
        drop(filer);
        let lost = Stores { nvram: Stores::new().nvram, pool: stores.cut(1).pool };
        let again = |accept, new| {
            let mut behaviour = behaviour(&hub, Apply::Reference);
            behaviour.wanted.accept_lost_nvram = accept;
            let nvram = store(&lost.nvram, new);
            Filer::start_on(behaviour, nvram, store(&lost.pool, false))
        };
        for new in [true, false] {
            let refused = again(false, new).await.unwrap_err().to_string();
            assert!(refused.contains("accept-lost-nvram"), "{refused}");
        }
        let filer = again(true, false).await.unwrap();
        filer.served().await;
        assert!(filer.status().counters.transfers_adopted > 0);
        assert_eq!(read_all(&open(&filer, "vol0").await).await, image);
        filer.checkpoint().await.unwrap();
        assert_eq!(hub.lock().images[&VOL0], image);
        filer.stop().await.unwrap();
    });
}

/// A CP that only the source has published is sent without its log: the image is its past (R4).
#[test]
fn a_lost_nvram_with_an_unpublished_cp_is_sent_by_a_pass() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        hub.control(|control| (control.break_at, control.away) = (Some(("CpEnd", 1)), true));
        let asked = tokio::spawn(filer.checkpoint());
        until("the own commit", || filer.status().own_cp == CpNumber(1)).await;
        until("the loss", || filer.status().state == SourceState::Offline).await;
        drop((asked, filer));
        hub.control(|control| control.away = false);
        assert_eq!(hub.applied(), CpNumber(0));
        let lost = Stores { nvram: Stores::new().nvram, pool: stores.cut(1).pool };
        let mut accept = behaviour(&hub, Apply::Reference);
        accept.wanted.accept_lost_nvram = true;
        let filer = try_start(&lost, accept).await.unwrap();
        until("the image is there", || hub.applied() == CpNumber(1)).await;
        until("in sync", || filer.status().state == SourceState::InSync).await;
        assert!(filer.status().serving);
        let export = open(&filer, "vol0").await;
        assert_eq!(read(&export, 0, 4096).await, [1; 4096]);
        filer.stop().await.unwrap();
    });
}

/// A hub that takes nothing and says nothing is a lost hub: the connection is made anew.
#[test]
fn a_silent_hub_is_dropped_and_met_again() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let mut impatient = behaviour(&hub, Apply::Reference);
        impatient.wanted.policy.hub_timeout = Duration::from_millis(500);
        let filer = try_start(&Stores::new(), impatient).await.unwrap();
        filer.served().await;
        hub.control(|control| control.deaf = true);
        let export = open(&filer, "vol0").await;
        let task = tokio::spawn(async move { write(&export, 0, &[1; 4096]).await });
        until("the loss is seen", || filer.status().state == SourceState::Offline).await;
        assert!(filer.status().reason.contains("silent"), "{}", filer.status().reason);
        assert!(!task.is_finished());
        hub.control(|control| control.deaf = false);
        task.await.unwrap().unwrap();
        assert!(hub.seen().connections >= 2);
        filer.stop().await.unwrap();
    });
}

/// A `hub_timeout` below the pause between heartbeats does not cut an idle connection.
#[test]
fn an_idle_connection_with_a_short_timeout_stays() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let mut impatient = behaviour(&hub, Apply::Reference);
        impatient.wanted.policy.hub_timeout = Duration::from_millis(400);
        let filer = try_start(&Stores::new(), impatient).await.unwrap();
        filer.served().await;
        let (before, since) = (hub.seen().connections, filer.status().uptime);
        until("four timeouts pass", || filer.status().uptime > since + Duration::from_millis(1600))
            .await;
        assert_eq!(hub.seen().connections, before);
        assert_eq!(filer.status().state, SourceState::InSync);
        filer.stop().await.unwrap();
    });
}

/// A hub that asks without end and does not read is left: what waits for it is bounded.
#[test]
fn a_hub_that_floods_is_left() {
    use crate::wire::message::{Frame, Message, Ping};
    runtime().block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hub = Hub::start(4 << 20).await;
        let mut wrong = behaviour(&hub, Apply::Reference);
        wrong.forward.hub = listener.local_addr().unwrap();
        wrong.forward.backoff.most = Duration::from_secs(3600);
        wrong.forward.backoff.least = Duration::from_secs(3600);
        let filer = try_start(&Stores::new(), wrong).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let ping = Message::Ping(Ping { sequence: SequenceNumber(0), token: 1 });
        let pings = Frame::new(&ping, Bytes::new()).head.repeat(4096);
        let mut written = 0;
        loop {
            stream.writable().await.unwrap();
            match stream.try_write(&pings) {
                Ok(count) => written += count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
            assert!(written < 64 << 20, "{written} bytes of questions were taken");
        }
        until("left", || filer.status().reason.contains("asks more than it reads")).await;
        drop(filer);
    });
}

/// Stores of two histories are refused: an older copy of the pool, or of the NVRAM.
#[test]
fn stores_of_different_ages_are_refused() {
    runtime().block_on(async {
        let hub = Hub::start(4 << 20).await;
        let stores = Stores::new();
        let filer = start(&stores, &hub).await;
        let export = open(&filer, "vol0").await;
        write(&export, 0, &[1; 4096]).await.unwrap();
        filer.checkpoint().await.unwrap();
        let old = (stores.nvram.image(), stores.pool.image());
        for _ in 0..2 {
            write(&export, 0, &[2; 4096]).await.unwrap();
            filer.checkpoint().await.unwrap();
        }
        write(&export, 0, &[3; 4096]).await.unwrap();
        drop(filer);
        let new = stores.cut(0);
        let device = |name: &str, image| Arc::new(SimDevice::from_image(name, image));
        let mixed = [
            Stores { nvram: device("nvram", old.0), pool: Arc::clone(&new.pool) },
            Stores { nvram: Arc::clone(&new.nvram), pool: device("pool", old.1) },
        ];
        for stores in mixed {
            let refused = try_start(&stores, behaviour(&hub, Apply::Reference)).await;
            let refused = refused.unwrap_err().to_string();
            assert!(refused.contains("do not belong together"), "{refused}");
        }
        assert_eq!(read(&open(&start(&new, &hub).await, "vol0").await, 0, 3).await, [3; 3]);
    });
}

const OPERATIONS: u8 = 7;
const SPAN: usize = 30_000;

/// Writes that lie apart, with CPs between; which were acknowledged, and the source if it started.
async fn scenario(stores: &Stores, hub: &Hub) -> (Vec<bool>, Option<Filer>) {
    let mut acknowledged = vec![false; usize::from(OPERATIONS)];
    let Ok(filer) = try_start(stores, behaviour(hub, Apply::Reference)).await else {
        return (acknowledged, None);
    };
    let served = async {
        filer.served().await;
        true
    };
    let failed = until("served or failed", || {
        filer.status().serving || filer.status().state == SourceState::Faulted
    });
    tokio::select! { _ = served => {}, () = failed => {} }
    let Ok(export) = filer.exports().open("vol0").await else {
        return (acknowledged, Some(filer));
    };
    for n in 0..OPERATIONS {
        let at = usize::from(n) * SPAN + 100;
        acknowledged[usize::from(n)] = write(&export, at, &[n + 1; 20_000]).await.is_ok();
        if n % 3 == 2 {
            // May fail with the device; what it says is not the point here.
            drop(filer.checkpoint().await);
        }
    }
    (acknowledged, Some(filer))
}

/// Power is cut at the n-th write or flush of the NVRAM or of the pool, for all n of a life with
/// restart: no acknowledged write is lost or torn, and the roots meet again.
#[test]
fn a_power_cut_at_any_write_loses_nothing_acknowledged() {
    for which in ["nvram", "pool"] {
        for nth in 0.. {
            let seed = nth * 7 + 1;
            let happened = runtime().block_on(cut_at(which, nth, seed));
            if !happened {
                assert!(nth > 5, "the life of {which} has more than {nth} writes");
                break;
            }
        }
    }
}

async fn cut_at(which: &str, nth: u64, seed: u64) -> bool {
    let hub = Hub::start(4 << 20).await;
    let stores = Stores::new();
    let device = if which == "nvram" { &stores.nvram } else { &stores.pool };
    device.fail_change(nth, Effect::PowerCut);
    let (acknowledged, filer) = Box::pin(scenario(&stores, &hub)).await;
    drop(filer);
    let happened = device.forget_faults() == 0;
    let stores = stores.cut(seed);
    let filer = start(&stores, &hub).await;
    let export = open(&filer, "vol0").await;
    let image = read_all(&export).await;
    for (n, acknowledged) in (0..OPERATIONS).zip(acknowledged) {
        let at = usize::from(n) * SPAN + 100;
        let part = &image[at..at + 20_000];
        let whole = part.iter().all(|byte| *byte == n + 1);
        let none = part.iter().all(|byte| *byte == 0);
        assert!(whole || !acknowledged && none, "{which} {nth} seed {seed}: write {n} is lost");
    }
    write(&export, 0, &[99; 50]).await.unwrap();
    filer.checkpoint().await.unwrap();
    assert_eq!(read_all(&export).await, hub.lock().images[&VOL0], "{which} {nth}");
    assert_eq!(hub.seen().rejected, 0, "{which} {nth}");
    hub.lock().assert_line();
    filer.stop().await.unwrap();
    happened
}

/// The same with one failed call instead of a cut: nothing is acknowledged after it that is not
/// kept, and status says why.
#[test]
fn a_failed_call_at_any_write_is_final_and_loses_nothing() {
    for which in ["nvram", "pool"] {
        for effect in [Effect::Errno(28), Effect::Errno(5), Effect::Short(512)] {
            for nth in 0.. {
                let happened = runtime().block_on(fail_at(which, nth, effect));
                if !happened {
                    assert!(nth > 5, "the life of {which} has more than {nth} writes");
                    break;
                }
            }
        }
    }
}

async fn fail_at(which: &str, nth: u64, effect: Effect) -> bool {
    let hub = Hub::start(4 << 20).await;
    let stores = Stores::new();
    let device = if which == "nvram" { &stores.nvram } else { &stores.pool };
    device.fail_change(nth, effect);
    let (acknowledged, filer) = Box::pin(scenario(&stores, &hub)).await;
    let happened = device.forget_faults() == 0;
    if let Some(filer) = filer.filter(|_| happened) {
        let what = format!("{which} {nth} {effect:?}");
        until(&format!("{what}: faulted"), || filer.status().state == SourceState::Faulted).await;
        let reason = filer.status().reason;
        assert!(reason.contains(which), "{what}: status says why: {reason}");
        assert!(acknowledged.is_sorted_by(|a, b| a >= b), "{what}: {acknowledged:?}");
        if let Ok(export) = filer.exports().open("vol0").await {
            assert!(write(&export, 0, &[1; 4096]).await.is_err(), "{what}: it is final");
        }
    }
    let filer = start(&stores.cut(nth), &hub).await;
    let image = read_all(&open(&filer, "vol0").await).await;
    for (n, acknowledged) in (0..OPERATIONS).zip(acknowledged) {
        let at = usize::from(n) * SPAN + 100;
        let whole = image[at..at + 20_000].iter().all(|byte| *byte == n + 1);
        assert!(whole || !acknowledged, "{which} {nth}: write {n} is lost");
    }
    filer.checkpoint().await.unwrap();
    assert_eq!(image, hub.lock().images[&VOL0], "{which} {nth}");
    filer.stop().await.unwrap();
    happened
}
