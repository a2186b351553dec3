//! The few file operations that source logs need, as a trait: the real ones here, failing and
//! forgetful ones in tests.
//!
//! Called by the rest of this module only; every call may block. The real one uses plain
//! `pwritev`, `fdatasync` and `syncfs`, so that fault injection sees them. An error is passed on
//! as the kernel gave it; nothing is tried twice except a call that a signal broke off.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags};
use rustix::io::Errno;

use crate::device::directory::create_durably;
use crate::units::convert::to_u64;

/// Names in one directory; more are refused.
const DIRECTORY_NAMES_MAX: usize = 65_536;

/// A directory tree of log files.
pub trait Files: Send + Sync + fmt::Debug {
    /// Makes a directory; `false` if it was there.
    fn create_dir(&self, path: &Path) -> io::Result<bool>;
    /// Names in a directory; empty if there is none.
    fn list(&self, path: &Path) -> io::Result<Vec<OsString>>;
    /// Makes a file that must not be there.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn LogFile>>;
    /// Opens a file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn LogFile>>;
    /// Gives a file another name, in one step.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Takes a name away; the space follows when the last descriptor closes.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes everything written to the file system durable. Reports errors of any writeback since
    /// the last call (Linux 5.8 and later).
    fn sync_file_system(&self) -> io::Result<()>;
}

/// One open file; closed with its last reference.
pub trait LogFile: Send + Sync + fmt::Debug {
    /// Bytes up to the end of the file.
    fn length(&self) -> io::Result<u64>;
    /// Reads until `buffer` is full or the file ends; returns the bytes read.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes all parts, one behind the other, with one call to the kernel if it takes them.
    fn write_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()>;
    /// Sets space aside without moving the end of the file. An error of kind `Unsupported` means
    /// that this file system cannot.
    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Cuts the file, or extends it by zeros.
    fn truncate(&self, length: u64) -> io::Result<()>;
    /// Has the kernel begin to write these bytes out; nothing is said of when they are durable, and
    /// an error of it is told by the next [`LogFile::sync_data`].
    fn begin_writeback(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Makes data and length durable.
    fn sync_data(&self) -> io::Result<()>;
}

/// The real file system below one directory.
#[derive(Debug)]
pub struct RealFiles {
    root: File,
}

impl RealFiles {
    /// Opens the directory, made durably if it is not there. It stays open for
    /// [`Files::sync_file_system`]: a descriptor reports only errors that happen while it is open
    /// (R11).
    pub fn open(root: &Path) -> io::Result<Self> {
        create_durably(root)?;
        Ok(Self { root: File::open(root)? })
    }
}

impl Files for RealFiles {
    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        match fs::create_dir(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let names = match fs::read_dir(path) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for name in names {
            if found.len() == DIRECTORY_NAMES_MAX {
                let text = format!("more than {DIRECTORY_NAMES_MAX} names in the directory");
                return Err(io::Error::other(text));
            }
            found.push(name?.file_name());
        }
        Ok(found)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        Ok(Arc::new(RealFile(options.open(path)?)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        Ok(Arc::new(RealFile(OpenOptions::new().read(true).write(true).open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_file_system(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.root)?)
    }
}

#[derive(Debug)]
struct RealFile(File);

impl LogFile for RealFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.0.read_at(&mut buffer[filled..], offset + to_u64(filled)) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut written = retry(|| rustix::io::pwritev(&self.0, &slices, offset))?;
        // A short write is ordinary; what is left goes out part by part.
        let mut at = offset;
        for part in parts {
            let skip = written.min(part.len());
            self.0.write_all_at(&part[skip..], at + to_u64(skip))?;
            written -= skip;
            at += to_u64(part.len());
        }
        Ok(())
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mode = FallocateFlags::KEEP_SIZE;
        match retry(|| rustix::fs::fallocate(&self.0, mode, offset, bytes)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(io::ErrorKind::Unsupported.into()),
            other => Ok(other?),
        }
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        Ok(retry(|| rustix::fs::ftruncate(&self.0, length))?)
    }

    fn begin_writeback(&self, offset: u64, bytes: u64) -> io::Result<()> {
        // Linux begins to write what is dirty, and drops what is clean by then: little, right behind
        // the write.
        let Some(bytes) = NonZeroU64::new(bytes) else { return Ok(()) };
        Ok(rustix::fs::fadvise(&self.0, offset, Some(bytes), Advice::DontNeed)?)
    }

    fn sync_data(&self) -> io::Result<()> {
        // Once only: a second fdatasync after a failed one would report success.
        self.0.sync_data()
    }
}

/// Repeats a call that a signal broke off before it did anything.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_file_writes_parts_in_order_and_keeps_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let files = RealFiles::open(&dir.path().join("deep/logs")).unwrap();
        let path = dir.path().join("deep/logs/a");
        let file = files.create(&path).unwrap();
        assert_eq!(files.create(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        match file.allocate(0, 1 << 16) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported),
        }
        assert_eq!(file.length().unwrap(), 0, "allocation must not move the end");
        file.write_at(3, &[b"ab", b"", b"cde"]).unwrap();
        file.sync_data().unwrap();
        let mut buffer = [9; 12];
        assert_eq!(file.read_at(0, &mut buffer).unwrap(), 8);
        assert_eq!(&buffer, b"\0\0\0abcde\x09\x09\x09\x09");
        file.truncate(4).unwrap();
        assert_eq!(files.open(&path).unwrap().length().unwrap(), 4);
        files.sync_dir(dir.path()).unwrap();
        files.sync_file_system().unwrap();
        assert_eq!(files.list(&dir.path().join("deep/logs")).unwrap(), ["a"]);
        assert!(files.list(&dir.path().join("none")).unwrap().is_empty());
        let other = path.with_extension("log");
        files.rename(&path, &other).unwrap();
        files.remove(&other).unwrap();
        assert_eq!(files.open(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
