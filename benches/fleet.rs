//! Many simulated sources against a real hub: a process with real files and real TCP on loopback.
//!
//! `cargo bench --bench fleet -- [--sources N,N] [--mixes NAME,NAME] [--rounds N] [--seconds N]
//! [--rate N] [--interval N] [--blocks N] [--log N] [--other FILE] [DIRECTORY]` (1, 10, 100 and 1000
//! sources; all mixes; 3 rounds of 8 s; 10 writes a second of each source; a CP each 10 s; volumes of
//! 1024 blocks; no log; the temporary directory). `--log` has each source write so many MiB, without
//! a CP if the interval is long, before the hub is killed in `restart`. `--other` lets another build
//! of the program take turns. The sources speak the real wire, CPs with the right roots included; they
//! keep nothing, so that what is measured is the hub. Each mix ends when all is published: that work is
//! counted as well.
//!
//! | mix | what the sources do |
//! | --- | --- |
//! | `onboard` | their files come, they connect; always first |
//! | `idle` | nothing |
//! | `steady` | a block at a time, at the rate |
//! | `bursty` | 64 blocks at once, on average at the rate |
//! | `noisy` | as steady, but one writes 256 KiB at a time, 8 under way |
//! | `cps` | as steady, and the CPs of all fall due at once |
//! | `flat` | a block at a time, one behind the other without a pause |
//! | `restart` | as steady, while the hub is killed and started again |
//! | `start` | the hub is stopped and started |
//!
//! Prints medians over the rounds, this build over the other, and the targets that these figures
//! decide.

mod filers;
mod hubs;
mod judged;
mod machine;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use filers::{Fleet, Load, Phase, Report, quantiles, total};
use hubs::{Hub, Reading};
use machine::{load_average, real_time};
use mirrorhub::limits::MIB;
use mirrorhub::units::BLOCK_BYTES_U64;
use mirrorhub::units::convert::{to_f64, to_u64};

const MIXES: [&str; 8] = ["idle", "steady", "bursty", "noisy", "cps", "flat", "restart", "start"];
/// Writes of one burst.
const BURST: usize = 64;
const OURS: &str = "mirrorhub";
/// Figures in the order in which they are shown, in two tables.
const TABLES: [&[&str]; 2] = [
    &["writes/s", "p50 µs", "p99 µs", "p999 µs", "loud MB/s", "moved s", "first s", "last s"],
    &[
        "CPU µs/write",
        "CPU %/source",
        "waits/write",
        "ring B/B",
        "other B/B",
        "dropped B/B",
        "nvram syncs",
        "log syncs",
        "pool syncs",
        "MiB now",
        "MiB most",
        "files",
        "scrape ms",
    ],
];

/// What one run of a mix came to, by name.
pub type Figures = BTreeMap<&'static str, f64>;
/// All runs of a build with so many sources, by mix.
pub type Runs = BTreeMap<(usize, usize, String), Vec<Figures>>;

struct Options {
    sources: Vec<usize>,
    mixes: Vec<String>,
    rounds: usize,
    length: Duration,
    rate: f64,
    interval: Duration,
    blocks: u64,
    log: u64,
    other: Option<PathBuf>,
    dir: PathBuf,
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        sources: vec![1, 10, 100, 1000],
        mixes: MIXES.map(str::to_owned).to_vec(),
        rounds: 3,
        length: Duration::from_secs(8),
        rate: 10.0,
        interval: Duration::from_secs(10),
        blocks: 1024,
        log: 0,
        other: None,
        dir: std::env::temp_dir(),
    };
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} wants a value"));
        let seconds = |text: String| anyhow::Ok(Duration::from_secs(text.parse()?));
        match &*argument {
            "--sources" => {
                let all: Result<_, _> = value()?.split(',').map(str::parse).collect();
                options.sources = all.context("--sources")?;
            }
            "--mixes" => options.mixes = value()?.split(',').map(str::to_owned).collect(),
            "--rounds" => options.rounds = value()?.parse().context("--rounds")?,
            "--seconds" => options.length = seconds(value()?).context("--seconds")?,
            "--rate" => options.rate = rate(&value()?).context("--rate")?,
            "--interval" => options.interval = seconds(value()?).context("--interval")?,
            "--blocks" => options.blocks = value()?.parse().context("--blocks")?,
            "--log" => options.log = value()?.parse().context("--log")?,
            "--other" => options.other = Some(PathBuf::from(value()?)),
            flag if flag.starts_with('-') => bail!("{flag} is not known"),
            _ => options.dir = PathBuf::from(argument),
        }
    }
    if let Some(name) = options.mixes.iter().find(|name| !MIXES.contains(&&***name)) {
        bail!("mix {name} is not known, these are: {}", MIXES.join(", "));
    }
    Ok(options)
}

/// Writes a second, 0.1 for instance.
fn rate(text: &str) -> anyhow::Result<f64> {
    let rate: f64 = text.parse()?;
    if !(0.001..=100_000.0).contains(&rate) {
        bail!("{text} is not from 0.001 to 100000");
    }
    Ok(rate)
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let class = real_time();
    let mut builds = vec![(OURS, PathBuf::from(env!("CARGO_BIN_EXE_mirrorhub")))];
    builds.extend(options.other.iter().map(|binary| ("other", binary.clone())));
    let mut runs = Runs::new();
    for round in 1..=options.rounds {
        for &count in &options.sources {
            for (build, (name, binary)) in builds.iter().enumerate() {
                let dir = tempfile::tempdir_in(&options.dir).context("no place for the files")?;
                let mut told = |mix: &str, figures: Figures| {
                    let shown: Vec<String> = figures
                        .iter()
                        .map(|(name, value)| format!("{name} {}", short(*value)))
                        .collect();
                    eprintln!("round {round} {name} {count} {mix}: {}", shown.join(", "));
                    runs.entry((count, build, mix.to_owned())).or_default().push(figures);
                };
                run(binary, dir.path(), count, &options, &mut told)
                    .with_context(|| format!("{name} with {count} sources"))?;
            }
        }
    }
    let names: Vec<&str> = builds.iter().map(|(name, _)| *name).collect();
    for columns in TABLES {
        println!("{}\n", medians(&runs, &names, columns));
    }
    if builds.len() > 1 {
        println!("this build over the other, round by round\n");
        for columns in TABLES {
            println!("{}\n", ratios(&runs, columns));
        }
    }
    println!("{}\n", judged::targets(&runs, options.rate));
    println!("{class}; load average {}", load_average());
    Ok(())
}

/// All mixes with a hub of its own.
fn run(
    binary: &Path,
    dir: &Path,
    count: usize,
    options: &Options,
    told: &mut impl FnMut(&str, Figures),
) -> anyhow::Result<()> {
    let mut hub = Hub::new(binary, dir, count, options.blocks * BLOCK_BYTES_U64)?;
    hub.start()?;
    hub.listening()?;
    let mut fleet = Fleet::start(hub.listen, count, options.blocks, options.interval)?;
    let begin = Instant::now();
    hub.add_sources(count)?;
    fleet.joined(|| Ok(()))?;
    told("onboard", Figures::from([("last s", in_sync(&hub, count, begin)?)]));
    for mix in MIXES.into_iter().filter(|mix| options.mixes.iter().any(|wanted| wanted == mix)) {
        let figures = match mix {
            "restart" => restart(&mut hub, &mut fleet, count, options)?,
            "start" => {
                hub.stop()?;
                let begin = Instant::now();
                hub.start()?;
                hub.listening()?;
                fleet.joined(|| Ok(()))?;
                Figures::from([("last s", in_sync(&hub, count, begin)?)])
            }
            _ => mixed(&hub, &mut fleet, (mix, count), options)?,
        };
        told(mix, figures);
    }
    Ok(())
}

/// Waits until the hub says that all are in sync; seconds since `begin`.
fn in_sync(hub: &Hub, count: usize, begin: Instant) -> anyhow::Result<f64> {
    loop {
        let met = hub.read()?.in_sync;
        let seconds = begin.elapsed().as_secs_f64();
        if met == count {
            return Ok(seconds);
        }
        if seconds > 300.0 {
            bail!("{met} of {count} sources are in sync after {seconds:.0} s");
        }
        hubs::pause(Duration::from_millis(20));
    }
}

/// Reads it when the logs of what is published are gone: that comes a moment behind.
fn at_rest(hub: &Hub) -> anyhow::Result<Reading> {
    let mut last = hub.read()?;
    for _ in 0..10 {
        hubs::pause(Duration::from_millis(200));
        let next = hub.read()?;
        if next.written == last.written {
            return Ok(next);
        }
        last = next;
    }
    Ok(last)
}

/// What sources do in a mix.
fn phase(mix: &str, options: &Options) -> Phase {
    let every = Duration::from_secs_f64(1.0 / options.rate);
    let steady = Load::Paced(every);
    let burst = u32::try_from(BURST).unwrap_or(u32::MAX);
    let quiet = match mix {
        "idle" => Load::Rest,
        "bursty" => Load::Bursts(every * burst, BURST),
        "flat" => Load::Flat { depth: 1, blocks: 1 },
        _ => steady,
    };
    let loud = (mix == "noisy").then_some(Load::Flat { depth: 8, blocks: 64 });
    let together = (mix == "cps").then_some(options.length * 2 / 5);
    let (number, begin, length) = (0, Instant::now(), options.length);
    Phase { number, begin, length, quiet, loud, together, settle: false }
}

fn mixed(
    hub: &Hub,
    fleet: &mut Fleet,
    (mix, count): (&str, usize),
    options: &Options,
) -> anyhow::Result<Figures> {
    fleet.settle()?;
    hub.forget_memory()?;
    let before = at_rest(hub)?;
    let (phase, reports) = fleet.run(phase(mix, options))?;
    let (after, seconds) = (at_rest(hub)?, phase.begin.elapsed().as_secs_f64());
    let mut figures = cost(&before, &after, &reports);
    figures
        .insert("CPU %/source", (after.cpu - before.cpu) * 100.0 / seconds / to_f64(to_u64(count)));
    figures.extend(latency(&phase, &reports));
    Ok(figures)
}

fn latency(phase: &Phase, reports: &[Report]) -> Figures {
    let mut figures = Figures::new();
    let quiet = || reports.iter().filter(|report| !report.loud);
    let measured: u64 = quiet().map(|report| report.measured).sum();
    if measured > 0 {
        let [p50, p99, p999] = quantiles(quiet(), [500, 990, 999]);
        let rate = to_f64(measured) / phase.seconds();
        figures.extend([("writes/s", rate), ("p50 µs", p50), ("p99 µs", p99), ("p999 µs", p999)]);
    }
    if let Some(loud) = reports.iter().find(|report| report.loud) {
        figures.insert("loud MB/s", to_f64(loud.bytes) / 1e6 / phase.length.as_secs_f64());
    }
    if let Some(together) = phase.together
        && let Some(moved) = reports.iter().filter_map(|report| report.moved).max()
    {
        figures.insert("moved s", moved.duration_since(phase.begin + together).as_secs_f64());
    }
    figures
}

/// What it took of the hub, publishing included.
fn cost(before: &Reading, after: &Reading, reports: &[Report]) -> Figures {
    let mut figures = Figures::from([
        ("MiB now", after.resident.0),
        ("MiB most", after.resident.1),
        ("files", after.descriptors),
        ("scrape ms", after.scrape * 1e3),
    ]);
    let writes = to_f64(total(reports, |report| report.writes));
    let transfers = to_f64(total(reports, |report| report.transfers));
    let bytes = to_f64(total(reports, |report| report.bytes));
    if writes == 0.0 {
        return figures;
    }
    let dropped = after.written.1 - before.written.1;
    let ring = after.ring - before.ring;
    let other = after.written.0 - before.written.0 - ring;
    let [nvram, log, pool] = [0, 1, 2].map(|at| (after.syncs[at] - before.syncs[at]) / transfers);
    figures.extend([
        ("CPU µs/write", (after.cpu - before.cpu) * 1e6 / writes),
        ("waits/write", (after.switches - before.switches) / writes),
        ("ring B/B", ring / bytes),
        ("other B/B", other / bytes),
        ("dropped B/B", dropped / bytes),
        ("nvram syncs", nvram),
        ("log syncs", log),
        ("pool syncs", pool),
    ]);
    figures
}

/// The hub is killed under load and started at once.
fn restart(
    hub: &mut Hub,
    fleet: &mut Fleet,
    count: usize,
    options: &Options,
) -> anyhow::Result<Figures> {
    fleet.settle()?;
    if options.log > 0 {
        let quiet = Load::Fill(options.log * MIB);
        let length = Duration::from_secs(1);
        let filling = fleet.begin(Phase { quiet, length, ..phase("idle", options) });
        fleet.reports(&filling)?;
    }
    let length = options.length.max(Duration::from_secs(4)) * 2;
    let phase = fleet.begin(Phase { length, ..phase("steady", options) });
    hubs::pause(length * 3 / 10);
    let killed = Instant::now();
    hub.kill()?;
    hub.start()?;
    let reports = fleet.reports(&phase)?;
    let back: Vec<Instant> = reports.iter().filter_map(|report| report.back).collect();
    if back.len() != count {
        bail!("{} of {count} sources were acknowledged again", back.len());
    }
    fleet.settle()?;
    let seconds =
        |at: Option<&Instant>| at.map_or(f64::NAN, |at| at.duration_since(killed).as_secs_f64());
    Ok(Figures::from([
        ("first s", seconds(back.iter().min())),
        ("last s", seconds(back.iter().max())),
    ]))
}

/// The median over rounds of one figure.
pub fn median(runs: &[Figures], name: &str) -> Option<f64> {
    let mut values: Vec<f64> = runs.iter().filter_map(|run| run.get(name).copied()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn short(value: f64) -> String {
    match value {
        _ if value < 0.1 => format!("{value:.4}"),
        _ if value < 10.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

/// An empty table.
pub fn table(header: &[&str], words: usize) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).force_no_tty().set_header(header);
    for column in table.column_iter_mut().skip(words) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn medians(runs: &Runs, names: &[&str], columns: &[&'static str]) -> Table {
    let mut table = table(&[&["sources", "mix", "build"], columns].concat(), 3);
    for ((count, build, mix), runs) in runs {
        let build = names.get(*build).map_or("", |name| name);
        let mut row = vec![count.to_string(), mix.clone(), build.to_owned()];
        let before = row.len();
        row.extend(columns.iter().map(|name| median(runs, name).map_or(String::new(), short)));
        if row.iter().skip(before).any(|cell| !cell.is_empty()) {
            table.add_row(row);
        }
    }
    table
}

/// This build over the other in the same round: median, least and most.
fn ratios(runs: &Runs, columns: &[&'static str]) -> Table {
    let mut table = table(&[&["sources", "mix"], columns].concat(), 2);
    for ((count, _, mix), ours) in runs.iter().filter(|((_, build, _), _)| *build == 0) {
        let Some(theirs) = runs.get(&(*count, 1, mix.clone())) else { continue };
        let mut row = vec![count.to_string(), mix.clone()];
        for name in columns {
            let over = ours.iter().zip(theirs).filter_map(|(ours, theirs)| {
                let ratio = ours.get(name)? / theirs.get(name)?;
                ratio.is_finite().then_some(ratio)
            });
            let mut all: Vec<f64> = over.collect();
            all.sort_by(f64::total_cmp);
            let cell = match (all.first(), all.get(all.len() / 2), all.last()) {
                (Some(least), Some(middle), Some(most)) => {
                    format!("{middle:.2} ({least:.2} to {most:.2})")
                }
                _ => String::new(),
            };
            row.push(cell);
        }
        if row.iter().skip(2).any(|cell| !cell.is_empty()) {
            table.add_row(row);
        }
    }
    table
}
