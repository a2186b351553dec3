//! A source made by hand: speaks the wire exactly as told, so that each step can be looked at.

use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::link::{FrameReader, Outgoing};
use crate::record::entry::{Entry, EntryKind};
use crate::record::marks::Place;
use crate::record::transfer::{Builder, Transfer, TransferHeader};
use crate::units::convert::to_u64;
use crate::units::hash::{Root, crc32c};
use crate::units::ids::{SourceId, VolumeId};
use crate::units::numbers::{
    ByteCount, CpNumber, Epoch, Generation, SequenceNumber, TransferId, Vbn, VolumeNumber,
};
use crate::units::policy::Policy;
use crate::volume::root::hash_reader;
use crate::wire::message::{
    Ack, CpEnd, Frame, Hello, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, PartitionFull,
    Updates, VolumeOffer, VolumeRoot, Welcome,
};
use crate::wire::updates::Encoder;

/// Size of the one volume.
pub const VOLUME_BYTES: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// A source by hand with one volume.
#[derive(Debug)]
pub struct Fake {
    pub name: String,
    pub id: SourceId,
    pub generation: Generation,
    /// What the volume holds.
    pub image: Vec<u8>,
    pub last: Place,
    pub cp: CpNumber,
    pub counter: u64,
    pub policy: Policy,
    link: Option<(FrameReader<OwnedReadHalf>, OwnedWriteHalf)>,
}

impl Fake {
    pub fn new(name: &str) -> Self {
        let mut id = [0; 16];
        id[..name.len()].copy_from_slice(name.as_bytes());
        Self {
            name: name.to_owned(),
            id: SourceId(id),
            generation: Generation { number: 1, id: 11 },
            image: vec![0; VOLUME_BYTES],
            last: Place::default(),
            cp: CpNumber(1),
            counter: 0,
            policy: Policy::default(),
            link: None,
        }
    }

    /// The same source after a restart, without a connection.
    pub fn twin(&self) -> Self {
        let number = self.generation.number + 1;
        Self {
            name: self.name.clone(),
            id: self.id,
            generation: Generation { number, ..self.generation },
            image: self.image.clone(),
            last: self.last,
            cp: self.cp,
            counter: 0,
            policy: self.policy,
            link: None,
        }
    }

    pub fn hello(&self) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION_MIN,
            name: self.name.parse().unwrap(),
            source: self.id,
            hub: None,
            generation: self.generation,
            epoch: Epoch::default(),
            volumes: vec![VolumeOffer {
                number: VolumeNumber(0),
                id: VolumeId([7; 16]),
                name: "vol0".parse().unwrap(),
                size: ByteCount(to_u64(VOLUME_BYTES)),
            }],
            held_after: Place::default().into(),
            last: self.last.into(),
            own_durable: self.last.transfer,
            // Its own commit goes before CpEnd (R6), so it has what the hub may have published.
            own_cp: self.cp,
            cp_max: CpNumber(self.cp.0 - 1),
            serving: true,
            policy: self.policy,
            connection: 0,
            alone: None,
        }
    }

    /// Connects and says Hello; what the hub answers first.
    pub async fn connect(&mut self, address: std::net::SocketAddr) -> Message {
        let hello = self.hello();
        self.connect_with(address, hello).await
    }

    pub async fn connect_with(&mut self, address: std::net::SocketAddr, hello: Hello) -> Message {
        let stream = TcpStream::connect(address).await.unwrap();
        self.say_hello(stream, hello).await.expect("an answer to Hello")
    }

    /// Says Hello on a connection; nothing if the hub closes it.
    pub async fn say_hello(&mut self, stream: TcpStream, hello: Hello) -> Option<Message> {
        stream.set_nodelay(true).unwrap();
        let (read, write) = stream.into_split();
        self.link = Some((FrameReader::new(read), write));
        let said = self.try_send(&Message::Hello(Box::new(hello)), Bytes::new()).await;
        if said { self.receive().await } else { None }
    }

    pub async fn welcomed(&mut self, address: std::net::SocketAddr) -> Welcome {
        match self.connect(address).await {
            Message::Welcome(welcome) => welcome,
            other => panic!("{other:?} instead of Welcome"),
        }
    }

    pub async fn send(&mut self, message: &Message, payload: Bytes) {
        assert!(self.try_send(message, payload).await, "the hub has closed");
    }

    /// Sends; false if the hub has closed.
    pub async fn try_send(&mut self, message: &Message, payload: Bytes) -> bool {
        let (_, write) = self.link.as_mut().unwrap();
        let mut outgoing = Outgoing::default();
        outgoing.push(Frame::new(message, payload));
        while !outgoing.is_empty() {
            if outgoing.write_some(write).await.is_err() {
                return false;
            }
        }
        true
    }

    /// The next message, or `None` when the hub has closed.
    pub async fn receive(&mut self) -> Option<Message> {
        let (reader, _) = self.link.as_mut().unwrap();
        let next = tokio::time::timeout(PATIENCE, reader.next()).await.expect("an answer in time");
        next.ok().map(|(message, _)| message)
    }

    /// Waits for an acknowledgement of everything sent.
    pub async fn acked(&mut self) -> Ack {
        loop {
            match self.receive().await.expect("an Ack") {
                Message::Ack(ack) if ack.id == self.last.transfer => return ack,
                Message::Ack(_) => {}
                other => panic!("{other:?} instead of Ack"),
            }
        }
    }

    /// The next message that is no Ack.
    pub async fn other(&mut self) -> Option<Message> {
        loop {
            match self.receive().await {
                Some(Message::Ack(_)) => {}
                other => return other,
            }
        }
    }

    /// Forms a transfer of one write of whole blocks.
    pub fn write(&mut self, vbn: u64, fill: u8, blocks: usize) -> Transfer {
        let data = Bytes::from(vec![fill; blocks * 4096]);
        let offset = usize::try_from(vbn).unwrap() * 4096;
        self.image[offset..offset + data.len()].copy_from_slice(&data);
        let mut builder = Builder::default();
        let entry = Entry {
            kind: EntryKind::Write,
            volume: VolumeNumber(0),
            offset: vbn * 4096,
            length: u32::try_from(data.len()).unwrap(),
            crc: crc32c(&data),
        };
        builder.push(entry, data);
        self.counter += 1;
        let transfer = builder.finish(TransferHeader {
            id: TransferId { generation: self.generation.number, counter: self.counter },
            cp: self.cp,
            partition: 0,
            first_sequence: SequenceNumber(self.last.sequence.0 + 1),
            previous: self.last.transfer,
            hash_before: self.last.hash,
            own_durable: self.last.transfer,
        });
        self.last = transfer.place();
        transfer
    }

    /// Forms a transfer of these entries: kind, offset, and the data or as many zeroes.
    pub fn entries(&mut self, entries: &[(EntryKind, u64, Vec<u8>)]) -> Transfer {
        let mut builder = Builder::default();
        for (kind, offset, data) in entries {
            let start = usize::try_from(*offset).unwrap();
            self.image[start..start + data.len()].copy_from_slice(data);
            let length = u32::try_from(data.len()).unwrap();
            let (crc, data) = match kind {
                EntryKind::Write => (crc32c(data), Bytes::copy_from_slice(data)),
                EntryKind::Trim | EntryKind::Zeroes => (0, Bytes::new()),
            };
            let volume = VolumeNumber(0);
            builder.push(Entry { kind: *kind, volume, offset: *offset, length, crc }, data);
        }
        self.counter += 1;
        let transfer = builder.finish(TransferHeader {
            id: TransferId { generation: self.generation.number, counter: self.counter },
            cp: self.cp,
            partition: 0,
            first_sequence: SequenceNumber(self.last.sequence.0 + 1),
            previous: self.last.transfer,
            hash_before: self.last.hash,
            own_durable: self.last.transfer,
        });
        self.last = transfer.place();
        transfer
    }

    /// A whole CP without updates: the hub applies its log.
    pub async fn checkpoint_by_replay(&mut self) -> Message {
        let full = PartitionFull {
            cp: self.cp,
            last: self.last.into(),
            base: None,
            replay: true,
            keeps_log: false,
        };
        self.send(&Message::PartitionFull(full), Bytes::new()).await;
        let end = self.end(0, self.root());
        self.send(&end, Bytes::new()).await;
        let answer = self.other().await.expect("an answer to CpEnd");
        if matches!(answer, Message::CpDone(_)) {
            self.cp = self.cp.next();
        }
        answer
    }

    pub async fn send_transfer(&mut self, transfer: &Transfer) {
        self.send(&Message::Transfer, transfer.bytes().clone()).await;
    }

    /// Writes a block and sends it.
    pub async fn put(&mut self, vbn: u64, fill: u8) -> TransferId {
        let transfer = self.write(vbn, fill, 1);
        self.send_transfer(&transfer).await;
        transfer.id()
    }

    pub fn root(&self) -> Root {
        hash_reader(&self.image[..], ByteCount(to_u64(self.image.len()))).unwrap()
    }

    /// Sends PartitionFull and the updates, by reference; not the end.
    pub async fn updates(&mut self, references: &[(u64, TransferId)]) -> u64 {
        let full = PartitionFull {
            cp: self.cp,
            last: self.last.into(),
            base: None,
            replay: false,
            keeps_log: false,
        };
        self.send(&Message::PartitionFull(full), Bytes::new()).await;
        let mut encoder = Encoder::new(65_536);
        for &(vbn, transfer) in references {
            encoder.reference(Vbn(vbn), 1, transfer, 0);
        }
        let payload = encoder.finish();
        let bytes = to_u64(payload.len());
        let updates = Updates { cp: self.cp, volume: VolumeNumber(0) };
        self.send(&Message::Updates(updates), payload.into()).await;
        bytes
    }

    pub fn end(&self, update_bytes: u64, root: Root) -> Message {
        Message::CpEnd(CpEnd {
            cp: self.cp,
            place: self.last.into(),
            roots: vec![VolumeRoot { volume: VolumeNumber(0), root }],
            update_bytes,
        })
    }

    /// A whole CP of these references.
    pub async fn checkpoint(&mut self, references: &[(u64, TransferId)]) -> Message {
        let bytes = self.updates(references).await;
        let end = self.end(bytes, self.root());
        self.send(&end, Bytes::new()).await;
        let answer = self.other().await.expect("an answer to CpEnd");
        if matches!(answer, Message::CpDone(_)) {
            self.cp = self.cp.next();
        }
        answer
    }

    /// Says nothing more, and hears the hub out until it has closed; what it said last.
    pub async fn half_close(&mut self) -> Vec<Message> {
        let (mut reader, mut write) = self.link.take().unwrap();
        tokio::io::AsyncWriteExt::shutdown(&mut write).await.unwrap();
        let mut heard = Vec::new();
        while let Ok((message, _)) = reader.next().await {
            heard.push(message);
        }
        heard
    }

    /// The next frame, with its payload.
    pub async fn frame(&mut self) -> Option<(Message, Bytes)> {
        let (reader, _) = self.link.as_mut().unwrap();
        let next = tokio::time::timeout(PATIENCE, reader.next()).await.expect("a frame in time");
        next.ok()
    }

    /// PartitionFull and one frame of Updates; its bytes.
    pub async fn updates_with(&mut self, fill: impl FnOnce(&mut Encoder)) -> u64 {
        let full = PartitionFull {
            cp: self.cp,
            last: self.last.into(),
            base: None,
            replay: false,
            keeps_log: false,
        };
        self.send(&Message::PartitionFull(full), Bytes::new()).await;
        let mut encoder = Encoder::new(1 << 20);
        fill(&mut encoder);
        let payload = encoder.finish();
        let bytes = to_u64(payload.len());
        let updates = Updates { cp: self.cp, volume: VolumeNumber(0) };
        self.send(&Message::Updates(updates), payload.into()).await;
        bytes
    }

    /// A whole CP with those Updates.
    pub async fn checkpoint_with(&mut self, fill: impl FnOnce(&mut Encoder)) -> Message {
        let bytes = self.updates_with(fill).await;
        let end = self.end(bytes, self.root());
        self.send(&end, Bytes::new()).await;
        let answer = self.other().await.expect("an answer to CpEnd");
        if matches!(answer, Message::CpDone(_)) {
            self.cp = self.cp.next();
        }
        answer
    }
}
