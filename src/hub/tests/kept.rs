//! Kept CPs of a hub, as readers see them: the old content while the image moves on.

use super::*;
use crate::hub::images::Images;
use crate::nbd::export::{Export, Exports, OpenError, Segment};
use crate::units::names::{KeptName, SourceName};

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
