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

const NEXT: &str = "make source.toml and the source's file on the hub agree, then restart the hub";

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
        if let Some(old) = self.known.volumes.iter().filter(same).find(|old| *old != offer) {
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
            Some((_, size)) if *size != offer.size.0 => Some(format!(
                "volume {name} has {} bytes, the source's file on the hub pins {size}",
                offer.size.0
            )),
            Some(_) => None,
        }
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
            if !known.volumes.iter().any(|old| old.number == offer.number) {
                known.volumes.push(offer.clone());
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

fn refusal(offer: &VolumeOffer, reason: String) -> VolumeRefusal {
    let (volume, name) = (offer.number, offer.name.clone());
    VolumeRefusal { volume, name, reason, next_step: NEXT.to_owned() }
}
