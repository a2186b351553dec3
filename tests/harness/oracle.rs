//! The oracle: a client that knows which of its writes were answered.
//!
//! It writes numbered versions of blocks over its own NBD connection and keeps, outside the
//! volume, the newest answered and the newest submitted version of each block. After any crash a
//! block must hold a version between the two: older is a lost acknowledged write, anything else
//! is torn or foreign.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mirrorhub::nbd::client::Client;

use super::{pause, wait_for};

const BLOCK: usize = 4096;

/// What the client knows of one volume.
#[derive(Debug, Default, Clone)]
pub struct Known {
    answered: HashMap<u64, u64>,
    submitted: HashMap<u64, u64>,
    next: u64,
}

/// Content of a version of a block: every 16 bytes name block and version.
pub fn content(block: u64, version: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(BLOCK);
    for _ in 0..BLOCK / 16 {
        data.extend_from_slice(&block.to_le_bytes());
        data.extend_from_slice(&version.to_le_bytes());
    }
    data
}

/// The version that `data` holds: 0 if it is all zero, an error if it is torn or foreign.
pub fn version_of(block: u64, data: &[u8]) -> Result<u64, String> {
    if data.iter().all(|&byte| byte == 0) {
        return Ok(0);
    }
    let version = u64::from_le_bytes(data[8..16].try_into().expect("eight bytes"));
    if data == content(block, version) {
        Ok(version)
    } else {
        Err(format!("block {block} is torn or foreign (begins with version {version})"))
    }
}

impl Known {
    /// Writes answered so far.
    pub fn answered(&self) -> u64 {
        u64::try_from(self.answered.len()).expect("small")
    }

    /// Checks what `read` returns for every block that was ever written.
    pub fn check(&self, mut read: impl FnMut(u64) -> Vec<u8>) -> Result<(), String> {
        for (&block, &newest) in &self.submitted {
            let oldest = self.answered.get(&block).copied().unwrap_or(0);
            let version = version_of(block, &read(block))?;
            if version < oldest || version > newest {
                return Err(format!(
                    "block {block} holds version {version}, answered was {oldest}, newest {newest}"
                ));
            }
        }
        Ok(())
    }

    /// Whether `read` returns exactly what was answered last, of a client that has come to rest,
    /// for every block that it wrote.
    pub fn is_exactly(&self, mut read: impl FnMut(u64) -> Vec<u8>) -> bool {
        self.answered.iter().all(|(&block, &version)| read(block) == content(block, version))
    }

    /// Blocks whose newest answered version is not what `read` returns or newer.
    pub fn lost(&self, mut read: impl FnMut(u64) -> Vec<u8>) -> Result<u64, String> {
        let mut lost = 0;
        for (&block, &oldest) in &self.answered {
            lost += u64::from(version_of(block, &read(block))? < oldest);
        }
        Ok(lost)
    }

    /// Checks a volume or image over a connection of its own.
    pub fn check_export(&self, socket: &Path, export: &str) -> Result<(), String> {
        let mut client =
            Client::unix(socket, export, Duration::from_secs(20)).map_err(|e| e.to_string())?;
        self.check(|block| client.read(block * 4096, BLOCK).expect("read of a checked block"))
    }
}

/// What a writer met so far.
#[derive(Debug, Default)]
struct Met {
    answered: AtomicU64,
    /// When the first answer came, and when the write was submitted that was answered last.
    served: Mutex<Option<(Instant, Instant)>>,
}

/// A writer at work in a thread of its own.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    met: Arc<Met>,
    thread: Option<JoinHandle<Known>>,
}

impl Writer {
    /// Writes random blocks of `export` with `depth` requests under way until told to stop or
    /// until the connection breaks.
    pub fn start(socket: PathBuf, export: &str, known: Known, depth: usize, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let met = Arc::<Met>::default();
        let (stopped, seen, export) = (stop.clone(), met.clone(), export.to_owned());
        let thread = std::thread::spawn(move || {
            write(&socket, &export, known, depth, seed, &stopped, &seen)
        });
        Self { stop, met, thread: Some(thread) }
    }

    /// Writes answered since the start.
    pub fn answered(&self) -> u64 {
        self.met.answered.load(Ordering::Relaxed)
    }

    /// When its first answer came, and when it submitted the write that was answered last.
    pub fn served(&self) -> Option<(Instant, Instant)> {
        *self.met.served.lock().expect("a lock")
    }

    /// Waits until that many writes were answered.
    pub fn wait_answered(&self, count: u64) {
        wait_for(&format!("{count} answered writes"), Duration::from_secs(30), || {
            self.answered() >= count
        });
    }

    /// Whether its connection has come to an end.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Lets it submit no more and waits until it has its answers.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        wait_for("the writer comes to rest", Duration::from_secs(30), || self.has_ended());
    }

    /// Ends the writer; what it knows.
    pub fn finish(mut self) -> Known {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("finished once").join().expect("the writer does not panic")
    }
}

fn write(
    socket: &Path,
    export: &str,
    mut known: Known,
    depth: usize,
    seed: u64,
    stop: &AtomicBool,
    met: &Met,
) -> Known {
    let mut client = None;
    for _ in 0..500 {
        match Client::unix(socket, export, Duration::from_secs(30)) {
            Ok(connected) => {
                client = Some(connected);
                break;
            }
            Err(_) if stop.load(Ordering::Relaxed) => return known,
            Err(_) => pause(Duration::from_millis(20)),
        }
    }
    let mut client = client.expect("the volume can be opened");
    let blocks = client.size() / 4096;
    let mut state = seed | 1;
    let mut under_way: HashMap<u64, (u64, u64, Instant)> = HashMap::new();
    let mut busy: HashSet<u64> = HashSet::new();
    loop {
        while under_way.len() < depth && !stop.load(Ordering::Relaxed) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let block = state % blocks;
            if !busy.insert(block) {
                continue;
            }
            known.next += 1;
            let version = known.next;
            known.submitted.insert(block, version);
            let submitted = Instant::now();
            match client.submit_write(block * 4096, &content(block, version)) {
                Ok(cookie) => under_way.insert(cookie, (block, version, submitted)),
                Err(_) => return known,
            };
        }
        if under_way.is_empty() {
            return known;
        }
        let Ok(reply) = client.reply() else { return known };
        let known_request = under_way.remove(&reply.cookie);
        let (block, version, submitted) = known_request.expect("an answer to a request");
        busy.remove(&block);
        match reply.result {
            Ok(_) => {
                known.answered.insert(block, version);
                met.answered.fetch_add(1, Ordering::Relaxed);
                let mut served = met.served.lock().expect("a lock");
                let first = served.map_or_else(Instant::now, |(first, _)| first);
                *served = Some((first, submitted));
            }
            Err(_) => return known,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The negative control of every test that uses the oracle: it sees what is lost or torn.
    #[test]
    fn lost_torn_and_foreign_blocks_are_seen() {
        let mut known = Known::default();
        known.submitted.insert(3, 9);
        known.answered.insert(3, 7);
        for good in 7..=9 {
            assert_eq!(known.check(|block| content(block, good)), Ok(()));
        }
        assert!(known.check(|block| content(block, 6)).is_err());
        assert!(known.check(|block| content(block, 10)).is_err());
        assert!(known.check(|_| vec![0; 4096]).is_err());
        assert!(known.check(|block| content(block + 1, 8)).is_err());
        let torn = |block| [&content(block, 7)[..512], &content(block, 8)[512..]].concat();
        assert!(known.check(torn).is_err());
        assert_eq!(known.lost(|block| content(block, 6)), Ok(1));
        assert_eq!(known.lost(|block| content(block, 8)), Ok(0));
        assert!(known.is_exactly(|block| content(block, 7)));
        assert!(!known.is_exactly(|block| content(block, 8)));
    }
}
