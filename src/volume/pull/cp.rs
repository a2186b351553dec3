//! Pulls all volumes of a CP, one after the other.
//!
//! Thin: it makes a [`Puller`] for the next volume when the one before has yielded everything,
//! and goes on counting requests. The round is that of a puller.

use std::collections::VecDeque;

use crate::units::hash::Root;
use crate::units::numbers::{ByteCount, CpNumber, VolumeNumber};
use crate::wire::message::Message;
use crate::wire::pull::Pulled;

use super::Puller;
use super::error::PullError;
use super::own::OwnTree;
use super::terms::{Held, PullCounters, Put, Target, Window};

/// A volume to be pulled.
#[derive(Debug)]
pub struct VolumeTarget<O> {
    /// The volume.
    pub volume: VolumeNumber,
    /// Its size.
    pub size: ByteCount,
    /// The root it shall have.
    pub root: Root,
    /// What is here of it.
    pub own: O,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write this.
    Put(VolumeNumber, Put),
    /// All of that volume was yielded; its new tree has the root of the target.
    Done(VolumeNumber),
}

/// The machine for a CP.
#[derive(Debug)]
pub struct CpPuller<O> {
    cp: CpNumber,
    window: Window,
    waiting: VecDeque<VolumeTarget<O>>,
    current: Option<Puller<O>>,
    next_number: u64,
    counters: PullCounters,
}

impl<O: OwnTree> CpPuller<O> {
    /// Begins with the first volume; requests are numbered from `number` on.
    pub fn new(
        cp: CpNumber,
        volumes: Vec<VolumeTarget<O>>,
        window: Window,
        number: u64,
    ) -> Result<Self, PullError> {
        let (waiting, counters) = (volumes.into(), PullCounters::default());
        let mut puller = Self { cp, window, waiting, current: None, next_number: number, counters };
        puller.advance()?;
        Ok(puller)
    }

    fn advance(&mut self) -> Result<(), PullError> {
        if let Some(done) = self.current.take() {
            self.next_number = done.next_number();
            self.counters = sum(self.counters, done.counters());
        }
        let Some(VolumeTarget { volume, size, root, own }) = self.waiting.pop_front() else {
            return Ok(());
        };
        let target = Target { cp: self.cp, volume, size, root };
        self.current = Some(Puller::new(own, target, self.window, self.next_number)?);
        Ok(())
    }

    /// Whether all volumes were done.
    pub fn is_finished(&self) -> bool {
        self.current.is_none()
    }

    /// What all volumes have cost so far.
    pub fn counters(&self) -> PullCounters {
        let current = self.current.as_ref().map(Puller::counters).unwrap_or_default();
        sum(self.counters, current)
    }

    /// What it holds now.
    pub fn held(&self) -> Held {
        self.current.as_ref().map(Puller::held).unwrap_or_default()
    }

    /// The requests to send now.
    pub fn asks(&mut self) -> Vec<Message> {
        self.current.as_mut().map(Puller::asks).unwrap_or_default()
    }

    /// The next step; `None` if there is none before the next answer.
    ///
    /// # Errors
    /// The next volume cannot be begun.
    pub fn next_step(&mut self) -> Result<Option<Step>, PullError> {
        let Some(current) = &mut self.current else { return Ok(None) };
        let volume = current.target().volume;
        if let Some(put) = current.next_put() {
            return Ok(Some(Step::Put(volume, put)));
        }
        if !current.is_finished() {
            return Ok(None);
        }
        self.advance()?;
        Ok(Some(Step::Done(volume)))
    }

    /// Takes the payload of `Nodes`.
    pub fn nodes(&mut self, answer: &Pulled, payload: &[u8]) -> Result<(), PullError> {
        match &mut self.current {
            Some(current) => current.nodes(answer, payload),
            None => Err(not_asked(answer)),
        }
    }

    /// Takes the payload of `Blocks`.
    pub fn blocks(&mut self, answer: &Pulled, payload: &[u8]) -> Result<(), PullError> {
        match &mut self.current {
            Some(current) => current.blocks(answer, payload),
            None => Err(not_asked(answer)),
        }
    }
}

fn not_asked(answer: &Pulled) -> PullError {
    PullError::NotAsked { volume: answer.volume, wanted: None, met: answer.number }
}

fn sum(a: PullCounters, b: PullCounters) -> PullCounters {
    PullCounters {
        requests: a.requests + b.requests,
        nodes: a.nodes + b.nodes,
        blocks: a.blocks + b.blocks,
        answer_bytes: a.answer_bytes + b.answer_bytes,
    }
}
