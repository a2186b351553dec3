//! What a hub with many connected sources and each source take of the CPU while nothing happens,
//! and how much memory they hold, idle and under load.
//!
//! `cargo bench --bench idle [-- --sources=N] [DIRECTORY]` (default: 100 real source processes in
//! the temporary directory; one takes 8 MiB of NVRAM and a pool). Wanted: at most 1% of a
//! core for the hub and for each source over 60 s. What it prints of the CPU is for the reader;
//! memory beyond the bounds of the README fails it. Under load there are other ends, with an NVRAM
//! that outweighs the program, and the most that each ever had is shown beside its bound.

mod ends;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use ends::{Ends, Sizes, most_resident_mib, pause};
use mirrorhub::nbd::client::{Client, ClientError};

const IDLE: Duration = Duration::from_secs(60);
const LOAD: Duration = Duration::from_secs(20);
/// The sources write at once under load, so many of them.
const LOADED: usize = 4;
/// Bounds of the README in MiB. No image is read here, so the hub has nothing of a reader under way.
const HUB_MIB: f64 = 64.0 + 80.0;
const HUB_MIB_A_SOURCE: f64 = 4.0 + 2.0;
/// The program, and what a client here has under way, rounded up; beside it half more than the NVRAM.
const SOURCE_MIB: f64 = 64.0 + 1.0;
/// Bytes of a write, how far apart, and how many are under way: whole blocks one behind the other,
/// and blocks all over the volume written in part, each of which takes a page all the same.
const WRITES: [(usize, u64, u64); 2] = [(65_536, 65_536, 8), (512, 4096 * 7919, 128)];
const IDLE_SIZES: Sizes =
    Sizes { hub_nvram: "512MiB", hub_pool: "4GiB", nvram: "8MiB", pool: "256MiB", volume: "32MiB" };
const IDLE_NVRAM_MIB: f64 = 8.0;
const LOAD_SIZES: Sizes =
    Sizes { hub_nvram: "512MiB", hub_pool: "4GiB", nvram: "64MiB", pool: "1GiB", volume: "512MiB" };
const LOAD_NVRAM_MIB: f64 = 64.0;

fn main() -> anyhow::Result<()> {
    let mut count = 100;
    let mut root = std::env::temp_dir();
    for argument in std::env::args().skip(1) {
        if let Some(number) = argument.strip_prefix("--sources=") {
            count = number.parse().context("--sources wants a number")?;
        } else if !argument.starts_with('-') {
            root = PathBuf::from(argument);
        }
    }
    started(&root, count, &IDLE_SIZES, |ends| {
        pause(Duration::from_secs(10));
        idle(ends)?;
        memory(ends, IDLE_NVRAM_MIB, "idle")
    })?;
    // Each kind of write to new processes, so that the most they had was had for it.
    for write in WRITES {
        started(&root, LOADED, &LOAD_SIZES, |ends| {
            load(ends, write)?;
            memory(ends, LOAD_NVRAM_MIB, &format!("under load of {} byte writes", write.0))
        })?;
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average {}", load.trim());
    Ok(())
}

/// Does that with a hub and sources of their own.
fn started(
    root: &Path,
    count: usize,
    sizes: &Sizes,
    act: impl FnOnce(&Ends) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in(root).context("no place for the files")?;
    let begin = Instant::now();
    let ends = Ends::start(dir.path(), count, sizes)?;
    println!("{count} sources in sync after {:.1} s", begin.elapsed().as_secs_f64());
    act(&ends)
}

fn idle(ends: &Ends) -> anyhow::Result<()> {
    let ids: Vec<u32> = ends.sources.iter().map(|(end, _)| end.id()).collect();
    let hub_before = cpu(ends.hub.id())?;
    let before = ids.iter().map(|&id| cpu(id)).collect::<anyhow::Result<Vec<_>>>()?;
    let begin = Instant::now();
    pause(IDLE);
    let seconds = begin.elapsed().as_secs_f64();
    let hub = (cpu(ends.hub.id())? - hub_before).as_secs_f64() / seconds * 100.0;
    let mut each = Vec::new();
    for (id, before) in ids.iter().zip(before) {
        each.push((cpu(*id)? - before).as_secs_f64() / seconds * 100.0);
    }
    each.sort_by(f64::total_cmp);
    let middle = each.get(each.len() / 2).copied().unwrap_or_default();
    let most = each.last().copied().unwrap_or_default();
    println!("idle over {seconds:.0} s: hub {hub:.2}% of a core (wanted: <= 1)");
    println!("idle: sources, median {middle:.3}%, most {most:.3}% of a core (wanted: <= 1)");
    Ok(())
}

/// CPU time of a process so far, threads that have ended among it; in steps of 10 ms.
fn cpu(id: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    // The name, in parentheses, may hold blanks; user and system time are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let mut ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let (Some(user), Some(system)) = (ticks.next(), ticks.next()) else {
        anyhow::bail!("no times in stat of process {id}");
    };
    Ok(Duration::from_millis((user? + system?) * 10))
}

/// The most that each process ever had resident, beside the bounds of the README.
fn memory(ends: &Ends, nvram_mib: f64, when: &str) -> anyhow::Result<()> {
    let hub = most_resident_mib(ends.hub.id())?;
    let mut each = Vec::new();
    for (end, _) in &ends.sources {
        each.push(most_resident_mib(end.id())?);
    }
    let most = each.into_iter().fold(0.0, f64::max);
    let count = u32::try_from(ends.sources.len()).context("too many sources")?;
    let hub_max = HUB_MIB + HUB_MIB_A_SOURCE * f64::from(count);
    let source_max = nvram_mib * 1.5 + SOURCE_MIB;
    println!(
        "resident {when}, at most: hub {hub:.0} of {hub_max:.0} MiB, the largest source {most:.0} \
         of {source_max:.0} MiB"
    );
    anyhow::ensure!(hub <= hub_max, "the hub had {hub:.0} MiB, more than {hub_max:.0}");
    anyhow::ensure!(most <= source_max, "a source had {most:.0} MiB, more than {source_max:.0}");
    Ok(())
}

/// Opens a volume; its source may serve a moment after its hub says that it is in sync.
fn open(nbd: SocketAddr, export: &str) -> anyhow::Result<Client> {
    let begin = Instant::now();
    loop {
        match Client::tcp(nbd, export, Duration::from_secs(60)) {
            Ok(client) => return Ok(client),
            Err(ClientError::Refused { .. }) if begin.elapsed() < Duration::from_secs(10) => {
                pause(Duration::from_millis(50));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Some sources take writes of so many bytes, so far apart, each from its own client with so many
/// under way.
fn load(ends: &Ends, (bytes, step, depth): (usize, u64, u64)) -> anyhow::Result<()> {
    let mut writers = Vec::new();
    for (at, (_, nbd)) in ends.sources.iter().enumerate().take(LOADED) {
        let (nbd, export) = (*nbd, format!("filer-{at}/vol0"));
        writers.push(std::thread::spawn(move || -> anyhow::Result<u64> {
            let mut client = open(nbd, &export)?;
            let (begin, data) = (Instant::now(), vec![9; bytes]);
            let (size, mut sent, mut answered) = (client.size(), 0, 0);
            while begin.elapsed() < LOAD || answered < sent {
                if begin.elapsed() < LOAD && sent - answered < depth {
                    client.submit_write(sent * step % size, &data)?;
                    sent += 1;
                } else {
                    let reply = client.reply()?;
                    anyhow::ensure!(reply.result.is_ok(), "a write failed: {:?}", reply.result);
                    answered += 1;
                }
            }
            Ok(answered)
        }));
    }
    let mut writes = 0;
    for writer in writers {
        writes += writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??;
    }
    let seconds = LOAD.as_secs();
    println!("load: {writes} writes of {bytes} bytes in {seconds} s by {LOADED} clients at once");
    Ok(())
}
