//! Filling a device that takes the place of another.
//!
//! [`Array::replace`] writes the new device into the labels of all others, then its own: from then on
//! it is of the array, and has nothing. [`Array::plan_rebuild`] is told what is in use; stripes that
//! hold nothing are left out. Their rows fit no parity from then on: the first write into one of them
//! gives it one before ([`Array::touch`]). [`Array::rebuild_step`] fills one stripe after the other,
//! under the writer's lock, so that nothing is written beside it. What is filled is in use at once;
//! the labels say of how much that is durable.
//!
//! Stripes that most devices lack come first: a second device begins where the first one is, and
//! both are filled together; what the first had by then comes last. So the order is a run that
//! goes round the end.
//!
//! A cut anywhere leaves labels that say that the device is being filled, and how far at least: an
//! open goes on from there, and what holds nothing then is left out.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::device::{Device, DeviceError, MemberState, is_blank};
use crate::units::convert::{to_u64, to_usize};
use crate::units::ids::{MemberId, RandomError};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::array::{Array, Member, Writer};
use super::assemble::is_member;
use super::journal::{self, Header, Record, StripeRun};
use super::layout::Spot;
use super::parity;
use super::stripes::StripeSet;

/// Why the devices stay as they are.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ManageError {
    /// A device of the array failed meanwhile.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernel gave no random bytes.
    #[error("no id for a new device: {what}")]
    Random { what: String },
    /// There is no array.
    #[error("the pool lies on one plain device: no other one has its content")]
    Plain,
    /// No such place.
    #[error("the array has no device {name}")]
    Unknown { name: String },
    /// Nothing would be left of the redundancy that is used already.
    #[error(
        "{name} cannot be failed: {out} of {members} devices are out already, {word} bears {spare}"
    )]
    NotBorne { name: Arc<str>, out: usize, members: usize, word: &'static str, spare: usize },
    /// It is out already.
    #[error("{name} is out already: {reason}")]
    OutAlready { name: Arc<str>, reason: String },
    /// The new device is too small.
    #[error("{name} has {met} bytes, the array needs {wanted}")]
    TooSmall { name: Arc<str>, met: u64, wanted: u64 },
    /// The new device may be somebody else's.
    #[error("{name} holds something already: a new device begins with 1 MiB of zeros; wipe it")]
    NotBlank { name: Arc<str> },
}

impl From<RandomError> for ManageError {
    fn from(error: RandomError) -> Self {
        Self::Random { what: error.to_string() }
    }
}

/// How far filling is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Filling {
    /// Devices that are being filled.
    pub devices: usize,
    /// Stripes that are left, of the one that lacks most.
    pub left_stripes: u64,
    /// Rows that could not be had from the others, since the array was opened.
    pub lost_rows: u64,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// No device is being filled.
    Idle,
    /// A stripe was filled, and so many bytes were read and written.
    Filled(u64),
    /// A stripe that holds nothing was passed over.
    LeftOut,
    /// A device has everything, and is in.
    Done,
}

impl Array {
    /// The place of the device of that name.
    pub fn place_of(&self, name: &str) -> Result<usize, ManageError> {
        let number = || name.parse().ok().filter(|place| *place < self.geometry.members);
        let found = self.named(name).or_else(number);
        found.ok_or_else(|| ManageError::Unknown { name: name.to_owned() })
    }

    /// The place of the device with that path or id.
    pub(super) fn named(&self, name: &str) -> Option<usize> {
        let named = |member: &Member| *member.name() == *name || member.id().to_string() == name;
        self.members.iter().position(named)
    }

    /// Names the devices that are not there: `paths` by place, if those that are there are at the
    /// places where they stand in it. Nobody else knows where the others were.
    pub(super) fn name_missing(&self, paths: &[String]) {
        let there = |member: &Member| member.device().is_some();
        let each = || self.members.iter().zip(paths);
        let fits = each().all(|(member, path)| !there(member) || *member.name() == **path);
        if fits && paths.len() == self.members.len() {
            for (member, path) in each().filter(|(member, _)| !there(member)) {
                member.call(path);
            }
        }
    }

    /// Bytes that a device of it must have.
    pub fn member_bytes(&self) -> u64 {
        self.geometry.member_bytes()
    }

    /// Takes a device out for good, if the others bear it.
    pub fn fail_device(&self, place: usize, reason: &str) -> Result<(), ManageError> {
        let mut writer = self.lock();
        self.check_whole()?;
        let member = &self.members[place];
        let name = member.name();
        match member.state() {
            MemberState::Failed => {
                let reason = self.members_reason(place);
                return Err(ManageError::OutAlready { name, reason });
            }
            // It is no loss: nobody counts on it yet.
            MemberState::Rebuilding => {}
            MemberState::In if self.out() >= self.geometry.spare() => {
                let (out, spare) = (self.out(), self.geometry.spare());
                let (members, word) = (self.geometry.members, self.geometry.level.word());
                return Err(ManageError::NotBorne { name, out, members, word, spare });
            }
            MemberState::In => {}
        }
        member.fail_for(reason);
        Ok(self.record(&mut writer)?)
    }

    fn members_reason(&self, place: usize) -> String {
        let report = self.members().swap_remove(place);
        report.reason.map_or_else(|| "no reason is known".to_owned(), |reason| reason.to_string())
    }

    /// Whether a device can take the place of one.
    pub fn check_new(&self, device: &dyn Device) -> Result<(), ManageError> {
        let name = device.name();
        let (met, wanted) = (device.size().0, self.geometry.member_bytes());
        if met < wanted {
            return Err(ManageError::TooSmall { name, met, wanted });
        }
        if is_member(device) || !is_blank(device)? {
            return Err(ManageError::NotBlank { name });
        }
        Ok(())
    }

    /// Gives up the device at a place that is out, so that its path is free.
    pub fn release(&self, place: usize) {
        let _writer = self.lock();
        if self.members[place].state() == MemberState::Failed {
            self.members[place].release();
        }
    }

    /// Puts a new device in the place of one that is out. It is in the labels when this returns,
    /// and has nothing yet. [`Array::plan_rebuild`] comes next.
    pub fn replace(&self, place: usize, device: Arc<dyn Device>) -> Result<(), ManageError> {
        self.check_new(&*device)?;
        let mut writer = self.lock();
        self.check_whole()?;
        let member = &self.members[place];
        if member.state() != MemberState::Failed {
            let reason = "fail it before it is replaced".to_owned();
            return Err(ManageError::OutAlready { name: member.name(), reason });
        }
        // What other devices lack first; if they lack nothing, from the front.
        let first = self.lacking().map_or(0, |(stripe, _)| stripe);
        let id = MemberId::random()?;
        writer.touched = Some(BTreeSet::new());
        tracing::info!(device = %device.name(), place, "a new device of the array");
        member.begin_filling(id, device, first);
        Ok(self.record(&mut writer)?)
    }

    /// Where the device that lacks most goes on, and how much it lacks.
    fn lacking(&self) -> Option<(u64, u64)> {
        self.members.iter().filter_map(Member::to_fill).max_by_key(|(_, left)| *left)
    }

    /// Whether a device is to be filled, and what was written since it came is not told apart yet.
    pub fn wants_plan(&self) -> bool {
        self.lock().touched.is_some()
    }

    /// Says what is in use: `in_use(first, count)` of blocks of the array, looked up after the new
    /// device came.
    pub fn plan_rebuild(&self, in_use: &dyn Fn(u64, u64) -> bool) {
        let mut writer = self.lock();
        if let Some(touched) = writer.touched.take() {
            let unused = self.unused(in_use, &touched);
            writer.unfit = Some(match writer.unfit.take() {
                None => unused,
                Some(mut before) => {
                    let added = (0..self.geometry.stripes).filter(|at| unused.contains(*at));
                    added.for_each(|stripe| before.insert(stripe));
                    before
                }
            });
        }
    }

    fn unused(&self, in_use: &dyn Fn(u64, u64) -> bool, but: &BTreeSet<u64>) -> StripeSet {
        let mut unused = StripeSet::new(self.geometry.stripes);
        let blocks = self.geometry.stripe_bytes() / BLOCK_BYTES_U64;
        for stripe in 0..self.geometry.stripes {
            if !but.contains(&stripe) && !in_use(stripe * blocks, blocks) {
                unused.insert(stripe);
            }
        }
        unused
    }

    /// At an open: what holds nothing need not fit, if a device was filled without it.
    pub(super) fn leave_out_unused(&self, in_use: &dyn Fn(u64, u64) -> bool) {
        if self.members.iter().any(Member::is_sparse) {
            let unused = self.unused(in_use, &BTreeSet::new());
            self.lock().unfit = Some(unused);
        }
    }

    /// A partial write into that stripe comes: its parity fits from now on.
    pub(super) fn touch(&self, writer: &mut Writer, stripe: u64) -> Result<(), DeviceError> {
        writer.touched.iter_mut().for_each(|touched| _ = touched.insert(stripe));
        let unfit = writer.unfit.as_mut().is_some_and(|unfit| unfit.remove(stripe));
        if unfit {
            let run = StripeRun { first: stripe, count: 1 };
            self.append(writer, &Record { blocks: Vec::new(), whole: vec![run] })?;
            self.fit(stripe);
        }
        Ok(())
    }

    /// How far filling is.
    pub fn filling(&self) -> Filling {
        let left = self.members.iter().filter_map(Member::to_fill).map(|(_, left)| left);
        Filling {
            devices: left.clone().count(),
            left_stripes: left.max().unwrap_or(0),
            lost_rows: self.lost_rows.load(Ordering::Relaxed),
        }
    }

    /// Stripes in use that the device that lacks most still lacks.
    pub fn stripes_to_fill(&self) -> u64 {
        let writer = self.lock();
        let Some((next, left)) = self.lacking() else { return 0 };
        let stripes = self.geometry.stripes;
        let unfit = |at: &u64| {
            let stripe = (next + at) % stripes;
            writer.unfit.as_ref().is_some_and(|unfit| unfit.contains(stripe))
        };
        left - to_u64((0..left).filter(unfit).count())
    }

    /// Fills the next stripe.
    pub fn rebuild_step(&self) -> Result<Step, DeviceError> {
        let mut writer = self.lock();
        self.check_whole()?;
        let Some((stripe, _)) = self.lacking() else { return Ok(Step::Idle) };
        if self.members.iter().any(|member| member.to_fill().is_some_and(|(_, left)| left == 0)) {
            return self.end_filling(&mut writer).map(|()| Step::Done);
        }
        let here = |place: &usize| self.members[*place].to_fill().is_some_and(|at| at.0 == stripe);
        let places: Vec<usize> = (0..self.geometry.members).filter(here).collect();
        let left_out = writer.unfit.as_ref().is_some_and(|unfit| unfit.contains(stripe));
        let bytes = if left_out { 0 } else { self.fill(stripe, &places) };
        for place in places {
            if self.members[place].to_fill().is_some_and(|(_, left)| left > 0) {
                self.members[place].has_next();
            }
        }
        self.record(&mut writer)?;
        Ok(if left_out { Step::LeftOut } else { Step::Filled(bytes) })
    }

    /// Writes the chunks of these devices, out of those of the others. Says how many bytes that cost.
    fn fill(&self, stripe: u64, places: &[usize]) -> u64 {
        let (n, k) = (self.geometry.members, self.geometry.data_columns());
        let chunk = to_usize(self.geometry.chunk);
        let mut columns: Vec<Option<Vec<u8>>> = vec![None; n];
        let mut found = 0;
        for (column, bytes) in columns.iter_mut().enumerate() {
            let place = self.geometry.place(stripe, column);
            if found == k || places.contains(&place) {
                continue;
            }
            let mut met = vec![0; chunk];
            if self.read_column(Spot { stripe, column, within: 0 }, &mut met) {
                *bytes = Some(met);
                found += 1;
            }
        }
        let mut cost = to_u64(found * chunk);
        let whole = parity::recover(&mut columns, k, chunk).is_ok();
        for place in places {
            let column = self.geometry.column(stripe, *place);
            let Some(device) = self.members[*place].device() else { continue };
            let written = match columns[column].as_ref().filter(|_| whole) {
                Some(bytes) => device.write_at(self.geometry.on_member(stripe, 0), bytes),
                None => self.fill_rows(stripe, column, &*device),
            };
            cost += to_u64(chunk);
            if let Err(error) = written {
                self.members[*place].fail(&error);
            }
        }
        cost
    }

    /// Row by row, where a device does not give all of a chunk.
    fn fill_rows(&self, stripe: u64, column: usize, to: &dyn Device) -> Result<(), DeviceError> {
        for within in (0..self.geometry.chunk).step_by(BLOCK_BYTES) {
            match self.recovered(Spot { stripe, column, within }, &[column]) {
                Some(bytes) => to.write_at(self.geometry.on_member(stripe, within), &bytes)?,
                // Whoever asks for it is told: its checksum is not right.
                None => {
                    self.lost_rows.fetch_add(1, Ordering::Relaxed);
                    let device = to.name();
                    tracing::error!(%device, stripe, within, "cannot be had from the others");
                }
            }
        }
        Ok(())
    }

    /// Makes what was filled durable, and says so in the labels.
    pub fn note_filled(&self) -> Result<(), DeviceError> {
        let filled: Vec<(usize, u64)> = {
            let _writer = self.lock();
            let each = self.members.iter().enumerate();
            let each = each.filter(|(_, member)| member.to_fill().is_some());
            each.map(|(place, member)| (place, member.filled())).collect()
        };
        for (place, filled) in filled {
            let member = &self.members[place];
            let Some(device) = member.device() else { continue };
            match device.flush() {
                Ok(()) => member.made_durable(filled),
                Err(error) => member.fail(&error),
            }
        }
        let mut writer = self.lock();
        self.record(&mut writer)
    }

    /// Devices that have everything are in. The journal is empty then, and begins on them as well.
    fn end_filling(&self, writer: &mut Writer) -> Result<(), DeviceError> {
        self.settle(writer)?;
        self.flush_members();
        self.record(writer)?;
        let upto = writer.area.next();
        self.void(writer, upto)?;
        let (life, counter) = (writer.area.life, writer.area.counter);
        let header = Header { array: self.id, life, counter, first: upto, position: 0 };
        for (place, member) in self.members.iter().enumerate() {
            if member.to_fill().is_none_or(|(_, left)| left > 0) {
                continue;
            }
            let Some(device) = member.device() else { continue };
            let has_journal = place < self.geometry.journal_places();
            let journal = || {
                device.write_durable_at(journal::header_offset(counter + 1), &[0; BLOCK_BYTES])?;
                device.write_durable_at(header.offset(), &header.encode())
            };
            match if has_journal { journal() } else { Ok(()) } {
                Ok(()) => {
                    tracing::info!(device = %member.name(), "is filled");
                    member.is_filled();
                }
                Err(error) => member.fail(&error),
            }
        }
        self.record(writer)
    }

    /// Looks at how the devices answer, and fails those that the policy fails.
    pub fn look(&self) -> Result<(), DeviceError> {
        let mut writer = self.lock();
        self.check_whole()?;
        self.record(&mut writer)
    }
}
