//! Which of a source's volumes are mirrored, and which are left out (R20).
//!
//! Called by [`super::Mirror::step`] with each accepted Hello. A volume that is not what the hub
//! knows or what its file pins is refused alone: the others go on, and CPs are made of them. What
//! was agreed holds for the session; a change of the file counts with the next Hello.
//!
//! What is left out is durable: entries of such a volume lie in the log like all others and do not
//! count, neither in a replay nor in a failover, until a pass has brought its image up.

use super::{Mirror, refuse};
use crate::limits::{VOLUME_BYTES_MAX, VOLUMES_PER_SOURCE_MAX};
use crate::units::hash::Root;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::wire::message::{Refused, RefusedCode, VolumeOffer, VolumeRefusal, VolumeRoot};

const NEXT: &str =
    "make source.toml and the source's file on the hub agree: the larger size, first on the hub";

/// A volume whose entries in the log do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeftOut {
    /// Which.
    pub volume: VolumeNumber,
    /// The CP that its image is of; 0 if it has none.
    pub cp: CpNumber,
    /// It is refused; else it is agreed on again, and its image is to be brought up.
    pub refused: bool,
}

impl LeftOut {
    /// CP `cp` was published and moves the images of `volumes`: they are left out no more, but for
    /// those that were refused while it was under way.
    pub fn published(list: &mut Vec<Self>, cp: CpNumber, volumes: impl Fn(VolumeNumber) -> bool) {
        list.retain_mut(|left| {
            if !volumes(left.volume) {
                return true;
            }
            left.cp = cp;
            left.refused
        });
    }
}

impl Mirror {
    /// The volumes that a Hello announces, judged one by one. An error is about all of them: what
    /// no source says, or nothing is left to mirror.
    pub(super) fn judge(&self, offers: &[VolumeOffer]) -> Result<Vec<VolumeRefusal>, Refused> {
        if offers.len() > VOLUMES_PER_SOURCE_MAX {
            let reason =
                format!("{} volumes, a source has at most {VOLUMES_PER_SOURCE_MAX}", offers.len());
            return Err(refuse(RefusedCode::Volume, reason, NEXT));
        }
        let mut refused = Vec::new();
        for (index, offer) in offers.iter().enumerate() {
            let twice = |other: &VolumeOffer| {
                other.name == offer.name || other.number == offer.number || other.id == offer.id
            };
            let size = offer.size.is_whole_blocks() && offer.size.0 <= VOLUME_BYTES_MAX;
            if offers[..index].iter().any(twice) || !size {
                let name = &offer.name;
                let reason = format!("volume {name} is announced twice or with a bad size");
                return Err(refuse(RefusedCode::Volume, reason, NEXT));
            }
            if let Some(reason) = self.differs(offer) {
                refused.push(refusal(offer, reason));
            }
        }
        let gone = |old: &&VolumeOffer| !offers.iter().any(|offer| offer.number == old.number);
        for old in self.known.volumes.iter().filter(gone) {
            refused.push(refusal(old, format!("volume {} is no longer announced", old.name)));
        }
        let none = offers.iter().all(|offer| refused.iter().any(|no| no.volume == offer.number));
        match refused.first() {
            Some(first) if none || refused.len() > VOLUMES_PER_SOURCE_MAX => {
                Err(refuse(RefusedCode::Volume, first.reason.clone(), NEXT))
            }
            _ => Ok(refused),
        }
    }

    /// Why a volume is not the one that is known, or pinned, here.
    fn differs(&self, offer: &VolumeOffer) -> Option<String> {
        let name = &offer.name;
        let same = |old: &&VolumeOffer| {
            old.number == offer.number || old.name == *name || old.id == offer.id
        };
        let mut known = self.known.volumes.iter().filter(same);
        if let Some(old) = known.clone().find(|old| old.size > offer.size && is_one(old, offer)) {
            return Some(format!(
                "volume {name} has {} bytes, and {} here: a volume does not become smaller",
                offer.size, old.size
            ));
        }
        if let Some(old) = known.find(|old| !is_one(old, offer)) {
            return Some(format!(
                "volume {name} (number {}, id {}, {} bytes) is known here as {} (number {}, id \
                 {}, {} bytes)",
                offer.number, offer.id, offer.size, old.name, old.number, old.id, old.size
            ));
        }
        if self.known.pinned.is_empty() {
            return None;
        }
        match self.known.pinned.iter().find(|(pin, _)| pin == name.as_str()) {
            None => Some(format!("volume {name} is not in the source's file on the hub")),
            // The hub's file comes first: what has not grown yet is what it was.
            Some((_, size)) if *size > offer.size.0 && self.knows_as_is(offer) => None,
            Some((_, size)) if *size != offer.size.0 => Some(format!(
                "volume {name} has {} bytes, the source's file on the hub pins {size}",
                offer.size.0
            )),
            Some(_) => None,
        }
    }

    fn knows_as_is(&self, offer: &VolumeOffer) -> bool {
        self.known.volumes.contains(offer)
    }

    /// Whether a Hello like the last one would be judged otherwise by now: the hub's file has
    /// changed. The source is to say it again.
    pub fn is_outdated(&self) -> bool {
        let fits = |no: &VolumeRefusal| {
            let mut offered = self.offered.iter();
            offered.any(|offer| offer.number == no.volume && self.differs(offer).is_none())
        };
        self.is_joined() && self.known.refused.iter().any(fits)
    }

    /// What an accepted Hello announces is known from now on, and what is left out.
    pub(super) fn agree(&mut self, offers: &[VolumeOffer], refused: Vec<VolumeRefusal>) {
        let known = &mut self.known;
        let is_refused = |volume| refused.iter().any(|no| no.volume == volume);
        let before = std::mem::take(&mut known.left_out);
        let image_of = |volume| {
            let left = before.iter().find(|left| left.volume == volume).map(|left| left.cp);
            let held = known.volumes.iter().any(|old| old.number == volume);
            left.unwrap_or(if held { known.applied_cp } else { CpNumber(0) })
        };
        let left = |volume, refused| LeftOut { volume, cp: image_of(volume), refused };
        let mut left_out: Vec<LeftOut> = refused.iter().map(|no| left(no.volume, true)).collect();
        let behind = before.iter().filter(|left| {
            let offered = offers.iter().any(|offer| offer.number == left.volume);
            offered && !is_refused(left.volume) && left.cp < known.applied_cp
        });
        left_out.extend(behind.map(|old| left(old.volume, false)));
        for offer in offers.iter().filter(|offer| !is_refused(offer.number)) {
            match known.volumes.iter_mut().find(|old| old.number == offer.number) {
                // From here on its CPs have that size, and its entries may.
                Some(old) => old.size = offer.size,
                None => known.volumes.push(offer.clone()),
            }
        }
        known.left_out = left_out;
        known.refused = refused;
    }

    /// The volumes that CPs are made of.
    pub fn agreed(&self) -> impl Iterator<Item = &VolumeOffer> {
        let known = &self.known;
        let refused = |volume| known.refused.iter().any(|no| no.volume == volume);
        known.volumes.iter().filter(move |offer| !refused(offer.number))
    }

    /// A CP was published with these roots; images of other volumes stay where they were.
    pub(super) fn publish(&mut self, cp: CpNumber, roots: Vec<(VolumeNumber, Root)>) {
        let known = &mut self.known;
        let among = |volume| roots.iter().any(|(moved, _)| *moved == volume);
        LeftOut::published(&mut known.left_out, cp, among);
        known.roots.retain(|root| !among(root.volume));
        known.roots.extend(roots.iter().map(|&(volume, root)| VolumeRoot { volume, root }));
        known.roots.sort_by_key(|root| root.volume);
    }
}

/// Whether both are one volume, of whatever size.
fn is_one(one: &VolumeOffer, other: &VolumeOffer) -> bool {
    (&one.name, one.number, one.id) == (&other.name, other.number, other.id)
}

fn refusal(offer: &VolumeOffer, reason: String) -> VolumeRefusal {
    let (volume, name) = (offer.number, offer.name.clone());
    VolumeRefusal { volume, name, reason, next_step: NEXT.to_owned() }
}
