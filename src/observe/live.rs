//! What the page shows beyond the newest status: rows that changed, the last hour, the journal.
//!
//! One task samples the status document: every second while somebody watches, every
//! [`HISTORY_STEP_SECONDS`] otherwise. A watcher ([`Watcher::next`]) is told the rows that changed
//! since it was told last, so that a page with a thousand sources moves little. Everything is
//! bounded: points an hour, events kept, watchers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::server::{Events, Observed};
use crate::limits::{HISTORY_POINTS_MAX, HISTORY_STEP_SECONDS, HTTP_LIVE_MAX, PAGE_EVENTS_MAX};
use crate::status::SCHEMA;
use crate::status::answers::Event;
use crate::status::document::{
    NvramStatus, PoolStatus, SourceEntry, State, StatusDocument, WaitsStatus,
};
use crate::status::health::Health;

/// One source, as a row of the page.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    name: String,
    state: State,
    reason: String,
    next_step: String,
    cp: Option<u32>,
    image_age_seconds: Option<u64>,
    lag_bytes: Option<u64>,
    lag_seconds: Option<f64>,
    /// Durable on the hub, over the last step.
    bytes_per_second: u64,
    acknowledged_bytes: u64,
    staged_bytes: u64,
    drained_bytes: Option<u64>,
    applied_bytes: Option<u64>,
    visible_bytes: u64,
    #[serde(flatten)]
    waits: WaitsStatus,
    volumes: usize,
}

impl Row {
    fn new(entry: &SourceEntry, bytes_per_second: u64) -> Self {
        Self {
            name: entry.name.to_string(),
            state: entry.state,
            reason: entry.reason.clone(),
            next_step: entry.next_step.clone(),
            cp: entry.applied_cp,
            // Whole seconds: a row that only grows older changes once a second.
            image_age_seconds: entry.image_age_seconds.map(whole),
            lag_bytes: entry.lag_bytes,
            lag_seconds: entry.lag_seconds.map(tenths),
            bytes_per_second,
            acknowledged_bytes: entry.acknowledged_bytes,
            staged_bytes: entry.staged_bytes,
            drained_bytes: entry.drained_bytes,
            applied_bytes: entry.applied_bytes,
            visible_bytes: entry.visible_bytes,
            waits: WaitsStatus {
                staged_seconds: entry.waits.staged_seconds.map(tenths),
                drained_seconds: entry.waits.drained_seconds.map(tenths),
                applied_seconds: entry.waits.applied_seconds.map(tenths),
                visible_seconds: entry.waits.visible_seconds.map(tenths),
            },
            volumes: entry.volumes.len(),
        }
    }
}

fn tenths(seconds: f64) -> f64 {
    (seconds * 10.0).round() / 10.0
}

/// Seconds without their fraction; what is no time at all is 0.
fn whole(seconds: f64) -> u64 {
    Duration::try_from_secs_f64(seconds).map_or(0, |duration| duration.as_secs())
}

/// Bytes a second, rounded; 0 if no time has passed.
fn rate(bytes: u64, over: Duration) -> u64 {
    let millis = over.as_millis();
    let scaled = u128::from(bytes) * 1000;
    scaled.checked_div(millis).and_then(|rate| u64::try_from(rate).ok()).unwrap_or(0)
}

/// The last hour of one source, or of all: oldest first, one point each [`HISTORY_STEP_SECONDS`].
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
struct Series {
    /// Null where it was not known.
    lag_seconds: VecDeque<Option<f64>>,
    bytes_per_second: VecDeque<u64>,
}

impl Series {
    fn push(&mut self, lag: Option<f64>, rate: u64) {
        self.lag_seconds.push_back(lag);
        self.bytes_per_second.push_back(rate);
        if self.lag_seconds.len() > HISTORY_POINTS_MAX {
            self.lag_seconds.pop_front();
            self.bytes_per_second.pop_front();
        }
    }
}

#[derive(Debug)]
struct Known {
    row: Row,
    /// The sample that changed it last.
    changed: u64,
    seen: u64,
    series: Series,
    /// When the newest point was taken, and what was staged then.
    point: (Instant, u64),
    /// The same for the newest sample.
    sample: (Instant, u64),
}

/// What one source or the hub itself shows beside its rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
struct Process {
    health: Option<Health>,
    nvram: Option<NvramStatus>,
    pool: Option<PoolStatus>,
}

#[derive(Debug, Default)]
struct Book {
    /// Number of the newest sample.
    sample: u64,
    sources: BTreeMap<String, Known>,
    /// Names that are gone, by the sample that missed them.
    gone: VecDeque<(u64, String)>,
    /// The newest of the journal, by the sample that met them.
    events: VecDeque<(u64, Event)>,
    all: Series,
    process: Process,
}

impl Book {
    fn take(&mut self, document: &StatusDocument, now: Instant, is_point: bool) {
        self.sample += 1;
        for entry in document.sources().iter() {
            self.take_source(entry, now, is_point);
        }
        let sample = self.sample;
        let Self { sources, gone, .. } = self;
        sources.retain(|name, known| {
            let stays = known.seen == sample;
            if !stays {
                gone.push_back((sample, name.clone()));
            }
            stays
        });
        while self.gone.len() > PAGE_EVENTS_MAX {
            self.gone.pop_front();
        }
        if is_point {
            let newest = |known: &Known| known.series.bytes_per_second.back().copied().unwrap_or(0);
            let lags = self.sources.values().filter_map(|known| known.row.lag_seconds);
            let lag = lags.reduce(f64::max);
            let rate = self.sources.values().map(newest).sum();
            self.all.push(lag, rate);
        }
        self.process = Process {
            health: Some(document.health().clone()),
            nvram: document.nvram().cloned(),
            pool: document.pool().cloned(),
        };
    }

    /// The number behind the newest event that was taken.
    fn next_event(&self) -> u64 {
        self.events.back().map_or(0, |(_, event)| event.number + 1)
    }

    /// Events that came since, oldest first.
    fn take_events(&mut self, events: Vec<Event>) {
        let next = self.next_event();
        let new = events.into_iter().filter(|event| event.number >= next);
        self.events.extend(new.map(|event| (self.sample, event)));
        let over = self.events.len().saturating_sub(PAGE_EVENTS_MAX);
        self.events.drain(..over);
    }

    fn take_source(&mut self, entry: &SourceEntry, now: Instant, is_point: bool) {
        let sample = self.sample;
        let staged = entry.staged_bytes;
        let known = self.sources.entry(entry.name.to_string()).or_insert_with(|| Known {
            row: Row::new(entry, 0),
            changed: sample,
            seen: sample,
            series: Series::default(),
            point: (now, staged),
            sample: (now, staged),
        });
        known.seen = sample;
        let since = |(at, before): (Instant, u64)| {
            // Counts begin anew when a source or the hub does.
            rate(staged.saturating_sub(before), now.saturating_duration_since(at))
        };
        let row = Row::new(entry, since(known.sample));
        known.sample = (now, staged);
        if is_point {
            known.series.push(row.lag_seconds, since(known.point));
            known.point = (now, staged);
        }
        if row == known.row {
            return;
        }
        known.changed = sample;
        known.row = row;
    }

    /// What a watcher that knows sample `since` lacks; `0` knows nothing.
    fn news(&self, since: u64) -> String {
        #[derive(Serialize)]
        struct News<'a> {
            schema: u32,
            /// The page forgets what it knew: this is everything.
            whole: bool,
            rows: Vec<&'a Row>,
            gone: Vec<&'a str>,
            /// Oldest first.
            events: Vec<&'a Event>,
            #[serde(flatten)]
            process: &'a Process,
        }
        let forgotten = self.gone.front().is_some_and(|(sample, _)| *sample > since)
            && self.gone.len() >= PAGE_EVENTS_MAX;
        let whole = since == 0 || forgotten;
        let since = if whole { 0 } else { since };
        let rows = self.sources.values().filter(|known| known.changed > since);
        let newer = |sample: u64| !whole && sample > since;
        let gone = self.gone.iter().filter(|(sample, _)| newer(*sample));
        let events = self.events.iter().filter(|(sample, _)| *sample > since);
        let news = News {
            schema: SCHEMA,
            whole,
            rows: rows.map(|known| &known.row).collect(),
            gone: gone.map(|(_, name)| name.as_str()).collect(),
            events: events.map(|(_, event)| event).collect(),
            process: &self.process,
        };
        // Words, numbers and strings: nothing that JSON cannot hold.
        serde_json::to_string(&news).unwrap_or_else(|error| {
            tracing::error!(%error, "news for the page");
            "{}".to_owned()
        })
    }
}

/// What watchers of the page share.
#[derive(Debug)]
pub struct Live {
    book: Mutex<Book>,
    moved: watch::Sender<u64>,
    places: Arc<Semaphore>,
    stop: CancellationToken,
}

/// One watcher; its place comes back when it is dropped.
#[derive(Debug)]
pub struct Watcher {
    live: Arc<Live>,
    moved: watch::Receiver<u64>,
    told: u64,
    _place: OwnedSemaphorePermit,
}

impl Live {
    /// Nothing seen yet; `stop` ends every watcher.
    pub fn new(stop: CancellationToken) -> Arc<Self> {
        let places = Arc::new(Semaphore::new(HTTP_LIVE_MAX));
        Arc::new(Self { book: Mutex::default(), moved: watch::Sender::new(0), places, stop })
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        // A book is changed by one task, whose panic would end the process's samples, not lie.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Samples for ever.
    pub async fn run(&self, observed: &Arc<dyn Observed>, events: &Events) {
        let mut tick = interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seconds: u64 = 0;
        loop {
            tick.tick().await;
            let is_point = seconds.is_multiple_of(HISTORY_STEP_SECONDS);
            seconds += 1;
            if is_point || self.moved.receiver_count() > 0 {
                let next = self.lock().next_event();
                let new = events(next, PAGE_EVENTS_MAX);
                self.sample(&observed.status(), new, Instant::now(), is_point);
            }
        }
    }

    fn sample(&self, document: &StatusDocument, events: Vec<Event>, now: Instant, is_point: bool) {
        let number = {
            let mut book = self.lock();
            book.take(document, now, is_point);
            book.take_events(events);
            book.sample
        };
        self.moved.send_replace(number);
    }

    /// A place to watch from; `None` when all are taken.
    pub fn watch(self: &Arc<Self>) -> Option<Watcher> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let live = Arc::clone(self);
        Some(Watcher { live, moved: self.moved.subscribe(), told: 0, _place: place })
    }

    /// The last hour of a source, or of all; `None` if there is no such source.
    pub fn history(&self, source: Option<&str>) -> Option<serde_json::Value> {
        let book = self.lock();
        let series = match source {
            None => &book.all,
            Some(name) => &book.sources.get(name)?.series,
        };
        Some(serde_json::json!({
            "schema": SCHEMA,
            "step_seconds": HISTORY_STEP_SECONDS,
            "lag_seconds": series.lag_seconds,
            "bytes_per_second": series.bytes_per_second,
        }))
    }
}

impl Watcher {
    /// What changed since the last call, at the next sample; everything at the first call. `None`
    /// when the process stops.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            {
                let book = self.live.lock();
                if book.sample > self.told {
                    let news = book.news(self.told);
                    self.told = book.sample;
                    return Some(news);
                }
            }
            tokio::select! {
                () = self.live.stop.cancelled() => return None,
                moved = self.moved.changed() => moved.ok()?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::document::tests::entry;

    fn hub(entries: &[SourceEntry]) -> StatusDocument {
        StatusDocument::hub(entries.to_vec(), None, None)
    }

    fn named(name: &str, state: State, staged: u64) -> SourceEntry {
        SourceEntry { name: name.parse().unwrap(), state, staged_bytes: staged, ..entry() }
    }

    fn event(number: u64) -> Event {
        let (who, what, result) = ("root".into(), "scrub".into(), "done".into());
        Event { number, at_seconds: 7, who, what, result }
    }

    fn parsed(news: &str) -> serde_json::Value {
        serde_json::from_str(news).unwrap()
    }

    fn names(news: &serde_json::Value) -> Vec<&str> {
        news["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect()
    }

    #[test]
    fn a_watcher_is_told_everything_once_and_then_what_changed() {
        let mut book = Book::default();
        let start = Instant::now();
        let (a, b) = (named("a", State::InSync, 0), named("b", State::InSync, 0));
        book.take(&hub(&[a.clone(), b.clone()]), start, true);
        let first = parsed(&book.news(0));
        assert_eq!((first["whole"].as_bool(), names(&first)), (Some(true), vec!["a", "b"]));
        book.take(&hub(&[a.clone(), b]), start + Duration::from_secs(1), false);
        assert_eq!(names(&parsed(&book.news(1))), [""; 0], "nothing has changed");
        let offline = named("b", State::Offline, 0);
        book.take(&hub(&[a.clone(), offline]), start + Duration::from_secs(2), false);
        let news = parsed(&book.news(2));
        assert_eq!((news["whole"].as_bool(), names(&news)), (Some(false), vec!["b"]));
        book.take(&hub(&[a]), start + Duration::from_secs(3), false);
        assert_eq!(parsed(&book.news(3))["gone"][0], "b");
        assert_eq!(names(&parsed(&book.news(0))), ["a"], "who comes now is not told what is gone");
    }

    #[test]
    fn rates_are_over_the_time_that_passed_and_the_hour_is_bounded() {
        let mut book = Book::default();
        let start = Instant::now();
        for step in 0..u64::try_from(HISTORY_POINTS_MAX).unwrap() + 5 {
            let now = start + Duration::from_secs(step * HISTORY_STEP_SECONDS);
            book.take(&hub(&[named("a", State::InSync, step * 5000)]), now, true);
        }
        let known = &book.sources["a"];
        assert_eq!(known.series.bytes_per_second.len(), HISTORY_POINTS_MAX);
        assert_eq!(known.series.lag_seconds.len(), HISTORY_POINTS_MAX);
        assert_eq!(known.row.bytes_per_second, 5000 / HISTORY_STEP_SECONDS);
        assert_eq!(book.all.bytes_per_second.back(), Some(&(5000 / HISTORY_STEP_SECONDS)));
        let (sample, now) = (book.sample, start + Duration::from_secs(100_000));
        book.take(&hub(&[named("a", State::InSync, 7)]), now, true);
        assert_eq!(book.sources["a"].row.bytes_per_second, 0, "the count began anew");
        assert_eq!(names(&parsed(&book.news(sample))), ["a"]);
        assert_eq!(rate(10, Duration::ZERO), 0);
    }

    #[test]
    fn events_are_bounded_and_so_are_names_that_are_gone() {
        let mut book = Book::default();
        for step in 0..PAGE_EVENTS_MAX * 2 + 3 {
            let state = if step % 2 == 0 { State::InSync } else { State::Offline };
            let new = named(&format!("n{step}"), State::InSync, 0);
            book.take(&hub(&[named("a", state, 0), new]), Instant::now(), false);
            let number = u64::try_from(step).unwrap();
            book.take_events(vec![event(number.saturating_sub(1)), event(number)]);
        }
        assert_eq!(book.events.len(), PAGE_EVENTS_MAX);
        let numbers: Vec<u64> = book.events.iter().map(|(_, event)| event.number).collect();
        assert!(numbers.is_sorted_by(|a, b| a + 1 == *b), "each once, in order: {numbers:?}");
        let news = parsed(&book.news(book.sample - 1));
        assert_eq!(news["events"].as_array().unwrap().len(), 1, "only what is new");
        assert_eq!(news["events"][0]["number"], book.next_event() - 1);
        assert_eq!(book.gone.len(), PAGE_EVENTS_MAX);
        assert_eq!(parsed(&book.news(1))["whole"], true, "who missed names begins anew");
        assert_eq!(parsed(&book.news(book.sample - 1))["whole"], false);
    }

    #[tokio::test]
    async fn places_are_bounded_and_a_stop_ends_a_watcher() {
        let stop = CancellationToken::new();
        let live = Live::new(stop.clone());
        live.sample(&hub(&[named("a", State::InSync, 0)]), Vec::new(), Instant::now(), true);
        let mut watchers: Vec<_> = (0..HTTP_LIVE_MAX).map(|_| live.watch().unwrap()).collect();
        assert!(live.watch().is_none());
        assert!(watchers[0].next().await.unwrap().contains("\"whole\":true"));
        watchers.pop();
        assert!(live.watch().is_some(), "a place comes back");
        stop.cancel();
        assert_eq!(watchers[0].next().await, None);
        assert!(live.history(Some("b")).is_none());
        assert_eq!(live.history(Some("a")).unwrap()["lag_seconds"].as_array().unwrap().len(), 1);
        assert_eq!(live.history(None).unwrap()["bytes_per_second"][0], 0);
    }
}
