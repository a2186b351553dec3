//! Seeds: shown from the begin to the end, taken over or given up with news, bounded by the source's
//! `space_limit` together, and gone with a source that is forgotten.

use super::*;
use crate::hub::failover::Refusal;
use crate::hub::seed::book::{Fate, News, Shown};
use crate::hub::seed::{Order, Piece, Seeded};
use crate::units::BLOCK_BYTES_U64;
use crate::units::names::{SourceName, VolumeName};

/// That of the fake source.
const BLOCKS: u64 = 256;

fn order(volume: &str, has_file: bool) -> Order {
    let size = Some(ByteCount(BLOCKS * BLOCK_BYTES_U64));
    Order { source: "a".parse().unwrap(), volume: volume.parse().unwrap(), size, has_file }
}

/// Feeds so many blocks, and the end if `ends`.
async fn seed(hub: &Hub, order: Order, blocks: u64, ends: bool) -> Result<Seeded, Refusal> {
    let (sender, pieces) = tokio::sync::mpsc::channel(1);
    let fed = async move {
        for vbn in 0..blocks {
            let bytes = vec![7; 4096];
            let piece = Piece::Data { offset: vbn * BLOCK_BYTES_U64, bytes };
            if sender.send(piece).await.is_err() {
                return;
            }
        }
        if ends {
            drop(sender.send(Piece::End(BLOCKS * BLOCK_BYTES_U64)).await);
        }
    };
    tokio::join!(hub.seed(order, pieces, |_, _| ()), fed).0
}

fn name() -> SourceName {
    "a".parse().unwrap()
}

fn shown(hub: &Hub) -> Vec<(VolumeName, Shown)> {
    hub.shared().seeds.of_source(&name())
}

fn fates(hub: &Hub) -> Vec<Fate> {
    shown(hub).into_iter().map(|(_, shown)| shown.fate).collect()
}

fn news(hub: &Hub) -> Vec<(String, String)> {
    let of = |News { what, result, .. }| (what, result);
    hub.shared().seeds.news().into_iter().map(of).collect()
}

fn is_clean(hub: &Hub) {
    let report = check(&hub.shared().pool, Depth::Data).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

async fn again(hub: Hub, options: &HubOptions) -> Hub {
    hub.stop().await;
    drop(hub);
    start_again(options.clone()).await
}

/// Goal: a seed is shown as it is at every moment, when it was taken behind a restart too; what becomes of
/// it is news once, a restart makes none.
#[test]
fn a_seed_is_shown_until_its_source_has_it() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = options(dir.path(), &["a"]);
        let hub = Hub::start(settings.clone()).await.unwrap();
        assert!(shown(&hub).is_empty() && news(&hub).is_empty(), "control: nothing without one");
        seed(&hub, order("vol0", true), 3, false).await.expect_err("it ends too soon");
        assert_eq!(fates(&hub), [Fate::Unfinished]);
        let hub = again(hub, &settings).await;
        assert_eq!(fates(&hub), [Fate::Unfinished]);
        let mut a = Fake::new("a");
        let Message::Refused(refused) = a.connect(hub.address()).await else { panic!("held off") };
        assert!(refused.reason.contains("not filled to its end"), "{}", refused.reason);

        let seeded = seed(&hub, order("vol0", true), 5, true).await.unwrap();
        let before = shown(&hub)[0].1;
        assert_eq!((before.fate, before.blocks), (Fate::Waiting, seeded.blocks));
        let taken = before.taken_at.expect("a time");
        assert!((crate::units::machine::unix_seconds() - taken).abs() < 60, "{taken}");
        let hub = again(hub, &settings).await;
        assert_eq!(shown(&hub)[0].1, before);
        assert!(news(&hub).is_empty(), "nothing has become of it");

        a.welcomed(hub.address()).await;
        let after = shown(&hub)[0].1;
        assert_eq!((after.fate, after.taken_at), (Fate::Adopted, Some(taken)));
        assert!(after.ended_at.is_some_and(|at| at >= taken));
        let told = news(&hub);
        assert_eq!(
            told,
            [("seed of vol0 adopted".to_owned(), "the image begins with it".to_owned())]
        );
        assert!(news(&hub).is_empty(), "told once");
        is_clean(&hub);
        hub.stop().await;
    });
}

/// Goal: one that is discarded has gone, and that is told.
#[test]
fn a_seed_that_is_discarded_is_told() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let settings = options(dir.path(), &["a"]);
        let hub = Hub::start(settings.clone()).await.unwrap();
        let free = |hub: &Hub| hub.shared().pool.space().unwrap().free;
        let before = free(&hub);
        seed(&hub, order("vol0", true), 9, true).await.unwrap();
        assert!(free(&hub) < before);
        hub.discard_seed(name(), "vol0".parse().unwrap()).await.unwrap();
        assert_eq!((fates(&hub), free(&hub)), (vec![Fate::Discarded], before));
        assert_eq!(news(&hub)[0].0, "seed of vol0 given up");
        // What is seeded anew is shown as that.
        seed(&hub, order("vol0", true), 9, true).await.unwrap();
        assert_eq!(fates(&hub), [Fate::Waiting]);
        is_clean(&hub);
        hub.stop().await;
    });
}

/// Goal: all seeds of a source together stay within its `space_limit`; the refusal names what the others
/// have. Control: without a limit the same seeds are filled, and one alone fits.
#[test]
fn the_seeds_of_a_source_share_its_space() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a"]);
        settings.sources[0].space_limit = Some(ByteCount(100 * BLOCK_BYTES_U64));
        let hub = Hub::start(settings.clone()).await.unwrap();
        let first = seed(&hub, order("vol0", true), 60, true).await.unwrap();
        assert!((60..80).contains(&first.blocks.0), "{first:?}");
        let refused = seed(&hub, order("vol1", true), 200, true).await.expect_err("too much");
        let others = format!("its other seeds have {} bytes", first.blocks.0 * BLOCK_BYTES_U64);
        assert!(refused.reason.contains("space_limit of a is 409600 bytes"), "{refused:?}");
        assert!(refused.reason.contains(&others), "{refused:?}");
        assert!(refused.next_step.contains("raise it in a.toml"), "{refused:?}");
        let all: u64 = shown(&hub).iter().map(|(_, shown)| shown.blocks.0).sum();
        assert!(all <= 100, "{all} blocks");
        // Two at once would each see the other as it was.
        let turn = hub.shared().seeds.begin(&name(), &"vol0".parse().unwrap(), false).unwrap();
        let busy = seed(&hub, order("vol1", true), 1, true).await.expect_err("one at a time");
        assert!(busy.reason.contains("a seed of a/vol0 is being filled"), "{busy:?}");
        drop(turn);
        settings.sources[0].space_limit = None;
        hub.settle(settings.sources.clone()).await;
        seed(&hub, order("vol1", true), 200, true).await.expect("no limit");
        is_clean(&hub);
        hub.stop().await;
    });
}

/// Goal: a source that has nothing but a seed is shown and can be forgotten, also behind a restart without
/// its file; nothing is left of it. Whoever fills a seed meanwhile keeps it from being forgotten, and a
/// refused `forget` gives nothing up.
#[test]
fn forget_leaves_no_seed_behind() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a"]);
        let hub = Hub::start(settings.clone()).await.unwrap();
        let before = hub.shared().pool.space().unwrap().free;
        seed(&hub, order("vol0", true), 9, true).await.unwrap();
        seed(&hub, order("vol1", true), 2, false).await.expect_err("it ends too soon");
        settings.sources.clear();
        let hub = again(hub, &settings).await;
        let snapshots = hub.snapshots();
        assert_eq!((snapshots.len(), snapshots[0].state), (1, SourceState::Retired), "it is shown");
        let turn = hub.shared().seeds.begin(&name(), &"vol1".parse().unwrap(), false).unwrap();
        let refused = hub.forget(&name()).await.expect_err("somebody fills it");
        assert!(refused.reason.contains("a/vol1 is being filled"), "{refused:?}");
        drop(turn);
        assert_eq!(hub.shared().pool.catalog().seeds().unwrap().len(), 2, "nothing was given up");
        let forgotten = hub.forget(&name()).await.unwrap();
        assert!(forgotten.freed.0 >= 11, "{forgotten:?}");
        assert!(shown(&hub).is_empty() && hub.snapshots().is_empty());
        assert_eq!(news(&hub).len(), 2, "each is told");
        assert_eq!(hub.shared().pool.space().unwrap().free, before);
        // Without a file it is nobody by now.
        let nobody = seed(&hub, order("vol0", false), 1, true).await.expect_err("no such source");
        assert!(nobody.reason.contains("there is no source a"), "{nobody:?}");
        let hub = again(hub, &settings).await;
        assert!(
            hub.snapshots().is_empty() && hub.shared().pool.catalog().seeds().unwrap().is_empty()
        );
        is_clean(&hub);
        hub.stop().await;
    });
}

/// Goal: a source that may not be forgotten yet, since this hub serves it, keeps its seeds: they
/// went first once.
#[test]
fn a_forget_that_is_refused_gives_up_no_seed() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = options(dir.path(), &["a"]);
        let hub = Hub::start(settings.clone()).await.unwrap();
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        drop(a);
        until("it is away", || !hub.snapshots()[0].connected).await;
        seed(&hub, order("vol0", true), 9, true).await.unwrap();
        settings.sources.clear();
        hub.settle(vec![]).await;
        // As if this hub served it.
        let lane = hub.shared().lanes.get(&name()).unwrap();
        let pool = hub.shared().pool.clone();
        let change = |row: &mut crate::pool::rows::SourceRow| {
            let known = crate::hub::extension::Extension::of(row).unwrap();
            let state = crate::hub::extension::State::Promoted;
            row.extension = crate::hub::extension::Extension { state, ..known }.encode();
        };
        pool.catalog().update_source(lane.source(), change).unwrap();
        let refused = hub.forget(&name()).await.expect_err("it is served here");
        assert!(refused.reason.contains("is served here"), "{refused:?}");
        assert_eq!(pool.catalog().seeds().unwrap().len(), 1, "its seed is there");
        assert_eq!(fates(&hub), [Fate::Waiting]);
        hub.stop().await;
    });
}
