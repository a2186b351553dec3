//! The hub is away and comes back: `on_hub_loss` continue and stop, passes, restarts in any order,
//! a flapping link, and what bringing the image up costs.
//!
//! The oracle keeps outside the volume what was answered. Loops are longer under `MIRRORHUB_FULL`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mirrorhub::nbd::client::Client;
use serde_json::Value;

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::{
    BINARY, Cluster, SourceSettings, http_get, is_full, metric_sum, pause, run, status, wait_for,
};
use crate::resync::some;

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(30);
const BLOCK: usize = 4096;
/// Beside what is in proportion to a change.
const ALLOWANCE: Duration = Duration::from_secs(1);

/// NBD socket of the hub or a source.
pub fn socket(cluster: &Cluster, owner: &str) -> PathBuf {
    cluster.path(owner).join("nbd.sock")
}

/// A source that goes on alone after a second without its hub; more lines of `[replication]`.
fn continuing(more: &str) -> SourceSettings {
    let lines = format!("on_hub_loss = \"continue\"\nhub_timeout = \"1s\"\n{more}");
    SourceSettings::new(NAME).interval("300ms").replication(&lines)
}

fn load(cluster: &Cluster, known: Known, seed: u64) -> Writer {
    Writer::start(socket(cluster, NAME), EXPORT, known, 16, seed)
}

/// Waits until the source says `what` of itself.
fn wait_own(cluster: &Cluster, what: &str, done: impl Fn(&Value) -> bool) -> Value {
    let config = cluster.source_config(NAME);
    let mut met = Value::Null;
    wait_for(&format!("{NAME} {what}"), LIMIT, || {
        met = status(&config).map_or(Value::Null, |document| document["source"].clone());
        done(&met)
    });
    met
}

fn is_alone(own: &Value) -> bool {
    own["alone_since"].is_object()
}

fn wait_alone(cluster: &Cluster) -> Value {
    wait_own(cluster, "goes on alone", is_alone)
}

/// Waits until the newest own CP holds everything that was written.
pub fn wait_settled(cluster: &Cluster) {
    let root = || cluster.own_status(NAME)["volumes"][0]["root"].clone();
    let (mut last, mut since) = (root(), Instant::now());
    wait_for("the own CPs have come to an end", LIMIT, || {
        let met = root();
        if met != last {
            (last, since) = (met, Instant::now());
        }
        since.elapsed() > Duration::from_millis(1200)
    });
}

/// In sync, both ends equal, the mark gone, `verify` agrees.
fn check_together(cluster: &mut Cluster, known: &Known) {
    check(cluster, NAME, known);
    let own = wait_own(cluster, "clears its mark", |own| own["alone_since"].is_null());
    assert_eq!(own["state"], "in-sync", "{own}");
    run(std::process::Command::new(BINARY)
        .args(["verify", NAME, "--config"])
        .arg(cluster.hub_config()));
}

/// The hub dies under load: the source goes on within `hub_timeout` and says so; back again the
/// image is brought up while clients write, and no client has seen an error.
#[test]
fn continue_goes_on_alone_and_comes_back_under_load() {
    let mut cluster = Cluster::start(&[continuing("")]);
    let mut known = Known::default();
    let mut cps = 0;
    for round in 0..if is_full() { 20 } else { 1 } {
        let writer = load(&cluster, known, 31 + round);
        writer.wait_answered(300);
        cluster.kill_hub();
        let (killed, before) = (Instant::now(), writer.answered());
        writer.wait_answered(before + 200);
        let paused = killed.elapsed();
        println!("round {round}: 200 writes answered {:.2} s after the kill", paused.as_secs_f64());
        assert!(paused < Duration::from_secs(6), "it went on only after {paused:?}");
        let own = wait_alone(&cluster);
        assert_eq!(own["policy"]["on_hub_loss"], "continue");
        assert!(!own["reason"].as_str().unwrap_or_default().is_empty(), "{own}");
        writer.wait_answered(before + 1500);
        cluster.start_hub();
        cluster.wait_in_sync(NAME);
        let back = writer.answered();
        writer.wait_answered(back + 200);
        known = writer.finish();
        check_together(&mut cluster, &known);
        let applied = cluster.on_hub(NAME)["applied_cp"].as_u64().unwrap_or_default();
        assert!(applied > cps, "the image did not move on");
        cps = applied;
    }
}

/// A hub that hangs takes connections and says nothing. The source that goes on alone does not wait
/// for it at each of its CPs: eight NVRAM partitions go through while it hangs.
#[test]
fn a_hub_that_hangs_does_not_slow_a_source_alone() {
    let mut cluster = Cluster::start(&[continuing("").nvram("16MiB").pool("1GiB")]);
    let writer = load(&cluster, Known::default(), 8);
    writer.wait_answered(100);
    cluster.signal_hub("STOP");
    wait_alone(&cluster);
    drop(writer.finish());
    let mut client = Client::unix(&socket(&cluster, NAME), EXPORT, LIMIT).expect("the volume");
    let begin = Instant::now();
    for at in 0..64 {
        client.write(at << 20, &[7; 1 << 20]).expect("alone");
    }
    let taken = begin.elapsed();
    cluster.signal_hub("CONT");
    println!("64 MiB in {taken:.1?}");
    assert!(taken < Duration::from_secs(20), "64 MiB took {taken:?}");
    check_together(&mut cluster, &Known::default());
}

/// While alone nobody is told that all is well, nor that clients wait.
#[test]
fn a_source_alone_says_so_in_state_and_next_step() {
    let mut cluster = Cluster::start(&[continuing("")]);
    let writer = load(&cluster, Known::default(), 5);
    writer.wait_answered(100);
    cluster.kill_hub();
    wait_alone(&cluster);
    let before = writer.answered();
    writer.wait_answered(before + 100);
    // The mark stands a moment before the first answer: from that on it says so.
    let own = cluster.own_status(NAME);
    drop(writer.finish());
    let next = own["next_step"].as_str().unwrap_or_default();
    assert!(!next.contains("clients wait"), "clients do not wait: {own}");
    assert!(next.contains("alone"), "it does not say that it answers alone: {own}");
}

/// During a pass the image is the old one, then the new one; both ends say `syncing`.
#[test]
fn the_image_stays_readable_and_moves_in_one_step() {
    let settings = continuing("resync_limit = \"2MiB\"").volumes(&[("vol0", "8MiB")]);
    let mut cluster = Cluster::start(&[settings]);
    let old = filled(&cluster, Known::default(), 7, 400);
    cluster.checkpoint(NAME);
    cluster.kill_hub();
    let new = filled(&cluster, old.clone(), 8, 1500);
    wait_settled(&cluster);
    cluster.start_hub();
    let (mut states, mut words) = (Vec::new(), BTreeSet::new());
    let begin = Instant::now();
    let in_sync = |shown: &Value| shown["state"] == "in-sync" && shown["alone_since"].is_null();
    loop {
        let state = image_is(&cluster, &old, &new);
        if states.last() != Some(&state) {
            states.push(state);
        }
        let (own, there) = (cluster.own_status(NAME), cluster.on_hub(NAME));
        for shown in [&own, &there] {
            words.insert(shown["state"].as_str().unwrap_or_default().to_owned());
        }
        if state == "new" && in_sync(&own) && in_sync(&there) {
            break;
        }
        assert!(begin.elapsed() < LIMIT, "not in sync: {states:?} {words:?} {own}");
    }
    println!("image: {states:?}, states shown: {words:?}");
    assert_eq!(states, ["old", "new"], "the image moved otherwise than in one step");
    check_together(&mut cluster, &new);
}

/// Whole content of the image over one connection.
fn image_is(cluster: &Cluster, old: &Known, new: &Known) -> &'static str {
    let hub = socket(cluster, "hub");
    let mut client = Client::unix(&hub, EXPORT, LIMIT).expect("the image can be opened");
    let mut content = Vec::new();
    for at in (0..client.size()).step_by(256 << 10) {
        content.extend(client.read(at, 256 << 10).expect("the image can be read"));
    }
    let read = |block: u64| {
        let at = usize::try_from(block).expect("small") * BLOCK;
        content[at..at + BLOCK].to_vec()
    };
    match (old.is_exactly(read), new.is_exactly(read)) {
        (true, false) => "old",
        (false, true) => "new",
        other => panic!("the image is neither the old one nor the new one: {other:?}"),
    }
}

/// Writes at least `count` times and stops.
fn filled(cluster: &Cluster, known: Known, seed: u64, count: u64) -> Known {
    let writer = load(cluster, known, seed);
    writer.wait_answered(count);
    writer.finish()
}

/// While a pass runs, nobody says that every acknowledged write is safe.
#[test]
fn a_source_that_is_brought_up_is_not_in_sync() {
    let mut cluster = Cluster::start(&[continuing("resync_limit = \"2MiB\"")]);
    let old = filled(&cluster, Known::default(), 7, 300);
    cluster.kill_hub();
    let new = filled(&cluster, old, 8, 1500);
    wait_settled(&cluster);
    cluster.start_hub();
    wait_passes(&cluster, 1);
    let (own, there) = (cluster.own_status(NAME), cluster.on_hub(NAME));
    assert!(is_alone(&own), "the pass is over before it could be looked at: {own}");
    assert_ne!(own["state"], "in-sync", "the source says so of itself: {own}");
    assert_ne!(there["state"], "in-sync", "the hub says so: {there}");
    wait_together(&mut cluster);
    check_together(&mut cluster, &new);
}

/// What the hub shows of being alone goes with the source's mark.
#[test]
fn the_hub_forgets_the_mark_when_it_is_cleared() {
    let mut cluster = Cluster::start(&[continuing("")]);
    cluster.kill_hub();
    let known = filled(&cluster, Known::default(), 8, 300);
    cluster.start_hub();
    wait_together(&mut cluster);
    check_together(&mut cluster, &known);
    let config = cluster.hub_config();
    wait_for("the hub forgets the mark", Duration::from_secs(30), || {
        let there = status(&config).expect("the hub answers")["sources"][0].clone();
        there["alone_since"].is_null()
    });
}

/// Waits until both say `in-sync` and the mark is gone.
fn wait_together(cluster: &mut Cluster) {
    wait_own(cluster, "is together with its hub", |own| {
        own["state"] == "in-sync" && own["alone_since"].is_null()
    });
    cluster.wait_in_sync(NAME);
}

/// Waits until the source has begun that many passes since the start of the test.
fn wait_passes(cluster: &Cluster, count: usize) {
    let log = cluster.path(&format!("{NAME}.log"));
    wait_for(&format!("pass {count} begins"), LIMIT, || passes(&log) >= count);
}

fn passes(log: &std::path::Path) -> usize {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().filter(|line| line.contains("image is brought up")).count()
}

/// `stop`: no write and, after `hub_timeout`, no read is answered; both go on when the hub is back.
#[test]
fn stop_holds_writes_and_reads_until_the_hub_is_back() {
    let settings = SourceSettings::new(NAME).interval("300ms");
    let settings = settings.replication("on_hub_loss = \"stop\"\nhub_timeout = \"1s\"");
    let mut cluster = Cluster::start(&[settings]);
    let writer = load(&cluster, Known::default(), 3);
    writer.wait_answered(200);
    let own = socket(&cluster, NAME);
    let mut reader = Client::unix(&own, EXPORT, LIMIT).expect("the volume opens");
    reader.read(0, BLOCK).expect("reads are answered while the hub is there");
    cluster.kill_hub();
    // Passing time is what is tested: `hub_timeout` and a heartbeat.
    pause(Duration::from_millis(2200));
    let before = writer.answered();
    let mut late = Client::unix(&own, EXPORT, Duration::from_millis(1500)).expect("opens");
    assert!(late.read(0, BLOCK).is_err(), "a read was answered after hub_timeout");
    assert_eq!(writer.answered(), before, "a write was answered without the hub");
    let shown = cluster.own_status(NAME);
    assert_eq!(shown["state"], "offline", "{shown}");
    assert!(shown["alone_since"].is_null(), "under stop nobody is alone: {shown}");
    let cookie = reader.submit_read(0, BLOCK).expect("a read is sent");
    cluster.start_hub();
    let reply = reader.reply().expect("the held read is answered");
    assert!(reply.cookie == cookie && reply.result.is_ok(), "{reply:?}");
    writer.wait_answered(before + 200);
    let known = writer.finish();
    check_together(&mut cluster, &known);
}

/// kill -9 of the source while alone, then both come back in either order.
#[test]
fn both_restart_in_either_order_after_being_alone() {
    let mut cluster = Cluster::start(&[continuing("")]);
    let mut known = Known::default();
    for round in 0..if is_full() { 12 } else { 2 } {
        let writer = load(&cluster, known, 41 + round);
        writer.wait_answered(200);
        cluster.kill_hub();
        wait_alone(&cluster);
        let before = writer.answered();
        writer.wait_answered(before + 600 + round * 97);
        cluster.kill_source(NAME);
        known = writer.finish();
        if round % 2 == 0 {
            cluster.start_source(NAME);
            // Without its hub it serves again, alone.
            known = filled(&cluster, known, 91 + round, 200);
            cluster.start_hub();
        } else {
            cluster.start_hub();
            cluster.start_source(NAME);
        }
        wait_together(&mut cluster);
        check_together(&mut cluster, &known);
    }
}

/// kill -9 of the source, then of the hub, in the middle of a pass.
#[test]
fn either_end_is_killed_during_a_pass() {
    let mut cluster = Cluster::start(&[continuing("resync_limit = \"4MiB\"")]);
    let mut known = filled(&cluster, Known::default(), 1, 300);
    for round in 0..if is_full() { 8 } else { 2 } {
        cluster.kill_hub();
        known = filled(&cluster, known, 61 + round, 1500);
        wait_settled(&cluster);
        let seen = passes(&cluster.path(&format!("{NAME}.log")));
        cluster.start_hub();
        wait_passes(&cluster, seen + 1);
        if round % 2 == 0 {
            cluster.kill_source(NAME);
            cluster.start_source(NAME);
        } else {
            cluster.kill_hub();
            cluster.start_hub();
        }
        wait_together(&mut cluster);
        check_together(&mut cluster, &known);
    }
}

/// The hub stops for a second every second: bytes stay in bounds, and `in-sync` is reached.
#[test]
fn a_flapping_link_under_load_still_comes_to_in_sync() {
    let mut cluster = Cluster::start(&[continuing("")]);
    let writer = load(&cluster, Known::default(), 17);
    writer.wait_answered(200);
    for _ in 0..if is_full() { 40 } else { 3 } {
        cluster.signal_hub("STOP");
        pause(Duration::from_secs(1));
        cluster.signal_hub("CONT");
        pause(Duration::from_secs(1));
    }
    let before = writer.answered();
    writer.wait_answered(before + 200);
    wait_together(&mut cluster);
    let known = writer.finish();
    check_together(&mut cluster, &known);
}

/// What the way back cost.
#[derive(Debug)]
struct Cost {
    /// Bytes that were changed, that the hub's socket received, and that were CP data.
    changed: f64,
    received: f64,
    data: f64,
    seconds: f64,
}

/// These blocks change while the hub is away; it comes back.
fn came_back(
    cluster: &mut Cluster,
    client: &mut Client,
    blocks: &BTreeSet<u64>,
    version: u64,
) -> Cost {
    cluster.kill_hub();
    for &block in blocks {
        let content = crate::harness::oracle::content(block, version);
        client.write(block * 4096, &content).expect("a block is changed");
    }
    wait_settled(cluster);
    let begin = Instant::now();
    cluster.start_hub();
    wait_together(cluster);
    let seconds = begin.elapsed().as_secs_f64();
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    let received = wire_bytes(cluster);
    let data = metric_sum(&page, "mirrorhub_checkpoint_wire_bytes_total", "inline");
    let changed = f64::from(u32::try_from(blocks.len() * BLOCK).expect("small"));
    println!(
        "resync of {} changed blocks: {received} bytes received ({:.4} per changed byte), of them \
         {data} of CP data ({:.4}); {seconds:.2} s from the start of the hub",
        blocks.len(),
        received / changed,
        data / changed
    );
    assert!(
        received >= changed && data >= changed,
        "less was sent than has changed: the counter shows nothing"
    );
    assert!(received <= changed * 1.1, "{received} bytes for {changed} changed ones");
    Cost { changed, received, data, seconds }
}

/// 1% of a volume's blocks change while the hub is away, then 4%: what the way back costs is in
/// proportion to them.
#[test]
fn a_known_base_costs_little_more_than_what_changed() {
    let mib = if is_full() { 1024 } else { 256 };
    let size = format!("{mib}MiB");
    let settings = continuing("").volumes(&[("vol0", &size)]).pool("4GiB").nvram("64MiB");
    let mut cluster = Cluster::prepare_with(&[settings], "128MiB", "4GiB");
    cluster.start_all();
    let own = socket(&cluster, NAME);
    let mut client = Client::unix(&own, EXPORT, LIMIT).expect("the volume opens");
    let mut chunk = vec![0; 1 << 20];
    for n in 0..mib {
        for (at, block) in chunk.chunks_mut(BLOCK).enumerate() {
            let number = n * 256 + u64::try_from(at).expect("small");
            block.copy_from_slice(&crate::harness::oracle::content(number, 1));
        }
        client.write(n << 20, &chunk).expect("the volume is filled");
    }
    cluster.checkpoint(NAME);
    let blocks = mib * 256;
    let one = came_back(&mut cluster, &mut client, &some(blocks, blocks / 100), 2);
    let four = came_back(&mut cluster, &mut client, &some(blocks, blocks / 25), 3);
    // Two processes meet anew in each: that takes what it takes.
    let allowed = one.seconds * 5.0 + ALLOWANCE.as_secs_f64();
    assert!(four.seconds <= allowed, "1%: {one:?}, 4%: {four:?}");
    let of = |more: f64, less: f64| more / less;
    let changed = of(four.changed, one.changed);
    for (what, grown) in
        [("data", of(four.data, one.data)), ("received", of(four.received, one.received))]
    {
        let near = (grown / changed - 1.0).abs() < 0.1;
        assert!(near, "{what} is {grown:.3} times as much for {changed:.3} times the change");
    }
    let passed = passes(&cluster.path(&format!("{NAME}.log")));
    assert!(passed >= 2, "no pass was needed: the test shows nothing");
    let answer = cluster.checkpoint(NAME);
    let root = Cluster::root(&answer, "vol0");
    assert_eq!(cluster.own_status(NAME)["volumes"][0]["root"], root.as_str(), "roots meet");
}

/// What the hub's sockets have received on the connections of its sources that are open.
pub fn wire_bytes(cluster: &Cluster) -> f64 {
    let hub = cluster.hub_address();
    let sockets = run(std::process::Command::new("ss")
        .args(["-tinH", "state", "established", "src"])
        .arg(hub.to_string()));
    let text = String::from_utf8_lossy(&sockets.stdout).into_owned();
    let words = text.split_whitespace().filter_map(|word| word.strip_prefix("bytes_received:"));
    let counts: Vec<f64> = words.map(|count| count.parse().expect("a number")).collect();
    assert!(!counts.is_empty(), "no source is connected:\n{text}");
    counts.iter().sum()
}

/// A filer that never met its hub has data and CPs of its own: the first contact takes them all.
#[test]
fn a_new_filer_with_data_comes_in() {
    let mut cluster = Cluster::prepare(&[continuing("")]);
    cluster.start_source(NAME);
    let known = filled(&cluster, Known::default(), 23, 3000);
    wait_settled(&cluster);
    cluster.start_hub();
    wait_together(&mut cluster);
    check_together(&mut cluster, &known);
    // And again after a kill of both.
    cluster.kill_hub();
    cluster.kill_source(NAME);
    cluster.start_all();
    check_together(&mut cluster, &known);
}
