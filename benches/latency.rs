//! Latency of 4 KiB random writes at a source whose both ends are durable, beside the floor of the
//! machine in the same run: see `chain`.
//!
//! `cargo bench --bench latency [DIRECTORY]` (default: the temporary directory). Rounds of the
//! floor, depth 1 and depth 32 take turns, so that all see the same machine. Wanted: the p50 of
//! depth 1 at most 2.0 of the floor's, depth 32 at least twice the writes of depth 1. Prints, and
//! checks nothing.

mod chain;
mod ends;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use chain::{Chain, quantile};
use ends::{Ends, Sizes, most_resident_mib, pause};
use mirrorhub::nbd::client::Client;
use mirrorhub::units::convert::{to_f64, to_u64};

const ROUNDS: usize = 5;
const FLOOR_ROUND: Duration = Duration::from_secs(2);
const ROUND: Duration = Duration::from_secs(4);
const SIZES: Sizes =
    Sizes { hub_nvram: "256MiB", hub_pool: "6GiB", nvram: "256MiB", pool: "6GiB", volume: "1GiB" };

fn main() -> anyhow::Result<()> {
    let directory = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let root = directory.map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(&root).context("no place for the files")?;
    let mut chain = Chain::start(dir.path())?;
    let ends = Ends::start(dir.path(), 1, &SIZES)?;
    let (source, nbd) = ends.sources.first().context("one source")?;
    let mut client = Client::tcp(*nbd, "filer-0/vol0", Duration::from_secs(60))?;
    let (mut state, mut ratios, mut gains) = (0x9e37_79b9_7f4a_7c15, Vec::new(), Vec::new());
    chain.write_for(Duration::from_millis(500))?;
    write_for(&mut client, 8, Duration::from_secs(2), &mut state)?;
    pause(Duration::from_secs(1));
    for round in 1..=ROUNDS {
        let mut floor = chain.write_for(FLOOR_ROUND)?;
        let mut one = write_for(&mut client, 1, ROUND, &mut state)?;
        let mut many = write_for(&mut client, 32, ROUND, &mut state)?;
        let ratio = quantile(&mut one, 500).as_secs_f64() / quantile(&mut floor, 500).as_secs_f64();
        let gain = to_f64(to_u64(many.len())) / to_f64(to_u64(one.len()));
        println!("round {round}: p50 over the floor's {ratio:.2}, depth 32 over depth 1 {gain:.2}");
        for (name, times) in [("floor", &mut floor), ("depth 1", &mut one), ("depth 32", &mut many)]
        {
            let (p50, p99) = (quantile(times, 500), quantile(times, 990));
            println!("  {name:8} p50 {p50:>10.1?} p99 {p99:>10.1?} {:>7} writes", times.len());
        }
        ratios.push(ratio);
        gains.push(gain);
    }
    println!("median: p50 over the floor's {:.2} (wanted: <= 2.0)", median(&mut ratios));
    println!("median: depth 32 over depth 1 {:.2} (wanted: >= 2)", median(&mut gains));
    println!("durable by {}", chain.durability);
    let (hub, source) = (most_resident_mib(ends.hub.id())?, most_resident_mib(source.id())?);
    println!("resident at most: hub {hub:.0} MiB, source {source:.0} MiB");
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average {}", load.trim());
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Random writes with `depth` under way for `length`; the time of each.
fn write_for(
    client: &mut Client,
    depth: usize,
    length: Duration,
    state: &mut u64,
) -> anyhow::Result<Vec<Duration>> {
    let blocks = client.size() / 4096;
    let (begin, mut times, mut under_way) = (Instant::now(), Vec::new(), HashMap::new());
    let mut data = [7; 4096];
    loop {
        while under_way.len() < depth && begin.elapsed() < length {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            data[..8].copy_from_slice(&state.to_le_bytes());
            let start = Instant::now();
            let cookie = client.submit_write(*state % blocks * 4096, &data)?;
            under_way.insert(cookie, start);
        }
        if under_way.is_empty() {
            return Ok(times);
        }
        let reply = client.reply()?;
        let Some(start) = under_way.remove(&reply.cookie) else { bail!("a foreign answer") };
        if let Err(error) = reply.result {
            bail!("a write was answered with error {error}");
        }
        times.push(start.elapsed());
    }
}
