//! What is said of connections that are refused: who and why, each once, and a flood as a number.
//!
//! Asked by the doors for sources, for NBD and for HTTP, which count what they refuse themselves. A peer that
//! comes again and again for the same reason is told of once; many peers, or many reasons, get some lines a
//! minute, and each of them fewer. What was passed over is told as a number, at most once a minute, if it is
//! more than somebody's retries, or had no line ever. So ten thousand connections are some lines, and none of them goes unnoticed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::nbd::serve::Told;

/// Peers that are remembered, so that each is logged once; with more all are forgotten.
const TOLD_MAX: usize = 1024;
/// Lines of their own in one minute.
const LINES_MAX: u32 = 20;
/// Of these, lines of one host, so that it does not use up those of all.
const HOST_LINES_MAX: u32 = 5;
/// So many that were passed over in one minute are retries, and are not told.
const RETRIES_MAX: u64 = 60;
/// How long that minute is.
const MINUTE: Duration = Duration::from_secs(60);

/// What was said already.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    told: BTreeSet<(String, String)>,
    /// A minute goes on, and somebody waits for its end.
    open: bool,
    lines: u32,
    lines_of: BTreeMap<String, u32>,
    passed_over: u64,
    /// Some of those were never told of.
    untold: bool,
}

impl State {
    /// Whether this one gets a line of its own.
    fn is_news(&mut self, peer: &str, key: &str) -> bool {
        // Each connection has another port.
        let host =
            peer.parse().map_or_else(|_| peer.to_owned(), |at: SocketAddr| at.ip().to_string());
        let of_host = self.lines_of.get(&host).copied().unwrap_or_default();
        let one = (host, key.to_owned());
        let is_told = self.told.contains(&one);
        if is_told || self.lines >= LINES_MAX || of_host >= HOST_LINES_MAX {
            self.passed_over += 1;
            self.untold |= !is_told;
            return false;
        }
        self.lines_of.insert(one.0.clone(), of_host + 1);
        if self.told.len() >= TOLD_MAX {
            self.told.clear();
        }
        self.lines += 1;
        self.told.insert(one)
    }

    /// The minute is over; what is to be told of it.
    fn close(&mut self) -> Option<u64> {
        let Self { told, passed_over, untold, .. } = std::mem::take(self);
        self.told = told;
        (untold || passed_over > RETRIES_MAX).then_some(passed_over)
    }
}

impl Refusals {
    /// Says that a connection was refused, unless that was said already. `key` is the reason without what is
    /// another thing each time. Called within a tokio runtime.
    pub fn say(self: &Arc<Self>, what: &'static str, peer: &str, key: &str, reason: &str) {
        let (news, first) = {
            let mut state = self.lock();
            let first = !std::mem::replace(&mut state.open, true);
            (state.is_news(peer, key), first)
        };
        if news {
            tracing::warn!(peer, reason, "{what}");
        }
        if first {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep(MINUTE).await;
                let passed_over = this.lock().close();
                if let Some(count) = passed_over {
                    tracing::warn!(count, seconds = MINUTE.as_secs(), "{what}: so many more");
                }
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells of clients for whom an NBD server has no room.
#[derive(Debug)]
pub struct Crowded {
    what: &'static str,
    said: Arc<Refusals>,
}

impl Crowded {
    /// `what` is how the log says that somebody is refused.
    pub fn new(what: &'static str) -> Self {
        Self { what, said: Arc::default() }
    }
}

impl Told for Crowded {
    fn refused(&self, peer: &str, reason: &str) {
        self.said.say(self.what, peer, reason, reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_is_news_once_for_a_reason() {
        let mut state = State::default();
        assert!(state.is_news("192.0.2.7:1000", "late"));
        assert!(!state.is_news("192.0.2.7:1001", "late"), "another port is the same peer");
        assert!(state.is_news("192.0.2.8:1000", "late") && state.is_news("192.0.2.7:1", "other"));
        // Retries are no flood; what was told stays told.
        assert_eq!(state.close(), None);
        assert!(!state.is_news("192.0.2.7:1002", "late"));
    }

    /// Goal: a flood from many addresses is some lines and one number, whose sum is exact; the memory is
    /// bounded; the next minute may tell of new ones.
    #[test]
    fn a_flood_is_some_lines_and_a_number() {
        let mut state = State::default();
        let lines = (0..10_000).filter(|n| state.is_news(&format!("peer {n}"), "late")).count();
        assert_eq!(lines, usize::try_from(LINES_MAX).unwrap());
        assert_eq!(state.close(), Some(10_000 - u64::from(LINES_MAX)));
        assert_eq!(state.close(), None);
        for n in 0..TOLD_MAX * 2 {
            state.close();
            assert!(state.is_news(&format!("another {n}"), "late"));
            assert!(state.told.len() <= TOLD_MAX);
        }
    }

    /// One host with ever new reasons leaves lines for the others, and what it did is a number.
    #[test]
    fn one_host_does_not_use_up_the_lines_of_all() {
        let mut state = State::default();
        let lines = (0..40).filter(|n| state.is_news("192.0.2.7:1", &format!("flags {n}"))).count();
        assert_eq!(lines, usize::try_from(HOST_LINES_MAX).unwrap());
        assert!(state.is_news("192.0.2.8:1", "late"));
        assert_eq!(state.close(), Some(40 - u64::from(HOST_LINES_MAX)));
        assert!(!state.is_news("192.0.2.7:2", "flags 0"), "it was told");
        assert_eq!(state.close(), None, "a retry");
    }

    /// The minute ends by itself, and another one begins with the next refusal.
    #[tokio::test(start_paused = true)]
    async fn a_minute_ends_by_itself() {
        let refusals = Arc::new(Refusals::default());
        for _ in 0..100 {
            refusals.say("refused", "192.0.2.7:1000", "late", "late");
        }
        let state = || {
            let state = refusals.lock();
            (state.open, state.passed_over)
        };
        assert_eq!(state(), (true, 99));
        tokio::time::sleep(MINUTE * 2).await;
        assert_eq!(state(), (false, 0));
        refusals.say("refused", "192.0.2.7:1000", "late", "late");
        assert_eq!(state(), (true, 1));
    }
}
