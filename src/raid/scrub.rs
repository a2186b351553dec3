//! What a scrub asks of an array: whether all copies of a stripe agree.
//!
//! A device does not know which of two copies is right. So a scrub finds the rows that do not fit
//! here, has whoever has the checksums prove the data of these rows, and then has the rest made to
//! fit it. What is held in memory is not in place yet and is not looked at.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::device::DeviceError;
use crate::units::convert::{to_u64, to_usize};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::array::Array;
use super::layout::Spot;
use super::parity;

/// One block of each column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// In which stripe.
    pub stripe: u64,
    /// At which byte of the chunks.
    pub within: u64,
}

/// What was read of a stripe.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StripeCheck {
    /// Blocks read, of all devices.
    pub blocks_read: u64,
    /// Rows whose copies or parity do not fit each other, or that were not read whole.
    pub unfit: Vec<Row>,
}

impl Array {
    /// Stripes of the array.
    pub fn stripes(&self) -> u64 {
        self.geometry.stripes
    }

    /// Bytes of data of a stripe.
    pub fn stripe_bytes(&self) -> u64 {
        self.geometry.stripe_bytes()
    }

    /// Blocks of one stripe on all devices.
    pub fn stripe_blocks_everywhere(&self) -> u64 {
        self.geometry.chunk / BLOCK_BYTES_U64 * to_u64(self.geometry.members)
    }

    /// Blocks of one stripe on one device.
    pub fn stripe_blocks_of_one(&self) -> u64 {
        self.geometry.chunk / BLOCK_BYTES_U64
    }

    /// Whether it has more than one way to a block.
    pub fn is_redundant(&self) -> bool {
        self.geometry.spare() > 0
    }

    /// The blocks of data of a row, by their number on the array.
    pub fn blocks_of(&self, row: Row) -> impl Iterator<Item = u64> + '_ {
        (0..self.geometry.data_columns()).map(move |column| {
            let spot = Spot { stripe: row.stripe, column, within: row.within };
            self.geometry.offset(spot) / BLOCK_BYTES_U64
        })
    }

    /// Reads a stripe from every device that has it and compares.
    pub fn check_stripe(&self, stripe: u64) -> StripeCheck {
        let (n, k, chunk) =
            (self.geometry.members, self.geometry.data_columns(), self.geometry.chunk);
        let mut check = StripeCheck::default();
        let rows = || (0..chunk).step_by(BLOCK_BYTES).map(|within| Row { stripe, within });
        let mut columns: Vec<Option<Vec<u8>>> = vec![None; n];
        let mut failed = false;
        {
            let _unchanged = self.in_place.read().unwrap_or_else(PoisonError::into_inner);
            for (column, bytes) in columns.iter_mut().enumerate() {
                let spot = Spot { stripe, column, within: 0 };
                if self.members[self.geometry.place(stripe, column)].usable(stripe).is_none() {
                    continue;
                }
                let mut met = vec![0; to_usize(chunk)];
                if self.read_column(spot, &mut met) {
                    check.blocks_read += chunk / BLOCK_BYTES_U64;
                    *bytes = Some(met);
                } else {
                    failed = true;
                }
            }
        }
        if failed {
            check.unfit = rows().collect();
            return check;
        }
        let mut made = columns.clone();
        for extra in made.iter_mut().filter(|column| column.is_some()).skip(k) {
            *extra = None;
        }
        if parity::recover(&mut made, k, to_usize(chunk)).is_err() {
            return check;
        }
        let differs = |row: &Row| {
            let at = to_usize(row.within)..to_usize(row.within) + BLOCK_BYTES;
            made.iter().zip(&columns).any(|pair| match pair {
                (Some(made), Some(met)) => made[at.clone()] != met[at.clone()],
                _ => false,
            })
        };
        check.unfit = rows().filter(differs).collect();
        check
    }

    /// The sets of places that it can do without, smaller ones first.
    pub fn losses(&self) -> Vec<Vec<usize>> {
        let (n, spare) = (self.geometry.members, self.geometry.spare());
        let single = (0..n).map(|place| vec![place]);
        let pairs = (0..n).flat_map(|one| (one + 1..n).map(move |other| vec![one, other]));
        single.chain(pairs.filter(|_| spare >= 2)).collect()
    }

    /// A block, without reading the devices at these places.
    pub fn block_without(&self, block: u64, places: &[usize]) -> Option<[u8; BLOCK_BYTES]> {
        let spot = self.geometry.spot(block * BLOCK_BYTES_U64);
        let mut bytes = [0; BLOCK_BYTES];
        if !places.contains(&self.geometry.place(spot.stripe, spot.column)) {
            self.read(block * BLOCK_BYTES_U64, &mut bytes).ok()?;
            return Some(bytes);
        }
        let columns = places.iter().map(|place| self.geometry.column(spot.stripe, *place));
        let _unchanged = self.in_place.read().unwrap_or_else(PoisonError::into_inner);
        let recovered = self.recovered(spot, &columns.collect::<Vec<_>>())?;
        bytes.copy_from_slice(&recovered);
        Some(bytes)
    }

    /// Makes copies and parity of a row fit its data. Only for who knows that all of the data is
    /// right, or that nobody needs it. Says how many blocks were rewritten.
    pub fn fit_proven(&self, row: Row) -> Result<u64, DeviceError> {
        let mut writer = self.lock();
        self.check_whole()?;
        let places = self.fit_row(row.stripe, row.within);
        for place in &places {
            self.members[*place].repaired.fetch_add(1, Ordering::Relaxed);
        }
        self.record(&mut writer)?;
        Ok(to_u64(places.len()))
    }

    /// Gives a stripe the parity that fits its data, as [`Array::fit_proven`] does. Says whether it
    /// did not fit.
    pub fn fit_parity(&self, stripe: u64) -> Result<bool, DeviceError> {
        let mut writer = self.lock();
        self.check_whole()?;
        let changed = self.fit(stripe);
        self.record(&mut writer)?;
        Ok(changed > 0)
    }

    /// Reads that failed and blocks rewritten so far, of each device by place.
    pub fn repairs(&self) -> Vec<(u64, u64)> {
        let each = self.members.iter().map(|member| {
            let errors = member.read_errors.load(Ordering::Relaxed);
            (errors, member.repaired.load(Ordering::Relaxed))
        });
        each.collect()
    }
}
