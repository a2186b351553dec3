//! A good client at work while something bad is done beside it, in windows that alternate: quiet,
//! disturbed, quiet, disturbed. What the machine does by itself (other tests, other programs) falls
//! on both kinds; what the disturbance does falls on one.
//!
//! The client writes 4 KiB durably, one at a time. Of each window it keeps the rate and the p99;
//! the kinds are compared by the median over their windows, so that one stall of the machine is one
//! window of many. The quiet windows among themselves (each against its neighbour in time) are the
//! control: as long as they differ by more than the bound, the machine is too restless to judge and
//! more windows are taken.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mirrorhub::nbd::client::Client;

use super::is_full;

/// What the issue allows a disturbance to do to others: 20 %.
const BOUND: f64 = 1.2;

/// Rounds of windows that are taken at most before the judgement counts.
const ROUNDS_MAX: usize = 4;

/// One window: what it is counted to, how long it was, what the writes took that began in it.
#[derive(Debug, Clone, Default)]
struct Window {
    disturbed: bool,
    length: Duration,
    taken: Vec<Duration>,
}

impl Window {
    fn rate(&self) -> f64 {
        let count = u32::try_from(self.taken.len()).expect("small");
        f64::from(count) / self.length.as_secs_f64()
    }

    /// A window in which no write was answered is all wait.
    fn p99(&self) -> f64 {
        let mut taken = self.taken.clone();
        taken.sort_unstable();
        let at = taken.len() * 99 / 100;
        taken.get(at).unwrap_or(&self.length).as_secs_f64()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Rate and p99 of some windows.
#[derive(Debug, Clone, Copy)]
struct Figures {
    rate: f64,
    p99: f64,
}

impl Figures {
    fn of<'a>(windows: impl Iterator<Item = &'a Window> + Clone) -> Self {
        Self {
            rate: median(windows.clone().map(Window::rate).collect()),
            p99: median(windows.map(Window::p99).collect()),
        }
    }

    /// How many times worse than `before`: the worse of the two.
    fn worse_than(self, before: Self) -> f64 {
        (before.rate / self.rate).max(self.p99 / before.p99)
    }
}

/// What the windows say.
#[derive(Debug, Clone, Copy)]
struct Judgement {
    quiet: Figures,
    disturbed: Figures,
    /// How many times worse the disturbed windows are.
    harm: f64,
    /// How far the quiet windows differ among themselves.
    noise: f64,
}

impl Judgement {
    /// Compares the windows of both kinds.
    fn of(windows: &[Window]) -> Self {
        let quiet = windows.iter().filter(|window| !window.disturbed);
        let disturbed = Figures::of(windows.iter().filter(|window| window.disturbed));
        let (even, odd) = (quiet.clone().step_by(2), quiet.clone().skip(1).step_by(2));
        let (even, odd) = (Figures::of(even), Figures::of(odd));
        let quiet = Figures::of(quiet);
        let noise = even.worse_than(odd).max(odd.worse_than(even));
        Self { quiet, disturbed, harm: disturbed.worse_than(quiet), noise }
    }

    /// Within the bound, and the machine was quiet enough to say so.
    fn is_within(&self) -> bool {
        self.harm <= BOUND && self.noise <= BOUND
    }

    /// Whether more windows need not be taken. The short form is content with the bound: the noise
    /// of a shared machine would cost it minutes, and can only have made the disturbance look worse
    /// or, seldom, hidden it.
    fn is_enough(&self) -> bool {
        self.is_within() || !is_full() && self.harm <= BOUND
    }

    /// What counts when no more windows are taken. On a machine that is never quiet nothing less
    /// than its own noise can be told from it: then that is the bound, and it is said.
    fn is_acceptable(&self) -> bool {
        self.harm <= BOUND.max(self.noise)
    }
}

impl std::fmt::Display for Judgement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { quiet, disturbed, harm, noise } = self;
        write!(
            f,
            "{:.0} writes/s, p99 {:.2} ms quiet; {:.0} writes/s, p99 {:.2} ms disturbed: \
             {harm:.2} times worse, quiet windows among themselves {noise:.2}",
            quiet.rate,
            quiet.p99 * 1e3,
            disturbed.rate,
            disturbed.p99 * 1e3,
        )
    }
}

/// The client at work in a thread of its own.
#[derive(Debug)]
pub struct Bystander {
    stop: Arc<AtomicBool>,
    current: Arc<AtomicUsize>,
    taken: Arc<Mutex<Vec<(usize, Duration)>>>,
    windows: Vec<Window>,
    thread: Option<JoinHandle<()>>,
}

impl Bystander {
    /// Begins to write to the first 16 MiB of `export`.
    pub fn start(socket: &Path, export: &str) -> Self {
        let mut client =
            Client::unix(socket, export, Duration::from_secs(30)).expect("the volume opens");
        let stop = Arc::new(AtomicBool::new(false));
        let current = Arc::new(AtomicUsize::new(usize::MAX));
        let taken = Arc::new(Mutex::new(Vec::new()));
        let (stopped, window, kept) = (stop.clone(), current.clone(), taken.clone());
        let thread = std::thread::spawn(move || {
            let mut at = 0;
            while !stopped.load(Ordering::Relaxed) {
                let (begin, began_in) = (Instant::now(), window.load(Ordering::Relaxed));
                client.write(at * 4096, &[9; 4096]).expect("a good client's write");
                kept.lock().expect("no panic").push((began_in, begin.elapsed()));
                at = (at + 1009) % 4096;
            }
        });
        Self { stop, current, taken, windows: Vec::new(), thread: Some(thread) }
    }

    /// One quiet window, as long as `during` takes.
    pub fn quiet(&mut self, during: impl FnOnce()) {
        self.window(false, during);
    }

    /// One disturbed window, as long as `during` takes.
    pub fn disturbed(&mut self, during: impl FnOnce()) {
        self.window(true, during);
    }

    /// The last window was disturbed after all.
    pub fn last_was_disturbed(&mut self) {
        self.windows.last_mut().expect("a window").disturbed = true;
    }

    fn window(&mut self, disturbed: bool, during: impl FnOnce()) {
        let begin = Instant::now();
        self.current.store(self.windows.len(), Ordering::Relaxed);
        during();
        self.current.store(usize::MAX, Ordering::Relaxed);
        self.windows.push(Window { disturbed, length: begin.elapsed(), taken: Vec::new() });
    }

    /// All windows so far, with what was written in each.
    fn windows(&self) -> Vec<Window> {
        let mut windows = self.windows.clone();
        for &(window, taken) in self.taken.lock().expect("no panic").iter() {
            if let Some(window) = windows.get_mut(window) {
                window.taken.push(taken);
            }
        }
        windows
    }

    fn judge(&self) -> Judgement {
        Judgement::of(&self.windows())
    }

    /// The longest write of all windows of that kind.
    pub fn longest(&self, disturbed: bool) -> Duration {
        let windows = self.windows();
        let of = windows.iter().filter(|window| window.disturbed == disturbed);
        of.flat_map(|window| &window.taken).max().copied().unwrap_or_default()
    }

    /// Takes rounds of windows until rate and p99 of the disturbed ones are within the bound and
    /// the quiet ones agree; all windows so far count. Fails if they never are.
    pub fn endures(&mut self, what: &str, mut round: impl FnMut(&mut Self)) {
        for number in 1..=ROUNDS_MAX {
            round(self);
            let judgement = self.judge();
            println!("{what}: {judgement}");
            if judgement.is_enough() {
                return;
            }
            if number == ROUNDS_MAX {
                assert!(judgement.is_acceptable(), "{what}: over {BOUND}: {judgement}");
                println!("{what}: the machine was too restless to tell less than its own noise");
            }
        }
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Err(panic)) = ended
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two hundred writes of 1 ms and `slow` of so many milliseconds.
    fn window(disturbed: bool, slow: usize, slow_ms: u64) -> Window {
        let mut taken = vec![Duration::from_millis(1); 200];
        taken.extend(vec![Duration::from_millis(slow_ms); slow]);
        Window { disturbed, length: taken.iter().sum(), taken }
    }

    fn judged(quiet: [(usize, u64); 2], disturbed: (usize, u64)) -> Judgement {
        let mut windows = Vec::new();
        for at in 0..20 {
            let (slow, slow_ms) = quiet[at % 2];
            windows.push(window(false, slow, slow_ms));
            windows.push(window(true, disturbed.0, disturbed.1));
        }
        Judgement::of(&windows)
    }

    /// The negative control of every test that judges by windows.
    #[test]
    fn a_disturbance_is_seen_and_noise_is_no_disturbance() {
        assert!(judged([(5, 3), (5, 3)], (5, 3)).is_within());
        let slower = judged([(5, 10), (5, 10)], (5, 13));
        assert!(!slower.is_within() && !slower.is_acceptable(), "p99 a third higher: {slower}");
        let fewer = judged([(2, 3), (2, 3)], (2, 60));
        assert!(!fewer.is_within() && !fewer.is_acceptable(), "the rate falls: {fewer}");
        let stalled = [window(false, 0, 0), Window { disturbed: true, ..window(true, 0, 0) }];
        let stalled = stalled.map(|w| if w.disturbed { Window { taken: vec![], ..w } } else { w });
        assert!(!Judgement::of(&stalled).is_acceptable(), "nothing is answered");
        let restless = judged([(5, 10), (5, 30)], (5, 20));
        assert!(!restless.is_within(), "the quiet windows do not agree: {restless}");
        assert!(restless.is_acceptable());
        assert!(!judged([(5, 10), (5, 20)], (5, 80)).is_acceptable(), "more than the noise");
    }

    /// One stall of the machine is one window of many.
    #[test]
    fn one_bad_window_does_not_count() {
        let mut windows: Vec<Window> = (0..21).map(|at| window(at % 2 == 1, 5, 3)).collect();
        windows[7] = window(true, 5, 900);
        assert!(Judgement::of(&windows).is_within());
        assert!(Judgement::of(&[]).noise.is_nan());
        assert!(!Judgement::of(&[]).is_within() && !Judgement::of(&[]).is_acceptable());
    }
}
