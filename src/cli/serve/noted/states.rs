//! Every state of a source is told, in all the places where it is shown.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use super::*;
use crate::cli::serve::collect_source;
use crate::cli::status_view::view;
use crate::cli::terminal::Look;
use crate::metric::catalogue::SOURCE_STATE;
use crate::status::document::State;
use crate::status::document::tests::entry;

/// What is told of a state that must be told with it: its reason, and a next step if it wants one.
fn lacks(entry: &SourceEntry) -> Vec<&'static str> {
    let next = entry.state.wants_a_next_step() && entry.next_step.is_empty();
    let all = [(entry.reason.is_empty(), "a reason"), (next, "a next step")];
    all.into_iter().filter(|(lacking, _)| *lacking).map(|(_, what)| what).collect()
}

/// A source in that state, as both ends could show it.
fn in_state(state: State) -> SourceEntry {
    // Of each state one reason and one next step of the product; a new state must be added here.
    let (reason, next_step) = match state {
        State::Waiting => ("the source has never connected", "start `mirrorhub source`"),
        State::Syncing => ("the hub is being sent what it lacks", ""),
        State::InSync => ("every acknowledged write is durable on the hub", ""),
        State::Behind => ("the pool has no room for CP 7", "make room on the hub"),
        State::Offline => ("the source is not connected", "start the source"),
        State::FailedOver => ("the volumes are here", "`mirrorhub failback` gives them back"),
        State::Fenced => ("another end is primary", "`mirrorhub failback` on the hub"),
        State::Faulted => ("its state is an old copy", "start the original"),
        State::Retired => ("it has no enabled file", "put filer-a.toml back"),
    };
    SourceEntry { state, reason: reason.into(), next_step: next_step.into(), ..entry() }
}

#[derive(Debug, Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap()
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The line that the log has of a change to that state, and the event of it.
fn told(from: State, entry: &SourceEntry) -> (String, String) {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber =
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let journal = Journal::default();
    let hub = |entry: &SourceEntry| StatusDocument::hub(vec![entry.clone()], None, None);
    tracing::subscriber::with_default(subscriber, || {
        let now = hub(entry);
        differences(&look(&hub(&in_state(from))), &look(&now), &now, &journal);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let events = runtime.block_on(journal.behind(None, 0, false)).events;
    (lines.text(), events.iter().map(|event| event.what.clone()).collect())
}

/// The values of the gauge by its label `state`, as a filer or a hub shows it.
fn gauges(entry: &SourceEntry, is_filer: bool) -> Vec<(String, bool)> {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || collect_source(entry, 0, is_filer));
    let page = recorder.handle().render();
    let begin = format!("{}{{source=\"{}\",state=\"", SOURCE_STATE.name, entry.name);
    let lines = page.lines().filter_map(|line| line.strip_prefix(&begin));
    let value = |line: &str| {
        let (word, value) = line.split_once("\"} ").expect("a value");
        (word.to_owned(), value == "1")
    };
    lines.map(value).collect()
}

/// Goal: each state is told with its word, its reason and, if it wants one, its next step: in `status`, in
/// the log, as an event, and as the one series of the gauge that is 1.
#[test]
fn each_state_is_told_in_status_log_events_and_metrics() {
    for state in State::ALL {
        let entry = in_state(state);
        assert_eq!(lacks(&entry), [""; 0], "{state}");
        let document = StatusDocument::hub(vec![entry.clone()], None, None);
        let text = view(&document, Some(&entry.name), Look::PLAIN);
        let from = if state == State::InSync { State::Offline } else { State::InSync };
        let (line, event) = told(from, &entry);
        for shown in [&text, &line] {
            for what in [state.as_str(), &entry.reason, &entry.next_step] {
                assert!(shown.contains(what), "{state}: {what:?} is not in\n{shown}");
            }
        }
        let loud = match state.word() {
            HealthWord::Ok => " INFO ",
            HealthWord::Warning => " WARN ",
            HealthWord::Critical => "ERROR ",
        };
        assert!(line.contains(loud) && line.contains(&format!("from=\"{from}\"")), "{line}");
        assert_eq!(event, format!("{from} -> {state}"));
        for is_filer in [false, true] {
            // One that was retired has no series, and only a filer is ever fenced.
            let has =
                |state: State| state != State::Retired && (is_filer || state != State::Fenced);
            let wanted = State::ALL.into_iter().filter(|one| has(*one));
            let wanted: Vec<_> = wanted.map(|one| (one.to_string(), one == state)).collect();
            let mut shown = gauges(&entry, is_filer);
            shown.sort_by_key(|(word, _)| wanted.iter().position(|(wanted, _)| wanted == word));
            assert_eq!(shown, wanted, "{state}");
        }
    }
}

/// The negative control: what is told of no state is seen.
#[test]
fn control_a_state_without_reason_or_next_step_is_seen() {
    for state in State::ALL {
        let bare = SourceEntry { reason: String::new(), ..in_state(state) };
        assert_eq!(lacks(&bare), ["a reason"], "{state}");
        let bare = SourceEntry { next_step: String::new(), ..in_state(state) };
        assert_eq!(lacks(&bare).is_empty(), !state.wants_a_next_step(), "{state}");
    }
    let same = in_state(State::Offline);
    assert_eq!(told(State::Offline, &same), (String::new(), String::new()), "nothing changed");
}
