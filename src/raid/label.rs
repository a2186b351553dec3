//! The label of a device of an array: which array, which place, and who else belongs to it.
//!
//! Two copies of 4096 bytes at the front of the device, written in turn by the parity of their
//! commit number, so that a cut in the middle of one leaves the one before. The commit number rises
//! with each change of who is in, and twice with each open. The highest one of an array holds for all
//! of its devices: a device that it does not call `in` is stale, whatever its own label says (R9), and
//! one that is two behind was rolled back.
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | magic `MIRRRAID` |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | CRC-32C of all 4096 bytes with this field zero |
//! | 16 | 16 | array id |
//! | 32 | 16 | id of this device |
//! | 48 | 8 | commit number; 0 while the array is being made |
//! | 56 | 1 | level: 0 none, 1 mirror, 2 parity1, 3 parity2 |
//! | 57 | 1 | devices of the array |
//! | 58 | 1 | place of this device |
//! | 59 | 1 | arrays that were added behind this one |
//! | 60 | 4 | reserved, zero |
//! | 64 | 8 | bytes of a chunk |
//! | 72 | 8 | first byte of the stripes |
//! | 80 | 8 | stripes |
//! | 88 | 8 | reserved, zero |
//! | 96 | 16 x 32 | by place: id (16), state (1: 1 in, 2 failed, 3 rebuilding), flags (1: 1 stripes that held nothing were left out when it was filled), stripe with which that began (6), stripes rebuilt from there on, round the end (8); unused ones zero |
//! | 608 | 16 x 7 | ids of the arrays that were added, in order; unused ones zero |
//! | 720 | 3376 | reserved, zero |

use crate::device::{Device, DeviceError, MemberState};
use crate::limits::{RAID_ADDED_MAX, RAID_MEMBERS_MAX};
use crate::units::convert::{low_u8, to_u64};
use crate::units::hash::crc32c;
use crate::units::ids::{ArrayId, MemberId};
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::layout::{Geometry, LABEL_BLOCKS, Level};

/// First bytes of a label.
pub const MAGIC: [u8; 8] = *b"MIRRRAID";
/// The one format this program writes and reads.
pub const VERSION: u32 = 1;

const CRC_AT: usize = 12;
const TABLE_AT: usize = 96;
const ENTRY_BYTES: usize = 32;
const ADDED_AT: usize = TABLE_AT + RAID_MEMBERS_MAX * ENTRY_BYTES;
const ID_BYTES: usize = 16;
const FIELDS_BYTES: usize = ADDED_AT + RAID_ADDED_MAX * ID_BYTES;

const _: () = assert!(ADDED_AT == 608 && FIELDS_BYTES == 720 && FIELDS_BYTES < BLOCK_BYTES);

/// What a label says of one device of the array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its id.
    pub id: MemberId,
    /// How it is.
    pub state: MemberState,
    /// Of one that is being rebuilt: so many stripes it has, from `first` on and round the end.
    pub rebuilt: u64,
    /// The stripe with which filling it began.
    pub first: u64,
    /// Stripes that held nothing were left out when it was filled: what they have fits nothing.
    pub sparse: bool,
}

/// What a label says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// Names the array for ever.
    pub array: ArrayId,
    /// Names this device for ever.
    pub member: MemberId,
    /// How often it was changed; 0 while the array is being made.
    pub commit: u64,
    /// How the array is divided.
    pub geometry: Geometry,
    /// Where in the array this device is.
    pub place: usize,
    /// All devices, by place.
    pub entries: Vec<Entry>,
    /// Arrays that were added behind this one, in order; at most `RAID_ADDED_MAX`.
    pub added: Vec<ArrayId>,
}

/// Why a device has no label.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LabelError {
    /// It cannot be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It is of no array.
    #[error("carries no label of an array")]
    None,
    /// Another version of this program made it.
    #[error("its label has format version {met}, this program knows {VERSION}")]
    Version { met: u32 },
    /// Both copies are damaged.
    #[error("its label is damaged: {what}")]
    Corrupt { what: String },
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn id(bytes: &[u8], at: usize) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[at..at + 16]);
    id
}

fn state_number(state: MemberState) -> u8 {
    match state {
        MemberState::In => 1,
        MemberState::Failed => 2,
        MemberState::Rebuilding => 3,
    }
}

fn state_of(number: u8) -> Option<MemberState> {
    match number {
        1 => Some(MemberState::In),
        2 => Some(MemberState::Failed),
        3 => Some(MemberState::Rebuilding),
        _ => None,
    }
}

impl Label {
    /// The 4096 bytes.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.array.0);
        bytes[32..48].copy_from_slice(&self.member.0);
        bytes[48..56].copy_from_slice(&self.commit.to_le_bytes());
        bytes[56] = self.geometry.level.number();
        bytes[57] = low_u8(to_u64(self.geometry.members));
        bytes[58] = low_u8(to_u64(self.place));
        for (at, value) in
            [(64, self.geometry.chunk), (72, self.geometry.data_start), (80, self.geometry.stripes)]
        {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let table = bytes[TABLE_AT..FIELDS_BYTES].chunks_exact_mut(ENTRY_BYTES);
        for (entry, bytes) in self.entries.iter().zip(table) {
            bytes[..16].copy_from_slice(&entry.id.0);
            bytes[16] = state_number(entry.state);
            bytes[17] = u8::from(entry.sparse);
            bytes[18..24].copy_from_slice(&entry.first.to_le_bytes()[..6]);
            bytes[24..32].copy_from_slice(&entry.rebuilt.to_le_bytes());
        }
        bytes[59] = low_u8(to_u64(self.added.len()));
        for (id, bytes) in self.added.iter().zip(bytes[ADDED_AT..].chunks_exact_mut(ID_BYTES)) {
            bytes.copy_from_slice(&id.0);
        }
        let crc = crc32c(&bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads and checks one copy.
    pub fn decode(bytes: &[u8; BLOCK_BYTES]) -> Result<Self, LabelError> {
        if bytes[0..8] != MAGIC {
            return Err(LabelError::None);
        }
        let half = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let corrupt = |what: &str| LabelError::Corrupt { what: what.to_owned() };
        let mut bare = *bytes;
        bare[CRC_AT..CRC_AT + 4].fill(0);
        let (wanted, met) = (half(CRC_AT), crc32c(&bare));
        if wanted != met {
            let what = format!("wanted checksum {wanted:08x}, met {met:08x}");
            return Err(LabelError::Corrupt { what });
        }
        // Of every version magic, version and checksum stand where they do here.
        if half(8) != VERSION {
            return Err(LabelError::Version { met: half(8) });
        }
        let level = Level::ALL.get(usize::from(bytes[56])).copied();
        let (members, place) = (usize::from(bytes[57]), usize::from(bytes[58]));
        let geometry = Geometry {
            level: level.ok_or_else(|| corrupt("unknown level"))?,
            members,
            chunk: number(bytes, 64),
            data_start: number(bytes, 72),
            stripes: number(bytes, 80),
        };
        if !geometry.is_sound() || place >= members {
            return Err(corrupt("impossible layout"));
        }
        let (used, added) = (TABLE_AT + members * ENTRY_BYTES, usize::from(bytes[59]));
        if added > RAID_ADDED_MAX {
            return Err(corrupt("more arrays were added than there can be"));
        }
        let ids = &bytes[ADDED_AT..ADDED_AT + added * ID_BYTES];
        let behind = &bytes[ADDED_AT + added * ID_BYTES..];
        let reserved =
            [&bytes[60..64], &bytes[88..TABLE_AT], &bytes[used..ADDED_AT], behind].concat();
        if reserved.iter().any(|byte| *byte != 0) {
            return Err(corrupt("reserved bytes are not zero"));
        }
        let entries: Option<Vec<Entry>> =
            bytes[TABLE_AT..used].chunks_exact(ENTRY_BYTES).map(entry).collect();
        let entries = entries.ok_or_else(|| corrupt("unknown state of a device"))?;
        let stripes = geometry.stripes;
        if entries.iter().any(|entry| entry.first >= stripes || entry.rebuilt > stripes) {
            return Err(corrupt("more stripes rebuilt than there are"));
        }
        let (array, member) = (ArrayId(id(bytes, 16)), MemberId(id(bytes, 32)));
        if entries.get(place).is_none_or(|entry| entry.id != member) {
            return Err(corrupt("its own place is another's"));
        }
        let added: Vec<ArrayId> =
            ids.chunks_exact(ID_BYTES).map(|bytes| ArrayId(id(bytes, 0))).collect();
        let known = |at: usize, one: &ArrayId| *one == array || added[..at].contains(one);
        if added.iter().enumerate().any(|(at, one)| one.is_zero() || known(at, one)) {
            return Err(corrupt("an array was added twice"));
        }
        Ok(Self { array, member, commit: number(bytes, 48), geometry, place, entries, added })
    }
}

fn entry(bytes: &[u8]) -> Option<Entry> {
    let state = state_of(bytes[16])?;
    let mut first = [0; 8];
    first[..6].copy_from_slice(&bytes[18..24]);
    let (first, sparse) = (u64::from_le_bytes(first), bytes[17] == 1);
    let id = MemberId(id(bytes, 0));
    (bytes[17] <= 1).then(|| Entry { id, state, rebuilt: number(bytes, 24), first, sparse })
}

/// Writes a label, durably, over the older one of the two.
pub fn write(device: &dyn Device, label: &Label) -> Result<(), DeviceError> {
    device.write_durable_at(label.commit % LABEL_BLOCKS * BLOCK_BYTES_U64, &label.encode())
}

/// Reads the newer one of the two copies, or why there is none: the more telling reason. A copy of
/// another version is one, beside a good copy too: that one is what it was before another program came.
pub fn read(device: &dyn Device) -> Result<Label, LabelError> {
    let mut newest: Result<Label, LabelError> = Err(LabelError::None);
    for copy in 0..LABEL_BLOCKS {
        let mut bytes = [0; BLOCK_BYTES];
        let met = match device.read_at(copy * BLOCK_BYTES_U64, &mut bytes) {
            Ok(()) => Label::decode(&bytes),
            Err(DeviceError::OutOfRange { .. }) => Err(LabelError::None),
            Err(error) => Err(error.into()),
        };
        newest = match (newest, met) {
            (Err(error @ LabelError::Version { .. }), _)
            | (_, Err(error @ LabelError::Version { .. })) => Err(error),
            (Ok(old), Ok(new)) if old.commit >= new.commit => Ok(old),
            (_, Ok(new)) => Ok(new),
            (Err(LabelError::None), Err(error)) => Err(error),
            (newest, Err(_)) => newest,
        };
    }
    newest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::SimDevice;
    use crate::units::numbers::ByteCount;

    fn label(commit: u64) -> Label {
        let geometry = Geometry::new(Level::Parity1, 3, 8 << 20).unwrap();
        let entry = |n: u8, state| Entry {
            id: MemberId([n; 16]),
            state,
            rebuilt: u64::from(n),
            first: u64::from(n) - 1,
            sparse: n == 2,
        };
        let entries = vec![
            entry(1, MemberState::In),
            entry(2, MemberState::Failed),
            entry(3, MemberState::Rebuilding),
        ];
        let (array, member) = (ArrayId([9; 16]), MemberId([2; 16]));
        Label { array, member, commit, geometry, place: 1, entries, added: Vec::new() }
    }

    fn sealed(mut bytes: [u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
        bytes[CRC_AT..CRC_AT + 4].fill(0);
        let crc = crc32c(&bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn golden_bytes() {
        let bytes = label(0x0102).encode();
        assert_eq!(bytes[..12], *b"MIRRRAID\x01\0\0\0");
        assert_eq!(
            bytes[16..56],
            [[9; 16].as_slice(), &[2; 16], &[2, 1, 0, 0, 0, 0, 0, 0]].concat()
        );
        assert_eq!(bytes[56..64], [2, 3, 1, 0, 0, 0, 0, 0]);
        assert_eq!(number(&bytes, 64), label(0).geometry.chunk);
        assert_eq!(number(&bytes, 80), label(0).geometry.stripes);
        assert_eq!(
            bytes[128..160],
            [[2; 16].as_slice(), &[2, 1, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]].concat()
        );
        assert!(bytes[192..].iter().all(|byte| *byte == 0));
        assert_eq!(Label::decode(&bytes).unwrap(), label(0x0102));
        let grown = Label { added: vec![ArrayId([7; 16]), ArrayId([8; 16])], ..label(0x0102) };
        let bytes = grown.encode();
        assert_eq!((bytes[59], &bytes[608..640]), (2, &[[7; 16], [8; 16]].concat()[..]));
        assert!(bytes[640..].iter().all(|byte| *byte == 0));
        assert_eq!(Label::decode(&bytes).unwrap(), grown);
    }

    #[test]
    fn each_wrong_field_is_refused_by_name() {
        let good = label(1).encode();
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            bytes
        };
        let refused = |bytes| Label::decode(&bytes).unwrap_err().to_string();
        assert!(refused(with(0, 0)).contains("no label"));
        assert!(refused(sealed(with(8, 7))).contains("format version 7, this program knows 1"));
        assert!(refused(with(8, 7)).contains("checksum"), "rot is no version");
        assert!(refused(with(100, 7)).contains("checksum"));
        for (at, value, what) in [
            (56, 4, "unknown level"),
            (57, 2, "impossible layout"),
            (58, 3, "impossible layout"),
            (64, 1, "impossible layout"),
            (87, 1, "impossible layout"),
            (60, 1, "reserved"),
            (59, 1, "added twice"),
            (59, 8, "more arrays were added"),
            (608, 1, "reserved"),
            (95, 1, "reserved"),
            (4000, 1, "reserved"),
            (112, 4, "unknown state"),
            (113, 2, "unknown state"),
            (58, 0, "another's"),
        ] {
            let met = refused(sealed(with(at, value)));
            assert!(met.contains(what), "{at}: {met}");
        }
    }

    /// The newer copy holds; if a cut tore it, the older one does.
    #[test]
    fn a_torn_label_leaves_the_one_before() {
        let device = SimDevice::new("d", ByteCount(64 << 10));
        assert!(matches!(read(&device), Err(LabelError::None)));
        for commit in 0..6 {
            write(&device, &label(commit)).unwrap();
            assert_eq!(read(&device).unwrap().commit, commit);
        }
        device.rot(5 % LABEL_BLOCKS * BLOCK_BYTES_U64 + 300, &[1]);
        assert_eq!(read(&device).unwrap().commit, 4);
        device.rot(4 % LABEL_BLOCKS * BLOCK_BYTES_U64 + 300, &[1]);
        assert!(matches!(read(&device), Err(LabelError::Corrupt { .. })));
    }
}
