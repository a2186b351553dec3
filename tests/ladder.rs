//! kill -9 of a real hub between each two steps of the ladder, with sources made by hand: what it
//! has acknowledged it knows after, what it has published it shows, and nobody else is touched.
//!
//! A source by hand stands still where it is told to, so that the kill falls exactly between two
//! steps; under load, where it falls anywhere, `crashes` kills.

#![expect(clippy::wildcard_enum_match_arm, reason = "a test names the messages it wants")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use mirrorhub::nbd::client::Client;
use mirrorhub::record::entry::{Entry, EntryKind};
use mirrorhub::record::marks::Place;
use mirrorhub::record::transfer::{Builder, Transfer, TransferHeader};
use mirrorhub::units::hash::{Root, crc32c};
use mirrorhub::units::ids::{SourceId, VolumeId};
use mirrorhub::units::numbers::{
    ByteCount, CpNumber, Epoch, Generation, SequenceNumber, TransferId, Vbn, VolumeNumber,
};
use mirrorhub::units::policy::Policy;
use mirrorhub::volume::root::hash_reader;
use mirrorhub::wire::message::{
    CpEnd, Frame, Hello, Message, PROTOCOL_VERSION, PartitionFull, Refused, RefusedCode, Updates,
    VolumeOffer, VolumeRoot, WantLog, Welcome,
};
use mirrorhub::wire::updates::Encoder;

use crate::harness::{Cluster, SourceSettings, wait_for};

const VOLUME: VolumeNumber = VolumeNumber(0);
const VOLUME_BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(25);

fn small(count: usize) -> u64 {
    u64::try_from(count).expect("small")
}

/// A source that does one step at a time.
struct Hand {
    name: &'static str,
    id: SourceId,
    generation: u32,
    counter: u64,
    last: Place,
    cp: CpNumber,
    image: Vec<u8>,
    stream: Option<TcpStream>,
}

/// A CP that is told: its number, place and root.
#[derive(Clone, Copy)]
struct Told {
    cp: CpNumber,
    place: Place,
    root: Root,
}

impl Hand {
    fn new(name: &'static str, id: u8) -> Self {
        Self {
            name,
            id: SourceId([id; 16]),
            generation: 0,
            counter: 0,
            last: Place::default(),
            cp: CpNumber(1),
            image: vec![0; usize::try_from(VOLUME_BYTES).expect("small")],
            stream: None,
        }
    }

    fn root(&self) -> Root {
        hash_reader(&self.image[..], ByteCount(VOLUME_BYTES)).expect("a root")
    }

    fn hello(&self) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION,
            name: self.name.parse().expect("a name"),
            source: self.id,
            hub: None,
            generation: Generation { number: self.generation, id: u64::from(self.generation) },
            epoch: Epoch::default(),
            volumes: vec![VolumeOffer {
                number: VOLUME,
                id: VolumeId([7; 16]),
                name: "vol0".parse().expect("a name"),
                size: ByteCount(VOLUME_BYTES),
            }],
            held_after: Place::default().into(),
            last: self.last.into(),
            own_durable: self.last.transfer,
            own_cp: CpNumber(self.cp.0 - 1),
            cp_max: CpNumber(self.cp.0 - 1),
            serving: true,
            policy: Policy::default(),
            connection: 0,
            alone: None,
        }
    }

    /// Connects as after a boot; asks again while the hub puts an older session to rest.
    fn welcomed(&mut self, address: SocketAddr) -> Welcome {
        self.generation += 1;
        self.counter = 0;
        let mut welcome = None;
        wait_for(&format!("{} is welcome", self.name), PATIENCE, || {
            let stream = TcpStream::connect(address).expect("the hub takes connections");
            stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
            stream.set_nodelay(true).expect("nodelay");
            self.stream = Some(stream);
            self.send(&Message::Hello(Box::new(self.hello())), &[]);
            match self.receive().0 {
                Message::Welcome(met) => welcome = Some(met),
                Message::Refused(Refused { code: RefusedCode::Busy, .. }) => {}
                other => panic!("{other:?} instead of Welcome"),
            }
            welcome.is_some()
        });
        welcome.expect("welcome")
    }

    fn send(&mut self, message: &Message, payload: &[u8]) {
        let frame = Frame::new(message, payload.to_vec().into());
        let stream = self.stream.as_mut().expect("connected");
        stream
            .write_all(&frame.head)
            .and_then(|()| stream.write_all(&frame.payload))
            .expect("sent");
    }

    fn receive(&mut self) -> (Message, Vec<u8>) {
        let stream = self.stream.as_mut().expect("connected");
        let mut prefix = [0; 8];
        stream.read_exact(&mut prefix).expect("a frame");
        let length = |at: usize| {
            let word = u32::from_le_bytes(prefix[at..at + 4].try_into().expect("four bytes"));
            usize::try_from(word).expect("small")
        };
        let (mut header, mut payload) = (vec![0; length(0)], vec![0; length(4)]);
        stream.read_exact(&mut header).expect("a header");
        stream.read_exact(&mut payload).expect("a payload");
        (Message::decode(&header, small(payload.len())).expect("a good frame"), payload)
    }

    /// The next message that is no Ack.
    fn other(&mut self) -> (Message, Vec<u8>) {
        loop {
            match self.receive() {
                (Message::Ack(_), _) => {}
                other => return other,
            }
        }
    }

    /// Writes a block, sends it, and waits for its Ack.
    fn put(&mut self, vbn: u64, fill: u8) -> Transfer {
        let data = vec![fill; 4096];
        let offset = vbn * 4096;
        let at = usize::try_from(offset).expect("small");
        self.image[at..at + 4096].copy_from_slice(&data);
        let mut builder = Builder::default();
        let (kind, volume, length, crc) = (EntryKind::Write, VOLUME, 4096, crc32c(&data));
        builder.push(Entry { kind, volume, offset, length, crc }, data.into());
        self.counter += 1;
        let transfer = builder.finish(TransferHeader {
            id: TransferId { generation: self.generation, counter: self.counter },
            cp: self.cp,
            partition: 0,
            first_sequence: SequenceNumber(self.last.sequence.0 + 1),
            previous: self.last.transfer,
            hash_before: self.last.hash,
            own_durable: self.last.transfer,
        });
        self.last = transfer.place();
        self.send(&Message::Transfer, transfer.bytes());
        loop {
            match self.receive().0 {
                Message::Ack(ack) if ack.id == self.last.transfer => return transfer,
                Message::Ack(_) => {}
                other => panic!("{other:?} instead of Ack"),
            }
        }
    }

    /// Tells the CP; what comes behind belongs to the next.
    fn tell(&mut self) -> Told {
        let told = Told { cp: self.cp, place: self.last, root: self.root() };
        self.tell_again(told);
        self.cp = told.cp.next();
        told
    }

    fn tell_again(&mut self, told: Told) {
        let full = PartitionFull {
            cp: told.cp,
            last: told.place.into(),
            base: None,
            replay: false,
            keeps_log: false,
        };
        self.send(&Message::PartitionFull(full), &[]);
    }

    /// Sends the CP's Updates, all by reference, and waits until they are taken.
    fn updates(&mut self, told: Told, blocks: &[(u64, TransferId)]) -> u64 {
        let mut encoder = Encoder::new(65_536);
        blocks.iter().for_each(|&(vbn, id)| encoder.reference(Vbn(vbn), 1, id, 0));
        let payload = encoder.finish();
        self.send(&Message::Updates(Updates { cp: told.cp, volume: VOLUME }), &payload);
        loop {
            match self.receive().0 {
                Message::Ack(ack) if ack.cp_taken > 0 => return small(payload.len()),
                Message::Ack(_) => {}
                other => panic!("{other:?} instead of Ack"),
            }
        }
    }

    fn end(&mut self, told: Told, update_bytes: u64) {
        let roots = vec![VolumeRoot { volume: VOLUME, root: told.root }];
        let place = told.place.into();
        self.send(&Message::CpEnd(CpEnd { cp: told.cp, place, roots, update_bytes }), &[]);
    }

    fn done(&mut self, cp: CpNumber) {
        let (answer, _) = self.other();
        assert!(matches!(&answer, Message::CpDone(done) if done.cp == cp), "{answer:?}");
    }

    /// A whole CP.
    fn checkpoint(&mut self, blocks: &[(u64, TransferId)]) {
        let told = self.tell();
        let bytes = self.updates(told, blocks);
        self.end(told, bytes);
        self.done(told.cp);
    }

    /// The hub's log of this source behind `from`.
    fn log(&mut self, from: Place) -> Vec<Vec<u8>> {
        self.send(&Message::WantLog(WantLog { from: from.into() }), &[]);
        let mut log = Vec::new();
        loop {
            match self.other() {
                (Message::Refill, payload) => log.push(payload),
                (Message::RefillEnd(_), _) => return log,
                (other, _) => panic!("{other:?} instead of the log"),
            }
        }
    }
}

/// The image that the hub serves has that root, and so says its status.
fn check_image(cluster: &Cluster, name: &str, root: Root) {
    let socket = cluster.path("hub").join("nbd.sock");
    let export = format!("{name}/vol0");
    let mut client = Client::unix(&socket, &export, PATIENCE).expect("the image opens");
    let mut image = Vec::new();
    for at in (0..VOLUME_BYTES).step_by(64 << 10) {
        image.extend(client.read(at, 64 << 10).expect("the image is read"));
    }
    let met = hash_reader(&image[..], ByteCount(VOLUME_BYTES)).expect("a root");
    assert_eq!(met, root, "image of {name}");
    let shown = cluster.on_hub(name)["volumes"][0]["root"].clone();
    assert_eq!(shown, root.to_string(), "status of {name}");
}

/// Where the hub is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Acknowledged,
    Drained,
    Told,
    Updates,
    /// CpEnd is sent; whether it was published is not known.
    Ended,
    Done,
}

const STEPS: [Step; 6] =
    [Step::Acknowledged, Step::Drained, Step::Told, Step::Updates, Step::Ended, Step::Done];

/// One CP of `a` that is killed at `step`; afterwards it is published in any case.
fn kill_at(
    cluster: &mut Cluster,
    (step, fill): (Step, u8),
    a: &mut Hand,
    b: &mut Hand,
    of_b: &[Vec<u8>],
) {
    let address = cluster.hub_address();
    let published = (a.cp.0 - 1, a.root());
    let mut blocks = Vec::new();
    for vbn in [0, 3, 200] {
        blocks.push((vbn, a.put(vbn, fill).id()));
    }
    let drained = |cluster: &Cluster| {
        let shown = cluster.on_hub(a.name);
        shown["drained_bytes"] == shown["staged_bytes"] && shown["staged_bytes"] != 0
    };
    if step >= Step::Drained {
        wait_for("drained", PATIENCE, || drained(cluster));
    }
    let mut told = None;
    let mut next = None;
    if step >= Step::Told {
        let it = a.tell();
        told = Some(it);
        next = Some((7, a.put(7, fill).id()));
        if step >= Step::Updates {
            let bytes = a.updates(it, &blocks);
            if step >= Step::Ended {
                a.end(it, bytes);
            }
            if step >= Step::Done {
                a.done(it.cp);
            }
        }
    }
    let acknowledged = a.last;
    cluster.kill_hub();
    cluster.start_hub();

    let welcome = a.welcomed(address);
    assert_eq!(welcome.last, acknowledged.into(), "{step:?}: everything acknowledged");
    let now = welcome.applied_cp.0;
    let told_cp = told.map_or(0, |told| told.cp.0);
    let is_known = match step {
        Step::Done => now == told_cp,
        Step::Ended => now == published.0 || now == told_cp,
        _ => now == published.0,
    };
    assert!(is_known, "{step:?}: CP {now}, it was {} and {told_cp} was told", published.0);
    let shown = told.filter(|told| told.cp.0 == now).map_or(published.1, |told| told.root);
    check_image(cluster, a.name, shown);

    // The other source: all its entries, byte for byte, and its own image.
    assert_eq!(b.welcomed(address).last, b.last.into(), "{step:?}: the other source");
    assert!(b.log(Place::default()) == of_b, "{step:?}: entries of the other source");

    // The CP goes on: the same again, if it was told, then what came behind.
    let it = told.unwrap_or_else(|| a.tell());
    if told.is_some() {
        a.tell_again(it);
    }
    if now != it.cp.0 {
        let bytes = a.updates(it, &blocks);
        a.end(it, bytes);
    }
    a.done(it.cp);
    check_image(cluster, a.name, it.root);
    if let Some(next) = next {
        a.checkpoint(&[next]);
        check_image(cluster, a.name, a.root());
    }
}

#[test]
fn a_hub_killed_between_any_two_steps_keeps_what_it_said() {
    let mut cluster = Cluster::prepare(&[SourceSettings::new("a"), SourceSettings::new("b")]);
    cluster.start_hub();
    let (mut a, mut b) = (Hand::new("a", 0xa1), Hand::new("b", 0xb2));
    a.welcomed(cluster.hub_address());
    b.welcomed(cluster.hub_address());
    let mut of_b = Vec::new();
    let mut blocks = Vec::new();
    for vbn in 0..5 {
        let transfer = b.put(vbn * 11, 0xbb);
        blocks.push((vbn * 11, transfer.id()));
        of_b.push(transfer.bytes().to_vec());
    }
    let first = a.put(100, 1).id();
    a.checkpoint(&[(100, first)]);
    for (step, fill) in STEPS.into_iter().zip(10..) {
        println!("killed at {step:?}");
        kill_at(&mut cluster, (step, fill), &mut a, &mut b, &of_b);
    }
    // After all that the other source publishes what it had sent before the first kill.
    b.checkpoint(&blocks);
    check_image(&cluster, "b", b.root());
    assert!(cluster.stop_hub().success());
}
