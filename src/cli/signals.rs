//! Signals of a long-running command: TERM and INT stop it cleanly, HUP reloads.

use std::io;

use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// TERM or INT: stop cleanly.
    Stop,
    /// HUP: read the configuration again.
    Reload,
}

/// The signals, caught from the moment it is made.
#[derive(Debug)]
pub struct Signals {
    term: Stream,
    int: Stream,
    hup: Stream,
}

impl Signals {
    /// Catches them. Called once, inside the runtime, before anything that a half-done stop would
    /// leave behind.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
        })
    }

    /// The next one. Safe to drop and call again: nothing is lost.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.term.recv() => Signal::Stop,
            _ = self.int.recv() => Signal::Stop,
            _ = self.hup.recv() => Signal::Reload,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn signals_are_told_apart() {
        use rustix::process::{Signal as Number, getpid, kill_process};
        let mut signals = Signals::install().unwrap();
        for (number, wanted) in [
            (Number::HUP, Signal::Reload),
            (Number::TERM, Signal::Stop),
            (Number::INT, Signal::Stop),
        ] {
            kill_process(getpid(), number).unwrap();
            assert_eq!(signals.next().await, wanted);
        }
    }
}
