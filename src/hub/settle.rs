//! Sources come, change and go while the hub runs.
//!
//! Called with the whole set of settings whenever the files were read. Only what differs is touched:
//! a source whose setting is the same hears nothing of it. A source that is new gets its actor; one
//! whose file is gone is **retired**: its session ends, it is refused, and its images stay until
//! they are forgotten. Its actor and lane stay as well, so that it may come back as if it had been
//! away.
//!
//! A source that is served here is not retired: its clients write to it.
//!
//! A certificate that a file names no more ends the session that it began at once, also that of a source that
//! lives on the filer whose certificate it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::stream::{self, StreamExt};

use super::actor::FileChanged;
use super::extension::{Extension, State};
use super::shared::{Shared, SourceSetting};
use super::status::Snapshot;
use super::{Hub, start_actor};
use crate::units::latest::Latest;
use crate::units::names::SourceName;

/// Actors that are told of their files at the same time.
const TOLD_AT_ONCE: usize = 32;

/// What a reading of the files did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settled {
    /// New sources, and those that came back.
    pub added: Vec<SourceName>,
    /// Sources whose setting changed.
    pub changed: Vec<SourceName>,
    /// Sources whose file is gone.
    pub retired: Vec<SourceName>,
    /// Sources whose file is gone and that are served here: they stay.
    pub serving: Vec<SourceName>,
}

impl Hub {
    /// Takes the settings of all sources. One call at a time.
    pub async fn settle(&self, settings: Vec<SourceSetting>) -> Settled {
        let mut wanted: BTreeMap<SourceName, SourceSetting> =
            settings.into_iter().map(|setting| (setting.name.clone(), setting)).collect();
        let before = self.shared.settings.load_full();
        let mut settled = Settled::default();
        let mut revoked = BTreeSet::new();
        for (name, setting) in before.iter() {
            if wanted.get(name).is_none_or(|new| new.certificates != setting.certificates) {
                revoked.insert(name.clone());
            }
            match wanted.get(name) {
                Some(other) if other == setting => {}
                Some(_) => settled.changed.push(name.clone()),
                None if is_served(&self.shared, name) => {
                    wanted.insert(name.clone(), setting.clone());
                    settled.serving.push(name.clone());
                }
                None => settled.retired.push(name.clone()),
            }
        }
        settled.added = wanted.keys().filter(|name| !before.contains_key(*name)).cloned().collect();
        self.shared.settings.store(Arc::new(wanted));
        for name in &settled.added {
            self.begin(name);
        }
        let mut touched: BTreeSet<SourceName> =
            [&settled.added, &settled.changed, &settled.retired]
                .into_iter()
                .flatten()
                .cloned()
                .collect();
        touched.extend(self.living_on(&revoked));
        // One that is busy keeps no other from what its file says.
        let told = touched.iter().map(|name| self.tell(name));
        stream::iter(told).buffer_unordered(TOLD_AT_ONCE).collect::<()>().await;
        settled
    }

    /// Its actor looks at its setting again.
    async fn tell(&self, name: &SourceName) {
        let Some(entry) = self.shared.registry.get(name) else { return };
        if let Err(error) = entry.actor.send(FileChanged).await {
            // It is being replaced, and the next one looks at the settings itself.
            tracing::debug!(source = %name, %error, "actor not told of its file");
        }
    }

    /// Sources that come with the certificate of one of these filers.
    fn living_on(&self, filers: &BTreeSet<SourceName>) -> Vec<SourceName> {
        if filers.is_empty() {
            return Vec::new();
        }
        let all = self.shared.registry.all().into_iter().map(|(name, _)| name);
        let lives = |name: &SourceName| {
            self.shared.home_of(name).is_some_and(|home| filers.contains(&home))
        };
        all.filter(lives).collect()
    }

    /// An actor for a source that has none.
    pub(super) fn begin(&self, name: &SourceName) {
        if self.shared.registry.get(name).is_none() {
            let snapshot = Arc::new(Latest::new(Snapshot::waiting(name.clone())));
            let arbiter = self.shared.registry.len() % self.shared.arbiters.count().max(1);
            start_actor(&self.shared, name, snapshot, arbiter, &self.died);
        }
    }
}

/// Whether clients of that source are served here.
fn is_served(shared: &Shared, name: &SourceName) -> bool {
    let Some(lane) = shared.lanes.get(name) else { return false };
    let row = match shared.pool.catalog().source(lane.source()) {
        Ok(row) => row,
        // A catalog that does not answer says nothing: nobody is cut off for that.
        Err(_) => return true,
    };
    row.and_then(|row| Extension::of(&row).ok()).is_some_and(|extension| match extension.state {
        State::FailingOver | State::Promoted => true,
        State::Mirror | State::HandedOver => false,
    })
}
