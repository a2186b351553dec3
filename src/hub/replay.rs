//! Replay: builds the trees of a source from the entries of its log, in sequence order.
//!
//! Called by the applier for a CP that comes without updates, and by failover for everything
//! behind the image. Entries gather in the same buffers as at a source, the newest byte wins, and
//! are planned and written by the same code, so the same entries give the same trees however they
//! came. When [`REPLAY_BLOCKS_MAX`] blocks or [`REPLAY_ENTRIES_MAX`] entries have gathered they
//! are written through, on top of what was written before: memory does not go by the log's length.
//!
//! Invariant: what is applied joins the image without a gap, transfer by transfer, and every
//! header and all data has passed its checksum again (invariant 11). Whatever is missing or
//! damaged ends the replay with [`ReplayError::Gap`], which says how far the log reaches; nothing
//! was published then, and the write set is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use crate::filer::buffers::Buffers;
use crate::filer::plan::{Plan, Step};
use crate::limits::{REPLAY_BLOCKS_MAX, REPLAY_ENTRIES_MAX};
use crate::pool::Pool;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::write_set::WriteSet;
use crate::record::entry::Entry;
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::sourcelog::LogStore;
use crate::units::convert::to_u64;
use crate::units::ids::SourceId;
use crate::units::numbers::{CpNumber, Vbn, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::reader::read_into;
use crate::volume::writer::{Content, TreeWriter};

/// Where the log of a source ends before it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The last place that can be reached from the image.
    pub reaches: Place,
    /// What was met behind it.
    pub reason: String,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { transfer, sequence, .. } = self.reaches;
        let reason = &self.reason;
        write!(f, "the log reaches transfer {transfer} (entry {sequence}) and no further: {reason}")
    }
}

/// Why a replay ended early.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReplayError {
    /// The log has a gap or is damaged.
    #[error("{0}")]
    Gap(Gap),
    /// The pool, or a tree in it.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// It was told to stop.
    #[error("the replay was stopped")]
    Stopped,
}

/// What lies between an image and a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extent {
    /// Entries.
    pub entries: u64,
    /// Bytes of client data.
    pub bytes: u64,
    /// The highest CP that a transfer is labelled with.
    pub cp: CpNumber,
}

/// A source's log from the image on.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a> {
    /// The logs.
    pub store: &'a LogStore,
    /// Whose.
    pub source: SourceId,
    /// The place of the image.
    pub from: Place,
}

impl Chain<'_> {
    /// Visits every transfer behind the image up to `upto`, in order, each checked whole.
    pub fn walk(
        &self,
        upto: Place,
        mut visit: impl FnMut(&Transfer) -> Result<(), ReplayError>,
    ) -> Result<(), ReplayError> {
        let mut last = self.from;
        for cp in self.store.cps(self.source) {
            if last == upto {
                break;
            }
            let bad = |last, error: &dyn fmt::Display| gap(last, error.to_string());
            let reader = self.store.reader(self.source, cp).map_err(|error| bad(last, &error))?;
            let mut transfers = reader.transfers();
            // What lies behind `upto` is not looked at: it may be what was given up.
            while last != upto
                && let Some(transfer) = transfers.next()
            {
                let transfer = transfer.map_err(|error| bad(last, &error))?;
                if transfer.last_sequence() <= self.from.sequence {
                    continue;
                }
                joins(last, &transfer)?;
                visit(&transfer)?;
                last = transfer.place();
            }
        }
        if last == upto {
            return Ok(());
        }
        let Place { transfer, sequence, .. } = upto;
        let reason = format!("transfer {transfer} (entry {sequence}) does not follow");
        Err(gap(last, reason))
    }

    /// Reads everything up to `upto` and checks it, without applying it.
    pub fn check(
        &self,
        upto: Place,
        mut goes_on: impl FnMut() -> bool,
    ) -> Result<Extent, ReplayError> {
        let mut extent = Extent::default();
        self.walk(upto, |transfer| {
            extent.add(transfer);
            if goes_on() { Ok(()) } else { Err(ReplayError::Stopped) }
        })?;
        Ok(extent)
    }
}

impl Extent {
    fn add(&mut self, transfer: &Transfer) {
        self.entries += to_u64(transfer.entries().len());
        self.bytes += transfer.data_bytes();
        self.cp = self.cp.max(transfer.header().cp);
    }
}

fn gap(reaches: Place, reason: String) -> ReplayError {
    ReplayError::Gap(Gap { reaches, reason })
}

fn joins(last: Place, transfer: &Transfer) -> Result<(), ReplayError> {
    let header = transfer.header();
    let follows = header.previous == last.transfer
        && header.hash_before == last.hash
        && header.first_sequence == last.sequence.next();
    if follows {
        return Ok(());
    }
    let (id, previous) = (header.id, header.previous);
    Err(gap(last, format!("transfer {id} lies there, which follows {previous}")))
}

/// Trees of a source under construction.
#[derive(Debug)]
pub struct Replay<'a> {
    pool: Arc<Pool>,
    set: &'a mut WriteSet,
    source: SourceId,
    cp: CpNumber,
    /// What each volume is by now.
    trees: BTreeMap<VolumeNumber, TreeRoot>,
    /// Those that were written.
    built: BTreeMap<VolumeNumber, TreeRoot>,
    /// Volumes whose entries do not count.
    left_out: BTreeSet<VolumeNumber>,
    buffers: Buffers,
    extent: Extent,
}

impl<'a> Replay<'a> {
    /// Begins the trees of `cp` on the published ones.
    pub fn new(
        set: &'a mut WriteSet,
        source: SourceId,
        cp: CpNumber,
        bases: BTreeMap<VolumeNumber, TreeRoot>,
    ) -> Self {
        let pool = Arc::clone(set.pool());
        let (built, left_out, buffers, extent) = Default::default();
        Self { pool, set, source, cp, trees: bases, built, left_out, buffers, extent }
    }

    /// Passes over the entries of these volumes: their images are not of the place where the
    /// replay begins (R20).
    #[must_use]
    pub fn leaving_out(self, left_out: BTreeSet<VolumeNumber>) -> Self {
        Self { left_out, ..self }
    }

    /// Applies what `chain` holds up to `upto`. `goes_on` is asked after each transfer, with what
    /// was applied so far.
    pub fn run(
        mut self,
        chain: &Chain<'_>,
        upto: Place,
        mut goes_on: impl FnMut(&Extent) -> bool,
    ) -> Result<BTreeMap<VolumeNumber, TreeRoot>, ReplayError> {
        let mut last = chain.from;
        chain.walk(upto, |transfer| {
            for (entry, data) in transfer.iter() {
                if self.left_out.contains(&entry.volume) {
                    continue;
                }
                self.check(entry)
                    .map_err(|reason| gap(last, format!("transfer {}: {reason}", transfer.id())))?;
                self.buffers.apply(entry, data);
            }
            last = transfer.place();
            self.extent.add(transfer);
            if self.buffers.blocks() >= REPLAY_BLOCKS_MAX
                || self.buffers.entries() >= REPLAY_ENTRIES_MAX
            {
                self.write_through()?;
            }
            if goes_on(&self.extent) { Ok(()) } else { Err(ReplayError::Stopped) }
        })?;
        self.write_through()?;
        Ok(self.built)
    }

    /// An entry of a volume that is known, within its size.
    fn check(&self, entry: &Entry) -> Result<(), String> {
        let volume = entry.volume;
        let Some(tree) = self.trees.get(&volume) else {
            return Err(format!("an entry is for volume {volume}, which is not known here"));
        };
        if entry.end() > tree.size.0 {
            let (offset, length, size) = (entry.offset, entry.length, tree.size);
            return Err(format!(
                "an entry of {length} bytes at {offset} passes the end of volume {volume}, {size}"
            ));
        }
        Ok(())
    }

    fn write_through(&mut self) -> Result<(), ReplayError> {
        let buffers = std::mem::take(&mut self.buffers);
        let (pool, trees) = (&self.pool, &self.trees);
        let plan = Plan::build(&buffers, |volume, vbn, page| match trees.get(&volume) {
            Some(tree) => read_into(pool, tree, Vbn(vbn).byte_offset(), page),
            None => panic!("an entry of volume {volume} passed without its tree"),
        })?;
        drop(buffers);
        for planned in &plan.volumes {
            let volume = planned.volume;
            let key = VolumeKey { source: self.source, volume };
            let base = self.trees.get(&volume).copied();
            let Some(base) = base else { panic!("volume {volume} was planned without its tree") };
            let mut writer = TreeWriter::new(&self.pool, self.set, key, base, self.cp)?;
            for step in &planned.steps {
                match step {
                    Step::Block { vbn, data, .. } => writer.put(Vbn(*vbn), Content::Data(data))?,
                    Step::Hole { vbn, count } => writer.put_hole_range(Vbn(*vbn), *count)?,
                }
            }
            let root = writer.finish()?;
            self.trees.insert(volume, root);
            self.built.insert(volume, root);
        }
        Ok(())
    }
}
