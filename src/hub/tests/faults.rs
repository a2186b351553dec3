//! One source's log fails, or one source is flat out: the others do not notice.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fake::Fake;
use super::{hub_of_two, image_root, in_system, options, start_again, until};
use crate::hub::Hub;
use crate::hub::extension::Extension;
use crate::hub::failover;
use crate::hub::lane::Lane;
use crate::hub::status::{Snapshot, SourceState};
use crate::nvlog::format::device_offset;
use crate::record::marks::Place;
use crate::units::machine;
use crate::units::numbers::{ByteCount, CpNumber, Generation, LogPosition, TransferId, Vbn};
use crate::volume::check::{Depth, check};
use crate::wire::message::{Message, RefusedCode};

/// Puts a file where the source's log directory was; the next log of it cannot be made.
pub(super) fn break_log(dir: &Path, source: &Fake) -> PathBuf {
    let logs = dir.join("logs").join(source.id.to_string());
    let aside = dir.join("aside");
    std::fs::rename(&logs, &aside).unwrap();
    std::fs::write(&logs, b"not a directory").unwrap();
    aside
}

fn mend_log(dir: &Path, source: &Fake, aside: &Path) {
    let logs = dir.join("logs").join(source.id.to_string());
    std::fs::remove_file(&logs).unwrap();
    std::fs::rename(aside, &logs).unwrap();
}

fn state(hub: &Hub, name: &str) -> SourceState {
    let snapshots = hub.snapshots();
    snapshots.iter().find(|shown| shown.name.as_str() == name).unwrap().state
}

/// A source puts one block, which is in its log when this returns.
pub(super) async fn one_drained(hub: &Hub, source: &mut Fake) -> Arc<Lane> {
    source.put(0, 1).await;
    source.acked().await;
    let lane = hub.shared().lanes.get(&source.name.parse().unwrap()).unwrap();
    until("drained", || lane.cursors().drained == source.last).await;
    lane
}

/// Sends transfers of a second CP into a log that cannot be made, until the hub says so; their
/// ids, and the last one that was acknowledged.
pub(super) async fn into_the_fault(a: &mut Fake, count: u64) -> (Vec<TransferId>, TransferId) {
    a.cp = a.cp.next();
    let mut sent = Vec::new();
    for at in 0..count {
        let transfer = a.write(at % 200, 7, 1);
        if !a.try_send(&Message::Transfer, transfer.bytes().clone()).await {
            break;
        }
        sent.push(transfer.id());
    }
    let mut acked = TransferId::default();
    loop {
        match a.receive().await {
            Some(Message::Ack(ack)) => acked = ack.id,
            Some(Message::Refused(refused)) => {
                assert_eq!(refused.code, RefusedCode::Faulted);
            }
            Some(other) => panic!("{other:?}"),
            None => return (sent, acked),
        }
    }
}

#[test]
fn a_failed_log_faults_its_source_alone() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, mut b) = hub_of_two(dir.path()).await;
        one_drained(&hub, &mut a).await;
        break_log(dir.path(), &a);
        let begin = Instant::now();
        into_the_fault(&mut a, 1).await;
        until("a is faulted", || state(&hub, "a") == SourceState::Faulted).await;
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        for vbn in 0..50 {
            b.put(vbn, 2).await;
            b.acked().await;
        }
        assert_eq!(state(&hub, "b"), SourceState::InSync);
        let again = a.connect(hub.address()).await;
        assert!(matches!(again, Message::Refused(no) if no.code == RefusedCode::Faulted));
        hub.stop().await;
    });
}

/// The ring laps while a faulted source's records lie in it: they move to its head, whole and in
/// order, and are all there when the cause is mended and the hub restarted (R10).
#[test]
fn nothing_of_a_faulted_source_is_lost_while_the_ring_laps() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = || {
            let mut settings = options(dir.path(), &["a", "b"]);
            settings.pool.devices[0].1 = ByteCount(256 << 20);
            settings
        };
        let hub = Hub::start(settings()).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        let first = a.put(0, 1).await;
        a.acked().await;
        assert!(matches!(a.checkpoint(&[(0, first)]).await, Message::CpDone(_)));
        a.put(3, 1).await;
        a.acked().await;
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("drained", || lane.cursors().drained == a.last).await;
        let aside = break_log(dir.path(), &a);
        let (sent, acked) = into_the_fault(&mut a, 300).await;
        lap(&hub, &mut b, 5).await;
        assert_eq!(state(&hub, "b"), SourceState::InSync);
        // What was on its way when the log failed became durable a moment after the refusal.
        let durable = lane.cursors().durable;
        println!("{} sent, {acked} acknowledged, {} durable", sent.len(), durable.transfer);
        assert!(durable.transfer >= acked);
        hub.stop().await;
        drop((lane, hub));
        mend_log(dir.path(), &a, &aside);
        let hub = start_again(settings()).await;
        a.generation = Generation { number: 2, id: 5 };
        let welcome = a.welcomed(hub.address()).await;
        assert!(welcome.last.0 >= acked, "{} is less than {acked}", welcome.last.0);
        assert_eq!(welcome.last, durable.into(), "everything durable is there");
        b.generation = Generation { number: 2, id: 5 };
        assert_eq!(b.welcomed(hub.address()).await.last, b.last.into());
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        assert_eq!(image_root(&hub, &b), b.root());
        assert_eq!(welcome.applied_cp, CpNumber(1));
        hub.stop().await;
    });
}

/// The control: records of a faulted source that are not copied forward hold the ring's end, and nobody
/// has room any more (R10).
#[test]
fn control_r10_nobody_blocks_the_ring() {
    // A thread of its own: the rule is off on it and on those that it begins.
    let stands = |off: bool| std::thread::spawn(move || the_ring_stands(off)).join().unwrap();
    assert!(stands(true), "R10 is off, and the ring goes on");
    assert!(!stands(false), "the ring stands still");
}

/// Whether a source gets no more room of the ring for the records of a faulted one.
fn the_ring_stands(off: bool) -> bool {
    if off {
        machine::simulated::break_rule_here(10);
    }
    let stands = std::cell::Cell::new(false);
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (hub, mut a, mut b) = hub_of_two(dir.path()).await;
        one_drained(&hub, &mut a).await;
        break_log(dir.path(), &a);
        into_the_fault(&mut a, 20).await;
        until("a is faulted", || state(&hub, "a") == SourceState::Faulted).await;
        let ring = hub.shared().stager.ring().unwrap().clone();
        let (begin, capacity) = (ring.status().written.0, ring.status().capacity.0);
        while !stands.get() && ring.status().written.0 < begin + capacity * 3 / 2 {
            let transfer = b.write(0, 5, 64);
            b.send_transfer(&transfer).await;
            if b.acked().await.log_credit > 0 {
                continue;
            }
            let room = async {
                while !matches!(b.receive().await, Some(Message::Ack(ack)) if ack.log_credit > 0) {}
            };
            stands.set(tokio::time::timeout(Duration::from_secs(1), room).await.is_err());
        }
        let (first, released) = (records_of(&hub, &a)[0], ring.status().released);
        println!("off: {off}, released {released}, its first record at {first}");
        assert!(!stands.get() || released == first, "it is not its record that stands there");
        drop(ring);
        hub.stop().await;
    });
    stands.get()
}

/// Flips one byte of the ring's file, `at` bytes into the record at `position`.
pub(super) fn rot(dir: &Path, capacity: ByteCount, position: LogPosition, at: u64) {
    let path = dir.join("nvram");
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let offset = device_offset(capacity, position) + at;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    file.sync_all().unwrap();
}

/// Where the source's records begin in the ring.
pub(super) fn records_of(hub: &Hub, source: &Fake) -> Vec<LogPosition> {
    let ring = hub.shared().stager.ring().unwrap();
    let status = ring.status();
    let (mut at, mut found) = (status.released, Vec::new());
    while at < status.durable {
        let (envelope, _) = ring.read(at).unwrap();
        if envelope.source == source.id {
            found.push(at);
        }
        at = at.after(ByteCount(u64::from(envelope.record_bytes)));
    }
    found
}

pub(super) fn shown(hub: &Hub, name: &str) -> Arc<Snapshot> {
    hub.snapshots().into_iter().find(|shown| shown.name.as_str() == name).unwrap()
}

/// A record of a faulted source that cannot even be read holds up nobody: it is told as lost, the
/// ring passes it, and the next start finds the gap (R10).
#[test]
fn an_unreadable_record_of_a_faulted_source_holds_up_nobody() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a", "b"]);
        settings.pool.devices[0].1 = ByteCount(256 << 20);
        let hub = Hub::start(settings.clone()).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        for vbn in 0..5 {
            a.put(vbn, 1).await;
            a.acked().await;
        }
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("drained", || lane.cursors().drained == a.last).await;
        break_log(dir.path(), &a);
        into_the_fault(&mut a, 20).await;
        until("a is faulted", || state(&hub, "a") == SourceState::Faulted).await;
        assert!(shown(&hub, "a").next_step.contains("restart the hub"));
        let ring = hub.shared().stager.ring().unwrap().clone();
        let (begin, capacity) = (ring.status().written.0, ring.status().capacity);
        let records = records_of(&hub, &a);
        assert!(records.len() > 5, "{records:?}");
        rot(dir.path(), capacity, records[2], 200);
        let started = Instant::now();
        while ring.status().written.0 < begin + 3 * capacity.0 {
            assert!(started.elapsed() < Duration::from_secs(60), "the ring stands still");
            let transfer = b.write(0, 5, 64);
            b.send_transfer(&transfer).await;
            b.acked().await;
            let last = transfer.id();
            let done = b.checkpoint_with(|encoder| encoder.reference(Vbn(0), 64, last, 0)).await;
            assert!(matches!(done, Message::CpDone(_)), "{done:?}");
        }
        until("the loss is shown", || shown(&hub, "a").reason.contains("is lost")).await;
        let next_step = shown(&hub, "a").next_step.clone();
        assert!(next_step.contains("the source sends the rest again"), "{next_step}");
        hub.stop().await;
        drop((ring, lane, hub));
        // The log was never synced: a power cut took it, and the ring has all but one record.
        std::fs::remove_file(dir.path().join("logs").join(a.id.to_string())).unwrap();
        let hub = start_again(settings).await;
        until("a may come", || state(&hub, "a") == SourceState::Offline).await;
        let shown = shown(&hub, "a");
        assert!(shown.reason.contains("gap"), "{}", shown.reason);
        assert!(shown.reason.contains("may be missing here"), "{}", shown.reason);
        a.generation = Generation { number: 2, id: 5 };
        let welcome = a.welcomed(hub.address()).await;
        assert!(welcome.last.1 < a.last.sequence, "what is lost is called durable");
        hub.stop().await;
    });
}

/// What the catalog says that rot may have taken of a source.
fn noted_bytes(hub: &Hub, name: &str) -> u32 {
    let rows = hub.shared().pool.catalog().sources().unwrap();
    let row = rows.iter().find(|row| row.name.as_str() == name).unwrap();
    Extension::of(row).unwrap().missing_bytes
}

/// What is promoted without it is the truth: the report says it, nobody waits for it.
async fn promoted_without_it(hub: &Hub) {
    let ask = failover::Ask { now: true, ..failover::Ask::default() };
    let report = hub.failover(&"a".parse().unwrap(), ask, |_| {}).await.unwrap();
    assert!(report.nvram_damaged_bytes > 0 && report.may_be_lost(), "{report:?}");
    until("it is promoted", || noted_bytes(hub, "a") == 0).await;
    let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
    until("and forgotten", || lane.cursors().doubts.missing_bytes == 0).await;
    assert_eq!(lane.cursors().doubts.missing, None);
}

/// Rot takes a source's last record, of which no chain tells: those it may concern are told that
/// acknowledged bytes may be missing, until each was here again (R3).
#[test]
fn rot_of_a_last_record_is_told_until_the_source_was_here() {
    in_system(async {
        // In the envelope nobody knows whose it was; in the body it is known.
        for (at, concerned) in [(40, ["a", "b"].as_slice()), (200, ["a"].as_slice())] {
            let (live, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let hub = Hub::start(options(live.path(), &["a", "b"])).await.unwrap();
            let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
            a.welcomed(hub.address()).await;
            b.welcomed(hub.address()).await;
            a.put(0, 1).await;
            a.acked().await;
            let whole = a.last;
            a.put(1, 1).await;
            a.acked().await;
            b.put(0, 1).await;
            b.acked().await;
            let capacity = hub.shared().stager.ring().unwrap().status().capacity;
            let record = records_of(&hub, &a)[1];
            // As after a power cut that took the source logs, which were never synced.
            std::fs::create_dir(dir.path().join("logs")).unwrap();
            for name in ["nvram", "disk0", "identity.json", "logs/hub-id"] {
                std::fs::copy(live.path().join(name), dir.path().join(name)).unwrap();
            }
            hub.stop().await;
            rot(dir.path(), capacity, record, at);
            let mut hub = start_again(options(dir.path(), &["a", "b"])).await;
            // The ring's end is made a sound one by the first start: the others find nothing.
            for start in 1..=3 {
                for name in ["a", "b"] {
                    let told = concerned.contains(&name);
                    until(name, || shown(&hub, name).state == SourceState::Offline).await;
                    let reason = shown(&hub, name).reason.clone();
                    assert_eq!(reason.contains("may be missing"), told, "{start} {name}: {reason}");
                }
                hub.stop().await;
                drop(hub);
                hub = start_again(options(dir.path(), &["a", "b"])).await;
            }
            if concerned == ["a"] {
                promoted_without_it(&hub).await;
                hub.stop().await;
                continue;
            }
            assert_eq!(a.welcomed(hub.address()).await.last, whole.into());
            assert_eq!(b.welcomed(hub.address()).await.last, b.last.into());
            let noted = |name| noted_bytes(&hub, name);
            // Whoever lacks nothing is done; who was here and has sent nothing again is not.
            until("b is done", || noted("b") == 0).await;
            assert!(noted("a") > 0, "a mark is gone before what it is of has come");
            a.last = whole;
            a.put(1, 1).await;
            a.acked().await;
            for name in ["a", "b"] {
                until(name, || state(&hub, name) == SourceState::InSync).await;
                until("it is noted", || noted(name) == 0).await;
                assert!(!shown(&hub, name).reason.contains("missing"));
            }
            hub.stop().await;
            drop(hub);
            nothing_is_told(dir.path()).await;
        }
    });
}

/// A hub that is started here says of nobody that anything may be missing.
async fn nothing_is_told(dir: &Path) {
    let hub = start_again(options(dir, &["a", "b"])).await;
    for name in ["a", "b"] {
        until(name, || shown(&hub, name).state == SourceState::Offline).await;
        assert!(!shown(&hub, name).reason.contains("missing"));
    }
    hub.stop().await;
}

/// A damaged log is written again out of the ring, if the ring has all that is behind the damage; if not,
/// the source is marked, its log is cut where it is sound, and it sends the rest again (R11). That is said
/// until then, also by the next start, and a failover does not pass over it.
#[test]
fn a_damaged_log_is_written_again_out_of_the_ring() {
    in_system(async {
        for covered in [true, false] {
            let (live, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let hub = Hub::start(options(live.path(), &["a", "b"])).await.unwrap();
            let mut a = Fake::new("a");
            a.welcomed(hub.address()).await;
            for block in 0..4 {
                a.put(block, 1).await;
                a.acked().await;
            }
            let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
            until("drained", || lane.cursors().drained == a.last).await;
            // Synced, and the ring's header has not been told yet; or behind a clean stop.
            let synced = hub.shared().store.sync(&[a.id]);
            assert!(synced.iter().all(|(_, synced)| synced.is_ok()), "{synced:?}");
            drop(lane);
            let log = format!("logs/{}/cp-0000000001.log", a.id);
            std::fs::create_dir_all(dir.path().join(&log).parent().unwrap()).unwrap();
            let copy = || {
                for name in ["nvram", "disk0", "identity.json", "logs/hub-id", &log] {
                    std::fs::copy(live.path().join(name), dir.path().join(name)).unwrap();
                }
            };
            if covered {
                copy();
                hub.stop().await;
            } else {
                hub.stop().await;
                copy();
            }
            // The second half of what is known to be synced is not there any more.
            let path = dir.path().join(&log);
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            let bytes = file.metadata().unwrap().len();
            let header = u64::try_from(crate::sourcelog::format::HEADER_BYTES).unwrap();
            file.set_len(header + (bytes.min(header + 18_432) - header) / 2).unwrap();
            drop((file, hub));
            let before = std::fs::read(&path).unwrap();
            let hub = start_again(options(dir.path(), &["a", "b"])).await;
            if !covered {
                sends_again(hub, &mut a, dir.path()).await;
                continue;
            }
            until("a is offline", || state(&hub, "a") == SourceState::Offline).await;
            a.generation = Generation { number: 2, id: 5 };
            assert_eq!(a.welcomed(hub.address()).await.last, a.last.into());
            assert!(std::fs::metadata(&path).unwrap().len() > u64::try_from(before.len()).unwrap());
            let answer = a.checkpoint_by_replay().await;
            assert!(matches!(answer, Message::CpDone(_)), "{answer:?}");
            hub.stop().await;
        }
    });
}

/// Two starts say that the log of `a` was damaged; a failover wants to be told to pass over it; then `a`
/// sends again what it holds.
async fn sends_again(hub: Hub, a: &mut Fake, dir: &Path) {
    hub.stop().await;
    drop(hub);
    let hub = start_again(options(dir, &["a", "b"])).await;
    until("a may come", || state(&hub, "a") == SourceState::Offline).await;
    let said = shown(&hub, "a").reason.clone();
    assert!(said.contains("is damaged") && said.contains("sends them again"), "{said}");
    let name = "a".parse().unwrap();
    let ask = failover::Ask { now: true, ..Default::default() };
    let refused = hub.failover(&name, ask, |_| {}).await.unwrap_err();
    assert!(refused.reason.contains("is damaged"), "{refused}");
    assert!(refused.next_step.contains("--accept-gap"), "{refused}");
    let ask = failover::Ask { dry_run: true, accept_gap: true, ..ask };
    let cut = hub.failover(&name, ask, |_| {}).await.unwrap();
    assert_eq!((cut.outcome.word(), cut.may_be_lost()), ("up-to-gap", true), "{cut:?}");
    assert_eq!(cut.sentences().join("; ").matches("is damaged").count(), 1, "{cut:?}");
    let whole = a.last;
    let welcome = a.welcomed(hub.address()).await;
    assert!(welcome.last.1 < whole.sequence, "what is lost is called durable");
    assert!(shown(&hub, "a").reason.contains("is damaged"), "it is not here yet");
    a.last = Place::from(welcome.last);
    while a.last.sequence < whole.sequence {
        let block = a.last.sequence.0;
        a.put(block, 1).await;
        a.acked().await;
    }
    until("it is here", || !shown(&hub, "a").reason.contains("is damaged")).await;
    until("no mark stands", || std::fs::read_dir(dir.join("refill")).unwrap().next().is_none())
        .await;
    let answer = a.checkpoint_by_replay().await;
    assert!(matches!(answer, Message::CpDone(_)), "{answer:?}");
    hub.stop().await;
}

/// The same across a restart: what is copied forward was never staged by this process, and moves
/// nothing but itself.
#[test]
fn a_faulted_source_outlives_a_restart_and_laps_of_the_ring() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = || {
            let mut settings = options(dir.path(), &["a", "b"]);
            settings.pool.devices[0].1 = ByteCount(256 << 20);
            settings
        };
        let hub = Hub::start(settings()).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        a.put(3, 1).await;
        a.acked().await;
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("drained", || lane.cursors().drained == a.last).await;
        let aside = break_log(dir.path(), &a);
        let (_, acked) = into_the_fault(&mut a, 40).await;
        hub.stop().await;
        // What was on its way when the log failed became durable a moment after the refusal.
        let durable = lane.cursors().durable;
        drop((lane, hub));
        let hub = start_again(settings()).await;
        until("a is faulted", || state(&hub, "a") == SourceState::Faulted).await;
        b.generation = Generation { number: 2, id: 5 };
        b.welcomed(hub.address()).await;
        lap(&hub, &mut b, 3).await;
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        assert_eq!(lane.cursors().under_way_bytes, 0);
        hub.stop().await;
        drop((lane, hub));
        mend_log(dir.path(), &a, &aside);
        let hub = start_again(settings()).await;
        a.generation = Generation { number: 2, id: 5 };
        let welcome = a.welcomed(hub.address()).await;
        assert!(welcome.last.0 >= acked, "{} is less than {acked}", welcome.last.0);
        assert_eq!(welcome.last, durable.into(), "everything durable is there");
        hub.stop().await;
    });
}

/// A source whose log is full gets credit again when its log is dropped, also if none of its
/// records is in the ring any more whose release would tell it.
#[test]
fn a_dropped_log_gives_credit_again() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a", "b"]);
        settings.pool.devices[0].1 = ByteCount(256 << 20);
        settings.sources[0].log_limit = Some(ByteCount(8 << 20));
        let hub = Hub::start(settings).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        let mut last = None;
        let mut credit = 1;
        while credit > 0 {
            let transfer = a.write(0, 1, 64);
            a.send_transfer(&transfer).await;
            last = Some(transfer.id());
            credit = a.acked().await.log_credit;
        }
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        let mut laps = 0;
        while lane.cursors().ring_bytes > 0 {
            lap(&hub, &mut b, 1).await;
            laps += 1;
            assert!(laps < 5, "its records stay in the ring");
        }
        let last = last.unwrap();
        let done = a.checkpoint_with(|encoder| encoder.reference(Vbn(0), 64, last, 0)).await;
        assert!(matches!(done, Message::CpDone(_)), "{done:?}");
        while credit == 0 {
            if let Some(Message::Ack(ack)) = a.receive().await {
                credit = ack.log_credit;
            }
        }
        hub.stop().await;
    });
}

/// Fills the ring so many times with CPs of that source.
async fn lap(hub: &Hub, b: &mut Fake, times: u64) {
    let ring = hub.shared().stager.ring().unwrap().clone();
    let (begin, capacity) = (ring.status().written.0, ring.status().capacity.0);
    let mut fill = 0_u8;
    while ring.status().written.0 < begin + times * capacity {
        let mut last = None;
        for _ in 0..12 {
            fill = fill % 250 + 1;
            let transfer = b.write(0, fill, 64);
            b.send_transfer(&transfer).await;
            last = Some(transfer.id());
            b.acked().await;
        }
        let last = last.unwrap();
        let done = b.checkpoint_with(|encoder| encoder.reference(Vbn(0), 64, last, 0)).await;
        assert!(matches!(done, Message::CpDone(_)), "{done:?}");
    }
}

/// One source flat out, one quiet: the quiet one's acknowledgements stay quick.
#[test]
fn a_quiet_source_beside_a_loud_one() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a", "b"]);
        settings.pool.devices[0].1 = ByteCount(256 << 20);
        let hub = Hub::start(settings).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        let alone = latencies(&mut b, Duration::from_millis(700)).await;
        let stop = std::rc::Rc::new(std::cell::Cell::new(false));
        let stopped = stop.clone();
        let loud = actix::spawn(async move {
            let (mut rounds, mut fill) = (0_u64, 0_u8);
            while !stopped.get() {
                let mut last = None;
                for _ in 0..8 {
                    fill = fill % 250 + 1;
                    let transfer = a.write(0, fill, 64);
                    a.send_transfer(&transfer).await;
                    last = Some(transfer.id());
                }
                a.acked().await;
                let last = last.unwrap();
                let done = a.checkpoint_with(|encoder| encoder.reference(Vbn(0), 64, last, 0));
                assert!(matches!(done.await, Message::CpDone(_)));
                rounds += 1;
            }
            rounds
        });
        let beside = latencies(&mut b, Duration::from_secs(2)).await;
        stop.set(true);
        let rounds = loud.await.unwrap();
        let p99 = |sorted: &[Duration]| sorted[sorted.len() * 99 / 100];
        println!(
            "p99 of an Ack alone {:?} ({}), beside {} MiB from the loud one {:?} ({})",
            p99(&alone),
            alone.len(),
            rounds * 2,
            p99(&beside),
            beside.len()
        );
        assert!(rounds > 2, "the loud source was not loud");
        assert!(p99(&beside) < Duration::from_millis(500), "{:?}", p99(&beside));
        hub.stop().await;
    });
}

/// Latencies of single writes for that long, sorted.
async fn latencies(source: &mut Fake, length: Duration) -> Vec<Duration> {
    let begin = Instant::now();
    let mut all = Vec::new();
    while begin.elapsed() < length {
        let sent = Instant::now();
        source.put(1, 1).await;
        source.acked().await;
        all.push(sent.elapsed());
    }
    all.sort();
    all
}
