//! The plain structs that a configuration becomes. Every path is absolute, every bound checked.
//!
//! Each key says: meaning, unit, default, bounds, and whether a change needs a restart or is live
//! (taken over while the process runs, by SIGHUP). *Live at the next CP*: the reload asks for a CP, and
//! the change is in force when the hub has noted it (R20).

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::hub::hooks::HookCommand;
use crate::link::shown::Fingerprint;
use crate::link::tls::TlsFiles;
use crate::raid::files::PoolFiles;
use crate::raid::layout::{Geometry, Level};
use crate::units::names::{SourceName, VolumeName};
use crate::units::networks::Networks;
use crate::units::numbers::ByteCount;
use crate::units::policy::{Ack, Apply, Cache, LagLimit, Mode, OnFull, OnHubLoss, Policy};
use crate::units::retention::Retention;
use crate::units::words::words;

/// Default of the hub's `data_dir`. Not the source's: both files may lie in one directory.
pub const HUB_DATA_DIR: &str = "hub-state";
/// Default of the source's `data_dir`.
pub const SOURCE_DATA_DIR: &str = "source-state";
/// Default of the hub's `listen`.
pub const HUB_LISTEN: &str = "127.0.0.1:7420";
/// Default of the hub's `nbd_listen`.
pub const HUB_NBD_LISTEN: &str = "127.0.0.1:10810";
/// Default of the hub's `http_listen`.
pub const HUB_HTTP_LISTEN: &str = "127.0.0.1:7421";
/// Default of `sources_dir`.
pub const SOURCES_DIR: &str = "sources.d";
/// Default of the hub's `nvram.size`.
pub const HUB_NVRAM: ByteCount = ByteCount(1 << 30);
/// Default of `image_pin`.
pub const IMAGE_PIN: Duration = Duration::from_secs(24 * 60 * 60);
/// Default of the source's `nbd_listen`.
pub const SOURCE_NBD_LISTEN: &str = "127.0.0.1:10809";
/// Default of the source's `http_listen`.
pub const SOURCE_HTTP_LISTEN: &str = "127.0.0.1:7422";
/// Default of the source's `nvram.size`.
pub const SOURCE_NVRAM: ByteCount = ByteCount(512 << 20);
/// Default of `checkpoint.interval`.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);
/// Default of `pool.scrub.every`.
pub const SCRUB_EVERY: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Default of `pool.scrub.limit`.
pub const SCRUB_LIMIT: ByteCount = ByteCount(50 << 20);
/// Default of `hooks.timeout`.
pub const HOOK_TIMEOUT: Duration = Duration::from_secs(30);
/// Default of `replication.hub_timeout`.
pub const HUB_TIMEOUT: Duration = Duration::from_secs(5);

/// `hub.toml` with the files of its `sources_dir`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubConfig {
    /// The file it was read from.
    pub file: PathBuf,
    /// `data_dir`: where the hub keeps its NVRAM, catalog and `admin.sock`. Default `hub-state`
    /// beside the file. Restart.
    pub data_dir: PathBuf,
    /// `listen`: address and port for sources; loopback. Default `127.0.0.1:7420`. Port 0 takes a
    /// free one. Restart.
    pub listen: SocketAddr,
    /// `nbd_listen`: address and port, or `unix:PATH`, for readers of images; loopback or unix, or
    /// anywhere with `tls.nbd` or `plain_networks`. Default `127.0.0.1:10810`. Restart.
    pub nbd_listen: Listen,
    /// `http_listen`: address and port, or `unix:PATH`, for metrics, health and status; loopback or
    /// unix, or anywhere with `tls.http` or `plain_networks`. Default `127.0.0.1:7421`. Restart.
    pub http_listen: Listen,
    /// `plain_networks`: IPv4 and IPv6 networks, such as `10.1.0.0/16` or a single address, 1 to 64 of them,
    /// whose clients NBD and HTTP serve in the clear where `tls.nbd` or `tls.http` is off; besides these only
    /// this machine's own, all others are hung up on. It says nothing to sources. Default none. Restart.
    pub plain_networks: Networks,
    /// `sources_dir`: directory with one file `NAME.toml` for each source. Default `sources.d`
    /// beside the file. Restart.
    pub sources_dir: PathBuf,
    /// `[tls]`: without it `listen` is on this machine.
    pub tls: Option<TlsConfig>,
    /// `image_pin`: how long a reader keeps the CP it found. Default 24h, 1m to 720h. Restart.
    pub image_pin: Duration,
    /// `[nvram]`: the ring that all sources share. Default 1GiB in `data_dir`.
    pub nvram: NvramConfig,
    /// `log.dir`: directory of the source logs. Default `logs` in `data_dir`. Restart.
    pub log_dir: PathBuf,
    /// `[pool]`: where the images are kept.
    pub pool: PoolConfig,
    /// `[hooks]`: what is run when a source's volumes have moved.
    pub hooks: HooksConfig,
    /// The sources, by name.
    pub sources: Vec<HubSource>,
}

/// `[hooks]`. A command is a path, or a list of a path and its arguments; a relative path starts at
/// the directory of the file. It is run without a shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HooksConfig {
    /// `hooks.promoted`: run when the volumes of a source that was failed over are served here.
    /// Default none. Restart.
    pub promoted: Option<HookCommand>,
    /// `hooks.failed_back`: run when a filer has said that it serves again. Default none. Restart.
    pub failed_back: Option<HookCommand>,
    /// `hooks.timeout`: a command that takes longer is killed. Default 30s, 100ms to 1h. Restart.
    pub timeout: Duration,
}

/// A source as the hub takes it: its file, and its part of the ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubSource {
    /// What its file says.
    pub file: SourceFile,
    /// Its guaranteed share of the ring: as its file says, or an equal part of half of what the
    /// files leave, at least 4MiB. 0 if it is not enabled. The sum never exceeds the ring.
    pub nvram_share: ByteCount,
}

/// `sources.d/NAME.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// The file it was read from.
    pub file: PathBuf,
    /// `name`: the source's name; equals the stem of the file. Required. A new name is a new source.
    pub name: SourceName,
    /// `enabled`: whether the source may connect. Default true. Live.
    pub enabled: bool,
    /// `nvram_share`: guaranteed part of the hub's ring. Default: see [`HubSource`]. 4MiB to the
    /// size of the ring. Live.
    pub nvram_share: Option<ByteCount>,
    /// `log_limit`: bytes that its source logs may take. Default none: its NVRAM bounds them. At
    /// least 8MiB. Live.
    pub log_limit: Option<ByteCount>,
    /// `space_limit`: bytes of the hub's pool that its image may have together with its CPs that are kept.
    /// A CP that would make it more is refused as by a full pool, for this source only. Default none. At
    /// least 1MiB. Live.
    pub space_limit: Option<ByteCount>,
    /// `bandwidth_limit`: bytes a second that the hub reads from it, of whatever kind; what is more waits
    /// at the source. Default none. 4MiB to 1TiB. Live.
    pub bandwidth_limit: Option<ByteCount>,
    /// `join_by`: until when the source may come for the first time, such as "2026-11-29T12:00:00Z", here in
    /// seconds since 1970: `mirrorhub onboard` writes the end of its join bundle. It says nothing once the
    /// source was there. Default none. Live.
    pub join_by: Option<i64>,
    /// `certificates`: SHA-256 of the certificates that the source may come with, oldest first, as `openssl
    /// x509 -noout -fingerprint -sha256` shows it; at most 8. Once it has come with one, those before it are
    /// refused. `mirrorhub onboard` writes it. Default none: any certificate of the authority with the source's
    /// name. Live: a session with one that is named no more ends.
    pub certificates: Vec<Fingerprint>,
    /// `[[volume]]`: if given, exactly these volumes with these sizes may be announced. Live.
    pub volumes: Vec<VolumeConfig>,
    /// `keep`: CPs that are kept by themselves, as `SOURCE/VOLUME@last-CP`, `@hourly-..` and
    /// `@daily-..`: the newest `last` (0 to 64), one for each of `hourly` hours (0 to 72) and of
    /// `daily` days (0 to 60) in which something was written, in UTC; with `drop_when_full = true`
    /// the oldest are given up when the pool has no room. Default none; without it nothing is
    /// dropped either. Live.
    pub keep: Option<Retention>,
}

/// `source.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceConfig {
    /// The file it was read from.
    pub file: PathBuf,
    /// `name`: the source's name, as on the hub. Required. Restart.
    pub name: SourceName,
    /// `data_dir`: where the source keeps its NVRAM, catalog and `admin.sock`. Default
    /// `source-state` beside the file. Restart.
    pub data_dir: PathBuf,
    /// `hub`: address and port of the hub; loopback. Required. Restart.
    pub hub: SocketAddr,
    /// `nbd_listen`: address and port, or `unix:PATH`, for clients; loopback or unix, or anywhere with
    /// `tls.nbd` or `plain_networks`. Default `127.0.0.1:10809`. Restart.
    pub nbd_listen: Listen,
    /// `http_listen`: address and port, or `unix:PATH`, for metrics, health and status; loopback or
    /// unix, or anywhere with `tls.http` or `plain_networks`. Default `127.0.0.1:7422`. Restart.
    pub http_listen: Listen,
    /// `plain_networks`: as on the hub. Default none. Restart.
    pub plain_networks: Networks,
    /// `lock_memory`: what was touched once stays in memory, for clients on this host. Default false.
    /// Restart.
    pub lock_memory: bool,
    /// `[nvram]`: two partitions of half each. Default 512MiB in `data_dir`.
    pub nvram: NvramConfig,
    /// `checkpoint.interval`: time from one CP to the next, if there is something to say. Default
    /// 10s, 100ms to 24h. Live.
    pub checkpoint_interval: Duration,
    /// `[replication]`: what a write promises.
    pub replication: ReplicationConfig,
    /// `nbd.cache`: when a write is answered. Default `writethrough`. Live at the next CP.
    pub cache: Cache,
    /// `[pool]`: where the volumes are kept.
    pub pool: PoolConfig,
    /// `[tls]`: without it `hub` is on this machine.
    pub tls: Option<TlsConfig>,
    /// `pool.on_full`: what a write gets that has no room. Default `wait`. Restart.
    pub on_full: OnFull,
    /// `[[volume]]`: at least one. Restart.
    pub volumes: Vec<VolumeConfig>,
    /// `[[home]]`: what sources promise that live here by their hub's wish. One without promises
    /// what it promised where it was made. Live at the next CP.
    pub homes: Vec<HomeConfig>,
}

impl SourceConfig {
    /// What the source promises.
    pub fn policy(&self) -> Policy {
        self.replication.policy(self.cache)
    }

    /// What those promise that live here, as far as the file says it.
    pub fn home_policies(&self) -> BTreeMap<SourceName, Policy> {
        let policy = |home: &HomeConfig| (home.name.clone(), home.replication.policy(home.cache));
        self.homes.iter().filter(|home| home.promises).map(policy).collect()
    }

    /// How large volumes of those are to be that live here, as far as the file says it.
    pub fn home_sizes(&self) -> BTreeMap<SourceName, Vec<(VolumeName, ByteCount)>> {
        let sizes = |home: &HomeConfig| {
            let volumes = home.volumes.iter().map(|volume| (volume.name.clone(), volume.size));
            (home.name.clone(), volumes.collect())
        };
        self.homes.iter().map(sizes).collect()
    }
}

/// `[[home]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HomeConfig {
    /// `name`: the source that lives here. Required.
    pub name: SourceName,
    /// `[home.replication]`, without `resync_limit`, which is the filer's.
    pub replication: ReplicationConfig,
    /// `cache`, as `nbd.cache`. Default `writethrough`.
    pub cache: Cache,
    /// Whether it says what that source promises: not if there is nothing but volumes in it.
    pub promises: bool,
    /// `[[home.volume]]`: a volume of it, and how large it is to be. A larger one at the next CP; those that
    /// are not named stay as they are.
    pub volumes: Vec<VolumeConfig>,
}

/// Where something listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// `ADDRESS:PORT`; port 0 takes a free one.
    Tcp(SocketAddr),
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// `[nvram]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvramConfig {
    /// `nvram.path`: file or block device of the ring. Default `nvram` in `data_dir`. Restart.
    pub path: PathBuf,
    /// `nvram.size`: bytes of it that are used. 8MiB to 4TiB. Restart.
    pub size: ByteCount,
    /// `nvram.realtime`: its committing thread runs in a real-time class, if the process has the right.
    /// Default false. Restart.
    pub realtime: bool,
}

/// `[tls]`: sources and hub speak TLS, each with a certificate. Restart; the files are read again by
/// every reload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// `tls.ca`: PEM file of the authority. All three or, on a hub, none: then the hub's own authority
    /// in `tls` of its data_dir.
    pub ca: PathBuf,
    /// `tls.cert`: PEM file of the own certificate; a source's has its name as a DNS name.
    pub cert: PathBuf,
    /// `tls.key`: PEM file of its key.
    pub key: PathBuf,
    /// `tls.hub_name`: the DNS name in the hub's certificate. Default `mirrorhub-hub`.
    pub hub_name: String,
    /// Where the hub's own authority is.
    pub authority: Option<PathBuf>,
    /// `tls.nbd`: how NBD over TCP is served. Default `off`, which is plain, and on loopback or for
    /// `plain_networks`. Restart.
    pub nbd: Door,
    /// `tls.http`: the same for HTTP. Restart.
    pub http: Door,
    /// `tls.served_cert` and `tls.served_key`: PEM files of what NBD and HTTP clients are shown; the
    /// certificate has the addresses or names that they use. Default: `cert` and `key`; with the hub's
    /// own authority one that it makes for the addresses of `nbd_listen` and `http_listen`.
    pub served: (PathBuf, PathBuf),
    /// `tls.client_ca`: PEM file of the authority of clients. Default: `ca`, and then no certificate
    /// with a DNS name in it counts, for that is a source's.
    pub client_ca: Option<PathBuf>,
}

impl TlsConfig {
    /// Whether a door for clients is behind TLS.
    pub fn is_served(&self) -> bool {
        [self.nbd, self.http].iter().any(|door| *door != Door::Off)
    }

    /// The files of the doors for clients.
    pub fn served(&self) -> TlsFiles {
        let ((cert, key), ca) = (self.served.clone(), self.client_ca.as_ref().unwrap_or(&self.ca));
        TlsFiles { ca: ca.clone(), cert, key }
    }
}

words! {
    /// How clients are let in over TCP.
    Door {
        /// Without TLS, on this machine only, or for `plain_networks`.
        Off = "off",
        /// Under TLS; they need no certificate.
        Server = "server",
        /// Under TLS; each shows a certificate.
        Mutual = "mutual",
    }
}

/// `[pool]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// `pool.raid`: how devices make one. Default `none`. Restart.
    pub raid: Raid,
    /// `pool.devices`: at least one. Restart.
    pub devices: Vec<DeviceConfig>,
    /// `pool.scrub`: when everything in use is read and proven.
    pub scrub: ScrubConfig,
    /// `pool.rebuild_limit`: bytes a second that filling a new device reads and writes. Default: no
    /// bound; 64KiB to 1TiB. Restart.
    pub rebuild_limit: Option<ByteCount>,
}

/// `pool.scrub = { every = .., limit = .. }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubConfig {
    /// `every`: a scrub begins so long after the one before ended, counted while the process runs.
    /// Default 168h, 1s to 8760h. Restart.
    pub every: Duration,
    /// `limit`: bytes a second that it reads. Default 50MiB; 64KiB to 1TiB. Restart.
    pub limit: ByteCount,
}

impl Default for ScrubConfig {
    fn default() -> Self {
        Self { every: SCRUB_EVERY, limit: SCRUB_LIMIT }
    }
}

impl PoolConfig {
    /// Bytes that the devices have room for together.
    pub fn size(&self) -> ByteCount {
        match &self.devices[..] {
            [device] if self.raid == Raid::None => device.size,
            devices => {
                let least = devices.iter().map(|device| device.size.0).min().unwrap_or(0);
                let geometry = Geometry::new(self.raid.level(), devices.len(), least);
                ByteCount(geometry.map_or(0, |geometry| geometry.size()))
            }
        }
    }

    /// The same as the labels on the devices say, which alone know of a grown pool what is one array;
    /// where there are no labels yet, as the file says.
    pub fn size_met(&self) -> ByteCount {
        self.files(false).labelled_bytes().map_or_else(|| self.size(), ByteCount)
    }

    /// For the thread that keeps it up.
    pub fn upkeep(&self) -> crate::upkeep::Options {
        let ScrubConfig { every, limit } = self.scrub;
        let rebuild_limit = self.rebuild_limit;
        crate::upkeep::Options { scrub_every: Some(every), scrub_limit: Some(limit), rebuild_limit }
    }

    /// For the process that opens them.
    pub fn files(&self, accept_missing: bool) -> PoolFiles {
        let devices = self.devices.iter().map(|device| (device.path.clone(), device.size));
        PoolFiles {
            level: self.raid.level(),
            devices: devices.collect(),
            accept_missing,
            adding: Vec::new(),
            plain: crate::pool::label::behind,
        }
    }
}

/// One of `pool.devices`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// `path`: file or block device. Required.
    pub path: PathBuf,
    /// `size`: bytes of it that are used; at least 256MiB. Required.
    pub size: ByteCount,
}

/// `[[volume]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeConfig {
    /// `name`: name within the source. Required.
    pub name: VolumeName,
    /// `size`: as clients see it; a multiple of 4KiB, at most 16384TiB. Required.
    pub size: ByteCount,
}

/// `[replication]`: section 9 of the design.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicationConfig {
    /// `mode`: when a write is answered. Default `sync`. Live at the next CP.
    pub mode: Mode,
    /// `lag_limit`: how far the hub may be behind in `semi-sync`. Default 64MiB and 5s; 1MiB to
    /// 1TiB, 10ms to 1h. Live at the next CP.
    pub lag_limit: LagLimit,
    /// `ack`: what the hub has done before it acknowledges. Default `durable`. Live at the next CP.
    pub ack: Ack,
    /// `apply`: how a CP travels. Default `reference`, in `cp-only` `inline`. Live at the next CP.
    pub apply: Apply,
    /// `on_hub_loss`: what happens to writes while the hub is lost. Default `continue`. Live at the
    /// next CP.
    pub on_hub_loss: OnHubLoss,
    /// `hub_timeout`: silence after which the hub counts as lost. Default 5s, 100ms to 1h. Live
    /// at the next CP.
    pub hub_timeout: Duration,
    /// `resync_limit`: bytes a second that bringing the hub's image up may send. Default: no bound;
    /// 64KiB to 1TiB. Restart.
    pub resync_limit: Option<ByteCount>,
}

impl ReplicationConfig {
    /// With how writes are answered.
    fn policy(&self, cache: Cache) -> Policy {
        let Self { mode, lag_limit, ack, apply, on_hub_loss, hub_timeout, .. } = *self;
        Policy { mode, ack, apply, on_hub_loss, cache, lag_limit, hub_timeout }
    }
}

words! {
    /// How the devices of a pool make one.
    Raid {
        /// No redundancy: one device, or stripes over several.
        None = "none",
        /// Every device has everything.
        Mirror = "mirror",
        /// Any one device may fail.
        Parity1 = "parity1",
        /// Any two devices may fail.
        Parity2 = "parity2",
    }
}

impl Raid {
    /// As the array knows it.
    pub const fn level(self) -> Level {
        match self {
            Self::None => Level::None,
            Self::Mirror => Level::Mirror,
            Self::Parity1 => Level::Parity1,
            Self::Parity2 => Level::Parity2,
        }
    }
}
/// Either configuration of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessConfig {
    /// Of a hub.
    Hub(Box<HubConfig>),
    /// Of a source.
    Source(Box<SourceConfig>),
}

impl ProcessConfig {
    /// Where `admin.sock` is.
    pub fn data_dir(&self) -> &Path {
        match self {
            Self::Hub(hub) => &hub.data_dir,
            Self::Source(source) => &source.data_dir,
        }
    }
}
