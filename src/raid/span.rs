//! Arrays one behind the other: what a pool lies on that was grown.
//!
//! Each of them is an array of its own, with labels, journal and parity of its own, of one level and with
//! as many devices; the first one, at home, names the others in its label ([`super::label`]). So each bears
//! the loss of as many devices as the level says. To whoever manages devices they are one: places and
//! stripes are counted through.
//!
//! A pool on one array has a span of one.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

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
use super::layout::{Geometry, Level};
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
}

// ---- add ----

/// Makes an array with that id out of devices that begin with zeros, and names it in the labels of the
/// one at home: from then on whoever opens that has it. What an earlier call left is taken up; a finished
/// array of another id is not.
pub fn add(home: &Array, id: ArrayId, devices: &[Arc<dyn Device>]) -> Result<(), AssembleError> {
    if home.added().contains(&id) {
        return Ok(());
    }
    let shape = (home.level(), home.members().len());
    if devices.len() != shape.1 {
        return Err(AssembleError::OtherShape {
            wanted: said(shape),
            met: said((shape.0, devices.len())),
        });
    }
    if home.added().len() >= RAID_ADDED_MAX {
        return Err(AssembleError::Grown { max: RAID_ADDED_MAX });
    }
    let made = |device: &Arc<dyn Device>| {
        label::read(&**device).is_ok_and(|label| label.array == id && label.commit > 0)
    };
    // The labels are finished one after the other: one that is says that all the rest was durable.
    if !devices.iter().any(made) {
        assemble::create_as(id, shape.0, devices)?;
    }
    Ok(home.note_added(id)?)
}

fn said((level, members): (Level, usize)) -> String {
    format!("{} of {members}", level.word())
}

// ---- find ----

/// Opens what these devices are: an array, or several one behind the other.
pub fn open(
    devices: &[Arc<dyn Device>],
    wanted: Wanted<'_>,
    options: OpenOptions,
) -> Result<(Arc<dyn Device>, Vec<LeftOut>), AssembleError> {
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

/// Of each array that was finished the newest label.
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
    arrays: Vec<Arc<Array>>,
    /// Where each begins, in bytes.
    starts: Vec<u64>,
    size: u64,
}

impl Span {
    /// The first one is at home; all have stripes of one size.
    pub fn new(arrays: Vec<Arc<Array>>) -> Self {
        let (mut starts, mut size) = (Vec::new(), 0);
        for array in &arrays {
            assert_eq!(array.stripe_bytes(), arrays[0].stripe_bytes(), "stripes of two sizes");
            starts.push(size);
            size += array.size().0;
        }
        assert!(!arrays.is_empty(), "a span of nothing");
        Self { arrays, starts, size }
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
        self.arrays.len() > 1
    }

    /// Devices of each array.
    pub fn width(&self) -> usize {
        self.home().members().len()
    }

    /// Bytes that so many devices more would add, of `bytes` each.
    pub fn added_bytes(&self, bytes: u64) -> u64 {
        Geometry::new(self.home().level(), self.width(), bytes).map_or(0, |more| more.size())
    }

    /// The array that has the catalog, and names the others.
    pub fn home(&self) -> &Arc<Array> {
        &self.arrays[0]
    }

    fn each(&self) -> impl Iterator<Item = &Array> {
        self.arrays.iter().map(|array| &**array)
    }

    /// The array that has that byte, and where it is there.
    fn at(&self, offset: u64) -> (&Array, u64) {
        let behind = self.starts.partition_point(|start| *start <= offset);
        (&self.arrays[behind - 1], offset - self.starts[behind - 1])
    }

    fn of_stripe(&self, stripe: u64) -> (&Array, u64) {
        let (array, offset) = self.at(stripe * self.stripe_bytes());
        (array, offset / self.stripe_bytes())
    }

    /// The array that has that device, and its place there.
    fn of_place(&self, place: usize) -> (&Array, usize) {
        let each = self.width();
        (&self.arrays[(place / each).min(self.arrays.len() - 1)], place % each)
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
        for (array, start) in self.each().zip(&self.starts) {
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
        ByteCount(self.size)
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
        self.home().stripe()
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
        for (array, start) in self.each().zip(&self.starts) {
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
