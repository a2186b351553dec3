//! Bytes flip at rest in every kind of structure that is on a disk. Each is detected: where another
//! copy exists it is used and the damage mended, where none does the refusal names what is damaged, and
//! wrong data is never served.
//!
//! A kind that has no case does not compile; one that is in no test fails `every_kind_is_in_a_test`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use mirrorhub::nbd::client::Client;
use mirrorhub::raid::label::Label;
use mirrorhub::raid::layout::data_start;

use crate::failover::failing;
use crate::harness::{BINARY, Cluster, run, status, try_run, wait_for};
use crate::outage::socket;
use crate::raid::with_array;
use crate::rot::{find, flip};

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
const CHUNK: u64 = 64 << 10;
/// Blocks of the volume that a CP holds.
const BLOCKS: u64 = 200;
/// Behind it, in the logs only: 64 KiB of each of these.
const LOGGED: [u8; 3] = [0x51, 0x52, 0x53];

macro_rules! kinds {
    ($($kind:ident)*) => {
        /// What is on a disk.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        enum Kind { $($kind),* }
        const ALL: &[Kind] = &[$(Kind::$kind),*];
    };
}
kinds! { ArrayLabel PoolLabel Catalog Node Data Parity HubNvram SourceNvram SourceLog }

/// What is done to a kind, and what must be seen.
struct Case {
    /// Damages one copy.
    one: fn(&Scene),
    /// With one copy damaged: it is used, and mended.
    mended: fn(&mut Scene),
    /// Damages every copy.
    all: fn(&Scene),
    /// Then: refused, by name.
    refused: fn(&mut Scene),
}

fn case(kind: Kind) -> Case {
    match kind {
        Kind::ArrayLabel => array_label(),
        Kind::PoolLabel => pool_label(),
        Kind::Catalog => catalog(),
        Kind::Node => node(),
        Kind::Data => data(),
        Kind::Parity => parity(),
        Kind::HubNvram => hub_nvram(),
        Kind::SourceNvram => source_nvram(),
        Kind::SourceLog => source_log(),
    }
}

fn array_label() -> Case {
    Case {
        one: |scene| flip(&scene.disk(1), 300),
        mended: |scene| {
            scene.start_and_compare();
            // Two opens write both copies anew.
            scene.cluster.end();
            scene.start_and_compare();
            for copy in [0, 4096] {
                let bytes = bytes_at(&scene.disk(1), copy);
                assert!(Label::decode(&bytes).is_ok(), "copy at {copy} is not mended");
            }
        },
        all: |scene| {
            for disk in [1, 2] {
                flip(&scene.disk(disk), 300);
                flip(&scene.disk(disk), 4096 + 300);
            }
        },
        refused: |scene| {
            let said = scene.hub_refuses();
            assert!(said.contains("label is damaged") && said.contains("disk1"), "{said}");
        },
    }
}

fn pool_label() -> Case {
    Case {
        // Both copies lie in one chunk of one device.
        one: |scene| [0, 4096].iter().for_each(|at| flip(&scene.disk(0), start() + at + 20)),
        mended: Scene::start_and_compare,
        all: |scene| {
            for disk in [0, 2] {
                [0, 4096].iter().for_each(|at| flip(&scene.disk(disk), start() + at + 20));
            }
        },
        refused: |scene| {
            let said = scene.hub_refuses();
            assert!(said.contains("label") && said.contains("checksum"), "{said}");
        },
    }
}

fn catalog() -> Case {
    Case {
        one: |scene| spoil_catalog(scene, 1),
        mended: |scene| {
            scene.start_and_compare();
            assert!(scene.log("hub").contains("catalog"), "nobody is told of it");
        },
        all: |scene| [1, 2].iter().for_each(|disk| spoil_catalog(scene, *disk)),
        refused: |scene| {
            let said = scene.hub_refuses();
            assert!(said.contains("pool") && said.contains("catalog"), "{said}");
        },
    }
}

fn node() -> Case {
    Case {
        one: |scene| spoil(scene, &scene.places(is_node), false),
        mended: Scene::start_and_compare,
        all: |scene| spoil(scene, &scene.places(is_node), true),
        refused: |scene| scene.hub_alone_names_it("level 1"),
    }
}

fn data() -> Case {
    Case {
        one: |scene| spoil(scene, &scene.places(is_data), false),
        mended: Scene::start_and_compare,
        all: |scene| spoil(scene, &scene.places(is_data), true),
        refused: |scene| scene.hub_alone_names_it("level 0 index 7"),
    }
}

fn parity() -> Case {
    Case {
        one: |scene| scene.parities().iter().for_each(|(disk, at)| flip(&scene.disk(*disk), *at)),
        mended: |scene| {
            scene.start_and_compare();
            let said = scene.scrub();
            assert!(!said.contains(" 0 copies repaired"), "parity is not read: {said}");
            assert!(scene.scrub().contains("all of it right"), "it is not mended");
        },
        all: |scene| {
            scene.parities().iter().for_each(|(disk, at)| flip(&scene.disk(*disk), *at));
            let (disk, _) = scene.places(is_data)[0];
            fs::remove_file(scene.disk(disk)).expect("a disk");
        },
        refused: |scene| scene.hub_alone_names_it("level 0 index 7"),
    }
}

fn hub_nvram() -> Case {
    Case {
        one: |scene| flip_logged(&scene.path("hub/state/nvram"), 1),
        mended: Scene::start_and_compare,
        all: |scene| flip_logged(&scene.path("hub/state/nvram"), 1),
        refused: |scene| scene.failover_names("NVRAM was damaged"),
    }
}

fn source_nvram() -> Case {
    Case {
        // Behind the last record nothing proves that it was durable: the hub is asked.
        one: |scene| flip_logged(&scene.path("filer-a/state/nvram"), 2),
        mended: Scene::start_and_compare,
        all: |scene| flip_logged(&scene.path("filer-a/state/nvram"), 0),
        refused: |scene| {
            let said = scene.refuses("source");
            assert!(said.contains("damaged") && said.contains("--accept-lost-nvram"), "{said}");
        },
    }
}

fn source_log() -> Case {
    Case {
        // The ring still has it.
        one: |scene| flip_logged(&scene.source_log(), 1),
        mended: Scene::start_and_compare,
        all: |scene| {
            flip_logged(&scene.source_log(), 1);
            flip_logged(&scene.path("hub/state/nvram"), 1);
        },
        refused: |scene| {
            scene.failover_names("the log has a gap");
            let shown = scene.cluster.on_hub(NAME).to_string();
            assert!(!shown.contains("faulted") && shown.contains("the log has a gap"), "{shown}");
            // The source has all of it, and sends it again: nobody has to delete anything.
            scene.cluster.start_source(NAME);
            scene.cluster.wait_in_sync(NAME);
            scene.is_whole();
            // Another boot of the source: its CP shows that nothing is missing.
            wait_for("nothing is missing any more", LIMIT, || {
                !scene.cluster.on_hub(NAME).to_string().contains("gap")
            });
        },
    }
}

/// Which test has it.
fn test_of(kind: Kind) -> &'static str {
    match kind {
        Kind::ArrayLabel | Kind::PoolLabel | Kind::Catalog => "labels",
        Kind::Node | Kind::Data | Kind::Parity => "trees",
        Kind::HubNvram | Kind::SourceNvram | Kind::SourceLog => "logs",
    }
}

fn run_test(test: &str) {
    let mut scene = Scene::new();
    for kind in ALL.iter().filter(|kind| test_of(**kind) == test) {
        println!("{kind:?}");
        let Case { one, mended, all, refused } = case(*kind);
        scene.as_before();
        one(&scene);
        mended(&mut scene);
        scene.as_before();
        all(&scene);
        refused(&mut scene);
    }
}

#[test]
fn labels_and_catalog_that_flip() {
    run_test("labels");
}

#[test]
fn nodes_data_and_parity_that_flip() {
    run_test("trees");
}

#[test]
fn nvram_and_logs_that_flip() {
    run_test("logs");
}

#[test]
fn every_kind_is_in_a_test() {
    for kind in ALL {
        assert!(["labels", "trees", "logs"].contains(&test_of(*kind)), "{kind:?} is in no test");
    }
    assert_eq!(ALL.len(), 9);
}

/// The control: nothing is damaged, and everything is as it was.
#[test]
fn nothing_flips_and_all_is_well() {
    let mut scene = Scene::new();
    scene.as_before();
    scene.start_and_compare();
    assert!(scene.scrub().contains("all of it right"));
}

/// A pair that was killed, its files, and what they hold.
struct Scene {
    cluster: Cluster,
}

fn content(block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    blake3::Hasher::new().update(&block.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Block 7, and its hash.
static SEVENTH: LazyLock<(Vec<u8>, blake3::Hash)> =
    LazyLock::new(|| (content(7), blake3::hash(&content(7))));

fn is_data(block: &[u8]) -> bool {
    block == SEVENTH.0
}

/// The node above block 7.
fn is_node(block: &[u8]) -> bool {
    block[7 * 32 + 16..7 * 32 + 32] == SEVENTH.1.as_bytes()[..16]
}

/// Where stripes begin on a device.
fn start() -> u64 {
    data_start(CHUNK)
}

fn bytes_at(path: &Path, at: u64) -> [u8; BLOCK] {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; BLOCK];
    fs::File::open(path).expect("a file").read_exact_at(&mut bytes, at).expect("a block");
    bytes
}

fn flip_logged(path: &Path, which: usize) {
    let byte = LOGGED[which];
    let holds = |met: &[u8]| met.iter().filter(|met| **met == byte).count() > 3000;
    let places = find(path, holds);
    assert!(!places.is_empty(), "the write is not in {}", path.display());
    flip(path, places[0] + 2000);
}

/// A byte of each block of the catalog on that device that holds anything.
fn spoil_catalog(scene: &Scene, disk: usize) {
    let catalog = (start() + 8192..start() + (8 << 20)).step_by(BLOCK);
    let holds = |at: &u64| bytes_at(&scene.disk(disk), *at) != [0; BLOCK];
    let places: Vec<u64> = catalog.filter(holds).collect();
    assert!(!places.is_empty(), "no catalog on disk{disk}");
    places.iter().for_each(|at| flip(&scene.disk(disk), at + 1000));
}

/// Flips a byte there, and, if `all`, in the same row of another device as well.
fn spoil(scene: &Scene, places: &[(usize, u64)], all: bool) {
    assert!(!places.is_empty(), "it is on no device");
    for (disk, at) in places {
        flip(&scene.disk(*disk), at + 100);
        if all {
            flip(&scene.disk((disk + 1) % 3), at + 100);
        }
    }
}

impl Scene {
    fn new() -> Self {
        let mut cluster =
            Cluster::prepare(&[failing("stop").volumes(&[("vol0", "16MiB")]).interval("1h")]);
        with_array(&cluster.hub_config(), "parity1", 3);
        cluster.refusals_wanted = true;
        cluster.start_all();
        let own = socket(&cluster, NAME);
        let mut client = Client::unix(&own, EXPORT, LIMIT).expect("the volume");
        for block in 0..BLOCKS {
            client.write(block * 4096, &content(block)).expect("a write");
        }
        cluster.checkpoint(NAME);
        for (byte, mib) in LOGGED.iter().zip(4..) {
            client.write(mib << 20, &[*byte; 64 << 10]).expect("a write");
        }
        // Both have them, the hub in its ring and in the log of the source.
        wait_for("the writes are drained", LIMIT, || {
            let shown = cluster.on_hub(NAME);
            shown["drained_bytes"] == shown["staged_bytes"] && shown["staged_bytes"] != 0
        });
        cluster.end();
        for end in ["hub", NAME] {
            copy(&cluster.path(end).join("state"), &cluster.path(&format!("{end}-before")));
        }
        Self { cluster }
    }

    fn as_before(&mut self) {
        self.cluster.end();
        for end in ["hub", NAME] {
            let state = self.cluster.path(end).join("state");
            fs::remove_dir_all(&state).expect("the state of before");
            copy(&self.path(&format!("{end}-before")), &state);
            fs::write(self.path(&format!("{end}.log")), "").expect("an empty log");
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.path(name)
    }

    fn disk(&self, n: usize) -> PathBuf {
        self.path(&format!("hub/state/disk{n}"))
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    /// Where the hub has such blocks: device and offset.
    fn places(&self, wanted: fn(&[u8]) -> bool) -> Vec<(usize, u64)> {
        let on = |disk: usize| find(&self.disk(disk), wanted).into_iter().map(move |at| (disk, at));
        (0..3).flat_map(on).filter(|(_, at)| *at >= start()).collect()
    }

    /// Where the parity of the rows of block 7 is.
    fn parities(&self) -> Vec<(usize, u64)> {
        let parity = |(_, at): &(usize, u64)| {
            let stripe = (at - start()) / CHUNK;
            (usize::try_from((stripe + 2) % 3).expect("small"), *at + 100)
        };
        self.places(is_data).iter().map(parity).collect()
    }

    fn source_log(&self) -> PathBuf {
        let mut found = Vec::new();
        let mut directories = vec![self.path("hub/state/logs")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).expect("the logs") {
                let path = entry.expect("an entry").path();
                if path.is_dir() { directories.push(path) } else { found.push(path) }
            }
        }
        let holds = |path: &PathBuf| {
            fs::read(path)
                .is_ok_and(|bytes| bytes.iter().filter(|b| **b == LOGGED[1]).count() > 60_000)
        };
        found.into_iter().find(holds).expect("the log of the source has the writes")
    }

    fn compare(&self, export: &Path, logged: bool) -> Result<(), String> {
        let open = Client::unix(export, EXPORT, LIMIT);
        let mut client = open.map_err(|error| error.to_string())?;
        for block in 0..BLOCKS {
            let met = client.read(block * 4096, BLOCK).map_err(|error| error.to_string())?;
            assert!(met == content(block), "block {block} is wrong");
        }
        for (byte, mib) in LOGGED.iter().zip(4..).filter(|_| logged) {
            let met = client.read(mib << 20, 64 << 10).map_err(|error| error.to_string())?;
            assert!(met.iter().all(|met| met == byte), "write {byte:x} is wrong");
        }
        Ok(())
    }

    /// Both ends come up, and nothing acknowledged is lost.
    fn start_and_compare(&mut self) {
        self.cluster.start_all();
        self.is_whole();
    }

    fn is_whole(&mut self) {
        self.compare(&socket(&self.cluster, NAME), true).expect("the volume is whole");
        self.cluster.checkpoint(NAME);
        self.compare(&socket(&self.cluster, "hub"), true).expect("the image is whole");
        run(Command::new(BINARY).args(["verify", NAME, "--config"]).arg(self.cluster.hub_config()));
    }

    fn scrub(&self) -> String {
        let config = self.cluster.hub_config();
        let output = run(Command::new(BINARY).args(["scrub", "--wait", "--config"]).arg(config));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn refuses(&self, end: &str) -> String {
        let config = match end {
            "hub" => self.cluster.hub_config(),
            _ => self.cluster.source_config(NAME),
        };
        let ended = try_run(Command::new(BINARY).arg(end).arg("--config").arg(config));
        assert!(!ended.status.success(), "{end} starts");
        String::from_utf8_lossy(&ended.stderr).into_owned()
    }

    fn hub_refuses(&self) -> String {
        self.refuses("hub")
    }

    /// Nobody can be asked: the block is an error, the rest is right, and status names it.
    fn hub_alone_names_it(&mut self, what: &str) {
        self.cluster.start_hub();
        let hub = socket(&self.cluster, "hub");
        assert!(self.compare(&hub, false).is_err(), "what has no right copy was read");
        let config = self.cluster.hub_config();
        wait_for("status names it", LIMIT, || {
            status(&config).is_some_and(|shown| shown["pool"]["rot"].to_string().contains(what))
        });
    }

    /// The source is dead: a failover does not call complete what is damaged.
    fn failover_names(&mut self, what: &str) {
        self.cluster.start_hub();
        let config = self.cluster.hub_config();
        let asked = ["failover", NAME, "--dry-run", "--config"];
        let output = try_run(Command::new(BINARY).args(asked).arg(config));
        let (out, error) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let said = format!("{out}{error}");
        assert!(said.contains(what) && !said.contains("no acknowledged write is lost"), "{said}");
    }
}

/// With holes where there are zeros.
fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").args(["-a", "--sparse=always", "--reflink=auto"]).arg(from).arg(to));
}
