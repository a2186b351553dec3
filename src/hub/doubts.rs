//! What may be missing here of a source's acknowledged history, and how it is known to be here again.
//!
//! A part of the lane's cursors. Three things raise it: the log that was held here was lost (a [`Mark`]),
//! rot in the NVRAM may have taken records (R3), or memory that was acknowledged out of (`ack =
//! "received"`) is gone with the process. Each is known since a boot of the source. What a source holds in
//! its NVRAM is of the boots that ran with it: if that boot comes, it sends again what it holds, and once
//! that is durable nothing is missing. Another boot may have been started without its NVRAM, so what it
//! lacks as well nobody can send: then this stands until a CP shows all that it holds.
//!
//! The boot is durable: in the mark, or, once another one is recorded, in the source's row.

use std::sync::Arc;

use super::refill::{self, Mark};
use crate::units::numbers::{Generation, SequenceNumber};

/// What is said of a source that has writes answered before they are on this hub's medium, from a
/// start of the hub until the source was here.
pub const UNSYNCED: &str = "its ack is \"received\": what was acknowledged and was only in this hub's \
     memory when that ended may be missing here; the source sends it again when it connects";

/// What may be missing of one source.
#[derive(Debug, Clone, Default)]
pub struct Doubts {
    /// Acknowledged history that is or may be missing here, in words, until the source has said in
    /// a session what it holds itself.
    pub missing: Option<Arc<str>>,
    /// What was held of its log was lost, and the mark of that still stands (R20).
    pub log_lost: Option<Mark>,
    /// Bytes that rot in the NVRAM may have taken.
    pub missing_bytes: u32,
    /// What was acknowledged as received may have gone with this hub's memory.
    pub unsynced: bool,
    /// The last boot that was here before the rot was found, or the memory was gone.
    pub since: Option<Generation>,
    /// The source was started anew since: it may have lost the same.
    pub there_too: bool,
    /// The last write that the source held when it came: what is missing is here once that is.
    owed: Option<SequenceNumber>,
    /// The boot that is in session held what is owed; or a CP shows all of that boot.
    owes_all: bool,
}

impl Doubts {
    /// What was held of its log was lost; `newest` is the last boot that was here.
    pub fn lost_log(&mut self, mark: Mark, newest: Generation) {
        self.there_too |= mark.generation != newest;
        self.log_lost = Some(mark);
        self.missing = self.lost_in_words().map(Into::into);
    }

    /// Rot that a start found may have taken so many bytes, known since that boot.
    pub fn may_miss(&mut self, bytes: u32, since: Generation, newest: Generation) {
        if bytes == 0 {
            return;
        }
        self.missing_bytes = bytes;
        self.say(since, newest, || {
            format!(
                "at most {bytes} bytes of acknowledged history may be missing: the NVRAM is \
                 damaged; the source sends them again when it connects"
            )
        });
    }

    /// What this hub had in memory is gone, and was acknowledged as received (`ack = "received"`).
    pub fn forgot(&mut self, since: Generation, newest: Generation) {
        self.unsynced = true;
        self.say(since, newest, || UNSYNCED.to_owned());
    }

    fn say(&mut self, since: Generation, newest: Generation, what: impl FnOnce() -> String) {
        self.since = Some(since);
        self.there_too |= since != newest;
        if self.missing.is_none() {
            self.missing = Some(self.with_there_too(what()).into());
        }
    }

    /// A record was lost here: the first one is told.
    pub fn lose(&mut self, what: &str) {
        self.missing.get_or_insert_with(|| what.into());
    }

    /// What was lost of its log, in words.
    pub fn lost_in_words(&self) -> Option<String> {
        self.log_lost.as_ref().map(|mark| self.with_there_too(mark.what().to_owned()))
    }

    fn with_there_too(&self, what: String) -> String {
        if self.there_too { format!("{what}; {}", refill::LOST_THERE_TOO) } else { what }
    }

    fn stands(&self) -> bool {
        self.log_lost.is_some() || self.missing_bytes > 0 || self.unsynced
    }

    /// The source is in session, with that boot: what it holds beyond this end, up to there, it sends
    /// again.
    pub fn welcomed(&mut self, last: SequenceNumber, generation: Generation) {
        if !self.stands() {
            self.missing = None;
            return;
        }
        // Also what it held when it came before: until then nothing of it is known to be here.
        self.owed = self.owed.max(Some(last));
        let marked = self.log_lost.as_ref().map(|mark| mark.generation);
        self.owes_all = [marked, self.since].into_iter().flatten().all(|boot| boot == generation);
        if !self.owes_all && !self.there_too {
            self.there_too = true;
            let what = self.missing.take();
            let what = what.map_or_else(String::new, |what| what.to_string());
            self.missing = Some(self.with_there_too(what).into());
        }
    }

    /// A CP was published that shows everything up to there.
    pub fn shown(&mut self, last: SequenceNumber) {
        self.owes_all |= self.owed.is_some_and(|owed| owed <= last);
    }

    /// Everything up to there is durable here. Says whether there are durable notes that are to go: the
    /// mark of a lost log, and those in the source's row.
    pub fn has_come(&mut self, durable: SequenceNumber) -> (bool, bool) {
        if !self.owes_all || self.owed.is_none_or(|last| last > durable) {
            return (false, false);
        }
        self.end()
    }

    /// What was lost, or may have been, is here or of no interest any more. Says what was noted.
    pub fn end(&mut self) -> (bool, bool) {
        let ended = std::mem::take(self);
        (ended.log_lost.is_some(), ended.missing_bytes > 0 || ended.since.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Generation = Generation { number: 1, id: 7 };
    const TWO: Generation = Generation { number: 2, id: 8 };
    const FOUR: SequenceNumber = SequenceNumber(4);

    fn all() -> [Doubts; 3] {
        let [mut rot, mut memory, mut log] = <[Doubts; 3]>::default();
        rot.may_miss(512, ONE, ONE);
        memory.forgot(ONE, ONE);
        log.lost_log(Mark { generation: ONE, what: None }, ONE);
        [rot, memory, log]
    }

    /// The history: 5 was acknowledged and is lost here; its source loses it too, comes with its next
    /// boot, and ends at 4. Nobody can send 5, and it is said until a CP shows what that boot holds.
    #[test]
    fn another_boot_is_not_taken_for_one_that_holds_what_is_owed() {
        for mut doubts in all() {
            doubts.welcomed(FOUR, TWO);
            assert_eq!(doubts.has_come(FOUR), (false, false), "{doubts:?}");
            let said = doubts.missing.clone().unwrap();
            assert!(said.ends_with(refill::LOST_THERE_TOO), "{said}");
            // It comes again: the same is said once.
            doubts.welcomed(FOUR, TWO);
            assert_eq!(doubts.missing.as_deref(), Some(&*said));
            doubts.shown(SequenceNumber(3));
            assert_eq!(doubts.has_come(FOUR), (false, false), "not what it held");
            doubts.shown(FOUR);
            assert_ne!(doubts.has_come(FOUR), (false, false));
            assert_eq!((doubts.missing, doubts.unsynced, doubts.missing_bytes), (None, false, 0));
        }
    }

    /// Control: the boot that held it sends it, and nothing is missing once that is durable.
    #[test]
    fn the_same_boot_sends_what_is_owed() {
        for mut doubts in all() {
            doubts.welcomed(SequenceNumber(5), ONE);
            assert_eq!(doubts.has_come(FOUR), (false, false), "it has not come yet");
            assert_ne!(doubts.has_come(SequenceNumber(5)), (false, false));
            assert_eq!(doubts.missing, None);
        }
    }

    /// A start that finds another boot recorded says so at once.
    #[test]
    fn a_boot_that_was_here_since_is_said_at_the_start() {
        let mut doubts = Doubts::default();
        doubts.forgot(ONE, TWO);
        assert!(doubts.missing.clone().unwrap().ends_with(refill::LOST_THERE_TOO));
        doubts.welcomed(FOUR, TWO);
        assert_eq!(doubts.has_come(FOUR), (false, false));
    }

    #[test]
    fn without_a_doubt_a_session_ends_what_was_told() {
        let mut doubts = Doubts::default();
        doubts.lose("record 7");
        doubts.lose("record 8");
        assert_eq!(doubts.missing.as_deref(), Some("record 7"));
        doubts.welcomed(FOUR, TWO);
        assert_eq!((doubts.missing.clone(), doubts.has_come(FOUR)), (None, (false, false)));
    }
}
