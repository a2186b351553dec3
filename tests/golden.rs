//! State directories and a connection of each released format, opened and replayed by today's program.
//!
//! `tests/golden/VERSION` has the state of a hub and of a source that were killed with writes in their logs
//! (`hub.tar.gz`, `filer-a.tar.gz`), what the source of a first contact sent (`connection.gz`), and the roots
//! that come of it (`roots.json`). Before a release they are made anew for its version, and those of before stay:
//!
//! ```text
//! MIRRORHUB_GOLDEN=0.2 cargo nextest run --cargo-profile proof --test suite golden::made
//! ```

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mirrorhub::nbd::client::Client;
use serde_json::{Value, json};

use crate::harness::{Cluster, SourceSettings, command, run, wait_for};
use crate::outage::socket;

const NAME: &str = "filer-a";
const EXPORT: &str = "filer-a/vol0";
const KEPT: &str = "filer-a/vol0@golden";
const LIMIT: Duration = Duration::from_secs(30);
const BLOCKS: u64 = 16 * 256;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn settings() -> SourceSettings {
    SourceSettings::new(NAME).volumes(&[("vol0", "16MiB")]).nvram("16MiB").pool("320MiB")
}

fn prepare() -> Cluster {
    Cluster::prepare_with(&[settings()], "16MiB", "320MiB")
}

/// What was written in each step: the blocks, one behind the other by that distance.
const STEPS: [(u64, u64); 3] = [(0, 97), (5, 301), (194, 388)];

/// What a block holds behind so many steps.
fn wanted(block: u64, steps: usize) -> Vec<u8> {
    let mut data = vec![0; 4096];
    for (number, (first, distance)) in (1_u8..).zip(&STEPS[..steps]) {
        if block >= *first && (block - first).is_multiple_of(*distance) {
            data.fill(number);
            data[..8].copy_from_slice(&block.to_le_bytes());
        }
    }
    data
}

fn write(client: &mut Client, step: usize) {
    let (first, distance) = STEPS[step - 1];
    let mut block = first;
    while block < BLOCKS {
        client.write(block * 4096, &wanted(block, step)).expect("a block is written");
        block += distance;
    }
}

fn check(socket: &Path, export: &str, steps: usize) {
    let mut client =
        Client::unix(socket, export, LIMIT).unwrap_or_else(|e| panic!("{export}: {e}"));
    for first in (0..BLOCKS).step_by(256) {
        let read = client.read(first * 4096, 1 << 20).expect("blocks are read");
        for (block, data) in (first..).zip(read.chunks(4096)) {
            assert!(
                data == wanted(block, steps),
                "{export}: block {block} is not as in step {steps}"
            );
        }
    }
}

fn versions() -> Vec<PathBuf> {
    let entries = fs::read_dir(golden()).expect("tests/golden");
    let mut all: Vec<_> = entries.map(|entry| entry.expect("a version").path()).collect();
    all.sort();
    assert!(!all.is_empty(), "there is no golden state");
    all
}

fn roots(version: &Path) -> Value {
    let text = fs::read_to_string(version.join("roots.json")).expect("roots.json");
    serde_json::from_str(&text).expect("JSON")
}

/// A cluster with the state that a version left behind.
fn opened(version: &Path) -> Cluster {
    let cluster = prepare();
    for end in ["hub", NAME] {
        let archive = version.join(format!("{end}.tar.gz"));
        run(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(cluster.path(end)));
    }
    cluster
}

fn image_root(cluster: &Cluster) -> Value {
    cluster.on_hub(NAME)["volumes"][0]["root"].clone()
}

/// Goal: what any released version has left on the disks of both ends, killed in the middle of work, is
/// opened: kept CP, image, what was only in the logs; and goes on.
#[test]
fn the_state_of_each_version_is_opened() {
    for version in versions() {
        let roots = roots(&version);
        let mut cluster = opened(&version);
        cluster.start_hub();
        assert_eq!(image_root(&cluster), roots["image"], "{}", version.display());
        let (hub, source) = (socket(&cluster, "hub"), socket(&cluster, NAME));
        check(&hub, KEPT, 1);
        check(&hub, EXPORT, 2);
        cluster.start_source(NAME);
        cluster.wait_in_sync(NAME);
        check(&source, EXPORT, 3);
        let answer = cluster.checkpoint(NAME);
        let root = Cluster::root(&answer, "vol0");
        assert_eq!(roots["all"], root.as_str(), "{}", version.display());
        assert_eq!(cluster.own_status(NAME)["volumes"][0]["root"], root.as_str(), "roots meet");
        check(&hub, EXPORT, 3);
        check(&hub, KEPT, 1);
        cluster.end();
    }
}

/// The first frame of what a source sent.
fn first_frame(sent: &[u8]) -> usize {
    let length = |at: usize| {
        let bytes = sent[at..at + 4].try_into().expect("four bytes");
        usize::try_from(u32::from_le_bytes(bytes)).expect("a length")
    };
    8 + length(0) + length(4)
}

/// Says Hello as it was recorded, waits for the answer, sends `rest`.
fn replay(cluster: &Cluster, hello: &[u8], rest: &[u8]) -> (TcpStream, Vec<u8>) {
    let mut stream = TcpStream::connect(cluster.hub_address()).expect("the hub");
    stream.set_read_timeout(Some(LIMIT)).expect("a limit");
    stream.write_all(hello).expect("Hello");
    let mut prefix = [0; 8];
    stream.read_exact(&mut prefix).expect("an answer");
    let mut answer = vec![0; first_frame(&prefix) - 8];
    stream.read_exact(&mut answer).expect("the whole answer");
    stream.write_all(rest).expect("the rest");
    (stream, answer)
}

/// Goal: what a source of any released version sends in its first contact (Hello, transfers, a CP) is
/// taken by today's hub, which publishes the root of then. Control: with one byte of a transfer changed
/// nothing is published.
#[test]
fn the_connection_of_each_version_is_taken() {
    for version in versions() {
        let unpacked = run(Command::new("gzip").arg("-dc").arg(version.join("connection.gz")));
        let sent = unpacked.stdout;
        let (hello, rest) = sent.split_at(first_frame(&sent));
        for broken in [false, true] {
            let mut cluster = prepare();
            cluster.start_hub();
            let mut rest = rest.to_vec();
            if broken {
                let at =
                    rest.windows(512).position(|data| data == [1; 512]).expect("a write's data");
                rest[at] ^= 1;
            }
            let (stream, _) = replay(&cluster, hello, &rest);
            if broken {
                // It says why, and hangs up: all that it sent can be read to its end.
                let mut said = Vec::new();
                drop((&stream).read_to_end(&mut said));
                assert!(!said.is_empty(), "the hub takes what is broken without a word");
                assert_ne!(image_root(&cluster), roots(&version)["first"]);
                continue;
            }
            wait_for("the CP is published", LIMIT, || {
                image_root(&cluster) == roots(&version)["first"]
            });
            drop(stream);
            check(&socket(&cluster, "hub"), EXPORT, 1);
        }
    }
}

/// A Hello of a protocol that this hub does not speak any more, or not yet, is refused, and the answer
/// names the versions of both.
#[test]
fn a_newer_protocol_is_refused_with_both_versions() {
    use mirrorhub::wire::message::{Frame, Message, PROTOCOL_VERSION};
    let version = versions().pop().expect("a version");
    let unpacked = run(Command::new("gzip").arg("-dc").arg(version.join("connection.gz")));
    let length = first_frame(&unpacked.stdout);
    let header = unpacked.stdout[8..length].to_vec();
    let decoded = Message::decode(&header, 0).expect("a Hello");
    let Message::Hello(mut hello) = decoded else { panic!("no Hello") };
    (hello.version, hello.version_min) = (PROTOCOL_VERSION + 7, PROTOCOL_VERSION + 5);
    let frame = Frame::new(&Message::Hello(hello), Default::default());
    let mut cluster = prepare();
    cluster.start_hub();
    let (_stream, answer) = replay(&cluster, &frame.head, &[]);
    let said = String::from_utf8_lossy(&answer).into_owned();
    let wanted = format!("versions {} to {}", PROTOCOL_VERSION + 5, PROTOCOL_VERSION + 7);
    assert!(said.contains(&wanted) && said.contains(&format!("to {PROTOCOL_VERSION}")), "{said:?}");
}

/// Carries one connection to the hub; what the source sends is kept.
fn recorder(cluster: &Cluster) -> Arc<Mutex<Vec<u8>>> {
    let hub = cluster.hub_address();
    let listener = TcpListener::bind((hub.ip(), 0)).expect("a port");
    let config = cluster.source_config(NAME);
    let text = fs::read_to_string(&config).expect("source.toml");
    let address = listener.local_addr().expect("its address").to_string();
    fs::write(&config, text.replace(&hub.to_string(), &address)).expect("source.toml");
    let recorded = Arc::<Mutex<Vec<u8>>>::default();
    let kept = Arc::clone(&recorded);
    std::thread::spawn(move || {
        let (near, _) = listener.accept().expect("the source");
        let far = TcpStream::connect(hub).expect("the hub");
        let (mut from, mut to) =
            (far.try_clone().expect("a socket"), near.try_clone().expect("one"));
        std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        let (mut near, mut far, mut buffer) = (near, far, vec![0; 1 << 16]);
        while let Ok(count @ 1..) = near.read(&mut buffer) {
            kept.lock().expect("a lock").extend(&buffer[..count]);
            if far.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
    });
    recorded
}

/// Not a test: makes the golden state of the version that MIRRORHUB_GOLDEN names.
#[test]
fn made() {
    let Some(version) = std::env::var_os("MIRRORHUB_GOLDEN") else {
        println!("skipped: MIRRORHUB_GOLDEN=VERSION makes tests/golden/VERSION");
        return;
    };
    let to = golden().join(version);
    fs::create_dir_all(&to).expect("its directory");
    let mut cluster = prepare();
    cluster.start_hub();
    let recorded = recorder(&cluster);
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    let mut client = Client::unix(&socket(&cluster, NAME), EXPORT, LIMIT).expect("it opens");
    write(&mut client, 1);
    let root = |answer: Value| Cluster::root(&answer, "vol0");
    let keep = ["checkpoint", NAME, "--keep", "golden"];
    assert!(command(&cluster.hub_config(), &keep).status.success(), "a CP is kept");
    let first = image_root(&cluster);
    let sent = recorded.lock().expect("a lock").clone();
    write(&mut client, 2);
    let image = root(cluster.checkpoint(NAME));
    write(&mut client, 3);
    drop(client);
    cluster.kill_source(NAME);
    cluster.kill_hub();
    for end in ["hub", NAME] {
        // Zeros that were written become holes: an archive has none of them.
        let sparse = cluster.path("sparse");
        drop(fs::remove_dir_all(&sparse));
        fs::create_dir(&sparse).expect("a directory");
        let state = cluster.path(end).join("state");
        run(Command::new("cp").args(["-a", "--sparse=always"]).arg(state).arg(&sparse));
        for left in ["admin.sock", "admin.lock"] {
            drop(fs::remove_file(sparse.join("state").join(left)));
        }
        let archive = to.join(format!("{end}.tar"));
        run(Command::new("tar").arg("-Scf").arg(&archive).arg("-C").arg(&sparse).arg("state"));
        run(Command::new("gzip").args(["-9", "-n", "-f"]).arg(archive));
    }
    fs::write(to.join("connection"), sent).expect("the connection");
    run(Command::new("gzip").args(["-9", "-n", "-f"]).arg(to.join("connection")));
    // What today's program makes of it is what every later one has to.
    let write_roots = |all: &str| {
        let roots = json!({ "first": first, "image": image, "all": all });
        let text = serde_json::to_string_pretty(&roots).expect("JSON");
        fs::write(to.join("roots.json"), text + "\n").expect("roots.json");
    };
    write_roots("");
    let mut cluster = opened(&to);
    cluster.start_hub();
    cluster.start_source(NAME);
    cluster.wait_in_sync(NAME);
    write_roots(&root(cluster.checkpoint(NAME)));
    cluster.end();
}
