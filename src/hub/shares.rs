//! Who may have how much of the ring (R10).
//!
//! Each source has a guaranteed share; what is nobody's share is the **burst**, from which a source
//! takes that has more in the ring than its share. Credit is given up to the share, or up to half of
//! what is left of the burst, whichever is more: a loud source, and one whose records cannot leave
//! the ring, takes what is nobody's, and never the room that others were promised.
//!
//! What a source has is noted whenever its credit is computed, which is whenever that changes. Pure.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::lane::lock;
use super::shared::SourceSetting;
use crate::units::convert::to_u64;
use crate::units::names::SourceName;

/// The settings of all sources.
pub type Settings = BTreeMap<SourceName, SourceSetting>;

/// The shares of one ring.
#[derive(Debug, Default)]
pub struct Shares(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Of which settings the sum is.
    settings: Option<Arc<Settings>>,
    /// Bytes that are promised to somebody.
    promised: u64,
    /// Bytes beyond their shares, of those that have such.
    over: BTreeMap<SourceName, u64>,
    /// Sum of them.
    taken: u64,
}

/// The share of a source in a ring of that size: what its file says, or an equal part of one half.
pub fn share(settings: &Settings, name: &SourceName, capacity: u64) -> u64 {
    let named = settings.get(name).and_then(|setting| setting.nvram_share);
    named.map_or(capacity / 2 / to_u64(settings.len()).max(1), |share| share.0)
}

impl Shares {
    /// What a source that has `used` bytes in the ring may have beyond that, as far as the ring
    /// goes.
    pub fn room(
        &self,
        settings: &Arc<Settings>,
        name: &SourceName,
        capacity: u64,
        used: u64,
    ) -> u64 {
        let own = share(settings, name, capacity);
        let mut state = lock(&self.0);
        if !state.settings.as_ref().is_some_and(|known| Arc::ptr_eq(known, settings)) {
            state.promised = settings.keys().map(|name| share(settings, name, capacity)).sum();
            state.settings = Some(Arc::clone(settings));
        }
        state.note(name, used.saturating_sub(own));
        let left = capacity.saturating_sub(state.promised).saturating_sub(state.taken);
        own.saturating_sub(used).max(left / 2)
    }

    /// The source is forgotten.
    pub fn forget(&self, name: &SourceName) {
        lock(&self.0).note(name, 0);
    }
}

impl State {
    fn note(&mut self, name: &SourceName, over: u64) {
        let before = match self.over.get_mut(name) {
            Some(known) if over > 0 => std::mem::replace(known, over),
            Some(_) => self.over.remove(name).unwrap_or(0),
            None if over > 0 => self.over.insert(name.clone(), over).unwrap_or(0),
            None => 0,
        };
        self.taken = self.taken + over - before;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::numbers::ByteCount;

    const MIB: u64 = 1 << 20;

    fn settings(shares: &[Option<u64>]) -> Arc<Settings> {
        let setting = |(at, share): (usize, &Option<u64>)| {
            let name: SourceName = format!("filer-{at}").parse().unwrap();
            let nvram_share = share.map(ByteCount);
            let (log_limit, volumes, keep) = (None, vec![], None);
            let (space_limit, bandwidth_limit) = (None, None);
            let setting = SourceSetting {
                name: name.clone(),
                nvram_share,
                log_limit,
                space_limit,
                bandwidth_limit,
                join_by: None,
                certificates: vec![],
                volumes,
                keep,
            };
            (name, setting)
        };
        Arc::new(shares.iter().enumerate().map(setting).collect())
    }

    fn name(at: usize) -> SourceName {
        format!("filer-{at}").parse().unwrap()
    }

    #[test]
    fn a_loud_source_takes_what_is_nobodys_and_no_more() {
        let (all, shares) = (settings(&[None, None, Some(8 * MIB)]), Shares::default());
        let room = |at: usize, used| shares.room(&all, &name(at), 64 * MIB, used);
        // Half of 64 in three equal parts, and 8 by its file: 34.6 are nobody's, of which half.
        let third = 64 * MIB / 2 / 3;
        let burst = 64 * MIB - 2 * third - 8 * MIB;
        assert_eq!(room(0, 0), burst / 2);
        // It fills what it is given, again and again, and nothing leaves the ring.
        let mut used = 0;
        while room(0, used) > 0 {
            used += room(0, used).min(4096);
        }
        assert!((third + burst - used) <= 1, "{used}: its share and the burst, and no more");
        // Others still have what they were promised, whatever came first.
        assert_eq!((room(1, 0), room(2, 0)), (third, 8 * MIB));
        assert_eq!((room(1, third), room(2, 9 * MIB)), (0, 0));
        // When it is drained, the others may burst.
        room(0, 0);
        assert_eq!(room(1, third), (burst - MIB) / 2);
    }

    #[test]
    fn changed_settings_are_followed_and_the_forgotten_takes_nothing() {
        let shares = Shares::default();
        let one = settings(&[Some(60 * MIB)]);
        assert_eq!(shares.room(&one, &name(0), 64 * MIB, 62 * MIB), MIB);
        let two = settings(&[Some(16 * MIB), Some(16 * MIB)]);
        assert_eq!(shares.room(&two, &name(1), 64 * MIB, 0), 16 * MIB);
        assert_eq!(shares.room(&two, &name(1), 64 * MIB, 16 * MIB), 15 * MIB);
        shares.forget(&name(0));
        assert_eq!(shares.room(&two, &name(1), 64 * MIB, 16 * MIB), 16 * MIB);
        // More promised than there is: shares stay, there is no burst.
        let three = settings(&[Some(40 * MIB), Some(40 * MIB)]);
        assert_eq!(shares.room(&three, &name(0), 64 * MIB, 39 * MIB), MIB);
    }

    proptest! {
        /// Whoever fills and drains in whatever order: what each takes of the burst fits into it, so
        /// that the room of a share is there for its owner.
        #[test]
        fn nobody_takes_the_share_of_another(
            named in prop::collection::vec(prop::option::of(1..8 * MIB), 1..6),
            steps in prop::collection::vec((0..6_usize, any::<bool>(), 0..8 * MIB), 1..200),
        ) {
            let (all, shares, capacity) = (settings(&named), Shares::default(), 64 * MIB);
            let mut used = vec![0_u64; named.len()];
            let shares_of: Vec<u64> =
                (0..named.len()).map(|at| share(&all, &name(at), capacity)).collect();
            for (at, fills, bytes) in steps {
                let at = at % named.len();
                let room = shares.room(&all, &name(at), capacity, used[at]);
                prop_assert!(room >= shares_of[at].saturating_sub(used[at]), "its share");
                used[at] = match fills {
                    true => used[at] + bytes.min(room),
                    false => used[at].saturating_sub(bytes),
                };
                shares.room(&all, &name(at), capacity, used[at]);
                let kept: u64 = used.iter().zip(&shares_of).map(|(used, own)| used.max(own)).sum();
                prop_assert!(kept <= capacity, "{kept} with the shares that are not used");
            }
        }
    }
}
