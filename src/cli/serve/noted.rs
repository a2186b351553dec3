//! What a process notices by itself goes to its journal: states of sources, and what its health says.
//!
//! It looks at the published status once a second and tells what differs from the look before. So what
//! comes and goes between two looks is not told; the log has its causes. What is no state is told as it
//! happened. A state that has changed is in the log as well, with its reason and the next step; of what it
//! begins with, the log has how many sources are in which state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::control::journal::Journal;
use crate::observe::server::{News, Observed};
use crate::status::document::{SourceEntry, State, StatusDocument};
use crate::status::health::{HealthReason, HealthWord};

const LOOK: Duration = Duration::from_secs(1);

/// What was seen: the state of each source, and what else is to be looked at.
#[derive(Debug, Default)]
struct Seen {
    states: BTreeMap<String, String>,
    reasons: BTreeMap<Key, String>,
}

impl Seen {
    /// How many sources are in which state: `in-sync: 3, offline: 1`.
    fn counted(&self) -> String {
        let mut counts = BTreeMap::<_, usize>::new();
        for state in self.states.values() {
            *counts.entry(state.as_str()).or_default() += 1;
        }
        let counts: Vec<_> =
            counts.iter().map(|(state, many)| format!("{state}: {many}")).collect();
        counts.join(", ")
    }
}

/// A reason's object, its code, and which of several devices it is about.
type Key = (String, String, Option<String>);

/// Notes until `stop`.
pub(super) async fn watch(
    observed: Arc<dyn Observed>,
    journal: Arc<Journal>,
    stop: CancellationToken,
) {
    let mut seen: Option<Seen> = None;
    let mut tick = interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        for News { object, what, result } in observed.news() {
            journal.note(&object, &what, &result);
        }
        let document = observed.status();
        let now = look(&document);
        match &seen {
            Some(before) => differences(before, &now, &document, &journal),
            // What it begins with is no event.
            None => tracing::info!(states = now.counted(), "looking at the sources"),
        }
        seen = Some(now);
    }
}

fn look(document: &StatusDocument) -> Seen {
    let sources = document.sources();
    let states = sources.iter().map(|one| (one.name.to_string(), one.state.to_string()));
    let states: BTreeMap<_, _> = states.collect();
    // Of sources their states tell.
    let others = document.health().reasons.iter().filter(|one| !states.contains_key(&one.object));
    let devices = || document.pool().into_iter().flat_map(|pool| &pool.devices);
    let reasons = others.map(|HealthReason { object, code, text, .. }| {
        let mut named = devices().map(|device| &device.name);
        let device = named.find(|name| text.starts_with(&format!("device {name} ")));
        ((object.clone(), code.clone(), device.cloned()), text.clone())
    });
    Seen { reasons: reasons.collect(), states }
}

/// As loud as the state is bad.
fn log(from: &str, entry: &SourceEntry) {
    let SourceEntry { name: source, state, reason, next_step, .. } = entry;
    match state.word() {
        HealthWord::Ok => tracing::info!(%source, from, %state, reason, next_step, "state"),
        HealthWord::Warning => tracing::warn!(%source, from, %state, reason, next_step, "state"),
        HealthWord::Critical => tracing::error!(%source, from, %state, reason, next_step, "state"),
    }
}

fn differences(before: &Seen, now: &Seen, document: &StatusDocument, journal: &Journal) {
    for entry in document.sources().iter() {
        let (name, state) = (entry.name.to_string(), entry.state.to_string());
        match before.states.get(&name) {
            Some(was) if *was != state => {
                journal.note(&name, &format!("{was} -> {state}"), &entry.reason);
                log(was, entry);
            }
            Some(_) => {}
            None => journal.note(&name, "added", &state),
        }
    }
    for (name, was) in &before.states {
        if !now.states.contains_key(name) {
            let (what, result) = match was.as_str() == State::Retired.as_str() {
                true => ("forgotten", "its images were given up"),
                false => ("removed", "it had no images here"),
            };
            journal.note(name, what, result);
        }
    }
    for (key, text) in now.reasons.iter().filter(|(key, _)| !before.reasons.contains_key(key)) {
        journal.note(&key.0, &key.1, text);
    }
    for key in before.reasons.keys().filter(|key| !now.reasons.contains_key(key)) {
        let (object, code, device) = key;
        match device {
            Some(device) => journal.note(object, code, &format!("is over: {device}")),
            None => journal.note(object, code, "is over"),
        }
    }
}

#[cfg(test)]
mod states;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::document::tests::entry;
    use crate::status::document::{PoolDeviceStatus, PoolStatus};

    fn document(sources: Vec<SourceEntry>, failed: &[&str]) -> StatusDocument {
        let device = |name: &str| PoolDeviceStatus {
            name: name.to_owned(),
            state: if failed.contains(&name) { "failed" } else { "in" }.to_owned(),
            ..PoolDeviceStatus::default()
        };
        let devices = ["/dev/a", "/dev/ab"].map(device).to_vec();
        let pool = PoolStatus { total_bytes: 9, free_bytes: 9, devices, ..PoolStatus::default() };
        StatusDocument::hub(sources, None, Some(pool))
    }

    /// What is noted between two looks: who, what and the result of each.
    async fn noted(before: &StatusDocument, now: &StatusDocument) -> Vec<[String; 3]> {
        let journal = Journal::default();
        differences(&look(before), &look(now), now, &journal);
        let events = journal.behind(None, 0, false).await.events;
        events.into_iter().map(|event| [event.who, event.what, event.result]).collect()
    }

    /// Goal: each device has events of its own, though the reasons have one code.
    #[tokio::test]
    async fn each_device_that_fails_is_an_event() {
        let steps = [&[][..], &["/dev/a"], &["/dev/a", "/dev/ab"], &["/dev/ab"]];
        let [none, one, two, other] = steps.map(|failed| document(vec![entry()], failed));
        for (before, now, word) in [(&none, &one, "/dev/a "), (&one, &two, "/dev/ab ")] {
            let events = noted(before, now).await;
            assert_eq!(events.len(), 1, "{events:?}");
            assert_eq!(events[0][..2], ["pool", "pool-device-failed"]);
            assert!(events[0][2].contains(word), "{events:?}");
        }
        assert_eq!(noted(&none, &two).await.len(), 2, "both at once are two");
        let over = ["pool", "pool-device-failed", "is over: /dev/a"].map(str::to_owned);
        assert_eq!(noted(&two, &other).await, [over]);
        // Negative control: what stays is no event.
        assert_eq!(noted(&two, &two).await.len(), 0);
    }

    /// Goal: a source that was forgotten is not told as one that was retired.
    #[tokio::test]
    async fn a_source_that_is_gone_was_forgotten_or_never_here() {
        let with = |state| document(vec![SourceEntry { state, ..entry() }], &[]);
        let (gone, retired) = (document(Vec::new(), &[]), with(State::Retired));
        let what = |events: Vec<[String; 3]>| events.into_iter().map(|[_, what, _]| what);
        let told: Vec<_> = what(noted(&with(State::InSync), &retired).await).collect();
        assert_eq!(told, ["in-sync -> retired"]);
        assert!(what(noted(&retired, &gone).await).eq(["forgotten"]));
        assert!(what(noted(&with(State::Waiting), &gone).await).eq(["removed"]));
    }
}
