//! The hub's own bytes in a source's catalog row: the transfer id of the published place, who
//! serves the source's volumes, and what the source promised.
//!
//! The row has sequence number and stream hash; with the transfer id they make the place at which
//! the source's log goes on. They are written with every CP, and when a failover or a hand-over
//! changes the state, in one commit with the epoch (R13). Version 5, little-endian, 144 bytes and
//! 12 for each volume that is left out:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | format version: 5 |
//! | 4 | 12 | last transfer of the published CP: generation (4), counter (8) |
//! | 16 | 1 | state: 0 mirror, 1 failing over, 2 promoted, 3 handed over |
//! | 17 | 1 | 1 once this hub has made an NVRAM to serve the volumes with; only while it is promoted |
//! | 18 | 1 | what the last failover was asked for: 1 `--now`, 2 `--accept-gap`; written before its fence |
//! | 19 | 1 | `failback --keep source`: handed over, 1 if the filer keeps its own state; promoted, 1 once what is here is given up for it; else 0 |
//! | 20 | 4 | failing over: the CP that will hold the log, once the volumes are served over it; else 0 |
//! | 24 | 12 | the fence: last transfer before it; zero in state mirror |
//! | 36 | 8 | its last sequence number |
//! | 44 | 16 | stream hash there |
//! | 60 | 1 | 1: the source was here and told its policy; 2: it was alone then |
//! | 61 | 3 | reserved, zero |
//! | 64 | 24 | its policy, as `units::policy` encodes it; zero if it was never here |
//! | 88 | 4 | bytes of acknowledged history that rot in the NVRAM may have taken, until the source was here |
//! | 92 | 12 | alone: epoch number (4) and id (8); zero if it was not |
//! | 104 | 8 | alone: first sequence number that may be acknowledged without this hub |
//! | 112 | 16 | id of the filer that it was given to last; zero if that is the one it was made on |
//! | 128 | 12 | the boot (number 4, id 8) that held what may be missing here, once another is recorded; else zero |
//! | 140 | 4 | volumes that are left out: entries of them in the log do not count (R20) |
//! | 144 + 12 n | 4 | number of the volume |
//! | 148 + 12 n | 4 | the CP that its image is of; 0 if it has none |
//! | 152 + 12 n | 1 | 1 if it is refused; 0 if its image is to be brought up |
//! | 153 + 12 n | 3 | reserved, zero |
//!
//! Version 4 lacks the 12 bytes of that boot, version 3 also the 16 of the filer. Version 2 is the
//! first 112 bytes with zeros from 18 to 24, and leaves nothing out; version 1 is the first 16, and
//! its state is mirror. They are read, and no longer written.

use crate::limits::{SOURCE_EXTENSION_BYTES_MAX, VOLUMES_PER_SOURCE_MAX};
use crate::pool::rows::SourceRow;
use crate::record::marks::{Fence, Place};
use crate::session::mirror::LeftOut;
use crate::units::convert::{low_u32, to_u64, to_usize};
use crate::units::hash::StreamHash;
use crate::units::ids::SourceId;
use crate::units::numbers::{
    CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::units::policy::{AloneMark, POLICY_BYTES, Policy};

const VERSION: u32 = 5;
const EXTENSION_BYTES: usize = 144;
const LEFT_OUT_BYTES: usize = 12;
const EXTENSION_BYTES_V2: usize = 112;
const EXTENSION_BYTES_V1: usize = 16;

const TOLD: u8 = 1;
const ALONE: u8 = 2;

const NOW: u8 = 1;
const ACCEPT_GAP: u8 = 2;

const _: () = assert!(
    EXTENSION_BYTES + VOLUMES_PER_SOURCE_MAX * LEFT_OUT_BYTES <= SOURCE_EXTENSION_BYTES_MAX
);

/// Who serves the source's volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// The source; the hub mirrors it.
    #[default]
    Mirror,
    /// Nobody: the source is fenced, its log is being replayed here.
    FailingOver,
    /// This hub.
    Promoted,
    /// Nobody: this hub has given up, the filer of the new epoch has not said that it has taken
    /// over.
    HandedOver,
}

impl State {
    /// Stable word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::FailingOver => "failing-over",
            Self::Promoted => "promoted",
            Self::HandedOver => "handed-over",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Mirror => 0,
            Self::FailingOver => 1,
            Self::Promoted => 2,
            Self::HandedOver => 3,
        }
    }

    const fn of(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Mirror),
            1 => Some(Self::FailingOver),
            2 => Some(Self::Promoted),
            3 => Some(Self::HandedOver),
            _ => None,
        }
    }
}

/// What the administrator asked of a failover: a hub that resumes it goes by the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Asked {
    /// Do not wait until a source that is cut off holds its reads.
    pub now: bool,
    /// Go on up to a gap in the log.
    pub accept_gap: bool,
}

impl Asked {
    /// What either asks for.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let (now, accept_gap) = (self.now || other.now, self.accept_gap || other.accept_gap);
        Self { now, accept_gap }
    }

    fn byte(self) -> u8 {
        let now = if self.now { NOW } else { 0 };
        if self.accept_gap { now | ACCEPT_GAP } else { now }
    }

    fn of(byte: u8) -> Option<Self> {
        let known = byte & !(NOW | ACCEPT_GAP) == 0;
        known.then_some(Self { now: byte & NOW != 0, accept_gap: byte & ACCEPT_GAP != 0 })
    }
}

/// What the extension says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extension {
    /// Last transfer of the published CP.
    pub transfer: TransferId,
    /// Who serves.
    pub state: State,
    /// Whether an NVRAM was made to serve with: if it is gone then, that is a loss. Whoever writes
    /// `promoted` again keeps it, whoever leaves that state clears it.
    pub nvram_made: bool,
    /// What the failover was asked for.
    pub asked: Asked,
    /// While it is handed over: the filer keeps its own state, the image is another. While it is
    /// promoted: the filer's is to count, and the NVRAM, which was gone, is not looked for any more.
    pub own: bool,
    /// While it fails over: the CP that will hold its log, once the volumes are served over that.
    pub serving: Option<CpNumber>,
    /// The place of the newest fence: a failover replays up to here, and nothing behind it.
    pub fence: Place,
    /// What the source promised when it was last here: after its loss nobody else can say.
    pub policy: Option<Policy>,
    /// Since when it may have acknowledged writes without this hub, as it said then (R4).
    pub alone: Option<AloneMark>,
    /// The filer that it was given to last, if that is not the one it was made on: in
    /// `handed-over` nobody else may take it over.
    pub home: Option<SourceId>,
    /// Volumes whose entries in the log do not count.
    pub left_out: Vec<LeftOut>,
    /// Bytes of acknowledged history that rot in the NVRAM may have taken: found by a start, told
    /// until the source was here and has sent again what it holds (R3).
    pub missing_bytes: u32,
    /// The boot that held what may be missing here, by rot or since it was only received: noted with the
    /// first other one that is recorded.
    pub doubted: Option<Generation>,
}

impl Extension {
    /// Nothing is missing here any more.
    #[must_use]
    pub fn without_doubts(self) -> Self {
        Self { missing_bytes: 0, doubted: None, ..self }
    }

    /// A mirror whose published CP ends with that transfer.
    pub fn mirror(transfer: TransferId) -> Self {
        Self { transfer, ..Self::default() }
    }

    /// The filer that `source` was given to last, by the id of its pool.
    pub fn home_of(&self, source: SourceId) -> SourceId {
        self.home.unwrap_or(source)
    }

    /// Raises the epoch of a row and fences its source there: one change, so one commit (R13).
    /// An epoch that is as high already stays.
    pub fn fail_over(row: &mut SourceRow, fence: Fence) {
        if row.epoch.number >= fence.epoch.number {
            return;
        }
        // A row that cannot be read was refused before anybody could fence its source.
        if let Ok(extension) = Self::of(row) {
            row.epoch = fence.epoch;
            let (state, serving) = (State::FailingOver, None);
            let fence = fence.place;
            row.extension = Self { state, fence, serving, ..extension }.encode();
        }
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        put_transfer(&mut bytes, self.transfer);
        let made = self.nvram_made.into();
        // Whoever leaves the state leaves it behind.
        let own = self.own && matches!(self.state, State::HandedOver | State::Promoted);
        let (state, asked) = (self.state.number(), self.asked.byte());
        bytes.extend_from_slice(&[state, made, asked, own.into()]);
        bytes.extend_from_slice(&self.serving.map_or(0, |cp| cp.0).to_le_bytes());
        put_transfer(&mut bytes, self.fence.transfer);
        bytes.extend_from_slice(&self.fence.sequence.0.to_le_bytes());
        bytes.extend_from_slice(&self.fence.hash.0);
        let flags = if self.policy.is_some() { TOLD } else { 0 };
        let flags = if self.alone.is_some() { flags | ALONE } else { flags };
        bytes.extend_from_slice(&[flags, 0, 0, 0]);
        let policy = self.policy.map_or([0; POLICY_BYTES], |policy| policy.encode());
        bytes.extend_from_slice(&policy);
        let (epoch, sequence) = self.alone.unwrap_or_default();
        bytes.extend_from_slice(&self.missing_bytes.to_le_bytes());
        bytes.extend_from_slice(&epoch.number.to_le_bytes());
        bytes.extend_from_slice(&epoch.id.to_le_bytes());
        bytes.extend_from_slice(&sequence.0.to_le_bytes());
        bytes.extend_from_slice(&self.home.unwrap_or_default().0);
        let doubted = self.doubted.unwrap_or_default();
        bytes.extend_from_slice(&doubted.number.to_le_bytes());
        bytes.extend_from_slice(&doubted.id.to_le_bytes());
        bytes.extend_from_slice(&low_u32(to_u64(self.left_out.len())).to_le_bytes());
        assert!(bytes.len() == EXTENSION_BYTES, "an extension is as long as its table says");
        assert!(self.left_out.len() <= VOLUMES_PER_SOURCE_MAX, "a source has no more volumes");
        for LeftOut { volume, cp, refused } in &self.left_out {
            bytes.extend_from_slice(&volume.0.to_le_bytes());
            bytes.extend_from_slice(&cp.0.to_le_bytes());
            bytes.extend_from_slice(&[(*refused).into(), 0, 0, 0]);
        }
        bytes
    }

    /// Reads the extension of a row; an error names the version if a later one wrote it. A row of a
    /// source that has published nothing may have none.
    pub fn of(row: &SourceRow) -> Result<Self, String> {
        if row.extension.is_empty() && row.sequence.0 == 0 {
            return Ok(Self::default());
        }
        let name = &row.name;
        decode(&row.extension).ok_or_else(|| match row.extension.first_chunk() {
            Some(version) if u32::from_le_bytes(*version) > VERSION => format!(
                "source {name}: the extension of its catalog row has format version {}, this \
                 program reads versions 1 to {VERSION}",
                u32::from_le_bytes(*version)
            ),
            _ => format!("source {name}: the extension of its catalog row is damaged"),
        })
    }
}

/// The published place of a source.
pub fn place(row: &SourceRow) -> Result<Place, String> {
    let transfer = Extension::of(row)?.transfer;
    Ok(Place { transfer, sequence: row.sequence, hash: row.stream_hash })
}

fn put_transfer(bytes: &mut Vec<u8>, transfer: TransferId) {
    bytes.extend_from_slice(&transfer.generation.to_le_bytes());
    bytes.extend_from_slice(&transfer.counter.to_le_bytes());
}

fn decode(bytes: &[u8]) -> Option<Extension> {
    let (version, rest) = bytes.split_first_chunk()?;
    let number = u32::from_le_bytes(*version);
    let (fixed, home, doubted, left_out) = match number {
        1 if bytes.len() == EXTENSION_BYTES_V1 => {
            return Some(Extension::mirror(take_transfer(rest)?.0));
        }
        2 if bytes.len() == EXTENSION_BYTES_V2 => (rest, None, None, Vec::new()),
        3 => {
            let (fixed, left_out) = rest.split_at_checked(EXTENSION_BYTES_V2 - version.len())?;
            (fixed, None, None, take_left_out(left_out)?)
        }
        4 | VERSION => {
            let (fixed, rest) = rest.split_at_checked(EXTENSION_BYTES_V2 - version.len())?;
            let (home, rest) = rest.split_first_chunk()?;
            let home = Some(SourceId(*home)).filter(|home| *home != SourceId::default());
            let (doubted, left_out) =
                if number == VERSION { take_generation(rest)? } else { (None, rest) };
            (fixed, home, doubted, take_left_out(left_out)?)
        }
        _ => return None,
    };
    let (transfer, rest) = take_transfer(fixed)?;
    let ([state, made, asked, own], rest) = rest.split_first_chunk::<4>()?;
    let (serving, rest) = rest.split_first_chunk()?;
    let serving = u32::from_le_bytes(*serving);
    let older = number >= 3 || (*asked, serving) == (0, 0);
    let (fenced, rest) = take_transfer(rest)?;
    let (sequence, rest) = rest.split_first_chunk()?;
    let (hash, rest) = rest.split_first_chunk()?;
    let (policy, alone, missing_bytes) = take_promise(rest)?;
    let nvram_made = *made == 1;
    let zero = *made <= 1 && older && (number >= 4 || missing_bytes == 0);
    let asked = Asked::of(*asked)?;
    let serving = (serving > 0).then_some(CpNumber(serving));
    let sequence = SequenceNumber(u64::from_le_bytes(*sequence));
    let fence = Place { transfer: fenced, sequence, hash: StreamHash(*hash) };
    let state = State::of(*state).filter(|_| zero)?;
    // Only what fails over is served over its log, only what is handed over says whose state it is.
    let fits = serving.is_none() || state == State::FailingOver;
    let owns = matches!(state, State::HandedOver | State::Promoted);
    let fits = fits && (*own == 0 || *own == 1 && owns);
    let own = *own == 1;
    let promised =
        Extension { policy, alone, home, left_out, missing_bytes, doubted, ..Extension::default() };
    fits.then_some(Extension {
        transfer,
        state,
        nvram_made,
        asked,
        own,
        serving,
        fence,
        ..promised
    })
}

fn take_generation(bytes: &[u8]) -> Option<(Option<Generation>, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    let (id, rest) = rest.split_first_chunk()?;
    let (number, id) = (u32::from_le_bytes(*number), u64::from_le_bytes(*id));
    let generation = Generation { number, id };
    Some((Some(generation).filter(|known| *known != Generation::default()), rest))
}

/// What stands behind the mark: a count and so many volumes.
fn take_left_out(bytes: &[u8]) -> Option<Vec<LeftOut>> {
    let (count, rest) = bytes.split_first_chunk()?;
    let count = to_usize(u64::from(u32::from_le_bytes(*count)));
    let (rows, []) = rest.as_chunks::<LEFT_OUT_BYTES>() else { return None };
    if rows.len() != count || count > VOLUMES_PER_SOURCE_MAX {
        return None;
    }
    rows.iter().map(left_out).collect()
}

fn left_out(row: &[u8; LEFT_OUT_BYTES]) -> Option<LeftOut> {
    let (volume, rest) = row.split_first_chunk()?;
    let (cp, rest) = rest.split_first_chunk()?;
    let refused = match rest {
        [0, 0, 0, 0] => false,
        [1, 0, 0, 0] => true,
        _ => return None,
    };
    let (volume, cp) = (u32::from_le_bytes(*volume), u32::from_le_bytes(*cp));
    Some(LeftOut { volume: VolumeNumber(volume), cp: CpNumber(cp), refused })
}

/// The 52 bytes behind the fence: flags, policy, what may be missing, mark.
fn take_promise(bytes: &[u8]) -> Option<(Option<Policy>, Option<AloneMark>, u32)> {
    let ([flags, reserved @ ..], rest) = bytes.split_first_chunk::<4>()?;
    let (policy, rest) = rest.split_first_chunk::<POLICY_BYTES>()?;
    let (missing, rest) = rest.split_first_chunk()?;
    let (number, rest) = rest.split_first_chunk()?;
    let (id, rest) = rest.split_first_chunk()?;
    let (sequence, rest) = rest.split_first_chunk()?;
    let zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    if flags & !(TOLD | ALONE) != 0 || !rest.is_empty() || !zero(reserved) {
        return None;
    }
    let epoch = Epoch { number: u32::from_le_bytes(*number), id: u64::from_le_bytes(*id) };
    let mark = (epoch, SequenceNumber(u64::from_le_bytes(*sequence)));
    let policy = match flags & TOLD {
        0 if !zero(policy) => return None,
        0 => None,
        _ => Some(Policy::decode(policy).ok()?),
    };
    let alone = match flags & ALONE {
        0 if mark != AloneMark::default() => return None,
        0 => None,
        _ => Some(mark),
    };
    Some((policy, alone, u32::from_le_bytes(*missing)))
}

fn take_transfer(bytes: &[u8]) -> Option<(TransferId, &[u8])> {
    let (generation, rest) = bytes.split_first_chunk()?;
    let (counter, rest) = rest.split_first_chunk()?;
    let generation = u32::from_le_bytes(*generation);
    Some((TransferId { generation, counter: u64::from_le_bytes(*counter) }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ids::SourceId;
    use crate::units::policy::Mode;

    fn sample() -> Extension {
        let fence = Place {
            transfer: TransferId { generation: 4, counter: 0x0105 },
            sequence: SequenceNumber(6),
            hash: StreamHash([7; 16]),
        };
        let transfer = TransferId { generation: 3, counter: 9 };
        let policy = Some(Policy { mode: Mode::Async, ..Policy::default() });
        let alone = Some((Epoch { number: 5, id: 0x0807 }, SequenceNumber(9)));
        let (state, nvram_made) = (State::FailingOver, true);
        let asked = Asked { now: true, accept_gap: true };
        let serving = Some(CpNumber(0x0a0b));
        let left = |number, cp, refused| {
            let (volume, cp) = (VolumeNumber(number), CpNumber(cp));
            LeftOut { volume, cp, refused }
        };
        let left_out = vec![left(0x0102, 7, true), left(3, 0, false)];
        let home = Some(SourceId([0x0a; 16]));
        let missing_bytes = 0x0203;
        let doubted = Some(Generation { number: 0x0104, id: 0x0605 });
        let promised = Extension {
            policy,
            alone,
            home,
            left_out,
            missing_bytes,
            doubted,
            ..Extension::default()
        };
        Extension { transfer, state, nvram_made, asked, serving, fence, ..promised }
    }

    #[test]
    fn golden_bytes_and_back() {
        let bytes = sample().encode();
        assert_eq!(bytes.len(), 144 + 2 * 12);
        assert_eq!(bytes[..17], [5, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(bytes[17..24], [1, 3, 0, 0x0b, 0x0a, 0, 0]);
        assert_eq!(bytes[24..44], [4, 0, 0, 0, 5, 1, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[44..64], [[7; 16].as_slice(), &[3, 0, 0, 0]].concat());
        assert_eq!(bytes[64..72], [3, 1, 1, 1, 1, 0x88, 0x13, 0]);
        assert_eq!(bytes[88..96], [3, 2, 0, 0, 5, 0, 0, 0]);
        assert_eq!(bytes[96..112], [7, 8, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[112..128], [0x0a; 16]);
        assert_eq!(bytes[128..140], [4, 1, 0, 0, 5, 6, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[140..156], [2, 0, 0, 0, 2, 1, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[156..], [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let left_out = Vec::new();
        let told = Extension { policy: None, alone: None, ..sample().without_doubts() };
        let never = Extension { home: None, left_out, ..told };
        assert_eq!(never.encode()[60..], [0; 84]);
        let before = [&[4, 0, 0, 0], &bytes[4..128], &bytes[140..]].concat();
        assert_eq!(decode(&before), Some(Extension { doubted: None, ..sample() }), "version 4");
        let mut before = [&[3, 0, 0, 0], &bytes[4..112], &bytes[140..]].concat();
        assert_eq!(decode(&before), None, "version 3 knows of nothing that is missing");
        before[88..90].fill(0);
        let older = Extension { home: None, ..sample().without_doubts() };
        assert_eq!(decode(&before), Some(older), "version 3");
        assert_eq!(decode(&never.encode()), Some(never));
        assert_eq!(decode(&bytes), Some(sample()));
        for state in [State::Mirror, State::FailingOver, State::Promoted, State::HandedOver] {
            let extension = Extension { state, serving: None, ..sample() };
            assert_eq!(decode(&extension.encode()), Some(extension));
        }
    }

    #[test]
    fn version_2_leaves_nothing_out() {
        let mut bytes = sample().encode();
        bytes.truncate(112);
        bytes[0] = 2;
        assert_eq!(decode(&bytes), None, "version 2 has zeros where something was asked for");
        let (asked, serving) = (Asked::default(), None);
        let (left_out, missing_bytes) = (Vec::new(), 0);
        let asked = Extension { asked, serving, missing_bytes, doubted: None, ..sample() };
        let older = Extension { left_out, home: None, ..asked };
        let mut bytes = older.encode();
        bytes.truncate(112);
        bytes[0] = 2;
        assert_eq!(decode(&bytes), Some(older));
        bytes.extend([0; 4]);
        assert_eq!(decode(&bytes), None, "version 2 ends there");
    }

    #[test]
    fn a_place_comes_back_and_version_1_is_a_mirror() {
        let mut row = SourceRow::new(SourceId([1; 16]), "filer-a".parse().unwrap());
        assert_eq!(place(&row), Ok(Place::default()));
        let transfer = TransferId { generation: 3, counter: 9 };
        let there = Place { transfer, sequence: SequenceNumber(7), hash: StreamHash([2; 16]) };
        row.sequence = there.sequence;
        row.stream_hash = there.hash;
        assert!(place(&row).is_err(), "a place without its transfer");
        row.extension = vec![1, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(Extension::of(&row), Ok(Extension::mirror(transfer)));
        assert_eq!(place(&row), Ok(there));
        row.extension = Extension::mirror(transfer).encode();
        assert_eq!(place(&row), Ok(there));
    }

    #[test]
    fn unknown_bytes_are_refused() {
        let bad = |at: usize, value| {
            let mut bytes = sample().encode();
            bytes[at] = value;
            decode(&bytes)
        };
        assert_eq!(bad(0, 6), None, "a later version");
        assert_eq!(bad(0, 4), None, "version 4 has no boot");
        assert_eq!(bad(0, 3), None, "version 3 has no filer");
        assert_eq!(bad(0, 2), None, "version 2 is shorter");
        assert_eq!(bad(140, 3), None, "not so many");
        assert_eq!(bad(152, 2), None, "refused or not");
        assert_eq!(bad(153, 1), None, "reserved");
        assert_eq!(bad(0, 1), None, "version 1 is shorter");
        assert_eq!(bad(16, 4), None, "no such state");
        assert_eq!(bad(17, 2), None, "made or not");
        assert_eq!(bad(16, 2), None, "served over a log that is applied");
        assert_eq!(bad(18, 4), None, "no such flag");
        assert_eq!(bad(19, 1), None, "reserved");
        assert_eq!(bad(60, 7), None, "no such flag");
        assert_eq!(bad(60, 2), None, "a policy that was not told");
        assert_eq!(bad(60, 1), None, "a mark that is not set");
        assert_eq!(bad(61, 1), None, "reserved");
        assert_eq!(bad(64, 9), None, "no such mode");
        assert_eq!(decode(&sample().encode()[..167]), None);
        assert_eq!(decode(&sample().encode()[..156]), None, "two are said to follow");
        assert_eq!(decode(&sample().encode()[..112]), None);
        assert_eq!(decode(&sample().encode()[..16]), None, "version 5 is longer");
    }
}
