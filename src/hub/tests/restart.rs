//! The hub's process dies between any two steps: what it had said before, it knows after.
//!
//! At each step the files are copied as the kernel has them, and a hub is started on the copy: that
//! is what a kill leaves. The test holds both sources by hand, so nothing moves while it copies.

use std::path::Path;

use bytes::Bytes;

use super::fake::Fake;
use super::{image_root, in_system, log_files, options, start_again, until};
use crate::hub::Hub;
use crate::record::marks::Place;
use crate::units::numbers::{CpNumber, Generation, TransferId, Vbn};
use crate::volume::check::{Depth, check};
use crate::wire::message::{Message, PartitionFull, Updates};
use crate::wire::updates::Encoder;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// What the test knows of both sources at a step.
struct Known<'a> {
    a: &'a Fake,
    b: &'a Fake,
    /// CP of `a` that was published, and what its image holds.
    applied: (CpNumber, Vec<u8>),
    /// A CP of `a` that was told and is not published: its place, and what it holds.
    frozen: Option<(CpNumber, Place, Vec<u8>)>,
    /// Blocks of `a` that no published CP holds, by label.
    open: Vec<(CpNumber, Vec<(u64, TransferId)>)>,
    of_b: Vec<(u64, TransferId)>,
    sent_by_b: Vec<Bytes>,
}

/// Starts a hub on the files of `dir` and looks whether it has everything.
async fn check_at(step: &str, dir: &Path, known: &Known<'_>) {
    let hub = start_again(options(dir, &["a", "b"])).await;
    let (mut a, mut b) = (known.a.twin(), known.b.twin());
    let welcome = a.welcomed(hub.address()).await;
    assert_eq!(welcome.last, a.last.into(), "{step}: everything acknowledged");
    assert_eq!(welcome.applied_cp, known.applied.0, "{step}");
    let mut shown = a.twin();
    (shown.cp, shown.image) = (known.applied.0.next(), known.applied.1.clone());
    assert_eq!(image_root(&hub, &shown), shown.root(), "{step}: the image of that CP");
    let welcome = b.welcomed(hub.address()).await;
    assert_eq!(welcome.last, b.last.into(), "{step}: the other source");
    let reader = hub.shared().store.reader(b.id, b.cp).unwrap();
    let kept: Vec<_> = reader.transfers().map(|kept| kept.unwrap().bytes().clone()).collect();
    assert!(kept == known.sent_by_b, "{step}: its entries are untouched");
    // What was open becomes visible, from the logs alone: the references are all it is sent.
    for (cp, blocks) in &known.open {
        let reader = hub.shared().store.reader(a.id, *cp).unwrap();
        let ids: Vec<_> = reader.transfers().map(|kept| kept.unwrap().id()).collect();
        let want: Vec<_> = blocks.iter().map(|(_, id)| *id).collect();
        assert_eq!(ids, want, "{step}: the log of CP {cp}");
    }
    let (last, image) = (a.last, a.image.clone());
    for (cp, blocks) in &known.open {
        // The CP that was told before is the same one again (R6).
        let frozen = known.frozen.clone().filter(|(frozen, ..)| frozen == cp);
        let end = frozen.map(|(_, place, image)| (place, image));
        (a.last, a.image) = end.unwrap_or((last, image.clone()));
        a.cp = *cp;
        let done = a.checkpoint(blocks).await;
        assert!(matches!(done, Message::CpDone(_)), "{step}: {done:?}");
        assert_eq!(image_root(&hub, &a), a.root(), "{step}");
    }
    let done = b.checkpoint(&known.of_b).await;
    assert!(matches!(done, Message::CpDone(_)), "{step}: {done:?}");
    assert_eq!(image_root(&hub, &b), b.root(), "{step}");
    let report = check(&hub.shared().pool, Depth::Data).unwrap();
    assert!(report.is_clean(), "{step}: {:?}", report.findings);
    hub.stop().await;
}

#[test]
#[expect(clippy::too_many_lines, reason = "one life with its steps in order")]
fn a_crash_between_any_two_steps_loses_nothing() {
    in_system(async {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("hub");
        let at = |step: &str| home.path().join(step);
        let hub = Hub::start(options(&dir, &["a", "b"])).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        let mut sent_by_b = Vec::new();
        let mut of_b = Vec::new();
        for vbn in 3..6 {
            let transfer = b.write(vbn, 9, 1);
            b.send_transfer(&transfer).await;
            of_b.push((vbn, transfer.id()));
            sent_by_b.push(transfer.bytes().clone());
        }
        b.acked().await;
        let base = a.put(100, 8).await;
        a.acked().await;
        assert!(matches!(a.checkpoint(&[(100, base)]).await, Message::CpDone(_)));
        let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
        until("its log is gone", || log_files(&dir, &a).is_empty()).await;
        let (applied, before) = (CpNumber(1), a.image.clone());

        let mut blocks = Vec::new();
        for vbn in 0..4 {
            blocks.push((vbn, a.put(vbn, 1).await));
        }
        a.acked().await;
        copy(&dir, &at("durable"));
        until("drained", || lane.cursors().drained == a.last).await;
        copy(&dir, &at("drained"));
        let open = vec![(a.cp, blocks.clone())];
        let (fa, fb) = (&a, &b);
        let known = |applied: (CpNumber, Vec<u8>), open| Known {
            a: fa,
            b: fb,
            applied,
            frozen: None,
            open,
            of_b: of_b.clone(),
            sent_by_b: sent_by_b.clone(),
        };
        for step in ["durable", "drained"] {
            check_at(step, &at(step), &known((applied, before.clone()), open.clone())).await;
        }

        // The CP is told, and entries of the next one are behind it.
        let (cp, place, root, middle) = (a.cp, a.last, a.root(), a.image.clone());
        let full =
            PartitionFull { cp, last: place.into(), base: None, replay: false, keeps_log: false };
        a.send(&Message::PartitionFull(full), Bytes::new()).await;
        a.cp = cp.next();
        let next = a.put(9, 5).await;
        a.acked().await;
        until("told", || hub.snapshots()[0].applying == Some(cp)).await;
        until("drained", || lane.cursors().drained == a.last).await;
        copy(&dir, &at("told"));
        let mut encoder = Encoder::new(65_536);
        blocks.iter().for_each(|&(vbn, id)| encoder.reference(Vbn(vbn), 1, id, 0));
        let payload = encoder.finish();
        let bytes = u64::try_from(payload.len()).unwrap();
        let volume = crate::units::numbers::VolumeNumber(0);
        a.send(&Message::Updates(Updates { cp, volume }), payload.into()).await;
        loop {
            if let Some(Message::Ack(ack)) = a.receive().await
                && ack.cp_taken >= bytes
            {
                break;
            }
        }
        copy(&dir, &at("updates"));
        let Message::CpEnd(mut end) = a.end(bytes, root) else { unreachable!() };
        (end.cp, end.place) = (cp, place.into());
        a.send(&Message::CpEnd(end), Bytes::new()).await;
        let done = a.other().await;
        assert!(matches!(&done, Some(Message::CpDone(done)) if done.cp == cp), "{done:?}");
        until("the log is dropped", || log_files(&dir, &a).len() == 1).await;
        copy(&dir, &at("dropped"));
        // Published and not dropped yet: the logs of before with the catalog of after.
        copy(&at("updates"), &at("published"));
        std::fs::copy(dir.join("disk0"), at("published").join("disk0")).unwrap();

        let both = vec![(cp, blocks), (cp.next(), vec![(9, next)])];
        let (fa, fb) = (&a, &b);
        let frozen = Some((cp, place, middle.clone()));
        let known = |applied, open| Known {
            a: fa,
            b: fb,
            applied,
            frozen: frozen.clone(),
            open,
            of_b: of_b.clone(),
            sent_by_b: sent_by_b.clone(),
        };
        for step in ["told", "updates"] {
            check_at(step, &at(step), &known((applied, before.clone()), both.clone())).await;
        }
        for step in ["published", "dropped"] {
            check_at(step, &at(step), &known((cp, middle.clone()), both[1..].to_vec())).await;
        }
        hub.stop().await;
    });
}

/// Records of CPs that are published lie in the ring at a start: their room is given back at once,
/// also if nothing else comes.
#[test]
fn room_of_published_records_is_free_after_a_start() {
    in_system(async {
        let home = tempfile::tempdir().unwrap();
        let (dir, copied) = (home.path().join("hub"), home.path().join("copy"));
        let hub = Hub::start(options(&dir, &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        for fill in 1..4 {
            let transfer = a.write(0, fill, 64);
            a.send_transfer(&transfer).await;
            a.acked().await;
            let id = transfer.id();
            let done = a.checkpoint_with(|encoder| encoder.reference(Vbn(0), 64, id, 0)).await;
            assert!(matches!(done, Message::CpDone(_)), "{done:?}");
        }
        until("dropped", || log_files(&dir, &a).is_empty()).await;
        copy(&dir, &copied);
        hub.stop().await;
        let hub = start_again(options(&copied, &["a"])).await;
        let ring = hub.shared().stager.ring().unwrap().status();
        assert!(ring.durable.0 > 3 << 18, "the records are in the ring");
        assert_eq!(ring.release_wanted, ring.durable, "and nobody needs them");
        hub.stop().await;
    });
}

/// A log directory that is not the hub's own, or is gone, does not start silently (R20).
#[test]
fn a_lost_log_directory_is_not_passed_over() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::start(options(dir.path(), &["a"])).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        a.put(0, 1).await;
        a.acked().await;
        hub.stop().await;
        drop(hub);
        let logs = dir.path().join("logs");
        std::fs::rename(&logs, dir.path().join("aside")).unwrap();
        std::fs::create_dir(&logs).unwrap();
        let refused = refusal(options(dir.path(), &["a"])).await;
        assert!(refused.contains("hub-id") && refused.contains("source logs"), "{refused}");
        std::fs::write(logs.join("hub-id"), "00").unwrap();
        let refused = refusal(options(dir.path(), &["a"])).await;
        assert!(refused.contains("belongs to hub 00"), "{refused}");
        std::fs::remove_dir_all(&logs).unwrap();
        std::fs::rename(dir.path().join("aside"), &logs).unwrap();
        let hub = start_again(options(dir.path(), &["a"])).await;
        a.generation = Generation { number: 2, id: 1 };
        assert_eq!(a.welcomed(hub.address()).await.last, a.last.into());
        hub.stop().await;
    });
}

/// Why a hub does not start, once the one before has let go of the files.
async fn refusal(options: crate::hub::HubOptions) -> String {
    loop {
        let refused = Hub::start(options.clone()).await.unwrap_err().to_string();
        if !refused.contains("in use") {
            return refused;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
