//! An open array: its devices, and who of them is in.
//!
//! Reads go to the device that has the block ([`super::read`]). Everything that changes anything on
//! a device is done under the writer's lock ([`super::write`]), which also guards who is in.
//!
//! Invariant: a device that failed is marked in memory at once and in the labels of the others
//! before the call returns in which that was met. If more fail than the level bears, the first
//! reason is kept: every later write is refused with it, and every read that needs what is lost.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use crate::device::buffer::AlignedBuffer;
use crate::device::{Device, DeviceError, Durability, MemberReport, MemberState, check_range};
use crate::units::BLOCK_BYTES;
use crate::units::convert::{low_u32, to_u64, to_usize};
use crate::units::ids::{ArrayId, MemberId};
use crate::units::machine;
use crate::units::numbers::ByteCount;

use super::crew::{self, Ended};
use super::journal::Area;
use super::label::{self, Entry, Label};
use super::layout::{Geometry, Level};
use super::stripes::StripeSet;
use super::watch::Watched;

/// A block in memory.
pub(super) type Block = Arc<[u8; BLOCK_BYTES]>;

/// One place of the array.
pub(super) struct Member {
    id: Mutex<MemberId>,
    device: RwLock<Option<Arc<Watched>>>,
    name: Mutex<Arc<str>>,
    state: AtomicU8,
    /// Stripes of the array.
    stripes: u64,
    /// Of one that is being filled: where that began, what is filled, and what of it is durable.
    first: AtomicU64,
    rebuilt: AtomicU64,
    durable: AtomicU64,
    sparse: AtomicBool,
    reason: Mutex<Option<Arc<str>>>,
    pub(super) read_errors: AtomicU64,
    pub(super) repaired: AtomicU64,
}

const IN: u8 = 1;
const FAILED: u8 = 2;
const REBUILDING: u8 = 3;

impl Member {
    /// One that is there.
    pub(super) fn present(entry: Entry, device: Arc<dyn Device>, stripes: u64) -> Self {
        let member = Self::missing(entry, "", stripes);
        member.attach(device);
        *member.reason.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let state = match entry.state {
            MemberState::In => IN,
            MemberState::Failed => FAILED,
            MemberState::Rebuilding => REBUILDING,
        };
        member.state.store(state, Ordering::Release);
        member
    }

    /// One that is not.
    pub(super) fn missing(entry: Entry, reason: &str, stripes: u64) -> Self {
        Self {
            id: Mutex::new(entry.id),
            device: RwLock::new(None),
            name: Mutex::new(Arc::from(format!("device {}", entry.id))),
            state: AtomicU8::new(FAILED),
            stripes,
            first: AtomicU64::new(entry.first),
            rebuilt: AtomicU64::new(entry.rebuilt),
            durable: AtomicU64::new(entry.rebuilt),
            sparse: AtomicBool::new(entry.sparse),
            reason: Mutex::new(Some(Arc::from(reason))),
            read_errors: AtomicU64::new(0),
            repaired: AtomicU64::new(0),
        }
    }

    fn attach(&self, device: Arc<dyn Device>) {
        *self.name.lock().unwrap_or_else(PoisonError::into_inner) = device.name();
        let watched = Arc::new(Watched::new(device));
        *self.device.write().unwrap_or_else(PoisonError::into_inner) = Some(watched);
    }

    /// Another device has the place from now on; it has nothing yet. Under the writer's lock.
    pub(super) fn begin_filling(&self, id: MemberId, device: Arc<dyn Device>, first: u64) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = id;
        self.attach(device);
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.first.store(first, Ordering::Release);
        self.rebuilt.store(0, Ordering::Release);
        self.durable.store(0, Ordering::Release);
        self.sparse.store(true, Ordering::Release);
        self.read_errors.store(0, Ordering::Relaxed);
        self.repaired.store(0, Ordering::Relaxed);
        self.state.store(REBUILDING, Ordering::Release);
    }

    /// The next stripe to be filled, and how many are left; none if it is not being filled.
    pub(super) fn to_fill(&self) -> Option<(u64, u64)> {
        if self.state() != MemberState::Rebuilding {
            return None;
        }
        let (first, rebuilt) = (self.first.load(Ordering::Acquire), self.filled());
        Some(((first + rebuilt) % self.stripes, self.stripes - rebuilt))
    }

    /// Stripes that it has.
    pub(super) fn filled(&self) -> u64 {
        self.rebuilt.load(Ordering::Acquire)
    }

    /// It has one stripe more.
    pub(super) fn has_next(&self) {
        self.rebuilt.fetch_add(1, Ordering::AcqRel);
    }

    /// So many of them are durable.
    pub(super) fn made_durable(&self, filled: u64) {
        self.durable.store(filled, Ordering::Release);
    }

    /// It has everything, durably.
    pub(super) fn is_filled(&self) {
        self.rebuilt.store(0, Ordering::Release);
        self.durable.store(0, Ordering::Release);
        self.first.store(0, Ordering::Release);
        self.state.store(IN, Ordering::Release);
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.sparse.load(Ordering::Acquire)
    }

    pub(super) fn id(&self) -> MemberId {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> MemberState {
        match self.state.load(Ordering::Acquire) {
            IN => MemberState::In,
            REBUILDING => MemberState::Rebuilding,
            _ => MemberState::Failed,
        }
    }

    /// The device, unless it has failed.
    pub(super) fn device(&self) -> Option<Arc<dyn Device>> {
        if self.state() == MemberState::Failed {
            return None;
        }
        self.attached()
    }

    /// The device, also after it failed: what was on it before still is.
    pub(super) fn attached(&self) -> Option<Arc<dyn Device>> {
        let device = self.device.read().unwrap_or_else(PoisonError::into_inner).clone()?;
        Some(device)
    }

    /// The device, if it has what belongs into that stripe.
    pub(super) fn usable(&self, stripe: u64) -> Option<Arc<dyn Device>> {
        match self.state() {
            MemberState::In => self.device(),
            MemberState::Rebuilding => {
                let first = self.first.load(Ordering::Acquire);
                let behind = (stripe + self.stripes - first) % self.stripes;
                if behind < self.filled() { self.device() } else { None }
            }
            MemberState::Failed => None,
        }
    }

    /// It is not used from now on; the first reason holds.
    pub(super) fn fail(&self, error: &DeviceError) {
        self.fail_for(&error.to_string());
    }

    /// The same for a reason of another kind.
    pub(super) fn fail_for(&self, reason: &str) {
        if self.state.swap(FAILED, Ordering::AcqRel) != FAILED {
            let reason: Arc<str> = Arc::from(reason);
            tracing::error!(device = %self.name(), %reason, "a device of the array has failed");
            *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
        }
    }

    /// Why it should not be used any more, though it has not failed.
    pub(super) fn verdict(&self) -> Option<String> {
        self.device.read().unwrap_or_else(PoisonError::into_inner).as_ref()?.verdict()
    }

    pub(super) fn name(&self) -> Arc<str> {
        self.name.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Closes a device that is not used any more.
    pub(super) fn release(&self) {
        *self.device.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn call(&self, name: &str) {
        *self.name.lock().unwrap_or_else(PoisonError::into_inner) = Arc::from(name);
    }

    fn entry(&self) -> Entry {
        Entry {
            id: self.id(),
            state: self.state(),
            rebuilt: self.durable.load(Ordering::Acquire),
            first: self.first.load(Ordering::Acquire),
            sparse: self.is_sparse(),
        }
    }

    fn report(&self) -> MemberReport {
        let watched = self.device.read().unwrap_or_else(PoisonError::into_inner).clone();
        MemberReport {
            name: self.name(),
            id: self.id(),
            state: self.state(),
            reason: self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            read_errors: self.read_errors.load(Ordering::Relaxed),
            repaired_blocks: self.repaired.load(Ordering::Relaxed),
            size: watched.as_ref().map_or(ByteCount(0), |device| device.size()),
            written_bytes: watched.as_ref().map_or(0, |device| device.written_bytes()),
            slow_answers: watched.as_ref().map_or(0, |device| device.slow_answers()),
        }
    }
}

/// What only one thread at a time may do.
pub(super) struct Writer {
    /// Of the newest label.
    pub(super) commit: u64,
    /// Who is in by the newest label.
    pub(super) recorded: Vec<Entry>,
    /// Arrays that were added behind this one.
    pub(super) added: Vec<ArrayId>,
    pub(super) area: Area,
    /// Stripes that held nothing when a device was filled, and whose parity fits nothing yet.
    pub(super) unfit: Option<StripeSet>,
    /// Stripes written since a device began to be filled, until it is known what it needs.
    pub(super) touched: Option<BTreeSet<u64>>,
    /// Parity of whole stripes on its way, by column: kept, for new memory costs more than it does.
    pub(super) parity: Vec<AlignedBuffer>,
}

/// Several devices as one.
pub struct Array {
    pub(super) name: Arc<str>,
    pub(super) id: ArrayId,
    pub(super) geometry: Geometry,
    pub(super) members: Vec<Member>,
    pub(super) writer: Mutex<Writer>,
    /// Blocks of partial stripes that are not in place yet, by number.
    pub(super) pending: RwLock<BTreeMap<u64, Block>>,
    /// Shared by whoever reads a whole row, exclusive for changes in place.
    pub(super) in_place: RwLock<()>,
    broken: OnceLock<Arc<DeviceError>>,
    pub(super) syncs: AtomicU64,
    /// Rows that could not be rebuilt.
    pub(super) lost_rows: AtomicU64,
    /// Writes nothing into the journal: the negative control of the write hole's tests.
    pub(super) without_journal: AtomicBool,
    /// One plain device as it is, without labels: see [`Array::bare`].
    bare: bool,
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Array").field("id", &self.id).field("geometry", &self.geometry).finish()
    }
}

impl Array {
    pub(super) fn new(
        (id, geometry): (ArrayId, Geometry),
        members: Vec<Member>,
        (commit, added): (u64, Vec<ArrayId>),
        area: Area,
    ) -> Self {
        Self {
            name: Arc::from(format!("array {id}")),
            id,
            geometry,
            members,
            writer: Mutex::new(Writer {
                commit,
                recorded: Vec::new(),
                added,
                area,
                unfit: None,
                touched: None,
                parity: Vec::new(),
            }),
            lost_rows: AtomicU64::new(0),
            pending: RwLock::default(),
            in_place: RwLock::default(),
            broken: OnceLock::new(),
            syncs: AtomicU64::new(0),
            without_journal: AtomicBool::new(false),
            bare: false,
        }
    }

    /// A plain device, as if it were an array of one: all of it, byte for byte, in one stripe. It has no
    /// label and no journal, and none is written.
    pub fn bare(device: Arc<dyn Device>) -> Arc<Self> {
        let (name, size) = (device.name(), device.size().0);
        let geometry =
            Geometry { level: Level::None, members: 1, chunk: size, data_start: 0, stripes: 1 };
        let id = MemberId([0; 16]);
        let entry = Entry { id, state: MemberState::In, rebuilt: 0, first: 0, sparse: false };
        let member = Member::present(entry, device, 1);
        let (none, area) = (ArrayId([0; 16]), Area::new(0, 0));
        let array = Self::new((none, geometry), vec![member], (0, Vec::new()), area);
        array.lock().recorded = vec![entry];
        Arc::new(Self { name, bare: true, ..array })
    }

    /// Bytes that an array of so many devices of `bytes` each has; 0 if they are too few or small.
    pub fn bytes_of(level: Level, members: usize, bytes: u64) -> u64 {
        Geometry::new(level, members, bytes).map_or(0, |geometry| geometry.size())
    }

    /// Whether it is a plain device.
    pub fn is_bare(&self) -> bool {
        self.bare
    }

    /// Its id.
    pub fn id(&self) -> ArrayId {
        self.id
    }

    /// What it bears.
    pub fn level(&self) -> Level {
        self.geometry.level
    }

    /// Why it refuses writes, if it does.
    pub fn broken(&self) -> Option<Arc<DeviceError>> {
        self.broken.get().cloned()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Writer> {
        // A panic in the middle of a write leaves an array that refuses writes: see `poisoned`.
        let poisoned = self.writer.is_poisoned();
        let guard = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if poisoned {
            self.break_with(("write", 0, 0), "a thread panicked while it wrote");
        }
        guard
    }

    pub(super) fn check_whole(&self) -> Result<(), DeviceError> {
        match self.broken.get() {
            Some(first) => Err(DeviceError::Latched { first: Arc::clone(first) }),
            None => Ok(()),
        }
    }

    /// Refuses writes from now on; the first reason holds.
    pub(super) fn break_with(
        &self,
        (operation, offset, length): (&'static str, u64, u64),
        what: &str,
    ) -> DeviceError {
        let error = self.lost((operation, offset, length), what);
        self.break_by(error)
    }

    pub(super) fn break_by(&self, error: DeviceError) -> DeviceError {
        let first = self.broken.get_or_init(|| {
            tracing::error!(array = %self.id, %error, "the array refuses writes");
            Arc::new(error)
        });
        DeviceError::clone(first)
    }

    /// An error that names the bytes.
    pub(super) fn lost(
        &self,
        (operation, offset, length): (&'static str, u64, u64),
        what: &str,
    ) -> DeviceError {
        let mut what = what.to_owned();
        for member in self.members.iter().filter(|member| member.state() != MemberState::In) {
            let report = member.report();
            let reason = report.reason.as_deref().unwrap_or("it is being rebuilt").to_owned();
            what.push_str(&format!("; {}: {reason}", report.name));
        }
        let device = Arc::clone(&self.name);
        DeviceError::Lost { device, operation, offset, length, what: Arc::from(what) }
    }

    /// Puts into the labels who is in, if that has changed, and refuses all writes if too few are.
    pub(super) fn record(&self, writer: &mut Writer) -> Result<(), DeviceError> {
        self.apply_policy();
        let now = || self.members.iter().map(Member::entry).collect::<Vec<_>>();
        while now() != writer.recorded {
            self.check_enough()?;
            self.write_labels(writer, now());
        }
        self.check_enough()
    }

    /// Names another array as added behind this one: in the labels of all devices that are in when this
    /// returns, and so for whoever opens it from now on.
    pub(super) fn note_added(&self, array: ArrayId) -> Result<(), DeviceError> {
        let mut writer = self.lock();
        self.record(&mut writer)?;
        if !writer.added.contains(&array) {
            writer.added.push(array);
            let entries = writer.recorded.clone();
            self.write_labels(&mut writer, entries);
        }
        self.record(&mut writer)
    }

    /// The arrays that were added behind this one, in order.
    pub fn added(&self) -> Vec<ArrayId> {
        self.lock().added.clone()
    }

    /// Devices that are not in.
    pub(super) fn out(&self) -> usize {
        self.members.iter().filter(|member| member.state() != MemberState::In).count()
    }

    /// Fails devices that answer slowly or with errors, as long as the others bear it.
    fn apply_policy(&self) {
        let members = self.members.iter().filter(|member| member.state() == MemberState::In);
        for member in members {
            if let Some(reason) = member.verdict().filter(|_| self.out() < self.geometry.spare()) {
                member.fail_for(&reason);
            }
        }
    }

    fn check_enough(&self) -> Result<(), DeviceError> {
        self.check_whole()?;
        if self.out() > self.geometry.spare() {
            let length = self.geometry.size();
            return Err(self.break_with(("write", 0, length), "more devices failed than it bears"));
        }
        Ok(())
    }

    /// Writes the next label to all that are in or become so.
    pub(super) fn write_labels(&self, writer: &mut Writer, entries: Vec<Entry>) {
        if machine::breaks(9) || self.bare {
            writer.recorded = entries;
            return;
        }
        writer.commit += 1;
        self.put_labels(writer, &entries);
        writer.recorded = entries;
    }

    /// Writes the newest label, which says `entries`, once more: some do not have it.
    pub(super) fn repeat_labels(&self, entries: &[Entry]) {
        self.put_labels(&self.lock(), entries);
    }

    fn put_labels(&self, writer: &Writer, entries: &[Entry]) {
        // One that is being filled comes last: it never knows more than those it is filled from.
        let last = |(_, member): &(usize, &Member)| member.state() == MemberState::Rebuilding;
        let mut members: Vec<(usize, &Member)> = self.members.iter().enumerate().collect();
        members.sort_by_key(last);
        for (place, member) in members {
            let Some(device) = member.device() else { continue };
            let label = Label {
                array: self.id,
                member: member.id(),
                commit: writer.commit,
                geometry: self.geometry,
                place,
                entries: entries.to_vec(),
                added: writer.added.clone(),
            };
            if let Err(error) = label::write(&*device, &label) {
                member.fail(&error);
            }
        }
    }

    /// Calls `work` with each of these places whose device has not failed, side by side; a device
    /// that fails in it is marked. Says how many did not.
    pub(super) fn on_each(
        &self,
        places: impl Iterator<Item = usize>,
        work: impl Fn(usize, &dyn Device) -> Result<(), DeviceError> + Sync,
    ) -> usize {
        let there: Vec<(usize, Arc<dyn Device>)> =
            places.filter_map(|place| Some((place, self.members[place].device()?))).collect();
        let run = |place: usize, device: &dyn Device| match work(place, device) {
            Ok(()) => true,
            Err(error) => {
                self.members[place].fail(&error);
                false
            }
        };
        let ended = crew::each(&there, |(place, device)| run(*place, &**device));
        for ((place, _), _) in there.iter().zip(&ended).filter(|(_, end)| **end == Ended::Panicked)
        {
            let what = self.lost(("write", 0, 0), "its thread panicked");
            self.members[*place].fail(&what);
        }
        ended.into_iter().filter(|end| *end == Ended::With(true)).count()
    }
}

impl Device for Array {
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    fn size(&self) -> ByteCount {
        ByteCount(self.geometry.size())
    }

    fn alignment(&self) -> ByteCount {
        ByteCount(to_u64(BLOCK_BYTES))
    }

    fn durability(&self) -> Durability {
        let first = self.members.iter().find_map(Member::device);
        first.map_or(Durability::Fdatasync, |device| device.durability())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self, offset, buffer.len())?;
        self.read(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        check_range(self, offset, bytes.len())?;
        self.write(offset, bytes)
    }

    /// Makes all that was written before durable as well.
    fn write_durable_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.write_at(offset, bytes)?;
        self.flush()
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.flush_all()?;
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    fn stripe(&self) -> ByteCount {
        ByteCount(self.geometry.stripe_bytes())
    }

    fn alternatives(&self) -> u32 {
        let others = self.geometry.members - 1;
        low_u32(to_u64(match self.geometry.level {
            Level::None => 0,
            Level::Parity1 => 1,
            Level::Mirror | Level::Parity2 => others,
        }))
    }

    fn read_alternative(
        &self,
        nth: u32,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), DeviceError> {
        check_range(self, offset, buffer.len())?;
        self.read_other(to_usize(u64::from(nth)), offset, buffer)
    }

    fn repair_at(&self, offset: u64, seen: &[u8], good: &[u8]) -> Result<bool, DeviceError> {
        check_range(self, offset, good.len())?;
        self.repair(offset, seen, good)
    }

    fn note_unused(&self, in_use: &dyn Fn(u64, u64) -> bool) {
        self.leave_out_unused(in_use);
    }

    fn managed(self: Arc<Self>) -> Option<Arc<dyn Any + Send + Sync>> {
        Some(self)
    }

    fn members(&self) -> Vec<MemberReport> {
        self.members.iter().map(Member::report).collect()
    }
}
