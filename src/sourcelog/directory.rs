//! Looks at a source's directory and at each header in it, before a record is read.
//!
//! Called by recovery. A file that is not ours (another hub, source, CP or version) is an error by
//! name and reason, found before anything is changed. Names that are no log's are left alone.

use std::ffi::OsStr;
use std::sync::Arc;

use super::error::{LogError, io_error};
use super::format::{self, HEADER_BYTES, HEADER_BYTES_U64, HeaderError, Identity, Slot};
use super::log::{LOG_BYTES_MAX, Log, NEW_SUFFIX};
use super::removal::remove_path;
use super::source::{Shared, SourceLogs, Unreadable, file_name};
use crate::units::numbers::CpNumber;

/// One file, as found.
enum FileState {
    /// Made and never written through: a power cut took its header.
    Torn,
    Unreadable(LogError),
    Log(Box<Log>),
}

/// What was found beside the logs.
pub(super) struct FoundFiles {
    /// Logs of applied CPs, deleted.
    pub(super) deleted: u32,
    /// Files without a header, still there.
    pub(super) torn: Vec<CpNumber>,
}

/// Takes the logs in the directory into `logs`, records unread, and deletes those up to `applied`.
pub(super) fn read_files(
    shared: &Shared,
    logs: &mut SourceLogs,
    applied: CpNumber,
) -> Result<FoundFiles, LogError> {
    let text: Arc<str> = logs.dir.to_string_lossy().into();
    let files = shared.open.files();
    let names = files.list(&logs.dir).map_err(io_error(&text, "list directory"))?;
    let mut cps = Vec::new();
    let mut unfinished = Vec::new();
    for name in names {
        match parse_name(&text, &name)? {
            Some(_) if name.to_string_lossy().ends_with(NEW_SUFFIX) => unfinished.push(name),
            Some(cp) => cps.push(cp),
            None => {}
        }
    }
    cps.sort_unstable();
    let mut deleted = Vec::new();
    let mut torn = Vec::new();
    for cp in cps {
        let state = read_file(shared, logs, cp)?;
        if cp <= applied {
            deleted.push(cp);
            continue;
        }
        match state {
            FileState::Torn => torn.push(cp),
            FileState::Unreadable(error) => {
                let path = logs.dir.join(file_name(cp));
                logs.unreadable.insert(cp, Unreadable { path, error });
            }
            FileState::Log(log) => {
                logs.logs.insert(cp, *log);
            }
        }
    }
    for name in unfinished {
        remove_path(&shared.open, &logs.dir.join(name))?;
    }
    for cp in &deleted {
        remove_path(&shared.open, &logs.dir.join(file_name(*cp)))?;
    }
    let deleted = u32::try_from(deleted.len()).unwrap_or(u32::MAX);
    Ok(FoundFiles { deleted, torn })
}

/// The CP of a log's name; `None` for names that are none of ours.
fn parse_name(dir: &Arc<str>, name: &OsStr) -> Result<Option<CpNumber>, LogError> {
    let text = name.to_string_lossy();
    let text = text.strip_suffix(NEW_SUFFIX).unwrap_or(&text);
    let Some(digits) = text.strip_prefix("cp-").and_then(|rest| rest.strip_suffix(".log")) else {
        return Ok(None);
    };
    match digits.parse().map(CpNumber) {
        Ok(cp) if text == file_name(cp) => Ok(Some(cp)),
        Ok(_) | Err(_) => Err(LogError::Foreign {
            file: format!("{dir}/{text}").into(),
            what: "the name is like a source log's but has not ten digits of a CP".into(),
        }),
    }
}

/// Reads one header; the records come later. A file of somebody else is an error.
fn read_file(shared: &Shared, logs: &SourceLogs, cp: CpNumber) -> Result<FileState, LogError> {
    let path = logs.dir.join(file_name(cp));
    let text: Arc<str> = path.to_string_lossy().into();
    let file = shared.open.files().open(&path).map_err(io_error(&text, "open"))?;
    let length = file.length().map_err(io_error(&text, "stat"))?;
    let mut header = [0; HEADER_BYTES];
    let read = file.read_at(0, &mut header).map_err(io_error(&text, "read"))?;
    let corrupt = |offset: u64, what: String| {
        let file = Arc::clone(&text);
        FileState::Unreadable(LogError::Corrupt { file, offset, what: what.into() })
    };
    if length == 0 || (read == HEADER_BYTES && format::is_torn(&header)) {
        return Ok(FileState::Torn);
    }
    if read < HEADER_BYTES {
        return Ok(corrupt(length, format!("the file ends within its header, at byte {length}")));
    }
    let identity = match format::read_identity(&header) {
        Ok(identity) => identity,
        Err(bad @ HeaderError::Version(_)) => {
            return Err(LogError::Version { file: text, what: bad.to_string().into() });
        }
        Err(bad) => return Ok(corrupt(bad.offset(), bad.to_string())),
    };
    check_ours(shared, logs, cp, &identity, &text)?;
    let name = Arc::new(logs.name(identity));
    let (slot, damage) = match format::newest_slot(&header, &identity) {
        Ok(slot) => (slot, None),
        Err(bad) => {
            let slot = Slot::unsynced(2, &identity);
            (slot, Some(name.corrupt(bad.offset(), bad)))
        }
    };
    let extent = length - HEADER_BYTES_U64;
    let mut log = Log::recovered(name, slot, slot.synced, slot.place);
    log.extent = extent.min(LOG_BYTES_MAX);
    log.damage = damage;
    Ok(FileState::Log(Box::new(log)))
}

fn check_ours(
    shared: &Shared,
    logs: &SourceLogs,
    cp: CpNumber,
    identity: &Identity,
    text: &Arc<str>,
) -> Result<(), LogError> {
    let what = if identity.hub != shared.hub {
        format!("the log was written by hub {}, this is hub {}", identity.hub, shared.hub)
    } else if identity.source != logs.source {
        format!("the log is of source {}, it lies with source {}", identity.source, logs.source)
    } else if identity.cp != cp {
        format!("the log is of CP {}, its name says CP {cp}", identity.cp)
    } else {
        return Ok(());
    };
    Err(LogError::Foreign { file: Arc::clone(text), what: what.into() })
}
