//! The plan of a CP: what both ends make of the frozen buffers, and how it is told to the hub.
//!
//! Pure. `checkpoint` builds the [`Plan`] (blocks known only in part are filled from the tree of
//! the CP before); the own tree is written from it, and the forwarder pulls frames out of
//! [`Frames`], a few at a time.
//!
//! Invariants: steps of a volume rise and do not overlap; a block that is all zero is a hole; a
//! reference is used only for a block whose last entry wrote it whole (R15). References count
//! through the transfers of the CP, so a run may go on in the next transfer.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::buffers::{Block, BlockData, Buffers, Dirty, Known, Page, is_zero, lay};
use crate::limits::CP_FRAME_BYTES_MAX;
use crate::units::convert::{to_u64, to_usize};
use crate::units::machine;
use crate::units::numbers::{TransferId, Vbn, VolumeNumber};
use crate::wire::updates::Encoder;

/// A transfer of the CP, for references.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferRow {
    /// Its name.
    pub id: TransferId,
    /// Ordinal, counted through the CP, of its first block written whole.
    pub first_ordinal: u64,
}

/// One step of a volume's plan.
#[derive(Debug, Clone)]
pub enum Step {
    /// A block with data; the ordinal if the log has it whole.
    Block { vbn: u64, data: BlockData, ordinal: Option<u64> },
    /// Blocks that are zero.
    Hole { vbn: u64, count: u64 },
}

/// Changed blocks of one volume, rising.
#[derive(Debug, Clone)]
pub struct VolumePlan {
    /// Which volume.
    pub volume: VolumeNumber,
    /// Its steps.
    pub steps: Vec<Step>,
}

/// Changed blocks of all volumes.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The volumes that changed, by number.
    pub volumes: Vec<VolumePlan>,
    /// Blocks that were known in part only, as they were filled.
    pub filled: Vec<(VolumeNumber, u64, Arc<Page>)>,
}

/// What a CP sent, by kind: blocks, and bytes of payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Blocks sent by reference.
    pub references: u64,
    /// Blocks sent as data.
    pub inline: u64,
    /// Blocks sent as holes.
    pub holes: u64,
    /// Bytes of Updates payload that say references.
    pub reference_bytes: u64,
    /// Bytes of Updates payload that carry data.
    pub inline_bytes: u64,
    /// Bytes of Updates payload that say holes.
    pub hole_bytes: u64,
}

impl Counts {
    /// Bytes of Updates payload of all kinds: what CpEnd states.
    pub fn payload_bytes(&self) -> u64 {
        self.reference_bytes + self.inline_bytes + self.hole_bytes
    }
}

impl Plan {
    /// Plans what `buffers` hold. `fill` reads a block of the tree of the CP before: it is called
    /// for blocks known only in part.
    pub fn build<E>(
        buffers: &Buffers,
        mut fill: impl FnMut(VolumeNumber, u64, &mut Page) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut plan = Self::default();
        for (volume, dirty) in buffers.volumes() {
            let mut steps = Steps { steps: Vec::new(), filled: Vec::new() };
            steps.plan(dirty, &mut |vbn, page| fill(volume, vbn, page))?;
            let filled = steps.filled.into_iter().map(|(vbn, page)| (volume, vbn, page));
            plan.filled.extend(filled);
            if !steps.steps.is_empty() {
                plan.volumes.push(VolumePlan { volume, steps: steps.steps });
            }
        }
        Ok(plan)
    }
}

/// Collects the steps of one volume.
struct Steps {
    steps: Vec<Step>,
    filled: Vec<(u64, Arc<Page>)>,
}

impl Steps {
    fn plan<E>(
        &mut self,
        dirty: &Dirty,
        fill: &mut impl FnMut(u64, &mut Page) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut holes = dirty.holes().iter();
        let mut hole = holes.next();
        for (&vbn, block) in dirty.blocks() {
            while let Some((start, end)) = hole.filter(|&(start, _)| start <= vbn) {
                self.hole(start, end.min(vbn));
                hole = if end > vbn + 1 { Some((vbn + 1, end)) } else { holes.next() };
            }
            self.block(vbn, block, fill)?;
        }
        while let Some((start, end)) = hole {
            self.hole(start, end);
            hole = holes.next();
        }
        Ok(())
    }

    fn block<E>(
        &mut self,
        vbn: u64,
        block: &Block,
        fill: &mut impl FnMut(u64, &mut Page) -> Result<(), E>,
    ) -> Result<(), E> {
        let (data, ordinal) = match &block.known {
            Known::Whole { ordinal } => (block.data.clone(), Some(*ordinal)),
            Known::Full => (block.data.clone(), None),
            Known::Partial(known) => {
                let mut page = Arc::new(*block.data);
                let bytes = Arc::make_mut(&mut page);
                fill(vbn, bytes)?;
                lay(bytes, &block.data, known);
                self.filled.push((vbn, Arc::clone(&page)));
                (page.into(), None)
            }
        };
        if is_zero(&data) {
            self.hole(vbn, vbn + 1);
        } else {
            self.steps.push(Step::Block { vbn, data, ordinal });
        }
        Ok(())
    }

    fn hole(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        match self.steps.last_mut() {
            Some(Step::Hole { vbn, count }) if *vbn + *count == start => *count += end - start,
            _ => self.steps.push(Step::Hole { vbn: start, count: end - start }),
        }
    }
}

/// Forms the payloads of a plan, one at a time, each of at most [`CP_FRAME_BYTES_MAX`] bytes.
#[derive(Debug)]
pub struct Frames {
    plan: Arc<Plan>,
    rows: Arc<[TransferRow]>,
    inline: bool,
    left_out: BTreeSet<VolumeNumber>,
    volume: usize,
    step: usize,
    counts: Counts,
}

impl Frames {
    /// Starts at the beginning of `plan`. `rows` are the CP's transfers in order, the first with
    /// ordinal 0. With `inline` every block with data travels as data.
    pub fn new(plan: Arc<Plan>, rows: Arc<[TransferRow]>, inline: bool) -> Self {
        let (left_out, counts) = Default::default();
        Self { plan, rows, inline, left_out, volume: 0, step: 0, counts }
    }

    /// The same without these volumes: the hub does not mirror them (R20).
    #[must_use]
    pub fn leaving_out(self, left_out: BTreeSet<VolumeNumber>) -> Self {
        Self { left_out, ..self }
    }

    /// What was formed so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The next payload and its volume, or `None` behind the last.
    pub fn next_frame(&mut self) -> Option<(VolumeNumber, Vec<u8>)> {
        let plan = Arc::clone(&self.plan);
        while plan.volumes.get(self.volume).is_some_and(|v| self.left_out.contains(&v.volume)) {
            self.volume += 1;
        }
        let volume = plan.volumes.get(self.volume)?;
        let mut encoder = Encoder::new(CP_FRAME_BYTES_MAX);
        while self.step < volume.steps.len() && encoder.has_room() {
            let taken = self.push_run(&volume.steps[self.step..], &mut encoder);
            if taken == 0 {
                break;
            }
            self.step += taken;
        }
        assert!(!encoder.is_empty(), "a frame holds at least one run");
        if self.step == volume.steps.len() {
            self.volume += 1;
            self.step = 0;
        }
        Some((volume.volume, encoder.finish()))
    }

    /// Appends the longest run of one kind that fits; returns the steps it took.
    fn push_run(&mut self, steps: &[Step], encoder: &mut Encoder) -> usize {
        let before = encoder.bytes_len();
        match steps.first() {
            None => 0,
            Some(Step::Hole { vbn, count }) => {
                encoder.hole(Vbn(*vbn), *count);
                self.counts.holes += count;
                self.counts.hole_bytes += encoder.bytes_len() - before;
                1
            }
            Some(&Step::Block { vbn, ordinal: Some(ordinal), .. }) if !self.inline => {
                let length = run_length(steps, vbn, Some(ordinal));
                let (transfer, first) = self.resolve(ordinal);
                encoder.reference(Vbn(vbn), to_u64(length), transfer, first);
                self.counts.references += to_u64(length);
                self.counts.reference_bytes += encoder.bytes_len() - before;
                length
            }
            Some(&Step::Block { vbn, .. }) => {
                let reference = |step: &Step| match step {
                    Step::Block { ordinal, .. } => ordinal.is_some() && !self.inline,
                    Step::Hole { .. } => false,
                };
                let all = run_length(steps, vbn, None);
                let alike = steps[..all].iter().take_while(|step| !reference(step)).count();
                let length = alike.min(to_usize(encoder.inline_room()));
                if length > 0 {
                    let pages: Vec<&Page> = steps[..length].iter().filter_map(page).collect();
                    encoder.inline(Vbn(vbn), pages.into_iter());
                    self.counts.inline += to_u64(length);
                    self.counts.inline_bytes += encoder.bytes_len() - before;
                }
                length
            }
        }
    }

    /// The transfer that holds an ordinal, and its place in it.
    fn resolve(&self, ordinal: u64) -> (TransferId, u64) {
        // Several transfers without whole blocks may begin at one ordinal: the last of them has it.
        let behind = if machine::breaks(15) {
            self.rows.partition_point(|row| row.first_ordinal < ordinal).max(1)
        } else {
            self.rows.partition_point(|row| row.first_ordinal <= ordinal)
        };
        let row = behind.checked_sub(1).and_then(|at| self.rows.get(at));
        let Some(row) = row else { panic!("ordinal {ordinal} stands before every transfer") };
        (row.id, ordinal - row.first_ordinal)
    }
}

fn page(step: &Step) -> Option<&Page> {
    match step {
        Step::Block { data, .. } => Some(data),
        Step::Hole { .. } => None,
    }
}

/// How many steps stand for consecutive blocks with data; with an ordinal: consecutive there too.
fn run_length(steps: &[Step], vbn: u64, ordinal: Option<u64>) -> usize {
    let follows = |(index, step): (u64, &Step)| match step {
        Step::Block { vbn: met, ordinal: here, .. } => {
            *met == vbn + index && ordinal.is_none_or(|first| *here == Some(first + index))
        }
        Step::Hole { .. } => false,
    };
    (0..).zip(steps).take_while(|&pair| follows(pair)).count()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;

    use super::*;
    use crate::record::entry::{Entry, EntryKind};
    use crate::record::transfer::{Builder, Transfer, TransferHeader};
    use crate::units::hash::{StreamHash, crc32c};
    use crate::units::numbers::{CpNumber, SequenceNumber};
    use crate::wire::updates::{Decoder, Run, inline_blocks};

    const VOLUME: VolumeNumber = VolumeNumber(0);
    const BLOCKS: u64 = 1 << 20;

    /// Blocks by VBN; `None` is a hole.
    type Image = Vec<(u64, Option<Vec<u8>>)>;

    /// Entries that were ordered in one CP, and the transfers they became.
    #[derive(Default)]
    struct Interval {
        buffers: Buffers,
        builder: Builder,
        transfers: Vec<Transfer>,
        rows: Vec<TransferRow>,
        ordinals: u64,
    }

    impl Interval {
        fn write(&mut self, offset: u64, data: &[u8]) {
            let entry = Entry {
                kind: EntryKind::Write,
                volume: VOLUME,
                offset,
                length: u32::try_from(data.len()).unwrap(),
                crc: crc32c(data),
            };
            self.push(entry, data);
        }

        fn no_data(&mut self, kind: EntryKind, offset: u64, length: u32) {
            self.push(Entry { kind, volume: VOLUME, offset, length, crc: 0 }, &[]);
        }

        fn push(&mut self, entry: Entry, data: &[u8]) {
            if !self.builder.has_room(to_u64(data.len())) {
                self.cut();
            }
            self.buffers.apply(&entry, data);
            self.builder.push(entry, Bytes::copy_from_slice(data));
        }

        fn cut(&mut self) {
            if self.builder.is_empty() {
                return;
            }
            let counter = to_u64(self.transfers.len()) + 1;
            let header = TransferHeader {
                id: TransferId { generation: 1, counter },
                cp: CpNumber(1),
                partition: 0,
                first_sequence: SequenceNumber(1),
                previous: TransferId::NONE,
                hash_before: StreamHash::ZERO,
                own_durable: TransferId::NONE,
            };
            let transfer = std::mem::take(&mut self.builder).finish(header);
            self.rows.push(TransferRow { id: transfer.id(), first_ordinal: self.ordinals });
            self.ordinals += transfer.ordinals();
            self.transfers.push(transfer);
        }

        /// Plans over a base full of 0xbb, sends, and builds the image as a hub would.
        fn send(mut self, inline: bool) -> (Counts, Image) {
            self.cut();
            let plan = Plan::build(&self.buffers, |_, _, page| {
                page.fill(0xbb);
                Ok::<(), Infallible>(())
            });
            let plan = Arc::new(plan.unwrap());
            let mut frames = Frames::new(plan, self.rows.into(), inline);
            let mut image = Vec::new();
            while let Some((volume, payload)) = frames.next_frame() {
                assert_eq!(volume, VOLUME);
                assert!(to_u64(payload.len()) <= CP_FRAME_BYTES_MAX);
                for run in Decoder::new(&payload, BLOCKS) {
                    apply_run(&run.unwrap(), &self.transfers, &mut image);
                }
            }
            (frames.counts(), image)
        }
    }

    fn apply_run(run: &Run<'_>, transfers: &[Transfer], image: &mut Image) {
        match *run {
            Run::Reference { vbn, count, transfer, ordinal } => {
                let mut at = transfers.iter().position(|t| t.id() == transfer).unwrap();
                let mut ordinal = ordinal;
                for n in 0..count {
                    while ordinal == transfers[at].ordinals() {
                        (at, ordinal) = (at + 1, 0);
                    }
                    let block = transfers[at].block(ordinal).unwrap();
                    image.push((vbn.0 + n, Some(block.to_vec())));
                    ordinal += 1;
                }
            }
            Run::Inline { vbn, blocks, .. } => {
                let blocks = inline_blocks(blocks).map(|(_, block)| Some(block.to_vec()));
                image.extend((vbn.0..).zip(blocks));
            }
            Run::Hole { vbn, count } => image.extend((vbn.0..vbn.0 + count).map(|n| (n, None))),
        }
    }

    fn counts(references: u64, inline: u64, holes: u64) -> [u64; 3] {
        [references, inline, holes]
    }

    /// Sends one interval both ways; the image is the same, and data is what it should be.
    fn sent(make: impl Fn(&mut Interval)) -> ([u64; 3], Image) {
        let build = || {
            let mut interval = Interval::default();
            make(&mut interval);
            interval
        };
        let (met, image) = build().send(false);
        let (control, again) = build().send(true);
        assert_eq!(image, again, "inline and by reference agree");
        assert_eq!(control.references, 0);
        assert_eq!(control.inline, met.references + met.inline);
        assert!(control.payload_bytes() >= control.inline * 4096);
        (counts(met.references, met.inline, met.holes), image)
    }

    fn mixed(fill: u8, rest: u8, known: std::ops::Range<usize>) -> Vec<u8> {
        let mut page = vec![rest; 4096];
        page[known].fill(fill);
        page
    }

    #[test]
    fn a_whole_block_goes_by_reference() {
        let (met, image) = sent(|i| i.write(8192, &[7; 4096]));
        assert_eq!(met, counts(1, 0, 0));
        assert_eq!(image, vec![(2, Some(vec![7; 4096]))]);
    }

    #[test]
    fn a_partial_block_goes_inline_over_what_was_there() {
        let (met, image) = sent(|i| i.write(8192 + 512, &[7; 512]));
        assert_eq!(met, counts(0, 1, 0));
        assert_eq!(image, vec![(2, Some(mixed(7, 0xbb, 512..1024)))]);
    }

    #[test]
    fn whole_then_partial_goes_inline() {
        let (met, image) = sent(|i| {
            i.write(0, &[7; 4096]);
            i.write(100, &[8; 10]);
        });
        assert_eq!(met, counts(0, 1, 0));
        assert_eq!(image, vec![(0, Some(mixed(8, 7, 100..110)))]);
    }

    #[test]
    fn partial_then_whole_goes_by_reference() {
        let (met, _) = sent(|i| {
            i.write(100, &[8; 10]);
            i.write(0, &[7; 4096]);
        });
        assert_eq!(met, counts(1, 0, 0));
    }

    #[test]
    fn two_partials_that_make_a_whole_go_inline() {
        let (met, image) = sent(|i| {
            i.write(0, &[1; 2048]);
            i.write(2048, &[2; 2048]);
        });
        assert_eq!(met, counts(0, 1, 0));
        assert_eq!(image, vec![(0, Some(mixed(2, 1, 2048..4096)))]);
    }

    #[test]
    fn whole_twice_is_one_reference_to_the_second() {
        let (met, image) = sent(|i| {
            i.write(0, &[1; 4096]);
            i.cut();
            i.write(0, &[2; 4096]);
        });
        assert_eq!(met, counts(1, 0, 0));
        assert_eq!(image, vec![(0, Some(vec![2; 4096]))]);
    }

    #[test]
    fn write_then_trim_is_a_hole_and_trim_then_write_a_reference() {
        let trim = |i: &mut Interval| i.no_data(EntryKind::Trim, 0, 8192);
        let (met, image) = sent(|i| {
            i.write(0, &[1; 4096]);
            trim(i);
        });
        assert_eq!((met, image), (counts(0, 0, 2), vec![(0, None), (1, None)]));
        let (met, image) = sent(|i| {
            trim(i);
            i.write(0, &[1; 4096]);
        });
        assert_eq!((met, image), (counts(1, 0, 1), vec![(0, Some(vec![1; 4096])), (1, None)]));
    }

    #[test]
    fn zeroes_are_holes_with_inline_edges() {
        let (met, image) = sent(|i| i.no_data(EntryKind::Zeroes, 4000, 4096 + 96 + 100));
        assert_eq!(met, counts(0, 2, 1));
        assert_eq!(image[0], (0, Some(mixed(0, 0xbb, 4000..4096))));
        assert_eq!(image[1], (1, None));
        assert_eq!(image[2], (2, Some(mixed(0, 0xbb, 0..100))));
    }

    /// A whole block of zeros counts in the ordinal and is sent as a hole (R15).
    #[test]
    fn zero_data_is_a_hole_and_the_ordinals_behind_it_stay_right() {
        let (met, image) = sent(|i| {
            i.write(0, &[0; 4096]);
            i.write(4096, &[5; 4096]);
            i.no_data(EntryKind::Zeroes, 8192, 4096);
            i.write(8192 + 10, &[0; 10]);
        });
        assert_eq!(met, counts(1, 0, 2));
        assert_eq!(image, vec![(0, None), (1, Some(vec![5; 4096])), (2, None)]);
    }

    #[test]
    fn the_last_block_and_odd_alignment() {
        let (met, _) = sent(|i| i.write((BLOCKS - 1) * 4096, &[5; 4096]));
        assert_eq!(met, counts(1, 0, 0));
        let data: Vec<u8> = (0..4096 * 3_u64).map(|n| n.to_le_bytes()[0] | 1).collect();
        let (met, image) = sent(|i| i.write(4096 + 123, &data));
        assert_eq!(met, counts(2, 2, 0), "two whole blocks, two edges");
        assert_eq!(image[1], (2, Some(data[4096 - 123..2 * 4096 - 123].to_vec())));
    }

    /// A request that the freeze cut: each CP refers to its own part only.
    #[test]
    fn a_request_across_the_freeze_counts_from_zero_in_each_cp() {
        let data: Vec<u8> = vec![9; 2 * 4096];
        let (first, _) = sent(|i| i.write(0, &data[..4096]));
        let (second, image) = sent(|i| i.write(4096, &data[4096..]));
        assert_eq!((first, second), (counts(1, 0, 0), counts(1, 0, 0)));
        assert_eq!(image, vec![(1, Some(vec![9; 4096]))]);
    }

    /// The promises of the wire, at the edge they are stated for.
    #[test]
    fn random_blocks_and_sequential_megabytes_stay_cheap() {
        let mut random = Interval::default();
        let mut vbn = 1_u64;
        for n in 0..4000_u64 {
            vbn =
                vbn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            random.write((vbn >> 20) % BLOCKS * 4096, &[1; 4096]);
            if n % 4 == 3 {
                random.cut();
            }
        }
        let (met, _) = random.send(false);
        assert!(met.references > 3900 && met.inline == 0);
        assert!(met.payload_bytes() <= 12 * met.references, "{met:?}");

        let mut sequential = Interval::default();
        for n in 0..16_u64 * 8 {
            sequential.write(n << 16, &[3; 1 << 16]);
        }
        let (met, image) = sequential.send(false);
        assert_eq!((met.references, image.len()), (2048, 2048));
        assert!(met.payload_bytes() <= 64 * 8, "{met:?}");
    }

    /// Frames are cut at their bound and nothing is lost between two.
    #[test]
    fn many_inline_blocks_take_many_frames() {
        let (met, image) = sent(|i| {
            for n in 0..300_u64 {
                i.write(n * 4096 + 1, &[4; 4000]);
            }
        });
        assert_eq!(met, counts(0, 300, 0));
        let vbns: Vec<u64> = image.iter().map(|(vbn, _)| *vbn).collect();
        assert_eq!(vbns, (0..300).collect::<Vec<_>>());
    }
}
