//! Simulated sources: each speaks the wire as a real one does, transfers, CPs by reference with the
//! right roots, heartbeats, and whatever was not acknowledged again after a lost connection, and
//! keeps nothing: no NVRAM, no pool.
//!
//! One task a source. What it writes, the present [`Phase`] says; behind the end of it, and when all
//! is acknowledged, it sends a [`Report`]. An answer that a sound hub does not give ends the bench.

mod content;
mod session;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mirrorhub::units::convert::to_u64;
use mirrorhub::units::names::SourceName;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

pub use self::content::Payloads;
use self::session::Filer;

/// Longest wait for the reports of a phase behind its end.
const PATIENCE: Duration = Duration::from_secs(240);

/// Name of a source.
pub fn name(at: usize) -> String {
    format!("filer-{at:05}")
}

/// What a source writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Nothing.
    Rest,
    /// A block, so often.
    Paced(Duration),
    /// So many blocks at once, so often.
    Bursts(Duration, usize),
    /// A number of blocks in a row at a time, so many times under way.
    Flat { depth: usize, blocks: u64 },
    /// 64 blocks in a row at a time until so many bytes were written, however long that takes.
    Fill(u64),
}

/// A time in which all sources do the same.
#[derive(Debug, Clone, Copy)]
pub struct Phase {
    /// Rises.
    pub number: u64,
    /// When it began, and how long sources begin writes.
    pub begin: Instant,
    /// See `begin`.
    pub length: Duration,
    /// What they write; `loud` the first of them.
    pub quiet: Load,
    /// See `quiet`.
    pub loud: Option<Load>,
    /// All CPs fall due so long behind the beginning.
    pub together: Option<Duration>,
    /// Everything is published before the report.
    pub settle: bool,
}

impl Phase {
    /// From when to when writes are measured.
    pub fn measured(&self) -> (Instant, Instant) {
        (self.begin + self.length / 10, self.begin + self.length)
    }

    /// Seconds that are measured.
    pub fn seconds(&self) -> f64 {
        self.length.as_secs_f64() * 0.9
    }
}

/// What a source did in a phase.
#[derive(Debug, Default)]
pub struct Report {
    /// Phase.
    pub phase: u64,
    /// It is the loud one.
    pub loud: bool,
    /// Writes, transfers that carried them, bytes.
    pub writes: u64,
    /// See `writes`.
    pub transfers: u64,
    /// See `writes`.
    pub bytes: u64,
    /// Microseconds from forming to acknowledgement of each measured transfer, and how many writes
    /// those carried.
    pub micros: Vec<u32>,
    /// See `micros`.
    pub measured: u64,
    /// When the CP of [`Phase::together`] was published.
    pub moved: Option<Instant>,
    /// When the first write behind the last reconnection was acknowledged.
    pub back: Option<Instant>,
}

/// Bytes of a source's clients, counted by the source itself.
#[derive(Debug, Default)]
pub struct Tally {
    formed: AtomicU64,
    acknowledged: AtomicU64,
}

/// What all sources share.
#[derive(Debug)]
pub struct Common {
    /// Where the hub is.
    pub hub: SocketAddr,
    /// Blocks of each volume.
    pub blocks: u64,
    /// Time between CPs.
    pub interval: Duration,
    /// What is written.
    pub payloads: Payloads,
    /// Sources in session.
    pub joined: AtomicUsize,
    /// Of each source.
    pub tallies: Vec<Tally>,
}

/// All sources.
#[derive(Debug)]
pub struct Fleet {
    runtime: Runtime,
    common: Arc<Common>,
    count: usize,
    phases: watch::Sender<Phase>,
    reports: mpsc::Receiver<anyhow::Result<Report>>,
}

impl Fleet {
    /// Starts so many sources, which connect as soon as the hub is there.
    pub fn start(
        hub: SocketAddr,
        count: usize,
        blocks: u64,
        interval: Duration,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let (joined, payloads) = (AtomicUsize::new(0), Payloads::new());
        let tallies = (0..count).map(|_| Tally::default()).collect();
        let common = Arc::new(Common { hub, blocks, interval, payloads, joined, tallies });
        let first = Phase {
            number: 0,
            begin: Instant::now(),
            length: Duration::ZERO,
            quiet: Load::Rest,
            loud: None,
            together: None,
            settle: false,
        };
        let (phases, seen) = watch::channel(first);
        let (sender, reports) = mpsc::channel(count);
        for at in 0..count {
            let name: SourceName = name(at).parse().context("a name")?;
            let filer = Filer::new(at, name, common.clone());
            let (seen, sender) = (seen.clone(), sender.clone());
            runtime.spawn(async move {
                if let Err(error) = Box::pin(filer.live(seen, &sender)).await {
                    drop(sender.send(Err(error)).await);
                }
            });
        }
        Ok(Self { runtime, common, count, phases, reports })
    }

    /// Bytes of each source that were put into transfers, and bytes that were acknowledged, since it
    /// was started. The second is read first: it is never more.
    pub fn tallies(&self) -> Vec<(u64, u64)> {
        let read = |tally: &Tally| {
            let acknowledged = tally.acknowledged.load(Ordering::SeqCst);
            (tally.formed.load(Ordering::SeqCst), acknowledged)
        };
        self.common.tallies.iter().map(read).collect()
    }

    /// Waits until all are in session; `beside` is done between two looks.
    pub fn joined(&mut self, mut beside: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let begin = Instant::now();
        while self.common.joined.load(Ordering::Relaxed) < self.count {
            beside()?;
            if let Ok(Err(error)) = self.reports.try_recv() {
                return Err(error);
            }
            if begin.elapsed() > PATIENCE {
                let joined = self.common.joined.load(Ordering::Relaxed);
                bail!("{joined} of {} sources are in session", self.count);
            }
            let pause = async { tokio::time::sleep(Duration::from_millis(5)).await };
            self.runtime.block_on(pause);
        }
        Ok(())
    }

    /// Begins a phase; its number and beginning are set here.
    pub fn begin(&self, phase: Phase) -> Phase {
        let number = self.phases.borrow().number + 1;
        let phase = Phase { number, begin: Instant::now(), ..phase };
        self.phases.send_replace(phase);
        phase
    }

    /// Waits for the reports of a phase.
    pub fn reports(&mut self, phase: &Phase) -> anyhow::Result<Vec<Report>> {
        let deadline = phase.begin + phase.length + PATIENCE;
        let mut all = Vec::with_capacity(self.count);
        while all.len() < self.count {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = async { tokio::time::timeout(left, self.reports.recv()).await };
            let report = self.runtime.block_on(next).with_context(|| {
                format!("{} of {} sources came to an end of the phase", all.len(), self.count)
            })?;
            let report = report.context("the sources are gone")??;
            if report.phase == phase.number {
                all.push(report);
            }
        }
        Ok(all)
    }

    /// Runs a phase, and one in which all is published; the reports of the first.
    pub fn run(&mut self, phase: Phase) -> anyhow::Result<(Phase, Vec<Report>)> {
        let phase = self.begin(phase);
        let reports = self.reports(&phase)?;
        self.settle()?;
        Ok((phase, reports))
    }

    /// Has all CPs published.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        let length = Duration::ZERO;
        let (quiet, loud, together) = (Load::Rest, None, None);
        let (number, begin) = (0, Instant::now());
        let rest = Phase { number, begin, length, quiet, loud, together, settle: true };
        let rest = self.begin(rest);
        self.reports(&rest)?;
        if let Some(at) = self.tallies().iter().position(|(formed, acked)| formed != acked) {
            bail!("{} is settled and not acknowledged", name(at));
        }
        Ok(())
    }
}

/// Sums over reports.
pub fn total(reports: &[Report], of: impl Fn(&Report) -> u64) -> u64 {
    reports.iter().map(of).sum()
}

/// Quantiles, in thousandths, of what they measured.
pub fn quantiles<'a, const N: usize>(
    reports: impl Iterator<Item = &'a Report>,
    per_mille: [usize; N],
) -> [f64; N] {
    let mut all: Vec<u32> = reports.flat_map(|report| report.micros.iter().copied()).collect();
    all.sort_unstable();
    per_mille.map(|part| {
        let at = all.len().saturating_sub(1).min(all.len() * part / 1000);
        all.get(at).map_or(f64::NAN, |micros| f64::from(*micros))
    })
}

/// A number from another, without a pattern.
pub fn scattered(seed: u64) -> u64 {
    let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A part of `whole` that is another for each source.
pub fn offset(at: usize, whole: Duration) -> Duration {
    let parts = u32::try_from(scattered(to_u64(at) + 1) % 1024).unwrap_or(0);
    whole * parts / 1024
}
