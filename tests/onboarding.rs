//! Real processes: sources come, change and go by their files while the others work.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::oracle::{Known, Writer};
use crate::harness::windows::Bystander;
use crate::harness::{
    BINARY, Cluster, Process, SourceSettings, done, http_get, pause, run, status, try_run, wait_for,
};
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

/// One quiet and one disturbed window at least: a file comes and goes in that time.
const WINDOW: Duration = Duration::from_millis(800);
/// Pairs of windows in a round.
const ROUNDS: usize = 2;
/// Longest that one write of a bystander may wait for others' files to be taken: it is no pause of the traffic.
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// Lines of the hub's log with these words.
fn said(cluster: &Cluster, words: &str) -> usize {
    fs::read_to_string(cluster.path("hub.log")).unwrap_or_default().matches(words).count()
}

/// Waits for `done`, looking often and at a small cost: what is measured beside it is another's.
fn soon(what: &str, mut done: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < SOON, "{what}: not within {SOON:?}");
        pause(Duration::from_millis(25));
    }
    begin.elapsed()
}

/// 200 files, one in four of them wrong: their names, texts, and of the wrong ones the line of the mistake.
fn two_hundred() -> Vec<(String, String, Option<Option<u64>>)> {
    let one = |number: usize| {
        let name = format!("new-{number:03}");
        if number % 4 == 3 {
            let (text, line) = broken(&name, number / 4);
            return (name, text, Some(line));
        }
        let text = format!("name = \"{name}\"\n");
        (name, text, None)
    };
    (0..200).map(one).collect()
}

/// One file comes, and goes again, in each disturbed window: rate and p99 of a bystander stay within the bound.
fn comes_and_goes(cluster: &Cluster, bystander: &mut Bystander) {
    let file = file_of(cluster, "one-more");
    let one = |words: &str, change: &dyn Fn()| {
        let before = said(cluster, words);
        change();
        soon(words, || said(cluster, words) == before + 1);
    };
    bystander.endures("a file that comes and goes", |bystander| {
        for _ in 0..ROUNDS {
            bystander.quiet(|| pause(WINDOW));
            bystander.disturbed(|| {
                let begin = Instant::now();
                one("source added by its file", &|| {
                    fs::write(&file, "name = \"one-more\"\n").expect("a source's file");
                });
                one("source retired by its file", &|| fs::remove_file(&file).expect("removed"));
                pause(WINDOW.saturating_sub(begin.elapsed()));
            });
        }
    });
}

/// All files are dropped in, taken away and dropped in again while a bystander works: it never stands.
fn drops(
    cluster: &Cluster,
    bystander: &mut Bystander,
    files: &[(String, String, Option<Option<u64>>)],
) {
    let drop_in = || {
        let before = said(cluster, "source added by its file");
        for (name, text, _) in files {
            fs::write(file_of(cluster, name), text).expect("a source's file");
        }
        let all = || said(cluster, "source added by its file") == before + 150;
        let taken = soon("150 of 200 files are taken", all);
        println!("150 of 200 sources after {taken:?}");
    };
    bystander.disturbed(drop_in);
    bystander.quiet(|| pause(WINDOW));
    bystander.disturbed(|| {
        let before = said(cluster, "source retired by its file");
        for (name, _, _) in files {
            fs::remove_file(file_of(cluster, name)).expect("removed");
        }
        let all = || said(cluster, "source retired by its file") == before + 150;
        soon("150 of 200 are retired", all);
    });
    bystander.quiet(|| pause(WINDOW));
    bystander.disturbed(drop_in);
    let (quiet, disturbed) = (bystander.longest(false), bystander.longest(true));
    println!("longest write: {quiet:?} quiet, {disturbed:?} beside the files");
    assert!(disturbed <= PAUSE_MAX.max(quiet * 2), "the traffic paused for {disturbed:?}");
}

/// Goal: of 200 files dropped in at once 150 run within two seconds, 50 broken ones are each named
/// with line and fix, and the traffic of the others goes on: no reconnect, no pause; beside one file that
/// comes and goes their rate and p99 are within the bound of quiet windows in between. Method: one real source
/// with two volumes, a bystander on one of them; the files are written by a loop, as a configuration tool does.
#[test]
fn two_hundred_files_at_once_and_fifty_of_them_wrong() {
    let settings = SourceSettings::new("filer-a").volumes(&[("vol0", "64MiB"), ("vol1", "64MiB")]);
    let mut cluster = Cluster::prepare_with(&[settings], "832MiB", "2GiB");
    cluster.start_all();
    let before = sessions(&cluster, "filer-a");
    let files = two_hundred();
    let mut bystander = Bystander::start(&socket(&cluster, "filer-a"), "filer-a/vol1");
    comes_and_goes(&cluster, &mut bystander);
    drops(&cluster, &mut bystander, &files);
    drop(bystander);
    let writer =
        Writer::start(socket(&cluster, "filer-a"), "filer-a/vol0", Known::default(), 8, 0xf11e);
    writer.wait_answered(100);
    let mut document = cluster.hub_status();
    let all = document["sources"].as_array().expect("sources");
    let run = all.iter().filter(|source| source["state"] == "waiting").count();
    assert_eq!(run, 150);
    let wrong: Vec<_> = files.iter().filter_map(|(name, _, line)| Some((name, (*line)?))).collect();
    let problems = document["config"]["problems"].as_array().expect("problems");
    assert_eq!(wrong.len(), 50);
    for &(name, line) in &wrong {
        let file = format!("{name}.toml");
        let own: Vec<&Value> = problems
            .iter()
            .filter(|one| one["file"].as_str().is_some_and(|path| path.ends_with(&file)))
            .collect();
        assert!(!own.is_empty(), "{name} is not named");
        assert!(own.iter().any(|one| one["line"].as_u64() == line), "{name}: {own:?}");
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
        // The one that came and went is retired.
        let run = all.iter().filter(|source| source["state"] != "retired").count();
        run == 201 && document.get("config").is_none()
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
    let added = || said(&cluster, "source added by its file source=filer-a") == 1;
    println!("added after {:?}", soon("the source is added", added));
    assert!(on_hub(&cluster, "filer-a").is_some());
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
    // Nor the filer, with what it had: it is told why, and what to do.
    fs::write(&file, &text).expect("the file of a source that was forgotten");
    wait_for("it is told so", LIMIT, || {
        let own = cluster.own_status("filer-a").to_string();
        own.contains("it was forgotten there") && own.contains("onboard one with another name")
    });
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
    // Who keeps it open for long is told of, and the file is not taken all the same.
    let told = |text: &str| text.contains("slow.toml") && text.contains("open for writing");
    wait_for("it is told that it stays open", LIMIT, || told(&cluster.hub_status().to_string()));
    assert_eq!(on_hub(&cluster, "slow"), None, "half a file was taken");
    let diff = try_run(
        Command::new(BINARY).args(["config", "diff", "--config"]).arg(cluster.hub_config()),
    );
    assert!(told(&String::from_utf8_lossy(&diff.stdout)), "{diff:?}");
    let check = || done(&cluster.hub_config(), &["config", "check"]);
    assert!(told(&check()), "{}", check());
    let log = fs::read_to_string(cluster.path("hub.log")).expect("the log");
    let lines = log.lines().filter(|line| line.contains("configuration refused") && told(line));
    assert_eq!(lines.count(), 1, "the log has it once: {log}");
    open.write_all(b"enabled = false\n").expect("the second line");
    drop(open);
    fs::write(file_of(&cluster, "third"), "name = \"third\"\n").expect("another");
    wait_for("the third is there", LIMIT, || on_hub(&cluster, "third").is_some());
    assert_eq!(on_hub(&cluster, "slow"), None, "it is not enabled");
    // Closed, it is as any other: nothing is said of it any more.
    assert!(status(&cluster.hub_config()).expect("status").get("config").is_none());
    assert!(!told(&check()), "{}", check());
}

/// Holds a file so that nobody can open it for the time of `fs.lease-break-time`, 45 s by default.
const LEASE: &str = "
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(os.open(sys.argv[1], os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('held', flush=True)
time.sleep(600)
";

/// Goal: a stop waits for no file that cannot be read at this moment, and status answers meanwhile. Method: a
/// file on which somebody has a lease, whose opening the kernel holds up, as a file server does that does not
/// answer. Control: the reading is under way when the process is told, and has been for longer than one takes.
#[test]
fn a_stop_waits_for_no_reading_of_files() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new("filer-a")]);
    cluster.start_hub();
    let beside = cluster.path("hub/hangs.toml");
    fs::write(&beside, "name = \"hangs\"\n").expect("the file");
    let mut command = Command::new("python3");
    command.args(["-c", LEASE]).arg(&beside);
    let mut holder = Process::start("holder", cluster.path("holder.log"), &mut command);
    wait_for("the lease is held", LIMIT, || holder.output().contains("held"));
    fs::rename(&beside, file_of(&cluster, "hangs")).expect("renamed");
    let threads = PathBuf::from(format!("/proc/{}/task", cluster.hub_process().id()));
    let reads = || {
        let all = fs::read_dir(&threads).expect("threads").flatten();
        let name = |one: fs::DirEntry| fs::read_to_string(one.path().join("comm"));
        all.filter_map(|one| name(one).ok()).any(|name| name.trim() == "reload")
    };
    wait_for("the files are being read", LIMIT, reads);
    pause(Duration::from_millis(500));
    assert!(reads(), "nothing hangs");
    assert_eq!(on_hub(&cluster, "filer-a").as_deref(), Some("waiting"), "status answers meanwhile");
    let begin = Instant::now();
    assert!(cluster.stop_hub().success());
    assert!(begin.elapsed() < Duration::from_secs(5), "it took {:?}", begin.elapsed());
    assert!(holder.runs(), "the lease was given up");
    holder.kill();
}

/// `onboard` writes the file that the running hub takes, once; and nothing, where the hub has no room for it.
#[test]
fn onboard_writes_the_file_and_the_hub_takes_it() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new("filer-a")]);
    let file = file_of(&cluster, "filer-a");
    fs::remove_file(&file).expect("removed");
    cluster.start_hub();
    let hub = cluster.hub_config();
    let onboard = |name: &str, more: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(["onboard", name]).args(more).arg("--config").arg(&hub);
        let said = try_run(&mut command);
        let text = [said.stdout, said.stderr].concat();
        (said.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    let small = ["--volume", "vol0=64MiB"];
    let (code, text) = onboard("filer-a", &small);
    assert!(code == Some(0) && text.contains("On the filer write source.toml"), "{text}");
    soon("the hub takes it", || on_hub(&cluster, "filer-a").is_some());
    cluster.start_source("filer-a");
    cluster.wait_in_sync("filer-a");
    assert_eq!(onboard("filer-a", &small).0, Some(2), "it is there already");
    // 64 MiB are taken of 2 GiB: what fits with a tenth more, and what is more than that.
    let pool = |size: &str| onboard("filer-b", &["--volume", &format!("v={size}")]);
    let refused = |(code, text): (Option<i32>, String), words: &[&str]| {
        let all = words.iter().all(|word| text.contains(word));
        assert!(code == Some(78) && all, "{code:?} without one of {words:?}: {text}");
        let there = fs::read_dir(file.parent().expect("a directory")).expect("files").count();
        assert_eq!(there, 1, "something was written");
    };
    let room = ["--volume", "v=1GiB", "--log-limit", "1024TiB"];
    refused(onboard("filer-b", &room), &["log.dir", "log_limit"]);
    let (code, text) = pool("1797MiB");
    assert!(code == Some(0) && !text.contains("note: "), "{text}");
    soon("the hub takes it", || on_hub(&cluster, "filer-b").is_some());
    fs::remove_file(file_of(&cluster, "filer-b")).expect("removed");
    let (code, text) = pool("1800MiB");
    assert!(code == Some(0) && text.contains("note: thin: ") && text.contains("91%"), "{text}");
    wait_for("status shows the ratio", LIMIT, || {
        done(&hub, &["status"]).contains("1.8 GiB of volumes in files of sources")
    });
    wait_for("the log says so", LIMIT, || said(&cluster, "larger than the pool") == 1);
    let health = cluster.hub_status()["health"].to_string();
    assert!(health.contains("word") && !health.contains("pool"), "it is allowed: {health}");
    fs::remove_file(file_of(&cluster, "filer-b")).expect("removed");
    // A guarantee of the ring is waived by nothing, and holds for a file that is dropped in as well.
    fs::write(&file, "name = \"filer-a\"\nnvram_share = \"60MiB\"\n").expect("the file");
    let tiny = ["--volume", "v=1MiB"];
    assert_eq!(onboard("filer-b", &tiny).0, Some(0), "just fits");
    fs::remove_file(file_of(&cluster, "filer-b")).expect("removed");
    fs::write(&file, "name = \"filer-a\"\nnvram_share = \"61MiB\"\n").expect("the file");
    refused(onboard("filer-b", &tiny), &["nvram.size", "65MiB", "64MiB", "lower nvram_share"]);
    fs::write(file_of(&cluster, "filer-b"), "name = \"filer-b\"\n").expect("dropped in");
    wait_for("it is refused and shown", LIMIT, || {
        let shown = cluster.hub_status()["config"]["problems"].to_string();
        shown.contains("filer-b.toml") && shown.contains("raise nvram.size")
    });
    cluster.wait_in_sync("filer-a");
}
