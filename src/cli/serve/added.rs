//! `device add`: new devices behind those that a pool has.
//!
//! Before anything is written to a device its path goes into `added-devices` in the `data_dir`, with the id
//! of the array that they become: a start takes up whatever a cut has left, and nothing but that. The
//! configuration file still names the old devices only; until it names the new ones as well the process
//! remembers them, as it does those that were replaced. The labels say what belongs together.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::devices::{Devices, refused};
use super::remembered;
use crate::config::schema::{DeviceConfig, PoolConfig};
use crate::control::message::{AdminError, code};
use crate::device::{Device, is_blank};
use crate::limits::RAID_MEMBERS_MAX;
use crate::raid::assemble::is_member;
use crate::raid::files::new_device;
use crate::raid::span::Adding;
use crate::units::ids::ArrayId;
use crate::units::numbers::ByteCount;

const FILE: &str = "added-devices";
fn load(data_dir: &Path) -> io::Result<Vec<Adding>> {
    remembered::load(&data_dir.join(FILE))
}

fn store(data_dir: &Path, added: &[Adding]) -> io::Result<()> {
    remembered::store(&data_dir.join(FILE), added)
}

/// Puts the paths of devices that were added behind those of the file, and says which these are. Of what
/// has come to its end is forgotten, with `forget`, what the file names by itself by now: what has not
/// is gone on with at each start until it has.
pub(super) fn apply(
    data_dir: &Path,
    pool: &mut PoolConfig,
    forget: bool,
) -> io::Result<Vec<Adding>> {
    let all = load(data_dir)?;
    let named = |path: &Path, pool: &PoolConfig| pool.devices.iter().any(|one| one.path == *path);
    let is_new = |one: &Adding| !one.done || !one.paths.iter().all(|path| named(path, pool));
    let left: Vec<Adding> = all.iter().filter(|one| is_new(one)).cloned().collect();
    if forget && left.len() < all.len() {
        store(data_dir, &left)?;
    }
    let size = pool.devices.iter().map(|device| device.size).min().unwrap_or_default();
    for path in all.iter().flat_map(|one| &one.paths) {
        if !named(path, pool) {
            tracing::warn!(device = %path.display(), "the file does not name a device that was added");
            pool.devices.push(DeviceConfig { path: path.clone(), size });
        }
    }
    Ok(all)
}

/// A device that was added, and that the file does not name yet, is another one by now.
pub(super) fn replaced(data_dir: &Path, old: &Path, new: &Path) -> io::Result<()> {
    let mut added = load(data_dir)?;
    let mut paths = added.iter_mut().flat_map(|one| &mut one.paths);
    match paths.find(|path| **path == *old) {
        Some(path) => new.clone_into(path),
        None => return Ok(()),
    }
    store(data_dir, &added)
}

impl Devices {
    /// Adds devices. Says what runs after the next start.
    pub(super) fn add(&self, paths: &[String]) -> Result<PoolConfig, AdminError> {
        let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
        let size = self.config.devices.iter().map(|device| device.size).min().unwrap_or_default();
        let (width, _) = self.upkeep.added_size(size.0).map_err(|error| refused(&error))?;
        self.check_paths(&paths, width)?;
        let id = ArrayId::random().map_err(|error| super::failed(error.to_string()))?;
        // What is there is looked at before anything is made.
        let there = |path: &&PathBuf| path.try_exists().unwrap_or(true);
        for path in paths.iter().filter(there) {
            new_one(path, size)?;
        }
        let devices =
            paths.iter().map(|path| new_one(path, size)).collect::<Result<Vec<_>, _>>()?;
        let least = devices.iter().map(|device| device.size().0).min().unwrap_or(0);
        self.check_room(least)?;
        let mut added = load(&self.data_dir).map_err(|error| self.unkept(&error))?;
        // These devices hold nothing: an attempt with one of them that failed before has left nothing.
        added.retain(|one| !one.paths.iter().any(|path| paths.contains(path)));
        added.push(Adding { array: id, paths: paths.clone(), done: false });
        store(&self.data_dir, &added).map_err(|error| self.unkept(&error))?;
        let done = self.upkeep.add_devices(id, &devices);
        done.map_err(|error| {
            let next = "mend the cause and restart: what was begun is gone on with then";
            AdminError::new(code::FAILED, error.to_string(), next)
        })?;
        if let Some(one) = added.last_mut() {
            one.done = true;
        }
        if let Err(error) = store(&self.data_dir, &added) {
            tracing::warn!(%error, "that the devices are added is found again by the next start");
        }
        let mut config = self.config.clone();
        config.devices.extend(paths.into_iter().map(|path| DeviceConfig { path, size }));
        Ok(config)
    }

    fn check_paths(&self, paths: &[PathBuf], width: usize) -> Result<(), AdminError> {
        if paths.len() != width {
            let (met, level) = (paths.len(), self.config.raid);
            let message = format!(
                "{met} devices are named, this pool grows by {width} at once: another {level} of {width}"
            );
            return Err(AdminError::new(code::REFUSED, message, "name as many as it has"));
        }
        let total = self.config.devices.len() + paths.len();
        if total > RAID_MEMBERS_MAX {
            let message = format!("a pool has at most {RAID_MEMBERS_MAX} devices, not {total}");
            return Err(AdminError::new(
                code::REFUSED,
                message,
                "name fewer, or make a new pool of larger ones",
            ));
        }
        let known = |path: &PathBuf| self.config.devices.iter().any(|one| one.path == *path);
        let again = |at: usize, path: &PathBuf| paths[..at].contains(path);
        match paths.iter().enumerate().find(|(at, path)| known(path) || again(*at, path)) {
            Some((_, path)) => Err(not_taken(format!("{} is of the pool already", path.display()))),
            None => Ok(()),
        }
    }

    /// The catalog, which keeps its size, bounds how far a pool can grow.
    fn check_room(&self, least: u64) -> Result<(), AdminError> {
        let (_, bytes) = self.upkeep.added_size(least).map_err(|error| refused(&error))?;
        let (now, most) = (self.pool.device_bytes(), self.pool.bytes_max());
        if bytes <= now {
            return Err(not_taken(format!("devices of {least} bytes are too small")));
        }
        if bytes > most {
            let message = format!(
                "the pool would have {bytes} bytes, and the catalog it was made with is for {most}"
            );
            return Err(AdminError::new(code::REFUSED, message, "add smaller ones"));
        }
        Ok(())
    }

    fn unkept(&self, error: &io::Error) -> AdminError {
        let message = format!("{}: {error}", self.data_dir.join(FILE).display());
        AdminError::new(code::FAILED, message, "mend that, then add them again")
    }
}

/// A device that holds nothing.
fn new_one(path: &Path, size: ByteCount) -> Result<Arc<dyn Device>, AdminError> {
    let device = new_device(path, size).map_err(|error| not_taken(error.to_string()))?;
    let blank = is_blank(&*device).map_err(|error| not_taken(error.to_string()))?;
    if is_member(&*device) || !blank {
        let why = "holds something already: a new device begins with 1 MiB of zeros";
        return Err(not_taken(format!("{} {why}", path.display())));
    }
    Ok(device)
}

fn not_taken(message: String) -> AdminError {
    AdminError::new(code::REFUSED, message, "name block devices or files that nothing else uses")
}
