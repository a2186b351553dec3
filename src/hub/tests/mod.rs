//! The hub as a whole, in one process, against sources made by hand.

#![expect(clippy::wildcard_enum_match_arm, reason = "a test names the one message it wants")]

mod behind;
mod bounds;
mod doubts;
mod failback;
mod failover;
mod fake;
mod faults;
mod homes;
mod hostile;
mod keep_source;
mod kept;
mod limits;
mod newer;
mod overlay;
mod panics;
mod promises;
mod promoted;
mod replay;
mod restart;
mod resync;
mod seeds;
mod waits;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use self::fake::Fake;
use super::hooks::HookOptions;
use super::promoted::PromotedOptions;
use super::shared::SourceSetting;
use super::status::SourceState;
use super::{Hub, HubOptions};
use crate::record::entry::EntryKind;
use crate::units::hash::Root;
use crate::units::numbers::{BlockCount, ByteCount, CpNumber, Vbn};
use crate::volume::check::{Depth, check};
use crate::wire::message::{Message, RefusedCode, Scanned, VolumeScan};

fn options(dir: &Path, names: &[&str]) -> HubOptions {
    HubOptions {
        data_dir: dir.to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        nvram: (dir.join("nvram"), ByteCount(16 << 20)),
        realtime: false,
        log_dir: dir.join("logs"),
        pool: crate::raid::files::PoolFiles::plain(dir.join("disk0"), ByteCount(128 << 20)),
        sources: names
            .iter()
            .map(|name| SourceSetting {
                name: name.parse().unwrap(),
                nvram_share: None,
                log_limit: None,
                space_limit: None,
                bandwidth_limit: None,
                join_by: None,
                certificates: vec![],
                volumes: vec![],
                keep: None,
            })
            .collect(),
        image_pin: Duration::from_secs(3600),
        appliers: 2,
        arbiters: 2,
        hooks: HookOptions::default(),
        promoted: PromotedOptions { nvram_size: ByteCount(8 << 20), ..PromotedOptions::default() },
    }
}

fn in_system<F: Future<Output = ()>>(test: F) {
    actix::System::new().block_on(test);
}

/// A hub with two sources in session.
async fn hub_of_two(dir: &Path) -> (Hub, Fake, Fake) {
    let hub = Hub::start(options(dir, &["a", "b"])).await.unwrap();
    let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
    a.welcomed(hub.address()).await;
    b.welcomed(hub.address()).await;
    (hub, a, b)
}

/// Starts a hub where one was stopped: it has let go of its files.
async fn start_again(options: HubOptions) -> Hub {
    Hub::start(options).await.unwrap()
}

async fn until(what: &str, done: impl FnMut() -> bool) {
    until_within(Duration::from_secs(20), what, done).await;
}

async fn until_within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn log_files(dir: &Path, source: &Fake) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir.join("logs").join(source.id.to_string())) else {
        return vec![];
    };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "log"));
    files.sort();
    files
}

fn image_root(hub: &Hub, source: &Fake) -> Root {
    let (volumes, problems) = hub
        .shared()
        .scan(&source.name.parse().unwrap(), CpNumber(source.cp.0 - 1), |_, _, _| {})
        .unwrap();
    assert_eq!(problems, Vec::<String>::new());
    volumes[0].root.unwrap()
}

/// Room of the ring is free once the log is synced, without a CP, and not before.
#[test]
fn room_of_the_ring_is_free_behind_the_sync_of_the_log() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, mut b) = hub_of_two(dir.path()).await;
        a.put(0, 1).await;
        a.acked().await;
        b.put(0, 2).await;
        b.acked().await;
        let lane = |name: &str| hub.shared().lanes.get(&name.parse().unwrap()).unwrap();
        let (of_a, of_b) = (lane("a"), lane("b"));
        until("both are drained", || {
            of_a.cursors().drained == a.last && of_b.cursors().drained == b.last
        })
        .await;
        assert!(of_a.cursors().ring_bytes > 0 && of_b.cursors().ring_bytes > 0, "not synced");
        assert_ne!(of_a.cursors().synced, a.last);
        of_a.set_files(true);
        hub.shared().drain.file();
        until("the room is free", || of_a.cursors().ring_bytes == 0).await;
        let cursors = of_a.cursors();
        assert_eq!((cursors.synced, cursors.applied_cp), (a.last, CpNumber(0)), "no CP");
        assert!(of_b.cursors().ring_bytes > 0, "whose log was not synced keeps its room");
        assert_eq!(log_files(dir.path(), &a).len(), 1, "what was released lies in the log");
        hub.stop().await;
    });
}

/// The ladder with two sources, step by step (issue text).
#[test]
fn the_ladder() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, mut b) = hub_of_two(dir.path()).await;
        let of_b = b.put(3, 9).await;
        b.acked().await;
        let first = a.put(0, 1).await;
        a.acked().await;
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        let ring = hub.shared().stager.ring().unwrap();
        assert!(lane.cursors().durable == a.last, "acknowledged, so durable in the ring");
        until("a is drained", || lane.cursors().drained == a.last).await;
        assert_eq!(hub.shared().store.last(a.id), Some(a.last), "in the file of its source");
        assert_eq!(hub.shared().store.last(b.id), Some(b.last));
        assert_eq!(log_files(dir.path(), &a).len(), 1);
        assert!(lane.cursors().ring_bytes > 0, "not synced, not published: its room is not free");
        assert_eq!(ring.status().release_wanted.0, 0);
        // The CP of partition A is under way while new writes go to the file of B.
        let old = log_files(dir.path(), &a);
        let bytes = a.updates(&[(0, first)]).await;
        let root = a.root();
        let place = a.last;
        a.cp = a.cp.next();
        let second = a.put(1, 2).await;
        a.acked().await;
        until("B is drained", || lane.cursors().drained == a.last).await;
        let both = log_files(dir.path(), &a);
        assert_eq!(both.len(), 2, "two partitions, two files");
        let file_b = both.iter().find(|file| !old.contains(file)).unwrap().clone();
        let content_b = std::fs::read(&file_b).unwrap();
        let end = {
            let Message::CpEnd(mut end) = a.end(bytes, root) else { unreachable!() };
            end.cp = CpNumber(1);
            end.place = place.into();
            Message::CpEnd(end)
        };
        a.send(&end, Bytes::new()).await;
        assert!(matches!(a.other().await, Some(Message::CpDone(done)) if done.cp == CpNumber(1)));
        until("the file of A is gone", || log_files(dir.path(), &a) == [file_b.clone()]).await;
        assert_eq!(std::fs::read(&file_b).unwrap(), content_b, "the file of B is untouched");
        assert_eq!(hub.shared().store.last(b.id), Some(b.last), "the other source is untouched");
        assert!(matches!(a.checkpoint(&[(1, second)]).await, Message::CpDone(_)));
        assert_eq!(image_root(&hub, &a), a.root());
        assert!(matches!(b.checkpoint(&[(3, of_b)]).await, Message::CpDone(_)));
        assert_eq!(image_root(&hub, &b), b.root());
        until("all room is free", || lane.cursors().ring_bytes == 0).await;
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        hub.stop().await;
    });
}

/// The labels of a log count after a restart: no CP number is used twice (R6).
#[test]
fn a_restart_remembers_the_label_of_the_last_transfer() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        a.cp = CpNumber(7);
        a.put(0, 1).await;
        a.acked().await;
        let name = "a".parse().unwrap();
        hub.stop().await;
        drop(hub);
        let hub = start_again(options(dir.path(), &["a"])).await;
        assert_eq!(hub.shared().known(&name).unwrap().cp_max, CpNumber(6));
        hub.stop().await;
    });
}

/// Goal: a hub whose pool is at its reserve comes out of that by itself. Method: all else is
/// promised away; the CP of a trim takes nodes and gives back blocks.
#[test]
fn a_full_pool_publishes_a_cp_that_frees() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let filled = a.write(0, 1, 60);
        a.send_transfer(&filled).await;
        a.acked().await;
        let done = a.checkpoint_with(|runs| runs.reference(Vbn(0), 60, filled.id(), 0)).await;
        assert!(matches!(done, Message::CpDone(_)), "{done:?}");
        let pool = &hub.shared().pool;
        let before = pool.space().unwrap();
        let all = before.free.0 - before.held.0 - before.reserve.0;
        let held = pool.reserve(BlockCount(all)).unwrap();
        assert!(pool.reserve(BlockCount(1)).is_err());
        let trim = a.entries(&[(EntryKind::Trim, 0, vec![0; 40 * 4096])]);
        a.send_transfer(&trim).await;
        a.acked().await;
        let done = a.checkpoint_with(|runs| runs.hole(Vbn(0), 40)).await;
        assert!(matches!(done, Message::CpDone(_)), "{done:?}");
        drop(held);
        assert!(pool.space().unwrap().free.0 > before.free.0 + 30);
        assert_eq!(image_root(&hub, &a), a.root());
        let report = check(pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        hub.stop().await;
    });
}

#[test]
fn a_wrong_root_is_refused_and_the_old_image_stays() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let first = a.put(0, 1).await;
        a.acked().await;
        assert!(matches!(a.checkpoint(&[(0, first)]).await, Message::CpDone(_)));
        let good = a.root();
        let second = a.put(1, 2).await;
        a.acked().await;
        let bytes = a.updates(&[(1, second)]).await;
        let wrong = a.end(bytes, Root([1; 32]));
        a.send(&wrong, Bytes::new()).await;
        let Some(Message::CpRejected(no)) = a.other().await else { panic!("not refused") };
        assert_eq!(no.differs.unwrap().root, a.root(), "the hub names the root it has built");
        assert_eq!(image_root(&hub, &a), good);
        let state = hub.snapshots()[0].state;
        assert_eq!(state, SourceState::Behind);
        // The same again, with the right root, is taken.
        assert!(matches!(a.checkpoint(&[(1, second)]).await, Message::CpDone(_)));
        assert_eq!(image_root(&hub, &a), a.root());
        assert_eq!(hub.snapshots()[0].totals.rejected, 1);
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        hub.stop().await;
    });
}

/// A panic in one source's actor: it is back, the other source's connection is not touched.
#[test]
fn a_panic_in_one_actor_stays_there() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, mut b) = hub_of_two(dir.path()).await;
        a.put(0, 1).await;
        a.acked().await;
        let name = "a".parse().unwrap();
        let entry = hub.shared().registry.get(&name).unwrap();
        let begin = Instant::now();
        assert!(entry.actor.send(super::actor::Panic).await.is_err());
        assert!(a.other().await.is_none(), "its connection is closed");
        until("the actor was replaced", || hub.shared().counters.restarts_of(&name) == 1).await;
        let welcome = loop {
            match a.connect(hub.address()).await {
                Message::Welcome(welcome) => break welcome,
                Message::Refused(refused) => assert_eq!(refused.code, RefusedCode::Busy),
                other => panic!("{other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(begin.elapsed() < Duration::from_secs(2));
        assert_eq!(welcome.last, a.last.into());
        b.put(0, 1).await;
        b.acked().await;
        assert_eq!(hub.shared().counters.restarts_of(&name), 1);
        assert_eq!(hub.shared().counters.restarts_of(&"b".parse().unwrap()), 0);
        hub.stop().await;
    });
}

#[test]
fn strangers_are_refused_with_their_reason() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let refused = |message| match message {
            Message::Refused(refused) => refused.code,
            other => panic!("{other:?} instead of Refused"),
        };
        let address = hub.address();
        let mut a = Fake::new("a");
        a.welcomed(address).await;
        let mut unknown = Fake::new("nobody");
        assert_eq!(refused(unknown.connect(address).await), RefusedCode::UnknownSource);
        let mut other = Fake::new("x");
        other.name = "a".to_owned();
        assert_eq!(refused(other.connect(address).await), RefusedCode::OtherSource);
        let mut clone = Fake::new("a");
        clone.generation.id = 99;
        assert_eq!(refused(clone.connect(address).await), RefusedCode::Generation);
        let mut version = Fake::new("a");
        let hello = crate::wire::message::Hello { version_min: 9, version: 9, ..version.hello() };
        assert_eq!(refused(version.connect_with(address, hello).await), RefusedCode::Version);
        let mut size = Fake::new("a");
        let mut hello = size.hello();
        hello.volumes[0].size = ByteCount(4096);
        assert_eq!(refused(size.connect_with(address, hello).await), RefusedCode::Volume);
        assert_eq!(hub.shared().counters.refusals().len(), 5);
        hub.stop().await;
    });
}

/// Goal: connections that say nothing keep no source out, not even for the length of a handshake.
/// Method: all places are taken by silent ones; a source is welcomed at once, the oldest silent
/// one is closed for it and the newest is not.
#[test]
fn silent_connections_make_room_for_a_source() {
    use tokio::io::AsyncReadExt;
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut silent = Vec::new();
        for _ in 0..crate::limits::HANDSHAKES_MAX {
            silent.push(tokio::net::TcpStream::connect(hub.address()).await.unwrap());
        }
        let mut a = Fake::new("a");
        let soon = Duration::from_secs(crate::limits::HANDSHAKE_SECONDS_MAX / 2);
        tokio::time::timeout(soon, a.welcomed(hub.address())).await.expect("at once");
        let oldest = tokio::time::timeout(soon, silent[0].read(&mut [0; 1])).await;
        assert!(matches!(oldest, Ok(Ok(0) | Err(_))), "the oldest has made room: {oldest:?}");
        let newest = silent.last_mut().unwrap();
        let mut byte = [0; 1];
        assert!(newest.try_read(&mut byte).is_err(), "only one had to make room");
        let busy = || hub.shared().counters.refusals().get("busy").copied();
        until("it is counted", || busy() == Some(1)).await;
        hub.stop().await;
    });
}

/// Goal: a source that comes again over a slow line has its time, whatever number of strangers comes meanwhile,
/// each of another address. Control: one that was never here is pushed out by them, as the oldest; but not by
/// strangers of one address, who take the places from each other.
#[test]
fn who_was_here_before_is_not_pushed_out_by_strangers() {
    use tokio::net::{TcpSocket, TcpStream};
    async fn from(host: [u8; 4], hub: std::net::SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((host, 0).into()).unwrap();
        socket.connect(hub).await.unwrap()
    }
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a", "b"])).await.unwrap();
        let (address, own, other) = (hub.address(), [127, 0, 0, 1], [127, 0, 0, 3]);
        let busy = || hub.shared().counters.refusals().get("busy").copied().unwrap_or(0);
        let mut a = Fake::new("a");
        a.welcomed(address).await;
        for (name, host, flood_of_one, comes) in [
            ("a", own, false, true),
            ("a", own, true, true),
            ("b", other, false, false),
            ("b", other, true, true),
        ] {
            let slow = from(host, address).await;
            let (before, mut flood) = (busy(), Vec::new());
            for last in 1..=3 * u8::try_from(crate::limits::HANDSHAKES_MAX).unwrap() {
                let host = if flood_of_one { [127, 0, 0, 2] } else { [127, 0, 7, last] };
                flood.push(from(host, address).await);
            }
            // All of them were met: only the last ones have a place.
            let met = 2 * u64::try_from(crate::limits::HANDSHAKES_MAX).unwrap();
            until("the flood is there", || busy() > before + met).await;
            let mut source = if name == "a" { a.twin() } else { Fake::new(name) };
            let hello = source.hello();
            let said = source.say_hello(slow, hello).await;
            let is_welcome = matches!(said, Some(Message::Welcome(_)));
            assert_eq!(
                is_welcome, comes,
                "{name} of {host:?}, flood of one: {flood_of_one}: {said:?}"
            );
            assert!(is_welcome || said.is_none(), "{said:?}");
            if name == "a" {
                a = source;
            }
        }
        hub.stop().await;
    });
}

/// Goal: a source that reads for another question, or has gone on, is no damage and no proof.
#[test]
fn a_source_that_has_not_read_is_asked_again_and_then_unproven() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let name = "a".parse().unwrap();
        let unheard = hub.verify(&name, |_, _, _| {}).await.unwrap_err();
        assert!(unheard.contains("never connected"), "{unheard}");
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let first = a.put(0, 1).await;
        a.acked().await;
        assert!(matches!(a.checkpoint(&[(0, first)]).await, Message::CpDone(_)));
        let root = a.root();
        let mut busy = 0;
        let answers = async {
            // Two refusals, then the roots; after that it is busy for ever.
            loop {
                let Some(Message::Scan(scan)) = a.other().await else { return };
                let read = VolumeScan {
                    volume: crate::units::numbers::VolumeNumber(0),
                    root: Some(root),
                    blocks_read: 1,
                    bad_blocks: 0,
                };
                let volumes = if busy == 2 { vec![read] } else { vec![] };
                let problems = if busy == 2 { vec![] } else { vec!["it reads".to_owned()] };
                busy += 1;
                let scanned = Scanned { cp: scan.cp, token: scan.token, volumes, problems };
                a.send(&Message::Scanned(scanned), Bytes::new()).await;
            }
        };
        let asked = async {
            let read = hub.verify(&name, |_, _, _| {}).await.unwrap();
            assert_eq!(read.here[0].root, Some(root));
            assert_eq!(read.there.volumes[0].root, Some(root));
            hub.verify(&name, |_, _, _| {}).await.unwrap_err()
        };
        let unproven = tokio::select! {
            () = answers => panic!("the hub has closed"),
            unproven = asked => unproven,
        };
        assert_eq!(unproven, "it reads");
        drop(a);
        until("it is offline", || !hub.snapshots()[0].connected).await;
        let away = hub.verify(&name, |_, _, _| {}).await.unwrap_err();
        assert!(away.contains("not connected"), "{away}");
        hub.stop().await;
    });
}

/// The empty name opens the only image there is, and none where there are two.
#[test]
fn the_empty_name_opens_the_only_image() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a", "b"])).await.unwrap();
        let images = super::images::Images::new(hub.shared().clone());
        let open = async || crate::nbd::export::Exports::open(&*images, "").await;
        assert!(open().await.is_err(), "there is none");
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        until("a is listed", || !hub.snapshots()[0].volumes.is_empty()).await;
        assert_eq!(open().await.expect("the only one").info().name, "a/vol0");
        b.welcomed(hub.address()).await;
        until("b is listed", || hub.snapshots().iter().all(|s| !s.volumes.is_empty())).await;
        assert!(open().await.is_err(), "there are two");
        hub.stop().await;
    });
}

/// Sources that signal in one moment: while one commit runs, the CPs of all others gather and are
/// published by exactly one more.
#[test]
#[expect(clippy::await_holding_lock, reason = "held back are other threads only")]
fn cps_of_different_sources_share_one_commit() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..8).map(|n| format!("s{n}")).collect();
        let refs: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut options = options(dir.path(), &refs);
        options.appliers = 8;
        let hub = Arc::new(Hub::start(options).await.unwrap());
        let mut sources = Vec::new();
        for name in &refs {
            let mut source = Fake::new(name);
            source.welcomed(hub.address()).await;
            let id = source.put(1, 4).await;
            source.acked().await;
            sources.push((source, id));
        }
        let pool = hub.shared().pool.clone();
        let before = pool.transactions();
        let mut running = Vec::new();
        let mut signal = |(mut source, id): (Fake, _)| {
            running.push(actix::spawn(async move {
                let answer = source.checkpoint(&[(1, id)]).await;
                assert!(matches!(answer, Message::CpDone(_)), "{answer:?}");
                source
            }));
        };
        let held = pool.hold_commits();
        let mut sources = sources.into_iter();
        // The first is alone in its commit, which stands.
        sources.next().into_iter().for_each(&mut signal);
        until("a commit has begun", || pool.is_committing()).await;
        assert_eq!(pool.waiting(), 0);
        sources.for_each(&mut signal);
        until("the others gather", || pool.waiting() == 7).await;
        assert_eq!(pool.transactions(), before, "nothing is committed yet");
        drop(held);
        for task in running {
            let source = task.await.unwrap();
            assert_eq!(image_root(&hub, &source), source.root());
        }
        assert_eq!(pool.transactions(), before + 2, "one for the first, one for all others");
        hub.stop().await;
    });
}

/// A reader that stays longer than `image_pin` is sent away; one that leaves keeps nothing.
#[test]
fn a_pin_ends_after_its_time() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path(), &["a"]);
        options.image_pin = Duration::from_millis(50);
        let hub = Hub::start(options).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let images = super::images::Images::new(hub.shared().clone());
        let image = crate::nbd::export::Exports::open(&*images, "a/vol0").await.unwrap();
        assert_eq!(hub.shared().pool.pin_counts().0, 1);
        image.ended().unwrap().cancelled().await;
        drop(image);
        assert_eq!(hub.shared().pool.pin_counts().0, 0);
        hub.stop().await;
    });
}

/// A hub stops also while a source is in the middle of sending a CP.
#[test]
fn a_stop_does_not_wait_for_updates() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let id = a.put(0, 1).await;
        a.acked().await;
        a.updates(&[(0, id)]).await;
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("the CP is being applied", || lane.job().is_some()).await;
        tokio::time::timeout(Duration::from_secs(10), hub.stop()).await.expect("it stops");
        assert_eq!(lane.cursors().applied_cp, CpNumber(0));
    });
}
