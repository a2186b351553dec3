//! Figures of the NVRAM ring, beside what the disk itself does in the same run.
//!
//! `cargo bench --bench nvlog [DIRECTORY]` (default: the temporary directory). One durable append
//! of a 4 KiB write, from the caller's `wake` to the feed's `committed` on the other thread, is
//! measured in turns with a bare durable write to a preallocated, written file: of 4 KiB, and of the
//! bytes that the record has. Then 32 callers append at once. Prints, and checks nothing.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use mirrorhub::device::buffer::AlignedBuffer;
use mirrorhub::device::file::{Access, FileDevice};
use mirrorhub::device::latch::Latch;
use mirrorhub::device::{Device, DeviceError};
use mirrorhub::nvlog::{
    Committed, DurableToken, Feed, Handle, Pending, Ring, RingOptions, RingShape,
};
use mirrorhub::record::envelope::{RecordKind, record_bytes};
use mirrorhub::units::convert::{to_f64, to_u64, to_usize};
use mirrorhub::units::ids::SourceId;
use mirrorhub::units::numbers::{ByteCount, Epoch, LogPosition};

const ROUNDS: u64 = 3000;
const AREA_BYTES: u64 = 64 << 20;
/// A 4 KiB write as a transfer: header, one entry, data.
const BODY_BYTES: usize = 80 + 24 + 4096;
const CALLERS: u64 = 32;

fn main() -> anyhow::Result<()> {
    // Cargo passes `--bench`; anything that is no option is the directory.
    let directory = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let root = directory.map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(&root).context("no place for the files")?;
    let size = ByteCount(AREA_BYTES + 8192);
    let bare = FileDevice::create(&dir.path().join("bare"), size, Access::Direct)?;
    let ring = FileDevice::create(&dir.path().join("ring"), size, Access::Direct)?;
    println!("{}: durable writes by {}", root.display(), ring.durability());

    let device: Arc<dyn Device> = Arc::new(Latch::new(ring));
    Ring::create(Arc::clone(&device), [1; 16], RingShape::default())?;
    let begin = Instant::now();
    let (ring, _) = Ring::open(device, [1; 16], RingOptions::default(), &mut |_| {})?;
    println!("opening an empty ring of {} MiB: {:?}", AREA_BYTES >> 20, begin.elapsed());
    let (sender, done) = sync_channel(to_usize(CALLERS));
    let queue = Arc::new(Mutex::new(Vec::new()));
    let feed = BenchFeed { queue: Arc::clone(&queue), sender };
    let handle = ring.start(Box::new(feed));
    let caller = Caller { queue, handle, done };
    one_at_a_time(&caller, &bare)?;
    many_at_once(&caller)?;
    caller.handle.stop();
    Ok(())
}

struct BenchFeed {
    queue: Arc<Mutex<Vec<Pending>>>,
    sender: SyncSender<LogPosition>,
}

impl Feed for BenchFeed {
    fn take(&mut self, _bytes_max: u64) -> Vec<Pending> {
        // At most 32 are ever queued: far below one commit.
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn committed(&mut self, batch: Vec<Committed>, _token: &DurableToken) {
        for committed in batch {
            if self.sender.send(committed.end).is_err() {
                return;
            }
        }
    }

    fn failed(&mut self, error: &DeviceError) {
        eprintln!("{error}");
    }
}

struct Caller {
    queue: Arc<Mutex<Vec<Pending>>>,
    handle: Handle,
    done: Receiver<LogPosition>,
}

impl Caller {
    fn append(&self, ticket: u64, body: &Bytes) {
        let pending = Pending {
            kind: RecordKind::Transfer,
            source: SourceId([2; 16]),
            epoch: Epoch { number: 1, id: 1 },
            body: body.clone(),
            ticket,
        };
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(pending);
        self.handle.wake();
    }

    fn wait(&self) -> anyhow::Result<LogPosition> {
        self.done.recv().context("the ring failed")
    }
}

fn one_at_a_time(caller: &Caller, bare: &FileDevice) -> anyhow::Result<()> {
    let record = to_usize(record_bytes(to_u64(BODY_BYTES)));
    let block = AlignedBuffer::new(8192);
    let body = Bytes::from(vec![7; BODY_BYTES]);
    let mut times = [(); 3].map(|()| Vec::new());
    let (mut at, mut at_record) = (0, 0);
    for ticket in 0..ROUNDS {
        times[0].push(timed(|| Ok(bare.write_durable_at(at, &block[..4096])?))?);
        at = (at + 4096) % (AREA_BYTES / 2);
        let place = AREA_BYTES / 2 + at_record;
        times[1].push(timed(|| Ok(bare.write_durable_at(place, &block[..record])?))?);
        at_record = (at_record + to_u64(record)) % (AREA_BYTES / 2 - 8192);
        let mut end = LogPosition(0);
        times[2].push(timed(|| {
            caller.append(ticket, &body);
            end = caller.wait()?;
            Ok(())
        })?);
        caller.handle.release(end);
    }
    let names = ["bare write of 4096 bytes", "bare write of a record", "append to the ring"];
    let base = percentile(&mut times[0], 50);
    for (name, times) in names.into_iter().zip(&mut times) {
        let (p50, p99) = (percentile(times, 50), percentile(times, 99));
        let ratio = p50.as_secs_f64() / base.as_secs_f64();
        println!("{name}: p50 {p50:?} ({ratio:.2} of the first), p99 {p99:?}");
    }
    Ok(())
}

fn many_at_once(caller: &Caller) -> anyhow::Result<()> {
    let body = Bytes::from(vec![7; BODY_BYTES]);
    let before = caller.handle.status();
    let begin = Instant::now();
    for ticket in 0..CALLERS {
        caller.append(ticket, &body);
    }
    let appends = ROUNDS * 10;
    for ticket in CALLERS..appends + CALLERS {
        let end = caller.wait()?;
        if ticket % 64 == 0 {
            caller.handle.release(end);
        }
        if ticket < appends {
            caller.append(ticket, &body);
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    let after = caller.handle.status();
    let per_sync = to_f64(appends) / to_f64(after.syncs - before.syncs);
    println!(
        "{CALLERS} at once: {:.0} appends a second, {per_sync:.1} a sync",
        to_f64(appends) / seconds
    );
    Ok(())
}

fn timed(call: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    call()?;
    Ok(begin.elapsed())
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times.get(times.len() * percent / 100).copied().unwrap_or_default()
}
