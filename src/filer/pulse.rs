//! Whether the hub lives: heartbeats and their answers, and whether it gets on.
//!
//! Used by `forwarder`, with its clock. An answered heartbeat is the source's lease for reads (R12);
//! a hub that owes something and gets on with nothing for `hub_timeout` is a lost hub, or a slow one
//! that is waited out: `forwarder` says which.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::units::machine;
use crate::units::numbers::{CpNumber, SequenceNumber};
use crate::wire::message::{Ping, Pong};

/// Pause between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Heartbeats that are remembered.
const PINGS_MAX: usize = 64;

/// How far the hub has come: last durable sequence number, CP done, bytes of CP data taken.
type Reached = (SequenceNumber, CpNumber, u64);

/// Heartbeats of one source to its hub.
#[derive(Debug)]
pub struct Pulse {
    token: u64,
    /// Those that are not answered, and when they left.
    pings: VecDeque<(u64, Instant)>,
    /// How far the hub had come when it last got on, and when that was.
    reached: (Reached, Instant),
}

impl Default for Pulse {
    /// Nothing was sent yet.
    fn default() -> Self {
        let nothing = (SequenceNumber(0), CpNumber(0), 0);
        let reached = (nothing, machine::now());
        Self { token: 0, pings: VecDeque::new(), reached }
    }
}

impl Pulse {
    /// Time between two Pings to a hub that may be silent for `hub_timeout`: an idle connection must
    /// not look silent.
    pub fn heartbeat(hub_timeout: Duration) -> Duration {
        HEARTBEAT.min(hub_timeout / 4)
    }

    /// The next heartbeat, to be sent now.
    pub fn ping(&mut self, sequence: SequenceNumber) -> Ping {
        self.token += 1;
        self.pings.push_back((self.token, machine::now()));
        if self.pings.len() > PINGS_MAX {
            self.pings.pop_front();
        }
        Ping { sequence, token: self.token }
    }

    /// When the heartbeat left that this answers, if it is one of ours.
    pub fn pong(&mut self, pong: &Pong) -> Option<Instant> {
        let (token, left) = *self.pings.iter().find(|(token, _)| *token == pong.token)?;
        self.pings.retain(|(other, _)| *other > token);
        Some(left)
    }

    /// Another connection: what was waited for on the one before is none of this one's. Heartbeats go
    /// on being told apart.
    pub fn begin(&mut self) {
        self.reached = Self::default().reached;
    }

    /// For how long a hub that `owes` something has got on with nothing, if that is longer than
    /// `hub_timeout`.
    pub fn stalled(&mut self, now: Reached, owes: bool, hub_timeout: Duration) -> Option<Duration> {
        let (before, since) = self.reached;
        // Bytes taken begin anew with a connection.
        let moved = now.0 > before.0 || now.1 > before.1 || now.2 != before.2;
        if moved || !owes {
            self.reached = (now, machine::now());
            return None;
        }
        Some(machine::elapsed(since)).filter(|stalled| *stalled > hub_timeout)
    }
}
