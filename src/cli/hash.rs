//! `mirrorhub hash FILE`: the root of a raw image, as anyone can recompute it.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;

use clap::Args;

use super::Done;
use super::failure::{Failure, print};
use super::progress::ProgressShow;
use super::terminal::Terminal;
use crate::control::message::{Progress, ProgressUnit};
use crate::units::convert::to_u64;
use crate::units::numbers::ByteCount;
use crate::volume::root::hash_reader;

/// Print the root of a raw image as 64 hexadecimal digits
#[derive(Debug, Args)]
pub struct HashArguments {
    /// A file or block device whose size is a multiple of 4096
    file: PathBuf,
}

/// Runs it.
pub fn run(arguments: &HashArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let name = arguments.file.display().to_string();
    let failed = |what: String| Failure::failed(format!("hash {name}: {what}"), "");
    let mut file = File::open(&arguments.file).map_err(|error| failed(error.to_string()))?;
    // A block device has no size in its metadata; its end is found by seeking.
    let size = file.seek(SeekFrom::End(0)).map_err(|error| failed(error.to_string()))?;
    file.seek(SeekFrom::Start(0)).map_err(|error| failed(error.to_string()))?;
    let show = ProgressShow::new(terminal.error);
    let mut watched = Watched { file, done: 0, size, name: name.clone(), show };
    let reader = BufReader::with_capacity(1 << 20, &mut watched);
    let root = hash_reader(reader, ByteCount(size)).map_err(|error| failed(error.to_string()))?;
    watched.show.end();
    print(&format!("{root}\n"))?;
    Ok(Done::WELL)
}

/// A file that shows how far it was read.
struct Watched {
    file: File,
    done: u64,
    size: u64,
    name: String,
    show: ProgressShow,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.file.read(buffer)?;
        self.done += to_u64(length);
        self.show.update(&Progress {
            what: "hashing".to_owned(),
            object: self.name.clone(),
            done: self.done,
            total: Some(self.size),
            unit: ProgressUnit::Bytes,
        });
        Ok(length)
    }
}
