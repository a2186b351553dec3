//! The label: what says that a device is a pool, whose, and how it is divided.
//!
//! Two copies of 4096 bytes stand at the front of the device. They are written when all else of
//! a new pool is durable, and change only when it grows: a pool exists when its label does. One good copy is
//! enough, and the other is written again from it. Each open writes both again as they are: if
//! the sync failed that made them, they may stand in the page cache only.
//!
//! Before anything else of a new pool, a block of `MIRRDRFT` and zeros stands in the place of the
//! first copy: such a device holds nothing of value, and a creation that was cut short is begun
//! anew. Else a pool is made only on a device that begins with 1 MiB of zeros.
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | magic `MIRRPOOL` |
//! | 8 | 4 | format version: 1, or 2 if arrays were added behind a plain device |
//! | 12 | 4 | CRC-32C of all 4096 bytes with this field zero |
//! | 16 | 16 | pool id |
//! | 32 | 16 | owner: id of the source or hub |
//! | 48 | 4 | block size, 4096 |
//! | 52 | 4 | children of a node, 128 |
//! | 56 | 8 | blocks of the device in use by the pool |
//! | 64 | 8 | first block of the catalog |
//! | 72 | 8 | blocks of the catalog |
//! | 80 | 8 | first block of data; data ends where the pool ends |
//! | 88 | 7 x 16 | version 2: ids of the arrays that were added behind this device, in order; unused ones zero |
//! | 200 | 3896 | reserved, zero; of version 1 from 88 on |
//!
//! Anything else than that is refused by name: no pool, another version, damaged.

use std::sync::Arc;

use crate::device::{Device, is_blank};
use crate::limits::{
    MIB, NODE_CHILDREN, POOL_CATALOG_BYTES_MIN, POOL_CATALOG_SHARE, POOL_CATALOG_SHARE_BYTES_MAX,
    POOL_CATALOG_SPARE, POOL_DEVICE_BYTES_MAX, POOL_DEVICE_BYTES_MIN, RAID_ADDED_MAX,
};
use crate::units::hash::crc32c;
use crate::units::ids::{ArrayId, PoolId};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::error::PoolError;

/// First bytes of a label.
pub const LABEL_MAGIC: [u8; 8] = *b"MIRRPOOL";
/// First bytes of a device on which a pool is being made.
pub const DRAFT_MAGIC: [u8; 8] = *b"MIRRDRFT";
/// The format of a pool on a device, or on arrays that name each other.
pub const LABEL_VERSION: u32 = 1;
/// The format of a pool on a plain device with arrays behind it; the newest that this program knows.
pub const LABEL_VERSION_ADDED: u32 = 2;
/// Copies of the label, in the first blocks of the device.
pub const LABEL_COPIES: u64 = 2;

/// Bytes of the smallest pool. Unit tests shrink it, so that pools get full and wrap around.
pub const POOL_BYTES_MIN: u64 = if cfg!(test) { 16 * MIB } else { POOL_DEVICE_BYTES_MIN };

const FIELDS_BYTES: usize = 88;
const ADDED_BYTES: usize = RAID_ADDED_MAX * 16;
const NO_ARRAY: ArrayId = ArrayId([0; 16]);
const CRC_AT: usize = 12;
const BLOCK_BYTES_FIELD: u32 = 4096;
const NODE_CHILDREN_FIELD: u32 = 128;

const _: () = {
    assert!(FIELDS_BYTES == 8 + 4 + 4 + 16 + 16 + 4 + 4 + 8 + 8 + 8 + 8);
    assert!(BLOCK_BYTES == 4096 && NODE_CHILDREN == 128);
    assert!(FIELDS_BYTES + ADDED_BYTES == 200);
    assert!(POOL_CATALOG_BYTES_MIN * 2 <= POOL_BYTES_MIN, "half of a pool is data at least");
};

/// How a device is divided, in blocks from its front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Blocks of the whole pool.
    pub total: u64,
    /// First block of the catalog.
    pub catalog_start: u64,
    /// Blocks of the catalog.
    pub catalog_blocks: u64,
    /// First block of data.
    pub data_start: u64,
}

impl Layout {
    /// Divides a device of `size` bytes: labels, a catalog with room for the free map, rows and
    /// history (see `limits`), data.
    pub fn for_device(device: &dyn Device) -> Result<Self, PoolError> {
        let size = device.size().0;
        if size < POOL_BYTES_MIN {
            let wanted = POOL_BYTES_MIN;
            return Err(PoolError::TooSmall { device: device.name(), wanted, met: size });
        }
        let total = size.min(POOL_DEVICE_BYTES_MAX) / BLOCK_BYTES_U64;
        let free_map = total / 8;
        let share = (size / POOL_CATALOG_SHARE).min(POOL_CATALOG_SHARE_BYTES_MAX);
        let catalog = POOL_CATALOG_BYTES_MIN + free_map * POOL_CATALOG_SPARE + share;
        let catalog_blocks = catalog.div_ceil(BLOCK_BYTES_U64);
        let catalog_start = LABEL_COPIES;
        let data_start = catalog_start + catalog_blocks;
        Ok(Self { total, catalog_start, catalog_blocks, data_start })
    }

    /// Blocks of data.
    pub const fn data_blocks(&self) -> u64 {
        self.total - self.data_start
    }

    /// Bytes of the catalog region.
    pub const fn catalog_bytes(&self) -> u64 {
        self.catalog_blocks * BLOCK_BYTES_U64
    }

    fn is_sound(&self) -> bool {
        self.total <= POOL_DEVICE_BYTES_MAX / BLOCK_BYTES_U64
            && self.catalog_start == LABEL_COPIES
            && self.catalog_start.checked_add(self.catalog_blocks) == Some(self.data_start)
            && self.data_start < self.total
    }
}

/// What a label says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// Names the pool for ever.
    pub pool: PoolId,
    /// Id of the source or hub it belongs to.
    pub owner: [u8; 16],
    /// How the device is divided.
    pub layout: Layout,
    /// The arrays that were added behind a plain device, in order; unused ones are zero. An array that
    /// is a pool names those behind it in its own labels.
    pub added: [ArrayId; RAID_ADDED_MAX],
}

/// No arrays behind a pool.
pub const NONE_ADDED: [ArrayId; RAID_ADDED_MAX] = [NO_ARRAY; RAID_ADDED_MAX];

/// The arrays behind a device that is a pool, as its label names them; none if it is no pool.
pub fn behind(device: &dyn Device) -> Option<Vec<ArrayId>> {
    let name = device.name();
    let good = |copy| Label::decode(&name, &read_copy(device, copy).ok()?).ok();
    let labels: Vec<Label> = (0..LABEL_COPIES).filter_map(good).collect();
    let fewest = labels.into_iter().map(|label| label.behind().collect::<Vec<_>>());
    // Of a cut while one was added the copies say two things: see `grow`.
    fewest.min_by_key(Vec::len).or_else(|| is_pool(device).then(Vec::new))
}

impl Label {
    /// The arrays that were added behind a plain device.
    pub fn behind(&self) -> impl Iterator<Item = ArrayId> + '_ {
        self.added.iter().copied().take_while(|id| *id != NO_ARRAY)
    }

    /// The same with one more; none if there is no place for it.
    pub fn with_behind(mut self, id: ArrayId) -> Option<Self> {
        if !self.added.contains(&id) {
            *self.added.iter_mut().find(|place| **place == NO_ARRAY)? = id;
        }
        Some(self)
    }

    /// The 4096 bytes.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        let version = if self.added == NONE_ADDED { LABEL_VERSION } else { LABEL_VERSION_ADDED };
        bytes[0..8].copy_from_slice(&LABEL_MAGIC);
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.pool.0);
        bytes[32..48].copy_from_slice(&self.owner);
        bytes[48..52].copy_from_slice(&BLOCK_BYTES_FIELD.to_le_bytes());
        bytes[52..56].copy_from_slice(&NODE_CHILDREN_FIELD.to_le_bytes());
        let Layout { total, catalog_start, catalog_blocks, data_start } = self.layout;
        for (at, value) in
            [(56, total), (64, catalog_start), (72, catalog_blocks), (80, data_start)]
        {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let places = bytes[FIELDS_BYTES..][..ADDED_BYTES].as_chunks_mut::<16>().0;
        for (bytes, id) in places.iter_mut().zip(&self.added) {
            *bytes = id.0;
        }
        let crc = crc32c(&bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// What two labels have in common that differ in the number of blocks, or in how many arrays are
    /// behind the device, at most.
    fn but_for_growth(&self, other: &Self) -> Option<Self> {
        let total = self.layout.total.min(other.layout.total);
        let least = |label: &Self, added| Self {
            layout: Layout { total, ..label.layout },
            added,
            ..*label
        };
        let fewer = if self.behind().count() <= other.behind().count() { self } else { other };
        let is_front =
            |label: &Self| fewer.behind().eq(label.behind().take(fewer.behind().count()));
        let common = least(self, fewer.added);
        (is_front(self) && is_front(other) && common == least(other, fewer.added)).then_some(common)
    }

    /// Reads and checks one copy.
    pub fn decode(device: &Arc<str>, bytes: &[u8; BLOCK_BYTES]) -> Result<Self, PoolError> {
        let number = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let half = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let device = Arc::clone(device);
        if bytes[0..8] != LABEL_MAGIC {
            let met = number(0).to_le_bytes();
            return Err(PoolError::NotAPool { device, wanted: LABEL_MAGIC, met });
        }
        let fields = match half(8) {
            LABEL_VERSION => FIELDS_BYTES,
            LABEL_VERSION_ADDED => FIELDS_BYTES + ADDED_BYTES,
            met => {
                let known = LABEL_VERSION_ADDED;
                return Err(PoolError::LabelVersion { device, met, known });
            }
        };
        let corrupt = |what: String| PoolError::LabelCorrupt { device, what };
        let mut bare = *bytes;
        bare[CRC_AT..CRC_AT + 4].fill(0);
        let (wanted, met) = (half(CRC_AT), crc32c(&bare));
        if wanted != met {
            return Err(corrupt(format!("wanted checksum {wanted:08x}, met {met:08x}")));
        }
        if bytes[fields..].iter().any(|&byte| byte != 0) {
            return Err(corrupt("reserved bytes are not zero".into()));
        }
        if (half(48), half(52)) != (BLOCK_BYTES_FIELD, NODE_CHILDREN_FIELD) {
            return Err(corrupt(format!("blocks of {} bytes, nodes of {}", half(48), half(52))));
        }
        let [total, catalog_start, catalog_blocks, data_start] = [56, 64, 72, 80].map(number);
        let layout = Layout { total, catalog_start, catalog_blocks, data_start };
        if !layout.is_sound() {
            return Err(corrupt(format!("impossible layout {layout:?}")));
        }
        let mut added = NONE_ADDED;
        let places = bytes[FIELDS_BYTES..][..ADDED_BYTES].as_chunks::<16>().0;
        for (id, bytes) in added.iter_mut().zip(places) {
            *id = ArrayId(*bytes);
        }
        let again = |at: usize| added[at] != NO_ARRAY && added[..at].contains(&added[at]);
        let mut label = Self { pool: PoolId::ZERO, owner: [0; 16], layout, added };
        let named = added.iter().filter(|id| **id != NO_ARRAY).count();
        if label.behind().count() != named || (0..RAID_ADDED_MAX).any(again) {
            return Err(corrupt("an array was added twice, or there is a gap".into()));
        }
        label.pool.0.copy_from_slice(&bytes[16..32]);
        label.owner.copy_from_slice(&bytes[32..48]);
        Ok(label)
    }
}

fn read_copy(device: &dyn Device, copy: u64) -> Result<[u8; BLOCK_BYTES], PoolError> {
    let mut bytes = [0; BLOCK_BYTES];
    device.read_at(copy * BLOCK_BYTES_U64, &mut bytes)?;
    Ok(bytes)
}

fn draft() -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    bytes[..DRAFT_MAGIC.len()].copy_from_slice(&DRAFT_MAGIC);
    bytes
}

/// Notes, durably, that a pool is being made here.
pub fn write_draft(device: &dyn Device) -> Result<(), PoolError> {
    Ok(device.write_durable_at(0, &draft())?)
}

/// Refuses a device that carries a label, be it damaged or of another version, or anything else
/// but a pool that was not finished.
pub fn refuse_existing(device: &dyn Device) -> Result<(), PoolError> {
    for copy in 0..LABEL_COPIES {
        if read_copy(device, copy)?[0..8] == LABEL_MAGIC {
            return Err(PoolError::AlreadyAPool { device: device.name() });
        }
    }
    if read_copy(device, 0)? == draft() || is_blank(device)? {
        return Ok(());
    }
    Err(PoolError::NotBlank { device: device.name() })
}

/// Whether a device carries a label, be it damaged or of another version.
pub fn is_pool(device: &dyn Device) -> bool {
    let labelled = |copy| read_copy(device, copy).is_ok_and(|bytes| bytes[0..8] == LABEL_MAGIC);
    (0..LABEL_COPIES).any(labelled)
}

/// Writes all copies, durably.
pub fn write_all(device: &dyn Device, label: &Label) -> Result<(), PoolError> {
    (0..LABEL_COPIES).try_for_each(|copy| write_copy(device, label, copy))
}

fn write_copy(device: &dyn Device, label: &Label, copy: u64) -> Result<(), PoolError> {
    Ok(device.write_durable_at(copy * BLOCK_BYTES_U64, &label.encode())?)
}

/// A copy of the label as the device gives it, or, if that is damaged, as another way to it does.
/// Says whether the first way was good.
fn read_any(device: &dyn Device, copy: u64) -> (Result<Label, PoolError>, bool) {
    let name = device.name();
    let first = read_copy(device, copy).and_then(|bytes| Label::decode(&name, &bytes));
    // What is right and of another version is nothing to be looked for elsewhere.
    if matches!(first, Ok(_) | Err(PoolError::LabelVersion { .. })) {
        return (first, true);
    }
    for nth in 0..device.alternatives() {
        let mut bytes = [0; BLOCK_BYTES];
        let read = device.read_alternative(nth, copy * BLOCK_BYTES_U64, &mut bytes);
        if read.is_ok()
            && let Ok(label) = Label::decode(&name, &bytes)
        {
            return (Ok(label), false);
        }
    }
    (first, true)
}

/// Puts a good copy where a damaged one is. Of an array only the place that lies: its parity fits what
/// belongs there, and a write would carry the difference from what was read into it.
fn mend_copy(device: &dyn Device, label: &Label, copy: u64) -> Result<(), PoolError> {
    let mended = match read_copy(device, copy) {
        Ok(seen) => device.repair_at(copy * BLOCK_BYTES_U64, &seen, &label.encode())?,
        Err(_) => false,
    };
    if mended { Ok(()) } else { write_copy(device, label, copy) }
}

/// Reads the label. A damaged copy is written again from what is good; which copy that was is
/// returned for the log. If no copy is good, the more telling error wins.
pub fn read(device: &dyn Device) -> Result<(Label, Option<u64>), PoolError> {
    let name = device.name();
    let ((first, first_read), (second, second_read)) = (read_any(device, 0), read_any(device, 1));
    let (label, repaired) = match (first, second) {
        (Ok(first), Ok(second)) if first == second => {
            let damaged = [(first_read, 0), (second_read, 1)].into_iter().filter(|(read, _)| !read);
            let damaged: Vec<u64> = damaged.map(|(_, copy)| copy).collect();
            for copy in &damaged {
                mend_copy(device, &first, *copy)?;
            }
            (first, damaged.first().copied())
        }
        // A cut while it grew: see `grow`. Nothing lies behind the smaller end.
        (Ok(first), Ok(second)) => match first.but_for_growth(&second) {
            Some(label) => (label, None),
            None => {
                let what = "its copies contradict each other".into();
                return Err(PoolError::LabelCorrupt { device: name, what });
            }
        },
        // A copy of another version beside a good one is no damage: someone wrote it.
        (Ok(_), Err(error @ PoolError::LabelVersion { .. }))
        | (Err(error @ PoolError::LabelVersion { .. }), Ok(_)) => return Err(error),
        (Ok(first), Err(_)) => (first, Some(1)),
        (Err(_), Ok(second)) => (second, Some(0)),
        (Err(PoolError::NotAPool { .. }), Err(second)) => return Err(second),
        (Err(first), Err(_)) => return Err(first),
    };
    let (wanted, met) = (label.layout.total * BLOCK_BYTES_U64, device.size().0);
    if met < wanted && label.added != NONE_ADDED {
        return Err(PoolError::AddedMissing { device: name, wanted, met });
    }
    if met < wanted {
        return Err(PoolError::Shrunk { device: name, wanted, met });
    }
    if let Some(copy) = repaired {
        mend_copy(device, &label, copy)?;
    }
    Ok((label, repaired))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::testing::new_device;

    fn label() -> Label {
        let layout = Layout { total: 0x1000, catalog_start: 2, catalog_blocks: 8, data_start: 10 };
        Label { pool: PoolId([1; 16]), owner: [2; 16], layout, added: NONE_ADDED }
    }

    fn sealed(mut bytes: [u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
        bytes[CRC_AT..CRC_AT + 4].fill(0);
        let crc = crc32c(&bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn golden_bytes() {
        let bytes = label().encode();
        let mut expected = b"MIRRPOOL".to_vec();
        expected.extend([1, 0, 0, 0]);
        expected.extend(GOLDEN_CRC.to_le_bytes());
        expected.extend([1; 16]);
        expected.extend([2; 16]);
        expected.extend([0, 16, 0, 0, 128, 0, 0, 0]);
        expected.extend([0, 0x10, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([8, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[..FIELDS_BYTES], expected);
        assert!(bytes[FIELDS_BYTES..].iter().all(|&byte| byte == 0));
        assert_eq!(Label::decode(&"d".into(), &bytes).unwrap(), label());
    }
    const GOLDEN_CRC: u32 = 0xf755_5c89;

    /// Goal: what is behind a plain device is in its label, and a version of before refuses that by name.
    #[test]
    fn arrays_behind_a_plain_device_are_in_its_label() {
        let (one, two) = (ArrayId([7; 16]), ArrayId([8; 16]));
        let added = label().with_behind(one).unwrap().with_behind(two).unwrap();
        assert_eq!(added.with_behind(one), Some(added));
        let bytes = added.encode();
        assert_eq!(
            (&bytes[8..12], &bytes[88..104], &bytes[104..120]),
            (&[2, 0, 0, 0][..], &[7; 16][..], &[8; 16][..])
        );
        assert_eq!(Label::decode(&"d".into(), &bytes).unwrap(), added);
        let refused = |bytes| Label::decode(&"d".into(), &sealed(bytes)).unwrap_err().to_string();
        let mut version_1 = bytes;
        version_1[8] = 1;
        assert!(refused(version_1).contains("reserved"));
        let mut gap = bytes;
        gap[88..104].fill(0);
        assert!(refused(gap).contains("gap"));
        let mut twice = bytes;
        twice[88..104].fill(8);
        assert!(refused(twice).contains("twice"));
        // A cut between its copies: what both say.
        let layout = Layout { total: 0x2000, ..added.layout };
        let grown = Label { layout, ..added };
        for (first, second) in [(grown, label()), (label(), grown), (grown, added), (added, grown)]
        {
            let wanted = if [first, second].contains(&added) { added } else { label() };
            assert_eq!(first.but_for_growth(&second), Some(wanted));
        }
        let other = label().with_behind(two).unwrap();
        assert_eq!((added.but_for_growth(&other), other.but_for_growth(&added)), (None, None));
        let full = (0..9).try_fold(label(), |label, n| label.with_behind(ArrayId([n + 1; 16])));
        assert_eq!(full, None, "there are seven places");
    }

    #[test]
    fn each_wrong_field_is_refused_by_name() {
        let device: Arc<str> = "disk0".into();
        let good = label().encode();
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            bytes
        };
        let refused = |bytes| Label::decode(&device, &bytes).unwrap_err();
        assert!(matches!(refused(with(0, b'X')), PoolError::NotAPool { .. }));
        let met = refused(with(8, 9));
        assert!(matches!(met, PoolError::LabelVersion { met: 9, known: 2, .. }), "{met}");
        assert!(refused(with(40, 9)).to_string().contains("wanted checksum"));
        assert!(refused(sealed(with(4095, 1))).to_string().contains("reserved"));
        assert!(refused(sealed(with(49, 32))).to_string().contains("blocks of 8192"));
        assert!(refused(sealed(with(80, 11))).to_string().contains("impossible layout"));
    }

    #[test]
    fn a_damaged_copy_is_written_again_from_the_good_one() {
        for copy in 0..LABEL_COPIES {
            let device = new_device(POOL_BYTES_MIN);
            let label = Label { layout: Layout::for_device(&*device).unwrap(), ..label() };
            write_all(&*device, &label).unwrap();
            device.rot(copy * BLOCK_BYTES_U64 + 20, &[1]);
            assert_eq!(read(&*device).unwrap(), (label, Some(copy)));
            assert_eq!(read(&*device).unwrap(), (label, None));
        }
    }

    #[test]
    fn two_damaged_copies_and_two_good_ones_that_differ_are_refused() {
        let device = new_device(POOL_BYTES_MIN);
        assert!(matches!(read(&*device), Err(PoolError::NotAPool { .. })));
        let layout = Layout::for_device(&*device).unwrap();
        let label = Label { layout, ..label() };
        write_all(&*device, &label).unwrap();
        write_copy(&*device, &Label { owner: [9; 16], ..label }, 1).unwrap();
        assert!(read(&*device).unwrap_err().to_string().contains("contradict"));
        device.rot(20, &[1]);
        device.rot(BLOCK_BYTES_U64 + 20, &[1]);
        assert!(matches!(read(&*device), Err(PoolError::LabelCorrupt { .. })));
        assert!(matches!(refuse_existing(&*device), Err(PoolError::AlreadyAPool { .. })));
    }

    #[test]
    fn a_device_smaller_than_its_pool_is_refused() {
        let device = new_device(POOL_BYTES_MIN);
        let mut layout = Layout::for_device(&*device).unwrap();
        layout.total += 1;
        write_all(&*device, &Label { layout, ..label() }).unwrap();
        assert!(matches!(read(&*device), Err(PoolError::Shrunk { .. })));
        let small = new_device(POOL_BYTES_MIN - 512);
        assert!(matches!(Layout::for_device(&*small), Err(PoolError::TooSmall { .. })));
    }
}
