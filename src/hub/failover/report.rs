//! What a failover did, or would do, in words. Pure.

use std::time::Duration;

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
    /// Everything up to a gap that the administrator has accepted.
    UpToGap(Gap),
    /// The image held everything already.
    NothingToReplay,
    /// It was handed over in that epoch, and whoever was to take over has never said that it did.
    TakenBack(Epoch),
}

impl Outcome {
    /// The stable word.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::UpToGap(_) => "up-to-gap",
            Self::NothingToReplay => "nothing-to-replay",
            Self::TakenBack(_) => "taken-back",
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
    /// What was held of its log was lost, and has not come again: what that was.
    pub log_lost: Option<String>,
    /// The wait for the source to hold its reads was skipped.
    pub stale_reads: bool,
    /// Volumes that were not mirrored to the end, each a sentence (R20).
    pub left_out: Vec<String>,
    /// Clients are served, and the log is still being applied behind.
    pub behind: bool,
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
        let gap = matches!(self.outcome, Outcome::UpToGap(_));
        let left_out = !self.left_out.is_empty();
        let damaged = self.nvram_damaged_bytes > 0 || self.log_lost.is_some();
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
        }];
        out.extend(self.left_out.iter().cloned());
        out.push(match self.alone {
            Alone::Nothing if matches!(self.outcome, Outcome::UpToGap(_)) => {
                "writes behind the gap were acknowledged and are lost".to_owned()
            }
            // What was lost is said below.
            Alone::Nothing if self.log_lost.is_some() || self.nvram_damaged_bytes > 0 => {
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
        out.extend(self.log_lost.clone());
        if self.nvram_damaged_bytes > 0 {
            let bytes = self.nvram_damaged_bytes;
            out.push(format!("at most {bytes} bytes may be missing: the NVRAM was damaged"));
        }
        if self.stale_reads {
            out.push(
                "the source may still answer reads, of older data, until it hears of this".into(),
            );
        }
        out
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
            stale_reads: false,
            left_out: Vec::new(),
            behind: false,
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
        dry.nvram_damaged_bytes = 512;
        dry.stale_reads = true;
        assert_eq!(dry.sentences().len(), 4);
        assert!(!dry.sentences().join("; ").contains("no acknowledged write is lost"));
    }
}
