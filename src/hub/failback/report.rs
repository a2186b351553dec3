//! What a failback did, or would do, in words. Pure.

use std::time::Duration;

use super::Side;
use crate::pool::rows::SourceRow;
use crate::units::names::{KeptName, SourceName};
use crate::units::numbers::{CpNumber, Epoch, SequenceNumber};

/// What a failback came to, or would come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Nothing was done: this is what would be.
    pub dry_run: bool,
    /// Whose state counts.
    pub side: Side,
    /// The epoch in which the filer is primary; its id is zero in a dry run.
    pub epoch: Epoch,
    /// The CP that both ends count from. In a dry run the newest one here.
    pub cp: CpNumber,
    /// Rounds, the last one among them.
    pub rounds: u32,
    /// From the holding of writers to the filer's Hello, or until now.
    pub pause: Duration,
    /// The filer has said Hello in the new epoch.
    pub serves: bool,
    /// The CP on the filer that keeps what it wrote by itself.
    pub kept: Option<KeptName>,
    /// The CP on this hub that keeps what was written here.
    pub kept_here: Option<KeptName>,
    /// The filer's last entry.
    pub last: SequenceNumber,
    /// What was written here since the failover: the last entry before and the last one of all.
    pub here: (SequenceNumber, SequenceNumber),
    /// What was written here is known up to the last CP only: the NVRAM behind it is gone.
    pub nvram_lost: bool,
}

impl Report {
    /// Of one that has not begun.
    pub(super) fn before(row: &SourceRow, side: Side, dry_run: bool) -> Self {
        Self {
            dry_run,
            side,
            epoch: Epoch { number: row.epoch.number + 1, id: 0 },
            cp: row.applied,
            rounds: 0,
            pause: Duration::ZERO,
            serves: false,
            kept: None,
            kept_here: None,
            last: SequenceNumber(0),
            here: Default::default(),
            nvram_lost: false,
        }
    }

    /// Entries that clients wrote here since the failover.
    fn written_here(&self) -> u64 {
        let (from, to) = self.here;
        to.0.saturating_sub(from.0)
    }

    /// What was done, to what end, and what is where now: each a sentence without its stop.
    pub fn sentences(&self, source: &SourceName) -> Vec<String> {
        let mut out = match self.side {
            Side::Hub => self.of_hub(),
            Side::Source => self.of_source(source),
        };
        if self.serves {
            let pause_ms = self.pause.as_millis();
            out.push(format!("the filer is primary; clients were held for {pause_ms} ms"));
        } else if !self.dry_run {
            out.push("the filer has not said yet that it is primary".to_owned());
        }
        out
    }

    fn of_hub(&self) -> Vec<String> {
        let (epoch, cp, rounds) = (self.epoch.number, self.cp, self.rounds);
        let mut out = vec![if self.dry_run {
            let written = self.written_here();
            format!(
                "would be given back in epoch {epoch}: what is here counts, up to entry {}; entries \
                 written here since the failover: {written}",
                self.here.1
            )
        } else {
            format!("given back in epoch {epoch} with CP {cp}, after {rounds} rounds")
        }];
        if let Some(name) = &self.kept {
            let is = if self.dry_run { "would be" } else { "is" };
            out.push(format!("what its filer wrote by itself {is} kept there as CP {name}"));
        }
        out
    }

    fn of_source(&self, source: &SourceName) -> Vec<String> {
        let (epoch, cp, last) = (self.epoch.number, self.cp, self.last);
        let written = self.written_here();
        let (from, to) = (self.here.0.next(), self.here.1);
        let lost = match written {
            0 => "nothing was written here since the failover".to_owned(),
            1 => format!("the image loses entry {to}, which was written here"),
            _ => {
                format!("the image loses {written} entries ({from} to {to}) that were written here")
            }
        };
        let mut out = if self.dry_run {
            let what = format!(
                "would be given back in epoch {epoch}: what its filer has counts, up to its entry \
                 {last}"
            );
            vec![what, lost]
        } else {
            let what = format!(
                "given back in epoch {epoch} behind CP {cp}: what its filer has counts, up to its \
                 entry {last}, and the image is brought up to it now"
            );
            vec![what, lost]
        };
        if self.nvram_lost {
            out.push(
                "what clients wrote here behind its last CP was lost with its NVRAM".to_owned(),
            );
        }
        if let Some(name) = &self.kept_here {
            let would = if self.dry_run { "would stay" } else { "stays" };
            out.push(format!(
                "all that was served here {would} readable as {source}/VOLUME@{name}"
            ));
        }
        out
    }

    /// What to do next; empty if nothing.
    pub fn next_step(&self, source: &SourceName, filer: &SourceName) -> String {
        let keep = if self.side == Side::Source {
            " --keep source"
        } else if self.kept.as_ref().is_some_and(|name| name.as_str().starts_with("split-")) {
            " --keep hub"
        } else {
            ""
        };
        if self.dry_run {
            let to = if filer == source { String::new() } else { format!(" --to {filer}") };
            return format!("`mirrorhub failback {source}{to}{keep}` does it");
        }
        if !self.serves {
            return format!("start `mirrorhub source` of {filer}: it takes over by itself");
        }
        match &self.kept_here {
            Some(name) => format!(
                "`mirrorhub status {source}` says `in-sync` once the image is brought up; \
                 `mirrorhub drop {source}@{name}` when nobody needs it any more"
            ),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            dry_run: false,
            side: Side::Source,
            epoch: Epoch { number: 3, id: 1 },
            cp: CpNumber(9),
            rounds: 1,
            pause: Duration::from_millis(80),
            serves: true,
            kept: None,
            kept_here: Some("split-2".parse().unwrap()),
            last: SequenceNumber(70),
            here: (SequenceNumber(40), SequenceNumber(49)),
            nvram_lost: false,
        }
    }

    #[test]
    fn what_the_image_loses_is_said_before_and_after() {
        let name: SourceName = "filer-a".parse().unwrap();
        let done = report();
        let said = done.sentences(&name).join("\n");
        assert!(said.contains("9 entries (41 to 49)"), "{said}");
        assert!(said.contains("filer-a/VOLUME@split-2"), "{said}");
        assert!(said.contains("held for 80 ms"), "{said}");
        assert!(done.next_step(&name, &name).contains("mirrorhub drop filer-a@split-2"));
        let dry = Report { dry_run: true, serves: false, ..report() };
        let said = dry.sentences(&name).join("\n");
        assert!(said.contains("would be given back") && said.contains("9 entries"), "{said}");
        assert!(!said.contains("has not said"), "{said}");
        assert_eq!(
            dry.next_step(&name, &name),
            "`mirrorhub failback filer-a --keep source` does it"
        );
        let away = Report { serves: false, ..report() };
        assert!(away.next_step(&name, &name).contains("start `mirrorhub source`"));
        let lost = Report { nvram_lost: true, ..report() };
        assert!(lost.sentences(&name).join("\n").contains("lost with its NVRAM"));
        assert!(!done.sentences(&name).join("\n").contains("lost with its NVRAM"));
        let idle = Report { here: (SequenceNumber(40), SequenceNumber(40)), ..report() };
        assert!(idle.sentences(&name)[1].contains("nothing was written here"));
    }

    #[test]
    fn the_hubs_side_names_what_the_filer_keeps() {
        let name: SourceName = "filer-a".parse().unwrap();
        let kept = Some("split-2".parse().unwrap());
        let hub = Report { side: Side::Hub, kept, kept_here: None, ..report() };
        let said = hub.sentences(&name).join("\n");
        assert!(said.contains("after 1 rounds") && said.contains("kept there as CP split-2"));
        assert_eq!(hub.next_step(&name, &name), "");
        let dry = Report { dry_run: true, ..hub };
        let other = "filer-b".parse().unwrap();
        assert_eq!(
            dry.next_step(&name, &other),
            "`mirrorhub failback filer-a --to filer-b --keep hub` does it"
        );
    }
}
