//! The devices of a running process's pool: list, fail, replace; and which file stands for which.
//!
//! The labels on the devices say what belongs together, and the configuration file where to look.
//! After a `replace` the file still names the old device. So the process remembers, in
//! `replaced-devices` in its `data_dir`, that another path has its place, until the file says so
//! itself; `config diff` and `status` name the difference. Without that memory the file's own path
//! counts: its device is known to be replaced, and the array opens without that place.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{added, answer, device_status, remembered};
use crate::config::schema::PoolConfig;
use crate::control::message::{AdminError, Progress, ProgressSender, ProgressUnit, code};
use crate::limits::ADMIN_PROGRESS_MS;
use crate::pool::Pool;
use crate::raid::files::new_device;
use crate::raid::rebuild::ManageError;
use crate::raid::span::Adding;
use crate::status::SCHEMA;
use crate::status::document::PoolDeviceStatus;
use crate::status::upkeep::DevicesAnswer;
use crate::units::BLOCK_BYTES_U64;
use crate::units::numbers::ByteCount;
use crate::units::times::time_of_day;
use crate::upkeep::Upkeep;
use crate::upkeep::turn::{Taken, Turn};

const FILE: &str = "replaced-devices";
type Replaced = Vec<(PathBuf, PathBuf)>;

fn load(data_dir: &Path) -> io::Result<Replaced> {
    remembered::load(&data_dir.join(FILE))
}

fn store(data_dir: &Path, replaced: &Replaced) -> io::Result<()> {
    remembered::store(&data_dir.join(FILE), replaced)
}

/// Puts the paths of new devices where the file still names the old ones, and of those that were added
/// behind them; says which these are. What the file says by itself by now is forgotten, with `forget`:
/// else nothing is written.
pub(super) fn apply(data_dir: &Path, pool: &mut PoolConfig, forget: bool) -> Result<Vec<Adding>> {
    let shown = || format!("{}", data_dir.join(FILE).display());
    let mut replaced = load(data_dir).with_context(shown)?;
    let before = replaced.len();
    replaced.retain(|(old, _)| pool.devices.iter().any(|device| device.path == *old));
    for (old, new) in &replaced {
        for device in pool.devices.iter_mut().filter(|device| device.path == *old) {
            tracing::warn!(old = %old.display(), new = %new.display(),
                "the file still names a device that was replaced");
            device.path.clone_from(new);
        }
    }
    if forget && replaced.len() < before {
        store(data_dir, &replaced).with_context(shown)?;
    }
    added::apply(data_dir, pool, forget)
        .with_context(|| format!("devices added in {}", data_dir.display()))
}

/// What a command about devices needs of the process.
#[derive(Clone)]
pub(super) struct Devices {
    pub(super) upkeep: Arc<Upkeep>,
    pub(super) pool: Arc<Pool>,
    pub(super) config: PoolConfig,
    pub(super) data_dir: PathBuf,
    pub(super) file: PathBuf,
}

pub(super) fn refused(error: &ManageError) -> AdminError {
    let next = "`mirrorhub device list` shows how each device is";
    AdminError::new(code::REFUSED, error.to_string(), next)
}

/// What goes on with devices whose addition has not come to its end.
fn pending_next(paths: &[String]) -> String {
    let paths = paths.join(" ");
    format!(
        "{paths}: the addition has not come to its end; `mirrorhub device add {paths}` goes on with it"
    )
}

impl Devices {
    /// For whoever changes the devices, from looking at them to the end: at once or not at all.
    pub(super) fn turn(&self, what: &str) -> Result<Turn<'_>, AdminError> {
        self.upkeep.devices_turn(what).map_err(|Taken { what, since }| {
            let message =
                format!("another device command runs since {}: {what}", time_of_day(since));
            AdminError::new(code::BUSY, message, "give the command again when that one has ended")
        })
    }

    fn answer(&self, next_step: String) -> Result<Value, AdminError> {
        let mut devices: Vec<PoolDeviceStatus> =
            self.pool.devices().iter().zip(0..).map(device_status).collect();
        if devices.is_empty() {
            let plain = |device: &crate::config::schema::DeviceConfig| PoolDeviceStatus {
                name: device.path.display().to_string(),
                state: "in".to_owned(),
                size_bytes: device.size.0,
                ..PoolDeviceStatus::default()
            };
            devices = self.config.devices.iter().map(plain).collect();
        }
        let (raid, rebuild) = (self.config.raid.to_string(), self.upkeep.rebuild());
        answer(&DevicesAnswer { schema: SCHEMA, raid, devices, rebuild, next_step })
    }

    /// How each is.
    fn list(&self) -> Result<Value, AdminError> {
        let pending = self.upkeep.pending();
        self.answer(match pending.is_empty() {
            true => String::new(),
            false => pending_next(&pending),
        })
    }

    /// Takes one out.
    fn fail(&self, device: &str) -> Result<Value, AdminError> {
        let _turn = self.turn(&format!("device fail {device}"))?;
        let (place, name) = self.upkeep.find_device(device).map_err(|error| refused(&error))?;
        let failed = self.upkeep.fail_device(place, "failed by hand");
        failed.map_err(|error| refused(&error))?;
        self.answer(format!("`mirrorhub device replace {name} NEW` fills another one in its place"))
    }

    /// Fills a new device in the place of one. Says what runs from now on.
    fn replace(&self, old: &str, new: &str) -> Result<(PoolConfig, Option<String>), AdminError> {
        let upkeep = &self.upkeep;
        let _turn = self.turn(&format!("device replace {old} {new}"))?;
        let (place, name) = upkeep.find_device(old).map_err(|error| refused(&error))?;
        let wanted = upkeep.device_bytes(place).map_err(|error| refused(&error))?;
        let named = |device: &&crate::config::schema::DeviceConfig| {
            device.path.display().to_string() == *name
        };
        let Some(slot) = self.config.devices.iter().find(named).cloned() else {
            let message = format!("{name} stands in no line of pool.devices");
            let next = format!("write its path into {}, then restart", self.file.display());
            return Err(AdminError::new(code::REFUSED, message, next));
        };
        let new = PathBuf::from(new);
        // Another disk may have come to the same path: then the one that failed is let go of.
        let same = new == slot.path;
        if same {
            upkeep.release_device(place).map_err(|error| refused(&error))?;
        } else if self.config.devices.iter().any(|device| device.path == new) {
            let message = format!("{} is of the pool already", new.display());
            return Err(AdminError::new(code::REFUSED, message, "name another device"));
        }
        let made = new_device(&new, ByteCount(wanted.max(slot.size.0)));
        let device = made.map_err(|error| {
            let next = "name a block device or a file that nothing else uses";
            AdminError::new(code::REFUSED, error.to_string(), next)
        })?;
        let larger = (device.size().0 > wanted).then(|| {
            let (met, more) = (device.size().0, "`mirrorhub device add` does");
            format!(
                "the array uses {wanted} of its {met} bytes: larger devices in the place of others do not \
                 make a pool larger, {more}"
            )
        });
        // Whatever speaks against it is met before the old one is given up.
        upkeep.check_device(place, &*device).map_err(|error| refused(&error))?;
        match upkeep.fail_device(place, &format!("replaced by {}", new.display())) {
            Ok(()) | Err(ManageError::OutAlready { .. }) => {}
            Err(error) => return Err(refused(&error)),
        }
        if !same {
            self.remember(&slot.path, &new).map_err(|error| {
                let message = format!("{}: {error}", self.data_dir.join(FILE).display());
                let next = "the old device is failed; mend that, then replace it";
                AdminError::new(code::FAILED, message, next)
            })?;
        }
        upkeep.replace_device(place, device).map_err(|error| refused(&error))?;
        let mut config = self.config.clone();
        for device in config.devices.iter_mut().filter(|device| device.path == slot.path) {
            device.path.clone_from(&new);
        }
        Ok((config, larger))
    }

    fn remember(&self, old: &Path, new: &Path) -> io::Result<()> {
        added::replaced(&self.data_dir, old, new)?;
        let mut replaced = load(&self.data_dir)?;
        // The file names the first of a line of them.
        match replaced.iter_mut().find(|(_, other)| other == old) {
            Some((_, other)) => new.clone_into(other),
            None => {
                replaced.retain(|(first, _)| first != old);
                replaced.push((old.to_owned(), new.to_owned()));
            }
        }
        store(&self.data_dir, &replaced)
    }

    /// Answers `device list`.
    pub(super) async fn listed(self) -> Result<Value, AdminError> {
        aside(move || self.list()).await
    }

    /// Answers `device fail`.
    pub(super) async fn failed(self, device: String) -> Result<Value, AdminError> {
        aside(move || self.fail(&device)).await
    }

    /// Answers `device replace`, at once or when everything is filled. `runs` is told what runs from
    /// then on, before anything is waited for.
    pub(super) async fn replaced(
        mut self,
        (old, new, wait): (String, String, bool),
        progress: &ProgressSender,
        runs: impl FnOnce(&PoolConfig),
    ) -> Result<Value, AdminError> {
        let worker = self.clone();
        let larger;
        (self.config, larger) = aside(move || worker.replace(&old, &new)).await?;
        runs(&self.config);
        self.filled(wait, larger, progress).await
    }

    /// Answers `device add`. `runs` is told what the file is to name.
    pub(super) async fn added(
        self,
        devices: Vec<String>,
        runs: impl FnOnce(&PoolConfig),
    ) -> Result<Value, AdminError> {
        let worker = self.clone();
        runs(&aside(move || worker.add(&devices)).await?);
        self.answer(format!(
            "the pool is larger already; write the new paths into pool.devices of {}, behind the others",
            self.file.display()
        ))
    }

    async fn filled(
        &self,
        wait: bool,
        larger: Option<String>,
        progress: &ProgressSender,
    ) -> Result<Value, AdminError> {
        let mut tick = tokio::time::interval(Duration::from_millis(ADMIN_PROGRESS_MS));
        let filling = || self.upkeep.rebuild().filter(|rebuild| wait && rebuild.devices > 0);
        while let Some(rebuild) = filling() {
            tick.tick().await;
            if let Some(problem) = rebuild.problem {
                return Err(super::failed(format!("filling a device: {problem}")));
            }
            progress.send(Progress {
                what: "filling".to_owned(),
                object: "a device".to_owned(),
                done: rebuild.done_bytes / BLOCK_BYTES_U64,
                total: Some(rebuild.total_bytes / BLOCK_BYTES_U64),
                unit: ProgressUnit::Blocks,
            });
        }
        let larger = larger.map(|larger| format!("; {larger}")).unwrap_or_default();
        let file = self.file.display();
        self.answer(format!("write the new path into pool.devices of {file}{larger}"))
    }
}

/// Not on the way of requests that only ask.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AdminError> + Send + 'static,
) -> Result<T, AdminError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| super::failed(error.to_string()))?
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::schema::{DeviceConfig, Raid, ScrubConfig};
    use crate::device::Device;
    use crate::pool::PoolOptions;
    use crate::pool::testing::new_device as sim_device;
    use crate::upkeep::Options;

    fn config(paths: &[&str]) -> PoolConfig {
        let device = |path: &&str| DeviceConfig { path: path.into(), size: ByteCount(1 << 30) };
        let devices = paths.iter().map(device).collect();
        PoolConfig {
            raid: Raid::Mirror,
            devices,
            scrub: ScrubConfig::default(),
            rebuild_limit: None,
        }
    }

    /// A command that comes while another one changes the devices is told so at once, and by which;
    /// what only looks is answered.
    #[test]
    fn a_second_command_is_refused_and_told_what_runs() {
        let device: Arc<dyn Device> = sim_device(64 << 20);
        let pool = Pool::create(device, [1; 16], PoolOptions::default()).unwrap();
        let upkeep = Upkeep::start(pool.clone(), Options::default(), Box::new(|| {})).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (data_dir, file) = (dir.path().to_owned(), dir.path().join("hub.toml"));
        let devices = Devices {
            upkeep: Arc::clone(&upkeep),
            pool,
            config: PoolConfig { raid: Raid::None, ..config(&["/a"]) },
            data_dir,
            file,
        };
        let turn = upkeep.devices_turn("device add /b").unwrap();
        let commands = || {
            let path = dir.path().join("new").display().to_string();
            [
                devices.fail("0").map(drop),
                devices.replace("0", &path).map(drop),
                devices.add(&[path]).map(drop),
            ]
        };
        for refused in commands() {
            let error = refused.unwrap_err();
            assert_eq!(error.code, code::BUSY);
            let message = &error.message;
            assert!(message.contains("another device command runs since 20"), "{message}");
            assert!(message.ends_with("UTC: device add /b"), "{message}");
        }
        devices.list().unwrap();
        drop(turn);
        for refused in commands().into_iter().take(2) {
            assert_ne!(refused.unwrap_err().code, code::BUSY);
        }
        upkeep.stop();
    }

    /// The file names the old device until somebody writes the new one; then nothing is remembered.
    #[test]
    fn a_replaced_device_is_found_until_the_file_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let replaced = vec![(PathBuf::from("/a"), PathBuf::from("/c"))];
        store(dir.path(), &replaced).unwrap();
        let mut file = config(&["/a", "/b"]);
        apply(dir.path(), &mut file, true).unwrap();
        assert_eq!(file, config(&["/c", "/b"]));
        assert_eq!(load(dir.path()).unwrap(), replaced);
        let mut file = config(&["/c", "/b"]);
        apply(dir.path(), &mut file, true).unwrap();
        assert_eq!(file, config(&["/c", "/b"]));
        assert_eq!(load(dir.path()).unwrap(), []);
        fs::write(dir.path().join(FILE), "no list").unwrap();
        let error = apply(dir.path(), &mut file, true).unwrap_err();
        assert!(format!("{error:#}").contains(FILE), "{error:#}");
    }
}
