//! A hub of 300 sources (`MIRRORHUB_FULL=1`; else 20) that speak the real wire, looked at while they
//! write: metrics, the page, `top` and `status` answer in time and within their size, and what
//! `status` says of each source is held against the bytes that the source itself has counted.
//!
//! The sources are those of `cargo bench --bench fleet`.

#[expect(dead_code, unreachable_pub, reason = "the bench uses all of it")]
#[path = "../benches/filers/mod.rs"]
mod filers;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use mirrorhub::units::BLOCK_BYTES_U64;
use serde_json::Value;

use self::filers::{Fleet, Load, Phase};
use crate::harness::terminal::before_terminal;
use crate::harness::{BINARY, Cluster, http_get, is_full, run, status, wait_for};

const LIMIT: Duration = Duration::from_secs(240);
/// Of section 13, for 300 sources.
const SCRAPE_MAX: Duration = Duration::from_millis(250);
const LOOK_MAX: Duration = Duration::from_secs(1);
const SCRAPE_BYTES_MAX: usize = 5_000_000;
const SOURCE_SERIES_MAX: usize = 25;
const VOLUME_SERIES_MAX: usize = 5;
/// Blocks of each volume: the fewest that the simulated sources take.
const BLOCKS: u64 = 256;

/// Runs the arguments in a terminal; prints how long it took until the words of the first one were shown,
/// ends it by its key.
const FIRST_SHOWN: &str = r#"
begun = time.monotonic()
begin(50, 160, sys.argv[2:])
read(sys.argv[1].encode())
print(time.monotonic() - begun)
os.write(ours, b"q")
read(b"\x1b[?1049l")
sys.exit(ended())
"#;

/// The steps of the ladder as the status document names them, first to last.
const LADDER: [&str; 5] =
    ["acknowledged_bytes", "staged_bytes", "drained_bytes", "applied_bytes", "visible_bytes"];

fn ladder(source: &Value) -> [u64; 5] {
    LADDER.map(|step| source[step].as_u64().unwrap_or_else(|| panic!("no {step}: {source}")))
}

/// What is wrong with what a document says of the sources: `right` judges the ladder of each, given
/// its place; each source is there once.
fn wrong(
    document: &Value,
    count: usize,
    mut right: impl FnMut(usize, [u64; 5]) -> bool,
) -> Vec<String> {
    let sources = document["sources"].as_array().expect("sources");
    let named = |name: &str| sources.iter().filter(|source| source["name"] == name).collect();
    let judged = (0..count).filter_map(|at| {
        let name = filers::name(at);
        let found: Vec<&Value> = named(&name);
        let [source] = found[..] else { return Some(format!("{name}: {} times", found.len())) };
        let steps = ladder(source);
        let falls = steps.is_sorted_by(|before, after| before >= after);
        (!falls || !right(at, steps)).then(|| format!("{name}: {steps:?}"))
    });
    let mut wrong: Vec<String> = judged.collect();
    if sources.len() != count {
        wrong.push(format!("{} sources of {count}", sources.len()));
    }
    wrong
}

/// Everything is quiet: each step is what the sources have counted.
fn wrong_at_rest(document: &Value, tallies: &[(u64, u64)]) -> Vec<String> {
    wrong(document, tallies.len(), |at, steps| {
        let (formed, acknowledged) = tallies[at];
        formed == acknowledged && steps == [acknowledged; 5]
    })
}

/// Under way: at least what was acknowledged before the question, at most what was formed by the answer.
fn wrong_under_way(document: &Value, before: &[(u64, u64)], after: &[(u64, u64)]) -> Vec<String> {
    wrong(document, before.len(), |at, [acknowledged, ..]| {
        (before[at].1..=after[at].0).contains(&acknowledged)
    })
}

/// Sources and volumes with more series than they may have.
pub(crate) fn crowded(page: &str) -> Vec<String> {
    let mut counts = BTreeMap::<String, usize>::new();
    let value = |line: &str, label: &str| {
        let (_, rest) = line.split_once(&format!("{label}=\""))?;
        Some(rest.split_once('"')?.0.to_owned())
    };
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some(source) = value(line, "source") else { continue };
        let of = match value(line, "volume") {
            Some(volume) => format!("{source}/{volume}"),
            None => source,
        };
        *counts.entry(of).or_default() += 1;
    }
    let most = |of: &str| if of.contains('/') { VOLUME_SERIES_MAX } else { SOURCE_SERIES_MAX };
    assert!(!counts.is_empty(), "no series of any source");
    let over = counts.into_iter().filter(|(of, count)| *count > most(of));
    over.map(|(of, count)| format!("{of}: {count} series")).collect()
}

/// The middle of five.
fn middle(mut once: impl FnMut() -> Duration) -> Duration {
    let mut times: Vec<Duration> = (0..5).map(|_| once()).collect();
    times.sort_unstable();
    times[2]
}

fn fetch(url: &str) -> (Duration, String) {
    let begin = Instant::now();
    let (code, body) = http_get(url);
    assert_eq!(code, "HTTP/1.1 200 OK", "{url}");
    (begin.elapsed(), body)
}

/// The first event of the page's stream.
fn first_event(url: &str) -> (Duration, String) {
    let (address, path) =
        url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).expect("a URL");
    let begin = Instant::now();
    let mut stream = TcpStream::connect(address).expect("the page's port");
    stream.set_read_timeout(Some(LIMIT)).expect("timeout");
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sent");
    let mut lines = BufReader::new(stream).lines();
    let data =
        lines.find_map(|line| line.expect("an event").strip_prefix("data:").map(str::to_owned));
    (begin.elapsed(), data.expect("data"))
}

/// What each look took, by its name; every one of them within its time and size.
fn look(cluster: &Cluster, count: usize) -> Vec<(&'static str, Duration)> {
    let mut took = Vec::new();
    let mut within = |name, most: Duration, once: &mut dyn FnMut() -> Duration| {
        let time = middle(once);
        assert!(time < most, "{name}: {time:?} with {count} sources");
        took.push((name, time));
    };
    let mut page = String::new();
    within("/metrics", SCRAPE_MAX, &mut || {
        let time;
        (time, page) = fetch(&cluster.hub_url("/metrics"));
        time
    });
    let bytes_max = SCRAPE_BYTES_MAX * count / 300;
    assert!(page.len() < bytes_max, "/metrics: {} bytes with {count} sources", page.len());
    assert_eq!(crowded(&page), Vec::<String>::new());
    for path in ["/", "/page.js", "/page.css", "/api/v1/status", "/api/v1/history"] {
        within(path, LOOK_MAX, &mut || fetch(&cluster.hub_url(path)).0);
    }
    within("/api/v1/live", LOOK_MAX, &mut || {
        let (time, news) = first_event(&cluster.hub_url("/api/v1/live"));
        assert_eq!(news.matches("\"name\":\"filer-").count(), count, "rows of the page");
        time
    });
    within("top", LOOK_MAX, &mut || {
        let mut terminal = before_terminal(&cluster.path("terminal.py"), FIRST_SHOWN);
        terminal.arg(format!("{count} sources")).args([BINARY, "top", "--config"]);
        let said = run(terminal.arg(cluster.hub_config()));
        let seconds = String::from_utf8_lossy(&said.stdout).trim().parse().expect("seconds");
        Duration::from_secs_f64(seconds)
    });
    took
}

/// The negative controls: a count that is off by one block, a ladder that rises, a source that is not
/// there, one series too many.
fn controls(document: &Value, tallies: &[(u64, u64)], page: &str) {
    let mut more = tallies.to_vec();
    (more[3].0, more[3].1) = (more[3].0 + BLOCK_BYTES_U64, more[3].1 + BLOCK_BYTES_U64);
    let noticed = wrong_at_rest(document, &more);
    assert!(noticed.len() == 1 && noticed[0].starts_with("filer-00003"), "{noticed:?}");
    assert_eq!(wrong_under_way(document, &more, &more).len(), 1, "acknowledged, and not counted");
    let mut less = tallies.to_vec();
    less[3].0 -= BLOCK_BYTES_U64;
    assert_eq!(wrong_under_way(document, tallies, &less).len(), 1, "counted, and never written");
    let mut rising = document.clone();
    rising["sources"][1]["drained_bytes"] = (tallies[1].1 + 1).into();
    assert_eq!(wrong_under_way(&rising, tallies, tallies).len(), 1, "drained before staged");
    let mut fewer = document.clone();
    fewer["sources"].as_array_mut().expect("sources").pop();
    assert_eq!(wrong_at_rest(&fewer, tallies).len(), 2, "a source that is not there");
    let series = |label: &str, most: usize| {
        let line = |at| format!("mirrorhub_more_{at}{{source=\"filer-00000\"{label}}} 1\n");
        let lines = (0..most).map(line).collect::<String>();
        crowded(&format!("{page}{lines}")).len()
    };
    assert_eq!(series("", SOURCE_SERIES_MAX), 1, "a source with more series is noticed");
    assert_eq!(series(",volume=\"vol0\"", VOLUME_SERIES_MAX), 1, "so is a volume");
}

/// Goal: hundreds of sources do not make the hub's answers late or large, and none of its counts is
/// off by one write.
/// Method: all write at their rate; looked at meanwhile, and when all is published.
#[test]
fn a_crowd_of_sources_is_told_of_exactly_and_in_time() {
    let (count, writes) = if is_full() { (300, 100) } else { (20, 5) };
    let (nvram, pool) = if is_full() { ("1536MiB", "3GiB") } else { ("96MiB", "512MiB") };
    let mut cluster = Cluster::prepare_with(&[], nvram, pool);
    let config = cluster.hub_config();
    for at in 0..count {
        let name = filers::name(at);
        let file = cluster.path(&format!("hub/sources.d/{name}.toml"));
        fs::write(file, format!("name = \"{name}\"\n")).expect("a source's file");
    }
    cluster.spawn_hub_with(Command::new(BINARY).args(["hub", "--config"]).arg(&config));
    // Its ring is written once: the more sources, the longer.
    wait_for("the hub answers", LIMIT, || status(&config).is_some());
    let interval = Duration::from_secs(1);
    let mut fleet =
        Fleet::start(cluster.hub_address(), count, BLOCKS, interval).expect("the sources");
    fleet.joined(|| Ok(())).expect("all are in session");
    // Ended by the next one.
    fleet.begin(Phase {
        number: 0,
        begin: Instant::now(),
        length: LIMIT * 4,
        quiet: Load::Paced(Duration::from_millis(200)),
        loud: None,
        together: None,
        settle: false,
    });
    let written = |of: &(u64, u64)| of.1 >= writes * BLOCK_BYTES_U64;
    wait_for("every source has written", LIMIT, || fleet.tallies().iter().all(written));
    for _ in 0..5 {
        let before = fleet.tallies();
        let document = status(&config).expect("the hub answers");
        let after = fleet.tallies();
        assert_eq!(wrong_under_way(&document, &before, &after), Vec::<String>::new());
    }
    for (name, time) in look(&cluster, count) {
        println!("{count} sources under load: {name} {time:?}");
    }
    fleet.settle().expect("all is published");
    let tallies = fleet.tallies();
    wait_for("the status is what the sources have counted", LIMIT, || {
        status(&config).is_some_and(|document| wrong_at_rest(&document, &tallies).is_empty())
    });
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    controls(&status(&config).expect("the hub answers"), &tallies, &page);
}
