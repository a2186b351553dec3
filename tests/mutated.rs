//! Thousands of mutated connections, eight at a time, at every door of the processes: the process
//! lives, its other clients keep their rate and p99 within 20 %, memory and descriptors are as
//! before.
//!
//! What a good client feels is taken in windows that alternate (see `harness::windows`). In the
//! quiet ones the same attackers send the same bytes to a listener of the test itself that reads
//! and hangs up: their own work, on the same cores, falls on both kinds of windows.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::crashes::check;
use crate::harness::oracle::{Known, Writer};
use crate::harness::windows::Bystander;
use crate::harness::{
    Cluster, SourceSettings, http_get, is_full, metric_sum, pause, resident_kib, wait_for,
};
use crate::hostile::{PATIENCE, Record, refusals};

/// Attackers at work at the same time.
const AT_ONCE: usize = 8;

/// Connections of one window, and the pause between two volleys of [`AT_ONCE`] of them.
const PER_WINDOW: usize = 96;
const VOLLEY: Duration = Duration::from_millis(40);

/// How long an attacker waits for an answer in the middle.
const ANSWER_MAX: Duration = Duration::from_millis(30);

/// SplitMix64: chance from a seed.
pub struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound).expect("small")).expect("small")
    }

    /// Breaks one to three places of a recorded connection.
    pub fn mutated(&mut self, record: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut parts = record.to_vec();
        for _ in 0..=self.below(3) {
            let part = self.below(parts.len());
            self.mutate(&mut parts[part]);
        }
        parts
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len());
        let end = (at + 1 + self.below(60)).min(bytes.len());
        match self.below(7) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = self.next().to_le_bytes()[0],
            2 => bytes.truncate(at + 1),
            3 if end - at < bytes.len() => drop(bytes.drain(at..end)),
            4 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => {
                let fresh: Vec<u8> = (at..end).map(|_| self.next().to_le_bytes()[0]).collect();
                bytes.splice(at..at, fresh);
            }
            _ => {
                let extreme = [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX, 1 << 20, 0x0010_0001];
                let value = extreme[self.below(extreme.len())].to_le_bytes();
                let end = (at + 4).min(bytes.len());
                bytes[at..end].copy_from_slice(&value[..end - at]);
            }
        }
    }
}

pub fn chance() -> Chance {
    let seed = std::env::var("MIRRORHUB_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(20_261_121);
    println!("MIRRORHUB_SEED={seed}");
    Chance(seed)
}

/// Windows of each kind in one round: 2,000 connections, in the full run 10,000.
pub fn pairs() -> usize {
    if is_full() { 105 } else { 21 }
}

/// A door that is attacked.
#[derive(Debug, Clone)]
enum Door {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

trait Stream: Read + Write {
    fn say_no_more(&self);
    fn patience(&self, limit: Duration);
}

impl Stream for TcpStream {
    fn say_no_more(&self) {
        drop(self.shutdown(Shutdown::Write));
    }

    fn patience(&self, limit: Duration) {
        self.set_read_timeout(Some(limit)).expect("timeout");
    }
}

impl Stream for UnixStream {
    fn say_no_more(&self) {
        drop(self.shutdown(Shutdown::Write));
    }

    fn patience(&self, limit: Duration) {
        self.set_read_timeout(Some(limit)).expect("timeout");
    }
}

impl Door {
    fn open(&self) -> Box<dyn Stream> {
        match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).expect("connections are taken");
                stream.set_nodelay(true).expect("nodelay");
                Box::new(stream)
            }
            Self::Unix(path) => Box::new(UnixStream::connect(path).expect("connections are taken")),
        }
    }

    /// Says that, part by part, each after the first when an answer to the one before has begun,
    /// and reads to the end. The other side may hang up in the middle: its right.
    fn attack(&self, parts: &[Vec<u8>]) -> Vec<u8> {
        let begin = Instant::now();
        let mut stream = self.open();
        let mut heard = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            if at > 0 {
                // A part whose length is broken has no answer: then it goes on without.
                let mut some = [0; 512];
                stream.patience(ANSWER_MAX);
                let count = stream.read(&mut some).unwrap_or(0);
                heard.extend_from_slice(&some[..count]);
            }
            drop(stream.write_all(part));
        }
        stream.say_no_more();
        stream.patience(PATIENCE);
        drop(stream.read_to_end(&mut heard));
        assert!(begin.elapsed() < PATIENCE, "the connection is not ended: {parts:02x?}");
        heard
    }
}

fn swallow(mut stream: impl Stream) {
    let mut some = [0; 512];
    drop(stream.read(&mut some).and_then(|_| stream.write_all(&[0])));
    drop(stream.read_to_end(&mut Vec::new()));
}

/// A listener of the test that reads everything and hangs up. Its threads end with the test.
fn sink(like: &Door, directory: &Path) -> Door {
    match like {
        Door::Tcp(_) => {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let address = listener.local_addr().expect("its address");
            for _ in 0..AT_ONCE {
                let listener = listener.try_clone().expect("listener");
                std::thread::spawn(move || listener.incoming().flatten().for_each(swallow));
            }
            Door::Tcp(address)
        }
        Door::Unix(path) => {
            let name = path.display().to_string().replace('/', "_");
            let path = directory.join(format!("{}.sink", &name[name.len().saturating_sub(30)..]));
            let listener = UnixListener::bind(&path).expect("a socket");
            for _ in 0..AT_ONCE {
                let listener = listener.try_clone().expect("listener");
                std::thread::spawn(move || listener.incoming().flatten().for_each(swallow));
            }
            Door::Unix(path)
        }
    }
}

/// What is said in one connection, in parts that have an answer each.
pub type Parts = Vec<Vec<u8>>;

/// A door and the recorded connections that are broken before it.
struct Target {
    door: Door,
    records: Vec<Parts>,
}

/// [`PER_WINDOW`] connections to each door in volleys of [`AT_ONCE`], one each `pace`; the doors take
/// turns.
fn volleys(doors: &[Door], plays: &[Vec<Parts>], pace: Duration) {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let turn = pace / u32::try_from(doors.len()).expect("few doors");
        // Not in one moment: what eight requests cost that come together is no attack's matter.
        let apart = turn / u32::try_from(AT_ONCE).expect("few attackers");
        for ((door, play), at) in doors.iter().zip(plays).zip(0..) {
            for (attacker, place) in (0..AT_ONCE).zip(0..) {
                scope.spawn(move || {
                    for (volley, parts) in (0..).zip(play.iter().skip(attacker).step_by(AT_ONCE)) {
                        let due = pace * volley + turn * at + apart * place;
                        pause(due.saturating_sub(begin.elapsed()));
                        door.attack(parts);
                    }
                });
            }
        }
    });
}

/// Attacks every target with mutations of its records; a client of `export` must not feel it.
fn attack(cluster: &Cluster, what: &str, (export, pace): (&str, Duration), targets: &[Target]) {
    let chance = RefCell::new(chance());
    let doors: Vec<Door> = targets.iter().map(|target| target.door.clone()).collect();
    let sinks: Vec<Door> = doors.iter().map(|door| sink(door, cluster.dir.path())).collect();
    let mutations = |target: &Target| -> Vec<Parts> {
        let mut chance = chance.borrow_mut();
        let mut one = || {
            let record = chance.below(target.records.len());
            chance.mutated(&target.records[record])
        };
        (0..PER_WINDOW).map(|_| one()).collect()
    };
    let plays = || -> Vec<Vec<Parts>> { targets.iter().map(mutations).collect() };
    let (source, _) = export.split_once('/').expect("a full name");
    let mut bystander = Bystander::start(&cluster.path(source).join("nbd.sock"), export);
    bystander.endures(what, |bystander| {
        for _ in 0..pairs() {
            bystander.quiet(|| volleys(&sinks, &plays(), pace));
            bystander.disturbed(|| volleys(&doors, &plays(), pace));
        }
    });
}

/// What a process holds.
pub struct Held {
    id: u32,
    open: BTreeMap<String, usize>,
    resident_kib: u64,
}

/// What a process has open: how many descriptors of each kind or file.
fn open_files(id: u32) -> BTreeMap<String, usize> {
    let mut open = BTreeMap::new();
    for descriptor in fs::read_dir(format!("/proc/{id}/fd")).expect("descriptors") {
        // One that is closed meanwhile has no name any more.
        let Ok(name) = fs::read_link(descriptor.expect("a descriptor").path()) else { continue };
        let name = name.display().to_string();
        let kind = name.split_once(":[").map_or(&*name, |(kind, _)| kind);
        // A source's log moves from file to file; one that is not synced yet is open.
        let kind = if kind.contains("/logs/") { "source log" } else { kind };
        *open.entry(kind.to_owned()).or_default() += 1;
    }
    open
}

impl Held {
    pub fn by(id: u32) -> Self {
        // At rest: connections that were closed just now may not be gone yet.
        let look = |_| {
            pause(Duration::from_millis(50));
            open_files(id)
        };
        let open = (0..10).map(look).min_by_key(|open| open.values().sum::<usize>());
        Self { id, open: open.expect("some looks"), resident_kib: resident_kib(id) }
    }

    /// As before, 10 s after the last connection.
    pub fn check(&self) {
        let begin = Instant::now();
        while open_files(self.id) != self.open {
            let late = begin.elapsed() > Duration::from_secs(10);
            assert!(!late, "open before {:#?}, now {:#?}", self.open, open_files(self.id));
            pause(Duration::from_millis(50));
        }
        let now = resident_kib(self.id);
        let descriptors: usize = self.open.values().sum();
        println!("{descriptors} descriptors; resident {} -> {now} KiB", self.resident_kib);
        assert!(now < self.resident_kib + (64 << 10));
    }
}

/// Mutations of a whole connection of one source while another one serves good clients.
#[test]
fn mutated_sources_disturb_nobody() {
    // The bystander has a volume of its own: the oracle knows every block of the other.
    let settings = SourceSettings::new("filer-a").volumes(&[("vol0", "64MiB"), ("vol1", "64MiB")]);
    let mut cluster = Cluster::prepare(&[settings, SourceSettings::new("z")]);
    // A mutated CP that gets as far as its roots is refused: that is right here.
    cluster.refusals_wanted = true;
    cluster.start_hub();
    cluster.start_source("filer-a");
    cluster.wait_in_sync("filer-a");
    let socket = cluster.path("filer-a/nbd.sock");
    let writer = Writer::start(socket.clone(), "filer-a/vol0", Known::default(), 1, 3);
    writer.wait_answered(20);
    let known = writer.finish();
    let door = Door::Tcp(cluster.hub_address());
    let whole = Record::new("z").parts();
    // The log that this writes stays open until it is synced.
    wait_for("a transfer of it is drained", PATIENCE, || {
        door.attack(&whole);
        cluster.on_hub("z")["drained_bytes"].as_u64().is_some_and(|bytes| bytes > 0)
    });
    let held = Held::by(cluster.hub_process().id());
    let target = Target { door, records: vec![whole] };
    attack(&cluster, "mutated sources", ("filer-a/vol1", VOLLEY), &[target]);
    assert!(cluster.hub_process().runs());
    held.check();
    check(&mut cluster, "filer-a", &known);
    assert_eq!(cluster.on_hub("z")["applied_cp"], 0, "nothing of it was published");
    let (_, page) = http_get(&cluster.hub_url("/metrics"));
    assert_eq!(metric_sum(&page, "mirrorhub_source_actor_restarts", ""), 0.0, "no actor panicked");
    assert!(refusals(&cluster, "protocol") > 200.0, "control: mutations do break connections");
}

/// Behind the end of every volume here: what would change something there is refused.
const PAST_THE_END: u64 = 1 << 40;
/// Mutated connections beside the measured ones that do change something.
const CHANGING: usize = 400;

/// A whole NBD connection: options, then requests; those that change something begin at `changes`.
fn nbd_record(export: &str, changes: u64) -> Parts {
    let option = |code: u32, payload: &[u8]| {
        let length = u32::try_from(payload.len()).expect("small");
        [b"IHAVEOPT", &code.to_be_bytes()[..], &length.to_be_bytes(), payload].concat()
    };
    let request = |flags: u16, kind: u16, offset: u64, length: u32| {
        [
            &0x2560_9513_u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &77_u64.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat()
    };
    let name_bytes = u32::try_from(export.len()).expect("small").to_be_bytes();
    let go = [&name_bytes[..], export.as_bytes(), &[0, 0]].concat();
    let all = [
        vec![0, 0, 0, 3],
        option(3, &[]),
        option(8, &[]),
        option(7, &go),
        request(0, 0, 4000, 20_000),
        [request(1, 1, changes + 4096, 700), vec![7; 700]].concat(),
        request(0, 6, changes + 100, 9000),
        request(0, 4, changes, 65_536),
        request(0, 7, 0, 1 << 20),
        request(0, 3, 0, 0),
        request(0, 2, 0, 0),
    ];
    vec![all.concat()]
}

/// Mutated NBD connections to the source's and the hub's socket at the same time.
#[test]
fn mutated_nbd_clients_disturb_nobody() {
    let mut cluster = Cluster::start(&[
        SourceSettings::new("filer-a").volumes(&[("vol0", "64MiB"), ("prey", "16MiB")])
    ]);
    cluster.checkpoint("filer-a");
    let door = |socket: &str| Door::Unix(cluster.path(socket));
    let doors = ["filer-a/nbd.sock", "hub/nbd.sock"].map(door);
    let record = nbd_record("filer-a/prey", 0);
    doors[0].attack(&record);
    let ids = [cluster.source_process("filer-a").id(), cluster.hub_process().id()];
    let held = ids.map(Held::by);
    // What is left whole of a change is a durable write, which is load like any other: those that
    // are measured ask for changes that are refused.
    let refused = nbd_record("filer-a/prey", PAST_THE_END);
    let target = |door: &Door| Target { door: door.clone(), records: vec![refused.clone()] };
    let targets = doors.each_ref().map(target);
    attack(&cluster, "mutated NBD clients", ("filer-a/vol0", VOLLEY), &targets);
    let mut chance = chance();
    let plays = doors.each_ref().map(|_| (0..CHANGING).map(|_| chance.mutated(&record)).collect());
    volleys(&doors, &plays, VOLLEY);
    for held in held {
        held.check();
    }
    check(&mut cluster, "filer-a", &Known::default());
}

/// Requests as `mirrorhub` sends them; what would change anything names a source that is not there.
fn admin_records() -> Vec<Parts> {
    let requests = [
        r#"{"command":"status"}"#,
        r#"{"command":"status","source":"filer-a"}"#,
        r#"{"command":"checkpoint","source":"nobody"}"#,
        r#"{"command":"checkpoint","source":"nobody","keep":"name-1"}"#,
        r#"{"command":"kept"}"#,
        r#"{"command":"drop","target":"nobody@name-1"}"#,
        r#"{"command":"verify","target":"nobody/vol0"}"#,
        r#"{"command":"failover","source":"nobody","dry_run":true,"now":true}"#,
        r#"{"command":"failback","source":"nobody","keep":"hub","to":"filer-z"}"#,
        r#"{"command":"forget","source":"nobody"}"#,
        r#"{"command":"config-diff"}"#,
    ];
    requests.map(|request| vec![format!("{request}\n").into_bytes()]).to_vec()
}

/// Mutated requests at the admin sockets of both ends.
#[test]
fn mutated_commands_disturb_nobody() {
    let mut cluster = Cluster::start(&[SourceSettings::new("filer-a")]);
    let targets = ["filer-a/state/admin.sock", "hub/state/admin.sock"]
        .map(|socket| Target { door: Door::Unix(cluster.path(socket)), records: admin_records() });
    let ids = [cluster.source_process("filer-a").id(), cluster.hub_process().id()];
    let socket = cluster.path("filer-a/nbd.sock");
    let writer = Writer::start(socket, "filer-a/vol0", Known::default(), 1, 3);
    writer.wait_answered(20);
    drop(writer.finish());
    for request in admin_records() {
        // Control: what is not broken has an answer, at the end that it belongs to or not.
        let answer = targets[1].door.attack(&request);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.contains("result") || answer.contains("error"), "{answer}");
    }
    let held = ids.map(Held::by);
    attack(&cluster, "mutated commands", ("filer-a/vol0", VOLLEY), &targets);
    for held in held {
        held.check();
    }
    check(&mut cluster, "filer-a", &Known::default());
}
