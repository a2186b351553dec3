//! Scrub and devices of a running process: what is asked over the admin socket, and its series.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::{answer, failed};
use crate::control::message::{AdminError, Progress, ProgressSender, ProgressUnit, code};
use crate::limits::ADMIN_PROGRESS_MS;
use crate::metric::catalogue as names;
use crate::status::SCHEMA;
use crate::status::upkeep::{ScrubAnswer, ScrubStatus};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_f64, to_u64};
use crate::upkeep::Upkeep;

/// Begins a scrub, or ends the one under way, and answers at once or when it has ended.
pub(super) async fn scrub(
    upkeep: &Upkeep,
    wait: bool,
    stop: bool,
    progress: &ProgressSender,
) -> Result<Value, AdminError> {
    let before = upkeep.scrubs_ended();
    let mut began = false;
    if stop {
        if !upkeep.halt_scrub() {
            let next = "`mirrorhub status` says when the last one was";
            return Err(AdminError::new(code::REFUSED, "no scrub is under way", next));
        }
    } else {
        began = upkeep.begin_scrub();
    }
    let mut tick = tokio::time::interval(Duration::from_millis(ADMIN_PROGRESS_MS));
    while (wait || stop) && upkeep.scrubs_ended() == before {
        tick.tick().await;
        progress.send(shown(&upkeep.scrub()));
    }
    let scrub = upkeep.scrub();
    match &scrub.problem {
        Some(problem) if !scrub.running => Err(failed(format!("scrub: {problem}"))),
        _ => answer(&ScrubAnswer { schema: SCHEMA, began, scrub }),
    }
}

fn shown(scrub: &ScrubStatus) -> Progress {
    Progress {
        what: "scrub of".to_owned(),
        object: "the pool".to_owned(),
        done: scrub.done_bytes / BLOCK_BYTES_U64,
        total: Some(scrub.total_bytes / BLOCK_BYTES_U64),
        unit: ProgressUnit::Blocks,
    }
}

/// Ends the thread: it may be in the middle of a read.
pub(super) async fn stop(upkeep: Arc<Upkeep>) {
    if tokio::task::spawn_blocking(move || upkeep.stop()).await.is_err() {
        tracing::error!("the upkeep of the pool did not stop well");
    }
}

/// Its series.
pub(super) fn collect(upkeep: &Upkeep) {
    let scrub = upkeep.scrub();
    let set = |name: &'static str, value: f64| metrics::gauge!(name).set(value);
    set(names::SCRUB_RUNNING.name, to_f64(u64::from(scrub.running)));
    set(names::SCRUB_DONE_BYTES.name, to_f64(scrub.done_bytes));
    set(names::SCRUB_TOTAL_BYTES.name, to_f64(scrub.total_bytes));
    let mended = scrub.repaired_blocks + scrub.repaired_copies + scrub.from_other_end_blocks;
    set(names::SCRUB_REPAIRED.name, to_f64(mended));
    set(names::SCRUB_LOST.name, to_f64(scrub.lost_blocks.max(to_u64(scrub.lost.len()))));
    let rebuild = upkeep.rebuild().unwrap_or_default();
    set(names::REBUILD_DONE_BYTES.name, to_f64(rebuild.done_bytes));
    let total = if rebuild.devices > 0 { rebuild.total_bytes } else { 0 };
    set(names::REBUILD_TOTAL_BYTES.name, to_f64(total));
    set(names::REBUILD_LOST_BLOCKS.name, to_f64(rebuild.lost_blocks));
    let ended = scrub.ended_at.and_then(|at| u64::try_from(at).ok());
    set(names::SCRUB_TIME.name, ended.map_or(f64::NAN, to_f64));
    set(names::SCRUB_AGE_SECONDS.name, scrub.age_seconds.unwrap_or(f64::NAN));
}
