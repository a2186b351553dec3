//! What the actor hands to others: the ring, the applier, and readers of logs and images.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use actix::{AsyncContext, Context};
use bytes::Bytes;
use tokio::runtime::Handle;

use super::SourceActor;
use super::messages::{Content, LogSent};
use super::peer::broken;
use crate::hub::applier::Job;
use crate::hub::lane::Lane;
use crate::hub::mending;
use crate::hub::shared::RefillError;
use crate::hub::stager::Staged;
use crate::limits::RECORD_BYTES_MAX;
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::session::mirror::{Build, Event, Mirror};
use crate::units::machine::{self, now};
use crate::units::numbers::CpNumber;
use crate::wire::message::{Frame, Message, Scanned, WantPlace};

/// In a simulation: an honest source sends nothing behind the end of a volume before this hub durably
/// knows of it, or a restart in between would find a log that it cannot apply.
#[cfg(test)]
fn is_within(known: &crate::session::mirror::Known, transfer: &Transfer) {
    if !machine::simulated::is_here() {
        return;
    }
    for entry in transfer.entries() {
        let volume = known.volumes.iter().find(|volume| volume.number == entry.volume);
        let end = entry.offset + u64::from(entry.length);
        assert!(
            volume.is_none_or(|volume| end <= volume.size.0),
            "transfer {} ends at {end} of {volume:?}",
            transfer.id()
        );
    }
}

impl SourceActor {
    pub(super) fn stage(&mut self) {
        let Some(Content::Transfer(transfer)) = self.current.take() else {
            panic!("the machine stages a transfer that did not come");
        };
        let (Some(lane), Some(machine)) = (&self.lane, &self.machine) else {
            panic!("a transfer is staged without a lane");
        };
        #[cfg(test)]
        is_within(machine.known(), &transfer);
        lane.ladder.transfers.fetch_add(1, Ordering::Relaxed);
        let (lane, epoch, came) = (lane.clone(), machine.known().epoch, now());
        let staged = Staged { lane, epoch, transfer, came };
        self.shared.stager.stage(staged);
    }

    /// A transfer behind the pass under way.
    pub(super) fn stage_behind(&mut self) {
        let (Some(Content::Transfer(transfer)), Some(lane)) = (self.current.take(), &self.lane)
        else {
            panic!("the machine puts a transfer aside that did not come");
        };
        lane.ladder.transfers.fetch_add(1, Ordering::Relaxed);
        lane.put_aside(transfer);
    }

    /// Nothing of what came behind the pass is wanted any more.
    pub(super) fn drop_behind(&self) {
        let Some(lane) = &self.lane else { return };
        lane.ladder.behind_dropped.fetch_add(1, Ordering::Relaxed);
        if let Some(job) = lane.job()
            && !job.give_up_behind()
        {
            tracing::debug!(source = %self.name, "what was given up is the log by now");
        }
        drop(lane.aside().end());
    }

    /// What came behind a pass that is published, too late for its log, which ends at `log`; and where all of it
    /// ends that follows.
    pub(super) fn left_behind(lane: &Lane, log: Place) -> (VecDeque<Transfer>, Place) {
        let mut held = log;
        let mut left = lane.aside().end();
        let follows = |transfer: &&Transfer| {
            let follows = transfer.header().follows(held);
            if follows {
                held = transfer.place();
            }
            follows
        };
        let count = left.iter().take_while(follows).count();
        left.truncate(count);
        (left, held)
    }

    /// Stages what of it counts as received: it goes the way of the rest, whether its connection is there or not.
    pub(super) fn stage_left(&mut self, left: VecDeque<Transfer>) {
        let (Some(lane), Some(machine)) = (&self.lane, &self.machine) else { return };
        let [received, ..] = machine.ladder();
        let epoch = machine.known().epoch;
        for transfer in left {
            if transfer.place().sequence <= received.sequence {
                let (lane, came) = (lane.clone(), now());
                self.shared.stager.stage(Staged { lane, epoch, transfer, came });
            }
        }
    }

    /// How far what comes behind the pass is written, and whether there is room for more.
    pub(super) fn look_behind(&mut self, lane: &Arc<Lane>, context: &mut Context<Self>) {
        if !self.machine.as_ref().is_some_and(Mirror::is_behind) {
            return;
        }
        let (news, failed) = lane.aside().news();
        if let Some((place, bytes)) = news {
            self.advance(Event::BehindWritten(place, bytes), context);
        }
        let (_, room) = self.room(lane);
        let full = failed || room < RECORD_BYTES_MAX;
        if full && lane.job().is_none_or(|job| job.give_up_behind()) {
            tracing::info!(source = %self.name, room, failed, "the log behind the pass is dropped");
            self.advance(Event::BehindOver, context);
        }
    }

    pub(super) fn apply(&mut self, cp: CpNumber, last: Place, build: Build) {
        let (Some(lane), Some(machine)) = (&self.lane, &self.machine) else { return };
        let frames = self.peer.as_ref().map(|peer| peer.frames.clone());
        let job = Job::new(lane.clone(), (cp, last), machine, build, frames);
        for (volume, payload) in self.early.drain(..) {
            job.feed(volume, payload);
        }
        let queue = if build.is_pass() { &self.shared.passes } else { &self.shared.jobs };
        queue.push(job.clone());
        self.job = Some(job);
    }

    pub(super) fn feed(&mut self) {
        let asked = match (self.current.take(), &self.job) {
            (Some(Content::Updates { volume, payload, .. }), Some(job)) => {
                job.feed(volume, payload);
                true
            }
            (Some(Content::Updates { volume, payload, .. }), None) => {
                self.early.push_back((volume, payload));
                true
            }
            (Some(Content::Nodes(answer, payload)), Some(job)) => job.nodes(answer, payload),
            (Some(Content::Blocks(answer, payload)), Some(job)) => job.blocks(answer, payload),
            // Its comparison has not begun: nothing was asked.
            (Some(Content::Nodes(..) | Content::Blocks(..)), None) => false,
            _ => panic!("the machine feeds what did not come"),
        };
        if !asked {
            self.refuse(broken("an answer that was not asked for, or is too long".to_owned()));
        }
    }

    /// Starts the refill once everything durable lies in the log, from which it is read.
    pub(super) fn send_log(&mut self, context: &mut Context<Self>) {
        let (Some(lane), Some(peer)) = (&self.lane, &self.peer) else { return };
        let cursors = lane.cursors();
        let Some(from) = self.refill_from.take_if(|_| cursors.drained == cursors.durable) else {
            return;
        };
        let (shared, source, number) = (self.shared.clone(), lane.source(), peer.number);
        let (applied, upto) = (cursors.applied, cursors.durable);
        let (frames, address) = (peer.frames.clone(), context.address());
        let lane = lane.clone();
        actix::spawn(async move {
            let runtime = Handle::current();
            let sent = machine::blocking(move || {
                shared.refill(source, applied, from, upto, |transfer| {
                    let frame = Frame::new(&Message::Refill, transfer.bytes().clone());
                    machine::block_on(&runtime, frames.send(frame)).is_ok()
                })
            })
            .await;
            let upto = match sent {
                Ok(Ok(upto)) => upto,
                Ok(Err(RefillError::Gone)) => {
                    tracing::info!(source = %lane.name(), "source went away during its refill");
                    return;
                }
                // To say that the source is on another line would stop it for good.
                Ok(Err(RefillError::Log(error))) => {
                    lane.fault(&format!("the log could not be read for a refill: {error}"));
                    return;
                }
                Err(error) => {
                    lane.fault(&format!("the refill failed: {error}"));
                    return;
                }
            };
            if address.send(LogSent { number, upto }).await.is_err() {
                tracing::debug!("log sent for an actor that is gone");
            }
        });
    }

    /// Reads every block of the image of `cp` and tells the source the roots. One reading of an
    /// image at a time, however many are asked for and on however many connections.
    pub(super) fn scan(&mut self, cp: CpNumber, token: u64) {
        let Some(peer) = &self.peer else { return };
        let (frames, shared, name) = (peer.frames.clone(), self.shared.clone(), self.name.clone());
        let Ok(place) = self.scanning.clone().try_acquire_owned() else {
            let problems = vec!["this image is being read already".to_owned()];
            self.send(&Message::Scanned(Scanned { cp, token, volumes: vec![], problems }));
            return;
        };
        actix::spawn(async move {
            let scanned = machine::blocking(move || shared.scan(&name, cp, |_, _, _| {})).await;
            let scanned = match scanned {
                Ok(Ok((volumes, problems))) => Scanned { cp, token, volumes, problems },
                Ok(Err(problem)) => Scanned { cp, token, volumes: vec![], problems: vec![problem] },
                Err(error) => {
                    let problems = vec![format!("reading failed: {error}")];
                    Scanned { cp, token, volumes: vec![], problems }
                }
            };
            drop(place);
            let frame = Frame::new(&Message::Scanned(scanned.bounded()), Bytes::new());
            drop(frames.send(frame).await);
        });
    }

    /// Tells the source what an image has in a place. A few at a time: no source of ours asks for
    /// more, and one that does waits for an answer that does not come.
    pub(super) fn serve_place(&self, want: WantPlace) {
        let (Some(peer), Some(lane)) = (&self.peer, &self.lane) else { return };
        let Ok(turn) = self.serving_places.clone().try_acquire_owned() else { return };
        let (frames, shared, lane) = (peer.frames.clone(), self.shared.clone(), lane.clone());
        actix::spawn(async move {
            let read = machine::blocking(move || mending::serve(&shared, &lane, &want)).await;
            drop(turn);
            match read {
                Ok(frame) => drop(frames.send(frame).await),
                Err(error) => tracing::warn!(%error, "a place was not read"),
            }
        });
    }
}
