//! Replay: builds the trees of a source from the entries of its log, in sequence order.
//!
//! Called by the applier for a CP that comes without updates, and by failover for everything
//! behind the image. Entries gather in the same buffers as at a source, the newest byte wins, and
//! are planned and written by the same code, so the same entries give the same trees however they
//! came. When [`REPLAY_BLOCKS_MAX`] blocks or [`REPLAY_ENTRIES_MAX`] entries have gathered, at first
//! less, they are written through, on top of what was written before: memory does not go by the log's
//! length. That is done beside the reading of what comes next, on a thread of its own.
//!
//! Invariant: what is applied joins the image without a gap, transfer by transfer, and every
//! header and all data has passed its checksum again (invariant 11). Whatever is missing or
//! damaged ends the replay with [`ReplayError::Gap`], which says how far the log reaches; nothing
//! was published then, and the write set is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use crate::filer::buffers::Buffers;
use crate::filer::plan::{Plan, Step};
use crate::limits::{REPLAY_BLOCKS_FIRST, REPLAY_BLOCKS_MAX, REPLAY_ENTRIES_MAX};
use crate::pool::Pool;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::write_set::WriteSet;
use crate::record::entry::Entry;
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::sourcelog::LogStore;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_u64;
use crate::units::ids::SourceId;
use crate::units::numbers::{ByteCount, CpNumber, Vbn, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::reader::read_into;
use crate::volume::writer::{Content, TreeWriter};

/// Transfers that a batch holds, in bytes of the blocks that it may gather.
const HELD_FACTOR: u64 = 2;

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
    /// Visits every transfer behind the image up to `upto`, in order, each checked whole. It is
    /// told the CP of the log that it lies in, and which transfer of that it is.
    pub fn walk(
        &self,
        upto: Place,
        mut visit: impl FnMut((CpNumber, usize), &Transfer) -> Result<(), ReplayError>,
    ) -> Result<(), ReplayError> {
        let mut last = self.from;
        for cp in self.store.cps(self.source) {
            if last == upto {
                break;
            }
            let bad = |last, error: &dyn fmt::Display| gap(last, error.to_string());
            let reader = self.store.reader(self.source, cp).map_err(|error| bad(last, &error))?;
            // What lies before is not read.
            let known = reader.index_of(last.transfer);
            let mut transfers = reader.transfers_from(known.map(|_| last.transfer));
            let mut number = known.unwrap_or(0);
            // What lies behind `upto` is not looked at: it may be what was given up.
            while last != upto
                && let Some(transfer) = transfers.next()
            {
                let at = (cp, number);
                number += 1;
                let transfer = transfer.map_err(|error| bad(last, &error))?;
                if transfer.last_sequence() <= self.from.sequence {
                    continue;
                }
                joins(last, &transfer)?;
                visit(at, &transfer)?;
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
}

impl Extent {
    /// Counts a transfer in.
    pub fn add(&mut self, transfer: &Transfer) {
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
    if header.follows(last) {
        return Ok(());
    }
    let (id, previous) = (header.id, header.previous);
    Err(gap(last, format!("transfer {id} lies there, which follows {previous}")))
}

/// Trees of a source under construction: the part that hashes and writes.
#[derive(Debug)]
struct Trees<'a> {
    pool: Arc<Pool>,
    set: &'a mut WriteSet,
    source: SourceId,
    cp: CpNumber,
    /// What each volume is by now.
    trees: BTreeMap<VolumeNumber, TreeRoot>,
    /// Those that were written.
    built: BTreeMap<VolumeNumber, TreeRoot>,
}

/// A replay that is about to begin.
#[derive(Debug)]
pub struct Replay<'a> {
    trees: Trees<'a>,
    /// Volumes whose entries do not count.
    left_out: BTreeSet<VolumeNumber>,
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
        let (built, left_out) = Default::default();
        Self { trees: Trees { pool, set, source, cp, trees: bases, built }, left_out }
    }

    /// Passes over the entries of these volumes: their images are not of the place where the
    /// replay begins (R20).
    #[must_use]
    pub fn leaving_out(self, left_out: BTreeSet<VolumeNumber>) -> Self {
        Self { left_out, ..self }
    }

    /// Applies what `chain` holds up to `upto`. `goes_on` is asked after each transfer, with what
    /// was gathered so far.
    pub fn run(
        self,
        chain: &Chain<'_>,
        upto: Place,
        mut goes_on: impl FnMut(&Extent) -> bool,
    ) -> Result<BTreeMap<VolumeNumber, TreeRoot>, ReplayError> {
        let Self { trees, left_out } = self;
        let sizes = trees.trees.iter().map(|(volume, tree)| (*volume, tree.size)).collect();
        let (mut extent, mut buffers, mut last) =
            (Extent::default(), Buffers::default(), chain.from);
        let (mut most, mut held) = (REPLAY_BLOCKS_FIRST, 0);
        std::thread::scope(|scope| {
            let mut writer = Writer { scope, here: Some(trees), beside: None };
            let walked = chain.walk(upto, |_, transfer| {
                // A block that is kept holds its transfer: where much is overwritten it is copied.
                held += to_u64(transfer.bytes().len());
                let copied = held > HELD_FACTOR * most * BLOCK_BYTES_U64;
                for (entry, data) in transfer.iter_held() {
                    if left_out.contains(&entry.volume) {
                        continue;
                    }
                    check(&sizes, entry).map_err(|reason| {
                        gap(last, format!("transfer {}: {reason}", transfer.id()))
                    })?;
                    if copied {
                        buffers.apply(entry, &data);
                    } else {
                        buffers.apply_held(entry, &data);
                    }
                }
                last = transfer.place();
                extent.add(transfer);
                if buffers.blocks() >= most || buffers.entries() >= REPLAY_ENTRIES_MAX {
                    writer.take_on(std::mem::take(&mut buffers))?;
                    (most, held) = (REPLAY_BLOCKS_MAX.min(most * 2), 0);
                }
                if goes_on(&extent) { Ok(()) } else { Err(ReplayError::Stopped) }
            });
            writer.finish(walked.map(|()| buffers))
        })
    }
}

/// An entry of a volume that is known, within its size.
fn check(sizes: &BTreeMap<VolumeNumber, ByteCount>, entry: &Entry) -> Result<(), String> {
    let volume = entry.volume;
    let Some(&size) = sizes.get(&volume) else {
        return Err(format!("an entry is for volume {volume}, which is not known here"));
    };
    if entry.end() > size.0 {
        let (offset, length) = (entry.offset, entry.length);
        return Err(format!(
            "an entry of {length} bytes at {offset} passes the end of volume {volume}, {size}"
        ));
    }
    Ok(())
}

/// A thread that writes trees, and gives them back.
type Beside<'scope, 'a> = ScopedJoinHandle<'scope, Result<Trees<'a>, ReplayError>>;

/// Who writes what has gathered: this thread, as long as nothing did; from the first time on one of
/// its own, beside the reading and checking of what comes next. It is handed one batch at a time,
/// and the next waits until it is taken: two are in memory.
struct Writer<'scope, 'env, 'a> {
    scope: &'scope Scope<'scope, 'env>,
    here: Option<Trees<'a>>,
    beside: Option<(SyncSender<Buffers>, Beside<'scope, 'a>)>,
}

impl<'scope, 'a: 'scope> Writer<'scope, '_, 'a> {
    /// Hands a batch on. If it is not taken, [`Writer::finish`] has the reason.
    fn take_on(&mut self, batch: Buffers) -> Result<(), ReplayError> {
        if let Some(mut trees) = self.here.take() {
            let (send, batches) = sync_channel::<Buffers>(0);
            let thread = self.scope.spawn(move || {
                batches.into_iter().try_for_each(|batch| trees.write(batch))?;
                Ok(trees)
            });
            self.beside = Some((send, thread));
        }
        let Some((send, _)) = &self.beside else { return Err(ReplayError::Stopped) };
        send.send(batch).map_err(|_| ReplayError::Stopped)
    }

    /// The last batch, or why there is none; what was built.
    fn finish(
        self,
        walked: Result<Buffers, ReplayError>,
    ) -> Result<BTreeMap<VolumeNumber, TreeRoot>, ReplayError> {
        let Self { here, beside, .. } = self;
        if let Some(mut trees) = here {
            trees.write(walked?)?;
            return Ok(trees.built);
        }
        let Some((send, thread)) = beside else { return Err(ReplayError::Stopped) };
        let walked = walked.and_then(|last| send.send(last).map_err(|_| ReplayError::Stopped));
        drop(send);
        let written = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // Its reason is the cause of a walk that ended early.
        let trees = written?;
        walked.map(|()| trees.built)
    }
}

impl Trees<'_> {
    fn write(&mut self, buffers: Buffers) -> Result<(), ReplayError> {
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
