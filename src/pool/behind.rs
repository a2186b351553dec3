//! A thread that writes one buffer of a write set while the next is filled: hashing and the device
//! take turns no longer.
//!
//! Made by a write set that fills its buffer a second time; ends with it. One buffer is under way
//! at a time. Nothing is known of it before [`Behind::wait`] has returned: neither may the blocks
//! be read, nor given to anybody else, nor may the device be flushed for them. A failed write
//! latches the pool on that thread, and is told by the next call here.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::device::buffer::AlignedBuffer;
use crate::units::machine;
use crate::units::numbers::Pbn;

use super::Pool;
use super::error::PoolError;

/// A buffer and which part of it goes where.
#[derive(Debug)]
pub(super) struct Filled {
    pub(super) first: Pbn,
    pub(super) buffer: AlignedBuffer,
    pub(super) bytes: usize,
}

/// The buffer again, and how it went.
type Written = (AlignedBuffer, Result<(), PoolError>);

/// The thread, as its owner sees it.
#[derive(Debug)]
pub(super) struct Behind {
    filled: Option<SyncSender<Filled>>,
    written: Receiver<Written>,
    thread: Option<JoinHandle<()>>,
    under_way: bool,
}

impl Behind {
    /// A thread that waits for the first buffer.
    pub(super) fn start(pool: &Arc<Pool>) -> io::Result<Self> {
        // One is under way at a time: nobody waits to hand one over.
        let (filled, buffers) = sync_channel::<Filled>(1);
        let (answer, written) = sync_channel::<Written>(1);
        let pool = Arc::clone(pool);
        let thread = machine::spawn("pool-write", move || {
            for Filled { first, buffer, bytes } in buffers {
                let result = pool.write_blocks(first, &buffer[..bytes]);
                if answer.send((buffer, result)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { filled: Some(filled), written, thread: Some(thread), under_way: false })
    }

    /// Whether the caller has not waited for what it handed over.
    pub(super) const fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// Waits until nothing is under way; gives the buffer of the last one back, if there was one.
    pub(super) fn wait(&mut self) -> Result<Option<AlignedBuffer>, PoolError> {
        if !self.under_way {
            return Ok(None);
        }
        // Of a thread that is gone it stays under way for ever: every later wait fails as well.
        let (buffer, result) = self.written.recv().map_err(|_| gone())?;
        self.under_way = false;
        result.map(|()| Some(buffer))
    }

    /// Has a buffer written, behind the one before; gives that one's back.
    pub(super) fn write(&mut self, filled: Filled) -> Result<Option<AlignedBuffer>, PoolError> {
        let free = self.wait()?;
        let sender = self.filled.as_ref().ok_or_else(gone)?;
        sender.send(filled).map_err(|_| gone())?;
        self.under_way = true;
        Ok(free)
    }
}

fn gone() -> PoolError {
    PoolError::Inconsistent { what: "the thread that writes blocks has failed".to_owned() }
}

impl Drop for Behind {
    /// What is under way is in place, or has failed, when this returns.
    fn drop(&mut self) {
        self.filled = None;
        let Some(thread) = self.thread.take() else { return };
        if machine::join(thread).is_err() {
            tracing::error!("the thread that writes blocks has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Condvar, Mutex};
    use std::thread;

    use super::*;
    use crate::device::sim::{Effect, On, SimDevice};
    use crate::device::{Device, DeviceError, Durability};
    use crate::limits::POOL_IO_BYTES_MAX;
    use crate::pool::PoolOptions;
    use crate::pool::testing::{Chance, new_device, random_block};
    use crate::pool::write_set::{Budget, WriteSet};
    use crate::units::BLOCK_BYTES_U64;
    use crate::units::hash::crc32c;
    use crate::units::numbers::ByteCount;

    const BUFFER_BLOCKS: u64 = POOL_IO_BYTES_MAX / BLOCK_BYTES_U64;

    /// Large writes wait while it is shut.
    #[derive(Debug)]
    struct Gate {
        device: Arc<SimDevice>,
        /// Whether it is shut, and how many wait.
        state: Mutex<(bool, u32)>,
        changed: Condvar,
    }

    impl Gate {
        fn shut(&self, shut: bool) {
            self.state.lock().unwrap().0 = shut;
            self.changed.notify_all();
        }

        fn until_one_waits(&self) {
            let mut state = self.state.lock().unwrap();
            while state.1 == 0 {
                state = self.changed.wait(state).unwrap();
            }
        }
    }

    impl Device for Gate {
        fn name(&self) -> Arc<str> {
            self.device.name()
        }

        fn size(&self) -> ByteCount {
            self.device.size()
        }

        fn alignment(&self) -> ByteCount {
            self.device.alignment()
        }

        fn durability(&self) -> Durability {
            self.device.durability()
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
            self.device.read_at(offset, buffer)
        }

        fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
            let mut state = self.state.lock().unwrap();
            while state.0 && bytes.len() > 4096 {
                state.1 += 1;
                self.changed.notify_all();
                state = self.changed.wait(state).unwrap();
                state.1 -= 1;
            }
            drop(state);
            self.device.write_at(offset, bytes)
        }

        fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
            self.device.write_durable_at(offset, bytes)
        }

        fn flush(&self) -> Result<(), DeviceError> {
            self.device.flush()
        }
    }

    fn gated() -> (Arc<Gate>, Arc<Pool>) {
        let (state, changed) = (Mutex::new((false, 0)), Condvar::new());
        let gate = Arc::new(Gate { device: new_device(64 << 20), state, changed });
        let device: Arc<dyn Device> = Arc::<Gate>::clone(&gate);
        let pool = Pool::create(device, [1; 16], PoolOptions::default()).unwrap();
        (gate, pool)
    }

    fn append(set: &mut WriteSet, chance: &mut Chance, blocks: u64) -> Vec<(Pbn, u32)> {
        let one = |_| {
            let block = random_block(chance);
            (set.append(&block).unwrap(), crc32c(&block))
        };
        (0..blocks).map(one).collect()
    }

    /// What is under way is waited for before anybody reads it.
    #[test]
    fn what_is_written_beside_can_be_read_after_the_flush() {
        let (gate, pool) = gated();
        let mut set = pool.begin(Budget::Ordinary);
        set.write_beside();
        let mut chance = Chance::new(3);
        let mut blocks = append(&mut set, &mut chance, BUFFER_BLOCKS + 1);
        gate.shut(true);
        // The second buffer is under way, the third one is begun meanwhile.
        blocks.extend(append(&mut set, &mut chance, BUFFER_BLOCKS + 7));
        gate.until_one_waits();
        let waits = Arc::clone(&gate);
        let opener = thread::spawn(move || waits.shut(false));
        set.flush_buffer().unwrap();
        opener.join().unwrap();
        blocks.extend(append(&mut set, &mut chance, 5 * BUFFER_BLOCKS + 1));
        set.flush_buffer().unwrap();
        for (pbn, crc) in blocks {
            let mut block = [0; crate::units::BLOCK_BYTES];
            pool.read_block(pbn, crc, &mut block).unwrap();
        }
    }

    /// Blocks of a CP that is given up go back when nothing writes to them any more.
    #[test]
    fn a_set_that_is_dropped_waits_for_what_is_under_way() {
        let (gate, pool) = gated();
        let free = pool.space().unwrap().free;
        let mut set = pool.begin(Budget::Ordinary);
        set.write_beside();
        append(&mut set, &mut Chance::new(4), BUFFER_BLOCKS + 1);
        gate.shut(true);
        append(&mut set, &mut Chance::new(5), BUFFER_BLOCKS);
        gate.until_one_waits();
        let dropped = Arc::new(AtomicBool::new(false));
        let says = Arc::clone(&dropped);
        let dropper = thread::spawn(move || {
            drop(set);
            says.store(true, Ordering::SeqCst);
        });
        for _ in 0..1000 {
            thread::yield_now();
            assert!(!dropped.load(Ordering::SeqCst), "dropped while it was being written");
            assert!(pool.space().unwrap().free < free, "given back while it was being written");
        }
        gate.shut(false);
        dropper.join().unwrap();
        assert_eq!(pool.space().unwrap().free, free);
    }

    /// A write that fails beside is told, and nothing is committed on the pool any more.
    #[test]
    fn a_write_that_fails_latches_the_pool_and_is_told() {
        let (gate, pool) = gated();
        let mut set = pool.begin(Budget::Ordinary);
        set.write_beside();
        let mut chance = Chance::new(6);
        append(&mut set, &mut chance, BUFFER_BLOCKS + 1);
        gate.device.fail(On::Write, 0, Effect::Errno(5));
        append(&mut set, &mut chance, BUFFER_BLOCKS);
        let error = set.flush_buffer().unwrap_err();
        assert!(matches!(error, PoolError::Device(_)), "{error}");
        assert!(
            set.append(&[7; crate::units::BLOCK_BYTES]).is_err() || set.flush_buffer().is_err()
        );
        assert!(pool.check_latch().is_err());
    }
}
