//! Who did what, when, and what came of it: the newest of it, in memory.
//!
//! Written by the admin socket's server for each command that changes something, and by the process
//! itself for what it notices: states of sources, files that were read. Read by `mirrorhub events`. It
//! holds [`EVENTS_KEPT`] events of bounded texts, and says of whom it has read before what it has lost:
//! a restart is another boot, and numbers that are gone are counted.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Notify;

use super::message::Request;
use crate::limits::{EVENT_TEXT_BYTES, EVENTS_KEPT};
use crate::status::SCHEMA;
use crate::status::answers::{Event, EventsAnswer};
use crate::units::ids::random_u64;
use crate::units::machine;

/// How long a reader is kept waiting for the next event. Longer under test, so that none ends by itself.
const WAIT: Duration = Duration::from_secs(if cfg!(test) { 600 } else { 5 });

/// The events of one process.
#[derive(Debug)]
pub struct Journal {
    boot: u64,
    state: Mutex<State>,
    noted: Notify,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    kept: VecDeque<Event>,
}

impl Default for Journal {
    fn default() -> Self {
        // Without random numbers the clock tells starts apart.
        let boot = random_u64().unwrap_or_else(|_| machine::unix_seconds().unsigned_abs());
        Self { boot, state: Mutex::default(), noted: Notify::new() }
    }
}

impl Journal {
    /// Notes that `who` did `what`, with that result.
    pub fn note(&self, who: &str, what: &str, result: &str) {
        let cut = |text: &str| text[..text.floor_char_boundary(EVENT_TEXT_BYTES)].to_owned();
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        if state.kept.len() == EVENTS_KEPT {
            state.kept.pop_front();
        }
        let (at_seconds, who, what) = (machine::unix_seconds(), cut(who), cut(what));
        state.kept.push_back(Event { number, at_seconds, who, what, result: cut(result) });
        drop(state);
        self.noted.notify_waiters();
    }

    /// What was noted behind the first `since` events of `boot`, all that there is if it was another
    /// one. With `wait` it is waited some seconds for one.
    pub async fn behind(&self, boot: Option<&str>, since: u64, wait: bool) -> EventsAnswer {
        let mut noted = std::pin::pin!(self.noted.notified());
        noted.as_mut().enable();
        let answer = self.look(boot, since);
        if !wait || !answer.events.is_empty() || answer.passed_over > 0 {
            return answer;
        }
        // Whether it came or not.
        drop(tokio::time::timeout(WAIT, noted).await);
        self.look(boot, since)
    }

    /// The newest events from that number on, at most so many, oldest first.
    pub fn newest(&self, since: u64, most: usize) -> Vec<Event> {
        let state = self.lock();
        let mut newest: Vec<Event> =
            state.kept.iter().rev().take(most).filter(|e| e.number >= since).cloned().collect();
        newest.reverse();
        newest
    }

    fn look(&self, boot: Option<&str>, since: u64) -> EventsAnswer {
        let own = format!("{:016x}", self.boot);
        let state = self.lock();
        let since = if boot == Some(own.as_str()) { since } else { 0 };
        let first = state.kept.front().map_or(state.next, |event| event.number);
        let events = state.kept.iter().filter(|event| event.number >= since).cloned().collect();
        let passed_over = first.saturating_sub(since);
        EventsAnswer { schema: SCHEMA, boot: own, next: state.next, passed_over, events }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A command in words, if it changes something or takes long enough to be told.
pub(super) fn words(request: &Request) -> Option<String> {
    let reads = match request {
        Request::Status { .. }
        | Request::Kept { .. }
        | Request::ConfigDiff {}
        | Request::DeviceList {}
        | Request::Seeds {}
        | Request::Events { .. } => true,
        Request::Checkpoint { .. }
        | Request::Drop { .. }
        | Request::Verify { .. }
        | Request::Failover { .. }
        | Request::Failback { .. }
        | Request::Forget { .. }
        | Request::Seed { .. }
        | Request::SeedDiscard { .. }
        | Request::Scrub { .. }
        | Request::DeviceFail { .. }
        | Request::DeviceReplace { .. }
        | Request::DeviceAdd { .. }
        | Request::PoolCheck {} => false,
    };
    if reads {
        return None;
    }
    let Ok(Value::Object(fields)) = serde_json::to_value(request) else { return None };
    let mut words = fields.get("command")?.as_str()?.to_owned();
    for (key, value) in fields.iter().filter(|(key, _)| *key != "command") {
        match value {
            Value::Null | Value::Bool(false) => {}
            Value::Bool(true) => words.push_str(&format!(" {key}")),
            Value::String(text) => words.push_str(&format!(" {key}={text}")),
            other @ (Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
                words.push_str(&format!(" {key}={other}"))
            }
        }
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::convert::to_u64;

    #[tokio::test]
    async fn the_newest_are_kept_and_what_is_gone_is_told() {
        let journal = Journal::default();
        let empty = journal.behind(None, 0, false).await;
        assert_eq!((empty.next, empty.passed_over, empty.events.len()), (0, 0, 0));
        let boot = empty.boot;
        for number in 0..EVENTS_KEPT + 3 {
            journal.note("uid 0", &format!("checkpoint {number}"), "done");
        }
        let all = journal.behind(Some(&boot), 0, false).await;
        assert_eq!((all.passed_over, all.events.len()), (3, EVENTS_KEPT));
        assert_eq!(all.events[0].what, "checkpoint 3");
        let next = to_u64(EVENTS_KEPT) + 3;
        assert_eq!(all.next, next);
        let behind = journal.behind(Some(&boot), next - 2, false).await;
        assert_eq!((behind.passed_over, behind.events.len()), (0, 2));
        // Of another boot: from the begin.
        let other = journal.behind(Some("1"), next - 2, false).await;
        assert_eq!(other.events.len(), EVENTS_KEPT);
        // Texts are bounded.
        journal.note(&"\u{20ac}".repeat(EVENT_TEXT_BYTES), "x", "y");
        let long = journal.behind(Some(&boot), next, false).await;
        assert!(long.events[0].who.len() <= EVENT_TEXT_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_waits_hears_the_next_one() {
        let journal = std::sync::Arc::new(Journal::default());
        let boot = journal.behind(None, 0, true).await.boot;
        let reader = journal.clone();
        let waits = tokio::spawn(async move { reader.behind(Some(&boot), 0, true).await });
        tokio::task::yield_now().await;
        journal.note("filer-a", "in-sync -> offline", "the source is not connected");
        assert_eq!(waits.await.unwrap().events.len(), 1);
    }

    #[test]
    fn only_what_does_something_is_told() {
        let source = Some("filer-a".parse().unwrap());
        let request = Request::Checkpoint { source, keep: None };
        assert_eq!(words(&request).as_deref(), Some("checkpoint source=filer-a"));
        assert_eq!(words(&Request::ConfigDiff {}), None);
        let scrub = Request::Scrub { wait: true, stop: false };
        assert_eq!(words(&scrub).as_deref(), Some("scrub wait"));
    }
}
