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

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;

use super::Hub;
use super::extension::{Extension, State};
use super::failover::Refusal;
use super::lane::lock;
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

/// Which seeds are being filled.
#[derive(Debug, Default)]
pub struct Seeding(Mutex<BTreeSet<(SourceName, VolumeName)>>);

impl Seeding {
    fn begin(self: &Arc<Self>, source: &SourceName, volume: &VolumeName) -> Option<Turn> {
        let what = (source.clone(), volume.clone());
        lock(&self.0).insert(what.clone()).then(|| Turn { all: Arc::clone(self), what })
    }

    /// The volume of a source that is being filled now.
    fn under_way(&self, source: &SourceName) -> Option<VolumeName> {
        let all = lock(&self.0);
        all.iter().find(|(met, _)| met == source).map(|(_, volume)| volume.clone())
    }
}

/// One that is; others may when it is dropped.
#[derive(Debug)]
struct Turn {
    all: Arc<Seeding>,
    what: (SourceName, VolumeName),
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.all.0).remove(&self.what);
    }
}

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

fn full(error: VolumeError) -> Refusal {
    if let VolumeError::Pool(PoolError::Full { .. } | PoolError::OverLimit { .. }) = &error {
        let next = "`mirrorhub device add` makes a pool larger, `space_limit` a limit; then give the same \
                    command again";
        return Refusal::new(error.to_string(), next);
    }
    failed(error)
}

impl Hub {
    /// Fills a seed with what is fed. Whoever drops `pieces` before its end leaves an unfinished one.
    pub async fn seed(
        &self,
        order: Order,
        pieces: mpsc::Receiver<Piece>,
        report: impl Fn(u64, ByteCount) + Send + 'static,
    ) -> Result<Seeded, Refusal> {
        self.is_away(&order.source)?;
        let turn = self.shared.seeding.begin(&order.source, &order.volume);
        let Some(turn) = turn else {
            let reason = format!("a seed of {}/{} is being filled", order.source, order.volume);
            return Err(Refusal::new(reason, "wait until that has ended"));
        };
        // It may have come before it was held off.
        self.is_away(&order.source)?;
        let shared = self.shared.clone();
        let work = tokio::task::spawn_blocking(move || {
            let filled = fill(&shared, &order, pieces, report);
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
        let Some(turn) = shared.seeding.begin(&source, &volume) else {
            let reason = format!("the seed of {source}/{volume} is being filled");
            return Err(Refusal::new(reason, "stop that command first"));
        };
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
            tracing::warn!(%source, %volume, blocks = row.blocks, "seed given up");
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
    let Order { source, volume, size } = order;
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
}

fn fill(
    shared: &Shared,
    order: &Order,
    mut pieces: mpsc::Receiver<Piece>,
    report: impl Fn(u64, ByteCount),
) -> Result<Seeded, Refusal> {
    let size = judge(shared, order)?;
    let mut filling = Filling::begin(shared, order, size)?;
    let Order { source, volume, .. } = order;
    let (mut kept_at, mut kept) = (0, machine::now());
    loop {
        let from = filling.at;
        let mut writer = filling.writer()?;
        let (ended, at) = take(&mut writer, &mut pieces, (from, size), |at| {
            report(at, size);
            at - kept_at >= KEEP_BYTES || machine::elapsed(kept) >= KEEP_PAUSE
        })?;
        (filling.tree, filling.at) = (writer.finish().map_err(full)?, at);
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
    fn begin(shared: &'a Shared, order: &Order, size: ByteCount) -> Result<Self, Refusal> {
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
        if let Some(limit) = shared.space_limit(&source) {
            set.bound(id, limit).map_err(failed)?;
        }
        let seed = Seed { source, volume, finished: false };
        let mut filling = Self { pool, set, id, seed, tree, at: 0 };
        // Before anything is written: from here on its source waits for it.
        filling.keep(false)?;
        Ok(filling)
    }

    fn writer(&mut self) -> Result<TreeWriter<'_>, Refusal> {
        let key = seed_key(self.id);
        TreeWriter::new(self.pool, &mut self.set, key, self.tree, SEED_CP).map_err(failed)
    }

    fn keep(&mut self, finished: bool) -> Result<(), Refusal> {
        let seed = Seed { finished, ..self.seed.clone() };
        self.set.keep_seed(self.id, seed, self.tree).map_err(failed)
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
) -> Result<(Option<End>, u64), Refusal> {
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
            return Err(Refusal::new(reason, "is it the right disk?"));
        };
        hole(writer, at, offset)?;
        put(writer, offset, &bytes)?;
        at = end;
        if is_time(at) {
            return Ok((None, at));
        }
    }
}

fn hole(writer: &mut TreeWriter<'_>, from: u64, to: u64) -> Result<(), Refusal> {
    let count = (to - from) / BLOCK_BYTES_U64;
    if count == 0 {
        return Ok(());
    }
    writer.put_hole_range(Vbn(from / BLOCK_BYTES_U64), count).map_err(full)
}

fn put(writer: &mut TreeWriter<'_>, offset: u64, bytes: &[u8]) -> Result<(), Refusal> {
    let (blocks, rest) = bytes.as_chunks();
    if !rest.is_empty() || !offset.is_multiple_of(BLOCK_BYTES_U64) {
        let reason = format!("{} bytes at {offset} are no whole blocks", bytes.len());
        return Err(Refusal::new(reason, "report this"));
    }
    for (vbn, block) in (offset / BLOCK_BYTES_U64..).zip(blocks) {
        writer.put(Vbn(vbn), Content::Data(block)).map_err(full)?;
    }
    Ok(())
}

/// A source that is forgotten has no seeds either.
pub(super) fn forget(shared: &Shared, name: &SourceName) -> Result<(), Refusal> {
    for row in shared.pool.catalog().seeds().map_err(failed)? {
        if row.seed.as_ref().is_some_and(|seed| seed.source == *name) {
            work::give_up(&shared.pool, row.source).map_err(failed)?;
        }
    }
    Ok(())
}

/// The seeds of a source that says Hello; an error holds it off. Judged before anything of the Hello is
/// recorded.
pub(super) fn waiting(shared: &Shared, name: &SourceName, told: &Told) -> Result<Seeds, String> {
    if let Some(volume) = shared.seeding.under_way(name) {
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
            Some(offer) => all.0.push((row.source, offer.number)),
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
pub(super) struct Seeds(Vec<(SourceId, VolumeNumber)>);

/// They become the source's work tree. What had come over the link before is given up for them.
pub(super) fn adopt(shared: &Shared, row: &SourceRow, seeds: Seeds) -> Result<(), String> {
    if seeds.0.is_empty() {
        return Ok(());
    }
    work::give_up(&shared.pool, row.id).map_err(|error| error.to_string())?;
    let count = seeds.0.len();
    let adopted = shared.pool.catalog().adopt_seeds(row.id, seeds.0);
    adopted.map_err(|error| error.to_string())?;
    tracing::info!(source = %row.name, volumes = count, "the image begins with its seed");
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
