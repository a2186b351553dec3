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

use super::adopt::{self, AdoptError};
use super::follow::wire::{End, Idle, Wire};
use super::keeper::Kept;
use super::shared::{LinkState, Shared};
use crate::nvlog::Ring;
use crate::units::ids::SourceId;
use crate::units::numbers::CpNumber;
use crate::wire::homes::{Adopt, Adopted};
use crate::wire::message::{
    Follow, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Refused, RefusedCode, WirePlace,
};

/// Follows until it has become a source: its id. `None` if it stops before.
pub(super) async fn run(idle: Idle) -> Option<SourceId> {
    idle.life(say).until_done(Newcomer(idle), Newcomer::follow).await
}

/// A filer that has nothing of its own.
struct Newcomer(Idle);

impl Newcomer {
    /// One connection; `Ok` once the rows are those of the source.
    fn follow(&mut self, wire: &mut Wire) -> Result<SourceId, End> {
        wire.send(&Message::Follow(Box::new(self.introduce())))?;
        say(&self.0.shared, "its hub knows that it is here", None);
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
            self.0.shared.fail(&format!("it cannot become {}: {end}", adopt.name));
            return Err(end);
        }
        // The hub learns of it by what follows in any case.
        drop(wire.send(&Message::Adopted(Adopted { token, refused: None })));
        Ok(adopt.source)
    }

    fn introduce(&self) -> Follow {
        let shared = &self.0.shared;
        Follow {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION_MIN,
            name: shared.name.clone(),
            source: shared.source,
            hub: None,
            generation: shared.generation,
            epoch: shared.epoch(),
            fenced: shared.epoch(),
            volumes: shared.volumes().to_vec(),
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
        let shared = &self.0.shared;
        if adopt.name != shared.name || !shared.is_newcomer() {
            return Err(AdoptError::Malformed("this filer is not new, or has another name"));
        }
        let here = shared.volumes();
        let same = adopt.volumes.len() == here.len()
            && adopt.volumes.iter().all(|there| {
                here.iter().any(|own| (&own.name, own.size) == (&there.name, there.size))
            });
        if !same {
            return Err(AdoptError::Malformed("its volumes are not those of source.toml"));
        }
        adopt::look_for_room(&shared.pool, adopt)
    }

    /// Steps 2 to 4.
    fn become_it(&self, adopt: &Adopt) -> Result<(), End> {
        let shared = &self.0.shared;
        (self.0.rest)();
        shared.note(|kept| kept.nvram_made = false)?;
        Ring::erase(&*self.0.nvram.device)?;
        adopt::remove_rows(&shared.pool, shared.source)?;
        adopt::make_rows(&shared.pool, adopt, Kept::default())?;
        Ring::create(Arc::clone(&self.0.nvram.device), adopt.source.0, self.0.ring_shape)?;
        adopt::nvram_is_made(&shared.pool, adopt.source)?;
        tracing::warn!(source = %adopt.name, id = %adopt.source, "this new filer is that source now");
        Ok(())
    }
}

/// Shows what goes on, and what the hub says to do.
fn say(shared: &Shared, what: &str, next: Option<&str>) {
    let name = &shared.name;
    let reason = format!("this filer is new, and its hub knows {name} as another: {what}");
    let usual = || {
        format!(
            "`mirrorhub failback {name}` on the hub gives it the volumes, if the old filer is lost; \
             it serves nothing before"
        )
    };
    let next_step = next.map_or_else(usual, str::to_owned);
    let code = RefusedCode::OtherSource;
    shared.set_link(LinkState::Halted(Refused { code, reason, next_step }));
}
