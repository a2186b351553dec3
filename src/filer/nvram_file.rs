//! The NVRAM file of a source that has not its own device: an image that a hub serves, a source
//! that lives on another filer.
//!
//! Called before its engine starts; blocks. One that was made and is gone is never made anew: what
//! only it held was acknowledged.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::recover::Store;
use crate::device::file::{Access, FileDevice, FileError, create_parent};
use crate::device::latch::Latch;
use crate::nvlog::format::HEADER_BYTES;
use crate::units::numbers::ByteCount;

/// Why there is no NVRAM.
#[derive(Debug, thiserror::Error)]
pub enum NvramFileError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// It was made and is gone.
    #[error(
        "{path} is gone; acknowledged writes that only this NVRAM held are lost with it. Put the \
         file back", path = .0.display()
    )]
    Gone(PathBuf),
}

/// Opens the file, or makes it with room for so many bytes if none was `made` before.
pub fn open(path: &Path, size: ByteCount, made: bool) -> Result<Store, NvramFileError> {
    let (device, new) = match FileDevice::open(path, Access::Direct) {
        Ok(device) => (device, false),
        Err(FileError::Missing(_)) if made => return Err(NvramFileError::Gone(path.to_owned())),
        Err(FileError::Missing(_)) => {
            create_parent(path)?;
            let size = ByteCount(size.0.saturating_add(HEADER_BYTES));
            (FileDevice::create(path, size, Access::Direct)?, true)
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Store { device: Arc::new(Latch::new(device)), new })
}

/// Removes the file, durably; does nothing if there is none.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(path, "unlink", error)),
    }
    let Some(directory) = path.parent() else { return Ok(()) };
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| failed(path, "fsync of the directory", error))
}

fn failed(path: &Path, operation: &'static str, error: std::io::Error) -> FileError {
    FileError::Io { path: path.to_owned(), operation, error }
}
