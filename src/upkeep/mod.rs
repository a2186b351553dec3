//! Upkeep of a pool: scrub and rebuild, in a thread of their own.
//!
//! Floor 6. Put beside a running hub or source by `cli`, which passes on what is asked of it. One
//! piece of work goes on at a time: a rebuild, if a device is to be filled, before a scrub. Both are
//! held to their pace, tell how far they are, and go on after a restart.
//!
//! * `rebuild`: fills devices
//! * `scrub`: reads everything in use, proves and mends it; `note`: what it remembers
//! * `pace`: so many bytes a second
//!
//! Invariant: nothing here is on the way of a client's write; whatever fails here is shown and ends
//! this piece of work only. No wall clock: the time between two scrubs is counted while the pool is
//! open.

mod note;
mod pace;
mod rebuild;
mod scrub;
#[cfg(test)]
mod tests;
pub mod turn;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::pool::Pool;
use crate::status::upkeep::ScrubStatus;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_f64;
use crate::units::machine::{self, Bell};
use crate::units::numbers::ByteCount;

use self::note::{Note, Word};
use self::scrub::Scrub;
use self::turn::{Taken, Turn, Turns};

/// Between two looks whether something is due.
const LOOK: Duration = Duration::from_secs(10);
/// Time is counted in whole seconds.
const SHORTEST: Duration = Duration::from_secs(1);
/// Between two notes of the time that has passed.
const NOTE_EVERY: Duration = Duration::from_secs(60 * 60);

/// How upkeep is done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// A scrub begins so long after the one before ended; none: only when it is asked for.
    pub scrub_every: Option<Duration>,
    /// Bytes a second that a scrub reads; none is no limit.
    pub scrub_limit: Option<ByteCount>,
    /// Bytes a second that the filling of a device reads and writes; none is no limit.
    pub rebuild_limit: Option<ByteCount>,
}

/// Gets from the other end what is lost here.
pub type Mend = Box<dyn Fn() + Send>;

#[derive(Debug, Default)]
struct State {
    stop: bool,
    /// Somebody asks for a scrub.
    asked: bool,
    /// Somebody asks for the end of the one under way.
    halted: bool,
    running: bool,
    /// As it was noted last.
    note: Note,
    /// Blocks read since then.
    unnoted: u64,
    /// When this part of a scrub began, and blocks read before.
    began: Option<(Instant, u64)>,
    /// Scrubs that came to an end, of whatever kind.
    ended: u64,
    problem: Option<String>,
    /// A device is to be filled.
    fill: bool,
    rebuild: rebuild::Progress,
}

/// What the thread and its callers share.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    bell: Bell,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for so long at most, or until something is asked.
    fn rest(&self, time: Duration) {
        let state = self.lock();
        if state.stop || state.asked || state.halted || state.fill {
            return;
        }
        drop(self.bell.wait_timeout(&self.state, state, time));
    }

    /// Whether a scrub under way is to end, for now or for good.
    fn interrupts_scrub(&self) -> bool {
        let state = self.lock();
        state.stop || state.halted || state.fill
    }

    /// Whether the filling of a device is to end for now.
    fn interrupts_rebuild(&self) -> bool {
        self.lock().stop
    }

    fn read(&self, blocks: u64) {
        self.lock().unnoted += blocks;
    }

    /// These will be read again.
    fn unread(&self, blocks: u64) {
        let mut state = self.lock();
        state.unnoted = state.unnoted.saturating_sub(blocks);
    }

    fn show(&self, note: &Note) {
        let mut state = self.lock();
        state.note = note.clone();
        state.unnoted = 0;
    }
}

/// The upkeep of one pool.
pub struct Upkeep {
    pool: Arc<Pool>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    devices: Turns,
    /// Devices whose addition has not come to its end.
    pending: Mutex<Vec<String>>,
}

impl fmt::Debug for Upkeep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upkeep").finish_non_exhaustive()
    }
}

impl Upkeep {
    /// Begins; goes on with what was under way when the pool was closed.
    pub fn start(pool: Arc<Pool>, options: Options, mend: Mend) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared::default());
        let note = Note::load(&pool);
        shared.lock().running = note.next.is_some();
        shared.show(&note);
        let thread = {
            let (shared, pool) = (Arc::clone(&shared), Arc::clone(&pool));
            let keeper = Keeper { pool, shared, options, mend, note };
            machine::spawn("upkeep", move || keeper.run())?
        };
        Ok(Arc::new(Self {
            pool,
            shared,
            thread: Mutex::new(Some(thread)),
            devices: Turns::default(),
            pending: Mutex::default(),
        }))
    }

    /// Whoever changes the devices of the pool holds this from looking at them to the end.
    pub fn devices_turn(&self, what: &str) -> Result<Turn<'_>, Taken> {
        self.devices.take(what)
    }

    /// The same for what nobody would ask for again: it waits.
    pub fn wait_devices_turn(&self, what: &str) -> Turn<'_> {
        self.devices.wait(what)
    }

    /// Devices whose addition has not come to its end, by path.
    pub fn pending(&self) -> Vec<String> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// These are the ones.
    pub fn set_pending(&self, paths: Vec<String>) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = paths;
    }

    /// Begins a scrub; `false` if one is under way.
    pub fn begin_scrub(&self) -> bool {
        let mut state = self.shared.lock();
        if state.running || state.asked {
            return false;
        }
        state.asked = true;
        state.halted = false;
        self.shared.bell.notify_all();
        true
    }

    /// Ends the scrub under way; `false` if there is none.
    pub fn halt_scrub(&self) -> bool {
        let mut state = self.shared.lock();
        let under_way = state.running || state.asked;
        state.halted |= under_way;
        self.shared.bell.notify_all();
        under_way
    }

    /// Scrubs that have ended since the start. One that is asked for now will have ended when this
    /// is higher.
    pub fn scrubs_ended(&self) -> u64 {
        self.shared.lock().ended
    }

    /// How the scrub is.
    pub fn scrub(&self) -> ScrubStatus {
        let state = self.shared.lock();
        let note = &state.note;
        let running = state.running || state.asked;
        let read = note.blocks_read + state.unnoted;
        let total = note.blocks_total.max(read);
        let rate = state.began.map(|(began, before)| {
            let seconds = machine::elapsed(began).as_secs_f64();
            to_f64(read.saturating_sub(before)) / seconds.max(0.001)
        });
        let left = rate.filter(|rate| running && *rate > 0.0);
        let word = if running { Word::Running } else { note.word };
        ScrubStatus {
            running,
            state: word.text().to_owned(),
            done_bytes: read * BLOCK_BYTES_U64,
            total_bytes: total * BLOCK_BYTES_U64,
            seconds_left: left.map(|rate| to_f64(total - read) / rate),
            repaired_blocks: note.repaired,
            repaired_copies: note.copies,
            from_other_end_blocks: note.known,
            lost_blocks: note.lost_count,
            lost: note.lost.clone(),
            devices: note.devices.clone(),
            age_seconds: note.ever.then(|| to_f64(note.waited_seconds)),
            ended_at: note.ended_at,
            problem: state.problem.clone(),
        }
    }

    /// Ends the thread; what is under way goes on after the next start.
    pub fn stop(&self) {
        self.shared.lock().stop = true;
        self.shared.bell.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && machine::join(thread).is_err()
        {
            tracing::error!("the thread of the pool's upkeep panicked");
        }
    }
}

/// The thread.
struct Keeper {
    pool: Arc<Pool>,
    shared: Arc<Shared>,
    options: Options,
    mend: Mend,
    note: Note,
}

impl Keeper {
    fn run(mut self) {
        let (mut counted, mut noted) = (machine::now(), machine::now());
        loop {
            let passed = machine::elapsed(counted).as_secs();
            counted += Duration::from_secs(passed);
            self.note.waited_seconds += passed;
            let (stop, asked) = {
                let mut state = self.shared.lock();
                state.note.waited_seconds = self.note.waited_seconds;
                (state.stop, state.asked)
            };
            if stop || machine::elapsed(noted) >= NOTE_EVERY {
                noted = machine::now();
                self.save();
            }
            if stop {
                return;
            }
            if self.is_to_fill() {
                self.fill();
                continue;
            }
            if asked || self.note.next.is_some() || self.is_due() {
                self.scrub();
                continue;
            }
            let waited = Duration::from_secs(self.note.waited_seconds);
            let due = self.options.scrub_every.map(|every| every.saturating_sub(waited));
            self.look();
            self.shared.rest(due.unwrap_or(LOOK).min(LOOK).max(SHORTEST));
        }
    }

    fn is_due(&self) -> bool {
        let waited = Duration::from_secs(self.note.waited_seconds);
        self.options.scrub_every.is_some_and(|every| waited >= every)
    }

    fn save(&self) {
        if let Err(error) = self.note.save(&self.pool) {
            tracing::warn!(%error, "the age of the last scrub is not noted");
        }
    }

    fn scrub(&mut self) {
        let goes_on = self.note.next.is_some();
        tracing::info!(goes_on, "scrub");
        {
            let mut state = self.shared.lock();
            (state.running, state.asked, state.problem) = (true, false, None);
            let before = if goes_on { self.note.blocks_read } else { 0 };
            state.began = Some((machine::now(), before));
        }
        let problem = self.scrub_until().err();
        if let Some(problem) = &problem {
            tracing::error!(problem, "the scrub cannot go on");
            self.note.word = Word::Stopped;
            self.note.next = None;
            // Not at once again.
            self.note.waited_seconds = 0;
        }
        self.shared.show(&self.note);
        let mut state = self.shared.lock();
        (state.problem, state.began, state.halted) = (problem, None, false);
        state.running = self.note.next.is_some();
        state.ended += u64::from(!state.running);
        let Note { word, repaired, copies, lost_count, .. } = self.note;
        tracing::info!(word = word.text(), repaired, copies, lost = lost_count, "scrub ended");
    }

    fn scrub_until(&mut self) -> Result<(), String> {
        let made = Scrub::new(&self.pool, &self.shared, self.note.clone());
        let mut scrub = made.map_err(|error| error.to_string())?;
        self.shared.show(&scrub.note);
        let whole = scrub.run(self.options.scrub_limit);
        match whole {
            Ok(true) => {
                if scrub.note.lost_count > 0 {
                    (self.mend)();
                    scrub.look_again();
                }
                scrub.end();
            }
            Ok(false) => {
                let halted = self.shared.lock().halted;
                if halted {
                    scrub.halt();
                }
            }
            Err(error) => {
                self.note = scrub.note;
                return Err(error.to_string());
            }
        }
        self.note = scrub.note;
        Ok(())
    }
}
