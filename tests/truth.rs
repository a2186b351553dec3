//! What is said while the hub lacks something is true: `checkpoint` names what the hub shows or
//! fails with the reason (R20), lag and age are never a made-up zero.

use std::process::{Command, Output};
use std::time::Duration;

use mirrorhub::nbd::client::Client;
use serde_json::Value;

use crate::harness::oracle::content;
use crate::harness::{
    BINARY, Cluster, SourceSettings, hash, http_get, run, status, try_run, wait_for,
};
use crate::outage::{socket, wait_settled};

const NAME: &str = "filer-a";
const LIMIT: Duration = Duration::from_secs(30);
const MIB: u64 = 6;

fn cluster() -> Cluster {
    let lines = "on_hub_loss = \"continue\"\nhub_timeout = \"1s\"\nresync_limit = \"2MiB\"";
    let settings = SourceSettings::new(NAME).interval("300ms").replication(lines);
    Cluster::start(&[settings])
}

/// Writes the first blocks of the volume anew; returns when that is answered.
fn write(cluster: &Cluster, version: u64) {
    let own = socket(cluster, NAME);
    let mut client = Client::unix(&own, "vol0", LIMIT).expect("the volume opens");
    for mib in 0..MIB {
        let bytes: Vec<u8> = (0..256).flat_map(|at| content(mib * 256 + at, version)).collect();
        client.write(mib << 20, &bytes).expect("a write is answered");
    }
}

fn own(cluster: &Cluster) -> Value {
    status(&cluster.source_config(NAME)).map_or(Value::Null, |all| all["source"].clone())
}

/// Waits until the source has made CPs of everything, alone; the root of the last.
fn wait_alone(cluster: &Cluster, before: &str) -> String {
    wait_for("the source is alone", LIMIT, || own(cluster)["alone_since"].is_object());
    let root = || own(cluster)["volumes"][0]["root"].as_str().unwrap_or_default().to_owned();
    wait_for("a CP alone holds what was written", LIMIT, || root() != before);
    wait_settled(cluster);
    root()
}

fn checkpoint(config: &std::path::Path) -> Output {
    try_run(Command::new(BINARY).args(["checkpoint", "--json", "--config"]).arg(config))
}

/// It fails, and the reason is that the hub is lost.
fn must_fail(cluster: &Cluster, when: &str) {
    let asked = checkpoint(&cluster.source_config(NAME));
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert_eq!(asked.status.code(), Some(1), "checkpoint {when}: {said}");
    assert!(said.contains("the hub is lost"), "{when}: {said}");
}

/// A CP made alone, before and after a restart, is not taken for a published one; while the image
/// is brought up both ends wait for the same CP and name the root of the volume.
#[test]
fn a_checkpoint_is_what_the_hub_shows_or_fails() {
    let mut cluster = cluster();
    write(&cluster, 1);
    let published = Cluster::root(&cluster.checkpoint(NAME), "vol0");
    cluster.kill_hub();
    write(&cluster, 2);
    let newest = wait_alone(&cluster, &published);
    must_fail(&cluster, "with a CP alone");
    cluster.kill_source(NAME);
    cluster.start_source(NAME);
    wait_for("it serves again, alone", LIMIT, || own(&cluster)["alone_since"].is_object());
    must_fail(&cluster, "after a restart alone");
    // Which CP the hub shows is not known before it was met.
    assert!(own(&cluster)["applied_cp"].is_null(), "{}", own(&cluster));
    let shown = run(Command::new(BINARY)
        .args(["status", NAME, "--config"])
        .arg(cluster.source_config(NAME)));
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(!shown.contains("CP 0"), "{shown}");
    cluster.stop_source(NAME);
    let log = std::fs::read_to_string(cluster.path(&format!("{NAME}.log"))).unwrap_or_default();
    assert!(log.contains("stopped without a last CP"), "the stop says that all is published");
    cluster.start_hub();
    cluster.start_source(NAME);
    wait_for("the image is being brought up", LIMIT, || own(&cluster)["state"] == "syncing");
    let configs = [cluster.source_config(NAME), cluster.hub_config()];
    let asked = configs.map(|config| std::thread::spawn(move || checkpoint(&config)));
    for asked in asked {
        let asked = asked.join().expect("no panic");
        assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
        let answer: Value = serde_json::from_slice(&asked.stdout).expect("JSON of checkpoint");
        assert_eq!(Cluster::root(&answer, "vol0"), newest, "{answer}");
    }
    assert_eq!(cluster.on_hub(NAME)["volumes"][0]["root"], newest.as_str());
    cluster.wait_in_sync(NAME);
}

/// Value of a gauge of the source on one of the pages.
fn gauge(url: &str, name: &str) -> f64 {
    let (_, page) = http_get(url);
    let wanted = format!("mirrorhub_source_{name}{{source=\"{NAME}\"}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(&wanted));
    line.unwrap_or_else(|| panic!("no {name} at {url}")).parse().expect("a number")
}

fn number(shown: &Value, key: &str) -> f64 {
    shown[key].as_f64().unwrap_or_else(|| panic!("{key} is not known: {shown}"))
}

/// The age is above zero at that end, and grows.
fn must_age(what: &str, shown: impl Fn() -> Value) {
    let first = number(&shown(), "image_age_seconds");
    assert!(first > 0.0, "{what}: an image that lacks writes has no age");
    wait_for(&format!("{what}: the age of the image grows"), LIMIT, || {
        number(&shown(), "image_age_seconds") > first
    });
}

/// Alone, and while the image is brought up: what was acknowledged and is not in the image counts at
/// the source; the hub, which cannot know it, says so, and lets the image age.
#[test]
fn lag_and_age_are_no_made_up_zeros() {
    let bytes = f64::from(u32::try_from(MIB << 20).expect("small"));
    let mut cluster = cluster();
    write(&cluster, 1);
    let published = Cluster::root(&cluster.checkpoint(NAME), "vol0");
    let before = number(&own(&cluster), "acknowledged_bytes");
    assert_eq!(own(&cluster)["lag_bytes"], 0);
    cluster.kill_hub();
    write(&cluster, 2);
    wait_alone(&cluster, &published);
    let (hub, source) = (cluster.hub_url("/metrics"), cluster.source_url(NAME, "/metrics"));
    let must_lag = |shown: &Value| {
        assert!(number(shown, "lag_bytes") >= bytes, "{shown}");
        assert!(number(shown, "lag_seconds") > 0.0, "{shown}");
        assert!(number(shown, "acknowledged_bytes") >= before + bytes, "{shown}");
        assert!(gauge(&source, "lag_bytes") >= bytes && gauge(&source, "lag_seconds") > 0.0);
    };
    must_lag(&own(&cluster));
    must_age("the source, alone", || own(&cluster));
    cluster.start_hub();
    wait_for("the image is being brought up", LIMIT, || {
        own(&cluster)["state"] == "syncing" && cluster.on_hub(NAME)["state"] == "syncing"
    });
    let there = cluster.on_hub(NAME);
    assert!(there["lag_bytes"].is_null() && there["lag_seconds"].is_null(), "{there}");
    assert!(gauge(&hub, "lag_bytes").is_nan() && gauge(&hub, "lag_seconds").is_nan());
    assert!(gauge(&hub, "image_age_seconds") > 0.0);
    must_lag(&own(&cluster));
    must_age("the source", || own(&cluster));
    must_age("the hub", || cluster.on_hub(NAME));
    cluster.wait_in_sync(NAME);
    wait_for("nothing lags any more", LIMIT, || {
        let ends = [own(&cluster), cluster.on_hub(NAME)];
        ends.iter().all(|end| end["lag_bytes"] == 0 && number(end, "image_age_seconds") < 0.001)
    });
    assert!(gauge(&hub, "lag_bytes").abs() < 0.5 && gauge(&source, "lag_bytes").abs() < 0.5);
}

/// Nothing was written yet: both ends have the same empty volume, and say so.
#[test]
fn a_fresh_cluster_is_equal_and_proves_it() {
    let cluster = Cluster::start(&[SourceSettings::new(NAME)]);
    let empty = cluster.path("empty");
    std::fs::File::create(&empty).and_then(|file| file.set_len(64 << 20)).expect("a sparse file");
    let root = hash(&empty);
    assert_eq!(Cluster::root(&cluster.checkpoint(NAME), "vol0"), root);
    for end in [own(&cluster), cluster.on_hub(NAME)] {
        assert_eq!(end["volumes"][0]["root"], root.as_str(), "{end}");
        assert_eq!(end["lag_bytes"], 0, "{end}");
        assert!(number(&end, "image_age_seconds") < 0.001, "{end}");
    }
    for config in [cluster.source_config(NAME), cluster.hub_config()] {
        run(Command::new(BINARY).args(["verify", "--config"]).arg(&config));
        let asked = checkpoint(&config);
        let answer: Value = serde_json::from_slice(&asked.stdout).expect("JSON of checkpoint");
        assert_eq!(Cluster::root(&answer, "vol0"), root);
    }
    let keep = ["checkpoint", NAME, "--keep", "first", "--config"];
    let kept = try_run(Command::new(BINARY).args(keep).arg(cluster.hub_config()));
    let said = String::from_utf8_lossy(&kept.stderr).into_owned();
    assert!(!kept.status.success() && said.contains("nothing was written"), "{said}");
}

/// What is seen of the source at that end: its state in `status` for programs and people, with its reason and
/// its next step, the one series of the gauge that is 1, and the line that the log has of the change.
fn must_tell(cluster: &Cluster, at_hub: bool, state: &str) {
    let (config, url, log) = match at_hub {
        true => (cluster.hub_config(), cluster.hub_url("/metrics"), cluster.path("hub.log")),
        false => {
            let url = cluster.source_url(NAME, "/metrics");
            (cluster.source_config(NAME), url, cluster.path("filer-a.log"))
        }
    };
    let mut shown = Value::Null;
    wait_for(&format!("{state} is shown"), LIMIT, || {
        let all = status(&config).unwrap_or_default();
        shown = if at_hub { all["sources"][0].clone() } else { all["source"].clone() };
        if shown["state"] != state {
            return false;
        }
        // The reason of a moment later may be another: how the next try ended.
        let arguments = ["status", NAME, "--config"];
        let people = run(Command::new(BINARY).args(arguments).arg(&config));
        let people = String::from_utf8_lossy(&people.stdout).into_owned();
        let told = [state, text(&shown, "reason"), text(&shown, "next_step")];
        told.into_iter().all(|what| people.contains(what))
    });
    let (_, page) = http_get(&url);
    let begin = format!("mirrorhub_source_state{{source=\"{NAME}\",state=\"");
    let lines: Vec<_> = page.lines().filter_map(|line| line.strip_prefix(&begin)).collect();
    let set: Vec<_> = lines.iter().filter_map(|line| line.strip_suffix("\"} 1")).collect();
    assert_eq!(set, [state], "{lines:?}");
    // What the log has is the reason of its own look.
    let change = format!(" state={state} reason=\"");
    wait_for(&format!("the log has {change}"), LIMIT, || {
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        let line = log.lines().find_map(|line| Some(line.split_once(&change)?.1));
        line.is_some_and(|rest| !rest.starts_with('"') && rest.contains(" next_step=\""))
    });
}

fn text<'a>(shown: &'a Value, key: &str) -> &'a str {
    shown[key].as_str().unwrap_or_default()
}

/// Goal: whatever becomes of a source is told at both ends in status, log and metrics.
#[test]
fn what_becomes_of_a_source_is_told_everywhere() {
    let settings = SourceSettings::new(NAME).replication("hub_timeout = \"1s\"");
    let mut cluster = Cluster::prepare(&[settings]);
    cluster.start_hub();
    wait_for("the hub looks at its sources", LIMIT, || {
        let (_, page) = http_get(&cluster.hub_url("/metrics"));
        page.contains("state=\"waiting\"} 1")
    });
    cluster.start_source(NAME);
    must_tell(&cluster, true, "in-sync");
    cluster.kill_hub();
    must_tell(&cluster, false, "offline");
    cluster.start_hub();
    must_tell(&cluster, false, "in-sync");
    cluster.wait_in_sync(NAME);
    // What comes and goes between two looks is not told.
    wait_for("the new hub has looked at a source in sync", LIMIT, || {
        let log = std::fs::read_to_string(cluster.path("hub.log")).unwrap_or_default();
        let since = log.rsplit_once("looking at the sources").map_or("", |(_, since)| since);
        since.contains("in-sync: 1") || since.contains(" state=in-sync reason=")
    });
    cluster.kill_source(NAME);
    must_tell(&cluster, true, "offline");
    run(Command::new(BINARY)
        .args(["failover", NAME, "--now", "--config"])
        .arg(cluster.hub_config()));
    must_tell(&cluster, true, "failed-over");
}
