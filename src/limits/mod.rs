//! Every bound of the program in one place, tied together by `const` assertions.
//!
//! Floor 1. A queue, buffer, frame or table is bounded by a name from here (invariant 8). Where
//! two bounds depend on each other, an assertion below says so: it fails the build, not the run.

use crate::units::BLOCK_BYTES_U64;
use crate::units::convert::to_u64;

/// One KiB.
pub const KIB: u64 = 1 << 10;
/// One MiB.
pub const MIB: u64 = 1 << 20;
/// One GiB.
pub const GIB: u64 = 1 << 30;

// ---- entries and transfers (section 3, R16) ----

/// Data bytes in one entry: a longer request is cut at block boundaries.
pub const ENTRY_DATA_BYTES_MAX: u64 = 256 * KIB;
/// Bytes of one transfer: header, entry table and data.
pub const TRANSFER_BYTES_MAX: u64 = MIB;
/// Entries in one transfer.
pub const TRANSFER_ENTRIES_MAX: u64 = 4096;

// ---- records, rings and logs (section 7) ----

/// Records are padded to this: the smallest sector that O_DIRECT knows.
pub const RECORD_ALIGN_BYTES: u64 = 512;
/// Bytes of one record with envelope and padding.
pub const RECORD_BYTES_MAX: u64 = TRANSFER_BYTES_MAX + 4 * KIB;
/// Bytes of the ring that a start holds in memory to write a damaged source log again.
pub const LOG_MEND_BYTES_MAX: u64 = 64 * MIB;
/// Bytes one group commit writes at most.
pub const COMMIT_BYTES_MAX: u64 = 4 * MIB;
/// Bytes behind what a ring's header calls durable in which a start looks for records: without rot they are
/// read once, whatever the size of the ring.
pub const RING_AHEAD_BYTES_MAX: u64 = 64 * MIB;
/// Smallest data area of a ring.
pub const RING_BYTES_MIN: u64 = 8 * MIB;
/// Largest data area of a ring.
pub const RING_BYTES_MAX: u64 = 1 << 42;
/// A source log grows ahead of need by as much as it is long, at most by this.
pub const SOURCE_LOG_STEP_BYTES: u64 = 8 * MIB;
/// And at least by this: logs of many sources that write little take little.
pub const SOURCE_LOG_STEP_BYTES_MIN: u64 = 64 * KIB;
/// Source log files open at once on a hub.
pub const SOURCE_LOG_FILES_OPEN_MAX: usize = 1024;

// ---- wire (section 8) ----

/// Bytes of a frame's MessagePack header.
pub const FRAME_HEADER_BYTES_MAX: u64 = 256 * KIB;
/// Bytes of a frame's payload.
pub const FRAME_PAYLOAD_BYTES_MAX: u64 = TRANSFER_BYTES_MAX;
/// Bytes of a frame of CP data.
pub const CP_FRAME_BYTES_MAX: u64 = 256 * KIB;
/// CP data bytes that may stand unsent before a transfer.
pub const CP_BYTES_BEFORE_TRANSFER_MAX: u64 = 128 * KIB;
/// Frames in a connection's send queue.
pub const SEND_QUEUE_FRAMES: usize = 64;
/// Seconds a new connection may take to say who it is.
pub const HANDSHAKE_SECONDS_MAX: u64 = 10;
/// Connections that have not yet said who they are.
pub const HANDSHAKES_MAX: usize = 64;
/// Addresses that are remembered because a source came from there: they go before strangers.
pub const REGULARS_MAX: usize = 4096;
/// Bytes of transfers one source may have under way to the hub at least (the `log` credit floor).
pub const LOG_CREDIT_BYTES_MIN: u64 = 4 * TRANSFER_BYTES_MAX;
/// Bytes of CP data one source may have under way (the `cp` credit).
pub const CP_CREDIT_BYTES: u64 = 2 * MIB;
/// A frame of CP data counts as at least so many bytes of the `cp` credit: empty ones are not free.
/// Unit tests shrink it.
pub const CP_FRAME_CHARGE_BYTES_MIN: u64 = if cfg!(test) { 1 } else { 4 * KIB };
/// What all sources of a hub may have under way together, transfers and CP data: each source gets
/// an equal part as its credits, at least `LOG_GRANT_BYTES_MIN` and `CP_FRAME_BYTES_MAX`.
pub const HUB_CREDIT_BYTES_TOTAL: u64 = GIB;
/// The least `log` credit of a source that is not waiting: a transfer.
pub const LOG_GRANT_BYTES_MIN: u64 = TRANSFER_BYTES_MAX + TRANSFER_BYTES_MAX / 4;
/// A transfer takes at most so many times its bytes in a log: the smallest fills one sector.
pub const LOG_BYTES_PER_TRANSFER_BYTE: u64 = 5;
/// CPs of a source that have entries in its logs and are not published: the one that is frozen
/// and the one that is open.
pub const UNPUBLISHED_CPS_MAX: usize = 2;
/// CPs that a source has done alone while its image was brought up, and that the hub is to build from the log: each
/// has a file there.
pub const BEHIND_CPS_MAX: usize = if cfg!(test) { 4 } else { 256 };
/// Bytes that a hub takes behind a pass before it says so, unless it has all that came.
pub const BEHIND_TOLD_BYTES: u64 = 256 * KIB;
/// Bytes of problems that the answer to a scan names; how many more there are is counted.
pub const SCAN_PROBLEM_BYTES_MAX: u64 = 32 * KIB;
/// Small messages that wait to be sent to one hub.
pub const MESSAGES_WAITING_MAX: usize = 1024;

/// Nodes asked for in one request of a pull: the answer stands before no transfer for long.
pub const PULL_NODES_MAX: u64 = 62;
/// Blocks asked for in one request of a pull, likewise.
pub const PULL_BLOCKS_MAX: u64 = 31;
/// Bytes of answers a pull may have under way or not yet written.
pub const PULL_WINDOW_BYTES: u64 = CP_CREDIT_BYTES;
/// Requests a pull may have under way.
pub const PULL_REQUESTS_MAX: usize = 64;
/// Sources of a hub whose images are brought up by a pass at once; more wait for their turn.
pub const PASSES_MAX: usize = 16;
/// Blocks and holes a pull knows to differ, and has not yet written.
pub const PULL_PARTS_MAX: u64 = 16_384;
/// Smallest such number: twice what one node and the holes behind it become.
pub const PULL_PARTS_MIN: u64 = 512;

// ---- volumes and pool (sections 6, 11) ----

/// Children of a tree node.
pub const NODE_CHILDREN: usize = 128;
/// Levels of the tree of the largest volume.
pub const TREE_HEIGHT_MAX: u8 = 6;
/// Largest volume: 128^6 blocks of 4 KiB are 16 PiB.
pub const VOLUME_BYTES_MAX: u64 = (1 << (7 * TREE_HEIGHT_MAX)) * BLOCK_BYTES_U64;
/// Volumes of one source.
pub const VOLUMES_PER_SOURCE_MAX: usize = 256;
/// Sources of one hub.
pub const SOURCES_MAX: usize = 16_384;
/// Certificates that the file of one source names.
pub const CERTIFICATES_MAX: usize = 8;
/// Networks whose clients are served in the clear, of one process.
pub const PLAIN_NETWORKS_MAX: usize = 64;
/// Smallest reserve of a pool. Unit tests shrink it, so that pools get full.
pub const POOL_RESERVE_BYTES_MIN: u64 = if cfg!(test) { MIB } else { 64 * MIB };
/// Smallest device of a pool.
pub const POOL_DEVICE_BYTES_MIN: u64 = 256 * MIB;
/// Largest device of a pool.
pub const POOL_DEVICE_BYTES_MAX: u64 = VOLUME_BYTES_MAX;
/// Smallest catalog region of a pool. Unit tests shrink it.
pub const POOL_CATALOG_BYTES_MIN: u64 = if cfg!(test) { 8 * MIB } else { 16 * MIB };
/// One part of the data in so many is added to the catalog region, for history and rows.
pub const POOL_CATALOG_SHARE: u64 = 128;
/// What that part is at most.
pub const POOL_CATALOG_SHARE_BYTES_MAX: u64 = 4 * GIB;
/// The catalog region is so many times what may be stored in it: copy-on-write, growth by
/// doubling and half-filled pages never meet its end.
pub const POOL_CATALOG_SPARE: u64 = 8;
/// Rows of sources and volumes together: they are held in memory as well.
pub const POOL_CATALOG_ROW_BYTES_MAX: u64 = 64 * MIB;
/// Bytes that a source's row keeps for the modules above.
pub const SOURCE_EXTENSION_BYTES_MAX: usize = 4096;
/// Bytes that a part above the pool may remember in its catalog under one name.
pub const NOTE_BYTES_MAX: usize = 16_384;
/// Blocks that the device lost and whose content is known again, of one pool, in memory.
pub const MENDED_BLOCKS_MAX: usize = if cfg!(test) { 64 } else { 4096 };
/// Places of one source that a mending may leave as they are before it gives up.
pub const MEND_FAILURES_MAX: usize = 64;
/// Blocks and nodes that one end asks the other for at a time.
pub const PLACES_ASKED_MAX: usize = 16;
/// How long the answer to such a question is waited for.
pub const PLACE_SECONDS_MAX: u64 = 5;
/// CPs whose number, sequence, stream hash and roots a source's catalog keeps (R5).
pub const HISTORY_ROWS_MAX: u64 = 65_536;
/// Blocks a write set takes at once, so that CPs built side by side are each written in sequence.
pub const POOL_LEASE_BLOCKS: u64 = 256;
/// Bytes of one device write or read of the pool.
pub const POOL_IO_BYTES_MAX: u64 = MIB;
/// Bytes of one write to a pool's device that has stripes: each write waits for the journal and for the
/// slowest device, whatever its length. Unit tests shrink it.
pub const POOL_STRIPED_IO_BYTES_MAX: u64 = if cfg!(test) { MIB } else { 4 * MIB };
/// Catalog changes that gather while a commit runs; more callers wait.
pub const POOL_GROUP_CHANGES_MAX: usize = 1024;

// ---- RAID (section 11) ----

/// Devices of one array.
pub const RAID_MEMBERS_MAX: usize = 16;
/// Arrays that may be added to one behind the first.
pub const RAID_ADDED_MAX: usize = 7;
/// Bytes side by side on one device of a stripe. Unit tests shrink it.
pub const RAID_CHUNK_BYTES: u64 = if cfg!(test) { 16 * KIB } else { 64 * KIB };
/// Bytes of the journal on each device that has one. Unit tests shrink it.
pub const RAID_JOURNAL_BYTES: u64 = if cfg!(test) { 512 * KIB } else { 16 * MIB };
/// Blocks of partial stripes that are held in memory until the next flush. Unit tests shrink it.
pub const RAID_PENDING_BLOCKS_MAX: usize = if cfg!(test) { 16 } else { 512 };
/// Stripes written whole at once; unit tests shrink it.
pub const RAID_WHOLE_STRIPES_MAX: u64 = if cfg!(test) { 4 } else { 64 };
/// An answer of a device of an array that takes so many milliseconds is slow. Unit tests shrink it.
pub const RAID_SLOW_MS: u64 = if cfg!(test) { 200 } else { 10_000 };
/// A device with so many slow answers in [`RAID_VERDICT_SECONDS`] is failed.
pub const RAID_SLOW_ANSWERS_MAX: usize = 3;
/// A device with so many errors in [`RAID_VERDICT_SECONDS`] is failed. Unit tests shrink it.
pub const RAID_ERRORS_MAX: usize = if cfg!(test) { 24 } else { 64 };
/// Time over which the answers of a device are judged.
pub const RAID_VERDICT_SECONDS: u64 = 10 * 60;
/// Stripes filled of a new device between two notes in the labels. Unit tests shrink it.
pub const REBUILD_STRIPES_NOTED: u64 = if cfg!(test) { 4 } else { 4096 };
/// Blocks without a right copy that a scrub names; more are only counted.
pub const SCRUB_LOST_NAMED_MAX: usize = 1000;
/// Blocks of a volume that a scrub reads under one pin. Unit tests shrink it.
pub const SCRUB_SLICE_BLOCKS: u64 = if cfg!(test) { 128 } else { 128 * 128 * 8 };
/// Rows whose copies differ that a scrub looks up in the trees at once.
pub const SCRUB_ROWS_MAX: usize = 4096;
/// CPs of one source kept by name.
pub const KEPT_PER_SOURCE_MAX: usize = 256;
/// Pinned images at once.
pub const PINS_MAX: usize = 65_536;

// ---- NBD (section 13, crates.md 3) ----

/// Bytes of one NBD request, as the protocol text recommends.
pub const NBD_REQUEST_BYTES_MAX: u64 = 32 * MIB;
/// Bytes of one NBD option.
pub const NBD_OPTION_BYTES_MAX: u64 = 16 * KIB;
/// Options in one handshake.
pub const NBD_OPTIONS_MAX: usize = 256;
/// Requests of one NBD connection under way at once.
pub const NBD_REQUESTS_IN_FLIGHT_MAX: usize = 128;
/// Bytes of large requests of one NBD connection held in memory at once.
pub const NBD_BYTES_IN_FLIGHT_MAX: u64 = 32 * MIB;
/// Bytes of small requests of one NBD connection held in memory at once.
pub const NBD_SMALL_BYTES_IN_FLIGHT_MAX: u64 = 8 * MIB;
/// Request bytes of all NBD connections of a process held in memory at once.
pub const NBD_BYTES_IN_FLIGHT_TOTAL: u64 = 512 * MIB;
/// One part in so many of them is kept for small requests: large ones cannot take it away.
pub const NBD_SMALL_SHARE: u64 = 4;
/// The largest small request.
pub const NBD_SMALL_REQUEST_BYTES_MAX: u64 = 256 * KIB;
/// Replies under way hold back reading of further requests from this many bytes on.
pub const NBD_EAGER_WRITE_BYTES: u64 = 256 * KIB;
/// NBD connections of one process.
pub const NBD_CONNECTIONS_MAX: usize = 1024;
/// What a TLS handshake of an NBD client is given at least, however many others wait for its place.
pub const NBD_UPGRADE_GRACE_MS: u64 = 250;
/// Bytes of a string of the NBD protocol: a name, a description, an error text.
pub const NBD_STRING_BYTES_MAX: usize = 4096;
/// Payload of an NBD option that is too long to be taken and short enough to be skipped.
pub const NBD_OPTION_SKIP_BYTES_MAX: u64 = MIB;
/// Payload of a refused NBD write that is still read and thrown away; beyond, we hang up.
pub const NBD_WRITE_SKIP_BYTES_MAX: u64 = 2 * NBD_REQUEST_BYTES_MAX;
/// Extents in one answer to a block status request.
pub const NBD_EXTENTS_MAX: usize = 65_536;
/// Seconds for a request to come whole, or for the replies that wait to be taken, besides the time
/// of their bytes. Not renewed by what moves: a client that trickles must not hold memory for hours.
pub const NBD_STALL_SECONDS_MAX: u64 = 20;
/// Bytes that a client must at least move in a second, inside a request or a reply.
pub const NBD_RATE_BYTES_MIN: u64 = if cfg!(test) { 64 * MIB } else { MIB };
/// Seconds a client is given to take the last replies when we hang up.
pub const NBD_LINGER_SECONDS_MAX: u64 = 1;
/// Seconds a stop waits for requests under way before it cuts their connections.
pub const NBD_DRAIN_SECONDS_MAX: u64 = 30;

// ---- replay (section 10) ----

/// Blocks that gather before a replay writes them through; up to six times as many are in memory: they
/// hold up to twice their length of log, and the next gather meanwhile. Unit tests shrink it, so that each takes several passes.
pub const REPLAY_BLOCKS_MAX: u64 = if cfg!(test) { 6 } else { 8192 };
/// Blocks that gather before the first time: each time twice as many, so that reading and writing
/// soon go on beside each other.
pub const REPLAY_BLOCKS_FIRST: u64 = if cfg!(test) { 6 } else { 1024 };
/// Entries that gather before a replay writes them through: what they know of blocks in part, and
/// the holes they make, takes memory as well.
pub const REPLAY_ENTRIES_MAX: u64 = if cfg!(test) { 9 } else { 262_144 };

/// Ranges of bytes that the log of one source may make while it is served before it is applied:
/// 1 GiB of it in entries of 4 KiB is a quarter of that. A log that makes more is applied first.
pub const OVERLAY_EXTENTS_MAX: u64 = 1 << 20;
/// Ranges that all such logs of a hub may make together.
pub const OVERLAY_EXTENTS_TOTAL: u64 = 4 << 20;
/// Bytes of memory that one of them takes at most: 64 MiB for a source, 256 MiB for a hub.
pub const OVERLAY_EXTENT_BYTES: u64 = 64;

// ---- hooks ----

/// Bytes of a stream of a hook's output that go to the log.
pub const HOOK_OUTPUT_BYTES_MAX: u64 = 64 * KIB;
/// Bytes of one line of it.
pub const HOOK_LINE_BYTES_MAX: u64 = 4 * KIB;
/// Milliseconds that a hook may take.
pub const HOOK_TIMEOUT_MS: (u64, u64) = (100, 60 * 60 * 1000);
/// Arguments of a hook.
pub const HOOK_ARGUMENTS_MAX: usize = 64;

// ---- actors ----

/// Messages in a source actor's mailbox.
pub const ACTOR_MAILBOX_MESSAGES: usize = 64;

// ---- configuration (section 13); the bounds of single keys ----

/// Bytes of one configuration file.
pub const CONFIG_FILE_BYTES_MAX: u64 = MIB;
/// Smallest guaranteed share of the hub's ring.
pub const NVRAM_SHARE_BYTES_MIN: u64 = LOG_CREDIT_BYTES_MIN;
/// Milliseconds between two CPs of a source.
pub const CHECKPOINT_INTERVAL_MS: (u64, u64) = (100, 24 * 60 * 60 * 1000);
/// Milliseconds without the hub after which it counts as lost.
pub const HUB_TIMEOUT_MS: (u64, u64) = (100, 60 * 60 * 1000);
/// Bytes a second of `resync_limit`.
pub const RESYNC_LIMIT_BYTES: std::ops::RangeInclusive<u64> = (64 << 10)..=(1 << 40);
/// Bytes that the hub may be behind in semi-sync: at least a transfer, so that one can be sent.
pub const LAG_BYTES: (u64, u64) = (TRANSFER_BYTES_MAX, 1 << 40);
/// Milliseconds that the hub may be behind in semi-sync.
pub const LAG_TIME_MS: (u64, u64) = (10, 60 * 60 * 1000);
/// Milliseconds that a pin lasts at most.
pub const IMAGE_PIN_MS: (u64, u64) = (60 * 1000, 30 * 24 * 60 * 60 * 1000);
/// Bytes of the path of a unix socket: `sun_path` of unix(7) without its final zero.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

// ---- admin socket and HTTP ----

/// Bytes of a request or answer on the admin socket.
pub const ADMIN_MESSAGE_BYTES_MAX: u64 = 4 * MIB;
/// Connections of the admin socket at once.
pub const ADMIN_CONNECTIONS_MAX: usize = 64;
/// Readers of events that wait for the next one, beside these.
pub const ADMIN_FOLLOWERS_MAX: usize = 32;
/// Events that a process remembers, and the longest text of one.
pub const EVENTS_KEPT: usize = 1024;
/// See [`EVENTS_KEPT`].
pub const EVENT_TEXT_BYTES: usize = 512;
/// Longest answer, in as many messages as it takes: the status of a full hub.
pub const ADMIN_ANSWER_BYTES_MAX: u64 = 64 * MIB;
/// Bytes of an answer that go in one message; quoted they are up to six times as many.
pub const ADMIN_PART_BYTES: usize = 512 * 1024;
/// Sources that one command has make a CP at a time.
pub const CHECKPOINTS_AT_ONCE: usize = 64;
/// Seconds an admin connection may take to send its request, or to take an answer line.
pub const ADMIN_IO_SECONDS_MAX: u64 = 10;
/// Milliseconds between two progress lines of an admin answer.
pub const ADMIN_PROGRESS_MS: u64 = 100;
/// Bytes of a piece of a file that is sent to the admin socket.
pub const SEED_PIECE_BYTES_MAX: u64 = MIB;
/// Pieces that wait until they are written to a seed.
pub const SEED_PIECES_WAITING: usize = 4;
/// Seeds that were taken over or given up, of which status still tells.
pub const SEEDS_ENDED_SHOWN_MAX: usize = if cfg!(test) { 4 } else { 1024 };
/// HTTP connections of one process.
pub const HTTP_CONNECTIONS_MAX: usize = 64;
/// Seconds an HTTP connection may stand without a byte in either direction.
pub const HTTP_IDLE_SECONDS_MAX: u64 = 30;
/// Seconds that HTTP requests under way get when the process stops.
pub const HTTP_STOP_SECONDS_MAX: u64 = 5;
/// Pages that are told of changes at once; the rest of the connections stays for Prometheus and
/// health.
pub const HTTP_LIVE_MAX: usize = 32;
/// Seconds between two points of the page's history.
pub const HISTORY_STEP_SECONDS: u64 = 10;
/// Points of the page's history of one source: an hour.
pub const HISTORY_POINTS_MAX: usize = 360;
/// Events that the page shows, and names of sources that are gone which it is told of.
pub const PAGE_EVENTS_MAX: usize = 500;
/// Seconds between two runs of the metric recorder's upkeep.
pub const METRIC_UPKEEP_SECONDS: u64 = 5;

/// What a frame of CP data with that payload counts as, at both ends.
pub const fn cp_charge(payload_bytes: u64) -> u64 {
    if payload_bytes < CP_FRAME_CHARGE_BYTES_MIN {
        CP_FRAME_CHARGE_BYTES_MIN
    } else {
        payload_bytes
    }
}

const _: () = {
    assert!(ENTRY_DATA_BYTES_MAX.is_multiple_of(BLOCK_BYTES_U64));
    assert!(ENTRY_DATA_BYTES_MAX * 2 <= TRANSFER_BYTES_MAX, "a transfer holds two full entries");
    assert!(TRANSFER_ENTRIES_MAX * 32 + ENTRY_DATA_BYTES_MAX <= TRANSFER_BYTES_MAX);
    assert!(RECORD_BYTES_MAX.is_multiple_of(RECORD_ALIGN_BYTES));
    assert!(RECORD_BYTES_MAX <= COMMIT_BYTES_MAX);
    assert!(RING_AHEAD_BYTES_MAX >= 2 * COMMIT_BYTES_MAX, "not a header for each commit");
    assert!(COMMIT_BYTES_MAX < RING_BYTES_MIN, "a group commit never laps its own ring");
    assert!(CP_FRAME_BYTES_MAX <= FRAME_PAYLOAD_BYTES_MAX);
    assert!(CP_FRAME_BYTES_MAX <= CP_CREDIT_BYTES);
    assert!(PULL_PARTS_MIN <= PULL_PARTS_MAX && PULL_PARTS_MIN >= 4 * 128);
    assert!(LOG_GRANT_BYTES_MIN >= RECORD_BYTES_MAX && LOG_GRANT_BYTES_MIN <= LOG_CREDIT_BYTES_MIN);
    assert!(104 * LOG_BYTES_PER_TRANSFER_BYTE >= RECORD_ALIGN_BYTES, "header and one entry");
    assert!(SCAN_PROBLEM_BYTES_MAX * 4 <= FRAME_HEADER_BYTES_MAX);
    assert!(POOL_RESERVE_BYTES_MIN * 4 <= POOL_DEVICE_BYTES_MIN);
    assert!(RAID_MEMBERS_MAX / 2 <= RAID_ADDED_MAX + 1, "an array has two devices at least");
    // Two records of the journal fit it: each pending block with two of parity, and their table.
    assert!(
        (to_u64(RAID_PENDING_BLOCKS_MAX) * 3 * (BLOCK_BYTES_U64 + 16) + 3 * BLOCK_BYTES_U64) * 2
            <= RAID_JOURNAL_BYTES
    );
    assert!(POOL_IO_BYTES_MAX == POOL_LEASE_BLOCKS * BLOCK_BYTES_U64, "a lease is one write");
    assert!(OVERLAY_EXTENTS_TOTAL * OVERLAY_EXTENT_BYTES <= 256 * MIB);
    assert!(GIB / BLOCK_BYTES_U64 * 4 <= OVERLAY_EXTENTS_MAX);
    assert!(NBD_REQUEST_BYTES_MAX <= NBD_BYTES_IN_FLIGHT_MAX);
    assert!(NBD_SMALL_REQUEST_BYTES_MAX <= NBD_SMALL_BYTES_IN_FLIGHT_MAX);
    assert!(
        NBD_BYTES_IN_FLIGHT_MAX * 10 <= NBD_BYTES_IN_FLIGHT_TOTAL,
        "a fraction of what all have"
    );
    assert!(NBD_SMALL_BYTES_IN_FLIGHT_MAX * 10 <= NBD_BYTES_IN_FLIGHT_TOTAL / NBD_SMALL_SHARE);
    assert!(NBD_OPTION_BYTES_MAX <= NBD_OPTION_SKIP_BYTES_MAX);
    assert!(NBD_EXTENTS_MAX <= 1 << 20, "the protocol's own bound");
    assert!(NVRAM_SHARE_BYTES_MIN >= LOG_CREDIT_BYTES_MIN, "credit stands on ring share (R10)");
    assert!(NVRAM_SHARE_BYTES_MIN >= 2 * RECORD_BYTES_MAX, "a share holds two transfers (R16)");
    assert!(RING_BYTES_MIN / 2 >= 2 * RECORD_BYTES_MAX, "a partition holds two transfers (R16)");
};
