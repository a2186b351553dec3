//! The life of one simulated source.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use mirrorhub::link::{FrameReader, LinkError, Outgoing};
use mirrorhub::record::marks::Place;
use mirrorhub::record::transfer::{Builder, TransferHeader};
use mirrorhub::units::BLOCK_BYTES_U64;
use mirrorhub::units::convert::to_u64;
use mirrorhub::units::hash::Root;
use mirrorhub::units::ids::{HubId, SourceId, VolumeId};
use mirrorhub::units::names::SourceName;
use mirrorhub::units::numbers::{
    CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use mirrorhub::units::policy::Policy;
use mirrorhub::wire::message::{
    Ack, CpEnd, Frame, Hello, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, PartitionFull, Ping,
    RefusedCode, Updates, VolumeOffer, VolumeRoot, Welcome,
};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::{mpsc, watch};

use super::content::Volume;
use super::{Common, Load, Phase, Report, offset, scattered};

/// As a real source: pauses between attempts to connect, and between heartbeats.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Writes that one transfer of a burst carries at most.
const BATCH_MAX: usize = 32;
/// Blocks of a write that fills a log.
const FILL_BLOCKS: u64 = 64;
/// Far away.
const NEVER: Duration = Duration::from_secs(3600);

/// Why a connection ended.
enum End {
    /// The hub is not there, or does not take it now.
    Away,
    /// Nobody wants any more phases.
    Over,
    /// What a sound hub does not do.
    Fault(anyhow::Error),
}

impl From<anyhow::Error> for End {
    fn from(error: anyhow::Error) -> Self {
        Self::Fault(error)
    }
}

/// A transfer that is not acknowledged.
#[derive(Debug)]
struct Sent {
    place: Place,
    bytes: Bytes,
    writes: u64,
    /// Bytes of its clients.
    data: u64,
    formed: Instant,
}

/// A CP that is not published.
#[derive(Debug)]
struct Pending {
    cp: CpNumber,
    place: Place,
    updates: Bytes,
    root: Root,
    told: bool,
}

/// One source.
pub struct Filer {
    at: usize,
    name: SourceName,
    common: Arc<Common>,
    volume: Volume,
    hub: Option<HubId>,
    epoch: Epoch,
    connection: u64,
    last: Place,
    held_after: Place,
    cp: CpNumber,
    /// Formed and not acknowledged; the first `sent` are under way.
    held: VecDeque<Sent>,
    sent: usize,
    in_flight: u64,
    credit: u64,
    pending: Option<Pending>,
    phase: Phase,
    report: Option<Report>,
    next_write: Instant,
    next_cp: Instant,
    next_ping: Instant,
    together: Option<CpNumber>,
    returned: bool,
    back: Option<Instant>,
    /// Bytes written for [`Load::Fill`].
    filled: u64,
    outgoing: Outgoing,
}

impl Filer {
    pub fn new(at: usize, name: SourceName, common: Arc<Common>) -> Self {
        let now = Instant::now();
        let volume = Volume::new(common.blocks);
        let next_cp = now + offset(at, common.interval);
        let phase = Phase {
            number: 0,
            begin: now,
            length: Duration::ZERO,
            quiet: Load::Rest,
            loud: None,
            together: None,
            settle: false,
        };
        Self {
            at,
            name,
            common,
            volume,
            hub: None,
            epoch: Epoch::default(),
            connection: 0,
            last: Place::default(),
            held_after: Place::default(),
            cp: CpNumber(1),
            held: VecDeque::new(),
            sent: 0,
            in_flight: 0,
            credit: 0,
            pending: None,
            phase,
            report: None,
            next_write: now + NEVER,
            next_cp,
            next_ping: now + offset(at, HEARTBEAT),
            together: None,
            returned: false,
            back: None,
            filled: 0,
            outgoing: Outgoing::default(),
        }
    }

    /// Until nobody wants any more phases.
    pub async fn live(
        mut self,
        mut phases: watch::Receiver<Phase>,
        reports: &mpsc::Sender<anyhow::Result<Report>>,
    ) -> anyhow::Result<()> {
        let mut pause = PAUSE.0;
        loop {
            let joined = match self.join().await {
                Ok((reader, write)) => {
                    pause = PAUSE.0;
                    self.common.joined.fetch_add(1, Ordering::Relaxed);
                    let ended = self.session(reader, write, &mut phases, reports).await;
                    self.common.joined.fetch_sub(1, Ordering::Relaxed);
                    ended
                }
                Err(end) => Err(end),
            };
            match joined {
                Ok(()) | Err(End::Over) => return Ok(()),
                Err(End::Fault(error)) => return Err(error.context(self.name.to_string())),
                Err(End::Away) => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    fn hello(&self) -> anyhow::Result<Hello> {
        let id = |kind: u64| {
            let number = to_u64(self.at) + 1;
            u128::from(scattered(number)) << 64 | u128::from(number << 8 | kind)
        };
        let own_cp = self.pending.as_ref().map_or(CpNumber(self.cp.0 - 1), |pending| pending.cp);
        Ok(Hello {
            version: PROTOCOL_VERSION,
            version_min: PROTOCOL_VERSION_MIN,
            name: self.name.clone(),
            source: SourceId(id(1).to_be_bytes()),
            hub: self.hub,
            generation: Generation { number: 1, id: scattered(to_u64(self.at) + 7) },
            epoch: self.epoch,
            volumes: vec![VolumeOffer {
                number: VolumeNumber(0),
                id: VolumeId(id(2).to_be_bytes()),
                name: "vol0".parse().context("a name")?,
                size: self.volume.size(),
            }],
            held_after: self.held_after.into(),
            last: self.last.into(),
            own_durable: self.last.transfer,
            own_cp,
            cp_max: own_cp,
            serving: true,
            policy: Policy::default(),
            alone: None,
            connection: self.connection,
        })
    }

    /// Connects and says Hello.
    async fn join(
        &mut self,
    ) -> Result<(FrameReader<OwnedReadHalf>, tokio::net::tcp::OwnedWriteHalf), End> {
        self.connection += 1;
        let stream = TcpStream::connect(self.common.hub).await.map_err(|_| End::Away)?;
        stream.set_nodelay(true).map_err(|_| End::Away)?;
        let (read, mut write) = stream.into_split();
        let mut reader = FrameReader::new(read);
        self.outgoing = Outgoing::default();
        self.push(&Message::Hello(Box::new(self.hello()?)), Bytes::new());
        self.outgoing.write_all(&mut write).await.map_err(|_| End::Away)?;
        let patience = Duration::from_secs(30);
        let answer = tokio::time::timeout(patience, reader.next()).await.map_err(|_| End::Away)?;
        let message = answer.map_err(|_| End::Away)?.0;
        if let Message::Welcome(welcome) = &message {
            self.welcomed(welcome)?;
        } else if is_passing(&message) {
            return Err(End::Away);
        } else {
            return Err(anyhow::anyhow!("{message:?} in answer to Hello").into());
        }
        Ok((reader, write))
    }

    fn welcomed(&mut self, welcome: &Welcome) -> anyhow::Result<()> {
        let last = Place::from(welcome.last);
        if last.sequence > self.last.sequence || last.sequence < self.acked().sequence {
            bail!("the hub has {last:?}, acknowledged was {:?}", self.acked());
        }
        (self.hub, self.epoch) = (Some(welcome.hub), welcome.epoch);
        (self.sent, self.in_flight, self.credit) = (0, 0, welcome.log_credit);
        // What the hub has is acknowledged, but its time is not that of a sound session.
        while self.held.front().is_some_and(|sent| sent.place.sequence <= last.sequence) {
            self.held.pop_front().inspect(|sent| self.tally(sent.data));
        }
        if let Some(pending) = &mut self.pending {
            pending.told = false;
        }
        (self.returned, self.back) = (self.connection > 1, None);
        Ok(())
    }

    /// Everything up to here is acknowledged.
    fn acked(&self) -> Place {
        // The place before the oldest that is held is not kept: its sequence is enough.
        let before = self
            .held
            .front()
            .map(|sent| SequenceNumber(sent.place.sequence.0.saturating_sub(sent.writes)));
        before.map_or(self.last, |sequence| Place { sequence, ..Place::default() })
    }

    fn push(&mut self, message: &Message, payload: Bytes) {
        self.outgoing.push(Frame::new(message, payload));
    }

    async fn session(
        &mut self,
        mut reader: FrameReader<OwnedReadHalf>,
        mut write: tokio::net::tcp::OwnedWriteHalf,
        phases: &mut watch::Receiver<Phase>,
        reports: &mpsc::Sender<anyhow::Result<Report>>,
    ) -> Result<(), End> {
        if self.returned && self.phase.quiet != Load::Rest {
            // Its clients have waited for this.
            self.form(1, 1);
        }
        loop {
            let seen = *phases.borrow_and_update();
            if seen.number != self.phase.number {
                self.enter(seen);
            }
            self.due();
            self.fill();
            if let Some(report) = self.reported() {
                drop(reports.send(Ok(report)).await);
            }
            let next = self.next_write.min(self.next_cp).min(self.next_ping).min(self.ends());
            tokio::select! {
                biased;
                written = self.outgoing.write_some(&mut write), if !self.outgoing.is_empty() => {
                    written.map_err(|_| End::Away)?;
                }
                frame = reader.next() => match frame {
                    Ok((message, _)) => self.take(message)?,
                    Err(LinkError::Frame(error)) => return Err(End::Fault(error.into())),
                    Err(_) => return Err(End::Away),
                },
                changed = phases.changed() => changed.map_err(|_| End::Over)?,
                () = tokio::time::sleep_until(next.into()) => {}
            }
        }
    }

    /// When the phase ends, if that is to be noticed.
    fn ends(&self) -> Instant {
        let end = self.phase.begin + self.phase.length;
        let waits = self.report.is_some() && end > Instant::now();
        if waits { end } else { self.next_ping }
    }

    /// What it writes in this phase.
    fn load(&self) -> Load {
        self.phase.loud.filter(|_| self.at == 0).unwrap_or(self.phase.quiet)
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        let loud = phase.loud.is_some() && self.at == 0;
        self.report = Some(Report { phase: phase.number, loud, ..Report::default() });
        (self.together, self.back, self.filled) = (None, None, 0);
        self.next_write = match self.load() {
            Load::Rest => phase.begin + NEVER,
            Load::Paced(every) | Load::Bursts(every, _) => phase.begin + offset(self.at, every),
            Load::Flat { .. } | Load::Fill(_) => phase.begin,
        };
        if phase.settle {
            self.next_cp = phase.begin;
        } else if let Some(together) = phase.together {
            self.next_cp = phase.begin + together;
        }
    }

    /// Does what the time asks for.
    fn due(&mut self) {
        let now = Instant::now();
        let end = self.phase.begin + self.phase.length;
        while self.next_write <= now {
            if self.next_write >= end {
                self.next_write = end + NEVER;
                break;
            }
            match self.load() {
                Load::Rest => self.next_write = end + NEVER,
                Load::Paced(every) => {
                    self.form(1, 1);
                    self.next_write += every;
                }
                Load::Bursts(every, count) => {
                    self.burst(count);
                    self.next_write += every;
                }
                Load::Flat { .. } | Load::Fill(_) => {
                    self.go_on();
                    self.next_write = end + NEVER;
                }
            }
        }
        if self.next_cp <= now {
            let waits = self.phase.settle && !self.volume.is_clean();
            self.freeze();
            let again = if waits { HEARTBEAT } else { self.common.interval };
            self.next_cp = now + again;
        }
        if self.next_ping <= now {
            self.push(
                &Message::Ping(Ping { sequence: self.last.sequence, token: 1 }),
                Bytes::new(),
            );
            self.next_ping = now + HEARTBEAT;
        }
    }

    /// Forms what a load without a pace wants under way; two transfers until a log is full.
    fn go_on(&mut self) {
        match self.load() {
            Load::Flat { depth, blocks } => {
                while self.held.len() < depth {
                    self.form(1, blocks);
                }
            }
            Load::Fill(bytes) => {
                while self.held.len() < 2 && self.filled < bytes {
                    self.form(1, FILL_BLOCKS);
                    self.filled += FILL_BLOCKS * BLOCK_BYTES_U64;
                }
            }
            Load::Rest | Load::Paced(_) | Load::Bursts(..) => {}
        }
    }

    /// What clients wrote at once: the first leaves, the others gather meanwhile.
    fn burst(&mut self, count: usize) {
        self.form(1, 1);
        let mut left = count.saturating_sub(1);
        while left > 0 {
            let now = left.min(BATCH_MAX);
            self.form(now, 1);
            left -= now;
        }
    }

    /// Forms a transfer of so many writes of so many blocks.
    fn form(&mut self, writes: usize, blocks: u64) {
        let common = self.common.clone();
        let counter = self.last.transfer.counter + 1;
        let id = TransferId { generation: 1, counter };
        let mut builder = Builder::default();
        for at in 0..to_u64(writes) {
            let chance = scattered(counter << 20 | to_u64(self.at) << 6 | at);
            let vbn = (chance >> 8) % (common.blocks / blocks) * blocks;
            let (entry, data, leaves) = common.payloads.entry(chance, vbn, blocks);
            builder.push(entry, data);
            self.volume.put(vbn, leaves, id, at * blocks);
        }
        let transfer = builder.finish(TransferHeader {
            id,
            cp: self.cp,
            partition: 0,
            first_sequence: self.last.sequence.next(),
            previous: self.last.transfer,
            hash_before: self.last.hash,
            own_durable: self.last.transfer,
        });
        self.last = transfer.place();
        let (bytes, writes) = (transfer.bytes().clone(), to_u64(writes));
        let (place, formed) = (self.last, Instant::now());
        let data = writes * blocks * BLOCK_BYTES_U64;
        common.tallies[self.at].formed.fetch_add(data, Ordering::SeqCst);
        self.held.push_back(Sent { place, bytes, writes, data, formed });
    }

    /// Cuts a CP, unless there is nothing to say or one is under way.
    fn freeze(&mut self) {
        if self.pending.is_some() || self.volume.is_clean() {
            return;
        }
        if self.phase.together.is_some() && self.together.is_none() {
            self.together = Some(self.cp);
        }
        let (updates, root) = self.volume.freeze();
        let (cp, place) = (self.cp, self.last);
        self.pending = Some(Pending { cp, place, updates, root, told: false });
        self.cp = self.cp.next();
    }

    /// Hands over what the hub's credit allows, a CP behind its last transfer.
    fn fill(&mut self) {
        loop {
            self.tell_cp();
            let Some(next) = self.held.get(self.sent) else { return };
            let bytes = to_u64(next.bytes.len());
            let fits = self.in_flight + bytes <= self.credit;
            if !fits && self.in_flight > 0 || self.credit == 0 {
                return;
            }
            self.in_flight += bytes;
            self.sent += 1;
            let payload = next.bytes.clone();
            self.push(&Message::Transfer, payload);
        }
    }

    fn tell_cp(&mut self) {
        let next = self.held.get(self.sent).map(|next| next.place.sequence);
        let Some(pending) = &mut self.pending else { return };
        if pending.told || next.is_some_and(|next| next <= pending.place.sequence) {
            return;
        }
        pending.told = true;
        let (cp, place, updates) = (pending.cp, pending.place.into(), pending.updates.clone());
        let volume = VolumeNumber(0);
        let roots = vec![VolumeRoot { volume, root: pending.root }];
        let update_bytes = to_u64(updates.len());
        let (base, replay, keeps_log) = (None, false, false);
        let full = PartitionFull { cp, last: place, base, replay, keeps_log };
        self.push(&Message::PartitionFull(full), Bytes::new());
        self.push(&Message::Updates(Updates { cp, volume }), updates);
        self.push(&Message::CpEnd(CpEnd { cp, place, roots, update_bytes }), Bytes::new());
    }

    fn take(&mut self, message: Message) -> Result<(), End> {
        if let Message::Ack(ack) = message {
            self.acknowledged(ack)?;
        } else if let Message::CpDone(done) = message {
            self.published(done.cp)?;
        } else if is_passing(&message) {
            return Err(End::Away);
        } else if !matches!(message, Message::Pong(_)) {
            return Err(anyhow::anyhow!("the hub says {message:?}").into());
        }
        Ok(())
    }

    fn published(&mut self, cp: CpNumber) -> anyhow::Result<()> {
        let pending = self.pending.take_if(|pending| pending.cp == cp);
        self.held_after = pending.context("CpDone of a CP that is not under way")?.place;
        if self.together == Some(cp)
            && let Some(report) = &mut self.report
        {
            report.moved = Some(Instant::now());
        }
        if self.phase.settle {
            self.next_cp = Instant::now();
        }
        Ok(())
    }

    fn tally(&self, bytes: u64) {
        self.common.tallies[self.at].acknowledged.fetch_add(bytes, Ordering::SeqCst);
    }

    fn acknowledged(&mut self, ack: Ack) -> anyhow::Result<()> {
        let (now, (from, to)) = (Instant::now(), self.phase.measured());
        self.credit = ack.log_credit;
        while let Some(sent) = self.held.pop_front_if(|sent| sent.place.transfer <= ack.id) {
            if self.sent == 0 {
                bail!("transfer {} was acknowledged and not sent", sent.place.transfer);
            }
            self.sent -= 1;
            self.in_flight -= to_u64(sent.bytes.len());
            self.tally(sent.data);
            if std::mem::take(&mut self.returned) {
                self.back = Some(now);
            }
            let Some(report) = &mut self.report else { continue };
            if sent.formed < self.phase.begin {
                continue;
            }
            report.writes += sent.writes;
            report.transfers += 1;
            report.bytes += to_u64(sent.bytes.len());
            if (from..to).contains(&sent.formed) {
                report.measured += sent.writes;
                let micros = now.duration_since(sent.formed).as_micros();
                report.micros.push(u32::try_from(micros).unwrap_or(u32::MAX));
            }
        }
        if now < to || matches!(self.load(), Load::Fill(_)) {
            self.go_on();
        }
        Ok(())
    }

    /// The report, once, when the phase is over and nothing is under way.
    fn reported(&mut self) -> Option<Report> {
        let over = self.phase.begin + self.phase.length <= Instant::now();
        let settled = !self.phase.settle || self.volume.is_clean() && self.pending.is_none();
        let filled = !matches!(self.load(), Load::Fill(bytes) if self.filled < bytes);
        if !over || !self.held.is_empty() || !settled || !filled {
            return None;
        }
        let moving = self
            .together
            .is_some_and(|cp| self.pending.as_ref().is_some_and(|pending| pending.cp == cp));
        let report = self.report.take_if(|_| !moving)?;
        Some(Report { back: self.back, ..report })
    }
}

/// Whether the hub stops, is busy, or has not read the source's file yet.
fn is_passing(message: &Message) -> bool {
    if let Message::Refused(refused) = message {
        return matches!(refused.code, RefusedCode::Busy | RefusedCode::UnknownSource);
    }
    matches!(message, Message::Going(_))
}
