//! The demo's writer: knows which of its writes were acknowledged.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::nbd::client::{Client, ClientError};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

const DEPTH: usize = 16;
const PATIENCE: Duration = Duration::from_secs(30);

/// Newest acknowledged and newest submitted version of each block.
#[derive(Debug, Default)]
pub struct Known {
    answered: HashMap<u64, u64>,
    submitted: HashMap<u64, u64>,
    count: u64,
}

/// A writer at work.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Known, ClientError>>>,
}

fn content(block: u64, version: u64) -> Vec<u8> {
    let mut pair = [0; 16];
    pair[..8].copy_from_slice(&block.to_le_bytes());
    pair[8..].copy_from_slice(&version.to_le_bytes());
    pair.repeat(BLOCK_BYTES / 16)
}

impl Load {
    /// Writes random blocks until told to stop or until the connection breaks.
    pub fn start(socket: PathBuf, export: &'static str) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counter) = (stop.clone(), answered.clone());
        let thread = std::thread::spawn(move || write(&socket, export, &stopped, &counter));
        Self { stop, answered, thread: Some(thread) }
    }

    /// Waits for so many acknowledgements.
    pub fn wait_answered(&self, count: u64) -> Result<()> {
        let begin = Instant::now();
        let (_keep, receiver) = mpsc::channel::<()>();
        while self.answered.load(Ordering::Relaxed) < count {
            ensure!(begin.elapsed() < PATIENCE, "fewer than {count} writes in {PATIENCE:?}");
            // Nobody sends: a bounded wait between two looks at a counter.
            let _waited = receiver.recv_timeout(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends the writer.
    pub fn finish(&mut self) -> Result<Known> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(known)) => Ok(known?),
            Some(Err(_)) => bail!("the writer panicked"),
            None => bail!("the writer was ended before"),
        }
    }
}

fn write(
    socket: &Path,
    export: &str,
    stop: &AtomicBool,
    answered: &AtomicU64,
) -> Result<Known, ClientError> {
    let mut known = Known::default();
    let mut client = Client::unix(socket, export, PATIENCE)?;
    let blocks = client.size() / BLOCK_BYTES_U64;
    let (mut under_way, mut busy) = (HashMap::new(), HashSet::new());
    let (mut state, mut version) = (0x9e37_79b9_7f4a_7c15_u64, 0);
    loop {
        while under_way.len() < DEPTH.min(crate::units::convert::to_usize(blocks))
            && !stop.load(Ordering::Relaxed)
        {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let block = state % blocks;
            if !busy.insert(block) {
                continue;
            }
            version += 1;
            known.submitted.insert(block, version);
            // A broken connection ends the load: that is what a crash looks like from here.
            let sent = client.submit_write(block * BLOCK_BYTES_U64, &content(block, version));
            let Ok(cookie) = sent else { return Ok(known) };
            under_way.insert(cookie, (block, version));
        }
        if under_way.is_empty() {
            return Ok(known);
        }
        let Ok(reply) = client.reply() else { return Ok(known) };
        let Some((block, version)) = under_way.remove(&reply.cookie) else {
            return Err(ClientError::Protocol("an answer to no request"));
        };
        reply.result.map_err(ClientError::Answer)?;
        busy.remove(&block);
        known.answered.insert(block, version);
        known.count += 1;
        answered.fetch_add(1, Ordering::Relaxed);
    }
}

impl Known {
    /// Writes that were acknowledged.
    pub fn answered(&self) -> u64 {
        self.count
    }

    /// Reads every block that was written: none may be older than acknowledged, torn or foreign.
    pub fn check(&self, socket: &Path, export: &str) -> Result<()> {
        let mut client = Client::unix(socket, export, PATIENCE)?;
        for (&block, &newest) in &self.submitted {
            let data = client.read(block * BLOCK_BYTES_U64, BLOCK_BYTES)?;
            let oldest = self.answered.get(&block).copied();
            let Some(oldest) = oldest else { continue };
            let fits = (oldest..=newest).any(|version| data == content(block, version));
            ensure!(fits, "{export}: block {block} lost the acknowledged version {oldest}");
        }
        Ok(())
    }
}
