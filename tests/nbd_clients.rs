//! The NBD server under foreign clients: libnbd, QEMU and fio, over TCP and unix sockets.
//!
//! The server runs in this process over exports in memory, so that what is tested is the server
//! and its protocol. A tool that is missing fails its test with the name of its Debian package.

use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use mirrorhub::nbd::export::{Export, ExportInfo, Segment};
use mirrorhub::nbd::listen::{Listen, Listener};
use mirrorhub::nbd::memory::{Memory, MemoryExports};
use mirrorhub::nbd::protocol::request::Operation;
use mirrorhub::nbd::serve::{Options, Server};
use mirrorhub::units::numbers::ByteCount;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// The interpreter that Debian's python3-libnbd installs for.
const PYTHON: &str = "/usr/bin/python3";

/// A server on a TCP port and on a unix socket at once.
struct Serving {
    server: Server,
    port: u16,
    directory: TempDir,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Serving {
    async fn start(exports: impl IntoIterator<Item = Arc<Memory>>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let exports = Arc::new(MemoryExports::new(exports));
        let (server, stop) = (Server::new(Options::default()), CancellationToken::new());
        let (mut port, mut tasks) = (0, Vec::new());
        let tcp = Listen::Tcp("127.0.0.1:0".parse().unwrap());
        for listen in [tcp, Listen::Unix(directory.path().join("nbd.sock"))] {
            let listener = Listener::bind(&listen).await.unwrap();
            if let Listen::Tcp(address) = listener.listens_on() {
                port = address.port();
            }
            let (server, exports, stop) = (server.clone(), exports.clone(), stop.clone());
            tasks.push(tokio::spawn(async move { server.run(listener, exports, stop).await }));
        }
        Self { server, port, directory, stop, tasks }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    fn tcp(&self, name: &str) -> String {
        format!("nbd://127.0.0.1:{}/{name}", self.port)
    }

    fn unix(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.path("nbd.sock"))
    }

    /// Writes a file into the test's directory.
    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Stops, and checks that no client saw or did anything improper.
    async fn finish(self) {
        self.stop.cancel();
        for task in self.tasks {
            tokio::time::timeout(PATIENCE, task).await.expect("server stops").unwrap();
        }
        let counters = self.server.counters();
        assert_eq!(counters.protocol_errors(), 0);
        assert_eq!(counters.panics(), 0);
        assert_eq!(counters.connections_open(), 0);
        assert_eq!(self.server.bytes_in_flight(), ByteCount(0));
    }
}

fn export(name: &str, size: u64) -> ExportInfo {
    let mut info = ExportInfo::new(name, ByteCount(size));
    info.description = format!("volume {name}");
    info.multi_conn = true;
    info
}

fn package(program: &str) -> &str {
    match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "qemu-io" | "qemu-img" => "qemu-utils",
        PYTHON => "python3-libnbd",
        other => other,
    }
}

async fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).kill_on_drop(true).env("LC_ALL", "C");
    match tokio::time::timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => panic!("{program} (package {}): {error}", package(program)),
        Err(_) => panic!("{program} {arguments:?} does not end"),
    }
}

/// Runs a program that must succeed; its standard output.
async fn good(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments).await;
    let (out, error) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}\n{out}\n{error}");
    out.into_owned()
}

async fn json_of(program: &str, arguments: &[&str]) -> Value {
    serde_json::from_str(&good(program, arguments).await).unwrap()
}

/// Bytes that no shift or swap leaves equal, with holes of whole blocks between them.
fn sparse_image(size: u64) -> Vec<u8> {
    let mut state = 1u64;
    let mut image = Vec::new();
    while image.len() < usize::try_from(size).unwrap() {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let run = usize::try_from(state >> 60).unwrap() * 4096 + 4096;
        if state >> 59 & 1 == 0 {
            image.resize(image.len() + run, 0);
        } else {
            let words = 0..u64::try_from(run / 8).unwrap();
            image.extend(
                words.flat_map(|word| (state ^ word).wrapping_mul(0x9e37_79b9).to_le_bytes()),
            );
        }
    }
    image.truncate(usize::try_from(size).unwrap());
    image
}

/// What `nbdinfo --json` says, without what depends on where the server listens.
async fn described(uri: &str) -> Value {
    let mut answer = json_of("nbdinfo", &["--json", uri]).await;
    for export in answer["exports"].as_array_mut().unwrap() {
        let export = export.as_object_mut().unwrap();
        export.remove("uri");
        export.remove("content");
    }
    answer
}

fn description(info: &ExportInfo, writable: bool) -> Value {
    json!({
        "protocol": "newstyle-fixed",
        "TLS": false,
        "structured": true,
        "exports": [{
            "export-name": info.name,
            "description": info.description,
            "contexts": ["base:allocation"],
            "is_rotational": false,
            "is_read_only": !writable,
            "can_cache": true,
            "can_df": true,
            "can_fast_zero": writable,
            "can_flush": true,
            "can_fua": true,
            "can_multi_conn": info.multi_conn,
            "can_trim": writable,
            "can_zero": writable,
            "block_size_minimum": 1,
            "block_size_preferred": 4096,
            "block_size_maximum": 33_554_432,
            "export-size": info.size.0,
            "export-size-str": "64M",
        }],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_sees_what_each_export_can_do() {
    let volume = export("filer-a/vol0", 64 * MIB);
    let mut image = export("filer-b/vol0@nightly", 64 * MIB);
    (image.read_only, image.multi_conn) = (true, false);
    let exports = [&volume, &image].map(|info| Arc::new(Memory::new(info.clone())));
    let serving = Serving::start(exports).await;
    for (info, writable) in [(&volume, true), (&image, false)] {
        for uri in [serving.tcp(&info.name), serving.unix(&info.name)] {
            assert_eq!(described(&uri).await, description(info, writable), "{uri}");
        }
    }
    serving.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_lists_the_exports() {
    let infos = ["filer-a/vol0", "filer-a/vol1", "filer-b/vol0"].map(|name| export(name, MIB));
    let serving = Serving::start(infos.clone().map(|info| Arc::new(Memory::new(info)))).await;
    for uri in [serving.tcp(""), serving.unix("")] {
        let listed = json_of("nbdinfo", &["--list", "--json", &uri]).await;
        let field = |name: &str| -> Vec<String> {
            let exports = listed["exports"].as_array().unwrap().iter();
            exports.map(|export| export[name].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(field("export-name"), infos.clone().map(|info| info.name));
        assert_eq!(field("description"), infos.clone().map(|info| info.description));
    }
    let unknown = run("nbdinfo", &["--size", &serving.tcp("nobody/vol0")]).await;
    assert!(!unknown.status.success());
    let message = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(message.contains("no export named"), "{message}");
    serving.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn maps_show_data_holes_and_zeroes() {
    let memory = Arc::new(Memory::new(export("vol0", 64 * MIB)));
    memory.fill(MIB, &[1; 8192]);
    memory.fill(MIB + 8192, &[0; 4096]);
    let serving = Serving::start([memory]).await;
    let map = json_of("nbdinfo", &["--map", "--json", &serving.tcp("vol0")]).await;
    let line = |offset: u64, length: u64, kind: u32, text: &str| json!({ "offset": offset, "length": length, "type": kind, "description": text });
    let expected = json!([
        line(0, MIB, 3, "hole,zero"),
        line(MIB, 8192, 0, "data"),
        line(MIB + 8192, 4096, 2, "zero"),
        line(MIB + 12288, 63 * MIB - 12288, 3, "hole,zero"),
    ]);
    assert_eq!(map, expected);
    let map = json_of("qemu-img", &["map", "--output=json", &serving.unix("vol0")]).await;
    let lines = map.as_array().unwrap().iter();
    let data: Vec<_> = lines.filter(|line| line["data"] == json!(true)).collect();
    assert!(data.len() == 1 || data.len() == 2, "{map}");
    assert_eq!((&data[0]["start"], &data[0]["zero"]), (&json!(MIB), &json!(false)));
    serving.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_copies_in_and_out() {
    let image = sparse_image(64 * MIB);
    let memory = Arc::new(Memory::new(export("vol0", 64 * MIB)));
    let serving = Serving::start([Arc::clone(&memory)]).await;
    let file = serving.file("in.img", &image);
    for (number, uri) in [serving.tcp("vol0"), serving.unix("vol0")].into_iter().enumerate() {
        let before = serving.server.counters().connections_total();
        good("nbdcopy", &["--flush", "--connections=4", "--threads=4", &file, &uri]).await;
        let connections = serving.server.counters().connections_total() - before;
        assert!(connections >= 4, "multi-conn is used: {connections} connections");
        let copy = serving.path(&format!("out{number}.img"));
        good("nbdcopy", &[&uri, &copy]).await;
        assert!(std::fs::read(&copy).unwrap() == image, "{uri}: what came out is what went in");
    }
    assert!(memory.allocated() < 48 * MIB, "holes stayed holes: {}", memory.allocated());
    assert!(memory.flushes() > 0);
    let counters = serving.server.counters();
    assert!(counters.operation(Operation::BlockStatus).requests > 0, "extents were asked for");
    assert!(counters.operation(Operation::WriteZeroes).requests > 0);
    // Control: one byte that differs is found.
    memory.fill(MIB, &[image[usize::try_from(MIB).unwrap()] ^ 1]);
    let copy = serving.path("changed.img");
    good("nbdcopy", &[&serving.tcp("vol0"), &copy]).await;
    assert!(std::fs::read(&copy).unwrap() != image);
    serving.finish().await;
}

/// Runs qemu-io with these commands in one session; its output.
async fn qemu_io(uri: &str, commands: &[&str]) -> String {
    let mut arguments = vec!["-f", "raw", "-t", "none", uri];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    let output = good("qemu-io", &arguments).await;
    assert!(!output.contains("verification failed"), "{output}");
    output
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_writes_at_odd_offsets() {
    let memory = Arc::new(Memory::new(export("vol0", 64 * MIB)));
    let serving = Serving::start([Arc::clone(&memory)]).await;
    let output = qemu_io(
        &serving.tcp("vol0"),
        &[
            "write -P 0x11 0 1M",
            "write -P 0x22 4095 3",
            "read -P 0x11 0 4095",
            "read -P 0x22 4095 3",
            "read -P 0x11 4098 1000",
            "write -f -P 0x33 777777 12345",
            "read -P 0x33 777777 12345",
            "write -z 100001 50003",
            "read -P 0 100001 50003",
            "read -P 0x11 100000 1",
            "read -P 0x11 150004 1",
            "write -z -u 200000 8192",
            "read -P 0 200000 8192",
            "discard 262144 131072",
            "read -P 0 262144 131072",
            "aio_write -P 0x44 2M 1M",
            "aio_write -P 0x55 3M 1M",
            "aio_flush",
            "read -P 0x44 2M 1M",
            "read -P 0x55 3M 1M",
            "write -P 0x66 67108863 1",
            "read -P 0x66 67108863 1",
            "flush",
        ],
    )
    .await;
    assert_eq!(output.matches("read ").count(), 12, "{output}");
    assert!(memory.durable_writes() >= 1, "FUA came through");
    assert!(memory.flushes() >= 1);
    let counters = serving.server.counters();
    assert!(counters.operation(Operation::Trim).requests >= 1);
    assert!(counters.operation(Operation::WriteZeroes).requests >= 2);
    // Control: a pattern that is not there is found out.
    let unix = serving.unix("vol0");
    let output = run("qemu-io", &["-f", "raw", &unix, "-c", "read -P 0x77 0 512"]).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success() || text.contains("verification failed"), "{text}");
    serving.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_is_refused_past_the_end_and_on_a_read_only_export() {
    let mut image = export("image", MIB);
    image.read_only = true;
    let exports = [Memory::new(export("vol0", MIB)), Memory::new(image)].map(Arc::new);
    let serving = Serving::start(exports).await;
    for (uri, arguments) in [
        (serving.tcp("vol0"), ["-c", "write 1M 512"]),
        (serving.tcp("vol0"), ["-c", "read 1048575 2"]),
        (serving.unix("image"), ["-c", "write 0 512"]),
    ] {
        let output = run("qemu-io", &[&["-f", "raw", &uri][..], &arguments].concat()).await;
        assert!(!output.status.success(), "{arguments:?}");
    }
    good("qemu-io", &["-r", "-f", "raw", &serving.unix("image"), "-c", "read -P 0 0 1M"]).await;
    serving.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_compares_and_converts() {
    let image = sparse_image(48 * MIB);
    let (same, other) =
        (Memory::new(export("same", 48 * MIB)), Memory::new(export("other", 48 * MIB)));
    same.fill(0, &image);
    other.fill(0, &image);
    other.fill(20 * MIB + 1, &[image[usize::try_from(20 * MIB + 1).unwrap()] ^ 1]);
    let empty = Arc::new(Memory::new(export("empty", 48 * MIB)));
    let serving = Serving::start([Arc::new(same), Arc::new(other), Arc::clone(&empty)]).await;
    let file = serving.file("image.raw", &image);
    let compare = async |one: &str, two: &str| {
        let output = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", one, two]).await;
        output.status.code()
    };
    assert_eq!(compare(&file, &serving.unix("same")).await, Some(0));
    assert_eq!(compare(&file, &serving.tcp("other")).await, Some(1), "control: one byte differs");

    let target = serving.tcp("empty");
    good("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &file, &target]).await;
    assert_eq!(compare(&serving.tcp("same"), &serving.unix("empty")).await, Some(0));
    assert!(empty.allocated() < 36 * MIB, "holes stayed holes: {}", empty.allocated());
    serving.finish().await;
}

/// fio with checksums in what it writes.
async fn fio(uri: &str, arguments: &[&str]) -> Output {
    let uri = format!("--uri={uri}");
    let common = [
        "--name=verify",
        "--ioengine=nbd",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        &uri,
    ];
    run("fio", &[&common[..], arguments].concat()).await
}

/// Mixed sizes, depth 32, each block checked when read back.
#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_what_it_wrote() {
    let memory = Arc::new(Memory::new(export("vol0", 64 * MIB)));
    let serving = Serving::start([Arc::clone(&memory)]).await;
    let mixed = [
        "--rw=randrw",
        "--rwmixwrite=70",
        "--bsrange=512-1M",
        "--bs_unaligned=1",
        "--iodepth=32",
        "--size=48M",
        "--fsync=50",
        "--randseed=7",
    ];
    for uri in [serving.tcp("vol0"), serving.unix("vol0")] {
        let output = fio(&uri, &mixed).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("err= 0"), "{text}");
    }
    let counters = serving.server.counters();
    for operation in [Operation::Read, Operation::Write, Operation::Flush] {
        let totals = counters.operation(operation);
        assert!(totals.requests > 10 && totals.errors == 0, "{operation:?} {totals:?}");
    }

    // Control: a byte changed behind its back is found.
    let (uri, plain) = (serving.tcp("vol0"), ["--bs=4k", "--iodepth=32", "--size=1M"]);
    let written = fio(&uri, &[&plain[..], &["--rw=write", "--do_verify=0"]].concat()).await;
    assert!(written.status.success());
    assert!(fio(&uri, &[&plain[..], &["--rw=read"]].concat()).await.status.success());
    let at = 100 * 4096 + 2000;
    let byte = memory.read(at, 1).await.unwrap();
    let [Segment::Data(byte)] = &byte[..] else { panic!("fio wrote no data: {byte:?}") };
    memory.fill(at, &[byte[0] ^ 1]);
    assert!(!fio(&uri, &[&plain[..], &["--rw=read"]].concat()).await.status.success());
    serving.finish().await;
}

/// libnbd told not to check anything itself, so that the server has to.
const LIBNBD: &str = r#"
import errno, sys
import nbd

def error_of(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return error.errnum
    return None

def opened(uri, structured):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    if structured:
        h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    h.set_strict_mode(0)
    assert h.get_structured_replies_negotiated() == structured
    return h

volume, image = sys.argv[1:3]
for structured in (True, False):
    h = opened(volume, structured)
    size = h.get_size()
    assert error_of(h.pread, 1, size) == errno.EINVAL
    assert error_of(h.pwrite, b"x", size) == errno.ENOSPC
    assert error_of(h.pwrite, b"xy", size - 1) == errno.ENOSPC
    assert error_of(h.zero, 2, size - 1) == errno.ENOSPC
    assert error_of(h.trim, 2, size - 1) == errno.EINVAL
    assert error_of(h.cache, 2, size - 1) == errno.EINVAL
    assert error_of(h.pwrite, b"x", 0, 1 << 15) == errno.EINVAL
    assert error_of(h.flush, nbd.CMD_FLAG_FUA) is None
    assert error_of(h.cache, 1, 0, nbd.CMD_FLAG_FUA) is None
    h.pwrite(b"odd", 4095, nbd.CMD_FLAG_FUA)
    assert h.pread(5, 4094) == b"\0odd\0"
    h.zero(3, 4095, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(5, 4094) == bytes(5)

    # 64 requests at once, answered in any order.
    buffers, cookies = {}, []
    for n in range(64):
        buffer = nbd.Buffer.from_bytearray(bytearray([n]) * 5000)
        cookies.append(h.aio_pwrite(buffer, n * 5000))
    while cookies:
        h.poll(-1)
        cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
    for n in range(64):
        assert h.pread(5000, n * 5000) == bytes([n]) * 5000

    if structured:
        chunks = []
        def chunk(data, offset, status, error):
            chunks.append((offset, len(data), status))
        h.pread_structured(1 << 20, 0, chunk)
        assert sum(length for _, length, _ in chunks) == 1 << 20
        assert chunks[-1][2] == nbd.READ_HOLE, chunks
        chunks.clear()
        h.pread_structured(65536, 290000, chunk, nbd.CMD_FLAG_DF)
        assert chunks == [(290000, 65536, nbd.READ_DATA)], chunks
        extents = []
        def extent(context, offset, entries, error):
            extents.append((context, offset, entries))
        h.block_status(1 << 20, 0, extent, nbd.CMD_FLAG_REQ_ONE)
        assert len(extents) == 1 and len(extents[0][2]) == 2, extents
        text = error_of(h.block_status, 1, size, extent)
        assert text == errno.EINVAL
    else:
        assert not h.can_df()
    h.shutdown()

    h = opened(image, structured)
    assert h.is_read_only()
    assert error_of(h.pwrite, b"x", 0) == errno.EPERM
    assert error_of(h.trim, 1, 0) == errno.EPERM
    assert error_of(h.zero, 1, 0) == errno.EPERM
    assert h.pread(4, 0) == b"kept"
    h.shutdown()
print("done")
"#;

#[tokio::test(flavor = "multi_thread")]
async fn libnbd_gets_the_errors_of_the_protocol_text() {
    let mut info = export("image", MIB);
    info.read_only = true;
    let image = Arc::new(Memory::new(info));
    image.fill(0, b"kept");
    let serving = Serving::start([Arc::new(Memory::new(export("vol0", MIB))), image]).await;
    for uris in
        [[serving.tcp("vol0"), serving.tcp("image")], [serving.unix("vol0"), serving.unix("image")]]
    {
        let output = good(PYTHON, &["-c", LIBNBD, &uris[0], &uris[1]]).await;
        assert_eq!(output.trim(), "done");
    }
    serving.finish().await;
}

/// The one export is also found under no name, as `nbd://host` asks for it.
#[tokio::test(flavor = "multi_thread")]
async fn the_default_export_needs_no_name() {
    let serving = Serving::start([Arc::new(Memory::new(export("filer-a/vol0", 64 * MIB)))]).await;
    let size = good("nbdinfo", &["--size", &serving.tcp("")]).await;
    assert_eq!(size.trim(), (64 * MIB).to_string());
    serving.finish().await;
}
