//! A hub whose state directory is gone comes back from its devices.
//!
//! Called by `mirrorhub import` while no hub runs. The pool knows everything that has to outlive the
//! `data_dir`: the hub's id (its owner), sources, epochs, images and kept CPs. [`look`] opens it behind
//! devices that write to memory ([`Overlay`]), exactly as a start would, and says what is there: nothing
//! on any disk changes, also if it cannot be opened. [`take`] makes the `data_dir` of that hub again:
//!
//! 1. if ring or logs are gone, every source is marked to send again ([`super::refill`]): first, since a
//!    start that finds the list of step 2 may make the ring before it refuses the pool;
//! 2. `identity.json` with the hub's id and the ring in the list of what is being made, if it is gone;
//! 3. the ring, if it is gone; 4. the log directory, if it is gone; 5. `identity.json` without the list.
//!
//! So does an import where `identity.json` is there and the ring or the logs are gone. Where all of it is
//! there, nothing is to be imported.
//!
//! After a cut before step 5 a start refuses as before, since the pool is in no list and not blank, and
//! the same import does the rest. What is there and is another's, or damaged, is refused by name: a
//! foreign device is never taken by accident, and a blank one is no pool.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::extension::{Extension, State};
use super::identity::{self, Identity, OWNER_FILE, Steps, state};
use super::promoted;
use super::refill::{Mark, Refills};
use super::{HubError, HubOptions};
use crate::device::directory::create_durably;
use crate::device::file::{Access, FileDevice, FileError};
use crate::device::latch::Latch;
use crate::device::overlay::Overlay;
use crate::device::{Device, MemberReport};
use crate::nvlog::{Ring, RingError, RingOptions};
use crate::pool::rows::{SourceRow, VolumeRow};
use crate::pool::{Pool, PoolOptions};
use crate::raid::assemble::LeftOut;
use crate::units::ids::{HubId, PoolId, SourceId};
use crate::units::names::{KeptName, SourceName};
use crate::units::numbers::{CpNumber, Generation};

/// What may have been in the `data_dir`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// It is there, and this hub's.
    Kept,
    /// It is not there, and is made anew and empty.
    Gone,
}

/// A source of the pool.
#[derive(Debug, Clone)]
pub struct FoundSource {
    /// Its id.
    pub id: SourceId,
    /// Its name.
    pub name: SourceName,
    /// Who serves it.
    pub state: State,
    /// Its last boot that was here.
    pub generation: Generation,
    /// The published CP.
    pub applied: CpNumber,
    /// Its volumes.
    pub volumes: Vec<VolumeRow>,
    /// CPs kept by name.
    pub kept: Vec<KeptName>,
    /// It is served here, and the NVRAM with what its clients wrote last is gone.
    pub nvram_gone: bool,
}

/// What is on the devices of a configuration.
#[derive(Debug, Clone)]
pub struct Found {
    /// Whose pool it is.
    pub hub: HubId,
    /// The pool.
    pub pool: PoolId,
    /// Its devices by place; none if it lies on a plain one.
    pub devices: Vec<MemberReport>,
    /// Devices that are not used, and why.
    pub left_out: Vec<LeftOut>,
    /// Its sources, by name.
    pub sources: Vec<FoundSource>,
    /// The ring.
    pub nvram: Part,
    /// The source logs.
    pub logs: Part,
}

impl Found {
    /// Whether sources have to send again what was acknowledged behind their images.
    pub fn log_is_lost(&self) -> bool {
        self.nvram == Part::Gone || self.logs == Part::Gone
    }
}

/// Says what an import would take up; nothing is written.
pub fn look(options: &HubOptions) -> Result<Found, HubError> {
    let over = |device| -> Arc<dyn Device> { Arc::new(Overlay::new(device)) };
    let (device, left_out) = options.pool.open_over(&over).map_err(state("pool"))?;
    let devices = device.members();
    let pool = Pool::open(device, PoolOptions::default()).map_err(state("pool"))?;
    let hub = HubId(pool.owner());
    let (listed, is_made) = unfinished(&options.data_dir, hub)?;
    let (nvram, logs) = (ring_of(options, hub, &listed)?, logs_of(&options.log_dir, hub)?);
    if is_made && (nvram, logs) == (Part::Kept, Part::Kept) {
        let reason = format!("this is hub {hub} already, with its NVRAM and its logs: start it");
        let what = options.data_dir.join(identity::FILE).display().to_string();
        return Err(HubError::State { what, reason });
    }
    let mut sources = Vec::new();
    for row in pool.catalog().sources().map_err(state("catalog"))? {
        sources.push(source_of(options, &pool, row)?);
    }
    sources.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(Found { hub, pool: pool.id(), devices, left_out, sources, nvram, logs })
}

fn source_of(
    options: &HubOptions,
    pool: &Arc<Pool>,
    row: SourceRow,
) -> Result<FoundSource, HubError> {
    let catalog = pool.catalog();
    let extension = Extension::of(&row).map_err(state("catalog"))?;
    let kept = catalog.kept(row.id).map_err(state("catalog"))?;
    let nvram = promoted::nvram_in(&promoted::directory_in(&options.data_dir), row.id);
    let there = nvram.try_exists().map_err(state(nvram.display().to_string()))?;
    Ok(FoundSource {
        id: row.id,
        volumes: catalog.volumes(row.id).map_err(state("catalog"))?,
        kept: kept.into_iter().map(|kept| kept.row.name.clone()).collect(),
        nvram_gone: extension.nvram_made && !there,
        state: extension.state,
        generation: row.generation,
        applied: row.applied,
        name: row.name,
    })
}

/// What a first start, or an import, that did not come to its end was making here; and whether this is
/// that hub's already.
fn unfinished(data_dir: &Path, hub: HubId) -> Result<(Vec<PathBuf>, bool), HubError> {
    let path = data_dir.join(identity::FILE);
    let Some(found) = identity::find(&path)? else { return Ok((Vec::new(), false)) };
    match found.making {
        Some(listed) => Ok((listed, false)),
        None if found.hub == hub => Ok((Vec::new(), true)),
        None => {
            let reason = format!(
                "this is the data_dir of hub {}, the devices are of hub {hub}: give that hub a \
                 data_dir of its own",
                found.hub
            );
            Err(HubError::State { what: path.display().to_string(), reason })
        }
    }
}

/// Whether the ring is there. `listed`: what holds nothing of value.
fn ring_of(options: &HubOptions, hub: HubId, listed: &[PathBuf]) -> Result<Part, HubError> {
    let (path, _) = &options.nvram;
    let device: Arc<dyn Device> = match FileDevice::open(path, Access::Direct) {
        Ok(device) => Arc::new(Overlay::new(Arc::new(device))),
        Err(FileError::Missing(_)) => return Ok(Part::Gone),
        Err(error) => return Err(state("NVRAM")(error)),
    };
    let opened = Ring::open(device, hub.0, RingOptions::default(), &mut |_| {}).map(drop);
    judge_ring(opened, hub, path, (path.is_file(), listed.contains(path)))
}

/// What a ring is worth that was opened, or was not. `listed`: it was being made here, and holds nothing of
/// value; of a block device that is not believed, since its name may lead to another one by now.
fn judge_ring(
    opened: Result<(), RingError>,
    hub: HubId,
    path: &Path,
    (is_file, listed): (bool, bool),
) -> Result<Part, HubError> {
    let error = match opened {
        Ok(()) => return Ok(Part::Kept),
        Err(RingError::Blank { .. }) => return Ok(Part::Gone),
        Err(_) if is_file && listed => return Ok(Part::Gone),
        Err(error) => error,
    };
    let bring = format!("bring the NVRAM of hub {hub} back");
    let shown = path.display();
    let wipe = format!("`dd if=/dev/zero of={shown} bs=1M count=1 conv=fsync`, then import again");
    let next = match (&error, is_file, listed) {
        (_, true, _) => format!("{bring}, or, if it is lost, move this one away"),
        (RingError::Headers { .. }, false, true) => format!(
            "an import or a first start that was cut was making a ring here; if {shown} still is that \
             device, it holds nothing of value: {wipe}"
        ),
        (_, false, _) => format!(
            "{bring}, or name another device in nvram.path; or, if it is lost and nothing else uses {shown}: \
             {wipe}"
        ),
    };
    Err(HubError::State { what: "NVRAM".to_owned(), reason: format!("{error}; {next}") })
}

/// Whether the source logs are there.
fn logs_of(dir: &Path, hub: HubId) -> Result<Part, HubError> {
    let owner = dir.join(OWNER_FILE);
    let failed = |path: &Path| state(path.display().to_string());
    match fs::read_to_string(&owner) {
        Ok(_) => return identity::own_logs(dir, hub).map(|()| Part::Kept),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&owner)(error)),
    }
    // What a file system begins with, and what a cut import has left.
    let draft = owner.with_extension("draft");
    let is_nothing =
        |entry: &fs::DirEntry| entry.file_name() == "lost+found" || entry.path() == draft;
    let is_empty = |entries: fs::ReadDir| entries.flatten().all(|entry| is_nothing(&entry));
    match fs::read_dir(dir).map(is_empty) {
        Ok(true) => Ok(Part::Gone),
        Ok(false) => {
            let reason = format!(
                "it holds something, and no file {OWNER_FILE} that says whose; move it away"
            );
            Err(HubError::State { what: format!("source logs in {}", dir.display()), reason })
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Part::Gone),
        Err(error) => Err(failed(dir)(error)),
    }
}

/// Makes the `data_dir` of that hub again, so that it can be started. Another one's devices are
/// refused.
pub fn take(options: &HubOptions, hub: HubId) -> Result<Found, HubError> {
    take_within(options, hub, &mut Steps(u32::MAX))
}

fn take_within(options: &HubOptions, hub: HubId, steps: &mut Steps) -> Result<Found, HubError> {
    let found = look(options)?;
    if found.hub != hub {
        let reason = format!("these devices are of hub {}, not of {hub}", found.hub);
        return Err(HubError::State { what: "pool".to_owned(), reason });
    }
    let data_dir = &options.data_dir;
    create_durably(data_dir).map_err(state(format!("data_dir {}", data_dir.display())))?;
    let path = data_dir.join(identity::FILE);
    let (ring, gone) = (&options.nvram.0, found.nvram == Part::Gone);
    let making = if gone { vec![ring.clone()] } else { Vec::new() };
    steps.take()?;
    steps.take()?;
    if found.log_is_lost() {
        let refills = Refills::of(data_dir);
        // What is served here, or was given away, has no log that another end could send again.
        let mirrored =
            |source: &&FoundSource| matches!(source.state, State::Mirror | State::FailingOver);
        let mark =
            |source: &FoundSource| (source.id, Mark { generation: source.generation, what: None });
        let marked = refills.mark(found.sources.iter().filter(mirrored).map(mark));
        marked.map_err(state(refills.directory().display().to_string()))?;
    }
    steps.take()?;
    identity::write(&path, &Identity::new(hub, Some(making)))?;
    steps.take()?;
    if gone {
        make_ring(options, hub)?;
    }
    steps.take()?;
    identity::make_logs(&options.log_dir, hub)?;
    steps.take()?;
    identity::write(&path, &Identity::new(hub, None))?;
    tracing::info!(%hub, "imported");
    Ok(found)
}

/// A ring in the place of one that is gone: [`ring_of`] has found nothing of value there.
fn make_ring(options: &HubOptions, hub: HubId) -> Result<(), HubError> {
    let (path, size) = &options.nvram;
    let device = match FileDevice::open(path, Access::Direct) {
        Ok(device) => device,
        Err(FileError::Missing(_)) => {
            crate::device::file::create_parent(path).map_err(state("NVRAM"))?;
            FileDevice::create(path, *size, Access::Direct).map_err(state("NVRAM"))?
        }
        Err(error) => return Err(state("NVRAM")(error)),
    };
    let device = Arc::new(Latch::new(device));
    if path.is_file() {
        // Of another hub id, if a first start began here before anybody thought of an import.
        Ring::erase(&*device).map_err(state("NVRAM"))?;
    }
    identity::make_ring(path, device, hub)
}

#[cfg(test)]
mod tests;
