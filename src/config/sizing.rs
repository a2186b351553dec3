//! The sizing rules of section 13, computed for one configuration: what `config check` prints.
//!
//! Rates and times of CPs are not in any file, so a line says what the configured size carries, and
//! the administrator compares it with what the machine is meant to do.

use std::path::Path;

use serde::Serialize;

use super::quantity::format_size;
use super::schema::{HubConfig, SourceConfig, VolumeConfig};
use crate::limits::{GIB, MIB};
use crate::units::convert::to_u64;
use crate::units::numbers::ByteCount;

/// Memory of a source beside its NVRAM.
const SOURCE_MEMORY_BYTES: u64 = 64 * MIB;
/// NVRAM of a source over peak write rate times time of one CP.
const SOURCE_NVRAM_FACTOR: u64 = 4;
/// Seconds of the steady rate that the hub's ring holds beside the shares.
const HUB_RING_SECONDS: u64 = 4;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SizingLine {
    /// What it is about.
    pub what: &'static str,
    /// Its size in bytes.
    pub bytes: u64,
    /// What that carries, in words.
    pub carries: String,
}

/// The lines, and what an administrator may want to think over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sizing {
    /// One for each rule.
    pub lines: Vec<SizingLine>,
    /// Allowed, but rarely meant.
    pub notes: Vec<String>,
}

/// Of a hub.
pub fn of_hub(hub: &HubConfig) -> Sizing {
    let enabled = || hub.sources.iter().filter(|source| source.file.enabled);
    let shares = enabled().fold(0, |sum, source| sum + source.nvram_share.0);
    let rest = hub.nvram.size.0.saturating_sub(shares);
    let count = to_u64(enabled().count());
    let mut notes = Vec::new();
    if hub.sources.is_empty() {
        notes.push(format!("no source has a file in {}", hub.sources_dir.display()));
    }
    let ring = SizingLine {
        what: "ring",
        bytes: hub.nvram.size.0,
        carries: format!(
            "{} guaranteed to {count} {}; the rest takes {} MiB/s for {HUB_RING_SECONDS} s",
            format_size(ByteCount(shares)),
            if count == 1 { "source" } else { "sources" },
            rest / HUB_RING_SECONDS / MIB,
        ),
    };
    let log = SizingLine {
        what: "log room",
        bytes: free_room(&hub.log_dir).unwrap_or(0),
        carries: format!(
            "free below {}; it needs the sum of the sources' NVRAM",
            hub.log_dir.display()
        ),
    };
    let volumes: Vec<&VolumeConfig> =
        hub.sources.iter().flat_map(|source| &source.file.volumes).collect();
    let pool = hub.pool.size_met();
    let mut lines = vec![ring, log, pool_line(pool)];
    lines.extend(volumes_line("pinned volumes", &volumes, pool, &mut notes));
    Sizing { lines, notes }
}

/// Of a source.
pub fn of_source(source: &SourceConfig) -> Sizing {
    let nvram = source.nvram.size.0;
    let ring = SizingLine {
        what: "NVRAM",
        bytes: nvram,
        carries: format!(
            "a peak of {} MiB/s if a CP takes 1 s, half of that at 2 s",
            nvram / SOURCE_NVRAM_FACTOR / MIB,
        ),
    };
    let memory = SizingLine {
        what: "memory",
        bytes: nvram.saturating_add(nvram / 2).saturating_add(SOURCE_MEMORY_BYTES),
        carries: "needed at most, beside what clients have under way: 1.5 x NVRAM and 64MiB".into(),
    };
    let mut notes = Vec::new();
    let volumes: Vec<&VolumeConfig> = source.volumes.iter().collect();
    let pool = source.pool.size_met();
    let mut lines = vec![ring, memory, pool_line(pool)];
    lines.extend(volumes_line("volumes", &volumes, pool, &mut notes));
    Sizing { lines, notes }
}

fn pool_line(ByteCount(bytes): ByteCount) -> SizingLine {
    // Used bytes x 1.1 have to fit.
    let used = rounded_down(bytes / 11 * 10);
    SizingLine {
        what: "pool",
        bytes,
        carries: format!("{used} in use (used bytes x 1.1), less what kept CPs hold"),
    }
}

/// Whole GiB or, below ten of them, whole MiB.
fn rounded_down(bytes: u64) -> String {
    let unit = if bytes >= 10 * GIB { GIB } else { MIB };
    format_size(ByteCount(bytes / unit * unit))
}

fn volumes_line(
    what: &'static str,
    volumes: &[&VolumeConfig],
    pool: ByteCount,
    notes: &mut Vec<String>,
) -> Option<SizingLine> {
    let bytes = volumes.iter().fold(0_u64, |sum, volume| sum.saturating_add(volume.size.0));
    let percent = u128::from(bytes) * 100 / u128::from(pool.0.max(1));
    if percent > 100 {
        notes.push("thin: the volumes together are larger than the pool".into());
    }
    (!volumes.is_empty()).then(|| SizingLine {
        what,
        bytes,
        carries: format!("{percent}% of the pool if all of it were written"),
    })
}

/// Bytes that the file system of `directory`, or of its nearest parent that is there, has free.
fn free_room(directory: &Path) -> Option<u64> {
    let found = directory.ancestors().find_map(|path| rustix::fs::statvfs(path).ok())?;
    found.f_bavail.checked_mul(found.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::schema::{DeviceConfig, PoolConfig, Raid, ScrubConfig};

    #[test]
    fn a_pool_carries_its_size_over_one_point_one() {
        let pool = ByteCount(1100 * MIB);
        assert!(pool_line(pool).carries.starts_with("1000MiB in use"));
        let mut notes = Vec::new();
        let volume = VolumeConfig { name: "v".parse().unwrap(), size: ByteCount(550 * MIB) };
        let line = volumes_line("volumes", &[&volume], pool, &mut notes).unwrap();
        assert_eq!(
            (line.carries.as_str(), notes.len()),
            ("50% of the pool if all of it were written", 0)
        );
        let three = [&volume, &volume, &volume];
        volumes_line("volumes", &three, pool, &mut notes).unwrap();
        assert_eq!(notes, ["thin: the volumes together are larger than the pool"]);
        assert_eq!(volumes_line("volumes", &[], pool, &mut notes), None);
    }

    /// Goal: of a pool that was grown the labels say what it has; the count of its devices does not.
    #[test]
    fn a_grown_pool_is_as_large_as_its_arrays() {
        use crate::raid::{assemble, layout::Level, span};
        let dir = tempfile::tempdir().unwrap();
        let device = |n: u64| DeviceConfig {
            path: dir.path().join(format!("disk{n}")),
            size: ByteCount(4 * MIB),
        };
        let mut pool = PoolConfig {
            raid: Raid::Parity2,
            devices: (0..4).map(device).collect(),
            scrub: ScrubConfig::default(),
            rebuild_limit: None,
        };
        let small = pool.size();
        assert_eq!(pool.size_met(), small, "nothing is there: as the file says");
        let open =
            |one: &DeviceConfig| crate::raid::files::new_device(&one.path, one.size).unwrap();
        let devices: Vec<_> = pool.devices.iter().map(open).collect();
        let home = assemble::create(Level::Parity2, &devices).unwrap();
        let more: Vec<DeviceConfig> = (4..8).map(device).collect();
        let added: Vec<_> = more.iter().map(open).collect();
        span::add(&home, crate::units::ids::ArrayId([3; 16]), &added).unwrap();
        pool.devices.extend(more);
        assert!(pool.size().0 > 2 * small.0, "the control: eight devices are taken for one array");
        assert_eq!(pool.size_met().0, 2 * small.0, "while a process has them");
        pool.devices.truncate(4);
        assert_eq!(pool.size_met(), small, "the file does not name the others yet");
    }

    #[test]
    fn free_room_is_that_of_the_nearest_parent() {
        let directory = tempfile::tempdir().unwrap();
        assert!(free_room(&directory.path().join("not/yet/there")).unwrap() > 0);
    }
}
