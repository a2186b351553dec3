//! What a process notices by itself goes to its journal: states of sources, and what its health says.
//!
//! It looks at the published status once a second and tells what differs from the look before. So what
//! comes and goes between two looks is not told; the log has it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::control::journal::Journal;
use crate::observe::server::Observed;
use crate::status::document::StatusDocument;
use crate::status::health::HealthReason;

const LOOK: Duration = Duration::from_secs(1);

/// What was seen: the state of each source, and what else is to be looked at.
#[derive(Debug, Default)]
struct Seen {
    states: BTreeMap<String, String>,
    reasons: BTreeMap<(String, String), String>,
}

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
        let document = observed.status();
        let now = look(&document);
        // What it begins with is no event.
        if let Some(before) = &seen {
            differences(before, &now, &document, &journal);
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
    let reasons = others.map(|HealthReason { object, code, text, .. }| {
        ((object.clone(), code.clone()), text.clone())
    });
    Seen { reasons: reasons.collect(), states }
}

fn differences(before: &Seen, now: &Seen, document: &StatusDocument, journal: &Journal) {
    for entry in document.sources().iter() {
        let (name, state) = (entry.name.to_string(), entry.state.to_string());
        match before.states.get(&name) {
            Some(was) if *was != state => {
                journal.note(&name, &format!("{was} -> {state}"), &entry.reason);
            }
            Some(_) => {}
            None => journal.note(&name, "added", &state),
        }
    }
    for name in before.states.keys().filter(|name| !now.states.contains_key(*name)) {
        journal.note(name, "retired", "it is not shown any more");
    }
    for ((object, code), text) in &now.reasons {
        if !before.reasons.contains_key(&(object.clone(), code.clone())) {
            journal.note(object, code, text);
        }
    }
    for (object, code) in before.reasons.keys() {
        if !now.reasons.contains_key(&(object.clone(), code.clone())) {
            journal.note(object, code, "is over");
        }
    }
}
