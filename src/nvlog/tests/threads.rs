//! The real thread: grouping, waiting, idling, stopping, failing.

use std::sync::Condvar;
use std::time::Instant;

use super::*;
use crate::device::file::{Access, FileDevice};
use crate::device::latch::Latch;
use crate::device::sim::{Effect, On};
use crate::units::convert::to_u64;

const NEVER: Duration = Duration::from_secs(3600);

fn start(sim: &Arc<SimDevice>, idle_header_after: Duration) -> (Handle, TestFeed) {
    let options = RingOptions { idle_header_after, ..RingOptions::default() };
    let (ring, _) = Ring::open(sim.clone(), OWNER, options, &mut |_| {}).unwrap();
    let feed = TestFeed::default();
    (ring.start(Box::new(feed.clone())), feed)
}

/// Waits for what another thread is going to do; a test that waits in vain fails.
fn until(mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited in vain");
        std::thread::yield_now();
    }
}

/// Goal: what arrives during a commit shares the next one. Method: hold the first durable write,
/// queue from eight threads, let go, count the writes.
#[test]
fn records_of_many_threads_share_a_sync() {
    let sim = small_ring(16);
    let (handle, feed) = start(&sim, NEVER);
    let syncs = |status: &RingStatus| (status.commits, status.syncs);
    sim.hold();
    feed.push(0, 1);
    handle.wake();
    sim.wait_held(1);
    std::thread::scope(|scope| {
        for ticket in 1..8 {
            let (handle, feed) = (handle.clone(), feed.clone());
            scope.spawn(move || {
                feed.push(ticket, 1);
                handle.wake();
            });
        }
    });
    assert_eq!(handle.status().commits, 0);
    assert!(feed.tickets().is_empty(), "nothing is committed before its write returned");
    sim.let_go();
    until(|| feed.tickets().len() == 8);
    assert_eq!(syncs(&handle.status()), (2, 2), "seven records, one sync");
    assert_eq!(handle.status().bytes, 8 * 512);
    // Control: one at a time is one sync each.
    for ticket in 8..12 {
        feed.push(ticket, 1);
        handle.wake();
        until(|| to_u64(feed.tickets().len()) == ticket + 1);
    }
    assert_eq!(syncs(&handle.status()), (6, 6));
    handle.stop();
}

/// Goal: status never waits for the data path. Method: it is asked for while the ring's lock is held.
/// Control: who asks for room does wait.
#[test]
fn status_is_read_while_the_lock_is_held() {
    let sim = small_ring(16);
    let (handle, feed) = start(&sim, NEVER);
    feed.push(0, 1);
    handle.wake();
    until(|| feed.tickets().len() == 1);
    let before = handle.status_under_lock();
    assert_eq!((before.commits, before.bytes), (1, 512));
    let held = handle.hold();
    let (sender, answers) = std::sync::mpsc::channel();
    let (to_room, room) = (sender.clone(), handle.clone());
    let status = handle.clone();
    let asks = std::thread::spawn(move || sender.send(Ok(status.status())));
    let first = answers.recv_timeout(Duration::from_secs(20)).expect("status waits for the lock");
    assert_eq!(first, Ok(before));
    let waits = std::thread::spawn(move || to_room.send(Err(room.room())));
    answers.recv_timeout(Duration::from_millis(50)).expect_err("the control takes the lock");
    drop(held);
    assert!(answers.recv_timeout(Duration::from_secs(20)).expect("room is told").is_err());
    asks.join().unwrap().unwrap();
    waits.join().unwrap().unwrap();
    handle.stop();
}

/// A feed whose clients wait for their own commit.
#[derive(Clone, Default)]
struct Waiters(Arc<(Mutex<Queue>, Condvar)>);

impl Feed for Waiters {
    fn take(&mut self, bytes_max: u64) -> Vec<Pending> {
        let mut queue = self.0.0.lock().unwrap();
        let count = to_u64(queue.pending.len()).min(bytes_max / 1024);
        queue.pending.drain(..usize::try_from(count).unwrap()).collect()
    }

    fn committed(&mut self, batch: Vec<Committed>, token: &DurableToken) {
        let mut queue = self.0.0.lock().unwrap();
        queue.upto = token.upto();
        queue.committed.extend(batch);
        self.0.1.notify_all();
    }

    fn failed(&mut self, error: &DeviceError) {
        panic!("{error}");
    }
}

/// Goal: no wake-up is lost. Method: four threads push, wake and wait for their own record, 500
/// times, while the ring goes round and is released; one lost wake-up would hang this.
#[test]
fn no_wake_up_is_lost() {
    let sim = small_ring(4);
    let options = RingOptions { idle_header_after: NEVER, ..RingOptions::default() };
    let (ring, _) = Ring::open(sim.clone(), OWNER, options, &mut |_| {}).unwrap();
    let feed = Waiters::default();
    let handle = ring.start(Box::new(feed.clone()));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (handle, shared) = (handle.clone(), Arc::clone(&feed.0));
            scope.spawn(move || {
                for n in 0..500 {
                    let ticket = n * 4 + thread;
                    shared.0.lock().unwrap().pending.push_back(pending(ticket, 2));
                    handle.wake();
                    let mut queue = shared.0.lock().unwrap();
                    let place = loop {
                        let mine = |committed: &&Committed| committed.ticket == ticket;
                        if let Some(committed) = queue.committed.iter().rev().find(mine) {
                            break (committed.position, committed.end);
                        }
                        queue = shared.1.wait(queue).unwrap();
                    };
                    assert!(place.1 <= queue.upto);
                    let all = queue.upto;
                    drop(queue);
                    if n % 3 == 0 {
                        handle.release(all);
                    }
                }
            });
        }
    });
    handle.release(handle.status().durable);
    handle.stop();
    let status = handle.status();
    assert_eq!(status.bytes, 2000 * 1024);
    assert_eq!(status.released, status.durable);
    assert_eq!(status.room_used(), 0);
}

impl RingStatus {
    fn room_used(&self) -> u64 {
        self.written.0 - self.released.0
    }
}

/// Goal: a full ring keeps what it took, takes no more, and goes on with the next release.
/// Goal: what must be written so that room comes back never waits behind what wants room (R10).
/// Method: fill the ring until a record waits, put another first: it is committed into the spare.
#[test]
fn what_is_first_overtakes_a_full_ring() {
    let sim = small_ring(16);
    let largest = SMALL.commit_bytes_max.min(RECORD_BYTES_MAX);
    let options = RingOptions { spare_bytes: largest, ..RingOptions::default() };
    let (ring, _) = Ring::open(sim.clone(), OWNER, options, &mut |_| {}).unwrap();
    let feed = TestFeed::default();
    let handle = ring.start(Box::new(feed.clone()));
    let mut ticket = 0;
    while handle.status().held_records == 0 {
        let seen = to_u64(feed.tickets().len());
        feed.push(ticket, 1);
        handle.wake();
        until(|| handle.status().held_records > 0 || to_u64(feed.tickets().len()) > seen);
        ticket += 1;
    }
    let before = feed.tickets();
    assert!(before.len() + 1 >= usize::try_from(ticket).unwrap());
    assert_eq!(handle.room(), 0, "what is kept for copies is in nobody's credit");
    feed.queue().first.push(pending(1000, 1));
    handle.wake();
    until(|| feed.tickets().contains(&1000));
    assert_eq!(feed.tickets().len(), before.len() + 1, "nobody else used the spare");
    assert_eq!(handle.status().held_records, 1);
    // Its copy is durable: the oldest goes, and he who waited is served.
    handle.release(LogPosition(feed.queue().committed[1].end.0));
    until(|| handle.status().held_records == 0);
    handle.stop();
}

#[test]
fn a_full_ring_waits_for_a_release() {
    let sim = small_ring(1);
    let (handle, feed) = start(&sim, NEVER);
    for ticket in 0..12 {
        feed.push(ticket, 1);
    }
    handle.wake();
    until(|| feed.tickets().len() == 8);
    until(|| handle.status().held_records == 4);
    assert_eq!(handle.room(), 0);
    let takes = feed.queue().takes;
    feed.push(12, 1);
    handle.wake();
    handle.wake();
    assert_eq!(feed.queue().takes, takes, "a waiting ring takes nothing");
    let third = feed.queue().committed[2].end;
    handle.release(third);
    until(|| feed.tickets().len() == 11);
    assert_eq!(handle.status().released, third, "durable before its space was reused");
    assert_eq!(handle.status().held_records, 1);
    handle.release(handle.status().durable);
    until(|| feed.tickets() == Vec::from_iter(0..13));
    handle.stop();
}

/// The release that makes room is in the header before anything is written over it.
#[test]
fn the_header_goes_before_the_reuse() {
    let sim = small_ring(1);
    let (handle, feed) = start(&sim, NEVER);
    (0..8).for_each(|ticket| feed.push(ticket, 1));
    handle.wake();
    until(|| feed.tickets().len() == 8);
    sim.clear_trace();
    handle.release(LogPosition(512));
    feed.push(8, 1);
    handle.wake();
    until(|| feed.tickets().len() == 9);
    let writes: Vec<u64> = sim.trace().iter().map(|call| call.offset).collect();
    assert!(writes.len() == 2 && writes[0] < 8192 && writes[1] == 8192, "{writes:?}");
    handle.stop();
}

#[test]
fn much_released_is_written_down_without_being_asked_for() {
    let sim = small_ring(1);
    let (handle, feed) = start(&sim, NEVER);
    (0..4).for_each(|ticket| feed.push(ticket, 1));
    handle.wake();
    until(|| feed.tickets().len() == 4);
    handle.release(LogPosition(1024));
    assert_eq!(handle.status().released, LogPosition(0), "a quarter is not much");
    handle.release(LogPosition(1536));
    until(|| handle.status().released == LogPosition(1536));
    handle.stop();
}

/// R3: after an idle while the header knows the durable cursor and the release, once.
#[test]
fn an_idle_ring_writes_its_header_once() {
    let sim = small_ring(4);
    let (handle, feed) = start(&sim, Duration::from_millis(5));
    feed.push(0, 1);
    handle.wake();
    until(|| handle.status().syncs == 2);
    handle.release(LogPosition(512));
    until(|| handle.status().released == LogPosition(512));
    assert_eq!(handle.status().syncs, 3);
    let writes = sim.trace().len();
    handle.wake();
    until(|| feed.queue().takes >= 3);
    assert_eq!(sim.trace().len(), writes, "nothing changed, nothing is written");
    // Rot of the last record is told from a torn tail by that header.
    sim.power_cut(1);
    sim.power_on();
    sim.rot(8192 + 200, &[1]);
    let (_, recovery) =
        Ring::open(sim.clone(), OWNER, RingOptions::default(), &mut |_| {}).unwrap();
    assert_eq!(recovery.end, LogPosition(512));
    handle.stop();
}

/// A clean stop commits what the feed has, and leaves a header that knows all of it.
#[test]
fn a_clean_stop_finishes_and_remembers() {
    let sim = small_ring(16);
    let (handle, feed) = start(&sim, NEVER);
    (0..30).for_each(|ticket| feed.push(ticket, 1));
    // No wake: the stop itself looks once more.
    handle.stop();
    assert_eq!(feed.tickets(), Vec::from_iter(0..30));
    handle.stop();
    let calls = sim.calls();
    feed.push(30, 1);
    handle.wake();
    handle.release(LogPosition(512));
    assert_eq!(sim.calls(), calls, "a stopped ring does nothing");
    // The last record rots: the header says that it was durable.
    sim.rot(8192 + 29 * 512 + 200, &[1]);
    let driven = drive(sim).unwrap();
    assert_eq!(borders(&driven.recovery.damage), [(29 * 512, 30 * 512)]);
    assert_eq!(driven.tickets_found(), Vec::from_iter(0..29));
}

#[test]
fn a_stop_of_a_full_ring_leaves_the_rest_uncommitted() {
    let sim = small_ring(1);
    let (handle, feed) = start(&sim, NEVER);
    (0..10).for_each(|ticket| feed.push(ticket, 1));
    handle.stop();
    assert_eq!(feed.tickets(), Vec::from_iter(0..8));
    assert_eq!(handle.status().held_records, 2);
    assert_eq!(drive(sim).unwrap().tickets_found(), Vec::from_iter(0..8));
}

/// A feed that stops its own ring.
struct Stopper(TestFeed, Arc<Mutex<Option<Handle>>>);

impl Feed for Stopper {
    fn take(&mut self, bytes_max: u64) -> Vec<Pending> {
        self.0.take(bytes_max)
    }

    fn committed(&mut self, batch: Vec<Committed>, token: &DurableToken) {
        self.0.committed(batch, token);
        if let Some(handle) = &*self.1.lock().unwrap() {
            handle.stop();
        }
    }

    fn failed(&mut self, error: &DeviceError) {
        self.0.failed(error);
    }
}

#[test]
fn a_stop_from_within_does_not_hang() {
    let sim = small_ring(4);
    let (ring, _) = Ring::open(sim, OWNER, RingOptions::default(), &mut |_| {}).unwrap();
    let feed = TestFeed::default();
    feed.push(1, 1);
    let own = Arc::new(Mutex::new(Some(ring.handle())));
    let handle = ring.start(Box::new(Stopper(feed.clone(), Arc::clone(&own))));
    until(|| feed.tickets() == [1]);
    handle.stop();
    own.lock().unwrap().take();
}

/// A ring that never got a feed ends with its owner and frees its device.
#[test]
fn a_ring_dropped_before_its_start_frees_the_device() {
    let sim = small_ring(4);
    let (ring, _) = Ring::open(sim.clone(), OWNER, RingOptions::default(), &mut |_| {}).unwrap();
    drop(ring);
    assert_eq!(Arc::strong_count(&sim), 1);
}

/// Goal: an error is told once, latches, and is never retried; reads go on.
#[test]
fn the_first_error_latches_the_ring() {
    for effect in [Effect::Errno(5), Effect::Errno(28), Effect::Short(512), Effect::PowerCut] {
        let sim = small_ring(4);
        let (handle, feed) = start(&sim, NEVER);
        feed.push(0, 1);
        handle.wake();
        until(|| feed.tickets() == [0]);
        sim.fail(On::WriteDurable, 0, effect);
        feed.push(1, 2);
        handle.wake();
        until(|| !feed.queue().failed.is_empty());
        handle.stop();
        let calls = sim.calls();
        feed.push(2, 1);
        handle.wake();
        handle.stop();
        assert_eq!(sim.calls(), calls, "{effect:?}: nothing is retried");
        assert_eq!(feed.tickets(), [0]);
        assert_eq!(feed.queue().failed.len(), 1);
        let latched = handle.status().latched.unwrap();
        assert_eq!(*latched, feed.queue().failed[0]);
        assert!(latched.contains("durable write of 1024 bytes"), "{latched}");
        if effect != Effect::PowerCut {
            assert_eq!(ticket_of(&handle.read(LogPosition(0)).unwrap().1), 0);
        }
        assert!(matches!(handle.read(LogPosition(512)), Err(RingError::OutOfRange { .. })));
    }
}

#[test]
fn records_are_read_back_between_released_and_durable() {
    let sim = small_ring(8);
    let (handle, feed) = start(&sim, NEVER);
    let sizes = [1, 8, 3, 7, 2, 8, 8, 5, 8, 6];
    for (ticket, sectors) in (0..).zip(sizes) {
        feed.push(ticket, sectors);
    }
    handle.wake();
    until(|| feed.tickets().len() == 10);
    handle.release(feed.queue().committed[4].end);
    (10..14).for_each(|ticket| feed.push(ticket, 8));
    handle.wake();
    until(|| handle.status().held_records == 1);
    let released = handle.status().released;
    for committed in &feed.queue().committed {
        let read = handle.read(committed.position);
        if committed.position < released {
            assert!(matches!(read, Err(RingError::OutOfRange { .. })));
        } else {
            let (envelope, body) = read.unwrap();
            assert_eq!((envelope.position, &body), (committed.position, &committed.body));
        }
    }
    let second = feed.queue().committed[6].position;
    let inside = handle.read(LogPosition(second.0 + 512));
    assert!(matches!(inside, Err(RingError::Record { .. })));
    let odd = handle.read(LogPosition(second.0 + 1));
    assert!(matches!(odd, Err(RingError::OutOfRange { .. })));
    assert!(handle.read(handle.status().durable).is_err());
    let at = 8192 + second.0 % (8 * 4096);
    sim.rot(at + 300, &[1]);
    let error = handle.read(second).unwrap_err().to_string();
    assert!(error.starts_with(&format!("ring: record at {second}: checksum of the record's body")));
    handle.stop();
}

#[test]
#[should_panic(expected = "release of 1024, durable is 512")]
fn a_release_of_what_is_not_durable_is_our_own_fault() {
    let sim = small_ring(4);
    let mut driven = drive(sim).unwrap();
    driven.commit(0, &[1]);
    driven.handle.release(LogPosition(1024));
}

/// A feed that breaks its contract must not leave a process that believes in its ring.
#[test]
fn a_panic_of_the_committing_thread_aborts_the_process() {
    const CHILD: &str = "MIRRORHUB_TEST_PANIC_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let sim = small_ring(4);
        let (handle, feed) = start(&sim, NEVER);
        feed.queue().pending.push_back(Pending { body: Bytes::new(), ..pending(0, 1) });
        handle.wake();
        handle.stop();
        return;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "nvlog::tests::threads::a_panic_of_the_committing_thread_aborts_the_process",
        ])
        .env(CHILD, "1")
        .output()
        .unwrap()
        .status;
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, Some(6), "SIGABRT, not {status}");
}

/// The whole way over a real file, twice, with a full-size ring.
#[test]
fn a_ring_on_a_real_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nvram");
    let size = ByteCount(RING_BYTES_MIN + 8192);
    let made = FileDevice::create(&path, size, Access::Direct).unwrap();
    Ring::create(Arc::new(made), OWNER, RingShape::default()).unwrap();
    let mut wanted = Vec::new();
    for round in 0..3 {
        let device = Arc::new(Latch::new(FileDevice::open(&path, Access::Direct).unwrap()));
        let mut found = Vec::new();
        let (ring, recovery) = Ring::open(device, OWNER, RingOptions::default(), &mut |record| {
            found.push(ticket_of(&record.body));
        })
        .unwrap();
        assert_eq!(found, wanted);
        assert!(recovery.damage.is_empty() && !recovery.cut);
        let feed = TestFeed::default();
        let handle = ring.start(Box::new(feed.clone()));
        for n in 0..50 {
            // 4 to 400 KiB: the area goes round.
            feed.push(round * 50 + n, 8 + usize::try_from(n).unwrap() * 16);
            handle.wake();
            until(|| to_u64(feed.tickets().len()) == n + 1);
            if n % 10 == 9 {
                handle.release(feed.queue().committed[usize::try_from(n).unwrap() - 2].end);
            }
        }
        wanted = (round * 50 + 48..round * 50 + 50).collect();
        handle.stop();
        assert_eq!(handle.status().latched, None);
    }
}
