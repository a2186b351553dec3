//! Makes arrays, and finds them from their devices alone.
//!
//! [`create`] takes devices that begin with zeros and makes in this order: labels with commit 0 on
//! each, journals, zeros, labels with commit 1. Devices of which none has a commit above 0 hold
//! nothing of value.
//!
//! [`open`] takes devices in any order. Of the labels that name one array the highest commit
//! holds: whoever it does not call `in` is stale and left out, as are foreign devices and copies,
//! each by name and reason. Devices that are missing are recorded as failed on all others before
//! anything else is written, so that one that comes back later is known to be stale. Each open raises the
//! commit of all labels twice before it writes anything else, after it has brought up those that a
//! cut left one behind: so whoever is two behind was not there, whatever the labels call him, and was
//! **rolled back**: restored from a copy, or exchanged for one. He is left out like a stale one. If those
//! that are missing could have gone on without these, the array is not opened unless the caller
//! accepts that risk: nobody would know which side is newer. Then the journal is put in place
//! again, the stripes it names are given a parity that fits, all is flushed, and a new journal
//! begins.
//!
//! A cut anywhere in this leaves an array that opens the same way again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::device::buffer::AlignedBuffer;
use crate::device::{Device, DeviceError, MemberState, is_blank};
use crate::limits::{MIB, RAID_JOURNAL_BYTES};
use crate::units::convert::{to_u64, to_usize};
use crate::units::ids::{ArrayId, MemberId, RandomError, random_u64};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::array::{Array, Member, Writer};
use super::journal::{self, Area, Header, Placed, Record, StripeRun, Target};
use super::label::{self, Entry, Label, LabelError};
use super::layout::{Geometry, JOURNAL_START, Level, Spot};
use super::parity;

/// Why there is no array.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AssembleError {
    /// A device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernel gave no random bytes.
    #[error("no id for a new array: {what}")]
    Random { what: String },
    /// None of the devices belongs to an array, or to one that was never finished.
    #[error("no device carries a finished label of an array")]
    None,
    /// A new array would overwrite something.
    #[error(
        "{device}: holds something already, and a new array takes only what begins with 1 MiB of \
         zeros; name another one, or wipe it"
    )]
    NotBlank { device: Arc<str> },
    /// The devices cannot be an array of that level.
    #[error("{members} devices of at least {bytes} bytes make no array of level {level}")]
    Shape { level: &'static str, members: usize, bytes: u64 },
    /// The configuration says something else than the labels.
    #[error("the array on these devices is {met}, wanted {wanted}")]
    OtherShape { wanted: String, met: String },
    /// Two arrays, or two histories of one.
    #[error("{what}; leave the devices of the other one out")]
    Several { what: String },
    /// Too few devices of the array.
    #[error("{there} of {members} devices are there, {least} are needed{left_out}")]
    TooFew { there: usize, members: usize, least: usize, left_out: String },
    /// Those that are missing may be newer.
    #[error(
        "{missing} of {members} devices are missing, and they may have gone on without these\
         {left_out}; bring one of them back, or accept the risk that what they have is newer"
    )]
    MayBeOlder { missing: usize, members: usize, left_out: String },
    /// The label has no room for another one.
    #[error("{max} arrays were added behind the first one, and there can be no more")]
    Grown { max: usize },
    /// None of the devices of an array that was added.
    #[error("no device of array {array} is there, which was added behind the first one")]
    AddedMissing { array: ArrayId },
    /// Written by another version of this program.
    #[error(
        "{device}: the {part} of its array has format version {met}, this program knows {known}"
    )]
    Version { device: Arc<str>, part: &'static str, met: u32, known: u32 },
    /// The journal is damaged on every device that is there.
    #[error("the journal has no valid header on any device that is there")]
    Journal,
}

impl From<RandomError> for AssembleError {
    fn from(error: RandomError) -> Self {
        Self::Random { what: error.to_string() }
    }
}

/// A device that was given and is not used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Its path.
    pub name: Arc<str>,
    /// Why.
    pub reason: String,
}

/// An open array.
#[derive(Debug)]
pub struct Opened {
    /// The device.
    pub array: Arc<Array>,
    /// Devices that are not used.
    pub left_out: Vec<LeftOut>,
}

/// What an open may do.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// Open although the missing devices may be newer.
    pub accept_missing: bool,
}

// ---- make ----

/// Makes an array out of devices that begin with zeros, or of which an array was being made.
pub fn create(level: Level, devices: &[Arc<dyn Device>]) -> Result<Arc<Array>, AssembleError> {
    create_as(ArrayId::random()?, level, devices)
}

/// The same with an id that the caller has.
pub(super) fn create_as(
    id: ArrayId,
    level: Level,
    devices: &[Arc<dyn Device>],
) -> Result<Arc<Array>, AssembleError> {
    let bytes = devices.iter().map(|device| device.size().0).min().unwrap_or(0);
    let members = devices.len();
    let shape = || AssembleError::Shape { level: level.word(), members, bytes };
    let geometry = Geometry::new(level, members, bytes).ok_or_else(shape)?;
    for device in devices {
        let unfinished = matches!(label::read(&**device), Ok(label) if label.commit == 0);
        if !unfinished && !is_blank(&**device)? {
            return Err(AssembleError::NotBlank { device: device.name() });
        }
    }
    let mut entries = Vec::new();
    for _ in devices {
        let id = MemberId::random()?;
        entries.push(Entry { id, state: MemberState::In, rebuilt: 0, first: 0, sparse: false });
    }
    let label = |commit, place: usize| Label {
        array: id,
        member: entries[place].id,
        commit,
        geometry,
        place,
        entries: entries.clone(),
        added: Vec::new(),
    };
    for (place, device) in devices.iter().enumerate() {
        label::write(&**device, &label(0, place))?;
    }
    let life = random_u64()?;
    for (place, device) in devices.iter().enumerate() {
        zero_stripes(&**device, &geometry)?;
        if place < geometry.journal_places() {
            write_journal_once(&**device)?;
        }
        device.write_durable_at(journal::header_offset(0), &[0; BLOCK_BYTES])?;
        let header = Header { array: id, life, counter: 1, first: 1, position: 0 };
        device.write_durable_at(header.offset(), &header.encode())?;
        device.flush()?;
    }
    for (place, device) in devices.iter().enumerate() {
        label::write(&**device, &label(1, place))?;
    }
    Ok(open(devices, OpenOptions::default())?.array)
}

/// A record into space that is only allocated would cost the file system a commit of its own.
fn write_journal_once(device: &dyn Device) -> Result<(), DeviceError> {
    let zeroes = AlignedBuffer::new(to_usize(MIB.min(RAID_JOURNAL_BYTES)));
    for at in (0..RAID_JOURNAL_BYTES).step_by(zeroes.len()) {
        let length = to_usize((RAID_JOURNAL_BYTES - at).min(to_u64(zeroes.len())));
        device.write_at(JOURNAL_START + at, &zeroes[..length])?;
    }
    Ok(())
}

/// Rows of zeros fit their parity. What a new file does not have already is written.
fn zero_stripes(device: &dyn Device, geometry: &Geometry) -> Result<(), DeviceError> {
    let mut buffer = AlignedBuffer::new(to_usize(MIB));
    let zeroes = AlignedBuffer::new(to_usize(MIB));
    let (mut at, end) = (geometry.data_start, geometry.member_bytes());
    while at < end {
        let length = to_usize((end - at).min(MIB));
        device.read_at(at, &mut buffer[..length])?;
        if buffer[..length] != zeroes[..length] {
            device.write_at(at, &zeroes[..length])?;
        }
        at += to_u64(length);
    }
    Ok(())
}

// ---- find ----

/// Opens the array that these devices are of, in any order.
pub fn open(devices: &[Arc<dyn Device>], options: OpenOptions) -> Result<Opened, AssembleError> {
    open_as(devices, None, options)
}

/// Opens the array if it is of that level and has so many devices.
pub fn open_as(
    devices: &[Arc<dyn Device>],
    wanted: Option<(Level, usize)>,
    options: OpenOptions,
) -> Result<Opened, AssembleError> {
    let mut found = Found::judge(devices)?;
    let label = found.newest.clone();
    let geometry = label.geometry;
    check_shape(wanted, &geometry)?;
    let members = found.members();
    let is_in = |entry: &Entry| entry.state == MemberState::In;
    let there = members.iter().filter(|member| member.state() == MemberState::In).count();
    // Of one that is there, and older, nobody needs to ask whether it went on without these.
    let missing = label.entries.iter().filter(|entry| is_in(entry)).count() - there - found.older;
    let (least, left_out) = (geometry.data_columns(), found.named());
    if there < least {
        let members = geometry.members;
        return Err(AssembleError::TooFew { there, members, least, left_out });
    }
    if missing >= least && !options.accept_missing {
        let members = geometry.members;
        return Err(AssembleError::MayBeOlder { missing, members, left_out });
    }
    let (header, records) = scan(&members, (label.array, &geometry))?;
    let area = Area::new(random_u64()?, header.map_or(0, |header| header.counter) + 1);
    let changes = (label.commit, label.added);
    let array = Array::new((label.array, geometry), members, changes, area);
    if found.lags {
        array.repeat_labels(&label.entries);
    }
    array.mend(&records)?;
    let left_out = std::mem::take(&mut found.left_out);
    for LeftOut { name, reason } in &left_out {
        tracing::warn!(device = %name, reason, "not used by the array");
    }
    Ok(Opened { array: Arc::new(array), left_out })
}

fn check_shape(wanted: Option<(Level, usize)>, met: &Geometry) -> Result<(), AssembleError> {
    let met = (met.level, met.members);
    let said = |(level, members): (Level, usize)| format!("{} of {members}", level.word());
    match wanted {
        Some(wanted) if wanted != met => {
            Err(AssembleError::OtherShape { wanted: said(wanted), met: said(met) })
        }
        Some(_) | None => Ok(()),
    }
}

/// What the labels of some devices say.
struct Found {
    newest: Label,
    /// By place.
    taken: BTreeMap<usize, Arc<dyn Device>>,
    left_out: Vec<LeftOut>,
    /// A label is one commit behind the newest: the one that wrote that was cut.
    lags: bool,
    /// Devices that the newest label calls in, and that were rolled back.
    older: usize,
}

impl Found {
    fn judge(devices: &[Arc<dyn Device>]) -> Result<Self, AssembleError> {
        let mut left_out = Vec::new();
        let mut labelled = Vec::new();
        for device in devices {
            match label::read(&**device) {
                Ok(label) => labelled.push((label, device)),
                // Without it the array may be what it was before another program came.
                Err(LabelError::Version { met }) => {
                    let (part, known) = ("label", label::VERSION);
                    return Err(AssembleError::Version { device: device.name(), part, met, known });
                }
                Err(error) => leave(&mut left_out, device, error.to_string()),
            }
        }
        Self::leave_unfinished(&mut labelled, &mut left_out);
        let array = Self::array_of(&labelled)?;
        labelled.retain(|(label, device)| {
            let ours = label.array == array;
            if !ours {
                let reason = format!("belongs to array {}, these are of {array}", label.array);
                leave(&mut left_out, device, reason);
            }
            ours
        });
        Self::leave_copies(&mut labelled, &mut left_out);
        let newest = labelled.iter().max_by_key(|(label, _)| label.commit);
        let newest = newest.ok_or(AssembleError::None)?.0.clone();
        // Whoever wrote the newest label was in by every label before it.
        let alone = |label: &Label| {
            label.entries.get(newest.place).is_none_or(|entry| {
                // One that has the place of another since was never out.
                entry.state == MemberState::Failed && entry.id == newest.member
            })
        };
        let differs = |label: &Label| {
            label.geometry != newest.geometry
                || (label.commit == newest.commit && label.entries != newest.entries)
                || (label.commit == newest.commit && label.added != newest.added)
                || !newest.added.starts_with(&label.added)
                || alone(label)
        };
        if labelled.iter().any(|(label, _)| differs(label)) {
            let what = format!("the devices of array {array} have two histories");
            return Err(AssembleError::Several { what });
        }
        let mut taken = BTreeMap::new();
        let (mut lags, mut older) = (false, 0);
        for (label, device) in labelled {
            if let Some(reason) = stale(&label, &newest, &**device) {
                leave(&mut left_out, device, reason);
            } else if label.commit + 1 < newest.commit {
                let (met, wanted) = (label.commit, newest.commit);
                let reason = format!(
                    "was rolled back: its label has commit {met}, the array's {wanted}, and it was in all the \
                     time; find out who restored or exchanged it, wipe it, and put it in as a new one"
                );
                older += usize::from(newest.entries[label.place].state == MemberState::In);
                leave(&mut left_out, device, reason);
            } else {
                lags |= label.commit < newest.commit;
                taken.insert(label.place, Arc::clone(device));
            }
        }
        Ok(Self { newest, taken, left_out, lags, older })
    }

    /// An array exists when one of its devices says so.
    fn leave_unfinished(
        labelled: &mut Vec<(Label, &Arc<dyn Device>)>,
        left_out: &mut Vec<LeftOut>,
    ) {
        let finished = labelled.iter().filter(|(label, _)| label.commit > 0);
        let finished: BTreeSet<ArrayId> = finished.map(|(label, _)| label.array).collect();
        labelled.retain(|(label, device)| {
            let exists = finished.contains(&label.array);
            if !exists {
                leave(left_out, device, "its array was never finished");
            }
            exists
        });
    }

    /// The array that most of them belong to.
    fn array_of(labelled: &[(Label, &Arc<dyn Device>)]) -> Result<ArrayId, AssembleError> {
        let mut counts: BTreeMap<ArrayId, usize> = BTreeMap::new();
        for (label, _) in labelled {
            *counts.entry(label.array).or_default() += 1;
        }
        let most = counts.values().max().copied().unwrap_or(0);
        let mut first = counts.iter().filter(|(_, count)| **count == most);
        match (first.next(), first.next()) {
            (Some((array, _)), None) => Ok(*array),
            (Some((one, _)), Some((other, _))) => {
                let what = format!("the devices belong to arrays {one} and {other}");
                Err(AssembleError::Several { what })
            }
            (None, _) => Err(AssembleError::None),
        }
    }

    /// Of two devices with one id nobody knows which is the right one: both are left out.
    fn leave_copies(labelled: &mut Vec<(Label, &Arc<dyn Device>)>, left_out: &mut Vec<LeftOut>) {
        let (mut seen, mut twice) = (BTreeSet::new(), BTreeSet::new());
        for (label, _) in labelled.iter() {
            if !seen.insert(label.member) {
                twice.insert(label.member);
            }
        }
        labelled.retain(|(label, device)| {
            let copied = twice.contains(&label.member);
            if copied {
                let id = label.member;
                let reason = format!("is one of several copies of device {id}: take one away");
                leave(left_out, device, reason);
            }
            !copied
        });
    }

    fn members(&self) -> Vec<Member> {
        let entries = self.newest.entries.iter().enumerate();
        let stripes = self.newest.geometry.stripes;
        let member = |(place, entry): (usize, &Entry)| match self.taken.get(&place) {
            Some(device) => Member::present(*entry, Arc::clone(device), stripes),
            None if entry.state == MemberState::In => {
                Member::missing(*entry, "it was not there when the array was opened", stripes)
            }
            None if entry.state == MemberState::Rebuilding => {
                Member::missing(*entry, "it was being filled, and is not there", stripes)
            }
            None => Member::missing(*entry, "it had failed before the array was opened", stripes),
        };
        entries.map(member).collect()
    }

    fn named(&self) -> String {
        let each = |out: &LeftOut| format!("; {}: {}", out.name, out.reason);
        self.left_out.iter().map(each).collect()
    }
}

fn leave(left_out: &mut Vec<LeftOut>, device: &Arc<dyn Device>, reason: impl Into<String>) {
    left_out.push(LeftOut { name: device.name(), reason: reason.into() });
}

/// Why a device of the array is not used, if it is not.
fn stale(label: &Label, newest: &Label, device: &dyn Device) -> Option<String> {
    let entry = newest.entries.get(label.place);
    let Some(entry) = entry.filter(|entry| entry.id == label.member) else {
        return Some(format!("was replaced: another device has place {}", label.place));
    };
    if entry.state == MemberState::Failed {
        return Some(format!(
            "is stale: the array went on without it (its label has commit {}, the array's {})",
            label.commit, newest.commit
        ));
    }
    let (wanted, met) = (newest.geometry.member_bytes(), device.size().0);
    (met < wanted).then(|| format!("has {met} bytes, the array needs {wanted}"))
}

// ---- mend ----

/// The newest header of the journal, and the live records behind it, of all devices that have it.
fn scan(
    members: &[Member],
    (array, geometry): (ArrayId, &Geometry),
) -> Result<(Option<Header>, Vec<Record>), AssembleError> {
    let journals: Vec<Arc<dyn Device>> = members[..geometry.journal_places()]
        .iter()
        .filter(|member| member.state() == MemberState::In)
        .filter_map(Member::device)
        .collect();
    if geometry.journal_places() == 0 {
        return Ok((None, Vec::new()));
    }
    let header = newest_header(&journals, array)?.ok_or(AssembleError::Journal)?;
    let (mut records, mut seq) = (Vec::new(), header.first);
    let mut places = vec![header.position];
    while let Some((record, end)) =
        journals.iter().find_map(|device| find(&**device, &header, seq, &places))
    {
        records.push(record);
        seq += 1;
        places = journal::successors(end).collect();
    }
    Ok((Some(header), records))
}

/// The newest header of the journal. One of another version is an error, beside good ones too: what is
/// live stands where that one says.
fn newest_header(
    journals: &[Arc<dyn Device>],
    array: ArrayId,
) -> Result<Option<Header>, AssembleError> {
    let mut newest: Option<Header> = None;
    for device in journals {
        for copy in 0..journal::HEADER_BLOCKS {
            let mut bytes = [0; BLOCK_BYTES];
            if device.read_at(journal::header_offset(copy), &mut bytes).is_err() {
                continue;
            }
            if let Some(met) = Header::other_version(&bytes, array) {
                let (part, known) = ("journal", journal::VERSION);
                return Err(AssembleError::Version { device: device.name(), part, met, known });
            }
            let header = Header::decode(&bytes, array);
            newest = newest.into_iter().chain(header).max_by_key(|header| header.counter);
        }
    }
    Ok(newest)
}

/// The record of that number on one device, if it is at one of these places, and where it ends.
fn find(device: &dyn Device, header: &Header, seq: u64, places: &[u64]) -> Option<(Record, u64)> {
    places.iter().find_map(|&position| {
        let mut first = [0; BLOCK_BYTES];
        device.read_at(journal::record_offset(position), &mut first).ok()?;
        let length = Record::length(&first, position)?;
        let mut bytes = vec![0; length];
        device.read_at(journal::record_offset(position), &mut bytes).ok()?;
        let record = Record::decode(&bytes, header.array, header.life, seq)?;
        Some((record, position + to_u64(length)))
    })
}

impl Array {
    /// Records who is in, puts the journal in place, and begins a new one.
    fn mend(&self, records: &[Record]) -> Result<(), AssembleError> {
        let mut writer = self.lock();
        self.record(&mut writer)?;
        // Twice: what a cut leaves is one behind, what was not there is two behind.
        let entries = writer.recorded.clone();
        self.write_labels(&mut writer, entries);
        self.record(&mut writer)?;
        for record in records {
            let sound = record.blocks.iter().all(|placed| self.is_sound(placed));
            if !sound || !record.whole.iter().all(|run| self.has(run)) {
                return Err(AssembleError::Journal);
            }
        }
        records.iter().for_each(|record| self.put_in_place(&record.blocks));
        for run in records.iter().flat_map(|record| &record.whole) {
            for stripe in run.first..run.first + run.count {
                self.fit(stripe);
            }
        }
        if !records.is_empty() {
            tracing::info!(array = %self.id, records = records.len(), "journal put in place");
        }
        self.flush_members();
        self.record(&mut writer)?;
        self.begin_journal(&mut writer)
    }

    fn begin_journal(&self, writer: &mut Writer) -> Result<(), AssembleError> {
        Ok(self.write_header(writer, 1, 0)?)
    }

    fn is_sound(&self, placed: &Placed) -> bool {
        let geometry = &self.geometry;
        let end = geometry.member_bytes() - BLOCK_BYTES_U64;
        let named = match placed.target {
            Target::All => true,
            Target::Place(place) => place < geometry.members,
        };
        named
            && (geometry.data_start..=end).contains(&placed.offset)
            && placed.offset.is_multiple_of(BLOCK_BYTES_U64)
    }

    fn has(&self, run: &StripeRun) -> bool {
        run.first.checked_add(run.count).is_some_and(|end| end <= self.geometry.stripes)
    }

    /// Gives a stripe the parity that fits its data, whatever that is; says how many blocks did not.
    pub(super) fn fit(&self, stripe: u64) -> u64 {
        let rows = (0..self.geometry.chunk).step_by(BLOCK_BYTES);
        rows.map(|within| to_u64(self.fit_row(stripe, within).len())).sum()
    }

    /// The same for one row; says where it was rewritten.
    pub(super) fn fit_row(&self, stripe: u64, within: u64) -> Vec<usize> {
        let (n, k) = (self.geometry.members, self.geometry.data_columns());
        let mut columns: Vec<Option<Vec<u8>>> = vec![None; n];
        let mut found = 0;
        for (column, bytes) in columns.iter_mut().enumerate() {
            let mut met = vec![0; BLOCK_BYTES];
            if found < k && self.read_column(Spot { stripe, column, within }, &mut met) {
                *bytes = Some(met);
                found += 1;
            }
        }
        let had: Vec<bool> = columns.iter().map(Option::is_some).collect();
        if parity::recover(&mut columns, k, BLOCK_BYTES).is_err() {
            // Unreadable, and nobody was told that it could be read.
            return Vec::new();
        }
        let made = columns.iter().zip(had).enumerate().filter(|(_, (_, had))| !had);
        let offset = self.geometry.on_member(stripe, within);
        let blocks = made.filter_map(|(column, (bytes, _))| {
            let block = Box::new(*bytes.as_ref()?.first_chunk()?);
            let target = Target::Place(self.geometry.place(stripe, column));
            Some(Placed { target, offset, block })
        });
        let blocks: Vec<Placed> = blocks.filter(|placed| !self.holds(stripe, placed)).collect();
        self.put_in_place(&blocks);
        let places = blocks.iter().filter_map(|placed| match placed.target {
            Target::Place(place) => Some(place),
            Target::All => None,
        });
        places.collect()
    }

    /// Whether the device has that block already, or is not there to take it.
    fn holds(&self, stripe: u64, placed: &Placed) -> bool {
        let Target::Place(place) = placed.target else { return false };
        let Some(device) = self.members[place].usable(stripe) else { return true };
        let mut met = [0; BLOCK_BYTES];
        device.read_at(placed.offset, &mut met).is_ok() && met == *placed.block
    }
}

/// Whether a device has a label of an array, finished or not.
pub fn is_member(device: &dyn Device) -> bool {
    !matches!(label::read(device), Err(LabelError::None | LabelError::Device(_)))
}
