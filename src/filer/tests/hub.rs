//! A hub in this process for the tests of the engine: the mirror's own machine, a log and images
//! in memory, real frames over real TCP. It can hold back acknowledgements and CPs, and break the
//! connection at a given message.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::link::FrameReader;
use crate::record::entry::EntryKind;
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::session::mirror::{Action, Arrived, Build, Event, Known, Mirror, Outcome};
use crate::units::hash::{Root, StreamHash};
use crate::units::ids::HubId;
use crate::units::numbers::{
    CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::units::policy::Policy;
use crate::volume::root::hash_reader;
use crate::wire::message::{CpEnd, Frame, Message, Ping, Scanned, VolumeRoot, VolumeScan};
use crate::wire::updates::{Decoder, Run, inline_blocks};

type Images = BTreeMap<VolumeNumber, Vec<u8>>;

/// What the hub does to its source.
#[derive(Debug, Default, Clone)]
pub(super) struct Control {
    /// Transfers are staged and not made durable.
    pub(super) hold_acks: bool,
    /// CPs are received and not published.
    pub(super) hold_cps: bool,
    /// The connection breaks when a message of that name came so often.
    pub(super) break_at: Option<(&'static str, u32)>,
    /// Connections are taken and closed.
    pub(super) away: bool,
    /// The next so many CPs are refused.
    pub(super) reject: u32,
    /// Nothing more is read.
    pub(super) deaf: bool,
    /// CPs are refused for lack of room.
    pub(super) no_space: bool,
}

/// What was counted.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Seen {
    pub(super) connections: u64,
    pub(super) references: u64,
    pub(super) inline: u64,
    pub(super) holes: u64,
    pub(super) update_bytes: u64,
    pub(super) published: u64,
    pub(super) replayed: u64,
    pub(super) rejected: u64,
    pub(super) checkpoint_at: CpNumber,
    pub(super) pongs: u64,
}

pub(super) struct State {
    mirror: Mirror,
    pub(super) log: Vec<Transfer>,
    /// Every transfer that ever came, once.
    pub(super) history: Vec<Transfer>,
    pub(super) images: Images,
    work: Images,
    /// A CP is with the applier; updates that came before it wait.
    applying: bool,
    early: Vec<(VolumeNumber, Bytes)>,
    pub(super) control: Control,
    pub(super) seen: Seen,
    /// Frames that came, by the name of their message.
    pub(super) frames: BTreeMap<&'static str, u64>,
    held_acks: Vec<Place>,
    held_end: Option<CpEnd>,
    /// What came behind the pass under way, and whether that sets the log.
    aside: Vec<Transfer>,
    sets_log: bool,
    out: Vec<Frame>,
    close: bool,
    unusable: bool,
}

/// The hub.
#[derive(Clone)]
pub(super) struct Hub {
    state: Arc<Mutex<State>>,
    poke: Arc<Notify>,
    pub(super) address: SocketAddr,
}

fn known() -> Known {
    Known {
        hub: HubId([9; 16]),
        source: None,
        generation: Generation::default(),
        epoch: Epoch::default(),
        volumes: Vec::new(),
        refused: Vec::new(),
        left_out: Vec::new(),
        pinned: Vec::new(),
        applied_cp: CpNumber(0),
        applied: Place::default(),
        roots: Vec::new(),
        failed_over: false,
        cp_max: CpNumber(0),
        policy: None,
        alone: None,
        work: false,
    }
}

impl Hub {
    pub(super) async fn start(log_credit: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            mirror: Mirror::new(known(), Place::default(), log_credit, 2 << 20),
            log: Vec::new(),
            history: Vec::new(),
            images: Images::new(),
            work: Images::new(),
            applying: false,
            early: Vec::new(),
            control: Control::default(),
            seen: Seen::default(),
            frames: BTreeMap::new(),
            held_acks: Vec::new(),
            held_end: None,
            aside: Vec::new(),
            sets_log: false,
            out: Vec::new(),
            close: false,
            unusable: false,
        };
        let state = Arc::new(Mutex::new(state));
        let hub = Self { state, poke: Arc::default(), address };
        let served = hub.clone();
        tokio::spawn(async move {
            // One connection at a time, as a source makes them.
            while let Ok((stream, _)) = listener.accept().await {
                served.serve(stream).await;
            }
        });
        hub
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Changes what it does, and lets go of what it held if it may now.
    pub(super) fn control(&self, change: impl FnOnce(&mut Control)) {
        let mut state = self.lock();
        change(&mut state.control);
        if !state.control.hold_acks {
            for place in std::mem::take(&mut state.held_acks) {
                state.durable(place);
            }
        }
        if !state.control.hold_cps
            && let Some(end) = state.held_end.take()
        {
            state.finish(&end);
        }
        drop(state);
        self.poke.notify_one();
    }

    /// Breaks the connection.
    pub(super) fn hang_up(&self) {
        self.lock().close = true;
        self.poke.notify_one();
    }

    pub(super) fn seen(&self) -> Seen {
        self.lock().seen
    }

    pub(super) fn applied(&self) -> CpNumber {
        self.lock().mirror.known().applied_cp
    }

    pub(super) fn policy(&self) -> Option<Policy> {
        self.lock().mirror.known().policy
    }

    /// Gives that much credit for transfers from now on.
    pub(super) fn credit(&self, bytes: u64) {
        self.lock().step(Event::Credit(bytes), None);
        self.poke.notify_one();
    }

    /// What was sent until now has been taken in by the source.
    pub(super) async fn is_heard(&self) {
        let before = self.seen().pongs;
        let ping = Message::Ping(Ping { sequence: SequenceNumber(0), token: u64::MAX });
        self.lock().send(&ping, Bytes::new());
        self.poke.notify_one();
        super::until("the source has heard", || self.seen().pongs > before).await;
    }

    pub(super) fn want_checkpoint(&self) {
        self.lock().step(Event::WantCheckpoint(1), None);
        self.poke.notify_one();
    }

    async fn serve(&self, stream: TcpStream) {
        {
            let mut state = self.lock();
            state.seen.connections += 1;
            state.close = state.control.away;
            state.out.clear();
        }
        stream.set_nodelay(true).unwrap();
        let (read, mut write) = stream.into_split();
        let mut reader = FrameReader::new(read);
        loop {
            let (out, close, deaf) = {
                let mut state = self.lock();
                (std::mem::take(&mut state.out), state.close, state.control.deaf)
            };
            for frame in out {
                let sent = async {
                    write.write_all(&frame.head).await?;
                    write.write_all(&frame.payload).await
                };
                if sent.await.is_err() {
                    break;
                }
            }
            if close {
                break;
            }
            tokio::select! {
                frame = reader.next(), if !deaf => match frame {
                    Ok((message, payload)) => self.lock().frame(message, payload),
                    Err(_) => break,
                },
                () = self.poke.notified() => {}
            }
        }
        let mut state = self.lock();
        state.early.clear();
        state.step(Event::Disconnected, None);
    }
}

impl State {
    fn frame(&mut self, message: Message, payload: Bytes) {
        if let Some((name, left)) = &mut self.control.break_at
            && *name == message.name()
        {
            *left -= 1;
            if *left == 0 {
                self.control.break_at = None;
                self.close = true;
                return;
            }
        }
        *self.frames.entry(message.name()).or_default() += 1;
        self.seen.pongs += u64::from(matches!(message, Message::Pong(_)));
        if let Message::Hello(hello) = message {
            for offer in &hello.volumes {
                let bytes = usize::try_from(offer.size.0).unwrap();
                self.images.entry(offer.number).or_insert_with(|| vec![0; bytes]);
            }
            self.step(Event::Hello(*hello), None);
        } else if message == Message::Transfer {
            let transfer = Transfer::parse(payload).unwrap();
            let place = transfer.place();
            let arrived = Arrived { header: *transfer.header(), place };
            self.step(Event::Transfer(arrived), Some(Input::Transfer(transfer)));
        } else if let Message::Updates(updates) = message {
            let bytes = u64::try_from(payload.len()).unwrap();
            let event = Event::Updates { cp: updates.cp, bytes };
            self.step(event, Some(Input::Updates(updates.volume, payload)));
        } else {
            self.step(Event::Received(message), None);
        }
    }

    fn step(&mut self, event: Event, input: Option<Input>) {
        for action in self.mirror.step(event) {
            self.act(action, input.as_ref());
        }
    }

    fn send(&mut self, message: &Message, payload: Bytes) {
        self.out.push(Frame::new(message, payload));
    }

    #[expect(clippy::too_many_lines, reason = "one list of what can happen")]
    fn act(&mut self, action: Action, input: Option<&Input>) {
        match action {
            Action::Send(message) => self.send(&message, Bytes::new()),
            Action::Record { .. } => self.step(Event::Recorded, None),
            Action::Stage => {
                let Some(Input::Transfer(transfer)) = input else { panic!("no transfer") };
                self.stage(transfer.clone());
            }
            Action::StageBehind => self.stage_behind(input),
            Action::DropBehind => self.aside.clear(),
            Action::Apply { cp, build, .. } => {
                self.sets_log = build.is_pass() && !self.mirror.keeps_log();
                self.work = self.images.clone();
                self.unusable = false;
                self.applying = true;
                if build == Build::Replay {
                    self.seen.replayed += 1;
                    self.replay(cp);
                }
                for (volume, payload) in std::mem::take(&mut self.early) {
                    self.feed(volume, &payload);
                }
            }
            Action::Feed => {
                let Some(Input::Updates(volume, payload)) = input else { panic!("no updates") };
                if self.applying {
                    self.feed(*volume, payload);
                } else {
                    self.early.push((*volume, payload.clone()));
                }
            }
            Action::Finish(end) if self.control.hold_cps => self.held_end = Some(end),
            Action::Finish(end) => self.finish(&end),
            Action::Abort => {
                let cp = self.mirror.applying().unwrap();
                self.applying = false;
                self.step(Event::Applied { cp, outcome: Outcome::Aborted }, None);
            }
            Action::DropLogs(cp) => self.log.retain(|transfer| transfer.header().cp > cp),
            Action::SendLog { from } => self.send_log(from),
            Action::CheckpointAt { cp, .. } => self.seen.checkpoint_at = cp,
            Action::Joined | Action::Scanned(_) => {}
            Action::Scan { cp, token } => {
                let roots =
                    if cp == self.mirror.known().applied_cp { self.roots() } else { vec![] };
                let scan = |root: &VolumeRoot| VolumeScan {
                    volume: root.volume,
                    root: Some(root.root),
                    blocks_read: 0,
                    bad_blocks: 0,
                };
                let volumes = roots.iter().map(scan).collect();
                let scanned = Scanned { cp, token, volumes, problems: Vec::new() };
                self.send(&Message::Scanned(scanned), Bytes::new());
            }
            Action::Refuse(refused) => {
                self.send(&Message::Refused(refused), Bytes::new());
                self.close = true;
            }
            Action::Close { reason } => {
                // A source that is right breaks no rule of the protocol.
                assert!(reason.contains("stopped"), "hub closed: {reason}");
                self.close = true;
            }
        }
    }

    fn stage_behind(&mut self, input: Option<&Input>) {
        let Some(Input::Transfer(transfer)) = input else { panic!("no transfer") };
        self.aside.push(transfer.clone());
        let bytes = u64::try_from(transfer.bytes().len()).unwrap();
        self.step(Event::BehindWritten(transfer.place(), bytes), None);
    }

    fn stage(&mut self, transfer: Transfer) {
        let place = transfer.place();
        self.history.push(transfer.clone());
        self.log.push(transfer);
        if self.control.hold_acks {
            self.held_acks.push(place);
        } else {
            self.durable(place);
        }
    }

    fn durable(&mut self, place: Place) {
        self.step(Event::Durable(place), None);
        self.step(Event::Drained(place), None);
    }

    fn send_log(&mut self, from: Place) {
        let behind: Vec<_> = self
            .log
            .iter()
            .filter(|t| t.header().first_sequence > from.sequence)
            .cloned()
            .collect();
        let joins = behind.first().is_none_or(|first| {
            first.header().previous == from.transfer && first.header().hash_before == from.hash
        });
        if !joins {
            self.step(Event::LogSent(None), None);
            return;
        }
        let mut last = from;
        for transfer in behind {
            last = transfer.place();
            self.send(&Message::Refill, transfer.bytes().clone());
        }
        self.step(Event::LogSent(Some(last)), None);
    }

    fn feed(&mut self, volume: VolumeNumber, payload: &[u8]) {
        self.lay(volume, payload);
        self.step(Event::UpdatesTaken(u64::try_from(payload.len()).unwrap()), None);
    }

    fn lay(&mut self, volume: VolumeNumber, payload: &[u8]) {
        self.seen.update_bytes += u64::try_from(payload.len()).unwrap();
        let image = self.work.get_mut(&volume).unwrap();
        let blocks = u64::try_from(image.len() / 4096).unwrap();
        let mut put = |vbn: u64, block: &[u8]| {
            let at = usize::try_from(vbn).unwrap() * 4096;
            image[at..at + 4096].copy_from_slice(block);
        };
        for run in Decoder::new(payload, blocks) {
            match run.unwrap() {
                Run::Reference { vbn, count, transfer, ordinal } => {
                    self.seen.references += count;
                    let first = self.log.iter().position(|held| held.id() == transfer);
                    let Some(mut at) = first else {
                        self.unusable = true;
                        continue;
                    };
                    let mut ordinal = ordinal;
                    for n in 0..count {
                        while ordinal == self.log[at].ordinals() {
                            (at, ordinal) = (at + 1, 0);
                        }
                        put(vbn.0 + n, self.log[at].block(ordinal).unwrap());
                        ordinal += 1;
                    }
                }
                Run::Inline { vbn, count, blocks } => {
                    self.seen.inline += count;
                    for (n, (_, block)) in (0..).zip(inline_blocks(blocks)) {
                        put(vbn.0 + n, block);
                    }
                }
                Run::Hole { vbn, count } => {
                    self.seen.holes += count;
                    (0..count).for_each(|n| put(vbn.0 + n, &[0; 4096]));
                }
            }
        }
    }

    /// The entries of the log, byte by byte.
    fn replay(&mut self, cp: CpNumber) {
        for transfer in self.log.iter().filter(|transfer| transfer.header().cp <= cp) {
            for (entry, data) in transfer.iter() {
                let image = self.work.get_mut(&entry.volume).unwrap();
                let range =
                    usize::try_from(entry.offset).unwrap()..usize::try_from(entry.end()).unwrap();
                match entry.kind {
                    EntryKind::Write => image[range].copy_from_slice(data),
                    EntryKind::Trim | EntryKind::Zeroes => image[range].fill(0),
                }
            }
        }
    }

    fn finish(&mut self, end: &CpEnd) {
        let met: Vec<(VolumeNumber, Root)> =
            self.work.iter().map(|(volume, image)| (*volume, root(image))).collect();
        let announced: Vec<_> = end.roots.iter().map(|root| (root.volume, root.root)).collect();
        self.applying = false;
        let refuse = std::mem::take(&mut self.control.reject);
        self.control.reject = refuse.saturating_sub(1);
        let outcome = if self.control.no_space {
            self.seen.rejected += 1;
            Outcome::NoSpace
        } else if met == announced && !self.unusable && refuse == 0 {
            self.images = std::mem::take(&mut self.work);
            self.seen.published += 1;
            Outcome::Published(met)
        } else {
            self.seen.rejected += 1;
            Outcome::Rejected { differs: None, reason: "roots differ".to_owned() }
        };
        let aside = std::mem::take(&mut self.aside);
        if self.sets_log && matches!(outcome, Outcome::Published(_)) {
            let last = aside.last().map_or(end.place.into(), Transfer::place);
            self.step(Event::LogSet(last, last), None);
            self.log = aside;
        }
        self.step(Event::Applied { cp: end.cp, outcome }, None);
    }

    fn roots(&self) -> Vec<VolumeRoot> {
        let root_of = |(volume, image): (&VolumeNumber, &Vec<u8>)| VolumeRoot {
            volume: *volume,
            root: root(image),
        };
        self.images.iter().map(root_of).collect()
    }

    /// The line of all transfers that ever came: each follows the one before.
    pub(super) fn assert_line(&self) {
        let (mut id, mut hash, mut sequence) = (TransferId::NONE, StreamHash::ZERO, 1);
        for transfer in &self.history {
            let header = transfer.header();
            assert_eq!((header.previous, header.hash_before), (id, hash));
            assert_eq!(header.first_sequence.0, sequence);
            (id, hash) = (header.id, transfer.hash_after());
            sequence = transfer.last_sequence().0 + 1;
        }
    }
}

enum Input {
    Transfer(Transfer),
    Updates(VolumeNumber, Bytes),
}

pub(super) fn root(image: &[u8]) -> Root {
    let size = crate::units::numbers::ByteCount(u64::try_from(image.len()).unwrap());
    hash_reader(image, size).unwrap()
}
