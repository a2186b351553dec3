//! An array out of files and block devices, as a configuration names them.
//!
//! Called at start by hub and source. A file that is missing counts as a device that is missing: it
//! is made only together with a new array, when no device of it is there or holds anything.

use std::path::PathBuf;
use std::sync::Arc;

use crate::device::file::{Access, FileDevice, FileError, create_parent};
use crate::device::{Device, DeviceError, is_blank};
use crate::units::numbers::ByteCount;

use super::assemble::{self, AssembleError, LeftOut, OpenOptions};
use super::layout::Level;
use super::span::{self, Adding, Behind, Wanted};

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
    /// Devices that were being added when the process ended, or before.
    pub adding: Vec<Adding>,
    /// What a device that is a pool by itself says of those that were added behind it.
    pub plain: Behind,
}

/// What the devices make.
#[derive(Debug)]
pub struct OpenedFiles {
    /// An array, or several one behind the other.
    pub array: Arc<dyn Device>,
    /// Devices that are not used.
    pub left_out: Vec<LeftOut>,
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
        let devices = vec![(path, size)];
        let (adding, plain): (_, Behind) = (Vec::new(), |_| None);
        Self { level: Level::None, devices, accept_missing: false, adding, plain }
    }

    /// The one device that is the pool's as it is; `None` if there is an array.
    pub fn as_plain(&self) -> Option<&(PathBuf, ByteCount)> {
        match &self.devices[..] {
            [device] if self.level == Level::None => Some(device),
            _ => None,
        }
    }

    /// Bytes that the devices have together by their labels, which alone know how they were added; none if
    /// there are none yet. Nothing is opened for use: a process may have them.
    pub fn labelled_bytes(&self) -> Option<u64> {
        let look = |(path, _): &(PathBuf, ByteCount)| -> Option<Arc<dyn Device>> {
            Some(Arc::new(FileDevice::look(path).ok()?))
        };
        let there: Devices = self.devices.iter().filter_map(look).collect();
        span::bytes_of(&there, self.level, self.plain)
    }

    /// Opens the array.
    pub fn open(&self) -> Result<OpenedFiles, FilesError> {
        let (there, gone) = self.there()?;
        self.assemble(&there, &gone)
    }

    /// Opens whatever the pool lies on, each device behind what `over` makes of it.
    pub fn open_over(
        &self,
        over: &dyn Fn(Arc<dyn Device>) -> Arc<dyn Device>,
    ) -> Result<(Arc<dyn Device>, Vec<LeftOut>), FilesError> {
        if let Some((path, _)) = self.as_plain() {
            return Ok((over(Arc::new(FileDevice::open(path, Access::Cached)?)), Vec::new()));
        }
        let (there, gone) = self.there()?;
        let there: Devices = there.into_iter().map(over).collect();
        let OpenedFiles { array, left_out } = self.assemble(&there, &gone)?;
        Ok((array, left_out))
    }

    /// Opens the array, or makes it if none of its devices is there or holds anything. Says whether
    /// it was made.
    pub fn open_or_create(&self) -> Result<(OpenedFiles, bool), FilesError> {
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

    fn create(&self, there: Devices) -> Result<(OpenedFiles, bool), FilesError> {
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
        Ok((OpenedFiles { array, left_out: Vec::new() }, true))
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

    fn assemble(
        &self,
        there: &[Arc<dyn Device>],
        gone: &[LeftOut],
    ) -> Result<OpenedFiles, FilesError> {
        let others = || gone.iter().map(|out| format!("; {}", out.reason)).collect::<String>();
        let failed = |error| FilesError::Assemble(error, others());
        let options = OpenOptions { accept_missing: self.accept_missing };
        let names: Vec<_> =
            self.devices.iter().map(|(path, _)| path.display().to_string()).collect();
        let shape = (self.level, self.devices.len());
        let wanted = Wanted { shape, names: &names, adding: &self.adding, plain: self.plain };
        let (array, mut left_out) = span::open(there, wanted, options).map_err(failed)?;
        left_out.extend_from_slice(gone);
        for LeftOut { name, reason } in gone {
            tracing::warn!(device = %name, reason, "missing from the array");
        }
        Ok(OpenedFiles { array, left_out })
    }
}
