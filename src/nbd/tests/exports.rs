//! Exports that wait, fail and panic on demand.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::nbd::export::{
    ErrorCode, Export, ExportError, ExportFuture, ExportInfo, Exports, Extent, Listed, OpenError,
    OpenFuture, Segment,
};
use crate::units::numbers::ByteCount;

/// Requests at or past this offset wait for the gate.
pub(super) const GATED: u64 = 1 << 40;

/// An endless hole whose far half opens only request by request.
pub(super) struct Gate {
    info: ExportInfo,
    /// Each permit lets one waiting request go on.
    pub(super) gate: Semaphore,
    pub(super) begun: AtomicU64,
    pub(super) finished: AtomicU64,
    pub(super) active_max: AtomicU64,
    pub(super) ended: CancellationToken,
}

impl Gate {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            info: ExportInfo::new("gate", ByteCount(1 << 41)),
            gate: Semaphore::new(0),
            begun: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            active_max: AtomicU64::new(0),
            ended: CancellationToken::new(),
        })
    }

    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    pub(super) fn finished(&self) -> u64 {
        self.finished.load(Ordering::SeqCst)
    }

    fn pass<T: Send + 'static>(&self, offset: u64, value: T) -> ExportFuture<'_, T> {
        Box::pin(async move {
            if offset >= GATED {
                let begun = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
                self.active_max.fetch_max(begun - self.finished(), Ordering::SeqCst);
                self.gate.acquire().await.unwrap().forget();
                self.finished.fetch_add(1, Ordering::SeqCst);
            }
            Ok(value)
        })
    }
}

impl Export for Gate {
    fn info(&self) -> &ExportInfo {
        &self.info
    }
    fn read(&self, offset: u64, length: u32) -> ExportFuture<'_, Vec<Segment>> {
        let data = Bytes::from(vec![7; usize::try_from(length).unwrap()]);
        self.pass(offset, vec![Segment::Data(data)])
    }
    fn write(&self, offset: u64, _: Bytes, _: bool) -> ExportFuture<'_, ()> {
        self.pass(offset, ())
    }
    fn flush(&self) -> ExportFuture<'_, ()> {
        self.pass(0, ())
    }
    fn trim(&self, offset: u64, _: u32, _: bool) -> ExportFuture<'_, ()> {
        self.pass(offset, ())
    }
    fn write_zeroes(&self, offset: u64, _: u32, _: bool, _: bool) -> ExportFuture<'_, ()> {
        self.pass(offset, ())
    }
    fn cache(&self, offset: u64, _: u32) -> ExportFuture<'_, ()> {
        self.pass(offset, ())
    }
    fn extents(&self, offset: u64, length: u32, _: usize) -> ExportFuture<'_, Vec<Extent>> {
        self.pass(offset, vec![Extent { length: length.into(), hole: true, zero: true }])
    }
    fn ended(&self) -> Option<CancellationToken> {
        Some(self.ended.clone())
    }
}

/// An export that does what [`Faulty::next`] says.
pub(super) struct Faulty {
    info: ExportInfo,
    pub(super) next: Mutex<Fault>,
}

#[derive(Debug, Clone)]
pub(super) enum Fault {
    Error(ErrorCode, &'static str),
    Read(Vec<Segment>),
    Extents(Vec<Extent>),
    Panic,
}

impl Faulty {
    pub(super) fn new() -> Arc<Self> {
        let info = ExportInfo::new("faulty", ByteCount(1 << 20));
        Arc::new(Self { info, next: Mutex::new(Fault::Panic) })
    }

    pub(super) fn set(&self, fault: Fault) {
        *self.next.lock().unwrap() = fault;
    }

    fn fail<T: Send + 'static>(
        &self,
        take: impl FnOnce(Fault) -> Option<T> + Send + 'static,
    ) -> ExportFuture<'_, T> {
        let fault = self.next.lock().unwrap().clone();
        Box::pin(async move {
            match fault {
                Fault::Error(code, text) => Err(ExportError::new(code, text)),
                Fault::Panic => panic!("as the test wishes"),
                other @ (Fault::Read(_) | Fault::Extents(_)) => Ok(take(other).unwrap()),
            }
        })
    }
}

impl Export for Faulty {
    fn info(&self) -> &ExportInfo {
        &self.info
    }
    fn read(&self, _: u64, _: u32) -> ExportFuture<'_, Vec<Segment>> {
        self.fail(|fault| if let Fault::Read(segments) = fault { Some(segments) } else { None })
    }
    fn write(&self, _: u64, _: Bytes, _: bool) -> ExportFuture<'_, ()> {
        self.fail(|_| None)
    }
    fn flush(&self) -> ExportFuture<'_, ()> {
        self.fail(|_| None)
    }
    fn trim(&self, _: u64, _: u32, _: bool) -> ExportFuture<'_, ()> {
        self.fail(|_| None)
    }
    fn write_zeroes(&self, _: u64, _: u32, _: bool, _: bool) -> ExportFuture<'_, ()> {
        self.fail(|_| None)
    }
    fn cache(&self, _: u64, _: u32) -> ExportFuture<'_, ()> {
        self.fail(|_| None)
    }
    fn extents(&self, _: u64, _: u32, _: usize) -> ExportFuture<'_, Vec<Extent>> {
        self.fail(|fault| if let Fault::Extents(extents) = fault { Some(extents) } else { None })
    }
}

/// One export under any name but these: `closed` is refused, `late` says shutdown, `never` waits
/// for ever, `none` is unknown.
pub(super) struct Only(pub(super) Arc<dyn Export>);

impl Exports for Only {
    fn list(&self) -> Vec<Listed> {
        let name = self.0.info().name.clone();
        vec![Listed { name, description: String::new() }; 5000]
    }
    fn open<'a>(&'a self, name: &'a str) -> OpenFuture<'a> {
        Box::pin(async move {
            match name {
                "none" => Err(OpenError::Unknown),
                "closed" => Err(OpenError::Refused("not today".into())),
                "late" => Err(OpenError::Shutdown),
                "never" => std::future::pending().await,
                _ => Ok(Arc::clone(&self.0)),
            }
        })
    }
}
