//! What a fenced source does: it follows the hub, until the hub gives its volumes back (R12, R14).
//!
//! Run by the life of a [`super::Filer`] where its forwarder has ended with a fence. It connects with
//! `Follow`, again and again, serves nobody, and does what the hub says:
//!
//! 1. `PullTarget`: the hub's CP is pulled by comparison with the own trees, its roots are proven, and
//!    it is published here under the hub's number and place; then `Reached`.
//! 2. `TakeOver`: epoch and the end of the fence are recorded in one commit. Then the source starts
//!    anew in this process, behind that CP, and says Hello.
//!
//! Before the first of these the own NVRAM is given up: what it holds is of a line that has ended.
//! The engine is at rest then, and the ring is made anew durably before anything is published, so
//! that a restart never meets a ring and a pool of two lines. The hub asks for that only where
//! everything acknowledged is in its own image, or an administrator has said so: then what this
//! source has written by itself becomes an own CP first, which is kept by name.
//!
//! If the administrator has said that what is here counts (`own`), 1 pulls nothing: all of it becomes
//! an own CP. 2 publishes it once more, under the number and at the place of the hub's last CP, marked
//! as written alone: the line goes on behind that place on both ends, and the session finds another
//! content there than the hub's image has, so it compares and brings that up. If the hub's last CP is
//! an own one, because nothing was published there since, it is the past of here as it is.
//!
//! A cut at any step leaves a fenced source: it follows again. Blocks, on a thread of its own.

pub(super) mod wire;

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use self::wire::{End, Idle, SILENCE_MAX, Wire};
use super::checkpoint::pin_all;
use super::keeper::Kept;
use super::shared::{LinkState, Shared};
use super::signals::CpOver;
use crate::nvlog::Ring;
use crate::pool::publish::Publish;
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::write_set::{Budget, WriteSet};
use crate::record::marks::Place;
use crate::session::CP_NUMBER_MAX;
use crate::units::ids::SourceId;
use crate::units::machine;
use crate::units::names::KeptName;
use crate::units::numbers::{CpNumber, Epoch};
use crate::units::policy::AloneMark;
use crate::volume::pull::cp::{CpPuller, Step, VolumeTarget};
use crate::volume::pull::own::PoolTree;
use crate::volume::pull::terms::Window;
use crate::volume::writer::{TreeWriter, grow};
use crate::wire::message::{
    Follow, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, PullTarget, Reached, Refused,
    RefusedCode, TakeOver, VolumeOffer,
};

/// How often it is looked whether an own CP is published.
const TICK: Duration = Duration::from_millis(20);

/// Follows until the volumes were given back: true; or until the source stops.
pub(super) async fn run(idle: Idle) -> bool {
    let life = idle.life(say);
    life.until_done(Following { idle, given_up: false }, Following::follow).await.is_some()
}

/// Shows what goes on. What the hub says to do is right; else the volumes are asked for by the name
/// of this filer, since their home may be another one by now.
fn say(shared: &Shared, what: &str, next: Option<&str>) {
    let epoch = shared.fenced().unwrap_or_default().number;
    let reason = format!("another end is primary since epoch {epoch}; {what}");
    let to = || {
        let (name, filer) = (&shared.name, shared.filer());
        let row = if filer == shared.source { None } else { filer_row(shared, filer) };
        let here = row.map_or_else(|| name.clone(), |row| row.name);
        format!("`mirrorhub failback {name} --to {here}` on the hub gives the volumes back to here")
    };
    let next_step = next.map_or_else(to, str::to_owned);
    shared.set_link(LinkState::Halted(Refused { code: RefusedCode::Fenced, reason, next_step }));
}

/// The row of a filer under whose roof the source lives. A catalog that does not answer says nothing.
fn filer_row(shared: &Shared, filer: SourceId) -> Option<SourceRow> {
    shared.pool.catalog().source(filer).ok().flatten()
}

/// The follower between two connections.
struct Following {
    idle: Idle,
    /// The own NVRAM was given up, the engine is at rest.
    given_up: bool,
}

impl Following {
    fn shared(&self) -> &Arc<Shared> {
        &self.idle.shared
    }

    /// One connection; `Ok` once the volumes were given back.
    fn follow(&mut self, wire: &mut Wire) -> Result<(), End> {
        let follow = self.introduce()?;
        wire.send(&Message::Follow(Box::new(follow)))?;
        say(self.shared(), "its hub knows that it is here", None);
        loop {
            let (message, _) = wire.next()?;
            if let Message::PullTarget(target) = message {
                self.pull(wire, &target)?;
                wire.send(&Message::Reached(Reached { cp: target.cp }))?;
                say(self.shared(), &format!("CP {} of the hub is here", target.cp), None);
            } else if let Message::TakeOver(take) = message {
                return self.take_over(wire, &take);
            } else {
                return Err(End::Lost(format!("{} is out of place", message.name())));
            }
        }
    }

    fn row(&self) -> Result<(SourceRow, Kept), End> {
        Ok(self.shared().kept()?)
    }

    fn introduce(&self) -> Result<Follow, End> {
        let shared = self.shared();
        let (row, kept) = self.row()?;
        let own = place(&row, &kept);
        let figures = shared.order.figures();
        // What was given up is not here any more.
        let last = if self.given_up { own.sequence } else { figures.sequence };
        let cp_max = row.highest_cp.max(row.applied).max(figures.open_cp);
        Ok(Follow {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION_MIN,
            name: shared.name.clone(),
            source: shared.source,
            hub: kept.hub,
            generation: shared.generation,
            epoch: row.epoch,
            fenced: kept.fenced.unwrap_or_default(),
            // As its own CPs have them: what was announced and is in none is announced again later.
            volumes: own_sizes(shared),
            own_cp: row.applied,
            own: own.into(),
            last,
            cp_max,
            policy: shared.pledge.in_force(),
            alone: kept.alone,
            filer: Some(shared.filer()),
        })
    }

    /// Brings the own trees to the target's and publishes them as that CP.
    fn pull(&mut self, wire: &mut Wire, target: &PullTarget) -> Result<(), End> {
        let (row, kept) = self.row()?;
        let volumes = self.shared().pool.catalog().volumes(self.shared().source)?;
        let agrees = volumes.len() == target.volumes.len()
            && volumes
                .iter()
                .zip(&target.volumes)
                .all(|(own, there)| own.key.volume == there.volume && own.tree.size <= there.size);
        if !agrees {
            return Err(End::Lost("the hub's volumes are not those of this source".to_owned()));
        }
        let is_root = |(own, there): (&VolumeRow, &crate::wire::message::PullVolume)| {
            own.tree.root() == there.root
        };
        let here = volumes.iter().zip(&target.volumes).all(is_root);
        let same = row.applied == target.cp && place(&row, &kept) == Place::from(target.place);
        if target.own {
            return self.may_impose(wire, target);
        }
        if same && here {
            return self.give_up();
        }
        if target.cp <= row.applied || target.cp > CP_NUMBER_MAX {
            let own = row.applied;
            return Err(End::Lost(format!("CP {} cannot follow CP {own} here", target.cp)));
        }
        if let Some(name) = &target.keep {
            self.keep_own(wire, name)?;
        }
        self.give_up()?;
        // What was kept may have become a CP just now.
        let own = self.row()?.0.applied;
        if target.cp <= own {
            return Err(End::Lost(format!("CP {} cannot follow CP {own} here", target.cp)));
        }
        let volumes = self.shared().pool.catalog().volumes(self.shared().source)?;
        self.build(wire, target, &volumes)
    }

    fn build(
        &self,
        wire: &mut Wire,
        target: &PullTarget,
        volumes: &[VolumeRow],
    ) -> Result<(), End> {
        let shared = self.shared();
        // A guest does not take what the filer's own CPs need.
        let guest = shared.source != shared.filer() && self.row()?.1.guest.is_some();
        let mut set = shared.pool.begin(if guest { Budget::Ordinary } else { Budget::Reserve });
        let mut wanted = Vec::with_capacity(volumes.len());
        let mut bases = Vec::with_capacity(volumes.len());
        for (own, there) in volumes.iter().zip(&target.volumes) {
            if own.tree.size < there.size {
                // It has grown, and this end was lost before it had a CP of that size.
                shared.pool.catalog().grow_volume(own.key, there.size)?;
            }
            let base = grow(&shared.pool, &mut set, own.key, (own.tree, there.size), target.cp)?;
            bases.push(base);
            let tree = PoolTree::new(&shared.pool, base)?;
            let (size, root) = (there.size, there.root);
            wanted.push(VolumeTarget { volume: there.volume, size, root, own: tree });
        }
        let mut puller = CpPuller::new(target.cp, wanted, Window::default(), wire.number)?;
        let mut trees = Vec::new();
        for ((own, there), base) in volumes.iter().zip(&target.volumes).zip(bases) {
            let writer = TreeWriter::new(&shared.pool, &mut set, own.key, base, target.cp)?;
            let tree = pull_volume(wire, &mut puller, writer)?;
            if tree.root() != there.root {
                let reason =
                    format!("volume {} came to root {}, not {}", own.name, tree.root(), there.root);
                return Err(End::Lost(reason));
            }
            // Also one that is as it was: it was looked through in this write set.
            trees.push((there.volume, tree));
        }
        if !puller.is_finished() {
            return Err(End::Lost("the pull did not end with its volumes".to_owned()));
        }
        wire.number += puller.counters().requests;
        self.publish(target, set, trees)
    }

    fn publish(
        &self,
        target: &PullTarget,
        write_set: WriteSet,
        volumes: Vec<(crate::units::numbers::VolumeNumber, crate::pool::pointer::TreeRoot)>,
    ) -> Result<(), End> {
        let shared = self.shared();
        let place = Place::from(target.place);
        let _one = shared.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let (row, kept) = self.row()?;
        // From this CP on the state is of the hub's line: nothing in it was written alone.
        let kept = Kept { transfer: place.transfer, alone: None, unasked: None, ..kept };
        let extension = shared.keep(&row, &kept)?;
        let published = shared.pool.publish(Publish {
            write_set,
            source: shared.source,
            cp: target.cp,
            sequence: place.sequence,
            stream_hash: place.hash,
            epoch: row.epoch,
            generation: None,
            extension: Some(extension),
            volumes,
        })?;
        let pins = pin_all(shared)?;
        shared.set_own(target.cp, published.roots, pins);
        tracing::info!(source = %shared.name, cp = %target.cp, "CP of the hub published here");
        Ok(())
    }

    /// What only the NVRAM holds becomes an own CP, and the last own CP is kept by name.
    fn keep_own(&self, wire: &Wire, name: &KeptName) -> Result<(), End> {
        self.make_own_cp(wire)?;
        let shared = self.shared();
        if shared.own().0 > CpNumber(0) {
            let kept = shared.pool.keep(shared.source, name.clone())?;
            tracing::warn!(source = %shared.name, %name, cp = %kept.cp, "own writes are kept");
        }
        Ok(())
    }

    /// What only the NVRAM holds becomes an own CP.
    fn make_own_cp(&self, wire: &Wire) -> Result<(), End> {
        let shared = self.shared();
        let until = machine::now() + self.shared().pledge.patience().max(SILENCE_MAX);
        let mut forced = None;
        while let Some(target) = shared.order.target() {
            if self.given_up || shared.failed().is_some() || machine::now() > until {
                let reason = "what this source wrote by itself cannot be made a CP";
                return Err(End::Lost(reason.to_owned()));
            }
            match shared.order.frozen() {
                // Nobody else will say that it is over.
                Some(frozen) if shared.own().0 >= frozen.cp => {
                    shared.checkpoint.done(CpOver { cp: frozen.cp, alone: true });
                }
                Some(_) => {}
                None if forced != Some(target) => {
                    forced = Some(target);
                    shared.checkpoint.force();
                }
                None => {}
            }
            machine::block_on(&wire.handle, async { tokio::time::sleep(TICK).await });
        }
        Ok(())
    }

    /// The engine comes to rest, and its NVRAM is made anew, durably.
    fn give_up(&mut self) -> Result<(), End> {
        if self.given_up {
            return Ok(());
        }
        let Idle { shared, nvram, ring_shape, rest, .. } = &self.idle;
        rest();
        // A cut between finds a source whose NVRAM was never made: it is made, or the ring that is
        // still there is taken, which is of one line with the pool until something is published.
        shared.note(|kept| kept.nvram_made = false)?;
        Ring::erase(&*nvram.device)?;
        Ring::create(Arc::clone(&nvram.device), shared.source.0, *ring_shape)?;
        shared.note(|kept| kept.nvram_made = true)?;
        self.given_up = true;
        Ok(())
    }

    /// Whether the hub's CP is one of this source's own: by its word of before a restart, or because
    /// nothing was published there since the failover.
    fn is_own_past(&self, cp: CpNumber, there: Place) -> Result<bool, End> {
        let shared = self.shared();
        let known = shared.pool.catalog().history(shared.source, cp)?;
        Ok(known.is_some_and(|known| known.is_at(there)))
    }

    /// What is here shall count: it is all in own CPs, and the hub's CP is one of them, or can become
    /// one.
    fn may_impose(&self, wire: &Wire, target: &PullTarget) -> Result<(), End> {
        self.make_own_cp(wire)?;
        let own = self.row()?.0.applied;
        let fits = target.cp > own && target.cp <= CP_NUMBER_MAX;
        if !target.last || fits || self.is_own_past(target.cp, target.place.into())? {
            return Ok(());
        }
        Err(End::Lost(format!("CP {} is not a past of CP {own} here", target.cp)))
    }

    /// The state of here stays. The hub's CP gets the content of here, if it is no past of it: a CP of
    /// that number and place, which the line of both ends goes on behind. A cut before that leaves the
    /// own CP before it, a cut behind it finds it done.
    fn impose(&mut self, wire: &Wire, take: &TakeOver) -> Result<(), End> {
        let there = Place::from(take.place);
        let known = self.is_own_past(take.cp, there)?;
        self.make_own_cp(wire)?;
        let own = self.row()?.0.applied;
        if !known && (take.cp <= own || take.cp > CP_NUMBER_MAX) {
            return Err(End::Lost(format!("CP {} cannot follow CP {own} here", take.cp)));
        }
        // Ring and pool are never of two lines.
        self.give_up()?;
        if known {
            return Ok(());
        }
        let shared = self.shared();
        let _one = shared.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let (row, kept) = self.row()?;
        let alone = Some(self.alone_before(&kept, take));
        let extension =
            shared.keep(&row, &Kept { transfer: there.transfer, alone, unasked: None, ..kept })?;
        let published = shared.pool.publish(Publish {
            write_set: shared.pool.begin(Budget::Reserve),
            source: shared.source,
            cp: take.cp,
            sequence: there.sequence,
            stream_hash: there.hash,
            epoch: row.epoch,
            generation: None,
            extension: Some(extension),
            volumes: Vec::new(),
        })?;
        let pins = pin_all(shared)?;
        shared.set_own(take.cp, published.roots, pins);
        tracing::warn!(source = %shared.name, cp = %take.cp, "the state of here counts from now on");
        Ok(())
    }

    /// The mark of a source whose hub has another state: not behind the place that both ends name,
    /// so that nobody takes what is here for the hub's.
    fn alone_before(&self, kept: &Kept, take: &TakeOver) -> AloneMark {
        let there = Place::from(take.place).sequence;
        (take.epoch, kept.alone.map_or(there, |(_, from)| from.min(there)))
    }

    /// Whether that can be given back here: the epoch is a new one (R12), and what is here is what
    /// is given. Looks only.
    fn may_take(&self, take: &TakeOver) -> Result<(SourceRow, Kept), End> {
        let (row, kept) = self.row()?;
        let fenced = kept.fenced.unwrap_or_default();
        let Epoch { number, id } = take.epoch;
        let other = number == fenced.number && id != fenced.id;
        if number <= row.epoch.number || number < fenced.number || other {
            let (own, fenced) = (row.epoch.number, fenced.number);
            let reason = format!("epoch {number} is given here, after {own} and {fenced}");
            return Err(End::Lost(reason));
        }
        let differs = row.applied != take.cp || place(&row, &kept) != Place::from(take.place);
        if !take.own && differs {
            let own = row.applied;
            let reason = format!("the hub gives back CP {}, here is CP {own}", take.cp);
            return Err(End::Lost(reason));
        }
        Ok((row, kept))
    }

    /// Records that this source is primary again (R14: the hub has recorded it before).
    fn take_over(&mut self, wire: &Wire, take: &TakeOver) -> Result<(), End> {
        // Before anything is published or given up for it.
        self.may_take(take)?;
        if take.own {
            self.impose(wire, take)?;
        }
        #[cfg(test)]
        if take.epoch.id == super::CUT_TAKING_OVER {
            return Err(End::Lost("cut".to_owned()));
        }
        self.give_up()?;
        let shared = self.shared();
        let _one = shared.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let (row, kept) = self.may_take(take)?;
        // What the hub's image lacks was written alone, until the image was brought up.
        let alone = take.own.then(|| self.alone_before(&kept, take));
        let extension = shared.keep(&row, &Kept { fenced: None, alone, unasked: None, ..kept })?;
        let TakeOver { epoch, generation, .. } = *take;
        shared.pool.catalog().update_source(shared.source, move |row| {
            row.epoch = epoch;
            row.generation.number = row.generation.number.max(generation);
            row.extension = extension;
        })?;
        tracing::warn!(source = %shared.name, epoch = epoch.number, cp = %take.cp, "primary again");
        Ok(())
    }
}

/// Writes all that a volume lacks.
fn pull_volume(
    wire: &mut Wire,
    puller: &mut CpPuller<PoolTree>,
    mut writer: TreeWriter<'_>,
) -> Result<crate::pool::pointer::TreeRoot, End> {
    loop {
        match puller.next_step()? {
            Some(Step::Put(_, put)) => put.write(&mut writer)?,
            Some(Step::Done(_)) => return Ok(writer.finish()?),
            None => {
                for ask in puller.asks() {
                    wire.send(&ask)?;
                }
                let (message, payload) = wire.next()?;
                if let Message::Nodes(answer) = message {
                    puller.nodes(&answer, &payload)?;
                } else if let Message::Blocks(answer) = message {
                    puller.blocks(&answer, &payload)?;
                } else {
                    return Err(End::Lost(format!("{} came in a pull", message.name())));
                }
            }
        }
    }
}

/// The volumes of the newest own CP.
fn own_sizes(shared: &Shared) -> Vec<VolumeOffer> {
    let sized =
        |volume: &VolumeOffer| VolumeOffer { size: shared.own_size(volume), ..volume.clone() };
    shared.volumes().iter().map(sized).collect()
}

/// The place of the published CP.
fn place(row: &SourceRow, kept: &Kept) -> Place {
    Place { transfer: kept.transfer, sequence: row.sequence, hash: row.stream_hash }
}
