//! Which sources were failed over, for status and for those who ask at the same time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::report::Refusal;
use crate::hub::extension::{Extension, State};
use crate::hub::lane::lock;
use crate::hub::shared::Lanes;
use crate::pool::rows::SourceRow;
use crate::units::names::SourceName;
use crate::units::numbers::Epoch;

/// What status shows of a source that was failed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// How far it is.
    pub state: State,
    /// Why it is there.
    pub reason: String,
    /// What to do.
    pub next_step: String,
}

impl View {
    /// The words for a state that nothing more is known of.
    pub fn of(state: State, epoch: Epoch) -> Self {
        let number = epoch.number;
        let (reason, next_step) = match state {
            State::Mirror => {
                return Self { state, reason: String::new(), next_step: String::new() };
            }
            State::FailingOver => (
                format!("the source is fenced by epoch {number}, its log is being replayed"),
                "wait; it goes on by itself, also after a restart".to_owned(),
            ),
            State::Promoted => (
                format!(
                    "failed over in epoch {number}: the volumes are here, the source is fenced"
                ),
                "`mirrorhub failback` gives them back".to_owned(),
            ),
            State::HandedOver => (
                format!("handed over in epoch {number}, the filer has not said that it serves"),
                "start that filer; if it is lost for good, `mirrorhub failover` takes it back"
                    .to_owned(),
            ),
        };
        Self { state, reason, next_step }
    }
}

/// The failovers of a hub.
#[derive(Debug, Default)]
pub struct Failovers {
    views: Mutex<BTreeMap<SourceName, View>>,
    running: Mutex<BTreeSet<SourceName>>,
    stopping: AtomicBool,
}

/// One failover of a source at a time.
#[derive(Debug)]
pub struct Turn<'a> {
    failovers: &'a Failovers,
    name: SourceName,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.failovers.running).remove(&self.name);
    }
}

impl Failovers {
    /// What the catalog says at start.
    pub fn recovered(rows: &[SourceRow]) -> Result<Self, String> {
        let mut views = BTreeMap::new();
        for row in rows {
            let state = Extension::of(row)?.state;
            if state != State::Mirror {
                views.insert(row.name.clone(), View::of(state, row.epoch));
            }
        }
        Ok(Self { views: Mutex::new(views), ..Self::default() })
    }

    /// The source, if it was failed over.
    pub fn view(&self, name: &SourceName) -> Option<View> {
        lock(&self.views).get(name).cloned()
    }

    /// Sources that are in that state.
    pub fn in_state(&self, state: State) -> Vec<SourceName> {
        let views = lock(&self.views);
        views.iter().filter(|(_, view)| view.state == state).map(|(name, _)| name.clone()).collect()
    }

    /// Notes how a source stands; a mirror is forgotten.
    pub fn set(&self, name: &SourceName, view: View) {
        let mut views = lock(&self.views);
        if view.state == State::Mirror {
            views.remove(name);
        } else {
            views.insert(name.clone(), view);
        }
    }

    /// Begins a failover of that source.
    pub fn turn(&self, name: &SourceName) -> Result<Turn<'_>, Refusal> {
        if !lock(&self.running).insert(name.clone()) {
            let reason = format!("a failover or failback of {name} is under way");
            return Err(Refusal::new(reason, "wait for its end; `mirrorhub status` shows it"));
        }
        Ok(Turn { failovers: self, name: name.clone() })
    }

    /// Those under way end at their next step.
    pub fn stop(&self, lanes: &Lanes) {
        self.stopping.store(true, Ordering::SeqCst);
        lanes.all().iter().for_each(|lane| lane.poke());
    }

    /// Whether the hub stops.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}
