//! Whose turn it is to change the devices of a pool.
//!
//! A command about devices looks at them, asks, and changes them; another one in between would make
//! what it saw untrue. An addition may take long, so who comes meanwhile is not left to wait without a
//! word: it is refused, and told what runs and since when. Only what a start goes on with waits, since
//! nobody is there to ask again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::units::machine::{self, Bell};

/// What runs, and since when in seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} runs")]
pub struct Taken {
    pub what: String,
    pub since: i64,
}

/// The turn of one pool.
#[derive(Debug, Default)]
pub(super) struct Turns {
    running: Mutex<Option<Taken>>,
    ended: Bell,
}

/// It is the holder's turn until this is dropped.
#[derive(Debug)]
pub struct Turn<'a>(&'a Turns);

impl Turns {
    /// For a command: at once or not.
    pub(super) fn take(&self, what: &str) -> Result<Turn<'_>, Taken> {
        self.begin(&mut self.lock(), what)
    }

    /// For what nobody would ask for again.
    pub(super) fn wait(&self, what: &str) -> Turn<'_> {
        let mut running = self.lock();
        loop {
            match self.begin(&mut running, what) {
                Ok(turn) => return turn,
                Err(_taken) => {
                    let waited = self.ended.wait(&self.running, running);
                    running = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn begin(&self, running: &mut Option<Taken>, what: &str) -> Result<Turn<'_>, Taken> {
        if let Some(taken) = running {
            return Err(taken.clone());
        }
        *running = Some(Taken { what: what.to_owned(), since: machine::unix_seconds() });
        Ok(Turn(self))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Taken>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
        self.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_its_turn_and_who_waits_comes_after_it() {
        let turns = Turns::default();
        let turn = turns.take("device add /a").unwrap();
        assert_eq!(turns.take("device fail 1").unwrap_err().what, "device add /a");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| drop(turns.wait("what was begun")));
            assert!(turns.take("device fail 1").is_err(), "whoever waits takes nothing away");
            drop(turn);
            waits.join().unwrap();
        });
        assert!(turns.take("device fail 1").is_ok());
    }
}
