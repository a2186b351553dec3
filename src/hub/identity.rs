//! Who this hub is, and how it becomes one.
//!
//! Called by [`super::recover`] before anything is opened. The id is durable before the ring and
//! the pool are made for it, so a first start that ends anywhere is taken up by the next one:
//!
//! 1. `identity.json` with the hub's id and an empty list of what it is `making`;
//! 2. for ring, then pool: the file is made, or a file or block device that is there is found to
//!    begin with zeros; its path goes into the list; it becomes the hub's;
//! 3. the log directory is made, and in it the file that names its hub;
//! 4. `identity.json` without the list.
//!
//! What begins with anything else than zeros is refused before it is in the list, and nothing is
//! written to it. A path in the list holds nothing of value: a file of which a power cut tore the
//! first header is begun anew, a block device never (its name may lead to another one by now).
//!
//! After step 4 nothing is made any more: a ring, pool or log directory that is missing then is a
//! loss (R20).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{HubError, HubOptions};
use crate::device::directory::{create_durably, replace_durably};
use crate::device::file::{Access, FileDevice, FileError};
use crate::device::latch::Latch;
use crate::device::{BLANK_BYTES, Device, is_blank};
use crate::nvlog::{Ring, RingError, RingOptions, RingShape};
use crate::pool::error::PoolError;
use crate::pool::label::is_pool;
use crate::pool::{Pool, PoolOptions};
use crate::raid::assemble::{self, AssembleError, OpenOptions};
use crate::raid::files::PoolFiles;
use crate::units::convert::to_usize;
use crate::units::ids::HubId;
use crate::units::numbers::ByteCount;

/// Format of the identity file.
const SCHEMA: u32 = 1;

/// The identity file of a hub.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    schema: u32,
    pub(super) hub: HubId,
    /// During the first start or an import: what was found empty and is being made the hub's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) making: Option<Vec<PathBuf>>,
}

/// What an identity file of any version has.
#[derive(Debug, Deserialize)]
struct Schema {
    schema: u32,
}

impl Identity {
    /// Of that hub.
    pub(super) fn new(hub: HubId, making: Option<Vec<PathBuf>>) -> Self {
        Self { schema: SCHEMA, hub, making }
    }
}

/// The identity file's name.
pub(super) const FILE: &str = "identity.json";

/// Steps a first start may take; a test ends it early.
#[derive(Debug)]
pub(super) struct Steps(pub(super) u32);

impl Steps {
    pub(super) fn take(&mut self) -> Result<(), HubError> {
        let reason = "it was ended".to_owned();
        let ended = HubError::State { what: "first start".to_owned(), reason };
        self.0 = self.0.checked_sub(1).ok_or(ended)?;
        Ok(())
    }
}

pub(super) fn state<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> HubError {
    let what = what.into();
    move |error| HubError::State { what, reason: error.to_string() }
}

/// The hub's id; the first start makes it, the ring and the pool.
pub fn identity(options: &HubOptions) -> Result<HubId, HubError> {
    identity_within(options, &mut Steps(u32::MAX))
}

fn identity_within(options: &HubOptions, steps: &mut Steps) -> Result<HubId, HubError> {
    let directory = &options.data_dir;
    let path = directory.join(FILE);
    let mut identity = match find(&path)? {
        Some(identity) => identity,
        None => {
            refuse_pool(&options.pool)?;
            create_durably(directory)
                .map_err(state(format!("data_dir {}", directory.display())))?;
            let hub = HubId::random().map_err(state("hub id"))?;
            let identity = Identity::new(hub, Some(Vec::new()));
            write(&path, &identity)?;
            identity
        }
    };
    let hub = identity.hub;
    if identity.making.is_none() {
        return Ok(hub);
    }
    steps.take()?;
    let ring = take_device(&path, &mut identity, &options.nvram, Access::Direct, steps)?;
    make_ring(&options.nvram.0, ring, hub)?;
    steps.take()?;
    let (pool, mine) = take_pool(&path, &mut identity, &options.pool, steps)?;
    make_pool(mine, pool, hub)?;
    steps.take()?;
    make_logs(&options.log_dir, hub)?;
    steps.take()?;
    identity.making = None;
    write(&path, &identity)?;
    tracing::info!(%hub, "first start: hub created");
    Ok(hub)
}

/// What the identity file says, if there is one.
pub(super) fn find(path: &Path) -> Result<Option<Identity>, HubError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(read(path, &text)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(state(path.display().to_string())(error)),
    }
}

/// A hub that has lost its state directory is not made anew over its own pool: said before anything
/// is made.
fn refuse_pool(files: &PoolFiles) -> Result<(), HubError> {
    for (path, _) in &files.devices {
        let Ok(device) = FileDevice::open(path, Access::Cached) else { continue };
        if assemble::is_member(&device) || is_pool(&device) {
            let reason =
                "it holds something already: a pool. `mirrorhub import` shows whose it is \
                          and takes it up; wipe its first MiB to make a new one of it"
                    .to_owned();
            return Err(HubError::State { what: path.display().to_string(), reason });
        }
    }
    Ok(())
}

fn read(path: &Path, text: &str) -> Result<Identity, HubError> {
    let what = || path.display().to_string();
    // First alone: what else a later one has is not known here.
    let Schema { schema } = serde_json::from_str(text).map_err(state(what()))?;
    if schema != SCHEMA {
        let reason = format!("has schema {schema}, this program reads {SCHEMA}");
        return Err(HubError::State { what: what(), reason });
    }
    serde_json::from_str(text).map_err(state(what()))
}

pub(super) fn write(path: &Path, identity: &Identity) -> Result<(), HubError> {
    let text = serde_json::to_string_pretty(identity).map_err(state(path.display().to_string()))?;
    replace_durably(path, text.as_bytes()).map_err(state(path.display().to_string()))
}

/// The file that names the owner of a log directory.
pub(super) const OWNER_FILE: &str = "hub-id";

/// Makes the log directory this hub's; another hub's is refused and stays as it was.
pub(super) fn make_logs(dir: &Path, hub: HubId) -> Result<(), HubError> {
    let path = dir.join(OWNER_FILE);
    match fs::read_to_string(&path) {
        Ok(_) => return own_logs(dir, hub),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(state(path.display().to_string())(error)),
    }
    create_durably(dir).map_err(state(format!("log_dir {}", dir.display())))?;
    replace_durably(&path, hub.to_string().as_bytes()).map_err(state(path.display().to_string()))
}

/// The log directory is the one that this hub has written to: one that is empty or another's would
/// pass for sources that have nothing to lose (R20).
pub(super) fn own_logs(dir: &Path, hub: HubId) -> Result<(), HubError> {
    let path = dir.join(OWNER_FILE);
    let refuse = |met: String| {
        let reason = format!(
            "{met}; bring the log directory of hub {hub} back, or, if it is lost, move what is in {} away: \
             `mirrorhub import` takes the hub up without, and each source sends again what it holds",
            dir.display()
        );
        Err(HubError::State { what: format!("source logs in {}", dir.display()), reason })
    };
    match fs::read_to_string(&path) {
        Ok(text) if text.trim() == hub.to_string() => Ok(()),
        Ok(text) => refuse(format!("it belongs to hub {}", text.trim())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            refuse(format!("there is no file {OWNER_FILE} in it"))
        }
        Err(error) => Err(state(path.display().to_string())(error)),
    }
}

/// Opens a file or block device, or makes the file; it is in the list when this returns.
fn take_device(
    path: &Path,
    identity: &mut Identity,
    (wanted, size): &(PathBuf, ByteCount),
    access: Access,
    steps: &mut Steps,
) -> Result<Arc<dyn Device>, HubError> {
    let name = || wanted.display().to_string();
    let device: Arc<dyn Device> = match FileDevice::open(wanted, access) {
        Ok(device) => Arc::new(Latch::new(device)),
        Err(FileError::Missing(_)) => {
            if let Some(directory) = wanted.parent() {
                create_durably(directory).map_err(state(directory.display().to_string()))?;
            }
            let made = match access {
                Access::Direct => FileDevice::create(wanted, *size, access),
                Access::Cached => FileDevice::create_unwritten(wanted, *size, access),
            };
            Arc::new(Latch::new(made.map_err(state(name()))?))
        }
        Err(error) => return Err(state(name())(error)),
    };
    steps.take()?;
    let making = identity.making.get_or_insert_default();
    if !making.contains(wanted) {
        check_blank(&*device)?;
        making.push(wanted.clone());
        write(path, identity)?;
    }
    steps.take()?;
    Ok(device)
}

/// Refuses what may be somebody else's.
fn check_blank(device: &dyn Device) -> Result<(), HubError> {
    if is_blank(device).map_err(state(device.name().to_string()))? {
        return Ok(());
    }
    let reason = "it holds something already, and a new hub takes only what begins with 1 MiB of \
                  zeros; give back this hub's own identity.json, or name another path, or wipe it"
        .to_owned();
    Err(HubError::State { what: device.name().to_string(), reason })
}

pub(super) fn make_ring(path: &Path, device: Arc<dyn Device>, hub: HubId) -> Result<(), HubError> {
    match Ring::open(device.clone(), hub.0, RingOptions::default(), &mut |_| {}) {
        Ok(_) => return Ok(()),
        Err(RingError::Blank { .. }) => {}
        Err(RingError::Headers { .. }) if path.is_file() => wipe(&*device)?,
        Err(error) => return Err(state("NVRAM")(error)),
    }
    Ring::create(device, hub.0, RingShape::default()).map_err(state("NVRAM"))
}

/// Opens or makes the pool's device, and says whether whatever is on it may be wiped.
fn take_pool(
    path: &Path,
    identity: &mut Identity,
    files: &PoolFiles,
    steps: &mut Steps,
) -> Result<(Arc<dyn Device>, bool), HubError> {
    if let Some(plain) = files.as_plain() {
        let device = take_device(path, identity, plain, Access::Cached, steps)?;
        return Ok((device, plain.0.is_file()));
    }
    let mut devices = Vec::new();
    for device in &files.devices {
        devices.push(take_device(path, identity, device, Access::Cached, steps)?);
    }
    match assemble::open(&devices, OpenOptions::default()) {
        Ok(opened) => return Ok((opened.array, true)),
        Err(AssembleError::None) => {}
        Err(error) => return Err(state("pool")(error)),
    }
    // A label that a power cut tore is the only thing that can be on a file of the list.
    for ((file, _), device) in files.devices.iter().zip(&devices) {
        if file.is_file() {
            wipe(&**device)?;
        }
    }
    let array = assemble::create(files.level, &devices).map_err(state("pool"))?;
    Ok((array, true))
}

/// `mine`: nothing on it can be of value.
fn make_pool(mine: bool, device: Arc<dyn Device>, hub: HubId) -> Result<(), HubError> {
    let options = PoolOptions { owner: Some(hub.0), ..PoolOptions::default() };
    match Pool::open(device.clone(), options.clone()) {
        Ok(_) => return Ok(()),
        Err(PoolError::NotAPool { .. } | PoolError::LabelCorrupt { .. }) if mine => {
            wipe(&*device)?;
        }
        // Of a block device the creation takes zeros, or a pool that was not finished.
        Err(PoolError::NotAPool { .. }) => {}
        Err(error) => return Err(state("pool")(error)),
    }
    drop(Pool::create(device, hub.0, options).map_err(state("pool"))?);
    Ok(())
}

/// Takes back headers that a power cut tore when they were made.
fn wipe(device: &dyn Device) -> Result<(), HubError> {
    let heads = to_usize(BLANK_BYTES.min(device.size().0));
    device.write_durable_at(0, &vec![0; heads]).map_err(state(device.name().to_string()))
}

#[cfg(test)]
mod tests;
