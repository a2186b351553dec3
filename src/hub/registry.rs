//! The registry: every source the hub has a file or images for, by name.
//!
//! A dashmap behind a wall: guards never leave this file, since one held across an `.await`
//! deadlocks. Each entry holds the actor's present address (it changes when a panicked actor is
//! replaced), its arbiter, and the snapshot that status reads.

use std::sync::Arc;

use actix::Addr;
use dashmap::DashMap;

use super::actor::SourceActor;
use super::status::Snapshot;
use crate::units::latest::Latest;
use crate::units::names::SourceName;

/// One source of the hub.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its actor.
    pub actor: Addr<SourceActor>,
    /// What status shows; the actor replaces it, and waits for no reader.
    pub snapshot: Arc<Latest<Snapshot>>,
    /// Arbiter the actor and its connection live on.
    pub arbiter: usize,
}

/// All sources of the hub.
#[derive(Debug, Default)]
pub struct Registry {
    entries: DashMap<SourceName, Entry>,
}

impl Registry {
    /// An empty one.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// The source of that name.
    pub fn get(&self, name: &SourceName) -> Option<Entry> {
        self.entries.get(name).map(|entry| entry.value().clone())
    }

    /// Adds or replaces a source.
    pub fn put(&self, name: SourceName, entry: Entry) {
        self.entries.insert(name, entry);
    }

    /// Takes a source out.
    pub fn remove(&self, name: &SourceName) {
        self.entries.remove(name);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All sources by name.
    pub fn all(&self) -> Vec<(SourceName, Entry)> {
        let mut all: Vec<_> =
            self.entries.iter().map(|entry| (entry.key().clone(), entry.value().clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}
