//! The machine of a simulation: threads that run one at a time, in the order that the caller
//! chooses, and random numbers by a seed.
//!
//! [`Threads::begin`] makes the calling thread the scheduler. A thread of [`spawn`] is a real one,
//! but it runs only between [`Threads::resume`] and its next [`turn`], while the scheduler stands
//! still: what happens is the same each time. Each thread belongs to the process that was current
//! when it was begun. [`Threads::kill`] ends the threads of a process where they wait, by
//! unwinding, as if the machine under them was gone.
//!
//! Waiting threads are woken for nothing now and then: every waiter has to look again anyway.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, ThreadId};
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::Gone;

/// The time of day stands still in a simulation.
pub(super) const UNIX_SECONDS: i64 = 1_795_273_400;

/// A simulated process: one life of one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Process(pub(crate) u64);

/// A thread that may be resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) number: u64,
    pub(crate) process: Process,
    pub(crate) name: String,
}

#[derive(Debug)]
struct Entry {
    process: Process,
    name: String,
    id: Option<ThreadId>,
    killed: bool,
    /// What it waits for: a bell, or a time.
    bell: Option<usize>,
    until: Option<Instant>,
    /// It may go on.
    ready: bool,
    /// Rings when the turn is its own.
    turn: Arc<Condvar>,
}

#[derive(Debug, Default)]
struct State {
    /// Who has the turn; `None`: the scheduler.
    running: Option<u64>,
    next: u64,
    threads: BTreeMap<u64, Entry>,
    panics: Vec<String>,
    chance: u64,
    /// The rule that is switched off.
    broken: Option<u8>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// The turn is the scheduler's again.
    returned: Condvar,
    runtime: Handle,
    /// Some thread may go on.
    stirred: Notify,
}

#[derive(Debug, Clone)]
struct Here {
    inner: Arc<Inner>,
    /// `None` on the scheduler's own thread.
    number: Option<u64>,
    process: Process,
}

thread_local! {
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
    /// The rule that is switched off where there is no simulation.
    static OFF: Cell<Option<u8>> = const { Cell::new(None) };
}

impl Entry {
    fn new(process: Process, name: String) -> Self {
        let (id, bell, until, turn) = (None, None, None, Arc::default());
        Self { process, name, id, killed: false, bell, until, ready: true, turn }
    }
}

/// What unwinds a thread that is killed.
struct Killed;

fn here() -> Option<Here> {
    HERE.with_borrow(Clone::clone)
}

/// Whether this thread belongs to a simulation.
pub(crate) fn is_here() -> bool {
    HERE.with_borrow(Option::is_some)
}

/// The threads of a simulation, held by the thread that schedules them.
#[derive(Debug)]
pub(crate) struct Threads(Arc<Inner>);

impl Threads {
    /// Makes this thread the scheduler. Called inside the runtime whose clock is the simulation's.
    pub(crate) fn begin(seed: u64) -> Self {
        let state = Mutex::new(State { chance: seed, ..State::default() });
        let (returned, stirred) = (Condvar::new(), Notify::new());
        let inner = Arc::new(Inner { state, returned, runtime: Handle::current(), stirred });
        let scheduler = Here { inner: Arc::clone(&inner), number: None, process: Process(0) };
        HERE.with_borrow_mut(|here| *here = Some(scheduler));
        Self(inner)
    }

    /// Switches a rule of the product off.
    pub(crate) fn break_rule(&self, rule: Option<u8>) {
        self.0.lock().broken = rule;
    }

    /// Threads that wait for their turn, in the order in which they were begun.
    pub(crate) fn waiting(&self) -> Vec<Waiting> {
        let state = self.0.lock();
        let waiting = |(&number, entry): (&u64, &Entry)| Waiting {
            number,
            process: entry.process,
            name: entry.name.clone(),
        };
        state.threads.iter().map(waiting).collect()
    }

    /// Those of them that were woken, or whose time has come.
    pub(crate) fn ready(&self) -> Vec<Waiting> {
        let now = super::now();
        let state = self.0.lock();
        let ready = |entry: &Entry| entry.ready || entry.until.is_some_and(|at| at <= now);
        let waiting = |(&number, entry): (&u64, &Entry)| Waiting {
            number,
            process: entry.process,
            name: entry.name.clone(),
        };
        state.threads.iter().filter(|(_, entry)| ready(entry)).map(waiting).collect()
    }

    /// Waits until a thread was woken.
    pub(crate) async fn stirred(&self) {
        self.0.stirred.notified().await;
    }

    /// Lets a thread run until it waits again or ends.
    pub(crate) fn resume(&self, number: u64) {
        let mut state = self.0.lock();
        assert!(state.running.is_none(), "one thread runs at a time");
        let Some(entry) = state.threads.get_mut(&number) else { return };
        (entry.bell, entry.until, entry.ready) = (None, None, false);
        let turn = Arc::clone(&entry.turn);
        state.running = Some(number);
        turn.notify_one();
        while state.running.is_some() {
            state = self.0.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends all threads of a process where they wait.
    pub(crate) fn kill(&self, process: Process) {
        loop {
            let victim = {
                let mut state = self.0.lock();
                for entry in state.threads.values_mut().filter(|entry| entry.process == process) {
                    entry.killed = true;
                }
                let mut theirs = state.threads.iter();
                theirs.find(|(_, entry)| entry.process == process).map(|(number, _)| *number)
            };
            match victim {
                Some(number) => self.resume(number),
                None => return,
            }
        }
    }

    /// What threads have panicked of, other than being killed.
    pub(crate) fn panics(&self) -> Vec<String> {
        self.0.lock().panics.clone()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let processes: Vec<Process> = self.waiting().iter().map(|thread| thread.process).collect();
        for process in processes {
            self.kill(process);
        }
        HERE.with_borrow_mut(|here| *here = None);
    }
}

/// What runs now belongs to a process, as long as this is held.
#[derive(Debug)]
pub(crate) struct Inside(Process);

impl Inside {
    /// Enters a process.
    pub(crate) fn of(process: Process) -> Self {
        Self(set_process(process))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        set_process(self.0);
    }
}

fn set_process(process: Process) -> Process {
    HERE.with_borrow_mut(|here| match here {
        Some(here) => std::mem::replace(&mut here.process, process),
        None => process,
    })
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_turn(&self, number: u64) {
        let mut state = self.lock();
        let Some(turn) = state.threads.get(&number).map(|entry| Arc::clone(&entry.turn)) else {
            return;
        };
        while state.running != Some(number) {
            state = turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn is_killed(&self, number: u64) -> bool {
        self.lock().threads.get(&number).is_some_and(|entry| entry.killed)
    }

    fn pass(&self, number: u64, bell: Option<usize>, until: Option<Instant>) {
        let mut state = self.lock();
        if let Some(entry) = state.threads.get_mut(&number) {
            (entry.bell, entry.until) = (bell, until);
        }
        state.running = None;
        drop(state);
        self.returned.notify_one();
    }
}

/// Gives the turn back; returns when this thread has it again: when the bell has rung, or at that
/// time, or for nothing.
pub(crate) fn turn(bell: Option<usize>, until: Option<Instant>) {
    let Some(Here { inner, number, .. }) = here() else { return };
    let Some(number) = number else { panic!("the scheduler itself would wait") };
    if std::thread::panicking() {
        return;
    }
    inner.pass(number, bell, until);
    inner.wait_for_turn(number);
    if inner.is_killed(number) {
        resume_unwind(Box::new(Killed));
    }
}

/// Whether that rule is switched off.
pub(super) fn breaks(rule: u8) -> bool {
    let broken = here().map_or_else(|| OFF.get(), |here| here.inner.lock().broken);
    broken == Some(rule)
}

/// Switches a rule of the product off on this thread and those that it begins, outside of a
/// simulation.
pub(crate) fn break_rule_here(rule: u8) {
    OFF.set(Some(rule));
}

/// The same rules are off where `body` runs.
pub(super) fn inheriting<T>(body: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let off = OFF.get();
    move || {
        OFF.set(off);
        body()
    }
}

/// Whether this thread is being killed.
pub(crate) fn is_killed() -> bool {
    match here() {
        Some(Here { inner, number: Some(number), .. }) => inner.is_killed(number),
        Some(_) | None => false,
    }
}

pub(super) fn spawn(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let Some(Here { inner, process, .. }) = here() else {
        return Err(io::Error::other("no simulation here"));
    };
    let number = {
        let mut state = inner.lock();
        state.next += 1;
        let (number, name) = (state.next, name.to_owned());
        state.threads.insert(number, Entry::new(process, name));
        number
    };
    inner.stirred.notify_one();
    let theirs = Arc::clone(&inner);
    let begun = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        life(theirs, number, process, body);
    })?;
    if let Some(entry) = inner.lock().threads.get_mut(&number) {
        entry.id = Some(begun.thread().id());
    }
    Ok(begun)
}

fn life(inner: Arc<Inner>, number: u64, process: Process, body: impl FnOnce()) {
    let mine = Here { inner: Arc::clone(&inner), number: Some(number), process };
    HERE.with_borrow_mut(|here| *here = Some(mine));
    inner.wait_for_turn(number);
    let ended = if inner.is_killed(number) {
        drop(body);
        Ok(())
    } else {
        let _runtime = inner.runtime.enter();
        catch_unwind(AssertUnwindSafe(body))
    };
    let mut state = inner.lock();
    if let Err(panic) = ended
        && !panic.is::<Killed>()
    {
        state.panics.push(words(&*panic));
    }
    state.threads.remove(&number);
    state.running = None;
    drop(state);
    inner.returned.notify_one();
}

/// What a panic said.
pub(crate) fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned())).unwrap_or_default()
}

/// Waits until a thread has ended.
pub(super) fn until_ended(id: ThreadId) {
    let Some(Here { inner, .. }) = here() else { return };
    while inner.lock().threads.values().any(|entry| entry.id == Some(id)) {
        turn(None, Some(super::now()));
    }
}

/// Those who wait for that bell may go on.
pub(super) fn ring(bell: usize) {
    let Some(Here { inner, .. }) = here() else { return };
    let mut state = inner.lock();
    let mut woken = false;
    for entry in state.threads.values_mut().filter(|entry| entry.bell == Some(bell)) {
        (entry.ready, woken) = (true, true);
    }
    drop(state);
    if woken {
        inner.stirred.notify_one();
    }
}

/// Wakes a thread that waits for a future.
struct Woken {
    inner: Arc<Inner>,
    number: u64,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        if let Some(entry) = self.inner.lock().threads.get_mut(&self.number) {
            entry.ready = true;
        }
        self.inner.stirred.notify_one();
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Gone> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let body = move || {
        // Who asked may be gone.
        drop(sender.send(work()));
    };
    spawn("blocking", body).map_err(|error| Gone(error.to_string()))?;
    receiver.await.map_err(|_| Gone("it panicked".to_owned()))
}

pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let Some(Here { inner, number: Some(number), .. }) = here() else {
        panic!("the scheduler itself would wait");
    };
    let waker = Waker::from(Arc::new(Woken { inner, number }));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => turn(None, None),
        }
    }
}

/// Fills `bytes` by the simulation's seed; false outside one.
pub(crate) fn fill(bytes: &mut [u8]) -> bool {
    let Some(Here { inner, .. }) = here() else { return false };
    let mut state = inner.lock();
    for part in bytes.chunks_mut(8) {
        // splitmix64
        state.chance = state.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let word = (z ^ (z >> 31)).to_le_bytes();
        part.copy_from_slice(&word[..part.len()]);
    }
    true
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::units::machine;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
    }

    /// Nothing runs but what is resumed, and a killed thread ends where it waits.
    #[test]
    fn threads_run_when_they_are_told_to() {
        runtime().block_on(async {
            let threads = Threads::begin(1);
            let _inside = Inside::of(Process(3));
            let pair = Arc::new((Mutex::new(0_u64), machine::Bell::new()));
            let dropped = Arc::new(AtomicU64::new(0));
            struct Mark(Arc<AtomicU64>);
            impl Drop for Mark {
                fn drop(&mut self) {
                    self.0.fetch_add(1, Ordering::Relaxed);
                }
            }
            for _ in 0..2 {
                let (pair, mark) = (Arc::clone(&pair), Mark(Arc::clone(&dropped)));
                machine::spawn("counter", move || {
                    let _mark = mark;
                    let mut count = pair.0.lock().unwrap();
                    loop {
                        *count += 1;
                        count = pair.1.wait(&pair.0, count).unwrap();
                    }
                })
                .unwrap();
            }
            let [first, second] = [0, 1].map(|at| threads.waiting()[at].number);
            assert_eq!(*pair.0.lock().unwrap(), 0);
            threads.resume(first);
            threads.resume(second);
            threads.resume(second);
            assert_eq!(*pair.0.lock().unwrap(), 3);
            assert_eq!(threads.ready(), []);
            pair.1.notify_all();
            assert_eq!(threads.ready().len(), 2);
            threads.kill(Process(3));
            assert_eq!((threads.waiting(), threads.panics()), (vec![], vec![]));
            assert_eq!(dropped.load(Ordering::Relaxed), 2);
        });
    }

    #[test]
    fn a_panic_is_told_and_the_same_seed_gives_the_same_chance() {
        runtime().block_on(async {
            let mut drawn = Vec::new();
            for _ in 0..2 {
                let threads = Threads::begin(7);
                machine::spawn("bad", || panic!("on purpose")).unwrap();
                let bad = threads.waiting()[0].number;
                threads.resume(bad);
                assert_eq!(threads.panics(), ["on purpose"]);
                let mut bytes = [0; 20];
                assert!(fill(&mut bytes));
                drawn.push(bytes);
            }
            assert_eq!(drawn[0], drawn[1]);
            assert!(!fill(&mut [0]), "outside a simulation");
        });
    }
}
