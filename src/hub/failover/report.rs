//! What a failover did, or would do, in words. Pure.

use std::time::Duration;

use crate::hub::doubts::UNSYNCED;
use crate::hub::refill::LOST_THERE_TOO;
use crate::hub::replay::{Extent, Gap};
use crate::record::marks::Place;
use crate::units::numbers::{CpNumber, Epoch};

/// Why a failover was not done, or not to its end, and the way on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Why.
    pub reason: String,
    /// The way on.
    pub next_step: String,
}

impl Refusal {
    /// From its two parts.
    pub fn new(reason: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self { reason: reason.into(), next_step: next_step.into() }
    }
}

/// How much of what was acknowledged the image holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Everything this hub has acknowledged, and some of it was replayed.
    Complete,
    /// Everything up to a gap that the administrator has accepted: what can be read ends there, or
    /// what was damaged behind it was cut off by a start.
    UpToGap(Gap),
    /// The image held everything already.
    NothingToReplay,
    /// It was handed over in that epoch, and whoever was to take over has never said that it did.
    TakenBack(Epoch),
    /// It was promoted before, and what its lost NVRAM held is given up; where that lies now, if
    /// there still was a file.
    NvramGivenUp(Option<String>),
}

impl Outcome {
    /// The stable word.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::UpToGap(_) => "up-to-gap",
            Self::NothingToReplay => "nothing-to-replay",
            Self::TakenBack(_) => "taken-back",
            Self::NvramGivenUp(_) => "nvram-given-up",
        }
    }
}

/// What the source may have acknowledged that never came here (R12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alone {
    /// Nothing: mode sync with `stop` acknowledges nothing alone.
    Nothing,
    /// Possible by its policy; it was last heard so long ago, if ever since the hub started.
    Possible(Option<Duration>),
    /// Its policy is not known here.
    Unknown(Option<Duration>),
}

/// What a failover did, or would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Nothing was done: this is what would be.
    pub dry_run: bool,
    /// How much the image holds.
    pub outcome: Outcome,
    /// The new epoch; its id is zero in a dry run.
    pub epoch: Epoch,
    /// The CP that shows it. In a dry run the least number that it can get.
    pub cp: CpNumber,
    /// The last write of the image.
    pub last: Place,
    /// What was replayed.
    pub replayed: Extent,
    /// What cannot be excluded.
    pub alone: Alone,
    /// Bytes of the NVRAM that were damaged when the hub started, whoever they belonged to.
    pub nvram_damaged_bytes: u64,
    /// What was held of its log was lost as well, beside the gap: what that was.
    pub log_lost: Option<String>,
    /// What was acknowledged as received may have gone with the hub's memory: the hub was started
    /// since, and the source was not here.
    pub unsynced: bool,
    /// The source was started anew since: it may have lost the same.
    pub there_too: bool,
    /// The wait for the source to hold its reads was skipped.
    pub stale_reads: bool,
    /// Volumes that were not mirrored to the end, each a sentence (R20).
    pub left_out: Vec<String>,
    /// Clients are served, and the log is still being applied behind.
    pub behind: bool,
    /// Of a dry run: what a failover that is asked for the same would refuse, though it says where
    /// the image would end.
    pub refused: Option<Refusal>,
}

fn heard(silent: Option<Duration>) -> String {
    match silent {
        Some(silent) => format!("it was last heard {} s ago", silent.as_secs()),
        None => "it was not heard since this hub was started".to_owned(),
    }
}

impl Report {
    /// Whether the loss of an acknowledged write is known or cannot be excluded.
    pub fn may_be_lost(&self) -> bool {
        let gap = matches!(self.outcome, Outcome::UpToGap(_) | Outcome::NvramGivenUp(_));
        let left_out = !self.left_out.is_empty();
        let damaged = self.nvram_damaged_bytes > 0 || self.log_lost.is_some() || self.unsynced;
        gap || left_out || self.alone != Alone::Nothing || damaged
    }

    /// What was done, to what end, and what cannot be excluded: each a sentence without its stop.
    pub fn sentences(&self) -> Vec<String> {
        let Place { transfer, sequence, .. } = self.last;
        let (epoch, cp) = (self.epoch.number, self.cp);
        let Extent { entries, bytes, .. } = self.replayed;
        let would = if self.dry_run { "a failover would end" } else { "failed over" };
        let replayed =
            if self.behind { "are served from the log and applied behind" } else { "replayed" };
        let end =
            format!("with entry {sequence} (transfer {transfer}) as CP {cp} in epoch {epoch}");
        let mut out = vec![match &self.outcome {
            Outcome::Complete => {
                format!("{would} {end}: complete, {entries} entries of {bytes} bytes {replayed}")
            }
            Outcome::UpToGap(gap) => format!(
                "{would} {end}: complete up to a gap, {entries} entries of {bytes} bytes {replayed}; \
                 {gap}"
            ),
            Outcome::NothingToReplay => format!("{would} {end}: nothing to replay"),
            Outcome::TakenBack(Epoch { number, .. }) => format!(
                "{would} {end}: taken back from the hand-over of epoch {number}, which no filer has \
                 taken up here; everything that this hub has acknowledged is in that CP"
            ),
            Outcome::NvramGivenUp(aside) => return self.of_lost_nvram(aside.as_deref()),
        }];
        out.extend(self.left_out.iter().cloned());
        out.push(match self.alone {
            Alone::Nothing if matches!(self.outcome, Outcome::UpToGap(_)) => {
                "writes that were acknowledged behind the gap are lost".to_owned()
            }
            // What was lost is said below.
            Alone::Nothing
                if self.log_lost.is_some() || self.nvram_damaged_bytes > 0 || self.unsynced =>
            {
                "nothing was acknowledged without this hub".to_owned()
            }
            Alone::Nothing if !self.left_out.is_empty() => {
                "no acknowledged write to another volume is lost".to_owned()
            }
            Alone::Nothing => "no acknowledged write is lost".to_owned(),
            Alone::Possible(silent) => format!(
                "that is as far as this hub was told; the source may have gone on alone, {}",
                heard(silent)
            ),
            Alone::Unknown(silent) => format!(
                "whether the source has acknowledged more by itself cannot be known here, {}",
                heard(silent)
            ),
        });
        self.doubts(&mut out);
        out
    }

    /// What cannot be excluded beside what the source did alone, and what a dry run is refused for.
    fn doubts(&self, out: &mut Vec<String>) {
        out.extend(self.log_lost.clone());
        if self.unsynced {
            out.push(UNSYNCED.to_owned());
        }
        if self.nvram_damaged_bytes > 0 {
            let bytes = self.nvram_damaged_bytes;
            out.push(format!("at most {bytes} bytes may be missing: the NVRAM was damaged"));
        }
        if self.there_too {
            out.push(LOST_THERE_TOO.to_owned());
        }
        if self.stale_reads {
            out.push(
                "the source may still answer reads, of older data, until it hears of this".into(),
            );
        }
        if let Some(refused) = &self.refused {
            out.push(format!("but as asked for it is refused: {}", refused.reason));
        }
    }

    fn of_lost_nvram(&self, aside: Option<&str>) -> Vec<String> {
        let (does, cp) = (if self.dry_run { "would be" } else { "is" }, self.cp);
        let first = format!(
            "the image of CP {cp}, up to entry {}, {does} served on, in epoch {}",
            self.last.sequence, self.epoch.number
        );
        let lost =
            "writes that clients were acknowledged here behind that CP were only in the NVRAM \
                    that is lost: they are given up"
                .to_owned();
        let where_it_is = aside.map(|path| format!("what is left of that NVRAM stays as {path}"));
        [first, lost].into_iter().chain(where_it_is).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::hash::StreamHash;
    use crate::units::numbers::{SequenceNumber, TransferId};

    fn report(outcome: Outcome, alone: Alone) -> Report {
        Report {
            dry_run: false,
            outcome,
            epoch: Epoch { number: 2, id: 9 },
            cp: CpNumber(7),
            last: Place {
                transfer: TransferId { generation: 1, counter: 5 },
                sequence: SequenceNumber(40),
                hash: StreamHash::ZERO,
            },
            replayed: Extent { entries: 3, bytes: 12288, cp: CpNumber(6) },
            alone,
            nvram_damaged_bytes: 0,
            log_lost: None,
            unsynced: false,
            there_too: false,
            stale_reads: false,
            left_out: Vec::new(),
            behind: false,
            refused: None,
        }
    }

    /// "No acknowledged write is lost" is said in one case only.
    #[test]
    fn each_outcome_has_its_own_words() {
        let gap = Gap { reaches: Place::default(), reason: "it is torn".into() };
        let taken_back = Outcome::TakenBack(Epoch { number: 1, id: 1 });
        let up_to_gap = Outcome::UpToGap(gap);
        let outcomes = [Outcome::Complete, up_to_gap, Outcome::NothingToReplay, taken_back];
        let silent = Some(Duration::from_secs(12));
        let mut all = std::collections::BTreeSet::new();
        for outcome in &outcomes {
            for alone in [Alone::Nothing, Alone::Possible(silent), Alone::Unknown(None)] {
                let text = report(outcome.clone(), alone).sentences().join("; ");
                let promised = text.contains("no acknowledged write is lost");
                let may = alone == Alone::Nothing && !matches!(outcome, Outcome::UpToGap(_));
                assert_eq!(promised, may, "{text}");
                assert_eq!(text.contains("12 s ago"), alone == Alone::Possible(silent), "{text}");
                assert_eq!(text.contains("cannot be known"), alone == Alone::Unknown(None));
                assert!(text.contains("as CP 7 in epoch 2") && text.contains("entry 40"), "{text}");
                assert!(all.insert(text));
            }
        }
        let mut dry = report(Outcome::Complete, Alone::Nothing);
        dry.dry_run = true;
        assert!(dry.sentences()[0].starts_with("a failover would end"));
        let mut lost = report(Outcome::Complete, Alone::Nothing);
        lost.log_lost = Some(crate::hub::refill::LOST.to_owned());
        let text = lost.sentences().join("; ");
        assert!(lost.may_be_lost() && text.contains("lost before an import"), "{text}");
        assert!(!text.contains("no acknowledged write is lost"), "{text}");
        let mut received = report(Outcome::Complete, Alone::Nothing);
        (received.unsynced, received.there_too) = (true, true);
        let text = received.sentences().join("; ");
        assert!(received.may_be_lost() && text.contains("memory"), "{text}");
        assert!(text.ends_with(LOST_THERE_TOO), "{text}");
        assert!(!text.contains("no acknowledged write is lost"), "{text}");
        for aside in [None, Some("promoted/a.nvram.lost-1".to_owned())] {
            let lost = report(Outcome::NvramGivenUp(aside.clone()), Alone::Nothing);
            let text = lost.sentences().join("; ");
            assert!(lost.may_be_lost() && text.contains("CP 7") && text.contains("given up"));
            assert_eq!(text.contains("lost-1"), aside.is_some(), "{text}");
            assert!(!text.contains("no acknowledged write is lost"), "{text}");
        }
        let mut refused = report(Outcome::Complete, Alone::Nothing);
        refused.refused = Some(Refusal::new("a volume", "--accept-gap"));
        assert!(refused.sentences().join("; ").ends_with("it is refused: a volume"));
        dry.nvram_damaged_bytes = 512;
        dry.stale_reads = true;
        assert_eq!(dry.sentences().len(), 4);
        assert!(!dry.sentences().join("; ").contains("no acknowledged write is lost"));
    }
}
