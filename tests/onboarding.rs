//! Real processes: sources come, change and go by their files while the others work.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::oracle::{Known, Writer};
use crate::harness::{BINARY, Cluster, SourceSettings, http_get, run, status, try_run, wait_for};
use crate::outage::socket;

const LIMIT: Duration = Duration::from_secs(30);
/// How soon a file counts.
const SOON: Duration = Duration::from_secs(2);

fn file_of(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.path("hub/sources.d").join(format!("{name}.toml"))
}

fn state_of(document: &Value, name: &str) -> Option<String> {
    let sources = document["sources"].as_array()?;
    let found = sources.iter().find(|source| source["name"] == name)?;
    found["state"].as_str().map(str::to_owned)
}

fn on_hub(cluster: &Cluster, name: &str) -> Option<String> {
    state_of(&cluster.hub_status(), name)
}

/// Sessions of a source that the hub has begun, by its log.
fn sessions(cluster: &Cluster, name: &str) -> usize {
    let log = fs::read_to_string(cluster.path("hub.log")).unwrap_or_default();
    let whose = format!("source={name}");
    log.lines().filter(|line| line.contains("in session") && line.contains(&whose)).count()
}

/// One of the fifty files that are wrong, each in one of several ways, and the line of the mistake.
fn broken(name: &str, way: usize) -> (String, Option<u64>) {
    match way % 10 {
        0 => (format!("name = \"{name}"), Some(1)),
        1 => (format!("name = \"{name}\"\nnvram_share = 12\n"), Some(2)),
        2 => (format!("name = \"{name}\"\n\nnvram_share = \"12\"\n"), Some(3)),
        3 => ("name = \"another\"\n".to_owned(), Some(1)),
        4 => (format!("name = \"{name}\"\nenabled = \"yes\"\n"), Some(2)),
        5 => (format!("name = \"{name}\"\nshare = \"4MiB\"\n"), Some(2)),
        6 => (format!("name = \"{name}\"\nlog_limit = \"1KiB\"\n"), Some(2)),
        7 => (format!("name = \"{name}\"\n[[volume]]\nname = \"v\"\nsize = \"1000\"\n"), Some(4)),
        8 => (format!("name = \"{name}\"\n[[volume]]\nname = \"V\"\nsize = \"1GiB\"\n"), Some(3)),
        _ => (format!("name = \"{name}\"\nname = \"{name}\"\n"), Some(2)),
    }
}

/// Goal: of 200 files dropped in at once 150 run within two seconds, 50 broken ones are each named
/// with line and fix, and the traffic of the others goes on without a reconnect. Method: one real
/// source under load; the files are written by a loop, as a configuration tool does.
#[test]
#[expect(clippy::too_many_lines, reason = "one story, told in its order")]
fn two_hundred_files_at_once_and_fifty_of_them_wrong() {
    let mut cluster = Cluster::prepare_with(&[SourceSettings::new("filer-a")], "1GiB", "2GiB");
    cluster.start_all();
    let writer =
        Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", Known::default(), 8, 0xf11e);
    writer.wait_answered(100);
    let before = sessions(&cluster, "filer-a");
    let mut wrong = Vec::new();
    for number in 0..200 {
        let name = format!("new-{number:03}");
        let text = if number % 4 == 3 {
            let (text, line) = broken(&name, number / 4);
            wrong.push((name.clone(), line));
            text
        } else {
            format!("name = \"{name}\"\n")
        };
        fs::write(file_of(&cluster, &name), text).expect("a source's file");
    }
    let begin = Instant::now();
    let (mut document, mut answered, mut stood) = (Value::Null, writer.answered(), Duration::ZERO);
    let mut moved = Instant::now();
    wait_for("150 sources run, and what is wrong is said", LIMIT, || {
        let now = writer.answered();
        if now > answered {
            (answered, moved) = (now, Instant::now());
        }
        stood = stood.max(moved.elapsed());
        document = cluster.hub_status();
        let all = document["sources"].as_array().expect("sources");
        let run = all.iter().filter(|source| source["state"] == "waiting").count();
        run == 150 && document["config"]["problems"].is_array()
    });
    println!("150 of 200 sources after {:?}; the writer stood still {stood:?}", begin.elapsed());
    assert!(begin.elapsed() < SOON * 2, "a status takes its time too");
    let problems = document["config"]["problems"].as_array().expect("problems");
    assert_eq!(wrong.len(), 50);
    for (name, line) in &wrong {
        let file = format!("{name}.toml");
        let own: Vec<&Value> = problems
            .iter()
            .filter(|one| one["file"].as_str().is_some_and(|path| path.ends_with(&file)))
            .collect();
        assert!(!own.is_empty(), "{name} is not named");
        assert!(own.iter().any(|one| one["line"].as_u64() == *line), "{name}: {own:?}");
        assert!(own.iter().all(|one| one["fix"].as_str().is_some_and(|fix| !fix.is_empty())));
        assert_eq!(state_of(&document, name), None, "{name} must not run");
    }
    // `config check` says the same and applies nothing.
    let check = try_run(
        Command::new(BINARY)
            .args(["config", "check", "--json", "--config"])
            .arg(cluster.hub_config()),
    );
    assert_eq!(check.status.code(), Some(78));
    let said: Value = serde_json::from_slice(&check.stdout).expect("JSON");
    let checked = said["problems"].as_array().expect("problems");
    for problem in problems {
        let same = |one: &&Value| {
            ["file", "line", "key", "fix"].iter().all(|field| one[*field] == problem[*field])
        };
        assert!(checked.iter().any(|one| same(&one)), "config check does not say {problem}");
    }
    // Mended all at once.
    for (name, _) in &wrong {
        fs::write(file_of(&cluster, name), format!("name = \"{name}\"\n")).expect("the file");
    }
    wait_for("all 200 run", LIMIT, || {
        document = cluster.hub_status();
        let all = document["sources"].as_array().expect("sources");
        all.len() == 201 && document.get("config").is_none()
    });
    writer.wait_answered(writer.answered() + 100);
    assert_eq!(sessions(&cluster, "filer-a"), before, "filer-a had to connect again");
    assert_eq!(on_hub(&cluster, "filer-a").as_deref(), Some("in-sync"));
    let known = writer.finish();
    cluster.checkpoint("filer-a");
    known.check_export(&socket(&cluster, "hub"), "filer-a/vol0").expect("every write");
}

/// A source is added by its file, changed, taken away and put back; its image stays readable all the
/// time, until it is forgotten by name.
#[test]
#[expect(clippy::too_many_lines, reason = "one story, told in its order")]
fn a_source_comes_and_goes_by_its_file() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new("filer-a")]);
    let file = file_of(&cluster, "filer-a");
    let text = fs::read_to_string(&file).expect("the file");
    fs::remove_file(&file).expect("removed");
    cluster.start_hub();
    assert_eq!(on_hub(&cluster, "filer-a"), None);
    cluster.start_source("filer-a");
    // As an editor does it: written beside, then renamed.
    let beside = file.with_extension("toml.tmp");
    fs::write(&beside, &text).expect("the draft");
    fs::rename(&beside, &file).expect("renamed");
    let begin = Instant::now();
    wait_for("the source is added", SOON * 2, || on_hub(&cluster, "filer-a").is_some());
    println!("added after {:?}", begin.elapsed());
    cluster.wait_in_sync("filer-a");
    let writer =
        Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", Known::default(), 8, 0xadd);
    writer.wait_answered(200);
    let known = writer.finish();
    cluster.checkpoint("filer-a");
    let hub_socket = socket(&cluster, "hub");
    known.check_export(&hub_socket, "filer-a/vol0").expect("the image");
    const SERIES: &str = "source=\"filer-a\"";
    let (_, scraped) = http_get(&cluster.hub_url("/metrics"));
    // Taken away: retired, its image stays; also over a restart of the hub.
    fs::remove_file(&file).expect("removed");
    wait_for("it is retired", LIMIT, || on_hub(&cluster, "filer-a").as_deref() == Some("retired"));
    known.check_export(&hub_socket, "filer-a/vol0").expect("the image of a retired source");
    // At the first scrape behind it, its series are gone: nothing else sets them meanwhile.
    assert!(scraped.contains(SERIES), "{scraped}");
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    assert!(!page.contains(SERIES) && page.contains("mirrorhub_build_info"), "{page}");
    assert_eq!(cluster.hub_status()["health"]["word"], "ok");
    cluster.stop_hub();
    cluster.start_hub();
    assert_eq!(on_hub(&cluster, "filer-a").as_deref(), Some("retired"));
    known.check_export(&hub_socket, "filer-a/vol0").expect("after a restart as well");
    // Put back: it goes on where it was.
    fs::write(&file, &text).expect("put back");
    cluster.wait_in_sync("filer-a");
    let before = cluster.on_hub("filer-a")["applied_cp"].as_u64();
    assert!(before > Some(0), "its image is the one it had");
    // Not enabled is the same as away.
    fs::write(&file, format!("{text}enabled = false\n")).expect("changed");
    wait_for("it may not connect", LIMIT, || {
        on_hub(&cluster, "filer-a").as_deref() == Some("retired")
    });
    let forget = |cluster: &Cluster, more: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(["forget", "filer-a"]).args(more).arg("--config").arg(cluster.hub_config());
        try_run(&mut command)
    };
    assert_eq!(forget(&cluster, &[]).status.code(), Some(2), "nobody confirms it");
    fs::write(&file, &text).expect("enabled again");
    cluster.wait_in_sync("filer-a");
    assert_eq!(forget(&cluster, &["--yes"]).status.code(), Some(1), "it has a file");
    fs::remove_file(&file).expect("removed");
    wait_for("it is retired again", LIMIT, || {
        on_hub(&cluster, "filer-a").as_deref() == Some("retired")
    });
    let used = |cluster: &Cluster| cluster.hub_status()["pool"]["used_bytes"].as_u64();
    let before = used(&cluster);
    run(Command::new(BINARY)
        .args(["forget", "filer-a", "--yes", "--config"])
        .arg(cluster.hub_config()));
    assert_eq!(on_hub(&cluster, "filer-a"), None);
    assert!(used(&cluster) < before, "its blocks are free again");
    assert!(known.check_export(&hub_socket, "filer-a/vol0").is_err(), "nothing is served");
    cluster.stop_hub();
    cluster.start_hub();
    assert_eq!(on_hub(&cluster, "filer-a"), None, "nothing comes back");
    // The filer has gone on meanwhile; what it has comes anew, all of it.
    fs::write(&file, &text).expect("the file of a source that was forgotten");
    cluster.wait_in_sync("filer-a");
    cluster.checkpoint("filer-a");
    known.check_export(&hub_socket, "filer-a/vol0").expect("its image is made anew");
}

/// Half a file is not taken for the whole: what stands in it so far would be right as it is.
#[test]
fn a_file_that_is_being_written_is_not_read() {
    use std::io::Write;
    let mut cluster = Cluster::prepare(&[SourceSettings::new("filer-a")]);
    cluster.start_all();
    let file = file_of(&cluster, "slow");
    let mut open = fs::File::create(&file).expect("the file");
    open.write_all(b"name = \"slow\"\n").expect("the first line");
    // Another file shows that the directory was read meanwhile.
    fs::write(file_of(&cluster, "quick"), "name = \"quick\"\n").expect("the other file");
    wait_for("the other one is there", LIMIT, || on_hub(&cluster, "quick").is_some());
    assert_eq!(on_hub(&cluster, "slow"), None, "half a file was taken");
    open.write_all(b"enabled = false\n").expect("the second line");
    drop(open);
    fs::write(file_of(&cluster, "third"), "name = \"third\"\n").expect("another");
    wait_for("the third is there", LIMIT, || on_hub(&cluster, "third").is_some());
    assert_eq!(on_hub(&cluster, "slow"), None, "it is not enabled");
    assert!(status(&cluster.hub_config()).expect("status").get("config").is_none());
}

/// `onboard` writes the file that the running hub takes, once.
#[test]
fn onboard_writes_the_file_and_the_hub_takes_it() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new("filer-a")]);
    let file = file_of(&cluster, "filer-a");
    fs::remove_file(&file).expect("removed");
    cluster.start_hub();
    let onboard = |cluster: &Cluster| {
        try_run(
            Command::new(BINARY)
                .args(["onboard", "filer-a", "--volume", "vol0=64MiB", "--config"])
                .arg(cluster.hub_config()),
        )
    };
    let said = onboard(&cluster);
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.status.success() && text.contains("On the filer write source.toml"), "{text}");
    wait_for("the hub takes it", SOON * 2, || on_hub(&cluster, "filer-a").is_some());
    cluster.start_source("filer-a");
    cluster.wait_in_sync("filer-a");
    assert_eq!(onboard(&cluster).status.code(), Some(2), "it is there already");
}
