//! Every metric of the program: name, unit, kind, help and labels, each once.
//!
//! Used as `metrics::counter!(catalogue::SOURCE_RECEIVED_BYTES.name, "source" => name)`. A label
//! has a closed list of values wherever the program and not the administrator chooses them; the
//! lists are public, so that the place that sets a label cannot invent a value that no dashboard
//! knows. Dashboards and alert rules are held to these names by tests.

/// Unit of a metric, last in its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// `_bytes`.
    Bytes,
    /// `_seconds`.
    Seconds,
    /// Things counted; the noun is the unit.
    Count,
    /// `_info`: always 1, the labels say it.
    Info,
    /// A level or a yes (1) or no (0).
    Level,
}

/// How a metric moves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only rises while the process lives.
    Counter,
    /// Goes both ways.
    Gauge,
    /// Distribution over fixed bucket bounds, in the metric's unit.
    Histogram {
        /// Upper bounds, rising; `+Inf` is implied.
        buckets: &'static [f64],
    },
}

/// Values that a label can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Names of sources.
    Sources,
    /// Names of volumes.
    Volumes,
    /// One value at a time for each series of the other labels.
    One,
    /// These words.
    Closed(&'static [&'static str]),
}

/// One label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// Name.
    pub name: &'static str,
    /// What it can be.
    pub values: Values,
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Full name as Prometheus sees it.
    pub name: &'static str,
    /// Unit, last in the name.
    pub unit: Unit,
    /// How it moves.
    pub kind: Kind,
    /// One line without a full stop.
    pub help: &'static str,
    /// Labels, each series has all of them.
    pub labels: &'static [Label],
}

/// Words of the label `state`: the states of section 13, as in status. A source that was retired has
/// no series.
pub const STATES: &[&str] =
    &["waiting", "syncing", "in-sync", "behind", "offline", "failed-over", "fenced", "faulted"];
/// Words of the label `result` of a command of `section hooks`.
pub const HOOK_RESULTS: &[&str] = &["done", "failed"];
/// Words of the label `action` of CPs that are kept by themselves.
pub const RETENTION_ACTIONS: &[&str] = &["kept", "dropped"];
/// Words of the label `phase` of a CP, in their order.
pub const CHECKPOINT_PHASES: &[&str] = &["freeze", "plan", "build", "publish"];
/// Words of the label `step`: of the ladder, behind what is acknowledged.
pub const STEPS: &[&str] = &["staged", "drained", "applied", "visible"];
/// Words of the label `kind` of what a CP carries.
pub const CHECKPOINT_KINDS: &[&str] = &["reference", "inline", "hole"];
/// Words of the label `cursor`, in their order (invariant 5).
pub const CURSORS: &[&str] = &["released", "durable", "written"];
/// Words of the label `device`: what the bytes are for.
pub const DEVICES: &[&str] = &["nvram", "log", "pool"];
/// Words of the label `state` of the pool's devices.
pub const POOL_DEVICE_STATES: &[&str] = &["in", "failed", "rebuilding"];
/// Words of the label `command` of NBD requests.
pub const NBD_COMMANDS: &[&str] =
    &["read", "write", "flush", "trim", "write_zeroes", "cache", "block_status"];
/// Words of the label `reason` of refused connections: those of the wire's `RefusedCode`, in its
/// order. A test there holds the two together.
pub const REFUSALS: &[&str] = &[
    "version",
    "unknown_source",
    "other_source",
    "other_hub",
    "generation",
    "diverged",
    "gap",
    "volume",
    "faulted",
    "busy",
    "protocol",
    "fenced",
];

const SOURCE: Label = Label { name: "source", values: Values::Sources };
const VOLUME: Label = Label { name: "volume", values: Values::Volumes };

/// Latencies from 16 us to 16 s, doubling.
const LATENCY_SECONDS: &[f64] = &[
    0.000_016, 0.000_032, 0.000_064, 0.000_128, 0.000_256, 0.000_512, 0.001, 0.002, 0.004, 0.008,
    0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0, 16.0,
];
/// A CP from 1 ms to 17 min.
const CHECKPOINT_SECONDS: &[f64] = &[
    0.001, 0.004, 0.016, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0,
    1024.0,
];
/// A group commit from one small record to the largest batch.
const BATCH_BYTES: &[f64] = &[
    1024.0,
    4096.0,
    8192.0,
    16_384.0,
    32_768.0,
    65_536.0,
    131_072.0,
    262_144.0,
    524_288.0,
    1_048_576.0,
    2_097_152.0,
    4_194_304.0,
];
/// Records in a group commit.
const BATCH_RECORDS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0];

macro_rules! catalogue {
    ($($(#[$doc:meta])* $id:ident = $name:literal, $unit:ident, $kind:expr, [$($label:expr),*], $help:literal;)*) => {
        $(
            $(#[$doc])*
            #[doc = concat!("`", $name, "`: ", $help, ".")]
            pub const $id: Metric = Metric {
                name: $name,
                unit: Unit::$unit,
                kind: $kind,
                help: $help,
                labels: &[$($label),*],
            };
        )*
        /// All of them.
        pub const ALL: &[&Metric] = &[$(&$id),*];
    };
}

const fn closed(name: &'static str, words: &'static [&'static str]) -> Label {
    Label { name, values: Values::Closed(words) }
}

const fn one(name: &'static str) -> Label {
    Label { name, values: Values::One }
}

const fn histogram(buckets: &'static [f64]) -> Kind {
    Kind::Histogram { buckets }
}

catalogue! {
    // ---- the process ----
    BUILD_INFO = "mirrorhub_build_info", Info, Kind::Gauge, [one("version"), one("role")],
        "Always 1; version of the program and role of the process: hub or source";
    HEALTH_STATUS = "mirrorhub_health_status", Level, Kind::Gauge, [],
        "Health of the process: 0 ok, 1 warning, 2 critical";
    CONNECTIONS_REFUSED = "mirrorhub_refused_connections_total", Count, Kind::Counter,
        [closed("reason", REFUSALS)],
        "Connections closed because of what they sent or who they were";

    // ---- one source ----
    SOURCE_STATE = "mirrorhub_source_state", Level, Kind::Gauge,
        [SOURCE, closed("state", STATES)],
        "1 for the state that the source is in, 0 for the others";
    SOURCE_POLICY = "mirrorhub_source_policy_info", Info, Kind::Gauge,
        [SOURCE, one("mode"), one("ack"), one("apply"), one("on_hub_loss")],
        "1 for what the source promises; what it promised before is not shown";
    SOURCE_ACKNOWLEDGED_BYTES = "mirrorhub_source_acknowledged_bytes_total", Bytes, Kind::Counter,
        [SOURCE], "Bytes of writes answered to clients";
    SOURCE_STAGED_BYTES = "mirrorhub_source_staged_bytes_total", Bytes, Kind::Counter,
        [SOURCE], "Bytes of writes durable in the ring of the hub";
    SOURCE_DRAINED_BYTES = "mirrorhub_source_drained_bytes_total", Bytes, Kind::Counter,
        [SOURCE], "Bytes of writes moved from the ring to the source log";
    SOURCE_APPLIED_BYTES = "mirrorhub_source_applied_bytes_total", Bytes, Kind::Counter,
        [SOURCE], "Bytes of writes in the new tree of the image";
    SOURCE_VISIBLE_BYTES = "mirrorhub_source_visible_bytes_total", Bytes, Kind::Counter,
        [SOURCE], "Bytes of writes in the published CP";
    SOURCE_LAG_BYTES = "mirrorhub_source_lag_bytes", Bytes, Kind::Gauge,
        [SOURCE], "Bytes acknowledged and not yet visible in the image; NaN where it cannot be known";
    SOURCE_LAG_SECONDS = "mirrorhub_source_lag_seconds", Seconds, Kind::Gauge,
        [SOURCE], "Age of the oldest acknowledged write that the image does not show yet; NaN where unknown";
    SOURCE_IMAGE_AGE_SECONDS = "mirrorhub_source_image_age_seconds", Seconds, Kind::Gauge,
        [SOURCE], "Time since the image was last known equal to the source, at least; NaN before both met";
    SOURCE_RECEIVED_BYTES = "mirrorhub_source_received_bytes_total", Bytes, Kind::Counter,
        [SOURCE], "Bytes of frames received from the source: transfers, checkpoints, passes and pings, headers included, without TLS and TCP";
    SOURCE_RESYNC_BYTES = "mirrorhub_source_resync_bytes_total", Bytes, Kind::Counter,
        [SOURCE], "Bytes received for passes that bring the image up, sent or pulled by comparison";
    SOURCE_CHECKPOINTS = "mirrorhub_source_checkpoints_total", Count, Kind::Counter,
        [SOURCE], "CPs published";
    SOURCE_CHECKPOINTS_REJECTED = "mirrorhub_source_rejected_checkpoints_total", Count,
        Kind::Counter, [SOURCE],
        "CPs refused by the hub; each is counted, it is never normal";
    SOURCE_CHECKPOINT_TIME = "mirrorhub_source_checkpoint_timestamp_seconds", Seconds, Kind::Gauge,
        [SOURCE], "When the last CP was published, in seconds since 1970; NaN before the first since the start";
    SOURCE_DRILL_TIME = "mirrorhub_source_drill_timestamp_seconds", Seconds, Kind::Gauge,
        [SOURCE], "When failover was last tried with --dry-run, or done, and not refused, in seconds \
                   since 1970; NaN if it never was";
    SOURCE_WRITE_SHARE = "mirrorhub_source_write_share_ratio", Level, Kind::Gauge,
        [SOURCE], "Share of the source in the bytes of writes of all sources that became durable on the \
                   hub since the newest scrape at least 10 s ago, or since the start; 0 to 1";
    SOURCE_REFUSED_VOLUMES = "mirrorhub_source_refused_volumes", Count, Kind::Gauge,
        [SOURCE], "Volumes of the source that are not mirrored because both ends do not agree on \
                   them, or whose image is not brought up again yet";
    SOURCE_LOG_BYTES = "mirrorhub_source_log_bytes", Bytes, Kind::Gauge,
        [SOURCE], "Bytes in the source logs of the source";

    ACTOR_RESTARTS = "mirrorhub_actor_restarts_total", Count, Kind::Counter, [],
        "Times that the actor of a source was started again after a panic; the log says of which";
    STEP_AGE_SECONDS = "mirrorhub_step_age_seconds", Seconds, Kind::Gauge,
        [closed("step", STEPS)],
        "Age of the oldest write of any source that waits for that step of the ladder; of those sources \
         where it is known";

    HOOK_RUNS = "mirrorhub_hook_runs_total", Count, Kind::Counter,
        [closed("result", HOOK_RESULTS)],
        "Commands of section hooks that were run when volumes had moved, by how they ended";

    RETENTION = "mirrorhub_retention_checkpoints_total", Count, Kind::Counter,
        [closed("action", RETENTION_ACTIONS)],
        "CPs that were kept, and dropped, as `keep` in the sources' files says";

    TLS_CERTIFICATE_ENDS = "mirrorhub_tls_certificate_expiry_timestamp_seconds", Seconds, Kind::Gauge,
        [], "When the own certificate ends, in seconds since 1970; not a number without TLS";

    // ---- one volume ----
    VOLUME_SIZE_BYTES = "mirrorhub_volume_size_bytes", Bytes, Kind::Gauge,
        [SOURCE, VOLUME], "Size of the volume as clients see it";
    VOLUME_REFUSED = "mirrorhub_volume_refused", Count, Kind::Gauge,
        [SOURCE, VOLUME], "1 for a volume that is not mirrored, or is being brought up while others are in step; else 0";

    // ---- writes and the ring ----
    CLIENT_WRITE_SECONDS = "mirrorhub_client_write_duration_seconds", Seconds,
        histogram(LATENCY_SECONDS), [],
        "Time from reading a client's write to answering it under the policy in force";
    ACK_SECONDS = "mirrorhub_ack_duration_seconds", Seconds, histogram(LATENCY_SECONDS), [],
        "Time from a transfer to its acknowledgement: on a source from forming it to the hub's answer, \
         on a hub from its arrival to its being durable there";
    DRAIN_SECONDS = "mirrorhub_drain_duration_seconds", Seconds, histogram(LATENCY_SECONDS), [],
        "Time from a transfer's being durable in the ring to its lying in the source log";
    NVRAM_CAPACITY_BYTES = "mirrorhub_nvram_capacity_bytes", Bytes, Kind::Gauge, [],
        "Size of the ring";
    NVRAM_USED_BYTES = "mirrorhub_nvram_used_bytes", Bytes, Kind::Gauge, [],
        "Bytes of the ring that are not released";
    NVRAM_CURSOR_BYTES = "mirrorhub_nvram_position_bytes", Bytes, Kind::Gauge,
        [closed("cursor", CURSORS)],
        "Cursors of the ring, in bytes since it was made";
    NVRAM_COMMITS = "mirrorhub_nvram_commits_total", Count, Kind::Counter, [],
        "Group commits of the ring";
    NVRAM_COMMIT_SECONDS = "mirrorhub_nvram_commit_duration_seconds", Seconds,
        histogram(LATENCY_SECONDS), [], "Time of one group commit, write and sync";
    NVRAM_COMMIT_BATCH_BYTES = "mirrorhub_nvram_commit_batch_bytes", Bytes,
        histogram(BATCH_BYTES), [], "Bytes of one group commit";
    NVRAM_COMMIT_BATCH_RECORDS = "mirrorhub_nvram_commit_batch_records", Count,
        histogram(BATCH_RECORDS), [], "Records of one group commit";

    // ---- consistency points and the pool ----
    CHECKPOINT_DURATION_SECONDS = "mirrorhub_checkpoint_duration_seconds", Seconds,
        histogram(CHECKPOINT_SECONDS), [], "Time of one CP from freeze to CpDone";
    CHECKPOINT_PHASE_SECONDS = "mirrorhub_checkpoint_phase_duration_seconds", Seconds,
        histogram(CHECKPOINT_SECONDS), [closed("phase", CHECKPOINT_PHASES)],
        "Time of one phase of a CP. On a source: freeze until that is durable, plan what is sent, build the \
         own tree, until it is published on the hub. On a hub: build from its begin to proven trees, publish";
    CHECKPOINT_BLOCKS = "mirrorhub_checkpoint_blocks_total", Count, Kind::Counter,
        [closed("kind", CHECKPOINT_KINDS)],
        "Blocks that CPs carried: by reference into the log, inline, or as holes";
    CHECKPOINT_BYTES = "mirrorhub_checkpoint_wire_bytes_total", Bytes, Kind::Counter,
        [closed("kind", CHECKPOINT_KINDS)],
        "Bytes of payload of CP data by kind of block; frame headers are not counted";
    CATALOG_COMMITS = "mirrorhub_catalog_commits_total", Count, Kind::Counter, [],
        "Commits of the catalog; the CPs of several sources share one";
    POOL_CAPACITY_BYTES = "mirrorhub_pool_capacity_bytes", Bytes, Kind::Gauge, [],
        "Size of the pool";
    POOL_PENDING_DEVICES = "mirrorhub_pool_pending_devices", Count, Kind::Gauge, [],
        "Devices whose addition to the pool has not come to its end";
    POOL_FREE_BYTES = "mirrorhub_pool_free_bytes", Bytes, Kind::Gauge, [],
        "Bytes of the pool that are free";
    POOL_USED_BYTES = "mirrorhub_pool_used_bytes", Bytes, Kind::Gauge, [],
        "Bytes of the pool in use, pinned ones included";
    POOL_PINNED_BYTES = "mirrorhub_pool_pinned_bytes", Bytes, Kind::Gauge, [],
        "Bytes of the pool in use only because a reader pins an older CP";
    ROT_FOUND = "mirrorhub_rot_found_total", Count, Kind::Counter, [],
        "Blocks and nodes of the pool that failed their check";
    ROT_REPAIRED = "mirrorhub_rot_repaired_total", Count, Kind::Counter, [],
        "Blocks and nodes that were got from the other end and written to a new place";
    ROT_LOST = "mirrorhub_rot_lost", Count, Kind::Gauge, [],
        "Blocks and nodes that cannot be read and could not be got from the other end";
    POOL_DEVICES = "mirrorhub_pool_devices", Count, Kind::Gauge,
        [closed("state", POOL_DEVICE_STATES)],
        "Devices of the pool: in use, failed or missing, being rebuilt";
    POOL_REPAIRED_BLOCKS = "mirrorhub_pool_repaired_blocks_total", Count, Kind::Counter, [],
        "Blocks that were not right and were rewritten from another copy";
    POOL_DAMAGED_READS = "mirrorhub_pool_damaged_reads_total", Count, Kind::Counter, [],
        "Reads of blocks of which no copy was right";
    SCRUB_RUNNING = "mirrorhub_scrub_running", Count, Kind::Gauge, [],
        "1 while everything in use is being read and proven";
    SCRUB_DONE_BYTES = "mirrorhub_scrub_done_bytes", Bytes, Kind::Gauge, [],
        "Bytes that the scrub under way, or the last one, has read";
    SCRUB_TOTAL_BYTES = "mirrorhub_scrub_total_bytes", Bytes, Kind::Gauge, [],
        "Bytes that the scrub under way, or the last one, reads in all";
    SCRUB_REPAIRED = "mirrorhub_scrub_repaired_blocks", Count, Kind::Gauge, [],
        "Blocks and copies that the scrub under way, or the last one, has mended";
    SCRUB_LOST = "mirrorhub_scrub_lost_blocks", Count, Kind::Gauge, [],
        "Blocks of which the scrub under way, or the last one, found no right copy";
    SCRUB_TIME = "mirrorhub_scrub_timestamp_seconds", Seconds, Kind::Gauge, [],
        "When the last whole scrub ended, in seconds since 1970; NaN where that is not known";
    SCRUB_AGE_SECONDS = "mirrorhub_scrub_age_seconds", Seconds, Kind::Gauge, [],
        "Time that the pool was open since its last whole scrub; NaN if there was none";
    REBUILD_DONE_BYTES = "mirrorhub_rebuild_done_bytes", Bytes, Kind::Gauge, [],
        "Bytes of a new device that were filled since the process began with it";
    REBUILD_TOTAL_BYTES = "mirrorhub_rebuild_total_bytes", Bytes, Kind::Gauge, [],
        "Bytes of a new device that are in use and were to be filled; 0 if none is being filled";
    REBUILD_LOST_BLOCKS = "mirrorhub_rebuild_lost_blocks", Count, Kind::Gauge, [],
        "Blocks of a new device that could not be had from the others";
    IMAGE_PINS = "mirrorhub_image_pins", Count, Kind::Gauge, [],
        "CPs pinned for open readers";

    // ---- devices and NBD ----
    DEVICE_SYNCS = "mirrorhub_device_syncs_total", Count, Kind::Counter,
        [closed("device", DEVICES)], "Sync calls and durable writes";
    DEVICE_ERRORS = "mirrorhub_device_errors_total", Count, Kind::Counter,
        [closed("device", DEVICES)], "I/O errors; the first one latches its device";
    NBD_CONNECTIONS = "mirrorhub_nbd_connections", Count, Kind::Gauge, [],
        "NBD connections open";
    NBD_CLIENTS_REFUSED = "mirrorhub_nbd_refused_clients_total", Count, Kind::Counter, [],
        "NBD connections refused for their address or for room, or ended for a fault of the client: TLS, protocol, time";
    HTTP_CLIENTS_REFUSED = "mirrorhub_http_refused_clients_total", Count, Kind::Counter, [],
        "HTTP connections refused for their address or TLS handshake: certificate, time, or room for others";
    NBD_REQUESTS = "mirrorhub_nbd_requests_total", Count, Kind::Counter,
        [closed("command", NBD_COMMANDS)], "NBD requests answered";
    NBD_REQUEST_ERRORS = "mirrorhub_nbd_request_errors_total", Count, Kind::Counter,
        [closed("command", NBD_COMMANDS)], "NBD requests answered with an error";
}
