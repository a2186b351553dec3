//! `mirrorhub hash FILE`: the root of a raw image, as anyone can compute it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::Args;

use super::Done;
use super::failure::{Failure, print};
use super::progress::ProgressShow;
use super::terminal::{Look, Terminal};
use crate::control::message::{Progress, ProgressUnit};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_u64;
use crate::units::hash::Root;
use crate::units::numbers::ByteCount;
use crate::volume::root::hash_reader;

/// Print the root of a raw image, as 64 hexadecimal digits
///
/// It is the root that `status` and `checkpoint` print of a volume with that content.
#[derive(Debug, Args)]
pub struct HashArguments {
    /// A file or block device whose size is a multiple of 4096 bytes
    file: PathBuf,
}

/// Bytes between two reports of progress.
const REPORT_BYTES: u64 = 16 << 20;

/// Runs it.
pub fn run(arguments: &HashArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let root = hash(&arguments.file, terminal.error)?;
    print(&format!("{root}\n"))?;
    Ok(Done::WELL)
}

fn hash(file: &Path, look: Look) -> Result<Root, Failure> {
    let failure = |what: String, next: &str| {
        Failure::failed(format!("hash of {}: {what}", file.display()), next)
    };
    let (opened, size) = open(file).map_err(|error| failure(error.to_string(), ""))?;
    if !size.is_whole_blocks() {
        let what = format!("its size, {} bytes, is no multiple of {BLOCK_BYTES_U64}", size.0);
        return Err(failure(what, "a volume's size always is: is this a raw image?"));
    }
    let mut reader = Reporting {
        inner: opened,
        object: file.display().to_string(),
        total: size.0,
        done: 0,
        reported: 0,
        show: ProgressShow::new(look),
    };
    let root = hash_reader(&mut reader, size);
    reader.show.end();
    root.map_err(|error| failure(error.to_string(), "does somebody write to it?"))
}

/// The file and its size; a pipe or directory has none.
pub(super) fn open(file: &Path) -> io::Result<(File, ByteCount)> {
    let mut opened = File::open(file)?;
    let kind = opened.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("is neither a file nor a block device"));
    }
    // The length that metadata gives for a block device is 0.
    let size = opened.seek(SeekFrom::End(0))?;
    opened.rewind()?;
    Ok((opened, ByteCount(size)))
}

/// Reads and tells how far it is.
struct Reporting {
    inner: File,
    object: String,
    total: u64,
    done: u64,
    reported: u64,
    show: ProgressShow,
}

impl Read for Reporting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.done = self.done.saturating_add(to_u64(count));
        if self.done - self.reported >= REPORT_BYTES {
            self.reported = self.done;
            self.show.update(&Progress {
                what: "hashing".into(),
                object: self.object.clone(),
                done: self.done,
                total: Some(self.total),
                unit: ProgressUnit::Bytes,
            });
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An independent computation of the root, by the text of the design: all levels in lists.
    fn reference(image: &[u8]) -> String {
        let half = |bytes: &[u8]| -> [u8; 16] {
            if bytes.iter().all(|byte| *byte == 0) {
                return [0; 16];
            }
            blake3::hash(bytes).as_bytes()[..16].try_into().unwrap()
        };
        let mut level: Vec<[u8; 16]> = image.chunks(4096).map(half).collect();
        loop {
            let next = level.chunks(128).map(|children| {
                let mut node = vec![0; 128 * 16];
                node[..children.len() * 16].copy_from_slice(&children.concat());
                half(&node)
            });
            level = next.collect();
            if level.len() <= 1 {
                break;
            }
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"mirrorhub root v1");
        hasher.update(&to_u64(image.len()).to_le_bytes());
        hasher.update(&level[0]);
        hasher.finalize().to_hex().to_string()
    }

    #[test]
    fn the_root_is_that_of_the_design() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("image");
        for blocks in [1, 2, 127, 128, 129, 128 * 128, 128 * 128 + 1] {
            let mut image = vec![0_u8; blocks * 4096];
            for (index, block) in image.chunks_mut(4096).enumerate() {
                if index % 3 != 1 {
                    block[index % 4096] = u8::try_from(index % 251 + 1).unwrap();
                }
            }
            std::fs::write(&file, &image).unwrap();
            let root = hash(&file, Look::PLAIN).unwrap();
            assert_eq!(root.to_string(), reference(&image), "{blocks} blocks");
        }
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("image");
        let said = |file: &Path| hash(file, Look::PLAIN).unwrap_err().render(false);
        assert!(said(&file).contains("No such file"), "{}", said(&file));
        assert!(said(directory.path()).contains("neither a file"), "{}", said(directory.path()));
        std::fs::write(&file, vec![0; 4097]).unwrap();
        assert!(said(&file).contains("4097 bytes, is no multiple of 4096"), "{}", said(&file));
    }
}
