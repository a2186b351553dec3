//! A new filer under the name of a source that its hub knows: it may become that source (R14).
//!
//! Run by the life of a [`super::Filer`] whose hub has refused it as another source, while it has
//! nothing of its own: no hub, no entry, no CP, no client served. It follows with `Follow`, under
//! its own id, and serves nobody. When the administrator gives it the volumes, the hub says `Adopt`:
//!
//! 1. volumes and room are looked at; what does not fit is refused, and nothing has changed
//! 2. the row says that no NVRAM was made, and the ring is erased
//! 3. its own empty rows go, those of the source are made: fenced
//! 4. the ring is made anew under the source's id; the row says so
//! 5. `Adopted`; the engine starts anew in this process as that source, which follows
//!
//! A cut before 4 is durable leaves rows that hold nothing and have no NVRAM: the next start takes
//! them away, and it is a new filer again. Behind it, it is the fenced source. Neither serves.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::adopt::{self, AdoptError};
use super::follow::wire::{End, Life, Wire};
use super::forwarder::ForwardOptions;
use super::keeper::Kept;
use super::recover::Store;
use super::shared::{LinkState, Shared};
use crate::link::socket::Socket;
use crate::nvlog::{Ring, RingShape};
use crate::units::ids::SourceId;
use crate::units::numbers::CpNumber;
use crate::wire::homes::{Adopt, Adopted};
use crate::wire::message::{
    Follow, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Refused, RefusedCode, WirePlace,
};

/// A filer that has nothing of its own.
pub(super) struct Newcomer {
    /// Its parts.
    pub(super) shared: Arc<Shared>,
    /// Where its hub is.
    pub(super) forward: ForwardOptions,
    /// Its NVRAM.
    pub(super) nvram: Store,
    /// How that is made anew.
    pub(super) ring_shape: RingShape,
    /// Ends the threads of its engine. Blocks.
    pub(super) rest: Box<dyn Fn() + Send + Sync>,
    /// Cancelled when the source stops.
    pub(super) stopping: CancellationToken,
}

impl std::fmt::Debug for Newcomer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Newcomer").field("source", &self.shared.name).finish_non_exhaustive()
    }
}

impl Newcomer {
    /// Follows until it has become a source: its id. `None` if it stops before.
    pub(super) async fn run(self) -> Option<SourceId> {
        let (shared, stopping) = (Arc::clone(&self.shared), self.stopping.clone());
        let forward = self.forward.clone();
        let life = Life { shared, forward, stopping, say };
        life.until_done(self, Self::session).await
    }

    /// One connection; `Ok` once the rows are those of the source.
    fn session(&mut self, stream: Socket, handle: Handle) -> Result<SourceId, End> {
        let stopping = self.stopping.clone();
        let mut wire = Wire::new(stream, handle, &stopping)?;
        let ended = self.follow(&mut wire);
        if let Err(end) = &ended {
            wire.leave(end);
        }
        ended
    }

    fn follow(&self, wire: &mut Wire<'_>) -> Result<SourceId, End> {
        wire.send(&Message::Follow(Box::new(self.introduce())))?;
        say(&self.shared, "its hub knows that it is here");
        let (message, _) = wire.next()?;
        let Message::Adopt(adopt) = message else {
            return Err(End::Lost(format!("{} is out of place", message.name())));
        };
        let token = adopt.token;
        if let Err(error) = self.look(&adopt) {
            let next = "give source.toml the volumes and the pool that the old filer had";
            let refused = Some((error.to_string(), next.to_owned()));
            wire.send(&Message::Adopted(Adopted { token, refused }))?;
            return Err(End::Adopt(error));
        }
        if let Err(end) = self.become_it(&adopt) {
            // Between two identities nothing goes on; the next start puts it in order.
            self.shared.fail(&format!("it cannot become {}: {end}", adopt.name));
            return Err(end);
        }
        // The hub learns of it by what follows in any case.
        drop(wire.send(&Message::Adopted(Adopted { token, refused: None })));
        Ok(adopt.source)
    }

    fn introduce(&self) -> Follow {
        let shared = &self.shared;
        Follow {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION_MIN,
            name: shared.name.clone(),
            source: shared.source,
            hub: None,
            generation: shared.generation,
            epoch: shared.epoch(),
            fenced: shared.epoch(),
            volumes: shared.volumes.clone(),
            own_cp: CpNumber(0),
            own: WirePlace::default(),
            last: shared.order.figures().sequence,
            cp_max: CpNumber(0),
            policy: shared.pledge.in_force(),
            alone: None,
            filer: Some(shared.filer()),
        }
    }

    /// Step 1.
    fn look(&self, adopt: &Adopt) -> Result<(), AdoptError> {
        adopt::check(adopt)?;
        let shared = &self.shared;
        if adopt.name != shared.name || !shared.is_newcomer() {
            return Err(AdoptError::Malformed("this filer is not new, or has another name"));
        }
        let same = adopt.volumes.len() == shared.volumes.len()
            && adopt.volumes.iter().all(|there| {
                shared.volumes.iter().any(|own| (&own.name, own.size) == (&there.name, there.size))
            });
        if !same {
            return Err(AdoptError::Malformed("its volumes are not those of source.toml"));
        }
        adopt::look_for_room(&shared.pool, adopt)
    }

    /// Steps 2 to 4.
    fn become_it(&self, adopt: &Adopt) -> Result<(), End> {
        let shared = &self.shared;
        (self.rest)();
        shared.note(|kept| kept.nvram_made = false)?;
        Ring::erase(&*self.nvram.device)?;
        adopt::remove_rows(&shared.pool, shared.source)?;
        adopt::make_rows(&shared.pool, adopt, Kept::default())?;
        Ring::create(Arc::clone(&self.nvram.device), adopt.source.0, self.ring_shape)?;
        adopt::nvram_is_made(&shared.pool, adopt.source)?;
        tracing::warn!(source = %adopt.name, id = %adopt.source, "this new filer is that source now");
        Ok(())
    }
}

/// Shows what goes on.
fn say(shared: &Shared, what: &str) {
    let name = &shared.name;
    let reason = format!("this filer is new, and its hub knows {name} as another: {what}");
    let next_step = format!(
        "`mirrorhub failback {name}` on the hub gives it the volumes, if the old filer is lost; it \
         serves nothing before"
    );
    let code = RefusedCode::OtherSource;
    shared.set_link(LinkState::Halted(Refused { code, reason, next_step }));
}
