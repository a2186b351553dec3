//! Devices are added to a pool that is full of work: it is larger at once, bears the same as before on each
//! part, and nothing acknowledged is lost; also behind a kill, and on a plain device.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::{Cluster, SourceSettings, command, done, status};
use crate::outage::socket;
use crate::raid::with_array;

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";

fn refused(config: &Path, arguments: &[&str], why: &str) {
    let output = command(config, arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
    assert!(error.contains(why), "{arguments:?}: wanted {why}: {error}");
}

fn total(document: &Value) -> u64 {
    document["pool"]["total_bytes"].as_u64().expect("the size of the pool")
}

fn load(cluster: &Cluster, known: Known, seed: u64, count: u64) -> Known {
    let writer = Writer::start(socket(cluster, NAME), EXPORT, known, 8, seed);
    writer.wait_answered(count);
    writer.finish()
}

/// Of two who add the same devices at once one does, and the other is told at once that it does, or that
/// they are of the pool.
fn twice_at_once(hub: &Path, arguments: &[&str]) {
    let both: Vec<_> = std::thread::scope(|scope| {
        let add = || command(hub, arguments);
        let threads = [scope.spawn(add), scope.spawn(add)];
        threads.map(|thread| thread.join().expect("no panic")).into()
    });
    let (well, other): (Vec<_>, Vec<_>) = both.iter().partition(|output| output.status.success());
    let text = String::from_utf8_lossy(&well.first().expect("one is done").stdout).into_owned();
    assert!(text.contains("the pool is larger already"), "{text}");
    let error =
        String::from_utf8_lossy(&other.first().expect("one is refused").stderr).into_owned();
    let meanwhile = "another device command runs since";
    assert!(error.contains("is of the pool already") || error.contains(meanwhile), "{error}");
}

/// Both ends grow under load, one by one; the file names the new devices later. What is refused has
/// touched nothing.
#[test]
fn a_pool_grows_by_devices_that_are_added() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new(NAME).interval("300ms")]);
    with_array(&cluster.hub_config(), "parity1", 3);
    with_array(&cluster.source_config(NAME), "none", 1);
    cluster.start_all();
    let (hub, source) = (cluster.hub_config(), cluster.source_config(NAME));
    let path =
        |end: &str, n: usize| cluster.path(end).join(format!("new{n}")).display().to_string();
    let news: Vec<String> = (0..3).map(|n| path("hub", n)).collect();
    let own = vec![path(NAME, 0)];
    let before = (total(&cluster.hub_status()), total(&status(&source).expect("status")));

    let [one, two, three] = &news[..] else { panic!("three") };
    refused(&hub, &["device", "add", one, two], "this pool grows by 3 at once");
    refused(&hub, &["device", "add", one, two, two], "is of the pool already");
    fs::write(three, b"somebody's ".repeat(1 << 20)).expect("a file");
    refused(&hub, &["device", "add", one, two, three], "holds something already");
    assert!(fs::read(three).expect("a file").starts_with(b"somebody's"));
    assert!(!Path::new(one).is_file(), "what was refused has made a file");
    fs::remove_file(three).expect("a file");

    let writer = Writer::start(socket(&cluster, NAME), EXPORT, Known::default(), 8, 1);
    writer.wait_answered(50);
    twice_at_once(&hub, &["device", "add", one, two, three]);
    let text = done(&source, &["device", "add", &own[0]]);
    assert!(text.contains("none of 2 devices"), "{text}");
    let now = (total(&cluster.hub_status()), total(&status(&source).expect("status")));
    assert!(now.0 > before.0 * 19 / 10 && now.1 > before.1 * 19 / 10, "{before:?}, {now:?}");
    assert!(done(&hub, &["config", "diff"]).contains("new0"), "the difference is not named");
    writer.wait_answered(writer.answered() + 50);
    cluster.kill_hub();
    cluster.kill_source(NAME);
    let mut known = writer.finish();

    for round in 0..2 {
        cluster.start_all();
        let now = (total(&cluster.hub_status()), total(&status(&source).expect("status")));
        assert!(now.0 > before.0 * 19 / 10 && now.1 > before.1 * 19 / 10, "{before:?}, {now:?}");
        check(&mut cluster, NAME, &known);
        known = load(&cluster, known, 3 + round, 200);
        check(&mut cluster, NAME, &known);
        cluster.kill_hub();
        cluster.kill_source(NAME);
        // From now on the files name them.
        if round == 0 {
            name(&hub, "disk2", &news);
            name(&source, "disk0", &own);
        }
    }
    cluster.start_all();
    assert!(!cluster.hub_status().to_string().contains("needs_restart"), "it is not named");
    assert!(
        !cluster.path("hub/state/added-devices").is_file() || {
            fs::read_to_string(cluster.path("hub/state/added-devices")).expect("a list") == "[]"
        }
    );
    // One of each part may go.
    for n in ["1", "4"] {
        done(&hub, &["device", "fail", n, "--yes"]);
    }
    refused(&hub, &["device", "fail", "5", "--yes"], "parity1 bears 1");
    known = load(&cluster, known, 9, 100);
    check(&mut cluster, NAME, &known);
    done(&hub, &["device", "replace", "4", &path_of(&cluster, "other"), "--wait"]);
    let text = done(&hub, &["scrub", "--wait"]);
    assert!(text.contains("all of it right"), "{text}");
}

fn path_of(cluster: &Cluster, name: &str) -> String {
    cluster.path("hub").join(name).display().to_string()
}

/// Writes the new devices into a configuration file, behind the last one.
fn name(config: &Path, last: &str, news: &[String]) {
    let text = fs::read_to_string(config).expect("a configuration");
    let list: String = news
        .iter()
        .map(|path| format!("  {{ path = \"{path}\", size = \"320MiB\" }},\n"))
        .collect();
    let line = format!("  {{ path = \"state/{last}\", size = \"320MiB\" }},\n");
    assert!(text.contains(&line), "{text}");
    fs::write(config, text.replace(&line, &format!("{line}{list}"))).expect("a configuration");
}
