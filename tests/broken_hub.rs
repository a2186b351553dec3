//! Hubs that speak broken to the sources that dial them: no source dies of it or stands still, its
//! clients do not feel it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mirrorhub::nbd::client::Client;
use mirrorhub::record::marks::Place;
use mirrorhub::record::transfer::Transfer;
use mirrorhub::units::numbers::{CpNumber, SequenceNumber, TransferId};
use mirrorhub::wire::message::{
    Ack, CpDone, CpRejected, Going, Message, PROTOCOL_VERSION, Ping, RefillEnd, Scan,
    WantCheckpoint,
};

use crate::harness::windows::Bystander;
use crate::harness::{Cluster, SourceSettings, http_get, metric_sum, pause, wait_for};
use crate::hostile::{PATIENCE, bytes_of, hello_of, next_connection, read_message, tell, welcome};
use crate::mutated::{Chance, Held, Parts, chance, pairs};

/// A hub that says what a hub says, broken: it listens where eight sources dial.
struct BrokenHub {
    listener: TcpListener,
    hostile: AtomicBool,
    stop: AtomicBool,
    chance: Mutex<Chance>,
    /// Connections that heard something broken, by source.
    heard: Mutex<BTreeMap<String, usize>>,
}

/// How long the broken hub keeps still before it says what is broken: over `hub_timeout` of the
/// sources, so that they count the connection as one that lasted and dial again soon.
const STILL: Duration = Duration::from_millis(110);

impl BrokenHub {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            match self.listener.accept() {
                Ok((stream, _)) => drop(self.converse(stream)),
                Err(_) => pause(Duration::from_millis(2)),
            }
        }
    }

    /// One connection: Welcome, and after a while what is broken, or nothing.
    fn converse(&self, mut stream: TcpStream) -> Option<()> {
        stream.set_nonblocking(false).expect("stream");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let Some((Message::Hello(hello), _)) = read_message(&mut stream) else { return None };
        let hostile = self.hostile.load(Ordering::Relaxed);
        let welcome = bytes_of(&welcome(&hello, PROTOCOL_VERSION), &[]);
        // A broken Welcome may end a source for good, and rightly: what is in it decides. So only
        // the last two hear some, and not the one whose client is measured.
        let whole = hello.name.as_str() < "filer-g" || self.chance().below(4) > 0;
        let said =
            if whole || !hostile { welcome } else { self.chance().mutated(&[welcome]).concat() };
        stream.write_all(&said).ok()?;
        let begin = Instant::now();
        let mut last = TransferId { generation: hello.generation.number, counter: 1 };
        while let Some(left) = STILL.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
            stream.set_read_timeout(Some(left)).expect("timeout");
            let Some((message, payload)) = read_message(&mut stream) else { break };
            if message == Message::Transfer {
                last = Transfer::parse(payload.into()).expect("a good transfer").id();
            }
        }
        if hostile {
            let record = of_a_hub(last);
            let said = self.chance().mutated(&record);
            *self.heard.lock().expect("no panic").entry(hello.name.to_string()).or_default() += 1;
            stream.write_all(&said.concat()).ok()?;
            drop(stream.shutdown(Shutdown::Write));
            // Read, not reset: the source shall hear all of it.
            stream.set_read_timeout(Some(STILL)).expect("timeout");
            drop(stream.read_to_end(&mut Vec::new()));
        }
        Some(())
    }

    fn chance(&self) -> std::sync::MutexGuard<'_, Chance> {
        self.chance.lock().expect("no panic")
    }
}

/// What a hub says behind Welcome, one frame a part.
fn of_a_hub(last: TransferId) -> Parts {
    let place = Place { transfer: last, ..Place::default() };
    let cp = CpNumber(1);
    let rejected = CpRejected { cp, differs: None, reason: "made up".to_owned(), no_space: true };
    [
        Message::Ping(Ping { sequence: SequenceNumber(0), token: 3 }),
        Message::Ack(Ack { id: last, log_credit: 4 << 20, cp_taken: 0 }),
        Message::WantCheckpoint(WantCheckpoint { token: 4 }),
        Message::Scan(Scan { cp, token: 5 }),
        Message::CpRejected(rejected),
        Message::RefillEnd(RefillEnd { last: place.into() }),
        Message::CpDone(CpDone { cp }),
        Message::Going(Going { reason: "made up for a test".to_owned() }),
    ]
    .iter()
    .map(|message| bytes_of(message, &[]))
    .collect()
}

/// Eight sources dial a hub that speaks broken: the clients of a source do not feel what its hub
/// says, and no source dies of it. They are served without the hub (`async`): what a hub can do to
/// a client that waits for its word is in `hostile::no_lie_of_a_hub_acknowledges_a_write`.
#[test]
fn mutated_hubs_disturb_no_client_of_a_source() {
    let names: Vec<String> = ('a'..='h').map(|letter| format!("filer-{letter}")).collect();
    let settings: Vec<SourceSettings> = names
        .iter()
        .map(|name| {
            let settings = SourceSettings::new(name).volumes(&[("vol0", "16MiB")]);
            let policy = "mode = \"async\"\nhub_timeout = \"100ms\"\n";
            settings.nvram("16MiB").pool("256MiB").replication(policy)
        })
        .collect();
    let mut cluster = Cluster::prepare(&settings);
    cluster.refusals_wanted = true;
    let listener = TcpListener::bind(cluster.hub_address()).expect("the hub's port");
    listener.set_nonblocking(true).expect("listener");
    let hub = BrokenHub {
        listener,
        hostile: AtomicBool::new(false),
        stop: AtomicBool::new(false),
        chance: Mutex::new(chance()),
        heard: Mutex::default(),
    };
    for name in &names {
        cluster.start_source(name);
    }
    std::thread::scope(|scope| {
        for _ in 0..2 * names.len() {
            scope.spawn(|| hub.run());
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            under_a_broken_hub(&mut cluster, &hub, &names);
        }));
        hub.stop.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn under_a_broken_hub(cluster: &mut Cluster, hub: &BrokenHub, names: &[String]) {
    let socket = cluster.path("filer-a/nbd.sock");
    wait_for("filer-a serves", PATIENCE, || {
        Client::unix(&socket, "filer-a/vol0", PATIENCE).is_ok()
    });
    // Without a session a socket less is open: it is counted with one.
    let held = Held::by(cluster.source_process("filer-a").id());
    let mut bystander = Bystander::start(&socket, "filer-a/vol0");
    let window = Duration::from_secs(1);
    bystander.endures("mutated hubs", |bystander| {
        for _ in 0..pairs() / 2 {
            bystander.quiet(|| pause(window));
            hub.hostile.store(true, Ordering::Relaxed);
            bystander.disturbed(|| pause(window));
            hub.hostile.store(false, Ordering::Relaxed);
        }
    });
    drop(bystander);
    let heard = hub.heard.lock().expect("no panic").clone();
    println!("broken connections heard: {heard:?}");
    held.check();
    for name in names {
        assert!(cluster.source_process(name).runs(), "{name} has died");
        let own = cluster.own_status(name);
        println!("{name}: {} {}", own["state"], own["reason"]);
    }
    assert!(heard.values().sum::<usize>() > 200, "control: few have heard anything: {heard:?}");
}

/// A CP that is done without the hub in the moment in which a connection ends is done: its room is
/// free, and the client goes on.
#[test]
fn a_source_does_not_stand_still_behind_a_broken_word() {
    let policy = "hub_timeout = \"1s\"\n";
    let settings = SourceSettings::new("filer-a").volumes(&[("vol0", "16MiB")]).nvram("16MiB");
    let settings = settings.interval("200ms").replication(policy);
    let mut cluster = Cluster::prepare(&[settings]);
    let listener = TcpListener::bind(cluster.hub_address()).expect("the hub's port");
    cluster.start_source("filer-a");
    let mut stream = next_connection(&listener);
    let hello = hello_of(&mut stream);
    tell(&mut stream, &welcome(&hello, PROTOCOL_VERSION));
    let socket = cluster.path("filer-a/nbd.sock");
    wait_for("it serves", PATIENCE, || Client::unix(&socket, "filer-a/vol0", PATIENCE).is_ok());
    let mut client = Client::unix(&socket, "filer-a/vol0", PATIENCE).expect("the volume");
    let metric = |cluster: &Cluster| {
        let (_, page) = http_get(&cluster.source_url("filer-a", "/metrics"));
        metric_sum(&page, "mirrorhub_source_checkpoints_total", "")
    };
    // Nobody answers, and nobody lets it wait for a Welcome.
    drop((stream, listener));
    // Alone: CPs of which the hub has nothing, so that the logs do not join any more.
    for at in 0..4 {
        let before = metric(&cluster);
        client.write(at * 4096, &[1; 4096]).expect("alone");
        wait_for("a CP alone", PATIENCE, || metric(&cluster) > before);
    }
    let listener = TcpListener::bind(cluster.hub_address()).expect("the hub's port");
    for round in 0..3 {
        let mut stream = next_connection(&listener);
        let hello = hello_of(&mut stream);
        tell(&mut stream, &welcome(&hello, PROTOCOL_VERSION));
        // A pass is on its way, and a CP is made during it, which waits for its end.
        let passes = || matches!(read_message(&mut stream), Some((Message::CpEnd(_), _)));
        assert!(std::iter::repeat_with(passes).take(1000).any(|ended| ended), "no pass");
        let own = cluster.own_status("filer-a")["volumes"][0]["root"].clone();
        client.write((5 + round) * 4096, &[2; 4096]).expect("during the pass");
        let begin = Instant::now();
        while cluster.own_status("filer-a")["volumes"][0]["root"] == own {
            assert!(begin.elapsed() < PATIENCE, "no CP during the pass");
            tell(&mut stream, &Message::Ping(Ping { sequence: SequenceNumber(0), token: 3 }));
        }
        tell(&mut stream, &Message::CpDone(CpDone { cp: CpNumber(4_000_000) }));
        while read_message(&mut stream).is_some() {}
    }
    drop(listener);
    // Four times the NVRAM.
    for at in 0..256 {
        client.write(at % 64 * (256 << 10), &[3; 256 << 10]).expect("it stands still");
    }
}
