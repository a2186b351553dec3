//! The volumes of a source as NBD exports.
//!
//! Called by the NBD server. A read lays the open buffers over the frozen ones over the tree of
//! the newest own CP: what is in memory is taken under the order's lock, the tree is read without
//! it, by a pin taken at the same moment. A write is ordered, then answered when the policy says
//! so (`completion`); FUA is the same, since nothing is answered earlier. Under
//! `cache = "writeback"` a write without FUA is answered once it is ordered and buffered, as a
//! disk with a volatile cache does. A flush waits for the highest sequence number its volume had
//! when it came, on any connection (R17); after a failed log write every later one fails.
//!
//! No export is opened before the hub was asked what it holds (R1), nor while the source stops.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio_util::sync::CancellationToken;

use super::beneath::{Beneath, ReadError};
use super::buffers::{Found, Page, Piece, lay, over, over_layer};
use super::completion::{Acknowledged, Refusal};
use super::image::Image;
use super::mending;
use super::order::Change;
use super::shared::{LinkState, Shared};
use super::tree;
use crate::nbd::export::{
    ErrorCode, Export, ExportError, ExportFuture, ExportInfo, Exports, Extent, Listed, OpenError,
    OpenFuture, Segment,
};
use crate::pool::Pin;
use crate::pool::error::PoolError;
use crate::pool::kept_row::KeptRow;
use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::{to_u64, to_usize};
use crate::units::machine;
use crate::units::names::KeptName;
use crate::units::numbers::{SequenceNumber, Vbn, VolumeNumber};
use crate::units::policy::Cache;
use crate::volume::error::VolumeError;
use crate::volume::mend::{Depth, blocks_of, is_rot};
use crate::volume::reader::SegmentContent;
use crate::wire::message::VolumeOffer;

/// How often a read that waits for the hub looks whether it is refused.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A part that is read from the tree is handed on as it is from this length on.
const HAND_ON_BYTES: usize = 64 << 10;
/// Tries of a read whose pin the pool gave up.
const PIN_TRIES: usize = 8;

/// All volumes of a source.
pub struct SourceExports {
    current: Current,
    stopping: CancellationToken,
}

/// Says which parts run now.
type Current = Box<dyn Fn() -> Arc<Shared> + Send + Sync>;

impl std::fmt::Debug for SourceExports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceExports").field("stopping", &self.stopping).finish_non_exhaustive()
    }
}

impl SourceExports {
    /// The volumes of a source; `stopping` ends them. A source that was given back by its hub runs
    /// with new parts: each volume is opened on those that run then.
    pub fn new(current: Current, stopping: CancellationToken) -> Self {
        Self { current, stopping }
    }

    /// A CP that is kept here: what failback has put aside (R12). It is the past and nothing else,
    /// so it is shown by a fenced source as well.
    fn open_kept(
        &self,
        name: &str,
        volume: &str,
        kept: &str,
    ) -> Result<Arc<dyn Export>, OpenError> {
        let shared = (self.current)();
        let volume = find(&shared, volume).ok_or(OpenError::Unknown)?;
        let kept: KeptName = kept.parse().map_err(|_| OpenError::Unknown)?;
        match shared.pool.pin_kept(shared.source, &kept, volume.number) {
            Ok(pin) => Ok(Arc::new(Image::kept(name, pin, self.stopping.clone()))),
            Err(PoolError::UnknownKept { .. } | PoolError::UnknownVolume { .. }) => {
                Err(OpenError::Unknown)
            }
            Err(error) => Err(OpenError::Refused(error.to_string().into())),
        }
    }

    fn list_kept(&self) -> Vec<Listed> {
        let shared = (self.current)();
        if shared.sole {
            // Its pool is a hub's, which lists them.
            return Vec::new();
        }
        let rows = match shared.pool.catalog().kept(shared.source) {
            Ok(rows) => rows,
            Err(error) => {
                tracing::warn!(source = %shared.name, %error, "no kept CP is listed");
                return Vec::new();
            }
        };
        let of = |row: &KeptRow| {
            let (cp, kept) = (row.cp, row.name.clone());
            let listed = |volume: &VolumeOffer| Listed {
                name: format!("{}@{kept}", full_name(&shared, volume)),
                description: format!("kept CP {cp} of volume {}, read-only", volume.name),
            };
            shared.volumes().iter().map(listed).collect::<Vec<_>>()
        };
        rows.iter().flat_map(|row| of(&row.row)).collect()
    }

    fn open_now(&self, name: &str) -> Result<Arc<dyn Export>, OpenError> {
        if let Some((volume, kept)) = name.split_once('@') {
            return self.open_kept(name, volume, kept);
        }
        let shared = (self.current)();
        let volume = find(&shared, name).ok_or(OpenError::Unknown)?;
        if self.stopping.is_cancelled() {
            return Err(OpenError::Shutdown);
        }
        if !shared.is_serving() {
            return Err(OpenError::Refused(why_not_serving(&shared)));
        }
        if let Some(reason) = shared.not_served(volume.number) {
            return Err(OpenError::Refused(reason.into()));
        }
        let mut info = ExportInfo::new(full_name(&shared, &volume), shared.size_of(&volume));
        info.description = format!("volume {} of source {}", volume.name, shared.name);
        info.multi_conn = true;
        let (volume, ended) = (volume.number, self.stopping.clone());
        Ok(Arc::new(VolumeExport { shared, volume, info, ended }))
    }
}

fn full_name(shared: &Shared, volume: &VolumeOffer) -> String {
    format!("{}/{}", shared.name, volume.name)
}

fn find(shared: &Shared, name: &str) -> Option<VolumeOffer> {
    match &shared.volumes()[..] {
        [only] if name.is_empty() => Some(only.clone()),
        volumes => volumes
            .iter()
            .find(|volume| volume.name.as_str() == name || full_name(shared, volume) == name)
            .cloned(),
    }
}

fn why_not_serving(shared: &Shared) -> Cow<'static, str> {
    match shared.link() {
        LinkState::Unlinked => "the source starts".into(),
        LinkState::Waiting { reason } | LinkState::Offline { reason, .. } => {
            format!("the source waits for its hub before it serves: {reason}").into()
        }
        LinkState::Connected { .. } => "the source fetches its log from the hub".into(),
        LinkState::Halted(refused) => format!("{}: {}", refused.reason, refused.next_step).into(),
    }
}

impl Exports for SourceExports {
    fn list(&self) -> Vec<Listed> {
        let shared = (self.current)();
        let listed = |volume: &VolumeOffer| Listed {
            name: full_name(&shared, volume),
            description: format!("volume {} of source {}", volume.name, shared.name),
        };
        let mut all: Vec<Listed> = shared.volumes().iter().map(listed).collect();
        all.extend(self.list_kept());
        all
    }

    fn open<'a>(&'a self, name: &'a str) -> OpenFuture<'a> {
        Box::pin(std::future::ready(self.open_now(name)))
    }
}

/// One volume, open for one client.
#[derive(Debug)]
struct VolumeExport {
    shared: Arc<Shared>,
    volume: VolumeNumber,
    info: ExportInfo,
    ended: CancellationToken,
}

/// What memory says about a range, what lies beneath, and what keeps the tree below both.
struct Look {
    pieces: Vec<Piece>,
    beneath: Option<Arc<dyn Beneath>>,
    volume: VolumeNumber,
    pin: Arc<Pin>,
}

impl Look {
    /// Whether all of it is in memory.
    fn is_known(&self) -> bool {
        let known = |piece: &Piece| matches!(piece.found, Found::Data(_) | Found::Hole);
        self.pieces.iter().all(known)
    }

    /// Lays what memory says over what lies beneath it; what is left is the tree's.
    fn through(mut self, content: Content) -> Result<Self, ReadError> {
        if let Some(beneath) = self.beneath.take() {
            self.pieces = over_layer(self.pieces, |vbn, count| match content {
                Content::Bytes => beneath.pieces(self.volume, vbn, count),
                Content::Shape => Ok(beneath.shape(self.volume, vbn, count)),
            })?;
        }
        if self.pin.tree().top.is_hole() {
            self.pieces.iter_mut().for_each(over_nothing);
        }
        Ok(self)
    }
}

/// What is wanted of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Its bytes.
    Bytes,
    /// Where it has holes.
    Shape,
}

impl VolumeExport {
    /// Refuses what comes after a stop. The server has checked the range; what slipped through
    /// would fail the whole source at its next CP, so it is checked here as well.
    fn guard(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        if self.ended.is_cancelled() {
            return Err(error_of(&Refusal::Stopped));
        }
        self.mirrored()?;
        match offset.checked_add(length) {
            Some(end) if end <= self.info.size.0 => Ok(()),
            _ => Err(ExportError::new(ErrorCode::Inval, "past the end of the volume")),
        }
    }

    /// A volume that the hub leaves out is not served under `stop`, whoever had opened it before.
    fn mirrored(&self) -> Result<(), ExportError> {
        match self.shared.not_served(self.volume) {
            Some(reason) => Err(ExportError::new(ErrorCode::Io, reason)),
            None => Ok(()),
        }
    }

    async fn change(&self, offset: u64, change: Change, fua: bool) -> Result<(), ExportError> {
        let length = match &change {
            Change::Write(data) => to_u64(data.len()),
            Change::Trim(length) | Change::Zeroes(length) => *length,
        };
        self.guard(offset, length)?;
        let ordered = self.shared.order.change(self.volume, offset, &change).await;
        drop(change);
        let sequence = match ordered {
            Ok(Some(sequence)) => sequence,
            // Nothing was changed; FUA asks for what was before.
            Ok(None) if fua => self.shared.order.last_of(self.volume),
            Ok(None) => SequenceNumber(0),
            Err(refusal) => return Err(self.counted(&refusal)),
        };
        if self.shared.pledge.kept().cache == Cache::Writeback && !fua {
            let buffered = self.shared.completion.buffered().await;
            return buffered.map(drop).map_err(|refusal| self.counted(&refusal));
        }
        self.reached(sequence).await.map(drop)
    }

    async fn reached(&self, sequence: SequenceNumber) -> Result<Acknowledged, ExportError> {
        let answer = self.shared.completion.wait(sequence).await;
        let answer = answer.map_err(|refusal| self.counted(&refusal))?;
        // What the hub has acknowledged of a volume that it leaves out by now does not count.
        self.mirrored()?;
        Ok(answer)
    }

    /// A source that may have been replaced answers no read: it could be stale (section 9). What
    /// else refuses writes does not keep reads from going on.
    async fn held_back(&self) -> Result<(), ExportError> {
        match self.shared.completion.not_held().await {
            Ok(()) | Err(Refusal::Failed(_) | Refusal::NoSpace) => Ok(()),
            Err(refusal @ (Refusal::Stopped | Refusal::Fenced(_))) => Err(self.counted(&refusal)),
        }
    }

    /// Waits until what was read cannot be stale.
    async fn is_current(&self) -> Result<(), ExportError> {
        let mut lease = self.shared.lease.subscribe();
        while !self.shared.may_answer_reads() {
            // Either the hub is heard again, or a refusal ends the wait.
            drop(tokio::time::timeout(LOOK_AGAIN, lease.changed()).await);
            self.held_back().await?;
        }
        Ok(())
    }

    fn counted(&self, refusal: &Refusal) -> ExportError {
        self.shared.counters.errors.add(1);
        error_of(refusal)
    }

    fn look(&self, offset: u64, length: u64) -> Result<Look, ExportError> {
        let first = offset / BLOCK_BYTES_U64;
        let count = (offset + length).div_ceil(BLOCK_BYTES_U64) - first;
        let (open, frozen, (pin, beneath)) = self.shared.order.look(|open, frozen| {
            // Taken together: the tree is that of the frozen CP or of the one before it.
            let below = self.shared.below(self.volume);
            (open.pieces(self.volume, first, count), frozen.cloned(), below)
        });
        let pin = pin.ok_or_else(|| io_error("the volume has no tree"))?;
        let pin = if pin.has_ended() { self.pin_again()? } else { pin };
        let pieces = match frozen {
            Some(frozen) => over(open, &frozen.buffers, self.volume),
            None => open,
        };
        Ok(Look { pieces, beneath, volume: self.volume, pin })
    }

    /// The pool gave the pin of the newest CP up: that one is published, so it is pinned anew. A
    /// newer one is right as well, while its buffers are still laid over it.
    fn pin_again(&self) -> Result<Arc<Pin>, ExportError> {
        let pin = self.shared.pool.pin(self.shared.source, self.volume);
        pin.map(Arc::new).map_err(|error| io_error(error.to_string()))
    }

    /// Whether what could not be read was got from the hub.
    async fn mended(&self, pin: Arc<Pin>, offset: u64, length: u64) -> bool {
        let (shared, volume) = (Arc::clone(&self.shared), self.volume);
        let mended = machine::blocking(move || {
            let range = blocks_of(offset, length);
            mending::mend(&shared, (volume, &pin.tree()), range, Depth::Data)
        });
        matches!(mended.await, Ok(Ok(mending)) if !mending.mended.is_empty())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        offset: u64,
        length: u64,
        content: Content,
        work: impl Fn(Look) -> Result<T, VolumeError> + Clone + Send + 'static,
    ) -> Result<T, ExportError> {
        for _ in 0..PIN_TRIES {
            let mut look = self.look(offset, length)?;
            let pin = Arc::clone(&look.pin);
            if look.beneath.is_none() {
                // A tree that was never written has nothing to be read.
                look = look.through(content).map_err(|error| io_error(error.to_string()))?;
            }
            let grounded = look.beneath.is_some();
            let answer = if look.is_known() {
                work(look).map_err(ReadError::from)
            } else {
                let work = work.clone();
                let through = move || Ok(work(look.through(content)?)?);
                let joined = machine::blocking(through).await;
                joined.map_err(|error| io_error(error.to_string()))?
            };
            match answer {
                Err(ReadError::Volume(VolumeError::Pool(PoolError::PinEnded { .. }))) => {}
                Err(ReadError::Volume(error))
                    if is_rot(&error) && self.mended(pin, offset, length).await => {}
                // It is in a tree by now, and the log was dropped.
                Err(ReadError::Beneath(_)) if grounded && !self.shared.is_grounded() => {}
                Err(error) => {
                    self.shared.counters.errors.add(1);
                    tracing::error!(volume = %self.info.name, offset, length, %error, "read failed");
                    return Err(io_error(error.to_string()));
                }
                Ok(answer) => return Ok(answer),
            }
        }
        Err(io_error("the pool needs all its space for writes"))
    }
}

fn io_error(message: impl Into<Cow<'static, str>>) -> ExportError {
    ExportError::new(ErrorCode::Io, message)
}

fn error_of(refusal: &Refusal) -> ExportError {
    let code = match refusal {
        Refusal::Failed(_) => ErrorCode::Io,
        Refusal::NoSpace => ErrorCode::NoSpc,
        Refusal::Stopped | Refusal::Fenced(_) => ErrorCode::Shutdown,
    };
    ExportError::new(code, refusal.to_string())
}

/// Below is a tree that was never written.
fn over_nothing(piece: &mut Piece) {
    match std::mem::replace(&mut piece.found, Found::Hole) {
        Found::Base | Found::Hole => {}
        // Bytes that are not known are zero in an overlay.
        Found::Overlay { data, .. } | Found::Data(data) => piece.found = Found::Data(data),
    }
}

/// Collects an answer: neighbouring bytes in one piece, holes as such.
#[derive(Default)]
struct Answer {
    out: Vec<Segment>,
    data: BytesMut,
}

impl Answer {
    fn data(&mut self, bytes: &[u8]) {
        self.data.extend_from_slice(bytes);
    }

    fn bytes(&mut self, bytes: Vec<u8>) {
        if bytes.len() >= HAND_ON_BYTES {
            self.flush();
            self.out.push(Segment::Data(bytes.into()));
        } else {
            self.data(&bytes);
        }
    }

    fn hole(&mut self, length: u64) {
        self.flush();
        match self.out.last_mut() {
            Some(Segment::Hole(before)) => *before += length,
            _ => self.out.push(Segment::Hole(length)),
        }
    }

    fn flush(&mut self) {
        if !self.data.is_empty() {
            self.out.push(Segment::Data(self.data.split().freeze()));
        }
    }

    fn finish(mut self) -> Vec<Segment> {
        self.flush();
        self.out
    }
}

/// The part of a piece that lies in `offset..end`, in bytes of the volume.
fn clip(piece: &Piece, offset: u64, end: u64) -> (u64, u64) {
    let start = piece.vbn * BLOCK_BYTES_U64;
    (start.max(offset), (start + piece.count * BLOCK_BYTES_U64).min(end))
}

fn part(page: &Page, start: u64, end: u64) -> &[u8] {
    let inside = to_usize(start % BLOCK_BYTES_U64);
    &page[inside..inside + to_usize(end - start)]
}

fn assemble(look: Look, offset: u64, length: u64) -> Result<Vec<Segment>, VolumeError> {
    let mut answer = Answer::default();
    for piece in look.pieces {
        let (start, end) = clip(&piece, offset, offset + length);
        match piece.found {
            Found::Data(page) => answer.data(part(&page, start, end)),
            Found::Hole => answer.hole(end - start),
            Found::Base => {
                for segment in tree::read(&look.pin, start, end - start)? {
                    match segment.content {
                        SegmentContent::Data(bytes) => answer.bytes(bytes),
                        SegmentContent::Hole => answer.hole(segment.length),
                    }
                }
            }
            Found::Overlay { data, known } => {
                let mut page = [0; crate::units::BLOCK_BYTES];
                tree::read_block(&look.pin, Vbn(piece.vbn), &mut page)?;
                lay(&mut page, &data, &known);
                answer.data(part(&page, start, end));
            }
        }
    }
    Ok(answer.finish())
}

fn describe(look: Look, range: (u64, u64), at_most: usize) -> Result<Vec<Extent>, VolumeError> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut push = |length: u64, hole: bool| {
        let full = extents.len() == at_most;
        match extents.last_mut() {
            Some(last) if last.hole == hole => last.length += length,
            _ if full => return false,
            _ => extents.push(Extent { length, hole, zero: hole }),
        }
        true
    };
    'pieces: for piece in look.pieces {
        let (start, end) = clip(&piece, range.0, range.1);
        match piece.found {
            Found::Data(_) | Found::Overlay { .. } => {
                if !push(end - start, false) {
                    break;
                }
            }
            Found::Hole => {
                if !push(end - start, true) {
                    break;
                }
            }
            Found::Base => {
                let mut told = 0;
                for extent in tree::extents(&look.pin, start, end - start, at_most)? {
                    told += extent.length;
                    if !push(extent.length, extent.hole) {
                        break 'pieces;
                    }
                }
                if told < end - start {
                    break;
                }
            }
        }
    }
    Ok(extents)
}

impl Export for VolumeExport {
    fn info(&self) -> &ExportInfo {
        &self.info
    }

    fn read(&self, offset: u64, length: u32) -> ExportFuture<'_, Vec<Segment>> {
        let length = u64::from(length);
        self.shared.counters.reads.add(1);
        self.shared.counters.read_bytes.add(length);
        Box::pin(async move {
            self.guard(offset, length)?;
            self.held_back().await?;
            let read = self
                .blocking(offset, length, Content::Bytes, move |look| {
                    assemble(look, offset, length)
                })
                .await?;
            // Last of all: the process may have slept since it was asked.
            self.is_current().await?;
            Ok(read)
        })
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool) -> ExportFuture<'_, ()> {
        self.shared.counters.writes.add(1);
        self.shared.counters.written_bytes.add(to_u64(data.len()));
        Box::pin(self.change(offset, Change::Write(data), fua))
    }

    fn flush(&self) -> ExportFuture<'_, ()> {
        self.shared.counters.flushes.add(1);
        let last = self.shared.order.last_of(self.volume);
        let sequence = if machine::breaks(17) { SequenceNumber(0) } else { last };
        Box::pin(async move { self.reached(sequence).await.map(drop) })
    }

    fn trim(&self, offset: u64, length: u32, fua: bool) -> ExportFuture<'_, ()> {
        self.shared.counters.trims.add(1);
        Box::pin(self.change(offset, Change::Trim(u64::from(length)), fua))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u32,
        _no_hole: bool,
        fua: bool,
    ) -> ExportFuture<'_, ()> {
        // Zeroes are a hole on both ends, whoever wrote them (R15): there is no space behind
        // them to promise; a later write reserves its own.
        self.shared.counters.zeroes.add(1);
        Box::pin(self.change(offset, Change::Zeroes(u64::from(length)), fua))
    }

    fn cache(&self, offset: u64, length: u32) -> ExportFuture<'_, ()> {
        // Nodes and dirty blocks are in memory; data is the page cache's affair.
        Box::pin(std::future::ready(self.guard(offset, length.into())))
    }

    fn extents(&self, offset: u64, length: u32, at_most: usize) -> ExportFuture<'_, Vec<Extent>> {
        let length = u64::from(length);
        let range = (offset, offset + length);
        Box::pin(async move {
            self.guard(offset, length)?;
            let work = move |look| describe(look, range, at_most);
            self.blocking(offset, length, Content::Shape, work).await
        })
    }

    fn ended(&self) -> Option<CancellationToken> {
        Some(self.ended.clone())
    }
}
