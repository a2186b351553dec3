//! `mirrorhub seed`: fills the image of a volume from a disk that came by another way than the link.
//!
//! Run where the hub is. The file is read here, by whoever gives the command, and goes through the
//! admin socket: the hub needs no right to read it. What is a hole in the file is not read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::{SeekFrom, seek};
use tokio::sync::mpsc;

use super::ask::{Asked, runtime};
use super::failure::{Failure, USAGE, print_answer};
use super::hash::open;
use super::locate::ConfigArgument;
use super::terminal::Terminal;
use super::{Done, words};
use crate::control::feed::Piece;
use crate::control::message::{Request, Target};
use crate::limits::{SEED_PIECE_BYTES_MAX, SEED_PIECES_WAITING};
use crate::status::answers::{SeedAnswer, SeedEntry, SeedsAnswer};
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::ByteCount;

/// Fill the image of a volume on the hub from a disk sent by truck; then only the difference is sent
///
/// FILE is a raw image or block device with all of the volume as it was some time ago, or `-` for stdin.
/// The source must not have published anything here, and must not be in session. When it connects its
/// volume is compared with the seed, and what differs goes over the link. A wrong or damaged disk costs
/// bytes and nothing else: an image is published with equal roots only. After a cut the same command goes
/// on; until then the source is held off. Without arguments it lists the seeds whose sources have not
/// come.
#[derive(Debug, Args)]
pub struct SeedArguments {
    /// SOURCE/VOLUME
    #[arg(requires = "what")]
    target: Option<Target>,
    /// Raw image, block device, or `-`
    #[arg(group = "what")]
    file: Option<PathBuf>,
    /// Give the seed up
    #[arg(long, group = "what", requires = "target")]
    discard: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs it.
pub fn run(arguments: &SeedArguments, terminal: &Terminal) -> Result<Done, Failure> {
    let asked = Asked::of(&arguments.config)?;
    let (Some(target), Some(file)) = (&arguments.target, &arguments.file) else {
        let request = match &arguments.target {
            Some(target) => Request::SeedDiscard { target: target.clone() },
            None => Request::Seeds {},
        };
        let answer: SeedsAnswer =
            runtime()?.block_on(asked.ask(&request, "seed", None, terminal.error))?;
        print_answer(arguments.json, &answer, listed)?;
        return Ok(Done::WELL);
    };
    let what = format!("seed {target}");
    if target.volume.is_none() {
        let (what, next) =
            (format!("{what}: that is a source"), format!("name it as {target}/VOLUME"));
        return Err(Failure::Message { code: USAGE, what, next });
    }
    let unread =
        |error: io::Error| Failure::failed(format!("{what}: {}: {error}", file.display()), "");
    let (from, size) = From::open(file).map_err(unread)?;
    let request = Request::Seed { target: target.clone(), size_bytes: size.map(|size| size.0) };
    let (sender, pieces) = mpsc::channel(SEED_PIECES_WAITING);
    let name = file.display().to_string();
    let reader = std::thread::Builder::new().name("seed".to_owned()).spawn(move || {
        if let Err(error) = from.read(&sender) {
            let error = io::Error::new(error.kind(), format!("{name}: {error}"));
            drop(sender.blocking_send(Err(error)));
        }
    });
    drop(reader.map_err(unread)?);
    let answer: SeedAnswer =
        runtime()?.block_on(asked.feed(&request, &what, pieces, terminal.error))?;
    print_answer(arguments.json, &answer, view)?;
    Ok(Done::WELL)
}

fn view(answer: &SeedAnswer) -> String {
    let SeedAnswer { source, volume, size_bytes, root, pool_bytes, next_step, .. } = answer;
    let (size, pool) = (words::size(*size_bytes), words::size(*pool_bytes));
    format!(
        "{source}/{volume}: seeded, {pool} of {size} hold data\n  root {root}\n  next: {next_step}\n"
    )
}

fn listed(answer: &SeedsAnswer) -> String {
    if answer.seeds.is_empty() {
        return "no seed waits for its source\n".to_owned();
    }
    let line = |seed: &SeedEntry| {
        let (source, volume, state) = (&seed.source, &seed.volume, &seed.state);
        let pool = words::size(seed.pool_bytes);
        let of = seed.size_bytes.map(|size| format!(" of {}", words::size(size)));
        format!("{source}/{volume}  {state}, {pool}{}\n", of.unwrap_or_default())
    };
    answer.seeds.iter().map(line).collect()
}

type Sender = mpsc::Sender<io::Result<Piece>>;

/// Where a seed comes from.
enum From {
    /// Its places can be read in any order.
    Disk(File, u64),
    Pipe(io::Stdin),
}

impl From {
    fn open(file: &Path) -> io::Result<(Self, Option<ByteCount>)> {
        if file == Path::new("-") {
            return Ok((Self::Pipe(io::stdin()), None));
        }
        let (opened, size) = open(file)?;
        if !size.is_whole_blocks() {
            let what = format!("its size, {} bytes, is no multiple of {BLOCK_BYTES_U64}", size.0);
            return Err(io::Error::other(what));
        }
        Ok((Self::Disk(opened, size.0), Some(size)))
    }

    fn read(self, sender: &Sender) -> io::Result<()> {
        match self {
            Self::Disk(file, size) => read_disk(&file, size, sender),
            Self::Pipe(stdin) => read_pipe(stdin.lock(), sender),
        }
    }
}

/// Sends a piece that is not all zero; false if nobody takes it any more.
fn send(sender: &Sender, offset: u64, bytes: &[u8]) -> bool {
    if bytes.iter().all(|byte| *byte == 0) {
        return !sender.is_closed();
    }
    sender.blocking_send(Ok(Piece::Data { offset, bytes: bytes.to_vec() })).is_ok()
}

fn end(sender: &Sender, size: u64) {
    // Who takes no more says why.
    drop(sender.blocking_send(Ok(Piece::End(size))));
}

fn read_disk(file: &File, size: u64, sender: &Sender) -> io::Result<()> {
    let mut buffer = vec![0; to_usize(SEED_PIECE_BYTES_MAX)];
    let mut at = 0;
    while at < size {
        let (from, upto) = data_behind(file, at, size)?;
        at = from;
        while at < upto {
            let piece = &mut buffer[..to_usize((upto - at).min(SEED_PIECE_BYTES_MAX))];
            file.read_exact_at(piece, at)?;
            if !send(sender, at, piece) {
                return Ok(());
            }
            at += to_u64(piece.len());
        }
    }
    end(sender, size);
    Ok(())
}

/// The next whole blocks with data, behind `at`. What cannot tell where its holes are is all data.
fn data_behind(file: &File, at: u64, size: u64) -> io::Result<(u64, u64)> {
    let from = match seek(file, SeekFrom::Data(at)) {
        Ok(from) => from,
        Err(rustix::io::Errno::NXIO) => return Ok((size, size)),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => return Ok((at, size)),
        Err(error) => return Err(error.into()),
    };
    let upto = seek(file, SeekFrom::Hole(from))?;
    let upto = upto.min(size).next_multiple_of(BLOCK_BYTES_U64);
    Ok((from - from % BLOCK_BYTES_U64, upto.min(size)))
}

fn read_pipe(mut pipe: impl Read, sender: &Sender) -> io::Result<()> {
    let mut buffer = vec![0; to_usize(SEED_PIECE_BYTES_MAX)];
    let mut at = 0;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match pipe.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let rest = to_u64(filled) % BLOCK_BYTES_U64;
        if rest != 0 {
            let what = format!(
                "it ends after {} bytes, no multiple of {BLOCK_BYTES_U64}",
                at + to_u64(filled)
            );
            return Err(io::Error::other(what));
        }
        if filled > 0 && !send(sender, at, &buffer[..filled]) {
            return Ok(());
        }
        at += to_u64(filled);
        if filled < buffer.len() {
            end(sender, at);
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn pieces(read: impl FnOnce(&Sender) -> io::Result<()> + Send + 'static) -> Vec<Piece> {
        let (sender, mut receiver) = mpsc::channel(1);
        let reader = std::thread::spawn(move || read(&sender).unwrap());
        let mut all = Vec::new();
        while let Some(piece) = receiver.blocking_recv() {
            all.push(piece.unwrap());
        }
        reader.join().unwrap();
        all
    }

    /// What lies in holes or is all zero is not sent, the rest is, whole blocks, to the end.
    #[test]
    fn of_a_file_what_is_not_zero_is_sent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let file = File::create(&path).unwrap();
        let size = 9 << 20;
        file.set_len(size).unwrap();
        file.write_all_at(&[7; 100], (3 << 20) + 4000).unwrap();
        file.write_all_at(&[0; 4096], 5 << 20).unwrap();
        file.write_all_at(&[8; 1], size - 1).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let pipe = io::Cursor::new(bytes.clone());
        let of_disk = pieces(move |sender| {
            let (from, met) = From::open(&path).unwrap();
            assert_eq!(met, Some(ByteCount(size)));
            from.read(sender)
        });
        for all in [of_disk, pieces(move |sender| read_pipe(pipe, sender))] {
            let mut met = vec![0; bytes.len()];
            let mut sent = 0;
            for piece in &all[..all.len() - 1] {
                let Piece::Data { offset, bytes } = piece else { panic!("{piece:?}") };
                let at = usize::try_from(*offset).unwrap();
                met[at..at + bytes.len()].copy_from_slice(bytes);
                sent += bytes.len();
            }
            assert_eq!(all.last(), Some(&Piece::End(size)));
            assert!(met == bytes && sent <= 3 << 20, "{sent} bytes were sent");
        }
    }

    #[test]
    fn what_is_no_whole_image_is_refused() {
        let (sender, _receiver) = mpsc::channel(4);
        let error = read_pipe(io::Cursor::new(vec![1; 5000]), &sender).unwrap_err();
        assert!(error.to_string().contains("5000 bytes"), "{error}");
        let directory = tempfile::tempdir().unwrap();
        let refused = |file: &Path| From::open(file).err().unwrap().to_string();
        assert_eq!(refused(directory.path()), "is neither a file nor a block device");
        let part = directory.path().join("part");
        std::fs::write(&part, [1; 5000]).unwrap();
        assert_eq!(refused(&part), "its size, 5000 bytes, is no multiple of 4096");
    }
}
