//! Lists of devices that a process keeps in its `data_dir` until the configuration file says the same.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::device::directory::replace_durably;

/// A list of more is none of ours.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Reads a list; an empty one if there is no file.
pub(super) fn load<T: DeserializeOwned>(path: &Path) -> io::Result<Vec<T>> {
    match fs::metadata(path) {
        Ok(found) if found.len() > FILE_BYTES_MAX => Err(io::ErrorKind::InvalidData.into()),
        Ok(_) => Ok(serde_json::from_slice(&fs::read(path)?)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Writes it: whole or not at all, durably.
pub(super) fn store<T: Serialize>(path: &Path, list: &[T]) -> io::Result<()> {
    replace_durably(path, &serde_json::to_vec_pretty(list)?)
}
