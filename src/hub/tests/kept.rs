//! Kept CPs of a hub, as readers see them: the old content while the image moves on.

use super::*;
use crate::hub::images::Images;
use crate::nbd::export::{Export, Exports, OpenError, Segment};
use crate::units::names::{KeptName, SourceName};
use crate::units::retention::Retention;

fn names() -> (SourceName, KeptName) {
    ("a".parse().unwrap(), "mon".parse().unwrap())
}

/// The first byte of each of the first four blocks.
async fn bytes(export: &dyn Export) -> Vec<u8> {
    let mut all = Vec::new();
    for segment in export.read(0, 4 * 4096).await.unwrap() {
        match segment {
            Segment::Data(data) => all.extend_from_slice(&data),
            Segment::Hole(length) => all.resize(all.len() + usize::try_from(length).unwrap(), 0),
        }
    }
    all.chunks(4096).map(|block| block[0]).collect()
}

async fn unknown(images: &Images, name: &str) {
    let met = images.open(name).await.map(|_| ());
    assert!(matches!(met, Err(OpenError::Unknown)), "{name}: {met:?}");
}

/// Goal: `SOURCE/VOLUME@NAME` reads what was kept, while CPs are published and after a restart of
/// the hub; it is listed, shared by connections, cannot be dropped under a reader, and its blocks
/// come back.
#[test]
fn a_kept_cp_is_served_while_the_image_moves_on() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path(), &["a"]);
        let hub = Hub::start(options.clone()).await.unwrap();
        let (source, mon) = names();
        assert!(hub.kept(&source).unwrap().is_empty(), "a source that was never heard");
        assert!(hub.keep(&source, mon.clone()).await.is_err());
        let mut a = Fake::new("a");
        a.welcomed(hub.address()).await;
        let met = hub.keep(&source, mon.clone()).await.unwrap_err();
        assert!(met.to_string().contains("nothing was published yet"), "{met}");
        let id = a.put(0, 1).await;
        a.acked().await;
        let done = a.checkpoint(&[(0, id)]).await;
        assert!(matches!(done, Message::CpDone(_)), "{done:?}");
        let row = hub.keep(&source, mon.clone()).await.unwrap();
        assert_eq!((row.cp, row.volumes.len()), (CpNumber(1), 1));

        let images = Images::new(hub.shared().clone());
        let listed: Vec<_> = images.list().into_iter().map(|listed| listed.name).collect();
        assert_eq!(listed, ["a/vol0", "a/vol0@mon"]);
        let old = images.open("a/vol0@mon").await.unwrap();
        assert!(old.info().read_only && old.info().multi_conn);
        let id = a.put(0, 2).await;
        a.acked().await;
        a.checkpoint(&[(0, id)]).await;
        assert_eq!(bytes(&*old).await, [1, 0, 0, 0]);
        assert_eq!(bytes(&*images.open("a/vol0").await.unwrap()).await, [2, 0, 0, 0]);
        assert!(old.write(0, Bytes::from_static(&[0; 4096]), false).await.is_err());
        for name in ["a/vol0@tue", "a/vol1@mon", "b/vol0@mon", "a/vol0@", "a/vol0@mon@mon"] {
            unknown(&images, name).await;
        }
        let met = hub.drop_kept(&source, mon.clone()).await.unwrap_err();
        assert!(met.to_string().contains("readers have it open"), "{met}");
        drop((old, images));
        drop(a);
        hub.stop().await;
        drop(hub);

        let hub = start_again(options).await;
        let images = Images::new(hub.shared().clone());
        let old = images.open("a/vol0@mon").await.unwrap();
        assert_eq!(bytes(&*old).await, [1, 0, 0, 0]);
        drop(old);
        assert!(hub.shared().pool.space().unwrap().kept.0 > 0);
        assert!(hub.drop_kept(&source, mon.clone()).await.unwrap().blocks.0 > 0);
        unknown(&images, "a/vol0@mon").await;
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean() && report.only_kept == 0, "{:?}", report.findings);
        hub.stop().await;
    });
}

/// The names a source keeps, oldest first.
fn kept_of(hub: &Hub, source: &SourceName) -> Vec<String> {
    let kept = hub.kept(source).unwrap();
    kept.iter().map(|kept| kept.row.name.to_string()).collect()
}

/// A CP with `byte` in the first block.
async fn cp(source: &mut Fake, byte: u8) {
    let id = source.put(0, byte).await;
    source.acked().await;
    let done = source.checkpoint(&[(0, id)]).await;
    assert!(matches!(done, Message::CpDone(_)), "{done:?}");
}

/// Goal: `keep` of the source's file: the newest CPs are kept by themselves, the oldest go and give
/// their blocks back, a name given by hand stays, one that is read waits for its reader; all of that
/// also behind a restart, and a changed file is followed.
#[test]
fn cps_are_kept_by_themselves() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let retention = Retention { last: 2, hourly: 0, daily: 1, drop_when_full: false };
        let mut options = options(dir.path(), &["a", "b"]);
        options.sources[0].keep = Some(retention);
        let hub = Hub::start(options.clone()).await.unwrap();
        let (source, mon) = names();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        cp(&mut b, 9).await;
        cp(&mut a, 1).await;
        until("CP 1 is kept", || kept_of(&hub, &source).iter().any(|name| name == "last-1")).await;
        hub.keep(&source, mon.clone()).await.unwrap();
        let daily = kept_of(&hub, &source).into_iter().find(|name| name.starts_with("daily-"));
        let daily = daily.expect("the first CP of the day is kept");
        for byte in 2..=3 {
            cp(&mut a, byte).await;
            let name = format!("last-{byte}");
            until("the next one is kept", || kept_of(&hub, &source).contains(&name)).await;
        }
        until("the oldest is dropped", || {
            kept_of(&hub, &source) == [&daily, "mon", "last-2", "last-3"]
        })
        .await;
        assert!(hub.kept(&"b".parse().unwrap()).unwrap().is_empty(), "its file says nothing");

        // A reader holds it: it is dropped when that has gone.
        let images = Images::new(hub.shared().clone());
        let old = images.open("a/vol0@last-2").await.unwrap();
        cp(&mut a, 4).await;
        until("CP 4 is kept", || kept_of(&hub, &source).contains(&"last-4".to_owned())).await;
        assert_eq!(bytes(&*old).await, [2, 0, 0, 0]);
        drop((old, images));
        let two = |newest: [&str; 2]| {
            vec![daily.clone(), "mon".to_owned(), newest[0].into(), newest[1].into()]
        };
        until("it is dropped behind its reader", || {
            kept_of(&hub, &source) == two(["last-3", "last-4"])
        })
        .await;
        drop((a, b));
        hub.stop().await;
        drop(hub);

        // Another life, another file: one of each, and nothing is kept twice.
        options.sources[0].keep = Some(Retention { last: 1, ..retention });
        let hub = start_again(options.clone()).await;
        let one = vec![daily.clone(), "mon".to_owned(), "last-4".to_owned()];
        until("the file is followed", || kept_of(&hub, &source) == one).await;
        options.sources[0].keep = None;
        hub.settle(options.sources.clone()).await;
        hub.drop_kept(&source, "last-4".parse().unwrap()).await.unwrap();
        hub.drop_kept(&source, daily.parse().unwrap()).await.unwrap();
        assert_eq!(kept_of(&hub, &source), ["mon"], "without `keep` nothing is kept");
        hub.drop_kept(&source, mon).await.unwrap();
        let report = check(&hub.shared().pool, Depth::Data).unwrap();
        assert!(report.is_clean() && report.only_kept == 0, "{:?}", report.findings);
        hub.stop().await;
    });
}

/// Goal: `drop_when_full`: each CP without room costs the oldest of those that were kept by
/// themselves; without it, and of names given by hand, none.
#[test]
fn kept_cps_give_way_only_where_the_file_says_so() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path(), &["a", "b"]);
        let keep =
            |drop_when_full| Some(Retention { last: 9, hourly: 0, daily: 0, drop_when_full });
        options.sources[0].keep = keep(true);
        options.sources[1].keep = keep(false);
        let hub = Hub::start(options).await.unwrap();
        let (mut a, mut b) = (Fake::new("a"), Fake::new("b"));
        let (name_a, mon) = names();
        let name_b: SourceName = "b".parse().unwrap();
        a.welcomed(hub.address()).await;
        b.welcomed(hub.address()).await;
        for byte in 1..=3 {
            for (who, name) in [(&mut a, &name_a), (&mut b, &name_b)] {
                cp(who, byte).await;
                let last = format!("last-{byte}");
                until("kept", || kept_of(&hub, name).contains(&last)).await;
            }
            if byte == 1 {
                hub.keep(&name_a, mon.clone()).await.unwrap();
            }
        }
        hub.shared().keeping.no_room(&name_a);
        hub.shared().keeping.no_room(&name_b);
        until("one is given up", || kept_of(&hub, &name_a) == ["mon", "last-2", "last-3"]).await;
        assert_eq!(kept_of(&hub, &name_b), ["last-1", "last-2", "last-3"]);
        hub.shared().keeping.no_room(&name_a);
        until("one more", || kept_of(&hub, &name_a) == ["mon", "last-3"]).await;
        hub.stop().await;
    });
}
