//! The scrub: reads everything that is in use, proves it, mends it.
//!
//! First the trees: the published ones, those of kept CPs, those of unfinished passes, each node and
//! block against the full hash in its parent. Then, on an array, every copy: each stripe in use is
//! read from all devices, and rows that do not fit have their data proven once more, each block by
//! the pointer that leads to it, before the rest is made to fit it. The catalog has no such pointers:
//! its copies are made to fit when it reads whole.
//!
//! A volume is pinned for one slice at a time, so a scrub of days keeps no space and holds up no
//! drop. What is written meanwhile may be passed over: it is new. The place that was reached is kept
//! in the catalog; a restart goes on from there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::limits::{SCRUB_LOST_NAMED_MAX, SCRUB_ROWS_MAX, SCRUB_SLICE_BLOCKS};
use crate::pool::bitmap::Bitmap;
use crate::pool::error::PoolError;
use crate::pool::pointer::{TreeRoot, VolumeKey};
use crate::pool::scrub::{InUse, Scrubbed};
use crate::pool::{Pin, Pool};
use crate::raid::scrub::Row;
use crate::raid::span::Span;
use crate::status::upkeep::ScrubbedDevice;
use crate::units::convert::to_u64;
use crate::units::machine;
use crate::units::names::KeptName;
use crate::units::numbers::{ByteCount, CpNumber, Pbn};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};
use crate::volume::error::VolumeError;
use crate::volume::scrub::{self, Extent, Lost, Sweep, Tally, Tree};

use super::Shared;
use super::note::{Kind, Next, Note, Order, Word};
use super::pace::Pace;

/// Stripes that are compared before what was found is settled.
const STRIPES_AT_ONCE: u64 = 1024;
/// Time between two notes in the catalog. Unit tests shrink it.
const NOTE_EVERY: Duration = Duration::from_secs(if cfg!(test) { 0 } else { 60 });

/// A tree to be read.
#[derive(Debug, Clone)]
struct Target {
    order: Order,
    key: VolumeKey,
    cp: CpNumber,
    /// Of a kept CP.
    name: Option<KeptName>,
}

/// One run of the scrub, or the rest of one.
#[derive(Debug)]
pub(super) struct Scrub<'a> {
    pool: &'a Arc<Pool>,
    shared: &'a Shared,
    pub(super) note: Note,
    lost: Vec<Lost>,
    /// The catalog is damaged: its own kind of loss.
    metadata: Vec<String>,
    first: u64,
    reached: Bitmap,
    noted: Instant,
    /// Read errors and repairs of each device that are in the note.
    counted: Vec<(u64, u64)>,
}

impl<'a> Scrub<'a> {
    /// Goes on with what the note says, or begins.
    pub(super) fn new(
        pool: &'a Arc<Pool>,
        shared: &'a Shared,
        mut note: Note,
    ) -> Result<Self, PoolError> {
        let in_use = pool.blocks_in_use()?;
        if note.next.is_none() {
            note.begin(devices(pool));
            note.blocks_total = total(pool, &in_use)?;
        }
        note.word = Word::Running;
        Ok(Self {
            first: in_use.first_data(),
            reached: Bitmap::new(in_use.data_blocks()),
            counted: pool.array().map(|array| array.repairs()).unwrap_or_default(),
            noted: machine::now(),
            lost: Vec::new(),
            metadata: Vec::new(),
            pool,
            shared,
            note,
        })
    }

    /// Reads all that is left. `false`: it was told to end, and goes on later from the note.
    pub(super) fn run(&mut self, limit: Option<ByteCount>) -> Result<bool, VolumeError> {
        let mut pace = Pace::new(self.shared, limit);
        if !self.trees(&mut pace)? {
            return Ok(false);
        }
        if let Some(array) = self.pool.array().filter(|array| array.is_redundant())
            && !self.stripes(array, &mut pace)?
        {
            return Ok(false);
        }
        self.catalog();
        Ok(true)
    }

    // ---- trees ----

    fn trees(&mut self, pace: &mut Pace<'_>) -> Result<bool, VolumeError> {
        let (from, at) = match self.note.next {
            None => (None, 0),
            Some(Next::Tree(order, at)) => (Some(order), at),
            Some(Next::Stripe(_)) => return Ok(true),
        };
        for target in targets(self.pool)? {
            let start = if Some(target.order) == from { at } else { 0 };
            if from.is_some_and(|from| target.order < from) {
                if target.order.kind == Kind::Published
                    && from.is_some_and(|f| f.kind > Kind::Published)
                {
                    self.remember(&target)?;
                }
                continue;
            }
            if !self.tree(&target, start, pace)? {
                return Ok(false);
            }
        }
        self.note.next = Some(Next::Stripe(0));
        Ok(true)
    }

    /// Marks what a tree reaches, which was read before a restart.
    fn remember(&mut self, target: &Target) -> Result<(), VolumeError> {
        let Some((_held, tree)) = self.hold(target) else { return Ok(()) };
        let Target { key, cp, .. } = *target;
        let tree = Tree { key, cp, tree, shares: false };
        let mut on = |_| true;
        let reached = (self.first, &mut self.reached);
        Sweep::run(self.pool, tree, (0..u64::MAX, Extent::Nodes), reached, &mut on)?;
        Ok(())
    }

    fn tree(
        &mut self,
        target: &Target,
        start: u64,
        pace: &mut Pace<'_>,
    ) -> Result<bool, VolumeError> {
        let mut at = start;
        // What is gone meanwhile needs no scrub.
        while let Some((held, tree)) = self.hold(target) {
            let blocks = tree.size.0 / BLOCK_BYTES_U64;
            if at >= blocks {
                break;
            }
            let end = (at / SCRUB_SLICE_BLOCKS + 1) * SCRUB_SLICE_BLOCKS;
            // Devices may have been added since; what is held lies where there were blocks by now.
            let blocks_now = self.pool.blocks_in_use()?.data_blocks();
            self.reached.grow(blocks_now.max(self.reached.blocks()));
            let shares = target.order.kind != Kind::Published;
            let Target { key, cp, .. } = *target;
            let cp = held.as_ref().map_or(cp, Pin::cp);
            let slice = Tree { key, cp, tree, shares };
            let shared = self.shared;
            let mut paced = |blocks: u64| {
                shared.read(blocks);
                pace.take(blocks * BLOCK_BYTES_U64, Shared::interrupts_scrub)
            };
            let reached = (self.first, &mut self.reached);
            let range = (at..end, Extent::Everything);
            let (tally, whole) = Sweep::run(self.pool, slice, range, reached, &mut paced)?;
            let still = match &held {
                Some(pin) => pin.check().is_ok(),
                None => self.hold(target).is_some_and(|(_, now)| now == tree),
            };
            if !whole {
                self.shared.unread(tally.blocks_read);
                self.note_now(Next::Tree(target.order, at));
                return Ok(false);
            }
            if !still && tally.lost_count > 0 {
                // Its blocks may be others' by now: read again what is published then.
                continue;
            }
            self.count(tally);
            at = end;
            self.note_sometimes(Next::Tree(target.order, at));
        }
        Ok(true)
    }

    /// Keeps a tree from going away, as far as its kind can be; none if it is gone.
    fn hold(&self, target: &Target) -> Option<(Option<Pin>, TreeRoot)> {
        let VolumeKey { source, volume } = target.key;
        match (target.order.kind, &target.name) {
            (Kind::Published, _) => {
                let pin = self.pool.pin(source, volume).ok()?;
                let tree = pin.tree();
                Some((Some(pin), tree))
            }
            (Kind::Kept, Some(name)) => {
                let pin = self.pool.pin_kept(source, name, volume).ok()?;
                let tree = pin.tree();
                Some((Some(pin), tree))
            }
            (Kind::Kept, None) => None,
            (Kind::Work, _) => {
                let row = self.pool.catalog().work(source).ok().flatten()?;
                let tree = row.keyed().find(|(key, _)| *key == target.key)?.1;
                Some((None, tree))
            }
        }
    }

    fn count(&mut self, tally: Tally) {
        self.note.blocks_read += tally.blocks_read;
        self.note.repaired += tally.repaired;
        self.note.known += tally.known;
        self.note.lost_count += tally.lost_count;
        for lost in tally.lost {
            let text = format!("{}: {lost}", volume_name(self.pool, lost.key));
            tracing::error!(place = text, "scrub: no copy is right");
            if self.note.lost.len() < SCRUB_LOST_NAMED_MAX {
                self.note.lost.push(text);
                self.lost.push(lost);
            }
        }
    }

    // ---- copies ----

    fn stripes(&mut self, array: &Arc<Span>, pace: &mut Pace<'_>) -> Result<bool, VolumeError> {
        let blocks = array.stripe_bytes() / BLOCK_BYTES_U64;
        let mut at = match self.note.next {
            Some(Next::Stripe(at)) => at,
            Some(Next::Tree(..)) | None => 0,
        };
        let mut deferred = BTreeSet::new();
        while at < array.stripes() {
            let in_use = self.pool.blocks_in_use()?;
            let end = array.stripes().min(at + STRIPES_AT_ONCE);
            let (mut unfit, mut read) = (BTreeSet::new(), 0);
            for stripe in (at..end).filter(|stripe| in_use.any(stripe * blocks, blocks)) {
                let check = array.check_stripe(stripe);
                unfit.extend(check.unfit);
                read += check.blocks_read;
                self.shared.read(check.blocks_read);
                let bytes = check.blocks_read * BLOCK_BYTES_U64;
                if !pace.take(bytes, Shared::interrupts_scrub) {
                    self.shared.unread(read);
                    self.note_now(Next::Stripe(at));
                    return Ok(false);
                }
                if unfit.len() >= SCRUB_ROWS_MAX {
                    deferred.extend(self.settle(array, std::mem::take(&mut unfit))?);
                }
            }
            deferred.extend(self.settle(array, unfit)?);
            self.note.blocks_read += read;
            at = end;
            self.note_sometimes(Next::Stripe(at));
        }
        // What was under way is published by now, or was given up.
        let rest = self.settle(array, deferred)?;
        if !rest.is_empty() {
            tracing::warn!(rows = rest.len(), "scrub: rows of unfinished CPs do not fit");
        }
        Ok(true)
    }

    /// Makes rows fit of which all data is proven. Gives back those that nobody can prove now.
    fn settle(&mut self, array: &Span, rows: BTreeSet<Row>) -> Result<BTreeSet<Row>, VolumeError> {
        let mut deferred = BTreeSet::new();
        if rows.is_empty() {
            return Ok(deferred);
        }
        let snapshot = self.pool.snapshot()?;
        let in_use = self.pool.blocks_in_use()?;
        let (metadata, _): (Vec<Row>, Vec<Row>) =
            rows.iter().partition(|row| array.blocks_of(**row).any(|at| in_use.is_metadata(at)));
        let catalog = metadata.is_empty() || self.mend_catalog();
        let mut wanted: BTreeMap<u64, Row> = BTreeMap::new();
        for row in &rows {
            let held = array.blocks_of(*row);
            let held = held.filter(|at| in_use.has(*at) && !in_use.is_metadata(*at));
            wanted.extend(held.map(|at| (at, *row)));
        }
        let mut met: BTreeMap<u64, (VolumeKey, CpNumber, u64, u8, crate::pool::pointer::Pointer)> =
            BTreeMap::new();
        let pinned = snapshot.pins.iter().map(|pin| (pin.key(), pin.cp(), pin.tree()));
        let trees = snapshot.published_trees.iter().chain(&snapshot.kept_trees);
        let trees = trees.chain(&snapshot.work_trees).copied().chain(pinned);
        for (key, cp, tree) in trees.filter(|_| !wanted.is_empty()) {
            let is_wanted = |pbn: Pbn| wanted.contains_key(&pbn.0);
            scrub::owners(self.pool, &tree, &is_wanted, &mut |vbn, level, pointer| {
                met.entry(pointer.pbn.0).or_insert((key, cp, vbn.0, level, pointer));
            })?;
        }
        let mut bad = BTreeSet::new();
        for (at, row) in &wanted {
            let Some((_, _, _, level, pointer)) = met.get(at) else {
                deferred.insert(*row);
                continue;
            };
            match scrub::prove(self.pool, *level, pointer) {
                None => {}
                Some(Scrubbed::Repaired) => self.note.repaired += 1,
                // It is in the list already, or the trees' next scrub finds it.
                Some(Scrubbed::Known | Scrubbed::Lost(_)) => _ = bad.insert(*row),
            }
        }
        for row in rows {
            let held = metadata.contains(&row) && !catalog;
            if !held && !bad.contains(&row) && !deferred.contains(&row) {
                self.note.copies += array.fit_proven(row).map_err(PoolError::from)?;
            }
        }
        Ok(deferred)
    }

    // ---- the catalog, and the end ----

    /// Whether the catalog reads whole.
    fn mend_catalog(&mut self) -> bool {
        match self.pool.verify_catalog() {
            Ok(mended) => {
                self.note.repaired += mended;
                true
            }
            Err(error) => {
                self.metadata.push(error.to_string());
                false
            }
        }
    }

    fn catalog(&mut self) {
        self.mend_catalog();
        if let Some(error) = self.metadata.first() {
            self.note.lost_count += 1;
            self.note.lost.insert(0, format!("catalog: {error}"));
        }
    }

    /// What was lost and is right or known by now, since the other end gave it back.
    pub(super) fn look_again(&mut self) {
        let pool = self.pool;
        let (right, lost): (Vec<Lost>, Vec<Lost>) = std::mem::take(&mut self.lost)
            .into_iter()
            .partition(|lost| scrub::is_right(pool, lost));
        for lost in &right {
            let text = format!("{}: {lost}", volume_name(pool, lost.key));
            self.note.lost.retain(|known| *known != text);
        }
        let back = to_u64(right.len());
        self.note.lost_count -= back.min(self.note.lost_count);
        self.note.known += back;
        self.lost = lost;
    }

    /// Ends it before it is whole, for good.
    pub(super) fn halt(&mut self) {
        self.note.word = Word::Stopped;
        self.note.next = None;
        self.save();
    }

    /// Ends it.
    pub(super) fn end(&mut self) {
        self.count_devices();
        let Note { repaired, copies, known, lost_count, .. } = self.note;
        self.note.word = match (lost_count, repaired + copies + known) {
            (0, 0) => Word::Clean,
            (0, _) => Word::Repaired,
            _ => Word::Damaged,
        };
        self.note.next = None;
        self.note.blocks_total = self.note.blocks_read;
        (self.note.ever, self.note.waited_seconds) = (true, 0);
        self.note.ended_at = Some(machine::unix_seconds());
        self.save();
    }

    // ---- notes ----

    fn note_now(&mut self, next: Next) {
        self.note.next = Some(next);
        self.count_devices();
        self.save();
    }

    fn note_sometimes(&mut self, next: Next) {
        self.note.next = Some(next);
        self.count_devices();
        self.shared.show(&self.note);
        if machine::elapsed(self.noted) >= NOTE_EVERY {
            self.save();
        }
    }

    fn save(&mut self) {
        self.noted = machine::now();
        self.shared.show(&self.note);
        if let Err(error) = self.note.save(self.pool) {
            tracing::warn!(%error, "the place that the scrub has reached is not noted");
        }
    }

    fn count_devices(&mut self) {
        let Some(array) = self.pool.array() else { return };
        let now = array.repairs();
        let names = self.pool.devices();
        for (place, report) in names.iter().enumerate() {
            if self.note.devices.len() <= place {
                self.note.devices.push(ScrubbedDevice::default());
            }
            let (errors, repaired) = now.get(place).copied().unwrap_or_default();
            let before = self.counted.get(place).copied().unwrap_or_default();
            let shown = &mut self.note.devices[place];
            shown.name = report.name.to_string();
            shown.read_errors += errors.saturating_sub(before.0);
            shown.repaired_blocks += repaired.saturating_sub(before.1);
        }
        self.counted = now;
    }
}

fn devices(pool: &Pool) -> Vec<ScrubbedDevice> {
    let each = pool.devices();
    let each = each.iter().map(|report| ScrubbedDevice {
        name: report.name.to_string(),
        ..ScrubbedDevice::default()
    });
    each.collect()
}

/// Blocks that a whole scrub reads, about.
fn total(pool: &Pool, in_use: &InUse) -> Result<u64, PoolError> {
    let space = pool.space()?;
    let trees = space.used.0 + space.kept.0 + space.work.0;
    let Some(array) = pool.array().filter(|array| array.is_redundant()) else { return Ok(trees) };
    let blocks = array.stripe_bytes() / BLOCK_BYTES_U64;
    let stripes = (0..array.stripes()).filter(|stripe| in_use.any(stripe * blocks, blocks));
    Ok(trees + to_u64(stripes.count()) * array.stripe_blocks_everywhere())
}

/// All trees, in the order in which they are read.
fn targets(pool: &Pool) -> Result<Vec<Target>, PoolError> {
    let catalog = pool.catalog();
    let mut all = Vec::new();
    for source in catalog.sources()? {
        let order = |kind, age, key: VolumeKey| Order {
            kind,
            source: key.source,
            age,
            volume: key.volume.0,
        };
        for row in catalog.volumes(source.id)? {
            let order = order(Kind::Published, 0, row.key);
            all.push(Target { order, key: row.key, cp: source.applied, name: None });
        }
        for kept in catalog.kept(source.id)? {
            for volume in &kept.row.volumes {
                let key = VolumeKey { source: source.id, volume: volume.number };
                let order = order(Kind::Kept, u32::MAX - kept.row.cp.0, key);
                all.push(Target { order, key, cp: kept.row.cp, name: Some(kept.row.name.clone()) });
            }
        }
        if let Some(row) = catalog.work(source.id)? {
            for (key, _) in row.keyed() {
                all.push(Target { order: order(Kind::Work, 0, key), key, cp: row.cp, name: None });
            }
        }
    }
    for row in catalog.seeds()? {
        for (key, _) in row.keyed() {
            let (source, volume) = (key.source, key.volume.0);
            let order = Order { kind: Kind::Work, source, age: 0, volume };
            all.push(Target { order, key, cp: row.cp, name: None });
        }
    }
    all.sort_by_key(|target| target.order);
    all.dedup_by_key(|target| target.order);
    Ok(all)
}

fn volume_name(pool: &Pool, key: VolumeKey) -> String {
    let catalog = pool.catalog();
    let source = catalog.source(key.source).ok().flatten();
    let volume = catalog.volume(key).ok().flatten();
    match (source, volume) {
        (Some(source), Some(volume)) => format!("{}/{}", source.name, volume.name),
        _ => format!("volume {} of {}", key.volume, key.source),
    }
}

const _: () = assert!(BLOCK_BYTES == 4096);
