//! How long the oldest entry of a source waits for each step of the ladder, as it is shown.

use std::sync::Arc;

use super::fake::Fake;
use super::{in_system, options, until};
use crate::hub::Hub;
use crate::hub::lane::{Cursors, Lane};
use crate::hub::waits::Since;
use crate::record::marks::Place;
use crate::units::ids::SourceId;
use crate::units::machine;
use crate::units::numbers::SequenceNumber;
use crate::wire::message::Message;

/// Goal: while the apply is held, and then the commit, exactly what is behind them waits.
#[test]
#[expect(clippy::await_holding_lock, reason = "held back are other threads only")]
fn an_entry_waits_for_its_cp_and_then_for_the_commit() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let hub = Arc::new(Hub::start(options(dir.path(), &["a"])).await.unwrap());
        let shown = || hub.snapshots().remove(0);
        let mut source = Fake::new("a");
        source.welcomed(hub.address()).await;
        assert_eq!(shown().since, Since::default(), "nothing came, nothing waits");
        let begun = machine::now();
        let id = source.put(1, 4).await;
        source.acked().await;
        until("it lies in the log, and waits for its CP", || {
            let Since { staged, drained, applied } = shown().since;
            (staged, drained) == (None, None) && applied.is_some_and(|since| since >= begun)
        })
        .await;
        // Held: the age is that of the entry, however often it is asked.
        let first = shown().since;
        let other = source.put(2, 1).await;
        source.acked().await;
        until("another one lies beside it", || shown().totals.drained_bytes >= 2 * 4096).await;
        assert_eq!(shown().since.applied, first.applied, "the oldest counts");
        let pool = hub.shared().pool.clone();
        let held = pool.hold_commits();
        let checkpoint = actix::spawn(async move {
            let answer = source.checkpoint(&[(1, id), (2, other)]).await;
            assert!(matches!(answer, Message::CpDone(_)), "{answer:?}");
            source
        });
        until("its trees are built", || shown().since == Since::default()).await;
        assert!(shown().cursors.oldest_invisible().is_some(), "no CP shows it");
        drop(held);
        let source = checkpoint.await.unwrap();
        until("nothing waits", || shown().cursors.oldest_invisible().is_none()).await;
        assert_eq!(shown().since, Since::default());
        drop(source);
        hub.stop().await;
    });
}

/// Goal: what is held before the log waits for every step from there on, and no other.
#[test]
fn what_is_held_in_the_ring_waits_for_the_log_and_all_behind_it() {
    let at = |sequence| Place { sequence: SequenceNumber(sequence), ..Place::default() };
    let lane = |durable, drained| {
        let (staged, durable, drained) = (at(durable), at(durable), at(drained));
        let cursors = Cursors { staged, durable, drained, ..Cursors::default() };
        Lane::new("a".parse().unwrap(), SourceId([7; 16]), cursors)
    };
    let before = machine::now();
    let held = lane(9, 4);
    let told = held.since(&held.cursors());
    assert_eq!(told.staged, None);
    assert!(told.drained.is_some_and(|since| since >= before) && told.applied == told.drained);
    assert!(held.staged(at(12), 512, 512));
    let told = held.since(&held.cursors());
    assert!(told.staged.is_some_and(|since| since >= before));
    assert!(told.drained <= told.staged, "what is in the ring is older");
    // Negative control: with everything in the log nothing waits.
    let idle = lane(9, 9);
    assert_eq!(idle.since(&idle.cursors()), Since::default());
}
