//! The workloads that all servers of the bench `peers` are given, by fio: over NBD, or through
//! the client library of a server that has its own.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use mirrorhub::units::convert::to_f64;
use serde_json::Value;

/// One workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Its name in the table.
    pub name: &'static str,
    /// What fio calls it.
    arguments: [&'static str; 4],
    /// Bytes of a request.
    pub bytes: u64,
}

/// All of them.
pub const WORKLOADS: [Workload; 4] = [
    Workload {
        name: "rw4k1",
        arguments: ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--rwmixread=0"],
        bytes: 4096,
    },
    Workload {
        name: "rw4k32",
        arguments: ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--rwmixread=0"],
        bytes: 4096,
    },
    Workload {
        name: "sw64k",
        arguments: ["--rw=write", "--bs=64k", "--iodepth=8", "--rwmixread=0"],
        bytes: 65536,
    },
    Workload {
        name: "mix4k",
        arguments: ["--rw=randrw", "--bs=4k", "--iodepth=16", "--rwmixread=70"],
        bytes: 4096,
    },
];

/// What one run gave, of the writes.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Writes a second.
    pub rate: f64,
    /// Completion latency in microseconds: the median, and 99 of 100.
    pub p50: f64,
    /// See `p50`.
    pub p99: f64,
    /// How many writes.
    pub writes: f64,
    /// Written a second, in units of 10^6 bytes.
    pub mb: f64,
}

/// What fio is told of where its volume of 1 GiB is.
#[derive(Debug, Clone)]
pub struct Target {
    /// Arguments: the engine, and the volume as that names it.
    pub arguments: Vec<String>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
}

impl Target {
    /// An export of an NBD server.
    pub fn nbd(uri: &str) -> Self {
        let arguments = vec!["--ioengine=nbd".to_owned(), format!("--uri={uri}")];
        Self { arguments, environment: Vec::new() }
    }
}

/// Runs one workload against a volume.
pub fn run(workload: Workload, target: &Target, length: Duration) -> anyhow::Result<Measured> {
    let runtime = format!("--runtime={}", length.as_secs());
    fio(&[&workload.arguments, &["--time_based", &runtime][..]].concat(), target)
}

/// Writes the whole volume once.
pub fn fill(target: &Target) -> anyhow::Result<()> {
    fio(&["--rw=write", "--bs=1m", "--iodepth=4"], target).map(drop)
}

fn fio(arguments: &[&str], target: &Target) -> anyhow::Result<Measured> {
    let output = Command::new("fio")
        .args(["--output-format=json", "--name=load", "--size=1g"])
        .args(["--randrepeat=1", "--norandommap", "--percentile_list=50:99"])
        .args(arguments)
        .args(&target.arguments)
        .envs(target.environment.iter().cloned())
        .output()
        .context("fio does not start")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("fio {}: {text}{said}", target.arguments.join(" "));
    }
    let json = text.find('{').and_then(|begin| text.get(begin..)).context("no JSON of fio")?;
    let report: Value = serde_json::from_str(json).context("the JSON of fio")?;
    let writes = report.pointer("/jobs/0/write").context("no writes in fio's report")?;
    let micros = |of: &str| {
        let nanos = writes.pointer(&format!("/clat_ns/percentile/{of}"));
        nanos.and_then(Value::as_f64).map(|nanos| nanos / 1000.0).context("no percentile")
    };
    let total = writes.get("total_ios").and_then(Value::as_u64).context("no total_ios")?;
    let rate = writes.get("iops").and_then(Value::as_f64).context("no iops")?;
    let bytes = writes.get("bw_bytes").and_then(Value::as_f64).context("no bw_bytes")?;
    Ok(Measured {
        rate,
        p50: micros("50.000000")?,
        p99: micros("99.000000")?,
        writes: to_f64(total),
        mb: bytes / 1e6,
    })
}
