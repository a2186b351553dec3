//! The hub's pool is full under a real source: both ends say so, no client gets an error, and what
//! makes room brings them together by itself (R18, section 14).

use std::path::Path;
use std::process::{Command, Output};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mirrorhub::nbd::client::{Client, ClientError};
use serde_json::Value;

use crate::counted::pool_check;
use crate::harness::oracle::{Known, Writer, content};
use crate::harness::{BINARY, Cluster, SourceSettings, pause, run, status, try_run, wait_for};
use crate::outage::socket;

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(180);
/// What one round writes of the large volume. Twice of it is more than the hub has room for, which
/// is 256 MiB without the reserve of 64 MiB; what is left to send then is less than the room that the
/// first round gives back.
const ROUND_MIB: u64 = 98;

/// A source whose large volume fills the hub when it is overwritten beside a kept CP.
fn cluster(on_hub_loss: &str, hub_timeout: Duration) -> Cluster {
    let seconds = hub_timeout.as_secs();
    let lines = format!("on_hub_loss = \"{on_hub_loss}\"\nhub_timeout = \"{seconds}s\"");
    let settings = SourceSettings::new(NAME)
        .volumes(&[("large", "104MiB"), ("vol0", "2MiB")])
        .interval("300ms")
        .nvram("16MiB")
        .pool("1GiB")
        .replication(&lines);
    let mut cluster = Cluster::prepare_with(&[settings], "64MiB", "256MiB");
    // The refusals are what is tested.
    cluster.refusals_wanted = true;
    cluster.start_all();
    cluster
}

/// Overwrites the large volume in a thread of its own: under `stop` it waits for the hub.
fn fill(cluster: &Cluster, version: u64) -> JoinHandle<Result<(), String>> {
    let own = socket(cluster, NAME);
    std::thread::spawn(move || {
        let mut client = Client::unix(&own, "large", LIMIT).map_err(|error| error.to_string())?;
        for mib in 0..ROUND_MIB {
            client.write(mib << 20, &chunk(mib, version)).map_err(|error| error.to_string())?;
        }
        Ok(())
    })
}

fn chunk(mib: u64, version: u64) -> Vec<u8> {
    (0..256).flat_map(|at| content(mib * 256 + at, version)).collect()
}

fn hub_command(cluster: &Cluster, words: &[&str]) -> Output {
    run(Command::new(BINARY).args(words).arg("--config").arg(cluster.hub_config()))
}

/// Fills the hub: a kept CP of one content, under a second one. The writer goes on beside it.
fn filled(cluster: &Cluster) -> (Writer, JoinHandle<Result<(), String>>) {
    fill(cluster, 1).join().expect("no panic").expect("the first round is written");
    hub_command(cluster, &["checkpoint", NAME, "--keep", "first"]);
    let writer = Writer::start(socket(cluster, NAME), "vol0", Known::default(), 8, 77);
    (writer, fill(cluster, 2))
}

/// Waits until `shown` is `behind` because of the full pool, with a way on.
fn wait_behind(what: &str, shown: impl Fn() -> Option<Value>) -> Value {
    let mut met = Value::Null;
    wait_for(&format!("{what} says that the hub's pool is full"), LIMIT, || {
        met = shown().unwrap_or_default();
        let reason = met["reason"].as_str().unwrap_or_default();
        met["state"] == "behind" && reason.contains("pool is full")
    });
    let next = met["next_step"].as_str().unwrap_or_default();
    assert!(next.contains("mirrorhub drop") && next.contains("discard"), "{met}");
    met
}

fn own(config: &Path) -> Option<Value> {
    status(config).map(|document| document["source"].clone())
}

/// Lines of the source's log with these words.
fn logged(cluster: &Cluster, words: &str) -> usize {
    let text = std::fs::read_to_string(cluster.path(&format!("{NAME}.log"))).unwrap_or_default();
    text.lines().filter(|line| line.contains(words)).count()
}

/// Room was made: in sync by itself, equal by `verify`, and every answered write is in the image.
fn check_together(cluster: &mut Cluster, writer: Writer, filler: JoinHandle<Result<(), String>>) {
    hub_command(cluster, &["drop", &format!("{NAME}@first"), "--yes"]);
    filler.join().expect("no panic").expect("the second round is written without an error");
    let before = writer.answered();
    writer.wait_answered(before + 50);
    let known = writer.finish();
    wait_for("both ends are in sync", LIMIT, || {
        let shown = own(&cluster.source_config(NAME)).unwrap_or_default();
        shown["state"] == "in-sync" && shown["alone_since"].is_null()
    });
    cluster.wait_in_sync(NAME);
    cluster.checkpoint(NAME);
    hub_command(cluster, &["verify", NAME]);
    let hub = socket(cluster, "hub");
    known.check_export(&hub, &format!("{NAME}/vol0")).expect("nothing answered is lost");
    let mut image = Client::unix(&hub, &format!("{NAME}/large"), LIMIT).expect("the image opens");
    for mib in 0..ROUND_MIB {
        let read = image.read(mib << 20, 1 << 20).expect("the image can be read");
        assert!(read == chunk(mib, 2), "MiB {mib} of the image is not what was written last");
    }
    assert!(cluster.source_runs(NAME) && cluster.hub_runs());
}

/// `continue`: the source goes on alone, makes CPs meanwhile, and sends the newest of them each time
/// it tries again.
#[test]
fn a_full_hub_leaves_a_source_alone_until_there_is_room() {
    let mut cluster = cluster("continue", Duration::from_secs(1));
    let (writer, filler) = filled(&cluster);
    let (hub, source) = (cluster.hub_config(), cluster.source_config(NAME));
    wait_for("the source is alone, and its pass was refused twice", LIMIT, || {
        let shown = own(&source).unwrap_or_default();
        assert_ne!(shown["state"], "faulted", "{shown}");
        shown["alone_since"].is_object()
            && logged(&cluster, "image is brought up") >= 2
            && logged(&cluster, "CP refused") >= 3
    });
    let shown = wait_behind("the source", || own(&source));
    assert!(shown["next_step"].as_str().unwrap_or_default().contains("alone"), "{shown}");
    wait_behind("the hub", || Some(status(&hub)?["sources"][0].clone()));
    let before = writer.answered();
    writer.wait_answered(before + 200);
    check_together(&mut cluster, writer, filler);
}

/// `stop`: writes wait for room, on one connection; `checkpoint` says at both ends why it fails.
#[test]
fn a_full_hub_holds_writes_under_stop_until_there_is_room() {
    let hub_timeout = Duration::from_secs(3);
    let mut cluster = cluster("stop", hub_timeout);
    let (writer, filler) = filled(&cluster);
    let (hub, source) = (cluster.hub_config(), cluster.source_config(NAME));
    wait_behind("the hub", || Some(status(&hub)?["sources"][0].clone()));
    wait_behind("the source", || own(&source));
    let begin = Instant::now();
    for config in [&source, &hub] {
        let asked = try_run(Command::new(BINARY).arg("checkpoint").arg("--config").arg(config));
        let said = String::from_utf8_lossy(&asked.stderr).into_owned();
        assert!(!asked.status.success(), "a checkpoint that the hub has no room for succeeds");
        assert!(said.contains("pool is full") && said.contains("mirrorhub drop"), "{said}");
    }
    pause((2 * hub_timeout).saturating_sub(begin.elapsed()));
    assert_eq!(logged(&cluster, "hub lost"), 0, "a healthy connection was given up");
    assert!(!filler.is_finished(), "nobody waits: the test shows nothing");
    check_together(&mut cluster, writer, filler);
}

/// The source's own pool is full and its file says `enospc`: the write fails with that, everything
/// answered before it can be read, and a trim makes room for the next.
#[test]
fn a_full_pool_of_a_source_is_an_error_where_its_file_says_so() {
    const MIB: usize = 1 << 20;
    let settings =
        SourceSettings::new(NAME).volumes(&[("vol0", "512MiB")]).pool("256MiB").nvram("16MiB");
    let mut cluster = Cluster::prepare_with(&[settings], "64MiB", "1GiB");
    let config = cluster.source_config(NAME);
    let text = std::fs::read_to_string(&config).expect("source.toml");
    let text = text.replace("[pool]\n", "[pool]\non_full = \"enospc\"\n");
    std::fs::write(&config, text).expect("source.toml");
    cluster.start_all();
    let mut client = Client::unix(&socket(&cluster, NAME), "vol0", LIMIT).expect("a client");
    let mut answered = 0;
    let met = loop {
        match client.write(answered << 20, &chunk(answered, 1)) {
            Ok(()) => answered += 1,
            Err(error) => break error,
        }
        assert!(answered < 250, "more is answered than the pool has room for");
    };
    assert!(matches!(met, ClientError::Answer(28)), "{met}");
    assert!(answered >= 120, "{answered} MiB: most of the pool can be used");
    for mib in 0..answered {
        assert!(client.read(mib << 20, MIB).expect("a read") == chunk(mib, 1), "MiB {mib}");
    }
    for mib in 0..8 {
        client.trim(mib << 20, MIB).expect("a trim has room");
    }
    cluster.checkpoint(NAME);
    client.write(400 << 20, &chunk(400, 1)).expect("there is room behind the trim");
    cluster.wait_in_sync(NAME);
    cluster.checkpoint(NAME);
    hub_command(&cluster, &["verify", NAME]);
}

/// Goal: status says where the hub's space is, and every byte comes back: what only a kept CP has when it
/// is dropped, what a reader pins when it goes, what a volume holds when it is trimmed, what is left when
/// the source is forgotten. `check` proves the accounts each time.
#[test]
fn what_is_given_up_is_free_again() {
    const MIB: u64 = 1 << 20;
    let settings = SourceSettings::new(NAME).volumes(&[("vol0", "64MiB")]);
    let mut cluster = Cluster::prepare_with(&[settings], "64MiB", "512MiB");
    cluster.start_all();
    let hub = cluster.hub_config();
    let space = |what: &str| -> u64 {
        let answer = pool_check(&cluster.path("hub/state/admin.sock"));
        assert_eq!(answer["sound"], true, "{what}: {answer}");
        let shown = status(&hub).expect("the hub answers");
        shown["pool"][what].as_u64().unwrap_or_else(|| panic!("no {what} in {shown}"))
    };
    let empty = space("free_bytes");
    assert!(space("reserve_bytes") >= 64 * MIB && space("reserve_bytes") < empty);
    let mut client = Client::unix(&socket(&cluster, NAME), "vol0", LIMIT).expect("a client");
    let mut round = |version: u64, keep: &[&str]| {
        (0..16).for_each(|mib| client.write(mib << 20, &chunk(mib, version)).expect("a write"));
        hub_command(&cluster, &[&["checkpoint", NAME], keep].concat());
    };
    round(1, &["--keep", "first"]);
    let one = space("used_bytes");
    assert!(one >= 16 * MIB && space("kept_bytes") == 0, "{one}");
    round(2, &[]);
    assert!(space("kept_bytes") >= 16 * MIB, "the overwritten blocks are the kept CP's");
    let reader = Client::unix(&socket(&cluster, "hub"), &format!("{NAME}/vol0"), LIMIT);
    let reader = reader.expect("a reader");
    round(3, &[]);
    assert!(space("pinned_bytes") >= 16 * MIB, "the overwritten blocks are the reader's");
    drop(reader);
    wait_for("what the reader had is free", LIMIT, || space("pinned_bytes") == 0);
    let before = space("free_bytes");
    hub_command(&cluster, &["drop", &format!("{NAME}@first"), "--yes"]);
    assert_eq!(space("kept_bytes"), 0);
    assert!(space("free_bytes") >= before + 16 * MIB, "a drop gives nothing back");
    client.trim(0, usize::try_from(16 * MIB).expect("small")).expect("a trim");
    hub_command(&cluster, &["checkpoint", NAME]);
    assert!(space("used_bytes") < MIB, "a trimmed volume holds its blocks");
    (0..4).for_each(|mib| client.write(mib << 20, &chunk(mib, 4)).expect("a write"));
    hub_command(&cluster, &["checkpoint", NAME]);
    drop(client);
    std::fs::remove_file(cluster.path(&format!("hub/sources.d/{NAME}.toml"))).expect("its file");
    wait_for("the source is retired", LIMIT, || {
        status(&hub).is_some_and(|shown| shown["sources"][0]["state"] == "retired")
    });
    hub_command(&cluster, &["forget", NAME, "--yes"]);
    assert_eq!((space("used_bytes"), space("free_bytes")), (0, empty));
}
