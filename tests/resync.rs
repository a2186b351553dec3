//! Bringing an image up where births tell nothing, and over a link that breaks again and again: what
//! it costs, that it is never sent again whole, and that the image moves in one step.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mirrorhub::device::file::{Access, FileDevice};
use mirrorhub::nbd::client::Client;
use mirrorhub::pool::pointer::TreeRoot;
use mirrorhub::pool::publish::Publish;
use mirrorhub::pool::rows::{SourceRow, VolumeRow};
use mirrorhub::pool::write_set::Budget;
use mirrorhub::pool::{Pool, PoolOptions};
use mirrorhub::units::hash::StreamHash;
use mirrorhub::units::numbers::{CpNumber, SequenceNumber, Vbn};
use mirrorhub::volume::writer::{Content, TreeWriter};

use crate::harness::oracle::{Known, Writer, content};
use crate::harness::{
    Cluster, SourceSettings, http_get, is_full, metric_sum, pause, status, wait_for,
};
use crate::outage::{socket, wire_bytes};

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: u64 = 4096;

fn continuing(more: &str) -> SourceSettings {
    let lines = format!("on_hub_loss = \"continue\"\nhub_timeout = \"1s\"\n{more}");
    SourceSettings::new(NAME).interval("300ms").replication(&lines)
}

/// So many blocks of a volume, the same ones each time.
pub fn some(blocks: u64, count: u64) -> BTreeSet<u64> {
    let mut chosen = BTreeSet::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while u64::try_from(chosen.len()).expect("small") < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chosen.insert(state % blocks);
    }
    chosen
}

pub fn fill(client: &mut Client, mib: u64) {
    for n in 0..mib {
        let blocks = n * 256..(n + 1) * 256;
        let chunk: Vec<u8> = blocks.flat_map(|block| content(block, 1)).collect();
        client.write(n << 20, &chunk).expect("the volume is filled");
    }
}

pub fn change(client: &mut Client, blocks: &BTreeSet<u64>, version: u64) {
    for &block in blocks {
        client.write(block * BLOCK, &content(block, version)).expect("a block is changed");
    }
}

/// Bytes that came to the hub for passes since it was started.
fn pass_bytes(cluster: &Cluster) -> f64 {
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    metric_sum(&page, "mirrorhub_source_resync_bytes_total", NAME)
}

pub fn wait_settled(cluster: &Cluster) {
    let root = || cluster.own_status(NAME)["volumes"][0]["root"].clone();
    let (mut last, mut since) = (root(), Instant::now());
    wait_for("the own CPs have come to an end", LIMIT, || {
        let met = root();
        if met != last {
            (last, since) = (met, Instant::now());
        }
        since.elapsed() > Duration::from_millis(1500)
    });
}

pub fn wait_together(cluster: &mut Cluster) {
    wait_for("both are together", LIMIT, || {
        // One that was just started may not answer yet.
        let own = status(&cluster.source_config(NAME)).map(|own| own["source"].clone());
        own.is_some_and(|own| own["state"] == "in-sync" && own["alone_since"].is_null())
    });
    cluster.wait_in_sync(NAME);
}

fn roots_meet(cluster: &Cluster) {
    let answer = cluster.checkpoint(NAME);
    let root = Cluster::root(&answer, "vol0");
    assert_eq!(cluster.own_status(NAME)["volumes"][0]["root"], root.as_str(), "roots meet");
}

fn log_lines(cluster: &Cluster, owner: &str, what: &str) -> usize {
    let text = std::fs::read_to_string(cluster.path(&format!("{owner}.log"))).unwrap_or_default();
    text.lines().filter(|line| line.contains(what)).count()
}

/// Makes the tree of a CP on what is published.
fn publish(
    pool: &Arc<Pool>,
    row: &SourceRow,
    volume: &VolumeRow,
    cp: CpNumber,
    block: impl Fn(u64) -> Option<Vec<u8>>,
) {
    let mut write_set = pool.begin(Budget::Ordinary);
    let made = TreeWriter::new(pool, &mut write_set, volume.key, volume.tree, cp);
    let mut writer = made.expect("a tree is begun");
    for vbn in 0..volume.tree.size.blocks().0 {
        let content = block(vbn);
        let content = match content.as_deref().and_then(<[u8]>::first_chunk) {
            Some(data) => Content::Data(data),
            None => Content::Hole,
        };
        writer.put(Vbn(vbn), content).expect("a block is put");
    }
    let tree = writer.finish().expect("a tree");
    let publish = Publish {
        write_set,
        source: row.id,
        cp,
        sequence: row.sequence,
        stream_hash: row.stream_hash,
        epoch: row.epoch,
        generation: None,
        extension: Some(row.extension.clone()),
        volumes: vec![(volume.key.volume, tree)],
    };
    pool.publish(publish).expect("a CP");
}

/// Gives the image at rest another content at the CP and place that it has: births tell nothing then.
fn rewrite(cluster: &Cluster, other: &BTreeSet<u64>) {
    let path = cluster.path("hub/state/disk0");
    let device = FileDevice::open(&path, Access::Cached).expect("the hub's pool");
    let pool = Pool::open(Arc::new(device), PoolOptions::default()).expect("the hub's pool");
    let catalog = pool.catalog();
    let row = catalog.sources().expect("rows").remove(0);
    let volume = catalog.volumes(row.id).expect("rows").remove(0);
    publish(&pool, &row, &volume, row.applied.next(), |_| None);
    catalog.remove_volume(volume.key).expect("an empty volume goes");
    catalog.remove_source(row.id).expect("its source goes");
    let new = SourceRow {
        applied: CpNumber(0),
        sequence: SequenceNumber(0),
        stream_hash: StreamHash::ZERO,
        ..row.clone()
    };
    catalog.put_source(new).expect("it is new");
    let volume = VolumeRow { tree: TreeRoot::empty(volume.tree.size), ..volume };
    catalog.put_volume(volume.clone()).expect("and its volume");
    publish(&pool, &row, &volume, row.applied, |vbn| {
        Some(content(vbn, if other.contains(&vbn) { 7 } else { 1 }))
    });
}

/// 1% of the blocks differ, and births do not say which.
#[test]
fn an_unknown_base_costs_at_most_twice_what_differs() {
    let mib: u64 = if is_full() { 1024 } else { 256 };
    let size = format!("{mib}MiB");
    let settings = continuing("").volumes(&[("vol0", &size)]).pool("4GiB").nvram("64MiB");
    let mut cluster = Cluster::prepare_with(&[settings], "128MiB", "4GiB");
    cluster.start_all();
    let mut client = Client::unix(&socket(&cluster, NAME), EXPORT, LIMIT).expect("it opens");
    fill(&mut client, mib);
    cluster.checkpoint(NAME);
    drop(client);
    cluster.stop_source(NAME);
    cluster.stop_hub();
    let other = some(mib * 256, mib * 256 / 100);
    rewrite(&cluster, &other);
    cluster.start_hub();
    let begin = Instant::now();
    cluster.start_source(NAME);
    wait_together(&mut cluster);
    let took = begin.elapsed().as_secs_f64();
    let (received, passed) = (wire_bytes(&cluster), pass_bytes(&cluster));
    let differ = f64::from(u32::try_from(other.len()).expect("small")) * 4096.0;
    println!(
        "{} of {} blocks differ: {received} bytes received ({:.3} per byte), {passed} of them \
         pulled; {took:.2} s from the start of the source",
        other.len(),
        mib * 256,
        received / differ
    );
    assert!(passed >= differ, "less came than differs: the counter shows nothing");
    assert!(received <= differ * 2.0, "{received} bytes for {differ} that differ");
    assert!(log_lines(&cluster, NAME, "by comparison") > 0, "nothing was compared");
    roots_meet(&cluster);
}

/// kill -9 of the hub, then of the source, in the middle of a pass: what came is kept, the rest is
/// compared and sent, and status says how far it is.
#[test]
fn a_cut_pass_is_not_sent_again() {
    let mib: u64 = if is_full() { 256 } else { 64 };
    let size = format!("{mib}MiB");
    let limit = continuing("resync_limit = \"2MiB\"");
    let mut cluster = Cluster::start(&[limit.volumes(&[("vol0", &size)]).pool("2GiB")]);
    let mut client = Client::unix(&socket(&cluster, NAME), EXPORT, LIMIT).expect("it opens");
    fill(&mut client, mib);
    cluster.checkpoint(NAME);
    cluster.kill_hub();
    wait_for("it goes on alone", LIMIT, || cluster.own_status(NAME)["alone_since"].is_object());
    let blocks = some(mib * 256, 6 * 256 * 4);
    change(&mut client, &blocks, 2);
    drop(client);
    wait_settled(&cluster);
    let differ = f64::from(u32::try_from(blocks.len()).expect("small")) * 4096.0;

    cluster.start_hub();
    let mut sum = 0.0;
    // Of a time that is no shorter than it was, the bytes of a part that is no longer: what was on
    // its way when it was asked first comes as well, for which a MiB is allowed.
    let mut first = 0.0;
    wait_for("it began", LIMIT, || {
        first = pass_bytes(&cluster);
        first > 0.0
    });
    let since = Instant::now();
    let mut half = 0.0;
    wait_for("half of it came", LIMIT, || {
        half = pass_bytes(&cluster);
        half > differ * 0.55
    });
    let (came, took) = (half - first, since.elapsed().as_secs_f64());
    println!("resync_limit 2MiB: {came} bytes in {took:.2} s, {:.0} a second", came / took);
    assert!(came > differ * 0.4, "too little of it is measured: {first} to {half}");
    let allowed = f64::from(2 << 20) * took * 1.02 + f64::from(1 << 20);
    assert!(came <= allowed, "{came} bytes in {took:.2} s: resync_limit allows {allowed}");
    let resync = cluster.own_status(NAME)["resync"].clone();
    assert!(resync["seconds_left"].as_f64().is_some_and(|left| left > 0.0), "{resync}");
    assert!(resync["percent"].as_u64().is_some_and(|percent| percent > 0), "{resync}");
    assert!(resync["sent_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{resync}");
    sum += pass_bytes(&cluster);
    cluster.kill_hub();
    cluster.start_hub();
    wait_for("more of it came", LIMIT, || pass_bytes(&cluster) > differ * 0.15);
    cluster.kill_source(NAME);
    cluster.start_source(NAME);
    wait_together(&mut cluster);
    sum += pass_bytes(&cluster);
    println!("{sum} bytes for {differ} that differ, cut twice ({:.3} per byte)", sum / differ);
    assert!(sum < differ * 1.7, "{sum} bytes for {differ}: it was sent again");
    assert!(log_lines(&cluster, "hub", "a pass that was cut goes on") >= 2, "it began anew");
    roots_meet(&cluster);
}

/// Connections to the hub that can be cut.
pub struct Proxy {
    pub address: SocketAddr,
    open: Arc<Mutex<Vec<TcpStream>>>,
    up: Arc<AtomicBool>,
}

impl Proxy {
    pub fn to(hub: SocketAddr) -> Self {
        let listener = TcpListener::bind((hub.ip(), 0)).expect("a port");
        let address = listener.local_addr().expect("its address");
        let (open, up) = (Arc::<Mutex<Vec<TcpStream>>>::default(), Arc::new(AtomicBool::new(true)));
        let (kept, is_up) = (open.clone(), up.clone());
        std::thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let far = TcpStream::connect(hub);
                let (true, Ok(far)) = (is_up.load(Ordering::SeqCst), far) else { continue };
                let ends = [near.try_clone(), far.try_clone()].map(|end| end.expect("a socket"));
                kept.lock().expect("a lock").extend(ends);
                let back = [far.try_clone(), near.try_clone()].map(|end| end.expect("a socket"));
                std::thread::spawn(move || carry(near, far));
                let [from, to] = back;
                std::thread::spawn(move || carry(from, to));
            }
        });
        Self { address, open, up }
    }

    pub fn cut(&self) {
        self.up.store(false, Ordering::SeqCst);
        for end in self.open.lock().expect("a lock").drain(..) {
            drop(end.shutdown(Shutdown::Both));
        }
    }

    pub fn mend(&self) {
        self.up.store(true, Ordering::SeqCst);
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    drop((from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both)));
}

/// R19: the link breaks every second while a long pass runs and clients write: the bytes stay below
/// twice the difference, and it comes to its end.
#[test]
fn a_link_that_flaps_every_second_does_not_keep_an_image_from_coming_up() {
    let limit = continuing("resync_limit = \"4MiB\"");
    let mut cluster = Cluster::prepare(&[limit.volumes(&[("vol0", "64MiB")]).pool("2GiB")]);
    let proxy = Proxy::to(cluster.hub_address());
    let config = cluster.source_config(NAME);
    let text = std::fs::read_to_string(&config).expect("source.toml");
    let hub = cluster.hub_address().to_string();
    assert!(text.contains(&hub), "{text}");
    std::fs::write(&config, text.replace(&hub, &proxy.address.to_string())).expect("source.toml");
    cluster.start_all();
    let mut client = Client::unix(&socket(&cluster, NAME), EXPORT, LIMIT).expect("it opens");
    fill(&mut client, 64);
    cluster.checkpoint(NAME);
    proxy.cut();
    wait_for("it goes on alone", LIMIT, || cluster.own_status(NAME)["alone_since"].is_object());
    let blocks = some(64 * 256, 5 * 1024);
    change(&mut client, &blocks, 2);
    drop(client);
    wait_settled(&cluster);
    let differ = f64::from(u32::try_from(blocks.len()).expect("small")) * 4096.0;
    let before = pass_bytes(&cluster);

    let writer = Writer::start(socket(&cluster, NAME), EXPORT, Known::default(), 2, 5);
    // How much of a second is left of it after the pause before a dial differs; that it gets on with
    // what is left does not.
    let (least, mut flaps, mut sent_by_then) = (if is_full() { 40 } else { 9 }, 0, 0.0);
    wait_for("it gets on while the link flaps", LIMIT, || {
        proxy.mend();
        pause(Duration::from_secs(1));
        proxy.cut();
        flaps += 1;
        pause(Duration::from_millis(200));
        sent_by_then = pass_bytes(&cluster) - before;
        flaps >= least && sent_by_then > differ * 0.25
    });
    proxy.mend();
    writer.stop();
    let known = writer.finish();
    wait_together(&mut cluster);
    let sent = pass_bytes(&cluster) - before;
    let load = f64::from(u32::try_from(known.answered()).expect("small")) * 4096.0;
    println!(
        "{flaps} flaps: {sent} bytes, {sent_by_then} of them while it flapped, for {differ} that \
         differ and blocks of {load} bytes written meanwhile"
    );
    assert!(sent < (differ + load) * 2.0, "{sent} bytes for {differ} and {load}");
    roots_meet(&cluster);
    let hub = socket(&cluster, "hub");
    known.check_export(&hub, EXPORT).expect("the image has every answered write");
}
