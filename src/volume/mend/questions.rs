//! Questions for the other end that wait for an answer.
//!
//! A thread that reads asks ([`Questions::ask`]) and waits, a bounded time; whoever has the
//! connection hands the answer in ([`Questions::answer`]). Answers that nobody waits for any more
//! are dropped. At most [`PLACES_ASKED_MAX`] wait at a time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::Fetched;
use crate::limits::{PLACE_SECONDS_MAX, PLACES_ASKED_MAX};
use crate::units::hash::ContentHash;
use crate::units::machine::{self, Bell};
use crate::volume::error::TreePlace;
use crate::wire::message::WantPlace;
use crate::wire::pull::{AnswerDecoder, AnswerError, Item};

/// Answers by token; none as long as it is waited for.
type Answers = BTreeMap<u64, Option<Bytes>>;

/// The questions of one connection's end.
#[derive(Debug, Default)]
pub struct Questions {
    next: AtomicU64,
    /// Those that nobody answered.
    unanswered: AtomicU64,
    answers: (Mutex<Answers>, Bell),
}

/// Takes the question back when its asker goes.
struct Waiting<'a>(&'a Questions, u64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

impl Questions {
    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.answers.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a place: `send` takes the question to the other end, or says why it cannot. Blocks.
    pub fn ask(
        &self,
        place: TreePlace,
        hash: ContentHash,
        send: impl FnOnce(WantPlace) -> Result<(), String>,
    ) -> Result<Fetched, String> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let TreePlace { volume, level, index } = place;
        {
            let mut waiting = self.lock();
            if waiting.len() >= PLACES_ASKED_MAX {
                return Err("too many places are being asked for".to_owned());
            }
            waiting.insert(token, None);
        }
        let _waiting = Waiting(self, token);
        send(WantPlace { token, volume, level, index, hash })?;
        let payload = self.wait(token)?;
        take(level, &payload)
    }

    fn wait(&self, token: u64) -> Result<Bytes, String> {
        let until = machine::now() + Duration::from_secs(PLACE_SECONDS_MAX);
        let mut waiting = self.lock();
        loop {
            if let Some(answer) = waiting.get_mut(&token).and_then(Option::take) {
                return Ok(answer);
            }
            let left = until.saturating_duration_since(machine::now());
            if left.is_zero() || !waiting.contains_key(&token) {
                self.unanswered.fetch_add(1, Ordering::Relaxed);
                return Err("the other end did not answer in time".to_owned());
            }
            let (answers, bell) = &self.answers;
            let woken = bell.wait_timeout(answers, waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How many questions ended without an answer: the other end, alive or not, never said that it
    /// lacks what was asked for.
    pub fn unanswered(&self) -> u64 {
        self.unanswered.load(Ordering::Relaxed)
    }

    /// An answer came.
    pub fn answer(&self, token: u64, payload: Bytes) {
        if let Some(answer) = self.lock().get_mut(&token) {
            *answer = Some(payload);
            self.answers.1.notify_all();
        }
    }

    /// The connection is gone: nobody answers any more.
    pub fn give_up(&self) {
        self.lock().clear();
        self.answers.1.notify_all();
    }
}

fn take(level: u8, payload: &[u8]) -> Result<Fetched, String> {
    let mut answer = AnswerDecoder::new(payload);
    let text = |error: AnswerError| error.to_string();
    let fetched = if level == 0 {
        content(answer.block().map_err(text)?).map(|block| Fetched::Block(Box::new(*block)))
    } else {
        content(answer.node().map_err(text)?).map(|node| Fetched::Node(Box::new(node)))
    }?;
    answer.finish().map_err(text)?;
    Ok(fetched)
}

fn content<T>(item: Item<T>) -> Result<T, String> {
    match item {
        Item::Content(content) => Ok(content),
        Item::Unreadable | Item::Gone => Err("the other end does not have it either".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::numbers::VolumeNumber;

    fn ask(questions: &Questions, answer: impl FnOnce(&Questions, u64)) -> Result<Fetched, String> {
        let place = TreePlace { volume: VolumeNumber(0), level: 0, index: 3 };
        questions.ask(place, ContentHash([0; 16]), |want| {
            answer(questions, want.token);
            Ok(())
        })
    }

    /// Whoever asks must know a hub that says no from one that says nothing: the second may have it.
    #[test]
    fn an_end_that_went_without_a_word_did_not_answer() {
        let questions = Questions::default();
        let gone = ask(&questions, |questions, _| questions.give_up());
        assert!(gone.is_err_and(|why| why.contains("did not answer")));
        assert_eq!(questions.unanswered(), 1);
        // The control: an answer that is no good is one.
        let answered = |questions: &Questions, token| questions.answer(token, Bytes::new());
        assert!(ask(&questions, answered).is_err());
        assert_eq!(questions.unanswered(), 1);
    }
}
