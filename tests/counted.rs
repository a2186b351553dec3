//! By reference, counted, not timed: what each CP carries, as both ends count it in their metrics.
//!
//! The log has every block that a client wrote whole, so a CP names it; what the log does not hold
//! whole travels as data; what is zero is a hole. Also here: one order of entries in the log of the
//! hub, and an image that is rebuilt from what was sent, its source dead.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use mirrorhub::control::client::call;
use mirrorhub::control::message::Request;
use mirrorhub::device::file::{Access, FileDevice};
use mirrorhub::nbd::client::Client;
use mirrorhub::nvlog::{Recovered, Ring, RingOptions};
use mirrorhub::record::entry::{Entry, EntryKind};
use mirrorhub::record::envelope::RecordKind;
use mirrorhub::record::marks::Place;
use mirrorhub::record::transfer::{Builder, Transfer, TransferHeader};
use mirrorhub::sourcelog::format::{HEADER_BYTES, Identity, read_identity};
use mirrorhub::sourcelog::{LogOptions, LogStore};
use mirrorhub::units::hash::{StreamHash, crc32c};
use mirrorhub::units::ids::SourceId;
use mirrorhub::units::numbers::{CpNumber, SequenceNumber, TransferId, VolumeNumber};

use crate::harness::{
    BINARY, Cluster, Process, SourceSettings, hash, http_get, metric_sum, run, sum_of, wait_for,
};
use crate::outage::wire_bytes;

const BLOCK: usize = 4096;
const B: u64 = 4096;
const MIB: u64 = 1 << 20;

/// What CPs carried since the start of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Carried {
    references: u64,
    inline: u64,
    holes: u64,
    reference_bytes: u64,
    inline_bytes: u64,
    hole_bytes: u64,
}

impl Carried {
    fn read(url: &str) -> Self {
        let (_, metrics) = http_get(url);
        let blocks = |kind: &str| {
            sum_of(&metrics, &format!("mirrorhub_checkpoint_blocks_total{{kind=\"{kind}\"}}"))
        };
        let bytes = |kind: &str| {
            sum_of(&metrics, &format!("mirrorhub_checkpoint_wire_bytes_total{{kind=\"{kind}\"}}"))
        };
        Self {
            references: blocks("reference"),
            inline: blocks("inline"),
            holes: blocks("hole"),
            reference_bytes: bytes("reference"),
            inline_bytes: bytes("inline"),
            hole_bytes: bytes("hole"),
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            references: self.references - before.references,
            inline: self.inline - before.inline,
            holes: self.holes - before.holes,
            reference_bytes: self.reference_bytes - before.reference_bytes,
            inline_bytes: self.inline_bytes - before.inline_bytes,
            hole_bytes: self.hole_bytes - before.hole_bytes,
        }
    }

    fn blocks(self) -> (u64, u64, u64) {
        (self.references, self.inline, self.holes)
    }
}

/// A cluster of one source, and what its CPs had carried when it was last looked at.
struct Bench {
    cluster: Cluster,
    seen: Carried,
}

impl Bench {
    fn start(settings: SourceSettings) -> Self {
        Self { cluster: Cluster::start(&[settings]), seen: Carried::default() }
    }

    fn client(&self) -> Client {
        connect(&self.cluster.path("filer-a").join("nbd.sock"))
    }

    /// Makes a CP; what it carried, the same on both ends. A CP before it that was made because a
    /// partition was full counts too.
    fn checkpoint(&mut self) -> Carried {
        self.cluster.checkpoint("filer-a");
        let sent = Carried::read(&self.cluster.source_url("filer-a", "/metrics"));
        let taken = Carried::read(&self.cluster.hub_url("/metrics"));
        assert_eq!(sent, taken, "the source counts what the hub counts");
        let carried = sent.since(self.seen);
        self.seen = sent;
        carried
    }

    fn checkpoints(&self) -> u64 {
        let (_, metrics) = http_get(&self.cluster.hub_url("/metrics"));
        sum_of(&metrics, "mirrorhub_source_checkpoints_total{source=\"filer-a\"}")
    }
}

fn connect(socket: &Path) -> Client {
    Client::unix(socket, "filer-a/vol0", Duration::from_secs(30)).expect("the export opens")
}

/// Bytes that are nowhere a block of zeroes.
fn data(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        bytes.extend_from_slice(&(state | 1).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

type Act = fn(&mut Client);

/// Each case with what its CP has to carry: blocks by reference, as data, as holes. They run in
/// this order on one volume; a case may lean on those before it.
const CASES: &[(&str, Act, (u64, u64, u64))] = &[
    ("whole block", |c| write(c, 10 * B, BLOCK), (1, 0, 0)),
    ("partial", |c| write(c, 11 * B + 50, 100), (0, 1, 0)),
    (
        "whole then partial",
        |c| {
            write(c, 12 * B, BLOCK);
            write(c, 12 * B + 7, 9);
        },
        (0, 1, 0),
    ),
    (
        "partial then whole",
        |c| {
            write(c, 13 * B + 7, 9);
            write(c, 13 * B, BLOCK);
        },
        (1, 0, 0),
    ),
    (
        "two partials that make a whole",
        |c| {
            write(c, 14 * B, 1000);
            write(c, 14 * B + 1000, BLOCK - 1000);
        },
        (0, 1, 0),
    ),
    (
        "whole twice",
        |c| {
            write(c, 15 * B, BLOCK);
            c.write(15 * B, &data(BLOCK, 99)).expect("write");
        },
        (1, 0, 0),
    ),
    (
        "write then trim",
        |c| {
            write(c, 16 * B, BLOCK);
            c.trim(16 * B, BLOCK).expect("trim");
        },
        (0, 0, 1),
    ),
    (
        "trim then write",
        |c| {
            c.trim(17 * B, BLOCK).expect("trim");
            write(c, 17 * B, BLOCK);
        },
        (1, 0, 0),
    ),
    ("zeroes as data", |c| c.write(18 * B, &[0; BLOCK]).expect("write"), (0, 0, 1)),
    ("write-zeroes", |c| c.write_zeroes(20 * B, 8 * BLOCK).expect("zeroes"), (0, 0, 8)),
    ("write-zeroes of a part", |c| c.write_zeroes(10 * B + 5, 90).expect("zeroes"), (0, 1, 0)),
    (
        "zeroes over the only data of a block",
        |c| c.write_zeroes(11 * B + 40, 200).expect("zeroes"),
        (0, 0, 1),
    ),
    ("trim ignores its edges", |c| c.trim(14 * B + 100, 2 * BLOCK).expect("trim"), (0, 0, 1)),
    ("last block of the volume", |c| write(c, 64 * MIB - B, BLOCK), (1, 0, 0)),
    ("last bytes of the volume", |c| write(c, 64 * MIB - 3, 3), (0, 1, 0)),
    ("odd alignment", |c| write(c, 40 * B + 1000, 3 * BLOCK), (2, 2, 0)),
    ("three megabytes in one request", |c| write(c, 8 * MIB, 3 << 20), (768, 0, 0)),
    ("three megabytes at an odd place", |c| write(c, 16 * MIB + 1, 3 << 20), (767, 2, 0)),
];

/// Goal: what the hub says it has received is what came over the wire, headers of frames and entries, pings
/// and CPs included. Method: small writes, whose headers cost a fifth and more; the kernel's own count of the
/// connection. Control: the bytes of client data, which are far fewer.
#[test]
fn what_is_received_is_what_came_over_the_wire() {
    let mut bench = Bench::start(SourceSettings::new("filer-a"));
    let counted = |bench: &Bench, series: &str| {
        let (_, page) = http_get(&bench.cluster.hub_url("/metrics"));
        metric_sum(&page, series, "filer-a")
    };
    let (received, staged) =
        ("mirrorhub_source_received_bytes_total", "mirrorhub_source_staged_bytes_total");
    let before = [counted(&bench, received), counted(&bench, staged)];
    let wire = wire_bytes(&bench.cluster);
    let mut client = bench.client();
    for block in 0..300 {
        client.write(block * B, &data(512, block)).expect("a small write");
    }
    bench.checkpoint();
    let wire = wire_bytes(&bench.cluster) - wire;
    let met = counted(&bench, received) - before[0];
    // A ping may come between two looks.
    assert!((met - wire).abs() < wire * 0.01 + 200.0, "{met} received, {wire} came");
    let data = counted(&bench, staged) - before[1];
    assert!(data >= 300.0 * 512.0 && met > data * 1.1, "{met} received for {data} of data");
}

fn write(client: &mut Client, offset: u64, length: usize) {
    client.write(offset, &data(length, offset)).expect("write");
}

#[test]
fn each_case_carries_exactly_its_kind() {
    let mut bench = Bench::start(SourceSettings::new("filer-a"));
    let mut client = bench.client();
    let mut wrong = Vec::new();
    for (name, act, wanted) in CASES {
        act(&mut client);
        let met = bench.checkpoint();
        if met.blocks() != *wanted {
            wrong.push(format!("{name}: {wanted:?} wanted (references, inline, holes), {met:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_images_equal(&bench.cluster);
}

fn assert_images_equal(cluster: &Cluster) {
    let (volume, image) = (cluster.volume("filer-a", "vol0"), cluster.image("filer-a", "vol0"));
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", &volume, &image]));
}

/// Half of the ring is 8 MiB: a request of 12 MiB is cut by the freeze that the full partition
/// makes. Each side's blocks are references all the same.
#[test]
fn a_request_across_the_freeze_is_all_by_reference() {
    let mut bench = Bench::start(SourceSettings::new("filer-a").nvram("16MiB"));
    let mut client = bench.client();
    for (offset, wanted) in [(0, (3072, 0, 0)), (20 * MIB + 512, (3071, 2, 0))] {
        let before = bench.checkpoints();
        write(&mut client, offset, 12 << 20);
        let met = bench.checkpoint();
        let made = bench.checkpoints() - before;
        assert!(made >= 2, "the request lay in {made} CP: the test shows nothing");
        assert_eq!(met.blocks(), wanted, "at {offset}");
    }
    assert_images_equal(&bench.cluster);
}

/// Writes `count` random, distinct blocks, 32 at a time.
fn write_random_blocks(client: &mut Client, count: usize) {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut blocks = std::collections::HashSet::new();
    let mut under_way = 0;
    while blocks.len() < count || under_way > 0 {
        if blocks.len() < count && under_way < 32 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let block = state % (64 * MIB / B);
            if blocks.insert(block) {
                client.submit_write(block * B, &data(BLOCK, block)).expect("write");
                under_way += 1;
            }
        } else {
            client.reply().expect("reply").result.expect("the write is answered");
            under_way -= 1;
        }
    }
}

#[test]
fn a_random_block_costs_twelve_bytes_and_a_sequential_mebibyte_sixty_four() {
    let mut bench = Bench::start(SourceSettings::new("filer-a"));
    let mut client = bench.client();
    write_random_blocks(&mut client, 2000);
    let random = bench.checkpoint();
    assert_eq!(random.blocks(), (2000, 0, 0));
    assert!(random.reference_bytes <= 12 * 2000, "{random:?}");
    assert!(random.reference_bytes > 2000, "a block named by no byte: {random:?}");
    for at in 0..8 {
        write(&mut client, (32 + at) * MIB, 1 << 20);
    }
    let sequential = bench.checkpoint();
    assert_eq!(sequential.blocks(), (2048, 0, 0));
    assert!(sequential.reference_bytes <= 64 * 8, "{sequential:?}");
}

/// The control: with `apply = "inline"` the same counters show that blocks travel again.
#[test]
fn inline_sends_every_block_again() {
    let settings = SourceSettings::new("filer-a").replication("apply = \"inline\"");
    let mut bench = Bench::start(settings);
    let mut client = bench.client();
    write_random_blocks(&mut client, 500);
    let met = bench.checkpoint();
    assert_eq!(met.blocks(), (0, 500, 0));
    assert!(met.inline_bytes >= 4096 * 500, "{met:?}");
    assert_images_equal(&bench.cluster);
}

/// The only source log file of the hub and its identity; the logs are copied, since opening a
/// store of logs tidies its directory up.
fn copied_log(cluster: &Cluster) -> (PathBuf, Identity) {
    let copy = cluster.path("logs-copy");
    run(Command::new("cp").arg("-a").arg(cluster.path("hub/state/logs")).arg(&copy));
    let mut found = Vec::new();
    // Beside the directories of sources lies the name of the hub that they belong to.
    let sources = fs::read_dir(&copy).expect("logs").flatten();
    for source in sources.filter(|entry| entry.path().is_dir()) {
        for log in fs::read_dir(source.path()).expect("logs of a source").flatten() {
            let bytes = fs::read(log.path()).expect("source log");
            let header = bytes.first_chunk::<HEADER_BYTES>().expect("a header");
            found.push(read_identity(header).expect("an identity"));
        }
    }
    assert_eq!(found.len(), 1, "one CP is open, one log lies there: {found:?}");
    (copy, found.remove(0))
}

/// Four connections write `requests` each at once, to the same `places` blocks.
fn write_over_four_connections(socket: &Path, requests: u64, places: u64) {
    let writer = |writer: u64, socket: PathBuf| {
        let mut client = connect(&socket);
        for n in 0..requests {
            let place = (n * 7 + writer * 3) % places;
            let bytes = data(BLOCK + 512, writer << 32 | n);
            client.submit_write(place * B, &bytes).expect("write");
            if n >= 8 {
                client.reply().expect("reply").result.expect("answered");
            }
        }
        for _ in 0..8 {
            client.reply().expect("reply").result.expect("answered");
        }
    };
    std::thread::scope(|scope| {
        for number in 0..4 {
            scope.spawn(move || writer(number, socket.to_owned()));
        }
    });
}

/// The history that a log holds: each transfer joins the one before.
#[derive(Debug, Default, PartialEq)]
struct History {
    place: Place,
    /// Every transfer and the stream hash behind it.
    transfers: Vec<(TransferId, StreamHash)>,
    entries: u64,
    /// The bytes that replaying gives.
    replayed: HashMap<u64, u8>,
}

impl History {
    /// Panics unless the transfer follows: no gap, no repeat, no other history.
    fn follow(&mut self, transfer: &Transfer) {
        let header = *transfer.header();
        assert_eq!(header.previous, self.place.transfer, "the predecessor of {:?}", header.id);
        assert_eq!(header.first_sequence, self.place.sequence.next(), "no gap, no repeat");
        assert_eq!(header.hash_before, self.place.hash, "one history");
        for (entry, bytes) in transfer.iter() {
            assert_eq!(entry.kind, EntryKind::Write);
            self.entries += 1;
            self.replayed.extend((entry.offset..).zip(bytes.iter().copied()));
        }
        self.place = Place {
            transfer: header.id,
            sequence: transfer.last_sequence(),
            hash: transfer.hash_after(),
        };
        self.transfers.push((header.id, self.place.hash));
    }
}

/// The source log of the hub that has stopped.
fn log_of_the_hub(cluster: &Cluster, applied: u64) -> History {
    let (dir, identity) = copied_log(cluster);
    let store =
        LogStore::open(&dir, identity.hub, LogOptions::with_limit(1 << 30)).expect("source logs");
    let applied = CpNumber(u32::try_from(applied).expect("small"));
    store.recover(identity.source, applied).expect("logs recover");
    let reader = store.reader(identity.source, identity.cp).expect("a reader");
    assert!(reader.damage().is_none(), "{:?}", reader.damage());
    let mut history = History { place: reader.start(), ..History::default() };
    for transfer in reader.transfers() {
        history.follow(&transfer.expect("a sound transfer"));
    }
    history
}

/// The NVRAM of the source that was killed: a copy, since opening a ring tidies it up.
fn log_of_the_source(cluster: &Cluster, start: Place) -> History {
    let copy = cluster.path("nvram-copy");
    fs::copy(cluster.path("filer-a/state/nvram"), &copy).expect("the NVRAM");
    let id = cluster.on_hub("filer-a")["id"].as_str().expect("an id").to_owned();
    let id: SourceId = serde_json::from_value(id.into()).expect("an id");
    let device = FileDevice::open(&copy, Access::Direct).expect("the copy opens");
    let mut history = History { place: start, ..History::default() };
    let visit = &mut |record: Recovered| {
        if record.envelope.kind == RecordKind::Transfer {
            history.follow(&Transfer::parse(record.body).expect("a sound transfer"));
        }
    };
    let (_ring, recovery) =
        Ring::open(Arc::new(device), id.0, RingOptions::default(), visit).expect("the ring opens");
    assert_eq!(recovery.damage, [], "nothing in it is rotten");
    history
}

/// Four connections write at once, also to the same blocks. Each log, the source's NVRAM and the
/// hub's source log, holds their entries in sequence order without gap, both the same, and replaying
/// them gives what the volume and the image hold.
#[test]
fn four_connections_lie_in_each_log_in_one_order() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a").nvram("64MiB")]);
    let requests = 600;
    write_over_four_connections(&cluster.path("filer-a").join("nbd.sock"), requests, 200);
    wait_for("everything is drained", Duration::from_secs(20), || {
        let hub = cluster.on_hub("filer-a");
        hub["drained_bytes"] == hub["staged_bytes"]
            && hub["staged_bytes"].as_u64() >= Some(4 * requests * (B + 512))
    });
    let applied = cluster.on_hub("filer-a")["applied_cp"].as_u64().expect("a number");
    cluster.kill_source("filer-a");
    let own = log_of_the_source(&cluster, Place::default());
    assert!(cluster.stop_hub().success());
    let there = log_of_the_hub(&cluster, applied);
    assert_eq!(own.entries, 4 * requests, "every request is one entry");
    assert_eq!(own.transfers, there.transfers, "both logs are one history");
    assert!(own == there, "both logs replay to the same");
    cluster.start_all();
    cluster.checkpoint("filer-a");
    for owner in ["filer-a", "hub"] {
        let mut client = connect(&cluster.path(owner).join("nbd.sock"));
        let met = client.read(0, own.replayed.len()).expect("read");
        let differs = (0..).zip(&met).find(|(at, byte)| own.replayed.get(at) != Some(byte));
        assert_eq!(differs, None, "{owner} holds what the logs replay");
    }
}

/// The negative control: a transfer that is left out, or comes twice, is seen.
#[test]
#[should_panic(expected = "the predecessor of")]
fn a_gap_in_a_history_is_seen() {
    let mut history = History::default();
    let transfers = [1, 2].map(|counter| {
        let mut builder = Builder::default();
        let (length, crc) = (512, crc32c(&[7; 512]));
        let volume = VolumeNumber(0);
        let entry = Entry { kind: EntryKind::Write, volume, offset: 0, length, crc };
        builder.push(entry, vec![7; 512].into());
        builder.finish(TransferHeader {
            id: TransferId { generation: 1, counter },
            cp: CpNumber(1),
            partition: 0,
            first_sequence: SequenceNumber(counter),
            previous: TransferId { generation: 1, counter: counter - 1 },
            hash_before: StreamHash::default(),
            own_durable: TransferId::default(),
        })
    });
    history.follow(&transfers[1]);
}

/// The process walks everything its pool reaches: what it found.
pub fn pool_check(socket: &Path) -> serde_json::Value {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let answer = runtime.expect("a runtime").block_on(async {
        let patience = Some(Duration::from_secs(60));
        call(socket, &Request::PoolCheck {}, patience, &mut |_| {}).await
    });
    answer.expect("it answers")
}

/// The hub walks everything its pool reaches and proves that the rest is free.
fn check_pool(cluster: &Cluster) {
    let answer = pool_check(&cluster.path("hub/state/admin.sock"));
    assert_eq!(answer["sound"], true, "{answer}");
}

/// The source dies the moment CpDone left. The hub alone, restarted, holds the whole image.
#[test]
fn the_image_is_rebuilt_from_what_was_sent() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let content = cluster.path("content.img");
    fs::write(&content, vec![0; 64 << 20]).expect("content");
    {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().write(true).open(&content).expect("content");
        let mut client = connect(&cluster.path("filer-a").join("nbd.sock"));
        for n in 0..300_u64 {
            let (offset, length) = (n * 13 % 60 * MIB + n * 1111, 3000 + 97 * n);
            let bytes = data(usize::try_from(length).expect("small"), n);
            client.write(offset, &bytes).expect("write");
            file.write_all_at(&bytes, offset).expect("content");
        }
    }
    let before = cluster.on_hub("filer-a")["applied_cp"].as_u64().expect("a number");
    let mut ask = Command::new(BINARY);
    ask.args(["checkpoint", "filer-a", "--config"]).arg(cluster.hub_config());
    let _asking = Process::start("checkpoint", cluster.path("checkpoint.log"), &mut ask);
    let url = cluster.hub_url("/api/v1/status");
    let begin = std::time::Instant::now();
    let announced = loop {
        let status: serde_json::Value = serde_json::from_str(&http_get(&url).1).expect("JSON");
        let source = &status["sources"][0];
        if source["applied_cp"].as_u64() > Some(before) {
            cluster.kill_source("filer-a");
            break source["volumes"][0]["root"].as_str().expect("a root").to_owned();
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "no CP within 20 s");
    };
    cluster.kill_hub();
    cluster.start_hub();
    let shown = cluster.on_hub("filer-a");
    assert_eq!(shown["volumes"][0]["root"].as_str(), Some(announced.as_str()));
    check_pool(&cluster);
    let copy = cluster.path("copy.img");
    run(Command::new("nbdcopy").arg("--").arg(cluster.image("filer-a", "vol0")).arg(&copy));
    assert_eq!(hash(&copy), announced, "the root of what is read is the announced one");
    run(Command::new("cmp").arg(&content).arg(&copy));
}
