//! Which byte of an array lies where.
//!
//! Pure. An array is cut into stripes. A stripe has one chunk on each device: `k` of data, then
//! those of parity (of a mirror: the further copies). The devices change places from stripe to
//! stripe, so that no one of them has all the parity: column `c` of stripe `s` lies on the device at
//! place `(s + c) mod n`, at the same offset on each. A row is one block of each column.

use crate::limits::{RAID_CHUNK_BYTES, RAID_JOURNAL_BYTES, RAID_MEMBERS_MAX};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_u64, to_usize};

/// What an array bears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Nothing: stripes over all devices.
    None,
    /// All devices but one may fail: each has everything.
    Mirror,
    /// Any one device may fail.
    Parity1,
    /// Any two devices may fail.
    Parity2,
}

impl Level {
    /// All of them, in the order of their numbers on disk.
    pub const ALL: [Self; 4] = [Self::None, Self::Mirror, Self::Parity1, Self::Parity2];

    /// Its number on disk.
    pub fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Mirror => 1,
            Self::Parity1 => 2,
            Self::Parity2 => 3,
        }
    }

    /// The least number of devices.
    pub const fn members_min(self) -> usize {
        match self {
            Self::None => 1,
            Self::Mirror => 2,
            Self::Parity1 => 3,
            Self::Parity2 => 4,
        }
    }

    /// Devices that may fail of `members`.
    pub const fn spare(self, members: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Mirror => members - 1,
            Self::Parity1 => 1,
            Self::Parity2 => 2,
        }
    }

    /// As the configuration writes it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mirror => "mirror",
            Self::Parity1 => "parity1",
            Self::Parity2 => "parity2",
        }
    }
}

/// Copies of the label in front of everything.
pub const LABEL_BLOCKS: u64 = 2;
/// First byte of the journal on each device.
pub const JOURNAL_START: u64 = LABEL_BLOCKS * BLOCK_BYTES_U64;

/// First byte of the stripes on a device of an array with such chunks.
pub const fn data_start(chunk: u64) -> u64 {
    (JOURNAL_START + RAID_JOURNAL_BYTES).next_multiple_of(chunk)
}

/// How an array is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// What it bears.
    pub level: Level,
    /// Its devices.
    pub members: usize,
    /// Bytes side by side on one device.
    pub chunk: u64,
    /// First byte of the stripes on each device.
    pub data_start: u64,
    /// Stripes.
    pub stripes: u64,
}

/// Where a byte is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    /// In which stripe.
    pub stripe: u64,
    /// In which column of it; below `k`.
    pub column: usize,
    /// At which byte of the chunk.
    pub within: u64,
}

impl Geometry {
    /// An array of `members` devices that have `bytes` each; `None` if they are too few or small.
    pub fn new(level: Level, members: usize, bytes: u64) -> Option<Self> {
        let (chunk, data_start) = (RAID_CHUNK_BYTES, data_start(RAID_CHUNK_BYTES));
        let stripes = bytes.checked_sub(data_start)? / chunk;
        let geometry = Self { level, members, chunk, data_start, stripes };
        geometry.is_sound().then_some(geometry)
    }

    /// Whether it can be: checked of what stands on a disk.
    pub fn is_sound(&self) -> bool {
        let Self { level, members, chunk, data_start: start, stripes } = *self;
        (level.members_min()..=RAID_MEMBERS_MAX).contains(&members)
            && chunk == RAID_CHUNK_BYTES
            && start == data_start(chunk)
            && stripes > 0
            && stripes <= (u64::MAX >> 8) / (chunk * to_u64(members)) - start / chunk
    }

    /// Columns of data in a stripe.
    pub const fn data_columns(&self) -> usize {
        self.members - self.spare()
    }

    /// Devices that may fail: columns beside those of data.
    pub const fn spare(&self) -> usize {
        self.level.spare(self.members)
    }

    /// Bytes of data in a stripe.
    pub fn stripe_bytes(&self) -> u64 {
        self.chunk * to_u64(self.data_columns())
    }

    /// Bytes of the array.
    pub fn size(&self) -> u64 {
        self.stripe_bytes() * self.stripes
    }

    /// Bytes that each device must have.
    pub const fn member_bytes(&self) -> u64 {
        self.data_start + self.stripes * self.chunk
    }

    /// The device that has a column of a stripe.
    pub fn place(&self, stripe: u64, column: usize) -> usize {
        (to_usize(stripe % to_u64(self.members)) + column) % self.members
    }

    /// The column of a stripe that a device has.
    pub fn column(&self, stripe: u64, place: usize) -> usize {
        (place + self.members - to_usize(stripe % to_u64(self.members))) % self.members
    }

    /// Where a byte of the array is.
    pub fn spot(&self, offset: u64) -> Spot {
        let (stripe, rest) = (offset / self.stripe_bytes(), offset % self.stripe_bytes());
        Spot { stripe, column: to_usize(rest / self.chunk), within: rest % self.chunk }
    }

    /// The byte of the array that is there.
    pub fn offset(&self, spot: Spot) -> u64 {
        spot.stripe * self.stripe_bytes() + to_u64(spot.column) * self.chunk + spot.within
    }

    /// Where on a device.
    pub const fn on_member(&self, stripe: u64, within: u64) -> u64 {
        self.data_start + stripe * self.chunk + within
    }

    /// The places that have a journal: one more than may fail.
    pub const fn journal_places(&self) -> usize {
        if self.spare() == 0 { 0 } else { self.spare() + 1 }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A map of the array made by walking, stripe after stripe.
    fn slow(geometry: &Geometry) -> Vec<(usize, u64)> {
        let mut places = Vec::new();
        for stripe in 0..geometry.stripes {
            for column in 0..geometry.members - geometry.level.spare(geometry.members) {
                let mut place = column;
                (0..stripe).for_each(|_| {
                    place = if place + 1 == geometry.members { 0 } else { place + 1 }
                });
                for block in 0..geometry.chunk / BLOCK_BYTES_U64 {
                    let at = geometry.data_start + stripe * geometry.chunk;
                    places.push((place, at + block * BLOCK_BYTES_U64));
                }
            }
        }
        places
    }

    /// Goal: each block of an array has one place and no other has it, and the parities of a
    /// stripe lie on the devices that are left.
    #[test]
    fn every_block_has_one_place() {
        for level in Level::ALL {
            for members in level.members_min()..=6 {
                let bytes = data_start(RAID_CHUNK_BYTES) + 13 * RAID_CHUNK_BYTES + 5;
                let geometry = Geometry::new(level, members, bytes).unwrap();
                let wanted = slow(&geometry);
                assert_eq!(geometry.size(), to_u64(wanted.len()) * BLOCK_BYTES_U64);
                assert!(geometry.member_bytes() <= bytes);
                let mut taken = BTreeSet::new();
                for (n, wanted) in wanted.into_iter().enumerate() {
                    let offset = to_u64(n) * BLOCK_BYTES_U64;
                    let spot = geometry.spot(offset);
                    let place = geometry.place(spot.stripe, spot.column);
                    assert_eq!((place, geometry.on_member(spot.stripe, spot.within)), wanted);
                    assert_eq!(geometry.column(spot.stripe, place), spot.column);
                    assert_eq!(geometry.offset(spot), offset);
                    assert!(taken.insert(wanted));
                }
                for stripe in 0..geometry.stripes {
                    let places = (0..members).map(|column| geometry.place(stripe, column));
                    assert_eq!(places.collect::<BTreeSet<_>>().len(), members);
                }
            }
        }
    }

    #[test]
    fn too_few_or_too_small_devices_make_no_array() {
        for level in Level::ALL {
            assert!(Geometry::new(level, level.members_min() - 1, 1 << 30).is_none());
            assert!(Geometry::new(level, RAID_MEMBERS_MAX + 1, 1 << 30).is_none());
            assert!(Geometry::new(level, 5, data_start(RAID_CHUNK_BYTES) + 100).is_none());
            assert_eq!(Level::ALL[usize::from(level.number())], level);
        }
        assert!(Geometry::new(Level::Parity2, 4, u64::MAX).is_none());
    }
}
