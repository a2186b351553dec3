//! `device add`: new devices behind those that a pool has.
//!
//! Before anything is written to a device its path goes into `added-devices` in the `data_dir`, with the id
//! of the array that they become: a start takes up whatever a cut has left, and nothing but that. They are
//! in use when the command returns. The configuration file still names the old devices only; until it names
//! the new ones as well the process remembers them, as it does those that were replaced. The labels say what
//! belongs together.
//!
//! An addition that does not come to its end is **pending**: `status` and `device list` name it, and each
//! start of the process, or the same command, goes on with it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::devices::Devices;
use super::remembered;
use crate::config::schema::{DeviceConfig, PoolConfig};
use crate::control::message::{AdminError, code};
use crate::device::{Device, is_blank};
use crate::limits::RAID_MEMBERS_MAX;
use crate::pool::Pool;
use crate::raid::assemble::is_member;
use crate::raid::files::new_device;
use crate::raid::span::Adding;
use crate::units::ids::ArrayId;
use crate::units::numbers::ByteCount;
use crate::upkeep::Upkeep;

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

/// Those that have not come to their end.
fn open_ones(all: &[Adding], pool: &Pool) -> Vec<Adding> {
    let behind = pool.behind();
    all.iter().filter(|one| !one.done && !behind.contains(&one.array)).cloned().collect()
}

/// Status and `device list` name them from now on.
fn tell(upkeep: &Upkeep, all: &[Adding], pool: &Pool) {
    let paths = open_ones(all, pool).into_iter().flat_map(|one| one.paths);
    upkeep.set_pending(paths.map(|path| path.display().to_string()).collect());
}

/// Goes on with what an earlier process was adding and the open did not, since a plain device is at home.
/// Until it is done, and if it cannot be, it is pending. Beside everything else: that may take long, and
/// clients do not wait for it.
pub(super) fn go_on(data_dir: &Path, pool: Arc<Pool>, upkeep: Arc<Upkeep>) -> JoinHandle<()> {
    let data_dir = data_dir.to_owned();
    tokio::task::spawn_blocking(move || go_on_now(&data_dir, &pool, &upkeep))
}

fn go_on_now(data_dir: &Path, pool: &Pool, upkeep: &Upkeep) {
    let load = || match load(data_dir) {
        Ok(all) => all,
        Err(error) => {
            tracing::error!(%error, "what is being added is not known");
            Vec::new()
        }
    };
    if open_ones(&load(), pool).is_empty() {
        return;
    }
    let _turn = upkeep.wait_devices_turn("what an earlier `device add` began");
    let all = load();
    tell(upkeep, &all, pool);
    for one in open_ones(&all, pool).iter().filter(|_| pool.is_plain_at_home()) {
        let opened: Result<Vec<_>, _> =
            one.paths.iter().map(|path| new_device(path, ByteCount(0))).collect();
        let done = opened.map_err(|error| error.to_string()).and_then(|devices| {
            pool.add_devices(one.array, &devices).map_err(|error| error.to_string())
        });
        match done {
            Ok(()) => tracing::info!(array = %one.array, "devices that were being added are added"),
            Err(error) => tracing::error!(error, "an addition does not come to its end"),
        }
    }
    tell(upkeep, &all, pool);
}

impl Devices {
    /// Adds devices. Says what runs from then on.
    pub(super) fn add(&self, paths: &[String]) -> Result<PoolConfig, AdminError> {
        let _turn = self.turn(&format!("device add {}", paths.join(" ")))?;
        let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
        let size = self.config.devices.iter().map(|device| device.size).min().unwrap_or_default();
        let (width, _) = self.pool.added_size(size.0);
        let mut added = load(&self.data_dir).map_err(|error| self.unkept(&error))?;
        self.check_paths(&paths, width, &added)?;
        let again = added.iter().position(|one| !one.done && one.paths == paths);
        let id = match again {
            Some(at) => added[at].array,
            None => ArrayId::random().map_err(|error| super::failed(error.to_string()))?,
        };
        let opened = |path: &PathBuf| match again {
            // What it has begun was looked at by then.
            Some(_) => new_device(path, size).map_err(|error| not_taken(error.to_string())),
            None => new_one(path, size),
        };
        // What is there is looked at before anything is made.
        let there = |path: &&PathBuf| path.try_exists().unwrap_or(true);
        for path in paths.iter().filter(there) {
            opened(path)?;
        }
        let devices = paths.iter().map(opened).collect::<Result<Vec<_>, _>>()?;
        let least = devices.iter().map(|device| device.size().0).min().unwrap_or(0);
        self.check_room(least)?;
        // These devices hold nothing: an attempt with one of them that failed before has left nothing.
        added.retain(|one| one.array == id || !one.paths.iter().any(|path| paths.contains(path)));
        if again.is_none() {
            added.push(Adding { array: id, paths, done: false });
        }
        store(&self.data_dir, &added).map_err(|error| self.unkept(&error))?;
        let done = self.pool.add_devices(id, &devices);
        tell(&self.upkeep, &added, &self.pool);
        done.map_err(|error| {
            let next = "mend the cause, then give the same command again, or restart: what was begun is \
                        gone on with then";
            AdminError::new(code::FAILED, error.to_string(), next)
        })?;
        added.iter_mut().filter(|one| one.array == id).for_each(|one| one.done = true);
        if let Err(error) = store(&self.data_dir, &added) {
            tracing::warn!(%error, "that the devices are added is found again by the next start");
        }
        Ok(self.with_added(&added, size))
    }

    /// The configuration that runs: with all that was added, by whatever command.
    fn with_added(&self, added: &[Adding], size: ByteCount) -> PoolConfig {
        let mut config = self.config.clone();
        for path in added.iter().filter(|one| one.done).flat_map(|one| &one.paths) {
            if !config.devices.iter().any(|device| device.path == *path) {
                config.devices.push(DeviceConfig { path: path.clone(), size });
            }
        }
        config
    }

    fn check_paths(
        &self,
        paths: &[PathBuf],
        width: usize,
        added: &[Adding],
    ) -> Result<(), AdminError> {
        if paths.len() != width {
            let (met, level) = (paths.len(), self.config.raid);
            let message = format!(
                "{met} devices are named, this pool grows by {width} at once: another {level} of {width}"
            );
            return Err(AdminError::new(code::REFUSED, message, "name as many as it has"));
        }
        let running = self.with_added(added, ByteCount(0));
        let total = running.devices.len() + paths.len();
        if total > RAID_MEMBERS_MAX {
            let message = format!("a pool has at most {RAID_MEMBERS_MAX} devices, not {total}");
            return Err(AdminError::new(
                code::REFUSED,
                message,
                "name fewer, or make a new pool of larger ones",
            ));
        }
        let known = |path: &PathBuf| {
            let pending = added.iter().any(|one| !one.done && one.paths == paths);
            !pending && running.devices.iter().any(|one| one.path == *path)
        };
        let again = |at: usize, path: &PathBuf| paths[..at].contains(path);
        match paths.iter().enumerate().find(|(at, path)| known(path) || again(*at, path)) {
            Some((_, path)) => Err(not_taken(format!("{} is of the pool already", path.display()))),
            None => Ok(()),
        }
    }

    /// The catalog, which keeps its size, bounds how far a pool can grow.
    fn check_room(&self, least: u64) -> Result<(), AdminError> {
        let (_, bytes) = self.pool.added_size(least);
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
