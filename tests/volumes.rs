//! One volume of a source is not what the hub's file pins: it is refused alone (R20).

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::oracle::{Known, Writer};
use crate::harness::{
    BINARY, Cluster, SourceSettings, command, http_get, metric_sum, run, status, try_run, wait_for,
};
use crate::outage::socket;

const NAME: &str = "filer-a";
const VOLUMES: [(&str, &str); 3] = [("vol0", "64MiB"), ("vol1", "32MiB"), ("vol2", "16MiB")];
const LIMIT: Duration = Duration::from_secs(60);

/// Writes the hub's file of the source, with `last` as the size of the third volume.
fn pin(cluster: &Cluster, last: &str) {
    let volume =
        |(name, size): (&str, &str)| format!("[[volume]]\nname = \"{name}\"\nsize = \"{size}\"\n");
    let mut volumes = VOLUMES;
    volumes[2].1 = last;
    let text: String = volumes.into_iter().map(volume).collect();
    let file = cluster.path(&format!("hub/sources.d/{NAME}.toml"));
    fs::write(file, format!("name = \"{NAME}\"\n{text}")).expect("sources.d file");
}

fn pattern(cluster: &Cluster, volume: &str, byte: &str, offset: &str) -> bool {
    let write = format!("write -P {byte} {offset} 1M");
    let uri = cluster.volume(NAME, volume);
    try_run(Command::new("qemu-io").args(["-f", "raw", "-c", &write]).arg(uri)).status.success()
}

fn own(cluster: &Cluster) -> Value {
    status(&cluster.source_config(NAME)).map_or(Value::Null, |document| document["source"].clone())
}

fn there(cluster: &Cluster) -> Value {
    let document = status(&cluster.hub_config()).unwrap_or(Value::Null);
    document["sources"][0].clone()
}

/// What status says is the matter with a volume.
fn trouble<'a>(entry: &'a Value, volume: &str) -> &'a Value {
    let volumes = entry["volumes"].as_array().expect("volumes");
    &volumes.iter().find(|met| met["name"] == volume).expect("the volume")["trouble"]
}

fn wait_states(cluster: &Cluster, state: &str) {
    wait_for(&format!("both ends say {state}"), LIMIT, || {
        own(cluster)["state"] == state && there(cluster)["state"] == state
    });
}

/// The image on the hub has what was written to the volume.
fn equal(cluster: &Cluster, volume: &str) -> bool {
    let size = VOLUMES.iter().find(|(name, _)| *name == volume).expect("a volume").1;
    let compare = try_run(
        Command::new("qemu-img")
            .args(["compare", "-f", "raw", "-F", "raw"])
            .arg(cluster.volume(NAME, volume))
            .arg(cluster.image(NAME, volume)),
    );
    assert!(!size.is_empty());
    compare.status.success()
}

fn cluster(policy: &str, last: &str) -> Cluster {
    let source = SourceSettings::new(NAME).volumes(&VOLUMES).replication(policy);
    let cluster = Cluster::prepare(&[source]);
    pin(&cluster, last);
    cluster
}

fn start(cluster: &mut Cluster) {
    cluster.start_hub();
    cluster.start_source(NAME);
}

/// Two volumes mirror with equal roots, the third is named at both ends; mended and started again,
/// all three are in sync, and what was written meanwhile is there.
#[test]
fn a_volume_of_another_size_is_refused_alone_and_comes_back() {
    let mut cluster = cluster("on_hub_loss = \"continue\"\nhub_timeout = \"2s\"", "8MiB");
    start(&mut cluster);
    wait_states(&cluster, "behind");
    for (at, (volume, _)) in VOLUMES.iter().enumerate() {
        assert!(pattern(&cluster, volume, &format!("0x{}1", at + 1), "0"), "{volume} is served");
    }
    let answer = cluster.checkpoint(NAME);
    let named = answer["sources"][0]["volumes"].as_array().expect("volumes").len();
    assert_eq!(named, 2, "{answer}");
    assert!(equal(&cluster, "vol0") && equal(&cluster, "vol1"));
    for entry in [own(&cluster), there(&cluster)] {
        assert_eq!(*trouble(&entry, "vol0"), Value::Null);
        let third = trouble(&entry, "vol2");
        assert_eq!(third["state"], "refused", "{entry}");
        let reason = third["reason"].as_str().expect("a reason");
        assert!(reason.contains("16777216") && reason.contains("8388608"), "{reason}");
        assert!(third["next_step"].as_str().expect("a step").contains("agree"), "{third}");
        assert!(entry["alone_since"].is_object(), "its loss would lose what vol2 holds: {entry}");
    }
    let verified = run(Command::new(BINARY).args(["verify", "--config"]).arg(cluster.hub_config()));
    let text = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(text.contains("vol1") && !text.contains("vol2"), "{text}");
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    let series = format!("mirrorhub_source_refused_volumes{{source=\"{NAME}\"}} 1");
    assert!(page.contains(&series), "{page}");
    for (volume, refused) in [("vol0", 0), ("vol1", 0), ("vol2", 1)] {
        let series = "mirrorhub_volume_refused";
        let series = format!("{series}{{source=\"{NAME}\",volume=\"{volume}\"}} {refused}\n");
        assert!(page.contains(&series), "{volume}: {page}");
    }
    // A failover names what it would lose, and wants it accepted.
    let dry = run(Command::new(BINARY)
        .args(["failover", NAME, "--dry-run", "--config"])
        .arg(cluster.hub_config()));
    let text = String::from_utf8_lossy(&dry.stdout).into_owned();
    assert!(text.contains("there is no image of it"), "{text}");

    // The file is mended; the source goes on meanwhile.
    cluster.stop_hub();
    pin(&cluster, "16MiB");
    assert!(pattern(&cluster, "vol2", "0x77", "1M"), "alone");
    cluster.start_hub();
    wait_states(&cluster, "in-sync");
    wait_for("the mark goes", LIMIT, || own(&cluster)["alone_since"].is_null());
    let answer = cluster.checkpoint(NAME);
    assert_eq!(answer["sources"][0]["volumes"].as_array().expect("volumes").len(), 3);
    assert!(VOLUMES.iter().all(|(volume, _)| equal(&cluster, volume)));
    assert!(VOLUMES.iter().all(|(volume, _)| *trouble(&there(&cluster), volume) == Value::Null));
}

/// A volume that was mirrored is refused for a while, written meanwhile, and comes back from the
/// CP its image is of; a source killed meanwhile changes nothing.
#[test]
fn a_volume_that_was_mirrored_is_left_out_for_a_while() {
    let mut cluster = cluster("on_hub_loss = \"continue\"\nhub_timeout = \"2s\"", "16MiB");
    start(&mut cluster);
    wait_states(&cluster, "in-sync");
    for (volume, _) in VOLUMES {
        assert!(pattern(&cluster, volume, "0x11", "0"));
    }
    cluster.checkpoint(NAME);
    cluster.stop_hub();
    pin(&cluster, "8MiB");
    cluster.start_hub();
    wait_states(&cluster, "behind");
    for (volume, _) in VOLUMES {
        assert!(pattern(&cluster, volume, "0x22", "2M"));
    }
    cluster.checkpoint(NAME);
    assert!(equal(&cluster, "vol0") && !equal(&cluster, "vol2"), "the image stays where it was");
    let entry = there(&cluster);
    let image_cp = trouble(&entry, "vol2")["image_cp"].as_u64().expect("a CP");
    assert!(image_cp > 0 && image_cp < entry["applied_cp"].as_u64().expect("a CP"), "{entry}");
    assert!(pattern(&cluster, "vol2", "0x33", "4M"));
    cluster.kill_source(NAME);
    cluster.kill_hub();
    pin(&cluster, "16MiB");
    start(&mut cluster);
    wait_states(&cluster, "in-sync");
    cluster.checkpoint(NAME);
    assert!(VOLUMES.iter().all(|(volume, _)| equal(&cluster, volume)));
}

/// Under `stop` it is not served; the others are, and a failover loses nothing of theirs.
#[test]
fn under_stop_a_refused_volume_is_not_served() {
    let mut cluster = cluster("on_hub_loss = \"stop\"\nhub_timeout = \"2s\"", "8MiB");
    start(&mut cluster);
    wait_states(&cluster, "behind");
    assert!(pattern(&cluster, "vol0", "0x11", "0") && pattern(&cluster, "vol1", "0x11", "0"));
    assert!(!pattern(&cluster, "vol2", "0x11", "0"), "the hub would not hold it");
    let reason = own(&cluster)["reason"].as_str().expect("a reason").to_owned();
    assert!(reason.contains("vol2") && reason.contains("not served"), "{reason}");
    assert!(own(&cluster)["alone_since"].is_null());
}

/// Replaces a part of source.toml.
fn edit(cluster: &Cluster, from: &str, to: &str) {
    let file = cluster.source_config(NAME);
    let text = fs::read_to_string(&file).expect("source.toml");
    assert!(text.contains(from), "{from:?} is not in {text}");
    fs::write(file, text.replacen(from, to, 1)).expect("source.toml");
}

/// The size that a client which connects now is told.
fn size_of(uri: &str) -> Option<u64> {
    let output = try_run(Command::new("nbdinfo").args(["--size", uri]));
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

fn wait_size(cluster: &Cluster, bytes: u64) {
    wait_for(&format!("both ends show {bytes} bytes"), LIMIT, || {
        let uris = [cluster.volume(NAME, "vol2"), cluster.image(NAME, "vol2")];
        uris.iter().all(|uri| size_of(uri) == Some(bytes))
    });
}

/// Smaller: refused where it stands, by the process that runs and by the next; nothing changes.
fn smaller_is_refused(cluster: &mut Cluster) {
    edit(cluster, "\"40MiB\"", "\"8MiB\"");
    cluster.signal_source(NAME, "HUP");
    let mut problem = Value::Null;
    wait_for("status names it", LIMIT, || {
        let shown = status(&cluster.source_config(NAME)).unwrap_or_default();
        problem = shown["config"]["problems"][0].clone();
        !problem.is_null()
    });
    let text = fs::read_to_string(cluster.source_config(NAME)).expect("source.toml");
    let line = usize::try_from(problem["line"].as_u64().expect("a line")).expect("small");
    assert!(text.lines().nth(line - 1).expect("the line").contains("8MiB"), "{problem}");
    assert_eq!(problem["key"], "volume.size");
    assert!(problem["fix"].as_str().expect("a fix").contains("40MiB"), "{problem}");
    assert_eq!(size_of(&cluster.volume(NAME, "vol2")), Some(40 << 20));
    cluster.kill_source(NAME);
    let refused = try_run(&mut cluster.source_command(NAME));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{text}");
    assert!(text.contains(&format!("source.toml:{line}: ")) && text.contains("40MiB"), "{text}");
}

/// Goal: a volume grows while a client writes to it, over a restart of both ends as well; nothing is
/// lost, roots are equal, the image on the hub has the new size; smaller is refused with file, line,
/// key and fix, running and at a start. Method: the third volume, 16 to 40 to 600 MiB (one more level
/// of the tree); the hub's file first, then the source's before it.
#[test]
fn a_volume_grows_under_its_clients() {
    let mut cluster = cluster("on_hub_loss = \"stop\"\nhub_timeout = \"2s\"", "16MiB");
    start(&mut cluster);
    wait_states(&cluster, "in-sync");
    let writer =
        Writer::start(socket(&cluster, NAME), &format!("{NAME}/vol2"), Known::default(), 8, 6);
    writer.wait_answered(200);
    pin(&cluster, "40MiB");
    // Under `stop` a size that the hub does not take yet ends its clients.
    wait_for("the hub takes its file", LIMIT, || {
        let diff = command(&cluster.hub_config(), &["config", "diff"]);
        diff.status.success() && !String::from_utf8_lossy(&diff.stdout).contains("vol2")
    });
    edit(&cluster, "\"16MiB\"", "\"40MiB\"");
    let diff = command(&cluster.source_config(NAME), &["config", "diff"]);
    let text = String::from_utf8_lossy(&diff.stdout).into_owned();
    assert!(text.contains("volume vol2") && text.contains("16MiB -> 40MiB"), "{text}");
    cluster.signal_source(NAME, "HUP");
    wait_size(&cluster, 40 << 20);
    assert!(pattern(&cluster, "vol2", "0x44", "39M"), "behind the old end");
    writer.wait_answered(writer.answered() + 200);
    let mut known = writer.finish();
    cluster.checkpoint(NAME);
    assert!(equal(&cluster, "vol2") && equal(&cluster, "vol0"));
    known.check_export(&socket(&cluster, "hub"), "filer-a/vol2").expect("every answered write");

    smaller_is_refused(&mut cluster);

    // Both ends are down; the hub's file comes last, and its volumes go on meanwhile.
    cluster.kill_hub();
    edit(&cluster, "\"8MiB\"", "\"600MiB\"");
    start(&mut cluster);
    wait_states(&cluster, "behind");
    assert_eq!(trouble(&there(&cluster), "vol2")["state"], "refused");
    assert!(pattern(&cluster, "vol0", "0x55", "1M"));
    pin(&cluster, "600MiB");
    wait_states(&cluster, "in-sync");
    wait_size(&cluster, 600 << 20);
    let writer = Writer::start(socket(&cluster, NAME), &format!("{NAME}/vol2"), known, 8, 7);
    writer.wait_answered(100);
    assert!(pattern(&cluster, "vol2", "0x66", "599M"));
    known = writer.finish();
    cluster.checkpoint(NAME);
    assert!(VOLUMES.iter().all(|(volume, _)| equal(&cluster, volume)));
    known.check_export(&socket(&cluster, "hub"), "filer-a/vol2").expect("every answered write");
    let verified = run(Command::new(BINARY).args(["verify", "--config"]).arg(cluster.hub_config()));
    assert!(String::from_utf8_lossy(&verified.stdout).contains("vol2"));
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    assert_eq!(metric_sum(&page, "mirrorhub_source_rejected_checkpoints_total", ""), 0.0);
}
