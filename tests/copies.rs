//! Old copies: the hub or a source is restored from one, or a copy runs beside its original. Each is
//! recognised, what is refused is told with a reason and a next step, and no acknowledged write is lost.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::crashes::check;
use crate::failover::{check_hub, fail_over};
use crate::harness::oracle::{Known, Writer};
use crate::harness::{
    BINARY, Cluster, Process, SourceSettings, done, http_get, metric_sum, run, status, try_run,
    wait_for,
};
use crate::outage::socket;

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(30);

/// A small cluster whose CPs come only when asked for.
fn cluster(on_hub_loss: &str) -> Cluster {
    let lines = format!("on_hub_loss = \"{on_hub_loss}\"\nhub_timeout = \"1s\"");
    let settings = SourceSettings::new(NAME).replication(&lines).nvram("16MiB").pool("256MiB");
    let mut cluster = Cluster::prepare_with(&[settings], "32MiB", "256MiB");
    cluster.start_all();
    cluster
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to));
}

/// The state directory is gone, and an old copy of it takes its place.
fn restore(state: &Path, old: &Path) {
    std::fs::remove_dir_all(state).expect("the state goes");
    copy(old, state);
}

fn written(cluster: &Cluster, known: Known, seed: u64) -> Known {
    let writer = Writer::start(socket(cluster, NAME), EXPORT, known, 16, seed);
    writer.wait_answered(200);
    writer.finish()
}

/// What `mirrorhub status` prints, for people.
fn shown(config: &Path) -> String {
    done(config, &["status"])
}

/// Waits until that process says that `word` of the source is so, with a reason that says `why` and a next step
/// that says `next`; both are also what people see.
fn wait_shown(config: &Path, state: &str, why: &str, next: &str) {
    let mut met = Value::Null;
    wait_for(&format!("{state}, with {why:?}, then {next:?}"), LIMIT, || {
        let Some(document) = status(config) else { return false };
        let hub = document["sources"].as_array().and_then(|sources| sources.first()).cloned();
        met = hub.unwrap_or_else(|| document["source"].clone());
        let says =
            |key: &str, what: &str| met[key].as_str().is_some_and(|text| text.contains(what));
        let all = met["state"] == state && says("reason", why) && says("next_step", next);
        if !all {
            println!("{}: {} {}", met["state"], met["reason"], met["next_step"]);
        }
        all
    });
    let text = shown(config);
    assert!(text.contains(why) && text.contains(next), "people do not see it:\n{text}");
}

/// Goal: a hub that is restored from an old copy of its state is brought up again, and its source says that
/// it was set back: also one that was itself restarted meanwhile.
#[test]
fn a_hub_that_is_restored_is_recognised_and_brought_up() {
    for restarted in [false, true] {
        let mut cluster = cluster("stop");
        let known = written(&cluster, Known::default(), 3);
        cluster.checkpoint(NAME);
        assert!(cluster.stop_hub().success());
        let (state, old) = (cluster.path("hub/state"), cluster.path("old"));
        copy(&state, &old);
        cluster.start_hub();
        let known = written(&cluster, known, 5);
        cluster.checkpoint(NAME);
        let known = written(&cluster, known, 7);
        if restarted {
            assert!(cluster.stop_source(NAME).success());
        }
        cluster.kill_hub();
        restore(&state, &old);
        // The negative control: the copy has not what was acknowledged since.
        cluster.start_hub();
        if restarted {
            assert!(known.check_export(&socket(&cluster, "hub"), EXPORT).is_err());
            cluster.start_source(NAME);
        }
        let own = cluster.source_config(NAME);
        wait_shown(&own, "in-sync", "restored from an older copy", "find out why");
        check(&mut cluster, NAME, &known);
        assert!(shown(&own).contains("restored from an older copy"), "it stays to be read");
        let log = std::fs::read_to_string(cluster.path("filer-a.log")).unwrap_or_default();
        assert!(log.contains("hub set back"), "the log does not say so");
        cluster.end();
    }
}

/// Goal: a source that is restored from an old copy is refused, however often it is started, and serves nobody;
/// the hub has all that was acknowledged, serves it, and brings the filer up to it.
#[test]
fn a_source_that_is_restored_is_refused_and_brought_up() {
    let mut cluster = cluster("continue");
    let known = written(&cluster, Known::default(), 3);
    cluster.checkpoint(NAME);
    assert!(cluster.stop_source(NAME).success());
    let (state, old) = (cluster.path("filer-a/state"), cluster.path("old"));
    copy(&state, &old);
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    let known = written(&cluster, known, 5);
    cluster.checkpoint(NAME);
    let known = written(&cluster, known, 7);
    cluster.kill_source(NAME);
    restore(&state, &old);
    let (own, hub) = (cluster.source_config(NAME), cluster.hub_config());
    // The first boot has a number that the hub has seen, the next one has a new one.
    for why in ["is a clone or an old copy", "has committed only CP"] {
        cluster.start_source(NAME);
        wait_shown(&own, "faulted", why, "put its newest state directory back");
        wait_shown(&hub, "offline", why, "put its newest state directory back");
        let refused = known.check_export(&socket(&cluster, NAME), EXPORT);
        assert!(refused.is_err(), "an old copy is served");
        cluster.kill_source(NAME);
    }
    let log = std::fs::read_to_string(cluster.path("hub.log")).unwrap_or_default();
    assert!(log.contains("connection refused"), "the hub's log does not say so");
    // What it has is lost for good: the way that the next step names.
    let answer = fail_over(&cluster, NAME, &[]);
    assert_eq!(answer["outcome"], "complete", "{answer}");
    check_hub(&cluster, EXPORT, &known);
    cluster.start_source(NAME);
    wait_shown(&own, "fenced", "another end is primary", "failback");
    done(&hub, &["failback", NAME]);
    check(&mut cluster, NAME, &known);
}

/// A second filer on a copy of the state, under the same name.
struct Clone<'a> {
    cluster: &'a Cluster,
    process: Option<Process>,
}

impl Clone<'_> {
    fn config(&self) -> std::path::PathBuf {
        self.cluster.path("clone/source.toml")
    }

    fn start(&mut self) {
        let mut command = Command::new(BINARY);
        command.arg("source").arg("--config").arg(self.config());
        let log = self.cluster.path("clone.log");
        self.process = Some(Process::start("clone", log, &mut command));
    }
}

/// Goal: of a source and a copy of it that is started beside it the copy is refused, however often it is
/// started, and the original goes on: its connection, its clients, its image.
#[test]
fn a_clone_is_refused_and_the_original_goes_on() {
    let mut cluster = cluster("continue");
    let known = written(&cluster, Known::default(), 3);
    assert!(cluster.stop_source(NAME).success());
    std::fs::create_dir(cluster.path("clone")).expect("a directory");
    copy(&cluster.path("filer-a/state"), &cluster.path("clone/state"));
    let file = std::fs::read_to_string(cluster.source_config(NAME)).expect("its file");
    let port =
        cluster.source_url(NAME, "").trim_end_matches('/').rsplit(':').next().map(str::to_owned);
    let file = file.replace(&port.expect("a port"), "7499");
    std::fs::write(cluster.path("clone/source.toml"), file).expect("its copy");
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    let writer = Writer::start(socket(&cluster, NAME), EXPORT, known, 16, 5);
    writer.wait_answered(100);
    cluster.checkpoint(NAME);
    let generation = cluster.on_hub(NAME)["generation"].clone();
    let mut clone = Clone { cluster: &cluster, process: None };
    for why in ["is a clone or an old copy", "has committed only CP"] {
        clone.start();
        let config = clone.config();
        wait_shown(&config, "faulted", why, "start the original");
        let before = writer.answered();
        writer.wait_answered(before + 100);
        // Nobody is served by it, under `continue` neither, once its patience is over.
        crate::harness::pause(Duration::from_millis(1200));
        let copy = cluster.path("clone/nbd.sock");
        assert!(Known::default().check_export(&copy, EXPORT).is_err(), "a clone is served");
        clone.process = None;
    }
    let there = cluster.on_hub(NAME);
    assert_eq!((&there["state"], &there["generation"]), (&"in-sync".into(), &generation));
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    let refused = metric_sum(&page, "mirrorhub_refused_connections_total", "generation");
    assert!(refused >= 1.0, "it is not counted");
    let log = std::fs::read_to_string(cluster.path("filer-a.log")).unwrap_or_default();
    assert!(!log.contains("hub lost") && !log.contains("halted"), "the original was disturbed");
    let known = writer.finish();
    let verify =
        try_run(Command::new(BINARY).args(["verify", NAME, "--config"]).arg(cluster.hub_config()));
    assert!(verify.status.success(), "{}", String::from_utf8_lossy(&verify.stdout));
    check(&mut cluster, NAME, &known);
}
