//! The runbook of docs/operations.md: the commands of failover and failback in the order in which it has
//! them, against real processes, and what they print held against what it shows.
//!
//! Numbers, sizes, times and ids differ from run to run and are masked; of a table the source and its
//! state count. The document shows parts of long outputs: its lines must come in its order.

use std::collections::VecDeque;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::failover::{failing, open};
use crate::harness::oracle::content;
use crate::harness::{BINARY, Cluster, SourceSettings, done, run, status, try_run, wait_for};
use crate::outage::socket;

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(60);

/// A command of the document, and the lines that it shows of its output.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown {
    command: String,
    lines: Vec<String>,
}

/// The commands of that section, in their order.
fn commands(text: &str, section: &str) -> VecDeque<Shown> {
    let (_, rest) = text.split_once(&format!("# {section}\n")).expect("the section");
    let rest = rest.split("\n#").next().expect("its text");
    let mut all = VecDeque::<Shown>::new();
    for block in rest.split("```text\n").skip(1) {
        let block = block.split("```").next().expect("its end");
        for line in block.lines().filter(|line| !line.trim().is_empty()) {
            match (line.strip_prefix("$ "), all.back_mut()) {
                (Some(command), _) => {
                    all.push_back(Shown { command: command.to_owned(), lines: Vec::new() });
                }
                (None, Some(shown)) => shown.lines.push(line.to_owned()),
                (None, None) => {}
            }
        }
    }
    all
}

fn document() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    std::fs::read_to_string(file).expect("docs/operations.md")
}

/// A line without what differs from run to run.
fn masked(line: &str) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "s", "ms"];
    let mut words = Vec::<String>::new();
    let mut row = false;
    for word in line.split_whitespace() {
        let after_number = words.last().is_some_and(|last| last.as_str() == "#");
        if after_number && units.contains(&word.trim_end_matches([',', ';'])) {
            continue;
        }
        row |= ["✖", "▲", "●"].contains(&word) && words.len() == 1;
        words.push(masked_word(word));
    }
    if row {
        words.truncate(3);
    }
    words.join(" ")
}

fn masked_word(word: &str) -> String {
    if word.len() >= 32 && word.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return "#".to_owned();
    }
    let mut out = String::new();
    let mut letters = word.chars().peekable();
    while let Some(letter) = letters.next() {
        if !letter.is_ascii_digit() {
            out.push(letter);
            continue;
        }
        while letters.next_if(|next| next.is_ascii_digit() || *next == '.').is_some() {}
        out.push('#');
    }
    out
}

/// The first line of the document that the output has not, behind those before it.
fn missing<'a>(shown: &'a Shown, output: &str) -> Option<&'a str> {
    let mut lines = output.lines().map(masked);
    let mut wanted = shown.lines.iter();
    wanted.find(|wanted| !lines.any(|line| line == masked(wanted))).map(String::as_str)
}

/// Runs the next command of the document, which must begin so.
fn next(cluster: &Cluster, commands: &mut VecDeque<Shown>, begins: &str) {
    let shown = commands.pop_front().unwrap_or_else(|| panic!("{begins:?} is not in the document"));
    assert!(shown.command.starts_with(begins), "{:?} instead of {begins:?}", shown.command);
    let socket = |owner: &str| format!("nbd+unix:///?socket={}", socket(cluster, owner).display());
    let line = shown
        .command
        .replace("source-of-filer-b.toml", "filer-b/source.toml")
        .replace(" source.toml", " filer-a/source.toml")
        .replace(" hub.toml", " hub/hub.toml")
        .replace("nbd://HUB:10810", &format!("'{}'", socket("hub")))
        .replace("nbd://FILER-B:10810", &format!("'{}'", socket("filer-b")));
    let programs = Path::new(BINARY).parent().expect("a directory").display();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("sh");
    command.arg("-c").arg(&line).current_dir(cluster.dir.path());
    command.env("PATH", format!("{programs}:{path}"));
    let output = try_run(&mut command);
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    println!("$ {line}\n{text}");
    let fails = shown.lines.iter().any(|line| line.starts_with("error: "));
    assert_eq!(output.status.success(), !fails, "{line}: {text}");
    if let Some(wanted) = missing(&shown, &text) {
        panic!("docs/operations.md, `{}`: it shows\n{wanted}\nof\n{text}", shown.command);
    }
}

fn cluster(more: &[SourceSettings]) -> Cluster {
    let mut all = vec![failing("continue").pool("256MiB").nvram("16MiB")];
    all.extend_from_slice(more);
    let mut cluster = Cluster::prepare_with(&all, "32MiB", "512MiB");
    cluster.start_all();
    cluster
}

/// Blocks of the volume at that end get another version.
fn write(cluster: &Cluster, owner: &str, blocks: std::ops::Range<u64>, version: u64) {
    let mut client = open(&socket(cluster, owner), EXPORT);
    for block in blocks {
        client.write(block * 4096, &content(block, version)).expect("a write");
    }
}

fn wait_own(cluster: &Cluster, what: &str, done: impl Fn(&Value) -> bool) {
    let config = cluster.source_config(NAME);
    wait_for(&format!("{NAME} {what}"), LIMIT, || {
        status(&config).is_some_and(|shown| done(&shown["source"]))
    });
}

fn says(own: &Value, what: &str) -> bool {
    own["reason"].as_str().is_some_and(|reason| reason.contains(what))
}

/// The sections "A filer is gone", "The filer comes back" and "Both sides have written".
#[test]
fn failover_and_failback_print_what_the_runbook_shows() {
    let text = document();
    let mut cluster = cluster(&[]);
    write(&cluster, NAME, 0..20, 1);
    cluster.checkpoint(NAME);
    write(&cluster, NAME, 0..20, 2);
    cluster.kill_source(NAME);
    let mut gone = commands(&text, "A filer is gone: failover");
    next(&cluster, &mut gone, "mirrorhub failover filer-a --dry-run");
    next(&cluster, &mut gone, "mirrorhub failover filer-a");
    next(&cluster, &mut gone, "nbdinfo --list");

    write(&cluster, "hub", 0..3, 3);
    cluster.start_source(NAME);
    wait_own(&cluster, "follows", |own| says(own, "its hub knows that it is here"));
    let mut back = commands(&text, "The filer comes back");
    next(&cluster, &mut back, "mirrorhub status --config source.toml");
    next(&cluster, &mut back, "mirrorhub failback filer-a");
    assert_eq!(back, [], "not run");
    cluster.wait_in_sync(NAME);

    cluster.kill_hub();
    wait_own(&cluster, "is alone", |own| own["alone_since"].is_object());
    write(&cluster, NAME, 5..7, 4);
    cluster.kill_source(NAME);
    cluster.start_hub();
    done(&cluster.hub_config(), &["failover", NAME, "--now"]);
    write(&cluster, "hub", 6..7, 5);
    cluster.start_source(NAME);
    wait_own(&cluster, "follows", |own| says(own, "its hub knows that it is here"));
    let mut both = commands(&text, "Both sides have written");
    next(&cluster, &mut both, "mirrorhub failback filer-a --config");
    next(&cluster, &mut both, "mirrorhub failback filer-a --keep source --dry-run");
    next(&cluster, &mut both, "mirrorhub failback filer-a --keep source");
    next(&cluster, &mut both, "mirrorhub kept filer-a");
    assert_eq!(both, [], "not run");
    cluster.wait_in_sync(NAME);
    run(Command::new(BINARY).args(["verify", NAME, "--config"]).arg(cluster.hub_config()));
}

/// The section "The filer does not come back".
#[test]
fn another_home_is_found_as_the_runbook_shows() {
    let text = document();
    let other = SourceSettings::new("filer-b").pool("256MiB").nvram("16MiB");
    let mut cluster = cluster(&[other]);
    write(&cluster, NAME, 0..20, 1);
    cluster.checkpoint(NAME);
    cluster.kill_source(NAME);
    let hub = cluster.hub_config();
    done(&hub, &["failover", NAME, "--now"]);
    std::fs::remove_dir_all(cluster.path("filer-a/state")).expect("the filer is lost");
    cluster.start_source(NAME);
    wait_own(&cluster, "is new", |own| says(own, "its hub knows that it is here"));
    let mut lost = commands(&text, "The filer does not come back");
    next(&cluster, &mut lost, "mirrorhub status --config source.toml");
    next(&cluster, &mut lost, "mirrorhub failback filer-a --config");
    cluster.wait_in_sync(NAME);

    cluster.kill_source(NAME);
    done(&hub, &["failover", NAME, "--now"]);
    next(&cluster, &mut lost, "mirrorhub failback filer-a --to filer-b");
    wait_for("it is in sync there", LIMIT, || {
        let shown = status(&cluster.source_config("filer-b"));
        shown.is_some_and(|shown| shown["homes"][0]["state"] == "in-sync")
    });
    next(&cluster, &mut lost, "mirrorhub status --config source-of-filer-b.toml");
    next(&cluster, &mut lost, "nbdinfo --list");
    assert_eq!(lost, [], "not run");
}

/// The negative control: another word, a line too many and another order are seen; other figures are not.
#[test]
fn control_a_document_that_differs_is_seen() {
    let text =
        "## One\n\n```text\n$ mirrorhub x\na: CP 7 in 1.5 s, 2.0 MiB\n  next: go\n```\n## Two\n";
    let one = commands(text, "One");
    let shown = one.front().expect("a command");
    assert_eq!((one.len(), shown.command.as_str()), (1, "mirrorhub x"));
    assert_eq!(missing(shown, "first\na: CP 12 in 380 ms, 8 B\n  next: go\n"), None);
    assert_eq!(missing(shown, "a: CP 7 in 1.5 s, 2.0 MiB\n"), Some("  next: go"));
    assert!(missing(shown, "  next: go\na: CP 7 in 1.5 s, 2.0 MiB\n").is_some(), "the order");
    assert!(missing(shown, "a: CP seven in 1.5 s, 2.0 MiB\n  next: go\n").is_some());
    assert!(missing(shown, "a: CP 7 in 1.5 s, 2.0 MiB\n  next: stay\n").is_some());
    let row = "filer-a  ✖ fenced   -";
    assert_eq!(masked(row), masked("filer-a  ✖ fenced  12  0 s  4.0 KiB"));
    assert_ne!(masked(row), masked("filer-a  ✖ faulted  -"));
}
