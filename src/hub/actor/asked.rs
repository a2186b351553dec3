//! What the rest of the hub asks of a source's actor, and tells it.

use actix::{ActorContext, Handler};
use tokio::sync::oneshot;

use super::messages::{
    AskPlace, AskRewrite, Changed, Fence, FileChanged, Forgotten, Goodbye, HandedOver, Panic,
    WantCheckpoint, WantScan,
};
use super::{AWAY, SourceActor};
use crate::session::mirror::{Event, Mirror};
use crate::units::numbers::CpNumber;
use crate::wire::message::{Fenced, Going, Message, Refused, RefusedCode, Scan};

impl Handler<WantCheckpoint> for SourceActor {
    type Result = actix::MessageResult<WantCheckpoint>;

    fn handle(&mut self, _: WantCheckpoint, context: &mut Self::Context) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        let streams = self.machine.as_ref().is_some_and(Mirror::is_streaming);
        if streams {
            let token = self.next_token;
            self.next_token += 1;
            self.asked.insert(token, reply);
            self.step(Event::WantCheckpoint(token), context);
        } else {
            let joined = self.machine.as_ref().is_some_and(Mirror::is_joined);
            let reason = if joined { "the source is being sent its log" } else { AWAY };
            drop(reply.send(Err(reason.to_owned())));
        }
        actix::MessageResult(answer)
    }
}

impl Handler<WantScan> for SourceActor {
    type Result = actix::MessageResult<WantScan>;

    fn handle(&mut self, message: WantScan, _: &mut Self::Context) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        if self.machine.as_ref().is_some_and(Mirror::is_joined) {
            let token = self.next_token;
            self.next_token += 1;
            self.scans.insert(token, reply);
            self.send(&Message::Scan(Scan { cp: message.0, token }));
        } else {
            drop(reply.send(Err(AWAY.to_owned())));
        }
        actix::MessageResult(answer)
    }
}

impl Handler<Fence> for SourceActor {
    type Result = actix::MessageResult<Fence>;

    fn handle(&mut self, Fence(epoch): Fence, _: &mut Self::Context) -> Self::Result {
        if self.peer.is_some() {
            self.send(&Message::Fenced(Fenced { epoch, hub: Some(self.shared.hub) }));
            let reason = format!("failed over: epoch {} is in force", epoch.number);
            let next = "see `mirrorhub status` on the hub";
            let code = RefusedCode::Fenced;
            self.refuse(Refused { code, reason, next_step: next.to_owned() });
        }
        // What the catalog says by now is read with the next event.
        let machine = self.machine.take();
        actix::MessageResult(machine.map_or(CpNumber(0), |machine| machine.known().cp_max))
    }
}

impl Handler<Changed> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: Changed, _: &mut Self::Context) {
        self.machine = None;
        if let Err(reason) = self.machine() {
            tracing::debug!(source = %self.name, reason, "not at rest yet");
        }
        self.publish();
    }
}

impl Handler<AskPlace> for SourceActor {
    type Result = ();

    fn handle(&mut self, AskPlace(want): AskPlace, _: &mut Self::Context) {
        if self.is_streaming() {
            self.send(&Message::WantPlace(want));
        } else if let Some(lane) = &self.lane {
            lane.questions.give_up();
        }
    }
}

impl Handler<AskRewrite> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: AskRewrite, _: &mut Self::Context) {
        if self.is_streaming() {
            self.send(&Message::WantRewrite);
        }
    }
}

impl Handler<Goodbye> for SourceActor {
    type Result = actix::MessageResult<Goodbye>;

    fn handle(&mut self, _: Goodbye, _: &mut Self::Context) -> Self::Result {
        let reason = "the hub is being stopped".to_owned();
        self.send(&Message::Going(Going { reason }));
        let ended = self.peer.as_mut().and_then(|peer| peer.ended.take());
        self.hang_up();
        self.publish();
        actix::MessageResult(ended)
    }
}

impl Handler<HandedOver> for SourceActor {
    type Result = ();

    fn handle(&mut self, HandedOver(cp, place): HandedOver, _: &mut Self::Context) {
        self.machine = None;
        if let Some(lane) = &self.lane
            && lane.hand_over(cp, place)
        {
            self.shared.refills.forget(lane.source());
        }
        if let Err(reason) = self.machine() {
            tracing::debug!(source = %self.name, reason, "not at rest yet");
        }
        self.publish();
    }
}

impl Handler<FileChanged> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: FileChanged, _: &mut Self::Context) {
        let settings = self.shared.settings.load_full();
        if let Some(refused) = self.peer.as_ref().and_then(|peer| self.taken_back(peer))
            && settings.contains_key(&self.name)
        {
            self.refuse(refused);
            self.publish();
            return;
        }
        match settings.get(&self.name) {
            None if self.peer.is_some() => {
                let reason =
                    format!("source {} is retired: its file on the hub is gone", self.name);
                let next_step = "put its file back into the hub's sources directory".to_owned();
                self.refuse(Refused { code: RefusedCode::UnknownSource, reason, next_step });
            }
            None => {}
            Some(setting) => {
                self.refused.take_if(|refused| refused.code == RefusedCode::UnknownSource);
                let pins = setting.volumes.iter().map(|(name, size)| (name.to_string(), size.0));
                if let Some(machine) = &mut self.machine {
                    machine.pin(pins.collect());
                }
                if self.machine.as_ref().is_some_and(Mirror::is_outdated) {
                    // It comes again at once, and is judged by what its file says now.
                    tracing::info!(source = %self.name, "its file has changed: it says Hello anew");
                    self.hang_up();
                }
            }
        }
        self.publish();
    }
}

impl Handler<Forgotten> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: Forgotten, context: &mut Self::Context) {
        self.hang_up();
        context.stop();
    }
}

impl Handler<Panic> for SourceActor {
    type Result = ();

    fn handle(&mut self, _: Panic, _: &mut Self::Context) {
        panic!("asked for by a test");
    }
}
