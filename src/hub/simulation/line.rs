//! What the clients of one source did, in the order in which the source ordered it: the oracle.
//!
//! Every entry has its sequence number, so the content at any place is known exactly: the entries
//! up to it, applied to zeros. A write that was answered must be in every later content; what was
//! not may be cut off by a crash, but only from the end (invariant 6).

use std::collections::BTreeMap;

use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::Root;
use crate::units::numbers::{ByteCount, VolumeNumber};
use crate::volume::root::hash_reader;

/// What a client asked for.
#[derive(Debug, Clone)]
pub(super) enum Change {
    Write(Vec<u8>),
    Trim(u64),
    Zeroes(u64),
}

/// One entry.
#[derive(Debug, Clone)]
pub(super) struct Done {
    pub(super) volume: VolumeNumber,
    pub(super) offset: u64,
    pub(super) change: Change,
}

/// The line of one source.
#[derive(Debug, Clone)]
pub(super) struct Line {
    volumes: Vec<VolumeNumber>,
    /// The size of each volume, and the one it grows to.
    bytes: [usize; 2],
    /// What the entries follow: a sequence number, and the content there if it is not all zeros.
    base: (u64, Option<Vec<Vec<u8>>>),
    entries: Vec<Done>,
    acknowledged: u64,
    /// What a restart cut off, behind which entry: the hub may have it all the same.
    cut: Option<(u64, Vec<Done>)>,
    /// Contents by sequence number, the newest looked at.
    kept: BTreeMap<u64, Vec<Vec<u8>>>,
}

const KEPT_MAX: usize = 6;

impl Line {
    pub(super) fn new(volumes: u32, bytes: [usize; 2]) -> Self {
        let volumes = (0..volumes).map(VolumeNumber).collect();
        Self {
            volumes,
            bytes,
            base: (0, None),
            entries: Vec::new(),
            acknowledged: 0,
            cut: None,
            kept: BTreeMap::new(),
        }
    }

    /// The last entry that was ordered.
    pub(super) fn last(&self) -> u64 {
        self.base.0 + to_u64(self.entries.len())
    }

    /// How many entries lie before that one.
    fn before(&self, sequence: u64) -> usize {
        to_usize(sequence.saturating_sub(self.base.0))
    }

    /// The same content as at `sequence`, at the place `at` of another line.
    pub(super) fn rebased(mut self, sequence: u64, at: u64) -> Result<Self, String> {
        let content = self.content(sequence)?.clone();
        let mut line = Self::new(0, self.bytes);
        line.volumes = self.volumes;
        (line.base, line.acknowledged) = ((at, Some(content)), at);
        Ok(line)
    }

    /// The next entry was ordered as number `sequence`.
    pub(super) fn ordered(&mut self, sequence: u64, done: Done) -> Result<(), String> {
        if sequence != self.last() + 1 {
            return Err(format!("entry {sequence} was ordered behind {}", self.last()));
        }
        self.entries.push(done);
        Ok(())
    }

    /// A client was answered.
    pub(super) fn acknowledge(&mut self, sequence: u64) {
        self.acknowledged = self.acknowledged.max(sequence);
    }

    /// The last entry that a client was told is safe.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// What lies behind was answered by an end that is not primary any more.
    pub(super) fn give_up(&mut self, sequence: u64) {
        self.acknowledged = self.acknowledged.min(sequence);
    }

    /// A source serves what ends at `sequence`.
    pub(super) fn resumed(&mut self, sequence: u64) -> Result<(), String> {
        let (acknowledged, last) = (self.acknowledged, self.last());
        if sequence < acknowledged {
            return Err(format!(
                "invariant 1: write {acknowledged} was acknowledged, what is served ends at {sequence}"
            ));
        }
        if sequence > last {
            return Err(format!("{sequence} is served, {last} was written"));
        }
        if sequence < last {
            self.cut = Some((sequence, self.entries.split_off(self.before(sequence))));
        }
        self.kept.retain(|&at, _| at <= sequence);
        Ok(())
    }

    /// Whether the content at `sequence` has those roots; `cut`: or the hub went on with what a
    /// restart of its source had cut off, while that one served alone.
    pub(super) fn has(
        &mut self,
        sequence: u64,
        roots: &[(VolumeNumber, Root)],
        cut: bool,
    ) -> Result<bool, String> {
        if sequence <= self.last() && self.has_roots(sequence, roots)? {
            return Ok(true);
        }
        match self.other() {
            Some(mut other) if cut && sequence <= other.last() => other.has_roots(sequence, roots),
            Some(_) | None => Ok(false),
        }
    }

    /// The line with what was cut off.
    pub(super) fn other(&self) -> Option<Self> {
        let (at, tail) = self.cut.as_ref().filter(|(at, _)| *at <= self.last())?;
        let mut other = Self::new(0, self.bytes);
        other.volumes.clone_from(&self.volumes);
        other.base = self.base.clone();
        other.entries = self.entries[..self.before(*at)].to_vec();
        other.entries.extend_from_slice(tail);
        other.acknowledged = self.acknowledged.min(*at);
        Some(other)
    }

    /// Whether each volume had that root at `sequence`, in the size it was made with or in the one it
    /// has grown to.
    fn has_roots(&mut self, sequence: u64, roots: &[(VolumeNumber, Root)]) -> Result<bool, String> {
        let [made, grown] = self.bytes;
        let large = self.roots(sequence, grown)?;
        if large == roots || made == grown {
            return Ok(large == roots);
        }
        let small = self.roots(sequence, made)?;
        let fits = |(at, met): (usize, &(VolumeNumber, Root))| {
            small.get(at) == Some(met) || large.get(at) == Some(met)
        };
        Ok(roots.len() == large.len() && roots.iter().enumerate().all(fits))
    }

    /// The content of all volumes at `sequence`, as large as they become.
    pub(super) fn content(&mut self, sequence: u64) -> Result<&Vec<Vec<u8>>, String> {
        if sequence > self.last() {
            return Err(format!("{sequence} is beyond what was written, {}", self.last()));
        }
        if sequence < self.base.0 {
            return Err(format!("{sequence} is before this line begins, {}", self.base.0));
        }
        if !self.kept.contains_key(&sequence) {
            let before = self.kept.range(..sequence).next_back();
            let base = || match &self.base {
                (at, Some(content)) => (*at, content.clone()),
                (at, None) => (*at, vec![vec![0; self.bytes[1]]; self.volumes.len()]),
            };
            let (from, mut content) =
                before.map_or_else(base, |(from, content)| (*from, content.clone()));
            for done in &self.entries[self.before(from)..self.before(sequence)] {
                let at = self.volumes.iter().position(|volume| *volume == done.volume);
                apply(&mut content[at.unwrap_or(0)], done);
            }
            if self.kept.len() >= KEPT_MAX {
                self.kept.pop_first();
            }
            self.kept.insert(sequence, content);
        }
        Ok(&self.kept[&sequence])
    }

    /// The roots of all volumes at the end, as large as they become.
    pub(super) fn last_roots(&mut self) -> Result<Vec<(VolumeNumber, Root)>, String> {
        self.roots(self.last(), self.bytes[1])
    }

    /// The roots of all volumes at `sequence`, in that size. What is written behind it makes the root
    /// one that no image has.
    fn roots(&mut self, sequence: u64, bytes: usize) -> Result<Vec<(VolumeNumber, Root)>, String> {
        let volumes = self.volumes.clone();
        let contents = self.content(sequence)?;
        let root = |content: &Vec<u8>| {
            if content[bytes..].iter().any(|byte| *byte != 0) {
                return Ok(Root([0; 32]));
            }
            hash_reader(&content[..bytes], ByteCount(to_u64(bytes)))
                .map_err(|error| error.to_string())
        };
        volumes
            .into_iter()
            .zip(contents)
            .map(|(volume, bytes)| Ok((volume, root(bytes)?)))
            .collect()
    }
}

fn apply(content: &mut [u8], done: &Done) {
    let block = crate::units::BLOCK_BYTES_U64;
    let range = |from: u64, to: u64| to_usize(from)..to_usize(to.max(from));
    match &done.change {
        Change::Write(data) => {
            content[to_usize(done.offset)..][..data.len()].copy_from_slice(data);
        }
        Change::Zeroes(length) => content[range(done.offset, done.offset + length)].fill(0),
        // Whole blocks only (R16).
        Change::Trim(length) => {
            let from = done.offset.next_multiple_of(block);
            let to = (done.offset + length) / block * block;
            content[range(from, to)].fill(0);
        }
    }
}
