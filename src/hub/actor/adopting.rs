//! A source in session is asked to become the home of another one: the question and its answer.
//!
//! Beside the session's machine, which it does not concern: nothing of the source's own line
//! changes. One question at a time; one that is not answered ends with the connection.

use actix::{Context, Handler, Message as ActorMessage};
use tokio::sync::oneshot;

use super::{AWAY, SourceActor};
use crate::hub::failback::answered;
use crate::hub::failover::Refusal;
use crate::session::mirror::Mirror;
use crate::wire::homes::{Adopt, Adopted};
use crate::wire::message::Message;

type Reply = oneshot::Sender<Result<(), Refusal>>;

/// The administrator wants this source's filer to become the home of another source.
#[derive(Debug, ActorMessage)]
#[rtype(result = "oneshot::Receiver<Result<(), Refusal>>")]
pub struct AskAdopt(pub Adopt);

/// The question under way.
#[derive(Debug, Default)]
pub(super) struct Adopting(Option<(u64, Reply)>);

impl Adopting {
    /// Its connection is gone.
    pub(super) fn give_up(&mut self) {
        if let Some((_, reply)) = self.0.take() {
            let reason = "the filer went away before it answered";
            drop(reply.send(Err(Refusal::new(reason, "run the command again when it is back"))));
        }
    }

    /// An answer; one to another question is of before, and passed over.
    pub(super) fn answered(&mut self, Adopted { token, refused }: Adopted) {
        if let Some((_, reply)) = self.0.take_if(|(asked, _)| *asked == token) {
            drop(reply.send(answered(refused)));
        }
    }
}

impl Handler<AskAdopt> for SourceActor {
    type Result = actix::MessageResult<AskAdopt>;

    fn handle(&mut self, AskAdopt(adopt): AskAdopt, _: &mut Context<Self>) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        let streams = self.machine.as_ref().is_some_and(Mirror::is_streaming);
        if !streams {
            let next = "start it, and wait until it is in-sync";
            drop(reply.send(Err(Refusal::new(AWAY, next))));
        } else if self.adopting.0.as_ref().is_some_and(|(_, asker)| !asker.is_closed()) {
            let reason = "the filer is being asked for another source at this moment";
            drop(reply.send(Err(Refusal::new(reason, "wait for the end of that"))));
        } else {
            self.adopting.0 = Some((adopt.token, reply));
            self.send(&Message::Adopt(Box::new(adopt)));
        }
        actix::MessageResult(answer)
    }
}
