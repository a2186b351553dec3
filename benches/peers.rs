//! mirrorhub, the floor of the machine, and what a user would pick instead, on the same workloads in
//! turn.
//!
//! `cargo bench --bench peers -- [--rounds N] [--seconds N] [--only NAME,NAME] [--other FILE]
//! [DIRECTORY]` (5 rounds of 8 s; all; the temporary directory). `--other` lets another build of the
//! program run beside them. Prints a table of medians and one of ratios,
//! mirrorhub over each, with their least and most over the rounds. A server that is not installed is
//! named. Behind each run its server comes to rest before the next one begins: Ceph's mirror, which says
//! how far it is twice a minute, takes minutes for that. As root everything runs in a real-time class, so
//! that a busy neighbour does not turn each wait into a tick of the kernel, and in a network of its own,
//! without which GlusterFS takes no part. Packages (Debian): `fio qemu-utils qemu-system-common nbdkit
//! glusterfs-server ceph-mon ceph-mgr ceph-osd ceph-common rbd-mirror`.

mod chain;
mod contest;
mod ends;
mod load;
mod machine;
mod network;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use chain::{Chain, quantile};
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use contest::Contestant;
use ends::most_resident_mib;
use load::{Measured, WORKLOADS, Workload};
use machine::{load_average, real_time};
use mirrorhub::units::convert::{to_f64, to_u64};

/// What the floor is measured with: the chain knows no other.
const FLOOR: &str = "floor";
const OURS: &str = "mirrorhub";

/// One run of one server.
#[derive(Debug, Clone, Copy)]
struct Run {
    load: Measured,
    /// Microseconds of CPU of its servers for each write.
    cpu: Option<f64>,
    /// Bytes written to disks by its last server for each byte written.
    written: Option<f64>,
}

/// What a column shows of a run.
type Column = (&'static str, fn(&Run) -> Option<f64>);

const COLUMNS: [Column; 6] = [
    ("writes/s", |run| Some(run.load.rate)),
    ("p50 µs", |run| Some(run.load.p50)),
    ("p99 µs", |run| Some(run.load.p99)),
    ("MB/s", |run| Some(run.load.mb)),
    ("CPU µs/write", |run| run.cpu),
    ("written/byte", |run| run.written),
];

type Runs = BTreeMap<(usize, String), Vec<Run>>;

struct Options {
    rounds: usize,
    length: Duration,
    only: Vec<String>,
    other: Option<PathBuf>,
    dir: PathBuf,
}

fn options() -> anyhow::Result<Options> {
    let (mut rounds, mut seconds, mut only) = (5, 8, Vec::new());
    let (mut other, mut dir) = (None, std::env::temp_dir());
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} wants a value"));
        match &*argument {
            "--rounds" => rounds = value()?.parse().context("--rounds")?,
            "--seconds" => seconds = value()?.parse().context("--seconds")?,
            "--only" => only = value()?.split(',').map(str::to_owned).collect(),
            "--other" => other = Some(PathBuf::from(value()?)),
            flag if flag.starts_with('-') => bail!("{flag} is not known"),
            _ => dir = PathBuf::from(argument),
        }
    }
    Ok(Options { rounds, length: Duration::from_secs(seconds), only, other, dir })
}

fn main() -> anyhow::Result<()> {
    network::own_network().context("a network of its own")?;
    let options = options()?;
    let class = real_time();
    let dir = tempfile::tempdir_in(&options.dir).context("no place for the files")?;
    let mut chain = Chain::start(dir.path())?;
    let (mut there, missing) = contest::start(dir.path(), &options.only)?;
    if let Some(binary) = &options.other {
        there.push(contest::build(binary, dir.path())?);
    }
    let mut runs = Runs::new();
    for round in 1..=options.rounds {
        for (at, workload) in WORKLOADS.into_iter().enumerate() {
            if workload.name == "rw4k1" {
                runs.entry((at, FLOOR.to_owned())).or_default().push(floor(&mut chain, &options)?);
            }
            for contestant in &there {
                let run = run(contestant, workload, options.length)?;
                eprintln!(
                    "round {round} {:7} {:12} {:>8.0} writes/s p50 {:>7.0} µs",
                    workload.name, contestant.name, run.load.rate, run.load.p50
                );
                runs.entry((at, contestant.name.clone())).or_default().push(run);
            }
        }
    }
    println!("{}\n\n{}", medians(&runs), ratios(&runs));
    for contestant in &there {
        let resident = contestant.ids.iter().map(|id| most_resident_mib(*id));
        let resident: Vec<f64> = resident.collect::<Result<_, _>>()?;
        println!("{}: resident at most {resident:.0?} MiB", contestant.name);
    }
    for line in missing {
        println!("not measured: {line}");
    }
    println!("floor durable by {}; {class}", chain.durability);
    println!("load average {}", load_average());
    Ok(())
}

fn floor(chain: &mut Chain, options: &Options) -> anyhow::Result<Run> {
    let mut times = chain.write_for(options.length)?;
    let writes = to_f64(to_u64(times.len()));
    let mut micros = |part| quantile(&mut times, part).as_secs_f64() * 1e6;
    let rate = writes / options.length.as_secs_f64();
    let (p50, p99) = (micros(500), micros(990));
    Ok(Run {
        load: Measured { rate, p50, p99, writes, mb: rate * 4096e-6 },
        cpu: None,
        written: None,
    })
}

fn run(contestant: &Contestant, workload: Workload, length: Duration) -> anyhow::Result<Run> {
    let (cpu, written) = (contestant.cpu()?, contestant.written()?);
    let load = load::run(workload, &contestant.target, length)?;
    contestant.settle()?;
    let bytes = load.writes * to_f64(workload.bytes);
    let written = written.zip(contestant.written()?).map(|(before, now)| (now - before) / bytes);
    Ok(Run { load, cpu: Some((contestant.cpu()? - cpu) * 1e6 / load.writes), written })
}

fn quantiles(mut values: Vec<f64>) -> Option<(f64, f64, f64)> {
    values.sort_by(f64::total_cmp);
    Some((*values.first()?, *values.get(values.len() / 2)?, *values.last()?))
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).force_no_tty().set_header(header);
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn medians(runs: &Runs) -> Table {
    let mut header = vec!["workload", "server"];
    header.extend(COLUMNS.map(|(name, _)| name));
    let mut table = table(&header);
    for ((at, name), runs) in runs {
        let workload = WORKLOADS.get(*at).map_or("", |workload| workload.name);
        let mut row = vec![workload.to_owned(), name.clone()];
        for (_, value) in COLUMNS {
            let median = quantiles(runs.iter().filter_map(value).collect());
            row.push(median.map_or("".to_owned(), |(_, median, _)| short(median)));
        }
        table.add_row(row);
    }
    table
}

fn short(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// Mirrorhub over each other in the same round: median, least and most.
fn ratios(runs: &Runs) -> Table {
    let mut header = vec!["workload", "mirrorhub over"];
    header.extend(COLUMNS.map(|(name, _)| name));
    let mut table = table(&header);
    for ((at, name), theirs) in runs.iter().filter(|((_, name), _)| name != OURS) {
        let Some(ours) = runs.get(&(*at, OURS.to_owned())) else { continue };
        let workload = WORKLOADS.get(*at).map_or("", |workload| workload.name);
        let mut row = vec![workload.to_owned(), name.clone()];
        for (_, value) in COLUMNS {
            let pairs = ours.iter().zip(theirs);
            let over = pairs.filter_map(|(ours, theirs)| Some(value(ours)? / value(theirs)?));
            let cell = quantiles(over.collect())
                .map(|(least, median, most)| format!("{median:.2} ({least:.2} to {most:.2})"));
            row.push(cell.unwrap_or_default());
        }
        table.add_row(row);
    }
    table
}
