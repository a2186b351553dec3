//! The catalog's region of the device, as the file that the catalog's database believes in.
//!
//! `redb` wants a file that grows and shrinks. The region is a fixed part of the device: two
//! header blocks, written in turn, that say how long the file is, then its bytes. Growth past
//! the region's end is refused and leaves everything as it was.
//!
//! | at | bytes | field of a header block |
//! | --- | --- | --- |
//! | 0 | 8 | magic `MIRRCATL` |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | CRC-32C of the 32 bytes with this field zero |
//! | 16 | 8 | counter: the higher one of the two valid headers holds |
//! | 24 | 8 | length of the file in bytes |
//!
//! Every error goes to `redb`, which refuses all work from then on; the pool latches.
//!
//! What the page cache shows after such an error may never reach the medium: Linux takes the pages
//! for clean. So [`CatalogRegion::open`] writes again all that it is going to believe, the same
//! bytes, and syncs it before `redb` reads the first of them. A sector where cache and medium
//! differ was written since the last sync that succeeded, so a cut in the middle of this leaves
//! what a cut in that commit would have left.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::StorageBackend;

use crate::device::Device;
use crate::device::buffer::AlignedBuffer;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::crc32c;

use super::error::PoolError;
use super::label::Layout;

const MAGIC: [u8; 8] = *b"MIRRCATL";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const HEADER_BLOCKS: u64 = 2;
/// Zeroes are written in pieces of this.
const ZEROES_BYTES: u64 = 256 * 1024;
/// The file is written again in pieces of this.
const RENEW_BYTES: u64 = 1024 * 1024;

const _: () = assert!(HEADER_BYTES == 8 + 4 + 4 + 8 + 8);

/// The length of the file, and how often it was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    counter: u64,
    length: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.counter.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.length.to_le_bytes());
        let crc = crc32c(&bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let number = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let header = Self { counter: number(16), length: number(24) };
        (header.encode() == *bytes).then_some(header)
    }
}

/// The version, if this is a header of another one. Of every version the first 16 bytes and what the
/// checksum covers are as they are here.
fn other_version(bytes: &[u8; HEADER_BYTES]) -> Option<u32> {
    let half =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let mut bare = *bytes;
    bare[12..16].fill(0);
    let sealed = bytes[0..8] == MAGIC && crc32c(&bare) == half(12);
    (sealed && half(8) != VERSION).then(|| half(8))
}

/// The region as `redb` sees it.
#[derive(Debug)]
pub(super) struct CatalogRegion {
    device: Arc<dyn Device>,
    start: u64,
    length_max: u64,
    header: Mutex<Header>,
}

impl CatalogRegion {
    /// An empty file in a new pool.
    pub(super) fn create(device: Arc<dyn Device>, layout: &Layout) -> Result<Self, PoolError> {
        let header = Header { counter: 0, length: 0 };
        let region = Self::new(device, layout, header);
        // The second header must not be that of a pool that was here before.
        region.device.write_durable_at(region.start + BLOCK_BYTES_U64, &[0; HEADER_BYTES])?;
        region.device.write_durable_at(region.start, &header.encode())?;
        Ok(region)
    }

    /// The file of an existing pool; all of it is durable when this returns.
    pub(super) fn open(device: Arc<dyn Device>, layout: &Layout) -> Result<Self, PoolError> {
        let region = Self::open_as_seen(device, layout)?;
        region.renew()?;
        Ok(region)
    }

    /// Writes headers and file again as they are seen, and syncs them.
    fn renew(&self) -> Result<(), PoolError> {
        let length = self.header.lock().map_err(|_| PoolError::Poisoned)?.length;
        let end = self.start + HEADER_BLOCKS * BLOCK_BYTES_U64 + length;
        let mut bytes = AlignedBuffer::new(to_usize(RENEW_BYTES));
        let mut at = self.start;
        while at < end {
            let piece = to_usize((end - at).min(RENEW_BYTES));
            self.device.read_at(at, &mut bytes[..piece])?;
            self.device.write_at(at, &bytes[..piece])?;
            at += to_u64(piece);
        }
        Ok(self.device.flush()?)
    }

    /// The file as the page cache shows it, durable or not.
    fn open_as_seen(device: Arc<dyn Device>, layout: &Layout) -> Result<Self, PoolError> {
        let start = layout.catalog_start * BLOCK_BYTES_U64;
        let mut newest: Option<Header> = None;
        for copy in 0..HEADER_BLOCKS {
            let mut bytes = [0; HEADER_BYTES];
            device.read_at(start + copy * BLOCK_BYTES_U64, &mut bytes)?;
            // Beside a good one too: which is then what it was before another program came.
            if let Some(met) = other_version(&bytes) {
                let what = "the header of its region".into();
                return Err(PoolError::CatalogVersion { what, met, known: VERSION });
            }
            if let Some(header) = Header::decode(&bytes)
                && newest.is_none_or(|newest| newest.counter < header.counter)
            {
                newest = Some(header);
            }
        }
        let corrupt = |what: String| PoolError::CatalogCorrupt {
            table: "region",
            key: "header".into(),
            what,
        };
        let header = newest.ok_or_else(|| corrupt("neither header is valid".into()))?;
        let region = Self::new(device, layout, header);
        if header.length > region.length_max {
            return Err(corrupt(format!("{} bytes of {}", header.length, region.length_max)));
        }
        Ok(region)
    }

    fn new(device: Arc<dyn Device>, layout: &Layout, header: Header) -> Self {
        let start = layout.catalog_start * BLOCK_BYTES_U64;
        let length_max = layout.catalog_bytes() - HEADER_BLOCKS * BLOCK_BYTES_U64;
        Self { device, start, length_max, header: Mutex::new(header) }
    }

    fn header(&self) -> io::Result<MutexGuard<'_, Header>> {
        self.header.lock().map_err(|_| io::Error::other("catalog region: a thread panicked in it"))
    }

    fn place(&self, offset: u64, length: usize) -> io::Result<u64> {
        let end = offset.checked_add(to_u64(length));
        let file = self.header()?.length;
        if end.is_none_or(|end| end > file) {
            let what = format!("{length} bytes at {offset} of a catalog of {file} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(self.start + HEADER_BLOCKS * BLOCK_BYTES_U64 + offset)
    }

    fn zero(&self, from: u64, to: u64) -> io::Result<()> {
        let zeroes = vec![0; to_usize(ZEROES_BYTES.min(to - from))];
        let mut at = from;
        while at < to {
            let length = (to - at).min(ZEROES_BYTES);
            let place = self.start + HEADER_BLOCKS * BLOCK_BYTES_U64 + at;
            self.device.write_at(place, &zeroes[..to_usize(length)]).map_err(io::Error::other)?;
            at += length;
        }
        self.device.flush().map_err(io::Error::other)
    }
}

impl StorageBackend for CatalogRegion {
    fn len(&self) -> io::Result<u64> {
        Ok(self.header()?.length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let place = self.place(offset, out.len())?;
        self.device.read_at(place, out).map_err(io::Error::other)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let old = *self.header()?;
        if length > self.length_max {
            let what = format!("catalog region is full: {length} of {} bytes", self.length_max);
            return Err(io::Error::new(io::ErrorKind::StorageFull, what));
        }
        if length == old.length {
            return Ok(());
        }
        if length > old.length {
            self.zero(old.length, length)?;
        }
        let new = Header { counter: old.counter + 1, length };
        let place = self.start + (new.counter % HEADER_BLOCKS) * BLOCK_BYTES_U64;
        self.device.write_durable_at(place, &new.encode()).map_err(io::Error::other)?;
        *self.header()? = new;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.device.flush().map_err(io::Error::other)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let place = self.place(offset, data.len())?;
        self.device.write_at(place, data).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::{Effect, On, SimDevice};
    use crate::pool::label::POOL_BYTES_MIN;
    use crate::pool::testing::{copied, new_device};

    fn device() -> (Arc<SimDevice>, Layout) {
        let device = new_device(POOL_BYTES_MIN);
        let layout = Layout::for_device(&*device).unwrap();
        (device, layout)
    }

    #[test]
    fn golden_bytes() {
        let header = Header { counter: 3, length: 0x1000 };
        let mut expected = b"MIRRCATL".to_vec();
        expected.extend([1, 0, 0, 0]);
        expected.extend(GOLDEN_CRC.to_le_bytes());
        expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
        assert_eq!(header.encode().to_vec(), expected);
    }
    const GOLDEN_CRC: u32 = 0x9b57_3176;

    /// Goal: a header of a later program is refused, alone and beside a good one, and nothing is written.
    /// Control: the same byte without its checksum is rot, and the other header holds.
    #[test]
    fn a_header_of_another_version_is_no_damage() {
        for (slot, sealed) in [(0, true), (1, true), (0, false), (1, false)] {
            let (device, layout) = device();
            let region = CatalogRegion::create(device.clone(), &layout).unwrap();
            region.set_len(8192).unwrap();
            region.set_len(4096).unwrap();
            let at = (layout.catalog_start + slot) * BLOCK_BYTES_U64;
            let mut bytes = [0; HEADER_BYTES];
            device.read_at(at, &mut bytes).unwrap();
            bytes[8] = 2;
            if sealed {
                bytes[12..16].fill(0);
                let crc = crc32c(&bytes);
                bytes[12..16].copy_from_slice(&crc.to_le_bytes());
            }
            device.write_durable_at(at, &bytes).unwrap();
            let before = device.image();
            let met = CatalogRegion::open(device.clone(), &layout).map(|_| ());
            match met {
                Err(PoolError::CatalogVersion { met: 2, known: 1, .. }) if sealed => {
                    assert!(device.image() == before, "slot {slot}: was written");
                }
                Ok(()) if !sealed => {}
                other => panic!("slot {slot}, sealed {sealed}: {other:?}"),
            }
        }
    }

    /// The length outlives a torn header: it is the old or the new one.
    #[test]
    fn a_torn_resize_leaves_the_old_length() {
        let (device, layout) = device();
        let region = CatalogRegion::create(device.clone(), &layout).unwrap();
        let lengths = [8192, 4096, 1 << 20, 12288];
        let mut old = 0;
        for new in lengths {
            region.set_len(new).unwrap();
            let met = CatalogRegion::open(copied(&device), &layout).unwrap();
            assert_eq!(met.len().unwrap(), new);
            // The header written last is torn: the one before it holds.
            let torn = copied(&device);
            let slot = region.header().unwrap().counter % 2;
            torn.rot((layout.catalog_start + slot) * BLOCK_BYTES_U64 + 24, &[1]);
            let met = CatalogRegion::open(torn, &layout).unwrap();
            assert_eq!(met.len().unwrap(), old);
            old = new;
        }
    }

    /// Goal: what an open believes outlives a power cut. Method: a sync or a resize fails and is
    /// forgotten by the kernel; the region is opened, then the power goes. Control: a region that
    /// is only looked at shows the same bytes and loses them.
    #[test]
    fn what_is_believed_is_durable() {
        for renewed in [true, false] {
            let (device, layout) = device();
            let region = CatalogRegion::create(device.clone(), &layout).unwrap();
            region.set_len(3 << 20).unwrap();
            region.write(4096, &[6; 4096]).unwrap();
            region.sync_data().unwrap();
            region.write(4096, &[7; 4096]).unwrap();
            region.write((3 << 20) - 512, &[7; 512]).unwrap();
            device.fail(On::Flush, 0, Effect::Errno(5));
            region.sync_data().unwrap_err();
            device.fail(On::WriteDurable, 0, Effect::Errno(5));
            region.set_len((3 << 20) + 4096).unwrap_err();
            let see = |region: &CatalogRegion| {
                let (mut near, mut far) = ([0; 1], [0; 1]);
                region.read(4096, &mut near).unwrap();
                region.read((3 << 20) - 1, &mut far).unwrap();
                (region.len().unwrap(), near[0], far[0])
            };
            let open = if renewed { CatalogRegion::open } else { CatalogRegion::open_as_seen };
            let believed = see(&open(device.clone(), &layout).unwrap());
            assert_eq!(believed, ((3 << 20) + 4096, 7, 7));
            device.power_cut_choosing(&mut |_, _| 0);
            device.power_on();
            let left = see(&CatalogRegion::open_as_seen(device, &layout).unwrap());
            assert_eq!(left == believed, renewed, "{left:?}");
        }
    }

    /// A region that cannot be made durable is not believed.
    #[test]
    fn an_open_whose_sync_fails_is_refused() {
        let (device, layout) = device();
        CatalogRegion::create(device.clone(), &layout).unwrap().set_len(8192).unwrap();
        for on in [On::Write, On::Flush] {
            device.fail(on, 0, Effect::Errno(5));
            let met = CatalogRegion::open(device.clone(), &layout).unwrap_err();
            assert!(matches!(met, PoolError::Device(_)), "{met}");
        }
        CatalogRegion::open(device, &layout).unwrap();
    }

    #[test]
    fn growth_past_the_region_is_refused_and_new_bytes_are_zero() {
        let (device, layout) = device();
        let region = CatalogRegion::create(device.clone(), &layout).unwrap();
        region.set_len(8192).unwrap();
        region.write(4096, &[7; 4096]).unwrap();
        assert!(region.write(8000, &[7; 200]).is_err());
        region.set_len(4096).unwrap();
        region.set_len(8192).unwrap();
        let mut bytes = [1; 4096];
        region.read(4096, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4096]);
        let met = region.set_len(layout.catalog_bytes()).unwrap_err();
        assert_eq!(met.kind(), io::ErrorKind::StorageFull);
        assert_eq!(region.len().unwrap(), 8192);
        for block in [layout.catalog_start, layout.catalog_start + 1] {
            device.rot(block * BLOCK_BYTES_U64 + 24, &[1]);
        }
        assert!(CatalogRegion::open(device, &layout).is_err());
    }
}
