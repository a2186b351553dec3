//! How a path becomes a [`FileDevice`]: made, locked, probed.
//!
//! Called by [`FileDevice::create`] and [`FileDevice::open`]. Invariants: what exists is never
//! overwritten; the lock is held before anything is written; the descriptors of a device are of
//! one file even if the name moves meanwhile. On failure nothing is left under the name.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::RwLock;

use rustix::fs::{
    Advice, AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, StatxFlags,
};
use rustix::io::Errno;

use super::{Access, BOUNCE_BYTES_MAX, Direct, FILE_SIZE_UNIT_BYTES, FileDevice, FileError};
use crate::device::buffer::{AlignedBuffer, BUFFER_ALIGN_BYTES};
use crate::units::convert::{to_u64, to_usize, u32_to_usize};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    Written,
    Allocated,
}

pub(super) fn open(path: &Path, access: Access) -> Result<FileDevice, FileError> {
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(FileError::Missing(path.into()));
        }
        Err(error) => return Err(failed(path, "stat", error)),
    };
    // O_EXCL without O_CREAT claims a block device: no mount and no second claim beside it.
    let claim = if kind.is_block_device() {
        OFlags::EXCL
    } else if kind.is_file() {
        OFlags::empty()
    } else {
        return Err(FileError::Kind(path.into()));
    };
    let mut plain = open_fd(path, claim).map_err(|errno| busy_or(path, "open", errno))?;
    lock(path, &plain)?;
    let size = plain.seek(SeekFrom::End(0)).map_err(|error| failed(path, "seek", error))?;
    // A rest that is no whole block cannot be reached with O_DIRECT: it is left alone.
    let size = size - size % FILE_SIZE_UNIT_BYTES;
    if size == 0 {
        return Err(FileError::Size { path: path.into(), size });
    }
    device(path, plain, size, access)
}

/// Without the lock and for reading only.
pub(super) fn look(path: &Path) -> Result<FileDevice, FileError> {
    let kind = std::fs::metadata(path).map_err(|error| failed(path, "stat", error))?.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        return Err(FileError::Kind(path.into()));
    }
    let mut plain = File::open(path).map_err(|error| failed(path, "open", error))?;
    let size = plain.seek(SeekFrom::End(0)).map_err(|error| failed(path, "seek", error))?;
    let (name, edges) = (path.to_string_lossy().into(), RwLock::new(()));
    let size = size - size % FILE_SIZE_UNIT_BYTES;
    Ok(FileDevice { name, size, plain, direct: None, past: None, edges })
}

pub(super) fn create(
    path: &Path,
    size: u64,
    fill: Fill,
    access: Access,
) -> Result<FileDevice, FileError> {
    create_with(path, size, fill, |draft, file| device(draft, file, size, access))
}

/// Makes the file under another name, lets `prepare` open all it needs of it, and gives it its own
/// name last: whatever fails, nothing is left under that.
pub(super) fn create_with(
    path: &Path,
    size: u64,
    fill: Fill,
    prepare: impl FnOnce(&Path, File) -> Result<FileDevice, FileError>,
) -> Result<FileDevice, FileError> {
    if size == 0 || !size.is_multiple_of(FILE_SIZE_UNIT_BYTES) {
        return Err(FileError::Size { path: path.into(), size });
    }
    match std::fs::symlink_metadata(path) {
        Ok(_) => return Err(FileError::Exists(path.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(path, "stat", error)),
    }
    let draft = draft_name(path);
    remove_stale_draft(&draft)?;
    let made = create_draft(&draft, size, fill).and_then(|file| {
        let device = prepare(&draft, file)?;
        publish(&draft, path)?;
        Ok(FileDevice { name: path.to_string_lossy().into(), ..device })
    });
    match made {
        Ok(device) => Ok(device),
        Err(error) => {
            // The reason why it failed matters more than a draft that stays behind: the next
            // attempt removes it.
            if let Err(left) = std::fs::remove_file(&draft) {
                tracing::debug!(path = %draft.display(), error = %left, "draft stays");
            }
            Err(error)
        }
    }
}

/// The file is built under this name, so that under its own it is complete or missing.
fn draft_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".draft");
    name.into()
}

/// A crash may have left a draft. One that is locked belongs to a living process.
fn remove_stale_draft(draft: &Path) -> Result<(), FileError> {
    match open_fd(draft, OFlags::NOFOLLOW) {
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed(draft, "open", errno.into())),
        Ok(file) => {
            lock(draft, &file)?;
            std::fs::remove_file(draft).map_err(|error| failed(draft, "unlink", error))
        }
    }
}

fn create_draft(draft: &Path, size: u64, fill: Fill) -> Result<File, FileError> {
    let file = open_fd(draft, OFlags::CREATE | OFlags::EXCL)
        .map_err(|errno| busy_or(draft, "create", errno))?;
    lock(draft, &file)?;
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
        Ok(()) => {}
        // Zeros that are written allocate as well.
        Err(Errno::OPNOTSUPP) if fill == Fill::Written => {}
        Err(errno) => return Err(failed(draft, "allocate", errno.into())),
    }
    if fill == Fill::Written {
        write_zeros(&file, size).map_err(|error| failed(draft, "write", error))?;
    }
    file.sync_all().map_err(|error| failed(draft, "fsync", error))?;
    // Only memory is at stake: the zeros need not stay in the page cache.
    if let Err(errno) = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed) {
        tracing::debug!(path = %draft.display(), %errno, "zeros stay in the page cache");
    }
    Ok(file)
}

fn write_zeros(file: &File, size: u64) -> io::Result<()> {
    let zeros = vec![0; BOUNCE_BYTES_MAX];
    let mut at = 0;
    while at < size {
        let count = (size - at).min(to_u64(zeros.len()));
        file.write_all_at(&zeros[..to_usize(count)], at)?;
        at += count;
    }
    Ok(())
}

/// Gives the draft its name and makes the name durable.
fn publish(draft: &Path, path: &Path) -> Result<(), FileError> {
    match rustix::fs::renameat_with(CWD, draft, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Err(FileError::Exists(path.into())),
        Err(errno) => return Err(failed(path, "rename without replacing", errno.into())),
    }
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let synced = File::open(parent).and_then(|directory| directory.sync_all());
    synced.map_err(|error| {
        // It was put there a moment ago, and a start that failed must be able to begin again.
        if let Err(left) = std::fs::remove_file(path) {
            tracing::debug!(path = %path.display(), error = %left, "file stays");
        }
        failed(parent, "fsync of the directory", error)
    })
}

fn device(path: &Path, plain: File, size: u64, access: Access) -> Result<FileDevice, FileError> {
    let found = direct(path, &plain);
    let (direct, past) = match access {
        Access::Direct => (found?, None),
        // It only saves a copy: what is wrong with the disk is told by who needs it.
        Access::Cached => (
            None,
            found.unwrap_or_else(|error| {
                tracing::info!(%error, "all writes go through the page cache");
                None
            }),
        ),
    };
    let name = path.to_string_lossy().into();
    Ok(FileDevice { name, size, plain, direct, past, edges: RwLock::new(()) })
}

/// Descriptors past the page cache, if the file system takes them. A refusal is ordinary (shown
/// as the device's durability); a name that leads elsewhere by now is not.
fn direct(path: &Path, plain: &File) -> Result<Option<Direct>, FileError> {
    let mut files = Vec::new();
    for flags in [OFlags::DIRECT, OFlags::DIRECT | OFlags::DSYNC] {
        match open_fd(path, flags) {
            Ok(file) => files.push(file),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            Err(errno) => return Err(failed(path, "open with O_DIRECT", errno.into())),
        }
    }
    let identity = |file: &File| {
        let metadata = file.metadata().map_err(|error| failed(path, "stat", error))?;
        Ok((metadata.dev(), metadata.ino()))
    };
    let wanted = identity(plain)?;
    for file in &files {
        if identity(file)? != wanted {
            let error = io::Error::other("the name led to two files");
            return Err(failed(path, "open", error));
        }
    }
    let (Some(dsync), Some(io)) = (files.pop(), files.pop()) else { return Ok(None) };
    for align in alignments(&io) {
        let mut block = AlignedBuffer::new(align);
        match io.read_at(&mut block, 0) {
            Ok(count) if count == align => return Ok(Some(Direct { io, dsync, align })),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            Err(error) => return Err(failed(path, "first read with O_DIRECT", error)),
        }
    }
    Ok(None)
}

/// What may work, best first: what the kernel says (statx, since 6.1), else the two usual ones.
fn alignments(file: &File) -> Vec<usize> {
    let asked = rustix::fs::statx(file.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    match asked {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            let said = u32_to_usize(stat.stx_dio_mem_align.max(stat.stx_dio_offset_align));
            // 0 says that this file takes no O_DIRECT at all.
            let usable = said.is_power_of_two() && said <= BUFFER_ALIGN_BYTES;
            if usable { vec![said.max(512)] } else { Vec::new() }
        }
        Ok(_) | Err(_) => vec![512, 4096],
    }
}

fn open_fd(path: &Path, flags: OFlags) -> Result<File, Errno> {
    let flags = flags | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map(File::from)
}

fn lock(path: &Path, file: &File) -> Result<(), FileError> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|errno| busy_or(path, "lock", errno))
}

fn busy_or(path: &Path, operation: &'static str, errno: Errno) -> FileError {
    match errno {
        Errno::BUSY | Errno::AGAIN | Errno::EXIST => FileError::Busy(path.into()),
        errno => failed(path, operation, errno.into()),
    }
}

fn failed(path: &Path, operation: &'static str, error: io::Error) -> FileError {
    FileError::Io { path: path.into(), operation, error }
}
