//! Arrays one behind the other: what a pool lies on that was grown.
//!
//! Each of them is an array of its own, with labels, journal and parity of its own, of one level and with
//! as many devices; the first one, at home, names the others in its label ([`super::label`]). So each bears
//! the loss of as many devices as the level says. To whoever manages devices they are one: places and
//! stripes are counted through.
//!
//! A pool on one array has a span of one. A pool on a plain device ([`Array::bare`]) that was grown has
//! that one at home, and its own label names the others.
//!
//! Others come behind while the span is in use ([`Span::push`]); none ever goes, and none moves.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::device::{Device, DeviceError, Durability, MemberReport, check_range};
use crate::limits::RAID_ADDED_MAX;
use crate::units::convert::{to_u64, to_usize};
use crate::units::ids::ArrayId;
use crate::units::numbers::ByteCount;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::array::Array;
use super::assemble::{self, AssembleError, LeftOut, OpenOptions, Opened};
use super::label::{self, Label};
use super::layout::Level;
use super::rebuild::{Filling, ManageError, Step};
use super::scrub::{Row, StripeCheck};

/// Devices that are being added: what the process remembers of it before it touches them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adding {
    /// The id of the array that they become.
    pub array: ArrayId,
    /// Where they are.
    pub paths: Vec<PathBuf>,
    /// It has come to its end while the process ran: the labels know of it.
    #[serde(default)]
    pub done: bool,
}

impl Adding {
    fn has(&self, name: &str) -> bool {
        self.paths.iter().any(|path| *path.display().to_string() == *name)
    }
}

/// What devices a configuration names, and what is to be known of them.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The level, and how many devices there are.
    pub shape: (Level, usize),
    /// Their names, in order.
    pub names: &'a [String],
    /// Those that were being added when the process ended, or before.
    pub adding: &'a [Adding],
    /// What a device that is a pool by itself says of the arrays behind it.
    pub plain: Behind,
}

/// The arrays that are behind a device which is no part of an array and a pool by itself; none if it is
/// no pool.
pub type Behind = fn(&dyn Device) -> Option<Vec<ArrayId>>;

// ---- add ----

/// Makes an array with that id out of devices that begin with zeros, and names it in the labels of the
/// one at home: from then on whoever opens that has it. What an earlier call left is taken up; a finished
/// array of another id is not.
pub fn add(
    home: &Array,
    id: ArrayId,
    devices: &[Arc<dyn Device>],
) -> Result<Arc<Array>, AssembleError> {
    let added = home.added();
    if !added.contains(&id) && added.len() >= RAID_ADDED_MAX {
        return Err(AssembleError::Grown { max: RAID_ADDED_MAX });
    }
    let array = make(id, (home.level(), home.members().len()), devices)?;
    home.note_added(id)?;
    Ok(array)
}

/// Makes an array that is to be added, or opens it if an earlier call has made it. Nobody names it yet.
pub fn make(
    id: ArrayId,
    shape: (Level, usize),
    devices: &[Arc<dyn Device>],
) -> Result<Arc<Array>, AssembleError> {
    if devices.len() != shape.1 {
        return Err(AssembleError::OtherShape {
            wanted: said(shape),
            met: said((shape.0, devices.len())),
        });
    }
    // The labels are finished one after the other: one that is says that all the rest was durable.
    if devices.iter().any(|device| is_of(&**device, id)) {
        let found = assemble::open_as(devices, Some(shape), OpenOptions::default())?;
        return Ok(found.array);
    }
    assemble::create_as(id, shape.0, devices)
}

/// Whether a device is of that array, which was finished.
fn is_of(device: &dyn Device, id: ArrayId) -> bool {
    label::read(device).is_ok_and(|label| label.array == id && label.commit > 0)
}

fn said((level, members): (Level, usize)) -> String {
    format!("{} of {members}", level.word())
}

// ---- find ----

/// Bytes that these devices have together, as their labels say: of the array at home and of those behind
/// it. None if no such label is there, or one is not. `plain` says what is behind a pool by itself, and its
/// bytes.
pub fn bytes_of(devices: &[Arc<dyn Device>], level: Level, plain: Behind) -> Option<u64> {
    let newest = newest_labels(devices);
    let size = |id: &ArrayId| newest.get(id).map(|label| label.geometry.size());
    if level == Level::None
        && let Some((home, behind)) = devices.iter().find_map(|device| {
            let member = assemble::is_member(&**device);
            Some((device, plain(&**device).filter(|_| !member)?))
        })
    {
        return behind.iter().map(size).sum::<Option<u64>>().map(|more| home.size().0 + more);
    }
    let home = home_of(devices, &newest, &[]).ok()?;
    let home = match home {
        Some(home) => home,
        None if newest.len() == 1 => newest.values().next()?,
        None => return None,
    };
    let behind = home.added.iter().map(size).sum::<Option<u64>>()?;
    (home.geometry.level == level).then(|| home.geometry.size() + behind)
}

/// Opens what these devices are: an array, or several one behind the other.
pub fn open(
    devices: &[Arc<dyn Device>],
    wanted: Wanted<'_>,
    options: OpenOptions,
) -> Result<(Arc<dyn Device>, Vec<LeftOut>), AssembleError> {
    if let Some((home, behind)) = plain_home(devices, &wanted)? {
        return open_behind(&home, &behind, devices, wanted, options);
    }
    let newest = newest_labels(devices);
    let home = home_of(devices, &newest, wanted.adding)?;
    let (level, count) = wanted.shape;
    if home.is_none() && wanted.adding.is_empty() {
        let Opened { array, left_out } = assemble::open_as(devices, Some((level, count)), options)?;
        array.name_missing(wanted.names);
        return Ok((array, left_out));
    }
    let known: Vec<ArrayId> = home.map(|home| home.added.clone()).unwrap_or_default();
    if let Some(lost) = known.iter().find(|id| !newest.contains_key(id)) {
        return Err(AssembleError::AddedMissing { array: *lost });
    }
    let (front, mut left_out) = front(devices, home, wanted.adding);
    let opened = assemble::open(&front, options)?;
    left_out.extend(opened.left_out);
    let pending = finish(&opened.array, devices, wanted.adding, &mut left_out);
    let mut arrays = vec![opened.array];
    for id in arrays[0].added() {
        let of = |device: &&Arc<dyn Device>| label::read(&***device).is_ok_and(|l| l.array == id);
        let own: Vec<_> = devices.iter().filter(of).cloned().collect();
        let opened = assemble::open(&own, options)?;
        left_out.extend(opened.left_out);
        arrays.push(opened.array);
    }
    check(&arrays, (level, count.saturating_sub(pending)))?;
    let width = arrays[0].members().len();
    for (array, names) in arrays.iter().zip(wanted.names.chunks(width)) {
        array.name_missing(names);
    }
    match &arrays[..] {
        [_] => Ok((arrays.remove(0), left_out)),
        _ => Ok((Arc::new(Span::new(arrays)), left_out)),
    }
}

/// A device that is a pool by itself, and what it says of those behind it.
type PlainHome = (Arc<dyn Device>, Vec<ArrayId>);

/// The one among these.
fn plain_home(
    devices: &[Arc<dyn Device>],
    wanted: &Wanted<'_>,
) -> Result<Option<PlainHome>, AssembleError> {
    if wanted.shape.0 != Level::None {
        return Ok(None);
    }
    let of = |device: &Arc<dyn Device>| {
        let behind = if assemble::is_member(&**device) { None } else { (wanted.plain)(&**device) };
        Some((Arc::clone(device), behind?))
    };
    let mut homes = devices.iter().filter_map(of);
    match (homes.next(), homes.next()) {
        (Some((one, _)), Some((other, _))) => {
            let what = format!("{} and {} are pools by themselves", one.name(), other.name());
            Err(AssembleError::Several { what })
        }
        (home, _) => Ok(home),
    }
}

/// A plain device and the arrays behind it. Those that are being added and that it does not name yet are
/// gone on with when the pool is open.
fn open_behind(
    home: &Arc<dyn Device>,
    behind: &[ArrayId],
    devices: &[Arc<dyn Device>],
    wanted: Wanted<'_>,
    options: OpenOptions,
) -> Result<(Arc<dyn Device>, Vec<LeftOut>), AssembleError> {
    let mut arrays = vec![Array::bare(Arc::clone(home))];
    let mut left_out = Vec::new();
    for id in behind {
        let own: Vec<_> = devices.iter().filter(|device| is_of(&***device, *id)).cloned().collect();
        if own.is_empty() {
            return Err(AssembleError::AddedMissing { array: *id });
        }
        let opened = assemble::open(&own, options)?;
        left_out.extend(opened.left_out);
        arrays.push(opened.array);
    }
    let mut pending = 0;
    for device in devices.iter().filter(|device| !Arc::ptr_eq(device, home)) {
        let name = device.name();
        if wanted.adding.iter().any(|one| one.has(&name) && !behind.contains(&one.array)) {
            pending += 1;
        } else if !behind.iter().any(|id| is_of(&**device, *id)) {
            let reason = format!("is not one of those that were added behind {}", home.name());
            left_out.push(LeftOut { name, reason });
        }
    }
    check(&arrays, (Level::None, wanted.shape.1.saturating_sub(pending)))?;
    Ok((Arc::new(Span::new(arrays)), left_out))
}

/// The devices among which those at home are looked for, and foreign ones. What was added, or is being
/// added, is neither.
fn front(
    devices: &[Arc<dyn Device>],
    home: Option<&Label>,
    adding: &[Adding],
) -> (Vec<Arc<dyn Device>>, Vec<LeftOut>) {
    let (mut front, mut foreign) = (Vec::new(), Vec::new());
    for device in devices {
        let name = device.name();
        let array = label::read(&**device).ok().filter(|label| label.commit > 0).map(|l| l.array);
        let is_new = adding.iter().any(|one| one.has(&name));
        match (array, home) {
            (Some(array), Some(home)) if home.added.contains(&array) => {}
            (Some(array), Some(home)) if home.array == array => front.push(Arc::clone(device)),
            _ if is_new => {}
            (Some(array), Some(home)) => {
                let reason = format!("belongs to array {array}, these are of {}", home.array);
                foreign.push(LeftOut { name, reason });
            }
            (None, _) | (Some(_), None) => front.push(Arc::clone(device)),
        }
    }
    (front, foreign)
}

/// Goes on with what was being added. Says how many devices are not added after all: each is left out
/// with the reason, and the others are served.
fn finish(
    home: &Array,
    devices: &[Arc<dyn Device>],
    adding: &[Adding],
    left_out: &mut Vec<LeftOut>,
) -> usize {
    let mut pending = 0;
    for one in adding.iter().filter(|one| !home.added().contains(&one.array)) {
        let own: Vec<_> =
            devices.iter().filter(|device| one.has(&device.name())).cloned().collect();
        let Err(error) = add(home, one.array, &own) else {
            tracing::info!(array = %one.array, "devices that were being added are added");
            continue;
        };
        pending += one.paths.len();
        for path in &one.paths {
            let (name, reason) =
                (Arc::from(path.display().to_string()), format!("is not added: {error}"));
            tracing::error!(device = %name, reason, "an addition does not come to its end");
            left_out.push(LeftOut { name, reason });
        }
    }
    pending
}

/// All of one shape, and as many devices as are wanted.
fn check(arrays: &[Arc<Array>], wanted: (Level, usize)) -> Result<(), AssembleError> {
    let width = arrays[0].members().len();
    let alike = |array: &&Arc<Array>| (array.level(), array.members().len()) == (wanted.0, width);
    let met = (arrays[0].level(), arrays.iter().map(|array| array.members().len()).sum());
    if arrays.iter().filter(alike).count() < arrays.len() || met != wanted {
        return Err(AssembleError::OtherShape { wanted: said(wanted), met: said(met) });
    }
    Ok(())
}

/// The newest label of the array at home, if that is a grown one. It has the most devices of those that
/// stand for themselves: one of another hub's among them does not make them its.
fn home_of<'a>(
    devices: &[Arc<dyn Device>],
    newest: &'a BTreeMap<ArrayId, Label>,
    adding: &[Adding],
) -> Result<Option<&'a Label>, AssembleError> {
    let count = |label: &Label| {
        let of = |device: &&Arc<dyn Device>| {
            label::read(&***device).is_ok_and(|other| other.array == label.array)
        };
        devices.iter().filter(of).count()
    };
    let is_behind = |label: &Label| {
        newest.values().any(|other| other.added.contains(&label.array))
            || adding.iter().any(|one| one.array == label.array)
    };
    let fronts: Vec<(usize, &Label)> =
        newest.values().filter(|label| !is_behind(label)).map(|l| (count(l), l)).collect();
    let most = fronts.iter().map(|(count, _)| *count).max().unwrap_or(0);
    let mut first = fronts.iter().filter(|(count, _)| *count == most).map(|(_, label)| *label);
    let (one, other) = (first.next(), first.next());
    if let (Some(one), Some(other)) = (one, other)
        && !(one.added.is_empty() && other.added.is_empty())
    {
        let what = format!("arrays {} and {} have as many devices", one.array, other.array);
        return Err(AssembleError::Several { what });
    }
    Ok(one.filter(|label| !label.added.is_empty()))
}

/// Of each array that was finished the newest label.
fn newest_labels(devices: &[Arc<dyn Device>]) -> BTreeMap<ArrayId, Label> {
    let mut newest: BTreeMap<ArrayId, Label> = BTreeMap::new();
    let labels = devices.iter().filter_map(|device| label::read(&**device).ok());
    for label in labels.filter(|label| label.commit > 0) {
        let newer = newest.get(&label.array).is_none_or(|old| old.commit < label.commit);
        if newer {
            newest.insert(label.array, label);
        }
    }
    newest
}

/// The arrays, in order.
#[derive(Debug)]
pub struct Span {
    home: Arc<Array>,
    /// The others, and where each begins, in bytes. One that is there stays.
    behind: [OnceLock<(u64, Arc<Array>)>; RAID_ADDED_MAX],
}

impl Span {
    /// The first one is at home; all have stripes of one size.
    pub fn new(arrays: Vec<Arc<Array>>) -> Self {
        let mut arrays = arrays.into_iter();
        let Some(home) = arrays.next() else { panic!("a span of nothing") };
        let span = Self { home, behind: Default::default() };
        arrays.for_each(|array| assert!(span.push(array), "more arrays than a label can name"));
        span
    }

    /// One more behind the others, at once: whoever reads or writes meanwhile sees none of it, since
    /// nothing lies there yet. One that is there already is not put there again. False: there is no
    /// place for another. One call at a time.
    #[must_use = "what has no place is not used"]
    pub fn push(&self, array: Arc<Array>) -> bool {
        let same = self.is_plain_at_home() || array.stripe_bytes() == self.home.stripe_bytes();
        assert!(same, "stripes of two sizes");
        if self.each().any(|one| one.id() == array.id()) {
            return true;
        }
        let start = self.size().0;
        let free = self.behind.iter().find(|place| place.get().is_none());
        free.is_some_and(|place| place.set((start, array)).is_ok())
    }

    /// Whether the one at home is a plain device, which is a pool by itself.
    pub fn is_plain_at_home(&self) -> bool {
        self.home.is_bare()
    }

    /// The ids of those behind the one at home.
    pub fn behind(&self) -> Vec<ArrayId> {
        self.each().skip(1).map(Array::id).collect()
    }

    /// What a device is made of, if it is an array or several.
    pub fn of(device: Arc<dyn Device>) -> Option<Arc<Self>> {
        match device.managed()?.downcast::<Array>() {
            Ok(array) => Some(Arc::new(Self::new(vec![array]))),
            Err(other) => other.downcast().ok(),
        }
    }

    /// Whether it is more than one.
    pub fn is_grown(&self) -> bool {
        self.behind[0].get().is_some()
    }

    /// Devices of each array.
    pub fn width(&self) -> usize {
        self.home().members().len()
    }

    /// Bytes that so many devices more would add, of `bytes` each.
    pub fn added_bytes(&self, bytes: u64) -> u64 {
        Array::bytes_of(self.home().level(), self.width(), bytes)
    }

    /// The array that has the catalog, and names the others.
    pub fn home(&self) -> &Arc<Array> {
        &self.home
    }

    fn each(&self) -> impl Iterator<Item = &Array> {
        self.parts_of().map(|(_, array)| array)
    }

    /// Each with its first byte.
    fn parts_of(&self) -> impl Iterator<Item = (u64, &Array)> {
        let behind = self.behind.iter().map_while(OnceLock::get);
        std::iter::once((0, &*self.home)).chain(behind.map(|(start, array)| (*start, &**array)))
    }

    /// The array that has that byte, and where it is there.
    fn at(&self, offset: u64) -> (&Array, u64) {
        let before = |(start, _): &(u64, &Array)| *start <= offset;
        let (start, array) = self.parts_of().take_while(before).last().unwrap_or((0, &*self.home));
        (array, offset - start)
    }

    fn of_stripe(&self, stripe: u64) -> (&Array, u64) {
        let (array, offset) = self.at(stripe * self.stripe_bytes());
        (array, offset / self.stripe_bytes())
    }

    /// The array that has that device, and its place there.
    fn of_place(&self, place: usize) -> (&Array, usize) {
        let each = self.width();
        let array = self.each().nth(place / each);
        (array.unwrap_or(&self.home), place % each)
    }

    /// Calls `work` with each part of these bytes.
    fn parts(
        &self,
        offset: u64,
        length: usize,
        mut work: impl FnMut(&Array, u64, std::ops::Range<usize>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        check_range(self, offset, length)?;
        let mut done = 0;
        while done < length {
            let (array, at) = self.at(offset + to_u64(done));
            let count = (length - done).min(to_usize(array.size().0 - at));
            work(array, at, done..done + count)?;
            done += count;
        }
        Ok(())
    }
}

/// What is asked by whoever manages devices.
impl Span {
    /// Stripes of all.
    pub fn stripes(&self) -> u64 {
        self.each().map(Array::stripes).sum()
    }

    /// Bytes of data of a stripe.
    pub fn stripe_bytes(&self) -> u64 {
        self.home().stripe_bytes()
    }

    /// Blocks of one stripe on all of its devices.
    pub fn stripe_blocks_everywhere(&self) -> u64 {
        self.home().stripe_blocks_everywhere()
    }

    /// Blocks of one stripe on one device.
    pub fn stripe_blocks_of_one(&self) -> u64 {
        self.home().stripe_blocks_of_one()
    }

    /// Whether there is more than one way to a block.
    pub fn is_redundant(&self) -> bool {
        self.home().is_redundant()
    }

    /// Why writes are refused, if they are.
    pub fn broken(&self) -> Option<Arc<DeviceError>> {
        self.each().find_map(Array::broken)
    }

    /// As [`Array::blocks_of`].
    pub fn blocks_of(&self, row: Row) -> impl Iterator<Item = u64> + '_ {
        let (array, stripe) = self.of_stripe(row.stripe);
        let before = (row.stripe - stripe) * self.stripe_bytes() / BLOCK_BYTES_U64;
        array.blocks_of(Row { stripe, ..row }).map(move |block| before + block)
    }

    /// As [`Array::check_stripe`].
    pub fn check_stripe(&self, stripe: u64) -> StripeCheck {
        let (array, within) = self.of_stripe(stripe);
        let mut check = array.check_stripe(within);
        check.unfit.iter_mut().for_each(|row| row.stripe = stripe);
        check
    }

    /// As [`Array::fit_proven`].
    pub fn fit_proven(&self, row: Row) -> Result<u64, DeviceError> {
        let (array, stripe) = self.of_stripe(row.stripe);
        array.fit_proven(Row { stripe, ..row })
    }

    /// Of the array with the catalog, as [`Array::losses`].
    pub fn losses(&self) -> Vec<Vec<usize>> {
        self.home().losses()
    }

    /// A block of the array with the catalog, as [`Array::block_without`].
    pub fn block_without(&self, block: u64, places: &[usize]) -> Option<[u8; BLOCK_BYTES]> {
        self.home().block_without(block, places)
    }

    /// As [`Array::repairs`].
    pub fn repairs(&self) -> Vec<(u64, u64)> {
        self.each().flat_map(Array::repairs).collect()
    }

    /// As [`Array::place_of`].
    pub fn place_of(&self, name: &str) -> Result<usize, ManageError> {
        let (mut before, places) = (0, self.members().len());
        for array in self.each() {
            match array.named(name) {
                Some(place) => return Ok(before + place),
                None => before += array.members().len(),
            }
        }
        let number = name.parse().ok().filter(|place| *place < places);
        number.ok_or_else(|| ManageError::Unknown { name: name.to_owned() })
    }

    /// As [`Array::member_bytes`], for the device at a place.
    pub fn member_bytes(&self, place: usize) -> u64 {
        self.of_place(place).0.member_bytes()
    }

    /// As [`Array::check_new`].
    pub fn check_new(&self, place: usize, device: &dyn Device) -> Result<(), ManageError> {
        self.of_place(place).0.check_new(device)
    }

    /// As [`Array::release`].
    pub fn release(&self, place: usize) {
        let (array, place) = self.of_place(place);
        array.release(place);
    }

    /// As [`Array::fail_device`].
    pub fn fail_device(&self, place: usize, reason: &str) -> Result<(), ManageError> {
        let (array, place) = self.of_place(place);
        array.fail_device(place, reason)
    }

    /// As [`Array::replace`].
    pub fn replace(&self, place: usize, device: Arc<dyn Device>) -> Result<(), ManageError> {
        let (array, place) = self.of_place(place);
        array.replace(place, device)
    }

    /// As [`Array::filling`].
    pub fn filling(&self) -> Filling {
        let mut all = Filling::default();
        for one in self.each().map(Array::filling) {
            all.devices += one.devices;
            all.left_stripes = all.left_stripes.max(one.left_stripes);
            all.lost_rows += one.lost_rows;
        }
        all
    }

    /// As [`Array::wants_plan`].
    pub fn wants_plan(&self) -> bool {
        self.each().any(Array::wants_plan)
    }

    /// As [`Array::plan_rebuild`].
    pub fn plan_rebuild(&self, in_use: &dyn Fn(u64, u64) -> bool) {
        for (start, array) in self.parts_of() {
            let before = start / BLOCK_BYTES_U64;
            array.plan_rebuild(&|first, count| in_use(before + first, count));
        }
    }

    /// As [`Array::stripes_to_fill`], of all.
    pub fn stripes_to_fill(&self) -> u64 {
        self.each().map(Array::stripes_to_fill).sum()
    }

    /// Fills the next stripe of the first array that lacks one.
    pub fn rebuild_step(&self) -> Result<Step, DeviceError> {
        for array in self.each() {
            match array.rebuild_step()? {
                Step::Idle => {}
                step @ (Step::Filled(_) | Step::LeftOut | Step::Done) => return Ok(step),
            }
        }
        Ok(Step::Idle)
    }

    /// As [`Array::note_filled`].
    pub fn note_filled(&self) -> Result<(), DeviceError> {
        self.each().try_for_each(Array::note_filled)
    }

    /// As [`Array::look`].
    pub fn look(&self) -> Result<(), DeviceError> {
        self.each().filter(|array| array.broken().is_none()).try_for_each(Array::look)
    }
}

impl Device for Span {
    fn name(&self) -> Arc<str> {
        self.home().name()
    }

    fn size(&self) -> ByteCount {
        let (start, last) = self.parts_of().last().unwrap_or((0, &*self.home));
        ByteCount(start + last.size().0)
    }

    fn alignment(&self) -> ByteCount {
        self.home().alignment()
    }

    fn durability(&self) -> Durability {
        self.home().durability()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.parts(offset, buffer.len(), |array, at, part| array.read_at(at, &mut buffer[part]))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.parts(offset, bytes.len(), |array, at, part| array.write_at(at, &bytes[part]))
    }

    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.parts(offset, bytes.len(), |array, at, part| array.write_durable_at(at, &bytes[part]))
    }

    /// What the others have is durable before what is at home, where catalog and labels lie.
    fn flush(&self) -> Result<(), DeviceError> {
        self.each().skip(1).try_for_each(Array::flush)?;
        self.home().flush()
    }

    fn syncs(&self) -> u64 {
        self.each().map(Array::syncs).sum()
    }

    fn stripe(&self) -> ByteCount {
        if self.is_plain_at_home() { self.alignment() } else { self.home().stripe() }
    }

    fn alternatives(&self) -> u32 {
        self.home().alternatives()
    }

    fn read_alternative(
        &self,
        nth: u32,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), DeviceError> {
        self.parts(offset, buffer.len(), |array, at, part| {
            array.read_alternative(nth, at, &mut buffer[part])
        })
    }

    fn repair_at(&self, offset: u64, seen: &[u8], good: &[u8]) -> Result<bool, DeviceError> {
        check_range(self, offset, good.len())?;
        let (array, at) = self.at(offset);
        if at + to_u64(good.len()) > array.size().0 {
            return Ok(false);
        }
        array.repair_at(at, seen, good)
    }

    fn note_unused(&self, in_use: &dyn Fn(u64, u64) -> bool) {
        for (start, array) in self.parts_of() {
            let before = start / BLOCK_BYTES_U64;
            array.note_unused(&|first, count| in_use(before + first, count));
        }
    }

    fn managed(self: Arc<Self>) -> Option<Arc<dyn Any + Send + Sync>> {
        Some(self)
    }

    fn members(&self) -> Vec<MemberReport> {
        self.each().flat_map(|array| array.members()).collect()
    }
}
