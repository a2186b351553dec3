//! What a run is made of, drawn from its seed: sources, promises, sizes, workload and faults.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::apart;
use crate::device::sim::{Chance, Effect};
use crate::filer::Behaviour;
use crate::filer::forwarder::ForwardOptions;
use crate::filer::recover::Wanted;
use crate::filer::shared::Backoff;
use crate::hub::HubOptions;
use crate::hub::hooks::HookOptions;
use crate::hub::promoted::PromotedOptions;
use crate::hub::shared::SourceSetting;
use crate::nvlog::{RingOptions, RingShape};
use crate::pool::PoolOptions;
use crate::raid::files::PoolFiles;
use crate::sourcelog::sim::Op;
use crate::units::convert::{to_u64, to_usize};
use crate::units::names::{SourceName, VolumeName};
use crate::units::numbers::ByteCount;
use crate::units::policy::{Ack, Apply, Mode, OnFull, OnHubLoss, Policy};

/// Bytes of each volume.
pub(super) const VOLUME_BYTES: u64 = 256 << 10;
/// Bytes of each volume of a source whose file was made to say so: a tree of one more level.
pub(super) const GROWN_BYTES: u64 = 600 << 10;
/// Volumes of each source.
pub(super) const VOLUMES: u32 = 2;
pub(super) const HUB_RING_BYTES: u64 = 8 << 20;
pub(super) const HUB_POOL_BYTES: u64 = 24 << 20;
pub(super) const SOURCE_POOL_BYTES: u64 = 16 << 20;
pub(super) const HUB_TIMEOUT: Duration = Duration::from_millis(800);

/// Something that goes wrong, or right again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The power of a source goes: now, or inside the n-th change of its devices.
    SourceCut {
        source: usize,
        nth: Option<u64>,
    },
    SourceKill {
        source: usize,
    },
    HubCut {
        nth: Option<u64>,
    },
    HubKill,
    LinkCut {
        source: usize,
        keep: usize,
    },
    LinkHold {
        source: usize,
        held: [bool; 2],
        ms: u64,
    },
    PauseSource {
        source: usize,
        ms: u64,
    },
    PauseHub {
        ms: u64,
    },
    /// The n-th write of a device fails, for want of room or torn.
    SourceError {
        source: usize,
        ring: bool,
        nth: u64,
    },
    HubError {
        ring: bool,
        nth: u64,
    },
    /// The disk of the hub's logs takes that no more, until the hub is started again.
    HubFiles {
        op: Op,
        errno: i32,
    },
    /// A pool has no room for some time. The hub comes behind the sources.
    Full {
        end: usize,
        ms: u64,
    },
    /// Some blocks of an image rot, of a mirror on one leg.
    Rot {
        end: usize,
        seed: u64,
    },
    /// The n-th write of data to one leg of a mirror is lost, or falls on another block.
    Lie {
        end: usize,
        nth: u64,
        astray: Option<u64>,
    },
    /// The connections of a source stand still, newer ones do not: later they come alive again. If
    /// `coming`, those as well that are made meanwhile.
    Strand {
        source: usize,
        coming: bool,
        ms: u64,
    },
    /// Threads of that name take their time.
    Slow {
        thread: &'static str,
        ms: u64,
    },
    Checkpoint {
        source: usize,
    },
    Failover {
        source: usize,
    },
    Failback {
        source: usize,
    },
    /// The source's file makes its volumes larger, and is read again if it runs.
    Grow {
        source: usize,
    },
    /// The source is restored from an old copy, which is started so many times before it is left
    /// alone for a while.
    OldCopy {
        source: usize,
        boots: u64,
    },
    /// An end goes down, with its power or without; a record of its ring, that was acknowledged for sure,
    /// has rotted when it comes up. The hub comes behind the sources.
    RotRing {
        end: usize,
        power: bool,
        seed: u64,
    },
    /// The same of a source log of the hub.
    RotLog {
        power: bool,
        seed: u64,
    },
}

/// A fault and when it comes, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planned {
    pub(super) at_ms: u64,
    pub(super) fault: Fault,
}

/// A source as it is configured.
#[derive(Debug, Clone)]
pub(super) struct SourceSetup {
    pub(super) name: SourceName,
    pub(super) policy: Policy,
    pub(super) ring_bytes: u64,
    pub(super) interval: Duration,
    pub(super) clients: usize,
    /// Longest pause of a client between two requests.
    pub(super) think_ms: u64,
    /// Largest request.
    pub(super) request_bytes: u64,
    /// Its volumes will grow in this run; its file says so by now.
    pub(super) grows: bool,
    pub(super) grown: bool,
    /// Where both ends have written, its side stays.
    pub(super) keeps: bool,
    /// Bytes a second that bring its image up.
    pub(super) resync_limit: Option<ByteCount>,
}

/// A run.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) seed: u64,
    pub(super) sources: Vec<SourceSetup>,
    pub(super) delay_ms: u64,
    pub(super) work_ms: u64,
    /// Most time between the end of a source and its next start; of the hub twice that.
    pub(super) down_ms: u64,
    pub(super) faults: Vec<Planned>,
    /// Whose pool lies on a mirror: the sources, then the hub.
    pub(super) mirrored: Vec<bool>,
    /// A fault that comes by the number of the call.
    pub(super) sweep: Option<Sweep>,
}

/// The n-th call of one store in one life of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sweep {
    pub(super) store: Store,
    /// Lives of its end before.
    pub(super) lives: u32,
    pub(super) nth: u64,
    pub(super) effect: Effect,
    /// The power goes with the process, and the page cache with it.
    pub(super) power: bool,
    /// The source waits for the sync of its log: else nobody does in so short a run.
    pub(super) filed: bool,
}

impl Store {
    pub(super) fn is_of_hub(self) -> bool {
        matches!(self, Self::HubRing | Self::HubPool | Self::HubFiles)
    }
}

/// What an end keeps things in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    SourceRing,
    SourcePool,
    HubRing,
    HubPool,
    HubFiles,
}

impl Setup {
    /// The run of that seed.
    pub(super) fn of(seed: u64) -> Self {
        let mut chance = Chance::new(seed.wrapping_mul(0x9e37_79b9).wrapping_add(17));
        let count = 1 + to_usize(chance.below(2));
        let mut sources: Vec<_> = (0..count).map(|at| SourceSetup::of(at, &mut chance)).collect();
        let work_ms = 2000 + chance.below(2500);
        let faults = 2 + chance.below(7);
        let mut faults: Vec<Planned> = (0..faults)
            .map(|_| Planned {
                at_ms: 100 + chance.below(work_ms),
                fault: Fault::of(count, &mut chance),
            })
            .collect();
        faults.sort_by_key(|planned| planned.at_ms);
        let delay_ms = [0, 1, 3, 20][to_usize(chance.below(4))];
        let mirrored = (0..=count).map(|_| chance.below(3) == 0).collect();
        let down_ms = 1400;
        apart::draw(seed, &mut sources, &mut faults);
        let setup =
            Self { seed, sources, delay_ms, work_ms, down_ms, faults, mirrored, sweep: None };
        setup.within_redundancy()
    }

    /// The run of that seed in which the volumes of each source grow at some moment, most with some
    /// of the time close to another fault.
    pub(super) fn growing(seed: u64) -> Self {
        let mut setup = Self::of(seed);
        let mut chance = Chance::new(seed ^ 0x6709);
        for at in 0..setup.sources.len() {
            setup.sources[at].grows = true;
            let near = &setup.faults[to_usize(chance.below(to_u64(setup.faults.len())))];
            let at_ms = if chance.below(3) > 0 {
                near.at_ms.saturating_sub(chance.below(60))
            } else {
                chance.below(setup.work_ms)
            };
            setup.faults.push(Planned { at_ms, fault: Fault::Grow { source: at } });
        }
        setup.faults.sort_by_key(|planned| planned.at_ms);
        setup
    }

    /// The run of that seed in which sources are alone for a while, and write faster than their images are
    /// brought up: what they write meanwhile is sent behind the passes.
    pub(super) fn outrun(seed: u64) -> Self {
        let mut setup = Self::of(seed);
        let mut chance = Chance::new(seed ^ 0x0c7a);
        // Who goes on alone has no other copy of what an old one, or rot, takes from him.
        let ends = setup.sources.len();
        setup.faults.retain(|planned| {
            let old = matches!(planned.fault, Fault::OldCopy { .. });
            let rots = matches!(planned.fault, Fault::RotRing { end, .. } if end != ends);
            !old && !rots
        });
        let mut end_ms = setup.work_ms;
        for (at, source) in setup.sources.iter_mut().enumerate() {
            let policy = &mut source.policy;
            (policy.mode, policy.on_hub_loss) = (Mode::Sync, OnHubLoss::Continue);
            (source.think_ms, source.ring_bytes) = (source.think_ms.min(4), 2 << 20);
            source.interval = Duration::from_millis(100 + chance.below(300));
            source.resync_limit = Some(ByteCount((64 << 10) + chance.below(256 << 10)));
            let (at_ms, ms) = (200 + chance.below(600), 1000 + chance.below(1000));
            let fault = Fault::LinkHold { source: at, held: [true, true], ms };
            setup.faults.push(Planned { at_ms, fault });
            end_ms = end_ms.max(at_ms + ms + 2500);
        }
        setup.work_ms = end_ms;
        setup.faults.sort_by_key(|planned| planned.at_ms);
        setup.within_redundancy()
    }

    /// The run of that seed in which a source goes on alone while its hub is promoted, and its side is kept.
    pub(super) fn keeping(seed: u64) -> Self {
        let mut setup = Self::of(seed);
        let mut chance = Chance::new(seed ^ 0x1ee9);
        let source = to_usize(chance.below(to_u64(setup.sources.len())));
        setup.faults.retain(|planned| {
            !matches!(planned.fault, Fault::OldCopy { .. } | Fault::Failback { .. })
        });
        for source in &mut setup.sources {
            source.keeps = true;
        }
        let policy = &mut setup.sources[source].policy;
        (policy.mode, policy.on_hub_loss) = (Mode::Sync, OnHubLoss::Continue);
        let at_ms = 300 + chance.below(600);
        let held = [[true, true], [true, false], [false, true]][to_usize(chance.below(3))];
        let ms = 1500 + chance.below(1500);
        let mut plan = |at_ms, fault| setup.faults.push(Planned { at_ms, fault });
        plan(at_ms, Fault::LinkHold { source, held, ms });
        plan(at_ms + chance.below(1400), Fault::Failover { source });
        plan(at_ms + ms + 300 + chance.below(600), Fault::Failback { source });
        setup.faults.sort_by_key(|planned| planned.at_ms);
        setup.work_ms = setup.work_ms.max(at_ms + ms + 1500);
        setup.within_redundancy()
    }

    /// What is lost at one end and on one device is at the other end only as long as nothing moves.
    fn within_redundancy(mut self) -> Self {
        let ends: Vec<usize> = self.faults.iter().filter_map(|planned| planned.rots()).collect();
        let Some(first) = ends.into_iter().find(|end| !self.mirrored[*end]) else { return self };
        let mirrored = self.mirrored.clone();
        self.faults.retain(|planned| {
            let fault = &planned.fault;
            let moves = matches!(fault, Fault::Failover { .. } | Fault::Failback { .. });
            !moves && planned.rots().is_none_or(|end| end == first || mirrored[end])
        });
        self
    }

    /// A short run of one source: both ends are killed once, and a CP is made now and then.
    pub(super) fn scenario(sweep: Sweep, stop: bool) -> Self {
        let on_hub_loss = if stop { OnHubLoss::Stop } else { OnHubLoss::Continue };
        let ack = if sweep.filed { Ack::Filed } else { Ack::Durable };
        let policy = Policy { ack, on_hub_loss, hub_timeout: HUB_TIMEOUT, ..Policy::default() };
        let source = SourceSetup {
            name: "filer-a".parse().unwrap(),
            policy,
            ring_bytes: 2 << 20,
            interval: Duration::from_millis(60),
            clients: 1,
            think_ms: 10,
            request_bytes: 12 << 10,
            grows: false,
            grown: false,
            keeps: false,
            resync_limit: None,
        };
        let planned = |at_ms, fault| Planned { at_ms, fault };
        Self {
            seed: 1,
            sources: vec![source],
            delay_ms: 1,
            work_ms: 300,
            down_ms: 15,
            faults: vec![
                planned(120, Fault::SourceKill { source: 0 }),
                planned(200, Fault::HubKill),
            ],
            mirrored: vec![false, false],
            sweep: Some(sweep),
        }
    }
}

impl Planned {
    /// Whose pool it damages where that is the only device.
    fn rots(&self) -> Option<usize> {
        if let Fault::Rot { end, .. } = self.fault { Some(end) } else { None }
    }
}

impl SourceSetup {
    fn of(at: usize, chance: &mut Chance) -> Self {
        let name = ["filer-a", "filer-b", "filer-c"][at].parse().unwrap();
        let on_hub_loss = if chance.below(2) == 0 { OnHubLoss::Continue } else { OnHubLoss::Stop };
        let (mode, on_hub_loss) = match chance.below(10) {
            0 => (Mode::SemiSync, on_hub_loss),
            1 => (Mode::Async, OnHubLoss::Continue),
            2 => (Mode::CpOnly, OnHubLoss::Continue),
            _ => (Mode::Sync, on_hub_loss),
        };
        let ack = match chance.below(6) {
            _ if mode == Mode::CpOnly => Ack::Durable,
            0 => Ack::Received,
            1 => Ack::Filed,
            _ => Ack::Durable,
        };
        let apply = match chance.below(6) {
            _ if mode == Mode::CpOnly => Apply::Inline,
            0 => Apply::Inline,
            1 => Apply::Replay,
            _ => Apply::Reference,
        };
        let hub_timeout = HUB_TIMEOUT;
        Self {
            name,
            policy: Policy { mode, ack, apply, on_hub_loss, hub_timeout, ..Policy::default() },
            ring_bytes: [2 << 20, 3 << 20, 4 << 20][to_usize(chance.below(3))],
            interval: Duration::from_millis([300, 1000, 5000][to_usize(chance.below(3))]),
            clients: 1 + to_usize(chance.below(2)),
            think_ms: [6, 30, 80][to_usize(chance.below(3))],
            request_bytes: [4096, 12 << 10, 64 << 10][to_usize(chance.below(3))],
            grows: false,
            grown: false,
            keeps: false,
            resync_limit: None,
        }
    }

    /// Its hub has all that it was ever answered for, and is asked before it serves.
    pub(super) fn asks_first(&self) -> bool {
        let Policy { mode, ack, .. } = self.policy;
        self.policy.never_alone() && mode == Mode::Sync && ack != Ack::Received
    }

    /// Its volumes, as its file has them.
    pub(super) fn volumes(&self) -> Vec<(VolumeName, ByteCount)> {
        let size = ByteCount(if self.grown { GROWN_BYTES } else { VOLUME_BYTES });
        (0..VOLUMES).map(|number| (format!("vol{number}").parse().unwrap(), size)).collect()
    }

    /// How its process is told to run.
    pub(super) fn behaviour(&self, at: usize, accept_lost_nvram: bool) -> Behaviour {
        Behaviour {
            wanted: Wanted {
                name: self.name.clone(),
                volumes: self.volumes(),
                policy: self.policy,
                checkpoint_interval: self.interval,
                accept_lost_nvram,
                accept_untold_policy: false,
                on_full: OnFull::Wait,
                ring: RingOptions { thread_name: "nvram".to_owned(), ..RingOptions::default() },
                ring_shape: RingShape { area_bytes_min: 1 << 20, commit_bytes_max: 512 << 10 },
                pool: PoolOptions {
                    catalog_cache_bytes: 1 << 20,
                    node_cache_bytes: 1 << 20,
                    ..PoolOptions::default()
                },
            },
            forward: ForwardOptions {
                hub: address(at),
                tls: None,
                backoff: Backoff {
                    least: Duration::from_millis(20),
                    most: Duration::from_millis(200),
                },
                seed: 7,
                resync_limit: self.resync_limit,
            },
            stop_timeout: Duration::from_secs(10),
        }
    }
}

/// The address by which a source's way to the hub is known.
pub(super) fn address(at: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 100 + u16::try_from(at).unwrap()))
}

/// How the hub's process is told to run.
pub(super) fn hub_options(setup: &Setup) -> HubOptions {
    let nowhere = PathBuf::from("/nowhere/simulated");
    let setting = |source: &SourceSetup| SourceSetting {
        name: source.name.clone(),
        nvram_share: None,
        log_limit: None,
        space_limit: None,
        bandwidth_limit: None,
        join_by: None,
        certificates: vec![],
        volumes: vec![],
        keep: None,
    };
    HubOptions {
        data_dir: nowhere.clone(),
        listen: address(0),
        tls: None,
        nvram: (nowhere.clone(), ByteCount(HUB_RING_BYTES)),
        realtime: false,
        log_dir: nowhere.clone(),
        pool: PoolFiles::plain(nowhere, ByteCount(HUB_POOL_BYTES)),
        sources: setup.sources.iter().map(setting).collect(),
        image_pin: Duration::from_secs(3600),
        appliers: 2,
        arbiters: 1,
        promoted: PromotedOptions {
            nvram_size: ByteCount(8 << 20),
            checkpoint_interval: Duration::from_millis(500),
            ..PromotedOptions::default()
        },
        hooks: HookOptions::default(),
    }
}

/// Weights of [`Fault::of`], all together.
const KINDS: u64 = 34;

impl Fault {
    fn of(sources: usize, chance: &mut Chance) -> Self {
        let ends = u64::try_from(sources).unwrap() + 1;
        let source = to_usize(chance.below(ends - 1));
        let nth = Some(chance.below(40)).filter(|nth| nth % 4 > 0);
        let ms = [50, 300, 900, 2500][to_usize(chance.below(4))] + chance.below(200);
        match chance.below(KINDS) {
            0..4 => Self::SourceCut { source, nth },
            4 => Self::SourceKill { source },
            5..8 => Self::HubCut { nth },
            8 => Self::HubKill,
            9 | 10 => Self::LinkCut { source, keep: to_usize(chance.below(3000)) },
            11..14 => {
                let held = [[true, true], [true, false], [false, true]];
                Self::LinkHold { source, held: held[to_usize(chance.below(3))], ms }
            }
            14 => Self::PauseSource { source, ms },
            15 => Self::PauseHub { ms },
            16 => Self::SourceError { source, ring: chance.below(2) == 0, nth: chance.below(30) },
            17 => Self::HubError { ring: chance.below(2) == 0, nth: chance.below(30) },
            24 => {
                let op = [Op::Create, Op::Write, Op::ShortWrite, Op::Writeback, Op::SyncDir];
                let errno = [5, 28][to_usize(chance.below(2))];
                Self::HubFiles { op: op[to_usize(chance.below(5))], errno }
            }
            25 => Self::Full { end: to_usize(chance.below(ends)), ms },
            26 | 27 => Self::Rot { end: to_usize(chance.below(ends)), seed: chance.next_u64() },
            28 | 29 => {
                let astray = Some(chance.next_u64()).filter(|block| block % 2 == 0);
                Self::Lie { end: to_usize(chance.below(ends)), nth: chance.below(30), astray }
            }
            30 => Self::Strand { source, coming: false, ms },
            31 => Self::Strand { source, coming: true, ms: ms * 5 },
            18 => {
                let threads =
                    ["nvram", "hub-commit", "hub-drain", "hub-apply", "checkpoint", "blocking"];
                Self::Slow { thread: threads[to_usize(chance.below(6))], ms }
            }
            19 => Self::Checkpoint { source },
            20..=22 => Self::Failover { source },
            _ => Self::Failback { source },
        }
    }
}
