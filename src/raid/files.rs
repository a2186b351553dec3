//! An array out of files and block devices, as a configuration names them.
//!
//! Called at start by hub and source. A file that is missing counts as a device that is missing: it
//! is made only together with a new array, when no device of it is there or holds anything.

use std::path::PathBuf;
use std::sync::Arc;

use crate::device::file::{Access, FileDevice, FileError, create_parent};
use crate::device::{Device, DeviceError, is_blank};
use crate::units::numbers::ByteCount;

use super::assemble::{self, AssembleError, LeftOut, OpenOptions, Opened};
use super::layout::Level;

/// A device that takes the place of another: one that is there, or a new file of that size.
pub fn new_device(path: &std::path::Path, size: ByteCount) -> Result<Arc<dyn Device>, FileError> {
    match FileDevice::open(path, Access::Cached) {
        Ok(device) => Ok(Arc::new(device)),
        Err(FileError::Missing(_)) => {
            Ok(Arc::new(FileDevice::create_unwritten(path, size, Access::Cached)?))
        }
        Err(error) => Err(error),
    }
}

/// The devices of a pool, and how they make one.
#[derive(Debug, Clone)]
pub struct PoolFiles {
    /// How.
    pub level: Level,
    /// Files or block devices; a file that is missing is made with that size.
    pub devices: Vec<(PathBuf, ByteCount)>,
    /// Open although the devices that are missing may be newer.
    pub accept_missing: bool,
}

/// Why there is no array.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// One of the files.
    #[error(transparent)]
    File(#[from] FileError),
    /// One of the devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// All of them together.
    #[error("{0}{1}")]
    Assemble(AssembleError, String),
}

type Devices = Vec<Arc<dyn Device>>;

impl PoolFiles {
    /// One file or block device, without an array.
    pub fn plain(path: PathBuf, size: ByteCount) -> Self {
        Self { level: Level::None, devices: vec![(path, size)], accept_missing: false }
    }

    /// The one device that is the pool's as it is; `None` if there is an array.
    pub fn as_plain(&self) -> Option<&(PathBuf, ByteCount)> {
        match &self.devices[..] {
            [device] if self.level == Level::None => Some(device),
            _ => None,
        }
    }

    /// Opens the array.
    pub fn open(&self) -> Result<Opened, FilesError> {
        let (there, gone) = self.there()?;
        self.assemble(&there, &gone)
    }

    /// Opens the array, or makes it if none of its devices is there or holds anything. Says whether
    /// it was made.
    pub fn open_or_create(&self) -> Result<(Opened, bool), FilesError> {
        let (there, gone) = self.there()?;
        for device in &there {
            if assemble::is_member(&**device) || !is_blank(&**device)? {
                return match self.assemble(&there, &gone) {
                    // An earlier start may have ended before the labels stood.
                    Err(FilesError::Assemble(AssembleError::None, _)) => self.create(there),
                    opened => Ok((opened?, false)),
                };
            }
        }
        self.create(there)
    }

    fn create(&self, there: Devices) -> Result<(Opened, bool), FilesError> {
        let mut devices = Vec::new();
        for (path, size) in &self.devices {
            let name = path.display().to_string();
            match there.iter().find(|device| *device.name() == *name) {
                Some(device) => devices.push(Arc::clone(device)),
                None => {
                    create_parent(path)?;
                    let made = FileDevice::create_unwritten(path, *size, Access::Cached)?;
                    devices.push(Arc::new(made));
                }
            }
        }
        let array = assemble::create(self.level, &devices);
        let array = array.map_err(|error| FilesError::Assemble(error, String::new()))?;
        Ok((Opened { array, left_out: Vec::new() }, true))
    }

    /// The devices that can be opened, and why the others cannot.
    fn there(&self) -> Result<(Devices, Vec<LeftOut>), FilesError> {
        let (mut there, mut gone): (Devices, _) = (Vec::new(), Vec::new());
        for (path, _) in &self.devices {
            match FileDevice::open(path, Access::Cached) {
                Ok(device) => there.push(Arc::new(device)),
                // Another process has it: nothing is missing, and nothing may be done without it.
                Err(error @ FileError::Busy(_)) => return Err(error.into()),
                Err(error) => {
                    let name = Arc::from(path.display().to_string());
                    gone.push(LeftOut { name, reason: error.to_string() });
                }
            }
        }
        Ok((there, gone))
    }

    fn assemble(&self, there: &[Arc<dyn Device>], gone: &[LeftOut]) -> Result<Opened, FilesError> {
        let others = || gone.iter().map(|out| format!("; {}", out.reason)).collect::<String>();
        let failed = |error| FilesError::Assemble(error, others());
        let options = OpenOptions { accept_missing: self.accept_missing };
        let wanted = (self.level, self.devices.len());
        let mut opened = assemble::open_as(there, Some(wanted), options).map_err(failed)?;
        let paths = self.devices.iter().map(|(path, _)| path.display().to_string());
        opened.array.name_missing(&paths.collect::<Vec<_>>());
        opened.left_out.extend_from_slice(gone);
        for LeftOut { name, reason } in gone {
            tracing::warn!(device = %name, reason, "missing from the array");
        }
        Ok(opened)
    }
}
