//! `mirrorhub demo`: a hub and two sources here, a real image, crashes, a proof.
//!
//! Everything is real: processes of this very program started from configuration files, an ext4
//! file system (or the user's own image) written over NBD, kill -9, and roots computed by three
//! parties. It ends with an error if any acknowledged write is missing or any root differs.

mod cluster;
mod load;

use std::fs;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use self::cluster::{Cluster, Processes};
use self::load::Load;
use super::Done;
use super::failure::Failure;
use super::progress::ProgressShow;
use super::signals::Signals;
use super::terminal::{Look, Terminal};
use crate::control::message::{Progress, ProgressUnit};
use crate::nbd::client::Client;
use crate::status::answers::CheckpointAnswer;
use crate::units::convert::{to_f64, to_u64};
use crate::units::hash::Root;
use crate::units::ids::random_u64;
use crate::units::numbers::ByteCount;
use crate::volume::root::hash_reader;

/// Size of the image that is made when the user gives none.
const IMAGE_BYTES: u64 = 64 << 20;
const CHUNK: usize = 256 << 10;
const PATIENCE: Duration = Duration::from_secs(30);
const SOURCES: [&str; 2] = ["filer-a", "filer-b"];

/// Run a hub and two sources here, with a real image, crashes, and a proof
#[derive(Debug, Args)]
pub struct DemoArguments {
    /// Use this raw image instead of making an ext4 file system
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Leave everything running and print how to connect
    #[arg(long)]
    keep: bool,
}

/// Runs the demo; prints what it does and measures.
pub fn run(arguments: &DemoArguments, terminal: &Terminal) -> Result<Done, Failure> {
    match play(arguments, terminal.error) {
        Ok(()) => Ok(Done::WELL),
        Err(error) => Err(Failure::failed(format!("demo: {error:#}"), "")),
    }
}

fn play(demo: &DemoArguments, look: Look) -> Result<()> {
    if let Some(image) = &demo.image {
        whole_blocks(image)?;
    }
    let directory = fresh_directory(&std::env::temp_dir())?;
    let image = match &demo.image {
        Some(image) => image.clone(),
        None => make_image(&directory)?,
    };
    let size = whole_blocks(&image)?;
    let mut cluster = Cluster::new(&directory, &SOURCES, size)?;
    end_on_signal(cluster.processes(), directory.clone())?;
    println!("state of this demo: {}", directory.display());
    let begin = Instant::now();
    cluster.start_all()?;
    println!("hub and {} sources in sync after {}", SOURCES.len(), seconds(begin.elapsed()));
    let result = show(&mut cluster, &image, size, look);
    if let Err(error) = result {
        println!("logs of the processes are kept in {}", directory.display());
        return Err(error);
    }
    if demo.keep {
        cluster.leave_running()?;
        return Ok(());
    }
    cluster.stop_all()?;
    fs::remove_dir_all(&directory)
        .with_context(|| format!("cannot remove {}", directory.display()))?;
    Ok(())
}

/// TERM, INT and HUP end what the demo has started, instead of leaving it behind.
fn end_on_signal(processes: Processes, directory: PathBuf) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let guard = runtime.enter();
    let mut signals = Signals::install().context("cannot catch signals")?;
    drop(guard);
    let watch = move || {
        runtime.block_on(signals.next());
        let _none_is_started = processes.end();
        eprintln!("demo: ended by a signal; the logs are kept in {}", directory.display());
        std::process::exit(1);
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(watch)?;
    Ok(())
}

/// The size of an image that a volume can hold.
fn whole_blocks(image: &Path) -> Result<u64> {
    let size =
        fs::metadata(image).with_context(|| format!("cannot read {}", image.display()))?.len();
    ensure!(
        size > 0 && size.is_multiple_of(4096),
        "{} has {size} bytes: an image has whole blocks of 4096 bytes",
        image.display()
    );
    Ok(size)
}

/// A directory that nobody else can have prepared: its name cannot be guessed, it is made here and
/// now, and only its owner may enter it.
fn fresh_directory(parent: &Path) -> Result<PathBuf> {
    let number = random_u64().context("no random number for the name of a directory")?;
    let directory = parent.join(format!("mirrorhub-demo-{number:016x}"));
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

fn show(cluster: &mut Cluster, image: &Path, size: u64, look: Look) -> Result<()> {
    println!("\n1. writing {} to each source over NBD, reading the hub's images", mib(size));
    for name in SOURCES {
        write_image(cluster, name, image, size, look)?;
    }
    println!("\n2. a consistency point: the same root, computed by three parties");
    compare(cluster, image, size)?;
    println!("\n3. kill -9 of the hub and of filer-a in mid-write");
    crash(cluster)?;
    println!("\n4. after the crashes: both ends meet again");
    for name in SOURCES {
        let answer = cluster.checkpoint(name)?;
        println!("   {name}: CP {} published, root {}", answer.0, answer.1);
        let volume = hash_export(&cluster.volume_socket(name), &format!("{name}/vol0"))?;
        let there = hash_export(&cluster.image_socket(), &format!("{name}/vol0"))?;
        ensure!(volume == answer.1, "{name}: the volume read anew has root {volume}");
        ensure!(there == answer.1, "{name}: the image read anew has root {there}");
        println!("   {name}: every block read again at both ends: the same root");
    }
    println!("\nproven: no acknowledged write was lost, and every image equals its source");
    Ok(())
}

/// An ext4 file system with some files in it.
fn make_image(directory: &Path) -> Result<PathBuf> {
    let content = directory.join("content");
    fs::create_dir_all(&content)?;
    for n in 0..64_u32 {
        let line = format!("file {n} of the mirrorhub demo\n");
        fs::write(content.join(format!("file-{n}.txt")), line.repeat(2000))?;
    }
    let image = directory.join("image.ext4");
    fs::File::create(&image)?.set_len(IMAGE_BYTES)?;
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-d"])
        .arg(&content)
        .arg(&image)
        .output()
        .context("cannot run mkfs.ext4: install e2fsprogs, or give an image with --image FILE")?;
    if !made.status.success() {
        bail!("mkfs.ext4: {}", String::from_utf8_lossy(&made.stderr).trim());
    }
    Ok(image)
}

fn write_image(cluster: &Cluster, name: &str, image: &Path, size: u64, look: Look) -> Result<()> {
    let export = format!("{name}/vol0");
    let reader = {
        let (socket, export) = (cluster.image_socket(), export.clone());
        std::thread::spawn(move || hash_export(&socket, &export))
    };
    let mut client = Client::unix(&cluster.volume_socket(name), &export, PATIENCE)?;
    let mut file = fs::File::open(image)?;
    let begin = Instant::now();
    let mut progress = ProgressShow::new(look);
    let mut buffer = vec![0; CHUNK];
    let (mut offset, mut under_way) = (0, 0);
    while offset < size {
        let length = usize::try_from((size - offset).min(to_u64(CHUNK)))?;
        file.read_exact(&mut buffer[..length])?;
        client.submit_write(offset, &buffer[..length])?;
        under_way += 1;
        offset += to_u64(length);
        if under_way == 8 || offset == size {
            for _ in 0..under_way {
                client.reply()?.result.map_err(|code| anyhow::anyhow!("write: error {code}"))?;
            }
            under_way = 0;
            progress.update(&Progress {
                what: "writing".to_owned(),
                object: export.clone(),
                done: offset,
                total: Some(size),
                unit: ProgressUnit::Bytes,
            });
        }
    }
    progress.end();
    let took = begin.elapsed();
    let read = reader.join().map_err(|_| anyhow::anyhow!("the image's reader panicked"))??;
    println!(
        "   {name}: {} in {} ({} a second, each write durable at both ends); meanwhile the image \
         was read whole, root {}...",
        mib(size),
        seconds(took),
        mib(rate(size, took)),
        &read.to_string()[..16]
    );
    client.disconnect()?;
    Ok(())
}

fn compare(cluster: &Cluster, image: &Path, size: u64) -> Result<()> {
    let file = hash_reader(fs::File::open(image)?, ByteCount(size))?;
    println!("   {:<8} {:<7} {}", "", "", file);
    println!("   `mirrorhub hash {}`", image.display());
    for name in SOURCES {
        let begin = Instant::now();
        let (cp, root) = cluster.checkpoint(name)?;
        let took = begin.elapsed();
        let own = cluster.own_root(name)?;
        println!("   {name:<8} source  {own}");
        println!("   {name:<8} hub     {root}   CP {cp} in {}", seconds(took));
        ensure!(own == root && root == file, "{name}: the roots differ");
    }
    println!("   equal");
    Ok(())
}

fn crash(cluster: &mut Cluster) -> Result<()> {
    let mut load = Load::start(cluster.volume_socket("filer-a"), "filer-a/vol0");
    load.wait_answered(2000)?;
    cluster.kill("hub")?;
    cluster.kill("filer-a")?;
    let known = load.finish()?;
    println!("   {} writes were acknowledged before the kill", known.answered());
    let begin = Instant::now();
    cluster.start_all()?;
    println!("   both restarted and in sync after {}", seconds(begin.elapsed()));
    known.check(&cluster.volume_socket("filer-a"), "filer-a/vol0")?;
    cluster.checkpoint("filer-a")?;
    known.check(&cluster.image_socket(), "filer-a/vol0")?;
    println!("   every acknowledged write is on the source and in the hub's image");
    Ok(())
}

/// Root of an export, from its bytes as any client reads them.
fn hash_export(socket: &Path, export: &str) -> Result<Root> {
    let client = Client::unix(socket, export, PATIENCE)
        .with_context(|| format!("cannot open {export} at {}", socket.display()))?;
    let size = client.size();
    let reader = ExportReader { client, offset: 0, size, buffer: Vec::new() };
    Ok(hash_reader(std::io::BufReader::with_capacity(CHUNK, reader), ByteCount(size))?)
}

/// An export as a stream of bytes.
struct ExportReader {
    client: Client,
    offset: u64,
    size: u64,
    buffer: Vec<u8>,
}

impl Read for ExportReader {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.buffer.is_empty() {
            let left = (self.size - self.offset).min(to_u64(CHUNK));
            let length = usize::try_from(left).map_err(std::io::Error::other)?;
            if length == 0 {
                return Ok(0);
            }
            self.buffer = self.client.read(self.offset, length).map_err(std::io::Error::other)?;
            self.offset += left;
        }
        let length = out.len().min(self.buffer.len());
        out[..length].copy_from_slice(&self.buffer[..length]);
        self.buffer.drain(..length);
        Ok(length)
    }
}

/// The one source of an answer: CP and root of its one volume.
fn only(answer: CheckpointAnswer) -> Result<(u32, Root)> {
    let source = answer.sources.into_iter().next().context("an empty answer of checkpoint")?;
    let volume = source.volumes.into_iter().next().context("a source without volumes")?;
    Ok((source.cp, volume.root))
}

fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", to_f64(bytes) / 1_048_576.0)
}

fn rate(bytes: u64, took: Duration) -> u64 {
    let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
    bytes.saturating_mul(1000) / millis
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_directory_is_fresh_private_and_never_the_same() {
        let parent = tempfile::tempdir().unwrap();
        let (one, two) = (fresh_directory(parent.path()), fresh_directory(parent.path()));
        let (one, two) = (one.unwrap(), two.unwrap());
        assert_ne!(one, two);
        assert_eq!(fs::metadata(&one).unwrap().permissions().mode() & 0o777, 0o700);
        // Control: what exists is not taken over.
        assert!(fs::DirBuilder::new().create(&one).is_err());
        assert!(fresh_directory(&parent.path().join("missing")).is_err());
    }
}
