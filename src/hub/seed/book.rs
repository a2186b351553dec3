//! What is shown of seeds: which there are, which are being filled, what has become of them.
//!
//! Written by whoever fills, takes over or gives up a seed, behind the commit that did it; read by status,
//! which asks no store. A start finds in the pool what waits; what was taken over or given up before is in
//! the log of then. Each change that nobody sees in a state of its source is also news, for `events`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use crate::hub::lane::lock;
use crate::limits::{EVENTS_KEPT, SEEDS_ENDED_SHOWN_MAX};
use crate::pool::work::WorkRow;
use crate::units::machine;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{BlockCount, ByteCount};

/// How a seed is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Somebody feeds it.
    Filling,
    /// Whoever did has gone before its end: its source waits for it.
    Unfinished,
    /// It waits for its source.
    Waiting,
    /// The first image begins with it.
    Adopted,
    /// A command has given it up.
    Discarded,
}

/// One seed, for whoever looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    /// How it is.
    pub fate: Fate,
    /// When something came to it last, in seconds since 1970.
    pub taken_at: Option<i64>,
    /// When it came to that fate, where that is its end.
    pub ended_at: Option<i64>,
    /// Size of its volume.
    pub size: ByteCount,
    /// Blocks of the pool that it has, or has given back.
    pub blocks: BlockCount,
}

/// Something that has become of a seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Whose.
    pub source: SourceName,
    /// What.
    pub what: String,
    /// With what result.
    pub result: String,
}

type Key = (SourceName, VolumeName);

/// All of them.
#[derive(Debug, Default)]
pub struct Book(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    seeds: BTreeMap<Key, Shown>,
    /// Which of these have ended, the oldest first.
    ended: VecDeque<Key>,
    news: VecDeque<News>,
    /// Volumes that are fed now.
    fed: BTreeSet<Key>,
    /// Sources that are being forgotten.
    leaving: BTreeSet<SourceName>,
}

/// Why nobody can begin with a seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::hub) enum Busy {
    /// Somebody fills it.
    Filled(VolumeName),
    /// Its source is being forgotten.
    Leaving,
}

impl State {
    fn end(&mut self, key: Key, shown: Shown) {
        self.ended.retain(|other| *other != key);
        if self.ended.len() == SEEDS_ENDED_SHOWN_MAX
            && let Some(oldest) = self.ended.pop_front()
        {
            self.seeds.remove(&oldest);
        }
        self.ended.push_back(key.clone());
        self.seeds.insert(key, shown);
    }

    fn put(&mut self, key: Key, shown: Shown) {
        self.ended.retain(|other| *other != key);
        self.seeds.insert(key, shown);
    }

    fn tell(&mut self, (source, volume): &Key, what: &str, result: String) {
        if self.news.len() == EVENTS_KEPT {
            self.news.pop_front();
        }
        let what = format!("seed of {volume} {what}");
        self.news.push_back(News { source: source.clone(), what, result });
    }
}

impl Book {
    /// What a start finds in the pool.
    pub fn of(rows: &[Arc<WorkRow>]) -> Self {
        let book = Self::default();
        for row in rows {
            let (Some(seed), Some((_, tree))) = (&row.seed, row.trees.first()) else { continue };
            let fate = if seed.finished { Fate::Waiting } else { Fate::Unfinished };
            let (taken_at, blocks) = (seed.taken_at, BlockCount(row.blocks));
            let shown = Shown { fate, taken_at, ended_at: None, size: tree.size, blocks };
            lock(&book.0).put((seed.source.clone(), seed.volume.clone()), shown);
        }
        book
    }

    /// The seeds of a source, by volume.
    pub fn of_source(&self, source: &SourceName) -> Vec<(VolumeName, Shown)> {
        let state = lock(&self.0);
        let own = state.seeds.iter().filter(|((name, _), _)| name == source);
        own.map(|((_, volume), shown)| (volume.clone(), *shown)).collect()
    }

    /// Every source that has one that has not ended.
    pub fn sources(&self) -> BTreeSet<SourceName> {
        let state = lock(&self.0);
        let there = state.seeds.keys().filter(|key| !state.ended.contains(key));
        there.map(|(source, _)| source.clone()).collect()
    }

    /// What has become of seeds since this was asked last.
    pub fn news(&self) -> Vec<News> {
        lock(&self.0).news.drain(..).collect()
    }

    /// Somebody begins to feed it, or to give it up. `alone`: while nobody does so with another of that
    /// source.
    pub(in crate::hub) fn begin(
        self: &Arc<Self>,
        source: &SourceName,
        volume: &VolumeName,
        alone: bool,
    ) -> Result<Turn, Busy> {
        let mut state = lock(&self.0);
        if state.leaving.contains(source) {
            return Err(Busy::Leaving);
        }
        let what = (source.clone(), volume.clone());
        let others = |(name, other): &&Key| name == source && (alone || other == volume);
        if let Some((_, other)) = state.fed.iter().find(others) {
            return Err(Busy::Filled(other.clone()));
        }
        state.fed.insert(what.clone());
        Ok(Turn { book: Arc::clone(self), what })
    }

    /// The volume of a source that is being filled now.
    pub(super) fn under_way(&self, source: &SourceName) -> Option<VolumeName> {
        let state = lock(&self.0);
        state.fed.iter().find(|(met, _)| met == source).map(|(_, volume)| volume.clone())
    }

    /// Nobody begins with a seed of that source until the answer is dropped.
    pub(super) fn leave(self: &Arc<Self>, source: &SourceName) -> Result<Leaving, Busy> {
        let mut state = lock(&self.0);
        if let Some((_, volume)) = state.fed.iter().find(|(met, _)| met == source) {
            return Err(Busy::Filled(volume.clone()));
        }
        match state.leaving.insert(source.clone()) {
            true => Ok(Leaving { book: Arc::clone(self), source: source.clone() }),
            false => Err(Busy::Leaving),
        }
    }

    /// Its source has taken it over.
    pub(super) fn adopted(&self, source: &SourceName, volume: &VolumeName, row: &WorkRow) {
        let (key, shown) = ended((source, volume), row, Fate::Adopted);
        let (size, blocks) = (shown.size, shown.blocks);
        tracing::info!(%source, %volume, %size, %blocks, "seed adopted: the image begins with it");
        let mut state = lock(&self.0);
        state.tell(&key, "adopted", "the image begins with it".to_owned());
        state.end(key, shown);
    }

    /// A command has given it up.
    pub(super) fn given_up(
        &self,
        source: &SourceName,
        volume: &VolumeName,
        row: &WorkRow,
        why: &str,
    ) {
        let (key, shown) = ended((source, volume), row, Fate::Discarded);
        let blocks = shown.blocks;
        tracing::warn!(%source, %volume, %blocks, "seed given up: {why}");
        let mut state = lock(&self.0);
        state.tell(&key, "given up", why.to_owned());
        state.end(key, shown);
    }

    /// Nothing is shown any more of a source that was forgotten.
    fn forget(&self, source: &SourceName) {
        let mut state = lock(&self.0);
        state.seeds.retain(|(name, _), _| name != source);
        state.ended.retain(|(name, _)| name != source);
    }
}

fn ended((source, volume): (&SourceName, &VolumeName), row: &WorkRow, fate: Fate) -> (Key, Shown) {
    let size = row.trees.first().map_or(ByteCount(0), |(_, tree)| tree.size);
    let taken_at = row.seed.as_ref().and_then(|seed| seed.taken_at);
    let (ended_at, blocks) = (Some(machine::unix_seconds()), BlockCount(row.blocks));
    ((source.clone(), volume.clone()), Shown { fate, taken_at, ended_at, size, blocks })
}

/// One who feeds a seed or gives it up; others may when it is dropped.
#[derive(Debug)]
pub(in crate::hub) struct Turn {
    book: Arc<Book>,
    what: Key,
}

impl Turn {
    /// It was kept as it is.
    pub(super) fn kept(&self, fate: Fate, taken_at: i64, (size, blocks): (ByteCount, BlockCount)) {
        let shown = Shown { fate, taken_at: Some(taken_at), ended_at: None, size, blocks };
        lock(&self.book.0).put(self.what.clone(), shown);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = lock(&self.book.0);
        state.fed.remove(&self.what);
        if let Some(shown) = state.seeds.get_mut(&self.what)
            && shown.fate == Fate::Filling
        {
            shown.fate = Fate::Unfinished;
        }
    }
}

/// A source that is being forgotten.
#[derive(Debug)]
pub(in crate::hub) struct Leaving {
    book: Arc<Book>,
    source: SourceName,
}

impl Leaving {
    /// It is gone.
    pub(in crate::hub) fn has_left(self) {
        self.book.forget(&self.source);
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        lock(&self.book.0).leaving.remove(&self.source);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(fate: Fate) -> Shown {
        let (size, blocks) = (ByteCount(4096), BlockCount(1));
        Shown { fate, taken_at: None, ended_at: None, size, blocks }
    }

    #[test]
    fn one_at_a_time_fills_a_seed_and_nobody_one_of_a_source_that_leaves() {
        let book = Arc::new(Book::default());
        let (a, v0, v1) = ("a".parse().unwrap(), "v0".parse().unwrap(), "v1".parse().unwrap());
        let turn = book.begin(&a, &v0, false).unwrap();
        assert_eq!(book.begin(&a, &v0, false).unwrap_err(), Busy::Filled(v0.clone()));
        drop(book.begin(&a, &v1, false).expect("another volume"));
        assert_eq!(book.begin(&a, &v1, true).unwrap_err(), Busy::Filled(v0.clone()));
        assert_eq!(book.leave(&a).unwrap_err(), Busy::Filled(v0.clone()));
        turn.kept(Fate::Filling, 7, (ByteCount(8192), BlockCount(2)));
        assert_eq!(book.of_source(&a)[0].1.fate, Fate::Filling);
        drop(turn);
        assert_eq!(book.of_source(&a)[0].1.fate, Fate::Unfinished, "whoever fed it has gone");
        let leaving = book.leave(&a).unwrap();
        assert_eq!(book.begin(&a, &v0, false).unwrap_err(), Busy::Leaving);
        leaving.has_left();
        assert!(book.of_source(&a).is_empty());
        drop(book.begin(&a, &v0, false).expect("it has left"));
    }

    #[test]
    fn what_has_ended_is_bounded_and_what_waits_stays() {
        let book = Book::default();
        let key = |n: usize| ("a".parse().unwrap(), format!("v{n}").parse().unwrap());
        let mut state = lock(&book.0);
        state.put(key(0), shown(Fate::Waiting));
        for n in 1..SEEDS_ENDED_SHOWN_MAX + 3 {
            state.end(key(n), shown(Fate::Discarded));
            state.tell(&key(n), "given up", "for a test".to_owned());
        }
        assert_eq!(state.seeds.len(), SEEDS_ENDED_SHOWN_MAX + 1);
        assert!(state.seeds.contains_key(&key(0)) && !state.seeds.contains_key(&key(1)));
        drop(state);
        assert_eq!(book.sources().len(), 1);
        assert_eq!(book.news().len(), SEEDS_ENDED_SHOWN_MAX + 2);
        assert!(book.news().is_empty(), "told once");
    }
}
