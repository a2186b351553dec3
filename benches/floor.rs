//! The machine's own floor for a synchronous mirror: see `chain`.
//!
//! `cargo bench --bench floor [DIRECTORY]` (default: the temporary directory). Prints, and checks
//! nothing.

mod chain;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use chain::{Chain, quantile};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);

fn main() -> anyhow::Result<()> {
    let directory = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let root = directory.map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(&root).context("no place for the files")?;
    let mut chain = Chain::start(dir.path())?;
    println!("client -> relay -> sink, 4 KiB, durable at both by {}", chain.durability);
    for round in 1..=ROUNDS {
        let mut times = chain.write_for(ROUND)?;
        let (p50, p99) = (quantile(&mut times, 500), quantile(&mut times, 990));
        println!("round {round}: {} writes, p50 {p50:?}, p99 {p99:?}", times.len());
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average {}", load.trim());
    Ok(())
}
