//! The volumes of a lost filer find another home, with real processes and an oracle that keeps what
//! was answered outside the volumes: the same filer, a new one with an empty data directory, or
//! another filer beside its own volumes. Either end is killed in between.

use std::process::{Command, Output};
use std::time::Duration;

use mirrorhub::nbd::client::Client;
use serde_json::Value;

use crate::failover::{check_hub, fail_over, failing, open};
use crate::harness::oracle::{Known, Writer};
use crate::harness::{BINARY, Cluster, SourceSettings, is_full, status, try_run, wait_for};
use crate::outage::socket;

const LOST: &str = "filer-a";
const OTHER: &str = "filer-b";
const EXPORT: &str = "filer-a/vol0";
const OTHER_EXPORT: &str = "filer-b/vol0";
const LIMIT: Duration = Duration::from_secs(60);

fn other() -> SourceSettings {
    SourceSettings::new(OTHER).replication("on_hub_loss = \"stop\"\nhub_timeout = \"1s\"")
}

fn load(cluster: &Cluster, owner: &str, export: &str, known: Known, seed: u64) -> Writer {
    let writer = Writer::start(socket(cluster, owner), export, known, 8, seed);
    writer.wait_answered(200);
    writer
}

pub fn ask(cluster: &Cluster, more: &[&str]) -> Output {
    try_run(
        Command::new(BINARY)
            .args(["failback", LOST, "--json"])
            .args(more)
            .arg("--config")
            .arg(cluster.hub_config()),
    )
}

/// `mirrorhub failback`, again while a filer is still on its way; the JSON of its answer.
pub fn give_back(cluster: &Cluster, more: &[&str]) -> Value {
    let mut output = None;
    wait_for("it is given back", LIMIT, || {
        let met = ask(cluster, more);
        let (well, why) = (met.status.success(), String::from_utf8_lossy(&met.stderr).into_owned());
        assert!(well || why.contains("not connected"), "{why}");
        output = Some(met);
        well
    });
    let answer = serde_json::from_slice(&output.expect("asked").stdout).expect("JSON of failback");
    println!("failback {more:?}: {answer}");
    answer
}

pub fn checked(cluster: &Cluster, owner: &str, export: &str, known: &Known) {
    let there = socket(cluster, owner);
    drop(open(&there, export));
    let held = known.check_export(&there, export);
    held.unwrap_or_else(|lost| panic!("{export} at {owner}: {lost}"));
}

/// What `checkpoint` on the filer says of a source's volume is what the hub has.
pub fn roots_meet(cluster: &Cluster, owner: &str, name: &str) {
    let mut own = Value::Null;
    wait_for(&format!("a CP of {name} on both ends"), LIMIT, || {
        let output = try_run(
            Command::new(BINARY)
                .args(["checkpoint", name, "--json", "--config"])
                .arg(cluster.source_config(owner)),
        );
        own = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        output.status.success()
    });
    let hub = cluster.on_hub(name);
    assert_eq!(hub["volumes"][0]["root"], Cluster::root(&own, "vol0"), "{hub}");
    let verified =
        try_run(Command::new(BINARY).args(["verify", name, "--config"]).arg(cluster.hub_config()));
    let said = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(verified.status.success() && said.contains("equal"), "{said}");
}

pub fn on_hub(cluster: &Cluster, name: &str, state: &str) {
    wait_for(&format!("{name} is {state} on the hub"), LIMIT, || {
        cluster.on_hub(name)["state"] == state
    });
}

/// How a filer shows one that lives on it.
fn home_of(cluster: &Cluster, owner: &str, name: &str) -> Option<Value> {
    let shown = status(&cluster.source_config(owner))?;
    let homes = shown["homes"].as_array()?.clone();
    homes.into_iter().find(|home| home["name"] == name)
}

/// Both ends hold what was answered, of both sources.
fn check_both(cluster: &mut Cluster, known: &Known, own: &Known) {
    on_hub(cluster, LOST, "in-sync");
    on_hub(cluster, OTHER, "in-sync");
    checked(cluster, OTHER, EXPORT, known);
    checked(cluster, OTHER, OTHER_EXPORT, own);
    roots_meet(cluster, OTHER, LOST);
    roots_meet(cluster, OTHER, OTHER);
    check_hub(cluster, EXPORT, known);
    check_hub(cluster, OTHER_EXPORT, own);
}

fn size_at(cluster: &Cluster, owner: &str) -> u64 {
    open(&socket(cluster, owner), EXPORT).size()
}

/// What `status` says of the files of a process.
fn problems(config: &std::path::Path) -> String {
    status(config).map_or_else(String::new, |shown| shown["config"]["problems"].to_string())
}

/// A larger size in the hub's file while the hub serves the volume: refused with both sizes and the way on.
/// Control: without it nothing is said.
fn does_not_grow_on_the_hub(cluster: &Cluster) {
    let (file, hub) = (cluster.path("hub/sources.d/filer-a.toml"), cluster.hub_config());
    let before = std::fs::read_to_string(&file).expect("the source's file");
    assert!(!problems(&hub).contains("vol0"));
    let pinned = format!("{before}[[volume]]\nname = \"vol0\"\nsize = \"128MiB\"\n");
    std::fs::write(&file, pinned).expect("the source's file");
    wait_for("the hub says that it does not grow", LIMIT, || {
        let said = problems(&hub);
        said.contains("has 64MiB and is served by this hub, where it does not grow to 128MiB")
            && said.contains("`mirrorhub failback filer-a` gives it to a filer")
    });
    assert_eq!(size_at(cluster, "hub"), 64 << 20);
    std::fs::write(&file, before).expect("the source's file");
    wait_for("nothing is wrong any more", LIMIT, || !problems(&hub).contains("vol0"));
}

fn wants(cluster: &Cluster, size: &str) {
    let config = cluster.source_config(OTHER);
    let text = std::fs::read_to_string(&config).expect("its file");
    let own = text.split("[[home]]").next().expect("its own part").to_owned();
    let volume = format!("[[home.volume]]\nname = \"vol0\"\nsize = \"{size}\"\n");
    let text = format!("{own}[[home]]\nname = \"{LOST}\"\n{volume}");
    std::fs::write(&config, text).expect("its file");
    cluster.signal_source(OTHER, "HUP");
}

/// A larger size and a reload, as for a volume of the filer itself; what it promises stays.
fn grows_at_its_home(cluster: &Cluster) {
    assert_eq!(size_at(cluster, OTHER), 64 << 20);
    wants(cluster, "96MiB");
    wait_for("it grows", LIMIT, || size_at(cluster, OTHER) == 96 << 20);
    let mut client = open(&socket(cluster, OTHER), EXPORT);
    client.write(80 << 20, &[5; 8192]).expect("behind the old end");
    client.flush().expect("it is kept");
    let shown = home_of(cluster, OTHER, LOST).expect("status shows it");
    assert_eq!(shown["policy"]["on_hub_loss"], "stop", "{shown}");
}

/// Behind a restart of both ends; smaller is refused, with both sizes, and nothing changes.
fn is_large_and_not_smaller(cluster: &Cluster) {
    let config = cluster.source_config(OTHER);
    assert!(!problems(&config).contains("home.volume"), "control: it is as the file says");
    wants(cluster, "64MiB");
    wait_for("smaller is refused", LIMIT, || {
        problems(&config).contains("volume vol0 of filer-a has 96MiB, and is 64MiB here")
    });
    assert_eq!(size_at(cluster, OTHER), 96 << 20);
    let image = open(&socket(cluster, "hub"), EXPORT);
    assert_eq!(image.size(), 96 << 20, "the image has grown as well");
}

/// filer-a is lost under load and failed over; its clients write on the hub, those of filer-b there.
fn lost_under_load(cluster: &mut Cluster) -> (Known, Known) {
    let own = load(cluster, OTHER, OTHER_EXPORT, Known::default(), 7);
    let writer = load(cluster, LOST, EXPORT, Known::default(), 3);
    cluster.checkpoint(LOST);
    cluster.kill_source(LOST);
    let known = writer.finish();
    let answer = fail_over(cluster, LOST, &[]);
    assert_eq!(answer["may_be_lost"], false, "{answer}");
    check_hub(cluster, EXPORT, &known);
    (known, own.finish())
}

/// The issue's own words: the same client under the same export name goes on at filer-b; nothing
/// acknowledged of either filer is missing; roots meet; and again after the hub, and then filer-b,
/// were killed and started. The old filer-a comes back to nothing. All of it behind TLS: filer-b
/// comes as filer-a with its own certificate, because it was asked to.
#[test]
fn another_filer_becomes_the_home_of_a_lost_ones_volumes() {
    let mut cluster = Cluster::prepare(&[failing("stop"), other()]);
    crate::tls::secure(&cluster);
    cluster.start_all();
    let (known, own) = lost_under_load(&mut cluster);
    does_not_grow_on_the_hub(&cluster);
    let here = load(&cluster, "hub", EXPORT, known, 11);
    let there = load(&cluster, OTHER, OTHER_EXPORT, own, 13);
    let answer = give_back(&cluster, &["--to", OTHER]);
    assert_eq!(answer["serves"], true, "{answer}");
    // The client's connection to the hub has ended; it comes back under the same name, elsewhere.
    wait_for("the hub's client is told", LIMIT, || here.has_ended());
    let (_, last) = here.served().expect("it was answered");
    let known = here.finish();
    let writer = load(&cluster, OTHER, EXPORT, known, 17);
    let (first, _) = writer.served().expect("it was answered");
    // R14: the pause is shown, and is part of what the client met: nothing was answered in it.
    let (shown, met) = (answer["pause_ms"].as_u64().expect("a pause"), first - last);
    println!("clients were held for {shown} ms, this one met {met:?}");
    assert!(shown > 0, "no pause is shown: {answer}");
    assert!(Duration::from_millis(shown) <= met, "{shown} ms are shown, the client met {met:?}");
    let (known, own) = (writer.finish(), there.finish());
    check_both(&mut cluster, &known, &own);
    let shown = home_of(&cluster, OTHER, LOST).expect("status shows it");
    assert_eq!((&shown["state"], &shown["epoch"]), (&"in-sync".into(), &answer["epoch"]));

    grows_at_its_home(&cluster);
    let (here, there) =
        (load(&cluster, OTHER, EXPORT, known, 19), load(&cluster, OTHER, OTHER_EXPORT, own, 23));
    cluster.kill_hub();
    cluster.start_hub();
    let (known, own) = (here.finish(), there.finish());
    check_both(&mut cluster, &known, &own);

    let (here, there) =
        (load(&cluster, OTHER, EXPORT, known, 29), load(&cluster, OTHER, OTHER_EXPORT, own, 31));
    cluster.kill_source(OTHER);
    let (known, own) = (here.finish(), there.finish());
    cluster.start_source(OTHER);
    check_both(&mut cluster, &known, &own);
    let stale = Known::default();
    assert!(stale.answered() < known.answered(), "the test wrote nothing");

    is_large_and_not_smaller(&cluster);
    check_both(&mut cluster, &known, &own);

    cluster.start_source(LOST);
    let config = cluster.source_config(LOST);
    wait_for("the old filer says where its volumes live", LIMIT, || {
        let shown = status(&config).map_or(Value::Null, |shown| shown["source"].clone());
        let reason = shown["reason"].as_str().unwrap_or_default();
        shown["state"] == "fenced" && reason.contains("live on filer filer-b")
    });
    assert!(Client::unix(&socket(&cluster, LOST), EXPORT, LIMIT).is_err(), "it serves");
    check_both(&mut cluster, &known, &own);
}

/// The filer is lost with all it had. A new one with an empty data directory serves nothing, whatever
/// happens to it, until it was given the volumes.
#[test]
fn a_new_empty_filer_is_brought_up() {
    let mut cluster = Cluster::start(&[failing("stop"), other()]);
    let (known, own) = lost_under_load(&mut cluster);
    std::fs::remove_dir_all(cluster.path(LOST).join("state")).expect("its disks are lost");
    for _ in 0..2 {
        cluster.start_source(LOST);
        let config = cluster.source_config(LOST);
        wait_for("it says that it is new", LIMIT, || {
            status(&config).is_some_and(|shown| {
                shown["source"]["reason"].as_str().is_some_and(|why| why.contains("is new"))
            })
        });
        let refused = Client::unix(&socket(&cluster, LOST), EXPORT, LIMIT);
        let why = refused.expect_err("an empty filer serves").to_string();
        assert!(why.contains("serves nothing before"), "{why}");
        cluster.kill_source(LOST);
    }
    cluster.start_source(LOST);
    let writer = load(&cluster, "hub", EXPORT, known, 11);
    let answer = give_back(&cluster, &[]);
    assert_eq!(answer["serves"], true, "{answer}");
    let known = load(&cluster, LOST, EXPORT, writer.finish(), 13).finish();
    cluster.kill_source(LOST);
    cluster.kill_hub();
    cluster.start_hub();
    cluster.start_source(LOST);
    on_hub(&cluster, LOST, "in-sync");
    checked(&cluster, LOST, EXPORT, &known);
    roots_meet(&cluster, LOST, LOST);
    check_hub(&cluster, EXPORT, &known);
    roots_meet(&cluster, OTHER, OTHER);
    check_hub(&cluster, OTHER_EXPORT, &own);
}

/// Who dies in the middle of a failback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dies {
    Hub,
    Taker,
    Both,
}

/// The command is given, and somebody dies a little later; when both are back, whoever the hub says
/// is primary has everything that was answered, and in the end the volumes are where they belong.
fn killed_in_between(taker: &str, more: &[&str], dies: Dies, after: Duration) {
    let mut cluster = Cluster::start(&[failing("stop"), other()]);
    let (known, own) = lost_under_load(&mut cluster);
    if taker == LOST {
        cluster.start_source(LOST);
    }
    let writer = load(&cluster, "hub", EXPORT, known, 11);
    let mut asked = Command::new(BINARY);
    asked.args(["failback", LOST]).args(more).arg("--config").arg(cluster.hub_config());
    let log = cluster.path("failback.log");
    let mut asked = crate::harness::Process::start("failback", log, &mut asked);
    crate::harness::pause(after);
    if dies != Dies::Taker {
        cluster.kill_hub();
    }
    if dies != Dies::Hub {
        cluster.kill_source(taker);
    }
    let known = writer.finish();
    if dies != Dies::Taker {
        cluster.start_hub();
    }
    if dies != Dies::Hub {
        cluster.start_source(taker);
    }
    // A hub that lives goes on with what it was asked, and hands over while somebody reads there.
    wait_for("the command ends", LIMIT, || !asked.runs());
    drop(asked);
    // Handed over, it goes on by itself; before that the hub serves, and the command is given again.
    let mut state = Value::Null;
    wait_for("somebody is primary", LIMIT, || {
        state = cluster.on_hub(LOST)["state"].clone();
        let reason = cluster.on_hub(LOST)["reason"].to_string();
        state == "in-sync" || state == "failed-over" && !reason.contains("handed over")
    });
    println!("{taker} {dies:?} after {after:?}: {state}");
    let known = if state == "failed-over" {
        check_hub(&cluster, EXPORT, &known);
        let known = load(&cluster, "hub", EXPORT, known, 37).finish();
        let mut why = String::new();
        wait_for("the command succeeds", LIMIT, || {
            let met = ask(&cluster, more);
            why = String::from_utf8_lossy(&met.stderr).into_owned();
            met.status.success()
        });
        known
    } else {
        known
    };
    on_hub(&cluster, LOST, "in-sync");
    checked(&cluster, taker, EXPORT, &known);
    let known = load(&cluster, taker, EXPORT, known, 41).finish();
    roots_meet(&cluster, taker, LOST);
    check_hub(&cluster, EXPORT, &known);
    checked(&cluster, OTHER, OTHER_EXPORT, &own);
}

/// Each end is killed at some moment of a failback, to the same filer and to another.
#[test]
fn either_end_dies_in_the_middle() {
    let moments: &[u64] = if is_full() { &[5, 50, 150, 250, 400, 700] } else { &[60, 300] };
    for &moment in moments {
        let after = Duration::from_millis(moment);
        for dies in [Dies::Hub, Dies::Taker, Dies::Both] {
            if is_full() || dies != Dies::Both {
                killed_in_between(OTHER, &["--to", OTHER], dies, after);
            }
            if is_full() || dies == Dies::Both {
                killed_in_between(LOST, &[], dies, after);
            }
        }
    }
}
