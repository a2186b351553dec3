//! A panic in one source's actor, under load, with real sources and real readers of images.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio_util::sync::CancellationToken;

use super::*;
use crate::filer::{Filer, FilerOptions};
use crate::hub::images::Images;
use crate::nbd::client::Client;
use crate::nbd::listen::{Listen, Listener};
use crate::nbd::serve::{Options, Server};
use crate::units::names::SourceName;
use crate::units::policy::Policy;

/// How long a source may be away (the issue).
const AWAY_MAX: Duration = Duration::from_secs(2);

async fn filer(dir: &Path, hub: &Hub, name: &SourceName) -> Filer {
    let options = FilerOptions {
        name: name.clone(),
        // Longer than what is allowed: no write is answered alone meanwhile.
        hub_timeout: 4 * AWAY_MAX,
        ..failback::filer_options(dir, hub.address(), Policy::default())
    };
    let filer = Filer::start(options).await.unwrap();
    failback::served(&filer).await;
    filer
}

fn serve_images(
    hub: &Hub,
    listener: Listener,
    stop: CancellationToken,
) -> tokio::task::JoinHandle<()> {
    let images = Images::new(hub.shared().clone());
    tokio::spawn(async move { Server::new(Options::default()).run(listener, images, stop).await })
}

/// Waits until each has written and read some more.
async fn go_on(what: &str, works: &[Arc<Work>]) {
    for work in works {
        let counts = || [&work.written, &work.read].map(|count| count.load(Ordering::Relaxed));
        let before = counts();
        until(what, || counts().iter().zip(before).all(|(now, was)| *now > was + 20)).await;
    }
}

/// What clients of one source do meanwhile.
#[derive(Default)]
struct Work {
    stop: AtomicBool,
    written: AtomicU64,
    read: AtomicU64,
    longest_ms: AtomicU64,
}

/// Writes blocks one after the other until told to stop; how many.
async fn write(export: Arc<dyn crate::nbd::export::Export>, work: Arc<Work>) -> u64 {
    let mut count = 0;
    while !work.stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        let block = Bytes::from(vec![u8::try_from(count % 251).unwrap(); 4096]);
        export.write(count % 1000 * 4096, block, false).await.unwrap();
        let taken = u64::try_from(begin.elapsed().as_millis()).unwrap();
        work.longest_ms.fetch_max(taken, Ordering::Relaxed);
        count += 1;
        work.written.store(count, Ordering::Relaxed);
    }
    count
}

/// Reads an image over one NBD connection until told to stop: it is one cut, whatever happens.
fn read(socket: &Path, name: &SourceName, work: &Work) {
    let export = format!("{name}/vol0");
    let mut client = Client::unix(socket, &export, Duration::from_secs(10)).unwrap();
    let first = client.read(0, 1 << 20).unwrap();
    assert!(first.iter().any(|&byte| byte != 0), "a CP of something");
    while !work.stop.load(Ordering::Relaxed) {
        assert_eq!(client.read(0, 1 << 20).unwrap(), first, "{name}: the image moved");
        work.read.fetch_add(1, Ordering::Relaxed);
    }
}

/// Goal: a panic in one actor is that source's alone, and it is back within 2 s.
/// Method: two real sources are written to all the time, an NBD connection reads the image of
/// each; the actor of one panics. Every write of both is answered, none of them later than 2 s;
/// one restart is counted, for that source; neither reader nor the other source is cut off.
#[test]
fn a_panic_under_load_cuts_off_one_source_for_a_moment() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let names: [SourceName; 2] = ["a", "b"].map(|name| name.parse().unwrap());
        let hub = Hub::start(options(&dir.path().join("hub"), &["a", "b"])).await.unwrap();
        let socket = dir.path().join("nbd.sock");
        let listener = Listener::bind(&Listen::Unix(socket.clone())).await.unwrap();
        let stop = CancellationToken::new();
        let serving = serve_images(&hub, listener, stop.clone());
        let (mut filers, mut tasks, mut works) = (Vec::new(), Vec::new(), Vec::new());
        let mut readers = Vec::new();
        for name in &names {
            let filer = filer(&dir.path().join(name.as_str()), &hub, name).await;
            let export = failback::at_filer(&filer).await;
            export.write(0, Bytes::from(vec![7; 4096]), false).await.unwrap();
            filer.checkpoint().await.unwrap();
            let work = Arc::new(Work::default());
            tasks.push(tokio::spawn(write(export, work.clone())));
            let (socket, name, read_work) = (socket.clone(), name.clone(), work.clone());
            readers.push(tokio::task::spawn_blocking(move || read(&socket, &name, &read_work)));
            works.push(work);
            filers.push(filer);
        }
        go_on("work begins", &works).await;
        let connections = || hub.shared().counters.connections.load(Ordering::Relaxed);
        let before = connections();
        let actor = hub.shared().registry.get(&names[0]).unwrap().actor;
        assert!(actor.send(crate::hub::actor::Panic).await.is_err());
        go_on("work goes on", &works).await;
        let restarts = names.each_ref().map(|name| hub.shared().counters.restarts_of(name));
        assert_eq!(restarts, [1, 0]);
        assert!(connections() > before, "control: the source had to come again");
        for (filer, cut) in filers.iter().zip([1, 0]) {
            let counters = filer.status().counters;
            assert!(counters.disconnections.min(1) == cut, "{counters:?}");
        }
        for work in &works {
            work.stop.store(true, Ordering::Relaxed);
        }
        for ((task, reader), work) in tasks.into_iter().zip(readers).zip(works) {
            task.await.unwrap();
            reader.await.unwrap();
            let longest = Duration::from_millis(work.longest_ms.load(Ordering::Relaxed));
            assert!(longest < AWAY_MAX, "a write took {longest:?}");
        }
        for filer in &filers {
            assert_eq!(filer.status().alone, None, "nothing was answered alone");
            filer.stop().await.unwrap();
        }
        stop.cancel();
        serving.await.unwrap();
        hub.stop().await;
    });
}
