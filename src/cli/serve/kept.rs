//! The hub's answers about kept CPs: pool errors in the words and codes of the admin socket.

use serde_json::Value;

use super::source::bytes_of;
use super::{answer, failed};
use crate::control::message::{AdminError, KeptTarget, code};
use crate::hub::Hub;
use crate::hub::kept::KeptError;
use crate::pool::error::PoolError;
use crate::pool::kept_row::KeptRow;
use crate::status::SCHEMA;
use crate::status::answers::{
    CheckpointOfSource, DropAnswer, KeptAnswer, KeptCp, KeptOfSource, VolumeRoot,
};
use crate::units::names::{KeptName, SourceName};
use crate::units::retention::Slot;
use crate::volume::error::VolumeError;

const LIST: &str = "`mirrorhub kept` lists them";

/// Refuses a name that keeps a CP already, or that would be dropped without being asked for.
pub(super) fn refuse_taken(
    hub: &Hub,
    source: &SourceName,
    name: &KeptName,
) -> Result<(), AdminError> {
    if Slot::of(name).is_some() {
        let message = format!("{name} is a name of CPs that are kept by themselves");
        let next = "take another name: it would be dropped like those";
        return Err(AdminError::new(code::REFUSED, message, next));
    }
    let all = hub.kept(source).map_err(|error| failed(error.to_string()))?;
    match all.iter().find(|kept| kept.row.name == *name) {
        None => Ok(()),
        Some(kept) => {
            let message = format!("{source}@{name} keeps CP {} already", kept.row.cp);
            Err(AdminError::new(code::NAME_TAKEN, message, "take another name, or drop that one"))
        }
    }
}

/// Keeps what is published now: the CP that was asked for or a newer one, which holds it.
pub(super) async fn keep(
    hub: &Hub,
    name: SourceName,
    keep: &KeptName,
) -> Result<CheckpointOfSource, AdminError> {
    let row = hub.keep(&name, keep.clone()).await.map_err(|error| {
        let message = format!("the CP of {name} is published but not kept: {error}");
        AdminError::new(code_of(&error), message, LIST)
    })?;
    let (cp, volumes) = (row.cp.0, roots(&row));
    Ok(CheckpointOfSource { name, cp, volumes })
}

/// What is kept of these sources.
pub(super) fn list(hub: &Hub, names: Vec<SourceName>) -> Result<Value, AdminError> {
    let mut sources = Vec::new();
    for name in names {
        let all = hub.kept(&name).map_err(|error| failed(error.to_string()))?;
        let kept = all.iter().map(|kept| KeptCp {
            name: kept.row.name.clone(),
            cp: kept.row.cp.0,
            held_bytes: bytes_of(kept.blocks),
            kept_at: kept.row.kept_at,
            volumes: roots(&kept.row),
        });
        let kept = kept.collect();
        sources.push(KeptOfSource { name, kept });
    }
    answer(&KeptAnswer { schema: SCHEMA, sources })
}

/// Gives one up.
pub(super) async fn drop(hub: &Hub, target: KeptTarget) -> Result<Value, AdminError> {
    let dropped = hub.drop_kept(&target.source, target.name.clone()).await.map_err(|error| {
        let message = format!("{target} is not dropped: {error}");
        AdminError::new(code_of(&error), message, LIST)
    })?;
    let KeptTarget { source, name } = target;
    let (cp, freed_bytes) = (dropped.cp.0, bytes_of(dropped.blocks));
    answer(&DropAnswer { schema: SCHEMA, source, name, cp, freed_bytes })
}

fn roots(row: &KeptRow) -> Vec<VolumeRoot> {
    let root = |volume: &crate::pool::kept_row::KeptVolume| VolumeRoot {
        name: volume.name.clone(),
        root: volume.tree.root(),
    };
    row.volumes.iter().map(root).collect()
}

fn code_of(error: &KeptError) -> &'static str {
    match error {
        KeptError::NeverHeard(_)
        | KeptError::Volume(VolumeError::Pool(PoolError::UnknownKept { .. })) => code::UNKNOWN_KEPT,
        KeptError::Volume(VolumeError::Pool(PoolError::KeptBusy { .. })) => code::BUSY,
        KeptError::Volume(_) => code::FAILED,
        KeptError::Fault(_) => code::INTERNAL,
    }
}
