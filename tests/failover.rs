//! A filer dies or is cut off: `mirrorhub failover` fences it, replays its log and serves the
//! image read-write. Whatever the filer had acknowledged is there, and it answers nobody any more.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use mirrorhub::nbd::client::Client;
use mirrorhub::units::convert::to_f64;
use serde_json::Value;

use crate::harness::oracle::{Known, Writer, content};
use crate::harness::{BINARY, Cluster, SourceSettings, is_full, pause, run, status, wait_for};
use crate::outage::{socket, wait_settled};

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(30);
const BLOCK: usize = 4096;
const HUB_TIMEOUT: Duration = Duration::from_secs(1);

/// A source whose CPs come only when asked for, so that its log has to be replayed.
pub fn failing(loss: &str) -> SourceSettings {
    let lines = format!("on_hub_loss = \"{loss}\"\nhub_timeout = \"1s\"");
    SourceSettings::new(NAME).replication(&lines)
}

/// `mirrorhub failover`; the JSON of its answer.
pub fn fail_over(cluster: &Cluster, name: &str, more: &[&str]) -> Value {
    let output = run(Command::new(BINARY)
        .args(["failover", name, "--json"])
        .args(more)
        .arg("--config")
        .arg(cluster.hub_config()));
    let answer = serde_json::from_slice(&output.stdout).expect("JSON of failover");
    println!("failover {more:?}: {answer}");
    answer
}

fn sentences(answer: &Value) -> String {
    let all = answer["sentences"].as_array().expect("sentences");
    all.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("; ")
}

/// A connection, as soon as there is one.
pub fn open(socket: &Path, export: &str) -> Client {
    let mut client = None;
    wait_for(&format!("{export} opens"), LIMIT, || {
        client = Client::unix(socket, export, LIMIT).ok();
        client.is_some()
    });
    client.expect("it was waited for")
}

/// Every answered write is in `export` of the hub.
pub fn check_hub(cluster: &Cluster, export: &str, known: &Known) {
    let hub = socket(cluster, "hub");
    drop(open(&hub, export));
    known.check_export(&hub, export).expect("the hub has every answered write");
}

fn load(cluster: &Cluster, owner: &str, known: Known, seed: u64, count: u64) -> Writer {
    let writer = Writer::start(socket(cluster, owner), EXPORT, known, 16, seed);
    writer.wait_answered(count);
    writer
}

/// The old source is connected again or knows by itself that it is fenced: nobody is served.
pub fn check_fenced(cluster: &mut Cluster) {
    let config = cluster.source_config(NAME);
    let told = |shown: &Value| shown["reason"].as_str().is_some_and(|why| why.contains("epoch"));
    wait_for("the source says that it is fenced", LIMIT, || {
        status(&config).is_some_and(|shown| told(&shown["source"]))
    });
    let short = Duration::from_secs(1);
    match Client::unix(&socket(cluster, NAME), EXPORT, short) {
        Err(error) => assert!(error.to_string().contains("epoch"), "it does not say why: {error}"),
        Ok(mut client) => {
            assert!(client.read(0, BLOCK).is_err(), "a fenced source answers a read");
            let mut client = open(&socket(cluster, NAME), EXPORT);
            assert!(client.write(0, &content(0, 1)).is_err(), "a fenced source takes a write");
        }
    }
}

/// The volumes on the hub: they take writes, and survive kill -9 of the hub.
fn check_promoted(cluster: &mut Cluster, known: Known) -> Known {
    let writer = load(cluster, "hub", known, 1009, 300);
    cluster.kill_hub();
    let known = writer.finish();
    cluster.start_hub();
    check_hub(cluster, EXPORT, &known);
    let shown = cluster.on_hub(NAME);
    assert_eq!(shown["state"], "failed-over", "{shown}");
    load(cluster, "hub", known, 2003, 100).finish()
}

fn kept_of(answer: &Value) -> String {
    format!("{EXPORT}@before-failover-{}", answer["epoch"])
}

/// The promise of `sync` with `stop`, with the source killed under load.
#[test]
fn a_killed_source_is_failed_over_and_nothing_acknowledged_is_lost() {
    let mut known = Known::default();
    for round in 0..if is_full() { 10 } else { 1 } {
        let mut cluster = Cluster::start(&[failing("stop")]);
        // What the last CP before holds: everything of a client at rest.
        let before = load(&cluster, NAME, Known::default(), 5 + round, 200).finish();
        cluster.checkpoint(NAME);
        let writer = load(&cluster, NAME, before.clone(), 91 + round, 700 + round * 131);
        cluster.kill_source(NAME);
        known = writer.finish();
        let dry = fail_over(&cluster, NAME, &["--dry-run"]);
        assert_eq!((&dry["dry_run"], &dry["may_be_lost"]), (&true.into(), &false.into()), "{dry}");
        assert_ne!(cluster.on_hub(NAME)["state"], "failed-over", "a dry run has changed something");
        let answer = fail_over(&cluster, NAME, &[]);
        assert_eq!((&answer["outcome"], &answer["may_be_lost"]), (&dry["outcome"], &false.into()));
        assert_eq!(answer["outcome"], "complete");
        for same in ["epoch", "cp", "sequence", "entries", "bytes"] {
            assert_eq!(answer[same], dry[same], "{same} differs from the dry run");
        }
        check_hub(&cluster, EXPORT, &known);
        // The CP before holds what it held, and the later writes do not show in it.
        check_hub(&cluster, &kept_of(&answer), &before);
        let stale = known.check_export(&socket(&cluster, "hub"), &kept_of(&answer));
        assert!(stale.is_err(), "the negative control: an older CP has every write");
        cluster.start_source(NAME);
        check_fenced(&mut cluster);
        known = check_promoted(&mut cluster, known);
        cluster.kill_source(NAME);
        cluster.start_source(NAME);
        check_fenced(&mut cluster);
        check_hub(&cluster, EXPORT, &known);
    }
    assert!(known.answered() > 500, "the test wrote too little to show anything");
}

/// A source that was only asleep, past `hub_timeout`, wakes before it hears of the failover: it
/// answers no write that the image lacks.
#[test]
fn a_sleeping_source_answers_no_write_when_it_wakes() {
    let mut cluster = Cluster::start(&[failing("stop")]);
    let writer = load(&cluster, NAME, Known::default(), 13, 500);
    put_to_sleep(&mut cluster);
    pause(HUB_TIMEOUT * 2);
    let answer = fail_over(&cluster, NAME, &[]);
    assert_eq!(answer["may_be_lost"], false, "{answer}");
    drop(open(&socket(&cluster, "hub"), EXPORT));
    cluster.signal_source(NAME, "CONT");
    let mut known = writer.finish();
    // What it has answered up to its end is in the image.
    check_hub(&cluster, EXPORT, &known);
    check_fenced(&mut cluster);
    known = check_promoted(&mut cluster, known);
    cluster.kill_source(NAME);
    cluster.start_source(NAME);
    check_fenced(&mut cluster);
    check_hub(&cluster, EXPORT, &known);
}

/// And no read: the image may have taken other writes by then.
#[test]
fn a_sleeping_source_answers_no_read_when_it_wakes() {
    let mut cluster = Cluster::start(&[failing("stop")]);
    let mut reader = open(&socket(&cluster, NAME), EXPORT);
    reader.write(0, &content(0, 1)).expect("a write");
    put_to_sleep(&mut cluster);
    // Sent while it sleeps: whatever it does first when it wakes, these are in its socket.
    let reads: Vec<u64> =
        (0..8).map(|_| reader.submit_read(0, BLOCK).expect("a read is sent")).collect();
    pause(HUB_TIMEOUT * 2);
    fail_over(&cluster, NAME, &[]);
    let mut served = open(&socket(&cluster, "hub"), EXPORT);
    served.write(0, &content(0, 2)).expect("the image takes a write");
    cluster.signal_source(NAME, "CONT");
    let mut stale = 0;
    for _ in &reads {
        let Ok(reply) = reader.reply() else { break };
        stale += u32::from(reply.result.is_ok_and(|data| data == content(0, 1)));
    }
    assert_eq!(stale, 0, "reads of what was overwritten were answered after the failover");
    check_fenced(&mut cluster);
}

/// Returns when no thread of the source runs any more.
fn put_to_sleep(cluster: &mut Cluster) {
    cluster.signal_source(NAME, "STOP");
    let id = cluster.source_process(NAME).id();
    let stopped = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
        stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
    };
    wait_for("every thread of the source is stopped", LIMIT, || {
        let mut tasks = std::fs::read_dir(format!("/proc/{id}/task")).expect("tasks of a process");
        tasks.all(stopped)
    });
}

/// Fenced is the word that operators and dashboards know for it.
#[test]
fn a_fenced_source_says_fenced() {
    let mut cluster = Cluster::start(&[failing("stop")]);
    cluster.kill_source(NAME);
    fail_over(&cluster, NAME, &[]);
    cluster.start_source(NAME);
    check_fenced(&mut cluster);
    let shown = cluster.own_status(NAME);
    assert_eq!(shown["state"], "fenced", "{shown}");
}

/// The hub is cut off from a source that goes on alone: failover says so before and after, and
/// what was acknowledged alone is still on the source, whole.
#[test]
fn failover_of_a_source_that_continues_says_what_may_be_missing() {
    let mut cluster = Cluster::start(&[failing("continue")]);
    let writer = load(&cluster, NAME, Known::default(), 29, 300);
    // The hub dies; the source goes on alone and dies before it comes back.
    cluster.kill_hub();
    let config = cluster.source_config(NAME);
    wait_for("the source is alone", LIMIT, || {
        status(&config).is_some_and(|shown| shown["source"]["alone_since"].is_object())
    });
    let before = writer.answered();
    writer.wait_answered(before + 300);
    cluster.kill_source(NAME);
    let known = writer.finish();
    cluster.start_hub();
    for more in [&["--dry-run"][..], &[]] {
        let answer = fail_over(&cluster, NAME, more);
        assert_eq!(answer["may_be_lost"], true, "{answer}");
        assert!(sentences(&answer).contains("gone on alone"), "{answer}");
        assert!(!sentences(&answer).contains("no acknowledged write is lost"), "{answer}");
    }
    let hub = socket(&cluster, "hub");
    let mut image = open(&hub, EXPORT);
    let lost = known.lost(|block| image.read(block * 4096, BLOCK).expect("the image is read"));
    let lost = lost.expect("the image is a cut of what was written");
    println!("{lost} blocks of {} were acknowledged alone and are not here", known.answered());
    assert!(lost > 0, "the warning was about nothing: the test shows nothing");
    cluster.start_source(NAME);
    check_fenced(&mut cluster);
}

/// The source dies in the middle of a pass: what of it came here is thrown away, the image is the
/// old CP whole, and failover does not promise anything.
#[test]
fn failover_in_the_middle_of_a_pass_shows_the_old_image() {
    let lines = "on_hub_loss = \"continue\"\nhub_timeout = \"1s\"\nresync_limit = \"2MiB\"";
    let settings = SourceSettings::new(NAME).interval("300ms").replication(lines);
    let mut cluster = Cluster::start(&[settings]);
    let old = load(&cluster, NAME, Known::default(), 3, 300).finish();
    cluster.checkpoint(NAME);
    cluster.kill_hub();
    let new = load(&cluster, NAME, old.clone(), 4, 2000).finish();
    let log = cluster.path("filer-a.log");
    wait_settled(&cluster);
    cluster.start_hub();
    wait_for("a pass begins", LIMIT, || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("image is brought up"))
    });
    cluster.kill_source(NAME);
    let answer = fail_over(&cluster, NAME, &[]);
    assert_eq!(answer["may_be_lost"], true, "{answer}");
    let hub = socket(&cluster, "hub");
    let mut image = open(&hub, EXPORT);
    let mut read = |block: u64| image.read(block * 4096, BLOCK).expect("the image is read");
    assert!(old.is_exactly(&mut read), "the image is not the CP before the pass");
    assert!(!new.is_exactly(&mut read), "the pass was over: the test shows nothing");
    cluster.start_source(NAME);
    check_fenced(&mut cluster);
    check_promoted(&mut cluster, old);
}

/// Bytes a second that a new file takes in sequence, synced: the middle one of three times.
fn disk_rate(directory: &Path, mib: u64) -> f64 {
    let mut rates = [(); 3].map(|()| written_at(directory, mib));
    rates.sort_by(f64::total_cmp);
    rates[1]
}

fn written_at(directory: &Path, mib: u64) -> f64 {
    let path = directory.join("rate");
    let mut file = std::fs::File::create(&path).expect("a file");
    let chunk = vec![0x5a; 1 << 20];
    let begin = Instant::now();
    for _ in 0..mib {
        file.write_all(&chunk).expect("a write");
    }
    file.sync_data().expect("a sync");
    let spent = begin.elapsed();
    std::fs::remove_file(path).expect("the file goes");
    to_f64(mib << 20) / spent.as_secs_f64()
}

/// How long it takes with log that is not applied until clients are served, and at what rate it is
/// applied behind their backs.
#[test]
fn time_to_the_first_read_and_write() {
    // The disk is shared with others: in the long form the middle one of three counts.
    let (mib, times) = if is_full() { (256, 3) } else { (64, 1) };
    let mut runs: Vec<_> = (0..times).map(|_| failed_over_with(mib)).collect();
    runs.sort_by(|a, b| a.1.total_cmp(&b.1));
    let (write, of_the_disk) = runs[runs.len() / 2];
    assert!(write < LIMIT / 3, "{write:?}");
    if is_full() {
        assert!(write < Duration::from_secs(1), "the first write after {write:?}");
        assert!(of_the_disk >= 0.5, "applied at {of_the_disk:.2} of the disk's rate");
        let (write, _) = failed_over_with(1024);
        assert!(write < Duration::from_secs(1), "over a GiB the first write after {write:?}");
    }
}

/// A failover with so much log: time to the first write, and the rate at which the log is applied over that
/// of the disk.
fn failed_over_with(mib: u64) -> (Duration, f64) {
    let (size, nvram) = (format!("{}MiB", mib * 2), format!("{}MiB", mib * 5 / 2));
    let settings = failing("stop").volumes(&[("vol0", &size)]).pool("4GiB").nvram(&nvram);
    let ring = format!("{}MiB", mib.max(128));
    let mut cluster = Cluster::prepare_with(&[settings], &ring, "4GiB");
    cluster.start_all();
    let mut client = open(&socket(&cluster, NAME), EXPORT);
    let mut chunk = vec![0; 256 << 10];
    let blocks = |n: u64| n * 64..(n + 1) * 64;
    for n in 0..mib * 4 {
        for (block, data) in blocks(n).zip(chunk.chunks_mut(BLOCK)) {
            data.copy_from_slice(&content(block, 1));
        }
        client.write(n << 18, &chunk).expect("a write");
    }
    cluster.kill_source(NAME);
    let begin = Instant::now();
    let answer = fail_over(&cluster, NAME, &["--now"]);
    let over = begin.elapsed();
    assert_eq!((&answer["bytes"], &answer["applied"]), (&(mib << 20).into(), &false.into()));
    let mut served = open(&socket(&cluster, "hub"), EXPORT);
    assert_eq!(served.read(4096, BLOCK).expect("the first read"), content(1, 1));
    let read = begin.elapsed();
    served.write(4096, &content(1, 2)).expect("the first write");
    let write = begin.elapsed();
    wait_applied(&cluster);
    let applied = begin.elapsed() - over;
    let rate = to_f64(mib << 20) / applied.as_secs_f64();
    let disk = disk_rate(cluster.dir.path(), mib);
    println!(
        "failover with {mib} MiB of log: returned after {:.2} s, first read {:.2} s, first write \
         {:.2} s; applied behind in {:.2} s, {:.0} MB/s, {:.2} of the disk's {:.0} MB/s",
        over.as_secs_f64(),
        read.as_secs_f64(),
        write.as_secs_f64(),
        applied.as_secs_f64(),
        rate / 1e6,
        rate / disk,
        disk / 1e6,
    );
    for block in (0..mib * 256).step_by(97) {
        let wanted = content(block, if block == 1 { 2 } else { 1 });
        assert_eq!(served.read(block * 4096, BLOCK).expect("a read"), wanted, "block {block}");
    }
    (write, rate / disk)
}

/// Waits until the log of a source that is served is in its image, by the hub's own log: a status
/// asked for at every look would take a tenth of the machine.
fn wait_applied(cluster: &Cluster) {
    let log = cluster.path("hub.log");
    wait_for("the log is applied", LIMIT, || {
        let said = std::fs::read_to_string(&log).expect("hub.log");
        said.lines().any(|line| line.contains(" failed over source="))
    });
    let shown = cluster.on_hub(NAME);
    let why = shown["reason"].as_str().expect("a reason");
    assert!(why.contains(" replayed"), "{why}");
}

/// `[hooks]`: the command is told, its output is in the log, and that it fails is shown and touches
/// nothing else. One that does not end holds up nobody.
#[test]
fn a_hook_is_run_and_its_failure_is_shown() {
    let mut cluster = Cluster::prepare(&[failing("stop")]);
    let (hook, told) = (cluster.path("move-address"), cluster.path("told"));
    let script = format!(
        "#!/bin/sh\necho \"moving $1\"\nenv | grep ^MIRRORHUB_ > {0}.new\nmv {0}.new {0}\n\
         exec sleep 600\n",
        told.display()
    );
    std::fs::write(&hook, script).expect("a script");
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).expect("executable");
    let config = cluster.hub_config();
    let mut text = std::fs::read_to_string(&config).expect("hub.toml");
    text.push_str(&format!(
        "\n[hooks]\npromoted = [\"{}\", \"here\"]\ntimeout = \"3s\"\n",
        hook.display()
    ));
    std::fs::write(&config, text).expect("hub.toml");
    cluster.start_all();
    let known = load(&cluster, NAME, Known::default(), 41, 200).finish();
    cluster.kill_source(NAME);
    let begin = Instant::now();
    let answer = fail_over(&cluster, NAME, &["--now"]);
    check_hub(&cluster, EXPORT, &known);
    wait_for("the command is told", LIMIT, || told.is_file());
    let said = std::fs::read_to_string(&told).expect("what it was told");
    for line in [
        "MIRRORHUB_EVENT=promoted".to_owned(),
        format!("MIRRORHUB_SOURCE={NAME}"),
        format!("MIRRORHUB_EPOCH={}", answer["epoch"]),
        format!("MIRRORHUB_CP={}", answer["cp"]),
    ] {
        assert!(said.lines().any(|met| met == line), "{line} is not in {said}");
    }
    let exports = said.lines().find_map(|line| line.strip_prefix("MIRRORHUB_EXPORTS="));
    let uri = exports.expect("exports");
    assert!(uri.contains(EXPORT), "{uri}");
    let info = run(Command::new("nbdinfo").args(["--size", uri]));
    assert!(!info.stdout.is_empty(), "the URI leads to the volume");
    wait_for("its failure is shown", LIMIT, || {
        let shown = cluster.on_hub(NAME);
        shown["reason"].as_str().is_some_and(|why| why.contains("killed after 3 s"))
    });
    println!("shown after {:.1} s", begin.elapsed().as_secs_f64());
    assert_eq!(cluster.on_hub(NAME)["state"], "failed-over");
    let (_, page) = crate::harness::http_get(&cluster.hub_url("/metrics"));
    assert!(page.contains("mirrorhub_hook_runs_total{result=\"failed\"} 1"), "{page}");
    let log = std::fs::read_to_string(cluster.path("hub.log")).expect("a log");
    assert!(log.contains("moving here"), "its output is in the log");
    check_promoted(&mut cluster, known);
}

/// A hub that dies in the middle of a failover goes on with it by itself.
#[test]
fn a_failover_goes_on_when_the_hub_dies_in_it() {
    let settings = failing("stop").nvram("256MiB");
    let mut cluster = Cluster::start(&[settings]);
    let writer = load(&cluster, NAME, Known::default(), 37, 3000);
    cluster.kill_source(NAME);
    let known = writer.finish();
    let mut asked = Command::new(BINARY);
    asked.args(["failover", NAME, "--now", "--config"]).arg(cluster.hub_config());
    let asked =
        crate::harness::Process::start("failover", cluster.path("failover.log"), &mut asked);
    let log = cluster.path("hub.log");
    wait_for("the source is fenced", LIMIT, || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("fenced"))
    });
    cluster.kill_hub();
    drop(asked);
    cluster.start_hub();
    wait_for("it is failed over", LIMIT, || cluster.on_hub(NAME)["state"] == "failed-over");
    check_hub(&cluster, EXPORT, &known);
    check_promoted(&mut cluster, known);
}
