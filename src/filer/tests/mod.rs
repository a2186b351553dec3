//! The engine against an in-process hub, on simulated devices that can be cut, failed and opened
//! again.

mod changes;
mod credit;
mod glance;
mod hub;
mod life;
mod loss;
mod promises;
mod sole;
mod unasked;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use self::hub::Hub;
use super::forwarder::ForwardOptions;
use super::recover::{Store, Wanted};
use super::shared::Backoff;
use super::{Behaviour, Filer, StartError};
use crate::device::sim::SimDevice;
use crate::nbd::export::{Export, ExportError, Exports, Segment};
use crate::nvlog::format::HEADER_BYTES;
use crate::nvlog::{RingOptions, RingShape};
use crate::pool::PoolOptions;
use crate::units::numbers::ByteCount;
use crate::units::policy::{Apply, OnFull, OnHubLoss, Policy};

const RING_BYTES: u64 = 2 << 20;
const POOL_BYTES: u64 = 16 << 20;
const VOLUME_BYTES: usize = 1 << 20;

/// The devices of a source, which outlive it.
#[derive(Clone)]
struct Stores {
    nvram: Arc<SimDevice>,
    pool: Arc<SimDevice>,
}

impl Stores {
    fn new() -> Self {
        Self::sized(RING_BYTES)
    }

    fn sized(ring: u64) -> Self {
        Self {
            nvram: Arc::new(SimDevice::new("nvram", ByteCount(ring + HEADER_BYTES))),
            pool: Arc::new(SimDevice::new("pool", ByteCount(POOL_BYTES))),
        }
    }

    /// What a power cut leaves, on new devices, so that a thread of the source that was cut
    /// cannot touch them.
    fn cut(&self, seed: u64) -> Self {
        self.nvram.power_cut(seed);
        self.pool.power_cut(seed.wrapping_add(1));
        Self {
            nvram: Arc::new(SimDevice::from_image("nvram", self.nvram.medium())),
            pool: Arc::new(SimDevice::from_image("pool", self.pool.medium())),
        }
    }
}

/// `sync` with `stop`, and CPs as told.
fn promise(apply: Apply) -> Policy {
    Policy { apply, on_hub_loss: OnHubLoss::Stop, ..Policy::default() }
}

fn behaviour(hub: &Hub, apply: Apply) -> Behaviour {
    let name =
        |name: &str| (name.parse().unwrap(), ByteCount(u64::try_from(VOLUME_BYTES).unwrap()));
    Behaviour {
        wanted: Wanted {
            name: "filer-a".parse().unwrap(),
            volumes: vec![name("vol0"), name("vol1")],
            policy: promise(apply),
            checkpoint_interval: Duration::from_secs(3600),
            accept_lost_nvram: false,
            accept_untold_policy: false,
            on_full: OnFull::Wait,
            ring: RingOptions::default(),
            ring_shape: RingShape { area_bytes_min: 1 << 20, commit_bytes_max: 512 << 10 },
            pool: PoolOptions { node_cache_bytes: 1 << 20, ..PoolOptions::default() },
        },
        forward: ForwardOptions {
            resync_limit: None,
            hub: hub.address,
            tls: None,
            backoff: Backoff { least: Duration::from_millis(5), most: Duration::from_millis(20) },
            seed: 7,
        },
        stop_timeout: Duration::from_secs(10),
    }
}

async fn try_start(stores: &Stores, behaviour: Behaviour) -> Result<Filer, StartError> {
    let (nvram, pool) = (store(&stores.nvram, false), store(&stores.pool, false));
    Filer::start_on(behaviour, nvram, pool).await
}

fn store(device: &Arc<SimDevice>, new: bool) -> Store {
    let device: Arc<SimDevice> = Arc::clone(device);
    Store { device, new }
}

/// A source that serves.
async fn start(stores: &Stores, hub: &Hub) -> Filer {
    let filer = try_start(stores, behaviour(hub, Apply::Reference)).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), filer.served()).await.unwrap();
    filer
}

async fn open(filer: &Filer, name: &str) -> Arc<dyn Export> {
    filer.exports().open(name).await.unwrap()
}

async fn write(export: &Arc<dyn Export>, offset: usize, data: &[u8]) -> Result<(), ExportError> {
    let offset = u64::try_from(offset).unwrap();
    export.write(offset, Bytes::copy_from_slice(data), false).await
}

async fn read(export: &Arc<dyn Export>, offset: usize, length: usize) -> Vec<u8> {
    let (offset, count) = (u64::try_from(offset).unwrap(), u32::try_from(length).unwrap());
    let mut bytes = Vec::new();
    for segment in export.read(offset, count).await.unwrap() {
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(&data),
            Segment::Hole(count) => bytes.resize(bytes.len() + usize::try_from(count).unwrap(), 0),
        }
    }
    assert_eq!(bytes.len(), length);
    bytes
}

async fn read_all(export: &Arc<dyn Export>) -> Vec<u8> {
    read(export, 0, VOLUME_BYTES).await
}

/// Waits until a condition holds; a test that waits in vain fails here.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not happen in 10 s");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
