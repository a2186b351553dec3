//! The NVRAM file of a source that has not its own device: an image that a hub serves, a source
//! that lives on another filer.
//!
//! Called before its engine starts; blocks. One that was made and is gone is never made anew: what
//! only it held was acknowledged.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::recover::Store;
use crate::device::file::{Access, FileDevice, FileError, create_parent};
use crate::device::latch::Latch;
use crate::nvlog::format::HEADER_BYTES;
use crate::units::numbers::ByteCount;

/// Lost NVRAMs of one source that are kept beside each other.
const ASIDE_MAX: u32 = 1000;

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
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(path, "unlink", error)),
    }
    sync_directory(path)
}

/// Gives the file another name beside, `PATH.lost-N`, durably: what is in it is not read any more, and
/// stays. Returns that name; nothing if there is no file.
pub fn set_aside(path: &Path) -> Result<Option<PathBuf>, FileError> {
    for count in 1..=ASIDE_MAX {
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".lost-{count}"));
        let aside = PathBuf::from(aside);
        // A link is made under a name that nobody has; a rename would take it from its owner.
        match std::fs::hard_link(path, &aside) {
            Ok(()) => {
                remove(path)?;
                return Ok(Some(aside));
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(&aside, "link", error)),
        }
    }
    let error = std::io::Error::other(format!("{ASIDE_MAX} of that name are here already"));
    Err(failed(path, "set aside", error))
}

fn sync_directory(path: &Path) -> Result<(), FileError> {
    let Some(directory) = path.parent() else { return Ok(()) };
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| failed(path, "fsync of the directory", error))
}

fn failed(path: &Path, operation: &'static str, error: std::io::Error) -> FileError {
    FileError::Io { path: path.to_owned(), operation, error }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody's file is taken away, and there is a name for each.
    #[test]
    fn what_is_set_aside_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.nvram");
        assert_eq!(set_aside(&path).unwrap(), None);
        for count in 1..=3_u8 {
            std::fs::write(&path, [count]).unwrap();
            let aside = set_aside(&path).unwrap().unwrap();
            assert_eq!(aside, dir.path().join(format!("a.nvram.lost-{count}")));
            assert_eq!(std::fs::read(&aside).unwrap(), [count]);
            assert!(!path.try_exists().unwrap());
        }
        assert_eq!(std::fs::read(dir.path().join("a.nvram.lost-1")).unwrap(), [1]);
    }
}
