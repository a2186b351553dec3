//! The clients of one source: they write, trim, zero and read as long as they are told, and note
//! what was ordered and what was answered.
//!
//! A client lives in its source's process: a crash takes it along, and what it had asked for is
//! neither acknowledged nor lost. Reads are judged at once: what is read must be the content at one
//! moment between question and answer.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;

use super::line::{Change, Done};
use super::probes::Probe;
use super::setup::{SourceSetup, VOLUMES};
use super::world::{Primary, SourceState};
use crate::device::sim::Chance;
use crate::filer::Filer;
use crate::filer::shared::Shared;
use crate::nbd::export::{ErrorCode, Export, Exports, Segment};
use crate::units::convert::{low_u32, to_usize};
use crate::units::numbers::{ByteCount, VolumeNumber};
use crate::units::policy::Cache;

/// A request, watched: whatever is ordered while it is polled is its own.
struct Watched<F> {
    inner: Pin<Box<F>>,
    by: Primary,
    shared: Arc<Shared>,
    state: Rc<RefCell<SourceState>>,
    done: Option<Done>,
    sequence: Option<u64>,
}

impl<T, F: Future<Output = T>> Future for Watched<F> {
    type Output = (T, Option<u64>);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let before = self.shared.order.figures().sequence.0;
        let polled = self.inner.as_mut().poll(context);
        let after = self.shared.order.figures().sequence.0;
        if after > before
            && let Some(done) = self.done.take()
        {
            self.sequence = Some(after);
            let mut state = self.state.borrow_mut();
            // What is ordered by an end that is not primary is of another line: the source's is known.
            if state.primary == self.by {
                let noted = state.line.ordered(after, done);
                state.judge(noted);
            } else if self.by == Primary::Source
                && let Some(own) = &mut state.own_line
            {
                let noted = own.ordered(after, done);
                state.judge(noted);
            }
        }
        match polled {
            Poll::Ready(answer) => Poll::Ready((answer, self.sequence)),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// One client until it is told to stop, or refused.
pub(super) async fn client(
    by: Primary,
    filer: Arc<Filer>,
    state: Rc<RefCell<SourceState>>,
    setup: SourceSetup,
    mut chance: Chance,
) {
    let mut volumes: Vec<Arc<dyn Export>> = Vec::new();
    for number in 0..VOLUMES {
        let Ok(export) = filer.exports().open(&format!("vol{number}")).await else { return };
        volumes.push(export);
    }
    loop {
        let pause = Duration::from_micros(chance.below(setup.think_ms * 1000));
        tokio::time::sleep(pause).await;
        if state.borrow().resting {
            continue;
        }
        let volume = to_usize(chance.below(u64::from(VOLUMES)));
        if setup.grows && chance.below(8) == 0 {
            // Who connects anew sees how large it is by now; it does not become smaller.
            let before = volumes[volume].info().size;
            let Ok(export) = filer.exports().open(&format!("vol{volume}")).await else { return };
            let after = export.info().size;
            if after > before {
                state.borrow_mut().probes.hit(Probe::Grown);
            }
            if after < before {
                let problem = format!("volume {volume} had {before} bytes and has {after}");
                state.borrow_mut().judge::<()>(Err(problem));
            }
            volumes[volume] = export;
        }
        let export = &volumes[volume];
        let going_on = if chance.below(8) == 0 {
            read((by, &filer), export, volume, &state, &mut chance).await
        } else {
            change((by, &filer), export, volume, (&state, &setup), &mut chance).await
                && flush((by, &filer), export, volume, (&state, &setup), &mut chance).await
        };
        if !going_on {
            return;
        }
    }
}

/// Where a request begins, and how long it is.
fn range(chance: &mut Chance, export: &Arc<dyn Export>, bytes_max: u64) -> (u64, u64) {
    let ByteCount(size) = export.info().size;
    let (unit, most) = if chance.below(3) == 0 { (1, bytes_max) } else { (4096, bytes_max) };
    let length = (1 + chance.below(most)).next_multiple_of(unit).min(size);
    let offset = chance.below(size - length + 1) / unit * unit;
    (offset, length)
}

async fn change(
    (by, filer): (Primary, &Filer),
    export: &Arc<dyn Export>,
    volume: usize,
    (state, setup): (&Rc<RefCell<SourceState>>, &SourceSetup),
    chance: &mut Chance,
) -> bool {
    let (offset, length) = range(chance, export, setup.request_bytes);
    let change = match chance.below(12) {
        0 => Change::Trim(length),
        1 => Change::Zeroes(length),
        2 => Change::Write(vec![0; to_usize(length)]),
        _ => {
            let stamp = chance.next_u64().to_le_bytes();
            Change::Write(stamp.iter().copied().cycle().take(to_usize(length)).collect())
        }
    };
    let number = VolumeNumber(low_u32(u64::try_from(volume).unwrap()));
    let done = Done { volume: number, offset, change: change.clone() };
    let fua = setup.policy.cache == Cache::Writeback && chance.below(8) == 0;
    let inner = async {
        match change {
            Change::Write(data) => export.write(offset, Bytes::from(data), fua).await,
            Change::Trim(length) => export.trim(offset, low_u32(length), fua).await,
            Change::Zeroes(length) => {
                export.write_zeroes(offset, low_u32(length), false, fua).await
            }
        }
    };
    let (shared, done) = (filer.shared(), Some(done));
    let inner = Box::pin(inner);
    let watched = Watched {
        by,
        inner,
        shared: Arc::clone(&shared),
        state: Rc::clone(state),
        done,
        sequence: None,
    };
    let (answer, sequence) = watched.await;
    match (answer, sequence) {
        // A buffered write promises nothing before a flush.
        (Ok(()), Some(_)) if setup.policy.cache == Cache::Writeback && !fua => {}
        (Ok(()), Some(sequence)) => state.borrow_mut().acknowledged(by, &shared, sequence),
        (Ok(()), None) => {}
        // Room may come back.
        (Err(error), _) if error.code == ErrorCode::NoSpc => {}
        (Err(_), _) => return false,
    }
    true
}

/// Under writeback now and then: every write of the volume that was answered by now is promised.
async fn flush(
    (by, filer): (Primary, &Filer),
    export: &Arc<dyn Export>,
    volume: usize,
    (state, setup): (&Rc<RefCell<SourceState>>, &SourceSetup),
    chance: &mut Chance,
) -> bool {
    if setup.policy.cache != Cache::Writeback || chance.below(4) > 0 {
        return true;
    }
    let shared = filer.shared();
    let number = VolumeNumber(low_u32(u64::try_from(volume).unwrap()));
    let sequence = shared.order.last_of(number).0;
    let flushed = export.flush().await.is_ok();
    if flushed && sequence > 0 {
        let mut state = state.borrow_mut();
        state.probes.hit(Probe::Flushed);
        state.acknowledged(by, &shared, sequence);
    }
    flushed
}

async fn read(
    (by, filer): (Primary, &Filer),
    export: &Arc<dyn Export>,
    volume: usize,
    state: &Rc<RefCell<SourceState>>,
    chance: &mut Chance,
) -> bool {
    let (offset, length) = range(chance, export, 32 << 10);
    let shared = filer.shared();
    let before = shared.order.figures().sequence.0;
    let Ok(segments) = export.read(offset, low_u32(length)).await else { return false };
    let after = shared.order.figures().sequence.0;
    let mut bytes = Vec::new();
    for segment in segments {
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(&data),
            Segment::Hole(count) => bytes.resize(bytes.len() + to_usize(count), 0),
        }
    }
    let mut state = state.borrow_mut();
    if state.primary != by {
        if state.setup.policy.never_alone() {
            state.judge::<()>(Err("R12: a source that was failed over answers reads".to_owned()));
        }
        return false;
    }
    let range = to_usize(offset)..to_usize(offset + length);
    let mut found = false;
    for sequence in (before..=after).rev() {
        match state.line.content(sequence) {
            Ok(contents) => found |= contents[volume][range.clone()] == bytes[..],
            Err(problem) => state.judge::<()>(Err(problem)),
        }
        if found {
            break;
        }
    }
    if !found {
        let problem = format!("a read of {offset}+{length} is the content of no moment");
        state.judge::<()>(Err(problem));
    }
    true
}
