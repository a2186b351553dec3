//! What a comparison is answered with: parts of the own CP that was offered to the hub.
//!
//! A thread answers one request after the other from the pinned trees, held to `resync_limit`; the
//! forwarder hands it what the hub asks and sends what it says. The hub may have a bounded number of
//! requests under way: one that asks for more is hung up on. Every block is verified as it is read
//! ([`crate::volume::serve`]); what cannot be read is said to be so, and logged.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;

use super::pass::Progress;
use super::shared::Pins;
use super::throttle::Throttle;
use crate::limits::PULL_REQUESTS_MAX;
use crate::units::machine;
use crate::units::numbers::ByteCount;
use crate::volume::geometry::Geometry;
use crate::volume::serve;
use crate::wire::message::Frame;
use crate::wire::pull::Want;

/// Answers that wait for the socket.
const AHEAD_FRAMES: usize = 2;

/// The far end of the answering thread.
#[derive(Debug)]
pub struct Served {
    wants: mpsc::Sender<Want>,
    frames: mpsc::Receiver<Result<Frame, String>>,
    next: Option<Frame>,
}

impl Served {
    /// Begins to answer from `pins`. The thread ends with this.
    pub fn start(pins: Pins, limit: Option<ByteCount>, progress: Arc<Progress>) -> Self {
        let (wants, mut asked) = mpsc::channel(PULL_REQUESTS_MAX);
        let (sender, frames) = mpsc::channel(AHEAD_FRAMES);
        let throttle = Throttle::new(limit);
        machine::aside(move || {
            let mut answerer = Answerer { pins, progress, throttle, sender };
            answerer.begin();
            while let Some(want) = machine::receive(&mut asked) {
                if !answerer.answer(&want) {
                    return;
                }
            }
        });
        Self { wants, frames, next: None }
    }

    /// Takes a request; false if the hub has too many under way.
    #[must_use = "who asks too much is hung up on"]
    pub fn ask(&self, want: Want) -> bool {
        self.wants.try_send(want).is_ok()
    }

    /// Waits until an answer is there; pending while one waits for the socket. An error is why a
    /// request is refused, or that there are no answers any more.
    pub async fn wait(&mut self) -> Result<(), String> {
        if self.next.is_some() {
            return std::future::pending().await;
        }
        match self.frames.recv().await {
            Some(Ok(frame)) => self.next = Some(frame),
            Some(Err(reason)) => return Err(reason),
            None => return Err("the thread that reads it has ended".to_owned()),
        }
        Ok(())
    }

    /// The answer that is ready.
    pub fn take(&mut self) -> Option<Frame> {
        self.next.take()
    }
}

struct Answerer {
    pins: Pins,
    progress: Arc<Progress>,
    throttle: Throttle,
    sender: mpsc::Sender<Result<Frame, String>>,
}

impl Answerer {
    fn begin(&self) {
        let all = self.pins.values().map(|pin| pin.tree().size.blocks().0).sum();
        self.progress.all_blocks.store(all, Ordering::Relaxed);
    }

    /// Answers a request; false if that was the last.
    fn answer(&mut self, want: &Want) -> bool {
        let Some(pin) = self.pins.get(&want.volume()) else {
            let reason = format!("the hub asks for volume {}, there is none", want.volume());
            machine::send(&self.sender, Err(reason));
            return false;
        };
        let served = match want {
            Want::Nodes(want) => serve::nodes(pin, want),
            Want::Blocks(want) => serve::blocks(pin, want),
        };
        let frame = served.map(|served| {
            for problem in &served.problems {
                tracing::error!(place = %problem.place, error = %problem.error,
                    "the own image cannot be read for a comparison");
            }
            served.frame
        });
        if let Ok(frame) = &frame {
            self.count(want, frame);
            if !self.throttle.wait(frame.bytes(), &self.sender) {
                return false;
            }
        }
        let frame = frame.map_err(|error| error.to_string());
        let goes_on = frame.is_ok();
        machine::send(&self.sender, frame) && goes_on
    }

    /// The hub asks in rising order: what lies before its request is done with.
    fn count(&self, want: &Want, frame: &Frame) {
        let (span, last, blocks) = match want {
            Want::Nodes(want) => (Geometry::span(want.level), want.nodes.places().last(), 0),
            Want::Blocks(want) => (1, want.blocks.places().last(), want.blocks.total()),
        };
        let before = self.pins.range(..want.volume()).map(|(_, pin)| pin.tree().size.blocks().0);
        let at = last.unwrap_or_default().saturating_mul(span);
        let passed = before.sum::<u64>().saturating_add(at);
        if blocks > 0 {
            self.progress.passed_blocks.fetch_max(passed, Ordering::Relaxed);
        }
        self.progress.inline_blocks.fetch_add(blocks, Ordering::Relaxed);
        self.progress.bytes.fetch_add(frame.bytes(), Ordering::Relaxed);
    }
}
