//! Rare branches that the seeds have to reach: each is counted, and a test fails for those that
//! were never met.

use std::collections::BTreeMap;

/// A rare branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Probe {
    /// A source lost its power in the middle of a device call.
    SourceCutInside,
    /// The hub did.
    HubCutInside,
    SourceKilled,
    HubKilled,
    /// Frames under way were cut.
    LinkCut,
    LinkHeld,
    Paused,
    /// A restart came back with less than was ordered.
    UnansweredLost,
    /// A starting source adopted what only the hub held (R1).
    Adopted,
    /// A mark of being alone was made, and cleared.
    MarkSet,
    MarkCleared,
    /// A client was answered without the hub.
    AnsweredAlone,
    /// A pass brought the image up.
    Passed,
    /// Both partitions were full.
    BothFull,
    /// The image of a CP was published while its source was down.
    PublishedAlone,
    /// A CP was built by replay.
    Replayed,
    /// The hub's ring gave room back under a header.
    RingReleased,
    /// A source failed on an I/O error, or a source of the hub was faulted by one.
    IoError,
    /// A source was failed over, and served at the hub.
    Promoted,
    /// A hub that was started again went on with a failover by itself (R13).
    FailoverResumed,
    /// Damage showed behind the fence, and what it took was given up, or the source's side kept (R13).
    WayOn,
    /// And given back to its filer.
    GivenBack,
    /// What a source had answered alone was given up.
    SplitBrain,
    /// A source answered after it was failed over.
    AnsweredLate,
    /// A pinned image was read again after newer CPs.
    PinnedRead,
    /// Frames of an older connection came behind those of a newer one.
    OldConnection,
    /// A thread took its time.
    Slow,
    /// A source was started from an old copy of its state.
    OldCopy,
    /// Under writeback a flush was answered.
    Flushed,
    /// Writers waited for room in the own pool.
    PoolFull,
    /// A CP waited for room at the hub.
    HubFull,
    /// A block was mended by the other leg of a mirror.
    LegRepaired,
    /// A leg of the hub's mirror was put out of use.
    LegOut,
    /// A block was mended by the other end.
    Mended,
    /// Rot in a ring of the hub, of a source, in a source log.
    RotOfHubRing,
    RotOfSourceRing,
    RotOfLog,
    /// The hub said that something may be missing; something was, and its source was given up.
    RotTold,
    RotLost,
    /// Both ends had written, or the hub could not apply its log, and the source's side was kept.
    KeptSource,
    /// What was sent behind a pass became the log.
    BehindJoined,
    /// It was dropped; it had CPs in it that were done alone: both where passes are outrun.
    BehindDropped,
    Backlog,
    /// A client met a larger volume: only in runs where they grow.
    Grown,
}

/// All of them but [`Probe::Grown`], [`Probe::KeptSource`], [`Probe::Backlog`] and [`Probe::BehindDropped`], which have
/// runs of their own.
pub(super) const ALL: &[Probe] = &[
    Probe::SourceCutInside,
    Probe::HubCutInside,
    Probe::SourceKilled,
    Probe::HubKilled,
    Probe::LinkCut,
    Probe::LinkHeld,
    Probe::Paused,
    Probe::UnansweredLost,
    Probe::Adopted,
    Probe::MarkSet,
    Probe::MarkCleared,
    Probe::AnsweredAlone,
    Probe::Passed,
    Probe::BothFull,
    Probe::PublishedAlone,
    Probe::Replayed,
    Probe::RingReleased,
    Probe::IoError,
    Probe::PinnedRead,
    Probe::Promoted,
    Probe::FailoverResumed,
    Probe::WayOn,
    Probe::GivenBack,
    Probe::SplitBrain,
    Probe::AnsweredLate,
    Probe::OldConnection,
    Probe::Slow,
    Probe::Flushed,
    Probe::OldCopy,
    Probe::PoolFull,
    Probe::HubFull,
    Probe::LegRepaired,
    Probe::LegOut,
    Probe::Mended,
    Probe::RotOfHubRing,
    Probe::RotOfSourceRing,
    Probe::RotOfLog,
    Probe::RotTold,
    Probe::RotLost,
    Probe::BehindJoined,
];

/// How often each was met.
#[derive(Debug, Clone, Default)]
pub(super) struct Probes(pub(super) BTreeMap<Probe, u64>);

impl Probes {
    pub(super) fn hit(&mut self, probe: Probe) {
        *self.0.entry(probe).or_default() += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (probe, count) in &other.0 {
            *self.0.entry(*probe).or_default() += count;
        }
    }

    pub(super) fn never(&self) -> Vec<Probe> {
        ALL.iter().copied().filter(|probe| !self.0.contains_key(probe)).collect()
    }
}
