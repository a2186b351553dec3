//! How a hub judges who says Hello, and what it answers.
//!
//! Called by [`super::Mirror::step`], and by the shell before it ends an older connection. Ids,
//! epochs and generations decide, never names (invariant 12); a refused Hello changes nothing.

use super::super::CP_NUMBER_MAX;
use super::{Action, Mirror, State, refuse};
use crate::limits::{VOLUME_BYTES_MAX, VOLUMES_PER_SOURCE_MAX};
use crate::units::numbers::Epoch;
use crate::wire::message::{
    Hello, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Refused, RefusedCode, Standing, VolumeOffer,
    Welcome,
};

impl Mirror {
    pub(super) fn hello(&mut self, hello: &Hello, actions: &mut Vec<Action>) {
        if let Err(refused) = self.accepts(hello) {
            actions.push(Action::Refuse(refused));
            return;
        }
        // A newer accepted Hello ends the older session (R7): its apply and its frames with it.
        self.disconnected(actions);
        if self.known.epoch.number == 0 {
            // Hub and source have never met: the first epoch is the generation's own random id.
            self.known.epoch = Epoch { number: 1, id: hello.generation.id };
        }
        self.known.source = Some(hello.source);
        self.known.generation = hello.generation;
        self.known.cp_max = self.known.cp_max.max(hello.cp_max);
        self.known.volumes.clone_from(&hello.volumes);
        self.known.policy = Some(hello.policy);
        self.known.alone = hello.alone;
        let version = hello.version.min(PROTOCOL_VERSION);
        self.state = State::Joining { version, recorded: false };
        actions.extend(self.record());
    }

    /// The source's mark has changed: kept as what Hello brought is.
    pub(super) fn stands(&mut self, standing: Standing, actions: &mut Vec<Action>) {
        self.known.alone = standing.alone;
        actions.extend(self.record());
    }

    /// What is known of the source that was here is to be kept.
    fn record(&self) -> Option<Action> {
        let known = &self.known;
        Some(Action::Record {
            source: known.source?,
            generation: known.generation,
            epoch: known.epoch,
            volumes: known.volumes.clone(),
            policy: known.policy.unwrap_or_default(),
            alone: known.alone,
        })
    }

    /// Who is who is decided by ids, epochs and generations, never by names (invariant 12). A shell
    /// asks before it ends an older connection for this one: a clone must not cut the original.
    pub fn accepts(&self, hello: &Hello) -> Result<(), Refused> {
        let known = &self.known;
        if hello.version < PROTOCOL_VERSION_MIN || hello.version_min > PROTOCOL_VERSION {
            let reason = format!(
                "the source speaks protocol versions {} to {}, the hub {PROTOCOL_VERSION_MIN} to \
                 {PROTOCOL_VERSION}",
                hello.version_min, hello.version
            );
            return Err(refuse(RefusedCode::Version, reason, "upgrade the hub first"));
        }
        if let Some(source) = known.source.filter(|&source| source != hello.source) {
            let reason = format!(
                "the name {} belongs to source {source}, this is source {}",
                hello.name, hello.source
            );
            let next = "give the new source another name, or forget the old one on the hub";
            return Err(refuse(RefusedCode::OtherSource, reason, next));
        }
        if let Some(hub) = hello.hub.filter(|&hub| hub != known.hub) {
            let reason = format!("the source belongs to hub {hub}, this is hub {}", known.hub);
            return Err(refuse(RefusedCode::OtherHub, reason, "check `hub` in source.toml"));
        }
        let older = hello.epoch.number > 0 && hello.epoch.number < known.epoch.number;
        if older || known.failed_over {
            let reason = format!(
                "the source was failed over: epoch {} ({:016x}) is in force, the source is in \
                 epoch {} ({:016x})",
                known.epoch.number, known.epoch.id, hello.epoch.number, hello.epoch.id
            );
            let next = "see `mirrorhub status` on the hub; `failback` gives the volumes back";
            return Err(refuse(RefusedCode::Fenced, reason, next));
        }
        if hello.epoch.number > 0 && hello.epoch != known.epoch {
            let reason = format!(
                "the source is in epoch {} ({:016x}), the hub in epoch {} ({:016x})",
                hello.epoch.number, hello.epoch.id, known.epoch.number, known.epoch.id
            );
            let next = "see `mirrorhub status` on the hub";
            return Err(refuse(RefusedCode::Diverged, reason, next));
        }
        let used = hello.cp_max.max(hello.own_cp);
        if used > CP_NUMBER_MAX {
            let reason = format!("the source says that CP {used} was used");
            return Err(refuse(RefusedCode::Protocol, reason, "both ends must run mirrorhub"));
        }
        let (old, new) = (known.generation, hello.generation);
        if new.number < old.number || (new.number == old.number && new.id != old.id) {
            let reason = format!(
                "the source says boot {} ({:016x}), the hub has seen boot {} ({:016x}): its state \
                 is a clone or an old copy",
                new.number, new.id, old.number, old.id
            );
            let next = "start the original, or restore its newest state directory";
            return Err(refuse(RefusedCode::Generation, reason, next));
        }
        if let Some(fault) = &self.faulted {
            let reason = format!("the hub's log of this source failed: {fault}");
            return Err(refuse(RefusedCode::Faulted, reason, "see `mirrorhub status` on the hub"));
        }
        self.accepts_volumes(&hello.volumes)
    }

    fn accepts_volumes(&self, offers: &[VolumeOffer]) -> Result<(), Refused> {
        let next = "make source.toml and the source's file on the hub agree";
        if offers.len() > VOLUMES_PER_SOURCE_MAX {
            let reason =
                format!("{} volumes, a source has at most {VOLUMES_PER_SOURCE_MAX}", offers.len());
            return Err(refuse(RefusedCode::Volume, reason, next));
        }
        for (index, offer) in offers.iter().enumerate() {
            let name = &offer.name;
            let twice = |other: &VolumeOffer| {
                other.name == *name || other.number == offer.number || other.id == offer.id
            };
            let size = offer.size.is_whole_blocks() && offer.size.0 <= VOLUME_BYTES_MAX;
            if offers[..index].iter().any(twice) || !size {
                let reason = format!("volume {name} is announced twice or with a bad size");
                return Err(refuse(RefusedCode::Volume, reason, next));
            }
            let same = |old: &&VolumeOffer| {
                old.number == offer.number || old.name == *name || old.id == offer.id
            };
            if let Some(old) = self.known.volumes.iter().find(same)
                && old != offer
            {
                let reason = format!(
                    "volume {name} (number {}, id {}, {} bytes) is known here as {} (number {}, \
                     id {}, {} bytes)",
                    offer.number, offer.id, offer.size, old.name, old.number, old.id, old.size
                );
                return Err(refuse(RefusedCode::Volume, reason, next));
            }
            let pinned = self.known.pinned.iter().find(|(pin, _)| pin == name.as_str());
            if !self.known.pinned.is_empty() && pinned.is_none_or(|pin| pin.1 != offer.size.0) {
                let reason = format!(
                    "volume {name} of {} bytes is not what the source's file on the hub pins",
                    offer.size
                );
                return Err(refuse(RefusedCode::Volume, reason, next));
            }
        }
        let gone = |old: &&VolumeOffer| !offers.iter().any(|offer| offer.number == old.number);
        if let Some(old) = self.known.volumes.iter().find(gone) {
            let reason = format!("volume {} is no longer announced", old.name);
            return Err(refuse(RefusedCode::Volume, reason, next));
        }
        Ok(())
    }

    pub(super) fn welcome(&self, version: u16) -> Welcome {
        Welcome {
            version,
            hub: self.known.hub,
            epoch: self.known.epoch,
            applied_cp: self.known.applied_cp,
            roots: self.known.roots.clone(),
            applied: self.known.applied.into(),
            last: self.durable.into(),
            cp_max: self.known.cp_max,
            log_credit: self.log_credit,
            cp_credit: self.cp_credit,
            work: self.known.work,
        }
    }
}
