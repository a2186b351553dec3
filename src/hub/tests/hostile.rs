//! Sources that repeat, skip, lie, or come back in the middle; and faults of one source's log.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::fake::Fake;
use super::{image_root, in_system, log_files, options, start_again, until};
use crate::hub::Hub;
use crate::hub::status::SourceState;
use crate::limits::LOG_CREDIT_BYTES_MIN;
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::units::convert::to_u64;
use crate::units::hash::StreamHash;
use crate::units::numbers::{ByteCount, CpNumber, Generation, TransferId, Vbn};
use crate::volume::check::{Depth, check};
use crate::wire::message::{
    CpEnd, Message, PartitionFull, RefusedCode, Scan, VolumeRoot, WantLog, Welcome,
};

fn assert_clean(hub: &Hub) {
    let report = check(&hub.shared().pool, Depth::Data).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

/// How many transfers lie in the source log of that CP.
fn in_log(hub: &Hub, source: &Fake, cp: u32) -> usize {
    let reader = hub.shared().store.reader(source.id, CpNumber(cp)).unwrap();
    reader.transfers().map(Result::unwrap).count()
}

/// Connects again, however long the hub needs to put the last session to rest.
async fn back(hub: &Hub, source: &mut Fake) -> Welcome {
    let begin = Instant::now();
    loop {
        match source.connect(hub.address()).await {
            Message::Welcome(welcome) => return welcome,
            Message::Refused(refused) if refused.code == RefusedCode::Busy => {}
            other => panic!("{other:?} instead of Welcome"),
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "busy for ever");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The hub says why and closes.
async fn refused(source: &mut Fake) -> (RefusedCode, String) {
    let Some(Message::Refused(refused)) = source.other().await else { panic!("not refused") };
    assert!(source.other().await.is_none(), "it closes behind its reason");
    (refused.code, refused.reason)
}

#[test]
fn a_repeated_transfer_is_one_record_and_is_acknowledged_again() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let first = a.write(0, 1, 1);
        // Back to back: the second is there before the first is durable.
        for _ in 0..5 {
            a.send_transfer(&first).await;
        }
        a.acked().await;
        a.send_transfer(&first).await;
        a.acked().await;
        let second = a.write(1, 2, 1);
        for transfer in [&second, &first, &second] {
            a.send_transfer(transfer).await;
        }
        a.acked().await;
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("drained", || lane.cursors().drained == a.last).await;
        assert_eq!(in_log(&hub, &a, 1), 2, "each once");
        let references = [(0, first.id()), (1, second.id())];
        assert!(matches!(a.checkpoint(&references).await, Message::CpDone(_)));
        // A late repeat of an applied CP is acknowledged and not kept (R15).
        a.send_transfer(&second).await;
        a.acked().await;
        assert_eq!(lane.ladder.transfers.load(std::sync::atomic::Ordering::Relaxed), 2);
        hub.stop().await;
    });
}

/// The same id with other bytes is no repeat.
#[test]
fn a_transfer_with_two_contents_ends_the_connection() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let mut twin = Fake::new("a");
        a.put(0, 1).await;
        a.acked().await;
        let other = twin.write(0, 2, 1);
        a.send_transfer(&other).await;
        assert_eq!(refused(&mut a).await.0, RefusedCode::Protocol);
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("drained", || lane.cursors().drained == a.last).await;
        assert_eq!(in_log(&hub, &a, 1), 1);
        assert_eq!(back(&hub, &mut a).await.last, a.last.into());
        hub.stop().await;
    });
}

#[test]
fn a_gap_ends_the_connection_and_nothing_is_stored() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        a.put(0, 1).await;
        a.acked().await;
        let held = a.last;
        let skipped = a.write(1, 2, 1);
        let behind = a.write(2, 3, 1);
        a.send_transfer(&behind).await;
        let (code, reason) = refused(&mut a).await;
        assert_eq!(code, RefusedCode::Protocol);
        assert!(reason.contains("does not follow"), "{reason}");
        assert_eq!(hub.shared().counters.refusals().get("protocol"), Some(&1));
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        assert_eq!(lane.cursors().staged, held, "not even staged");
        assert!(hub.snapshots()[0].reason.contains("does not follow"), "status says why");
        assert_eq!(back(&hub, &mut a).await.last, held.into());
        for transfer in [skipped, behind] {
            a.send_transfer(&transfer).await;
        }
        a.acked().await;
        until("drained", || lane.cursors().drained == a.last).await;
        assert_eq!(in_log(&hub, &a, 1), 3);
        hub.stop().await;
    });
}

#[test]
fn a_connection_lost_in_the_middle_of_a_cp_costs_nothing() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let first = a.put(0, 1).await;
        a.acked().await;
        for _ in 0..4 {
            a.updates(&[(0, first)]).await;
            a.half_close().await;
            let welcome = back(&hub, &mut a).await;
            assert_eq!((welcome.applied_cp, welcome.last), (CpNumber(0), a.last.into()));
        }
        // Without a goodbye: the newer Hello ends the older session.
        a.updates(&[(0, first)]).await;
        assert_eq!(back(&hub, &mut a).await.applied_cp, CpNumber(0));
        assert_clean(&hub);
        assert!(matches!(a.checkpoint(&[(0, first)]).await, Message::CpDone(_)));
        assert_eq!(image_root(&hub, &a), a.root());
        assert_clean(&hub);
        hub.stop().await;
    });
}

/// All of the CP is there: it is published without the source, which learns it from Welcome.
#[test]
fn a_connection_lost_between_cp_end_and_cp_done() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        for round in 1..5 {
            let id = a.put(u64::from(round), 1).await;
            a.acked().await;
            let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
            until("drained", || lane.cursors().drained == a.last).await;
            let bytes = a.updates(&[(u64::from(round), id)]).await;
            // The actor hears of the drainer and of its source by two ways, which keep no order.
            until("the CP is being applied", || lane.job().is_some()).await;
            let end = a.end(bytes, a.root());
            a.send(&end, Bytes::new()).await;
            a.half_close().await;
            // Two connections keep no order: the newer Hello could overtake this CpEnd.
            let published = || lane.cursors().applied_cp == CpNumber(round);
            until("published without its source", published).await;
            assert_eq!(back(&hub, &mut a).await.applied_cp, CpNumber(round));
            // Sent again, it is answered at once.
            a.updates(&[(u64::from(round), id)]).await;
            assert!(matches!(a.other().await, Some(Message::CpDone(_))));
            a.cp = a.cp.next();
            assert_eq!(image_root(&hub, &a), a.root());
        }
        assert_clean(&hub);
        hub.stop().await;
    });
}

#[test]
fn a_reference_to_nothing_is_refused_and_all_inline_is_taken() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let id = a.put(5, 1).await;
        a.acked().await;
        let nowhere = TransferId { generation: 1, counter: 999 };
        let past = |encoder: &mut crate::wire::updates::Encoder| {
            encoder.reference(Vbn(5), 1, id, 77);
        };
        let Message::CpRejected(no) = a.checkpoint(&[(5, nowhere)]).await else { panic!("taken") };
        assert!(!no.no_space && !no.reason.is_empty(), "{no:?}");
        assert!(matches!(a.checkpoint_with(past).await, Message::CpRejected(_)));
        let outside = a.checkpoint_with(|encoder| encoder.reference(Vbn(1 << 40), 1, id, 0)).await;
        assert!(matches!(outside, Message::CpRejected(_)));
        assert_eq!(hub.snapshots()[0].state, SourceState::Behind);
        let (page, other) = ([1; 4096], [2; 4096]);
        let inline = |page| {
            move |encoder: &mut crate::wire::updates::Encoder| {
                encoder.inline(Vbn(5), std::iter::once(page));
            }
        };
        assert!(matches!(a.checkpoint_with(inline(&other)).await, Message::CpRejected(_)));
        assert!(matches!(a.checkpoint_with(inline(&page)).await, Message::CpDone(_)));
        assert_eq!(image_root(&hub, &a), a.root());
        assert_eq!(hub.snapshots()[0].totals.rejected, 4);
        assert_clean(&hub);
        hub.stop().await;
    });
}

/// A source that lost its NVRAM gets back exactly what it had sent (R1).
#[test]
fn a_restarted_source_is_sent_its_own_log() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let mut sent = Vec::new();
        for vbn in 0..40 {
            let transfer = a.write(vbn, 3, 1);
            a.send_transfer(&transfer).await;
            sent.push(transfer);
        }
        a.acked().await;
        a.generation = Generation { number: 2, id: 5 };
        for have in [0_usize, 17, 40] {
            let from = have.checked_sub(1).map_or(Place::default(), |at| {
                let transfer: &Transfer = &sent[at];
                transfer.place()
            });
            assert_eq!(back(&hub, &mut a).await.last, a.last.into());
            a.send(&Message::WantLog(WantLog { from: from.into() }), Bytes::new()).await;
            let mut got = Vec::new();
            loop {
                match a.frame().await.expect("the log") {
                    (Message::Refill, payload) => got.push(payload),
                    (Message::RefillEnd(end), _) => {
                        assert_eq!(end.last, a.last.into());
                        break;
                    }
                    (Message::Ack(_), _) => {}
                    (other, _) => panic!("{other:?}"),
                }
            }
            let want: Vec<_> = sent[have..].iter().map(|sent| sent.bytes().clone()).collect();
            assert!(got == want, "behind {have}: {} transfers came", got.len());
        }
        what_lies_before_is_not_read(&hub, dir.path(), &mut a, &sent).await;
        // From a place that was never on this line.
        let strange = Place { hash: StreamHash([9; 16]), ..a.last };
        a.send(&Message::WantLog(WantLog { from: strange.into() }), Bytes::new()).await;
        assert_eq!(refused(&mut a).await.0, RefusedCode::Diverged);
        hub.stop().await;
    });
}

/// A log that cannot be read is this hub's fault, and not another history of the source's: that
/// would stop the source for good.
#[test]
fn a_log_that_cannot_be_read_back_is_a_fault_here() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        for vbn in 0..3 {
            a.put(vbn, 3).await;
            a.acked().await;
        }
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("drained", || lane.cursors().drained == a.last).await;
        let path = log_files(dir.path(), &a).remove(0);
        let mut content = std::fs::read(&path).unwrap();
        // In the first record's data.
        content[4096 + 600] ^= 1;
        std::fs::write(&path, &content).unwrap();
        a.generation = Generation { number: 2, id: 5 };
        back(&hub, &mut a).await;
        let from = Place::default().into();
        a.send(&Message::WantLog(WantLog { from }), Bytes::new()).await;
        let (code, reason) = refused(&mut a).await;
        assert_eq!(code, RefusedCode::Faulted, "{reason}");
        assert!(reason.contains("cp-0000000001.log"), "{reason}");
        hub.stop().await;
    });
}

/// What lies before the place is not read: a sick record there does no harm.
async fn what_lies_before_is_not_read(
    hub: &Hub,
    dir: &std::path::Path,
    a: &mut Fake,
    sent: &[Transfer],
) {
    let file = &log_files(dir, a)[0];
    let mut bytes = std::fs::read(file).unwrap();
    let first = sent[0].bytes();
    let at = bytes.windows(first.len()).position(|window| window == first).unwrap();
    bytes[at + first.len() - 1] ^= 1;
    std::fs::write(file, &bytes).unwrap();
    // That it is read from further ahead, and then a fault, is another test's.
    let have = 17;
    back(hub, a).await;
    let from = sent[have - 1].place().into();
    a.send(&Message::WantLog(WantLog { from }), Bytes::new()).await;
    let mut came = 0;
    while !matches!(a.other().await.expect("the log"), Message::RefillEnd(_)) {
        came += 1;
    }
    assert_eq!(came, sent.len() - have);
    bytes[at + first.len() - 1] ^= 1;
    std::fs::write(file, &bytes).unwrap();
    back(hub, a).await;
}

/// Its log full, a source gets no credit; the other goes on; after the CP it goes on as well.
#[test]
fn a_source_at_its_log_limit_waits_alone() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path(), &["a", "b"]);
        options.nvram.1 = ByteCount(64 << 20);
        options.sources[0].log_limit = Some(ByteCount(16 << 20));
        let hub = Hub::start(options).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        let welcome = a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        let mut credit = welcome.log_credit;
        let mut sent = 0_u64;
        let mut last = None;
        let begin = Instant::now();
        while credit > 0 {
            let transfer = a.write(0, 1 + u8::try_from(sent % 200).unwrap(), 64);
            a.send_transfer(&transfer).await;
            sent += 1;
            assert!(sent < 64, "more went into the log than it has room for");
            assert!(begin.elapsed() < Duration::from_secs(20));
            credit = a.acked().await.log_credit;
            last = Some(transfer.id());
        }
        println!("{sent} transfers of 256 KiB, then no credit");
        assert!(sent >= 32, "half of the limit can be used");
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        assert!(lane.cursors().fault.is_none());
        // A Welcome gives no more than an Ack.
        assert_eq!(back(&hub, &mut a).await.log_credit, 0);
        for vbn in 0..20 {
            b.put(vbn, 1).await;
            assert!(b.acked().await.log_credit > 0, "the other source is not touched");
        }
        let last = last.unwrap();
        let done = a.checkpoint_with(|encoder| encoder.reference(Vbn(0), 64, last, 0)).await;
        assert!(matches!(done, Message::CpDone(_)), "{done:?}");
        loop {
            match a.receive().await.expect("an Ack with credit") {
                Message::Ack(ack) if ack.log_credit > 0 => break,
                _ => {}
            }
        }
        let next = a.write(0, 9, 64);
        a.send_transfer(&next).await;
        a.acked().await;
        assert!(hub.snapshots().iter().all(|shown| shown.state == SourceState::InSync));
        hub.stop().await;
    });
}

/// A source that sends more than it was given credit for is cut off before anything is kept.
#[test]
fn a_source_that_ignores_its_credit_is_cut_off() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        a.put(0, 1).await;
        a.acked().await;
        until("nothing is under way", || lane.cursors().under_way_bytes == 0).await;
        let held = a.last;
        let transfer = a.write(1, 1, 1);
        let bytes = to_u64(transfer.bytes().len());
        lane.stand_still(LOG_CREDIT_BYTES_MIN - bytes + 1);
        a.send_transfer(&transfer).await;
        let (code, reason) = refused(&mut a).await;
        assert_eq!((code, reason.contains("credit")), (RefusedCode::Protocol, true), "{reason}");
        assert_eq!(lane.cursors().staged, held);
        // The last byte of the credit may be used.
        lane.stand_still(LOG_CREDIT_BYTES_MIN - bytes);
        assert_eq!(back(&hub, &mut a).await.last, held.into());
        a.send_transfer(&transfer).await;
        a.acked().await;
        hub.stop().await;
    });
}

/// However often it is asked for, an image is read once at a time.
#[test]
fn a_flood_of_scans_reads_the_image_once() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let data = a.write(0, 5, 64);
        a.send_transfer(&data).await;
        a.acked().await;
        let id = data.id();
        let done = a.checkpoint_with(|encoder| encoder.reference(Vbn(0), 64, id, 0)).await;
        assert!(matches!(done, Message::CpDone(_)));
        for token in 0..40 {
            a.send(&Message::Scan(Scan { cp: CpNumber(1), token }), Bytes::new()).await;
        }
        let (mut read, mut turned_away) = (0, 0);
        while read + turned_away < 40 {
            match a.other().await.expect("an answer to each") {
                Message::Scanned(scanned) if scanned.problems.is_empty() => {
                    assert_eq!(scanned.volumes[0].root, Some(a.root()));
                    read += 1;
                }
                Message::Scanned(_) => turned_away += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(read > 0 && turned_away > 0, "{read} read, {turned_away} turned away");
        hub.stop().await;
    });
}

/// A source that lies about the place of its own CP harms nobody: not the hub at its next start.
#[test]
fn a_lie_about_the_place_of_a_cp_stays_with_the_liar() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        let hub = Hub::start(options(dir.path(), &["a", "b"])).await.unwrap();
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        let id = a.put(0, 1).await;
        a.acked().await;
        b.put(0, 1).await;
        b.acked().await;
        let lie = Place { hash: StreamHash([0xee; 16]), ..a.last };
        let full = PartitionFull {
            cp: a.cp,
            last: lie.into(),
            base: None,
            replay: false,
            keeps_log: false,
        };
        a.send(&Message::PartitionFull(full), Bytes::new()).await;
        let mut encoder = crate::wire::updates::Encoder::new(65_536);
        encoder.reference(Vbn(0), 1, id, 0);
        let payload = encoder.finish();
        let update_bytes = to_u64(payload.len());
        let volume = crate::units::numbers::VolumeNumber(0);
        let updates = crate::wire::message::Updates { cp: a.cp, volume };
        a.send(&Message::Updates(updates), payload.into()).await;
        let roots = vec![VolumeRoot { volume, root: a.root() }];
        let end = CpEnd { cp: a.cp, place: lie.into(), roots, update_bytes };
        a.send(&Message::CpEnd(end), Bytes::new()).await;
        let Some(Message::CpRejected(no)) = a.other().await else { panic!("not rejected") };
        assert!(no.cp == a.cp && !no.no_space, "{no:?}");
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        assert_eq!(lane.cursors().applied_cp, CpNumber(0), "nothing was published");
        hub.stop().await;
        drop((lane, hub));
        let hub = start_again(options(dir.path(), &["a", "b"])).await;
        b.generation = Generation { number: 2, id: 7 };
        assert_eq!(back(&hub, &mut b).await.last, b.last.into());
        a.generation = Generation { number: 2, id: 7 };
        let welcome = back(&hub, &mut a).await;
        let truth = (CpNumber(0), a.last.into());
        assert_eq!((welcome.applied_cp, welcome.last), truth, "the hub knows what it was sent");
        assert!(matches!(a.checkpoint(&[(0, id)]).await, Message::CpDone(_)), "the truth is taken");
        assert_eq!(image_root(&hub, &a), a.root());
        hub.stop().await;
    });
}
