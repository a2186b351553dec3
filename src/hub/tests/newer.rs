//! Goal: whatever on disk a later program wrote is refused at the start with the version met and the
//! newest one that is read, and stays as it is. Method: a hub is stopped with something in each of its
//! files; the version of one format is raised, with its checksum, and the hub is started. Controls: with
//! the old bytes back it starts, and each format was found in its file. What a start does not read is held
//! to it where it is decoded: rows of the catalog, and records of ring and source log.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;

use super::*;
use crate::device::Device;
use crate::device::file::{Access, FileDevice};
use crate::filer::identity as filer_identity;
use crate::pool::{Pool, PoolOptions};
use crate::raid::files::PoolFiles;
use crate::raid::layout::Level;
use crate::units::convert::to_u64;
use crate::units::hash::crc32c;

const MIB: usize = 1 << 20;

/// Where a format has its version.
struct Format {
    what: &'static str,
    file: PathBuf,
    /// At a multiple of 512 bytes.
    magic: &'static [u8],
    version_at: usize,
    raised: u8,
    /// Bytes under the checksum, which counts as zero where it lies among them.
    sealed: usize,
    crc_at: usize,
    wanted: &'static str,
}

impl Format {
    /// The places where it lies, and the bytes there with the version raised.
    fn raised(&self) -> Vec<(u64, Vec<u8>)> {
        let mut front = vec![0; 8 * MIB];
        let read = fs::File::open(&self.file).unwrap().read_at(&mut front, 0).unwrap();
        front.truncate(read);
        let span = self.sealed.max(self.crc_at + 4);
        let met = |at: &usize| front[*at..].starts_with(self.magic) && at + span <= front.len();
        let raise = |at: usize| {
            let mut bytes = front[at..at + span].to_vec();
            bytes[self.version_at] = self.raised;
            bytes[self.crc_at..self.crc_at + 4].fill(0);
            let crc = crc32c(&bytes[..self.sealed]);
            bytes[self.crc_at..self.crc_at + 4].copy_from_slice(&crc.to_le_bytes());
            (to_u64(at), bytes)
        };
        (0..front.len()).step_by(512).filter(met).map(raise).collect()
    }
}

/// Why the hub does not start, or, for what is of one source, why that one is at fault.
async fn refusal(what: &str, options: HubOptions) -> String {
    match Hub::start(options).await {
        Ok(hub) => {
            let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
            let fault = lane.cursors().fault;
            hub.stop().await;
            match fault.filter(|_| what == "source log") {
                Some(fault) => fault.to_string(),
                None => panic!("{what}: the hub has started"),
            }
        }
        Err(error) => error.to_string(),
    }
}

/// Raises it in each of its places alone, and starts the hub.
async fn refused(format: &Format, options: impl Fn() -> HubOptions) {
    let Format { what, file, wanted, .. } = format;
    let places = format.raised();
    assert!(!places.is_empty(), "{what}: not found in its file");
    let open = OpenOptions::new().read(true).write(true).open(file).unwrap();
    for (at, raised) in places {
        let read = || {
            let mut met = vec![0; raised.len()];
            open.read_exact_at(&mut met, at).unwrap();
            met
        };
        let before = read();
        open.write_all_at(&raised, at).unwrap();
        let met = refusal(what, options()).await;
        assert!(met.contains(wanted), "{what}: {met}");
        assert_eq!(read(), raised, "{what}: was written over");
        open.write_all_at(&before, at).unwrap();
    }
    Hub::start(options()).await.unwrap().stop().await;
}

/// A hub of that pool that has stopped with a published CP, and a transfer in ring and log.
async fn stopped(options: HubOptions) -> Fake {
    let hub = Hub::start(options).await.unwrap();
    let mut a = Fake::new("a");
    a.welcomed(hub.address()).await;
    let first = a.put(0, 1).await;
    a.acked().await;
    assert!(matches!(a.checkpoint(&[(0, first)]).await, Message::CpDone(_)));
    a.put(1, 2).await;
    a.acked().await;
    let lane = hub.shared().lanes.get(&"a".parse().unwrap()).unwrap();
    until("the log has it", || lane.cursors().drained == a.last).await;
    hub.stop().await;
    a
}

#[test]
fn a_newer_format_is_refused_with_both_versions() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let a = stopped(options(path, &["a"])).await;
        let log = log_files(path, &a).pop().unwrap();
        let row = |what, file, magic, version_at, (raised, sealed, crc_at), wanted| Format {
            what,
            file,
            magic,
            version_at,
            raised,
            sealed,
            crc_at,
            wanted,
        };
        let disk = || path.join("disk0");
        let one = "version 2, this program reads version 1";
        let two = "version 3, this program reads versions 1 and 2";
        let formats = [
            row("ring", path.join("nvram"), b"MHNV", 4, (3, 508, 508), two),
            row("source log", log, b"MHSL", 4, (2, 508, 508), one),
            row("pool", disk(), b"MIRRPOOL", 8, (3, 4096, 12), "version 3, this program knows 2"),
            row("catalog", disk(), b"MIRRCATL", 8, (2, 32, 12), "version 2, this program knows 1"),
        ];
        for format in &formats {
            refused(format, || options(path, &["a"])).await;
        }
        let file = path.join(super::super::identity::FILE);
        let text = fs::read_to_string(&file).unwrap();
        let newer = text.replace("\"schema\": 1", "\"schema\": 2");
        fs::write(&file, &newer).unwrap();
        let met = refusal("identity", options(path, &["a"])).await;
        assert!(met.ends_with("has schema 2, this program reads 1"), "{met}");
        assert_eq!(fs::read_to_string(&file).unwrap(), newer);
        fs::write(&file, text).unwrap();
        an_extension(path).await;
    });
}

/// The rows of the catalog are under checksums of its database: raised through the pool.
async fn an_extension(path: &Path) {
    let raise = |version: u8| {
        let device: Arc<dyn Device> =
            Arc::new(FileDevice::open(&path.join("disk0"), Access::Cached).unwrap());
        let pool = Pool::open(device, PoolOptions::default()).unwrap();
        let row = pool.catalog().sources().unwrap().pop().unwrap();
        pool.catalog().update_source(row.id, move |row| row.extension[0] = version).unwrap();
    };
    raise(6);
    let met = refusal("identity", options(path, &["a"])).await;
    assert!(met.contains("has format version 6, this program reads versions 1 to 5"), "{met}");
    raise(5);
    Hub::start(options(path, &["a"])).await.unwrap().stop().await;
    let mut bytes = filer_identity::Extension::default().encode();
    bytes[4] = 4;
    let met = filer_identity::Extension::decode(&bytes).unwrap_err().to_string();
    assert!(met.contains("version 4, this program reads versions 1 to 3"), "{met}");
}

#[test]
fn a_newer_array_is_refused_with_both_versions() {
    in_system(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let device = |n| (path.join(format!("disk{n}")), ByteCount(40 << 20));
        let mirror = || HubOptions {
            pool: PoolFiles {
                level: Level::Mirror,
                devices: vec![device(0), device(1)],
                ..PoolFiles::plain(path.join("disk0"), ByteCount(40 << 20))
            },
            ..options(path, &["a"])
        };
        stopped(mirror()).await;
        // In one copy on one device: the other ones are what was before another program came.
        let parts: [(_, &'static [u8], usize); 2] =
            [("label", b"MIRRRAID", 4096), ("journal", b"MIRRRJNL", 64)];
        for (what, magic, sealed) in parts {
            let format = Format {
                what,
                file: path.join("disk1"),
                magic,
                version_at: 8,
                raised: 2,
                sealed,
                crc_at: 12,
                wanted: "of its array has format version 2, this program knows 1",
            };
            refused(&format, mirror).await;
        }
    });
}
