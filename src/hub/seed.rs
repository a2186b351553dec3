//! Seeds: the image of a volume is filled from a disk that came by another way than the link.
//!
//! Called by `mirrorhub seed` through the admin socket, while the hub runs. What comes is built into a
//! work tree that is nobody's yet (`pool::seed`). The source's Hello turns its seeds into its own work
//! tree ([`adopt`]), and so its first pass is one that compares: the source is asked for what differs,
//! and the CP is published with equal roots or not at all. Nothing in a seed is believed, so a disk that
//! is a day old, or a wrong one, costs bytes and nothing else.
//!
//! 1. what is asked for is judged; nobody else fills that seed; its source is held off from here on
//! 2. the tree is built, and kept at intervals as unfinished
//! 3. it is kept as finished; the source may come
//! 4. Hello: rows of source and volumes, then the seeds become its work tree, in one commit
//!
//! A cut at 2, of the caller, hub, or power, leaves an unfinished seed: it is never used, the source
//! is told to wait, and the same command goes on with it (what it has already is compared and not written
//! again), or gives it up. A cut between 3 and 4, or in 4, changes nothing: the next Hello does it.

pub mod book;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use self::book::{Busy, Fate, Leaving, Turn};
use super::Hub;
use super::extension::{Extension, State};
use super::failover::Refusal;
use super::shared::{Shared, Told};
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::pointer::TreeRoot;
use crate::pool::rows::SourceRow;
use crate::pool::seed::{SEED_CP, Seed, seed_key};
use crate::pool::work::WorkRow;
use crate::pool::write_set::{Budget, WriteSet};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_u64;
use crate::units::hash::Root;
use crate::units::ids::SourceId;
use crate::units::machine;
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::{BlockCount, ByteCount, CpNumber, Vbn, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::work;
use crate::volume::writer::{Content, TreeWriter};

/// Bytes behind which a seed is kept. Unit tests shrink it.
const KEEP_BYTES: u64 = if cfg!(test) { 1 << 20 } else { 1 << 30 };
/// Time after which it is, if anything has come.
const KEEP_PAUSE: Duration = Duration::from_secs(30);

/// What is fed to a seed. What no piece covers is zero.
#[derive(Debug)]
pub enum Piece {
    /// Whole blocks, behind all that came before.
    Data {
        /// Where in the volume.
        offset: u64,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// There is no more; the file has that size.
    End(u64),
}

/// Which seed is asked for.
#[derive(Debug, Clone)]
pub struct Order {
    /// The source.
    pub source: SourceName,
    /// Its volume.
    pub volume: VolumeName,
    /// Size of the file, if it is known before.
    pub size: Option<ByteCount>,
    /// The source has a file in the sources directory, one that is not enabled too.
    pub has_file: bool,
}

/// A seed that was filled.
#[derive(Debug, Clone, Copy)]
pub struct Seeded {
    /// Size of the volume.
    pub size: ByteCount,
    /// Its root: that of the file.
    pub root: Root,
    /// Blocks of the pool that it has.
    pub blocks: BlockCount,
}

fn failed(error: impl ToString) -> Refusal {
    Refusal::new(error.to_string(), "see the log of the hub, then give the same command again")
}

/// Why a seed is not filled to its end.
#[derive(Debug)]
enum Stop {
    Refused(Refusal),
    Tree(VolumeError),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<VolumeError> for Stop {
    fn from(error: VolumeError) -> Self {
        Self::Tree(error)
    }
}

impl Stop {
    /// `share`: what it was bounded by.
    fn told(self, source: &SourceName, share: Option<Share>) -> Refusal {
        let error = match self {
            Self::Refused(refusal) => return refusal,
            Self::Tree(error) => error,
        };
        match (&error, share) {
            (VolumeError::Pool(PoolError::OverLimit { .. }), Some(Share { limit, others })) => {
                let beside = match others.0 {
                    0 => String::new(),
                    _ => format!(", and its other seeds have {} of it", bytes(others)),
                };
                let reason = format!("space_limit of {source} is {}{beside}", bytes(limit));
                let next = format!("raise it in {source}.toml, then give the same command again");
                Refusal::new(reason, next)
            }
            (VolumeError::Pool(PoolError::Full { .. }), _) => {
                let next =
                    "`mirrorhub device add` makes a pool larger; then give the same command again";
                Refusal::new(error.to_string(), next)
            }
            _ => failed(error),
        }
    }
}

fn bytes(blocks: BlockCount) -> String {
    format!("{} bytes", blocks.0 * BLOCK_BYTES_U64)
}

/// What the seeds of a source may have of the pool together.
#[derive(Debug, Clone, Copy)]
struct Share {
    limit: BlockCount,
    /// What the others have by now.
    others: BlockCount,
}

fn busy(busy: &Busy, source: &SourceName) -> Refusal {
    match busy {
        Busy::Filled(volume) => {
            let reason = format!("a seed of {source}/{volume} is being filled");
            Refusal::new(reason, "wait until that has ended, or stop that command")
        }
        Busy::Leaving => {
            let reason = format!("source {source} is being forgotten");
            Refusal::new(reason, "`mirrorhub status` says when it is gone")
        }
    }
}

impl Hub {
    /// Fills a seed with what is fed. Whoever drops `pieces` before its end leaves an unfinished one.
    pub async fn seed(
        &self,
        order: Order,
        pieces: mpsc::Receiver<Piece>,
        report: impl Fn(u64, ByteCount) + Send + 'static,
    ) -> Result<Seeded, Refusal> {
        let source = order.source.clone();
        self.is_away(&source)?;
        // What they may have together, each that is being filled would take for itself.
        let alone = self.shared.space_limit(&source).is_some();
        let turn = self.shared.seeds.begin(&source, &order.volume, alone);
        let turn = turn.map_err(|met| busy(&met, &source))?;
        // It may have come before it was held off, or have been forgotten.
        self.is_away(&source)?;
        if !order.has_file && self.shared.registry.get(&source).is_none() {
            let reason = format!("there is no source {source}");
            return Err(Refusal::new(reason, "see `mirrorhub status`"));
        }
        let (shared, asked) = (self.shared.clone(), order.clone());
        let judged = tokio::task::spawn_blocking(move || judge(&shared, &asked));
        let size = judged.await.unwrap_or_else(|error| Err(failed(error)))?;
        // It is shown, and can be forgotten, though it was never here.
        self.begin(&source);
        let shared = self.shared.clone();
        let work = tokio::task::spawn_blocking(move || {
            let filled = fill(&shared, (&order, size), &turn, pieces, report);
            drop(turn);
            filled
        });
        work.await.unwrap_or_else(|error| Err(failed(error)))
    }

    /// Gives a seed up; its blocks are free again. Returns how many.
    pub async fn discard_seed(
        &self,
        source: SourceName,
        volume: VolumeName,
    ) -> Result<BlockCount, Refusal> {
        let shared = self.shared.clone();
        let turn =
            shared.seeds.begin(&source, &volume, false).map_err(|met| busy(&met, &source))?;
        let work = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let row = find(&shared, &source, &volume).map_err(failed)?;
            let Some(row) = row else {
                let reason = format!("there is no seed of {source}/{volume}");
                return Err(Refusal::new(
                    reason,
                    "what its source has taken over is its image's by now",
                ));
            };
            work::give_up(&shared.pool, row.source).map_err(failed)?;
            shared.seeds.given_up(&source, &volume, &row, "a command has discarded it");
            Ok(BlockCount(row.blocks))
        });
        work.await.unwrap_or_else(|error| Err(failed(error)))
    }

    fn is_away(&self, name: &SourceName) -> Result<(), Refusal> {
        let snapshot = self.snapshots().into_iter().find(|snapshot| snapshot.name == *name);
        if snapshot.is_some_and(|snapshot| snapshot.connected) {
            let reason = format!("source {name} is in session: what differs is on its way already");
            let next = format!(
                "`enabled = false` in {name}.toml holds it off; then seed, then take the line out again"
            );
            return Err(Refusal::new(reason, next));
        }
        Ok(())
    }
}

fn find(
    shared: &Shared,
    source: &SourceName,
    volume: &VolumeName,
) -> Result<Option<Arc<WorkRow>>, PoolError> {
    let is_it = |seed: &Seed| seed.source == *source && seed.volume == *volume;
    let seeds = shared.pool.catalog().seeds()?;
    Ok(seeds.into_iter().find(|row| row.seed.as_ref().is_some_and(is_it)))
}

/// Whether a volume can have a seed, and its size as far as it is known here.
fn judge(shared: &Shared, order: &Order) -> Result<ByteCount, Refusal> {
    let Order { source, volume, size, .. } = order;
    let catalog = shared.pool.catalog();
    let row = catalog.source_named(source).map_err(failed)?;
    if let Some(row) = &row {
        let state = Extension::of(row).map_err(failed)?.state;
        if row.applied > CpNumber(0) || state != State::Mirror {
            let reason = format!("source {source} has an image here, CP {}", row.applied);
            return Err(Refusal::new(reason, "it is brought up by what differs as it is"));
        }
    }
    let volumes = row.map(|row| catalog.volumes(row.id)).transpose().map_err(failed)?;
    let known = volumes.unwrap_or_default().into_iter().find(|known| known.name == *volume);
    let pinned = shared.settings.load().get(source).and_then(|setting| {
        setting.volumes.iter().find(|(name, _)| name == volume).map(|(_, size)| *size)
    });
    let has_pins =
        shared.settings.load().get(source).is_some_and(|setting| !setting.volumes.is_empty());
    if has_pins && pinned.is_none() {
        let reason = format!("{source}.toml has no volume {volume}");
        return Err(Refusal::new(reason, format!("name it in {source}.toml, with its size")));
    }
    let wanted = pinned.or(known.map(|known| known.size()));
    match (wanted, *size) {
        (Some(wanted), Some(met)) if wanted != met => Err(other_size(order, wanted, met.0)),
        (Some(wanted), _) => Ok(wanted),
        (None, Some(met)) => Ok(met),
        (None, None) => {
            let reason = format!("the size of {source}/{volume} is not known here");
            Err(Refusal::new(reason, format!("name it in {source}.toml as a [[volume]]")))
        }
    }
}

fn other_size(order: &Order, wanted: ByteCount, met: u64) -> Refusal {
    let Order { source, volume, .. } = order;
    let reason = format!("volume {source}/{volume} has {wanted} bytes, the file {met}");
    Refusal::new(reason, "is it the right disk? a raw image of the whole volume is wanted")
}

/// The seed as it is being built.
struct Filling<'a> {
    pool: &'a Arc<Pool>,
    set: WriteSet,
    id: SourceId,
    seed: Seed,
    tree: TreeRoot,
    /// Everything before is in it.
    at: u64,
    share: Option<Share>,
    turn: &'a Turn,
}

fn fill(
    shared: &Shared,
    (order, size): (&Order, ByteCount),
    turn: &Turn,
    mut pieces: mpsc::Receiver<Piece>,
    report: impl Fn(u64, ByteCount),
) -> Result<Seeded, Refusal> {
    let mut filling = Filling::begin(shared, (order, size), turn)?;
    let Order { source, volume, .. } = order;
    let share = filling.share;
    let told = |stop: Stop| stop.told(source, share);
    let (mut kept_at, mut kept) = (0, machine::now());
    loop {
        let from = filling.at;
        let mut writer = filling.writer()?;
        let taken = take(&mut writer, &mut pieces, (from, size), |at| {
            report(at, size);
            at - kept_at >= KEEP_BYTES || machine::elapsed(kept) >= KEEP_PAUSE
        });
        let (ended, at) = taken.map_err(told)?;
        let tree = writer.finish().map_err(|error| told(error.into()))?;
        (filling.tree, filling.at) = (tree, at);
        (kept_at, kept) = (at, machine::now());
        match ended {
            Some(End::File(met)) if met != size.0 => {
                filling.keep(false)?;
                return Err(other_size(order, size, met));
            }
            Some(End::File(_)) => break,
            Some(End::Gone) => {
                filling.keep(false)?;
                let reason =
                    format!("the seed of {source}/{volume} ends after {at} of {size} bytes");
                return Err(Refusal::new(reason, "give the same command again: it goes on"));
            }
            None => filling.keep(false)?,
        }
    }
    filling.keep(true)?;
    let (root, blocks) = (filling.tree.root(), filling.set.blocks());
    tracing::info!(%source, %volume, %size, %blocks, %root, "seed is complete");
    Ok(Seeded { size, root, blocks })
}

impl<'a> Filling<'a> {
    /// Goes on with an unfinished seed of that size, or begins one.
    fn begin(
        shared: &'a Shared,
        (order, size): (&Order, ByteCount),
        turn: &'a Turn,
    ) -> Result<Self, Refusal> {
        let pool = &shared.pool;
        let (source, volume) = (order.source.clone(), order.volume.clone());
        let found = find(shared, &source, &volume).map_err(failed)?;
        let (mut set, id, tree) = match found {
            Some(row) => {
                let resumed = work::resume(pool, row.source, Budget::Ordinary).map_err(failed)?;
                let (_, tree) =
                    row.trees.first().copied().ok_or_else(|| failed("a seed is empty"))?;
                if tree.size != size {
                    let reason = format!("there is a seed of {} bytes already", tree.size);
                    let next = format!("`mirrorhub seed {source}/{volume} --discard` gives it up");
                    return Err(Refusal::new(reason, next));
                }
                let resumed = resumed.ok_or_else(|| failed("the seed has gone"))?;
                (resumed.set, row.source, tree)
            }
            None => {
                let id = SourceId::random().map_err(failed)?;
                (pool.begin(Budget::Ordinary), id, TreeRoot::empty(size))
            }
        };
        let limit = shared.space_limit(&source);
        let share = limit.map(|limit| Share::of(shared, (&source, id), limit)).transpose();
        let share = share.map_err(failed)?;
        if let Some(Share { limit, others }) = share {
            let rest = BlockCount(limit.0.saturating_sub(others.0));
            set.bound(id, rest).map_err(failed)?;
        }
        let seed = Seed { source, volume, finished: false, taken_at: None };
        let mut filling = Self { pool, set, id, seed, tree, at: 0, share, turn };
        // Before anything is written: from here on its source waits for it.
        filling.keep(false)?;
        Ok(filling)
    }

    fn writer(&mut self) -> Result<TreeWriter<'_>, Refusal> {
        let key = seed_key(self.id);
        TreeWriter::new(self.pool, &mut self.set, key, self.tree, SEED_CP).map_err(failed)
    }

    fn keep(&mut self, finished: bool) -> Result<(), Refusal> {
        let now = machine::unix_seconds();
        let seed = Seed { finished, taken_at: Some(now), ..self.seed.clone() };
        let (kept, source) = (self.set.keep_seed(self.id, seed, self.tree), &self.seed.source);
        kept.map_err(|error| Stop::Tree(error.into()).told(source, self.share))?;
        let fate = if finished { Fate::Waiting } else { Fate::Filling };
        self.turn.kept(fate, now, (self.tree.size, self.set.blocks()));
        Ok(())
    }
}

impl Share {
    fn of(
        shared: &Shared,
        (source, id): (&SourceName, SourceId),
        limit: BlockCount,
    ) -> Result<Self, PoolError> {
        let seeds = shared.pool.catalog().seeds()?;
        let is_other = |row: &&Arc<WorkRow>| {
            row.source != id && row.seed.as_ref().is_some_and(|seed| seed.source == *source)
        };
        let others = seeds.iter().filter(is_other).map(|row| row.blocks).sum();
        Ok(Self { limit, others: BlockCount(others) })
    }
}

/// Why no more comes.
enum End {
    /// The file has ended, with that size.
    File(u64),
    /// Whoever fed it has gone.
    Gone,
}

/// Writes what comes until it ends or it is time to keep it; returns up to where it is written.
fn take(
    writer: &mut TreeWriter<'_>,
    pieces: &mut mpsc::Receiver<Piece>,
    (mut at, size): (u64, ByteCount),
    is_time: impl Fn(u64) -> bool,
) -> Result<(Option<End>, u64), Stop> {
    loop {
        let Some(piece) = pieces.blocking_recv() else { return Ok((Some(End::Gone), at)) };
        let (offset, bytes) = match piece {
            Piece::End(met) => {
                if met == size.0 {
                    hole(writer, at, size.0)?;
                    at = met;
                }
                return Ok((Some(End::File(met)), at));
            }
            Piece::Data { offset, bytes } => (offset, bytes),
        };
        let end = offset.checked_add(to_u64(bytes.len()));
        let Some(end) = end.filter(|&end| end <= size.0 && offset >= at) else {
            let reason = format!("the file has more than the {size} bytes of the volume");
            return Err(Refusal::new(reason, "is it the right disk?").into());
        };
        hole(writer, at, offset)?;
        put(writer, offset, &bytes)?;
        at = end;
        if is_time(at) {
            return Ok((None, at));
        }
    }
}

fn hole(writer: &mut TreeWriter<'_>, from: u64, to: u64) -> Result<(), Stop> {
    let count = (to - from) / BLOCK_BYTES_U64;
    if count == 0 {
        return Ok(());
    }
    Ok(writer.put_hole_range(Vbn(from / BLOCK_BYTES_U64), count)?)
}

fn put(writer: &mut TreeWriter<'_>, offset: u64, bytes: &[u8]) -> Result<(), Stop> {
    let (blocks, rest) = bytes.as_chunks();
    if !rest.is_empty() || !offset.is_multiple_of(BLOCK_BYTES_U64) {
        let reason = format!("{} bytes at {offset} are no whole blocks", bytes.len());
        return Err(Refusal::new(reason, "report this").into());
    }
    for (vbn, block) in (offset / BLOCK_BYTES_U64..).zip(blocks) {
        writer.put(Vbn(vbn), Content::Data(block))?;
    }
    Ok(())
}

/// Nobody begins with a seed of a source that is being forgotten.
pub(super) fn leave(shared: &Shared, name: &SourceName) -> Result<Leaving, Refusal> {
    shared.seeds.leave(name).map_err(|met| busy(&met, name))
}

/// A source that is forgotten has no seeds either. Asked before its rows are gone, so that a cut between
/// leaves a source that can be forgotten again.
pub(super) fn forget(shared: &Shared, name: &SourceName) -> Result<(), Refusal> {
    for row in shared.pool.catalog().seeds().map_err(failed)? {
        let Some(seed) = row.seed.as_ref().filter(|seed| seed.source == *name) else { continue };
        work::give_up(&shared.pool, row.source).map_err(failed)?;
        shared.seeds.given_up(name, &seed.volume, &row, "its source is forgotten");
    }
    Ok(())
}

/// The seeds of a source that says Hello; an error holds it off. Judged before anything of the Hello is
/// recorded.
pub(super) fn waiting(shared: &Shared, name: &SourceName, told: &Told) -> Result<Seeds, String> {
    if let Some(volume) = shared.seeds.under_way(name) {
        return Err(format!("the seed of volume {volume} is being filled"));
    }
    let (mut all, text) = (Seeds::default(), |error: PoolError| error.to_string());
    let seeds = shared.pool.catalog().seeds().map_err(text)?;
    let row = shared.pool.catalog().source(told.source).map_err(text)?;
    if row.is_some_and(|row| row.applied > CpNumber(0)) {
        return Ok(all);
    }
    for row in seeds {
        let Some(seed) = row.seed.as_ref().filter(|seed| seed.source == *name) else { continue };
        let (volume, tree) = (&seed.volume, row.trees.first().map(|(_, tree)| *tree));
        let or = format!("`mirrorhub seed {name}/{volume} --discard` on the hub gives it up");
        if !seed.finished {
            return Err(format!(
                "the seed of volume {volume} was not filled to its end: `mirrorhub seed {name}/{volume} \
                 FILE` on the hub goes on with it, {or}"
            ));
        }
        let offer = told.volumes.iter().find(|offer| offer.name == *volume);
        match offer.filter(|offer| tree.is_some_and(|tree| tree.size == offer.size)) {
            Some(offer) => all.0.push((Arc::clone(&row), offer.number)),
            None => {
                let size = tree.map_or(0, |tree| tree.size.0);
                return Err(format!(
                    "there is a seed of volume {volume} with {size} bytes, and the source has none like \
                     that: {or}"
                ));
            }
        }
    }
    Ok(all)
}

/// Seeds and the volumes they are for.
#[derive(Debug, Default)]
pub(super) struct Seeds(Vec<(Arc<WorkRow>, VolumeNumber)>);

/// They become the source's work tree. What had come over the link before is given up for them.
pub(super) fn adopt(shared: &Shared, row: &SourceRow, seeds: Seeds) -> Result<(), String> {
    if seeds.0.is_empty() {
        return Ok(());
    }
    work::give_up(&shared.pool, row.id).map_err(|error| error.to_string())?;
    let all = seeds.0.iter().map(|(seed, volume)| (seed.source, *volume)).collect();
    let adopted = shared.pool.catalog().adopt_seeds(row.id, all);
    adopted.map_err(|error| error.to_string())?;
    for (taken, _) in &seeds.0 {
        let Some(seed) = &taken.seed else { continue };
        shared.seeds.adopted(&row.name, &seed.volume, taken);
    }
    Ok(())
}

/// The seeds that no source has taken over: for what, of which size, how much of the pool they have.
pub fn lines(pool: &Pool) -> Result<Vec<(Seed, ByteCount, BlockCount)>, PoolError> {
    let line = |row: &Arc<WorkRow>| {
        let tree = row.trees.first()?.1;
        Some((row.seed.clone()?, tree.size, BlockCount(row.blocks)))
    };
    Ok(pool.catalog().seeds()?.iter().filter_map(line).collect())
}
