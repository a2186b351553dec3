//! The workloads that all servers of the bench `peers` are given, by fio over NBD.

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

/// Runs one workload against an export.
pub fn run(workload: Workload, uri: &str, length: Duration) -> anyhow::Result<Measured> {
    let runtime = format!("--runtime={}", length.as_secs());
    fio(&[&workload.arguments, &["--time_based", &runtime][..]].concat(), uri)
}

/// Writes the whole export once.
pub fn fill(uri: &str) -> anyhow::Result<()> {
    fio(&["--rw=write", "--bs=1m", "--iodepth=4"], uri).map(drop)
}

fn fio(arguments: &[&str], uri: &str) -> anyhow::Result<Measured> {
    let output = Command::new("fio")
        .args(["--output-format=json", "--name=load", "--ioengine=nbd", "--size=1g"])
        .args(["--randrepeat=1", "--norandommap", "--percentile_list=50:99"])
        .args(arguments)
        .arg(format!("--uri={uri}"))
        .output()
        .context("fio does not start")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("fio against {uri}: {text}{}", String::from_utf8_lossy(&output.stderr));
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
